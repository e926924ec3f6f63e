//! Object stores: where segments, tag parts and the database's description live.
//!
//! Every store offers the same three things that the engine builds on: a put that is durable when it returns, a put that
//! fails when the object exists or has changed, and ranged reads. S3 has them; for a local folder [`LocalStore`] adds
//! what `object_store`'s own local store leaves out.

mod local;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use object_store::ObjectStore;
use object_store::aws::AmazonS3Builder;
use object_store::memory::InMemory;
use object_store::prefix::PrefixStore;

pub use local::LocalStore;

use crate::{Error, FileSystem, Result};

/// Opens the store at a path, `file://`, `s3://bucket[/prefix]` or `memory://`. S3 takes its region, endpoint and
/// credentials from the `AWS_*` environment variables; a folder is written through `fs`.
///
/// # Errors
/// `Invalid` for an unknown scheme or a missing bucket; `Unavailable` when a folder can't be made.
pub fn open(fs: &Arc<dyn FileSystem>, url_or_path: &str) -> Result<Arc<dyn ObjectStore>> {
    match Location::parse(url_or_path)? {
        Location::Memory => Ok(Arc::new(InMemory::new())),
        Location::Folder(folder) => Ok(Arc::new(LocalStore::open(fs.clone(), &folder)?)),
        Location::S3 { bucket, prefix } => {
            let store = AmazonS3Builder::from_env()
                .with_bucket_name(bucket)
                .build()
                .map_err(|e| Error::invalid(format!("object store {url_or_path:?} is not usable")).with_source(e))?;
            if prefix.is_empty() {
                return Ok(Arc::new(store));
            }
            Ok(Arc::new(PrefixStore::new(store, prefix)))
        }
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
        Location::S3 { bucket, prefix: "" } => format!("s3://{bucket}/"),
        Location::S3 { bucket, prefix } => format!("s3://{bucket}/{prefix}/"),
    })
}

#[derive(Debug, PartialEq)]
enum Location<'a> {
    Memory,
    Folder(PathBuf),
    S3 { bucket: &'a str, prefix: &'a str },
}

impl<'a> Location<'a> {
    fn parse(text: &'a str) -> Result<Self> {
        if text.is_empty() {
            return Err(Error::invalid("object store location is empty; give a folder or an URL"));
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            return Ok(Self::Folder(Path::new(text).to_owned()));
        };
        match scheme {
            "memory" => Ok(Self::Memory),
            "file" => Ok(Self::Folder(Path::new(rest).to_owned())),
            "s3" => {
                let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
                if bucket.is_empty() {
                    return Err(Error::invalid(format!("object store {text:?} names no bucket")));
                }
                Ok(Self::S3 { bucket, prefix: prefix.trim_matches('/') })
            }
            _ => Err(Error::invalid(format!(
                "object store {text:?} has scheme {scheme:?}; known are file, s3, memory, and a folder without scheme"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations() {
        let check = |text: &str, expected: Option<&str>| {
            assert_eq!(location(text).ok().as_deref(), expected, "{text}");
        };
        check("/data/store", Some("/data/store/"));
        check("/data/store/", Some("/data/store/"));
        check("file:///data/store", Some("/data/store/"));
        check("s3://bucket", Some("s3://bucket/"));
        check("s3://bucket/", Some("s3://bucket/"));
        check("s3://bucket/a/b/", Some("s3://bucket/a/b/"));
        check("memory://", Some("memory://"));
        check("s3:///x", None);
        check("gopher://x", None);
        check("", None);
        assert!(location("relative").unwrap().starts_with('/'));
    }
}
