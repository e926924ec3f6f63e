//! DataFusion sessions: what languages add to them, and running their plans within limits.

use std::sync::Arc;
use std::time::Duration;

use catalog::{Error, ErrorKind};
use datafusion::error::DataFusionError;
use datafusion::physical_planner::ExtensionPlanner;

/// What a query language adds to every session: planners for its logical nodes (functions and rules join as needed).
#[derive(Default, Clone)]
pub struct Extensions {
    /// Turn extension nodes into physical nodes.
    pub planners: Vec<Arc<dyn ExtensionPlanner + Send + Sync>>,
    /// Scalar functions.
    pub functions: Vec<Arc<datafusion::logical_expr::ScalarUDF>>,
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
        self.optimizer_rules.extend(other.optimizer_rules);
        self
    }
}

/// The limits of one query.
#[derive(Debug, Clone, Copy)]
pub struct QueryLimits {
    /// It fails with kind `Timeout` after this long.
    pub timeout: Duration,
}

/// The product's error inside a DataFusion error, or one made from it. Errors of ours travel through plans as
/// `DataFusionError::External`.
pub fn error_of(e: DataFusionError) -> Error {
    match e {
        DataFusionError::External(inner) => match inner.downcast::<Error>() {
            Ok(e) => *e,
            Err(inner) => Error::internal("query failed").with_source(inner),
        },
        DataFusionError::Context(_, inner) => error_of(*inner),
        DataFusionError::ArrowError(inner, _) => match *inner {
            arrow::error::ArrowError::ExternalError(inner) => match inner.downcast::<Error>() {
                Ok(e) => *e,
                Err(inner) => match inner.downcast::<DataFusionError>() {
                    Ok(e) => error_of(*e),
                    Err(inner) => Error::internal("query failed").with_source(inner),
                },
            },
            other => Error::internal("query failed").with_source(other),
        },
        DataFusionError::Shared(inner) => match inner.as_ref() {
            DataFusionError::External(e) => match e.downcast_ref::<Error>() {
                Some(e) => Error::new(e.kind(), e.message()),
                None => Error::internal(inner.to_string()),
            },
            _ => Error::internal(inner.to_string()),
        },
        DataFusionError::ResourcesExhausted(m) => Error::limit_exceeded(m),
        e @ (DataFusionError::Plan(_)
        | DataFusionError::SQL(..)
        | DataFusionError::SchemaError(..)
        | DataFusionError::NotImplemented(_)) => Error::new(ErrorKind::Invalid, e.strip_backtrace()),
        other => Error::internal("query failed").with_source(other),
    }
}
