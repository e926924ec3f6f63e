//! The file system as an injected component: the one way to write in the data folder.
//!
//! [`Disk`] is the machine's, [`Faulty`] wraps any and fails on demand. The interface offers what crash safety needs and
//! no more: files that are written at their end or at an offset, a sync that says when bytes are durable, names that
//! are durable once their folder was synced. There is no memory map: a full disk would end the process then.
//!
//! All calls block. Always: whatever was not synced may be gone after a power loss, in any part; a file whose sync
//! failed may have lost what was written since the last one, even when a later sync succeeds.

mod faulty;

use std::fmt::Debug;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Result};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;

pub use faulty::{Call, Fault, Faults, Faulty};

/// A file system. Paths are those of the machine.
pub trait FileSystem: Send + Sync + Debug {
    /// Makes a folder and its parents where they are missing; its name is durable when this returns, also where it was
    /// there.
    fn create_dir_all(&self, dir: &Path) -> Result<()>;

    /// Creates a file for writing; `AlreadyExists` when the name is taken. The name is durable after
    /// [`FileSystem::sync_dir`].
    fn create(&self, path: &Path) -> Result<Box<dyn FsFile>>;

    /// Opens a file for writing behind its end.
    fn open(&self, path: &Path) -> Result<Box<dyn FsFile>>;

    /// All bytes of a file.
    fn read(&self, path: &Path) -> Result<Vec<u8>>;

    /// The first `len` bytes of a file, or all when it is shorter.
    fn read_start(&self, path: &Path, len: usize) -> Result<Vec<u8>> {
        let mut bytes = self.read(path)?;
        bytes.truncate(len);
        Ok(bytes)
    }

    /// Length of a file in bytes.
    fn len(&self, path: &Path) -> Result<u64>;

    /// Paths of the files in a folder, sorted, without folders.
    fn list(&self, dir: &Path) -> Result<Vec<PathBuf>>;

    /// Gives a file another name, in place of any file that has it.
    fn rename(&self, from: &Path, to: &Path) -> Result<()>;

    /// Gives a file a second name; `AlreadyExists` when that is taken.
    fn hard_link(&self, from: &Path, to: &Path) -> Result<()>;

    /// Removes a file's name, and the file with its last one.
    fn remove(&self, path: &Path) -> Result<()>;

    /// Makes the names in a folder durable.
    fn sync_dir(&self, dir: &Path) -> Result<()>;

    /// How many bytes may still be written to the disk that a folder is on.
    fn available(&self, dir: &Path) -> Result<u64>;
}

/// A file that is open for writing.
pub trait FsFile: Send + Debug {
    /// Appends. After an error some of the bytes may be there.
    fn write_all(&mut self, bytes: &[u8]) -> Result<()>;

    /// Writes at an offset. After an error some of the bytes may be there.
    fn write_all_at(&mut self, bytes: &[u8], at: u64) -> Result<()>;

    /// Makes the file's bytes and length durable, not its name.
    fn sync(&mut self) -> Result<()>;

    /// Cuts the file, or extends it with zeros.
    fn set_len(&mut self, len: u64) -> Result<()>;

    /// Sets aside room for the first `len` bytes and makes the file that long.
    fn allocate(&mut self, len: u64) -> Result<()>;
}

/// The machine's file system.
#[derive(Debug, Default, Clone, Copy)]
pub struct Disk;

#[derive(Debug)]
struct DiskFile {
    file: File,
    /// Where the next append goes. Not `O_APPEND`, under which Linux ignores the offset of any write.
    end: u64,
}

impl FileSystem for Disk {
    fn create_dir_all(&self, dir: &Path) -> Result<()> {
        create_dirs(dir, &mut |parent| self.sync_dir(parent))
    }

    fn create(&self, path: &Path) -> Result<Box<dyn FsFile>> {
        let file = File::options().write(true).create_new(true).open(path)?;
        Ok(Box::new(DiskFile { file, end: 0 }))
    }

    fn open(&self, path: &Path) -> Result<Box<dyn FsFile>> {
        let file = File::options().write(true).open(path)?;
        let end = file.metadata()?.len();
        Ok(Box::new(DiskFile { file, end }))
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>> {
        fs::read(path)
    }

    fn read_start(&self, path: &Path, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![];
        File::open(path)?.take(len as u64).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn len(&self, path: &Path) -> Result<u64> {
        Ok(fs::metadata(path)?.len())
    }

    fn list(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        let mut out = vec![];
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if !entry.file_type()?.is_dir() {
                out.push(entry.path());
            }
        }
        out.sort();
        Ok(out)
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        fs::rename(from, to)
    }

    fn hard_link(&self, from: &Path, to: &Path) -> Result<()> {
        fs::hard_link(from, to)
    }

    fn remove(&self, path: &Path) -> Result<()> {
        fs::remove_file(path)
    }

    fn sync_dir(&self, dir: &Path) -> Result<()> {
        File::open(dir)?.sync_all()
    }

    fn available(&self, dir: &Path) -> Result<u64> {
        let stat = rustix::fs::statvfs(dir)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

/// Makes a folder and what is missing above it. A folder is made only once the name of the one above it is durable, so of
/// folders that are there only the last one's name may not be: whoever made it may have been stopped, or its sync failed.
fn create_dirs(dir: &Path, sync: &mut dyn FnMut(&Path) -> Result<()>) -> Result<()> {
    let parent = dir.parent().filter(|p| !p.as_os_str().is_empty());
    let there = dir.is_dir();
    if !there {
        if let Some(parent) = parent {
            create_dirs(parent, sync)?;
        }
        match fs::create_dir(dir) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
    }
    match sync(parent.unwrap_or(Path::new("."))) {
        // A mount point, or a folder that an administrator made in one that is not ours.
        Err(e) if there && is_foreign(e.kind()) => Ok(()),
        result => result,
    }
}

fn is_foreign(kind: ErrorKind) -> bool {
    use ErrorKind::{InvalidInput, PermissionDenied, ReadOnlyFilesystem, Unsupported};
    matches!(kind, PermissionDenied | ReadOnlyFilesystem | InvalidInput | Unsupported)
}

impl FsFile for DiskFile {
    fn write_all(&mut self, bytes: &[u8]) -> Result<()> {
        self.write_all_at(bytes, self.end)
    }

    fn write_all_at(&mut self, bytes: &[u8], at: u64) -> Result<()> {
        self.file.write_all_at(bytes, at)?;
        self.end = self.end.max(at + bytes.len() as u64);
        Ok(())
    }

    fn sync(&mut self) -> Result<()> {
        self.file.sync_data()
    }

    fn set_len(&mut self, len: u64) -> Result<()> {
        self.file.set_len(len)?;
        self.end = len;
        Ok(())
    }

    fn allocate(&mut self, len: u64) -> Result<()> {
        rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, len)?;
        self.end = self.end.max(len);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
