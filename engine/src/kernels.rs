//! Range kernels over (ts, value) slices; they know no language.
//!
//! A kernel walks one series once and writes one value per evaluation time. Its window at evaluation `i` is
//! `(end - length, end]` with `end = first_end + i * step`: open on the left, closed on the right. Windows only move
//! forward, so both ends are pointers that advance; `rate` and its kin cost O(1) per evaluation whatever the length of
//! the window. Formulas and their order of operations are those of Prometheus 3, so that results agree to the last
//! digits.
//!
//! Kernels of ranges expect series without stale markers ([`without_stale`]); [`instant`] understands them.

pub mod buckets;
mod edges;
mod starts;

pub use edges::{Edges, Reach, range_with_edges, samples_with_edges, smoothed};
pub use starts::{began_between, count_overlapping, overlapping, starts_before};

/// The NaN that says that a series ended. Any other NaN is a value.
pub const STALE_NAN: u64 = 0x7ff0_0000_0000_0002;

/// Whether a value is the stale marker.
#[inline]
pub fn is_stale(v: f64) -> bool {
    v.to_bits() == STALE_NAN
}

/// The windows of one evaluation. All in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// End of the first window, inclusive.
    pub first_end: i64,
    /// Distance of ends; 0 when all windows are the same.
    pub step: i64,
    /// How many windows.
    pub count: usize,
    /// Length of each window; its start is exclusive.
    pub length: i64,
}

impl Windows {
    /// End of window `i`.
    #[inline]
    pub fn end(&self, i: usize) -> i64 {
        self.first_end + i as i64 * self.step
    }

    /// Calls `f(i, end, lo, hi)` for each window that holds samples, which are `ts[lo..hi]`.
    #[inline]
    fn slide(&self, ts: &[i64], mut f: impl FnMut(usize, i64, usize, usize)) {
        let (mut lo, mut hi) = (0, 0);
        for i in 0..self.count {
            let end = self.end(i);
            while hi < ts.len() && ts[hi] <= end {
                hi += 1;
            }
            let start = end.saturating_sub(self.length);
            while lo < hi && ts[lo] <= start {
                lo += 1;
            }
            if lo < hi {
                f(i, end, lo, hi);
            } else if hi == ts.len() && self.step > 0 && ts.last().is_none_or(|t| *t <= start) {
                // Nothing is left for later windows.
                return;
            }
        }
    }
}

/// What is computed over each window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Hash, serde::Serialize, serde::Deserialize)]
pub enum RangeFunction {
    /// Per-second increase of a counter, extrapolated to the window.
    Rate,
    /// Increase of a counter, extrapolated to the window.
    Increase,
    /// Difference of a gauge, extrapolated to the window.
    Delta,
    /// Per-second increase between the last two samples of a counter.
    Irate,
    /// Difference of the last two samples.
    Idelta,
    /// How often the value changed.
    Changes,
    /// How often the value fell.
    Resets,
    /// Mean.
    Avg,
    /// Least value.
    Min,
    /// Greatest value.
    Max,
    /// Sum.
    Sum,
    /// How many samples.
    Count,
    /// Newest value.
    Last,
    /// Oldest value.
    First,
    /// 1.
    Present,
    /// Population standard deviation.
    Stddev,
    /// Population variance.
    Stdvar,
    /// Quantile; argument 0 is which.
    Quantile,
    /// Per-second slope of the regression line.
    Deriv,
    /// The regression line's value some seconds after the evaluation time; argument 0 is how many.
    PredictLinear,
    /// Median absolute deviation.
    Mad,
    /// Holt's double exponential smoothing; arguments are smoothing factor and trend factor, both within (0, 1).
    DoubleExponential,
    /// Time of the oldest sample in seconds.
    TsOfFirst,
    /// Time of the newest sample in seconds.
    TsOfLast,
    /// Time of the least value in seconds, the newest of equals.
    TsOfMin,
    /// Time of the greatest value in seconds, the newest of equals.
    TsOfMax,
}

