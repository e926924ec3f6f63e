//! The SQL file catalog: which immutable files make up each table.
//!
//! Its tables follow the DuckLake 1.0 layout, so that DuckDB can attach it and read the files with decoded names, with
//! typed side tables (`thalweg_*`) for what our own planner asks. `catalog/FORMAT.md` describes them. One writer per
//! database: every change goes through one [`FileCatalog`] and is one transaction. Nothing here is the truth: the object
//! store is, and the catalog can be made again from it.

mod lake;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteRow, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection, Row, SqliteConnection};
use tokio::sync::Mutex;

use crate::{Error, Matcher, Result};

/// Version of the catalog's own layout.
pub const FORMAT: u64 = 1;

/// Numbers set aside beyond the last one given. A crash loses at most these, and objects that were uploaded and never
/// committed keep names that no later file takes.
const RESERVE: i64 = 10_000;

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
    /// CRC-32 of the Parquet metadata and the eight bytes that follow it. The metadata hold the checks of all else.
    pub crc32: u32,
    /// Statistics for outside readers, for the time and the codes; written with the file, not read back into a
    /// [`State`].
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
    /// Least value as DuckDB prints it: integers in decimal, times by [`timestamp_text`]. `None` when not known.
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

/// A request to delete rows: those of a table whose tags match and whose time lies in a range, in files that are older
/// than it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Delete {
    /// Number, from [`FileCatalog::next_id`]. A file with a greater id was written with the delete applied.
    pub id: i64,
    /// Its place among flushes, from [`FileCatalog::next_seq`]: it concerns rows of files with a lower
    /// [`DataFile::seq_max`].
    pub seq: u64,
    /// [`crate::TableSchema::id`].
    pub table_id: u16,
    /// Tag sets are meant that satisfy all of them.
    pub matchers: Vec<Matcher>,
    /// First timestamp, milliseconds.
    pub start_ms: i64,
    /// Last timestamp, milliseconds; it is deleted too.
    pub end_ms: i64,
    /// When it was asked for, milliseconds.
    pub created_ms: i64,
}

/// A change of the catalog: whole or not at all.
#[derive(Debug, Clone, Default, PartialEq)]
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
    /// Deletes that take effect.
    pub add_deletes: Vec<Delete>,
    /// Ids of deletes that no file needs any more.
    pub remove_deletes: Vec<i64>,
}

/// What a catalog holds when it is opened.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct State {
    /// Visible files, by id.
    pub files: Vec<DataFile>,
    /// Visible tag parts, by id.
    pub parts: Vec<TagPart>,
    /// Deletes in effect, by id.
    pub deletes: Vec<Delete>,
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
pub struct FileCatalog {
    db: Mutex<Db>,
    next_id: AtomicI64,
    next_seq: AtomicU64,
}

#[derive(Debug)]
struct Db {
    /// `None` once closed.
    connection: Option<SqliteConnection>,
    /// Ids below this are set aside in the database.
    reserved: i64,
}

impl FileCatalog {
    /// Opens the catalog in a SQLite file, creating it on first use with `new_seed` as the database's hash seed; pass
    /// the seed of [`crate::database::open`], which knows it when only the SQLite file was lost. `data_path` is the
    /// absolute location ([`crate::object::location`], with the database's prefix) where outside readers find files.
    ///
    /// # Errors
    /// `Unavailable` when the file can't be opened; `Corrupt` for content that no version of ours wrote; `Invalid` when
    /// a newer version wrote it.
    pub async fn open(sqlite_path: &Path, data_path: &str, new_seed: u64, now_ms: i64) -> Result<(Self, State)> {
        let context = |e: Error| e.context(format_args!("file catalog {}", sqlite_path.display()));
        let mut connection = connect(sqlite_path).await.map_err(Error::from).map_err(context)?;
        let opened = open(&mut connection, data_path, new_seed, now_ms).await;
        match opened {
            Ok(state) => {
                let reserved = state.next_id + RESERVE;
                let catalog = Self {
                    db: Mutex::new(Db { connection: Some(connection), reserved }),
                    next_id: AtomicI64::new(state.next_id),
                    next_seq: AtomicU64::new(state.next_seq),
                };
                Ok((catalog, state))
            }
            Err(e) => {
                // The first error is the one to tell.
                let _ = connection.close().await;
                Err(context(e))
            }
        }
    }

    /// A number for a file or part that was never given before, also not before a crash.
    pub fn next_id(&self) -> i64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// A number for a flush, greater than that of every committed one.
    pub fn next_seq(&self) -> u64 {
        self.next_seq.fetch_add(1, Ordering::Relaxed)
    }

