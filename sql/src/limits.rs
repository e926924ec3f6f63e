//! What a statement may be: bounds on its text that hold before anything walks it.
//!
//! Whatever handles a statement recurses: the parser, the planner, the optimizer, and what frees the tree. A tree is
//! never deeper than its text lets it be, so [`check_text`] computes from the tokens alone how deep it can become.
//! What little text can multiply is [`check_statement`]'s: queries of a `WITH` that name each other.

use std::collections::HashMap;
use std::ops::ControlFlow;

use datafusion::sql::sqlparser::ast::{
    BinaryOperator, Expr, GroupByExpr, GroupByWithModifier, ObjectName, ObjectNamePart, Query, Select, Statement,
    TableFactor, Visit, Visitor,
};
use datafusion::sql::sqlparser::dialect::PostgreSqlDialect;
use datafusion::sql::sqlparser::keywords::Keyword;
use datafusion::sql::sqlparser::tokenizer::{Token, Tokenizer};

use crate::bounded::grows;
use crate::error::{Result, SqlError};

/// Longest text of a message, in bytes.
pub const TEXT_BYTES_MAX: usize = 1 << 20;
/// Most levels of a syntax tree.
pub const DEPTH_MAX: usize = 500;
/// Most levels of function calls and arrays within each other. The parser reads what a call holds twice, to see whether it
/// is a named argument, and what stands in parentheses, to see whether it is a query: time doubles with every level
/// (`abs(` 20 times took 7 s without optimisation), while nothing can stop it.
pub const CALLS_MAX: usize = 16;
/// Most levels of sub-selects within each other: one takes as much as one and a half calls.
pub const SELECTS_MAX: usize = CALLS_MAX * 2 / 3;
/// Most columns of a select list, as in PostgreSQL.
pub const COLUMNS_MAX: usize = 1664;
/// Most selects and tables of a statement, those of a `WITH` counted wherever it is named.
pub const RELATIONS_MAX: u64 = 20_000;

/// SQLSTATE of a statement that is too deep or too large.
const TOO_COMPLEX: &str = "54001";

/// Refuses text that is too long, or whose syntax tree could become too deep.
///
/// # Errors
/// 54000, 54001; 42601 for text that has no tokens.
pub fn check_text(text: &str) -> Result<()> {
    if text.len() > TEXT_BYTES_MAX {
        let message = format!("statement of {} bytes is too long; {TEXT_BYTES_MAX} are allowed", text.len());
        return Err(SqlError::new("54000", message));
    }
    let tokens = Tokenizer::new(&PostgreSqlDialect {}, text)
        .tokenize_with_location()
        .map_err(|e| SqlError::new("42601", e.to_string()))?;
    let (mut levels, mut rereads) = (Levels::default(), Rereads::default());
    for token in &tokens {
        let at = token.span.start;
        if rereads.take(&token.token) > 2 * CALLS_MAX {
            let message = format!(
                "functions, arrays and sub-selects are nested too deep at line {}, column {}; {CALLS_MAX} levels are \
                 allowed, of sub-selects {SELECTS_MAX}",
                at.line, at.column
            );
            return Err(SqlError::new(TOO_COMPLEX, message));
        }
        if levels.take(&token.token) > DEPTH_MAX {
            let message = format!(
                "statement is nested or chained too deep at line {}, column {}; {DEPTH_MAX} levels are allowed",
                at.line, at.column
            );
            return Err(SqlError::new(TOO_COMPLEX, message));
        }
    }
    Ok(())
}

/// How often the parser may come to read the present token, as half the logarithm to base 2.
#[derive(Debug, Default)]
struct Rereads {
    /// Of each open bracket.
    open: Vec<usize>,
    sum: usize,
    /// Whether a bracket that comes now opens the arguments of a call, the elements of an array, or a query.
    call: bool,
    opened: bool,
}

impl Rereads {
    fn enter(&mut self, halves: usize) {
        self.open.push(halves);
        self.sum += halves;
    }

