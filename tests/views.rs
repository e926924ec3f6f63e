//! Views: who may make them, what they mean, and that they outlive restarts, a new SQL catalog, and backups.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use tempfile::TempDir;

use crate::harness::programs::{output, python_with};
use crate::harness::server::{Down, Setup};
use crate::harness::{Server, now_ms, program, series};
use crate::safety::hashed;

const READER: &str = "reader-of-views-0123456789abcdef0123456789";
const MAKER: &str = "maker-of-views-0123456789abcdef0123456789";
const ADMIN: &str = "admin-of-views-0123456789abcdef0123456789";

/// A server that knows a reader, somebody who may write too, and an administrator.
struct Guarded {
    server: Server,
    psql: PathBuf,
    _dir: TempDir,
}

fn entry(name: &str, token: &str, scopes: &str) -> String {
    let hash = hashed(&["token", "hash"], token);
    format!("[[token]]\nname = \"{name}\"\nsha256 = \"{hash}\"\nscopes = [{scopes}]\n")
}

impl Guarded {
    fn start() -> Option<Self> {
        let psql = program("psql")?;
        let dir = tempfile::tempdir().expect("a temporary folder");
        let (auth, config) = (dir.path().join("auth.toml"), dir.path().join("thalweg.toml"));
        let entries = [
            entry("reader", READER, "\"read\""),
            entry("maker", MAKER, "\"read\", \"write\""),
            entry("admin", ADMIN, "\"admin\""),
        ];
        std::fs::write(&auth, entries.concat()).expect("a file");
        std::fs::write(&config, format!("auth_file = {:?}\n", auth.display())).expect("a file");
        let arguments = vec!["--config".to_owned(), config.display().to_string()];
        let server = Down::new(Setup { arguments, ..Setup::default() }).start();
        let now = now_ms();
        let samples = [
            series("up", &[("job", "api"), ("instance", "a")], &[(now - 2000, 1.0), (now - 1000, 0.0)]),
            series("up", &[("job", "web"), ("instance", "b")], &[(now - 1000, 1.0)]),
        ];
        let answer = server.client().write_as(MAKER, &samples);
        assert_eq!(answer.status, 204, "{}", answer.text());
        Some(Self { server, psql, _dir: dir })
    }

    /// What `psql` prints, or the message with which it failed.
    fn ask(&self, user: &str, token: &str, statements: &[&str]) -> Result<Vec<String>, String> {
        let url = format!("postgres://{user}@{}/thalweg?sslmode=disable", self.server.postgres);
        let mut command = Command::new(&self.psql);
        command.args(["-w", "-X", "-At", "-v", "ON_ERROR_STOP=1", "-v", "VERBOSITY=verbose"]);
        for statement in statements {
            command.args(["-c", statement]);
        }
        let output = command.arg(&url).env("PGPASSWORD", token).output().expect("psql runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() {
            Ok(text(&output.stdout).lines().map(str::to_owned).collect())
        } else {
            Err(text(&output.stderr))
        }
    }

    fn make(&self, statement: &str) -> Result<Vec<String>, String> {
        self.ask("maker", MAKER, &[statement])
    }

    fn check(&self, query: &str, expected: &[&str]) {
        assert_eq!(self.ask("reader", READER, &[query]).expect(query), expected, "{query}");
    }

    fn refused(&self, statement: &str, expected: &str) {
        let told = self.make(statement).expect_err(statement);
        assert!(told.contains(expected), "{statement}: {told}");
    }
}

