//! The engine's handle: opening, writing, selecting, executing, stopping.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use catalog::database;
use catalog::files::{DataFile, FileCatalog, Index, Opening, SqlIndex};
use catalog::object::export::{Export, Exports, Target};
use catalog::{
    Clock, Entropy, Error, FileSystem, Registry, Result, Series, TableSchema, TagHasher, TagParts, TagSet, TagValues,
};
use datafusion::execution::{SendableRecordBatchStream, SessionState, TaskContext};
use datafusion::logical_expr::LogicalPlan;
use datafusion::prelude::SessionContext;
use object_store::ObjectStore;
use parking_lot::Mutex;
use tokio::runtime::{Handle, Runtime};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::arrivals::{Arrival, Arrivals};
use crate::committer::{self, Queue};
use crate::memory::{Kind, Memory};
use crate::metadata::Metadata;
use crate::query::Turns;
use crate::reserve::Reserve;
use crate::segment::Segments;
use crate::snapshot::{Snapshot, Snapshots, View};
use crate::telemetry::Metrics;
use crate::version::Version;
use crate::views::Views;
use crate::wal::{Item, Record, Replay, Storage, Wal};
use crate::{
    Activities, Extensions, LogStore, MetricMetadata, Query, QueryLimits, Selection, SeriesSet, Settings, SqlCatalog,
    Stop, Telemetry, Write, session, upkeep,
};

/// The objects that an engine works with; never mixed with [`Settings`].
#[derive(Debug, Clone)]
pub struct Components {
    /// Where segments and tag parts live.
    pub store: Arc<dyn ObjectStore>,
    /// Where the log is written.
    pub fs: Arc<dyn FileSystem>,
    /// Wall-clock time.
    pub clock: Arc<dyn Clock>,
    /// Randomness.
    pub entropy: Arc<dyn Entropy>,
    /// Self-metrics.
    pub telemetry: Arc<Telemetry>,
}

/// The handle of one database; cheap to clone. When the last clone goes without [`Engine::shutdown`], requests that
/// wait are still stored, but nothing is flushed.
#[derive(Debug, Clone)]
pub struct Engine {
    running: Arc<Running>,
    /// What is read through this handle; `None`: the present state at each look.
    snapshot: Option<Arc<Snapshot>>,
}

/// How often the process's memory is looked at: a look costs some ten microseconds.
const OBSERVE_MIN: Duration = Duration::from_millis(2);
const OBSERVE_MAX: Duration = Duration::from_millis(100);

/// What a stop may take beyond the time for writes and flush.
const END_WITHIN: Duration = Duration::from_secs(1);

/// Stack of a thread of the CPU runtime: plans are walked by recursion, and one level of an expression takes up to 20 KiB
/// in a build without optimisation. Only what is used takes memory.
const CPU_STACK_BYTES: usize = 16 << 20;

/// Each of the two caches may take this part of the memory limit.
pub(crate) const CACHE_PARTS: usize = 16;
/// The part of the memory limit that metric metadata may take.
const METADATA_PARTS: usize = 64;

/// What runs while any handle lives.
#[derive(Debug)]
struct Running {
    inner: Arc<Inner>,
    committer: Mutex<Option<Committer>>,
    tasks: TaskTracker,
    _runtimes: Runtimes,
}

/// Runtimes of the engine's own, one for each kind of work: none waits behind another, the kernel shares the processors
/// out. A merge of a day that took turns with queries that look at everything took minutes instead of seconds. Their
/// threads are not waited for when this is dropped.
#[derive(Debug, Default)]
struct Runtimes(Vec<Runtime>);

