//! SIGKILL at random moments, under concurrent writers, resends, flushes and compactions.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::ledger::Ledger;
use super::{extent, figures};
use crate::harness::{Random, Server};

const WRITERS: u64 = 4;

fn run(seed: u64, kills: u64) {
    let mut random = Random(seed);
    let mut ledger = Ledger::new(WRITERS, &mut random);
    let mut server = Server::start();
    let mut slowest = Duration::ZERO;
    for kill in 0..kills {
        let wait = Duration::from_millis(50 + random.below(1200));
        let address = server.http;
        let down = ledger.write_during(address, &mut random, |stop| {
            std::thread::sleep(wait);
            let down = server.kill();
            stop.store(true, Ordering::Relaxed);
            down
        });
        server = down.start();
        slowest = slowest.max(server.ready_after);
        ledger.check(&server).assert_none(&format!("seed {seed}, kill {kill}"));
    }
    server.flush();
    ledger.check(&server).assert_none(&format!("seed {seed}, flushed"));
    server.compact();
    let findings = ledger.check(&server);
    findings.assert_none(&format!("seed {seed}, compacted"));
    figures(
        "kill -9",
        seed,
        &[
            ("kills", kills.to_string()),
            ("acknowledged samples", findings.acknowledged.to_string()),
            ("open requests", findings.open.to_string()),
            ("lost, half, wrong", "0".to_owned()),
            ("slowest start", format!("{:.2} s", slowest.as_secs_f64())),
        ],
    );
}

#[test]
fn acknowledged_means_readable_exactly_once() {
    for seed in 0..extent("CRASH_SEEDS", 3) {
        run(seed, extent("CRASH_CYCLES", 4));
    }
}

#[test]
fn a_torn_log_tail_is_cut_and_the_rest_kept() {
    let server = Server::start();
    let mut ledger = Ledger::new(2, &mut Random(1));
    ledger.write(&server, 10);
    let server = server.kill_and_damage(|data_dir| {
        let files = std::fs::read_dir(data_dir.join("wal")).expect("the log's folder").flatten().map(|e| e.path());
        let newest = files.filter(|f| f.extension().is_some_and(|e| e == "wal")).max().expect("a log file");
        let mut bytes = std::fs::read(&newest).expect("a readable log");
        // A record header that promises more than is there, as a write that never ended leaves it.
        bytes.extend_from_slice(&[0x40, 0, 0, 0, 1, 2, 3]);
        std::fs::write(&newest, bytes).expect("a writable log");
    });
    ledger.check(&server).assert_none("a torn tail");
}
