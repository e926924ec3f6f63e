//! What the API counts of itself.

use std::time::Instant;

use engine::Telemetry;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

type Labels = Vec<(&'static str, &'static str)>;

/// Metrics of all endpoints.
#[derive(Debug)]
pub(super) struct Metrics {
    requests: Family<Labels, Counter>,
    durations: Family<Labels, Histogram, fn() -> Histogram>,
    running: Gauge,
}

impl Metrics {
    pub(super) fn new(telemetry: &Telemetry) -> Self {
        // From a millisecond to half a minute.
        let histogram: fn() -> Histogram = || Histogram::new(exponential_buckets(0.001, 2.0, 16));
        Self {
            requests: telemetry.register(
                "promql_requests",
                "Requests to the Prometheus query API by endpoint and outcome",
                Family::default(),
            ),
            durations: telemetry.register(
                "promql_request_duration_seconds",
                "Time from a request's parameters to its answer",
                Family::new_with_constructor(histogram),
            ),
            running: telemetry.register(
                "promql_requests_running",
                "Requests to the Prometheus query API under way",
                Gauge::default(),
            ),
        }
    }

    /// Notes that a request begins; dropping what is returned notes its end.
    pub(super) fn begin(&self, endpoint: &'static str) -> Underway<'_> {
        self.running.inc();
        Underway { metrics: self, endpoint, outcome: "canceled", began: Instant::now() }
    }
}

/// A request that has not been answered yet. Dropped before [`Underway::end`], its client went away.
#[derive(Debug)]
pub(super) struct Underway<'m> {
    metrics: &'m Metrics,
    endpoint: &'static str,
    outcome: &'static str,
    began: Instant,
}

impl Underway<'_> {
    /// Notes how the request ended: `success` or an error type.
    pub(super) fn end(mut self, outcome: &'static str) {
        self.outcome = outcome;
    }
}

impl Drop for Underway<'_> {
    fn drop(&mut self) {
        let Self { metrics, endpoint, outcome, began } = self;
        metrics.running.dec();
        metrics.requests.get_or_create(&vec![("endpoint", *endpoint), ("outcome", *outcome)]).inc();
        metrics.durations.get_or_create(&vec![("endpoint", *endpoint)]).observe(began.elapsed().as_secs_f64());
    }
}
