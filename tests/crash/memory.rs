//! Little memory: new series without end and queries that want everything, within a control group. The kernel has no
//! reason to kill the server, good queries are answered, and nothing that was acknowledged is lost. Then bodies that
//! inflate to a gigabyte. `CRASH_MEMORY_MIB` sets the size of the group.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::group::Group;
use super::hostile;
use super::ledger::Ledger;
use super::{extent, figures};
use crate::harness::remote_write::{HEADERS, HEADERS_V2, snappy};
use crate::harness::{Client, Down, Random, Series, Server, Setup, now_ms, series, wait_for};

const WRITERS: u64 = 2;
/// Series of one request of the churn.
const CHURN: u64 = 200;
/// New series a second that are offered, in all: what the same load brought to the peers.
const CHURN_PER_SECOND: u64 = 10_000;
const CHURNS: u64 = 2;

/// Writes series that nobody has seen before until told to stop. Gives the number of series that were stored.
fn churn(address: SocketAddr, number: u64, stop: &AtomicBool) -> u64 {
    let mut client = Client::new(address);
    let (mut stored, begun) = (0, Instant::now());
    for request in 0.. {
        let due = Duration::from_secs_f64((request * CHURN * CHURNS) as f64 / CHURN_PER_SECOND as f64);
        std::thread::sleep(due.saturating_sub(begun.elapsed()).min(Duration::from_secs(1)));
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let one = |item: u64| {
            let id = format!("{number}-{request}-{item}-0123456789abcdef0123456789abcdef");
            let pod = format!("pod-{}", id.len() as u64 * request);
            series("churn", &[("id", &id), ("namespace", "default"), ("pod", &pod)], &[(now_ms(), item as f64)])
        };
        let all: Vec<Series> = (0..CHURN).map(one).collect();
        // That the server is gone is found at the end.
        let Ok(answer) = client.write(&all) else { break };
        match answer.status {
            204 => stored += CHURN,
            // At the limit of series new ones are refused for good, and under pressure all of them for now.
            400 => {}
            503 => std::thread::sleep(Duration::from_millis(20)),
            _ => panic!("new series got {}: {}", answer.status, answer.text()),
        }
    }
    stored
}

fn ask_hostile(address: SocketAddr, mut random: Random, stop: &AtomicBool) -> (u64, u64) {
    let mut client = Client::new(address);
    let (mut answered, mut refused) = (0, 0);
    while !stop.load(Ordering::Relaxed) {
        match hostile::everything(&mut client, random.number()) {
            Ok(answer) if answer.status == 200 => answered += 1,
            Ok(answer) if matches!(answer.status, 400..=499 | 503 | 504) => refused += 1,
            Ok(answer) => panic!("a hostile query got {}: {}", answer.status, answer.text()),
            // An answer that had begun breaks off when memory is short.
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => refused += 1,
            Err(_) => break,
        }
    }
    (answered, refused)
}

/// Why a query that asks for little was not answered.
fn ask_good(client: &mut Client) -> Result<(), String> {
    match client.try_get("/api/v1/query?query=sum+by+(writer)+(ledger)") {
        Ok(answer) if answer.status == 200 => Ok(()),
        Ok(answer) => Err(format!("{}: {}", answer.status, answer.text())),
        Err(e) => Err(e.to_string()),
    }
}

