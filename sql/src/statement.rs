//! Statements: which are answered, which are refused, and how PostgreSQL would call their columns.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::sync::Arc;

use datafusion::sql::sqlparser::ast::{
    BinaryOperator, CastKind, CloseCursor, ContextModifier, CopyLegacyCsvOption, CopyLegacyOption, CopyOption,
    CopySource, CopyTarget, CreateTableOptions, CreateView, DataType, Declare, DiscardObject, Expr, FunctionArguments,
    Ident, ObjectName, ObjectType, OrderBy, OrderByKind, Query, Reset, SelectItem, Set, SetExpr, Statement,
    TableAliasColumnDef, TableFactor, TransactionMode, Value, ValueWithSpan, VisitMut, VisitorMut,
};
use datafusion::sql::sqlparser::dialect::PostgreSqlDialect;
use datafusion::sql::sqlparser::parser::{Parser, ParserError};
use datafusion::sql::sqlparser::tokenizer::{Token, Tokenizer};
use datafusion_pg_catalog::sql::PostgresCompatibilityParser;

use crate::error::{Result, SqlError, character};
use crate::limits;
use crate::pg::{functions, system};

/// Longest name, as PostgreSQL has it.
pub const NAME_BYTES_MAX: usize = 63;

/// What a statement asks for.
#[derive(Debug, Clone)]
pub enum Command {
    /// Rows: to be planned.
    Query {
        /// The statement, with all columns named.
        statement: Arc<Statement>,
        /// What its columns are called.
        names: Names,
    },
    /// `COPY ... TO` the client, a file or an URL.
    CopyOut {
        /// The query whose rows are copied.
        statement: Arc<Statement>,
        /// What its columns are called.
        names: Names,
        /// How rows are written.
        format: CopyFormat,
        /// The file or the URL; `None` for the client.
        to: Option<String>,
    },
    /// `DECLARE ... CURSOR FOR` a query.
    Declare {
        /// What the cursor is called.
        cursor: String,
        /// The query whose rows it gives.
        statement: Arc<Statement>,
        /// What its columns are called.
        names: Names,
        /// Whether rows are given in binary form.
        binary: bool,
        /// Whether it outlives its transaction.
        hold: bool,
        /// Whether it goes backwards.
        scroll: bool,
    },
    /// Rows of a cursor.
    Fetch {
        /// What the cursor is called.
        cursor: String,
        /// Which.
        rows: Rows,
        /// Whether they are passed over, as by `MOVE`.
        skip: bool,
    },
    /// Forgets cursors, all or one.
    CloseCursor(Option<String>),
    /// Keeps a statement under a name.
    Prepare {
        /// The name.
        name: String,
        /// The query, where `$1` and its like stand for what is given later.
        statement: Arc<Statement>,
        /// What its columns are called.
        names: Names,
        /// Types of what is given, as far as they are told.
        types: Vec<DataType>,
    },
    /// Runs a statement that was kept under a name.
    Execute {
        /// The name.
        name: String,
        /// What is given.
        arguments: Vec<Expr>,
    },
    /// Sets a session variable, to its default when there is no value.
    Set {
        /// Its name.
        name: String,
        /// Its new value.
        value: Option<String>,
        /// Whether only until the end of the transaction.
        local: bool,
    },
    /// Sets all session variables to their defaults.
    ResetAll,
    /// Shows a session variable, or all.
    Show(String),
    /// Starts a transaction, with its level of isolation where that is told.
    Begin(&'static str, Option<String>),
    /// Ends a transaction.
    End(&'static str),
    /// Makes a savepoint.
    Savepoint(String),
    /// Forgets a savepoint and those after it.
    Release(String),
    /// Goes back to a savepoint: a failed transaction may go on.
    RollbackTo(String),
    /// Forgets all that the session holds and has set.
    Discard,
    /// Forgets prepared statements, all or one.
    Deallocate(Option<String>),
    /// Makes a view.
    CreateView {
        /// Its name.
        name: String,
        /// What its columns are called, as far as that is said.
        columns: Vec<String>,
        /// The text of its query.
        definition: String,
        /// Whether one of its name may be there.
        replace: bool,
    },
    /// Drops views.
    DropView {
        /// Their names.
        names: Vec<String>,
        /// Whether they may not be there.
        if_exists: bool,
    },
    /// Nothing to do but to say so.
    Done(&'static str),
}

/// Rows of a cursor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// So many of the next.
    Next(u64),
    /// All that are left.
    All,
    /// So many of those before, backwards.
    Back(u64),
    /// All that come before, backwards.
    AllBack,
    /// The one with this number, from one, or from minus one for the last.
    At(i64),
    /// The one so many rows from the present one.
    By(i64),
}

/// How `COPY` writes rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyFormat {
    /// Text, CSV, binary or Parquet.
    pub kind: CopyKind,
    /// Whether the first line names the columns.
    pub header: bool,
    /// Stands between values.
    pub delimiter: char,
    /// Stands for NULL.
    pub null: String,
    /// Around values of CSV that need it.
    pub quote: char,
    /// Before quotes within such values.
    pub escape: char,
    /// The columns of CSV whose values are always quoted.
    pub force_quote: ForceQuote,
}

/// Which of `COPY`'s formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyKind {
    /// PostgreSQL's text format.
    Text,
    /// CSV.
    Csv,
    /// PostgreSQL's binary format.
    Binary,
    /// Apache Parquet, for files only.
    Parquet,
}

impl CopyKind {
    /// What a file or a URL is written as when nothing is said.
    fn of(name: &str) -> Self {
        let ending = name.rsplit_once('.').map(|(_, ending)| ending.to_ascii_lowercase());
        match ending.as_deref() {
            Some("csv") => Self::Csv,
            Some("parquet") => Self::Parquet,
            _ => Self::Text,
        }
    }
}

/// Columns whose values are always quoted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ForceQuote {
    /// All.
    All,
    /// Those with these names.
    Named(Vec<String>),
}

impl CopyFormat {
    /// The defaults of a format.
    pub fn new(kind: CopyKind) -> Self {
        let csv = kind == CopyKind::Csv;
        Self {
            kind,
            header: false,
            delimiter: if csv { ',' } else { '\t' },
            null: if csv { "" } else { "\\N" }.to_owned(),
            quote: '"',
            escape: '"',
            force_quote: ForceQuote::Named(Vec::new()),
        }
    }
}

/// What columns are called in a result, where that differs from what the plan calls them: the names of the first
/// columns in order, and those of the last columns from the end. What `*` stands for lies between.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    front: Vec<String>,
    back: Vec<String>,
}

impl Names {
    /// The name of column `i` of `width`, which the plan calls `planned`.
    pub fn name<'n>(&'n self, i: usize, width: usize, planned: &'n str) -> &'n str {
        self.front.get(i).or_else(|| self.back.get(width - 1 - i)).map_or(planned, String::as_str)
    }
}

