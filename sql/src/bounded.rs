//! Results of functions are bounded before they are made.
//!
//! A function that gives texts or lists can make gigabytes of a few bytes, at once or by doubling what an inner query
//! gave. The rule [`BoundedResults`] puts every such function into a [`Bounded`], which computes from the arguments how
//! large the result becomes at most, and refuses to call the function when that is too much for one batch or,
//! together with what still lives of the statement's other results, for the statement.

use std::any::Any;
use std::sync::{Arc, Weak};

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::compute::cast;
use arrow::compute::kernels::concat_elements::concat_elements_dyn;
use arrow::datatypes::{DataType, Field, FieldRef, Float64Type, Int64Type, IntervalUnit, TimeUnit};
use datafusion::common::ScalarValue;
use datafusion::common::config::{ConfigEntry, ConfigExtension, ConfigOptions, ExtensionOptions};
use datafusion::common::tree_node::{Transformed, TreeNode};
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::expr::ScalarFunction;
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::type_coercion::binary::BinaryTypeCoercer;
use datafusion::logical_expr::{
    Accumulator, AggregateUDF, AggregateUDFImpl, BinaryExpr, ColumnarValue, Expr, LogicalPlan, Operator,
    ReturnFieldArgs, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility, WindowFunctionDefinition,
};
use datafusion::optimizer::AnalyzerRule;
use engine::Error;
use parking_lot::Mutex;

use crate::rules::{check, check_constants};
use crate::table::external;

/// Most bytes of one result: a value, or the values of a batch.
const RESULT_BYTES_MAX: u64 = 64 << 20;
/// Most bytes of a statement's large results that live at the same time.
const LIVE_BYTES_MAX: u64 = 128 << 20;
/// Results from here on are remembered; smaller ones don't add up.
const LARGE_BYTES: u64 = 64 << 10;

/// How the size of a result follows from the arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Growth {
    /// At most this many times the size of all arguments.
    Sum(u64),
    /// The first argument as many times as the second says.
    Times,
    /// As many characters as the second argument says.
    Pad,
    /// As many of the third argument as the second says.
    Length,
    /// The third argument wherever the second occurs in the first.
    Replace,
    /// The third argument wherever the pattern matches, with parts of what matched.
    ReplaceRegex,
    /// A separator between elements.
    Join,
    /// Numbers from the first argument to the second in steps of the third.
    Range,
}

/// Functions that can give more than they are given, by any of their names.
const GROWING: &[(&str, Growth)] = &[
    ("array_append", Growth::Sum(1)),
    ("array_concat", Growth::Sum(1)),
    ("array_prepend", Growth::Sum(1)),
    ("array_repeat", Growth::Times),
    ("array_replace", Growth::Replace),
    ("array_replace_all", Growth::Replace),
    ("array_replace_n", Growth::Replace),
    ("array_resize", Growth::Length),
    ("array_to_string", Growth::Join),
    ("array_union", Growth::Sum(1)),
    ("arrays_zip", Growth::Sum(4)),
    ("concat", Growth::Sum(1)),
    ("concat_ws", Growth::Sum(1)),
    ("encode", Growth::Sum(2)),
    ("generate_series", Growth::Range),
    ("initcap", Growth::Sum(3)),
    ("json_extract_path", Growth::Sum(1)),
    ("json_extract_path_text", Growth::Sum(1)),
    ("json_object_field", Growth::Sum(1)),
    ("json_object_field_text", Growth::Sum(1)),
    ("lower", Growth::Sum(3)),
    ("lpad", Growth::Pad),
    ("make_array", Growth::Sum(1)),
    ("map", Growth::Sum(1)),
    ("named_struct", Growth::Sum(1)),
    ("overlay", Growth::Sum(1)),
    ("range", Growth::Range),
    ("regexp_replace", Growth::ReplaceRegex),
    ("repeat", Growth::Times),
    ("replace", Growth::Replace),
    ("rpad", Growth::Pad),
    ("string_to_array", Growth::Sum(8)),
    ("struct", Growth::Sum(1)),
    ("to_char", Growth::Sum(4)),
    ("translate", Growth::Sum(4)),
    ("upper", Growth::Sum(3)),
];

