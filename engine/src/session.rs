//! DataFusion sessions: what languages add to them, and running their plans within limits.

use std::num::NonZeroUsize;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use arrow::datatypes::SchemaRef;
use arrow::error::ArrowError;
use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use catalog::{Error, ErrorKind};
use datafusion::catalog::{
    CatalogProvider, CatalogProviderList, MemoryCatalogProvider, MemoryCatalogProviderList, MemorySchemaProvider,
    Session, TableFunctionImpl,
};
use datafusion::error::{DataFusionError, Result as DfResult};
use datafusion::execution::context::QueryPlanner;
use datafusion::execution::disk_manager::{DiskManagerBuilder, DiskManagerMode};
use datafusion::execution::memory_pool::{MemoryPool, TrackConsumersPool};
use datafusion::execution::runtime_env::{RuntimeEnv, RuntimeEnvBuilder};
use datafusion::execution::{
    RecordBatchStream, SendableRecordBatchStream, SessionState, SessionStateBuilder, TaskContext,
};
use datafusion::logical_expr::LogicalPlan;
use datafusion::physical_plan::{ExecutionPlan, execute_stream};
use datafusion::physical_planner::{DefaultPhysicalPlanner, ExtensionPlanner, PhysicalPlanner};
use datafusion::prelude::SessionConfig;
use futures::{Stream, StreamExt};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Sleep;
use tokio_util::task::AbortOnDropHandle;

use crate::Settings;
use crate::activity::{Activity, NotedPool};
use crate::memory::{Memory, QueryPool};
use crate::query::{Guard, Query, Stop};
use crate::telemetry::{Metrics, OutcomeLabel};

/// What a query language adds to every session: planners for its logical nodes (functions and rules join as needed).
#[derive(Default, Clone)]
pub struct Extensions {
    /// Turn extension nodes into physical nodes.
    pub planners: Vec<Arc<dyn ExtensionPlanner + Send + Sync>>,
    /// Scalar functions.
    pub functions: Vec<Arc<datafusion::logical_expr::ScalarUDF>>,
    /// Table functions by name. The sessions of an engine carry an `Arc<Engine>` as a config extension.
    pub table_functions: Vec<(&'static str, Arc<dyn TableFunctionImpl>)>,
    /// Optimizer rules, run after DataFusion's own.
    pub optimizer_rules: Vec<Arc<dyn datafusion::optimizer::OptimizerRule + Send + Sync>>,
}

impl std::fmt::Debug for Extensions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Extensions({} planners)", self.planners.len())
    }
}

impl Extensions {
    /// Both.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.planners.extend(other.planners);
        self.functions.extend(other.functions);
        self.table_functions.extend(other.table_functions);
        self.optimizer_rules.extend(other.optimizer_rules);
        self
    }
}

/// Plans with the extension planners of all languages.
struct Planner(DefaultPhysicalPlanner);

impl std::fmt::Debug for Planner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Planner")
    }
}

#[async_trait]
impl QueryPlanner for Planner {
    async fn create_physical_plan(
        &self,
        plan: &LogicalPlan,
        session: &dyn Session,
    ) -> DfResult<Arc<dyn ExecutionPlan>> {
        self.0.create_physical_plan(plan, session).await
    }
}

/// The state that every session begins with. Making it takes milliseconds, cloning it microseconds.
///
/// # Errors
/// The folder for what queries spill can't be used.
pub(crate) fn state(settings: &Settings, memory: Memory, extensions: Extensions) -> DfResult<SessionState> {
    let runtime = RuntimeEnvBuilder::new()
        .with_memory_pool(pool(memory))
        .with_disk_manager_builder(spill(&settings.data_dir))
        .build_arc()?;
    let mut config = SessionConfig::new()
        .with_target_partitions(settings.cpu_threads.max(1))
        .with_batch_size(8192)
        .with_information_schema(true);
    // Time zones are UTC unless a session says otherwise.
    config.options_mut().execution.time_zone = Some("UTC".to_owned());
    let mut state = SessionStateBuilder::new()
        .with_config(config)
        .with_runtime_env(runtime)
        .with_default_features()
        .with_query_planner(Arc::new(Planner(DefaultPhysicalPlanner::with_extension_planners(extensions.planners))))
        .build();
    for function in extensions.functions {
        use datafusion::execution::FunctionRegistry;
        state.register_udf(function)?;
    }
    for (name, function) in extensions.table_functions {
        state.register_udtf(name, function);
    }
    let mut builder = SessionStateBuilder::new_from_existing(state);
    for rule in extensions.optimizer_rules {
        builder = builder.with_optimizer_rule(rule);
    }
    Ok(builder.build())
}

