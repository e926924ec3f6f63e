//! The tag-column rule: one optimizer rule that lets a plan run on ordinals.
//!
//! It walks the plan from its scans upwards and knows of every output column whether it is an ordinal now. A scan of
//! a [`SeriesTable`] starts to give ordinals and answers the conjuncts that were pushed to it by itself. Nodes that
//! compare, group, sort or join whole values work on ordinals as they are, since ordinals of one statement are
//! numbered in sort order over all its tag columns. An expression over one tag is computed once per value. Where
//! anything else needs the text it is restored there; below a node that the rule doesn't know all columns are
//! restored, and so they are on top of the plan.

use std::sync::Arc;

use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::common::{Column, DFSchema};
use datafusion::datasource::{provider_as_source, source_as_provider};
use datafusion::error::Result;
use datafusion::logical_expr::expr::{AggregateFunction, Alias, Sort as SortExpr, WindowFunction};
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::utils::grouping_set_to_exprlist;
use datafusion::logical_expr::{
    Aggregate, BinaryExpr, Distinct, Expr, Filter, Join, JoinType, Limit, LogicalPlan, Operator, Projection, Sort,
    Subquery, SubqueryAlias, TableScan, TableScanBuilder, Union, Window,
};
use datafusion::optimizer::{OptimizerConfig, OptimizerRule};

use super::dictionary::Dictionary;
use super::filter::map_lookup;
use super::functions;
use crate::functions::gapfill::GapFill;
use crate::table::{SeriesTable, What};

/// What the ordinals in a column number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Tag values.
    Value,
    /// Tag sets.
    Set,
}

/// The rule.
#[derive(Debug, Default)]
pub struct TagColumns;

impl OptimizerRule for TagColumns {
    fn name(&self) -> &str {
        "tag_columns"
    }

    fn rewrite(&self, plan: LogicalPlan, _config: &dyn OptimizerConfig) -> Result<Transformed<LogicalPlan>> {
        if !scans_text(&plan)? {
            return Ok(Transformed::no(plan));
        }
        Statement { dictionary: Dictionary::new() }.rewrite_root(plan).map(Transformed::yes)
    }
}

fn series_table(scan: &TableScan) -> Option<Arc<dyn datafusion::catalog::TableProvider>> {
    source_as_provider(&scan.source).ok().filter(|p| p.is::<SeriesTable>())
}

/// Whether a scan still gives the text of tags.
fn scans_text(plan: &LogicalPlan) -> Result<bool> {
    let mut found = false;
    plan.apply_with_subqueries(|node| {
        if let LogicalPlan::TableScan(scan) = node
            && let Some(provider) = series_table(scan)
            && provider.downcast_ref::<SeriesTable>().is_some_and(|t| !t.gives_ordinals())
        {
            found = true;
        }
        Ok(if found { TreeNodeRecursion::Stop } else { TreeNodeRecursion::Continue })
    })?;
    Ok(found)
}

/// A plan and, for each of its output columns, what its ordinals number if it is one of ordinals.
struct Rewritten {
    plan: LogicalPlan,
    kinds: Vec<Option<Kind>>,
}

impl Rewritten {
    fn plain(plan: LogicalPlan) -> Self {
        let kinds = vec![None; plan.schema().fields().len()];
        Self { plan, kinds }
    }

    fn scope(&self) -> Scope<'_> {
        Scope { inputs: vec![(self.plan.schema(), &self.kinds)] }
    }
}

/// Where the columns of an expression come from.
struct Scope<'a> {
    inputs: Vec<(&'a DFSchema, &'a [Option<Kind>])>,
}

impl Scope<'_> {
    fn kind(&self, column: &Column) -> Option<Kind> {
        self.inputs.iter().find_map(|(schema, kinds)| Some(kinds[schema.maybe_index_of_column(column)?])).flatten()
    }
}

/// One statement's rewrite.
struct Statement {
    dictionary: Arc<Dictionary>,
}

impl Statement {
    fn rewrite_root(&self, plan: LogicalPlan) -> Result<LogicalPlan> {
        let rewritten = self.rewrite(plan)?;
        self.restored(rewritten)
    }