/// What kernels need besides samples.
#[derive(Debug, Clone, Copy)]
pub struct Arguments<'a> {
    /// Arguments of the function, each with a value per window or one for all.
    pub args: [&'a [f64]; 2],
    /// Evaluation time of the first window, for [`RangeFunction::PredictLinear`].
    pub first_time: i64,
    /// Distance of evaluation times.
    pub time_step: i64,
    /// When the counter of each sample began, in milliseconds, 0 where that is not known; empty when of none.
    pub starts: &'a [i64],
}

impl Arguments<'_> {
    fn at(&self, arg: usize, i: usize) -> f64 {
        match self.args[arg] {
            [] => f64::NAN,
            [one] => *one,
            many => many[i],
        }
    }
}

/// Buffers that a kernel reuses from series to series.
#[derive(Debug, Default)]
pub struct Scratch {
    indexes: Vec<usize>,
    keys: Vec<i64>,
    floats: Vec<f64>,
    sums: Vec<(f64, f64)>,
}

/// The newest sample of each window unless it is a stale marker. `out[i]` and `valid[i]` are written where there is
/// one; `valid` must come in as all false.
pub fn instant(ts: &[i64], values: &[f64], windows: &Windows, out: &mut [f64], valid: &mut [bool]) {
    windows.slide(ts, |i, _, _, hi| {
        let v = values[hi - 1];
        if !is_stale(v) {
            out[i] = v;
            valid[i] = true;
        }
    });
}

/// As [`instant`], with the sample's time in seconds in place of its value.
pub fn instant_timestamp(ts: &[i64], values: &[f64], windows: &Windows, out: &mut [f64], valid: &mut [bool]) {
    windows.slide(ts, |i, _, _, hi| {
        if !is_stale(values[hi - 1]) {
            out[i] = ts[hi - 1] as f64 / 1000.0;
            valid[i] = true;
        }
    });
}

/// The samples without stale markers: the input itself when it has none, else a copy in the buffers.
pub fn without_stale<'a>(
    ts: &'a [i64],
    values: &'a [f64],
    ts_buffer: &'a mut Vec<i64>,
    value_buffer: &'a mut Vec<f64>,
) -> (&'a [i64], &'a [f64]) {
    // A sum of comparisons runs over vectors, an early exit does not; markers are rare.
    let stale: usize = values.iter().map(|v| usize::from(is_stale(*v))).sum();
    if stale == 0 {
        return (ts, values);
    }
    ts_buffer.clear();
    value_buffer.clear();
    for (t, v) in ts.iter().zip(values) {
        if !is_stale(*v) {
            ts_buffer.push(*t);
            value_buffer.push(*v);
        }
    }
    (ts_buffer, value_buffer)
}

