//! SQL: text to logical plans, the tables and functions that it sees, and the endpoints that speak it.
//!
//! [`Frontend`] is made once from an [`engine::Engine`]; each connection has a [`Session`] of its own. [`plan`] turns
//! text into a plan, which [`engine::Engine::execute`] runs. [`pg::serve`] speaks the PostgreSQL protocol and
//! [`http::routes`] answers `POST /api/v1/sql`. [`tags`] is why a predicate or a grouping on a tag costs what it does
//! on an integer.
//!
//! Nothing here writes: no statement may change data, or open a file or a URL, but for `COPY ... TO` of an administrator
//! ([`export`]).

pub mod bounded;
pub mod by_series;
pub mod catalog_tables;
pub mod error;
pub mod export;
pub mod flight;
pub mod format;
pub mod functions;
pub mod http;
pub mod interrupt;
pub mod limits;
pub mod pg;
pub mod rules;
pub mod scan;
pub mod schema;
pub mod session;
pub mod statement;
pub mod table;
pub mod tags;
pub mod variables;
pub mod views;

pub use error::SqlError;
pub use session::{Frontend, Session, plan};

/// What SQL adds to every session of an engine; hand it to [`engine::Engine::open`].
pub fn extensions() -> engine::Extensions {
    engine::Extensions {
        planners: vec![std::sync::Arc::new(functions::gapfill::GapFillPlanner)],
        optimizer_rules: vec![std::sync::Arc::new(tags::TagColumns)],
        ..Default::default()
    }
}

#[cfg(test)]
mod tests;
