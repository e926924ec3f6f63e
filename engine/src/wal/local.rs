//! Segments as files `<position>.wal` in the data folder, and the mark beside them.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use catalog::fs::FsFile;
use catalog::{Error, FileSystem, Result};
use futures::StreamExt;
use futures::stream::BoxStream;

use super::mark::{self, Mark};
use super::{Head, Segment};

const SUFFIX: &str = ".wal";
/// Damaged files that are kept for an operator, the newest, and their bytes in all.
const DAMAGED: &str = ".damaged";
const DAMAGED_FILES_MAX: usize = 16;
const DAMAGED_BYTES_MAX: u64 = 256 << 20;

/// What is known of a log before its records are read.
pub(super) struct Survey {
    /// Before this position all is in files, as far as intact heads and the mark say.
    pub start: u64,
    /// The mark, when no later opening of the log has written.
    pub mark: Option<Mark>,
    /// Which opening wrote the newest record that may not be in files; 0 where only a damaged head says so.
    pub newest: Option<u64>,
}

/// The folder of a log.
#[derive(Debug)]
pub(crate) struct Local {
    fs: Arc<dyn FileSystem>,
    dir: PathBuf,
    /// The current segment's file, once there is one.
    file: Option<Box<dyn FsFile>>,
    /// The mark's file, once it is synced; `None` again when it could not be written.
    mark: Option<Box<dyn FsFile>>,
}

impl Local {
    pub(super) fn new(fs: Arc<dyn FileSystem>, dir: &Path) -> Self {
        Self { fs, dir: dir.to_owned(), file: None, mark: None }
    }

