//! Tokens to a syntax tree: recursive descent, binary operators by how strongly they bind.
//!
//! The first error ends it. Which construct an unexpected token is said to be in depends on what encloses it:
//! [`Parser::within`] keeps that.

use catalog::matcher::Patterns;
use catalog::tag::METRIC_NAME;
use catalog::{MatchOp, Matcher};

use super::ast::{
    Aggregate, AggregateOp, At, Binary, Call, Cardinality, DurationExpr, DurationKind, DurationOp, Edges, Expr, Kind,
    Length, Matching, Matrix, Number, Operator, Selector, Span, Subquery, Time, Unary,
};
use super::functions::function;
use super::token::{self, Lexer, Token};
use super::{DEPTH_MAX, Error, OPERANDS_MAX, go};
use crate::exec::deep;
use crate::options::Features;
use crate::result::ValueType;

type Result<T> = std::result::Result<T, Error>;

pub(super) fn expression(text: &str, features: &Features) -> Result<Expr> {
    let mut parser = Parser::new(text, features);
    if parser.next.kind == token::Kind::End {
        return Err(Error::new(0, "no expression found in input"));
    }
    let expr = parser.expr()?;
    parser.end()?;
    Ok(expr)
}

pub(super) fn selector(text: &str) -> Result<Selector> {
    let features = Features::default();
    let mut parser = Parser::new(text, &features);
    let first = parser.next;
    let (selector, _) = match first.kind {
        token::Kind::LeftBrace => parser.selector(None)?,
        _ if is_metric(first.kind) => {
            parser.advance();
            parser.selector(Some(first))?
        }
        _ => return parser.unexpected(),
    };
    parser.end()?;
    Ok(selector)
}

struct Parser<'a> {
    text: &'a str,
    lexer: Lexer<'a>,
    features: &'a Features,
    next: Token,
    /// Why there is no next token. Errors about what was read come first, so it waits until the token is looked at.
    failure: Option<Error>,
    /// End of the token before.
    last_end: usize,
    /// Constructs around the next token, and what they would have there.
    within: Vec<(&'static str, &'static str)>,
    level: usize,
    /// Operands so far.
    operands: usize,
    /// The regular expressions so far.
    patterns: Patterns,
    /// Operators in the duration that is being read.
    duration_operators: usize,
}

const AGGREGATION: (&str, &str) = ("aggregation", "");
const OFFSET: (&str, &str) = ("offset", "number, duration, step(), or range()");
const AT: (&str, &str) = ("@", "timestamp");
const RANGE: (&str, &str) = ("subquery or range selector", "number, duration, step(), or range()");
const AFTER_RANGE: (&str, &str) = ("subquery or range", "\":\" or \"]\"");
const STEP: (&str, &str) = ("subquery selector", "number, duration, step(), range(), or \"]\"");
const AFTER_STEP: (&str, &str) = ("subquery selector", "\"]\"");
const MATCHER: (&str, &str) = ("label matching", "identifier or \"}\"");
const MATCHER_OP: (&str, &str) = ("label matching", "label matching operator");
const MATCHER_VALUE: (&str, &str) = ("label matching", "string");
const AFTER_MATCHER: (&str, &str) = ("label matching", "\",\" or \"}\"");
const GROUPING: (&str, &str) = ("grouping opts", "\"(\"");
const GROUPING_LABEL: (&str, &str) = ("grouping opts", "label");
const AFTER_LABEL: (&str, &str) = ("grouping opts", "\",\" or \")\"");

/// Binds as strongly as a sign: what a sign stands before goes on with `^` only.
const SIGN: u8 = 6;

/// Seconds that nanoseconds in 64 bits can hold.
const SECONDS_MAX: f64 = 9_223_372_036.854_776;

/// Whether a word can be a metric's name.
fn is_metric(kind: token::Kind) -> bool {
    use token::Kind as K;
    matches!(
        kind,
        K::Aggregate(_)
            | K::Identifier
            | K::MetricIdentifier
            | K::By
            | K::Fill
            | K::FillLeft
            | K::FillRight
            | K::Operator(Operator::And | Operator::Or | Operator::Unless)
            | K::Offset
            | K::Without
            | K::EvalStart
            | K::EvalEnd
            | K::Step
            | K::Range
            | K::Anchored
            | K::Smoothed
            | K::MaxOf
            | K::MinOf
    )
}

