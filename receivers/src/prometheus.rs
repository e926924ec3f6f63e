//! Prometheus remote write, versions 1.0 and 2.0.
//!
//! [`decode_v1`] and [`decode_v2`] walk a request's protobuf bytes. First they hash, for each series, the bytes that hold
//! its labels and look all hashes up at once; for what was met before no label is decoded at all, and only times and
//! values are read. Rows go to columns that become Arrow arrays without a copy.
//!
//! Of several identical senders one is stored: [`Replicas`].
//!
//! What always holds: a request that is not protobuf is refused whole; otherwise each series is accepted or refused on
//! its own, refused ones are named with the field and the reason, and nothing of them is registered or stored. Values
//! keep their bits. [`routes`] mounts both versions at `/api/v1/write`.

mod histogram;
mod http;
mod replica;
mod rows;
mod v1;
mod v2;

#[cfg(test)]
pub(crate) mod tests;

use std::fmt::Write as _;

use catalog::tag::METRIC_NAME;
use catalog::{Encoder, Error, ErrorKind, Result};
use engine::Write;

pub use http::routes;
pub use replica::Replicas;
pub use rows::Mark as Counts;
pub use v1::decode_v1;
pub use v2::decode_v2;

use histogram::Histogram;
use replica::Sources;
use rows::Rows;

/// Most series of a request.
const SERIES_MAX: usize = 250_000;
/// Most labels of a series.
const LABELS_MAX: usize = 256;
/// Most bytes of a label name.
const NAME_BYTES_MAX: usize = 1024;
/// Most bytes of a label value.
const VALUE_BYTES_MAX: usize = 16 << 10;
/// Most bytes of all labels of an exemplar.
const EXEMPLAR_BYTES_MAX: usize = 1024;
/// Most metadata entries of a request.
const METADATA_MAX: usize = 50_000;
/// Most bytes of the texts of these: version 2.0 can name one help text with every metric.
const METADATA_BYTES_MAX: usize = 16 << 20;
/// Most bytes of a help text.
const HELP_BYTES_MAX: usize = 16 << 10;
/// Most bytes of a unit.
const UNIT_BYTES_MAX: usize = 256;
/// Rejections that are kept with their text; all are counted.
const REJECTIONS_KEPT: usize = 10;
/// Most bytes of a series in a message.
const SERIES_TEXT_MAX: usize = 256;
/// The year 1 in milliseconds since the epoch: dates before have no text form in SQL or PromQL.
const TS_MIN: i64 = -62_135_596_800_000;

/// What a request is judged by.
#[derive(Debug, Clone, Copy)]
pub struct Limits<'r> {
    /// Now, milliseconds since the epoch.
    pub now_ms: i64,
    /// Rows further ahead of now than this many milliseconds are refused.
    pub future_max_ms: i64,
    /// Rows before this time are refused: retention would take them at once. Milliseconds since the epoch.
    pub kept_from_ms: i64,
    /// Elects one of several identical senders, when they are told apart.
    pub replicas: Option<&'r Replicas>,
}

/// Why something was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Labels are malformed, missing, repeated, too many or too long.
    Labels,
    /// A time is too far ahead, older than retention keeps, or before the year 1.
    Time,
    /// A native histogram contradicts itself.
    Histogram,
    /// The series is new and the series limit is reached.
    SeriesLimit,
    /// The code of the series belongs to another one.
    Collision,
    /// Metric metadata are malformed.
    Metadata,
    /// An exemplar is malformed. It is left out, and the request is not refused for it, as Prometheus does.
    Exemplar,
}

impl Reason {
    /// All reasons.
    pub const ALL: [Self; 7] =
        [Self::Labels, Self::Time, Self::Histogram, Self::SeriesLimit, Self::Collision, Self::Metadata, Self::Exemplar];

    /// The reason's name in self-metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Labels => "labels",
            Self::Time => "time",
            Self::Histogram => "histogram",
            Self::SeriesLimit => "series_limit",
            Self::Collision => "collision",
            Self::Metadata => "metadata",
            Self::Exemplar => "exemplar",
        }
    }
}

/// Something that was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// The series as PromQL writes it, cut after 256 bytes.
    pub series: String,
    /// The field of the series that is at fault.
    pub field: &'static str,
    /// The kind of fault.
    pub reason: Reason,
    /// What is wrong.
    pub message: String,
}

impl std::fmt::Display for Rejection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "series {}: {}: {}", self.series, self.field, self.message)
    }
}

/// What was refused of a request.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// The first ones.
    pub first: Vec<Rejection>,
    /// How many, by the position of the reason in [`Reason::ALL`].
    by_reason: [u64; Reason::ALL.len()],
}

impl Rejected {
    /// Refusals for this reason. Each sample, histogram or exemplar out of time counts one; a series refused for its
    /// labels or at the series limit counts one.
    pub fn count(&self, reason: Reason) -> u64 {
        self.by_reason[reason as usize]
    }