    /// Appends to the current segment and makes it durable.
    pub(super) fn append(&mut self, segment: &mut Segment, bytes: &[u8]) -> std::io::Result<()> {
        let name = name(segment.first);
        let new = self.file.is_none();
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(self.fs.create(&self.dir.join(&name))?),
        };
        file.write_all(bytes)?;
        file.sync()?;
        if new {
            self.fs.sync_dir(&self.dir)?;
            segment.chunks.push(name);
        }
        Ok(())
    }

    /// Leaves a segment in which a write failed and takes back what was written behind its end, as far as the disk
    /// allows: it takes room, and the client may be about to send it again.
    pub(super) fn abandon(&mut self, segment: &mut Segment) {
        let name = name(segment.first);
        let path = self.dir.join(&name);
        let undone = match self.file.take() {
            None => Ok(()),
            Some(mut file) if !segment.chunks.is_empty() => {
                file.set_len(segment.end - segment.first).and_then(|()| file.sync())
            }
            Some(_) => {
                let removed = match self.fs.remove(&path) {
                    Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
                    removed => removed,
                };
                // A loss of power may bring it back until then, after a delete that found nothing in the log.
                let gone = removed.and_then(|()| self.fs.sync_dir(&self.dir));
                if gone.is_err() {
                    segment.chunks.push(name);
                }
                gone
            }
        };
        if let Err(e) = undone {
            tracing::warn!(segment = %path.display(), error = %e, "failed write could not be cut off the log");
        }
    }

    fn mark_path(&self) -> PathBuf {
        self.dir.join(mark::NAME)
    }

    /// The mark; `None` when there is none, or when it is damaged.
    ///
    /// # Errors
    /// `Invalid` when a newer version wrote it; reading errors.
    pub(super) fn mark(&self) -> Result<Option<Mark>> {
        let path = self.mark_path();
        let bytes = match self.fs.read(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            read => read.map_err(|e| Error::from(e).context(format_args!("read {}", path.display())))?,
        };
        let mark = Mark::parse(&bytes).map_err(|e| e.context(format_args!("log {}", path.display())))?;
        if mark.is_none() {
            tracing::warn!(path = %path.display(), "mark of the log is damaged; whether the log's end is missing is not known");
        }
        Ok(mark)
    }

    /// Notes how far the log goes, as far as the disk allows: an older mark is as true.
    pub(super) fn note(&mut self, mark: Mark) {
        if let Some(file) = &mut self.mark
            && let Err(e) = file.write_all_at(&mark.to_bytes(), 0)
        {
            tracing::debug!(path = %self.mark_path().display(), error = %e, "mark of the log can't be written");
            self.mark = None;
        }
    }

    /// Makes a mark durable, or makes sure that there is none.
    ///
    /// # Errors
    /// `Unavailable` when neither can be done: an older one may be there.
    pub(super) fn settle_mark(&mut self, mark: Mark) -> Result<()> {
        let path = self.mark_path();
        let Err(e) = self.try_settle_mark(&path, mark) else { return Ok(()) };
        self.mark = None;
        tracing::warn!(path = %path.display(), error = %e, "mark of the log can't be written; it is given up for now");
        let removed = match self.fs.remove(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            removed => removed,
        };
        removed.and_then(|()| self.fs.sync_dir(&self.dir)).map_err(|e| {
            Error::unavailable(format!("mark of the log {} can't be written or deleted", path.display())).with_source(e)
        })
    }

    fn try_settle_mark(&mut self, path: &Path, mark: Mark) -> std::io::Result<()> {
        if let Some(file) = &mut self.mark {
            file.write_all_at(&mark.to_bytes(), 0)?;
            return file.sync();
        }
        let mut file = match self.fs.open(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => self.fs.create(path)?,
            opened => opened?,
        };
        file.write_all_at(&mark.to_bytes(), 0)?;
        file.sync()?;
        self.fs.sync_dir(&self.dir)?;
        self.mark = Some(file);
        Ok(())
    }

    pub(super) fn close(&mut self) {
        self.file = None;
    }

    /// Deletes a segment, or sets it aside when it is damaged. Durable when it returns: were a newer segment gone before
    /// an older one, a restart would read old values without those that came after them.
    pub(super) fn remove(&self, segment: &Segment) -> Result<()> {
        for name in &segment.chunks {
            let path = self.dir.join(name);
            let removed = if segment.damaged {
                let aside = self.aside(name)?;
                tracing::warn!(path = %aside.display(), "damaged log segment is set aside");
                self.fs.rename(&path, &aside)
            } else {
                self.fs.remove(&path)
            };
            match removed {
                Err(e) if e.kind() != ErrorKind::NotFound => {
                    return Err(Error::from(e).context(format_args!("delete {}", path.display())));
                }
                _ => self.fs.sync_dir(&self.dir)?,
            }
        }
        if segment.damaged {
            self.bound_damaged()?;
        }
        Ok(())
    }

    /// Where to put a damaged segment: names count up, since positions begin again once the log was empty.
    fn aside(&self, name: &str) -> Result<PathBuf> {
        let last = self.damaged()?.pop();
        let number = last.as_ref().and_then(|p| p.file_name()?.to_str()?.split('-').next()?.parse::<u32>().ok());
        Ok(self.dir.join(format!("{:06}-{name}{DAMAGED}", number.map_or(1, |n| n + 1))))
    }

    fn bound_damaged(&self) -> Result<()> {
        let mut bytes = 0;
        for (i, path) in self.damaged()?.into_iter().rev().enumerate() {
            bytes += self.fs.len(&path)?;
            if i >= DAMAGED_FILES_MAX || bytes > DAMAGED_BYTES_MAX {
                tracing::warn!(path = %path.display(), "damaged log segment is deleted; newer ones are kept");
                self.fs.remove(&path)?;
            }
        }
        Ok(())
    }

    /// Damaged segments that were set aside, oldest first.
    pub(super) fn damaged(&self) -> Result<Vec<PathBuf>> {
        let mut paths = self.fs.list(&self.dir)?;
        paths.retain(|p| p.to_string_lossy().ends_with(DAMAGED));
        Ok(paths)
    }

    /// Positions and names of the segments, in order; makes the folder on first use.
    ///
    /// # Errors
    /// `Corrupt` when a file is not named like a segment; reading errors.
    pub(super) fn list(&self) -> Result<Vec<(u64, String)>> {
        self.fs.create_dir_all(&self.dir)?;
        let mut out = vec![];
        for path in self.fs.list(&self.dir)? {
            let Some(name) = path.file_name().and_then(|n| n.to_str()).filter(|n| n.ends_with(SUFFIX)) else {
                continue;
            };
            let first = name.strip_suffix(SUFFIX).and_then(|n| n.parse().ok());
            let first = first
                .ok_or_else(|| Error::corrupt(format!("log segment {} has no position as its name", path.display())))?;
            out.push((first, name.to_owned()));
        }
        out.sort();
        Ok(out)
    }

    /// Position and name of each segment, of which no other one comes back with a loss of power: one that a failed write
    /// left and that was deleted would return behind rows and deletes that came after it.
    pub(super) fn settled_list(&self) -> Result<Vec<(u64, String)>> {
        let names = self.list()?;
        self.fs.sync_dir(&self.dir).map_err(|e| Error::from(e).context(format_args!("sync {}", self.dir.display())))?;
        Ok(names)
    }

    /// What is known of the log before its records are read.
    ///
    /// # Errors
    /// `Invalid` when a newer version wrote it; reading errors.
    pub(super) fn survey(&self) -> Result<Survey> {
        let mut segments = vec![];
        for (first, name) in self.settled_list()? {
            let path = self.dir.join(&name);
            let named = |e| Error::from(e).context(format_args!("read {}", path.display()));
            let len = self.fs.len(&path).map_err(named)?;
            let bytes = self.fs.read_start(&path, Head::BYTES).map_err(named)?;
            let head = Head::parse(&bytes).map_err(|e| e.context(format_args!("log {name}")))?;
            let (start, owner, empty) = head.map_or((0, 0, 0), |(h, len)| (h.start, h.owner, len as u64));
            segments.push((first + len, len > empty, start, owner));
        }
        let last = segments.iter().map(|s| s.3).max().unwrap_or(0);
        let mark = self.mark()?.filter(|m| m.owner >= last);
        let start = segments.iter().map(|s| s.2).chain(mark.map(|m| m.start)).max().unwrap_or(0);
        let held = segments.iter().filter(|(end, has_records, ..)| *has_records && *end > start).map(|s| s.3);
        // What the mark tells of and no segment has is missed by whoever reads the log.
        let newest = held.chain(mark.filter(|m| m.end > start).map(|m| m.owner)).max();
        Ok(Survey { start, mark, newest })
    }

    /// Which opening wrote the newest record that may not be in files; when there is none, leftovers are deleted.
    pub(super) fn holds(&self) -> Result<Option<u64>> {
        let newest = self.survey()?.newest;
        if newest.is_none() {
            for (first, name) in self.list()? {
                let leftover = Segment { chunks: vec![name], ..Segment::at(first) };
                if let Err(e) = self.remove(&leftover) {
                    // In this order only: the newest says that all before it is in files.
                    tracing::debug!(error = %e, "old log could not be deleted");
                    break;
                }
            }
        }
        Ok(newest)
    }

    /// Position, name and bytes of each segment, in order, read when asked for. They are durable: a process that was killed
    /// may have left bytes which the next one sees and a power loss would still take, from behind what was stored on the
    /// strength of them.
    ///
    /// # Errors
    /// `Unavailable` when they can't be made durable; reading errors.
    pub(super) fn chunks(&self) -> Result<BoxStream<'static, Result<(u64, String, Bytes)>>> {
        let segments = self.list()?;
        if let Some((_, newest)) = segments.last() {
            let path = self.dir.join(newest);
            let settled =
                self.fs.open(&path).and_then(|mut file| file.sync()).and_then(|()| self.fs.sync_dir(&self.dir));
            settled.map_err(|e| {
                Error::unavailable(format!("log segment {} can't be synced", path.display())).with_source(e)
            })?;
        }
        let (fs, dir) = (self.fs.clone(), self.dir.clone());
        let read = move |(first, name): (u64, String)| {
            let path = dir.join(&name);
            match fs.read(&path) {
                Ok(bytes) => Ok((first, name, bytes.into())),
                Err(e) => Err(Error::from(e).context(format_args!("read {}", path.display()))),
            }
        };
        Ok(futures::stream::iter(segments).map(read).boxed())
    }
}

/// Name of the segment that begins at a position.
pub(super) fn name(first: u64) -> String {
    format!("{first:020}{SUFFIX}")
}