#[test]
fn views_are_queries_under_names() {
    let Some(guarded) = Guarded::start() else { return };
    let make = |statement: &str, tag: &str| assert_eq!(guarded.make(statement).expect(statement), [tag]);
    make(
        "CREATE VIEW up_by_job AS SELECT job, count(*), min(value) AS least FROM prometheus.up GROUP BY job",
        "CREATE VIEW",
    );
    guarded.check("SELECT job, count, least FROM up_by_job ORDER BY job", &["api|2|0", "web|1|1"]);
    guarded.check("SELECT v.least FROM public.up_by_job AS v WHERE job = 'web'", &["1"]);
    make("CREATE VIEW down (what, times) AS SELECT job, count FROM up_by_job WHERE least = 0", "CREATE VIEW");
    guarded.check("SELECT what, times FROM down", &["api|2"]);
    make("CREATE VIEW asked AS SELECT tags['job'] AS job, value FROM promql('sum by (job) (up)')", "CREATE VIEW");
    guarded.check("SELECT * FROM asked ORDER BY job", &["api|0", "web|1"]);
    make("CREATE VIEW running AS SELECT query FROM catalog.queries WHERE state = 'running'", "CREATE VIEW");
    guarded.check("SELECT * FROM running", &["SELECT * FROM running"]);

    guarded.check(
        "SELECT table_name FROM information_schema.views WHERE table_schema = 'public' AND definition IS NOT NULL ORDER BY 1",
        &["asked", "down", "running", "up_by_job"],
    );
    guarded.check(
        "SELECT viewname, viewowner, definition FROM pg_views WHERE viewname = 'down'",
        &["down|maker|SELECT job, count FROM up_by_job WHERE least = 0"],
    );
    let listed = guarded.ask("reader", READER, &["\\dv"]).expect("\\dv");
    assert!(listed.iter().any(|l| l.starts_with("public|down|view|")), "{listed:?}");
    let described = guarded.ask("reader", READER, &["\\t off", "\\d+ down"]).expect("\\d+");
    for line in ["what|text|", "times|bigint|", "View definition:", "SELECT job, count FROM up_by_job WHERE least = 0"]
    {
        assert!(described.iter().any(|l| l.trim_start().starts_with(line)), "{line}: {described:?}");
    }
    for view in ["'down'::regclass", "'down'", "'public.down'", "'down'::regclass::oid, true"] {
        let definition = "SELECT job, count FROM up_by_job WHERE least = 0";
        guarded.check(&format!("SELECT pg_get_viewdef({view})"), &[definition]);
    }
    guarded.check(
        "SELECT relname, pg_get_viewdef(c.oid) FROM pg_class c WHERE relname IN ('running', 'samples') ORDER BY 1",
        &["running|SELECT query FROM catalog.queries WHERE state = 'running'", "samples|"],
    );

    guarded.refused("CREATE VIEW down AS SELECT 1 AS x", "42P07");
    make("CREATE OR REPLACE VIEW down AS SELECT count(*) FROM up_by_job", "CREATE VIEW");
    guarded.check("SELECT count FROM down", &["2"]);
    guarded.refused("DROP VIEW up_by_job", "view \"down\" depends on it");
    guarded.refused("DROP VIEW up_by_job CASCADE", "0A000");
    make("DROP VIEW down, up_by_job", "DROP VIEW");
    guarded.refused("SELECT * FROM down", "42P01");
    guarded.refused("DROP VIEW down", "42P01");
    make("DROP VIEW IF EXISTS down", "DROP VIEW");
    guarded.refused("DROP VIEW samples", "is not a view");
}

