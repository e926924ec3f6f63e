//! What every endpoint answers: Prometheus's envelope, and the one table from kinds of errors to statuses.

use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use engine::Reservation;

use super::json;
use crate::error::{QueryError, QueryErrorKind};

/// Warnings, and likewise infos, beyond this many are only counted in an answer.
const ANNOTATIONS_MAX: usize = 10;

/// The warning of an answer that a `limit` has cut.
pub(super) const TRUNCATED: &str = "results truncated due to limit";

/// A body with the memory that it takes until it is sent.
#[derive(Debug)]
pub(super) struct Held {
    body: Vec<u8>,
    _memory: Reservation,
}

impl Held {
    /// Of what `memory` was taken for only the body is left.
    pub(super) fn new(body: Vec<u8>, mut memory: Reservation) -> Self {
        memory.shrink_to(body.capacity());
        Self { body, _memory: memory }
    }
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.body
    }
}

/// A successful answer.
#[derive(Debug)]
pub(super) enum Reply {
    /// A whole JSON envelope.
    Json(Vec<u8>),
    /// The same, with the memory that it takes until it is sent.
    Held(Held),
    /// Nothing was asked for.
    NoContent,
}

impl Reply {
    /// An envelope around what `data` writes, without annotations.
    pub(super) fn data(data: impl FnOnce(&mut Vec<u8>)) -> Self {
        Self::annotated(data, &[], &[])
    }

    /// The same answer, which holds `memory` until it is sent.
    pub(super) fn holding(self, memory: Reservation) -> Self {
        match self {
            Self::Json(body) => Self::Held(Held::new(body, memory)),
            other => other,
        }
    }

    /// An envelope with the warning that the answer was cut, when it was.
    pub(super) fn cut(truncated: bool, data: impl FnOnce(&mut Vec<u8>)) -> Self {
        if truncated { Self::annotated(data, &[TRUNCATED.to_owned()], &[]) } else { Self::data(data) }
    }

    /// An envelope with warnings and infos.
    pub(super) fn annotated(data: impl FnOnce(&mut Vec<u8>), warnings: &[String], infos: &[String]) -> Self {
        let mut out = Vec::with_capacity(1024);
        out.extend_from_slice(br#"{"status":"success","data":"#);
        data(&mut out);
        annotations(&mut out, "warnings", "warning", warnings);
        annotations(&mut out, "infos", "info", infos);
        out.push(b'}');
        Self::Json(out)
    }
}

fn annotations(out: &mut Vec<u8>, field: &str, kind: &str, all: &[String]) {
    if all.is_empty() {
        return;
    }
    out.push(b',');
    json::text(out, field);
    out.push(b':');
    let omitted = all.len().saturating_sub(ANNOTATIONS_MAX);
    let more = (omitted > 0).then(|| format!("{omitted} more {kind} annotations omitted"));
    json::texts(out, all.iter().take(ANNOTATIONS_MAX).chain(&more).map(String::as_str));
}

impl IntoResponse for Reply {
    fn into_response(self) -> Response {
        match self {
            Self::Json(body) => (json_type(), body).into_response(),
            Self::Held(held) => (json_type(), held).into_response(),
            Self::NoContent => StatusCode::NO_CONTENT.into_response(),
        }
    }
}

impl IntoResponse for Held {
    fn into_response(self) -> Response {
        Bytes::from_owner(self).into_response()
    }
}

fn json_type() -> [(axum::http::HeaderName, HeaderValue); 1] {
    [(CONTENT_TYPE, HeaderValue::from_static("application/json"))]
}

/// A failed request.
#[derive(Debug)]
pub(super) struct Failure(pub(super) QueryError);

impl From<QueryError> for Failure {
    fn from(e: QueryError) -> Self {
        Self(e)
    }
}

/// `errorType` and status of an error.
pub(super) fn error_type(kind: QueryErrorKind) -> (&'static str, StatusCode) {
    match kind {
        QueryErrorKind::BadData => ("bad_data", StatusCode::BAD_REQUEST),
        QueryErrorKind::Execution => ("execution", StatusCode::UNPROCESSABLE_ENTITY),
        QueryErrorKind::Timeout => ("timeout", StatusCode::SERVICE_UNAVAILABLE),
        QueryErrorKind::Canceled => ("canceled", StatusCode::SERVICE_UNAVAILABLE),
        QueryErrorKind::Unavailable => ("unavailable", StatusCode::SERVICE_UNAVAILABLE),
        QueryErrorKind::NotFound => ("not_found", StatusCode::NOT_FOUND),
        QueryErrorKind::Internal => ("internal", StatusCode::INTERNAL_SERVER_ERROR),
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let Self(QueryError { kind, message }) = self;
        let (name, status) = error_type(kind);
        if kind == QueryErrorKind::Internal {
            tracing::error!(error = message, "query api failed");
        }
        let mut out = Vec::with_capacity(64 + message.len());
        out.extend_from_slice(br#"{"status":"error","errorType":"#);
        json::text(&mut out, name);
        out.extend_from_slice(br#","error":"#);
        json::text(&mut out, &message);
        out.push(b'}');
        let mut response = (status, json_type(), out).into_response();
        if kind == QueryErrorKind::Unavailable {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("5"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(reply: Reply) -> String {
        match reply {
            Reply::Json(body) => String::from_utf8(body).expect("UTF-8"),
            Reply::Held(_) | Reply::NoContent => String::new(),
        }
    }

    #[test]
    fn envelopes() {
        let data = |out: &mut Vec<u8>| out.extend_from_slice(b"[]");
        assert_eq!(body(Reply::data(data)), r#"{"status":"success","data":[]}"#);
        assert_eq!(
            body(Reply::cut(true, data)),
            r#"{"status":"success","data":[],"warnings":["results truncated due to limit"]}"#
        );
        let many: Vec<String> = (0..12).map(|i| i.to_string()).collect();
        assert_eq!(
            body(Reply::annotated(data, &[], &many)),
            r#"{"status":"success","data":[],"infos":["0","1","2","3","4","5","6","7","8","9","2 more info annotations omitted"]}"#
        );
    }
}