/// Whether a word can be a label's name outside of braces.
fn is_label(kind: token::Kind) -> bool {
    use token::Kind as K;
    is_metric(kind)
        || matches!(kind, K::Bool | K::GroupLeft | K::GroupRight | K::Ignoring | K::On | K::Operator(Operator::Atan2))
}

/// Whether an expression can begin so.
fn begins_expr(kind: token::Kind) -> bool {
    use token::Kind as K;
    is_metric(kind)
        || matches!(
            kind,
            K::LeftParen
                | K::LeftBrace
                | K::Number
                | K::Duration
                | K::Text
                | K::Operator(Operator::Add | Operator::Sub)
        )
}

impl<'a> Parser<'a> {
    fn new(text: &'a str, features: &'a Features) -> Self {
        let mut parser = Self {
            text,
            lexer: Lexer::new(text),
            features,
            next: Token { kind: token::Kind::Invalid, span: Span::default() },
            failure: None,
            last_end: 0,
            within: Vec::new(),
            level: 0,
            operands: 0,
            patterns: Patterns::default(),
            duration_operators: 0,
        };
        parser.advance();
        parser
    }

    /// Takes the next token.
    fn advance(&mut self) -> Token {
        let token = self.next;
        self.last_end = token.span.end;
        match self.lexer.next() {
            Ok(next) => self.next = next,
            Err(e) => {
                self.next = Token { kind: token::Kind::Invalid, span: Span { start: e.at, end: e.at } };
                self.failure = Some(e);
            }
        }
        token
    }

    /// An error if what comes next is no token.
    fn look(&self) -> Result<()> {
        self.failure.clone().map_or(Ok(()), Err)
    }

