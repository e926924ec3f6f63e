//! Time buckets as groups: filling those that have no rows, and telling aggregates over samples which bucket is theirs.
//!
//! `GROUP BY time_bucket_gapfill('5m', ts)` gives a row for each bucket between start and finish in each group of the
//! other keys, as TimescaleDB does. Start and finish are arguments, or else what `WHERE` says of the time. In rows that
//! were made keys are those of their group and all else is null; `locf(...)` carries the last value forward and
//! `interpolate(...)` draws a line between neighbours.
//!
//! The rule [`TimeBuckets`] puts a [`GapFill`] between the aggregate and the select list; [`GapFillExec`] asks for its
//! rows in the order of keys and time, and makes rows as they are asked for.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float64Array, Float64Builder, UInt32Array, UInt32Builder};
use arrow::compute::{SortOptions, cast, concat_batches, take};
use arrow::datatypes::{DataType, Field, Float64Type, Int64Type, Schema, SchemaRef};
use arrow::record_batch::{RecordBatch, RecordBatchOptions};
use arrow::row::{RowConverter, SortField};
use async_trait::async_trait;
use datafusion::catalog::Session;
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TreeNode, TreeNodeRecursion};
use datafusion::common::{Column, DFSchema, DFSchemaRef, ScalarValue};
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::memory_pool::{MemoryConsumer, MemoryReservation};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::logical_expr::expr::{AggregateFunction, Alias, ScalarFunction};
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::physical_planning_context::PhysicalPlanningContext;
use datafusion::logical_expr::utils::split_conjunction;
use datafusion::logical_expr::{
    Aggregate, Between, BinaryExpr, ColumnarValue, Expr, ExprSchemable, Extension, Filter, LogicalPlan, Operator,
    Projection, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Sort, UserDefinedLogicalNode,
    UserDefinedLogicalNodeCore, Volatility,
};
use datafusion::optimizer::AnalyzerRule;
use datafusion::physical_expr::expressions::Column as PhysicalColumn;
use datafusion::physical_expr::{
    EquivalenceProperties, LexOrdering, OrderingRequirements, Partitioning, PhysicalExpr, PhysicalSortExpr,
    create_physical_expr,
};
use datafusion::physical_plan::execution_plan::{Boundedness, EmissionType};
use datafusion::physical_plan::metrics::{BaselineMetrics, ExecutionPlanMetricsSet, MetricsSet};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, Distribution, ExecutionPlan, InputDistributionRequirements, PlanProperties,
};
use datafusion::physical_planner::{ExtensionPlanner, PhysicalPlanner};
use engine::{Error, Stop};
use futures::{StreamExt, stream};

use super::bucket::{Bucket, TIME_BUCKET, TimeBucket, refused};
use super::samples::OVER_SAMPLES;
use crate::table::external;

/// The name that asks for gaps to be filled.
const GAPFILL: &str = "time_bucket_gapfill";
/// Most buckets of one group.
const BUCKETS_MAX: i64 = 100_000;
/// Rows of a batch.
const BATCH_ROWS: usize = 8192;

/// The functions that only mean something together with [`GapFill`].
pub fn functions() -> Vec<ScalarUDF> {
    let mark = |name| ScalarUDF::new_from_impl(Mark { name, signature: Signature::any(1, Volatility::Immutable) });
    vec![ScalarUDF::new_from_impl(TimeBucket::new(GAPFILL)), mark("locf"), mark("interpolate")]
}

/// `locf` and `interpolate`.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Mark {
    name: &'static str,
    signature: Signature,
}

impl ScalarUDFImpl for Mark {
    fn name(&self) -> &str {
        self.name
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, given: &[DataType]) -> Result<DataType> {
        Ok(given.first().cloned().unwrap_or(DataType::Null))
    }

    fn invoke_with_args(&self, _args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        Err(refused(format!("{} stands in the select list of a query that groups by {GAPFILL}", self.name)))
    }
}

/// How the gaps of a column are filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd)]
enum Fill {
    /// The value of the group.
    Key,
    /// The start of the bucket.
    Time,
    Null,
    /// The last value before that is not null.
    Last,
    /// On the line from the last value to the next.
    Line,
}

