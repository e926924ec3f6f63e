//! Object stores: where segments, tag parts and the database's description live.
//!
//! Every store offers the same three things that the engine builds on: a put that is durable when it returns, a put that
//! fails when the object exists, and ranged reads. S3, Google Cloud Storage and Azure have them; for a local folder
//! [`LocalStore`] adds what `object_store`'s own local store leaves out. A service that only looks like one of them is
//! found out by [`probe`] before anything relies on it.

mod cloud;
pub mod export;
mod local;

use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{Error as StoreError, ObjectStore, ObjectStoreExt, PutMode, PutPayload};

use cloud::Place;
pub use local::LocalStore;

use crate::{Error, FileSystem, Result};

/// Opens the store at a path, `file://`, `s3://bucket[/prefix]`, `gs://bucket[/prefix]`, `az://container[/prefix]`,
/// `abfss://container@account.dfs.core.windows.net[/prefix]` or `memory://`. A query may name `endpoint` and `region`
/// (`s3://bucket/prefix?endpoint=http://127.0.0.1:9000`), credentials come from the environment: `AWS_*`, `GOOGLE_*`,
/// `AZURE_*`. A folder is written through `fs`.
///
/// # Errors
/// `Invalid` for an unknown scheme, a missing bucket or settings that contradict each other; `Unavailable` when a folder
/// can't be made.
pub fn open(fs: &Arc<dyn FileSystem>, url_or_path: &str) -> Result<Arc<dyn ObjectStore>> {
    match Location::parse(url_or_path)? {
        Location::Memory => Ok(Arc::new(InMemory::new())),
        Location::Folder(folder) => Ok(Arc::new(LocalStore::open(fs.clone(), &folder)?)),
        Location::Cloud(place) => place.open(),
    }
}

/// Opens a store to read what is there, also beside a server that writes to it: nothing is made and nothing tidied up.
///
/// # Errors
/// As [`open`], and `NotFound` for a folder that does not exist.
pub fn open_to_read(url_or_path: &str) -> Result<Arc<dyn ObjectStore>> {
    match Location::parse(url_or_path)? {
        Location::Memory => Ok(Arc::new(InMemory::new())),
        Location::Folder(folder) => {
            let missing = |e| Error::not_found(format!("folder {} can't be read", folder.display())).with_source(e);
            Ok(Arc::new(LocalFileSystem::new_with_prefix(&folder).map_err(missing)?))
        }
        Location::Cloud(place) => place.open(),
    }
}

/// The absolute location of a store as other programs name it, with a slash at its end: a folder, or an URL.
///
/// # Errors
/// As [`open`]; opens nothing.
pub fn location(url_or_path: &str) -> Result<String> {
    Ok(match Location::parse(url_or_path)? {
        Location::Memory => "memory://".to_owned(),
        Location::Folder(folder) => {
            let folder = std::path::absolute(&folder)
                .map_err(|e| Error::from(e).context(format_args!("folder {}", folder.display())))?;
            format!("{}/", folder.display().to_string().trim_end_matches('/'))
        }
        Location::Cloud(place) => place.location(),
    })
}

/// Checks that the store refuses to create an object that exists, on which every commit relies. Leaves one small object,
/// `<database>/probe`.
///
/// # Errors
/// `Invalid` when the store overwrites; `Unavailable` when it can't be written to.
pub async fn probe(store: &dyn ObjectStore, database: &str) -> Result<()> {
    let location = Path::from(format!("{database}/probe"));
    let create = || store.put_opts(&location, PutPayload::from_static(b"create-only\n"), PutMode::Create.into());
    for _ in 0..2 {
        match create().await {
            Err(StoreError::AlreadyExists { .. }) => return Ok(()),
            Ok(_) => {}
            Err(e @ (StoreError::NotImplemented { .. } | StoreError::NotSupported { .. })) => {
                return Err(unconditional().with_source(e));
            }
            Err(e) => return Err(Error::from(e).context(format_args!("object {location} can't be written"))),
        }
    }
    Err(unconditional())
}

fn unconditional() -> Error {
    Error::invalid(
        "the object store overwrites an object that was to be created only if it does not exist (If-None-Match is not \
         honoured); two servers could destroy each other's data there",
    )
}

/// Bytes of one request of a large upload: it ends within its deadline on a slow line too.
const PART_BYTES: usize = 16 << 20;
/// Requests of one upload at a time.
const PARTS_AT_ONCE: usize = 4;

/// Stores an object of any size, replacing what has its name; it is durable when this returns.
///
/// # Errors
/// Of the store; the object is whole or absent then.
pub async fn put(store: &dyn ObjectStore, location: &Path, bytes: Bytes) -> Result<()> {
    put_in_parts(store, location, bytes, PART_BYTES).await
}

async fn put_in_parts(store: &dyn ObjectStore, location: &Path, bytes: Bytes, part_bytes: usize) -> Result<()> {
    if bytes.len() <= 2 * part_bytes {
        store.put(location, bytes.into()).await?;
        return Ok(());
    }
    let mut upload = store.put_multipart(location).await?;
    let starts = (0..bytes.len()).step_by(part_bytes);
    let parts: Vec<_> =
        starts.map(|start| upload.put_part(bytes.slice(start..bytes.len().min(start + part_bytes)).into())).collect();
    let sent = futures::stream::iter(parts).buffer_unordered(PARTS_AT_ONCE).try_collect::<Vec<()>>().await;
    if let Err(e) = sent {
        // What remains of it is for the store's own rules to remove.
        let _ = upload.abort().await;
        return Err(e.into());
    }
    let Err(e) = upload.complete().await else { return Ok(()) };
    // The reply may be what was lost: then the object is there.
    match store.head(location).await {
        Ok(found) if found.size == bytes.len() as u64 => Ok(()),
        _ => Err(e.into()),
    }
}

#[derive(Debug, PartialEq)]
enum Location<'a> {
    Memory,
    Folder(PathBuf),
    Cloud(Place<'a>),
}

impl<'a> Location<'a> {
    fn parse(text: &'a str) -> Result<Self> {
        if text.is_empty() {
            return Err(Error::invalid("object store location is empty; give a folder or an URL"));
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            return Ok(Self::Folder(FsPath::new(text).to_owned()));
        };
        match scheme {
            "memory" => Ok(Self::Memory),
            "file" => Ok(Self::Folder(FsPath::new(rest).to_owned())),
            _ => Place::parse(scheme, rest).map_or_else(
                || {
                    // Options may hold what must not be shown.
                    let text = text.split('?').next().unwrap_or_default();
                    Err(Error::invalid(format!(
                        "object store {text:?} has scheme {scheme:?}; known are file, s3, gs, az, abfs, abfss, memory, and \
                         a folder without scheme"
                    )))
                },
                |place| place.map(Self::Cloud),
            ),
        }
    }
}

#[cfg(test)]
mod tests;
