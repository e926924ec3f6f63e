//! What is computed from a histogram: quantiles, fractions, moments; and the mean of several.

use super::{Added, Cell, FloatHistogram, Hint, Incompatible, Kahan, Sum};

/// What NaN observations, which are in the count but in no bucket, did to a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NanNote {
    /// The quantile is among them.
    Result,
    /// The quantile is higher for them.
    Skew,
    /// They are in no fraction.
    Excluded,
}

impl FloatHistogram {
    /// The quantile `q`. Within a bucket observations are taken to be spread evenly, on a logarithmic scale for
    /// exponential buckets and a linear one for the others.
    pub fn quantile(&self, q: f64) -> (f64, Option<NanNote>) {
        if q < 0.0 {
            return (f64::NEG_INFINITY, None);
        }
        if q > 1.0 {
            return (f64::INFINITY, None);
        }
        if self.count == 0.0 || q.is_nan() {
            return (f64::NAN, None);
        }
        // From the nearer end, so that few counts are added up. NaN observations are at the far end of the upward way.
        let upward = self.sum.is_nan() || q < 0.5;
        let rank = if upward { q * self.count } else { (1.0 - q) * self.count };
        let (mut up, mut down) = (self.buckets(), self.buckets().rev());
        let mut next = move || if upward { up.next() } else { down.next() };
        let (mut bucket, mut count) = (None, 0.0);
        while let Some(b) = next() {
            bucket = Some(b);
            if b.count == 0.0 {
                continue;
            }
            count += b.count;
            if count >= rank {
                break;
            }
        }
        let Some(mut bucket) = bucket else {
            let note = if rank > 0.0 { NanNote::Result } else { NanNote::Skew };
            let note = self.sum.is_nan().then_some(note);
            return (if rank > 0.0 && note.is_none() { 0.0 } else { f64::NAN }, note);
        };
        if self.is_custom() {
            if bucket.lower == f64::NEG_INFINITY {
                if bucket.upper <= 0.0 {
                    return (bucket.upper, None);
                }
                bucket.lower = 0.0;
            } else if bucket.upper == f64::INFINITY {
                return (bucket.lower, None);
            }
        } else if bucket.lower < 0.0 && bucket.upper > 0.0 {
            self.halve_zero(&mut bucket.lower, &mut bucket.upper);
        }
        // Inexact sums can exceed the whole.
        count = count.min(self.count);
        if count < rank {
            if self.sum.is_nan() {
                return (f64::NAN, Some(NanNote::Result));
            }
            return (bucket.upper, None);
        }
        let rank = if upward { rank - (count - bucket.count) } else { count - rank };
        let mut note = None;
        let mut size = bucket.count;
        if self.sum.is_nan() {
            while let Some(b) = next() {
                size = b.count;
                (bucket.lower, bucket.upper) = (b.lower, b.upper);
                count += b.count;
            }
            note = (count < self.count).then_some(NanNote::Skew);
        }
        let fraction = rank / size;
        if self.is_custom() || (bucket.lower <= 0.0 && bucket.upper >= 0.0) {
            return (bucket.lower + (bucket.upper - bucket.lower) * fraction, note);
        }
        let (lower, upper) = (bucket.lower.abs().log2(), bucket.upper.abs().log2());
        if bucket.lower > 0.0 {
            return ((lower + (upper - lower) * fraction).exp2(), note);
        }
        (-(upper + (lower - upper) * (1.0 - fraction)).exp2(), note)
    }

    /// The zero bucket of a histogram with buckets on one side only holds observations of that side.
    fn halve_zero(&self, lower: &mut f64, upper: &mut f64) {
        if self.negative.is_empty() && !self.positive.is_empty() {
            *lower = 0.0;
        } else if self.positive.is_empty() && !self.negative.is_empty() {
            *upper = 0.0;
        }
    }

