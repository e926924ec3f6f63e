//! Merges files: those of a table's day into one, or into few of a bounded size, sorted and with each key once.
//!
//! Inputs of a merge are neighbours in sequence within their table and day, so the newest row of a key wins whatever is
//! merged first. While a day goes on its flushed files are merged a batch at a time, once; when it is over and no late
//! row has come for a while, all of its files become one.

use std::collections::BTreeMap;
use std::sync::Arc;

use catalog::files::{Commit, DataFile, TagPart};
use catalog::{PartHeader, Result, TableSchema};

use crate::engine::Inner;
use crate::flush::{publish, store, with_files, with_parts};
use crate::memtable::read_schema;
use crate::scan::merge::{Merge, Source};
use crate::segment::{Cursor, Description, Key, Request, Writer, day_of, day_start_ms};

/// A file is finished when it has this many bytes. It is put together in memory.
const FILE_BYTES_MAX: usize = 128 << 20;

/// Flushed files of a day that are merged before the day is over.
const BATCH_FILES: usize = 6;

/// Tag parts of a day that are merged before the day is over.
const BATCH_PARTS: usize = 8;

/// A day is left alone for this long after its last flushed file.
const QUIET_MS: i64 = 10 * 60 * 1000;

/// Files smaller than this fraction of their day wait for more of them.
const WORTHWHILE: u64 = 16;

/// Compacts what is due and deletes superseded objects whose grace has passed.
pub(crate) async fn due(inner: &Arc<Inner>) -> Result<()> {
    run(inner, false).await
}

/// Compacts until nothing is left to do.
pub(crate) async fn all(inner: &Arc<Inner>) -> Result<()> {
    run(inner, true).await
}

async fn run(inner: &Arc<Inner>, all: bool) -> Result<()> {
    let _one = inner.days.compacting.lock().await;
    while let Some((table, files, level)) = next_merge(inner, all) {
        merge(inner, &table, &files, level).await?;
    }
    while let Some(parts) = next_parts(inner, all) {
        merge_parts(inner, &parts).await?;
    }
    clean(inner).await
}

/// Deletes objects that were superseded longer ago than any query runs.
async fn clean(inner: &Inner) -> Result<()> {
    let grace = inner.settings.delete_grace.as_millis() as i64;
    let gone = inner.files.purge(inner.now_ms() - grace).await?;
    for path in &gone {
        inner.segments.delete(path).await?;
    }
    if !gone.is_empty() {
        inner.files.forget(&gone).await?;
    }
    Ok(())
}

/// Files that should become one now, and its level.
fn next_merge(inner: &Inner, all: bool) -> Option<(Arc<TableSchema>, Vec<Arc<DataFile>>, u8)> {
    let version = inner.version();
    for table in &version.tables {
        let mut days: BTreeMap<i32, Vec<Arc<DataFile>>> = BTreeMap::new();
        for f in table.files.iter() {
            days.entry(f.day).or_default().push(f.clone());
        }
        for (day, mut files) in days {
            files.sort_by_key(|f| (f.seq_max, f.id));
            let over = all || day_is_over(inner, table.schema.id, day);
            if let Some(chosen) = choose(&files, over, all) {
                // Only what holds the whole day is done; the rest is merged once more.
                let level = if over && chosen.len() == files.len() { 2 } else { 1 };
                return Some((table.schema.clone(), chosen, level));
            }
        }
    }
    None
}

fn day_is_over(inner: &Inner, table_id: u16, day: i32) -> bool {
    let now_ms = inner.now_ms();
    day < day_of(now_ms)
        && now_ms - day_start_ms(day + 1) >= QUIET_MS
        && inner.days.changed(table_id, day).is_none_or(|t| now_ms - t >= QUIET_MS)
}

/// Which of a day's files, sorted by sequence, to merge.
fn choose(files: &[Arc<DataFile>], over: bool, all: bool) -> Option<Vec<Arc<DataFile>>> {
    if over {
        // Files of one merge that was cut for size have the same sequence range and disjoint keys.
        let settled =
            files.windows(2).all(|w| w[0].level == 2 && (w[0].seq_min, w[0].seq_max) == (w[1].seq_min, w[1].seq_max));
        if settled {
            return None;
        }
        let bytes = |f: &[Arc<DataFile>]| f.iter().map(|f| f.bytes).sum::<u64>();
        let done = files.iter().take_while(|f| f.level == 2).count();
        if done == 0 || all || bytes(&files[done..]) >= bytes(files) / WORTHWHILE {
            return Some(files.to_vec());
        }
        // A few late rows are not worth writing a large day again; among themselves they are.
        return (files.len() - done >= BATCH_FILES).then(|| files[done..].to_vec());
    }
    let mut runs = files.chunk_by(|a, b| (a.level == 0) == (b.level == 0));
    let run = runs.find(|run| run[0].level == 0 && run.len() >= BATCH_FILES)?;
    Some(run.to_vec())
}

