//! `read`: remote read. Raw samples and native histograms of series, for a Prometheus that has us as `remote_read` and
//! for whoever takes its data elsewhere.
//!
//! A client that can read a stream of chunks gets one, of frames of up to a MiB; others get one message of samples, up to a
//! limit. Both are sorted by labels ([`raw`]).

pub(super) mod message;

use std::sync::Arc;

use access::Caller;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use catalog::matcher::Patterns;
use catalog::{MatchOp, Matcher};
use datafusion::common::runtime::SpawnedTask;
use engine::Reservation;
use engine::memory::Kind;
use futures::stream;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};
use prost::{DecodeError, Message as _};
use tokio::sync::mpsc;

use super::params::noted;
use super::raw::{self, Asked, Sink};
use super::reply::{Held, error_type};
use super::{Api, turn};
use crate::chunk::{self, Points};
use crate::error::{QueryError, QueryErrorKind, Result};
use crate::exec::out_of_memory;
use message::{Query, ReadRequest};

/// Most bytes of a request as sent, and inflated.
const BODY_BYTES_MAX: usize = 1 << 20;
const INFLATED_BYTES_MAX: usize = 4 << 20;
/// Most queries of a request.
const QUERIES_MAX: usize = 100;
/// Most matchers of a query.
const MATCHERS_MAX: usize = 1000;
/// Most forms of an answer that a request accepts.
const FORMS_MAX: usize = 100;
/// Inflated bytes count so often in the account of memory: once for themselves and once for what they ask for.
const INFLATED_WEIGHT: usize = 2;
/// A frame is sent when its chunks have this many bytes.
const FRAME_BYTES: usize = 1 << 20;
/// Frames that may wait for a slow reader.
const FRAMES_AHEAD: usize = 2;
/// The function in a query's hints that asks for labels alone.
const LABELS_ONLY: &str = "series";

/// The forms of an answer, by their numbers in a request.
const FORMS: [(i32, Form); 2] = [(0, Form::Samples), (1, Form::Chunks)];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// `SAMPLES`.
    Samples,
    /// `STREAMED_XOR_CHUNKS`.
    Chunks,
}

/// `POST /api/v1/read`.
pub(super) async fn read(State(api): State<Arc<Api>>, request: Request) -> Response {
    let work = answer(api.clone(), request);
    let underway = api.metrics.begin("read");
    let result = api.engine.run(work).await;
    underway.end(result.as_ref().map_or_else(|e| error_type(e.kind).0, |_| "success"));
    result.unwrap_or_else(|e| refusal(&e))
}

/// Errors are plain text. A limit is the request's fault, as in Prometheus.
fn refusal(e: &QueryError) -> Response {
    let status = match e.kind {
        QueryErrorKind::Execution => StatusCode::BAD_REQUEST,
        kind => error_type(kind).1,
    };
    if e.kind == QueryErrorKind::Internal {
        tracing::error!(error = e.message, "remote read failed");
    }
    let mut response = (status, format!("{e}\n")).into_response();
    if e.kind == QueryErrorKind::Unavailable {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("5"));
    }
    response
}

async fn answer(api: Arc<Api>, request: Request) -> Result<Response> {
    let user = request.extensions().get::<Caller>().map(|c| c.name().to_owned()).unwrap_or_default();
    let (request, memory) = decode(&api, request).await?;
    let mut patterns = Patterns::default();
    let asked = request.queries.iter().map(|q| asked(q, &mut patterns)).collect::<Result<Vec<_>>>()?;
    let form = form(&request)?;
    let query = turn(&api, None, user, text(&asked)).await?;
    match form {
        Form::Samples => {
            let held = query.memory().reserve(Kind::Queries);
            let mut sink = Samples::new(held, api.settings.limits.read_samples_max);
            raw::read((&api, &query), &asked, &mut sink, None).await?;
            let headers = [(CONTENT_TYPE, "application/x-protobuf"), (CONTENT_ENCODING, "snappy")];
            Ok((headers, sink.finish()?).into_response())
        }
        Form::Chunks => {
            let (to, mut frames) = mpsc::channel::<Result<Bytes>>(FRAMES_AHEAD);
            // It is aborted when the client goes away, for then nobody holds the stream.
            let task = SpawnedTask::spawn(async move {
                let _asked = memory;
                let result = raw::read((&api, &query), &asked, &mut Chunks::default(), Some(&to)).await;
                // The client may pause before it takes what comes last; others run meanwhile.
                drop(query);
                if let Err(e) = result {
                    let _ = to.send(Err(e)).await;
                }
            });
            // What fails before the first frame can still have a status.
            let first = frames.recv().await.transpose()?;
            let rest = stream::unfold((frames, task), |(mut frames, task)| async move {
                let frame = frames.recv().await?.inspect_err(|e| tracing::warn!(error = %e, "remote read breaks off"));
                Some((frame, (frames, task)))
            });
            let frames = Body::from_stream(futures::StreamExt::chain(stream::iter(first.map(Ok)), rest));
            let kind = "application/x-streamed-protobuf; proto=prometheus.ChunkedReadResponse";
            Ok(([(CONTENT_TYPE, kind)], frames).into_response())
        }
    }
}

