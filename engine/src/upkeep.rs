//! What runs beside writes and queries: deciding when memtables are flushed, trimming the log, compaction rounds and
//! gauges.
//!
//! A flush has three steps. Freezing: under the log's lock the active memtable joins the flushing ones and an empty one
//! takes its place, and the log begins a new segment. Writing: [`crate::flush`] writes files, commits them, and installs
//! the version in which they stand for the memtable. Trimming: segments of the log that no memtable needs are deleted.
//! A failed write leaves the memtable where it is, readable, and is tried again.

use std::cmp::Reverse;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use catalog::files::Commit;
use catalog::{Error, MetricFilter, Result};
use futures::FutureExt;
use tokio::sync::MutexGuard;
use tokio::time::Instant;

use crate::committer;
use crate::engine::CACHE_PARTS;
use crate::engine::Inner;
use crate::memory::Kind;
use crate::memtable::Memtable;
use crate::telemetry::{CacheLabel, MemoryLabel, TableLabel};
use crate::version::Version;
use crate::wal::Wal;

/// How often conditions are looked at.
const TICK: Duration = Duration::from_millis(100);
/// How often compaction looks for work.
const COMPACT_INTERVAL: Duration = Duration::from_secs(30);
/// How often the SQL catalog is brought up to date when it has fallen behind.
const FOLLOW_INTERVAL: Duration = Duration::from_secs(1);
/// The log forces a flush beyond so many files or objects: a start reads each.
const WAL_CHUNKS_SOFT: i64 = 2000;
/// A clock that was set back by more can't tell any more how long rows have waited, so they are flushed at once.
const CLOCK_STEP_MS: i64 = 60_000;
/// How long a memtable may keep tag sets in memory while new ones find little room.
const HOLDING_MS: i64 = 5_000;
/// The part of the memory limit that each cache may take while memory is scarce.
const SCARCE_CACHE_PARTS: usize = 128;
/// Memtables that take less than this part of the memory limit are not flushed for want of it.
const WORTH_FLUSHING_PARTS: usize = 32;
/// Wait after a failed flush.
const RETRY: Duration = Duration::from_secs(5);

/// Rows of the newest files whose indexes are made at start, and tag sets that are read.
const WARM_ROWS: u64 = 16 << 20;
const WARM_SETS: u64 = 64 << 10;

/// Reads what the first queries would have to read first: where the rows of the newest files are, and the tag sets of the
/// newest days. What fails here is told when a query needs it.
pub(crate) async fn warm(inner: Arc<Inner>) {
    let stopping = inner.stopping.clone();
    let work = async {
        let version = inner.version();
        let mut files: Vec<_> =
            version.tables.iter().flat_map(|t| t.files.iter().map(|f| (t.schema.clone(), f.clone()))).collect();
        files.sort_by_key(|(_, f)| Reverse(f.ts_max));
        let mut parts = version.parts.to_vec();
        parts.sort_by_key(|p| Reverse((p.day, p.seq)));
        let (mut rows, mut sets) = (WARM_ROWS, WARM_SETS);
        for part in parts {
            let Some(left) = sets.checked_sub(part.sets) else { break };
            sets = left;
            let mut held = inner.memory.reserve(Kind::Files);
            let mut admit = |bytes| held.grow(bytes);
            inner.parts.load(&[part], MetricFilter::All, &mut admit).await?;
        }
        for (table, file) in files {
            let Some(left) = rows.checked_sub(file.rows) else { break };
            rows = left;
            if inner.memory.is_scarce() {
                break;
            }
            inner.segments.warm(&table, &file).await?;
        }
        Ok::<_, Error>(())
    };
    tokio::select! {
        done = work => if let Err(error) = done {
            tracing::debug!(%error, "not all that queries need first was read at start");
        },
        () = stopping.cancelled() => {}
    }
}