/// The runtime of one query: what its operators reserve counts as its own.
fn runtime(shared: &RuntimeEnv, memory: &Memory) -> RuntimeEnv {
    RuntimeEnv { memory_pool: pool(memory.clone()), ..shared.clone() }
}

/// What nodes run with that a query runs without a logical plan: its stop, and its view of memory.
pub(crate) fn task_context(state: &SessionState, query: &Query) -> TaskContext {
    let mut config = state.config().clone();
    config.options_mut().extensions.insert(query.stop().clone());
    if let Some(activity) = query.activity() {
        config.set_extension(activity.clone());
    }
    let context = TaskContext::from(state).with_session_config(config);
    let runtime = runtime(&context.runtime_env(), query.memory());
    context.with_runtime(Arc::new(runtime))
}

fn pool(memory: Memory) -> Arc<dyn MemoryPool> {
    // Errors name the greatest consumers, so that a user sees which part of a query to change.
    const CONSUMERS_NAMED: NonZeroUsize = NonZeroUsize::new(3).unwrap();
    Arc::new(TrackConsumersPool::new(QueryPool(memory), CONSUMERS_NAMED))
}

/// An empty catalog list with the default catalog and schema.
pub(crate) fn catalogs(config: &SessionConfig) -> Arc<dyn CatalogProviderList> {
    let defaults = &config.options().catalog;
    let catalog = MemoryCatalogProvider::new();
    // Registering in memory does not fail.
    let _ = catalog.register_schema(&defaults.default_schema, Arc::new(MemorySchemaProvider::new()));
    let catalogs = MemoryCatalogProviderList::new();
    catalogs.register_catalog(defaults.default_catalog.clone(), Arc::new(catalog));
    Arc::new(catalogs)
}

fn spill(data_dir: &Path) -> DiskManagerBuilder {
    DiskManagerBuilder::default().with_mode(DiskManagerMode::Directories(vec![data_dir.join("spill")]))
}

/// Batches that may wait for a slow reader.
const BATCHES_AHEAD: usize = 2;
/// A query that has waited for its reader for so long lets others run meanwhile.
const READER_PATIENCE: Duration = Duration::from_secs(1);

