//! Series that have native histograms: cutting them out of a scan, and range functions over windows with floats and
//! histograms.

mod edges;
mod glimpse;

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, AsArray, ListArray, PrimitiveArray, RecordBatch};
use arrow::datatypes::{
    ArrowPrimitiveType, Float64Type, Int8Type, Int32Type, Int64Type, TimestampMillisecondType, UInt32Type,
};
use datafusion::error::Result as DfResult;
use datafusion::execution::SendableRecordBatchStream;
use engine::kernels::{self, RangeFunction, Windows, is_stale};
use futures::TryStreamExt;

use super::annotations::{Annotation, Combining, NotesAt};
use super::select::run_length;
use super::{Pace, internal};
use crate::histogram::{Added, Bucket, FloatHistogram, Hint, Mean, Sum};

pub(super) use edges::smoothed;
pub(super) use glimpse::Glimpse;

/// About how many buckets a histogram has.
pub(super) const BUCKETS: usize = 64;

/// The columns of the table `histograms` that are read, in this order after the series.
pub(crate) const COLUMNS: [&str; 18] = [
    "ts",
    "schema",
    "zero_threshold",
    "sum",
    "count_int",
    "count_float",
    "zero_count_int",
    "zero_count_float",
    "positive_offsets",
    "positive_lengths",
    "positive_int",
    "positive_float",
    "negative_offsets",
    "negative_lengths",
    "negative_int",
    "negative_float",
    "custom_values",
    "reset_hint",
];

/// The column that is read after [`COLUMNS`] when it matters when counters began.
pub(super) const START: &str = "start_ts";

fn primitive<T: ArrowPrimitiveType>(batch: &RecordBatch, at: usize) -> DfResult<&PrimitiveArray<T>> {
    let column = batch.columns().get(at).and_then(|c| c.as_primitive_opt::<T>());
    column.ok_or_else(|| internal("a scan's batch is not of histograms"))
}

/// A column of lists.
struct Lists<'a, T: ArrowPrimitiveType>(&'a ListArray, &'a [T::Native]);

impl<'a, T: ArrowPrimitiveType> Lists<'a, T> {
    fn new(batch: &'a RecordBatch, at: usize) -> DfResult<Self> {
        let wrong = || internal("a scan's batch is not of histograms");
        let lists = batch.columns().get(at).and_then(|c| c.as_list_opt::<i32>()).ok_or_else(wrong)?;
        Ok(Self(lists, lists.values().as_primitive_opt::<T>().ok_or_else(wrong)?.values()))
    }

    fn row(&self, row: usize) -> &'a [T::Native] {
        let offsets = self.0.value_offsets();
        &self.1[offsets[row] as usize..offsets[row + 1] as usize]
    }
}

/// The buckets of one side.
struct Side<'a> {
    offsets: Lists<'a, Int32Type>,
    lengths: Lists<'a, Int32Type>,
    int: Lists<'a, Int64Type>,
    float: Lists<'a, Float64Type>,
}

impl<'a> Side<'a> {
    fn new(batch: &'a RecordBatch, at: usize) -> DfResult<Self> {
        Ok(Self {
            offsets: Lists::new(batch, at)?,
            lengths: Lists::new(batch, at + 1)?,
            int: Lists::new(batch, at + 2)?,
            float: Lists::new(batch, at + 3)?,
        })
    }

    fn buckets(&self, row: usize, is_int: bool) -> Vec<Bucket<f64>> {
        let (int, float) = (self.int.row(row), self.float.row(row));
        let mut out = Vec::with_capacity(if is_int { int.len() } else { float.len() });
        let mut index = 0i32;
        for (offset, length) in self.offsets.row(row).iter().zip(self.lengths.row(row)) {
            // Received histograms reach no further than indices do.
            index = index.wrapping_add(*offset);
            for _ in 0..*length {
                let at = out.len();
                let count = if is_int { int.get(at).map(|c| *c as u64 as f64) } else { float.get(at).copied() };
                let Some(count) = count else { return out };
                out.push(Bucket { index, count });
                index = index.wrapping_add(1);
            }
        }
        out
    }
}

