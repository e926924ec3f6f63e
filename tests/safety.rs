//! Who may do what, and what nobody may: credentials, TLS, secrets, SQL that would open files, paths that would leave.

mod encryption;
mod secrets;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

use crate::harness::server::{Down, Setup, signal};
use crate::harness::{Response, Server, now_ms, program, series, wait_for};

const READER: &str = "canary-reader-0123456789abcdef0123456789abcdef";
const WRITER: &str = "canary-writer-0123456789abcdef0123456789abcdef";
const ADMIN: &str = "canary-admin-0123456789abcdef0123456789abcdef";
const PASSWORD: &str = "canary pass:word";

/// What a subcommand prints for a line of standard input.
pub fn hashed(arguments: &[&str], line: &str) -> String {
    let mut child = Command::new(env!("CARGO_BIN_EXE_thalweg"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    writeln!(child.stdin.take().expect("a piped input"), "{line}").expect("the input is read");
    let output = child.wait_with_output().expect("the binary ends");
    assert!(output.status.success());
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn token_entry(name: &str, token: &str, scope: &str) -> String {
    let hash = hashed(&["token", "hash"], token);
    format!("[[token]]\nname = \"{name}\"\nsha256 = \"{hash}\"\nscopes = [\"{scope}\"]\n")
}

/// A reader, a writer, an administrator and the user `root`, who is one, too.
fn auth_file() -> String {
    let root = hashed(&["user", "hash"], PASSWORD);
    let tokens = [("reader", READER, "read"), ("writer", WRITER, "write"), ("admin", ADMIN, "admin")];
    let tokens: String = tokens.iter().map(|(name, token, scope)| token_entry(name, token, scope)).collect();
    format!("{tokens}[[user]]\nname = \"root\"\nargon2 = \"{root}\"\nscopes = [\"admin\"]\n")
}

/// A server that asks for credentials.
struct Guarded {
    server: Server,
    auth_file: PathBuf,
    _dir: TempDir,
}

impl Guarded {
    fn start(settings: &str, expected: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let (auth, config) = (dir.path().join("auth.toml"), dir.path().join("thalweg.toml"));
        std::fs::write(&auth, auth_file()).expect("a file");
        std::fs::write(&config, format!("auth_file = {:?}\n{settings}", auth.display())).expect("a file");
        let setup = Setup {
            arguments: vec!["--config".to_owned(), config.display().to_string()],
            expected: expected.iter().map(|e| (*e).to_owned()).collect(),
            ..Setup::default()
        };
        Self { server: Down::new(setup).start(), auth_file: auth, _dir: dir }
    }

    fn ask(&self, method: &str, path: &str, authorization: Option<&str>) -> Response {
        let headers: Vec<(&str, &str)> = authorization.map(|a| ("Authorization", a)).into_iter().collect();
        self.server.client().request(method, path, &headers, b"").expect("an answer")
    }

    /// Asks until the answer is no refusal.
    fn wait_for(&self, path: &str, authorization: &str) {
        wait_for("an answer", || (self.ask("GET", path, Some(authorization)).status == 200).then_some(()));
    }
}

fn bearer(token: &str) -> String {
    format!("Bearer {token}")
}

/// The header of a user with a password.
pub fn basic(user: &str, password: &str) -> String {
    use std::fmt::Write as _;
    // Base64 by hand: the tests depend on no crate for it.
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::from("Basic ");
    for chunk in format!("{user}:{password}").as_bytes().chunks(3) {
        let bits = chunk.iter().fold(0u32, |n, b| n << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let digit = DIGITS[(bits >> (18 - 6 * i)) as usize & 63] as char;
            let _ = write!(out, "{}", if i <= chunk.len() { digit } else { '=' });
        }
    }
    out
}

/// Every route of a server with its scope.
fn table(guarded: &Guarded) -> Vec<(String, String)> {
    let answer = guarded.ask("GET", "/api/v1/admin/routes", Some(&bearer(ADMIN)));
    assert_eq!(answer.status, 200, "{}", answer.text());
    let answer = answer.json();
    let text = |v: &serde_json::Value| v.as_str().expect("text").to_owned();
    answer["data"].as_array().expect("a list").iter().map(|d| (text(&d["path"]), text(&d["scope"]))).collect()
}

#[test]
fn every_route_wants_its_scope() {
    let guarded = Guarded::start("", &[]);
    let table = table(&guarded);
    let of = |scope: &str| table.iter().filter(|(_, s)| s == scope).map(|(p, _)| p.as_str()).collect::<Vec<_>>();
    assert_eq!(of("public"), ["/-/healthy", "/-/ready"], "what needs no credentials must be harmless");
    assert_eq!(of("write"), ["/api/v1/write"]);
    assert!(of("read").contains(&"/metrics") && of("read").contains(&"/api/v1/sql"), "{table:?}");
    for path in ["/api/v1/admin/flush", "/api/v1/admin/tsdb/delete_series", "/api/v1/status/config"] {
        assert!(of("admin").contains(&path), "{path} is not in {table:?}");
    }
    for (path, scope) in &table {
        assert!(scope == "admin" || !path.contains("admin"), "{path} needs only {scope}");
    }
    let (root, wrong) = (basic("root", PASSWORD), basic("root", "wrong"));
    let credentials = [
        (None, ""),
        (Some(bearer("wrong")), ""),
        (Some(wrong), ""),
        (Some("Digest x".to_owned()), ""),
        (Some(bearer(READER)), "read"),
        (Some(bearer(WRITER)), "write"),
        (Some(bearer(ADMIN)), "admin"),
        (Some(root), "admin"),
    ];
    for (path, scope) in &table {
        let path = path.replace("{name}", "job");
        for (authorization, has) in &credentials {
            for method in ["GET", "POST", "DELETE"] {
                let answer = guarded.ask(method, &path, authorization.as_deref());
                let status = answer.status;
                let what = format!("{method} {path} with {has:?}: {status} {}", answer.text());
                match (scope.as_str(), *has) {
                    ("public", _) | (_, "admin") => assert!(![401, 403].contains(&status), "{what}"),
                    (scope, has) if scope == has => assert!(![401, 403].contains(&status), "{what}"),
                    // After ten failures an address waits; what a sender must send again is answered 503.
                    (_, "") => match status {
                        401 => assert!(answer.header("www-authenticate").is_some(), "{what}"),
                        429 | 503 => assert!(answer.header("retry-after").is_some(), "{what}"),
                        _ => panic!("{what}"),
                    },
                    (scope, _) => {
                        assert_eq!(status, 403, "{what}");
                        assert!(answer.text().contains(scope), "{what}");
                    }
                }
            }
        }
    }
    let metrics = guarded.ask("GET", "/metrics", Some(&bearer(READER))).text();
    assert!(metrics.contains("thalweg_access_denied_total{reason=\"scope\"}"), "{metrics}");
}

/// Who is let in nowhere must not fill the disk with lines.
#[test]
fn a_denial_is_a_short_line() {
    let guarded = Guarded::start("", &["access denied"]);
    let path = format!("/api/v1/label/{}/values", "x".repeat(60_000));
    assert_eq!(guarded.ask("GET", &path, None).status, 401);
    let log = wait_for("the line", || Some(guarded.server.log()).filter(|log| log.contains("access denied")));
    assert!(log.lines().all(|line| line.len() < 1000), "{log}");
}

#[test]
fn sql_clients_show_a_password_or_a_token() {
    let Some(psql) = program("psql") else { return };
    let guarded = Guarded::start("", &[]);
    let check = |user: &str, password: Option<&str>, expected: Result<&str, &str>| {
        let url = format!("postgres://{user}@{}/thalweg?sslmode=disable", guarded.server.postgres);
        let mut command = Command::new(&psql);
        command.args(["-w", "-X", "-At", "-c", "SELECT 1", &url]).env_remove("PGPASSWORD");
        let output = command.envs(password.map(|p| ("PGPASSWORD", p))).output().expect("psql runs");
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        match expected {
            Ok(rows) => assert_eq!(out.trim(), rows, "{user}: {err}"),
            Err(message) => assert!(!output.status.success() && err.contains(message), "{user}: {out}{err}"),
        }
    };
    check("root", None, Err("password"));
    check("root", Some("wrong"), Err("password authentication failed"));
    check("reader", Some(WRITER), Err("password authentication failed"));
    check("writer", Some(WRITER), Err("lack the scope"));
    check("reader", Some(READER), Ok("1"));
    check("root", Some(PASSWORD), Ok("1"));
}

#[test]
fn credentials_are_loaded_again_and_broken_ones_are_not() {
    let guarded = Guarded::start("", &["cannot load"]);
    let (old, new) = (bearer(READER), bearer("another-reader-0123456789abcdef0123456789abcdef"));
    assert_eq!(guarded.ask("GET", "/metrics", Some(&old)).status, 200);
    assert_eq!(guarded.ask("GET", "/metrics", Some(&new)).status, 401);
    let entries = token_entry("reader", &new["Bearer ".len()..], "read");
    std::fs::write(&guarded.auth_file, &entries).expect("a file");
    guarded.wait_for("/metrics", &new);
    // Asking too early was guessing, which this address may have to wait for.
    assert!([401, 429].contains(&guarded.ask("GET", "/metrics", Some(&old)).status));

    std::fs::write(&guarded.auth_file, "[[token]]\nname = 'canary'").expect("a file");
    signal(guarded.server.pid(), "HUP");
    let failed = "thalweg_reload_failed{what=\"auth_file\"} 1";
    wait_for("the gauge", || guarded.ask("GET", "/metrics", Some(&new)).text().contains(failed).then_some(()));
    std::fs::write(&guarded.auth_file, entries).expect("a file");
    signal(guarded.server.pid(), "HUP");
    let well = "thalweg_reload_failed{what=\"auth_file\"} 0";
    wait_for("the gauge", || guarded.ask("GET", "/metrics", Some(&new)).text().contains(well).then_some(()));
}

#[test]
fn wrong_passwords_are_slowed_down_and_right_ones_are_not() {
    let guarded = Guarded::start("", &[]);
    let right = basic("root", PASSWORD);
    assert_eq!(guarded.ask("GET", "/metrics", Some(&right)).status, 200);
    let statuses: Vec<u16> =
        (0..1000).map(|n| guarded.ask("GET", "/metrics", Some(&basic("root", &n.to_string()))).status).collect();
    assert!(statuses.iter().all(|s| [401, 429].contains(s)), "{statuses:?}");
    assert!(statuses.iter().filter(|s| **s == 401).count() < 50, "{statuses:?}");
    assert_eq!(guarded.ask("GET", "/metrics", Some(&right)).status, 200);
    assert_eq!(guarded.ask("GET", "/metrics", Some(&bearer(READER))).status, 200);
}

#[test]
fn what_is_not_safe_does_not_start() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("a file");
        path.display().to_string()
    };
    let (auth, broken) = (file("auth", &auth_file()), file("broken", "[[token]]"));
    let check = |settings: &str, expected: &str| {
        let config = file("config", settings);
        let data = dir.path().join("data").display().to_string();
        let output = thalweg(&["serve", "--config", &config, "--data-dir", &data], &[]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && stderr.contains(expected), "{settings}: {stderr}");
    };
    check("http = '0.0.0.0:0'", "set auth_file");
    check("http = '127.0.0.1:0'\ngrpc = '[::]:0'", "set auth_file");
    check(&format!("auth_file = '{auth}'\npostgres = '0.0.0.0:0'"), "encrypts nothing");
    check("tls_cert = 'x'\ntls_key = 'y'\nhttp = '0.0.0.0:0'", "set auth_file");
    check("auth_file = '/nonexistent'", "cannot read auth_file");
    check(&format!("auth_file = '{broken}'"), "name must be");
    check("tls_cert = '/nonexistent'", "need each other");
    check("tls_cert = '/nonexistent'\ntls_key = '/nonexistent'", "cannot read certificates in /nonexistent");
    check(&format!("tls_cert = '{auth}'\ntls_key = '{auth}'"), "no certificate");
}

#[test]
fn browsers_are_told_what_answers_are() {
    let server = Server::start();
    let mut client = server.client();
    for path in ["/-/ready", "/metrics", "/api/v1/query?query=1", "/api/v1/sql?query=SELECT+1", "/nothing"] {
        let answer = client.get(path);
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"), "{path}");
        assert!(
            answer.header("content-security-policy").is_some_and(|p| p.starts_with("default-src 'none'")),
            "{path}"
        );
        assert_eq!(answer.header("access-control-allow-credentials"), None, "{path}");
    }
    // A page in the browser of somebody who can reach the server must not change anything.
    for path in ["/api/v1/write", "/api/v1/admin/flush", "/api/v1/admin/tsdb/delete_series?match[]=up"] {
        assert_eq!(client.post(path, &[("Origin", "http://attacker.example")], b"").status, 403, "{path}");
    }
}

#[test]
fn no_path_leaves_what_is_served() {
    let guarded = Guarded::start("", &[]);
    let table = table(&guarded);
    let forms = [
        "/../../../../../../etc/passwd",
        "/..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/%252e%252e%252f%252e%252e%252fetc%252fpasswd",
        "/..%c0%af..%c0%afetc/passwd",
        "/..\\..\\..\\etc\\passwd",
        "/....//....//etc/passwd",
        "//etc/passwd",
        "/;/../../etc/passwd",
        "/%00/etc/passwd",
        "/file:%2f%2f%2fetc%2fpasswd",
    ];
    for (path, _) in &table {
        for form in forms {
            let inside = path.replace("{name}", form.trim_start_matches('/'));
            for path in [format!("{path}{form}"), inside, format!("{form}{path}")] {
                let answer = guarded.ask("GET", &path.replace(' ', "%20"), Some(&bearer(READER)));
                assert!(!answer.text().contains("root:"), "{path}: {}", answer.text());
                assert!(answer.status < 500, "{path}: {} {}", answer.status, answer.text());
            }
        }
    }
}

#[test]
fn no_statement_opens_a_file_or_a_url() {
    let server = Server::start();
    server.write(&[series("m", &[], &[(now_ms(), 1.0)])]);
    let dir = tempfile::tempdir().expect("a temporary folder");
    // Whoever opens this for reading or writing waits for the other side, and the test with it.
    let pipe = dir.path().join("pipe.parquet");
    assert!(Command::new("mkfifo").arg(&pipe).status().is_ok_and(|s| s.success()), "mkfifo runs");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.set_nonblocking(true).expect("a listener");
    let url = format!("http://{}/x.parquet", listener.local_addr().expect("an address"));
    let file = pipe.display().to_string();
    let mut statements = Vec::new();
    for target in [file.clone(), format!("file://{file}"), url, "s3://bucket/x.parquet".to_owned()] {
        for form in [
            "SELECT * FROM '{}'",
            "SELECT * FROM \"{}\"",
            "TABLE \"{}\"",
            "EXPLAIN SELECT * FROM '{}'",
            "EXPLAIN ANALYZE SELECT * FROM \"{}\"",
            "COPY m TO '{}'",
            "COPY (SELECT 1) TO '{}'",
            "COPY (SELECT 1) TO '{}' STORED AS PARQUET",
            "COPY m FROM '{}'",
            "COPY (SELECT 1) TO PROGRAM 'cat > {}'",
            "CREATE EXTERNAL TABLE t STORED AS PARQUET LOCATION '{}'",
            "CREATE TABLE t AS SELECT * FROM '{}'",
            "INSERT INTO \"{}\" VALUES (1)",
            "SELECT * FROM read_parquet('{}')",
            "SELECT * FROM read_csv('{}')",
            "SELECT * FROM read_json('{}')",
            "SELECT * FROM parquet_scan('{}')",
            "SELECT * FROM parquet_metadata('{}')",
            "SELECT * FROM glob('{}')",
            "SELECT pg_read_file('{}')",
            "SELECT pg_read_binary_file('{}')",
            "SELECT pg_ls_dir('{}')",
            "SELECT pg_stat_file('{}')",
            "SELECT lo_import('{}')",
            "SELECT lo_export(1, '{}')",
            "SELECT * FROM file('{}')",
            "SELECT * FROM url('{}')",
            "SELECT load_file('{}')",
            "SELECT 1 INTO OUTFILE '{}'",
            "WITH x AS (SELECT * FROM '{}') SELECT * FROM x",
            "SELECT (SELECT count(*) FROM '{}')",
            "LOAD '{}'",
            "ATTACH '{}' AS x",
            "IMPORT DATABASE '{}'",
            "EXPORT DATABASE '{}'",
            "INSTALL '{}'",
            "CREATE FUNCTION f() RETURNS int AS '{}' LANGUAGE C",
            "CREATE EXTENSION \"{}\"",
            "CREATE SERVER s FOREIGN DATA WRAPPER w OPTIONS (host '{}')",
            "SELECT dblink_connect('{}')",
        ] {
            statements.push(form.replace("{}", &target));
        }
    }
    let mut client = server.client();
    let psql = program("psql");
    for statement in &statements {
        let answer = client.post("/api/v1/sql", &[("Content-Type", "text/plain")], statement.as_bytes());
        assert!((400..500).contains(&answer.status), "{statement}: {} {}", answer.status, answer.text());
    }
    if let Some(psql) = psql {
        // One connection for all: with ON_ERROR_STOP off psql goes on after each error.
        let mut input = tempfile::NamedTempFile::new().expect("a temporary file");
        for statement in statements.iter().filter(|s| !s.starts_with("COPY m FROM")) {
            writeln!(input, "{statement};").expect("a file");
        }
        let url = format!("postgres://tester@{}/thalweg", server.postgres);
        let arguments = ["-X", "-At", "-f", &input.path().display().to_string(), &url];
        let output = Command::new(psql).args(arguments).output().expect("psql runs");
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(out.trim(), "", "a statement was answered");
        let errors = err.matches("ERROR:").count();
        assert_eq!(errors, statements.iter().filter(|s| !s.starts_with("COPY m FROM")).count(), "{err}");
    }
    let accepted = listener.accept().map(drop).map_err(|e| e.kind());
    assert_eq!(accepted, Err(std::io::ErrorKind::WouldBlock), "the server called a URL");
}

#[test]
fn sql_shows_a_reader_no_settings_and_no_queries_of_others() {
    let guarded = Guarded::start("", &[]);
    let ask = |query: &str, token: &str| {
        let path = format!("/api/v1/sql?format=csv&query={}", query.replace(' ', "+").replace('%', "%25"));
        let answer = guarded.ask("GET", &path, Some(&bearer(token)));
        (answer.status, answer.text())
    };
    let settings = "SELECT least(count(*), 10) AS n FROM catalog.settings";
    let (status, text) = ask(settings, READER);
    assert!(status == 400 && text.contains("permission denied") && text.contains("42501"), "{status} {text}");
    assert_eq!(ask(settings, ADMIN), (200, "n\n10\n".to_owned()));
    let users = "SELECT DISTINCT username FROM catalog.queries ORDER BY 1";
    assert_eq!(ask(users, READER), (200, "username\nreader\n".to_owned()));
    assert_eq!(ask(users, ADMIN), (200, "username\nadmin\nreader\n".to_owned()));
    let Some(python) = crate::harness::programs::python_with("adbc_driver_flightsql.dbapi, pyarrow") else { return };
    for (token, expected) in [("wrong", "unauth"), (WRITER, "permission")] {
        let (out, err) = crate::flight::ask(&python, &guarded.server, token);
        assert!(out.is_empty() && err.to_lowercase().contains(expected), "{out}{err}");
    }
    for credentials in [READER.to_owned(), format!("root:{PASSWORD}")] {
        let (out, err) = crate::flight::ask(&python, &guarded.server, &credentials);
        assert!(out.is_empty() && err.contains("relation"), "who is let in finds no such metric: {out}{err}");
    }
}

fn thalweg(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_thalweg"));
    command.args(arguments).envs(environment.iter().copied()).output().expect("the binary runs")
}

/// Whether a text holds anything that must stay secret.
fn leaks(text: &str) -> Option<&str> {
    let encoded = basic("root", PASSWORD);
    let encoded = &encoded["Basic ".len()..];
    text.lines().find(|line| line.contains("canary") || line.contains(encoded))
}

/// A file in a folder.
fn write(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, text).expect("a file");
    path.display().to_string()
}
