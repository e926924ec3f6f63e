//! `thalweg serve`: opens what the server consists of, wires it, and stops it in reverse.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use access::{Access, Credentials, Routes, Scope};
use anyhow::{Context, Result, bail};
use axum::routing::any_service;
use catalog::fs::Disk;
use catalog::{FileSystem, SystemClock, SystemEntropy};
use engine::{Components, Engine, ListedSetting, LogStore, Retention, Settings, SqlCatalog, Telemetry};
use receivers::body::Bodies;
use receivers::prometheus::Replicas;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::admin::{self, Gate};
use crate::config::{Config, Listen, LogFormat, LogPlace};
use crate::reload::{self, Seen, Watched};
use crate::tls::{self, Tls};
use crate::{http, memory, notify, print};

/// What a stop may spend on requests that wait for the log and on writing memory to data files; the rest is in the log.
const FLUSH_WITHIN: Duration = Duration::from_secs(7);
/// What a stop may spend on connections that end by themselves.
const LISTENERS_WITHIN: Duration = Duration::from_secs(2);
/// Room in the data folder that is set aside for a full disk.
const RESERVE_BYTES: u64 = 32 << 20;
/// Threads of the network runtime. Decoding and queries run elsewhere.
const NETWORK_THREADS: usize = 2;
/// Stack of each: statements and plans are dropped here, and freeing a deep tree recurses. Only what is used takes memory.
const NETWORK_STACK_BYTES: usize = 16 << 20;

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// Whatever keeps the server from starting, and failures of the last flush.
pub fn run(config: &Config) -> Result<()> {
    log_to_stderr(config);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(NETWORK_THREADS)
        .thread_name("network")
        .thread_stack_size(NETWORK_STACK_BYTES)
        .enable_all()
        .build()
        .context("cannot start the network runtime")?;
    let result = runtime.block_on(serve(config));
    // What still runs here is a connection that would not end; it must not hold up the exit.
    runtime.shutdown_background();
    result
}

fn log_to_stderr(config: &Config) {
    // The text was checked when the settings were read.
    let filter = EnvFilter::try_new(&config.log.0).unwrap_or_else(|_| EnvFilter::new("info"));
    // Whatever the setting says: at finer levels these write what clients send, credentials among it.
    let careful = filter_fn(|line| {
        let talks = ["h2", "hyper", "pgwire", "rustls", "reqwest", "sqlx"];
        *line.level() <= tracing::Level::INFO || !talks.iter().any(|name| line.target().starts_with(name))
    });
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
    match config.log_format {
        LogFormat::Text => lines.finish().with(careful).init(),
        LogFormat::Json => lines.json().finish().with(careful).init(),
    }
    std::panic::set_hook(Box::new(|panic| {
        let backtrace = std::backtrace::Backtrace::capture();
        tracing::error!(%panic, %backtrace, "a bug: a thread panicked");
    }));
}

