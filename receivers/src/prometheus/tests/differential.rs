//! Random requests, encoded by prost, must become the rows that a plain reading of the prost types gives, which is
//! written down here a second time, without regard to speed.

use std::collections::BTreeMap;

use proptest::prelude::*;
use prost::Message;

use super::messages::{BucketSpan, Count, Histogram, ZeroCount, upgrade, v1, v2};
use super::{LIMITS, NOW, decode, double};
use crate::prometheus::{Reason, TS_MIN, decode_v1, decode_v2};

/// What a request must become: rows by table in order, metadata, and refusals by reason.
#[derive(Debug, Default, PartialEq)]
struct Expected {
    samples: Vec<String>,
    histograms: Vec<String>,
    exemplars: Vec<String>,
    starts: Vec<String>,
    metadata: Vec<String>,
    refused: BTreeMap<&'static str, u64>,
}

impl Expected {
    fn rows(&self) -> Vec<String> {
        let tables = [&self.samples, &self.histograms, &self.exemplars, &self.starts, &self.metadata];
        tables.into_iter().flatten().cloned().collect()
    }

    fn refuse(&mut self, reason: Reason) {
        *self.refused.entry(reason.name()).or_default() += 1;
    }

    /// A series by its labels, with the start of each sample if any is told; true when it is accepted.
    fn series(&mut self, labels: &[(String, String)], body: v1::TimeSeries, start_of: &[i64]) -> bool {
        let mut starts = Vec::new();
        let mut samples = Vec::new();
        let mut histograms = Vec::new();
        let mut exemplars = Vec::new();
        let in_time = |ts: i64| (TS_MIN..=NOW + LIMITS.future_max_ms).contains(&ts);
        let set: BTreeMap<_, _> = labels.iter().filter(|l| !l.1.is_empty()).cloned().collect();
        let mut latest = None;
        for (i, s) in body.samples.iter().enumerate() {
            if let Some(start) = start_of.get(i).filter(|start| **start != 0 && in_time(s.timestamp)) {
                starts.push(format!("start_timestamps {set:?} ts={} start_ts={start}", s.timestamp));
            }
            if in_time(s.timestamp) {
                samples.push(format!("samples {set:?} ts={} value={}", s.timestamp, double(s.value)));
                latest = latest.max(Some(s.timestamp));
            } else {
                self.refuse(Reason::Time);
            }
        }
        let mut exemplar = |e: &v1::Exemplar, latest: Option<i64>, out: &mut Self| {
            let ts = if e.timestamp == 0 { latest.unwrap_or(NOW) } else { e.timestamp };
            let names: std::collections::BTreeSet<_> = e.labels.iter().map(|l| &l.name).collect();
            if !in_time(ts) || names.len() != e.labels.len() || names.iter().any(|n| n.is_empty()) {
                out.refuse(Reason::Exemplar);
            } else {
                let mut labels: Vec<String> =
                    e.labels.iter().map(|l| format!("{}:{}", json(&l.name), json(&l.value))).collect();
                labels.sort();
                let labels = labels.join(",");
                exemplars.push(format!("exemplars {set:?} ts={ts} value={} labels={{{labels}}}", double(e.value)));
            }
        };
        for h in &body.histograms {
            if !in_time(h.timestamp) {
                self.refuse(Reason::Time);
            } else if let Some(row) = histogram(h) {
                histograms.push(format!("histograms {set:?} ts={} {row}", h.timestamp));
                latest = latest.max(Some(h.timestamp));
            } else {
                self.refuse(Reason::Histogram);
            }
        }
        for e in &body.exemplars {
            exemplar(e, latest, self);
        }
        let names: std::collections::BTreeSet<_> = labels.iter().map(|l| &l.0).collect();
        let named = labels.iter().any(|(n, v)| n == "__name__" && !v.is_empty());
        if !named || names.len() != labels.len() || names.contains(&String::new()) {
            self.refuse(Reason::Labels);
            return false;
        }
        self.samples.extend(samples);
        self.histograms.extend(histograms);
        self.exemplars.extend(exemplars);
        self.starts.extend(starts);
        true
    }
}