#[test]
fn what_means_nothing_is_no_view() {
    let Some(guarded) = Guarded::start() else { return };
    for (statement, expected) in [
        ("CREATE VIEW v AS SELECT * FROM prometheus.no_such_metric", "42P01"),
        ("CREATE VIEW v AS SELECT no_such_column FROM samples", "42703"),
        ("CREATE VIEW v AS SELECT 1 AS a, 2 AS a", "have the same name"),
        ("CREATE VIEW v (a, b) AS SELECT 1", "view has 1 columns, but 2 are named"),
        ("CREATE VIEW v AS SELECT $1::int AS a", "42P02"),
        ("CREATE VIEW samples AS SELECT 1", "42P07"),
        ("CREATE VIEW prometheus.v AS SELECT 1", "0A000"),
        ("CREATE VIEW v AS SELECT * FROM v", "42P17"),
        ("CREATE TABLE t (a int)", "25006"),
        ("CREATE VIEW v AS SELECT 1 INTO t", "25006"),
    ] {
        guarded.refused(statement, expected);
    }
    guarded.make("CREATE VIEW a AS SELECT 1 AS x").expect("a view");
    guarded.make("CREATE VIEW b AS SELECT x FROM a").expect("a view");
    guarded.refused("CREATE OR REPLACE VIEW a AS SELECT x FROM b", "infinite recursion");
    // The name may mean something when it is planned, and nothing later.
    guarded.make("CREATE OR REPLACE VIEW a AS SELECT 1 AS y").expect("a view");
    guarded.refused("SELECT * FROM b", "42703");
    guarded.refused("SELECT * FROM b", "view \"b\": ");
    let listed = guarded.ask("reader", READER, &["\\dv"]).expect("\\dv");
    assert!(listed.iter().any(|l| l.starts_with("public|a|")) && listed.iter().any(|l| l.starts_with("public|b|")));
    guarded.check("SELECT column_name FROM information_schema.columns WHERE table_name IN ('a', 'b')", &["y"]);
    guarded.make("CREATE OR REPLACE VIEW a AS SELECT 1 AS x").expect("a view");
    guarded.check("SELECT * FROM b", &["1"]);
    guarded.refused(&format!("CREATE VIEW c AS SELECT '{}' AS x", "x".repeat(70_000)), "65536 are allowed");

    // Each doubles what the one before it takes.
    guarded.make("CREATE VIEW d0 AS SELECT 1 AS x").expect("a view");
    let doubled = |i: usize| format!("CREATE VIEW d{i} AS SELECT l.x FROM d{0} l JOIN d{0} r ON l.x = r.x", i - 1);
    for i in 1..5 {
        guarded.make(&doubled(i)).expect("a view");
    }
    let told = (5..16).find_map(|i| guarded.make(&doubled(i)).err()).expect("a limit");
    assert!(told.contains("more than 2000 steps"), "{told}");
    for i in 1..16 {
        guarded
            .make(&format!(
                "CREATE VIEW e{i} AS SELECT x FROM {}",
                if i == 1 { "a".to_owned() } else { format!("e{}", i - 1) }
            ))
            .expect("a view");
    }
    guarded.check("SELECT x FROM e15", &["1"]);
    guarded.refused("CREATE VIEW e16 AS SELECT x FROM e15 UNION ALL SELECT x FROM (SELECT x FROM e15) AS s LIMIT 0; SELECT * FROM e16", "16 views deep");
}

#[test]
fn only_who_may_write_makes_views() {
    let Some(guarded) = Guarded::start() else { return };
    const CREATE: &str = "CREATE VIEW v AS SELECT 1 AS x";
    let told = guarded.ask("reader", READER, &[CREATE]).expect_err("a reader");
    assert!(told.contains("42501") && told.contains("the scope write or admin"), "{told}");
    assert!(told.contains("HINT:") && told.contains("auth_file"), "{told}");
    let told = guarded.ask("reader", READER, &["DROP VIEW IF EXISTS v"]).expect_err("a reader");
    assert!(told.contains("42501"), "{told}");
    guarded.ask("admin", ADMIN, &[CREATE]).expect("an administrator");

    let http = |method: &str, token: &str, more: &[(&str, &str)], statement: &str| {
        let bearer = format!("Bearer {token}");
        let mut headers = vec![("Authorization", bearer.as_str()), ("Content-Type", "text/plain")];
        headers.extend(more);
        let query = url::form_urlencoded::byte_serialize(statement.as_bytes()).collect::<String>();
        let (path, body) = match method {
            "GET" => (format!("/api/v1/sql?query={query}"), ""),
            _ => ("/api/v1/sql".to_owned(), statement),
        };
        let answer = guarded.server.client().request(method, &path, &headers, body.as_bytes()).expect("an answer");
        (answer.status, answer.text())
    };
    let (status, told) = http("POST", READER, &[], "CREATE VIEW w AS SELECT 2 AS x");
    assert!(status == 400 && told.contains("42501"), "{status} {told}");
    for (method, more) in [("GET", None), ("POST", Some(("Origin", "http://elsewhere.example")))] {
        let more: Vec<_> = more.into_iter().collect();
        let (status, told) = http(method, ADMIN, &more, "CREATE VIEW w AS SELECT 2 AS x");
        assert!(status == 400 && told.contains("42501"), "{method}: {status} {told}");
    }
    assert_eq!(http("POST", MAKER, &[], "CREATE VIEW w AS SELECT 2 AS x").0, 200);
    guarded.check("SELECT v.x + w.x AS s FROM v, w", &["3"]);
    assert_eq!(http("POST", MAKER, &[], "DROP VIEW w").0, 200);

    // Whoever is asked for nothing is nobody.
    let open = Server::start();
    let url = format!("postgres://any@{}/thalweg?sslmode=disable", open.postgres);
    let told = output(&guarded.psql, ["-w", "-X", "-At", "-v", "VERBOSITY=verbose", "-c", CREATE, &url]);
    let told = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(told.contains("42501") && told.contains("needs a login"), "{told}");
    let answer = open.client().post("/api/v1/sql", &[("Content-Type", "text/plain")], CREATE.as_bytes());
    assert_eq!(answer.status, 400, "{}", answer.text());
}

