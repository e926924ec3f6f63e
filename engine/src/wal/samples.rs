//! Float samples in log records: columns that lean on what the segment said before.
//!
//! ```text
//! rows u32, sum u64, reset u8,
//! ref: zigzag varint of the difference to the previous row's, x rows
//! ts: zigzag varint of the difference to the previous row's, x rows
//! control u8 x rows, payloads
//! ```
//! A value leans on the last value of its series in the segment, at first 0.0. Its control says how:
//!
//! - 0: the same bits;
//! - `8 * scale + n` (scale 0..=4, n 1..=7): both are whole numbers under `10^scale`; the payload is the zigzag of
//!   their difference in n little-endian bytes;
//! - `0x80 | leading << 3 | trailing`: the payload is the differing bytes of both, without so many leading and trailing
//!   zero bytes.
//!
//! Since a lost record would silently change the values after it, `sum` is over the decoded values, and every few
//! megabytes a record says `reset`: from here all series lean on 0.0 again.

use catalog::{Error, Result};

use super::bytes::{Bytes, put_varint, unzigzag, zigzag};
use crate::memtable::{POW10, whole_number};

const SCALE_MAX: usize = 4;
const XOR: u8 = 0x80;

/// The last value of each series in the segment, as bits.
#[derive(Debug, Default)]
pub(super) struct Chain {
    last: Vec<u64>,
    controls: Vec<u8>,
    payloads: Vec<u8>,
}

/// Decoded columns.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Columns {
    pub refs: Vec<u32>,
    pub ts: Vec<i64>,
    pub values: Vec<f64>,
}

impl Chain {
    pub(super) fn reset(&mut self) {
        self.last.clear();
    }

    /// Appends samples; `refs` are indexes into `references`, and the segment's reference is what is written.
    pub(super) fn encode(
        &mut self,
        references: &[u32],
        refs: &[u32],
        ts: &[i64],
        values: &[f64],
        reset: bool,
        out: &mut Vec<u8>,
    ) {
        out.extend_from_slice(&(refs.len() as u32).to_le_bytes());
        let sum_at = out.len();
        out.extend_from_slice(&[0; 8]);
        out.push(u8::from(reset));
        let mut last = 0i64;
        for r in refs {
            let reference = i64::from(references[*r as usize]);
            put_varint(zigzag(reference - last), out);
            last = reference;
        }
        let mut last = 0i64;
        for t in ts {
            put_varint(zigzag(t.wrapping_sub(last)), out);
            last = *t;
        }
        if let Some(max) = references.iter().max().filter(|m| **m as usize >= self.last.len()) {
            self.last.resize(*max as usize + 1, 0);
        }
        self.controls.clear();
        self.payloads.clear();
        // Every payload is written as a whole word and then cut: a copy of a varying length costs several times more.
        self.payloads.resize(values.len() * 8 + 8, 0);
        let (mut at, mut sum) = (0, 0);
        for (r, v) in refs.iter().zip(values) {
            let last = &mut self.last[references[*r as usize] as usize];
            let bits = v.to_bits();
            let (control, word, len) = difference(bits, *last);
            *last = bits;
            sum = add(sum, bits);
            self.controls.push(control);
            self.payloads[at..at + 8].copy_from_slice(&word.to_le_bytes());
            at += len;
        }
        out[sum_at..sum_at + 8].copy_from_slice(&sum.to_le_bytes());
        out.extend_from_slice(&self.controls);
        out.extend_from_slice(&self.payloads[..at]);
    }

    /// Decodes samples; `known` tells whether a reference was defined in the segment.
    pub(super) fn decode(&mut self, bytes: &mut Bytes<'_>, known: impl Fn(u32) -> bool) -> Result<Columns> {
        let rows = bytes.u32()? as usize;
        let sum = bytes.u64()?;
        if bytes.u8()? != 0 {
            self.reset();
        }
        if rows > bytes.0.len() {
            return Err(Error::corrupt(format!("log record of {} bytes names {rows} samples", bytes.0.len())));
        }
        let mut out = Columns::default();
        out.refs.reserve_exact(rows);
        let mut last = 0i64;
        for _ in 0..rows {
            last = last.wrapping_add(unzigzag(bytes.varint()?));
            let r = u32::try_from(last).ok().filter(|r| known(*r));
            out.refs.push(r.ok_or_else(|| {
                Error::corrupt(format!("log record refers to tag set {last}, whose definition is lost"))
            })?);
        }
        out.ts.reserve_exact(rows);
        let mut last = 0i64;
        for _ in 0..rows {
            last = last.wrapping_add(unzigzag(bytes.varint()?));
            out.ts.push(last);
        }
        if let Some(max) = out.refs.iter().max().filter(|m| **m as usize >= self.last.len()) {
            self.last.resize(*max as usize + 1, 0);
        }
        out.values.reserve_exact(rows);
        let controls = bytes.take(rows)?;
        let mut actual = 0;
        for (r, control) in out.refs.iter().zip(controls) {
            let last = &mut self.last[*r as usize];
            let bits = apply(*last, *control, bytes)?;
            *last = bits;
            actual = add(actual, bits);
            out.values.push(f64::from_bits(bits));
        }
        if actual != sum {
            return Err(Error::corrupt("values of a log record lean on a record that is lost"));
        }
        Ok(out)
    }
}

