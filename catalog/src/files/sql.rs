//! One way to speak to SQLite and PostgreSQL: the same statements, with values that each is given in its own types.
//!
//! DuckDB keeps truth values, UUIDs and times as numbers and texts in SQLite and in types of their own in PostgreSQL;
//! [`Value`] hides that. Every statement is bounded in time. After an error a connection is in no known state: it is
//! dropped, and what it had begun is undone by the database.

use std::path::Path;
use std::time::Duration;

use sqlx::encode::IsNull;
use sqlx::error::BoxDynError;
use sqlx::postgres::types::Oid;
use sqlx::postgres::{PgArgumentBuffer, PgConnectOptions, PgRow, PgTypeInfo};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteLockingMode, SqliteRow, SqliteSynchronous};
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection as _, Encode, PgConnection, Postgres, Row as _, SqliteConnection,
};

use super::timestamp_text;
use crate::{Error, Result};

/// Longest that a statement may take before the database counts as gone.
const STATEMENT_MAX: Duration = Duration::from_secs(10);

/// How long SQLite waits for another process to give up its lock.
const LOCK_WAIT: Duration = Duration::from_millis(500);

/// A value of a statement.
#[derive(Debug, Clone)]
pub(super) enum Value {
    /// `BIGINT`.
    Int(Option<i64>),
    /// `VARCHAR`.
    Text(Option<String>),
    /// `BOOLEAN`; 0 and 1 in SQLite.
    Bool(bool),
    /// `UUID`; a text in SQLite.
    Uuid(u128),
    /// `TIMESTAMPTZ`, milliseconds; the text of [`timestamp_text`] in SQLite.
    Time(i64),
}

impl From<i64> for Value {
    fn from(v: i64) -> Self {
        Self::Int(Some(v))
    }
}

impl From<Option<i64>> for Value {
    fn from(v: Option<i64>) -> Self {
        Self::Int(v)
    }
}

impl From<&str> for Value {
    fn from(v: &str) -> Self {
        Self::Text(Some(v.to_owned()))
    }
}

impl From<Option<&str>> for Value {
    fn from(v: Option<&str>) -> Self {
        Self::Text(v.map(str::to_owned))
    }
}

/// Values of a statement, in the order of its `$1`, `$2`, …
macro_rules! values {
    ($($value:expr),* $(,)?) => { &[$($crate::files::sql::Value::from($value)),*] };
}
pub(super) use values;

/// A UUID as text.
fn uuid_text(v: u128) -> String {
    let h = format!("{v:032x}");
    format!("{}-{}-{}-{}-{}", &h[..8], &h[8..12], &h[12..16], &h[16..20], &h[20..])
}

struct PgUuid(u128);

impl sqlx::Type<Postgres> for PgUuid {
    fn type_info() -> PgTypeInfo {
        PgTypeInfo::with_oid(Oid(2950))
    }
}

impl Encode<'_, Postgres> for PgUuid {
    fn encode_by_ref(&self, buf: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        buf.extend_from_slice(&self.0.to_be_bytes());
        Ok(IsNull::No)
    }
}

/// Milliseconds since 1970.
struct PgTime(i64);

impl sqlx::Type<Postgres> for PgTime {
    fn type_info() -> PgTypeInfo {
        PgTypeInfo::with_oid(Oid(1184))
    }
}

impl Encode<'_, Postgres> for PgTime {
    fn encode_by_ref(&self, buf: &mut PgArgumentBuffer) -> Result<IsNull, BoxDynError> {
        // PostgreSQL counts microseconds since 2000.
        const EPOCH_MS: i64 = 946_684_800_000;
        buf.extend_from_slice(&self.0.saturating_sub(EPOCH_MS).saturating_mul(1000).to_be_bytes());
        Ok(IsNull::No)
    }
}

/// A row of an answer.
#[derive(Debug)]
pub(super) enum Row {
    Sqlite(SqliteRow),
    Postgres(PgRow),
}

impl Row {
    /// A `BIGINT` by the place of its column.
    pub fn int(&self, column: usize) -> Result<Option<i64>> {
        Ok(match self {
            Self::Sqlite(row) => row.try_get(column)?,
            Self::Postgres(row) => row.try_get(column)?,
        })
    }

    /// A `VARCHAR` by the place of its column.
    pub fn text(&self, column: usize) -> Result<Option<String>> {
        Ok(match self {
            Self::Sqlite(row) => row.try_get(column)?,
            Self::Postgres(row) => row.try_get(column)?,
        })
    }
}

/// A connection to either database.
#[derive(Debug)]
pub(super) enum Connection {
    Sqlite(SqliteConnection),
    Postgres(PgConnection),
}

