//! The PostgreSQL endpoint as its clients see it: `psql` with its commands, psycopg, asyncpg, SQLAlchemy, node-postgres,
//! the statements that JDBC's driver and Grafana send; logins with SCRAM, TLS, and many sessions at a time.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::harness::programs::{output, python_with};
use crate::harness::server::signal;
use crate::harness::{Down, Process, Server, Setup, free_port, now_ms, program, run, series, wait_for};

fn filled() -> Server {
    let server = Server::start();
    fill(&server);
    server
}

/// Returns the time of the first rows.
fn fill(server: &Server) -> i64 {
    let start = now_ms() / 60_000 * 60_000 - 3_600_000;
    let points = |first: f64| (0..60).map(|i| (start + i * 1000, first + i as f64)).collect::<Vec<_>>();
    server.write(&[
        series("requests_total", &[("job", "api"), ("instance", "a")], &points(0.0)),
        series("requests_total", &[("job", "api"), ("instance", "b")], &points(100.0)),
        series("requests_total", &[("job", "web"), ("instance", "c")], &points(1000.0)),
    ]);
    start
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/postgres").join(name)
}

/// Runs a script of ours with the server's port; it says when it is done.
fn python(module: &str, name: &str) {
    let Some(python) = python_with(module) else { return };
    let server = filled();
    let out = run(&python, [script(name).display().to_string(), server.postgres.port().to_string()]);
    assert_eq!(out.trim(), "done");
}

#[test]
fn psycopg_gets_everything() {
    python("psycopg", "with_psycopg.py");
}

#[test]
fn asyncpg_gets_everything() {
    python("asyncpg", "with_asyncpg.py");
}

#[test]
fn sqlalchemy_lists_and_asks() {
    python("sqlalchemy, psycopg", "with_sqlalchemy.py");
}

