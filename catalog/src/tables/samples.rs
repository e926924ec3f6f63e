//! `samples`: one row per float sample of any metric.

use arrow::datatypes::DataType;

use super::{ColumnSchema, Layout, Role, TableSchema, tag, time};

pub(super) fn schema() -> TableSchema {
    let value = ColumnSchema {
        name: "value",
        field_id: 10,
        data_type: DataType::Float64,
        nullable: false,
        role: Role::Value,
        layout: Layout::DecimalLinear,
    };
    TableSchema::new(1, "samples", 1, true, vec![tag("series", 1), time(2), value])
}