async fn serve(config: &Config) -> Result<()> {
    let mut stop = Stop::new()?;
    let mut watched = Vec::new();
    let access = access(config, &mut watched)?;
    let tls = encryption(config, &mut watched)?;
    let _lock = claim(&config.data_dir)?;
    let listeners = Listeners::bind(config).await?;
    listeners.announce(config)?;

    let telemetry = Arc::new(Telemetry::default());
    telemetry.register("access_denied", "Requests denied, by reason", access.denied());
    let stopping = CancellationToken::new();
    let gate = Gate::new(stopping.clone(), Arc::clone(&telemetry), access.clone());
    let mut tasks = JoinSet::new();
    let (router, http_tls, token) = (gate.clone().router(), tls.clone(), stopping.clone());
    let connections = http::connections_max(memory_limit(config));
    tasks.spawn(async move {
        http::serve(listeners.http, router, http_tls, connections, token).await;
        Ok(())
    });
    let (self_metrics, token) = (Arc::clone(&telemetry), stopping.clone());
    tasks.spawn(async move { reload::run(watched, &self_metrics, token).await });

    let engine = tokio::select! {
        engine = open(config, telemetry) => engine?,
        () = stop.signal() => return Ok(()),
    };
    memory::watch(engine.clone(), stopping.clone()).context("cannot watch the memory")?;
    if let Some(listener) = listeners.postgres {
        let (engine, access, token) = (engine.clone(), access.clone(), stopping.clone());
        let encryption = tls.clone().map(|tls| sql::pg::Encryption {
            acceptor: Box::new(move || tls.postgres()),
            // A client that does not encrypt shows no certificate.
            required: config.postgres_tls_required.0 || !config.tls_client_ca.is_empty(),
        });
        tasks.spawn(async move { Ok(sql::pg::serve(listener, engine, access, encryption, token).await?) });
    }
    if let Some(listener) = listeners.grpc {
        let routes = sql::flight::routes(&engine)?;
        tasks.spawn(grpc(listener, routes, access, tls, connections, stopping.clone()));
    }
    gate.open(engine.clone(), routes(&engine, config)?, config);
    tracing::info!("ready");
    notify::tell(notify::READY);

    let failed = tokio::select! {
        () = stop.signal() => None,
        ended = tasks.join_next() => Some(ended),
    };
    tracing::info!("stopping");
    notify::tell(notify::STOPPING);
    stopping.cancel();
    let stopped = async {
        let ended = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(LISTENERS_WITHIN, ended).await.is_err() {
            tracing::warn!("connections that do not end are left");
            tasks.abort_all();
        }
        engine.shutdown(FLUSH_WITHIN).await
    };
    tokio::select! {
        result = stopped => result.context("cannot write everything to data files; what is missing there is in the log")?,
        // Whoever asks twice wants it at once; the log has all that was acknowledged.
        () = stop.signal() => return Ok(()),
    }
    match failed {
        None => Ok(()),
        Some(ended) => bail!("a listener ended by itself: {ended:?}"),
    }
}

/// Refuses settings with which the server would not start, as far as that can be told without opening anything.
///
/// # Errors
/// Those of a start.
pub fn check(config: &Config) -> Result<()> {
    let mut watched = Vec::new();
    access(config, &mut watched)?;
    encryption(config, &mut watched)?;
    // The seed belongs to the database and decides nothing here.
    engine::sql_catalog(&settings(config)?, 0)?;
    Ok(())
}

/// Who may use the server, kept up to date with its file.
fn access(config: &Config, watched: &mut Vec<Watched>) -> Result<Access> {
    if config.auth_file.is_empty() {
        return Ok(Access::open());
    }
    let path = std::path::PathBuf::from(&config.auth_file);
    let file = path.clone();
    let load = move || -> Result<Credentials> {
        let text =
            std::fs::read_to_string(&file).with_context(|| format!("cannot read auth_file {}", file.display()))?;
        Credentials::parse(&text).with_context(|| format!("in auth_file {}", file.display()))
    };
    let seen = Seen::now(vec![path]);
    let access = Access::with(load()?);
    let of_entry = access.clone();
    watched.push(Watched::new("auth_file", seen, move || {
        of_entry.replace(load()?);
        Ok(())
    }));
    Ok(access)
}

/// What encrypts connections, kept up to date with its files.
fn encryption(config: &Config, watched: &mut Vec<Watched>) -> Result<Option<Arc<Tls>>> {
    let Some(files) = tls::Files::of(config)? else { return Ok(None) };
    let seen = Seen::now(files.paths());
    let tls = Arc::new(Tls::open(files)?);
    let of_entry = Arc::clone(&tls);
    watched.push(Watched::new("tls", seen, move || of_entry.reload()));
    Ok(Some(tls))
}