#[test]
fn node_postgres_gets_everything() {
    let modules = std::env::var_os("TEST_PYTHON").map(PathBuf::from);
    let modules = modules.and_then(|p| Some(p.parent()?.parent()?.join("node_modules")));
    let Some(modules) = modules.filter(|m| m.join("pg").is_dir()) else {
        eprintln!("skipped: node-postgres is not installed");
        return;
    };
    let Some(node) = program("node") else { return };
    let server = filled();
    let mut command = Command::new(node);
    command.arg(script("with_pg.js")).arg(server.postgres.port().to_string()).env("NODE_PATH", modules);
    let output = command.output().expect("node runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Runs a script of transactions and changes the data whenever it asks for that.
fn beside_a_transaction(server: &Server, start: i64, what: &str) {
    let Some(python) = python_with("psycopg") else { return };
    let mut command = Command::new(python);
    command.arg(script("in_transaction.py")).arg(server.postgres.port().to_string()).arg(what);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("python runs");
    let mut input = child.stdin.take().expect("a piped input");
    let asked = BufReader::new(child.stdout.take().expect("a piped output"));
    let admin = |path: &str, pairs: &[(&str, &str)]| {
        let answer = server.client().form(path, pairs);
        assert!((200..300).contains(&answer.status), "{path}: {}", answer.text());
    };
    let mut written = 0;
    for line in asked.lines() {
        match line.expect("a line").as_str() {
            "write" => {
                written += 1;
                let at = start + 500 + written;
                server.write(&[
                    series("requests_total", &[("job", "api"), ("instance", "a")], &[(at, 5000.0)]),
                    series("requests_total", &[("job", "api"), ("instance", "new"), ("zone", "z")], &[(at, 1.0)]),
                    series("later", &[("job", "api")], &[(at, 1.0)]),
                ]);
            }
            "flush" => server.flush(),
            "compact" => server.compact(),
            "delete" => admin("/api/v1/admin/tsdb/delete_series", &[("match[]", "requests_total{instance=\"b\"}")]),
            "fold" => admin("/api/v1/admin/tsdb/clean_tombstones", &[]),
            other => panic!("{other}"),
        }
        input.write_all(b"done\n").expect("the script waits");
    }
    assert!(child.wait().expect("python ends").success());
}

#[test]
fn a_transaction_sees_one_state_of_the_data() {
    let server = Server::start();
    let start = fill(&server);
    beside_a_transaction(&server, start, "isolated");
}

#[test]
fn a_transaction_that_outlives_its_data_is_told() {
    let environment = vec![("THALWEG_DELETE_GRACE".to_owned(), "0s".to_owned())];
    let server = Down::new(Setup { environment, ..Setup::default() }).start();
    let start = fill(&server);
    server.flush();
    beside_a_transaction(&server, start, "too_old");
}

/// `psql` for a server, with its errors in full.
struct Psql {
    program: PathBuf,
    server: Server,
}

impl Psql {
    fn new() -> Option<Self> {
        Some(Self { program: program("psql")?, server: filled() })
    }

    fn arguments(&self) -> Vec<String> {
        let port = self.server.postgres.port().to_string();
        let fixed =
            ["-X", "-At", "-v", "VERBOSITY=verbose", "-h", "127.0.0.1", "-U", "any", "-d", "thalweg", "-p", &port];
        fixed.map(str::to_owned).to_vec()
    }

    /// What it prints for a script on its standard input, errors included.
    fn run(&self, script: &str) -> String {
        let mut command = Command::new(&self.program);
        command.args(self.arguments()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("psql runs");
        let mut input = child.stdin.take().expect("a piped input");
        input.write_all(script.as_bytes()).expect("the script is read");
        drop(input);
        let output = child.wait_with_output().expect("psql ends");
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    }
}

#[test]
fn psql_runs_its_commands() {
    let Some(psql) = Psql::new() else { return };
    let commands = [
        "\\l",
        "\\l+",
        "\\d",
        "\\d+",
        "\\dt",
        "\\dt+",
        "\\d samples",
        "\\d+ samples",
        "\\d+ prometheus.requests_total",
        "\\dv",
        "\\dv+ prometheus.*",
        "\\df",
        "\\df pg_*",
        "\\du",
        "\\du+",
        "\\dn",
        "\\di",
        "\\da",
        "\\db",
        "\\dC",
        "\\dg",
        "\\dS",
        "\\ds",
        "\\dm",
        "\\dE",
        "\\conninfo",
        "\\encoding",
        "\\timing",
        "\\dt *.*",
        "\\dn+",
        "\\df+",
        "\\dT",
        "\\dT+",
        "\\dT text",
        "\\dd",
        "\\do",
        "\\dL",
        "\\dD+",
        "\\dX",
        "\\ddp",
        "\\drds",
        "\\dF",
        "\\dFd",
        "\\dFp",
        "\\dFt",
        "\\dy",
        "\\dAc",
        "\\dAf",
        "\\dAo",
        "\\dAp",
        "\\dAp+",
        "\\db+",
        "\\deu",
        "\\dx+",
        "\\dconfig",
        "\\sf now",
        // What it asks before it completes a word.
        "SELECT channel FROM pg_catalog.pg_listening_channels() AS channel WHERE channel LIKE '%' LIMIT 1000",
        "SELECT name FROM pg_catalog.pg_available_extensions WHERE name LIKE '%' AND installed_version IS NULL",
        "SELECT rulename FROM pg_catalog.pg_rules WHERE rulename LIKE '%' LIMIT 1000",
        "SELECT name FROM pg_catalog.pg_prepared_statements WHERE name LIKE '%' LIMIT 1000",
        "SELECT d.datname FROM pg_catalog.pg_database d WHERE d.datname LIKE '%' AND (d.datistemplate OR \
         pg_catalog.pg_has_role(d.datdba, 'USAGE')) LIMIT 1000",
        "SELECT pg_catalog.quote_literal(name) AS name FROM pg_catalog.pg_timezone_names() WHERE \
         pg_catalog.lower(name) LIKE pg_catalog.lower('%') LIMIT 1000",
    ];
    for command in commands {
        let said = psql.run(command);
        assert!(!said.contains("ERROR") && !said.contains("FATAL"), "{command}: {said}");
    }
    let check = |script: &str, expected: &str| {
        let said = psql.run(script);
        assert!(said.contains(expected), "{script}: {said}");
    };
    check(
        "SELECT value, ts, metric, tags, series FROM samples \\gdesc",
        "value|double precision\nts|timestamp with time zone",
    );
    check("\\copy (SELECT value FROM samples ORDER BY value LIMIT 2) TO STDOUT WITH CSV HEADER", "value\n0\n1\n");
    check("\\dAp btree integer_ops", "btree|integer_ops|integer|integer|1|btint4cmp");
    check("SELECT count(*) > 300 FROM pg_timezone_names", "t");
    check("SELECT count(*) FROM pg_get_keywords() WHERE word = 'select'", "1");
    check(
        "PREPARE one AS SELECT 1;\nSELECT name, statement, from_sql FROM pg_prepared_statements;",
        "one|PREPARE one AS SELECT 1|t",
    );
    check(
        "BEGIN;\nDECLARE c SCROLL CURSOR FOR SELECT 1;\n\
         SELECT name, is_holdable, is_binary, is_scrollable FROM pg_cursors;\nCLOSE c;\nSELECT count(*) FROM pg_cursors;",
        "c|f|f|t\nCLOSE CURSOR\n0",
    );
    check(
        "SELECT name, abbrev, utc_offset, is_dst FROM pg_timezone_names() WHERE name = 'Asia/Tokyo'",
        "Asia/Tokyo|JST|09:00:00|f",
    );
    check("\\set FETCH_COUNT 7\nSELECT value FROM samples ORDER BY value;\nSELECT 'still here';", "1059\nstill here");
    check("\\set AUTOCOMMIT off\nSELECT 1;\nROLLBACK;\nSELECT 2;", "ROLLBACK\n2");
    check("\\set ON_ERROR_ROLLBACK on\nBEGIN;\nSELECT x;\nSELECT 3;\nCOMMIT;", "3\nCOMMIT");
}

#[test]
fn errors_tell_where_and_what_was_meant() {
    let Some(psql) = Psql::new() else { return };
    let check = |query: &str, expected: &[&str]| {
        let said = psql.run(query);
        for part in expected {
            assert!(said.contains(part), "{query}: no {part:?} in {said}");
        }
    };
    check(
        "SELECT instnce FROM prometheus.requests_total;",
        &["42703: column \"instnce\" does not exist", "LINE 1: SELECT instnce FROM", "Perhaps you meant", "instance"],
    );
    check("SELECT cuont(*) FROM samples;", &["42883: function", "LINE 1: SELECT cuont"]);
    check("SELECT 1;\nSELECT * FROM smples;", &["42P01: relation \"smples\" does not exist", "^", "\"samples\""]);
    check("SELECT metric, count(*) FROM samples;", &["42803: column \"samples.metric\" must appear", "LINE 1:"]);
    check("SELECT sum(metric) FROM samples;", &["42883: function sum(text) does not exist", "explicit type casts"]);
    check("SELECT 1 +;", &["42601: syntax error"]);
    check("SELECT 'x'::int;", &["22P02: invalid input syntax for type integer: \"x\""]);
    check("SELECT $1;", &["42P02: there is no parameter $1"]);
    check("FETCH 1 FROM nothing;", &["34000: cursor \"nothing\" does not exist"]);
    check("BEGIN;\nSELECT x;\nSELECT 1;\nEND;", &["25P02: current transaction is aborted", "ROLLBACK"]);
}

#[test]
fn what_a_session_keeps_is_bounded() {
    let Some(psql) = Psql::new() else { return };
    let many = |each: &dyn Fn(usize) -> String| (0..1100).map(each).collect::<String>();
    let said = psql.run(&many(&|i| format!("PREPARE p{i} AS SELECT 1;\n")));
    assert!(said.contains("54000: a connection keeps at most 1000 prepared statements"), "{said}");
    let cursors: String = (0..110).map(|i| format!("DECLARE c{i} CURSOR WITH HOLD FOR SELECT 1;\n")).collect();
    let said = psql.run(&cursors);
    assert!(said.contains("54000: a connection keeps at most 100 cursors"), "{said}");
    let said = psql.run(&many(&|i| format!("SET my.v{i} = 1;\n")));
    assert!(said.contains("54000: a session keeps at most 100 parameters"), "{said}");
}

#[test]
fn what_jdbc_and_grafana_send_is_answered() {
    let Some(psql) = Psql::new() else { return };
    // What Grafana's macros expand to.
    let filter = "ts BETWEEN (now() - interval '2 hours') AND now()";
    let check = |query: &str, expected: &str| {
        let said = psql.run(query);
        assert!(said.contains(expected) && !said.contains("ERROR"), "{query}: {said}");
    };
    let group = "floor(extract(epoch from ts)/3600)*3600";
    check(&format!("SELECT {group} AS \"time\", count(*) FROM samples WHERE {filter} GROUP BY 1 ORDER BY 1;"), "180");
    let between = "ts BETWEEN '2020-01-01T00:00:00Z' AND '2100-01-01T00:00:00Z'";
    check(&format!("SELECT count(*) FROM samples WHERE {between};"), "180");
    check("SELECT count(*) FROM samples WHERE extract(epoch from ts) >= 1577836800;", "180");
    check("SELECT date_bin('1 hour', ts, timestamptz '2000-01-01') AS t, max(value) FROM samples GROUP BY t;", "1059");
    check("SELECT current_setting('server_version_num')::int / 100 AS version;", "1500");
    check("SELECT quote_ident(table_name) FROM information_schema.tables WHERE table_schema = 'public';", "samples");
    // JDBC's driver.
    check("SET extra_float_digits = 3;\nSET application_name = 'PostgreSQL JDBC Driver';", "SET");
    let columns = "SELECT n.nspname, c.relname, a.attname, a.atttypid, t.typname, row_number() OVER (PARTITION BY a.attrelid \
                   ORDER BY a.attnum) AS attnum FROM pg_catalog.pg_namespace n JOIN pg_catalog.pg_class c ON \
                   (c.relnamespace = n.oid) JOIN pg_catalog.pg_attribute a ON (a.attrelid = c.oid) JOIN \
                   pg_catalog.pg_type t ON (a.atttypid = t.oid) WHERE c.relkind IN ('r','p','v','f','m') AND a.attnum > 0 \
                   AND NOT a.attisdropped AND c.relname LIKE 'samples' ORDER BY nspname, c.relname, attnum;";
    check(columns, "public|samples|ts|1184|timestamptz|1");
}

/// The password of [`entry`].
pub const PASSWORD: &str = "correct horse battery";

/// The entry of a user who may read.
pub fn entry() -> String {
    let mut child = Command::new(env!("CARGO_BIN_EXE_thalweg"))
        .args(["user", "new", "--name", "alice", "--scope", "read"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    writeln!(child.stdin.take().expect("a piped input"), "{PASSWORD}").expect("the password is read");
    String::from_utf8(child.wait_with_output().expect("the binary ends").stdout).expect("an entry is text")
}

/// Whether `psql` gets an answer, and what it prints.
fn ask(psql: &Path, address: &str, user: &str, password: &str, more: &str) -> (bool, String) {
    let url = format!("postgres://{user}@{address}/thalweg?{more}");
    let mut command = Command::new(psql);
    command.args(["-w", "-X", "-At", "-c", "SELECT 1", "-c", "\\conninfo", &url]).env("PGPASSWORD", password);
    let output = command.output().expect("psql runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

#[test]
fn users_log_in_with_scram() {
    let Some(psql) = program("psql") else { return };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let auth = dir.path().join("auth.toml");
    let reader = entry();
    let writer = reader.replace("alice", "bob").replace("\"read\"", "\"write\"");
    let admin = reader.replace("alice", "root").replace("\"read\"", "\"admin\"");
    std::fs::write(&auth, format!("{reader}\n{writer}\n{admin}")).expect("a file");
    let environment = vec![("THALWEG_AUTH_FILE".to_owned(), auth.display().to_string())];
    let server = Down::new(Setup { environment, ..Setup::default() }).start();
    let check = |user: &str, password: &str, more: &str, right: bool, expected: &str| {
        let (succeeded, text) = ask(&psql, &server.postgres.to_string(), user, password, more);
        assert!(succeeded == right && text.contains(expected), "{user}: {text}");
    };
    check("alice", PASSWORD, "", true, "1\n");
    check("alice", "wrong", "", false, "password authentication failed");
    check("ghost", PASSWORD, "", false, "password authentication failed");
    check("bob", PASSWORD, "", false, "lack the scope");
    check("alice", PASSWORD, "sslmode=require", false, "server does not support SSL");
    let settings = |user: &str| {
        let url = format!("postgres://{user}@{}/thalweg", server.postgres);
        let mut command = Command::new(&psql);
        command.args(["-w", "-X", "-At", "-c", "SELECT count(*) > 10 FROM catalog.settings", &url]);
        let output = command.env("PGPASSWORD", PASSWORD).output().expect("psql runs");
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    };
    assert_eq!(settings("root"), "t\n");
    assert!(settings("alice").contains("permission denied"));
}

#[test]
fn connections_are_encrypted_where_that_is_asked() {
    let Some(psql) = program("psql") else { return };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let key = rcgen::KeyPair::generate().expect("a key");
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let params = rcgen::CertificateParams::new(names).expect("parameters");
    let certificate = params.self_signed(&key).expect("a certificate");
    let path = |name: &str| dir.path().join(name).display().to_string();
    let write = |name: &str, text: &str| std::fs::write(path(name), text).expect("a file");
    write("cert.pem", &certificate.pem());
    write("key.pem", &key.serialize_pem());
    write("auth.toml", &entry());
    for required in [false, true] {
        let files = format!("tls_cert = '{}'\ntls_key = '{}'\n", path("cert.pem"), path("key.pem"));
        let settings = format!("{files}auth_file = '{}'\npostgres_tls_required = {required}\n", path("auth.toml"));
        write("thalweg.toml", &settings);
        let address = format!("127.0.0.1:{}", free_port());
        let (config, data) = (path("thalweg.toml"), path("data"));
        let arguments = ["serve", "--config", &config, "--data-dir", &data, "--http", "127.0.0.1:0"];
        let arguments = arguments.into_iter().chain(["--grpc", "off", "--postgres", &address]);
        let _server = Process::start(Path::new(env!("CARGO_BIN_EXE_thalweg")), arguments, &dir.path().join("log"));
        let verified = format!("sslmode=verify-full&sslrootcert={}", path("cert.pem"));
        wait_for("the server", || ask(&psql, &address, "alice", PASSWORD, &verified).0.then_some(()));
        let check = |password: &str, more: &str, right: bool, expected: &str| {
            let (succeeded, text) = ask(&psql, &address, "alice", password, more);
            assert!(succeeded == right && text.contains(expected), "{more}: {text}");
        };
        check(PASSWORD, &verified, true, "TLSv1.3");
        check("wrong", &verified, false, "password authentication failed");
        let refusal = "only takes connections with TLS";
        check(PASSWORD, "sslmode=disable", !required, if required { refusal } else { "1\n" });
    }
}

#[test]
fn a_stopping_server_tells_its_clients() {
    let Some(psql) = Psql::new() else { return };
    let endless = "SELECT count(*) FROM samples a, samples b, samples c, samples d WHERE a.value + d.value < 0";
    let mut command = Command::new(&psql.program);
    command.args(psql.arguments()).args(["-c", endless]).stdout(Stdio::null()).stderr(Stdio::piped());
    let child = command.spawn().expect("psql runs");
    let running = || psql.server.client().get("/metrics").text().contains("thalweg_queries_running 1").then_some(());
    wait_for("the query", running);
    signal(psql.server.pid(), "TERM");
    let output = child.wait_with_output().expect("psql ends");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("57P01: terminating connection due to administrator command"), "{text}");
}

/// A variable of the environment that is a number.
fn asked(name: &str) -> Option<usize> {
    std::env::var(name).ok().map(|v| v.parse().unwrap_or_else(|_| panic!("{name} is no number: {v}")))
}

/// 100 sessions at a time on 1 GiB: each of their queries is answered, or refused for want of memory or of a turn, and the
/// server takes no more than that and a constant. In full with `POSTGRES_SESSIONS=n`: each of them asks so many queries of
/// a million samples.
#[test]
fn a_hundred_sessions_at_a_time_are_answered() {
    const LIMIT: usize = 1 << 30;
    /// The binary, which is large without optimisation, threads, and what is not seen in time.
    const BEYOND: usize = 512 << 20;
    let Some(program) = program("psql") else { return };
    let full = asked("POSTGRES_SESSIONS");
    let environment = vec![("THALWEG_MEMORY_LIMIT".to_owned(), LIMIT.to_string())];
    let psql = Psql { program, server: Down::new(Setup { environment, ..Setup::default() }).start() };
    fill(&psql.server);
    let start = now_ms() - 3_600_000;
    for i in 0..if full.is_some() { 4000 } else { 4 } {
        let points: Vec<(i64, f64)> =
            (0..250).map(|k| (start + k * 10_000, ((i * 7919 + k * 13) % 1009) as f64)).collect();
        psql.server.write(&[series(
            "load",
            &[("instance", &format!("i{i}")), ("zone", &format!("z{}", i % 3))],
            &points,
        )]);
    }
    let rows = psql.run("SELECT count(*) FROM samples;");
    let queries = [
        "SELECT count(*) FROM samples",
        "SELECT instance, max(value) FROM prometheus.requests_total GROUP BY instance ORDER BY 1",
        "SELECT a.value FROM prometheus.requests_total a JOIN prometheus.requests_total b ON a.ts = b.ts ORDER BY 1",
        "SELECT table_name FROM information_schema.tables",
        "COPY samples TO STDOUT",
        "SELECT * FROM prometheus.requests_total a CROSS JOIN prometheus.requests_total b \
         ORDER BY a.value + b.value, a.ts, b.ts LIMIT 10",
        "SELECT nothing FROM samples",
        "COPY (SELECT ts, instance, value FROM prometheus.load ORDER BY value, ts, instance) TO STDOUT",
        "SELECT count(*) FROM (SELECT DISTINCT ts, value, instance FROM prometheus.load) AS x",
        "SELECT max(r) FROM (SELECT row_number() OVER (PARTITION BY zone ORDER BY value, ts) AS r FROM prometheus.load) AS x",
        "SELECT instance, array_agg(value ORDER BY ts) FROM prometheus.load GROUP BY instance",
        "BEGIN; SELECT count(*) FROM samples; SELECT string_agg(instance, ',') FROM prometheus.load; COMMIT",
    ];
    let children: Vec<_> = (0..100)
        .map(|i| {
            let mut command = Command::new(&psql.program);
            command.args(psql.arguments());
            for n in 0..full.unwrap_or(5) {
                command.args(["-c", queries[(i + n) % queries.len()]]);
            }
            let (out, err) = (Stdio::null(), Stdio::piped());
            command.stdin(Stdio::null()).stdout(out).stderr(err).spawn().expect("psql runs")
        })
        .collect();
    for child in children {
        let output = child.wait_with_output().expect("psql ends");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let odd = text.lines().filter(|l| l.contains("ERROR") || l.contains("FATAL") || l.contains("lost"));
        // A column that is not there, no memory, no turn in time; memory is short; the deadline.
        let told = ["42703", "53200", "53300", "54000", "57014"];
        let odd: Vec<&str> = odd.filter(|l| !told.iter().any(|code| l.contains(code))).collect();
        assert!(odd.is_empty(), "{odd:?}");
    }
    assert_eq!(psql.run("SELECT count(*) FROM samples;"), rows);
    let status = std::fs::read_to_string(format!("/proc/{}/status", psql.server.pid())).expect("the server runs");
    let most = status.lines().find_map(|l| l.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<usize>().ok());
    let most = most.expect("the most memory that it held") << 10;
    println!("at most {} MiB of memory", most >> 20);
    assert!(most <= LIMIT + BEYOND, "{most} bytes of memory were held, {LIMIT} may be");
}

#[test]
fn a_server_that_cannot_encrypt_does_not_start() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let config = dir.path().join("thalweg.toml");
    let check = |settings: &str, expected: &str| {
        std::fs::write(&config, settings).expect("a file");
        let arguments = ["serve".to_owned(), "--config".to_owned(), config.display().to_string()];
        let output = output(Path::new(env!("CARGO_BIN_EXE_thalweg")), arguments);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains(expected), "{settings}: {text}");
    };
    check("postgres_tls_required = true", "postgres_tls_required needs tls_cert and tls_key");
    check("tls_cert = '/nothing'\ntls_key = '/nothing'", "cannot read");
}
