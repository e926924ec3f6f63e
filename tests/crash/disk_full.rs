//! The disk fills up while clients write: they are told to come again, readers notice nothing, and when there is room
//! writing goes on. Needs root.

use std::time::{Duration, Instant};

use super::disk::Disk;
use super::ledger::Ledger;
use super::{extent, figures};
use crate::harness::{Client, Down, Random, Response, Series, Setup, now_ms, series, wait_for};

const WRITERS: u64 = 4;
const MIB: u64 = 160;
/// How long the disk stays full after the first refusal.
const FULL: Duration = Duration::from_millis(1500);

/// A request that needs a good deal of room: its values don't pack.
fn bulk(random: &mut Random) -> Vec<Series> {
    let now = now_ms();
    let one = |random: &mut Random, number: u64| {
        let samples: Vec<(i64, f64)> =
            (0..50).map(|i| (now - 60_000 + i * 1000, f64::from_bits(random.number() >> 2))).collect();
        series("bulk", &[("number", &number.to_string())], &samples)
    };
    (0..100).map(|number| one(random, number)).collect()
}

/// Success or the one refusal that clients wait for.
fn is_stored(answer: &Response) -> bool {
    let refused = answer.status == 503 && answer.header("retry-after").is_some();
    assert!(refused || answer.status == 204, "a write got {}: {}", answer.status, answer.text());
    !refused
}

fn reads_go_on(client: &mut Client) {
    let query = client.form("/api/v1/query", &[("query", "count(ledger)")]);
    assert_eq!(query.status, 200, "a query while the disk is full: {}", query.text());
    let sql = client.post("/api/v1/sql", &[("Content-Type", "text/plain")], b"SELECT count(*) FROM prometheus.ledger");
    assert_eq!(sql.status, 200, "a statement while the disk is full: {}", sql.text());
}

fn run(kind: &str, disk: &Disk, seed: u64, rounds: u64) {
    let mut random = Random(seed);
    let mut ledger = Ledger::new(WRITERS, &mut random);
    // A full disk is worth any number of warnings.
    let expected = vec![String::new()];
    let mut server = Down::new(Setup { data_dir: Some(disk.data_dir()), expected, ..Setup::default() }).start();
    ledger.write(&server, 10);
    let mut slowest = Duration::ZERO;
    for round in 0..rounds {
        let address = server.http;
        let (mut own, wait) = (Random(random.number()), Duration::from_millis(100 + random.below(400)));
        ledger.write_during(address, &mut random, |_| {
            let mut client = Client::new(address);
            std::thread::sleep(wait);
            disk.fill();
            // What the log has allocated already may take a while to fill.
            wait_for("the first refusal", || {
                (!is_stored(&client.write(&bulk(&mut own)).expect("the server is up"))).then_some(())
            });
            let refused = Instant::now();
            while refused.elapsed() < FULL {
                reads_go_on(&mut client);
                is_stored(&client.write(&bulk(&mut own)).expect("the server is up"));
            }
            disk.free();
            let freed = Instant::now();
            let probe = [series("probe", &[], &[(now_ms(), 1.0)])];
            wait_for("writing to go on", || is_stored(&client.write(&probe).expect("the server is up")).then_some(()));
            slowest = slowest.max(freed.elapsed());
        });
        ledger.check(&server).assert_none(&format!("{kind}, seed {seed}, round {round}"));
        let down = server.kill();
        if round % 2 == 1 {
            // Whether it starts on a full disk is its own choice; it must not make anything worse.
            disk.fill();
            if let Ok(server) = down.clone().try_start() {
                ledger.check(&server).assert_none(&format!("{kind}, seed {seed}, started while full"));
                drop(server);
            }
            disk.free();
        }
        server = down.start();
        ledger.check(&server).assert_none(&format!("{kind}, seed {seed}, killed after round {round}"));
    }
    server.flush();
    server.compact();
    let findings = ledger.check(&server);
    findings.assert_none(&format!("{kind}, seed {seed}, compacted"));
    drop(server);
    figures(
        &format!("disk full, {kind}"),
        seed,
        &[
            ("rounds", rounds.to_string()),
            ("acknowledged samples", findings.acknowledged.to_string()),
            ("open requests", findings.open.to_string()),
            ("lost, half, wrong", "0".to_owned()),
            ("writes again after at most", format!("{:.2} s", slowest.as_secs_f64())),
        ],
    );
}

#[test]
fn a_full_ext4_refuses_and_recovers() {
    for seed in 0..extent("CRASH_SEEDS", 1) {
        let Some(disk) = Disk::ext4(MIB) else { return };
        run("ext4", &disk, seed, extent("CRASH_CYCLES", 2));
    }
}

#[test]
fn a_full_tmpfs_refuses_and_recovers() {
    for seed in 0..extent("CRASH_SEEDS", 1) {
        let Some(disk) = Disk::tmpfs(MIB) else { return };
        run("tmpfs", &disk, seed, extent("CRASH_CYCLES", 2));
    }
}
