//! The Prometheus HTTP API: everything under `/api/v1` that reads, and deleting.
//!
//! Envelopes, statuses, parameters and the wording of errors are those of Prometheus 3, because dashboards, alerting
//! and command-line clients depend on them. An endpoint is a function from a [`params::Form`] to a [`reply::Reply`];
//! what can fail is a [`crate::QueryError`], which [`reply`] alone turns into a status. Answers are written straight
//! into bytes by [`json`].
//!
//! A request that its client abandons is dropped by the server together with the query that it waits for.

mod admin;
mod empty;
mod exemplars;
mod federate;
mod json;
mod params;
mod query;
mod raw;
mod read;
mod reply;
mod series;
mod status;
mod telemetry;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use access::{Routes, Scope};
use axum::extract::{Path, State};
use axum::http::{Method, header};
use axum::routing::{MethodRouter, get, post};
use engine::{Description, Engine, Query, QueryLimits};
use futures::future::BoxFuture;
use tower_http::CompressionLevel;
use tower_http::compression::CompressionLayer;
use tower_http::compression::predicate::SizeAbove;
use tower_http::cors::{Any, CorsLayer};

use self::params::Form;
pub use self::params::selector;
pub(crate) use self::params::{parse_duration, parse_time};
pub(crate) use self::query::check_resolution;
use self::reply::{Failure, Reply, error_type};
use self::telemetry::Metrics;
use crate::error::{QueryError, QueryErrorKind, Result};
use crate::options::Settings;

/// A query that has not noticed its deadline so long after it is answered for. It says more of what it was about itself.
const TOLD_WITHIN: Duration = Duration::from_millis(250);
/// Answers shorter than this many bytes are sent as they are: they fit into a packet.
const COMPRESSED_BYTES_MIN: u64 = 1400;

/// What all endpoints work with.
#[derive(Debug)]
struct Api {
    engine: Engine,
    settings: Settings,
    metrics: Metrics,
    /// Milliseconds since the epoch.
    started_ms: i64,
}

/// The API's endpoints.
pub fn routes(engine: Engine, settings: Settings) -> Routes {
    let metrics = Metrics::new(engine.telemetry());
    let started_ms = engine.now_ms();
    let api = Arc::new(Api { engine, settings, metrics, started_ms });
    let values = |State(api): State<Arc<Api>>, Path(name): Path<String>, form: Form| async move {
        let values = |api: Arc<Api>, form, query| async move { series::label_values(&api, &name, &form, query).await };
        ask(&api, "label_values", form, values).await
    };
    let tsdb = |State(api): State<Arc<Api>>, form: Form| async move {
        let tsdb = |api: Arc<Api>, form, query| async move { status::tsdb(&api, &form, query).await };
        ask(&api, "tsdb", form, tsdb).await
    };
    let asking = [
        ("query", asks("query", |api, form, query| async move { query::instant(&api, &form, query).await })),
        ("query_range", asks("query_range", |api, form, query| async move { query::range(&api, &form, query).await })),
        (
            "query_exemplars",
            asks("query_exemplars", |api, form, query| async move { exemplars::query(&api, &form, query).await }),
        ),
        ("format_query", both("format_query", |api, form| async move { query::format(&api, &form).await })),
        ("parse_query", both("parse_query", |api, form| async move { query::parse(&api, &form).await })),
        ("series", asks("series", |api, form, query| async move { series::series(&api, &form, query).await })),
        ("labels", asks("labels", |api, form, query| async move { series::label_names(&api, &form, query).await })),
        ("label/{name}/values", get(values)),
        ("metadata", only_get("metadata", |api, form| async move { status::metadata(&api, &form).await })),
        ("rules", only_get("rules", |_, form| async move { empty::rules(&form) })),
        ("alerts", only_get("alerts", |_, _| async { empty::alerts() })),
        ("alertmanagers", only_get("alertmanagers", |_, _| async { empty::alertmanagers() })),
        ("targets", only_get("targets", |_, _| async { empty::targets() })),
        ("targets/metadata", only_get("targets_metadata", |_, form| async move { empty::targets_metadata(&form) })),
        ("scrape_pools", only_get("scrape_pools", |_, _| async { empty::scrape_pools() })),
        ("notifications", only_get("notifications", |_, _| async { empty::notifications() })),
        ("features", only_get("features", |api, _| async move { status::features(&api).await })),
        ("status/buildinfo", only_get("buildinfo", |_, _| status::build_info())),
        ("status/runtimeinfo", only_get("runtimeinfo", |api, _| async move { status::runtime_info(&api).await })),
        ("status/flags", only_get("flags", |api, _| async move { status::flags(&api).await })),
        ("status/walreplay", only_get("walreplay", |_, _| async { status::wal_replay() })),
        ("status/tsdb", get(tsdb)),
    ];
    let deleting = [
        ("delete_series", change("delete_series", |api, form| async move { admin::delete_series(&api, &form).await })),
        ("clean_tombstones", change("clean_tombstones", |api, _| async move { admin::clean_tombstones(&api).await })),
    ];
    let deleting = deleting.into_iter().fold(Routes::new(), |routes, (path, endpoint)| {
        routes.route(Scope::Admin, &format!("/api/v1/admin/tsdb/{path}"), endpoint)
    });
    let asking = asking.into_iter().fold(Routes::new(), |routes, (path, endpoint)| {
        routes.route(Scope::Read, &format!("/api/v1/{path}"), endpoint)
    });
    let asking = asking.with_state(api.clone()).layer(compression()).layer(cors());
    // Not compressed once more: what is sent is.
    let reading = Routes::new().route(Scope::Read, "/api/v1/read", post(read::read)).with_state(api.clone());
    let scraped = Routes::new().route(Scope::Read, "/federate", get(federate::federate)).with_state(api.clone());
    asking.merge(reading).merge(scraped.layer(compression())).merge(deleting.with_state(api))
}

