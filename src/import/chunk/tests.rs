//! Chunks made by an encoder of our own, chunks that Prometheus made, and damaged ones.

use proptest::prelude::*;

use super::*;

/// Bits, the highest of each byte first.
#[derive(Default)]
struct Writer {
    bytes: Vec<u8>,
    used: u32,
}

impl Writer {
    fn bits(&mut self, v: u64, count: u32) {
        for i in (0..count).rev() {
            if self.used.is_multiple_of(8) {
                self.bytes.push(0);
            }
            let bit = (v >> i & 1) as u8;
            *self.bytes.last_mut().unwrap() |= bit << (7 - self.used % 8);
            self.used += 1;
        }
    }

    fn unsigned_bytes(&mut self, mut v: u64) {
        while v >= 0x80 {
            self.bits(v & 0x7f | 0x80, 8);
            v >>= 7;
        }
        self.bits(v, 8);
    }

    fn signed_bytes(&mut self, v: i64) {
        self.unsigned_bytes((v << 1 ^ v >> 63) as u64);
    }

    fn f64(&mut self, v: f64) {
        self.bits(v.to_bits(), 64);
    }

    /// A number with as many ones before it as the place of its size in the list, the smallest that holds it.
    fn sized(&mut self, v: i64, sizes: &[u32]) {
        let fits = |size: u32| match size {
            0 => v == 0,
            64 => true,
            size => (-(1 << (size - 1)) + 1..=1 << (size - 1)).contains(&v),
        };
        let place = sizes.iter().position(|s| fits(*s)).unwrap() as u32;
        let last = place as usize == sizes.len() - 1;
        self.bits(if last { u64::MAX } else { u64::MAX << 1 }, place + u32::from(!last));
        self.bits(v as u64, sizes[place as usize]);
    }

    fn signed(&mut self, v: i64) {
        self.sized(v, &SIZES);
    }

    fn unsigned(&mut self, v: u64) {
        let place = SIZES.iter().position(|s| *s == 64 || v < 1 << s).unwrap() as u32;
        self.bits(if place == 8 { 0xff } else { u64::MAX << 1 }, if place == 8 { 8 } else { place + 1 });
        self.bits(v, SIZES[place as usize]);
    }

    fn xor(&mut self, state: &mut (u64, Option<(u32, u32)>), v: f64) {
        let x = state.0 ^ v.to_bits();
        state.0 = v.to_bits();
        if x == 0 {
            return self.bits(0, 1);
        }
        let (leading, trailing) = (x.leading_zeros().min(31), x.trailing_zeros());
        match state.1 {
            Some((l, t)) if leading >= l && trailing >= t => {
                self.bits(0b10, 2);
                self.bits(x >> t, 64 - l - t);
            }
            _ => {
                state.1 = Some((leading, trailing));
                self.bits(0b11, 2);
                self.bits(u64::from(leading), 5);
                self.bits(u64::from(64 - leading - trailing), 6);
                self.bits(x >> trailing, 64 - leading - trailing);
            }
        }
    }
}

pub(in crate::import) fn encode_floats(samples: &[(i64, f64)]) -> Vec<u8> {
    let mut w = Writer::default();
    w.bits(samples.len() as u64, 16);
    let mut value = (0, None);
    let (mut last, mut delta) = (0i64, 0i64);
    for (i, (ts, v)) in samples.iter().enumerate() {
        let new_delta = ts.wrapping_sub(last);
        match i {
            0 => {
                w.signed_bytes(*ts);
                w.f64(*v);
                value.0 = v.to_bits();
            }
            1 => {
                w.unsigned_bytes(new_delta as u64);
                w.xor(&mut value, *v);
            }
            _ => {
                w.sized(new_delta.wrapping_sub(delta), &[0, 14, 17, 20, 64]);
                w.xor(&mut value, *v);
            }
        }
        (last, delta) = (*ts, if i == 0 { 0 } else { new_delta });
    }
    w.bytes
}

