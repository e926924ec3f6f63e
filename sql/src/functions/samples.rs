//! `rate`, `increase` and `delta` as aggregates over the samples of one series: `rate(ts, value)`, with the semantics of
//! the PromQL functions of these names.
//!
//! PromQL extrapolates to the edges of a window. Here the window is a time bucket: that by which the rows are grouped
//! (`GROUP BY time_bucket('5m', ts)`, see [`super::gapfill`]), or the one given as further arguments, which are those of
//! `time_bucket`. `rate` over the bucket `[a, a + 5m)` is what PromQL answers for `rate(...[5m])` a millisecond before
//! its end, since its windows are open at the start. Without a bucket nothing is extrapolated: the change from the
//! first sample to the last counts, and the time between them.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float64Builder, Int64Builder, ListBuilder};
use arrow::datatypes::{DataType, Field, FieldRef, Float64Type, Int64Type, TimeUnit, TimestampMillisecondType};
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::utils::{AggregateOrderSensitivity, format_state_name};
use datafusion::logical_expr::{Accumulator, AggregateUDFImpl, GroupsAccumulator, Signature, Volatility};
use engine::kernels::{self, Arguments, RangeFunction, Scratch, Windows};

use super::bucket::{Bucket, INTERVAL, refused, time_kind};
use super::grouped::{Groups, Kept, Rows, constant};

/// The functions by name.
pub const OVER_SAMPLES: [(&str, RangeFunction); 3] =
    [("delta", RangeFunction::Delta), ("increase", RangeFunction::Increase), ("rate", RangeFunction::Rate)];

/// One of the functions.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct OverSamples {
    name: &'static str,
    function: RangeFunction,
    signature: Signature,
}

impl OverSamples {
    /// The function with this name.
    pub fn new(name: &'static str, function: RangeFunction) -> Self {
        Self { name, function, signature: Signature::user_defined(Volatility::Immutable) }
    }

    fn kept(&self, args: &AccumulatorArgs<'_>) -> Result<Samples> {
        let bucket = match args.exprs.len() {
            2 => None,
            n => {
                let rest = (3..n).map(|i| constant(args, i)).collect::<Result<Vec<_>>>()?;
                let milliseconds = DataType::Timestamp(TimeUnit::Millisecond, None);
                Some(Bucket::new(&constant(args, 2)?, &rest, &milliseconds)?)
            }
        };
        Ok(Samples { name: self.name, function: self.function, bucket })
    }
}

impl AggregateUDFImpl for OverSamples {
    fn name(&self) -> &str {
        self.name
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, given: &[DataType]) -> Result<Vec<DataType>> {
        let wrong = |what: String| DataFusionError::Plan(format!("{}(ts, value [, width]) {what}", self.name));
        let [time, value, bucket @ ..] = given else {
            return Err(wrong(format!("takes at least 2 arguments, not {}", given.len())));
        };
        let time = match time_kind(time) {
            Some(DataType::Timestamp(_, zone)) => DataType::Timestamp(TimeUnit::Millisecond, zone),
            _ => return Err(wrong(format!("takes a time first, not {time}"))),
        };
        if !value.is_numeric() && !value.is_null() {
            return Err(wrong(format!("takes a number second, not {value}")));
        }
        if bucket.len() > 2 {
            return Err(wrong(format!("takes at most 4 arguments, not {}", given.len())));
        }
        let mut kinds = vec![time, DataType::Float64];
        kinds.extend(bucket.first().map(|_| INTERVAL));
        kinds.extend(bucket.get(1).cloned());
        Ok(kinds)
    }

    fn return_type(&self, _given: &[DataType]) -> Result<DataType> {
        Ok(DataType::Float64)
    }

    fn state_fields(&self, args: StateFieldsArgs<'_>) -> Result<Vec<FieldRef>> {
        let list = |name: &str, kind: DataType| {
            let item = Arc::new(Field::new_list_field(kind, true));
            Arc::new(Field::new(format_state_name(args.name, name), DataType::List(item), true))
        };
        Ok(vec![list("times", DataType::Int64), list("values", DataType::Float64)])
    }

    fn accumulator(&self, args: AccumulatorArgs<'_>) -> Result<Box<dyn Accumulator>> {
        Ok(Groups::one(self.kept(&args)?))
    }

    fn groups_accumulator_supported(&self, args: AccumulatorArgs<'_>) -> bool {
        !args.is_distinct
    }

