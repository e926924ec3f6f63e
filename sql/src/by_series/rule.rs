//! The rule that puts [`SeriesAggregateExec`] in the place of an aggregation right above a scan.
//!
//! Between the two there may be projections and filters. They are made anew with the columns that are still needed, and
//! with the index of the series, which goes through all of them.

use std::any::Any;
use std::collections::BTreeSet;
use std::sync::Arc;

use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::error::Result;
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::Column;
use datafusion::physical_expr::utils::collect_columns;
use datafusion::physical_optimizer::PhysicalOptimizerRule;
use datafusion::physical_plan::aggregates::{AggregateExec, AggregateMode};
use datafusion::physical_plan::filter::{FilterExec, FilterExecBuilder};
use datafusion::physical_plan::projection::{ProjectionExec, ProjectionExpr};
use datafusion::physical_plan::repartition::RepartitionExec;
use datafusion::physical_plan::{ExecutionPlan, InputOrderMode, Partitioning};
use engine::SeriesCountExec;

use super::{Aggregate, Fed, Key, Keys, SeriesAggregateExec};
use crate::scan::{Output, TagScanExec};

/// The rule.
#[derive(Debug, Default)]
pub struct BySeries;

impl PhysicalOptimizerRule for BySeries {
    fn optimize(&self, plan: Arc<dyn ExecutionPlan>, _config: &ConfigOptions) -> Result<Arc<dyn ExecutionPlan>> {
        let rewrite = |node: Arc<dyn ExecutionPlan>| {
            let replaced = match node_of::<AggregateExec>(&node) {
                Some(aggregate) => match aggregate.mode() {
                    AggregateMode::Partial => partial(aggregate)?,
                    AggregateMode::Single if aggregate.group_expr().is_empty() => whole(aggregate)?,
                    _ => single(aggregate, &node)?,
                },
                None => None,
            };
            Ok(replaced.map_or_else(|| Transformed::no(node), Transformed::yes))
        };
        plan.transform_up(rewrite).map(|t| t.data)
    }

    fn name(&self) -> &str {
        "by_series"
    }

    fn schema_check(&self) -> bool {
        true
    }
}

fn node_of<T: 'static>(plan: &Arc<dyn ExecutionPlan>) -> Option<&T> {
    (plan.as_ref() as &dyn Any).downcast_ref()
}

/// Aggregates to which a value given twice is the same as given once.
const IDEMPOTENT: [&str; 9] =
    ["min", "max", "bool_and", "bool_or", "bit_and", "bit_or", "uniq", "uniq_exact", "approx_distinct"];

fn partial(aggregate: &AggregateExec) -> Result<Option<Arc<dyn ExecutionPlan>>> {
    let input = aggregate.input();
    let by = aggregate.group_expr();
    let plain = by.is_single() && aggregate.limit_options().is_none();
    if !plain || *aggregate.input_order_mode() != InputOrderMode::Linear {
        return Ok(None);
    }
    let Some(scan) = scan_below(input).filter(|s| s.scan().is_some()) else { return Ok(None) };
    // Keys and, where that is possible, arguments over the scan.
    let of_series = |expr: &Arc<dyn PhysicalExpr>| {
        let lowered = lower(input, expr.clone())?;
        let stored = |c: &Column| matches!(scan.outputs().get(c.index()), None | Some(Output::Stored(_)));
        let fixed = !is_volatile(&lowered) && !collect_columns(&lowered).iter().any(stored);
        Ok::<_, datafusion::error::DataFusionError>(fixed.then_some(lowered))
    };
    let mut keys = Vec::new();
    for (expr, _) in by.expr() {
        keys.push(match of_series(expr)? {
            Some(lowered) => Key::Series(lowered),
            None if is_volatile(expr) => return Ok(None),
            None => Key::Row(expr.clone()),
        });
    }
    let by_rows = keys.iter().any(|k| matches!(k, Key::Row(_)));
    let mut aggregates = Vec::new();
    for (function, filter) in aggregate.aggr_expr().iter().zip(aggregate.filter_expr()) {
        let mut arguments = function.expressions();
        arguments.extend(function.order_bys().iter().map(|o| o.expr.clone()));
        let lowered = arguments.iter().map(of_series).collect::<Result<Option<Vec<_>>>>()?;
        let idempotent = function.is_distinct() || IDEMPOTENT.contains(&function.fun().name());
        let counts = function.fun().name() == "count" && !function.is_distinct() && filter.is_none();
        let never_null = |e: &Arc<dyn PhysicalExpr>| e.nullable(&input.schema()).is_ok_and(|n| !n);
        let (arguments, fed) = match lowered {
            _ if counts && arguments.iter().all(never_null) => (arguments, Fed::Counts),
            Some(lowered) if idempotent && filter.is_none() => (lowered, Fed::Series),
            _ => (arguments, Fed::Rows),
        };
        aggregates.push(Aggregate { function: function.clone(), arguments, filter: filter.clone(), fed });
    }
    let counted = !by_rows && !filters(input) && aggregates.iter().all(|a| a.fed != Fed::Rows);
    if keys.is_empty() && !counted {
        // One group of all rows is found without us.
        return Ok(None);
    }
    let rows = scan.scan().filter(|_| counted);
    let input: Arc<dyn ExecutionPlan> = match rows {
        Some(rows) => Arc::new(SeriesCountExec::new(rows)),
        None => {
            let mut needed = BTreeSet::new();
            for a in &mut aggregates {
                if a.fed != Fed::Rows {
                    a.fed = Fed::Rows;
                    a.arguments = a.function.expressions();
                    a.arguments.extend(a.function.order_bys().iter().map(|o| o.expr.clone()));
                }
                a.arguments.iter().chain(&a.filter).for_each(|e| needed.extend(indexes(e)));
            }
            for key in &keys {
                if let Key::Row(expr) = key {
                    needed.extend(indexes(expr));
                }
            }
            let needed: Vec<usize> = needed.into_iter().collect();
            let Some(threaded) = with_index(input, &needed)? else { return Ok(None) };
            for a in &mut aggregates {
                for e in a.arguments.iter_mut().chain(&mut a.filter) {
                    *e = moved(e.clone(), &needed)?;
                }
            }
            for key in &mut keys {
                if let Key::Row(expr) = key {
                    *expr = moved(expr.clone(), &needed)?;
                }
            }
            threaded
        }
    };
    let of_series = keys.iter().filter_map(|k| match k {
        Key::Series(expr) => Some(expr),
        Key::Row(_) => None,
    });
    let fed_by_series = aggregates.iter().filter(|a| a.fed == Fed::Series).flat_map(|a| &a.arguments);
    let columns: BTreeSet<usize> = of_series.chain(fed_by_series).flat_map(indexes).collect();
    let columns: Vec<usize> = columns.into_iter().collect();
    for key in &mut keys {
        if let Key::Series(expr) = key {
            *expr = moved(expr.clone(), &columns)?;
        }
    }
    for a in aggregates.iter_mut().filter(|a| a.fed == Fed::Series) {
        for e in &mut a.arguments {
            *e = moved(e.clone(), &columns)?;
        }
    }
    let keys = Keys { scan: scan.clone(), columns, keys };
    let node = SeriesAggregateExec::new(input, Arc::new(keys), aggregates, rows.is_some(), aggregate.schema());
    Ok(Some(Arc::new(node)))
}

