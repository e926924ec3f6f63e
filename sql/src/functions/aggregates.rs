//! Aggregates that other databases have under these names: those that are one of DataFusion's in other words, and
//! `apdex`, `histogram_quantile` and `topk`.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Float64Array, Float64Builder, Int64Array, Int64Builder, ListArray,
    ListBuilder, new_empty_array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, FieldRef, Float64Type, Int64Type};
use arrow::row::{RowConverter, SortField};
use datafusion::common::ScalarValue;
use datafusion::error::{DataFusionError, Result};
use datafusion::functions_aggregate::count::count_udaf;
use datafusion::functions_aggregate::first_last::{first_value_udaf, last_value_udaf};
use datafusion::functions_aggregate::percentile_cont::percentile_cont_udaf;
use datafusion::logical_expr::expr::{AggregateFunction, Sort};
use datafusion::logical_expr::function::{AccumulatorArgs, AggregateFunctionSimplification, StateFieldsArgs};
use datafusion::logical_expr::utils::{AggregateOrderSensitivity, format_state_name};
use datafusion::logical_expr::{
    Accumulator, AggregateUDFImpl, Expr, GroupsAccumulator, Signature, TypeSignature, Volatility,
};
use engine::kernels::buckets::{self, Bucket};
use engine::kernels::order_key;

use super::bucket::refused;
use super::grouped::{Groups, Kept, Rows, constant};

/// An aggregate that is another one in other words.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct InOtherWords {
    name: &'static str,
    meaning: Meaning,
    signature: Signature,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Meaning {
    First,
    Last,
    Percentile,
    Uniq,
}

impl InOtherWords {
    /// All of them.
    pub fn all() -> [Self; 6] {
        let of = |name, meaning| {
            let signature = match meaning {
                Meaning::First | Meaning::Last => Signature::any(2, Volatility::Immutable),
                Meaning::Percentile => Signature::exact(vec![DataType::Float64; 2], Volatility::Immutable),
                Meaning::Uniq => Signature::any(1, Volatility::Immutable),
            };
            Self { name, meaning, signature }
        };
        [
            of("first", Meaning::First),
            of("last", Meaning::Last),
            of("percentile", Meaning::Percentile),
            of("percentile_exact", Meaning::Percentile),
            of("uniq", Meaning::Uniq),
            of("uniq_exact", Meaning::Uniq),
        ]
    }
}

fn in_other_words(name: &str, meaning: Meaning, call: AggregateFunction) -> Result<AggregateFunction> {
    let AggregateFunction { mut params, .. } = call;
    let by_time = |args: &mut Vec<Expr>, nulls_first| -> Result<Vec<Sort>> {
        let time = args.pop().ok_or_else(|| DataFusionError::Plan(format!("{name} takes a value and a time")))?;
        Ok(vec![Sort { expr: time, asc: true, nulls_first }])
    };
    // A row without a time is neither first nor last.
    let func = match meaning {
        Meaning::First => {
            params.order_by = by_time(&mut params.args, false)?;
            first_value_udaf()
        }
        Meaning::Last => {
            params.order_by = by_time(&mut params.args, true)?;
            last_value_udaf()
        }
        Meaning::Percentile => {
            let percent = match params.args.get(1) {
                Some(Expr::Literal(ScalarValue::Float64(Some(p)), _)) if (0.0..=100.0).contains(p) => *p,
                Some(Expr::Literal(value, _)) => {
                    return Err(DataFusionError::Plan(format!("{name} takes a percentage from 0 to 100, not {value}")));
                }
                _ => return Err(DataFusionError::Plan(format!("argument 2 of {name} must be a constant"))),
            };
            params.args[1] = Expr::Literal(ScalarValue::Float64(Some(percent / 100.0)), None);
            percentile_cont_udaf()
        }
        Meaning::Uniq => {
            params.distinct = true;
            count_udaf()
        }
    };
    Ok(AggregateFunction { func, params })
}

