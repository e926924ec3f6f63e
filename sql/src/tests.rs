//! Statements against an engine with a few series: answers, and the plans that give them.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, TimestampMillisecondArray, UInt32Array};
use arrow::record_batch::RecordBatch;
use catalog::ManualClock;
use catalog::tables::{SAMPLES, time_type};
use engine::{Batch, Components, Engine, MetricMetadata, Settings, Telemetry, Write};
use futures::TryStreamExt;

use crate::error::Result;
use crate::format::Column;
use crate::session::{Frontend, Rights, Session};

/// 2026-11-21 07:00:00 UTC.
const START: i64 = 1_795_244_400_000;

pub struct Fixture {
    _dir: tempfile::TempDir,
    pub engine: Engine,
    pub session: Session,
}

async fn open(dir: &Path, settings: Settings) -> Engine {
    let settings = Settings { data_dir: dir.to_owned(), memory_limit: 256 << 20, ..settings };
    let components = Components {
        store: Arc::new(object_store::memory::InMemory::new()),
        fs: Arc::new(catalog::fs::Disk),
        clock: Arc::new(ManualClock::new(START + 3_600_000)),
        entropy: Arc::new(catalog::SeededEntropy::new(1)),
        telemetry: Arc::new(Telemetry::default()),
    };
    Engine::open(settings, components, crate::extensions()).await.unwrap()
}

/// `labels` as `k=v,k=v`, then (seconds after the start, value).
async fn write(engine: &Engine, labels: &str, samples: &[(i64, f64)]) {
    let mut pairs: Vec<(&str, &str)> = labels.split(',').map(|p| p.split_once('=').unwrap()).collect();
    let mut encoder = engine.registry().encoder();
    let tag = encoder.tags(&mut pairs, None).unwrap();
    let ts = TimestampMillisecondArray::from_iter_values(samples.iter().map(|s| START + s.0 * 1000));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(UInt32Array::from(vec![tag; samples.len()])),
        Arc::new(ts.with_data_type(time_type())),
        Arc::new(Float64Array::from_iter_values(samples.iter().map(|s| s.1))),
    ];
    let rows = RecordBatch::try_new(SAMPLES.arrow().clone(), columns).unwrap();
    let metadata =
        vec![MetricMetadata { metric: "up".into(), kind: "gauge".into(), help: "Up.".into(), unit: String::new() }];
    let write = Write { tags: encoder.finish(), batches: vec![Batch { table: SAMPLES.clone(), rows }], metadata };
    engine.write(write).await.unwrap();
}

impl Fixture {
    pub async fn new() -> Self {
        Self::with(Settings::default()).await
    }

