//! Where results of queries may be exported to: folders and object stores that the settings name, and nowhere else.
//!
//! A name is judged as text first, part by part. The folder of a file is then resolved and opened step by step without
//! following links, and everything after that is done within the opened folder, so that what was judged is what is
//! written to, whoever renames things meanwhile.
//!
//! Always: what has the name of an export is whole. A file is written under a temporary name beside it, synced and
//! renamed; an object is one put, or an upload of parts that is completed at the end. What a crash leaves behind is a file
//! that begins with [`TEMPORARY`], or an upload that the store's own rules remove.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Component, Path as FsPath, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStore, ObjectStoreExt};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, fchmod, fsync, openat, renameat, statat, unlinkat};
use rustix::io::Errno;
use tokio::task::JoinSet;

use super::{Location, PART_BYTES};
use crate::{Entropy, Error, ErrorKind, Result};

/// What the names of files begin with that are not whole.
pub const TEMPORARY: &str = ".thalweg-export-";

/// The longest name, in bytes: what a path may have.
const NAME_BYTES_MAX: usize = 4096;
/// Bytes after which a file is written to.
const FILE_PART_BYTES: usize = 1 << 20;
/// Parts of an object under way at a time.
const OBJECT_PARTS_AT_ONCE: usize = 2;
/// Most parts of an object: what S3 takes.
const OBJECT_PARTS_MAX: usize = 10_000;

/// Where may be exported to.
#[derive(Debug, Default)]
pub struct Exports(Vec<Allowed>);

#[derive(Debug)]
enum Allowed {
    /// Absolute and without `.` and `..`.
    Folder(PathBuf),
    /// An URL with a slash at its end, and what stores below it.
    Store(String, Arc<dyn ObjectStore>),
}

impl Allowed {
    fn open(text: &str) -> Result<Self> {
        match Location::parse(text)? {
            Location::Memory => Err(Error::invalid("what is in memory only can't be exported to")),
            Location::Cloud(place) => Ok(Self::Store(place.location(), place.open()?)),
            Location::Folder(folder) => {
                let (rooted, parts) = split(&folder.to_string_lossy());
                if !rooted || parts.contains(&"..".to_owned()) {
                    return Err(Error::invalid("a folder is given as an absolute path without \"..\""));
                }
                Ok(Self::Folder(FsPath::new("/").join(parts.join("/"))))
            }
        }
    }

    fn shown(&self) -> String {
        match self {
            Self::Folder(folder) => format!("{}/", folder.display().to_string().trim_end_matches('/')),
            Self::Store(url, _) => url.clone(),
        }
    }
}

impl Exports {
    /// Makes ready to export below these locations: absolute folders, or URLs as [`super::open`] takes them. Nothing is asked
    /// of them yet.
    ///
    /// # Errors
    /// `Invalid` for a location that means nothing, which the message names.
    pub fn open<S: AsRef<str>>(locations: &[S]) -> Result<Self> {
        let opened = locations.iter().map(AsRef::as_ref).map(|text| {
            // Options are not shown.
            let shown = text.split('?').next().unwrap_or_default();
            Allowed::open(text).map_err(|e| e.context(format_args!("export location {shown:?}")))
        });
        opened.collect::<Result<_>>().map(Self)
    }

    /// The locations, without options and with a slash at their ends.
    pub fn shown(&self) -> Vec<String> {
        self.0.iter().map(Allowed::shown).collect()
    }

    /// The first location that holds what is at a path or URL, or lies within that.
    ///
    /// # Errors
    /// As [`super::location`].
    pub fn overlapping(&self, url_or_path: &str) -> Result<Option<String>> {
        let real = |location: String| match FsPath::new(&location).canonicalize() {
            Ok(path) => format!("{}/", path.display().to_string().trim_end_matches('/')),
            Err(_) => location,
        };
        let other = real(super::location(url_or_path)?);
        Ok(self.shown().into_iter().find(|own| {
            let real = real(own.clone());
            real.starts_with(&other) || other.starts_with(&real)
        }))
    }

