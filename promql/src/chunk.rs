//! Chunks as Prometheus stores and streams them: samples of one series as a stream of bits.
//!
//! Three encodings hold floats (1), histograms with whole counts (2) and histograms with fractional counts (3), as
//! `tsdb/docs/format/chunks.md` of Prometheus describes them. Times, counts and buckets are differences of differences,
//! doubles are XORed with the one before. A chunk of histograms begins anew where their buckets lie elsewhere and where a
//! counter was reset, because its header speaks for all of them.

/// The schema of histograms with bounds of their own.
pub const CUSTOM: i32 = -53;
/// The bits of the value by which Prometheus says that a series has ended.
pub const STALE: u64 = 0x7ff0_0000_0000_0002;
/// Most samples of a chunk, as in Prometheus.
const SAMPLES_MAX: usize = 120;

/// What a series holds.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Points {
    /// Times in milliseconds and values.
    pub floats: Vec<(i64, f64)>,
    /// Native histograms.
    pub histograms: Vec<Histogram>,
}

impl Points {
    /// Samples of both kinds.
    pub fn len(&self) -> usize {
        self.floats.len() + self.histograms.len()
    }

    /// True without any sample.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Samples and histograms, to come back to with [`Points::truncate`].
    pub fn mark(&self) -> (usize, usize) {
        (self.floats.len(), self.histograms.len())
    }

    /// Drops what was appended since.
    pub fn truncate(&mut self, mark: (usize, usize)) {
        self.floats.truncate(mark.0);
        self.histograms.truncate(mark.1);
    }

    /// Keeps samples whose time satisfies `keep`.
    pub fn retain(&mut self, keep: impl Fn(i64) -> bool) {
        self.floats.retain(|(ts, _)| keep(*ts));
        self.histograms.retain(|h| keep(h.ts));
    }
}

/// A run of buckets: the gap to the run before, or the index of the first, and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Buckets that are left out before it.
    pub offset: i32,
    /// Buckets in it.
    pub length: u32,
}

/// A native histogram.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Histogram {
    /// Milliseconds since the epoch.
    pub ts: i64,
    /// The resolution, or [`CUSTOM`] for bounds of its own.
    pub schema: i32,
    /// The width of the zero bucket.
    pub zero_threshold: f64,
    /// Sum of all observations.
    pub sum: f64,
    /// Counts.
    pub counts: Counts,
    /// Where the positive buckets are.
    pub positive: Vec<Span>,
    /// Where the negative buckets are.
    pub negative: Vec<Span>,
    /// Upper bounds of schema [`CUSTOM`].
    pub custom_values: Vec<f64>,
    /// 0 unknown, 1 reset, 2 no reset, 3 gauge.
    pub reset_hint: u8,
}

/// The counts of a histogram.
#[derive(Debug, Clone, PartialEq)]
pub enum Counts {
    /// Whole counts; each bucket as the difference to the one before.
    Whole {
        /// All observations.
        count: u64,
        /// Those in the zero bucket.
        zero: u64,
        /// Positive buckets.
        positive: Vec<i64>,
        /// Negative buckets.
        negative: Vec<i64>,
    },
    /// Fractional counts; each bucket as it is.
    Fractional {
        /// All observations.
        count: f64,
        /// Those in the zero bucket.
        zero: f64,
        /// Positive buckets.
        positive: Vec<f64>,
        /// Negative buckets.
        negative: Vec<f64>,
    },
}

impl Default for Counts {
    fn default() -> Self {
        Self::Whole { count: 0, zero: 0, positive: Vec::new(), negative: Vec::new() }
    }
}

impl Counts {
    /// True when any count is lower than in `before`, whose buckets lie at the same places.
    fn fell(&self, before: &Self) -> bool {
        match (self, before) {
            (
                Self::Whole { count, zero, positive, negative },
                Self::Whole { count: c, zero: z, positive: p, negative: n },
            ) => count < c || zero < z || fell(positive, p) || fell(negative, n),
            (
                Self::Fractional { count, zero, positive, negative },
                Self::Fractional { count: c, zero: z, positive: p, negative: n },
            ) => {
                let lower = |now: &[f64], before: &[f64]| now.iter().zip(before).any(|(now, before)| now < before);
                count < c || zero < z || lower(positive, p) || lower(negative, n)
            }
            _ => true,
        }
    }
}

