//! Writes frozen memtables to files: one for each UTC day that has rows, the tag sets that the day's parts do not have
//! yet, one commit of the file catalog, one new version.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::BuildHasherDefault;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use arrow::array::{ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{TimestampMillisecondType, UInt32Type};
use catalog::files::{Commit, DataFile, TagPart};
use catalog::registry::PassThrough;
use catalog::{Error, ErrorKind, MetricFilter, Ordinal, PartHeader, Result, Series, TableSchema, tag_parts};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::engine::Inner;
use crate::memory::Kind;
use crate::memtable::Memtable;
use crate::scan::gather::gather;
use crate::scan::merge::MemoryCursor;
use crate::segment::{Description, Key, Writer, day_of, day_start_ms};
use crate::version::Version;

/// A set of codes.
type Codes = HashSet<i64, BuildHasherDefault<PassThrough>>;

/// Days whose written tag sets are remembered.
const DAYS_REMEMBERED: usize = 4;

/// Files that are written at the same time: each has buffers of its own.
const DAYS_AT_ONCE: usize = 32;

/// What flush and compaction remember of days between runs.
#[derive(Debug, Default)]
pub(crate) struct Days {
    /// Codes that the tag parts of a day hold.
    written: Mutex<HashMap<i32, Codes>>,
    /// Files that are too much for a merge.
    wide: Mutex<HashSet<i64>>,
    /// Days that deletes or retention may have taken rows out of, whose tag sets have not been looked through since.
    pub lost: Mutex<BTreeSet<i32>>,
    /// When a table's day last got a file by a flush, milliseconds since the epoch.
    changed: Mutex<HashMap<(u16, i32), i64>>,
    /// Ids of files and tag parts that failed their checks; they are left out of merges.
    damaged: Mutex<BTreeSet<i64>>,
    /// Held while files are merged.
    pub compacting: tokio::sync::Mutex<()>,
    /// Held from the moment at which a delete has a number until readers see it, and while a merge takes numbers for its
    /// outputs and looks at the deletes: see [`crate::delete`].
    pub deleting: tokio::sync::Mutex<()>,
    /// What single files were looked at for by compaction, by id.
    pub checked: Mutex<HashMap<i64, crate::compact::Checked>>,
    /// Whether the last round of compaction failed.
    pub tight: AtomicBool,
    /// When objects were superseded.
    pub removed: Removed,
    /// Held for reading by each change of the file catalog that is under way.
    pub publishing: Arc<tokio::sync::RwLock<()>>,
}

/// When objects were superseded since start, by path. The catalog says so by the wall clock, which may jump while a query
/// still reads them.
#[derive(Debug, Default)]
pub(crate) struct Removed(Mutex<HashMap<String, Instant>>);

impl Removed {
    fn note(&self, version: &Version, commit: &Commit) {
        if commit.remove.is_empty() && commit.remove_parts.is_empty() {
            return;
        }
        let now = Instant::now();
        let files = version.tables.iter().flat_map(|t| t.files.iter()).filter(|f| commit.remove.contains(&f.id));
        let parts = version.parts.iter().filter(|p| commit.remove_parts.contains(&p.id));
        let paths = files.map(|f| f.path.clone()).chain(parts.map(|p| p.path.clone()));
        self.0.lock().extend(paths.map(|path| (path, now)));
    }

    /// Whether an object was superseded at least `grace` ago, as far as is known.
    pub fn older(&self, path: &str, grace: Duration) -> bool {
        self.0.lock().get(path).is_none_or(|at| at.elapsed() >= grace)
    }

    /// Forgets objects that are gone.
    pub fn forget(&self, paths: &[String]) {
        let mut removed = self.0.lock();
        paths.iter().for_each(|path| {
            removed.remove(path);
        });
    }
}

impl Days {
    /// When a flush last wrote a file for a table's day; `None` when not since start.
    pub fn changed(&self, table_id: u16, day: i32) -> Option<i64> {
        self.changed.lock().get(&(table_id, day)).copied()
    }

    /// Forgets which tag sets the parts of a day hold.
    pub fn forget(&self, day: i32) {
        self.written.lock().remove(&day);
    }

    /// Whether a file is too much for a merge with the next ones.
    pub fn is_wide(&self, id: i64) -> bool {
        self.wide.lock().contains(&id)
    }

    /// Leaves files out of merges from now on, since they are too much for one with the next ones.
    pub fn set_wide(&self, files: &[Arc<DataFile>]) {
        self.wide.lock().extend(files.iter().map(|f| f.id));
    }