impl Runtimes {
    /// Starts one; the caller's without threads of its own.
    fn start(&mut self, settings: &Settings, name: &str, threads: usize) -> Result<Handle> {
        if !settings.own_threads {
            return Ok(Handle::current());
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(threads)
            .thread_name(name)
            .thread_stack_size(CPU_STACK_BYTES)
            .enable_all()
            .build()?;
        let handle = runtime.handle().clone();
        self.0.push(runtime);
        Ok(handle)
    }
}

impl Drop for Runtimes {
    fn drop(&mut self) {
        self.0.drain(..).for_each(Runtime::shutdown_background);
    }
}

/// Threads for upkeep: one thing is flushed and one merged at a time.
const UPKEEP_THREADS: usize = 2;

/// What turns requests into rows until the queue is closed.
#[derive(Debug)]
enum Committer {
    Thread(JoinHandle<()>),
    Task(tokio::task::JoinHandle<()>),
}

impl Committer {
    fn start(inner: Arc<Inner>) -> Result<Self> {
        if !inner.settings.own_threads {
            return Ok(Self::Task(tokio::spawn(committer::run(inner))));
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::Builder::new().name("thalweg-log".to_owned());
        Ok(Self::Thread(thread.spawn(move || runtime.block_on(committer::run(inner)))?))
    }

    /// Waits until it ends.
    async fn join(self) {
        // It has told of a panic.
        match self {
            Self::Thread(thread) => drop(tokio::task::spawn_blocking(move || thread.join()).await),
            Self::Task(task) => drop(task.await),
        }
    }
}

/// What all parts of an engine share.
#[derive(Debug)]
pub(crate) struct Inner {
    pub settings: Settings,
    pub components: Components,
    pub registry: Arc<Registry>,
    pub metrics: Arc<Metrics>,
    /// The file catalog; each change of it is followed by one of the version.
    pub files: FileCatalog,
    /// Data files and what is cached of them.
    pub segments: Arc<Segments>,
    /// Tag sets of days, through a cache.
    pub parts: TagParts,
    /// What flush and compaction remember of days.
    pub days: crate::flush::Days,
    /// What has expired.
    pub retention: crate::retention::Keeper,
    /// Objects that nothing seems to name.
    pub orphans: crate::orphans::Suspects,
    /// Read through [`Inner::version`], replaced through [`Inner::install`].
    pub version: ArcSwap<Version>,
    pub version_change: Mutex<()>,
    /// What memory is used for.
    pub memory: Memory,
    /// Requests that are not answered.
    pub arrivals: Arrivals,
    pub queue: Queue,
    /// The log. Whoever holds it sees every record either applied to memtables or not yet written.
    pub log: tokio::sync::Mutex<Wal>,
    /// What is given up when the disk is full.
    pub reserve: Reserve,
    pub metadata: Mutex<Metadata>,
    pub views: Views,
    /// Whether the last group could not be written: said once when it begins and once when it ends.
    pub log_failing: AtomicBool,
    /// Whether something of the log that is in files could not be given up, to be tried again.
    pub trim_due: AtomicBool,
    /// Held while the records of a group are applied to memtables: a snapshot sees all of them or none.
    pub applying: tokio::sync::Mutex<()>,
    /// States that are still read.
    pub snapshots: Snapshots,
    /// Held while memtables are written to files.
    pub flushing: tokio::sync::Mutex<()>,
    pub session: SessionState,
    /// Where results may be exported to.
    pub exports: Exports,
    /// Which queries may run.
    pub turns: Turns,
    /// The runtime for queries.
    pub cpu: Handle,
    /// The runtime for decoding.
    pub ingest: Handle,
    /// The runtime for flush, compaction and deletes.
    pub upkeep: Handle,
    pub stopping: CancellationToken,
}

impl Inner {
    /// The present state of all data.
    pub(crate) fn version(&self) -> Arc<Version> {
        self.version.load_full()
    }

