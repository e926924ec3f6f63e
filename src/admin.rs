//! What an operator and an orchestrator ask: `/-/healthy`, `/-/ready`, `/metrics`, flush and compaction on request.
//!
//! The listener opens before the database does, so that a probe gets an answer while a log is replayed. Until then, and
//! again while stopping, every other path answers 503 with Retry-After.

use std::fmt::Write as _;
use std::sync::{Arc, OnceLock};

use access::{Access, Declared, Routes, Scope};
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use engine::{Engine, Error, ErrorKind, Telemetry};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use crate::config::Config;
use crate::memory;

/// The way from the listener to what is behind it, if it is there.
#[derive(Debug, Clone)]
pub struct Gate {
    behind: Arc<OnceLock<Behind>>,
    stopping: CancellationToken,
    telemetry: Arc<Telemetry>,
    access: Access,
}

/// What there is once the database is open.
#[derive(Debug)]
struct Behind {
    engine: Engine,
    router: Router,
}

impl Gate {
    /// A gate that is closed until [`Gate::open`], and again from the moment `stopping` is cancelled.
    pub fn new(stopping: CancellationToken, telemetry: Arc<Telemetry>, access: Access) -> Self {
        Self { behind: Arc::default(), stopping, telemetry, access }
    }

    /// Lets requests through to `routes`, and to two more that describe the server. The first call counts.
    pub fn open(&self, engine: Engine, routes: Routes, config: &Config) {
        let router = described(routes, config).behind(self.access.clone());
        let _ = self.behind.set(Behind { engine, router });
    }

    fn closed(&self) -> Option<Response> {
        let why = if self.stopping.is_cancelled() {
            "stopping"
        } else if self.behind.get().is_none() {
            "starting: the log is being replayed"
        } else {
            return None;
        };
        Some(unavailable(why))
    }

    /// The router of the listener.
    pub fn router(self) -> Router {
        let access = self.access.clone();
        probes().with_state(self.clone()).behind(access).fallback(move |request| through(self.clone(), request))
    }
}

/// The routes that are there before the database is.
fn probes() -> Routes<Gate> {
    Routes::new()
        .route(Scope::Public, "/-/healthy", get(|| async { "healthy\n" }))
        .route(Scope::Public, "/-/ready", get(ready))
        .route(Scope::Read, "/metrics", get(metrics))
}

/// Adds what shows the settings, and all routes with their scopes.
fn described(routes: Routes, config: &Config) -> Routes {
    const CONFIG: &str = "/api/v1/status/config";
    const ROUTES: &str = "/api/v1/admin/routes";
    let settings: String = config.shown().iter().map(|(name, value)| format!("{name}: {}\n", json!(value))).collect();
    let settings = json!({ "status": "success", "data": { "yaml": settings } });
    let routes = routes.route(Scope::Admin, CONFIG, get(move || async move { Json(settings) }));
    let mut table = [routes.table(), probes().table()].concat();
    table.push(Declared { path: ROUTES.to_owned(), scope: Scope::Admin });
    table.sort();
    let lines: Vec<Value> = table.iter().map(|d| json!({ "path": d.path, "scope": d.scope.name() })).collect();
    let table = json!({ "status": "success", "data": lines });
    routes.route(Scope::Admin, ROUTES, get(move || async move { Json(table) }))
}

async fn ready(State(gate): State<Gate>) -> Response {
    match (gate.closed(), gate.behind.get()) {
        (Some(closed), _) => closed,
        // Queries go on, but whoever sends data or expects the newest must go to another server.
        (None, Some(behind)) => match behind.engine.check_writable() {
            Ok(()) => "ready\n".into_response(),
            Err(e) => unavailable(e.message()),
        },
        (None, None) => "ready\n".into_response(),
    }
}

fn unavailable(why: &str) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "1")], format!("{why}\n")).into_response()
}

async fn through(gate: Gate, request: Request) -> Response {
    match (gate.closed(), gate.behind.get()) {
        (None, Some(behind)) => behind.router.clone().oneshot(request).await.unwrap_or_else(|never| match never {}),
        (closed, _) => closed.unwrap_or_else(|| StatusCode::SERVICE_UNAVAILABLE.into_response()),
    }
}

async fn metrics(State(gate): State<Gate>) -> Response {
    let mut text = gate.telemetry.encode();
    if text.ends_with("# EOF\n") {
        text.truncate(text.len() - "# EOF\n".len());
    }
    process(&mut text);
    text.push_str("# EOF\n");
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response()
}

/// Build, processor and memory of this process, under the names that every Prometheus client library uses.
fn process(out: &mut String) {
    let mut metric = |name: &str, kind: &str, help: &str, labels: &str, value: f64| {
        let suffix = if kind == "counter" { "_total" } else { "" };
        // Writing into a String does not fail.
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name}{suffix}{labels} {value}");
    };
    let version = format!("{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"));
    metric("thalweg_build_info", "gauge", "The version that runs.", &version, 1.0);
    let Some(usage) = memory::Process::read() else { return };
    metric("process_cpu_seconds", "counter", "User and system processor time.", "", usage.cpu_seconds);
    metric("process_resident_memory_bytes", "gauge", "Resident memory.", "", usage.resident as f64);
    metric("process_open_fds", "gauge", "Open file descriptors.", "", usage.open_files as f64);
    metric("process_threads", "gauge", "Threads.", "", usage.threads as f64);
}

/// Flush and compaction on request; both return when done.
pub fn routes(engine: Engine) -> Routes {
    let flush = post(|State(engine): State<Engine>| async move { done(engine.flush().await) });
    let compact = post(|State(engine): State<Engine>| async move { done(engine.compact().await) });
    Routes::new()
        .route(Scope::Admin, "/api/v1/admin/flush", flush)
        .route(Scope::Admin, "/api/v1/admin/compact", compact)
        .with_state(engine)
}

fn done(result: Result<(), Error>) -> Response {
    match result {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(error) => {
            tracing::error!(%error, "administration request failed");
            let status = match error.kind() {
                ErrorKind::Unavailable | ErrorKind::LimitExceeded => StatusCode::SERVICE_UNAVAILABLE,
                ErrorKind::Timeout => StatusCode::GATEWAY_TIMEOUT,
                _ => StatusCode::INTERNAL_SERVER_ERROR,
            };
            (status, format!("{error}\n")).into_response()
        }
    }
}
