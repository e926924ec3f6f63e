//! The power fails: of what the server wrote only what it synced is there afterwards. Needs root.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::disk::Disk;
use super::ledger::Ledger;
use super::{extent, figures};
use crate::harness::{Down, Random, Setup};

const WRITERS: u64 = 4;
const MIB: u64 = 192;

fn run(seed: u64, cuts: u64) {
    let Some(disk) = Disk::ext4(MIB) else { return };
    let mut random = Random(seed);
    let mut ledger = Ledger::new(WRITERS, &mut random);
    ledger.disk_fails = true;
    // A disk that is gone is worth any number of warnings.
    let expected = vec![String::new()];
    let mut server = Down::new(Setup { data_dir: Some(disk.data_dir()), expected, ..Setup::default() }).start();
    for cut in 0..cuts {
        let wait = Duration::from_millis(50 + random.below(1200));
        let after = Duration::from_millis(random.below(100));
        let address = server.http;
        let down = ledger.write_during(address, &mut random, |stop| {
            std::thread::sleep(wait);
            disk.cut_power();
            // Nothing that is acknowledged from here on can be true.
            std::thread::sleep(after);
            let down = server.kill();
            stop.store(true, Ordering::Relaxed);
            down
        });
        disk.power_on();
        server = down.start();
        ledger.check(&server).assert_none(&format!("seed {seed}, power loss {cut}"));
    }
    server.flush();
    server.compact();
    let findings = ledger.check(&server);
    findings.assert_none(&format!("seed {seed}, compacted"));
    drop(server);
    figures(
        "power loss",
        seed,
        &[
            ("losses", cuts.to_string()),
            ("acknowledged samples", findings.acknowledged.to_string()),
            ("open requests", findings.open.to_string()),
            ("lost, half, wrong", "0".to_owned()),
        ],
    );
}

#[test]
fn acknowledged_survives_a_loss_of_power() {
    for seed in 0..extent("CRASH_SEEDS", 1) {
        run(seed, extent("CRASH_CYCLES", 3));
    }
}
