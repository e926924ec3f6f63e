//! `COPY ... TO` files and URLs: what is written, who may and where to, and that nothing is left of what did not come to its
//! end.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::crash::disk::Disk;
use crate::harness::programs::python_with;
use crate::harness::remote_write::{HEADERS, message, snappy};
use crate::harness::s3::S3;
use crate::harness::{Client, Down, Series, Server, Setup, now_ms, program, series, wait_for};
use crate::postgres::{PASSWORD, entry};
use crate::safety::basic;

/// A statement that never ends.
const ENDLESS: &str = "COPY (SELECT repeat('x', 1000) FROM samples a, samples b, samples c, samples d) TO";

/// A server with the administrator `root` and the reader `alice`.
struct Guarded {
    server: Server,
    _dir: TempDir,
}

impl Guarded {
    fn start(location: &str, mut setup: Setup) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let (auth, config) = (dir.path().join("auth.toml"), dir.path().join("thalweg.toml"));
        let reader = entry();
        let admin = reader.replace("alice", "root").replace("\"read\"", "\"admin\"");
        std::fs::write(&auth, format!("{reader}\n{admin}")).expect("a file");
        let settings = format!("auth_file = {auth:?}\nquery_timeout = '1h'\n[export]\nlocations = [{location:?}]\n");
        std::fs::write(&config, settings).expect("a file");
        setup.arguments.extend(["--config".to_owned(), config.display().to_string()]);
        Self { server: Down::new(setup).start(), _dir: dir }
    }

    fn write(&self, all: &[Series]) {
        let authorization = basic("root", PASSWORD);
        let headers = [&HEADERS[..], &[("Authorization", &authorization)]].concat();
        let answer = self.server.client().post("/api/v1/write", &headers, &snappy(&message(all)));
        assert_eq!(answer.status, 204, "{}", answer.text());
    }

    fn fill(&self) {
        let start = now_ms() / 60_000 * 60_000 - 3_600_000;
        let points = |first: f64| (0..60).map(|i| (start + i * 1000, first + i as f64)).collect::<Vec<_>>();
        self.write(&[
            series("requests_total", &[("job", "api"), ("instance", "a")], &points(0.0)),
            series("requests_total", &[("job", "api"), ("instance", "b")], &points(100.0)),
            series("requests_total", &[("job", "web"), ("instance", "c")], &points(1000.0)),
        ]);
    }

    /// The status and the body of the answer over HTTP.
    fn ask(&self, method: &str, user: &str, more: &[(&str, &str)], statement: &str) -> (u16, serde_json::Value) {
        let authorization = basic(user, PASSWORD);
        let headers = [&[("Authorization", authorization.as_str()), ("Content-Type", "text/plain")], more].concat();
        let query = url::form_urlencoded::Serializer::new(String::new()).append_pair("query", statement).finish();
        let (path, body) = match method {
            "GET" => (format!("/api/v1/sql?{query}"), ""),
            _ => ("/api/v1/sql".to_owned(), statement),
        };
        let answer = self.server.client().request(method, &path, &headers, body.as_bytes()).expect("an answer");
        (answer.status, answer.json())
    }

    /// A statement of the administrator over HTTP: the number of rows, or the SQLSTATE.
    fn export(&self, statement: &str) -> Result<i64, String> {
        let (status, body) = self.ask("POST", "root", &[], statement);
        match status {
            200 => Ok(body["rows"][0][0].as_i64().unwrap_or_else(|| panic!("no rows in {body}"))),
            _ => Err(body["code"].as_str().unwrap_or_else(|| panic!("no code in {body}")).to_owned()),
        }
    }

    /// Sends a statement that is left alone.
    fn begin(&self, statement: &str) -> std::thread::JoinHandle<()> {
        let (mut client, statement) = (self.server.client(), statement.to_owned());
        let authorization = basic("root", PASSWORD);
        std::thread::spawn(move || {
            let headers = [("Authorization", authorization.as_str()), ("Content-Type", "text/plain")];
            drop(client.request("POST", "/api/v1/sql", &headers, statement.as_bytes()));
        })
    }
}

/// The names of the files in a folder.
fn names(folder: &Path) -> BTreeSet<String> {
    let names = std::fs::read_dir(folder).expect("a folder").map(|e| e.expect("an entry").file_name());
    names.map(|name| name.to_string_lossy().into_owned()).collect()
}

fn folder() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let folder = dir.path().join("export");
    std::fs::create_dir(&folder).expect("a folder");
    (dir, folder)
}

