//! What the process says of itself: counters, gauges and histograms in Prometheus naming.

use std::fmt::Debug;

use parking_lot::Mutex;
use prometheus_client::registry::{Metric, Registry};

/// The registry of self-metrics. Whoever owns a metric makes it, registers it here once and keeps a clone.
#[derive(Debug)]
pub struct Telemetry(Mutex<Registry>);

impl Default for Telemetry {
    fn default() -> Self {
        Self(Mutex::new(Registry::with_prefix("thalweg")))
    }
}

impl Telemetry {
    /// Registers a metric under `thalweg_<name>` (counters get `_total` appended) and hands it back.
    pub fn register<M: Metric + Clone + Debug>(&self, name: &str, help: &str, metric: M) -> M {
        self.0.lock().register(name, help, metric.clone());
        metric
    }

    /// The OpenMetrics text of all metrics.
    pub fn encode(&self) -> String {
        let mut out = String::new();
        // Writing into a String does not fail.
        let _ = prometheus_client::encoding::text::encode(&mut out, &self.0.lock());
        out
    }
}
