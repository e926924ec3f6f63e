//! The DuckLake side of the catalog: snapshots, the schema that outside readers see, and files as they see them.
//!
//! Physical tables are in the schema `stored`; the schema `main` has one view per table that joins the tag sets and
//! computes values, so that `SELECT * FROM lake.samples` shows names and numbers. What readers can see is described
//! anew from [`crate::tables`] whenever the catalog is opened, and a difference becomes a snapshot.

use arrow::datatypes::DataType;
use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::index::signed;
use super::sql::{Connection, Value, values};
use super::{ColumnStats, DataFile, TagPart};
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
/// And all numbers of files below this. DuckLake's writers take theirs from here on; there are none.
const NEXT_FILE_ID: i64 = 1 << 62;

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

/// Brings the description up to date, within a transaction.
pub(super) async fn describe(tx: &mut Connection, data_path: &str, seed: u64, now_ms: i64) -> Result<()> {
    for (key, value) in
        [("version", "1.0"), ("created_by", "Thalweg"), ("data_path", data_path), ("encrypted", "false")]
    {
        tx.execute(r#"DELETE FROM ducklake_metadata WHERE "key" = $1 AND "scope" IS NULL"#, values![key]).await?;
        tx.execute(r#"INSERT INTO ducklake_metadata ("key", "value") VALUES ($1, $2)"#, values![key, value]).await?;
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
        tx.execute(
            "INSERT INTO ducklake_schema_versions (begin_snapshot, schema_version, table_id) VALUES ($1, $2, $3)",
            values![snapshot, schema_version, table_id],
        )
        .await?;
    }
    insert_snapshot(tx, snapshot, schema_version, &changes.join(","), now_ms).await
}

struct Description<'t> {
    tx: &'t mut Connection,
    snapshot: i64,
    seed: u64,
    changes: Vec<String>,
    /// Tables whose columns changed.
    tables: Vec<i64>,
}

impl Description<'_> {
    /// Outside readers want a UUID per object; ours follow from the seed.
    fn uuid(&self, what: &str) -> Value {
        // Version and variant as those of a UUID that is made up.
        let bits = xxh3_128_with_seed(what.as_bytes(), self.seed);
        Value::Uuid((bits & !(0xf << 76 | 0xf << 60)) | 8 << 76 | 8 << 60)
    }

    async fn schemas(&mut self) -> Result<()> {
        for (id, name) in [(MAIN, "main"), (STORED, "stored")] {
            if self.tx.int("SELECT schema_id FROM ducklake_schema WHERE schema_id = $1", values![id]).await?.is_some() {
                continue;
            }
            // Paths of files begin at the database's prefix, so schemas and tables add nothing to them.
            let uuid = self.uuid(&format!("schema {name}"));
            self.tx
                .execute(
                    "INSERT INTO ducklake_schema (schema_id, schema_uuid, begin_snapshot, schema_name, path,
                         path_is_relative) VALUES ($1, $2, $3, $4, '', TRUE)",
                    values![id, uuid, self.snapshot, name],
                )
                .await?;
            self.changes.push(format!("created_schema:\"{name}\""));
        }
        Ok(())
    }

    async fn table(&mut self, table: &Table) -> Result<()> {
        let rows = self
            .tx
            .rows(
                "SELECT column_id, parent_column, column_name, column_type FROM ducklake_column
                 WHERE table_id = $1 AND end_snapshot IS NULL",
                values![table.id],
            )
            .await?;
        let mut stored = Vec::with_capacity(rows.len());
        for row in &rows {
            stored.push((row.int(0)?.unwrap_or_default(), row.int(1)?, row.text(2)?, row.text(3)?));
        }
        if stored.is_empty() {
            self.create_table(table).await?;
        }
        let mut changed = false;
        for (order, column) in (1i64..).zip(&table.columns) {
            let Some((_, parent, name, kind)) = stored.iter().find(|s| s.0 == column.id) else {
                self.create_column(table.id, order, column).await?;
                changed = true;
                continue;
            };
            if (*parent, name.as_deref(), kind.as_deref()) != (column.parent, Some(&column.name), Some(column.kind)) {
                return Err(Error::corrupt(format!(
                    "column {} of {} is {name:?} {kind:?}; this version has {} {}",
                    column.id, table.name, column.name, column.kind
                )));
            }
        }
        for (id, ..) in &stored {
            if table.columns.iter().all(|c| c.id != *id) {
                self.tx
                    .execute(
                        "UPDATE ducklake_column SET end_snapshot = $1
                         WHERE table_id = $2 AND column_id = $3 AND end_snapshot IS NULL",
                        values![self.snapshot, table.id, *id],
                    )
                    .await?;
                changed = true;
            }
        }
        if changed {
            self.tables.push(table.id);
            if !stored.is_empty() {
                self.changes.push(format!("altered_table:{}", table.id));
            }
        }
        Ok(())
    }

    async fn create_table(&mut self, table: &Table) -> Result<()> {
        let uuid = self.uuid(&format!("table {}", table.name));
        self.tx
            .execute(
                "INSERT INTO ducklake_table (table_id, table_uuid, begin_snapshot, schema_id, table_name, path,
                     path_is_relative) VALUES ($1, $2, $3, $4, $5, '', TRUE)",
                values![table.id, uuid, self.snapshot, STORED, table.name],
            )
            .await?;
        self.tx
            .execute(
                "INSERT INTO ducklake_table_stats (table_id, record_count, next_row_id, file_size_bytes)
                 VALUES ($1, 0, 0, 0)",
                values![table.id],
            )
            .await?;
        self.changes.push(format!("created_table:\"stored\".\"{}\"", table.name));
        Ok(())
    }

    async fn create_column(&mut self, table_id: i64, order: i64, column: &Column) -> Result<()> {
        let literal = if matches!(column.kind, "list" | "map") { "" } else { "literal" };
        let nullable = Value::Bool(column.nullable);
        self.tx
            .execute(
                "INSERT INTO ducklake_column (column_id, begin_snapshot, table_id, column_order, column_name,
                     column_type, default_value, nulls_allowed, parent_column, default_value_type,
                     default_value_dialect)
                 VALUES ($1, $2, $3, $4, $5, $6, 'NULL', $7, $8, $9, 'duckdb')",
                values![
                    column.id,
                    self.snapshot,
                    table_id,
                    order,
                    column.name.as_str(),
                    column.kind,
                    nullable,
                    column.parent,
                    literal
                ],
            )
            .await?;
        Ok(())
    }

    async fn view(&mut self, view: &View) -> Result<()> {
        let select = r#"SELECT "sql" FROM ducklake_view WHERE view_id = $1 AND end_snapshot IS NULL"#;
        let stored = match self.tx.row(select, values![view.id]).await? {
            Some(row) => row.text(0)?,
            None => None,
        };
        if stored.as_ref() == Some(&view.sql) {
            return Ok(());
        }
        self.tx
            .execute(
                "UPDATE ducklake_view SET end_snapshot = $1 WHERE view_id = $2 AND end_snapshot IS NULL",
                values![self.snapshot, view.id],
            )
            .await?;
        let uuid = self.uuid(&format!("view {}", view.name));
        self.tx
            .execute(
                r#"INSERT INTO ducklake_view (view_id, view_uuid, begin_snapshot, schema_id, view_name, dialect, "sql",
                       column_aliases) VALUES ($1, $2, $3, $4, $5, 'duckdb', $6, '')"#,
                values![view.id, uuid, self.snapshot, MAIN, view.name, view.sql.as_str()],
            )
            .await?;
        self.changes.push(match stored {
            None => format!("created_view:\"main\".\"{}\"", view.name),
            Some(_) => format!("altered_view:{}", view.id),
        });
        Ok(())
    }

    async fn versions(&mut self) -> Result<()> {
        for table in tables::all() {
            self.tx
                .execute(
                    "INSERT INTO thalweg_table (table_id, version) VALUES ($1, $2)
                     ON CONFLICT (table_id) DO UPDATE SET version = excluded.version",
                    values![i64::from(table.id), i64::from(table.version)],
                )
                .await?;
        }
        Ok(())
    }
}

