//! PromQL: text to logical plans, the plan nodes that it needs, and the Prometheus HTTP API.
//!
//! [`plan`] turns a text into a DataFusion plan of our extension nodes; [`query`] runs it. Values travel as *blocks*:
//! one row per series, one dense array of steps with validity. Labels are canonical tag sets ([`catalog::tag`]).

pub mod api;
pub mod block;
pub mod error;
pub mod labels;
pub mod options;
pub mod result;

pub use error::{QueryError, QueryErrorKind, Result};
pub use options::{EvalOptions, Features, Grid};
pub use result::{Block, Data, QueryResult, Run, SeriesView, Stats, ValueType};

use engine::{Engine, Extensions};

/// Evaluates a text.
///
/// # Errors
/// `BadData` when it is not PromQL, `Execution` when the data do not allow it, `Timeout` at the deadline.
pub async fn query(engine: &Engine, text: &str, options: &EvalOptions) -> Result<QueryResult> {
    let _ = (engine, text, options);
    Err(QueryError::internal("not available yet"))
}

/// The planner of the nodes that plans of this language hold.
pub fn extensions() -> Extensions {
    Extensions::default()
}