    fn create_groups_accumulator(&self, args: AccumulatorArgs<'_>) -> Result<Box<dyn GroupsAccumulator>> {
        Ok(Groups::many(self.kept(&args)?))
    }

    fn order_sensitivity(&self) -> AggregateOrderSensitivity {
        AggregateOrderSensitivity::Insensitive
    }
}

/// Times in milliseconds with their values, in the order in which they came.
type OfGroup = (Vec<i64>, Vec<f64>);

#[derive(Debug)]
struct Samples {
    name: &'static str,
    function: RangeFunction,
    bucket: Option<Bucket>,
}

fn push(group: &mut OfGroup, time: i64, value: f64) -> usize {
    let before = group.0.capacity() + group.1.capacity();
    group.0.push(time);
    group.1.push(value);
    (group.0.capacity() + group.1.capacity() - before) * 8
}

impl Samples {
    fn result(&self, group: &mut OfGroup) -> Result<Option<f64>> {
        in_order(group).map_err(|time| {
            refused(format!(
                "{} was given several values for the time {time} ms: group by all labels of a series",
                self.name
            ))
        })?;
        let (times, values) = (&group.0, &group.1);
        let (Some(first), Some(last)) = (times.first(), times.last()) else { return Ok(None) };
        if times.len() < 2 {
            return Ok(None);
        }
        let Some(bucket) = &self.bucket else {
            let resets = values.windows(2).filter(|w| w[1] < w[0]).map(|w| w[0]);
            let resets = if self.function == RangeFunction::Delta { 0.0 } else { resets.sum() };
            let change = values[values.len() - 1] - values[0] + resets;
            let seconds = (last - first) as f64 / 1000.0;
            return Ok(Some(if self.function == RangeFunction::Rate { change / seconds } else { change }));
        };
        let start = bucket.start(*first)?;
        let end = bucket.next(start)?;
        if *last >= end {
            return Err(refused(format!(
                "{} was given samples of more than one bucket: group by time_bucket with the same width",
                self.name
            )));
        }
        let windows = Windows { first_end: end - 1, step: 0, count: 1, length: end - start };
        let arguments = Arguments { args: [&[], &[]], first_time: end - 1, time_step: 0, starts: &[] };
        let (mut out, mut valid) = ([0.0], [false]);
        let mut scratch = Scratch::default();
        kernels::range(self.function, times, values, &windows, &arguments, &mut scratch, &mut out, &mut valid);
        Ok(valid[0].then_some(out[0]))
    }
}

/// Sorts samples by time unless they are sorted, which a scan's are. What was given twice counts once; the error is a
/// time with different values.
fn in_order(group: &mut OfGroup) -> Result<(), i64> {
    if group.0.is_sorted_by(|a, b| a < b) {
        return Ok(());
    }
    let mut both: Vec<(i64, f64)> = group.0.iter().copied().zip(group.1.iter().copied()).collect();
    both.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    both.dedup_by(|a, b| a.0 == b.0 && a.1.to_bits() == b.1.to_bits());
    if let Some(twice) = both.windows(2).find(|w| w[0].0 == w[1].0) {
        return Err(twice[0].0);
    }
    (group.0, group.1) = both.into_iter().unzip();
    Ok(())
}

impl Kept for Samples {
    type Group = OfGroup;

    fn update(&self, groups: &mut [OfGroup], args: &[ArrayRef], rows: Rows<'_>) -> Result<usize> {
        let (times, values) =
            (args[0].as_primitive::<TimestampMillisecondType>(), args[1].as_primitive::<Float64Type>());
        let mut grown = 0;
        for (row, group) in rows {
            // A stale marker says that a series ended; it is no sample.
            if times.is_valid(row) && values.is_valid(row) && !kernels::is_stale(values.value(row)) {
                grown += push(&mut groups[group], times.value(row), values.value(row));
            }
        }
        Ok(grown)
    }

    fn merge(&self, groups: &mut [OfGroup], states: &[ArrayRef], rows: Rows<'_>) -> Result<usize> {
        let (times, values) = (states[0].as_list::<i32>(), states[1].as_list::<i32>());
        let mut grown = 0;
        for (row, group) in rows.filter(|(row, _)| times.is_valid(*row)) {
            let (times, values) = (times.value(row), values.value(row));
            let (times, values) = (times.as_primitive::<Int64Type>(), values.as_primitive::<Float64Type>());
            for (time, value) in times.values().iter().zip(values.values()) {
                grown += push(&mut groups[group], *time, *value);
            }
        }
        Ok(grown)
    }