/// The rule: last but one of the analyzer, when types are known.
#[derive(Debug, Default)]
pub struct TimeBuckets;

impl AnalyzerRule for TimeBuckets {
    fn analyze(&self, plan: LogicalPlan, _config: &ConfigOptions) -> Result<LogicalPlan> {
        plan.transform_up_with_subqueries(|node| match node {
            LogicalPlan::Aggregate(aggregate) => with_buckets(aggregate),
            LogicalPlan::Projection(projection) => filled(projection),
            other => Ok(Transformed::no(other)),
        })
        .map(|t| t.data)
    }

    fn name(&self) -> &str {
        "time_buckets"
    }
}

/// The call behind a group expression, if it is one of these functions.
fn bucket_call<'e>(expr: &'e Expr, names: &[&str]) -> Option<&'e ScalarFunction> {
    match expr {
        Expr::Alias(alias) => bucket_call(&alias.expr, names),
        Expr::ScalarFunction(call) if names.contains(&call.func.name()) => Some(call),
        _ => None,
    }
}

/// Gives the aggregates over samples the bucket by which they are grouped.
fn with_buckets(mut aggregate: Aggregate) -> Result<Transformed<LogicalPlan>> {
    let call = aggregate.group_expr.iter().find_map(|e| bucket_call(e, &[TIME_BUCKET, GAPFILL]));
    let Some(call) = call.filter(|c| c.args.len() >= 2) else {
        return Ok(Transformed::no(LogicalPlan::Aggregate(aggregate)));
    };
    let mut bucket = vec![call.args[0].clone()];
    if call.func.name() == TIME_BUCKET {
        bucket.extend(call.args[2..].iter().cloned());
    } else {
        bucket.extend(Gapfill::of(call)?.zone);
    }
    let mut changed = false;
    let names = NamePreserver::new_for_projection();
    for expr in &mut aggregate.aggr_expr {
        let Expr::AggregateFunction(AggregateFunction { func, params }) = expr else { continue };
        if params.args.len() == 2 && OVER_SAMPLES.iter().any(|(name, _)| *name == func.name()) {
            let name = names.save(expr);
            let Expr::AggregateFunction(mut call) = expr.clone() else { continue };
            call.params.args.extend(bucket.iter().cloned());
            *expr = name.restore(Expr::AggregateFunction(call));
            changed = true;
        }
    }
    if !changed {
        return Ok(Transformed::no(LogicalPlan::Aggregate(aggregate)));
    }
    let (group, aggr) = (aggregate.group_expr, aggregate.aggr_expr);
    Ok(Transformed::yes(LogicalPlan::Aggregate(Aggregate::try_new(aggregate.input, group, aggr)?)))
}

/// The arguments of a call of `time_bucket_gapfill`.
struct Gapfill {
    width: Expr,
    time: Expr,
    zone: Option<Expr>,
    start: Option<Expr>,
    finish: Option<Expr>,
}

impl Gapfill {
    fn of(call: &ScalarFunction) -> Result<Self> {
        let [width, time, rest @ ..] = call.args.as_slice() else {
            return Err(DataFusionError::Plan(format!("{GAPFILL} takes a width and a time")));
        };
        let is_text = |e: &Expr| matches!(unaliased(e), Expr::Literal(v, _) if v.data_type().is_string());
        let (zone, bounds) = match rest {
            [zone, bounds @ ..] if is_text(zone) && rest.len() != 2 => (Some(zone.clone()), bounds),
            bounds => (None, bounds),
        };
        let given = |i: usize| bounds.get(i).filter(|e| !matches!(e, Expr::Literal(v, _) if v.is_null())).cloned();
        if bounds.len() > 2 {
            return Err(DataFusionError::Plan(format!(
                "{GAPFILL} takes a width, a time, a time zone, start and finish"
            )));
        }
        Ok(Self { width: width.clone(), time: time.clone(), zone, start: given(0), finish: given(1) })
    }
}

fn unaliased(expr: &Expr) -> &Expr {
    match expr {
        Expr::Alias(alias) => unaliased(&alias.expr),
        Expr::Cast(cast) => unaliased(&cast.expr),
        other => other,
    }
}

/// A bound of time and whether rows at it are within.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd)]
struct Bound {
    at: Expr,
    within: bool,
}