    pub(crate) fn now_ms(&self) -> i64 {
        self.components.clock.now_ms()
    }
}

impl Engine {
    /// Opens or creates the database: loads the file catalog, replays the log, starts the committer, the flusher and
    /// the compactor.
    ///
    /// # Errors
    /// `Corrupt` for damaged files, `Unavailable` when store or catalog can't be reached.
    pub async fn open(settings: Settings, components: Components, extensions: Extensions) -> Result<Self> {
        components
            .fs
            .create_dir_all(&settings.data_dir)
            .map_err(|e| Error::from(e).context(format_args!("create data folder {}", settings.data_dir.display())))?;
        let reserve = Reserve::open(components.fs.clone(), &settings.data_dir, settings.reserve_bytes);
        let exports = Exports::open(&settings.export_locations)?;
        let store = &components.store;
        catalog::object::probe(store, &settings.database).await?;
        let described = database::open(store, &settings.database, random_seed(components.entropy.as_ref())?).await?;
        let catalog_path = settings.data_dir.join("catalog.sqlite");
        let opening = Opening {
            store: store.clone(),
            database: &settings.database,
            entropy: components.entropy.clone(),
            seed: described.seed,
            index: sql_catalog(&settings, described.seed)?,
            format1: Some(&catalog_path),
            clock: components.clock.clone(),
        };
        let (files, state) = FileCatalog::open(opening).await?;
        let memory = Memory::new(settings.memory_limit);
        let registry = Registry::new(TagHasher::new(state.seed), settings.series_limit);
        let registry = Arc::new(registry.with_bytes_max(memory.tag_sets_max()));
        let session = session::state(&settings, memory.clone(), extensions)
            .map_err(|e| Error::internal("query session can't be made").with_source(e))?;
        let (mut runtimes, threads) = (Runtimes::default(), settings.cpu_threads.max(1));
        let cpu = runtimes.start(&settings, "thalweg-cpu", threads)?;
        let ingest = runtimes.start(&settings, "thalweg-ingest", threads)?;
        let upkeep = runtimes.start(&settings, "thalweg-upkeep", UPKEEP_THREADS)?;
        let cache = settings.memory_limit / CACHE_PARTS;
        let inner = Arc::new(Inner {
            metrics: Arc::new(Metrics::new(&components.telemetry)),
            segments: Arc::new(Segments::new(components.store.clone(), &settings.database, cache)),
            parts: TagParts::new(components.store.clone(), &settings.database, registry.clone(), cache),
            days: crate::flush::Days::default(),
            retention: crate::retention::Keeper::new(&settings.retention, registry.hasher()),
            orphans: crate::orphans::Suspects::default(),
            files,
            version: ArcSwap::from_pointee(Version::new(&state, registry.hasher())),
            version_change: Mutex::new(()),
            turns: Turns::new(&settings, memory.clone()),
            memory,
            arrivals: Arrivals::default(),
            queue: Queue::default(),
            log: tokio::sync::Mutex::new(Wal::new(local_log(&settings, &components), 0)),
            reserve,
            metadata: Mutex::new(Metadata::new(&state.metadata, settings.memory_limit / METADATA_PARTS)),
            views: Views::new(&state.views),
            log_failing: AtomicBool::new(false),
            trim_due: AtomicBool::new(false),
            applying: tokio::sync::Mutex::new(()),
            snapshots: Snapshots::default(),
            flushing: tokio::sync::Mutex::new(()),
            session,
            exports,
            cpu,
            ingest,
            upkeep,
            stopping: CancellationToken::new(),
            registry,
            settings,
            components,
        });
        let tasks = TaskTracker::new();
        let mut running = Running { inner: inner.clone(), committer: Mutex::new(None), tasks, _runtimes: runtimes };
        on(&inner.cpu, read_logs(inner.clone())).await?;
        crate::retention::observe(&inner);
        *running.committer.get_mut() = Some(Committer::start(inner.clone())?);
        running.tasks.spawn_on(upkeep::run_flusher(inner.clone()), &inner.upkeep);
        running.tasks.spawn_on(upkeep::run_compactor(inner.clone()), &inner.upkeep);
        running.tasks.spawn_on(upkeep::run_follower(inner.clone()), &inner.upkeep);
        if inner.settings.own_threads {
            running.tasks.spawn_on(upkeep::warm(inner.clone()), &inner.upkeep);
        }
        running.tasks.close();
        Ok(Self { running: Arc::new(running), snapshot: None })
    }

    /// A handle that goes on reading what there is now, every acknowledged row and none of those to come, while that can be
    /// kept; see [`crate::TooOld`]. Metric metadata and [`Engine::tag_values`] stay those of the present.
    pub async fn snapshot(&self) -> Self {
        let inner = self.inner();
        let _whole = inner.applying.lock().await;
        Self { running: self.running.clone(), snapshot: Some(inner.snapshots.take(inner)) }
    }

