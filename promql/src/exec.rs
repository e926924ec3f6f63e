//! Physical nodes: one [`NodeExec`] for each logical node, its work in a file by kind.
//!
//! Operations that look at one series at a time stream: their partitions are those of their first input, which are
//! contiguous ranges of series. All others read their inputs whole, partitions at the same time, and have one
//! partition. What a query has to say besides its result goes into the [`Notes`] that its session carries.

mod aggregate;
mod annotations;
mod binary;
mod histogram;
mod info;
mod map;
mod native;
mod notes;
mod order;
mod relabel;
mod run;
mod select;
mod setops;
mod topk;

use std::fmt;
use std::sync::Arc;
use std::task::Poll;

use arrow::array::{Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use catalog::Series;
use datafusion::common::runtime::SpawnedTask;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::error::{DataFusionError, Result as DfResult};
use datafusion::execution::memory_pool::{MemoryConsumer, MemoryReservation};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::{EquivalenceProperties, Partitioning};
use datafusion::physical_plan::execution_plan::{Boundedness, EmissionType};
use datafusion::physical_plan::metrics::{BaselineMetrics, ExecutionPlanMetricsSet, MetricsSet};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, ExecutionPlanProperties, PhysicalExpr, PlanProperties,
};
use engine::query::Pace;
use engine::{Reservation, SeriesScanExec, SeriesSet, Stop};
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt, TryStreamExt};

use crate::QueryError;
use crate::block::{self, BlockBuilder};
use crate::options::Grid;
use crate::plan::ops::{Op, Place};
use crate::result::Block;

use annotations::NotesAt;
pub(crate) use native::COLUMNS as HISTOGRAM_COLUMNS;
pub use notes::Notes;
pub use run::{Planner, query};
pub(crate) use run::{out_of_memory, session};

/// Schema of a range vector: `labels`, `times` (milliseconds), `values`, and the same of histograms, which are encoded
/// as in blocks; one row per series.
pub fn runs_schema() -> SchemaRef {
    let list = |t: DataType| DataType::List(Arc::new(Field::new("item", t, false)));
    Arc::new(Schema::new(vec![
        Field::new("labels", DataType::Binary, false),
        Field::new("times", list(DataType::Int64), false),
        Field::new("values", list(DataType::Float64), false),
        Field::new("histogram_times", list(DataType::Int64), false),
        Field::new("histograms", list(DataType::Binary), false),
    ]))
}

fn notes(context: &TaskContext) -> Arc<Notes> {
    context.session_config().get_extension::<Notes>().unwrap_or_default()
}

/// Where a selector finds the labels of the series that its scan numbers.
#[derive(Debug, Clone)]
pub enum SeriesLabels {
    /// The scan's own set.
    Set(Arc<SeriesSet>),
    /// Others than those of the scan's set, or of a scan that is not ours to look into.
    List(Arc<[Vec<u8>]>, Option<Arc<Reservation>>),
}

impl SeriesLabels {
    fn get(&self, index: u32) -> Option<&[u8]> {
        match self {
            Self::Set(set) => set.series.get(index as usize).map(|s: &Arc<Series>| s.tags.as_bytes()),
            Self::List(list, _) => list.get(index as usize).map(Vec::as_slice),
        }
    }
}

/// The physical form of an operation.
#[derive(Debug)]
pub struct NodeExec {
    pub(crate) op: Op,
    pub(crate) grid: Grid,
    pub(crate) place: Place,
    pub(crate) inputs: Vec<Arc<dyn ExecutionPlan>>,
    pub(crate) labels: Option<SeriesLabels>,
    schema: SchemaRef,
    properties: Arc<PlanProperties>,
    metrics: ExecutionPlanMetricsSet,
}

