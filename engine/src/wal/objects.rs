//! Chunks as objects `<database>/wal/<number>`, one for each group, put only where none is.
//!
//! Numbers count without gaps, so that of two processes that both believe to own the log only one can put the next
//! object. Whoever opens the log puts a *fence* first, a chunk without records: a process that had the log before meets
//! it with its next put, sees another owner, and never acknowledges anything again. The newest object is never deleted,
//! nor are the newest fences: a delayed put at their numbers must keep failing. Nor is the first object, a fence as well:
//! whoever is told by a list that is out of date that there is no log finds it there.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use catalog::{Error, ErrorKind, Result};
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode};
use tokio::time::{Instant, sleep, timeout};

use super::{Head, Segment};

/// A put or get that takes longer has failed, which it may have after it was done.
const ATTEMPT_MAX: Duration = Duration::from_secs(5);
/// After so long no further attempt is made, and whoever waits is told to come again.
const ATTEMPTS_MAX: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);
/// Fences that are kept.
const FENCES: usize = 100;
/// Objects that are read at the same time.
const READS: usize = 16;

/// The log's folder in the bucket.
#[derive(Debug, Clone)]
pub(super) struct Store {
    store: Arc<dyn ObjectStore>,
    folder: Path,
}

/// The log's objects, as the one process that puts them sees them.
#[derive(Debug)]
pub(crate) struct Objects {
    store: Store,
    /// Number of the next object.
    next: u64,
    fenced: bool,
    /// Fences that are there, oldest first.
    fences: VecDeque<String>,
}

impl Store {
    fn path(&self, name: &str) -> Path {
        self.folder.clone().join(name)
    }

    async fn read(&self, name: &str, range: Option<Range<u64>>) -> Result<Bytes> {
        let path = self.path(name);
        let options = GetOptions::new().with_range(range.map(GetRange::Bounded));
        let read = async { self.store.get_opts(&path, options).await?.bytes().await };
        match timeout(ATTEMPT_MAX, read).await {
            Ok(result) => result.map_err(|e| Error::from(e).context(format_args!("read {path}"))),
            Err(_) => Err(Error::unavailable(format!("read {path}: no answer within {ATTEMPT_MAX:?}"))),
        }
    }

    /// Reads an object, or a range of it, again until it succeeds, within bounds.
    async fn read_patiently(&self, name: &str, range: Option<Range<u64>>) -> Result<Bytes> {
        let begun = Instant::now();
        loop {
            match self.read(name, range.clone()).await {
                Err(e) if e.kind() == ErrorKind::Unavailable && begun.elapsed() < ATTEMPTS_MAX => {
                    sleep(PAUSE).await;
                }
                result => return result,
            }
        }
    }

