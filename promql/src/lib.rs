//! PromQL: text to logical plans, the plan nodes that it needs, and the Prometheus HTTP API.
//!
//! [`plan()`] turns a text into a DataFusion plan of our extension nodes; [`query`] runs it. Values travel as *blocks*:
//! one row per series, one dense array of steps with validity. Labels are canonical tag sets ([`catalog::tag`]).

pub mod api;
pub mod block;
pub mod chunk;
pub mod codec;
pub mod error;
pub mod exec;
pub mod histogram;
pub mod labels;
pub mod options;
pub mod parse;
pub mod plan;
pub mod result;
mod table_function;

use std::sync::Arc;

use engine::Extensions;

pub use error::{QueryError, QueryErrorKind, Result};
pub use exec::query;
pub use options::{EvalOptions, Features, Grid, Limits, Settings};
pub use plan::plan;
pub use result::{Block, Data, QueryResult, Run, SeriesView, Stats, ValueType};

/// The planner of the nodes that plans of this language hold, and `promql()` for SQL. Sessions that plan them carry an
/// `Arc<Engine>` as a config extension.
pub fn extensions(settings: Settings) -> Extensions {
    Extensions {
        planners: vec![Arc::new(exec::Planner)],
        table_functions: vec![("promql", Arc::new(table_function::Promql(settings)))],
        ..Extensions::default()
    }
}
