//! Reading a log back at a start.

use std::collections::VecDeque;

use bytes::Bytes;
use catalog::{Error, Ordinal, Result, TagSet};
use futures::StreamExt;
use futures::stream::BoxStream;

use super::mark::Mark;
use super::record::{FRAME, Reader, payload};
use super::{Head, Record, Segment, Storage, Wal, local};

/// Bytes of the log that are no intact record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Damage {
    /// The file or object.
    pub chunk: String,
    /// Position of the first byte.
    pub start: u64,
    /// Position behind the last byte.
    pub end: u64,
    /// True when nothing was logged after them: a write that a crash cut short.
    pub tail: bool,
}

/// What comes next in a log.
#[derive(Debug)]
pub(crate) enum Item {
    /// A record and its position.
    Record(u64, Record),
    /// Intact bytes that can't be used, at this position of this chunk: they lean on a damaged record.
    Lost(String, u64, Error),
    /// Damaged or missing bytes.
    Damage(Damage),
}

/// A log while it is read back.
pub(crate) struct Replay {
    storage: Storage,
    owner: u64,
    chunks: BoxStream<'static, Result<Chunk>>,
    /// The chunk that is read, and the one after it, whose head says how much of this one counts.
    current: Option<Chunk>,
    next: Option<Chunk>,
    /// Bytes that should be in front of the current chunk and are not.
    missing: Option<Damage>,
    reader: Reader,
    segments: VecDeque<Segment>,
    /// The fence that this opening put, which is not read.
    fence: Option<Segment>,
    /// Behind the last byte that counts.
    durable: u64,
    /// Behind the last byte.
    end: u64,
    /// Everything before this position is in files. Known before the first record is read: what could not be deleted may
    /// be any of what is there.
    start: u64,
    /// How far the log went when something was last said of it.
    mark: Option<Mark>,
    last_owner: Option<u64>,
}

/// A chunk in memory, as far as it was read.
#[derive(Debug)]
pub(super) struct Chunk {
    name: String,
    head: Option<Head>,
    /// Positions of the segment and of the chunk.
    first: u64,
    at: u64,
    bytes: Bytes,
    /// What comes next begins here.
    pub(super) offset: usize,
    /// Bytes that count.
    limit: usize,
    /// Bytes before this position are known to have been durable.
    confirmed: u64,
}

impl Chunk {
    /// `first` is where it begins when its head does not say so; without, nothing in it can be used then.
    pub(super) fn new(name: String, first: Option<u64>, bytes: Bytes) -> Result<Self> {
        let head = Head::parse(&bytes).map_err(|e| e.context(format_args!("log {name}")))?;
        // A head that belongs elsewhere is damage like any other.
        let head = head.filter(|(h, _)| first.is_none_or(|first| h.first == first && h.at == first));
        let (first, at, offset) = match (head, first) {
            (Some((head, len)), _) => (head.first, head.at, len),
            // Records say themselves where they belong.
            (None, Some(first)) => (first, first, 0),
            (None, None) => return Err(Error::corrupt(format!("head of log object {name} is damaged"))),
        };
        let limit = bytes.len();
        Ok(Self { name, head: head.map(|h| h.0), first, at, bytes, offset, limit, confirmed: 0 })
    }

    fn end(&self) -> u64 {
        self.at + self.bytes.len() as u64
    }

    /// What comes next in the bytes that count.
    pub(super) fn next(
        &mut self,
        reader: &mut Reader,
        publish: &mut impl FnMut(TagSet) -> Result<Ordinal>,
    ) -> Result<Option<Item>> {
        let bytes = &self.bytes[..self.limit];
        if self.offset >= bytes.len() {
            return Ok(None);
        }
        let position = self.at + self.offset as u64;
        let Some(found) = payload(&bytes[self.offset..], position) else {
            let intact = |at: &usize| payload(&bytes[*at..], self.at + *at as u64).is_some();
            let next = (self.offset + 1..bytes.len()).find(intact);
            self.offset = next.unwrap_or(bytes.len());
            let (end, tail) = (self.at + self.offset as u64, next.is_none() && position >= self.confirmed);
            return Ok(Some(Item::Damage(Damage { chunk: self.name.clone(), start: position, end, tail })));
        };
        self.offset += FRAME + found.len();
        match reader.decode(found, publish) {
            Ok(record) => Ok(Some(Item::Record(position, record))),
            Err(e) if e.kind() == catalog::ErrorKind::Corrupt => Ok(Some(Item::Lost(self.name.clone(), position, e))),
            Err(e) => Err(e.context(format_args!("log {} at {position}", self.name))),
        }
    }
}

impl Replay {
    /// Finds what there is of a log. One in the bucket is taken over with this: whoever had it can't write to it any
    /// more.
    ///
    /// # Errors
    /// Of the storage; `Invalid` when a newer version wrote the log.
    pub(crate) async fn open(mut storage: Storage, owner: u64) -> Result<Self> {
        let (mut fence, mut mark) = (None, None);
        let start;
        let chunks = match &mut storage {
            Storage::Local(local) => {
                let survey = local.survey()?;
                (start, mark) = (survey.start, survey.mark);
                local.chunks()?.map(|r| r.and_then(|(first, name, bytes)| Chunk::new(name, Some(first), bytes))).boxed()
            }
            Storage::Objects(objects) => {
                let (found, put, begin) = objects.open(owner).await?;
                (fence, start) = (Some(put), begin);
                let names = found.into_iter().map(|(name, _)| name).collect();
                objects.read(names).map(|r| r.and_then(|(name, bytes)| Chunk::new(name, None, bytes))).boxed()
            }
        };
        let mut out = Self {
            storage,
            owner,
            chunks,
            current: None,
            next: None,
            missing: None,
            reader: Reader::default(),
            segments: VecDeque::new(),
            fence,
            durable: 0,
            end: 0,
            start,
            mark,
            last_owner: None,
        };
        out.next = out.chunks.next().await.transpose()?;
        Ok(out)
    }

