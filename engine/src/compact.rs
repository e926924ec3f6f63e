//! Merges files: those of a table's day into one, or into few of a bounded size, sorted and with each key once.
//!
//! Inputs of a merge are neighbours in sequence within their table and day, so the newest row of a key wins whatever is
//! merged first. While a day goes on its flushed files are merged a batch at a time, once; when it is over and no late
//! row has come for a while, all of its files become one.
//!
//! A round of this may take long, since days are large and a delete may concern many files. What flushes leave meanwhile is
//! merged between its steps, so that the number of files and tag parts stays bounded however long the round is.
//!
//! Every merge leaves out what deletes and retention take. Files that no merge would touch are written again for them
//! alone: for deletes once none has come for a while, for retention once a rule has outlived all of their rows.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::hash::BuildHasherDefault;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use catalog::files::{Commit, DataFile, TagPart};
use catalog::registry::PassThrough;
use catalog::tag_parts::MetricSets;
use catalog::{Error, ErrorKind, MetricFilter, PartHeader, Result, Series, TableSchema, tag_parts};

use crate::cut::Taken;
use crate::delete::Tombstone;
use crate::engine::Inner;
use crate::flush::{publish, store, with_files, with_parts};
use crate::memory::{Kind, Reservation};
use crate::memtable::read_schema;
use crate::scan::merge::{Merge, Source};
use crate::segment::{Cursor, Description, Key, Request, Writer, day_of, day_start_ms};
use crate::version::{TableVersion, Version};
use crate::{orphans, retention};

/// A file is finished when it has this many bytes, or fewer where there is little memory. It is put together there.
const FILE_BYTES_MAX: usize = 128 << 20;

fn file_bytes_max(inner: &Inner) -> usize {
    FILE_BYTES_MAX.min(inner.settings.memory_limit / 16)
}

/// Flushed files of a day that are merged before the day is over.
const BATCH_FILES: usize = 6;

/// Tag parts of a day that are merged before the day is over.
const BATCH_PARTS: usize = 8;

/// Files or tag parts of flushes that are merged while a round has other work, after each piece of it.
const BATCH_BESIDE: usize = 64;

/// While a day goes on, a tag part is merged with smaller ones once it has at most so many times the sets that they have
/// together: each set is written again a few times in all, however often parts are merged.
const GROWTH: u64 = 4;

/// A day is left alone for this long after its last flushed file.
const QUIET_MS: i64 = 10 * 60 * 1000;

/// Files smaller than this fraction of their day wait for more of them.
const WORTHWHILE: u64 = 16;

/// A table's deletes are folded in together when none has come for this long.
const FOLD_QUIET_MS: u64 = 10 * 60 * 1000;

/// So many are folded in while more come: each costs every query of its table some time.
const FOLD_WAITING: usize = 1000;

/// Files that are looked at in one round for rows to leave out: the first look reads a file's index.
const FOLD_FILES: usize = 256;

/// Compacts what is due and deletes superseded objects whose grace has passed.
pub(crate) async fn due(inner: &Arc<Inner>) -> Result<()> {
    run(inner, false).await
}

/// Compacts until nothing is left to do.
pub(crate) async fn all(inner: &Arc<Inner>) -> Result<()> {
    run(inner, true).await
}

/// Writes all files that deletes concern again, without the deleted rows.
pub(crate) async fn fold_deletes(inner: &Arc<Inner>) -> Result<()> {
    let _one = inner.days.compacting.lock().await;
    let mut round = Round::new(inner, false);
    round.fold(true).await?;
    round.prune().await
}

async fn run(inner: &Arc<Inner>, all: bool) -> Result<()> {
    let _one = inner.days.compacting.lock().await;
    let result = Round::new(inner, all).run().await;
    inner.days.tight.store(result.is_err(), Ordering::Relaxed);
    result
}

/// Which files and tag parts are merged, and how far.
#[derive(Debug, Clone, Copy)]
struct Scope {
    /// Those of flushes from this one
    first: u64,
    /// to this one. It is set before anything is merged: with what comes meanwhile there would be no end.
    last: u64,
    whole: Whole,
}

/// Of which days files and tag parts become as few as they can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whole {
    All,
    /// Of those that are over; of others what is worth it.
    Over,
    /// Of none: what flushes left is merged among itself once it is many.
    None,
}

impl Scope {
    /// Whether a day's files or parts become as few as they can.
    fn is_whole(self, over: bool) -> bool {
        self.whole == Whole::All || self.whole == Whole::Over && over
    }