    fn states(&self, groups: &[OfGroup]) -> Result<Vec<ArrayRef>> {
        let (mut times, mut values) = (ListBuilder::new(Int64Builder::new()), ListBuilder::new(Float64Builder::new()));
        for group in groups {
            times.values().append_slice(&group.0);
            times.append(true);
            values.values().append_slice(&group.1);
            values.append(true);
        }
        Ok(vec![Arc::new(times.finish()), Arc::new(values.finish())])
    }

    fn results(&self, groups: &mut [OfGroup]) -> Result<ArrayRef> {
        let mut results = Float64Builder::with_capacity(groups.len());
        for group in groups {
            results.append_option(self.result(group)?);
        }
        Ok(Arc::new(results.finish()))
    }

    fn bytes(group: &OfGroup) -> usize {
        (group.0.capacity() + group.1.capacity()) * 8
    }
}

#[cfg(test)]
mod tests {
    use arrow::datatypes::IntervalMonthDayNano;
    use datafusion::common::ScalarValue;

    use super::*;

    fn samples(function: RangeFunction, width: Option<i64>) -> Samples {
        let bucket = width.map(|s| {
            let width = ScalarValue::IntervalMonthDayNano(Some(IntervalMonthDayNano::new(0, 0, s * 1_000_000_000)));
            Bucket::new(&width, &[], &DataType::Timestamp(TimeUnit::Millisecond, None)).unwrap()
        });
        Samples { name: "rate", function, bucket }
    }

    #[test]
    fn changes_count_resets_and_reach_to_the_edges_of_a_bucket() {
        let check = |function, width, given: &[(i64, f64)], expected: Option<f64>| {
            let mut group: OfGroup = given.iter().copied().unzip();
            let got = samples(function, width).result(&mut group).unwrap();
            let close = match (got, expected) {
                (Some(got), Some(expected)) => (got - expected).abs() <= 1e-12 * expected.abs(),
                (got, expected) => got == expected,
            };
            assert!(close, "{function:?} {width:?} {given:?}: {got:?}, expected {expected:?}");
        };
        use RangeFunction::{Delta, Increase, Rate};
        let given = [(0, 10.0), (15_000, 20.0), (30_000, 5.0), (45_000, 15.0)];
        check(Increase, None, &given, Some(25.0));
        check(Rate, None, &given, Some(25.0 / 45.0));
        check(Delta, None, &given, Some(5.0));
        // 0 is one millisecond after the window's open start, 45 s is 14.999 s before its end.
        check(Increase, Some(60), &given, Some(25.0 * ((45.0 + 0.001 + 14.999) / 45.0)));
        let shuffled = [given[2], given[0], given[3], given[0], given[1]];
        check(Increase, None, &shuffled, Some(25.0));
        check(Rate, None, &given[..1], None);
        check(Rate, Some(60), &[], None);
    }

    #[test]
    fn samples_of_several_series_or_buckets_are_refused() {
        let refuse = |width, given: &[(i64, f64)]| {
            let mut group: OfGroup = given.iter().copied().unzip();
            samples(RangeFunction::Rate, width).result(&mut group).unwrap_err().to_string()
        };
        assert!(refuse(None, &[(0, 1.0), (0, 2.0), (1, 1.0)]).contains("several values for the time 0 ms"));
        assert!(refuse(Some(60), &[(0, 1.0), (60_000, 2.0)]).contains("more than one bucket"));
    }

    #[test]
    fn partial_results_add_up() {
        let kept = samples(RangeFunction::Increase, None);
        let parts = vec![(vec![0, 20], vec![1.0, 3.0]), (vec![10, 30], vec![2.0, 4.0])];
        let states = kept.states(&parts).unwrap();
        let mut groups = vec![OfGroup::default()];
        let grown = kept.merge(&mut groups, &states, &mut [(0, 0), (1, 0)].into_iter()).unwrap();
        assert_eq!(grown, Samples::bytes(&groups[0]));
        let results = kept.results(&mut groups).unwrap();
        assert_eq!(results.as_primitive::<Float64Type>().value(0), 3.0);
    }
}
