//! Limits of queries: each is a setting, reaching it is an error in Prometheus's words, and a client that goes away gives
//! the processor back.

use std::io::Write as _;
use std::net::TcpStream;

use crate::harness::{Client, Down, Response, Series, Server, Setup, now_ms, series, wait_for};

const ALL: &str = r#"{__name__=~".+"}"#;
/// Far beyond any deadline of a test.
const ENDLESS: &str = "stddev_over_time(stddev_over_time(m[1d:1s])[1d:1s])";

/// A server with settings, and `m` of so many series with twenty samples each, the last one now.
fn server(settings: &[(&str, &str)], count: usize) -> Server {
    let environment = settings.iter().map(|(k, v)| (format!("THALWEG_{}", k.to_ascii_uppercase()), (*v).to_owned()));
    let server = Down::new(Setup { environment: environment.collect(), ..Setup::default() }).start();
    let now = now_ms();
    let samples: Vec<(i64, f64)> = (0..20).map(|i| (now - (19 - i) * 30_000, i as f64)).collect();
    let one = |id: usize| series("m", &[("a", "b"), ("id", &id.to_string())], &samples);
    let all: Vec<Series> = (0..count).map(one).collect();
    all.chunks(500).for_each(|some| server.write(some));
    server
}

/// A range query over the last hour.
fn range(client: &mut Client, query: &str, step: &str) -> Response {
    let now = now_ms() / 1000;
    let (start, end) = ((now - 3600).to_string(), now.to_string());
    client.form("/api/v1/query_range", &[("query", query), ("start", &start), ("end", &end), ("step", step)])
}

fn instant(client: &mut Client, query: &str) -> Response {
    client.form("/api/v1/query", &[("query", query)])
}

/// Status, kind and text of a refusal.
fn refused(answer: &Response, status: u16, kind: &str, text: &str) {
    assert_eq!(answer.status, status, "{:.300}", answer.text());
    let json = answer.json();
    assert_eq!((json["status"].as_str(), json["errorType"].as_str()), (Some("error"), Some(kind)));
    let error = json["error"].as_str().expect("a text");
    assert!(error.contains(text), "{error:.300}");
}

fn answered(answer: &Response) {
    assert_eq!(answer.status, 200, "{:.300}", answer.text());
}

#[test]
fn samples_of_a_query_are_limited() {
    const TEXT: &str = "query processing would load too many samples into memory in query execution";
    let server = server(&[("query_samples_max", "1500")], 100);
    let mut client = server.client();
    answered(&range(&mut client, "m", "60"));
    // What is streamed to the answer counts as much as what an operator holds, and so do samples that are no steps.
    for query in ["m", "sort(m)", "m + m", "last_over_time(m[1m])", &format!("{ALL} unless {ALL}")] {
        refused(&range(&mut client, query, "10"), 422, "execution", TEXT);
    }
    answered(&instant(&mut client, "m[5m]"));
    refused(&instant(&mut client, "m[1h]"), 422, "execution", TEXT);
    answered(&range(&mut client, "sum(m)", "10"));
    let sql = "SELECT count(*) FROM promql('sort(m)', now() - interval '1 hour', now(), '10s')";
    let answer = client.post("/api/v1/sql?format=csv", &[("Content-Type", "text/plain")], sql.as_bytes());
    assert!(answer.status != 200 && answer.text().contains(TEXT), "{}", answer.text());
}

