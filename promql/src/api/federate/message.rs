//! The messages of a scrape, as `metrics.proto` of Prometheus's client model defines them.

use prost::Message;

use crate::chunk::{CUSTOM, Counts, Histogram, Span};

/// What a family's samples are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Untyped = 3,
    Histogram = 4,
    GaugeHistogram = 5,
}

impl Kind {
    pub(super) fn of(h: &Histogram) -> Self {
        const GAUGE: u8 = 3;
        if h.reset_hint == GAUGE { Self::GaugeHistogram } else { Self::Histogram }
    }
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Metric {
    #[prost(message, repeated, tag = "1")]
    pub labels: Vec<LabelPair>,
    #[prost(message, optional, tag = "5")]
    pub untyped: Option<Untyped>,
    #[prost(int64, optional, tag = "6")]
    pub timestamp_ms: Option<i64>,
    #[prost(message, optional, tag = "7")]
    pub histogram: Option<HistogramMessage>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct LabelPair {
    #[prost(string, optional, tag = "1")]
    pub name: Option<String>,
    #[prost(string, optional, tag = "2")]
    pub value: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Untyped {
    #[prost(double, optional, tag = "1")]
    pub value: Option<f64>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct HistogramMessage {
    #[prost(uint64, optional, tag = "1")]
    pub count: Option<u64>,
    #[prost(double, optional, tag = "2")]
    pub sum: Option<f64>,
    #[prost(message, repeated, tag = "3")]
    pub buckets: Vec<Bucket>,
    #[prost(double, optional, tag = "4")]
    pub count_float: Option<f64>,
    #[prost(sint32, optional, tag = "5")]
    pub schema: Option<i32>,
    #[prost(double, optional, tag = "6")]
    pub zero_threshold: Option<f64>,
    #[prost(uint64, optional, tag = "7")]
    pub zero_count: Option<u64>,
    #[prost(double, optional, tag = "8")]
    pub zero_count_float: Option<f64>,
    #[prost(message, repeated, tag = "9")]
    pub negative_spans: Vec<BucketSpan>,
    #[prost(sint64, repeated, packed = "false", tag = "10")]
    pub negative_deltas: Vec<i64>,
    #[prost(double, repeated, packed = "false", tag = "11")]
    pub negative_counts: Vec<f64>,
    #[prost(message, repeated, tag = "12")]
    pub positive_spans: Vec<BucketSpan>,
    #[prost(sint64, repeated, packed = "false", tag = "13")]
    pub positive_deltas: Vec<i64>,
    #[prost(double, repeated, packed = "false", tag = "14")]
    pub positive_counts: Vec<f64>,
}

/// A bucket of a classic histogram.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Bucket {
    #[prost(uint64, optional, tag = "1")]
    pub cumulative_count: Option<u64>,
    #[prost(double, optional, tag = "2")]
    pub upper_bound: Option<f64>,
    #[prost(double, optional, tag = "4")]
    pub cumulative_count_float: Option<f64>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct BucketSpan {
    #[prost(sint32, optional, tag = "1")]
    pub offset: Option<i32>,
    #[prost(uint32, optional, tag = "2")]
    pub length: Option<u32>,
}

impl From<&Histogram> for HistogramMessage {
    /// A scrape has no histograms with bounds of their own but classic ones, as which these are told.
    fn from(h: &Histogram) -> Self {
        let mut message = Self { sum: Some(h.sum), ..Self::default() };
        let native = h.schema != CUSTOM;
        if native {
            message.schema = Some(h.schema);
            message.zero_threshold = Some(h.zero_threshold);
            message.positive_spans = spans(&h.positive);
            message.negative_spans = spans(&h.negative);
            if message.positive_spans.is_empty() && message.negative_spans.is_empty() {
                // What tells one without a bucket from a classic one.
                message.positive_spans.push(BucketSpan { offset: Some(0), length: Some(0) });
            }
        }
        match &h.counts {
            Counts::Whole { count, zero, positive, negative } => {
                message.count = Some(*count);
                if native {
                    message.zero_count = Some(*zero);
                    (message.positive_deltas, message.negative_deltas) = (positive.clone(), negative.clone());
                } else {
                    let mut last = 0;
                    let counts = positive.iter().map(|delta| (last += delta, last).1);
                    let mut all = 0;
                    message.buckets = classic(h, counts, |n, bound| {
                        all += n.unwrap_or(0);
                        let count = Some(all.try_into().unwrap_or(0));
                        Bucket { cumulative_count: count, upper_bound: Some(bound), ..Bucket::default() }
                    });
                }
            }
            Counts::Fractional { count, zero, positive, negative } => {
                message.count_float = Some(*count);
                if native {
                    message.zero_count_float = Some(*zero);
                    (message.positive_counts, message.negative_counts) = (positive.clone(), negative.clone());
                } else {
                    let mut all = 0.0;
                    message.buckets = classic(h, positive.iter().copied(), |n, bound| {
                        all += n.unwrap_or(0.0);
                        Bucket { cumulative_count_float: Some(all), upper_bound: Some(bound), ..Bucket::default() }
                    });
                }
            }
        }
        message
    }
}

fn spans(spans: &[Span]) -> Vec<BucketSpan> {
    spans.iter().map(|s| BucketSpan { offset: Some(s.offset), length: Some(s.length) }).collect()
}

/// The buckets of a histogram with bounds of its own, of which `bucket` makes each from its count, if it has any, and its
/// upper bound. The last one, which has none, is the count of all.
fn classic<N>(
    h: &Histogram,
    mut counts: impl Iterator<Item = N>,
    mut bucket: impl FnMut(Option<N>, f64) -> Bucket,
) -> Vec<Bucket> {
    let mut present = vec![false; h.custom_values.len()];
    let mut at = 0i64;
    for span in &h.positive {
        at += i64::from(span.offset);
        for _ in 0..span.length {
            if let Some(present) = usize::try_from(at).ok().and_then(|at| present.get_mut(at)) {
                *present = true;
            }
            at += 1;
        }
    }
    let bounds = h.custom_values.iter().zip(present);
    bounds.map(|(bound, present)| bucket(present.then(|| counts.next()).flatten(), *bound)).collect()
}