    /// A handle that reads the present state at each look.
    #[must_use]
    pub fn present(&self) -> Self {
        Self { running: self.running.clone(), snapshot: None }
    }

    /// Whether what this handle reads can still be kept.
    ///
    /// # Errors
    /// `Unavailable` with [`crate::TooOld`] as its source.
    pub fn check_snapshot(&self) -> Result<()> {
        self.view().version().map(drop)
    }

    fn view(&self) -> View<'_> {
        View { inner: self.inner(), snapshot: self.snapshot.as_ref() }
    }

    /// The views that a snapshot has.
    pub(crate) fn frozen_views(&self) -> Option<Arc<BTreeMap<String, Arc<catalog::View>>>> {
        self.snapshot.as_ref().map(|s| s.views.clone())
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.running.inner
    }

    /// The settings it was opened with.
    pub fn settings(&self) -> &Settings {
        &self.inner().settings
    }

    /// Wall-clock time, milliseconds since the epoch.
    pub fn now_ms(&self) -> i64 {
        self.inner().now_ms()
    }

    /// Self-metrics.
    pub fn telemetry(&self) -> &Arc<Telemetry> {
        &self.inner().components.telemetry
    }

    /// The active tag sets; receivers take their encoder from it.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.inner().registry
    }

    /// Stores a request's accepted part: whole or not at all, durable and visible to the next query when this returns.
    ///
    /// # Errors
    /// `Unavailable` for any temporary condition (stopping, disk full, overload); nothing is stored then.
    pub async fn write(&self, write: Write) -> Result<()> {
        let inner = self.inner();
        committer::check(&write)?;
        inner.check_room()?;
        let answer = inner.queue.push(write, &inner.memory).inspect_err(|_| inner.metrics.limit("ingest_queue"))?;
        answer.await.map_err(|_| Error::unavailable("the database stopped before the request was stored"))?
    }

    /// Resolves matchers to the series that can have rows in a time range, against one version of the data.
    ///
    /// # Errors
    /// `LimitExceeded` when more series match than a query may touch; storage errors; those of `stop`.
    pub async fn select(&self, selection: &Selection, stop: &Stop) -> Result<Arc<SeriesSet>> {
        let found = crate::select::select(self.view(), selection, stop).await;
        found.map_err(|e| self.explain(e))
    }

    /// An error of reading, or that there is nothing to read any more.
    fn explain(&self, e: Error) -> Error {
        match &self.snapshot {
            Some(snapshot) => snapshot.explain(e),
            None => e,
        }
    }

    /// The segments, by table and day, then in order of their sequences.
    ///
    /// # Errors
    /// Those of [`Engine::check_snapshot`].
    pub fn files(&self) -> Result<Vec<(Arc<TableSchema>, Arc<DataFile>)>> {
        let version = self.view().version()?;
        let files = version.tables.iter().flat_map(|t| t.files.iter().map(|f| (t.schema.clone(), f.clone())));
        let mut files: Vec<_> = files.collect();
        files.sort_by_key(|(table, f)| (table.id, f.day, f.seq_min, f.id));
        Ok(files)
    }

    /// The rows of tag sets that another node chose.
    pub(crate) fn series_set(
        &self,
        table: Arc<TableSchema>,
        tags: Vec<TagSet>,
        start_ms: i64,
        end_ms: i64,
    ) -> Result<SeriesSet> {
        crate::select::given(self.view(), table, tags, start_ms, end_ms)
    }

    /// What of a table is in memory and not in files.
    pub fn in_memory(&self, table: &TableSchema) -> InMemory {
        let version = self.inner().version();
        let memtables = version.table(table.id).into_iter().flat_map(|t| t.memtables());
        memtables.fold(InMemory::default(), |all, m| InMemory {
            blocks: all.blocks + m.blocks(),
            times: match (all.times, m.ts_range()) {
                (Some((min, max)), Some((from, to))) => Some((min.min(from), max.max(to))),
                (known, other) => known.or(other),
            },
        })
    }

