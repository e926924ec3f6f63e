//! `psql` against the PostgreSQL endpoint: tables, the usual SQL, cancelling, going away. And the scripts of
//! `tests/sql/*.slt`, in the format of sqllogictest, sent the same way.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::harness::programs::output;
use crate::harness::server::signal;
use crate::harness::{Server, now_ms, program, series, wait_for};

/// A server and a `psql` for it.
struct Psql {
    server: Server,
    program: PathBuf,
}

impl Psql {
    fn new() -> Option<Self> {
        let program = program("psql")?;
        Some(Self { server: Server::start(), program })
    }

    fn arguments(&self) -> Vec<String> {
        let port = self.server.postgres.port().to_string();
        let fixed =
            ["-X", "-At", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-U", "any", "-d", "thalweg", "-p", &port];
        fixed.map(str::to_owned).to_vec()
    }

    fn try_run(&self, commands: &[&str]) -> Output {
        let mut arguments = self.arguments();
        for command in commands {
            arguments.extend(["-c".to_owned(), (*command).to_owned()]);
        }
        output(&self.program, arguments)
    }

    /// The rows that the commands print; they must succeed.
    fn run(&self, commands: &[&str]) -> Vec<String> {
        let output = self.try_run(commands);
        assert!(output.status.success(), "{commands:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
    }

    /// The message of a command that must fail.
    fn refused(&self, commands: &[&str]) -> String {
        let mut verbose = vec!["\\set VERBOSITY verbose"];
        verbose.extend(commands);
        let output = self.try_run(&verbose);
        assert!(!output.status.success(), "{commands:?} succeeded: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// A query that runs until it is stopped.
    fn endless(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(self.arguments()).args(["-c", ENDLESS]).stdin(Stdio::null());
        command
    }

    fn queries_running(&self) -> Option<u64> {
        let text = self.server.client().get("/metrics").text();
        let line = text.lines().find(|l| l.starts_with("thalweg_queries_running"))?;
        line.rsplit(' ').next()?.parse().ok()
    }
}

/// Some 10^12 pairs of pairs.
const ENDLESS: &str = "SELECT count(*) FROM samples a CROSS JOIN samples b CROSS JOIN samples c CROSS JOIN samples d \
                       WHERE a.value + b.value + c.value + d.value < 0";

fn fill(server: &Server) {
    let now = now_ms() / 60_000 * 60_000 - 3_600_000;
    let points = |first: f64| (0..60).map(|i| (now + i * 1000, first + i as f64)).collect::<Vec<_>>();
    server.write(&[
        series("requests_total", &[("job", "api"), ("instance", "a")], &points(0.0)),
        series("requests_total", &[("job", "api"), ("instance", "b")], &points(100.0)),
        series("requests_total", &[("job", "web"), ("instance", "c")], &points(1000.0)),
        series("owner", &[("job", "api"), ("team", "red")], &[(now, 1.0)]),
        series("owner", &[("job", "web"), ("team", "blue")], &[(now, 1.0)]),
    ]);
}

#[test]
fn psql_asks_everything_that_people_ask() {
    let Some(psql) = Psql::new() else { return };
    fill(&psql.server);
    let check = |query: &str, expected: &[&str]| assert_eq!(psql.run(&[query]), expected, "{query}");
    let all = || {
        check("SELECT count(*), count(DISTINCT metric) FROM samples", &["182|2"]);
        check("SELECT metric, count(*) FROM samples GROUP BY metric ORDER BY 1", &["owner|2", "requests_total|180"]);
        check(
            "SELECT instance, max(value), sum(value) FROM prometheus.requests_total GROUP BY instance ORDER BY instance",
            &["a|59|1770", "b|159|7770", "c|1059|61770"],
        );
        check("SELECT instance FROM prometheus.requests_total WHERE job = 'web' LIMIT 1", &["c"]);
        check("SELECT DISTINCT job FROM prometheus.requests_total WHERE instance ~ '^[ab]$'", &["api"]);
        check("SELECT count(*) FROM samples WHERE tags['team'] = 'red'", &["1"]);
        check(
            "SELECT o.team, count(*) FROM prometheus.requests_total r JOIN prometheus.owner o ON r.job = o.job \
             GROUP BY o.team ORDER BY o.team",
            &["blue|60", "red|120"],
        );
        check(
            "WITH last AS (SELECT instance, value, row_number() OVER (PARTITION BY instance ORDER BY ts DESC) AS n \
             FROM prometheus.requests_total) SELECT instance, value FROM last WHERE n = 1 ORDER BY instance",
            &["a|59", "b|159", "c|1059"],
        );
        check(
            "SELECT instance, sum(delta) FROM (SELECT instance, value - lag(value) OVER (PARTITION BY instance ORDER BY ts) \
             AS delta FROM prometheus.requests_total) AS d GROUP BY instance ORDER BY instance",
            &["a|59", "b|59", "c|59"],
        );
        check(
            "SELECT job FROM prometheus.requests_total UNION SELECT job FROM prometheus.owner ORDER BY 1",
            &["api", "web"],
        );
        check(
            "SELECT count(*) FROM prometheus.requests_total WHERE ts < now() AND ts > now() - interval '1 day'",
            &["180"],
        );
        check("SELECT 1 + 1", &["2"]);
        let odd = "SELECT count(*) FROM promql('quantile_over_time(2, requests_total[2h]) + rate(requests_total[2h])')";
        let said = |level: &str| {
            let told = psql.try_run(&[&format!("SET client_min_messages = {level}"), odd]);
            assert!(told.status.success(), "{told:?}");
            String::from_utf8_lossy(&told.stderr).into_owned()
        };
        let warning = "WARNING:  PromQL warning: quantile value should be between 0 and 1, got 2 (1:20)";
        assert_eq!(said("notice").trim_end(), warning);
        assert_eq!(said("error"), "");
        let body = psql.server.client().form("/api/v1/sql", &[("query", odd)]).json();
        assert_eq!(body["warnings"], serde_json::json!([warning.trim_start_matches("WARNING:  ")]));
        check(
            "SELECT p.tags['job'], o.team, p.value \
             FROM promql('sum by (job) (max_over_time(requests_total[2h]))') p JOIN prometheus.owner o ON o.job = p.tags['job'] \
             ORDER BY 1",
            &["api|red|218", "web|blue|1059"],
        );
        check(
            "SELECT metric, labels, count(*), max(value) FROM promql('requests_total[2h]') GROUP BY 1, 2 ORDER BY 2",
            &[
                "requests_total|{instance=\"a\", job=\"api\"}|60|59",
                "requests_total|{instance=\"b\", job=\"api\"}|60|159",
                "requests_total|{instance=\"c\", job=\"web\"}|60|1059",
            ],
        );
    };
    all();
    psql.server.flush();
    all();
    psql.server.compact();
    all();
}

#[test]
fn psql_lists_tables_and_keeps_its_session() {
    let Some(psql) = Psql::new() else { return };
    fill(&psql.server);
    assert!(psql.run(&["\\dt"]).contains(&"public|samples|table|postgres".to_owned()));
    assert!(psql.run(&["\\dv prometheus.*"]).contains(&"prometheus|requests_total|view|postgres".to_owned()));
    let described = psql.run(&["\\d prometheus.requests_total"]).join("\n");
    for column in ["ts|", "value|double precision", "instance|", "job|"] {
        assert!(described.contains(column), "{column} is not in {described}");
    }
    for command in ["\\l", "\\dn", "\\dv", "\\d"] {
        psql.run(&[command]);
    }
    let samples = psql.run(&["\\d samples"]).join("\n");
    for column in ["tags|jsonb", "value|double precision"] {
        assert!(samples.contains(column), "{column} is not in {samples}");
    }
    assert_eq!(
        psql.run(&["SET search_path TO prometheus", "SELECT count(*) FROM owner"]).last().map(String::as_str),
        Some("2")
    );
    assert_eq!(
        psql.run(&["SET application_name = 'mine'", "SHOW application_name"]).last().map(String::as_str),
        Some("mine")
    );
}

#[test]
fn psql_gets_the_codes_of_postgresql() {
    let Some(psql) = Psql::new() else { return };
    fill(&psql.server);
    let check = |query: &str, code: &str| {
        let message = psql.refused(&[query]);
        assert!(message.contains(code), "{query}: {message}");
    };
    check("SELEC 1", "42601");
    check("SELECT * FROM nothing_here", "42P01");
    check("SELECT nothing_here FROM samples", "42703");
    check("CREATE EXTERNAL TABLE t STORED AS CSV LOCATION '/etc/passwd'", "ERROR");
    check("COPY samples TO '/tmp/never'", "ERROR");
    check("INSERT INTO samples (value) VALUES (1)", "ERROR");
    let late = psql.refused(&["SET statement_timeout = '50ms'", ENDLESS]);
    assert!(late.contains("57014"), "{late}");
    let endless = ENDLESS.replace("samples", "promql('requests_total[2h]')");
    let late = psql.refused(&["SET statement_timeout = '50ms'", &endless]);
    assert!(late.contains("57014"), "{late}");
    check("SELECT * FROM promql('rate(')", "parse error");
}

#[test]
fn control_c_and_going_away_stop_a_query() {
    let Some(psql) = Psql::new() else { return };
    fill(&psql.server);
    let mut child = psql.endless().stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("psql starts");
    wait_for("the query", || (psql.queries_running() == Some(1)).then_some(()));
    signal(child.id(), "INT");
    let output = child.wait_with_output().expect("psql ends");
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("cancel"), "{message}");
    wait_for("the end of the cancelled query", || (psql.queries_running() == Some(0)).then_some(()));

    child = psql.endless().stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("psql starts");
    wait_for("the query", || (psql.queries_running() == Some(1)).then_some(()));
    signal(child.id(), "KILL");
    child.wait().expect("psql ends");
    wait_for("the end of the abandoned query", || (psql.queries_running() == Some(0)).then_some(()));
}

#[test]
fn rates_of_buckets_are_those_of_promql() {
    let Some(psql) = Psql::new() else { return };
    fill(&psql.server);
    let first: f64 =
        psql.run(&["SELECT extract(epoch FROM min(ts)) FROM prometheus.requests_total"])[0].parse().expect("a number");
    let at = first + 59.999;
    for function in ["rate", "increase", "delta"] {
        let query = format!(
            "SELECT count(*), max(abs(s.r - p.value)) < 1e-9 FROM (SELECT time_bucket('1 minute', ts) AS t, job, instance, \
             {function}(ts, value) AS r FROM prometheus.requests_total GROUP BY t, job, instance) AS s \
             JOIN promql('{function}(requests_total[1m])', {at}, {at}, '1m') AS p ON s.instance = p.tags['instance']"
        );
        assert_eq!(psql.run(&[&query]), ["3|t"], "{query}");
    }
    let check = |query: &str, expected: &[&str]| assert_eq!(psql.run(&[query]), expected, "{query}");
    check(
        "SELECT instance, last(value, ts), uniq(value), percentile(value, 50) FROM prometheus.requests_total GROUP BY instance ORDER BY 1",
        &["a|59|60|29.5", "b|159|60|129.5", "c|1059|60|1029.5"],
    );
    check("SELECT topk(instance, 2), uniq(job) FROM prometheus.requests_total", &["{a,b}|2"]);
    check("SELECT count(*) FROM samples WHERE tags @> '{\"job\":\"api\"}' AND tags ? 'instance'", &["120"]);
    // Of the three buckets only the first has values below 20.
    let (from, to) = (first, first + 60.0);
    check(
        &format!(
            "SELECT count(*), count(n), sum(f) FROM (SELECT time_bucket_gapfill('20 s', ts) AS t, instance, count(*) AS n, \
             locf(max(value)) AS f FROM prometheus.requests_total WHERE ts >= to_timestamp({from}) \
             AND ts < to_timestamp({to}) AND value < 20 GROUP BY t, instance) AS g"
        ),
        &["3|1|57"],
    );
    check("SELECT key, value, series FROM catalog.tags WHERE key = 'job' ORDER BY 2", &["job|api|3", "job|web|2"]);
}

#[test]
fn queries_are_listed_with_what_they_cost_and_can_be_cancelled() {
    let Some(psql) = Psql::new() else { return };
    fill(&psql.server);
    psql.server.flush();
    psql.run(&["SELECT count(DISTINCT value) FROM samples"]);
    let cost = "SELECT state, rows, bytes_scanned > 0, memory > 0, seconds > 0, language FROM catalog.queries \
                WHERE query LIKE 'SELECT count(DISTINCT value)%'";
    assert_eq!(psql.run(&[cost]), ["ok|1|t|t|t|sql"]);
    let child = psql.endless().stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("psql starts");
    let running = "SELECT id FROM catalog.queries WHERE state = 'running' AND query LIKE '%CROSS JOIN%' \
                   AND query NOT LIKE '%catalog.%'";
    let id = wait_for("the query", || psql.run(&[running]).pop());
    assert_eq!(psql.run(&[&format!("SELECT catalog.cancel({id})")]), ["t"]);
    let output = child.wait_with_output().expect("psql ends");
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("cancel"), "{message}");
    assert_eq!(psql.run(&[&format!("SELECT state FROM catalog.queries WHERE id = {id}")]), ["canceled"]);
    assert_eq!(psql.run(&[&format!("SELECT catalog.cancel({id})")]), ["f"]);
}

#[test]
fn a_plan_shows_codes_and_what_was_pruned() {
    let Some(psql) = Psql::new() else { return };
    fill(&psql.server);
    psql.server.flush();
    let plan = psql
        .run(&["EXPLAIN ANALYZE SELECT instance, avg(value) FROM prometheus.requests_total WHERE job LIKE 'ap%' \
                           AND ts > now() - interval '2 hours' GROUP BY 1"]);
    let plan = plan.join("\n");
    for part in [
        "codes=2 of 3",
        "gby=[instance@",
        "instance#",
        "tag_text(instance@",
        "files_pruned=0",
        "row_groups=1",
        "row_groups_pruned=0",
        "pages=",
        "pages_pruned=",
        "bytes_scanned=",
    ] {
        assert!(plan.contains(part), "{part} is missing:\n{plan}");
    }
    // The names of what is grouped are looked up above the aggregate.
    let at = |part: &str| plan.find(part).unwrap_or_else(|| panic!("{part} is missing:\n{plan}"));
    assert!(at("tag_text(instance@") < at("AggregateExec"), "{plan}");
}

#[test]
fn http_answers_in_the_form_that_is_asked_for() {
    let server = Server::start();
    fill(&server);
    let mut client = server.client();
    let mut post = |headers: &[(&str, &str)], body: &str| {
        let answer = client.post("/api/v1/sql", headers, body.as_bytes());
        let header = |name: &str| answer.header(name).unwrap_or_default().to_owned();
        (answer.status, header("content-type"), header("thalweg-truncated"), answer.text())
    };
    const JSON: (&str, &str) = ("Content-Type", "application/json");
    let query = "SELECT instance, count(*), count(*) FROM prometheus.requests_total GROUP BY 1 ORDER BY 1";
    let lines = ("Accept", "application/x-ndjson");
    let expected =
        "{\"instance\":\"a\",\"count\":60,\"count_1\":60}\n{\"instance\":\"b\",\"count\":60,\"count_1\":60}\n";
    let limited = format!("{{\"query\":{query:?},\"limit\":2}}");
    let answer = post(&[JSON, lines], &limited);
    assert_eq!(answer, (200, "application/x-ndjson".to_owned(), "true".to_owned(), expected.to_owned()));
    let answer = post(&[JSON], &limited.replace("\"limit\":2", "\"limit\":3"));
    assert!(answer.2 == "false" && answer.3.ends_with("],\"truncated\":false}\n"), "{answer:?}");
    let parameters = "{\"query\":\"SELECT count(*) FROM prometheus.requests_total WHERE job = $1 AND value >= $2\",\
                      \"parameters\":[\"api\",150],\"format\":\"csv\"}";
    assert_eq!(post(&[JSON], parameters).3, "count\n10\n");
    let named = parameters.replace("$1", "$job").replace("$2", "$least");
    let named = named.replace("[\"api\",150]", "{\"job\":\"api\",\"least\":150}");
    assert_eq!(post(&[JSON], &named).3, "count\n10\n");
    for wrong in [
        parameters.replace("[\"api\",150]", "[\"api\"]"),
        parameters.replace("[\"api\",150]", "[[],150]"),
        parameters.replace("[\"api\",150]", "7"),
        parameters.replace("csv", "xml"),
        "{\"query\":\"SELECT 1\",\"limit\":\"x\"}".to_owned(),
    ] {
        assert_eq!(post(&[JSON], &wrong).0 / 100, 4, "{wrong}");
    }
}

#[test]
fn scripts_hold() {
    let Some(psql) = Psql::new() else { return };
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sql");
    let mut files: Vec<PathBuf> = std::fs::read_dir(&dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "slt"));
    files.sort();
    let mut failures = String::new();
    for file in &files {
        let text = std::fs::read_to_string(file).expect("a readable script");
        let records: Vec<Record> = text.split("\n\n").filter_map(Record::parse).collect();
        let answers = answers(&psql, &records);
        assert_eq!(answers.len(), records.len(), "{}: psql ended early", file.display());
        for (record, (rows, error)) in records.iter().zip(&answers) {
            if let Err(why) = record.check(rows, error) {
                let _ = writeln!(failures, "{}: {}\n{why}", file.display(), record.query);
            }
        }
    }
    assert!(failures.is_empty(), "records that do not hold:\n{failures}");
}

/// One record of a script: `statement ok`, `statement error [TEXT]` or `query TYPES [rowsort]` with rows below `----`.
struct Record {
    head: String,
    query: String,
    rows: Vec<String>,
}

impl Record {
    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines().filter(|l| !l.starts_with('#')).skip_while(|l| l.trim().is_empty());
        let head = lines.next()?.to_owned();
        let body: Vec<&str> = lines.collect();
        let separator = body.iter().position(|l| *l == "----").unwrap_or(body.len());
        let rows = body.iter().skip(separator + 1).map(|l| l.trim_end().to_owned()).filter(|l| !l.is_empty()).collect();
        Some(Self { head, query: body[..separator].join("\n").trim_end_matches(';').to_owned(), rows })
    }

