//! Native histograms: one reused value into which the wire format is read and which is then checked as Prometheus 3
//! checks it.
//!
//! On the wire an integer histogram has bucket counts as differences to the bucket before; here and in the table they are
//! absolute. The message is the same in remote write 1.0 and 2.0 but for the start time.

use crate::wire::{self, Cursor, fixed64_key, len_key, varint_key, zigzag, zigzag32};

/// The schema of histograms with custom bounds.
const CUSTOM: i32 = -53;
/// The exponential schemas that are stored.
const EXPONENTIAL: std::ops::RangeInclusive<i32> = -4..=8;
/// Exponential schemas that are accepted and reduced to the finest that is stored.
const FINER: std::ops::RangeInclusive<i32> = 9..=52;

/// Most spans, buckets and custom bounds of one histogram.
const VALUES_MAX: usize = 100_000;

/// A run of buckets: `offset` is the gap to the run before, or the first bucket's index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub offset: i32,
    pub length: u32,
}

/// The positive or the negative buckets.
#[derive(Debug, Default)]
pub struct Buckets {
    pub spans: Vec<Span>,
    /// Counts of an integer histogram: differences while reading, absolute after [`Histogram::check`].
    pub int: Vec<i64>,
    /// Counts of a float histogram.
    pub float: Vec<f64>,
}

/// A native histogram.
#[derive(Debug, Default)]
pub struct Histogram {
    pub ts: i64,
    pub schema: i32,
    pub zero_threshold: f64,
    pub sum: f64,
    pub is_float: bool,
    pub count_int: u64,
    pub count_float: f64,
    pub zero_count_int: u64,
    pub zero_count_float: f64,
    pub positive: Buckets,
    pub negative: Buckets,
    pub custom_values: Vec<f64>,
    pub reset_hint: i8,
    pub start_ts: Option<i64>,
    /// More than [`VALUES_MAX`] values were met; some were left out.
    too_large: bool,
}

impl Buckets {
    fn clear(&mut self) {
        self.spans.clear();
        self.int.clear();
        self.float.clear();
    }

    fn len(&self) -> usize {
        self.int.len() + self.float.len()
    }
}

impl Histogram {
    fn clear(&mut self) {
        let mut old = std::mem::take(self);
        old.positive.clear();
        old.negative.clear();
        old.custom_values.clear();
        // Keeps the allocations.
        (self.positive, self.negative, self.custom_values) = (old.positive, old.negative, old.custom_values);
    }

    /// Elements in all lists, spans counting twice.
    pub fn values(&self) -> usize {
        let side = |b: &Buckets| 2 * b.spans.len() + b.len();
        side(&self.positive) + side(&self.negative) + self.custom_values.len()
    }

    /// Reads a message in place of what was there. `last_field` is the number of the last field that is known.
    pub fn read(&mut self, mut c: Cursor<'_>, last_field: u32) -> wire::Result<()> {
        const COUNT_INT: u32 = varint_key(1);
        const COUNT_FLOAT: u32 = fixed64_key(2);
        const SUM: u32 = fixed64_key(3);
        const SCHEMA: u32 = varint_key(4);
        const ZERO_THRESHOLD: u32 = fixed64_key(5);
        const ZERO_COUNT_INT: u32 = varint_key(6);
        const ZERO_COUNT_FLOAT: u32 = fixed64_key(7);
        const NEGATIVE_SPAN: u32 = len_key(8);
        const NEGATIVE_DELTAS: u32 = len_key(9);
        const NEGATIVE_DELTA: u32 = varint_key(9);
        const NEGATIVE_COUNTS: u32 = len_key(10);
        const NEGATIVE_COUNT: u32 = fixed64_key(10);
        const POSITIVE_SPAN: u32 = len_key(11);
        const POSITIVE_DELTAS: u32 = len_key(12);
        const POSITIVE_DELTA: u32 = varint_key(12);
        const POSITIVE_COUNTS: u32 = len_key(13);
        const POSITIVE_COUNT: u32 = fixed64_key(13);
        const RESET_HINT: u32 = varint_key(14);
        const TS: u32 = varint_key(15);
        const CUSTOM_VALUES: u32 = len_key(16);
        const CUSTOM_VALUE: u32 = fixed64_key(16);
        const START: u32 = varint_key(17);
        self.clear();
        while let Some(key) = c.key()? {
            if self.values() > VALUES_MAX {
                self.too_large = true;
                self.positive.clear();
                self.negative.clear();
                self.custom_values.clear();
            }
            match key {
                // Of the alternatives of a `oneof` the last one read holds.
                COUNT_INT => (self.is_float, self.count_float, self.count_int) = (false, 0.0, c.varint()?),
                COUNT_FLOAT => (self.is_float, self.count_int, self.count_float) = (true, 0, c.double()?),
                SUM => self.sum = c.double()?,
                SCHEMA => self.schema = zigzag32(c.varint()?),
                ZERO_THRESHOLD => self.zero_threshold = c.double()?,
                ZERO_COUNT_INT => (self.zero_count_float, self.zero_count_int) = (0.0, c.varint()?),
                ZERO_COUNT_FLOAT => (self.zero_count_int, self.zero_count_float) = (0, c.double()?),
                NEGATIVE_SPAN => self.negative.spans.push(span(c.message()?)?),
                NEGATIVE_DELTAS => self.too_large |= deltas(c.message()?, &mut self.negative.int)?,
                NEGATIVE_DELTA => self.negative.int.push(zigzag(c.varint()?)),
                NEGATIVE_COUNTS => self.too_large |= doubles(c.message()?, &mut self.negative.float)?,
                NEGATIVE_COUNT => self.negative.float.push(c.double()?),
                POSITIVE_SPAN => self.positive.spans.push(span(c.message()?)?),
                POSITIVE_DELTAS => self.too_large |= deltas(c.message()?, &mut self.positive.int)?,
                POSITIVE_DELTA => self.positive.int.push(zigzag(c.varint()?)),
                POSITIVE_COUNTS => self.too_large |= doubles(c.message()?, &mut self.positive.float)?,
                POSITIVE_COUNT => self.positive.float.push(c.double()?),
                RESET_HINT => self.reset_hint = i8::try_from(c.varint()?).ok().filter(|h| *h <= 3).unwrap_or(0),
                TS => self.ts = c.varint()? as i64,
                CUSTOM_VALUES => self.too_large |= doubles(c.message()?, &mut self.custom_values)?,
                CUSTOM_VALUE => self.custom_values.push(c.double()?),
                START if last_field >= 17 => self.start_ts = Some(c.varint()? as i64).filter(|t| *t != 0),
                key => c.skip(key, 1..=last_field)?,
            }
        }
        Ok(())
    }