    /// Lets merges try all files again: the next ones may be others by now.
    pub fn forget_wide(&self) {
        self.wide.lock().clear();
    }

    /// Forgets what is known of files that are gone.
    pub fn keep_files(&self, live: &HashSet<i64>) {
        self.wide.lock().retain(|id| live.contains(id));
        self.checked.lock().retain(|id, _| live.contains(id));
    }

    /// Whether a file or tag part failed its checks since the start.
    pub fn is_damaged(&self, id: i64) -> bool {
        self.damaged.lock().contains(&id)
    }

    /// Leaves a file or tag part out of merges from now on, saying so the first time. Returns how many there are.
    pub fn set_aside(&self, id: i64, e: &Error) -> usize {
        let mut damaged = self.damaged.lock();
        if damaged.insert(id) {
            tracing::error!(error = %e, "stored object is damaged: queries that need it fail, compaction leaves it out");
        }
        damaged.len()
    }

    /// Notes what a flush wrote; of tag sets not more than `codes_max` are remembered for each day.
    fn note(&self, table_id: u16, commit: &Commit, codes: Vec<(i32, Vec<i64>)>, codes_max: usize, now_ms: i64) {
        self.changed.lock().extend(commit.add.iter().map(|f| ((table_id, f.day), now_ms)));
        let mut written = self.written.lock();
        for (day, codes) in codes {
            let known = written.entry(day).or_default();
            if known.len() + codes.len() > codes_max {
                // Sets that are forgotten here are written again, and once more be one when parts are merged.
                *known = Codes::default();
            }
            known.extend(codes);
        }
        while written.len() > DAYS_REMEMBERED {
            let Some(oldest) = written.keys().min().copied() else { break };
            written.remove(&oldest);
        }
    }
}

/// Writes a frozen memtable to files, commits them, and installs the version in which they stand for it.
pub(crate) async fn write(inner: &Arc<Inner>, table: &Arc<TableSchema>, memtable: &Arc<Memtable>) -> Result<()> {
    let mut commit = Commit::default();
    let mut new_codes: Vec<(i32, Vec<i64>)> = Vec::new();
    // Files are smaller than what they are made of.
    let mut building = inner.memory.reserve(Kind::Files);
    building.force(memtable.bytes());
    if memtable.rows() > 0 {
        let seq = inner.files.next_seq();
        let rows = Frozen::new(inner, table, memtable)?;
        for window in rows.windows().await? {
            for Day { day, writer, series } in rows.write(inner, seq, window).await? {
                commit.add.push(store(inner, table, writer).await?);
                let has_rows = series.iter().map(|i| &rows.series[*i as usize]);
                let missing = missing_sets(inner, day, has_rows).await?;
                if missing.is_empty() {
                    continue;
                }
                new_codes.push((day, missing.iter().map(|s| s.id.code.0).collect()));
                let header = PartHeader { id: inner.files.next_id(), day, seq, supersedes: vec![] };
                let encoded = tag_parts::encode(&header, &missing)?;
                inner.segments.put(&encoded.part.path, encoded.bytes).await?;
                commit.add_parts.push(encoded.part);
            }
        }
    }
    let (table_id, written) = (table.id, memtable.clone());
    let now_ms = inner.now_ms();
    publish(inner, commit, move |inner, version, commit| {
        inner.days.note(table_id, commit, new_codes, codes_max(inner.memory.limit()), now_ms);
        let mut next = version.with_table(table_id, |t| {
            t.flushing.retain(|m| !Arc::ptr_eq(m, &written));
            t.files = with_files(&t.files, &commit.add, &[]);
        });
        next.parts = with_parts(&version.parts, &commit.add_parts, &[]);
        next
    })
    .await?;
    Ok(())
}

/// Commits a change to the file catalog and installs the version that `change` makes of it.
///
/// Once begun, both are done even when the caller goes away: a version that still names files which the catalog gave up
/// would lose them when their objects are deleted.
pub(crate) async fn publish(
    inner: &Arc<Inner>,
    commit: Commit,
    change: impl FnOnce(&Inner, &Version, &Commit) -> Version + Send + 'static,
) -> Result<Commit> {
    let inner = inner.clone();
    let under_way = inner.days.publishing.clone().read_owned().await;
    let work = tokio::spawn(async move {
        let _under_way = under_way;
        if commit != Commit::default() {
            inner.files.commit(&commit, inner.now_ms()).await?;
        }
        inner.days.removed.note(&inner.version(), &commit);
        inner.install(|version| change(&inner, version, &commit));
        Ok(commit)
    });
    work.await.map_err(|e| Error::internal("change of the file catalog did not end").with_source(e))?
}