/// What the filters below an aggregate say of the time.
fn bounds_of(plan: &LogicalPlan, time: &Expr, found: &mut [Option<Bound>; 2]) {
    let Expr::Column(column) = unaliased(time) else { return };
    match plan {
        LogicalPlan::Filter(filter) => {
            for conjunct in split_conjunction(&filter.predicate) {
                bounds_in(conjunct, &column.name, found);
            }
            bounds_of(&filter.input, time, found);
        }
        LogicalPlan::Projection(Projection { input, .. }) | LogicalPlan::Sort(Sort { input, .. }) => {
            bounds_of(input, time, found);
        }
        LogicalPlan::SubqueryAlias(alias) => bounds_of(&alias.input, time, found),
        LogicalPlan::TableScan(scan) => scan.filters.iter().for_each(|f| bounds_in(f, &column.name, found)),
        _ => {}
    }
}

fn bounds_in(expr: &Expr, time: &str, found: &mut [Option<Bound>; 2]) {
    let is_time = |e: &Expr| matches!(unaliased(e), Expr::Column(c) if c.name == time);
    let constant = |e: &Expr| e.column_refs().is_empty() && !e.any_column_refs();
    let mut note = |end: usize, at: &Expr, within: bool| {
        if constant(at) && found[end].is_none() {
            found[end] = Some(Bound { at: at.clone(), within });
        }
    };
    match expr {
        Expr::BinaryExpr(BinaryExpr { left, op, right }) => {
            let (op, other) = match (is_time(left), is_time(right)) {
                (true, false) => (Some(*op), right),
                (false, true) => (op.swap(), left),
                _ => return,
            };
            match op {
                Some(Operator::Gt) => note(0, other, false),
                Some(Operator::GtEq) => note(0, other, true),
                Some(Operator::Lt) => note(1, other, false),
                Some(Operator::LtEq) => note(1, other, true),
                _ => {}
            }
        }
        Expr::Between(Between { expr, negated: false, low, high }) if is_time(expr) => {
            note(0, low, true);
            note(1, high, true);
        }
        _ => {}
    }
}

/// An aggregate that asked for gaps to be filled, without the call that did.
struct Asked {
    plan: LogicalPlan,
    call: Gapfill,
    bounds: [Option<Bound>; 2],
    /// The number of the call's column.
    time: usize,
    /// How many keys there are.
    keys: usize,
}

/// Replaces the call in the group expressions of the aggregate below filters, if there is one.
fn without_call(plan: &LogicalPlan) -> Result<Option<Asked>> {
    match plan {
        LogicalPlan::Filter(filter) => Ok(match without_call(&filter.input)? {
            Some(asked) => {
                let plan = LogicalPlan::Filter(Filter::try_new(filter.predicate.clone(), Arc::new(asked.plan))?);
                Some(Asked { plan, ..asked })
            }
            None => None,
        }),
        LogicalPlan::Aggregate(aggregate) => {
            let at = aggregate.group_expr.iter().position(|e| bucket_call(e, &[GAPFILL]).is_some());
            let Some(at) = at else { return Ok(None) };
            let mut group = aggregate.group_expr.clone();
            let Some(call) = bucket_call(&group[at], &[GAPFILL]).cloned() else { return Ok(None) };
            let call = Gapfill::of(&call)?;
            if group.iter().enumerate().any(|(i, e)| i != at && bucket_call(e, &[GAPFILL, TIME_BUCKET]).is_some()) {
                return Err(DataFusionError::Plan(format!(
                    "{GAPFILL} can't be grouped by together with another bucket"
                )));
            }
            let name = NamePreserver::new_for_projection().save(&group[at]);
            let args = [Some(call.width.clone()), Some(call.time.clone()), call.zone.clone()];
            let bucket = Arc::new(ScalarUDF::new_from_impl(TimeBucket::new(TIME_BUCKET)));
            let bucket = ScalarFunction { func: bucket, args: args.into_iter().flatten().collect() };
            group[at] = name.restore(Expr::ScalarFunction(bucket));
            let mut bounds = [
                call.start.clone().map(|at| Bound { at, within: true }),
                call.finish.clone().map(|at| Bound { at, within: false }),
            ];
            bounds_of(&aggregate.input, &call.time, &mut bounds);
            let keys = group.len();
            let plan = Aggregate::try_new(aggregate.input.clone(), group, aggregate.aggr_expr.clone())?;
            Ok(Some(Asked { plan: LogicalPlan::Aggregate(plan), call, bounds, time: at, keys }))
        }
        _ => Ok(None),
    }
}

