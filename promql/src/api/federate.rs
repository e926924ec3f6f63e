//! `/federate`: the newest sample of every series that any `match[]` selects, as the text or the protobuf messages that a
//! Prometheus scrapes.
//!
//! As in Prometheus a series counts that has a sample within the lookback and was not marked as ended, samples carry their
//! own times, and a series without the label `instance` gets an empty one, so that the scraper does not put its own there.
//! Text has no native histograms; of each its count and sum are given, as of a classic histogram with one bucket.

mod message;

use std::sync::Arc;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use catalog::tag::METRIC_NAME;
use engine::{Reservation, memory};
use prost::Message;
use prost::encoding::encode_varint;

use self::message::{HistogramMessage, Kind, LabelPair, Metric, Untyped};
use super::params::{Form, invalid};
use super::raw::{self, Asked, Sink};
use super::read::message::field;
use super::reply::{Held, error_type};
use super::{Api, begin, json};
use crate::chunk::{Counts, Histogram, Points, STALE};
use crate::error::Result;
use crate::exec::out_of_memory;
use crate::labels::Pairs;

/// `GET /federate`. Errors are plain text.
pub(super) async fn federate(State(api): State<Arc<Api>>, headers: HeaderMap, form: Form) -> Response {
    let format = Format::accepted(headers.get_all(ACCEPT).iter().filter_map(|v| v.to_str().ok()));
    let work = {
        let api = api.clone();
        async move { scrape(&api, &form, format).await }
    };
    let underway = api.metrics.begin("federate");
    let result = api.engine.run(work).await;
    underway.end(result.as_ref().map_or_else(|e| error_type(e.kind).0, |_| "success"));
    match result {
        Ok(body) => ([(CONTENT_TYPE, format.content_type())], body).into_response(),
        Err(e) => (error_type(e.kind).1, format!("{e}\n")).into_response(),
    }
}

async fn scrape(api: &Api, form: &Form, format: Format) -> Result<Held> {
    let selectors = form.selectors().map_err(|e| invalid("match[]", e))?;
    let end_ms = api.engine.now_ms();
    let start_ms = end_ms.saturating_sub(api.settings.lookback_ms).saturating_add(1);
    let asked = Asked { selectors, start_ms, end_ms, labels_only: false };
    let query = begin(api, form).await?;
    let mut newest = Newest::new(format, query.memory().reserve(memory::Kind::Queries));
    raw::read((api, &query), &[asked], &mut newest, None).await?;
    newest.finish()
}

/// What a scrape is answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Format {
    protobuf: bool,
    names: Names,
}

impl Format {
    /// The one that the client likes best of those that there are, by its `Accept` headers.
    fn accepted<'a>(headers: impl Iterator<Item = &'a str>) -> Self {
        let mut best = (0.0, Self { protobuf: false, names: Names::Underscores });
        for range in headers.flat_map(|v| v.split(',')) {
            let mut parts = range.split(';').map(str::trim);
            let media = parts.next();
            let parameters: Vec<(&str, &str)> = parts.filter_map(|p| p.split_once('=')).collect();
            let get = |name: &str| parameters.iter().find(|(k, _)| *k == name).map(|(_, v)| *v);
            let protobuf = media == Some("application/vnd.google.protobuf")
                && get("proto") == Some("io.prometheus.client.MetricFamily")
                && get("encoding") == Some("delimited");
            let weight: f64 = get("q").map_or(Some(1.0), |q| q.parse().ok()).unwrap_or(0.0);
            if (protobuf || media == Some("text/plain")) && weight > best.0 {
                let utf8 = get("escaping") == Some("allow-utf-8");
                best = (weight, Self { protobuf, names: if utf8 { Names::Quoted } else { Names::Underscores } });
            }
        }
        best.1
    }

    fn content_type(self) -> &'static str {
        match (self.protobuf, self.names) {
            (false, Names::Underscores) => "text/plain; version=0.0.4; charset=utf-8; escaping=underscores",
            (false, Names::Quoted) => "text/plain; version=1.0.0; charset=utf-8; escaping=allow-utf-8",
            (true, Names::Underscores) => {
                "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited; \
                 escaping=underscores"
            }
            (true, Names::Quoted) => {
                "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited; \
                 escaping=allow-utf-8"
            }
        }
    }
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
    /// The name, and whether it is in quotes.
    fn write(self, name: &str, colons: bool, out: &mut Vec<u8>) -> bool {
        let plain = is_plain(name, colons);
        match self {
            _ if plain => out.extend_from_slice(name.as_bytes()),
            Self::Quoted => escaped(name, out),
            Self::Underscores => out.extend(self.spelled(name, colons).bytes()),
        }
        !plain && self == Self::Quoted
    }

    /// The name where quotes are not needed to tell where it ends.
    fn spelled(self, name: &str, colons: bool) -> String {
        if self == Self::Quoted || is_plain(name, colons) {
            return name.to_owned();
        }
        name.chars().enumerate().map(|(i, c)| if is_allowed(i, c, colons) { c } else { '_' }).collect()
    }
}

