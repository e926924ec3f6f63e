//! Quantiles and fractions of classic histograms: cumulative counts by upper bound.

/// One bucket: upper bound and count of observations up to it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bucket {
    /// The bound, inclusive.
    pub upper: f64,
    /// How many observations are not above it.
    pub count: f64,
}

/// How counts had to be changed to grow with their bounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mended {
    /// Least and greatest bound whose count was changed.
    pub bounds: (f64, f64),
    /// The greatest change.
    pub difference: f64,
}

/// Two values that differ only by what sums in different orders can.
fn almost_equal(a: f64, b: f64) -> bool {
    const TOLERANCE: f64 = 1e-12;
    if a == b {
        return true;
    }
    let (sum, difference) = (a.abs() + b.abs(), (a - b).abs());
    if a == 0.0 || b == 0.0 || sum < f64::MIN_POSITIVE {
        return difference < TOLERANCE * f64::MIN_POSITIVE;
    }
    difference / sum.min(f64::MAX) < TOLERANCE
}

/// Makes counts grow with bounds; says what had to be changed.
fn make_monotonic(buckets: &mut [Bucket]) -> Option<Mended> {
    let mut mended: Option<Mended> = None;
    let mut previous = buckets[0].count;
    for bucket in &mut buckets[1..] {
        if bucket.count == previous {
            continue;
        }
        if almost_equal(previous, bucket.count) {
            bucket.count = previous;
        } else if bucket.count < previous {
            let (upper, difference) = (bucket.upper, previous - bucket.count);
            let known = mended.unwrap_or(Mended { bounds: (upper, upper), difference });
            let bounds = (known.bounds.0.min(upper), known.bounds.1.max(upper));
            mended = Some(Mended { bounds, difference: known.difference.max(difference) });
            bucket.count = previous;
        } else {
            previous = bucket.count;
        }
    }
    mended
}

/// The quantile, buckets sorted by bound, at least one; and how counts had to be made to grow.
pub fn quantile(q: f64, buckets: &mut Vec<Bucket>) -> (f64, Option<Mended>) {
    if q.is_nan() {
        return (f64::NAN, None);
    }
    if q < 0.0 {
        return (f64::NEG_INFINITY, None);
    }
    if q > 1.0 {
        return (f64::INFINITY, None);
    }
    if buckets[buckets.len() - 1].upper != f64::INFINITY {
        return (f64::NAN, None);
    }
    coalesce(buckets);
    let mended = make_monotonic(buckets);
    let last = buckets.len() - 1;
    let observations = buckets[last].count;
    if last < 1 || observations == 0.0 {
        return (f64::NAN, mended);
    }
    let mut rank = q * observations;
    // The first bucket that is not below the rank; NaN counts are below nothing and above nothing.
    let b = search(last, |i| buckets[i].count >= rank);
    if b == last {
        return (buckets[last - 1].upper, mended);
    }
    if b == 0 && buckets[0].upper <= 0.0 {
        return (buckets[0].upper, mended);
    }
    let (mut start, end, mut count) = (0.0, buckets[b].upper, buckets[b].count);
    if b > 0 {
        start = buckets[b - 1].upper;
        count -= buckets[b - 1].count;
        rank -= buckets[b - 1].count;
    }
    (start + (end - start) * (rank / count), mended)
}

/// The least index below `n` for which `holds`, by bisection as if it stayed true from there on; else `n`.
fn search(n: usize, holds: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, n);
    while low < high {
        let middle = (low + high) / 2;
        if holds(middle) { high = middle } else { low = middle + 1 }
    }
    low
}

/// The fraction of observations between two values, buckets sorted by bound, at least one.
pub fn fraction(lower: f64, upper: f64, buckets: &mut Vec<Bucket>) -> f64 {
    if buckets[buckets.len() - 1].upper != f64::INFINITY {
        return f64::NAN;
    }
    coalesce(buckets);
    let count = buckets[buckets.len() - 1].count;
    if count == 0.0 || lower.is_nan() || upper.is_nan() {
        return f64::NAN;
    }
    if lower >= upper {
        return 0.0;
    }
    let at = |v: f64| rank_of(v, buckets).filter(|r| *r <= count).unwrap_or(count);
    (at(upper) - at(lower)) / count
}

/// Adds up buckets with equal bounds.
fn coalesce(buckets: &mut Vec<Bucket>) {
    buckets.dedup_by(|next, kept| {
        let same = next.upper == kept.upper;
        if same {
            kept.count += next.count;
        }
        same
    });
}

/// How many observations are below a value, interpolated within its bucket.
fn rank_of(v: f64, buckets: &[Bucket]) -> Option<f64> {
    let mut rank = 0.0;
    let mut low = if buckets[0].upper <= 0.0 { f64::NEG_INFINITY } else { 0.0 };
    for bucket in buckets {
        if low >= v {
            return Some(rank);
        }
        if bucket.upper > v {
            if low == f64::NEG_INFINITY {
                return Some(bucket.count);
            }
            return Some(rank + (bucket.count - rank) * (v - low) / (bucket.upper - low));
        }
        rank = bucket.count;
        low = bucket.upper;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(q: f64, buckets: &[(f64, f64)], expected: f64) {
        let mut buckets: Vec<Bucket> =
            buckets.iter().map(|(upper, count)| Bucket { upper: *upper, count: *count }).collect();
        let got = quantile(q, &mut buckets).0;
        assert!(got == expected || (got.is_nan() && expected.is_nan()), "{q}: {got}, expected {expected}");
    }

    #[test]
    fn quantiles_of_buckets() {
        let inf = f64::INFINITY;
        let b: &[(f64, f64)] = &[(0.1, 10.0), (0.2, 20.0), (inf, 40.0)];
        check(0.25, b, 0.1);
        check(0.5, b, 0.2);
        check(0.375, b, 0.15000000000000002);
        check(0.9, b, 0.2);
        check(-0.1, b, -inf);
        check(1.1, b, inf);
        check(f64::NAN, b, f64::NAN);
        check(0.5, &[(0.1, 10.0), (0.2, 20.0)], f64::NAN);
        check(0.5, &[(inf, 20.0)], f64::NAN);
        check(0.5, &[(0.1, 0.0), (inf, 0.0)], f64::NAN);
        check(0.1, &[(-1.0, 10.0), (inf, 20.0)], -1.0);
        check(1.0, &[(1.0, 10.0), (2.0, 5.0), (inf, 10.0)], 1.0);
    }

    #[test]
    fn fractions_of_buckets() {
        let b = || vec![Bucket { upper: 1.0, count: 10.0 }, Bucket { upper: f64::INFINITY, count: 20.0 }];
        assert_eq!(fraction(0.0, 0.5, &mut b()), 0.25);
        assert_eq!(fraction(0.5, f64::INFINITY, &mut b()), 0.75);
        assert_eq!(fraction(2.0, 1.0, &mut b()), 0.0);
        assert!(fraction(f64::NAN, 1.0, &mut b()).is_nan());
    }
}