    /// What a name means; `None` when it is not below any location. Looks at nothing but the text.
    ///
    /// # Errors
    /// `Invalid` for a name that can't be one of a file or an object.
    pub fn target(&self, name: &str) -> Result<Option<Target>> {
        let wrong = |why: &str| Err(Error::invalid(format!("{name:?} is no name to export to: {why}")));
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return wrong("it is empty or has more than 4096 bytes");
        }
        if name.chars().any(char::is_control) {
            return wrong("it has a control character");
        }
        let path = match name.split_once("://") {
            None => Some(name),
            Some(("file", path)) => Some(path),
            Some(_) => None,
        };
        let Some(path) = path else {
            if name.contains(['?', '#']) {
                return wrong("options belong to the location in the settings, and \"?\" and \"#\" in no name");
            }
            let key = name.split_once("://").and_then(|(_, rest)| rest.split_once('/')).map_or("", |(_, key)| key);
            if key.split('/').any(|part| ["", ".", ".."].contains(&part)) {
                return wrong("a part of it is empty, \".\" or \"..\"");
            }
            let found = self.0.iter().find_map(|allowed| match allowed {
                Allowed::Store(url, store) => Some((name.strip_prefix(url.as_str())?, store)),
                Allowed::Folder(_) => None,
            });
            let Some((key, store)) = found else { return Ok(None) };
            let path = Path::parse(key).map_err(|e| Error::invalid(e.to_string()))?;
            return Ok(Some(Target { name: name.to_owned(), place: Place::Object(store.clone(), path) }));
        };
        let (rooted, parts) = split(path);
        if !rooted {
            return wrong("relative path not allowed for COPY to file");
        }
        if parts.contains(&"..".to_owned()) {
            return wrong("a part of it is \"..\"");
        }
        if path.ends_with('/') || path.ends_with("/.") {
            return wrong("it names a folder");
        }
        let whole = FsPath::new("/").join(parts.join("/"));
        // The outermost, below which links may lead to others.
        let folders = self.0.iter().filter_map(|allowed| match allowed {
            Allowed::Folder(folder) => Some((folder, whole.strip_prefix(folder).ok()?)),
            Allowed::Store(..) => None,
        });
        let Some((root, below)) = folders.min_by_key(|(folder, _)| folder.components().count()) else {
            return Ok(None);
        };
        let mut folders: Vec<String> = below.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        let Some(file) = folders.pop() else { return wrong("it names a folder") };
        if file.starts_with(TEMPORARY) {
            return wrong("such names are for files that are not whole");
        }
        Ok(Some(Target { name: name.to_owned(), place: Place::File { root: root.clone(), folders, file } }))
    }
}

/// Whether a path is absolute, and its parts without empty ones and `.`.
fn split(path: &str) -> (bool, Vec<String>) {
    let parts = path.split('/').filter(|part| !part.is_empty() && *part != ".");
    (path.starts_with('/'), parts.map(str::to_owned).collect())
}

/// A place below one of the locations.
#[derive(Debug)]
pub struct Target {
    name: String,
    place: Place,
}

#[derive(Debug)]
enum Place {
    File { root: PathBuf, folders: Vec<String>, file: String },
    Object(Arc<dyn ObjectStore>, Path),
}

impl Target {
    /// Begins to write.
    ///
    /// # Errors
    /// With an [`io::Error`] as the source when the folder can't be written to, or the name is that of something else than a
    /// file: `PermissionDenied` when links lead out of the location.
    pub async fn begin(&self, entropy: &dyn Entropy) -> Result<Export> {
        let to = match &self.place {
            Place::Object(store, path) => Sink::Object { store: store.clone(), path: path.clone(), upload: None },
            Place::File { root, folders, file } => {
                let mut random = [0; 8];
                entropy.fill(&mut random)?;
                let temporary = format!("{TEMPORARY}{:016x}", u64::from_le_bytes(random));
                let (root, folders, file) = (root.clone(), folders.clone(), file.clone());
                let staged = blocking(move || Staged::create(&root, &folders, file, temporary)).await;
                Sink::File(Arc::new(staged.map_err(|e| failed(&self.name, e))?))
            }
        };
        Ok(Export { name: self.name.clone(), to, buffer: Vec::new(), sending: JoinSet::new(), under_way: 0, parts: 0 })
    }
}

