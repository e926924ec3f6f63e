//! Sealed blocks: up to 32 samples of one series, packed.
//!
//! A block is sorted by time without equal times, and decodes bit for bit, NaN payloads, -0 and infinities included.
//! Times are the first one, the smallest step, and what each step exceeds it by, bit-packed: nothing at all for a
//! regular scrape. Values are, whichever is the smallest: one constant; integers under a common power of ten, packed
//! against their minimum or against the smallest step between neighbours; the differing bits between neighbours; or
//! plain. Blocks live in memory only, so their layout is free to change.
//!
//! ```text
//! len u16 (of what follows), rows u8, kind u8 (bit 4: plain times), ts width u8, first ts i64,
//!   plain times: ts i64 x (rows - 1)
//!   else: step u32, if width > 0: last - first u32, (delta - step) packed x (rows - 1)
//! CONST: bits u64
//! OFFSET: scale u8, width u8, minimum, offset packed x rows
//! DELTA: scale u8, width u8, first, smallest delta, (delta - smallest) packed x (rows - 1)
//! XOR: width u8, trailing zeros u8, first bits u64, (xor >> zeros) packed x (rows - 1)
//! PLAIN: bits u64 x rows
//! ```
//! Whole numbers are a length byte and that many little-endian bytes, sign-extended.

/// Most samples in a block.
pub(super) const ROWS: usize = 32;
/// Bytes that must be readable behind the last block handed to [`decode`]: bits are taken from whole words.
pub(super) const PADDING: usize = 8;

const CONST: u8 = 0;
const OFFSET: u8 = 1;
const DELTA: u8 = 2;
const XOR: u8 = 3;
const PLAIN: u8 = 4;
const PLAIN_TIMES: u8 = 0x10;

/// Widest packed field: a field at any bit of a byte must lie within one 64-bit word.
const WIDTH_MAX: u32 = 56;
const SCALE_MAX: usize = 9;
pub(crate) const POW10: [f64; SCALE_MAX + 1] = [1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9];

/// Appends a block of 1 to [`ROWS`] samples, sorted by time without equal times.
pub(super) fn seal(ts: &[i64], values: &[f64], out: &mut Vec<u8>) {
    assert!(!ts.is_empty() && ts.len() <= ROWS && ts.len() == values.len(), "a block holds 1 to {ROWS} samples");
    let head = out.len();
    out.extend_from_slice(&[0, 0, ts.len() as u8, 0, 0]);
    out.extend_from_slice(&ts[0].to_le_bytes());
    let plain_times = seal_times(ts, head, out);
    let kind = seal_values(values, out);
    out[head + 3] = kind | plain_times;
    let len = (out.len() - head - 2) as u16;
    out[head..head + 2].copy_from_slice(&len.to_le_bytes());
}

fn seal_times(ts: &[i64], head: usize, out: &mut Vec<u8>) -> u8 {
    let n = ts.len();
    let span = ts[n - 1].wrapping_sub(ts[0]) as u64;
    if span > u64::from(u32::MAX) {
        for t in &ts[1..] {
            out.extend_from_slice(&t.to_le_bytes());
        }
        return PLAIN_TIMES;
    }
    let mut deltas = [0u64; ROWS];
    let (mut step, mut widest) = (u64::MAX, 0);
    for i in 1..n {
        let d = (ts[i] - ts[i - 1]) as u64;
        deltas[i - 1] = d;
        step = step.min(d);
        widest = widest.max(d);
    }
    if n == 1 {
        step = 0;
    }
    out.extend_from_slice(&(step as u32).to_le_bytes());
    let width = bits(widest.saturating_sub(step));
    out[head + 4] = width as u8;
    if width > 0 {
        out.extend_from_slice(&(span as u32).to_le_bytes());
        for d in &mut deltas[..n - 1] {
            *d -= step;
        }
        pack(&deltas[..n - 1], width, out);
    }
    0
}

