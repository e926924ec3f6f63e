//! The Prometheus HTTP API: everything under `/api/v1` that reads.
//!
//! Envelopes, statuses, parameters and the wording of errors are those of Prometheus 3, because dashboards, alerting
//! and command-line clients depend on them. An endpoint is a function from a [`params::Form`] to a [`reply::Reply`];
//! what can fail is a [`crate::QueryError`], which [`reply`] alone turns into a status. Answers are written straight
//! into bytes by [`json`].
//!
//! A request that its client abandons is dropped by the server together with the query that it waits for.

mod exemplars;
mod json;
mod params;
mod query;
mod reply;
mod series;
mod status;

use std::future::Future;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{Method, header};
use axum::routing::{MethodRouter, get};
use engine::Engine;
use tokio::sync::Semaphore;
use tower_http::CompressionLevel;
use tower_http::compression::CompressionLayer;
use tower_http::compression::predicate::SizeAbove;
use tower_http::cors::{Any, CorsLayer};

use self::params::Form;
use self::reply::{Failure, Reply};
use crate::error::Result;
use crate::options::Features;

/// Answers shorter than this many bytes are sent as they are: they fit into a packet.
const COMPRESSED_BYTES_MIN: u64 = 1400;

/// How the API evaluates queries.
#[derive(Debug, Clone)]
pub struct ApiOptions {
    /// How far an instant selector looks back when the request does not say, in milliseconds.
    pub lookback_ms: i64,
    /// Most samples that one query may hold in memory at a time.
    pub samples_max: usize,
    /// Most queries that are evaluated at a time; further ones wait, up to their timeout.
    pub concurrency_max: usize,
    /// Switches of the language.
    pub features: Features,
}

impl Default for ApiOptions {
    fn default() -> Self {
        Self { lookback_ms: 300_000, samples_max: 50_000_000, concurrency_max: 20, features: Features::default() }
    }
}

/// What all endpoints work with.
#[derive(Debug)]
struct Api {
    engine: Engine,
    options: ApiOptions,
    /// One for each query that may run.
    slots: Semaphore,
    /// Milliseconds since the epoch.
    started_ms: i64,
}

/// The API's endpoints.
pub fn routes(engine: Engine, options: ApiOptions) -> Router {
    let slots = Semaphore::new(options.concurrency_max.clamp(1, Semaphore::MAX_PERMITS));
    let started_ms = engine.now_ms();
    let api = Arc::new(Api { engine, options, slots, started_ms });
    let values = |State(api): State<Arc<Api>>, Path(name): Path<String>, form: Form| async move {
        answer(series::label_values(&api, &name, &form)).await
    };
    Router::new()
        .route("/api/v1/query", both(|api, form| async move { query::instant(&api, &form).await }))
        .route("/api/v1/query_range", both(|api, form| async move { query::range(&api, &form).await }))
        .route("/api/v1/query_exemplars", both(|api, form| async move { exemplars::query(&api, &form).await }))
        .route("/api/v1/format_query", both(|_, form| async move { query::format(&form).await }))
        .route("/api/v1/series", both(|api, form| async move { series::series(&api, &form).await }))
        .route("/api/v1/labels", both(|api, form| async move { series::label_names(&api, &form).await }))
        .route("/api/v1/label/{name}/values", get(values))
        .route("/api/v1/metadata", only_get(|api, form| async move { status::metadata(&api, &form).await }))
        .route("/api/v1/rules", only_get(|_, _| status::rules()))
        .route("/api/v1/alerts", only_get(|_, _| status::alerts()))
        .route("/api/v1/targets", only_get(|_, _| status::targets()))
        .route("/api/v1/status/buildinfo", only_get(|_, _| status::build_info()))
        .route("/api/v1/status/runtimeinfo", only_get(|api, _| async move { status::runtime_info(&api).await }))
        .route("/api/v1/status/flags", only_get(|api, _| async move { status::flags(&api).await }))
        .route("/api/v1/status/tsdb", only_get(|api, form| async move { status::tsdb(&api, &form).await }))
        .with_state(api)
        .layer(
            CompressionLayer::new()
                .gzip(true)
                .quality(CompressionLevel::Fastest)
                .compress_when(SizeAbove::new(COMPRESSED_BYTES_MIN)),
        )
        .layer(cors())
}

/// Any page may ask, as with Prometheus's default: the answers depend on no cookie.
fn cors() -> CorsLayer {
    CorsLayer::new()
        .allow_origin(Any)
        .allow_methods([Method::GET, Method::POST, Method::OPTIONS])
        .allow_headers([header::ACCEPT, header::AUTHORIZATION, header::CONTENT_TYPE, header::ORIGIN])
        .expose_headers([header::DATE])
}

/// An endpoint for GET and for POST with a form.
fn both<F, Fut>(endpoint: F) -> MethodRouter<Arc<Api>>
where
    F: Fn(Arc<Api>, Form) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<Reply>> + Send + 'static,
{
    let also = endpoint.clone();
    only_get(endpoint).post(move |State(api): State<Arc<Api>>, form: Form| answer(also(api, form)))
}

/// An endpoint for GET.
fn only_get<F, Fut>(endpoint: F) -> MethodRouter<Arc<Api>>
where
    F: Fn(Arc<Api>, Form) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<Reply>> + Send + 'static,
{
    get(move |State(api): State<Arc<Api>>, form: Form| answer(endpoint(api, form)))
}

async fn answer(endpoint: impl Future<Output = Result<Reply>>) -> Result<Reply, Failure> {
    endpoint.await.map_err(Failure)
}
