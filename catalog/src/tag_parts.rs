//! Tag sets as files: one or more parts per UTC day, sorted by (metric name, canonical form), so that one metric's sets
//! are read without the rest.
//!
//! A part is a Parquet file with the columns of [`schema`]; `catalog/FORMAT.md` describes it. A set's identity is
//! computed again from its labels whenever it is read and compared with the stored code.

mod cache;
mod read;
#[cfg(test)]
mod tests;
mod write;

use std::ops::Deref;
use std::sync::{Arc, LazyLock};

use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef};
use bytes::Bytes;
use parking_lot::Mutex;

use object_store::ObjectStore;

use crate::files::TagPart;
use crate::postings::{self, Made, Narrow, Postings};
use crate::tables::with_field_id;
use crate::{Error, ErrorKind, Registry, Result, Series, TagSet, TagValues};

use cache::Cache;

/// Version of the format of tag parts.
pub const FORMAT: u32 = 1;

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

/// Decides about bytes that are about to be used.
pub type Admit<'a> = &'a mut (dyn FnMut(usize) -> Result<()> + Send);

/// What a set that is read takes in memory until it is dropped, about.
pub const SET_BYTES: usize = 400;

/// The sets of one metric in one part.
#[derive(Debug, Clone)]
pub struct MetricSets {
    /// Sorted by their canonical form.
    sets: Arc<Vec<Arc<Series>>>,
    part: i64,
    metric: u32,
}

impl Deref for MetricSets {
    type Target = [Arc<Series>];

    fn deref(&self) -> &[Arc<Series>] {
        &self.sets
    }
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

impl std::fmt::Debug for MetricFilter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::All => f.write_str("All"),
            Self::Eq(name) => write!(f, "Eq({name:?})"),
            Self::Where(_) => f.write_str("Where(..)"),
        }
    }
}

/// The columns of a part: `metric` text, `metric_code` and `code` INT64, `tags` map of all other labels.
pub fn schema() -> &'static SchemaRef {
    &SCHEMA
}

static SCHEMA: LazyLock<SchemaRef> = LazyLock::new(|| {
    let field = |name: &str, id, t| with_field_id(Field::new(name, t, false), id);
    let entries = DataType::Struct(pair_fields());
    let tags = DataType::Map(Arc::new(Field::new("key_value", entries, false)), true);
    Arc::new(Schema::new(vec![
        field("metric", 1, DataType::Utf8),
        field("metric_code", 2, DataType::Int64),
        field("code", 3, DataType::Int64),
        field("tags", 4, tags),
    ]))
});

fn pair_fields() -> Fields {
    let field = |name: &str, id| with_field_id(Field::new(name, DataType::Utf8, false), id);
    Fields::from(vec![field("key", 401), field("value", 402)])
}

/// Writes tag sets as a part. Order and repetition don't matter.
///
/// # Errors
/// `Internal` when two sets have the same code and different labels.
pub fn encode(header: &PartHeader, series: &[Arc<Series>]) -> Result<EncodedPart> {
    write::encode(header, series)
}

/// The folder of all parts under the database's prefix.
pub const FOLDER: &str = "tag_sets";

/// The path of a part relative to the database's prefix: `tag_sets/<day>/<id>.parquet`.
pub fn path(day: i32, id: i64) -> String {
    format!("{FOLDER}/{day}/{id}.parquet")
}

/// Reads tag parts through a cache that is bounded by bytes.
#[derive(Debug)]
pub struct TagParts {
    store: Arc<dyn ObjectStore>,
    prefix: String,
    registry: Arc<Registry>,
    cache: Mutex<Cache>,
    whole_bytes: u64,
}

/// Parts up to this size are fetched whole, in one request. Larger ones are streamed through once when they are opened,
/// to check them, and then read in blocks.
const WHOLE_BYTES: u64 = 1 << 20;

impl TagParts {
    /// A reader of the parts under `prefix` (the database's name). Sets that are active in `registry` are shared with it
    /// instead of being kept twice.
    pub fn new(store: Arc<dyn ObjectStore>, prefix: &str, registry: Arc<Registry>, cache_bytes: usize) -> Self {
        let cache = Mutex::new(Cache::new(cache_bytes));
        Self { store, prefix: prefix.to_owned(), registry, cache, whole_bytes: WHOLE_BYTES }
    }

