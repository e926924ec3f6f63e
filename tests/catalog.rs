//! The SQL catalog: PostgreSQL killed and SQLite locked under load, which no client may notice, and making it anew from
//! the bucket after a random history.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::duckdb;
use crate::harness::{Down, Postgres, Random, Server, Setup, now_ms, output, python, series, wait_for};

const MINUTE: i64 = 60_000;

/// Entries of the journal that the SQL catalog does not have.
fn behind(server: &Server) -> u64 {
    let text = server.client().get("/metrics").text();
    let line = text.lines().find_map(|l| l.strip_prefix("thalweg_sql_catalog_entries_behind "));
    line.expect("the metric is there").parse().expect("a number")
}

/// Two writers, a client that asks, and one that flushes, which must all succeed while `outage` runs. Returns how many rows
/// were written.
fn under_load(server: &Server, base_ms: i64, outage: impl FnOnce()) -> u64 {
    let (stop, rows) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for writer in ["a", "b"] {
            let (stop, rows) = (&stop, &rows);
            scope.spawn(move || {
                for n in (0..).take_while(|_| !stop.load(Ordering::Relaxed)) {
                    server.write(&[series("load", &[("writer", writer)], &[(base_ms + n, n as f64)])]);
                    rows.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(5));
                }
            });
        }
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                server.flush();
                let written = rows.load(Ordering::Relaxed);
                // Not by the metric's own table, which is there after the first row only.
                let found: u64 =
                    server.sql("SELECT count(*) FROM samples WHERE metric = 'load'")[0].parse().expect("a count");
                assert!(found >= written, "{written} rows were acknowledged and {found} found");
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        outage();
        stop.store(true, Ordering::Relaxed);
    });
    rows.into_inner()
}

fn expecting_an_outage(environment: Vec<(String, String)>) -> Server {
    let expected = vec!["SQL catalog can't be brought up to date".to_owned()];
    Down::new(Setup { environment, expected, ..Setup::default() }).start()
}

/// Waits until the SQL catalog is up to date, and says how long it took.
fn caught_up(server: &Server) {
    let begun = Instant::now();
    wait_for("the SQL catalog to be up to date", || (behind(server) == 0).then_some(()));
    eprintln!("up to date after {:.1} s", begun.elapsed().as_secs_f64());
}

#[test]
fn nobody_notices_that_postgresql_is_killed() {
    let Some(mut postgres) = Postgres::start() else { return };
    let server = expecting_an_outage(vec![("THALWEG_CATALOG".to_owned(), postgres.url())]);
    let base_ms = now_ms() - 60 * MINUTE;
    let files = |postgres: &Postgres| {
        postgres.sql("SELECT id, path, row_count FROM thalweg_file ORDER BY id").into_iter().collect::<Vec<_>>()
    };
    let rows = under_load(&server, base_ms, || {
        for _ in 0..2 {
            wait_for("files in PostgreSQL", || (!files(&postgres).is_empty()).then_some(()));
            postgres.kill();
            wait_for("the SQL catalog to fall behind", || (behind(&server) > 2).then_some(()));
            postgres.restart();
            caught_up(&server);
        }
    });
    server.flush();
    server.compact();
    caught_up(&server);
    assert_eq!(server.sql("SELECT count(*) FROM prometheus.load"), [rows.to_string()]);
    let visible = "SELECT sum(record_count) FROM ducklake_data_file WHERE table_id = 1001 AND end_snapshot IS NULL";
    assert_eq!(postgres.sql(visible), [rows.to_string()]);
    assert_eq!(postgres.sql("SELECT record_count FROM ducklake_table_stats WHERE table_id = 1001"), [rows.to_string()]);
    if let Some(python) = python() {
        let catalog = format!("postgres:{}", postgres.connection());
        let theirs = duckdb::ask(&python, &catalog, "SELECT count(*), count(DISTINCT ts) FROM samples");
        let ours = server.sql("SELECT count(*), count(DISTINCT ts) FROM samples");
        assert_eq!(theirs, ours);
    }

    // Down when the server starts, and a database in it that is not ours.
    let before = files(&postgres);
    let down = server.stop();
    postgres.kill();
    let server = down.start();
    assert_eq!(server.sql("SELECT count(*) FROM prometheus.load"), [rows.to_string()]);
    server.write(&[series("load", &[("writer", "c")], &[(base_ms, 0.0)])]);
    server.flush();
    postgres.restart();
    // Not by the gauge, which a server that has just started has not set yet.
    wait_for("the new file in PostgreSQL", || (files(&postgres).len() == before.len() + 1).then_some(()));
    drop(server);
    let environment = vec![("THALWEG_CATALOG".to_owned(), postgres.url())];
    let refused = Down::new(Setup { environment, ..Setup::default() }).try_start().expect_err("another database's");
    assert!(refused.contains("belongs to another database"), "{refused}");
}

#[test]
fn nobody_notices_that_sqlite_is_locked() {
    let Some(python) = python() else { return };
    let server = expecting_an_outage(vec![]);
    let catalog = server.data_dir().join("catalog.sqlite");
    let rows = under_load(&server, now_ms() - 60 * MINUTE, || {
        wait_for("a file", || {
            let files = server.sql("SELECT count(*) FROM catalog.files");
            (files[0] != "0").then_some(())
        });
        let script = "import sqlite3, sys\nc = sqlite3.connect(sys.argv[1], timeout=30)\n\
                      c.execute('BEGIN EXCLUSIVE')\nprint('locked', flush=True)\nsys.stdin.read()\n";
        let mut locker = Command::new(&python)
            .args(["-c", script])
            .arg(&catalog)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("Python runs");
        let mut line = String::new();
        let out = locker.stdout.take().expect("its output");
        std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).expect("a line");
        wait_for("the SQL catalog to fall behind", || (behind(&server) > 2).then_some(()));
        drop(locker.stdin.take());
        locker.wait().expect("the locker ends");
        caught_up(&server);
    });
    server.flush();
    server.compact();
    caught_up(&server);
    let theirs = duckdb::ask(&python, &format!("sqlite:{}", catalog.display()), "SELECT count(*) FROM samples");
    assert_eq!((theirs, server.sql("SELECT count(*) FROM samples")), (vec![rows.to_string()], vec![rows.to_string()]));
}