impl Connection {
    /// Opens a SQLite file, creating it when it is absent.
    ///
    /// It has a rollback journal, not SQLite's own write-ahead log: the index of that is a file mapped into memory whose
    /// blocks are found when they are touched, which on a full disk ends the process by a signal. The journal is truncated
    /// and not deleted, so that no commit has to make its name durable.
    pub async fn sqlite(path: &Path) -> Result<Self> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            // Some forty tables, most of them empty, take a page each.
            .page_size(1024)
            // A file that an earlier version left with a write-ahead log is converted without mapping its index.
            .locking_mode(SqliteLockingMode::Exclusive)
            .journal_mode(SqliteJournalMode::Truncate)
            .pragma("mmap_size", "0")
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(LOCK_WAIT)
            .foreign_keys(false)
            .disable_statement_logging();
        let mut connection = Self::Sqlite(bounded(options.connect()).await?);
        // The lock goes with the next statement.
        connection.script("PRAGMA locking_mode = NORMAL; SELECT count(*) FROM sqlite_master").await?;
        Ok(connection)
    }

    /// Connects to PostgreSQL.
    pub async fn postgres(options: &PgConnectOptions) -> Result<Self> {
        Ok(Self::Postgres(bounded(options.connect()).await?))
    }

    /// Begins a transaction that writes; it ends with [`Connection::commit`], or when the connection is dropped.
    pub async fn begin(&mut self) -> Result<()> {
        let statement = match self {
            Self::Sqlite(_) => "BEGIN IMMEDIATE",
            Self::Postgres(_) => "BEGIN",
        };
        self.script(statement).await
    }

    pub async fn commit(&mut self) -> Result<()> {
        self.script("COMMIT").await
    }

    /// Statements without values, separated by semicolons. They are ours: nothing in them comes from outside.
    pub async fn script(&mut self, statements: &str) -> Result<()> {
        let sql = sqlx::raw_sql(AssertSqlSafe(statements.to_owned()));
        match self {
            Self::Sqlite(c) => bounded(sql.execute(c)).await.map(|_| ()),
            Self::Postgres(c) => bounded(sql.execute(c)).await.map(|_| ()),
        }
    }

    /// Runs a statement; returns how many rows it touched.
    pub async fn execute(&mut self, statement: &'static str, values: &[Value]) -> Result<u64> {
        match self {
            Self::Sqlite(c) => Ok(bounded(sqlite_query(statement, values).execute(c)).await?.rows_affected()),
            Self::Postgres(c) => Ok(bounded(postgres_query(statement, values).execute(c)).await?.rows_affected()),
        }
    }

    /// Runs a statement and takes all rows of its answer.
    pub async fn rows(&mut self, statement: &'static str, values: &[Value]) -> Result<Vec<Row>> {
        Ok(match self {
            Self::Sqlite(c) => {
                let rows = bounded(sqlite_query(statement, values).fetch_all(c)).await?;
                rows.into_iter().map(Row::Sqlite).collect()
            }
            Self::Postgres(c) => {
                let rows = bounded(postgres_query(statement, values).fetch_all(c)).await?;
                rows.into_iter().map(Row::Postgres).collect()
            }
        })
    }

    /// The first row of an answer.
    pub async fn row(&mut self, statement: &'static str, values: &[Value]) -> Result<Option<Row>> {
        Ok(self.rows(statement, values).await?.into_iter().next())
    }

    /// The number in the first row of an answer, `None` where there is no row or it is null.
    pub async fn int(&mut self, statement: &'static str, values: &[Value]) -> Result<Option<i64>> {
        self.row(statement, values).await?.map_or(Ok(None), |row| row.int(0))
    }

    /// The names of all tables.
    pub async fn tables(&mut self) -> Result<Vec<String>> {
        let statement = match self {
            Self::Sqlite(_) => "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name",
            Self::Postgres(_) => {
                "SELECT tablename::varchar FROM pg_tables WHERE schemaname = current_schema() ORDER BY tablename"
            }
        };
        let rows = self.rows(statement, &[]).await?;
        rows.iter().filter_map(|row| row.text(0).transpose()).collect()
    }

    pub async fn close(self) {
        let closed = match self {
            Self::Sqlite(c) => bounded(c.close()).await,
            Self::Postgres(c) => bounded(c.close()).await,
        };
        if let Err(e) = closed {
            tracing::debug!(error = %e, "SQL catalog did not close cleanly");
        }
    }
}

async fn bounded<T>(work: impl Future<Output = sqlx::Result<T>>) -> Result<T> {
    match tokio::time::timeout(STATEMENT_MAX, work).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(Error::unavailable(format!("SQL catalog did not answer within {STATEMENT_MAX:?}"))),
    }
}

fn sqlite_query(
    statement: &'static str,
    values: &[Value],
) -> sqlx::query::Query<'static, sqlx::Sqlite, sqlx::sqlite::SqliteArguments> {
    values.iter().fold(sqlx::query(statement), |query, value| match value.clone() {
        Value::Int(v) => query.bind(v),
        Value::Text(v) => query.bind(v),
        Value::Bool(v) => query.bind(i64::from(v)),
        Value::Uuid(v) => query.bind(uuid_text(v)),
        Value::Time(v) => query.bind(timestamp_text(v)),
    })
}

fn postgres_query(
    statement: &'static str,
    values: &[Value],
) -> sqlx::query::Query<'static, Postgres, sqlx::postgres::PgArguments> {
    values.iter().fold(sqlx::query(statement), |query, value| match value.clone() {
        Value::Int(v) => query.bind(v),
        Value::Text(v) => query.bind(v),
        Value::Bool(v) => query.bind(v),
        Value::Uuid(v) => query.bind(PgUuid(v)),
        Value::Time(v) => query.bind(PgTime(v)),
    })
}
