//! Merges files: those of a table's day into one, or into few of a bounded size, sorted and with each key once.
//!
//! Inputs of a merge are neighbours in sequence within their table and day, so the newest row of a key wins whatever is
//! merged first. While a day goes on its flushed files are merged a batch at a time, once; when it is over and no late
//! row has come for a while, all of its files become one.
//!
//! A round of this may take long, since days are large and a delete may concern many files. What flushes leave meanwhile is
//! merged between its steps, so that the number of files and tag parts stays bounded however long the round is.
//!
//! A *run* is the files of one merge, which was cut for size: they stand for the same flushes and have no key in common.
//! A file of a flush is a run by itself. A merge takes runs as a whole, two at least, so their number falls with each
//! merge, which bounds the work. A run that is too much for a merge together with the next one is left as it is from then
//! on, and parts what is before it from what is after it.
//!
//! Every merge leaves out what deletes and retention take. Files that no merge would touch are written again for them
//! alone: for deletes once none has come for a while, for retention once a rule has outlived all of their rows.

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};
use std::hash::BuildHasherDefault;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use catalog::files::{Commit, DataFile, TagPart};
use catalog::registry::PassThrough;
use catalog::tag_parts::MetricSets;
use catalog::{Error, ErrorKind, MetricFilter, PartHeader, Result, Series, TableSchema, tag_parts};
use tokio::time::Instant;

use crate::cut::Taken;
use crate::delete::Tombstone;
use crate::engine::Inner;
use crate::flush::{publish, store, with_files, with_parts};
use crate::memory::{Kind, Reservation};
use crate::memtable::{Memtable, read_schema};
use crate::scan::merge::{Merge, Source};
use crate::segment::{Cursor, Description, Key, Request, Writer, day_of, day_start_ms};
use crate::version::{TableVersion, Version};
use crate::{orphans, retention};

/// A file is finished when it has this many bytes, or fewer where there is little memory. It is put together there.
const FILE_BYTES_MAX: usize = 128 << 20;

fn file_bytes_max(inner: &Inner) -> usize {
    FILE_BYTES_MAX.min(inner.settings.memory_limit / 16)
}

/// Runs that flushes left of a day that are merged before the day is over.
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

/// Runs smaller than this fraction of their day wait for more of them.
const WORTHWHILE: u64 = 16;

/// A table's deletes are folded in together when none has come for this long.
const FOLD_QUIET_MS: u64 = 10 * 60 * 1000;

/// So many are folded in while more come: each costs every query of its table some time.
const FOLD_WAITING: usize = 1000;

/// Files that are looked at in one round for rows to leave out: the first look reads a file's index.
const FOLD_FILES: usize = 256;

/// How often superseded objects are deleted during a round.
const CLEAN_INTERVAL: Duration = Duration::from_secs(60);

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
    let mut round = Round::new(inner, true);
    let folded = round.fold().await;
    folded.and(round.prune().await)
}

async fn run(inner: &Arc<Inner>, all: bool) -> Result<()> {
    let _one = inner.days.compacting.lock().await;
    if all {
        inner.days.forget_wide();
    }
    let result = Round::new(inner, all).run().await;
    inner.days.tight.store(result.is_err(), Ordering::Relaxed);
    result
}

/// Which files and tag parts are merged, and how far.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scope {
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

/// The present version without its memtables: what is looked at for minutes must not keep them in memory.
fn stored(inner: &Inner) -> Version {
    let mut version = Version::clone(&inner.version());
    for table in &mut version.tables {
        table.active = Arc::new(Memtable::new(table.schema.clone()));
        table.flushing.clear();
    }
    version
}

/// A look for work, and what it has met so far.
pub(crate) struct Round<'a> {
    inner: &'a Arc<Inner>,
    /// Whether nothing is to be left to do.
    all: bool,
    /// Files that are looked at for rows to leave out.
    pub folds_max: usize,
    /// The newest flush when it began.
    newest: u64,
    /// When superseded objects were last deleted.
    cleaned: Instant,
    /// Days of tables, by number, that can't be merged.
    skipped: BTreeSet<(u16, i32)>,
}

/// A file that may hold rows which a delete or retention takes.
struct Fold {
    table: Arc<TableSchema>,
    file: Arc<DataFile>,
    /// What it is looked at for.
    checked: Checked,
    /// The last number up to which it is known to hold no row of any delete.
    known: i64,
}