/// The commands in `text`.
///
/// # Errors
/// 42601 for text that does not parse; 54000 and its like for text beyond [`limits`]; 0A000 or 25006 for statements that
/// aren't answered.
pub fn parse(parser: &PostgresCompatibilityParser, text: &str) -> Result<Vec<Command>> {
    limits::check_text(text)?;
    let failed = |e: ParserError| match e {
        // The parser's own bound, on what it parses by recursion, is lower.
        ParserError::RecursionLimitExceeded => SqlError::new("54001", "statement is nested too deep"),
        e => syntax(text, &e),
    };
    let mut commands = Vec::new();
    for part in parts(text) {
        if let Some(fetch) = fetch(part)? {
            commands.push(fetch);
            continue;
        }
        for statement in parser.parse(part).map_err(failed)? {
            let nth = commands.len();
            commands.push(command(statement).map_err(|e| e.within(text, nth))?);
        }
    }
    Ok(commands)
}

/// The statements of a text one by one where one of them may be about a cursor, else the text.
fn parts(text: &str) -> Vec<&str> {
    let names = |word: &str| text.as_bytes().windows(word.len()).any(|w| w.eq_ignore_ascii_case(word.as_bytes()));
    if !names("fetch") && !names("move") {
        return vec![text];
    }
    let Ok(tokens) = Tokenizer::new(&PostgreSqlDialect {}, text).tokenize_with_location() else { return vec![text] };
    let ends = tokens.iter().filter(|t| t.token == Token::SemiColon);
    let ends = ends.filter_map(|t| character(text, t.span.end.line, t.span.end.column));
    let ends = ends.filter_map(|c| text.char_indices().map(|(at, _)| at).nth(c - 1));
    let mut parts = Vec::new();
    let mut from = 0;
    for end in ends.chain([text.len()]) {
        parts.push(&text[from..end]);
        from = end;
    }
    parts
}

/// `FETCH` or `MOVE`, of which the parser knows less than PostgreSQL; `None` for any other statement.
fn fetch(text: &str) -> Result<Option<Command>> {
    let wrong = |what: &str| {
        let message = format!("syntax error in FETCH or MOVE: {what}");
        SqlError::new("42601", message).hint("They are of the form FETCH [direction] [FROM | IN] cursor.")
    };
    let first = text.trim_start().get(..4).unwrap_or_default();
    if !first.eq_ignore_ascii_case("fetc") && !first.eq_ignore_ascii_case("move") {
        return Ok(None);
    }
    let tokens = Tokenizer::new(&PostgreSqlDialect {}, text).tokenize().map_err(|e| wrong(&e.to_string()))?;
    let mut tokens: Vec<Token> =
        tokens.into_iter().filter(|t| !matches!(t, Token::Whitespace(_) | Token::SemiColon)).collect();
    let word = |t: &Token| match t {
        Token::Word(w) if w.quote_style.is_none() => w.value.to_lowercase(),
        other => other.to_string(),
    };
    let mut words: Vec<String> = tokens.iter().map(word).collect();
    let skip = match words[0].as_str() {
        "fetch" => false,
        "move" => true,
        _ => return Ok(None),
    };
    let Some(Token::Word(name)) = tokens.pop() else { return Err(wrong("the name of a cursor is missing")) };
    if tokens.is_empty() {
        return Err(wrong("the name of a cursor is missing"));
    }
    words.pop();
    words.remove(0);
    words.pop_if(|w| w == "from" || w == "in");
    let number = |words: &[String]| {
        let text = words.concat();
        let number = text.strip_prefix('+').unwrap_or(&text).parse::<i64>();
        number.map_err(|_| wrong(&format!("{text:?} is no number of rows")))
    };
    let by = |n: i64| match n {
        0 => Rows::By(0),
        n if n > 0 => Rows::Next(n.unsigned_abs()),
        n => Rows::Back(n.unsigned_abs()),
    };
    let all = |words: &[String]| matches!(words, [all] if all == "all");
    let rows = match words.split_first() {
        None => Rows::Next(1),
        Some((first, rest)) => match (first.as_str(), rest) {
            ("next", []) => Rows::Next(1),
            ("prior", []) => Rows::Back(1),
            ("first", []) => Rows::At(1),
            ("last", []) => Rows::At(-1),
            ("all", []) => Rows::All,
            ("absolute", n) => Rows::At(number(n)?),
            ("relative", n) => Rows::By(number(n)?),
            ("forward", []) => Rows::Next(1),
            ("forward", n) if all(n) => Rows::All,
            ("forward", n) => by(number(n)?),
            ("backward", []) => Rows::Back(1),
            ("backward", n) if all(n) => Rows::AllBack,
            ("backward", n) => by(number(n)?.saturating_neg()),
            _ => by(number(&words)?),
        },
    };
    Ok(Some(Command::Fetch {
        cursor: if name.quote_style.is_some() { name.value } else { name.value.to_lowercase() },
        rows,
        skip,
    }))
}

/// What the parser says about a text, in PostgreSQL's words, with the place.
fn syntax(text: &str, error: &ParserError) -> SqlError {
    // Errors that tell a place come from the text itself; the parser that made this one has worked on tokens alone.
    let again = Parser::new(&PostgreSqlDialect {}).try_with_sql(text).and_then(|mut p| p.parse_statements());
    let message = |e: &ParserError| match e {
        ParserError::ParserError(m) | ParserError::TokenizerError(m) => m.clone(),
        ParserError::RecursionLimitExceeded => e.to_string(),
    };
    let message = again.as_ref().err().map_or_else(|| message(error), message);
    let (what, place) = match message.rsplit_once(" at Line: ") {
        Some((what, place)) => (what, place.split_once(", Column: ")),
        None => (message.as_str(), None),
    };
    let place = place.and_then(|(line, column)| character(text, line.parse().ok()?, column.trim().parse().ok()?));
    let told = match what
        .strip_prefix("Expected")
        .map(|m| m.trim_start_matches(": ").trim_start())
        .and_then(|m| m.split_once(", found: "))
    {
        Some((expected, "EOF")) => format!("syntax error at end of input: expected {expected}"),
        Some((expected, found)) => format!("syntax error at or near \"{found}\": expected {expected}"),
        None => what.to_owned(),
    };
    let mut error = SqlError::new("42601", told);
    error.position = place.or_else(|| what.ends_with("found: EOF").then(|| text.chars().count() + 1));
    error
}

/// The query of a statement that gives rows, with its columns named.
fn named(query: &Query) -> Result<(Arc<Statement>, Names)> {
    if writes(query) {
        return Err(read_only("this statement"));
    }
    let names = names(query);
    let mut statement = Statement::Query(Box::new(query.clone()));
    name_columns(&mut statement);
    Ok((Arc::new(statement), names))
}

fn declare(declare: &Declare) -> Result<Command> {
    let (Some(query), [name]) = (&declare.for_query, declare.names.as_slice()) else {
        return Err(SqlError::unsupported("DECLARE of anything but a cursor"));
    };
    let (statement, names) = named(query)?;
    let (binary, hold) = (declare.binary == Some(true), declare.hold == Some(true));
    let scroll = declare.scroll == Some(true);
    Ok(Command::Declare { cursor: output_case(name), statement, names, binary, hold, scroll })
}

