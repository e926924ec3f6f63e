//! Grouping by tags without looking at each row's tags: the node [`SeriesAggregateExec`], and in [`rule`] what puts it
//! into plans.
//!
//! Rows come from scans in runs of one series, and what a `GROUP BY` takes from tags is the same for all rows of a series.
//! Group keys are therefore computed and hashed once for each series, and a row finds its group by the number of its
//! series. Keys that rows have, time buckets above all, are compared with those of the row before and hashed where they
//! change. Where nothing is asked of rows but how many there are, they are not read; that goes for all rows as one group, too.

pub mod rule;

use std::fmt;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, BooleanArray, RecordBatch, RecordBatchOptions, UInt32Array};
use arrow::compute::{partition, take};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, UInt32Type};
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::memory_pool::{MemoryConsumer, MemoryReservation};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::logical_expr::{EmitTo, GroupsAccumulator};
use datafusion::physical_expr::aggregate::AggregateFunctionExpr;
use datafusion::physical_expr::{EquivalenceProperties, GroupsAccumulatorAdapter, PhysicalExpr};
use datafusion::physical_plan::aggregates::group_values::{GroupValues, new_group_values};
use datafusion::physical_plan::aggregates::order::GroupOrdering;
use datafusion::physical_plan::coalesce_partitions::CoalescePartitionsExec;
use datafusion::physical_plan::execution_plan::EmissionType;
use datafusion::physical_plan::metrics::{BaselineMetrics, ExecutionPlanMetricsSet, MetricsSet};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{DisplayAs, DisplayFormatType, ExecutionPlan, ExecutionPlanProperties, PlanProperties};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};

use crate::scan::TagScanExec;

/// Groups that a partition keeps before it gives their partial results away, which whoever comes next adds up.
const GROUPS_MAX: usize = 1 << 18;

/// Where a group key comes from.
#[derive(Debug, Clone)]
enum Key {
    /// An expression over the columns of [`Keys::columns`], which each series has one value of.
    Series(Arc<dyn PhysicalExpr>),
    /// An expression over the input.
    Row(Arc<dyn PhysicalExpr>),
}

/// The group keys, in the order of the output.
#[derive(Debug)]
struct Keys {
    /// Tells the tags of series. It is never run.
    scan: Arc<TagScanExec>,
    /// Its columns that keys of series, or arguments of aggregates that are theirs, are made of.
    columns: Vec<usize>,
    keys: Vec<Key>,
}

impl Keys {
    fn of_rows(&self) -> bool {
        self.keys.iter().any(|k| matches!(k, Key::Row(_)))
    }
}

/// What an aggregate is fed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fed {
    /// Every row.
    Rows,
    /// How many rows there are.
    Counts,
    /// One row of each series: more of them would change nothing.
    Series,
}

/// An aggregate with its arguments, over the input or, when it is [`Fed::Series`], over the columns of [`Keys::columns`].
#[derive(Debug, Clone)]
struct Aggregate {
    function: Arc<AggregateFunctionExpr>,
    arguments: Vec<Arc<dyn PhysicalExpr>>,
    filter: Option<Arc<dyn PhysicalExpr>>,
    fed: Fed,
}

/// An aggregation of one scan's rows. The input's last column is the index of the row's series in the scan's set; when
/// rows are only counted, it is such an index and how many rows it stands for.
#[derive(Debug)]
pub struct SeriesAggregateExec {
    input: Arc<dyn ExecutionPlan>,
    keys: Arc<Keys>,
    aggregates: Vec<Aggregate>,
    /// The input is counts.
    counted: bool,
    /// Gives results, not partial ones. Then this is the plan that computes them with less memory.
    sparing: Option<Arc<dyn ExecutionPlan>>,
    properties: Arc<PlanProperties>,
    metrics: ExecutionPlanMetricsSet,
}

impl SeriesAggregateExec {
    fn new(
        input: Arc<dyn ExecutionPlan>,
        keys: Arc<Keys>,
        aggregates: Vec<Aggregate>,
        counted: bool,
        schema: SchemaRef,
    ) -> Self {
        let properties = PlanProperties::new(
            EquivalenceProperties::new(schema),
            input.output_partitioning().clone(),
            EmissionType::Final,
            input.boundedness(),
        );
        let (properties, metrics) = (Arc::new(properties), ExecutionPlanMetricsSet::new());
        Self { input, keys, aggregates, counted, sparing: None, properties, metrics }
    }

