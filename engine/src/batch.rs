//! What receivers produce: encoded rows with the tag sets that they refer to.

use std::sync::Arc;

use arrow::record_batch::RecordBatch;
use catalog::{Encoded, TableSchema};

/// Rows of one table in the table's in-memory schema ([`TableSchema::arrow`]); tag columns hold
/// [`catalog::TagRef`]s into the [`Write`]'s tag sets. Rows need no order; of rows with equal keys the last wins.
#[derive(Debug, Clone)]
pub struct Batch {
    /// The table.
    pub table: Arc<TableSchema>,
    /// The rows.
    pub rows: RecordBatch,
}

/// What a metric is, as its source describes it. Kept per metric name, the newest wins.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MetricMetadata {
    /// Metric family name.
    pub metric: String,
    /// `counter`, `gauge`, `histogram`, `gaugehistogram`, `summary`, `info`, `stateset` or `unknown`.
    pub kind: String,
    /// Help text.
    pub help: String,
    /// Unit, often empty.
    pub unit: String,
}

/// The accepted part of one request: stored whole or not at all.
#[derive(Debug, Clone, Default)]
pub struct Write {
    /// The tag sets that rows refer to.
    pub tags: Encoded,
    /// The rows, a batch or more for each table.
    pub batches: Vec<Batch>,
    /// Metric metadata that came with the request.
    pub metadata: Vec<MetricMetadata>,
}

impl Write {
    /// Rows over all batches.
    pub fn rows(&self) -> usize {
        self.batches.iter().map(|b| b.rows.num_rows()).sum()
    }
}
