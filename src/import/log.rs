//! What is not in blocks yet: Prometheus's write-ahead log, with its newest checkpoint before it, and the log of samples
//! that came out of order.
//!
//! Segments consist of pages of 32 KiB with fragments of records, as `tsdb/docs/format/wal.md` of Prometheus describes them.
//! The log is read twice: first for series and deletions, then for samples. The log of a running server ends in the
//! middle of a record; damage anywhere else is named, and reading goes on with the next segment.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use super::bytes::{Damage, Reader, Result, check_sum};
use super::chunk::{Counts, Histogram, Points, Span};
use super::{Labels, Piece, Range, Reading, Unwanted};

const PAGE: usize = 32 << 10;
/// Bytes before a fragment: its type, length and checksum.
const HEAD: usize = 7;
/// Flags beside a fragment's type.
const SNAPPY: u8 = 1 << 3;
const ZSTD: u8 = 1 << 4;
/// No record comes near this size when inflated.
const RECORD_MAX: usize = 512 << 20;
/// Samples that are collected before they are handed on, so that those of a series come together.
const COLLECTED: usize = 500_000;
/// The schema of histograms with bounds of their own.
const CUSTOM: i32 = -53;

/// Whether a data folder has a log.
pub fn is_there(dir: &Path) -> bool {
    dir.join("wal").is_dir()
}

/// Reads the log of a data folder.
pub fn read(dir: &Path, range: &Range, reading: &mut Reading) -> std::result::Result<(), Unwanted> {
    reading.report.progress.set_message("log");
    let files = match files(dir) {
        Ok(files) => files,
        Err(e) => {
            reading.report.damage("log", &e.to_string());
            return Ok(());
        }
    };
    let mut head = Head { range, series: HashMap::new(), deleted: HashMap::new() };
    let mut unknown = BTreeMap::new();
    for (i, file) in files.iter().enumerate() {
        let result = records(file, |record| match head.describe(record)? {
            Some(kind) => {
                *unknown.entry(kind).or_insert(0u64) += 1;
                Ok(())
            }
            None => Ok(()),
        });
        // What is being written ends anywhere.
        let torn =
            matches!(result, Err(Stop::Torn)) && files.get(i + 1).is_none_or(|next| next.parent() != file.parent());
        if let (Err(stop), false) = (result, torn) {
            reading.report.damage(&format!("log {}", file.display()), &stop.to_string());
        }
    }
    for (kind, count) in unknown {
        reading.report.damage("log", &format!("{count} records of type {kind} are of an unknown kind"));
    }
    reading.batcher.begin("log", 0);
    let mut collected = Collected::default();
    for file in &files {
        let mut wanted = Ok(());
        // Damage was told the first time.
        let _ = records(file, |record| {
            head.samples(record, &mut collected)?;
            if collected.samples >= COLLECTED {
                wanted = hand_on(std::mem::take(&mut collected), &head, reading);
            }
            match wanted {
                Ok(()) => Ok(()),
                Err(Unwanted) => Err(Damage::new("nobody wants more")),
            }
        });
        wanted?;
    }
    hand_on(collected, &head, reading)?;
    reading.report.units += 1;
    let mut last = reading.batcher.end();
    last.position.end = false;
    reading.hand_on([last])
}

/// The segments in the order in which they were written.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let wal = dir.join("wal");
    let checkpoints = numbered(&wal, "checkpoint.")?;
    let segments = numbered(&wal, "")?;
    let mut files = Vec::new();
    let mut first = 0;
    if let Some((number, checkpoint)) = checkpoints.last_key_value() {
        files.extend(numbered(checkpoint, "")?.into_values());
        // The checkpoint stands for all segments up to its number.
        first = number + 1;
    }
    files.extend(segments.range(first..).map(|(_, path)| path.clone()));
    let late = dir.join("wbl");
    if late.is_dir() {
        files.extend(numbered(&late, "")?.into_values());
    }
    Ok(files)
}

/// Entries of a folder named by a prefix and a number.
fn numbered(dir: &Path, prefix: &str) -> Result<BTreeMap<u64, PathBuf>> {
    let unreadable = |e| Damage::new(format!("{}: {e}", dir.display()));
    let mut out = BTreeMap::new();
    for entry in std::fs::read_dir(dir).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|n| n.strip_prefix(prefix)).filter(|n| n.len() == 8);
        if let Some(number) = number.and_then(|n| n.parse().ok()) {
            out.insert(number, entry.path());
        }
    }
    Ok(out)
}

