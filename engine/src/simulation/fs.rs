//! A file system in memory that fails like a disk: errors, short writes, syncs that fail, and power that goes.
//!
//! Files and names have two states each: what the process sees, and what is durable. A sync makes a file's bytes durable,
//! the sync of a folder its names. When power goes, each change that was not synced may have reached the disk or not,
//! and of a file's bytes any part. After a failed sync the kernel counts bytes as written that may not be: no later sync
//! writes them.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Error, ErrorKind, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use catalog::FileSystem;
use catalog::fs::{Fault, FsFile};

use super::dice::Dice;
use super::world::{Process, Step};

/// What reaches the disk as a whole.
const SECTOR: usize = 64;

/// A disk and what the kernel holds of it in memory.
#[derive(Debug, Default)]
pub(super) struct Disk {
    files: BTreeMap<u64, File>,
    made: u64,
    folders: BTreeSet<PathBuf>,
    names: BTreeMap<PathBuf, u64>,
    durable: BTreeMap<PathBuf, u64>,
    /// Changes of names that no sync of a folder has made durable, in order.
    changes: Vec<Change>,
    /// Bytes that files may have in all.
    pub room: Option<u64>,
}

#[derive(Debug, Default)]
struct File {
    bytes: Vec<u8>,
    durable: Vec<u8>,
    /// The first so many bytes are what `durable` says, whatever a sync reports: one has failed.
    settled: usize,
}

#[derive(Debug)]
enum Change {
    Name(PathBuf, u64),
    Unname(PathBuf),
    Rename(PathBuf, PathBuf, u64),
}

impl Change {
    fn is_in(&self, dir: &Path) -> bool {
        match self {
            Self::Name(path, _) | Self::Unname(path) | Self::Rename(_, path, _) => path.parent() == Some(dir),
        }
    }

    fn file(&self) -> Option<u64> {
        match self {
            Self::Name(_, file) | Self::Rename(_, _, file) => Some(*file),
            Self::Unname(_) => None,
        }
    }

    fn make(&self, names: &mut BTreeMap<PathBuf, u64>) {
        match self {
            Self::Name(path, file) => {
                names.insert(path.clone(), *file);
            }
            Self::Unname(path) => {
                names.remove(path);
            }
            Self::Rename(from, to, file) => {
                names.remove(from);
                names.insert(to.clone(), *file);
            }
        }
    }
}

impl File {
    /// What power loss leaves of bytes that were not synced.
    fn remains(&self, dice: &Dice) -> Vec<u8> {
        let (seen, sure) = (&self.bytes, &self.durable);
        let same = seen.iter().zip(sure).take_while(|(a, b)| a == b).count();
        match dice.below(4) {
            0 => sure.clone(),
            1 => seen.clone(),
            2 if seen.len() > sure.len() => {
                seen[..sure.len() + dice.below((seen.len() - sure.len()) as u64) as usize].to_vec()
            }
            _ => {
                // The length is there and the bytes are not, or only some are.
                let mut out = seen.clone();
                for at in (same..out.len()).step_by(SECTOR) {
                    let end = (at + SECTOR).min(out.len());
                    match dice.below(3) {
                        0 => {}
                        1 => out[at..end].fill(0),
                        _ => out[at..end].iter_mut().for_each(|b| *b = dice.next() as u8),
                    }
                    for (i, byte) in sure.iter().enumerate().take(end).skip(at) {
                        out[i] = if dice.coin() { *byte } else { out[i] };
                    }
                }
                out
            }
        }
    }

    fn sync(&mut self) {
        let settled = self.settled.min(self.bytes.len());
        self.durable.resize(settled, 0);
        self.durable.extend_from_slice(&self.bytes[settled..]);
    }

    /// A sync that fails: what it was to write is on disk or not, and never will be if it is not.
    fn fail(&mut self, dice: &Dice) {
        self.durable = self.remains(dice);
        if dice.coin() {
            self.bytes.clone_from(&self.durable);
        }
        self.settled = self.bytes.len();
    }

    fn set_len(&mut self, len: usize) {
        self.bytes.resize(len, 0);
        self.settled = self.settled.min(len);
    }
}

impl Disk {
    pub fn lose_power(&mut self, dice: &Dice) {
        for change in std::mem::take(&mut self.changes) {
            if dice.coin() {
                change.make(&mut self.durable);
            }
        }
        self.names.clone_from(&self.durable);
        let named: BTreeSet<u64> = self.names.values().copied().collect();
        self.files.retain(|number, _| named.contains(number));
        for file in self.files.values_mut() {
            file.bytes = file.remains(dice);
            file.durable.clone_from(&file.bytes);
            file.settled = 0;
        }
    }

    /// Bytes of all files.
    pub fn used(&self) -> u64 {
        self.files.values().map(|f| f.bytes.len() as u64).sum()
    }

    /// Names of all files that end so.
    pub fn names(&self, end: &str) -> Vec<PathBuf> {
        self.names.keys().filter(|p| p.to_string_lossy().ends_with(end)).cloned().collect()
    }