/// What is asked for, and the memory that it takes.
async fn decode(api: &Api, request: Request) -> Result<(ReadRequest, Reservation)> {
    let declared = request.headers().get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
    let mut memory = api.engine.memory().reserve(Kind::Bodies);
    memory.grow(declared.unwrap_or(BODY_BYTES_MAX).min(BODY_BYTES_MAX))?;
    let body = to_bytes(request.into_body(), BODY_BYTES_MAX)
        .await
        .map_err(|e| QueryError::bad_data(format!("{e}; a request may have {BODY_BYTES_MAX} bytes")))?;
    Ok((inflate(&body, &mut memory)?, memory))
}

fn inflate(body: &[u8], memory: &mut Reservation) -> Result<ReadRequest> {
    let failed = |e: &dyn std::fmt::Display| QueryError::bad_data(format!("not a snappy block: {e}"));
    let inflated = snap::raw::decompress_len(body).map_err(|e| failed(&e))?;
    if inflated > INFLATED_BYTES_MAX {
        return Err(QueryError::bad_data(format!(
            "request has {inflated} bytes when inflated; {INFLATED_BYTES_MAX} are allowed"
        )));
    }
    memory.grow(INFLATED_WEIGHT * inflated)?;
    let message = snap::raw::Decoder::new().decompress_vec(body).map_err(|e| failed(&e))?;
    check_counts(&message)?;
    ReadRequest::decode(message.as_slice()).map_err(malformed)
}

fn malformed(e: DecodeError) -> QueryError {
    QueryError::bad_data(format!("not a prometheus.ReadRequest: {e}"))
}

/// Refuses a request that holds too much before anything is allocated for it: an empty query or matcher is two bytes
/// there and up to a hundred here.
fn check_counts(message: &[u8]) -> Result<()> {
    const QUERY: u32 = 1;
    const FORM: u32 = 2;
    const MATCHER: u32 = 3;
    let (mut queries, mut matchers, mut forms) = (0, 0, 0);
    let counted = fields(message, |field, value| {
        match field {
            QUERY => {
                queries += 1;
                let mut own = 0;
                fields(value, |field, _| {
                    own += usize::from(field == MATCHER);
                    Ok(())
                })?;
                matchers = matchers.max(own);
            }
            // One number or several; each ends with a byte that says so.
            FORM => forms += value.iter().filter(|b| **b < 0x80).count(),
            _ => {}
        }
        Ok(())
    });
    counted.map_err(malformed)?;
    let all = [
        (queries, QUERIES_MAX, "queries"),
        (matchers, MATCHERS_MAX, "matchers in one query"),
        (forms, FORMS_MAX, "response types"),
    ];
    match all.iter().find(|(count, max, _)| count > max) {
        Some((count, max, what)) => Err(QueryError::bad_data(format!("request has {count} {what}; {max} are allowed"))),
        None => Ok(()),
    }
}

/// Shows the fields of a message: their numbers, and their values without the length that some state.
fn fields(mut message: &[u8], mut each: impl FnMut(u32, &[u8]) -> Result<(), DecodeError>) -> Result<(), DecodeError> {
    while !message.is_empty() {
        let (field, wire_type) = decode_key(&mut message)?;
        let begun = message;
        skip_field(wire_type, field, &mut message, DecodeContext::default())?;
        let mut value = &begun[..begun.len() - message.len()];
        if wire_type == WireType::LengthDelimited {
            decode_varint(&mut value)?;
        }
        each(field, value)?;
    }
    Ok(())
}

/// The first form that the client accepts and we have; samples when it does not say.
fn form(asked: &ReadRequest) -> Result<Form> {
    let accepted = &asked.accepted_response_types;
    if accepted.is_empty() {
        return Ok(Form::Samples);
    }
    let known = |kind: &i32| FORMS.iter().find(|(number, _)| number == kind).map(|(_, form)| *form);
    accepted.iter().find_map(known).ok_or_else(|| {
        QueryError::bad_data(format!(
            "server does not support any of the requested response types: {accepted:?}; supported: 0 (SAMPLES), 1 \
             (STREAMED_XOR_CHUNKS)"
        ))
    })
}

/// The selectors as PromQL writes them, to list the query with.
fn text(asked: &[Asked]) -> String {
    let matcher = |m: &Matcher| format!("{}{}{:?}", m.name(), m.op().symbol(), m.value());
    let selector =
        |matchers: &Vec<Matcher>| format!("{{{}}}", matchers.iter().map(matcher).collect::<Vec<_>>().join(","));
    asked.iter().flat_map(|a| &a.selectors).map(selector).collect::<Vec<_>>().join(", ")
}

