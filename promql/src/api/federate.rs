//! `/federate`: the newest sample of every series that any `match[]` selects, as the text that a Prometheus scrapes.
//!
//! As in Prometheus a series counts that has a sample within the lookback and was not marked as ended, samples carry their
//! own times, and a series without the label `instance` gets an empty one, so that the scraper does not put its own there.
//! Text has no native histograms; of each its count and sum are given, as of a classic histogram with one bucket.

use std::sync::Arc;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use catalog::tag::METRIC_NAME;
use datafusion::execution::memory_pool::MemoryReservation;

use super::params::{Form, invalid};
use super::raw::{self, Asked, Sink};
use super::reply::error_type;
use super::{Api, json};
use crate::chunk::{Counts, Histogram, Points, STALE};
use crate::error::Result;
use crate::labels::Pairs;

/// `GET /federate`. Errors are plain text.
pub(super) async fn federate(State(api): State<Arc<Api>>, headers: HeaderMap, form: Form) -> Response {
    let accepted = headers.get_all(ACCEPT).iter().filter_map(|v| v.to_str().ok());
    let utf8 = accepted.flat_map(|v| v.split(',')).any(|range| {
        let mut parts = range.split(';').map(str::trim);
        parts.next() == Some("text/plain") && parts.any(|p| p == "escaping=allow-utf-8")
    });
    let names = if utf8 { Names::Quoted } else { Names::Underscores };
    let work = {
        let api = api.clone();
        async move { text(&api, &form, names).await }
    };
    let underway = api.metrics.begin("federate");
    let result = api.engine.run(work).await;
    underway.end(result.as_ref().map_or_else(|e| error_type(e.kind).0, |_| "success"));
    match result {
        Ok(text) => ([(CONTENT_TYPE, names.content_type())], text).into_response(),
        Err(e) => (error_type(e.kind).1, format!("{e}\n")).into_response(),
    }
}

async fn text(api: &Api, form: &Form, names: Names) -> Result<Vec<u8>> {
    let selectors = form.selectors().map_err(|e| invalid("match[]", e))?;
    let end_ms = api.engine.now_ms();
    let start_ms = end_ms.saturating_sub(api.settings.lookback_ms).saturating_add(1);
    let asked = Asked { selectors, start_ms, end_ms, labels_only: false };
    let mut newest = Newest::new(names, raw::reservation(api, "federation"));
    raw::read(api, &[asked], &mut newest, None).await?;
    newest.finish()
}

/// How names are written that are not what Prometheus 2 allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Names {
    /// With underscores for what is not allowed.
    Underscores,
    /// In quotes.
    Quoted,
}

impl Names {
    fn content_type(self) -> &'static str {
        match self {
            Self::Underscores => "text/plain; version=0.0.4; charset=utf-8; escaping=underscores",
            Self::Quoted => "text/plain; version=1.0.0; charset=utf-8; escaping=allow-utf-8",
        }
    }

    /// The name, and whether it is in quotes.
    fn write(self, name: &str, colons: bool, out: &mut Vec<u8>) -> bool {
        let allowed = |i: usize, c: char| {
            c.is_ascii_alphabetic() || c == '_' || (c == ':' && colons) || (i > 0 && c.is_ascii_digit())
        };
        let plain = !name.is_empty() && name.chars().enumerate().all(|(i, c)| allowed(i, c));
        match self {
            _ if plain => out.extend_from_slice(name.as_bytes()),
            Self::Quoted => escaped(name, out),
            Self::Underscores => {
                out.extend(name.chars().enumerate().map(|(i, c)| if allowed(i, c) { c as u8 } else { b'_' }))
            }
        }
        !plain && self == Self::Quoted
    }
}

/// A text in quotes.
fn escaped(text: &str, out: &mut Vec<u8>) {
    out.push(b'"');
    for b in text.bytes() {
        match b {
            b'\\' | b'"' => out.extend_from_slice(&[b'\\', b]),
            b'\n' => out.extend_from_slice(b"\\n"),
            b => out.push(b),
        }
    }
    out.push(b'"');
}

/// The lines of one series. Lines of one metric stand together.
struct Entry {
    metric: String,
    histogram: bool,
    lines: Vec<u8>,
}

/// Keeps the newest point of each series.
struct Newest {
    names: Names,
    labels: Vec<u8>,
    float: Option<(i64, f64)>,
    histogram: Option<Histogram>,
    entries: Vec<Entry>,
    held: MemoryReservation,
}

impl Newest {
    fn new(names: Names, held: MemoryReservation) -> Self {
        Self { names, labels: Vec::new(), float: None, histogram: None, entries: Vec::new(), held }
    }