    fn rewrite(&self, plan: LogicalPlan) -> Result<Rewritten> {
        match plan {
            LogicalPlan::TableScan(scan) => self.scan(scan),
            LogicalPlan::Projection(p) => self.projection(p),
            LogicalPlan::Filter(f) => {
                let input = self.rewrite(Arc::unwrap_or_clone(f.input))?;
                let predicate = self.plain(f.predicate, &input.scope())?;
                let plan = LogicalPlan::Filter(Filter::try_new(predicate, Arc::new(input.plan))?);
                Ok(Rewritten { plan, kinds: input.kinds })
            }
            LogicalPlan::Sort(s) => {
                let input = self.rewrite(Arc::unwrap_or_clone(s.input))?;
                let expr = self.sort_keys(s.expr, &input.scope())?;
                let plan = LogicalPlan::Sort(Sort { expr, input: Arc::new(input.plan), fetch: s.fetch });
                Ok(Rewritten { plan, kinds: input.kinds })
            }
            LogicalPlan::Limit(l) => {
                let input = self.rewrite(Arc::unwrap_or_clone(l.input))?;
                let plan = LogicalPlan::Limit(Limit { input: Arc::new(input.plan), ..l });
                Ok(Rewritten { plan, kinds: input.kinds })
            }
            LogicalPlan::SubqueryAlias(a) => {
                let input = self.rewrite(Arc::unwrap_or_clone(a.input))?;
                let plan = LogicalPlan::SubqueryAlias(SubqueryAlias::try_new(Arc::new(input.plan), a.alias)?);
                Ok(Rewritten { plan, kinds: input.kinds })
            }
            LogicalPlan::Distinct(Distinct::All(input)) => {
                let input = self.rewrite(Arc::unwrap_or_clone(input))?;
                let plan = LogicalPlan::Distinct(Distinct::All(Arc::new(input.plan)));
                Ok(Rewritten { plan, kinds: input.kinds })
            }
            LogicalPlan::Aggregate(a) => self.aggregate(a),
            LogicalPlan::Window(w) => self.window(w),
            LogicalPlan::Join(j) => self.join(j),
            LogicalPlan::Union(u) => self.union(u),
            LogicalPlan::Extension(e) if GapFill::of(&e).is_some() => {
                let Some(node) = GapFill::of(&e) else { return self.unknown(LogicalPlan::Extension(e)) };
                let input = self.rewrite(node.input().clone())?;
                Ok(Rewritten { plan: node.over(input.plan)?, kinds: input.kinds })
            }
            other => self.unknown(other),
        }
    }

    /// Restores all text below a node that the rule doesn't know.
    fn unknown(&self, plan: LogicalPlan) -> Result<Rewritten> {
        let inputs = plan.inputs().into_iter().map(|i| self.rewrite_root(i.clone())).collect::<Result<Vec<_>>>()?;
        let none = Scope { inputs: vec![] };
        let exprs = plan.expressions().into_iter().map(|e| self.plain(e, &none)).collect::<Result<Vec<_>>>()?;
        if inputs.is_empty() && exprs.is_empty() {
            return Ok(Rewritten::plain(plan));
        }
        Ok(Rewritten::plain(plan.with_new_exprs(exprs, inputs)?))
    }

    fn scan(&self, scan: TableScan) -> Result<Rewritten> {
        let provider = series_table(&scan);
        let table = provider.as_ref().and_then(|p| p.downcast_ref::<SeriesTable>());
        let Some((table, ordinals)) =
            table.and_then(|t| Some((t, t.with_ordinals(&self.dictionary, scan.filters.clone())?)))
        else {
            return Ok(Rewritten::plain(LogicalPlan::TableScan(scan)));
        };
        let all: Vec<usize> = (0..table.columns().len()).collect();
        let kinds = scan
            .projection
            .as_ref()
            .unwrap_or(&all)
            .iter()
            .map(|i| match table.columns()[*i].what {
                What::Tag(_) => Some(Kind::Value),
                What::Tags => Some(Kind::Set),
                What::Stored(_) | What::Series => None,
            })
            .collect();
        let source = provider_as_source(Arc::new(ordinals));
        let scan = TableScanBuilder::new(scan.table_name, source)
            .with_projection(scan.projection)
            .with_fetch(scan.fetch)
            .build()?;
        Ok(Rewritten { plan: LogicalPlan::TableScan(scan), kinds })
    }

