//! The main job on real input: Prometheus scrapes itself and the node exporter and writes to us; then we answer what it
//! answers.

use std::path::Path;

use serde_json::Value;

use crate::harness::{Client, Process, Server, free_port, now_ms, program, run, wait_for};

/// Queries whose answers must agree, over what such a Prometheus scrapes. Their windows end after every series has begun:
/// where a counter begins within a window, Prometheus 3 extrapolates otherwise than the 2.42 that Debian has.
const QUERIES: [&str; 24] = [
    "up",
    "count({__name__=~\".+\"}) by (job)",
    "node_cpu_seconds_total",
    "sum by (mode) (rate(node_cpu_seconds_total[5s]))",
    "node_memory_MemAvailable_bytes / node_memory_MemTotal_bytes",
    "sum by (handler, code) (increase(prometheus_http_requests_total[6s]))",
    "histogram_quantile(0.9, sum by (le) (rate(prometheus_http_request_duration_seconds_bucket[6s])))",
    "topk(3, process_resident_memory_bytes)",
    "max_over_time(go_goroutines[5s])",
    "avg_over_time(process_resident_memory_bytes{job=\"node\"}[5s])",
    "irate(process_cpu_seconds_total[5s])",
    "changes(up[5s])",
    "go_goroutines offset 3s",
    "scrape_samples_scraped > 100",
    "up == 1 and on (instance) go_goroutines > 0",
    "node_filesystem_avail_bytes * on (instance) group_left (version) go_info",
    "label_replace(up, \"short\", \"$1\", \"instance\", \"(.*):.*\")",
    "absent(nothing_of_this_name)",
    "count_values(\"v\", up)",
    "quantile(0.5, scrape_duration_seconds)",
    "sum(go_memstats_alloc_bytes) without (instance)",
    "max_over_time(rate(prometheus_tsdb_head_samples_appended_total[4s])[4s:2s])",
    "stddev by (job) (scrape_duration_seconds)",
    "sort_desc(go_threads)",
];

struct Peers {
    server: Server,
    prometheus: std::net::SocketAddr,
    _processes: Vec<Process>,
    _dir: tempfile::TempDir,
}

/// Starts everything and waits until some scrapes have come through. Nothing when a program is missing.
fn peers() -> Option<Peers> {
    let (prometheus, exporter) = (program("prometheus")?, program("prometheus-node-exporter")?);
    let server = Server::start();
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (port, exporter_port) = (free_port(), free_port());
    let config = format!(
        "global:\n  scrape_interval: 1s\nscrape_configs:\n\
         - job_name: prometheus\n  static_configs:\n  - targets: ['127.0.0.1:{port}']\n\
         - job_name: node\n  static_configs:\n  - targets: ['127.0.0.1:{exporter_port}']\n\
         remote_write:\n- url: http://{}/api/v1/write\n  queue_config:\n    batch_send_deadline: 1s\n",
        server.http
    );
    let file = dir.path().join("prometheus.yml");
    std::fs::write(&file, config).expect("a file for the configuration");
    let in_dir = |name: &str| dir.path().join(name).display().to_string();
    let processes = vec![
        Process::start(
            &exporter,
            [format!("--web.listen-address=127.0.0.1:{exporter_port}")],
            Path::new(&in_dir("exporter.log")),
        ),
        Process::start(
            &prometheus,
            [
                format!("--config.file={}", file.display()),
                format!("--storage.tsdb.path={}", in_dir("tsdb")),
                format!("--web.listen-address=127.0.0.1:{port}"),
            ],
            Path::new(&in_dir("prometheus.log")),
        ),
    ];
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    wait_for("twenty scrapes in Prometheus", || {
        let answer = Client::new(address).try_get("/api/v1/query?query=min(count_over_time(up%5B1m%5D))").ok()?;
        // While it starts it answers 503 in plain text.
        let answer = (answer.status == 200).then(|| answer.json())?;
        let scrapes: u32 = answer["data"]["result"][0]["value"][1].as_str()?.parse().ok()?;
        (scrapes >= 20).then_some(())
    });
    Some(Peers { server, prometheus: address, _processes: processes, _dir: dir })
}

impl Peers {
    /// Milliseconds before now up to which both have the same samples.
    fn settled(&self) -> i64 {
        // A scrape is stamped when it begins: what began before `now` may still be under way, in both, for a moment.
        let until = now_ms() - 2500;
        let samples = |address| {
            let time = format!("{:.3}", until as f64 / 1000.0);
            let form = [("query", "{__name__=~\".+\"}[20s]"), ("time", time.as_str())];
            let answer = Client::new(address).form("/api/v1/query", &form).json();
            let points =
                answer["data"]["result"].as_array()?.iter().filter_map(|s| Some(s["values"].as_array()?.len()));
            Some(points.sum::<usize>())
        };
        wait_for("the same samples in both", || {
            let (theirs, ours) = (samples(self.prometheus), samples(self.server.http));
            (theirs > Some(0) && theirs == ours).then_some(())
        });
        until
    }
}

