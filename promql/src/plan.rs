//! From text to a logical plan of our extension nodes.
//!
//! A plan is a tree of [`Node`]s: an [`Op`], the evaluation grid of its output, and inputs. `build` has the one match over
//! the syntax tree; [`ops`] says what each operation is. Types are known here: the inputs of a node are of the type that
//! its operation needs, a scalar being a row without labels that has a value at every step.

mod build;
mod duration;
pub mod ops;
pub mod source;

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use datafusion::common::{DFSchema, DFSchemaRef};
use datafusion::error::Result as DfResult;
use datafusion::logical_expr::{Expr as DfExpr, Extension, LogicalPlan, UserDefinedLogicalNodeCore};

use crate::options::{EvalOptions, Features, Grid};
use crate::parse::Position;
use crate::parse::ast::Expr;
use crate::result::ValueType;
use crate::{QueryError, Result, block};
use ops::{Op, Place};

/// A plan and what its output means.
#[derive(Debug, Clone)]
pub struct Planned {
    /// The plan; for a text literal there is none.
    pub plan: Option<LogicalPlan>,
    /// The text of a text literal.
    pub text: Option<String>,
    /// Type of the expression.
    pub value_type: ValueType,
    /// The times that the plan's output is for. Differs from the query's own for a subquery as the result.
    pub grid: Grid,
    /// What planning has to warn of, and where.
    pub warnings: Vec<(Position, String)>,
}

/// Plans a text.
///
/// # Errors
/// `BadData` when it is not PromQL.
pub fn plan(text: &str, options: &EvalOptions) -> Result<Planned> {
    build::plan(text, &parse(text, &options.features)?, options)
}

/// Parses a text.
///
/// # Errors
/// `BadData` when it is not PromQL, or nested deeper than [`crate::parse::DEPTH_MAX`].
pub fn parse(text: &str, features: &Features) -> Result<Expr> {
    crate::parse::parse(text, features).map_err(|e| QueryError::bad_data(e.describe(text)))
}

/// One operation of PromQL in a logical plan.
#[derive(Debug, Clone)]
pub struct Node {
    /// What it does.
    pub op: Op,
    /// The times of its output.
    pub grid: Grid,
    /// What its notes are about.
    pub place: Place,
    /// Its inputs.
    pub inputs: Vec<LogicalPlan>,
    schema: DFSchemaRef,
}

impl Node {
    /// A node.
    ///
    /// # Errors
    /// None that valid input can cause.
    pub fn try_new(op: Op, grid: Grid, place: Place, inputs: Vec<LogicalPlan>) -> DfResult<Self> {
        let schema = match op {
            Op::Samples(_) => crate::exec::runs_schema(),
            _ => block::schema(grid.steps()),
        };
        let schema = Arc::new(DFSchema::try_from(schema)?);
        Ok(Self { op, grid, place, inputs, schema })
    }

    /// It as a plan.
    pub fn into_plan(self) -> LogicalPlan {
        LogicalPlan::Extension(Extension { node: Arc::new(self) })
    }

    fn key(&self) -> (&Op, &Grid, &Place, &Vec<LogicalPlan>) {
        (&self.op, &self.grid, &self.place, &self.inputs)
    }
}

impl PartialEq for Node {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Node {}

impl Hash for Node {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

impl PartialOrd for Node {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        self.key().partial_cmp(&other.key())
    }
}

impl UserDefinedLogicalNodeCore for Node {
    fn name(&self) -> &str {
        self.op.name()
    }

    fn inputs(&self) -> Vec<&LogicalPlan> {
        self.inputs.iter().collect()
    }

    fn schema(&self) -> &DFSchemaRef {
        &self.schema
    }

    fn expressions(&self) -> Vec<DfExpr> {
        vec![]
    }

    fn fmt_for_explain(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.op.explain(&self.grid, f)
    }

    fn with_exprs_and_inputs(&self, _exprs: Vec<DfExpr>, inputs: Vec<LogicalPlan>) -> DfResult<Self> {
        Ok(Self { op: self.op.clone(), grid: self.grid, place: self.place, inputs, schema: self.schema.clone() })
    }
}

#[cfg(test)]
mod tests;
