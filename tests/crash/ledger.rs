//! Who was told what: writers that record every answer, and the comparison with what the server holds.
//!
//! Each writer owns its series and numbers its requests. A request has one sample for each of its series, all at one
//! time, each with a value that says where it came from; so a sample that is lost, doubled, moved or changed is seen, and
//! so is half a request.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::harness::{Client, Random, Response, Series, Server, now_ms, series, wait_for};

/// Series of a writer at a time, which is the samples of a request.
pub const WIDTH: u64 = 5;
/// Requests before a writer goes on with new series.
const GENERATION: u64 = 50;
/// Milliseconds between the requests of a writer.
const STEP_MS: i64 = 10;

/// What the writer knows of one of its requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Acknowledged,
    /// Answered with 503: to be sent again.
    Refused,
    /// Sent, but no answer came.
    Unknown,
    /// Acknowledged, and so was a delete of it.
    Deleted,
    /// Acknowledged; of its delete no good answer came.
    MaybeDeleted,
}

/// One client's requests.
#[derive(Debug)]
pub struct Writer {
    number: u64,
    base_ms: i64,
    random: Random,
    requests: Vec<State>,
    /// Answers that no request of ours may get.
    faults: Vec<String>,
    /// How long acknowledgements took.
    pub acknowledged_after: Vec<Duration>,
    /// How long refusals took.
    pub refused_after: Vec<Duration>,
}

/// All writers.
#[derive(Debug)]
pub struct Ledger {
    base_ms: i64,
    /// By number.
    pub writers: Vec<Writer>,
    /// Whether writers delete some of what they wrote, and somebody asks for flushes and compactions.
    pub upkeep: bool,
    /// Answers to flushes and compactions that must not be.
    faults: Vec<String>,
}

/// How the server's rows and the ledger differ, counted in requests.
#[derive(Debug, Default)]
pub struct Findings {
    /// Samples that were acknowledged.
    pub acknowledged: u64,
    /// Answered 503 or not at all.
    pub open: u64,
    /// Acknowledged, and not there or not whole.
    pub lost: Vec<String>,
    /// Some of its samples are there, others aren't.
    pub half: Vec<String>,
    /// Rows that are there twice, with another value, never written or deleted; answers that must not be.
    pub wrong: Vec<String>,
}

impl Findings {
    /// Whether all is as the writers know it.
    pub fn none(&self) -> bool {
        self.lost.is_empty() && self.half.is_empty() && self.wrong.is_empty()
    }

    /// Fails when anything differs.
    pub fn assert_none(&self, context: &str) {
        let some = |all: &[String]| all.iter().take(8).cloned().collect::<Vec<_>>().join("\n  ");
        assert!(
            self.none(),
            "{context}: of {} acknowledged samples {} requests are lost:\n  {}\n{} are there by half:\n  {}\n{} are wrong:\n  {}",
            self.acknowledged,
            self.lost.len(),
            some(&self.lost),
            self.half.len(),
            some(&self.half),
            self.wrong.len(),
            some(&self.wrong)
        );
        assert!(self.acknowledged > 0, "{context}: nothing was acknowledged, so nothing was tested");
    }
}

fn value(writer: u64, item: u64, request: u64) -> f64 {
    // Not a whole number, so that a value that lands in another row is seen.
    ((writer << 42) + (item << 32) + request) as f64 + 0.125
}

impl Writer {
    fn ts(&self, request: u64) -> i64 {
        self.base_ms + request as i64 * STEP_MS
    }

    /// The request with this number; new series now and then.
    fn request(&self, number: u64) -> Vec<Series> {
        let (writer, generation) = (self.number.to_string(), (number / GENERATION).to_string());
        let one = |item: u64| {
            let labels = [("generation", generation.as_str()), ("item", &item.to_string()), ("writer", &writer)];
            series("ledger", &labels, &[(self.ts(number), value(self.number, item, number))])
        };
        (0..WIDTH).map(one).collect()
    }

    /// Half of the writers speak remote write 1.0, the others 2.0.
    fn send(&mut self, client: &mut Client, number: u64) -> State {
        let body = self.request(number);
        let begun = Instant::now();
        let answer = if self.number.is_multiple_of(2) { client.write(&body) } else { client.write_v2(&body) };
        let state = self.judge(answer, "a write");
        match state {
            State::Acknowledged => self.acknowledged_after.push(begun.elapsed()),
            State::Refused => self.refused_after.push(begun.elapsed()),
            _ => {}
        }
        state
    }

    /// What an answer says. Anything but success and a refusal that clients retry is a fault.
    fn judge(&mut self, answer: io::Result<Response>, what: &str) -> State {
        match answer {
            Ok(answer) if matches!(answer.status, 200 | 204) => State::Acknowledged,
            Ok(answer) if answer.status == 503 && answer.header("retry-after").is_some() => State::Refused,
            Ok(answer) => {
                self.faults.push(format!("{what} of writer {} got {}: {}", self.number, answer.status, answer.text()));
                State::Refused
            }
            Err(_) => State::Unknown,
        }
    }

