//! The SQL catalog: an index over the journal for outside readers and other nodes.
//!
//! It follows the journal: each entry is applied in order, in one transaction that also moves the place where the
//! catalog stands, so that an entry is applied once however often it is tried. What is missing, damaged or of another
//! history is made anew from the journal's state. Nothing of ours reads it back.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use async_trait::async_trait;
use sqlx::ConnectOptions;
use sqlx::postgres::PgConnectOptions;

use super::sql::{Connection, Row, values};
use super::{DataFile, Delete, State, TagPart, lake};
use crate::journal::{Entry, Place};
use crate::{Error, Result};

/// Version of the SQL catalog's layout.
pub const FORMAT: u64 = 2;

/// Something that follows the journal. A failed call changes nothing, or all that it says.
#[async_trait]
pub trait Index: Send + std::fmt::Debug {
    /// Connects, and says where it stands. `None` when it holds nothing that could be continued.
    ///
    /// # Errors
    /// `Unavailable` when it can't be reached; `Invalid` when it is not ours to change.
    async fn place(&mut self, now_ms: i64) -> Result<Option<Place>>;

    /// Makes it anew from a state.
    ///
    /// # Errors
    /// As [`Index::place`].
    async fn replace(&mut self, state: &State, place: Place, now_ms: i64) -> Result<()>;

    /// Takes it from a place to that of the entry, which follows. Afterwards it stands there, whether this call has
    /// moved it or an earlier one.
    ///
    /// # Errors
    /// `Unavailable`, also when it stands elsewhere.
    async fn apply(&mut self, from: Place, entry: &Entry) -> Result<()>;

    /// Drops what outside readers could see before a time and can't see now.
    ///
    /// # Errors
    /// `Unavailable`.
    async fn expire(&mut self, older_than_ms: i64) -> Result<()>;

    /// Where it says something else than a state after the journal's entry with this number; `None` when it stands
    /// elsewhere, or is not there. Changes nothing.
    ///
    /// # Errors
    /// As [`Index::place`].
    async fn differences(&mut self, _state: &State, _number: u64) -> Result<Option<Vec<String>>> {
        Ok(None)
    }

    /// Gives up the connection.
    async fn close(&mut self);
}

/// Where a SQL catalog lives.
#[derive(Debug, Clone)]
enum Database {
    Sqlite(PathBuf),
    Postgres(Box<PgConnectOptions>),
}

/// A SQL catalog in SQLite or PostgreSQL.
#[derive(Debug)]
pub struct SqlIndex {
    database: Database,
    /// Absolute location where outside readers find files.
    data_path: String,
    seed: u64,
    connection: Option<Connection>,
}

impl SqlIndex {
    /// A catalog in a SQLite file. `data_path` is the absolute location ([`crate::object::location`], with the
    /// database's prefix) where outside readers find files, `seed` that of [`crate::database::open`].
    pub fn sqlite(path: &Path, data_path: &str, seed: u64) -> Self {
        Self { database: Database::Sqlite(path.to_owned()), data_path: data_path.to_owned(), seed, connection: None }
    }

    /// A catalog in PostgreSQL, in the schema that its connections begin with. `url` is `postgres://…`.
    ///
    /// # Errors
    /// `Invalid` for another URL; it is not repeated in the message, since it may hold a password.
    pub fn postgres(url: &str, data_path: &str, seed: u64) -> Result<Self> {
        let known = ["postgres://", "postgresql://"].iter().any(|scheme| url.starts_with(scheme));
        let options = if known { PgConnectOptions::from_str(url).ok() } else { None };
        let options =
            options.ok_or_else(|| Error::invalid("catalog is not a URL of the form postgres://user@host/db"))?;
        let database = Database::Postgres(Box::new(options.application_name("thalweg").disable_statement_logging()));
        Ok(Self { database, data_path: data_path.to_owned(), seed, connection: None })
    }