    /// Whether a file with rows of flushes from `first` to `last` belongs to it.
    fn holds(self, first: u64, last: u64) -> bool {
        self.first <= first && last <= self.last
    }

    /// So many of flushes are worth a merge before their day is over.
    fn batch(self, usual: usize) -> usize {
        if self.whole == Whole::None { BATCH_BESIDE } else { usual }
    }
}

/// The newest flush that left a file.
fn newest(inner: &Inner) -> u64 {
    inner.version().tables.iter().flat_map(|t| t.files.iter().map(|f| f.seq_max)).max().unwrap_or(0)
}

/// A look for work, and what it has met so far.
struct Round<'a> {
    inner: &'a Arc<Inner>,
    /// Whether nothing is to be left to do.
    all: bool,
    /// The newest flush when it began.
    newest: u64,
    /// Days that lost rows.
    lost: BTreeSet<i32>,
    /// Days of tables, by number, that can't be merged.
    skipped: BTreeSet<(u16, i32)>,
}

impl<'a> Round<'a> {
    fn new(inner: &'a Arc<Inner>, all: bool) -> Self {
        Self { inner, all, newest: newest(inner), lost: BTreeSet::new(), skipped: BTreeSet::new() }
    }

    async fn run(mut self) -> Result<()> {
        let inner = self.inner;
        retention::observe(inner);
        // First what frees space without taking any.
        clean(inner).await?;
        retention::drop_files(inner).await?;
        let scope = Scope { first: 0, last: self.newest, whole: if self.all { Whole::All } else { Whole::Over } };
        if inner.days.tight.load(Ordering::Relaxed) {
            // Perhaps for want of space: what leaves rows out gives back more than it takes.
            self.fold(self.all).await?;
        } else {
            // Whatever leaves rows out looks through all tag parts.
            while self.merge_parts(scope).await? {}
        }
        while self.merge_files(scope).await? {
            self.keep_up().await?;
        }
        self.fold(self.all).await?;
        self.prune().await?;
        while self.merge_parts(scope).await? {}
        orphans::sweep(inner).await
    }

    /// Merges what flushes have left since it began. One merge may take a while, and many take long: until the last is done
    /// every query would look through each of those small files and tag parts, and so would every other merge.
    async fn keep_up(&mut self) -> Result<()> {
        let scope = Scope { first: self.newest + 1, last: newest(self.inner), whole: Whole::None };
        while self.merge_files(scope).await? {}
        while self.merge_parts(scope).await? {}
        Ok(())
    }

    /// Merges files that should become one; false when there are none.
    async fn merge_files(&mut self, scope: Scope) -> Result<bool> {
        let Some((table, files, level)) = next_merge(self.inner, scope, &self.skipped) else { return Ok(false) };
        match merge(self.inner, &table, &files, level).await {
            Ok(true) => self.lost.extend(files.iter().map(|f| f.day)),
            Ok(false) => {}
            Err(e) => {
                if !set_aside_files(self.inner, &table, &files, e).await? {
                    self.skipped.extend(files.iter().map(|f| (table.id, f.day)));
                }
            }
        }
        Ok(true)
    }

    /// The same for tag parts.
    async fn merge_parts(&mut self, scope: Scope) -> Result<bool> {
        let Some(parts) = next_parts(self.inner, scope) else { return Ok(false) };
        if let Err(e) = merge_parts(self.inner, &parts).await {
            set_aside_parts(self.inner, &parts, e).await?;
        }
        Ok(true)
    }

    /// Writes files of flushes before it began again that hold rows which a delete or retention takes, all of them or so
    /// many that are due, and forgets deletes that no file needs.
    async fn fold(&mut self, now: bool) -> Result<()> {
        let inner = self.inner;
        let mut looks = if now { usize::MAX } else { FOLD_FILES };
        let live: HashSet<i64> = inner.version().tables.iter().flat_map(|t| t.files.iter().map(|f| f.id)).collect();
        inner.days.checked.lock().retain(|id, _| live.contains(id));
        for table in &inner.version().tables {
            let quiet = |t: &Arc<Tombstone>| inner.now_ms().abs_diff(t.delete.created_ms) >= FOLD_QUIET_MS;
            let due = now || table.deletes.len() >= FOLD_WAITING || table.deletes.iter().all(quiet);
            let mut files: Vec<&Arc<DataFile>> = table.files.iter().filter(|f| f.seq_max <= self.newest).collect();
            files.sort_by_key(|f| f.bytes);
            for file in files {
                let delete = table.deletes.iter().rev().find(|t| due && t.concerns(file)).map_or(0, |t| t.delete.id);
                let floors = table.floors.passed(file.ts_max);
                let seen = inner.days.checked.lock().get(&file.id).copied().unwrap_or_default();
                let done = seen.floors & floors == floors && seen.delete >= delete;
                if done || looks == 0 || inner.days.is_damaged(file.id) {
                    continue;
                }
                looks -= 1;
                match fold_file(inner, &table.schema, file).await {
                    Ok(true) => {
                        self.lost.insert(file.day);
                    }
                    Ok(false) => {
                        inner.days.checked.lock().insert(file.id, Checked { floors, delete });
                    }
                    // It stays as it is, and so do the deletes that concern it.
                    Err(e) => {
                        set_aside_files(inner, &table.schema, std::slice::from_ref(file), e).await?;
                    }
                }
                self.keep_up().await?;
            }
        }
        forget_deletes(inner).await
    }

