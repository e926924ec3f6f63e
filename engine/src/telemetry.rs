//! What the process says of itself: counters, gauges and histograms in Prometheus naming.

use std::fmt::Debug;

use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Metric, Registry};

/// The registry of self-metrics. Whoever owns a metric makes it, registers it here once and keeps a clone.
#[derive(Debug)]
pub struct Telemetry(Mutex<Registry>);

impl Default for Telemetry {
    fn default() -> Self {
        Self(Mutex::new(Registry::with_prefix("thalweg")))
    }
}

impl Telemetry {
    /// Registers a metric under `thalweg_<name>` (counters get `_total` appended) and hands it back.
    pub fn register<M: Metric + Clone + Debug>(&self, name: &str, help: &str, metric: M) -> M {
        self.0.lock().register(name, help, metric.clone());
        metric
    }

    /// The OpenMetrics text of all metrics.
    pub fn encode(&self) -> String {
        let mut out = String::new();
        // Writing into a String does not fail.
        let _ = prometheus_client::encoding::text::encode(&mut out, &self.0.lock());
        out
    }
}

/// A label that names a table.
#[derive(Debug, Clone, Hash, PartialEq, Eq, prometheus_client::encoding::EncodeLabelSet)]
pub(crate) struct TableLabel {
    /// [`catalog::TableSchema::name`].
    pub table: &'static str,
}

/// A label that names a limit of the settings.
#[derive(Debug, Clone, Hash, PartialEq, Eq, prometheus_client::encoding::EncodeLabelSet)]
pub(crate) struct LimitLabel {
    /// What was reached.
    pub limit: &'static str,
}

/// A label that names a cache.
#[derive(Debug, Clone, Hash, PartialEq, Eq, prometheus_client::encoding::EncodeLabelSet)]
pub(crate) struct CacheLabel {
    /// `segments` (footers and run indexes) or `tag_parts`.
    pub cache: &'static str,
}

/// A label that names what memory is used for.
#[derive(Debug, Clone, Hash, PartialEq, Eq, prometheus_client::encoding::EncodeLabelSet)]
pub(crate) struct MemoryLabel {
    /// [`crate::memory::Kind::name`], or `other`.
    pub kind: &'static str,
}

/// A label that says how something ended.
#[derive(Debug, Clone, Hash, PartialEq, Eq, prometheus_client::encoding::EncodeLabelSet)]
pub(crate) struct OutcomeLabel {
    /// `ok`, `error`, `timeout` or `canceled`.
    pub outcome: &'static str,
}

/// The engine's own metrics.
#[derive(Debug)]
pub(crate) struct Metrics {
    pub ingest_rows: Family<TableLabel, Counter>,
    pub ingest_bytes: Counter,
    pub wal_written: Counter,
    pub wal_size: Gauge,
    pub wal_sync: Histogram,
    pub wal_failures: Counter,
    pub wal_damaged: Counter,
    pub wal_set_aside: Gauge,
    pub wal_chunks: Gauge,
    pub disk_full: Gauge,
    pub queue: Gauge,
    pub group: Histogram,
    pub flush: Histogram,
    pub flush_failures: Counter,
    pub compaction: Histogram,
    pub compaction_failures: Counter,
    pub deletes: Gauge,
    pub files: Family<TableLabel, Gauge>,
    pub tag_parts: Gauge,
    pub retention_bytes: Counter,
    pub clock_doubted: Gauge,
    pub orphans: Counter,
    pub damaged: Gauge,
    pub memtable: Family<TableLabel, Gauge>,
    pub cache: Family<CacheLabel, Gauge>,
    pub series: Gauge,
    pub series_refused: Gauge,
    pub limits: Family<LimitLabel, Counter>,
    pub queries: Family<OutcomeLabel, Counter>,
    pub catalog_behind: Gauge,
    pub queries_running: Gauge,
    pub query: Histogram,
    pub query_memory: Gauge,
    pub memory: Family<MemoryLabel, Gauge>,
    pub memory_refused: Family<MemoryLabel, Counter>,
    pub memory_limit: Gauge,
}