    /// Checks a histogram that was just read, makes its counts absolute and a schema finer than what is stored coarser.
    /// The error says what is wrong and is to follow the word "histogram".
    pub fn check(&mut self) -> Result<(), String> {
        if self.too_large || self.values() > VALUES_MAX {
            return Err(format!("has too many buckets; {VALUES_MAX} spans, buckets and bounds are allowed"));
        }
        // What the other kind of histogram uses is ignored, as Prometheus does.
        if self.is_float {
            self.positive.int.clear();
            self.negative.int.clear();
            self.zero_count_int = 0;
        } else {
            self.positive.float.clear();
            self.negative.float.clear();
            self.zero_count_float = 0.0;
        }
        let custom = self.schema == CUSTOM;
        if custom {
            self.check_custom()?;
        } else if !EXPONENTIAL.contains(&self.schema) && !FINER.contains(&self.schema) {
            return Err(format!("has schema {}; allowed are -4 to 52, and -53 for custom bounds", self.schema));
        } else if !self.custom_values.is_empty() {
            return Err("has an exponential schema and custom bounds; only schema -53 may have them".to_owned());
        }
        for (name, side) in [("positive", &mut self.positive), ("negative", &mut self.negative)] {
            check_spans(name, side, custom)?;
            check_counts(name, side)?;
        }
        if self.is_float {
            if self.count_float < 0.0 {
                return Err(format!("has a negative count: {}", self.count_float));
            }
            if self.zero_count_float < 0.0 {
                return Err(format!("has a negative count in its zero bucket: {}", self.zero_count_float));
            }
        } else {
            self.check_total()?;
        }
        if FINER.contains(&self.schema) {
            let shift = self.schema - EXPONENTIAL.end();
            coarsen(&mut self.positive, shift);
            coarsen(&mut self.negative, shift);
            self.schema = *EXPONENTIAL.end();
        }
        Ok(())
    }

    fn check_custom(&self) -> Result<(), String> {
        let mut last = f64::NEG_INFINITY;
        for bound in &self.custom_values {
            if *bound <= last || bound.is_nan() {
                return Err(format!("has custom bounds that don't increase: {bound} follows {last}"));
            }
            last = *bound;
        }
        if last == f64::INFINITY {
            return Err("has an infinite custom bound; the last bucket ends at infinity without being told".to_owned());
        }
        if self.zero_threshold != 0.0 || self.zero_count_int != 0 || self.zero_count_float != 0.0 {
            return Err("has custom bounds and a zero bucket; both can't be".to_owned());
        }
        if !self.negative.spans.is_empty() || self.negative.len() != 0 {
            return Err("has custom bounds and negative buckets; both can't be".to_owned());
        }
        let reach: i64 = self.positive.spans.iter().map(|s| i64::from(s.offset) + i64::from(s.length)).sum();
        if reach > self.custom_values.len() as i64 + 1 {
            return Err(format!("has buckets up to number {reach} for {} custom bounds", self.custom_values.len()));
        }
        Ok(())
    }

