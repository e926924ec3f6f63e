//! SIGTERM under load: it ends in order and soon, and everything that was acknowledged is there afterwards.

use std::io::Write as _;
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::ledger::Ledger;
use super::{extent, figures};
use crate::harness::server::signal;
use crate::harness::{Random, Server, now_ms, series};

fn run(seed: u64, stops: u64) {
    let mut random = Random(seed);
    let mut ledger = Ledger::new(4, &mut random);
    let mut server = Server::start();
    let mut slowest = Duration::ZERO;
    for stop_number in 0..stops {
        let wait = Duration::from_millis(100 + random.below(500));
        // Every other time somebody asks twice, and it need not be patient.
        let again = (stop_number % 2 == 1).then(|| Duration::from_millis(random.below(30)));
        let address = server.http;
        ledger.write_during(address, &mut random, |stop| {
            std::thread::sleep(wait);
            let (pid, begun) = (server.pid(), Instant::now());
            let status = match again {
                None => server.terminate(),
                Some(pause) => {
                    signal(pid, "TERM");
                    std::thread::sleep(pause);
                    server.terminate()
                }
            };
            slowest = slowest.max(begun.elapsed());
            stop.store(true, Ordering::Relaxed);
            assert!(status.success() || again.is_some(), "it stopped with {status}: {}", server.log());
        });
        server = server.down().start();
        ledger.check(&server).assert_none(&format!("seed {seed}, stop {stop_number}"));
    }
    let cells = [
        ("stops", stops.to_string()),
        ("acknowledged samples", ledger.acknowledged().to_string()),
        ("lost, half, wrong", "0".to_owned()),
        ("slowest", format!("{:.2} s", slowest.as_secs_f64())),
    ];
    figures("stop", seed, &cells);
}

#[test]
fn a_stop_under_load_loses_nothing() {
    for seed in 0..extent("CRASH_SEEDS", 1) {
        run(seed, extent("CRASH_CYCLES", 2));
    }
}

/// Clients of PostgreSQL that never say who they are, or never read what they are answered, hold nothing up.
#[test]
fn a_stop_waits_for_no_silent_client() {
    let mut server = Server::start();
    let now = now_ms();
    let samples: Vec<(i64, f64)> = (0..100).map(|i| (now - i * 1000, i as f64)).collect();
    server.write(&[series("m", &[], &samples)]);
    let connect = || TcpStream::connect(server.postgres).expect("a connection");
    let (silent, mut undecided, mut deaf) = (connect(), connect(), connect());
    undecided.write_all(&[0, 0, 0, 8, 4, 210, 22, 47]).expect("a question for TLS");
    deaf.write_all(b"\0\0\0\x11\0\x03\0\0user\0me\0\0").expect("a start");
    for text in ["SET statement_timeout = '500ms'", "SELECT * FROM generate_series(1, 1000000000)"] {
        let head = [&b"Q"[..], &(text.len() as u32 + 5).to_be_bytes()].concat();
        deaf.write_all(&[&head, text.as_bytes(), b"\0"].concat()).expect("a statement");
    }
    std::thread::sleep(Duration::from_millis(1500));
    let begun = Instant::now();
    let status = server.terminate();
    assert!(status.success(), "it stopped with {status}: {}", server.log());
    assert!(begun.elapsed() < Duration::from_secs(8), "it took {:?}", begun.elapsed());
    drop((silent, undecided, deaf));
    server = server.down().start();
    assert_eq!(server.sql("SELECT count(*), sum(value) FROM samples"), ["100,4950"]);
}
