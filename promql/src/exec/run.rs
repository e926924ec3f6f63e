//! From logical to physical nodes, and from a text to its result.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use arrow::array::{Array, AsArray, FixedSizeListArray, ListArray, RecordBatch};
use arrow::datatypes::{DataType, Float64Type, Int64Type};
use async_trait::async_trait;
use catalog::TableSchema;
use catalog::tables::{HISTOGRAMS, SAMPLES, START_TIMESTAMPS};
use datafusion::catalog::Session;
use datafusion::error::{DataFusionError, Result as DfResult};
use datafusion::execution::context::QueryPlanner;
use datafusion::execution::{SessionState, SessionStateBuilder};
use datafusion::logical_expr::physical_planning_context::PhysicalPlanningContext;
use datafusion::logical_expr::{LogicalPlan, UserDefinedLogicalNode};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::{Column, cast, is_not_null};
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::filter::FilterExec;
use datafusion::physical_plan::projection::ProjectionExec;
use datafusion::physical_planner::{ExtensionPlanner, PhysicalPlanner};
use engine::memory::Kind;
use engine::{Engine, Query, Selection, SeriesScanExec, SeriesSet, Stop};
use futures::future::BoxFuture;
use futures::{FutureExt, TryStreamExt};

use super::notes::too_many_samples;
use super::{NodeExec, Notes, SeriesLabels, bytes_of, deep, internal, native};
use crate::api::timed_out;
use crate::histogram::FloatHistogram;
use crate::options::Grid;
use crate::plan::ops::{Counts, Op, Selector};
use crate::plan::source::Source;
use crate::plan::{Node, Planned};
use crate::result::{Block, Data, Run, Stats, ValueType};
use crate::{EvalOptions, QueryError, QueryErrorKind, QueryResult, Result, histogram, labels};

/// Plans the nodes of this language. The session it plans for carries the [`Engine`] as a config extension.
#[derive(Debug, Default)]
pub struct Planner;

#[async_trait]
impl ExtensionPlanner for Planner {
    async fn plan_extension(
        &self,
        _planner: &dyn PhysicalPlanner,
        node: &dyn UserDefinedLogicalNode,
        _logical_inputs: &[&LogicalPlan],
        physical_inputs: &[Arc<dyn ExecutionPlan>],
        session: &dyn Session,
        _context: &PhysicalPlanningContext,
    ) -> DfResult<Option<Arc<dyn ExecutionPlan>>> {
        match node.as_any().downcast_ref::<Node>() {
            None => Ok(None),
            Some(node) => physical(node, physical_inputs.to_vec(), session).await.map(Some),
        }
    }
}

/// Plans trees of nothing but our nodes; DataFusion's own planner costs more than a small query.
#[async_trait]
impl QueryPlanner for Planner {
    async fn create_physical_plan(
        &self,
        plan: &LogicalPlan,
        session: &dyn Session,
    ) -> DfResult<Arc<dyn ExecutionPlan>> {
        tree(plan, session).await
    }
}

fn tree<'a>(plan: &'a LogicalPlan, session: &'a dyn Session) -> BoxFuture<'a, DfResult<Arc<dyn ExecutionPlan>>> {
    let mut planned = async move {
        let LogicalPlan::Extension(extension) = plan else { return Err(internal("a node of another language")) };
        let node = extension.node.as_any().downcast_ref::<Node>();
        let node = node.ok_or_else(|| internal("a node of another language"))?;
        let mut inputs = Vec::with_capacity(node.inputs.len());
        for input in &node.inputs {
            inputs.push(tree(input, session).await?);
        }
        physical(node, inputs, session).await
    }
    .boxed();
    futures::future::poll_fn(move |context| deep(|| planned.poll_unpin(context))).boxed()
}

/// The physical form of a node; a selector's series are chosen here.
async fn physical(
    node: &Node,
    mut inputs: Vec<Arc<dyn ExecutionPlan>>,
    session: &dyn Session,
) -> DfResult<Arc<dyn ExecutionPlan>> {
    if let Op::Select { selector, .. } | Op::Samples(selector) = &node.op {
        let engine = session.config().get_extension::<Engine>();
        let engine = engine.ok_or_else(|| internal("the session carries no engine"))?;
        let stop = Stop::of(session.config_options());
        if let Some(source) = &selector.source {
            return of_table(&engine, (node, selector, source), inputs, session).await;
        }
        // As in Prometheus, values at the edges of a window don't go with it.
        let needs_starts = match &node.op {
            Op::Select { reading, .. } => reading.needs_starts() && selector.edges.is_none(),
            _ => false,
        };
        let sets = series(&engine, selector, &node.grid, needs_starts, &stop).await?;
        let samples = sets.first().ok_or_else(|| internal("no set of samples"))?;
        if let Some(notes) = session.config().get_extension::<Notes>() {
            notes.series.fetch_add(samples.series.len() as u64, Ordering::Relaxed);
        }
        if samples.series.is_empty() && !matches!(node.op, Op::Samples(_)) {
            return Ok(Arc::new(NodeExec::new(Op::Nothing, node.grid, node.place, vec![], None)));
        }
        let mut histograms = native::COLUMNS.to_vec();
        histograms.extend(needs_starts.then_some(native::START));
        let columns = [vec!["ts", "value"], histograms, vec!["ts", native::START]];
        for (at, (set, columns)) in sets.into_iter().zip(columns).enumerate() {
            inputs.insert(at, Arc::new(scan(set, &columns)?));
        }
    }
    Ok(Arc::new(NodeExec::new(node.op.clone(), node.grid, node.place, inputs, None)))
}

