//! Stopping a query that gives nothing back for long.
//!
//! Work is dropped where it waits, but a sort, an aggregate, a window or a join may compute for minutes without waiting. The
//! rule [`Interruptible`] therefore puts every node of a plan into a [`Watched`], which looks at the statement's [`Stop`]
//! before each batch and takes part in the runtime's cooperative scheduling: whoever asks for input after that gets an
//! error and ends. Where much is done between two batches the expressions that are evaluated there look, too (see
//! [`guarded`]): the predicate of a nested loop, which looks at more rows than can be counted, the keys of a sort, which
//! has a task of the runtime for each run, thousands of which may stand before the one that was dropped, and the functions
//! of a window, which take a partition as one.

mod window;

use std::any::Any;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use arrow::datatypes::{DataType, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::{RecordBatchStream, SendableRecordBatchStream, TaskContext};
use datafusion::logical_expr::ColumnarValue;
use datafusion::physical_expr::{LexOrdering, PhysicalExpr, PhysicalSortExpr};
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::coop::cooperative;
use datafusion::physical_plan::joins::utils::JoinFilter;
use datafusion::physical_plan::joins::{NestedLoopJoinExec, NestedLoopJoinExecBuilder};
use datafusion::physical_plan::metrics::MetricsSet;
use datafusion::physical_plan::sorts::sort::SortExec;
use datafusion::physical_plan::windows::WindowAggExec;
use datafusion::physical_plan::{
    ChildrenPropertiesMode, DisplayAs, DisplayFormatType, ExecutionPlan, PlanProperties, ReplaceChildrenOptions,
};
use engine::Stop;
use futures::{Stream, StreamExt};

pub use window::LookingWindows;

use crate::table::external;

/// The rule.
#[derive(Debug, Default)]
pub struct Interruptible;

impl PhysicalOptimizerRule for Interruptible {
    fn optimize(&self, plan: Arc<dyn ExecutionPlan>, config: &ConfigOptions) -> Result<Arc<dyn ExecutionPlan>> {
        let stop = Stop::of(config);
        plan.transform_up(|node| Ok(Transformed::yes(Arc::new(Watched::new(node, stop.clone())?) as _))).map(|t| t.data)
    }

    fn name(&self) -> &str {
        "interruptible"
    }

    fn schema_check(&self) -> bool {
        true
    }
}

/// The node that runs for another one, with expressions that fail once the statement is to stop. `None` where none are
/// needed.
fn guarded(node: &Arc<dyn ExecutionPlan>, stop: &Stop) -> Result<Option<Arc<dyn ExecutionPlan>>> {
    let guard = |expr: &Arc<dyn PhysicalExpr>| -> Arc<dyn PhysicalExpr> {
        Arc::new(Interrupted { expr: expr.clone(), stop: stop.clone() })
    };
    if let Some(join) = node.downcast_ref::<NestedLoopJoinExec>()
        && let Some(filter) = join.filter()
    {
        let expr = guard(filter.expression());
        let filter = JoinFilter::new(expr, filter.column_indices().to_vec(), filter.schema().clone());
        return Ok(Some(Arc::new(NestedLoopJoinExecBuilder::from(join).with_filter(Some(filter)).build()?)));
    }
    // One with a limit keeps few rows and sorts them as they come.
    if let Some(sort) = node.downcast_ref::<SortExec>()
        && sort.fetch().is_none()
    {
        let keys = sort.expr().iter().map(|key| PhysicalSortExpr { expr: guard(&key.expr), options: key.options });
        let Some(keys) = LexOrdering::new(keys) else { return Ok(None) };
        let runs = SortExec::new(keys, sort.input().clone());
        return Ok(Some(Arc::new(runs.with_preserve_partitioning(sort.preserve_partitioning()))));
    }
    if let Some(windows) = node.downcast_ref::<WindowAggExec>() {
        let functions = windows.window_expr().iter().map(|f| window::guarded(f, stop)).collect();
        let can_repartition = !windows.partition_keys().is_empty();
        return Ok(Some(Arc::new(WindowAggExec::try_new(functions, windows.input().clone(), can_repartition)?)));
    }
    Ok(None)
}

/// A node that is in all the one within, but for how its rows are made and given.
#[derive(Debug)]
struct Watched {
    /// As others see it: what holds for its rows is said with its own expressions.
    node: Arc<dyn ExecutionPlan>,
    /// What runs.
    runs: Arc<dyn ExecutionPlan>,
    stop: Stop,
}

impl Watched {
    fn new(node: Arc<dyn ExecutionPlan>, stop: Stop) -> Result<Self> {
        let runs = guarded(&node, &stop)?.unwrap_or_else(|| node.clone());
        Ok(Self { node, runs, stop })
    }
}

impl DisplayAs for Watched {
    fn fmt_as(&self, t: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.node.fmt_as(t, f)
    }
}

impl ExecutionPlan for Watched {
    fn name(&self) -> &str {
        self.node.name()
    }

    fn downcast_delegate(&self) -> Option<&dyn ExecutionPlan> {
        Some(self.node.as_ref())
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        self.node.properties()
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        self.node.children()
    }

    fn apply_expressions(
        &self,
        f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        self.node.apply_expressions(f)
    }

    fn replace_children(
        self: Arc<Self>,
        children: Vec<Arc<dyn ExecutionPlan>>,
        options: ReplaceChildrenOptions,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        Ok(Arc::new(Self::new(self.node.clone().replace_children(children, options)?, self.stop.clone())?))
    }

    fn with_new_children(self: Arc<Self>, children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        self.replace_children(children, ReplaceChildrenOptions::new(ChildrenPropertiesMode::Recompute))
    }

    fn reset_state(self: Arc<Self>) -> Result<Arc<dyn ExecutionPlan>> {
        Ok(Arc::new(Self::new(self.node.clone().reset_state()?, self.stop.clone())?))
    }

    fn with_new_state(&self, state: Arc<dyn Any + Send + Sync>) -> Option<Arc<dyn ExecutionPlan>> {
        Some(Arc::new(Self::new(self.node.with_new_state(state)?, self.stop.clone()).ok()?))
    }

    fn metrics(&self) -> Option<MetricsSet> {
        self.runs.metrics()
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let stop = Stop::of(context.session_config().options());
        let rows = self.runs.execute(partition, context)?;
        Ok(Box::pin(cooperative(WatchedRows { rows, stop, ended: false })))
    }
}

/// Rows until the statement is to stop.
struct WatchedRows {
    rows: SendableRecordBatchStream,
    stop: Stop,
    ended: bool,
}

impl Stream for WatchedRows {
    type Item = Result<RecordBatch>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if let Err(e) = self.stop.check() {
            self.ended = true;
            return Poll::Ready(Some(Err(external(e))));
        }
        self.rows.poll_next_unpin(cx)
    }
}