    fn value(&self, token: Token) -> &'a str {
        &self.text[token.span.start..token.span.end]
    }

    /// The next token must not be here, as the innermost construct sees it.
    fn unexpected<T>(&self) -> Result<T> {
        self.unexpected_in(self.within.last().copied().unwrap_or_default())
    }

    fn unexpected_in<T>(&self, (what, expected): (&str, &str)) -> Result<T> {
        self.look()?;
        let mut message = format!("unexpected {}", self.next.describe(self.text));
        if !what.is_empty() {
            message.push_str(" in ");
            message.push_str(what);
        }
        if !expected.is_empty() {
            message.push_str(", expected ");
            message.push_str(expected);
        }
        Err(Error::new(self.next.span.start, message))
    }

    fn expect(&mut self, kind: token::Kind) -> Result<Token> {
        if self.next.kind == kind { Ok(self.advance()) } else { self.unexpected() }
    }

    fn end(&self) -> Result<()> {
        if self.next.kind == token::Kind::End { Ok(()) } else { self.unexpected() }
    }

    /// Runs `f` one level deeper.
    fn nested<T>(&mut self, f: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.level >= DEPTH_MAX {
            return Err(too_deep(self.next.span.start));
        }
        self.level += 1;
        let result = deep(|| f(self));
        self.level -= 1;
        result
    }

    fn expr(&mut self) -> Result<Expr> {
        self.nested(|p| p.binary(0))
    }

    /// An expression of operators that bind at least so strongly.
    fn binary(&mut self, min: u8) -> Result<Expr> {
        let mut left = self.unary()?;
        while let token::Kind::Operator(op) = self.next.kind {
            let precedence = op.precedence();
            if precedence < min {
                break;
            }
            let op_span = self.advance().span;
            let (returns_bool, matching) = self.modifiers()?;
            // Only powers associate to the right.
            let right =
                if op == Operator::Pow { self.nested(|p| p.binary(precedence))? } else { self.binary(precedence + 1)? };
            let fills = matching.fill_left.is_some() || matching.fill_right.is_some();
            self.look()?;
            if fills && !self.features.binop_fill_modifiers {
                let message = "binop fill modifiers are experimental and not enabled";
                return Err(Error::new(left.span.start, message));
            }
            let span = left.span.to(right.span);
            let both_scalars = left.value_type == ValueType::Scalar && right.value_type == ValueType::Scalar;
            let value_type = if both_scalars { ValueType::Scalar } else { ValueType::Vector };
            let (left_box, right) = (Box::new(left), Box::new(right));
            let binary = Binary { op, op_span, left: left_box, right, returns_bool, matching: Some(matching) };
            left = node(Kind::Binary(binary), span, value_type)?;
        }
        Ok(left)
    }

    /// What may follow an operator: `bool`, which series match, what stands in for missing ones.
    fn modifiers(&mut self) -> Result<(bool, Matching)> {
        use token::Kind as K;
        let mut matching = Matching {
            cardinality: Cardinality::OneToOne,
            labels: Vec::new(),
            on: false,
            include: Vec::new(),
            fill_left: None,
            fill_right: None,
        };
        let returns_bool = self.next.kind == K::Bool;
        if returns_bool {
            self.advance();
        }
        if matches!(self.next.kind, K::On | K::Ignoring) {
            matching.on = self.advance().kind == K::On;
            matching.labels = self.grouping()?;
            if matches!(self.next.kind, K::GroupLeft | K::GroupRight) {
                let left = self.advance().kind == K::GroupLeft;
                matching.cardinality = if left { Cardinality::ManyToOne } else { Cardinality::OneToMany };
                if self.next.kind == K::LeftParen {
                    matching.include = self.grouping()?;
                }
            }
        }
        match self.next.kind {
            K::Fill => {
                let v = Some(self.fill()?);
                (matching.fill_left, matching.fill_right) = (v, v);
            }
            K::FillLeft => {
                matching.fill_left = Some(self.fill()?);
                if self.next.kind == K::FillRight {
                    matching.fill_right = Some(self.fill()?);
                }
            }
            K::FillRight => {
                matching.fill_right = Some(self.fill()?);
                if self.next.kind == K::FillLeft {
                    matching.fill_left = Some(self.fill()?);
                }
            }
            _ => {}
        }
        Ok((returns_bool, matching))
    }

    fn fill(&mut self) -> Result<f64> {
        self.advance();
        self.expect(token::Kind::LeftParen)?;
        let sign = self.sign()?;
        let (number, _) = self.number()?;
        self.expect(token::Kind::RightParen)?;
        Ok(if sign.is_some_and(|(negative, _)| negative) { -number.value } else { number.value })
    }

    /// A sign, whether it is a minus, and where it stands.
    fn sign(&mut self) -> Result<Option<(bool, Span)>> {
        let token::Kind::Operator(op @ (Operator::Add | Operator::Sub)) = self.next.kind else { return Ok(None) };
        Ok(Some((op == Operator::Sub, self.advance().span)))
    }

    /// The labels in parentheses after `by`, `on` and their kin.
    fn grouping(&mut self) -> Result<Vec<String>> {
        use token::Kind as K;
        if self.next.kind != K::LeftParen {
            return self.unexpected_in(GROUPING);
        }
        self.advance();
        let mut labels = Vec::new();
        while self.next.kind != K::RightParen {
            let at = self.next.span.start;
            let label = match self.next.kind {
                K::Text => self.unquote(self.next)?,
                kind if is_label(kind) => self.value(self.next).to_owned(),
                _ => return self.unexpected_in(GROUPING_LABEL),
            };
            if label.is_empty() {
                return Err(Error::new(at, "invalid label name for grouping: \"\""));
            }
            self.advance();
            labels.push(label);
            match self.next.kind {
                K::Comma => {
                    self.advance();
                }
                K::RightParen => {}
                _ => return self.unexpected_in(AFTER_LABEL),
            }
        }
        self.advance();
        Ok(labels)
    }

    fn unquote(&self, token: Token) -> Result<String> {
        go::unquote(self.value(token)).map_err(|e| Error::new(token.span.start, e))
    }

    /// Signs and what they stand before.
    fn unary(&mut self) -> Result<Expr> {
        self.operands += 1;
        if self.operands > OPERANDS_MAX {
            return Err(Error::new(self.next.span.start, format!("more than {OPERANDS_MAX} operands")));
        }
        let Some((negative, span)) = self.sign()? else { return self.postfix() };
        let mut expr = self.nested(|p| p.binary(SIGN))?;
        let whole = span.to(expr.span);
        if let Kind::Number(number) = &mut expr.kind {
            if negative {
                number.value = -number.value;
            }
            expr.span = whole;
            return Ok(expr);
        }
        let value_type = expr.value_type;
        node(Kind::Unary(Unary { negative, expr: Box::new(expr) }), whole, value_type)
    }

    /// An operand and the modifiers that follow it.
    fn postfix(&mut self) -> Result<Expr> {
        use token::Kind as K;
        let mut expr = self.operand()?;
        loop {
            match self.next.kind {
                K::LeftBracket => expr = self.range(expr)?,
                K::Offset => {
                    self.advance();
                    self.within.push(OFFSET);
                    let offset = self.offset()?;
                    self.within.pop();
                    set_offset(&mut expr, offset)?;
                    expr.span.end = self.last_end;
                }
                K::At => {
                    self.advance();
                    self.within.push(AT);
                    let at = self.at(expr.span.start)?;
                    self.within.pop();
                    set_at(&mut expr, at)?;
                    expr.span.end = self.last_end;
                }
                K::Anchored => {
                    set_edges(&mut expr, Edges::Anchored, self.features)?;
                    self.advance();
                }
                K::Smoothed => {
                    set_edges(&mut expr, Edges::Smoothed, self.features)?;
                    self.advance();
                }
                _ => return Ok(expr),
            }
        }
    }

    fn operand(&mut self) -> Result<Expr> {
        use token::Kind as K;
        let first = self.next;
        match first.kind {
            K::LeftParen => {
                self.advance();
                let inner = self.expr()?;
                let span = first.span.to(self.expect(K::RightParen)?.span);
                let value_type = inner.value_type;
                node(Kind::Paren(Box::new(inner)), span, value_type)
            }
            K::Number | K::Duration => {
                let (number, span) = self.number()?;
                node(Kind::Number(number), span, ValueType::Scalar)
            }
            K::Text => {
                let text = go::unquote_bytes(self.value(first)).map_err(|e| Error::new(first.span.start, e))?;
                self.advance();
                let kind = String::from_utf8(text).map_or_else(|e| Kind::Bytes(e.into_bytes()), Kind::Text);
                node(kind, first.span, ValueType::String)
            }
            K::LeftBrace => self.selector_node(None),
            K::Aggregate(op) => {
                self.advance();
                if matches!(self.next.kind, K::LeftParen | K::By | K::Without) {
                    return self.aggregate(op, first);
                }
                self.selector_node(Some(first))
            }
            K::Identifier | K::EvalStart | K::EvalEnd | K::Step | K::Range | K::MaxOf | K::MinOf => {
                self.advance();
                if self.next.kind == K::LeftParen {
                    return self.call(first);
                }
                self.selector_node(Some(first))
            }
            kind if is_metric(kind) => {
                self.advance();
                self.selector_node(Some(first))
            }
            _ => self.unexpected(),
        }
    }

    fn number(&mut self) -> Result<(Number, Span)> {
        let token = self.next;
        let failed = |e: String| Error::new(token.span.start, e);
        let number = match token.kind {
            token::Kind::Number => {
                let value = go::parse_number(self.value(token));
                Number { value: value.map_err(|e| failed(format!("error parsing number: {e}")))?, duration: false }
            }
            token::Kind::Duration => {
                let ms = go::parse_duration(self.value(token)).map_err(failed)?;
                Number { value: ms as f64 / 1000.0, duration: true }
            }
            _ => return self.unexpected(),
        };
        self.advance();
        Ok((number, token.span))
    }

    fn aggregate(&mut self, op: AggregateOp, first: Token) -> Result<Expr> {
        use token::Kind as K;
        self.within.push(AGGREGATION);
        let (mut labels, mut without) = (Vec::new(), false);
        let before = matches!(self.next.kind, K::By | K::Without);
        if before {
            without = self.advance().kind == K::Without;
            labels = self.grouping()?;
        }
        let args = self.arguments()?;
        if !before && matches!(self.next.kind, K::By | K::Without) {
            without = self.advance().kind == K::Without;
            labels = self.grouping()?;
        }
        self.within.pop();
        if !before {
            self.look()?;
        }
        let span = Span { start: first.span.start, end: self.last_end };
        let failed = |message: String| Err(Error::new(span.start, message));
        if args.is_empty() {
            return failed("no arguments for aggregate expression provided".into());
        }
        if op.is_experimental() && !self.features.experimental_functions {
            return failed(format!(
                "{}() is experimental and must be enabled with --enable-feature=promql-experimental-functions",
                op.name()
            ));
        }
        let (got, expected) = (args.len(), 1 + usize::from(op.has_param()));
        let mut args = args.into_iter();
        let param = if op.has_param() { args.next().map(Box::new) } else { None };
        match (args.next(), args.next()) {
            (Some(expr), None) => {
                let aggregate = Aggregate { op, expr: Box::new(expr), param, labels, without };
                node(Kind::Aggregate(aggregate), span, ValueType::Vector)
            }
            _ => failed(format!(
                "wrong number of arguments for aggregate expression provided, expected {expected}, got {got}"
            )),
        }
    }

    fn call(&mut self, first: Token) -> Result<Expr> {
        let args = self.arguments()?;
        let name = self.value(first);
        let span = Span { start: first.span.start, end: self.last_end };
        let Some(function) = function(name) else {
            return Err(Error::new(span.start, format!("unknown function with name {}", go::quote(name))));
        };
        if function.experimental && !self.features.experimental_functions {
            return Err(Error::new(span.start, format!("function {} is not enabled", go::quote(name))));
        }
        node(Kind::Call(Call { function, args }), span, function.returns)
    }

    /// Arguments in parentheses.
    fn arguments(&mut self) -> Result<Vec<Expr>> {
        use token::Kind as K;
        self.expect(K::LeftParen)?;
        let mut args = Vec::new();
        if self.next.kind != K::RightParen {
            loop {
                args.push(self.expr()?);
                if self.next.kind != K::Comma {
                    break;
                }
                let comma = self.advance();
                self.look()?;
                if !begins_expr(self.next.kind) {
                    let message = "trailing commas not allowed in function call args";
                    return Err(Error::new(comma.span.start, message));
                }
            }
        }
        self.expect(K::RightParen)?;
        Ok(args)
    }

    fn selector_node(&mut self, name: Option<Token>) -> Result<Expr> {
        let (selector, span) = self.selector(name)?;
        node(Kind::Selector(selector), span, ValueType::Vector)
    }

    /// A selector whose name, if it has one before the braces, was read.
    fn selector(&mut self, name: Option<Token>) -> Result<(Selector, Span)> {
        let mut matchers = Vec::new();
        let start = name.map_or(self.next.span.start, |n| n.span.start);
        if self.next.kind == token::Kind::LeftBrace {
            matchers = self.matchers()?;
        }
        let name = name.map(|n| self.value(n).to_owned());
        if let Some(name) = &name {
            matchers.push(named(name));
        }
        let selector = Selector { name, matchers, time: Time::default(), edges: None };
        Ok((selector, Span { start, end: self.last_end }))
    }

    fn matchers(&mut self) -> Result<Vec<Matcher>> {
        use token::Kind as K;
        self.advance();
        let mut matchers = Vec::new();
        while self.next.kind != K::RightBrace {
            let first = self.next;
            let name = match first.kind {
                K::Identifier => self.value(first).to_owned(),
                K::Text => self.unquote(first)?,
                _ => return self.unexpected_in(MATCHER),
            };
            self.advance();
            let op = match self.next.kind {
                K::Assign => Some(MatchOp::Eq),
                K::Operator(Operator::Ne) => Some(MatchOp::Ne),
                K::Matches => Some(MatchOp::Re),
                K::MatchesNot => Some(MatchOp::Nre),
                _ => None,
            };
            let matcher = match op {
                // A text alone is the metric's name.
                None if first.kind == K::Text => named(&name),
                None => return self.unexpected_in(MATCHER_OP),
                Some(op) => {
                    self.advance();
                    if self.next.kind != K::Text {
                        return self.unexpected_in(MATCHER_VALUE);
                    }
                    let value = self.unquote(self.next)?;
                    let matcher = Matcher::new(name, op, value);
                    let matcher = matcher.and_then(|m| self.patterns.add(&m).map(|()| m));
                    let matcher = matcher.map_err(|e| Error::new(first.span.start, e.to_string()))?;
                    self.advance();
                    matcher
                }
            };
            matchers.push(matcher);
            match self.next.kind {
                K::Comma => {
                    self.advance();
                }
                K::RightBrace => {}
                _ => return self.unexpected_in(AFTER_MATCHER),
            }
        }
        self.advance();
        Ok(matchers)
    }

    /// A range or a subquery over what stands before the bracket.
    fn range(&mut self, expr: Expr) -> Result<Expr> {
        use token::Kind as K;
        let bracket = self.advance().span;
        self.within.push(RANGE);
        let range = self.positive_length(AFTER_RANGE)?;
        if self.next.kind == K::Colon {
            self.within_is(STEP);
            self.advance();
            let step = if self.next.kind == K::RightBracket { None } else { Some(self.positive_length(AFTER_STEP)?) };
            let span = expr.span.to(self.expect(K::RightBracket)?.span);
            self.within.pop();
            let subquery = Subquery { expr: Box::new(expr), range, step, time: Time::default() };
            return node(Kind::Subquery(subquery), span, ValueType::Matrix);
        }
        if self.next.kind != K::RightBracket {
            return self.unexpected();
        }
        let span = expr.span.to(self.next.span);
        let wrong = match &expr.kind {
            Kind::Selector(s) if s.time.offset != Length::Fixed(0) => "no offset modifiers allowed before range",
            Kind::Selector(s) if s.time.at.is_some() => "no @ modifiers allowed before range",
            Kind::Selector(_) => "",
            _ => "ranges only allowed for vector selectors",
        };
        if !wrong.is_empty() {
            return Err(Error::new(bracket.start, wrong));
        }
        self.advance();
        self.within.pop();
        match expr.kind {
            Kind::Selector(selector) => node(Kind::Matrix(Matrix { selector, range }), span, ValueType::Matrix),
            _ => Err(Error::new(bracket.start, "ranges only allowed for vector selectors")),
        }
    }

    fn within_is(&mut self, what: (&'static str, &'static str)) {
        if let Some(last) = self.within.last_mut() {
            *last = what;
        }
    }

    fn positive_length(&mut self, after: (&'static str, &'static str)) -> Result<Length> {
        let expr = self.duration()?;
        self.look()?;
        if let DurationKind::Number(number) = expr.kind
            && number.value <= 0.0
        {
            return Err(Error::new(expr.span.start, "duration must be greater than 0"));
        }
        self.within_is(after);
        Ok(length(expr))
    }

    fn duration(&mut self) -> Result<DurationExpr> {
        self.duration_operators = 0;
        self.duration_binary(0)
    }

    fn duration_binary(&mut self, min: u8) -> Result<DurationExpr> {
        let first = self.duration_unary()?;
        self.duration_rest(first, min)
    }

    /// The operators that follow a first operand and bind at least so strongly.
    fn duration_rest(&mut self, mut left: DurationExpr, min: u8) -> Result<DurationExpr> {
        loop {
            let token::Kind::Operator(operator) = self.next.kind else { return Ok(left) };
            let op = match operator {
                Operator::Add => DurationOp::Add,
                Operator::Sub => DurationOp::Sub,
                Operator::Mul => DurationOp::Mul,
                Operator::Div => DurationOp::Div,
                Operator::Mod => DurationOp::Mod,
                Operator::Pow => DurationOp::Pow,
                _ => return Ok(left),
            };
            let precedence = operator.precedence();
            if precedence < min {
                return Ok(left);
            }
            let op_span = self.advance().span;
            self.count_operator(op_span)?;
            let right = if op == DurationOp::Pow {
                self.nested(|p| p.duration_binary(precedence))?
            } else {
                self.duration_binary(precedence + 1)?
            };
            self.look()?;
            if let DurationKind::Number(Number { value: 0.0, .. }) = right.kind {
                match op {
                    DurationOp::Div => return Err(Error::new(op_span.start, "division by zero")),
                    DurationOp::Mod => return Err(Error::new(op_span.start, "modulo by zero")),
                    _ => {}
                }
            }
            let span = left.span.to(right.span);
            let kind = DurationKind::Binary(op, Box::new(left), Box::new(right));
            left = DurationExpr { kind, wrapped: false, span };
        }
    }

    /// A chain of operators is as deep as it is long.
    fn count_operator(&mut self, at: Span) -> Result<()> {
        self.duration_operators += 1;
        if self.duration_operators > DEPTH_MAX { Err(too_deep(at.start)) } else { Ok(()) }
    }

    fn duration_unary(&mut self) -> Result<DurationExpr> {
        let Some((negative, sign)) = self.sign()? else { return self.duration_operand() };
        self.count_operator(sign)?;
        let expr = self.nested(|p| p.duration_binary(SIGN))?;
        Ok(signed(expr, negative, sign))
    }

    fn duration_operand(&mut self) -> Result<DurationExpr> {
        use token::Kind as K;
        let first = self.next;
        match first.kind {
            K::Number | K::Duration => self.duration_number(),
            K::Step | K::Range => {
                self.advance();
                self.expect(K::LeftParen)?;
                let span = first.span.to(self.expect(K::RightParen)?.span);
                let kind = if first.kind == K::Step { DurationKind::Step } else { DurationKind::Range };
                Ok(DurationExpr { kind, wrapped: false, span })
            }
            K::MaxOf | K::MinOf => {
                self.advance();
                self.count_operator(first.span)?;
                self.expect(K::LeftParen)?;
                let left = self.nested(|p| p.duration_binary(0))?;
                self.expect(K::Comma)?;
                let right = self.nested(|p| p.duration_binary(0))?;
                self.expect(K::RightParen)?;
                let op = if first.kind == K::MaxOf { DurationOp::MaxOf } else { DurationOp::MinOf };
                let span = left.span.to(right.span);
                let kind = DurationKind::Binary(op, Box::new(left), Box::new(right));
                Ok(DurationExpr { kind, wrapped: false, span })
            }
            K::LeftParen => {
                self.advance();
                let inner = self.nested(|p| p.duration_binary(0))?;
                self.expect(K::RightParen)?;
                Ok(wrapped(inner, first.span.start))
            }
            _ => self.unexpected(),
        }
    }

    fn duration_number(&mut self) -> Result<DurationExpr> {
        let (number, span) = self.number()?;
        check_seconds(number.value, span)?;
        Ok(DurationExpr { kind: DurationKind::Number(number), wrapped: false, span })
    }

    /// What follows `offset`. Operators go on with the expression around it unless it is in parentheses:
    /// `foo offset -2^2` is `(foo offset -2)^2`.
    fn offset(&mut self) -> Result<Length> {
        use token::Kind as K;
        self.duration_operators = 0;
        let Some((negative, sign)) = self.sign()? else {
            let parens = self.next.kind == K::LeftParen;
            let first = self.duration_operand()?;
            return Ok(length(if parens { self.duration_rest(first, 0)? } else { first }));
        };
        match self.next.kind {
            K::Number | K::Duration => {
                let (number, span) = self.number()?;
                let value = if negative { -number.value } else { number.value };
                check_seconds(value, sign)?;
                let kind = DurationKind::Number(Number { value, ..number });
                Ok(length(DurationExpr { kind, wrapped: false, span: sign.to(span) }))
            }
            K::Operator(Operator::Add | Operator::Sub) => {
                let inner = self.nested(|p| p.duration_binary(SIGN))?;
                let first = signed(inner, negative, sign);
                Ok(length(self.duration_rest(first, 0)?))
            }
            _ => {
                let expr = self.duration_operand()?;
                if expr.wrapped || negative {
                    return Ok(length(signed(expr, negative, sign)));
                }
                // A plus before `step()` and its kin is a node of its own.
                let span = sign.to(expr.span);
                Ok(length(DurationExpr { kind: DurationKind::Plus(Box::new(expr)), wrapped: false, span }))
            }
        }
    }

    /// What follows `@`, for the expression that begins at `start`.
    fn at(&mut self, start: usize) -> Result<At> {
        use token::Kind as K;
        let boundary = match self.next.kind {
            K::EvalStart => At::Start,
            K::EvalEnd => At::End,
            _ => {
                let sign = self.sign()?;
                let (number, _) = self.number()?;
                let seconds = if sign.is_some_and(|(negative, _)| negative) { -number.value } else { number.value };
                if !(seconds > i64::MIN as f64 && seconds < i64::MAX as f64) {
                    let message = format!("timestamp out of bounds for @ modifier: {}", go::fixed_float(seconds));
                    return Err(Error::new(start, message));
                }
                return Ok(At::Time((seconds * 1000.0).round() as i64));
            }
        };
        self.advance();
        self.expect(K::LeftParen)?;
        self.expect(K::RightParen)?;
        Ok(boundary)
    }
}

