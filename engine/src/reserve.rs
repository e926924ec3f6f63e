//! Room on the data folder's disk that is set aside for a full disk.
//!
//! Flushes, compactions and deletes give room back, but first they need some. So a file holds room from the start. When
//! a write fails and the disk proves to be full, the file is deleted and requests are refused; what is in memory goes to
//! data files, the log is trimmed, and as soon as the file could be made again with room to spare, requests are accepted.
//! So that the reserve is enough for what is in memory, rows are flushed the earlier the less room there is
//! ([`Reserve::is_tight`]).

use std::io::{ErrorKind, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use catalog::FileSystem;
use catalog::fs::FsFile;

/// Without so much room the disk counts as full. It keeps a disk that is nearly full from being given up and taken back
/// with every request.
const SPARE_BYTES: u64 = 4 << 20;
/// What is written at a time.
const PIECE: usize = 1 << 20;

/// The file, and whether it had to be given up.
#[derive(Debug)]
pub(crate) struct Reserve {
    fs: Arc<dyn FileSystem>,
    dir: PathBuf,
    bytes: u64,
    full: AtomicBool,
}

impl Reserve {
    /// Makes the reserve unless it is there. On a full disk it is given up at once, so that the database can be opened:
    /// that too needs room. With 0 bytes there is none, and no disk counts as full.
    pub(crate) fn open(fs: Arc<dyn FileSystem>, dir: &Path, bytes: u64) -> Self {
        let reserve = Self { fs, dir: dir.to_owned(), bytes, full: AtomicBool::new(false) };
        if bytes > 0 {
            let there = reserve.fs.len(&reserve.path()).is_ok_and(|len| len == bytes);
            if !there && let Err(e) = reserve.make() {
                reserve.give_up(&e);
            }
            reserve.suspect();
        }
        reserve
    }

    fn path(&self) -> PathBuf {
        self.dir.join("reserve")
    }

    /// Whether the disk is full, and requests are to be refused.
    pub(crate) fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// Looks whether the disk is full, and gives the reserve up if so. Call it after a failed write.
    pub(crate) fn suspect(&self) {
        if self.bytes > 0
            && !self.is_full()
            && let Err(e) = self.probe()
            && matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
        {
            self.give_up(&e);
        }
    }

    /// Whether rows that take so many bytes in memory, and about as many in files, should be written while there is room:
    /// as many may come meanwhile, and the log keeps what it has of them until they are. The reserve has room for few.
    pub(crate) fn is_tight(&self, bytes: u64) -> bool {
        bytes > self.bytes / 4
            && self.bytes > 0
            && self.fs.available(&self.dir).is_ok_and(|free| free < bytes.saturating_mul(3))
    }

    fn give_up(&self, e: &std::io::Error) {
        self.full.store(true, Ordering::Relaxed);
        tracing::error!(folder = %self.dir.display(), error = %e, reserve = self.bytes,
            "disk is full; writes are refused until there is room");
        self.remove(&self.path());
    }

    /// Whether room is back: the reserve could be made again.
    pub(crate) fn refill(&self) -> bool {
        let made = self.make();
        if made.is_ok() {
            self.full.store(false, Ordering::Relaxed);
            tracing::info!(folder = %self.dir.display(), "disk has room again; writes are accepted");
        }
        made.is_ok()
    }

    /// Takes spare room and gives it back.
    fn probe(&self) -> Result<()> {
        let path = self.dir.join("reserve.probe");
        self.with_file(&path, |file| allocate(file, SPARE_BYTES))?;
        self.remove(&path);
        Ok(())
    }

    fn make(&self) -> Result<()> {
        let path = self.path();
        self.with_file(&path, |file| {
            allocate(file, self.bytes + SPARE_BYTES)?;
            // Some file systems count room as taken only once there are bytes.
            write_zeros(file, self.bytes)?;
            file.set_len(self.bytes)?;
            file.sync()
        })?;
        self.fs.sync_dir(&self.dir)
    }

    /// Makes a file anew; it is gone again after an error.
    fn with_file(&self, path: &Path, fill: impl FnOnce(&mut dyn FsFile) -> Result<()>) -> Result<()> {
        self.remove(path);
        let result = self.fs.create(path).and_then(|mut file| fill(&mut *file));
        if result.is_err() {
            self.remove(path);
        }
        result
    }

    fn remove(&self, path: &Path) {
        match self.fs.remove(path) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), error = %e, "reserve can't be deleted");
            }
            _ => {}
        }
    }
}

fn allocate(file: &mut dyn FsFile, bytes: u64) -> Result<()> {
    match file.allocate(bytes) {
        // Not every file system can.
        Err(e) if e.kind() == ErrorKind::Unsupported => write_zeros(file, bytes),
        result => result,
    }
}

fn write_zeros(file: &mut dyn FsFile, bytes: u64) -> Result<()> {
    let zeros = vec![0; PIECE];
    let mut at = 0;
    while at < bytes {
        let len = (bytes - at).min(PIECE as u64);
        file.write_all_at(&zeros[..len as usize], at)?;
        at += len;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use catalog::fs::{Disk, Fault, Faults, Faulty};

    use super::*;

    const BYTES: u64 = 3 << 20;

    #[test]
    fn room_is_given_up_and_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let faults = Faults::default();
        let fs: Arc<dyn FileSystem> = Arc::new(Faulty::new(Arc::new(Disk), faults.clone()));
        let open = || Reserve::open(fs.clone(), dir.path(), BYTES);
        faults.room(Some(BYTES + SPARE_BYTES));
        let reserve = open();
        assert!(!reserve.is_full());
        assert_eq!(faults.used(), BYTES);
        let calls = faults.calls().len();
        assert!(!open().is_full());
        assert_eq!(faults.calls().iter().skip(calls).filter(|c| c.path.ends_with("reserve")).count(), 0, "it is there");
        // Other errors than of room are no reason.
        faults.always(Fault::Io);
        reserve.suspect();
        assert!(!reserve.is_full());
        faults.clear();
        faults.room(Some(BYTES + SPARE_BYTES - 1));
        reserve.suspect();
        assert!(reserve.is_full());
        assert_eq!(faults.used(), 0);
        assert!(!reserve.refill());
        assert!(reserve.is_full());
        assert_eq!(faults.used(), 0);
        assert!(open().is_full(), "opens on a full disk");
        faults.room(Some(BYTES + SPARE_BYTES));
        assert!(reserve.refill());
        assert!(!reserve.is_full());
        assert_eq!(fs.list(dir.path()).unwrap(), [dir.path().join("reserve")]);
    }

    #[test]
    fn without_a_reserve_no_disk_is_full() {
        let dir = tempfile::tempdir().unwrap();
        let faults = Faults::default();
        faults.always(Fault::Full);
        let reserve = Reserve::open(Arc::new(Faulty::new(Arc::new(Disk), faults)), dir.path(), 0);
        reserve.suspect();
        assert!(!reserve.is_full());
    }
}