    fn number(&self, path: &Path) -> Result<u64> {
        self.names.get(path).copied().ok_or_else(|| ErrorKind::NotFound.into())
    }

    fn file(&mut self, number: u64) -> Result<&mut File> {
        self.files.get_mut(&number).ok_or_else(|| ErrorKind::NotFound.into())
    }

    fn change(&mut self, change: Change) {
        change.make(&mut self.names);
        self.changes.push(change);
        // A file that no name can come back to is gone; nothing here keeps one open that it has deleted.
        let pending = self.changes.iter().filter_map(Change::file);
        let live: BTreeSet<u64> = self.names.values().chain(self.durable.values()).copied().chain(pending).collect();
        self.files.retain(|number, _| live.contains(number));
    }

    fn sync_dir(&mut self, dir: &Path) {
        let (made, left): (Vec<_>, Vec<_>) = std::mem::take(&mut self.changes).into_iter().partition(|c| c.is_in(dir));
        made.iter().for_each(|c| c.make(&mut self.durable));
        self.changes = left;
    }

    /// How many of `len` bytes at `at` there is room for.
    fn fits(&self, number: u64, at: usize, len: usize) -> usize {
        let present = self.files.get(&number).map_or(0, |f| f.bytes.len());
        let grows = (at + len).saturating_sub(present) as u64;
        len - grows.saturating_sub(self.free()).min(len as u64) as usize
    }

    fn free(&self) -> u64 {
        self.room.map_or(u64::MAX, |room| room.saturating_sub(self.used()))
    }
}

fn error(fault: Fault) -> Error {
    match fault {
        Fault::Full | Fault::Short => ErrorKind::StorageFull.into(),
        Fault::Io | Fault::Sync => Error::other("input or output error"),
    }
}

/// A machine's file system as one process sees it.
#[derive(Debug, Clone)]
pub(super) struct SimFs(pub Arc<Process>);

#[derive(Debug)]
struct SimFile {
    fs: SimFs,
    path: PathBuf,
    number: u64,
}

