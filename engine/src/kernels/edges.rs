//! Functions whose windows have values at their edges: of the sample before (anchored), or of the line between the
//! samples around (smoothed). Samples are looked for up to a reach beyond the window.

use super::{RangeFunction, Windows};

/// What stands for values at the edges of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Hash, serde::Serialize, serde::Deserialize)]
pub enum Edges {
    /// The sample before; at the end the last one in the window.
    Anchored,
    /// The line between the samples before and after.
    Smoothed,
}

/// How far beyond a window samples are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// What is looked for.
    pub edges: Edges,
    /// How far, in milliseconds.
    pub reach: i64,
}

impl Reach {
    fn widened(self, windows: &Windows) -> Windows {
        let after = if self.edges == Edges::Smoothed { self.reach } else { 0 };
        Windows { first_end: windows.first_end + after, length: windows.length + self.reach + after, ..*windows }
    }
}

/// The samples of a window and the values at its edges.
#[derive(Debug)]
struct Edged<'a> {
    left: f64,
    right: f64,
    /// Samples between the edges.
    inner: &'a [f64],
    inner_ts: &'a [i64],
}

/// The line between two samples at a time; a counter that fell began from zero.
fn between(ts: &[i64], values: &[f64], at: usize, time: i64, counter: bool) -> f64 {
    let (mut first, second) = (values[at], values[at + 1]);
    if counter && second < first {
        first = 0.0;
    }
    first + (second - first) * (time - ts[at]) as f64 / (ts[at + 1] - ts[at]) as f64
}

/// `ts` and `values` are what was found around the window from `start` to `end`, at least one sample.
fn edged<'a>(
    ts: &'a [i64],
    values: &'a [f64],
    (start, end): (i64, i64),
    edges: Edges,
    counter: bool,
) -> Option<Edged<'a>> {
    let smoothed = edges == Edges::Smoothed;
    let mut last = ts.len() - 1;
    let mut first = ts[..last].partition_point(|t| *t <= start).saturating_sub(1);
    if smoothed {
        last = ts[..last].partition_point(|t| *t < end);
    }
    if ts[last] <= start || (smoothed && ts[first] > end) {
        return None;
    }
    let line_at = |at: usize, time: i64| between(ts, values, at, time, counter);
    let left = if smoothed && ts[first] < start { line_at(first, start) } else { values[first] };
    let right = if smoothed && last > 0 && ts[last] > end { line_at(last - 1, end) } else { values[last] };
    // Samples on the edges are in the values there.
    if ts[first] <= start {
        first += 1;
    }
    let after = if ts[last] >= end { last } else { last + 1 };
    let inner = first.min(after)..after;
    Some(Edged { left, right, inner: &values[inner.clone()], inner_ts: &ts[inner] })
}

/// Computes `rate`, `increase`, `delta`, `changes` or `resets` over each window; another function has no value. As in
/// [`super::range`], `out[i]` and `valid[i]` are written where there is one.
pub fn range_with_edges(
    function: RangeFunction,
    ts: &[i64],
    values: &[f64],
    windows: &Windows,
    reach: Reach,
    out: &mut [f64],
    valid: &mut [bool],
) {
    use RangeFunction as F;
    reach.widened(windows).slide(ts, |i, _, lo, hi| {
        let end = windows.end(i);
        let window = (end - windows.length, end);
        let (ts, values) = (&ts[lo..hi], &values[lo..hi]);
        let result = match function {
            F::Changes => count(ts, values, window.0, |a, b| a != b && !(a.is_nan() && b.is_nan())),
            F::Resets => count(ts, values, window.0, |a, b| b < a),
            F::Rate | F::Increase | F::Delta => {
                let counter = function != F::Delta;
                edged(ts, values, window, reach.edges, counter).map(|e| {
                    let increase = e.right - e.left + if counter { falls(&e) } else { 0.0 };
                    if function == F::Rate { increase / (windows.length as f64 / 1000.0) } else { increase }
                })
            }
            _ => None,
        };
        if let Some(v) = result {
            out[i] = v;
            valid[i] = true;
        }
    });
}

/// What a counter lost in the window.
fn falls(e: &Edged<'_>) -> f64 {
    let (mut lost, mut previous) = (0.0, e.left);
    for v in e.inner.iter().chain(std::iter::once(&e.right)) {
        if *v < previous {
            lost += previous;
        }
        previous = *v;
    }
    lost
}

/// How many steps satisfy `is`, from the last sample at or before the window on; none without a sample in the window.
fn count(ts: &[i64], values: &[f64], start: i64, is: impl Fn(f64, f64) -> bool) -> Option<f64> {
    let first = ts.partition_point(|t| *t <= start);
    if first == ts.len() {
        return None;
    }
    let values = &values[first.saturating_sub(1)..];
    Some(values.windows(2).filter(|w| is(w[0], w[1])).count() as f64)
}