impl AggregateUDFImpl for InOtherWords {
    fn name(&self) -> &str {
        self.name
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, given: &[DataType]) -> Result<DataType> {
        Ok(match self.meaning {
            Meaning::First | Meaning::Last => given.first().cloned().unwrap_or(DataType::Null),
            Meaning::Percentile => DataType::Float64,
            Meaning::Uniq => DataType::Int64,
        })
    }

    fn is_nullable(&self) -> bool {
        self.meaning != Meaning::Uniq
    }

    fn default_value(&self, kind: &DataType) -> Result<ScalarValue> {
        match self.meaning {
            Meaning::Uniq => Ok(ScalarValue::Int64(Some(0))),
            _ => ScalarValue::try_from(kind),
        }
    }

    fn simplify(&self) -> Option<AggregateFunctionSimplification> {
        let (name, meaning) = (self.name, self.meaning);
        Some(Box::new(move |call, _| Ok(Expr::AggregateFunction(in_other_words(name, meaning, call)?))))
    }

    fn accumulator(&self, _args: AccumulatorArgs<'_>) -> Result<Box<dyn Accumulator>> {
        Err(DataFusionError::NotImplemented(format!("{} over a window", self.name)))
    }
}

/// The aggregates that are computed here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Own {
    Apdex,
    HistogramQuantile,
    TopK,
}

/// One of them.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct OwnAggregate {
    name: &'static str,
    own: Own,
    signature: Signature,
}

/// Most elements of one answer of `topk`.
const TOP_MAX: i64 = 10_000;

impl OwnAggregate {
    /// All of them.
    pub fn all() -> [Self; 3] {
        let of = |name, own| {
            let numbers = |n| TypeSignature::Exact(vec![DataType::Float64; n]);
            let signature = match own {
                Own::Apdex => Signature::new(numbers(2), Volatility::Immutable),
                // A bound is a label: text, of which a cast makes a number once for each value.
                Own::HistogramQuantile => Signature::user_defined(Volatility::Immutable),
                Own::TopK => Signature::user_defined(Volatility::Immutable),
            };
            Self { name, own, signature }
        };
        [of("apdex", Own::Apdex), of("histogram_quantile", Own::HistogramQuantile), of("topk", Own::TopK)]
    }

    fn top(&self, args: &AccumulatorArgs<'_>) -> Result<TopK> {
        let k = match constant(args, 1)? {
            ScalarValue::Int64(Some(k)) if (1..=TOP_MAX).contains(&k) => k as usize,
            other => {
                return Err(DataFusionError::Plan(format!("topk takes a number from 1 to {TOP_MAX}, not {other}")));
            }
        };
        TopK::new(args.expr_fields[0].data_type().clone(), k)
    }

    fn quantile(args: &AccumulatorArgs<'_>) -> Result<HistogramQuantile> {
        match constant(args, 0)? {
            ScalarValue::Float64(Some(q)) => Ok(HistogramQuantile { q }),
            other => Err(DataFusionError::Plan(format!("histogram_quantile takes a quantile, not {other}"))),
        }
    }
}

fn list_of(kind: &DataType) -> DataType {
    DataType::List(Arc::new(Field::new_list_field(kind.clone(), true)))
}

impl AggregateUDFImpl for OwnAggregate {
    fn name(&self) -> &str {
        self.name
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, given: &[DataType]) -> Result<Vec<DataType>> {
        match (self.own, given) {
            (Own::TopK, [value, k]) if k.is_integer() => Ok(vec![value.clone(), DataType::Int64]),
            (Own::TopK, _) => Err(DataFusionError::Plan("topk takes a value and how many".to_owned())),
            (Own::HistogramQuantile, [_, _, _]) => Ok(vec![DataType::Float64; 3]),
            _ => Err(DataFusionError::Plan(format!("{} takes a quantile, a bound and a count", self.name))),
        }
    }

    fn return_type(&self, given: &[DataType]) -> Result<DataType> {
        Ok(match self.own {
            Own::Apdex | Own::HistogramQuantile => DataType::Float64,
            Own::TopK => list_of(given.first().unwrap_or(&DataType::Null)),
        })
    }