/// The same of differences of whole counts.
fn fell(now: &[i64], before: &[i64]) -> bool {
    let (mut a, mut b) = (0i64, 0i64);
    now.iter().zip(before).any(|(now, before)| {
        (a, b) = (a.wrapping_add(*now), b.wrapping_add(*before));
        a < b
    })
}

impl Histogram {
    /// Whether it marks the end of its series.
    fn is_stale(&self) -> bool {
        self.sum.to_bits() == STALE
    }

    /// Whether both can be in one chunk, apart from resets.
    fn is_laid_out_as(&self, other: &Self) -> bool {
        let bits = |values: &[f64]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        self.schema == other.schema
            && self.zero_threshold.to_bits() == other.zero_threshold.to_bits()
            && self.positive == other.positive
            && self.negative == other.negative
            && bits(&self.custom_values) == bits(&other.custom_values)
            && matches!(self.counts, Counts::Whole { .. }) == matches!(other.counts, Counts::Whole { .. })
            && (self.reset_hint == GAUGE) == (other.reset_hint == GAUGE)
            && self.is_stale() == other.is_stale()
    }
}

/// A [`Histogram::reset_hint`].
const RESET: u8 = 1;
const GAUGE: u8 = 3;

/// A chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// 1 for floats, 2 and 3 for histograms with whole and with fractional counts.
    pub encoding: u8,
    /// The time of its first sample.
    pub first_ms: i64,
    /// The time of its last sample.
    pub last_ms: i64,
    /// Its bytes.
    pub data: Vec<u8>,
}

/// The chunks of samples, the earliest first.
pub fn encode(points: &Points) -> Vec<Chunk> {
    let Points { floats, histograms } = points;
    let (mut floats, mut histograms) = (floats.as_slice(), histograms.as_slice());
    let mut out = Vec::new();
    while !floats.is_empty() || !histograms.is_empty() {
        let until = histograms.first().map_or(i64::MAX, |h| h.ts);
        let (now, later) = floats.split_at(floats.partition_point(|(ts, _)| *ts <= until));
        out.extend(now.chunks(SAMPLES_MAX).map(encode_floats));
        floats = later;
        let until = floats.first().map_or(i64::MAX, |(ts, _)| *ts);
        while histograms.first().is_some_and(|h| h.ts <= until) {
            let count = alike(histograms, until);
            let (now, later) = histograms.split_at(count);
            out.push(encode_histograms(now));
            histograms = later;
        }
    }
    out
}

fn encode_floats(samples: &[(i64, f64)]) -> Chunk {
    let mut w = Bits::default();
    w.bits(samples.len() as u64, 16);
    let mut value = Xor::default();
    let (mut last, mut delta) = (0i64, 0i64);
    for (i, (ts, v)) in samples.iter().enumerate() {
        let new_delta = ts.wrapping_sub(last);
        match i {
            0 => w.signed_bytes(*ts),
            1 => w.unsigned_bytes(new_delta as u64),
            _ => w.sized(new_delta.wrapping_sub(delta), &[0, 14, 17, 20, 64]),
        }
        value.write(*v, &mut w);
        // The first time is no difference.
        delta = if i == 0 { 0 } else { new_delta };
        last = *ts;
    }
    Chunk { encoding: 1, first_ms: samples.first().map_or(0, |s| s.0), last_ms: last, data: w.bytes }
}

/// How many of the first histograms, up to a time, one chunk can hold: at least one.
fn alike(histograms: &[Histogram], until: i64) -> usize {
    let follows = |pair: &[Histogram]| match pair {
        [before, now] => {
            let reset = now.reset_hint == RESET || (now.reset_hint != GAUGE && now.counts.fell(&before.counts));
            now.ts <= until && now.is_laid_out_as(before) && (now.is_stale() || !reset)
        }
        _ => false,
    };
    let most = histograms.len().min(SAMPLES_MAX);
    1 + histograms[..most].windows(2).take_while(|pair| follows(pair)).count()
}

