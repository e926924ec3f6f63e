//! Plain data that says how an engine runs. The binary fills it from its config file.

use std::path::PathBuf;
use std::time::Duration;

use catalog::Secret;

use crate::Retention;

/// Which SQL catalog follows the journal for outside readers.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum SqlCatalog {
    /// `catalog.sqlite` in the data folder.
    #[default]
    DataDir,
    /// PostgreSQL, by its URL.
    Postgres(Secret),
    /// None.
    None,
}

/// Where the log is kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogStore {
    /// In the data folder: a group of requests costs one sync.
    #[default]
    Local,
    /// In the object store: a group costs one put, and nothing is lost with the machine.
    Object,
}

/// How an engine runs. Bytes are bytes, durations are wall time.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Which database of the store; part of every object's path.
    pub database: String,
    /// Absolute location of the object store as other programs name it ([`catalog::object::location`]).
    pub store_location: String,
    /// Folder for the log, the SQLite file catalog and caches.
    pub data_dir: PathBuf,
    /// The SQL catalog.
    pub catalog: SqlCatalog,
    /// Memory that everything shares; see [`crate::Memory`].
    pub memory_limit: usize,
    /// Most active tag sets.
    pub series_limit: usize,
    /// Samples further ahead of the clock than this are refused by receivers.
    pub future_max: Duration,
    /// A table's memtable is flushed when it holds this many bytes.
    pub flush_bytes: usize,
    /// A table's memtable is flushed when its oldest row has waited this long.
    pub flush_interval: Duration,
    /// Where the log is kept.
    pub wal: LogStore,
    /// The log forces a flush of whoever pins it beyond this.
    pub wal_bytes_max: u64,
    /// Room in the data folder that is set aside, so that a full disk can be emptied; 0 for none, and then no disk counts
    /// as full.
    pub reserve_bytes: u64,
    /// How long superseded objects are kept, which must exceed the longest query of any reader.
    pub delete_grace: Duration,
    /// What is kept.
    pub retention: Retention,
    /// Deadline of a query that does not set its own.
    pub query_timeout: Duration,
    /// Queries that run at a time; 0 for a number that follows from the threads.
    pub queries_max: usize,
    /// A query that has not had its turn after this long is refused.
    pub query_wait_max: Duration,
    /// Most memory of one query; 0 for what all together may have.
    pub query_memory_max: usize,
    /// Most series that one selection may mean.
    pub query_series_max: usize,
    /// Where results may be exported to; see [`catalog::object::export::Exports::open`].
    pub export_locations: Vec<String>,
    /// Threads for queries, and as many for decoding.
    pub cpu_threads: usize,
    /// Whether work has threads of its own. Without, all of it runs on the runtime that opens the engine, as
    /// simulations need.
    pub own_threads: bool,
    /// The settings of the whole server as `catalog.settings` lists them. Nothing here follows from them.
    pub listed: Vec<ListedSetting>,
}

/// A setting as it is listed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListedSetting {
    /// Its name in the file.
    pub name: String,
    /// Its value, secrets left out.
    pub value: String,
    /// Its default.
    pub default: String,
    /// What it means.
    pub description: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            database: "default".to_owned(),
            store_location: "memory://".to_owned(),
            data_dir: PathBuf::from("data"),
            catalog: SqlCatalog::default(),
            memory_limit: 2 << 30,
            series_limit: 5_000_000,
            future_max: Duration::from_secs(600),
            flush_bytes: 128 << 20,
            flush_interval: Duration::from_secs(3600),
            wal: LogStore::Local,
            reserve_bytes: 0,
            wal_bytes_max: 512 << 20,
            delete_grace: Duration::from_secs(600),
            retention: Retention::default(),
            query_timeout: Duration::from_secs(120),
            queries_max: 0,
            query_wait_max: Duration::from_secs(10),
            query_memory_max: 0,
            query_series_max: 1_000_000,
            export_locations: Vec::new(),
            cpu_threads: 2,
            own_threads: true,
            listed: Vec::new(),
        }
    }
}
