//! Scripts in the language of Prometheus's own tests (`tests/promql/*.test`), run over remote write and the HTTP API.
//!
//! `load STEP` and indented series write samples from the epoch on; `eval instant at T EXPR`, `eval range from A to B
//! step C EXPR` and their `eval_ordered` and `eval_fail` forms ask, with the expected series indented below; `clear`
//! starts over with an empty server. Within an `eval`, lines such as `expect fail`, `expect ordered`, `expect string
//! "x"`, `expect warn`, `expect info` and `expect no_warn` say more. Native histograms are written `{{...}}`; of answers,
//! count, sum and populated buckets are compared. A line `series@st OFFSETS` before a series says when its counter began,
//! as offsets from the times of the samples. The servers have all features of the language on.
//!
//! Every script runs twice: with all data in memory, and with a flush after each load.

mod native;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value;

use crate::harness::remote_write::{HEADERS, HEADERS_V2, field, message, snappy, varint};
use crate::harness::{Down, Series, Server, Setup};
use native::Native;

#[derive(Debug)]
enum Command {
    Clear,
    Load(Vec<Load>),
    Eval(Eval),
}

/// A series to write: labels, and its samples by time.
#[derive(Debug)]
struct Load {
    floats: Series,
    histograms: Vec<(i64, Native)>,
    /// When the counter began, by the times of samples.
    starts: BTreeMap<i64, i64>,
}

/// A sample.
#[derive(Debug, Clone, PartialEq)]
enum Point {
    Float(f64),
    Histogram(Native),
}

#[derive(Debug)]
struct Eval {
    line: usize,
    expression: String,
    when: When,
    ordered: bool,
    fails: Option<String>,
    text: Option<String>,
    scalar: Option<f64>,
    /// Sorted labels, and one value or gap for each step.
    expected: Vec<(Labels, Vec<Option<Point>>)>,
    /// `warn` or `info`, and how the text is to begin; `None` when there must be none of them.
    annotations: Vec<(&'static str, Option<String>)>,
}

#[derive(Debug, Clone, Copy)]
enum When {
    Instant(i64),
    Range { start: i64, end: i64, step: i64 },
}

type Labels = Vec<(String, String)>;

/// The bits that mark a series as gone.
const STALE: u64 = 0x7ff0_0000_0000_0002;

#[test]
fn scripts_hold() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/promql");
    let mut files: Vec<_> = std::fs::read_dir(&dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "test"));
    files.sort();
    let (mut passed, mut failures) = (0, String::new());
    for file in &files {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(file).expect("a readable script");
        let commands = parse(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
        for flushing in [false, true] {
            let mut server = start();
            for command in &commands {
                match command {
                    Command::Clear => server = start(),
                    Command::Load(series) => {
                        write(&server, series);
                        if flushing {
                            server.flush();
                        }
                    }
                    Command::Eval(eval) => match check(&server, eval) {
                        Ok(()) => passed += 1,
                        Err(why) => {
                            let form = if flushing { "flushed" } else { "in memory" };
                            let _ = writeln!(failures, "{name}:{} ({form}): {}: {why}", eval.line, eval.expression);
                        }
                    },
                }
            }
        }
    }
    eprintln!("{passed} evaluations of {} scripts hold", files.len());
    assert!(failures.is_empty(), "evaluations that do not hold:\n{failures}");
}

/// A server with all of the language.
fn start() -> Server {
    let features = "promql-experimental-functions,promql-delayed-name-removal,promql-extended-range-selectors,\
                    promql-binop-fill-modifiers";
    let environment = vec![("THALWEG_PROMQL_FEATURES".to_owned(), features.to_owned())];
    Down::new(Setup { environment, ..Setup::default() }).start()
}

/// Writes series, which must succeed.
fn write(server: &Server, series: &[Load]) {
    let mut body = Vec::new();
    if series.iter().any(|one| !one.starts.is_empty()) {
        for one in series {
            let body = snappy(&started(one));
            let response =
                server.client().request("POST", "/api/v1/write", &HEADERS_V2, &body).expect("the server is up");
            assert_eq!(response.status, 204, "{}", response.text());
        }
        return;
    }
    for one in series {
        // A message of one series is a field whose body goes on with the histograms.
        let floats = message(std::slice::from_ref(&one.floats));
        let mut at = 1;
        while floats[at] >= 0x80 {
            at += 1;
        }
        let mut whole = floats[at + 1..].to_vec();
        one.histograms.iter().for_each(|(ts, h)| field(&mut whole, 4, &h.message(*ts)));
        field(&mut body, 1, &whole);
    }
    let response =
        server.client().request("POST", "/api/v1/write", &HEADERS, &snappy(&body)).expect("the server is up");
    assert_eq!(response.status, 204, "{}", response.text());
}