/// A kept statement with what is given in the place of `$1` and its like.
///
/// # Errors
/// 42601 when too much or too little is given; 54000 and its like when that makes the statement too large.
pub fn fill(statement: &Statement, types: &[DataType], arguments: &[Expr]) -> Result<Statement> {
    let typed = arguments.iter().enumerate().map(|(i, argument)| match types.get(i) {
        Some(data_type) => cast(argument.clone(), data_type.clone()),
        None => argument.clone(),
    });
    let typed: Vec<Expr> = typed.collect();
    let mut most = types.len();
    let filled = with_parameters(statement, |number, _| {
        most = most.max(number);
        Some(Expr::Nested(Box::new(typed.get(number.checked_sub(1)?)?.clone())))
    });
    if most != arguments.len() {
        let message = format!("the prepared statement takes {most} parameters; {} were given", arguments.len());
        return Err(SqlError::new("42601", message));
    }
    limits::check_text(&filled.to_string())?;
    limits::check_statement(&filled)?;
    Ok(filled)
}

/// The statement with `$1` and its like taken to be of these types, where they have one.
pub fn with_types(statement: &Statement, types: &[Option<DataType>]) -> Statement {
    with_parameters(statement, |number, parameter| {
        let data_type = types.get(number.checked_sub(1)?)?.clone()?;
        Some(cast(parameter.clone(), data_type))
    })
}

/// The statement with other expressions for `$1` and its like.
fn with_parameters(statement: &Statement, other: impl FnMut(usize, &Expr) -> Option<Expr>) -> Statement {
    struct Replacer<F>(F);
    impl<F: FnMut(usize, &Expr) -> Option<Expr>> VisitorMut for Replacer<F> {
        type Break = ();
        fn post_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<()> {
            if let Expr::Value(ValueWithSpan { value: Value::Placeholder(name), .. }) = expr
                && let Ok(number) = name.trim_start_matches('$').parse()
                && let Some(other) = (self.0)(number, expr)
            {
                *expr = other;
            }
            ControlFlow::Continue(())
        }
    }
    let mut statement = statement.clone();
    let _ = statement.visit(&mut Replacer(other));
    statement
}

fn cast(expr: Expr, data_type: DataType) -> Expr {
    Expr::Cast { kind: CastKind::Cast, expr: Box::new(expr), data_type, array: false, format: None }
}

fn command(mut statement: Statement) -> Result<Command> {
    limits::check_statement(&statement)?;
    Ok(match &statement {
        Statement::Query(query) => {
            if writes(query) {
                return Err(read_only("this statement"));
            }
            let names = names(query);
            name_columns(&mut statement);
            Command::Query { statement: Arc::new(statement), names }
        }
        Statement::Explain { statement: inner, .. } => {
            if !matches!(inner.as_ref(), Statement::Query(q) if !writes(q)) {
                return Err(read_only("this statement"));
            }
            name_columns(&mut statement);
            Command::Query { statement: Arc::new(statement), names: Names::default() }
        }
        Statement::ShowTables { .. }
        | Statement::ShowColumns { .. }
        | Statement::ShowFunctions { .. }
        | Statement::ExplainTable { .. } => Command::Query { statement: Arc::new(statement), names: Names::default() },
        Statement::Copy { source, to, target, options, legacy_options, .. } => {
            copy(source, *to, target, (options, legacy_options))?
        }
        Statement::Declare { stmts } => match stmts.as_slice() {
            [one] => declare(one)?,
            _ => return Err(SqlError::unsupported("more than one DECLARE in a statement")),
        },
        Statement::Close { cursor } => Command::CloseCursor(match cursor {
            CloseCursor::All => None,
            CloseCursor::Specific { name } => Some(output_case(name)),
        }),
        Statement::Prepare { name, data_types, statement } => {
            let Statement::Query(query) = statement.as_ref() else {
                return Err(SqlError::unsupported("PREPARE of anything but a query"));
            };
            let (statement, names) = named(query)?;
            Command::Prepare { name: output_case(name), statement, names, types: data_types.clone() }
        }
        Statement::Execute { name: Some(name), parameters, immediate: false, .. } => {
            let name = name.0.last().and_then(|p| p.as_ident()).map(output_case).unwrap_or_default();
            Command::Execute { name, arguments: parameters.clone() }
        }
        Statement::Set(set) => assignment(set)?,
        Statement::Reset(reset) => match &reset.reset {
            Reset::ALL => Command::ResetAll,
            Reset::ConfigurationParameter(name) => Command::Set { name: variable(name), value: None, local: false },
        },
        Statement::ShowVariable { variable } => {
            let name = variable.iter().map(|i| i.value.as_str()).collect::<Vec<_>>().join(".");
            // Some parameters have names of several words.
            Command::Show(match name.to_ascii_lowercase().as_str() {
                "time.zone" => "timezone".to_owned(),
                "transaction.isolation.level" => "transaction_isolation".to_owned(),
                "session.authorization" => "session_authorization".to_owned(),
                _ => name,
            })
        }
        Statement::StartTransaction { begin, modes, .. } => {
            Command::Begin(if *begin { "BEGIN" } else { "START TRANSACTION" }, isolation(modes))
        }
        Statement::Commit { .. } => Command::End("COMMIT"),
        Statement::Rollback { savepoint: None, .. } => Command::End("ROLLBACK"),
        Statement::Rollback { savepoint: Some(name), .. } => Command::RollbackTo(savepoint(name)?),
        Statement::Savepoint { name } => Command::Savepoint(savepoint(name)?),
        Statement::ReleaseSavepoint { name } => Command::Release(savepoint(name)?),
        Statement::Discard { object_type: DiscardObject::ALL } => Command::Discard,
        Statement::Discard { .. } => Command::Done("DISCARD"),
        // Nothing notifies anybody, so there is nothing to end.
        Statement::UNLISTEN { .. } => Command::Done("UNLISTEN"),
        Statement::Deallocate { name, .. } => {
            Command::Deallocate(Some(name.value.clone()).filter(|n| !n.eq_ignore_ascii_case("all")))
        }
        Statement::CreateView(create) => create_view(create)?,
        Statement::Drop { object_type: ObjectType::View, if_exists, names, cascade, .. } => {
            if *cascade {
                return Err(SqlError::unsupported("DROP VIEW ... CASCADE"));
            }
            Command::DropView { names: names.iter().map(view_name).collect::<Result<_>>()?, if_exists: *if_exists }
        }
        Statement::Insert(_)
        | Statement::Update(_)
        | Statement::Delete(_)
        | Statement::Merge(_)
        | Statement::Truncate(_)
        | Statement::CreateTable(_)
        | Statement::CreateIndex(_)
        | Statement::CreateSchema { .. }
        | Statement::CreateDatabase { .. }
        | Statement::Drop { .. }
        | Statement::AlterTable { .. } => return Err(read_only(first_word(&statement))),
        other => return Err(SqlError::unsupported(format!("statement {}", first_word(other)))),
    })
}

fn savepoint(name: &Ident) -> Result<String> {
    let name = output_case(name);
    match name.len() {
        ..=NAME_BYTES_MAX => Ok(name),
        bytes => Err(SqlError::new("42622", format!("name of {bytes} bytes; {NAME_BYTES_MAX} are allowed"))),
    }
}

