//! The schemas of all tables, one file per table.
//!
//! A table is its columns, which of them are tags, which is the time, and whether rows have a key. The engine stores
//! any table from its schema alone; adding one is a schema here and a receiver that fills it.
//!
//! Two forms of a row exist. In memory a tag column is a `UInt32`: an index into the tag sets of its batch, later an
//! ordinal of the registry. In files it is the `Int64` code. All other columns have one type everywhere.

mod exemplars;
mod histograms;
mod physical;
mod samples;
mod start_timestamps;

use std::sync::{Arc, LazyLock};

use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};

pub use physical::{FIELD_ID_KEY, METRIC_FIELD_ID, Part, PhysicalColumn, TARGET_FIELD_ID, with_field_id};

/// What a column is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Refers to a tag set: `UInt32` in memory, `Int64` code in files.
    Tag,
    /// The row's time, milliseconds since the epoch, UTC.
    Time,
    /// Anything else.
    Value,
}

/// How a column is laid out in Parquet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// One Parquet column with the writer's choice of dictionary or plain.
    Plain,
    /// One Parquet column, DELTA_BINARY_PACKED.
    Delta,
    /// A `Float64` stored as the decimal-linear group of columns that `engine/FORMAT.md` describes.
    DecimalLinear,
}

/// One column.
#[derive(Debug, Clone)]
pub struct ColumnSchema {
    /// Name in SQL and in files.
    pub name: &'static str,
    /// Parquet field id and DuckLake column id; never reused. A [`Layout::DecimalLinear`] column owns the ten ids from
    /// this one on.
    pub field_id: i32,
    /// Arrow type in memory.
    pub data_type: DataType,
    /// Whether nulls occur.
    pub nullable: bool,
    /// What it is for.
    pub role: Role,
    /// How it is stored.
    pub layout: Layout,
}

/// A column whose values are the samples of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metric {
    /// The metric's name. It is reserved: series of `samples` are not found under it.
    pub name: &'static str,
    /// The column, of numbers; a null is no sample.
    pub column: &'static str,
}

/// One table.
#[derive(Debug)]
pub struct TableSchema {
    /// Number in WAL records and in the file catalog; never reused.
    pub id: u16,
    /// Name in SQL.
    pub name: &'static str,
    /// Grows when columns are added or retired.
    pub version: u32,
    /// Columns in order. A keyed table begins with its tag column `series` and its time column `ts`.
    pub columns: Vec<ColumnSchema>,
    /// True when (series, ts) identifies a row: a later row with the same key replaces the earlier.
    pub keyed: bool,
    /// The columns that are metrics by names of their own. The tags of a row are the labels.
    pub metrics: &'static [Metric],
    /// The label under which such a metric shows the name that a tag set has itself.
    pub name_label: &'static str,
    arrow: SchemaRef,
    physical: Vec<PhysicalColumn>,
    physical_arrow: SchemaRef,
}

impl TableSchema {
    fn new(id: u16, name: &'static str, version: u32, keyed: bool, columns: Vec<ColumnSchema>) -> Self {
        let fields: Vec<Field> = columns.iter().map(|c| Field::new(c.name, c.data_type.clone(), c.nullable)).collect();
        let physical = physical::columns(&columns);
        let physical_arrow = Arc::new(Schema::new(physical.iter().map(PhysicalColumn::field).collect::<Vec<_>>()));
        let arrow = Arc::new(Schema::new(fields));
        let (metrics, name_label) = (&[][..], "metric");
        Self { id, name, version, columns, keyed, metrics, name_label, arrow, physical, physical_arrow }
    }

    /// With columns that are metrics. Only a keyed table has at most one value for a series and a time.
    fn with_metrics(self, metrics: &'static [Metric]) -> Self {
        Self { metrics, ..self }
    }

    /// The Arrow schema of rows in memory.
    pub fn arrow(&self) -> &SchemaRef {
        &self.arrow
    }

    /// The columns of this table's files, in order: `metric`, `target`, then what each logical column becomes.
    pub fn physical(&self) -> &[PhysicalColumn] {
        &self.physical
    }

    /// The Arrow schema of this table's files: [`TableSchema::physical`] with field ids in the metadata.
    pub fn physical_arrow(&self) -> &SchemaRef {
        &self.physical_arrow
    }