/// The matcher for a metric's name.
fn named(name: &str) -> Matcher {
    Matcher::equal(METRIC_NAME, name)
}

fn too_deep(at: usize) -> Error {
    Error::new(at, format!("expression is nested too deeply: at most {DEPTH_MAX} levels"))
}

/// A node over its parts, unless it is too deep.
fn node(kind: Kind, span: Span, value_type: ValueType) -> Result<Expr> {
    let mut expr = Expr { kind, span, value_type, depth: 0 };
    expr.depth = 1 + expr.children().map(|child| child.depth).max().unwrap_or(0);
    if expr.depth > DEPTH_MAX { Err(too_deep(span.start)) } else { Ok(expr) }
}

fn check_seconds(value: f64, span: Span) -> Result<()> {
    if value.abs() > SECONDS_MAX { Err(Error::new(span.start, "duration out of range")) } else { Ok(()) }
}

/// In parentheses.
fn wrapped(inner: DurationExpr, start: usize) -> DurationExpr {
    if matches!(inner.kind, DurationKind::Number(_)) {
        let span = Span { start, end: inner.span.end };
        return DurationExpr { kind: DurationKind::Plus(Box::new(inner)), wrapped: true, span };
    }
    DurationExpr { wrapped: true, ..inner }
}

/// With a sign before it.
fn signed(mut expr: DurationExpr, negative: bool, sign: Span) -> DurationExpr {
    let span = sign.to(expr.span);
    if let DurationKind::Number(number) = &mut expr.kind {
        if negative {
            number.value = -number.value;
        }
        expr.span = span;
        return expr;
    }
    if negative { DurationExpr { kind: DurationKind::Minus(Box::new(expr)), wrapped: false, span } } else { expr }
}

