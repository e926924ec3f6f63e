//! Metric metadata: what sources say of a metric, by metric name, the newest wins.
//!
//! Changes go through the log like rows and reach the file catalog before the log is trimmed.

use std::collections::{BTreeMap, BTreeSet};

use crate::MetricMetadata;

/// Most metrics whose metadata are kept. Each is bounded by the size of a request.
const METRICS_MAX: usize = 200_000;

/// The metadata of all metrics.
#[derive(Debug, Default)]
pub(crate) struct Metadata {
    by_metric: BTreeMap<String, MetricMetadata>,
    /// Metrics whose metadata are in the log only.
    logged: BTreeSet<String>,
    /// Position of the first log record that holds one of them.
    first_position: Option<u64>,
    /// Whether metrics have been left out at the limit.
    full: bool,
}

impl Metadata {
    /// From the file catalog's rows; what can't be read is left out.
    pub(crate) fn new(rows: &[(String, String)]) -> Self {
        let mut out = Self::default();
        for (metric, json) in rows {
            match serde_json::from_str(json) {
                Ok(m) => {
                    out.by_metric.insert(metric.clone(), m);
                }
                Err(e) => tracing::warn!(metric, error = %e, "metric metadata in the file catalog can't be read"),
            }
        }
        out
    }

    /// Those that say something new; `refused` is called for each that is left out at the limit.
    pub(crate) fn news(&mut self, metadata: &[MetricMetadata], mut refused: impl FnMut()) -> Vec<MetricMetadata> {
        let mut out: Vec<MetricMetadata> = vec![];
        // Of what a request says of one metric the last counts: an earlier one must not be news when that is known.
        let newest: BTreeMap<&str, &MetricMetadata> = metadata.iter().map(|m| (m.metric.as_str(), m)).collect();
        for m in newest.into_values() {
            match self.by_metric.get(&m.metric) {
                Some(known) if known == m => {}
                None if self.by_metric.len() >= METRICS_MAX => {
                    if !std::mem::replace(&mut self.full, true) {
                        tracing::warn!(
                            limit = METRICS_MAX,
                            "limit of metrics with metadata reached; more are left out"
                        );
                    }
                    refused();
                }
                _ => out.push(m.clone()),
            }
        }
        out
    }

    /// Takes what a durable record at this position says.
    pub(crate) fn apply(&mut self, metadata: &[MetricMetadata], position: u64) {
        for m in metadata {
            self.logged.insert(m.metric.clone());
            self.by_metric.insert(m.metric.clone(), m.clone());
        }
        if !metadata.is_empty() {
            self.first_position.get_or_insert(position);
        }
    }

    /// Position of the first log record that must be kept for it.
    pub(crate) fn first_position(&self) -> Option<u64> {
        self.first_position
    }

    /// What the file catalog does not know yet, as its rows.
    pub(crate) fn unsaved(&self) -> Vec<(String, String)> {
        let rows = self.logged.iter().filter_map(|metric| self.by_metric.get(metric));
        // Plain texts always encode.
        rows.map(|m| (m.metric.clone(), serde_json::to_string(m).unwrap_or_default())).collect()
    }

    /// Notes that these rows of [`Metadata::unsaved`] are in the file catalog. `position` is where the log stood when
    /// they were taken.
    pub(crate) fn saved(&mut self, rows: &[(String, String)], position: u64) {
        for (metric, json) in rows {
            let current = self.by_metric.get(metric).and_then(|m| serde_json::to_string(m).ok());
            if current.as_ref() == Some(json) {
                self.logged.remove(metric);
            }
        }
        self.first_position = if self.logged.is_empty() { None } else { Some(position) };
    }

    /// Metadata by metric name; all when `None`.
    pub(crate) fn get(&self, metric: Option<&str>) -> Vec<MetricMetadata> {
        match metric {
            Some(metric) => self.by_metric.get(metric).cloned().into_iter().collect(),
            None => self.by_metric.values().cloned().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn help(metric: &str, help: &str) -> MetricMetadata {
        let (metric, kind, help) = (metric.to_owned(), "gauge".to_owned(), help.to_owned());
        MetricMetadata { metric, kind, help, unit: String::new() }
    }

    #[test]
    fn the_newest_wins_and_pins_the_log_until_saved() {
        let mut metadata = Metadata::default();
        assert_eq!(metadata.news(&[help("a", "1")], || {}), [help("a", "1")]);
        metadata.apply(&[help("a", "1"), help("b", "1")], 10);
        assert!(metadata.news(&[help("a", "1")], || {}).is_empty());
        assert!(metadata.news(&[help("a", "0"), help("a", "1")], || {}).is_empty(), "a request sent again");
        let rows = metadata.unsaved();
        metadata.apply(&[help("a", "2")], 20);
        metadata.saved(&rows, 15);
        assert_eq!((metadata.unsaved().len(), metadata.first_position()), (1, Some(15)));
        let rows = metadata.unsaved();
        metadata.saved(&rows, 30);
        assert_eq!((metadata.unsaved().len(), metadata.first_position()), (0, None));
        assert_eq!(metadata.get(Some("a")), [help("a", "2")]);
        assert_eq!(metadata.get(None).len(), 2);
        let again = Metadata::new(&rows);
        assert_eq!(again.get(None), [help("a", "2")]);
    }
}
