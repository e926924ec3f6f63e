//! The syntax tree to nodes: one match that calls one function per kind.

use std::time::{Duration, SystemTime};

use catalog::tag::METRIC_NAME;
use datafusion::logical_expr::LogicalPlan;
use engine::kernels::RangeFunction;
use promql_parser::label::{MatchOp, Matchers};
use promql_parser::parser::token::{self, TokenType};
use promql_parser::parser::value::ValueType as AstType;
use promql_parser::parser::{
    AggregateExpr, AtModifier, BinaryExpr, Call, Expr, LabelModifier, Offset, SubqueryExpr, VectorMatchCardinality,
    VectorSelector,
};

use super::ops::{
    AggregateOp, BinaryOp, Cardinality, Float, HistogramFunction, LabelMatcher, MapFunction, Matching, Op, Reading,
    Selector, SetOp, Subquery,
};
use super::{Node, Planned};
use crate::block::Name;
use crate::exec::deep;
use crate::labels::{self, Grouping};
use crate::options::{EvalOptions, Grid};
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
    warnings: Vec<String>,
}

/// Deepest nesting of expressions that is planned: every level is planned and polled within the one above.
const DEPTH_MAX: usize = 500;

pub(super) fn plan(expr: &Expr, options: &EvalOptions) -> Result<Planned> {
    if depth(expr, 0) > DEPTH_MAX {
        return Err(QueryError::bad_data(format!("expression is nested too deeply: at most {DEPTH_MAX} levels")));
    }
    let outer = options.grid();
    let mut builder = Builder { options, outer, warnings: Vec::new() };
    let expr = strip(expr);
    let value_type = match expr.value_type() {
        AstType::Scalar => ValueType::Scalar,
        AstType::Vector => ValueType::Vector,
        AstType::Matrix => ValueType::Matrix,
        AstType::String => ValueType::String,
    };
    if !options.instant && matches!(value_type, ValueType::Matrix | ValueType::String) {
        let got = if value_type == ValueType::Matrix { "range vector" } else { "string" };
        return Err(QueryError::bad_data(format!(
            "invalid expression type \"{got}\" for range query, must be Scalar or instant Vector"
        )));
    }
    let mut grid = outer;
    let (plan, text) = match expr {
        Expr::StringLiteral(s) => (None, Some(s.val.clone())),
        Expr::MatrixSelector(m) => {
            let selector = builder.selector(&m.vs, millis(m.range))?;
            (Some(builder.node(Op::Samples(selector), outer, vec![])?), None)
        }
        Expr::Subquery(s) => {
            // The one window is the result, and its inner steps are the samples.
            (grid, _) = builder.subquery_grid(s, outer, RangeFunction::Last);
            match grid.steps() {
                0 => (Some(builder.leaf(Op::Nothing, outer)?.plan), None),
                _ => (Some(builder.expr(&s.expr, grid)?.plan), None),
            }
        }
        _ => (Some(builder.expr(expr, outer)?.plan), None),
    };
    let plan = match plan {
        Some(plan) if options.features.delayed_name_removal && !matches!(expr, Expr::MatrixSelector(_)) => {
            Some(builder.node(Op::CleanNames, grid, vec![plan])?)
        }
        plan => plan,
    };
    Ok(Planned { plan, text, value_type, grid, warnings: builder.warnings })
}

fn depth(expr: &Expr, at: usize) -> usize {
    if at > DEPTH_MAX {
        return at;
    }
    let at = at + 1;
    match expr {
        Expr::Aggregate(a) => depth(&a.expr, at).max(a.param.as_ref().map_or(at, |p| depth(p, at))),
        Expr::Unary(u) => depth(&u.expr, at),
        Expr::Binary(b) => depth(&b.lhs, at).max(depth(&b.rhs, at)),
        Expr::Paren(p) => depth(&p.expr, at),
        Expr::Subquery(s) => depth(&s.expr, at),
        Expr::Call(c) => c.args.args.iter().map(|a| depth(a, at)).max().unwrap_or(at),
        Expr::NumberLiteral(_)
        | Expr::StringLiteral(_)
        | Expr::VectorSelector(_)
        | Expr::MatrixSelector(_)
        | Expr::Extension(_) => at,
    }
}

