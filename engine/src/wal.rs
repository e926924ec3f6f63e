//! The log: what is acknowledged is here until it is in files.
//!
//! Positions count the bytes ever logged. The log is cut into *segments*, each of which stands alone: the first use of a
//! tag set in it carries the labels, and only whole segments are deleted. A segment is stored as one or more *chunks*,
//! each a head and records: in the data folder one file is one segment, in the object store each group is an object. A
//! segment in which a write failed gets no further record, and a restart begins a new one.
//!
//! The head of a chunk says where the durable log ended when it was made. So a failed write that could not be taken
//! back is void once something was logged after it, and bytes that vanished from before it are noticed. What vanishes from
//! the end is noticed by a *mark* beside the segments of the data folder, which says the same after each group.
//!
//! Heads and mark also say before which position all is in files. What lies there and could not be deleted is never read
//! again: it would come back over what was written, or deleted, later.
//!
//! Always: a record is applied to memtables only after it is durable, in the order of the log.

mod bytes;
mod local;
mod mark;
mod objects;
mod record;
mod replay;
mod samples;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

use catalog::{Error, FileSystem, Ordinal, Result, Series};
use object_store::ObjectStore;

use crate::{Batch, MetricMetadata};
use local::Local;
use mark::Mark;
use objects::Objects;
pub(crate) use record::Record;
use record::Writer;
pub(crate) use replay::{Item, Replay};

const MAGIC: &[u8; 8] = b"THALWAL\n";
const FORMAT_VERSION: u32 = 2;

/// A segment ends when it is this long. Shorter ones are deleted sooner but repeat the labels of all tag sets.
const SEGMENT_BYTES: u64 = 64 << 20;

/// What a chunk begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Head {
    /// Position of the segment's first byte.
    first: u64,
    /// Position of the chunk's first byte.
    at: u64,
    /// Position behind the last durable byte before the chunk; `None` in format version 1, which did not say.
    end: Option<u64>,
    /// Everything before this position is in files.
    start: u64,
    /// Which opening of the log wrote it: a number that no other one has.
    owner: u64,
}

impl Head {
    /// Bytes of a head of the present version.
    const BYTES: usize = 60;
    /// What heads of all versions begin with, and all of it in version 1.
    const BASE: usize = 24;

    fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[..8].copy_from_slice(MAGIC);
        out[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        out[12..20].copy_from_slice(&self.first.to_le_bytes());
        seal(&mut out[..Self::BASE]);
        let numbers = [self.at, self.end.unwrap_or(self.at), self.start, self.owner];
        for (slot, number) in out[Self::BASE..].chunks_exact_mut(8).zip(numbers) {
            slot.copy_from_slice(&number.to_le_bytes());
        }
        seal(&mut out);
        out
    }

    /// The head at the start of a chunk and its length; `None` when it is damaged.
    ///
    /// # Errors
    /// `Invalid` when a newer version wrote it.
    fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>> {
        let Some(base) = sealed(bytes, Self::BASE).filter(|b| b[..8] == MAGIC[..]) else { return Ok(None) };
        let number = |b: &[u8], at: usize| b[at..at + 8].iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte));
        let first = number(base, 12);
        match u32::from_le_bytes([base[8], base[9], base[10], base[11]]) {
            1 => Ok(Some((Self { first, at: first, end: None, start: 0, owner: 0 }, Self::BASE))),
            FORMAT_VERSION => Ok(sealed(bytes, Self::BYTES).map(|b| {
                let [at, end, start, owner] = [0, 1, 2, 3].map(|i| number(b, Self::BASE + 8 * i));
                (Self { first, at, end: Some(end), start, owner }, Self::BYTES)
            })),
            version => Err(Error::invalid(format!(
                "log has format version {version}; this version reads up to {FORMAT_VERSION}"
            ))),
        }
    }
}

/// Puts the CRC-32 of the bytes before into the last four.
fn seal(bytes: &mut [u8]) {
    let (body, crc) = bytes.split_at_mut(bytes.len() - 4);
    crc.copy_from_slice(&crc32fast::hash(body).to_le_bytes());
}

/// The first `len` bytes when they end in their CRC-32.
fn sealed(bytes: &[u8], len: usize) -> Option<&[u8]> {
    let (body, crc) = bytes.get(..len)?.split_at(len - 4);
    (crc32fast::hash(body).to_le_bytes() == crc).then(|| &bytes[..len])
}