/// Computes `function` over each window. `out[i]` and `valid[i]` are written where it has a value; `valid` must come
/// in as all false.
#[expect(clippy::too_many_arguments, reason = "the kernel's inputs and outputs are all slices of the caller")]
pub fn range(
    function: RangeFunction,
    ts: &[i64],
    values: &[f64],
    windows: &Windows,
    arguments: &Arguments<'_>,
    scratch: &mut Scratch,
    out: &mut [f64],
    valid: &mut [bool],
) {
    use RangeFunction as F;
    let mut put = |i: usize, v: f64| {
        out[i] = v;
        valid[i] = true;
    };
    match function {
        F::Rate => extrapolated(ts, values, Some(arguments.starts), windows, true, scratch, put),
        F::Increase => extrapolated(ts, values, Some(arguments.starts), windows, false, scratch, put),
        F::Delta => extrapolated(ts, values, None, windows, false, scratch, put),
        F::Irate | F::Idelta => windows.slide(ts, |i, _, lo, hi| {
            if hi - lo < 2 || ts[hi - 1] == ts[hi - 2] {
                return;
            }
            let (last, previous) = (values[hi - 1], values[hi - 2]);
            let began = || starts::began_before(ts, arguments.starts, hi - 1);
            let reset = function == F::Irate && (last < previous || began());
            let v = if reset { last } else { last - previous };
            let seconds = (ts[hi - 1] - ts[hi - 2]) as f64 / 1000.0;
            put(i, if function == F::Irate { v / seconds } else { v });
        }),
        F::Changes => {
            transitions(values.len(), scratch, |i| {
                let (a, b) = (values[i - 1], values[i]);
                a != b && !(a.is_nan() && b.is_nan())
            });
            windows.slide(ts, |i, _, lo, hi| put(i, (scratch.indexes[hi - 1] - scratch.indexes[lo]) as f64));
        }
        F::Resets => {
            let fell = |i: usize| values[i] < values[i - 1];
            transitions(values.len(), scratch, |i| fell(i) || starts::began_before(ts, arguments.starts, i));
            windows.slide(ts, |i, _, lo, hi| put(i, (scratch.indexes[hi - 1] - scratch.indexes[lo]) as f64));
        }
        F::Avg => sums(ts, values, windows, scratch, |i, lo, hi, s, c| {
            let n = (hi - lo) as f64;
            put(i, if s.is_finite() { s / n + c / n } else { mean(&values[lo..hi]) });
        }),
        F::Sum => sums(ts, values, windows, scratch, |i, lo, hi, s, c| {
            put(i, if s.is_finite() { s + c } else { sum(&values[lo..hi]) });
        }),
        F::Min => extreme(ts, values, windows, scratch, |new, best| new < best, |i, at| put(i, values[at])),
        F::Max => extreme(ts, values, windows, scratch, |new, best| new > best, |i, at| put(i, values[at])),
        F::TsOfMin => windows.slide(ts, |i, _, lo, hi| {
            let at = newest_best(&values[lo..hi], |new, best| new <= best);
            put(i, ts[lo + at] as f64 / 1000.0);
        }),
        F::TsOfMax => windows.slide(ts, |i, _, lo, hi| {
            let at = newest_best(&values[lo..hi], |new, best| new >= best);
            put(i, ts[lo + at] as f64 / 1000.0);
        }),
        F::Count => windows.slide(ts, |i, _, lo, hi| put(i, (hi - lo) as f64)),
        F::Last => windows.slide(ts, |i, _, _, hi| put(i, values[hi - 1])),
        F::First => windows.slide(ts, |i, _, lo, _| put(i, values[lo])),
        F::Present => windows.slide(ts, |i, _, _, _| put(i, 1.0)),
        F::TsOfFirst => windows.slide(ts, |i, _, lo, _| put(i, ts[lo] as f64 / 1000.0)),
        F::TsOfLast => windows.slide(ts, |i, _, _, hi| put(i, ts[hi - 1] as f64 / 1000.0)),
        F::Stdvar => windows.slide(ts, |i, _, lo, hi| put(i, variance(&values[lo..hi]))),
        F::Stddev => windows.slide(ts, |i, _, lo, hi| put(i, variance(&values[lo..hi]).sqrt())),
        F::Quantile => quantiles(ts, values, windows, arguments, scratch, put),
        F::Deriv => windows.slide(ts, |i, _, lo, hi| {
            if hi - lo >= 2 {
                put(i, regression(&ts[lo..hi], &values[lo..hi], ts[lo]).0);
            }
        }),
        F::PredictLinear => windows.slide(ts, |i, _, lo, hi| {
            if hi - lo >= 2 {
                let time = arguments.first_time + i as i64 * arguments.time_step;
                let (slope, intercept) = regression(&ts[lo..hi], &values[lo..hi], time);
                put(i, slope * arguments.at(0, i) + intercept);
            }
        }),
        F::Mad => windows.slide(ts, |i, _, lo, hi| put(i, mad(&values[lo..hi], scratch))),
        F::DoubleExponential => windows.slide(ts, |i, _, lo, hi| {
            if hi - lo >= 2 {
                put(i, double_exponential(&values[lo..hi], arguments.at(0, i), arguments.at(1, i)));
            }
        }),
    }
}

/// One step of a Kahan-Neumaier sum: adds `v` to the sum `s` with compensation `c`.
#[inline]
pub fn kahan_add(v: f64, s: f64, c: f64) -> (f64, f64) {
    let t = s + v;
    let low = if s.abs() >= v.abs() { (s - t) + v } else { (v - t) + s };
    (t, if t.is_infinite() { 0.0 } else { c + low })
}

/// Compensated sum.
pub fn sum(values: &[f64]) -> f64 {
    let (mut s, mut c) = (0.0, 0.0);
    for v in values {
        (s, c) = kahan_add(*v, s, c);
    }
    if s.is_infinite() { s } else { s + c }
}