    fn state_fields(&self, args: StateFieldsArgs<'_>) -> Result<Vec<FieldRef>> {
        let field = |name: &str, kind: DataType| Arc::new(Field::new(format_state_name(args.name, name), kind, true));
        let list = |name: &str, kind: &DataType| field(name, list_of(kind));
        Ok(match self.own {
            Own::Apdex => vec![
                field("satisfied", DataType::Int64),
                field("tolerated", DataType::Int64),
                field("all", DataType::Int64),
            ],
            Own::HistogramQuantile => vec![list("bounds", &DataType::Float64), list("counts", &DataType::Float64)],
            Own::TopK => vec![list("values", args.input_fields[0].data_type()), list("counts", &DataType::Int64)],
        })
    }

    fn accumulator(&self, args: AccumulatorArgs<'_>) -> Result<Box<dyn Accumulator>> {
        Ok(match self.own {
            Own::Apdex => Groups::one(Apdex),
            Own::HistogramQuantile => Groups::one(Self::quantile(&args)?),
            Own::TopK => Groups::one(self.top(&args)?),
        })
    }

    fn groups_accumulator_supported(&self, args: AccumulatorArgs<'_>) -> bool {
        !args.is_distinct
    }

    fn create_groups_accumulator(&self, args: AccumulatorArgs<'_>) -> Result<Box<dyn GroupsAccumulator>> {
        Ok(match self.own {
            Own::Apdex => Groups::many(Apdex),
            Own::HistogramQuantile => Groups::many(Self::quantile(&args)?),
            Own::TopK => Groups::many(self.top(&args)?),
        })
    }

    fn order_sensitivity(&self) -> AggregateOrderSensitivity {
        AggregateOrderSensitivity::Insensitive
    }
}

/// The share of durations within a threshold, in per cent as DeepFlow has it, those within four times the threshold
/// counted half.
#[derive(Debug)]
struct Apdex;

impl Kept for Apdex {
    /// Satisfied, tolerated, all.
    type Group = [i64; 3];

    fn update(&self, groups: &mut [[i64; 3]], args: &[ArrayRef], rows: Rows<'_>) -> Result<usize> {
        let (durations, thresholds) = (args[0].as_primitive::<Float64Type>(), args[1].as_primitive::<Float64Type>());
        for (row, group) in rows.filter(|(row, _)| durations.is_valid(*row) && thresholds.is_valid(*row)) {
            let (duration, threshold) = (durations.value(row), thresholds.value(row));
            let group = &mut groups[group];
            group[0] += i64::from(duration <= threshold);
            group[1] += i64::from(duration > threshold && duration <= 4.0 * threshold);
            group[2] += 1;
        }
        Ok(0)
    }

    fn merge(&self, groups: &mut [[i64; 3]], states: &[ArrayRef], rows: Rows<'_>) -> Result<usize> {
        for (row, group) in rows {
            for (sum, state) in groups[group].iter_mut().zip(states) {
                *sum += state.as_primitive::<Int64Type>().value(row);
            }
        }
        Ok(0)
    }

    fn states(&self, groups: &[[i64; 3]]) -> Result<Vec<ArrayRef>> {
        let column = |i: usize| Arc::new(groups.iter().map(|g| g[i]).collect::<Int64Array>()) as ArrayRef;
        Ok((0..3).map(column).collect())
    }

    fn results(&self, groups: &mut [[i64; 3]]) -> Result<ArrayRef> {
        let index = |g: &[i64; 3]| (g[2] > 0).then(|| (g[0] as f64 + g[1] as f64 / 2.0) / g[2] as f64 * 100.0);
        Ok(Arc::new(groups.iter().map(index).collect::<Float64Array>()))
    }

    fn bytes(_group: &[i64; 3]) -> usize {
        0
    }
}

/// The quantile of a classic histogram's cumulative buckets, as PromQL computes it. Counts with one bound add up.
#[derive(Debug)]
struct HistogramQuantile {
    q: f64,
}

