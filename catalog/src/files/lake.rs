//! The DuckLake side of the catalog: snapshots, the schema that outside readers see, and files as they see them.
//!
//! Physical tables are in the schema `stored`; the schema `main` has one view per table that joins the tag sets and
//! computes values, so that `SELECT * FROM lake.samples` shows names and numbers. What readers can see is described
//! anew from [`crate::tables`] whenever the catalog is opened, and a difference becomes a snapshot.

use arrow::datatypes::DataType;
use sqlx::{Row, SqliteConnection};
use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::{Commit, signed, timestamp_text};
use crate::tables::{self, Layout, Role, TableSchema};
use crate::tag_parts;
use crate::{Error, Result};

const MAIN: i64 = 0;
const STORED: i64 = 1;
/// DuckLake's number of the `tag_sets` table.
const TAG_SETS: i64 = 10;
/// DuckLake's number of a table is this plus ours.
const TABLES: i64 = 1000;
/// DuckLake's number of a table's view is this plus ours.
const VIEWS: i64 = 100_000;
/// All numbers above are below this.
const NEXT_CATALOG_ID: i64 = 1_000_000;

fn lake_id(table_id: u16) -> i64 {
    TABLES + i64::from(table_id)
}

// --- what is described ---

struct Table {
    id: i64,
    name: &'static str,
    columns: Vec<Column>,
}

#[derive(Debug, Clone, PartialEq)]
struct Column {
    id: i64,
    parent: Option<i64>,
    name: String,
    kind: &'static str,
    nullable: bool,
}

struct View {
    id: i64,
    name: &'static str,
    sql: String,
}

fn described() -> Result<(Vec<Table>, Vec<View>)> {
    let mut lake = vec![Table { id: TAG_SETS, name: "tag_sets", columns: columns(tag_parts::schema().fields())? }];
    let mut views = Vec::new();
    for table in tables::all() {
        lake.push(Table {
            id: lake_id(table.id),
            name: table.name,
            columns: columns(table.physical_arrow().fields())?,
        });
        views.push(View { id: VIEWS + i64::from(table.id), name: table.name, sql: view(table) });
    }
    Ok((lake, views))
}

fn columns(fields: &arrow::datatypes::Fields) -> Result<Vec<Column>> {
    let mut out = Vec::new();
    for field in fields {
        add_column(&mut out, None, field)?;
    }
    Ok(out)
}

fn add_column(out: &mut Vec<Column>, parent: Option<i64>, field: &arrow::datatypes::Field) -> Result<()> {
    let id = field.metadata().get(tables::FIELD_ID_KEY).and_then(|id| id.parse().ok());
    let id = id.ok_or_else(|| Error::internal(format!("column {:?} has no field id", field.name())))?;
    let kind = match field.data_type() {
        DataType::Boolean => "boolean",
        DataType::Int8 => "int8",
        DataType::Int16 => "int16",
        DataType::Int32 => "int32",
        DataType::Int64 => "int64",
        DataType::Float32 => "float32",
        DataType::Float64 => "float64",
        DataType::Utf8 => "varchar",
        DataType::Binary | DataType::FixedSizeBinary(_) => "blob",
        DataType::Timestamp(_, Some(_)) => "timestamptz",
        DataType::List(_) => "list",
        DataType::Map(..) => "map",
        other => return Err(Error::internal(format!("column {:?} has type {other}, unknown here", field.name()))),
    };
    out.push(Column { id, parent, name: field.name().clone(), kind, nullable: field.is_nullable() });
    match field.data_type() {
        DataType::List(element) => add_column(out, Some(id), element),
        DataType::Map(entries, _) => match entries.data_type() {
            DataType::Struct(pair) => pair.iter().try_for_each(|f| add_column(out, Some(id), f)),
            other => Err(Error::internal(format!("map column {:?} has entries of type {other}", field.name()))),
        },
        _ => Ok(()),
    }
}