/// Aggregates that keep all that they are given. Over a window they give all of it again for each row; grouped, their
/// memory is that of the query.
const COLLECTING: [&str; 2] = ["array_agg", "string_agg"];

/// Aggregates that look at all that they were given for each of their results. Over a window that would be all rows for
/// each row, between two of which nothing looks whether the statement is to stop.
const GROUPED_ONLY: [&str; 6] = ["apdex", "delta", "histogram_quantile", "increase", "rate", "topk"];

/// What lives of the large results of a statement's functions; it travels with the statement's configuration.
#[derive(Debug, Clone, Default)]
pub struct Results(Arc<Mutex<Live>>);

#[derive(Debug, Default)]
struct Live {
    arrays: Vec<(Weak<dyn Array>, u64)>,
    /// Of results that are one value: they are constants of the plan.
    constants: u64,
}

impl Results {
    /// Whether `bytes` more may live.
    fn check(&self, bytes: u64) -> bool {
        let mut live = self.0.lock();
        live.arrays.retain(|(array, _)| array.strong_count() > 0);
        let sum = live.arrays.iter().fold(live.constants, |sum, (_, bytes)| sum.saturating_add(*bytes));
        sum.saturating_add(bytes) <= LIVE_BYTES_MAX
    }

    fn add(&self, result: &ColumnarValue) {
        let mut live = self.0.lock();
        match result {
            ColumnarValue::Array(array) => live.arrays.push((Arc::downgrade(array), array_bytes(array))),
            ColumnarValue::Scalar(value) => live.constants = live.constants.saturating_add(scalar_bytes(value)),
        }
    }
}

impl ExtensionOptions for Results {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }

    fn cloned(&self) -> Box<dyn ExtensionOptions> {
        Box::new(self.clone())
    }

    fn set(&mut self, key: &str, _value: &str) -> Result<()> {
        Err(DataFusionError::Configuration(format!("results.{key} is not for setting")))
    }

    fn entries(&self) -> Vec<ConfigEntry> {
        Vec::new()
    }
}

impl ConfigExtension for Results {
    const PREFIX: &'static str = "results";
}

/// The rule: the last of the analyzer, when all types are known.
#[derive(Debug, Default)]
pub struct BoundedResults;

impl AnalyzerRule for BoundedResults {
    fn analyze(&self, plan: LogicalPlan, _config: &ConfigOptions) -> Result<LogicalPlan> {
        let bound = |plan: LogicalPlan| {
            check_constants(&plan)?;
            let names = NamePreserver::new(&plan);
            plan.map_expressions(|expr| {
                let name = names.save(&expr);
                Ok(expr.transform_up(bounded)?.update_data(|e| name.restore(e)))
            })
        };
        plan.transform_up_with_subqueries(bound).map(|t| t.data)
    }

    fn name(&self) -> &str {
        "bounded_results"
    }
}

fn bounded(expr: Expr) -> Result<Transformed<Expr>> {
    Ok(match expr {
        Expr::ScalarFunction(call) => match growth(call.func.name()) {
            Some(growth) if !call.func.inner().is::<Bounded>() => {
                let func = Bounded { inner: call.func.clone(), growth };
                let func = Arc::new(ScalarUDF::new_from_impl(func));
                Transformed::yes(Expr::ScalarFunction(ScalarFunction { func, args: call.args }))
            }
            _ => Transformed::no(Expr::ScalarFunction(call)),
        },
        Expr::BinaryExpr(BinaryExpr { left, op: Operator::StringConcat, right }) => {
            let inner = Arc::new(ScalarUDF::new_from_impl(Concat::default()));
            let func = Arc::new(ScalarUDF::new_from_impl(Bounded { inner, growth: Growth::Sum(1) }));
            Transformed::yes(Expr::ScalarFunction(ScalarFunction { func, args: vec![*left, *right] }))
        }
        Expr::WindowFunction(call) if GROUPED_ONLY.contains(&call.fun.name()) => {
            let message = format!("{} is an aggregate for GROUP BY; OVER is not supported", call.fun.name());
            return Err(DataFusionError::NotImplemented(message));
        }
        Expr::WindowFunction(mut call) => match &call.fun {
            WindowFunctionDefinition::AggregateUDF(inner) if COLLECTING.contains(&inner.name()) => {
                let collected = AggregateUDF::new_from_impl(Collected { inner: inner.clone() });
                call.fun = WindowFunctionDefinition::AggregateUDF(Arc::new(collected));
                Transformed::yes(Expr::WindowFunction(call))
            }
            _ => Transformed::no(Expr::WindowFunction(call)),
        },
        other => Transformed::no(other),
    })
}