    /// The connection, made when there is none. It is taken out while it is used, so that after an error, or when a
    /// caller goes away in between, it is gone and what it had begun undone.
    async fn connection(&mut self) -> Result<Connection> {
        match self.connection.take() {
            Some(connection) => Ok(connection),
            None => match &self.database {
                Database::Sqlite(path) => Connection::sqlite(path).await,
                Database::Postgres(options) => Connection::postgres(options).await,
            },
        }
    }

    /// Where the tables stand, and whether they are ours to continue.
    async fn look(&mut self, now_ms: i64) -> Result<Option<Place>> {
        let mut c = self.connection().await?;
        let place = if c.tables().await?.iter().any(|t| t == "thalweg_setting") {
            self.continued(&mut c, now_ms).await?
        } else {
            None
        };
        self.connection = Some(c);
        Ok(place)
    }

    async fn continued(&self, c: &mut Connection, now_ms: i64) -> Result<Option<Place>> {
        let seed = setting(c, "seed").await?;
        if seed.as_deref() != Some(self.seed.to_string().as_str()) {
            if let Database::Postgres(_) = self.database {
                return Err(Error::invalid(
                    "the PostgreSQL catalog belongs to another database than the object store; give it a database or \
                     a schema of its own",
                ));
            }
            return Ok(None);
        }
        if setting(c, "format").await?.as_deref() != Some(FORMAT.to_string().as_str()) {
            return Ok(None);
        }
        let Some(place) = setting(c, "place").await?.and_then(|p| p.parse().ok()) else { return Ok(None) };
        c.begin().await?;
        lake::describe(c, &self.data_path, self.seed, now_ms).await?;
        c.commit().await?;
        Ok(Some(place))
    }