impl RecordBatchStream for WatchedRows {
    fn schema(&self) -> SchemaRef {
        self.rows.schema()
    }
}

/// A predicate that fails once the statement is to stop.
#[derive(Debug)]
struct Interrupted {
    expr: Arc<dyn PhysicalExpr>,
    stop: Stop,
}

impl PartialEq for Interrupted {
    fn eq(&self, other: &Self) -> bool {
        self.expr.eq(&other.expr)
    }
}

impl Eq for Interrupted {}

impl Hash for Interrupted {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.expr.hash(state);
    }
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.expr.fmt(f)
    }
}

impl PhysicalExpr for Interrupted {
    fn data_type(&self, input_schema: &Schema) -> Result<DataType> {
        self.expr.data_type(input_schema)
    }

    fn nullable(&self, input_schema: &Schema) -> Result<bool> {
        self.expr.nullable(input_schema)
    }

    fn evaluate(&self, batch: &RecordBatch) -> Result<ColumnarValue> {
        self.stop.check().map_err(external)?;
        self.expr.evaluate(batch)
    }

    fn children(&self) -> Vec<&Arc<dyn PhysicalExpr>> {
        vec![&self.expr]
    }

    fn with_new_children(self: Arc<Self>, children: Vec<Arc<dyn PhysicalExpr>>) -> Result<Arc<dyn PhysicalExpr>> {
        let [expr] = <[_; 1]>::try_from(children)
            .map_err(|c| DataFusionError::Internal(format!("a guarded predicate has one child, not {}", c.len())))?;
        Ok(Arc::new(Self { expr, stop: self.stop.clone() }))
    }