fn growth(name: &str) -> Option<Growth> {
    let at = GROWING.binary_search_by_key(&name, |(name, _)| *name).ok()?;
    Some(GROWING[at].1)
}

/// Whether the result of a function with this name can be larger than its arguments.
pub fn grows(name: &str) -> bool {
    growth(name).is_some() || matches!(name, "array_fill" | "array_cat" | "list_repeat" | "list_concat")
}

/// The operator `||` of texts.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Concat(Signature);

impl Default for Concat {
    fn default() -> Self {
        Self(Signature::any(2, Volatility::Immutable))
    }
}

impl ScalarUDFImpl for Concat {
    fn name(&self) -> &str {
        "||"
    }

    fn schema_name(&self, args: &[Expr]) -> Result<String> {
        let names: Vec<String> = args.iter().map(|a| a.schema_name().to_string()).collect();
        Ok(names.join(" || "))
    }

    fn signature(&self) -> &Signature {
        &self.0
    }

    fn return_type(&self, types: &[DataType]) -> Result<DataType> {
        let null = DataType::Null;
        let (left, right) = (types.first().unwrap_or(&null), types.get(1).unwrap_or(&null));
        BinaryTypeCoercer::new(left, &Operator::StringConcat, right).get_result_type()
    }

    fn return_field_from_args(&self, args: ReturnFieldArgs) -> Result<FieldRef> {
        let types: Vec<DataType> = args.arg_fields.iter().map(|f| f.data_type().clone()).collect();
        let nullable = args.arg_fields.iter().any(|f| f.is_nullable());
        Ok(Arc::new(Field::new(self.name(), self.return_type(&types)?, nullable)))
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let constant = args.args.iter().all(|a| matches!(a, ColumnarValue::Scalar(_)));
        let rows = if constant { 1 } else { args.number_rows };
        let kind = args.return_field.data_type();
        let side = |i: usize| Ok::<_, DataFusionError>(cast(&args.args[i].to_array(rows)?, kind)?);
        let joined = concat_elements_dyn(&side(0)?, &side(1)?)?;
        Ok(if constant {
            ColumnarValue::Scalar(ScalarValue::try_from_array(&joined, 0)?)
        } else {
            ColumnarValue::Array(joined)
        })
    }
}

/// A function that is called when its result is not too large.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Bounded {
    inner: Arc<ScalarUDF>,
    growth: Growth,
}

impl ScalarUDFImpl for Bounded {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn aliases(&self) -> &[String] {
        self.inner.aliases()
    }

    fn schema_name(&self, args: &[Expr]) -> Result<String> {
        self.inner.schema_name(args)
    }

    fn signature(&self) -> &Signature {
        self.inner.signature()
    }

    fn return_type(&self, types: &[DataType]) -> Result<DataType> {
        self.inner.return_type(types)
    }

    fn return_field_from_args(&self, args: ReturnFieldArgs) -> Result<FieldRef> {
        self.inner.return_field_from_args(args)
    }

