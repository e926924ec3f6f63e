//! What a query says besides its result, in Prometheus's words: warnings, infos, and what it has used.
//!
//! A note is a text and a place. Equal texts are told once, with their last place.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use chrono::DateTime;
use hashbrown::HashMap;
use parking_lot::Mutex;

use super::topk::go_exponent;
use crate::QueryError;
use crate::parse::{Position, go};
use crate::plan::ops::Counts;

/// Notes of a kind that an answer shows.
const SHOWN_MAX: usize = 10;
/// Notes of a kind that are kept.
const KEPT_MAX: usize = 1000;

/// What a query says besides its result, and what it has used.
#[derive(Debug, Default)]
pub struct Notes {
    warnings: Mutex<HashMap<String, Position>>,
    infos: Mutex<HashMap<String, Position>>,
    forced: Mutex<HashMap<String, (Position, Forced)>>,
    /// Of metrics whose counters began before the sample before: where, and how often.
    overlapping: Mutex<HashMap<String, (Position, u64)>>,
    /// Samples read.
    pub samples: AtomicU64,
    /// Series selected.
    pub series: AtomicU64,
    held: AtomicUsize,
    limit: AtomicUsize,
    /// Samples that selectors looked at, by step; only when that is asked for.
    looked_at: Option<Mutex<Vec<u64>>>,
}

/// How buckets had to be changed for their counts to grow with their bounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Forced {
    /// First and last evaluation time, milliseconds since the epoch.
    pub(super) times: (i64, i64),
    /// Least and greatest bound that was changed.
    pub(super) bounds: (f64, f64),
    /// The greatest change.
    pub(super) difference: f64,
    /// How often.
    pub(super) count: u64,
}

impl Forced {
    pub(super) fn and(self, other: Self) -> Self {
        Self {
            times: (self.times.0.min(other.times.0), self.times.1.max(other.times.1)),
            bounds: (self.bounds.0.min(other.bounds.0), self.bounds.1.max(other.bounds.1)),
            difference: self.difference.max(other.difference),
            count: self.count + other.count,
        }
    }
}

impl Notes {
    /// For a query that may hold this many samples.
    pub fn new(limit: usize) -> Self {
        Self { limit: AtomicUsize::new(limit), ..Self::default() }
    }

    /// The same, which counts what selectors look at in each of so many steps.
    #[must_use]
    pub fn counting(self, steps: usize) -> Self {
        Self { looked_at: Some(Mutex::new(vec![0; steps])), ..self }
    }

    /// Whether [`Notes::count`] does anything.
    pub(super) fn counts(&self) -> bool {
        self.looked_at.is_some()
    }

    /// Counts samples that a selector looked at, in its steps.
    pub(super) fn count(&self, counts: Counts, of_steps: &[u64]) {
        let Some(looked_at) = &self.looked_at else { return };
        let (mut all, total) = (looked_at.lock(), of_steps.iter().sum::<u64>());
        match counts {
            Counts::Steps => all.iter_mut().zip(of_steps).for_each(|(all, n)| *all += n),
            Counts::Every => all.iter_mut().for_each(|all| *all += total),
            Counts::Together(times) => all.iter_mut().for_each(|all| *all += total * times),
            Counts::Not => {}
        }
    }

    /// What was counted in each step.
    pub(super) fn looked_at(&self) -> Option<Vec<u64>> {
        self.looked_at.as_ref().map(|all| std::mem::take(&mut *all.lock()))
    }

    /// How many samples were held until the query ended.
    pub(super) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Adds a warning about what stands at a place.
    pub fn warn(&self, at: Position, text: impl Into<String>) {
        add(&self.warnings, at, text.into());
    }

    /// Adds an info about what stands at a place.
    pub fn info(&self, at: Position, text: impl Into<String>) {
        add(&self.infos, at, text.into());
    }

    /// Adds that buckets did not grow; `metric` is empty when its name is gone.
    pub(super) fn forced(&self, at: Position, metric: &str, seen: Forced) {
        let mut all = self.forced.lock();
        if all.len() < KEPT_MAX || all.contains_key(metric) {
            all.entry_ref(metric)
                .and_modify(|(place, known)| (*place, *known) = (at.max(*place), known.and(seen)))
                .or_insert((at, seen));
        }
    }

    /// Adds that counters of a metric, as told with their samples, began before the sample before, so many times.
    pub(super) fn overlapping(&self, at: Position, metric: &str, times: u64) {
        let mut all = self.overlapping.lock();
        if times > 0 && (all.len() < KEPT_MAX || all.contains_key(metric)) {
            let (place, count) = all.entry_ref(metric).or_insert((at, 0));
            (*place, *count) = (at.max(*place), *count + times);
        }
    }