/// Plans and runs a query on the CPU runtime; see [`crate::Engine::execute`].
pub(crate) async fn execute(
    cpu: &Handle,
    metrics: Arc<Metrics>,
    state: &SessionState,
    plan: LogicalPlan,
    mut query: Query,
) -> DfResult<SendableRecordBatchStream> {
    let (schema_to, schema) = oneshot::channel();
    let (batches_to, batches) = mpsc::channel(BATCHES_AHEAD);
    let mut state = state.clone();
    let (stop, guard) = (query.stop().clone(), query.guard());
    state.config_mut().options_mut().extensions.insert(stop.clone());
    let activity = query.activity().cloned();
    if let Some(activity) = &activity {
        // Scans find it there.
        state.config_mut().set_extension(activity.clone());
    }
    let (task_stop, memory) = (stop.clone(), query.memory().clone());
    let task = async move {
        metrics.queries_running.inc();
        let mut outcome =
            Outcome { metrics, begun: std::time::Instant::now(), label: "canceled", activity: activity.clone() };
        let mut schema_to = Some(schema_to);
        let run = async {
            let plan = state.create_physical_plan(&plan).await?;
            let context = TaskContext::from(&state);
            let mut runtime = runtime(&context.runtime_env(), &memory);
            if let Some(activity) = &activity {
                let (common, activity) = (runtime.memory_pool.clone(), activity.clone());
                runtime.memory_pool = Arc::new(NotedPool { common, activity });
            }
            let mut stream = execute_stream(plan, Arc::new(context.with_runtime(Arc::new(runtime))))?;
            if let Some(to) = schema_to.take() {
                let _ = to.send(Ok(stream.schema()));
            }
            while let Some(batch) = stream.next().await.transpose()? {
                if let Some(activity) = &activity {
                    activity.gave(batch.num_rows());
                }
                if !hand_over(&batches_to, batch, &mut query).await {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        let run = tokio::time::timeout_at(task_stop.deadline(), run);
        // Dropping it ends what it has spawned. Not all operators look at the stop, but all wait now and then.
        let result = tokio::select! {
            result = run => result.unwrap_or_else(|_| Err(external(task_stop.timed_out()))),
            shed = task_stop.shed() => Err(external(shed)),
        };
        match result {
            Ok(done) => outcome.label = if done { "ok" } else { "canceled" },
            Err(e) => {
                outcome.label = outcome_of(&e);
                match schema_to.take() {
                    Some(to) => drop(to.send(Err(e))),
                    // Found after what waits for the reader. A reader that pauses must not keep the query's turn until then.
                    None => return Some(e),
                }
            }
        }
        None
    };
    let task = AbortOnDropHandle::new(cpu.spawn(task));
    // Work that does not wait can't notice the deadline in time, but whoever asked is told.
    let schema = tokio::time::timeout_at(stop.deadline(), schema).await.map_err(|_| external(stop.timed_out()))?;
    let schema = schema.map_err(|_| external(Error::internal("query ended without a result")))??;
    let deadline = Box::pin(tokio::time::sleep_until(stop.deadline()));
    Ok(Box::pin(QueryStream { schema, batches, task, stop, deadline, done: false, guard: Some(guard) }))
}

/// Gives a batch to the reader; false when there is none any more. A slow one holds no other query up.
async fn hand_over(to: &mpsc::Sender<RecordBatch>, batch: RecordBatch, query: &mut Query) -> bool {
    let permit = match tokio::time::timeout(READER_PATIENCE, to.reserve()).await {
        Ok(permit) => permit,
        Err(_) => {
            query.rest();
            let permit = to.reserve().await;
            query.go_on().await;
            permit
        }
    };
    permit.map(|permit| permit.send(batch)).is_ok()
}

fn external(e: Error) -> DataFusionError {
    DataFusionError::External(Box::new(e))
}

fn outcome_of(e: &DataFusionError) -> &'static str {
    match e.find_root() {
        DataFusionError::External(inner) => match inner.downcast_ref::<Error>().map(Error::kind) {
            Some(ErrorKind::Timeout) => "timeout",
            Some(ErrorKind::Canceled) => "canceled",
            Some(ErrorKind::Corrupt) => "damaged",
            _ => "error",
        },
        _ => "error",
    }
}

/// Counts a query when it ends, also when it is aborted.
struct Outcome {
    metrics: Arc<Metrics>,
    begun: std::time::Instant,
    label: &'static str,
    activity: Option<Arc<Activity>>,
}

impl Drop for Outcome {
    fn drop(&mut self) {
        self.metrics.queries_running.dec();
        if let Some(activity) = &self.activity {
            activity.end(self.label);
        }
        self.metrics.queries.get_or_create(&OutcomeLabel { outcome: self.label }).inc();
        self.metrics.query.observe(self.begun.elapsed().as_secs_f64());
    }
}

/// The rows of a running query. Dropping it aborts the query.
struct QueryStream {
    schema: SchemaRef,
    batches: mpsc::Receiver<RecordBatch>,
    /// Gives what it failed of after its first batch.
    task: AbortOnDropHandle<Option<DataFusionError>>,
    stop: Stop,
    deadline: Pin<Box<Sleep>>,
    done: bool,
    /// Tells loops that do not wait; `None` once all was given.
    guard: Option<Guard>,
}

impl Stream for QueryStream {
    type Item = DfResult<RecordBatch>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.done {
            return Poll::Ready(None);
        }
        match self.batches.poll_recv(cx) {
            Poll::Ready(Some(batch)) => return Poll::Ready(Some(Ok(batch))),
            Poll::Ready(None) => {}
            Poll::Pending => {
                std::task::ready!(self.deadline.as_mut().poll(cx));
                self.done = true;
                return Poll::Ready(Some(Err(external(self.stop.timed_out()))));
            }
        }
        // A panic closes the channel like the end does, and must not look like it.
        let joined = std::task::ready!(Pin::new(&mut self.task).poll(cx));
        self.done = true;
        self.guard.take().into_iter().for_each(Guard::release);
        Poll::Ready(joined.unwrap_or_else(|e| Some(DataFusionError::ExecutionJoin(Box::new(e)))).map(Err))
    }
}

impl RecordBatchStream for QueryStream {
    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }
}