/// Without parentheses.
fn strip(mut expr: &Expr) -> &Expr {
    while let Expr::Paren(p) = expr {
        expr = &p.expr;
    }
    expr
}

fn millis(d: Duration) -> i64 {
    i64::try_from(d.as_millis()).unwrap_or(i64::MAX)
}

fn offset_millis(offset: &Option<Offset>) -> i64 {
    match offset {
        None => 0,
        Some(Offset::Pos(d)) => millis(*d),
        Some(Offset::Neg(d)) => -millis(*d),
    }
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
    match expr {
        Expr::VectorSelector(v) => v.at.is_some(),
        Expr::MatrixSelector(m) => m.vs.at.is_some(),
        Expr::Subquery(s) => s.at.is_some(),
        Expr::NumberLiteral(_) | Expr::StringLiteral(_) => true,
        Expr::Paren(p) => is_invariant(&p.expr),
        Expr::Unary(u) => is_invariant(&u.expr),
        Expr::Binary(b) => is_invariant(&b.lhs) && is_invariant(&b.rhs),
        Expr::Aggregate(a) => is_invariant(&a.expr) && a.param.as_ref().is_none_or(|p| is_invariant(p)),
        Expr::Call(c) => {
            let arguments = c.args.args.iter().all(|a| is_invariant(a));
            match c.func.name {
                // The time of a sample, unlike that of an evaluation, is the same at every step.
                "timestamp" => {
                    arguments && c.args.args.first().is_some_and(|a| matches!(strip(a), Expr::VectorSelector(_)))
                }
                name => arguments && !depends_on_time(name),
            }
        }
        Expr::Extension(_) => false,
    }
}