fn create_view(create: &CreateView) -> Result<Command> {
    let odd = [
        ("a materialized view", create.materialized),
        ("a temporary view", create.temporary),
        ("CREATE VIEW IF NOT EXISTS", create.if_not_exists),
        ("CREATE VIEW ... WITH", create.options != CreateTableOptions::None || create.with_no_schema_binding),
        ("this form of CREATE VIEW", create.or_alter || create.to.is_some() || create.params.is_some()),
    ];
    if let Some((what, _)) = odd.iter().find(|(_, is)| *is) {
        return Err(SqlError::unsupported(what));
    }
    if writes(&create.query) {
        return Err(read_only("a view of this statement"));
    }
    Ok(Command::CreateView {
        name: view_name(&create.name)?,
        columns: create.columns.iter().map(|c| output_case(&c.name)).collect(),
        definition: create.query.to_string(),
        replace: create.or_replace,
    })
}

/// The name of a relation that, without a schema or with it, is one of `public`.
pub fn in_public(name: &ObjectName) -> Option<String> {
    let parts: Option<Vec<String>> = name.0.iter().map(|p| p.as_ident().map(output_case)).collect();
    match parts?.as_slice() {
        [name] => Some(name.clone()),
        [.., schema, name] if schema == "public" => Some(name.clone()),
        _ => None,
    }
}

fn view_name(name: &ObjectName) -> Result<String> {
    in_public(name).ok_or_else(|| SqlError::new("0A000", format!("view {name}: views are in the schema public only")))
}

fn read_only(what: impl std::fmt::Display) -> SqlError {
    SqlError::new("25006", format!("cannot execute {what}: SQL only reads"))
}

fn first_word(statement: &Statement) -> String {
    statement.to_string().split_whitespace().next().unwrap_or_default().to_uppercase()
}

/// Whether data would be changed from within a query, as in `WITH x AS (DELETE ...)` or `SELECT INTO`.
fn writes(query: &Query) -> bool {
    fn body(set: &SetExpr) -> bool {
        match set {
            SetExpr::Select(select) => select.into.is_some(),
            SetExpr::Query(query) => writes(query),
            SetExpr::SetOperation { left, right, .. } => body(left) || body(right),
            SetExpr::Values(_) | SetExpr::Table(_) => false,
            _ => true,
        }
    }
    body(&query.body) || query.with.iter().flat_map(|w| &w.cte_tables).any(|c| writes(&c.query))
}

fn copy(
    source: &CopySource,
    to: bool,
    target: &CopyTarget,
    (options, legacy): (&[CopyOption], &[CopyLegacyOption]),
) -> Result<Command> {
    if !to {
        return Err(read_only("COPY FROM"));
    }
    let to = match target {
        CopyTarget::Stdout => None,
        CopyTarget::File { filename } => Some(filename.clone()),
        CopyTarget::Program { .. } => return Err(SqlError::new("42501", "COPY to a program is not allowed")),
        CopyTarget::Stdin => return Err(SqlError::new("42601", "COPY TO STDIN means nothing; COPY TO STDOUT does")),
    };
    let format = copy_format(options, legacy, to.as_deref().map_or(CopyKind::Text, CopyKind::of))?;
    if to.is_none() && format.kind == CopyKind::Parquet {
        return Err(SqlError::unsupported("COPY TO STDOUT as Parquet, which is for files,"));
    }
    let (statement, names) = match source {
        CopySource::Query(query) => named(query)?,
        CopySource::Table { table_name, columns } => {
            let columns = columns.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let columns = if columns.is_empty() { "*" } else { &columns };
            let text = format!("SELECT {columns} FROM {table_name}");
            let mut parsed =
                Parser::parse_sql(&PostgreSqlDialect {}, &text).map_err(|e| SqlError::new("42601", e.to_string()))?;
            match parsed.pop() {
                Some(Statement::Query(query)) => named(&query)?,
                _ => return Err(SqlError::new("42601", "COPY without a table")),
            }
        }
    };
    Ok(Command::CopyOut { statement, names, format, to })
}

/// What the options of `COPY` say, in their present form or in the older one without brackets.
fn copy_format(options: &[CopyOption], legacy: &[CopyLegacyOption], unsaid: CopyKind) -> Result<CopyFormat> {
    let mut options = options.to_vec();
    for option in legacy {
        match option {
            CopyLegacyOption::Binary => options.push(CopyOption::Format(Ident::new("binary"))),
            CopyLegacyOption::Delimiter(c) => options.push(CopyOption::Delimiter(*c)),
            CopyLegacyOption::Null(text) => options.push(CopyOption::Null(text.clone())),
            CopyLegacyOption::Header => options.push(CopyOption::Header(true)),
            CopyLegacyOption::Csv(of_csv) => {
                options.push(CopyOption::Format(Ident::new("csv")));
                options.extend(of_csv.iter().map(|option| match option {
                    CopyLegacyCsvOption::Header => CopyOption::Header(true),
                    CopyLegacyCsvOption::Quote(c) => CopyOption::Quote(*c),
                    CopyLegacyCsvOption::Escape(c) => CopyOption::Escape(*c),
                    CopyLegacyCsvOption::ForceQuote(columns) => CopyOption::ForceQuote(columns.clone()),
                    CopyLegacyCsvOption::ForceNotNull(columns) => CopyOption::ForceNotNull(columns.clone()),
                }));
            }
            other => return Err(SqlError::unsupported(format!("COPY option {other}"))),
        }
    }
    let kind = options.iter().rev().find_map(|o| match o {
        CopyOption::Format(name) => Some(name.value.to_ascii_lowercase()),
        _ => None,
    });
    let kind = match kind.as_deref() {
        None => unsaid,
        Some("text") => CopyKind::Text,
        Some("csv") => CopyKind::Csv,
        Some("binary") => CopyKind::Binary,
        Some("parquet") => CopyKind::Parquet,
        Some(other) => {
            let message = format!("COPY format {other:?} not recognized; text, csv, binary and parquet are known");
            return Err(SqlError::new("22023", message));
        }
    };
    let mut format = CopyFormat::new(kind);
    let mut escape = None;
    for option in &options {
        let of_csv = matches!(option, CopyOption::Quote(_) | CopyOption::Escape(_) | CopyOption::ForceQuote(_));
        let of_text = matches!(option, CopyOption::Delimiter(_) | CopyOption::Null(_) | CopyOption::Header(_));
        if of_csv && kind != CopyKind::Csv || of_text && !matches!(kind, CopyKind::Text | CopyKind::Csv) {
            return Err(SqlError::unsupported(format!("COPY option {option} in this format")));
        }
        match option {
            CopyOption::Format(_) | CopyOption::Freeze(false) => {}
            CopyOption::Header(header) => format.header = *header,
            CopyOption::Delimiter(c) => format.delimiter = *c,
            CopyOption::Null(text) => format.null.clone_from(text),
            CopyOption::Quote(c) => format.quote = *c,
            CopyOption::Escape(c) => escape = Some(*c),
            CopyOption::ForceQuote(columns) => {
                let all = columns.is_empty() || matches!(columns.as_slice(), [one] if one.value == "*");
                let named = || ForceQuote::Named(columns.iter().map(output_case).collect());
                format.force_quote = if all { ForceQuote::All } else { named() };
            }
            CopyOption::Encoding(name) if name.replace(['-', '_'], "").eq_ignore_ascii_case("utf8") => {}
            other => return Err(SqlError::unsupported(format!("COPY option {other}"))),
        }
    }
    format.escape = escape.unwrap_or(format.quote);
    let wrong = |message: String| Err(SqlError::new("22023", message));
    for (what, c) in [("delimiter", format.delimiter), ("quote", format.quote), ("escape", format.escape)] {
        if !c.is_ascii() || c == '\n' || c == '\r' {
            return wrong(format!("COPY {what} {c:?} must be one ASCII character and no end of a line"));
        }
    }
    if kind == CopyKind::Text && (format.delimiter.is_ascii_alphanumeric() || "\\.".contains(format.delimiter)) {
        return wrong(format!("COPY delimiter cannot be {:?}", format.delimiter));
    }
    if kind == CopyKind::Csv && format.delimiter == format.quote {
        return wrong("COPY delimiter and quote must be different".to_owned());
    }
    if format.null.contains(['\n', '\r', format.delimiter]) {
        return wrong(format!("COPY null {:?} must hold neither the delimiter nor the end of a line", format.null));
    }
    Ok(format)
}

