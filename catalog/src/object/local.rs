//! A local folder as an object store that survives power loss.
//!
//! `object_store`'s own local store neither syncs nor replaces conditionally. Here a put writes a new file in a staging
//! folder, syncs it, renames it into place and syncs the folder (and the parents of folders that it had to make), so
//! that after a crash an object is whole or absent. All of that goes through [`FileSystem`]; reads and listings go to the
//! wrapped store. One process at a time may use a folder: what lies in staging when it is opened was left by a crash and
//! is deleted.
//!
//! Always: an object that a put meets, or that is read, is durable. One in place whose folder could not be synced is
//! synced once more before anybody is told that it is there.

use std::collections::HashSet;
use std::fmt;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::UNIX_EPOCH;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyMode, CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};
use parking_lot::Mutex;

use crate::fs::{FileSystem, FsFile};

/// Folder under the root that holds files not yet in place.
const STAGING: &str = ".staging";

/// An object store in a local folder; see the module's text for what it promises.
#[derive(Debug)]
pub struct LocalStore {
    folder: Arc<Folder>,
}

#[derive(Debug)]
struct Folder {
    fs: Arc<dyn FileSystem>,
    reads: LocalFileSystem,
    root: PathBuf,
    staged: AtomicU64,
    /// Held while an object is put into place, which makes compare-and-replace atomic.
    place: Mutex<()>,
    /// Folders whose names are durable.
    folders: Mutex<HashSet<PathBuf>>,
    /// Objects that may be in place without being durable.
    unsure: Mutex<HashSet<PathBuf>>,
}

impl LocalStore {
    /// Opens the folder, making it if needed.
    ///
    /// # Errors
    /// Of the file system.
    pub fn open(fs: Arc<dyn FileSystem>, root: &FsPath) -> crate::Result<Self> {
        let context = |e: std::io::Error| crate::Error::from(e).context(format_args!("folder {}", root.display()));
        let absolute = std::path::absolute(root).map_err(context)?;
        fs.create_dir_all(&absolute).map_err(context)?;
        let root = absolute.canonicalize().map_err(context)?;
        let staging = root.join(STAGING);
        fs.create_dir_all(&staging).map_err(context)?;
        for left in fs.list(&staging).map_err(context)? {
            fs.remove(&left).map_err(context)?;
        }
        let reads = LocalFileSystem::new_with_prefix(&root)?;
        let folder = Folder {
            fs,
            reads,
            root,
            staged: AtomicU64::new(0),
            place: Mutex::new(()),
            folders: Mutex::default(),
            unsure: Mutex::default(),
        };
        Ok(Self { folder: Arc::new(folder) })
    }
}

impl fmt::Display for LocalStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LocalStore({})", self.folder.root.display())
    }
}

