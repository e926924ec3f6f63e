//! Native histograms as values: what PromQL computes with them, without any plan around it.
//!
//! Buckets are kept sparse and sorted by index; a bucket with a count of zero may be there explicitly. The buckets of an
//! exponential schema end at powers of `2^(2^-schema)`, those of [`CUSTOM`] at the histogram's own bounds. Sums of many
//! histograms are made in a histogram whose counts carry a compensation ([`Sum`]), so that the order of operands does
//! not show.

mod bounds;
mod bytes;
mod stats;
mod text;
mod trim;

use std::fmt;
use std::sync::Arc;

use engine::kernels::kahan_add;

pub use bounds::BucketView;
pub use bytes::decode;
pub use stats::{Mean, NanNote};

/// The schema of histograms with custom bounds.
pub const CUSTOM: i32 = -53;

/// What is known of whether a counter began again since the sample before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Hint {
    /// Nothing; the buckets must be compared.
    #[default]
    Unknown,
    /// It did.
    Reset,
    /// It did not.
    NotReset,
    /// It is no counter.
    Gauge,
}

impl Hint {
    /// The hint of a number as the `histograms` table has it.
    pub fn of(code: i8) -> Self {
        match code {
            1 => Self::Reset,
            2 => Self::NotReset,
            3 => Self::Gauge,
            _ => Self::Unknown,
        }
    }
}

/// A number that is added to: with or without compensation.
pub trait Cell: Copy + Default + fmt::Debug {
    /// Adds a number.
    fn add(&mut self, v: f64);
    /// Multiplies by a number.
    fn scale(&mut self, factor: f64);
    /// The number.
    fn value(self) -> f64;
    /// Whether it is zero in all its parts.
    fn is_zero(self) -> bool;
}

impl Cell for f64 {
    #[inline]
    fn add(&mut self, v: f64) {
        *self += v;
    }

    #[inline]
    fn scale(&mut self, factor: f64) {
        *self *= factor;
    }

    #[inline]
    fn value(self) -> f64 {
        self
    }

    #[inline]
    fn is_zero(self) -> bool {
        self == 0.0
    }
}

/// A Kahan-Neumaier sum.
#[derive(Debug, Clone, Copy, Default)]
pub struct Kahan {
    sum: f64,
    rest: f64,
}

impl Cell for Kahan {
    #[inline]
    fn add(&mut self, v: f64) {
        (self.sum, self.rest) = kahan_add(v, self.sum, self.rest);
    }

    #[inline]
    fn scale(&mut self, factor: f64) {
        self.sum *= factor;
        self.rest *= factor;
    }

    #[inline]
    fn value(self) -> f64 {
        self.sum + self.rest
    }

    #[inline]
    fn is_zero(self) -> bool {
        self.sum == 0.0 && self.rest == 0.0
    }
}

/// One bucket.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bucket<C> {
    /// Its number within the schema.
    pub index: i32,
    /// How many observations.
    pub count: C,
}

/// A native histogram.
#[derive(Debug, Clone)]
pub struct Histogram<C> {
    /// Whether the counter began again.
    pub hint: Hint,
    /// When the counter of a sample began, milliseconds since the epoch; 0 where that is not known, as for any result.
    pub start: i64,
    /// -4 to 8, or [`CUSTOM`].
    pub schema: i32,
    /// Observations up to this far from zero are in the zero bucket.
    pub zero_threshold: f64,
    /// Observations in the zero bucket.
    pub zero_count: C,
    /// All observations.
    pub count: C,
    /// Sum of the observations.
    pub sum: C,
    /// Buckets above zero, or all with custom bounds.
    pub positive: Vec<Bucket<C>>,
    /// Buckets below zero; an index counts away from zero.
    pub negative: Vec<Bucket<C>>,
    /// Upper bounds of the buckets with custom bounds; the last bucket has none.
    pub custom: Arc<[f64]>,
}

/// A histogram as a sample has it.
pub type FloatHistogram = Histogram<f64>;

/// The running sum of histograms.
pub type Sum = Histogram<Kahan>;

/// Exponential and custom buckets can't be put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Incompatible;

/// What adding histograms had to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Added {
    /// One counter began again and the other did not.
    pub resets_collide: bool,
    /// Custom bounds differed, and only those that both have were kept.
    pub bounds_reconciled: bool,
}

impl<C: Default> Default for Histogram<C> {
    fn default() -> Self {
        Self {
            hint: Hint::Unknown,
            start: 0,
            schema: 0,
            zero_threshold: 0.0,
            zero_count: C::default(),
            count: C::default(),
            sum: C::default(),
            positive: Vec::new(),
            negative: Vec::new(),
            custom: Arc::default(),
        }
    }
}