/// The chunk of histograms that are alike.
fn encode_histograms(histograms: &[Histogram]) -> Chunk {
    let Some((first, last)) = histograms.first().zip(histograms.last()) else {
        return Chunk { encoding: 2, first_ms: 0, last_ms: 0, data: Vec::new() };
    };
    let mut w = Bits::default();
    w.bits(histograms.len() as u64, 16);
    // What is not known of a reset is no reset within a chunk, for falling counts begin another one.
    w.bits([0b00, 0b10, 0b01, 0b11][usize::from(first.reset_hint & 3)] << 6, 8);
    let empty = Histogram::default();
    // The end of a series has no buckets.
    w.layout(if first.is_stale() { &empty } else { first });
    let whole = matches!(first.counts, Counts::Whole { .. });
    let (mut ts, mut count, mut zero) = (Second::default(), Second::default(), Second::default());
    let (mut real_count, mut real_zero, mut sum) = (Xor::default(), Xor::default(), Xor::default());
    let (mut seconds, mut xors): (Vec<Second>, Vec<Xor>) = (Vec::new(), Vec::new());
    for (i, h) in histograms.iter().enumerate() {
        w.signed(ts.next(h.ts));
        match &h.counts {
            Counts::Whole { count: c, zero: z, .. } => {
                let (c, z) = if h.is_stale() { (0, 0) } else { (*c, *z) };
                let (c, z) = (count.next(c as i64), zero.next(z as i64));
                if i == 0 {
                    w.unsigned(c as u64);
                    w.unsigned(z as u64);
                } else {
                    w.signed(c);
                    w.signed(z);
                }
            }
            Counts::Fractional { count: c, zero: z, .. } => {
                let (c, z) = if h.is_stale() { (0.0, 0.0) } else { (*c, *z) };
                real_count.write(c, &mut w);
                real_zero.write(z, &mut w);
            }
        }
        sum.write(h.sum, &mut w);
        if h.is_stale() {
            continue;
        }
        match &h.counts {
            Counts::Whole { positive, negative, .. } => {
                seconds.resize(positive.len() + negative.len(), Second::default());
                for (state, v) in seconds.iter_mut().zip(positive.iter().chain(negative)) {
                    w.signed(state.next(*v));
                }
            }
            Counts::Fractional { positive, negative, .. } => {
                xors.resize(positive.len() + negative.len(), Xor::default());
                for (state, v) in xors.iter_mut().zip(positive.iter().chain(negative)) {
                    state.write(*v, &mut w);
                }
            }
        }
    }
    Chunk { encoding: if whole { 2 } else { 3 }, first_ms: first.ts, last_ms: last.ts, data: w.bytes }
}

/// A number in a stream of differences of differences.
#[derive(Debug, Default, Clone, Copy)]
struct Second {
    value: i64,
    delta: i64,
    any: bool,
}

impl Second {
    /// What to write for the next value: the first itself.
    fn next(&mut self, v: i64) -> i64 {
        let delta = v.wrapping_sub(self.value);
        let out = delta.wrapping_sub(self.delta);
        (self.value, self.delta) = (v, if self.any { delta } else { 0 });
        self.any = true;
        out
    }
}

/// A double in a stream where each is XORed with the one before.
#[derive(Debug, Default, Clone, Copy)]
struct Xor {
    value: Option<u64>,
    /// Leading and trailing zeros of the last difference that was written with them.
    zeros: Option<(u32, u32)>,
}

impl Xor {
    fn write(&mut self, v: f64, w: &mut Bits) {
        let Some(before) = self.value.replace(v.to_bits()) else { return w.bits(v.to_bits(), 64) };
        let x = before ^ v.to_bits();
        if x == 0 {
            return w.bits(0, 1);
        }
        // Five bits hold the leading zeros.
        let (leading, trailing) = (x.leading_zeros().min(31), x.trailing_zeros());
        match self.zeros {
            Some((l, t)) if leading >= l && trailing >= t => {
                w.bits(0b10, 2);
                w.bits(x >> t, 64 - l - t);
            }
            _ => {
                let significant = 64 - leading - trailing;
                self.zeros = Some((leading, trailing));
                w.bits(0b11, 2);
                w.bits(u64::from(leading), 5);
                // 64 is written as 0, which no difference has.
                w.bits(u64::from(significant), 6);
                w.bits(x >> trailing, significant);
            }
        }
    }
}