    /// With these settings, but for those of places and of memory.
    pub async fn with(settings: Settings) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let engine = open(dir.path(), settings).await;
        write(&engine, "__name__=up,job=api,host=h1", &[(0, 1.0), (60, 1.0), (120, 0.0)]).await;
        write(&engine, "__name__=up,job=api,host=h2", &[(0, 1.0), (60, 0.0)]).await;
        write(&engine, "__name__=up,job=db,host=h3", &[(0, 1.0)]).await;
        write(&engine, "__name__=http_requests,job=api,host=h1,code=200,ts=x", &[(0, 10.0), (60, 20.0)]).await;
        write(&engine, "__name__=http_requests,job=api,host=h1,code=500", &[(0, 1.0), (60, 3.0)]).await;
        write(&engine, "__name__=http_requests,job=api,host=h2,code=200", &[(0, 7.5)]).await;
        let rights = Rights { admin: true, ..Rights::default() };
        let session = Frontend::new(&engine).unwrap().session("tester", rights);
        Self { _dir: dir, engine, session }
    }

    pub async fn run(&self, text: &str) -> Result<String> {
        let batches: Vec<RecordBatch> =
            self.session.run(crate::plan(text, &self.session).await?).await?.try_collect().await?;
        let mut out = String::new();
        for batch in batches {
            let columns: Vec<Column> = batch.columns().iter().map(|c| Column::new(c, "UTC").unwrap()).collect();
            for row in 0..batch.num_rows() {
                let mut line = Vec::new();
                for column in &columns {
                    let mut cell = String::new();
                    match column.is_null(row) {
                        true => cell.push('-'),
                        false => column.text(row, &mut cell)?,
                    }
                    line.push(cell);
                }
                out.push_str(&line.join("|"));
                out.push('\n');
            }
        }
        Ok(out)
    }

    async fn check(&self, text: &str, expected: &[&str]) {
        let got = self.run(text).await.unwrap_or_else(|e| panic!("{text}: {} {e}", e.code));
        assert_eq!(got.lines().collect::<Vec<_>>(), expected, "{text}");
    }

    /// The physical plan, without what depends on the machine.
    async fn plan_of(&self, text: &str) -> String {
        let explained = self.run(&format!("EXPLAIN {text}")).await.unwrap();
        explained.split_once("physical_plan|").unwrap().1.to_owned()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_right_with_tags_as_ordinals() {
    let f = Fixture::new().await;
    f.check("SELECT count(*) FROM samples", &["11"]).await;
    f.check(
        "SELECT ts, metric, value, tags FROM samples WHERE metric = 'up' AND tags['host'] = 'h1' ORDER BY ts",
        &[
            r#"2026-11-21 07:00:00+00|up|1|{"host": "h1", "job": "api"}"#,
            r#"2026-11-21 07:01:00+00|up|1|{"host": "h1", "job": "api"}"#,
            r#"2026-11-21 07:02:00+00|up|0|{"host": "h1", "job": "api"}"#,
        ],
    )
    .await;
    f.check(
        "SELECT metric, count(*), sum(value) FROM samples GROUP BY metric ORDER BY metric",
        &["http_requests|5|41.5", "up|6|4"],
    )
    .await;
    f.check(
        "SELECT host, max(value), count(DISTINCT code) FROM prometheus.http_requests GROUP BY host ORDER BY host DESC",
        &["h2|7.5|1", "h1|20|2"],
    )
    .await;
    f.check("SELECT tags['job'], count(*) FROM samples GROUP BY tags['job'] ORDER BY 1", &["api|10", "db|1"]).await;
    f.check("SELECT tags->>'job', count(*) FROM samples GROUP BY 1 ORDER BY 1", &["api|10", "db|1"]).await;
    f.check("SELECT DISTINCT tags['code'] AS c FROM samples ORDER BY c NULLS FIRST", &["-", "200", "500"]).await;
    f.check("SELECT min(host), max(host), count(host) FROM prometheus.up", &["h1|h3|6"]).await;
    f.check("SELECT min(tags['code']), max(metric) FROM samples", &["200|up"]).await;
    f.check(
        "SELECT upper(host), count(*) FROM prometheus.up GROUP BY upper(host) ORDER BY 1",
        &["H1|3", "H2|2", "H3|1"],
    )
    .await;
    f.check("SELECT host || '/' || job FROM prometheus.up WHERE job = 'db'", &["h3/db"]).await;
    f.check(
        "SELECT host, value FROM prometheus.up WHERE host = 'h3' OR value < 0.5 ORDER BY host, value",
        &["h1|0", "h2|0", "h3|1"],
    )
    .await;
    f.check("SELECT count(*) FROM prometheus.http_requests WHERE code::int >= 500", &["2"]).await;
    f.check("SELECT count(*) FROM prometheus.http_requests WHERE value > 2 AND code::int >= 500", &["1"]).await;
    f.check("SELECT count(*) FROM samples WHERE metric LIKE 'http%' AND tags['host'] IN ('h2', 'h9')", &["1"]).await;
    f.check("SELECT count(*) FROM samples WHERE tags['code'] IS NULL", &["6"]).await;
    f.check("SELECT count(*) FROM samples WHERE tags['nope'] = 'x'", &["0"]).await;
    f.check("SELECT count(*) FROM samples WHERE metric ~ '^up$'", &["6"]).await;
    f.check("SELECT CASE WHEN host = 'h1' THEN 'one' ELSE 'other' END AS w, count(*) FROM prometheus.up GROUP BY 1 ORDER BY 1",
        &["one|3", "other|3"]).await;
    f.check("SELECT string_agg(DISTINCT host, ',' ORDER BY host) FROM prometheus.up", &["h1,h2,h3"]).await;
    f.check("SELECT host, tags_eq FROM (SELECT host, host = job AS tags_eq FROM prometheus.up WHERE value = 1) GROUP BY 1, 2 ORDER BY 1",
        &["h1|f", "h2|f", "h3|f"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn joins_unions_windows_and_subqueries() {
    let f = Fixture::new().await;
    f.check(
        "SELECT u.host, sum(r.value) FROM prometheus.up u JOIN prometheus.http_requests r ON u.host = r.host AND u.ts = r.ts \
         WHERE u.value = 1 GROUP BY u.host ORDER BY 1",
        &["h1|34", "h2|7.5"],
    )
    .await;
    f.check(
        "SELECT DISTINCT u.host FROM prometheus.up u LEFT JOIN prometheus.http_requests r ON u.host = r.host \
         WHERE r.host IS NULL",
        &["h3"],
    )
    .await;
    f.check(
        "SELECT count(*) FROM prometheus.up WHERE host IN (SELECT host FROM prometheus.http_requests WHERE code = '500')",
        &["3"],
    )
    .await;
    f.check(
        "SELECT count(*) FROM prometheus.up u WHERE NOT EXISTS (SELECT 1 FROM prometheus.http_requests r WHERE r.host = u.host)",
        &["1"],
    )
    .await;
    f.check("SELECT count(*) FROM prometheus.up WHERE host = (SELECT max(host) FROM prometheus.http_requests)", &["2"])
        .await;
    f.check(
        "SELECT u.host, n.name FROM (SELECT DISTINCT host FROM prometheus.up) u \
         JOIN (VALUES ('h1', 'one'), ('h3', 'three')) AS n(host, name) ON u.host = n.host ORDER BY 1",
        &["h1|one", "h3|three"],
    )
    .await;
    f.check(
        "SELECT host FROM prometheus.up UNION SELECT host FROM prometheus.http_requests ORDER BY host",
        &["h1", "h2", "h3"],
    )
    .await;
    f.check("SELECT host FROM prometheus.up WHERE value = 0 UNION ALL SELECT 'lit' ORDER BY 1", &["h1", "h2", "lit"])
        .await;
    f.check(
        "SELECT host, value, row_number() OVER (PARTITION BY host ORDER BY ts DESC) AS n FROM prometheus.up ORDER BY host, n",
        &["h1|0|1", "h1|1|2", "h1|1|3", "h2|0|1", "h2|1|2", "h3|1|1"],
    )
    .await;
    f.check(
        "SELECT DISTINCT lag(host) OVER (ORDER BY host, ts) AS l FROM prometheus.up ORDER BY l NULLS FIRST",
        &["-", "h1", "h2"],
    )
    .await;
    f.check(
        "WITH last AS (SELECT host, max(ts) AS ts FROM prometheus.up GROUP BY host) \
         SELECT l.host, u.value FROM last l JOIN prometheus.up u ON u.host = l.host AND u.ts = l.ts ORDER BY 1",
        &["h1|0", "h2|0", "h3|1"],
    )
    .await;
    f.check(
        "SELECT job, host, count(*) FROM prometheus.up GROUP BY ROLLUP (job, host) ORDER BY 1 NULLS LAST, 2 NULLS LAST",
        &["api|h1|3", "api|h2|2", "api|-|5", "db|h3|1", "db|-|1", "-|-|6"],
    )
    .await;
    f.check("SELECT host FROM prometheus.up ORDER BY host DESC, ts LIMIT 2", &["h3", "h2"]).await;
    f.check("SELECT DISTINCT ON (job) job, host FROM prometheus.up ORDER BY job, host", &["api|h1", "db|h3"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn times_restrict_the_scan() {
    let f = Fixture::new().await;
    f.check("SELECT count(*) FROM samples WHERE ts > '2026-11-21T07:00:00Z'", &["5"]).await;
    f.check(
        "SELECT count(*) FROM samples WHERE ts BETWEEN '2026-11-21 07:00:00+00' AND '2026-11-21 07:01:00+00'",
        &["10"],
    )
    .await;
    f.check("SELECT count(*) FROM samples WHERE ts < '2026-11-21 07:00:00+00'", &["0"]).await;
    f.check("SELECT count(*) FROM samples WHERE ts > now() + interval '200 years'", &["0"]).await;
    f.check(
        "SELECT date_bin('1 minute', ts) AS t, count(*) FROM samples GROUP BY t ORDER BY t LIMIT 1",
        &["2026-11-21 07:00:00+00|6"],
    )
    .await;
    let plan = f.plan_of("SELECT value FROM samples WHERE ts >= '2026-11-21T07:01:00Z' AND metric = 'up'").await;
    assert!(!plan.contains("FilterExec"), "{plan}");
}

#[tokio::test(flavor = "multi_thread")]
async fn plans_run_on_ordinals() {
    let f = Fixture::new().await;
    let check = async |text: &str, with: &[&str], without: &[&str]| {
        let plan = f.plan_of(text).await;
        for w in with {
            assert!(plan.contains(w), "{text} lacks {w}:\n{plan}");
        }
        for w in without {
            assert!(!plan.contains(w), "{text} has {w}:\n{plan}");
        }
    };
    check(
        "SELECT host, sum(value) FROM prometheus.up WHERE job LIKE 'a%' GROUP BY host ORDER BY host",
        &["gby=[host@", "tag_text(host@", "codes=2 of 3", "host#"],
        &["FilterExec", "gby=[tag_text"],
    )
    .await;
    check("SELECT DISTINCT metric FROM samples", &["gby=[metric@", "tag_text(metric@"], &[]).await;
    check("SELECT tags['job'], count(*) FROM samples GROUP BY 1", &["tag_value[job]"], &["get_field", "tag_map"]).await;
    check(
        "SELECT count(*) FROM prometheus.up u JOIN prometheus.http_requests r ON u.host = r.host",
        &["on=[(host@"],
        &["tag_text"],
    )
    .await;
    check("SELECT count(DISTINCT host) FROM prometheus.up", &[], &["tag_text"]).await;
    check("SELECT value FROM prometheus.up WHERE host = 'h1' OR value > 1", &["tag_apply["], &["tag_text"]).await;
    check("SELECT value FROM prometheus.up ORDER BY host", &["SortExec: expr=[host@"], &["SortExec: expr=[tag_text"])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn order_survives_restoring_text() {
    let f = Fixture::new().await;
    let samples: Vec<(i64, f64)> = (0..500).map(|i| (i, i as f64)).collect();
    for host in 0..60 {
        write(&f.engine, &format!("__name__=big,host=h{host:02}"), &samples).await;
    }
    let rows = f.run("SELECT host, value FROM prometheus.big ORDER BY host, value").await.unwrap();
    let expected: String = (0..60).flat_map(|h| (0..500).map(move |v| format!("h{h:02}|{v}\n"))).collect();
    assert!(rows == expected, "rows are out of order");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_stream_stops_a_join_that_gives_nothing() {
    let f = Fixture::new().await;
    for join in [
        "SELECT count(*) FROM generate_series(1, 1000000) a, generate_series(1, 1000000) b WHERE a.value + b.value = 1",
        "SELECT count(*) FROM generate_series(1, 1000000) a, generate_series(1, 1000000) b",
    ] {
        let plan = crate::plan(join, &f.session).await.unwrap();
        let mut stream = f.session.run(plan).await.unwrap();
        let first =
            tokio::time::timeout(std::time::Duration::from_millis(300), futures::StreamExt::next(&mut stream)).await;
        assert!(first.is_err(), "{join} was to run for long");
        drop(stream);
    }
    // The engine's threads end only when what runs on them does.
    f.engine.shutdown(std::time::Duration::from_secs(1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused() {
    let f = Fixture::new().await;
    let check = async |text: &str, code: &str| match f.run(text).await {
        Err(e) => assert_eq!(e.code, code, "{text}: {e}"),
        Ok(rows) => panic!("{text}: {rows}"),
    };
    check("SELECT * FROM nope", "42P01").await;
    check("SELECT * FROM prometheus.nope", "42P01").await;
    check("SELECT * FROM nope.nope", "42P01").await;
    check("SELECT nope FROM samples", "42703").await;
    check("SELECT nope(1)", "42883").await;
    check("SELEC 1", "42601").await;
    check("SELECT 1/0", "22012").await;
    check("SELECT 'x'::int", "22P02").await;
    check("SELECT * FROM '/etc/passwd'", "42P01").await;
    check("SELECT * FROM \"file:///etc/passwd\"", "42P01").await;
    check("CREATE TABLE t AS SELECT 1", "25006").await;
    check("EXPLAIN ANALYZE INSERT INTO samples SELECT * FROM samples", "25006").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_catalog_describes_itself() {
    let f = Fixture::new().await;
    f.check("SELECT metric, count(*) FROM catalog.tag_sets GROUP BY metric ORDER BY 1", &["http_requests|3", "up|3"])
        .await;
    f.check("SELECT metric, type, help FROM catalog.metrics", &["up|gauge|Up."]).await;
    f.check(
        "SELECT table_schema, table_name FROM information_schema.tables WHERE table_schema IN ('public', 'prometheus') ORDER BY 1, 2",
        &[
            "prometheus|http_requests",
            "prometheus|up",
            "public|exemplars",
            "public|histograms",
            "public|samples",
            "public|start_timestamps",
        ],
    )
    .await;
    f.check(
        "SELECT column_name FROM information_schema.columns WHERE table_schema = 'prometheus' AND table_name = 'http_requests' ORDER BY ordinal_position",
        &["ts", "value", "code", "host", "job", "label_ts"],
    )
    .await;
    f.check("SELECT relname FROM pg_class WHERE relname LIKE 'http%'", &["http_requests"]).await;
    f.check("SELECT relname FROM pg_catalog.pg_class WHERE relname = 'samples'", &["samples"]).await;
    f.check("SELECT current_database(), current_user, version() LIKE 'PostgreSQL 15%'", &["thalweg|tester|t"]).await;
    f.check("SELECT series = code FROM samples s JOIN catalog.tag_sets t ON s.series = t.code LIMIT 1", &["t"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn elements_are_ordered_by_elements() {
    let f = Fixture::new().await;
    f.check(
        "SELECT metric, tags['code'], count(*) FROM samples WHERE tags['code'] <> '' GROUP BY metric, tags['code'] \
         ORDER BY metric, tags['code'] DESC",
        &["http_requests|500|2", "http_requests|200|3"],
    )
    .await;
    f.check(
        "SELECT DISTINCT tags['code'] FROM samples WHERE metric = 'http_requests' ORDER BY tags['code']",
        &["200", "500"],
    )
    .await;
    f.check("SELECT tags['code'] FROM samples WHERE tags['code'] = '200' ORDER BY tags['host'], ts LIMIT 1", &["200"])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_stay_after_a_flush() {
    let f = Fixture::new().await;
    f.check("SELECT count(*) FROM catalog.files", &["0"]).await;
    f.engine.flush().await.unwrap();
    f.check(
        "SELECT table_name, day = ts_min::date, level, rows, bytes > 0, path LIKE 'samples/%' FROM catalog.files",
        &["samples|t|0|11|t|t"],
    )
    .await;
    write(&f.engine, "__name__=up,job=db,host=h3", &[(60, 5.0)]).await;
    f.check("SELECT host, sum(value) FROM prometheus.up GROUP BY host ORDER BY host", &["h1|2", "h2|1", "h3|6"]).await;
    f.check("SELECT tags['code'], count(*) FROM samples GROUP BY 1 ORDER BY 1 NULLS LAST", &["200|3", "500|2", "-|7"])
        .await;
}

impl Fixture {
    async fn refused(&self, text: &str, code: &str, message: &str) {
        match self.run(text).await {
            Ok(answer) => panic!("{text:.200} was answered: {answer:.200}"),
            Err(e) => assert!(e.code == code && e.message.contains(message), "{text:.200}: {} {e}", e.code),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn depth_up_to_the_limit_is_answered_and_beyond_it_refused() {
    let f = Fixture::new().await;
    let shapes: [(&str, &str, &str, usize); 8] = [
        ("SELECT 1", "+1", "", 495),
        ("SELECT 1 WHERE 1 = 0", " OR 1 = 1", "", 490),
        ("SELECT 1 WHERE 1 = 1", " AND 1 = 1", "", 490),
        ("SELECT 1", " UNION ALL SELECT 1", "", 490),
        ("SELECT 'x'", "||'x'", "", 495),
        ("SELECT 1", "::int8", "", 240),
        ("SELECT 1 IS NULL", " IS NULL", "", 240),
        ("SELECT count(*) FROM (SELECT 1) a0", ", (SELECT 1) a", "", 30),
    ];
    for (head, link, tail, most) in shapes {
        let text = |n: usize| {
            let named = |i: usize| if link.ends_with(" a") { format!("{link}{}", i + 1) } else { link.to_owned() };
            format!("{head}{}{tail}", (0..n).map(named).collect::<String>())
        };
        f.run(&text(most)).await.unwrap_or_else(|e| panic!("{head}{link}: {} {e}", e.code));
        f.refused(&text(2_000), "54001", "levels are allowed").await;
    }
    // What the parser reads again at every level ends in time, too.
    for (open, close, most) in [("abs(", ")", 16), ("ARRAY[", "]", 16), ("(SELECT ", ")", 10)] {
        let text = |n: usize| format!("SELECT {}1{} IS NULL", open.repeat(n), close.repeat(n));
        f.check(&text(most), &["f"]).await;
        for n in [most + 1, 20, 60, 200] {
            f.refused(&text(n), "54001", "levels are allowed").await;
        }
    }
    for (open, inner, close) in [
        ("(", "1", ")"),
        ("NOT ", "true", ""),
        ("- ", "1", ""),
        ("abs(", "1", ")"),
        ("CASE WHEN true THEN ", "1", " END"),
        ("ARRAY[", "1", "]"),
        ("(SELECT ", "1", ")"),
    ] {
        let text = format!("SELECT {}{inner}{}", open.repeat(5_000), close.repeat(5_000));
        f.refused(&text, "54001", "levels are allowed").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_little_text_multiplies_is_bounded() {
    let f = Fixture::new().await;
    let chain = |count: usize, body: &dyn Fn(usize) -> String, tail: &str| {
        let tables: String = (1..count).map(|i| format!(", a{i} AS ({})", body(i - 1))).collect();
        format!("WITH a0 AS (SELECT 'x' AS x){tables} SELECT {tail} FROM a{}", count - 1)
    };
    let doubled = |i: usize| format!("SELECT * FROM a{i} UNION ALL SELECT * FROM a{i}");
    f.check(&chain(9, &doubled, "count(*)"), &["256"]).await;
    f.refused(&chain(500, &doubled, "count(*)"), "54001", "WITH").await;
    f.refused(&chain(100, &|i| format!("SELECT p.*, q.* FROM a{i} p, a{i} q"), "count(*)"), "54001", "WITH").await;
    let text = |i: usize| format!("SELECT x || x AS x FROM a{i}");
    f.check(&chain(11, &text, "length(x)"), &["1024"]).await;
    f.refused(&chain(60, &text, "length(x)"), "54000", "are allowed").await;
    f.refused(&format!("SELECT 1{}", ", 1".repeat(10_000)), "54011", "1664").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn results_of_functions_are_bounded_before_they_are_made() {
    let f = Fixture::new().await;
    for call in [
        "repeat('x', 1000000000)",
        "repeat(repeat('x', 100000), 100000)",
        "lpad('x', 2147483647)",
        "rpad('x', 2147483647, 'ab')",
        "replace(repeat('x', 100000), 'x', repeat('y', 100000))",
        "regexp_replace(repeat('x', 1000000), '(.*)', repeat('\\1', 1000))",
        "concat(repeat('x', 40000000), repeat('x', 40000000))",
        "repeat('x', 40000000) || repeat('x', 40000000)",
        "concat_ws('-', repeat('x', 40000000), repeat('x', 40000000))",
        "array_repeat(1, 1000000000)",
        "array_repeat(array_repeat(1, 10000), 10000)",
        "array_resize(ARRAY[1], 1000000000)",
        "array_to_string(array_repeat('x', 10000), repeat('y', 100000))",
        "range(1, 1000000000)",
        "range(timestamp '1970-01-01', timestamp '2070-01-01', interval '1 second')",
        "array_concat(range(1, 5000000), range(1, 5000000))",
        "range(1, 5000000) || range(1, 5000000)",
    ] {
        f.refused(&format!("SELECT {call}"), "54000", "are allowed").await;
    }
    let rows = "generate_series(1, 8192) AS t(n)";
    f.refused(&format!("SELECT repeat('x', n * 10) FROM {rows}"), "54000", "repeat would give").await;
    f.refused(&format!("SELECT repeat('x', 20000 + n % 2) FROM {rows}"), "54000", "in a value or a batch").await;
    for long in ["repeat('x', 20000)", "CASE WHEN n > 1 THEN repeat('x', 20000) END"] {
        f.refused(&format!("SELECT {long} FROM {rows}"), "54000", "for each row").await;
    }
    let columns = (0..20).map(|i| format!("repeat('x', 10000000) AS c{i}")).collect::<Vec<_>>().join(", ");
    f.refused(&format!("SELECT {columns}"), "54000", "are allowed").await;
    let window = "SELECT max(length(a)) FROM (SELECT string_agg(n::text, ',') OVER (ORDER BY n) AS a FROM";
    f.refused(&format!("{window} generate_series(1, 100000) AS t(n)) x"), "54000", "over a window").await;
    f.check(&format!("{window} generate_series(1, 9) AS t(n)) x"), &["17"]).await;
    f.refused("SELECT * FROM generate_series(1, length(repeat('x', 1000000000)))", "0A000", "repeat").await;
    f.check("SELECT length(repeat('ab', 1000)), lpad('7', 3, '0'), 'a' || 1, NULL || 'a'", &["2000|007|a1|-"]).await;
    f.check(&format!("SELECT sum(length(repeat('x', 100))) FROM {rows}"), &["819200"]).await;
    f.check("SELECT array_to_string(ARRAY[1, 2] || 3, ','), concat_ws('-', 'a', NULL, 'b')", &["1,2,3|a-b"]).await;
    f.check("SELECT upper(host || '!') AS u FROM prometheus.up GROUP BY u ORDER BY u", &["H1!", "H2!", "H3!"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn planning_ends_with_its_deadline() {
    let f = Fixture::new().await;
    f.session.set("statement_timeout", Some("200")).unwrap();
    // A filter that is pushed through projections takes their expressions with it, and doubles each time.
    let tables: String = (1..40).map(|i| format!(", a{i} AS (SELECT x + x AS x FROM a{})", i - 1)).collect();
    let text = format!("WITH a0 AS (SELECT value AS x FROM samples){tables} SELECT * FROM a39 WHERE x > 0");
    let e = f.run(&text).await.expect_err("it never ends");
    assert!(["54000", "57014"].contains(&e.code), "{} {e}", e.code);
}

/// Rows in three files and in memory: a day's first, one that is alone in its time, and one that says some of it again.
async fn spread(f: &Fixture) {
    let hour = |h: i64| (0..40).map(move |i| (h * 3600 + i * 90, ((i * 7 + h) % 11) as f64)).collect::<Vec<_>>();
    for h in [-30, -2, -1] {
        for (job, host) in [("api", "h1"), ("api", "h2"), ("db", "h3"), ("web", "h4")] {
            // One host is new, and one is gone.
            if (host, h) != ("h4", -30) && (host, h) != ("h3", -1) {
                write(&f.engine, &format!("__name__=load,job={job},host={host},le=0.5"), &hour(h)).await;
                write(&f.engine, &format!("__name__=load,job={job},host={host},le=+Inf"), &hour(h)).await;
            }
        }
        if h < -1 {
            f.engine.flush().await.unwrap();
        }
    }
    write(&f.engine, "__name__=load,job=api,host=h1,le=0.5", &hour(-2)).await;
    f.engine.flush().await.unwrap();
    write(&f.engine, "__name__=load,job=api,host=h1,le=0.5", &[(-1800, 99.0), (-3600, 98.0), (60, 97.0)]).await;
    write(&f.engine, "__name__=load,job=api,host=h5,x=no_number,le=1", &[(60, 1.0)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn grouping_by_series_changes_no_answer() {
    let f = Fixture::new().await;
    spread(&f).await;
    let late = "ts >= TIMESTAMP '2026-11-21 05:20:10'";
    let queries = [
        "SELECT host, count(*) FROM {t} GROUP BY host",
        "SELECT host, job, count(*), min(le), max(job) FROM {t} GROUP BY host, job",
        "SELECT count(DISTINCT host), job FROM {t} GROUP BY job",
        "SELECT DISTINCT job, host FROM {t}",
        "SELECT job, count(*), count(x), count(value) FROM {t} WHERE {late} GROUP BY job",
        "SELECT job, count(*) FILTER (WHERE value > 5) FROM {t} GROUP BY job",
        "SELECT job, sum(value), avg(value), min(value), max(value) FROM {t} GROUP BY job",
        "SELECT host, sum(value) FROM {t} WHERE value > 4 GROUP BY host",
        "SELECT host, le, last_value(value ORDER BY ts), first_value(value ORDER BY ts) FROM {t} GROUP BY host, le",
        "SELECT host, percentile_cont(0.9) WITHIN GROUP (ORDER BY value) FROM {t} GROUP BY host",
        "SELECT upper(host) AS h, count(*), count(DISTINCT le) FROM {t} GROUP BY upper(host)",
        "SELECT time_bucket('10m', ts) AS b, job, count(*), sum(value) FROM {t} GROUP BY b, job",
        "SELECT time_bucket('1h', ts) AS b, count(*) FROM {t} GROUP BY b",
        "SELECT ts, job, max(value) FROM {t} WHERE {late} GROUP BY ts, job",
        "SELECT value, job, count(*) FROM {t} GROUP BY value, job",
        "SELECT job, max(twice) FROM (SELECT job, value * 2 AS twice FROM {t} WHERE value < 9) AS d GROUP BY job",
        "SELECT a.host, count(*) FROM (SELECT host, count(*) AS n FROM {t} GROUP BY host) a \
         JOIN (SELECT host, max(value) AS m FROM {t} GROUP BY host) b ON a.host = b.host GROUP BY a.host",
        "SELECT host, sum(value) FROM {t} WHERE job = 'no such' GROUP BY host",
        "SELECT count(*) FROM {t}",
        "SELECT count(*), count(value), max(le), count(DISTINCT host) FROM {t} WHERE {late}",
        "SELECT count(*), max(le) FROM {t} WHERE job = 'no such'",
    ];
    let rows = "(SELECT * FROM (SELECT *, row_number() OVER (ORDER BY ts) AS n FROM prometheus.load) AS w WHERE n > 0)";
    for query in queries {
        let query = query.replace("{late}", late);
        let (by_series, by_row) =
            (query.replace("{t}", "prometheus.load"), query.replace("{t}", &format!("{rows} AS t")));
        let lines = |text: String| {
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        let (plan, other) = (f.plan_of(&by_series).await, f.plan_of(&by_row).await);
        assert!(plan.contains("SeriesAggregateExec") && !other.contains("SeriesAggregateExec"), "{plan}\n{other}");
        let expected = f.run(&by_row).await.unwrap_or_else(|e| panic!("{by_row}: {e}"));
        assert_eq!(lines(f.run(&by_series).await.unwrap()), lines(expected), "{by_series}");
    }
    let counted = f.plan_of("SELECT host, count(*), max(le) FROM prometheus.load GROUP BY host").await;
    assert!(counted.contains("SeriesCountExec") && !counted.contains("TagScanExec"), "{counted}");
    let counted = f.plan_of("SELECT count(*) FROM prometheus.load").await;
    assert!(counted.contains("SeriesCountExec") && !counted.contains("TagScanExec"), "{counted}");
    // What a tag without a row in the range is, nobody asks.
    let numbers = format!(
        "SELECT CAST(x AS DOUBLE) AS n, count(*) FROM prometheus.load WHERE {late} AND ts < TIMESTAMP '2026-11-21 06:30:00' GROUP BY n"
    );
    f.check(&numbers, &["-|328"]).await;
    assert!(f.run("SELECT CAST(x AS DOUBLE) AS n, count(*) FROM prometheus.load GROUP BY n").await.is_err());
}
