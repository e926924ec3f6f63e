//! Types: whether operands and arguments are of the types that operators and functions take.
//!
//! Nodes are checked in the order in which Prometheus checks them, as the first error is the one that is told.

use catalog::tag::METRIC_NAME;

use super::ast::{AggregateOp, Binary, Call, Cardinality, Expr, Kind, Selector};
use super::{Error, go};
use crate::exec::deep;
use crate::result::ValueType;

type Result<T = ()> = std::result::Result<T, Error>;

impl ValueType {
    /// Its short name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::String => "string",
            Self::Vector => "vector",
            Self::Matrix => "matrix",
        }
    }

    /// Its name in the manual.
    pub(crate) fn documented(self) -> &'static str {
        match self {
            Self::Vector => "instant vector",
            Self::Matrix => "range vector",
            other => other.name(),
        }
    }
}

/// Checks a tree and says which matchings there are.
pub(super) fn expression(expr: &mut Expr) -> Result {
    deep(|| check(expr))
}

fn check(expr: &mut Expr) -> Result {
    let start = expr.span.start;
    match &mut expr.kind {
        Kind::Number(_) | Kind::Text(_) | Kind::Bytes(_) => Ok(()),
        Kind::Selector(s) => selector(s, start, false),
        Kind::Matrix(m) => selector(&m.selector, start, false),
        Kind::Paren(inner) => expression(inner),
        Kind::Subquery(s) => {
            expression(&mut s.expr)?;
            match s.expr.value_type {
                ValueType::Vector => Ok(()),
                other => {
                    let got = other.name();
                    failed(start, format!("subquery is only allowed on instant vector, got {got} instead"))
                }
            }
        }
        Kind::Unary(u) => {
            expression(&mut u.expr)?;
            match u.expr.value_type {
                ValueType::Scalar | ValueType::Vector => Ok(()),
                other => failed(
                    start,
                    format!(
                        "unary expression only allowed on expressions of type scalar or instant vector, got \"{}\"",
                        other.documented()
                    ),
                ),
            }
        }
        Kind::Aggregate(a) => {
            expect(&mut a.expr, ValueType::Vector, "aggregation expression")?;
            let wanted = if a.op == AggregateOp::CountValues { ValueType::String } else { ValueType::Scalar };
            match &mut a.param {
                Some(param) => expect(param, wanted, "aggregation parameter"),
                None => Ok(()),
            }
        }
        Kind::Binary(b) => binary(b, start),
        Kind::Call(c) => call(c, start),
    }
}

fn failed(at: usize, message: impl Into<String>) -> Result {
    Err(Error::new(at, message))
}

fn expect(expr: &mut Expr, wanted: ValueType, context: &str) -> Result {
    expression(expr)?;
    if expr.value_type == wanted {
        return Ok(());
    }
    let (wanted, got) = (wanted.documented(), expr.value_type.documented());
    failed(expr.span.start, format!("expected type {wanted} in {context}, got {got}"))
}

fn selector(s: &Selector, start: usize, any: bool) -> Result {
    if let Some(name) = &s.name {
        let before = s.matchers.len().saturating_sub(1);
        return match s.matchers[..before].iter().find(|m| m.name() == METRIC_NAME) {
            Some(second) => {
                let (name, second) = (go::quote(name), go::quote(second.value()));
                failed(start, format!("metric name must not be set twice: {name} or {second}"))
            }
            None => Ok(()),
        };
    }
    // So that a typo does not choose everything.
    if any || s.matchers.iter().any(|m| !m.matches("")) {
        return Ok(());
    }
    failed(start, "vector selector must contain at least one non-empty matcher")
}

fn binary(b: &mut Binary, start: usize) -> Result {
    expression(&mut b.left)?;
    expression(&mut b.right)?;
    let (left, right) = (b.left.value_type, b.right.value_type);
    let at_op = b.op_span.start;
    if b.returns_bool && !b.op.is_comparison() {
        return failed(at_op, "bool modifier can only be used on comparison operators");
    }
    if b.op.is_comparison() && !b.returns_bool && left == ValueType::Scalar && right == ValueType::Scalar {
        return failed(at_op, "comparisons between scalars must use BOOL modifier");
    }
    let Some(matching) = &mut b.matching else { return Ok(()) };
    if b.op.is_set() && matching.cardinality == Cardinality::OneToOne {
        matching.cardinality = Cardinality::ManyToMany;
    }
    if let Some(both) = matching.labels.iter().find(|l| matching.on && matching.include.contains(l)) {
        let label = go::quote(both);
        return failed(at_op, format!("label {label} must not occur in ON and GROUP clause at once"));
    }
    for side in [&b.left, &b.right] {
        if !matches!(side.value_type, ValueType::Scalar | ValueType::Vector) {
            let message = "binary expression must contain only scalar and instant vector types";
            return failed(side.span.start, message);
        }
    }
    let fills = matching.fill_left.is_some() || matching.fill_right.is_some();
    let operator = b.op.symbol();
    if left != ValueType::Vector || right != ValueType::Vector {
        if !matching.labels.is_empty() {
            return failed(start, "vector matching only allowed between instant vectors");
        }
        if fills {
            return failed(start, "filling in missing series only allowed between instant vectors");
        }
        b.matching = None;
        if b.op.is_set() {
            let message = format!("set operator \"{operator}\" not allowed in binary scalar expression");
            return failed(start, message);
        }
    } else if b.op.is_set() {
        if matching.cardinality != Cardinality::ManyToMany {
            return failed(start, format!("no grouping allowed for \"{operator}\" operation"));
        }
        if fills {
            return failed(start, "filling in missing series not allowed for set operators");
        }
    }
    Ok(())
}

fn call(c: &mut Call, start: usize) -> Result {
    let function = c.function;
    let (wanted, got) = (function.args.len(), c.args.len());
    let amount = match function.variadic {
        0 if wanted != got => format!("{wanted}"),
        0 => String::new(),
        _ if got + 1 < wanted => format!("at least {}", wanted - 1),
        more @ 1.. if got > wanted - 1 + more as usize => format!("at most {}", wanted - 1 + more as usize),
        _ => String::new(),
    };
    if !amount.is_empty() {
        let name = function.name;
        return failed(start, format!("expected {amount} argument(s) in call to \"{name}\", got {got}"));
    }
    let context = format!("call to function \"{}\"", function.name);
    if function.name == "info"
        && let Some(labels) = c.args.get(1)
    {
        if labels.value_type != ValueType::Vector {
            let got = labels.value_type.documented();
            return failed(start, format!("expected type instant vector in {context}, got {got}"));
        }
        match &labels.kind {
            Kind::Selector(s) if s.name.is_some() => {
                let message = "expected label selectors only, got vector selector instead";
                return failed(labels.span.start, message);
            }
            Kind::Selector(_) => {}
            _ => return failed(labels.span.start, "expected label selectors only"),
        }
    }
    for (i, arg) in c.args.iter_mut().enumerate() {
        let wanted = function.args[i.min(function.args.len() - 1)];
        match &arg.kind {
            Kind::Selector(s) if function.name == "info" && i == 1 => selector(s, arg.span.start, true)?,
            _ => expect(arg, wanted, &context)?,
        }
    }
    Ok(())
}