    /// Applies a change in one transaction; it is durable when this returns.
    ///
    /// # Errors
    /// `Internal` when it removes what is not there; `Unavailable` when the database refuses. Nothing is changed then.
    pub async fn commit(&self, commit: &Commit, now_ms: i64) -> Result<()> {
        let mut db = self.db.lock().await;
        let used = self.next_id.load(Ordering::Relaxed);
        let reserved = if used + RESERVE / 2 > db.reserved { used + RESERVE } else { db.reserved };
        let mut tx = db.connection()?.begin_with("BEGIN IMMEDIATE").await?;
        put_setting(&mut tx, "next_id", &reserved.to_string()).await?;
        let sequences = commit.add.iter().map(|f| f.seq_max).chain(commit.add_parts.iter().map(|p| p.seq));
        let sequences = sequences.chain(commit.add_deletes.iter().map(|d| d.seq));
        if let Some(last) = sequences.max() {
            let next = setting_u64(&mut tx, "next_seq").await?.max(last + 1);
            put_setting(&mut tx, "next_seq", &next.to_string()).await?;
        }
        lake::apply(&mut tx, commit, reserved, now_ms).await?;
        for file in &commit.add {
            insert_file(&mut tx, file).await?;
        }
        for part in &commit.add_parts {
            insert_part(&mut tx, part).await?;
        }
        for id in &commit.remove {
            remove(&mut tx, REMOVE_FILE, *id, now_ms).await?;
        }
        for id in &commit.remove_parts {
            remove(&mut tx, REMOVE_PART, *id, now_ms).await?;
        }
        for delete in &commit.add_deletes {
            insert_delete(&mut tx, delete).await?;
        }
        for id in &commit.remove_deletes {
            sqlx::query("DELETE FROM thalweg_delete WHERE id = $1").bind(id).execute(&mut *tx).await?;
        }
        for (metric, json) in &commit.metadata {
            sqlx::query(
                "INSERT INTO thalweg_metadata (metric, json) VALUES ($1, $2)
                 ON CONFLICT (metric) DO UPDATE SET json = excluded.json",
            )
            .bind(metric)
            .bind(json)
            .execute(&mut *tx)
            .await?;
        }
        tx.commit().await?;
        db.reserved = reserved;
        trim_log(db.connection()?).await;
        Ok(())
    }

    /// Expires what outside readers can see from before `older_than_ms` and returns the paths that left before then. The
    /// caller deletes the objects and then calls [`FileCatalog::forget`].
    ///
    /// # Errors
    /// `Unavailable` when the database refuses.
    pub async fn purge(&self, older_than_ms: i64) -> Result<Vec<String>> {
        let mut db = self.db.lock().await;
        let connection = db.connection()?;
        let rows = sqlx::query("SELECT path FROM thalweg_removed WHERE removed_ms < $1 ORDER BY id")
            .bind(older_than_ms)
            .fetch_all(&mut *connection)
            .await?;
        let paths = rows.iter().map(|r| r.try_get("path")).collect::<Result<Vec<String>, _>>()?;
        let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
        let expired = lake::expire(&mut tx, older_than_ms).await?;
        tx.commit().await?;
        if expired {
            trim_log(connection).await;
        }
        Ok(paths)
    }

    /// Paths of files and parts that left and that [`FileCatalog::forget`] was not told of.
    ///
    /// # Errors
    /// `Unavailable` when the database refuses.
    pub async fn superseded(&self) -> Result<Vec<String>> {
        let mut db = self.db.lock().await;
        Ok(sqlx::query_scalar("SELECT path FROM thalweg_removed ORDER BY id").fetch_all(db.connection()?).await?)
    }

    /// Forgets superseded paths whose objects are gone.
    ///
    /// # Errors
    /// `Unavailable` when the database refuses.
    pub async fn forget(&self, paths: &[String]) -> Result<()> {
        if paths.is_empty() {
            return Ok(());
        }
        let mut db = self.db.lock().await;
        let connection = db.connection()?;
        let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
        for path in paths {
            for statement in [
                "DELETE FROM thalweg_removed WHERE path = $1",
                "DELETE FROM ducklake_files_scheduled_for_deletion WHERE path = $1",
            ] {
                sqlx::query(statement).bind(path).execute(&mut *tx).await?;
            }
        }
        tx.commit().await?;
        trim_log(connection).await;
        Ok(())
    }

    /// Closes the database; later calls fail as `Unavailable`.
    pub async fn close(&self) {
        if let Some(connection) = self.db.lock().await.connection.take()
            && let Err(e) = connection.close().await
        {
            tracing::warn!(error = %e, "file catalog did not close cleanly");
        }
    }
}

impl Db {
    fn connection(&mut self) -> Result<&mut SqliteConnection> {
        self.connection.as_mut().ok_or_else(|| Error::unavailable("file catalog is closed"))
    }
}