    /// Warns of quantiles that are none.
    pub(super) fn check_quantile(&self, at: Position, q: &[f64]) {
        let mut bad: Vec<f64> = q.iter().copied().filter(|q| !(0.0..=1.0).contains(q)).collect();
        bad.dedup_by_key(|v| v.to_bits());
        for q in bad {
            self.warn(at, format!("quantile value should be between 0 and 1, got {}", go::float(q)));
        }
    }

    /// The warnings and the infos.
    pub fn take(&self) -> (Vec<String>, Vec<String>) {
        let mut infos = std::mem::take(&mut *self.infos.lock());
        for (metric, (at, seen)) in self.forced.lock().drain() {
            infos.insert(forced_text(&metric, &seen), at);
        }
        let mut warnings = std::mem::take(&mut *self.warnings.lock());
        for (metric, (at, times)) in self.overlapping.lock().drain() {
            let metric = go::quote(&metric);
            let mut text =
                format!("sample has start time that overlaps with previous sample timestamp for metric {metric}");
            if times > 1 {
                let _ = write!(text, " ({times} occurrences)");
            }
            warnings.insert(text, at);
        }
        (shown("warning", warnings), shown("info", infos))
    }

    /// Counts samples that are held in memory until the query ends.
    pub(super) fn hold(&self, samples: usize) -> Result<(), QueryError> {
        let held = self.held.fetch_add(samples, Ordering::Relaxed) + samples;
        let limit = self.limit.load(Ordering::Relaxed);
        if limit > 0 && held > limit {
            return Err(too_many_samples());
        }
        Ok(())
    }
}

/// As Prometheus words it.
pub(super) fn too_many_samples() -> QueryError {
    QueryError::execution("query processing would load too many samples into memory in query execution")
}

fn add(notes: &Mutex<HashMap<String, Position>>, at: Position, text: String) {
    let mut notes = notes.lock();
    if notes.len() < KEPT_MAX || notes.contains_key(&text) {
        notes.entry(text).and_modify(|place| *place = at.max(*place)).or_insert(at);
    }
}

/// The notes as an answer shows them, in the order of their places.
fn shown(kind: &str, notes: HashMap<String, Position>) -> Vec<String> {
    let mut notes: Vec<(Position, String)> = notes.into_iter().map(|(text, at)| (at, text)).collect();
    notes.sort();
    let omitted = notes.len().saturating_sub(SHOWN_MAX);
    let mut out: Vec<String> =
        notes.into_iter().take(SHOWN_MAX).map(|(at, text)| format!("PromQL {kind}: {text} ({at})")).collect();
    if omitted > 0 {
        out.push(format!("{omitted} more {kind} annotations omitted"));
    }
    out
}

fn forced_text(metric: &str, seen: &Forced) -> String {
    let time = |ms: i64| {
        let time = DateTime::from_timestamp_millis(ms).unwrap_or_default();
        time.format("%Y-%m-%dT%H:%M:%SZ").to_string()
    };
    let mut out = String::from(
        "input to histogram_quantile needed to be fixed for monotonicity (see https://prometheus.io/docs/prometheus/latest/querying/functions/#histogram_quantile)",
    );
    if !metric.is_empty() {
        let _ = write!(out, " for metric name {}", go::quote(metric));
    }
    let _ = write!(
        out,
        ", from buckets {} to {}, with a max diff of {}, over {} samples from {} to {}",
        go::float(seen.bounds.0),
        go::float(seen.bounds.1),
        go_exponent(seen.difference),
        seen.count,
        time(seen.times.0),
        time(seen.times.1)
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_told_once_with_their_last_place() {
        let at = |line, column| Position { line, column };
        let notes = Notes::default();
        notes.warn(at(1, 5), "b");
        notes.warn(at(2, 1), "b");
        notes.warn(at(1, 9), "a");
        for i in 0..13 {
            notes.info(at(1, i), format!("i{i}"));
        }
        let (warnings, infos) = notes.take();
        assert_eq!(warnings, ["PromQL warning: a (1:9)", "PromQL warning: b (2:1)"]);
        assert_eq!(infos.len(), 11);
        assert_eq!(infos[10], "3 more info annotations omitted");
        let one = Forced { times: (0, 0), bounds: (0.5, 0.5), difference: 1.0, count: 1 };
        notes.forced(at(1, 2), "m", one);
        notes.forced(
            at(1, 2),
            "m",
            Forced { times: (60_000, 60_000), bounds: (1.0, 1.0), difference: 12.345, count: 1 },
        );
        let (_, infos) = notes.take();
        assert!(infos[0].ends_with("for metric name \"m\", from buckets 0.5 to 1, with a max diff of 12, over 2 samples from 1970-01-01T00:00:00Z to 1970-01-01T00:01:00Z (1:2)"), "{infos:?}");
    }
}
