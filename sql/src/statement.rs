//! Statements: which are answered, which are refused, and how PostgreSQL would call their columns.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::sync::Arc;

use datafusion::sql::sqlparser::ast::{
    CopyOption, CopySource, CopyTarget, DataType, Expr, FunctionArguments, Ident, ObjectName, OrderBy, OrderByKind,
    Query, Reset, SelectItem, Set, SetExpr, Statement, Value, VisitMut, VisitorMut,
};
use datafusion::sql::sqlparser::dialect::PostgreSqlDialect;
use datafusion::sql::sqlparser::parser::{Parser, ParserError};
use datafusion_pg_catalog::sql::PostgresCompatibilityParser;

use crate::error::{Result, SqlError};
use crate::limits;

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
    /// `COPY ... TO STDOUT` of the rows.
    CopyOut {
        /// The query whose rows are copied.
        statement: Arc<Statement>,
        /// How rows are written.
        format: CopyFormat,
    },
    /// Sets a session variable, to its default when there is no value.
    Set {
        /// Its name.
        name: String,
        /// Its new value.
        value: Option<String>,
    },
    /// Sets all session variables to their defaults.
    ResetAll,
    /// Shows a session variable, or all.
    Show(String),
    /// Starts a transaction; there is nothing to roll back.
    Begin(&'static str),
    /// Ends a transaction.
    End(&'static str),
    /// Forgets prepared statements, all or one.
    Deallocate(Option<String>),
    /// Nothing to do but to say so.
    Done(&'static str),
}

/// How `COPY` writes rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CopyFormat {
    /// CSV instead of PostgreSQL's text format.
    pub csv: bool,
    /// Whether the first line names the columns.
    pub header: bool,
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
    let statements = parser.parse(text).map_err(|e| match e {
        // The parser's own bound, on what it parses by recursion, is lower.
        ParserError::RecursionLimitExceeded => SqlError::new("54001", "statement is nested too deep"),
        e => SqlError::new("42601", e.to_string()),
    })?;
    statements.into_iter().map(command).collect()
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
        Statement::Copy { source, to, target, options, .. } => copy(source, *to, target, options, &statement)?,
        Statement::Set(set) => assignment(set)?,
        Statement::Reset(reset) => match &reset.reset {
            Reset::ALL => Command::ResetAll,
            Reset::ConfigurationParameter(name) => Command::Set { name: variable(name), value: None },
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
        Statement::StartTransaction { begin, .. } => Command::Begin(if *begin { "BEGIN" } else { "START TRANSACTION" }),
        Statement::Commit { .. } => Command::End("COMMIT"),
        Statement::Rollback { savepoint: None, .. } => Command::End("ROLLBACK"),
        Statement::Rollback { .. } => Command::Done("ROLLBACK"),
        Statement::Savepoint { .. } => Command::Done("SAVEPOINT"),
        Statement::ReleaseSavepoint { .. } => Command::Done("RELEASE"),
        Statement::Discard { .. } => Command::Deallocate(None),
        Statement::Deallocate { name, .. } => {
            Command::Deallocate(Some(name.value.clone()).filter(|n| !n.eq_ignore_ascii_case("all")))
        }
        Statement::Insert(_)
        | Statement::Update(_)
        | Statement::Delete(_)
        | Statement::Merge(_)
        | Statement::Truncate(_)
        | Statement::CreateTable(_)
        | Statement::CreateView(_)
        | Statement::CreateIndex(_)
        | Statement::CreateSchema { .. }
        | Statement::CreateDatabase { .. }
        | Statement::Drop { .. }
        | Statement::AlterTable { .. } => return Err(read_only(first_word(&statement))),
        other => return Err(SqlError::unsupported(format!("statement {}", first_word(other)))),
    })
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
    options: &[CopyOption],
    statement: &Statement,
) -> Result<Command> {
    if !to {
        return Err(read_only("COPY FROM"));
    }
    if !matches!(target, CopyTarget::Stdout) {
        return Err(SqlError::new("42501", "COPY to a file or a program is not allowed; COPY TO STDOUT is"));
    }
    let mut format = CopyFormat::default();
    for option in options {
        match option {
            CopyOption::Format(name) if name.value.eq_ignore_ascii_case("csv") => format.csv = true,
            CopyOption::Format(name) if name.value.eq_ignore_ascii_case("text") => {}
            CopyOption::Header(header) => format.header = *header,
            CopyOption::Delimiter(',') if format.csv => {}
            other => return Err(SqlError::unsupported(format!("COPY option {other}"))),
        }
    }
    // The older form of options has no braces: `COPY ... TO STDOUT CSV HEADER`.
    let text = statement.to_string().to_uppercase();
    if let Some((_, legacy)) = text.rsplit_once("TO STDOUT") {
        let words: Vec<&str> = legacy.split_whitespace().collect();
        format.csv |= words.contains(&"CSV");
        format.header |= words.contains(&"HEADER");
    }
    let mut query = match source {
        CopySource::Query(query) if !writes(query) => Statement::Query(query.clone()),
        CopySource::Query(_) => return Err(read_only("this statement")),
        CopySource::Table { table_name, columns } => {
            let columns = columns.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let columns = if columns.is_empty() { "*" } else { &columns };
            let text = format!("SELECT {columns} FROM {table_name}");
            let mut parsed =
                Parser::parse_sql(&PostgreSqlDialect {}, &text).map_err(|e| SqlError::new("42601", e.to_string()))?;
            parsed.pop().ok_or_else(|| SqlError::new("42601", "COPY without a table"))?
        }
    };
    name_columns(&mut query);
    Ok(Command::CopyOut { statement: Arc::new(query), format })
}