fn seal_values(values: &[f64], out: &mut Vec<u8>) -> u8 {
    let first = values[0].to_bits();
    if values.iter().all(|v| v.to_bits() == first) {
        out.extend_from_slice(&first.to_le_bytes());
        return CONST;
    }
    let mut whole = [0i64; ROWS];
    if let Some(scale) = whole_numbers(values, &mut whole) {
        return seal_whole(&whole[..values.len()], scale, out);
    }
    let mut xors = [0u64; ROWS];
    let mut all = 0u64;
    for i in 1..values.len() {
        xors[i - 1] = values[i].to_bits() ^ values[i - 1].to_bits();
        all |= xors[i - 1];
    }
    let zeros = all.trailing_zeros();
    let width = bits(all >> zeros);
    if width > WIDTH_MAX {
        for v in values {
            out.extend_from_slice(&v.to_bits().to_le_bytes());
        }
        return PLAIN;
    }
    out.extend_from_slice(&[width as u8, zeros as u8]);
    out.extend_from_slice(&first.to_le_bytes());
    for x in &mut xors {
        *x >>= zeros;
    }
    pack(&xors[..values.len() - 1], width, out);
    XOR
}

fn seal_whole(whole: &[i64], scale: u8, out: &mut Vec<u8>) -> u8 {
    // All are below 2^53 in magnitude, so no difference overflows.
    let n = whole.len();
    let (mut min, mut max, mut min_delta, mut max_delta) = (whole[0], whole[0], i64::MAX, i64::MIN);
    for i in 1..n {
        min = min.min(whole[i]);
        max = max.max(whole[i]);
        min_delta = min_delta.min(whole[i] - whole[i - 1]);
        max_delta = max_delta.max(whole[i] - whole[i - 1]);
    }
    let offset_width = bits((max - min) as u64);
    let delta_width = bits((max_delta - min_delta) as u64);
    let mut fields = [0u64; ROWS];
    if offset_width <= delta_width + 1 {
        out.extend_from_slice(&[scale, offset_width as u8]);
        put_whole(min, out);
        for (f, w) in fields.iter_mut().zip(whole) {
            *f = (w - min) as u64;
        }
        pack(&fields[..n], offset_width, out);
        return OFFSET;
    }
    out.extend_from_slice(&[scale, delta_width as u8]);
    put_whole(whole[0], out);
    put_whole(min_delta, out);
    for i in 1..n {
        fields[i - 1] = (whole[i] - whole[i - 1] - min_delta) as u64;
    }
    pack(&fields[..n - 1], delta_width, out);
    DELTA
}

/// The smallest power of ten under which all values are whole numbers that give the same bits back.
fn whole_numbers(values: &[f64], whole: &mut [i64; ROWS]) -> Option<u8> {
    let mut scale = 0;
    for v in values {
        while whole_number(*v, scale).is_none() {
            scale += 1;
            if scale > SCALE_MAX {
                return None;
            }
        }
    }
    for (w, v) in whole.iter_mut().zip(values) {
        *w = whole_number(*v, scale)?;
    }
    Some(scale as u8)
}

/// `v * 10^scale` when it is a whole number below 2^53 in magnitude and division gives the same bits back.
pub(crate) fn whole_number(v: f64, scale: usize) -> Option<i64> {
    let scaled = v * POW10[scale];
    // A cast truncates and is far cheaper than a call of `round`; what it gets wrong fails the comparison.
    let whole = (scaled + 0.5f64.copysign(scaled)) as i64;
    let exact = whole.unsigned_abs() < 1 << 53 && (whole as f64 / POW10[scale]).to_bits() == v.to_bits();
    exact.then_some(whole)
}

fn bits(v: u64) -> u32 {
    64 - v.leading_zeros()
}

fn pack(fields: &[u64], width: u32, out: &mut Vec<u8>) {
    let (mut word, mut used) = (0u128, 0);
    for f in fields {
        word |= u128::from(*f) << used;
        used += width;
        while used >= 8 {
            out.push(word as u8);
            word >>= 8;
            used -= 8;
        }
    }
    if used > 0 {
        out.push(word as u8);
    }
}

fn put_whole(v: i64, out: &mut Vec<u8>) {
    let len = (65 - v.unsigned_abs().leading_zeros()).div_ceil(8) as usize;
    // Magnitudes stay below 2^54, so eight bytes always suffice.
    out.push(len as u8);
    out.extend_from_slice(&v.to_le_bytes()[..len]);
}

