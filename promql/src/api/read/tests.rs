//! Requests as Prometheus sends them, both forms of answers, and groups that are too large.

use arrow::array::{ArrayRef, Float64Array, TimestampMillisecondArray, UInt32Array};
use catalog::tables::SAMPLES;
use engine::{Memory, Write};

use super::message::{LabelMatcher, ReadHints};
use super::*;
use crate::api::raw::POINTS_MAX;
use crate::api::tests::{NOW, Server, batch, serve, serve_with};

/// A `ReadResponse`, as far as tests look at it.
#[derive(Clone, PartialEq, prost::Message)]
struct ReadResponse {
    #[prost(message, repeated, tag = "1")]
    results: Vec<QueryResult>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct QueryResult {
    #[prost(message, repeated, tag = "1")]
    timeseries: Vec<TimeSeries>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct TimeSeries {
    #[prost(message, repeated, tag = "1")]
    labels: Vec<Label>,
    #[prost(message, repeated, tag = "2")]
    samples: Vec<Sample>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Label {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    value: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Sample {
    #[prost(double, tag = "1")]
    value: f64,
    #[prost(int64, tag = "2")]
    timestamp: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ChunkedReadResponse {
    #[prost(message, repeated, tag = "1")]
    chunked_series: Vec<ChunkedSeries>,
    #[prost(int64, tag = "2")]
    query_index: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ChunkedSeries {
    #[prost(message, repeated, tag = "1")]
    labels: Vec<Label>,
    #[prost(message, repeated, tag = "2")]
    chunks: Vec<ChunkMessage>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ChunkMessage {
    #[prost(int64, tag = "1")]
    min_time_ms: i64,
    #[prost(int64, tag = "2")]
    max_time_ms: i64,
    #[prost(int32, tag = "3")]
    kind: i32,
    #[prost(bytes = "vec", tag = "4")]
    data: Vec<u8>,
}

fn query(kind: i32, name: &str, value: &str, start: i64, end: i64) -> Query {
    Query {
        start_timestamp_ms: start,
        end_timestamp_ms: end,
        matchers: vec![LabelMatcher { kind, name: name.into(), value: value.into() }],
        hints: None,
    }
}

fn named(labels: &[Label]) -> String {
    labels.iter().map(|l| format!("{}={}", l.name, l.value)).collect::<Vec<_>>().join(",")
}

impl Server {
    async fn read(&self, queries: &[Query], accepted: &[i32]) -> (StatusCode, String, Vec<u8>) {
        let asked = ReadRequest { queries: queries.to_vec(), accepted_response_types: accepted.to_vec() };
        self.read_body(snap::raw::Encoder::new().compress_vec(&asked.encode_to_vec()).expect("compressed")).await
    }

    async fn read_body(&self, body: Vec<u8>) -> (StatusCode, String, Vec<u8>) {
        let request = Request::post("/api/v1/read").body(Body::from(body)).expect("a request");
        let response = self.send(request).await;
        let status = response.status();
        let kind = response.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("").to_owned();
        (status, kind, to_bytes(response.into_body(), usize::MAX).await.expect("a body").to_vec())
    }

    /// Per query and series its labels and samples.
    async fn samples(&self, queries: &[Query]) -> Vec<Vec<(String, Vec<(i64, f64)>)>> {
        let (status, kind, body) = self.read(queries, &[]).await;
        assert_eq!((status, kind.as_str()), (StatusCode::OK, "application/x-protobuf"));
        let message = snap::raw::Decoder::new().decompress_vec(&body).expect("snappy");
        let one =
            |s: &TimeSeries| (named(&s.labels), s.samples.iter().map(|s| (s.timestamp, s.value)).collect::<Vec<_>>());
        let response = ReadResponse::decode(message.as_slice()).expect("a ReadResponse");
        response.results.iter().map(|r| r.timeseries.iter().map(one).collect()).collect()
    }

    /// Query, labels, and per chunk its times and how many samples it has.
    async fn chunks(&self, queries: &[Query]) -> Vec<(i64, String, Vec<(i64, i64, u16)>)> {
        let (status, kind, body) = self.read(queries, &[7, 1, 0]).await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(kind, "application/x-streamed-protobuf; proto=prometheus.ChunkedReadResponse");
        let mut rest = body.as_slice();
        let mut out = Vec::new();
        while !rest.is_empty() {
            let len = decode_varint(&mut rest).expect("a length") as usize;
            let (sum, after) = rest.split_at(4);
            let (message, after) = after.split_at(len);
            rest = after;
            assert_eq!(sum, chunk::crc32c(message).to_be_bytes());
            assert!(message.len() < FRAME_BYTES + 4096);
            let response = ChunkedReadResponse::decode(message).expect("a ChunkedReadResponse");
            assert_eq!(response.chunked_series.len(), 1);
            let series = &response.chunked_series[0];
            let chunk = |c: &ChunkMessage| {
                assert_eq!(c.kind, 1);
                (c.min_time_ms, c.max_time_ms, u16::from_be_bytes([c.data[0], c.data[1]]))
            };
            out.push((response.query_index, named(&series.labels), series.chunks.iter().map(chunk).collect()));
        }
        out
    }
}

fn inflated(body: &[u8]) -> ReadRequest {
    inflate(body, &mut Memory::new(1 << 20).reserve(Kind::Bodies)).expect("a request")
}

#[test]
fn requests_of_prometheus() {
    let check = |body: &[u8], expected: Query| {
        assert_eq!(inflated(body).queries, [expected]);
    };
    let hints = |func: &str, start_ms, end_ms| Some(ReadHints { func: func.into(), start_ms, end_ms });
    check(
        include_bytes!("../../../../tests/payloads/remote_read/prometheus-2.42-read-instant.body"),
        Query {
            hints: hints("", 1795238722378, 1795239022378),
            ..query(0, "__name__", "up", 1795238722378, 1795239022378)
        },
    );
    let range = Query {
        start_timestamp_ms: 1795238662378,
        hints: hints("rate", 1795238662378, 1795239022378),
        ..query(1, "mode", "idle", 0, 1795239022378)
    };
    let body = include_bytes!("../../../../tests/payloads/remote_read/prometheus-2.42-read-range-matchers.body");
    let mut got = inflated(body).queries;
    assert_eq!(got[0].matchers.pop().map(|m| (m.kind, m.value)), Some((0, "node_cpu_seconds_total".to_owned())));
    assert_eq!(got, [range]);
    check(
        include_bytes!("../../../../tests/payloads/remote_read/prometheus-2.42-read-series.body"),
        Query {
            hints: hints("series", 1795238722378, 1795239022378),
            ..query(0, "__name__", "up", 1795238722378, 1795239022378)
        },
    );
}

#[tokio::test]
async fn samples_and_chunks() {
    let server = serve().await;
    let up = |instance: &str| format!("__name__=up,instance={instance},job=node");
    let last: Vec<(i64, f64)> = (0..5).map(|i| (NOW - 240_000 + i * 60_000, 1.0)).collect();
    for flushed in [false, true] {
        if flushed {
            server.engine.flush().await.expect("flushed");
        }
        let queries = [
            query(0, "__name__", "up", NOW - 240_000, NOW),
            query(2, "instance", "b.*", NOW, NOW + 1),
            query(3, "__name__", ".+", 0, NOW),
        ];
        let requests = "__name__=requests,http.route=/x,instance=b:1,job=api\"1\"".to_owned();
        let expected = [
            vec![(up("a:1"), last.clone()), (up("b:1"), last.clone())],
            vec![(requests.clone(), vec![(NOW, 7230.0)]), (up("b:1"), vec![(NOW, 1.0)])],
            vec![],
        ];
        assert_eq!(server.samples(&queries).await, expected);
        let chunk = vec![(NOW - 240_000, NOW, 5)];
        let one = vec![(NOW, NOW, 1)];
        let expected =
            [(0, up("a:1"), chunk.clone()), (0, up("b:1"), chunk), (1, requests, one.clone()), (1, up("b:1"), one)];
        assert_eq!(server.chunks(&queries).await, expected);
    }
    // A narrower time in the hints, and labels alone.
    let hinted = |func: &str, start_ms, end_ms| Query {
        hints: Some(ReadHints { func: func.into(), start_ms, end_ms }),
        ..query(0, "__name__", "up", 0, NOW)
    };
    let narrow = vec![(up("a:1"), vec![(NOW - 60_000, 1.0)]), (up("b:1"), vec![(NOW - 60_000, 1.0)])];
    let labels = vec![(up("a:1"), vec![]), (up("b:1"), vec![])];
    assert_eq!(
        server.samples(&[hinted("rate", NOW - 60_000, NOW - 1), hinted("series", 0, NOW)]).await,
        [narrow, labels]
    );
    assert_eq!(server.chunks(&[hinted("series", 0, NOW)]).await, [(0, up("a:1"), vec![]), (0, up("b:1"), vec![])]);
}

#[tokio::test]
async fn groups_are_as_large_as_what_can_be_held() {
    let server = serve().await;
    // Two series that are too large together, one that is too large by itself.
    let counts = [("a", POINTS_MAX / 2 + 5), ("b", POINTS_MAX / 2 + 7), ("c", POINTS_MAX + 9)];
    let registry = server.engine.registry().clone();
    let mut encoder = registry.encoder();
    let (mut series, mut ts) = (Vec::new(), Vec::new());
    for (name, count) in counts {
        let tags = encoder.tags(&mut [("__name__", "big"), ("name", name)], None).expect("valid labels");
        series.extend(std::iter::repeat_n(tags, count));
        ts.extend((0..count).map(|i| NOW - 10_000_000 + i as i64 * 3));
    }
    let columns: Vec<ArrayRef> = vec![
        Arc::new(UInt32Array::from(series)),
        Arc::new(TimestampMillisecondArray::from(ts.clone()).with_timezone("UTC")),
        Arc::new(ts.iter().map(|ts| *ts as f64).collect::<Float64Array>()),
    ];
    let write = Write { tags: encoder.finish(), batches: vec![batch(&SAMPLES, columns)], metadata: vec![] };
    server.engine.write(write).await.expect("stored");
    let queries = [query(0, "__name__", "big", i64::MIN, i64::MAX)];
    let results = server.samples(&queries).await;
    let all = server.chunks(&queries).await;
    for ((name, count), (labels, samples)) in counts.iter().zip(&results[0]) {
        assert_eq!(*labels, format!("__name__=big,name={name}"));
        assert_eq!(samples.len(), *count);
        assert!(samples.iter().enumerate().all(|(i, s)| s.0 == NOW - 10_000_000 + i as i64 * 3 && s.1 == s.0 as f64));
        let chunks: Vec<_> = all.iter().filter(|c| c.1 == *labels).flat_map(|c| &c.2).collect();
        assert_eq!(chunks.iter().map(|c| usize::from(c.2)).sum::<usize>(), *count);
        assert!(chunks.windows(2).all(|pair| pair[0].1 + 3 == pair[1].0));
    }
    assert!(all.is_sorted_by_key(|frame| &frame.1) && all.len() > 3, "{} frames", all.len());
}

#[tokio::test]
async fn refusals() {
    let server = serve().await;
    let check = async |queries: &[Query], accepted: &[i32], expected: &str| {
        let (status, _, body) = server.read(queries, accepted).await;
        let text = String::from_utf8_lossy(&body).into_owned();
        assert!(status == StatusCode::BAD_REQUEST && text.contains(expected), "{status} {text}");
    };
    check(&[], &[2], "server does not support any of the requested response types: [2]; supported: 0 (SAMPLES)").await;
    check(&[query(2, "a", "(", 0, 1)], &[], "(").await;
    check(&[query(2, "a", "(", 0, 1)], &[1], "(").await;
    check(&[query(9, "a", "b", 0, 1)], &[], "matcher type 9 is unknown").await;
    check(&vec![query(0, "a", "b", 0, 1); 101], &[], "request has 101 queries; 100 are allowed").await;
    let raw = async |body: &[u8], expected: &str| {
        let (status, _, body) = server.read_body(body.to_vec()).await;
        let text = String::from_utf8_lossy(&body).into_owned();
        assert!(status == StatusCode::BAD_REQUEST && text.contains(expected), "{status} {text}");
    };
    raw(b"", "not a snappy block").await;
    raw(b"\xff\xff\xff\xff\x0f", "are allowed").await;
    raw(&[0; 2 << 20], "a request may have 1048576 bytes").await;
    let message = snap::raw::Encoder::new().compress_vec(&[0x0a, 9]).expect("compressed");
    raw(&message, "not a prometheus.ReadRequest").await;
    // What would be allocated for these takes fifty times as much as they do.
    let empty =
        |bytes: &[u8], count: usize| snap::raw::Encoder::new().compress_vec(&bytes.repeat(count)).expect("small");
    raw(&empty(&[0x0a, 0], 2 << 20), "request has 2097152 queries; 100 are allowed").await;
    let matchers = |count: usize| {
        let mut message = vec![0x0a];
        prost::encoding::encode_varint(2 * count as u64, &mut message);
        message.extend([0x1a, 0].repeat(count));
        message
    };
    raw(&empty(&matchers(1 << 20), 1), "request has 1048576 matchers in one query; 1000 are allowed").await;
    raw(&empty(&[0x10, 7], 101), "request has 101 response types; 100 are allowed").await;
    raw(&empty(&[&[0x12, 101][..], &[7; 101]].concat(), 1), "request has 101 response types; 100 are allowed").await;
    assert_eq!(server.samples(&[]).await.len(), 0);
    assert_eq!(server.chunks(&[]).await, []);
}

#[tokio::test]
async fn what_is_read_counts_as_the_query_s() {
    let mut server = serve_with(|settings| settings.query_memory_max = 12 << 20).await;
    let up = [query(0, "__name__", "up", 0, NOW)];
    for accepted in [0, 1] {
        let (status, _, body) = server.read(&up, &[accepted]).await;
        let text = String::from_utf8_lossy(&body).into_owned();
        assert!(status == StatusCode::BAD_REQUEST && text.contains("see query_memory_max"), "{status} {text}");
    }
    let request = Request::get("/federate?match[]=up").body(Body::empty()).expect("a request");
    let response = server.send(request).await;
    assert_eq!(response.status(), StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(server.engine.memory().held(Kind::Queries), 0);

    server = serve().await;
    let memory = server.engine.memory().clone();
    let asked = ReadRequest { queries: up.to_vec(), accepted_response_types: vec![] };
    let body = snap::raw::Encoder::new().compress_vec(&asked.encode_to_vec()).expect("compressed");
    let read = Request::post("/api/v1/read").body(Body::from(body)).expect("a request");
    let federate = Request::get("/federate?match[]=up").body(Body::empty()).expect("a request");
    for request in [read, federate] {
        let response = server.send(request).await;
        assert_eq!(response.status(), StatusCode::OK);
        let held = memory.held(Kind::Queries);
        let body = to_bytes(response.into_body(), usize::MAX).await.expect("a body");
        assert!(!body.is_empty() && held >= body.len(), "{held} bytes are held for {}", body.len());
        drop(body);
        assert_eq!((memory.held(Kind::Queries), memory.held(Kind::Bodies)), (0, 0));
    }
}
