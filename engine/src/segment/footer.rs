//! What a segment says of itself in the key-value metadata of its Parquet footer: what it is, what its row groups hold,
//! and a CRC-32 of every page. A last entry checks the others.

use parquet::file::metadata::{KeyValue, ParquetMetaData};
use serde::{Deserialize, Serialize};

use catalog::{Error, Result};

use super::FORMAT_VERSION;

const FORMAT: &str = "thalweg.format";
const FILE: &str = "thalweg.file";
const GROUPS: &str = "thalweg.row_groups";
const PAGES: &str = "thalweg.page_crc32";
const INDEX: &str = "thalweg.page_index";
const CHECK: &str = "thalweg.check";

/// What a segment is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Description {
    /// `DataFile::id`.
    pub id: i64,
    /// Name of the table.
    pub table: String,
    /// Number of the table.
    pub table_id: u16,
    /// Version of the table's schema.
    pub schema_version: u32,
    /// UTC day of all rows, days since the epoch.
    pub day: i32,
    /// 0 as flushed, 1 compacted to an hour, 2 compacted to a day.
    pub level: u8,
    /// First flush whose rows are in it.
    pub seq_min: u64,
    /// Last flush whose rows are in it.
    pub seq_max: u64,
    /// Ids of the files that it replaces.
    pub supersedes: Vec<i64>,
}

/// What a row group holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Group {
    pub rows: u32,
    pub metric_min: i64,
    pub metric_max: i64,
    pub ts_min: i64,
    pub ts_max: i64,
}

impl Group {
    /// Bounds that any row narrows.
    pub(super) fn empty() -> Self {
        Self { rows: 0, metric_min: i64::MAX, metric_max: i64::MIN, ts_min: i64::MAX, ts_max: i64::MIN }
    }
}

/// CRC-32 of the pages of one column chunk, a dictionary page first.
pub(crate) type ChunkSums = Vec<u32>;

/// The parsed entries.
#[derive(Debug)]
pub(crate) struct Manifest {
    pub description: Description,
    pub groups: Vec<Group>,
    /// By row group and leaf column.
    pub sums: Vec<Vec<ChunkSums>>,
}

/// The entries of a finished file, whose bytes up to the page index are `data`.
pub(super) fn entries(
    description: &Description,
    groups: &[Group],
    meta: &ParquetMetaData,
    data: &[u8],
) -> Result<Vec<KeyValue>> {
    use std::fmt::Write;
    let mut sums = String::new();
    for group in 0..meta.num_row_groups() {
        for leaf in 0..meta.row_group(group).num_columns() {
            for (start, end) in pages(meta, group, leaf)? {
                let page = data
                    .get(start as usize..end as usize)
                    .ok_or_else(|| Error::internal(format!("page {start}..{end} lies outside of the written file")))?;
                // Writing into a String does not fail.
                let _ = write!(sums, "{:08x}", crc32fast::hash(page));
            }
        }
    }
    let json = |e: serde_json::Error| Error::internal("segment footer can't be written").with_source(e);
    Ok(vec![
        KeyValue::new(FORMAT.to_owned(), FORMAT_VERSION.to_string()),
        KeyValue::new(FILE.to_owned(), serde_json::to_string(description).map_err(json)?),
        KeyValue::new(GROUPS.to_owned(), serde_json::to_string(groups).map_err(json)?),
        KeyValue::new(PAGES.to_owned(), sums),
    ])
}

/// Adds the check of the page index, which begins at byte `start`, and then the check of all entries.
pub(super) fn add_page_index(entries: &mut Vec<KeyValue>, start: usize, index: &[u8]) {
    entries.push(KeyValue::new(INDEX.to_owned(), format!("{start} {:08x}", crc32fast::hash(index))));
    entries.push(KeyValue::new(CHECK.to_owned(), check(entries)));
}

fn check(entries: &[KeyValue]) -> String {
    let mut crc = crc32fast::Hasher::new();
    for e in entries.iter().filter(|e| e.key != CHECK) {
        crc.update(e.key.as_bytes());
        crc.update(e.value.as_deref().unwrap_or("").as_bytes());
    }
    format!("{:08x}", crc.finalize())
}