impl Inner {
    /// Replaces the version. `change` sees the present one; changes run one after another.
    pub(crate) fn install(&self, change: impl FnOnce(&Version) -> Version) {
        let _one = self.version_change.lock();
        self.version.store(Arc::new(change(&self.version.load())));
    }

    /// Takes the log.
    ///
    /// # Errors
    /// `Unavailable` once a group was left half done by a panic: what is in memtables is no longer what is in the log,
    /// and only a start, which reads the log, puts that right.
    pub(crate) async fn lock_log(&self) -> Result<MutexGuard<'_, Wal>> {
        let log = self.log.lock().await;
        if log.in_group {
            return Err(Error::unavailable(committer::BROKEN));
        }
        Ok(log)
    }

    /// Freezes the tables for which `which` holds and that have rows.
    ///
    /// # Errors
    /// Those of [`Inner::lock_log`].
    pub(crate) async fn freeze(&self, which: impl Fn(&Memtable) -> bool + Send) -> Result<()> {
        let mut log = self.lock_log().await?;
        let version = self.version();
        let mut any = false;
        for table in &version.tables {
            if table.active.rows() > 0 && which(&table.active) {
                any = true;
                self.install(|v| {
                    v.with_table(table.schema.id, |t| {
                        let fresh = Arc::new(Memtable::new(t.schema.clone()));
                        t.flushing.push(std::mem::replace(&mut t.active, fresh));
                    })
                });
            }
        }
        // Metadata of metrics are in no memtable, and what holds them is deleted once they are saved.
        if any || self.metadata.lock().first_position().is_some() {
            log.roll();
        }
        Ok(())
    }

    /// Writes all frozen memtables to files, oldest first, then trims the log. It goes on when the caller goes away:
    /// whoever holds `flushing` next counts on no flush being half way, with files that no version names yet and rows
    /// whose tag sets would be taken for unused.
    ///
    /// # Errors
    /// Storage errors; what could not be written stays frozen.
    pub(crate) async fn flush_frozen(self: &Arc<Self>) -> Result<()> {
        let inner = self.clone();
        let work = tokio::spawn(async move {
            let _one = inner.flushing.lock().await;
            let result = inner.write_frozen().await;
            // What was written before a failure needs the log no more.
            inner.trim().await?;
            result
        });
        work.await.map_err(|e| Error::internal("flush did not end").with_source(e))?
    }

    /// Writes every row that was applied before to files and deletes what the log held of them. The caller holds
    /// `flushing`.
    ///
    /// # Errors
    /// Storage errors; the log may hold rows then that are in files as well.
    pub(crate) async fn flush_all_of_log(self: &Arc<Self>) -> Result<()> {
        // What comes from here on is in segments of its own, which nothing before it keeps.
        let end = {
            let mut log = self.lock_log().await?;
            log.roll();
            log.position()
        };
        self.freeze(|_| true).await?;
        self.write_frozen().await?;
        self.trim().await?;
        let begin = self.lock_log().await?.oldest();
        if begin < end {
            return Err(Error::unavailable(format!(
                "the log still holds records from {begin} on that are in files; those before {end} should be gone"
            )));
        }
        Ok(())
    }

    async fn write_frozen(self: &Arc<Self>) -> Result<()> {
        self.save_metadata().await?;
        let frozen: Vec<_> = {
            let version = self.version();
            let tables = version.tables.iter();
            tables.flat_map(|t| t.flushing.iter().map(|m| (t.schema.clone(), m.clone())).collect::<Vec<_>>()).collect()
        };
        // Each goes as soon as it is in files; a version that were held here would keep all of them.
        for (table, memtable) in frozen {
            let begun = Instant::now();
            crate::flush::write(self, &table, &memtable)
                .await
                .map_err(|e| e.context(format_args!("flush of table {}", table.name)))?;
            self.metrics.flush.observe(begun.elapsed().as_secs_f64());
        }
        Ok(())
    }

    async fn save_metadata(&self) -> Result<()> {
        // Under the log's lock no record is durable but not applied.
        let (position, rows) = {
            let log = self.lock_log().await?;
            (log.position(), self.metadata.lock().unsaved())
        };
        if rows.is_empty() {
            return Ok(());
        }
        let commit = Commit { metadata: rows, ..Commit::default() };
        self.files.commit(&commit, self.now_ms()).await?;
        self.metadata.lock().saved(&commit.metadata, position);
        Ok(())
    }

    /// Deletes what no memtable needs of the log.
    async fn trim(&self) -> Result<()> {
        let mut log = self.lock_log().await?;
        let pinned = self.pins().into_iter().map(|(position, _)| position).min();
        let position = pinned.unwrap_or_else(|| log.position());
        let garbage = log.trim(position).await;
        self.trim_due.store(garbage.is_err(), Ordering::Relaxed);
        self.measure(&log);
        if let Ok(damaged) = log.damaged() {
            self.metrics.wal_set_aside.set(damaged as i64);
        }
        drop(log);
        if let Some(garbage) = garbage? {
            garbage.delete().await;
        }
        Ok(())
    }

    /// Notes how large the log is.
    pub(crate) fn measure(&self, log: &Wal) {
        self.metrics.wal_size.set(log.bytes() as i64);
        self.metrics.wal_chunks.set(log.chunks() as i64);
    }

    /// Refuses while the disk is full.
    pub(crate) fn check_disk(&self) -> Result<()> {
        if self.reserve.is_full() {
            self.metrics.limit("disk");
            return Err(Error::unavailable(format!(
                "the disk of {} is full; writes are accepted again when there is room",
                self.settings.data_dir.display()
            )));
        }
        Ok(())
    }

    /// Positions that the log must keep, with the table that needs them (`None`: metric metadata).
    fn pins(&self) -> Vec<(u64, Option<u16>)> {
        let version = self.version();
        let mut out: Vec<_> = version
            .tables
            .iter()
            .flat_map(|t| t.memtables().map(|m| (m.first_position(), t.schema.id)).collect::<Vec<_>>())
            .filter_map(|(position, table)| Some((position?, Some(table))))
            .collect();
        out.extend(self.metadata.lock().first_position().map(|position| (position, None)));
        out
    }

    /// Bytes that memtables may take before the greatest is flushed.
    pub(crate) fn memtable_bytes_soft(&self) -> usize {
        self.settings.memory_limit / 4
    }

    /// Bytes of memtables beyond which writes are refused.
    pub(crate) fn memtable_bytes_hard(&self) -> usize {
        self.settings.memory_limit / 2
    }

    fn wal_bytes_soft(&self) -> u64 {
        self.settings.wal_bytes_max.min(self.settings.memory_limit as u64 / 4)
    }

    /// Bytes of the log beyond which writes are refused: flushes fail, or can't keep up.
    pub(crate) fn wal_bytes_hard(&self) -> u64 {
        2 * self.wal_bytes_soft() + (64 << 20)
    }

    /// Freezes what is due; returns whether anything waits to be written. What could not be frozen waits as well: whoever
    /// flushes is told why.
    pub(crate) async fn freeze_due(&self) -> bool {
        let now_ms = self.now_ms();
        let interval_ms = self.settings.flush_interval.as_millis() as i64;
        let version = self.version();
        let greatest = version.tables.iter().map(|t| t.active.bytes()).max().unwrap_or(0);
        let pressed = version.memory() > self.memtable_bytes_soft()
            || self.reserve.is_tight(version.memory() as u64)
            || self.memory.is_scarce() && greatest > self.settings.memory_limit / WORTH_FLUSHING_PARTS;
        let long = self.metrics.wal_size.get() as u64 > self.wal_bytes_soft()
            || self.metrics.wal_chunks.get() > WAL_CHUNKS_SOFT;
        let pin = self.pins().into_iter().min().filter(|_| long);
        let pinning = pin.and_then(|(_, table)| table);
        let metadata_due = pin.is_some_and(|(_, table)| table.is_none());
        // A tag set stays as long as a memtable has rows of it.
        let holding = self.registry.is_pressed();
        let waits = |table_id: u16| version.table(table_id).is_some_and(|t| !t.flushing.is_empty());
        let due = |m: &Memtable| {
            let wanted = holding && m.first_ms().is_some_and(|first| now_ms - first >= HOLDING_MS)
                || m.first_ms().is_some_and(|first| now_ms - first >= interval_ms || now_ms < first - CLOCK_STEP_MS)
                || (pressed && m.bytes() == greatest)
                || pinning == Some(m.table().id);
            // Of a table that can't be flushed no more is frozen than memory has room for: what waits is written first,
            // and many small memtables would be no sooner in files than one.
            m.bytes() >= self.settings.flush_bytes || wanted && !waits(m.table().id)
        };
        let any_due = metadata_due || version.tables.iter().any(|t| t.active.rows() > 0 && due(&t.active));
        if any_due && self.freeze(due).await.is_err() {
            return true;
        }
        // Without rows nothing would come by here, and while the log is too long there are none.
        let trim_due = self.trim_due.load(Ordering::Relaxed);
        metadata_due || trim_due || self.version().tables.iter().any(|t| !t.flushing.is_empty())
    }

    /// Refuses when no write will be taken any more.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.files.is_fenced() {
            return Err(Error::unavailable("another server has taken this database over; this one takes no writes"));
        }
        self.queue.closed().map_or(Ok(()), |why| Err(Error::unavailable(why)))
    }

    /// Refuses when memory or log are beyond what a flush could free in time, and when nothing can be flushed any more.
    pub(crate) fn check_room(&self) -> Result<()> {
        self.check_writable()?;
        self.check_disk()?;
        self.memory.check(Kind::Queue).inspect_err(|_| self.metrics.limit("memory"))?;
        let memory = self.version().memory();
        if memory > self.memtable_bytes_hard() {
            self.metrics.limit("memtable_bytes");
            return Err(Error::unavailable(format!(
                "{memory} bytes of rows wait to be written to files; at most {} may",
                self.memtable_bytes_hard()
            )));
        }
        let log = self.metrics.wal_size.get() as u64;
        if log > self.wal_bytes_hard() {
            self.metrics.limit("wal_bytes");
            return Err(Error::unavailable(format!(
                "the log holds {log} bytes that are not in files; at most {} may",
                self.wal_bytes_hard()
            )));
        }
        Ok(())
    }

    /// Notes what memtables, tag sets and metric metadata hold.
    pub(crate) fn note_memory(&self) {
        self.memory.note(Kind::Memtables, self.version().memory());
        self.memory.note(Kind::TagSets, self.registry.bytes() + self.metadata.lock().bytes());
    }

    /// Gives caches less memory while it is scarce.
    fn bound_caches(&self) {
        let parts = if self.memory.is_scarce() { SCARCE_CACHE_PARTS } else { CACHE_PARTS };
        let limit = self.settings.memory_limit / parts;
        self.segments.limit_cache(limit);
        self.parts.limit_cache(limit);
        self.registry.limit_indexes(limit / 2);
        let caches = [self.segments.cached_bytes(), self.parts.cached_bytes(), self.registry.index_bytes()];
        self.memory.note(Kind::Caches, caches.iter().sum());
    }

    fn set_gauges(&self) {
        let m = &self.metrics;
        for kind in Kind::ALL {
            m.memory.get_or_create(&MemoryLabel { kind: kind.name() }).set(self.memory.held(kind) as i64);
            let refused = m.memory_refused.get_or_create(&MemoryLabel { kind: kind.name() });
            refused.inc_by((self.memory.refused(kind) as u64).saturating_sub(refused.get()));
        }
        m.memory.get_or_create(&MemoryLabel { kind: "other" }).set(self.memory.beyond() as i64);
        m.memory_limit.set(self.memory.limit() as i64);
        m.disk_full.set(self.reserve.is_full().into());
        m.queue.set(self.queue.len() as i64);
        m.series.set(self.registry.len() as i64);
        m.series_refused.set(self.registry.refused() as i64);
        m.query_memory.set(self.session.runtime_env().memory_pool.reserved() as i64);
        m.catalog_behind.set(self.files.behind() as i64);
        for (cache, bytes) in [("segments", self.segments.cached_bytes()), ("tag_parts", self.parts.cached_bytes())] {
            m.cache.get_or_create(&CacheLabel { cache }).set(bytes as i64);
        }
        let version = self.version();
        m.tag_parts.set(version.parts.len() as i64);
        for table in &version.tables {
            let label = TableLabel { table: table.schema.name };
            let bytes: usize = table.memtables().map(|memtable| memtable.bytes()).sum();
            m.memtable.get_or_create(&label).set(bytes as i64);
            m.files.get_or_create(&label).set(table.files.len() as i64);
        }
    }
}