fn same_floats(a: &[(i64, f64)], b: &[(i64, f64)]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.0 == b.0 && a.1.to_bits() == b.1.to_bits())
}

/// Differences to the one before, and to the difference before.
#[derive(Default, Clone, Copy)]
struct Dod(i64, i64);

impl Dod {
    fn step(&mut self, v: i64, first: bool) -> i64 {
        if first {
            self.0 = v;
            return v;
        }
        let delta = v.wrapping_sub(self.0);
        let dod = delta.wrapping_sub(self.1);
        (self.0, self.1) = (v, delta);
        dod
    }
}

fn encode_histograms(all: &[Histogram], flags: u8) -> (u8, Vec<u8>) {
    let mut w = Writer::default();
    w.bits(all.len() as u64, 16);
    w.bits(u64::from(flags) << 6, 8);
    let h = &all[0];
    match h.zero_threshold {
        0.0 => w.bits(0, 8),
        z if z.to_bits() << 12 == 0 && (1..255).contains(&(z.log2() as i32 + 244)) => {
            w.bits((z.log2() as i32 + 244) as u64, 8)
        }
        z => {
            w.bits(255, 8);
            w.f64(z);
        }
    }
    w.signed(i64::from(h.schema));
    for spans in [&h.positive, &h.negative] {
        w.unsigned(spans.len() as u64);
        for span in spans {
            w.unsigned(u64::from(span.length));
            w.signed(i64::from(span.offset));
        }
    }
    if h.schema == CUSTOM {
        w.unsigned(h.custom_values.len() as u64);
        for v in &h.custom_values {
            if *v >= 0.0 && v * 1000.0 <= 33_554_430.0 && (v * 1000.0).fract() == 0.0 {
                w.unsigned((v * 1000.0) as u64 + 1);
            } else {
                w.bits(0, 1);
                w.f64(*v);
            }
        }
    }
    let (mut ts, mut sum) = (Dod::default(), (0, None));
    let mut totals = [Dod::default(); 2];
    let mut buckets: Vec<Dod> = Vec::new();
    let mut xors: Vec<(u64, Option<(u32, u32)>)> = Vec::new();
    let mut encoding = 2;
    for (i, h) in all.iter().enumerate() {
        let first = i == 0;
        w.signed(ts.step(h.ts, first));
        match &h.counts {
            Counts::Whole { count, zero, positive, negative } => {
                for (total, v) in totals.iter_mut().zip([*count, *zero]) {
                    let v = total.step(v as i64, first);
                    if first { w.unsigned(v as u64) } else { w.signed(v) }
                }
                if first {
                    w.f64(h.sum)
                } else {
                    w.xor(&mut sum, h.sum)
                }
                sum.0 = h.sum.to_bits();
                buckets.resize(positive.len() + negative.len(), Dod::default());
                for (bucket, v) in buckets.iter_mut().zip(positive.iter().chain(negative)) {
                    w.signed(bucket.step(*v, first));
                }
            }
            Counts::Fractional { count, zero, positive, negative } => {
                encoding = 3;
                xors.resize(2 + positive.len() + negative.len(), (0, None));
                let mut put = |w: &mut Writer, at: usize, v: f64| {
                    if first {
                        w.f64(v)
                    } else {
                        w.xor(&mut xors[at], v)
                    }
                    xors[at].0 = v.to_bits();
                };
                put(&mut w, 0, *count);
                put(&mut w, 1, *zero);
                if first {
                    w.f64(h.sum)
                } else {
                    w.xor(&mut sum, h.sum)
                }
                sum.0 = h.sum.to_bits();
                for (at, v) in positive.iter().chain(negative).enumerate() {
                    put(&mut w, 2 + at, *v);
                }
            }
        }
    }
    (encoding, w.bytes)
}

fn decoded(encoding: u8, data: &[u8]) -> Result<Points> {
    let mut points = Points::default();
    decode(encoding, data, &mut points).map(|()| points)
}