    /// Writes the tag parts of days that lost rows, or that have none, again without the sets that no row of the day has.
    async fn prune(&mut self) -> Result<()> {
        let version = self.inner.version();
        let mut days = std::mem::take(&mut self.lost);
        let filled: HashSet<i32> = version.tables.iter().flat_map(|t| t.files.iter().map(|f| f.day)).collect();
        days.extend(version.parts.iter().map(|p| p.day).filter(|day| !filled.contains(day)));
        for day in days {
            if let Err(e) = prune_now(self.inner, &version, day).await {
                if e.kind() != ErrorKind::Corrupt {
                    return Err(e);
                }
                tracing::warn!(error = %e, day, "tag sets of a day are kept, since it can't be known which ones its rows have");
            }
        }
        Ok(())
    }
}

/// Finds out which of the files of a failed merge are damaged, so that the next one goes around them. False when the
/// damage is elsewhere, in tag sets that the merge needed.
///
/// # Errors
/// The merge's own, when it did not fail of damage.
async fn set_aside_files(inner: &Inner, table: &TableSchema, files: &[Arc<DataFile>], e: Error) -> Result<bool> {
    if e.kind() != ErrorKind::Corrupt {
        return Err(e);
    }
    let mut found = false;
    for f in files {
        if let Err(e) = inner.segments.check(table, f).await
            && e.kind() == ErrorKind::Corrupt
        {
            found = true;
            inner.metrics.damaged.set(inner.days.set_aside(f.id, &e) as i64);
        }
    }
    if !found {
        tracing::error!(error = %e, table = table.name, "files of a day can't be merged");
    }
    Ok(found)
}

/// The same for tag parts, of which one must be damaged.
async fn set_aside_parts(inner: &Inner, parts: &[Arc<TagPart>], e: Error) -> Result<()> {
    let mut found = false;
    for p in parts.iter().filter(|_| e.kind() == ErrorKind::Corrupt) {
        if let Err(e) = inner.parts.check(p).await
            && e.kind() == ErrorKind::Corrupt
        {
            found = true;
            inner.metrics.damaged.set(inner.days.set_aside(p.id, &e) as i64);
        }
    }
    if found { Ok(()) } else { Err(e) }
}

/// Deletes objects that were superseded longer ago than any query runs.
async fn clean(inner: &Inner) -> Result<()> {
    let grace = inner.settings.delete_grace.as_millis() as i64;
    let gone = inner.files.purge(inner.now_ms() - grace).await?;
    let mut failed = None;
    let mut deleted = Vec::with_capacity(gone.len());
    let gone: Vec<String> =
        gone.into_iter().filter(|path| inner.days.removed.older(path, inner.settings.delete_grace)).collect();
    inner.snapshots.end_those_of(&gone.iter().map(String::as_str).collect());
    for path in gone {
        // One object that can't be deleted must not keep the others; it is tried again.
        match inner.segments.delete(&path).await {
            Ok(()) => deleted.push(path),
            Err(e) => failed = Some(e),
        }
    }
    if !deleted.is_empty() {
        inner.files.forget(&deleted).await?;
        inner.days.removed.forget(&deleted);
    }
    failed.map_or(Ok(()), Err)
}

