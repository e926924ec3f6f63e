//! `anchored` and `smoothed` over native histograms: values at the edges of a window take part.

use datafusion::error::Result as DfResult;
use engine::kernels::{Edges, RangeFunction, Reach, Windows};

use super::{
    Added, Annotation, Answer, BUCKETS, Combining, FloatHistogram, Floats, Hint, NotesAt, Pace, Ranges, Sample, Window,
    differ, fell, is_gauge, is_stale, slide,
};
use crate::histogram::Incompatible;

/// Samples at their times.
type Histograms<'a> = (&'a [i64], &'a [&'a FloatHistogram]);

impl Ranges<'_> {
    /// As [`Ranges::run`] with samples around the windows.
    pub(in crate::exec) fn run_with_edges(
        &self,
        reach: Reach,
        (ts, values): (&[i64], &[f64]),
        (histogram_ts, histograms): Histograms<'_>,
        (out, valid): (&mut [f64], &mut [bool]),
        pace: &mut Pace,
    ) -> DfResult<Vec<(usize, FloatHistogram)>> {
        let smoothed = reach.edges == Edges::Smoothed;
        let after = if smoothed { reach.reach } else { 0 };
        let windows = self.windows;
        let around = Windows {
            first_end: windows.first_end.saturating_add(after),
            length: windows.length.saturating_add(reach.reach).saturating_add(after),
            ..windows
        };
        let (mut native, mut stopped) = (Vec::new(), Ok(()));
        slide(&around, ts, histogram_ts, |i, _, floats, range| {
            if range.is_empty() || stopped.is_err() {
                return;
            }
            stopped = pace.walk(floats.len() + BUCKETS * range.len());
            let window = Window {
                end: windows.end(i),
                length: windows.length,
                floats: Floats { ts: &ts[floats.clone()], values: &values[floats], starts: &[] },
                histograms: (&histogram_ts[range.clone()], &histograms[range]),
            };
            match self.answer_with_edges(&window, smoothed) {
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

    fn answer_with_edges(&self, w: &Window<'_>, smoothed: bool) -> Answer {
        use RangeFunction as F;
        match self.function {
            F::Changes => w.steps_from_anchor(differ),
            F::Resets => w.steps_from_anchor(fell),
            _ if !w.floats.ts.is_empty() => {
                self.note(Annotation::MixedFloatsHistograms(self.metric));
                Answer::Nothing
            }
            function => {
                let counter = matches!(function, F::Rate | F::Increase);
                match self.difference_of_edges(w, counter, smoothed) {
                    None => Answer::Nothing,
                    Some(mut h) => {
                        if function == F::Rate {
                            h.div(w.length as f64 / 1000.0);
                        }
                        h.hint = Hint::Gauge;
                        h.compact();
                        Answer::Histogram(h)
                    }
                }
            }
        }
    }

    /// What the value at the end of a window is more than that at its start.
    fn difference_of_edges(&self, w: &Window<'_>, counter: bool, smoothed: bool) -> Option<FloatHistogram> {
        let (ts, all) = w.histograms;
        let (start, end) = (w.end.saturating_sub(w.length), w.end);
        let mut last = ts.len().checked_sub(1)?;
        // The last sample at or before the start, which may be the first of all.
        let first = ts[..last].partition_point(|t| *t <= start).saturating_sub(1);
        if smoothed {
            last = ts[..last].partition_point(|t| *t < end);
        }
        if ts[last] <= start || (smoothed && ts[first] > end) {
            return None;
        }
        let used = all.get(first..=last)?;
        if used.iter().any(|h| h.is_custom() != used[0].is_custom()) {
            self.note(Annotation::MixedSchemas(self.metric));
            return None;
        }
        if counter && used.iter().any(|h| is_gauge(h)) {
            self.note(Annotation::NotCounter(self.metric));
        }
        let left = if smoothed && ts[first] < start {
            self.between(w.histograms, first, start, counter)?
        } else {
            all[first].clone()
        };
        let right = if smoothed && last > 0 && ts[last] > end {
            self.between(w.histograms, last - 1, end, counter)?
        } else {
            all[last].clone()
        };
        if !(counter || is_gauge(&left) && is_gauge(&right)) {
            self.note(Annotation::NotGauge(self.metric));
        }
        let mut result = right.clone();
        self.combined(result.sub(&left), Combining::Subtraction)?;
        if counter
            && let Some(lost) = self.lost_by_resets((ts, all), (first, last), (&left, &right), smoothed, start)?
        {
            self.combined(result.add(&lost), Combining::Addition)?;
        }
        Some(result)
    }

    /// What the counter had whenever it began again between the edges; the inner `None` if it never did.
    fn lost_by_resets(
        &self,
        (ts, all): Histograms<'_>,
        (first, last): (usize, usize),
        (left, right): (&FloatHistogram, &FloatHistogram),
        smoothed: bool,
        start: i64,
    ) -> Option<Option<FloatHistogram>> {
        let (mut from, mut previous) = (first + 1, left);
        if smoothed && ts[first] < start && all[first + 1].is_reset_after(all[first]) {
            // The value at the start is of the counter's new life already.
            previous = all[first + 1];
            from += 1;
        }
        if from > last {
            return Some(None);
        }
        let mut lost: Option<FloatHistogram> = None;
        for h in all[from..last].iter().copied().chain([right]) {
            if h.is_reset_after(previous) {
                match &mut lost {
                    None => lost = Some(previous.clone()),
                    Some(lost) => self.combined(lost.add(previous), Combining::Addition)?,
                }
            }
            previous = h;
        }
        Some(lost)
    }

    /// The value at a time between the samples `at` and the next.
    fn between(&self, (ts, all): Histograms<'_>, at: usize, t: i64, counter: bool) -> Option<FloatHistogram> {
        interpolated((ts[at], all[at]), (ts[at + 1], all[at + 1]), t, counter, self.notes, self.metric)
    }

    fn combined(&self, added: Result<Added, Incompatible>, combining: Combining) -> Option<()> {
        combined(added, combining, self.notes, self.metric)
    }
}

fn combined(added: Result<Added, Incompatible>, combining: Combining, notes: NotesAt<'_>, metric: &str) -> Option<()> {
    match added {
        Ok(added) => {
            if added.bounds_reconciled {
                notes.annotate(Annotation::BoundsReconciled(combining));
            }
            Some(())
        }
        Err(_) => {
            notes.annotate(Annotation::MixedSchemas(metric));
            None
        }
    }
}

/// The value on the line between two samples; that of a counter which began again in between begins at nothing.
fn interpolated(
    (t1, a): (i64, &FloatHistogram),
    (t2, b): (i64, &FloatHistogram),
    t: i64,
    counter: bool,
    notes: NotesAt<'_>,
    metric: &str,
) -> Option<FloatHistogram> {
    if t == t1 || t == t2 {
        return Some(if t == t1 { a.clone() } else { b.clone() });
    }
    if a.is_custom() != b.is_custom() {
        // Also where the counter began again, which buckets of another kind look like.
        return combined(Err(Incompatible), Combining::Subtraction, notes, metric).map(|()| b.clone());
    }
    let fraction = (t - t1) as f64 / (t2 - t1) as f64;
    let mut result = b.clone();
    if counter && b.is_reset_after(a) {
        result.mul(fraction);
        return Some(result);
    }
    combined(result.sub(a), Combining::Subtraction, notes, metric)?;
    result.mul(fraction);
    combined(result.add(a), Combining::Addition, notes, metric)?;
    Some(result)
}

impl Window<'_> {
    /// How many steps satisfy `is` from the last sample at or before the start on.
    fn steps_from_anchor(&self, is: impl Fn(&Sample<'_>, &Sample<'_>) -> bool) -> Answer {
        let start = self.end.saturating_sub(self.length);
        let all: Vec<Sample<'_>> = self.merged().collect();
        let after = all.partition_point(|s| s.ts <= start);
        if after == all.len() {
            return Answer::Nothing;
        }
        let used = &all[after.saturating_sub(1)..];
        Answer::Float(used.windows(2).filter(|w| is(&w[0], &w[1])).count() as f64)
    }
}

/// What a smoothed instant selector gives where histograms are around: the value at each window's end. `valid` comes with
/// what the floats alone give.
pub(in crate::exec) fn smoothed(
    (windows, reach): (&Windows, i64),
    ts: &[i64],
    (histogram_ts, histograms): (&[i64], &[FloatHistogram]),
    (notes, metric): (NotesAt<'_>, &str),
    valid: &mut [bool],
) -> Vec<(usize, FloatHistogram)> {
    let live: (Vec<i64>, Vec<&FloatHistogram>) =
        histogram_ts.iter().zip(histograms).filter(|(_, h)| !is_stale(h.sum)).unzip();
    let around = Windows { first_end: windows.first_end + reach, length: 2 * reach, ..*windows };
    let mut native = Vec::new();
    slide(&around, ts, &live.0, |i, _, floats, range| {
        if range.is_empty() {
            return;
        }
        valid[i] = false;
        if !floats.is_empty() {
            notes.annotate(Annotation::MixedFloatsHistograms(metric));
            return;
        }
        let (ts, all) = (&live.0[range.clone()], &live.1[range]);
        let t = windows.end(i);
        let at = ts.partition_point(|s| *s < t);
        let h = if ts.get(at) == Some(&t) {
            Some(all[at].clone())
        } else if at == 0 {
            None
        } else if let Some(next) = all.get(at) {
            let counter = !(is_gauge(all[at - 1]) && is_gauge(next));
            interpolated((ts[at - 1], all[at - 1]), (ts[at], next), t, counter, notes, metric)
        } else {
            Some(FloatHistogram { hint: Hint::Unknown, ..all[at - 1].clone() })
        };
        native.extend(h.map(|h| (i, h)));
    });
    native
}