/// Sizes of the numbers in chunks of histograms; as many ones stand before a number as its size's place here.
const SIZES: [u32; 9] = [0, 3, 6, 9, 12, 18, 25, 56, 64];

/// Bits, the highest of each byte first.
#[derive(Debug, Default)]
struct Bits {
    bytes: Vec<u8>,
    /// Of the last byte.
    free: u32,
}

impl Bits {
    /// The lowest `count` bits of a number.
    fn bits(&mut self, v: u64, count: u32) {
        let mut left = count;
        while left > 0 {
            if self.free == 0 {
                self.bytes.push(0);
                self.free = 8;
            }
            let take = left.min(self.free);
            let part = (v >> (left - take)) as u8 & (0xff >> (8 - take));
            if let Some(last) = self.bytes.last_mut() {
                *last |= part << (self.free - take);
            }
            self.free -= take;
            left -= take;
        }
    }

    /// A number of 7 bits a byte, lowest first.
    fn unsigned_bytes(&mut self, mut v: u64) {
        while v >= 0x80 {
            self.bits(v | 0x80, 8);
            v >>= 7;
        }
        self.bits(v, 8);
    }

    fn signed_bytes(&mut self, v: i64) {
        self.unsigned_bytes((v << 1 ^ v >> 63) as u64);
    }

    /// As many ones as the place of the number's size, a zero unless it is the last place, and the number.
    fn placed(&mut self, v: u64, place: usize, sizes: &[u32]) {
        let last = place + 1 == sizes.len();
        let place_bits = place as u32 + u32::from(!last);
        self.bits(if last { u64::MAX } else { u64::MAX << 1 }, place_bits);
        self.bits(v, sizes[place]);
    }

    /// A signed number in the smallest of the sizes that holds it.
    fn sized(&mut self, v: i64, sizes: &[u32]) {
        let fits = |size: u32| match size {
            0 => v == 0,
            64 => true,
            size => (-(1 << (size - 1)) + 1..=1 << (size - 1)).contains(&v),
        };
        let place = sizes.iter().position(|size| fits(*size)).unwrap_or(sizes.len() - 1);
        self.placed(v as u64, place, sizes);
    }

    fn signed(&mut self, v: i64) {
        self.sized(v, &SIZES);
    }

    fn unsigned(&mut self, v: u64) {
        let place = SIZES.iter().position(|size| *size == 64 || v >> size == 0).unwrap_or(SIZES.len() - 1);
        self.placed(v, place, &SIZES);
    }

    /// What all histograms of a chunk have in common.
    fn layout(&mut self, h: &Histogram) {
        match power_of_two(h.zero_threshold) {
            _ if h.zero_threshold.to_bits() == 0 => self.bits(0, 8),
            Some(exponent) => self.bits(exponent, 8),
            None => {
                self.bits(255, 8);
                self.bits(h.zero_threshold.to_bits(), 64);
            }
        }
        self.signed(i64::from(h.schema));
        for spans in [&h.positive, &h.negative] {
            self.unsigned(spans.len() as u64);
            for span in spans {
                self.unsigned(u64::from(span.length));
                self.signed(i64::from(span.offset));
            }
        }
        if h.schema != CUSTOM {
            return;
        }
        self.unsigned(h.custom_values.len() as u64);
        for bound in &h.custom_values {
            let thousandths = (bound * 1000.0).round();
            // One more than thousandths, as far as four bytes hold them; else a zero and a double.
            if (0.0..=33_554_430.0).contains(&thousandths) && (thousandths / 1000.0).to_bits() == bound.to_bits() {
                self.unsigned(thousandths as u64 + 1);
            } else {
                self.unsigned(0);
                self.bits(bound.to_bits(), 64);
            }
        }
    }
}

