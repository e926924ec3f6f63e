//! Reads everything that a database stores and compares it with everything that is said of it: checksums, the statistics
//! of the file catalog, the order of rows, and whether the tag sets that rows refer to are there.
//!
//! It changes nothing, so it may run beside the server. What it finds is a list, not an error: one damaged file does not
//! hide the next.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use catalog::files::{DataFile, State, TagPart};
use catalog::registry::HashedMap;
use catalog::{Error, ErrorKind, FileSystem, Registry, Result, Series, TagHasher, TagParts, tables};
use futures::TryStreamExt;
use object_store::ObjectStore;
use object_store::path::Path;

use crate::segment::Segments;
use crate::wal::{Item, Replay, Storage};

/// Something that is not as it was written.
#[derive(Debug, Clone)]
pub struct Damage {
    /// Id of the file or tag part.
    pub id: i64,
    /// What is wrong, naming the object.
    pub what: String,
}

/// What was read and found.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Data files.
    pub files: u64,
    /// Rows in them.
    pub rows: u64,
    /// Tag parts.
    pub parts: u64,
    /// Tag sets in them; one set may be in several.
    pub sets: u64,
    /// Bytes of all these objects.
    pub bytes: u64,
    /// Damaged and missing objects, and rows without tag sets.
    pub damage: Vec<Damage>,
    /// Objects that nothing names: left by a crash, or about to be named by a flush that is under way.
    pub orphans: Vec<String>,
}

/// Codes of metric and target, by code of the series.
type Sets = HashedMap<i64, (i64, i64)>;

/// Checks all objects that `state` names, and lists those of the database that it does not. `progress` is told the bytes
/// of each object once it was read.
///
/// # Errors
/// Of the store, when it can't be asked; damage is in the report.
pub async fn verify(
    store: &Arc<dyn ObjectStore>,
    database: &str,
    state: &State,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<Report> {
    let registry = Arc::new(Registry::new(TagHasher::new(state.seed), 0));
    let objects = Objects {
        segments: Segments::new(store.clone(), database, 0),
        parts: TagParts::new(store.clone(), database, registry, 0),
        progress,
    };
    let mut days: BTreeMap<i32, (Vec<&DataFile>, Vec<&TagPart>)> = BTreeMap::new();
    for file in &state.files {
        days.entry(file.day).or_default().0.push(file);
    }
    for part in &state.parts {
        days.entry(part.day).or_default().1.push(part);
    }
    let mut report = Report::default();
    for (files, parts) in days.values() {
        // A day's rows find all of their tag sets in the parts of that day.
        let sets = objects.sets(parts, &mut report).await?;
        for file in files {
            objects.file(file, sets.as_ref(), &mut report).await?;
        }
    }
    report.orphans = orphans(store, database, state).await?;
    Ok(report)
}

struct Objects<'a> {
    segments: Segments,
    parts: TagParts,
    progress: &'a (dyn Fn(u64) + Send + Sync),
}

impl Objects<'_> {
    /// The sets of a day; `None` when some can't be read, and nothing can be said of what refers to them.
    async fn sets(&self, parts: &[&TagPart], report: &mut Report) -> Result<Option<Sets>> {
        let mut sets = Some(Sets::default());
        for part in parts {
            let checked = self.parts.check(part).await;
            (self.progress)(part.bytes);
            report.parts += 1;
            report.bytes += part.bytes;
            match checked {
                Ok(found) => {
                    report.sets += found.len() as u64;
                    let keys = found.iter().map(|s| s.storage_key());
                    if let Some(sets) = &mut sets {
                        sets.extend(keys.map(|(metric, target, series)| (series, (metric, target))));
                    }
                }
                Err(e) => {
                    damaged(part.id, e, report)?;
                    sets = None;
                }
            }
        }
        Ok(sets)
    }

    async fn file(&self, file: &DataFile, sets: Option<&Sets>, report: &mut Report) -> Result<()> {
        let checked = match tables::all().into_iter().find(|t| t.id == file.table_id) {
            Some(table) => self.segments.check(table, file).await,
            None => {
                Err(Error::corrupt(format!("segment {} is of table {}, which is unknown", file.path, file.table_id)))
            }
        };
        (self.progress)(file.bytes);
        report.files += 1;
        report.rows += file.rows;
        report.bytes += file.bytes;
        let keys = match checked {
            Ok(keys) => keys,
            Err(e) => return damaged(file.id, e, report),
        };
        let Some(sets) = sets else { return Ok(()) };
        let strays: Vec<_> = keys.iter().filter(|k| sets.get(&k.series) != Some(&(k.metric, k.target))).collect();
        if let Some(first) = strays.first() {
            let what = format!(
                "segment {}: {} of {} series have no tag set in the parts of day {}, or one of another metric; the first \
                 is {:#018x}",
                file.path,
                strays.len(),
                keys.len(),
                file.day,
                first.series
            );
            report.damage.push(Damage { id: file.id, what });
        }
        Ok(())
    }
}

