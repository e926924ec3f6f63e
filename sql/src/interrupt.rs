//! Stopping a query that gives nothing back for long.
//!
//! Work is dropped where it waits. A join that multiplies its inputs may compute for minutes without waiting, so the
//! rule [`Interruptible`] makes joins take part in the runtime's cooperative scheduling, and lets the predicate of a
//! nested loop look at the statement's [`Stop`] each time it is evaluated.

use std::any::Any;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use arrow::datatypes::{DataType, Schema};
use arrow::record_batch::RecordBatch;
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::ColumnarValue;
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::coop::CooperativeExec;
use datafusion::physical_plan::joins::utils::JoinFilter;
use datafusion::physical_plan::joins::{CrossJoinExec, HashJoinExec, NestedLoopJoinExec, NestedLoopJoinExecBuilder};
use datafusion::physical_plan::unnest::UnnestExec;
use engine::Stop;

use crate::table::external;

/// The rule.
#[derive(Debug, Default)]
pub struct Interruptible;

impl PhysicalOptimizerRule for Interruptible {
    fn optimize(&self, plan: Arc<dyn ExecutionPlan>, config: &ConfigOptions) -> Result<Arc<dyn ExecutionPlan>> {
        let stop = Stop::of(config);
        plan.transform_up(|node| {
            let any = node.as_ref() as &dyn Any;
            if let Some(join) = any.downcast_ref::<NestedLoopJoinExec>()
                && let Some(filter) = join.filter()
            {
                let expr = Arc::new(Interrupted { expr: filter.expression().clone(), stop: stop.clone() });
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