    fn projection(&self, projection: Projection) -> Result<Rewritten> {
        let input = self.rewrite(Arc::unwrap_or_clone(projection.input))?;
        let names = NamePreserver::new_for_projection();
        let mut kinds = Vec::with_capacity(projection.expr.len());
        let mut exprs = Vec::with_capacity(projection.expr.len());
        for expr in projection.expr {
            let name = names.save(&expr);
            let (expr, kind) = self.either(expr, &input.scope())?;
            exprs.push(name.restore(expr));
            kinds.push(kind);
        }
        let plan = LogicalPlan::Projection(Projection::try_new(exprs, Arc::new(input.plan))?);
        Ok(Rewritten { plan, kinds })
    }

    fn aggregate(&self, aggregate: Aggregate) -> Result<Rewritten> {
        let mut input = self.rewrite(Arc::unwrap_or_clone(aggregate.input))?;
        let names = NamePreserver::new_for_projection();
        let mut kinds = Vec::new();
        let mut group_expr = Vec::with_capacity(aggregate.group_expr.len());
        if let [Expr::GroupingSet(_)] = aggregate.group_expr.as_slice() {
            let keys = grouping_set_to_exprlist(&aggregate.group_expr)?;
            // Names within grouping sets can't be kept apart from their expressions, so only columns stay ordinals.
            if keys.iter().all(|k| matches!(k, Expr::Column(_)) || !self.touches_ordinals(k, &input.scope())) {
                kinds.extend(keys.iter().map(|k| self.ordinal(k, &input.scope()).map(|(_, kind)| kind)));
            } else {
                input = Rewritten::plain(self.restored(input)?);
                kinds.extend(keys.iter().map(|_| None));
            }
            // The grouping id.
            kinds.push(None);
            group_expr = aggregate.group_expr;
        } else {
            for expr in aggregate.group_expr {
                let name = names.save(&expr);
                let (expr, kind) = self.either(expr, &input.scope())?;
                group_expr.push(name.restore(expr));
                kinds.push(kind);
            }
        }
        let mut aggr_expr = Vec::with_capacity(aggregate.aggr_expr.len());
        for expr in aggregate.aggr_expr {
            let name = names.save(&expr);
            let (expr, kind) = self.aggregate_function(expr, &input.scope())?;
            aggr_expr.push(name.restore(expr));
            kinds.push(kind);
        }
        let plan = LogicalPlan::Aggregate(Aggregate::try_new(Arc::new(input.plan), group_expr, aggr_expr)?);
        debug_assert_eq!(plan.schema().fields().len(), kinds.len());
        Ok(Rewritten { plan, kinds })
    }

    fn aggregate_function(&self, expr: Expr, scope: &Scope<'_>) -> Result<(Expr, Option<Kind>)> {
        match expr {
            Expr::Alias(alias) => {
                let (inner, kind) = self.aggregate_function(*alias.expr, scope)?;
                Ok((Expr::Alias(Alias { expr: Box::new(inner), ..alias }), kind))
            }
            Expr::AggregateFunction(AggregateFunction { func, mut params }) => {
                let ordinals: Option<Vec<(Expr, Kind)>> = params.args.iter().map(|a| self.ordinal(a, scope)).collect();
                let mut kind = None;
                let mut text_sorts = false;
                params.args = match (func.name(), ordinals) {
                    // What is counted may as well be the ordinal.
                    ("count" | "approx_distinct" | "uniq" | "uniq_exact", Some(args)) => {
                        args.into_iter().map(|(e, _)| e).collect()
                    }
                    // Ordinals sort as their text does, and these give one of their arguments.
                    ("min" | "max" | "first_value" | "last_value", Some(args)) if args.len() == 1 => {
                        kind = args.first().map(|(_, k)| *k);
                        kind.into_iter().for_each(|k| self.ordered(k));
                        args.into_iter().map(|(e, _)| e).collect()
                    }
                    _ => {
                        // Keys of an aggregate of distinct arguments must be among these.
                        text_sorts = params.distinct;
                        params.args.into_iter().map(|a| self.plain(a, scope)).collect::<Result<_>>()?
                    }
                };
                params.filter = params.filter.map(|f| self.plain(*f, scope).map(Box::new)).transpose()?;
                params.order_by = if text_sorts {
                    let text = |k: SortExpr| Ok(SortExpr { expr: self.plain(k.expr, scope)?, ..k });
                    params.order_by.into_iter().map(text).collect::<Result<_>>()?
                } else {
                    self.sort_keys(params.order_by, scope)?
                };
                Ok((Expr::AggregateFunction(AggregateFunction { func, params }), kind))
            }
            other => Ok((self.plain(other, scope)?, None)),
        }
    }