/// A request of remote write 2.0 with one series, which can say when counters began.
fn started(one: &Load) -> Vec<u8> {
    let texts: Vec<&String> = one.floats.labels.iter().flat_map(|(name, value)| [name, value]).collect();
    let start = |body: &mut Vec<u8>, number: u64, ts: &i64| {
        if let Some(start) = one.starts.get(ts) {
            varint(body, number << 3);
            varint(body, *start as u64);
        }
    };
    let mut series = Vec::new();
    let mut references = Vec::new();
    (1..=texts.len() as u64).for_each(|i| varint(&mut references, i));
    field(&mut series, 1, &references);
    for (ts, value) in &one.floats.samples {
        let mut sample = vec![1 << 3 | 1];
        sample.extend_from_slice(&value.to_le_bytes());
        sample.push(2 << 3);
        varint(&mut sample, *ts as u64);
        start(&mut sample, 3, ts);
        field(&mut series, 2, &sample);
    }
    for (ts, h) in &one.histograms {
        let mut histogram = h.message(*ts);
        start(&mut histogram, 17, ts);
        field(&mut series, 3, &histogram);
    }
    let mut out = Vec::new();
    field(&mut out, 4, b"");
    texts.iter().for_each(|text| field(&mut out, 4, text.as_bytes()));
    field(&mut out, 5, &series);
    out
}

fn check(server: &Server, eval: &Eval) -> Result<(), String> {
    let seconds = |ms: i64| format!("{}", ms as f64 / 1000.0);
    let mut form = vec![("query", eval.expression.clone())];
    let path = match eval.when {
        When::Instant(at) => {
            form.push(("time", seconds(at)));
            "/api/v1/query"
        }
        When::Range { start, end, step } => {
            form.extend([("start", seconds(start)), ("end", seconds(end)), ("step", seconds(step))]);
            "/api/v1/query_range"
        }
    };
    let pairs: Vec<(&str, &str)> = form.iter().map(|(k, v)| (*k, v.as_str())).collect();
    let answer = server.client().form(path, &pairs).json();
    let error = answer["error"].as_str();
    match (&eval.fails, error) {
        (None, None) => {}
        (Some(text), Some(error)) if error.contains(text.as_str()) => return Ok(()),
        (Some(text), error) => return Err(format!("expected an error with {text:?}, got {error:?}")),
        (None, Some(error)) => return Err(error.to_owned()),
    }
    for (kind, want) in &eval.annotations {
        let texts = answer[if *kind == "warn" { "warnings" } else { "infos" }].as_array().into_iter().flatten();
        let texts: Vec<&str> = texts.filter_map(Value::as_str).collect();
        match want {
            None if texts.is_empty() => {}
            Some(want) if texts.iter().any(|t| t.starts_with(want.as_str())) => {}
            want => return Err(format!("expected {kind} {want:?}, got {texts:?}")),
        }
    }
    let result = &answer["data"]["result"];
    match answer["data"]["resultType"].as_str().unwrap_or_default() {
        "string" => {
            let seen = result[1].as_str().unwrap_or_default();
            if eval.text.as_deref() == Some(seen) { Ok(()) } else { Err(format!("got the string {seen:?}")) }
        }
        "scalar" => match (eval.scalar, number(&result[1])) {
            (Some(want), Some(seen)) if close(want, seen) => Ok(()),
            (want, seen) => Err(format!("expected scalar {want:?}, got {seen:?}")),
        },
        _ => check_series(eval, result),
    }
}

