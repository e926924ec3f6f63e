//! Times at which counters began, as some senders tell them with each sample.
//!
//! 0 stands for a start that is not known. A start at or after its own sample says nothing either; senders that don't know
//! when a counter began write the time of the first sample that they saw.

use super::Windows;

/// Whether a counter began again between two samples, each a start and the sample's time.
pub fn began_between((before_start, before): (i64, i64), (start, ts): (i64, i64)) -> bool {
    if start == 0 || start >= ts || start < before {
        return false;
    }
    // One that begins just where the sample before is holds what was added since, if that one is of the same kind; after a
    // sample of unknown start it is a counter whose start nobody knows.
    start > before || (before_start != 0 && before_start < before)
}

/// [`began_between`] of sample `i` and the one before it; never without starts.
#[inline]
pub(super) fn began_before(ts: &[i64], starts: &[i64], i: usize) -> bool {
    !starts.is_empty() && began_between((starts[i - 1], ts[i - 1]), (starts[i], ts[i]))
}

/// The start of a window's first sample if it lies in the window, before the sample.
#[inline]
pub fn starts_before(start: i64, window_start: i64, ts: i64) -> Option<i64> {
    (start != 0 && start > window_start && start < ts).then_some(start)
}

/// In how many windows a sample's counter began before the sample before it, yet not when that one's did.
pub fn count_overlapping(ts: &[i64], starts: &[i64], windows: &Windows) -> u64 {
    let overlaps = |i: &usize| overlapping((starts[i - 1], ts[i - 1]), starts[*i]);
    let all: Vec<usize> = (1..starts.len()).filter(overlaps).collect();
    let mut count = 0;
    if !all.is_empty() {
        windows.slide(ts, |_, _, lo, hi| {
            let next = all.get(all.partition_point(|i| *i <= lo));
            count += u64::from(next.is_some_and(|i| *i < hi));
        });
    }
    count
}

/// Whether a start lies before the sample before and is not the start of that one.
pub fn overlapping((before_start, before): (i64, i64), start: i64) -> bool {
    start != 0 && start < before && start != before_start
}

#[cfg(test)]
mod tests {
    use super::super::{Arguments, RangeFunction, Scratch, range};
    use super::*;

    /// `function` over a window of 5 minutes that ends at 5 minutes; samples are times, values and starts in seconds.
    fn check(function: RangeFunction, samples: &[(i64, f64, i64)], expected: Option<f64>) {
        let ts: Vec<i64> = samples.iter().map(|s| s.0 * 1000).collect();
        let values: Vec<f64> = samples.iter().map(|s| s.1).collect();
        let starts: Vec<i64> = samples.iter().map(|s| s.2 * 1000).collect();
        let windows = Windows { first_end: 300_000, step: 0, count: 1, length: 300_000 };
        let arguments = Arguments { args: [&[], &[]], first_time: 300_000, time_step: 0, starts: &starts };
        let (mut out, mut valid) = ([0.0], [false]);
        range(function, &ts, &values, &windows, &arguments, &mut Scratch::default(), &mut out, &mut valid);
        let got = valid[0].then_some(out[0]);
        let same = match (got, expected) {
            (Some(a), Some(b)) => (a - b).abs() < 1e-9,
            (a, b) => a == b,
        };
        assert!(same, "{function:?} of {samples:?}: {got:?}, expected {expected:?}");
    }

    #[test]
    fn starts_are_looked_at() {
        use RangeFunction::*;
        // What one sample has since its start, if that is in the window.
        check(Increase, &[(300, 4.0, 100)], Some(4.0));
        check(Increase, &[(300, 4.0, 0)], None);
        check(Increase, &[(300, 4.0, 300)], None);
        check(Rate, &[(300, 4.0, 100)], Some(4.0 / 300.0));
        // A value that did not fall may still be of a new life.
        check(Increase, &[(100, 5.0, 10), (200, 6.0, 150), (300, 7.0, 150)], Some(12.0));
        check(Resets, &[(100, 5.0, 10), (200, 6.0, 150), (300, 7.0, 150)], Some(1.0));
        check(Irate, &[(200, 6.0, 150), (300, 7.0, 250)], Some(0.07));
        check(Irate, &[(200, 6.0, 150), (300, 7.0, 150)], Some(0.01));
        // Samples that count only what is new.
        check(Increase, &[(100, 5.0, 10), (200, 5.0, 100), (300, 5.0, 200)], Some(15.0));
    }

    #[test]
    fn starts_that_contradict_are_counted() {
        let windows = Windows { first_end: 100, step: 100, count: 3, length: 150 };
        assert_eq!(count_overlapping(&[100, 200, 300], &[1, 50, 50], &windows), 1);
        assert_eq!(count_overlapping(&[100, 200, 300], &[1, 100, 50], &windows), 1);
        assert_eq!(count_overlapping(&[100, 200, 300], &[50, 50, 50], &windows), 0);
        assert_eq!(count_overlapping(&[100, 200, 300], &[], &windows), 0);
    }
}
