//! The committer: one task that turns queued requests into durable, visible rows.
//!
//! It takes all that waits, publishes the new tag sets, encodes one log record per request, writes and syncs them
//! together, applies them to the memtables in the order of the log, and answers. There is no timer: a sync begins as
//! soon as the one before has ended. The log's lock is held for a whole group, so whoever takes it (to freeze a
//! memtable, to trim) sees every record either applied or not yet written. It runs on a thread of its own, which may
//! block, or as a task beside all else when [`crate::Settings::own_threads`] is off.

use std::collections::{HashSet, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use arrow::array::AsArray;
use arrow::compute::max;
use arrow::datatypes::UInt32Type;
use catalog::encoder::EncodedSet;
use catalog::tables::Role;
use catalog::{Error, Ordinal, Result};
use futures::FutureExt;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

use crate::engine::Inner;
use crate::memory::{Kind, Memory, Reservation};
use crate::telemetry::TableLabel;
use crate::version::Version;
use crate::wal::Wal;
use crate::{LogStore, MetricMetadata, Write};

/// Most requests that wait.
const QUEUE_REQUESTS_MAX: usize = 4096;
/// A group takes no further request beyond this, so that the first one does not wait for long.
const GROUP_BYTES: usize = 32 << 20;
/// How long to wait for whether another server has the database. A commit may keep that from being asked for as long as
/// the store can't be reached.
const CONFIRM_MAX: Duration = Duration::from_secs(10);
/// How long to wait for requests before looking after the rest.
const IDLE: Duration = Duration::from_secs(5);
/// How often idle tag sets are looked for.
const RETIRE_INTERVAL_MS: i64 = 60_000;
/// Idle for so many seconds, a tag set leaves the memory.
const RETIRE_SECONDS: u32 = 7200;
/// How often that is done while new sets find little room, whatever has been idle for longest leaving then.
const PRESSED_INTERVAL_MS: i64 = 5_000;

/// Why nothing is written: the database stops, or did a piece of work that it can't go on from.
const STOPPING: &str = "the database is stopping";
pub(crate) const BROKEN: &str =
    "a group of writes ended in a panic, which is a bug; a restart reads the log and takes writes again";

/// Requests on their way to the log.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    state: Mutex<State>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Why no further request is taken.
    closed: Option<&'static str>,
}

#[derive(Debug)]
struct Job {
    write: Write,
    bytes: Reservation,
    ack: oneshot::Sender<Result<()>>,
}

/// A job whose record is encoded.
struct Staged {
    job: Job,
    ordinals: Vec<Ordinal>,
    metadata: Vec<MetricMetadata>,
    position: u64,
}

impl Queue {
    /// Queues a request. The receiver gets the answer once it is durable and visible.
    ///
    /// # Errors
    /// `Unavailable` when there is no memory for it or too many requests wait, or after [`Queue::close`].
    pub(crate) fn push(&self, write: Write, memory: &Memory) -> Result<oneshot::Receiver<Result<()>>> {
        let (size, mut bytes) = (bytes_of(&write), memory.reserve(Kind::Queue));
        let (ack, answer) = oneshot::channel();
        let mut state = self.state.lock();
        if let Some(why) = state.closed {
            return Err(Error::unavailable(why));
        }
        if state.jobs.len() >= QUEUE_REQUESTS_MAX {
            return Err(Error::unavailable(format!(
                "{} requests wait for the log; at most {QUEUE_REQUESTS_MAX} may",
                state.jobs.len(),
            )));
        }
        // One request is always let in, however large.
        if memory.held(Kind::Queue) == 0 {
            bytes.force(size);
        } else {
            bytes.grow(size)?;
        }
        state.jobs.push_back(Job { write, bytes, ack });
        drop(state);
        self.wake.notify_one();
        Ok(answer)
    }

    /// Refuses further requests; those queued are still stored.
    pub(crate) fn close(&self) {
        self.state.lock().closed.get_or_insert(STOPPING);
        self.wake.notify_one();
    }

    /// Refuses further requests and those queued.
    pub(crate) fn refuse(&self, why: &'static str) {
        let jobs = {
            let mut state = self.state.lock();
            state.closed = Some(why);
            std::mem::take(&mut state.jobs)
        };
        jobs.into_iter().for_each(|job| answer(job, Err(Error::unavailable(why))));
        self.wake.notify_one();
    }

    /// Refuses those queued as well once no further request is taken, since there is no time to try each.
    fn refuse_if_closed(&self) {
        let closed = self.state.lock().closed;
        if let Some(why) = closed {
            self.refuse(why);
        }
    }