/// All rows of one partition as one group: in two stages, of which the first can be ours.
fn whole(aggregate: &AggregateExec) -> Result<Option<Arc<dyn ExecutionPlan>>> {
    let (by, functions) = (aggregate.group_expr().clone(), aggregate.aggr_expr().to_vec());
    let (schema, filters) = (aggregate.input_schema(), aggregate.filter_expr().to_vec());
    let unfiltered = vec![None; filters.len()];
    let input = aggregate.input().clone();
    let first =
        AggregateExec::try_new(AggregateMode::Partial, by.clone(), functions.clone(), filters, input, schema.clone())?;
    let Some(first) = partial(&first)? else { return Ok(None) };
    let last = AggregateExec::try_new(AggregateMode::Final, by.as_final(), functions, unfiltered, first, schema)?;
    Ok(Some(Arc::new(last)))
}

/// An aggregation whose partial results come from one partition needs no second stage.
fn single(aggregate: &AggregateExec, node: &Arc<dyn ExecutionPlan>) -> Result<Option<Arc<dyn ExecutionPlan>>> {
    let last = matches!(aggregate.mode(), AggregateMode::Final | AggregateMode::FinalPartitioned);
    if !last || aggregate.limit_options().is_some() {
        return Ok(None);
    }
    let repartition = node_of::<RepartitionExec>(aggregate.input());
    let below = repartition.map_or(aggregate.input(), RepartitionExec::input);
    let finished = node_of::<SeriesAggregateExec>(below).and_then(|partial| partial.finished(node));
    let Some(finished) = finished else { return Ok(None) };
    let finished: Arc<dyn ExecutionPlan> = Arc::new(finished);
    Ok(Some(match repartition.map(RepartitionExec::partitioning) {
        // Whoever comes next may count on where groups are. The keys are in the same columns as before.
        Some(Partitioning::Hash(keys, n)) => {
            Arc::new(RepartitionExec::try_new(finished, Partitioning::Hash(keys.clone(), *n))?)
        }
        Some(_) => return Ok(None),
        None => finished,
    }))
}

/// The scan below projections and filters.
fn scan_below(plan: &Arc<dyn ExecutionPlan>) -> Option<Arc<TagScanExec>> {
    if node_of::<TagScanExec>(plan).is_some() {
        let plan: Arc<dyn Any + Send + Sync> = plan.clone();
        return plan.downcast().ok();
    }
    let projection = node_of::<ProjectionExec>(plan).map(ProjectionExec::input);
    let filter = node_of::<FilterExec>(plan).filter(|f| f.fetch().is_none()).map(FilterExec::input);
    scan_below(projection.or(filter)?)
}