fn variable(name: &ObjectName) -> String {
    name.to_string().replace('"', "").to_ascii_lowercase()
}

fn assignment(set: &Set) -> Result<Command> {
    Ok(match set {
        Set::SingleAssignment { scope, variable: name, values, .. } => {
            let values: Vec<String> = values.iter().map(setting).collect();
            let value = values.join(", ");
            let value = Some(value).filter(|v| !v.eq_ignore_ascii_case("default"));
            Command::Set { name: variable(name), value, local: matches!(scope, Some(ContextModifier::Local)) }
        }
        Set::SetTimeZone { local, value } => {
            let value = Some(setting(value)).filter(|v| !["default", "local"].contains(&&*v.to_ascii_lowercase()));
            Command::Set { name: "timezone".to_owned(), value, local: *local }
        }
        Set::SetNames { charset_name, .. } => {
            let value = Some(charset_name.value.clone());
            Command::Set { name: "client_encoding".to_owned(), value, local: false }
        }
        Set::SetTransaction { modes, session, .. } => match isolation(modes) {
            Some(level) => {
                let name = if *session { "default_transaction_isolation" } else { "transaction_isolation" };
                Command::Set { name: name.to_owned(), value: Some(level), local: !*session }
            }
            None => Command::Done("SET"),
        },
        Set::SetNamesDefault {} | Set::SetSessionAuthorization(_) | Set::SetRole { .. } => Command::Done("SET"),
        other => return Err(SqlError::unsupported(format!("SET {other}"))),
    })
}

/// The level of isolation that a transaction is to have.
fn isolation(modes: &[TransactionMode]) -> Option<String> {
    modes.iter().rev().find_map(|mode| match mode {
        TransactionMode::IsolationLevel(level) => Some(level.to_string().to_lowercase()),
        TransactionMode::AccessMode(_) => None,
    })
}

fn setting(value: &Expr) -> String {
    match value {
        Expr::Value(v) => match &v.value {
            Value::SingleQuotedString(s) | Value::EscapedStringLiteral(s) | Value::DoubleQuotedString(s) => s.clone(),
            other => other.to_string(),
        },
        Expr::Identifier(i) => i.value.clone(),
        Expr::Interval(interval) => interval.to_string(),
        other => other.to_string(),
    }
}

/// The names of a query's columns, as PostgreSQL would choose them.
fn names(query: &Query) -> Names {
    let mut body = query.body.as_ref();
    let select = loop {
        match body {
            SetExpr::Select(select) => break select,
            SetExpr::Query(query) => body = query.body.as_ref(),
            SetExpr::SetOperation { left, .. } => body = left.as_ref(),
            _ => return Names::default(),
        }
    };
    let name = |item: &SelectItem| match item {
        SelectItem::UnnamedExpr(expr) => Some(column_name(expr)),
        SelectItem::ExprWithAlias { alias, .. } => Some(output_case(alias)),
        _ => None,
    };
    let front: Vec<String> = select.projection.iter().map_while(name).collect();
    let back = if front.len() == select.projection.len() {
        Vec::new()
    } else {
        select.projection.iter().rev().map_while(name).collect()
    };
    Names { front, back }
}

fn output_case(ident: &Ident) -> String {
    if ident.quote_style.is_some() { ident.value.clone() } else { ident.value.to_lowercase() }
}

/// What PostgreSQL calls a column with this expression.
fn column_name(expr: &Expr) -> String {
    own_name(expr).unwrap_or_else(|| "?column?".to_owned())
}

fn own_name(expr: &Expr) -> Option<String> {
    Some(match expr {
        Expr::Identifier(ident) => output_case(ident),
        Expr::CompoundIdentifier(idents) => output_case(idents.last()?),
        Expr::CompoundFieldAccess { root, .. } => own_name(root)?,
        Expr::Function(function) => match (&function.name, &function.args) {
            // How the parser's rewrite spells `CURRENT_USER`.
            (name, FunctionArguments::None) => last_part(name),
            (name, _) => last_part(name),
        },
        Expr::Cast { expr, data_type, .. } => own_name(expr).unwrap_or_else(|| type_name(data_type)),
        Expr::Nested(expr) | Expr::Collate { expr, .. } => own_name(expr)?,
        Expr::Case { else_result, .. } => else_result.as_ref().and_then(|e| own_name(e)).unwrap_or("case".to_owned()),
        Expr::Exists { .. } => "exists".to_owned(),
        Expr::Array(_) => "array".to_owned(),
        Expr::Extract { .. } => "extract".to_owned(),
        Expr::Ceil { .. } => "ceil".to_owned(),
        Expr::Floor { .. } => "floor".to_owned(),
        Expr::Position { .. } => "position".to_owned(),
        Expr::Substring { .. } => "substring".to_owned(),
        Expr::Trim { .. } => "btrim".to_owned(),
        Expr::Overlay { .. } => "overlay".to_owned(),
        Expr::AtTimeZone { .. } => "timezone".to_owned(),
        Expr::Interval(_) => "interval".to_owned(),
        Expr::TypedString(typed) => type_name(&typed.data_type),
        Expr::Value(v) if matches!(v.value, Value::Boolean(_)) => "bool".to_owned(),
        Expr::Subquery(query) => names(query).front.into_iter().next()?,
        _ => return None,
    })
}

/// The last part of a name, in lower case.
pub fn last_part(name: &ObjectName) -> String {
    name.0.last().and_then(|p| p.as_ident()).map(|i| i.value.to_lowercase()).unwrap_or_default()
}