async fn connect(path: &Path) -> sqlx::Result<SqliteConnection> {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        // Some forty tables, most of them empty, take a page each.
        .page_size(1024)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(Duration::from_secs(10))
        .foreign_keys(false)
        .connect()
        .await
}

/// Moves the write-ahead log into the database file, since the log keeps its greatest size otherwise. An outside reader
/// may hold it: it is not waited for, the next commit tries again.
async fn trim_log(connection: &mut SqliteConnection) {
    let statements = ["PRAGMA busy_timeout = 0", "PRAGMA wal_checkpoint(TRUNCATE)", "PRAGMA busy_timeout = 10000"];
    for statement in statements {
        if let Err(e) = sqlx::query(statement).execute(&mut *connection).await {
            tracing::debug!(error = %e, "file catalog log was not trimmed");
        }
    }
}

async fn open(connection: &mut SqliteConnection, data_path: &str, new_seed: u64, now_ms: i64) -> Result<State> {
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
    let known: i64 = sqlx::query_scalar("SELECT count(*) FROM sqlite_master WHERE name = 'thalweg_setting'")
        .fetch_one(&mut *tx)
        .await?;
    if known == 0 {
        sqlx::raw_sql(include_str!("../migrations/sqlite/1.sql")).execute(&mut *tx).await?;
        for (key, value) in [("format", FORMAT), ("seed", new_seed), ("next_id", 1), ("next_seq", 1)] {
            put_setting(&mut tx, key, &value.to_string()).await?;
        }
    }
    sqlx::raw_sql("CREATE TABLE IF NOT EXISTS thalweg_delete (id INTEGER PRIMARY KEY, json VARCHAR NOT NULL)")
        .execute(&mut *tx)
        .await?;
    let format = setting_u64(&mut tx, "format").await?;
    if format > FORMAT {
        return Err(Error::invalid(format!("format {format} is newer than this version, which reads up to {FORMAT}")));
    }
    let mut state = load(&mut tx).await?;
    // Ids below the stored one may name objects that were never committed.
    let reserved = state.next_id + RESERVE;
    put_setting(&mut tx, "next_id", &reserved.to_string()).await?;
    lake::describe(&mut tx, data_path, state.seed, reserved, now_ms).await?;
    tx.commit().await?;
    trim_log(connection).await;
    state.superseded.sort_by_key(|s| s.1);
    Ok(state)
}

async fn load(tx: &mut SqliteConnection) -> Result<State> {
    let mut state = State {
        seed: setting_u64(tx, "seed").await?,
        next_id: number(setting_u64(tx, "next_id").await?, "next_id")?,
        next_seq: setting_u64(tx, "next_seq").await?,
        ..State::default()
    };
    let rows = sqlx::query("SELECT * FROM thalweg_file ORDER BY id").fetch_all(&mut *tx).await?;
    for row in &rows {
        state.files.push(DataFile {
            id: row.try_get("id")?,
            table_id: int(row, "table_id")?,
            path: row.try_get("path")?,
            day: int(row, "day")?,
            level: int(row, "level")?,
            rows: int(row, "row_count")?,
            bytes: int(row, "byte_count")?,
            footer_bytes: int(row, "footer_bytes")?,
            ts_min: row.try_get("ts_min")?,
            ts_max: row.try_get("ts_max")?,
            metric_min: row.try_get("metric_min")?,
            metric_max: row.try_get("metric_max")?,
            seq_min: int(row, "seq_min")?,
            seq_max: int(row, "seq_max")?,
            crc32: int(row, "crc32")?,
            columns: Vec::new(),
        });
    }
    let rows = sqlx::query("SELECT * FROM thalweg_part ORDER BY id").fetch_all(&mut *tx).await?;
    for row in &rows {
        state.parts.push(TagPart {
            id: row.try_get("id")?,
            path: row.try_get("path")?,
            day: int(row, "day")?,
            sets: int(row, "set_count")?,
            bytes: int(row, "byte_count")?,
            footer_bytes: int(row, "footer_bytes")?,
            seq: int(row, "seq")?,
            crc32: int(row, "crc32")?,
        });
    }
    for row in &sqlx::query("SELECT json FROM thalweg_delete ORDER BY id").fetch_all(&mut *tx).await? {
        let json: String = row.try_get("json")?;
        let wrong = |e: serde_json::Error| Error::corrupt(format!("delete {json:?} does not parse")).with_source(e);
        state.deletes.push(serde_json::from_str(&json).map_err(wrong)?);
    }
    for row in &sqlx::query("SELECT path, removed_ms FROM thalweg_removed ORDER BY id").fetch_all(&mut *tx).await? {
        state.superseded.push((row.try_get("path")?, row.try_get("removed_ms")?));
    }
    for row in &sqlx::query("SELECT metric, json FROM thalweg_metadata ORDER BY metric").fetch_all(&mut *tx).await? {
        state.metadata.push((row.try_get("metric")?, row.try_get("json")?));
    }
    Ok(state)
}

