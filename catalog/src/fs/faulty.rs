//! A file system that fails on demand.
//!
//! Every call that writes is counted, noted and may be made to fail: one call by its number, all calls for a while, or
//! whatever would take more room than there is. Calls that read never fail here.

use std::collections::{BTreeMap, HashMap};
use std::io::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::io::Errno;

use super::{FileSystem, FsFile};

/// How a call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// No space left on the device; nothing was done.
    Full,
    /// An input or output error; nothing was done.
    Io,
    /// Half of the bytes are written, then the disk is full. Calls that write no bytes fail as [`Fault::Full`].
    Short,
    /// The sync fails and what was written since the last one is gone. Other calls fail as [`Fault::Io`].
    Sync,
}

/// A call that writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Name of the method.
    pub what: &'static str,
    /// The file or folder; of two, the one that gets a name.
    pub path: PathBuf,
}

/// What goes wrong, and what was called: shared between a [`Faulty`] and whoever steers it. Calls count from 0.
#[derive(Debug, Clone, Default)]
pub struct Faults(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    calls: Vec<Call>,
    at: BTreeMap<usize, Fault>,
    always: Option<Fault>,
    room: Option<u64>,
    /// Files by their names; two names of one file share a number.
    names: HashMap<PathBuf, u64>,
    /// Length and synced length of each file.
    files: HashMap<u64, (u64, u64)>,
    created: u64,
}

impl Faults {
    /// Makes the call with this number fail.
    pub fn at(&self, call: usize, fault: Fault) {
        self.0.lock().at.insert(call, fault);
    }

    /// Makes every call from now on fail.
    pub fn always(&self, fault: Fault) {
        self.0.lock().always = Some(fault);
    }

    /// Lets all calls succeed, as far as there is room.
    pub fn clear(&self) {
        let mut state = self.0.lock();
        state.at.clear();
        state.always = None;
    }

    /// Limits the bytes of all files that were created here: what would need more fails with [`Fault::Short`].
    pub fn room(&self, bytes: Option<u64>) {
        self.0.lock().room = bytes;
    }

    /// Bytes of all files that were created here.
    pub fn used(&self) -> u64 {
        self.0.lock().used()
    }

    /// Calls so far, failed ones included.
    pub fn calls(&self) -> Vec<Call> {
        self.0.lock().calls.clone()
    }

    /// Notes a call and tells how it is to fail. `grow` is the length that the file with this number would have.
    fn call(&self, what: &'static str, path: &Path, grow: Option<(u64, u64)>) -> Option<Fault> {
        let mut state = self.0.lock();
        let number = state.calls.len();
        state.calls.push(Call { what, path: path.to_owned() });
        if let Some(fault) = state.at.get(&number).copied().or(state.always) {
            return Some(fault);
        }
        let (file, len) = grow?;
        let present = state.files.get(&file).map_or(0, |f| f.0);
        let full = state.room.is_some_and(|room| len > present && state.used() + (len - present) > room);
        full.then_some(Fault::Short)
    }

    fn check(&self, what: &'static str, path: &Path) -> Result<()> {
        self.call(what, path, None).map_or(Ok(()), |fault| Err(error(fault)))
    }
}

impl State {
    fn used(&self) -> u64 {
        self.files.values().map(|f| f.0).sum()
    }

    fn unname(&mut self, path: &Path) {
        if let Some(file) = self.names.remove(path)
            && !self.names.values().any(|other| *other == file)
        {
            self.files.remove(&file);
        }
    }
}

fn error(fault: Fault) -> Error {
    Error::from(match fault {
        Fault::Full | Fault::Short => Errno::NOSPC,
        Fault::Io | Fault::Sync => Errno::IO,
    })
}

/// A file system that does what another one does, unless [`Faults`] say otherwise.
#[derive(Debug)]
pub struct Faulty {
    inner: Arc<dyn FileSystem>,
    faults: Faults,
}

impl Faulty {
    /// Wraps a file system.
    pub fn new(inner: Arc<dyn FileSystem>, faults: Faults) -> Self {
        Self { inner, faults }
    }

    fn file(&self, path: &Path, inner: Box<dyn FsFile>, len: u64) -> Box<dyn FsFile> {
        let mut state = self.faults.0.lock();
        let number = match state.names.get(path) {
            Some(number) => *number,
            None => {
                state.created += 1;
                let number = state.created;
                state.names.insert(path.to_owned(), number);
                state.files.insert(number, (len, len));
                number
            }
        };
        Box::new(FaultyFile { inner, faults: self.faults.clone(), path: path.to_owned(), number })
    }
}

