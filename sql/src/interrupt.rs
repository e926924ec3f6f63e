//! Stopping a query that gives nothing back for long.
//!
//! Work is dropped where it waits. A join that multiplies its inputs may compute for minutes without waiting, so the
//! rule [`Interruptible`] makes joins take part in the runtime's cooperative scheduling, and lets the predicate of a
//! nested loop look at the statement's [`Interrupt`] each time it is evaluated.

use std::any::Any;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use arrow::datatypes::{DataType, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use datafusion::common::config::{ConfigEntry, ConfigExtension, ConfigOptions, ExtensionOptions};
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::{RecordBatchStream, SendableRecordBatchStream};
use datafusion::logical_expr::ColumnarValue;
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::coop::CooperativeExec;
use datafusion::physical_plan::joins::utils::JoinFilter;
use datafusion::physical_plan::joins::{CrossJoinExec, HashJoinExec, NestedLoopJoinExec, NestedLoopJoinExecBuilder};
use datafusion::physical_plan::unnest::UnnestExec;
use engine::Error;
use futures::Stream;
use tokio::time::Sleep;

use crate::table::external;

/// Whether a statement is to stop; it travels with the statement's configuration.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    fn stop(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// # Errors
    /// Once the statement is to stop.
    pub fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) { Err(external(Error::canceled("the query was stopped"))) } else { Ok(()) }
    }
}

impl ExtensionOptions for Interrupt {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }

    fn cloned(&self) -> Box<dyn ExtensionOptions> {
        Box::new(self.clone())
    }

    fn set(&mut self, key: &str, _value: &str) -> Result<()> {
        Err(DataFusionError::Configuration(format!("interrupt.{key} is not for setting")))
    }

    fn entries(&self) -> Vec<ConfigEntry> {
        Vec::new()
    }
}

impl ConfigExtension for Interrupt {
    const PREFIX: &'static str = "interrupt";
}

/// Interrupts the statement when dropped.
#[derive(Debug)]
pub struct Guard(Interrupt);

impl Guard {
    /// A guard of `interrupt`.
    pub fn new(interrupt: Interrupt) -> Self {
        Self(interrupt)
    }

    /// `stream` under this guard, which ends with an error of kind `Timeout` after `deadline`.
    pub fn watch(self, stream: SendableRecordBatchStream, deadline: Duration) -> SendableRecordBatchStream {
        let sleep = Box::pin(tokio::time::sleep(deadline));
        Box::pin(Watched { inner: stream, deadline, sleep, ended: false, _guard: self })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.stop();
    }
}

struct Watched {
    inner: SendableRecordBatchStream,
    deadline: Duration,
    sleep: Pin<Box<Sleep>>,
    ended: bool,
    _guard: Guard,
}

impl Stream for Watched {
    type Item = Result<RecordBatch>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if let Poll::Ready(next) = self.inner.as_mut().poll_next(cx) {
            return Poll::Ready(next);
        }
        if self.sleep.as_mut().poll(cx).is_ready() {
            self.ended = true;
            let message = format!("query ran for longer than its limit of {:?}", self.deadline);
            return Poll::Ready(Some(Err(external(Error::timeout(message)))));
        }
        Poll::Pending
    }
}

impl RecordBatchStream for Watched {
    fn schema(&self) -> SchemaRef {
        self.inner.schema()
    }
}

/// The rule.
#[derive(Debug, Default)]
pub struct Interruptible;

impl PhysicalOptimizerRule for Interruptible {
    fn optimize(&self, plan: Arc<dyn ExecutionPlan>, config: &ConfigOptions) -> Result<Arc<dyn ExecutionPlan>> {
        let interrupt = config.extensions.get::<Interrupt>();
        plan.transform_up(|node| {
            let any = node.as_ref() as &dyn Any;
            if let (Some(join), Some(interrupt)) = (any.downcast_ref::<NestedLoopJoinExec>(), interrupt)
                && let Some(filter) = join.filter()
            {
                let expr = Arc::new(Interrupted { expr: filter.expression().clone(), interrupt: interrupt.clone() });
                let filter = JoinFilter::new(expr, filter.column_indices().to_vec(), filter.schema().clone());
                let join = NestedLoopJoinExecBuilder::from(join).with_filter(Some(filter)).build()?;
                return Ok(Transformed::yes(Arc::new(CooperativeExec::new(Arc::new(join))) as _));
            }
            let multiplies = any.is::<NestedLoopJoinExec>()
                || any.is::<CrossJoinExec>()
                || any.is::<HashJoinExec>()
                || any.is::<UnnestExec>();
            Ok(if multiplies {
                Transformed::yes(Arc::new(CooperativeExec::new(node)) as _)
            } else {
                Transformed::no(node)
            })
        })
        .map(|t| t.data)
    }

    fn name(&self) -> &str {
        "interruptible"
    }

    fn schema_check(&self) -> bool {
        true
    }
}

/// A predicate that fails once the statement is to stop.
#[derive(Debug)]
struct Interrupted {
    expr: Arc<dyn PhysicalExpr>,
    interrupt: Interrupt,
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
        self.interrupt.check()?;
        self.expr.evaluate(batch)
    }

    fn children(&self) -> Vec<&Arc<dyn PhysicalExpr>> {
        vec![&self.expr]
    }

    fn with_new_children(self: Arc<Self>, children: Vec<Arc<dyn PhysicalExpr>>) -> Result<Arc<dyn PhysicalExpr>> {
        let [expr] = <[_; 1]>::try_from(children)
            .map_err(|c| DataFusionError::Internal(format!("a guarded predicate has one child, not {}", c.len())))?;
        Ok(Arc::new(Self { expr, interrupt: self.interrupt.clone() }))
    }

    fn fmt_sql(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.expr.fmt_sql(f)
    }
}
