//! The engine's handle: opening, writing, selecting, executing, stopping.

use std::sync::Arc;
use std::time::Duration;

use catalog::{Clock, Registry, Result, Series};
use datafusion::execution::{SendableRecordBatchStream, SessionState};
use datafusion::logical_expr::LogicalPlan;
use datafusion::prelude::SessionContext;
use object_store::ObjectStore;

use crate::{Extensions, MetricMetadata, QueryLimits, Selection, SeriesSet, Settings, Telemetry, Write};

/// The objects that an engine works with; never mixed with [`Settings`].
#[derive(Debug, Clone)]
pub struct Components {
    /// Where segments and tag parts live.
    pub store: Arc<dyn ObjectStore>,
    /// Wall-clock time.
    pub clock: Arc<dyn Clock>,
    /// Self-metrics.
    pub telemetry: Arc<Telemetry>,
}

/// The handle of one database; cheap to clone.
#[derive(Debug, Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    settings: Settings,
    components: Components,
    registry: Arc<Registry>,
}

impl Engine {
    /// Opens or creates the database: loads the file catalog, replays the log, starts the committer, the flusher and
    /// the compactor.
    ///
    /// # Errors
    /// `Corrupt` for damaged files, `Unavailable` when store or catalog can't be reached.
    pub async fn open(settings: Settings, components: Components, extensions: Extensions) -> Result<Self> {
        let _ = (settings, components, extensions);
        todo!("open")
    }

    /// The settings it was opened with.
    pub fn settings(&self) -> &Settings {
        &self.inner.settings
    }

    /// Wall-clock time, milliseconds since the epoch.
    pub fn now_ms(&self) -> i64 {
        self.inner.components.clock.now_ms()
    }

    /// Self-metrics.
    pub fn telemetry(&self) -> &Arc<Telemetry> {
        &self.inner.components.telemetry
    }

    /// The active tag sets; receivers take their encoder from it.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.inner.registry
    }

    /// Stores a request's accepted part: whole or not at all, durable and visible to the next query when this returns.
    ///
    /// # Errors
    /// `Unavailable` for any temporary condition (stopping, disk full, overload); nothing is stored then.
    pub async fn write(&self, write: Write) -> Result<()> {
        let _ = write;
        todo!("write")
    }

    /// Resolves matchers to the series that can have rows in a time range, against the present version of the data.
    ///
    /// # Errors
    /// `LimitExceeded` when more series match than a query may touch; storage errors.
    pub async fn select(&self, selection: &Selection) -> Result<Arc<SeriesSet>> {
        let _ = selection;
        todo!("select")
    }

    /// Calls `visit` once for each distinct tag set that [`Engine::select`] would return, in no order, without
    /// collecting them. `visit` returns false to stop.
    ///
    /// # Errors
    /// Storage errors.
    pub async fn visit(&self, selection: &Selection, visit: impl FnMut(&Arc<Series>) -> bool + Send) -> Result<()> {
        let _ = (selection, visit);
        todo!("visit")
    }

    /// Metric metadata by metric name; all when `metric` is `None`.
    pub fn metadata(&self, metric: Option<&str>) -> Vec<MetricMetadata> {
        let _ = metric;
        todo!("metadata")
    }

    /// A fresh session with the extensions of all languages. State set on it (variables, prepared statements) is its
    /// own.
    pub fn session(&self) -> SessionContext {
        todo!("session")
    }

    /// Optimises, plans and runs a logical plan on the CPU runtime. Dropping the stream stops the work.
    ///
    /// # Errors
    /// Planning errors as DataFusion errors; see [`crate::error_of`]. The stream itself ends with an error of kind
    /// `Timeout` at the deadline.
    pub async fn execute(
        &self,
        state: &SessionState,
        plan: LogicalPlan,
        limits: QueryLimits,
    ) -> datafusion::error::Result<SendableRecordBatchStream> {
        let _ = (state, plan, limits);
        todo!("execute")
    }

    /// Runs CPU-heavy work off the network runtime; dropped when the caller goes away.
    pub async fn compute<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let _ = work;
        todo!("compute")
    }

    /// Writes everything in memory to segments and commits them; returns when done.
    ///
    /// # Errors
    /// Storage errors; nothing is lost then.
    pub async fn flush(&self) -> Result<()> {
        todo!("flush")
    }

    /// Compacts until nothing is left to do; returns when done.
    ///
    /// # Errors
    /// Storage errors; nothing is lost then.
    pub async fn compact(&self) -> Result<()> {
        todo!("compact")
    }

    /// Refuses further writes, flushes what fits within `flush_within` and stops all tasks. What was not flushed is
    /// in the synced log.
    ///
    /// # Errors
    /// Storage errors of the last flush.
    pub async fn shutdown(&self, flush_within: Duration) -> Result<()> {
        let _ = flush_within;
        todo!("shutdown")
    }
}
