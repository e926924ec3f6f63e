//! The history of a real Prometheus is imported: from blocks, from its log, over remote read; and is all there.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::harness::programs::output;
use crate::harness::remote_write::{HEADERS, field, message, snappy, varint};
use crate::harness::{Client, Process, Server, free_port, now_ms, program, run, series, wait_for};

/// Two minutes: 36 hours of them are a block of a day and several smaller ones.
const STEP_MS: i64 = 120_000;
const STEPS: i64 = 36 * 30;
/// The series that is deleted in part.
const DELETED: &str = "test_deleted";

struct Source {
    dir: tempfile::TempDir,
    prometheus: SocketAddr,
    _process: Process,
    /// The first and the last time of any sample.
    times: (i64, i64),
}

/// A Prometheus with blocks that promtool made, of which some samples are deleted, and with floats and native histograms
/// in its log.
fn source() -> Option<Source> {
    let (prometheus, promtool) = (program("prometheus")?, program("promtool")?);
    let dir = tempfile::tempdir().expect("a temporary folder");
    let end = now_ms() / 1000 * 1000;
    let start = end - 4 * 86_400_000;
    let text = dir.path().join("text");
    std::fs::write(&text, open_metrics(start)).expect("a file");
    let tsdb = dir.path().join("tsdb");
    let paths = [text.display().to_string(), tsdb.display().to_string()];
    run(&promtool, ["tsdb", "create-blocks-from", "openmetrics", &paths[0], &paths[1]]);
    let config = dir.path().join("prometheus.yml");
    std::fs::write(&config, "global: {}\n").expect("a file");
    let port = free_port();
    let process = Process::start(
        &prometheus,
        [
            format!("--config.file={}", config.display()),
            format!("--storage.tsdb.path={}", paths[1]),
            format!("--web.listen-address=127.0.0.1:{port}"),
            "--storage.tsdb.retention.time=100y".to_owned(),
            // Blocks stay as they are.
            "--storage.tsdb.min-block-duration=2h".to_owned(),
            "--storage.tsdb.max-block-duration=2h".to_owned(),
            "--web.enable-admin-api".to_owned(),
            "--web.enable-remote-write-receiver".to_owned(),
            "--enable-feature=native-histograms".to_owned(),
        ],
        &dir.path().join("prometheus.log"),
    );
    let prometheus = SocketAddr::from(([127, 0, 0, 1], port));
    let mut client = Client::new(prometheus);
    wait_for("Prometheus", || (client.try_get("/-/ready").ok()?.status == 200).then_some(()));
    for i in 0..10 {
        let now = end - 100_000 + i * 10_000;
        let mut body = message(&[series("test_head", &[("job", "x")], &[(now, i as f64 / 3.0)])]);
        body.extend(histograms(now, i as u64));
        let response = client.post("/api/v1/write", &HEADERS, &snappy(&body));
        assert_eq!(response.status, 204, "{}", response.text());
    }
    let delete = format!(
        "/api/v1/admin/tsdb/delete_series?match[]={DELETED}&start={}&end={}",
        (start + 10 * STEP_MS) / 1000,
        (start + (STEPS - 20) * STEP_MS) / 1000
    );
    let response = client.post(&delete, &[], b"");
    assert_eq!(response.status, 204, "{}", response.text());
    Some(Source { dir, prometheus, _process: process, times: (start, end) })
}

/// Counters, gauges, special values and long labels.
fn open_metrics(start: i64) -> String {
    let mut out = String::new();
    let mut metric = |name: &str, labels: &str, value: &dyn Fn(i64) -> String| {
        out.push_str(&format!("# TYPE {name} gauge\n"));
        for i in 0..STEPS {
            let ts = (start + i * STEP_MS) / 1000;
            out.push_str(&format!("{name}{{{labels}}} {} {ts}\n", value(i)));
        }
    };
    metric("test_counter", "job=\"a\",instance=\"1\"", &|i| (i * 17).to_string());
    metric("test_float", "job=\"a\"", &|i| ((i as f64) / 7.0).to_string());
    metric(DELETED, "job=\"b\"", &|i| (i % 9).to_string());
    metric("test_special", "job=\"c\"", &|i| ["NaN", "+Inf", "-Inf", "0", "1e-300"][i as usize % 5].to_owned());
    metric("test_text", &format!("job=\"d\",long=\"{}\",utf8=\"äß\u{1f980}\"", "x".repeat(300)), &|_| "1".to_owned());
    out.push_str("# EOF\n");
    out
}