fn json(text: &str) -> String {
    let escaped = text.chars().map(|c| match c {
        '"' | '\\' => format!("\\{c}"),
        '\0'..='\x1f' => format!("\\u{:04x}", c as u32),
        c => c.to_string(),
    });
    format!("\"{}\"", escaped.collect::<String>())
}

/// The columns of a histogram after `ts`, or `None` when it is invalid.
fn histogram(h: &Histogram) -> Option<String> {
    let float = matches!(h.count, Some(Count::Float(_)));
    let custom = h.schema == -53;
    if !custom && !(-4..=52).contains(&h.schema) {
        return None;
    }
    let side = |spans: &[BucketSpan], deltas: &[i64], counts: &[f64]| -> Option<(Vec<i64>, Vec<f64>)> {
        let buckets = if float { counts.len() } else { deltas.len() };
        let total: u64 = spans.iter().map(|s| u64::from(s.length)).sum();
        if total != buckets as u64 || spans.iter().enumerate().any(|(i, s)| s.offset < 0 && (i > 0 || custom)) {
            return None;
        }
        if float {
            return counts.iter().all(|c| *c >= 0.0 || c.is_nan()).then(|| (Vec::new(), counts.to_vec()));
        }
        let mut sum = 0i128;
        let mut absolute = Vec::new();
        for d in deltas {
            sum += i128::from(*d);
            absolute.push(i64::try_from(sum).ok().filter(|c| *c >= 0)?);
        }
        Some((absolute, Vec::new()))
    };
    let positive = side(&h.positive_spans, &h.positive_deltas, &h.positive_counts)?;
    let negative = side(&h.negative_spans, &h.negative_deltas, &h.negative_counts)?;
    let (count_int, count_float) = match h.count {
        Some(Count::Float(c)) => (0, c),
        Some(Count::Int(c)) => (c, 0.0),
        None => (0, 0.0),
    };
    let (zero_int, zero_float) = match h.zero_count {
        Some(ZeroCount::Float(c)) if float => (0, c),
        Some(ZeroCount::Int(c)) if !float => (c, 0.0),
        _ => (0, 0.0),
    };
    if custom {
        let increasing = h.custom_values.windows(2).all(|w| w[0] < w[1]);
        let finite = h.custom_values.iter().all(|v| v.is_finite());
        let reach: i64 = h.positive_spans.iter().map(|s| i64::from(s.offset) + i64::from(s.length)).sum();
        if !increasing || !finite || h.zero_threshold != 0.0 || zero_int != 0 || zero_float != 0.0 {
            return None;
        }
        let negative = h.negative_spans.len() + negative.0.len() + negative.1.len();
        if negative != 0 || reach > h.custom_values.len() as i64 + 1 {
            return None;
        }
    } else if !h.custom_values.is_empty() {
        return None;
    }
    if float {
        if count_float < 0.0 || zero_float < 0.0 {
            return None;
        }
    } else {
        let found: i128 =
            positive.0.iter().chain(&negative.0).map(|c| i128::from(*c)).sum::<i128>() + i128::from(zero_int);
        let count = i128::from(count_int);
        if found > count || (found < count && !h.sum.is_nan()) {
            return None;
        }
    }
    let ints = |v: &[i64]| format!("[{}]", v.iter().map(|v| v.to_string()).collect::<Vec<_>>().join(","));
    let doubles = |v: &[f64]| format!("[{}]", v.iter().map(|v| double(*v)).collect::<Vec<_>>().join(","));
    let coarsen = |spans: &[BucketSpan], side: (Vec<i64>, Vec<f64>)| match h.schema {
        9.. => coarsen(spans, side, h.schema - 8),
        _ => (spans.to_vec(), side.0, side.1),
    };
    let positive = coarsen(&h.positive_spans, positive);
    let negative = coarsen(&h.negative_spans, negative);
    let spans = |name: &str, s: &[BucketSpan]| {
        let offsets: Vec<i64> = s.iter().map(|s| i64::from(s.offset)).collect();
        let lengths: Vec<i64> = s.iter().map(|s| i64::from(s.length)).collect();
        format!("{name}_offsets={} {name}_lengths={}", ints(&offsets), ints(&lengths))
    };
    let either = |int: String, float_value: String| match float {
        true => ("null".to_owned(), float_value),
        false => (int, "null".to_owned()),
    };
    let (ci, cf) = either((count_int as i64).to_string(), double(count_float));
    let (zi, zf) = either((zero_int as i64).to_string(), double(zero_float));
    let hint = if (0..=3).contains(&h.reset_hint) { h.reset_hint } else { 0 };
    let start = if h.start_timestamp == 0 { "null".to_owned() } else { h.start_timestamp.to_string() };
    Some(format!(
        "schema={} zero_threshold={} sum={} count_int={ci} count_float={cf} zero_count_int={zi} zero_count_float={zf} \
         {} positive_int={} positive_float={} {} negative_int={} negative_float={} custom_values={} reset_hint={hint} \
         start_ts={start}",
        h.schema.min(8),
        double(h.zero_threshold),
        double(h.sum),
        spans("positive", &positive.0),
        ints(&positive.1),
        doubles(&positive.2),
        spans("negative", &negative.0),
        ints(&negative.1),
        doubles(&negative.2),
        doubles(&h.custom_values),
    ))
}