/// What must not depend on the SQL catalog.
fn answers(server: &Server) -> Vec<Vec<String>> {
    let mut answers: Vec<Vec<String>> = [
        "SELECT instance, ts, value FROM prometheus.history_one ORDER BY instance, ts",
        "SELECT metric, count(*), sum(value), min(ts), max(ts) FROM samples GROUP BY metric ORDER BY metric",
        "SELECT tags['instance'], count(*), avg(value) FROM samples GROUP BY 1 ORDER BY 1",
        "SELECT count(*) FROM samples WHERE tags['instance'] = 'i3'",
        "SELECT tags['job'], max(value) FROM samples GROUP BY 1 ORDER BY 1",
    ]
    .iter()
    .map(|query| server.sql(query))
    .collect();
    for path in
        ["/api/v1/series?match[]={__name__=~%22history_.*%22}", "/api/v1/label/instance/values", "/api/v1/metadata"]
    {
        answers.push(vec![server.client().get(path).text()]);
    }
    answers
}

fn remove_catalog(data_dir: &Path) {
    for suffix in ["", "-wal", "-shm"] {
        match std::fs::remove_file(data_dir.join(format!("catalog.sqlite{suffix}"))) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => panic!("catalog.sqlite{suffix}: {e}"),
            _ => {}
        }
    }
}

fn history(seed: u64) {
    let mut random = Random(seed);
    let bucket = tempfile::tempdir().expect("a temporary folder");
    let objects = bucket.path().display().to_string();
    let arguments = vec!["--object-store".to_owned(), objects.clone()];
    let mut server = Down::new(Setup { arguments, ..Setup::default() }).start();
    let base_ms = now_ms() / MINUTE * MINUTE - 36 * 60 * MINUTE;
    for _ in 0..40 {
        match random.below(10) {
            0..5 => {
                let instance = format!("i{}", random.below(6));
                let name = if random.below(2) == 0 { "history_one" } else { "history_two" };
                let start = base_ms + random.below(30 * 60) as i64 * MINUTE;
                let points: Vec<(i64, f64)> =
                    (0..20).map(|i| (start + i * 1000, random.below(1000) as f64 / 8.0)).collect();
                server.write(&[series(name, &[("instance", &instance), ("job", "j")], &points)]);
            }
            5 | 6 => server.flush(),
            7 => server.compact(),
            8 => {
                let matcher = format!("{{instance=\"i{}\"}}", random.below(6));
                let start = base_ms / 1000 + random.below(30 * 3600) as i64;
                let (start, end) = (start.to_string(), (start + 3600).to_string());
                let pairs = [("match[]", matcher.as_str()), ("start", start.as_str()), ("end", end.as_str())];
                assert_eq!(server.client().form("/api/v1/admin/tsdb/delete_series", &pairs).status, 204);
            }
            _ => server = if random.below(2) == 0 { server.kill().start() } else { server.stop_and_restart() },
        }
    }
    server.flush();
    let python = python();
    let theirs = |server: &Server| {
        let catalog = format!("sqlite:{}", server.data_dir().join("catalog.sqlite").display());
        let query = "SELECT metric, tags['instance'], count(*), sum(value) FROM samples GROUP BY ALL ORDER BY ALL";
        python.as_ref().map(|python| duckdb::ask(python, &catalog, query))
    };
    server.compact();
    let (ours, duckdbs) = (answers(&server), theirs(&server));
    assert!(ours[0].len() > 10, "seed {seed}: {} rows are too few to compare", ours[0].len());

    // The server makes it anew by itself.
    let down = server.stop();
    remove_catalog(&down.data_dir());
    let server = down.start();
    assert_eq!((answers(&server), theirs(&server)), (ours.clone(), duckdbs.clone()), "seed {seed}: catalog deleted");

    // The command does it while no server runs, and only then.
    let program = Path::new(env!("CARGO_BIN_EXE_thalweg"));
    let rebuild = |data_dir: &Path| {
        let data_dir = data_dir.display().to_string();
        output(program, ["catalog", "rebuild", "--data-dir", &data_dir, "--object-store", &objects])
    };
    let refused = rebuild(&server.data_dir());
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("in use"), "{refused:?}");
    let down = server.stop();
    remove_catalog(&down.data_dir());
    let rebuilt = rebuild(&down.data_dir());
    assert!(rebuilt.status.success() && String::from_utf8_lossy(&rebuilt.stdout).contains("data files"), "{rebuilt:?}");
    let server = down.start();
    assert!(!server.log().contains("made anew"), "the rebuilt one is continued: {}", server.log());
    assert_eq!((answers(&server), theirs(&server)), (ours.clone(), duckdbs.clone()), "seed {seed}: catalog rebuilt");

    // Nothing but the bucket.
    let empty = tempfile::tempdir().expect("a temporary folder");
    let server = server.stop().moved(empty.path().join("data")).start();
    assert_eq!((answers(&server), theirs(&server)), (ours, duckdbs), "seed {seed}: data folder lost");
}

#[test]
fn the_bucket_alone_gives_all_answers() {
    for seed in 0..2 {
        history(seed);
    }
}