    /// The sets of the metrics that `filter` chooses, one list per (part, metric) in the order of `parts` and then by
    /// metric name. The same set may come from several parts. Decoding runs on the caller's thread. `admit` is told
    /// about how many bytes more are going to be read into memory, and may refuse.
    ///
    /// # Errors
    /// `Corrupt` naming the object when it is not what was written; store errors; those of `admit`.
    pub async fn load(
        &self,
        parts: &[Arc<TagPart>],
        filter: MetricFilter<'_>,
        admit: Admit<'_>,
    ) -> Result<Vec<MetricSets>> {
        let mut out = Vec::new();
        for part in parts {
            self.load_part(part, filter, admit, &mut out).await.map_err(|e| self.in_part(e, part))?;
        }
        Ok(out)
    }

    /// The positions of those sets for which the matchers of `narrow` may hold; `None` when all are to be looked at.
    pub fn narrowed(&self, of: &MetricSets, narrow: &mut Narrow<'_>) -> Option<Vec<u32>> {
        let MetricSets { sets, part, metric } = of;
        postings::narrowed_list(sets, narrow, |tag| {
            let tag: Arc<str> = tag.into();
            let made = self.cache.lock().postings(*part, *metric, &tag);
            let made = match made {
                Some(Made::Ready(postings)) => return Some(postings),
                Some(Made::Dear) => return None,
                Some(Made::Asked) => Made::Ready(Arc::new(Postings::of(&tag, sets))),
                None => Made::Asked,
            };
            self.cache.lock().put_postings(*part, *metric, tag, made.clone());
            match made {
                Made::Ready(postings) => Some(postings),
                _ => None,
            }
        })
    }

    /// The distinct values of a tag in each of these parts.
    ///
    /// # Errors
    /// As [`TagParts::load`].
    pub async fn values(&self, parts: &[Arc<TagPart>], tag: &str, admit: Admit<'_>) -> Result<Vec<Arc<TagValues>>> {
        let tag: Arc<str> = tag.into();
        let mut out = Vec::with_capacity(parts.len());
        for part in parts {
            out.push(self.values_of(part, &tag, admit).await.map_err(|e| self.in_part(e, part))?);
        }
        Ok(out)
    }

    /// Merges parts of one day into one, with every set once, all of which are in memory meanwhile. `header.supersedes`
    /// should name them.
    ///
    /// # Errors
    /// As [`TagParts::load`].
    pub async fn merge(&self, header: &PartHeader, parts: &[Arc<TagPart>]) -> Result<EncodedPart> {
        let mut all = Vec::new();
        for part in parts {
            all.extend(self.read_whole(part).await.map_err(|e| self.in_part(e, part))?);
        }
        encode(header, &all)
    }

    /// Checks every byte of a part, past the cache; returns its sets in their order.
    ///
    /// # Errors
    /// As [`TagParts::load`].
    pub async fn check(&self, part: &TagPart) -> Result<Vec<Arc<Series>>> {
        let work = async {
            let sets = self.read_whole(part).await?;
            let before = |a: &TagSet, b: &TagSet| (a.metric(), a.as_bytes()) < (b.metric(), b.as_bytes());
            if !sets.is_sorted_by(|a, b| before(&a.tags, &b.tags)) {
                return Err(Error::corrupt("tag sets are repeated or not in order"));
            }
            Ok(sets)
        };
        work.await.map_err(|e| self.in_part(e, part))
    }

    fn in_part(&self, e: Error, part: &TagPart) -> Error {
        // What a store can't find is damage to the database, not a wrong request.
        let e = match e.kind() {
            ErrorKind::NotFound => Error::corrupt("object is missing").with_source(e),
            _ => e,
        };
        e.context(format_args!("tag part {}/{}", self.prefix, part.path))
    }

    /// Bounds the cache anew.
    pub fn limit_cache(&self, bytes: usize) {
        self.cache.lock().set_limit(bytes);
    }

    /// Bytes that the cache holds.
    pub fn cached_bytes(&self) -> usize {
        self.cache.lock().bytes()
    }
}