/// [`physical`] of a selector that reads a column of another table.
async fn of_table(
    engine: &Engine,
    (node, selector, source): (&Node, &Selector, &Source),
    mut inputs: Vec<Arc<dyn ExecutionPlan>>,
    session: &dyn Session,
) -> DfResult<Arc<dyn ExecutionPlan>> {
    let external = |e: engine::Error| DataFusionError::External(Box::new(e));
    let (table, metric) = source.declared().ok_or_else(|| internal("a selector of a table that is not known"))?;
    let (start_ms, end_ms) = selector.reach(&node.grid);
    let selection = Selection { table: table.clone(), matchers: selector.matchers.clone(), start_ms, end_ms };
    let stop = Stop::of(session.config_options());
    let set = engine.select(&selection, &stop).await.map_err(external)?.with_rows();
    if let Some(notes) = session.config().get_extension::<Notes>() {
        notes.series.fetch_add(set.series.len() as u64, Ordering::Relaxed);
    }
    if set.series.is_empty() && !matches!(node.op, Op::Samples(_)) {
        return Ok(Arc::new(NodeExec::new(Op::Nothing, node.grid, node.place, vec![], None)));
    }
    let mut memory = stop.memory(engine.memory()).reserve(Kind::Queries);
    let mut labels = Vec::with_capacity(set.series.len());
    for series in &set.series {
        let own = source.labels(series.tags.as_bytes());
        memory.grow(own.len() + size_of::<Vec<u8>>()).map_err(out_of_memory)?;
        labels.push(own);
    }
    let labels = SeriesLabels::List(labels.into(), Some(Arc::new(memory)));
    inputs.insert(0, floats(Arc::new(scan(Arc::new(set), &["ts", metric.column])?))?);
    Ok(Arc::new(NodeExec::new(node.op.clone(), node.grid, node.place, inputs, Some(labels))))
}

/// A scan of (series, ts, number) with the numbers as floats, without rows that have none.
fn floats(scan: Arc<dyn ExecutionPlan>) -> DfResult<Arc<dyn ExecutionPlan>> {
    let schema = scan.schema();
    let column = |i: usize| Arc::new(Column::new(schema.field(i).name(), i)) as Arc<dyn PhysicalExpr>;
    let number = schema.field(2);
    let mut plan = scan;
    if number.is_nullable() {
        plan = Arc::new(FilterExec::try_new(is_not_null(column(2))?, plan)?);
    }
    if number.data_type() != &DataType::Float64 {
        let float = cast(column(2), &schema, DataType::Float64)?;
        let columns = [column(0), column(1), float].into_iter().zip(schema.fields());
        let columns = columns.map(|(expr, field)| (expr, field.name().clone())).collect::<Vec<_>>();
        plan = Arc::new(ProjectionExec::try_new(columns, plan)?);
    }
    Ok(plan)
}

/// The series of a selector as sets of the tables of samples, histograms and start times; the later ones are left out
/// when no series has rows there.
async fn series(
    engine: &Engine,
    selector: &Selector,
    grid: &Grid,
    needs_starts: bool,
    stop: &Stop,
) -> DfResult<Vec<Arc<SeriesSet>>> {
    let external = |e: engine::Error| DataFusionError::External(Box::new(e));
    let matchers = selector.matchers.clone();
    let (start_ms, end_ms) = selector.reach(grid);
    let mut selection = Selection { table: SAMPLES.clone(), matchers, start_ms, end_ms };
    let samples = engine.select(&selection, stop).await.map_err(external)?;
    let mut sets = vec![samples];
    for table in [&HISTOGRAMS, &START_TIMESTAMPS].into_iter().take(1 + usize::from(needs_starts)) {
        selection.table = Arc::clone(table);
        sets.push(Arc::new(engine.select(&selection, stop).await.map_err(external)?.with_rows()));
    }
    while sets.len() > 1 && sets.last().is_some_and(|set| set.series.is_empty()) {
        sets.pop();
    }
    Ok(SeriesSet::aligned(sets))
}