    fn coerce_types(&self, types: &[DataType]) -> Result<Vec<DataType>> {
        self.inner.coerce_types(types)
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let bytes = self.growth.bytes(&args.args, args.number_rows)?;
        let too_much = |sum: &str, most: u64| {
            let name = self.inner.name();
            let message = format!("{name} would give {bytes} bytes at once; {} MiB {sum} are allowed", most >> 20);
            Err(external(Error::limit_exceeded(message)))
        };
        if bytes > RESULT_BYTES_MAX {
            return too_much("in a value or a batch of values", RESULT_BYTES_MAX);
        }
        if bytes < LARGE_BYTES {
            return self.inner.invoke_with_args(args);
        }
        check(&args.config_options)?;
        let results = args.config_options.extensions.get::<Results>().cloned().unwrap_or_default();
        if !results.check(bytes) {
            return too_much("in all results of a statement", LIVE_BYTES_MAX);
        }
        let result = self.inner.invoke_with_args(args)?;
        results.add(&result);
        Ok(result)
    }
}

/// An aggregate over a window, whose results for all rows of a partition are bounded together.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Collected {
    inner: Arc<AggregateUDF>,
}

impl AggregateUDFImpl for Collected {
    fn name(&self) -> &str {
        // As the rule must not find it again.
        "collected"
    }

    fn signature(&self) -> &Signature {
        self.inner.signature()
    }

    fn return_type(&self, types: &[DataType]) -> Result<DataType> {
        self.inner.return_type(types)
    }

    fn return_field(&self, fields: &[FieldRef]) -> Result<FieldRef> {
        self.inner.return_field(fields)
    }

    fn is_nullable(&self) -> bool {
        self.inner.is_nullable()
    }

    fn coerce_types(&self, types: &[DataType]) -> Result<Vec<DataType>> {
        self.inner.coerce_types(types)
    }

    fn state_fields(&self, args: StateFieldsArgs<'_>) -> Result<Vec<FieldRef>> {
        self.inner.state_fields(args)
    }

    fn default_value(&self, kind: &DataType) -> Result<ScalarValue> {
        self.inner.default_value(kind)
    }

    fn accumulator(&self, args: AccumulatorArgs<'_>) -> Result<Box<dyn Accumulator>> {
        Ok(Box::new(Counted { inner: self.inner.accumulator(args)?, given: 0 }))
    }

    fn create_sliding_accumulator(&self, args: AccumulatorArgs<'_>) -> Result<Box<dyn Accumulator>> {
        Ok(Box::new(Counted { inner: self.inner.create_sliding_accumulator(args)?, given: 0 }))
    }
}

#[derive(Debug)]
struct Counted {
    inner: Box<dyn Accumulator>,
    /// Bytes of all results so far.
    given: u64,
}

impl Accumulator for Counted {
    fn update_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        self.inner.update_batch(values)
    }

    fn evaluate(&mut self) -> Result<ScalarValue> {
        let value = self.inner.evaluate()?;
        self.given = self.given.saturating_add(scalar_bytes(&value));
        if self.given > RESULT_BYTES_MAX {
            let message = format!(
                "an aggregate over a window gives more than {} MiB for the rows of a partition",
                RESULT_BYTES_MAX >> 20
            );
            return Err(external(Error::limit_exceeded(message)));
        }
        Ok(value)
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        self.inner.state()
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> Result<()> {
        self.inner.merge_batch(states)
    }

    fn retract_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        self.inner.retract_batch(values)
    }

    fn supports_retract_batch(&self) -> bool {
        self.inner.supports_retract_batch()
    }
}