/// The product's error inside a DataFusion error, or one made from it. Errors of ours travel through plans as
/// `DataFusionError::External`.
pub fn error_of(e: DataFusionError) -> Error {
    match e {
        DataFusionError::External(inner) => match inner.downcast::<Error>() {
            Ok(e) => *e,
            Err(inner) => match inner.downcast::<DataFusionError>() {
                Ok(e) => error_of(*e),
                Err(inner) => Error::internal("query failed").with_source(inner),
            },
        },
        DataFusionError::Context(_, inner) | DataFusionError::Diagnostic(_, inner) => error_of(*inner),
        DataFusionError::Collection(mut all) if !all.is_empty() => error_of(all.swap_remove(0)),
        DataFusionError::ArrowError(inner, _) => match *inner {
            ArrowError::ExternalError(inner) => error_of(DataFusionError::External(inner)),
            other => Error::new(kind_of_arrow(&other), other.to_string()),
        },
        DataFusionError::Shared(inner) => match Arc::try_unwrap(inner) {
            Ok(inner) => error_of(inner),
            Err(inner) => match inner.find_root() {
                DataFusionError::External(e) => match e.downcast_ref::<Error>() {
                    Some(e) => Error::new(e.kind(), e.message()),
                    None => Error::internal(inner.strip_backtrace()),
                },
                root => Error::new(kind_of(root), root.strip_backtrace()),
            },
        },
        DataFusionError::ResourcesExhausted(text) => Error::limit_exceeded(refusal(&text)),
        e => Error::new(kind_of(&e), e.strip_backtrace()),
    }
}

/// What the account of memory said, without what DataFusion puts around it.
fn refusal(text: &str) -> &str {
    text.rsplit_once("Error: ").map_or(text, |(_, said)| said)
}

fn kind_of(e: &DataFusionError) -> ErrorKind {
    match e {
        DataFusionError::ResourcesExhausted(_) => ErrorKind::LimitExceeded,
        DataFusionError::ObjectStore(_) => ErrorKind::Unavailable,
        DataFusionError::ArrowError(e, _) => kind_of_arrow(e),
        // What functions say of their arguments comes as an execution error; bugs have a variant of their own.
        DataFusionError::Plan(_)
        | DataFusionError::SQL(..)
        | DataFusionError::SchemaError(..)
        | DataFusionError::Configuration(_)
        | DataFusionError::Execution(_)
        | DataFusionError::NotImplemented(_) => ErrorKind::Invalid,
        _ => ErrorKind::Internal,
    }
}

/// What a query computes can fail on the data it chose.
fn kind_of_arrow(e: &ArrowError) -> ErrorKind {
    match e {
        ArrowError::DivideByZero
        | ArrowError::ArithmeticOverflow(_)
        | ArrowError::CastError(_)
        | ArrowError::ParseError(_)
        | ArrowError::ComputeError(_)
        | ArrowError::InvalidArgumentError(_) => ErrorKind::Invalid,
        _ => ErrorKind::Internal,
    }
}