#[test]
fn psycopg_exports_what_it_would_get() {
    let Some(python) = python_with("psycopg, pyarrow.parquet") else { return };
    let (_dir, folder) = folder();
    let guarded = Guarded::start(&folder.display().to_string(), Setup::default());
    guarded.fill();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/postgres/copy_to.py");
    let port = guarded.server.postgres.port().to_string();
    let mut command = Command::new(python);
    command.arg(script).args([&port, &folder.display().to_string(), PASSWORD]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("python runs");
    let mut input = child.stdin.take().expect("a piped input");
    let mut last = String::new();
    for line in BufReader::new(child.stdout.take().expect("a piped output")).lines() {
        last = line.expect("a line");
        if last == "write" {
            let at = now_ms() - 60_000;
            guarded.write(&[series("later", &[], &[(at, 1.0), (at + 1, 1.0), (at + 2, 1.0)])]);
            input.write_all(b"done\n").expect("the script waits");
        }
    }
    assert!(child.wait().expect("python ends").success());
    assert_eq!(last, "done");
    assert!(guarded.server.log().contains("rows were exported user=\"root\""), "it is logged");
}

#[test]
fn only_a_known_administrator_exports() {
    let (_dir, folder) = folder();
    let to = |name: &str| format!("COPY (SELECT 1 AS one) TO '{}'", folder.join(name).display());
    let guarded = Guarded::start(&folder.display().to_string(), Setup::default());
    let denied = |answer: (u16, serde_json::Value)| {
        let (status, body) = answer;
        assert_eq!((status, body["code"].as_str()), (400, Some("42501")), "{body}");
        assert!(body["hint"].as_str().is_some_and(|hint| hint.contains("administrator")), "{body}");
    };
    let (status, body) = guarded.ask("POST", "root", &[], &to("x.csv"));
    assert_eq!((status, &body["rows"]), (200, &serde_json::json!([[1]])), "{body}");
    assert_eq!(body["columns"][0]["name"], "rows");
    denied(guarded.ask("GET", "root", &[], &to("get")));
    denied(guarded.ask("POST", "root", &[("Origin", "http://example.org")], &to("page")));
    denied(guarded.ask("POST", "alice", &[], &to("reader")));
    denied(guarded.ask("POST", "alice", &[], &to("x.csv")));
    denied(guarded.ask("POST", "alice", &[], "COPY (SELECT 1) TO '/etc/passwd'"));
    assert_eq!(guarded.export("COPY (SELECT 1) TO '/etc/passwd'"), Err("42501".to_owned()));
    assert_eq!(guarded.export(&format!("{}; SELECT 1", to("two"))), Err("0A000".to_owned()));
    if let Some(python) = python_with("adbc_driver_flightsql.dbapi, pyarrow") {
        let script = "import sys, adbc_driver_flightsql.dbapi as flight\n\
                      options = {'username': 'root', 'password': sys.argv[2]}\n\
                      with flight.connect('grpc://' + sys.argv[1], db_kwargs=options, autocommit=True) as connection:\n\
                      \x20   with connection.cursor() as cursor:\n\
                      \x20       cursor.execute(sys.argv[3])";
        let grpc = guarded.server.grpc.to_string();
        let output =
            Command::new(python).args(["-c", script, &grpc, PASSWORD, &to("flight")]).output().expect("python");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("COPY is not supported over Arrow Flight"), "{said}");
    }
    assert_eq!(names(&folder), BTreeSet::from(["x.csv".to_owned()]));

    // Where nobody shows credentials nobody is known.
    let arguments = vec![];
    let environment = vec![("THALWEG_EXPORT_LOCATIONS".to_owned(), folder.display().to_string())];
    let open = Down::new(Setup { arguments, environment, ..Setup::default() }).start();
    let answer = open.client().post("/api/v1/sql", &[("Content-Type", "text/plain")], to("open").as_bytes());
    denied((answer.status, answer.json()));
    if let Some(psql) = program("psql") {
        let url = format!("postgres://root@{}/thalweg", open.postgres);
        let output = Command::new(psql).args(["-X", "-v", "VERBOSITY=verbose", "-c", &to("open"), &url]).output();
        let said = String::from_utf8_lossy(&output.expect("psql runs").stderr).into_owned();
        assert!(said.contains("42501: permission denied to COPY to a file") && said.contains("\\copy"), "{said}");
    }
    assert_eq!(names(&folder), BTreeSet::from(["x.csv".to_owned()]));
}

#[test]
fn locations_are_checked_at_the_start() {
    let check = |location: &str, expected: &[&str]| {
        let environment = vec![("THALWEG_EXPORT_LOCATIONS".to_owned(), location.to_owned())];
        let ended = Down::new(Setup { environment, ..Setup::default() }).try_start().expect_err("it must not start");
        for part in expected {
            assert!(ended.contains(part) && !ended.contains("canary"), "{location}: {ended}");
        }
    };
    check("exports", &["export_locations", "\"exports\"", "absolute"]);
    check("/tmp/a; gopher://x/?key=canary", &["export_locations", "gopher", "known are"]);
    check("s3://key:canary@bucket/prefix", &["export_locations", "credentials belong into the environment"]);
    check("s3://bucket/prefix?secret_access_key=canary", &["export_locations", "secret_access_key"]);
    check("/", &["export_locations", "data_dir lie within one another"]);
}