fn value() -> impl Strategy<Value = f64> {
    prop_oneof![
        any::<u64>().prop_map(f64::from_bits),
        (-1000i32..1000).prop_map(f64::from),
        Just(f64::from_bits(STALE)),
        Just(0.0),
    ]
}

fn time_step() -> impl Strategy<Value = i64> {
    prop_oneof![Just(15_000i64), 14_990i64..15_010, 0i64..1 << 40, any::<i64>()]
}

/// Histograms of one chunk: they share their layout.
fn chunk_of_histograms() -> impl Strategy<Value = Vec<Histogram>> {
    let spans = prop::collection::vec((-5i32..100_000, 0u32..5), 0..4);
    let layout =
        (spans.clone(), spans, prop_oneof![Just(0.0), Just(2f64.powi(-128)), Just(0.1), Just(1024.0)], -4i32..9);
    (layout, any::<bool>(), any::<bool>(), 1usize..12).prop_flat_map(
        |((positive, negative, zero, schema), custom, whole, n)| {
            let spans =
                |s: Vec<(i32, u32)>| s.into_iter().map(|(offset, length)| Span { offset, length }).collect::<Vec<_>>();
            let (positive, negative) = (spans(positive), spans(negative));
            let len = |s: &[Span]| s.iter().map(|s| s.length as usize).sum::<usize>();
            let (p, m) = (len(&positive), len(&negative));
            let layout = Histogram {
                schema: if custom { CUSTOM } else { schema },
                zero_threshold: zero,
                positive,
                negative,
                custom_values: if custom { vec![-1.5, 0.0, 0.005, 2.5, 33_554.43, 1e300] } else { Vec::new() },
                ..Histogram::default()
            };
            let rows = prop::collection::vec(
                (
                    time_step(),
                    (any::<u64>(), any::<u64>(), value().prop_filter("stale", |v| v.to_bits() != STALE)),
                    prop::collection::vec(prop_oneof![-10i64..10, any::<i64>()], p + m),
                    prop::collection::vec(value(), p + m + 2),
                ),
                n,
            );
            rows.prop_map(move |rows| {
                let mut ts = 0i64;
                let one = |(step, (count, zero, sum), ints, doubles): (i64, (u64, u64, f64), Vec<i64>, Vec<f64>)| {
                    ts = ts.wrapping_add(step);
                    let counts = if whole {
                        Counts::Whole { count, zero, positive: ints[..p].to_vec(), negative: ints[p..].to_vec() }
                    } else {
                        let (count, zero) = (doubles[p + m], doubles[p + m + 1]);
                        Counts::Fractional {
                            count,
                            zero,
                            positive: doubles[..p].to_vec(),
                            negative: doubles[p..p + m].to_vec(),
                        }
                    };
                    Histogram { ts, sum, counts, ..layout.clone() }
                };
                rows.into_iter().map(one).collect()
            })
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn floats_come_back(steps in prop::collection::vec((time_step(), value()), 0..150)) {
        let mut ts = 1_700_000_000_000i64;
        let samples: Vec<(i64, f64)> = steps.into_iter().map(|(step, v)| { ts = ts.wrapping_add(step); (ts, v) }).collect();
        let got = decoded(1, &encode_floats(&samples)).unwrap().floats;
        prop_assert!(same_floats(&got, &samples), "{got:?} {samples:?}");
    }

    #[test]
    fn histograms_come_back(all in chunk_of_histograms(), flags in 0u8..4) {
        let (encoding, bytes) = encode_histograms(&all, flags);
        let got = decoded(encoding, &bytes).unwrap().histograms;
        prop_assert_eq!(got.len(), all.len());
        for (i, (got, mut want)) in got.into_iter().zip(all).enumerate() {
            want.reset_hint = match (flags, i) { (3, _) => 3, (_, 1..) => 2, (2, 0) => 1, _ => 0 };
            // By their texts, in which a double that is no number equals itself.
            prop_assert_eq!(format!("{got:?}"), format!("{want:?}"));
        }
    }

    /// What the server streams.
    #[test]
    fn our_chunks_come_back(
        steps in prop::collection::vec((1i64..1 << 30, value()), 0..300),
        histograms in prop::collection::vec(chunk_of_histograms(), 0..4),
    ) {
        let mut ts = -1_700_000_000_000i64;
        let mut later = |step: i64| { ts += step; ts };
        let floats: Vec<(i64, f64)> = steps.into_iter().map(|(step, v)| (later(step), v)).collect();
        let mut ts = -1_700_000_000_000i64;
        let mut histograms = histograms.concat();
        for h in &mut histograms {
            ts += 1 + (h.ts & 0xffff_ffff);
            h.ts = ts;
        }
        let points = Points { floats, histograms };
        let mut got = Points::default();
        for chunk in promql::chunk::encode(&points) {
            let from = got.mark();
            decode(chunk.encoding, &chunk.data, &mut got).unwrap();
            let times = got.floats[from.0..].iter().map(|f| f.0).chain(got.histograms[from.1..].iter().map(|h| h.ts));
            let times: Vec<i64> = times.collect();
            prop_assert_eq!((times.first(), times.last()), (Some(&chunk.first_ms), Some(&chunk.last_ms)));
            prop_assert!(times.is_sorted() && times.len() <= 120);
        }
        prop_assert!(same_floats(&got.floats, &points.floats));
        prop_assert_eq!(got.histograms.len(), points.histograms.len());
        for (got, mut want) in got.histograms.into_iter().zip(points.histograms) {
            // What is not known of resets comes back as what is known then.
            want.reset_hint = got.reset_hint;
            prop_assert_eq!(format!("{got:?}"), format!("{want:?}"));
        }
    }

    /// Whatever the bytes are: no panic, and not more samples than the bytes can hold.
    #[test]
    fn nothing_panics(encoding in 0u8..5, bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(points) = decoded(encoding, &bytes) {
            prop_assert!(points.len() <= 1 << 16);
        }
    }

    #[test]
    fn damaged_chunks_do_not_panic(all in chunk_of_histograms(), at in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<prop::sample::Index>()) {
        let (encoding, mut bytes) = encode_histograms(&all, 0);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let _ = decoded(encoding, &bytes);
        let _ = decoded(encoding, &bytes[..cut.index(bytes.len())]);
    }
}

#[test]
fn the_end_of_a_series() {
    let histogram = |ts, sum| Histogram {
        ts,
        sum,
        positive: vec![Span { offset: 0, length: 1 }],
        counts: Counts::Whole { count: 5, zero: 0, positive: vec![5], negative: vec![] },
        ..Histogram::default()
    };
    let mut all = [histogram(1, 2.0), histogram(2, f64::from_bits(STALE))];
    // In the stream the last one has no buckets.
    if let Counts::Whole { positive, .. } = &mut all[1].counts {
        positive.clear();
    }
    let (encoding, bytes) = encode_histograms(&all, 0);
    let got = decoded(encoding, &bytes).unwrap().histograms;
    assert_eq!(got[0].counts, all[0].counts);
    assert_eq!((got[1].ts, got[1].sum.to_bits(), &got[1].counts), (2, STALE, &Counts::default()));
    assert!(got[1].positive.is_empty());
}

#[test]
fn unknown_and_short() {
    let check = |encoding, bytes: &[u8], message: &str| {
        let error = decoded(encoding, bytes).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    };
    check(4, &[], "encoding 4 is unknown");
    check(1, &[], "ends too early");
    check(1, &[0, 9, 1], "ends too early");
    check(2, &[0, 1, 0], "ends too early");
    assert_eq!(decoded(1, &[0, 0]).unwrap().len(), 0);
    assert_eq!(decoded(2, &[0, 0, 0]).unwrap().len(), 0);
}