    fn leave(&mut self) {
        self.sum -= self.open.pop().unwrap_or(0);
    }

    /// Takes the next token; returns twice the logarithm.
    fn take(&mut self, token: &Token) -> usize {
        use Keyword as K;
        let (call, opened) = (self.call, self.opened);
        match token {
            Token::Whitespace(_) => return self.sum,
            Token::LParen => self.enter(if call { 2 } else { 0 }),
            // What is no array is an index, which is read once; but arrays hold arrays without a word.
            Token::LBracket => self.enter(2),
            Token::RParen | Token::RBracket => self.leave(),
            Token::SemiColon => *self = Self::default(),
            Token::Word(word) if opened && matches!(word.keyword, K::SELECT | K::WITH | K::VALUES) => {
                self.leave();
                self.enter(3);
            }
            _ => {}
        }
        self.opened = matches!(token, Token::LParen);
        self.call = match token {
            Token::Word(word) => !matches!(
                word.keyword,
                K::AND | K::OR | K::NOT | K::IN | K::WHERE | K::ON | K::WHEN | K::THEN | K::ELSE | K::SELECT | K::FROM
            ),
            _ => false,
        };
        self.sum
    }
}

/// What joins operands, the loosest first. Operands of one kind are whatever the tighter kinds make of the tokens
/// between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    /// `UNION` and its like.
    Set,
    /// `JOIN`, and commas between tables.
    Join,
    /// `AND` and `OR`.
    Logic,
    /// Any other operator, word or bracket.
    Tight,
}

/// What is known of the tokens since a bracket was opened.
#[derive(Debug, Default)]
struct Level {
    /// For each kind of link: how many there were in a row, and the deepest of their operands.
    links: [(usize, usize); 4],
    /// Within a list of tables, whose commas join.
    tables: bool,
    /// Opened by `CASE`, not by a bracket.
    case: bool,
}

impl Level {
    /// The depth of everything that is tighter than `link`, which begins anew.
    fn fold(&mut self, link: Link) {
        for i in (link as usize + 1..self.links.len()).rev() {
            let (count, deepest) = std::mem::take(&mut self.links[i]);
            let looser = &mut self.links[i - 1].1;
            *looser = (*looser).max(count + deepest);
        }
    }

    fn link(&mut self, link: Link) {
        self.fold(link);
        self.links[link as usize].0 += 1;
    }

    /// How deep its next token lies within it.
    fn here(&self) -> usize {
        self.links.iter().map(|(count, _)| count).sum()
    }

    fn depth(&self) -> usize {
        self.links.iter().rev().fold(0, |inner, (count, deepest)| count + inner.max(*deepest))
    }
}

/// The open brackets.
#[derive(Debug)]
struct Levels {
    open: Vec<Level>,
    /// How deep the innermost lies.
    outside: usize,
}

impl Default for Levels {
    fn default() -> Self {
        Self { open: vec![Level::default()], outside: 0 }
    }
}

impl Levels {
    fn innermost(&mut self) -> &mut Level {
        if self.open.is_empty() {
            self.open.push(Level::default());
        }
        let last = self.open.len() - 1;
        &mut self.open[last]
    }

    fn enter(&mut self, case: bool) {
        self.innermost().link(Link::Tight);
        self.outside += self.innermost().here();
        self.open.push(Level { case, ..Level::default() });
    }

    fn leave(&mut self) {
        // A bracket that was never opened is for the parser to name.
        if self.open.len() < 2 {
            return;
        }
        let inner = self.open.pop().map_or(0, |l| l.depth());
        let level = self.innermost();
        let operand = &mut level.links[Link::Tight as usize].1;
        *operand = (*operand).max(inner);
        self.outside -= self.innermost().here();
    }