fn check_series(eval: &Eval, result: &Value) -> Result<(), String> {
    let (start, step) = match eval.when {
        When::Instant(at) => (at, 1),
        When::Range { start, step, .. } => (start, step),
    };
    let empty = Vec::new();
    let seen = result.as_array().unwrap_or(&empty);
    let mut missing: Vec<usize> =
        (0..eval.expected.len()).filter(|i| eval.expected[*i].1.iter().any(Option::is_some)).collect();
    for (position, one) in seen.iter().enumerate() {
        let labels = labels_of(&one["metric"]);
        let Some(index) = eval.expected.iter().position(|(want, _)| *want == labels) else {
            return Err(format!("unexpected series {labels:?}"));
        };
        if eval.ordered && index != position {
            return Err(format!("{labels:?} is at place {position}, expected at {index}"));
        }
        let all = |many: &str, one_of: &str| match one[many].as_array() {
            Some(points) => points.clone(),
            None => one.get(one_of).cloned().into_iter().collect(),
        };
        let mut values: Vec<Option<Value>> = vec![None; eval.expected[index].1.len()];
        for point in [all("values", "value"), all("histograms", "histogram")].concat() {
            let ms = (point[0].as_f64().unwrap_or(f64::NAN) * 1000.0).round() as i64;
            let slot = usize::try_from((ms - start) / step).ok().and_then(|i| values.get_mut(i));
            let slot = slot.ok_or_else(|| format!("{labels:?} has a point at {ms} ms"))?;
            if slot.replace(point[1].clone()).is_some() {
                return Err(format!("{labels:?} has two points at {ms} ms"));
            }
        }
        for (i, (want, got)) in eval.expected[index].1.iter().zip(&values).enumerate() {
            let difference = match (want, got) {
                (Some(Point::Float(want)), Some(got)) if number(got).is_some_and(|got| close(*want, got)) => None,
                (Some(Point::Histogram(want)), Some(got)) if got.is_object() => want.differs(got),
                (None, None) => None,
                (want, got) => Some(format!("expected {want:?}, got {got:?}")),
            };
            if let Some(difference) = difference {
                return Err(format!("{labels:?} at step {i}: {difference}"));
            }
        }
        missing.retain(|i| *i != index);
    }
    match missing.first() {
        Some(index) => Err(format!("missing series {:?}", eval.expected[*index].0)),
        None => Ok(()),
    }
}

fn labels_of(metric: &Value) -> Labels {
    let mut labels: Labels = metric
        .as_object()
        .into_iter()
        .flatten()
        .map(|(k, v)| (k.clone(), v.as_str().unwrap_or_default().to_owned()))
        .collect();
    labels.sort();
    labels
}

fn number(value: &Value) -> Option<f64> {
    parse_float(value.as_str()?)
}

/// As close as Prometheus's own test runner wants them.
fn close(want: f64, seen: f64) -> bool {
    if want.is_nan() || seen.is_nan() {
        return want.is_nan() && seen.is_nan();
    }
    want == seen || (want - seen).abs() <= 1e-6 * (want.abs() + seen.abs()).max(f64::MIN_POSITIVE)
}

fn parse(text: &str) -> Result<Vec<Command>, String> {
    let lines: Vec<(usize, &str)> = text
        .lines()
        .enumerate()
        .map(|(i, line)| (i + 1, line))
        .filter(|(_, line)| !line.trim_start().starts_with('#'))
        .collect();
    let mut commands = Vec::new();
    let mut i = 0;
    while i < lines.len() {
        let (number, line) = lines[i];
        i += 1;
        let head = line.trim();
        if head.is_empty() {
            continue;
        }
        let begin = i;
        while i < lines.len() && lines[i].1.starts_with([' ', '\t']) && !lines[i].1.trim().is_empty() {
            i += 1;
        }
        let body: Vec<&str> = lines[begin..i].iter().map(|(_, line)| line.trim()).collect();
        let command = match head.split_whitespace().next() {
            Some("clear") => Ok(Command::Clear),
            Some("load" | "load_with_nhcb") => load(head, &body),
            Some(word) if word.starts_with("eval") => eval(number, head, &body).map(Command::Eval),
            _ => Err("neither load, eval nor clear".to_owned()),
        };
        commands.push(command.map_err(|e| format!("line {number}: {e}"))?);
    }
    Ok(commands)
}

fn load(head: &str, body: &[&str]) -> Result<Command, String> {
    let step = duration(head.split_whitespace().nth(1).ok_or("load needs a step")?)?;
    let mut all = Vec::new();
    let mut told = BTreeMap::new();
    for line in body {
        if let Some((_, rest)) = line.split_once("@st ") {
            let offsets = rest.split_whitespace().map(offsets).collect::<Result<Vec<_>, _>>()?.concat();
            let times = (0..).map(|i| i * step).zip(offsets);
            told = times.filter_map(|(ts, offset)| offset.map(|offset| (ts, ts + offset))).collect();
            continue;
        }
        let (labels, rest) = metric(line)?;
        let starts = std::mem::take(&mut told);
        let mut one = Load { floats: Series { labels, samples: Vec::new() }, histograms: Vec::new(), starts };
        for (i, point) in values(rest)?.into_iter().enumerate() {
            let ts = i as i64 * step;
            match point {
                None => {}
                // A series goes away in the form in which it came.
                Some(Point::Float(v))
                    if v.to_bits() == STALE && one.histograms.last().is_some_and(|h| h.0 == ts - step) =>
                {
                    one.histograms.push((ts, Native::stale(v)));
                }
                Some(Point::Float(v)) => one.floats.samples.push((ts, v)),
                Some(Point::Histogram(h)) => one.histograms.push((ts, h)),
            }
        }
        all.push(one);
    }
    Ok(Command::Load(all))
}

