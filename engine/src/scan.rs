//! The leaf of every plan: rows of a set of series, sorted and free of duplicates.

pub(crate) mod count;
pub(crate) mod gather;
pub(crate) mod merge;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use arrow::compute::SortOptions;
use arrow::datatypes::SchemaRef;
use catalog::Ordinal;
use catalog::files::DataFile;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::error::{DataFusionError, Result as DfResult};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::expressions::Column;
use datafusion::physical_expr::{EquivalenceProperties, PhysicalExpr, PhysicalSortExpr};
use datafusion::physical_plan::coop::cooperative;
use datafusion::physical_plan::execution_plan::{Boundedness, EmissionType};
use datafusion::physical_plan::metrics::{BaselineMetrics, ExecutionPlanMetricsSet, MetricBuilder, MetricsSet};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{DisplayAs, DisplayFormatType, ExecutionPlan, Partitioning, PlanProperties};

use crate::SeriesSet;
use crate::activity::Activity;
use crate::cut::{Cuts, Taken};
use crate::memtable::{Memtable, read_schema};
use crate::segment::{Cursor, Reads, Request};
use crate::select::NO_ORDINAL;
use merge::{MemoryCursor, Merge, Source};

/// Index of the time column in every keyed table.
const TS: usize = 1;

/// A partition has at least this many series: starting one costs as much as reading some of them.
const PARTITION_SERIES: usize = 1024;

/// Reads rows of a [`SeriesSet`] from memtables and segments. Output columns are `series` (`UInt32`, index into
/// `set.series`), then the asked-for columns of the table in the asked-for order with their in-memory types; rows are
/// sorted by (series, ts) with unique keys; each partition holds a contiguous range of the set's series.
#[derive(Debug)]
pub struct SeriesScanExec {
    set: Arc<SeriesSet>,
    columns: Vec<usize>,
    schema: SchemaRef,
    properties: Arc<PlanProperties>,
    memtables: Vec<Arc<Memtable>>,
    /// With what is left out of each.
    files: Vec<(Arc<DataFile>, Option<Cuts>)>,
    /// What is left out of rows in memory.
    memory_cuts: Option<Cuts>,
    deletes: usize,
    /// Files of the table that can hold none of the rows.
    files_pruned: usize,
    metrics: ExecutionPlanMetricsSet,
}

impl SeriesScanExec {
    /// Scans `set`; `columns` are indexes into `set.table.columns`, without `series`.
    pub fn new(set: Arc<SeriesSet>, columns: Vec<usize>) -> Self {
        let schema = read_schema(&set.table, &columns);
        let (mut memtables, mut files) = (vec![], vec![]);
        let (mut memory_cuts, mut deletes, mut files_pruned) = (None, 0, 0);
        if let Some(table) = set.version.table(set.table.id).filter(|_| !set.series.is_empty()) {
            let metrics = set.keys.first().map_or(0, |k| k.metric)..=set.keys.last().map_or(0, |k| k.metric);
            memtables.extend(table.memtables().filter(|m| m.overlaps(set.start_ms, set.end_ms)).cloned());
            // Oldest first, as the merge wants them.
            memtables.reverse();
            let mut found: Vec<Arc<DataFile>> =
                table.files.iter().filter(|f| overlaps(f, &set, *metrics.start(), *metrics.end())).cloned().collect();
            found.sort_by_key(|f| (f.seq_max, f.id));
            let (start, end) = (set.start_ms, set.end_ms);
            let taken = Taken::find(table, &found, &set.keys, (start, end)).and_then(|mut finding| {
                let seen: Vec<_> = set.series.iter().enumerate().map(|(i, s)| (i as u32, s.as_ref())).collect();
                finding.see(&seen);
                finding.end()
            });
            if let Some(taken) = &taken {
                memory_cuts = taken.of_memory();
                deletes = taken.deletes();
            }
            files.extend(found.into_iter().filter_map(|file| {
                let cuts = taken.as_ref().and_then(|t| t.of_file(&file));
                let nothing_left = |c: &Cuts| c.cover_all(file.ts_min.max(start), file.ts_max.min(end));
                (!cuts.as_ref().is_some_and(nothing_left)).then_some((file, cuts))
            }));
            files_pruned = table.files.len() - files.len();
        }
        let partitions = (set.series.len() / PARTITION_SERIES).clamp(1, set.threads);
        let properties = PlanProperties::new(
            equivalences(&schema, &columns),
            Partitioning::UnknownPartitioning(partitions),
            EmissionType::Incremental,
            Boundedness::Bounded,
        )
        .with_scheduling_type(datafusion::physical_plan::execution_plan::SchedulingType::Cooperative);
        let metrics = ExecutionPlanMetricsSet::new();
        let properties = Arc::new(properties);
        Self { set, columns, schema, properties, memtables, files, memory_cuts, deletes, files_pruned, metrics }
    }

