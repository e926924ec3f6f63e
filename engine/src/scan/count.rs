//! How many rows each series of a scan has: a leaf for plans that ask for nothing else of the rows.
//!
//! Sources whose times overlap are merged, since they may hold the same row twice. A file that is alone in its time is
//! counted by its index of runs, and none of its rows are read.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, LazyLock};

use arrow::array::{ArrayRef, Int64Array, RecordBatch, UInt32Array};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use catalog::Result;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::error::{DataFusionError, Result as DfResult};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::{EquivalenceProperties, PhysicalExpr};
use datafusion::physical_plan::coop::cooperative;
use datafusion::physical_plan::metrics::{BaselineMetrics, ExecutionPlanMetricsSet, MetricsSet};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{DisplayAs, DisplayFormatType, ExecutionPlan, PlanProperties};

use super::merge::Merge;
use super::{SeriesScanExec, reads};
use crate::segment::{Cursor, Reads, count_runs};

static SCHEMA: LazyLock<SchemaRef> = LazyLock::new(|| {
    let fields = vec![Field::new("series", DataType::UInt32, false), Field::new("rows", DataType::Int64, false)];
    Arc::new(Schema::new(fields))
});

/// Counts the rows of a [`SeriesScanExec`]. Output columns are `series`, as that node has it, and `rows` (`Int64`). A
/// series comes once or several times, in any order, and its counts add up; one without rows does not come. Partitions hold
/// the series that those of the scan hold.
#[derive(Debug)]
pub struct SeriesCountExec {
    scan: SeriesScanExec,
    properties: Arc<PlanProperties>,
    metrics: ExecutionPlanMetricsSet,
}

impl SeriesCountExec {
    /// Counts what `scan` would read.
    pub fn new(scan: &SeriesScanExec) -> Self {
        let scan = scan.reading(vec![]);
        let equivalences = EquivalenceProperties::new(SCHEMA.clone());
        let properties = PlanProperties::clone(&scan.properties).with_eq_properties(equivalences);
        Self { scan, properties: Arc::new(properties), metrics: ExecutionPlanMetricsSet::new() }
    }

    /// The sources in groups, no two of which share a time, with first and last time of each.
    fn apart(&self) -> Vec<(Vec<usize>, (i64, i64))> {
        let mut sources: Vec<((i64, i64), usize)> = self.scan.sources().map(|i| (self.scan.times(i), i)).collect();
        sources.sort_unstable();
        let mut out: Vec<(Vec<usize>, (i64, i64))> = Vec::new();
        for ((first, last), source) in sources {
            match out.last_mut() {
                Some((group, (_, end))) if first <= *end => {
                    group.push(source);
                    *end = last.max(*end);
                }
                _ => out.push((vec![source], (first, last))),
            }
        }
        out.iter_mut().for_each(|(group, _)| group.sort_unstable());
        out
    }

    fn counters(&self, partition: usize, reads: &Arc<Reads>) -> VecDeque<Counter> {
        let range = self.scan.range(partition);
        let counter = |(sources, times): (Vec<usize>, (i64, i64))| match sources[..] {
            [file] if file < self.scan.files.len() => {
                let request = self.scan.request(range.clone(), vec![]);
                Counter::File(Box::new(self.scan.cursor(file, &request, reads)))
            }
            _ => Counter::Merge(Box::new(self.scan.merge(&sources, range.clone(), times, reads))),
        };
        self.apart().into_iter().map(counter).collect()
    }
}

enum Counter {
    File(Box<Cursor>),
    Merge(Box<Merge>),
}

impl Counter {
    async fn next(&mut self) -> Result<Option<Vec<(u32, i64)>>> {
        match self {
            Self::File(cursor) => cursor.counts().await,
            Self::Merge(merge) => Ok(merge.next().await?.map(|rows| count_runs(&rows))),
        }
    }
}

async fn next(counters: &mut VecDeque<Counter>) -> Result<Option<RecordBatch>> {
    while let Some(counter) = counters.front_mut() {
        if let Some(counts) = counter.next().await? {
            let (series, rows): (Vec<u32>, Vec<i64>) = counts.into_iter().unzip();
            let columns: Vec<ArrayRef> = vec![Arc::new(UInt32Array::from(series)), Arc::new(Int64Array::from(rows))];
            return Ok(Some(RecordBatch::try_new(SCHEMA.clone(), columns)?));
        }
        counters.pop_front();
    }
    Ok(None)
}

impl DisplayAs for SeriesCountExec {
    fn fmt_as(&self, _t: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SeriesCountExec: ")?;
        self.scan.describe(f)
    }
}

impl ExecutionPlan for SeriesCountExec {
    fn name(&self) -> &str {
        "SeriesCountExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![]
    }

    fn apply_expressions(
        &self,
        _f: &mut dyn for<'a> FnMut(&'a Arc<dyn PhysicalExpr>) -> DfResult<TreeNodeRecursion>,
    ) -> DfResult<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn with_new_children(self: Arc<Self>, _children: Vec<Arc<dyn ExecutionPlan>>) -> DfResult<Arc<dyn ExecutionPlan>> {
        Ok(self)
    }

    fn metrics(&self) -> Option<MetricsSet> {
        Some(self.metrics.clone_inner())
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> DfResult<SendableRecordBatchStream> {
        let counters = self.counters(partition, &reads(&self.metrics, partition, &context));
        let baseline = BaselineMetrics::new(&self.metrics, partition);
        self.scan.count_sources(&self.metrics, partition);
        let snapshot = self.scan.set.snapshot.clone();
        let stream = futures::stream::try_unfold((counters, baseline), move |(mut counters, baseline)| {
            let snapshot = snapshot.clone();
            async move {
                let timer = baseline.elapsed_compute().timer();
                let batch = next(&mut counters).await.map_err(|e| {
                    // The objects of a snapshot that has ended may be gone.
                    DataFusionError::External(Box::new(match &snapshot {
                        Some(snapshot) => snapshot.explain(e),
                        None => e,
                    }))
                })?;
                drop(timer);
                let Some(batch) = batch else { return Ok(None) };
                baseline.record_output(batch.num_rows());
                Ok(Some((batch, (counters, baseline))))
            }
        });
        Ok(Box::pin(cooperative(RecordBatchStreamAdapter::new(SCHEMA.clone(), Box::pin(stream)))))
    }
}
