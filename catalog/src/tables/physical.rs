//! How a table's columns lie in files.
//!
//! Every file begins with the two codes that its rows are sorted by before `series`: `metric` and `target`. A tag column
//! becomes its `INT64` code, a [`Layout::DecimalLinear`] column the six columns named in [`Part`], and any other column
//! one column of the same type. Columns are found by their field id, never by name or position.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field};

use super::{ColumnSchema, Layout, Role};

/// Field id of the `metric` column.
pub const METRIC_FIELD_ID: i32 = 90;
/// Field id of the `target` column.
pub const TARGET_FIELD_ID: i32 = 91;
/// The key under which an Arrow field carries its Parquet field id.
pub const FIELD_ID_KEY: &str = "PARQUET:field_id";

/// What a column of a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// Code of the metric's name, `INT64`.
    Metric,
    /// Code of job and instance, `INT64`.
    Target,
    /// Code of a tag column, `INT64`.
    Code,
    /// A whole logical column.
    Whole,
    /// `<name>_residual`, nullable `INT64`: what the line leaves over. The row's value is `<name>_double` unless that is
    /// null, else `(base + floor(slope * (ts - t0)) + residual) / 10^scale`.
    Residual,
    /// `<name>_base`, nullable `INT64`, constant over a run.
    Base,
    /// `<name>_slope`, nullable `FLOAT64`, per millisecond, constant over a run.
    Slope,
    /// `<name>_t0`, nullable `INT64`, milliseconds since the epoch, constant over a run.
    T0,
    /// `<name>_scale`, nullable `INT32`, 0 to 15, constant over a run.
    Scale,
    /// `<name>_double`, nullable `FLOAT64`: the value itself where no line is used.
    Double,
}

/// One column of a table's files.
#[derive(Debug, Clone)]
pub struct PhysicalColumn {
    /// Name in the file.
    pub name: String,
    /// Parquet field id and DuckLake column id.
    pub field_id: i32,
    /// Arrow type in files. The element of a list is named `element` and carries field id `parent * 100 + 1`.
    pub data_type: DataType,
    /// Whether nulls occur.
    pub nullable: bool,
    /// How it is laid out; never [`Layout::DecimalLinear`].
    pub layout: Layout,
    /// What it holds.
    pub part: Part,
    /// Index of the logical column; `None` for `metric` and `target`.
    pub column: Option<usize>,
}

impl PhysicalColumn {
    /// The Arrow field, with the field id in its metadata.
    pub fn field(&self) -> Field {
        with_field_id(Field::new(&self.name, self.data_type.clone(), self.nullable), self.field_id)
    }
}

/// Sets the Parquet field id of a field.
pub fn with_field_id(field: Field, id: i32) -> Field {
    field.with_metadata(HashMap::from([(FIELD_ID_KEY.to_owned(), id.to_string())]))
}

pub(super) fn columns(logical: &[ColumnSchema]) -> Vec<PhysicalColumn> {
    let code = |name: &str, field_id, part, column| PhysicalColumn {
        name: name.to_owned(),
        field_id,
        data_type: DataType::Int64,
        nullable: false,
        layout: Layout::Plain,
        part,
        column,
    };
    let mut out =
        vec![code("metric", METRIC_FIELD_ID, Part::Metric, None), code("target", TARGET_FIELD_ID, Part::Target, None)];
    for (i, c) in logical.iter().enumerate() {
        if c.role == Role::Tag {
            out.push(code(c.name, c.field_id, Part::Code, Some(i)));
        } else if c.layout == Layout::DecimalLinear {
            out.extend(decimal_linear(i, c));
        } else {
            out.push(PhysicalColumn {
                name: c.name.to_owned(),
                field_id: c.field_id,
                data_type: stored_type(&c.data_type, c.field_id),
                nullable: c.nullable,
                layout: c.layout,
                part: Part::Whole,
                column: Some(i),
            });
        }
    }
    out
}

fn decimal_linear(index: usize, c: &ColumnSchema) -> impl Iterator<Item = PhysicalColumn> + '_ {
    let parts = [
        ("residual", DataType::Int64, Layout::Delta, Part::Residual),
        ("base", DataType::Int64, Layout::Plain, Part::Base),
        ("slope", DataType::Float64, Layout::Plain, Part::Slope),
        ("t0", DataType::Int64, Layout::Plain, Part::T0),
        ("scale", DataType::Int32, Layout::Plain, Part::Scale),
        ("double", DataType::Float64, Layout::Plain, Part::Double),
    ];
    parts.into_iter().zip(1..).map(move |((suffix, data_type, layout, part), offset)| PhysicalColumn {
        name: format!("{}_{suffix}", c.name),
        field_id: c.field_id + offset,
        data_type,
        nullable: true,
        layout,
        part,
        column: Some(index),
    })
}

/// Lists get the element name of the Parquet standard and a field id for it.
fn stored_type(t: &DataType, field_id: i32) -> DataType {
    match t {
        DataType::List(item) => {
            let id = field_id * 100 + 1;
            let element = Field::new("element", stored_type(item.data_type(), id), item.is_nullable());
            DataType::List(Arc::new(with_field_id(element, id)))
        }
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::all;
    use super::*;

    fn check(table: &str, expected: &[(&str, i32, bool)]) {
        let table = super::super::by_name(table).unwrap();
        let seen: Vec<_> = table.physical().iter().map(|c| (c.name.as_str(), c.field_id, c.nullable)).collect();
        assert_eq!(seen, expected);
    }

    #[test]
    fn columns_of_files() {
        check(
            "samples",
            &[
                ("metric", 90, false),
                ("target", 91, false),
                ("series", 1, false),
                ("ts", 2, false),
                ("value_residual", 11, true),
                ("value_base", 12, true),
                ("value_slope", 13, true),
                ("value_t0", 14, true),
                ("value_scale", 15, true),
                ("value_double", 16, true),
            ],
        );
        check(
            "exemplars",
            &[
                ("metric", 90, false),
                ("target", 91, false),
                ("series", 1, false),
                ("ts", 2, false),
                ("value", 10, false),
                ("labels", 11, false),
            ],
        );
    }

    #[test]
    fn field_ids_are_unique() {
        for table in all() {
            let mut ids: Vec<i32> = Vec::new();
            for c in table.physical() {
                ids.push(c.field_id);
                if let DataType::List(e) = &c.data_type {
                    assert_eq!(e.name(), "element");
                    ids.push(e.metadata()[FIELD_ID_KEY].parse().unwrap());
                }
            }
            let n = ids.len();
            ids.sort_unstable();
            ids.dedup();
            assert_eq!(ids.len(), n, "{}", table.name);
        }
    }
}
