//! What goes wrong with a statement, as SQL clients are told: a SQLSTATE, a message, and an HTTP status.

use std::fmt;

use arrow::error::ArrowError;
use datafusion::common::SchemaError;
use datafusion::common::utils::datafusion_strsim::levenshtein;
use datafusion::error::DataFusionError;
use datafusion::sql::sqlparser::dialect::PostgreSqlDialect;
use datafusion::sql::sqlparser::tokenizer::{Token, Tokenizer};
use engine::{Error, ErrorKind, TooOld};

/// An error with its SQLSTATE.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SqlError {
    /// Five characters; see appendix A of PostgreSQL's manual.
    pub code: &'static str,
    /// What went wrong.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
    /// Where in the text, in characters from one.
    pub position: Option<usize>,
    /// The name in the text that is at fault, as far as one is.
    name: Option<String>,
}

/// Result with a SQLSTATE on failure.
pub type Result<T, E = SqlError> = std::result::Result<T, E>;

impl SqlError {
    /// An error with this code.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None, position: None, name: None }
    }

    /// With a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// With the name to look for in the text.
    #[must_use]
    fn about(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// With the name out of `names` that the one at fault may have been meant to be.
    #[must_use]
    pub fn suggest<N: AsRef<str>>(mut self, names: impl IntoIterator<Item = N>, what: &str) -> Self {
        let last = |name: &str| name.rsplit('.').next().unwrap_or_default().to_lowercase();
        let Some(wrong) = self.name.as_deref().map(last) else { return self };
        // A name of which more than half is different is another one.
        let most = wrong.chars().count().div_ceil(3);
        let distance = |name: &str| {
            let name = last(name);
            (name.len().abs_diff(wrong.len()) <= most).then(|| levenshtein(&name, &wrong)).filter(|d| *d <= most)
        };
        let names = names.into_iter().filter_map(|n| Some((distance(n.as_ref())?, n.as_ref().to_owned())));
        if let Some((_, name)) = names.min() {
            self.hint = Some(format!("Perhaps you meant {what} \"{name}\"."));
        }
        self
    }

    /// With the place of what is at fault in `text`, of which statement `nth` (from zero) failed.
    #[must_use]
    pub fn within(mut self, text: &str, nth: usize) -> Self {
        if self.position.is_none()
            && let Some(name) = &self.name
        {
            self.position = place(text, nth, name);
        }
        self
    }

    /// Memory that was refused to a statement: by the account, or since one query may hold no more.
    pub fn no_memory(refused: &Error) -> Self {
        Self::new("53200", refused.to_string())
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
            "57" | "58" | "72" => 503,
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

/// Where a name stands in a statement of a text, in characters from one.
fn place(text: &str, nth: usize, name: &str) -> Option<usize> {
    let tokens = Tokenizer::new(&PostgreSqlDialect {}, text).tokenize_with_location().ok()?;
    let tokens: Vec<_> = tokens.iter().filter(|t| !matches!(t.token, Token::Whitespace(_))).collect();
    let of_statement = tokens.split(|t| t.token == Token::SemiColon).filter(|s| !s.is_empty()).nth(nth)?;
    let parts: Vec<&str> = name.split('.').map(|p| p.trim_matches('"')).collect();
    let is = |token: &Token, part: &str| matches!(token, Token::Word(w) if w.value.eq_ignore_ascii_case(part));
    let found = |parts: &[&str]| {
        let dotted = 2 * parts.len() - 1;
        of_statement.windows(dotted).find(|w| {
            parts
                .iter()
                .enumerate()
                .all(|(i, part)| is(&w[2 * i].token, part) && (i == 0 || w[2 * i - 1].token == Token::Period))
        })
    };
    let first = found(&parts).or_else(|| found(&parts[parts.len() - 1..]))?.first()?;
    character(text, first.span.start.line, first.span.start.column)
}

/// The character at a place that is given as line and column, all from one.
pub fn character(text: &str, line: u64, column: u64) -> Option<usize> {
    let before = text.split_inclusive('\n').take(usize::try_from(line.checked_sub(1)?).ok()?);
    let before: usize = before.map(|l| l.chars().count()).sum();
    Some(before + usize::try_from(column).ok()?)
}

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

/// A transaction whose snapshot has ended.
fn too_old(e: &Error) -> Option<SqlError> {
    let hint = "End the transaction and begin a new one.";
    TooOld::is(e).then(|| SqlError::new("72000", e.to_string()).hint(hint))
}

impl From<Error> for SqlError {
    fn from(e: Error) -> Self {
        if let Some(error) = too_old(&e) {
            return error;
        }
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
            SchemaError::FieldNotFound { field, valid_fields } => {
                let valid = valid_fields.iter().map(|c| match &c.relation {
                    Some(table) => format!("{}.{}", table.table(), c.name),
                    None => c.name.clone(),
                });
                no_column(&field.flat_name()).suggest(valid, "to reference the column")
            }
            SchemaError::AmbiguousReference { field } => {
                SqlError::new("42702", format!("column reference {:?} is ambiguous", field.name)).about(&field.name)
            }
            SchemaError::DuplicateQualifiedField { name, .. } | SchemaError::DuplicateUnqualifiedField { name } => {
                SqlError::new("42701", format!("column {name:?} is specified more than once"))
            }
        },
        DataFusionError::Plan(m) => plan(m),
        DataFusionError::Execution(m) if m.starts_with("Placeholder") => {
            SqlError::new("42P02", format!("there is no parameter {}", m.split('\'').nth(1).unwrap_or("$1")))
        }
        DataFusionError::Execution(_) => SqlError::new("22000", text()),
        DataFusionError::ArrowError(arrow, _) => match arrow.as_ref() {
            ArrowError::DivideByZero => SqlError::new("22012", "division by zero"),
            ArrowError::ArithmeticOverflow(m) => SqlError::new("22003", m.clone()),
            ArrowError::CastError(m) | ArrowError::ParseError(m) => cast(m),
            ArrowError::ExternalError(inner) => return known(inner.downcast_ref()?),
            ArrowError::MemoryError(m) => SqlError::new("53200", m.clone()),
            ArrowError::ComputeError(m) | ArrowError::InvalidArgumentError(m) => SqlError::new("22000", m.clone()),
            _ => return None,
        },
        DataFusionError::External(inner) => {
            let ours = || inner.downcast_ref().and_then(too_old);
            return inner.downcast_ref::<SqlError>().cloned().or_else(ours).or_else(|| known(inner.downcast_ref()?));
        }
        _ => return None,
    })
}

