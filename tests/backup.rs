//! `thalweg backup`, `restore` and `verify`, beside a running server and without one.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::SystemTime;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Client, Down, Random, Series, Server, Setup, now_ms, series};

const SERIES: u64 = 3;

fn thalweg<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Output {
    Command::new(env!("CARGO_BIN_EXE_thalweg")).args(arguments).output().expect("the binary runs")
}

/// Runs a command that must succeed; its output.
fn done<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> String {
    let output = thalweg(arguments);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{err}");
    out.into_owned()
}

/// Runs a command that must fail; all that it says.
fn refused<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> String {
    let output = thalweg(arguments);
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(!output.status.success() && !said.contains("panicked"), "{said}");
    said
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of a test is UTF-8")
}

fn file_name(path: &Path) -> String {
    path.file_name().expect("a name").to_string_lossy().into_owned()
}

/// Request `number`: one sample for each series.
fn request(number: u64, base_ms: i64) -> Vec<Series> {
    let sample = |item: u64| [(base_ms + number as i64 * 500, (item * 1_000_000 + number) as f64 + 0.25)];
    (0..SERIES).map(|item| series("saved", &[("item", &item.to_string())], &sample(item))).collect()
}

/// How many requests are there; they are the first ones, each whole.
fn prefix(server: &Server) -> u64 {
    let rows = server.sql("SELECT value FROM samples WHERE metric = 'saved' ORDER BY value");
    let found: Vec<f64> = rows.iter().map(|row| row.parse().expect("a number")).collect();
    let requests = found.len() as u64 / SERIES;
    let expected: Vec<f64> =
        (0..SERIES).flat_map(|item| (0..requests).map(move |n| (item * 1_000_000 + n) as f64 + 0.25)).collect();
    assert_eq!(found, expected, "the first {requests} requests, each whole");
    requests
}

/// The names of all backups, oldest first.
fn names(backups: &Path) -> Vec<String> {
    let listed = done(["backup", text(backups), "--list"]);
    listed.lines().map(|line| line.split(' ').next().expect("a name").to_owned()).collect()
}

/// A database made of a backup, on which a server can run.
fn restored(backups: &Path, name: &str) -> Down {
    let mut down = Down::new(Setup::default());
    done(["restore", text(backups), "--name", name, "--data-dir", text(&down.data_dir())]);
    // The index that outside readers use is made anew.
    down.expect_log("catalog.sqlite");
    down
}

/// Every file below a folder, with its size and time of change.
fn files(folder: &Path) -> Vec<(PathBuf, u64, SystemTime)> {
    fn walk(folder: &Path, out: &mut Vec<(PathBuf, u64, SystemTime)>) {
        for entry in std::fs::read_dir(folder).expect("a readable folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                walk(&path, out);
            } else {
                let metadata = entry.metadata().expect("metadata of a file");
                out.push((path, metadata.len(), metadata.modified().expect("a time")));
            }
        }
    }
    let mut out = Vec::new();
    walk(folder, &mut out);
    out.sort();
    out
}

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).expect("a readable file");
    bytes[at] ^= 1;
    std::fs::write(path, bytes).expect("a writable file");
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

