//! Syntax trees to texts: on one line by `Display`, and laid out by [`pretty`].

use std::fmt::{self, Write as _};

use catalog::Matcher;

use super::ast::{
    Aggregate, At, Binary, Cardinality, DurationExpr, DurationKind, DurationOp, Edges, Expr, Kind, Length, Matching,
    Number, Selector, Subquery, Time,
};
use super::go;
use crate::exec::deep;

/// Longest expression that stays on one line.
const WIDTH_MAX: usize = 100;

/// The expression laid out: what is longer than a line is broken at operators, parentheses and arguments.
pub fn pretty(expr: &Expr) -> String {
    within(expr, WIDTH_MAX)
}

/// As [`pretty`], for lines of another length.
pub(super) fn within(expr: &Expr, width: usize) -> String {
    let mut out = String::new();
    layout(&mut out, expr, 0, width);
    out
}

fn layout(out: &mut String, expr: &Expr, level: usize, width: usize) {
    deep(|| {
        // A sign is not broken off, and a subquery is only the brackets behind what it evaluates.
        match &expr.kind {
            Kind::Unary(u) => {
                indent(out, level);
                out.push(if u.negative { '-' } else { '+' });
                let at = out.len();
                layout(out, &u.expr, level, width);
                let blank = out[at..].len() - out[at..].trim_start().len();
                out.replace_range(at..at + blank, "");
                return;
            }
            Kind::Subquery(s) => {
                if is_long(expr, width) {
                    layout(out, &s.expr, level, width);
                    write_subquery(out, s);
                } else {
                    let _ = write!(out, "{expr}");
                }
                return;
            }
            _ => {}
        }
        if !is_long(expr, width) {
            indent(out, level);
            let _ = write!(out, "{expr}");
            return;
        }
        match &expr.kind {
            Kind::Aggregate(a) => {
                indent(out, level);
                write_grouping(out, a);
                out.push_str("(\n");
                if let Some(param) = &a.param {
                    layout(out, param, level + 1, width);
                    out.push_str(",\n");
                }
                layout(out, &a.expr, level + 1, width);
                close(out, level);
            }
            Kind::Binary(b) => {
                layout(out, &b.left, level + 1, width);
                out.push('\n');
                indent(out, level);
                write_operator(out, b);
                out.push('\n');
                layout(out, &b.right, level + 1, width);
            }
            Kind::Call(c) => {
                indent(out, level);
                out.push_str(c.function.name);
                out.push_str("(\n");
                for (i, arg) in c.args.iter().enumerate() {
                    if i > 0 {
                        out.push_str(",\n");
                    }
                    layout(out, arg, level + 1, width);
                }
                close(out, level);
            }
            Kind::Paren(inner) => {
                indent(out, level);
                out.push_str("(\n");
                layout(out, inner, level + 1, width);
                close(out, level);
            }
            _ => {
                indent(out, level);
                let _ = write!(out, "{expr}");
            }
        }
    });
}

fn indent(out: &mut String, level: usize) {
    (0..level).for_each(|_| out.push_str("  "));
}

fn close(out: &mut String, level: usize) {
    out.push('\n');
    indent(out, level);
    out.push(')');
}

/// Whether it is longer than a line; written no further than that.
fn is_long(expr: &Expr, width: usize) -> bool {
    struct Room(usize);
    impl fmt::Write for Room {
        fn write_str(&mut self, s: &str) -> fmt::Result {
            self.0 = self.0.checked_sub(s.len()).ok_or(fmt::Error)?;
            Ok(())
        }
    }
    write_expr(&mut Room(width), expr).is_err()
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_expr(f, self)
    }
}

fn write_expr(out: &mut dyn fmt::Write, expr: &Expr) -> fmt::Result {
    deep(|| match &expr.kind {
        Kind::Number(n) => out.write_str(&number(n)),
        Kind::Text(text) => out.write_str(&go::quote(text)),
        Kind::Bytes(bytes) => out.write_str(&go::quote_bytes(bytes)),
        Kind::Selector(s) => {
            write_series(out, s)?;
            out.write_str(&at(&s.time))?;
            out.write_str(edges(s))?;
            out.write_str(&offset(&s.time))
        }
        Kind::Matrix(m) => {
            write_series(out, &m.selector)?;
            write!(out, "[{}]{}", length(&m.range), edges(&m.selector))?;
            out.write_str(&at(&m.selector.time))?;
            out.write_str(&offset(&m.selector.time))
        }
        Kind::Subquery(s) => {
            write_expr(out, &s.expr)?;
            let mut suffix = String::new();
            write_subquery(&mut suffix, s);
            out.write_str(&suffix)
        }
        Kind::Call(c) => {
            out.write_str(c.function.name)?;
            out.write_char('(')?;
            for (i, arg) in c.args.iter().enumerate() {
                if i > 0 {
                    out.write_str(", ")?;
                }
                write_expr(out, arg)?;
            }
            out.write_char(')')
        }
        Kind::Aggregate(a) => {
            let mut head = String::new();
            write_grouping(&mut head, a);
            out.write_str(&head)?;
            out.write_char('(')?;
            if let Some(param) = &a.param {
                write_expr(out, param)?;
                out.write_str(", ")?;
            }
            write_expr(out, &a.expr)?;
            out.write_char(')')
        }
        Kind::Unary(u) => {
            out.write_char(if u.negative { '-' } else { '+' })?;
            write_expr(out, &u.expr)
        }
        Kind::Binary(b) => {
            write_expr(out, &b.left)?;
            let mut operator = String::from(" ");
            write_operator(&mut operator, b);
            operator.push(' ');
            out.write_str(&operator)?;
            write_expr(out, &b.right)
        }
        Kind::Paren(inner) => {
            out.write_char('(')?;
            write_expr(out, inner)?;
            out.write_char(')')
        }
    })
}