fn scan(set: Arc<SeriesSet>, columns: &[&str]) -> DfResult<SeriesScanExec> {
    let column = |table: &TableSchema, name: &str| table.column(name).map(|c| c.0);
    let columns: Option<Vec<usize>> = columns.iter().map(|name| column(&set.table, name)).collect();
    let columns = columns.ok_or_else(|| internal("a table lacks a column"))?;
    Ok(SeriesScanExec::new(set, columns))
}

/// A session of nothing but our planner: a plan of ours gains nothing from rules made for relational plans, and running
/// them costs more than a small query.
pub(crate) fn session(engine: &Engine, notes: Arc<Notes>) -> SessionState {
    let base = engine.session();
    let base = base.state_ref();
    let base = base.read();
    let config = base
        .config()
        .clone()
        .with_create_default_catalog_and_schema(false)
        .with_information_schema(false)
        .with_extension(Arc::new(engine.clone()))
        .with_extension(notes);
    SessionStateBuilder::new()
        .with_config(config)
        .with_runtime_env(base.runtime_env().clone())
        .with_query_planner(Arc::new(Planner))
        .with_analyzer_rules(vec![])
        .with_optimizer_rules(vec![])
        .with_physical_optimizer_rules(vec![])
        .build()
}

/// Evaluates a text.
///
/// # Errors
/// `BadData` when it is not PromQL, `Execution` when the data do not allow it, `Timeout` at the deadline.
pub async fn query(engine: &Engine, text: &str, options: &EvalOptions, query: Query) -> Result<QueryResult> {
    let planned = crate::plan::plan(text, options)?;
    let mut notes = Notes::new(options.limits.samples_max);
    if options.counts {
        notes = notes.counting(options.grid().steps());
    }
    let notes = Arc::new(notes);
    let mut memory = query.memory().reserve(Kind::Queries);
    let mut answered = 0;
    let data = match (&planned.plan, &planned.text) {
        (None, text) => Data::Text(text.clone().unwrap_or_default()),
        (Some(plan), _) => {
            let state = session(engine, notes.clone());
            let batches = async {
                let mut stream = engine.execute(&state, plan.clone(), query).await?;
                let mut batches = Vec::new();
                while let Some(batch) = stream.try_next().await? {
                    memory.grow(bytes_of(&batch)).map_err(out_of_memory)?;
                    answered += samples_of(&batch);
                    if answered > options.limits.samples_max {
                        return Err(too_many_samples().into());
                    }
                    batches.push(batch);
                }
                Ok(batches)
            };
            let batches: Vec<RecordBatch> = batches.await.map_err(|e: DataFusionError| worded(e.into()))?;
            data(&planned, options, &batches)?
        }
    };
    for (at, warning) in planned.warnings {
        notes.warn(at, warning);
    }
    let (warnings, infos) = notes.take();
    if let Data::Runs(runs) = &data {
        let weight = |h: &[(i64, FloatHistogram)]| h.iter().map(|(_, h)| h.weight()).sum::<usize>();
        answered = runs.iter().map(|run| run.times.len() + weight(&run.histograms)).sum();
        notes.count(Counts::Steps, &[answered as u64]);
    }
    let stats = Stats {
        samples_scanned: notes.samples.load(Ordering::Relaxed),
        series_selected: notes.series.load(Ordering::Relaxed),
        samples_looked_at: notes.looked_at().unwrap_or_default(),
        samples_held: notes.held().max(answered) as u64,
    };
    let value_type = match planned.value_type {
        ValueType::Scalar | ValueType::Vector if !options.instant => ValueType::Matrix,
        other => other,
    };
    let (grid, asked) = (planned.grid, options.grid());
    Ok(QueryResult { value_type, grid, asked, data, warnings, infos, stats, memory: Some(Arc::new(memory)) })
}

/// How many float samples a batch of an answer has: values at steps, or lists of them.
fn samples_of(batch: &RecordBatch) -> usize {
    let column = batch.columns().get(1);
    let at_steps = column.and_then(|c| c.as_fixed_size_list_opt()).map(FixedSizeListArray::values);
    let listed = column.and_then(|c| c.as_list_opt::<i32>()).map(ListArray::offsets);
    at_steps.map_or(0, |values| values.len() - values.null_count())
        + listed.and_then(|at| Some(at.last()? - at.first()?)).unwrap_or_default() as usize
}

/// The error of a query that asks for more memory than there is.
pub(crate) fn out_of_memory(e: engine::Error) -> QueryError {
    QueryError::execution(e.to_string())
}

fn worded(e: QueryError) -> QueryError {
    match e.kind {
        QueryErrorKind::Timeout => timed_out(),
        _ => e,
    }
}