fn type_name(data_type: &DataType) -> String {
    let name = data_type.to_string().to_lowercase();
    match name.split('(').next().unwrap_or(&name) {
        "int" | "integer" => "int4",
        "bigint" => "int8",
        "smallint" => "int2",
        "double precision" | "double" | "float" => "float8",
        "real" => "float4",
        "boolean" => "bool",
        "varchar" | "character varying" => "varchar",
        "timestamp with time zone" => "timestamptz",
        "timestamp without time zone" => "timestamp",
        "decimal" => "numeric",
        other => return other.to_owned(),
    }
    .to_owned()
}

/// Names every unnamed expression of every select list as PostgreSQL would, with a number where the planner needs
/// names to differ.
fn name_columns(statement: &mut Statement) {
    struct Namer;
    impl VisitorMut for Namer {
        type Break = ();
        fn post_visit_query(&mut self, query: &mut Query) -> ControlFlow<()> {
            let ordered = query.order_by.is_some();
            let named = name_select(&mut query.body, ordered);
            if let Some(OrderBy { kind: OrderByKind::Expressions(keys), .. }) = &mut query.order_by {
                for key in keys {
                    if let Some((_, alias)) = named.iter().find(|(expr, _)| *expr == key.expr) {
                        key.expr = Expr::Identifier(alias.clone());
                    }
                }
            }
            ControlFlow::Continue(())
        }
        fn pre_visit_table_factor(&mut self, table: &mut TableFactor) -> ControlFlow<()> {
            // The one column of a function's rows is called as the function is.
            if let TableFactor::UNNEST { alias: Some(alias), array_exprs, .. } = table
                && array_exprs.len() == 1
                && alias.columns.is_empty()
            {
                alias.columns = vec![TableAliasColumnDef { name: alias.name.clone(), data_type: None }];
            }
            // Of its own tables of `pg_catalog` the library knows where they are.
            if let TableFactor::Table { name, args: None, .. } = table
                && let [part] = name.0.as_slice()
                && part.as_ident().is_some_and(|ident| system::adds(&ident.value))
            {
                let schema = ObjectName::from(vec![Ident::new("pg_catalog")]);
                *name = ObjectName(schema.0.into_iter().chain([part.clone()]).collect());
            }
            ControlFlow::Continue(())
        }
        fn pre_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<()> {
            let other = array_of_query(expr).or_else(|| rows_of_array(expr)).or_else(|| without_escape(expr));
            if let Some(other) = other.or_else(|| system::known(expr)) {
                *expr = other;
            }
            // JSON is text here, on which its operators work.
            if let Expr::Cast { data_type, .. } = expr
                && matches!(data_type, DataType::JSON | DataType::JSONB)
            {
                *data_type = DataType::Text;
            }
            ControlFlow::Continue(())
        }
    }
    let _ = statement.visit(&mut Namer);
}

/// `LIKE ... ESCAPE` of another character than the backslash, which alone the planner knows.
fn without_escape(expr: &Expr) -> Option<Expr> {
    if !matches!(expr, Expr::Like { escape_char: Some(_), .. } | Expr::ILike { escape_char: Some(_), .. }) {
        return None;
    }
    let mut like = expr.clone();
    let (Expr::Like { pattern, escape_char, .. } | Expr::ILike { pattern, escape_char, .. }) = &mut like else {
        return None;
    };
    let escape = match &escape_char.take()?.value {
        Value::SingleQuotedString(escape) if escape != "\\" && escape.chars().count() == 1 => escape.clone(),
        _ => return None,
    };
    fn change(pattern: &mut Expr, escape: &str) -> Option<()> {
        match pattern {
            Expr::Value(ValueWithSpan { value: Value::SingleQuotedString(text), .. }) => {
                // Two of it stand for one of it, which is no escape any more.
                let doubled = escape.repeat(2);
                let parts = text.split(&doubled).map(|p| p.replace('\\', "\\\\").replace(escape, "\\"));
                let changed = parts.collect::<Vec<_>>().join(escape);
                *text = changed;
            }
            Expr::Nested(inner) => change(inner, escape)?,
            Expr::BinaryOp { left, op: BinaryOperator::StringConcat, right } => {
                change(left, escape)?;
                change(right, escape)?;
            }
            other => {
                let escape = escape.replace('\'', "''");
                let text = format!("replace(replace({other}, '\\', '\\\\'), '{escape}', '\\')");
                *other = expression(&text)?;
            }
        }
        Some(())
    }
    change(pattern, &escape)?;
    Some(like)
}

/// The expression that a text means.
pub fn expression(text: &str) -> Option<Expr> {
    Parser::new(&PostgreSqlDialect {}).try_with_sql(text).ok()?.parse_expr().ok()
}

/// `information_schema._pg_expandarray(x)`: a row for each element, with its number.
fn rows_of_array(expr: &Expr) -> Option<Expr> {
    let Expr::Function(function) = expr else { return None };
    if last_part(&function.name) != "_pg_expandarray" {
        return None;
    }
    let mut numbered = function.clone();
    numbered.name = ObjectName::from(vec![Ident::new(functions::NUMBERED)]);
    expression(&format!("unnest({})", Expr::Function(numbered)))
}

/// `ARRAY(SELECT x ...)`, for which the planner has no words, as `(SELECT array_agg(x) ...)`.
fn array_of_query(expr: &Expr) -> Option<Expr> {
    let Expr::Function(function) = expr else { return None };
    let FunctionArguments::Subquery(query) = &function.args else { return None };
    if !last_part(&function.name).eq("array") {
        return None;
    }
    if query.body.as_select().is_some_and(|s| s.from.iter().any(|t| t.to_string().contains("unnest("))) {
        // A table function of a column of the query around it, which can't be planned. In `pg_catalog` these hold nothing.
        return expression("CAST(NULL AS TEXT[])");
    }
    let mut query = query.clone();
    query.order_by = None;
    let SetExpr::Select(select) = query.body.as_mut() else { return None };
    let [SelectItem::UnnamedExpr(item) | SelectItem::ExprWithAlias { expr: item, .. }] = select.projection.as_slice()
    else {
        return None;
    };
    let aggregate = expression(&format!("array_agg({item})"))?;
    select.projection = vec![SelectItem::UnnamedExpr(aggregate)];
    Some(Expr::Subquery(query))
}

