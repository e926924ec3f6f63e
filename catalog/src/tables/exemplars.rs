//! `exemplars`: one row per exemplar. Its labels are unique to it (trace ids), so they are text in the row and not a
//! tag set.

use arrow::datatypes::DataType;

use super::{Metric, TableSchema, tag, time, value};

const METRICS: &[Metric] = &[Metric { name: "prometheus__exemplars__value", column: "value" }];

pub(super) fn schema() -> TableSchema {
    TableSchema::new(
        3,
        "exemplars",
        1,
        true,
        vec![
            tag("series", 1),
            time(2),
            value("value", 10, DataType::Float64, false),
            // A JSON object of texts, keys sorted.
            value("labels", 11, DataType::Utf8, false),
        ],
    )
    .with_metrics(METRICS)
}