    /// Why no further request is taken, if none is.
    pub(crate) fn closed(&self) -> Option<&'static str> {
        self.state.lock().closed
    }

    /// Requests that wait.
    pub(crate) fn len(&self) -> usize {
        self.state.lock().jobs.len()
    }

    fn is_idle(&self) -> bool {
        let state = self.state.lock();
        state.jobs.is_empty() && state.closed.is_none()
    }

    /// The next group, empty after some seconds without any; `None` once closed and empty.
    async fn take(&self) -> Option<Vec<Job>> {
        if self.is_idle() {
            // A push or the end since the look is remembered, and ends the wait at once.
            let _ = tokio::time::timeout(IDLE, self.wake.notified()).await;
        }
        let mut state = self.state.lock();
        if state.jobs.is_empty() && state.closed.is_some() {
            return None;
        }
        let mut group = vec![];
        let mut bytes = 0;
        while bytes < GROUP_BYTES
            && let Some(job) = state.jobs.pop_front()
        {
            bytes += job.bytes.bytes();
            group.push(job);
        }
        Some(group)
    }
}

fn bytes_of(write: &Write) -> usize {
    let rows: usize = write.batches.iter().map(|b| b.rows.get_array_memory_size()).sum();
    let sets: usize = write
        .tags
        .sets
        .iter()
        .map(|s| match s {
            EncodedSet::New { series, .. } => series.tags.as_bytes().len() + 128,
            _ => 8,
        })
        .sum();
    rows + sets + write.metadata.iter().map(crate::metadata::bytes_of).sum::<usize>()
}

/// Checks that a request's rows are in their tables' schemas and refer to its tag sets.
///
/// # Errors
/// `Internal`: only a bug of a receiver makes such a request.
pub(crate) fn check(write: &Write) -> Result<()> {
    for batch in &write.batches {
        let (table, rows) = (&batch.table, &batch.rows);
        if !Arc::ptr_eq(rows.schema_ref(), table.arrow()) && rows.schema_ref().fields() != table.arrow().fields() {
            return Err(Error::internal(format!("rows for table {} are not in its schema", table.name)));
        }
        for (i, column) in table.columns.iter().enumerate().filter(|(_, c)| c.role == Role::Tag) {
            let last = max(rows.column(i).as_primitive::<UInt32Type>());
            if last.is_some_and(|r| r as usize >= write.tags.sets.len()) {
                return Err(Error::internal(format!(
                    "column {} of table {} refers to tag set {} of {}",
                    column.name,
                    table.name,
                    last.unwrap_or(0),
                    write.tags.sets.len()
                )));
            }
        }
    }
    Ok(())
}

/// Commits groups; returns once the queue is closed and empty. After a panic, which may have left the log and memtables
/// different, nothing is written any more: all that was acknowledged is in the log.
pub(crate) async fn run(inner: Arc<Inner>) {
    if AssertUnwindSafe(groups(&inner)).catch_unwind().await.is_err() {
        inner.metrics.wal_failures.inc();
        tracing::error!("{BROKEN}");
        inner.queue.refuse(BROKEN);
    }
}

async fn groups(inner: &Inner) {
    let mut retired_ms = inner.now_ms();
    while let Some(jobs) = inner.queue.take().await {
        if !jobs.is_empty() {
            commit(inner, jobs).await;
        }
        let now_ms = inner.now_ms();
        let interval_ms = if inner.registry.is_pressed() { PRESSED_INTERVAL_MS } else { RETIRE_INTERVAL_MS };
        // A clock that was set back must not put it off for longer.
        if !(retired_ms..retired_ms.saturating_add(interval_ms)).contains(&now_ms) {
            retired_ms = now_ms;
            retire(inner, second(now_ms)).await;
        }
    }
}

async fn commit(inner: &Inner, jobs: Vec<Job>) {
    inner.metrics.group.observe(jobs.len() as f64);
    if let Err(e) = inner.check_disk() {
        // What room there is belongs to those who make more.
        return jobs.into_iter().for_each(|job| answer(job, Err(Error::new(e.kind(), e.message()))));
    }
    let now_ms = inner.now_ms();
    let mut log = inner.log.lock().await;
    log.in_group = true;
    let version = inner.version();
    let (mut staged, mut known) = (Vec::with_capacity(jobs.len()), Vec::new());
    for job in jobs {
        match stage(inner, &mut log, &job.write, second(now_ms)) {
            // Who has a log in a bucket may have lost it, which only a request to the bucket tells.
            Ok(None) if inner.settings.wal == LogStore::Object => known.push(job),
            Ok(None) => answer(job, Ok(())),
            Ok(Some((ordinals, metadata, position))) => staged.push(Staged { job, ordinals, metadata, position }),
            Err(e) => answer(job, Err(e)),
        }
    }
    let begun = Instant::now();
    let result = log.commit().await;
    inner.metrics.wal_sync.observe(begun.elapsed().as_secs_f64());
    inner.arrivals.note_write(begun.elapsed());
    match result {
        Ok(bytes) => {
            if bytes > 0 && inner.log_failing.swap(false, Ordering::Relaxed) {
                tracing::info!("log can be written again");
            }
            inner.metrics.wal_written.inc_by(bytes);
            inner.measure(&log);
            let applying = inner.applying.lock().await;
            let answers: Vec<_> = staged.into_iter().map(|s| (apply(inner, &version, &s, now_ms), s.job)).collect();
            drop(applying);
            log.in_group = false;
            drop(log);
            inner.note_memory();
            crate::retention::begin(inner);
            for (result, job) in answers {
                answer(job, result);
            }
            let owned = if bytes > 0 || known.is_empty() { Ok(()) } else { confirm(inner).await };
            for job in known {
                let again = |e: &Error| Err(Error::new(e.kind(), e.message()));
                answer(job, owned.as_ref().map_or_else(again, |()| Ok(())));
            }
        }
        Err(e) => {
            log.in_group = false;
            drop(log);
            inner.metrics.wal_failures.inc();
            if !inner.log_failing.swap(true, Ordering::Relaxed) {
                tracing::error!(error = %e, "log can't be written; requests are refused until it can");
            }
            inner.reserve.suspect();
            for job in staged.into_iter().map(|s| s.job).chain(known) {
                answer(job, Err(Error::unavailable(e.to_string())));
            }
            inner.queue.refuse_if_closed();
        }
    }
}

