//! Where buckets begin and end.

use std::sync::LazyLock;

use super::{Bucket, CUSTOM, FloatHistogram};

/// The finest exponential schema.
const FINEST: i32 = 8;

/// Bounds in [0.5, 1) of the finest schema; those of coarser schemas are among them. Each is the product of the powers
/// `2^(2^-k)` that its number calls for, greatest first: that is where Prometheus's table has each of its roundings, and
/// bounds are compared with those of other systems by text.
static FRACTIONS: LazyLock<[f64; 256]> = LazyLock::new(|| {
    let mut roots = [2.0f64; 9];
    for k in 1..9 {
        roots[k] = roots[k - 1].sqrt();
    }
    std::array::from_fn(|i| {
        let start = if i & 128 != 0 { std::f64::consts::SQRT_2.recip() } else { 0.5 };
        (0..7).rev().filter(|k| i >> k & 1 != 0).fold(start, |x, k| x * roots[8 - k])
    })
});

/// The upper bound of a bucket of an exponential schema.
pub(super) fn exponential(index: i32, schema: i32) -> f64 {
    // The last bucket of finite values ends at the greatest of them, though the formula gives infinity.
    if schema < 0 {
        let exponent = i64::from(index) << -schema;
        return if exponent == 1024 { f64::MAX } else { power(1.0, exponent) };
    }
    let fraction = FRACTIONS[((index & ((1 << schema) - 1)) << (FINEST - schema)) as usize];
    let exponent = i64::from(index >> schema) + 1;
    if fraction == 0.5 && exponent == 1025 { f64::MAX } else { power(fraction, exponent) }
}

/// `x * 2^exponent` for x in [0.5, 1].
fn power(x: f64, exponent: i64) -> f64 {
    let half = |e: i64| f64::from_bits(((e + 1023) as u64) << 52);
    match exponent {
        ..=-1100 => 0.0,
        1100.. => f64::INFINITY,
        // In steps that are normal numbers; only the last can round or overflow.
        e if e < -1000 => x * half(-1000) * half(e + 1000),
        e if e > 1000 => x * half(1000) * half(e - 1000),
        e => x * half(e),
    }
}

/// A bucket with its bounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BucketView {
    /// Lower bound.
    pub lower: f64,
    /// Upper bound.
    pub upper: f64,
    /// Whether an observation equal to the lower bound is in it.
    pub lower_inclusive: bool,
    /// Whether an observation equal to the upper bound is in it.
    pub upper_inclusive: bool,
    /// How many observations.
    pub count: f64,
}

impl BucketView {
    /// How much of it is below a value, if observations are spread evenly over it, on a linear or else a logarithmic
    /// scale.
    pub(super) fn fraction_below(&self, v: f64, linear: bool) -> f64 {
        if linear {
            return (v - self.lower) / (self.upper - self.lower);
        }
        let (lower, upper, at) = (self.lower.abs().log2(), self.upper.abs().log2(), v.abs().log2());
        if v > 0.0 { (at - lower) / (upper - lower) } else { 1.0 - (at - upper) / (lower - upper) }
    }
}

impl FloatHistogram {
    /// The upper bound of a positive bucket.
    fn upper(&self, index: i32) -> f64 {
        if self.schema != CUSTOM {
            return exponential(index, self.schema);
        }
        match usize::try_from(index) {
            Ok(i) => self.custom.get(i).copied().unwrap_or(f64::INFINITY),
            Err(_) => f64::NEG_INFINITY,
        }
    }

    pub(super) fn positive_view(&self, b: &Bucket<f64>) -> BucketView {
        let (lower, upper) = (self.upper(b.index - 1), self.upper(b.index));
        let lower_inclusive = if self.is_custom() { b.index == 0 } else { lower < 0.0 };
        let upper_inclusive = self.is_custom() || upper > 0.0;
        BucketView { lower, upper, lower_inclusive, upper_inclusive, count: b.count }
    }

    pub(super) fn negative_view(&self, b: &Bucket<f64>) -> BucketView {
        let (lower, upper) = (-self.upper(b.index), -self.upper(b.index - 1));
        BucketView { lower, upper, lower_inclusive: lower < 0.0, upper_inclusive: upper > 0.0, count: b.count }
    }

    pub(super) fn zero_view(&self) -> BucketView {
        BucketView {
            lower: -self.zero_threshold,
            upper: self.zero_threshold,
            lower_inclusive: true,
            upper_inclusive: true,
            count: self.zero_count,
        }
    }

    /// All buckets in ascending order, the zero bucket if it holds more than nothing. A bucket that reaches into the zero
    /// bucket ends there.
    pub fn buckets(&self) -> impl DoubleEndedIterator<Item = BucketView> + '_ {
        self.all(self.zero_count > 0.0)
    }

    /// The buckets with a count, which can be negative in a difference, in ascending order.
    pub fn populated(&self) -> impl Iterator<Item = BucketView> + '_ {
        self.all(self.zero_count != 0.0).filter(|b| b.count != 0.0)
    }

    fn all(&self, with_zero: bool) -> impl DoubleEndedIterator<Item = BucketView> + '_ {
        let threshold = self.zero_threshold;
        let negative = self.negative.iter().rev().map(|b| self.negative_view(b));
        let positive = self.positive.iter().map(|b| self.positive_view(b));
        let clipped = move |mut b: BucketView| {
            if b.upper < 0.0 && b.upper > -threshold {
                b.upper = -threshold;
            } else if b.lower > 0.0 && b.lower < threshold {
                b.lower = threshold;
            }
            b
        };
        let zero = with_zero.then(|| self.zero_view());
        negative.map(clipped).chain(zero).chain(positive.map(clipped))
    }
}
