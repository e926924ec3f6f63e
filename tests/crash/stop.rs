//! SIGTERM under load: it ends in order and soon, and everything that was acknowledged is there afterwards.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::ledger::Ledger;
use super::{extent, figures};
use crate::harness::server::signal;
use crate::harness::{Random, Server};

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