/// Runs a piece of upkeep. A panic in it, which is a bug, becomes an error: were the loop to end of which it is a part,
/// nobody would notice before memory is full.
async fn caught(work: impl Future<Output = Result<()>>) -> Result<()> {
    let ended = AssertUnwindSafe(work).catch_unwind().await;
    ended.unwrap_or_else(|_| Err(Error::internal("a panic, which is a bug")))
}

/// Flushes what is due until `inner.stopping`.
pub(crate) async fn run_flusher(inner: Arc<Inner>) {
    let mut retry = Instant::now();
    while inner.stopping.run_until_cancelled(tokio::time::sleep(TICK)).await.is_some() {
        if let Err(e) = caught(tick(&inner, retry)).await {
            inner.metrics.flush_failures.inc();
            tracing::error!(error = %e, "flush failed and will be tried again");
            retry = Instant::now() + RETRY;
            inner.reserve.suspect();
        }
    }
}

/// Looks after memory, and from `retry` on flushes what is due.
pub(crate) async fn tick(inner: &Arc<Inner>, retry: Instant) -> Result<()> {
    inner.note_memory();
    inner.snapshots.relieve(inner);
    inner.bound_caches();
    inner.set_gauges();
    let full = inner.reserve.is_full() && !inner.reserve.refill();
    if Instant::now() < retry {
        return Ok(());
    }
    if full && inner.metrics.wal_size.get() > 0 {
        // What is in files needs the log no more, which gives room back.
        inner.freeze(|_| true).await?;
    }
    if inner.freeze_due().await { inner.flush_frozen().await } else { Ok(()) }
}