/// Buckets of a schema that is lower by `shift`, bucket by bucket.
fn coarsen(spans: &[BucketSpan], side: (Vec<i64>, Vec<f64>), shift: i32) -> (Vec<BucketSpan>, Vec<i64>, Vec<f64>) {
    let mut buckets: BTreeMap<i64, (i64, f64)> = BTreeMap::new();
    let (mut index, mut at) = (0i64, 0);
    for s in spans {
        index += i64::from(s.offset);
        for _ in 0..s.length {
            // Upper bounds are powers: that of the wider bucket is the next one that is a whole power of the coarser base.
            let wide = (index as f64 / 2f64.powi(shift)).ceil() as i64;
            let bucket = buckets.entry(wide).or_insert((0, -0.0));
            bucket.0 += side.0.get(at).copied().unwrap_or(0);
            bucket.1 += side.1.get(at).copied().unwrap_or(0.0);
            index += 1;
            at += 1;
        }
    }
    let mut out: Vec<BucketSpan> = Vec::new();
    let mut next = 0;
    for index in buckets.keys() {
        match out.last_mut() {
            Some(span) if *index == next => span.length += 1,
            _ => out.push(BucketSpan { offset: (index - next) as i32, length: 1 }),
        }
        next = index + 1;
    }
    let int = buckets.values().map(|b| b.0).take(side.0.len()).collect();
    let float = buckets.values().map(|b| b.1).take(side.1.len()).collect();
    (out, int, float)
}

const KINDS: [&str; 8] = ["unknown", "counter", "gauge", "histogram", "gaugehistogram", "summary", "info", "stateset"];

fn metadata_row(metric: &str, kind: i32, help: &str, unit: &str) -> String {
    let kind = usize::try_from(kind).ok().and_then(|k| KINDS.get(k)).unwrap_or(&"unknown");
    format!("metadata {metric} {kind} {help:?} {unit:?}")
}

fn expected_v1(request: &v1::WriteRequest) -> Expected {
    let mut out = Expected::default();
    for s in &request.timeseries {
        let labels: Vec<_> = s.labels.iter().map(|l| (l.name.clone(), l.value.clone())).collect();
        let mut body = s.clone();
        body.histograms.iter_mut().for_each(|h| h.start_timestamp = 0);
        out.series(&labels, body, &[]);
    }
    for m in &request.metadata {
        if m.metric_family_name.is_empty() {
            out.refuse(Reason::Metadata);
        } else {
            let row = metadata_row(&m.metric_family_name, m.kind, &m.help, &m.unit);
            // Equal neighbours are taken once.
            if out.metadata.last() != Some(&row) {
                out.metadata.push(row);
            }
        }
    }
    out
}