/// Appends the histograms of some rows.
pub(super) fn histograms(batch: &RecordBatch, rows: Range<usize>, out: &mut Vec<FloatHistogram>) -> DfResult<()> {
    let schema = primitive::<Int32Type>(batch, 2)?;
    let zero_threshold = primitive::<Float64Type>(batch, 3)?;
    let sum = primitive::<Float64Type>(batch, 4)?;
    let (count_int, count_float) = (primitive::<Int64Type>(batch, 5)?, primitive::<Float64Type>(batch, 6)?);
    let (zero_int, zero_float) = (primitive::<Int64Type>(batch, 7)?, primitive::<Float64Type>(batch, 8)?);
    let (positive, negative) = (Side::new(batch, 9)?, Side::new(batch, 13)?);
    let custom: Lists<'_, Float64Type> = Lists::new(batch, 17)?;
    let hint = primitive::<Int8Type>(batch, 18)?;
    let start = if batch.num_columns() > 19 { Some(primitive::<Int64Type>(batch, 19)?) } else { None };
    // Mostly the same from sample to sample, so that they are kept once.
    let mut bounds: Arc<[f64]> = out.last().map_or_else(Arc::default, |h| h.custom.clone());
    out.reserve(rows.len());
    for row in rows {
        if bounds[..] != *custom.row(row) {
            bounds = custom.row(row).into();
        }
        let is_int = count_int.is_valid(row);
        let count = |int: &PrimitiveArray<Int64Type>, float: &PrimitiveArray<Float64Type>| {
            if is_int { int.value(row) as u64 as f64 } else { float.value(row) }
        };
        out.push(FloatHistogram {
            hint: Hint::of(hint.value(row)),
            start: start.filter(|s| s.is_valid(row)).map_or(0, |s| s.value(row)),
            schema: schema.value(row),
            // A threshold that is no number would never be reconciled with another.
            zero_threshold: zero_threshold.value(row).max(0.0),
            zero_count: count(zero_int, zero_float),
            count: count(count_int, count_float),
            sum: sum.value(row),
            positive: positive.buckets(row, is_int),
            negative: negative.buckets(row, is_int),
            custom: bounds.clone(),
        });
    }
    Ok(())
}

/// Appends the floats of some rows.
pub(super) fn floats(batch: &RecordBatch, rows: Range<usize>, out: &mut Vec<f64>) -> DfResult<()> {
    out.extend_from_slice(&primitive::<Float64Type>(batch, 2)?.values()[rows]);
    Ok(())
}

/// Appends the starts of some rows of the table `start_timestamps`.
pub(super) fn start_times(batch: &RecordBatch, rows: Range<usize>, out: &mut Vec<i64>) -> DfResult<()> {
    out.extend_from_slice(&primitive::<Int64Type>(batch, 2)?.values()[rows]);
    Ok(())
}

/// Float samples of a series.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Floats<'a> {
    pub(super) ts: &'a [i64],
    pub(super) values: &'a [f64],
    /// When the counter of each began, 0 where that is not known; empty when of none.
    pub(super) starts: &'a [i64],
}

impl Floats<'_> {
    fn range(&self, range: Range<usize>) -> Self {
        let starts = self.starts.get(range.clone()).unwrap_or_default();
        Self { ts: &self.ts[range.clone()], values: &self.values[range], starts }
    }

    fn samples(&self) -> impl Iterator<Item = (i64, f64, i64)> {
        let starts = self.starts.iter().copied().chain(std::iter::repeat(0));
        self.ts.iter().zip(self.values).zip(starts).map(|((t, v), start)| (*t, *v, start))
    }

    /// The times, values and starts of the samples that are no stale markers.
    pub(super) fn live(&self) -> (Vec<i64>, Vec<f64>, Vec<i64>) {
        let (mut ts, mut values, mut starts) = (Vec::new(), Vec::new(), Vec::new());
        for (t, v, start) in self.samples().filter(|s| !is_stale(s.1)) {
            ts.push(t);
            values.push(v);
            starts.push(start);
        }
        if self.starts.is_empty() {
            starts.clear();
        }
        (ts, values, starts)
    }
}