fn is_allowed(i: usize, c: char, colons: bool) -> bool {
    c.is_ascii_alphabetic() || c == '_' || (c == ':' && colons) || (i > 0 && c.is_ascii_digit())
}

fn is_plain(name: &str, colons: bool) -> bool {
    !name.is_empty() && name.chars().enumerate().all(|(i, c)| is_allowed(i, c, colons))
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

/// One series: its lines or its message. Those of one metric stand together.
struct Entry {
    metric: String,
    kind: Kind,
    bytes: Vec<u8>,
}

/// Keeps the newest point of each series.
struct Newest {
    format: Format,
    labels: Vec<u8>,
    float: Option<(i64, f64)>,
    histogram: Option<Histogram>,
    entries: Vec<Entry>,
    held: Reservation,
}

impl Newest {
    fn new(format: Format, held: Reservation) -> Self {
        Self { format, labels: Vec::new(), float: None, histogram: None, entries: Vec::new(), held }
    }

    /// Appends a sample of the series; `suffix` belongs to the name, `le` is one more label.
    fn line(&self, metric: &str, suffix: &str, le: Option<&str>, (ts, value): (i64, f64), out: &mut Vec<u8>) {
        let mut name = Vec::new();
        let quoted = self.format.names.write(&format!("{metric}{suffix}"), true, &mut name);
        let mut first = !quoted;
        if quoted {
            out.push(b'{');
            out.extend_from_slice(&name);
        } else {
            out.extend_from_slice(&name);
            out.push(b'{');
        }
        for (name, value) in self.pairs().chain(le.map(|le| ("le", le))) {
            if !std::mem::take(&mut first) {
                out.push(b',');
            }
            self.format.names.write(name, false, out);
            out.push(b'=');
            escaped(value, out);
        }
        out.extend_from_slice(b"} ");
        json::number(out, value);
        out.extend_from_slice(format!(" {ts}\n").as_bytes());
    }

    /// The labels, without the name and with an instance.
    fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        let text = |bytes| std::str::from_utf8(bytes).unwrap_or_default();
        let own = Pairs::new(&self.labels).map(move |p| (text(p.name), text(p.value))).filter(|p| p.0 != METRIC_NAME);
        let has_instance = own.clone().any(|(name, _)| name == "instance");
        own.chain((!has_instance).then_some(("instance", "")))
    }

    /// The message of the series with one sample.
    fn message(&self, ts: i64, untyped: Option<f64>, histogram: Option<&Histogram>) -> Vec<u8> {
        let names = self.format.names;
        let pair = |(name, value): (&str, &str)| LabelPair {
            name: Some(names.spelled(name, false)),
            value: Some(value.into()),
        };
        let metric = Metric {
            labels: self.pairs().map(pair).collect(),
            untyped: untyped.map(|v| Untyped { value: Some(v) }),
            timestamp_ms: Some(ts),
            histogram: histogram.map(HistogramMessage::from),
        };
        metric.encode_to_vec()
    }

    fn finish(mut self) -> Result<Held> {
        // Stable: series of a metric stay in the order of their labels.
        self.entries.sort_by(|a, b| (&a.metric, a.kind).cmp(&(&b.metric, b.kind)));
        // Messages are put together family by family.
        self.held.grow(self.entries.iter().map(|e| 2 * e.bytes.len() + 64).sum()).map_err(out_of_memory)?;
        let mut out = Vec::new();
        for family in self.entries.chunk_by(|a, b| (&a.metric, a.kind) == (&b.metric, b.kind)) {
            let Some(Entry { metric, kind, .. }) = family.first() else { continue };
            if self.format.protobuf {
                let mut body = Vec::new();
                field(1, self.format.names.spelled(metric, true).as_bytes(), &mut body);
                body.extend_from_slice(&[3 << 3, *kind as u8]);
                family.iter().for_each(|e| field(4, &e.bytes, &mut body));
                encode_varint(body.len() as u64, &mut out);
                out.extend_from_slice(&body);
                continue;
            }
            out.extend_from_slice(b"# TYPE ");
            self.format.names.write(metric, true, &mut out);
            out.extend_from_slice(if *kind == Kind::Untyped { b" untyped\n" } else { b" histogram\n" });
            family.iter().for_each(|e| out.extend_from_slice(&e.bytes));
        }
        // What it was put together from is not needed to send it.
        drop(self.entries);
        Ok(Held::new(out, self.held))
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
        let mut kind = Kind::Untyped;
        match (newer, self.float) {
            (Some(h), _) if h.sum.to_bits() != STALE && self.format.protobuf => {
                kind = Kind::of(&h);
                lines = self.message(h.ts, None, Some(&h));
            }
            (None, Some((ts, value))) if value.to_bits() != STALE && self.format.protobuf => {
                lines = self.message(ts, Some(value), None);
            }
            (Some(h), _) if h.sum.to_bits() != STALE => {
                kind = Kind::Histogram;
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
        self.held.grow(lines.len() + metric.len() + 64).map_err(out_of_memory)?;
        self.entries.push(Entry { metric, kind, bytes: lines });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use catalog::tag::tag_set;
    use engine::Memory;

    use super::*;
    use crate::chunk::{CUSTOM, Span};

    fn check(names: Names, series: &[(&[(&str, &str)], Points)], expected: &str) {
        let format = Format { protobuf: false, names };
        let mut newest = Newest::new(format, Memory::new(1 << 20).reserve(memory::Kind::Queries));
        for (labels, points) in series {
            newest.series(tag_set(labels).expect("valid labels").as_bytes());
            newest.points(points).expect("points");
            newest.end().expect("an end");
        }
        let body = newest.finish().expect("a text");
        assert_eq!(std::str::from_utf8(body.as_ref()).expect("UTF-8"), expected);
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

    #[test]
    fn messages() {
        let format = Format { protobuf: true, names: Names::Underscores };
        let mut newest = Newest::new(format, Memory::new(1 << 20).reserve(memory::Kind::Queries));
        let native = |reset_hint, counts| Histogram {
            ts: 9,
            schema: 2,
            sum: 0.5,
            zero_threshold: 0.1,
            counts,
            positive: vec![Span { offset: 1, length: 2 }],
            reset_hint,
            ..Histogram::default()
        };
        let whole = Counts::Whole { count: 7, zero: 1, positive: vec![4, -2], negative: vec![] };
        let parts = Counts::Fractional { count: 1.5, zero: 0.5, positive: vec![0.25, 0.75], negative: vec![] };
        let custom = Histogram { schema: CUSTOM, custom_values: vec![1.0, 2.0, 4.0], ..native(0, whole.clone()) };
        let histogram = |h: Histogram| Points { floats: vec![(1, 2.0)], histograms: vec![h] };
        let series: [(&[(&str, &str)], Points); 5] = [
            (&[("__name__", "h"), ("x.y", "1")], histogram(native(0, whole))),
            (&[("__name__", "h"), ("instance", "g")], histogram(native(3, parts))),
            (&[("__name__", "h"), ("instance", "c")], histogram(custom)),
            (&[("__name__", "up.é")], floats(&[(5, 0.0)])),
            (&[("__name__", "ended")], floats(&[(6, f64::from_bits(STALE))])),
        ];
        for (labels, points) in &series {
            newest.series(tag_set(labels).expect("valid labels").as_bytes());
            newest.points(points).expect("points");
            newest.end().expect("an end");
        }
        let body = newest.finish().expect("messages");
        let mut rest = body.as_ref();
        let mut families: Vec<(String, i32, Vec<Metric>)> = Vec::new();
        while !rest.is_empty() {
            let family = Family::decode_length_delimited(&mut rest).expect("a message");
            families.push((family.name, family.kind, family.metrics));
        }
        let names: Vec<_> = families.iter().map(|(name, kind, all)| (name.as_str(), *kind, all.len())).collect();
        assert_eq!(names, [("h", 4, 2), ("h", 5, 1), ("up__", 3, 1)]);
        let labels = |m: &Metric| {
            let text = |t: &Option<String>| t.clone().unwrap_or_default();
            m.labels.iter().map(|l| format!("{}={}", text(&l.name), text(&l.value))).collect::<Vec<_>>().join(" ")
        };
        let of = |family: usize, metric: usize| families[family].2[metric].histogram.clone().expect("a histogram");
        assert_eq!(labels(&families[0].2[0]), "x_y=1 instance=");
        assert_eq!((of(0, 0).count, of(0, 0).schema, of(0, 0).positive_deltas), (Some(7), Some(2), vec![4, -2]));
        let buckets: Vec<_> = of(0, 1).buckets.iter().map(|b| (b.upper_bound, b.cumulative_count)).collect();
        assert_eq!(buckets, [(Some(1.0), Some(0)), (Some(2.0), Some(4)), (Some(4.0), Some(6))]);
        assert_eq!((of(0, 1).schema, of(0, 1).count), (None, Some(7)));
        assert_eq!((of(1, 0).count_float, of(1, 0).positive_counts), (Some(1.5), vec![0.25, 0.75]));
        let up = &families[2].2[0];
        assert_eq!((up.timestamp_ms, up.untyped.as_ref().and_then(|u| u.value)), (Some(5), Some(0.0)));
    }

    #[derive(Clone, PartialEq, Message)]
    struct Family {
        #[prost(string, tag = "1")]
        name: String,
        #[prost(int32, tag = "3")]
        kind: i32,
        #[prost(message, repeated, tag = "4")]
        metrics: Vec<Metric>,
    }

    #[test]
    fn formats() {
        const PROTOBUF: &str =
            "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited";
        let check = |accept: &str, protobuf: bool, names: Names| {
            assert_eq!(Format::accepted([accept].into_iter()), Format { protobuf, names }, "{accept}");
        };
        check("", false, Names::Underscores);
        check("*/*", false, Names::Underscores);
        check("text/plain; version=1.0.0; escaping=allow-utf-8", false, Names::Quoted);
        check(&format!("{PROTOBUF};q=0.7,text/plain;version=0.0.4;q=0.3,*/*;q=0.1"), true, Names::Underscores);
        check(&format!("text/plain;q=0.9,{PROTOBUF};escaping=allow-utf-8;q=0.3"), false, Names::Underscores);
        check(&format!("{PROTOBUF};escaping=allow-utf-8"), true, Names::Quoted);
        check("application/vnd.google.protobuf;proto=other;encoding=delimited", false, Names::Underscores);
        check(&format!("{PROTOBUF};q=0"), false, Names::Underscores);
    }
}
