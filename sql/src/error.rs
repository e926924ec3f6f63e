//! What goes wrong with a statement, as SQL clients are told: a SQLSTATE, a message, and an HTTP status.

use std::fmt;

use arrow::error::ArrowError;
use datafusion::common::SchemaError;
use datafusion::error::DataFusionError;
use engine::{Error, ErrorKind};

/// An error with its SQLSTATE.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SqlError {
    /// Five characters; see appendix A of PostgreSQL's manual.
    pub code: &'static str,
    /// What went wrong.
    pub message: String,
}

/// Result with a SQLSTATE on failure.
pub type Result<T, E = SqlError> = std::result::Result<T, E>;

impl SqlError {
    /// An error with this code.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// What the protocol has and this server does not.
    pub fn unsupported(what: impl fmt::Display) -> Self {
        Self::new("0A000", format!("{what} is not supported"))
    }

    /// The HTTP status: 400 when the statement is at fault, 422 when running it failed, 503 when a later attempt may
    /// do better, 500 otherwise.
    pub fn http_status(&self) -> u16 {
        match &self.code[..2] {
            _ if self.code == "53300" => 503,
            "57" | "58" => 503,
            "22" | "53" | "54" => 422,
            "XX" => 500,
            _ => 400,
        }
    }
}

impl fmt::Display for SqlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for SqlError {}

/// The SQLSTATE of our own errors.
fn code_of(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Invalid => "42601",
        ErrorKind::NotFound => "42704",
        ErrorKind::LimitExceeded => "54000",
        ErrorKind::Unavailable => "57P03",
        ErrorKind::Timeout | ErrorKind::Canceled => "57014",
        ErrorKind::Corrupt => "XX001",
        ErrorKind::Internal => "XX000",
    }
}

impl From<Error> for SqlError {
    fn from(e: Error) -> Self {
        if e.kind() == ErrorKind::Internal || e.kind() == ErrorKind::Corrupt {
            tracing::error!(error = %e, "query failed");
        }
        let message = match e.kind() {
            ErrorKind::Timeout => "canceling statement due to statement timeout".to_owned(),
            _ => e.to_string(),
        };
        Self::new(code_of(e.kind()), message)
    }
}

impl From<DataFusionError> for SqlError {
    fn from(e: DataFusionError) -> Self {
        // Failures of a query's input are told by DataFusion's own kinds, those of the engine by the engine's.
        match known(&e) {
            Some(error) => error,
            None => engine::error_of(e).into(),
        }
    }
}

fn known(e: &DataFusionError) -> Option<SqlError> {
    let text = || e.message().into_owned();
    Some(match e {
        DataFusionError::Context(_, inner) | DataFusionError::Diagnostic(_, inner) => return known(inner),
        DataFusionError::Shared(inner) => return known(inner),
        DataFusionError::Collection(all) => return known(all.first()?),
        DataFusionError::SQL(parser, _) => SqlError::new("42601", parser.to_string()),
        DataFusionError::NotImplemented(_) => SqlError::new("0A000", text()),
        DataFusionError::ResourcesExhausted(_) => SqlError::new("53200", text()),
        DataFusionError::Configuration(_) => SqlError::new("22023", text()),
        DataFusionError::SchemaError(schema, _) => match schema.as_ref() {
            SchemaError::FieldNotFound { field, .. } => {
                SqlError::new("42703", format!("column {:?} does not exist", field.flat_name()))
            }
            SchemaError::AmbiguousReference { field } => {
                SqlError::new("42702", format!("column reference {:?} is ambiguous", field.name))
            }
            SchemaError::DuplicateQualifiedField { name, .. } | SchemaError::DuplicateUnqualifiedField { name } => {
                SqlError::new("42701", format!("column {name:?} is specified more than once"))
            }
        },
        DataFusionError::Plan(m) => plan(m),
        DataFusionError::Execution(_) => SqlError::new("22000", text()),
        DataFusionError::ArrowError(arrow, _) => match arrow.as_ref() {
            ArrowError::DivideByZero => SqlError::new("22012", "division by zero"),
            ArrowError::ArithmeticOverflow(m) => SqlError::new("22003", m.clone()),
            ArrowError::CastError(m) | ArrowError::ParseError(m) => SqlError::new("22P02", m.clone()),
            ArrowError::ExternalError(inner) => return known(inner.downcast_ref()?),
            ArrowError::MemoryError(m) => SqlError::new("53200", m.clone()),
            ArrowError::ComputeError(m) | ArrowError::InvalidArgumentError(m) => SqlError::new("22000", m.clone()),
            _ => return None,
        },
        DataFusionError::External(inner) => return known(inner.downcast_ref()?),
        _ => return None,
    })
}

/// The planner tells its failures apart by nothing but their text.
fn plan(message: &str) -> SqlError {
    let quoted = |prefix: &str| {
        let rest = message.split_once(prefix)?.1;
        rest.split_once('\'').map(|(name, _)| name.to_owned())
    };
    if message.contains("not found")
        && let Some(name) = quoted("table '")
    {
        // The planner writes the name in full.
        let name = name.strip_prefix(&format!("{}.", crate::session::DATABASE)).unwrap_or(&name);
        let name = name.strip_prefix("public.").unwrap_or(name);
        return SqlError::new("42P01", format!("relation {name:?} does not exist"));
    }
    if message.contains("not found")
        && let Some(name) = quoted("column '")
    {
        return SqlError::new("42703", format!("column {name:?} does not exist"));
    }
    let code = if message.starts_with("Invalid function") || message.contains("No function matches") {
        "42883"
    } else if message.contains("must appear in the GROUP BY") || message.contains("must be in GROUP BY") {
        "42803"
    } else if message.contains("coerce") || message.contains("Cannot infer common") {
        "42804"
    } else {
        "42601"
    };
    SqlError::new(code, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_sqlstates() {
        let check = |e: DataFusionError, code: &str, status: u16| {
            let text = e.to_string();
            let got = SqlError::from(e);
            assert_eq!((got.code, got.http_status()), (code, status), "{text}");
        };
        let plan = |m: &str| DataFusionError::Plan(m.to_owned());
        check(plan("table 'thalweg.public.nope' not found"), "42P01", 400);
        check(plan("column 'nope' not found in 't'"), "42703", 400);
        check(plan("Invalid function 'nope'"), "42883", 400);
        check(DataFusionError::NotImplemented("x".into()), "0A000", 400);
        check(DataFusionError::ResourcesExhausted("x".into()), "53200", 422);
        check(ArrowError::DivideByZero.into(), "22012", 422);
        check(crate::table::external(Error::timeout("x")), "57014", 503);
        check(crate::table::external(Error::unavailable("x")), "57P03", 503);
        check(crate::table::external(Error::limit_exceeded("x")), "54000", 422);
        check(plan("table 'thalweg.public.nope' not found").context("while planning"), "42P01", 400);
        let missing = SqlError::from(plan("table 'thalweg.public.nope' not found"));
        assert_eq!(missing.message, "relation \"nope\" does not exist");
    }
}
