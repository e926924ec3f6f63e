//! Folders of every version that stored data in a form of its own: they open, answer as they did then, and go on. A kill
//! while one is taken over changes nothing. What a newer version wrote is refused by name.
//!
//! `tests/formats/v<n>` holds a data folder and its answers, made by `tests/formats/make.py`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::harness::{Down, Server, Setup};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/formats")
}

/// The fixtures, oldest first.
fn versions() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder()).expect("the fixtures' folder");
    let mut found: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(|p| p.is_dir()).collect();
    found.sort();
    assert!(!found.is_empty(), "no fixtures");
    found
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a new folder");
    for entry in std::fs::read_dir(from).expect("a readable folder").flatten() {
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).expect("a copied file");
        }
    }
}

/// A server that is to run on a copy of a fixture.
fn copied(version: &Path) -> Down {
    let mut down = Down::new(Setup::default());
    copy(&version.join("data"), &down.data_dir());
    // The index that outside readers use may be made again.
    down.expect_log("catalog.sqlite");
    down
}

/// An answer with its results in an order that does not depend on the version.
fn ordered(text: &str) -> String {
    let Ok(mut json) = serde_json::from_str::<Value>(text) else { return text.to_owned() };
    if let Some(results) = json.pointer_mut("/data/result").and_then(Value::as_array_mut) {
        results.sort_by_key(ToString::to_string);
    }
    json.to_string()
}

fn check(server: &Server, version: &Path, context: &str) {
    let answers = std::fs::read_to_string(version.join("answers.json")).expect("answers");
    let answers: Vec<(String, String, String)> = serde_json::from_str(&answers).expect("answers as JSON");
    let mut client = server.client();
    for (kind, question, expected) in answers {
        let told = match kind.as_str() {
            "sql" => {
                client.post("/api/v1/sql?format=csv", &[("Content-Type", "text/plain")], question.as_bytes()).text()
            }
            _ => client.get(&question).text(),
        };
        assert_eq!(ordered(&told), ordered(&expected), "{}: {context}: {question}", version.display());
    }
}

#[test]
fn every_version_opens_and_goes_on() {
    for version in versions() {
        let server = copied(&version).start();
        check(&server, &version, "opened");
        server.flush();
        check(&server, &version, "flushed");
        let server = server.kill().start();
        check(&server, &version, "restarted");
        server.compact();
        check(&server, &version, "compacted");
        let server = server.stop_and_restart();
        check(&server, &version, "restarted again");
    }
}

#[test]
fn a_kill_while_a_version_is_taken_over_changes_nothing() {
    for version in versions() {
        let down = copied(&version);
        for wait in [1, 20, 60, 120, 200, 400] {
            let mut child = Command::new(env!("CARGO_BIN_EXE_thalweg"))
                .args(["serve", "--http", "127.0.0.1:0", "--grpc", "off", "--postgres", "off", "--data-dir"])
                .arg(down.data_dir())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("the server starts");
            std::thread::sleep(Duration::from_millis(wait));
            // It may have ended by itself only if it could not start, which the last start below would show.
            let _ = child.kill();
            child.wait().expect("a child has a state");
        }
        check(&down.start(), &version, "after kills");
    }
}

/// CRC-32 (IEEE), bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    })
}

#[test]
fn a_newer_version_is_refused_by_name() {
    let newest = versions().pop().expect("a fixture");
    let check = |change: &dyn Fn(&Path), expected: &[&str]| {
        let down = copied(&newest);
        change(&down.data_dir());
        let ended = down.try_start().expect_err("it must not start");
        for part in expected {
            assert!(ended.contains(part), "{ended:?} does not contain {part:?}");
        }
    };
    let description = |data: &Path| {
        let path = data.join("objects/default/database.json");
        let text = std::fs::read_to_string(&path).expect("a description");
        std::fs::write(path, text.replace("\"format\":1", "\"format\":99")).expect("a writable description");
    };
    check(&description, &["default/database.json has format 99, which is newer"]);
    let journal = |data: &Path| {
        let entries = std::fs::read_dir(data.join("objects/default/journal")).expect("the journal's folder");
        let path = entries.flatten().map(|e| e.path()).max().expect("an entry");
        let mut bytes = std::fs::read(&path).expect("a readable entry");
        bytes[4] = 99;
        std::fs::write(path, bytes).expect("a writable entry");
    };
    check(&journal, &["default/journal/", "has format 99, which is newer"]);
    let log = |data: &Path| {
        let logs = std::fs::read_dir(data.join("wal")).expect("the log's folder");
        let logs = logs.flatten().map(|e| e.path()).filter(|f| f.extension().is_some_and(|e| e == "wal"));
        let path = logs.max().expect("a log file");
        let mut bytes = std::fs::read(&path).expect("a readable log");
        bytes[8] = 99;
        let sum = crc32(&bytes[..20]);
        bytes[20..24].copy_from_slice(&sum.to_le_bytes());
        std::fs::write(path, bytes).expect("a writable log");
    };
    check(&log, &[".wal", "99"]);
}