impl<C: Cell> Histogram<C> {
    /// An empty one with the buckets' bounds of another.
    pub fn empty_like<D>(other: &Histogram<D>) -> Self {
        Self { schema: other.schema, custom: other.custom.clone(), ..Self::default() }
    }

    /// Whether its bounds are its own.
    #[inline]
    pub fn is_custom(&self) -> bool {
        self.schema == CUSTOM
    }

    /// Adds another. Differing schemas, zero thresholds and custom bounds are brought to what both can have.
    ///
    /// # Errors
    /// One has custom bounds and the other has not.
    pub fn add(&mut self, other: &FloatHistogram) -> Result<Added, Incompatible> {
        self.combine(other, 1.0)
    }

    /// Subtracts another, see [`Histogram::add`].
    ///
    /// # Errors
    /// One has custom bounds and the other has not.
    pub fn sub(&mut self, other: &FloatHistogram) -> Result<Added, Incompatible> {
        self.combine(other, -1.0)
    }

    fn combine(&mut self, other: &FloatHistogram, sign: f64) -> Result<Added, Incompatible> {
        if self.is_custom() != other.is_custom() {
            return Err(Incompatible);
        }
        let mut added = Added { resets_collide: self.combine_hints(other.hint), bounds_reconciled: false };
        if self.is_custom() {
            if self.custom == other.custom {
                merge(&mut self.positive, other.positive.iter().copied(), sign);
            } else {
                added.bounds_reconciled = true;
                let common: Arc<[f64]> = intersection(&self.custom, &other.custom).into();
                self.positive = rebound(&self.positive, &self.custom, &common);
                merge(&mut self.positive, rebound(&other.positive, &other.custom, &common).into_iter(), sign);
                self.positive.retain(|b| !b.count.is_zero());
                self.custom = common;
            }
        } else {
            let zero_count = self.reconcile_zero(other);
            self.zero_count.add(sign * zero_count);
            if other.schema < self.schema {
                self.reduce_resolution(other.schema);
            }
            let (schema, shift, threshold) = (self.schema, other.schema - self.schema, self.zero_threshold);
            // What lies within the zero bucket is counted there already.
            let beyond = |b: &Bucket<f64>| bounds::exponential(b.index, schema) <= threshold;
            for (mine, theirs) in [(&mut self.positive, &other.positive), (&mut self.negative, &other.negative)] {
                if shift > 0 {
                    merge(mine, coarser(theirs, shift).into_iter().skip_while(beyond), sign);
                } else {
                    merge(mine, theirs.iter().copied().skip_while(beyond), sign);
                }
            }
        }
        self.count.add(sign * other.count);
        self.sum.add(sign * other.sum);
        Ok(added)
    }

    /// The hint of a sum with something of another hint; true if the two contradict each other.
    fn combine_hints(&mut self, other: Hint) -> bool {
        let (mine, collide) = match (self.hint, other) {
            (a, b) if a == b => (a, false),
            (Hint::Gauge, _) | (_, Hint::Gauge) => (Hint::Gauge, false),
            (Hint::Unknown, _) | (_, Hint::Unknown) => (Hint::Unknown, false),
            _ => (Hint::Unknown, true),
        };
        self.hint = mine;
        collide
    }

    /// Widens the zero bucket until it can hold the other's; says how much the other then has in it.
    fn reconcile_zero(&mut self, other: &FloatHistogram) -> f64 {
        let (mut count, mut threshold) = (other.zero_count, other.zero_threshold);
        while threshold != self.zero_threshold {
            if threshold < self.zero_threshold {
                (count, threshold) = other.widened_zero(self.zero_threshold);
            }
            if threshold > self.zero_threshold {
                (self.zero_count, self.zero_threshold) = self.widened_zero(threshold);
                let (schema, threshold) = (self.schema, self.zero_threshold);
                for side in [&mut self.positive, &mut self.negative] {
                    side.retain(|b| bounds::exponential(b.index - 1, schema) >= threshold && !b.count.is_zero());
                }
            }
        }
        count
    }