#[async_trait]
impl ObjectStore for LocalStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let (folder, to) = (self.folder.clone(), self.folder.path(location)?);
        blocking(move || {
            let staged = folder.stage()?;
            for bytes in &payload {
                staged.file.lock().write_all(bytes).map_err(|e| failed(&to, e))?;
            }
            staged.place(&to, &options.mode)
        })
        .await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        _options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let (folder, to) = (self.folder.clone(), self.folder.path(location)?);
        let staged = blocking(move || folder.stage()).await?;
        Ok(Box::new(Upload { staged: Some(Arc::new(staged)), to, written: 0 }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.folder.clone().make_sure(location).await?;
        self.folder.reads.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.folder.clone().make_sure(location).await?;
        self.folder.reads.get_ranges(location, ranges).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let folder = self.folder.clone();
        locations
            .map(move |location| (folder.clone(), location))
            .then(|(folder, location)| async move {
                let location = location?;
                blocking(move || {
                    let path = folder.path(&location)?;
                    folder.fs.remove(&path).and_then(|()| folder.sync_parent(&path)).map_err(|e| failed(&path, e))?;
                    folder.unsure.lock().remove(&path);
                    Ok(location)
                })
                .await
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        visible(self.folder.reads.list(prefix))
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        visible(self.folder.reads.list_with_offset(prefix, offset))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let mut list = self.folder.reads.list_with_delimiter(prefix).await?;
        list.common_prefixes.retain(|p| !is_staging(p));
        list.objects.retain(|o| !is_staging(&o.location));
        Ok(list)
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.folder.clone().make_sure(from).await?;
        let (folder, from, to) = (self.folder.clone(), self.folder.path(from)?, self.folder.path(to)?);
        blocking(move || {
            let source = folder.fs.read(&from).map_err(|e| failed(&from, e))?;
            let staged = folder.stage()?;
            staged.file.lock().write_all(&source).map_err(|e| failed(&to, e))?;
            let mode = match options.mode {
                CopyMode::Overwrite => PutMode::Overwrite,
                CopyMode::Create => PutMode::Create,
            };
            staged.place(&to, &mode).map(|_| ())
        })
        .await
    }
}

impl Folder {
    fn path(&self, location: &Path) -> Result<PathBuf> {
        if is_staging(location) {
            return Err(failed(location.as_ref(), std::io::Error::other("the name is reserved")));
        }
        self.reads.path_to_filesystem(location)
    }

    fn stage(self: Arc<Self>) -> Result<Staged> {
        let number = self.staged.fetch_add(1, Ordering::Relaxed);
        // Listings of the wrapped store leave out names that end in `#` and digits.
        let path = self.root.join(STAGING).join(format!("put#{number}"));
        let file = Mutex::new(self.fs.create(&path).map_err(|e| failed(&path, e))?);
        Ok(Staged { folder: self, file, path })
    }

    fn sync_parent(&self, path: &FsPath) -> std::io::Result<()> {
        path.parent().map_or(Ok(()), |parent| self.fs.sync_dir(parent))
    }

    /// Makes the folder of an object, durable.
    fn make_parent(&self, path: &FsPath) -> std::io::Result<()> {
        let Some(parent) = path.parent() else { return Ok(()) };
        if !self.folders.lock().contains(parent) {
            self.fs.create_dir_all(parent)?;
            self.folders.lock().insert(parent.to_owned());
        }
        Ok(())
    }

    /// Makes an object durable that is in place.
    fn settle(&self, path: &FsPath) -> std::io::Result<()> {
        self.make_parent(path)?;
        self.fs.open(path)?.sync()?;
        self.sync_parent(path)?;
        self.unsure.lock().remove(path);
        Ok(())
    }

    /// Makes an object durable, should that not be sure, before it is read.
    async fn make_sure(self: Arc<Self>, location: &Path) -> Result<()> {
        if self.unsure.lock().is_empty() {
            return Ok(());
        }
        let path = self.path(location)?;
        if !self.unsure.lock().contains(&path) {
            return Ok(());
        }
        blocking(move || self.settle(&path).map_err(|e| failed(&path, e))).await
    }
}

/// A file in staging; deleted when dropped, unless it was put into place.
#[derive(Debug)]
struct Staged {
    folder: Arc<Folder>,
    file: Mutex<Box<dyn FsFile>>,
    path: PathBuf,
}

impl Drop for Staged {
    fn drop(&mut self) {
        // Already renamed away when all went well; a leftover is deleted at the next open.
        let _ = self.folder.fs.remove(&self.path);
    }
}

impl Staged {
    fn place(&self, to: &FsPath, mode: &PutMode) -> Result<PutResult> {
        let io = |e| failed(to, e);
        self.file.lock().sync().map_err(io)?;
        self.folder.make_parent(to).map_err(io)?;
        let tag = e_tag(&self.path).map_err(io)?;
        {
            let _place = self.folder.place.lock();
            // From before it can be seen.
            let new = self.folder.unsure.lock().insert(to.to_owned());
            if let Err(e) = self.put_in_place(to, mode) {
                if let Error::AlreadyExists { .. } = e {
                    // Whoever meets it here, perhaps after a put of its own that failed, relies on it from now on.
                    self.folder.settle(to).map_err(io)?;
                } else if new {
                    self.folder.unsure.lock().remove(to);
                }
                return Err(e);
            }
        }
        self.folder.sync_parent(to).map_err(io)?;
        self.folder.unsure.lock().remove(to);
        Ok(PutResult { e_tag: Some(tag), version: None })
    }

    fn put_in_place(&self, to: &FsPath, mode: &PutMode) -> Result<()> {
        let io = |e: std::io::Error| {
            if e.kind() == ErrorKind::NotFound
                && let Some(parent) = to.parent()
            {
                // The folder may have been deleted by hand; the next put makes it again.
                self.folder.folders.lock().remove(parent);
            }
            failed(to, e)
        };
        let fs = &self.folder.fs;
        match mode {
            PutMode::Overwrite => fs.rename(&self.path, to).map_err(io),
            // Unlike a rename, a link never replaces what is there.
            PutMode::Create => fs.hard_link(&self.path, to).map_err(io),
            PutMode::Update(version) => {
                let present = e_tag(to).map_err(io)?;
                if version.e_tag.as_ref() != Some(&present) {
                    return Err(Error::Precondition {
                        path: to.display().to_string(),
                        source: format!("object is at {present}, expected {:?}", version.e_tag).into(),
                    });
                }
                fs.rename(&self.path, to).map_err(io)
            }
        }
    }
}

/// Parts are written to the staged file as they come, each at its offset.
#[derive(Debug)]
struct Upload {
    staged: Option<Arc<Staged>>,
    to: PathBuf,
    written: u64,
}

impl Upload {
    fn ended(&self) -> Error {
        failed(&self.to, std::io::Error::other("the upload has ended"))
    }
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let Some(staged) = self.staged.clone() else {
            return futures::future::ready(Err(self.ended())).boxed();
        };
        let (mut at, to) = (self.written, self.to.clone());
        self.written += data.content_length() as u64;
        blocking(move || {
            for bytes in &data {
                staged.file.lock().write_all_at(bytes, at).map_err(|e| failed(&to, e))?;
                at += bytes.len() as u64;
            }
            Ok(())
        })
        .boxed()
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let staged = self.staged.take().ok_or_else(|| self.ended())?;
        let to = self.to.clone();
        blocking(move || staged.place(&to, &PutMode::Overwrite)).await
    }

    async fn abort(&mut self) -> Result<()> {
        self.staged = None;
        Ok(())
    }
}

fn visible(list: BoxStream<'static, Result<ObjectMeta>>) -> BoxStream<'static, Result<ObjectMeta>> {
    list.filter(|o| futures::future::ready(!o.as_ref().is_ok_and(|o| is_staging(&o.location)))).boxed()
}

fn is_staging(location: &Path) -> bool {
    location.parts().next().is_some_and(|p| p.as_ref() == STAGING)
}

/// The tag that the wrapped store gives: inode, time of change in microseconds, size.
fn e_tag(path: &FsPath) -> std::io::Result<String> {
    let metadata = std::fs::metadata(path)?;
    let changed = metadata.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    Ok(format!("{:x}-{:x}-{:x}", metadata.ino(), changed.as_micros(), metadata.len()))
}

fn failed(path: impl AsRef<FsPath>, source: std::io::Error) -> Error {
    let path = path.as_ref().display().to_string();
    match source.kind() {
        ErrorKind::NotFound => Error::NotFound { path, source: source.into() },
        ErrorKind::AlreadyExists => Error::AlreadyExists { path, source: source.into() },
        _ => Error::Generic { store: "LocalStore", source: format!("{path}: {source}").into() },
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => Err(Error::Generic { store: "LocalStore", source: e.into() }),
    }
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt;
    use object_store::{ObjectStoreExt, UpdateVersion};

    use super::*;
    use crate::fs::{Call, Disk, Fault, Faults, Faulty};

    fn store() -> (tempfile::TempDir, LocalStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = LocalStore::open(Arc::new(Disk), &dir.path().join("a/b")).unwrap();
        (dir, store)
    }

    async fn names(store: &LocalStore) -> Vec<String> {
        let mut names: Vec<_> = store.list(None).map_ok(|o| o.location.to_string()).try_collect().await.unwrap();
        names.sort();
        names
    }

    fn staged(store: &LocalStore) -> usize {
        store.folder.fs.list(&store.folder.root.join(STAGING)).unwrap().len()
    }

    #[tokio::test]
    async fn put_get_list_delete() {
        let (_dir, store) = store();
        let path = Path::from("default/samples/20000/1.parquet");
        let put = store.put(&path, Bytes::from_static(b"hello world").into()).await.unwrap();
        assert_eq!(store.head(&path).await.unwrap().e_tag, put.e_tag, "the tag is that of later reads");
        assert_eq!(store.get(&path).await.unwrap().bytes().await.unwrap(), "hello world");
        assert_eq!(store.get_range(&path, 6..11).await.unwrap(), "world");
        assert_eq!(names(&store).await, [path.to_string()]);
        let list = store.list_with_delimiter(None).await.unwrap();
        assert_eq!((list.common_prefixes, list.objects.len()), (vec![Path::from("default")], 0));
        store.copy(&path, &Path::from("x")).await.unwrap();
        store.rename(&Path::from("x"), &Path::from("y/z")).await.unwrap();
        assert_eq!(names(&store).await, [path.as_ref(), "y/z"]);
        store.delete(&path).await.unwrap();
        assert!(matches!(store.delete(&path).await, Err(Error::NotFound { .. })));
        assert!(matches!(store.get(&path).await, Err(Error::NotFound { .. })));
        assert!(store.put(&Path::from(".staging/x"), Bytes::new().into()).await.is_err());
        assert_eq!(staged(&store), 0);
    }

    #[tokio::test]
    async fn conditional_put() {
        let (_dir, store) = store();
        let path = Path::from("database.json");
        let put = |text: &'static str, mode: PutMode| {
            store.put_opts(&path, Bytes::from_static(text.as_bytes()).into(), mode.into())
        };
        let update = |r: &PutResult| PutMode::Update(UpdateVersion { e_tag: r.e_tag.clone(), version: None });
        let missing = PutResult { e_tag: Some("0-0-0".into()), version: None };
        assert!(matches!(put("0", update(&missing)).await, Err(Error::NotFound { .. })));
        let one = put("1", PutMode::Create).await.unwrap();
        assert!(matches!(put("2", PutMode::Create).await, Err(Error::AlreadyExists { .. })));
        let two = put("2", update(&one)).await.unwrap();
        assert!(matches!(put("3", update(&one)).await, Err(Error::Precondition { .. })));
        let three = put("3", update(&two)).await.unwrap();
        assert_ne!(two.e_tag, three.e_tag);
        assert_eq!(store.get(&path).await.unwrap().bytes().await.unwrap(), "3");
        assert_eq!(staged(&store), 0, "refused puts leave nothing behind");
    }

    #[tokio::test]
    async fn one_of_many_updates_wins() {
        let (_dir, store) = store();
        let path = Path::from("x");
        let first = store.put(&path, Bytes::from_static(b"0").into()).await.unwrap();
        let mode = PutMode::Update(UpdateVersion { e_tag: first.e_tag, version: None });
        let puts = (0..16).map(|i| store.put_opts(&path, Bytes::from(format!("{i:02}")).into(), mode.clone().into()));
        let won = futures::future::join_all(puts).await.iter().filter(|r| r.is_ok()).count();
        assert_eq!(won, 1);
    }

    #[tokio::test]
    async fn multipart() {
        let (_dir, store) = store();
        let path = Path::from("big");
        let mut upload = store.put_multipart(&path).await.unwrap();
        let parts = [&b"ab"[..], b"cde", b"", b"f"].map(|p| upload.put_part(Bytes::from_static(p).into()));
        futures::future::try_join_all(parts.into_iter().rev()).await.unwrap();
        assert!(names(&store).await.is_empty(), "invisible until complete");
        upload.complete().await.unwrap();
        assert!(upload.complete().await.is_err());
        assert_eq!(store.get(&path).await.unwrap().bytes().await.unwrap(), "abcdef");
        let mut upload = store.put_multipart(&path).await.unwrap();
        upload.put_part(Bytes::from_static(b"zzz").into()).await.unwrap();
        upload.abort().await.unwrap();
        assert_eq!(store.get(&path).await.unwrap().bytes().await.unwrap(), "abcdef");
        assert_eq!(staged(&store), 0);
    }

    #[tokio::test]
    async fn leftovers_of_a_crash_go() {
        let (dir, store) = store();
        std::mem::forget(store.folder.clone().stage().unwrap());
        assert_eq!(staged(&store), 1);
        let store = LocalStore::open(Arc::new(Disk), &dir.path().join("a/b")).unwrap();
        assert_eq!(staged(&store), 0);
    }

    /// Calls since the one with this number, by name, and the last part of their paths.
    fn since(faults: &Faults, call: usize) -> Vec<(&'static str, String)> {
        let last = |c: &Call| c.path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        faults.calls()[call..].iter().map(|c| (c.what, last(c))).collect()
    }

    fn synced(calls: &[(&'static str, String)], what: &str, name: &str) -> bool {
        calls.iter().any(|c| c.0 == what && c.1 == name)
    }

    #[tokio::test]
    async fn what_could_not_be_synced_is_synced_before_it_counts() {
        let dir = tempfile::tempdir().unwrap();
        let faults = Faults::default();
        let store = LocalStore::open(Arc::new(Faulty::new(Arc::new(Disk), faults.clone())), dir.path()).unwrap();
        let path = Path::from("journal/1");
        store.put(&Path::from("journal/0"), Bytes::from_static(b"0").into()).await.unwrap();
        let create = || store.put_opts(&path, Bytes::from_static(b"1").into(), PutMode::Create.into());
        // The sync of the folder is the last but one call: what is in staging is removed after it.
        faults.at(faults.calls().len() + 4, Fault::Io);
        let begun = faults.calls().len();
        assert!(matches!(create().await, Err(Error::Generic { .. })), "{:?}", since(&faults, begun));
        assert_eq!(since(&faults, begun)[4], ("sync_dir", "journal".to_owned()));
        // While the disk fails nobody learns that it is there.
        faults.always(Fault::Io);
        assert!(matches!(store.get(&path).await, Err(Error::Generic { .. })));
        assert!(matches!(store.head(&path).await, Err(Error::Generic { .. })));
        faults.clear();
        // A put that meets it, and a read.
        let begun = faults.calls().len();
        assert!(matches!(create().await, Err(Error::AlreadyExists { .. })));
        let calls = since(&faults, begun);
        assert!(synced(&calls, "sync", "1") && synced(&calls, "sync_dir", "journal"), "{calls:?}");
        let begun = faults.calls().len();
        assert_eq!(store.get(&path).await.unwrap().bytes().await.unwrap(), "1");
        assert_eq!(since(&faults, begun), [], "it is durable now");
        // Also when a process before met its end between the two.
        let store = LocalStore::open(Arc::new(Faulty::new(Arc::new(Disk), faults.clone())), dir.path()).unwrap();
        let begun = faults.calls().len();
        let put = store.put_opts(&path, Bytes::from_static(b"1").into(), PutMode::Create.into());
        assert!(matches!(put.await, Err(Error::AlreadyExists { .. })));
        assert!(synced(&since(&faults, begun), "sync_dir", "journal"));
        // A replacement that is read back.
        faults.at(faults.calls().len() + 4, Fault::Io);
        assert!(store.put(&path, Bytes::from_static(b"2").into()).await.is_err());
        let begun = faults.calls().len();
        assert_eq!(store.get(&path).await.unwrap().bytes().await.unwrap(), "2");
        assert!(synced(&since(&faults, begun), "sync_dir", "journal"));
    }

    #[tokio::test]
    async fn a_folder_counts_as_made_once_its_name_is_durable() {
        let dir = tempfile::tempdir().unwrap();
        let faults = Faults::default();
        let store = LocalStore::open(Arc::new(Faulty::new(Arc::new(Disk), faults.clone())), dir.path()).unwrap();
        let put = |name: &str| {
            let store = &store;
            let path = Path::from(format!("samples/20000/{name}"));
            async move { store.put(&path, Bytes::from_static(b"x").into()).await }
        };
        let makes = || faults.calls().iter().filter(|c| c.what == "create_dir_all").count();
        let before = makes();
        // Made, but its sync fails: as if by the call that makes it.
        std::fs::create_dir_all(dir.path().join("samples/20000")).unwrap();
        faults.at(faults.calls().len() + 3, Fault::Io);
        assert!(put("1").await.is_err());
        assert_eq!(makes(), before + 1);
        put("1").await.unwrap();
        put("2").await.unwrap();
        assert_eq!(makes(), before + 2, "made sure of again, and then remembered");
        std::fs::remove_dir_all(dir.path().join("samples")).unwrap();
        assert!(put("3").await.is_err());
        put("3").await.unwrap();
    }
}