/// Why a segment was not read to its end.
#[derive(Debug, PartialEq)]
enum Stop {
    /// It ends within a record.
    Torn,
    /// It is damaged.
    Damaged(Damage),
}

impl From<Damage> for Stop {
    fn from(damage: Damage) -> Self {
        Self::Damaged(damage)
    }
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Torn => f.write_str("ends within a record"),
            Self::Damaged(damage) => damage.fmt(f),
        }
    }
}

/// Calls `each` with every record of a segment.
fn records(path: &Path, each: impl FnMut(&[u8]) -> Result<()>) -> std::result::Result<(), Stop> {
    let bytes = std::fs::read(path).map_err(|e| Damage::new(e.to_string()))?;
    records_of(&bytes, each)
}

fn records_of(bytes: &[u8], mut each: impl FnMut(&[u8]) -> Result<()>) -> std::result::Result<(), Stop> {
    let mut record = Vec::new();
    let mut open = false;
    for page in bytes.chunks(PAGE) {
        let whole = page.len() == PAGE;
        let mut rest = page;
        while rest.first().is_some_and(|kind| *kind != 0) {
            if rest.len() < HEAD {
                // What is too short for a head is filled with zeros.
                return if whole {
                    Err(Damage::new("a page ends with what is no record").into())
                } else {
                    Err(Stop::Torn)
                };
            }
            let mut head = Reader::new(rest);
            let (kind, len, sum) = (head.u8()?, head.u16()?, head.u32()?);
            let Ok(data) = head.bytes(u64::from(len)) else {
                return if whole {
                    Err(Damage::new("a record reaches beyond its page").into())
                } else {
                    Err(Stop::Torn)
                };
            };
            check_sum(data, sum)?;
            rest = head.rest();
            let (first, last) = match kind & 7 {
                1 => (true, true),
                2 => (true, false),
                3 => (false, false),
                4 => (false, true),
                other => return Err(Damage::new(format!("a fragment is of type {other}; 1 to 4 are known")).into()),
            };
            if first == open {
                return Err(Damage::new("fragments of a record are out of order").into());
            }
            open = !last;
            if first {
                record.clear();
            }
            record.extend_from_slice(data);
            if last {
                inflated(kind, &record, &mut each)?;
            }
        }
    }
    if open { Err(Stop::Torn) } else { Ok(()) }
}

fn inflated(kind: u8, record: &[u8], each: &mut impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let bad = |e: &dyn std::fmt::Display| Damage::new(format!("a record can't be inflated: {e}"));
    if kind & SNAPPY != 0 {
        let len = snap::raw::decompress_len(record).map_err(|e| bad(&e))?;
        if len > RECORD_MAX {
            return Err(Damage::new(format!("a record says that it inflates to {len} bytes")));
        }
        each(&snap::raw::Decoder::new().decompress_vec(record).map_err(|e| bad(&e))?)
    } else if kind & ZSTD != 0 {
        each(&zstd::bulk::decompress(record, RECORD_MAX).map_err(|e| bad(&e))?)
    } else {
        each(record)
    }
}

/// The series of the log.
struct Head<'r> {
    range: &'r Range,
    /// Labels by reference; none for series that are not wanted.
    series: HashMap<u64, Option<Labels>>,
    /// Deleted times by reference, both ends included.
    deleted: HashMap<u64, Vec<(i64, i64)>>,
}

/// Samples by reference.
#[derive(Debug, Default)]
struct Collected {
    samples: usize,
    points: BTreeMap<u64, Points>,
}