    fn window(&self, window: Window) -> Result<Rewritten> {
        let input = self.rewrite(Arc::unwrap_or_clone(window.input))?;
        let names = NamePreserver::new_for_projection();
        let mut exprs = Vec::with_capacity(window.window_expr.len());
        for expr in window.window_expr {
            let name = names.save(&expr);
            exprs.push(name.restore(self.window_function(expr, &input.scope())?));
        }
        let mut kinds = input.kinds;
        kinds.extend(exprs.iter().map(|_| None));
        let plan = LogicalPlan::Window(Window::try_new(exprs, Arc::new(input.plan))?);
        Ok(Rewritten { plan, kinds })
    }

    fn window_function(&self, expr: Expr, scope: &Scope<'_>) -> Result<Expr> {
        match expr {
            Expr::Alias(alias) => {
                let inner = self.window_function(*alias.expr, scope)?;
                Ok(Expr::Alias(Alias { expr: Box::new(inner), ..alias }))
            }
            Expr::WindowFunction(window) => {
                let WindowFunction { fun, mut params } = *window;
                let counts = fun.name() == "count";
                params.args = params
                    .args
                    .into_iter()
                    .map(|a| if counts { self.either(a, scope).map(|(e, _)| e) } else { self.plain(a, scope) })
                    .collect::<Result<_>>()?;
                params.partition_by = params
                    .partition_by
                    .into_iter()
                    .map(|p| self.either(p, scope).map(|(e, _)| e))
                    .collect::<Result<_>>()?;
                params.order_by = self.sort_keys(params.order_by, scope)?;
                params.filter = params.filter.map(|f| self.plain(*f, scope).map(Box::new)).transpose()?;
                Ok(Expr::WindowFunction(Box::new(WindowFunction { fun, params })))
            }
            other => self.plain(other, scope),
        }
    }

    fn join(&self, join: Join) -> Result<Rewritten> {
        let left = self.rewrite(Arc::unwrap_or_clone(join.left))?;
        let right = self.rewrite(Arc::unwrap_or_clone(join.right))?;
        let mut on = Vec::with_capacity(join.on.len());
        for (l, r) in join.on {
            on.push(match (self.ordinal(&l, &left.scope()), self.ordinal(&r, &right.scope())) {
                (Some((l, a)), Some((r, b))) if a == b => (l, r),
                _ => (self.plain(l, &left.scope())?, self.plain(r, &right.scope())?),
            });
        }
        let both = Scope { inputs: vec![(left.plan.schema(), &left.kinds), (right.plan.schema(), &right.kinds)] };
        let filter = join.filter.map(|f| self.plain(f, &both)).transpose()?;
        let kinds = match join.join_type {
            JoinType::Inner | JoinType::Left | JoinType::Right | JoinType::Full => [left.kinds, right.kinds].concat(),
            JoinType::LeftSemi | JoinType::LeftAnti => left.kinds,
            JoinType::RightSemi | JoinType::RightAnti => right.kinds,
            JoinType::LeftMark => [left.kinds, vec![None]].concat(),
            JoinType::RightMark => [right.kinds, vec![None]].concat(),
        };
        let plan = LogicalPlan::Join(Join::try_new(
            Arc::new(left.plan),
            Arc::new(right.plan),
            on,
            filter,
            join.join_type,
            join.join_constraint,
            join.null_equality,
            join.null_aware,
        )?);
        debug_assert_eq!(plan.schema().fields().len(), kinds.len());
        Ok(Rewritten { plan, kinds })
    }