/// `ts`, `metric`, the table's other columns, `series`, `tags`.
fn view(table: &TableSchema) -> String {
    let mut select = vec!["r.ts".to_owned(), "t.metric".to_owned()];
    for c in table.columns.iter().filter(|c| c.role == Role::Value) {
        select.push(match c.layout {
            Layout::DecimalLinear => format!("{} AS {}", decimal_linear(c.name), c.name),
            Layout::Plain | Layout::Delta => format!("r.{}", c.name),
        });
    }
    // A set is in a part of every day that refers to it.
    format!(
        "SELECT {}, r.series, t.tags FROM {{DUCKLAKE_CATALOG}}.stored.{} r JOIN (SELECT metric, metric_code, code, \
         any_value(tags) AS tags FROM {{DUCKLAKE_CATALOG}}.stored.tag_sets GROUP BY metric, metric_code, code) t \
         ON t.metric_code = r.metric AND t.code = r.series",
        select.join(", "),
        table.name
    )
}

/// The expression that gives back the very bits of a value (see [`tables::Part`]).
fn decimal_linear(n: &str) -> String {
    let powers = (0..16).map(|p| format!("1e{p}")).collect::<Vec<_>>().join(",");
    format!(
        "CASE WHEN r.{n}_double IS NOT NULL THEN r.{n}_double ELSE CAST(r.{n}_base + \
         CAST(floor(r.{n}_slope * CAST(epoch_ms(r.ts) - r.{n}_t0 AS DOUBLE)) AS BIGINT) + r.{n}_residual AS DOUBLE) \
         / list_extract([{powers}]::DOUBLE[], r.{n}_scale + 1) END"
    )
}

