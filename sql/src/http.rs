//! SQL over HTTP: `POST /api/v1/sql` with the statement as the body, as a form field or as a JSON member `query`, and
//! `GET /api/v1/sql?query=`.
//!
//! The answer is JSON, `{"columns":[{"name":..,"type":..}],"rows":[[..]]}`, or CSV when `Accept` or `format` says so,
//! and is streamed. An error before the first row has a status and `{"error":..,"code":SQLSTATE}` as its body; an
//! error after it breaks the transfer off, so that a part is never taken for the whole.

use std::sync::Arc;

use access::{Routes, Scope};
use arrow::datatypes::Schema;
use arrow::record_batch::RecordBatch;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, RawQuery, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use datafusion::execution::SendableRecordBatchStream;
use engine::Engine;
use futures::{Stream, StreamExt, stream};
use serde_json::json;

use crate::error::{Result, SqlError};
use crate::format::{Column, csv_field, quoted};
use crate::pg::wire_type;
use crate::session::{Frontend, Session};
use crate::statement::{Command, Names};

/// The longest statement, in bytes.
const STATEMENT_BYTES_MAX: usize = 1 << 20;

/// The user of HTTP requests.
const USER: &str = "http";

/// Routes of the SQL endpoint.
///
/// # Errors
/// When the SQL side of the engine can't be built.
pub fn routes(engine: &Engine) -> Result<Routes> {
    let frontend = Frontend::new(engine)?;
    let routes = Routes::new().route(Scope::Read, "/api/v1/sql", get(by_get).post(by_post));
    Ok(routes.layer(DefaultBodyLimit::max(STATEMENT_BYTES_MAX)).with_state(frontend))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Json,
    Csv,
}

#[derive(Debug, Default)]
struct Request {
    query: Option<String>,
    format: Option<String>,
}

impl Request {
    /// Reads `name=value&...`.
    fn form(&mut self, text: &str) {
        for pair in text.split('&') {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            match name {
                "query" | "q" => self.query = Some(decoded(value)),
                "format" => self.format = Some(decoded(value)),
                _ => {}
            }
        }
    }
}