    /// Refusals for which the request is answered with an error.
    pub fn errors(&self) -> u64 {
        self.by_reason.iter().sum::<u64>() - self.count(Reason::Exemplar)
    }

    #[cold]
    fn add(&mut self, reason: Reason, field: &'static str, series: impl FnOnce() -> String, message: String) {
        self.by_reason[reason as usize] += 1;
        // A tolerated exemplar must not push out what the answer is about.
        if reason != Reason::Exemplar && self.first.len() < REJECTIONS_KEPT {
            self.first.push(Rejection { series: series(), field, reason, message });
        }
    }
}

/// A decoded request.
#[derive(Debug)]
pub struct Decoded {
    /// What is good.
    pub write: Write,
    /// What was refused and why.
    pub rejected: Rejected,
    /// Samples, histograms and exemplars in `write`.
    pub counts: Counts,
    /// The same of replicas that are not elected: neither in `write` nor in `rejected`.
    pub left_out: Counts,
}

/// What both versions share while a request is decoded.
struct Request<'r> {
    encoder: Encoder<'r>,
    rows: Rows,
    rejected: Rejected,
    metadata: Vec<engine::MetricMetadata>,
    /// Bytes of their texts.
    metadata_bytes: usize,
    histogram: Histogram,
    json: String,
    limits: Limits<'r>,
    /// The request's senders, when replicas are told apart.
    sources: Option<Sources<'r>>,
    /// The wire forms of series with a replica label are told apart from those of all others: what they stand for is a
    /// series without that label.
    replica_forms: bool,
    left_out: Counts,
    /// Rows after this are refused, milliseconds since the epoch.
    ts_max: i64,
    /// Rows before this are refused.
    ts_min: i64,
}

impl<'r> Request<'r> {
    fn new(encoder: Encoder<'r>, limits: Limits<'r>, sources: Option<Sources<'r>>, series: usize) -> Self {
        Self {
            encoder,
            rows: Rows::with_capacity(series),
            rejected: Rejected::default(),
            metadata: Vec::new(),
            metadata_bytes: 0,
            histogram: Histogram::default(),
            json: String::new(),
            limits,
            sources,
            replica_forms: false,
            left_out: Counts::default(),
            ts_max: limits.now_ms.saturating_add(limits.future_max_ms),
            ts_min: limits.kept_from_ms.max(TS_MIN),
        }
    }

    /// True when rows of this time are accepted.
    fn in_time(&self, ts: i64) -> bool {
        (self.ts_min..=self.ts_max).contains(&ts)
    }

    #[cold]
    fn out_of_time(&mut self, field: &'static str, ts: i64, series: impl FnOnce() -> String) {
        let message = if ts < TS_MIN {
            format!("time {ts} ms lies before the year 1, the earliest that can be stored")
        } else if ts < self.ts_min {
            format!("time {ts} ms is older than retention keeps; rows from {} ms on are stored", self.ts_min)
        } else {
            let ahead = ts.saturating_sub(self.limits.now_ms);
            format!(
                "time {ts} ms is {ahead} ms ahead of the server's clock; limits.future_max allows {} ms",
                self.limits.future_max_ms
            )
        };
        self.rejected.add(Reason::Time, field, series, message);
    }

    /// Ends the rows of a series.
    fn end(&mut self) {
        if self.rows.pending().exemplars > 0 {
            self.rows.default_exemplar_time(self.limits.now_ms);
        }
    }

    /// Leaves out the rows of the series that was begun last, for it is of a replica that is not elected.
    fn leave_out(&mut self) {
        self.left_out += self.rows.pending();
        self.rows.abort();
    }

