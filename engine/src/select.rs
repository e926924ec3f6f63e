//! From matchers to the set of series that a scan reads.

use std::sync::Arc;

use catalog::{Matcher, Series, TableSchema};

/// Which series of which table, and when.
#[derive(Debug, Clone)]
pub struct Selection {
    /// The table.
    pub table: Arc<TableSchema>,
    /// All must hold. Empty selects everything.
    pub matchers: Vec<Matcher>,
    /// First millisecond, inclusive.
    pub start_ms: i64,
    /// Last millisecond, inclusive.
    pub end_ms: i64,
}

/// The series that a selection means, against one version of the data: what is scanned with this set is exactly what
/// was visible when it was made. A set may hold series without a row in the range.
#[derive(Debug)]
pub struct SeriesSet {
    /// The table.
    pub table: Arc<TableSchema>,
    /// The series in storage order; a scan's `series` column holds indexes into this.
    pub series: Vec<Arc<Series>>,
    /// First millisecond, inclusive.
    pub start_ms: i64,
    /// Last millisecond, inclusive.
    pub end_ms: i64,
}