/// Brings the description up to date.
pub(super) async fn describe(
    tx: &mut SqliteConnection,
    data_path: &str,
    seed: u64,
    next_file_id: i64,
    now_ms: i64,
) -> Result<()> {
    for (key, value) in
        [("version", "1.0"), ("created_by", "Thalweg"), ("data_path", data_path), ("encrypted", "false")]
    {
        sqlx::query(r#"DELETE FROM ducklake_metadata WHERE "key" = $1 AND "scope" IS NULL"#)
            .bind(key)
            .execute(&mut *tx)
            .await?;
        sqlx::query(r#"INSERT INTO ducklake_metadata ("key", "value") VALUES ($1, $2)"#)
            .bind(key)
            .bind(value)
            .execute(&mut *tx)
            .await?;
    }
    let mut d = Description { snapshot: next_snapshot(tx).await?, seed, changes: Vec::new(), tables: Vec::new(), tx };
    d.schemas().await?;
    let (tables, views) = described()?;
    for table in &tables {
        d.table(table).await?;
    }
    for view in &views {
        d.view(view).await?;
    }
    d.versions().await?;
    let (snapshot, changes, changed) = (d.snapshot, d.changes, d.tables);
    if changes.is_empty() {
        return Ok(());
    }
    let schema_version = schema_version(tx).await?.map_or(0, |v| v + 1);
    for table_id in changed {
        sqlx::query(
            "INSERT INTO ducklake_schema_versions (begin_snapshot, schema_version, table_id) VALUES ($1, $2, $3)",
        )
        .bind(snapshot)
        .bind(schema_version)
        .bind(table_id)
        .execute(&mut *tx)
        .await?;
    }
    insert_snapshot(tx, snapshot, schema_version, next_file_id, &changes.join(","), now_ms).await
}

struct Description<'t> {
    tx: &'t mut SqliteConnection,
    snapshot: i64,
    seed: u64,
    changes: Vec<String>,
    /// Tables whose columns changed.
    tables: Vec<i64>,
}

impl Description<'_> {
    /// Outside readers want a UUID per object; ours follow from the seed.
    fn uuid(&self, what: &str) -> String {
        let h = format!("{:032x}", xxh3_128_with_seed(what.as_bytes(), self.seed));
        format!("{}-{}-8{}-8{}-{}", &h[..8], &h[8..12], &h[13..16], &h[17..20], &h[20..])
    }

    async fn schemas(&mut self) -> Result<()> {
        for (id, name) in [(MAIN, "main"), (STORED, "stored")] {
            let known: i64 = sqlx::query_scalar("SELECT count(*) FROM ducklake_schema WHERE schema_id = $1")
                .bind(id)
                .fetch_one(&mut *self.tx)
                .await?;
            if known > 0 {
                continue;
            }
            // Paths of files begin at the database's prefix, so schemas and tables add nothing to them.
            sqlx::query(
                "INSERT INTO ducklake_schema (schema_id, schema_uuid, begin_snapshot, schema_name, path,
                     path_is_relative) VALUES ($1, $2, $3, $4, '', 1)",
            )
            .bind(id)
            .bind(self.uuid(&format!("schema {name}")))
            .bind(self.snapshot)
            .bind(name)
            .execute(&mut *self.tx)
            .await?;
            self.changes.push(format!("created_schema:\"{name}\""));
        }
        Ok(())
    }

    async fn table(&mut self, table: &Table) -> Result<()> {
        let rows = sqlx::query(
            "SELECT column_id, parent_column, column_name, column_type, nulls_allowed FROM ducklake_column
             WHERE table_id = $1 AND end_snapshot IS NULL",
        )
        .bind(table.id)
        .fetch_all(&mut *self.tx)
        .await?;
        if rows.is_empty() {
            self.create_table(table).await?;
        }
        let mut changed = false;
        for (order, column) in (1i64..).zip(&table.columns) {
            let stored = rows.iter().find(|r| r.try_get::<i64, _>("column_id").is_ok_and(|id| id == column.id));
            if let Some(row) = stored {
                let parent: Option<i64> = row.try_get("parent_column")?;
                let (name, kind): (String, String) = (row.try_get("column_name")?, row.try_get("column_type")?);
                if (parent, name.as_str(), kind.as_str()) != (column.parent, &column.name, column.kind) {
                    return Err(Error::corrupt(format!(
                        "column {} of {} is {name} {kind}; this version has {} {}",
                        column.id, table.name, column.name, column.kind
                    )));
                }
                continue;
            }
            self.create_column(table.id, order, column).await?;
            changed = true;
        }
        for row in &rows {
            let id: i64 = row.try_get("column_id")?;
            if table.columns.iter().all(|c| c.id != id) {
                sqlx::query(
                    "UPDATE ducklake_column SET end_snapshot = $1
                     WHERE table_id = $2 AND column_id = $3 AND end_snapshot IS NULL",
                )
                .bind(self.snapshot)
                .bind(table.id)
                .bind(id)
                .execute(&mut *self.tx)
                .await?;
                changed = true;
            }
        }
        if changed {
            self.tables.push(table.id);
            if !rows.is_empty() {
                self.changes.push(format!("altered_table:{}", table.id));
            }
        }
        Ok(())
    }

    async fn create_table(&mut self, table: &Table) -> Result<()> {
        sqlx::query(
            "INSERT INTO ducklake_table (table_id, table_uuid, begin_snapshot, schema_id, table_name, path,
                 path_is_relative) VALUES ($1, $2, $3, $4, $5, '', 1)",
        )
        .bind(table.id)
        .bind(self.uuid(&format!("table {}", table.name)))
        .bind(self.snapshot)
        .bind(STORED)
        .bind(table.name)
        .execute(&mut *self.tx)
        .await?;
        sqlx::query(
            "INSERT INTO ducklake_table_stats (table_id, record_count, next_row_id, file_size_bytes)
             VALUES ($1, 0, 0, 0)",
        )
        .bind(table.id)
        .execute(&mut *self.tx)
        .await?;
        self.changes.push(format!("created_table:\"stored\".\"{}\"", table.name));
        Ok(())
    }

    async fn create_column(&mut self, table_id: i64, order: i64, column: &Column) -> Result<()> {
        let literal = if matches!(column.kind, "list" | "map") { "" } else { "literal" };
        sqlx::query(
            "INSERT INTO ducklake_column (column_id, begin_snapshot, table_id, column_order, column_name, column_type,
                 default_value, nulls_allowed, parent_column, default_value_type, default_value_dialect)
             VALUES ($1, $2, $3, $4, $5, $6, 'NULL', $7, $8, $9, 'duckdb')",
        )
        .bind(column.id)
        .bind(self.snapshot)
        .bind(table_id)
        .bind(order)
        .bind(&column.name)
        .bind(column.kind)
        .bind(i64::from(column.nullable))
        .bind(column.parent)
        .bind(literal)
        .execute(&mut *self.tx)
        .await?;
        Ok(())
    }

    async fn view(&mut self, view: &View) -> Result<()> {
        let stored: Option<String> =
            sqlx::query_scalar(r#"SELECT "sql" FROM ducklake_view WHERE view_id = $1 AND end_snapshot IS NULL"#)
                .bind(view.id)
                .fetch_optional(&mut *self.tx)
                .await?;
        if stored.as_ref() == Some(&view.sql) {
            return Ok(());
        }
        sqlx::query("UPDATE ducklake_view SET end_snapshot = $1 WHERE view_id = $2 AND end_snapshot IS NULL")
            .bind(self.snapshot)
            .bind(view.id)
            .execute(&mut *self.tx)
            .await?;
        sqlx::query(
            r#"INSERT INTO ducklake_view (view_id, view_uuid, begin_snapshot, schema_id, view_name, dialect, "sql",
                   column_aliases) VALUES ($1, $2, $3, $4, $5, 'duckdb', $6, '')"#,
        )
        .bind(view.id)
        .bind(self.uuid(&format!("view {}", view.name)))
        .bind(self.snapshot)
        .bind(MAIN)
        .bind(view.name)
        .bind(&view.sql)
        .execute(&mut *self.tx)
        .await?;
        self.changes.push(match stored {
            None => format!("created_view:\"main\".\"{}\"", view.name),
            Some(_) => format!("altered_view:{}", view.id),
        });
        Ok(())
    }

    /// Refuses tables that a newer version of us changed.
    async fn versions(&mut self) -> Result<()> {
        for table in tables::all() {
            let id = i64::from(table.id);
            let stored: Option<i64> = sqlx::query_scalar("SELECT version FROM thalweg_table WHERE table_id = $1")
                .bind(id)
                .fetch_optional(&mut *self.tx)
                .await?;
            if stored.is_some_and(|v| v > i64::from(table.version)) {
                return Err(Error::invalid(format!(
                    "table {} has schema version {}; this version reads up to {}",
                    table.name,
                    stored.unwrap_or_default(),
                    table.version
                )));
            }
            sqlx::query(
                "INSERT INTO thalweg_table (table_id, version) VALUES ($1, $2)
                 ON CONFLICT (table_id) DO UPDATE SET version = excluded.version",
            )
            .bind(id)
            .bind(i64::from(table.version))
            .execute(&mut *self.tx)
            .await?;
        }
        Ok(())
    }
}