/// The starts of samples at some times, 0 where there is none; empty without any.
pub(super) fn starts_of(ts: &[i64], (start_ts, starts): (Vec<i64>, Vec<i64>)) -> Vec<i64> {
    if starts.is_empty() {
        return starts;
    }
    let mut known = start_ts.into_iter().zip(starts).peekable();
    let start = |t: &i64| {
        // What is left of a sample that is gone.
        while known.next_if(|k| k.0 < *t).is_some() {}
        known.next_if(|k| k.0 == *t).map_or(0, |k| k.1)
    };
    ts.iter().map(start).collect()
}

/// When the counter of the newest sample of each window began, in seconds.
pub(super) fn newest_start(
    windows: &Windows,
    floats: Floats<'_>,
    (histogram_ts, histograms): (&[i64], &[FloatHistogram]),
    (out, valid): (&mut [f64], &mut [bool]),
) {
    let seconds = |start: i64, v: f64| if is_stale(v) { v } else { start as f64 / 1000.0 };
    let mut all: Vec<(i64, f64)> = floats.samples().map(|(t, v, start)| (t, seconds(start, v))).collect();
    all.extend(histogram_ts.iter().zip(histograms).map(|(t, h)| (*t, seconds(h.start, h.sum))));
    all.sort_by_key(|s| s.0);
    let (ts, starts): (Vec<i64>, Vec<f64>) = all.into_iter().unzip();
    kernels::instant(&ts, &starts, windows, out, valid);
}

/// The samples of one series: its index, times, values.
pub(super) type SeriesRun<V> = (u32, Vec<i64>, Vec<V>);

/// Cuts a scan into series.
pub(super) struct SeriesRuns<V> {
    input: SendableRecordBatchStream,
    take: fn(&RecordBatch, Range<usize>, &mut Vec<V>) -> DfResult<()>,
    batch: Option<RecordBatch>,
    at: usize,
    done: bool,
    /// The next series, when it was looked at.
    peeked: Option<SeriesRun<V>>,
}

impl<V> SeriesRuns<V> {
    pub(super) fn new(
        input: SendableRecordBatchStream,
        take: fn(&RecordBatch, Range<usize>, &mut Vec<V>) -> DfResult<()>,
    ) -> Self {
        Self { input, take, batch: None, at: 0, done: false, peeked: None }
    }

    /// The index of the next series.
    pub(super) async fn peek(&mut self) -> DfResult<Option<u32>> {
        if self.peeked.is_none() {
            self.peeked = self.read().await?;
        }
        Ok(self.peeked.as_ref().map(|p| p.0))
    }

    /// The samples of the series that was looked at if it has this index.
    pub(super) fn take(&mut self, index: u32) -> (Vec<i64>, Vec<V>) {
        match self.peeked.take_if(|p| p.0 == index) {
            Some((_, times, values)) => (times, values),
            None => (Vec::new(), Vec::new()),
        }
    }

    async fn read(&mut self) -> DfResult<Option<SeriesRun<V>>> {
        let mut run: Option<SeriesRun<V>> = None;
        while !self.done {
            if let Some(batch) = &self.batch {
                let series = primitive::<UInt32Type>(batch, 0)?.values();
                if let Some(index) = series.get(self.at) {
                    if run.as_ref().is_some_and(|r| r.0 != *index) {
                        return Ok(run);
                    }
                    let rows = self.at..self.at + run_length(&series[self.at..], *index);
                    self.at = rows.end;
                    let (_, times, values) = run.get_or_insert_with(|| (*index, Vec::new(), Vec::new()));
                    times.extend_from_slice(&primitive::<TimestampMillisecondType>(batch, 1)?.values()[rows.clone()]);
                    (self.take)(batch, rows, values)?;
                    // A series may go on in the next batch.
                    if self.at < series.len() {
                        return Ok(run);
                    }
                }
            }
            (self.batch, self.at) = (self.input.try_next().await?, 0);
            self.done = self.batch.is_none();
        }
        Ok(run)
    }
}