    /// Names the catalog in an error, and takes a damaged SQLite file away, so that it is made anew.
    async fn failed(&self, e: Error) -> Error {
        let path = match &self.database {
            Database::Sqlite(path) => path,
            Database::Postgres(o) => {
                return e.context(format_args!("PostgreSQL catalog at {}:{}", o.get_host(), o.get_port()));
            }
        };
        let damaged = damaged(&e);
        let e = e.context(format_args!("SQL catalog {}", path.display()));
        if damaged {
            tracing::warn!(error = %e, "SQL catalog is damaged and is made anew");
            // What would be rolled back goes before the file that it belongs to.
            for suffix in ["-journal", "-wal", "-shm", ""] {
                let mut file = path.clone().into_os_string();
                file.push(suffix);
                match tokio::fs::remove_file(&file).await {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                        tracing::warn!(error = %e, file = %file.display(), "damaged file was not removed");
                    }
                    _ => {}
                }
            }
        }
        e
    }

    async fn make(&mut self, state: &State, place: Place, now_ms: i64) -> Result<()> {
        let mut c = self.connection().await?;
        c.begin().await?;
        for table in c.tables().await? {
            // Names of ours have nothing that would need quoting.
            if table.starts_with("ducklake_") || table.starts_with("thalweg_") {
                c.script(&format!("DROP TABLE {table}")).await?;
            }
        }
        let schema = include_str!("../../migrations/2.sql");
        match self.database {
            Database::Sqlite(_) => c.script(&sqlite_types(schema)).await?,
            Database::Postgres(_) => c.script(schema).await?,
        }
        for (key, value) in
            [("format", FORMAT.to_string()), ("seed", self.seed.to_string()), ("place", place.to_string())]
        {
            let statement = r#"INSERT INTO thalweg_setting ("key", "value") VALUES ($1, $2)"#;
            c.execute(statement, values![key, value.as_str()]).await?;
        }
        lake::describe(&mut c, &self.data_path, self.seed, now_ms).await?;
        let change = lake::Change { files: &state.files, parts: &state.parts, gone: vec![] };
        lake::apply(&mut c, &change, now_ms).await?;
        insert(&mut c, &state.files, &state.parts, &state.deletes, &state.metadata).await?;
        c.commit().await?;
        self.connection = Some(c);
        Ok(())
    }

    async fn follow(&mut self, from: Place, entry: &Entry) -> Result<()> {
        let mut c = self.connection().await?;
        c.begin().await?;
        let moved = c
            .execute(
                r#"UPDATE thalweg_setting SET "value" = $1 WHERE "key" = 'place' AND "value" = $2"#,
                values![entry.place().to_string().as_str(), from.to_string().as_str()],
            )
            .await?;
        if moved == 0 {
            // An earlier try may have reached it although the answer was lost.
            let stands = setting(&mut c, "place").await?.unwrap_or_default();
            c.commit().await?;
            self.connection = Some(c);
            if stands == entry.place().to_string() {
                return Ok(());
            }
            return Err(Error::unavailable(format!("it stands at {stands}, expected {from}")));
        }
        let commit = &entry.commit;
        let gone = commit.remove.iter().chain(&commit.remove_parts).copied().collect();
        let change = lake::Change { files: &commit.add, parts: &commit.add_parts, gone };
        lake::apply(&mut c, &change, entry.time_ms).await?;
        insert(&mut c, &commit.add, &commit.add_parts, &commit.add_deletes, &commit.metadata).await?;
        for (statement, ids) in [
            ("DELETE FROM thalweg_file WHERE id = $1", &commit.remove),
            ("DELETE FROM thalweg_part WHERE id = $1", &commit.remove_parts),
            ("DELETE FROM thalweg_delete WHERE id = $1", &commit.remove_deletes),
        ] {
            for id in ids {
                c.execute(statement, values![*id]).await?;
            }
        }
        c.commit().await?;
        self.connection = Some(c);
        Ok(())
    }

    async fn compare(&mut self, state: &State, number: u64) -> Result<Option<Vec<String>>> {
        let mut c = self.connection().await?;
        // One view of all tables.
        let begin = match self.database {
            Database::Sqlite(_) => "BEGIN",
            Database::Postgres(_) => "BEGIN ISOLATION LEVEL REPEATABLE READ",
        };
        c.script(begin).await?;
        let ours = c.tables().await?.iter().any(|t| t == "thalweg_setting")
            && setting(&mut c, "seed").await?.as_deref() == Some(self.seed.to_string().as_str())
            && setting(&mut c, "format").await?.as_deref() == Some(FORMAT.to_string().as_str());
        let place = if ours { setting(&mut c, "place").await? } else { None };
        let place: Option<Place> = place.and_then(|p| p.parse().ok());
        let out = match place {
            Some(place) if place.number == number => Some(differing(&said(state), &stored(&mut c).await?)),
            _ => None,
        };
        c.script("ROLLBACK").await?;
        self.connection = Some(c);
        Ok(out)
    }

    async fn drop_old(&mut self, older_than_ms: i64) -> Result<()> {
        let mut c = self.connection().await?;
        c.begin().await?;
        lake::expire(&mut c, older_than_ms).await?;
        c.commit().await?;
        self.connection = Some(c);
        Ok(())
    }
}

#[async_trait]
impl Index for SqlIndex {
    async fn place(&mut self, now_ms: i64) -> Result<Option<Place>> {
        match self.look(now_ms).await {
            Ok(place) => Ok(place),
            Err(e) => {
                let damaged = damaged(&e);
                let e = self.failed(e).await;
                if damaged { Ok(None) } else { Err(e) }
            }
        }
    }

    async fn replace(&mut self, state: &State, place: Place, now_ms: i64) -> Result<()> {
        match self.make(state, place, now_ms).await {
            Ok(()) => Ok(()),
            Err(e) => Err(self.failed(e).await),
        }
    }

    async fn apply(&mut self, from: Place, entry: &Entry) -> Result<()> {
        match self.follow(from, entry).await {
            Ok(()) => Ok(()),
            Err(e) => Err(self.failed(e).await),
        }
    }

    async fn expire(&mut self, older_than_ms: i64) -> Result<()> {
        match self.drop_old(older_than_ms).await {
            Ok(()) => Ok(()),
            Err(e) => Err(self.failed(e).await),
        }
    }