    /// Takes the next token; returns how deep the tree can be so far.
    fn take(&mut self, token: &Token) -> usize {
        use Keyword as K;
        match token {
            Token::Whitespace(_)
            | Token::EOF
            | Token::Number(..)
            | Token::SingleQuotedString(_)
            | Token::EscapedStringLiteral(_)
            | Token::Placeholder(_) => {}
            Token::LParen | Token::LBracket | Token::LBrace => self.enter(false),
            Token::RParen | Token::RBracket | Token::RBrace => {
                while self.open.len() > 1 && self.innermost().case {
                    self.leave();
                }
                self.leave();
            }
            Token::Comma => {
                let level = self.innermost();
                if level.tables { level.link(Link::Join) } else { level.fold(Link::Join) }
            }
            Token::SemiColon => *self = Self::default(),
            Token::Word(word) if word.quote_style.is_none() => match word.keyword {
                K::NoKeyword => {}
                K::CASE => self.enter(true),
                K::END if self.innermost().case => self.leave(),
                K::UNION | K::EXCEPT | K::INTERSECT | K::MINUS => {
                    let level = self.innermost();
                    level.link(Link::Set);
                    level.tables = false;
                }
                K::JOIN | K::APPLY => self.innermost().link(Link::Join),
                K::AND | K::OR | K::XOR => self.innermost().link(Link::Logic),
                K::FROM => {
                    let level = self.innermost();
                    level.fold(Link::Join);
                    level.tables = true;
                }
                K::SELECT | K::WHERE | K::HAVING | K::GROUP | K::ORDER | K::LIMIT => {
                    let level = self.innermost();
                    level.fold(Link::Join);
                    level.tables = false;
                }
                K::ON | K::WHEN | K::THEN | K::ELSE => self.innermost().fold(Link::Join),
                _ => self.innermost().link(Link::Tight),
            },
            Token::Word(_) => {}
            _ => self.innermost().link(Link::Tight),
        }
        self.outside + self.innermost().depth()
    }
}

/// Refuses a statement that becomes too large once its names are resolved, and select lists that are too long.
///
/// # Errors
/// 54001, 54011.
pub fn check_statement(statement: &Statement) -> Result<()> {
    match statement.visit(&mut Sizes::default()) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(e) => Err(e),
    }
}

/// Refuses an answer of too many columns.
///
/// # Errors
/// 54011.
pub fn check_columns(columns: usize) -> Result<()> {
    if columns <= COLUMNS_MAX {
        return Ok(());
    }
    Err(SqlError::new("54011", format!("target lists can have at most {COLUMNS_MAX} entries, this one has {columns}")))
}

/// Most sets by which one `SELECT` groups, as in PostgreSQL: each is written out before anything is computed.
const GROUPING_SETS_MAX: usize = 4096;
/// Most elements of a `CUBE`, which has a set for each choice of them.
const CUBE_MAX: usize = 12;

/// Refuses to group by too many sets.
///
/// # Errors
/// 54000, in PostgreSQL's words.
fn check_grouping(group_by: &GroupByExpr) -> Result<()> {
    let (expressions, modifiers) = match group_by {
        GroupByExpr::All(modifiers) => (&[][..], modifiers),
        GroupByExpr::Expressions(expressions, modifiers) => (expressions.as_slice(), modifiers),
    };
    let cube = |elements: usize| match elements {
        0..=CUBE_MAX => Ok(1 << elements),
        _ => Err(SqlError::new("54000", format!("CUBE is limited to {CUBE_MAX} elements"))),
    };
    let mut sets = 1usize;
    for expr in expressions {
        let of_expr = match expr {
            Expr::Cube(elements) => cube(elements.len())?,
            Expr::Rollup(elements) => elements.len() + 1,
            Expr::GroupingSets(elements) => elements.len(),
            _ => 1,
        };
        sets = sets.saturating_mul(of_expr);
    }
    for modifier in modifiers {
        if matches!(modifier, GroupByWithModifier::Cube) {
            sets = sets.saturating_mul(cube(expressions.len())?);
        }
    }
    if sets <= GROUPING_SETS_MAX {
        return Ok(());
    }
    Err(SqlError::new("54000", format!("too many grouping sets present (maximum {GROUPING_SETS_MAX})")))
}