fn run(seed: u64, mib: u64, seconds: u64) {
    let Some(group) = Group::memory(mib << 20) else { return };
    let mut random = Random(seed);
    let mut ledger = Ledger::new(WRITERS, &mut random);
    let expected = vec![String::new()];
    // A short test does not wait for queries that run for minutes.
    let environment = vec![("THALWEG_QUERY_TIMEOUT".to_owned(), format!("{}s", seconds.clamp(5, 120)))];
    let setup = Setup { wrapper: group.wrapper(), expected, environment, ..Setup::default() };
    let mut server = Down::new(setup).start();
    let address = server.http;
    let (stop, own) = (&AtomicBool::new(false), Random(random.number()));
    let (mut good, mut asked, mut refusals) = (0u64, 0u64, vec![]);
    let (stored, hostile) = std::thread::scope(|scope| {
        let churns: Vec<_> = (0..CHURNS).map(|number| scope.spawn(move || churn(address, number, stop))).collect();
        let asking: Vec<_> = (0..2u64)
            .map(|number| {
                let random = Random(own.0 ^ number);
                scope.spawn(move || ask_hostile(address, random, stop))
            })
            .collect();
        ledger.write_during(address, &mut random, |_| {
            let (begun, mut client) = (Instant::now(), Client::new(address));
            while begun.elapsed() < Duration::from_secs(seconds) && server.ended().is_none() {
                asked += 1;
                match ask_good(&mut client) {
                    Ok(()) => good += 1,
                    Err(why) => refusals.push(why),
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        stop.store(true, Ordering::Relaxed);
        let stored: u64 = churns.into_iter().map(|t| t.join().expect("the churn ended well")).sum();
        let hostile = asking.into_iter().map(|t| t.join().expect("the queries ended well"));
        (stored, hostile.fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1)))
    });
    assert_eq!(group.memory_kills(), 0, "the kernel killed for want of memory: {}", server.log());
    assert_eq!(server.ended(), None, "the server ended: {}", server.log());
    println!("{good} of {asked} good queries were answered");
    // What the load has left in memory goes to files first.
    wait_for("memory to read everything", || ledger.is_readable(&server).then_some(()));
    let findings = ledger.check(&server);
    findings.assert_none(&format!("{mib} MiB, seed {seed}"));
    let peak = hostile::memory(server.pid(), "VmHWM:");
    let mut server = server.kill().start();
    wait_for("memory to read everything again", || ledger.is_readable(&server).then_some(()));
    ledger.check(&server).assert_none(&format!("{mib} MiB, seed {seed}, killed"));
    assert_eq!(server.ended(), None);
    drop(server);
    figures(
        &format!("memory, {mib} MiB"),
        seed,
        &[
            ("seconds", seconds.to_string()),
            ("kills", group.memory_kills().to_string()),
            ("acknowledged samples", findings.acknowledged.to_string()),
            ("open requests", findings.open.to_string()),
            ("new series", stored.to_string()),
            ("good queries", format!("{good} of {asked}")),
            ("hostile answered, refused", format!("{}, {}", hostile.0, hostile.1)),
            ("peak", format!("{} MiB", peak >> 20)),
        ],
    );
    assert!(good * 100 >= asked * 95, "only {good} of {asked} good queries were answered: {refusals:#?}");
}

#[test]
fn little_memory_is_enough() {
    // Without optimisation the program alone takes a quarter of the group that is asked for at full size.
    let mib = extent("CRASH_MEMORY_MIB", 1024);
    for seed in extent("CRASH_FIRST", 0)..extent("CRASH_SEEDS", 1) {
        run(seed, mib, extent("CRASH_SECONDS", 4));
    }
}

/// A snappy block that inflates to so many zeros, 21 times as large as itself.
fn bomb(inflated: usize) -> Vec<u8> {
    let mut out = declared(inflated as u64);
    // A literal of one zero, then copies of 64 bytes from one byte back.
    out.extend_from_slice(&[0, 0]);
    out.extend(std::iter::repeat_n([(63 << 2) | 2, 1, 0], (inflated - 1) / 64).flatten());
    out
}

/// The head of a snappy block: how long it is inflated.
fn declared(mut length: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while length >= 0x80 {
        out.push(length as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
    out
}

/// A request of remote write 2.0 whose series refer to one symbol of 8 MiB, over and over: a byte for each time.
fn references(symbol: u8, series: usize) -> Vec<u8> {
    let mut message = vec![0x22, 0, 0x22];
    let varint = |out: &mut Vec<u8>, length: usize| out.extend(declared(length as u64));
    varint(&mut message, 8 << 20);
    message.resize(message.len() + (8 << 20), symbol);
    let mut one = vec![0x0a];
    varint(&mut one, 512);
    one.resize(one.len() + 512, 1);
    for _ in 0..series {
        message.push(0x2a);
        varint(&mut message, one.len());
        message.extend_from_slice(&one);
    }
    snappy(&message)
}

#[test]
fn bombs_are_refused_before_they_go_off() {
    let server = Server::start();
    let now = now_ms();
    server.write(&[series("m", &[], &[(now, 1.0)])]);
    let (idle, address) = (hostile::memory(server.pid(), "VmRSS:"), server.http);
    let send = |body: &[u8]| {
        let answer = Client::new(address).request("POST", "/api/v1/write", &HEADERS, body).expect("an answer");
        assert!((400..500).contains(&answer.status), "a bomb got {}: {}", answer.status, answer.text());
    };
    let gibibyte = bomb(1 << 30);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| send(&gibibyte));
        }
    });
    for length in [3 << 30, 4 << 30, 1 << 63, u64::MAX] {
        let mut body = declared(length);
        body.extend_from_slice(&[0; 64]);
        std::thread::scope(|scope| {
            for _ in 0..64 {
                scope.spawn(|| send(&body));
            }
        });
    }
    let refer = |body: &[u8]| {
        let answer = Client::new(address).request("POST", "/api/v1/write", &HEADERS_V2, body).expect("an answer");
        assert!(answer.status == 400 && answer.text().contains("1024 are allowed"), "{}", answer.text());
    };
    refer(&references(0xff, 1));
    refer(&references(b'x', 16_000));
    // Just small enough to be let in by its size on the wire.
    send(&bomb(300 << 20));
    let peak = hostile::memory(server.pid(), "VmHWM:");
    let cells = [("idle", format!("{} MiB", idle >> 20)), ("peak", format!("{} MiB", peak >> 20))];
    figures("bombs", 0, &cells);
    assert!(peak <= idle + (256 << 20), "{} MiB at rest became {} MiB", idle >> 20, peak >> 20);
    assert_eq!(server.sql("SELECT value FROM prometheus.m"), ["1"]);
}