fn eval(line: usize, head: &str, body: &[&str]) -> Result<Eval, String> {
    let mut words = head.split_whitespace();
    let kind = words.next().unwrap_or_default();
    let mut word = || words.next().ok_or("eval ends early");
    let (when, consumed) = match word()? {
        "instant" => {
            word()?;
            let at = duration(word()?)?;
            (When::Instant(at), 4)
        }
        "range" => {
            word()?;
            let start = duration(word()?)?;
            word()?;
            let end = duration(word()?)?;
            word()?;
            (When::Range { start, end, step: duration(word()?)? }, 8)
        }
        other => return Err(format!("eval {other:?} is neither instant nor range")),
    };
    let mut expression = head;
    for _ in 0..consumed {
        expression = expression.trim_start();
        expression = &expression[expression.find(char::is_whitespace).unwrap_or(expression.len())..];
    }
    let steps = match when {
        When::Instant(_) => 1,
        When::Range { start, end, step } => ((end - start) / step + 1) as usize,
    };
    let mut eval = Eval {
        line,
        expression: expression.trim().to_owned(),
        when,
        ordered: kind.starts_with("eval_ordered"),
        fails: kind.starts_with("eval_fail").then(String::new),
        text: None,
        scalar: None,
        expected: Vec::new(),
        annotations: Vec::new(),
    };
    for line in body {
        if let Some(rest) = line.strip_prefix("expect ").or_else(|| line.strip_prefix("expected_fail_message ")) {
            expectation(&mut eval, line, rest);
        } else if let (true, Some(value)) = (body.len() == 1, parse_float(line)) {
            eval.scalar = Some(value);
        } else {
            let (labels, rest) = metric(line)?;
            let mut points = values(rest)?;
            points.resize(steps, None);
            eval.expected.push((labels, points));
        }
    }
    // A scalar over a range comes back as a series without labels.
    if let (When::Range { .. }, Some(value)) = (when, eval.scalar.take_if(|_| matches!(when, When::Range { .. }))) {
        eval.expected.push((Vec::new(), vec![Some(Point::Float(value)); steps]));
    }
    Ok(eval)
}

fn expectation(eval: &mut Eval, line: &str, rest: &str) {
    let (what, argument) = rest.split_once(' ').unwrap_or((rest, ""));
    if line.starts_with("expected_fail_message") {
        eval.fails = Some(rest.to_owned());
        return;
    }
    match what {
        "fail" => {
            // `msg:` is compared; a regular expression (`regex:`) is left to the check that there is an error.
            eval.fails = Some(argument.strip_prefix("msg:").unwrap_or_default().trim().to_owned());
        }
        "ordered" => eval.ordered = true,
        "string" => eval.text = quoted(argument).map(|(text, _)| text),
        "warn" | "info" => {
            let text = argument.strip_prefix("msg:").unwrap_or_default().trim().to_owned();
            eval.annotations.push((if what == "warn" { "warn" } else { "info" }, Some(text)));
        }
        "no_warn" => eval.annotations.push(("warn", None)),
        "no_info" => eval.annotations.push(("info", None)),
        _ => {}
    }
}

/// `name{label="value", ...}` and what follows it. Labels come sorted, empty ones left out.
fn metric(line: &str) -> Result<(Labels, &str), String> {
    let mut labels = Labels::new();
    let end = line.find(|c: char| c == '{' || c.is_whitespace()).unwrap_or(line.len());
    let (name, mut rest) = line.split_at(end);
    if !name.is_empty() {
        labels.push(("__name__".to_owned(), name.to_owned()));
    }
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        loop {
            rest = rest.trim_start_matches([' ', ',']);
            if let Some(after) = rest.strip_prefix('}') {
                rest = after;
                break;
            }
            let (key, after) = match quoted(rest) {
                Some(pair) => pair,
                None => {
                    let end = rest.find(['=', ' ']).ok_or_else(|| format!("no label in {line:?}"))?;
                    (rest[..end].to_owned(), &rest[end..])
                }
            };
            match after.trim_start().strip_prefix('=') {
                Some(after) => {
                    let (value, after) =
                        quoted(after.trim_start()).ok_or_else(|| format!("no label value in {line:?}"))?;
                    labels.push((key, value));
                    rest = after;
                }
                // A quoted name alone is the metric's.
                None => {
                    labels.push(("__name__".to_owned(), key));
                    rest = after;
                }
            }
        }
    }
    labels.retain(|(_, value)| !value.is_empty());
    labels.sort();
    Ok((labels, rest))
}