    /// Calls `visit` once for each distinct tag set that [`Engine::select`] would return, in no order, without
    /// collecting them. `visit` returns false to stop.
    ///
    /// # Errors
    /// Storage errors; those of `stop`.
    pub async fn visit(
        &self,
        selection: &Selection,
        stop: &Stop,
        visit: impl FnMut(&Arc<Series>) -> bool + Send,
    ) -> Result<()> {
        crate::select::visit(self.view(), selection, stop, visit).await.map_err(|e| self.explain(e))
    }

    /// The distinct values of a tag that all tag sets of a table have in a time range, milliseconds and both ends
    /// inclusive, in lists of which each is sorted.
    ///
    /// # Errors
    /// Storage errors.
    pub async fn tag_values(
        &self,
        table: &Arc<TableSchema>,
        tag: &str,
        (start_ms, end_ms): (i64, i64),
    ) -> Result<Vec<Arc<TagValues>>> {
        let selection = Selection { table: table.clone(), matchers: vec![], start_ms, end_ms };
        crate::select::values(self.inner(), &selection, tag).await
    }

    /// Metric metadata by metric name; all when `metric` is `None`.
    pub fn metadata(&self, metric: Option<&str>) -> Vec<MetricMetadata> {
        self.inner().metadata.lock().get(metric)
    }

    /// What sessions begin with: the configuration, the runtime with its memory limit, the functions of all languages.
    pub fn session_template(&self) -> &SessionState {
        &self.inner().session
    }

    /// A fresh session with the extensions of all languages. State set on it (variables, prepared statements) is its
    /// own.
    pub fn session(&self) -> SessionContext {
        let mut state = self.inner().session.clone();
        // Tables are registered in a list that clones share.
        state.register_catalog_list(session::catalogs(state.config()));
        // In the template it would keep itself alive.
        state.config_mut().set_extension(Arc::new(self.clone()));
        SessionContext::new_with_state(state)
    }

    /// What nodes run with that a query runs by itself, without a logical plan: its stop ends them, and what they hold
    /// counts as the query's.
    pub fn task_context(&self, query: &Query) -> Arc<TaskContext> {
        Arc::new(session::task_context(&self.inner().session, query))
    }

    /// Waits for a query's turn.
    ///
    /// # Errors
    /// `Unavailable` when too many queries run for too long or memory is scarce, `Timeout` at its deadline.
    pub async fn begin(&self, limits: QueryLimits) -> Result<Query> {
        let inner = self.inner();
        inner.memory.check(Kind::Queries).inspect_err(|_| inner.metrics.limit("query_memory"))?;
        let query = inner.turns.begin(limits).await.inspect_err(|_| inner.metrics.limit("queries"))?;
        Ok(query.at(inner.now_ms()))
    }

    /// The queries that run and that ran last.
    pub fn activities(&self) -> &Arc<Activities> {
        self.inner().turns.activities()
    }

    /// How many queries run at a time.
    pub fn queries_max(&self) -> usize {
        self.inner().turns.max()
    }

    /// Optimises, plans and runs a logical plan on the CPU runtime. Dropping the stream stops the work.
    ///
    /// # Errors
    /// Planning errors as DataFusion errors; see [`crate::error_of`]. The stream itself ends with an error of kind
    /// `Timeout` at the deadline.
    pub async fn execute(
        &self,
        state: &SessionState,
        plan: LogicalPlan,
        query: Query,
    ) -> datafusion::error::Result<SendableRecordBatchStream> {
        let inner = self.inner();
        session::execute(&inner.cpu, inner.metrics.clone(), state, plan, query).await
    }

    /// Runs a future on the CPU runtime; it is aborted when the caller goes away.
    pub async fn run<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> T {
        on(&self.inner().cpu, work).await
    }