    /// The total of an integer histogram counts observations of NaN, which are in no bucket; only a sum of NaN shows them.
    fn check_total(&self) -> Result<(), String> {
        let buckets = self.positive.int.iter().chain(&self.negative.int);
        let found = buckets.map(|c| *c as u128).sum::<u128>() + u128::from(self.zero_count_int);
        let count = u128::from(self.count_int);
        if if self.sum.is_nan() { found > count } else { found != count } {
            return Err(format!("has {found} observations in its buckets and a count of {count}"));
        }
        Ok(())
    }
}

fn span(mut c: Cursor<'_>) -> wire::Result<Span> {
    const OFFSET: u32 = varint_key(1);
    const LENGTH: u32 = varint_key(2);
    let mut span = Span { offset: 0, length: 0 };
    while let Some(key) = c.key()? {
        match key {
            OFFSET => span.offset = zigzag32(c.varint()?),
            LENGTH => span.length = c.varint()? as u32,
            key => c.skip(key, 1..=2)?,
        }
    }
    Ok(span)
}

/// Reads packed differences; true when there are too many, of which only the first ones are kept.
fn deltas(mut c: Cursor<'_>, out: &mut Vec<i64>) -> wire::Result<bool> {
    let mut too_many = false;
    while !c.is_empty() {
        let v = zigzag(c.varint()?);
        if out.len() < VALUES_MAX {
            out.push(v);
        } else {
            too_many = true;
        }
    }
    Ok(too_many)
}

/// Reads packed doubles; true when there are too many, of which only the first ones are kept.
fn doubles(mut c: Cursor<'_>, out: &mut Vec<f64>) -> wire::Result<bool> {
    let mut too_many = false;
    while !c.is_empty() {
        let v = c.double()?;
        if out.len() < VALUES_MAX {
            out.push(v);
        } else {
            too_many = true;
        }
    }
    Ok(too_many)
}

fn check_spans(name: &str, side: &Buckets, custom: bool) -> Result<(), String> {
    let mut total = 0u64;
    let mut end = 0i64;
    for (i, s) in side.spans.iter().enumerate() {
        if s.offset < 0 && (i > 0 || custom) {
            return Err(format!("has a {name} span with the negative offset {}", s.offset));
        }
        total += u64::from(s.length);
        end += i64::from(s.offset) + i64::from(s.length);
    }
    if total != side.len() as u64 {
        return Err(format!("has {} {name} buckets and spans for {total}", side.len()));
    }
    if end > i64::from(i32::MAX) {
        return Err(format!("has {name} spans that reach bucket {end}; the last one allowed is {}", i32::MAX));
    }
    Ok(())
}

/// Refuses negative counts and makes the counts of an integer histogram absolute.
fn check_counts(name: &str, side: &mut Buckets) -> Result<(), String> {
    let mut count = 0i64;
    for c in &mut side.int {
        count = count.checked_add(*c).unwrap_or(-1);
        if count < 0 {
            return Err(format!("has a {name} bucket with a negative or too large count"));
        }
        *c = count;
    }
    match side.float.iter().find(|c| **c < 0.0) {
        Some(c) => Err(format!("has a {name} bucket with the negative count {c}")),
        None => Ok(()),
    }
}

/// Merges buckets of absolute counts into those of a schema that is lower by `shift`.
fn coarsen(side: &mut Buckets, shift: i32) {
    // Bucket i of the finer schema lies in bucket ceil(i / 2^shift) of the coarser.
    let target = |i: i64| if shift >= 63 { i64::from(i > 0) } else { ((i - 1) >> shift) + 1 };
    let mut spans: Vec<Span> = Vec::new();
    let (mut int, mut float) = (Vec::new(), Vec::new());
    let mut last: Option<i64> = None;
    let (mut index, mut at) = (0i64, 0usize);
    for s in &side.spans {
        index += i64::from(s.offset);
        for _ in 0..s.length {
            let t = target(index);
            if last == Some(t) {
                merge(&mut int, &side.int, at, |a, b| a.saturating_add(b));
                merge(&mut float, &side.float, at, |a, b| a + b);
            } else {
                int.extend(side.int.get(at));
                float.extend(side.float.get(at));
                // Indices fit: they were checked for the finer schema.
                let gap = (t - last.map_or(0, |l| l + 1)) as i32;
                match spans.last_mut() {
                    Some(s) if gap == 0 => s.length += 1,
                    _ => spans.push(Span { offset: gap, length: 1 }),
                }
                last = Some(t);
            }
            index += 1;
            at += 1;
        }
    }
    (side.spans, side.int, side.float) = (spans, int, float);
}

fn merge<T: Copy>(out: &mut [T], counts: &[T], at: usize, add: impl Fn(T, T) -> T) {
    if let (Some(a), Some(b)) = (out.last_mut(), counts.get(at)) {
        *a = add(*a, *b);
    }
}