impl SimFs {
    /// Makes a call, which may fail in these ways. `work` does what the fault leaves of it.
    fn call<T>(
        &self,
        what: &str,
        path: &Path,
        detail: u64,
        faults: &[(Fault, &'static str)],
        work: impl FnOnce(&mut Disk, &Dice, Option<Fault>) -> Result<T>,
    ) -> Result<T> {
        let process = &self.0;
        let step = process.step();
        if step == Step::Never {
            return Err(Error::other("the process is dead"));
        }
        let world = &process.world;
        let fails = !faults.is_empty() && world.dice.permille(world.fs_faults.load(Ordering::Relaxed).into());
        let fault = fails.then(|| world.dice.pick(faults));
        if let Some((_, name)) = fault {
            world.trace.count(name);
        }
        let result = work(&mut process.machine.disk.lock(), &world.dice, fault.map(|f| f.0));
        let on = path.strip_prefix(&process.machine.dir).unwrap_or(path).to_string_lossy();
        let ended = result.as_ref().err().map_or("ok".to_owned(), |e| format!("{:?}", e.kind()));
        world.trace.call(&process.name, what, &on, detail, &ended);
        if let Step::GoAndDie(death) = step {
            process.die(death);
            return Err(Error::other("the process is dead"));
        }
        result
    }
}

const IO: (Fault, &str) = (Fault::Io, "fault: disk i/o error");
const FULL: (Fault, &str) = (Fault::Full, "fault: disk full");
const SHORT: (Fault, &str) = (Fault::Short, "fault: short write");
const SYNC: (Fault, &str) = (Fault::Sync, "fault: failed sync");

/// What a call without parts does: nothing when it fails.
fn whole<T>(fault: Option<Fault>, work: impl FnOnce() -> Result<T>) -> Result<T> {
    fault.map_or_else(work, |fault| Err(error(fault)))
}

impl FileSystem for SimFs {
    fn create_dir_all(&self, dir: &Path) -> Result<()> {
        self.call("mkdir", dir, 0, &[IO, FULL], |disk, _, fault| {
            whole(fault, || {
                disk.folders.extend(dir.ancestors().map(Path::to_owned));
                Ok(())
            })
        })
    }

    fn create(&self, path: &Path) -> Result<Box<dyn FsFile>> {
        let number = self.call("create", path, 0, &[IO, FULL], |disk, dice, fault| {
            if disk.names.contains_key(path) {
                return Err(ErrorKind::AlreadyExists.into());
            }
            if fault == Some(Fault::Full) || fault.is_some() && dice.coin() {
                return Err(fault.map_or_else(|| ErrorKind::Other.into(), error));
            }
            disk.made += 1;
            let number = disk.made;
            disk.files.insert(number, File::default());
            disk.change(Change::Name(path.to_owned(), number));
            // An error after the name was made is one too.
            fault.map_or(Ok(number), |fault| Err(error(fault)))
        })?;
        Ok(Box::new(SimFile { fs: self.clone(), path: path.to_owned(), number }))
    }

    fn open(&self, path: &Path) -> Result<Box<dyn FsFile>> {
        let number = self.call("open", path, 0, &[IO], |disk, _, fault| whole(fault, || disk.number(path)))?;
        Ok(Box::new(SimFile { fs: self.clone(), path: path.to_owned(), number }))
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>> {
        self.call("read", path, 0, &[IO], |disk, _, fault| {
            whole(fault, || {
                let number = disk.number(path)?;
                Ok(disk.file(number)?.bytes.clone())
            })
        })
    }

    fn len(&self, path: &Path) -> Result<u64> {
        self.call("len", path, 0, &[], |disk, _, fault| {
            whole(fault, || {
                let number = disk.number(path)?;
                Ok(disk.file(number)?.bytes.len() as u64)
            })
        })
    }

    fn list(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        self.call("ls", dir, 0, &[IO], |disk, _, fault| {
            whole(fault, || {
                if !disk.folders.contains(dir) {
                    return Err(ErrorKind::NotFound.into());
                }
                Ok(disk.names.keys().filter(|p| p.parent() == Some(dir)).cloned().collect())
            })
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.call("rename", to, 0, &[IO, FULL], |disk, _, fault| {
            whole(fault, || {
                let number = disk.number(from)?;
                disk.change(Change::Rename(from.to_owned(), to.to_owned(), number));
                Ok(())
            })
        })
    }

    fn hard_link(&self, from: &Path, to: &Path) -> Result<()> {
        self.call("link", to, 0, &[IO, FULL], |disk, _, fault| {
            whole(fault, || {
                let number = disk.number(from)?;
                if disk.names.contains_key(to) {
                    return Err(ErrorKind::AlreadyExists.into());
                }
                disk.change(Change::Name(to.to_owned(), number));
                Ok(())
            })
        })
    }

    fn remove(&self, path: &Path) -> Result<()> {
        self.call("rm", path, 0, &[IO], |disk, dice, fault| {
            disk.number(path)?;
            // It may fail after it was done.
            if fault.is_none() || dice.coin() {
                disk.change(Change::Unname(path.to_owned()));
            }
            fault.map_or(Ok(()), |fault| Err(error(fault)))
        })
    }

    fn sync_dir(&self, dir: &Path) -> Result<()> {
        self.call("syncdir", dir, 0, &[IO], |disk, _, fault| {
            whole(fault, || {
                disk.sync_dir(dir);
                Ok(())
            })
        })
    }

    fn available(&self, _dir: &Path) -> Result<u64> {
        Ok(self.0.machine.disk.lock().free())
    }
}

impl FsFile for SimFile {
    fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        let end = self.fs.0.machine.disk.lock().files.get(&self.number).map_or(0, |f| f.bytes.len());
        self.write_all_at(bytes, end as u64)
    }

    fn write_all_at(&mut self, bytes: &[u8], at: u64) -> Result<()> {
        let crc = crc32fast::hash(bytes).into();
        self.fs.call("write", &self.path, crc, &[IO, FULL, SHORT], |disk, dice, fault| {
            let at = at as usize;
            let fits = disk.fits(self.number, at, bytes.len());
            let len = match fault {
                None => fits,
                Some(Fault::Short) => dice.below(bytes.len() as u64) as usize,
                Some(_) => 0,
            };
            let file = disk.file(self.number)?;
            if file.bytes.len() < at + len {
                file.bytes.resize(at + len, 0);
            }
            file.bytes[at..at + len].copy_from_slice(&bytes[..len]);
            file.settled = file.settled.min(at);
            match fault {
                Some(fault) => Err(error(fault)),
                None if len < bytes.len() => Err(ErrorKind::StorageFull.into()),
                None => Ok(()),
            }
        })
    }

    fn sync(&mut self) -> Result<()> {
        self.fs.call("sync", &self.path, 0, &[SYNC], |disk, dice, fault| {
            let file = disk.file(self.number)?;
            match fault {
                None => file.sync(),
                Some(_) => file.fail(dice),
            }
            fault.map_or(Ok(()), |fault| Err(error(fault)))
        })
    }

    fn set_len(&mut self, len: u64) -> Result<()> {
        self.fs.call("cut", &self.path, len, &[IO], |disk, _, fault| {
            whole(fault, || {
                disk.file(self.number)?.set_len(len as usize);
                Ok(())
            })
        })
    }

    fn allocate(&mut self, len: u64) -> Result<()> {
        self.fs.call("allocate", &self.path, len, &[IO, FULL], |disk, _, fault| {
            let present = disk.file(self.number)?.bytes.len();
            let grows = (len as usize).saturating_sub(present);
            if disk.fits(self.number, present, grows) < grows {
                return Err(ErrorKind::StorageFull.into());
            }
            whole(fault, || {
                let file = disk.file(self.number)?;
                file.set_len(present.max(len as usize));
                Ok(())
            })
        })
    }
}