#[test]
fn series_of_a_selector_are_limited() {
    let server = server(&[("query_series_max", "50")], 100);
    let mut client = server.client();
    answered(&instant(&mut client, r#"m{id=~"[0-4].?"}"#));
    refused(&instant(&mut client, ALL), 422, "execution", "query selects more than 50 series");
    server.flush();
    refused(&instant(&mut client, "sum(m)"), 422, "execution", "query selects more than 50 series");
}

#[test]
fn points_and_steps_are_limited() {
    let text =
        |n| format!("exceeded maximum resolution of {n} points per timeseries. Try decreasing the query resolution");
    let limited = server(&[("query_points_max", "360"), ("query_subquery_steps_max", "1000")], 1);
    let mut client = limited.client();
    answered(&range(&mut client, "m", "10"));
    refused(&range(&mut client, "m", "9"), 400, "bad_data", &text("360"));
    answered(&instant(&mut client, "max_over_time(m[990s:1s])"));
    let steps = "subquery evaluates its inner expression at 1200 steps: at most 1000 are allowed";
    refused(&instant(&mut client, "max_over_time(m[20m:1s])"), 422, "execution", steps);
    let sql = "SELECT count(*) FROM promql('m', now() - interval '1 hour', now(), '9s')";
    let answer = client.post("/api/v1/sql?format=csv", &[("Content-Type", "text/plain")], sql.as_bytes());
    assert!(answer.status != 200 && answer.text().contains(&text("360")), "{}", answer.text());
    let usual = server(&[], 1);
    answered(&range(&mut usual.client(), "m", "0.4"));
    refused(&range(&mut usual.client(), "m", "0.3"), 400, "bad_data", &text("11,000"));
}

#[test]
fn memory_of_a_query_is_limited() {
    let server = server(&[("query_memory_max", "1MiB")], 100);
    let mut client = server.client();
    answered(&range(&mut client, "sum(m)", "2"));
    for query in ["m", "sort(m)", "m * m"] {
        refused(&range(&mut client, query, "2"), 422, "execution", "at most 1048576 are allowed");
    }
    // Everything was given back.
    let held = || {
        let metrics = server.client().get("/metrics").text();
        let line = metrics.lines().find(|l| l.starts_with("thalweg_memory_bytes{kind=\"queries\"}"))?;
        line.ends_with(" 0").then_some(())
    };
    wait_for("the memory of the queries", held);
}

#[test]
fn queries_wait_for_so_long_and_run_for_so_long() {
    let server = server(&[("queries_max", "1"), ("query_wait_max", "100ms")], 200);
    let mut client = server.client();
    for timeout in ["1ms", "100ms"] {
        let pairs = [("query", ENDLESS), ("timeout", timeout)];
        refused(&client.form("/api/v1/query", &pairs), 503, "timeout", "query timed out in ");
        wait_for("the end of the query", || (queries_running(&server) == Some(0)).then_some(()));
    }
    let other = abandoned(&server, "/api/v1/query", &[("query", ENDLESS)]);
    wait_for("the query", || (queries_running(&server) == Some(1)).then_some(()));
    let answer = instant(&mut client, "m");
    refused(
        &answer,
        503,
        "unavailable",
        "1 queries run, which is the limit, and this one has waited for 0.1 s; try again",
    );
    assert!(answer.header("retry-after").is_some());
    drop(other);
    wait_for("a turn", || (instant(&mut server.client(), "m").status == 200).then_some(()));
}

#[test]
fn texts_and_patterns_are_limited() {
    let server = server(&[], 1);
    let mut client = server.client();
    let patterns: String = (0..20).map(|i| format!(r#"a=~"{i}\\pL{{50}}","#)).collect();
    let text = "MiB when compiled; at most 64 MiB are allowed in one request";
    refused(&instant(&mut client, &format!("{{{patterns}}}")), 400, "bad_data", text);
    let replaced =
        (0..20).fold("m".to_owned(), |inner, i| format!(r#"label_replace({inner}, "x", "", "id", "{i}\\pL{{50}}")"#));
    refused(&instant(&mut client, &replaced), 422, "execution", text);
    let selectors: Vec<String> = (0..20).map(|i| format!(r#"m{{a=~"{i}\\pL{{50}}"}}"#)).collect();
    let pairs: Vec<(&str, &str)> = selectors.iter().map(|s| ("match[]", s.as_str())).collect();
    refused(&client.form("/api/v1/series", &pairs), 400, "bad_data", text);
    let long = format!(r#"{{a=~"{}"}}"#, "a".repeat(1 << 20));
    refused(
        &instant(&mut client, &long),
        400,
        "bad_data",
        "regular expression of 1048576 bytes; at most 65536 are allowed",
    );
    let balanced = (0..16).fold("m".to_owned(), |inner, _| format!("({inner} or {inner})"));
    refused(&instant(&mut client, &balanced), 400, "bad_data", "more than 20000 operands");
}

/// Sends a request and reads no answer; dropping the connection is a client that goes away.
fn abandoned(server: &Server, path: &str, pairs: &[(&str, &str)]) -> TcpStream {
    let body = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish();
    let mut stream = TcpStream::connect(server.http).expect("a connection");
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n\r\n",
        server.http,
        body.len()
    );
    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes())).expect("a request");
    stream
}

fn queries_running(server: &Server) -> Option<u64> {
    let text = server.client().get("/metrics").text();
    let line = text.lines().find(|l| l.starts_with("thalweg_queries_running"))?;
    line.rsplit(' ').next()?.parse().ok()
}

/// What the server has used of processors, in hundredths of a second.
fn processor_time(server: &Server) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/stat", server.pid())).expect("the server runs");
    let (_, fields) = text.rsplit_once(')').expect("a name in parentheses");
    let fields: Vec<&str> = fields.split_whitespace().collect();
    // utime and stime, the 14th and 15th of all.
    [11, 12].iter().map(|i| fields[*i].parse::<u64>().expect("ticks")).sum()
}

#[test]
fn a_client_that_goes_away_frees_the_processor() {
    let server = server(&[("cpu_threads", "1")], 4000);
    let matchers: String = (0..10_000).map(|i| format!(r#",a!="c{i}""#)).collect();
    let many = format!("{{id!=\"\"{matchers}}}");
    let now = now_ms() / 1000;
    let (start, end) = ((now - 3600).to_string(), now.to_string());
    let of_range = |query: &'static str| {
        let times = [("start", start.as_str()), ("end", end.as_str()), ("step", "1")];
        ("/api/v1/query_range", [vec![("query", query)], times.to_vec()].concat())
    };
    let cases = [
        ("/api/v1/query", vec![("query", ENDLESS)]),
        ("/api/v1/query", vec![("query", many.as_str())]),
        ("/api/v1/series", [("match[]", many.as_str())].repeat(3)),
        of_range("{__name__=~\".+\"} unless {__name__=~\".+\"}"),
        of_range("quantile_over_time(0.5, m[1h])"),
        ("/api/v1/query", vec![("query", "deriv(deriv(m[1d:1s])[1d:1s])")]),
        of_range("count_values(\"v\", m * 1.5)"),
    ];
    // After so many hundredths of a second: it reads, and then it sorts thousands of runs.
    let sort = "SELECT n FROM generate_series(1, 20000000) AS t(n) ORDER BY md5(n::text) OFFSET 19999999";
    // The partition of a window is read, and then computed as one.
    let window = "SELECT max(s) FROM (SELECT sum(n) OVER (ORDER BY n ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING) AS s \
                  FROM generate_series(1, 5000000) AS t(n)) AS x";
    let long = [(sort, 10), (sort, 300), (sort, 600), (window, 200), (window, 400)];
    let long = long.map(|(sql, begun)| ("/api/v1/sql", vec![("query", sql)], begun));
    for (path, pairs, begun) in cases.map(|(path, pairs)| (path, pairs, 10)).into_iter().chain(long) {
        let idle = || {
            let before = processor_time(&server);
            std::thread::sleep(std::time::Duration::from_millis(300));
            // On a busy machine it may only be that it gets no turn.
            (processor_time(&server) - before <= 6 && queries_running(&server) == Some(0)).then_some(())
        };
        let before = processor_time(&server);
        let connection = abandoned(&server, path, &pairs);
        // It has begun to work.
        wait_for("work", || (processor_time(&server) > before + begun).then_some(()));
        drop(connection);
        let gone = processor_time(&server);
        wait_for("the end of the work", idle);
        let used = processor_time(&server) - gone;
        // A second, and what the kernel and this test's own probes take.
        assert!(used <= 100, "{path} {:.80}: {used} hundredths of a second after its client went", pairs[0].1);
    }
}
