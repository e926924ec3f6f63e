//! Syntax trees as JSON, in the form of the Prometheus API.

use catalog::Matcher;
use serde_json::{Value, json};

use super::ast::{At, DurationExpr, DurationKind, Expr, Kind, Length, Number, Selector, Time};
use super::go;
use crate::exec::deep;

/// The tree as JSON.
pub fn tree(expr: &Expr) -> Value {
    deep(|| match &expr.kind {
        Kind::Number(n) => json!({"type": "numberLiteral", "val": go::plain_float(n.value)}),
        Kind::Text(text) => json!({"type": "stringLiteral", "val": text}),
        Kind::Bytes(bytes) => json!({"type": "stringLiteral", "val": String::from_utf8_lossy(bytes)}),
        Kind::Selector(s) => selector("vectorSelector", s),
        Kind::Matrix(m) => {
            let mut value = selector("matrixSelector", &m.selector);
            value["range"] = millis(&m.range);
            value["rangeExpr"] = computed(&m.range);
            value
        }
        Kind::Subquery(s) => {
            let value = json!({
                "type": "subquery",
                "expr": null,
                "range": millis(&s.range),
                "rangeExpr": null,
                "offset": millis(&s.time.offset),
                "offsetExpr": null,
                "step": s.step.as_ref().map_or(json!(0), millis),
                "stepExpr": null,
                "timestamp": timestamp(&s.time),
                "startOrEnd": boundary(&s.time),
            });
            let step = s.step.as_ref().map_or(Value::Null, computed);
            let (range, offset) = (computed(&s.range), computed(&s.time.offset));
            with(value, [("expr", tree(&s.expr)), ("rangeExpr", range), ("offsetExpr", offset), ("stepExpr", step)])
        }
        Kind::Call(c) => {
            let value = json!({
                "type": "call",
                "func": {
                    "name": c.function.name,
                    "argTypes": c.function.args.iter().map(|t| t.name()).collect::<Vec<_>>(),
                    "variadic": c.function.variadic,
                    "returnType": c.function.returns.name(),
                },
                "args": null,
            });
            with(value, [("args", Value::Array(c.args.iter().map(tree).collect()))])
        }
        Kind::Aggregate(a) => {
            let value = json!({
                "type": "aggregation",
                "op": a.op.name(),
                "expr": null,
                "param": null,
                "grouping": a.labels,
                "without": a.without,
            });
            let param = a.param.as_deref().map_or(Value::Null, tree);
            with(value, [("expr", tree(&a.expr)), ("param", param)])
        }
        Kind::Unary(u) => {
            let value = json!({"type": "unaryExpr", "op": if u.negative { "-" } else { "+" }, "expr": null});
            with(value, [("expr", tree(&u.expr))])
        }
        Kind::Binary(b) => {
            let value = json!({
                "type": "binaryExpr",
                "op": b.op.symbol(),
                "lhs": null,
                "rhs": null,
                "matching": b.matching.as_ref().map(|m| json!({
                    "card": m.cardinality.name(),
                    "labels": m.labels,
                    "on": m.on,
                    "include": m.include,
                    "fillValues": {"lhs": m.fill_left, "rhs": m.fill_right},
                })),
                "bool": b.returns_bool,
            });
            with(value, [("lhs", tree(&b.left)), ("rhs", tree(&b.right))])
        }
        Kind::Paren(inner) => with(json!({"type": "parenExpr", "expr": null}), [("expr", tree(inner))]),
    })
}

/// An object whose members of these names are these trees. Written into the text of an object, a tree would be copied at
/// every level above it, by a recursion that knows no bound.
fn with<const N: usize>(mut object: Value, members: [(&str, Value); N]) -> Value {
    for (name, value) in members {
        object[name] = value;
    }
    object
}

fn selector(kind: &str, s: &Selector) -> Value {
    use super::ast::Edges;
    let value = json!({
        "type": kind,
        "name": s.name.as_deref().unwrap_or(""),
        "offset": millis(&s.time.offset),
        "offsetExpr": null,
        "matchers": s.matchers.iter().map(matcher).collect::<Vec<_>>(),
        "timestamp": timestamp(&s.time),
        "startOrEnd": boundary(&s.time),
        "anchored": s.edges == Some(Edges::Anchored),
        "smoothed": s.edges == Some(Edges::Smoothed),
    });
    with(value, [("offsetExpr", computed(&s.time.offset))])
}

fn matcher(m: &Matcher) -> Value {
    json!({"name": m.name(), "value": m.value(), "type": m.op().symbol()})
}

fn millis(length: &Length) -> Value {
    match length {
        Length::Fixed(ms) => json!(ms),
        Length::Computed(_) => json!(0),
    }
}

fn computed(length: &Length) -> Value {
    match length {
        Length::Fixed(_) => Value::Null,
        Length::Computed(expr) => duration(expr),
    }
}

fn duration(expr: &DurationExpr) -> Value {
    deep(|| {
        let node = |op: &str, left: Value, right: Value| {
            let value = json!({"type": "durationExpr", "op": op, "lhs": null, "rhs": null, "wrapped": expr.wrapped});
            with(value, [("lhs", left), ("rhs", right)])
        };
        match &expr.kind {
            DurationKind::Number(Number { value, duration }) => {
                json!({"type": "numberLiteral", "val": go::plain_float(*value), "duration": duration})
            }
            DurationKind::Step => node("step", Value::Null, Value::Null),
            DurationKind::Range => node("range", Value::Null, Value::Null),
            DurationKind::Plus(inner) => node("+", Value::Null, duration(inner)),
            DurationKind::Minus(inner) => node("-", Value::Null, duration(inner)),
            DurationKind::Binary(op, left, right) => node(op.symbol(), duration(left), duration(right)),
        }
    })
}

fn timestamp(time: &Time) -> Option<i64> {
    match time.at {
        Some(At::Time(ms)) => Some(ms),
        _ => None,
    }
}

fn boundary(time: &Time) -> Option<&'static str> {
    match time.at {
        Some(At::Start) => Some("start"),
        Some(At::End) => Some("end"),
        _ => None,
    }
}