impl Metrics {
    pub(crate) fn new(telemetry: &Telemetry) -> Self {
        let seconds = || Histogram::new(exponential_buckets(0.0005, 2.0, 18));
        let t = telemetry;
        Self {
            ingest_rows: t.register("ingest_rows", "Rows stored", Family::default()),
            ingest_bytes: t.register("ingest_bytes", "Bytes of rows stored, as they lie in memory", Counter::default()),
            wal_written: t.register("wal_written_bytes", "Bytes written to the log", Counter::default()),
            wal_size: t.register("wal_size_bytes", "Bytes of all log segments", Gauge::default()),
            wal_sync: t.register("wal_commit_duration_seconds", "Writing and syncing one group", seconds()),
            wal_failures: t.register("wal_failures", "Groups that could not be written", Counter::default()),
            wal_damaged: t.register("wal_damaged_records", "Damaged places found at replay", Counter::default()),
            wal_set_aside: t.register(
                "wal_damaged_segments",
                "Damaged log segments kept in the data folder for an operator",
                Gauge::default(),
            ),
            wal_chunks: t.register("wal_chunks", "Files or objects of the log", Gauge::default()),
            disk_full: t.register("disk_full", "1 while writes are refused because the disk is full", Gauge::default()),
            queue: t.register("ingest_queue_requests", "Requests that wait for the log", Gauge::default()),
            group: t.register(
                "wal_group_requests",
                "Requests of one group",
                Histogram::new(exponential_buckets(1.0, 2.0, 12)),
            ),
            flush: t.register("flush_duration_seconds", "Writing one memtable to files", seconds()),
            flush_failures: t.register("flush_failures", "Flushes that failed and are tried again", Counter::default()),
            compaction: t.register("compaction_duration_seconds", "One round of compaction", seconds()),
            compaction_failures: t.register(
                "compaction_failures",
                "Rounds of compaction that failed",
                Counter::default(),
            ),
            deletes: t.register("deletes_waiting", "Deletes that are not folded into all files yet", Gauge::default()),
            files: t.register("data_files", "Data files that queries may have to look at", Family::default()),
            tag_parts: t.register(
                "tag_parts",
                "Files of tag sets that queries may have to look through",
                Gauge::default(),
            ),
            retention_bytes: t.register(
                "retention_dropped_bytes",
                "Bytes of data files that retention dropped whole",
                Counter::default(),
            ),
            clock_doubted: t.register(
                "retention_clock_doubted",
                "1 while retention does not follow the clock, which was set to another time",
                Gauge::default(),
            ),
            orphans: t.register(
                "orphans_deleted",
                "Objects deleted that no catalog entry named, left behind by crashes and failures",
                Counter::default(),
            ),
            damaged: t.register(
                "damaged_objects",
                "Data files and tag parts that failed their checks since start and are left out of compaction",
                Gauge::default(),
            ),
            memtable: t.register("memtable_bytes", "Memory of rows that are not in files", Family::default()),
            cache: t.register("cache_bytes", "Memory that caches hold", Family::default()),
            series: t.register("series_active", "Active tag sets", Gauge::default()),
            series_refused: t.register("series_refused", "Tag sets refused at the limit since start", Gauge::default()),
            limits: t.register("limits_hit", "Times that a limit was reached", Family::default()),
            catalog_behind: t.register(
                "sql_catalog_entries_behind",
                "Changes of the file catalog that the SQL catalog does not have yet",
                Gauge::default(),
            ),
            queries_running: t.register("queries_running", "Queries that have not ended", Gauge::default()),
            queries: t.register("queries", "Queries by how they ended", Family::default()),
            query: t.register("query_duration_seconds", "Queries from plan to last row", seconds()),
            query_memory: t.register("query_memory_bytes", "Memory reserved by running queries", Gauge::default()),
            memory: t.register("memory_bytes", "Memory by what it is used for", Family::default()),
            memory_refused: t.register(
                "memory_refused",
                "Times that memory was refused, by its use",
                Family::default(),
            ),
            memory_limit: t.register("memory_limit_bytes", "Memory that may be used", Gauge::default()),
        }
    }

    /// Counts that a limit was reached.
    pub(crate) fn limit(&self, limit: &'static str) {
        self.limits.get_or_create(&LimitLabel { limit }).inc();
    }
}