impl Growth {
    /// The size of the result, or more.
    fn bytes(self, args: &[ColumnarValue], rows: usize) -> Result<u64> {
        let constant = args.iter().all(|a| matches!(a, ColumnarValue::Scalar(_)));
        let rows = if constant { 1 } else { rows as u64 };
        let all = |i: usize| args.get(i).map_or(0, |a| bytes(a, rows));
        let one = |i: usize| args.get(i).map_or(0, longest);
        let sum = (0..args.len()).fold(0u64, |sum, i| sum.saturating_add(all(i)));
        Ok(match self {
            Self::Sum(times) => sum.saturating_mul(times),
            Self::Times => match &args.first() {
                Some(ColumnarValue::Scalar(value)) => scalar_bytes(value).saturating_mul(counts(args.get(1), rows)?),
                _ => all(0).saturating_mul(largest_count(args.get(1))?),
            },
            // A character has up to four bytes.
            Self::Pad => counts(args.get(1), rows)?.saturating_mul(4).saturating_add(all(0)),
            Self::Length => one(2).max(8).saturating_mul(counts(args.get(1), rows)?).saturating_add(all(0)),
            Self::Replace => {
                let from = match args.get(1) {
                    Some(ColumnarValue::Scalar(value)) => text_bytes(value).unwrap_or(8).max(1),
                    _ => 1,
                };
                let found = (all(0) / from).saturating_add(rows);
                all(0).saturating_add(found.saturating_mul(one(2)))
            }
            Self::ReplaceRegex => {
                let global = args.get(3).is_some_and(|flags| match flags {
                    ColumnarValue::Scalar(value) => value.to_string().contains('g'),
                    ColumnarValue::Array(_) => true,
                });
                let found = if global { all(0).saturating_add(rows) } else { rows };
                // Each stands for all that matched.
                let references = match args.get(2) {
                    Some(ColumnarValue::Scalar(value)) => {
                        value.try_as_str().flatten().map_or(0, |t| t.matches(['\\', '$']).count() as u64)
                    }
                    _ => one(2) / 2,
                };
                all(0).saturating_mul(references + 1).saturating_add(found.saturating_mul(one(2)))
            }
            Self::Join => {
                let between = one(1).saturating_add(one(2)).saturating_add(24);
                let elements = match args.first() {
                    Some(ColumnarValue::Array(array)) => elements(array),
                    Some(ColumnarValue::Scalar(value)) => value.to_array().map_or(0, |a| elements(&a)) * rows,
                    None => 0,
                };
                all(0).saturating_add(elements.saturating_mul(between))
            }
            Self::Range => range(args, rows)?.saturating_mul(8),
        })
    }
}

/// The bytes of an argument, a constant counted once for each row.
fn bytes(value: &ColumnarValue, rows: u64) -> u64 {
    match value {
        ColumnarValue::Scalar(value) => scalar_bytes(value).saturating_mul(rows),
        ColumnarValue::Array(array) => array_bytes(array),
    }
}

/// The bytes of the longest of an argument's values, or more.
fn longest(value: &ColumnarValue) -> u64 {
    fn steps<T: Copy + Into<i64>>(offsets: &[T]) -> u64 {
        let longest = offsets.windows(2).map(|o| o[1].into() - o[0].into()).max();
        u64::try_from(longest.unwrap_or(0)).unwrap_or(0)
    }
    match value {
        ColumnarValue::Scalar(value) => scalar_bytes(value),
        ColumnarValue::Array(array) => match array.data_type() {
            DataType::Utf8 => steps(array.as_string::<i32>().value_offsets()),
            DataType::LargeUtf8 => steps(array.as_string::<i64>().value_offsets()),
            DataType::Utf8View => array.as_string_view().lengths().map(u64::from).max().unwrap_or(0),
            kind if kind.is_primitive() => 16,
            _ => array_bytes(array),
        },
    }
}

fn text_bytes(value: &ScalarValue) -> Option<u64> {
    value.try_as_str().flatten().map(|text| text.len() as u64)
}

/// The bytes of a value.
pub fn scalar_bytes(value: &ScalarValue) -> u64 {
    match value {
        _ if value.is_null() => 0,
        ScalarValue::List(list) => array_bytes(list.as_ref()),
        ScalarValue::LargeList(list) => array_bytes(list.as_ref()),
        ScalarValue::FixedSizeList(list) => array_bytes(list.as_ref()),
        ScalarValue::Struct(fields) => array_bytes(fields.as_ref()),
        ScalarValue::Map(map) => array_bytes(map.as_ref()),
        ScalarValue::Dictionary(_, value) => scalar_bytes(value),
        ScalarValue::Binary(Some(bytes))
        | ScalarValue::LargeBinary(Some(bytes))
        | ScalarValue::BinaryView(Some(bytes)) => bytes.len() as u64,
        value => text_bytes(value).unwrap_or(16),
    }
}

