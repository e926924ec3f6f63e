//! What durability costs: how long an acknowledgement takes at a steady rate, and how soon a server that was killed is
//! back. `CRASH_RATE` is samples a second, `CRASH_SAMPLES` what the log holds; only a release build has figures that
//! mean something.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::overload::percentile;
use super::{extent, figures};
use crate::harness::remote_write::{HEADERS, message};
use crate::harness::{Client, Series, Server, now_ms, series};

/// Samples of a request.
const REQUEST: u64 = 1_000;

/// A snappy block that says everything literally: compressing would take longer than the server does.
fn literal(message: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(message.len() + message.len() / 1000 + 16);
    let mut length = message.len();
    while length >= 0x80 {
        out.push(length as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
    for chunk in message.chunks(1 << 16) {
        out.push(61 << 2);
        out.extend_from_slice(&((chunk.len() - 1) as u16).to_le_bytes());
        out.extend_from_slice(chunk);
    }
    out
}

/// One request: so many samples in a row for each of its series.
fn body(number: u64, series_count: u64, base_ms: i64) -> Vec<u8> {
    let each = REQUEST / series_count;
    let one = |item: u64| {
        let labels =
            [("instance", format!("host-{}:9100", item % 50)), ("item", item.to_string()), ("job", "node".to_owned())];
        let labels: Vec<(&str, &str)> = labels.iter().map(|(k, v)| (*k, v.as_str())).collect();
        // As many digits as measurements have: a log of regular values would be read in no time.
        let value = |i: u64| ((number * 131 + i * 7919 + item * 104_729) % 100_003) as f64 / 100.0;
        let sample = |i: u64| (base_ms + ((number * each + i) * 100) as i64, value(i));
        series("steady", &labels, &(0..each).map(sample).collect::<Vec<_>>())
    };
    let all: Vec<Series> = (0..series_count).map(one).collect();
    literal(&message(&all))
}

/// Sends bodies as fast as `clients` connections can, or at a steady rate. Gives how long each answer took, counted
/// from when it should have been sent.
fn send(server: &Server, bodies: &[Vec<u8>], clients: u64, per_second: Option<f64>) -> Vec<Duration> {
    let (next, begun) = (&AtomicU64::new(0), Instant::now());
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..clients)
            .map(|_| {
                scope.spawn(move || {
                    let (mut client, mut took) = (Client::new(server.http), Vec::new());
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        let Some(body) = bodies.get(number as usize) else { return took };
                        let due = per_second.map(|rate| begun + Duration::from_secs_f64(number as f64 / rate));
                        let due = due.unwrap_or_else(Instant::now);
                        std::thread::sleep(due.saturating_duration_since(Instant::now()));
                        let answer = client.request("POST", "/api/v1/write", &HEADERS, body).expect("an answer");
                        assert_eq!(answer.status, 204, "{}", answer.text());
                        took.push(due.elapsed());
                    }
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("the client ended well")).collect()
    })
}

#[test]
fn acknowledgements_come_soon() {
    let (rate, seconds) = (extent("CRASH_RATE", 5_000), extent("CRASH_SECONDS", 1));
    let requests = rate * seconds / REQUEST;
    let base_ms = now_ms() - 3_600_000;
    let bodies: Vec<Vec<u8>> = (0..requests).map(|number| body(number, REQUEST, base_ms)).collect();
    let server = Server::start();
    // Series that are new once are no part of a steady load.
    send(&server, &bodies[..1], 1, None);
    let mut took = send(&server, &bodies, 16, Some(rate as f64 / REQUEST as f64));
    let cells = [
        ("samples/s", rate.to_string()),
        ("requests", requests.to_string()),
        (
            "p50, p99, most",
            [50, 99, 100].map(|p| format!("{:.1} ms", percentile(&mut took, p).as_secs_f64() * 1e3)).join(", "),
        ),
    ];
    figures("acknowledgement", 0, &cells);
    assert_eq!(server.sql("SELECT count(*) FROM prometheus.steady"), [(requests * REQUEST).to_string()]);
}

#[test]
fn a_long_log_is_read_soon() {
    let samples = extent("CRASH_SAMPLES", 100_000);
    let base_ms = now_ms() - 30 * 86_400_000;
    let bodies: Vec<Vec<u8>> = (0..samples / REQUEST).map(|number| body(number, 100, base_ms)).collect();
    // All of it stays in memory and in the log.
    let server = Server::start();
    send(&server, &bodies, 4, None);
    let log = std::fs::read_dir(server.data_dir().join("wal")).expect("the log's folder").flatten();
    let bytes: u64 = log.map(|entry| entry.metadata().expect("a file").len()).sum();
    let server = server.kill().start();
    let text = server.log();
    let replayed = text.lines().filter(|l| l.contains("log replayed")).find_map(|l| l.split("rows=").nth(1));
    let replayed = replayed.and_then(|rest| rest.split(' ').next()).unwrap_or("0").to_owned();
    let cells = [
        ("samples", samples.to_string()),
        ("of them in the log", replayed),
        ("log", format!("{} MiB", bytes >> 20)),
        ("ready after", format!("{:.2} s", server.ready_after.as_secs_f64())),
    ];
    figures("restart", 0, &cells);
    assert_eq!(server.sql("SELECT count(*) FROM prometheus.steady"), [samples.to_string()]);
}