impl FileSystem for Faulty {
    fn create_dir_all(&self, dir: &Path) -> Result<()> {
        self.faults.check("create_dir_all", dir)?;
        self.inner.create_dir_all(dir)
    }

    fn create(&self, path: &Path) -> Result<Box<dyn FsFile>> {
        self.faults.check("create", path)?;
        Ok(self.file(path, self.inner.create(path)?, 0))
    }

    fn open(&self, path: &Path) -> Result<Box<dyn FsFile>> {
        self.faults.check("open", path)?;
        Ok(self.file(path, self.inner.open(path)?, self.inner.len(path)?))
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>> {
        self.inner.read(path)
    }

    fn read_start(&self, path: &Path, len: usize) -> Result<Vec<u8>> {
        self.inner.read_start(path, len)
    }

    fn len(&self, path: &Path) -> Result<u64> {
        self.inner.len(path)
    }

    fn list(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        self.inner.list(dir)
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.faults.check("rename", to)?;
        self.inner.rename(from, to)?;
        let mut state = self.faults.0.lock();
        if let Some(number) = state.names.remove(from) {
            state.unname(to);
            state.names.insert(to.to_owned(), number);
        }
        Ok(())
    }

    fn hard_link(&self, from: &Path, to: &Path) -> Result<()> {
        self.faults.check("hard_link", to)?;
        self.inner.hard_link(from, to)?;
        let mut state = self.faults.0.lock();
        if let Some(number) = state.names.get(from).copied() {
            state.names.insert(to.to_owned(), number);
        }
        Ok(())
    }

    fn remove(&self, path: &Path) -> Result<()> {
        self.faults.check("remove", path)?;
        self.inner.remove(path)?;
        self.faults.0.lock().unname(path);
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> Result<()> {
        self.faults.check("sync_dir", dir)?;
        self.inner.sync_dir(dir)
    }

    fn available(&self, dir: &Path) -> Result<u64> {
        let state = self.faults.0.lock();
        match state.room {
            Some(room) => Ok(room.saturating_sub(state.used())),
            None => self.inner.available(dir),
        }
    }
}

#[derive(Debug)]
struct FaultyFile {
    inner: Box<dyn FsFile>,
    faults: Faults,
    path: PathBuf,
    number: u64,
}

impl FaultyFile {
    /// Length and synced length.
    fn lens(&self) -> (u64, u64) {
        self.faults.0.lock().files.get(&self.number).copied().unwrap_or_default()
    }

    fn set(&self, change: impl FnOnce(&mut (u64, u64))) {
        // A file whose last name is gone takes room no more, which is not quite so while it is open.
        if let Some(lens) = self.faults.0.lock().files.get_mut(&self.number) {
            change(lens);
        }
    }

    fn write(&mut self, what: &'static str, bytes: &[u8], at: u64) -> Result<()> {
        let end = at + bytes.len() as u64;
        let (written, fault) = match self.faults.call(what, &self.path, Some((self.number, end))) {
            None => (bytes, None),
            Some(Fault::Short) => (&bytes[..bytes.len() / 2], Some(Fault::Short)),
            Some(fault) => return Err(error(fault)),
        };
        self.inner.write_all_at(written, at)?;
        self.set(|lens| lens.0 = lens.0.max(at + written.len() as u64));
        fault.map_or(Ok(()), |fault| Err(error(fault)))
    }
}

impl FsFile for FaultyFile {
    fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        let end = self.lens().0;
        self.write("write_all", bytes, end)
    }

    fn write_all_at(&mut self, bytes: &[u8], at: u64) -> Result<()> {
        self.write("write_all_at", bytes, at)
    }

    fn sync(&mut self) -> Result<()> {
        if let Some(fault) = self.faults.call("sync", &self.path, None) {
            if fault == Fault::Sync {
                let (_, synced) = self.lens();
                self.inner.set_len(synced)?;
                self.set(|lens| lens.0 = synced);
            }
            return Err(error(fault));
        }
        self.inner.sync()?;
        self.set(|lens| lens.1 = lens.0);
        Ok(())
    }

    fn set_len(&mut self, len: u64) -> Result<()> {
        if let Some(fault) = self.faults.call("set_len", &self.path, Some((self.number, len))) {
            return Err(error(fault));
        }
        self.inner.set_len(len)?;
        self.set(|lens| *lens = (len, lens.1.min(len)));
        Ok(())
    }

    fn allocate(&mut self, len: u64) -> Result<()> {
        if let Some(fault) = self.faults.call("allocate", &self.path, Some((self.number, len))) {
            return Err(error(fault));
        }
        self.inner.allocate(len)?;
        self.set(|lens| lens.0 = lens.0.max(len));
        Ok(())
    }
}