fn array_bytes(array: &dyn Array) -> u64 {
    fn between<T: Copy + Into<i64>>(offsets: &[T]) -> u64 {
        match offsets {
            [first, .., last] => u64::try_from((*last).into() - (*first).into()).unwrap_or(0),
            _ => 0,
        }
    }
    match array.data_type() {
        DataType::Utf8 => between(array.as_string::<i32>().value_offsets()),
        DataType::LargeUtf8 => between(array.as_string::<i64>().value_offsets()),
        DataType::Binary => between(array.as_binary::<i32>().value_offsets()),
        DataType::LargeBinary => between(array.as_binary::<i64>().value_offsets()),
        DataType::Utf8View => array.as_string_view().lengths().map(u64::from).sum(),
        DataType::BinaryView => array.as_binary_view().lengths().map(u64::from).sum(),
        // Values that are the same for many rows are text for each.
        DataType::Dictionary(_, values) if values.is_string() => {
            cast(array, &DataType::Utf8View).map_or(0, |texts| array_bytes(&texts))
        }
        _ => {
            let data = array.to_data();
            let views = data.child_data().iter().any(|c| matches!(c.data_type(), DataType::Utf8View));
            // What a slice of views refers to is counted whole.
            let bytes = if views { data.get_array_memory_size() } else { data.get_slice_memory_size().unwrap_or(0) };
            bytes as u64
        }
    }
}

fn elements(array: &ArrayRef) -> u64 {
    match array.data_type() {
        DataType::List(_) => elements(array.as_list::<i32>().values()),
        DataType::LargeList(_) => elements(array.as_list::<i64>().values()),
        DataType::FixedSizeList(..) => elements(array.as_fixed_size_list().values()),
        _ => array.len() as u64,
    }
}

/// The sum of the counts in an argument, negative ones taken for zero.
fn counts(value: Option<&ColumnarValue>, rows: u64) -> Result<u64> {
    Ok(match value {
        None => 0,
        Some(ColumnarValue::Scalar(_)) => largest_count(value)?.saturating_mul(rows),
        Some(ColumnarValue::Array(array)) => {
            let numbers = cast(array, &DataType::Int64)?;
            let positive = |n: i64| u64::try_from(n).unwrap_or(0);
            numbers.as_primitive::<Int64Type>().iter().flatten().fold(0, |sum, n| positive(n).saturating_add(sum))
        }
    })
}

fn largest_count(value: Option<&ColumnarValue>) -> Result<u64> {
    let Some(value) = value else { return Ok(0) };
    let array = match value {
        ColumnarValue::Scalar(value) => value.to_array()?,
        ColumnarValue::Array(array) => array.clone(),
    };
    let numbers = cast(&array, &DataType::Int64)?;
    let largest = numbers.as_primitive::<Int64Type>().iter().flatten().max().unwrap_or(0);
    Ok(u64::try_from(largest).unwrap_or(0))
}

/// How many numbers or times there are between the first two arguments.
fn range(args: &[ColumnarValue], rows: u64) -> Result<u64> {
    let column = |i: usize| args.get(i).map(|a| a.to_array(rows as usize)).transpose();
    let (first, second, third) = (column(0)?, column(1)?, column(2)?);
    let Some(first) = first else { return Ok(0) };
    let (start, stop) = match second {
        Some(second) => (position(&first)?, position(&second)?),
        None => (vec![Some(0.0); first.len()], position(&first)?),
    };
    let step = third.map_or_else(|| Ok(vec![Some(1.0); start.len()]), |t| position(&t))?;
    let mut sum = 0u64;
    for ((start, stop), step) in start.iter().zip(&stop).zip(&step) {
        if let (Some(start), Some(stop), Some(step)) = (start, stop, step) {
            let count = ((stop - start) / step).max(0.0) + 1.0;
            // A step of nothing is for the function to refuse.
            sum = sum.saturating_add(if count.is_finite() { count as u64 } else { 0 });
        }
    }
    Ok(sum)
}

