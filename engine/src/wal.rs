//! The log: what is acknowledged is here until it is in files.
//!
//! Positions count the bytes ever logged. A segment file `<position>.wal` begins with a head and holds records; it
//! stands alone: the first use of a tag set in it carries the labels. Only whole segments are deleted. A segment in
//! which a write failed gets no further record, and a restart begins a new one.
//!
//! Always: a record is applied to memtables only after it is durable, in the order of the log.

mod bytes;
mod record;
mod samples;

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use catalog::fs::FsFile;
use catalog::{Error, FileSystem, Ordinal, Result, Series, TagSet};

pub(crate) use record::Record;
use record::{FRAME, Reader, Writer, payload};

use crate::{Batch, MetricMetadata};

const MAGIC: &[u8; 8] = b"THALWAL\n";
const FORMAT_VERSION: u32 = 1;
/// `magic, format version u32, first position u64, CRC-32 of these u32`.
const HEAD: usize = 24;

/// A segment ends when it is this long. Shorter ones are deleted sooner but repeat the labels of all tag sets.
const SEGMENT_BYTES: u64 = 64 << 20;

/// The log, open for appending.
#[derive(Debug)]
pub(crate) struct Wal {
    fs: Arc<dyn FileSystem>,
    dir: PathBuf,
    older: VecDeque<Older>,
    current: Option<Current>,
    /// Where the next segment begins when there is no current one.
    next: u64,
    writer: Writer,
    /// Records encoded and not yet written.
    pending: Vec<u8>,
}

#[derive(Debug)]
struct Older {
    path: PathBuf,
    first: u64,
    end: u64,
}

#[derive(Debug)]
struct Current {
    path: PathBuf,
    /// `None` until the first write.
    file: Option<Box<dyn FsFile>>,
    first: u64,
    len: u64,
}

impl Wal {
    /// Opens the log behind what [`replay`] found.
    pub(crate) fn open(fs: Arc<dyn FileSystem>, dir: &Path, replayed: Vec<Replayed>) -> Self {
        let older: VecDeque<Older> =
            replayed.into_iter().map(|r| Older { path: r.path, first: r.first, end: r.end }).collect();
        let next = older.back().map_or(0, |o| o.end);
        Self { fs, dir: dir.to_owned(), older, current: None, next, writer: Writer::default(), pending: vec![] }
    }

    /// Where the next record will begin, pending ones included.
    pub(crate) fn position(&self) -> u64 {
        self.current.as_ref().map_or(self.next, |c| c.first + c.len) + self.pending.len() as u64
    }

    /// Where the oldest record that is kept begins, or the next one will.
    pub(crate) fn begin(&self) -> u64 {
        let current = self.current.as_ref().map_or(self.next, |c| c.first);
        self.older.front().map_or(current, |o| o.first)
    }

    /// Bytes of all segments.
    pub(crate) fn bytes(&self) -> u64 {
        let older: u64 = self.older.iter().map(|o| o.end - o.first).sum();
        older + self.current.as_ref().map_or(0, |c| c.len)
    }

    /// Encodes a request as one record of the pending group and returns its position. Tag columns of `batches` are
    /// indexes into `ordinals`; `series` gives the tag set of an ordinal.
    ///
    /// # Errors
    /// `LimitExceeded` when it is too long. The records before it stay pending.
    pub(crate) fn encode(
        &mut self,
        ordinals: &[Ordinal],
        series: impl Fn(Ordinal) -> Option<Arc<Series>>,
        batches: &[Batch],
        metadata: &[MetricMetadata],
    ) -> Result<u64> {
        if self.pending.is_empty() && self.current.as_ref().is_some_and(|c| c.len >= SEGMENT_BYTES) {
            self.roll();
        }
        if self.current.is_none() {
            let (first, path) = (self.next, self.dir.join(format!("{:020}.wal", self.next)));
            self.current = Some(Current { path, file: None, first, len: 0 });
            self.writer.restart();
            self.pending.extend_from_slice(&head(first));
        }
        let position = self.position();
        let before = self.pending.len();
        let result = self.writer.encode(position, ordinals, series, batches, metadata, &mut self.pending);
        if let Err(e) = result {
            // The writer may count on what this record would have said: say it again. Records of this group stay.
            self.pending.truncate(before);
            self.writer.repeat();
            return Err(e);
        }
        Ok(position)
    }