#[test]
fn urls_are_written_whole_or_not_at_all() {
    let Some(s3) = S3::start() else { return };
    let environment = S3::setup(s3.address).environment;
    let location = format!("s3://bucket/exported/?endpoint=http://{}&region=us-east-1", s3.address);
    let guarded = Guarded::start(&location, Setup { environment, ..Setup::default() });
    guarded.fill();
    let read = |key: &str| {
        // Who asks does not matter to it, but somebody must.
        let authorization =
            "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0";
        let answer =
            Client::new(s3.address).request("GET", &format!("/bucket/{key}"), &[("Authorization", authorization)], b"");
        answer.ok().filter(|a| a.status == 200).unwrap_or_else(|| panic!("{key} can't be read"))
    };
    let rows = "SELECT ts, instance, value FROM prometheus.requests_total ORDER BY instance, ts";
    assert_eq!(guarded.export(&format!("COPY ({rows}) TO 's3://bucket/exported/a/x.csv' (HEADER)")), Ok(180));
    let authorization = basic("root", PASSWORD);
    let headers = [("Authorization", authorization.as_str()), ("Content-Type", "text/plain")];
    let direct = guarded.server.client().post("/api/v1/sql?format=csv", &headers, rows.as_bytes());
    assert_eq!(direct.status, 200);
    let lines =
        |text: String| text.lines().map(|l| l.split(',').skip(1).collect::<Vec<_>>().join(",")).collect::<Vec<_>>();
    assert_eq!(lines(read("exported/a/x.csv").text()), lines(direct.text()), "but for how times are written");
    assert_eq!(guarded.export(&format!("COPY ({rows}) TO 's3://bucket/exported/x.parquet'")), Ok(180));
    assert!(read("exported/x.parquet").body.starts_with(b"PAR1"));
    // More than one part.
    let large = "SELECT n, repeat('x', 2000) FROM generate_series(1, 20000) AS t(n)";
    assert_eq!(guarded.export(&format!("COPY ({large}) TO 's3://bucket/exported/large'")), Ok(20_000));
    let text = read("exported/large").text();
    assert_eq!(text.lines().count(), 20_000);
    assert!(
        text.lines()
            .zip(1..)
            .all(|(line, n)| line.split_once('\t').is_some_and(|(first, x)| first == n.to_string() && x.len() == 2000))
    );
    for (to, code) in [
        ("s3://bucket/elsewhere/x", "42501"),
        ("s3://bucket/exportedX/x", "42501"),
        ("s3://bucket/exported/../x", "42602"),
        ("s3://bucket/exported/x?region=x", "42602"),
        ("s3://bucket/exported/", "42602"),
    ] {
        assert_eq!(guarded.export(&format!("COPY (SELECT 1) TO '{to}'")), Err(code.to_owned()), "{to}");
    }
    let before = s3.keys();
    assert_eq!(before.len(), 3, "{before:?}");
    // One that is stopped midway; a client that is gone.
    let uploads = || Client::new(s3.address).get("/bucket?uploads").text().matches("<UploadId>").count();
    let running = guarded.begin(&format!("{ENDLESS} 's3://bucket/exported/large'"));
    wait_for("an upload", || (uploads() > 0).then_some(()));
    let ids = "SELECT catalog.cancel(id) FROM catalog.queries WHERE state = 'running' AND query LIKE 'COPY%'";
    assert_eq!(guarded.ask("POST", "root", &[], ids).0, 200);
    running.join().expect("the client ends");
    wait_for("the end of the upload", || (uploads() == 0).then_some(()));
    // The server's stop.
    let running = guarded.begin(&format!("{ENDLESS} 's3://bucket/exported/new'"));
    wait_for("an upload", || (uploads() > 0).then_some(()));
    guarded.server.stop();
    running.join().expect("the client ends");
    assert_eq!(uploads(), 0, "an upload is left");
    assert_eq!(s3.keys(), before);
    assert_eq!(read("exported/large").text(), text);
}

#[test]
fn a_full_disk_and_a_stop_leave_what_was_there() {
    let Some(disk) = Disk::tmpfs(8) else { return };
    let folder = disk.data_dir();
    std::fs::create_dir(&folder).expect("a folder");
    let kept = folder.join("kept.csv");
    std::fs::write(&kept, "kept").expect("a file");
    let guarded = Guarded::start(&folder.display().to_string(), Setup::default());
    guarded.fill();
    let only_kept = || names(&folder) == BTreeSet::from(["kept.csv".to_owned()]);
    assert_eq!(guarded.export(&format!("{ENDLESS} '{}'", kept.display())), Err("53100".to_owned()));
    assert!(only_kept(), "{:?}", names(&folder));
    let rest = "COPY (SELECT n FROM generate_series(1, 10000) AS t(n)) TO";
    assert_eq!(guarded.export(&format!("{rest} '{}'", folder.join("small").display())), Ok(10_000));
    std::fs::remove_file(folder.join("small")).expect("the file");
    // One that gives no rows does not fill the disk.
    let slow = "COPY (SELECT a.value FROM samples a, samples b, samples c, samples d \
                WHERE a.value + b.value + c.value + d.value < 0) TO";
    let running = guarded.begin(&format!("{slow} '{}'", kept.display()));
    wait_for("an export", || (!only_kept()).then_some(()));
    guarded.server.stop();
    running.join().expect("the client ends");
    assert!(only_kept(), "{:?}", names(&folder));
    assert_eq!(std::fs::read_to_string(&kept).expect("the file"), "kept");
}