    /// Decides on the rows of a series whose wire form is not known, given its decoded labels. False when it is refused
    /// or left out.
    ///
    /// # Errors
    /// When replicas can't be elected.
    #[cold]
    fn resolve(&mut self, labels: &mut Vec<(&str, &str)>, mut wire: Option<u128>) -> Result<bool> {
        if let Some(sources) = &mut self.sources {
            let raw = labels.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes()));
            let source = match sources.replicas().source(raw) {
                Ok(source) => source,
                Err(message) => {
                    self.refuse(Reason::Labels, "labels", || series_text(labels), message);
                    return Ok(false);
                }
            };
            if let Some(source) = source {
                if !sources.stored(source)? {
                    self.leave_out();
                    return Ok(false);
                }
                let replica_label = sources.replicas().replica_label();
                labels.retain(|(name, _)| *name != replica_label);
                wire = wire.filter(|_| self.replica_forms);
            }
        }
        if let Err(message) = check_labels(labels) {
            self.refuse(Reason::Labels, "labels", || series_text(labels), message);
            return Ok(false);
        }
        // Without rows there is nothing to register.
        if self.rows.pending().is_empty() {
            return Ok(true);
        }
        match self.encoder.tags(labels, wire) {
            Ok(series) => {
                self.rows.commit(series);
                Ok(true)
            }
            // For now: the whole request is to come again.
            Err(e) if e.kind() == ErrorKind::Unavailable => Err(e),
            Err(e) => {
                let reason = match e.kind() {
                    ErrorKind::LimitExceeded => Reason::SeriesLimit,
                    ErrorKind::Invalid => Reason::Labels,
                    _ => Reason::Collision,
                };
                self.refuse(reason, "labels", || series_text(labels), e.message().to_owned());
                Ok(false)
            }
        }
    }

    /// Refuses the series that was begun last.
    #[cold]
    fn refuse(&mut self, reason: Reason, field: &'static str, series: impl FnOnce() -> String, message: String) {
        self.rows.abort();
        self.rejected.add(reason, field, series, message);
    }

    /// Appends an exemplar whose labels are in any order.
    fn exemplar(
        &mut self,
        ts: i64,
        value: f64,
        labels: &mut [(&str, &str)],
        series: impl FnOnce() -> String,
    ) -> Result<()> {
        if !self.in_time(ts) {
            self.rejected.add(Reason::Exemplar, "exemplars", series, format!("time {ts} ms is out of range"));
            return Ok(());
        }
        if let Err(message) = exemplar_labels(labels, &mut self.json) {
            self.rejected.add(Reason::Exemplar, "exemplars", series, message);
            return Ok(());
        }
        self.rows.exemplar(ts, value, &self.json)
    }

    /// Appends a metadata entry, unless it equals the last one, as those of the series of a histogram do.
    fn metadata(&mut self, metric: &str, kind: u64, help: &str, unit: &str) -> Result<()> {
        let refused = if metric.is_empty() {
            Some("metric name is empty".to_owned())
        } else if metric.len() > NAME_BYTES_MAX {
            Some(format!("metric name has {} bytes; {NAME_BYTES_MAX} are allowed", metric.len()))
        } else if help.len() > HELP_BYTES_MAX {
            Some(format!("help has {} bytes; {HELP_BYTES_MAX} are allowed", help.len()))
        } else if unit.len() > UNIT_BYTES_MAX {
            Some(format!("unit has {} bytes; {UNIT_BYTES_MAX} are allowed", unit.len()))
        } else {
            None
        };
        if let Some(message) = refused {
            self.rejected.add(Reason::Metadata, "metadata", || cut(metric), message);
            return Ok(());
        }
        let equal = |m: &engine::MetricMetadata| {
            m.metric == metric && m.kind == kind_name(kind) && m.help == help && m.unit == unit
        };
        if self.metadata.last().is_some_and(equal) {
            return Ok(());
        }
        if self.metadata.len() >= METADATA_MAX {
            return Err(Error::limit_exceeded(format!(
                "request holds more than {METADATA_MAX} metadata entries; send less at a time"
            )));
        }
        self.metadata_bytes += metric.len() + help.len() + unit.len();
        if self.metadata_bytes > METADATA_BYTES_MAX {
            return Err(Error::limit_exceeded(format!(
                "request holds metadata of more than {METADATA_BYTES_MAX} bytes; send less at a time"
            )));
        }
        self.metadata.push(engine::MetricMetadata {
            metric: metric.to_owned(),
            kind: kind_name(kind).to_owned(),
            help: help.to_owned(),
            unit: unit.to_owned(),
        });
        Ok(())
    }

    fn finish(self) -> Result<Decoded> {
        let counts = self.rows.len();
        let write = Write { tags: self.encoder.finish(), batches: self.rows.finish()?, metadata: self.metadata };
        Ok(Decoded { write, rejected: self.rejected, counts, left_out: self.left_out })
    }
}

/// Refuses a request with more than [`SERIES_MAX`] series.
fn check_series_count(series: usize) -> Result<()> {
    if series > SERIES_MAX {
        return Err(Error::limit_exceeded(format!("request holds more than {SERIES_MAX} series; send less at a time")));
    }
    Ok(())
}

fn kind_name(kind: u64) -> &'static str {
    match kind {
        1 => "counter",
        2 => "gauge",
        3 => "histogram",
        4 => "gaugehistogram",
        5 => "summary",
        6 => "info",
        7 => "stateset",
        _ => "unknown",
    }
}

