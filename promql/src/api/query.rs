//! `query` and `query_range`, and the JSON of what they answer.

use std::time::{Duration, Instant};

use engine::memory::Kind;
use engine::query::Pace;
use engine::{Query, Stop};

use super::params::{Form, invalid};
use super::reply::{Reply, TRUNCATED};
use super::{Api, json};
use crate::error::{QueryError, QueryErrorKind, Result};
use crate::exec::out_of_memory;
use crate::histogram::FloatHistogram;
use crate::options::{EvalOptions, Limits};
use crate::parse::json::tree;
use crate::parse::print::pretty;
use crate::plan;
use crate::result::{Data, QueryResult, ValueType};

/// `query`: evaluates an expression at one time.
pub(super) async fn instant(api: &Api, form: &Form, query: Query) -> Result<Reply> {
    let limit = form.limit()?;
    let at_ms = form.time_or("time", api.engine.now_ms())?;
    evaluate(api, form, limit, query, EvalOptions::instant(at_ms)).await
}

/// `query_range`: evaluates an expression at evenly spaced times.
pub(super) async fn range(api: &Api, form: &Form, query: Query) -> Result<Reply> {
    let limit = form.limit()?;
    let (start_ms, end_ms) = (form.time("start")?, form.time("end")?);
    if end_ms < start_ms {
        return Err(invalid("end", "end timestamp must not be before start time"));
    }
    let step_ns = form.step_ns()?;
    check_resolution((start_ms, end_ms), step_ns, &api.settings.limits)?;
    evaluate(api, form, limit, query, EvalOptions::range(start_ms, end_ms, step_ns / 1_000_000)).await
}

/// Refuses more points of a series than anybody can look at.
pub(crate) fn check_resolution((start_ms, end_ms): (i64, i64), step_ns: i64, limits: &Limits) -> Result<()> {
    let span_ns = (i128::from(end_ms) - i128::from(start_ms)) * 1_000_000;
    if span_ns / i128::from(step_ns) > limits.points_max as i128 {
        return Err(QueryError::bad_data(format!(
            "exceeded maximum resolution of {} points per timeseries. Try decreasing the query resolution (?step=XX)",
            in_thousands(limits.points_max)
        )));
    }
    Ok(())
}

/// A number with commas between its thousands.
fn in_thousands(n: usize) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

async fn evaluate(api: &Api, form: &Form, limit: Option<usize>, query: Query, options: EvalOptions) -> Result<Reply> {
    let mut options = options.under(&api.settings);
    options.lookback_ms = form.lookback_ms()?.unwrap_or(options.lookback_ms);
    let stats = Asked::of(form);
    options.counts = stats != Asked::No;

    let (begun, queued, stop) = (Instant::now(), query.queued(), query.stop().clone());
    let mut memory = query.memory().reserve(Kind::Queries);
    let result = crate::query(&api.engine, form.get("query"), &options, query).await;
    let mut result = result.map_err(|e| match e.kind {
        QueryErrorKind::BadData => invalid("query", e),
        _ => e,
    })?;
    let timings = Timings { queued, total: queued + begun.elapsed() };

    if limit.is_some_and(|limit| result.truncate(limit)) {
        result.warnings.push(TRUNCATED.to_owned());
    }
    if let Asked::Deprecated(value) = &stats {
        result.warnings.push(format!(
            "value {value:?} for parameter \"stats\" is deprecated and will be rejected in the next major release, use \
             \"true\" or \"all\""
        ));
    }
    let stats = (stats != Asked::No).then_some((timings, stats == Asked::All));
    memory.grow(text_bytes(&result, &stop)?).map_err(out_of_memory)?;
    let mut written = Ok(());
    let data = |out: &mut Vec<u8>| written = write_data(out, &result, stats.as_ref(), &stop);
    let reply = Reply::annotated(data, &result.warnings, &result.infos);
    written.map(|()| reply.holding(memory))
}

/// What the parameter `stats` asks for.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    No,
    Yes,
    /// Those of each step as well.
    All,
    Deprecated(String),
}

impl Asked {
    fn of(form: &Form) -> Self {
        match form.get("stats") {
            "" => Self::No,
            "true" => Self::Yes,
            "all" => Self::All,
            other => Self::Deprecated(other.to_owned()),
        }
    }
}

/// How long the parts of a query took.
#[derive(Debug)]
struct Timings {
    queued: Duration,
    total: Duration,
}