/// Notes what a check found; what only says that the store could not be asked ends all.
fn damaged(id: i64, e: Error, report: &mut Report) -> Result<()> {
    match e.kind() {
        ErrorKind::Corrupt | ErrorKind::Invalid | ErrorKind::NotFound => {
            report.damage.push(Damage { id, what: e.to_string() });
            Ok(())
        }
        _ => Err(e),
    }
}

/// Objects in the folders of tables and tag parts that the state does not name, not even as superseded.
async fn orphans(store: &Arc<dyn ObjectStore>, database: &str, state: &State) -> Result<Vec<String>> {
    let files = state.files.iter().map(|f| &f.path);
    let superseded = state.superseded.iter().map(|(path, _)| path);
    let named: HashSet<&String> = files.chain(state.parts.iter().map(|p| &p.path)).chain(superseded).collect();
    let mut found = Vec::new();
    for folder in tables::all().iter().map(|t| t.name).chain(["tag_sets"]) {
        let folder = Path::from(format!("{database}/{folder}"));
        let mut objects = store.list(Some(&folder));
        while let Some(object) = objects.try_next().await? {
            let path = object.location.as_ref();
            let relative = path.strip_prefix(database).and_then(|p| p.strip_prefix('/')).unwrap_or(path).to_owned();
            if !named.contains(&relative) {
                found.push(relative);
            }
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// What a log holds.
#[derive(Debug, Clone, Default)]
pub struct LogReport {
    /// Files.
    pub segments: u64,
    /// Records, each the accepted part of a request.
    pub records: u64,
    /// Rows in them.
    pub rows: u64,
    /// Damaged places and lost records, naming the file.
    pub damage: Vec<String>,
    /// Bytes at the end that a crash cut short; they were never acknowledged.
    pub torn: u64,
}

/// Reads the log in a data folder, which no server may be using.
///
/// # Errors
/// Of the file system; `Invalid` for a log of a newer version.
pub async fn log(fs: Arc<dyn FileSystem>, data_dir: &std::path::Path, seed: u64) -> Result<LogReport> {
    let registry = Registry::new(TagHasher::new(seed), usize::MAX);
    let mut publish = |tags| registry.publish(&Arc::new(Series::new(registry.hasher(), tags)), &[], 0);
    let mut report = LogReport::default();
    let mut log = Replay::open(Storage::local(fs, &data_dir.join("wal")), 0).await?;
    while let Some(item) = log.next(&mut publish).await? {
        match item {
            Item::Record(_, record) => {
                report.records += 1;
                report.rows += record.batches.iter().map(|b| b.rows.num_rows() as u64).sum::<u64>();
            }
            Item::Lost(name, position, e) => report.damage.push(format!("{name}: record at {position} is lost: {e}")),
            Item::Damage(d) if d.tail => report.torn += d.end - d.start,
            Item::Damage(d) => report.damage.push(format!("{}: bytes {} to {} are damaged", d.chunk, d.start, d.end)),
        }
    }
    report.segments = log.segments() as u64;
    Ok(report)
}