/// The value at the end of each window: of a sample there, of the line between the samples around, or of the one before
/// when none follows; samples are looked for up to `reach` milliseconds away. Writes as [`super::instant`] does.
pub fn smoothed(ts: &[i64], values: &[f64], windows: &Windows, reach: i64, out: &mut [f64], valid: &mut [bool]) {
    let around = Windows { first_end: windows.first_end + reach, length: 2 * reach, ..*windows };
    around.slide(ts, |i, _, lo, hi| {
        let time = windows.end(i);
        let at = lo + ts[lo..hi].partition_point(|t| *t < time);
        let v = if at < hi && ts[at] == time {
            values[at]
        } else if at == lo {
            return;
        } else if at < hi {
            between(ts, values, at - 1, time, false)
        } else {
            values[at - 1]
        };
        out[i] = v;
        valid[i] = true;
    });
}

/// The samples of the one window that ends at `end`, with those at its edges; appended to the outputs.
pub fn samples_with_edges(
    ts: &[i64],
    values: &[f64],
    window: (i64, i64),
    reach: Reach,
    (out_ts, out): (&mut Vec<i64>, &mut Vec<f64>),
) {
    let (start, end) = window;
    let after = if reach.edges == Edges::Smoothed { reach.reach } else { 0 };
    let lo = ts.partition_point(|t| *t <= start - reach.reach);
    let hi = ts.partition_point(|t| *t <= end + after);
    if lo >= hi {
        return;
    }
    if let Some(e) = edged(&ts[lo..hi], &values[lo..hi], window, reach.edges, false) {
        out_ts.push(start);
        out_ts.extend_from_slice(e.inner_ts);
        out_ts.push(end);
        out.push(e.left);
        out.extend_from_slice(e.inner);
        out.push(e.right);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TS: [i64; 5] = [0, 10_000, 20_000, 30_000, 40_000];

    fn run(function: RangeFunction, edges: Edges, values: &[f64], end: i64, length: i64) -> Option<f64> {
        let windows = Windows { first_end: end, step: 0, count: 1, length };
        let (mut out, mut valid) = ([0.0], [false]);
        let reach = Reach { edges, reach: 300_000 };
        range_with_edges(function, &TS[..values.len()], values, &windows, reach, &mut out, &mut valid);
        valid[0].then_some(out[0])
    }

    #[test]
    fn edges_take_part() {
        use Edges::{Anchored, Smoothed};
        use RangeFunction::{Avg, Changes, Delta, Increase, Rate, Resets};
        let up = [1.0, 2.0, 4.0, 8.0, 16.0];
        let check = |f, edges, values: &[f64], end, length, expected| {
            assert_eq!(run(f, edges, values, end, length), expected, "{f:?} {edges:?} {end} {length}");
        };
        check(Increase, Anchored, &up, 35_000, 20_000, Some(6.0));
        check(Increase, Smoothed, &up, 35_000, 20_000, Some(9.0));
        check(Rate, Smoothed, &up, 35_000, 20_000, Some(0.45));
        check(Delta, Smoothed, &up, 20_000, 20_000, Some(3.0));
        check(Increase, Smoothed, &up, 60_000, 30_000, Some(8.0));
        check(Increase, Anchored, &up, 60_000, 10_000, None);
        // A fall within counts, and one across an edge starts from zero.
        check(Increase, Anchored, &[5.0, 1.0, 2.0], 20_000, 15_000, Some(2.0));
        check(Increase, Smoothed, &[5.0, 1.0, 2.0], 20_000, 15_000, Some(1.5));
        check(Delta, Smoothed, &[5.0, 1.0, 2.0], 20_000, 15_000, Some(-1.0));
        check(Changes, Anchored, &[1.0, 1.0, 2.0, 2.0, 3.0], 40_000, 25_000, Some(2.0));
        check(Resets, Anchored, &[5.0, 1.0, 2.0], 20_000, 15_000, Some(1.0));
        check(Avg, Anchored, &up, 40_000, 10_000, None);
    }

    #[test]
    fn instants_are_read_off_the_line() {
        let at = |end: i64| {
            let windows = Windows { first_end: end, step: 0, count: 1, length: 300_000 };
            let (mut out, mut valid) = ([0.0], [false]);
            smoothed(&TS, &[1.0, 2.0, 4.0, 0.0, 8.0], &windows, 15_000, &mut out, &mut valid);
            valid[0].then_some(out[0])
        };
        assert_eq!(at(15_000), Some(3.0));
        assert_eq!(at(20_000), Some(4.0));
        assert_eq!(at(25_000), Some(2.0));
        assert_eq!(at(45_000), Some(8.0));
        assert_eq!(at(60_000), None);
        assert_eq!(at(-5_000), None);
    }
}
