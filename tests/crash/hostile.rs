//! Queries that want too much: deep, long, wide and endless ones. Each is answered or refused, and the server is as well
//! as before. `CRASH_QUERIES` says how many of them are tried, `CRASH_QUERY_SECONDS` is the server's deadline,
//! `CRASH_SLACK_SECONDS` what an answer may take beyond it: 1 with an optimised server on a machine of its own.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::{extent, figures};
use crate::harness::{Client, Down, Random, Response, Series, Server, Setup, now_ms, series, wait_for};

/// A bound against hanging: the server's own deadline is shorter.
const PATIENCE: Duration = Duration::from_secs(60);
/// What the server may use, and what may be resident: its program, and what is taken before anything can look.
const MEMORY_LIMIT: u64 = 1 << 30;
const RESIDENT_MAX: u64 = MEMORY_LIMIT + (512 << 20);

/// A field of `/proc/<pid>/status` in bytes.
pub fn memory(pid: u32, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the server runs");
    let line = text.lines().find_map(|line| line.strip_prefix(field)).expect("the kernel says it");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// Lets the kernel begin anew to watch how much a process holds.
fn forget_peak(pid: u32) {
    // Without the right to do so the peak of all before counts.
    let _ = std::fs::write(format!("/proc/{pid}/clear_refs"), "5");
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
        ("EXPLAIN ANALYZE of a cross join", "EXPLAIN ANALYZE SELECT count(*) FROM samples a, samples b, samples c WHERE a.value > b.value".to_owned()),
        ("EXPLAIN VERBOSE of 400 additions", format!("EXPLAIN VERBOSE SELECT value{} FROM samples", " + value".repeat(400))),
        ("text that doubles by WITH", doubling("'x' AS x", 60, |i| format!("SELECT x || x AS x FROM a{i}"), "length(x)")),
        ("arrays that double by WITH", doubling("ARRAY[1] AS x", 60, |i| format!("SELECT x || x AS x FROM a{i}"), "array_length(x)")),
        ("texts in arrays in arrays", doubling("repeat('x', 1000) AS x", 12, |i| format!("SELECT ARRAY[x::text, x::text, x::text, x::text, x::text, x::text, x::text, x::text] AS x FROM a{i}"), "x")),
        ("a filter that doubles by WITH", doubling("value AS x FROM samples", 60, |i| format!("SELECT x + x AS x FROM a{i}"), "count(*)") + " WHERE x > 0"),
        ("columns that double by WITH", doubling("1 AS x", 60, |i| format!("SELECT p.*, q.* FROM a{i} p, a{i} q"), "*")),
        ("a chain of 400 WITH", doubling("1 AS x", 400, |i| format!("SELECT * FROM a{i}"), "x")),
        ("arrays of arrays", nested("array_repeat(", "1", ", 1000)", 12)),
        ("a recursion whose text doubles", "WITH RECURSIVE t AS (SELECT 'x' AS x UNION ALL SELECT x || x FROM t) SELECT max(length(x)) FROM t".to_owned()),
        ("CUBE of 30", format!("SELECT count(*) FROM (SELECT 1 AS c0{0}) t GROUP BY CUBE(c0{1})", (1..30).map(|i| format!(", {i} AS c{i}")).collect::<String>(), (1..30).map(|i| format!(", c{i}")).collect::<String>())),
        ("CUBE of 12", format!("SELECT count(*) FROM (SELECT 1 AS c0{0}) t GROUP BY CUBE(c0{1})", (1..12).map(|i| format!(", {i} AS c{i}")).collect::<String>(), (1..12).map(|i| format!(", c{i}")).collect::<String>())),
        ("1,000 grouping sets", format!("SELECT value, count(*) FROM samples GROUP BY GROUPING SETS ((value){})", ", (value), ()".repeat(500))),
        ("an array aggregated for each row", "SELECT count(*) FROM (SELECT array_agg(value) OVER (ORDER BY value) AS a FROM generate_series(1, 100000)) t WHERE array_length(a) > 0".to_owned()),
        ("a text aggregated for each row", "SELECT max(length(a)) FROM (SELECT string_agg(value::text, ',') OVER (ORDER BY value) AS a FROM generate_series(1, 100000)) t".to_owned()),
        ("a text of a trillion numbers", "SELECT length(string_agg(value::text, ',')) FROM generate_series(1, 1000000000000)".to_owned()),
        ("an array of a trillion numbers", "SELECT array_length(array_agg(value)) FROM generate_series(1, 1000000000000)".to_owned()),
        ("an array of a billion", "SELECT range(1, 1000000000)".to_owned()),
        ("seconds of a century", "SELECT generate_series(timestamp '1970-01-01', timestamp '2070-01-01', interval '1 second')".to_owned()),
        ("20 texts of 60 MB", format!("SELECT 1{}", ", repeat('x', 60000000)".repeat(20))),
        ("a batch of long texts", "SELECT repeat('x', 1000000) FROM generate_series(1, 1000000)".to_owned()),
        ("a replacement that multiplies", "SELECT length(replace(repeat('x', 60000), 'x', repeat('y', 60000)))".to_owned()),
        ("a regex replacement that multiplies", "SELECT length(regexp_replace(repeat('x', 60000), '(.*)', repeat('\\1', 60000)))".to_owned()),
        ("a format of 100,000", format!("SELECT to_char(ts, '{}') FROM samples", "%Y".repeat(100_000))),
        ("texts for a table function", "SELECT * FROM generate_series(1, length(repeat('x', 2000000000)))".to_owned()),
        ("400 keys of a map", format!("SELECT tags{} FROM samples", "['a']".repeat(400))),
        ("400 arrows", format!("SELECT tags{} FROM samples", " -> 'a'".repeat(400))),
        ("1,000 keys to sort by", format!("SELECT * FROM samples a, samples b ORDER BY a.value{}", ", a.value + b.value".repeat(1_000))),
        ("1,000 window functions", format!("SELECT 1{} FROM samples", ", sum(value) OVER (ORDER BY ts)".repeat(1_000))),
        ("1,600 aggregates", format!("SELECT 1{} FROM samples a, samples b", ", sum(a.value * b.value)".repeat(1_600))),
        ("10,000 branches of CASE", format!("SELECT CASE value{} END FROM samples", " WHEN 1 THEN 2".repeat(10_000))),
        ("40 sub-queries that look outside", format!("SELECT {}1{}", "(SELECT max(value) + ".repeat(40), " FROM samples)".repeat(40))),
        ("200 sub-queries in IN", format!("SELECT count(*) FROM samples WHERE value = 1{}", " OR value IN (SELECT value FROM samples)".repeat(200))),
        ("40 times EXISTS", format!("SELECT count(*) FROM samples s WHERE true{}", " AND EXISTS (SELECT 1 FROM samples x WHERE x.value = s.value)".repeat(40))),
        ("100,000 rows of VALUES", format!("VALUES (0){}", ",(1)".repeat(100_000))),
        ("10,000 statements", "SELECT 1;".repeat(10_000)),
        ("a hostile pattern on the catalog", format!("SELECT relname FROM pg_catalog.pg_class WHERE relname ~ '^({})$'", "(a*)*".repeat(2_000))),
        ("a cross join of the catalog", "SELECT count(*) FROM pg_catalog.pg_class a, pg_catalog.pg_class b, pg_catalog.pg_attribute c, pg_catalog.pg_attribute d, pg_catalog.pg_attribute e, pg_catalog.pg_attribute f".to_owned()),
        ("a pattern of 1 MiB", format!("SELECT 'a' LIKE '{}'", "%_".repeat(400_000))),
        ("a pattern without case", format!("SELECT count(*) FROM samples WHERE metric ILIKE '{}'", "%ä".repeat(50_000))),
        ("a type of arrays", format!("SELECT CAST(NULL AS int{})", "[]".repeat(5_000))),
        ("a type in a type", format!("SELECT CAST(NULL AS {}int{})", "ARRAY<".repeat(5_000), ">".repeat(5_000))),
        ("COPY of everything", "COPY (SELECT * FROM samples a, samples b) TO STDOUT".to_owned()),
        ("a hundred times UNION of everything", format!("SELECT * FROM samples{}", " UNION SELECT * FROM samples".repeat(100))),
        ("a square of numbers", "SELECT count(*) FROM generate_series(1, 1000000) a, generate_series(1, 1000000) b WHERE a.value * b.value = 7".to_owned()),
        ("unnested squares", "SELECT count(*) FROM (SELECT unnest(range(1, 8000000)) AS a FROM generate_series(1, 1000000)) t".to_owned()),
        ("a text of quotes", format!("SELECT '{}'", "''".repeat(400_000))),
        ("a name of 1,000,000", format!("SELECT \"{}\"", "x".repeat(1_000_000))),
        ("a text over the limit", format!("SELECT '{}'", "x".repeat((1 << 20) - 5))),
    ]
}

