//! The form in which histograms travel in batches, without the start of the counter: fixed fields, then indices, counts and custom bounds, little-endian.

use super::{Bucket, FloatHistogram, Hint};

/// Bytes of the fields before the lists: hint, schema, two numbers of buckets and one of bounds, four floats.
const HEAD: usize = 1 + 4 + 3 * 4 + 4 * 8;

impl FloatHistogram {
    /// Appends it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let buckets = self.positive.len() + self.negative.len();
        out.reserve(HEAD + 12 * buckets + 8 * self.custom.len());
        out.push(self.hint as u8);
        out.extend_from_slice(&self.schema.to_le_bytes());
        for n in [self.positive.len(), self.negative.len(), self.custom.len()] {
            out.extend_from_slice(&(n as u32).to_le_bytes());
        }
        for v in [self.zero_threshold, self.zero_count, self.count, self.sum] {
            out.extend_from_slice(&v.to_le_bytes());
        }
        let all = || self.positive.iter().chain(&self.negative);
        all().for_each(|b| out.extend_from_slice(&b.index.to_le_bytes()));
        all().for_each(|b| out.extend_from_slice(&b.count.to_le_bytes()));
        self.custom.iter().for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
    }
}

/// Reads what [`FloatHistogram::encode`] wrote; `None` when it is something else.
pub fn decode(bytes: &[u8]) -> Option<FloatHistogram> {
    let mut c = bytes;
    let hint = Hint::of(take::<1>(&mut c)?[0] as i8);
    let schema = i32::from_le_bytes(take(&mut c)?);
    let mut length = || take(&mut c).map(|b| u32::from_le_bytes(b) as usize);
    let (positive, negative, custom) = (length()?, length()?, length()?);
    let mut float = || take(&mut c).map(f64::from_le_bytes);
    let (zero_threshold, zero_count, count, sum) = (float()?, float()?, float()?, float()?);
    let buckets = positive.checked_add(negative)?;
    let expected = buckets.checked_mul(12)?.checked_add(custom.checked_mul(8)?)?;
    if c.len() != expected {
        return None;
    }
    let (indices, c) = c.split_at(4 * buckets);
    let (counts, bounds) = c.split_at(8 * buckets);
    let (indices, _) = indices.as_chunks::<4>();
    let (counts, _) = counts.as_chunks::<8>();
    let pairs = indices.iter().zip(counts);
    let mut all = pairs.map(|(i, c)| Bucket { index: i32::from_le_bytes(*i), count: f64::from_le_bytes(*c) });
    let positive = all.by_ref().take(positive).collect();
    let negative = all.collect();
    let custom = bounds.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
    Some(FloatHistogram { hint, start: 0, schema, zero_threshold, zero_count, count, sum, positive, negative, custom })
}

fn take<const N: usize>(from: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = from.split_first_chunk::<N>()?;
    *from = rest;
    Some(*head)
}
