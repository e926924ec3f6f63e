//! Functions of each value on its own.

use arrow::array::RecordBatch;
use arrow::buffer::{BooleanBuffer, NullBuffer};
use chrono::{DateTime, Datelike, NaiveDate, Timelike, Utc};
use datafusion::error::Result as DfResult;

use super::{Batches, Work, internal};
use crate::block::{self, BlockBuilder, Name, Row};
use crate::histogram::FloatHistogram;
use crate::plan::ops::{MapFunction, Op};
use crate::result::Block;

pub(super) fn execute(work: Work, partition: usize) -> DfResult<Batches> {
    let Op::Map { function, name } = work.op else { return Err(internal("not a map")) };
    work.map_blocks(partition, move |work, scalars, block, _| apply(work, function, name, scalars, &block))
}

/// The same value at every step of a longer grid.
pub(super) fn repeat(work: Work, partition: usize) -> DfResult<Batches> {
    work.map_blocks(partition, |work, _, block, _| {
        let mut builder = BlockBuilder::new(work.schema.clone());
        for row in 0..block.len() {
            let row = Row::of(&block, row);
            let labels = |out: &mut Vec<u8>| Name::Keep.apply(row.labels, row.drop_name, out);
            if let Some(v) = row.get(0) {
                let (values, valid) = builder.push(labels);
                values.fill(v);
                valid.fill(true);
            } else if let Some(histogram) = row.encoded(0) {
                builder.push(labels);
                for step in 0..work.steps() {
                    builder.put_encoded(builder.len() - 1, step, histogram.to_vec());
                }
            }
        }
        builder.finish()
    })
}

/// What a function of native histograms gives; `None` for the others.
fn part(function: MapFunction) -> Option<fn(&FloatHistogram) -> f64> {
    Some(match function {
        MapFunction::HistogramAvg => FloatHistogram::avg,
        MapFunction::HistogramCount => |h| h.count,
        MapFunction::HistogramSum => |h| h.sum,
        MapFunction::HistogramStddev => |h| h.variance().sqrt(),
        MapFunction::HistogramStdvar => FloatHistogram::variance,
        _ => return None,
    })
}

/// The functions that have a value for histograms; the others ignore them.
fn with_histograms(work: &Work, function: MapFunction, name: Name, block: &Block) -> DfResult<RecordBatch> {
    if let Some(part) = part(function) {
        let mut builder = BlockBuilder::new(work.schema.clone());
        for row in (0..block.len()).map(|row| Row::of(block, row)).filter(Row::has_histograms) {
            let (values, valid) = builder.push(|out| name.apply(row.labels, row.drop_name, out));
            row.for_each_histogram(|step, h| (values[step], valid[step]) = (part(&h), true));
        }
        return builder.finish();
    }
    let negate = function == MapFunction::Negate;
    let seconds = |step: usize| work.grid.time(step) as f64 / 1000.0;
    let mut builder = BlockBuilder::new(work.schema.clone());
    for row in 0..block.len() {
        let row = Row::of(block, row);
        let (values, valid) = builder.push(|out| name.apply(row.labels, row.drop_name, out));
        row.validity(valid);
        row.for_each(|step, v| values[step] = if negate { -v } else { seconds(step) });
        if negate {
            let at = builder.len() - 1;
            row.for_each_histogram(|step, mut h| {
                h.mul(-1.0);
                builder.put_histogram(at, step, &h);
            });
        } else {
            row.for_each_encoded(|step, _| (values[step], valid[step]) = (seconds(step), true));
        }
    }
    builder.finish()
}