    fn union(&self, union: Union) -> Result<Rewritten> {
        let inputs =
            union.inputs.into_iter().map(|i| self.rewrite(Arc::unwrap_or_clone(i))).collect::<Result<Vec<_>>>()?;
        // A column stays one of ordinals when it is that in every input.
        let width = inputs.first().map_or(0, |i| i.kinds.len());
        let kinds: Vec<Option<Kind>> = (0..width)
            .map(|c| inputs[0].kinds[c].filter(|k| inputs.iter().all(|i| i.kinds.get(c) == Some(&Some(*k)))))
            .collect();
        let inputs =
            inputs.into_iter().map(|i| self.restored_except(i, &kinds).map(Arc::new)).collect::<Result<Vec<_>>>()?;
        let plan = LogicalPlan::Union(Union::try_new_with_loose_types(inputs)?);
        Ok(Rewritten { plan, kinds })
    }

    fn sort_keys(&self, keys: Vec<SortExpr>, scope: &Scope<'_>) -> Result<Vec<SortExpr>> {
        keys.into_iter()
            .map(|key| {
                let (expr, kind) = self.either(key.expr, scope)?;
                kind.into_iter().for_each(|k| self.ordered(k));
                Ok(SortExpr { expr, ..key })
            })
            .collect()
    }

    /// Puts a projection that restores text on top of `input`, if it has ordinals.
    fn restored(&self, input: Rewritten) -> Result<LogicalPlan> {
        let none = vec![None; input.kinds.len()];
        self.restored_except(input, &none)
    }

    fn restored_except(&self, input: Rewritten, keep: &[Option<Kind>]) -> Result<LogicalPlan> {
        if input.kinds.iter().zip(keep).all(|(kind, keep)| kind.is_none() || keep.is_some()) {
            return Ok(input.plan);
        }
        let exprs = input
            .plan
            .schema()
            .iter()
            .zip(input.kinds.iter().zip(keep))
            .map(|((relation, field), (kind, keep))| {
                let column = Expr::Column(Column::new(relation.cloned(), field.name()));
                match kind {
                    Some(kind) if keep.is_none() => {
                        self.restore(column, *kind).alias_qualified(relation.cloned(), field.name())
                    }
                    _ => column,
                }
            })
            .collect();
        Ok(LogicalPlan::Projection(Projection::try_new(exprs, Arc::new(input.plan))?))
    }

    fn restore(&self, ordinal: Expr, kind: Kind) -> Expr {
        match kind {
            Kind::Value => functions::text(&self.dictionary, ordinal),
            Kind::Set => functions::map(&self.dictionary, ordinal),
        }
    }

    /// `expr` as ordinals when it is a tag as a whole, as plain values otherwise.
    fn either(&self, expr: Expr, scope: &Scope<'_>) -> Result<(Expr, Option<Kind>)> {
        match self.ordinal(&expr, scope) {
            Some((expr, kind)) => Ok((expr, Some(kind))),
            None => Ok((self.plain(expr, scope)?, None)),
        }
    }

    /// `expr` as ordinals, when it is a tag column, `tags`, or `tags['key']`.
    fn ordinal(&self, expr: &Expr, scope: &Scope<'_>) -> Option<(Expr, Kind)> {
        match expr {
            Expr::Column(c) => scope.kind(c).map(|kind| (expr.clone(), kind)),
            Expr::Alias(alias) => {
                let (inner, kind) = self.ordinal(&alias.expr, scope)?;
                Some((Expr::Alias(Alias { expr: Box::new(inner), ..alias.clone() }), kind))
            }
            _ => {
                let (inner, key) = map_lookup(expr)?;
                let (inner, kind) = self.ordinal(inner, scope)?;
                (kind == Kind::Set).then(|| {
                    self.dictionary.want_key(&key);
                    (functions::value(&self.dictionary, &key, inner), Kind::Value)
                })
            }
        }
    }

    /// Notes that ordinals of this kind are compared for more than being equal.
    fn ordered(&self, kind: Kind) {
        if kind == Kind::Set {
            self.dictionary.want_order_of_sets();
        }
    }

    fn touches_ordinals(&self, expr: &Expr, scope: &Scope<'_>) -> bool {
        expr.column_refs().into_iter().any(|c| scope.kind(c).is_some())
    }

    /// `expr` with the value it had when tags were text.
    fn plain(&self, expr: Expr, scope: &Scope<'_>) -> Result<Expr> {
        expr.transform_down(|e| self.plain_node(e, scope)).map(|t| t.data)
    }