    /// Writes the pending records and makes them durable; returns how many bytes that were.
    ///
    /// # Errors
    /// `Unavailable`: nothing of the group is in the log then, as far as the disk allows, and the next group begins a
    /// new segment.
    pub(crate) fn commit(&mut self) -> Result<u64> {
        let Some(current) = &mut self.current else { return Ok(0) };
        let len = self.pending.len() as u64;
        if len == 0 {
            return Ok(0);
        }
        let result = current.append(&*self.fs, &self.dir, &self.pending);
        self.pending.clear();
        match result {
            Ok(()) => {
                current.len += len;
                Ok(len)
            }
            Err(e) => {
                self.abandon(len);
                Err(Error::unavailable("log can't be written").with_source(e))
            }
        }
    }

    /// Leaves the current segment after a failed write of `len` bytes. Whether they, or what the kernel held back
    /// before them, reach the disk later can't be known.
    fn abandon(&mut self, len: u64) {
        let Some(mut current) = self.current.take() else { return };
        self.next = current.first + current.len + len;
        // A client that was told to try again may do so: its first attempt had better not come back at replay.
        let undone = match &mut current.file {
            Some(file) if current.len > 0 => file.set_len(current.len).and_then(|()| file.sync()),
            _ => self.fs.remove(&current.path),
        };
        if let Err(e) = undone {
            tracing::warn!(segment = %current.path.display(), error = %e, "failed write could not be cut off the log");
        }
        if current.len > 0 {
            self.older.push_back(Older { path: current.path, first: current.first, end: self.next });
        }
    }

    /// Ends the current segment, so that it can be deleted once what it holds is in files.
    pub(crate) fn roll(&mut self) {
        assert!(self.pending.is_empty(), "a segment ends between groups");
        if let Some(current) = self.current.take() {
            self.next = current.first + current.len;
            self.older.push_back(Older { path: current.path, first: current.first, end: self.next });
        }
    }

    /// Deletes the segments that end at or before `position`: all that begins there or later is kept.
    pub(crate) fn trim(&mut self, position: u64) -> Result<()> {
        let mut deleted = false;
        while let Some(segment) = self.older.front().filter(|s| s.end <= position) {
            match self.fs.remove(&segment.path) {
                Err(e) if e.kind() != ErrorKind::NotFound => {
                    return Err(Error::from(e).context(format_args!("delete {}", segment.path.display())));
                }
                _ => {}
            }
            self.older.pop_front();
            deleted = true;
        }
        if deleted {
            self.fs.sync_dir(&self.dir)?;
        }
        Ok(())
    }
}

impl Current {
    fn append(&mut self, fs: &dyn FileSystem, dir: &Path, bytes: &[u8]) -> std::io::Result<()> {
        let new = self.file.is_none();
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(fs.create(&self.path)?),
        };
        file.write_all(bytes)?;
        file.sync()?;
        if new {
            fs.sync_dir(dir)?;
        }
        Ok(())
    }
}

fn head(first: u64) -> [u8; HEAD] {
    let mut out = [0; HEAD];
    out[..8].copy_from_slice(MAGIC);
    out[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    out[12..20].copy_from_slice(&first.to_le_bytes());
    let crc = crc32fast::hash(&out[..20]);
    out[20..].copy_from_slice(&crc.to_le_bytes());
    out
}

/// A segment that was there at start.
#[derive(Debug)]
pub(crate) struct Replayed {
    path: PathBuf,
    first: u64,
    end: u64,
}

/// Bytes of a segment that are no intact record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Damage {
    /// Position of the first byte.
    pub start: u64,
    /// Position behind the last byte.
    pub end: u64,
    /// True when no record follows: a write that a crash cut short.
    pub tail: bool,
}

