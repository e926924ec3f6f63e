//! The API from outside: requests against a database in a temporary folder.

use std::sync::Arc;

use access::Access;
use arrow::array::{ArrayRef, Float64Array, StringArray, TimestampMillisecondArray, UInt32Array};
use arrow::record_batch::RecordBatch;
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode, header};
use axum::response::Response;
use catalog::tables::{EXEMPLARS, SAMPLES};
use catalog::{ManualClock, TableSchema, TagRef};
use engine::memory::Kind;
use engine::{Batch, Components, MetricMetadata, Settings, Telemetry, Write};
use serde_json::{Value, json};
use tempfile::TempDir;
use tower::ServiceExt;

use super::*;

mod layouts;

/// The clock of all tests, milliseconds since the epoch: 2026-01-02T03:04:05Z.
pub(super) const NOW: i64 = 1_767_323_045_000;

pub(super) struct Server {
    router: Router,
    pub(super) engine: Engine,
    _folder: TempDir,
}

fn disk() -> Arc<dyn catalog::FileSystem> {
    Arc::new(catalog::fs::Disk)
}

/// An empty database; all have the same seed.
async fn open() -> (Engine, TempDir) {
    open_with(|_| ()).await
}

async fn open_with(set: impl FnOnce(&mut Settings)) -> (Engine, TempDir) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let url = url::Url::from_directory_path(folder.path().join("store")).expect("an absolute path").to_string();
    let mut settings = Settings {
        data_dir: folder.path().join("data"),
        store_location: catalog::object::location(&url).expect("a location"),
        memory_limit: 256 << 20,
        cpu_threads: 2,
        ..Settings::default()
    };
    set(&mut settings);
    let components = Components {
        store: catalog::object::open(&disk(), &url).expect("a store"),
        fs: disk(),
        clock: Arc::new(ManualClock::new(NOW)),
        entropy: Arc::new(catalog::SeededEntropy::new(1)),
        telemetry: Arc::new(Telemetry::default()),
    };
    (
        Engine::open(settings, components, crate::extensions(crate::Settings::default())).await.expect("a database"),
        folder,
    )
}

/// A server whose database holds `up` and `requests` of two instances, once a minute for an hour until [`NOW`].
pub(super) async fn serve() -> Server {
    serve_with(|_| ()).await
}

/// The same with other settings.
pub(super) async fn serve_with(set: impl FnOnce(&mut Settings)) -> Server {
    let (engine, folder) = open_with(set).await;
    fill(&engine).await;
    let router = routes(engine.clone(), crate::Settings::default()).behind(Access::open());
    Server { router, engine, _folder: folder }
}

