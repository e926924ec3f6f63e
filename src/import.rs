//! `thalweg import prometheus`: the history of a Prometheus server, from its data folder or over its remote-read endpoint,
//! through the one path by which data comes in, a running server's remote write.
//!
//! What is stored is noted in a state file, so that an import that was stopped goes on. Sending something twice changes
//! nothing: a sample is the same by its series and time. What is damaged is named, counted and left out.

mod batch;
mod block;
mod bytes;
mod chunk;
mod log;
mod remote;
mod send;
mod state;

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use catalog::{Clock as _, Matcher, Secret};
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::mpsc;

use batch::{Batch, Batcher};
use block::{Block, Meta};
use chunk::Points;
use send::{Sent, Target};
use state::State;

use crate::client::{self, Server};
use crate::print;

/// Batches that are read ahead of what is being sent.
const READ_AHEAD: usize = 4;

/// What can be imported.
#[derive(Debug, Subcommand)]
pub enum Import {
    /// Import the history of a Prometheus server.
    Prometheus(Options),
}

/// What to import, from where and to where.
#[derive(Debug, Args)]
pub struct Options {
    /// The data folder of a Prometheus server (of a running one too: blocks don't change), or the URL of a server, whose
    /// /api/v1/read is then asked.
    #[arg(value_name = "DIR|URL")]
    source: String,
    /// The Thalweg server that stores it.
    #[command(flatten)]
    server: Server,
    /// Bearer token for the Prometheus server of a URL, or file:PATH of one.
    #[arg(long, env = "THALWEG_SOURCE_TOKEN", hide_env_values = true, value_parser = client::token, value_name = "TOKEN")]
    source_token: Option<Secret>,
    /// Import nothing before this time (seconds since 1970, or RFC 3339). A URL needs it.
    #[arg(long, value_name = "TIME")]
    start: Option<String>,
    /// Import nothing after this time.
    #[arg(long, value_name = "TIME")]
    end: Option<String>,
    /// Import only series that this selector matches, such as '{job="node"}'; several add up.
    #[arg(long = "match", value_name = "SELECTOR")]
    selectors: Vec<String>,
    /// Give series this label unless they have one of its name: what external labels of Prometheus are.
    #[arg(long = "label", value_name = "NAME=VALUE")]
    labels: Vec<String>,
    /// Take this label away from series.
    #[arg(long = "drop-label", value_name = "NAME", default_value = "__replica__")]
    drop_labels: Vec<String>,
    /// The file that notes what is stored; the same import goes on by it.
    #[arg(long, value_name = "FILE", default_value = "thalweg-import.json")]
    state: PathBuf,
}

/// A canonical label list: names and values.
type Labels = Vec<(String, String)>;

/// Some samples of one series.
#[derive(Debug, Clone, PartialEq)]
struct Piece {
    labels: Labels,
    points: Points,
}

/// What of a source is imported.
#[derive(Debug, Clone)]
struct Range {
    /// The first millisecond.
    start_ms: i64,
    /// The last millisecond.
    end_ms: i64,
    /// Series for which all of one of these lists match; all series when there is none.
    selectors: Vec<Vec<Matcher>>,
}

impl Range {
    fn contains(&self, ts: i64) -> bool {
        (self.start_ms..=self.end_ms).contains(&ts)
    }

    fn matches(&self, labels: &[(String, String)]) -> bool {
        let value = |name: &str| labels.iter().find(|(n, _)| n == name).map_or("", |(_, v)| v);
        let all = |matchers: &Vec<Matcher>| matchers.iter().all(|m| m.matches(value(m.name())));
        self.selectors.is_empty() || self.selectors.iter().any(all)
    }
}

impl Options {
    fn range(&self) -> Result<Range> {
        let time = |text: &Option<String>, default| match text {
            Some(text) => parse_time(text),
            None => Ok(default),
        };
        let selector =
            |text: &String| promql::api::selector(text).map_err(|e| anyhow::anyhow!("--match {text:?}: {}", e.message));
        let selectors = self.selectors.iter().map(selector).collect::<Result<_>>()?;
        Ok(Range { start_ms: time(&self.start, i64::MIN)?, end_ms: time(&self.end, i64::MAX)?, selectors })
    }

    fn batcher(&self) -> Result<Batcher> {
        let label = |text: &String| match text.split_once('=') {
            Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
            _ => bail!("--label {text:?} is not NAME=VALUE"),
        };
        let add = self.labels.iter().map(label).collect::<Result<_>>()?;
        Ok(Batcher::new(add, self.drop_labels.clone()))
    }
}