impl HistogramQuantile {
    fn add(group: &mut Vec<Bucket>, upper: f64, count: f64) -> usize {
        let before = group.capacity();
        match group.iter_mut().find(|b| order_key(b.upper) == order_key(upper)) {
            Some(bucket) => bucket.count += count,
            None => group.push(Bucket { upper, count }),
        }
        (group.capacity() - before) * size_of::<Bucket>()
    }
}

/// Most different bounds of one histogram.
const BOUNDS_MAX: usize = 10_000;

impl Kept for HistogramQuantile {
    type Group = Vec<Bucket>;

    fn update(&self, groups: &mut [Vec<Bucket>], args: &[ArrayRef], rows: Rows<'_>) -> Result<usize> {
        let (bounds, counts) = (args[1].as_primitive::<Float64Type>(), args[2].as_primitive::<Float64Type>());
        let mut grown = 0;
        for (row, group) in rows.filter(|(row, _)| bounds.is_valid(*row) && counts.is_valid(*row)) {
            grown += Self::add(&mut groups[group], bounds.value(row), counts.value(row));
            if groups[group].len() > BOUNDS_MAX {
                return Err(refused(format!("histogram_quantile was given more than {BOUNDS_MAX} different bounds")));
            }
        }
        Ok(grown)
    }

    fn merge(&self, groups: &mut [Vec<Bucket>], states: &[ArrayRef], rows: Rows<'_>) -> Result<usize> {
        let (bounds, counts) = (states[0].as_list::<i32>(), states[1].as_list::<i32>());
        let mut grown = 0;
        for (row, group) in rows {
            let (bounds, counts) = (bounds.value(row), counts.value(row));
            let (bounds, counts) = (bounds.as_primitive::<Float64Type>(), counts.as_primitive::<Float64Type>());
            for (upper, count) in bounds.values().iter().zip(counts.values()) {
                grown += Self::add(&mut groups[group], *upper, *count);
            }
        }
        Ok(grown)
    }

    fn states(&self, groups: &[Vec<Bucket>]) -> Result<Vec<ArrayRef>> {
        let column = |get: fn(&Bucket) -> f64| {
            let mut lists = ListBuilder::new(Float64Builder::new());
            for group in groups {
                group.iter().for_each(|b| lists.values().append_value(get(b)));
                lists.append(true);
            }
            Arc::new(lists.finish()) as ArrayRef
        };
        Ok(vec![column(|b| b.upper), column(|b| b.count)])
    }

    fn results(&self, groups: &mut [Vec<Bucket>]) -> Result<ArrayRef> {
        let quantile = |group: &mut Vec<Bucket>| {
            group.sort_by(|a, b| a.upper.total_cmp(&b.upper));
            (!group.is_empty()).then(|| buckets::quantile(self.q, group).0)
        };
        Ok(Arc::new(groups.iter_mut().map(quantile).collect::<Float64Array>()))
    }

    fn bytes(group: &Vec<Bucket>) -> usize {
        group.capacity() * size_of::<Bucket>()
    }
}

/// The most frequent values.
#[derive(Debug)]
struct TopK {
    kind: DataType,
    k: usize,
    rows: RowConverter,
}

/// How often each value came, by its bytes in the converter's form.
type Counts = HashMap<Box<[u8]>, i64, foldhash::fast::FixedState>;

impl TopK {
    fn new(kind: DataType, k: usize) -> Result<Self> {
        let rows = RowConverter::new(vec![SortField::new(kind.clone())])
            .map_err(|_| DataFusionError::Plan(format!("topk takes values that can be sorted, not {kind}")))?;
        Ok(Self { kind, k, rows })
    }

    fn add(counts: &mut Counts, value: &[u8], count: i64) -> usize {
        if let Some(known) = counts.get_mut(value) {
            *known += count;
            return 0;
        }
        let before = counts.capacity();
        counts.insert(Box::from(value), count);
        value.len() + (counts.capacity() - before) * SLOT_BYTES
    }