    /// Sends again a request that is open, or, as a client that missed the answer does, one that was acknowledged.
    fn resend(&mut self, client: &mut Client, open: bool) {
        let wanted = |state: State| match state {
            State::Refused | State::Unknown => open,
            State::Acknowledged => !open,
            State::Deleted | State::MaybeDeleted => false,
        };
        let candidates: Vec<usize> = (0..self.requests.len()).filter(|n| wanted(self.requests[*n])).collect();
        if candidates.is_empty() {
            return;
        }
        let number = candidates[self.random.below(candidates.len() as u64) as usize];
        let state = self.send(client, number as u64);
        if state == State::Acknowledged {
            self.requests[number] = state;
        }
    }

    /// Deletes a few acknowledged requests that follow each other.
    fn delete(&mut self, client: &mut Client) {
        let length = self.requests.len() as u64;
        let first = self.random.below(length.max(1));
        let last = (first + self.random.below(5)).min(length.saturating_sub(1));
        let range = first as usize..(last + 1).min(length) as usize;
        if range.is_empty() || self.requests[range.clone()].iter().any(|s| *s != State::Acknowledged) {
            return;
        }
        let seconds = |ms: i64| format!("{}.{:03}", ms / 1000, ms % 1000);
        let path = format!(
            "/api/v1/admin/tsdb/delete_series?match[]=ledger%7Bwriter%3D%22{}%22%7D&start={}&end={}",
            self.number,
            seconds(self.ts(first)),
            seconds(self.ts(last))
        );
        let answer = client.request("POST", &path, &[], b"");
        let state = match self.judge(answer, "a delete") {
            State::Acknowledged => State::Deleted,
            _ => State::MaybeDeleted,
        };
        self.requests[range].fill(state);
    }

    fn run(&mut self, mut client: Client, deletes: bool, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            match self.random.below(20) {
                0 => self.resend(&mut client, false),
                1 | 2 => self.resend(&mut client, true),
                3 if deletes => self.delete(&mut client),
                _ => {
                    let state = self.send(&mut client, self.requests.len() as u64);
                    self.requests.push(state);
                    if state != State::Acknowledged {
                        std::thread::sleep(Duration::from_millis(20));
                    }
                }
            }
        }
    }
}

impl Ledger {
    /// Writers that have written nothing.
    pub fn new(writers: u64, random: &mut Random) -> Self {
        let base_ms = now_ms() - 3_600_000;
        let writer = |number| Writer {
            number,
            base_ms,
            random: Random(random.number()),
            requests: Vec::new(),
            faults: Vec::new(),
            acknowledged_after: Vec::new(),
            refused_after: Vec::new(),
        };
        Self { base_ms, writers: (0..writers).map(writer).collect(), upkeep: true, faults: Vec::new() }
    }

    /// Writes with all writers at once, and asks for flushes and compactions, while `during` runs. It may set the flag
    /// to stop them before it ends.
    pub fn write_during<T>(
        &mut self,
        address: SocketAddr,
        random: &mut Random,
        during: impl FnOnce(&AtomicBool) -> T,
    ) -> T {
        let (stop, deletes, disturber) = (&AtomicBool::new(false), self.upkeep, Random(random.number()));
        std::thread::scope(|scope| {
            for writer in &mut self.writers {
                scope.spawn(move || writer.run(Client::new(address), deletes, stop));
            }
            let faults = &mut self.faults;
            if self.upkeep {
                scope.spawn(move || disturb(Client::new(address), disturber, faults, stop));
            }
            // However `during` ends, the threads do, or the scope would wait for ever.
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| during(stop)));
            stop.store(true, Ordering::Relaxed);
            ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Writes `requests` with every writer, one after another; all must be acknowledged.
    pub fn write(&mut self, server: &Server, requests: u64) {
        let mut client = server.client();
        for writer in &mut self.writers {
            for _ in 0..requests {
                let state = writer.send(&mut client, writer.requests.len() as u64);
                writer.requests.push(state);
                assert_eq!(state, State::Acknowledged, "{:?}", writer.faults);
            }
        }
    }

    /// Sends what is open until all of it is acknowledged, as clients that retry do.
    pub fn settle(&mut self, server: &Server) {
        let mut client = server.client();
        for writer in &mut self.writers {
            for number in 0..writer.requests.len() {
                if matches!(writer.requests[number], State::Refused | State::Unknown) {
                    wait_for("an acknowledgement", || {
                        (writer.send(&mut client, number as u64) == State::Acknowledged).then_some(())
                    });
                    writer.requests[number] = State::Acknowledged;
                }
            }
        }
    }

    /// Samples that are acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        let requests = self.writers.iter().flat_map(|w| &w.requests);
        requests.filter(|s| **s == State::Acknowledged).count() as u64 * WIDTH
    }

    /// Requests that got no answer.
    pub fn unanswered(&self) -> usize {
        self.writers.iter().flat_map(|w| &w.requests).filter(|s| **s == State::Unknown).count()
    }