fn filters(plan: &Arc<dyn ExecutionPlan>) -> bool {
    node_of::<FilterExec>(plan).is_some() || plan.children().into_iter().any(filters)
}

/// `expr` over the output of `plan` as one over the output of the scan below.
fn lower(plan: &Arc<dyn ExecutionPlan>, expr: Arc<dyn PhysicalExpr>) -> Result<Arc<dyn PhysicalExpr>> {
    if let Some(projection) = node_of::<ProjectionExec>(plan) {
        let exprs = projection.expr();
        let expr = replaced(expr, &|c| exprs.get(c.index()).map(|e| e.expr.clone()))?;
        return lower(projection.input(), expr);
    }
    let Some(filter) = node_of::<FilterExec>(plan) else { return Ok(expr) };
    let expr = match filter.projection() {
        Some(columns) => replaced(expr, &|c| columns.get(c.index()).map(|i| column(c.name(), *i)))?,
        None => expr,
    };
    lower(filter.input(), expr)
}

/// `plan` with these of its columns and then the index of the series.
fn with_index(plan: &Arc<dyn ExecutionPlan>, needed: &[usize]) -> Result<Option<Arc<dyn ExecutionPlan>>> {
    if let Some(scan) = node_of::<TagScanExec>(plan) {
        return Ok(scan.with_index(needed).map(|scan| Arc::new(scan) as _));
    }
    if let Some(projection) = node_of::<ProjectionExec>(plan) {
        let exprs: Vec<&ProjectionExpr> = needed.iter().map(|i| &projection.expr()[*i]).collect();
        let below: BTreeSet<usize> = exprs.iter().flat_map(|e| indexes(&e.expr)).collect();
        let below: Vec<usize> = below.into_iter().collect();
        let Some(input) = with_index(projection.input(), &below)? else { return Ok(None) };
        let mut out = Vec::with_capacity(exprs.len() + 1);
        for e in exprs {
            out.push(ProjectionExpr { expr: moved(e.expr.clone(), &below)?, alias: e.alias.clone() });
        }
        let index = input.schema().field(below.len()).name().clone();
        out.push(ProjectionExpr { expr: column(&index, below.len()), alias: index });
        let as_they_are = out.len() == below.len() + 1 && out.iter().enumerate().all(|(i, e)| is_column(&e.expr, i));
        return Ok(Some(if as_they_are { input } else { Arc::new(ProjectionExec::try_new(out, input)?) }));
    }
    let Some(filter) = node_of::<FilterExec>(plan) else { return Ok(None) };
    let of_input = |i: &usize| filter.projection().as_ref().map_or(*i, |p| p[*i]);
    let wanted: Vec<usize> = needed.iter().map(of_input).collect();
    let below: BTreeSet<usize> = wanted.iter().copied().chain(indexes(filter.predicate())).collect();
    let below: Vec<usize> = below.into_iter().collect();
    let Some(input) = with_index(filter.input(), &below)? else { return Ok(None) };
    let predicate = moved(filter.predicate().clone(), &below)?;
    let mut kept: Vec<usize> = wanted.iter().filter_map(|w| below.binary_search(w).ok()).collect();
    kept.push(below.len());
    let filter = FilterExecBuilder::new(predicate, input).apply_projection(Some(kept))?.build()?;
    Ok(Some(Arc::new(filter)))
}

fn indexes(expr: &Arc<dyn PhysicalExpr>) -> Vec<usize> {
    collect_columns(expr).iter().map(Column::index).collect()
}

fn column(name: &str, index: usize) -> Arc<dyn PhysicalExpr> {
    Arc::new(Column::new(name, index))
}

fn is_column(expr: &Arc<dyn PhysicalExpr>, index: usize) -> bool {
    (expr.as_ref() as &dyn Any).downcast_ref::<Column>().is_some_and(|c| c.index() == index)
}

fn is_volatile(expr: &Arc<dyn PhysicalExpr>) -> bool {
    expr.is_volatile_node() || expr.children().into_iter().any(is_volatile)
}

/// `expr` where the columns `kept`, in ascending order, are all that is left.
fn moved(expr: Arc<dyn PhysicalExpr>, kept: &[usize]) -> Result<Arc<dyn PhysicalExpr>> {
    replaced(expr, &|c| kept.binary_search(&c.index()).ok().map(|i| column(c.name(), i)))
}

fn replaced(
    expr: Arc<dyn PhysicalExpr>,
    of: &dyn Fn(&Column) -> Option<Arc<dyn PhysicalExpr>>,
) -> Result<Arc<dyn PhysicalExpr>> {
    let replace = |e: Arc<dyn PhysicalExpr>| {
        let with = (e.as_ref() as &dyn Any).downcast_ref::<Column>().and_then(of);
        Ok(match with {
            Some(with) => Transformed::new(with, true, TreeNodeRecursion::Jump),
            None => Transformed::no(e),
        })
    };
    expr.transform_down(replace).map(|t| t.data)
}