/// Milliseconds of a time in seconds since 1970 or in RFC 3339.
fn parse_time(text: &str) -> Result<i64> {
    if let Ok(seconds) = text.parse::<f64>()
        && seconds.abs() < 9e15
    {
        return Ok((seconds * 1000.0).round() as i64);
    }
    let time = chrono::DateTime::parse_from_rfc3339(text);
    time.map(|t| t.timestamp_millis()).with_context(|| format!("{text:?} is neither seconds since 1970 nor RFC 3339"))
}

/// Imports and says what came of it.
///
/// # Errors
/// Whatever keeps it from starting or going on; and, when all else is stored, damage and refusals.
pub fn run(import: &Import) -> Result<()> {
    let Import::Prometheus(options) = import;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(prometheus(options))
}

async fn prometheus(options: &Options) -> Result<()> {
    let range = options.range()?;
    let batcher = options.batcher()?;
    let client = options.server.builder()?.build().context("cannot make an HTTP client")?;
    let report = Report::new();
    let target = Target::new(&options.server, report.progress.clone())?;
    let url = options.source.contains("://").then(|| remote::Source::new(client, options)).transpose()?;
    let from = match &url {
        Some(url) => url.name(),
        None => {
            let dir = std::fs::canonicalize(&options.source);
            dir.with_context(|| format!("cannot read folder {}", options.source))?.display().to_string()
        }
    };
    let what = [("from", &options.start), ("to", &options.end)]
        .into_iter()
        .filter_map(|(word, time)| Some(format!(" {word} {}", time.as_ref()?)))
        .chain(options.selectors.iter().map(|s| format!(" {s}")))
        .chain(options.labels.iter().map(|l| format!(" with {l}")))
        .collect::<String>();
    let mut state = State::open(&options.state, &format!("{from}{what} into {}", target.name()))?;
    let (sender, batches) = mpsc::channel(READ_AHEAD);
    let mut reading = Reading { batcher, batches: sender, report };
    let known = state.clone();
    let now_ms = catalog::SystemClock.now_ms();
    let reader = match url {
        Some(url) => tokio::spawn(async move {
            let result = url.read(&range, now_ms, &known, &mut reading).await;
            (result, reading.report)
        }),
        None => tokio::task::spawn_blocking(move || {
            let result = read_dir(Path::new(&from), &range, &known, &mut reading);
            (result, reading.report)
        }),
    };
    let sent = target.send_all(batches, &mut state).await;
    let (read, report) = reader.await.context("a bug: reading was given up")?;
    report.progress.finish_and_clear();
    // A server that refuses is why reading stopped.
    let sent = sent?;
    read?;
    report.conclude(&sent)
}

/// Reading is at an end because nobody takes what is read.
#[derive(Debug)]
struct Unwanted;

/// What a source is read into.
#[derive(Debug)]
struct Reading {
    batcher: Batcher,
    batches: mpsc::Sender<Batch>,
    report: Report,
}

impl Reading {
    /// Hands on from a thread that may block.
    fn hand_on(&self, batches: impl IntoIterator<Item = Batch>) -> Result<(), Unwanted> {
        batches.into_iter().try_for_each(|batch| self.batches.blocking_send(batch).map_err(|_| Unwanted))
    }

    /// Hands on from a task.
    async fn send(&self, batches: impl IntoIterator<Item = Batch>) -> Result<(), Unwanted> {
        for batch in batches {
            self.batches.send(batch).await.map_err(|_| Unwanted)?;
        }
        Ok(())
    }
}

/// A line, whether there is a progress bar or not.
fn say(progress: &ProgressBar, line: fmt::Arguments<'_>) {
    progress.suspend(|| eprintln!("{line}"));
}

/// What was met while reading.
#[derive(Debug)]
struct Report {
    progress: ProgressBar,
    /// Units that were read: blocks, windows.
    units: u64,
    /// Pieces of series that were read.
    series: u64,
    /// Damaged chunks, series, records and blocks that were left out.
    damaged: u64,
}

impl Report {
    fn new() -> Self {
        let progress = ProgressBar::new(0);
        let style = ProgressStyle::with_template("{bar:30} {percent:>3}% {elapsed} eta {eta}  {msg}");
        if let Ok(style) = style {
            progress.set_style(style);
        }
        Self { progress, units: 0, series: 0, damaged: 0 }
    }

    fn damage(&mut self, place: &str, what: &str) {
        self.damaged += 1;
        say(&self.progress, format_args!("damaged, left out: {place}: {what}"));
    }

    /// The last lines.
    fn conclude(&self, sent: &Sent) -> Result<()> {
        print::line(format_args!(
            "imported {} samples and {} histograms: {} series in {} blocks or windows",
            sent.samples, sent.histograms, self.series, self.units
        ))?;
        for refusal in &sent.refusals {
            eprintln!("refused by the server: {refusal}");
        }
        ensure!(
            self.damaged == 0 && sent.refused == 0,
            "{} damaged places were left out, and of {} requests the server refused a part",
            self.damaged,
            sent.refused
        );
        Ok(())
    }
}