/// A quoted text at the beginning, and what follows it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let quote = text.chars().next().filter(|c| ['"', '\'', '`'].contains(c))?;
    let mut out = String::new();
    let mut chars = text.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' if quote != '`' => match chars.next()?.1 {
                'n' => out.push('\n'),
                't' => out.push('\t'),
                other => out.push(other),
            },
            c if c == quote => return Some((out, &text[at + c.len_utf8()..])),
            c => out.push(c),
        }
    }
    None
}

/// A word of values: histograms have blanks in them.
fn word(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_start();
    let mut end = 0;
    while let Some(c) = text[end..].chars().next().filter(|c| !c.is_whitespace()) {
        let histogram = text[end..].starts_with("{{").then(|| text[end..].find("}}")).flatten();
        end += histogram.map_or(c.len_utf8(), |at| at + 2);
    }
    (end > 0).then(|| text.split_at(end))
}

/// `{{..}}`, `{{..}}x3`, `{{..}}+{{..}}x3`: one histogram for each step.
fn histograms(word: &str) -> Result<Vec<Option<Point>>, String> {
    let bad = || format!("{word:?} is no histogram");
    let (item, times) = match word.rsplit_once("}}x") {
        Some((item, times)) => (item, times.parse::<usize>().map_err(|_| bad())?),
        None => (word.strip_suffix("}}").ok_or_else(bad)?, 0),
    };
    let (start, increment) = match item.split_once("}}+{{") {
        Some((start, increment)) => (start, Some(Native::parse(increment)?)),
        None => (item, None),
    };
    let mut value = Native::parse(start.strip_prefix("{{").ok_or_else(bad)?)?;
    let mut out = Vec::new();
    for _ in 0..=times {
        out.push(Some(Point::Histogram(value.clone())));
        if let Some(increment) = &increment {
            value = value.plus(increment);
        }
    }
    Ok(out)
}

/// `1 _ 2x3 0+10x5 stale {{count:1}}`: one value or gap for each step.
fn values(text: &str) -> Result<Vec<Option<Point>>, String> {
    let mut out = Vec::new();
    let mut rest = text;
    while let Some((word, after)) = word(rest) {
        rest = after;
        if word.starts_with("{{") {
            out.extend(histograms(word)?);
        } else {
            out.extend(floats(word)?.into_iter().map(|v| v.map(Point::Float)));
        }
    }
    Ok(out)
}

/// `1`, `_x2`, `2x3`, `0+10x5`, `stale`.
fn floats(word: &str) -> Result<Vec<Option<f64>>, String> {
    let mut out = Vec::new();
    let bad = || format!("{word:?} is no value");
    let (item, times) = match word.rsplit_once('x') {
        Some((item, times)) => (item, Some(times.parse::<usize>().map_err(|_| bad())?)),
        None => (word, None),
    };
    if item == "_" {
        out.extend(std::iter::repeat_n(None, times.unwrap_or(1)));
    } else if item == "stale" {
        out.extend(std::iter::repeat_n(Some(f64::from_bits(STALE)), times.map_or(1, |n| n + 1)));
    } else if let Some(value) = parse_float(item) {
        out.extend(std::iter::repeat_n(Some(value), times.map_or(1, |n| n + 1)));
    } else {
        // The sign between start and increment is the last one that does not belong to an exponent.
        let at = item
            .char_indices()
            .skip(1)
            .filter(|(i, c)| ['+', '-'].contains(c) && !item[..*i].ends_with(['e', 'E']))
            .map(|(i, _)| i)
            .find(|i| parse_float(&item[..*i]).is_some() && parse_float(&item[*i..]).is_some())
            .ok_or_else(bad)?;
        let (start, increment) = (parse_float(&item[..at]).ok_or_else(bad)?, parse_float(&item[at..]).ok_or_else(bad)?);
        let mut value = start;
        for _ in 0..=times.ok_or_else(bad)? {
            out.push(Some(value));
            value += increment;
        }
    }
    Ok(out)
}

/// `-30s`, `-30sx2`, `_x2`, `-30s-1mx2`: one offset or gap for each step.
fn offsets(word: &str) -> Result<Vec<Option<i64>>, String> {
    let bad = || format!("{word:?} is no offset");
    let (item, times) = match word.rsplit_once('x') {
        Some((item, times)) => (item, Some(times.parse::<usize>().map_err(|_| bad())?)),
        None => (word, None),
    };
    if item == "_" {
        return Ok(vec![None; times.unwrap_or(1)]);
    }
    let at = item.rfind(['+', '-']).filter(|at| *at > 0).unwrap_or(item.len());
    let (start, increment) = (duration(&item[..at])?, duration(&item[at..])?);
    Ok((0..=times.unwrap_or(0) as i64).map(|i| Some(start + i * increment)).collect())
}

fn parse_float(text: &str) -> Option<f64> {
    let digits = text.trim_start_matches(['+', '-']);
    if let Some(hex) = digits.strip_prefix("0x") {
        let value = u64::from_str_radix(hex, 16).ok()? as f64;
        return Some(if text.starts_with('-') { -value } else { value });
    }
    text.parse().ok()
}

/// `1h30m`, `50`: milliseconds.
fn duration(text: &str) -> Result<i64, String> {
    if let Ok(seconds) = text.parse::<f64>() {
        return Ok((seconds * 1000.0).round() as i64);
    }
    let bad = || format!("{text:?} is no duration");
    let (sign, mut rest) = text.strip_prefix('-').map_or((1, text), |rest| (-1, rest));
    let mut total = 0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
        let count: i64 = rest[..end].parse().map_err(|_| bad())?;
        rest = &rest[end..];
        let units = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000), ("w", 604_800_000)];
        let units = units.iter().chain(&[("y", 31_536_000_000)]);
        let (unit, factor) = units.into_iter().find(|(unit, _)| rest.starts_with(unit)).ok_or_else(bad)?;
        total += count * factor;
        rest = &rest[unit.len()..];
    }
    Ok(sign * total)
}

#[test]
fn the_script_language_is_read() {
    fn check(text: &str, expected: &[Option<f64>]) {
        let expected: Vec<Option<Point>> = expected.iter().map(|v| v.map(Point::Float)).collect();
        assert_eq!(values(text).expect(text), expected, "{text}");
    }
    let histogram = |text: &str| Some(Point::Histogram(Native::parse(text).expect(text)));
    assert_eq!(
        values("{{schema:1 count:2 buckets:[1 1]}}+{{count:1 buckets:[1]}}x1 _ {{}}").expect("histograms"),
        [histogram("schema:1 count:2 buckets:[1 1]"), histogram("schema:1 count:3 buckets:[2 1]"), None, histogram("")]
    );
    check("1 _ 2", &[Some(1.0), None, Some(2.0)]);
    check("_x2 1x1", &[None, None, Some(1.0), Some(1.0)]);
    check("0+10x2", &[Some(0.0), Some(10.0), Some(20.0)]);
    check("-1e+2-1.5x1", &[Some(-100.0), Some(-101.5)]);
    check("Inf -Inf", &[Some(f64::INFINITY), Some(f64::NEG_INFINITY)]);
    assert!(values("1+x").is_err());
    assert_eq!(offsets("-30s-1mx1"), Ok(vec![Some(-30_000), Some(-90_000)]));
    assert_eq!(offsets("_x2"), Ok(vec![None; 2]));
    assert_eq!(offsets("1msx1"), Ok(vec![Some(1); 2]));
    assert_eq!(duration("1h30m"), Ok(5_400_000));
    assert_eq!(duration("0.5"), Ok(500));
    assert_eq!(duration("250ms"), Ok(250));
    let (labels, rest) = metric("m{b=\"x\\\"y\", a='1', c=\"\"} 1 2").expect("a series");
    let pair = |k: &str, v: &str| (k.to_owned(), v.to_owned());
    assert_eq!(labels, [pair("__name__", "m"), pair("a", "1"), pair("b", "x\"y")]);
    assert_eq!(rest.trim(), "1 2");
    let commands = parse("load 5m\n  m 0+1x2\n\neval range from 0 to 10m step 5m m\n  m 0 1 2\n").expect("a script");
    assert!(
        matches!(&commands[..], [Command::Load(_), Command::Eval(e)] if e.expression == "m" && e.expected.len() == 1)
    );
}
