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
    let mut server = Down::new(Setup { data_dir: Some(disk.data_dir()), ..Setup::default() }).start();
    for cut in 0..cuts {
        let wait = Duration::from_millis(50 + random.below(1200));
        let address = server.http;
        let down = ledger.write_during(address, &mut random, |stop| {
            std::thread::sleep(wait);
            // A machine without power acknowledges nothing. The server must not go on either: a sync that is under way while
            // the file system goes may succeed, although nothing of it reaches the disk.
            server.pause();
            disk.cut_power();
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