/// Where the chunks are.
#[derive(Debug)]
pub(crate) enum Storage {
    /// Files in the data folder.
    Local(Local),
    /// Objects in the bucket.
    Objects(Objects),
}

impl Storage {
    /// A folder, made when the log is read.
    pub(crate) fn local(fs: Arc<dyn FileSystem>, dir: &Path) -> Self {
        Self::Local(Local::new(fs, dir))
    }

    /// Objects `<database>/wal/<number>`.
    pub(crate) fn objects(store: Arc<dyn ObjectStore>, database: &str) -> Self {
        Self::Objects(Objects::new(store, database))
    }

    /// Which opening of the log wrote the newest record that may not be in files; `None` when there is no such record. In
    /// the bucket nobody who had a log before can put one from then on.
    ///
    /// # Errors
    /// Of the storage; `Invalid` when a newer version wrote the log.
    pub(crate) async fn holds(&mut self, owner: u64) -> Result<Option<u64>> {
        match self {
            Self::Local(local) => local.holds(),
            Self::Objects(objects) => objects.holds(owner).await,
        }
    }
}

/// A part of the log that is deleted as a whole.
#[derive(Debug)]
struct Segment {
    first: u64,
    /// Behind its last byte.
    end: u64,
    /// Names of its chunks.
    chunks: Vec<String>,
    /// Whether something in it could not be read back.
    damaged: bool,
}

impl Segment {
    fn at(first: u64) -> Self {
        Self { first, end: first, chunks: vec![], damaged: false }
    }
}

/// The log, open for appending.
#[derive(Debug)]
pub(crate) struct Wal {
    storage: Storage,
    /// Segments that get no more records, oldest first.
    older: VecDeque<Segment>,
    current: Option<Segment>,
    /// Where the next segment begins when there is no current one.
    next: u64,
    /// Behind the last byte that is known to be durable.
    durable: u64,
    /// Everything before this position is in files, whatever could not be deleted yet.
    start: u64,
    owner: u64,
    writer: Writer,
    /// Records encoded and not yet written.
    pending: Vec<u8>,
    /// Whether a group is being encoded, written and applied to memtables. Whoever takes the log and finds it so knows
    /// that a panic left the group half done.
    pub(crate) in_group: bool,
}

impl Wal {
    /// A log without records. [`Replay::finish`] opens one behind what it read.
    pub(crate) fn new(storage: Storage, owner: u64) -> Self {
        Self {
            storage,
            older: VecDeque::new(),
            current: None,
            next: 0,
            durable: 0,
            start: 0,
            owner,
            writer: Writer::default(),
            pending: vec![],
            in_group: false,
        }
    }

    /// Where the next record will begin, pending ones included.
    pub(crate) fn position(&self) -> u64 {
        self.current.as_ref().map_or(self.next, |c| c.end) + self.pending.len() as u64
    }

    /// Bytes of all segments.
    pub(crate) fn bytes(&self) -> u64 {
        self.older.iter().chain(&self.current).map(|s| s.end - s.first).sum()
    }

    /// Chunks of all segments.
    pub(crate) fn chunks(&self) -> usize {
        self.older.iter().chain(&self.current).map(|s| s.chunks.len()).sum()
    }

    /// Where the oldest record that is kept begins, or the next one will.
    pub(crate) fn oldest(&self) -> u64 {
        self.older.iter().chain(&self.current).map(|s| s.first).next().unwrap_or(self.next)
    }

    /// Everything before this position is in files.
    fn start(&self) -> u64 {
        self.oldest().max(self.start)
    }