/// Calls `f(i, end, floats, histograms)` for each window with the samples in it.
fn slide(
    windows: &Windows,
    ts: &[i64],
    histogram_ts: &[i64],
    mut f: impl FnMut(usize, i64, Range<usize>, Range<usize>),
) {
    fn advance(ts: &[i64], start: i64, end: i64, range: &mut Range<usize>) {
        while range.end < ts.len() && ts[range.end] <= end {
            range.end += 1;
        }
        while range.start < range.end && ts[range.start] <= start {
            range.start += 1;
        }
    }
    let (mut floats, mut histograms) = (0..0, 0..0);
    for i in 0..windows.count {
        let end = windows.end(i);
        let start = end.saturating_sub(windows.length);
        advance(ts, start, end, &mut floats);
        advance(histogram_ts, start, end, &mut histograms);
        f(i, end, floats.clone(), histograms.clone());
    }
}

/// The newest sample of each window where that is a histogram: its time in seconds into `out` if `timestamp`, else it itself. `out` and
/// `valid` come with what the floats alone give.
pub(super) fn instant(
    windows: &Windows,
    ts: &[i64],
    (histogram_ts, histograms): (&[i64], &[FloatHistogram]),
    timestamp: bool,
    out: &mut [f64],
    valid: &mut [bool],
) -> Vec<(usize, FloatHistogram)> {
    let mut native = Vec::new();
    slide(windows, ts, histogram_ts, |i, _, floats, range| {
        if range.is_empty() {
            return;
        }
        let newest = range.end - 1;
        let t = histogram_ts[newest];
        if !floats.is_empty() && ts[floats.end - 1] > t {
            return;
        }
        let h = &histograms[newest];
        valid[i] = timestamp && !is_stale(h.sum);
        if timestamp {
            out[i] = t as f64 / 1000.0;
        } else if !is_stale(h.sum) {
            native.push((i, h.clone()));
        }
    });
    native
}

/// What a function gives for a window with histograms in it.
enum Answer {
    /// What it gives for the floats alone.
    OfFloats,
    Nothing,
    Float(f64),
    Histogram(FloatHistogram),
}

/// A function over the windows of one series.
pub(super) struct Ranges<'a> {
    pub(super) function: RangeFunction,
    pub(super) windows: Windows,
    /// Name of the metric.
    pub(super) metric: &'a str,
    /// About the range vector.
    pub(super) notes: NotesAt<'a>,
}

/// The samples of a window, without stale markers.
struct Window<'a> {
    end: i64,
    length: i64,
    floats: Floats<'a>,
    histograms: (&'a [i64], &'a [&'a FloatHistogram]),
}

/// A sample of either kind.
struct Sample<'a> {
    ts: i64,
    start: i64,
    value: Value<'a>,
}

#[derive(Clone, Copy)]
enum Value<'a> {
    Float(f64),
    Histogram(&'a FloatHistogram),
}