    fn plain_node(&self, expr: Expr, scope: &Scope<'_>) -> Result<Transformed<Expr>> {
        let done = |e: Expr| Transformed::new(e, true, TreeNodeRecursion::Jump);
        match &expr {
            Expr::BinaryExpr(BinaryExpr { left, op, right }) if compares(*op) => {
                if let (Some((l, a)), Some((r, b))) = (self.ordinal(left, scope), self.ordinal(right, scope))
                    && a == b
                {
                    self.ordered(a);
                    return Ok(done(Expr::BinaryExpr(BinaryExpr::new(Box::new(l), *op, Box::new(r)))));
                }
            }
            Expr::IsNull(e) => {
                if let Some((e, _)) = self.ordinal(e, scope) {
                    return Ok(done(Expr::IsNull(Box::new(e))));
                }
            }
            Expr::IsNotNull(e) => {
                if let Some((e, _)) = self.ordinal(e, scope) {
                    return Ok(done(Expr::IsNotNull(Box::new(e))));
                }
            }
            Expr::ScalarSubquery(s) => return Ok(done(Expr::ScalarSubquery(self.subquery(s)?))),
            Expr::Exists(e) => {
                let mut exists = e.clone();
                exists.subquery = self.subquery(&e.subquery)?;
                return Ok(done(Expr::Exists(exists)));
            }
            Expr::InSubquery(i) => {
                let mut within = i.clone();
                within.subquery = self.subquery(&i.subquery)?;
                return Ok(Transformed::yes(Expr::InSubquery(within)));
            }
            Expr::Alias(_) => return Ok(Transformed::no(expr)),
            _ => {}
        }
        if let Some((ordinal, kind)) = self.ordinal(&expr, scope) {
            return Ok(done(self.restore(ordinal, kind)));
        }
        if let Some((of_text, ordinal)) = self.of_one_tag(&expr, scope)? {
            return Ok(done(functions::apply(&self.dictionary, of_text, ordinal)?));
        }
        Ok(Transformed::no(expr))
    }

    fn subquery(&self, subquery: &Subquery) -> Result<Subquery> {
        let plan = self.rewrite_root(subquery.subquery.as_ref().clone())?;
        Ok(subquery.with_plan(Arc::new(plan)))
    }

    /// When the value of `expr` depends on the text of exactly one tag: the expression over
    /// [`functions::ARGUMENT`], and the tag.
    fn of_one_tag(&self, expr: &Expr, scope: &Scope<'_>) -> Result<Option<(Expr, Expr)>> {
        if expr.is_volatile() {
            return Ok(None);
        }
        let mut tag: Option<Expr> = None;
        let mut pure = true;
        let replaced = expr.clone().transform_down(|e| {
            match self.ordinal(&e, scope) {
                Some((ordinal, Kind::Value)) if tag.as_ref().is_none_or(|t| *t == ordinal) => {
                    tag = Some(ordinal);
                    let argument = Expr::Column(Column::new_unqualified(functions::ARGUMENT));
                    return Ok(Transformed::new(argument, true, TreeNodeRecursion::Jump));
                }
                Some(_) => pure = false,
                None => {
                    pure &= !matches!(
                        e,
                        Expr::Column(_)
                            | Expr::OuterReferenceColumn(..)
                            | Expr::AggregateFunction(_)
                            | Expr::WindowFunction(_)
                            | Expr::ScalarSubquery(_)
                            | Expr::Exists(_)
                            | Expr::InSubquery(_)
                            | Expr::SetComparison(_)
                            | Expr::GroupingSet(_)
                            | Expr::Placeholder(_)
                            | Expr::ScalarVariable(..)
                            | Expr::Unnest(_)
                    );
                }
            }
            let recursion = if pure { TreeNodeRecursion::Continue } else { TreeNodeRecursion::Stop };
            Ok(Transformed::new(e, false, recursion))
        })?;
        Ok(tag.filter(|_| pure).map(|tag| (replaced.data, tag)))
    }
}

fn compares(op: Operator) -> bool {
    matches!(
        op,
        Operator::Eq
            | Operator::NotEq
            | Operator::Lt
            | Operator::LtEq
            | Operator::Gt
            | Operator::GtEq
            | Operator::IsDistinctFrom
            | Operator::IsNotDistinctFrom
    )
}
