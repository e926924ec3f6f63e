//! Random queries of a seeded generator, answered by a real Prometheus 2.42 and by us from the same samples.
//!
//! What 2.42 and Prometheus 3 answer differently is not asked for: [`LEFT_OUT`] says what and why. `DIFFERENTIAL_QUERIES`
//! asks for more queries than the gate does, `DIFFERENTIAL_SEED` for others.

use std::net::SocketAddr;

use serde_json::Value;

use crate::harness::{Client, Process, Random, Series, Server, free_port, now_ms, program, series, wait_for};

/// What is left out, with the change in Prometheus since 2.42 that makes it differ, and how queries or data avoid it.
const LEFT_OUT: [(&str, &str); 12] = [
    (
        "samples at the edge of a window",
        "3.0: ranges and lookback are open on the left (#13904, #15431). Evaluation times end in half a second, ranges are \
         whole seconds, and samples lie elsewhere",
    ),
    ("subqueries within subqueries", "3.0: the same; their times meet whatever the samples are"),
    (
        "counters near zero",
        "2.51: rate applies the limit of half an interval before that of zero (#13725). Counters stay far above their \
         increase, also after a reset",
    ),
    (
        "predict_linear over a range with @",
        "2.51: such ranges are read once and not moved along with the evaluation time (#13559)",
    ),
    (
        "timestamp of a selector with @ and offset",
        "both replace the offset by the distance to the time that @ names, and then look where they have not read",
    ),
    ("atan2 as the outermost operation", "3.0 drops the metric's name. A function that drops names is around it"),
    (
        "comparisons of several series with one",
        "3.9: several matches are an error even where the comparison leaves one (#17668). Without bool, sides that are \
         compared are of one metric each, whose series differ",
    ),
    (
        "stddev and stdvar of NaN and infinities",
        "3.0: treated alike wherever they stand (#14941). Those values lie in a metric of their own, which is not asked for \
         there",
    ),
    (
        "sums that cancel each other, and functions that magnify the last digits",
        "2.54 and 3.0: sum and avg are compensated (#14074, #14413). Values of one metric have one sign, and what jumps or \
         turns quickly is applied to exact values",
    ),
    ("quantiles at the edge of a bucket", "2.49: small differences of buckets are passed over (#13153)"),
    ("numbers as durations, durations as numbers, and other syntax", "not in 2.42"),
    ("native histograms, limitk, fill, info, holt_winters", "not in 2.42, or renamed since"),
];

/// Queries in the gate.
const QUERIES: u64 = 200;

const STEP_MS: i64 = 15_000;
const STEPS: i64 = 480;
/// Relative to the larger value.
const TOLERANCE: f64 = 1e-9;