// --- snapshots ---

async fn next_snapshot(tx: &mut SqliteConnection) -> Result<i64> {
    let last: Option<i64> = sqlx::query_scalar("SELECT max(snapshot_id) FROM ducklake_snapshot").fetch_one(tx).await?;
    Ok(last.map_or(0, |s| s + 1))
}

async fn schema_version(tx: &mut SqliteConnection) -> Result<Option<i64>> {
    Ok(sqlx::query_scalar("SELECT max(schema_version) FROM ducklake_snapshot").fetch_one(tx).await?)
}

async fn insert_snapshot(
    tx: &mut SqliteConnection,
    snapshot: i64,
    schema_version: i64,
    next_file_id: i64,
    changes: &str,
    now_ms: i64,
) -> Result<()> {
    sqlx::query(
        "INSERT INTO ducklake_snapshot (snapshot_id, snapshot_time, schema_version, next_catalog_id, next_file_id)
         VALUES ($1, $2, $3, $4, $5)",
    )
    .bind(snapshot)
    .bind(timestamp_text(now_ms))
    .bind(schema_version)
    .bind(NEXT_CATALOG_ID)
    .bind(next_file_id)
    .execute(&mut *tx)
    .await?;
    sqlx::query("INSERT INTO ducklake_snapshot_changes (snapshot_id, changes_made, author) VALUES ($1, $2, 'Thalweg')")
        .bind(snapshot)
        .bind(changes)
        .execute(tx)
        .await?;
    Ok(())
}