async fn merge(inner: &Arc<Inner>, table: &Arc<TableSchema>, files: &[Arc<DataFile>], level: u8) -> Result<()> {
    let (Some(first), Some(last)) = (files.first(), files.last()) else { return Ok(()) };
    let mut keys: Vec<Key> = Vec::new();
    for f in files {
        keys.extend(inner.segments.keys(table, f).await?);
        keys.sort_unstable();
        keys.dedup();
    }
    let columns: Vec<usize> = (1..table.columns.len()).collect();
    let schema = read_schema(table, &columns);
    let request = Arc::new(Request {
        table: table.clone(),
        range: 0..keys.len(),
        keys: Arc::new(keys),
        start_ms: i64::MIN,
        end_ms: i64::MAX,
        columns,
    });
    let sources = files
        .iter()
        .map(|f| Source::File(Box::new(Cursor::new(inner.segments.clone(), f.clone(), request.clone()))))
        .collect();
    let mut merged = Merge::new(sources, schema, 1);
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
    while let Some(rows) = merged.next().await? {
        let current = match &mut writer {
            Some(writer) => writer,
            None => {
                writer.insert(Writer::new(table, Description { id: inner.files.next_id(), ..description.clone() })?)
            }
        };
        current.write(&request.keys, &rows)?;
        if current.bytes() >= FILE_BYTES_MAX
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

/// Tag parts of a day that should become one now.
fn next_parts(inner: &Inner, all: bool) -> Option<Vec<Arc<TagPart>>> {
    let today = day_of(inner.now_ms());
    let version = inner.version();
    let mut days: BTreeMap<i32, Vec<Arc<TagPart>>> = BTreeMap::new();
    for p in version.parts.iter() {
        days.entry(p.day).or_default().push(p.clone());
    }
    days.into_iter()
        .find(|(day, parts)| {
            let over = all || *day < today;
            parts.len() >= if over { 2 } else { BATCH_PARTS }
        })
        .map(|(_, parts)| parts)
}

async fn merge_parts(inner: &Arc<Inner>, parts: &[Arc<TagPart>]) -> Result<()> {
    let supersedes: Vec<i64> = parts.iter().map(|p| p.id).collect();
    let header = PartHeader {
        id: inner.files.next_id(),
        day: parts.first().map_or(0, |p| p.day),
        seq: parts.iter().map(|p| p.seq).max().unwrap_or(0),
        supersedes: supersedes.clone(),
    };
    let merged = inner.parts.merge(&header, parts).await?;
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
    fn check(files: &[(u8, u64)], same: usize, over: bool, all: bool, expected: Option<std::ops::Range<usize>>) {
        let files: Vec<Arc<DataFile>> = files
            .iter()
            .enumerate()
            .map(|(i, (level, bytes))| {
                let seq = i.saturating_sub(same) as u64;
                Arc::new(DataFile {
                    id: i as i64,
                    table_id: 1,
                    path: String::new(),
                    day: 0,
                    level: *level,
                    rows: 1,
                    bytes: *bytes,
                    footer_bytes: 0,
                    ts_min: 0,
                    ts_max: 0,
                    metric_min: 0,
                    metric_max: 0,
                    seq_min: seq,
                    seq_max: seq,
                    crc32: 0,
                    columns: vec![],
                })
            })
            .collect();
        let chosen = choose(&files, over, all).map(|c| c.iter().map(|f| f.id).collect::<Vec<_>>());
        assert_eq!(chosen, expected.map(|r| r.map(|i| i as i64).collect()), "{files:?} over={over} all={all}");
    }

    #[test]
    fn chooses_neighbours() {
        let flushed = [(0, 10); 7];
        check(&flushed[..1], 0, true, true, None);
        check(&flushed[..2], 0, true, false, Some(0..2));
        check(&flushed[..5], 0, false, false, None);
        check(&flushed, 0, false, false, Some(0..7));
        // A merge of the day before and flushed files after it, while the day goes on.
        let mixed = [(1, 60), (0, 10), (0, 10), (0, 10), (0, 10), (0, 10), (0, 10)];
        check(&mixed[..6], 0, false, false, None);
        check(&mixed, 0, false, false, Some(1..7));
        check(&mixed, 0, true, false, Some(0..7));
        // Late rows of a day that was done: few are not worth it, unless asked for; many are merged among themselves.
        let late = [(2, 10_000), (0, 10), (0, 10), (0, 10), (0, 10), (0, 10), (0, 10)];
        check(&late[..3], 0, true, false, None);
        check(&late[..3], 0, true, true, Some(0..3));
        check(&late, 0, true, false, Some(1..7));
        check(&[(2, 100), (0, 90)], 0, true, false, Some(0..2));
        // One merge that was cut for size is settled.
        check(&[(2, 100), (2, 100), (2, 30)], 2, true, true, None);
        check(&[(2, 100), (2, 100), (0, 90)], 1, true, true, Some(0..3));
    }
}