fn data(planned: &Planned, options: &EvalOptions, batches: &[RecordBatch]) -> Result<Data> {
    if batches.iter().any(|b| b.schema_ref().field(1).name() == "times") {
        let mut runs = batches.iter().map(runs).collect::<Result<Vec<_>>>()?.concat();
        runs.sort_by(|a, b| labels::compare(&a.labels, &b.labels));
        return Ok(Data::Runs(runs));
    }
    if planned.value_type == ValueType::Matrix && batches.is_empty() {
        return Ok(Data::Runs(vec![]));
    }
    let blocks = batches.iter().filter(|b| b.num_rows() > 0).map(Block::try_new).collect::<Result<Vec<_>>>()?;
    let mut order: Vec<(u32, u32)> = Vec::with_capacity(blocks.iter().map(Block::len).sum());
    for (i, block) in blocks.iter().enumerate() {
        order.extend((0..block.len()).filter(|row| block.any_sample(*row)).map(|row| (i as u32, row as u32)));
    }
    if !options.instant || planned.value_type == ValueType::Matrix {
        let of = |(block, row): (u32, u32)| blocks[block as usize].labels(row as usize);
        order.sort_by(|a, b| labels::compare(of(*a), of(*b)));
    }
    Ok(Data::Blocks { blocks, order })
}

fn runs(batch: &RecordBatch) -> Result<Vec<Run>> {
    let wrong = || QueryError::internal("batch is not a range vector");
    let list = |i: usize| batch.column(i).as_list_opt::<i32>().ok_or_else(wrong);
    let all = batch.column(0).as_binary_opt::<i32>().ok_or_else(wrong)?;
    let (times, values, histogram_times, histograms) = (list(1)?, list(2)?, list(3)?, list(4)?);
    (0..batch.num_rows())
        .map(|row| {
            let (times, values) = (times.value(row), values.value(row));
            let (histogram_times, histograms) = (histogram_times.value(row), histograms.value(row));
            let histogram_times = histogram_times.as_primitive_opt::<Int64Type>().ok_or_else(wrong)?.values();
            let histograms = histograms.as_binary_opt::<i32>().ok_or_else(wrong)?.iter().flatten();
            let histograms = histograms.map(|bytes| histogram::decode(bytes).ok_or_else(wrong));
            Ok(Run {
                labels: all.value(row).to_vec(),
                times: times.as_primitive_opt::<Int64Type>().ok_or_else(wrong)?.values().to_vec(),
                values: values.as_primitive_opt::<Float64Type>().ok_or_else(wrong)?.values().to_vec(),
                histograms: histogram_times.iter().copied().zip(histograms.collect::<Result<Vec<_>>>()?).collect(),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, Int32Array, TimestampMillisecondArray, UInt32Array};
    use arrow::datatypes::{Field, Schema};
    use catalog::tables::time_type;
    use datafusion::datasource::memory::MemorySourceConfig;
    use datafusion::execution::TaskContext;
    use datafusion::physical_plan::{ExecutionPlanProperties, collect_partitioned};

    use super::*;

    #[tokio::test]
    async fn numbers_of_any_type_become_floats() {
        let schema = Arc::new(Schema::new(vec![
            Field::new("series", DataType::UInt32, false),
            Field::new("ts", time_type(), false),
            Field::new("bytes", DataType::Int32, true),
        ]));
        let batch = |series: u32, numbers: Vec<Option<i32>>| {
            let rows = numbers.len() as i64;
            let ts = TimestampMillisecondArray::from_iter_values(0..rows).with_timezone("UTC");
            let series = UInt32Array::from_value(series, numbers.len());
            let columns: Vec<ArrayRef> = vec![Arc::new(series), Arc::new(ts), Arc::new(Int32Array::from(numbers))];
            vec![RecordBatch::try_new(schema.clone(), columns).expect("rows")]
        };
        let parts = [batch(0, vec![Some(1), None, Some(-3)]), batch(1, vec![Some(4)])];
        let scan = MemorySourceConfig::try_new_exec(&parts, schema.clone(), None).expect("a scan");
        let plan = floats(scan).expect("a plan");
        assert_eq!(plan.output_partitioning().partition_count(), 2, "series stay together");
        let parts = collect_partitioned(plan, Arc::new(TaskContext::default())).await.expect("rows");
        let values = |part: &Vec<RecordBatch>| -> Vec<f64> {
            let columns = part.iter().map(|b| b.column(2).as_primitive::<Float64Type>().values().to_vec());
            columns.flatten().collect()
        };
        assert_eq!(parts.iter().map(values).collect::<Vec<_>>(), [vec![1.0, -3.0], vec![4.0]]);
        assert_eq!(parts[0][0].schema().field(0).name(), "series");
    }
}