    /// The fraction of observations between two values.
    pub fn fraction(&self, lower: f64, upper: f64) -> (f64, Option<NanNote>) {
        if self.count == 0.0 || lower.is_nan() || upper.is_nan() {
            return (f64::NAN, None);
        }
        if lower >= upper {
            return (0.0, None);
        }
        let (mut rank, mut lower_rank, mut upper_rank) = (0.0, None, None);
        for mut b in self.buckets() {
            let zero = b.lower <= 0.0 && b.upper >= 0.0;
            if zero {
                self.halve_zero(&mut b.lower, &mut b.upper);
            }
            let linear = self.is_custom() || zero;
            let rank_at = |v: f64| {
                if b.lower >= v {
                    Some(rank)
                } else if b.upper > v {
                    // Nothing can be said of where in an infinite bucket observations are.
                    let endless = linear && b.lower == f64::NEG_INFINITY;
                    Some(if endless { b.count } else { rank + b.count * b.fraction_below(v, linear) })
                } else {
                    None
                }
            };
            lower_rank = lower_rank.or_else(|| rank_at(lower));
            upper_rank = upper_rank.or_else(|| rank_at(upper));
            if lower_rank.is_some() && upper_rank.is_some() {
                break;
            }
            rank += b.count;
        }
        let (mut count, mut note) = (self.count, None);
        if self.sum.is_nan() {
            count = self.buckets().map(|b| b.count).sum();
            note = (count < self.count).then_some(NanNote::Excluded);
        }
        let capped = |rank: Option<f64>| rank.filter(|r| *r <= count).unwrap_or(count);
        ((capped(upper_rank) - capped(lower_rank)) / self.count, note)
    }

    /// The mean of the observations.
    pub fn avg(&self) -> f64 {
        self.sum / self.count
    }

    /// The variance, all observations of a bucket taken to be at its middle.
    pub fn variance(&self) -> f64 {
        let mean = self.avg();
        let mut squares = Kahan::default();
        for b in self.buckets().filter(|b| b.count != 0.0) {
            let middle = if self.is_custom() {
                (b.upper + b.lower) / 2.0
            } else if b.lower <= 0.0 && b.upper >= 0.0 {
                0.0
            } else {
                let middle = (b.upper * b.lower).sqrt();
                if b.upper < 0.0 { -middle } else { middle }
            };
            let delta = middle - mean;
            squares.add(b.count * delta * delta);
        }
        squares.value() / self.count
    }
}

/// The mean of histograms: their sum, from where that would overflow the mean so far.
#[derive(Debug, Clone)]
pub struct Mean {
    sum: Sum,
    n: f64,
    incremental: bool,
}

impl Mean {
    /// Begins with one.
    pub fn of(h: &FloatHistogram) -> Self {
        Self { sum: Sum::of(h), n: 1.0, incremental: false }
    }

    /// Adds one.
    ///
    /// # Errors
    /// One has custom bounds and the other has not.
    pub fn add(&mut self, h: &FloatHistogram) -> Result<Added, Incompatible> {
        self.n += 1.0;
        if !self.incremental {
            let mut sum = self.sum.clone();
            let added = sum.add(h)?;
            if !sum.has_overflow() {
                self.sum = sum;
                return Ok(added);
            }
            self.make_incremental(self.n - 1.0);
        }
        self.sum.mul((self.n - 1.0) / self.n);
        let mut part = h.clone();
        part.div(self.n);
        self.sum.add(&part)
    }

    fn make_incremental(&mut self, n: f64) {
        if !self.incremental {
            self.incremental = true;
            self.sum.each_cell(|c| (c.sum, c.rest) = (c.sum / n, c.rest / n));
        }
    }

    /// Adds another mean with its weight.
    ///
    /// # Errors
    /// One has custom bounds and the other has not.
    pub fn merge(&mut self, mut other: Self) -> Result<Added, Incompatible> {
        let n = self.n + other.n;
        if !self.incremental && !other.incremental {
            let mut sum = self.sum.clone();
            let added = sum.add_sum(&other.sum)?;
            if !sum.has_overflow() {
                (self.sum, self.n) = (sum, n);
                return Ok(added);
            }
        }
        self.make_incremental(self.n);
        other.make_incremental(other.n);
        self.sum.mul(self.n / n);
        other.sum.mul(other.n / n);
        self.n = n;
        self.sum.add_sum(&other.sum)
    }

    /// The mean.
    pub fn value(&self) -> FloatHistogram {
        if self.incremental { self.sum.total() } else { self.sum.mean(self.n) }
    }

    /// The hint of the sum so far.
    pub fn hint(&self) -> Hint {
        self.sum.hint
    }
}