/// Decodes the block at the start of `bytes` when it may hold samples from `start_ms` to `end_ms` (inclusive), appends
/// those that lie within, and returns the length of the block. `bytes` must be readable for [`PADDING`] more bytes.
pub(super) fn decode(bytes: &[u8], start_ms: i64, end_ms: i64, ts: &mut Vec<i64>, values: &mut Vec<f64>) -> usize {
    let len = 2 + usize::from(u16::from_le_bytes([bytes[0], bytes[1]]));
    let n = usize::from(bytes[2]);
    let (kind, width) = (bytes[3], u32::from(bytes[4]));
    let first = i64::from_le_bytes(word(bytes, 5).to_le_bytes());
    if first > end_ms {
        return len;
    }
    let mut at = 13;
    let from = ts.len();
    if kind & PLAIN_TIMES != 0 {
        ts.push(first);
        ts.extend((0..n - 1).map(|i| word(bytes, at + 8 * i) as i64));
        at += 8 * (n - 1);
    } else {
        let step = i64::from(u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]));
        at += 4;
        if width == 0 {
            if first + step * (n as i64 - 1) < start_ms {
                return len;
            }
            ts.extend((0..n as i64).map(|i| first + step * i));
        } else {
            let span = u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
            at += 4;
            if first + i64::from(span) < start_ms {
                return len;
            }
            let mut fields = [0u64; ROWS];
            at += unpack(&bytes[at..], width, &mut fields[..n - 1]);
            let mut t = first;
            ts.push(t);
            ts.extend(fields[..n - 1].iter().map(|f| {
                t += step + *f as i64;
                t
            }));
        }
    }
    let from_value = values.len();
    decode_values(&bytes[at..], kind & 0x0f, n, values);
    if ts[from] < start_ms || ts[from + n - 1] > end_ms {
        let low = ts[from..].partition_point(|t| *t < start_ms);
        let high = ts[from..].partition_point(|t| *t <= end_ms);
        ts.truncate(from + high);
        ts.drain(from..from + low);
        values.truncate(from_value + high);
        values.drain(from_value..from_value + low);
    }
    len
}

fn decode_values(bytes: &[u8], kind: u8, n: usize, out: &mut Vec<f64>) {
    let mut fields = [0u64; ROWS];
    match kind {
        CONST => out.extend(std::iter::repeat_n(f64::from_bits(word(bytes, 0)), n)),
        OFFSET => {
            let (scale, width) = (usize::from(bytes[0]), u32::from(bytes[1]));
            let (min, at) = take_whole(bytes, 2);
            unpack(&bytes[at..], width, &mut fields[..n]);
            extend_scaled(fields[..n].iter().map(|f| min + *f as i64), scale, out);
        }
        DELTA => {
            let (scale, width) = (usize::from(bytes[0]), u32::from(bytes[1]));
            let (mut v, at) = take_whole(bytes, 2);
            let (step, at) = take_whole(bytes, at);
            unpack(&bytes[at..], width, &mut fields[1..n]);
            // The first adds nothing: its field undoes the step.
            fields[0] = step.wrapping_neg() as u64;
            extend_scaled(
                fields[..n].iter().map(|f| {
                    v = v.wrapping_add(step).wrapping_add(*f as i64);
                    v
                }),
                scale,
                out,
            );
        }
        XOR => {
            let (width, zeros) = (u32::from(bytes[0]), u32::from(bytes[1]));
            let mut v = word(bytes, 2);
            unpack(&bytes[10..], width, &mut fields[..n - 1]);
            out.push(f64::from_bits(v));
            out.extend(fields[..n - 1].iter().map(|f| {
                v ^= f << zeros;
                f64::from_bits(v)
            }));
        }
        _ => out.extend((0..n).map(|i| f64::from_bits(word(bytes, 8 * i)))),
    }
}

fn extend_scaled(whole: impl Iterator<Item = i64>, scale: usize, out: &mut Vec<f64>) {
    if scale == 0 {
        out.extend(whole.map(|w| w as f64));
    } else {
        let by = POW10[scale];
        out.extend(whole.map(|w| w as f64 / by));
    }
}

/// Returns the bytes that the fields take.
fn unpack(bytes: &[u8], width: u32, fields: &mut [u64]) -> usize {
    let mask = (1u64 << width) - 1;
    let mut bit = 0;
    for f in fields.iter_mut() {
        *f = (word(bytes, bit >> 3) >> (bit & 7)) & mask;
        bit += width as usize;
    }
    bit.div_ceil(8)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut w = [0; 8];
    w.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(w)
}