/// A duration that is known is kept as such.
fn length(expr: DurationExpr) -> Length {
    match expr.kind {
        // Nanoseconds are rounded, milliseconds cut off, as the times of Prometheus are.
        DurationKind::Number(n) => Length::Fixed((n.value * 1e9).round() as i64 / 1_000_000),
        _ => Length::Computed(Box::new(expr)),
    }
}

/// The time of what can be looked at at another time.
fn time_of(expr: &mut Expr) -> Option<&mut Time> {
    match &mut expr.kind {
        Kind::Selector(s) => Some(&mut s.time),
        Kind::Matrix(m) => Some(&mut m.selector.time),
        Kind::Subquery(s) => Some(&mut s.time),
        _ => None,
    }
}

fn set_offset(expr: &mut Expr, offset: Length) -> Result<()> {
    let start = expr.span.start;
    let Some(time) = time_of(expr) else {
        return Err(Error::new(
            start,
            "offset modifier must be preceded by an instant vector selector or range vector selector or a subquery",
        ));
    };
    if time.offset != Length::Fixed(0) {
        return Err(Error::new(start, "offset may not be set multiple times"));
    }
    time.offset = offset;
    Ok(())
}

fn set_at(expr: &mut Expr, at: At) -> Result<()> {
    let start = expr.span.start;
    let Some(time) = time_of(expr) else {
        return Err(Error::new(
            start,
            "@ modifier must be preceded by an instant vector selector or range vector selector or a subquery",
        ));
    };
    if time.at.is_some() {
        return Err(Error::new(start, "@ <timestamp> may not be set multiple times"));
    }
    time.at = Some(at);
    Ok(())
}

fn set_edges(expr: &mut Expr, edges: Edges, features: &Features) -> Result<()> {
    let name = match edges {
        Edges::Anchored => "anchored",
        Edges::Smoothed => "smoothed",
    };
    let start = expr.span.start;
    let failed = |message: &str| Err(Error::new(start, message));
    if !features.extended_range_selectors {
        return failed(&format!("{name} modifier is experimental and not enabled"));
    }
    let selector = match &mut expr.kind {
        Kind::Selector(s) => s,
        Kind::Matrix(m) => &mut m.selector,
        Kind::Subquery(_) => return failed(&format!("{name} modifier is not supported for subqueries")),
        _ => return failed(&format!("{name} modifier not implemented")),
    };
    if selector.edges.is_some_and(|other| other != edges) {
        return failed("anchored and smoothed modifiers cannot be used together");
    }
    selector.edges = Some(edges);
    Ok(())
}