/// Compensated mean of at least one value; incremental from where the sum would overflow.
pub fn mean(values: &[f64]) -> f64 {
    let (mut s, mut c) = (values[0], 0.0);
    for (i, v) in values.iter().enumerate().skip(1) {
        let (new_s, new_c) = kahan_add(*v, s, c);
        if new_s.is_infinite() {
            return incremental_mean(&values[i..], i as f64, s / i as f64, c / i as f64);
        }
        (s, c) = (new_s, new_c);
    }
    let n = values.len() as f64;
    s / n + c / n
}

#[cold]
fn incremental_mean(rest: &[f64], seen: f64, mut mean: f64, mut c: f64) -> f64 {
    let mut n = seen;
    for v in rest {
        n += 1.0;
        let q = (n - 1.0) / n;
        (mean, c) = kahan_add(v / n, q * mean, q * c);
    }
    mean + c
}

/// Population variance by Welford's method with compensation.
pub fn variance(values: &[f64]) -> f64 {
    let (mut n, mut mean, mut mean_c, mut aux, mut aux_c) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for v in values {
        n += 1.0;
        let delta = v - (mean + mean_c);
        (mean, mean_c) = kahan_add(delta / n, mean, mean_c);
        (aux, aux_c) = kahan_add(delta * (v - (mean + mean_c)), aux, aux_c);
    }
    (aux + aux_c) / n
}

/// Maps floats to integers of the same order, NaN before all.
#[inline]
pub fn order_key(v: f64) -> i64 {
    if v.is_nan() {
        return i64::MIN;
    }
    let bits = v.to_bits() as i64;
    // Negative floats order backwards by their bits.
    bits ^ (((bits >> 63) as u64) >> 1) as i64
}

fn from_order_key(key: i64) -> f64 {
    if key == i64::MIN {
        return f64::NAN;
    }
    f64::from_bits((key ^ (((key >> 63) as u64) >> 1) as i64) as u64)
}

/// The quantile `q` of `n` values of which `sorted(i)` is the i-th smallest.
#[inline]
pub fn quantile_of_sorted(q: f64, n: usize, sorted: impl Fn(usize) -> f64) -> f64 {
    if n == 0 || q.is_nan() {
        return f64::NAN;
    }
    if q < 0.0 {
        return f64::NEG_INFINITY;
    }
    if q > 1.0 {
        return f64::INFINITY;
    }
    let rank = q * (n as f64 - 1.0);
    let lower = rank.floor().max(0.0);
    let upper = (lower + 1.0).min(n as f64 - 1.0);
    let weight = rank - rank.floor();
    sorted(lower as usize) * (1.0 - weight) + sorted(upper as usize) * weight
}

/// The quantile `q` of unsorted values, NaN before all numbers; `keys` is a buffer.
pub fn quantile(q: f64, values: impl IntoIterator<Item = f64>, keys: &mut Vec<i64>) -> f64 {
    keys.clear();
    keys.extend(values.into_iter().map(order_key));
    keys.sort_unstable();
    quantile_of_sorted(q, keys.len(), |i| from_order_key(keys[i]))
}

fn quantiles(
    ts: &[i64],
    values: &[f64],
    windows: &Windows,
    arguments: &Arguments<'_>,
    scratch: &mut Scratch,
    mut put: impl FnMut(usize, f64),
) {
    // The window's values, sorted: a step removes and inserts the few that leave and enter.
    let keys = &mut scratch.keys;
    keys.clear();
    let (mut from, mut to) = (0, 0);
    windows.slide(ts, |i, _, lo, hi| {
        if lo >= to {
            keys.clear();
            (from, to) = (lo, lo);
        }
        if (hi - to) * 4 > hi - lo {
            keys.clear();
            keys.extend(values[lo..hi].iter().map(|v| order_key(*v)));
            keys.sort_unstable();
        } else {
            for v in &values[from..lo] {
                let key = order_key(*v);
                let at = keys.partition_point(|k| *k < key);
                keys.remove(at);
            }
            for v in &values[to..hi] {
                let key = order_key(*v);
                let at = keys.partition_point(|k| *k < key);
                keys.insert(at, key);
            }
        }
        (from, to) = (lo, hi);
        put(i, quantile_of_sorted(arguments.at(0, i), keys.len(), |i| from_order_key(keys[i])));
    });
}