    fn fmt_sql(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.expr.fmt_sql(f)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use datafusion::execution::SessionStateBuilder;
    use datafusion::physical_plan::{collect, displayable};
    use engine::QueryLimits;

    use super::*;
    use crate::tests::Fixture;

    #[tokio::test(flavor = "multi_thread")]
    async fn nodes_give_no_more_once_the_statement_is_to_stop() {
        let f = Fixture::new().await;
        let sql = "SELECT n FROM (SELECT n, row_number() OVER (ORDER BY n % 7) AS r FROM generate_series(1, 100000) AS t(n)) \
                   AS x ORDER BY r DESC";
        let plan = crate::plan(sql, &f.session).await.unwrap();
        let query = f.engine.begin(QueryLimits { timeout: Duration::from_secs(60) }).await.unwrap();
        let context = f.engine.session();
        let state = context.state_ref();
        state.write().config_mut().options_mut().extensions.insert(query.stop().clone());
        let state = context.state();
        let plain = state.create_physical_plan(&plan).await.unwrap();
        let watched = Interruptible.optimize(plain.clone(), state.config_options()).unwrap();
        let shown = |plan: &Arc<dyn ExecutionPlan>| displayable(plan.as_ref()).indent(true).to_string();
        assert_eq!(shown(&watched), shown(&plain));
        assert!(watched.children()[0].downcast_ref::<Watched>().is_none(), "what it is in is not seen");
        let mut rows = watched.execute(0, state.task_ctx()).unwrap();
        assert!(rows.next().await.unwrap().unwrap().num_rows() > 0);
        drop(query.guard());
        let e = rows.next().await.unwrap().unwrap_err();
        assert_eq!(engine::error_of(e).kind(), engine::ErrorKind::Canceled);
        assert!(rows.next().await.is_none());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_sort_looks_before_each_run() {
        let f = Fixture::new().await;
        let sql = "SELECT n FROM generate_series(1, 1000) AS t(n) ORDER BY n % 7";
        let plan = crate::plan(sql, &f.session).await.unwrap();
        let query = f.engine.begin(QueryLimits { timeout: Duration::from_secs(60) }).await.unwrap();
        let state = f.engine.session().state();
        let plain = state.create_physical_plan(&plan).await.unwrap();
        let mut sort = plain;
        while sort.downcast_ref::<SortExec>().is_none() {
            sort = sort.children()[0].clone();
        }
        let sorted = guarded(&sort, query.stop()).unwrap().unwrap();
        let rows = |node: &Arc<dyn ExecutionPlan>| node.execute(0, state.task_ctx()).unwrap();
        assert_eq!(rows(&sorted).next().await.unwrap().unwrap().num_rows(), 1000);
        drop(query.guard());
        assert!(rows(&sort).next().await.unwrap().is_ok(), "the sort itself does not look");
        let e = rows(&sorted).next().await.unwrap().unwrap_err();
        assert_eq!(engine::error_of(e).kind(), engine::ErrorKind::Canceled);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_window_looks_while_it_takes_a_partition() {
        let f = Fixture::new().await;
        let functions = [
            "sum(n) OVER ()",
            "sum(n) OVER (ORDER BY n % 7, n ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING)",
            "max(n) OVER (PARTITION BY n % 2 ORDER BY n % 7, n ROWS BETWEEN 1 PRECEDING AND UNBOUNDED FOLLOWING)",
            "last_value(n) OVER (ORDER BY n % 7, n ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)",
            "ntile(4) OVER (ORDER BY n % 7)",
        ];
        for function in functions {
            let sql = format!("SELECT {function} AS w FROM generate_series(1, 1200000) AS t(n)");
            let plan = crate::plan(&sql, &f.session).await.unwrap();
            let query = f.engine.begin(QueryLimits { timeout: Duration::from_secs(60) }).await.unwrap();
            let plain = f.engine.session().state();
            let mut builder = SessionStateBuilder::new_from_existing(plain.clone());
            builder.config().get_or_insert_default().options_mut().extensions.insert(query.stop().clone());
            let state = builder.with_optimizer_rule(Arc::new(LookingWindows)).build();
            let window = |plan: &Arc<dyn ExecutionPlan>| {
                let mut node = plan.clone();
                while node.downcast_ref::<WindowAggExec>().is_none() {
                    let child = node.children().first().map(|c| (*c).clone());
                    node = child.unwrap_or_else(|| panic!("{function} is bounded"));
                }
                node
            };
            let expected = window(&plain.create_physical_plan(&plan).await.unwrap());
            // What is below the window does not look here, and a plan runs once.
            let looking = window(&state.create_physical_plan(&plan).await.unwrap());
            let again = window(&state.create_physical_plan(&plan).await.unwrap());
            assert_eq!(looking.schema(), expected.schema(), "{function}");
            let guard = |node: &Arc<dyn ExecutionPlan>| guarded(node, query.stop()).unwrap().unwrap();
            let (looking, again) = (guard(&looking), guard(&again));
            let rows = |node: Arc<dyn ExecutionPlan>| collect(node, state.task_ctx());
            assert_eq!(rows(looking).await.unwrap(), rows(expected).await.unwrap(), "{function}");
            drop(query.guard());
            let e = rows(again).await.err().unwrap_or_else(|| panic!("{function} did not look"));
            assert_eq!(engine::error_of(e).kind(), engine::ErrorKind::Canceled, "{function}");
        }
    }
}
