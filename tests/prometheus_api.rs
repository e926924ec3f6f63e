//! The Prometheus API as its clients use it: a Prometheus that scrapes `/federate`, and the requests that Grafana's data
//! source sends.

use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::harness::{Client, Process, Server, free_port, now_ms, program, series, wait_for};

/// Two series now, one an hour ago.
fn fill(server: &Server) -> i64 {
    let now = now_ms();
    server.write(&[
        series("load", &[("instance", "a:1"), ("job", "node")], &[(now - 61_000, 1.0), (now - 1_000, 2.5)]),
        series("load", &[("job", "batch"), ("path", "C:\\\"x\"\n")], &[(now - 2_000, -0.125)]),
        series("load", &[("instance", "old:1"), ("job", "node")], &[(now - 3_600_000, 7.0)]),
    ]);
    now
}

#[test]
fn prometheus_scrapes_federate() {
    let Some(prometheus) = program("prometheus") else { return };
    let server = Server::start();
    fill(&server);
    let dir = tempfile::tempdir().expect("a temporary folder");
    let config = dir.path().join("prometheus.yml");
    let text = format!(
        "global:\n  scrape_interval: 1s\nscrape_configs:\n- job_name: federate\n  honor_labels: true\n  metrics_path: /federate\n  \
         params:\n    match[]: ['load']\n  static_configs:\n  - targets: ['{}']\n",
        server.http
    );
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
    let result = wait_for("a scrape", || {
        // While it starts it refuses, and then answers 503 in plain text.
        let answer = Client::new(theirs).try_get("/api/v1/query?query=load").ok()?;
        let answer = (answer.status == 200).then(|| answer.json())?;
        let result = answer["data"]["result"].as_array()?.clone();
        (!result.is_empty()).then_some(result)
    });
    let mut got: Vec<(Value, Value)> = result.iter().map(|s| (s["metric"].clone(), s["value"][1].clone())).collect();
    got.sort_by_key(|s| s.0["job"].as_str().map(str::to_owned));
    // The empty instance of the second kept the scraper's own away.
    let expected = [
        (json!({"__name__": "load", "job": "batch", "path": "C:\\\"x\"\n"}), json!("-0.125")),
        (json!({"__name__": "load", "instance": "a:1", "job": "node"}), json!("2.5")),
    ];
    assert_eq!(got, expected);
}

/// What the data source asks for when it is saved, when a dashboard is shown, in Explore and for variables.
#[test]
fn grafana_is_answered() {
    let server = Server::start();
    let now = fill(&server) / 1000;
    let (start, end) = ((now - 3600).to_string(), now.to_string());
    let range = [("start", start.as_str()), ("end", end.as_str())];
    let mut client = server.client();
    let mut check = |method: &str, path: &str, pairs: &[(&str, &str)], expected: &dyn Fn(&Value) -> bool| {
        let form = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish();
        let headers = [("Content-Type", "application/x-www-form-urlencoded"), ("X-Grafana-Org-Id", "1")];
        let response = match method {
            "GET" => client.request("GET", &format!("/api/v1/{path}?{form}"), &headers[1..], b""),
            _ => client.request("POST", &format!("/api/v1/{path}"), &headers, form.as_bytes()),
        };
        let response = response.expect("an answer");
        assert_eq!(response.status, 200, "{method} {path} {pairs:?}: {}", response.text());
        let body = response.json();
        assert!(body["status"] == "success" && expected(&body["data"]), "{method} {path} {pairs:?}: {body}");
    };
    let with =
        |more: &[(&'static str, &'static str)]| -> Vec<(&str, &str)> { more.iter().chain(&range).copied().collect() };
    let any = |_: &Value| true;
    check("POST", "query", &[("query", "1+1"), ("time", "4")], &|d| d["result"] == json!([4, "2"]));
    check("GET", "status/buildinfo", &[], &|d| d["version"].is_string());
    check("GET", "rules", &[], &|d| d["groups"] == json!([]));
    check("GET", "metadata", &[("limit", "1000")], &any);
    for method in ["GET", "POST"] {
        let two = |d: &Value| d["result"].as_array().map(Vec::len) == Some(3);
        check(method, "query_range", &with(&[("query", "load"), ("step", "15")]), &two);
        check(method, "query_range", &with(&[("query", "load{job=~\"node|batch\"}"), ("step", "15.000")]), &two);
        check(method, "labels", &with(&[]), &|d| *d == json!(["__name__", "instance", "job", "path"]));
        check(method, "labels", &with(&[("match[]", "{job=\"node\"}")]), &|d| {
            *d == json!(["__name__", "instance", "job"])
        });
        check(method, "series", &with(&[("match[]", "load{job=\"batch\"}"), ("limit", "40000")]), &|d| {
            d[0]["job"] == "batch"
        });
        check(method, "query_exemplars", &with(&[("query", "load")]), &|d| *d == json!([]));
        check(method, "format_query", &[("query", "sum(load)by(job)")], &Value::is_string);
    }
    check("GET", "label/__name__/values", &with(&[("limit", "40000")]), &|d| *d == json!(["load"]));
    check("GET", "label/job/values", &with(&[("match[]", "load")]), &|d| *d == json!(["batch", "node"]));
    check("GET", "label/U__job/values", &with(&[]), &|d| *d == json!(["batch", "node"]));
}
