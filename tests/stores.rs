//! Data files on S3, as a server of another make speaks it: sound, and behind a proxy that loses, delays and tears.
//!
//! `STORE_SEEDS` sets the number of runs with faults.

use std::process::Command;

use crate::harness::s3::{Proxy, S3};
use crate::harness::{Down, Random, Series, Server, Setup, now_ms, series, wait_for};

const SERIES: u64 = 4;

/// The request with this number: one sample for each series, with values that tell where they come from.
fn request(number: u64, base_ms: i64) -> Vec<Series> {
    (0..SERIES)
        .map(|item| {
            let value = (item * 100_000 + number) as f64 + 0.5;
            series("stored", &[("item", &item.to_string())], &[(base_ms + number as i64 * 1000, value)])
        })
        .collect()
}

/// All rows of the first `requests` requests are there, each once.
fn check(server: &Server, requests: u64, context: &str) {
    let rows = server.sql("SELECT item, value FROM prometheus.stored ORDER BY item, ts");
    let expected: Vec<String> = (0..SERIES)
        .flat_map(|item| (0..requests).map(move |n| format!("{item},{:?}", (item * 100_000 + n) as f64 + 0.5)))
        .collect();
    assert_eq!(rows, expected, "{context}");
}

fn flush_until_done(server: &Server) {
    wait_for("a flush", || {
        server.client().request("POST", "/api/v1/admin/flush", &[], b"").ok().filter(|r| r.status == 204)
    });
}

#[test]
fn an_empty_disk_finds_everything_in_the_bucket() {
    let Some(s3) = S3::start() else { return };
    let base_ms = now_ms() - 3_600_000;
    let down = Down::new(S3::setup(s3.address));
    let server = down.start();
    for n in 0..20 {
        server.write(&request(n, base_ms));
        if n % 5 == 4 {
            server.flush();
        }
    }
    check(&server, 20, "flushed");
    server.compact();
    check(&server, 20, "compacted");
    let server = server.stop_and_restart();
    check(&server, 20, "restarted");
    // The database's own place by another name is no place for its backup.
    let by_name = S3::url(s3.address).replace("127.0.0.1", "localhost");
    let backup = |destination: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_thalweg"));
        command.args(["backup", destination, "--data-dir"]).arg(server.data_dir());
        let setup = S3::setup(s3.address);
        let out = command.args(setup.arguments).envs(setup.environment).output().expect("the binary runs");
        (out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let (done, said) = backup(&by_name);
    assert!(!done && said.contains("holds a database; give backups a place of their own"), "{said}");
    let (done, said) = backup(&by_name.replace("prefix", "backups"));
    assert!(done, "{said}");
    server.write(&request(20, base_ms));
    let down = server.stop();
    let disk = tempfile::tempdir().expect("a temporary folder");
    let server = down.moved(disk.path().join("data")).start();
    check(&server, 21, "on an empty disk");
    let keys = s3.keys();
    assert!(keys.iter().any(|k| k.starts_with("prefix/default/samples/")), "{keys:?}");
}

#[test]
fn a_store_without_conditions_is_refused() {
    let Some(s3) = S3::start() else { return };
    let proxy = Proxy::before(s3.address, 0);
    proxy.forget_conditions();
    let ended = Down::new(S3::setup(proxy.address)).try_start().expect_err("it must not start");
    assert!(ended.contains("If-None-Match is not honoured"), "{ended}");
    // Credentials in the wrong place are not repeated.
    let mut setup = S3::setup(s3.address);
    setup.arguments[1].push_str("&secret_access_key=canary");
    let ended = Down::new(setup).try_start().expect_err("it must not start");
    assert!(ended.contains("secret_access_key") && !ended.contains("canary"), "{ended}");
}

#[test]
fn a_kill_during_a_flush_loses_nothing() {
    let Some(s3) = S3::start() else { return };
    let base_ms = now_ms() - 3_600_000;
    let mut random = Random(7);
    let mut server = Down::new(S3::setup(s3.address)).start();
    for round in 0..6 {
        for n in 0..3 {
            server.write(&request(round * 3 + n, base_ms));
        }
        let mut client = server.client();
        let path = if round % 2 == 0 { "/api/v1/admin/flush" } else { "/api/v1/admin/compact" };
        // The answer does not matter: the server is killed before it, or shortly after.
        let flush = std::thread::spawn(move || drop(client.request("POST", path, &[], b"")));
        std::thread::sleep(std::time::Duration::from_millis(random.below(150)));
        server = server.kill().start();
        flush.join().expect("the thread ended");
        check(&server, (round + 1) * 3, &format!("kill {round}"));
    }
    flush_until_done(&server);
    server.compact();
    check(&server, 18, "compacted");
}

#[test]
fn faults_of_the_store_lose_nothing() {
    let seeds = std::env::var("STORE_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    for seed in 0..seeds {
        let Some(s3) = S3::start() else { return };
        let proxy = Proxy::before(s3.address, seed);
        let base_ms = now_ms() - 3_600_000;
        let mut setup = S3::setup(proxy.address);
        // Everything else that is said there fails the test, above all what speaks of damage.
        let expected = [
            "flush failed",
            "compaction failed",
            "administration request failed",
            "commit waits for the object store",
            "checkpoint of the journal was not made",
        ];
        setup.expected = expected.map(str::to_owned).to_vec();
        let mut server = Down::new(setup).start();
        let mut requests = 0;
        for round in 0..5 {
            proxy.faults(30);
            for _ in 0..3 {
                server.write(&request(requests, base_ms));
                requests += 1;
                let flushed = server.client().post("/api/v1/admin/flush", &[], b"").status;
                assert!([204, 503].contains(&flushed), "a flush was answered {flushed}");
            }
            let compacted = server.client().post("/api/v1/admin/compact", &[], b"").status;
            assert!([204, 503].contains(&compacted), "a compaction was answered {compacted}");
            proxy.faults(0);
            check(&server, requests, &format!("seed {seed}, round {round}"));
            if round % 2 == 1 {
                server = server.kill().start();
                check(&server, requests, &format!("seed {seed}, round {round}, restarted"));
            }
        }
        flush_until_done(&server);
        server.compact();
        check(&server, requests, &format!("seed {seed}, at the end"));
        let hits = proxy.hits();
        eprintln!("seed {seed}: {hits:?}");
        assert!(hits.values().sum::<usize>() > 20, "seed {seed}: hardly a fault happened: {hits:?}");
    }
}

#[test]
fn a_server_that_was_replaced_is_not_ready() {
    let store = tempfile::tempdir().expect("a temporary folder");
    let start = || {
        let arguments = vec!["--object-store".to_owned(), store.path().display().to_string()];
        // The one says that it has lost the database, the other that the SQL catalog is made anew.
        Down::new(Setup { arguments, expected: vec![String::new()], ..Setup::default() }).start()
    };
    let old = start();
    old.write(&[series("kept", &[], &[(now_ms(), 1.0)])]);
    let new = start();
    let flushed = old.client().post("/api/v1/admin/flush", &[], b"");
    assert_eq!(flushed.status, 503, "{}", flushed.text());
    let ready = old.client().get("/-/ready");
    assert!(ready.status == 503 && ready.text().contains("another server has taken this database over"), "{ready:?}");
    assert_eq!(old.sql("SELECT value FROM prometheus.kept"), ["1"]);
    assert_eq!(new.client().get("/-/ready").status, 200);
}