/// Samples of two hours before `end`.
fn data(random: &mut Random, end: i64) -> Vec<Series> {
    let mut all = Vec::new();
    let mut add =
        |random: &mut Random, metric: &str, labels: &[(&str, &str)], value: &mut dyn FnMut(&mut Random, i64) -> f64| {
            // Neither at a whole nor at half a second, wherever a window ends.
            let jitter = [137, 311, 433, 611, 787, 941][random.below(6) as usize] + 1000 * random.below(14) as i64;
            let (first, last) = match random.below(6) {
                0 => (random.below(STEPS as u64 / 2) as i64, STEPS),
                1 => (0, STEPS - random.below(STEPS as u64 / 2) as i64),
                _ => (0, STEPS),
            };
            let mut samples = Vec::new();
            let (mut gap, mut stale) = (0, false);
            for n in first..last {
                let v = value(random, n);
                if gap > 0 {
                    gap -= 1;
                    continue;
                }
                if random.below(60) == 0 {
                    gap = random.below(40);
                    stale = random.below(2) == 0;
                }
                let v = if stale { f64::from_bits(0x7ff0_0000_0000_0002) } else { v };
                stale = false;
                samples.push((end - (STEPS - n) * STEP_MS + jitter, v));
            }
            all.push(series(metric, labels, &samples));
        };
    for (j, job) in ["a", "b", "c"].into_iter().enumerate() {
        for instance in 0..4 {
            let name = instance.to_string();
            let labels = [("job", job), ("instance", name.as_str()), ("zone", ["x", "y"][instance % 2])];
            let own = (j * 4 + instance) as f64;
            add(random, "g1", &labels, &mut |r, _| 10.0 + own / 64.0 + r.below(10_000) as f64);
            add(random, "g2", &labels[..2], &mut |r, n| 0.5 + own / 128.0 + r.below(50) as f64 / 10.0 + n as f64 / 1e3);
            let mut c = 1e6 + 1e4 * own;
            add(random, "c1_total", &labels, &mut |r, _| {
                c += r.below(1000) as f64 / 8.0;
                if r.below(80) == 0 {
                    c = 5e5 + own;
                }
                c
            });
            let mut c = 2e6;
            add(random, "c2_total", &labels[..2], &mut |r, _| {
                c += r.below(3) as f64;
                c
            });
            let values = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0, 1.0, -1.5, 1e300];
            add(random, "special", &labels[..2], &mut |r, _| values[r.below(8) as usize]);
            add(random, "when", &labels[..2], &mut |r, n| (r.below(1 << 31) as i64 - 86_400 * n) as f64);
            add(random, "negative", &labels[..1 + instance % 2], &mut |r, _| -1.0 - own / 64.0 - r.below(300) as f64);
            if instance > 1 {
                continue;
            }
            let mut counts = [1e6; 6];
            let mut rows: Vec<[f64; 6]> = Vec::new();
            for _ in 0..STEPS {
                let mut more = 0.0;
                for count in &mut counts {
                    more += random.below(9) as f64;
                    *count += more;
                }
                rows.push(counts);
            }
            for (i, le) in ["0.1", "0.5", "1", "2.5", "10", "+Inf"].into_iter().enumerate() {
                let labels = [("job", job), ("instance", name.as_str()), ("le", le)];
                add(random, "h_bucket", &labels, &mut |_, n| rows[n as usize][i]);
            }
        }
    }
    // Duplicates of labels would be the same series twice.
    all.sort_by(|a, b| a.labels.cmp(&b.labels));
    all.dedup_by(|a, b| a.labels == b.labels);
    all
}

/// Makes queries.
struct Generator {
    random: Random,
    /// Within a subquery.
    inside: bool,
    /// Seconds, half a second after a whole one.
    middle: f64,
}

