//! Stores batches and runs plans.
//!
//! [`Engine`] is the one cheap-to-clone handle of a database: receivers call [`Engine::write`], query languages call
//! [`Engine::select`] for the series that matchers mean, build plans over [`SeriesScanExec`], and run them with
//! [`Engine::execute`]. Inside, tags are integers.

pub mod activity;
pub mod backup;
pub mod batch;
pub mod codec;
pub mod kernels;
pub mod memory;
pub mod query;
pub mod retention;
pub mod scan;
pub mod select;
pub mod session;
pub mod settings;
pub mod telemetry;
pub mod verify;

mod arrivals;
mod committer;
mod compact;
mod cut;
mod delete;
mod engine;
mod flush;
mod layout;
mod memtable;
mod metadata;
pub mod notices;
mod orphans;
mod reserve;
mod segment;
#[cfg(test)]
mod simulation;
mod snapshot;
mod upkeep;
mod version;
mod views;
mod wal;

pub use activity::{Activities, Activity, Description};
pub use arrivals::Arrival;
pub use batch::{Batch, MetricMetadata, Write};
pub use catalog::{Error, ErrorKind, Result, View};
pub use engine::{Components, Engine, InMemory, sql_catalog};
pub use memory::{Memory, Reservation};
pub use notices::{Notice, Notices};
pub use query::{Guard, Pace, Query, QueryLimits, Stop};
pub use retention::{Retention, RetentionRule};
pub use scan::SeriesScanExec;
pub use scan::count::SeriesCountExec;
pub use select::{Selection, SeriesSet};
pub use session::{Extensions, error_of};
pub use settings::{ListedSetting, LogStore, Settings, SqlCatalog};
pub use snapshot::{Snapshot, TooOld};
pub use telemetry::Telemetry;