    /// This aggregation, of one partition and bounded by the number of series, with the results that `whole` gives.
    /// `None` for any other.
    fn finished(&self, whole: &Arc<dyn ExecutionPlan>) -> Option<Self> {
        let one = self.input.output_partitioning().partition_count() == 1;
        // Without keys there is a result even when there is no row.
        if !one || self.keys.of_rows() || self.keys.keys.is_empty() || self.sparing.is_some() {
            return None;
        }
        let (input, keys) = (self.input.clone(), self.keys.clone());
        let finished = Self::new(input, keys, self.aggregates.clone(), self.counted, whole.schema());
        Some(Self { sparing: Some(whole.clone()), ..finished })
    }
}

impl DisplayAs for SeriesAggregateExec {
    fn fmt_as(&self, t: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !matches!(t, DisplayFormatType::TreeRender) {
            f.write_str("SeriesAggregateExec: ")?;
        }
        let schema = self.schema();
        let keys = self.keys.keys.iter().zip(schema.fields()).map(|(key, field)| match key {
            Key::Series(expr) | Key::Row(expr) => format!("{expr} as {}", field.name()),
        });
        let of_scan = self.keys.scan.schema();
        let columns: Vec<String> = self.keys.columns.iter().map(|c| format!("{}#", of_scan.field(*c).name())).collect();
        let mode = if self.sparing.is_some() { "single" } else { "partial" };
        write!(f, "mode={mode}, gby=[{}]", keys.collect::<Vec<_>>().join(", "))?;
        write!(f, ", of_series=[{}]", columns.join(", "))?;
        let aggregates: Vec<&str> = self.aggregates.iter().map(|a| a.function.name()).collect();
        write!(f, ", aggr=[{}]", aggregates.join(", "))?;
        // Where there are rows, their scan says so.
        if self.counted { self.keys.scan.fmt_choice(f) } else { Ok(()) }
    }
}

impl ExecutionPlan for SeriesAggregateExec {
    fn name(&self) -> &str {
        "SeriesAggregateExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }

    fn benefits_from_input_partitioning(&self) -> Vec<bool> {
        vec![false]
    }

    fn apply_expressions(
        &self,
        f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        let keys = self.keys.keys.iter().filter_map(|k| match k {
            Key::Row(expr) => Some(expr),
            Key::Series(_) => None,
        });
        let of_rows = self.aggregates.iter().filter(|a| a.fed == Fed::Rows);
        let mut recursion = TreeNodeRecursion::Continue;
        for expr in keys.chain(of_rows.flat_map(|a| a.arguments.iter().chain(&a.filter))) {
            recursion = f(expr)?;
            if recursion == TreeNodeRecursion::Stop {
                break;
            }
        }
        Ok(recursion)
    }

    fn with_new_children(self: Arc<Self>, children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        let [input] = <[_; 1]>::try_from(children)
            .map_err(|c| DataFusionError::Internal(format!("SeriesAggregateExec has one child, not {}", c.len())))?;
        let (keys, aggregates) = (self.keys.clone(), self.aggregates.clone());
        let changed = Self::new(input, keys, aggregates, self.counted, self.schema());
        Ok(Arc::new(Self { sparing: self.sparing.clone(), ..changed }))
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let input = self.input.execute(partition, context.clone())?;
        let reservation = MemoryConsumer::new(format!("SeriesAggregate[{partition}]")).register(context.memory_pool());
        let aggregation = Aggregation {
            groups: Groups::new(self.keys.clone(), self.aggregates.clone(), self.counted, &self.input.schema())?,
            schema: self.schema(),
            batch_rows: context.session_config().batch_size(),
            reservation,
            sparing: self.sparing.clone().map(|plan| (plan, context)),
            baseline: BaselineMetrics::new(&self.metrics, partition),
        };
        let batches = futures::stream::try_unfold((aggregation, Some(input)), |(mut aggregation, input)| async move {
            let Some(input) = input else { return Ok::<_, DataFusionError>(None) };
            let (given, input) = aggregation.next(input).await?;
            Ok(Some((given, (aggregation, input))))
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(self.schema(), batches.try_flatten())))
    }

    fn metrics(&self) -> Option<MetricsSet> {
        Some(self.metrics.clone_inner())
    }
}

type Batches = BoxStream<'static, Result<RecordBatch>>;

/// One partition's work.
struct Aggregation {
    groups: Groups,
    schema: SchemaRef,
    batch_rows: usize,
    reservation: MemoryReservation,
    sparing: Option<(Arc<dyn ExecutionPlan>, Arc<TaskContext>)>,
    baseline: BaselineMetrics,
}

impl Aggregation {
    /// Reads until there is something to give, and returns that with the input, if more is to be read.
    async fn next(
        &mut self,
        mut input: SendableRecordBatchStream,
    ) -> Result<(Batches, Option<SendableRecordBatchStream>)> {
        while let Some(batch) = input.next().await.transpose()? {
            let time = self.baseline.elapsed_compute().clone();
            let _timer = time.timer();
            self.groups.update(&batch)?;
            let refused = self.reservation.try_resize(self.groups.size()).err();
            match (&self.sparing, refused) {
                (None, None) if self.groups.len() < GROUPS_MAX => {}
                (Some(_), None) => {}
                (None, Some(refused)) if self.groups.len() == 0 => return Err(refused),
                (None, _) => return Ok((self.give()?, Some(input))),
                (Some((plan, context)), Some(_)) => {
                    drop(input);
                    let whole = CoalescePartitionsExec::new(plan.clone());
                    self.groups.clear()?;
                    self.reservation.free();
                    return Ok((whole.execute(0, context.clone())?.boxed(), None));
                }
            }
        }
        Ok((self.give()?, None))
    }