impl Generator {
    fn pick<'a>(&mut self, all: &[&'a str]) -> &'a str {
        all[self.random.below(all.len() as u64) as usize]
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.random.below(one_in) == 0
    }

    fn number(&mut self) -> String {
        self.pick(&["0", "1", "2", "-1", "0.5", "1e3", "3.25", "-7", "60", "1e-3"]).to_owned()
    }

    fn duration(&mut self) -> &'static str {
        self.pick(&["17s", "31s", "1m", "95s", "2m", "5m", "10m", "1h"])
    }

    fn matchers(&mut self) -> String {
        let one = |g: &mut Self| {
            g.pick(&[
                "job=\"a\"",
                "job!=\"a\"",
                "job=~\"a|b\"",
                "job!~\"b.*\"",
                "instance=\"2\"",
                "instance=~\"[01]\"",
                "zone=\"x\"",
                "zone=\"\"",
                "zone!=\"\"",
                "instance!~\"\"",
                "none=\"\"",
                "none=\"x\"",
                "job=~\".+\"",
            ])
        };
        match self.random.below(5) {
            0 | 1 => String::new(),
            2 | 3 => format!("{{{}}}", one(self)),
            _ => format!("{{{},{}}}", one(self), one(self)),
        }
    }

    fn modifiers(&mut self) -> String {
        let offset = match self.random.below(8) {
            0 => format!(" offset {}", self.duration()),
            1 => format!(" offset -{}", self.duration()),
            _ => String::new(),
        };
        let at = match self.random.below(14) {
            0 => " @ start()".to_owned(),
            1 => " @ end()".to_owned(),
            2 => format!(" @ {:.3}", self.middle - 60.0 * self.random.below(30) as f64),
            _ => String::new(),
        };
        if self.chance(2) { offset + &at } else { at + &offset }
    }

    fn metric(&mut self) -> &'static str {
        self.pick(&["g1", "g1", "g2", "c1_total", "c2_total", "when", "negative"])
    }

    fn selector(&mut self) -> String {
        let name = match self.random.below(12) {
            0 => "special",
            1 => return format!("{{__name__=~\"g1|g2|negative\",job=\"b\"}}{}", self.modifiers()),
            2 => "h_bucket",
            _ => self.metric(),
        };
        format!("{name}{}{}", self.matchers(), self.modifiers())
    }

    /// A range vector of one metric.
    fn range(&mut self, metric: &str) -> String {
        format!("{metric}{}[{}]{}", self.matchers(), self.duration(), self.modifiers())
    }

    fn subquery(&mut self, depth: u32, exact: bool) -> Option<String> {
        if self.inside {
            return None;
        }
        self.inside = true;
        let inner = if exact { self.exact(depth) } else { self.vector(depth) };
        self.inside = false;
        let (range, step) = (self.duration(), self.pick(&["7s", "10s", "30s", "1m", ""]));
        Some(format!("({inner})[{range}:{step}]{}", self.modifiers()))
    }

    fn grouping(&mut self) -> String {
        let labels = self.pick(&["", "job", "job, instance", "zone", "le, job", "none"]);
        match self.random.below(5) {
            0 => String::new(),
            1 | 2 => format!(" by ({labels})"),
            _ => format!(" without ({labels})"),
        }
    }

    /// An expression whose values are exact, so that what jumps at a value does not jump elsewhere in one of the two.
    fn exact(&mut self, depth: u32) -> String {
        if depth == 0 {
            return self.selector();
        }
        let depth = depth - 1;
        match self.random.below(12) {
            0 => {
                let function = self.pick(&["min", "max", "last", "count", "present"]);
                let metric = self.metric();
                let range = self.range(metric);
                match self.subquery(depth, true).filter(|_| function != "count") {
                    Some(subquery) => format!("{function}_over_time({subquery})"),
                    None => format!("{function}_over_time({range})"),
                }
            }
            1 => format!("{}({})", self.pick(&["changes", "resets"]), self.range("g1")),
            2 => {
                let (op, by) = (self.pick(&["min", "max", "count", "group"]), self.grouping());
                format!("{op}{by} ({})", self.exact(depth))
            }
            3 if self.chance(5) => format!("timestamp({}{} offset 1m)", self.metric(), self.matchers()),
            3 => {
                let function = self.pick(&["abs", "ceil", "floor", "sgn", "round", "-"]);
                format!("{function}({})", self.exact(depth))
            }
            4 => {
                let bounds = self.pick(&["clamp_min(%, 3)", "clamp_max(%, 20)", "clamp(%, -5, 30)", "clamp(%, 5, 1)"]);
                bounds.replace('%', &self.exact(depth))
            }
            5 => {
                let (op, bool) = (self.pick(&["==", "!=", "<", ">", "<=", ">="]), self.pick(&["", " bool"]));
                format!("({}) {op}{bool} {}", self.exact(depth), self.number())
            }
            6 => {
                let op = self.pick(&["==", "!=", "<", ">", "<=", ">="]);
                if self.chance(2) {
                    let (op, by) = (format!("{op} bool"), self.matching());
                    return format!("({}) {op}{by} ({})", self.exact(depth), self.exact(depth));
                }
                let by =
                    self.pick(&["", " on (job, instance)", " ignoring (zone)", " on (job, instance) group_left ()"]);
                let mut side = || format!("{}{}{}", self.metric(), self.matchers(), self.modifiers());
                format!("{} {op}{by} {}", side(), side())
            }
            7 => {
                let (op, on) =
                    (self.pick(&["and", "or", "unless"]), self.pick(&["", " on (job)", " ignoring (zone)", " on ()"]));
                format!("({}) {op}{on} ({})", self.exact(depth), self.exact(depth))
            }
            8 => {
                let arguments = self.pick(&[
                    "\"to\", \"$1\", \"instance\", \"(.*)\"",
                    "\"job\", \"j-${1}-$2\", \"job\", \"(a)(.*)\"",
                    "\"zone\", \"\", \"job\", \".*\"",
                    "\"__name__\", \"other\", \"job\", \"a\"",
                    "\"to\", \"x\", \"none\", \"\"",
                ]);
                format!("label_replace({}, {arguments})", self.exact(depth))
            }
            9 => {
                let arguments =
                    self.pick(&["\"to\", \"-\", \"job\", \"instance\"", "\"zone\", \"\", \"none\"", "\"to\", \",\""]);
                format!("label_join({}, {arguments})", self.exact(depth))
            }
            10 => {
                let op = self.pick(&["topk", "bottomk"]);
                // Values of one metric differ.
                let (metric, matchers, by) = (self.pick(&["g1", "negative"]), self.matchers(), self.grouping());
                format!("{op}{by} ({}, {metric}{matchers})", self.pick(&["0", "1", "3", "100", "-1"]))
            }
            _ => format!("count_values(\"value\", {})", self.exact(depth)),
        }
    }

    fn matching(&mut self) -> String {
        self.pick(&[
            "",
            "",
            " on (job, instance)",
            " ignoring (zone)",
            " on (job, instance) group_left ()",
            " on (job, instance) group_right (zone)",
            " ignoring (zone, le) group_left (zone)",
            " on (job)",
        ])
        .to_owned()
    }

    fn vector(&mut self, depth: u32) -> String {
        if depth == 0 {
            return self.selector();
        }
        let below = depth - 1;
        match self.random.below(18) {
            0 | 1 => self.exact(depth),
            2 | 3 => {
                let function = self.pick(&["rate", "increase", "irate"]);
                let metric = self.pick(&["c1_total", "c2_total", "h_bucket"]);
                format!("{function}({})", self.range(metric))
            }
            4 => {
                let function = self.pick(&[
                    "delta",
                    "idelta",
                    "deriv",
                    "avg_over_time",
                    "sum_over_time",
                    "stddev_over_time",
                    "stdvar_over_time",
                ]);
                let metric = self.pick(&["g1", "g2", "negative"]);
                format!("{function}({})", self.range(metric))
            }
            5 => {
                let function = self.pick(&[
                    "quantile_over_time(0.3, %)",
                    "quantile_over_time(1.5, %)",
                    "predict_linear(%, 600)",
                    "predict_linear(%, -60)",
                    "absent_over_time(%)",
                ]);
                let metric = self.pick(&["g1", "g2", "negative"]);
                let mut range = self.range(metric);
                while function.starts_with("predict") && range.contains('@') {
                    range = self.range(metric);
                }
                function.replace('%', &range)
            }
            6 => match self.subquery(below, false) {
                Some(subquery) => {
                    let function = self.pick(&["max", "min", "last", "count", "avg", "present"]);
                    format!("{function}_over_time({subquery})")
                }
                None => self.vector(below),
            },
            7 => {
                if self.chance(3) {
                    return format!("{}({})", self.pick(&["ln", "log2", "log10", "sin", "cos"]), self.exact(below));
                }
                let function = self.pick(&["sqrt", "atan", "sinh", "asinh", "tanh", "deg", "rad", "-", "abs"]);
                format!("{function}({})", self.vector(below))
            }
            8 => {
                let function = self.pick(&["exp", "acos", "asin", "acosh", "atanh", "cosh", "tan"]);
                format!("{function}({} / 1e4)", self.pick(&["g1", "g2", "negative"]))
            }
            9 => {
                let function = self.pick(&[
                    "day_of_month",
                    "day_of_week",
                    "day_of_year",
                    "days_in_month",
                    "hour",
                    "minute",
                    "month",
                    "year",
                ]);
                let argument = self.pick(&["", "when", "when{job=\"a\"} offset 1m", "vector(time())"]);
                format!("{function}({argument})")
            }
            10 | 11 => {
                let (op, by) = (self.pick(&["sum", "avg", "min", "max", "count", "group"]), self.grouping());
                format!("{op}{by} ({})", self.vector(below))
            }
            12 => {
                let (op, by) = (self.pick(&["stddev", "stdvar", "quantile"]), self.grouping());
                let q = if op == "quantile" { self.pick(&["0.5, ", "0, ", "0.99, ", "2, "]) } else { "" };
                let (metric, matchers) = (self.pick(&["g1", "g2", "rate(c1_total[5m])"]), self.matchers());
                let matchers = if metric.ends_with(')') { String::new() } else { matchers };
                format!("{op}{by} ({q}{metric}{matchers})")
            }
            13 => {
                let op = self.pick(&["+", "-", "*", "/", "^"]);
                let (vector, scalar) = (self.vector(below), self.scalar(below));
                if self.chance(2) { format!("({vector}) {op} {scalar}") } else { format!("{scalar} {op} ({vector})") }
            }
            14 => {
                let (op, matching) = (self.pick(&["+", "*", "/"]), self.matching());
                format!("({}) {op}{matching} ({})", self.vector(below), self.vector(below))
            }
            15 => {
                let op = self.pick(&["%", "atan2"]);
                let (a, b) = (self.exact(below), self.number());
                format!("abs(({a}) {op} {b})")
            }
            16 => {
                let q = self.pick(&["0.5", "0.9", "0.37", "-1", "1.1"]);
                let by = self.pick(&["", "sum by (le) ", "sum by (le, job) ", "sum without (instance) "]);
                let range = self.duration();
                format!("histogram_quantile({q}, {by}(rate(h_bucket[{range}])))")
            }
            _ => match self.random.below(5) {
                0 => format!("absent({})", self.selector()),
                1 => format!("vector({})", self.scalar(below)),
                2 => format!("{}({})", self.pick(&["sort", "sort_desc"]), self.vector(below)),
                3 => {
                    format!("({}) {} ({})", self.vector(below), self.pick(&["and", "or", "unless"]), self.vector(below))
                }
                _ => format!("round({}, 0.25)", self.exact(below)),
            },
        }
    }

    fn scalar(&mut self, depth: u32) -> String {
        match self.random.below(8) {
            0 => "time()".to_owned(),
            1 => "pi()".to_owned(),
            2 if depth > 0 => format!("scalar({})", self.exact(depth - 1)),
            3 if depth > 0 => {
                let op = self.pick(&["+", "-", "*", "/", "%", "^", "> bool", "atan2"]);
                format!("({} {op} {})", self.scalar(depth - 1), self.number())
            }
            _ => self.number(),
        }
    }

    /// A query with the times at which to ask it.
    fn question(&mut self) -> (String, &'static str, Vec<(&'static str, String)>) {
        let depth = 1 + self.random.below(4) as u32;
        let query = if self.chance(20) { self.scalar(depth) } else { self.vector(depth) };
        let at = self.middle - 30.0 * self.random.below(100) as f64;
        if self.chance(2) {
            return (query, "/api/v1/query", vec![("time", format!("{at:.3}"))]);
        }
        let step = [1, 7, 15, 30, 60, 300][self.random.below(6) as usize];
        let start = at - (step * self.random.below(40)) as f64;
        let times = vec![("start", format!("{start:.3}")), ("end", format!("{at:.3}")), ("step", step.to_string())];
        (query, "/api/v1/query_range", times)
    }
}