/// Two series of native histograms at a time, of whole and of fractional counts.
pub fn histograms(ts: i64, i: u64) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, whole) in [("test_whole", true), ("test_fractional", false)] {
        let mut body = Vec::new();
        let double = |number: u8, v: f64, out: &mut Vec<u8>| {
            out.push(number << 3 | 1);
            out.extend(v.to_le_bytes());
        };
        let number = |number: u8, v: u64, out: &mut Vec<u8>| {
            varint(out, u64::from(number) << 3);
            varint(out, v);
        };
        double(3, 2.5 * i as f64, &mut body);
        // Zigzag coded: schema 2.
        number(4, 4, &mut body);
        double(5, 0.001, &mut body);
        // Two positive buckets from index -1 on, zigzag coded, too.
        let mut span = Vec::new();
        number(1, 1, &mut span);
        number(2, 2, &mut span);
        field(&mut body, 11, &span);
        if whole {
            number(1, 3 * i + 1, &mut body);
            number(6, 1, &mut body);
            field(&mut body, 12, &[(2 * i) as u8, (2 * i) as u8]);
        } else {
            double(2, 1.5 * i as f64 + 0.5, &mut body);
            double(7, 0.5, &mut body);
            field(&mut body, 13, &[(0.5 * i as f64).to_le_bytes(), (i as f64).to_le_bytes()].concat());
        }
        number(15, ts as u64, &mut body);
        let mut label = Vec::new();
        field(&mut label, 1, b"__name__");
        field(&mut label, 2, name.as_bytes());
        let mut one = Vec::new();
        field(&mut one, 1, &label);
        field(&mut one, 4, &body);
        field(&mut out, 1, &one);
    }
    out
}

/// The import; its state is `name` in the source's folder.
fn command(source: &Source, name: &str, server: &Server, from: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_thalweg"));
    command
        .args(["import", "prometheus", from, "--server", &format!("http://{}", server.http), "--state"])
        .arg(source.dir.path().join(name));
    command
}