/// Reads all blocks of a data folder, the oldest first, then what is not in blocks yet.
fn read_dir(dir: &Path, range: &Range, state: &State, reading: &mut Reading) -> Result<()> {
    let has_log = log::is_there(dir);
    let mut seen = BTreeSet::new();
    loop {
        let mut blocks = blocks(dir, &mut seen, &mut reading.report)?;
        ensure!(!seen.is_empty() || has_log, "{} holds neither blocks nor a log of Prometheus", dir.display());
        blocks.retain(|meta| !state.is_done(&meta.ulid) && meta.max_ms > range.start_ms && meta.min_ms <= range.end_ms);
        if blocks.is_empty() {
            // A server that runs may have compacted blocks meanwhile: new ones were looked for until there were none.
            break;
        }
        reading.report.progress.inc_length(blocks.iter().map(|m| m.chunk_bytes).sum());
        for meta in &blocks {
            if read_block(meta, range, state.items(&meta.ulid), reading).is_err() {
                return Ok(());
            }
        }
    }
    if has_log {
        // It is read again each time: it grows.
        let _ = log::read(dir, range, reading);
    }
    Ok(())
}

/// The blocks of a folder that were not seen before, sorted by time.
fn blocks(dir: &Path, seen: &mut BTreeSet<String>, report: &mut Report) -> Result<Vec<Meta>> {
    let mut blocks = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot read folder {}", dir.display()))? {
        let path = entry?.path();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        // A ULID; what is being written or removed has a longer name.
        if name.len() != 26
            || !name.bytes().all(|b| b.is_ascii_alphanumeric())
            || !path.is_dir()
            || !seen.insert(name.clone())
        {
            continue;
        }
        match Meta::read(&path) {
            Ok(meta) => blocks.push(meta),
            Err(_) if !path.exists() => {}
            Err(e) => report.damage(&format!("block {name}"), &e.to_string()),
        }
    }
    blocks.sort_by(|a, b| (a.min_ms, &a.ulid).cmp(&(b.min_ms, &b.ulid)));
    Ok(blocks)
}

fn read_block(meta: &Meta, range: &Range, from: u64, reading: &mut Reading) -> Result<(), Unwanted> {
    let before = reading.report.progress.position();
    let damaged = reading.report.damaged;
    reading.report.progress.set_message(format!("block {}", meta.ulid));
    let mut block = match Block::open(meta) {
        Ok(block) => block,
        // Compacted into another one, which will be found.
        Err(_) if !meta.dir.exists() => return Ok(()),
        Err(e) => {
            reading.report.damage(&format!("block {}", meta.ulid), &e.to_string());
            return Ok(());
        }
    };
    reading.batcher.begin(&meta.ulid, from);
    let series = block.series();
    for at in from..series {
        let report = &mut reading.report;
        let mut damage = |what: String| report.damage(&format!("block {}", meta.ulid), &what);
        if let Some(piece) = block.read(at, range, &mut damage) {
            reading.report.series += 1;
            let full = reading.batcher.push(piece);
            reading.hand_on(full)?;
        }
        reading.batcher.passed(at + 1);
        let share = u128::from(meta.chunk_bytes) * u128::from(at + 1) / u128::from(series);
        reading.report.progress.set_position(before + share as u64);
    }
    reading.report.units += 1;
    let mut last = reading.batcher.end();
    // A damaged block is not done: it may be mended, and its damage is to be told again.
    if reading.report.damaged > damaged {
        (last.position.end, last.position.items) = (false, 0);
    }
    reading.hand_on([last])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        let check = |text: &str, expected: Option<i64>| assert_eq!(parse_time(text).ok(), expected, "{text}");
        check("0", Some(0));
        check("1700000000.5", Some(1_700_000_000_500));
        check("2023-11-14T22:13:20Z", Some(1_700_000_000_000));
        check("yesterday", None);
        check("NaN", None);
        check("1e300", None);
    }

    #[test]
    fn ranges() {
        let selectors = [r#"up{job="a"}"#, r#"{__name__=~"node_.*",job!="b"}"#];
        let selectors = selectors.iter().map(|s| promql::api::selector(s).unwrap()).collect();
        let range = Range { start_ms: 1, end_ms: 3, selectors };
        let check = |name: &str, job: &str, expected: bool| {
            let labels = [("__name__", name), ("job", job)].map(|(k, v)| (k.to_owned(), v.to_owned()));
            assert_eq!(range.matches(&labels), expected, "{name} {job}");
        };
        check("up", "a", true);
        check("up", "b", false);
        check("node_x", "a", true);
        check("node_x", "b", false);
        assert_eq!([0, 1, 3, 4].map(|ts| range.contains(ts)), [false, true, true, false]);
    }
}
