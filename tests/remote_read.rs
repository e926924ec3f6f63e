//! A real Prometheus without data of its own has us as `remote_read`: what it answers is what we answer.

use std::net::SocketAddr;

use crate::harness::remote_write::{HEADERS, snappy};
use crate::harness::{Client, Process, Server, free_port, now_ms, program, series, wait_for};
use crate::import::histograms;
use crate::prometheus::same;

const QUERIES: [&str; 10] = [
    "load",
    "sum by (job) (rate(requests_total[1m]))",
    "requests_total{instance=~\"[0-4]\",job!=\"a\"}",
    "topk(3, load) > 0",
    "max_over_time(load[2m]) - min_over_time(load[2m])",
    "load offset 5m",
    "avg_over_time(rate(requests_total[1m])[3m:20s])",
    "count({__name__=~\".+\",job!=\"\"})",
    "requests_total and on (instance) load{job=\"b\"}",
    "absent(nothing)",
];

#[test]
fn prometheus_reads_from_us() {
    let Some(prometheus) = program("prometheus") else { return };
    let server = Server::start();
    // Between two milliseconds of anything that is asked for: no sample lies at the edge of a window.
    let end = now_ms() / 60_000 * 60_000 - 60_000;
    let all: Vec<_> = (0..40)
        .map(|i| {
            let (metric, job) = (["load", "requests_total"][i % 2], ["a", "b"][i / 2 % 2]);
            let value =
                |n: i64| if i % 2 == 0 { ((n * 37 + i as i64) % 91) as f64 / 7.0 } else { (n * (i as i64 + 1)) as f64 };
            let samples: Vec<_> = (0..240).map(|n| (end - n * 15_000 - 7_317, value(240 - n))).rev().collect();
            series(metric, &[("instance", &i.to_string()), ("job", job)], &samples)
        })
        .collect();
    server.write(&all);
    // This Prometheus passes over native histograms in what it reads; they must not disturb it.
    let response = server.client().post("/api/v1/write", &HEADERS, &snappy(&histograms(end - 7_317, 3)));
    assert_eq!(response.status, 204);

    let dir = tempfile::tempdir().expect("a temporary folder");
    let config = dir.path().join("prometheus.yml");
    let text = format!("remote_read:\n- url: http://{}/api/v1/read\n  read_recent: true\n", server.http);
    std::fs::write(&config, text).expect("a file");
    let port = free_port();
    let _process = Process::start(
        &prometheus,
        [
            format!("--config.file={}", config.display()),
            format!("--storage.tsdb.path={}", dir.path().join("tsdb").display()),
            format!("--web.listen-address=127.0.0.1:{port}"),
        ],
        &dir.path().join("log"),
    );
    let theirs = SocketAddr::from(([127, 0, 0, 1], port));
    wait_for("Prometheus", || (Client::new(theirs).try_get("/-/ready").ok()?.status == 200).then_some(()));

    let (from, to) = ((end / 1000 - 1800).to_string(), (end / 1000).to_string());
    let ask = |address, path: &str, pairs: &[(&str, &str)]| Client::new(address).form(path, pairs).json();
    for flushed in [false, true] {
        if flushed {
            server.flush();
        }
        for query in QUERIES {
            let instant = [("query", query), ("time", to.as_str())];
            let range = [("query", query), ("start", from.as_str()), ("end", to.as_str()), ("step", "20")];
            for (path, pairs) in [("/api/v1/query", &instant[..]), ("/api/v1/query_range", &range[..])] {
                same(query, &ask(theirs, path, pairs), &ask(server.http, path, pairs));
            }
        }
        let pairs = [("match[]", "load{job=\"a\"}"), ("start", from.as_str()), ("end", to.as_str())];
        let (their, our) = (ask(theirs, "/api/v1/series", &pairs), ask(server.http, "/api/v1/series", &pairs));
        assert_eq!(their["data"].as_array().map(Vec::len), Some(10), "{their}");
        assert_eq!(their["data"], our["data"]);
    }
}
