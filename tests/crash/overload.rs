//! More than it can take: many clients on a sliver of a processor, and clients that keep a connection without using it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::group::Group;
use super::ledger::Ledger;
use super::{extent, figures};
use crate::harness::{Down, Random, Server, Setup, now_ms, series};

/// Of one processor.
const PERCENT: u64 = 5;
const CLIENTS: u64 = 64;
/// Every client has an answer by then. The server aims at a second; a sliver of a processor gives it no time for long.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// Most memory of the server.
const RESIDENT_MAX: u64 = 512 << 20;

/// The value that so many hundredths of all are at most as large as.
pub fn percentile(values: &mut [Duration], percent: usize) -> Duration {
    values.sort_unstable();
    values.get((values.len() * percent / 100).min(values.len().saturating_sub(1))).copied().unwrap_or_default()
}

/// Acknowledged samples a second of so many clients, and how long answers took.
fn load(server: &Server, clients: u64, duration: Duration, random: &mut Random) -> (f64, Ledger) {
    let mut ledger = Ledger::new(clients, random);
    ledger.upkeep = false;
    let begun = Instant::now();
    ledger.write_during(server.http, random, |_| std::thread::sleep(duration));
    (ledger.acknowledged() as f64 / begun.elapsed().as_secs_f64(), ledger)
}

fn run(seed: u64, seconds: u64) {
    let Some(group) = Group::processor() else { return };
    let mut random = Random(seed);
    let duration = Duration::from_secs(seconds);
    let expected = vec![String::new()];
    let down = Down::new(Setup { wrapper: group.wrapper(), expected, ..Setup::default() });
    // What it can do is measured with a database of its own, or both would write the same series.
    let calm = down.clone().start();
    group.limit_processor(PERCENT);
    let (capacity, _) = load(&calm, 4, duration, &mut random);
    drop(calm);
    group.limit_processor(100);
    let server =
        Down::new(Setup { wrapper: group.wrapper(), expected: vec![String::new()], ..Setup::default() }).start();
    group.limit_processor(PERCENT);
    let (goodput, mut ledger) = load(&server, CLIENTS, duration, &mut random);
    group.limit_processor(200);
    let unanswered = ledger.unanswered();
    let collect = |of: fn(&super::ledger::Writer) -> &Vec<Duration>| -> Vec<Duration> {
        ledger.writers.iter().flat_map(of).copied().collect()
    };
    let (mut acknowledged, mut refused) = (collect(|w| &w.acknowledged_after), collect(|w| &w.refused_after));
    let seconds_of = |d: Duration| format!("{:.2} s", d.as_secs_f64());
    let cells = [
        ("clients", CLIENTS.to_string()),
        ("without an answer", unanswered.to_string()),
        ("acknowledged", acknowledged.len().to_string()),
        ("after p50, p99, most", [50, 99, 100].map(|p| seconds_of(percentile(&mut acknowledged, p))).join(", ")),
        ("refused", refused.len().to_string()),
        ("after p50, p99, most", [50, 99, 100].map(|p| seconds_of(percentile(&mut refused, p))).join(", ")),
        ("goodput", format!("{goodput:.0} of {capacity:.0} samples/s")),
    ];
    figures("overload", seed, &cells);
    let slowest = acknowledged.iter().chain(&refused).max().copied().unwrap_or_default();
    let peak = super::hostile::memory(server.pid(), "VmHWM:");
    ledger.settle(&server);
    ledger.check(&server).assert_none(&format!("overload, seed {seed}"));
    assert_eq!(unanswered, 0, "requests without an answer");
    assert!(slowest <= ANSWER_WITHIN, "the slowest answer took {slowest:?}");
    assert!(peak <= RESIDENT_MAX, "the server held {} MiB", peak >> 20);
    assert!(goodput >= 0.8 * capacity, "{goodput:.0} of {capacity:.0} samples/s were stored");
}

#[test]
fn too_many_clients_are_told_so() {
    for seed in 0..extent("CRASH_SEEDS", 1) {
        run(seed, extent("CRASH_SECONDS", 4));
    }
}

/// How a slow client holds its connection.
#[derive(Debug, Clone, Copy)]
enum Slowness {
    /// Says nothing at all.
    Silent,
    /// Sends its request's head byte by byte, without ever ending it.
    Head,
    /// Promises a body and sends none of it.
    NoBody,
    /// Sends its body byte by byte.
    Body,
}

struct SlowClient {
    slowness: Slowness,
    stream: TcpStream,
    open: bool,
}

impl SlowClient {
    fn connect(address: SocketAddr, slowness: Slowness) -> Self {
        let mut stream = TcpStream::connect(address).expect("a connection");
        let head: &[u8] = match slowness {
            Slowness::Silent => b"",
            Slowness::Head => b"POST /api/v1/write HTTP/1.1\r\nHost: h\r\nX-Slow: ",
            Slowness::NoBody | Slowness::Body => {
                b"POST /api/v1/write HTTP/1.1\r\nHost: h\r\nContent-Type: application/x-protobuf\r\n\
                  Content-Encoding: snappy\r\nContent-Length: 100000\r\n\r\n"
            }
        };
        stream.write_all(head).expect("a new connection takes a few bytes");
        stream.set_nonblocking(true).expect("a socket");
        Self { slowness, stream, open: true }
    }

    /// Sends its next byte if it sends any; notices when the server has closed.
    fn step(&mut self) {
        if matches!(self.slowness, Slowness::Head | Slowness::Body) {
            self.open &= self.stream.write(b"a").is_ok();
        }
        let mut answer = [0; 1024];
        self.open &= match self.stream.read(&mut answer) {
            Ok(read) => read > 0,
            Err(e) => e.kind() == std::io::ErrorKind::WouldBlock,
        };
    }
}

#[test]
fn slow_clients_hold_nobody_up() {
    let server = Server::start();
    let (count, seconds) = (extent("CRASH_CLIENTS", 100), extent("CRASH_SECONDS", 2));
    let kinds = [Slowness::Silent, Slowness::Head, Slowness::NoBody, Slowness::Body];
    let mut slow: Vec<SlowClient> =
        (0..count).map(|i| SlowClient::connect(server.http, kinds[i as usize % kinds.len()])).collect();
    let (begun, mut answers, mut client, mut number) = (Instant::now(), Vec::new(), server.client(), 0);
    let mut second = 0;
    while begun.elapsed() < Duration::from_secs(seconds) {
        let asked = Instant::now();
        let answer = client.write(&[series("m", &[], &[(now_ms(), f64::from(number))])]).expect("an answer");
        assert_eq!(answer.status, 204, "{}", answer.text());
        number += 1;
        answers.push(asked.elapsed());
        if begun.elapsed().as_secs() > second {
            second += 1;
            slow.iter_mut().filter(|s| s.open).for_each(SlowClient::step);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let open: Vec<Slowness> = slow.iter().filter(|s| s.open).map(|s| s.slowness).collect();
    let cells = [
        ("clients", count.to_string()),
        ("seconds", seconds.to_string()),
        ("still connected", open.len().to_string()),
        ("other writes p99", format!("{:.0} ms", percentile(&mut answers, 99).as_secs_f64() * 1e3)),
    ];
    figures("slow clients", 0, &cells);
    // The longest of the server's limits for a request that does not go on is half a minute.
    let longest = 60;
    assert!(seconds < longest || open.is_empty(), "after {seconds} s still connected: {open:?}");
}