/// A list of files with some added and some removed by id.
pub(crate) fn with_files(files: &[Arc<DataFile>], add: &[DataFile], remove: &[i64]) -> Arc<Vec<Arc<DataFile>>> {
    let kept = files.iter().filter(|f| !remove.contains(&f.id)).cloned();
    // Statistics are for the catalog only.
    let added = add.iter().map(|f| Arc::new(DataFile { columns: vec![], ..f.clone() }));
    Arc::new(kept.chain(added).collect())
}

/// A list of tag parts with some added and some removed by id.
pub(crate) fn with_parts(parts: &[Arc<TagPart>], add: &[TagPart], remove: &[i64]) -> Arc<Vec<Arc<TagPart>>> {
    let kept = parts.iter().filter(|p| !remove.contains(&p.id)).cloned();
    Arc::new(kept.chain(add.iter().cloned().map(Arc::new)).collect())
}

/// Finishes a file and stores its object.
pub(crate) async fn store(inner: &Inner, table: &TableSchema, writer: Writer) -> Result<DataFile> {
    let mut written = writer.finish()?;
    written.file.path = format!("{}/{}/{}.parquet", table.name, written.file.day, written.file.id);
    inner.segments.put(&written.file.path, written.bytes).await?;
    Ok(written.file)
}

/// The rows of one day on their way to a file.
struct Day {
    day: i32,
    writer: Writer,
    /// The series that have rows, ascending.
    series: Vec<u32>,
}

/// A memtable that is being written, with its series in storage order.
struct Frozen<'a> {
    table: &'a Arc<TableSchema>,
    memtable: &'a Arc<Memtable>,
    series: Vec<Arc<Series>>,
    ordinals: Vec<Ordinal>,
    keys: Vec<Key>,
}

impl<'a> Frozen<'a> {
    fn new(inner: &Inner, table: &'a Arc<TableSchema>, memtable: &'a Arc<Memtable>) -> Result<Self> {
        let ordinals = memtable.ordinals();
        let series = inner.registry.get_many(&ordinals);
        let mut all: Vec<(Key, Ordinal, Arc<Series>)> = Vec::with_capacity(series.len());
        for (ordinal, series) in ordinals.into_iter().zip(series) {
            // A set with rows in memory is never retired.
            let series = series.ok_or_else(|| Error::internal(format!("tag set of ordinal {ordinal} is gone")))?;
            all.push((Key::from(series.as_ref()), ordinal, series));
        }
        all.sort_unstable_by_key(|b| b.0);
        let keys = all.iter().map(|a| a.0).collect();
        let (series, ordinals) = all.into_iter().map(|(_, ordinal, series)| (series, ordinal)).unzip();
        Ok(Self { table, memtable, series, ordinals, keys })
    }

    fn cursor(&self, window: (i64, i64), columns: Vec<usize>) -> MemoryCursor {
        let wanted = (0..).zip(self.ordinals.iter().copied()).collect();
        MemoryCursor::new(self.memtable.clone(), wanted, window, columns)
    }

    /// Times, first and last, that cover all rows with at most [`DAYS_AT_ONCE`] days with rows in each.
    async fn windows(&self) -> Result<Vec<(i64, i64)>> {
        let Some((min, max)) = self.memtable.ts_range() else { return Ok(vec![]) };
        if i64::from(day_of(max)) - i64::from(day_of(min)) < DAYS_AT_ONCE as i64 {
            return Ok(vec![(i64::MIN, i64::MAX)]);
        }
        let mut days = BTreeSet::new();
        let mut cursor = self.cursor((i64::MIN, i64::MAX), vec![1]);
        while let Some(rows) = cursor.next()? {
            let ts = rows.column(1).as_primitive::<TimestampMillisecondType>().values();
            days.extend(ts.chunk_by(|a, b| day_of(*a) == day_of(*b)).map(|run| day_of(run[0])));
            tokio::task::yield_now().await;
        }
        let days: Vec<i32> = days.into_iter().collect();
        let starts = days.chunks(DAYS_AT_ONCE).skip(1).map(|chunk| day_start_ms(chunk[0]));
        let starts: Vec<i64> = std::iter::once(i64::MIN).chain(starts).collect();
        let ends = starts[1..].iter().map(|start| start - 1).chain([i64::MAX]);
        Ok(starts.iter().copied().zip(ends).collect())
    }