    /// The series that are read.
    pub fn set(&self) -> &Arc<SeriesSet> {
        &self.set
    }

    /// Indexes of the asked-for columns.
    pub fn columns(&self) -> &[usize] {
        &self.columns
    }

    /// The same scan of other columns.
    #[must_use]
    pub fn reading(&self, columns: Vec<usize>) -> Self {
        let schema = read_schema(&self.set.table, &columns);
        let properties = PlanProperties::clone(&self.properties).with_eq_properties(equivalences(&schema, &columns));
        Self {
            set: self.set.clone(),
            columns,
            schema,
            properties: Arc::new(properties),
            memtables: self.memtables.clone(),
            files: self.files.clone(),
            memory_cuts: self.memory_cuts.clone(),
            deletes: self.deletes,
            files_pruned: self.files_pruned,
            metrics: ExecutionPlanMetricsSet::new(),
        }
    }

    /// Which series a partition reads.
    fn range(&self, partition: usize) -> Range<usize> {
        let (n, partitions) = (self.set.series.len(), self.properties.partitioning.partition_count());
        n * partition / partitions..n * (partition + 1) / partitions
    }

    /// What is read: files, then memtables, both oldest first.
    fn sources(&self) -> Range<usize> {
        0..self.files.len() + self.memtables.len()
    }

    /// First and last time of a source.
    fn times(&self, source: usize) -> (i64, i64) {
        match self.files.get(source) {
            Some((file, _)) => (file.ts_min, file.ts_max),
            None => self.memtables[source - self.files.len()].ts_range().unwrap_or((i64::MIN, i64::MAX)),
        }
    }

    fn request(&self, series: Range<usize>, columns: Vec<usize>) -> Arc<Request> {
        let set = &self.set;
        Arc::new(Request {
            table: set.table.clone(),
            keys: set.keys.clone(),
            range: series,
            start_ms: set.start_ms,
            end_ms: set.end_ms,
            columns,
            cuts: None,
        })
    }

    fn cursor(&self, file: usize, request: &Arc<Request>, reads: &Arc<Reads>) -> Cursor {
        let (file, cuts) = &self.files[file];
        let request = match cuts {
            None => request.clone(),
            cuts => Arc::new(Request { cuts: cuts.clone(), ..Request::clone(request) }),
        };
        Cursor::new(self.set.segments.clone(), file.clone(), request).counted(reads.clone())
    }

    /// Merges some of the sources, which are given in ascending order. Of memtables what lies between two times,
    /// inclusive.
    fn merge(&self, sources: &[usize], series: Range<usize>, times: (i64, i64), reads: &Arc<Reads>) -> Merge {
        let set = &self.set;
        let mut columns = self.columns.clone();
        let ts = columns.iter().position(|c| *c == TS);
        // Merging and leaving out need the time; the stream drops it again.
        let ts = ts.unwrap_or_else(|| {
            if sources.len() > 1 || self.memory_cuts.is_some() {
                columns.push(TS);
            }
            columns.len().saturating_sub(1)
        });
        let request = self.request(series.clone(), columns.clone());
        let memory = |m: &Arc<Memtable>| {
            let wanted: Vec<(u32, Ordinal)> = series
                .clone()
                .filter(|i| set.ordinals[*i] != NO_ORDINAL)
                .map(|i| (i as u32, set.ordinals[i]))
                .collect();
            let times = (set.start_ms.max(times.0), set.end_ms.min(times.1));
            let cursor = MemoryCursor::new(m.clone(), wanted, times, columns.clone());
            Source::Memory(Box::new(cursor.cut(self.memory_cuts.clone(), ts + 1)))
        };
        let source = |i: &usize| match i.checked_sub(self.files.len()) {
            None => Source::File(Box::new(self.cursor(*i, &request, reads))),
            Some(i) => memory(&self.memtables[i]),
        };
        Merge::new(sources.iter().map(source).collect(), read_schema(&set.table, &columns), ts + 1)
    }