/// A query as the reader of points understands it.
fn asked(query: &Query, patterns: &mut Patterns) -> Result<Asked> {
    let mut matchers = Vec::with_capacity(query.matchers.len());
    for m in &query.matchers {
        matchers.push(matcher(m)?);
        noted(&matchers[matchers.len() - 1..], patterns)?;
    }
    let (mut start_ms, mut end_ms) = (query.start_timestamp_ms, query.end_timestamp_ms);
    // A selector that looks at less than the whole query says so in its hints.
    if let Some(hints) = query.hints.as_ref().filter(|h| h.end_ms != 0) {
        (start_ms, end_ms) = (start_ms.max(hints.start_ms), end_ms.min(hints.end_ms));
    }
    let labels_only = query.hints.as_ref().is_some_and(|h| h.func == LABELS_ONLY);
    Ok(Asked { selectors: vec![matchers], start_ms, end_ms, labels_only })
}

fn matcher(m: &message::LabelMatcher) -> Result<Matcher> {
    let op = match m.kind {
        0 => MatchOp::Eq,
        1 => MatchOp::Ne,
        2 => MatchOp::Re,
        3 => MatchOp::Nre,
        other => return Err(QueryError::bad_data(format!("matcher type {other} is unknown; 0 to 3 are known"))),
    };
    Ok(Matcher::new(&m.name, op, &m.value)?)
}

/// Makes a `ReadResponse`.
struct Samples {
    results: Vec<Vec<u8>>,
    /// The series under way, and how long its labels are.
    series: Vec<u8>,
    labels: usize,
    count: usize,
    /// Most of them.
    max: usize,
    held: Reservation,
}

impl Samples {
    fn new(held: Reservation, max: usize) -> Self {
        Self { results: Vec::new(), series: Vec::new(), labels: 0, count: 0, max, held }
    }

    /// The answer, compressed.
    fn finish(mut self) -> Result<Held> {
        let message: usize = self.results.iter().map(|r| r.len() + 16).sum();
        // The message and its compressed form, besides the results.
        self.held.grow(message + snap::raw::max_compress_len(message)).map_err(out_of_memory)?;
        let mut out = Vec::with_capacity(message);
        self.results.iter().for_each(|result| message::field(1, result, &mut out));
        let too_large = |e| QueryError::execution(format!("the answer is too large for one message: {e}"));
        let body = snap::raw::Encoder::new().compress_vec(&out).map_err(too_large)?;
        drop((out, self.results));
        Ok(Held::new(body, self.held))
    }
}

impl Sink for Samples {
    fn query(&mut self, _number: usize) {
        self.results.push(Vec::new());
    }

    fn series(&mut self, labels: &[u8]) {
        self.series.clear();
        message::labels(labels, &mut self.series);
        self.labels = self.series.len();
    }

    fn points(&mut self, points: &Points) -> Result<()> {
        self.count += points.len();
        if self.count > self.max {
            return Err(QueryError::execution(format!("exceeded sample limit ({})", self.max)));
        }
        let before = self.series.len();
        points.floats.iter().for_each(|(ts, value)| message::sample(*ts, *value, &mut self.series));
        points.histograms.iter().for_each(|h| message::histogram(h, &mut self.series));
        self.held.grow(self.series.len() - before).map_err(out_of_memory)
    }

    fn end(&mut self) -> Result<()> {
        self.held.grow(self.labels).map_err(out_of_memory)?;
        if let Some(result) = self.results.last_mut() {
            message::field(1, &self.series, result);
        }
        Ok(())
    }
}

/// Makes frames of `ChunkedReadResponse`, each of one series.
#[derive(Default)]
struct Chunks {
    query: u64,
    /// What is known of the series under way: its labels, and how long they are.
    series: Vec<u8>,
    labels: usize,
    frames: usize,
    ready: Vec<Bytes>,
}

impl Chunks {
    fn frame(&mut self) {
        self.ready.push(message::frame(&self.series, self.query).into());
        self.series.truncate(self.labels);
        self.frames += 1;
    }
}

impl Sink for Chunks {
    fn query(&mut self, number: usize) {
        self.query = number as u64;
    }

    fn series(&mut self, labels: &[u8]) {
        self.series.clear();
        message::labels(labels, &mut self.series);
        (self.labels, self.frames) = (self.series.len(), 0);
    }

    fn points(&mut self, points: &Points) -> Result<()> {
        for chunk in chunk::encode(points) {
            message::chunk(&chunk, &mut self.series);
            if self.series.len() >= FRAME_BYTES {
                self.frame();
            }
        }
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        if self.series.len() > self.labels || self.frames == 0 {
            self.frame();
        }
        Ok(())
    }

    fn ready(&mut self) -> Vec<Bytes> {
        std::mem::take(&mut self.ready)
    }
}

#[cfg(test)]
mod tests;
