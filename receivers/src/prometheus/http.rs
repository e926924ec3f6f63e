//! `POST /api/v1/write`: content negotiation, statuses and headers of remote write.
//!
//! Prometheus drops data on any 4xx and sends it again on 5xx. So a fault of the request is a 4xx, after the good part
//! was stored, and whatever passes by itself is a 503.

use std::sync::Arc;
use std::time::Duration;

use access::{Routes, Scope};
use axum::body::Body as HttpBody;
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use catalog::{Error, ErrorKind, Result, tables};
use engine::{Engine, Telemetry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

use super::{Counts, Decoded, Limits, Reason, Rejected, Replicas, decode_v1, decode_v2};
use crate::body::{Bodies, Encoding};

#[cfg(test)]
mod tests;

const SAMPLES_WRITTEN: HeaderName = HeaderName::from_static("x-prometheus-remote-write-samples-written");
const HISTOGRAMS_WRITTEN: HeaderName = HeaderName::from_static("x-prometheus-remote-write-histograms-written");
const EXEMPLARS_WRITTEN: HeaderName = HeaderName::from_static("x-prometheus-remote-write-exemplars-written");

/// Seconds after which a refused request may come again.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("1");

/// A request for which there is no room is looked at once more after this time, and then refused.
const REFUSED_AFTER: Duration = Duration::from_millis(400);

/// Rejections that an answer spells out: Prometheus logs the first line up to 1 KiB.
const REJECTIONS_SHOWN: usize = 3;

/// Mounts remote write over an engine; `replicas` elects one of several identical senders.
pub fn routes(engine: Engine, bodies: Bodies, replicas: Option<Replicas>) -> Routes {
    let metrics = Metrics::new(engine.telemetry());
    let receiver = Arc::new(Receiver { engine, bodies, replicas: replicas.map(Arc::new), metrics });
    Routes::new().route(Scope::Write, "/api/v1/write", post(write)).with_state(receiver)
}

struct Receiver {
    engine: Engine,
    bodies: Bodies,
    replicas: Option<Arc<Replicas>>,
    metrics: Metrics,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// An answer: what was written, and what is wrong if anything is.
struct Outcome {
    status: StatusCode,
    counts: Counts,
    message: String,
}

impl IntoResponse for Outcome {
    fn into_response(self) -> Response {
        let mut headers = HeaderMap::with_capacity(5);
        headers.insert(SAMPLES_WRITTEN, self.counts.samples.into());
        headers.insert(HISTOGRAMS_WRITTEN, self.counts.histograms.into());
        headers.insert(EXEMPLARS_WRITTEN, self.counts.exemplars.into());
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(RETRY_AFTER, RETRY_AFTER_SECONDS);
        }
        if self.message.is_empty() {
            (self.status, headers).into_response()
        } else {
            (self.status, headers, self.message + "\n").into_response()
        }
    }
}

impl Outcome {
    fn refused(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, counts: Counts::default(), message: message.into() }
    }
}

impl From<Error> for Outcome {
    fn from(e: Error) -> Self {
        let status = status(e.kind());
        if status.is_server_error() && status != StatusCode::SERVICE_UNAVAILABLE {
            tracing::error!(error = %e, "remote write failed");
        }
        Self::refused(status, e.to_string())
    }
}

