//! The SQL file catalog: which immutable files make up each table.
//!
//! Its tables follow the DuckLake 1.0 layout, so that DuckDB can attach it and read the files with decoded names, with
//! typed side tables (`thalweg_*`) for what our own planner asks. `catalog/FORMAT.md` describes them. One writer per
//! database: every change goes through one [`FileCatalog`] and is one transaction. Nothing here is the truth: the object
//! store is, and the catalog can be made again from it.

use std::path::Path;

use crate::{Error, Result};

/// An immutable file of a table.
#[derive(Debug, Clone, PartialEq)]
pub struct DataFile {
    /// Number, unique over all files and tag parts of the database.
    pub id: i64,
    /// [`crate::TableSchema::id`].
    pub table_id: u16,
    /// Object path relative to the database's prefix.
    pub path: String,
    /// UTC day of all its rows, days since the epoch.
    pub day: i32,
    /// 0 as flushed, 1 compacted to an hour, 2 compacted to a day.
    pub level: u8,
    /// Rows.
    pub rows: u64,
    /// Size of the object.
    pub bytes: u64,
    /// Length of the Parquet metadata at its end, without the eight bytes that follow it.
    pub footer_bytes: u64,
    /// First timestamp, milliseconds.
    pub ts_min: i64,
    /// Last timestamp, milliseconds.
    pub ts_max: i64,
    /// Least metric code.
    pub metric_min: i64,
    /// Greatest metric code.
    pub metric_max: i64,
    /// First flush whose rows are in it.
    pub seq_min: u64,
    /// Last flush whose rows are in it.
    pub seq_max: u64,
    /// CRC-32 of the object.
    pub crc32: u32,
    /// Statistics for outside readers; written with the file, not read back into a [`State`].
    pub columns: Vec<ColumnStats>,
}

/// Statistics of one physical column, as DuckLake keeps them.
#[derive(Debug, Clone, PartialEq)]
pub struct ColumnStats {
    /// Field id.
    pub field_id: i32,
    /// Compressed size.
    pub bytes: u64,
    /// Values, nulls included.
    pub values: u64,
    /// Nulls.
    pub nulls: u64,
    /// Least value as DuckDB prints it (see [`timestamp_text`]); `None` when not known.
    pub min: Option<String>,
    /// Greatest value.
    pub max: Option<String>,
}

/// An immutable file of tag sets that rows of one day refer to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TagPart {
    /// Number, unique over all files and tag parts of the database.
    pub id: i64,
    /// Object path relative to the database's prefix.
    pub path: String,
    /// UTC day, days since the epoch.
    pub day: i32,
    /// Tag sets in it.
    pub sets: u64,
    /// Size of the object.
    pub bytes: u64,
    /// Length of the Parquet metadata at its end, without the eight bytes that follow it.
    pub footer_bytes: u64,
    /// Flush that wrote it, or the last one merged into it.
    pub seq: u64,
    /// CRC-32 of the object.
    pub crc32: u32,
}

/// A change of the catalog: whole or not at all.
#[derive(Debug, Clone, Default)]
pub struct Commit {
    /// Files that become visible.
    pub add: Vec<DataFile>,
    /// Tag parts that become visible.
    pub add_parts: Vec<TagPart>,
    /// Ids of files that leave.
    pub remove: Vec<i64>,
    /// Ids of tag parts that leave.
    pub remove_parts: Vec<i64>,
    /// Metric metadata to keep: metric name and JSON.
    pub metadata: Vec<(String, String)>,
}

/// What a catalog holds when it is opened.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// Visible files, by id.
    pub files: Vec<DataFile>,
    /// Visible tag parts, by id.
    pub parts: Vec<TagPart>,
    /// The database's hash seed.
    pub seed: u64,
    /// The first id that [`FileCatalog::next_id`] will give.
    pub next_id: i64,
    /// The first flush number that [`FileCatalog::next_seq`] will give.
    pub next_seq: u64,
    /// Paths of files and parts that left, with the time when they did, milliseconds.
    pub superseded: Vec<(String, i64)>,
    /// Metric metadata: metric name and JSON.
    pub metadata: Vec<(String, String)>,
}

/// The handle of a file catalog.
#[derive(Debug)]
pub struct FileCatalog {}

impl FileCatalog {
    /// Opens the catalog in a SQLite file, creating it on first use with `new_seed` as the database's hash seed.
    /// `data_path` is the absolute location (folder or URL) of the database's prefix in the object store; outside
    /// readers find files there.
    ///
    /// # Errors
    /// `Unavailable` when the file can't be opened; `Corrupt` for content that no version of ours wrote; `Invalid` when
    /// a newer version wrote it.
    pub async fn open(sqlite_path: &Path, data_path: &str, new_seed: u64, now_ms: i64) -> Result<(Self, State)> {
        let _ = (sqlite_path, data_path, new_seed, now_ms);
        Err(Error::internal("file catalog is not available"))
    }

    /// A number for a file or part that was never given before, also not before a crash.
    pub fn next_id(&self) -> i64 {
        0
    }

    /// A number for a flush, greater than that of every committed one.
    pub fn next_seq(&self) -> u64 {
        0
    }

    /// Applies a change in one transaction; it is durable when this returns.
    ///
    /// # Errors
    /// `Unavailable` when the database refuses; nothing is changed then.
    pub async fn commit(&self, commit: &Commit, now_ms: i64) -> Result<()> {
        let _ = (commit, now_ms);
        Err(Error::internal("file catalog is not available"))
    }

    /// Expires what outside readers can see from before `older_than_ms` and returns the paths that left before then. The
    /// caller deletes the objects and then calls [`FileCatalog::forget`].
    ///
    /// # Errors
    /// `Unavailable` when the database refuses.
    pub async fn purge(&self, older_than_ms: i64) -> Result<Vec<String>> {
        let _ = older_than_ms;
        Err(Error::internal("file catalog is not available"))
    }

    /// Forgets superseded paths whose objects are gone.
    ///
    /// # Errors
    /// `Unavailable` when the database refuses.
    pub async fn forget(&self, paths: &[String]) -> Result<()> {
        let _ = paths;
        Err(Error::internal("file catalog is not available"))
    }

    /// Closes the database; later calls fail.
    pub async fn close(&self) {}
}

/// A timestamp in the text form of DuckLake's statistics: `2026-11-21 07:30:59.131+00`.
pub fn timestamp_text(ms: i64) -> String {
    ms.to_string()
}