/// Compacts now and then until `inner.stopping`.
pub(crate) async fn run_compactor(inner: Arc<Inner>) {
    while inner.stopping.run_until_cancelled(tokio::time::sleep(COMPACT_INTERVAL)).await.is_some() {
        let begun = Instant::now();
        match inner.stopping.run_until_cancelled(caught(crate::compact::due(&inner))).await {
            None => {}
            Some(Ok(())) => inner.metrics.compaction.observe(begun.elapsed().as_secs_f64()),
            Some(Err(e)) => {
                inner.metrics.compaction_failures.inc();
                inner.reserve.suspect();
                tracing::error!(error = %e, "compaction failed and will be tried again");
            }
        }
    }
}

/// Brings the SQL catalog up to date after an outage, until `inner.stopping`.
pub(crate) async fn run_follower(inner: Arc<Inner>) {
    while inner.stopping.run_until_cancelled(tokio::time::sleep(FOLLOW_INTERVAL)).await.is_some() {
        let follow = async {
            inner.files.follow().await;
            Ok(())
        };
        // Given up in between, it begins anew the next time.
        if let Some(Err(e)) = inner.stopping.run_until_cancelled(caught(follow)).await {
            tracing::error!(error = %e, "SQL catalog was not brought up to date");
        }
    }
}