fn check_v1(request: &v1::WriteRequest, body: &[u8]) -> Result<(), TestCaseError> {
    let (rows, decoded) = decode(decode_v1, body).map_err(|e| TestCaseError::fail(e.to_string()))?;
    let expected = expected_v1(request);
    prop_assert_eq!(rows, expected.rows());
    check_refused(&expected, &decoded.rejected)
}

fn check_refused(expected: &Expected, rejected: &super::Rejected) -> Result<(), TestCaseError> {
    for reason in Reason::ALL {
        let want = expected.refused.get(reason.name()).copied().unwrap_or(0);
        prop_assert_eq!(rejected.count(reason), want, "{}", reason.name());
    }
    Ok(())
}

fn check_v2(request: &v2::Request, body: &[u8]) -> Result<(), TestCaseError> {
    let (rows, decoded) = decode(decode_v2, body).map_err(|e| TestCaseError::fail(e.to_string()))?;
    let mut expected = Expected::default();
    let text = |r: u32| request.symbols.get(r as usize).cloned();
    let pairs = |refs: &[u32]| -> Option<Vec<(String, String)>> {
        let texts: Option<Vec<String>> = refs.iter().map(|r| text(*r)).collect();
        let texts = texts.filter(|t| t.len() % 2 == 0)?;
        Some(texts.chunks(2).map(|p| (p[0].clone(), p[1].clone())).collect())
    };
    for s in &request.timeseries {
        let exemplar = |e: &v2::Exemplar| {
            // Labels that can't be read are refused as a name that occurs twice is.
            let twice = vec![(String::new(), String::new()); 2];
            let labels =
                pairs(&e.labels_refs).unwrap_or(twice).into_iter().map(|(name, value)| v1::Label { name, value });
            v1::Exemplar { labels: labels.collect(), value: e.value, timestamp: e.timestamp }
        };
        let body = v1::TimeSeries {
            labels: Vec::new(),
            samples: s.samples.iter().map(|s| v1::Sample { value: s.value, timestamp: s.timestamp }).collect(),
            exemplars: s.exemplars.iter().map(exemplar).collect(),
            histograms: (s.histograms.iter().cloned())
                .map(|mut h| {
                    if h.start_timestamp == 0 {
                        h.start_timestamp = s.created_timestamp;
                    }
                    h
                })
                .collect(),
        };
        // No name at all is refused for the same reason.
        let told = |start: i64| if start == 0 { s.created_timestamp } else { start };
        let starts: Vec<i64> = s.samples.iter().map(|s| told(s.start_timestamp)).collect();
        let accepted = expected.series(&pairs(&s.labels_refs).unwrap_or_default(), body, &starts);
        let m = s.metadata.clone().unwrap_or_default();
        if !accepted || m == v2::Metadata::default() {
            continue;
        }
        let name = pairs(&s.labels_refs).unwrap().into_iter().find(|l| l.0 == "__name__").unwrap().1;
        let (Some(help), Some(unit)) = (text(m.help_ref), text(m.unit_ref)) else {
            expected.refused.entry(Reason::Metadata.name()).or_default();
            continue;
        };
        let family = match m.kind {
            3 | 4 => name.strip_suffix("_bucket").unwrap_or(&name),
            _ => &name,
        };
        let row = metadata_row(family, m.kind, &help, &unit);
        if !expected.metadata.contains(&row) {
            expected.metadata.push(row);
        }
    }
    let mut rows = rows;
    let mut seen = std::collections::HashSet::new();
    rows.retain(|r| !r.starts_with("metadata ") || seen.insert(r.clone()));
    prop_assert_eq!(rows, expected.rows());
    for reason in Reason::ALL.into_iter().filter(|r| *r != Reason::Metadata) {
        let want = expected.refused.get(reason.name()).copied().unwrap_or(0);
        prop_assert_eq!(decoded.rejected.count(reason), want, "{}", reason.name());
    }
    Ok(())
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => Just("__name__".to_owned()),
        20 => "[a-f]",
        2 => Just("größe".to_owned()),
        1 => Just(String::new()),
    ]
}

