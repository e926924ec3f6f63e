//! Conjuncts that a scan answers before it reads a row: ranges of time, and predicates on tags, which are evaluated
//! once per tag set.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, BooleanArray, Int64Array};
use arrow::datatypes::{DataType, Field, Schema, TimeUnit};
use arrow::record_batch::{RecordBatch, RecordBatchOptions};
use catalog::{MatchOp, Matcher, Series};
use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::common::{DFSchema, ScalarValue};
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::execution_props::ExecutionProps;
use datafusion::logical_expr::physical_planning_context::PhysicalPlanningContext;
use datafusion::logical_expr::{Between, BinaryExpr, Expr, Operator};
use datafusion::physical_expr::create_physical_expr;

use super::dictionary::{TagColumn, map_array};
use crate::table::{TableColumn, What};

/// What a conjunct is to a scan.
#[derive(Debug, Clone, PartialEq)]
pub enum Conjunct {
    /// The row's time lies within these milliseconds, both inclusive; empty when the first is greater.
    Time(i64, i64),
    /// Depends on nothing but the row's tag set.
    Tags,
    /// Anything else.
    Row,
}

/// What `expr`, a predicate on a table with these columns, is to the table's scan.
pub fn classify(expr: &Expr, columns: &[TableColumn]) -> Conjunct {
    if let Some((first, last)) = time_range(expr, columns) {
        return Conjunct::Time(first, last);
    }
    let mut tags = !expr.is_volatile();
    let mut any = false;
    let visited = expr.apply(|e| {
        match e {
            Expr::Column(c) => {
                any = true;
                tags &= find(columns, &c.name).is_some_and(|c| !matches!(c.what, What::Stored(_)));
            }
            Expr::ScalarSubquery(_)
            | Expr::Exists(_)
            | Expr::InSubquery(_)
            | Expr::SetComparison(_)
            | Expr::OuterReferenceColumn(..)
            | Expr::Placeholder(_)
            | Expr::ScalarVariable(..) => tags = false,
            _ => {}
        }
        Ok(if tags { TreeNodeRecursion::Continue } else { TreeNodeRecursion::Stop })
    });
    if visited.is_ok() && tags && any { Conjunct::Tags } else { Conjunct::Row }
}

fn find<'c>(columns: &'c [TableColumn], name: &str) -> Option<&'c TableColumn> {
    columns.iter().find(|c| c.name == name)
}

/// Nothing.
const EMPTY: (i64, i64) = (1, 0);

fn time_range(expr: &Expr, columns: &[TableColumn]) -> Option<(i64, i64)> {
    match expr {
        Expr::BinaryExpr(BinaryExpr { left, op, right }) => {
            let (op, literal) = match (is_time(left, columns), is_time(right, columns)) {
                (true, false) => (*op, right),
                (false, true) => (op.swap()?, left),
                _ => return None,
            };
            bounds(op, literal)
        }
        Expr::Between(Between { expr, negated: false, low, high }) if is_time(expr, columns) => {
            let (low, high) = (bounds(Operator::GtEq, low)?, bounds(Operator::LtEq, high)?);
            Some((low.0, high.1))
        }
        _ => None,
    }
}

/// The time column itself, or cast to a unit that loses nothing.
fn is_time(expr: &Expr, columns: &[TableColumn]) -> bool {
    match expr {
        Expr::Column(c) => find(columns, &c.name).is_some_and(|c| matches!(c.data_type(), DataType::Timestamp(..))),
        Expr::Cast(cast) => {
            matches!(cast.field.data_type(), DataType::Timestamp(unit, _) if *unit != TimeUnit::Second)
                && is_time(&cast.expr, columns)
        }
        _ => false,
    }
}

fn bounds(op: Operator, literal: &Expr) -> Option<(i64, i64)> {
    let Expr::Literal(value, _) = literal else { return None };
    let (units, v) = match value {
        ScalarValue::TimestampSecond(Some(v), _) => (1, v.checked_mul(1000)?),
        ScalarValue::TimestampMillisecond(Some(v), _) => (1, *v),
        ScalarValue::TimestampMicrosecond(Some(v), _) => (1_000, *v),
        ScalarValue::TimestampNanosecond(Some(v), _) => (1_000_000, *v),
        _ => return None,
    };
    let floor = v.div_euclid(units);
    let ceil = floor + i64::from(v.rem_euclid(units) != 0);
    Some(match op {
        Operator::GtEq => (ceil, i64::MAX),
        Operator::Gt => floor.checked_add(1).map_or(EMPTY, |f| (f, i64::MAX)),
        Operator::LtEq => (i64::MIN, floor),
        Operator::Lt => ceil.checked_sub(1).map_or(EMPTY, |l| (i64::MIN, l)),
        Operator::Eq if floor == ceil => (floor, floor),
        Operator::Eq => EMPTY,
        _ => return None,
    })
}