fn variable(name: &ObjectName) -> String {
    name.to_string().replace('"', "").to_ascii_lowercase()
}

fn assignment(set: &Set) -> Result<Command> {
    Ok(match set {
        Set::SingleAssignment { variable: name, values, .. } => {
            let values: Vec<String> = values.iter().map(setting).collect();
            let value = values.join(", ");
            let value = Some(value).filter(|v| !v.eq_ignore_ascii_case("default"));
            Command::Set { name: variable(name), value }
        }
        Set::SetTimeZone { value, .. } => {
            let value = Some(setting(value)).filter(|v| !["default", "local"].contains(&&*v.to_ascii_lowercase()));
            Command::Set { name: "timezone".to_owned(), value }
        }
        Set::SetNames { charset_name, .. } => {
            Command::Set { name: "client_encoding".to_owned(), value: Some(charset_name.value.clone()) }
        }
        Set::SetTransaction { .. }
        | Set::SetNamesDefault {}
        | Set::SetSessionAuthorization(_)
        | Set::SetRole { .. } => Command::Done("SET"),
        other => return Err(SqlError::unsupported(format!("SET {other}"))),
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

fn last_part(name: &ObjectName) -> String {
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
        fn pre_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<()> {
            if let Some(other) = array_of_query(expr).or_else(|| no_options(expr)) {
                *expr = other;
            }
            ControlFlow::Continue(())
        }
    }
    let _ = statement.visit(&mut Namer);
}

/// A relation's storage options, which `psql` shows: there are none.
fn no_options(expr: &Expr) -> Option<Expr> {
    let Expr::CompoundIdentifier(parts) = expr else { return None };
    if parts.last()?.value == "reloptions" { no_texts() } else { None }
}

fn no_texts() -> Option<Expr> {
    Parser::new(&PostgreSqlDialect {}).try_with_sql("CAST(NULL AS TEXT[])").ok()?.parse_expr().ok()
}

/// `ARRAY(SELECT x ...)`, for which the planner has no words, as `(SELECT array_agg(x) ...)`.
fn array_of_query(expr: &Expr) -> Option<Expr> {
    let Expr::Function(function) = expr else { return None };
    let FunctionArguments::Subquery(query) = &function.args else { return None };
    if !last_part(&function.name).eq("array") {
        return None;
    }
    if query.to_string().contains(".reloptions)") {
        // A table function of a correlated column, which can't be planned.
        return no_texts();
    }
    let mut query = query.clone();
    query.order_by = None;
    let SetExpr::Select(select) = query.body.as_mut() else { return None };
    let [SelectItem::UnnamedExpr(item) | SelectItem::ExprWithAlias { expr: item, .. }] = select.projection.as_slice()
    else {
        return None;
    };
    let dialect = PostgreSqlDialect {};
    let text = format!("array_agg({item})");
    let aggregate = Parser::new(&dialect).try_with_sql(&text).ok()?.parse_expr().ok()?;
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
    fn what_writes_is_refused() {
        let check = |text: &str, code: &str| assert_eq!(one(text).unwrap_err().code, code, "{text}");
        check("INSERT INTO t VALUES (1)", "25006");
        check("UPDATE t SET a = 1", "25006");
        check("DELETE FROM t", "25006");
        check("CREATE TABLE t (a int)", "25006");
        check("CREATE EXTERNAL TABLE t STORED AS PARQUET LOCATION '/etc'", "25006");
        check("DROP TABLE t", "25006");
        check("TRUNCATE t", "25006");
        check("EXPLAIN DELETE FROM t", "25006");
        check("SELECT 1 INTO t", "25006");
        check("COPY t FROM STDIN", "25006");
        check("COPY t TO '/tmp/x'", "42501");
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
        check("SET timezone = 'Europe/Berlin'", "Set { name: \"timezone\", value: Some(\"Europe/Berlin\") }");
        check("SET TIME ZONE 'UTC'", "Set { name: \"timezone\", value: Some(\"UTC\") }");
        check("SET statement_timeout = 500", "Set { name: \"statement_timeout\", value: Some(\"500\") }");
        check("SET search_path TO a, b", "Set { name: \"search_path\", value: Some(\"a, b\") }");
        check("SET application_name TO DEFAULT", "Set { name: \"application_name\", value: None }");
        check("RESET ALL", "ResetAll");
        check("SHOW TIME ZONE", "Show(\"timezone\")");
        check("SHOW server_version", "Show(\"server_version\")");
        check("BEGIN", "Begin(\"BEGIN\")");
        check("COMMIT", "End(\"COMMIT\")");
        check("ABORT", "End(\"ROLLBACK\")");
        check("DISCARD ALL", "Deallocate(None)");
        check("DEALLOCATE p1", "Deallocate(Some(\"p1\"))");
    }
}
