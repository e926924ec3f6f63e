//! `thalweg serve`: opens what the server consists of, wires it, and stops it in reverse.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use axum::Router;
use catalog::fs::Disk;
use catalog::{FileSystem, SystemClock, SystemEntropy};
use engine::{Components, Engine, Retention, Settings, Telemetry};
use promql::api::ApiOptions;
use receivers::body::Bodies;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::admin::{self, Gate};
use crate::config::{Config, Listen, LogFormat};
use crate::{http, memory};

/// What a stop may spend on writing memory to data files; the rest is in the log.
const FLUSH_WITHIN: Duration = Duration::from_secs(8);
/// Threads of the network runtime. Decoding and queries run elsewhere.
const NETWORK_THREADS: usize = 2;

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// Whatever keeps the server from starting, and failures of the last flush.
pub fn run(config: &Config) -> Result<()> {
    log_to_stderr(config);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(NETWORK_THREADS)
        .thread_name("network")
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
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
    match config.log_format {
        LogFormat::Text => lines.init(),
        LogFormat::Json => lines.json().init(),
    }
    std::panic::set_hook(Box::new(|panic| {
        let backtrace = std::backtrace::Backtrace::capture();
        tracing::error!(%panic, %backtrace, "a bug: a thread panicked");
    }));
}

async fn serve(config: &Config) -> Result<()> {
    let mut stop = Stop::new()?;
    let _lock = claim(&config.data_dir)?;
    let listeners = Listeners::bind(config).await?;
    listeners.announce(config)?;

    let telemetry = Arc::new(Telemetry::default());
    let stopping = CancellationToken::new();
    let gate = Gate::new(stopping.clone(), Arc::clone(&telemetry));
    let mut tasks = JoinSet::new();
    let (router, token) = (gate.clone().router(), stopping.clone());
    tasks.spawn(async move {
        http::serve(listeners.http, router, token).await;
        Ok(())
    });

    let engine = tokio::select! {
        engine = open(config, telemetry) => engine?,
        () = stop.signal() => return Ok(()),
    };
    if let Some(listener) = listeners.postgres {
        let (engine, token) = (engine.clone(), stopping.clone());
        tasks.spawn(async move { Ok(sql::pg::serve(listener, engine, token).await?) });
    }
    if let Some(listener) = listeners.grpc {
        tasks.spawn(grpc(listener, stopping.clone()));
    }
    gate.open(routes(&engine)?);
    tracing::info!("ready");

    let failed = tokio::select! {
        () = stop.signal() => None,
        ended = tasks.join_next() => Some(ended),
    };
    tracing::info!("stopping");
    stopping.cancel();
    let stopped = async {
        while tasks.join_next().await.is_some() {}
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

/// All paths of the HTTP listener that need the database.
fn routes(engine: &Engine) -> Result<Router> {
    // Bodies in flight are memory that no query can have.
    let bodies = Bodies::new(engine.settings().memory_limit / 8);
    Ok(Router::new()
        .merge(receivers::prometheus::routes(engine.clone(), bodies))
        .merge(promql::api::routes(engine.clone(), ApiOptions::default()))
        .merge(sql::http::routes(engine)?)
        .merge(admin::routes(engine.clone())))
}

async fn open(config: &Config, telemetry: Arc<Telemetry>) -> Result<Engine> {
    let url = config.object_store_url();
    let fs: Arc<dyn FileSystem> = Arc::new(Disk);
    let store = catalog::object::open(&fs, &url).with_context(|| format!("cannot open the object store {url}"))?;
    let components =
        Components { store, fs, clock: Arc::new(SystemClock), entropy: Arc::new(SystemEntropy), telemetry };
    let extensions = promql::extensions().and(sql::extensions());
    let settings = Settings { store_location: catalog::object::location(&url)?, ..settings(config) };
    Engine::open(settings, components, extensions).await.context("cannot open the database")
}

/// The engine's settings. Sizes that follow from the memory limit are not settings of their own.
fn settings(config: &Config) -> Settings {
    let memory = match config.memory_limit.0 {
        0 => memory::available() / 2,
        bytes => bytes,
    };
    let threads = match config.cpu_threads {
        0 => std::thread::available_parallelism().map_or(2, usize::from),
        threads => threads as usize,
    };
    Settings {
        data_dir: config.data_dir.clone(),
        memory_limit: memory as usize,
        series_limit: config.series_limit as usize,
        future_max: config.future_max.duration(),
        flush_bytes: (memory / 8).min(128 << 20) as usize,
        flush_interval: config.flush_interval.duration(),
        wal_bytes_max: (memory / 4).min(512 << 20),
        delete_grace: config.delete_grace.duration(),
        retention: Retention {
            age: config.retention.limit(),
            rules: config.retention_rules.rules.clone(),
            bytes: Some(config.retention_bytes.0).filter(|bytes| *bytes > 0),
        },
        query_timeout: config.query_timeout.duration(),
        cpu_threads: threads,
        ..Settings::default()
    }
}

/// Creates the data folder and takes it for this process alone. The kernel gives it back when the process ends,
/// however it ends.
fn claim(data_dir: &Path) -> Result<File> {
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
        println!("thalweg {}", env!("CARGO_PKG_VERSION"));
        println!("send    Prometheus remote write   http://{http}/api/v1/write");
        println!("ask     Prometheus API, Grafana   http://{http}");
        println!("        SQL over HTTP             http://{http}/api/v1/sql");
        if let Some(postgres) = &self.postgres {
            let address = postgres.local_addr()?;
            println!("        SQL, PostgreSQL clients   postgres://{address}/thalweg");
        }
        if let Some(grpc) = &self.grpc {
            println!("health  gRPC                      {}", grpc.local_addr()?);
        }
        let objects = match config.object_store.as_str() {
            "" => data_dir.join("objects").display().to_string(),
            url => url.to_owned(),
        };
        println!("data    {} (data files: {objects})", data_dir.display());
        Ok(())
    }
}

async fn bind(name: &str, listen: &Listen) -> Result<Option<TcpListener>> {
    let Some(address) = listen.address() else { return Ok(None) };
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen at {address}; choose another address with --{name}"))?;
    Ok(Some(listener))
}

/// The gRPC listener: the health service, until receivers join it.
async fn grpc(listener: TcpListener, stopping: CancellationToken) -> Result<()> {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;
    let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
    let server = tonic::transport::Server::builder().add_service(health);
    server.serve_with_incoming_shutdown(incoming, stopping.cancelled()).await.context("the gRPC listener failed")
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