    /// Whether everything can be read now: it may be refused when memory is short, which is printed.
    pub fn is_readable(&self, server: &Server) -> bool {
        let begun = Instant::now();
        let rows = read(&mut server.client());
        rows.inspect_err(|why| println!("not readable after {:?}: {why:.300}", begun.elapsed())).is_ok()
    }

    /// Reads everything back and compares; the same totals must come from PromQL.
    pub fn check(&self, server: &Server) -> Findings {
        let rows = read(&mut server.client()).unwrap_or_else(|answer| panic!("cannot read: {answer}"));
        let findings = self.compare(&rows);
        let mut client = server.client();
        let end = self.base_ms / 1000 + 7000;
        let query = "sum by (writer) (count_over_time(ledger[2h]))";
        let answer = client.form("/api/v1/query", &[("query", query), ("time", &end.to_string())]);
        assert_eq!(answer.status, 200, "{query}: {}", answer.text());
        let mut counted = HashMap::new();
        for element in answer.json()["data"]["result"].as_array().expect("a vector") {
            let number =
                |text: &serde_json::Value| text.as_str().and_then(|t| t.parse::<u64>().ok()).expect("a number");
            counted.insert(number(&element["metric"]["writer"]), number(&element["value"][1]));
        }
        let mut expected: HashMap<u64, u64> = HashMap::new();
        rows.iter().for_each(|row| *expected.entry(row.writer).or_default() += 1);
        assert_eq!(counted, expected, "PromQL and SQL count different rows by writer");
        findings
    }

    /// Compares rows with what writers know.
    pub fn compare(&self, rows: &[Row]) -> Findings {
        let mut findings = Findings { wrong: self.faults.clone(), ..Findings::default() };
        let mut found: HashMap<(u64, u64), [u8; WIDTH as usize]> = HashMap::new();
        for row in rows {
            let request = (row.ts - self.base_ms).div_euclid(STEP_MS) as u64;
            let known = row.item < WIDTH
                && (row.ts - self.base_ms) % STEP_MS == 0
                && self.writers.get(row.writer as usize).is_some_and(|w| request < w.requests.len() as u64);
            if !known {
                findings.wrong.push(format!("nobody wrote {row:?}"));
            } else if row.value != value(row.writer, row.item, request) {
                findings.wrong.push(format!("{row:?} should be {}", value(row.writer, row.item, request)));
            } else {
                let times = &mut found.entry((row.writer, request)).or_default()[row.item as usize];
                *times = times.saturating_add(1);
            }
        }
        for writer in &self.writers {
            findings.wrong.extend(writer.faults.iter().cloned());
            for (number, state) in writer.requests.iter().enumerate() {
                let name = || format!("request {number} of writer {}, {state:?}", writer.number);
                let times = found.get(&(writer.number, number as u64)).copied().unwrap_or_default();
                let (there, whole) = (times.iter().any(|t| *t > 0), times.iter().all(|t| *t > 0));
                if times.iter().any(|t| *t > 1) {
                    findings.wrong.push(format!("{} is there more than once: {times:?}", name()));
                }
                if there && !whole {
                    findings.half.push(format!("{}: {times:?}", name()));
                }
                match state {
                    State::Acknowledged if !whole => findings.lost.push(name()),
                    State::Deleted if there => findings.wrong.push(format!("{} is still there", name())),
                    _ => {}
                }
                match state {
                    State::Refused | State::Unknown => findings.open += 1,
                    _ => findings.acknowledged += WIDTH,
                }
            }
        }
        findings
    }
}

/// One stored sample.
#[derive(Debug)]
pub struct Row {
    writer: u64,
    item: u64,
    ts: i64,
    value: f64,
}

/// All stored samples of all ledgers, or what the server said instead.
pub fn read(client: &mut Client) -> Result<Vec<Row>, String> {
    let query = "SELECT writer, item, CAST(extract(epoch FROM ts) * 1000 AS bigint), value FROM prometheus.ledger";
    let headers = [("Content-Type", "text/plain")];
    let answer = client
        .request("POST", "/api/v1/sql?format=csv", &headers, query.as_bytes())
        .map_err(|e| format!("no answer: {e}"))?;
    if answer.status != 200 {
        return Err(format!("{} {}", answer.status, answer.text()));
    }
    let parse = |line: &str| {
        let mut cells = line.split(',');
        Some(Row {
            writer: cells.next()?.parse().ok()?,
            item: cells.next()?.parse().ok()?,
            ts: cells.next()?.parse().ok()?,
            value: cells.next()?.parse().ok()?,
        })
    };
    answer.text().lines().skip(1).map(|line| parse(line).ok_or_else(|| format!("an odd row: {line:?}"))).collect()
}

fn disturb(mut client: Client, mut random: Random, faults: &mut Vec<String>, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(random.below(150)));
        let path = if random.below(3) == 0 { "/api/v1/admin/compact" } else { "/api/v1/admin/flush" };
        match client.request("POST", path, &[], b"") {
            Ok(answer) if !matches!(answer.status, 204 | 503) => {
                faults.push(format!("{path} got {}: {}", answer.status, answer.text()));
            }
            // A server that is gone may come back.
            _ => {}
        }
    }
}