impl Ranges<'_> {
    /// Computes the function for windows with histograms; `out` and `valid` come with what the floats alone give.
    pub(super) fn run(
        &self,
        all: Floats<'_>,
        (histogram_ts, histograms): (&[i64], &[&FloatHistogram]),
        (out, valid): (&mut [f64], &mut [bool]),
        pace: &mut Pace,
    ) -> DfResult<Vec<(usize, FloatHistogram)>> {
        let (mut native, mut stopped) = (Vec::new(), Ok(()));
        slide(&self.windows, all.ts, histogram_ts, |i, end, floats, range| {
            if range.is_empty() || stopped.is_err() {
                return;
            }
            // A histogram costs as much as its buckets.
            stopped = pace.walk(floats.len() + BUCKETS * range.len());
            let window = Window {
                end,
                length: self.windows.length,
                floats: all.range(floats),
                histograms: (&histogram_ts[range.clone()], &histograms[range]),
            };
            match self.answer(&window) {
                Answer::OfFloats => {}
                Answer::Float(v) => (out[i], valid[i]) = (v, true),
                Answer::Nothing => valid[i] = false,
                Answer::Histogram(h) => {
                    valid[i] = false;
                    native.push((i, h));
                }
            }
        });
        stopped?;
        Ok(native)
    }

    fn note(&self, annotation: Annotation<'_>) {
        self.notes.annotate(annotation);
    }

    fn added(&self, added: Added, combining: Combining) {
        if added.bounds_reconciled {
            self.note(Annotation::BoundsReconciled(combining));
        }
    }

    fn answer(&self, w: &Window<'_>) -> Answer {
        use RangeFunction as F;
        let mixed = !w.floats.ts.is_empty();
        let float = |v: f64| Answer::Float(v);
        let histogram = |h: Option<FloatHistogram>| h.map_or(Answer::Nothing, Answer::Histogram);
        let (ts, (histogram_ts, histograms)) = (w.floats.ts, w.histograms);
        let (first, last) = (histogram_ts[0], histogram_ts[histogram_ts.len() - 1]);
        match self.function {
            F::Rate | F::Increase | F::Delta | F::Sum | F::Avg if mixed => {
                self.note(Annotation::MixedFloatsHistograms(self.metric));
                Answer::Nothing
            }
            F::Rate => histogram(self.extrapolated(w, true, true)),
            F::Increase => histogram(self.extrapolated(w, true, false)),
            F::Delta => histogram(self.extrapolated(w, false, false)),
            F::Irate | F::Idelta => self.last_two(w),
            F::Sum => histogram(self.sum(histograms)),
            F::Avg => histogram(self.avg(histograms)),
            F::Changes => float(w.steps(differ)),
            F::Resets => float(w.steps(fell)),
            F::Count => float((ts.len() + histograms.len()) as f64),
            F::Present => float(1.0),
            F::Last if ts.last().is_some_and(|t| *t > last) => Answer::OfFloats,
            F::Last => Answer::Histogram(histograms[histograms.len() - 1].clone()),
            F::First if ts.first().is_some_and(|t| *t < first) => Answer::OfFloats,
            F::First => Answer::Histogram(histograms[0].clone()),
            F::TsOfLast => float(ts.last().map_or(last, |t| last.max(*t)) as f64 / 1000.0),
            F::TsOfFirst => float(ts.first().map_or(first, |t| first.min(*t)) as f64 / 1000.0),
            F::Min
            | F::Max
            | F::TsOfMin
            | F::TsOfMax
            | F::Stddev
            | F::Stdvar
            | F::Quantile
            | F::Deriv
            | F::PredictLinear
            | F::Mad
            | F::DoubleExponential => {
                if mixed {
                    self.note(Annotation::IgnoredInMixedRange(self.metric));
                }
                Answer::OfFloats
            }
        }
    }

    fn sum(&self, histograms: &[&FloatHistogram]) -> Option<FloatHistogram> {
        let (first, rest) = histograms.split_first()?;
        let mut sum = Sum::of(first);
        self.add_all(histograms, rest, |h| sum.add(h))?;
        Some(sum.total())
    }

    fn avg(&self, histograms: &[&FloatHistogram]) -> Option<FloatHistogram> {
        let (first, rest) = histograms.split_first()?;
        let mut mean = Mean::of(first);
        self.add_all(histograms, rest, |h| mean.add(h))?;
        Some(mean.value())
    }

    fn add_all<E>(
        &self,
        all: &[&FloatHistogram],
        rest: &[&FloatHistogram],
        mut add: impl FnMut(&FloatHistogram) -> Result<Added, E>,
    ) -> Option<()> {
        let mut reconciled = false;
        for h in rest {
            match add(h) {
                Ok(added) => reconciled |= added.bounds_reconciled,
                Err(_) => {
                    self.note(Annotation::MixedSchemas(self.metric));
                    return None;
                }
            }
        }
        let has = |hint: Hint| all.iter().any(|h| h.hint == hint);
        if has(Hint::Reset) && has(Hint::NotReset) {
            self.note(Annotation::ResetsCollide(Combining::Aggregation));
        }
        self.added(Added { bounds_reconciled: reconciled, ..Added::default() }, Combining::Aggregation);
        Some(())
    }

    /// `irate` and `idelta`.
    fn last_two(&self, w: &Window<'_>) -> Answer {
        let mut newest = w.merged().rev();
        let (Some(second), Some(first)) = (newest.next(), newest.next()) else { return Answer::Nothing };
        if first.ts == second.ts {
            return Answer::Nothing;
        }
        let rate = self.function == RangeFunction::Irate;
        match (first.value, second.value) {
            // The two newest are floats, which is all that the function looks at.
            (Value::Float(_), Value::Float(_)) => Answer::OfFloats,
            (Value::Histogram(a), Value::Histogram(b)) => {
                let gauges = [a, b].map(is_gauge);
                if rate && gauges != [false; 2] {
                    self.note(Annotation::NotCounter(self.metric));
                }
                if !rate && gauges != [true; 2] {
                    self.note(Annotation::NotGauge(self.metric));
                }
                let mut result = b.clone();
                if !rate || !(first.began_before(&second) || b.is_reset_after(a)) {
                    match result.sub(a) {
                        Ok(added) => self.added(added, Combining::Subtraction),
                        Err(_) => {
                            self.note(Annotation::MixedSchemas(self.metric));
                            return Answer::Nothing;
                        }
                    }
                }
                result.hint = Hint::Gauge;
                result.compact();
                if rate {
                    result.div((second.ts - first.ts) as f64 / 1000.0);
                }
                Answer::Histogram(result)
            }
            _ => {
                self.note(Annotation::MixedFloatsHistograms(self.metric));
                Answer::Nothing
            }
        }
    }

    /// `rate`, `increase` and `delta` of at least two histograms, or of one whose counter began in the window.
    fn extrapolated(&self, w: &Window<'_>, counter: bool, per_second: bool) -> Option<FloatHistogram> {
        let (ts, histograms) = w.histograms;
        let first = histograms.first()?;
        let (first_ts, last_ts) = (ts[0], ts[ts.len() - 1]);
        let start = if counter { first.start } else { 0 };
        let start = kernels::starts_before(start, w.end - w.length, first_ts);
        let several = ts.len() > 1;
        let mut result = match start {
            _ if several => self.difference(w.histograms, counter)?,
            Some(_) => FloatHistogram::empty_like(first),
            None => return None,
        };
        let mut to_start = (first_ts - (w.end - w.length)) as f64 / 1000.0;
        let mut to_end = (w.end - last_ts) as f64 / 1000.0;
        let mut sampled = (last_ts - first_ts) as f64 / 1000.0;
        let spacing = if several { sampled / (ts.len() - 1) as f64 } else { 0.0 };
        let threshold = spacing * 1.1;
        if let Some(start) = start {
            // As for floats: there the counter was zero.
            to_start = 0.0;
            sampled = (last_ts - start) as f64 / 1000.0;
            if several {
                match result.add(first) {
                    Ok(added) => self.added(added, Combining::Addition),
                    Err(_) => {
                        self.note(Annotation::MixedSchemas(self.metric));
                        return None;
                    }
                }
            } else {
                result = FloatHistogram::clone(first);
            }
        } else {
            if to_start >= threshold {
                to_start = spacing / 2.0;
            }
            if counter && result.count > 0.0 && first.count >= 0.0 {
                // As for floats: not further back than where the count would be zero.
                to_start = to_start.min(sampled * (first.count / result.count));
            }
        }
        if to_end >= threshold {
            to_end = spacing / 2.0;
        }
        let mut factor = if sampled != 0.0 { (sampled + to_start + to_end) / sampled } else { 1.0 };
        if per_second {
            factor /= w.length as f64 / 1000.0;
        }
        result.mul(factor);
        Some(result)
    }

    /// Last minus first, and for a counter what it had before it began again.
    fn difference(&self, (ts, histograms): (&[i64], &[&FloatHistogram]), counter: bool) -> Option<FloatHistogram> {
        let [first, between @ .., last] = histograms else { return None };
        let told = |i: usize| (histograms[i].start, ts[i]);
        let began = |i: usize| kernels::began_between(told(i - 1), told(i));
        if counter && (is_gauge(first) || is_gauge(last)) {
            self.note(Annotation::NotCounter(self.metric));
        }
        // A first sample before the counter began again is not looked at, so that it need not have the others' buckets.
        let empty;
        let second = histograms[1];
        let mut previous: &FloatHistogram = first;
        if counter && (began(1) || second.is_reset_after(first)) {
            empty = FloatHistogram::empty_like(second);
            previous = &empty;
        }
        let custom = previous.is_custom();
        let looked_at: &[&FloatHistogram] = if counter { between } else { &[] };
        if last.is_custom() != custom || looked_at.iter().any(|h| h.is_custom() != custom) {
            self.note(Annotation::MixedSchemas(self.metric));
            return None;
        }
        if looked_at.iter().any(|h| is_gauge(h)) {
            self.note(Annotation::NotCounter(self.metric));
        }
        let schema = looked_at.iter().map(|h| h.schema).fold(last.schema.min(previous.schema), i32::min);
        let mut result = FloatHistogram::clone(last);
        result.reduce_resolution(schema);
        self.added(result.sub(previous).ok()?, Combining::Subtraction);
        if counter {
            if (1..ts.len()).any(|i| kernels::overlapping(told(i - 1), histograms[i].start)) {
                self.notes.notes.overlapping(self.notes.at, self.metric, 1);
            }
            for (i, h) in histograms.iter().enumerate().skip(1) {
                if began(i) || h.is_reset_after(previous) {
                    self.added(result.add(previous).ok()?, Combining::Addition);
                }
                previous = h;
            }
        } else if !is_gauge(first) || !is_gauge(last) {
            self.note(Annotation::NotGauge(self.metric));
        }
        result.hint = Hint::Gauge;
        result.compact();
        Some(result)
    }
}

