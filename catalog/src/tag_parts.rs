//! Tag sets as files: one or more parts per UTC day, sorted by (metric name, labels), so that one metric's sets are read
//! without the rest.
//!
//! A part is a Parquet file with the columns `metric`, `metric_code`, `code` and `tags`; `catalog/FORMAT.md` describes it.
//! A set's identity is computed again from its labels whenever it is read and compared with the stored code.

use std::sync::Arc;

use bytes::Bytes;
use object_store::ObjectStore;

use crate::files::TagPart;
use crate::{Error, Registry, Result, Series};

/// What a part's footer says about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartHeader {
    /// [`TagPart::id`].
    pub id: i64,
    /// [`TagPart::day`].
    pub day: i32,
    /// [`TagPart::seq`].
    pub seq: u64,
    /// Ids of the parts that it replaces.
    pub supersedes: Vec<i64>,
}

/// Bytes of a part, and its entry for the file catalog.
#[derive(Debug, Clone)]
pub struct EncodedPart {
    /// The object.
    pub bytes: Bytes,
    /// Its entry; the object belongs at the entry's path under the database's prefix.
    pub part: TagPart,
}

/// Which metrics' sets to load.
#[derive(Clone, Copy)]
pub enum MetricFilter<'a> {
    /// All.
    All,
    /// The one with this name.
    Eq(&'a str),
    /// Those whose name satisfies a predicate; it is called once per distinct name of a part.
    Where(&'a (dyn Fn(&str) -> bool + Send + Sync)),
}

/// Writes tag sets as a part. Order and repetition don't matter.
///
/// # Errors
/// `Internal` when two sets have the same code and different labels.
pub fn encode(header: &PartHeader, series: &[Arc<Series>]) -> Result<EncodedPart> {
    let _ = (header, series);
    Err(Error::internal("tag parts are not available"))
}

/// The path of a part relative to the database's prefix: `tag_sets/<day>/<id>.parquet`.
pub fn path(day: i32, id: i64) -> String {
    format!("tag_sets/{day}/{id}.parquet")
}

/// Reads tag parts through a cache that is bounded by bytes.
#[derive(Debug)]
pub struct TagParts {
    store: Arc<dyn ObjectStore>,
}

impl TagParts {
    /// A reader of the parts under `prefix` (the database's name). Sets that are active in `registry` are shared with it
    /// instead of being kept twice.
    pub fn new(store: Arc<dyn ObjectStore>, prefix: &str, registry: Arc<Registry>, cache_bytes: usize) -> Self {
        let _ = (prefix, registry, cache_bytes);
        Self { store }
    }

    /// The sets of the metrics that `filter` chooses, one list per (part, metric) in the order of `parts` and then by
    /// metric name. The same set may come from several parts. Decoding runs on the caller's thread.
    ///
    /// # Errors
    /// `Corrupt` naming the object when it is not what was written; store errors.
    pub async fn load(&self, parts: &[Arc<TagPart>], filter: MetricFilter<'_>) -> Result<Vec<Arc<Vec<Arc<Series>>>>> {
        let _ = (&self.store, parts, filter);
        Err(Error::internal("tag parts are not available"))
    }

    /// Merges parts of one day into one, with every set once. `header.supersedes` should name them.
    ///
    /// # Errors
    /// As [`TagParts::load`].
    pub async fn merge(&self, header: &PartHeader, parts: &[Arc<TagPart>]) -> Result<EncodedPart> {
        let _ = (header, parts);
        Err(Error::internal("tag parts are not available"))
    }
}