type Answer = Vec<(String, Vec<(String, f64)>)>;

/// Series by their labels; an error is its type.
fn normalised(answer: &Value) -> Result<Answer, String> {
    if answer["status"] != "success" {
        return Err(answer["errorType"].as_str().unwrap_or("no type").to_owned());
    }
    let data = &answer["data"];
    let point = |p: &Value| {
        let value = p[1].as_str().and_then(|v| v.parse().ok());
        (p[0].as_f64().map_or_else(String::new, |t| format!("{t:.3}")), value.unwrap_or_else(|| panic!("{p}")))
    };
    if data["resultType"] == "scalar" {
        return Ok(vec![("scalar".to_owned(), vec![point(&data["result"])])]);
    }
    let one = |one: &Value| {
        let mut labels: Vec<String> =
            one["metric"].as_object().into_iter().flatten().map(|(k, v)| format!("{k}={v}")).collect();
        labels.sort();
        let points = one["values"].as_array().cloned().unwrap_or_else(|| vec![one["value"].clone()]);
        (labels.join(","), points.iter().map(point).collect())
    };
    let mut series: Answer = data["result"].as_array().into_iter().flatten().map(one).collect();
    series.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(series)
}

/// The first difference.
fn difference(theirs: &Result<Answer, String>, ours: &Result<Answer, String>) -> Option<String> {
    let (theirs, ours) = match (theirs, ours) {
        (Ok(theirs), Ok(ours)) => (theirs, ours),
        (Err(a), Err(b)) if a == b => return None,
        other => return Some(format!("{other:?}").chars().take(400).collect()),
    };
    let names = |all: &Answer| all.iter().map(|s| s.0.clone()).collect::<Vec<_>>();
    if names(theirs) != names(ours) {
        let (a, b) = (names(theirs), names(ours));
        let only =
            |a: &[String], b: &[String]| a.iter().filter(|n| !b.contains(n)).take(3).cloned().collect::<Vec<_>>();
        return Some(format!(
            "{} and {} series; {:?} are theirs alone, {:?} ours",
            a.len(),
            b.len(),
            only(&a, &b),
            only(&b, &a)
        ));
    }
    for ((labels, theirs), (_, ours)) in theirs.iter().zip(ours) {
        let times = |all: &[(String, f64)]| all.iter().map(|p| p.0.clone()).collect::<Vec<_>>();
        if times(theirs) != times(ours) {
            return Some(format!("{labels}: {} and {} points", theirs.len(), ours.len()));
        }
        let close =
            |a: f64, b: f64| a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= TOLERANCE * a.abs().max(b.abs());
        if let Some((a, b)) = theirs.iter().zip(ours).find(|(a, b)| !close(a.1, b.1)) {
            return Some(format!("{labels} at {}: {} and {}", a.0, a.1, b.1));
        }
    }
    None
}