/// Files that should become one now, and its level: the fewest bytes first after a round that failed, since outputs and
/// inputs are there together for a while. `skipped` are days of tables, by number.
fn next_merge(
    inner: &Inner,
    scope: Scope,
    skipped: &BTreeSet<(u16, i32)>,
) -> Option<(Arc<TableSchema>, Vec<Arc<DataFile>>, u8)> {
    let version = inner.version();
    let tight = inner.days.tight.load(Ordering::Relaxed);
    let mut least = None;
    let mut least_bytes = u64::MAX;
    for table in &version.tables {
        let mut days: BTreeMap<i32, Vec<Arc<DataFile>>> = BTreeMap::new();
        let holds = |f: &&Arc<DataFile>| scope.holds(f.seq_min, f.seq_max);
        let wanted = |f: &&Arc<DataFile>| holds(f) && !skipped.contains(&(table.schema.id, f.day));
        for f in table.files.iter().filter(wanted) {
            days.entry(f.day).or_default().push(f.clone());
        }
        for (day, mut files) in days {
            files.sort_by_key(|f| (f.seq_max, f.id));
            let over = scope.is_whole(day_is_over(inner, table.schema.id, day));
            // Only neighbours are merged, so a damaged file parts those before it from those after it.
            for files in files.split(|f| inner.days.is_damaged(f.id) || inner.days.is_wide(f.id)) {
                let Some(chosen) = choose(files, over, scope) else { continue };
                // Only what holds the whole day is done; the rest is merged once more.
                let level = if over && chosen.len() == files.len() { 2 } else { 1 };
                let bytes = chosen.iter().map(|f| f.bytes).sum();
                if bytes < least_bytes {
                    least = Some((table.schema.clone(), chosen, level));
                    least_bytes = bytes;
                }
                if !tight {
                    return least;
                }
            }
        }
    }
    least
}

fn day_is_over(inner: &Inner, table_id: u16, day: i32) -> bool {
    let now_ms = inner.now_ms();
    day < day_of(now_ms)
        && now_ms - day_start_ms(day + 1) >= QUIET_MS
        && inner.days.changed(table_id, day).is_none_or(|t| now_ms - t >= QUIET_MS)
}

/// Which of a day's files, sorted by sequence, to merge.
fn choose(files: &[Arc<DataFile>], over: bool, scope: Scope) -> Option<Vec<Arc<DataFile>>> {
    if over {
        // Files of one merge that was cut for size have the same sequence range and disjoint keys.
        let settled =
            files.windows(2).all(|w| w[0].level == 2 && (w[0].seq_min, w[0].seq_max) == (w[1].seq_min, w[1].seq_max));
        if settled {
            return None;
        }
        let bytes = |f: &[Arc<DataFile>]| f.iter().map(|f| f.bytes).sum::<u64>();
        let done = files.iter().take_while(|f| f.level == 2).count();
        if done == 0 || scope.whole == Whole::All || bytes(&files[done..]) >= bytes(files) / WORTHWHILE {
            return Some(files.to_vec());
        }
        // A few late rows are not worth writing a large day again; among themselves they are.
        return (files.len() - done >= BATCH_FILES).then(|| files[done..].to_vec());
    }
    let mut runs = files.chunk_by(|a, b| (a.level == 0) == (b.level == 0));
    let run = runs.find(|run| run[0].level == 0 && run.len() >= scope.batch(BATCH_FILES))?;
    Some(run.to_vec())
}

/// A merge that is about to begin.
struct Inputs<'a> {
    table: &'a Arc<TableSchema>,
    /// The first of those asked for, as many as have few enough series and take little enough memory to read.
    files: &'a [Arc<DataFile>],
    /// For the keys, and for what is held of each file while it is read.
    _held: Reservation,
    /// Numbers for its outputs: greater than those of all deletes that it sees, less than those of all others.
    ids: VecDeque<i64>,
    request: Request,
    taken: Option<Taken>,
}

impl<'a> Inputs<'a> {
    async fn new(inner: &Inner, table: &'a Arc<TableSchema>, files: &'a [Arc<DataFile>]) -> Result<Self> {
        let (ids, version) = {
            let _ids = inner.days.deleting.lock().await;
            let outputs = 4 + files.iter().map(|f| f.bytes).sum::<u64>() / (file_bytes_max(inner) as u64 / 2).max(1);
            ((0..outputs).map(|_| inner.files.next_id()).collect(), inner.version())
        };
        let max = merged_keys_max(inner.memory.limit());
        let mut held = inner.memory.reserve(Kind::Files);
        let mut keys: Vec<Key> = Vec::new();
        let (mut taken, mut reading) = (0, 0);
        for f in files {
            let (more, bytes) = inner.segments.keys(table, f).await?;
            reading += bytes;
            if taken > 0 && keys.len() + more.len() > max || taken > 1 && reading > inner.memory.limit() / 8 {
                break;
            }
            held.force(more.len() * (size_of::<Key>() + size_of::<u32>()) + bytes);
            keys.extend(more);
            keys.sort_unstable();
            keys.dedup();
            taken += 1;
        }
        let files = &files[..taken];
        let (mut taken, mut start_ms) = (None, i64::MIN);
        if let Some(table) = version.table(table.id) {
            start_ms = table.floors.least();
            taken = take(inner, &version, table, files, &keys).await?;
            held.force(taken.as_ref().map_or(0, Taken::bytes));
        }
        let request = Request {
            table: table.clone(),
            range: 0..keys.len(),
            keys: Arc::new(keys),
            start_ms,
            end_ms: i64::MAX,
            columns: (1..table.columns.len()).collect(),
            cuts: None,
        };
        Ok(Self { table, files, _held: held, ids, request, taken })
    }