    /// The zero bucket's count if it reached at least to `threshold`, and where it then ends: no populated bucket is cut.
    fn widened_zero(&self, mut threshold: f64) -> (C, f64) {
        if threshold == self.zero_threshold {
            return (self.zero_count, threshold);
        }
        'again: loop {
            let mut count = self.zero_count;
            for side in [&self.positive, &self.negative] {
                for b in side {
                    if bounds::exponential(b.index - 1, self.schema) >= threshold {
                        break;
                    }
                    count.add(b.count.value());
                    let upper = bounds::exponential(b.index, self.schema);
                    if upper > threshold {
                        if !b.count.is_zero() {
                            // The other side may have more to give now.
                            threshold = upper;
                            continue 'again;
                        }
                        break;
                    }
                }
            }
            return (count, threshold);
        }
    }

    /// Merges buckets so that those of a lower exponential schema result.
    pub fn reduce_resolution(&mut self, schema: i32) {
        if self.is_custom() || schema >= self.schema {
            return;
        }
        let shift = self.schema - schema;
        self.positive = coarser(&self.positive, shift);
        self.negative = coarser(&self.negative, shift);
        self.schema = schema;
    }

    /// Multiplies all counts and the sum.
    pub fn mul(&mut self, factor: f64) {
        self.each_cell(|c| c.scale(factor));
        if factor < 0.0 {
            self.hint = Hint::Gauge;
        }
    }

    /// Removes buckets without observations.
    pub fn compact(&mut self) {
        self.positive.retain(|b| !b.count.is_zero());
        self.negative.retain(|b| !b.count.is_zero());
    }

    fn each_cell(&mut self, mut f: impl FnMut(&mut C)) {
        f(&mut self.zero_count);
        f(&mut self.count);
        f(&mut self.sum);
        self.positive.iter_mut().chain(&mut self.negative).for_each(|b| f(&mut b.count));
    }

    fn map<D: Cell>(&self, f: impl Fn(C) -> D) -> Histogram<D> {
        let side = |side: &[Bucket<C>]| side.iter().map(|b| Bucket { index: b.index, count: f(b.count) }).collect();
        Histogram {
            hint: self.hint,
            start: 0,
            schema: self.schema,
            zero_threshold: self.zero_threshold,
            zero_count: f(self.zero_count),
            count: f(self.count),
            sum: f(self.sum),
            positive: side(&self.positive),
            negative: side(&self.negative),
            custom: self.custom.clone(),
        }
    }

    /// Whether anything in it grew beyond the greatest number.
    pub fn has_overflow(&self) -> bool {
        let buckets = self.positive.iter().chain(&self.negative).map(|b| b.count);
        [self.zero_count, self.count, self.sum].into_iter().chain(buckets).any(|c| c.value().is_infinite())
    }
}

impl Sum {
    /// Begins a sum.
    pub fn of(h: &FloatHistogram) -> Self {
        h.map(|v| Kahan { sum: v, rest: 0.0 })
    }

    /// The sum.
    pub fn total(&self) -> FloatHistogram {
        self.map(Kahan::value)
    }

    /// The sum divided by how many histograms it is of.
    pub fn mean(&self, n: f64) -> FloatHistogram {
        self.map(|c| c.sum / n + c.rest / n)
    }

    /// Adds another sum.
    ///
    /// # Errors
    /// One has custom bounds and the other has not.
    pub fn add_sum(&mut self, other: &Self) -> Result<Added, Incompatible> {
        let mut added = self.add(&other.map(|c| c.sum))?;
        let rest = FloatHistogram { hint: self.hint, ..other.map(|c| c.rest) };
        // Bounds differ again only if they did before.
        added.bounds_reconciled |= self.add(&rest)?.bounds_reconciled;
        Ok(added)
    }
}

impl FloatHistogram {
    /// Divides all counts and the sum. Division by zero leaves no buckets.
    pub fn div(&mut self, by: f64) {
        self.each_cell(|c| *c /= by);
        if by == 0.0 {
            self.positive.clear();
            self.negative.clear();
        } else if by < 0.0 {
            self.hint = Hint::Gauge;
        }
    }

    /// Whether a counter began again between `previous` and this.
    pub fn is_reset_after(&self, previous: &Self) -> bool {
        match self.hint {
            Hint::Reset => return true,
            Hint::NotReset => return false,
            // A gauge used as a counter is treated as one; the user is warned elsewhere.
            Hint::Unknown | Hint::Gauge => {}
        }
        if self.count < previous.count {
            return true;
        }
        if self.is_custom() || previous.is_custom() {
            if self.is_custom() != previous.is_custom() {
                return true;
            }
            if self.custom == previous.custom {
                return fell(self.positive.iter().copied(), previous.positive.iter().copied());
            }
            let common = intersection(&self.custom, &previous.custom);
            let mapped = |h: &Self| rebound(&h.positive, &h.custom, &common).into_iter();
            return fell(mapped(self), mapped(previous));
        }
        // Neither a finer schema nor a narrower zero bucket comes without beginning again.
        if self.schema > previous.schema || self.zero_threshold < previous.zero_threshold {
            return true;
        }
        let (zero_count, threshold) = previous.widened_zero(self.zero_threshold);
        if threshold != self.zero_threshold || self.zero_count < zero_count {
            return true;
        }
        let shift = previous.schema - self.schema;
        let within = |b: &Bucket<f64>| threshold != 0.0 && bounds::exponential(b.index, self.schema) <= threshold;
        let sides = [(&self.positive, &previous.positive), (&self.negative, &previous.negative)];
        sides.into_iter().any(|(mine, theirs)| {
            let mine = mine.iter().copied().skip_while(within);
            if shift == 0 {
                fell(mine, theirs.iter().copied().skip_while(within))
            } else {
                fell(mine, coarser(theirs, shift).into_iter().skip_while(within))
            }
        })
    }