// --- commits ---

/// A file as DuckLake knows it.
struct Added<'a> {
    table: i64,
    id: i64,
    path: &'a str,
    rows: i64,
    bytes: i64,
    footer: i64,
    columns: &'a [super::ColumnStats],
}

/// Shows a change to outside readers as one snapshot; does nothing when no file comes or goes.
pub(super) async fn apply(tx: &mut SqliteConnection, commit: &Commit, next_file_id: i64, now_ms: i64) -> Result<()> {
    let mut added = Vec::new();
    for f in &commit.add {
        let (rows, bytes, footer) = (signed(f.rows)?, signed(f.bytes)?, signed(f.footer_bytes)?);
        let table = lake_id(f.table_id);
        added.push(Added { table, id: f.id, path: &f.path, rows, bytes, footer, columns: &f.columns });
    }
    for p in &commit.add_parts {
        let (rows, bytes, footer) = (signed(p.sets)?, signed(p.bytes)?, signed(p.footer_bytes)?);
        added.push(Added { table: TAG_SETS, id: p.id, path: &p.path, rows, bytes, footer, columns: &[] });
    }
    if added.is_empty() && commit.remove.is_empty() && commit.remove_parts.is_empty() {
        return Ok(());
    }
    let snapshot = next_snapshot(tx).await?;
    let mut changes: Vec<String> = Vec::new();
    for file in &added {
        add(tx, snapshot, file).await?;
        changes.push(format!("inserted_into_table:{}", file.table));
    }
    for id in commit.remove.iter().chain(&commit.remove_parts) {
        changes.push(format!("deleted_from_table:{}", end(tx, snapshot, *id).await?));
    }
    changes.sort_unstable();
    changes.dedup();
    let schema_version = schema_version(tx).await?.unwrap_or_default();
    insert_snapshot(tx, snapshot, schema_version, next_file_id, &changes.join(","), now_ms).await
}

async fn add(tx: &mut SqliteConnection, snapshot: i64, file: &Added<'_>) -> Result<()> {
    let first_row: i64 = sqlx::query_scalar(
        "UPDATE ducklake_table_stats SET record_count = record_count + $1, next_row_id = next_row_id + $1,
             file_size_bytes = file_size_bytes + $2 WHERE table_id = $3 RETURNING next_row_id - $1",
    )
    .bind(file.rows)
    .bind(file.bytes)
    .bind(file.table)
    .fetch_optional(&mut *tx)
    .await?
    .ok_or_else(|| Error::internal(format!("table {} is not in the file catalog", file.table)))?;
    sqlx::query(
        "INSERT INTO ducklake_data_file (data_file_id, table_id, begin_snapshot, path, path_is_relative, file_format,
             record_count, file_size_bytes, footer_size, row_id_start)
         VALUES ($1, $2, $3, $4, 1, 'parquet', $5, $6, $7, $8)",
    )
    .bind(file.id)
    .bind(file.table)
    .bind(snapshot)
    .bind(file.path)
    .bind(file.rows)
    .bind(file.bytes)
    .bind(file.footer)
    .bind(first_row)
    .execute(&mut *tx)
    .await?;
    for c in file.columns {
        sqlx::query(
            "INSERT INTO ducklake_file_column_stats (data_file_id, table_id, column_id, column_size_bytes, value_count,
                 null_count, min_value, max_value) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        )
        .bind(file.id)
        .bind(file.table)
        .bind(c.field_id)
        .bind(signed(c.bytes)?)
        .bind(signed(c.values)?)
        .bind(signed(c.nulls)?)
        .bind(&c.min)
        .bind(&c.max)
        .execute(&mut *tx)
        .await?;
    }
    Ok(())
}