impl Head<'_> {
    /// Takes in a record of series or deletions; gives the type of a record of an unknown kind.
    fn describe(&mut self, record: &[u8]) -> Result<Option<u8>> {
        let mut r = Reader::new(record);
        match r.u8()? {
            1 => {
                while !r.is_empty() {
                    let id = r.u64()?;
                    let mut labels = Vec::new();
                    for _ in 0..r.uvarint()? {
                        labels.push((r.text()?.to_owned(), r.text()?.to_owned()));
                    }
                    let wanted = self.range.matches(&labels);
                    self.series.insert(id, wanted.then_some(labels));
                }
            }
            3 => {
                while !r.is_empty() {
                    self.deleted.entry(r.u64()?).or_default().push((r.varint()?, r.varint()?));
                }
            }
            // Samples are read later; exemplars, places of chunks and metadata are not imported.
            2 | 4..=10 => {}
            other => return Ok(Some(other)),
        }
        Ok(None)
    }

    /// Collects the samples of a record.
    fn samples(&self, record: &[u8], out: &mut Collected) -> Result<()> {
        let mut r = Reader::new(record);
        let kind = r.u8()?;
        if !matches!(kind, 2 | 7..=10) || r.is_empty() {
            return Ok(());
        }
        let (first_id, first_ts) = (r.u64()?, r.u64()? as i64);
        while !r.is_empty() {
            let id = first_id.wrapping_add_signed(r.varint()?);
            let ts = first_ts.wrapping_add(r.varint()?);
            let float = if kind == 2 { Some(r.f64()?) } else { None };
            let histogram = if kind == 2 { None } else { Some(histogram(&mut r, ts, matches!(kind, 8 | 10))?) };
            if !self.wanted(id, ts) {
                continue;
            }
            let points = out.points.entry(id).or_default();
            points.floats.extend(float.map(|value| (ts, value)));
            points.histograms.extend(histogram);
            out.samples += 1;
        }
        Ok(())
    }

    fn wanted(&self, id: u64, ts: i64) -> bool {
        let deleted = || self.deleted.get(&id).into_iter().flatten().any(|(from, to)| (*from..=*to).contains(&ts));
        self.range.contains(ts) && self.series.get(&id).is_some_and(Option::is_some) && !deleted()
    }
}

fn hand_on(collected: Collected, head: &Head<'_>, reading: &mut Reading) -> std::result::Result<(), Unwanted> {
    for (id, points) in collected.points {
        let Some(Some(labels)) = head.series.get(&id) else { continue };
        reading.report.series += 1;
        let full = reading.batcher.push(Piece { labels: labels.clone(), points });
        reading.hand_on(full)?;
    }
    Ok(())
}

fn histogram(r: &mut Reader<'_>, ts: i64, fractional: bool) -> Result<Histogram> {
    let reset_hint = r.u8()?;
    let schema = r.varint()?;
    let schema = i32::try_from(schema).map_err(|_| Damage::new(format!("holds a histogram of schema {schema}")))?;
    let zero_threshold = r.f64()?;
    let (mut counts, sum) = if fractional {
        let (zero, count) = (r.f64()?, r.f64()?);
        (Counts::Fractional { count, zero, positive: Vec::new(), negative: Vec::new() }, r.f64()?)
    } else {
        let (zero, count) = (r.uvarint()?, r.uvarint()?);
        (Counts::Whole { count, zero, positive: Vec::new(), negative: Vec::new() }, r.f64()?)
    };
    let spans = |r: &mut Reader<'_>| {
        let bad = || Damage::new("holds a span out of range");
        list(r, |r| {
            let offset = i32::try_from(r.varint()?).map_err(|_| bad())?;
            Ok(Span { offset, length: u32::try_from(r.uvarint()?).map_err(|_| bad())? })
        })
    };
    let (positive_spans, negative_spans) = (spans(r)?, spans(r)?);
    match &mut counts {
        Counts::Whole { positive, negative, .. } => {
            (*positive, *negative) = (list(r, Reader::varint)?, list(r, Reader::varint)?);
        }
        Counts::Fractional { positive, negative, .. } => {
            (*positive, *negative) = (list(r, Reader::f64)?, list(r, Reader::f64)?);
        }
    }
    let custom_values = if schema == CUSTOM { list(r, Reader::f64)? } else { Vec::new() };
    Ok(Histogram {
        ts,
        schema,
        zero_threshold,
        sum,
        counts,
        positive: positive_spans,
        negative: negative_spans,
        custom_values,
        reset_hint: if reset_hint <= 3 { reset_hint } else { 0 },
    })
}

/// A length and that many entries.
fn list<'a, T>(r: &mut Reader<'a>, mut read: impl FnMut(&mut Reader<'a>) -> Result<T>) -> Result<Vec<T>> {
    let len = r.uvarint()?;
    // Each entry takes a byte at least, so this ends with the record.
    (0..len).map(|_| read(r)).collect()
}

#[cfg(test)]
mod tests;