#[test]
fn views_outlive_kills_and_the_sql_catalog() {
    let Some(mut guarded) = Guarded::start() else { return };
    guarded.make("CREATE VIEW kept AS SELECT count(*) AS n FROM prometheus.up").expect("a view");
    guarded.make("CREATE VIEW gone AS SELECT 1 AS x").expect("a view");
    guarded.make("DROP VIEW gone").expect("a dropped view");
    let check = |guarded: &Guarded| {
        guarded.check("SELECT n FROM kept", &["3"]);
        guarded.check("SELECT viewname FROM pg_views ORDER BY 1", &["kept"]);
    };
    check(&guarded);
    guarded.server = guarded.server.kill().start();
    check(&guarded);
    let down = guarded.server.stop();
    let data = down.data_dir().display().to_string();
    let rebuilt =
        output(PathBuf::from(env!("CARGO_BIN_EXE_thalweg")).as_path(), ["catalog", "rebuild", "--data-dir", &data]);
    assert!(rebuilt.status.success(), "{}", String::from_utf8_lossy(&rebuilt.stderr));
    guarded.server = down.start();
    check(&guarded);

    let other = tempfile::tempdir().expect("a temporary folder");
    let (backups, restored) = (other.path().join("backups"), other.path().join("data"));
    let (backups, restored) = (backups.display().to_string(), restored.display().to_string());
    let bearer = format!("Bearer {ADMIN}");
    let flushed = guarded.server.client().request("POST", "/api/v1/admin/flush", &[("Authorization", &bearer)], b"");
    assert_eq!(flushed.expect("an answer").status, 204);
    let thalweg = |arguments: &[&str]| {
        let output = output(PathBuf::from(env!("CARGO_BIN_EXE_thalweg")).as_path(), arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    thalweg(&["backup", &backups, "--data-dir", &data]);
    thalweg(&["verify", "--data-dir", &data]);
    thalweg(&["restore", &backups, "--data-dir", &restored]);
    thalweg(&["verify", "--data-dir", &restored]);
    let mut down = guarded.server.stop().moved(PathBuf::from(restored));
    // The index that outside readers use is made anew.
    down.expect_log("catalog.sqlite");
    guarded.server = down.start();
    check(&guarded);
}

/// A session of psql that is asked one thing after the other.
struct Talk {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Talk {
    fn begin(guarded: &Guarded, user: &str, token: &str) -> Self {
        let url = format!("postgres://{user}@{}/thalweg?sslmode=disable", guarded.server.postgres);
        let mut command = Command::new(&guarded.psql);
        command.args(["-w", "-X", "-At", "-q", &url]).env("PGPASSWORD", token);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().expect("psql runs");
        let input = child.stdin.take().expect("a piped input");
        let output = BufReader::new(child.stdout.take().expect("a piped output"));
        Self { child, input, output }
    }

    /// The rows of the answer, and last how the statement ended.
    fn check(&mut self, statement: &str, expected: &[&str]) {
        writeln!(self.input, "{statement};\n\\echo ended :SQLSTATE").expect("psql reads");
        let mut told = Vec::new();
        loop {
            let mut line = String::new();
            assert_ne!(self.output.read_line(&mut line).expect("psql answers"), 0, "{statement}: psql ended");
            match line.trim_end().strip_prefix("ended ") {
                Some(state) => {
                    told.push(state.to_owned());
                    break;
                }
                None => told.push(line.trim_end().to_owned()),
            }
        }
        assert_eq!(told, expected, "{statement}");
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_transaction_sees_the_views_and_what_they_read_as_of_its_beginning() {
    let Some(guarded) = Guarded::start() else { return };
    guarded.make("CREATE VIEW every AS SELECT * FROM prometheus.up").expect("a view");
    guarded.make("CREATE VIEW kept AS SELECT count(*) AS n FROM every").expect("a view");
    guarded.make("CREATE VIEW asked AS SELECT count(*) AS n FROM promql('count_over_time(up[1m])')").expect("a view");
    guarded.make("CREATE VIEW dropped AS SELECT 1 AS x").expect("a view");
    let mut talk = Talk::begin(&guarded, "maker", MAKER);
    talk.check("PREPARE p AS SELECT n FROM kept", &["00000"]);
    talk.check("BEGIN", &["00000"]);
    talk.check("SELECT n FROM kept", &["3", "00000"]);
    talk.check("SELECT n FROM asked", &["2", "00000"]);

    let now = now_ms();
    let more = [series("up", &[("job", "db"), ("zone", "z")], &[(now - 3000, 1.0), (now - 1000, 1.0)])];
    let answer = guarded.server.client().write_as(MAKER, &more);
    assert_eq!(answer.status, 204, "{}", answer.text());
    guarded.make("CREATE OR REPLACE VIEW kept AS SELECT count(*) + 100 AS n FROM every").expect("a view");
    guarded.make("CREATE VIEW later AS SELECT 1 AS x").expect("a view");
    guarded.make("DROP VIEW dropped").expect("a dropped view");
    guarded.check("SELECT n FROM kept", &["105"]);
    guarded.check("SELECT n FROM asked", &["3"]);

    talk.check("SELECT n FROM kept", &["3", "00000"]);
    talk.check("EXECUTE p", &["3", "00000"]);
    talk.check("SELECT n FROM asked", &["2", "00000"]);
    talk.check("SELECT x FROM dropped", &["1", "00000"]);
    talk.check("SAVEPOINT s", &["00000"]);
    for (statement, state) in [
        ("SELECT zone FROM every", "42703"),
        ("SELECT x FROM later", "42P01"),
        ("CREATE VIEW mine AS SELECT 1 AS x", "25001"),
        ("DROP VIEW kept", "25001"),
    ] {
        talk.check(statement, &[state]);
        talk.check("SELECT n FROM kept", &["25P02"]);
        talk.check("ROLLBACK TO SAVEPOINT s", &["00000"]);
    }
    talk.check("SELECT n FROM kept", &["3", "00000"]);
    talk.check("COMMIT", &["00000"]);
    talk.check("SELECT n FROM kept", &["105", "00000"]);
    talk.check("EXECUTE p", &["105", "00000"]);
    talk.check("SELECT x FROM dropped", &["42P01"]);
    talk.check("CREATE VIEW mine AS SELECT 1 AS x", &["00000"]);
}

#[test]
fn prepared_statements_follow_views() {
    let Some(guarded) = Guarded::start() else { return };
    let Some(python) = python_with("psycopg") else { return };
    const SCRIPT: &str = r#"
import sys, psycopg
with psycopg.connect(sys.argv[1], autocommit=True) as conn:
    ask = lambda: conn.execute("SELECT * FROM v WHERE x > %s", (0,), prepare=True).fetchall()
    conn.execute("CREATE VIEW v AS SELECT 1 AS x")
    assert ask() == [(1,)] and ask() == [(1,)]
    conn.execute("CREATE OR REPLACE VIEW v AS SELECT 2 AS x")
    assert ask() == [(2,)]
    conn.execute("CREATE OR REPLACE VIEW v AS SELECT 3 AS x, 'y' AS y")
    try:
        ask()
        raise AssertionError("columns that the client was not told of")
    except psycopg.errors.FeatureNotSupported as e:
        assert "cached plan must not change result type" in str(e), e
    conn.execute("DROP VIEW v")
    try:
        ask()
        raise AssertionError("a view that is gone")
    except psycopg.errors.UndefinedTable:
        pass
"#;
    let url = format!("postgres://maker:{MAKER}@{}/thalweg?sslmode=disable", guarded.server.postgres);
    let output = output(&python, ["-c", SCRIPT, &url]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