fn number(n: &Number) -> String {
    if n.duration { duration((n.value * 1000.0) as i64) } else { go::plain_float(n.value) }
}

/// A duration with its sign.
fn duration(ms: i64) -> String {
    let mut out = String::from(if ms < 0 { "-" } else { "" });
    go::duration_into(&mut out, ms.saturating_abs());
    out
}

fn length(length: &Length) -> String {
    match length {
        Length::Fixed(ms) => duration(*ms),
        Length::Computed(expr) => {
            let mut out = String::new();
            write_duration(&mut out, expr);
            out
        }
    }
}

fn write_duration(out: &mut String, expr: &DurationExpr) {
    deep(|| {
        if expr.wrapped {
            out.push('(');
        }
        match &expr.kind {
            DurationKind::Number(n) => out.push_str(&number(n)),
            DurationKind::Step => out.push_str("step()"),
            DurationKind::Range => out.push_str("range()"),
            DurationKind::Plus(inner) => write_duration(out, inner),
            DurationKind::Minus(inner) => {
                out.push('-');
                write_duration(out, inner);
            }
            DurationKind::Binary(op @ (DurationOp::MinOf | DurationOp::MaxOf), left, right) => {
                out.push_str(op.symbol());
                out.push('(');
                write_duration(out, left);
                out.push_str(", ");
                write_duration(out, right);
                out.push(')');
            }
            DurationKind::Binary(op, left, right) => {
                write_duration(out, left);
                let _ = write!(out, " {} ", op.symbol());
                write_duration(out, right);
            }
        }
        if expr.wrapped {
            out.push(')');
        }
    });
}

fn at(time: &Time) -> String {
    match time.at {
        None => String::new(),
        Some(At::Time(ms)) => format!(" @ {:.3}", ms as f64 / 1000.0),
        Some(At::Start) => " @ start()".into(),
        Some(At::End) => " @ end()".into(),
    }
}

fn offset(time: &Time) -> String {
    if time.offset == Length::Fixed(0) { String::new() } else { format!(" offset {}", length(&time.offset)) }
}

fn edges(s: &Selector) -> &'static str {
    match s.edges {
        None => "",
        Some(Edges::Anchored) => " anchored",
        Some(Edges::Smoothed) => " smoothed",
    }
}

/// The name and the matchers, these sorted.
fn write_series(out: &mut dyn fmt::Write, s: &Selector) -> fmt::Result {
    out.write_str(s.name.as_deref().unwrap_or(""))?;
    // The matcher for the name is the last.
    let others = s.matchers.len() - usize::from(s.name.is_some());
    let mut matchers: Vec<String> = s.matchers[..others].iter().map(matcher).collect();
    if matchers.is_empty() {
        // Braces alone choose every series where that is allowed.
        return if s.name.is_none() { out.write_str("{}") } else { Ok(()) };
    }
    matchers.sort();
    write!(out, "{{{}}}", matchers.join(","))
}

fn matcher(m: &Matcher) -> String {
    let mut out = String::new();
    write_label(&mut out, m.name());
    out.push_str(m.op().symbol());
    go::quote_into(&mut out, m.value());
    out
}

/// A label's name, in quotes unless it can do without.
fn write_label(out: &mut String, name: &str) {
    let plain = |(i, c): (usize, char)| c == '_' || c.is_ascii_alphabetic() || (i > 0 && c.is_ascii_digit());
    if !name.is_empty() && name.char_indices().all(plain) {
        out.push_str(name);
    } else {
        go::quote_into(out, name);
    }
}

fn write_labels(out: &mut String, labels: &[String]) {
    out.push('(');
    for (i, label) in labels.iter().enumerate() {
        if i > 0 {
            out.push_str(", ");
        }
        write_label(out, label);
    }
    out.push(')');
}

fn write_grouping(out: &mut String, a: &Aggregate) {
    out.push_str(a.op.name());
    if a.without || !a.labels.is_empty() {
        out.push_str(if a.without { " without " } else { " by " });
        write_labels(out, &a.labels);
        out.push(' ');
    }
}

fn write_operator(out: &mut String, b: &Binary) {
    out.push_str(b.op.symbol());
    if b.returns_bool {
        out.push_str(" bool");
    }
    let Some(Matching { cardinality, labels, on, include, fill_left, fill_right }) = &b.matching else { return };
    let group = match cardinality {
        Cardinality::ManyToOne => Some("left"),
        Cardinality::OneToMany => Some("right"),
        Cardinality::OneToOne | Cardinality::ManyToMany => None,
    };
    if *on || !labels.is_empty() || group.is_some() {
        out.push_str(if *on { " on " } else { " ignoring " });
        write_labels(out, labels);
    }
    if let Some(side) = group {
        let _ = write!(out, " group_{side} ");
        write_labels(out, include);
    }
    if fill_left.is_some() && fill_left == fill_right {
        let _ = write!(out, " fill ({})", go::float(fill_left.unwrap_or_default()));
        return;
    }
    for (name, value) in [("fill_left", fill_left), ("fill_right", fill_right)] {
        if let Some(v) = value {
            let _ = write!(out, " {name} ({})", go::float(*v));
        }
    }
}

fn write_subquery(out: &mut String, s: &Subquery) {
    let step = s.step.as_ref().map(length).unwrap_or_default();
    let _ = write!(out, "[{}:{step}]{}{}", length(&s.range), at(&s.time), offset(&s.time));
}