#[test]
fn random_queries_agree_with_prometheus() {
    let Some(prometheus) = program("prometheus") else { return };
    let setting = |name: &str, default: u64| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let (count, seed) = (setting("DIFFERENTIAL_QUERIES", QUERIES), setting("DIFFERENTIAL_SEED", 1));
    let mut random = Random(seed);
    let end = now_ms() / 60_000 * 60_000 - 120_000;
    let all = data(&mut random, end);
    let dir = tempfile::tempdir().expect("a temporary folder");
    let config = dir.path().join("prometheus.yml");
    std::fs::write(&config, "global: {}\n").expect("a file");
    let port = free_port();
    let _process = Process::start(
        &prometheus,
        [
            format!("--config.file={}", config.display()),
            format!("--storage.tsdb.path={}", dir.path().join("tsdb").display()),
            format!("--web.listen-address=127.0.0.1:{port}"),
            "--web.enable-remote-write-receiver".to_owned(),
            "--enable-feature=promql-negative-offset,promql-at-modifier".to_owned(),
        ],
        &dir.path().join("log"),
    );
    let theirs = SocketAddr::from(([127, 0, 0, 1], port));
    wait_for("Prometheus", || (Client::new(theirs).try_get("/-/ready").ok()?.status == 200).then_some(()));
    let server = Server::start();
    // Time by time: Prometheus takes nothing that is much older than what it has.
    let first = end - (STEPS + 1) * STEP_MS;
    for from in (first..=end + 60_000).step_by(600_000) {
        let part = |s: &Series| Series {
            labels: s.labels.clone(),
            samples: s.samples.iter().filter(|s| (from..from + 600_000).contains(&s.0)).copied().collect(),
        };
        let part: Vec<Series> = all.iter().map(part).filter(|s| !s.samples.is_empty()).collect();
        if part.is_empty() {
            continue;
        }
        let response = Client::new(theirs).write(&part).expect("Prometheus is up");
        assert_eq!(response.status, 204, "{}", response.text());
        server.write(&part);
        // Files and memory take part.
        if (from - first) % 3_600_000 == 0 {
            server.flush();
        }
    }
    let mut generator = Generator { random, inside: false, middle: (end / 1000 - 60) as f64 + 0.5 };
    let (mut their_client, mut our_client) = (Client::new(theirs), Client::new(server.http));
    let (mut differences, mut errors, mut empty) = (Vec::new(), 0, 0);
    for _ in 0..count {
        let (query, path, times) = generator.question();
        let mut pairs: Vec<(&str, &str)> = times.iter().map(|(k, v)| (*k, v.as_str())).collect();
        pairs.push(("query", &query));
        let their = normalised(&their_client.form(path, &pairs).json());
        let our = normalised(&our_client.form(path, &pairs).json());
        errors += u64::from(their.is_err());
        empty += u64::from(their.as_ref().is_ok_and(Vec::is_empty));
        if let Some(difference) = difference(&their, &our) {
            differences.push(format!("{query}\n    {times:?}: Prometheus and Thalweg: {difference}"));
        }
    }
    eprintln!("{count} queries of seed {seed}: {errors} errors, {empty} empty, {} differ", differences.len());
    assert!(
        differences.is_empty(),
        "seed {seed}: {} of {count} queries differ; left out is only {:?}\n{}",
        differences.len(),
        LEFT_OUT.map(|l| l.0),
        differences.iter().take(30).cloned().collect::<Vec<_>>().join("\n")
    );
    // A generator of nothing but nonsense would always agree.
    assert!(errors * 4 < count && empty * 3 < count, "{errors} errors and {empty} empty answers of {count}");
}