/// Numbers as they are, times and the shortest that an interval can be in nanoseconds.
fn position(array: &ArrayRef) -> Result<Vec<Option<f64>>> {
    let array = match array.data_type() {
        DataType::Interval(_) => {
            let whole = cast(array, &DataType::Interval(IntervalUnit::MonthDayNano))?;
            let intervals = whole.as_primitive::<arrow::datatypes::IntervalMonthDayNanoType>();
            const DAY: f64 = 86_400e9;
            let nanos = |months: i32, days: i32, nanos: i64| {
                f64::from(months) * 28.0 * DAY + f64::from(days) * DAY + nanos as f64
            };
            return Ok(intervals.iter().map(|i| i.map(|i| nanos(i.months, i.days, i.nanoseconds))).collect());
        }
        DataType::Date32 | DataType::Date64 | DataType::Timestamp(..) => {
            let micros = cast(array, &DataType::Timestamp(TimeUnit::Microsecond, None))?;
            let numbers = cast(&micros, &DataType::Int64)?;
            return Ok(numbers.as_primitive::<Int64Type>().iter().map(|n| n.map(|n| n as f64 * 1e3)).collect());
        }
        _ => cast(array, &DataType::Float64)?,
    };
    Ok(array.as_primitive::<Float64Type>().iter().collect())
}

#[cfg(test)]
mod tests {
    use arrow::array::{Int64Array, StringArray};

    use super::*;

    #[test]
    fn the_list_is_sorted() {
        assert!(GROWING.is_sorted_by_key(|(name, _)| *name));
    }

    #[test]
    fn sizes_follow_from_arguments() {
        let text = |t: &str| ColumnarValue::Scalar(ScalarValue::from(t));
        let number = |n: i64| ColumnarValue::Scalar(ScalarValue::from(n));
        let texts = || ColumnarValue::Array(Arc::new(StringArray::from(vec!["ab", "c", ""])));
        let numbers = || ColumnarValue::Array(Arc::new(Int64Array::from(vec![1, -5, 10])));
        let check = |growth: Growth, args: Vec<ColumnarValue>, expected: u64| {
            assert_eq!(growth.bytes(&args, 3).unwrap(), expected, "{growth:?} {args:?}");
        };
        check(Growth::Sum(1), vec![text("abc"), text("de")], 5);
        check(Growth::Sum(1), vec![text("abc"), texts()], 12);
        check(Growth::Times, vec![text("abc"), number(1000)], 3000);
        check(Growth::Times, vec![text("abc"), numbers()], 33);
        check(Growth::Times, vec![texts(), number(100)], 300);
        check(Growth::Times, vec![text("abc"), number(-1)], 0);
        check(Growth::Times, vec![text("abc"), number(i64::MAX)], u64::MAX);
        check(Growth::Pad, vec![text("abc"), number(1000)], 4003);
        check(Growth::Length, vec![text("abc"), number(1000), text("0123456789")], 10_003);
        check(Growth::Replace, vec![text("aaaa"), text("a"), text("xyz")], 4 + 5 * 3);
        check(Growth::Replace, vec![texts(), text("a"), texts()], 3 + (3 + 3) * 2);
        check(Growth::ReplaceRegex, vec![text("abcd"), text("(.*)"), text("<\\1\\1>")], 4 * 3 + 6);
        check(Growth::Range, vec![number(1), number(1001), number(10)], 101 * 8);
        check(Growth::Range, vec![number(10)], 11 * 8);
        check(Growth::Range, vec![number(1), number(10), number(0)], 0);
    }
}
