//! SIGKILL at random moments, under concurrent writers, flushes and compactions.
//!
//! Every writer owns its series and writes requests of several samples, each sample with a value that says where it
//! came from. It remembers which requests were acknowledged; a request whose answer never came is sent again after the
//! restart or left alone. Afterwards every acknowledged request is there, every other whole or absent, every row once
//! and with its value. `CRASH_SEEDS` sets the number of runs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::harness::{Client, Random, Series, Server, now_ms, series};

const WRITERS: u64 = 4;
const SERIES_PER_WRITER: u64 = 5;
const KILLS_PER_SEED: usize = 4;

/// What one writer knows of its requests.
#[derive(Debug, Default)]
struct Ledger {
    acknowledged: BTreeSet<u64>,
    /// Sent, but the answer never came.
    unknown: BTreeSet<u64>,
    next: u64,
}

fn value(writer: u64, item: u64, request: u64) -> f64 {
    // Not a whole number, so that a value that lands in another row is seen.
    (writer * 1_000_000 + item * 100_000 + request) as f64 + 0.125
}

/// The request with this number: one sample for each series of the writer, and a new series now and then.
fn request(writer: u64, number: u64, base_ms: i64) -> Vec<Series> {
    let ts = base_ms + number as i64 * 10;
    (0..SERIES_PER_WRITER)
        .map(|item| {
            let (writer_label, item_label) = (writer.to_string(), item.to_string());
            let generation = (number / 50).to_string();
            let labels = [("generation", generation.as_str()), ("item", &item_label), ("writer", &writer_label)];
            series("crash_test", &labels, &[(ts, value(writer, item, number))])
        })
        .collect()
}

fn write_until_stopped(writer: u64, mut client: Client, ledger: &mut Ledger, base_ms: i64, stop: &AtomicBool) {
    // Half of what was left open is sent again: a repeated request must not double anything.
    let again: Vec<u64> = ledger.unknown.iter().copied().filter(|n| n % 2 == 0).collect();
    for number in again {
        match client.write(&request(writer, number, base_ms)) {
            Ok(response) if response.status == 204 => {
                ledger.unknown.remove(&number);
                ledger.acknowledged.insert(number);
            }
            Ok(_) => {}
            Err(_) => return,
        }
    }
    while !stop.load(Ordering::Relaxed) {
        let number = ledger.next;
        ledger.next += 1;
        match client.write(&request(writer, number, base_ms)) {
            Ok(response) if response.status == 204 => {
                ledger.acknowledged.insert(number);
            }
            Ok(response) => panic!("a good request was refused: {} {}", response.status, response.text()),
            Err(_) => {
                ledger.unknown.insert(number);
                return;
            }
        }
    }
}

fn disturb(mut client: Client, mut random: Random, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(random.below(150)));
        let path = if random.below(3) == 0 { "/api/v1/admin/compact" } else { "/api/v1/admin/flush" };
        if client.request("POST", path, &[], b"").is_err() {
            return;
        }
    }
}

fn check(server: &Server, ledgers: &[Ledger], base_ms: i64, context: &str) {
    let rows = server
        .sql("SELECT writer, item, CAST(extract(epoch FROM ts) * 1000 AS bigint), value FROM prometheus.crash_test");
    let mut found: BTreeMap<(u64, u64), Vec<u64>> = BTreeMap::new();
    for row in &rows {
        let cells: Vec<&str> = row.split(',').collect();
        let number = |i: usize| cells[i].parse::<u64>().unwrap_or_else(|_| panic!("{context}: odd row {row:?}"));
        let (writer, item) = (number(0), number(1));
        let request = (number(2) as i64 - base_ms) as u64 / 10;
        let want = value(writer, item, request);
        assert_eq!(cells[3].parse::<f64>().ok(), Some(want), "{context}: wrong value in row {row:?}");
        found.entry((writer, request)).or_default().push(item);
    }
    for (writer, ledger) in ledgers.iter().enumerate() {
        for number in 0..ledger.next {
            let mut items = found.remove(&(writer as u64, number)).unwrap_or_default();
            items.sort_unstable();
            let whole: Vec<u64> = (0..SERIES_PER_WRITER).collect();
            let acknowledged = ledger.acknowledged.contains(&number);
            let right = items == whole || (items.is_empty() && !acknowledged);
            assert!(
                right,
                "{context}: request {number} of writer {writer}, acknowledged: {acknowledged}, has {items:?}"
            );
        }
    }
    assert!(found.is_empty(), "{context}: rows that nobody wrote: {found:?}");
}

fn run(seed: u64) {
    let mut random = Random(seed);
    let base_ms = now_ms() - 3_600_000;
    let mut server = Server::start();
    let mut ledgers: Vec<Ledger> = (0..WRITERS).map(|_| Ledger::default()).collect();
    for kill in 0..KILLS_PER_SEED {
        let stop = AtomicBool::new(false);
        let wait = Duration::from_millis(50 + random.below(1200));
        let disturber = Random(random.number());
        let address = server.http;
        server = std::thread::scope(|scope| {
            for (writer, ledger) in ledgers.iter_mut().enumerate() {
                let stop = &stop;
                scope.spawn(move || write_until_stopped(writer as u64, Client::new(address), ledger, base_ms, stop));
            }
            scope.spawn(|| disturb(Client::new(address), disturber, &stop));
            std::thread::sleep(wait);
            let server = server.kill_and_restart();
            stop.store(true, Ordering::Relaxed);
            server
        });
        check(&server, &ledgers, base_ms, &format!("seed {seed}, kill {kill}"));
    }
    server.flush();
    check(&server, &ledgers, base_ms, &format!("seed {seed}, flushed"));
    server.compact();
    check(&server, &ledgers, base_ms, &format!("seed {seed}, compacted"));
    let acknowledged: usize = ledgers.iter().map(|l| l.acknowledged.len()).sum();
    eprintln!("seed {seed}: {acknowledged} requests acknowledged");
    assert!(acknowledged > 0, "seed {seed}: nothing was acknowledged, so nothing was tested");
}

#[test]
fn acknowledged_means_readable_exactly_once() {
    let seeds = std::env::var("CRASH_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(3);
    for seed in 0..seeds {
        run(seed);
    }
}

#[test]
fn a_torn_log_tail_is_cut_and_the_rest_kept() {
    let server = Server::start();
    let base_ms = now_ms() - 60_000;
    for number in 0..10 {
        server.write(&request(0, number, base_ms));
    }
    let server = server.kill_and_damage(|data_dir| {
        let newest =
            std::fs::read_dir(data_dir.join("wal")).expect("the log's folder").flatten().map(|e| e.path()).max();
        let newest = newest.expect("a log file");
        let mut bytes = std::fs::read(&newest).expect("a readable log");
        // A record header that promises more than is there, as a write that never ended leaves it.
        bytes.extend_from_slice(&[0x40, 0, 0, 0, 1, 2, 3]);
        std::fs::write(&newest, bytes).expect("a writable log");
    });
    assert_eq!(server.sql("SELECT count(*) FROM prometheus.crash_test"), ["50"]);
}