/// The byte that stands for a zero threshold that is a power of two from 2^-243 to 2^10.
fn power_of_two(v: f64) -> Option<u64> {
    let (exponent, fraction) = (v.to_bits() >> 52, v.to_bits() & ((1 << 52) - 1));
    // A sign would make the exponent too large.
    (fraction == 0 && (1023 - 243..=1023 + 10).contains(&exponent)).then(|| exponent + 244 - 1023)
}

/// The table of CRC-32C, the polynomial of Castagnoli with its bits reversed.
const CASTAGNOLI: [u32; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut crc = i as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[i] = crc;
        i += 1;
    }
    table
};

/// CRC-32C, the checksum of Prometheus's files and frames.
pub fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, b| crc >> 8 ^ CASTAGNOLI[usize::from(crc as u8 ^ b)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums() {
        assert_eq!(crc32c(b""), 0);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn zero_thresholds() {
        let check = |v: f64, expected: Option<u64>| assert_eq!(power_of_two(v), expected, "{v}");
        check(1.0, Some(244));
        check(2f64.powi(-128), Some(116));
        check(2f64.powi(-243), Some(1));
        check(2f64.powi(-244), None);
        check(2f64.powi(10), Some(254));
        check(2f64.powi(11), None);
        check(0.001, None);
        check(-1.0, None);
    }

    /// The encodings and numbers of samples of chunks.
    fn shape(points: &Points) -> Vec<(u8, u16, u8)> {
        let of = |c: &Chunk| (c.encoding, u16::from_be_bytes([c.data[0], c.data[1]]), c.data[2] >> 6);
        encode(points).iter().map(of).collect()
    }

    #[test]
    fn chunks_begin_where_layouts_change_and_counters_are_reset() {
        let whole = |ts: i64, count: u64, reset_hint: u8| Histogram {
            ts,
            positive: vec![Span { offset: 0, length: 1 }],
            counts: Counts::Whole { count, zero: 0, positive: vec![count as i64], negative: vec![] },
            reset_hint,
            ..Histogram::default()
        };
        let check = |histograms: &[Histogram], floats: &[i64], expected: &[(u8, u16, u8)]| {
            let floats = floats.iter().map(|ts| (*ts, 1.0)).collect();
            let mut got = shape(&Points { floats, histograms: histograms.to_vec() });
            // Floats have no flags.
            got.iter_mut().filter(|c| c.0 == 1).for_each(|c| c.2 = 0);
            assert_eq!(got, expected);
        };
        check(&[whole(1, 1, 0), whole(2, 2, 0), whole(3, 2, 2)], &[], &[(2, 3, 0b00)]);
        check(&[whole(1, 5, 0), whole(2, 4, 0), whole(3, 4, 2)], &[], &[(2, 1, 0b00), (2, 2, 0b00)]);
        check(&[whole(1, 5, 2), whole(2, 6, 1)], &[], &[(2, 1, 0b01), (2, 1, 0b10)]);
        check(&[whole(1, 5, 3), whole(2, 4, 3), whole(3, 4, 2)], &[], &[(2, 2, 0b11), (2, 1, 0b01)]);
        check(
            &[whole(2, 1, 0), whole(4, 1, 2)],
            &[1, 3, 5, 6],
            &[(1, 1, 0), (2, 1, 0), (1, 1, 0), (2, 1, 1), (1, 2, 0)],
        );
        let long: Vec<_> = (0..250).map(|ts| whole(ts, 1, 2)).collect();
        check(&long, &[], &[(2, 120, 0b01), (2, 120, 0b01), (2, 10, 0b01)]);
        check(&[], &(0..121).collect::<Vec<_>>(), &[(1, 120, 0), (1, 1, 0)]);
        let mut other = whole(2, 1, 0);
        other.schema = 3;
        check(&[whole(1, 1, 0), other], &[], &[(2, 1, 0), (2, 1, 0)]);
        let stale = |ts| Histogram { sum: f64::from_bits(STALE), ..whole(ts, 0, 0) };
        check(&[whole(1, 1, 0), stale(2), stale(3), whole(4, 1, 0)], &[], &[(2, 1, 0), (2, 2, 0), (2, 1, 0)]);
    }
}
