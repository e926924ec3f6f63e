//! `histograms`: one row per native histogram sample, integer, float or with custom buckets.
//!
//! Bucket counts are absolute (not the deltas of the wire format). An integer histogram fills the `*_int` columns with
//! the bits of unsigned counts, a float histogram the `*_float` columns; `count_int` null tells a float histogram.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field};

use super::{TableSchema, tag, time, value};

pub(super) fn schema() -> TableSchema {
    let list = |t: DataType| DataType::List(Arc::new(Field::new("item", t, false)));
    TableSchema::new(
        2,
        "histograms",
        1,
        true,
        vec![
            tag("series", 1),
            time(2),
            value("schema", 10, DataType::Int32, false),
            value("zero_threshold", 11, DataType::Float64, false),
            value("sum", 12, DataType::Float64, false),
            value("count_int", 13, DataType::Int64, true),
            value("count_float", 14, DataType::Float64, true),
            value("zero_count_int", 15, DataType::Int64, true),
            value("zero_count_float", 16, DataType::Float64, true),
            value("positive_offsets", 17, list(DataType::Int32), false),
            value("positive_lengths", 18, list(DataType::Int32), false),
            value("positive_int", 19, list(DataType::Int64), false),
            value("positive_float", 20, list(DataType::Float64), false),
            value("negative_offsets", 21, list(DataType::Int32), false),
            value("negative_lengths", 22, list(DataType::Int32), false),
            value("negative_int", 23, list(DataType::Int64), false),
            value("negative_float", 24, list(DataType::Float64), false),
            value("custom_values", 25, list(DataType::Float64), false),
            // 0 unknown, 1 reset, 2 not reset, 3 gauge: `Histogram.ResetHint` of Prometheus's types.proto.
            value("reset_hint", 26, DataType::Int8, false),
            // Milliseconds since the epoch when the counter began; null when the sender did not say.
            value("start_ts", 27, DataType::Int64, true),
        ],
    )
}