/// Puts the node below a select list whose aggregate asks for it.
fn filled(projection: Projection) -> Result<Transformed<LogicalPlan>> {
    let Some(Asked { plan: input, call, bounds, time, keys }) = without_call(&projection.input)? else {
        return Ok(Transformed::no(LogicalPlan::Projection(projection)));
    };
    let missing = |which: &str| {
        DataFusionError::Plan(format!(
            "missing {GAPFILL} argument: could not infer {which} from WHERE clause; give {which} as an argument, or \
             compare the time with a constant"
        ))
    };
    let [start, finish] = bounds;
    let (start, finish) = (start.ok_or_else(|| missing("start"))?, finish.ok_or_else(|| missing("finish"))?);
    let columns: Vec<Expr> =
        input.schema().iter().map(|(q, f)| Expr::Column(Column::new(q.cloned(), f.name()))).collect();
    let mut fills: Vec<Fill> = (0..columns.len())
        .map(|i| match i {
            i if i == time => Fill::Time,
            i if i < keys => Fill::Key,
            _ => Fill::Null,
        })
        .collect();
    // What is to be filled becomes a column of its own.
    let mut wanted: Vec<(Expr, Fill)> = Vec::new();
    let names = NamePreserver::new_for_projection();
    let mut exprs = Vec::with_capacity(projection.expr.len());
    for expr in projection.expr {
        let name = names.save(&expr);
        let expr = expr.transform_down(|e| {
            let Expr::ScalarFunction(call) = &e else { return Ok(Transformed::no(e)) };
            let fill = match call.func.name() {
                "locf" => Fill::Last,
                "interpolate" => Fill::Line,
                _ => return Ok(Transformed::no(e)),
            };
            let argument = call.args[0].clone();
            let at = wanted.iter().position(|w| *w == (argument.clone(), fill)).unwrap_or_else(|| {
                wanted.push((argument, fill));
                wanted.len() - 1
            });
            Ok(Transformed::new(Expr::Column(Column::new_unqualified(wanted_name(at))), true, TreeNodeRecursion::Jump))
        })?;
        exprs.push(name.restore(expr.data));
    }
    let mut all = columns;
    for (at, (expr, fill)) in wanted.into_iter().enumerate() {
        let kind = expr.get_type(input.schema())?;
        if fill == Fill::Line && !kind.is_numeric() {
            return Err(DataFusionError::Plan(format!("interpolate takes a number, not {kind}")));
        }
        all.push(Expr::Alias(Alias::new(expr, None::<&str>, wanted_name(at))));
        fills.push(fill);
    }
    let input = LogicalPlan::Projection(Projection::try_new(all, Arc::new(input))?);
    let mut constants = vec![call.width];
    constants.extend(call.zone);
    let node = GapFill::new(input, fills, constants, start, finish)?;
    let input = LogicalPlan::Extension(Extension { node: Arc::new(node) });
    Ok(Transformed::yes(LogicalPlan::Projection(Projection::try_new(exprs, Arc::new(input))?)))
}

fn wanted_name(at: usize) -> String {
    format!("filled#{at}")
}

/// The logical node.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct GapFill {
    input: LogicalPlan,
    schema: DFSchemaRef,
    fills: Vec<Fill>,
    /// The width and, if there is one, the time zone.
    bucket: Vec<Expr>,
    start: Bound,
    finish: Bound,
}

impl GapFill {
    fn new(input: LogicalPlan, fills: Vec<Fill>, bucket: Vec<Expr>, start: Bound, finish: Bound) -> Result<Self> {
        let fields = input
            .schema()
            .iter()
            .zip(&fills)
            .map(|((relation, field), fill)| {
                let nullable = field.is_nullable() || !matches!(fill, Fill::Key | Fill::Time);
                (relation.cloned(), Arc::new(Field::new(field.name(), field.data_type().clone(), nullable)))
            })
            .collect();
        let schema = Arc::new(DFSchema::new_with_metadata(fields, input.schema().metadata().clone())?);
        Ok(Self { input, schema, fills, bucket, start, finish })
    }