/// Series by their labels, so that the order of a vector does not matter.
fn normalised(answer: &Value) -> Vec<(String, Vec<(String, f64)>)> {
    assert_eq!(answer["status"], "success", "{answer}");
    let mut series: Vec<_> = answer["data"]["result"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|one| {
            let mut labels: Vec<String> =
                one["metric"].as_object().into_iter().flatten().map(|(k, v)| format!("{k}={v}")).collect();
            labels.sort();
            let points = one["values"].as_array().cloned().unwrap_or_else(|| vec![one["value"].clone()]);
            let point = |p: &Value| (p[0].to_string(), p[1].as_str().and_then(|v| v.parse().ok()).expect("a number"));
            (labels.join(","), points.iter().map(point).collect())
        })
        .collect();
    series.sort_by(|a, b| a.0.cmp(&b.0));
    series
}

/// Fails unless both answers have the same series, times and values.
pub fn same(query: &str, theirs: &Value, ours: &Value) {
    let (theirs, ours) = (normalised(theirs), normalised(ours));
    assert_eq!(theirs.len(), ours.len(), "{query}: number of series");
    for ((labels, their_points), (our_labels, our_points)) in theirs.iter().zip(&ours) {
        assert_eq!(labels, our_labels, "{query}: labels");
        assert_eq!(their_points.len(), our_points.len(), "{query} {labels}: number of points");
        for (a, b) in their_points.iter().zip(our_points) {
            let close =
                a.1 == b.1 || (a.1.is_nan() && b.1.is_nan()) || (a.1 - b.1).abs() <= 1e-9 * a.1.abs().max(b.1.abs());
            assert!(a.0 == b.0 && close, "{query} {labels}: Prometheus {a:?}, Thalweg {b:?}");
        }
    }
}

#[test]
fn answers_are_those_of_prometheus() {
    let Some(peers) = peers() else { return };
    let until = peers.settled();
    let compare = || {
        // Windows end between two milliseconds of scrapes, where closed and left-open ranges mean the same.
        let (start, end) = (format!("{:.4}", (until - 6_000) as f64 / 1000.0), format!("{:.3}", until as f64 / 1000.0));
        for query in QUERIES {
            let ask = |address, path, pairs: &[(&str, &str)]| Client::new(address).form(path, pairs).json();
            let instant = [("query", query), ("time", end.as_str())];
            let path = "/api/v1/query";
            same(query, &ask(peers.prometheus, path, &instant), &ask(peers.server.http, path, &instant));
            if query.starts_with("sort") {
                continue;
            }
            let range = [("query", query), ("start", start.as_str()), ("end", end.as_str()), ("step", "2")];
            let path = "/api/v1/query_range";
            same(query, &ask(peers.prometheus, path, &range), &ask(peers.server.http, path, &range));
        }
    };
    compare();
    peers.server.flush();
    compare();
    peers.server.compact();
    compare();
    clients_agree(&peers, until);
}

/// `promtool` and `psql` print what Prometheus itself holds.
fn clients_agree(peers: &Peers, until: i64) {
    let (Some(promtool), Some(psql)) = (program("promtool"), program("psql")) else { return };
    let end = format!("{:.3}", until as f64 / 1000.0);
    for query in ["sort(up)", "sum by (job) (scrape_samples_scraped)"] {
        let ask = |address: std::net::SocketAddr| {
            let time = format!("--time={end}");
            let out = run(&promtool, ["query", "instant", &time, &format!("http://{address}"), query]);
            let mut lines: Vec<String> = out.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        assert_eq!(ask(peers.prometheus), ask(peers.server.http), "promtool, {query}");
    }
    let start = format!("{:.3}", (until - 6_000) as f64 / 1000.0);
    let (from, to) = (format!("--start={start}"), format!("--end={end}"));
    for (what, before, after) in [
        ("range", vec![from.as_str(), to.as_str(), "--step=2s"], vec!["go_goroutines"]),
        ("series", vec![from.as_str(), to.as_str(), "--match=up", "--match=go_goroutines"], vec![]),
        ("labels", vec![], vec!["job"]),
    ] {
        let ask = |address: std::net::SocketAddr| {
            let url = format!("http://{address}");
            let arguments = ["query", what].into_iter().chain(before.iter().copied()).chain([url.as_str()]);
            let out = run(&promtool, arguments.chain(after.iter().copied()));
            let mut lines: Vec<String> = out.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        let theirs = ask(peers.prometheus);
        assert!(!theirs.is_empty() && theirs == ask(peers.server.http), "promtool query {what}");
    }
    // Raw samples, bit for bit.
    let metric = "node_memory_MemAvailable_bytes";
    let answer = Client::new(peers.prometheus)
        .form("/api/v1/query", &[("query", &format!("{metric}[10s]")), ("time", &end)])
        .json();
    let theirs: Vec<(i64, f64)> = normalised(&answer)[0]
        .1
        .iter()
        .map(|(time, value)| ((time.parse::<f64>().expect("seconds") * 1000.0).round() as i64, *value))
        .collect();
    let (first, last) = (theirs[0].0, theirs[theirs.len() - 1].0);
    let query =
        format!("SELECT CAST(extract(epoch FROM ts) * 1000 AS bigint), value FROM prometheus.\"{metric}\" ORDER BY ts");
    let port = peers.server.postgres.port().to_string();
    let out = run(
        &psql,
        ["-X", "-At", "-F", " ", "-h", "127.0.0.1", "-p", &port, "-U", "any", "-d", "thalweg", "-c", &query],
    );
    let ours: Vec<(i64, f64)> = out
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(ts, value)| (ts.parse().expect("a time"), value.parse().expect("a value")))
        .filter(|(ts, _)| (first..=last).contains(ts))
        .collect();
    assert_eq!(theirs, ours, "psql, {metric}");
}
