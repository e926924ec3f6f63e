//! Planning that can be stopped, and that gives up what grows.
//!
//! Planning never waits, so nothing can drop it. Every rule of the analyzer and of the optimizers therefore looks at the
//! statement's [`Stop`] before each application, and an expression that rules copied into itself until it is larger than
//! any text is refused.

use std::sync::Arc;

use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::error::Result;
use datafusion::execution::{FunctionRegistry, SessionState, SessionStateBuilder};
use datafusion::logical_expr::{Expr, LogicalPlan};
use datafusion::optimizer::optimizer::ApplyOrder;
use datafusion::optimizer::{AnalyzerRule, OptimizerConfig, OptimizerRule};
use datafusion::physical_optimizer::{PhysicalOptimizerContext, PhysicalOptimizerRule};
use datafusion::physical_plan::ExecutionPlan;
use engine::{Error, Stop};

use crate::bounded::scalar_bytes;
use crate::table::external;

/// Most parts of the expressions of one node of a plan; the longest text has fewer.
const EXPRESSION_PARTS_MAX: usize = 1 << 19;

/// Longest constant that is written out for each row of a batch: a batch of them is as large as one result may be.
const CONSTANT_BYTES_MAX: u64 = 8 << 10;

/// `state` with all its rules watched.
///
/// # Errors
/// Those of registering what the state had registered before.
pub fn watched(state: SessionState) -> Result<SessionState> {
    let analyzers: Vec<Arc<dyn AnalyzerRule + Send + Sync>> =
        state.analyzer().rules.iter().map(|r| Arc::new(Watched(r.clone())) as _).collect();
    let logical: Vec<Arc<dyn OptimizerRule + Send + Sync>> =
        state.optimizers().iter().map(|r| Arc::new(Watched(r.clone())) as _).collect();
    let physical: Vec<Arc<dyn PhysicalOptimizerRule + Send + Sync>> =
        state.physical_optimizers().iter().map(|r| Arc::new(Watched(r.clone())) as _).collect();
    let rewrites = state.analyzer().function_rewrites().to_vec();
    let mut state = SessionStateBuilder::new_from_existing(state)
        .with_analyzer_rules(analyzers)
        .with_optimizer_rules(logical)
        .with_physical_optimizer_rules(physical)
        .build();
    rewrites.into_iter().try_for_each(|r| state.register_function_rewrite(r))?;
    Ok(state)
}

/// A rule that fails once the statement is to stop.
#[derive(Debug)]
struct Watched<R: ?Sized>(Arc<R>);

/// # Errors
/// Once the statement with this configuration is to stop.
pub fn check(config: &ConfigOptions) -> Result<()> {
    Stop::of(config).check().map_err(external)
}

impl AnalyzerRule for Watched<dyn AnalyzerRule + Send + Sync> {
    fn analyze(&self, plan: LogicalPlan, config: &ConfigOptions) -> Result<LogicalPlan> {
        check(config)?;
        self.0.analyze(plan, config)
    }

    fn name(&self) -> &str {
        self.0.name()
    }
}

impl OptimizerRule for Watched<dyn OptimizerRule + Send + Sync> {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn apply_order(&self) -> Option<ApplyOrder> {
        self.0.apply_order()
    }

    fn rewrite(&self, plan: LogicalPlan, config: &dyn OptimizerConfig) -> Result<Transformed<LogicalPlan>> {
        check(&config.options())?;
        let rewritten = self.0.rewrite(plan, config)?;
        if rewritten.transformed {
            // What was pushed down is in the inputs now.
            let mut parts = 0;
            count_parts(&rewritten.data, &mut parts)?;
            rewritten.data.inputs().into_iter().try_for_each(|input| count_parts(input, &mut parts))?;
        }
        Ok(rewritten)
    }
}

fn count_parts(node: &LogicalPlan, parts: &mut usize) -> Result<()> {
    check_constants(node)?;
    node.apply_expressions(|expr| {
        expr.apply(|_| {
            *parts += 1;
            if *parts <= EXPRESSION_PARTS_MAX {
                return Ok(TreeNodeRecursion::Continue);
            }
            let message = format!("an expression has more than {EXPRESSION_PARTS_MAX} parts once names are resolved");
            Err(external(Error::limit_exceeded(message)))
        })
    })
    .map(drop)
}

/// Refuses a long constant that would be written out for each of many rows.
///
/// # Errors
/// For a projection of such a constant.
pub fn check_constants(node: &LogicalPlan) -> Result<()> {
    let LogicalPlan::Projection(projection) = node else { return Ok(()) };
    if matches!(projection.input.as_ref(), LogicalPlan::EmptyRelation(_)) {
        return Ok(());
    }
    projection.expr.iter().try_for_each(check_constant)
}

fn check_constant(expr: &Expr) -> Result<()> {
    match expr {
        Expr::Alias(alias) => check_constant(&alias.expr),
        Expr::Case(case) => {
            case.when_then_expr.iter().map(|(_, then)| then).chain(&case.else_expr).try_for_each(|b| check_constant(b))
        }
        Expr::Literal(value, _) if scalar_bytes(value) > CONSTANT_BYTES_MAX => {
            let message = format!(
                "a constant of {} bytes for each row of a table is too long; {CONSTANT_BYTES_MAX} are allowed",
                scalar_bytes(value)
            );
            Err(external(Error::limit_exceeded(message)))
        }
        _ => Ok(()),
    }
}

impl PhysicalOptimizerRule for Watched<dyn PhysicalOptimizerRule + Send + Sync> {
    fn optimize(&self, plan: Arc<dyn ExecutionPlan>, config: &ConfigOptions) -> Result<Arc<dyn ExecutionPlan>> {
        check(config)?;
        self.0.optimize(plan, config)
    }

    fn optimize_with_context(
        &self,
        plan: Arc<dyn ExecutionPlan>,
        context: &dyn PhysicalOptimizerContext,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        check(context.config_options())?;
        self.0.optimize_with_context(plan, context)
    }

    fn name(&self) -> &str {
        self.0.name()
    }

    fn schema_check(&self) -> bool {
        self.0.schema_check()
    }
}