impl NodeExec {
    /// An operation over inputs. Those that read series have the scan of their float samples as input 0, and scans over the
    /// same series of histograms as input 1 and of start times as input 2 when any has some.
    pub fn new(
        op: Op,
        grid: Grid,
        place: Place,
        inputs: Vec<Arc<dyn ExecutionPlan>>,
        labels: Option<SeriesLabels>,
    ) -> Self {
        let schema = match op {
            Op::Samples(_) => runs_schema(),
            _ => block::schema(grid.steps()),
        };
        let partitions = match (&op, inputs.first()) {
            (op, Some(input)) if streams(op) => input.output_partitioning().partition_count().max(1),
            _ => 1,
        };
        let properties = Arc::new(PlanProperties::new(
            EquivalenceProperties::new(schema.clone()),
            Partitioning::UnknownPartitioning(partitions),
            if partitions > 1 { EmissionType::Incremental } else { EmissionType::Final },
            Boundedness::Bounded,
        ));
        let labels = labels.or_else(|| {
            let scan = inputs.first()?.downcast_ref::<SeriesScanExec>()?;
            Some(SeriesLabels::Set(scan.set().clone()))
        });
        Self { op, grid, place, inputs, labels, schema, properties, metrics: ExecutionPlanMetricsSet::new() }
    }
}

/// Runs something that recurses over an expression, on more stack when little is left.
pub(crate) fn deep<T>(f: impl FnOnce() -> T) -> T {
    const LEFT: usize = 256 << 10;
    const MORE: usize = 2 << 20;
    stacker::maybe_grow(LEFT, MORE, f)
}

/// Whether an operation looks at one series at a time.
fn streams(op: &Op) -> bool {
    matches!(
        op,
        Op::Select { .. }
            | Op::Samples(_)
            | Op::Subquery { .. }
            | Op::Map { .. }
            | Op::LabelReplace { .. }
            | Op::LabelJoin { .. }
            | Op::VectorScalar { .. }
            | Op::Repeat
    )
}

impl DisplayAs for NodeExec {
    fn fmt_as(&self, _t: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.op.explain(&self.grid, f)
    }
}

impl ExecutionPlan for NodeExec {
    fn name(&self) -> &str {
        self.op.name()
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        self.inputs.iter().collect()
    }

    fn apply_expressions(
        &self,
        _f: &mut dyn for<'a> FnMut(&'a Arc<dyn PhysicalExpr>) -> DfResult<TreeNodeRecursion>,
    ) -> DfResult<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn with_new_children(self: Arc<Self>, children: Vec<Arc<dyn ExecutionPlan>>) -> DfResult<Arc<dyn ExecutionPlan>> {
        Ok(Arc::new(Self::new(self.op.clone(), self.grid, self.place, children, self.labels.clone())))
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> DfResult<SendableRecordBatchStream> {
        let work = Work {
            op: self.op.clone(),
            grid: self.grid,
            place: self.place,
            inputs: self.inputs.clone(),
            schema: self.schema.clone(),
            notes: notes(&context),
            stop: Stop::of(context.session_config().options()),
            memory: Arc::new(MemoryConsumer::new(self.op.name()).register(context.memory_pool())),
            context,
        };
        work.hold(excess_of_batch(self.grid.steps()))?;
        let batches = deep(|| self.batches(work, partition))?;
        let metrics = BaselineMetrics::new(&self.metrics, partition);
        let mut counted = batches.inspect_ok(move |b| metrics.record_output(b.num_rows()));
        // Every level of a plan is a dozen stack frames of its parent's poll.
        let polled = stream::poll_fn(move |context| deep(|| counted.poll_next_unpin(context)));
        Ok(Box::pin(RecordBatchStreamAdapter::new(self.schema.clone(), polled)))
    }

    fn metrics(&self) -> Option<MetricsSet> {
        Some(self.metrics.clone_inner())
    }
}

impl NodeExec {
    fn batches(&self, work: Work, partition: usize) -> DfResult<Batches> {
        Ok(match &self.op {
            Op::Select { .. } | Op::Samples(_) => {
                let labels = self.labels.clone().ok_or_else(|| internal("a selector without labels of its series"))?;
                select::execute(work, partition, labels)?
            }
            Op::Subquery { .. } => select::subquery(work, partition)?,
            Op::Map { .. } => map::execute(work, partition)?,
            Op::LabelReplace { .. } | Op::LabelJoin { .. } => relabel::execute(work, partition)?,
            Op::VectorScalar { .. } => binary::vector_scalar(work, partition)?,
            Op::Repeat => map::repeat(work, partition)?,
            _ => work.whole(),
        })
    }
}

type Batches = BoxStream<'static, DfResult<RecordBatch>>;

/// What the execution of a node needs.
struct Work {
    op: Op,
    grid: Grid,
    /// What the notes of this node are about.
    place: Place,
    inputs: Vec<Arc<dyn ExecutionPlan>>,
    schema: SchemaRef,
    notes: Arc<Notes>,
    /// Loops over rows look at it.
    stop: Stop,
    /// What this partition of the node holds beyond a batch of usual size.
    memory: Arc<MemoryReservation>,
    context: Arc<TaskContext>,
}