    fn mark(&self) -> Mark {
        let newest = self.current.as_ref().or(self.older.back()).map_or(self.next, |s| s.first);
        Mark { newest, end: self.durable, start: self.start(), owner: self.owner }
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
        if self.pending.is_empty() {
            self.begin();
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

    /// Begins a group, and what it needs of a new segment and a new chunk.
    fn begin(&mut self) {
        if self.current.as_ref().is_some_and(|c| c.end - c.first >= SEGMENT_BYTES) {
            self.roll();
        }
        if self.current.is_none() {
            self.writer.restart();
        }
        let new = self.current.is_none();
        let first = self.current.get_or_insert_with(|| Segment::at(self.next)).first;
        if new || matches!(self.storage, Storage::Objects(_)) {
            let (at, end) = (self.position(), Some(self.durable));
            let head = Head { first, at, end, start: self.start(), owner: self.owner };
            self.pending.extend_from_slice(&head.to_bytes());
        }
    }

    /// Writes the pending records and makes them durable; returns how many bytes that were.
    ///
    /// # Errors
    /// `Unavailable`: nothing of the group is acknowledged then. It is in the log whole or not at all, and is void as
    /// soon as a later group is in it, which begins a new segment.
    pub(crate) async fn commit(&mut self) -> Result<u64> {
        let Some(current) = self.current.as_mut().filter(|_| !self.pending.is_empty()) else { return Ok(0) };
        let len = self.pending.len() as u64;
        let pending = std::mem::take(&mut self.pending);
        let result = match &mut self.storage {
            Storage::Local(local) => {
                let result = local.append(current, &pending);
                self.pending = pending;
                self.pending.clear();
                result.map_err(Error::from)
            }
            Storage::Objects(objects) => objects.append(current, pending.into(), self.owner).await,
        };
        match result {
            Ok(()) => {
                current.end += len;
                self.durable = current.end;
                let mark = self.mark();
                if let Storage::Local(local) = &mut self.storage {
                    local.note(mark);
                }
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
        let Some(mut segment) = self.current.take() else { return };
        self.next = segment.end + len;
        if let Storage::Local(local) = &mut self.storage {
            local.abandon(&mut segment);
        }
        if !segment.chunks.is_empty() {
            segment.end = self.next;
            self.older.push_back(segment);
        }
    }

    /// Ends the current segment, so that it can be deleted once what it holds is in files.
    pub(crate) fn roll(&mut self) {
        assert!(self.pending.is_empty(), "a segment ends between groups");
        if let Some(segment) = self.current.take() {
            self.next = segment.end;
            self.older.push_back(segment);
        }
        if let Storage::Local(local) = &mut self.storage {
            local.close();
        }
    }

    /// Gives up the segments that end at or before `position`: all that begins there or later is kept. Returns what is
    /// left to delete, which can be done while the log goes on.
    ///
    /// # Errors
    /// Of the storage; what could not be given up is kept.
    pub(crate) async fn trim(&mut self, position: u64) -> Result<Option<Garbage>> {
        let count = self.older.iter().take_while(|s| s.end <= position).count();
        let Some(last) = count.checked_sub(1).and_then(|i| self.older.get(i)) else { return Ok(None) };
        self.start = self.start.max(last.end);
        let mark = self.mark();
        let store = match &mut self.storage {
            Storage::Local(local) => {
                // Were they gone before it is known that they may be, they would be missed.
                local.settle_mark(mark)?;
                for _ in 0..count {
                    local.remove(&self.older[0])?;
                    self.older.pop_front();
                }
                return Ok(None);
            }
            Storage::Objects(objects) => {
                self.older.iter_mut().take(count).for_each(|s| objects.keep_fences(s));
                objects.store()
            }
        };
        // Objects go in any order, so the log first says that all of them are void.
        let gone: Vec<Segment> = self.older.drain(..count).collect();
        self.begin();
        if let Err(e) = self.commit().await {
            gone.into_iter().rev().for_each(|s| self.older.push_front(s));
            return Err(e);
        }
        Ok(Some(Garbage { store, segments: gone }))
    }

    /// Damaged segments that were set aside in the data folder.
    ///
    /// # Errors
    /// Of the storage.
    pub(crate) fn damaged(&self) -> Result<usize> {
        match &self.storage {
            Storage::Local(local) => Ok(local.damaged()?.len()),
            Storage::Objects(_) => Ok(0),
        }
    }
}

/// Chunks that the log has given up.
#[derive(Debug)]
pub(crate) struct Garbage {
    store: objects::Store,
    segments: Vec<Segment>,
}

impl Garbage {
    /// Deletes them. What is left by a failure is found again at the next start.
    pub(crate) async fn delete(self) {
        for segment in self.segments {
            if let Err(e) = self.store.remove(&segment).await {
                tracing::warn!(position = segment.first, error = %e, "old log could not be deleted");
            }
        }
    }
}

#[cfg(test)]
mod tests;
