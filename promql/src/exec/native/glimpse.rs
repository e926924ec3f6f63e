//! What is left of histograms of which only count and sum are wanted: no buckets, but whether the counter began again.
//!
//! As in Prometheus, a sample is compared with the one before it, buckets included, if an evaluation reads both in one
//! go. Evaluations read on from where the one before stopped; one that lies further ahead than it looks back begins
//! anew, and nothing is known of the first sample of such a run.

use engine::kernels::{Edges, Windows, is_stale};

use crate::histogram::{FloatHistogram, Hint};
use crate::options::Grid;
use crate::plan::ops::{Reading, Selector};

/// Which samples evaluations read.
pub(in crate::exec) struct Glimpse {
    /// All that each of them looks at.
    windows: Windows,
}

impl Glimpse {
    /// Of the evaluations of a selector.
    pub(in crate::exec) fn of(selector: &Selector, reading: Reading, grid: &Grid) -> Self {
        let windows = selector.windows(grid);
        let (before, after) = match (reading, selector.edges) {
            (Reading::Smoothed(reach), _) => {
                // From the first to the last evaluation, all is kept.
                let span = windows.end(windows.count.saturating_sub(1)).saturating_sub(windows.first_end);
                (span.saturating_add(reach).saturating_sub(windows.length), reach)
            }
            (_, Some((Edges::Smoothed, reach))) => (reach, reach),
            (_, Some((Edges::Anchored, reach))) => (reach, 0),
            (_, None) => (0, 0),
        };
        let first_end = windows.first_end.saturating_add(after);
        let length = windows.length.saturating_add(before).saturating_add(after);
        Self { windows: Windows { first_end, length, ..windows } }
    }

    /// Takes the buckets of a series' histograms and tells instead whether the counter began again.
    pub(in crate::exec) fn strip(&self, ts: &[i64], histogram_ts: &[i64], histograms: &mut [FloatHistogram]) {
        let begins = self.begins(ts, histogram_ts);
        let mut hints: Vec<Hint> = Vec::with_capacity(histograms.len());
        // The sample that was read last, without stale markers.
        let mut previous: Option<usize> = None;
        for (i, h) in histograms.iter().enumerate() {
            let run = begins[..begins.partition_point(|b| *b <= histogram_ts[i])].last();
            let known = previous.filter(|p| run.is_some_and(|begin| histogram_ts[*p] >= *begin));
            hints.push(match known.map(|p| h.is_reset_after(&histograms[p])) {
                Some(reset) if h.hint == Hint::Unknown => {
                    if reset {
                        Hint::Reset
                    } else {
                        Hint::NotReset
                    }
                }
                _ => h.hint,
            });
            if !is_stale(h.sum) {
                previous = Some(i);
            } else if let Some(hint) = hints.last_mut() {
                *hint = h.hint;
            }
        }
        for (h, hint) in histograms.iter_mut().zip(hints) {
            let (start, schema, count, sum) = (h.start, h.schema, h.count, h.sum);
            *h = FloatHistogram { hint, start, schema, count, sum, ..FloatHistogram::default() };
        }
    }

    /// Where runs of samples that are read in one go begin.
    fn begins(&self, ts: &[i64], histogram_ts: &[i64]) -> Vec<i64> {
        let first_from = |t: i64| {
            let next = [ts, histogram_ts].map(|all| all.get(all.partition_point(|s| *s < t)).copied());
            next.into_iter().flatten().min()
        };
        let mut begins = Vec::new();
        // The sample at which the evaluation before stopped: the first that is not older than itself.
        let mut stopped = i64::MIN;
        for i in 0..self.windows.count {
            let end = self.windows.end(i);
            let start = end.saturating_sub(self.windows.length);
            let mut next = Some(stopped);
            if start > stopped {
                begins.push(start);
                next = first_from(start);
            }
            if next.is_some_and(|t| t < end) {
                next = first_from(end);
            }
            match next {
                Some(t) => stopped = t,
                // The samples are at their end.
                None => break,
            }
        }
        begins
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::histogram::Bucket;

    /// The hints that samples of these counts, a minute apart, get; windows end every `step` from the first on.
    fn hints(counts: &[f64], (first_end, step, count, length): (i64, i64, usize, i64)) -> Vec<Hint> {
        let of = |count: &f64| FloatHistogram {
            count: *count,
            positive: vec![Bucket { index: 1, count: *count }],
            ..FloatHistogram::default()
        };
        let mut histograms: Vec<FloatHistogram> = counts.iter().map(of).collect();
        let ts: Vec<i64> = (0..counts.len() as i64).map(|i| i * 60_000).collect();
        let windows = Windows { first_end, step, count, length };
        Glimpse { windows }.strip(&[], &ts, &mut histograms);
        assert!(histograms.iter().zip(counts).all(|(h, c)| h.count == *c && h.positive.is_empty()));
        histograms.iter().map(|h| h.hint).collect()
    }

    #[test]
    fn samples_are_compared_with_those_read_before() {
        use Hint::{NotReset as N, Reset as R, Unknown as U};
        let minutes = |m: i64| m * 60_000;
        assert_eq!(hints(&[3.0, 4.0, 2.0, 2.0], (minutes(3), 0, 1, minutes(5))), [U, N, R, N]);
        // The sample at the open end of the window is read too.
        assert_eq!(hints(&[3.0, 2.0, 1.0], (minutes(2), 0, 1, minutes(1))), [U, U, R]);
        // Windows that follow one another are one run, those far apart are not.
        assert_eq!(hints(&[5.0, 4.0, 3.0, 2.0], (minutes(1), minutes(1), 3, minutes(1))), [U, R, R, R]);
        assert_eq!(hints(&[5.0, 4.0, 3.0, 2.0, 1.0], (minutes(1), minutes(3), 2, minutes(1))), [U, R, R, U, R]);
    }

    #[test]
    fn what_is_known_stays() {
        let windows = Windows { first_end: 60_000, step: 0, count: 1, length: 300_000 };
        let mut both = [Hint::Gauge, Hint::Reset].map(|hint| FloatHistogram { hint, ..FloatHistogram::default() });
        Glimpse { windows }.strip(&[30_000], &[0, 60_000], &mut both);
        assert_eq!(both.map(|h| h.hint), [Hint::Gauge, Hint::Reset]);
    }
}
