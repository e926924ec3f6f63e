//! The messages of remote read, as `prompb/remote.proto` and `prompb/types.proto` of Prometheus define them.

use prost::Message;
use prost::encoding::{encode_varint, encoded_len_varint};

use crate::chunk::{Chunk, Counts, Histogram, Span};
use crate::labels::Pairs;

/// What is asked for.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ReadRequest {
    #[prost(message, repeated, tag = "1")]
    pub queries: Vec<Query>,
    /// What the client can read, what it likes best first.
    #[prost(int32, repeated, tag = "2")]
    pub accepted_response_types: Vec<i32>,
}

/// Some series over a time.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Query {
    #[prost(int64, tag = "1")]
    pub start_timestamp_ms: i64,
    #[prost(int64, tag = "2")]
    pub end_timestamp_ms: i64,
    #[prost(message, repeated, tag = "3")]
    pub matchers: Vec<LabelMatcher>,
    #[prost(message, optional, tag = "4")]
    pub hints: Option<ReadHints>,
}

/// A condition on a label.
#[derive(Clone, PartialEq, Message)]
pub(super) struct LabelMatcher {
    /// `=`, `!=`, `=~`, `!~`.
    #[prost(int32, tag = "1")]
    pub kind: i32,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(string, tag = "3")]
    pub value: String,
}

/// What the client will do with the samples, as far as it matters here.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ReadHints {
    #[prost(string, tag = "2")]
    pub func: String,
    #[prost(int64, tag = "3")]
    pub start_ms: i64,
    #[prost(int64, tag = "4")]
    pub end_ms: i64,
}

/// A histogram with its time.
#[derive(Clone, PartialEq, Message)]
pub(super) struct HistogramMessage {
    #[prost(uint64, optional, tag = "1")]
    pub count_int: Option<u64>,
    #[prost(double, optional, tag = "2")]
    pub count_float: Option<f64>,
    #[prost(double, tag = "3")]
    pub sum: f64,
    #[prost(sint32, tag = "4")]
    pub schema: i32,
    #[prost(double, tag = "5")]
    pub zero_threshold: f64,
    #[prost(uint64, optional, tag = "6")]
    pub zero_count_int: Option<u64>,
    #[prost(double, optional, tag = "7")]
    pub zero_count_float: Option<f64>,
    #[prost(message, repeated, tag = "8")]
    pub negative_spans: Vec<SpanMessage>,
    #[prost(sint64, repeated, tag = "9")]
    pub negative_deltas: Vec<i64>,
    #[prost(double, repeated, tag = "10")]
    pub negative_counts: Vec<f64>,
    #[prost(message, repeated, tag = "11")]
    pub positive_spans: Vec<SpanMessage>,
    #[prost(sint64, repeated, tag = "12")]
    pub positive_deltas: Vec<i64>,
    #[prost(double, repeated, tag = "13")]
    pub positive_counts: Vec<f64>,
    #[prost(int32, tag = "14")]
    pub reset_hint: i32,
    #[prost(int64, tag = "15")]
    pub timestamp: i64,
    #[prost(double, repeated, tag = "16")]
    pub custom_values: Vec<f64>,
}

/// A run of buckets.
#[derive(Clone, PartialEq, Message)]
pub(super) struct SpanMessage {
    #[prost(sint32, tag = "1")]
    pub offset: i32,
    #[prost(uint32, tag = "2")]
    pub length: u32,
}

impl From<&Histogram> for HistogramMessage {
    fn from(h: &Histogram) -> Self {
        let spans = |spans: &[Span]| {
            spans.iter().map(|s| SpanMessage { offset: s.offset, length: s.length }).collect::<Vec<_>>()
        };
        let message = Self {
            sum: h.sum,
            schema: h.schema,
            zero_threshold: h.zero_threshold,
            negative_spans: spans(&h.negative),
            positive_spans: spans(&h.positive),
            reset_hint: i32::from(h.reset_hint),
            timestamp: h.ts,
            custom_values: h.custom_values.clone(),
            ..Self::default()
        };
        match &h.counts {
            Counts::Whole { count, zero, positive, negative } => Self {
                count_int: Some(*count),
                zero_count_int: Some(*zero),
                positive_deltas: positive.clone(),
                negative_deltas: negative.clone(),
                ..message
            },
            Counts::Fractional { count, zero, positive, negative } => Self {
                count_float: Some(*count),
                zero_count_float: Some(*zero),
                positive_counts: positive.clone(),
                negative_counts: negative.clone(),
                ..message
            },
        }
    }
}

/// Appends a field that states its length.
pub(in crate::api) fn field(number: u8, body: &[u8], out: &mut Vec<u8>) {
    out.push(number << 3 | 2);
    encode_varint(body.len() as u64, out);
    out.extend_from_slice(body);
}

fn varint(number: u8, v: u64, out: &mut Vec<u8>) {
    out.push(number << 3);
    encode_varint(v, out);
}

/// Appends the labels of a series: field 1 of `TimeSeries` and of `ChunkedSeries`.
pub(super) fn labels(canonical: &[u8], out: &mut Vec<u8>) {
    let mut body = Vec::new();
    for pair in Pairs::new(canonical) {
        body.clear();
        field(1, pair.name, &mut body);
        field(2, pair.value, &mut body);
        field(1, &body, out);
    }
}

/// Appends a float to a `TimeSeries`.
pub(super) fn sample(ts: i64, value: f64, out: &mut Vec<u8>) {
    out.push(2 << 3 | 2);
    out.push((9 + 1 + encoded_len_varint(ts as u64)) as u8);
    out.push(1 << 3 | 1);
    out.extend_from_slice(&value.to_le_bytes());
    varint(2, ts as u64, out);
}

/// Appends a histogram to a `TimeSeries`.
pub(super) fn histogram(h: &Histogram, out: &mut Vec<u8>) {
    field(4, &HistogramMessage::from(h).encode_to_vec(), out);
}

/// Appends a chunk to a `ChunkedSeries`.
pub(super) fn chunk(chunk: &Chunk, out: &mut Vec<u8>) {
    let mut body = Vec::with_capacity(chunk.data.len() + 32);
    varint(1, chunk.first_ms as u64, &mut body);
    varint(2, chunk.last_ms as u64, &mut body);
    varint(3, u64::from(chunk.encoding), &mut body);
    field(4, &chunk.data, &mut body);
    field(2, &body, out);
}

/// A `ChunkedReadResponse` of one series in its frame: length, checksum, message.
pub(super) fn frame(series: &[u8], query: u64) -> Vec<u8> {
    let mut message = Vec::with_capacity(series.len() + 16);
    field(1, series, &mut message);
    varint(2, query, &mut message);
    let mut out = Vec::with_capacity(message.len() + 16);
    encode_varint(message.len() as u64, &mut out);
    out.extend_from_slice(&crate::chunk::crc32c(&message).to_be_bytes());
    out.extend_from_slice(&message);
    out
}