    /// Gives all groups away.
    fn give(&mut self) -> Result<Batches> {
        let results = self.sparing.is_some();
        let time = self.baseline.elapsed_compute().clone();
        let _timer = time.timer();
        let rows = self.groups.len();
        let columns = self.groups.emit(results)?;
        self.reservation.free();
        self.baseline.record_output(rows);
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        let all = RecordBatch::try_new_with_options(self.schema.clone(), columns, &options)?;
        let size = self.batch_rows.max(1);
        let slices = (0..rows).step_by(size).map(move |at| Ok(all.slice(at, size.min(rows - at))));
        Ok(futures::stream::iter(slices).boxed())
    }
}

/// What stands for a series whose keys were not looked at.
const UNSEEN: u32 = u32::MAX;

/// Groups, and what is kept of each.
struct Groups {
    keys: Arc<Keys>,
    counted: bool,
    /// For each series the number of its keys among those of `of_series`.
    numbers: Vec<u32>,
    of_series: Distinct,
    /// Of the numbers and the keys of rows, if there are such.
    of_rows: Option<Distinct>,
    aggregates: Vec<(Aggregate, Box<dyn GroupsAccumulator>)>,
    /// The group of each row of a batch.
    indices: Vec<usize>,
}

/// Numbers the different values that some columns have.
struct Distinct {
    exprs: Vec<Arc<dyn PhysicalExpr>>,
    schema: SchemaRef,
    values: Box<dyn GroupValues>,
}

impl Distinct {
    fn new(exprs: Vec<Arc<dyn PhysicalExpr>>, first: Option<Field>, input: &Schema) -> Result<Self> {
        let of = |expr: &Arc<dyn PhysicalExpr>| {
            let nullable = expr.nullable(input)?;
            Ok(Field::new("key", expr.data_type(input)?, nullable))
        };
        let fields = first.into_iter().map(Ok).chain(exprs.iter().map(of)).collect::<Result<Vec<_>>>()?;
        let schema = Arc::new(Schema::new(fields));
        let values = new_group_values(schema.clone(), &GroupOrdering::None)?;
        Ok(Self { exprs, schema, values })
    }

    fn clear(&mut self) -> Result<()> {
        self.values = new_group_values(self.schema.clone(), &GroupOrdering::None)?;
        Ok(())
    }