    async fn differences(&mut self, state: &State, number: u64) -> Result<Option<Vec<String>>> {
        if let Database::Sqlite(path) = &self.database
            && !path.exists()
        {
            return Ok(None);
        }
        match self.compare(state, number).await {
            Ok(found) => Ok(found),
            // Unlike a server, who only looks does not take a damaged file away.
            Err(e) if damaged(&e) => Ok(Some(vec![format!("it is damaged: {e}")])),
            Err(e) => Err(e),
        }
    }

    async fn close(&mut self) {
        if let Some(connection) = self.connection.take() {
            connection.close().await;
        }
    }
}

/// One line for each thing that a state says, as far as the SQL catalog has it.
fn said(state: &State) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    for f in &state.files {
        out.insert(format!("{}: visible with {} rows and {} bytes", f.path, f.rows, f.bytes));
        let range = [f.ts_min, f.ts_max, f.metric_min, f.metric_max];
        out.insert(format!(
            "{}: file {} of table {}, day {}, level {}, footer {}, flushes {} to {}, CRC {}, range {range:?}",
            f.path, f.id, f.table_id, f.day, f.level, f.footer_bytes, f.seq_min, f.seq_max, f.crc32
        ));
    }
    for p in &state.parts {
        out.insert(format!("{}: visible with {} rows and {} bytes", p.path, p.sets, p.bytes));
        out.insert(format!(
            "{}: part {}, day {}, footer {}, flush {}, CRC {}",
            p.path, p.id, p.day, p.footer_bytes, p.seq, p.crc32
        ));
    }
    out.extend(state.deletes.iter().map(|d| format!("delete {}", d.id)));
    out.extend(state.metadata.iter().map(|(metric, json)| format!("metadata of {metric}: {json}")));
    out
}

/// The same lines of the SQL catalog.
async fn stored(c: &mut Connection) -> Result<BTreeSet<String>> {
    let mut out = BTreeSet::new();
    let number = |row: &Row, column| Ok::<_, Error>(row.int(column)?.unwrap_or_default());
    let text = |row: &Row, column| Ok::<_, Error>(row.text(column)?.unwrap_or_default());
    let files = "SELECT path, record_count, file_size_bytes FROM ducklake_data_file WHERE end_snapshot IS NULL";
    for r in &c.rows(files, values![]).await? {
        out.insert(format!("{}: visible with {} rows and {} bytes", text(r, 0)?, number(r, 1)?, number(r, 2)?));
    }
    let files = "SELECT path, id, table_id, day, level, footer_bytes, seq_min, seq_max, crc32, ts_min, ts_max,
                     metric_min, metric_max FROM thalweg_file";
    for r in &c.rows(files, values![]).await? {
        let n = (1..13).map(|i| number(r, i)).collect::<Result<Vec<i64>>>()?;
        out.insert(format!(
            "{}: file {} of table {}, day {}, level {}, footer {}, flushes {} to {}, CRC {}, range {:?}",
            text(r, 0)?,
            n[0],
            n[1],
            n[2],
            n[3],
            n[4],
            n[5],
            n[6],
            n[7],
            &n[8..]
        ));
    }
    for r in &c.rows("SELECT path, id, day, footer_bytes, seq, crc32 FROM thalweg_part", values![]).await? {
        let n = (1..6).map(|i| number(r, i)).collect::<Result<Vec<i64>>>()?;
        out.insert(format!(
            "{}: part {}, day {}, footer {}, flush {}, CRC {}",
            text(r, 0)?,
            n[0],
            n[1],
            n[2],
            n[3],
            n[4]
        ));
    }
    for r in &c.rows("SELECT id FROM thalweg_delete", values![]).await? {
        out.insert(format!("delete {}", number(r, 0)?));
    }
    for r in &c.rows("SELECT metric, json FROM thalweg_metadata", values![]).await? {
        out.insert(format!("metadata of {}: {}", text(r, 0)?, text(r, 1)?));
    }
    Ok(out)
}

/// Most differences that are told.
const DIFFERENCES_MAX: usize = 20;