/// Ends a file with this snapshot; returns DuckLake's number of its table.
async fn end(tx: &mut SqliteConnection, snapshot: i64, id: i64) -> Result<i64> {
    let row = sqlx::query(
        "UPDATE ducklake_data_file SET end_snapshot = $1 WHERE data_file_id = $2 AND end_snapshot IS NULL
         RETURNING table_id, record_count, file_size_bytes",
    )
    .bind(snapshot)
    .bind(id)
    .fetch_optional(&mut *tx)
    .await?
    .ok_or_else(|| Error::internal(format!("file {id} is to be removed and is not in the catalog")))?;
    let table: i64 = row.try_get("table_id")?;
    sqlx::query(
        "UPDATE ducklake_table_stats SET record_count = record_count - $1, file_size_bytes = file_size_bytes - $2
         WHERE table_id = $3",
    )
    .bind(row.try_get::<i64, _>("record_count")?)
    .bind(row.try_get::<i64, _>("file_size_bytes")?)
    .bind(table)
    .execute(tx)
    .await?;
    Ok(table)
}

/// Drops snapshots from before a time, except the last one, and schedules the files for deletion that only they show.
/// Returns whether there were any.
pub(super) async fn expire(tx: &mut SqliteConnection, older_than_ms: i64) -> Result<bool> {
    let Some(before) = timestamp_text(older_than_ms) else { return Ok(false) };
    // The text form sorts as the time does.
    let gone = sqlx::query(
        "DELETE FROM ducklake_snapshot WHERE snapshot_time < $1
             AND snapshot_id < (SELECT max(snapshot_id) FROM ducklake_snapshot)",
    )
    .bind(&before)
    .execute(&mut *tx)
    .await?;
    if gone.rows_affected() == 0 {
        return Ok(false);
    }
    sqlx::query(
        "INSERT INTO ducklake_files_scheduled_for_deletion (data_file_id, path, path_is_relative, schedule_start)
         SELECT f.data_file_id, f.path, 1, $1 FROM ducklake_data_file f
         WHERE f.end_snapshot <= (SELECT min(snapshot_id) FROM ducklake_snapshot)",
    )
    .bind(&before)
    .execute(&mut *tx)
    .await?;
    for statement in [
        "DELETE FROM ducklake_snapshot_changes WHERE snapshot_id < (SELECT min(snapshot_id) FROM ducklake_snapshot)",
        "DELETE FROM ducklake_file_column_stats WHERE data_file_id IN (SELECT data_file_id FROM ducklake_data_file
             WHERE end_snapshot <= (SELECT min(snapshot_id) FROM ducklake_snapshot))",
        "DELETE FROM ducklake_data_file
             WHERE end_snapshot <= (SELECT min(snapshot_id) FROM ducklake_snapshot)",
        "DELETE FROM ducklake_view WHERE end_snapshot <= (SELECT min(snapshot_id) FROM ducklake_snapshot)",
        "DELETE FROM ducklake_column WHERE end_snapshot <= (SELECT min(snapshot_id) FROM ducklake_snapshot)",
    ] {
        sqlx::query(statement).execute(&mut *tx).await?;
    }
    Ok(true)
}
