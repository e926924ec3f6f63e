//! What a query can fail with. The kinds are those of the Prometheus HTTP API; `api` has the one table from kind to
//! status and `errorType`.

use std::fmt;

use arrow::error::ArrowError;
use datafusion::error::DataFusionError;
use engine::{Error, ErrorKind};

/// Which of the API's error types it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QueryErrorKind {
    /// The text or a parameter is wrong.
    BadData,
    /// The text is right, evaluating it is not possible with these data.
    Execution,
    /// The deadline passed.
    Timeout,
    /// The client went away.
    Canceled,
    /// Temporary.
    Unavailable,
    /// What was named does not exist.
    NotFound,
    /// A bug or an environment failure.
    Internal,
}

/// A failed query: kind and message, worded as Prometheus words it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueryError {
    /// Which of the API's error types it is.
    pub kind: QueryErrorKind,
    /// What happened.
    pub message: String,
}

/// Result of planning or evaluating.
pub type Result<T, E = QueryError> = std::result::Result<T, E>;

impl QueryError {
    /// An error.
    pub fn new(kind: QueryErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// The text or a parameter is wrong.
    pub fn bad_data(message: impl Into<String>) -> Self {
        Self::new(QueryErrorKind::BadData, message)
    }

    /// Evaluation is not possible with these data.
    pub fn execution(message: impl Into<String>) -> Self {
        Self::new(QueryErrorKind::Execution, message)
    }

    /// A bug or an environment failure.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(QueryErrorKind::Internal, message)
    }
}

impl fmt::Display for QueryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for QueryError {}

impl From<Error> for QueryError {
    fn from(e: Error) -> Self {
        let kind = match e.kind() {
            ErrorKind::Invalid => QueryErrorKind::BadData,
            ErrorKind::NotFound => QueryErrorKind::NotFound,
            ErrorKind::LimitExceeded => QueryErrorKind::Execution,
            ErrorKind::Unavailable => QueryErrorKind::Unavailable,
            ErrorKind::Timeout => QueryErrorKind::Timeout,
            ErrorKind::Canceled => QueryErrorKind::Canceled,
            ErrorKind::Corrupt | ErrorKind::Internal => QueryErrorKind::Internal,
        };
        Self::new(kind, e.to_string())
    }
}

impl From<DataFusionError> for QueryError {
    fn from(e: DataFusionError) -> Self {
        match find(&e) {
            Some(ours) => ours.clone(),
            None => engine::error_of(e).into(),
        }
    }
}

impl From<QueryError> for DataFusionError {
    fn from(e: QueryError) -> Self {
        Self::External(Box::new(e))
    }
}

/// The error of ours inside one that travelled through a plan.
fn find(e: &DataFusionError) -> Option<&QueryError> {
    match e {
        DataFusionError::External(inner) => match inner.downcast_ref::<QueryError>() {
            Some(e) => Some(e),
            None => find(inner.downcast_ref::<DataFusionError>()?),
        },
        DataFusionError::Context(_, inner) => find(inner),
        DataFusionError::Shared(inner) => find(inner),
        DataFusionError::ArrowError(inner, _) => match inner.as_ref() {
            ArrowError::ExternalError(inner) => match inner.downcast_ref::<QueryError>() {
                Some(e) => Some(e),
                None => find(inner.downcast_ref::<DataFusionError>()?),
            },
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_ours_survive_a_plan() {
        let e = QueryError::execution("many-to-many");
        let wrapped = DataFusionError::Context("node".into(), Box::new(DataFusionError::from(e.clone())));
        assert_eq!(QueryError::from(wrapped), e);
        let e = DataFusionError::External(Box::new(Error::timeout("too slow")));
        assert_eq!(QueryError::from(e).kind, QueryErrorKind::Timeout);
    }
}