fn labels() -> impl Strategy<Value = Vec<v1::Label>> {
    let value = || prop_oneof![8 => "[a-c]{1,3}", 1 => Just(String::new()), 1 => ".{0,40}"];
    let label = (name(), value()).prop_map(|(name, value)| v1::Label { name, value });
    (any::<bool>(), prop::collection::vec(label, 0..5), "[m-o]{1,2}(_bucket)?").prop_map(
        |(named, mut labels, metric)| {
            if named {
                labels.retain(|l| l.name != "__name__");
                labels.insert(0, v1::Label { name: "__name__".to_owned(), value: metric });
            }
            labels
        },
    )
}

fn time() -> impl Strategy<Value = i64> {
    prop_oneof![
        8 => NOW - 100_000..NOW + 100,
        2 => prop::sample::select(vec![0, 1, -1, TS_MIN, TS_MIN - 1, NOW + 600_000, NOW + 600_001, i64::MIN, i64::MAX]),
        1 => any::<i64>(),
    ]
}

fn value() -> impl Strategy<Value = f64> {
    prop_oneof![
        4 => (-1000i32..1000).prop_map(|v| f64::from(v) / 8.0),
        // The stale marker, other NaN payloads, infinities, both zeros.
        2 => prop::sample::select(vec![0x7ff0_0000_0000_0002, 0x7ff8_0000_0000_0001, 0xfff8_0000_0000_1234,
            0x7ff0_0000_0000_0000, 0xfff0_0000_0000_0000, 0x8000_0000_0000_0000, 0]).prop_map(f64::from_bits),
        1 => any::<u64>().prop_map(f64::from_bits),
    ]
}

/// One side of a histogram: spans and absolute counts that fit each other.
fn side() -> impl Strategy<Value = (Vec<BucketSpan>, Vec<i64>)> {
    let span = (0i32..4, prop::collection::vec(0i64..100, 0..4));
    (-5i32..5, prop::collection::vec(span, 0..3)).prop_map(|(first, parts)| {
        let mut spans = Vec::new();
        let mut counts = Vec::new();
        for (i, (offset, values)) in parts.into_iter().enumerate() {
            spans.push(BucketSpan { offset: if i == 0 { first } else { offset }, length: values.len() as u32 });
            counts.extend(values);
        }
        (spans, counts)
    })
}

fn deltas(counts: &[i64]) -> Vec<i64> {
    let mut last = 0;
    counts.iter().map(|c| c - std::mem::replace(&mut last, *c)).collect()
}

/// Histograms that are valid for the most part; `damage` breaks some in one place.
fn histograms() -> impl Strategy<Value = Histogram> {
    let shape = (any::<bool>(), prop::sample::select(vec![-4, 0, 3, 8, 9, 11, 52, -53, -53]), 0u8..14);
    (shape, side(), side(), 0u64..50, value(), time(), -1i32..5, prop::bool::weighted(0.3)).prop_map(
        |((float, schema, damage), (positive_spans, positive), negative, zero, sum, timestamp, reset_hint, started)| {
            let custom = schema == -53;
            let (negative_spans, negative) = if custom { Default::default() } else { negative };
            let zero = if custom { 0 } else { zero };
            let doubles = |v: &[i64]| v.iter().map(|v| *v as f64 + 0.5).collect::<Vec<_>>();
            let count = positive.iter().chain(&negative).sum::<i64>() as u64 + zero;
            let mut h = Histogram {
                sum,
                schema,
                zero_threshold: if custom { 0.0 } else { 0.001 },
                positive_spans,
                negative_spans,
                reset_hint,
                timestamp,
                start_timestamp: if started { NOW - 1000 } else { 0 },
                ..Default::default()
            };
            if custom {
                h.positive_spans.iter_mut().for_each(|s| s.offset = s.offset.abs());
                h.custom_values = (0..20).map(|i| f64::from(i) * 0.5 - 1.0).collect();
            }
            if float {
                h.count = Some(Count::Float(count as f64));
                h.zero_count = Some(ZeroCount::Float(zero as f64));
                (h.positive_counts, h.negative_counts) = (doubles(&positive), doubles(&negative));
            } else {
                h.count = Some(Count::Int(count));
                h.zero_count = Some(ZeroCount::Int(zero));
                (h.positive_deltas, h.negative_deltas) = (deltas(&positive), deltas(&negative));
            }
            match damage {
                0 => h.positive_deltas.push(1),
                1 => h.positive_spans.push(BucketSpan { offset: -1, length: 0 }),
                2 => h.schema = -5,
                3 => h.custom_values.push(f64::NAN),
                4 => h.custom_values.push(1e9),
                5 => h.zero_threshold = 1.0,
                6 => h.count = Some(Count::Int(count + 1)),
                7 => h.count = Some(Count::Float(-1.0)),
                8 => h.count = None,
                9 => h.zero_count = Some(ZeroCount::Float(f64::NAN)),
                _ => {}
            }
            h
        },
    )
}