/// The compensated sum (sum and compensation) of each window, at O(1) per sample and window: a window is the end of an
/// older stretch, whose sums from each sample to its end are kept, and the start of a newer one. Nothing is ever
/// subtracted, so nothing cancels that a plain pass would keep. Sums that overflow are the caller's to do again.
fn sums(
    ts: &[i64],
    values: &[f64],
    windows: &Windows,
    scratch: &mut Scratch,
    mut put: impl FnMut(usize, usize, usize, f64, f64),
) {
    let older = &mut scratch.sums;
    let (mut base, mut pivot, mut next, mut newer) = (0, 0, 0, (-0.0, 0.0));
    windows.slide(ts, |i, _, lo, hi| {
        if lo >= pivot {
            (base, pivot, next, newer) = (lo, hi, hi, (-0.0, 0.0));
            older.clear();
            older.resize(hi - lo, (0.0, 0.0));
            let mut sum = (-0.0, 0.0);
            for (slot, v) in older.iter_mut().zip(&values[lo..hi]).rev() {
                sum = kahan_add(*v, sum.0, sum.1);
                *slot = sum;
            }
        }
        for v in &values[next..hi] {
            newer = kahan_add(*v, newer.0, newer.1);
        }
        next = hi;
        let (s, c) = older[lo - base];
        let (s, c) = kahan_add(newer.0, s, c);
        put(i, lo, hi, s, c + newer.1);
    });
}

fn mad(values: &[f64], scratch: &mut Scratch) -> f64 {
    if values.iter().any(|v| v.is_nan()) {
        return f64::NAN;
    }
    let median = quantile(0.5, values.iter().copied(), &mut scratch.keys);
    scratch.floats.clear();
    scratch.floats.extend(values.iter().map(|v| (v - median).abs()));
    quantile(0.5, scratch.floats.iter().copied(), &mut scratch.keys)
}

fn double_exponential(values: &[f64], smoothing: f64, trend: f64) -> f64 {
    let (mut s0, mut s1, mut b) = (0.0, values[0], values[1] - values[0]);
    for (i, v) in values.iter().enumerate().skip(1) {
        let x = smoothing * v;
        if i > 1 {
            b = trend * (s1 - s0) + (1.0 - trend) * b;
        }
        let y = (1.0 - smoothing) * (s1 + b);
        (s0, s1) = (s1, x + y);
    }
    s1
}

/// Slope per second and value at `intercept_time` of the least-squares line.
fn regression(ts: &[i64], values: &[f64], intercept_time: i64) -> (f64, f64) {
    let first = values[0];
    if values[1..].iter().all(|v| *v == first) {
        return if first.is_infinite() { (f64::NAN, f64::NAN) } else { (0.0, first) };
    }
    let mut n = 0.0;
    let [mut x, mut y, mut xy, mut xx] = [(0.0, 0.0); 4];
    for (t, v) in ts.iter().zip(values) {
        n += 1.0;
        let dx = (t - intercept_time) as f64 / 1e3;
        x = kahan_add(dx, x.0, x.1);
        y = kahan_add(*v, y.0, y.1);
        xy = kahan_add(dx * v, xy.0, xy.1);
        xx = kahan_add(dx * dx, xx.0, xx.1);
    }
    let [x, y, xy, xx] = [x, y, xy, xx].map(|(s, c)| s + c);
    let slope = (xy - x * y / n) / (xx - x * x / n);
    (slope, y / n - slope * x / n)
}

/// `scratch.indexes[i]`: how many of the steps to the samples up to `i` satisfy `is`.
fn transitions(samples: usize, scratch: &mut Scratch, is: impl Fn(usize) -> bool) {
    scratch.indexes.clear();
    let mut n = 0;
    for i in 0..samples {
        n += usize::from(i > 0 && is(i));
        scratch.indexes.push(n);
    }
}

