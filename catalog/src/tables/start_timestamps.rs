//! `start_timestamps`: one row per float sample whose sender said when its counter began.
//!
//! A table of its own rather than a column of `samples`: hardly any sender says it, and the others' samples then neither
//! store nor read anything for it. A sample that is sent again without a start keeps the one it had.

use arrow::datatypes::DataType;

use super::{TableSchema, tag, time, value};

pub(super) fn schema() -> TableSchema {
    TableSchema::new(
        4,
        "start_timestamps",
        1,
        true,
        vec![
            tag("series", 1),
            // That of the sample.
            time(2),
            // Milliseconds since the epoch, never 0.
            value("start_ts", 10, DataType::Int64, false),
        ],
    )
}
