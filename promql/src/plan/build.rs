//! The syntax tree to nodes: one match that calls one function per kind.

use catalog::matcher::Patterns;
use catalog::tag::METRIC_NAME;
use catalog::{ErrorKind, MatchOp, Matcher};
use datafusion::logical_expr::LogicalPlan;
use engine::kernels::{Edges, RangeFunction};

use super::duration::{self, Spans};
use super::ops::{
    AggregateOp, BinaryOp, Counts, Float, HistogramFunction, MapFunction, Matching, Op, Place, Reading, Selector,
    SetOp, Subquery,
};
use super::source::Source;
use super::{Node, Planned};
use crate::block::Name;
use crate::exec::deep;
use crate::labels::{self, Grouping};
use crate::options::{EvalOptions, Grid};
use crate::parse::ast::{self, At, Expr, Kind, Length};
use crate::parse::{Lines, Position, go};
use crate::result::ValueType;
use crate::{QueryError, Result};

/// A plan and what is known of its series.
struct Built {
    plan: LogicalPlan,
    /// No two of its series differ in nothing but the metric's name.
    distinct: bool,
}

struct Builder<'a> {
    options: &'a EvalOptions,
    /// The query's own evaluation times, which `@ start()` and `@ end()` mean.
    outer: Grid,
    warnings: Vec<(Position, String)>,
    lines: Lines,
    /// Those of `label_replace`.
    patterns: Patterns,
    /// What the nodes that are made are about.
    place: Place,
    /// What the expressions around need of histograms.
    buckets: Buckets,
    /// What samples count as.
    counts: Counts,
}

/// Whether the buckets of histograms matter to what is made of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Buckets {
    /// They are in the result.
    Kept,
    /// A function takes only the count or the sum.
    Skipped,
    /// Something further out needs them, whatever comes within.
    Needed,
}

impl Buckets {
    /// What is needed within an expression.
    fn within(self, expr: &Expr) -> Self {
        let own = match &expr.kind {
            // Samples between the steps of a subquery are not seen, so that its function has to compare buckets.
            Kind::Subquery(_) => Self::Needed,
            Kind::Binary(b) if matches!(b.op, ast::Operator::TrimUpper | ast::Operator::TrimLower) => Self::Needed,
            Kind::Call(c) => match c.function.name {
                "histogram_quantile" | "histogram_quantiles" | "histogram_fraction" => Self::Needed,
                "histogram_count" | "histogram_sum" | "histogram_avg" => Self::Skipped,
                _ => self,
            },
            _ => self,
        };
        if self == Self::Needed { self } else { own }
    }
}

pub(super) fn plan(text: &str, expr: &Expr, options: &EvalOptions) -> Result<Planned> {
    let outer = options.grid();
    let mut builder = Builder {
        options,
        outer,
        warnings: Vec::new(),
        lines: Lines::new(text),
        patterns: Patterns::default(),
        place: Place::default(),
        buckets: Buckets::Kept,
        counts: Counts::Steps,
    };
    let expr = expr.bare();
    let value_type = expr.value_type;
    if !options.instant && matches!(value_type, ValueType::Matrix | ValueType::String) {
        return Err(QueryError::bad_data(format!(
            "invalid expression type \"{}\" for range query, must be Scalar or instant Vector",
            value_type.documented()
        )));
    }
    let mut grid = outer;
    let (plan, text) = match &expr.kind {
        Kind::Text(text) => (None, Some(text.clone())),
        // JSON can't say it otherwise.
        Kind::Bytes(bytes) => (None, Some(String::from_utf8_lossy(bytes).into_owned())),
        Kind::Matrix(m) => {
            let selector = builder.selector(&m.selector, builder.length(&m.range)?)?;
            (Some(builder.node(Op::Samples(selector), outer, vec![])?), None)
        }
        Kind::Subquery(s) => {
            // The one window is the result, and its inner steps are the samples.
            (grid, _) = builder.subquery_grid(s, outer, RangeFunction::Last)?;
            builder.counts = Counts::Together(1);
            match grid.steps() {
                0 => (Some(builder.leaf(Op::Nothing, outer)?.plan), None),
                _ => (Some(builder.expr(&s.expr, grid)?.plan), None),
            }
        }
        _ => (Some(builder.expr(expr, outer)?.plan), None),
    };
    let plan = match plan {
        Some(plan) if options.features.delayed_name_removal && !matches!(expr.kind, Kind::Matrix(_)) => {
            Some(builder.node(Op::CleanNames, grid, vec![plan])?)
        }
        plan => plan,
    };
    Ok(Planned { plan, text, value_type, grid, warnings: builder.warnings })
}

/// Functions whose result depends on the evaluation time even when their arguments do not.
fn depends_on_time(function: &str) -> bool {
    matches!(
        function,
        "days_in_month"
            | "day_of_month"
            | "day_of_week"
            | "day_of_year"
            | "hour"
            | "minute"
            | "month"
            | "year"
            | "predict_linear"
            | "time"
            | "timestamp"
    )
}