fn add(sum: u64, bits: u64) -> u64 {
    (sum.rotate_left(5) ^ bits).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Control, payload and the payload's length.
fn difference(bits: u64, last: u64) -> (u8, u64, usize) {
    let xor = bits ^ last;
    if xor == 0 {
        return (0, 0, 0);
    }
    let (v, l) = (f64::from_bits(bits), f64::from_bits(last));
    for scale in 0..=SCALE_MAX {
        if let Some(v) = whole_number(v, scale)
            && let Some(l) = whole_number(l, scale)
        {
            let word = zigzag(v - l);
            let len = (64 - word.leading_zeros()).div_ceil(8) as usize;
            return (8 * scale as u8 + len as u8, word, len);
        }
    }
    let (leading, trailing) = (xor.leading_zeros() / 8, xor.trailing_zeros() / 8);
    (XOR | (leading << 3 | trailing) as u8, xor >> (8 * trailing), (8 - leading - trailing) as usize)
}

fn apply(last: u64, control: u8, bytes: &mut Bytes<'_>) -> Result<u64> {
    if control == 0 {
        return Ok(last);
    }
    let unknown = || Error::corrupt(format!("log record holds the unknown value control {control:#04x}"));
    let mut word = |len: usize| {
        let mut out = [0; 8];
        out[..len].copy_from_slice(bytes.take(len)?);
        Ok::<_, Error>(u64::from_le_bytes(out))
    };
    if control & XOR != 0 {
        let (leading, trailing) = (usize::from(control >> 3 & 7), usize::from(control & 7));
        let len = 8usize.checked_sub(leading + trailing).ok_or_else(unknown)?;
        return Ok(last ^ word(len)? << (8 * trailing));
    }
    let (scale, len) = (usize::from(control >> 3), usize::from(control & 7));
    if scale > SCALE_MAX {
        return Err(unknown());
    }
    let l = whole_number(f64::from_bits(last), scale)
        .ok_or_else(|| Error::corrupt("a value of a log record leans on a record that is lost"))?;
    let v = l.wrapping_add(unzigzag(word(len)?));
    Ok((v as f64 / POW10[scale]).to_bits())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bits(values: &[f64]) -> Vec<u64> {
        values.iter().map(|v| v.to_bits()).collect()
    }

    fn round_trip(requests: &[Vec<(u32, i64, f64)>], ordinals: &[u32]) -> usize {
        let (mut writer, mut reader) = (Chain::default(), Chain::default());
        let mut len = 0;
        for (i, rows) in requests.iter().enumerate() {
            let refs: Vec<u32> = rows.iter().map(|r| r.0).collect();
            let ts: Vec<i64> = rows.iter().map(|r| r.1).collect();
            let values: Vec<f64> = rows.iter().map(|r| r.2).collect();
            let mut out = vec![];
            if i % 3 == 2 {
                writer.reset();
            }
            writer.encode(ordinals, &refs, &ts, &values, i % 3 == 2, &mut out);
            len = out.len();
            let mut rest = Bytes(&out);
            let back = reader.decode(&mut rest, |_| true).unwrap();
            assert!(rest.is_empty());
            assert_eq!(back.refs, refs.iter().map(|r| ordinals[*r as usize]).collect::<Vec<_>>());
            assert_eq!(back.ts, ts);
            assert_eq!(bits(&back.values), bits(&values));
        }
        len
    }

    #[test]
    fn a_value_after_another() {
        let check = |last: f64, v: f64, payload: usize| {
            let len = round_trip(&[vec![(0, 0, last)], vec![(0, 0, v)]], &[0]);
            assert_eq!(len - 16, payload, "{v} after {last}");
        };
        check(5.0, 5.0, 0);
        check(5.0, 6.0, 1);
        check(1e12, 1e12 + 15_000.0, 2);
        check(0.25, 0.5, 1);
        check(17.31, 17.29, 1);
        check(0.0, -0.0, 1);
        check(1.0, f64::from_bits(0x7ff0_0000_0000_0002), 8);
        check(f64::NAN, f64::NAN, 0);
        check(0.1, 0.1 + 1e-16, 1);
        check(f64::INFINITY, f64::NEG_INFINITY, 1);
    }

    #[test]
    fn a_lost_record_is_noticed() {
        let mut writer = Chain::default();
        let mut records = vec![];
        for v in [1.0, 2.0, 2.0] {
            let mut out = vec![];
            writer.encode(&[0], &[0], &[0], &[v], false, &mut out);
            records.push(out);
        }
        let mut reader = Chain::default();
        reader.decode(&mut Bytes(&records[0]), |_| true).unwrap();
        assert!(reader.decode(&mut Bytes(&records[2]), |_| true).is_err());
        assert!(Chain::default().decode(&mut Bytes(&records[0]), |_| false).is_err());
    }

    proptest! {
        #[test]
        fn any_samples(requests in proptest::collection::vec(proptest::collection::vec((
            0u32..3,
            any::<i64>(),
            prop_oneof![
                any::<u64>().prop_map(f64::from_bits),
                any::<i32>().prop_map(f64::from),
                any::<i16>().prop_map(|v| f64::from(v) / 100.0),
            ]), 0..30), 0..8)) {
            round_trip(&requests, &[7, 0, 300]);
        }

        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Chain::default().decode(&mut Bytes(&bytes), |r| r < 1000);
        }
    }
}