/// All paths of the HTTP listener that need the database.
fn routes(engine: &Engine, config: &Config) -> Result<Routes> {
    let bodies = Bodies::new(engine.memory().clone());
    let (cluster, replica) = (&config.ha_cluster_label, &config.ha_replica_label);
    let replicas = Replicas::new(cluster, replica, config.ha_failover.duration(), engine.telemetry());
    Ok(Routes::new()
        .merge(receivers::prometheus::routes(engine.clone(), bodies, replicas))
        .merge(promql::api::routes(engine.clone(), of_promql(config)))
        .merge(sql::http::routes(engine)?)
        .merge(admin::routes(engine.clone())))
}

/// How PromQL is evaluated.
fn of_promql(config: &Config) -> promql::Settings {
    let limits = promql::Limits {
        samples_max: config.query_samples_max as usize,
        points_max: config.query_points_max as usize,
        subquery_steps_max: config.query_subquery_steps_max as usize,
        read_samples_max: config.remote_read_samples_max as usize,
    };
    let lookback_ms = config.query_lookback.duration().as_millis() as i64;
    promql::Settings { lookback_ms, features: config.promql_features, limits }
}

async fn open(config: &Config, telemetry: Arc<Telemetry>) -> Result<Engine> {
    let (settings, components) = parts(config, telemetry)?;
    let extensions = promql::extensions(of_promql(config)).and(sql::extensions());
    Engine::open(settings, components, extensions).await.context("cannot open the database")
}

/// What an engine is opened with.
///
/// # Errors
/// For an object store that can't be used.
pub fn parts(config: &Config, telemetry: Arc<Telemetry>) -> Result<(Settings, Components)> {
    let url = config.object_store_url();
    let fs: Arc<dyn FileSystem> = Arc::new(Disk);
    let store = catalog::object::open(&fs, &url).context("cannot open the object store")?;
    let components =
        Components { store, fs, clock: Arc::new(SystemClock), entropy: Arc::new(SystemEntropy), telemetry };
    Ok((settings(config)?, components))
}

/// What the process may take in all, bytes.
fn memory_limit(config: &Config) -> usize {
    let bytes = match config.memory_limit.0 {
        0 => memory::available() / 10 * 6,
        bytes => bytes,
    };
    bytes as usize
}

/// The engine's settings. Sizes that follow from the memory limit are not settings of their own.
///
/// # Errors
/// For an object store whose name says nothing.
pub fn settings(config: &Config) -> Result<Settings> {
    let memory = memory_limit(config) as u64;
    let threads = match config.cpu_threads {
        0 => std::thread::available_parallelism().map_or(2, usize::from),
        threads => threads as usize,
    };
    Ok(Settings {
        store_location: catalog::object::location(&config.object_store_url())?,
        data_dir: config.data_dir.clone(),
        catalog: if config.catalog.is_empty() {
            SqlCatalog::DataDir
        } else {
            SqlCatalog::Postgres(config.catalog.clone())
        },
        memory_limit: memory as usize,
        series_limit: config.series_limit as usize,
        future_max: config.future_max.duration(),
        flush_bytes: (memory / 8).min(128 << 20) as usize,
        flush_interval: config.flush_interval.duration(),
        wal: match config.wal {
            LogPlace::Local => LogStore::Local,
            LogPlace::Object => LogStore::Object,
        },
        reserve_bytes: RESERVE_BYTES,
        wal_bytes_max: (memory / 4).min(512 << 20),
        delete_grace: config.delete_grace.duration(),
        retention: Retention {
            age: config.retention.limit(),
            rules: config.retention_rules.rules.clone(),
            bytes: Some(config.retention_bytes.0).filter(|bytes| *bytes > 0),
        },
        query_timeout: config.query_timeout.duration(),
        queries_max: config.queries_max as usize,
        query_wait_max: config.query_wait_max.duration(),
        query_memory_max: config.query_memory_max.0 as usize,
        query_series_max: config.query_series_max as usize,
        export_locations: config.export_locations.0.clone(),
        cpu_threads: threads,
        listed: listed(config),
        ..Settings::default()
    })
}