/// About how many bytes the answer will have, more rather than less.
fn text_bytes(result: &QueryResult, stop: &Stop) -> Result<usize> {
    const SERIES: usize = 64;
    const POINT: usize = 40;
    let (mut bytes, mut pace) = (1024, stop.pace());
    for series in (0..result.len()).map(|i| result.series(i)) {
        let points = series.points().count();
        pace.step(points)?;
        bytes += SERIES + 2 * series.labels.len() + POINT * points;
    }
    Ok(bytes)
}

/// Writes a result of one type.
type Write = fn(&mut Vec<u8>, &QueryResult, &mut Pace);

/// `stats` has the timings, and whether statistics of each step are wanted too.
fn write_data(out: &mut Vec<u8>, result: &QueryResult, stats: Option<&(Timings, bool)>, stop: &Stop) -> Result<()> {
    let (name, write): (&str, Write) = match result.value_type {
        ValueType::Scalar => ("scalar", write_scalar),
        ValueType::String => ("string", write_string),
        ValueType::Vector => ("vector", write_vector),
        ValueType::Matrix => ("matrix", write_matrix),
    };
    out.extend_from_slice(br#"{"resultType":"#);
    json::text(out, name);
    out.extend_from_slice(br#","result":"#);
    write(out, result, &mut stop.pace());
    if let Some((timings, each_step)) = stats {
        write_stats(out, timings, *each_step, result);
    }
    out.push(b'}');
    // What was left out then is never sent.
    Ok(stop.check()?)
}

fn write_scalar(out: &mut Vec<u8>, result: &QueryResult, _pace: &mut Pace) {
    // A scalar always has a value; a plan that yields none has none to show.
    let point = (!result.is_empty()).then(|| result.series(0).points().next()).flatten();
    let (t, v) = point.unwrap_or((result.grid.start_ms, f64::NAN));
    write_point(out, t, v);
}

fn write_string(out: &mut Vec<u8>, result: &QueryResult, _pace: &mut Pace) {
    let text = match &result.data {
        Data::Text(text) => text.as_str(),
        _ => "",
    };
    out.push(b'[');
    json::time(out, result.grid.start_ms);
    out.push(b',');
    json::text(out, text);
    out.push(b']');
}

/// What it costs to write a value as text, about.
const POINT_COST: usize = 50;

fn write_vector(out: &mut Vec<u8>, result: &QueryResult, pace: &mut Pace) {
    enum Sample {
        Float(f64),
        Histogram(FloatHistogram),
    }
    let series = (0..result.len()).take_while(|_| pace.step(10 * POINT_COST).is_ok()).map(|i| result.series(i));
    let samples = series.filter_map(|s| {
        let sample = s.points().next().map(|(t, v)| (t, Sample::Float(v)));
        let sample = sample.or_else(|| s.histograms().next().map(|(t, h)| (t, Sample::Histogram(h))));
        Some((s.labels, sample?))
    });
    json::list(out, samples, |out, (labels, (t, sample))| {
        out.extend_from_slice(br#"{"metric":"#);
        json::labels(out, labels);
        match sample {
            Sample::Float(v) => {
                out.extend_from_slice(br#","value":"#);
                write_point(out, t, v);
            }
            Sample::Histogram(h) => {
                out.extend_from_slice(br#","histogram":"#);
                write_histogram(out, t, &h);
            }
        }
        out.push(b'}');
    });
}

fn write_matrix(out: &mut Vec<u8>, result: &QueryResult, pace: &mut Pace) {
    let times = match &result.data {
        Data::Blocks { .. } => StepTexts::new(result),
        _ => StepTexts::default(),
    };
    let cost = POINT_COST * (10 + result.grid.steps());
    let series = (0..result.len()).take_while(|_| pace.step(cost).is_ok()).map(|i| result.series(i));
    json::list(out, series, |out, series| {
        out.extend_from_slice(br#"{"metric":"#);
        json::labels(out, series.labels);
        let mut histograms = series.histograms().peekable();
        // A series has either list, or both when its kind changed; floats are the rule.
        if histograms.peek().is_some() && series.points().next().is_none() {
            write_histograms(out, histograms);
            out.push(b'}');
            return;
        }
        out.extend_from_slice(br#","values":["#);
        let mut step = 0;
        let mut last: Option<(u64, usize, usize)> = None;
        for (i, (t, v)) in series.points().enumerate() {
            if i > 0 {
                out.push(b',');
            }
            out.push(b'[');
            times.write(out, &mut step, t);
            out.push(b',');
            // Gauges repeat themselves: copying the text is cheaper than making it again.
            match last {
                Some((bits, from, to)) if bits == v.to_bits() => out.extend_from_within(from..to),
                _ => {
                    let from = out.len();
                    json::value(out, v);
                    last = Some((v.to_bits(), from, out.len()));
                }
            }
            out.push(b']');
        }
        out.push(b']');
        if histograms.peek().is_some() {
            write_histograms(out, histograms);
        }
        out.push(b'}');
    });
}

fn write_histograms(out: &mut Vec<u8>, histograms: impl Iterator<Item = (i64, FloatHistogram)>) {
    out.extend_from_slice(br#","histograms":"#);
    json::list(out, histograms, |out, (t, h)| write_histogram(out, t, &h));
}

fn write_histogram(out: &mut Vec<u8>, t: i64, h: &FloatHistogram) {
    out.push(b'[');
    json::time(out, t);
    out.push(b',');
    json::histogram(out, h);
    out.push(b']');
}

fn write_point(out: &mut Vec<u8>, t: i64, v: f64) {
    out.push(b'[');
    json::time(out, t);
    out.push(b',');
    json::value(out, v);
    out.push(b']');
}

/// The texts of a grid's times, which all series share.
#[derive(Default)]
struct StepTexts {
    times: Vec<i64>,
    ends: Vec<usize>,
    bytes: Vec<u8>,
}

impl StepTexts {
    fn new(result: &QueryResult) -> Self {
        let mut texts = Self::default();
        for step in 0..result.grid.steps() {
            texts.times.push(result.grid.time(step));
            json::time(&mut texts.bytes, result.grid.time(step));
            texts.ends.push(texts.bytes.len());
        }
        texts
    }

    /// Writes the time `t`; within a series times ascend, and `step` remembers how far they are.
    fn write(&self, out: &mut Vec<u8>, step: &mut usize, t: i64) {
        while self.times.get(*step).is_some_and(|at| *at < t) {
            *step += 1;
        }
        if self.times.get(*step) != Some(&t) {
            return json::time(out, t);
        }
        let from = step.checked_sub(1).map_or(0, |before| self.ends[before]);
        out.extend_from_slice(&self.bytes[from..self.ends[*step]]);
    }
}

fn write_stats(out: &mut Vec<u8>, timings: &Timings, each_step: bool, result: &QueryResult) {
    let evaluation = timings.total.saturating_sub(timings.queued);
    let seconds = [
        ("evalTotalTime", evaluation),
        ("resultSortTime", Duration::ZERO),
        ("queryPreparationTime", Duration::ZERO),
        ("innerEvalTime", evaluation),
        ("execQueueTime", timings.queued),
        ("execTotalTime", timings.total),
    ];
    out.extend_from_slice(br#","stats":{"timings":{"#);
    for (i, (name, duration)) in seconds.into_iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        json::text(out, name);
        out.push(b':');
        json::number(out, duration.as_secs_f64());
    }
    out.extend_from_slice(br#"},"samples":{"#);
    let times = (0..).map(|step| result.asked.time(step));
    let stats = &result.stats;
    if each_step {
        out.extend_from_slice(br#""totalQueryableSamplesPerStep":"#);
        json::list(out, stats.samples_looked_at.iter().zip(times), |out, (count, time)| {
            out.push(b'[');
            json::time(out, time);
            out.push(b',');
            json::integer(out, *count);
            out.push(b']');
        });
        out.push(b',');
    }
    let samples = [
        ("totalQueryableSamples", stats.samples_looked_at.iter().sum()),
        ("samplesRead", stats.samples_scanned),
        ("peakSamples", stats.samples_held),
    ];
    for (i, (name, count)) in samples.into_iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        json::text(out, name);
        out.push(b':');
        json::integer(out, count);
    }
    out.extend_from_slice(b"}}");
}

/// `format_query`: the expression, laid out.
pub(super) async fn format(api: &Api, form: &Form) -> Result<Reply> {
    let expr = plan::parse(form.get("query"), &api.settings.features).map_err(|e| invalid("query", e))?;
    Ok(Reply::data(|out| json::text(out, &pretty(&expr))))
}

/// `parse_query`: the expression as a tree.
pub(super) async fn parse(api: &Api, form: &Form) -> Result<Reply> {
    let expr = plan::parse(form.get("query"), &api.settings.features).map_err(|e| invalid("query", e))?;
    Ok(Reply::data(|out| out.extend_from_slice(tree(&expr).to_string().as_bytes())))
}

#[cfg(test)]
mod tests;