/// A chain of tables, each made of the one before.
fn doubling(first: &str, count: usize, next: impl Fn(usize) -> String, last: &str) -> String {
    let tables: String = (1..count).map(|i| format!(", a{i} AS ({})", next(i - 1))).collect();
    format!("WITH a0 AS (SELECT {first}){tables} SELECT {last} FROM a{}", count - 1)
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
/// Name, way and text of a query, and whether its answer must come soon after the deadline.
type Case = (&'static str, Ask, String, bool);

#[test]
fn every_hostile_query_ends() {
    let seconds = extent("CRASH_QUERY_SECONDS", 1);
    let slack = Duration::from_secs(extent("CRASH_SLACK_SECONDS", 9));
    let environment = vec![
        ("THALWEG_QUERY_TIMEOUT".to_owned(), seconds.to_string()),
        ("THALWEG_MEMORY_LIMIT".to_owned(), MEMORY_LIMIT.to_string()),
    ];
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
    let before = memory(server.pid(), "VmRSS:");
    let mut peak = 0;
    let mut slowest: Vec<(Duration, &str)> = Vec::new();
    let mut faults = Vec::new();
    let mut try_one = |name: &'static str, soon: bool, ask: &dyn Fn(&mut Client) -> io::Result<Response>| {
        let mut client = Client::with_timeout(server.http, PATIENCE);
        forget_peak(server.pid());
        let begun = Instant::now();
        match ask(&mut client) {
            Ok(answer) if matches!(answer.status, 200 | 400..=499 | 503 | 504) => {}
            Ok(answer) => faults.push(format!("{name}: {} {:.300}", answer.status, answer.text())),
            // An answer that had begun can only break off.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(e) => faults.push(format!("{name}: no answer: {e}")),
        }
        let took = begun.elapsed();
        if soon && took > Duration::from_secs(seconds) + slack {
            faults.push(format!("{name}: the answer took {:.1} s", took.as_secs_f64()));
        }
        slowest.push((took, name));
        let held = memory(server.pid(), "VmHWM:");
        peak = peak.max(held);
        if held > RESIDENT_MAX {
            faults.push(format!("{name}: the server held {} MiB", held >> 20));
        }
        if Client::new(server.http).try_get("/-/healthy").is_err() {
            faults.push(format!("{name}: the server is gone: {}", server.log().lines().last().unwrap_or_default()));
            wait_for("its end", || server.ended());
            server = server.down().start();
        }
    };
    let mut cases: Vec<Case> = Vec::new();
    cases.extend(promql().into_iter().map(|(name, text)| (name, ask_promql as Ask, text, false)));
    cases.extend(sql().into_iter().map(|(name, text)| (name, ask_sql as Ask, text, true)));
    cases.extend(parameters().into_iter().map(|(name, text)| (name, ask_path as Ask, text, false)));
    let mut random = Random(extent("CRASH_SEEDS", 1));
    for _ in 0..(extent("CRASH_QUERIES", 60) as usize).min(cases.len()) {
        let (name, ask, text, soon) = cases.swap_remove(random.below(cases.len() as u64) as usize);
        try_one(name, soon, &|client| ask(client, &text));
    }
    slowest.sort_unstable_by(|a, b| b.cmp(a));
    let long = slowest.iter().filter(|(took, _)| *took > Duration::from_secs(1)).count();
    let shown: Vec<String> =
        slowest.iter().take(long.max(5)).map(|(t, name)| format!("{name} {:.1} s", t.as_secs_f64())).collect();
    let cells = [
        ("queries", slowest.len().to_string()),
        ("peak", format!("{} MiB, {} MiB before", peak >> 20, before >> 20)),
        ("slowest", shown.join(", ")),
    ];
    figures("hostile queries", 0, &cells);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    // The last ones may still have to notice that nobody waits for them.
    let whole = wait_for("an answer within the deadline", || {
        let answer = ask_sql(&mut server.client(), "SELECT count(*) FROM prometheus.m").expect("an answer");
        (answer.status == 200).then(|| answer.text())
    });
    assert_eq!(whole.lines().last(), Some("20000"));
}

/// A connection to the PostgreSQL listener, message by message.
struct Wire(TcpStream);

impl Wire {
    fn start(server: &Server) -> Self {
        let stream = TcpStream::connect(server.postgres).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let mut wire = Self(stream);
        let start = b"\0\x03\0\0user\0me\0database\0thalweg\0\0";
        let message = [&(start.len() as u32 + 4).to_be_bytes(), &start[..]].concat();
        wire.0.write_all(&message).expect("a start");
        wire.answer();
        wire
    }

    fn send(&mut self, kind: u8, body: &[u8]) {
        let message = [&[kind], &(body.len() as u32 + 4).to_be_bytes()[..], body].concat();
        self.0.write_all(&message).expect("a message");
    }

    /// The messages up to `ReadyForQuery`, the SQLSTATEs of errors among them.
    fn answer(&mut self) -> (Vec<u8>, Vec<String>) {
        let (mut kinds, mut codes) = (Vec::new(), Vec::new());
        loop {
            let mut head = [0; 5];
            self.0.read_exact(&mut head).expect("the head of a message");
            let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
            let mut body = vec![0; length - 4];
            self.0.read_exact(&mut body).expect("a message");
            kinds.push(head[0]);
            match head[0] {
                b'Z' => return (kinds, codes),
                b'E' => {
                    let fields = body.split(|b| *b == 0).filter(|f| f.first() == Some(&b'C'));
                    codes.extend(fields.map(|f| String::from_utf8_lossy(&f[1..]).into_owned()));
                }
                _ => {}
            }
        }
    }
}

#[test]
fn a_connection_keeps_only_so_much() {
    let server = Server::start();
    let mut wire = Wire::start(&server);
    // Many statements in one message, and ones that are far too deep.
    wire.send(b'Q', format!("{}\0", "SELECT 1;".repeat(1_000)).as_bytes());
    assert_eq!(wire.answer().1, Vec::<String>::new());
    for text in [format!("SELECT 1{}", "+1".repeat(20_000)), format!("EXPLAIN SELECT {}1", "NOT ".repeat(20_000))] {
        wire.send(b'Q', format!("{text}\0").as_bytes());
        assert_eq!(wire.answer().1, ["54001"]);
        wire.send(b'P', format!("deep\0{text}\0\0\0").as_bytes());
        wire.send(b'S', b"");
        assert_eq!(wire.answer().1, ["54001"]);
    }
    // Prepared statements that nobody closes.
    for i in 0..1_001 {
        wire.send(b'P', format!("s{i}\0SELECT 1\0\0\0").as_bytes());
    }
    wire.send(b'S', b"");
    let (kinds, codes) = wire.answer();
    assert_eq!((kinds.iter().filter(|k| **k == b'1').count(), codes), (1_000, vec!["54000".to_owned()]));
    // Portals that nobody closes.
    for i in 0..101 {
        wire.send(b'B', format!("p{i}\0s0\0\0\0\0\0\0\0").as_bytes());
    }
    wire.send(b'S', b"");
    let (kinds, codes) = wire.answer();
    assert_eq!((kinds.iter().filter(|k| **k == b'2').count(), codes), (100, vec!["54000".to_owned()]));
    wire.send(b'Q', b"DEALLOCATE ALL\0");
    assert_eq!(wire.answer().1, Vec::<String>::new());
    // As many parameters as the protocol can count.
    let places: String = (1..=65_535).map(|i| format!(",${i}::int8")).collect();
    wire.send(b'P', format!("many\0SELECT 1 IN (0{places})\0\0\0").as_bytes());
    let values = b"\0\0\0\x011".repeat(65_535);
    wire.send(b'B', &[b"\0many\0\0\0\xff\xff", &values[..], b"\0\0"].concat());
    wire.send(b'E', b"\0\0\0\0\0");
    wire.send(b'S', b"");
    let (kinds, codes) = wire.answer();
    assert!(kinds.contains(&b'D') || codes == ["54001"] || codes == ["57014"], "{codes:?}");
    assert_eq!(server.sql("SELECT 1"), ["1"]);
}