fn take_whole(bytes: &[u8], at: usize) -> (i64, usize) {
    let len = usize::from(bytes[at]);
    let shift = 64 - 8 * len as u32;
    (((word(bytes, at + 1) << shift) as i64) >> shift, at + 1 + len)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn round_trip(ts: &[i64], values: &[f64]) -> usize {
        let mut bytes = vec![];
        seal(ts, values, &mut bytes);
        let len = bytes.len();
        bytes.extend_from_slice(&[0xff; PADDING]);
        let (mut t, mut v) = (vec![7], vec![7.0]);
        assert_eq!(decode(&bytes, i64::MIN, i64::MAX, &mut t, &mut v), len);
        assert_eq!(&t[1..], ts);
        let bits = |v: &[f64]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&v[1..]), bits(values));
        len
    }

    #[test]
    fn decodes_to_the_same_bits() {
        let stale = f64::from_bits(0x7ff0_0000_0000_0002);
        let check = |values: &[f64], len: usize| {
            let ts: Vec<i64> = (0..values.len() as i64).map(|i| 1_700_000_000_000 + 15_000 * i).collect();
            assert_eq!(round_trip(&ts, values), len, "{values:?}");
        };
        check(&[1.5], 25);
        check(&[stale; 32], 25);
        check(&[-0.0, 0.0], 17 + 10 + 1);
        check(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 17 + 6);
        check(&[0.25, 0.5, 1e300], 41);
        check(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::MIN_POSITIVE, 5e-324], 17 + 40);
        check(&[1.01, 2.02, -3.03], 17 + 2 + 3 + 4);
        check(&[4_503_599_627_370_495.0, -4_503_599_627_370_495.0], 17 + 2 + 8 + 8);
        check(&[9_007_199_254_740_992.0, 1.0], 17 + 10 + 2);
        check(&[0.1 + 0.2, 0.3], 17 + 10 + 1);
    }

    #[test]
    fn decodes_any_times() {
        let check = |ts: &[i64]| {
            round_trip(ts, &vec![1.0; ts.len()]);
        };
        check(&[i64::MIN, 0, i64::MAX]);
        check(&[0, 1, 2, 10, 11]);
        check(&[-5, -4, 4_294_967_290]);
        check(&[-5, -4, 4_294_967_291]);
        check(&[i64::MAX]);
    }

    #[test]
    fn keeps_to_the_range() {
        let ts: Vec<i64> = (0..10).map(|i| i * 10 + i % 3).collect();
        let values: Vec<f64> = (0..10).map(f64::from).collect();
        let mut bytes = vec![];
        seal(&ts, &values, &mut bytes);
        bytes.extend_from_slice(&[0; PADDING]);
        for start in -3..110 {
            for end in start..110 {
                let (mut t, mut v) = (vec![], vec![]);
                decode(&bytes, start, end, &mut t, &mut v);
                let want: Vec<i64> = ts.iter().copied().filter(|t| (start..=end).contains(t)).collect();
                assert_eq!(t, want);
                assert_eq!(v.len(), want.len());
            }
        }
    }

    fn any_value() -> impl Strategy<Value = f64> {
        prop_oneof![
            any::<u64>().prop_map(f64::from_bits),
            any::<i32>().prop_map(f64::from),
            (any::<i32>(), 0usize..10).prop_map(|(v, s)| f64::from(v) / POW10[s]),
            (0u8..3).prop_map(f64::from),
        ]
    }

    proptest! {
        #[test]
        fn any_block_round_trips(
            first in -(1i64 << 60)..1 << 60,
            steps in prop_oneof![
                proptest::collection::vec(1i64..20_000, 0..ROWS),
                proptest::collection::vec(1i64..1 << 40, 0..ROWS),
            ],
            values in prop_oneof![
                proptest::collection::vec(any_value(), ROWS),
                proptest::collection::vec(any::<i32>().prop_map(f64::from), ROWS),
                proptest::collection::vec((0i32..5000).prop_map(|v| f64::from(v) / 100.0), ROWS),
            ],
        ) {
            let mut ts = vec![first];
            for s in steps {
                ts.push(ts[ts.len() - 1] + s);
            }
            round_trip(&ts, &values[..ts.len()]);
        }
    }
}