/// Start and end of every page of a column chunk, a dictionary page first.
pub(super) fn pages(meta: &ParquetMetaData, group: usize, leaf: usize) -> Result<Vec<(u64, u64)>> {
    let bad = || Error::corrupt("segment has a damaged page index");
    let locations = &meta.offset_index().ok_or_else(bad)?.get(group).ok_or_else(bad)?.get(leaf).ok_or_else(bad)?;
    let (start, _) = chunk_range(meta, group, leaf)?;
    let mut out = Vec::with_capacity(locations.page_locations.len() + 1);
    for page in &locations.page_locations {
        let from = u64::try_from(page.offset).map_err(|_| bad())?;
        let len = u64::try_from(page.compressed_page_size).map_err(|_| bad())?;
        if out.is_empty() && from > start {
            out.push((start, from));
        }
        out.push((from, from.checked_add(len).ok_or_else(bad)?));
    }
    Ok(out)
}

/// Start and end of a column chunk. The library's own accessor panics on negative offsets.
fn chunk_range(meta: &ParquetMetaData, group: usize, leaf: usize) -> Result<(u64, u64)> {
    let c = meta.row_group(group).column(leaf);
    let start = c.dictionary_page_offset().unwrap_or_else(|| c.data_page_offset());
    match (u64::try_from(start), u64::try_from(c.compressed_size())) {
        (Ok(start), Ok(len)) if start.checked_add(len).is_some() => Ok((start, start + len)),
        _ => Err(Error::corrupt("segment has a damaged column chunk offset")),
    }
}

/// The entries, checked.
struct Entries<'a>(&'a [KeyValue]);

impl<'a> Entries<'a> {
    fn of(meta: &'a ParquetMetaData) -> Result<Self> {
        let entries = Self(meta.file_metadata().key_value_metadata().map(Vec::as_slice).unwrap_or_default());
        let ours: Vec<KeyValue> = entries.0.iter().filter(|e| e.key.starts_with("thalweg.")).cloned().collect();
        if check(&ours) != entries.get(CHECK)? {
            return Err(Error::corrupt("segment footer fails its check"));
        }
        let format: u32 = entries.get(FORMAT)?.parse().map_err(|_| Error::corrupt("segment format is not a number"))?;
        if format != FORMAT_VERSION {
            return Err(Error::invalid(format!(
                "segment has format {format}, which this version does not know; it reads {FORMAT_VERSION}"
            )));
        }
        Ok(entries)
    }

    fn get(&self, key: &str) -> Result<&'a str> {
        let entry = self.0.iter().find(|e| e.key == key).and_then(|e| e.value.as_deref());
        entry.ok_or_else(|| Error::corrupt(format!("segment footer lacks {key}")))
    }
}

/// Where the page index begins, and its CRC-32.
///
/// # Errors
/// As [`parse`].
pub(super) fn page_index(meta: &ParquetMetaData) -> Result<(u64, u32)> {
    let bad = || Error::corrupt("segment footer has a damaged place of the page index");
    let (start, sum) = Entries::of(meta)?.get(INDEX)?.split_once(' ').ok_or_else(bad)?;
    Ok((start.parse().map_err(|_| bad())?, u32::from_str_radix(sum, 16).map_err(|_| bad())?))
}

/// Parses and checks the entries of a footer.
///
/// # Errors
/// `Corrupt` when they are not what was written; `Invalid` when a newer version wrote them.
pub(super) fn parse(meta: &ParquetMetaData) -> Result<Manifest> {
    let entries = Entries::of(meta)?;
    let json = |e: serde_json::Error| Error::corrupt("segment footer does not parse").with_source(e);
    let description: Description = serde_json::from_str(entries.get(FILE)?).map_err(json)?;
    let groups: Vec<Group> = serde_json::from_str(entries.get(GROUPS)?).map_err(json)?;
    let same = groups.len() == meta.num_row_groups()
        && groups.iter().zip(meta.row_groups()).all(|(g, m)| i64::from(g.rows) == m.num_rows());
    if !same {
        return Err(Error::corrupt("segment footer disagrees with itself on its row groups"));
    }
    let mut text = entries.get(PAGES)?;
    let mut sums = Vec::with_capacity(groups.len());
    for group in 0..groups.len() {
        let mut chunks = Vec::new();
        for leaf in 0..meta.row_group(group).num_columns() {
            let mut chunk = ChunkSums::new();
            for _ in 0..pages(meta, group, leaf)?.len() {
                let short = || Error::corrupt("segment footer lacks page checks");
                let (head, tail) = text.split_at_checked(8).ok_or_else(short)?;
                chunk.push(u32::from_str_radix(head, 16).map_err(|_| short())?);
                text = tail;
            }
            chunks.push(chunk);
        }
        sums.push(chunks);
    }
    if !text.is_empty() {
        return Err(Error::corrupt("segment footer has more page checks than pages"));
    }
    Ok(Manifest { description, groups, sums })
}