fn no_column(name: &str) -> SqlError {
    // As PostgreSQL has it: quoted unless it has a table.
    let shown = if name.contains('.') { name.to_owned() } else { format!("{name:?}") };
    SqlError::new("42703", format!("column {shown} does not exist")).about(name)
}

/// A value that is none of its type.
fn cast(message: &str) -> SqlError {
    if let Some((value, to)) =
        message.strip_prefix("Cannot cast string '").and_then(|m| m.rsplit_once("' to value of "))
    {
        let to = sql_types(to.trim_end_matches(" type"));
        return SqlError::new("22P02", format!("invalid input syntax for type {to}: {value:?}"));
    }
    let code = if message.starts_with("Can't cast value") {
        "22003"
    } else if message.contains("arsing timestamp") || message.contains("arsing date") {
        "22007"
    } else {
        "22P02"
    };
    SqlError::new(code, message)
}

/// The names of types within a text as in SQL.
fn sql_types(text: &str) -> String {
    const NAMES: [(&str, &str); 12] = [
        ("Utf8View", "text"),
        ("LargeUtf8", "text"),
        ("Utf8", "text"),
        ("String", "text"),
        ("UInt64", "bigint"),
        ("Int64", "bigint"),
        ("Int32", "integer"),
        ("Int16", "smallint"),
        ("Float64", "double precision"),
        ("Float32", "real"),
        ("Boolean", "boolean"),
        ("Timestamp(ms, \"UTC\")", "timestamp with time zone"),
    ];
    NAMES.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
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
        return SqlError::new("42P01", format!("relation {name:?} does not exist")).about(name);
    }
    if message.contains("not found")
        && let Some(name) = quoted("column '")
    {
        return no_column(&name);
    }
    if message.starts_with("Invalid function")
        && let Some(name) = quoted("Invalid function '")
    {
        let error = SqlError::new("42883", format!("function {name:?} does not exist")).about(name);
        return error.suggest(quoted("Did you mean '"), "the function");
    }
    // The planner gives all its attempts first, and an address of its makers.
    if let Some((_, call)) = message.split_once("No function matches the given name and argument types '") {
        let (call, rest) = call.split_once('\'').unwrap_or((call, ""));
        let candidates: Vec<&str> = rest.lines().skip(2).map(str::trim).collect();
        let name = call.split('(').next().unwrap_or(call);
        let hint = "No function matches the given name and argument types. You might need to add explicit type casts.";
        let hint = match candidates.as_slice() {
            [] => hint.to_owned(),
            some => format!("{hint} There are {}.", sql_types(&some.join(", "))),
        };
        return SqlError::new("42883", format!("function {} does not exist", sql_types(call))).about(name).hint(hint);
    }
    if message.contains("must appear in the GROUP BY")
        && let Some((column, _)) = message.split_once("column \"").and_then(|m| m.1.split_once('"'))
    {
        let message =
            format!("column {column:?} must appear in the GROUP BY clause or be used in an aggregate function");
        return SqlError::new("42803", message).about(column);
    }
    let code = if message.contains("must be in GROUP BY") || message.starts_with("Aggregate functions are not allowed")
    {
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
        let ended = || crate::table::external(Error::unavailable("x").with_source(TooOld::Memory));
        check(ended(), "72000", 503);
        check(DataFusionError::Shared(std::sync::Arc::new(ended())), "72000", 503);
        check(plan("table 'thalweg.public.nope' not found").context("while planning"), "42P01", 400);
        let missing = SqlError::from(plan("table 'thalweg.public.nope' not found"));
        assert_eq!(missing.message, "relation \"nope\" does not exist");
    }

    #[test]
    fn errors_tell_where_and_what_was_meant() {
        let check = |message: &str, text: &str, nth: usize, position: Option<usize>, hint: Option<&str>| {
            let error = plan(message).within(text, nth);
            assert_eq!((error.position, error.hint.as_deref()), (position, hint), "{text}");
        };
        check("column 'nope' not found", "SELECT a,\n  nope FROM t", 0, Some(13), None);
        check("column 'nope' not found", "SELECT nope.x, 'nope'; SELECT \"nope\"", 1, Some(31), None);
        check("column 't.nope' not found", "SELECT nope, t.nope", 0, Some(14), None);
        check("column 't.nope' not found", "SELECT ü, nope", 0, Some(11), None);
        check("column 'nope' not found", "SELECT 1", 0, None, None);
        let hint = Some("Perhaps you meant the function \"count\".");
        check("Invalid function 'cout'.\nDid you mean 'count'?", "SELECT cout(*)", 0, Some(8), hint);
        check("Invalid function 'wholly'.\nDid you mean 'now'?", "SELECT wholly()", 0, Some(8), None);
        let error =
            plan("table 'thalweg.prometheus.requests_totl' not found").suggest(["up", "requests_total"], "the table");
        assert_eq!(error.hint.as_deref(), Some("Perhaps you meant the table \"requests_total\"."));
        let error = cast("Cannot cast string 'a' to value of Int32 type");
        assert_eq!((error.code, &*error.message), ("22P02", "invalid input syntax for type integer: \"a\""));
    }
}