impl<'a> Round<'a> {
    pub fn new(inner: &'a Arc<Inner>, all: bool) -> Self {
        let folds_max = if all { usize::MAX } else { FOLD_FILES };
        Self { inner, all, folds_max, newest: newest(inner), cleaned: Instant::now(), skipped: BTreeSet::new() }
    }

    async fn run(mut self) -> Result<()> {
        let inner = self.inner;
        retention::observe(inner);
        // First what frees space without taking any.
        clean(inner).await?;
        retention::drop_files(inner).await?;
        let merged = self.merge_and_fold().await;
        // Also when that failed: tag sets of which the last row is gone would be shown for as long as it fails.
        merged.and(self.prune().await)?;
        while self.merge_parts(self.scope()).await? {}
        orphans::sweep(inner).await
    }

    /// What was flushed before the round began.
    pub fn scope(&self) -> Scope {
        Scope { first: 0, last: self.newest, whole: if self.all { Whole::All } else { Whole::Over } }
    }

    async fn merge_and_fold(&mut self) -> Result<()> {
        let scope = self.scope();
        if self.inner.days.tight.load(Ordering::Relaxed) {
            // Perhaps for want of space: what leaves rows out gives back more than it takes.
            self.fold().await?;
        } else {
            // Whatever leaves rows out looks through all tag parts.
            while self.merge_parts(scope).await? {}
        }
        while self.merge_files(scope).await? {
            self.keep_up().await?;
        }
        self.fold().await
    }

    /// Merges what flushes have left since it began. One merge may take a while, and many take long: until the last is done
    /// every query would look through each of those small files and tag parts, and so would every other merge. What was
    /// superseded is deleted meanwhile, so that a long round needs no more space than short ones.
    pub async fn keep_up(&mut self) -> Result<()> {
        if self.cleaned.elapsed() >= CLEAN_INTERVAL {
            clean(self.inner).await?;
            self.cleaned = Instant::now();
        }
        let scope = Scope { first: self.newest + 1, last: newest(self.inner), whole: Whole::None };
        while self.merge_files(scope).await? {}
        while self.merge_parts(scope).await? {}
        Ok(())
    }