    /// How many floats take as much memory.
    pub fn weight(&self) -> usize {
        // As Prometheus counts: a histogram is worth its size over that of a float sample with its time.
        (168 + 8 * (self.positive.len() + self.negative.len() + self.custom.len())) / 16
    }
}

/// Equal as data: the same buckets, also empty ones, with the same bits. Hints do not count.
impl PartialEq for FloatHistogram {
    fn eq(&self, other: &Self) -> bool {
        let same = |a: f64, b: f64| a.to_bits() == b.to_bits();
        let sides = |a: &[Bucket<f64>], b: &[Bucket<f64>]| {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.index == b.index && same(a.count, b.count))
        };
        self.schema == other.schema
            && same(self.count, other.count)
            && same(self.sum, other.sum)
            && (!self.is_custom() || self.custom == other.custom)
            && self.zero_threshold == other.zero_threshold
            && same(self.zero_count, other.zero_count)
            && sides(&self.positive, &other.positive)
            && sides(&self.negative, &other.negative)
    }
}

/// Adds buckets to others; both are sorted by index.
fn merge<C: Cell>(mine: &mut Vec<Bucket<C>>, theirs: impl Iterator<Item = Bucket<f64>>, sign: f64) {
    let mut at = 0;
    for b in theirs {
        while mine.get(at).is_some_and(|m| m.index < b.index) {
            at += 1;
        }
        match mine.get_mut(at) {
            Some(m) if m.index == b.index => m.count.add(sign * b.count),
            // Samples of a series have mostly the same buckets, so that this is rare.
            _ => {
                let mut count = C::default();
                count.add(sign * b.count);
                mine.insert(at, Bucket { index: b.index, count });
            }
        }
        at += 1;
    }
}

/// The buckets of a schema that is lower by `shift`.
fn coarser<C: Cell>(buckets: &[Bucket<C>], shift: i32) -> Vec<Bucket<C>> {
    let mut out: Vec<Bucket<C>> = Vec::with_capacity(buckets.len());
    for b in buckets {
        let index = ((b.index - 1) >> shift) + 1;
        match out.last_mut() {
            Some(last) if last.index == index => last.count.add(b.count.value()),
            _ => out.push(Bucket { index, count: b.count }),
        }
    }
    out
}

/// The bounds that both have; both are sorted.
fn intersection(a: &[f64], b: &[f64]) -> Vec<f64> {
    let mut rest = b.iter().peekable();
    let mut has = |v: &f64| {
        while rest.next_if(|w| *w < v).is_some() {}
        rest.peek() == Some(&v)
    };
    a.iter().filter(|v| has(v)).copied().collect()
}

/// Buckets of custom bounds mapped to fewer bounds, each to the first that is not below its own.
fn rebound<C: Cell>(buckets: &[Bucket<C>], from: &[f64], to: &[f64]) -> Vec<Bucket<C>> {
    let mut out: Vec<Bucket<C>> = Vec::with_capacity(buckets.len().min(to.len() + 1));
    for b in buckets {
        let own = usize::try_from(b.index).ok().and_then(|i| from.get(i));
        let index = own.map_or(to.len(), |own| to.partition_point(|t| t < own)) as i32;
        match out.last_mut() {
            Some(last) if last.index == index => last.count.add(b.count.value()),
            _ => out.push(Bucket { index, count: b.count }),
        }
    }
    out
}

/// Whether any bucket holds less than before; a missing bucket holds nothing.
fn fell(now: impl Iterator<Item = Bucket<f64>>, before: impl Iterator<Item = Bucket<f64>>) -> bool {
    let mut now = now.peekable();
    for b in before {
        while now.next_if(|n| n.index < b.index).is_some() {}
        let count = now.next_if(|n| n.index == b.index).map(|n| n.count);
        if count.map_or(b.count != 0.0, |c| c < b.count) {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests;