fn failed(name: &str, e: io::Error) -> Error {
    Error::new(ErrorKind::Unavailable, format!("could not write {name:?}")).with_source(e)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// A file under its temporary name, which goes when it is dropped.
#[derive(Debug)]
struct Staged {
    folder: OwnedFd,
    file: File,
    temporary: String,
    name: String,
}

impl Staged {
    fn create(root: &FsPath, folders: &[String], name: String, temporary: String) -> io::Result<Self> {
        let folder = open_folder(root, folders)?;
        // What is there keeps its permissions when it is replaced.
        let mode = match statat(&folder, name.as_str(), AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => None,
            Err(e) => return Err(e.into()),
            Ok(found) => match FileType::from_raw_mode(found.st_mode) {
                FileType::RegularFile => Some(Mode::from_raw_mode(found.st_mode & 0o777)),
                FileType::Directory => return Err(io::ErrorKind::IsADirectory.into()),
                FileType::Symlink => return Err(denied("it is a symbolic link")),
                _ => return Err(denied("it is something else than a file")),
            },
        };
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&folder, temporary.as_str(), flags, Mode::from_raw_mode(0o644))?;
        let staged = Self { folder, file: File::from(file), temporary, name };
        if let Some(mode) = mode {
            fchmod(&staged.file, mode)?;
        }
        Ok(staged)
    }

    fn put_in_place(&self) -> io::Result<()> {
        renameat(&self.folder, self.temporary.as_str(), &self.folder, self.name.as_str())?;
        Ok(fsync(&self.folder)?)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // Renamed away when all went well.
        let _ = unlinkat(&self.folder, self.temporary.as_str(), AtFlags::empty());
    }
}

fn denied(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, why)
}

/// Opens a folder below `root`, to which links may lead as long as they stay there.
fn open_folder(root: &FsPath, folders: &[String]) -> io::Result<OwnedFd> {
    let root = root.canonicalize()?;
    let folder = folders.iter().fold(root.clone(), |path, part| path.join(part)).canonicalize()?;
    let below = folder.strip_prefix(&root).map_err(|_| denied("a symbolic link leads out of the location"))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut opened = openat(CWD, &root, flags, Mode::empty())?;
    for part in below.components() {
        let Component::Normal(part) = part else { return Err(denied("it leads out of the location")) };
        opened = openat(&opened, part, flags, Mode::empty())?;
    }
    Ok(opened)
}

/// An export that is being written. One that is not completed must be aborted: a file alone goes by itself.
#[derive(Debug)]
pub struct Export {
    name: String,
    to: Sink,
    /// What is not sent yet.
    buffer: Vec<u8>,
    sending: JoinSet<Result<usize>>,
    /// Bytes that are being sent.
    under_way: usize,
    parts: usize,
}

#[derive(Debug)]
enum Sink {
    File(Arc<Staged>),
    /// One put as long as there is no upload.
    Object {
        store: Arc<dyn ObjectStore>,
        path: Path,
        upload: Option<Box<dyn MultipartUpload>>,
    },
}

impl Export {
    /// Adds bytes; they are sent by [`Export::send`].
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Bytes that are held in memory.
    pub fn held(&self) -> usize {
        self.buffer.capacity() + self.under_way
    }

