//! The queries that run and those that ran last: what they are, how long they took, what they read and held.
//!
//! Whoever begins a query describes it ([`crate::Query::describe`]); what runs it counts. A query that nobody describes is
//! in no list.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use datafusion::common::Result as DfResult;
use datafusion::execution::memory_pool::{MemoryConsumer, MemoryLimit, MemoryPool, MemoryReservation};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::query::Stop;

/// Queries that are remembered when they are done.
const RECENT: usize = 200;
/// Bytes of a query's text that are kept.
const TEXT_BYTES_MAX: usize = 4096;

/// A query that runs or ran.
#[derive(Debug)]
pub struct Activity {
    /// Its number, from 1 for the server's first.
    pub id: u64,
    /// The language: `sql` or `promql`.
    pub language: &'static str,
    /// Who asked.
    pub user: String,
    /// What was asked; the start of it when it is long.
    pub text: String,
    /// When it had its turn, milliseconds since the epoch.
    pub begun_ms: i64,
    begun: Instant,
    /// None once it has ended: who ends queries looks for those that are still held.
    stop: Mutex<Stop>,
    rows: AtomicU64,
    bytes: AtomicU64,
    held: AtomicI64,
    held_most: AtomicI64,
    end: Mutex<Option<(Duration, &'static str)>>,
}

impl Activity {
    /// Rows that were given so far.
    pub fn rows(&self) -> u64 {
        self.rows.load(Ordering::Relaxed)
    }

    /// Bytes of data files that were read so far.
    pub fn bytes_scanned(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The most memory that its operators held at a time.
    pub fn memory(&self) -> u64 {
        u64::try_from(self.held_most.load(Ordering::Relaxed)).unwrap_or(0)
    }

    /// How long it ran, until now or until its end.
    pub fn duration(&self) -> Duration {
        self.end.lock().map_or_else(|| self.begun.elapsed(), |(duration, _)| duration)
    }

    /// `running`, or how it ended: `ok`, `error`, `timeout`, `canceled` or `damaged`, which is of what was read.
    pub fn state(&self) -> &'static str {
        self.end.lock().map_or("running", |(_, outcome)| outcome)
    }

    pub(crate) fn gave(&self, rows: usize) {
        self.rows.fetch_add(rows as u64, Ordering::Relaxed);
    }

    pub(crate) fn read(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn end(&self, outcome: &'static str) {
        self.end.lock().get_or_insert_with(|| (self.begun.elapsed(), outcome));
    }

    fn hold(&self, bytes: i64) {
        let held = self.held.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.held_most.fetch_max(held, Ordering::Relaxed);
    }
}

/// What describes a query.
#[derive(Debug, Clone)]
pub struct Description {
    /// The language: `sql` or `promql`.
    pub language: &'static str,
    /// Who asks.
    pub user: String,
    /// What is asked.
    pub text: String,
}

/// All queries that were described.
#[derive(Debug, Default)]
pub struct Activities {
    last: AtomicU64,
    running: Mutex<BTreeMap<u64, Arc<Activity>>>,
    recent: Mutex<VecDeque<Arc<Activity>>>,
}

impl Activities {
    pub(crate) fn begin(&self, description: Description, begun_ms: i64, stop: Stop) -> Arc<Activity> {
        let Description { language, user, mut text } = description;
        if text.len() > TEXT_BYTES_MAX {
            let end = (0..=TEXT_BYTES_MAX).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
            text.truncate(end);
            text.push('…');
        }
        let activity = Arc::new(Activity {
            id: self.last.fetch_add(1, Ordering::Relaxed) + 1,
            language,
            user,
            text,
            begun_ms,
            begun: Instant::now(),
            stop: Mutex::new(stop),
            rows: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            held: AtomicI64::new(0),
            held_most: AtomicI64::new(0),
            end: Mutex::new(None),
        });
        self.running.lock().insert(activity.id, activity.clone());
        activity
    }