async fn confirm(inner: &Inner) -> Result<()> {
    let late =
        |_| Error::unavailable(format!("whether another server has this database was not told in {CONFIRM_MAX:?}"));
    tokio::time::timeout(CONFIRM_MAX, inner.files.confirm()).await.map_err(late)?
}

fn answer(job: Job, result: Result<()>) {
    let Job { write, bytes, ack } = job;
    // Before the answer: whoever gets it may come with the next request at once, and finds the room of this one.
    drop((write, bytes));
    // Whoever asked may have gone; the rows stay.
    let _ = ack.send(result);
}

type Encoded = (Vec<Ordinal>, Vec<MetricMetadata>, u64);

/// Publishes a request's tag sets and encodes its record; `None` when there is nothing to store.
fn stage(inner: &Inner, log: &mut Wal, write: &Write, second: u32) -> Result<Option<Encoded>> {
    let metadata = inner.metadata.lock().news(&write.metadata, || inner.metrics.limit("metadata"));
    if write.rows() == 0 && metadata.is_empty() {
        return Ok(None);
    }
    let registry = &inner.registry;
    let mut ordinals = Vec::with_capacity(write.tags.sets.len());
    for set in &write.tags.sets {
        ordinals.push(match set {
            EncodedSet::Known(ordinal) => *ordinal,
            EncodedSet::New { series, wires } => registry.publish(series, wires, second)?,
            EncodedSet::Alias { ordinal, wires } => match registry.get(*ordinal) {
                Some(series) => registry.publish(&series, wires, second)?,
                None => *ordinal,
            },
        });
    }
    // Only this thread retires, so what is alive now stays so until the rows are in a memtable.
    if !registry.touch(ordinals.iter().copied(), second) {
        return Err(Error::unavailable("a tag set of the request left the memory after it was looked up; try again"));
    }
    let position = log.encode(&ordinals, |o| registry.get(o), &write.batches, &metadata)?;
    Ok(Some((ordinals, metadata, position)))
}

fn apply(inner: &Inner, version: &Version, staged: &Staged, now_ms: i64) -> Result<()> {
    // A batch without rows must not tie the log to a memtable that is never flushed.
    for batch in staged.job.write.batches.iter().filter(|b| b.rows.num_rows() > 0) {
        let table = version
            .table(batch.table.id)
            .ok_or_else(|| Error::internal(format!("table {} is not in the database", batch.table.name)))?;
        table.active.note_position(staged.position, now_ms);
        table.active.append(&staged.ordinals, &batch.rows)?;
        let rows = batch.rows.num_rows() as u64;
        inner.metrics.ingest_rows.get_or_create(&TableLabel { table: table.schema.name }).inc_by(rows);
    }
    inner.metrics.ingest_bytes.inc_by(staged.job.bytes.bytes() as u64);
    if !staged.metadata.is_empty() {
        inner.metadata.lock().apply(&staged.metadata, staged.position);
    }
    Ok(())
}

/// Forgets tag sets that have been idle for long and that no memtable holds. Queries notice that they looked for sets in
/// vain; see `select`.
pub(crate) async fn retire(inner: &Inner, second: u32) {
    // No freezing meanwhile, so no memtable is overlooked.
    let _log = inner.log.lock().await;
    let version = inner.version();
    let mut held: HashSet<Ordinal> =
        version.tables.iter().flat_map(|t| t.memtables().flat_map(|m| m.ordinals()).collect::<Vec<_>>()).collect();
    held.extend(inner.snapshots.ordinals());
    let retired = inner.registry.retire(second, RETIRE_SECONDS, |o| !held.contains(&o));
    if retired > 0 {
        tracing::debug!(retired, active = inner.registry.len(), "idle tag sets left the memory");
    }
}

/// Seconds since the epoch.
pub(crate) fn second(now_ms: i64) -> u32 {
    u32::try_from(now_ms / 1000).unwrap_or(0)
}