    /// Deletes a segment's objects, or moves them aside when it is damaged.
    pub(super) async fn remove(&self, segment: &Segment) -> Result<()> {
        if segment.damaged {
            for name in &segment.chunks {
                let aside = self.folder.clone().join("damaged").join(name.as_str());
                tracing::warn!(object = %aside, "damaged log segment is set aside");
                self.store.copy(&self.path(name), &aside).await?;
            }
        }
        let paths: Vec<_> = segment.chunks.iter().map(|name| Ok(self.path(name))).collect();
        let mut deleted = self.store.delete_stream(futures::stream::iter(paths).boxed());
        while let Some(result) = deleted.next().await {
            match result {
                Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

/// What a put met.
enum Put {
    Done,
    /// Something that this process gave up earlier has come through after all.
    Stale,
    /// Another process's object.
    Foreign(Head),
}

impl Objects {
    pub(super) fn new(store: Arc<dyn ObjectStore>, database: &str) -> Self {
        let folder = Path::from(format!("{database}/wal"));
        Self { store: Store { store, folder }, next: 0, fenced: false, fences: VecDeque::new() }
    }

    pub(super) fn store(&self) -> Store {
        self.store.clone()
    }

    /// Puts a fence behind all that is there; returns names and sizes of the objects before it, in order, the fence, and the
    /// position before which everything is in files. A list that is out of date by some puts is found out by the fence;
    /// one that was asked for later would not be.
    ///
    /// # Errors
    /// `Corrupt` when the newest object is damaged; store errors.
    pub(super) async fn open(&mut self, owner: u64) -> Result<(Vec<(String, u64)>, Segment, u64)> {
        let begun = Instant::now();
        // Where the put before was in vain.
        let mut taken = None;
        loop {
            let mut objects = self.list().await?;
            if let [first, second, ..] = &objects[..]
                && first.0 == name(0)
                && second.0 != name(1)
            {
                // It is kept for this alone: to be found.
                objects.remove(0);
            }
            let mut at = 0;
            let mut start = 0;
            self.next = 0;
            if let Some((last, _)) = objects.last() {
                let bytes = match self.store.read_patiently(last, None).await {
                    // The newest object is never deleted, so there is a newer one, which the list did not name yet.
                    Err(e) if e.kind() == ErrorKind::NotFound => {
                        if begun.elapsed() >= ATTEMPTS_MAX {
                            return Err(
                                Error::unavailable("the list of the log names what is not there").with_source(e)
                            );
                        }
                        sleep(PAUSE).await;
                        continue;
                    }
                    read => read?,
                };
                let (head, _) = Head::parse(&bytes)?
                    .ok_or_else(|| Error::corrupt(format!("head of {} is damaged", self.store.path(last))))?;
                at = head.at + bytes.len() as u64;
                start = head.start;
                self.next = number(last).map_or(0, |n| n + 1);
            }
            let fence = Head { first: at, at, end: Some(at), start, owner };
            let mut segment = Segment::at(at);
            let bytes = Bytes::copy_from_slice(&fence.to_bytes());
            match self.put(&bytes, owner).await? {
                Put::Done => {
                    segment.chunks.push(name(self.next));
                    segment.end += bytes.len() as u64;
                    self.next += 1;
                    return Ok((objects, segment, start));
                }
                // The process before is still alive: what it just put is part of the log.
                Put::Stale | Put::Foreign(_) if taken != Some(self.next) => taken = Some(self.next),
                // Or the list does not know it yet.
                Put::Stale | Put::Foreign(_) if begun.elapsed() < ATTEMPTS_MAX => sleep(PAUSE).await,
                Put::Stale | Put::Foreign(_) => {
                    let found = self.store.path(&name(self.next));
                    return Err(Error::unavailable(format!(
                        "the list of the log does not name {found}, which is there"
                    )));
                }
            }
        }
    }

    /// Names and sizes of all objects, in order.
    async fn list(&self) -> Result<Vec<(String, u64)>> {
        let list = self.store.store.list_with_delimiter(Some(&self.store.folder)).await?;
        let mut out: Vec<(String, u64)> =
            list.objects.iter().filter_map(|o| Some((o.location.filename()?.to_owned(), o.size))).collect();
        out.retain(|(name, _)| number(name).is_some());
        out.sort();
        Ok(out)
    }

    /// Which opening wrote the newest record that may not be in files. If there is anything, a fence is put first: what
    /// whoever had the log put before is seen then, and nothing comes after it.
    pub(super) async fn holds(&mut self, owner: u64) -> Result<Option<u64>> {
        if self.list().await?.is_empty() {
            // A list may be out of date.
            match self.store.read_patiently(&name(0), None).await {
                Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
                first => first?,
            };
        }
        let (mut objects, _, start) = self.open(owner).await?;
        for (name, bytes) in objects.iter().rev().filter(|(_, bytes)| *bytes > Head::BYTES as u64) {
            let head = match self.store.read_patiently(name, Some(0..Head::BYTES as u64)).await {
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                read => Head::parse(&read?)?,
            };
            // What can't be read counts as the oldest; what is in files was left by a deletion that did not end.
            let head = head.map_or((0, u64::MAX), |(head, _)| (head.owner, head.at + bytes));
            if head.1 > start {
                return Ok(Some(head.0));
            }
        }
        // All that counts are heads, and most of them fences.
        objects.truncate(objects.len().saturating_sub(FENCES));
        let chunks = objects.into_iter().map(|o| o.0).filter(|name| number(name) != Some(0)).collect();
        if let Err(e) = self.store.remove(&Segment { chunks, ..Segment::at(0) }).await {
            tracing::debug!(error = %e, "old fences of the log could not be deleted");
        }
        Ok(None)
    }

    /// Reads objects, in order, but for those that were deleted since they were listed: a process that had the log before
    /// may still be deleting what is in files. Were it anything else, the heads behind it would tell that it is missing.
    pub(super) fn read(&self, names: Vec<String>) -> BoxStream<'static, Result<(String, Bytes)>> {
        let store = self.store.clone();
        let reads = futures::stream::iter(names).map(move |name| {
            let store = store.clone();
            async move {
                match store.read_patiently(&name, None).await {
                    Err(e) if e.kind() == ErrorKind::NotFound => None,
                    read => Some(read.map(|bytes| (name, bytes))),
                }
            }
        });
        reads.buffered(READS).filter_map(std::future::ready).boxed()
    }

    /// Notes a fence, in the order of the log.
    pub(super) fn note_fence(&mut self, name: &str) {
        self.fences.push_back(name.to_owned());
    }

    /// Removes from a segment's chunks the fences that must stay.
    pub(super) fn keep_fences(&mut self, segment: &mut Segment) {
        while self.fences.len() > FENCES {
            self.fences.pop_front();
        }
        segment.chunks.retain(|chunk| *chunk != name(0) && !self.fences.contains(chunk));
    }

    /// Puts a chunk of a segment. On success it is durable and ours.
    pub(super) async fn append(&mut self, segment: &mut Segment, bytes: Bytes, owner: u64) -> Result<()> {
        loop {
            if self.fenced {
                return Err(Error::unavailable("another process has taken the log over"));
            }
            match self.put(&bytes, owner).await? {
                Put::Done => {
                    segment.chunks.push(name(self.next));
                    self.next += 1;
                    return Ok(());
                }
                Put::Stale => self.next += 1,
                Put::Foreign(head) => {
                    self.fenced = true;
                    tracing::error!(
                        owner,
                        by = head.owner,
                        "another process has taken the log over; no write is accepted"
                    );
                }
            }
        }
    }

    /// Puts the next object, again while answers are ambiguous, and reads back what is there when there is something.
    async fn put(&self, bytes: &Bytes, owner: u64) -> Result<Put> {
        let name = name(self.next);
        let path = self.store.path(&name);
        let begun = Instant::now();
        loop {
            let put = self.store.store.put_opts(&path, bytes.clone().into(), PutMode::Create.into());
            let error = match timeout(ATTEMPT_MAX, put).await {
                Ok(Ok(_)) => return Ok(Put::Done),
                Ok(Err(object_store::Error::AlreadyExists { .. })) => {
                    let found = self.store.read_patiently(&name, None).await?;
                    if found == *bytes {
                        return Ok(Put::Done);
                    }
                    let (head, _) =
                        Head::parse(&found)?.ok_or_else(|| Error::corrupt(format!("head of {path} is damaged")))?;
                    return Ok(if head.owner == owner { Put::Stale } else { Put::Foreign(head) });
                }
                Ok(Err(e)) => Error::from(e),
                Err(_) => Error::unavailable(format!("no answer within {ATTEMPT_MAX:?}")),
            };
            if begun.elapsed() >= ATTEMPTS_MAX {
                return Err(error.context(format_args!("put {path}")));
            }
            sleep(PAUSE).await;
        }
    }
}

fn name(number: u64) -> String {
    format!("{number:020}")
}

fn number(name: &str) -> Option<u64> {
    name.parse().ok().filter(|_| name.len() == 20)
}