/// Runs it to its end.
fn import(source: &Source, name: &str, server: &Server, from: &str, more: &[&str]) -> Output {
    command(source, name, server, from).args(more).output().expect("the import runs")
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Every float sample of the test's series, by labels.
fn samples(address: SocketAddr, times: (i64, i64)) -> BTreeMap<String, Vec<(i64, String)>> {
    let range = format!("{{__name__=~\"test_.*\"}}[{}s]", (times.1 - times.0) / 1000 + 100);
    let time = format!("{}", times.1 / 1000 + 50);
    let answer = Client::new(address).form("/api/v1/query", &[("query", &range), ("time", &time)]).json();
    assert_eq!(answer["status"], "success", "{answer}");
    let all = answer["data"]["result"].as_array().expect("a matrix");
    let point = |p: &Value| {
        let ts = p[0].as_f64().expect("a time") * 1000.0;
        (ts.round() as i64, p[1].as_str().expect("a value").to_owned())
    };
    let named = all.iter().filter(|one| one["values"].is_array()).map(|one| {
        let labels: BTreeMap<_, _> = one["metric"].as_object().into_iter().flatten().collect();
        (format!("{labels:?}"), one["values"].as_array().into_iter().flatten().map(point).collect())
    });
    named.collect()
}

/// Native histograms as SQL shows them; one more of each for the next `i`.
fn check_histograms(server: &Server) {
    let rows = server.sql(
        "SELECT metric, count_int, zero_count_int, count_float, zero_count_float, sum, schema FROM histograms ORDER BY metric, ts",
    );
    assert_eq!(rows.len(), 20, "{rows:?}");
    for i in 0..10 {
        let fractional = format!("test_fractional,,,{},0.5,{},2", 1.5 * f64::from(i) + 0.5, 2.5 * f64::from(i));
        let whole = format!("test_whole,{},1,,,{},2", 3 * i + 1, 2.5 * f64::from(i));
        assert_eq!((&rows[i as usize], &rows[10 + i as usize]), (&fractional, &whole));
    }
}

/// Fails at the first difference, without printing all samples.
fn check_samples(what: &str, expected: &BTreeMap<String, Vec<(i64, String)>>, server: &Server, times: (i64, i64)) {
    let got = samples(server.http, times);
    assert_eq!(expected.keys().collect::<Vec<_>>(), got.keys().collect::<Vec<_>>(), "{what}: series");
    for (labels, expected) in expected {
        let got = &got[labels];
        let first = expected.iter().zip(got).position(|(a, b)| a != b);
        assert_eq!(first.map(|i| (&expected[i], &got[i])), None, "{what}: {labels}");
        assert_eq!(expected.len(), got.len(), "{what}: {labels}");
    }
}

#[test]
fn everything_of_a_prometheus_is_imported() {
    let Some(source) = source() else { return };
    let expected = samples(source.prometheus, source.times);
    let count: usize = expected.values().map(Vec::len).sum();
    let deleted = expected.iter().find(|(labels, _)| labels.contains(DELETED)).map_or(0, |(_, samples)| samples.len());
    assert!((20..40).contains(&deleted), "{deleted} samples of {DELETED} are left");
    assert_eq!(count, 4 * STEPS as usize + deleted + 10);
    let dir = source.dir.path().join("tsdb").display().to_string();

    // Blocks and log, from the folder of the running server.
    let server = Server::start();
    let first = import(&source, "folder", &server, &dir, &[]);
    assert!(first.status.success(), "{}", text(&first));
    check_samples("folder", &expected, &server, source.times);
    check_histograms(&server);
    // Once more: blocks are known, the log changes nothing.
    let again = import(&source, "folder", &server, &dir, &[]);
    assert!(
        again.status.success() && text(&again).contains("imported 10 samples and 20 histograms"),
        "{}",
        text(&again)
    );
    check_samples("folder again", &expected, &server, source.times);

    // Killed again and again, it goes on where it was.
    let server = Server::start();
    for round in 0..6 {
        let mut killed = command(&source, "killed", &server, &dir)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the import runs");
        std::thread::sleep(Duration::from_millis(20 * round));
        // It may have ended by itself, which is no failure here.
        let _ = killed.kill();
        let _ = killed.wait();
    }
    let out = import(&source, "killed", &server, &dir, &[]);
    assert!(out.status.success(), "{}", text(&out));
    check_samples("killed", &expected, &server, source.times);
    check_histograms(&server);

    // A server that is away is waited for, which is said.
    let away = Server::start();
    let mut waiting = command(&source, "waiting", &away, &dir);
    let away = away.stop();
    let log = source.dir.path().join("waiting.log");
    let mut waiting = Process(waiting.stderr(File::create(&log).expect("a file")).spawn().expect("the import runs"));
    wait_for("a line about it", || {
        let said = std::fs::read_to_string(&log).expect("a log");
        said.contains("api/v1/write stores nothing yet: ").then_some(())
    });
    assert_eq!(waiting.0.try_wait().expect("a process"), None);
    drop((waiting, away));

    // The log as a block.
    let answer = Client::new(source.prometheus).post("/api/v1/admin/tsdb/snapshot", &[], b"").json();
    let snapshot = Path::new(&dir).join("snapshots").join(answer["data"]["name"].as_str().expect("a name"));
    let server = Server::start();
    let out = import(&source, "snapshot", &server, &snapshot.display().to_string(), &[]);
    assert!(out.status.success(), "{}", text(&out));
    check_samples("snapshot", &expected, &server, source.times);
    check_histograms(&server);

    // Over remote read, in two runs of which the first ends early.
    let server = Server::start();
    let url = format!("http://{}", source.prometheus);
    let start = (source.times.0 / 1000).to_string();
    let middle = (source.times.0 / 1000 + 86_400).to_string();
    let out = import(&source, "half", &server, &url, &["--start", &start, "--end", &middle]);
    assert!(out.status.success(), "{}", text(&out));
    let out = import(&source, "url", &server, &url, &["--start", &start, "--match", "{__name__=~\"test_.*\"}"]);
    assert!(out.status.success(), "{}", text(&out));
    check_samples("remote read", &expected, &server, source.times);
    check_histograms(&server);

    // From this server to another, in chunks of our own.
    let other = Server::start();
    let url = format!("http://{}", server.http);
    let out = import(&source, "other", &other, &url, &["--start", &start]);
    assert!(out.status.success(), "{}", text(&out));
    check_samples("from another", &expected, &other, source.times);
    check_histograms(&other);

    damage(&source, &snapshot, count);
}

/// A damaged chunk is named, the rest is imported, and the exit status tells.
fn damage(source: &Source, block_dir: &Path, count: usize) {
    let chunks: Vec<PathBuf> = std::fs::read_dir(block_dir)
        .expect("a folder")
        .flatten()
        .map(|e| e.path().join("chunks/000001"))
        .filter(|p| p.is_file())
        .collect();
    let mut bytes = std::fs::read(&chunks[0]).expect("chunks");
    // Within the first chunk, whose length stands before.
    bytes[20] ^= 0x10;
    std::fs::write(&chunks[0], bytes).expect("a file");
    let server = Server::start();
    let out = import(source, "damaged", &server, &block_dir.display().to_string(), &["--label", "zone=z"]);
    assert!(!out.status.success(), "{}", text(&out));
    for part in ["damaged, left out: block ", "chunks/000001 at 8: checksum is ", "1 damaged places were left out"] {
        assert!(text(&out).contains(part), "{part:?} is not in {}", text(&out));
    }
    let left: usize = server.sql("SELECT count(*) FROM samples WHERE tags['zone'] = 'z'")[0].parse().expect("a count");
    assert!(left < count && left + 200 > count, "{left} of {count} samples are left");
}

#[test]
fn mistakes_are_told() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let check = |arguments: &[&str], message: &str| {
        let state = dir.path().join(format!("state{message}").replace('/', "")).display().to_string();
        let arguments = ["import", "prometheus"].iter().chain(arguments).copied().chain(["--state", &state]);
        let out = output(Path::new(env!("CARGO_BIN_EXE_thalweg")), arguments);
        assert!(!out.status.success() && text(&out).contains(message), "{message:?} is not in {}", text(&out));
    };
    let empty = dir.path().display().to_string();
    check(&[&empty], "holds neither blocks nor a log of Prometheus");
    check(&["/nowhere"], "cannot read folder /nowhere");
    check(&["ftp://x/"], "is neither a folder nor an HTTP URL");
    check(&["http://127.0.0.1:1/"], "--start is missing");
    check(&[&empty, "--start", "soon"], "\"soon\" is neither seconds since 1970 nor RFC 3339");
    check(&[&empty, "--match", "rate(x[5m])"], "--match \"rate(x[5m])\": ");
    check(&[&empty, "--label", "x"], "--label \"x\" is not NAME=VALUE");
}