/// Whether every step gives the same.
fn is_invariant(expr: &Expr) -> bool {
    match &expr.kind {
        Kind::Selector(s) => s.time.at.is_some(),
        Kind::Matrix(m) => m.selector.time.at.is_some(),
        Kind::Subquery(s) => s.time.at.is_some(),
        Kind::Call(c) => {
            let arguments = c.args.iter().all(is_invariant);
            match c.function.name {
                // The time of a sample, unlike that of an evaluation, is the same at every step.
                "timestamp" => arguments && c.args.first().is_some_and(|a| matches!(a.bare().kind, Kind::Selector(_))),
                name => arguments && !depends_on_time(name),
            }
        }
        _ => expr.children().all(is_invariant),
    }
}

impl Builder<'_> {
    fn node(&self, op: Op, grid: Grid, inputs: Vec<LogicalPlan>) -> Result<LogicalPlan> {
        Ok(Node::try_new(op, grid, self.place, inputs).map_err(QueryError::from)?.into_plan())
    }

    fn expr(&mut self, expr: &Expr, grid: Grid) -> Result<Built> {
        let expr = expr.bare();
        if grid.steps() > 1 && is_invariant(expr) && !matches!(expr.kind, Kind::Number(_)) {
            let around = self.counts;
            self.counts = match around {
                Counts::Steps | Counts::Every => Counts::Every,
                Counts::Together(times) => Counts::Together(times * grid.steps() as u64),
                Counts::Not => Counts::Not,
            };
            let once = self.expr_at(expr, Grid::instant(grid.start_ms))?;
            self.counts = around;
            return Ok(Built { plan: self.node(Op::Repeat, grid, vec![once.plan])?, distinct: once.distinct });
        }
        deep(|| self.expr_at(expr, grid))
    }

    fn expr_at(&mut self, expr: &Expr, grid: Grid) -> Result<Built> {
        let place = self.place_of(expr);
        let around = (self.place, self.buckets);
        (self.place, self.buckets) = (place, self.buckets.within(expr));
        let built = self.kind(expr, grid)?;
        (self.place, self.buckets) = around;
        Ok(built)
    }

    /// Where an expression and its first operands stand.
    fn place_of(&self, expr: &Expr) -> Place {
        let at = |e: Option<&Expr>| e.map_or_else(Position::default, |e| self.lines.position(e.span.start));
        let whole = at(Some(expr));
        let (input, param) = match &expr.kind {
            Kind::Call(c) => {
                let args = || c.args.iter().map(Expr::bare);
                let vector = args().find(|a| matches!(a.value_type, ValueType::Vector | ValueType::Matrix));
                (at(vector), at(args().find(|a| a.value_type == ValueType::Scalar)))
            }
            Kind::Aggregate(a) => (at(Some(&a.expr)), at(a.param.as_deref())),
            _ => (whole, whole),
        };
        Place { whole, input, param, counts: self.counts }
    }

    fn kind(&mut self, expr: &Expr, grid: Grid) -> Result<Built> {
        match &expr.kind {
            Kind::Number(n) => self.leaf(Op::Number(Float::new(n.value)), grid),
            Kind::Selector(v) => self.vector_selector(v, grid, Reading::Instant),
            Kind::Aggregate(a) => self.aggregate(a, grid),
            Kind::Unary(u) if u.negative => self.unary(&u.expr, grid),
            Kind::Unary(u) => self.expr(&u.expr, grid),
            Kind::Binary(b) => self.binary(b, grid),
            Kind::Call(c) => self.call(c, grid),
            Kind::Paren(inner) => self.expr(inner, grid),
            Kind::Matrix(_) | Kind::Subquery(_) | Kind::Text(_) | Kind::Bytes(_) => Err(unchecked(expr)),
        }
    }

    fn leaf(&self, op: Op, grid: Grid) -> Result<Built> {
        Ok(Built { plan: self.node(op, grid, vec![])?, distinct: true })
    }

    /// What becomes of the name in an operation that changes the meaning of values.
    fn dropping(&self) -> Name {
        if self.options.features.delayed_name_removal { Name::DropLater } else { Name::Drop }
    }

    /// A node that drops names; unless its series are known to stay distinct, equal labels are looked for.
    fn renaming(&self, op: Op, grid: Grid, inputs: Vec<LogicalPlan>, distinct: bool, strict: bool) -> Result<Built> {
        let mut plan = self.node(op, grid, inputs)?;
        if !distinct && self.dropping() == Name::Drop {
            plan = self.node(Op::Merge { strict }, grid, vec![plan])?;
        }
        Ok(Built { plan, distinct: self.dropping() == Name::Drop || distinct })
    }

    fn at_millis(&self, time: &ast::Time) -> Option<i64> {
        time.at.map(|at| match at {
            At::Start => self.outer.start_ms,
            At::End => self.outer.end_ms,
            At::Time(ms) => ms,
        })
    }

    fn selector(&self, s: &ast::Selector, length_ms: i64) -> Result<Selector> {
        let edges = s.edges.map(|edges| match edges {
            ast::Edges::Anchored => Edges::Anchored,
            ast::Edges::Smoothed => Edges::Smoothed,
        });
        let (source, matchers) = Source::of(s.selection());
        Ok(Selector {
            source,
            matchers,
            length_ms,
            offset_ms: self.offset(&s.time)?,
            at_ms: self.at_millis(&s.time),
            edges: edges.map(|edges| (edges, self.options.lookback_ms)),
            by_type: self.options.features.type_and_unit_labels,
            without_buckets: self.buckets == Buckets::Skipped,
        })
    }

    fn vector_selector(&mut self, v: &ast::Selector, grid: Grid, reading: Reading) -> Result<Built> {
        let mut selector = self.selector(v, self.options.lookback_ms)?;
        // Only the value is read off the line between samples, and only a range has a start to anchor.
        let reading = match (reading, selector.edges) {
            (Reading::Instant, Some((Edges::Smoothed, reach))) => Reading::Smoothed(reach),
            (reading, _) => {
                selector.edges = None;
                reading
            }
        };
        let distinct = has_one_name(&selector);
        let keeps = !matches!(reading, Reading::Timestamp | Reading::StartTimestamp);
        let name = if keeps { Name::Keep } else { self.dropping() };
        let op = Op::Select { selector, reading, name };
        match name {
            Name::Keep => Ok(Built { plan: self.node(op, grid, vec![])?, distinct }),
            _ => self.renaming(op, grid, vec![], distinct, false),
        }
    }

    fn unary(&mut self, expr: &Expr, grid: Grid) -> Result<Built> {
        let input = self.expr(expr, grid)?;
        let name = self.dropping();
        self.renaming(Op::Map { function: MapFunction::Negate, name }, grid, vec![input.plan], input.distinct, false)
    }

    fn aggregate(&mut self, a: &ast::Aggregate, grid: Grid) -> Result<Built> {
        let by = Grouping { labels: a.labels.clone(), without: a.without };
        let op = match a.op {
            ast::AggregateOp::Sum => AggregateOp::Sum,
            ast::AggregateOp::Avg => AggregateOp::Avg,
            ast::AggregateOp::Min => AggregateOp::Min,
            ast::AggregateOp::Max => AggregateOp::Max,
            ast::AggregateOp::Count => AggregateOp::Count,
            ast::AggregateOp::Group => AggregateOp::Group,
            ast::AggregateOp::Stddev => AggregateOp::Stddev,
            ast::AggregateOp::Stdvar => AggregateOp::Stdvar,
            ast::AggregateOp::Quantile => AggregateOp::Quantile,
            ast::AggregateOp::Topk => AggregateOp::Topk,
            ast::AggregateOp::Bottomk => AggregateOp::Bottomk,
            ast::AggregateOp::Limitk => AggregateOp::Limitk,
            ast::AggregateOp::LimitRatio => AggregateOp::LimitRatio,
            ast::AggregateOp::CountValues => {
                let invalid = |name: &str| QueryError::execution(format!("invalid label name {name}"));
                let label = match a.param.as_deref().map(|p| &p.bare().kind) {
                    Some(Kind::Text(label)) if !label.is_empty() => label.clone(),
                    Some(Kind::Bytes(bytes)) => return Err(invalid(&go::quote_bytes(bytes))),
                    _ => return Err(invalid("\"\"")),
                };
                let distinct = label != METRIC_NAME && !by.keeps(METRIC_NAME.as_bytes());
                let input = self.expr(&a.expr, grid)?;
                let plan = self.node(Op::CountValues { label, by }, grid, vec![input.plan])?;
                return Ok(Built { plan, distinct });
            }
        };
        let input = self.expr(&a.expr, grid)?;
        let selects =
            matches!(op, AggregateOp::Topk | AggregateOp::Bottomk | AggregateOp::Limitk | AggregateOp::LimitRatio);
        let distinct = if selects { input.distinct } else { !by.keeps(METRIC_NAME.as_bytes()) };
        let mut inputs = vec![input.plan];
        if let Some(param) = &a.param {
            inputs.push(self.expr(param, grid)?.plan);
        }
        Ok(Built { plan: self.node(Op::Aggregate { op, by }, grid, inputs)?, distinct })
    }

    fn binary(&mut self, b: &ast::Binary, grid: Grid) -> Result<Built> {
        let (left, right) = (self.expr(&b.left, grid)?, self.expr(&b.right, grid)?);
        let labels = match &b.matching {
            None => Grouping { labels: vec![], without: true },
            Some(m) => Grouping { labels: m.labels.clone(), without: !m.on },
        };
        let op = match operator(b.op) {
            Operator::Set(op) => {
                let plan = self.node(Op::Set { op, labels }, grid, vec![left.plan, right.plan])?;
                return Ok(Built { plan, distinct: left.distinct && op != SetOp::Or });
            }
            Operator::Value(op) => op,
        };
        let bool = b.returns_bool;
        let filters = op.is_comparison() && !bool;
        let keeps = filters || op.is_trim();
        let name = if keeps { Name::Keep } else { self.dropping() };
        match (b.left.value_type, b.right.value_type) {
            (ValueType::Scalar, ValueType::Scalar) if op.is_trim() => {
                Err(QueryError::execution(format!("operator {:?} not allowed for Scalar operations", op.symbol())))
            }
            (ValueType::Scalar, ValueType::Scalar) => {
                let plan = self.node(Op::ScalarBinary(op), grid, vec![left.plan, right.plan])?;
                Ok(Built { plan, distinct: true })
            }
            (_, ValueType::Scalar) => {
                let op = Op::VectorScalar { op, swapped: false, bool, name };
                self.vector_scalar(op, grid, left, right, keeps)
            }
            (ValueType::Scalar, _) => {
                let op = Op::VectorScalar { op, swapped: true, bool, name };
                self.vector_scalar(op, grid, right, left, keeps)
            }
            _ => {
                // Between vectors, arithmetic removes the name at once also when removal is delayed otherwise.
                let name = if op.is_comparison() || keeps { name } else { Name::Drop };
                let matching = b.matching.as_ref().ok_or_else(|| unchecked(&b.left))?;
                let matching = Matching {
                    labels,
                    cardinality: matching.cardinality,
                    include: matching.include.clone(),
                    fill_left: matching.fill_left.map(Float::new),
                    fill_right: matching.fill_right.map(Float::new),
                };
                let plan =
                    self.node(Op::VectorBinary { op, bool, matching, name }, grid, vec![left.plan, right.plan])?;
                Ok(Built { plan, distinct: !keeps && name == Name::Drop })
            }
        }
    }

    fn vector_scalar(&self, op: Op, grid: Grid, vector: Built, scalar: Built, filters: bool) -> Result<Built> {
        let inputs = vec![vector.plan, scalar.plan];
        if filters {
            return Ok(Built { plan: self.node(op, grid, inputs)?, distinct: vector.distinct });
        }
        self.renaming(op, grid, inputs, vector.distinct, false)
    }

    /// The times at which a subquery's inner expression is evaluated, and its windows.
    fn subquery_grid(&self, s: &ast::Subquery, grid: Grid, function: RangeFunction) -> Result<(Grid, Subquery)> {
        let (offset_ms, length_ms, at_ms) = (self.offset(&s.time)?, self.length(&s.range)?, self.at_millis(&s.time));
        let step = s.step.as_ref().map(|step| self.length(step)).transpose()?;
        let step_ms = step.unwrap_or(self.options.default_step_ms).max(1);
        let first = at_ms.unwrap_or(grid.start_ms) - offset_ms;
        let last = at_ms.unwrap_or(grid.time(grid.steps().saturating_sub(1))) - offset_ms;
        // Steps are multiples of the step on the absolute time axis; the window is open on the left.
        let after = first.saturating_sub(length_ms);
        let mut start_ms = step_ms * (after / step_ms);
        if start_ms <= after {
            start_ms += step_ms;
        }
        let inner = Grid { start_ms, end_ms: last, step_ms };
        Ok((inner, Subquery { inner, length_ms, offset_ms, at_ms, function }))
    }

    fn offset(&self, time: &ast::Time) -> Result<i64> {
        match &time.offset {
            Length::Fixed(ms) => Ok(*ms),
            Length::Computed(expr) => duration::evaluate(expr, &self.spans(), true),
        }
    }

    fn length(&self, length: &Length) -> Result<i64> {
        match length {
            Length::Fixed(ms) => Ok(*ms),
            Length::Computed(expr) => duration::evaluate(expr, &self.spans(), false),
        }
    }

    /// What `step()` and `range()` mean.
    fn spans(&self) -> Spans {
        let step_ms = if self.options.instant { 0 } else { self.outer.step_ms };
        Spans { step_ms, range_ms: self.outer.end_ms - self.outer.start_ms }
    }

    /// A function of a range vector.
    fn range_call(&mut self, function: RangeFunction, range: &Expr, scalars: Vec<&Expr>, grid: Grid) -> Result<Built> {
        let keeps = matches!(function, RangeFunction::Last | RangeFunction::First);
        let name = if keeps { Name::Keep } else { self.dropping() };
        let mut arguments = Vec::new();
        for scalar in scalars {
            arguments.push(self.expr(scalar, grid)?.plan);
        }
        match &range.bare().kind {
            Kind::Matrix(m) => {
                let selector = self.selector(&m.selector, self.length(&m.range)?)?;
                let distinct = has_one_name(&selector);
                let op = Op::Select { selector, reading: Reading::Range(function), name };
                if keeps {
                    return Ok(Built { plan: self.node(op, grid, arguments)?, distinct });
                }
                self.renaming(op, grid, arguments, distinct, true)
            }
            Kind::Subquery(s) => {
                let (inner, subquery) = self.subquery_grid(s, grid, function)?;
                if inner.steps() == 0 {
                    // No inner step falls into any window.
                    return self.leaf(Op::Nothing, grid);
                }
                let steps_max = self.options.limits.subquery_steps_max;
                if inner.steps() > steps_max {
                    return Err(QueryError::execution(format!(
                        "subquery evaluates its inner expression at {} steps: at most {steps_max} are allowed",
                        inner.steps()
                    )));
                }
                let around = (self.buckets, self.counts);
                (self.buckets, self.counts) = (self.buckets.within(range.bare()), Counts::Not);
                let input = self.expr(&s.expr, inner)?;
                (self.buckets, self.counts) = around;
                let mut inputs = vec![input.plan];
                inputs.append(&mut arguments);
                let op = Op::Subquery { subquery, name };
                if keeps {
                    return Ok(Built { plan: self.node(op, grid, inputs)?, distinct: input.distinct });
                }
                self.renaming(op, grid, inputs, input.distinct, true)
            }
            _ => Err(unchecked(range)),
        }
    }

    fn call(&mut self, c: &ast::Call, grid: Grid) -> Result<Built> {
        let name = c.function.name;
        let args: Vec<&Expr> = c.args.iter().collect();
        for arg in &args {
            if let Kind::Matrix(ast::Matrix { selector: ast::Selector { edges: Some(edges), .. }, .. }) =
                &arg.bare().kind
            {
                check_edges(*edges, name)?;
            }
        }
        if name.starts_with("sort") && !self.options.instant {
            let text = "sort is ineffective for range queries since results are always ordered by labels";
            self.warnings.push((self.place.whole, text.to_owned()));
        }
        if let Some(function) = range_function(name) {
            // The range vector stands last in quantile_over_time only.
            let at = usize::from(function == RangeFunction::Quantile);
            let range = args.get(at).copied().ok_or_else(|| missing(name))?;
            let scalars = args.iter().enumerate().filter(|(i, _)| *i != at).map(|(_, a)| *a).collect();
            return self.range_call(function, range, scalars, grid);
        }
        if let Some(function) = map_function(name) {
            return self.map_call(function, &args, grid);
        }
        let first = || args.first().copied().ok_or_else(|| missing(name));
        match name {
            "time" => self.leaf(Op::Time, grid),
            "pi" => self.leaf(Op::Number(Float::new(std::f64::consts::PI)), grid),
            "start" => self.leaf(Op::Number(Float::new(self.outer.start_ms as f64 / 1000.0)), grid),
            "end" => self.leaf(Op::Number(Float::new(self.outer.end_ms as f64 / 1000.0)), grid),
            "step" => self.leaf(Op::Number(Float::new(self.spans().step_ms as f64 / 1000.0)), grid),
            "range" => self.leaf(Op::Number(Float::new(self.spans().range_ms as f64 / 1000.0)), grid),
            "vector" => Ok(Built { plan: self.expr(first()?, grid)?.plan, distinct: true }),
            "scalar" => {
                let input = self.expr(first()?, grid)?;
                Ok(Built { plan: self.node(Op::Scalar, grid, vec![input.plan])?, distinct: true })
            }
            "absent" => {
                let input = self.expr(first()?, grid)?;
                let labels = absent_labels(first()?);
                Ok(Built { plan: self.node(Op::Absent { labels }, grid, vec![input.plan])?, distinct: true })
            }
            "absent_over_time" => {
                let input = self.range_call_keeping(RangeFunction::Present, first()?, grid)?;
                let labels = absent_labels(first()?);
                Ok(Built { plan: self.node(Op::Absent { labels }, grid, vec![input])?, distinct: true })
            }
            "sort" | "sort_desc" => {
                let input = self.expr(first()?, grid)?;
                let op = Op::Sort { descending: name == "sort_desc" };
                Ok(Built { plan: self.node(op, grid, vec![input.plan])?, distinct: input.distinct })
            }
            "sort_by_label" | "sort_by_label_desc" => {
                let input = self.expr(first()?, grid)?;
                let labels = args[1..].iter().map(|a| text(a)).collect::<Result<Vec<_>>>()?;
                let op = Op::SortByLabel { labels, descending: name == "sort_by_label_desc" };
                Ok(Built { plan: self.node(op, grid, vec![input.plan])?, distinct: input.distinct })
            }
            "label_replace" => self.label_replace(&args, grid),
            "label_join" => self.label_join(&args, grid),
            "histogram_quantile" | "histogram_fraction" => {
                let quantile = name == "histogram_quantile";
                let mut inputs = Vec::new();
                for a in &args {
                    inputs.push(self.expr(a, grid)?.plan);
                }
                let function = if quantile { HistogramFunction::Quantile } else { HistogramFunction::Fraction };
                let op = Op::Histogram { function, name: self.dropping() };
                self.renaming(op, grid, inputs, false, false)
            }
            "histogram_quantiles" => {
                let [buckets, label, quantiles @ ..] = args.as_slice() else { return Err(missing(name)) };
                let mut inputs = Vec::new();
                for q in quantiles {
                    inputs.push(self.expr(q, grid)?.plan);
                }
                inputs.push(self.expr(buckets, grid)?.plan);
                let function = HistogramFunction::Quantiles(text(label)?);
                let op = Op::Histogram { function, name: self.dropping() };
                self.renaming(op, grid, inputs, false, false)
            }
            "info" => self.info(first()?, args.get(1).copied(), grid),
            "start_timestamp" => match &first()?.bare().kind {
                Kind::Selector(v) => self.vector_selector(v, grid, Reading::StartTimestamp),
                // The result of an operation never began.
                _ => {
                    self.expr(first()?, grid)?;
                    self.leaf(Op::Nothing, grid)
                }
            },
            _ => Err(QueryError::bad_data(format!("parse error: unknown function with name \"{name}\""))),
        }
    }

    fn info(&mut self, of: &Expr, by: Option<&Expr>, grid: Grid) -> Result<Built> {
        let input = self.expr(of, grid)?;
        let given: &[Matcher] = match by.map(|by| &by.bare().kind) {
            Some(Kind::Selector(s)) => &s.matchers,
            _ => &[],
        };
        let (mut names, matchers): (Vec<Matcher>, Vec<Matcher>) =
            given.iter().cloned().partition(|m| m.name() == METRIC_NAME);
        if names.is_empty() {
            names.push(Matcher::equal(METRIC_NAME, "target_info"));
        } else if !names.iter().any(|m| matches!(m.op(), MatchOp::Eq | MatchOp::Re)) {
            names.insert(0, Matcher::new(METRIC_NAME, MatchOp::Re, ".+_info")?);
        }
        let (at_ms, offset_ms) = self.time_of_first_selector(of)?.unwrap_or((None, 0));
        let selector = Selector {
            source: None,
            matchers: names.iter().chain(&matchers).cloned().collect(),
            length_ms: self.options.lookback_ms,
            offset_ms,
            at_ms,
            edges: None,
            by_type: false,
            without_buckets: false,
        };
        let op = Op::Select { selector, reading: Reading::FloatTimestamp, name: Name::Keep };
        let info = self.node(op, grid, vec![])?;
        let plan = self.node(Op::Info { matchers, names }, grid, vec![input.plan, info])?;
        Ok(Built { plan, distinct: input.distinct })
    }

    /// The time and the offset at which the first selector in an expression is looked at.
    fn time_of_first_selector(&self, expr: &Expr) -> Result<Option<(Option<i64>, i64)>> {
        let own = |time: &ast::Time| -> Result<(Option<i64>, i64)> { Ok((self.at_millis(time), self.offset(time)?)) };
        match &expr.kind {
            Kind::Selector(s) => own(&s.time).map(Some),
            Kind::Matrix(m) => own(&m.selector.time).map(Some),
            Kind::Subquery(s) => match self.time_of_first_selector(&s.expr)? {
                // What is fixed within is not moved from without.
                Some((None, inner)) => own(&s.time).map(|(at, outer)| Some((at, inner + outer))),
                fixed => Ok(fixed),
            },
            _ => {
                for child in expr.children() {
                    if let Some(found) = self.time_of_first_selector(child)? {
                        return Ok(Some(found));
                    }
                }
                Ok(None)
            }
        }
    }

    /// A range function whose labels nobody looks at, so that equal ones do no harm.
    fn range_call_keeping(&mut self, function: RangeFunction, range: &Expr, grid: Grid) -> Result<LogicalPlan> {
        match &range.bare().kind {
            Kind::Matrix(m) => {
                let selector = self.selector(&m.selector, self.length(&m.range)?)?;
                let op = Op::Select { selector, reading: Reading::Range(function), name: Name::Keep };
                self.node(op, grid, vec![])
            }
            _ => Ok(self.range_call(RangeFunction::Last, range, vec![], grid)?.plan),
        }
    }

    fn map_call(&mut self, function: MapFunction, args: &[&Expr], grid: Grid) -> Result<Built> {
        if function == MapFunction::Timestamp
            && let Some(Kind::Selector(v)) = args.first().map(|a| &a.bare().kind)
        {
            return self.vector_selector(v, grid, Reading::Timestamp);
        }
        if matches!(function, MapFunction::MinOf | MapFunction::MaxOf) {
            let inputs = vec![self.expr(args[0], grid)?.plan, self.expr(args[1], grid)?.plan];
            let plan = self.node(Op::Map { function, name: Name::Keep }, grid, inputs)?;
            return Ok(Built { plan, distinct: true });
        }
        let Some(first) = args.first() else {
            // The date functions take the evaluation time when they get no argument.
            let time = self.leaf(Op::Time, grid)?;
            let plan = self.node(Op::Map { function, name: Name::Keep }, grid, vec![time.plan])?;
            return Ok(Built { plan, distinct: true });
        };
        let input = self.expr(first, grid)?;
        let mut inputs = vec![input.plan];
        for scalar in &args[1..] {
            inputs.push(self.expr(scalar, grid)?.plan);
        }
        self.renaming(Op::Map { function, name: self.dropping() }, grid, inputs, input.distinct, false)
    }

    fn label_replace(&mut self, args: &[&Expr], grid: Grid) -> Result<Built> {
        let input = self.expr(args[0], grid)?;
        let mut texts = args[1..].iter().map(|a| text(a));
        let mut next = || texts.next().unwrap_or_else(|| Err(missing("label_replace")));
        let (to, replacement, from, pattern) = (next()?, next()?, next()?, next()?);
        if to.is_empty() {
            return Err(QueryError::execution(format!("invalid destination label name in label_replace(): {to}")));
        }
        self.patterns.anchored(&pattern).map_err(|e| match e.kind() {
            ErrorKind::LimitExceeded => QueryError::from(e),
            _ => QueryError::execution(format!("invalid regular expression in label_replace(): {pattern}")),
        })?;
        let distinct = input.distinct && to != METRIC_NAME;
        let plan = self.node(Op::LabelReplace { to, replacement, from, pattern }, grid, vec![input.plan])?;
        Ok(Built { plan: self.node(Op::Merge { strict: false }, grid, vec![plan])?, distinct })
    }

    fn label_join(&mut self, args: &[&Expr], grid: Grid) -> Result<Built> {
        let input = self.expr(args[0], grid)?;
        let texts = args[1..].iter().map(|a| text(a)).collect::<Result<Vec<_>>>()?;
        let [to, separator, from @ ..] = texts.as_slice() else { return Err(missing("label_join")) };
        if let Some(bad) = from.iter().find(|l| l.is_empty()) {
            return Err(QueryError::execution(format!("invalid source label name in label_join(): {bad}")));
        }
        if to.is_empty() {
            return Err(QueryError::execution(format!("invalid destination label name in label_join(): {to}")));
        }
        let distinct = input.distinct && to != METRIC_NAME;
        let op = Op::LabelJoin { to: to.clone(), separator: separator.clone(), from: from.to_vec() };
        let plan = self.node(op, grid, vec![input.plan])?;
        Ok(Built { plan: self.node(Op::Merge { strict: false }, grid, vec![plan])?, distinct })
    }
}