/// Checks decoded labels; the error says what is wrong. Order and uniqueness are checked when the set is built, for
/// sets without rows here.
fn check_labels(labels: &mut [(&str, &str)]) -> Result<(), String> {
    if labels.len() > LABELS_MAX {
        return Err(format!("series has over {LABELS_MAX} labels; {LABELS_MAX} are allowed"));
    }
    // First of all: sorting compares names.
    for (name, value) in labels.iter() {
        if name.len() > NAME_BYTES_MAX {
            return Err(long_name(name));
        }
        if value.len() > VALUE_BYTES_MAX {
            return Err(long_value(name, value.len()));
        }
    }
    if !labels.is_sorted_by(|a, b| a.0 < b.0) {
        labels.sort_by(|a, b| a.0.cmp(b.0));
        if let Some(w) = labels.windows(2).find(|w| w[0].0 == w[1].0) {
            return Err(format!("label name {:?} occurs twice; names must be unique", cut(w[0].0)));
        }
    }
    let mut metric = false;
    for (name, value) in labels.iter() {
        if name.is_empty() {
            return Err("a label name is empty; names must have at least one character".to_owned());
        }
        metric |= *name == METRIC_NAME && !value.is_empty();
    }
    if metric { Ok(()) } else { Err(format!("label {METRIC_NAME:?} is missing or empty; it must name the metric")) }
}

/// What is wrong with a label name of more than [`NAME_BYTES_MAX`] bytes.
fn long_name(name: impl AsRef<[u8]>) -> String {
    let bytes = name.as_ref().len();
    format!("label name {:?} has {bytes} bytes; {NAME_BYTES_MAX} are allowed", cut(name))
}

/// What is wrong with the value of a label that has more than [`VALUE_BYTES_MAX`] bytes.
fn long_value(name: impl AsRef<[u8]>, bytes: usize) -> String {
    format!("value of label {:?} has {bytes} bytes; {VALUE_BYTES_MAX} are allowed", cut(name))
}

/// Writes an exemplar's labels as a JSON object with sorted keys.
fn exemplar_labels(labels: &mut [(&str, &str)], out: &mut String) -> Result<(), String> {
    out.clear();
    // First of all: sorting compares names.
    let bytes: usize = labels.iter().map(|(k, v)| k.len() + v.len()).sum();
    if bytes > EXEMPLAR_BYTES_MAX {
        return Err(format!("labels have {bytes} bytes; {EXEMPLAR_BYTES_MAX} are allowed"));
    }
    labels.sort_by(|a, b| a.0.cmp(b.0));
    if let Some(w) = labels.windows(2).find(|w| w[0].0 == w[1].0) {
        return Err(format!("label name {:?} occurs twice", cut(w[0].0)));
    }
    out.push('{');
    for (i, (name, value)) in labels.iter().enumerate() {
        if name.is_empty() {
            return Err("a label name is empty".to_owned());
        }
        if i > 0 {
            out.push(',');
        }
        json_text(name, out);
        out.push(':');
        json_text(value, out);
    }
    out.push('}');
    Ok(())
}

fn json_text(text: &str, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            // Writing into a String does not fail.
            c if c < ' ' => drop(write!(out, "\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
}

/// A label as it came, not known to be UTF-8.
type RawLabel<'a> = (&'a [u8], &'a [u8]);

/// Keeps a label, unless there are too many already: one too many is enough to see that, and memory stays bounded.
fn keep<'a>(labels: &mut Vec<RawLabel<'a>>, label: RawLabel<'a>) {
    if labels.len() <= LABELS_MAX {
        labels.push(label);
    }
}

/// Labels as text; the error says which is none.
fn utf8<'a>(raw: &[RawLabel<'a>]) -> Result<Vec<(&'a str, &'a str)>, String> {
    raw.iter()
        .map(|(name, value)| {
            let name =
                std::str::from_utf8(name).map_err(|e| format!("label name {:?} is not UTF-8: {e}", cut(name)))?;
            let value =
                std::str::from_utf8(value).map_err(|e| format!("value of label {:?} is not UTF-8: {e}", cut(name)))?;
            Ok((name, value))
        })
        .collect()
}

/// A series as PromQL writes it; its labels need not be UTF-8.
fn series_text<T: AsRef<[u8]>>(labels: &[(T, T)]) -> String {
    let mut out = String::from("{");
    for (i, (name, value)) in labels.iter().enumerate() {
        if i > 0 {
            out.push_str(", ");
        }
        // Writing into a String does not fail.
        let _ = write!(out, "{}={:?}", cut(name), cut(value));
        if out.len() > SERIES_TEXT_MAX {
            return cut(out);
        }
    }
    out.push('}');
    out
}

/// A text, which need not be UTF-8, cut after [`SERIES_TEXT_MAX`] bytes. No more of it is looked at than a character
/// beyond.
fn cut(text: impl AsRef<[u8]>) -> String {
    let text = text.as_ref();
    let start = String::from_utf8_lossy(&text[..text.len().min(SERIES_TEXT_MAX + 4)]);
    if start.len() <= SERIES_TEXT_MAX {
        return start.into_owned();
    }
    format!("{}...", &start[..start.floor_char_boundary(SERIES_TEXT_MAX)])
}
