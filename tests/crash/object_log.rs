//! The log in the bucket: machines come and go, each with an empty disk, and what was acknowledged stays; a server that
//! was taken for dead acknowledges nothing any more.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::ledger::Ledger;
use super::{extent, figures};
use crate::harness::s3::S3;
use crate::harness::{Down, Random, now_ms, series, wait_for};

const WRITERS: u64 = 4;

/// A server that keeps its log and its data in the bucket.
fn setup(s3: &S3) -> Down {
    let mut setup = S3::setup(s3.address);
    setup.environment.push(("THALWEG_WAL".to_owned(), "object".to_owned()));
    Down::new(setup)
}

fn run(seed: u64, kills: u64) {
    let Some(s3) = S3::start() else { return };
    let mut random = Random(seed);
    let mut ledger = Ledger::new(WRITERS, &mut random);
    let mut server = setup(&s3).start();
    for kill in 0..kills {
        let wait = Duration::from_millis(500 + random.below(1500));
        let address = server.http;
        let down = ledger.write_during(address, &mut random, |stop| {
            std::thread::sleep(wait);
            let down = server.kill();
            stop.store(true, Ordering::Relaxed);
            down
        });
        drop(down);
        server = setup(&s3).start();
        ledger.check(&server).assert_none(&format!("seed {seed}, empty disk {kill}"));
    }
    server.flush();
    server.compact();
    let findings = ledger.check(&server);
    findings.assert_none(&format!("seed {seed}, compacted"));
    figures(
        "log in the bucket, kill -9 and an empty disk",
        seed,
        &[
            ("kills", kills.to_string()),
            ("acknowledged samples", findings.acknowledged.to_string()),
            ("open requests", findings.open.to_string()),
            ("lost, half, wrong", "0".to_owned()),
        ],
    );
}

#[test]
fn acknowledged_outlives_process_and_disk() {
    for seed in 0..extent("CRASH_SEEDS", 1) {
        run(seed, extent("CRASH_CYCLES", 3));
    }
}

#[test]
fn a_server_that_was_taken_for_dead_acknowledges_nothing() {
    for seed in 0..extent("CRASH_SEEDS", 1) {
        let Some(s3) = S3::start() else { return };
        let mut random = Random(seed);
        let mut ledger = Ledger::new(WRITERS, &mut random);
        let mut down = setup(&s3);
        // It says that it has lost the database, and everything that fails for that.
        down.expect_log("");
        let old = down.start();
        let address = old.http;
        let wait = Duration::from_millis(500 + random.below(1000));
        let new = ledger.write_during(address, &mut random, |_| {
            std::thread::sleep(wait);
            old.pause();
            let new = setup(&s3).start();
            old.resume();
            // What was under way is refused, and so is what comes.
            std::thread::sleep(Duration::from_millis(500));
            let body = [series("late", &[], &[(now_ms(), 1.0)])];
            wait_for("an answer", || {
                let answer = old.client().write(&body).ok()?;
                assert_eq!((answer.status, answer.header("retry-after").is_some()), (503, true), "{}", answer.text());
                Some(())
            });
            new
        });
        ledger.check(&new).assert_none(&format!("seed {seed}, taken over"));
        drop(old);
        ledger.settle(&new);
        let findings = ledger.check(&new);
        findings.assert_none(&format!("seed {seed}, sent again"));
        figures(
            "log in the bucket, taken over",
            seed,
            &[
                ("acknowledged samples", findings.acknowledged.to_string()),
                ("open requests", findings.open.to_string()),
                ("lost, half, wrong", "0".to_owned()),
            ],
        );
    }
}
