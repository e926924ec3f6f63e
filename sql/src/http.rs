//! SQL over HTTP: `POST /api/v1/sql` with the statement as the body, as a form field or as a JSON member `query`, and
//! `GET /api/v1/sql?query=`. `parameters` are the values of `$1` and so on, a JSON array, or those of `$name`, an object.
//!
//! The answer is JSON, `{"columns":[{"name":..,"type":..}],"rows":[[..]]}`; or, when `Accept` or `format` says so, CSV, a
//! JSON object per line, or a stream of Arrow record batches. It is streamed. An error before the first row has a status
//! and `{"error":..,"code":SQLSTATE}` as its body, with a `hint` where there is one; an error after it breaks the transfer off, so that a part is never taken
//! for the whole. With `limit` there are at most so many rows, and the header `thalweg-truncated` says whether there
//! would be more; to know that, the rows are held until they are all there. What there is to say besides, such as PromQL's
//! annotations of `promql()`, is told in JSON alone, as `"warnings":[..]` and `"infos":[..]` behind the rows.

use std::collections::HashMap;
use std::sync::Arc;

use access::{Caller, Routes, Scope};
use arrow::array::{ArrayRef, Int64Array, RecordBatch, RecordBatchOptions};
use arrow::datatypes::{Schema, SchemaRef};
use arrow::ipc::writer::StreamWriter;
use axum::Extension;
use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use datafusion::common::{ParamValues, ScalarValue};
use datafusion::execution::SendableRecordBatchStream;
use datafusion::logical_expr::LogicalPlan;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use engine::memory::Kind;
use engine::{Engine, Memory, Notice, Reservation};
use futures::{Stream, StreamExt, stream};
use serde_json::{Value, json};

use crate::error::{Result, SqlError};
use crate::export;
use crate::format::{Column, csv_field, quoted};
use crate::limits::TEXT_BYTES_MAX;
use crate::pg::wire_type;
use crate::session::{Frontend, Rights, Session};
use crate::statement::{Command, Names};

/// The longest body, in bytes: it is a statement, or has one in it.
const BODY_BYTES_MAX: usize = TEXT_BYTES_MAX;

/// Whether there are more rows than the request's limit.
const TRUNCATED: HeaderName = HeaderName::from_static("thalweg-truncated");

/// Routes of the SQL endpoint.
///
/// # Errors
/// When the SQL side of the engine can't be built.
pub fn routes(engine: &Engine) -> Result<Routes> {
    let frontend = Frontend::new(engine)?;
    let routes = Routes::new().route(Scope::Read, "/api/v1/sql", get(by_get).post(by_post));
    Ok(routes.with_state(frontend))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Json,
    Csv,
    /// An object per line.
    Lines,
    /// Arrow's stream of record batches.
    Arrow,
}

/// The formats by the names of `format`, their media types, and what else `Accept` may call them.
const FORMATS: [(&str, Format, &str, &[&str]); 4] = [
    ("json", Format::Json, "application/json", &[]),
    ("csv", Format::Csv, "text/csv; charset=utf-8", &["text/csv"]),
    (
        "ndjson",
        Format::Lines,
        "application/x-ndjson",
        &["application/x-ndjson", "application/ndjson", "application/jsonl"],
    ),
    ("arrow", Format::Arrow, "application/vnd.apache.arrow.stream", &["application/vnd.apache.arrow.stream"]),
];

#[derive(Debug, Default)]
struct Request {
    query: Option<String>,
    format: Option<String>,
    limit: Option<String>,
    parameters: Option<Value>,
}