    fn describe(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set = &self.set;
        let (codes, of) = (set.series.len(), set.candidates);
        let (memtables, files) = (self.memtables.len(), self.files.len());
        write!(f, "table={}, codes={codes} of {of}, memtables={memtables}, files={files}", set.table.name)?;
        write!(f, ", time=[{}..{}]", set.start_ms, set.end_ms)?;
        if self.deletes > 0 {
            write!(f, ", deletes={}", self.deletes)?;
        }
        Ok(())
    }

    fn count_sources(&self, metrics: &ExecutionPlanMetricsSet, partition: usize) {
        MetricBuilder::new(metrics).counter("files", partition).add(self.files.len());
        MetricBuilder::new(metrics).counter("files_pruned", partition).add(self.files_pruned);
        MetricBuilder::new(metrics).counter("memtables", partition).add(self.memtables.len());
    }
}

/// What is counted of the files that a partition reads.
fn reads(metrics: &ExecutionPlanMetricsSet, partition: usize, context: &TaskContext) -> Arc<Reads> {
    let count = |name: &'static str| MetricBuilder::new(metrics).counter(name, partition);
    Arc::new(Reads {
        bytes: count("bytes_scanned"),
        row_groups: count("row_groups"),
        row_groups_pruned: count("row_groups_pruned"),
        pages: count("pages"),
        pages_pruned: count("pages_pruned"),
        activity: context.session_config().get_extension::<Activity>(),
    })
}

fn overlaps(file: &DataFile, set: &SeriesSet, metric_min: i64, metric_max: i64) -> bool {
    file.ts_min <= set.end_ms
        && file.ts_max >= set.start_ms
        && file.metric_min <= metric_max
        && file.metric_max >= metric_min
}

fn equivalences(schema: &SchemaRef, columns: &[usize]) -> EquivalenceProperties {
    let mut out = EquivalenceProperties::new(schema.clone());
    let sorted =
        |name: &str, at| PhysicalSortExpr::new(Arc::new(Column::new(name, at)), SortOptions::new(false, false));
    let mut order = vec![sorted(schema.field(0).name(), 0)];
    if let Some(at) = columns.iter().position(|c| *c == TS) {
        order.push(sorted(schema.field(at + 1).name(), at + 1));
    }
    out.add_ordering(order);
    out
}

impl DisplayAs for SeriesScanExec {
    fn fmt_as(&self, _t: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SeriesScanExec: ")?;
        self.describe(f)
    }
}

impl ExecutionPlan for SeriesScanExec {
    fn name(&self) -> &str {
        "SeriesScanExec"
    }

    fn schema(&self) -> SchemaRef {
        self.schema.clone()
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
        let reads = reads(&self.metrics, partition, &context);
        let sources: Vec<usize> = self.sources().collect();
        let merge = self.merge(&sources, self.range(partition), (i64::MIN, i64::MAX), &reads);
        let baseline = BaselineMetrics::new(&self.metrics, partition);
        self.count_sources(&self.metrics, partition);
        let width = self.schema.fields().len();
        let schema = self.schema.clone();
        let snapshot = self.set.snapshot.clone();
        let stream = futures::stream::try_unfold((merge, baseline), move |(mut merge, baseline)| {
            let (schema, snapshot) = (schema.clone(), snapshot.clone());
            async move {
                let timer = baseline.elapsed_compute().timer();
                let batch = merge.next().await.map_err(|e| {
                    // The objects of a snapshot that has ended may be gone.
                    DataFusionError::External(Box::new(match &snapshot {
                        Some(snapshot) => snapshot.explain(e),
                        None => e,
                    }))
                })?;
                drop(timer);
                let Some(mut batch) = batch else { return Ok(None) };
                if batch.num_columns() > width {
                    batch = arrow::array::RecordBatch::try_new(schema, batch.columns()[..width].to_vec())?;
                }
                baseline.record_output(batch.num_rows());
                Ok(Some((batch, (merge, baseline))))
            }
        });
        Ok(Box::pin(cooperative(RecordBatchStreamAdapter::new(self.schema.clone(), Box::pin(stream)))))
    }
}