    /// The node of an extension, if it is this one.
    pub fn of(extension: &Extension) -> Option<&Self> {
        extension.node.as_any().downcast_ref()
    }

    /// The input.
    pub fn input(&self) -> &LogicalPlan {
        &self.input
    }

    /// The same over another input with as many columns, whose values may have other types.
    ///
    /// # Errors
    /// When names clash.
    pub fn over(&self, input: LogicalPlan) -> Result<LogicalPlan> {
        let (start, finish) = (self.start.clone(), self.finish.clone());
        let node = Self::new(input, self.fills.clone(), self.bucket.clone(), start, finish)?;
        Ok(LogicalPlan::Extension(Extension { node: Arc::new(node) }))
    }

    fn time(&self) -> usize {
        self.fills.iter().position(|f| *f == Fill::Time).unwrap_or(0)
    }

    fn physical(&self, input: Arc<dyn ExecutionPlan>, session: &dyn Session) -> Result<GapFillExec> {
        let time = self.time();
        let kind = input.schema().field(time).data_type().clone();
        let none = DFSchema::empty();
        let value = |expr: &Expr| -> Result<ScalarValue> {
            let physical =
                create_physical_expr(expr, &none, session.execution_props(), &PhysicalPlanningContext::default())?;
            let options = RecordBatchOptions::new().with_row_count(Some(1));
            let row = RecordBatch::try_new_with_options(Arc::new(Schema::empty()), vec![], &options)?;
            ScalarValue::try_from_array(&physical.evaluate(&row)?.into_array(1)?, 0)
        };
        let at = |bound: &Bound, which: &str| -> Result<i64> {
            let at = cast(&cast(&value(&bound.at)?.to_array()?, &kind)?, &DataType::Int64)?;
            let at = at.as_primitive::<Int64Type>();
            if at.is_null(0) {
                return Err(DataFusionError::Plan(format!("the {which} of {GAPFILL} is null")));
            }
            Ok(at.value(0))
        };
        let rest = self.bucket[1..].iter().map(value).collect::<Result<Vec<_>>>()?;
        let bucket = Bucket::new(&value(&self.bucket[0])?, &rest, &kind)?;
        let start = at(&self.start, "start")?.saturating_add(i64::from(!self.start.within));
        let finish = at(&self.finish, "finish")?.saturating_add(i64::from(self.finish.within));
        let start = bucket.start(start)?;
        let buckets = bucket.count(start, finish)?;
        if buckets > BUCKETS_MAX {
            let message = format!("{GAPFILL} would make {buckets} buckets for each group; {BUCKETS_MAX} are allowed");
            return Err(external(Error::limit_exceeded(message)));
        }
        let schema = Arc::new(self.schema.as_arrow().clone());
        GapFillExec::new(input, schema, self.fills.clone(), bucket, start, finish)
    }
}

impl PartialOrd for GapFill {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        self.fills.partial_cmp(&other.fills)
    }
}

impl UserDefinedLogicalNodeCore for GapFill {
    fn name(&self) -> &str {
        "GapFill"
    }

    fn inputs(&self) -> Vec<&LogicalPlan> {
        vec![&self.input]
    }

    fn schema(&self) -> &DFSchemaRef {
        &self.schema
    }

    fn expressions(&self) -> Vec<Expr> {
        let bounds = [self.start.at.clone(), self.finish.at.clone()];
        self.bucket.iter().cloned().chain(bounds).collect()
    }

    fn fmt_for_explain(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GapFill: width={}, start={}, finish={}", self.bucket[0], self.start.at, self.finish.at)
    }

    fn with_exprs_and_inputs(&self, mut exprs: Vec<Expr>, mut inputs: Vec<LogicalPlan>) -> Result<Self> {
        let (Some(finish), Some(start), Some(input)) = (exprs.pop(), exprs.pop(), inputs.pop()) else {
            return Err(DataFusionError::Internal("GapFill without its expressions".to_owned()));
        };
        let (start, finish) = (Bound { at: start, ..self.start.clone() }, Bound { at: finish, ..self.finish.clone() });
        Self::new(input, self.fills.clone(), exprs, start, finish)
    }
}