impl Work {
    /// Runs an operation that reads its inputs whole.
    fn whole(self) -> Batches {
        let batches = async move {
            let batches = match &self.op {
                Op::Nothing => vec![],
                Op::Number(v) => {
                    let v = v.get();
                    vec![self.scalar(|_| v)?]
                }
                Op::Time => vec![self.scalar(|step| self.grid.time(step) as f64 / 1000.0)?],
                Op::Histogram { .. } => histogram::execute(&self).await?,
                Op::Info { .. } => info::execute(&self).await?,
                Op::Absent { .. } | Op::Scalar => order::presence(&self).await?,
                Op::Sort { .. } | Op::SortByLabel { .. } => order::sort(&self).await?,
                Op::Aggregate { .. } => aggregate::execute(&self).await?,
                Op::CountValues { .. } => topk::count_values(&self).await?,
                Op::ScalarBinary(_) => binary::scalars(&self).await?,
                Op::VectorBinary { .. } => binary::vectors(&self).await?,
                Op::Set { .. } => setops::execute(&self).await?,
                Op::Merge { .. } | Op::CleanNames => relabel::merge(&self).await?,
                other => return Err(internal(&format!("{} does not read its inputs whole", other.name()))),
            };
            // What was read is gone, what was made is on its way.
            let left = batches.iter().map(bytes_of).sum::<usize>().min(self.memory.size());
            self.memory.shrink(self.memory.size() - left);
            let memory = self.memory;
            Ok(stream::iter(batches.into_iter().map(Ok)).chain(ended(memory)))
        };
        stream::once(batches).try_flatten().boxed()
    }

    fn scalar(&self, value: impl Fn(usize) -> f64) -> DfResult<RecordBatch> {
        let mut builder = BlockBuilder::new(self.schema.clone());
        let (values, valid) = builder.push(|_| false);
        for (step, v) in values.iter_mut().enumerate() {
            *v = value(step);
        }
        valid.fill(true);
        builder.finish()
    }

    fn steps(&self) -> usize {
        self.grid.steps()
    }

