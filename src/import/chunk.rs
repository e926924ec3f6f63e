//! Reading the chunks of Prometheus; [`promql::chunk`] says what they are and writes them.

use promql::chunk::CUSTOM;
pub use promql::chunk::{Counts, Histogram, Points, STALE, Span};

use super::bytes::{Bits, Damage, Reader, Result};

/// Most buckets, spans or bounds of a histogram: chunks are small, and a damaged one must not ask for more.
const LIST_MAX: u64 = 100_000;

/// Appends the samples of a chunk to `points`.
///
/// # Errors
/// Damage, after which `points` may hold a part of the chunk.
pub fn decode(encoding: u8, data: &[u8], points: &mut Points) -> Result<()> {
    match encoding {
        1 => floats(data, &mut points.floats),
        2 => histograms(data, &mut points.histograms, Whole::default()),
        3 => histograms(data, &mut points.histograms, Fractional::default()),
        other => Err(Damage::new(format!("encoding {other} is unknown; 1, 2 and 3 are known"))),
    }
}

/// A double in a stream where each is XORed with the one before.
#[derive(Debug, Default, Clone, Copy)]
struct Xor {
    value: u64,
    leading: u32,
    trailing: u32,
}

impl Xor {
    fn starting(value: f64) -> Self {
        Self { value: value.to_bits(), ..Self::default() }
    }

    fn next(&mut self, bits: &mut Bits<'_>) -> Result<f64> {
        if bits.bit()? {
            if bits.bit()? {
                self.leading = bits.bits(5)? as u32;
                let significant = match bits.bits(6)? as u32 {
                    0 => 64,
                    n => n,
                };
                self.trailing = 64u32
                    .checked_sub(self.leading + significant)
                    .ok_or_else(|| Damage::new("holds a value of more than 64 bits"))?;
            }
            self.value ^= bits.bits(64 - self.leading - self.trailing)? << self.trailing;
        }
        Ok(f64::from_bits(self.value))
    }
}

/// A number in a stream of differences of differences.
#[derive(Debug, Default, Clone, Copy)]
struct Second {
    value: i64,
    delta: i64,
}

impl Second {
    fn starting(value: i64) -> Self {
        Self { value, delta: 0 }
    }

    fn add(&mut self, difference: i64) -> i64 {
        self.delta = self.delta.wrapping_add(difference);
        self.value = self.value.wrapping_add(self.delta);
        self.value
    }
}

fn floats(data: &[u8], out: &mut Vec<(i64, f64)>) -> Result<()> {
    let samples = Reader::new(data).u16()?;
    let mut bits = Bits::new(&data[2..]);
    let mut ts = Second::default();
    let mut value = Xor::default();
    for i in 0..samples {
        match i {
            0 => {
                ts = Second::starting(bits.signed_bytes()?);
                value = Xor::starting(bits.f64()?);
            }
            1 => {
                ts.add(bits.unsigned_bytes()? as i64);
                value.next(&mut bits)?;
            }
            _ => {
                let size = [0, 14, 17, 20, 64][bits.ones(4)? as usize];
                ts.add(if size == 0 { 0 } else { bits.signed(size)? });
                value.next(&mut bits)?;
            }
        }
        out.push((ts.value, f64::from_bits(value.value)));
    }
    Ok(())
}

/// Sizes of the numbers in histogram chunks, by how many ones stand before them.
const SIZES: [u32; 9] = [0, 3, 6, 9, 12, 18, 25, 56, 64];

fn signed(bits: &mut Bits<'_>) -> Result<i64> {
    match SIZES[bits.ones(8)? as usize] {
        0 => Ok(0),
        size => bits.signed(size),
    }
}

fn unsigned(bits: &mut Bits<'_>) -> Result<u64> {
    let size = SIZES[bits.ones(8)? as usize];
    bits.bits(size)
}

fn list_len(bits: &mut Bits<'_>) -> Result<u64> {
    let len = unsigned(bits)?;
    if len > LIST_MAX { Err(Damage::new(format!("holds a list of {len} entries"))) } else { Ok(len) }
}

