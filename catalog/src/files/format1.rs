//! The catalog of a database from before the journal, format 1: a SQLite file that was the truth. It is read once, when
//! such a database is opened, and becomes the first state of its journal.

use std::path::Path;

use sqlx::sqlite::{SqliteConnectOptions, SqliteLockingMode, SqliteRow};
use sqlx::{ConnectOptions, Connection, Row, SqliteConnection};

use super::{ColumnStats, DataFile, State, TagPart};
use crate::{Error, Result};

/// What the file holds; `None` when it does not exist or is no catalog of format 1.
///
/// # Errors
/// `Corrupt` for content that no version of ours wrote; `Unavailable` when it can't be read.
pub(super) async fn load(path: &Path) -> Result<Option<State>> {
    if !tokio::fs::try_exists(path).await? {
        return Ok(None);
    }
    let context = |e: Error| e.context(format_args!("file catalog {}", path.display()));
    // A log that a crash left beside it is read too, which writes. Its index is kept in memory, see `Connection::sqlite`.
    let options = SqliteConnectOptions::new().filename(path).locking_mode(SqliteLockingMode::Exclusive);
    let connected = options.connect().await;
    let mut connection = connected.map_err(Error::from).map_err(context)?;
    let state = read(&mut connection).await.map_err(context);
    connection.close().await.map_err(Error::from).map_err(context)?;
    state
}

async fn read(c: &mut SqliteConnection) -> Result<Option<State>> {
    let known: i64 = sqlx::query_scalar("SELECT count(*) FROM sqlite_master WHERE name = 'thalweg_setting'")
        .fetch_one(&mut *c)
        .await?;
    if known == 0 || setting(c, "format").await? != 1 {
        return Ok(None);
    }
    let mut state =
        State { seed: setting(c, "seed").await?, next_seq: setting(c, "next_seq").await?, ..State::default() };
    for row in &sqlx::query("SELECT * FROM thalweg_file ORDER BY id").fetch_all(&mut *c).await? {
        let id = row.try_get("id")?;
        state.files.push(DataFile {
            id,
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
            columns: columns(c, id).await?,
        });
    }
    for row in &sqlx::query("SELECT * FROM thalweg_part ORDER BY id").fetch_all(&mut *c).await? {
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
    let removed = sqlx::query("SELECT path, removed_ms FROM thalweg_removed ORDER BY removed_ms, id");
    for row in &removed.fetch_all(&mut *c).await? {
        state.superseded.push((row.try_get("path")?, row.try_get("removed_ms")?));
    }
    for row in &sqlx::query("SELECT metric, json FROM thalweg_metadata").fetch_all(&mut *c).await? {
        state.metadata.push((row.try_get("metric")?, row.try_get("json")?));
    }
    // By bytes, whatever the database sorts by.
    state.metadata.sort();
    Ok(Some(state))
}

async fn columns(c: &mut SqliteConnection, id: i64) -> Result<Vec<ColumnStats>> {
    let rows = sqlx::query(
        "SELECT column_id, column_size_bytes, value_count, null_count, min_value, max_value
         FROM ducklake_file_column_stats WHERE data_file_id = $1 ORDER BY rowid",
    )
    .bind(id)
    .fetch_all(c)
    .await?;
    let mut columns = Vec::with_capacity(rows.len());
    for row in &rows {
        columns.push(ColumnStats {
            field_id: int(row, "column_id")?,
            bytes: int(row, "column_size_bytes")?,
            values: int(row, "value_count")?,
            nulls: int(row, "null_count")?,
            min: row.try_get("min_value")?,
            max: row.try_get("max_value")?,
        });
    }
    Ok(columns)
}

async fn setting(c: &mut SqliteConnection, key: &str) -> Result<u64> {
    let value: Option<String> = sqlx::query_scalar(r#"SELECT "value" FROM thalweg_setting WHERE "key" = $1"#)
        .bind(key)
        .fetch_optional(c)
        .await?;
    let number = value.as_deref().and_then(|v| v.parse().ok());
    number.ok_or_else(|| Error::corrupt(format!("setting {key:?} is {value:?}; a number is expected")))
}

fn int<T: TryFrom<i64>>(row: &SqliteRow, column: &str) -> Result<T> {
    let value = row.try_get::<i64, _>(column)?;
    T::try_from(value).map_err(|_| Error::corrupt(format!("{column} is {value}, which is out of range")))
}