    /// The notes, about what the node works on.
    fn notes_of_input(&self) -> NotesAt<'_> {
        NotesAt { notes: &self.notes, at: self.place.input }
    }

    /// The notes, about the node's expression.
    fn notes_of_whole(&self) -> NotesAt<'_> {
        NotesAt { notes: &self.notes, at: self.place.whole }
    }

    /// Reserves memory until the node has given all it has to give.
    fn hold(&self, bytes: usize) -> DfResult<()> {
        if bytes > 0 { self.memory.try_grow(bytes) } else { Ok(()) }
    }

    /// Bytes of a row of the node's batches, labels aside.
    fn row_bytes(&self) -> usize {
        self.steps() * VALUE_BYTES
    }

    /// The stream of one partition of an input.
    fn stream(&self, input: usize, partition: usize) -> DfResult<SendableRecordBatchStream> {
        self.input(input)?.execute(partition, self.context.clone())
    }

    fn input(&self, input: usize) -> DfResult<&Arc<dyn ExecutionPlan>> {
        self.inputs.get(input).ok_or_else(|| internal(&format!("{} lacks input {input}", self.op.name())))
    }

    /// All of an input, partitions in order.
    async fn blocks(&self, input: usize) -> DfResult<Vec<Block>> {
        let memory = self.memory.clone();
        let batches = self.fold(input, move |blocks: &mut Vec<Block>, block| {
            memory.try_grow(block.bytes())?;
            keep(blocks, block);
            Ok(())
        });
        let blocks: Vec<Block> = batches.await?.into_iter().flatten().collect();
        // A float sample with its time takes 16 bytes.
        self.notes.hold(blocks.iter().map(|b| b.len() * b.steps() + b.histogram_bytes() / 16).sum())?;
        Ok(blocks)
    }

    /// Folds each partition of an input into a value of its own, partitions at the same time.
    async fn fold<T, F>(&self, input: usize, add: F) -> DfResult<Vec<T>>
    where
        T: Default + Send + 'static,
        F: Fn(&mut T, Block) -> DfResult<()> + Clone + Send + 'static,
    {
        let plan = self.input(input)?;
        let partitions = plan.output_partitioning().partition_count();
        let one = |partition: usize| -> DfResult<_> {
            let mut batches = plan.execute(partition, self.context.clone())?;
            let (add, mut pace) = (add.clone(), self.stop.pace());
            Ok(async move {
                let mut state = T::default();
                while let Some(batch) = batches.try_next().await? {
                    let block = Block::try_new(&batch)?;
                    pace.walk(block.len() * cost(block.steps()))?;
                    add(&mut state, block)?;
                }
                Ok::<T, DataFusionError>(state)
            })
        };
        if partitions == 1 {
            return Ok(vec![one(0)?.await?]);
        }
        let tasks = (0..partitions).map(|p| Ok(SpawnedTask::spawn(one(p)?))).collect::<DfResult<Vec<_>>>()?;
        let mut states = Vec::with_capacity(partitions);
        for task in tasks {
            states.push(task.await.map_err(|e| internal(&format!("a partition failed: {e}")))??);
        }
        Ok(states)
    }

    /// How many of the inputs are scans: none, or those of floats, of histograms and of start times up to the last that is
    /// needed.
    fn scans(&self) -> usize {
        let is_scan =
            |input: &&Arc<dyn ExecutionPlan>| input.schema().fields().first().is_some_and(|f| f.name() == "series");
        self.inputs.iter().take_while(is_scan).count()
    }

    /// The values of a scalar input, one per step.
    async fn scalar_input(&self, input: usize) -> DfResult<Vec<f64>> {
        let blocks = self.blocks(input).await?;
        let block = blocks.iter().find(|b| !b.is_empty()).ok_or_else(|| internal("a scalar without values"))?;
        Ok(block.values(0).to_vec())
    }

    /// The values of the scalar inputs from `first` on.
    async fn scalar_inputs(&self, first: usize) -> DfResult<Vec<Vec<f64>>> {
        let mut all = Vec::new();
        for input in first..self.inputs.len() {
            all.push(self.scalar_input(input).await?);
        }
        Ok(all)
    }

    /// Applies `f` to each block of a partition of input 0, once the scalar inputs from 1 on are known.
    fn map_blocks<F>(self, partition: usize, f: F) -> DfResult<Batches>
    where
        F: FnMut(&Work, &[Vec<f64>], Block, &mut Pace) -> DfResult<RecordBatch> + Send + 'static,
    {
        let input = self.stream(0, partition)?;
        let (mut f, mut pace) = (f, self.stop.pace());
        let batches = async move {
            let scalars = self.scalar_inputs(1).await?;
            Ok::<_, DataFusionError>(input.map(move |batch| {
                let block = Block::try_new(&batch?)?;
                pace.walk(block.len() * cost(block.steps()))?;
                f(&self, &scalars, block, &mut pace)
            }))
        };
        Ok(stream::once(batches).try_flatten().boxed())
    }
}

/// A value and whether it is there.
const VALUE_BYTES: usize = size_of::<f64>() + 1;
/// Batches up to this size are not reserved for: a query holds only some of them at a time.
const BATCH_BYTES: usize = 1 << 20;

/// What a batch of many steps takes beyond the usual.
fn excess_of_batch(steps: usize) -> usize {
    (block::rows_per_batch(steps) * steps * VALUE_BYTES).saturating_sub(BATCH_BYTES)
}

/// Bytes of a batch, which may be a slice of a larger one.
fn bytes_of(batch: &RecordBatch) -> usize {
    batch.columns().iter().map(|c| c.to_data().get_slice_memory_size().unwrap_or(0)).sum()
}

/// Nothing more, and with it the end of what the batches before it held.
fn ended(memory: Arc<MemoryReservation>) -> impl Stream<Item = DfResult<RecordBatch>> {
    stream::poll_fn(move |_| {
        memory.free();
        Poll::Ready(None)
    })
}

/// What it costs to look at a row: its labels and a value per step.
fn cost(steps: usize) -> usize {
    256 + steps
}

fn keep(blocks: &mut Vec<Block>, block: Block) {
    if !block.is_empty() {
        blocks.push(block);
    }
}

fn internal(message: &str) -> DataFusionError {
    QueryError::internal(message).into()
}

fn same_labels() -> QueryError {
    QueryError::execution("vector cannot contain metrics with the same labelset")
}

#[cfg(test)]
mod tests;