    /// From references in the last record's rows to ordinals.
    pub(crate) fn ordinals(&self) -> &[Ordinal] {
        self.reader.ordinals()
    }

    /// Segments so far.
    pub(crate) fn segments(&self) -> usize {
        self.segments.len()
    }

    /// The next record or damage; `None` at the end. `publish` gives each tag set its ordinal.
    ///
    /// # Errors
    /// `Invalid` when a newer version wrote the record; what `publish` returns; of the storage.
    pub(crate) async fn next(
        &mut self,
        publish: &mut (impl FnMut(TagSet) -> Result<Ordinal> + Send),
    ) -> Result<Option<Item>> {
        loop {
            if let Some(missing) = self.missing.take() {
                return Ok(Some(Item::Damage(missing)));
            }
            if let Some(chunk) = &mut self.current
                && let Some(item) = chunk.next(&mut self.reader, publish)?
            {
                match &item {
                    Item::Damage(d) if d.tail => self.durable = d.start,
                    Item::Record(..) => self.durable = chunk.at + chunk.offset as u64,
                    _ => {
                        self.durable = chunk.at + chunk.offset as u64;
                        self.segments.iter_mut().rev().take(1).for_each(|s| s.damaged = true);
                    }
                }
                return Ok(Some(item));
            }
            if !self.advance().await? && !self.miss_end() {
                return Ok(None);
            }
        }
    }

    /// Goes on to the next chunk.
    async fn advance(&mut self) -> Result<bool> {
        let Some(mut chunk) = self.next.take() else { return Ok(false) };
        let continues = self.segments.back().is_some_and(|s| s.first == chunk.first);
        if !continues {
            self.reader = Reader::default();
            self.segments.push_back(Segment::at(chunk.first));
        }
        if let Some(segment) = self.segments.back_mut() {
            segment.end = segment.end.max(chunk.end());
            segment.chunks.push(chunk.name.clone());
        }
        if let Some(head) = &chunk.head {
            self.start = self.start.max(head.start);
            if let Storage::Objects(objects) = &mut self.storage
                && chunk.bytes.len() == Head::BYTES
                && self.last_owner != Some(head.owner)
            {
                objects.note_fence(&chunk.name);
            }
            self.last_owner = Some(head.owner);
            let from = self.durable.max(self.start);
            if let Some(end) = head.end
                && (self.end > 0 || self.mark.is_some())
                && end > from
            {
                let chunk = match &self.storage {
                    Storage::Local(_) => self.vanished(self.end.max(self.start)),
                    Storage::Objects(_) => chunk.name.clone(),
                };
                self.missing = Some(Damage { chunk, start: from, end, tail: false });
                // They were at the end of the segment before, if that is there at all.
                self.segments.iter_mut().rev().take(2).for_each(|s| s.damaged = true);
            }
        }
        self.next = self.chunks.next().await.transpose()?;
        let next_head = self.next.as_ref().and_then(|n| n.head);
        if let Some(end) = next_head.and_then(|h| h.end) {
            // What lies behind was never acknowledged, and something else has been since.
            chunk.limit = chunk.limit.min(end.saturating_sub(chunk.at) as usize);
            chunk.confirmed = end;
        }
        if let Some(mark) = self.mark {
            chunk.confirmed = chunk.confirmed.max(mark.end);
        }
        if chunk.end() <= self.start {
            // All of it is in files; it was left by a deletion that did not end.
            chunk.offset = chunk.limit;
        }
        self.end = chunk.end().max(chunk.at + Head::BASE as u64);
        if chunk.limit > 0 {
            self.durable = self.durable.max(chunk.at + chunk.offset as u64);
        }
        self.current = Some(chunk);
        Ok(true)
    }

    /// Whether bytes are missing behind all that was read; then they are the next item.
    fn miss_end(&mut self) -> bool {
        let from = self.durable.max(self.start);
        let Some(mark) = self.mark.take_if(|m| m.end > from) else { return false };
        let chunk = self.vanished(mark.newest);
        self.missing = Some(Damage { chunk, start: from, end: mark.end, tail: false });
        self.segments.iter_mut().rev().take(1).for_each(|s| s.damaged = true);
        self.end = self.end.max(mark.end);
        true
    }

    /// What to call bytes of the data folder that are not where they were: a segment that began at this position, or the
    /// end of the one that was read last.
    fn vanished(&self, first: u64) -> String {
        let name = local::name(first);
        match &self.current {
            Some(last) if last.name != name => format!("{} or {name}", last.name),
            _ => name,
        }
    }

    /// The log, open behind what was read. Call it when [`Replay::next`] has returned `None`.
    ///
    /// # Errors
    /// The mark can't be made durable.
    pub(crate) fn finish(mut self) -> Result<Wal> {
        let (mut next, mut durable) = (self.end, self.durable);
        if let Some(fence) = self.fence.take() {
            if let Storage::Objects(objects) = &mut self.storage {
                fence.chunks.iter().for_each(|name| objects.note_fence(name));
            }
            (next, durable) = (fence.end, fence.end);
            self.segments.push_back(fence);
        }
        // No position is given twice, and none before which all counts as void.
        let next = next.max(self.start).max(self.mark.map_or(0, |m| m.end));
        let start = self.start;
        let mut wal = Wal { older: self.segments, next, durable, start, ..Wal::new(self.storage, self.owner) };
        let mark = wal.mark();
        if let Storage::Local(local) = &mut wal.storage {
            local.settle_mark(mark)?;
        }
        Ok(wal)
    }
}