/// Makes the physical node.
#[derive(Debug)]
pub struct GapFillPlanner;

#[async_trait]
impl ExtensionPlanner for GapFillPlanner {
    async fn plan_extension(
        &self,
        _planner: &dyn PhysicalPlanner,
        node: &dyn UserDefinedLogicalNode,
        _logical_inputs: &[&LogicalPlan],
        physical_inputs: &[Arc<dyn ExecutionPlan>],
        session: &dyn Session,
        _context: &PhysicalPlanningContext,
    ) -> Result<Option<Arc<dyn ExecutionPlan>>> {
        match (node.as_any().downcast_ref::<GapFill>(), physical_inputs) {
            (Some(node), [input]) => Ok(Some(Arc::new(node.physical(input.clone(), session)?))),
            _ => Ok(None),
        }
    }
}

/// The physical node.
#[derive(Debug)]
pub struct GapFillExec {
    input: Arc<dyn ExecutionPlan>,
    fills: Vec<Fill>,
    bucket: Bucket,
    start: i64,
    finish: i64,
    properties: Arc<PlanProperties>,
    metrics: ExecutionPlanMetricsSet,
}

impl GapFillExec {
    fn new(
        input: Arc<dyn ExecutionPlan>,
        schema: SchemaRef,
        fills: Vec<Fill>,
        bucket: Bucket,
        start: i64,
        finish: i64,
    ) -> Result<Self> {
        let properties = Arc::new(PlanProperties::new(
            EquivalenceProperties::new(schema),
            Partitioning::UnknownPartitioning(1),
            EmissionType::Incremental,
            Boundedness::Bounded,
        ));
        Ok(Self { input, fills, bucket, start, finish, properties, metrics: ExecutionPlanMetricsSet::new() })
    }

    fn time(&self) -> usize {
        self.fills.iter().position(|f| *f == Fill::Time).unwrap_or(0)
    }

    /// The keys, then the time.
    fn ordering(&self) -> Option<LexOrdering> {
        let schema = self.input.schema();
        let keys = self.fills.iter().enumerate().filter(|(_, f)| **f == Fill::Key).map(|(i, _)| i);
        LexOrdering::new(keys.chain([self.time()]).map(|i| {
            let column = Arc::new(PhysicalColumn::new(schema.field(i).name(), i));
            PhysicalSortExpr::new(column, SortOptions { descending: false, nulls_first: false })
        }))
    }
}

impl DisplayAs for GapFillExec {
    fn fmt_as(&self, _t: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GapFillExec: start={}, finish={}, fills={:?}", self.start, self.finish, self.fills)
    }
}