/// Returns the elements in the select list of an ordered query with the names that they got.
fn name_select(body: &mut SetExpr, ordered: bool) -> Vec<(Expr, Ident)> {
    let select = match body {
        SetExpr::Select(select) => select,
        SetExpr::SetOperation { left, right, .. } => {
            name_select(left, ordered);
            name_select(right, ordered);
            return Vec::new();
        }
        _ => return Vec::new(),
    };
    let mut named = Vec::new();
    let plain = |e: &Expr| matches!(e, Expr::Identifier(_) | Expr::CompoundIdentifier(_));
    let mut taken: HashSet<String> = select
        .projection
        .iter()
        .filter_map(|item| match item {
            SelectItem::UnnamedExpr(e) if plain(e) => own_name(e),
            SelectItem::ExprWithAlias { alias, .. } => Some(output_case(alias)),
            _ => None,
        })
        .collect();
    // Where to go on numbering, by name.
    let mut numbers: HashMap<String, usize> = HashMap::new();
    for item in &mut select.projection {
        if let SelectItem::UnnamedExpr(expr) = item
            && !plain(expr)
        {
            let name = column_name(expr);
            // An element would take the name of the map that it comes from, and the planner resolves names in ORDER BY
            // to the select list first: `ORDER BY tags['b']` must go on meaning the map. The answer's own names are put
            // on at the edge.
            let shadows = ordered && matches!(expr, Expr::CompoundFieldAccess { .. });
            let number = numbers.entry(name.clone()).or_insert(0);
            *number = (*number).max(usize::from(shadows));
            let unique = loop {
                let unique = if *number == 0 { name.clone() } else { format!("{name}_{number}") };
                *number += 1;
                if taken.insert(unique.clone()) {
                    break unique;
                }
            };
            let alias = Ident::with_quote('"', unique);
            if shadows {
                named.push((expr.clone(), alias.clone()));
            }
            *item = SelectItem::ExprWithAlias { expr: expr.clone(), alias };
        }
    }
    named
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Result<Command> {
        let mut commands = parse(&PostgresCompatibilityParser::new(), text)?;
        assert_eq!(commands.len(), 1, "{text}");
        Ok(commands.remove(0))
    }

    #[test]
    fn columns_are_called_as_in_postgresql() {
        let check = |text: &str, expected: &str| match one(text) {
            Ok(Command::Query { names, .. }) => assert_eq!(names.front.join(" "), expected, "{text}"),
            other => panic!("{text}: {other:?}"),
        };
        check("SELECT 1", "?column?");
        check("SELECT count(*), count(*) FROM t", "count count");
        check("SELECT a, t.b, a + 1 FROM t", "a b ?column?");
        check("SELECT a::int, 1::bigint, 'x'::text FROM t", "a int8 text");
        check("SELECT max(a) AS m, CASE WHEN a THEN 1 END FROM t", "m case");
        check("SELECT (SELECT max(x) FROM u), true, now()", "max bool now");
        check("SELECT A, \"B\" FROM t", "a B");
        check("SELECT min(a) FROM t UNION SELECT 2", "min");
        check("SELECT tags['host'] FROM t", "tags");
    }

    #[test]
    fn names_around_a_star_are_counted_from_both_ends() {
        let Ok(Command::Query { names, .. }) = one("SELECT 1, *, count(*) FROM t") else { panic!("no query") };
        let named: Vec<&str> = (0..4).map(|i| names.name(i, 4, "planned")).collect();
        assert_eq!(named, ["?column?", "planned", "planned", "count"]);
    }

    #[test]
    fn equal_names_are_numbered_for_the_planner() {
        let Ok(Command::Query { statement, .. }) = one("SELECT count(*), count(a), count FROM t") else {
            panic!("no query")
        };
        assert_eq!(statement.to_string(), "SELECT count(*) AS \"count_1\", count(a) AS \"count_2\", count FROM t");
    }

    #[test]
    fn patterns_have_the_backslash_as_their_escape() {
        let check = |text: &str, expected: &str| match one(text) {
            Ok(Command::Query { statement, .. }) => assert_eq!(statement.to_string(), expected),
            other => panic!("{text}: {other:?}"),
        };
        check("SELECT a FROM t WHERE a LIKE 'p/_%' ESCAPE '/'", "SELECT a FROM t WHERE a LIKE 'p\\_%'");
        check(
            "SELECT a FROM t WHERE a NOT LIKE 'p//' || '%' ESCAPE '/'",
            "SELECT a FROM t WHERE a NOT LIKE 'p/' || '%'",
        );
        check(
            "SELECT a FROM t WHERE a ILIKE b ESCAPE '!'",
            "SELECT a FROM t WHERE a ILIKE replace(replace(b, '\\', '\\\\'), '!', '\\')",
        );
    }

    #[test]
    fn arrays_of_queries_are_aggregates() {
        let check = |text: &str, expected: &str| match one(text) {
            Ok(Command::Query { statement, .. }) => assert_eq!(statement.to_string(), expected),
            other => panic!("{text}: {other:?}"),
        };
        check(
            "SELECT ARRAY(SELECT b FROM t WHERE t.x = u.y ORDER BY b) AS m FROM u",
            "SELECT (SELECT array_agg(b) AS \"array_agg\" FROM t WHERE t.x = u.y) AS m FROM u",
        );
    }

    #[test]
    fn options_of_copy() {
        let format = |options: &str| match one(&format!("COPY (SELECT 1) TO STDOUT {options}")) {
            Ok(Command::CopyOut { format, .. }) => Ok(format),
            Ok(other) => panic!("{options}: {other:?}"),
            Err(e) => Err(e.message),
        };
        let csv = CopyFormat { header: true, delimiter: ';', ..CopyFormat::new(CopyKind::Csv) };
        assert_eq!(format("WITH (FORMAT csv, HEADER, DELIMITER ';')"), Ok(csv.clone()));
        assert_eq!(format("CSV HEADER"), Ok(CopyFormat { delimiter: ',', ..csv }));
        assert_eq!(format(""), Ok(CopyFormat::new(CopyKind::Text)));
        assert_eq!(format("(FORMAT binary)"), Ok(CopyFormat::new(CopyKind::Binary)));
        let to = |name: &str| match one(&format!("COPY t TO '{name}'")) {
            Ok(Command::CopyOut { format, to, .. }) => (format.kind, to),
            other => panic!("{other:?}"),
        };
        assert_eq!(to("/a.b/c"), (CopyKind::Text, Some("/a.b/c".to_owned())));
        assert_eq!(to("s3://b/c.CSV").0, CopyKind::Csv);
        assert_eq!(to("/c.parquet").0, CopyKind::Parquet);
        assert_eq!(format("(FORMAT csv)").map(|f| f.kind), Ok(CopyKind::Csv));
        let quoted = CopyFormat { quote: '~', escape: '~', null: "-".to_owned(), ..CopyFormat::new(CopyKind::Csv) };
        assert_eq!(format("(FORMAT csv, QUOTE '~', NULL '-')"), Ok(quoted));
        let check = |options: &str, expected: &str| assert_eq!(format(options).unwrap_err(), expected);
        check("(FORMAT json)", "COPY format \"json\" not recognized; text, csv, binary and parquet are known");
        check("(FORMAT parquet)", "COPY TO STDOUT as Parquet, which is for files, is not supported");
        check("(QUOTE '-')", "COPY option QUOTE '-' in this format is not supported");
        check("(FORMAT binary, HEADER)", "COPY option HEADER in this format is not supported");
        check("(DELIMITER 'a')", "COPY delimiter cannot be 'a'");
        check("(FORMAT csv, NULL ',')", "COPY null \",\" must hold neither the delimiter nor the end of a line");
    }

    #[test]
    fn parameters_are_filled_in() {
        let filled = |text: &str, arguments: &str| {
            let Ok(Command::Prepare { statement, types, .. }) = one(text) else { panic!("{text}") };
            let Ok(Command::Execute { arguments, .. }) = one(&format!("EXECUTE p{arguments}")) else {
                panic!("{arguments}")
            };
            fill(&statement, &types, &arguments).map(|s| s.to_string()).map_err(|e| e.code)
        };
        let check = |text: &str, arguments: &str, expected: Result<&str, &str>| {
            assert_eq!(filled(text, arguments).as_deref().map_err(|e| *e), expected, "{text} {arguments}");
        };
        check("PREPARE p AS SELECT a FROM t WHERE b = $1", "(1 + 2)", Ok("SELECT a FROM t WHERE b = (1 + 2)"));
        check("PREPARE p (int) AS SELECT a WHERE $1 > 0", "('1')", Ok("SELECT a WHERE (CAST('1' AS INT)) > 0"));
        check("PREPARE p AS SELECT a WHERE $2 > 0", "(1)", Err("42601"));
        check("PREPARE p AS SELECT a", "(1)", Err("42601"));
        check("PREPARE p AS SELECT a", "", Ok("SELECT a"));
    }

    #[test]
    fn syntax_errors_tell_where() {
        let check = |text: &str, expected: &str, position: Option<usize>| {
            let error = one(text).unwrap_err();
            assert_eq!((error.code, &*error.message, error.position), ("42601", expected, position), "{text}");
        };
        check("SELEC 1", "syntax error at or near \"SELEC\": expected an SQL statement", Some(1));
        check("SELECT 1,\n  FROM FROM x", "syntax error at or near \"FROM\": expected an expression", Some(18));
        check("SELECT (1", "syntax error at end of input: expected )", Some(10));
    }

    #[test]
    fn what_writes_is_refused() {
        let check = |text: &str, code: &str| assert_eq!(one(text).unwrap_err().code, code, "{text}");
        check("INSERT INTO t VALUES (1)", "25006");
        check("UPDATE t SET a = 1", "25006");
        check("DELETE FROM t", "25006");
        check("CREATE TABLE t (a int)", "25006");
        check("CREATE EXTERNAL TABLE t STORED AS PARQUET LOCATION '/etc'", "25006");
        check("DROP TABLE t", "25006");
        check("CREATE VIEW v AS WITH d AS (DELETE FROM t) SELECT 1", "25006");
        check("CREATE MATERIALIZED VIEW v AS SELECT 1", "0A000");
        check("CREATE TEMP VIEW v AS SELECT 1", "0A000");
        check("CREATE VIEW prometheus.v AS SELECT 1", "0A000");
        check("DROP VIEW v CASCADE", "0A000");
        check("TRUNCATE t", "25006");
        check("EXPLAIN DELETE FROM t", "25006");
        check("SELECT 1 INTO t", "25006");
        check("COPY t FROM STDIN", "25006");
        check("COPY (SELECT 1) TO PROGRAM 'rm'", "42501");
        check("LISTEN x", "0A000");
        check("SELEC 1", "42601");
    }

    #[test]
    fn session_statements() {
        let check = |text: &str, expected: &str| {
            let got = one(text).map(|c| format!("{c:?}")).unwrap_or_else(|e| e.to_string());
            assert_eq!(got, expected, "{text}");
        };
        check(
            "SET timezone = 'Europe/Berlin'",
            "Set { name: \"timezone\", value: Some(\"Europe/Berlin\"), local: false }",
        );
        check("SET TIME ZONE 'UTC'", "Set { name: \"timezone\", value: Some(\"UTC\"), local: false }");
        check("SET statement_timeout = 500", "Set { name: \"statement_timeout\", value: Some(\"500\"), local: false }");
        check("SET search_path TO a, b", "Set { name: \"search_path\", value: Some(\"a, b\"), local: false }");
        check("SET application_name TO DEFAULT", "Set { name: \"application_name\", value: None, local: false }");
        check("RESET ALL", "ResetAll");
        check("SHOW TIME ZONE", "Show(\"timezone\")");
        check("SHOW server_version", "Show(\"server_version\")");
        check("BEGIN", "Begin(\"BEGIN\", None)");
        check("BEGIN ISOLATION LEVEL SERIALIZABLE", "Begin(\"BEGIN\", Some(\"serializable\"))");
        let set = |name: &str, local: bool| {
            format!("Set {{ name: \"{name}\", value: Some(\"read committed\"), local: {local} }}")
        };
        check("SET TRANSACTION ISOLATION LEVEL READ COMMITTED", &set("transaction_isolation", true));
        check(
            "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED",
            &set("default_transaction_isolation", false),
        );
        check("SET TRANSACTION READ ONLY", "Done(\"SET\")");
        check("COMMIT", "End(\"COMMIT\")");
        check("ABORT", "End(\"ROLLBACK\")");
        check("DISCARD ALL", "Discard");
        check("SET LOCAL lock_timeout = 1", "Set { name: \"lock_timeout\", value: Some(\"1\"), local: true }");
        check("ROLLBACK TO SAVEPOINT A", "RollbackTo(\"a\")");
        check("ROLLBACK TO \"A\"", "RollbackTo(\"A\")");
        check("SAVEPOINT a", "Savepoint(\"a\")");
        check("RELEASE SAVEPOINT a", "Release(\"a\")");
        check("RELEASE a", "Release(\"a\")");
        check("FETCH 3 FROM c", "Fetch { cursor: \"c\", rows: Next(3), skip: false }");
        check("move forward all in C;", "Fetch { cursor: \"c\", rows: All, skip: true }");
        check("FETCH ABSOLUTE 5 FROM \"C\"", "Fetch { cursor: \"C\", rows: At(5), skip: false }");
        let fetch = |rows: &str| format!("Fetch {{ cursor: \"c\", rows: {rows}, skip: false }}");
        check("FETCH PRIOR FROM c", &fetch("Back(1)"));
        check("FETCH c", &fetch("Next(1)"));
        check("FETCH NEXT c", &fetch("Next(1)"));
        check("FETCH 5 IN c", &fetch("Next(5)"));
        check("FETCH -5 c", &fetch("Back(5)"));
        check("FETCH ALL c;", &fetch("All"));
        check("FETCH FORWARD 3 c", &fetch("Next(3)"));
        check("FETCH BACKWARD ALL FROM c", &fetch("AllBack"));
        check("FETCH BACKWARD 0 FROM c", &fetch("By(0)"));
        check("FETCH LAST c", &fetch("At(-1)"));
        check("FETCH RELATIVE -2 FROM c", &fetch("By(-2)"));
        check("FETCH SOME FROM c", "syntax error in FETCH or MOVE: \"some\" is no number of rows");
        check("MOVE 5", "syntax error in FETCH or MOVE: the name of a cursor is missing");
        let several =
            parse(&PostgresCompatibilityParser::new(), "SELECT 'ü;', 1; MOVE 2 c; FETCH c; SELECT 2").unwrap();
        let kinds: Vec<bool> = several.iter().map(|c| matches!(c, Command::Fetch { .. })).collect();
        assert_eq!(kinds, [false, true, true, false]);
        check("CLOSE ALL", "CloseCursor(None)");
        check("UNLISTEN *", "Done(\"UNLISTEN\")");
        check("DEALLOCATE p1", "Deallocate(Some(\"p1\"))");
    }
}
