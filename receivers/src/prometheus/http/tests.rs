//! Requests against a real engine: statuses, headers and what is stored.

use std::sync::Arc;

use axum::body::Bytes;
use axum::http::request::Builder;
use catalog::ManualClock;
use catalog::tables::SAMPLES;
use engine::{Components, Extensions, Memory, Selection, Settings, Stop};
use futures::StreamExt;
use http_body_util::BodyExt;
use prost::Message;
use tempfile::TempDir;

use super::*;
use crate::prometheus::tests::messages::{series, upgrade, v1, with_sample};

const NOW: i64 = 1_795_239_025_000;
const BUDGET: usize = 8 << 20;
const V1: &str = "application/x-protobuf";
const V2: &str = "application/x-protobuf;proto=io.prometheus.write.v2.Request";

struct Server {
    receiver: Arc<Receiver>,
    engine: Engine,
    memory: Memory,
    _folder: TempDir,
}

fn disk() -> Arc<dyn catalog::FileSystem> {
    Arc::new(catalog::fs::Disk)
}

async fn serve(series_limit: usize) -> Server {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store");
    let store = store.to_str().unwrap();
    let settings = Settings {
        data_dir: folder.path().join("data"),
        store_location: catalog::object::location(store).unwrap(),
        memory_limit: 256 << 20,
        series_limit,
        ..Settings::default()
    };
    let components = Components {
        store: catalog::object::open(&disk(), store).unwrap(),
        fs: disk(),
        clock: Arc::new(ManualClock::new(NOW)),
        entropy: Arc::new(catalog::SeededEntropy::new(1)),
        telemetry: Arc::new(Telemetry::default()),
    };
    let engine = Engine::open(settings, components, Extensions::default()).await.unwrap();
    let memory = Memory::new(8 * BUDGET);
    let bodies = Bodies::new(memory.clone()).with_idle_max(Duration::from_millis(200));
    let metrics = Metrics::new(engine.telemetry());
    let receiver = Arc::new(Receiver { engine: engine.clone(), bodies, replicas: None, metrics });
    Server { receiver, engine, memory, _folder: folder }
}

/// What came back.
#[derive(Debug)]
struct Answer {
    status: u16,
    /// Samples, histograms and exemplars written, by the headers.
    written: [usize; 3],
    text: String,
}

impl Server {
    async fn send(&self, request: Builder, body: impl Into<HttpBody>) -> Answer {
        let response = write(State(self.receiver.clone()), request.body(body.into()).unwrap()).await;
        let header = |name: &HeaderName| response.headers()[name].to_str().unwrap().parse().unwrap();
        let written = [header(&SAMPLES_WRITTEN), header(&HISTOGRAMS_WRITTEN), header(&EXEMPLARS_WRITTEN)];
        let (status, retry_after) = (response.status().as_u16(), response.headers().contains_key(RETRY_AFTER));
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let text = String::from_utf8(body.to_vec()).unwrap();
        assert_eq!(text.is_empty(), status == 204, "{text:?}");
        assert!(text.len() <= 1024 && text.matches('\n').count() <= 1, "senders log one line of 1 KiB: {text:?}");
        assert_eq!(retry_after, status == 503);
        assert_eq!(self.memory.used(), 0, "a body kept its memory");
        Answer { status, written, text }
    }

    /// The metric names of all series with samples.
    async fn stored(&self) -> Vec<String> {
        let selection = Selection { table: SAMPLES.clone(), matchers: Vec::new(), start_ms: 0, end_ms: i64::MAX };
        let set = self.engine.select(&selection, &Stop::default()).await.unwrap();
        let mut names: Vec<String> = set.series.iter().map(|s| s.tags.metric().to_owned()).collect();
        names.sort();
        names
    }
}

fn request(timeseries: Vec<v1::TimeSeries>) -> v1::WriteRequest {
    v1::WriteRequest { timeseries, metadata: Vec::new() }
}

fn snappy(body: &[u8]) -> Vec<u8> {
    snap::raw::Encoder::new().compress_vec(body).unwrap()
}

fn with(content_type: &str, encoding: &str) -> Builder {
    Request::builder().header(CONTENT_TYPE, content_type).header(CONTENT_ENCODING, encoding)
}