fn request() -> impl Strategy<Value = v1::WriteRequest> {
    let sample = || (time(), value()).prop_map(|(timestamp, value)| v1::Sample { value, timestamp });
    let exemplar_label = ("[a-d]?", "[x-z]{0,3}").prop_map(|(name, value)| v1::Label { name, value });
    let exemplar = (prop::collection::vec(exemplar_label, 0..3), value(), time())
        .prop_map(|(labels, value, timestamp)| v1::Exemplar { labels, value, timestamp });
    let series = (
        labels(),
        prop::collection::vec(sample(), 0..3),
        prop::collection::vec(exemplar, 0..2),
        prop::collection::vec(histograms(), 0..2),
    )
        .prop_map(|(labels, samples, exemplars, histograms)| v1::TimeSeries {
            labels,
            samples,
            exemplars,
            histograms,
        });
    let metadata = (-1i32..9, "[m-o]{0,2}", ".{0,10}", "[s]{0,1}")
        .prop_map(|(kind, metric_family_name, help, unit)| v1::MetricMetadata { kind, metric_family_name, help, unit });
    (prop::collection::vec(series, 0..6), prop::collection::vec(metadata, 0..3))
        .prop_map(|(timeseries, metadata)| v1::WriteRequest { timeseries, metadata })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn v1_as_prost_reads_it(request in request()) {
        let body = request.encode_to_vec();
        // Not the request itself: prost leaves out a negative zero, as Go does.
        check_v1(&v1::WriteRequest::decode(&body[..]).unwrap(), &body)?;
    }

    #[test]
    fn v2_as_prost_reads_it(
        request in request(),
        extra in prop::collection::vec((0i32..9, 0u32..12, 0u32..12, 0i64..3, prop::bool::weighted(0.1)), 6),
    ) {
        let mut request = upgrade(&request);
        for (s, (kind, help_ref, unit_ref, created, odd)) in request.timeseries.iter_mut().zip(extra) {
            s.metadata = (kind < 5).then_some(v2::Metadata { kind, help_ref, unit_ref });
            s.created_timestamp = created;
            s.samples.iter_mut().skip(1).step_by(2).for_each(|sample| sample.start_timestamp = NOW - i64::from(kind));
            if odd {
                s.labels_refs.push(help_ref * 3);
            }
        }
        let body = request.encode_to_vec();
        check_v2(&v2::Request::decode(&body[..]).unwrap(), &body)?;
    }

    /// What prost reads after bytes were changed, we read alike; what it can't read, we refuse, too. Only text that is
    /// not UTF-8 differs: prost refuses the message for it, we the series.
    #[test]
    fn changed_bytes_as_prost_reads_them(
        request in request(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut body = request.encode_to_vec();
        prop_assume!(!body.is_empty());
        for (at, byte) in changes {
            let at = at.index(body.len());
            body[at] = byte;
        }
        match v1::WriteRequest::decode(&body[..]) {
            Ok(request) => check_v1(&request, &body)?,
            Err(e) if e.to_string().contains("UTF-8") => {}
            Err(_) => prop_assert!(decode(decode_v1, &body).is_err()),
        }
    }
}
