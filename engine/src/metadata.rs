//! Metric metadata: what sources say of a metric, by metric name, the newest wins.
//!
//! Changes go through the log like rows and reach the file catalog before the log is trimmed.

use std::collections::{BTreeMap, BTreeSet};

use crate::MetricMetadata;

/// Most metrics whose metadata are kept.
const METRICS_MAX: usize = 200_000;

/// What an entry takes in memory beside its texts.
const ENTRY_BYTES: usize = 256;

/// About what a metric's metadata take in memory.
pub(crate) fn bytes_of(m: &MetricMetadata) -> usize {
    // The name is a key as well.
    2 * m.metric.len() + m.kind.len() + m.help.len() + m.unit.len() + ENTRY_BYTES
}

/// The metadata of all metrics.
#[derive(Debug)]
pub(crate) struct Metadata {
    by_metric: BTreeMap<String, MetricMetadata>,
    /// What they take.
    bytes: usize,
    /// What they may take: they stay, so a sender must not fill the memory with them.
    bytes_max: usize,
    /// Metrics whose metadata are in the log only.
    logged: BTreeSet<String>,
    /// Position of the first log record that holds one of them.
    first_position: Option<u64>,
    /// Whether metrics have been left out at the limit.
    full: bool,
}

impl Metadata {
    /// From the file catalog's rows; what can't be read is left out. New ones are taken until all take `bytes_max`.
    pub(crate) fn new(rows: &[(String, String)], bytes_max: usize) -> Self {
        let (by_metric, logged) = (BTreeMap::new(), BTreeSet::new());
        let mut out = Self { by_metric, bytes: 0, bytes_max, logged, first_position: None, full: false };
        for (metric, json) in rows {
            match serde_json::from_str(json) {
                Ok(m) => out.insert(MetricMetadata { metric: metric.clone(), ..m }),
                Err(e) => tracing::warn!(metric, error = %e, "metric metadata in the file catalog can't be read"),
            }
        }
        out
    }

    fn insert(&mut self, m: MetricMetadata) {
        self.bytes += bytes_of(&m);
        if let Some(before) = self.by_metric.insert(m.metric.clone(), m) {
            self.bytes -= bytes_of(&before);
        }
    }

    /// What they take in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Those that say something new; `refused` is called for each that is left out at the limit.
    pub(crate) fn news(&mut self, metadata: &[MetricMetadata], mut refused: impl FnMut()) -> Vec<MetricMetadata> {
        let mut out: Vec<MetricMetadata> = vec![];
        // Of what a request says of one metric the last counts: an earlier one must not be news when that is known.
        let newest: BTreeMap<&str, &MetricMetadata> = metadata.iter().map(|m| (m.metric.as_str(), m)).collect();
        let (mut metrics, mut bytes) = (self.by_metric.len(), self.bytes);
        for m in newest.into_values() {
            let known = self.by_metric.get(&m.metric);
            if known == Some(m) {
                continue;
            }
            let with = (metrics + usize::from(known.is_none()), bytes + bytes_of(m) - known.map_or(0, bytes_of));
            // What takes no more than before always finds its place.
            if with.0 > METRICS_MAX && known.is_none() || with.1 > self.bytes_max && with.1 > bytes {
                if !std::mem::replace(&mut self.full, true) {
                    tracing::warn!(
                        metrics = METRICS_MAX,
                        bytes = self.bytes_max,
                        "limit of metric metadata reached; more are left out"
                    );
                }
                refused();
                continue;
            }
            (metrics, bytes) = with;
            out.push(m.clone());
        }
        out
    }

    /// Takes what a durable record at this position says.
    pub(crate) fn apply(&mut self, metadata: &[MetricMetadata], position: u64) {
        for m in metadata {
            self.logged.insert(m.metric.clone());
            self.insert(m.clone());
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
        let mut metadata = Metadata::new(&[], 1 << 20);
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
        let again = Metadata::new(&rows, 1 << 20);
        assert_eq!(again.get(None), [help("a", "2")]);
        assert_eq!(again.bytes(), bytes_of(&help("a", "2")));
    }

    #[test]
    fn all_together_take_so_much_memory_at_most() {
        const MAX: usize = 64 << 10;
        let mut metadata = Metadata::new(&[], MAX);
        let long = "x".repeat(1000);
        let many: Vec<_> = (0..100).map(|i| help(&format!("m{i:03}"), &long)).collect();
        let mut refused = 0;
        for half in many.chunks(50) {
            let news = metadata.news(half, || refused += 1);
            metadata.apply(&news, 1);
        }
        let kept = metadata.get(None).len();
        assert_eq!(kept + refused, 100);
        assert!(kept > 40 && metadata.bytes() <= MAX, "{kept} take {} bytes", metadata.bytes());
        // A new text of a known metric counts by what it adds.
        assert!(metadata.news(&[help("m000", &long.repeat(20))], || {}).is_empty());
        assert!(metadata.news(&[help("new", &long)], || {}).is_empty());
        let news = metadata.news(&[help("m000", "short")], || {});
        metadata.apply(&news, 2);
        assert_eq!(metadata.news(&[help("m001", &format!("{long}y"))], || {}).len(), 1);
        let sum: usize = metadata.get(None).iter().map(bytes_of).sum();
        assert_eq!(metadata.bytes(), sum);
        // What the catalog holds is never lost, whatever the limit was.
        let again = Metadata::new(&metadata.unsaved(), 1);
        assert_eq!(again.get(None), metadata.get(None));
    }
}