/// Counts selects and tables.
#[derive(Debug, Default)]
struct Sizes {
    open: Vec<Counted>,
    total: u64,
}

/// A query under way.
#[derive(Debug, Default)]
struct Counted {
    size: u64,
    /// Names of the `WITH` that weren't counted yet, the next one last.
    names: Vec<String>,
    sizes: HashMap<String, u64>,
}

impl Sizes {
    fn add(&mut self, size: u64) {
        if let Some(query) = self.open.last_mut() {
            query.size = query.size.saturating_add(size);
        }
    }

    fn written_out(&mut self, size: u64) -> ControlFlow<SqlError> {
        self.total = self.total.saturating_add(size);
        if self.total <= RELATIONS_MAX {
            return ControlFlow::Continue(());
        }
        let message = format!(
            "statement is too large: with the queries of WITH counted wherever they are named it has more than \
             {RELATIONS_MAX} selects and tables"
        );
        ControlFlow::Break(SqlError::new(TOO_COMPLEX, message))
    }
}

/// Arguments of a table function are computed while the statement is planned, where nothing bounds results.
#[derive(Debug)]
struct Arguments;

impl Visitor for Arguments {
    type Break = SqlError;

    fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<SqlError> {
        let what = match expr {
            Expr::Function(f) => {
                f.name.0.last().and_then(ObjectNamePart::as_ident).map(|i| i.value.to_lowercase()).filter(|n| grows(n))
            }
            Expr::BinaryOp { op: BinaryOperator::StringConcat, .. } => Some("||".to_owned()),
            Expr::Array(_) => Some("ARRAY".to_owned()),
            _ => None,
        };
        match what {
            Some(what) => {
                ControlFlow::Break(SqlError::unsupported(format!("{what} in an argument of a table function")))
            }
            None => ControlFlow::Continue(()),
        }
    }
}

impl Visitor for Sizes {
    type Break = SqlError;

    fn pre_visit_table_factor(&mut self, table: &TableFactor) -> ControlFlow<SqlError> {
        match table {
            TableFactor::Table { args: Some(args), .. } => args.visit(&mut Arguments),
            TableFactor::Function { args, .. } => args.visit(&mut Arguments),
            TableFactor::TableFunction { expr: Expr::Function(call), .. } => call.args.visit(&mut Arguments),
            _ => ControlFlow::Continue(()),
        }
    }

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<SqlError> {
        let tables = query.with.iter().flat_map(|w| &w.cte_tables);
        let mut names: Vec<String> = tables.map(|c| c.alias.name.value.to_lowercase()).collect();
        names.reverse();
        self.open.push(Counted { names, ..Counted::default() });
        ControlFlow::Continue(())
    }

    fn post_visit_query(&mut self, _query: &Query) -> ControlFlow<SqlError> {
        let size = self.open.pop().map_or(0, |q| q.size);
        // The queries of a WITH are visited first, in the order of their names.
        let named = self.open.last_mut().and_then(|outer| {
            let name = outer.names.pop()?;
            outer.sizes.insert(name, size);
            Some(())
        });
        if named.is_some() || self.open.is_empty() {
            return self.written_out(size);
        }
        self.add(size);
        ControlFlow::Continue(())
    }

    fn pre_visit_select(&mut self, select: &Select) -> ControlFlow<SqlError> {
        self.add(1);
        let checked = check_columns(select.projection.len()).and_then(|()| check_grouping(&select.group_by));
        match checked {
            Ok(()) => ControlFlow::Continue(()),
            Err(e) => ControlFlow::Break(e),
        }
    }