fn apply(work: &Work, function: MapFunction, name: Name, scalars: &[Vec<f64>], block: &Block) -> DfResult<RecordBatch> {
    use MapFunction as F;
    if block.any_histograms() && (matches!(function, F::Negate | F::Timestamp) || part(function).is_some()) {
        return with_histograms(work, function, name, block);
    }
    let steps = work.steps();
    let scalar = |i: usize| scalars.get(i).map_or(&[][..], Vec::as_slice);
    let mut nulls = None;
    let all = block.all_values();
    let each = |f: fn(f64) -> f64| all.iter().map(|v| f(*v)).collect::<Vec<f64>>();
    // With a step's own scalars.
    let with = |f: &dyn Fn(f64, usize) -> f64| {
        let mut out = Vec::with_capacity(all.len());
        for row in all.chunks_exact(steps) {
            out.extend(row.iter().enumerate().map(|(step, v)| f(*v, step)));
        }
        out
    };
    let values = match function {
        F::Abs => each(f64::abs),
        F::Acos => each(f64::acos),
        F::Acosh => each(f64::acosh),
        F::Asin => each(f64::asin),
        F::Asinh => each(f64::asinh),
        F::Atan => each(f64::atan),
        F::Atanh => each(f64::atanh),
        F::Ceil => each(f64::ceil),
        F::Cos => each(f64::cos),
        F::Cosh => each(f64::cosh),
        F::Deg => each(|v| v * 180.0 / std::f64::consts::PI),
        F::Rad => each(|v| v * std::f64::consts::PI / 180.0),
        F::Exp => each(f64::exp),
        F::Floor => each(f64::floor),
        F::Ln => each(f64::ln),
        F::Log10 => each(f64::log10),
        F::Log2 => each(f64::log2),
        F::Negate => each(|v| -v),
        F::Sgn => each(|v| {
            if v < 0.0 {
                -1.0
            } else if v > 0.0 {
                1.0
            } else {
                v
            }
        }),
        F::Sin => each(f64::sin),
        F::Sinh => each(f64::sinh),
        F::Sqrt => each(f64::sqrt),
        F::Tan => each(f64::tan),
        F::Tanh => each(f64::tanh),
        F::DayOfMonth => each(|v| date(v, |t| f64::from(t.day()))),
        F::DayOfWeek => each(|v| date(v, |t| f64::from(t.weekday().num_days_from_sunday()))),
        F::DayOfYear => each(|v| date(v, |t| f64::from(t.ordinal()))),
        F::DaysInMonth => each(|v| date(v, days_in_month)),
        F::Hour => each(|v| date(v, |t| f64::from(t.hour()))),
        F::Minute => each(|v| date(v, |t| f64::from(t.minute()))),
        F::Month => each(|v| date(v, |t| f64::from(t.month()))),
        F::Year => each(|v| date(v, |t| f64::from(t.year()))),
        F::Timestamp => with(&|_, step| work.grid.time(step) as f64 / 1000.0),
        F::MinOf => with(&|v, step| min(v, scalar(0)[step])),
        F::MaxOf => with(&|v, step| max(v, scalar(0)[step])),
        F::Round => {
            let nearest = scalar(0);
            with(&|v, step| {
                // Multiplying by the inverse gives fewer inexact results than dividing.
                let inverse = 1.0 / nearest.get(step).copied().unwrap_or(1.0);
                (v * inverse + 0.5).floor() / inverse
            })
        }
        F::Clamp => {
            let (low, high) = (scalar(0), scalar(1));
            let empty = |step: usize| high[step] < low[step];
            if (0..steps).any(empty) {
                let keep = BooleanBuffer::collect_bool(all.len(), |i| !empty(i % steps));
                nulls = Some(NullBuffer::new(keep));
            }
            with(&|v, step| max(low[step], min(high[step], v)))
        }
        F::ClampMin => with(&|v, step| max(scalar(0)[step], v)),
        F::ClampMax => with(&|v, step| min(scalar(0)[step], v)),
        // Floats have no such parts.
        F::HistogramAvg | F::HistogramCount | F::HistogramSum | F::HistogramStddev | F::HistogramStdvar => {
            return BlockBuilder::new(work.schema.clone()).finish();
        }
    };
    let nulls = NullBuffer::union(block.nulls(), nulls.as_ref());
    block::with_values(&work.schema, block, values, nulls, name)
}

/// The greater; NaN if either is.
fn max(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

/// The lesser; NaN if either is.
fn min(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.min(b) }
}

fn date(seconds: f64, part: impl Fn(DateTime<Utc>) -> f64) -> f64 {
    if !seconds.is_finite() {
        return f64::NAN;
    }
    DateTime::from_timestamp(seconds as i64, 0).map_or(f64::NAN, part)
}

fn days_in_month(t: DateTime<Utc>) -> f64 {
    let (year, month) = if t.month() == 12 { (t.year() + 1, 1) } else { (t.year(), t.month() + 1) };
    let next = NaiveDate::from_ymd_opt(year, month, 1);
    next.and_then(|d| d.pred_opt()).map_or(f64::NAN, |d| f64::from(d.day()))
}