#[test]
fn a_backup_under_load_is_a_prefix() {
    // Replaced files go at once, under the hands of whoever copies them.
    let environment = vec![("THALWEG_DELETE_GRACE".to_owned(), "0s".to_owned())];
    let server = Down::new(Setup { environment, ..Setup::default() }).start();
    let backups = folder();
    let base_ms = now_ms() - 3_600_000;
    let (stop, acknowledged) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut bounds = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut client = Client::new(server.http);
            while !stop.load(Ordering::Relaxed) {
                let number = acknowledged.load(Ordering::Relaxed);
                let answer = client.write(&request(number, base_ms)).expect("an answer");
                assert_eq!(answer.status, 204, "{}", answer.text());
                acknowledged.fetch_add(1, Ordering::Relaxed);
            }
        });
        scope.spawn(|| {
            let mut random = Random(3);
            while !stop.load(Ordering::Relaxed) {
                let path = if random.below(3) == 0 { "/api/v1/admin/compact" } else { "/api/v1/admin/flush" };
                Client::new(server.http).post(path, &[], b"");
            }
        });
        for _ in 0..3 {
            let flushed = acknowledged.load(Ordering::Relaxed);
            server.flush();
            done(["backup", text(backups.path()), "--data-dir", text(&server.data_dir())]);
            // One more may be stored than its writer was told in time.
            bounds.push(flushed..=acknowledged.load(Ordering::Relaxed) + 1);
        }
        stop.store(true, Ordering::Relaxed);
    });
    let names = names(backups.path());
    assert_eq!(names.len(), bounds.len());
    for (name, bounds) in names.iter().zip(bounds) {
        done(["backup", text(backups.path()), "--verify", name]);
        let down = restored(backups.path(), name);
        done(["verify", "--data-dir", text(&down.data_dir())]);
        let restored = down.start();
        let found = prefix(&restored);
        assert!(bounds.contains(&found), "{name}: {found} requests, not {bounds:?}");
        // It goes on as a database of its own.
        for number in found..found + 3 {
            restored.write(&request(number, base_ms));
            restored.flush();
        }
        restored.compact();
        let restored = restored.kill().start();
        assert_eq!(prefix(&restored), found + 3, "{name}");
        let down = restored.stop();
        done(["verify", "--data-dir", text(&down.data_dir())]);
    }
}

#[test]
fn answers_are_the_same_and_objects_are_copied_once() {
    let server = Server::start();
    let backups = folder();
    let base_ms = now_ms() - 3_600_000;
    let data = server.data_dir();
    let backup = || done(["backup", text(backups.path()), "--data-dir", text(&data)]);
    for number in 0..10 {
        server.write(&request(number, base_ms));
    }
    server.flush();
    backup();
    let before = files(&backups.path().join("default/samples"));
    server.write(&request(10, base_ms));
    server.flush();
    backup();
    let after = files(&backups.path().join("default/samples"));
    assert!(before.iter().all(|file| after.contains(file)), "{before:?} {after:?}");
    assert_eq!(after.len(), before.len() + 1);
    let names = names(backups.path());
    assert_eq!(names.len(), 2);
    let queries = [
        "SELECT metric, tags, ts, value, series FROM samples ORDER BY 1, 2, 3",
        "SELECT item, count(*), sum(value) FROM prometheus.saved GROUP BY 1 ORDER BY 1",
    ];
    let second = restored(backups.path(), &names[1]).start();
    for query in queries {
        assert_eq!(second.sql(query), server.sql(query), "{query}");
    }
    assert_eq!(prefix(&restored(backups.path(), &names[0]).start()), 10);
    // Backups of another database have no place here.
    let other = Server::start();
    let said = refused(["backup", text(backups.path()), "--data-dir", text(&other.data_dir())]);
    assert!(said.contains("holds backups of another database"), "{said}");
}

#[test]
fn what_can_not_be_restored_well_is_refused() {
    let server = Server::start();
    server.write(&request(0, now_ms() - 3_600_000));
    server.flush();
    let down = server.stop();
    let data = down.data_dir();
    let (backups, new) = (folder(), folder());
    let (backups, target) = (text(backups.path()), text(new.path()));
    let check = |arguments: &[&str], expected: &str| {
        let said = refused(arguments);
        assert!(said.contains(expected), "{arguments:?}: {said:?} does not contain {expected:?}");
    };
    check(&["restore", backups, "--data-dir", target], "there is no backup");
    done(["backup", backups, "--data-dir", text(&data)]);
    check(&["restore", backups, "--data-dir", text(&data)], "restore into an empty");
    for name in ["..", "../x", "a/b", "%2e%2e", "a\\b", "/etc/passwd"] {
        check(&["restore", backups, "--data-dir", target, "--name", name], "is no name of a backup");
    }
    check(&["restore", backups, "--data-dir", target, "--name", "20000101T000000Z-1"], "20000101T000000Z-1");
    let (copied, ..) = files(&Path::new(backups).join("default/samples")).swap_remove(0);
    flip(&copied, 50);
    check(&["backup", backups, "--verify"], &file_name(&copied));
    check(&["restore", backups, "--data-dir", target], &file_name(&copied));
    // Nor is what lies among the data.
    let objects = data.join("objects");
    for place in [objects.clone(), objects.join("new/../new"), data.join("wal/../objects"), data.clone()] {
        check(&["backup", text(&place), "--data-dir", text(&data)], "lie within one another");
    }
    assert!(!objects.join("default/backups").exists() && !objects.join("new").exists());
    // A copy of damage is no backup.
    let (stored, ..) = files(&data.join("objects/default/samples")).swap_remove(0);
    flip(&stored, 50);
    check(&["backup", text(folder().path()), "--data-dir", text(&data)], &file_name(&stored));
}

