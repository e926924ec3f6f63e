//! Writes frozen memtables to files.

use std::sync::Arc;

use catalog::{Error, Result, TableSchema};

use crate::memtable::Memtable;
use crate::engine::Inner;

/// Writes a frozen memtable to files, commits them, and installs the version in which they stand for it.
pub(crate) async fn write(inner: &Arc<Inner>, table: &Arc<TableSchema>, memtable: &Arc<Memtable>) -> Result<()> {
    let _ = (inner, memtable);
    Err(Error::unavailable(format!("flush of {} is not available", table.name)))
}