    fn pre_visit_relation(&mut self, relation: &ObjectName) -> ControlFlow<SqlError> {
        let size = match relation.0.as_slice() {
            [ObjectNamePart::Identifier(name)] => {
                let name = name.value.to_lowercase();
                self.open.iter().rev().find_map(|q| q.sizes.get(&name)).copied()
            }
            _ => None,
        };
        self.add(size.unwrap_or(1));
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    use datafusion::sql::sqlparser::parser::Parser;

    use super::*;

    fn depth(text: &str) -> usize {
        let tokens = Tokenizer::new(&PostgreSqlDialect {}, text).tokenize().expect("tokens");
        let mut levels = Levels::default();
        tokens.iter().map(|t| levels.take(t)).max().unwrap_or(0)
    }

    #[test]
    fn depth_follows_from_tokens() {
        let check = |text: &str, expected: usize| assert_eq!(depth(text), expected, "{text}");
        check("SELECT 1, 2, 3", 0);
        check("SELECT 1 + 1 + 1", 2);
        check("SELECT 1 + 1, 1 + 1", 1);
        check("a = 1 AND b = 2 AND c = 3", 3);
        check("NOT NOT NOT a", 3);
        check("((1))", 2);
        check("(1) + (2)", 3);
        check("x IN (1, 2, 3, 4)", 2);
        check("f(g(1), g(2), h(i(1)))", 3);
        check("(a OR b OR c) OR d OR e", 5);
        check("d OR e OR (a OR b OR c)", 5);
        check("a::x::y", 2);
        check("CASE WHEN a THEN 1 WHEN b THEN 2 END", 1);
        check("CASE WHEN a THEN CASE WHEN b THEN 1 END END", 2);
        check("SELECT a FROM t UNION SELECT a FROM t UNION SELECT a FROM t", 2);
        check("SELECT a FROM t, u, v WHERE a = 1 AND b = 2", 4);
        check("SELECT a FROM t JOIN u ON a = b JOIN v ON c = d", 3);
        check("x[1][1][1]", 3);
        check("1; 1 + 1; 1", 1);
        check("\"CASE\" = 'UNION'", 1);
        check(")) + ((", 3);
    }

    #[test]
    fn depth_is_at_least_that_of_every_bracket() {
        // A chain within a chain within a chain: the operands in front are the deepest.
        let mut text = "1".to_owned();
        for _ in 0..10 {
            text = format!("({text}{})", "+1".repeat(60));
        }
        assert!(depth(&text) >= 600, "{}", depth(&text));
        assert!(check_text(&text).is_err());
    }

    #[test]
    fn what_is_read_again_at_every_level_is_bounded() {
        let check = |open: &str, inner: &str, close: &str, most: usize| {
            let text = |n: usize| format!("SELECT {}{inner}{}", open.repeat(n), close.repeat(n));
            assert_eq!(check_text(&text(most)), Ok(()), "{open}");
            let e = check_text(&text(most + 1)).expect_err(open);
            assert!(e.code == TOO_COMPLEX && e.message.contains("levels are allowed"), "{open}: {e}");
            let side_by_side = format!("SELECT {}", [text(most).split_off(7), text(most).split_off(7)].join(", "));
            assert_eq!(check_text(&side_by_side), Ok(()), "{open}");
        };
        check("abs(", "1", ")", CALLS_MAX);
        check("abs ( ", "1", " )", CALLS_MAX);
        check("\"f\"(", "1", ")", CALLS_MAX);
        check("ARRAY[", "1", "]", CALLS_MAX);
        check("(SELECT ", "1", ")", SELECTS_MAX);
        check("* FROM (SELECT ", "1", ") t", SELECTS_MAX);
        check("1 IN (SELECT ", "1", ")", SELECTS_MAX);
        check("(", "1", ")", DEPTH_MAX);
    }

    #[test]
    fn texts_within_the_limits_pass() {
        let check = |text: String| assert_eq!(check_text(&text), Ok(()), "{text:.100}");
        check(format!("SELECT 1 IN (0{})", ",1".repeat(100_000)));
        check(format!("SELECT a FROM t WHERE a = 0{}", " OR a = 1 AND b LIKE 'x'".repeat(200)));
        check(format!("SELECT 1{}", " UNION ALL SELECT a FROM t WHERE a = 1 AND b = 2".repeat(400)));
        check("SELECT a, b FROM t WHERE c = 'd';\n".repeat(1000));
    }

    #[test]
    fn text_that_goes_too_deep_is_refused_where_it_does() {
        let check = |text: String, expected: &str| {
            let e = check_text(&text).expect_err("too deep");
            assert_eq!((e.code, e.message.as_str()), (TOO_COMPLEX, expected), "{text:.50}");
        };
        let at = |line: u64, column: u64| {
            format!("statement is nested or chained too deep at line {line}, column {column}; 500 levels are allowed")
        };
        check(format!("SELECT 1{}", "+1".repeat(20_000)), &at(1, 1009));
        check(format!("SELECT\n{}true", "NOT ".repeat(20_000)), &at(2, 2001));
        check(format!("SELECT {}", "(".repeat(100_000)), &at(1, 508));
        check(format!("SELECT 1{}", "::x".repeat(2_500)), &at(1, 1509));
        let long = check_text(&" ".repeat(TEXT_BYTES_MAX + 1)).expect_err("too long");
        assert_eq!(
            (long.code, &*long.message),
            ("54000", "statement of 1048577 bytes is too long; 1048576 are allowed")
        );
    }

    fn sizes(text: &str) -> Result<u64> {
        let statements = Parser::parse_sql(&PostgreSqlDialect {}, text).expect("a statement");
        let mut sizes = Sizes::default();
        match statements.visit(&mut sizes) {
            ControlFlow::Continue(()) => Ok(sizes.total),
            ControlFlow::Break(e) => Err(e),
        }
    }

    #[test]
    fn queries_of_with_count_wherever_they_are_named() {
        let check = |text: &str, expected: u64| assert_eq!(sizes(text), Ok(expected), "{text}");
        check("SELECT 1", 1);
        check("SELECT * FROM t, u", 3);
        check("SELECT * FROM (SELECT * FROM t) x", 3);
        check("WITH a AS (SELECT 1) SELECT * FROM a", 1 + 2);
        check("WITH a AS (SELECT 1), b AS (SELECT * FROM a, a) SELECT * FROM b, A", 1 + 3 + 5);
        check("SELECT * FROM t WHERE x IN (WITH a AS (SELECT 1) SELECT * FROM a)", 1 + 4);
        let doubled: String = (1..500)
            .map(|i| format!(", a{i} AS (SELECT * FROM a{j} UNION ALL SELECT * FROM a{j})", j = i - 1))
            .collect();
        let e = sizes(&format!("WITH a0 AS (SELECT 1){doubled} SELECT * FROM a499")).expect_err("too large");
        assert_eq!(e.code, TOO_COMPLEX);
        let grouped = |by: &str| sizes(&format!("SELECT 1 FROM t GROUP BY {by}")).map_err(|e| (e.code, e.message));
        let many = |n: usize| (0..n).map(|i| format!("c{i}")).collect::<Vec<_>>().join(",");
        assert_eq!(grouped(&format!("CUBE({})", many(12))), Ok(2));
        let e = grouped(&format!("CUBE({})", many(30))).expect_err("a billion sets");
        assert_eq!(e, ("54000", "CUBE is limited to 12 elements".into()));
        assert_eq!(grouped(&format!("ROLLUP({}), CUBE({})", many(20), many(7))), Ok(2));
        let e = grouped(&format!("ROLLUP({}), CUBE({})", many(40), many(7))).expect_err("5,248 sets");
        assert_eq!(e, ("54000", "too many grouping sets present (maximum 4096)".into()));
        let e = sizes(&format!("SELECT 1{}", ",1".repeat(COLUMNS_MAX))).expect_err("too wide");
        assert_eq!((e.code, &*e.message), ("54011", "target lists can have at most 1664 entries, this one has 1665"));
    }
}