fn missing(function: &str) -> QueryError {
    QueryError::bad_data(format!("parse error: too few arguments in call to \"{function}\""))
}

fn text(expr: &Expr) -> Result<String> {
    match &expr.bare().kind {
        Kind::Text(text) => Ok(text.clone()),
        Kind::Bytes(bytes) => Err(QueryError::bad_data(format!("text {} is not UTF-8", go::quote_bytes(bytes)))),
        _ => Err(unchecked(expr)),
    }
}

/// Functions that know what to do with values at the edges of a window.
fn check_edges(edges: ast::Edges, function: &str) -> Result<()> {
    let (modifier, functions): (_, &[&str]) = match edges {
        ast::Edges::Anchored => ("anchored", &["changes", "delta", "increase", "rate", "resets"]),
        ast::Edges::Smoothed => ("smoothed", &["delta", "increase", "rate"]),
    };
    if functions.contains(&function) {
        return Ok(());
    }
    Err(QueryError::execution(format!(
        "{modifier} modifier can only be used with: {} - not with {function}",
        functions.join(", ")
    )))
}

/// Something that the check of types lets nobody plan.
fn unchecked(expr: &Expr) -> QueryError {
    QueryError::internal(format!("{} stands where it must not: {expr}", expr.value_type.documented()))
}