async fn fill(engine: &Engine) {
    let registry = engine.registry().clone();
    let mut encoder = registry.encoder();
    let mut set = |pairs: &[(&str, &str)]| encoder.tags(&mut pairs.to_vec(), None).expect("valid labels");
    let mut samples: Vec<(TagRef, i64, f64)> = Vec::new();
    let mut exemplars: Vec<(TagRef, i64, f64, &str)> = Vec::new();
    for (instance, slope) in [("a:1", 60.0), ("b:1", 120.5)] {
        let up = set(&[("__name__", "up"), ("instance", instance), ("job", "node")]);
        let requests =
            set(&[("__name__", "requests"), ("http.route", "/x"), ("instance", instance), ("job", "api\"1\"")]);
        for minute in 0..=60 {
            let ts = NOW - (60 - minute) * 60_000;
            samples.push((up, ts, 1.0));
            samples.push((requests, ts, minute as f64 * slope));
        }
        exemplars.push((requests, NOW - 5_500, 0.25, r#"{"trace_id":"abc"}"#));
        exemplars.push((requests, NOW - 65_500, 0.5, "{}"));
    }
    let tags = encoder.finish();
    let times = |ts: Vec<i64>| Arc::new(TimestampMillisecondArray::from(ts).with_timezone("UTC"));
    let samples = batch(
        &SAMPLES,
        vec![
            Arc::new(samples.iter().map(|s| s.0).collect::<UInt32Array>()),
            times(samples.iter().map(|s| s.1).collect()),
            Arc::new(samples.iter().map(|s| s.2).collect::<Float64Array>()),
        ],
    );
    let exemplars = batch(
        &EXEMPLARS,
        vec![
            Arc::new(exemplars.iter().map(|e| e.0).collect::<UInt32Array>()),
            times(exemplars.iter().map(|e| e.1).collect()),
            Arc::new(exemplars.iter().map(|e| e.2).collect::<Float64Array>()),
            Arc::new(StringArray::from_iter_values(exemplars.iter().map(|e| e.3))),
        ],
    );
    let metadata = vec![MetricMetadata {
        metric: "requests".into(),
        kind: "counter".into(),
        help: "Requests \"served\"".into(),
        unit: String::new(),
    }];
    engine.write(Write { tags, batches: vec![samples, exemplars], metadata }).await.expect("stored");
}

pub(super) fn batch(table: &Arc<TableSchema>, columns: Vec<ArrayRef>) -> Batch {
    let rows = RecordBatch::try_new(table.arrow().clone(), columns).expect("rows of the table");
    Batch { table: table.clone(), rows }
}

impl Server {
    pub(super) async fn send(&self, request: Request<Body>) -> Response {
        self.router.clone().oneshot(request).await.expect("routers do not fail")
    }

    async fn get(&self, path: &str) -> (StatusCode, Value) {
        // Characters that tests are easier to read with.
        let path = path.replace('"', "%22").replace('{', "%7B").replace('}', "%7D").replace(' ', "%20");
        let request = Request::get(format!("/api/v1/{path}")).body(Body::empty()).expect("a request");
        let response = self.send(request).await;
        (response.status(), body(response).await)
    }

    async fn post(&self, path: &str, content_type: &str, form: &str) -> (StatusCode, Value) {
        let request = Request::post(format!("/api/v1/{path}"))
            .header(header::CONTENT_TYPE, content_type)
            .body(Body::from(form.to_owned()))
            .expect("a request");
        let response = self.send(request).await;
        (response.status(), body(response).await)
    }

    /// The data of a successful answer.
    async fn data(&self, path: &str) -> Value {
        let (status, mut body) = self.get(path).await;
        assert_eq!((status, &body["status"]), (StatusCode::OK, &json!("success")), "{path}: {body}");
        assert_eq!(body.as_object().map(|o| o.len()), Some(2), "{path} has annotations: {body}");
        body["data"].take()
    }
}

async fn body(response: Response) -> Value {
    let json = response.headers().get(header::CONTENT_TYPE).is_some_and(|t| t == "application/json");
    let bytes = to_bytes(response.into_body(), usize::MAX).await.expect("a body");
    if json { serde_json::from_slice(&bytes).expect("JSON") } else { Value::Null }
}

#[tokio::test]
async fn columns_of_other_tables_are_metrics() {
    let server = serve().await;
    let metric = "prometheus__exemplars__value";
    // In memory, then in a file.
    for _ in 0..2 {
        let at = format!("time={}", NOW / 1000);
        let query = async |text: &str| {
            let data = server.data(&format!("query?query={}&{at}", text.replace('+', "%2B"))).await;
            let one = |r: &Value| (r["metric"].clone(), r["value"][1].as_str().unwrap_or_default().to_owned());
            let mut all: Vec<_> = data["result"].as_array().expect("a list").iter().map(one).collect();
            all.sort_by_key(|(labels, _)| labels.to_string());
            all
        };
        let labels = |instance: &str| json!({"__name__": metric, "http.route": "/x", "instance": instance, "job": "api\"1\"", "metric": "requests"});
        let both = [(labels("a:1"), "0.25".to_owned()), (labels("b:1"), "0.25".to_owned())];
        assert_eq!(query(metric).await, both);
        assert_eq!(query(&format!("{{__name__=\"{metric}\"}}")).await, both);
        assert_eq!(query(&format!("{metric}{{instance=\"b:1\"}}")).await, both[1..]);
        assert_eq!(query(&format!("{metric}{{metric=\"requests\"}}")).await, both);
        assert!(query(&format!("{metric}{{metric!=\"requests\"}}")).await.is_empty());
        assert_eq!(query(&format!("{metric}{{metric=~\"req.*\",instance!~\"b.*\"}}")).await, both[..1]);
        let plain = |value: &str| vec![(json!({}), value.to_owned())];
        assert_eq!(query(&format!("sum({metric})")).await, plain("0.5"));
        assert_eq!(query(&format!("sum(sum_over_time({metric}[5m]))")).await, plain("1.5"));
        assert_eq!(query(&format!("count(count_over_time({metric}[1m]) == 1)")).await, plain("2"));
        assert_eq!(query(&format!("sum(max_over_time({metric}[10m:5s] offset 30s))")).await, plain("1"));
        assert_eq!(query(&format!("sum({metric} * on(instance) group_left up)")).await, plain("0.5"));
        assert_eq!(query(&format!("absent({metric}{{job=\"x\"}})")).await, [(json!({"job": "x"}), "1".to_owned())]);
        // Regular expressions choose among the series of samples.
        assert!(query("count({__name__=~\"prometheus.*\"})").await.is_empty());
        assert_eq!(query("count({__name__=~\".%2B\"})").await, plain("4"));

        let range = format!("query_range?query={metric}{{instance=\"a:1\"}}&start={0}&end={0}&step=1", NOW / 1000);
        assert_eq!(server.data(&range).await["result"][0]["metric"], labels("a:1"));
        let matrix = server.data(&format!("query?query={metric}{{instance=\"a:1\"}}[5m]&{at}")).await;
        assert_eq!(matrix["result"][0]["values"].as_array().map(Vec::len), Some(2));

        let check = async |path: &str, expected: Value| assert_eq!(server.data(path).await, expected, "{path}");
        check(&format!("series?match[]={metric}"), json!([labels("a:1"), labels("b:1")])).await;
        check(&format!("series?match[]={metric}{{metric=\"up\"}}"), json!([])).await;
        check(&format!("labels?match[]={metric}"), json!(["__name__", "http.route", "instance", "job", "metric"]))
            .await;
        check("label/metric/values", json!(["requests"])).await;
        check(&format!("label/instance/values?match[]={metric}"), json!(["a:1", "b:1"])).await;
        check(&format!("label/__name__/values?match[]={metric}"), json!([metric])).await;
        check("label/__name__/values?start=0&end=1", json!([])).await;
        server.engine.flush().await.expect("a flush");
    }
}

#[tokio::test]
async fn labels_and_series() {
    let server = serve().await;
    let check = async |path: &str, expected: Value| assert_eq!(server.data(path).await, expected, "{path}");
    let instances = json!(["a:1", "b:1"]);
    check("labels", json!(["__name__", "http.route", "instance", "job", "metric"])).await;
    check("labels?match[]=up", json!(["__name__", "instance", "job"])).await;
    check("labels?match[]=up&match[]=requests", json!(["__name__", "http.route", "instance", "job"])).await;
    check("labels?match[]=nothing", json!([])).await;
    check("label/__name__/values", json!(["prometheus__exemplars__value", "requests", "up"])).await;
    check("label/job/values", json!(["api\"1\"", "node"])).await;
    check("label/instance/values?match[]=up", instances.clone()).await;
    check("label/instance/values?match%5B%5D=%7Binstance%3D~%22a.%2A%22%7D", json!(["a:1"])).await;
    check("label/absent/values", json!([])).await;
    check("label/http.route/values", json!(["/x"])).await;
    check("label/U__http_2e_route/values", json!(["/x"])).await;
    check("label/instance/values?start=0&end=1767323045.5", instances.clone()).await;
    check("label/instance/values?start=0&end=1", json!([])).await;
    check("label/instance/values?start=1831235425.075814&end=1831235426", json!([])).await;
    check(
        "series?match[]=up&match[]={instance=\"a:1\"}",
        json!([
            {"__name__": "requests", "http.route": "/x", "instance": "a:1", "job": "api\"1\""},
            {"__name__": "up", "instance": "a:1", "job": "node"},
            {"__name__": "up", "instance": "b:1", "job": "node"},
        ]),
    )
    .await;
    for path in ["labels?limit=1", "label/instance/values?limit=1", "series?match[]=up&limit=1"] {
        let (status, body) = server.get(path).await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(body["data"].as_array().map(Vec::len), Some(1), "{path}");
        assert_eq!(body["warnings"], json!(["results truncated due to limit"]), "{path}");
    }
    check("labels?limit=5", json!(["__name__", "http.route", "instance", "job", "metric"])).await;
    check("labels?limit=0", json!(["__name__", "http.route", "instance", "job", "metric"])).await;
    let form = "application/x-www-form-urlencoded";
    let (_, body) = server.post("series", form, "match%5B%5D=up&start=0&end=2e9&limit=9").await;
    assert_eq!(body["data"].as_array().map(Vec::len), Some(2), "{body}");
    let (_, body) = server.post("labels", form, "match%5B%5D=up").await;
    assert_eq!(body["data"], json!(["__name__", "instance", "job"]));

    server.engine.flush().await.expect("flushed");
    check("labels", json!(["__name__", "http.route", "instance", "job", "metric"])).await;
    check("label/instance/values?match[]=up", instances).await;
}

#[tokio::test]
async fn what_is_not_a_query() {
    let server = serve().await;
    let check = async |path: &str, expected: Value| assert_eq!(server.data(path).await, expected, "{path}");
    let requests = json!({"requests": [{"type": "counter", "help": "Requests \"served\"", "unit": ""}]});
    check("metadata", requests.clone()).await;
    check("metadata?metric=requests&limit=1&limit_per_metric=1", requests).await;
    check("metadata?metric=up", json!({})).await;
    check("metadata?limit=0", json!({})).await;
    check("rules", json!({"groups": []})).await;
    check("rules?type=alert&exclude_alerts=true&match[]=up&group_limit=5", json!({"groups": []})).await;
    check("alerts", json!({"alerts": []})).await;
    check("alertmanagers", json!({"activeAlertmanagers": [], "droppedAlertmanagers": []})).await;
    check("targets?state=active", json!({"activeTargets": [], "droppedTargets": [], "droppedTargetCounts": {}})).await;
    check("targets/metadata?match_target={job=\"x\"}&metric=up&limit=2", json!([])).await;
    check("scrape_pools", json!({"scrapePools": []})).await;
    check("notifications", json!([])).await;
    check("status/walreplay", json!({"min": 0, "max": 0, "current": 0})).await;
    assert_eq!(server.data("features").await["promql"]["at_modifier"], true);
    let found = json!([
        {"labels": {}, "value": "0.5", "timestamp": 1767322979.5},
        {"labels": {"trace_id": "abc"}, "value": "0.25", "timestamp": 1767323039.5},
    ]);
    let labels = |i: &str| json!({"__name__": "requests", "http.route": "/x", "instance": i, "job": "api\"1\""});
    check(
        "query_exemplars?query=rate(requests[5m])%2Brequests",
        json!([
            {"seriesLabels": labels("a:1"), "exemplars": found},
            {"seriesLabels": labels("b:1"), "exemplars": found},
        ]),
    )
    .await;
    check(
        "query_exemplars?query=requests{instance=\"b:1\"}&start=1767322979&end=1767322980",
        json!([{"seriesLabels": labels("b:1"), "exemplars": [found[0]]}]),
    )
    .await;
    check("query_exemplars?query=up", json!([])).await;
    assert_eq!(server.get("query_exemplars?query=1").await, (StatusCode::NO_CONTENT, Value::Null));
    let info = server.data("status/buildinfo").await;
    assert!(info["version"].as_str().is_some_and(|v| v.starts_with("3.")), "{info}");
    assert_eq!(info.as_object().map(|o| o.len()), Some(6));
    let tsdb = server.data("status/tsdb?limit=1").await;
    assert_eq!(tsdb["headStats"]["numSeries"], 4);
    assert_eq!(tsdb["headStats"]["numLabelPairs"], 7);
    assert!(tsdb["headStats"]["chunkCount"].as_u64().is_some_and(|n| n >= 4), "{tsdb}");
    assert_eq!((&tsdb["headStats"]["minTime"], &tsdb["headStats"]["maxTime"]), (&json!(NOW - 3_600_000), &json!(NOW)));
    assert_eq!(tsdb["seriesCountByMetricName"], json!([{"name": "requests", "value": 2}]));
    assert_eq!(tsdb["labelValueCountByLabelName"], json!([{"name": "__name__", "value": 2}]));
    assert_eq!(tsdb["memoryInBytesByLabelName"], json!([{"name": "__name__", "value": 20}]));
    assert_eq!(tsdb["seriesCountByLabelValuePair"], json!([{"name": "__name__=requests", "value": 2}]));
    assert_eq!(server.data("status/runtimeinfo").await["timeSeriesCount"], 4);
    assert_eq!(server.data("status/flags").await["query.lookback-delta"], "300s");
    check("format_query?query=up%2Bup", json!("up + up")).await;
    assert_eq!(server.data("parse_query?query=up%2Bup").await["type"], "binaryExpr");
}

#[tokio::test]
async fn wrong_requests() {
    let server = serve().await;
    let check = async |path: &str, expected: &str| {
        let (status, body) = server.get(path).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{path}: {body}");
        assert_eq!(body, json!({"status": "error", "errorType": "bad_data", "error": expected}), "{path}");
    };
    let time = |p: &str| format!("invalid parameter {p:?}: cannot parse \"x\" to a valid timestamp");
    let optional = |p: &str| {
        format!("invalid parameter {p:?}: invalid time value for '{p}': cannot parse \"x\" to a valid timestamp")
    };
    check("query?query=up&time=x", &optional("time")).await;
    check("query?query=up&timeout=x", "invalid parameter \"timeout\": cannot parse \"x\" to a valid duration").await;
    check("query?query=up&limit=-1", "invalid parameter \"limit\": limit must be non-negative").await;
    check(
        "query?query=up&lookback_delta=x",
        "error parsing lookback delta duration: cannot parse \"x\" to a valid duration",
    )
    .await;
    check("query_range?query=up&start=x&end=1&step=1", &time("start")).await;
    check("query_range?query=up&start=1&end=x&step=1", &time("end")).await;
    check(
        "query_range?query=up&start=1&end=2&step=x",
        "invalid parameter \"step\": cannot parse \"x\" to a valid duration",
    )
    .await;
    let after = "invalid parameter \"end\": end timestamp must not be before start time";
    check("query_range?query=up&start=2&end=1&step=1", after).await;
    let step = "invalid parameter \"step\": zero or negative query resolution step widths are not accepted. Try a positive integer";
    check("query_range?query=up&start=1&end=2&step=0", step).await;
    check("query_range?query=up&start=1&end=2&step=-5", step).await;
    let points =
        "exceeded maximum resolution of 11,000 points per timeseries. Try decreasing the query resolution (?step=XX)";
    check("query_range?query=up&start=0&end=11001&step=1", points).await;
    check("query_range?query=up&start=-9e15&end=9e15&step=1", points).await;
    check("series", "no match[] parameter provided").await;
    let empty = "match[] must contain at least one non-empty matcher";
    check("series?match[]={}", &format!("invalid parameter \"match[]\": {empty}")).await;
    check("labels?match[]={job=~\".*\"}", empty).await;
    check("labels?start=x", &optional("start")).await;
    check("label/job/values?end=x", &optional("end")).await;
    check("label/U__/values", "invalid label name: \"\"").await;
    check("query_exemplars?query=up&start=2&end=1", "end timestamp must not be before start timestamp").await;
    check("metadata?limit=x", "limit must be a number").await;
    check("rules?type=x", "invalid parameter \"type\": not supported value \"x\"").await;
    check("rules?group_limit=0", "invalid parameter \"group_limit\": group_limit needs to be greater than 0").await;
    check(
        "rules?group_next_token=x",
        "invalid parameter \"group_next_token\": group_limit needs to be present in order to paginate over the groups",
    )
    .await;
    check(
        "rules?exclude_alerts=x",
        "invalid parameter \"exclude_alerts\": error converting exclude_alerts: strconv.ParseBool: parsing \"x\": invalid syntax",
    )
    .await;
    check("targets/metadata?limit=x", "limit must be a number").await;
    check("status/tsdb?limit=0", "limit must be a positive number").await;
    check("status/tsdb?limit=10001", "limit must not exceed 10000").await;

    let (status, _) = server.post("metadata", "text/plain", "").await;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED);
    let (status, _) = server.get("nothing").await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    let huge = "x".repeat((10 << 20) + 1);
    let (status, _) = server.post("query", "application/x-www-form-urlencoded", &huge).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn federation() {
    let server = serve().await;
    let get = async |path: &str, accept: &str| {
        let request = Request::get(path).header(header::ACCEPT, accept).body(Body::empty()).expect("a request");
        let response = server.send(request).await;
        let kind = response.headers()[header::CONTENT_TYPE].to_str().expect("a text").to_owned();
        let status = response.status();
        let body = to_bytes(response.into_body(), usize::MAX).await.expect("a body");
        (status, kind, String::from_utf8(body.to_vec()).expect("UTF-8"))
    };
    // A series that both select comes once.
    let path = "/federate?match[]=up&match[]=%7Binstance%3D%22a%3A1%22%7D";
    let (status, kind, text) =
        get(path, "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5").await;
    assert_eq!(
        (status, kind.as_str()),
        (StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8; escaping=underscores")
    );
    assert_eq!(
        text,
        format!(
            "# TYPE requests untyped\nrequests{{http_route=\"/x\",instance=\"a:1\",job=\"api\\\"1\\\"\"}} 3600 {NOW}\n\
             # TYPE up untyped\nup{{instance=\"a:1\",job=\"node\"}} 1 {NOW}\nup{{instance=\"b:1\",job=\"node\"}} 1 {NOW}\n"
        )
    );
    let (_, kind, text) = get(path, "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.6").await;
    assert_eq!(kind, "text/plain; version=1.0.0; charset=utf-8; escaping=allow-utf-8");
    assert!(text.contains("requests{\"http.route\"=\"/x\","), "{text}");
    assert_eq!(get("/federate", "*/*").await.2, "");
    let (status, _, text) = get("/federate?match[]=up%7B", "*/*").await;
    assert!(
        status == StatusCode::BAD_REQUEST && text.starts_with("invalid parameter \"match[]\": "),
        "{status} {text}"
    );
}

#[tokio::test]
async fn answers_are_compressed_and_shared_when_asked() {
    let server = serve().await;
    let request = |path: &str, encoding: &str| {
        Request::get(format!("/api/v1/{path}"))
            .header(header::ACCEPT_ENCODING, encoding)
            .header(header::ORIGIN, "http://dashboards.example")
            .body(Body::empty())
            .expect("a request")
    };
    let long = "query_range?query=requests&start=1767319445&end=1767323045&step=30";
    let encoding = |r: &Response| r.headers().get(header::CONTENT_ENCODING).cloned();
    let response = server.send(request(long, "gzip, deflate")).await;
    assert_eq!(encoding(&response).expect("compressed"), "gzip");
    assert_eq!(response.headers()[header::ACCESS_CONTROL_ALLOW_ORIGIN], "*");
    let bytes = to_bytes(response.into_body(), usize::MAX).await.expect("a body");
    assert_eq!(bytes[..2], [0x1f, 0x8b]);
    assert_eq!(encoding(&server.send(request(long, "identity")).await), None);
    assert_eq!(encoding(&server.send(request("query?query=1", "gzip")).await), None, "short answers stay as they are");
    let preflight = Request::options("/api/v1/query")
        .header(header::ORIGIN, "http://dashboards.example")
        .header(header::ACCESS_CONTROL_REQUEST_METHOD, "POST")
        .body(Body::empty())
        .expect("a request");
    let response = server.send(preflight).await;
    assert!(response.status().is_success());
    assert_eq!(response.headers()[header::ACCESS_CONTROL_ALLOW_METHODS], "GET,POST,OPTIONS");
}

#[tokio::test]
async fn queries() {
    let server = serve().await;
    let check = async |path: &str, expected: Value| assert_eq!(server.data(path).await, expected, "{path}");
    let up = |instance: &str| json!({"__name__": "up", "instance": instance, "job": "node"});
    check(
        "query?query=up{instance=\"a:1\"}",
        json!({"resultType": "vector", "result": [{"metric": up("a:1"), "value": [1767323045, "1"]}]}),
    )
    .await;
    check("query?query=1%2B1", json!({"resultType": "scalar", "result": [1767323045, "2"]})).await;
    check("query?query=\"a\"&time=7.25", json!({"resultType": "string", "result": [7.25, "a"]})).await;
    check("query?query=up&time=7", json!({"resultType": "vector", "result": []})).await;
    check(
        "query?query=up{instance=\"a:1\"}[2m]&time=2026-01-02T03:04:05Z",
        json!({"resultType": "matrix", "result": [
            {"metric": up("a:1"), "values": [[1767322985, "1"], [1767323045, "1"]]},
        ]}),
    )
    .await;
    check(
        "query_range?query=requests{instance=\"b:1\"}&start=1767319445&end=1767319565&step=1m",
        json!({"resultType": "matrix", "result": [{
            "metric": {"__name__": "requests", "http.route": "/x", "instance": "b:1", "job": "api\"1\""},
            "values": [[1767319445, "0"], [1767319505, "120.5"], [1767319565, "241"]],
        }]}),
    )
    .await;
    // Half a minute after the last sample it is seen with the default lookback, not with one of 10 s.
    check(
        "query?query=count(up)&time=1767323075",
        json!({"resultType": "vector", "result": [{"metric": {}, "value": [1767323075, "2"]}]}),
    )
    .await;
    check("query?query=count(up)&time=1767323075&lookback_delta=10s", json!({"resultType": "vector", "result": []}))
        .await;

    let (status, body) = server.get("query?query=up&limit=1&stats=true").await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(body["data"]["result"].as_array().map(Vec::len), Some(1));
    assert_eq!(body["warnings"], json!(["results truncated due to limit"]));
    assert!(body["data"]["stats"]["timings"]["evalTotalTime"].is_number(), "{body}");
    assert!(body["data"]["stats"]["samples"]["totalQueryableSamples"].is_number(), "{body}");
    let per_step = async |path: &str, expected: &[u64], peak: u64| {
        let (status, body) = server.get(&format!("{path}&stats=all")).await;
        assert_eq!(status, StatusCode::OK, "{path}");
        let samples = &body["data"]["stats"]["samples"];
        let steps = samples["totalQueryableSamplesPerStep"].as_array().expect("steps");
        let counts: Vec<u64> = steps.iter().filter_map(|step| step[1].as_u64()).collect();
        assert_eq!(counts, expected, "{path}");
        assert_eq!(steps.last().map(|step| &step[0]), Some(&json!(1_767_323_045)), "{path}");
        assert_eq!(samples["totalQueryableSamples"], expected.iter().sum::<u64>(), "{path}");
        assert_eq!(samples["peakSamples"], peak, "{path}");
    };
    let range = |query: &str| format!("query_range?query={query}&start=1767322925&end=1767323045&step=1m");
    per_step("query?query=1", &[0], 1).await;
    per_step("query?query=up", &[2], 2).await;
    per_step("query?query=up[5m]", &[10], 10).await;
    per_step("query?query=sum(max_over_time(up[5m]))", &[10], 1).await;
    per_step("query?query=max_over_time(up[5m:1m])", &[10], 2).await;
    per_step("query?query=max_over_time(rate(up[2m])[3m:1m])", &[6], 2).await;
    per_step("query?query=max_over_time(up[5m])[3m:1m]", &[30], 6).await;
    per_step(&range("up"), &[2, 2, 2], 6).await;
    per_step(&range("count_over_time(up[2m])"), &[4, 4, 4], 6).await;
    per_step(&range("sum(up @ 1767323000)"), &[2, 2, 2], 3).await;
    let (_, body) = server.get("query?query=1&stats=yes").await;
    assert!(body["warnings"][0].as_str().is_some_and(|w| w.contains("is deprecated")), "{body}");

    // As promtool and vmalert send them.
    let form = "application/x-www-form-urlencoded";
    let (status, body) = server.post("query", form, "query=count%28up%29&time=1767323045.5").await;
    assert_eq!((status, &body["data"]["result"][0]["value"]), (StatusCode::OK, &json!([1767323045.5, "2"])), "{body}");
    let path = "query?query=sum+by+%28job%29+%28up%29&step=300s&time=1767323045";
    let (status, body) = server.post(path, "application/json", "").await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(body["data"]["result"], json!([{"metric": {"job": "node"}, "value": [1767323045, "2"]}]));

    for query in ["", "up%2B", "rate(up)", "nosuch(up)"] {
        let (status, body) = server.get(&format!("query?query={query}")).await;
        assert_eq!((status, &body["errorType"]), (StatusCode::BAD_REQUEST, &json!("bad_data")), "{query}: {body}");
        let error = body["error"].as_str().unwrap_or("");
        assert!(error.starts_with("invalid parameter \"query\": "), "{error}");
    }
    let (status, body) = server.get("query?query=up%20%2B%20on(job)%20up").await;
    assert_eq!((status, &body["errorType"]), (StatusCode::UNPROCESSABLE_ENTITY, &json!("execution")), "{body}");
    let (status, body) = server.get("query?query=up&timeout=0s").await;
    assert_eq!((status, &body["errorType"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("timeout")), "{body}");

    let metrics = server.engine.telemetry().encode();
    assert!(metrics.contains(r#"thalweg_promql_requests_total{endpoint="query",outcome="timeout"} 1"#), "{metrics}");
}

/// Whatever a text's nesting, it is answered or refused: neither ends the process.
#[tokio::test]
async fn nested_queries() {
    let server = serve().await;
    for (before, after) in [("(", ")"), ("-", ""), ("1+", ""), ("abs(", ")"), ("1^", ""), ("sum(", ")"), ("up or ", "")]
    {
        for levels in [30, 500, 100_000] {
            let query = format!("{}up{}", before.repeat(levels), after.repeat(levels)).replace('+', "%2B");
            let form = "application/x-www-form-urlencoded";
            let (status, body) = server.post("query", form, &format!("query={query}")).await;
            if levels == 30 {
                assert_eq!(status, StatusCode::OK, "{before} {body}");
            } else if levels == 100_000 {
                assert_eq!(
                    (status, &body["errorType"]),
                    (StatusCode::BAD_REQUEST, &json!("bad_data")),
                    "{before} {body}"
                );
            }
            for path in ["format_query", "query_exemplars"] {
                let (status, _) = server.post(path, form, &format!("query={query}")).await;
                assert_eq!(status.is_success(), levels < 1000, "{path} {before} {levels}");
            }
        }
    }
}

#[tokio::test]
async fn deleting_series() {
    let server = serve().await;
    let form = "application/x-www-form-urlencoded";
    let delete = |text: &'static str| server.post("admin/tsdb/delete_series", form, text);
    let count = async || {
        let data = server.data("query?query=sum(count_over_time({__name__=~\".%2B\"}[2h]))&time=1767323045").await;
        data["result"][0]["value"][1].as_str().map_or(0, |v| v.parse::<i64>().expect("a number"))
    };
    assert_eq!(count().await, 4 * 61);
    // What is refused, in Prometheus's words.
    for (text, message) in [
        ("", "no match[] parameter provided"),
        (
            "match[]=up&start=x",
            "invalid parameter \"start\": invalid time value for 'start': cannot parse \"x\" to a valid timestamp",
        ),
        ("match[]=up{", "invalid parameter \"match[]\": 1:4: parse error: unexpected end of input inside braces"),
        ("match[]={}", "invalid parameter \"match[]\": match[] must contain at least one non-empty matcher"),
    ] {
        let (status, body) = delete(text).await;
        assert_eq!((status, &body["errorType"]), (StatusCode::BAD_REQUEST, &json!("bad_data")), "{text}: {body}");
        assert!(body["error"].as_str().is_some_and(|e| e.starts_with(message)), "{text}: {body}");
    }
    assert_eq!(server.get("admin/tsdb/delete_series?match[]=up").await.0, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(count().await, 4 * 61);
    // Both ends are part of the range.
    let ten_minutes = "match[]=up{instance=\"a:1\"}&match[]=nothing&start=1767322445&end=1767323045";
    assert_eq!(delete(ten_minutes).await, (StatusCode::NO_CONTENT, Value::Null));
    assert_eq!(count().await, 4 * 61 - 11);
    let put = Request::put("/api/v1/admin/tsdb/delete_series?match[]=requests").body(Body::empty()).expect("a request");
    assert_eq!(server.send(put).await.status(), StatusCode::NO_CONTENT);
    assert_eq!(count().await, 2 * 61 - 11);
    let exemplars = "query_exemplars?query=requests&start=0&end=1767323045";
    assert_eq!(server.data(exemplars).await, json!([]));
    assert_eq!(server.post("admin/tsdb/clean_tombstones", form, "").await.0, StatusCode::NO_CONTENT);
    assert_eq!(count().await, 2 * 61 - 11);
    // What has no row left has no name, once it is out of files and memory.
    assert_eq!(server.data("label/__name__/values").await, json!(["up"]));
    // A row that comes later stays.
    fill(&server.engine).await;
    assert_eq!(count().await, 4 * 61);
}

#[tokio::test]
async fn a_query_without_memory_is_refused_and_gives_back_what_it_had() {
    let server = serve().await;
    let memory = server.engine.memory().clone();
    let mut others = memory.reserve(Kind::Queries);
    others.force(memory.limit() / 16 * 9);
    let paths = [
        "query?query=up",
        "query?query=sum(up)",
        "query?query=up+*+up",
        "series?match[]=up",
        "labels",
        "label/instance/values",
        "label/instance/values?match[]=up",
        "query_exemplars?query=requests",
        "status/tsdb",
    ];
    for path in paths {
        let (status, body) = server.get(path).await;
        assert_eq!((status, &body["errorType"]), (StatusCode::UNPROCESSABLE_ENTITY, &json!("execution")), "{body}");
        assert!(body["error"].as_str().is_some_and(|e| e.contains("memory_limit is")), "{body}");
        assert_eq!(memory.held(Kind::Queries), others.bytes(), "{path}");
    }
    drop(others);
    for path in paths {
        let request = Request::get(format!("/api/v1/{}", path.replace(' ', "%20"))).body(Body::empty());
        let response = server.send(request.expect("a request")).await;
        assert_eq!(response.status(), StatusCode::OK, "{path}");
        let held = memory.held(Kind::Queries);
        let body = to_bytes(response.into_body(), usize::MAX).await.expect("a body");
        assert!(held >= body.len(), "{path}: {held} bytes are held for {}", body.len());
        drop(body);
        assert_eq!(memory.held(Kind::Queries), 0, "{path}");
    }
}

#[tokio::test]
async fn statistics_wait_for_their_turn() {
    let server = serve_with(|settings| settings.queries_max = 1).await;
    let running = server.engine.begin(QueryLimits { timeout: Duration::from_secs(60) }).await.expect("a turn");
    let (status, body) = server.get("status/tsdb?timeout=100ms").await;
    assert_eq!((status, &body["errorType"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("timeout")), "{body}");
    drop(running);
    server.data("status/tsdb").await;
}

#[tokio::test]
async fn parameters_are_bounded() {
    let server = serve().await;
    let form = "application/x-www-form-urlencoded";
    let (status, body) = server.post("labels", form, &"a&".repeat(1 << 20)).await;
    assert_eq!((status, &body["errorType"]), (StatusCode::BAD_REQUEST, &json!("bad_data")), "{body}");
    assert!(body["error"].as_str().is_some_and(|e| e.contains("more than 10000 parameters")), "{body}");
    assert_eq!(server.engine.memory().held(Kind::Bodies), 0);
}

#[tokio::test]
async fn labels_do_not_grow_without_bound() {
    let server = serve().await;
    let grown = format!(
        "query?query={}up{}",
        "label_join(".repeat(20),
        ",%22a%22,%22instance%22,%22a%22,%22a%22,%22job%22)".repeat(20)
    );
    let (status, body) = server.get(&grown).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{body}");
    assert!(body["error"].as_str().is_some_and(|e| e.contains("at most 65536 are allowed")), "{body}");
}