/// The counts of one kind of histogram chunk.
trait Buckets {
    /// The counts of the first sample, given the numbers of buckets; the sum stands amid.
    fn first(&mut self, bits: &mut Bits<'_>, positive: usize, negative: usize) -> Result<f64>;

    /// The time's difference is read; reads what follows up to the sum.
    fn totals(&mut self, bits: &mut Bits<'_>) -> Result<()>;

    /// What follows the sum.
    fn buckets(&mut self, bits: &mut Bits<'_>) -> Result<()>;

    /// The counts as they are now.
    fn counts(&self) -> Counts;

    /// The counts of a sample that ends a series.
    fn stale(&self) -> Counts;
}

#[derive(Debug, Default)]
struct Whole {
    count: Second,
    zero: Second,
    positive: Vec<Second>,
    negative: Vec<Second>,
}

impl Buckets for Whole {
    fn first(&mut self, bits: &mut Bits<'_>, positive: usize, negative: usize) -> Result<f64> {
        self.count = Second::starting(unsigned(bits)? as i64);
        self.zero = Second::starting(unsigned(bits)? as i64);
        let sum = bits.f64()?;
        for (buckets, len) in [(&mut self.positive, positive), (&mut self.negative, negative)] {
            for _ in 0..len {
                buckets.push(Second::starting(signed(bits)?));
            }
        }
        Ok(sum)
    }

    fn totals(&mut self, bits: &mut Bits<'_>) -> Result<()> {
        self.count.add(signed(bits)?);
        self.zero.add(signed(bits)?);
        Ok(())
    }

    fn buckets(&mut self, bits: &mut Bits<'_>) -> Result<()> {
        for bucket in self.positive.iter_mut().chain(&mut self.negative) {
            bucket.add(signed(bits)?);
        }
        Ok(())
    }

    fn counts(&self) -> Counts {
        let values = |buckets: &[Second]| buckets.iter().map(|b| b.value).collect();
        Counts::Whole {
            count: self.count.value as u64,
            zero: self.zero.value as u64,
            positive: values(&self.positive),
            negative: values(&self.negative),
        }
    }

    fn stale(&self) -> Counts {
        Counts::default()
    }
}

#[derive(Debug, Default)]
struct Fractional {
    count: Xor,
    zero: Xor,
    positive: Vec<Xor>,
    negative: Vec<Xor>,
}

impl Buckets for Fractional {
    fn first(&mut self, bits: &mut Bits<'_>, positive: usize, negative: usize) -> Result<f64> {
        self.count = Xor::starting(bits.f64()?);
        self.zero = Xor::starting(bits.f64()?);
        let sum = bits.f64()?;
        for (buckets, len) in [(&mut self.positive, positive), (&mut self.negative, negative)] {
            for _ in 0..len {
                buckets.push(Xor::starting(bits.f64()?));
            }
        }
        Ok(sum)
    }

    fn totals(&mut self, bits: &mut Bits<'_>) -> Result<()> {
        self.count.next(bits)?;
        self.zero.next(bits)?;
        Ok(())
    }

    fn buckets(&mut self, bits: &mut Bits<'_>) -> Result<()> {
        for bucket in self.positive.iter_mut().chain(&mut self.negative) {
            bucket.next(bits)?;
        }
        Ok(())
    }

    fn counts(&self) -> Counts {
        let values = |buckets: &[Xor]| buckets.iter().map(|b| f64::from_bits(b.value)).collect();
        Counts::Fractional {
            count: f64::from_bits(self.count.value),
            zero: f64::from_bits(self.zero.value),
            positive: values(&self.positive),
            negative: values(&self.negative),
        }
    }

    fn stale(&self) -> Counts {
        Counts::Fractional { count: 0.0, zero: 0.0, positive: Vec::new(), negative: Vec::new() }
    }
}

fn histograms(data: &[u8], out: &mut Vec<Histogram>, mut buckets: impl Buckets) -> Result<()> {
    let mut header = Reader::new(data);
    let (samples, flags) = (header.u16()?, header.u8()?);
    let mut bits = Bits::new(header.rest());
    if samples == 0 {
        return Ok(());
    }
    let layout = layout(&mut bits)?;
    let len = |spans: &[Span]| spans.iter().map(|s| u64::from(s.length)).sum::<u64>();
    let (positive, negative) = (len(&layout.positive), len(&layout.negative));
    if positive + negative > LIST_MAX {
        return Err(Damage::new(format!("holds a histogram of {} buckets", positive + negative)));
    }
    let mut ts = Second::default();
    let mut sum = Xor::default();
    for i in 0..samples {
        if i == 0 {
            ts = Second::starting(signed(&mut bits)?);
            sum = Xor::starting(buckets.first(&mut bits, positive as usize, negative as usize)?);
        } else {
            ts.add(signed(&mut bits)?);
            buckets.totals(&mut bits)?;
            sum.next(&mut bits)?;
        }
        if sum.value == STALE {
            // The end of a series has no buckets, not even in the stream, where it is not first.
            let sum = f64::from_bits(STALE);
            out.push(Histogram { ts: ts.value, sum, counts: buckets.stale(), ..Histogram::default() });
            continue;
        }
        if i > 0 {
            buckets.buckets(&mut bits)?;
        }
        out.push(Histogram {
            ts: ts.value,
            sum: f64::from_bits(sum.value),
            counts: buckets.counts(),
            reset_hint: reset_hint(flags, i),
            ..layout.clone()
        });
    }
    Ok(())
}

/// What all histograms of a chunk have in common.
fn layout(bits: &mut Bits<'_>) -> Result<Histogram> {
    let zero_threshold = match bits.bits(8)? as i32 {
        0 => 0.0,
        255 => bits.f64()?,
        exponent => 2f64.powi(exponent - 244),
    };
    let schema = signed(bits)?;
    let schema = i32::try_from(schema).map_err(|_| Damage::new(format!("holds a histogram of schema {schema}")))?;
    let (positive, negative) = (spans(bits)?, spans(bits)?);
    let custom_values = if schema == CUSTOM { custom_values(bits)? } else { Vec::new() };
    Ok(Histogram { schema, zero_threshold, positive, negative, custom_values, ..Histogram::default() })
}

fn spans(bits: &mut Bits<'_>) -> Result<Vec<Span>> {
    let bad = || Damage::new("holds a span out of range");
    (0..list_len(bits)?)
        .map(|_| {
            let length = u32::try_from(unsigned(bits)?).map_err(|_| bad())?;
            let offset = i32::try_from(signed(bits)?).map_err(|_| bad())?;
            Ok(Span { offset, length })
        })
        .collect()
}

fn custom_values(bits: &mut Bits<'_>) -> Result<Vec<f64>> {
    (0..list_len(bits)?)
        .map(|_| match unsigned(bits)? {
            // A zero stands before a double; all else is one more than thousandths.
            0 => bits.f64(),
            thousandths => Ok((thousandths - 1) as f64 / 1000.0),
        })
        .collect()
}

/// What is known of a reset before the histogram at this place of a chunk.
fn reset_hint(flags: u8, at: u16) -> u8 {
    match (flags >> 6, at) {
        (0b11, _) => 3,
        (_, 1..) => 2,
        (0b10, 0) => 1,
        _ => 0,
    }
}

#[cfg(test)]
pub(super) mod tests;