    fn check(&self, rows: &[String], error: &str) -> Result<(), String> {
        if let Some(text) = self.head.strip_prefix("statement error") {
            let right = !error.is_empty() && error.contains(text.trim());
            return if right { Ok(()) } else { Err(format!("expected an error with {text:?}, got {error:?}")) };
        }
        if !error.is_empty() {
            return Err(error.to_owned());
        }
        let (mut want, mut seen) = (self.rows.clone(), rows.to_vec());
        if self.head.contains("rowsort") {
            want.sort();
            seen.sort();
        }
        let right = seen == want || !self.head.starts_with("query");
        if right { Ok(()) } else { Err(format!("expected {want:#?}\ngot {seen:#?}")) }
    }
}

/// Sends all records through one session. Rows with blanks between the columns, and the error message or nothing.
fn answers(psql: &Psql, records: &[Record]) -> Vec<(Vec<String>, String)> {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = dir.path().join("script.sql");
    let mut script = String::from("\\set ON_ERROR_STOP 0\n");
    for record in records {
        let _ = writeln!(
            script,
            "{};\n\\if :ERROR\n\\echo @error :SQLSTATE :LAST_ERROR_MESSAGE\n\\endif\n\\echo @end",
            record.query
        );
    }
    std::fs::write(&file, script).expect("a file for the script");
    let mut arguments = psql.arguments();
    arguments.extend(["-q".to_owned(), "-f".to_owned(), file.display().to_string()]);
    let stdout = String::from_utf8_lossy(&output(&psql.program, arguments).stdout).replace('|', " ");
    let mut answers = Vec::new();
    let (mut rows, mut error) = (Vec::new(), String::new());
    for line in stdout.lines() {
        if line == "@end" {
            answers.push((std::mem::take(&mut rows), std::mem::take(&mut error)));
        } else if let Some(message) = line.strip_prefix("@error ") {
            error = message.to_owned();
        } else {
            rows.push(line.trim_end().to_owned());
        }
    }
    answers
}