    /// Writes the rows of a window of time, by day.
    async fn write(&self, inner: &Inner, seq: u64, window: (i64, i64)) -> Result<Vec<Day>> {
        let mut cursor = self.cursor(window, (1..self.table.columns.len()).collect());
        let mut days: BTreeMap<i32, Day> = BTreeMap::new();
        while let Some(rows) = cursor.next()? {
            for (day, rows) in by_day(&rows)? {
                let entry = match days.entry(day) {
                    Entry::Occupied(e) => e.into_mut(),
                    Entry::Vacant(e) => {
                        let description = Description {
                            id: inner.files.next_id(),
                            table: self.table.name.to_owned(),
                            table_id: self.table.id,
                            schema_version: self.table.version,
                            day,
                            level: 0,
                            seq_min: seq,
                            seq_max: seq,
                            supersedes: vec![],
                        };
                        e.insert(Day { day, writer: Writer::new(self.table, description)?, series: vec![] })
                    }
                };
                for run in rows.column(0).as_primitive::<UInt32Type>().values().chunk_by(|a, b| a == b) {
                    if entry.series.last() != Some(&run[0]) {
                        entry.series.push(run[0]);
                    }
                }
                entry.writer.write(&self.keys, &rows)?;
            }
            // Queries share these threads.
            tokio::task::yield_now().await;
        }
        Ok(days.into_values().collect())
    }
}

/// Cuts rows sorted by (series, ts) by UTC day, keeping their order.
fn by_day(rows: &RecordBatch) -> Result<Vec<(i32, RecordBatch)>> {
    let ts = rows.column(1).as_primitive::<TimestampMillisecondType>().values();
    let (min, max) = ts.iter().fold((i64::MAX, i64::MIN), |(a, b), t| (a.min(*t), b.max(*t)));
    if day_of(min) == day_of(max) {
        return Ok(vec![(day_of(min), rows.clone())]);
    }
    let mut slices: BTreeMap<i32, Vec<Range<usize>>> = BTreeMap::new();
    let mut start = 0;
    for run in ts.chunk_by(|a, b| day_of(*a) == day_of(*b)) {
        slices.entry(day_of(run[0])).or_default().push(start..start + run.len());
        start += run.len();
    }
    let cut = |slices: Vec<Range<usize>>| -> Result<RecordBatch> {
        let total = slices.iter().map(ExactSizeIterator::len).sum();
        let columns: Result<Vec<ArrayRef>> =
            rows.columns().iter().map(|c| gather(&[c], slices.iter().map(|s| (0, s.clone())), total)).collect();
        Ok(RecordBatch::try_new(rows.schema(), columns?)?)
    };
    slices.into_iter().map(|(day, slices)| Ok((day, cut(slices)?))).collect()
}

/// How many tag sets of a day are remembered as written.
fn codes_max(memory_limit: usize) -> usize {
    // A code takes 9 bytes in a table that is half full at worst.
    memory_limit / 32 / 18
}

/// Those of the series that no tag part of the day is known to hold.
async fn missing_sets<'a>(
    inner: &Inner,
    day: i32,
    series: impl Iterator<Item = &'a Arc<Series>>,
) -> Result<Vec<Arc<Series>>> {
    if !inner.days.written.lock().contains_key(&day) {
        let parts: Vec<_> = inner.version().parts.iter().filter(|p| p.day == day).cloned().collect();
        let mut codes = Codes::default();
        let max = codes_max(inner.memory.limit()) as u64;
        for part in parts {
            if codes.len() as u64 + part.sets > max {
                continue;
            }
            let mut held = inner.memory.reserve(Kind::Files);
            let mut admit = |bytes| {
                held.force(bytes);
                Ok(())
            };
            match inner.parts.load(std::slice::from_ref(&part), MetricFilter::All, &mut admit).await {
                Ok(known) => codes.extend(known.iter().flat_map(|p| p.iter()).map(|s| s.id.code.0)),
                // Sets that it held and that are still in use are written once more.
                Err(e) if e.kind() == ErrorKind::Corrupt => {
                    inner.metrics.damaged.set(inner.days.set_aside(part.id, &e) as i64);
                }
                Err(e) => return Err(e),
            }
        }
        inner.days.written.lock().insert(day, codes);
    }
    let written = inner.days.written.lock();
    let known = written.get(&day);
    Ok(series.filter(|s| known.is_none_or(|k| !k.contains(&s.id.code.0))).cloned().collect())
}