    /// The index and schema of a column.
    pub fn column(&self, name: &str) -> Option<(usize, &ColumnSchema)> {
        self.columns.iter().enumerate().find(|(_, c)| c.name == name)
    }
}

/// The type of time columns.
pub fn time_type() -> DataType {
    DataType::Timestamp(TimeUnit::Millisecond, Some(Arc::from("UTC")))
}

fn tag(name: &'static str, field_id: i32) -> ColumnSchema {
    ColumnSchema {
        name,
        field_id,
        data_type: DataType::UInt32,
        nullable: false,
        role: Role::Tag,
        layout: Layout::Plain,
    }
}

fn time(field_id: i32) -> ColumnSchema {
    ColumnSchema {
        name: "ts",
        field_id,
        data_type: time_type(),
        nullable: false,
        role: Role::Time,
        layout: Layout::Delta,
    }
}

fn value(name: &'static str, field_id: i32, data_type: DataType, nullable: bool) -> ColumnSchema {
    ColumnSchema { name, field_id, data_type, nullable, role: Role::Value, layout: Layout::Plain }
}

/// Float samples of all metrics.
pub static SAMPLES: LazyLock<Arc<TableSchema>> = LazyLock::new(|| Arc::new(samples::schema()));
/// Native histogram samples.
pub static HISTOGRAMS: LazyLock<Arc<TableSchema>> = LazyLock::new(|| Arc::new(histograms::schema()));
/// Exemplars.
pub static EXEMPLARS: LazyLock<Arc<TableSchema>> = LazyLock::new(|| Arc::new(exemplars::schema()));

/// When the counters of float samples began.
pub static START_TIMESTAMPS: LazyLock<Arc<TableSchema>> = LazyLock::new(|| Arc::new(start_timestamps::schema()));

/// Every table.
pub fn all() -> [&'static Arc<TableSchema>; 4] {
    [&SAMPLES, &HISTOGRAMS, &EXEMPLARS, &START_TIMESTAMPS]
}

/// The table with this number.
pub fn by_id(id: u16) -> Option<&'static Arc<TableSchema>> {
    all().into_iter().find(|t| t.id == id)
}

/// The table with this name.
pub fn by_name(name: &str) -> Option<&'static Arc<TableSchema>> {
    all().into_iter().find(|t| t.name == name)
}

/// The table and the column that a metric's name stands for, unless it is one of `samples`.
pub fn metric(name: &str) -> Option<(&'static Arc<TableSchema>, &'static Metric)> {
    metrics().find(|(_, metric)| metric.name == name)
}

/// Every column that is a metric by a name of its own, with its table.
pub fn metrics() -> impl Iterator<Item = (&'static Arc<TableSchema>, &'static Metric)> {
    all().into_iter().flat_map(|table| table.metrics.iter().map(move |metric| (table, metric)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemas_hold_together() {
        for table in all() {
            assert_eq!(by_id(table.id).map(|t| t.name), Some(table.name), "numbers are unique");
            assert_eq!(by_name(table.name).map(|t| t.id), Some(table.id), "names are unique");
            assert!(table.columns.iter().any(|c| c.role == Role::Time), "{}", table.name);
            if table.keyed {
                let roles: Vec<_> = table.columns.iter().map(|c| (c.name, c.role)).take(2).collect();
                assert_eq!(roles, [("series", Role::Tag), ("ts", Role::Time)], "{}", table.name);
            }
            for metric in table.metrics {
                let (_, column) = table.column(metric.column).expect("a column of the table");
                assert!(
                    table.keyed && column.role == Role::Value,
                    "{}: one value for a series and a time",
                    metric.name
                );
                assert!(column.data_type.is_numeric(), "{} is of numbers", metric.name);
                let known = super::metric(metric.name).map(|(t, m)| (t.id, m.column));
                assert_eq!(known, Some((table.id, metric.column)), "names are unique");
            }
            for (i, column) in table.columns.iter().enumerate() {
                assert_eq!(table.column(column.name).map(|c| c.0), Some(i));
                assert_eq!(table.arrow().field(i).data_type(), &column.data_type);
                let is_float = column.data_type == DataType::Float64;
                assert!(column.layout != Layout::DecimalLinear || is_float, "{}.{}", table.name, column.name);
            }
        }
        assert!(by_id(0).is_none() && by_name("nothing").is_none());
    }
}