/// All settings as SQL lists them.
fn listed(config: &Config) -> Vec<ListedSetting> {
    let values = config.shown().into_iter().map(|(_, value)| value);
    let described = Config::fields().into_iter().zip(values);
    described
        .map(|(field, value)| ListedSetting {
            name: field.name.to_owned(),
            value,
            default: field.default,
            description: field.doc.split_whitespace().collect::<Vec<_>>().join(" "),
        })
        .collect()
}

/// Creates the data folder and takes it for this process alone. The kernel gives it back when the process ends,
/// however it ends.
pub fn claim(data_dir: &Path) -> Result<File> {
    std::fs::create_dir_all(data_dir).with_context(|| format!("cannot create data folder {}", data_dir.display()))?;
    let path = data_dir.join("lock");
    let lock = File::create(&path).with_context(|| format!("cannot write to data folder {}", data_dir.display()))?;
    lock.try_lock().with_context(|| format!("data folder {} is in use by another server", data_dir.display()))?;
    Ok(lock)
}

struct Listeners {
    http: TcpListener,
    grpc: Option<TcpListener>,
    postgres: Option<TcpListener>,
}

impl Listeners {
    async fn bind(config: &Config) -> Result<Self> {
        let Some(http) = bind("http", &config.http).await? else { bail!("http must be an address") };
        let grpc = bind("grpc", &config.grpc).await?;
        let postgres = bind("postgres", &config.postgres).await?;
        Ok(Self { http, grpc, postgres })
    }

    /// The first lines: where to send, where to ask, where data lie.
    fn announce(&self, config: &Config) -> Result<()> {
        let http = self.http.local_addr()?;
        let data_dir = std::fs::canonicalize(&config.data_dir)?;
        print::line(format_args!("thalweg {}", env!("CARGO_PKG_VERSION")))?;
        let scheme = if config.tls_cert.is_empty() { "http" } else { "https" };
        print::line(format_args!("send    Prometheus remote write   {scheme}://{http}/api/v1/write"))?;
        print::line(format_args!("ask     Prometheus API, Grafana   {scheme}://{http}"))?;
        print::line(format_args!("        SQL over HTTP             {scheme}://{http}/api/v1/sql"))?;
        if let Some(postgres) = &self.postgres {
            let address = postgres.local_addr()?;
            print::line(format_args!("        SQL, PostgreSQL clients   postgres://{address}/thalweg"))?;
        }
        if let Some(grpc) = &self.grpc {
            let address = grpc.local_addr()?;
            print::line(format_args!("        SQL, Arrow Flight         grpc://{address}"))?;
            print::line(format_args!("health  gRPC                      {address}"))?;
        }
        let objects = match config.object_store.as_str() {
            "" => data_dir.join("objects").display().to_string(),
            url => catalog::object::location(url)?,
        };
        print::line(format_args!("data    {} (data files: {objects})", data_dir.display()))
    }
}

async fn bind(name: &str, listen: &Listen) -> Result<Option<TcpListener>> {
    let Some(address) = listen.address() else { return Ok(None) };
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen at {address}; choose another address with --{name}"))?;
    Ok(Some(listener))
}

/// The gRPC listener: the health service and Arrow Flight SQL, until receivers join them.
///
/// gRPC clients read an HTTP status where there is no gRPC status, so that unknown methods and denied requests need
/// nothing of their own.
async fn grpc(
    listener: TcpListener,
    flight: Routes,
    access: Access,
    tls: Option<Arc<Tls>>,
    connections: usize,
    stopping: CancellationToken,
) -> Result<()> {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;
    let routes =
        Routes::new().route(Scope::Public, "/grpc.health.v1.Health/{method}", any_service(health)).merge(flight);
    http::serve(listener, routes.behind(access), tls, connections, stopping).await;
    Ok(())
}

/// SIGTERM and SIGINT.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn new() -> Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn signal(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