#[tokio::test]
async fn content_types_and_encodings() {
    let server = serve(1000).await;
    let v1 = request(vec![with_sample(&[("__name__", "m")], NOW, 1.0)]);
    let v2 = upgrade(&v1).encode_to_vec();
    let v1 = v1.encode_to_vec();
    let zstd = |body: &[u8]| zstd::bulk::compress(body, 3).unwrap();
    let check = async |request: Builder, body: Vec<u8>, status, text: &str| {
        let answer = server.send(request, body).await;
        assert_eq!(answer.status, status, "{answer:?}");
        assert_eq!(answer.written, [usize::from(status == 204), 0, 0]);
        assert!(answer.text.contains(text), "{answer:?}");
    };
    check(with(V1, "snappy"), snappy(&v1), 204, "").await;
    check(with("application/x-protobuf; proto=prometheus.WriteRequest", "snappy"), snappy(&v1), 204, "").await;
    check(with(V2, "snappy"), snappy(&v2), 204, "").await;
    check(with("Application/X-Protobuf; proto=\"io.prometheus.write.v2.Request\"", "Snappy"), snappy(&v2), 204, "")
        .await;
    check(with(V1, "zstd"), zstd(&v1), 204, "").await;
    check(with(V2, "zstd"), zstd(&v2), 204, "").await;
    check(with(V1, "identity"), v1.clone(), 204, "").await;
    check(Request::builder(), snappy(&v1), 204, "").await;
    check(with("text/plain", "snappy"), snappy(&v1), 415, "content type \"text/plain\" is not supported").await;
    check(with("application/x-protobuf;proto=x", "snappy"), snappy(&v1), 415, "proto=x").await;
    check(with("application/x-protobuf;proto", "snappy"), snappy(&v1), 415, "is not supported").await;
    check(with(V1, "gzip"), snappy(&v1), 415, "content encoding \"gzip\" is not supported").await;
    // Compressed otherwise than said.
    check(with(V1, "zstd"), snappy(&v1), 400, "is not zstd frames").await;
    check(with(V1, "snappy"), zstd(&v1), 400, "is not a snappy block").await;
    assert_eq!(server.stored().await, ["m"]);
}

#[tokio::test]
async fn bad_bodies() {
    let server = serve(1000).await;
    let good = request(vec![with_sample(&[("__name__", "m")], NOW, 1.0)]).encode_to_vec();
    let check = async |encoding: &str, body: Vec<u8>, status, text: &str| {
        let answer = server.send(with(V1, encoding), body).await;
        assert_eq!((answer.status, answer.written), (status, [0; 3]), "{answer:?}");
        assert!(answer.text.contains(text), "{answer:?}");
    };
    let declares = |length: u64| {
        let mut body = Vec::new();
        prost::encoding::encode_varint(length, &mut body);
        body.extend([0x04, b'a', b'b']);
        body
    };
    let cut = |mut body: Vec<u8>, n| {
        body.truncate(body.len() - n);
        body
    };
    check("snappy", Vec::new(), 400, "it does not begin with its length").await;
    check("snappy", cut(snappy(&good), 3), 400, "is not a snappy block").await;
    check("snappy", snappy(&cut(good.clone(), 3)), 400, "a length that reaches beyond its message at byte").await;
    check("snappy", snappy(b"not protobuf"), 400, "not a valid protobuf message").await;
    // Lengths that are declared and never come.
    check("snappy", declares(1 << 20), 400, "can't inflate to the 1048576").await;
    for length in [3 << 20, 1 << 30, 3 << 30, 1 << 32, 1 << 63, u64::MAX] {
        check("snappy", declares(length), 413, "2097152 are allowed").await;
    }
    // Bombs that come.
    check("snappy", snappy(&vec![0; 3 << 20]), 413, "2097152 are allowed").await;
    let bomb = zstd::stream::encode_all(std::io::Read::take(std::io::repeat(0), 1 << 28), 3).unwrap();
    check("zstd", bomb, 413, "2097152 are allowed").await;
    check("identity", vec![0; 900_000], 400, "not a valid protobuf message").await;
    check("identity", vec![0; 1_100_000], 413, "1048576 are allowed").await;
    // Without a length, too.
    let chunks = futures::stream::iter((0..20).map(|_| Ok::<_, std::io::Error>(Bytes::from(vec![0; 100_000]))));
    let answer = server.send(with(V1, "snappy"), HttpBody::from_stream(chunks)).await;
    assert_eq!(answer.status, 413, "{answer:?}");
    let declared = with(V1, "snappy").header(CONTENT_LENGTH, 1u64 << 40);
    assert_eq!(server.send(declared, snappy(&good)).await.status, 413);
    assert!(server.stored().await.is_empty());
}