/// The index of the best value of each window; NaN loses against every number, the oldest of equals wins.
fn extreme(
    ts: &[i64],
    values: &[f64],
    windows: &Windows,
    scratch: &mut Scratch,
    better: impl Fn(f64, f64) -> bool,
    mut put: impl FnMut(usize, usize),
) {
    // A queue of candidates, each better than all that follow it in the window.
    let queue = &mut scratch.indexes;
    queue.clear();
    let (mut head, mut next) = (0, 0);
    windows.slide(ts, |i, _, lo, hi| {
        if lo >= next {
            next = lo;
        }
        while next < hi {
            let v = values[next];
            while queue.len() > head && {
                let last = values[queue[queue.len() - 1]];
                better(v, last) || (last.is_nan() && !v.is_nan())
            } {
                queue.pop();
            }
            queue.push(next);
            next += 1;
        }
        while queue[head] < lo {
            head += 1;
        }
        put(i, queue[head]);
    });
}

fn newest_best(values: &[f64], as_good: impl Fn(f64, f64) -> bool) -> usize {
    let mut best = 0;
    for (i, v) in values.iter().enumerate() {
        if as_good(*v, values[best]) || values[best].is_nan() {
            best = i;
        }
    }
    best
}

/// `rate`, `increase` and `delta`; `counter` holds when a counter's samples began, `None` stands for a gauge.
fn extrapolated(
    ts: &[i64],
    values: &[f64],
    counter: Option<&[i64]>,
    windows: &Windows,
    per_second: bool,
    scratch: &mut Scratch,
    mut put: impl FnMut(usize, f64),
) {
    // Where the counter fell. Adding the values before each fall in order, rather than subtracting prefix sums, keeps
    // the result that of a fresh pass over the window.
    let falls = &mut scratch.indexes;
    falls.clear();
    match counter {
        None => {}
        Some([]) => falls.extend((1..values.len()).filter(|i| values[*i] < values[*i - 1])),
        Some(starts) => {
            let began = |i: usize| starts::began_before(ts, starts, i);
            falls.extend((1..values.len()).filter(|i| values[*i] < values[*i - 1] || began(*i)));
        }
    }
    let mut first_fall = 0;
    let range_seconds = windows.length as f64 / 1000.0;
    windows.slide(ts, |i, end, lo, hi| {
        let start = counter.and_then(|starts| starts.get(lo)).copied().unwrap_or(0);
        let start = starts_before(start, end.saturating_sub(windows.length), ts[lo]);
        if hi - lo < 2 && start.is_none() {
            return;
        }
        let first = values[lo];
        let mut result = values[hi - 1] - first;
        if !falls.is_empty() {
            while first_fall < falls.len() && falls[first_fall] <= lo {
                first_fall += 1;
            }
            for fall in falls[first_fall..].iter().take_while(|f| **f < hi) {
                result += values[fall - 1];
            }
        }
        let (first_ts, last_ts) = (ts[lo], ts[hi - 1]);
        let mut to_start = (first_ts - (end - windows.length)) as f64 / 1000.0;
        let mut to_end = (end - last_ts) as f64 / 1000.0;
        let mut sampled = (last_ts - first_ts) as f64 / 1000.0;
        let spacing = if hi - lo > 1 { sampled / (hi - lo - 1) as f64 } else { 0.0 };
        let threshold = spacing * 1.1;
        if let Some(start) = start {
            // There the counter was zero, so that nothing needs to be guessed.
            to_start = 0.0;
            sampled = (last_ts - start) as f64 / 1000.0;
            result += first;
        } else {
            if to_start >= threshold {
                to_start = spacing / 2.0;
            }
            if counter.is_some() && result > 0.0 && first >= 0.0 {
                // A counter can't have been negative: not further back than where its line crosses zero.
                let to_zero = sampled * (first / result);
                if to_zero < to_start {
                    to_start = to_zero;
                }
            }
        }
        if to_end >= threshold {
            to_end = spacing / 2.0;
        }
        let mut factor = if sampled != 0.0 { (sampled + to_start + to_end) / sampled } else { 1.0 };
        if per_second {
            factor /= range_seconds;
        }
        put(i, result * factor);
    });
}

#[cfg(test)]
mod tests;