    /// Runs a future on the CPU runtime that tidies up behind itself: when the caller goes away the token tells it so, and
    /// [`Engine::shutdown`] waits for it.
    pub async fn run_to_end<T, F>(&self, work: impl FnOnce(CancellationToken) -> F) -> T
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let left = CancellationToken::new();
        let _guard = left.clone().drop_guard();
        match self.running.tasks.spawn_on(work(left), &self.inner().cpu).await {
            Ok(value) => value,
            Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
            // The engine is gone, and whoever waits for it goes too.
            Err(_) => std::future::pending().await,
        }
    }

    /// Where results may be exported to.
    pub fn exports(&self) -> &Exports {
        &self.inner().exports
    }

    /// Begins to write an export.
    ///
    /// # Errors
    /// Those of [`Target::begin`].
    pub async fn begin_export(&self, target: &Target) -> Result<Export> {
        target.begin(self.inner().components.entropy.as_ref()).await
    }

    /// Fails when this server takes no writes any more, whoever waits: another one has taken the database over, or a
    /// panic has left it unfit to write. Queries go on, but know no newer rows.
    ///
    /// # Errors
    /// `Unavailable`.
    pub fn check_writable(&self) -> Result<()> {
        self.inner().check_writable()
    }

    /// Decodes a request off the network runtime; dropped when the caller goes away.
    pub async fn decode<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        on(&self.inner().ingest, async move { work() }).await
    }

    /// Lets a request to write so many bytes in, before they are looked at.
    ///
    /// # Errors
    /// `Unavailable` when it could not be stored now or would wait for too long.
    pub fn arrive(&self, bytes: usize) -> Result<Arrival> {
        let inner = self.inner();
        inner.check_room()?;
        inner.arrivals.arrive(bytes).inspect_err(|_| inner.metrics.limit("ingest_wait"))
    }

    /// Notes how many bytes the process has allocated, ends a query when that is too much, and says when to come again:
    /// before all that is left can be gone.
    pub fn observe(&self, allocated: usize) -> Duration {
        /// What two processors can fill in a second, with room for error.
        const BYTES_PER_SECOND: usize = 8 << 30;
        let inner = self.inner();
        inner.memory.observe(allocated);
        if let (true, none_left) = inner.memory.is_short() {
            let why = format!(
                "memory is short: {} bytes are used and memory_limit is {}; of all queries this one holds the most or has run longest",
                inner.memory.used(),
                inner.memory.limit()
            );
            if inner.turns.shed(&why, none_left) {
                inner.metrics.limit("query_memory");
            }
        }
        let until_gone = Duration::from_secs_f64(inner.memory.left() as f64 / BYTES_PER_SECOND as f64);
        until_gone.clamp(OBSERVE_MIN, OBSERVE_MAX)
    }

    /// The account of memory.
    pub fn memory(&self) -> &Memory {
        &self.inner().memory
    }

    /// Writes everything in memory to segments and commits them; returns when done.
    ///
    /// # Errors
    /// Storage errors; nothing is lost then.
    pub async fn flush(&self) -> Result<()> {
        let inner = self.inner().clone();
        on(&self.inner().upkeep, async move {
            let flush = async {
                inner.freeze(|_| true).await?;
                inner.flush_frozen().await
            };
            flush.await.inspect_err(|_| {
                inner.metrics.flush_failures.inc();
            })
        })
        .await
    }

    /// Compacts until nothing is left to do; returns when done.
    ///
    /// # Errors
    /// Storage errors; nothing is lost then.
    pub async fn compact(&self) -> Result<()> {
        let inner = self.inner().clone();
        on(&self.inner().upkeep, async move { crate::compact::all(&inner).await }).await
    }

    /// The first time of a table's rows that retention keeps of any series; rows before it need not be written.
    pub fn keeps_from_ms(&self, table: &TableSchema) -> i64 {
        self.inner().version().table(table.id).map_or(i64::MIN, |t| t.floors.least())
    }

    /// Deletes the rows of each selection that were acknowledged before; durable and no longer visible when it returns.
    /// Rows that are written from then on stay, whatever their time. Compaction frees the space.
    ///
    /// # Errors
    /// `LimitExceeded` when too many deletes wait to be folded into files; storage errors, after which nothing was
    /// deleted.
    pub async fn delete(&self, selections: Vec<Selection>) -> Result<()> {
        let inner = self.inner().clone();
        on(&self.inner().upkeep, async move { crate::delete::delete(&inner, selections).await }).await
    }

    /// Writes all files that deletes concern again, without the deleted rows.
    ///
    /// # Errors
    /// Storage errors; nothing is lost then.
    pub async fn fold_deletes(&self) -> Result<()> {
        let inner = self.inner().clone();
        on(&self.inner().upkeep, async move { crate::compact::fold_deletes(&inner).await }).await
    }

    /// Refuses further writes, stores those that wait and flushes what fits within `within`, and stops all tasks, in a
    /// second more at most. What was not flushed is in the synced log; writes that were not stored are refused.
    ///
    /// # Errors
    /// Storage errors of the last flush.
    pub async fn shutdown(&self, within: Duration) -> Result<()> {
        let inner = self.inner();
        let deadline = Instant::now() + within;
        inner.queue.close();
        let committer = self.running.committer.lock().take();
        // It ends by itself once the queue is empty.
        if let Some(committer) = committer
            && timeout_at(deadline, committer.join()).await.is_err()
        {
            tracing::warn!("the log took no more writes in time; those that wait are refused");
            inner.queue.refuse("the database stopped before the request was stored");
        }
        inner.stopping.cancel();
        let result = match timeout_at(deadline, self.flush()).await {
            Ok(result) => result,
            Err(_) => {
                tracing::info!("flush at shutdown ran out of time; the rest stays in the log");
                Ok(())
            }
        };
        // A flush or compaction that is under way either commits or leaves nothing behind but unnamed objects.
        let end = Instant::now() + END_WITHIN;
        let under_way = async {
            self.running.tasks.wait().await;
            drop(inner.flushing.lock().await);
        };
        let _ = timeout_at(end, under_way).await;
        // Though there be no time left, what waits for the store is told.
        let _ = timeout_at(end, inner.files.close()).await;
        result
    }
}