    fn evaluate(&self, batch: &RecordBatch) -> Result<Vec<ArrayRef>> {
        self.exprs.iter().map(|e| e.evaluate(batch)?.into_array(batch.num_rows())).collect()
    }
}

fn accumulator(function: &Arc<AggregateFunctionExpr>) -> Result<Box<dyn GroupsAccumulator>> {
    if function.groups_accumulator_supported() {
        return function.create_groups_accumulator();
    }
    let function = function.clone();
    Ok(Box::new(GroupsAccumulatorAdapter::new(move || function.create_accumulator())))
}

impl Groups {
    fn new(keys: Arc<Keys>, aggregates: Vec<Aggregate>, counted: bool, input: &Schema) -> Result<Self> {
        let (mut of_series, mut of_rows) = (Vec::new(), Vec::new());
        for key in &keys.keys {
            match key {
                Key::Series(expr) => of_series.push(expr.clone()),
                Key::Row(expr) => of_rows.push(expr.clone()),
            }
        }
        let series = keys.scan.schema().project(&keys.columns)?;
        let of_series = Distinct::new(of_series, None, &series)?;
        let number = Field::new("number", DataType::UInt32, false);
        let of_rows = match of_rows.is_empty() {
            true => None,
            false => Some(Distinct::new(of_rows, Some(number), input)?),
        };
        let aggregates = aggregates
            .into_iter()
            .map(|a| accumulator(&a.function).map(|accumulator| (a, accumulator)))
            .collect::<Result<_>>()?;
        Ok(Self { keys, counted, numbers: vec![], of_series, of_rows, aggregates, indices: vec![] })
    }

    fn len(&self) -> usize {
        match &self.of_rows {
            Some(of_rows) => of_rows.values.len(),
            // All rows are one group, of which there is nothing to tell.
            None if self.keys.keys.is_empty() => self.numbers.len().min(1),
            None => self.of_series.values.len(),
        }
    }

    fn size(&self) -> usize {
        self.of_series.values.size()
            + self.of_rows.as_ref().map_or(0, |d| d.values.size())
            + self.aggregates.iter().map(|(_, a)| a.size()).sum::<usize>()
            + self.numbers.capacity() * size_of::<u32>()
            + self.indices.capacity() * size_of::<usize>()
    }

    fn update(&mut self, batch: &RecordBatch) -> Result<()> {
        let wrong = || DataFusionError::Internal("rows without the index of their series".to_owned());
        let index = batch.num_columns().checked_sub(1 + usize::from(self.counted)).ok_or_else(wrong)?;
        let index = batch.column(index).as_primitive_opt::<UInt32Type>().ok_or_else(wrong)?;
        self.number(index.values())?;
        self.find_groups(index.values(), batch)?;
        let of_series = match self.aggregates.iter().any(|(a, _)| a.fed == Fed::Series) {
            true => Some(self.keys.scan.of_series(&self.keys.columns, index)?),
            false => None,
        };
        let groups = self.len();
        for (aggregate, accumulator) in &mut self.aggregates {
            if aggregate.fed == Fed::Counts {
                // What is kept of a count is a count.
                let rows = batch.columns().last().ok_or_else(wrong)?;
                accumulator.merge_batch(std::slice::from_ref(rows), &self.indices, groups)?;
                continue;
            }
            let rows = if aggregate.fed == Fed::Series { of_series.as_ref().ok_or_else(wrong)? } else { batch };
            let evaluated = |e: &Arc<dyn PhysicalExpr>| e.evaluate(rows)?.into_array(rows.num_rows());
            let arguments = aggregate.arguments.iter().map(evaluated).collect::<Result<Vec<_>>>()?;
            let filter = aggregate.filter.as_ref().map(evaluated).transpose()?;
            let filter: Option<&BooleanArray> = filter.as_ref().and_then(|f| f.as_boolean_opt());
            accumulator.update_batch(&arguments, &self.indices, filter, groups)?;
        }
        Ok(())
    }

    /// Looks at the keys of series that were not seen before. Those without a row are not looked at: an expression may fail
    /// on their tags.
    fn number(&mut self, index: &[u32]) -> Result<()> {
        if self.numbers.is_empty() {
            self.numbers.resize(self.keys.scan.scan().map_or(0, |s| s.set().series.len()), UNSEEN);
        }
        let mut unseen: Vec<u32> = Vec::new();
        for (series, _) in runs(index) {
            let number = &mut self.numbers[series as usize];
            if *number == UNSEEN {
                *number = 0;
                unseen.push(series);
            }
        }
        if unseen.is_empty() || self.of_series.exprs.is_empty() {
            return Ok(());
        }
        let unseen = UInt32Array::from(unseen);
        let columns = self.of_series.evaluate(&self.keys.scan.of_series(&self.keys.columns, &unseen)?)?;
        self.of_series.values.intern(&columns, &mut self.indices)?;
        for (series, number) in unseen.values().iter().zip(&self.indices) {
            self.numbers[*series as usize] = *number as u32;
        }
        Ok(())
    }