    fn request(&self, file: &DataFile) -> Request {
        Request { cuts: self.taken.as_ref().and_then(|t| t.of_file(file)), ..self.request.clone() }
    }

    /// Whether rows are left out.
    async fn loses(&self, inner: &Inner) -> Result<bool> {
        for file in self.files {
            if inner.segments.loses(&self.request(file), file).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn merge(mut self, inner: &Arc<Inner>, level: u8) -> Result<()> {
        let (table, files) = (self.table, self.files);
        let (Some(first), Some(last)) = (files.first(), files.last()) else { return Ok(()) };
        let schema = read_schema(table, &self.request.columns);
        let source = |f: &Arc<DataFile>| {
            let request = Arc::new(self.request(f));
            Source::File(Box::new(Cursor::new(inner.segments.clone(), f.clone(), request)))
        };
        let mut merged = Merge::new(files.iter().map(source).collect(), schema, 1);
        let description = Description {
            id: 0,
            table: table.name.to_owned(),
            table_id: table.id,
            schema_version: table.version,
            day: first.day,
            level,
            seq_min: files.iter().map(|f| f.seq_min).min().unwrap_or(first.seq_min),
            seq_max: last.seq_max,
            supersedes: files.iter().map(|f| f.id).collect(),
        };
        let mut commit = Commit { remove: description.supersedes.clone(), ..Commit::default() };
        let mut writer: Option<Writer> = None;
        let mut building = inner.memory.reserve(Kind::Files);
        while let Some(rows) = merged.next().await? {
            let current = match &mut writer {
                Some(writer) => writer,
                None => {
                    let id = self.ids.pop_front().ok_or_else(|| Error::internal("merge without a number"))?;
                    writer.insert(Writer::new(table, Description { id, ..description.clone() })?)
                }
            };
            current.write(&self.request.keys, &rows)?;
            building.force_to(current.bytes());
            if current.bytes() >= file_bytes_max(inner)
                && !self.ids.is_empty()
                && let Some(full) = writer.take()
            {
                commit.add.push(store(inner, table, full).await?);
            }
            // Queries share these threads.
            tokio::task::yield_now().await;
        }
        if let Some(writer) = writer {
            commit.add.push(store(inner, table, writer).await?);
        }
        let table_id = table.id;
        let commit = publish(inner, commit, move |_, version, commit| {
            version.with_table(table_id, |t| t.files = with_files(&t.files, &commit.add, &commit.remove))
        })
        .await?;
        let (inputs, outputs) = (commit.remove.len(), commit.add.len());
        tracing::debug!(table = table.name, day = first.day, inputs, outputs, "files merged");
        inner.segments.forget(|id| !commit.remove.contains(&id));
        Ok(())
    }
}

/// How many series a merge may have: their keys are in memory.
fn merged_keys_max(memory_limit: usize) -> usize {
    memory_limit / 16 / size_of::<Key>()
}

/// Merges files, or the first ones if all have too many series; returns whether deletes or retention may have taken rows
/// out.
async fn merge(inner: &Arc<Inner>, table: &Arc<TableSchema>, files: &[Arc<DataFile>], level: u8) -> Result<bool> {
    let inputs = Inputs::new(inner, table, files).await?;
    let level = match inputs.files {
        [wide] if files.len() > 1 => {
            inner.days.set_wide(wide.id);
            return Ok(false);
        }
        some if some.len() < files.len() => level.min(1),
        _ => level,
    };
    let lost = inputs.taken.is_some();
    inputs.merge(inner, level).await?;
    Ok(lost)
}

/// What deletes and rules take from one day's files with these keys.
async fn take(
    inner: &Inner,
    version: &Version,
    table: &TableVersion,
    files: &[Arc<DataFile>],
    keys: &[Key],
) -> Result<Option<Taken>> {
    let least = table.floors.least();
    let deletes: Vec<_> = table.deletes.iter().filter(|t| files.iter().any(|f| t.concerns(f))).collect();
    let expiring = files.iter().any(|f| table.floors.greatest() > f.ts_min.max(least));
    if deletes.is_empty() && !expiring {
        return Ok(None);
    }
    let Some(mut finding) = Taken::find(table, files, keys, (least, i64::MAX)) else { return Ok(None) };
    let wanted = |metric: &str| {
        deletes.iter().any(|t| t.which.may_name(metric))
            || expiring && table.floors.rules.iter().any(|(rule, _)| rule.may_name(metric))
    };
    let days: HashSet<i32> = files.iter().map(|f| f.day).collect();
    let parts: Vec<_> = version.parts.iter().filter(|p| days.contains(&p.day)).cloned().collect();
    for part in parts {
        let mut held = inner.memory.reserve(Kind::Files);
        let sets = load(inner, &part, MetricFilter::Where(&wanted), &mut held).await?;
        let mut seen: Vec<(u32, &Series)> = Vec::new();
        for series in sets.iter().flat_map(|s| s.iter()) {
            if let Ok(i) = keys.binary_search(&Key::from(series.as_ref())) {
                seen.push((i as u32, series));
            }
        }
        seen.sort_unstable_by_key(|(i, _)| *i);
        finding.see(&seen);
    }
    Ok(finding.end())
}

/// What a file was looked at for and found to hold no row of.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Checked {
    /// [`crate::cut::Floors::passed`].
    floors: u64,
    /// The last delete.
    delete: i64,
}

/// Writes a file again if it holds rows to leave out; returns whether it did.
async fn fold_file(inner: &Arc<Inner>, table: &Arc<TableSchema>, file: &Arc<DataFile>) -> Result<bool> {
    let inputs = Inputs::new(inner, table, std::slice::from_ref(file)).await?;
    let loses = inputs.loses(inner).await?;
    if loses {
        inputs.merge(inner, file.level).await?;
    }
    Ok(loses)
}

/// Takes deletes out of the catalog that no file needs.
async fn forget_deletes(inner: &Arc<Inner>) -> Result<()> {
    let version = inner.version();
    let done: Vec<i64> = {
        let checked = inner.days.checked.lock();
        let free = |file: &DataFile, id: i64| checked.get(&file.id).is_some_and(|c| c.delete >= id);
        let tables = version.tables.iter();
        tables
            .flat_map(|v| {
                let needed = |t: &Tombstone| v.files.iter().any(|f| t.concerns(f) && !free(f, t.delete.id));
                v.deletes.iter().filter(|t| !needed(t)).map(|t| t.delete.id).collect::<Vec<_>>()
            })
            .collect()
    };
    if !done.is_empty() {
        let commit = Commit { remove_deletes: done, ..Commit::default() };
        publish(inner, commit, |_, version, commit| {
            let mut next = version.clone();
            for table in &mut next.tables {
                let kept = |t: &&Arc<Tombstone>| !commit.remove_deletes.contains(&t.delete.id);
                table.deletes = table.deletes.iter().filter(kept).cloned().collect();
            }
            next
        })
        .await?;
    }
    let waiting: usize = inner.version().tables.iter().map(|t| t.deletes.len()).sum();
    inner.metrics.deletes.set(waiting as i64);
    Ok(())
}

async fn prune_now(inner: &Arc<Inner>, version: &Version, day: i32) -> Result<()> {
    let sets: u64 = version.parts.iter().filter(|p| p.day == day).map(|p| p.sets).sum();
    if sets > merged_keys_max(inner.memory.limit()) as u64
        && version.tables.iter().any(|t| t.files.iter().any(|f| f.day == day))
    {
        // They cost space; to know which ones have no row would cost memory that is not there.
        tracing::debug!(day, sets, "tag sets of a day are kept, since they are too many to be looked through");
        return Ok(());
    }
    // Now, so that they are at hand while flushes wait.
    codes(inner, version, day).await?;
    let inner = inner.clone();
    // It must not be left half way: a flush that ran beside the commit would count on sets that leave.
    let work = tokio::spawn(async move {
        let _flushing = inner.flushing.lock().await;
        prune_day(&inner, day).await
    });
    work.await.map_err(|e| Error::internal("tag sets of a day were not pruned").with_source(e))?
}

async fn prune_day(inner: &Arc<Inner>, day: i32) -> Result<()> {
    let version = inner.version();
    let parts: Vec<_> = version.parts.iter().filter(|p| p.day == day).cloned().collect();
    let codes = codes(inner, &version, day).await?;
    let mut commit = Commit::default();
    for part in parts {
        let mut held = inner.memory.reserve(Kind::Files);
        let lists = load(inner, &part, MetricFilter::All, &mut held).await?;
        let sets = || lists.iter().flat_map(|l| l.iter());
        if sets().all(|s| codes.contains(&s.id.code.0)) {
            continue;
        }
        commit.remove_parts.push(part.id);
        let kept: Vec<Arc<Series>> = sets().filter(|s| codes.contains(&s.id.code.0)).cloned().collect();
        if !kept.is_empty() {
            let header = PartHeader { id: inner.files.next_id(), day, seq: part.seq, supersedes: vec![part.id] };
            let encoded = tag_parts::encode(&header, &kept)?;
            inner.segments.put(&encoded.part.path, encoded.bytes).await?;
            commit.add_parts.push(encoded.part);
        }
    }
    if commit.remove_parts.is_empty() {
        return Ok(());
    }
    publish(inner, commit, move |inner, version, commit| {
        inner.days.forget(day);
        let mut next = version.clone();
        next.parts = with_parts(&version.parts, &commit.add_parts, &commit.remove_parts);
        next
    })
    .await?;
    Ok(())
}

/// The tag sets that rows of a day have.
async fn codes(inner: &Inner, version: &Version, day: i32) -> Result<HashSet<i64, BuildHasherDefault<PassThrough>>> {
    let mut out = HashSet::default();
    for table in &version.tables {
        for file in table.files.iter().filter(|f| f.day == day) {
            out.extend(inner.segments.keys(&table.schema, file).await?.0.into_iter().map(|k| k.series));
        }
    }
    Ok(out)
}

/// The sets of one tag part that `filter` chooses, on the account of files.
async fn load(
    inner: &Inner,
    part: &Arc<TagPart>,
    filter: MetricFilter<'_>,
    held: &mut Reservation,
) -> Result<Vec<MetricSets>> {
    let mut admit = |bytes| {
        held.force(bytes);
        Ok(())
    };
    inner.parts.load(std::slice::from_ref(part), filter, &mut admit).await
}

/// What the sets of parts that are merged may take in memory.
fn merged_sets_max(memory_limit: usize) -> u64 {
    (memory_limit / 16 / tag_parts::SET_BYTES) as u64
}

/// Tag parts of a day that should become one now.
fn next_parts(inner: &Inner, scope: Scope) -> Option<Vec<Arc<TagPart>>> {
    let today = day_of(inner.now_ms());
    let version = inner.version();
    let mut days: BTreeMap<i32, Vec<Arc<TagPart>>> = BTreeMap::new();
    for p in version.parts.iter().filter(|p| scope.holds(p.seq, p.seq) && !inner.days.is_damaged(p.id)) {
        days.entry(p.day).or_default().push(p.clone());
    }
    let max = merged_sets_max(inner.memory.limit());
    days.into_iter().find_map(|(day, parts)| {
        let parts = smallest(parts, max);
        if scope.is_whole(day < today) {
            return (parts.len() >= 2).then_some(parts);
        }
        let parts = grown(parts);
        (parts.len() >= scope.batch(BATCH_PARTS)).then_some(parts)
    })
}

/// As many of the smallest parts as hold so many sets together.
fn smallest(mut parts: Vec<Arc<TagPart>>, sets_max: u64) -> Vec<Arc<TagPart>> {
    parts.sort_by_key(|p| (p.sets, p.id));
    let mut sets = 0;
    let fits = parts.iter().take_while(|p| {
        sets += p.sets;
        sets <= sets_max
    });
    let fits = fits.count();
    parts.truncate(fits);
    parts
}

/// Those of parts, by their size, that are worth a merge with the smaller ones.
fn grown(mut parts: Vec<Arc<TagPart>>) -> Vec<Arc<TagPart>> {
    let mut sets: u64 = parts.iter().map(|p| p.sets).sum();
    while let Some(greatest) = parts.last()
        && greatest.sets > GROWTH * (sets - greatest.sets)
    {
        sets -= greatest.sets;
        parts.pop();
    }
    parts
}

async fn merge_parts(inner: &Arc<Inner>, parts: &[Arc<TagPart>]) -> Result<()> {
    let supersedes: Vec<i64> = parts.iter().map(|p| p.id).collect();
    let header = PartHeader {
        id: inner.files.next_id(),
        day: parts.first().map_or(0, |p| p.day),
        seq: parts.iter().map(|p| p.seq).max().unwrap_or(0),
        supersedes: supersedes.clone(),
    };
    let mut held = inner.memory.reserve(Kind::Files);
    held.force(parts.iter().map(|p| p.sets as usize * tag_parts::SET_BYTES).sum());
    let merged = inner.parts.merge(&header, parts).await?;
    drop(held);
    inner.segments.put(&merged.part.path, merged.bytes).await?;
    let commit = Commit { add_parts: vec![merged.part], remove_parts: supersedes, ..Commit::default() };
    publish(inner, commit, |_, version, commit| {
        let mut next = version.clone();
        next.parts = with_parts(&version.parts, &commit.add_parts, &commit.remove_parts);
        next
    })
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files as (level, bytes), each of a flush of its own but those in `same`, which are cuts of one merge.
    fn check(files: &[(u8, u64)], same: usize, over: bool, scope: Scope, expected: Option<std::ops::Range<usize>>) {
        let files: Vec<Arc<DataFile>> = files
            .iter()
            .enumerate()
            .map(|(i, (level, bytes))| {
                let seq = i.saturating_sub(same) as u64;
                let (id, level, bytes) = (i as i64, *level, *bytes);
                Arc::new(DataFile { id, level, bytes, seq_min: seq, seq_max: seq, ..DataFile::default() })
            })
            .collect();
        let chosen = choose(&files, over, scope).map(|c| c.iter().map(|f| f.id).collect::<Vec<_>>());
        assert_eq!(chosen, expected.map(|r| r.map(|i| i as i64).collect()), "{files:?} over={over} {scope:?}");
    }

    fn of_sets(sets: &[u64]) -> Vec<Arc<TagPart>> {
        let part = |(id, sets): (i64, u64)| {
            let (path, bytes, footer_bytes) = (String::new(), 1, 1);
            Arc::new(TagPart { id, path, day: 0, sets, bytes, footer_bytes, seq: 0, crc32: 0 })
        };
        (0..).zip(sets.iter().copied()).map(part).collect()
    }

    #[test]
    fn parts_that_would_take_too_much_memory_stay_as_they_are() {
        let check = |sets: &[u64], expected: &[i64]| {
            assert_eq!(smallest(of_sets(sets), 100).iter().map(|p| p.id).collect::<Vec<_>>(), expected, "{sets:?}");
        };
        check(&[90, 10, 50, 40], &[1, 3, 2]);
        check(&[101, 60, 41], &[2]);
        check(&[101, 200], &[]);
        assert_eq!(merged_sets_max(64_000_000), 10_000);
    }

    #[test]
    fn parts_wait_until_smaller_ones_have_grown() {
        let check = |sets: &[u64], expected: usize| assert_eq!(grown(of_sets(sets)).len(), expected, "{sets:?}");
        check(&[], 0);
        check(&[7], 0);
        check(&[7, 7], 2);
        check(&[1, 1, 1, 12], 4);
        check(&[1, 1, 1, 13], 3);
        check(&[1, 1, 9, 45, 46], 5);
        check(&[1, 1, 9, 45, 225], 2);
        check(&[1, 1, 8, 40, 200, 1001], 5);
    }

    #[test]
    fn chooses_neighbours() {
        let scope = |whole| Scope { first: 0, last: u64::MAX, whole };
        let (all, due, beside) = (scope(Whole::All), scope(Whole::Over), scope(Whole::None));
        let flushed = [(0, 10); 7];
        check(&flushed[..1], 0, true, all, None);
        check(&flushed[..2], 0, true, due, Some(0..2));
        check(&flushed[..5], 0, false, due, None);
        check(&flushed, 0, false, due, Some(0..7));
        check(&[(0, 10); 63], 0, false, beside, None);
        check(&[(0, 10); 64], 0, false, beside, Some(0..64));
        // A merge of the day before and flushed files after it, while the day goes on.
        let mixed = [(1, 60), (0, 10), (0, 10), (0, 10), (0, 10), (0, 10), (0, 10)];
        check(&mixed[..6], 0, false, due, None);
        check(&mixed, 0, false, due, Some(1..7));
        check(&mixed, 0, true, due, Some(0..7));
        // Late rows of a day that was done: few are not worth it, unless asked for; many are merged among themselves.
        let late = [(2, 10_000), (0, 10), (0, 10), (0, 10), (0, 10), (0, 10), (0, 10)];
        check(&late[..3], 0, true, due, None);
        check(&late[..3], 0, true, all, Some(0..3));
        check(&late, 0, true, due, Some(1..7));
        check(&[(2, 100), (0, 90)], 0, true, due, Some(0..2));
        // One merge that was cut for size is settled.
        check(&[(2, 100), (2, 100), (2, 30)], 2, true, all, None);
        check(&[(2, 100), (2, 100), (0, 90)], 1, true, all, Some(0..3));
    }
}