fn differing(said: &BTreeSet<String>, stored: &BTreeSet<String>) -> Vec<String> {
    let missing = said.difference(stored).map(|line| format!("it has not what the journal says, {line}"));
    let more = stored.difference(said).map(|line| format!("it says what the journal does not, {line}"));
    let mut out: Vec<String> = missing.chain(more).collect();
    if out.len() > DIFFERENCES_MAX {
        let rest = out.len() - DIFFERENCES_MAX;
        out.truncate(DIFFERENCES_MAX);
        out.push(format!("it differs in {rest} things more"));
    }
    out
}

/// Whether SQLite says that a file is none of its own, or that its content is broken.
fn damaged(e: &Error) -> bool {
    let code = std::error::Error::source(e).and_then(|e| e.downcast_ref::<sqlx::Error>()).and_then(|e| match e {
        sqlx::Error::Database(e) => e.code(),
        _ => None,
    });
    // SQLITE_CORRUPT and SQLITE_NOTADB; the upper bits say more.
    let primary = code.and_then(|c| c.parse::<i32>().ok()).map(|c| c & 0xff);
    e.kind() == crate::ErrorKind::Corrupt || matches!(primary, Some(11 | 26))
}

/// The types that DuckDB gives these columns in SQLite.
fn sqlite_types(schema: &str) -> String {
    schema
        .replace(" UUID", " VARCHAR")
        .replace(" TIMESTAMPTZ", " VARCHAR")
        .replace(" BOOLEAN", " BIGINT")
        .replace(" BIGINT PRIMARY KEY", " INTEGER PRIMARY KEY")
}

async fn setting(c: &mut Connection, key: &str) -> Result<Option<String>> {
    match c.row(r#"SELECT "value" FROM thalweg_setting WHERE "key" = $1"#, values![key]).await? {
        Some(row) => row.text(0),
        None => Ok(None),
    }
}

async fn insert(
    c: &mut Connection,
    files: &[DataFile],
    parts: &[TagPart],
    deletes: &[Delete],
    metadata: &[(String, String)],
) -> Result<()> {
    for f in files {
        c.execute(
            "INSERT INTO thalweg_file (id, table_id, path, day, level, row_count, byte_count, footer_bytes, ts_min,
                 ts_max, metric_min, metric_max, seq_min, seq_max, crc32)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)",
            values![
                f.id,
                i64::from(f.table_id),
                f.path.as_str(),
                i64::from(f.day),
                i64::from(f.level),
                signed(f.rows)?,
                signed(f.bytes)?,
                signed(f.footer_bytes)?,
                f.ts_min,
                f.ts_max,
                f.metric_min,
                f.metric_max,
                signed(f.seq_min)?,
                signed(f.seq_max)?,
                i64::from(f.crc32)
            ],
        )
        .await?;
    }
    for p in parts {
        c.execute(
            "INSERT INTO thalweg_part (id, path, day, set_count, byte_count, footer_bytes, seq, crc32)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
            values![
                p.id,
                p.path.as_str(),
                i64::from(p.day),
                signed(p.sets)?,
                signed(p.bytes)?,
                signed(p.footer_bytes)?,
                signed(p.seq)?,
                i64::from(p.crc32)
            ],
        )
        .await?;
    }
    for delete in deletes {
        let json = serde_json::to_string(delete).map_err(|e| Error::internal("delete as JSON").with_source(e))?;
        c.execute("INSERT INTO thalweg_delete (id, json) VALUES ($1, $2)", values![delete.id, json.as_str()]).await?;
    }
    for (metric, json) in metadata {
        c.execute(
            "INSERT INTO thalweg_metadata (metric, json) VALUES ($1, $2)
             ON CONFLICT (metric) DO UPDATE SET json = excluded.json",
            values![metric.as_str(), json.as_str()],
        )
        .await?;
    }
    Ok(())
}

pub(super) fn signed(value: u64) -> Result<i64> {
    i64::try_from(value).map_err(|e| Error::internal(format!("{value} does not fit the SQL catalog")).with_source(e))
}