    fn lists<'a>(&self, groups: impl Iterator<Item = Vec<&'a [u8]>>) -> Result<ArrayRef> {
        let parser = self.rows.parser();
        let (mut parsed, mut offsets) = (Vec::new(), vec![0i32]);
        for group in groups {
            parsed.extend(group.into_iter().map(|bytes| parser.parse(bytes)));
            let end = i32::try_from(parsed.len()).map_err(|_| refused("topk holds more than 2^31 values"))?;
            offsets.push(end);
        }
        let values = if parsed.is_empty() {
            new_empty_array(&self.kind)
        } else {
            self.rows.convert_rows(parsed)?.swap_remove(0)
        };
        let DataType::List(item) = list_of(&self.kind) else { return Err(refused("topk gives a list")) };
        Ok(Arc::new(ListArray::try_new(item, OffsetBuffer::new(offsets.into()), values, None)?))
    }
}

/// What a map needs for each entry besides the bytes of its key.
const SLOT_BYTES: usize = size_of::<(Box<[u8]>, i64)>() + 1;

impl Kept for TopK {
    type Group = Counts;

    fn update(&self, groups: &mut [Counts], args: &[ArrayRef], rows: Rows<'_>) -> Result<usize> {
        let values = self.rows.convert_columns(&args[..1])?;
        let nulls = args[0].logical_nulls();
        let mut grown = 0;
        for (row, group) in rows.filter(|(row, _)| nulls.as_ref().is_none_or(|n| n.is_valid(*row))) {
            grown += Self::add(&mut groups[group], values.row(row).data(), 1);
        }
        Ok(grown)
    }

    fn merge(&self, groups: &mut [Counts], states: &[ArrayRef], rows: Rows<'_>) -> Result<usize> {
        let (values, counts) = (states[0].as_list::<i32>(), states[1].as_list::<i32>());
        let mut grown = 0;
        for (row, group) in rows {
            let (values, counts) = (self.rows.convert_columns(&[values.value(row)])?, counts.value(row));
            let counts = counts.as_primitive::<Int64Type>();
            for (value, count) in values.iter().zip(counts.values()) {
                grown += Self::add(&mut groups[group], value.data(), *count);
            }
        }
        Ok(grown)
    }

    fn states(&self, groups: &[Counts]) -> Result<Vec<ArrayRef>> {
        let mut counts = ListBuilder::new(Int64Builder::new());
        for group in groups {
            // A map walks in one order until it changes.
            group.values().for_each(|n| counts.values().append_value(*n));
            counts.append(true);
        }
        let values = self.lists(groups.iter().map(|g| g.keys().map(AsRef::as_ref).collect()))?;
        Ok(vec![values, Arc::new(counts.finish())])
    }

    fn results(&self, groups: &mut [Counts]) -> Result<ArrayRef> {
        let top = |group: &Counts| {
            let mut all: Vec<(&[u8], i64)> = group.iter().map(|(v, n)| (v.as_ref(), *n)).collect();
            // Bytes sort as the values do.
            let order = |a: &(&[u8], i64), b: &(&[u8], i64)| b.1.cmp(&a.1).then(a.0.cmp(b.0));
            if all.len() > self.k {
                all.select_nth_unstable_by(self.k - 1, order);
                all.truncate(self.k);
            }
            all.sort_unstable_by(order);
            all.into_iter().map(|(v, _)| v.to_vec()).collect::<Vec<_>>()
        };
        let tops: Vec<Vec<Vec<u8>>> = groups.iter().map(top).collect();
        let nulls: BooleanArray = groups.iter().map(|g| Some(!g.is_empty())).collect();
        let lists = self.lists(tops.iter().map(|t| t.iter().map(Vec::as_slice).collect()))?;
        // No values, no answer, as with other aggregates.
        Ok(arrow::compute::nullif(&lists, &arrow::compute::not(&nulls)?)?)
    }

    fn bytes(group: &Counts) -> usize {
        group.capacity() * SLOT_BYTES + group.keys().map(|k| k.len()).sum::<usize>()
    }
}