/// Whether all series have the same name.
fn has_one_name(selector: &Selector) -> bool {
    selector.source.is_some() || selector.matchers.iter().any(|m| m.name() == METRIC_NAME && m.op() == MatchOp::Eq)
}

/// The labels that `absent` can tell: those of `=` matchers of which there is one for the label.
fn absent_labels(expr: &Expr) -> Vec<u8> {
    let matchers: &[Matcher] = match &expr.bare().kind {
        Kind::Selector(s) => &s.matchers,
        Kind::Matrix(m) => &m.selector.matchers,
        _ => return Vec::new(),
    };
    let mut out = Vec::new();
    let mut seen: Vec<&str> = Vec::new();
    for m in matchers.iter().filter(|m| m.name() != METRIC_NAME) {
        let first = !seen.contains(&m.name());
        let equal = m.op() == MatchOp::Eq;
        let value = if equal && first { m.value() } else { "" };
        let mut next = Vec::new();
        labels::set(&out, m.name(), value, &mut next);
        out = next;
        if equal {
            seen.push(m.name());
        }
    }
    out
}

/// Operators by how they are evaluated.
enum Operator {
    Value(BinaryOp),
    Set(SetOp),
}

fn operator(op: ast::Operator) -> Operator {
    use ast::Operator as O;
    Operator::Value(match op {
        O::Add => BinaryOp::Add,
        O::Sub => BinaryOp::Sub,
        O::Mul => BinaryOp::Mul,
        O::Div => BinaryOp::Div,
        O::Mod => BinaryOp::Mod,
        O::Pow => BinaryOp::Pow,
        O::Atan2 => BinaryOp::Atan2,
        O::Eq => BinaryOp::Eq,
        O::Ne => BinaryOp::Ne,
        O::Lt => BinaryOp::Lt,
        O::Le => BinaryOp::Le,
        O::Gt => BinaryOp::Gt,
        O::Ge => BinaryOp::Ge,
        O::TrimUpper => BinaryOp::TrimUpper,
        O::TrimLower => BinaryOp::TrimLower,
        O::And => return Operator::Set(SetOp::And),
        O::Or => return Operator::Set(SetOp::Or),
        O::Unless => return Operator::Set(SetOp::Unless),
    })
}