    fn find_groups(&mut self, index: &[u32], batch: &RecordBatch) -> Result<()> {
        let Some(of_rows) = &mut self.of_rows else {
            self.indices.clear();
            for (series, rows) in runs(index) {
                let number = self.numbers[series as usize] as usize;
                self.indices.resize(self.indices.len() + rows, number);
            }
            return Ok(());
        };
        let mut numbers: Vec<u32> = Vec::with_capacity(index.len());
        for (series, rows) in runs(index) {
            numbers.resize(numbers.len() + rows, self.numbers[series as usize]);
        }
        let mut columns: Vec<ArrayRef> = vec![Arc::new(UInt32Array::from(numbers))];
        columns.extend(of_rows.evaluate(batch)?);
        let ranges = partition(&columns)?.ranges();
        if ranges.len() > index.len() / 2 {
            return of_rows.values.intern(&columns, &mut self.indices);
        }
        let firsts: UInt32Array = ranges.iter().map(|r| r.start as u32).collect::<Vec<_>>().into();
        let columns = columns.iter().map(|c| Ok(take(c, &firsts, None)?)).collect::<Result<Vec<_>>>()?;
        let mut groups = Vec::with_capacity(ranges.len());
        of_rows.values.intern(&columns, &mut groups)?;
        self.indices.clear();
        for (range, group) in ranges.iter().zip(groups) {
            self.indices.resize(range.end, group);
        }
        Ok(())
    }

    /// The keys of all groups and what is kept of them; none are left.
    fn emit(&mut self, results: bool) -> Result<Vec<ArrayRef>> {
        let mut of_series = self.of_series.values.emit(EmitTo::All)?;
        let mut of_rows = vec![];
        if let Some(distinct) = &mut self.of_rows {
            of_rows = distinct.values.emit(EmitTo::All)?;
            let numbers = of_rows.remove(0);
            for column in &mut of_series {
                *column = take(column, &numbers, None)?;
            }
        }
        let (mut of_series, mut of_rows) = (of_series.into_iter(), of_rows.into_iter());
        let missing = || DataFusionError::Internal("fewer columns of keys than keys".to_owned());
        let mut columns = Vec::new();
        for key in &self.keys.keys {
            let next = if matches!(key, Key::Series(_)) { of_series.next() } else { of_rows.next() };
            columns.push(next.ok_or_else(missing)?);
        }
        for (_, accumulator) in &mut self.aggregates {
            match results {
                true => columns.push(accumulator.evaluate(EmitTo::All)?),
                false => columns.extend(accumulator.state(EmitTo::All)?),
            }
        }
        self.clear()?;
        Ok(columns)
    }

    fn clear(&mut self) -> Result<()> {
        (self.numbers, self.indices) = (vec![], vec![]);
        self.of_series.clear()?;
        self.of_rows.as_mut().map_or(Ok(()), Distinct::clear)?;
        for (aggregate, kept) in &mut self.aggregates {
            *kept = accumulator(&aggregate.function)?;
        }
        Ok(())
    }
}

/// Runs of equal numbers with their lengths, found in steps that double.
fn runs(mut index: &[u32]) -> impl Iterator<Item = (u32, usize)> {
    std::iter::from_fn(move || {
        let first = *index.first()?;
        let mut step = 1;
        while step < index.len() && index[step] == first {
            step *= 2;
        }
        let end = (step + 1).min(index.len());
        let known = (step / 2).min(end);
        let rows = known + index[known..end].partition_point(|i| *i == first);
        index = &index[rows..];
        Some((first, rows))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found() {
        for lengths in [vec![], vec![1], vec![1, 1, 1], vec![5, 1, 2, 900], vec![64, 63, 65], vec![3, 8192]] {
            let index: Vec<u32> =
                lengths.iter().enumerate().flat_map(|(i, n)| std::iter::repeat_n(i as u32, *n)).collect();
            let found: Vec<(u32, usize)> = runs(&index).collect();
            let expected: Vec<(u32, usize)> = lengths.iter().enumerate().map(|(i, n)| (i as u32, *n)).collect();
            assert_eq!(found, expected);
        }
    }
}