/// Bodies that stall or break off, and too many at once: come again later.
#[tokio::test]
async fn temporary_conditions() {
    let server = serve(1000).await;
    let stalled =
        futures::stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(b"abc"))]).chain(futures::stream::pending());
    let answer = server.send(with(V1, "snappy"), HttpBody::from_stream(stalled)).await;
    assert_eq!(answer.status, 503, "{answer:?}");
    assert!(answer.text.contains("sent nothing for"), "{answer:?}");

    let broken = futures::stream::iter([Ok(Bytes::from_static(b"abc")), Err(std::io::Error::other("gone"))]);
    let answer = server.send(with(V1, "snappy"), HttpBody::from_stream(broken)).await;
    assert_eq!(answer.status, 503, "{answer:?}");

    let good = snappy(&request(vec![with_sample(&[("__name__", "m")], NOW, 1.0)]).encode_to_vec());
    let others: Vec<_> = (0..8).map(|_| server.receiver.bodies.whole(vec![0; 1 << 20]).unwrap()).collect();
    let full = Request::builder().body(HttpBody::from(good.clone())).unwrap();
    let full = write(State(server.receiver.clone()), full).await;
    assert_eq!((full.status().as_u16(), full.headers()[RETRY_AFTER].to_str().unwrap()), (503, "1"));
    drop(others);
    assert_eq!(server.send(with(V1, "snappy"), good.clone()).await.status, 204);

    server.engine.shutdown(Duration::from_secs(1)).await.unwrap();
    let answer = server.send(with(V1, "snappy"), good).await;
    assert_eq!((answer.status, answer.written), (503, [0; 3]), "{answer:?}");
}