impl Builder<'_> {
    fn node(&self, op: Op, grid: Grid, inputs: Vec<LogicalPlan>) -> Result<LogicalPlan> {
        Ok(Node::try_new(op, grid, inputs).map_err(QueryError::from)?.into_plan())
    }

    fn expr(&mut self, expr: &Expr, grid: Grid) -> Result<Built> {
        let expr = strip(expr);
        if grid.steps() > 1 && is_invariant(expr) && !matches!(expr, Expr::NumberLiteral(_)) {
            let once = self.expr_at(expr, Grid::instant(grid.start_ms))?;
            return Ok(Built { plan: self.node(Op::Repeat, grid, vec![once.plan])?, distinct: once.distinct });
        }
        deep(|| self.expr_at(expr, grid))
    }

    fn expr_at(&mut self, expr: &Expr, grid: Grid) -> Result<Built> {
        match expr {
            Expr::NumberLiteral(n) => self.leaf(Op::Number(Float::new(n.val)), grid),
            Expr::VectorSelector(v) => self.vector_selector(v, grid, Reading::Instant),
            Expr::Aggregate(a) => self.aggregate(a, grid),
            Expr::Unary(u) => self.unary(&u.expr, grid),
            Expr::Binary(b) => self.binary(b, grid),
            Expr::Call(c) => self.call(c, grid),
            Expr::Paren(p) => self.expr(&p.expr, grid),
            Expr::MatrixSelector(_) | Expr::Subquery(_) => {
                Err(QueryError::bad_data("parse error: a range vector stands where an instant vector or scalar must"))
            }
            Expr::StringLiteral(_) => {
                Err(QueryError::bad_data("parse error: a string stands where an instant vector or scalar must"))
            }
            Expr::Extension(_) => Err(QueryError::internal("the parser made an extension node")),
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

    fn at_millis(&self, at: &Option<AtModifier>) -> Option<i64> {
        Some(match at.as_ref()? {
            AtModifier::Start => self.outer.start_ms,
            AtModifier::End => self.outer.end_ms,
            AtModifier::At(t) => match t.duration_since(SystemTime::UNIX_EPOCH) {
                Ok(d) => millis(d),
                Err(e) => -millis(e.duration()),
            },
        })
    }

    fn selector(&self, v: &VectorSelector, length_ms: i64) -> Result<Selector> {
        let mut matchers = Vec::new();
        if let Some(name) = &v.name {
            matchers.push(LabelMatcher { name: METRIC_NAME.into(), op: "=".into(), value: name.clone() });
        }
        matchers.extend(label_matchers(&v.matchers)?);
        for m in &matchers {
            m.compile()?;
        }
        Ok(Selector { matchers, length_ms, offset_ms: offset_millis(&v.offset), at_ms: self.at_millis(&v.at) })
    }

    fn vector_selector(&mut self, v: &VectorSelector, grid: Grid, reading: Reading) -> Result<Built> {
        let selector = self.selector(v, self.options.lookback_ms)?;
        let distinct = has_one_name(&selector);
        let name = if reading == Reading::Instant { Name::Keep } else { self.dropping() };
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

    fn aggregate(&mut self, a: &AggregateExpr, grid: Grid) -> Result<Built> {
        let by = match &a.modifier {
            None => Grouping { labels: vec![], without: false },
            Some(LabelModifier::Include(l)) => Grouping { labels: l.labels.clone(), without: false },
            Some(LabelModifier::Exclude(l)) => Grouping { labels: l.labels.clone(), without: true },
        };
        let op = match a.op.id() {
            token::T_SUM => AggregateOp::Sum,
            token::T_AVG => AggregateOp::Avg,
            token::T_MIN => AggregateOp::Min,
            token::T_MAX => AggregateOp::Max,
            token::T_COUNT => AggregateOp::Count,
            token::T_GROUP => AggregateOp::Group,
            token::T_STDDEV => AggregateOp::Stddev,
            token::T_STDVAR => AggregateOp::Stdvar,
            token::T_QUANTILE => AggregateOp::Quantile,
            token::T_TOPK => AggregateOp::Topk,
            token::T_BOTTOMK => AggregateOp::Bottomk,
            token::T_LIMITK => AggregateOp::Limitk,
            token::T_LIMIT_RATIO => AggregateOp::LimitRatio,
            token::T_COUNT_VALUES => {
                let label = text(a.param.as_deref(), "count_values")?;
                if label.is_empty() {
                    return Err(QueryError::execution("invalid label name \"\""));
                }
                let distinct = label != METRIC_NAME && !by.keeps(METRIC_NAME.as_bytes());
                let input = self.expr(&a.expr, grid)?;
                let plan = self.node(Op::CountValues { label, by }, grid, vec![input.plan])?;
                return Ok(Built { plan, distinct });
            }
            _ => return Err(QueryError::internal(format!("unknown aggregation {}", a.op))),
        };
        if matches!(op, AggregateOp::Limitk | AggregateOp::LimitRatio) && !self.options.features.experimental_functions
        {
            return Err(QueryError::bad_data(format!(
                "parse error: {}() is experimental and must be enabled with --enable-feature=promql-experimental-functions",
                a.op
            )));
        }
        let input = self.expr(&a.expr, grid)?;
        let selects =
            matches!(op, AggregateOp::Topk | AggregateOp::Bottomk | AggregateOp::Limitk | AggregateOp::LimitRatio);
        let distinct = if selects { input.distinct } else { !by.keeps(METRIC_NAME.as_bytes()) };
        let mut inputs = vec![input.plan];
        if selects || op == AggregateOp::Quantile {
            let param = a.param.as_deref().ok_or_else(|| {
                QueryError::bad_data(format!("parse error: no arguments for aggregate expression provided: {}", a.op))
            })?;
            inputs.push(self.expr(param, grid)?.plan);
        }
        Ok(Built { plan: self.node(Op::Aggregate { op, by }, grid, inputs)?, distinct })
    }

    fn binary(&mut self, b: &BinaryExpr, grid: Grid) -> Result<Built> {
        let (left, right) = (self.expr(&b.lhs, grid)?, self.expr(&b.rhs, grid)?);
        let modifier = b.modifier.clone().unwrap_or_default();
        let labels = match &modifier.matching {
            None => Grouping { labels: vec![], without: true },
            Some(LabelModifier::Include(l)) => Grouping { labels: l.labels.clone(), without: false },
            Some(LabelModifier::Exclude(l)) => Grouping { labels: l.labels.clone(), without: true },
        };
        if let Some(op) = set_op(b.op) {
            let plan = self.node(Op::Set { op, labels }, grid, vec![left.plan, right.plan])?;
            return Ok(Built { plan, distinct: left.distinct && op != SetOp::Or });
        }
        let op = binary_op(b.op)?;
        let bool = modifier.return_bool;
        let filters = op.is_comparison() && !bool;
        let name = if filters { Name::Keep } else { self.dropping() };
        match (b.lhs.value_type(), b.rhs.value_type()) {
            (AstType::Scalar, AstType::Scalar) => {
                let plan = self.node(Op::ScalarBinary(op), grid, vec![left.plan, right.plan])?;
                Ok(Built { plan, distinct: true })
            }
            (AstType::Vector, AstType::Scalar) => {
                let op = Op::VectorScalar { op, swapped: false, bool, name };
                self.vector_scalar(op, grid, left, right, filters)
            }
            (AstType::Scalar, AstType::Vector) => {
                let op = Op::VectorScalar { op, swapped: true, bool, name };
                self.vector_scalar(op, grid, right, left, filters)
            }
            _ => {
                // Between vectors, arithmetic removes the name at once also when removal is delayed otherwise.
                let name = if op.is_comparison() { name } else { Name::Drop };
                let (cardinality, include) = match &modifier.card {
                    VectorMatchCardinality::ManyToOne(l) => (Cardinality::ManyToOne, l.labels.clone()),
                    VectorMatchCardinality::OneToMany(l) => (Cardinality::OneToMany, l.labels.clone()),
                    _ => (Cardinality::OneToOne, vec![]),
                };
                let matching = Matching {
                    labels,
                    cardinality,
                    include,
                    fill_left: modifier.fill_values.lhs.map(Float::new),
                    fill_right: modifier.fill_values.rhs.map(Float::new),
                };
                let plan =
                    self.node(Op::VectorBinary { op, bool, matching, name }, grid, vec![left.plan, right.plan])?;
                Ok(Built { plan, distinct: !filters && name == Name::Drop })
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
    fn subquery_grid(&self, s: &SubqueryExpr, grid: Grid, function: RangeFunction) -> (Grid, Subquery) {
        let (offset_ms, length_ms, at_ms) = (offset_millis(&s.offset), millis(s.range), self.at_millis(&s.at));
        let step_ms = s.step.map_or(self.options.default_step_ms, millis).max(1);
        let first = at_ms.unwrap_or(grid.start_ms) - offset_ms;
        let last = at_ms.unwrap_or(grid.time(grid.steps().saturating_sub(1))) - offset_ms;
        // Steps are multiples of the step on the absolute time axis; the window is open on the left.
        let after = first.saturating_sub(length_ms);
        let mut start_ms = step_ms * (after / step_ms);
        if start_ms <= after {
            start_ms += step_ms;
        }
        let inner = Grid { start_ms, end_ms: last, step_ms };
        (inner, Subquery { inner, length_ms, offset_ms, at_ms, function })
    }

    /// A function of a range vector.
    fn range_call(&mut self, function: RangeFunction, range: &Expr, scalars: Vec<&Expr>, grid: Grid) -> Result<Built> {
        let keeps = matches!(function, RangeFunction::Last | RangeFunction::First);
        let name = if keeps { Name::Keep } else { self.dropping() };
        let mut arguments = Vec::new();
        for scalar in scalars {
            arguments.push(self.expr(scalar, grid)?.plan);
        }
        match strip(range) {
            Expr::MatrixSelector(m) => {
                let selector = self.selector(&m.vs, millis(m.range))?;
                let distinct = has_one_name(&selector);
                let op = Op::Select { selector, reading: Reading::Range(function), name };
                if keeps {
                    return Ok(Built { plan: self.node(op, grid, arguments)?, distinct });
                }
                self.renaming(op, grid, arguments, distinct, true)
            }
            Expr::Subquery(s) => {
                let (inner, subquery) = self.subquery_grid(s, grid, function);
                if inner.steps() == 0 {
                    // No inner step falls into any window.
                    return self.leaf(Op::Nothing, grid);
                }
                if inner.steps() > STEPS_MAX {
                    return Err(QueryError::execution(format!(
                        "subquery evaluates its inner expression at {} steps: at most {STEPS_MAX} are allowed",
                        inner.steps()
                    )));
                }
                let input = self.expr(&s.expr, inner)?;
                let mut inputs = vec![input.plan];
                inputs.append(&mut arguments);
                let op = Op::Subquery { subquery, name };
                if keeps {
                    return Ok(Built { plan: self.node(op, grid, inputs)?, distinct: input.distinct });
                }
                self.renaming(op, grid, inputs, input.distinct, true)
            }
            other => Err(QueryError::bad_data(format!(
                "parse error: expected type range vector in call to function, got {}",
                other.value_type()
            ))),
        }
    }

    fn call(&mut self, c: &Call, grid: Grid) -> Result<Built> {
        let name = c.func.name;
        let args: Vec<&Expr> = c.args.args.iter().map(|a| &**a).collect();
        if name.starts_with("sort") && !self.options.instant {
            let text =
                "PromQL warning: sort is ineffective for range queries since results are always ordered by labels";
            if !self.warnings.iter().any(|w| w == text) {
                self.warnings.push(text.to_owned());
            }
        }
        if c.func.experimental && !self.options.features.experimental_functions {
            return Err(QueryError::bad_data(format!("parse error: function \"{name}\" is not enabled")));
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
            "step" => {
                let step = if self.options.instant { 0 } else { self.outer.step_ms };
                self.leaf(Op::Number(Float::new(step as f64 / 1000.0)), grid)
            }
            "range" => {
                let range = self.outer.end_ms - self.outer.start_ms;
                self.leaf(Op::Number(Float::new(range as f64 / 1000.0)), grid)
            }
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
                let labels = args[1..].iter().map(|a| text(Some(a), name)).collect::<Result<Vec<_>>>()?;
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
            // These look at native histograms only; float samples have no answer.
            "histogram_avg" | "histogram_count" | "histogram_sum" | "histogram_stddev" | "histogram_stdvar" => {
                self.expr(first()?, grid)?;
                self.leaf(Op::Nothing, grid)
            }
            _ => Err(QueryError::bad_data(format!("parse error: unknown function with name \"{name}\""))),
        }
    }

    /// A range function whose labels nobody looks at, so that equal ones do no harm.
    fn range_call_keeping(&mut self, function: RangeFunction, range: &Expr, grid: Grid) -> Result<LogicalPlan> {
        match strip(range) {
            Expr::MatrixSelector(m) => {
                let selector = self.selector(&m.vs, millis(m.range))?;
                let op = Op::Select { selector, reading: Reading::Range(function), name: Name::Keep };
                self.node(op, grid, vec![])
            }
            _ => Ok(self.range_call(RangeFunction::Last, range, vec![], grid)?.plan),
        }
    }

    fn map_call(&mut self, function: MapFunction, args: &[&Expr], grid: Grid) -> Result<Built> {
        if function == MapFunction::Timestamp
            && let Some(Expr::VectorSelector(v)) = args.first().map(|a| strip(a))
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
        let mut texts = args[1..].iter().map(|a| text(Some(a), "label_replace"));
        let mut next = || texts.next().unwrap_or_else(|| Err(missing("label_replace")));
        let (to, replacement, from, pattern) = (next()?, next()?, next()?, next()?);
        if to.is_empty() {
            return Err(QueryError::execution(format!("invalid destination label name in label_replace(): {to}")));
        }
        if catalog::matcher::anchored(&pattern).is_err() {
            return Err(QueryError::execution(format!("invalid regular expression in label_replace(): {pattern}")));
        }
        let distinct = input.distinct && to != METRIC_NAME;
        let plan = self.node(Op::LabelReplace { to, replacement, from, pattern }, grid, vec![input.plan])?;
        Ok(Built { plan: self.node(Op::Merge { strict: false }, grid, vec![plan])?, distinct })
    }

    fn label_join(&mut self, args: &[&Expr], grid: Grid) -> Result<Built> {
        let input = self.expr(args[0], grid)?;
        let texts = args[1..].iter().map(|a| text(Some(a), "label_join")).collect::<Result<Vec<_>>>()?;
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

/// Most steps of a subquery's inner grid: a row of them is held in memory per series.
const STEPS_MAX: usize = 2_000_000;

fn missing(function: &str) -> QueryError {
    QueryError::bad_data(format!("parse error: too few arguments in call to \"{function}\""))
}

fn text(expr: Option<&Expr>, function: &str) -> Result<String> {
    match expr.map(strip) {
        Some(Expr::StringLiteral(s)) => Ok(s.val.clone()),
        _ => Err(QueryError::bad_data(format!("parse error: expected type string in call to \"{function}\""))),
    }
}

/// The matchers of a selector without its name, for plans and for the API's `match[]`.
pub fn label_matchers(matchers: &Matchers) -> Result<Vec<LabelMatcher>> {
    if !matchers.or_matchers.is_empty() {
        return Err(QueryError::bad_data("parse error: unexpected \"or\" in label matching, expected \",\" or \"}\""));
    }
    let matchers = matchers.matchers.iter().map(|m| {
        let (op, value) = match &m.op {
            MatchOp::Equal => ("=", m.value.clone()),
            MatchOp::NotEqual => ("!=", m.value.clone()),
            // The parser escapes braces that Go takes literally; it wraps the pattern as `^(?:pattern)$`.
            MatchOp::Re(r) => ("=~", unwrapped(r.as_str(), &m.value)),
            MatchOp::NotRe(r) => ("!~", unwrapped(r.as_str(), &m.value)),
        };
        LabelMatcher { name: m.name.clone(), op: op.into(), value }
    });
    Ok(matchers.collect())
}

fn unwrapped(wrapped: &str, original: &str) -> String {
    wrapped.strip_prefix("^(?:").and_then(|w| w.strip_suffix(")$")).unwrap_or(original).to_owned()
}

/// Whether all series have the same name.
fn has_one_name(selector: &Selector) -> bool {
    selector.matchers.iter().any(|m| m.name == METRIC_NAME && m.op == "=")
}

/// The labels that `absent` can tell: those of `=` matchers of which there is one for the label.
fn absent_labels(expr: &Expr) -> Vec<u8> {
    let matchers = match strip(expr) {
        Expr::VectorSelector(v) => &v.matchers.matchers,
        Expr::MatrixSelector(m) => &m.vs.matchers.matchers,
        _ => return Vec::new(),
    };
    let mut out = Vec::new();
    let mut seen: Vec<&str> = Vec::new();
    for m in matchers.iter().filter(|m| m.name != METRIC_NAME) {
        let first = !seen.contains(&m.name.as_str());
        let equal = m.op == MatchOp::Equal;
        let value = if equal && first { m.value.as_str() } else { "" };
        let mut next = Vec::new();
        labels::set(&out, &m.name, value, &mut next);
        out = next;
        if equal {
            seen.push(&m.name);
        }
    }
    out
}

fn set_op(op: TokenType) -> Option<SetOp> {
    match op.id() {
        token::T_LAND => Some(SetOp::And),
        token::T_LOR => Some(SetOp::Or),
        token::T_LUNLESS => Some(SetOp::Unless),
        _ => None,
    }
}

fn binary_op(op: TokenType) -> Result<BinaryOp> {
    Ok(match op.id() {
        token::T_ADD => BinaryOp::Add,
        token::T_SUB => BinaryOp::Sub,
        token::T_MUL => BinaryOp::Mul,
        token::T_DIV => BinaryOp::Div,
        token::T_MOD => BinaryOp::Mod,
        token::T_POW => BinaryOp::Pow,
        token::T_ATAN2 => BinaryOp::Atan2,
        token::T_EQLC => BinaryOp::Eq,
        token::T_NEQ => BinaryOp::Ne,
        token::T_LSS => BinaryOp::Lt,
        token::T_LTE => BinaryOp::Le,
        token::T_GTR => BinaryOp::Gt,
        token::T_GTE => BinaryOp::Ge,
        _ => return Err(QueryError::bad_data(format!("parse error: unknown operator \"{op}\""))),
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