    /// Appends a sample of the series; `suffix` belongs to the name, `le` is one more label.
    fn line(&self, metric: &str, suffix: &str, le: Option<&str>, (ts, value): (i64, f64), out: &mut Vec<u8>) {
        let mut name = Vec::new();
        let quoted = self.names.write(&format!("{metric}{suffix}"), true, &mut name);
        let mut first = !quoted;
        if quoted {
            out.push(b'{');
            out.extend_from_slice(&name);
        } else {
            out.extend_from_slice(&name);
            out.push(b'{');
        }
        let text = |bytes| std::str::from_utf8(bytes).unwrap_or_default();
        let own = Pairs::new(&self.labels).map(|p| (text(p.name), text(p.value))).filter(|p| p.0 != METRIC_NAME);
        let has_instance = own.clone().any(|(name, _)| name == "instance");
        let more = (!has_instance).then_some(("instance", "")).into_iter().chain(le.map(|le| ("le", le)));
        for (name, value) in own.chain(more) {
            if !std::mem::take(&mut first) {
                out.push(b',');
            }
            self.names.write(name, false, out);
            out.push(b'=');
            escaped(value, out);
        }
        out.extend_from_slice(b"} ");
        json::number(out, value);
        out.extend_from_slice(format!(" {ts}\n").as_bytes());
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        // Stable: series of a metric stay in the order of their labels.
        self.entries.sort_by(|a, b| (&a.metric, a.histogram).cmp(&(&b.metric, b.histogram)));
        self.held.try_grow(self.entries.iter().map(|e| e.lines.len() + 64).sum())?;
        let mut out = Vec::new();
        let mut previous = None;
        for entry in &self.entries {
            let family = (&entry.metric, entry.histogram);
            if previous != Some(family) {
                out.extend_from_slice(b"# TYPE ");
                self.names.write(&entry.metric, true, &mut out);
                out.extend_from_slice(if entry.histogram { b" histogram\n" } else { b" untyped\n" });
                previous = Some(family);
            }
            out.extend_from_slice(&entry.lines);
        }
        Ok(out)
    }
}

impl Sink for Newest {
    fn series(&mut self, labels: &[u8]) {
        self.labels.clear();
        self.labels.extend_from_slice(labels);
        (self.float, self.histogram) = (None, None);
    }

    fn points(&mut self, points: &Points) -> Result<()> {
        self.float = points.floats.last().copied().or(self.float);
        if let Some(last) = points.histograms.last() {
            self.histogram = Some(last.clone());
        }
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        let metric = crate::labels::get(&self.labels, METRIC_NAME).to_owned();
        if metric.is_empty() {
            return Ok(());
        }
        let mut lines = Vec::new();
        let newer = self.histogram.take().filter(|h| self.float.is_none_or(|(ts, _)| ts < h.ts));
        let histogram = newer.is_some();
        match (newer, self.float) {
            (Some(h), _) if h.sum.to_bits() != STALE => {
                let count = match h.counts {
                    Counts::Whole { count, .. } => count as f64,
                    Counts::Fractional { count, .. } => count,
                };
                self.line(&metric, "_bucket", Some("+Inf"), (h.ts, count), &mut lines);
                self.line(&metric, "_sum", None, (h.ts, h.sum), &mut lines);
                self.line(&metric, "_count", None, (h.ts, count), &mut lines);
            }
            (None, Some((ts, value))) if value.to_bits() != STALE => {
                self.line(&metric, "", None, (ts, value), &mut lines)
            }
            _ => return Ok(()),
        }
        self.held.try_grow(lines.len() + metric.len() + 64)?;
        self.entries.push(Entry { metric, histogram, lines });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use catalog::tag::tag_set;
    use datafusion::execution::memory_pool::{MemoryConsumer, MemoryPool, UnboundedMemoryPool};

    use super::*;

    fn check(names: Names, series: &[(&[(&str, &str)], Points)], expected: &str) {
        let pool: Arc<dyn MemoryPool> = Arc::new(UnboundedMemoryPool::default());
        let mut newest = Newest::new(names, MemoryConsumer::new("test").register(&pool));
        for (labels, points) in series {
            newest.series(tag_set(labels).expect("valid labels").as_bytes());
            newest.points(points).expect("points");
            newest.end().expect("an end");
        }
        assert_eq!(String::from_utf8(newest.finish().expect("a text")).expect("UTF-8"), expected);
    }

    fn floats(samples: &[(i64, f64)]) -> Points {
        Points { floats: samples.to_vec(), histograms: vec![] }
    }

    #[test]
    fn lines() {
        let stale = f64::from_bits(STALE);
        let histogram = |ts, sum| Points {
            floats: vec![(1, 2.0)],
            histograms: vec![Histogram {
                ts,
                sum,
                counts: Counts::Whole { count: 7, zero: 7, positive: vec![], negative: vec![] },
                ..Histogram::default()
            }],
        };
        check(
            Names::Underscores,
            &[
                (&[("Big", "1"), ("__name__", "up")], floats(&[(5, 1.0), (6, 2.5)])),
                (&[("__name__", "a:b"), ("instance", "x"), ("path", "C:\\\"\n")], floats(&[(7, f64::NAN)])),
                (&[("__name__", "ended")], floats(&[(5, 1.0), (6, stale)])),
                (&[("__name__", "up"), ("a.b", "é")], floats(&[(-5, f64::INFINITY)])),
                (&[("job", "nameless")], floats(&[(5, 1.0)])),
                (&[("__name__", "h"), ("instance", "x")], histogram(9, 0.5)),
                (&[("__name__", "h"), ("instance", "y")], histogram(9, stale)),
                (&[("__name__", "h"), ("instance", "z")], histogram(0, 0.5)),
            ],
            "# TYPE a:b untyped\na:b{instance=\"x\",path=\"C:\\\\\\\"\\n\"} NaN 7\n\
             # TYPE h untyped\nh{instance=\"z\"} 2 1\n\
             # TYPE h histogram\nh_bucket{instance=\"x\",le=\"+Inf\"} 7 9\nh_sum{instance=\"x\"} 0.5 9\nh_count{instance=\"x\"} 7 9\n\
             # TYPE up untyped\nup{Big=\"1\",instance=\"\"} 2.5 6\nup{a_b=\"é\",instance=\"\"} +Inf -5\n",
        );
        check(
            Names::Quoted,
            &[(&[("__name__", "up.é"), ("a.b", "c")], floats(&[(5, 1.0)]))],
            "# TYPE \"up.é\" untyped\n{\"up.é\",\"a.b\"=\"c\",instance=\"\"} 1 5\n",
        );
    }
}