#[tokio::test]
async fn partial_writes() {
    let server = serve(3).await;
    let bad = with_sample(&[("job", "x")], NOW, 1.0);
    let far = with_sample(&[("__name__", "far")], NOW + 700_000, 1.0);
    let good = with_sample(&[("__name__", "good")], NOW, 1.0);
    let partly = request(vec![bad.clone(), good.clone(), far]);
    for (content_type, body) in [(V1, partly.encode_to_vec()), (V2, upgrade(&partly).encode_to_vec())] {
        let answer = server.send(with(content_type, "snappy"), snappy(&body)).await;
        assert_eq!((answer.status, answer.written), (400, [1, 0, 0]), "{answer:?}");
        assert!(answer.text.starts_with("stored 1 samples, 0 histograms and 0 exemplars; refused 2: "), "{answer:?}");
        assert!(answer.text.contains("series {job=\"x\"}: labels: label \"__name__\" is missing"), "{answer:?}");
        assert!(answer.text.contains("series {__name__=\"far\"}: samples: time"), "{answer:?}");
    }
    assert_eq!(server.stored().await, ["good"]);

    let bad = request(vec![bad; 500]).encode_to_vec();
    let answer = server.send(with(V1, "snappy"), snappy(&bad)).await;
    assert_eq!((answer.status, answer.written), (400, [0; 3]), "{answer:?}");
    assert!(answer.text.contains("refused 500: ") && answer.text.ends_with("; and others\n"), "{answer:?}");

    // At the series limit the known series go on.
    let many = ["good", "a", "b", "c", "d"].map(|name| with_sample(&[("__name__", name)], NOW + 1, 2.0));
    let answer = server.send(with(V1, "snappy"), snappy(&request(many.to_vec()).encode_to_vec())).await;
    assert_eq!((answer.status, answer.written), (400, [3, 0, 0]), "{answer:?}");
    assert!(answer.text.contains("series_limit allows 3"), "{answer:?}");
    assert_eq!(server.stored().await, ["a", "b", "good"]);

    let metrics = server.engine.telemetry().encode();
    for line in [
        "thalweg_remote_write_requests_total{status=\"400\"} 4",
        "thalweg_remote_write_rejected_total{reason=\"labels\"} 502",
        "thalweg_remote_write_rejected_total{reason=\"time\"} 2",
        "thalweg_remote_write_rejected_total{reason=\"series_limit\"} 2",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
}

/// Empty requests, requests of metadata alone, and the same request twice.
#[tokio::test]
async fn requests_without_samples_and_resends() {
    let server = serve(1000).await;
    assert_eq!(server.send(with(V1, "snappy"), snappy(&[])).await.status, 204);
    let empty = request(vec![series(&[("__name__", "m")])]).encode_to_vec();
    assert_eq!(server.send(with(V1, "snappy"), snappy(&empty)).await.status, 204);

    let m = v1::MetricMetadata {
        kind: 1,
        metric_family_name: "m".to_owned(),
        help: "help".to_owned(),
        unit: "seconds".to_owned(),
    };
    let metadata = v1::WriteRequest { timeseries: Vec::new(), metadata: vec![m] }.encode_to_vec();
    for _ in 0..2 {
        let answer = server.send(with(V1, "snappy"), snappy(&metadata)).await;
        assert_eq!((answer.status, answer.written), (204, [0; 3]));
    }
    let kept = server.engine.metadata(Some("m"));
    assert_eq!(kept.len(), 1);
    assert_eq!((kept[0].kind.as_str(), kept[0].help.as_str(), kept[0].unit.as_str()), ("counter", "help", "seconds"));
    assert!(server.stored().await.is_empty());

    let sample = request(vec![with_sample(&[("__name__", "m")], NOW, 1.0)]).encode_to_vec();
    for _ in 0..2 {
        let answer = server.send(with(V1, "snappy"), snappy(&sample)).await;
        assert_eq!((answer.status, answer.written), (204, [1, 0, 0]));
    }
    assert_eq!(server.stored().await, ["m"]);
}

/// Requests as real senders sent them.
#[tokio::test]
async fn recorded_requests() {
    let server = serve(10_000).await;
    // Recorded before this clock.
    for (name, samples) in
        [("prometheus-2.42-write-1", 500), ("prometheus-2.42-write-metadata", 0), ("vmagent-1.79-write-1", 513)]
    {
        let path = format!("{}/../tests/payloads/prometheus/{name}.body", env!("CARGO_MANIFEST_DIR"));
        let answer = server.send(with(V1, "snappy"), std::fs::read(path).unwrap()).await;
        assert_eq!((answer.status, answer.written), (204, [samples, 0, 0]), "{name}: {answer:?}");
    }
    assert_eq!(server.engine.metadata(None).len(), 449);
    server.engine.flush().await.unwrap();
    assert!(server.stored().await.len() > 500);
}

/// A pair of servers: both are told that all was stored, as Prometheus counts the rest as failed.
#[tokio::test]
async fn replicas() {
    let mut server = serve(1000).await;
    let replicas = Replicas::new("cluster", "__replica__", Duration::from_secs(30), server.engine.telemetry());
    Arc::get_mut(&mut server.receiver).unwrap().replicas = replicas.map(Arc::new);
    for replica in ["a", "b", "a"] {
        let labels = [("__name__", "m"), ("__replica__", replica), ("cluster", "c")];
        let body = request(vec![with_sample(&labels, NOW, 1.0)]);
        for (content_type, body) in [(V1, body.encode_to_vec()), (V2, upgrade(&body).encode_to_vec())] {
            let answer = server.send(with(content_type, "snappy"), snappy(&body)).await;
            assert_eq!((answer.status, answer.written), (204, [1, 0, 0]), "{answer:?}");
        }
    }
    assert_eq!(server.stored().await, ["m"]);
    let metrics = server.engine.telemetry().encode();
    for line in ["thalweg_remote_write_replica_left_out_total 2", "thalweg_remote_write_replica_failovers_total 0"] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
}