/// What of a table is in memory and not in files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InMemory {
    /// Blocks of packed samples.
    pub blocks: u64,
    /// Least and greatest time, milliseconds since the epoch; `None` without any row.
    pub times: Option<(i64, i64)>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.inner.queue.close();
        self.inner.stopping.cancel();
    }
}

/// The SQL catalog that the settings name.
///
/// # Errors
/// `Invalid` for a URL that is not one of PostgreSQL.
pub fn sql_catalog(settings: &Settings, seed: u64) -> Result<Option<Box<dyn Index>>> {
    let slash = if settings.store_location.ends_with('/') { "" } else { "/" };
    let data_path = format!("{}{slash}{}/", settings.store_location, settings.database);
    Ok(match &settings.catalog {
        SqlCatalog::None => None,
        SqlCatalog::DataDir => {
            Some(Box::new(SqlIndex::sqlite(&settings.data_dir.join("catalog.sqlite"), &data_path, seed)))
        }
        SqlCatalog::Postgres(url) => Some(Box::new(SqlIndex::postgres(url.expose(), &data_path, seed)?)),
    })
}

/// The seed of a new database; used once in its life.
fn random_seed(entropy: &dyn Entropy) -> Result<u64> {
    let mut seed = [0; 8];
    entropy.fill(&mut seed)?;
    Ok(u64::from_le_bytes(seed))
}

/// Runs a future on another runtime; it is aborted when the caller goes away.
async fn on<T: Send + 'static>(runtime: &Handle, work: impl Future<Output = T> + Send + 'static) -> T {
    match AbortOnDropHandle::new(runtime.spawn(work)).await {
        Ok(value) => value,
        Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
        // The engine is gone, and whoever waits for it goes too.
        Err(_) => std::future::pending().await,
    }
}

fn local_log(settings: &Settings, components: &Components) -> Storage {
    Storage::local(components.fs.clone(), &settings.data_dir.join("wal"))
}

fn log_storage(inner: &Inner, place: LogStore) -> Storage {
    match place {
        LogStore::Local => local_log(&inner.settings, &inner.components),
        LogStore::Object => Storage::objects(inner.components.store.clone(), &inner.settings.database),
    }
}