fn compression() -> CompressionLayer<SizeAbove> {
    CompressionLayer::new()
        .gzip(true)
        .quality(CompressionLevel::Fastest)
        .compress_when(SizeAbove::new(COMPRESSED_BYTES_MIN))
}

/// Any page may ask, as with Prometheus's default: the answers depend on no cookie.
fn cors() -> CorsLayer {
    CorsLayer::new()
        .allow_origin(Any)
        .allow_methods([Method::GET, Method::POST, Method::OPTIONS])
        .allow_headers([header::ACCEPT, header::AUTHORIZATION, header::CONTENT_TYPE, header::ORIGIN])
        .expose_headers([header::DATE])
}

/// An endpoint that runs a query, for GET and for POST with a form.
fn asks<F, Fut>(name: &'static str, endpoint: F) -> MethodRouter<Arc<Api>>
where
    F: Fn(Arc<Api>, Form, Query) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<Reply>> + Send + 'static,
{
    let handler = move |State(api): State<Arc<Api>>, form: Form| {
        let endpoint = endpoint.clone();
        async move { ask(&api, name, form, endpoint).await }
    };
    get(handler.clone()).post(handler)
}

/// An endpoint for GET and for POST with a form; `name` is what self-metrics call it.
fn both<F, Fut>(name: &'static str, endpoint: F) -> MethodRouter<Arc<Api>>
where
    F: Fn(Arc<Api>, Form) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<Reply>> + Send + 'static,
{
    only_get(name, endpoint.clone()).post(handler(name, endpoint))
}

/// An endpoint for GET.
fn only_get<F, Fut>(name: &'static str, endpoint: F) -> MethodRouter<Arc<Api>>
where
    F: Fn(Arc<Api>, Form) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<Reply>> + Send + 'static,
{
    get(handler(name, endpoint))
}

/// An endpoint that changes something, for POST and PUT.
fn change<F, Fut>(name: &'static str, endpoint: F) -> MethodRouter<Arc<Api>>
where
    F: Fn(Arc<Api>, Form) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<Reply>> + Send + 'static,
{
    post(handler(name, endpoint.clone())).put(handler(name, endpoint))
}

fn handler<F, Fut>(
    name: &'static str,
    endpoint: F,
) -> impl Fn(State<Arc<Api>>, Form) -> BoxFuture<'static, Result<Reply, Failure>> + Clone + Send + Sync + 'static
where
    F: Fn(Arc<Api>, Form) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Result<Reply>> + Send + 'static,
{
    move |State(api), form| {
        let work = endpoint(api.clone(), form);
        Box::pin(async move { answer(&api, name, work).await })
    }
}

/// Does the work of a request. All of it is on the CPU runtime: going over label sets and writing JSON take long enough
/// to hold up other connections.
async fn answer(
    api: &Api,
    name: &'static str,
    work: impl Future<Output = Result<Reply>> + Send + 'static,
) -> Result<Reply, Failure> {
    let underway = api.metrics.begin(name);
    let result = api.engine.run(work).await;
    underway.end(result.as_ref().map_or_else(|e| error_type(e.kind).0, |_| "success"));
    result.map_err(Failure)
}

/// Waits for a query's turn and runs it, as [`answer`] does. When the client goes away, this future is dropped, and with
/// it what stops the query.
async fn ask<Fut>(
    api: &Arc<Api>,
    name: &'static str,
    form: Form,
    endpoint: impl FnOnce(Arc<Api>, Form, Query) -> Fut,
) -> Result<Reply, Failure>
where
    Fut: Future<Output = Result<Reply>> + Send + 'static,
{
    let underway = api.metrics.begin(name);
    let asked = async {
        let query = begin(api, &form).await?;
        let _guard = query.guard();
        // What computes without waiting looks at its stop now and then; the client is told in time also when all threads
        // are busy with others.
        let deadline = query.stop().deadline() + TOLD_WITHIN;
        let answer = api.engine.run(endpoint(api.clone(), form, query));
        tokio::time::timeout_at(deadline, answer).await.unwrap_or_else(|_| Err(timed_out()))
    };
    let result = asked.await;
    underway.end(result.as_ref().map_or_else(|e| error_type(e.kind).0, |_| "success"));
    result.map_err(Failure)
}

async fn begin(api: &Api, form: &Form) -> Result<Query> {
    let text = match form.get("query") {
        "" => form.all("match[]").collect::<Vec<_>>().join(", "),
        text => text.to_owned(),
    };
    turn(api, form.timeout()?, form.user.clone(), text).await
}

/// Waits for the turn of a query, which may take so long at most.
async fn turn(api: &Api, timeout: Option<Duration>, user: String, text: String) -> Result<Query> {
    let longest = api.engine.settings().query_timeout;
    let timeout = timeout.map_or(longest, |t| t.min(longest));
    let begun = api.engine.begin(QueryLimits { timeout }).await;
    let mut query = begun.map_err(|e| match QueryError::from(e) {
        QueryError { kind: QueryErrorKind::Timeout, .. } => {
            QueryError::new(QueryErrorKind::Timeout, "query timed out in query queue")
        }
        e => e,
    })?;
    query.describe(Description { language: "promql", user, text });
    Ok(query)
}

/// As Prometheus words it.
pub(crate) fn timed_out() -> QueryError {
    QueryError::new(QueryErrorKind::Timeout, "query timed out in expression evaluation")
}

#[cfg(test)]
mod tests;
