//! Cutting off observations above or below a value.

use super::{Bucket, BucketView, FloatHistogram};

impl FloatHistogram {
    /// Leaves out the observations above (`upper`) or below a value. Count and sum are estimated anew from the buckets if
    /// anything is left out.
    pub fn trim(&mut self, at: f64, upper: bool) {
        let custom = self.is_custom();
        let any = |side: &[Bucket<f64>]| side.iter().any(|b| b.count != 0.0);
        let (has_positive, has_negative) = (any(&self.positive), any(&self.negative));
        let (mut count, mut sum, mut trimmed) = (0.0, 0.0, false);
        let mut keep = |b: BucketView, positive: bool| {
            let (whole, cut) = if upper { (b.upper <= at, b.lower < at) } else { (b.lower >= at, b.upper > at) };
            let (kept, middle) = if whole {
                (b.count, middle(b.lower, b.upper, positive, custom))
            } else if cut {
                part(&b, at, upper, positive, custom)
            } else {
                (0.0, 0.0)
            };
            count += kept;
            sum += middle * kept;
            trimmed |= kept != b.count;
            kept
        };
        let mut sides = [std::mem::take(&mut self.positive), std::mem::take(&mut self.negative)];
        for (side, positive) in sides.iter_mut().zip([true, false]) {
            for b in side.iter_mut().filter(|b| b.count != 0.0) {
                let view = if positive { self.positive_view(b) } else { self.negative_view(b) };
                b.count = keep(view, positive);
            }
        }
        [self.positive, self.negative] = sides;
        if self.zero_count > 0.0 {
            let (kept, middle) = zero_part(self.zero_view(), at, upper, has_positive, has_negative);
            trimmed |= kept != self.zero_count;
            self.zero_count = kept;
            sum += middle * kept;
            count += kept;
        }
        if trimmed {
            (self.count, self.sum) = (count, sum);
            self.compact();
        }
    }
}

/// How much is kept of a bucket that the value lies in, and the middle of that.
fn part(b: &BucketView, at: f64, upper: bool, positive: bool, custom: bool) -> (f64, f64) {
    if b.lower == f64::NEG_INFINITY || b.upper == f64::INFINITY {
        return infinite_part(b, at, upper);
    }
    let below = b.count * b.fraction_below(at, custom);
    if upper {
        (below, middle(b.lower, at, positive, custom))
    } else {
        (b.count - below, middle(at, b.upper, positive, custom))
    }
}

/// The same for a bucket without end. Where its observations are can't be told, so that mostly all or none is kept.
fn infinite_part(b: &BucketView, at: f64, upper: bool) -> (f64, f64) {
    let finite = |v: f64| if v.is_infinite() { 0.0 } else { v };
    if b.lower == f64::NEG_INFINITY {
        // A first bucket that ends above zero is taken to begin at zero.
        let from_zero = b.upper > 0.0 && b.upper != f64::INFINITY;
        if upper {
            return match () {
                () if at >= b.upper => (b.count, 0.0),
                () if at > 0.0 && from_zero => (b.count * at / b.upper, at / 2.0),
                () if b.upper <= 0.0 => (b.count, at),
                () => (0.0, finite(b.upper)),
            };
        }
        return match () {
            () if at <= b.lower => (b.count, 0.0),
            () if at >= 0.0 && b.upper > at && from_zero => (b.count * (1.0 - at / b.upper), (at + b.upper) / 2.0),
            () => (0.0, finite(b.upper)),
        };
    }
    if !upper && at >= b.lower { (b.count, at) } else { (0.0, finite(b.lower)) }
}

fn zero_part(b: BucketView, at: f64, upper: bool, has_positive: bool, has_negative: bool) -> (f64, f64) {
    let low = if has_positive && !has_negative { 0.0 } else { b.lower };
    let high = if has_negative && !has_positive { 0.0 } else { b.upper };
    let (whole, none) = if upper { (at >= high, at <= low) } else { (at <= low, at >= high) };
    // A bucket of no width is judged from below first.
    if upper && none {
        (0.0, 0.0)
    } else if whole {
        (b.count, (low + high) / 2.0)
    } else if none {
        (0.0, 0.0)
    } else if upper {
        (b.count * ((at - low) / (high - low)), (low + at) / 2.0)
    } else {
        (b.count * ((high - at) / (high - low)), (at + high) / 2.0)
    }
}

/// Where the observations of a stretch are taken to be.
fn middle(lower: f64, upper: f64, positive: bool, linear: bool) -> f64 {
    match (lower.is_infinite(), upper.is_infinite()) {
        (true, true) => 0.0,
        (true, false) => {
            if upper > 0.0 {
                upper / 2.0
            } else {
                upper
            }
        }
        (false, true) => lower,
        (false, false) if linear => (lower + upper) / 2.0,
        (false, false) => {
            let mean = (lower * upper).abs().sqrt();
            if positive { mean } else { -mean }
        }
    }
}