async fn put_setting(tx: &mut SqliteConnection, key: &str, value: &str) -> Result<()> {
    sqlx::query(
        r#"INSERT INTO thalweg_setting ("key", "value") VALUES ($1, $2)
           ON CONFLICT ("key") DO UPDATE SET "value" = excluded."value""#,
    )
    .bind(key)
    .bind(value)
    .execute(tx)
    .await?;
    Ok(())
}

async fn setting_u64(tx: &mut SqliteConnection, key: &str) -> Result<u64> {
    let value: Option<String> = sqlx::query_scalar(r#"SELECT "value" FROM thalweg_setting WHERE "key" = $1"#)
        .bind(key)
        .fetch_optional(tx)
        .await?;
    value
        .as_deref()
        .and_then(|v| v.parse().ok())
        .ok_or_else(|| Error::corrupt(format!("setting {key:?} is {value:?}; a number is expected")))
}

async fn insert_file(tx: &mut SqliteConnection, f: &DataFile) -> Result<()> {
    sqlx::query(
        "INSERT INTO thalweg_file (id, table_id, path, day, level, row_count, byte_count, footer_bytes, ts_min, ts_max,
             metric_min, metric_max, seq_min, seq_max, crc32)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)",
    )
    .bind(f.id)
    .bind(i64::from(f.table_id))
    .bind(&f.path)
    .bind(f.day)
    .bind(i64::from(f.level))
    .bind(signed(f.rows)?)
    .bind(signed(f.bytes)?)
    .bind(signed(f.footer_bytes)?)
    .bind(f.ts_min)
    .bind(f.ts_max)
    .bind(f.metric_min)
    .bind(f.metric_max)
    .bind(signed(f.seq_min)?)
    .bind(signed(f.seq_max)?)
    .bind(i64::from(f.crc32))
    .execute(tx)
    .await?;
    Ok(())
}

async fn insert_delete(tx: &mut SqliteConnection, delete: &Delete) -> Result<()> {
    let json = serde_json::to_string(delete).map_err(|e| Error::internal("delete as JSON").with_source(e))?;
    sqlx::query("INSERT INTO thalweg_delete (id, json) VALUES ($1, $2)").bind(delete.id).bind(json).execute(tx).await?;
    Ok(())
}

async fn insert_part(tx: &mut SqliteConnection, p: &TagPart) -> Result<()> {
    sqlx::query(
        "INSERT INTO thalweg_part (id, path, day, set_count, byte_count, footer_bytes, seq, crc32)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
    )
    .bind(p.id)
    .bind(&p.path)
    .bind(p.day)
    .bind(signed(p.sets)?)
    .bind(signed(p.bytes)?)
    .bind(signed(p.footer_bytes)?)
    .bind(signed(p.seq)?)
    .bind(i64::from(p.crc32))
    .execute(tx)
    .await?;
    Ok(())
}

const REMOVE_FILE: &str = "DELETE FROM thalweg_file WHERE id = $1 RETURNING path";
const REMOVE_PART: &str = "DELETE FROM thalweg_part WHERE id = $1 RETURNING path";

async fn remove(tx: &mut SqliteConnection, statement: &'static str, id: i64, now_ms: i64) -> Result<()> {
    let path: Option<String> = sqlx::query_scalar(statement).bind(id).fetch_optional(&mut *tx).await?;
    let path = path.ok_or_else(|| Error::internal(format!("file {id} is to be removed and is not in the catalog")))?;
    sqlx::query("INSERT INTO thalweg_removed (id, path, removed_ms) VALUES ($1, $2, $3)")
        .bind(id)
        .bind(path)
        .bind(now_ms)
        .execute(tx)
        .await?;
    Ok(())
}

fn int<T: TryFrom<i64>>(row: &SqliteRow, column: &str) -> Result<T> {
    number(row.try_get::<i64, _>(column)?, column)
}

fn number<T: TryFrom<U>, U: Copy + std::fmt::Display>(value: U, what: &str) -> Result<T> {
    T::try_from(value).map_err(|_| Error::corrupt(format!("{what} is {value}, which is out of range")))
}

fn signed(value: u64) -> Result<i64> {
    i64::try_from(value).map_err(|e| Error::internal(format!("{value} does not fit the catalog")).with_source(e))
}

/// A timestamp in the text form of DuckLake's statistics, `2026-11-21 07:30:59.131+00`; `None` outside of the years 1 to
/// 9999, for which there is none that every reader takes.
pub fn timestamp_text(ms: i64) -> Option<String> {
    use chrono::Datelike;
    let time = chrono::DateTime::from_timestamp_millis(ms)?;
    (1..=9999).contains(&time.year()).then(|| time.format("%Y-%m-%d %H:%M:%S%.3f+00").to_string())
}
