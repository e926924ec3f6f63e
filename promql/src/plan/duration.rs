//! What expressions of durations come to.

use crate::parse::ast::{DurationExpr, DurationKind, DurationOp};
use crate::{QueryError, Result};

/// What a query's own times give durations.
pub(super) struct Spans {
    /// Its step; 0 in an instant query.
    pub(super) step_ms: i64,
    /// From its first to its last evaluation time.
    pub(super) range_ms: i64,
}

/// Seconds that nanoseconds in 64 bits can hold.
const SECONDS_MAX: f64 = 9_223_372_036.854_776;

/// The duration in milliseconds; only an offset may be negative or none.
pub(super) fn evaluate(expr: &DurationExpr, spans: &Spans, signed: bool) -> Result<i64> {
    let v = seconds(expr, spans)?;
    if !v.is_finite() {
        return failed(expr, "duration is NaN or infinite");
    }
    if v <= 0.0 && !signed {
        return failed(expr, "duration must be greater than 0");
    }
    if v.abs() > SECONDS_MAX {
        return failed(expr, "duration is out of range");
    }
    Ok((v * 1000.0) as i64)
}

/// An error that names the bytes of the text that it is about.
fn failed<T>(expr: &DurationExpr, what: &str) -> Result<T> {
    Err(QueryError::execution(format!("{}:{}: {what}", expr.span.start, expr.span.end)))
}

fn seconds(expr: &DurationExpr, spans: &Spans) -> Result<f64> {
    Ok(match &expr.kind {
        DurationKind::Number(n) => n.value,
        DurationKind::Step => spans.step_ms as f64 / 1000.0,
        DurationKind::Range => spans.range_ms as f64 / 1000.0,
        DurationKind::Plus(inner) => seconds(inner, spans)?,
        DurationKind::Minus(inner) => -seconds(inner, spans)?,
        DurationKind::Binary(op, left, right) => {
            let (l, r) = (seconds(left, spans)?, seconds(right, spans)?);
            match op {
                DurationOp::Add => l + r,
                DurationOp::Sub => l - r,
                DurationOp::Mul => l * r,
                DurationOp::Div if r == 0.0 => return failed(expr, "division by zero"),
                DurationOp::Div => l / r,
                DurationOp::Mod if r == 0.0 => return failed(expr, "modulo by zero"),
                DurationOp::Mod => l % r,
                DurationOp::Pow => l.powf(r),
                DurationOp::MinOf => l.min(r),
                DurationOp::MaxOf => l.max(r),
            }
        }
    })
}