fn range_function(name: &str) -> Option<RangeFunction> {
    use RangeFunction as F;
    Some(match name {
        "rate" => F::Rate,
        "increase" => F::Increase,
        "delta" => F::Delta,
        "irate" => F::Irate,
        "idelta" => F::Idelta,
        "changes" => F::Changes,
        "resets" => F::Resets,
        "avg_over_time" => F::Avg,
        "min_over_time" => F::Min,
        "max_over_time" => F::Max,
        "sum_over_time" => F::Sum,
        "count_over_time" => F::Count,
        "last_over_time" => F::Last,
        "first_over_time" => F::First,
        "present_over_time" => F::Present,
        "stddev_over_time" => F::Stddev,
        "stdvar_over_time" => F::Stdvar,
        "quantile_over_time" => F::Quantile,
        "deriv" => F::Deriv,
        "predict_linear" => F::PredictLinear,
        "mad_over_time" => F::Mad,
        "double_exponential_smoothing" => F::DoubleExponential,
        "ts_of_first_over_time" => F::TsOfFirst,
        "ts_of_last_over_time" => F::TsOfLast,
        "ts_of_min_over_time" => F::TsOfMin,
        "ts_of_max_over_time" => F::TsOfMax,
        _ => return None,
    })
}

fn map_function(name: &str) -> Option<MapFunction> {
    use MapFunction as F;
    Some(match name {
        "abs" => F::Abs,
        "acos" => F::Acos,
        "acosh" => F::Acosh,
        "asin" => F::Asin,
        "asinh" => F::Asinh,
        "atan" => F::Atan,
        "atanh" => F::Atanh,
        "ceil" => F::Ceil,
        "clamp" => F::Clamp,
        "clamp_max" => F::ClampMax,
        "clamp_min" => F::ClampMin,
        "cos" => F::Cos,
        "cosh" => F::Cosh,
        "day_of_month" => F::DayOfMonth,
        "day_of_week" => F::DayOfWeek,
        "day_of_year" => F::DayOfYear,
        "days_in_month" => F::DaysInMonth,
        "deg" => F::Deg,
        "exp" => F::Exp,
        "floor" => F::Floor,
        "histogram_avg" => F::HistogramAvg,
        "histogram_count" => F::HistogramCount,
        "histogram_stddev" => F::HistogramStddev,
        "histogram_stdvar" => F::HistogramStdvar,
        "histogram_sum" => F::HistogramSum,
        "hour" => F::Hour,
        "ln" => F::Ln,
        "log10" => F::Log10,
        "log2" => F::Log2,
        "minute" => F::Minute,
        "month" => F::Month,
        "rad" => F::Rad,
        "round" => F::Round,
        "sgn" => F::Sgn,
        "sin" => F::Sin,
        "sinh" => F::Sinh,
        "sqrt" => F::Sqrt,
        "tan" => F::Tan,
        "tanh" => F::Tanh,
        "timestamp" => F::Timestamp,
        "year" => F::Year,
        "min_of" => F::MinOf,
        "max_of" => F::MaxOf,
        _ => return None,
    })
}