impl Sample<'_> {
    /// Whether a counter began between this and the next, as told with the samples.
    fn began_before(&self, next: &Self) -> bool {
        kernels::began_between((self.start, self.ts), (next.start, next.ts))
    }
}

/// Whether a sample is another than the one before.
fn differ(before: &Sample<'_>, after: &Sample<'_>) -> bool {
    match (before.value, after.value) {
        (Value::Float(a), Value::Float(b)) => a != b && !(a.is_nan() && b.is_nan()),
        (Value::Histogram(a), Value::Histogram(b)) => a != b,
        _ => true,
    }
}

/// Whether a counter began again between two samples.
fn fell(before: &Sample<'_>, after: &Sample<'_>) -> bool {
    let began = before.began_before(after);
    match (before.value, after.value) {
        (Value::Float(a), Value::Float(b)) => began || b < a,
        (Value::Histogram(a), Value::Histogram(b)) => began || b.is_reset_after(a),
        _ => true,
    }
}

fn is_gauge(h: &FloatHistogram) -> bool {
    h.hint == Hint::Gauge
}

impl<'a> Window<'a> {
    /// All samples in the order of their times.
    fn merged(&self) -> std::vec::IntoIter<Sample<'a>> {
        let floats = self.floats.samples().map(|(ts, v, start)| Sample { ts, start, value: Value::Float(v) });
        let histograms = self.histograms.0.iter().zip(self.histograms.1);
        let histograms = histograms.map(|(ts, h)| Sample { ts: *ts, start: h.start, value: Value::Histogram(h) });
        let mut all: Vec<Sample<'a>> = floats.chain(histograms).collect();
        all.sort_by_key(|s| s.ts);
        all.into_iter()
    }

    /// How many steps from a sample to the next satisfy `is`.
    fn steps(&self, is: impl Fn(&Sample<'a>, &Sample<'a>) -> bool) -> f64 {
        let all: Vec<Sample<'a>> = self.merged().collect();
        all.windows(2).filter(|w| is(&w[0], &w[1])).count() as f64
    }
}