    /// Sends what makes whole parts, and waits while too many are under way.
    ///
    /// # Errors
    /// Of the store or the file system.
    pub async fn send(&mut self) -> Result<()> {
        match self.to {
            Sink::File(_) if self.buffer.len() < FILE_PART_BYTES => Ok(()),
            Sink::File(_) => self.send_rest().await,
            Sink::Object { .. } if self.buffer.len() < PART_BYTES => Ok(()),
            Sink::Object { .. } => {
                let mut bytes = Bytes::from(std::mem::take(&mut self.buffer));
                // All of one size, which some stores ask for.
                while bytes.len() >= PART_BYTES {
                    self.send_part(bytes.split_to(PART_BYTES), OBJECT_PARTS_AT_ONCE).await?;
                }
                self.buffer = bytes.to_vec();
                Ok(())
            }
        }
    }

    /// Sends the rest; only [`Export::complete`] is left to do then.
    ///
    /// # Errors
    /// Those of [`Export::send`].
    pub async fn finish(&mut self) -> Result<()> {
        self.send().await?;
        if !self.buffer.is_empty() && !matches!(self.to, Sink::Object { upload: None, .. }) {
            self.send_rest().await?;
        }
        self.wait(0).await?;
        if let Sink::File(staged) = &self.to {
            let staged = staged.clone();
            blocking(move || staged.file.sync_all()).await.map_err(|e| failed(&self.name, e))?;
        }
        Ok(())
    }

    /// Gives it its name, in place of what has it.
    ///
    /// # Errors
    /// Of the store or the file system. What had the name is there then, or the export is.
    pub async fn complete(self) -> Result<()> {
        match self.to {
            Sink::File(staged) => blocking(move || staged.put_in_place()).await.map_err(|e| failed(&self.name, e)),
            Sink::Object { upload: Some(mut upload), .. } => {
                let completed = upload.complete().await;
                if completed.is_err() {
                    // What remains of it is for the store's own rules to remove.
                    let _ = upload.abort().await;
                }
                completed.map(drop).map_err(Error::from)
            }
            Sink::Object { store, path, upload: None } => {
                store.put(&path, self.buffer.into()).await.map(drop).map_err(Error::from)
            }
        }
    }

    /// Gives it up. What had the name is still there.
    pub async fn abort(mut self) {
        self.sending.shutdown().await;
        if let Sink::Object { upload: Some(upload), .. } = &mut self.to
            && let Err(error) = upload.abort().await
        {
            tracing::warn!(%error, "parts of an export that was given up are left in the store");
        }
    }

    async fn send_rest(&mut self) -> Result<()> {
        let rest = std::mem::take(&mut self.buffer);
        self.send_part(rest.into(), 1).await
    }

    async fn send_part(&mut self, part: Bytes, at_once: usize) -> Result<()> {
        self.wait(at_once.saturating_sub(1)).await?;
        let length = part.len();
        match &mut self.to {
            Sink::File(staged) => {
                let (staged, name) = (staged.clone(), self.name.clone());
                self.sending.spawn_blocking(move || {
                    (&staged.file).write_all(&part).map(|()| length).map_err(|e| failed(&name, e))
                });
            }
            Sink::Object { store, path, upload } => {
                self.parts += 1;
                if self.parts > OBJECT_PARTS_MAX {
                    let most = OBJECT_PARTS_MAX * (PART_BYTES >> 20);
                    return Err(Error::limit_exceeded(format!("an object of an export has at most {most} MiB")));
                }
                if upload.is_none() {
                    *upload = Some(store.put_multipart(path).await?);
                }
                if let Some(upload) = upload {
                    let part = upload.put_part(part.into());
                    self.sending.spawn(async move { part.await.map(|()| length).map_err(Error::from) });
                }
            }
        }
        self.under_way += length;
        Ok(())
    }

    /// Waits until at most so many parts are under way.
    async fn wait(&mut self, at_most: usize) -> Result<()> {
        while self.sending.len() > at_most {
            let Some(sent) = self.sending.join_next().await else { break };
            let sent = sent.map_err(|e| Error::internal("a part of an export was not sent").with_source(e))?;
            self.under_way -= sent?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