/// Undoes the encoding of forms.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let raw = text.as_bytes();
    let mut i = 0;
    while i < raw.len() {
        let escaped = text.get(i + 1..i + 3).filter(|_| raw[i] == b'%').and_then(|h| u8::from_str_radix(h, 16).ok());
        match (raw[i], escaped) {
            (_, Some(byte)) => {
                bytes.push(byte);
                i += 2;
            }
            (b'+', None) => bytes.push(b' '),
            (byte, None) => bytes.push(byte),
        }
        i += 1;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

async fn by_get(State(frontend): State<Arc<Frontend>>, RawQuery(query): RawQuery, headers: HeaderMap) -> Response {
    let mut request = Request::default();
    request.form(query.as_deref().unwrap_or_default());
    answer(&frontend, request, &headers).await
}

async fn by_post(
    State(frontend): State<Arc<Frontend>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let mut request = Request::default();
    request.form(query.as_deref().unwrap_or_default());
    let kind = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let Ok(text) = std::str::from_utf8(&body) else {
        return failed(&SqlError::new("22021", "the statement is not UTF-8"));
    };
    if kind.starts_with("application/x-www-form-urlencoded") && text.contains("query=") {
        request.form(text);
    } else if kind.starts_with("application/json") {
        match serde_json::from_str::<serde_json::Value>(text) {
            Ok(value) => {
                let member = |name: &str| value.get(name).and_then(|v| v.as_str()).map(str::to_owned);
                request.query = member("query").or(request.query);
                request.format = member("format").or(request.format);
            }
            Err(e) => return failed(&SqlError::new("22P02", format!("the body is not JSON: {e}"))),
        }
    } else if !text.trim().is_empty() {
        request.query = Some(text.to_owned());
    }
    answer(&frontend, request, &headers).await
}

async fn answer(frontend: &Arc<Frontend>, request: Request, headers: &HeaderMap) -> Response {
    match respond(frontend, request, headers).await {
        Ok(response) => response,
        Err(e) => failed(&e),
    }
}

fn failed(e: &SqlError) -> Response {
    let status = StatusCode::from_u16(e.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = (status, axum::Json(json!({ "error": e.message, "code": e.code }))).into_response();
    if status == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

fn format(request: &Request, headers: &HeaderMap) -> Result<Format> {
    let accepts = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or_default();
    match request.format.as_deref() {
        Some("json") => Ok(Format::Json),
        Some("csv") => Ok(Format::Csv),
        Some(other) => Err(SqlError::new("22023", format!("format {other:?} is not known; json and csv are"))),
        None if accepts.contains("text/csv") => Ok(Format::Csv),
        None => Ok(Format::Json),
    }
}

async fn respond(frontend: &Arc<Frontend>, request: Request, headers: &HeaderMap) -> Result<Response> {
    let format = format(&request, headers)?;
    let text = request.query.ok_or_else(|| SqlError::new("42601", "no statement: send it as the body or as query="))?;
    let session = frontend.session(USER);
    // The first batch tells whether there is an answer at all. Planning has the same time as running.
    let begun = async {
        let (mut batches, names) = run(&session, &text).await?;
        let first = batches.next().await.transpose()?;
        Ok::<_, SqlError>((batches, names, first))
    };
    let begun = tokio::time::timeout(session.timeout(), begun).await;
    let (batches, names, first) =
        begun.map_err(|_| SqlError::new("57014", "canceling statement due to statement timeout"))??;
    let schema = batches.schema();
    let zone = session.time_zone();
    let head = stream::iter([Ok(Bytes::from(head(&schema, &names, format)))]);
    let mut rows_before = false;
    let batches = stream::iter(first.map(Ok)).chain(batches);
    let body = batches.map(move |batch| {
        let text = body(&batch?, format, &zone, rows_before)?;
        rows_before |= !text.is_empty();
        Ok::<_, SqlError>(Bytes::from(text))
    });
    let tail = stream::iter((format == Format::Json).then(|| Ok(Bytes::from_static(b"]}\n"))));
    let kind = match format {
        Format::Json => "application/json",
        Format::Csv => "text/csv; charset=utf-8",
    };
    let all = head.chain(until_error(body)).chain(tail);
    Ok(([(header::CONTENT_TYPE, kind)], Body::from_stream(until_error(all))).into_response())
}

/// Ends a stream with its first error, so that no end is written after one.
fn until_error<T>(stream: impl Stream<Item = Result<T>>) -> impl Stream<Item = Result<T>> {
    let mut failed = false;
    stream.take_while(move |item| {
        let go_on = !failed;
        failed |= item.is_err();
        std::future::ready(go_on)
    })
}

async fn run(session: &Session, text: &str) -> Result<(SendableRecordBatchStream, Names)> {
    let mut commands = session.parse(text).await?;
    match (commands.pop(), commands.is_empty()) {
        (Some(Command::Query { statement, names }), true) => {
            let plan = session.plan(&statement).await?;
            Ok((session.run(plan).await?, names))
        }
        (Some(Command::Show(name)), true) => {
            let batch = session.show(&name)?;
            let schema = batch.schema();
            let rows = stream::iter([Ok(batch)]);
            let rows = datafusion::physical_plan::stream::RecordBatchStreamAdapter::new(schema, rows);
            Ok((Box::pin(rows), Names::default()))
        }
        (Some(_), true) => Err(SqlError::unsupported("a statement without rows over HTTP, which has no sessions,")),
        (Some(_), false) => Err(SqlError::unsupported("more than one statement in a request")),
        (None, _) => Err(SqlError::new("42601", "no statement was given")),
    }
}

fn head(schema: &Schema, names: &Names, format: Format) -> String {
    let width = schema.fields().len();
    let mut out = String::new();
    if format == Format::Json {
        out.push_str("{\"columns\":[");
    }
    for (i, field) in schema.fields().iter().enumerate() {
        if i > 0 {
            out.push(',');
        }
        let name = names.name(i, width, field.name());
        match format {
            Format::Csv => {
                let start = out.len();
                out.push_str(name);
                csv_field(start, &mut out);
            }
            Format::Json => {
                out.push_str("{\"name\":");
                quoted(name, &mut out);
                out.push_str(",\"type\":");
                quoted(wire_type(field).name(), &mut out);
                out.push('}');
            }
        }
    }
    out.push_str(if format == Format::Json { "],\"rows\":[" } else { "\n" });
    out
}

fn body(batch: &RecordBatch, format: Format, zone: &str, rows_before: bool) -> Result<String> {
    let columns =
        batch.columns().iter().map(|c| Column::new(c, zone)).collect::<datafusion::error::Result<Vec<_>>>()?;
    let mut out = String::new();
    for row in 0..batch.num_rows() {
        if format == Format::Json {
            out.push_str(if row > 0 || rows_before { ",\n[" } else { "\n[" });
        }
        for (i, column) in columns.iter().enumerate() {
            if i > 0 {
                out.push(',');
            }
            match format {
                Format::Json => column.json(row, &mut out)?,
                Format::Csv => column.csv(row, &mut out)?,
            }
        }
        out.push_str(if format == Format::Json { "]" } else { "\n" });
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_decoded() {
        let check = |text: &str, expected: &str| assert_eq!(decoded(text), expected, "{text}");
        check("SELECT+1", "SELECT 1");
        check("a%20b%2Bc", "a b+c");
        check("100%", "100%");
        check("%zz%4", "%zz%4");
        check("%C3%A9", "é");
        check("é%", "é%");
    }
}
