//! Segments: immutable Parquet files in the object store, each with rows of one table and one UTC day, sorted by
//! (metric, target, series, ts). `engine/FORMAT.md` describes them byte for byte.
//!
//! A reader never touches the code columns of the rows that it returns. The first time a row group is read, its runs
//! (rows of one series with the same parameters of [`crate::layout`]) are found and kept in a bounded cache as a
//! [`RunIndex`]; from then on a query knows the exact rows that it wants before it fetches a page, and fetches only pages
//! of time and value columns. Every page is checked against its CRC when it comes from the store.

mod cache;
mod constant;
mod footer;
mod read;
mod runs;
mod write;

use catalog::Series;

pub(crate) use footer::Description;
pub(crate) use read::{Cursor, Reads, Request, Segments, count_runs};
pub(crate) use write::{Writer, day_of, day_start_ms};

use runs::RunIndex;

/// Version of the segment format, in every footer.
const FORMAT_VERSION: u32 = 1;

/// Rows of a row group: what a reader indexes and fetches as one.
const GROUP_ROWS: usize = 1 << 20;

/// Series of a row group, about: an index of one has some 90 bytes for each, and a merge holds one of each file.
const GROUP_SERIES: usize = 64 << 10;

/// Rows of a page. Smaller pages cost headers and dictionary restarts (0.08 bytes a sample from 100k down to 20k rows),
/// larger ones make a single series dearer to read.
const PAGE_ROWS: usize = 32 << 10;

/// Level of compression: 4 and up cost twice the time for less than a hundredth.
const ZSTD_LEVEL: i32 = 3;

/// Rows that are decoded at a time: their columns fit the second-level cache.
const BATCH_ROWS: usize = 8192;

/// The sort key of a series' rows: codes of metric, target and series.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct Key {
    pub metric: i64,
    pub target: i64,
    pub series: i64,
}

impl From<&Series> for Key {
    fn from(s: &Series) -> Self {
        let (metric, target, series) = s.storage_key();
        Self { metric, target, series }
    }
}

#[cfg(test)]
mod tests;