/// Applies what the log holds to empty memtables and opens it. There may be records in the other place that a log can be
/// in, since the setting was changed or this machine had the database before: they go to files, the older log first.
///
/// # Errors
/// `Invalid` when a newer version wrote a log; of the storage.
async fn read_logs(inner: Arc<Inner>) -> Result<()> {
    let (here, elsewhere) = match inner.settings.wal {
        LogStore::Local => (LogStore::Local, LogStore::Object),
        LogStore::Object => (LogStore::Object, LogStore::Local),
    };
    let epoch = inner.files.epoch();
    if let Some(other) = log_storage(&inner, elsewhere).holds(epoch).await? {
        let ours_first = log_storage(&inner, here).holds(epoch).await?.is_some_and(|ours| ours < other);
        for place in ours_first.then_some(here).into_iter().chain([elsewhere]) {
            tracing::info!(log = ?place, "there was a log in another place than the settings name; all logs so far go to files");
            replay(inner.clone(), Replay::open(log_storage(&inner, place), epoch).await?).await?;
            let _one = inner.flushing.lock().await;
            inner.flush_all_of_log().await?;
        }
    }
    let log = Replay::open(log_storage(&inner, here), epoch).await?;
    if here == LogStore::Object {
        // A server with a local log that opened the database since then did not see this log, and put no fence into it.
        inner.files.confirm().await?;
    }
    replay(inner, log).await
}

/// Applies what the log holds to empty memtables, flushing when they grow too large, and opens the log behind it. On a
/// full disk they may grow as large as they may at all: only who can read and delete can make room.
async fn replay(inner: Arc<Inner>, mut log: Replay) -> Result<()> {
    let (mut rows, mut damaged, mut full) = (0, 0, false);
    let second = committer::second(inner.now_ms());
    let registry = inner.registry.clone();
    let mut publish = move |tags| registry.publish(&Arc::new(Series::new(registry.hasher(), tags)), &[], second);
    while let Some(item) = log.next(&mut publish).await? {
        match item {
            Item::Record(position, record) => {
                rows += apply(&inner, &record, log.ordinals(), position)?;
            }
            Item::Lost(segment, position, e) => {
                damaged += 1;
                tracing::error!(segment, position, error = %e, "log record is lost");
            }
            Item::Damage(d) if d.tail => {
                // A crash cut a write short that was never acknowledged.
                tracing::info!(segment = d.chunk, bytes = d.end - d.start, "end of log is cut off");
            }
            Item::Damage(d) => {
                damaged += 1;
                tracing::error!(
                    segment = d.chunk,
                    from = d.start,
                    to = d.end,
                    "log is damaged; records there are lost"
                );
            }
        }
        let version = inner.version();
        inner.note_memory();
        let large = version.tables.iter().any(|t| t.active.bytes() >= inner.settings.flush_bytes)
            || version.memory() > inner.memtable_bytes_soft()
            || inner.memory.is_scarce();
        let due = if full { version.memory() > inner.memtable_bytes_hard() } else { large };
        if due {
            inner.freeze(|_| true).await?;
            // The log is not open yet, so nothing of it is trimmed here.
            if let Err(e) = inner.flush_frozen().await {
                inner.reserve.suspect();
                if full || !inner.reserve.is_full() {
                    return Err(e);
                }
                tracing::error!(error = %e, "rows of the log stay in memory until the disk has room");
                full = true;
            }
        }
    }
    inner.metrics.wal_damaged.inc_by(damaged);
    let log = log.finish()?;
    inner.measure(&log);
    *inner.log.lock().await = log;
    if rows > 0 {
        tracing::info!(rows, series = inner.registry.len(), "log replayed");
    }
    Ok(())
}

fn apply(inner: &Inner, record: &Record, ordinals: &[catalog::Ordinal], position: u64) -> Result<u64> {
    let version = inner.version();
    let now_ms = inner.now_ms();
    let mut rows = 0;
    for batch in record.batches.iter().filter(|b| b.rows.num_rows() > 0) {
        let Some(table) = version.table(batch.table.id) else { continue };
        table.active.note_position(position, now_ms);
        table.active.append(ordinals, &batch.rows)?;
        rows += batch.rows.num_rows() as u64;
    }
    inner.metadata.lock().apply(&record.metadata, position);
    Ok(rows)
}

#[cfg(test)]
mod tests;