#[test]
fn verify_finds_what_is_wrong() {
    let server = Server::start();
    let base_ms = now_ms() - 3_600_000;
    for number in 0..4 {
        server.write(&request(number, base_ms));
        server.flush();
    }
    server.write(&request(4, base_ms));
    server.write(&request(5, base_ms));
    let data = server.data_dir();
    let report =
        || -> Value { serde_json::from_str(&done(["verify", "--json", "--data-dir", text(&data)])).expect("JSON") };
    let beside = report();
    assert_eq!((&beside["files"], &beside["rows"], &beside["log"]), (&4.into(), &12.into(), &Value::Null), "{beside}");
    let down = server.kill();
    let alone = report();
    assert_eq!((&alone["log"]["records"], &alone["log"]["rows"]), (&2.into(), &6.into()), "{alone}");
    assert_eq!((&alone["problems"], &alone["orphans"]), (&json!([]), &json!([])), "{alone}");
    assert_eq!(alone["sql_catalog"], json!(true), "{alone}");

    let below = |folder: &str| -> Vec<PathBuf> { files(&data.join(folder)).into_iter().map(|f| f.0).collect() };
    let (segments, parts) = (below("objects/default/samples"), below("objects/default/tag_sets"));
    let log = below("wal").into_iter().find(|f| f.extension().is_some_and(|e| e == "wal")).expect("a log file");
    let check = |damaged: &Path, change: &dyn Fn(&Path), expected: &str| {
        let before = std::fs::read(damaged).expect("a readable file");
        change(damaged);
        let said = refused(["verify", "--data-dir", text(&data)]);
        std::fs::write(damaged, before).expect("a writable file");
        for part in [file_name(damaged).as_str(), expected, "found"] {
            assert!(said.contains(part), "{said:?} does not contain {part:?}");
        }
    };
    check(&segments[0], &|path| flip(path, 0), "does not begin as a Parquet file");
    check(&segments[0], &|path| flip(path, 60), "page at byte");
    check(&segments[1], &|path| std::fs::write(path, b"").expect("a writable file"), "bytes: found 0");
    check(&segments[2], &|path| std::fs::remove_file(path).expect("a file"), "object is missing");
    check(
        &segments[3],
        &|path| std::fs::write(path, std::fs::read(&segments[0]).expect("bytes")).expect("a writable file"),
        "segment footer",
    );
    check(&parts[0], &|path| flip(path, 100), "CRC-32");
    check(&log, &|path| flip(path, 60), "wal");
    check(&log, &|path| std::fs::remove_file(path).expect("a file"), "wal");

    let orphan = data.join("objects/default/samples/1/1.parquet");
    std::fs::create_dir_all(orphan.parent().expect("a folder")).expect("a folder");
    std::fs::write(&orphan, b"left by a crash").expect("a file");
    assert!(done(["verify", "--data-dir", text(&data)]).contains("orphan      samples/1/1.parquet"));
    std::fs::remove_file(orphan).expect("a file");
    assert_eq!(prefix(&down.start()), 6);
}