// --- snapshots ---

async fn next_snapshot(tx: &mut Connection) -> Result<i64> {
    Ok(tx.int("SELECT max(snapshot_id) FROM ducklake_snapshot", &[]).await?.map_or(0, |s| s + 1))
}

async fn schema_version(tx: &mut Connection) -> Result<Option<i64>> {
    tx.int("SELECT max(schema_version) FROM ducklake_snapshot", &[]).await
}

async fn insert_snapshot(
    tx: &mut Connection,
    snapshot: i64,
    schema_version: i64,
    changes: &str,
    now_ms: i64,
) -> Result<()> {
    tx.execute(
        "INSERT INTO ducklake_snapshot (snapshot_id, snapshot_time, schema_version, next_catalog_id, next_file_id)
         VALUES ($1, $2, $3, $4, $5)",
        values![snapshot, Value::Time(now_ms), schema_version, NEXT_CATALOG_ID, NEXT_FILE_ID],
    )
    .await?;
    tx.execute(
        "INSERT INTO ducklake_snapshot_changes (snapshot_id, changes_made, author) VALUES ($1, $2, 'Thalweg')",
        values![snapshot, changes],
    )
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
    columns: &'a [ColumnStats],
}

/// Files and tag parts that come, and ids of those that go.
pub(super) struct Change<'a> {
    pub files: &'a [DataFile],
    pub parts: &'a [TagPart],
    pub gone: Vec<i64>,
}