/// The one table from error kinds to statuses.
fn status(kind: ErrorKind) -> StatusCode {
    match kind {
        ErrorKind::Invalid => StatusCode::BAD_REQUEST,
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::LimitExceeded => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorKind::Unavailable | ErrorKind::Timeout | ErrorKind::Canceled => StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::Corrupt | ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

async fn write(State(receiver): State<Arc<Receiver>>, request: Request<HttpBody>) -> Response {
    let outcome = receiver.write(request).await.unwrap_or_else(|outcome| outcome);
    receiver.metrics.requests.get_or_create(&vec![("status", outcome.status.as_u16())]).inc();
    outcome.into_response()
}

impl Receiver {
    async fn write(&self, request: Request<HttpBody>) -> Result<Outcome, Outcome> {
        let version = version(request.headers())?;
        let encoding = encoding(request.headers())?;
        let declared = request.headers().get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
        let mut body = self.bodies.read(request.into_body(), declared).await?;
        // Not before: a sender that takes its time holds nobody up.
        let arrival = match self.engine.arrive(body.sent().len()) {
            Ok(arrival) => arrival,
            // Often there is room a moment later. And a sender that came again at once would take the time that others
            // need to be stored.
            Err(_) => {
                tokio::time::sleep(REFUSED_AFTER).await;
                self.engine.arrive(body.sent().len())?
            }
        };
        self.metrics.bytes.inc_by(body.sent().len() as u64);

        let registry = self.engine.registry().clone();
        let future_max_ms = i64::try_from(self.engine.settings().future_max.as_millis()).unwrap_or(i64::MAX);
        let now_ms = self.engine.now_ms();
        let kept_from_ms = tables::all().map(|table| self.engine.keeps_from_ms(table)).into_iter().min();
        let kept_from_ms = kept_from_ms.unwrap_or(i64::MIN);
        let replicas = self.replicas.clone();
        let inflated_bytes = self.metrics.inflated_bytes.clone();
        let (decoded, body, arrival) = self
            .engine
            .decode(move || {
                if let Err(e) = arrival.check() {
                    return (Err(e), body, arrival);
                }
                let decoded = body.inflate(encoding, |bytes| {
                    inflated_bytes.inc_by(bytes.len() as u64);
                    let limits = Limits { now_ms, future_max_ms, kept_from_ms, replicas: replicas.as_deref() };
                    match version {
                        Version::V1 => decode_v1(bytes, registry.encoder(), limits),
                        Version::V2 => decode_v2(bytes, registry.encoder(), limits),
                    }
                });
                (decoded, body, arrival)
            })
            .await;
        let Decoded { mut write, rejected, counts, left_out } = decoded?;
        self.metrics.left_out.inc_by((left_out.samples + left_out.histograms + left_out.exemplars) as u64);
        for reason in Reason::ALL {
            self.metrics.rejected(reason).inc_by(rejected.count(reason));
        }
        // Version 2.0 repeats the metadata of every series in every request.
        write.metadata.retain(|m| !self.engine.metadata(Some(&m.metric)).contains(m));
        if !counts.is_empty() || !write.metadata.is_empty() {
            self.engine.write(write).await?;
        }
        // The body's share of the budget stands for the rows, too.
        drop((body, arrival));
        let mut outcome = answer(&rejected, counts);
        // A sender counts what was not written as failed, and its owner would be alarmed by a pair that works.
        outcome.counts += left_out;
        Ok(outcome)
    }
}

fn answer(rejected: &Rejected, counts: Counts) -> Outcome {
    let errors = rejected.errors();
    if errors == 0 {
        return Outcome { status: StatusCode::NO_CONTENT, counts, message: String::new() };
    }
    let mut message = format!(
        "stored {} samples, {} histograms and {} exemplars; refused {errors}: ",
        counts.samples, counts.histograms, counts.exemplars
    );
    for (i, rejection) in rejected.first.iter().take(REJECTIONS_SHOWN).enumerate() {
        if i > 0 {
            message.push_str("; ");
        }
        message.push_str(&rejection.to_string());
    }
    if errors > REJECTIONS_SHOWN as u64 {
        message.push_str("; and others");
    }
    Outcome { status: StatusCode::BAD_REQUEST, counts, message }
}

/// The message's version by the content type; 1.0 when there is none, as Prometheus does.
fn version(headers: &HeaderMap) -> Result<Version, Outcome> {
    let Some(value) = headers.get(CONTENT_TYPE) else { return Ok(Version::V1) };
    let refuse = || {
        Outcome::refused(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            format!(
                "content type {value:?} is not supported; send application/x-protobuf with \
                 proto=prometheus.WriteRequest (remote write 1.0) or proto=io.prometheus.write.v2.Request (2.0)"
            ),
        )
    };
    let text = value.to_str().map_err(|_| refuse())?;
    let mut parts = text.split(';').map(str::trim);
    if !parts.next().is_some_and(|media| media.eq_ignore_ascii_case("application/x-protobuf")) {
        return Err(refuse());
    }
    for parameter in parts.filter(|p| !p.is_empty()) {
        let (name, value) = parameter.split_once('=').ok_or_else(refuse)?;
        if name.trim().eq_ignore_ascii_case("proto") {
            return match value.trim().trim_matches('"') {
                "prometheus.WriteRequest" => Ok(Version::V1),
                "io.prometheus.write.v2.Request" => Ok(Version::V2),
                _ => Err(refuse()),
            };
        }
    }
    Ok(Version::V1)
}

/// The body's compression; snappy when none is named, as Prometheus does.
fn encoding(headers: &HeaderMap) -> Result<Encoding, Outcome> {
    let Some(value) = headers.get(CONTENT_ENCODING) else { return Ok(Encoding::Snappy) };
    match value.to_str().unwrap_or_default().trim().to_ascii_lowercase().as_str() {
        "" | "snappy" => Ok(Encoding::Snappy),
        "zstd" => Ok(Encoding::Zstd),
        "identity" => Ok(Encoding::Identity),
        _ => Err(Outcome::refused(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            format!("content encoding {value:?} is not supported; send snappy (block format) or zstd"),
        )),
    }
}

/// The receiver's self-metrics.
#[derive(Debug)]
struct Metrics {
    requests: Family<Vec<(&'static str, u16)>, Counter>,
    rejected: Vec<Counter>,
    bytes: Counter,
    inflated_bytes: Counter,
    left_out: Counter,
}

impl Metrics {
    fn new(telemetry: &Telemetry) -> Self {
        let rejected: Family<Vec<(&'static str, &'static str)>, Counter> = telemetry.register(
            "remote_write_rejected",
            "Series, samples, histograms, exemplars and metadata that were refused",
            Family::default(),
        );
        Self {
            requests: telemetry.register("remote_write_requests", "Requests by status", Family::default()),
            rejected: Reason::ALL.iter().map(|r| rejected.get_or_create_owned(&vec![("reason", r.name())])).collect(),
            bytes: telemetry.register("remote_write_body_bytes", "Bytes of bodies as sent", Counter::default()),
            inflated_bytes: telemetry.register(
                "remote_write_inflated_bytes",
                "Bytes of bodies after decompression",
                Counter::default(),
            ),
            left_out: telemetry.register(
                "remote_write_replica_left_out",
                "Samples, histograms and exemplars of replicas that are not elected",
                Counter::default(),
            ),
        }
    }

    fn rejected(&self, reason: Reason) -> &Counter {
        &self.rejected[reason as usize]
    }
}