/// The matcher that `expr` means, if the engine knows one: `tag = 'value'`.
pub fn matcher(expr: &Expr, columns: &[TableColumn]) -> Option<Matcher> {
    let Expr::BinaryExpr(BinaryExpr { left, op: Operator::Eq, right }) = expr else { return None };
    let (key, value) =
        tag_key(left, columns).zip(text_literal(right)).or_else(|| tag_key(right, columns).zip(text_literal(left)))?;
    // An absent tag is null in SQL and the empty text in a matcher, so the empty text has no matcher.
    if value.is_empty() { None } else { Matcher::new(key, MatchOp::Eq, value).ok() }
}

fn tag_key(expr: &Expr, columns: &[TableColumn]) -> Option<String> {
    match expr {
        Expr::Column(c) => match &find(columns, &c.name)?.what {
            What::Tag(key) => Some(key.clone()),
            _ => None,
        },
        Expr::Cast(cast) if is_text(cast.field.data_type()) => tag_key(&cast.expr, columns),
        _ => {
            let (inner, key) = map_lookup(expr)?;
            let Expr::Column(c) = inner else { return None };
            matches!(find(columns, &c.name)?.what, What::Tags).then_some(key)
        }
    }
}

fn is_text(t: &DataType) -> bool {
    matches!(t, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View)
}

/// A text literal.
pub fn text_literal(expr: &Expr) -> Option<String> {
    match expr {
        Expr::Literal(
            ScalarValue::Utf8(Some(s)) | ScalarValue::LargeUtf8(Some(s)) | ScalarValue::Utf8View(Some(s)),
            _,
        ) => Some(s.clone()),
        Expr::Cast(cast) if is_text(cast.field.data_type()) => text_literal(&cast.expr),
        _ => None,
    }
}

/// `tags['key']` as `(tags, key)`.
pub fn map_lookup(expr: &Expr) -> Option<(&Expr, String)> {
    let Expr::ScalarFunction(f) = expr else { return None };
    match (f.func.name(), f.args.as_slice()) {
        ("get_field", [map, key]) => Some((map, text_literal(key)?)),
        _ => None,
    }
}

/// Which of `series` satisfy all of `predicates`.
///
/// # Errors
/// Those of evaluating a predicate on one of the series.
pub fn evaluate(predicates: &[Expr], columns: &[TableColumn], series: &[Arc<Series>]) -> Result<BooleanArray> {
    let Some(predicate) = predicates.iter().cloned().reduce(Expr::and) else {
        return Ok(BooleanArray::from(vec![true; series.len()]));
    };
    let predicate = unqualified(predicate)?;
    let (mut fields, mut arrays) = (Vec::new(), Vec::<ArrayRef>::new());
    for column in predicate.column_refs() {
        let column = find(columns, &column.name)
            .ok_or_else(|| DataFusionError::Internal(format!("predicate on unknown column {:?}", column.name)))?;
        arrays.push(match &column.what {
            What::Tag(key) => Arc::new(TagColumn::new(series, key).text()),
            What::Tags => map_array(series.iter().map(Some))?,
            What::Series => Arc::new(series.iter().map(|s| s.id.code.0).collect::<Int64Array>()),
            What::Stored(_) => {
                return Err(DataFusionError::Internal(format!("predicate on {:?} is not one on tags", column.name)));
            }
        });
        fields.push(Field::new(&column.name, column.data_type(), true));
    }
    let schema = DFSchema::try_from(Schema::new(fields))?;
    let options = RecordBatchOptions::new().with_row_count(Some(series.len()));
    let batch = RecordBatch::try_new_with_options(schema.inner().clone(), arrays, &options)?;
    let physical =
        create_physical_expr(&predicate, &schema, &ExecutionProps::new(), &PhysicalPlanningContext::default())?;
    let result = physical.evaluate(&batch)?.into_array(series.len())?;
    result
        .as_any()
        .downcast_ref::<BooleanArray>()
        .cloned()
        .ok_or_else(|| DataFusionError::Internal(format!("predicate of type {}", result.data_type())))
}

fn unqualified(expr: Expr) -> Result<Expr> {
    use datafusion::common::tree_node::Transformed;
    expr.transform(|e| {
        Ok(match e {
            Expr::Column(c) if c.relation.is_some() => {
                Transformed::yes(Expr::Column(datafusion::common::Column::new_unqualified(c.name)))
            }
            other => Transformed::no(other),
        })
    })
    .map(|t| t.data)
}

#[cfg(test)]
mod tests {
    use catalog::TagHasher;
    use catalog::tag::tag_set;
    use datafusion::logical_expr::{cast, col, lit};
    use datafusion::prelude::get_field;