/// Shows a change to outside readers as one snapshot, within a transaction; does nothing when no file comes or goes.
pub(super) async fn apply(tx: &mut Connection, change: &Change<'_>, now_ms: i64) -> Result<()> {
    let mut added = Vec::new();
    for f in change.files {
        let (rows, bytes, footer) = (signed(f.rows)?, signed(f.bytes)?, signed(f.footer_bytes)?);
        let table = lake_id(f.table_id);
        added.push(Added { table, id: f.id, path: &f.path, rows, bytes, footer, columns: &f.columns });
    }
    for p in change.parts {
        let (rows, bytes, footer) = (signed(p.sets)?, signed(p.bytes)?, signed(p.footer_bytes)?);
        added.push(Added { table: TAG_SETS, id: p.id, path: &p.path, rows, bytes, footer, columns: &[] });
    }
    if added.is_empty() && change.gone.is_empty() {
        return Ok(());
    }
    let snapshot = next_snapshot(tx).await?;
    let mut changes: Vec<String> = Vec::new();
    for file in &added {
        add(tx, snapshot, file).await?;
        changes.push(format!("inserted_into_table:{}", file.table));
    }
    for id in &change.gone {
        changes.push(format!("deleted_from_table:{}", end(tx, snapshot, *id).await?));
    }
    changes.sort_unstable();
    changes.dedup();
    let schema_version = schema_version(tx).await?.unwrap_or_default();
    insert_snapshot(tx, snapshot, schema_version, &changes.join(","), now_ms).await
}

async fn add(tx: &mut Connection, snapshot: i64, file: &Added<'_>) -> Result<()> {
    let first_row = tx
        .int(
            "UPDATE ducklake_table_stats SET record_count = record_count + $1, next_row_id = next_row_id + $1,
                 file_size_bytes = file_size_bytes + $2 WHERE table_id = $3 RETURNING next_row_id - $1",
            values![file.rows, file.bytes, file.table],
        )
        .await?
        .ok_or_else(|| Error::internal(format!("table {} is not in the SQL catalog", file.table)))?;
    tx.execute(
        "INSERT INTO ducklake_data_file (data_file_id, table_id, begin_snapshot, path, path_is_relative, file_format,
             record_count, file_size_bytes, footer_size, row_id_start)
         VALUES ($1, $2, $3, $4, TRUE, 'parquet', $5, $6, $7, $8)",
        values![file.id, file.table, snapshot, file.path, file.rows, file.bytes, file.footer, first_row],
    )
    .await?;
    for c in file.columns {
        let (bytes, count, nulls) = (signed(c.bytes)?, signed(c.values)?, signed(c.nulls)?);
        tx.execute(
            "INSERT INTO ducklake_file_column_stats (data_file_id, table_id, column_id, column_size_bytes, value_count,
                 null_count, min_value, max_value) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
            values![
                file.id,
                file.table,
                i64::from(c.field_id),
                bytes,
                count,
                nulls,
                c.min.as_deref(),
                c.max.as_deref()
            ],
        )
        .await?;
    }
    Ok(())
}

/// Ends a file with this snapshot; returns DuckLake's number of its table.
async fn end(tx: &mut Connection, snapshot: i64, id: i64) -> Result<i64> {
    let row = tx
        .row(
            "UPDATE ducklake_data_file SET end_snapshot = $1 WHERE data_file_id = $2 AND end_snapshot IS NULL
             RETURNING table_id, record_count, file_size_bytes",
            values![snapshot, id],
        )
        .await?
        .ok_or_else(|| Error::internal(format!("file {id} is to be removed and is not in the SQL catalog")))?;
    let table = row.int(0)?.unwrap_or_default();
    tx.execute(
        "UPDATE ducklake_table_stats SET record_count = record_count - $1, file_size_bytes = file_size_bytes - $2
         WHERE table_id = $3",
        values![row.int(1)?, row.int(2)?, table],
    )
    .await?;
    Ok(table)
}

/// Drops snapshots from before a time, except the last one, with the files that only they show, within a transaction. By
/// their order: one that was made while the clock was ahead must not keep those that came after it.
pub(super) async fn expire(tx: &mut Connection, older_than_ms: i64) -> Result<()> {
    if super::timestamp_text(older_than_ms).is_none() {
        return Ok(());
    }
    // As a text, too, a time sorts as it does.
    let gone = tx
        .execute(
            "DELETE FROM ducklake_snapshot
                 WHERE snapshot_id <= (SELECT max(snapshot_id) FROM ducklake_snapshot WHERE snapshot_time < $1)
                 AND snapshot_id < (SELECT max(snapshot_id) FROM ducklake_snapshot)",
            values![Value::Time(older_than_ms)],
        )
        .await?;
    if gone == 0 {
        return Ok(());
    }
    for statement in [
        "DELETE FROM ducklake_snapshot_changes WHERE snapshot_id < (SELECT min(snapshot_id) FROM ducklake_snapshot)",
        "DELETE FROM ducklake_file_column_stats WHERE data_file_id IN (SELECT data_file_id FROM ducklake_data_file
             WHERE end_snapshot <= (SELECT min(snapshot_id) FROM ducklake_snapshot))",
        "DELETE FROM ducklake_data_file
             WHERE end_snapshot <= (SELECT min(snapshot_id) FROM ducklake_snapshot)",
        "DELETE FROM ducklake_view WHERE end_snapshot <= (SELECT min(snapshot_id) FROM ducklake_snapshot)",
        "DELETE FROM ducklake_column WHERE end_snapshot <= (SELECT min(snapshot_id) FROM ducklake_snapshot)",
    ] {
        tx.execute(statement, &[]).await?;
    }
    Ok(())
}
