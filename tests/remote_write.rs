//! Remote write as clients and attackers send it.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use crate::harness::remote_write::{HEADERS, message, snappy};
use crate::harness::{Series, Server, now_ms, series};

#[test]
fn written_samples_are_visible_at_once() {
    let server = Server::start();
    let now = now_ms();
    server.write(&[series("m", &[("a", "1")], &[(now - 10_000, 1.0), (now, f64::INFINITY)])]);
    assert_eq!(server.sql("SELECT count(*) FROM prometheus.m"), ["2"]);
    // Out of order, a repeat, and another value for the same time: the last one wins.
    server.write(&[series("m", &[("a", "1")], &[(now - 20_000, 7.0), (now - 10_000, 1.0), (now, 3.0)])]);
    assert_eq!(server.sql("SELECT value FROM prometheus.m ORDER BY ts"), ["7", "1", "3"]);
    server.flush();
    assert_eq!(server.sql("SELECT value FROM prometheus.m ORDER BY ts"), ["7", "1", "3"]);
    server.write(&[series("m", &[("a", "1")], &[(now - 10_000, 2.0)])]);
    assert_eq!(server.sql("SELECT value FROM prometheus.m ORDER BY ts"), ["7", "2", "3"]);
    server.flush();
    server.compact();
    assert_eq!(server.sql("SELECT value FROM prometheus.m ORDER BY ts"), ["7", "2", "3"]);
}

#[test]
fn refusals_have_the_statuses_that_clients_expect() {
    let server = Server::start();
    let mut client = server.client();
    let now = now_ms();
    let good = snappy(&message(&[series("good", &[], &[(now, 1.0)])]));
    let type_and_encoding = |content_type: &'static str, encoding: &'static str| {
        [("Content-Type", content_type), ("Content-Encoding", encoding), ("X-Prometheus-Remote-Write-Version", "0.1.0")]
    };
    let mut check = |what: &str, headers: &[(&str, &str)], body: &[u8], expected: &[u16]| {
        let response = client.post("/api/v1/write", headers, body);
        assert!(expected.contains(&response.status), "{what}: {} {}", response.status, response.text());
        assert!(response.status < 400 || !response.body.is_empty(), "{what}: {} without a message", response.status);
    };
    check("a good request", &HEADERS, &good, &[204]);
    check("an empty message", &HEADERS, &snappy(b""), &[204]);
    check("another content type", &type_and_encoding("application/json", "snappy"), &good, &[415]);
    check("another encoding", &type_and_encoding("application/x-protobuf", "br"), &good, &[415]);
    check("an unknown message", &type_and_encoding("application/x-protobuf;proto=x.Y", "snappy"), &good, &[415]);
    check("no snappy", &HEADERS, b"\xff\xff\xff\xff\xff\xff", &[400]);
    check("half of a body", &HEADERS, &good[..good.len() / 2], &[400]);
    // Seven bytes that declare 2 GiB: refused before anything is allocated.
    check("a bomb", &HEADERS, &[0x80, 0x80, 0x80, 0x80, 0x08, 0x00, 0x00], &[400, 413]);
    check("no protobuf", &HEADERS, &snappy(b"this is no protobuf"), &[400]);
    let refused = |series: Series| snappy(&message(&[series]));
    check(
        "no metric name",
        &HEADERS,
        &refused(Series { labels: vec![("a".into(), "b".into())], samples: vec![(now, 1.0)] }),
        &[400],
    );
    let double = vec![("__name__".into(), "m".into()), ("a".into(), "1".into()), ("a".into(), "2".into())];
    check("a label twice", &HEADERS, &refused(Series { labels: double, samples: vec![(now, 1.0)] }), &[400]);
    check("an empty label name", &HEADERS, &refused(series("m", &[("", "x")], &[(now, 1.0)])), &[400]);
    let giant = "x".repeat(5 << 20);
    check("a giant label", &HEADERS, &refused(series("m", &[("a", &giant)], &[(now, 1.0)])), &[400, 413]);
    check("a sample of tomorrow", &HEADERS, &refused(series("m", &[], &[(now + 86_400_000, 1.0)])), &[400]);
    assert_eq!(server.client().request("GET", "/api/v1/write", &[], b"").map(|r| r.status).ok(), Some(405));
    assert_eq!(server.sql("SELECT metric, count(*) FROM samples GROUP BY metric"), ["good,1"]);
}

#[test]
fn malformed_chunks_are_refused_for_good() {
    let server = Server::start();
    let headers: String = HEADERS.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let head = format!("POST /api/v1/write HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n{headers}\r\n");
    let check = |body: &str| {
        let mut stream = TcpStream::connect(server.http).expect("a connection");
        // Against hanging alone.
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a connection");
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes())).expect("a request");
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).expect("an answer");
        assert_eq!(String::from_utf8_lossy(&answer), "HTTP/1.1 400", "{body:?}");
    };
    check("zz\r\n");
    check("3\r\nabcdef\r\n0\r\n\r\n");
}

#[test]
fn one_bad_series_does_not_lose_the_others() {
    let server = Server::start();
    let now = now_ms();
    let request = [
        series("good_one", &[], &[(now, 1.0)]),
        series("bad", &[("", "x")], &[(now, 1.0)]),
        series("good_two", &[], &[(now, 1.0)]),
    ];
    let response = server.client().write(&request).expect("the server is up");
    assert_eq!(response.status, 400, "{}", response.text());
    assert_eq!(server.sql("SELECT DISTINCT metric FROM samples ORDER BY metric"), ["good_one", "good_two"]);
}

#[test]
fn recorded_requests_of_real_clients_are_stored() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/payloads/prometheus");
    let mut bodies: Vec<_> =
        std::fs::read_dir(&dir).map(|entries| entries.flatten().map(|e| e.path()).collect()).unwrap_or_default();
    bodies.retain(|path| path.extension().is_some_and(|e| e == "body"));
    let server = Server::start();
    for path in &bodies {
        let body = std::fs::read(path).expect("a readable body");
        let response = server.client().post("/api/v1/write", &HEADERS, &body);
        assert!([200, 204].contains(&response.status), "{}: {} {}", path.display(), response.status, response.text());
    }
    if !bodies.is_empty() {
        assert_ne!(server.sql("SELECT count(*) FROM samples"), ["0"]);
    }
}

#[test]
fn special_values_keep_their_bits() {
    let server = Server::start();
    let now = now_ms();
    let values = [-0.0, f64::NEG_INFINITY, f64::MIN_POSITIVE / 4.0, 1e300, 0.1 + 0.2, f64::NAN];
    let samples: Vec<(i64, f64)> =
        values.iter().enumerate().map(|(i, v)| (now - 60_000 + i as i64 * 1000, *v)).collect();
    server.write(&[series("special", &[], &samples)]);
    let expected = ["-0.0", "-inf", "5.562684646268003e-309", "1e300", "0.30000000000000004", "NaN"];
    let read = || {
        let rows = server.sql("SELECT value FROM prometheus.special ORDER BY ts");
        rows.iter().map(|v| v.parse::<f64>().unwrap_or_else(|_| panic!("{v:?} is no number"))).collect::<Vec<f64>>()
    };
    let want: Vec<u64> = expected.iter().map(|v| v.parse::<f64>().expect("a number").to_bits()).collect();
    let bits = |values: Vec<f64>| values.iter().map(|v| v.to_bits()).collect::<Vec<u64>>();
    assert_eq!(bits(read()), want);
    server.flush();
    assert_eq!(bits(read()), want);
}