impl Request {
    /// Reads `name=value&...`.
    fn form(&mut self, text: &str) -> Result<()> {
        for pair in text.split('&') {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            match name {
                "query" | "q" => self.query = Some(decoded(value)),
                "format" => self.format = Some(decoded(value)),
                "limit" => self.limit = Some(decoded(value)),
                "parameters" => {
                    let parsed = serde_json::from_str(&decoded(value));
                    self.parameters =
                        Some(parsed.map_err(|e| SqlError::new("22P02", format!("parameters are not JSON: {e}")))?);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn limit(&self) -> Result<Option<usize>> {
        let Some(text) = &self.limit else { return Ok(None) };
        let wrong = || SqlError::new("22023", format!("limit {text:?} is no number of rows"));
        text.parse().map(Some).map_err(|_| wrong())
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

async fn by_get(
    State(frontend): State<Arc<Frontend>>,
    caller: Option<Extension<Caller>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let mut request = Request::default();
    match request.form(query.as_deref().unwrap_or_default()) {
        Ok(()) => answer(&frontend, caller, request, &headers, false).await,
        Err(e) => failed(&e),
    }
}

async fn by_post(
    State(frontend): State<Arc<Frontend>>,
    caller: Option<Extension<Caller>>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let request = async {
        let (body, memory) = whole(frontend.engine().memory(), &headers, body).await?;
        let request = read(query.as_deref().unwrap_or_default(), &headers, &body)?;
        Ok::<_, SqlError>((request, memory))
    };
    match request.await {
        // What was reserved for the body is held for the request's texts until there is an answer.
        Ok((request, _memory)) => answer(&frontend, caller, request, &headers, true).await,
        Err(e) => failed(&e),
    }
}

/// All of a body, and the memory that is reserved for it as it comes.
async fn whole(memory: &Memory, headers: &HeaderMap, body: Body) -> Result<(Vec<u8>, Reservation)> {
    let too_large = |size: usize| {
        SqlError::new("54000", format!("request body has {size} bytes or more; {BODY_BYTES_MAX} are allowed"))
    };
    let declared = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
    if let Some(size) = declared.filter(|size| *size > BODY_BYTES_MAX) {
        return Err(too_large(size));
    }
    let (mut all, mut memory) = (Vec::new(), memory.reserve(Kind::Bodies));
    let mut parts = body.into_data_stream();
    while let Some(part) = parts.next().await {
        let part = part.map_err(|e| SqlError::new("08P01", format!("request body can't be read: {e}")))?;
        if part.len() > BODY_BYTES_MAX - all.len() {
            return Err(too_large(all.len() + part.len()));
        }
        memory.grow(part.len()).map_err(|e| SqlError::no_memory(&e))?;
        all.extend_from_slice(&part);
    }
    Ok((all, memory))
}

fn read(query: &str, headers: &HeaderMap, body: &[u8]) -> Result<Request> {
    let mut request = Request::default();
    request.form(query)?;
    let kind = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let text = std::str::from_utf8(body).map_err(|_| SqlError::new("22021", "the statement is not UTF-8"))?;
    if kind.starts_with("application/x-www-form-urlencoded") && text.contains("query=") {
        request.form(text)?;
    } else if kind.starts_with("application/json") {
        let value: Value =
            serde_json::from_str(text).map_err(|e| SqlError::new("22P02", format!("the body is not JSON: {e}")))?;
        let member = |name: &str| value.get(name).and_then(Value::as_str).map(str::to_owned);
        request.query = member("query").or(request.query);
        request.format = member("format").or(request.format);
        request.limit = value.get("limit").map(ToString::to_string).or(request.limit);
        request.parameters = value.get("parameters").cloned().or(request.parameters);
    } else if !text.trim().is_empty() {
        request.query = Some(text.to_owned());
    }
    Ok(request)
}

async fn answer(
    frontend: &Arc<Frontend>,
    caller: Option<Extension<Caller>>,
    request: Request,
    headers: &HeaderMap,
    posted: bool,
) -> Response {
    let name = caller.as_ref().map_or("http", |c| c.name());
    let rights = Rights::of(caller.as_deref());
    let rights = match posted {
        // What a browser sends for a page may ask, as any caller may, but not do anything.
        _ if headers.contains_key(header::ORIGIN) => Rights::default(),
        true => rights,
        false => rights.of_link(),
    };
    match respond(&frontend.session(name, rights), request, headers).await {
        Ok(response) => response,
        Err(e) => failed(&e),
    }
}

fn failed(e: &SqlError) -> Response {
    let status = StatusCode::from_u16(e.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut body = json!({ "error": e.message, "code": e.code });
    if let Some(hint) = &e.hint {
        body["hint"] = hint.as_str().into();
    }
    let mut response = (status, axum::Json(body)).into_response();
    if status == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

fn format(request: &Request, headers: &HeaderMap) -> Result<Format> {
    let accepts = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let named = |name: &str| FORMATS.iter().find(|(n, ..)| *n == name).map(|f| f.1);
    match request.format.as_deref() {
        Some(name) => named(name).ok_or_else(|| {
            SqlError::new("22023", format!("format {name:?} is not known; json, csv, ndjson and arrow are"))
        }),
        // The one that stands first.
        None => Ok(accepts
            .split(',')
            .map(|a| a.split(';').next().unwrap_or_default().trim())
            .find_map(|a| FORMATS.iter().find(|f| f.3.contains(&a) || f.2 == a).map(|f| f.1))
            .unwrap_or(Format::Json)),
    }
}

async fn respond(session: &Session, request: Request, headers: &HeaderMap) -> Result<Response> {
    let (format, limit) = (format(&request, headers)?, request.limit()?);
    let text = request.query.ok_or_else(|| SqlError::new("42601", "no statement: send it as the body or as query="))?;
    // The first batch tells whether there is an answer at all. Planning has the same time as running.
    let begun = async {
        let Given { batches, names, memory } = run(session, &text, request.parameters).await?;
        let (mut batches, truncated) = match limit {
            Some(limit) => held(memory.reserve(Kind::Queries), batches, limit).await?,
            None => (batches, None),
        };
        let first = batches.next().await.transpose()?;
        Ok::<_, SqlError>((batches, names, first, truncated))
    };
    let begun = tokio::time::timeout(session.timeout(), begun).await;
    let (batches, names, first, truncated) =
        begun.map_err(|_| SqlError::new("57014", "canceling statement due to statement timeout"))??;
    let mut writer = Writer::new(format, &batches.schema(), &names, session.time_zone())?;
    let head = stream::iter([Ok(writer.head())]);
    let batches = stream::iter(first.map(Ok)).chain(batches);
    let notices = session.notices().clone();
    // The end of Arrow's stream is written with the last batch.
    let body = batches.map(Some).chain(stream::iter([None])).map(move |batch| match batch {
        Some(batch) => writer.batch(&batch?),
        None => writer.end(truncated, &notices.take()),
    });
    let kind = FORMATS.iter().find(|f| f.1 == format).map_or("application/json", |f| f.2);
    let all = head.chain(until_error(body));
    let mut response = ([(header::CONTENT_TYPE, kind)], Body::from_stream(until_error(all))).into_response();
    if let Some(truncated) = truncated {
        let value = if truncated { "true" } else { "false" };
        response.headers_mut().insert(TRUNCATED, HeaderValue::from_static(value));
    }
    Ok(response)
}

/// The first `limit` rows, and whether there are more.
async fn held(
    mut memory: Reservation,
    mut batches: SendableRecordBatchStream,
    limit: usize,
) -> Result<(SendableRecordBatchStream, Option<bool>)> {
    let schema = batches.schema();
    let (mut all, mut rows, mut truncated) = (Vec::new(), 0, false);
    while let Some(batch) = batches.next().await.transpose()? {
        let wanted = batch.num_rows().min(limit - rows);
        truncated |= wanted < batch.num_rows();
        if wanted > 0 {
            memory.grow(batch.get_array_memory_size()).map_err(|e| SqlError::no_memory(&e))?;
            all.push(batch.slice(0, wanted));
            rows += wanted;
        }
        if truncated {
            break;
        }
    }
    // What is held goes with the answer.
    let given = stream::iter(all).map(move |batch| {
        let _ = &memory;
        Ok(batch)
    });
    Ok((Box::pin(RecordBatchStreamAdapter::new(schema, given)), Some(truncated)))
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

/// What a statement gives.
struct Given {
    batches: SendableRecordBatchStream,
    names: Names,
    /// What to reserve from for holding the rows.
    memory: Memory,
}

async fn run(session: &Session, text: &str, parameters: Option<Value>) -> Result<Given> {
    let given = |batch: RecordBatch| Given {
        batches: Box::pin(RecordBatchStreamAdapter::new(batch.schema(), stream::iter([Ok(batch)]))),
        names: Names::default(),
        memory: session.engine().memory().clone(),
    };
    let mut commands = session.parse(text).await?;
    match (commands.pop(), commands.is_empty()) {
        (Some(Command::Query { statement, names }), true) => {
            let mut plan = session.plan(&statement).await?;
            if let Some(parameters) = parameters {
                plan = with_parameters(plan, &parameters)?;
            }
            let (batches, memory) = session.run_within(plan, session.timeout()).await?;
            Ok(Given { batches, names, memory })
        }
        (Some(Command::Show(name)), true) => Ok(given(session.show(&name)?)),
        (Some(Command::CopyOut { statement, names, format, to: Some(to) }), true) => {
            session.check_export()?;
            let mut plan = session.plan(&statement).await?;
            if let Some(parameters) = parameters {
                plan = with_parameters(plan, &parameters)?;
            }
            let rows = export::copy_to(session, plan, &names, &format, &to).await?;
            let rows = Arc::new(Int64Array::from(vec![rows as i64])) as ArrayRef;
            let batch = RecordBatch::try_from_iter([("rows", rows)]);
            Ok(given(batch.map_err(datafusion::error::DataFusionError::from)?))
        }
        (Some(command @ (Command::CreateView { .. } | Command::DropView { .. })), true) => {
            session.change(&command).await?;
            Ok(given(RecordBatch::new_empty(Arc::new(Schema::empty()))))
        }
        (Some(_), true) => Err(SqlError::unsupported("a statement without rows over HTTP, which has no sessions,")),
        (Some(_), false) => Err(SqlError::unsupported("more than one statement in a request")),
        (None, _) => Err(SqlError::new("42601", "no statement was given")),
    }
}

/// A plan with the values of its parameters, which take the types that the statement gives them.
fn with_parameters(plan: LogicalPlan, values: &Value) -> Result<LogicalPlan> {
    let types = plan.get_parameter_types()?;
    let value = |name: String, value: &Value| -> Result<ScalarValue> {
        let scalar = match value {
            Value::Null => ScalarValue::Null,
            Value::Bool(b) => ScalarValue::from(*b),
            Value::Number(n) => n.as_i64().map_or_else(|| ScalarValue::from(n.as_f64()), ScalarValue::from),
            Value::String(s) => ScalarValue::from(s.as_str()),
            Value::Array(_) | Value::Object(_) => {
                return Err(SqlError::new("22023", format!("parameter {name} is no single value: {value}")));
            }
        };
        match types.get(&name) {
            Some(Some(kind)) => Ok(scalar.cast_to(kind)?),
            _ => Ok(scalar),
        }
    };
    let values: ParamValues = match values {
        Value::Array(all) => {
            let all = all.iter().enumerate().map(|(i, v)| value(format!("${}", i + 1), v));
            all.collect::<Result<Vec<ScalarValue>>>()?.into()
        }
        Value::Object(all) => {
            let all = all.iter().map(|(name, v)| Ok((name.clone(), value(format!("${name}"), v)?)));
            all.collect::<Result<HashMap<String, ScalarValue>>>()?.into()
        }
        other => {
            return Err(SqlError::new("22023", format!("parameters are an array or an object, not {other}")));
        }
    };
    Ok(plan.with_param_values(values)?)
}

/// Writes an answer in parts.
struct Writer {
    format: Format,
    zone: Arc<str>,
    /// With the names that PostgreSQL would give the columns.
    schema: SchemaRef,
    arrow: Option<StreamWriter<Vec<u8>>>,
    rows_before: bool,
}

impl Writer {
    fn new(format: Format, planned: &SchemaRef, names: &Names, zone: Arc<str>) -> Result<Self> {
        let width = planned.fields().len();
        let mut taken = std::collections::HashSet::new();
        let fields: Vec<_> = planned
            .fields()
            .iter()
            .enumerate()
            .map(|(i, field)| {
                let mut name = names.name(i, width, field.name()).to_owned();
                // Members of an object have different names.
                while format == Format::Lines && !taken.insert(name.clone()) {
                    name.push_str("_1");
                }
                field.as_ref().clone().with_name(name)
            })
            .collect();
        let schema = Arc::new(Schema::new(fields));
        let arrow = (format == Format::Arrow).then(|| StreamWriter::try_new(Vec::new(), &schema)).transpose();
        let arrow = arrow.map_err(datafusion::error::DataFusionError::from)?;
        Ok(Self { format, zone, schema, arrow, rows_before: false })
    }

    fn head(&mut self) -> Bytes {
        let mut out = String::new();
        match self.format {
            Format::Arrow => return self.written(),
            Format::Lines => {}
            Format::Json => {
                out.push_str("{\"columns\":[");
                for (i, field) in self.schema.fields().iter().enumerate() {
                    out.push_str(if i > 0 { ",{\"name\":" } else { "{\"name\":" });
                    quoted(field.name(), &mut out);
                    out.push_str(",\"type\":");
                    quoted(wire_type(field).name(), &mut out);
                    out.push('}');
                }
                out.push_str("],\"rows\":[");
            }
            Format::Csv => {
                for (i, field) in self.schema.fields().iter().enumerate() {
                    if i > 0 {
                        out.push(',');
                    }
                    let start = out.len();
                    out.push_str(field.name());
                    csv_field(start, &mut out);
                }
                out.push('\n');
            }
        }
        out.into()
    }

    fn written(&mut self) -> Bytes {
        self.arrow.as_mut().map(|w| std::mem::take(w.get_mut())).unwrap_or_default().into()
    }

    fn batch(&mut self, batch: &RecordBatch) -> Result<Bytes> {
        if let Some(writer) = &mut self.arrow {
            let failed = datafusion::error::DataFusionError::from;
            let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
            let columns = batch.columns().to_vec();
            let batch = RecordBatch::try_new_with_options(self.schema.clone(), columns, &options).map_err(failed)?;
            writer.write(&batch).map_err(failed)?;
            return Ok(self.written());
        }
        let columns = batch
            .columns()
            .iter()
            .map(|c| Column::new(c, &self.zone))
            .collect::<datafusion::error::Result<Vec<_>>>()?;
        let mut out = String::new();
        for row in 0..batch.num_rows() {
            match self.format {
                Format::Json => out.push_str(if row > 0 || self.rows_before { ",\n[" } else { "\n[" }),
                Format::Lines => out.push('{'),
                Format::Csv | Format::Arrow => {}
            }
            for (i, column) in columns.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                if self.format == Format::Lines {
                    quoted(self.schema.field(i).name(), &mut out);
                    out.push(':');
                }
                match self.format {
                    Format::Csv => column.csv(row, &mut out)?,
                    _ => column.json(row, &mut out)?,
                }
            }
            out.push_str(match self.format {
                Format::Json => "]",
                Format::Lines => "}\n",
                Format::Csv | Format::Arrow => "\n",
            });
        }
        self.rows_before |= batch.num_rows() > 0;
        Ok(out.into())
    }

    fn end(&mut self, truncated: Option<bool>, notices: &[Notice]) -> Result<Bytes> {
        if let Some(writer) = &mut self.arrow {
            writer.finish().map_err(datafusion::error::DataFusionError::from)?;
            return Ok(self.written());
        }
        if self.format != Format::Json {
            return Ok(Bytes::new());
        }
        let mut out = String::from("]");
        if let Some(truncated) = truncated {
            out.push_str(&format!(",\"truncated\":{truncated}"));
        }
        for (name, is_warning) in [("warnings", true), ("infos", false)] {
            let texts: Vec<&str> =
                notices.iter().filter(|n| n.is_warning == is_warning).map(|n| n.text.as_str()).collect();
            if !texts.is_empty() {
                out.push_str(&format!(",\"{name}\":{}", Value::from(texts)));
            }
        }
        out.push_str("}\n");
        Ok(out.into())
    }
}

#[cfg(test)]
mod tests {
    use engine::Settings;

    use super::*;
    use crate::tests::Fixture;

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

    struct Asked {
        fixture: Fixture,
        frontend: Arc<Frontend>,
    }

    impl Asked {
        async fn with(settings: Settings) -> Self {
            let fixture = Fixture::with(settings).await;
            let frontend = Frontend::new(&fixture.engine).unwrap();
            Self { fixture, frontend }
        }

        async fn get(&self, query: &str) -> (u16, String) {
            let query = RawQuery(Some(query.to_owned()));
            told(by_get(State(self.frontend.clone()), None, query, HeaderMap::new()).await).await
        }

        async fn post(&self, headers: HeaderMap, body: impl Into<Body>) -> (u16, String) {
            told(by_post(State(self.frontend.clone()), None, RawQuery(None), headers, body.into()).await).await
        }
    }

    /// Status, and the SQLSTATE of an error or the body of an answer.
    async fn told(response: Response) -> (u16, String) {
        let status = response.status().as_u16();
        let body = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
        let text = String::from_utf8(body.to_vec()).unwrap();
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("no JSON ({e}): {text}"));
        (status, value["code"].as_str().map_or(text, str::to_owned))
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn bodies_are_bounded_and_accounted() {
        let asked = Asked::with(Settings::default()).await;
        let memory = asked.fixture.engine.memory();
        let long = " ".repeat(BODY_BYTES_MAX) + "SELECT 1";
        assert_eq!(asked.post(HeaderMap::new(), long.clone()).await, (422, "54000".to_owned()));
        let declared = HeaderMap::from_iter([(header::CONTENT_LENGTH, HeaderValue::from(long.len()))]);
        // Not even a byte of it is waited for.
        let never = Body::from_stream(stream::pending::<std::io::Result<Bytes>>());
        assert_eq!(asked.post(declared, never).await, (422, "54000".to_owned()));
        let broken = stream::iter([Ok("SELECT"), Err(std::io::Error::other("gone"))]);
        assert_eq!(asked.post(HeaderMap::new(), Body::from_stream(broken)).await, (400, "08P01".to_owned()));
        let mut others = memory.reserve(Kind::Bodies);
        others.grow(memory.max(Kind::Bodies) - 1000).unwrap();
        assert_eq!(asked.post(HeaderMap::new(), "SELECT 1").await.0, 200);
        assert_eq!(asked.post(HeaderMap::new(), " ".repeat(1001)).await, (422, "53200".to_owned()));
        assert_eq!(memory.held(Kind::Bodies), others.bytes());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn rows_that_are_held_count_as_their_querys() {
        const MANY: &str = "query=SELECT+value+FROM+generate_series(1,1000000)&limit=1000000";
        let asked = Asked::with(Settings { query_memory_max: 1 << 20, ..Settings::default() }).await;
        assert_eq!(asked.get("query=SELECT+1&limit=1").await.0, 200);
        assert_eq!(asked.get(MANY).await, (422, "53200".to_owned()));
        // What there is for all is refused in the same words.
        let asked = Asked::with(Settings::default()).await;
        let memory = asked.fixture.engine.memory();
        let mut others = memory.reserve(Kind::Queries);
        others.grow(memory.max(Kind::Queries) - (1 << 20)).unwrap();
        assert_eq!(asked.get(MANY).await, (422, "53200".to_owned()));
        drop(others);
        assert_eq!(asked.get(MANY).await.0, 200);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_an_export_holds_counts_as_its_querys() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().canonicalize().unwrap().display().to_string();
        let locations = vec![place.clone()];
        let settings = Settings { query_memory_max: 1 << 20, export_locations: locations, ..Settings::default() };
        let asked = Asked::with(settings).await;
        let session = asked.frontend.session("me", Rights { exports: true, ..Rights::default() });
        let copy = async |count: usize| {
            let rows = format!("SELECT value FROM generate_series(1, {count})");
            let text = format!("COPY ({rows}) TO '{place}/{count}.parquet' (FORMAT parquet)");
            run(&session, &text, None).await.map(drop).map_err(|e| e.code)
        };
        assert_eq!(copy(10).await, Ok(()));
        assert_eq!(copy(3_000_000).await, Err("53200"));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_link_stops_no_query() {
        let asked = Asked::with(Settings::default()).await;
        let cancel = "SELECT catalog.cancel(id) AS c FROM catalog.queries WHERE state = 'running'";
        assert_eq!(asked.get(&format!("query={}", cancel.replace(' ', "+"))).await, (400, "42501".to_owned()));
        let origin = HeaderMap::from_iter([(header::ORIGIN, HeaderValue::from_static("https://example.com"))]);
        assert_eq!(asked.post(origin, cancel).await, (400, "42501".to_owned()));
        assert_eq!(asked.post(HeaderMap::new(), "SELECT catalog.cancel(0) AS c").await.0, 200);
    }
}