/// A segment file while it is read back.
#[derive(Debug)]
pub(crate) struct SegmentReader {
    path: PathBuf,
    first: u64,
    bytes: Vec<u8>,
    at: usize,
    reader: Reader,
}

/// What comes next in a segment.
#[derive(Debug)]
pub(crate) enum Item {
    /// A record and its position.
    Record(u64, Record),
    /// Intact bytes that can't be used, at this position: they lean on a damaged record.
    Lost(u64, Error),
    /// Damaged bytes.
    Damage(Damage),
}

/// The segments of a log, in order; creates the folder on first use.
///
/// # Errors
/// Reading the folder failed, or a segment can't be told from its name.
pub(crate) fn segments(fs: &dyn FileSystem, dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    fs.create_dir_all(dir)?;
    let mut out = vec![];
    for path in fs.list(dir)? {
        if path.extension().is_none_or(|e| e != "wal") {
            continue;
        }
        let first = path.file_stem().and_then(|s| s.to_str()).and_then(|s| s.parse().ok());
        out.push((
            first
                .ok_or_else(|| Error::corrupt(format!("log segment {} has no position as its name", path.display())))?,
            path,
        ));
    }
    out.sort();
    Ok(out)
}

impl SegmentReader {
    /// Reads a segment.
    ///
    /// # Errors
    /// `Invalid` when a newer version wrote it; reading errors.
    pub(crate) fn open(fs: &dyn FileSystem, first: u64, path: PathBuf) -> Result<Self> {
        let bytes = fs.read(&path).map_err(|e| Error::from(e).context(format_args!("read {}", path.display())))?;
        let mut at = 0;
        if let Some(found) = bytes.get(..HEAD) {
            let sound = found[..8] == MAGIC[..] && crc32fast::hash(&found[..20]).to_le_bytes() == found[20..];
            let version = u32::from_le_bytes([found[8], found[9], found[10], found[11]]);
            if sound && version > FORMAT_VERSION {
                return Err(Error::invalid(format!(
                    "log segment {} has format version {version}; this version reads up to {FORMAT_VERSION}",
                    path.display()
                )));
            }
            // A damaged head is reported like any damage; records say themselves where they belong.
            if sound && found == head(first) {
                at = HEAD;
            }
        }
        Ok(Self { path, first, bytes, at, reader: Reader::default() })
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// From references in this segment's rows to ordinals, as far as it was read.
    pub(crate) fn ordinals(&self) -> &[Ordinal] {
        self.reader.ordinals()
    }

    /// The next record or damage; `None` at the end. `publish` gives each tag set its ordinal.
    ///
    /// # Errors
    /// `Invalid` when a newer version wrote the record; what `publish` returns.
    pub(crate) fn next(&mut self, publish: &mut impl FnMut(TagSet) -> Result<Ordinal>) -> Result<Option<Item>> {
        if self.at >= self.bytes.len() {
            return Ok(None);
        }
        let position = self.first + self.at as u64;
        let Some(found) = payload(&self.bytes[self.at..], position) else {
            let intact = |at: &usize| payload(&self.bytes[*at..], self.first + *at as u64).is_some();
            let next = (self.at + 1..self.bytes.len()).find(intact);
            self.at = next.unwrap_or(self.bytes.len());
            let end = self.first + self.at as u64;
            return Ok(Some(Item::Damage(Damage { start: position, end, tail: next.is_none() })));
        };
        self.at += FRAME + found.len();
        match self.reader.decode(found, publish) {
            Ok(record) => Ok(Some(Item::Record(position, record))),
            Err(e) if e.kind() == catalog::ErrorKind::Corrupt => Ok(Some(Item::Lost(position, e))),
            Err(e) => Err(e.context(format_args!("log segment {} at {position}", self.path.display()))),
        }
    }

    /// What [`Wal::open`] needs to know of it.
    pub(crate) fn finish(self) -> Replayed {
        Replayed { path: self.path, first: self.first, end: self.first + (self.bytes.len() as u64).max(HEAD as u64) }
    }
}

#[cfg(test)]
mod tests;