impl ExecutionPlan for GapFillExec {
    fn name(&self) -> &str {
        "GapFillExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }

    fn input_distribution_requirements(&self) -> InputDistributionRequirements {
        InputDistributionRequirements::new(vec![Distribution::SinglePartition])
    }

    fn required_input_ordering(&self) -> Vec<Option<OrderingRequirements>> {
        vec![self.ordering().map(OrderingRequirements::from)]
    }

    fn benefits_from_input_partitioning(&self) -> Vec<bool> {
        vec![false]
    }

    fn apply_expressions(
        &self,
        _f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn with_new_children(self: Arc<Self>, children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        let [input] = <[_; 1]>::try_from(children)
            .map_err(|c| DataFusionError::Internal(format!("GapFillExec has one child, not {}", c.len())))?;
        let (schema, fills) = (self.schema(), self.fills.clone());
        Ok(Arc::new(Self::new(input, schema, fills, self.bucket.clone(), self.start, self.finish)?))
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let input = self.input.execute(partition, context.clone())?;
        let schema = self.schema();
        let keys: Vec<usize> = (0..self.fills.len()).filter(|i| self.fills[*i] == Fill::Key).collect();
        let fields = keys.iter().map(|i| SortField::new(schema.field(*i).data_type().clone())).collect();
        let filler = Filler {
            schema: schema.clone(),
            fills: self.fills.clone(),
            bucket: self.bucket.clone(),
            start: self.start,
            finish: self.finish,
            time: self.time(),
            keys,
            rows: RowConverter::new(fields)?,
            pending: RecordBatch::new_empty(schema.clone()),
            times: Vec::new(),
            ends: Vec::new(),
            group: 0,
            at: 0,
            next: self.start,
            ended: false,
            stop: Stop::of(context.session_config().options()),
            held: MemoryConsumer::new("GapFillExec").register(context.memory_pool()),
        };
        let metrics = BaselineMetrics::new(&self.metrics, partition);
        let stream = stream::try_unfold((filler, input, metrics), |(mut filler, mut input, metrics)| async move {
            loop {
                let timer = metrics.elapsed_compute().timer();
                let batch = filler.batch()?;
                timer.done();
                if let Some(batch) = batch {
                    metrics.record_output(batch.num_rows());
                    return Ok(Some((batch, (filler, input, metrics))));
                }
                if filler.ended {
                    return Ok(None);
                }
                filler.add(input.next().await.transpose()?)?;
            }
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(schema, stream)))
    }

    fn metrics(&self) -> Option<MetricsSet> {
        Some(self.metrics.clone_inner())
    }
}

/// Walks through rows in the order of groups and time.
struct Filler {
    schema: SchemaRef,
    fills: Vec<Fill>,
    bucket: Bucket,
    start: i64,
    finish: i64,
    time: usize,
    keys: Vec<usize>,
    rows: RowConverter,
    /// Rows that were not given yet. They begin with a group.
    pending: RecordBatch,
    times: Vec<Option<i64>>,
    /// Where each group that is complete ends.
    ends: Vec<usize>,
    /// The group that is walked through, the row to which it came, and the bucket that comes next in it.
    group: usize,
    at: usize,
    next: i64,
    ended: bool,
    stop: Stop,
    held: MemoryReservation,
}

/// A time and a value.
type Point = (f64, f64);

/// A row to give: one of the input, or a bucket without rows.
enum Row {
    Given(usize),
    Made(i64),
}

impl Filler {
    /// Takes more rows in once all complete groups were given; the end when there are none.
    fn add(&mut self, batch: Option<RecordBatch>) -> Result<()> {
        self.stop.check().map_err(external)?;
        let given = self.ends.last().copied().unwrap_or(0);
        let rest = self.pending.slice(given, self.pending.num_rows() - given);
        self.ended = batch.is_none();
        self.pending = match batch {
            Some(batch) => {
                let batch = RecordBatch::try_new(self.schema.clone(), batch.columns().to_vec())?;
                self.held.try_resize(rest.get_array_memory_size() + 2 * batch.get_array_memory_size())?;
                concat_batches(&self.schema, [&rest, &batch])?
            }
            None => rest,
        };
        let times = cast(self.pending.column(self.time), &DataType::Int64)?;
        self.times = times.as_primitive::<Int64Type>().iter().collect();
        (self.group, self.at, self.next) = (0, 0, self.start);
        self.ends.clear();
        let n = self.pending.num_rows();
        if !self.keys.is_empty() {
            let keys: Vec<ArrayRef> = self.keys.iter().map(|i| self.pending.column(*i).clone()).collect();
            let keys = self.rows.convert_columns(&keys)?;
            self.ends.extend((1..n).filter(|i| keys.row(*i) != keys.row(*i - 1)));
        }
        if self.ended && n > 0 {
            self.ends.push(n);
        }
        Ok(())
    }

    fn first(&self) -> usize {
        self.group.checked_sub(1).map_or(0, |before| self.ends[before])
    }

    /// The next row of the present group.
    fn step(&mut self, end: usize) -> Result<Option<Row>> {
        let gap_before = |time: Option<i64>| time.is_none_or(|t| self.next < t);
        if self.at < end && !(self.next < self.finish && gap_before(self.times[self.at])) {
            if self.times[self.at] == Some(self.next) {
                self.next = self.bucket.next(self.next)?;
            }
            self.at += 1;
            return Ok(Some(Row::Given(self.at - 1)));
        }
        if self.next < self.finish {
            let made = self.next;
            self.next = self.bucket.next(made)?;
            return Ok(Some(Row::Made(made)));
        }
        Ok(None)
    }

    /// The next rows of complete groups.
    fn batch(&mut self) -> Result<Option<RecordBatch>> {
        let mut rows: Vec<(Row, usize, usize, usize)> = Vec::new();
        while self.group < self.ends.len() && rows.len() < BATCH_ROWS {
            let (first, end) = (self.first(), self.ends[self.group]);
            match self.step(end)? {
                Some(row) => rows.push((row, first, self.at, end)),
                None => {
                    self.group += 1;
                    (self.at, self.next) = (end, self.start);
                }
            }
        }
        if rows.is_empty() {
            return Ok(None);
        }
        self.stop.check().map_err(external)?;
        let columns = (0..self.fills.len()).map(|i| self.column(i, &rows)).collect::<Result<Vec<_>>>()?;
        Ok(Some(RecordBatch::try_new(self.schema.clone(), columns)?))
    }

    /// A column of rows, each with the first row of its group, the row of its group that comes after it, and the end of
    /// its group.
    fn column(&self, i: usize, rows: &[(Row, usize, usize, usize)]) -> Result<ArrayRef> {
        let column = self.pending.column(i);
        let nulls = column.logical_nulls();
        let valid = |row: usize| nulls.as_ref().is_none_or(|n| n.is_valid(row));
        let mut from = UInt32Builder::with_capacity(rows.len());
        match self.fills[i] {
            Fill::Time => {
                let times = rows.iter().map(|(row, ..)| match row {
                    Row::Given(row) => self.times[*row],
                    Row::Made(time) => Some(*time),
                });
                let times: arrow::array::Int64Array = times.collect();
                return Ok(cast(&times, column.data_type())?);
            }
            Fill::Key => rows.iter().for_each(|(_, first, ..)| from.append_value(*first as u32)),
            Fill::Null => rows.iter().for_each(|(row, ..)| match row {
                Row::Given(row) => from.append_value(*row as u32),
                Row::Made(_) => from.append_null(),
            }),
            Fill::Last => {
                // Within a group the row after moves forward, and so does the last value before it. A batch may begin
                // within a group.
                let (mut group, mut seen, mut last) = (usize::MAX, 0, None);
                for (_, first, after, _) in rows {
                    if group != *first {
                        (group, seen) = (*first, *after);
                        last = (*first..*after).rev().find(|r| valid(*r));
                    }
                    while seen < *after {
                        last = if valid(seen) { Some(seen) } else { last };
                        seen += 1;
                    }
                    from.append_option(last.map(|r| r as u32));
                }
            }
            Fill::Line => return self.line(column, rows),
        }
        let from: UInt32Array = from.finish();
        Ok(take(column, &from, None)?)
    }

    fn line(&self, column: &ArrayRef, rows: &[(Row, usize, usize, usize)]) -> Result<ArrayRef> {
        let values = cast(column, &DataType::Float64)?;
        let values = values.as_primitive::<Float64Type>();
        let point = |row: usize| Some((self.times[row]? as f64, values.is_valid(row).then(|| values.value(row))?));
        let whole = !column.data_type().is_floating();
        let mut out = Float64Builder::with_capacity(rows.len());
        // Between two rows of the input the neighbours stay the same.
        let mut known: Option<(usize, Option<Point>, Option<Point>)> = None;
        for (row, first, after, end) in rows {
            let time = match row {
                Row::Given(row) if values.is_valid(*row) => {
                    out.append_value(values.value(*row));
                    continue;
                }
                Row::Given(row) => self.times[*row],
                Row::Made(time) => Some(*time),
            };
            let (_, before, next) = match known.filter(|(at, ..)| *at == *after) {
                Some(known) => known,
                None => {
                    let before = (*first..*after).rev().find_map(point);
                    let next = (*after..*end).find_map(point);
                    *known.insert((*after, before, next))
                }
            };
            let value = time.zip(before.zip(next)).map(|(t, ((t0, v0), (t1, v1)))| {
                let value = v0 + (v1 - v0) * ((t as f64 - t0) / (t1 - t0));
                if whole { value.round() } else { value }
            });
            out.append_option(value);
        }
        let out: Float64Array = out.finish();
        Ok(cast(&out, column.data_type())?)
    }
}