    use super::*;

    fn columns() -> Vec<TableColumn> {
        crate::table::columns_of(&catalog::tables::SAMPLES)
    }

    fn ms(v: i64) -> Expr {
        Expr::Literal(ScalarValue::TimestampMillisecond(Some(v), Some("UTC".into())), None)
    }

    fn ns(v: i64) -> Expr {
        Expr::Literal(ScalarValue::TimestampNanosecond(Some(v), Some("UTC".into())), None)
    }

    #[test]
    fn conjuncts_are_told_apart() {
        let finer = DataType::Timestamp(TimeUnit::Nanosecond, Some("UTC".into()));
        let coarser = DataType::Timestamp(TimeUnit::Second, Some("UTC".into()));
        let check = |expr: Expr, expected: Conjunct| assert_eq!(classify(&expr, &columns()), expected, "{expr}");
        check(col("ts").gt_eq(ms(5)), Conjunct::Time(5, i64::MAX));
        check(col("ts").gt(ms(5)), Conjunct::Time(6, i64::MAX));
        check(ms(5).gt(col("ts")), Conjunct::Time(i64::MIN, 4));
        check(col("ts").lt_eq(ms(5)), Conjunct::Time(i64::MIN, 5));
        check(col("ts").eq(ms(5)), Conjunct::Time(5, 5));
        check(col("ts").between(ms(5), ms(9)), Conjunct::Time(5, 9));
        check(cast(col("ts"), finer.clone()).gt_eq(ns(5_000_001)), Conjunct::Time(6, i64::MAX));
        check(cast(col("ts"), finer.clone()).gt(ns(5_000_001)), Conjunct::Time(6, i64::MAX));
        check(cast(col("ts"), finer.clone()).lt(ns(5_000_001)), Conjunct::Time(i64::MIN, 5));
        check(cast(col("ts"), finer.clone()).lt(ns(-1)), Conjunct::Time(i64::MIN, -1));
        check(cast(col("ts"), finer).eq(ns(5_000_001)), Conjunct::Time(1, 0));
        check(cast(col("ts"), coarser).eq(ms(5)), Conjunct::Row);
        check(col("ts").gt(ms(i64::MAX)), Conjunct::Time(1, 0));
        check(col("ts").not_eq(ms(5)), Conjunct::Row);
        check(col("metric").eq(lit("up")), Conjunct::Tags);
        check(get_field(col("tags"), "job").like(lit("a%")), Conjunct::Tags);
        check(col("metric").eq(lit("up")).or(col("value").gt(lit(1.0))), Conjunct::Row);
        check(col("series").eq(lit(1i64)), Conjunct::Tags);
        check(lit(true), Conjunct::Row);
    }

    #[test]
    fn equality_becomes_a_matcher() {
        let check = |expr: Expr, expected: Option<(&str, &str)>| {
            let got = matcher(&expr, &columns());
            assert_eq!(got.as_ref().map(|m| (m.name(), m.value())), expected, "{expr}");
        };
        check(col("metric").eq(lit("up")), Some(("__name__", "up")));
        check(lit("up").eq(col("metric")), Some(("__name__", "up")));
        check(get_field(col("tags"), "job").eq(lit("a")), Some(("job", "a")));
        check(col("metric").eq(lit("")), None);
        check(col("metric").not_eq(lit("up")), None);
        check(col("value").eq(lit(1.0)), None);
    }

    /// The planner gives literals the type of what they are compared with.
    fn text(s: &str) -> Expr {
        Expr::Literal(ScalarValue::Utf8View(Some(s.to_owned())), None)
    }

    #[test]
    fn predicates_are_evaluated_once_per_tag_set() {
        let hasher = TagHasher::new(1);
        let series: Vec<_> =
            [&[("__name__", "up"), ("job", "a")][..], &[("__name__", "up"), ("job", "b")], &[("__name__", "down")]]
                .iter()
                .map(|p| Arc::new(Series::new(&hasher, tag_set(p).unwrap())))
                .collect();
        let check = |predicates: &[Expr], expected: [bool; 3]| {
            let got = evaluate(predicates, &columns(), &series).unwrap();
            let got: Vec<bool> = got.iter().map(|v| v == Some(true)).collect();
            assert_eq!(got, expected, "{predicates:?}");
        };
        check(&[], [true, true, true]);
        check(&[col("metric").eq(text("up"))], [true, true, false]);
        check(&[col("metric").eq(text("up")), get_field(col("tags"), "job").gt(text("a"))], [false, true, false]);
        check(&[get_field(col("tags"), "job").is_null()], [false, false, true]);
        check(&[get_field(col("tags"), "job").not_eq(text("a"))], [false, true, false]);
    }
}
