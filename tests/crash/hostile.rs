//! Queries that want too much: deep, long, wide and endless ones. Each is answered or refused, and the server is as well
//! as before. `CRASH_QUERIES` says how many of them are tried, `CRASH_QUERY_SECONDS` is the server's deadline.

use std::io;
use std::time::{Duration, Instant};

use super::{extent, figures};
use crate::harness::{Client, Down, Random, Response, Series, Setup, now_ms, series, wait_for};

/// A bound against hanging: the server's own deadline is shorter.
const PATIENCE: Duration = Duration::from_secs(60);

/// A field of `/proc/<pid>/status` in bytes.
pub fn memory(pid: u32, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the server runs");
    let line = text.lines().find_map(|line| line.strip_prefix(field)).expect("the kernel says it");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// PromQL, each with a name.
fn promql() -> Vec<(&'static str, String)> {
    let nested = |open: &str, inner: &str, close: &str, depth: usize| {
        format!("{}{inner}{}", open.repeat(depth), close.repeat(depth))
    };
    let all = r#"{__name__=~".+"}"#;
    vec![
        ("20,000 parentheses", nested("(", "1", ")", 20_000)),
        ("100,000 parentheses", nested("(", "1", ")", 100_000)),
        ("parentheses without an end", "(".repeat(60_000)),
        ("20,000 signs", format!("{}1", "-".repeat(20_000))),
        ("20,000 additions", format!("1{}", "+1".repeat(20_000))),
        ("20,000 powers", format!("1{}", "^1".repeat(20_000))),
        ("5,000 times or", format!("m{}", " or m".repeat(5_000))),
        ("5,000 times and", format!("m{}", " and m".repeat(5_000))),
        ("5,000 sums", nested("sum(", "m", ")", 5_000)),
        ("5,000 functions", nested("abs(", "m", ")", 5_000)),
        ("nested sub-queries", format!("{}m{}", "max_over_time(".repeat(300), "[1h:1s])".repeat(300))),
        ("a sub-query of a year by seconds", format!("max_over_time(rate({all}[5m])[1y:1s])")),
        ("a sub-query of a month by milliseconds", format!("sum_over_time({all}[30d:1ms])")),
        ("a constant over a year by milliseconds", "sum_over_time(vector(1)[1y:1ms])".to_owned()),
        (
            "sub-query in sub-query in sub-query",
            "max_over_time(max_over_time(max_over_time(m[1d:1s])[1d:1s])[1d:1s])".to_owned(),
        ),
        ("everything times everything", format!("{all} * on() group_left {all}")),
        ("everything and everything", format!("{all} and on() {all}")),
        ("everything unless everything", format!("{all} unless {all}")),
        ("everything by everything", format!("count by (id, __name__, namespace, pod) ({all})")),
        ("sorted everything", format!("sort_desc({all})")),
        ("top of everything", format!("topk(1e18, {all})")),
        ("quantile of everything", format!("quantile(NaN, {all})")),
        ("values of everything", format!("count_values(\"v\", {all})")),
        ("histogram of everything", format!("histogram_quantile(0.9, {all})")),
        ("everything over a hundred years", format!("count_over_time({all}[100y])")),
        ("prediction to the end of time", format!("predict_linear({all}[1h], 1e300)")),
        ("smoothing of everything", format!("double_exponential_smoothing({all}[1h], 0.5, 0.5)")),
        ("a regex of 1 MiB", format!("{{a=~\"{}\"}}", "a".repeat(1 << 20))),
        ("a regex of nested stars", r#"{__name__=~"(((a*)*)*)*b"}"#.to_owned()),
        ("a regex of repeated repeats", r#"{__name__=~"((a{1000}){1000}){1000}"}"#.to_owned()),
        ("a regex of a million dots", r#"{__name__=~".{1000000}"}"#.to_owned()),
        ("a regex of 100,000 branches", format!("{{a=~\"{}b\"}}", "a|".repeat(100_000))),
        ("a regex of 5,000 groups", format!("{{a=~\"{}\"}}", nested("(", "a", ")", 5_000))),
        ("a regex of classes", format!("{{a=~\"{}\"}}", r"\\pL{100}".repeat(300))),
        ("10,000 matchers", format!("{{a=\"b\"{}}}", ",a!=\"c\"".repeat(10_000))),
        ("10,000 labels to group by", format!("sum by (a{}) (m)", ",a".repeat(10_000))),
        ("10,000 arguments", format!("label_join(m, \"a\", \"b\"{})", ",\"c\"".repeat(10_000))),
        ("a replacement that grows", format!("label_replace(m, \"a\", \"{}\", \"id\", \"(.*)\")", "$1".repeat(10_000))),
        (
            "labels that double 40 times",
            format!("{}m{}", "label_join(".repeat(40), ", \"a\", \"\", \"a\", \"a\")".repeat(40)),
        ),
        ("a text of 1 MiB", format!("m{{a=\"{}\"}}", "x".repeat(1 << 20))),
        ("a name of 1 MiB", "x".repeat(1 << 20)),
        ("a number of 100,000 digits", "9".repeat(100_000)),
        ("a duration too long", "m[99999999999999y]".to_owned()),
        ("an offset too far", "m offset 99999999y".to_owned()),
        ("a negative offset too far", "m offset -99999999y".to_owned()),
        ("a time too far", "m @ 1e300".to_owned()),
        ("no time at all", "m @ NaN".to_owned()),
        ("a text without end", "m{a=\"".to_owned()),
        ("an escape without end", "m{a=\"\\x".to_owned()),
        ("a zero byte", "m\0".to_owned()),
        ("comments only", "# nothing\n".repeat(10_000)),
        ("blanks only", " ".repeat(1 << 20)),
    ]
}

fn sql() -> Vec<(&'static str, String)> {
    let nested = |open: &str, inner: &str, close: &str, depth: usize| {
        format!("SELECT {}{inner}{}", open.repeat(depth), close.repeat(depth))
    };
    vec![
        ("20,000 parentheses in SQL", nested("(", "1", ")", 20_000)),
        ("100,000 parentheses in SQL", nested("(", "1", ")", 100_000)),
        ("20,000 additions in SQL", format!("SELECT 1{}", "+1".repeat(20_000))),
        ("20,000 times NOT", format!("SELECT {}true", "NOT ".repeat(20_000))),
        ("20,000 signs in SQL", format!("SELECT {}1", "- ".repeat(20_000))),
        ("5,000 times OR", format!("SELECT * FROM samples WHERE value = 0{}", " OR value = 1".repeat(5_000))),
        ("5,000 CASE", nested("CASE WHEN true THEN ", "1", " END", 5_000)),
        ("5,000 casts", format!("SELECT 1{}", "::text::int".repeat(2_500))),
        ("5,000 functions in SQL", nested("abs(", "1", ")", 5_000)),
        ("5,000 arrays", nested("[", "1", "]", 5_000)),
        ("2,000 UNION ALL", format!("SELECT 1{}", " UNION ALL SELECT 1".repeat(2_000))),
        ("1,000 sub-selects", nested("* FROM (SELECT ", "1 AS a", ") AS t", 1_000)),
        ("1,000 sub-queries", nested("(SELECT ", "1", ")", 1_000)),
        ("500 WITH", format!("WITH a0 AS (SELECT 1 AS x){} SELECT * FROM a499", (1..500).map(|i| format!(", a{i} AS (SELECT * FROM a{} UNION ALL SELECT * FROM a{})", i - 1, i - 1)).collect::<String>())),
        ("30 joins", format!("SELECT count(*) FROM samples s0{}", (1..30).map(|i| format!(" CROSS JOIN samples s{i}")).collect::<String>())),
        ("a cross join", "SELECT count(*) FROM samples a, samples b, samples c, samples d WHERE a.value + b.value + c.value + d.value > 1".to_owned()),
        ("a sorted cross join", "SELECT a.value FROM samples a, samples b, samples c ORDER BY a.value + b.value".to_owned()),
        ("a trillion numbers", "SELECT sum(value) FROM generate_series(1, 1000000000000)".to_owned()),
        ("a trillion sorted numbers", "SELECT value FROM generate_series(1, 1000000000000) ORDER BY value DESC".to_owned()),
        ("a recursion without end", "WITH RECURSIVE t AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM t) SELECT sum(n) FROM t".to_owned()),
        ("a recursion that doubles", "WITH RECURSIVE t AS (SELECT 1 AS n UNION ALL SELECT a.n FROM t a, (SELECT 1 UNION ALL SELECT 2) b) SELECT count(*) FROM t".to_owned()),
        ("a text of a gigabyte", "SELECT length(repeat('x', 1000000000))".to_owned()),
        ("a text that doubles", format!("SELECT length(concat('x'{})", ", repeat(repeat('x', 100000), 100000))")),
        ("a padded text", "SELECT lpad('x', 2147483647)".to_owned()),
        ("an array of everything", "SELECT array_agg(a.tags) FROM samples a, samples b".to_owned()),
        ("a text of everything", "SELECT string_agg(cast(a.tags AS text), ',') FROM samples a, samples b".to_owned()),
        ("windows over everything", "SELECT sum(a.value) OVER (ORDER BY b.value ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING) FROM samples a, samples b".to_owned()),
        ("groups of everything", "SELECT a.value, b.value, count(*) FROM samples a, samples b GROUP BY 1, 2".to_owned()),
        ("distinct everything", "SELECT DISTINCT a.tags, b.value FROM samples a, samples b".to_owned()),
        ("a list of 100,000", format!("SELECT * FROM samples WHERE value IN (0{})", (1..100_000).map(|i| format!(",{i}")).collect::<String>())),
        ("10,000 columns", format!("SELECT 1{}", ", 1".repeat(10_000))),
        ("a pattern of stars", format!("SELECT '{}' LIKE '{}b'", "a".repeat(5_000), "%a".repeat(2_000))),
        ("a regex in SQL", "SELECT 'a' ~ '((a{1000}){1000}){1000}'".to_owned()),
        ("a number of 100,000 digits in SQL", format!("SELECT {}", "9".repeat(100_000))),
        ("a comment without end", "SELECT 1 /*".repeat(10_000)),
        ("nested comments", format!("{}SELECT 1", "/*".repeat(20_000))),
        ("a text without end in SQL", format!("SELECT '{}", "x".repeat(1 << 20))),
        ("a division by zero", "SELECT 1 / 0".to_owned()),
        ("the smallest by minus one", "SELECT (-9223372036854775807 - 1) / -1".to_owned()),
        ("no text at all", String::new()),
        ("EXPLAIN of EXPLAIN", "EXPLAIN ".repeat(1_000) + "SELECT 1"),
    ]
}

/// Parameters of range queries and of the series endpoints.
fn parameters() -> Vec<(&'static str, String)> {
    let range = |rest: &str| format!("/api/v1/query_range?query=%7B__name__%3D~%22.%2B%22%7D&{rest}");
    vec![
        ("11,000 steps of everything", range("start=0&end=11000&step=1")),
        ("a hundred years by milliseconds", range("start=0&end=3e9&step=0.001")),
        ("steps of almost nothing", range("start=0&end=1&step=1e-300")),
        ("no step", range("start=0&end=1&step=0")),
        ("a step backwards", range("start=0&end=1&step=-1")),
        ("a step that is no number", range("start=0&end=1&step=NaN")),
        ("the end before the start", range("start=1e9&end=0&step=1")),
        ("the largest number", range("start=0&end=1.7e308&step=1.7e308")),
        ("the smallest time", range("start=-9223372036854775808&end=9223372036854775807&step=1e18")),
        ("a timeout of nothing", range("start=0&end=1&step=1&timeout=0")),
        ("a limit of everything", "/api/v1/labels?limit=18446744073709551615".to_owned()),
        ("a negative limit", "/api/v1/series?match[]=m&limit=-1".to_owned()),
        ("10,000 selectors", format!("/api/v1/series?{}", "match[]=m&".repeat(10_000))),
        ("everything by name", "/api/v1/series?match[]=%7B__name__%3D~%22.%2B%22%7D".to_owned()),
        ("a label that is none", "/api/v1/label/%00/values".to_owned()),
        ("a path that climbs", "/api/v1/label/..%2f..%2f..%2fetc%2fpasswd/values".to_owned()),
        ("bytes that are no text", "/api/v1/query?query=%ff%fe".to_owned()),
        ("half an escape", "/api/v1/query?query=%".to_owned()),
    ]
}

fn ask_promql(client: &mut Client, query: &str) -> io::Result<Response> {
    let now = now_ms() / 1000;
    let (start, end) = ((now - 3600).to_string(), now.to_string());
    let pairs = [("query", query), ("start", &start), ("end", &end), ("step", "1")];
    let body = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish();
    client.request(
        "POST",
        "/api/v1/query_range",
        &[("Content-Type", "application/x-www-form-urlencoded")],
        body.as_bytes(),
    )
}

fn ask_sql(client: &mut Client, query: &str) -> io::Result<Response> {
    client.request("POST", "/api/v1/sql?format=csv", &[("Content-Type", "text/plain")], query.as_bytes())
}

/// One query that wants as much of the database as there is.
pub fn everything(client: &mut Client, number: u64) -> io::Result<Response> {
    let all = r#"{__name__=~".+"}"#;
    match number % 8 {
        0 => ask_promql(client, all),
        1 => ask_promql(client, &format!("max_over_time({all}[1h:1s])")),
        2 => ask_promql(client, &format!("sort(sum by (id) ({all}))")),
        3 => ask_promql(client, &format!("{all} * on(id) group_left {all}")),
        4 => ask_sql(client, "SELECT * FROM samples ORDER BY value, ts"),
        5 => ask_sql(client, "SELECT tags, count(*) FROM samples GROUP BY tags ORDER BY 2"),
        6 => ask_sql(client, "SELECT a.value, count(*) FROM samples a, samples b GROUP BY 1"),
        _ => client.try_get("/api/v1/series?match[]=%7B__name__%3D~%22.%2B%22%7D"),
    }
}

fn ask_path(client: &mut Client, path: &str) -> io::Result<Response> {
    client.try_get(path)
}

type Ask = fn(&mut Client, &str) -> io::Result<Response>;
/// Name, way and text of a query.
type Case = (&'static str, Ask, String);

#[test]
fn every_hostile_query_ends() {
    let seconds = extent("CRASH_QUERY_SECONDS", 1).to_string();
    let environment = vec![("THALWEG_QUERY_TIMEOUT".to_owned(), seconds)];
    let mut server = Down::new(Setup { environment, ..Setup::default() }).start();
    let now = now_ms();
    for batch in 0..10u64 {
        let one = |item: u64| {
            let id = (batch * 100 + item).to_string();
            let samples: Vec<(i64, f64)> = (0..20).map(|i| (now - 600_000 + i * 30_000, i as f64)).collect();
            series("m", &[("a", "b"), ("id", &id)], &samples)
        };
        let all: Vec<Series> = (0..100).map(one).collect();
        server.write(&all);
    }
    let mut slowest: Vec<(Duration, &str)> = Vec::new();
    let mut faults = Vec::new();
    let mut try_one = |name: &'static str, ask: &dyn Fn(&mut Client) -> io::Result<Response>| {
        let mut client = Client::with_timeout(server.http, PATIENCE);
        let begun = Instant::now();
        match ask(&mut client) {
            Ok(answer) if matches!(answer.status, 200 | 400..=499 | 503 | 504) => {}
            Ok(answer) => faults.push(format!("{name}: {} {:.300}", answer.status, answer.text())),
            // An answer that had begun can only break off.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(e) => faults.push(format!("{name}: no answer: {e}")),
        }
        slowest.push((begun.elapsed(), name));
        if Client::new(server.http).try_get("/-/healthy").is_err() {
            faults.push(format!("{name}: the server is gone: {}", server.log().lines().last().unwrap_or_default()));
            wait_for("its end", || server.ended());
            server = server.down().start();
        }
    };
    let mut cases: Vec<Case> = Vec::new();
    cases.extend(promql().into_iter().map(|(name, text)| (name, ask_promql as Ask, text)));
    // On request: planning of SQL is not bounded yet, so chains of operators overflow its stack, and doubling tables,
    // long lists and texts of a gigabyte outlive their deadline.
    if extent("CRASH_SQL", 0) > 0 {
        cases.extend(sql().into_iter().map(|(name, text)| (name, ask_sql as Ask, text)));
    }
    cases.extend(parameters().into_iter().map(|(name, text)| (name, ask_path as Ask, text)));
    let mut random = Random(extent("CRASH_SEEDS", 1));
    for _ in 0..(extent("CRASH_QUERIES", 25) as usize).min(cases.len()) {
        let (name, ask, text) = cases.swap_remove(random.below(cases.len() as u64) as usize);
        try_one(name, &|client| ask(client, &text));
    }
    slowest.sort_unstable_by(|a, b| b.cmp(a));
    let shown: Vec<String> =
        slowest.iter().take(5).map(|(t, name)| format!("{name} {:.1} s", t.as_secs_f64())).collect();
    figures("hostile queries", 0, &[("queries", slowest.len().to_string()), ("slowest", shown.join(", "))]);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert_eq!(server.sql("SELECT count(*) FROM prometheus.m"), ["20000"]);
}