    pub(crate) fn end(&self, activity: &Arc<Activity>) {
        activity.end("canceled");
        *activity.stop.lock() = Stop::default();
        if self.running.lock().remove(&activity.id).is_some() {
            let mut recent = self.recent.lock();
            recent.truncate(RECENT - 1);
            recent.push_front(activity.clone());
        }
    }

    /// Those that run, the oldest first, then those that ran, the last first.
    pub fn all(&self) -> Vec<Arc<Activity>> {
        let mut all: Vec<Arc<Activity>> = self.running.lock().values().cloned().collect();
        all.extend(self.recent.lock().iter().cloned());
        all
    }

    /// Stops a query that runs, if `allowed` says so of it; whether it did.
    pub fn cancel(&self, id: u64, allowed: impl FnOnce(&Activity) -> bool) -> bool {
        let found = self.running.lock().get(&id).cloned().filter(|a| allowed(a));
        found.is_some_and(|activity| {
            activity.stop.lock().cancel();
            true
        })
    }
}

/// Ends its activity when dropped.
#[derive(Debug)]
pub(crate) struct Underway {
    pub activity: Arc<Activity>,
    pub all: Arc<Activities>,
}

impl Drop for Underway {
    fn drop(&mut self) {
        self.all.end(&self.activity);
    }
}

/// The account of memory of one query: the common one, with a note of what the query holds.
#[derive(Debug)]
pub(crate) struct NotedPool {
    pub common: Arc<dyn MemoryPool>,
    pub activity: Arc<Activity>,
}

impl fmt::Display for NotedPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.common)
    }
}

impl MemoryPool for NotedPool {
    fn name(&self) -> &str {
        self.common.name()
    }

    fn register(&self, consumer: &MemoryConsumer) {
        self.common.register(consumer);
    }

    fn unregister(&self, consumer: &MemoryConsumer) {
        self.common.unregister(consumer);
    }

    fn grow(&self, reservation: &MemoryReservation, additional: usize) {
        self.common.grow(reservation, additional);
        self.activity.hold(additional as i64);
    }

    fn shrink(&self, reservation: &MemoryReservation, shrink: usize) {
        self.common.shrink(reservation, shrink);
        self.activity.hold(-(shrink as i64));
    }

    fn try_grow(&self, reservation: &MemoryReservation, additional: usize) -> DfResult<()> {
        self.common.try_grow(reservation, additional)?;
        self.activity.hold(additional as i64);
        Ok(())
    }

    fn reserved(&self) -> usize {
        self.common.reserved()
    }

    fn memory_limit(&self) -> MemoryLimit {
        self.common.memory_limit()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn queries_are_listed_while_they_run_and_for_a_while_after() {
        let all = Arc::new(Activities::default());
        let describe = |text: &str| Description { language: "sql", user: "me".to_owned(), text: text.to_owned() };
        let underway = |text: &str| {
            let activity = all.begin(describe(text), 7, Stop::within_a_minute());
            Underway { activity, all: all.clone() }
        };
        let first = underway("a");
        let second = underway(&"é".repeat(TEXT_BYTES_MAX));
        second.activity.gave(3);
        second.activity.hold(10);
        second.activity.hold(-4);
        second.activity.end("ok");
        tokio::time::advance(Duration::from_secs(2)).await;
        drop(second);
        let list: Vec<_> = all.all().iter().map(|a| (a.id, a.state(), a.rows(), a.memory(), a.duration())).collect();
        let seconds = Duration::from_secs;
        assert_eq!(list, [(1, "running", 0, 0, seconds(2)), (2, "ok", 3, 10, seconds(0))]);
        assert!(all.all()[1].text.len() < TEXT_BYTES_MAX + 4);
        assert!(!all.cancel(2, |_| true), "it is done");
        assert!(!all.cancel(1, |a| a.user == "another"));
        assert!(all.cancel(1, |a| a.user == "me"));
        assert!(first.activity.stop.lock().check().is_err());
        drop(first);
        assert_eq!(all.all()[0].state(), "canceled");
        for _ in 0..RECENT * 2 {
            drop(underway("x"));
        }
        assert_eq!(all.all().len(), RECENT);
    }
}