    /// Merges files that should become one; false when there are none.
    pub async fn merge_files(&mut self, scope: Scope) -> Result<bool> {
        let Some((table, files, level)) = next_merge(self.inner, scope, &self.skipped) else { return Ok(false) };
        if let Err(e) = merge(self.inner, &table, &files, level).await
            && !set_aside_files(self.inner, &table, &files, e).await?
        {
            self.skipped.extend(files.iter().map(|f| (table.id, f.day)));
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
    pub async fn fold(&mut self) -> Result<()> {
        let inner = self.inner;
        for Fold { table, file, checked, .. } in self.to_fold() {
            match fold_file(inner, &table, &file).await {
                Ok(true) => {}
                Ok(false) => {
                    inner.days.checked.lock().insert(file.id, checked);
                }
                // It stays as it is, and so do the deletes that concern it.
                Err(e) => {
                    set_aside_files(inner, &table, std::slice::from_ref(&file), e).await?;
                }
            }
            self.keep_up().await?;
        }
        forget_deletes(inner).await
    }

    /// Files that are to be looked at for rows to leave out, the smallest first.
    fn to_fold(&self) -> Vec<Fold> {
        let inner = self.inner;
        let version = inner.version();
        inner.days.keep_files(&version.tables.iter().flat_map(|t| t.files.iter().map(|f| f.id)).collect());
        let mut found = Vec::new();
        for table in &version.tables {
            let quiet = |t: &Arc<Tombstone>| inner.now_ms().abs_diff(t.delete.created_ms) >= FOLD_QUIET_MS;
            let due = self.all || table.deletes.len() >= FOLD_WAITING || table.deletes.iter().all(quiet);
            for file in table.files.iter().filter(|f| f.seq_max <= self.newest && !inner.days.is_damaged(f.id)) {
                let delete = table.deletes.iter().rev().find(|t| due && t.concerns(file)).map_or(0, |t| t.delete.id);
                let floors = table.floors.passed(file.ts_max);
                let seen = inner.days.checked.lock().get(&file.id).copied().unwrap_or_default();
                if seen.floors & floors == floors && seen.delete >= delete {
                    continue;
                }
                let (table, file, checked) = (table.schema.clone(), file.clone(), Checked { floors, delete });
                found.push(Fold { known: seen.delete.max(file.id), table, file, checked });
            }
        }
        // Each has its turn while deletes keep coming, of which the first could never be forgotten otherwise.
        found.sort_by_key(|f| f.known);
        found.truncate(self.folds_max);
        found.sort_by_key(|f| f.file.bytes);
        found
    }

    /// Writes the tag parts of days that lost rows, or that have none, again without the sets that no row of the day has.
    async fn prune(&mut self) -> Result<()> {
        let inner = self.inner;
        let version = stored(inner);
        let mut days = inner.days.lost.lock().clone();
        let filled: HashSet<i32> = version.tables.iter().flat_map(|t| t.files.iter().map(|f| f.day)).collect();
        days.extend(version.parts.iter().map(|p| p.day).filter(|day| !filled.contains(day)));
        for day in days {
            if let Err(e) = prune_now(inner, &version, day).await {
                if e.kind() != ErrorKind::Corrupt {
                    return Err(e);
                }
                tracing::warn!(error = %e, day, "tag sets of a day are kept, since it can't be known which ones its rows have");
            }
            inner.days.lost.lock().remove(&day);
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
        for (day, files) in days {
            let over = scope.is_whole(day_is_over(inner, table.schema.id, day));
            for files in neighbours(files, |f| inner.days.is_damaged(f.id) || inner.days.is_wide(f.id)) {
                let Some(chosen) = choose(&files, over, scope) else { continue };
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

/// Whether two files are of one run.
fn of_one_run(a: &Arc<DataFile>, b: &Arc<DataFile>) -> bool {
    (a.seq_min, a.seq_max) == (b.seq_min, b.seq_max)
}

/// A day's files, sorted by sequence, in the groups that may be merged. Only neighbours are, so a file that has to stay
/// as it is parts those before it from those after it. Its run stays with it: a merge of the others would count as newer
/// than it, and might hold older rows.
fn neighbours(mut files: Vec<Arc<DataFile>>, stays: impl Fn(&Arc<DataFile>) -> bool) -> Vec<Vec<Arc<DataFile>>> {
    files.sort_by_key(|f| (f.seq_max, f.id));
    let runs: Vec<&[Arc<DataFile>]> = files.chunk_by(of_one_run).collect();
    runs.split(|run| run.iter().any(&stays)).map(|runs| runs.concat()).collect()
}

/// Which of a day's files, sorted by sequence, to merge: two runs or more.
fn choose(files: &[Arc<DataFile>], over: bool, scope: Scope) -> Option<Vec<Arc<DataFile>>> {
    let runs: Vec<&[Arc<DataFile>]> = files.chunk_by(of_one_run).collect();
    if over {
        if runs.len() < 2 {
            return None;
        }
        let bytes = |runs: &[&[Arc<DataFile>]]| runs.iter().copied().flatten().map(|f| f.bytes).sum::<u64>();
        let done = runs.iter().take_while(|run| run[0].level == 2).count();
        if done == 0 || scope.whole == Whole::All || bytes(&runs[done..]) >= bytes(&runs) / WORTHWHILE {
            return Some(files.to_vec());
        }
        // A few late rows are not worth writing a large day again; among themselves they are.
        return (runs.len() - done >= BATCH_FILES).then(|| runs[done..].concat());
    }
    let mut alike = runs.chunk_by(|a, b| (a[0].level == 0) == (b[0].level == 0));
    let flushed = alike.find(|runs| runs[0][0].level == 0 && runs.len() >= scope.batch(BATCH_FILES))?;
    Some(flushed.concat())
}

/// A merge that is about to begin.
struct Inputs<'a> {
    table: &'a Arc<TableSchema>,
    /// The first run of those asked for, and as many more as have few enough series with it and take little enough
    /// memory to read. A run is taken whole: what was left of it would count as older than the output, which might hold
    /// older rows.
    files: &'a [Arc<DataFile>],
    /// For the keys, and for what is held of each file while it is read.
    _held: Reservation,
    /// Numbers for its outputs: greater than those of all deletes that it sees, less than those of all others.
    ids: VecDeque<i64>,
    request: Request,
    taken: Option<Taken>,
}

impl<'a> Inputs<'a> {
    /// `None` when of several runs not even the first two can be merged.
    async fn new(inner: &Inner, table: &'a Arc<TableSchema>, files: &'a [Arc<DataFile>]) -> Result<Option<Self>> {
        let (ids, version) = {
            let _ids = inner.days.deleting.lock().await;
            let outputs = 4 + files.iter().map(|f| f.bytes).sum::<u64>() / (file_bytes_max(inner) as u64 / 2).max(1);
            ((0..outputs).map(|_| inner.files.next_id()).collect(), stored(inner))
        };
        let max = merged_keys_max(inner.memory.limit());
        let mut held = inner.memory.reserve(Kind::Files);
        let mut keys: Vec<Key> = Vec::new();
        let (mut runs, mut taken, mut reading, mut needed) = (0, 0, 0, 0);
        'runs: for run in files.chunk_by(of_one_run) {
            let (mut more, mut bytes) = (Vec::new(), 0);
            for (i, f) in run.iter().enumerate() {
                let (keys_of_file, bytes_of_file) = inner.segments.keys(table, f).await?;
                more.extend(keys_of_file);
                bytes += bytes_of_file;
                // Two files can always be read.
                let too_much = reading + bytes > inner.memory.limit() / 8 && taken + i >= 2;
                if taken > 0 && (too_much || keys.len() + more.len() > max) {
                    break 'runs;
                }
            }
            reading += bytes;
            needed += more.len() * (size_of::<Key>() + size_of::<u32>()) + bytes;
            keys.extend(more);
            keys.sort_unstable();
            keys.dedup();
            (runs, taken) = (runs + 1, taken + run.len());
        }
        if runs < 2 && taken < files.len() {
            return Ok(None);
        }
        let files = &files[..taken];
        held.force(needed);
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
        Ok(Some(Self { table, files, _held: held, ids, request, taken }))
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
        if self.taken.is_some() {
            // First, so that it is known whoever goes away while the commit is under way.
            inner.days.lost.lock().insert(first.day);
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

/// Merges files, or the first runs if all are too much. The first run is left as it is from now on when it is too much
/// together with the second.
async fn merge(inner: &Arc<Inner>, table: &Arc<TableSchema>, files: &[Arc<DataFile>], level: u8) -> Result<()> {
    let Some(inputs) = Inputs::new(inner, table, files).await? else {
        let first = files.chunk_by(of_one_run).next().unwrap_or_default();
        tracing::debug!(table = table.name, day = files[0].day, files = first.len(), "files too many to merge");
        inner.days.set_wide(first);
        return Ok(());
    };
    let level = if inputs.files.len() < files.len() { level.min(1) } else { level };
    inputs.merge(inner, level).await
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
    let Some(inputs) = Inputs::new(inner, table, std::slice::from_ref(file)).await? else { return Ok(false) };
    let loses = inputs.loses(inner).await?;
    if loses {
        inputs.merge(inner, file.level).await?;
    }
    Ok(loses)
}

/// Takes deletes out of the catalog that no file needs.
async fn forget_deletes(inner: &Arc<Inner>) -> Result<()> {
    let version = stored(inner);
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
    let version = stored(inner);
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
    use proptest::prelude::*;

    use super::*;

    /// Files of runs that are (level, bytes of a file, files).
    fn of_runs(runs: &[(u8, u64, usize)]) -> Vec<Arc<DataFile>> {
        let files = (0..).zip(runs).flat_map(|(seq, run)| std::iter::repeat_n((seq, run.0, run.1), run.2));
        let file =
            |(id, (seq, level, bytes))| DataFile { id, level, bytes, seq_min: seq, seq_max: seq, ..<_>::default() };
        (0..).zip(files).map(file).map(Arc::new).collect()
    }

    fn check(runs: &[(u8, u64, usize)], over: bool, scope: Scope, expected: Option<std::ops::Range<i64>>) {
        let chosen = choose(&of_runs(runs), over, scope).map(|c| c.iter().map(|f| f.id).collect::<Vec<_>>());
        assert_eq!(chosen, expected.map(|ids| ids.collect()), "{runs:?} over={over} {scope:?}");
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

    fn scope(whole: Whole) -> Scope {
        Scope { first: 0, last: u64::MAX, whole }
    }

    #[test]
    fn chooses_neighbours() {
        let (all, due, beside) = (scope(Whole::All), scope(Whole::Over), scope(Whole::None));
        let flushed = [(0, 10, 1); 7];
        check(&flushed[..1], true, all, None);
        check(&flushed[..2], true, due, Some(0..2));
        check(&flushed[..5], false, due, None);
        check(&flushed, false, due, Some(0..7));
        check(&[(0, 10, 1); 63], false, beside, None);
        check(&[(0, 10, 1); 64], false, beside, Some(0..64));
        // A merge of the day before and flushed files after it, while the day goes on.
        let mixed = [(1, 60, 1), (0, 10, 1), (0, 10, 1), (0, 10, 1), (0, 10, 1), (0, 10, 1), (0, 10, 1)];
        check(&mixed[..6], false, due, None);
        check(&mixed, false, due, Some(1..7));
        check(&mixed, true, due, Some(0..7));
        // Late rows of a day that was done: few are not worth it, unless asked for; many are merged among themselves.
        let late = [(2, 10_000, 1), (0, 10, 1), (0, 10, 1), (0, 10, 1), (0, 10, 1), (0, 10, 1), (0, 10, 1)];
        check(&late[..3], true, due, None);
        check(&late[..3], true, all, Some(0..3));
        check(&late, true, due, Some(1..7));
        check(&[(2, 100, 1), (0, 90, 1)], true, due, Some(0..2));
        // One merge that was cut for size is settled, whatever it was a merge of; how often it was cut means nothing.
        check(&[(2, 100, 3)], true, all, None);
        check(&[(1, 100, 3)], true, all, None);
        check(&[(2, 100, 2), (0, 90, 1)], true, all, Some(0..3));
        check(&[(2, 10_000, 4), (1, 10, 6)], true, due, None);
        check(&[(0, 10, 6)], false, due, None);
        // What could not be merged for want of memory before the start is not looked at without being asked for.
        check(&[(2, 100, 3), (2, 100, 3)], true, due, None);
        check(&[(2, 100, 3), (2, 100, 3)], true, all, Some(0..6));
    }

    #[test]
    fn a_run_stays_as_a_whole() {
        let check = |stays: &[i64], expected: &[&[i64]]| {
            let files = of_runs(&[(0, 1, 1), (1, 1, 3), (0, 1, 1), (0, 1, 1)]);
            let groups = neighbours(files, |f| stays.contains(&f.id));
            let ids: Vec<Vec<i64>> = groups.iter().map(|g| g.iter().map(|f| f.id).collect()).collect();
            assert_eq!(ids, expected, "{stays:?}");
        };
        check(&[], &[&[0, 1, 2, 3, 4, 5]]);
        check(&[2], &[&[0], &[4, 5]]);
        check(&[1, 3], &[&[0], &[4, 5]]);
        check(&[0, 4], &[&[], &[1, 2, 3], &[5]]);
    }

    proptest! {
        /// Merges that have room for some files only, until there are none: each makes fewer runs or leaves one alone,
        /// and what they make are neighbours that were merged whole.
        #[test]
        fn merges_end(
            runs in prop::collection::vec((0u8..3, 1u64..100, 1usize..6), 1..12),
            damaged in prop::collection::btree_set(0i64..12, 0..3),
            room in 1usize..12,
            over in any::<bool>(),
            whole in prop::sample::select(vec![Whole::All, Whole::Over, Whole::None]),
        ) {
            let mut files = of_runs(&runs);
            let (bytes, mut next_id) = (files.iter().map(|f| f.bytes).sum::<u64>(), files.len() as i64);
            let mut wide = HashSet::new();
            let mut steps = 0;
            loop {
                let stays = |f: &Arc<DataFile>| damaged.contains(&f.id) || wide.contains(&f.id);
                let over = scope(whole).is_whole(over);
                let next = neighbours(files.clone(), stays).iter().find_map(|f| choose(f, over, scope(whole)));
                let Some(chosen) = next else { break };
                steps += 1;
                let mut taken = vec![];
                for run in chosen.chunk_by(of_one_run) {
                    if !taken.is_empty() && taken.len() + run.len() > room {
                        break;
                    }
                    taken.extend_from_slice(run);
                }
                if taken.chunk_by(of_one_run).count() < 2 {
                    wide.extend(taken.iter().map(|f| f.id));
                    continue;
                }
                files.retain(|f| !taken.iter().any(|t| t.id == f.id));
                let cuts = (taken.len() as u64).div_ceil(2);
                let sum = taken.iter().map(|f| f.bytes).sum::<u64>();
                for cut in 0..cuts {
                    let bytes = sum / cuts + if cut == 0 { sum % cuts } else { 0 };
                    let (seq_min, seq_max) = (taken[0].seq_min, taken[taken.len() - 1].seq_max);
                    files.push(Arc::new(DataFile { id: next_id, level: 1, bytes, seq_min, seq_max, ..<_>::default() }));
                    next_id += 1;
                }
            }
            prop_assert!(steps <= 2 * runs.len(), "{steps} steps");
            prop_assert_eq!(files.iter().map(|f| f.bytes).sum::<u64>(), bytes);
            files.sort_by_key(|f| (f.seq_max, f.id));
            for (a, b) in files.iter().zip(&files[1..]) {
                prop_assert!(of_one_run(a, b) || a.seq_max < b.seq_min, "{a:?} {b:?}");
            }
        }
    }
}
