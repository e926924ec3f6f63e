//! One damaged object: queries that need it fail and name it, all others go on, flush and compaction go around it, and an
//! operator is told once.

use std::path::{Path, PathBuf};

use crate::harness::{Down, Server, Setup, now_ms, series};

/// The first millisecond of the day before yesterday: nothing more is expected to come for it.
fn base_ms() -> i64 {
    (now_ms() / 86_400_000 - 2) * 86_400_000
}

/// Hour `n` of the day: a sample a minute.
fn write_hour(server: &Server, n: i64) {
    let points: Vec<(i64, f64)> =
        (0..60).map(|i| (base_ms() + n * 3_600_000 + i * 60_000, (n * 60 + i) as f64 / 7.0)).collect();
    server.write(&[series("kept", &[("item", "a")], &points)]);
    server.flush();
}

/// The values of hour `n` that no sample of the hour before has a part in, or the error.
fn hour(server: &Server, n: i64) -> Result<usize, String> {
    let (start, end) = (base_ms() / 1000 + n * 3600 + 600, base_ms() / 1000 + n * 3600 + 3540);
    let path = format!("/api/v1/query_range?query=kept&start={start}&end={end}&step=60");
    let answer = server.client().get(&path);
    match answer.status {
        200 => Ok(answer.json()["data"]["result"][0]["values"].as_array().map_or(0, Vec::len)),
        _ => Err(answer.text()),
    }
}

fn objects(down: &Down, folder: &str) -> Vec<PathBuf> {
    let day = down.data_dir().join(format!("objects/default/{folder}/{}", base_ms() / 86_400_000));
    let mut found: Vec<PathBuf> = std::fs::read_dir(day).expect("a folder").flatten().map(|e| e.path()).collect();
    // Ids grow with time.
    found.sort_by_key(|path| (path.as_os_str().len(), path.clone()));
    found
}

fn flip(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).expect("a readable object");
    bytes[at] ^= 1;
    std::fs::write(path, bytes).expect("a writable object");
}

fn told(server: &Server, path: &Path) -> usize {
    let name = path.file_name().expect("a name").to_string_lossy().into_owned();
    server.log().lines().filter(|l| l.contains("stored object is damaged") && l.contains(&name)).count()
}

fn damaged_objects(server: &Server) -> String {
    let metrics = server.client().get("/metrics").text();
    let line = metrics.lines().find(|l| l.starts_with("thalweg_damaged_objects "));
    line.expect("the gauge").rsplit(' ').next().expect("a value").to_owned()
}

#[test]
fn compaction_goes_around_a_damaged_file() {
    let server = Down::new(Setup::default()).start();
    for n in 0..5 {
        write_hour(&server, n);
    }
    let mut down = server.kill();
    let damaged = objects(&down, "samples")[2].clone();
    // The first pages: codes, which every query of the file needs.
    flip(&damaged, 40);
    down.expect_log("stored object is damaged");
    down.expect_log("query api failed");
    let server = down.start();
    for _ in 0..2 {
        server.compact();
        let files = server.sql("SELECT level FROM catalog.files ORDER BY path");
        assert_eq!(files.len(), 3, "two merges around the damaged file: {files:?}");
        for n in [0, 1, 3, 4] {
            assert_eq!(hour(&server, n), Ok(50), "hour {n}");
        }
        let error = hour(&server, 2).expect_err("damage is never an empty answer");
        assert!(error.contains(&damaged.file_name().expect("a name").to_string_lossy().into_owned()), "{error}");
        assert!(error.contains("page at byte"), "{error}");
        let metrics = server.client().get("/metrics").text();
        assert!(metrics.contains("thalweg_queries_total{outcome=\"damaged\"}"), "{metrics}");
        assert_eq!(told(&server, &damaged), 1, "{}", server.log());
        assert_eq!(damaged_objects(&server), "1");
    }
    // What comes later is stored and merged all the same.
    write_hour(&server, 5);
    server.compact();
    assert_eq!(hour(&server, 5), Ok(50));
}

#[test]
fn flushes_go_around_a_damaged_tag_part() {
    let server = Down::new(Setup::default()).start();
    write_hour(&server, 0);
    server.write(&[series("gone", &[], &[(base_ms() + 1000, 1.0)])]);
    server.flush();
    let mut down = server.kill();
    let parts = objects(&down, "tag_sets");
    assert_eq!(parts.len(), 2);
    flip(&parts[0], 100);
    down.expect_log("stored object is damaged");
    down.expect_log("query api failed");
    let server = down.start();
    let error = hour(&server, 0).expect_err("a series whose tags are damaged is not missing without a word");
    assert!(error.contains(&parts[0].file_name().expect("a name").to_string_lossy().into_owned()), "{error}");
    write_hour(&server, 1);
    server.compact();
    assert_eq!(told(&server, &parts[0]), 1, "{}", server.log());
    assert_eq!(damaged_objects(&server), "1");
}
