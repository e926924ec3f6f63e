//! Arithmetic, statistics and texts of native histograms, by example and by property.

use proptest::prelude::*;

use super::*;

fn buckets(start: i32, counts: &[f64]) -> Vec<Bucket<f64>> {
    counts.iter().zip(start..).map(|(count, index)| Bucket { index, count: *count }).collect()
}

fn exponential(schema: i32, zero: (f64, f64), sum: f64, positive: &[f64], negative: &[f64]) -> FloatHistogram {
    let count = zero.1 + positive.iter().sum::<f64>() + negative.iter().sum::<f64>();
    FloatHistogram {
        schema,
        zero_threshold: zero.0,
        zero_count: zero.1,
        count,
        sum,
        positive: buckets(1, positive),
        negative: buckets(1, negative),
        ..FloatHistogram::default()
    }
}

fn custom(bounds: &[f64], counts: &[f64]) -> FloatHistogram {
    FloatHistogram {
        schema: CUSTOM,
        count: counts.iter().sum(),
        sum: 1.0,
        positive: buckets(0, counts),
        custom: bounds.into(),
        ..FloatHistogram::default()
    }
}

fn with_hint(hint: Hint, h: FloatHistogram) -> FloatHistogram {
    FloatHistogram { hint, ..h }
}

#[test]
fn bounds_are_those_of_prometheus() {
    let check =
        |index, schema, expected: f64| assert_eq!(bounds::exponential(index, schema), expected, "{index} {schema}");
    check(0, 0, 1.0);
    check(1, 0, 2.0);
    check(-1, -1, 0.25);
    check(1, 1, 2f64.sqrt().next_down());
    check(3, 2, 1.6817928305074288);
    check(-1, 3, 0.9170040432046711);
    check(255, 8, 1.9945921121709396);
    check(1024, 0, f64::MAX);
    check(1025, 0, f64::INFINITY);
    check(64, -4, f64::MAX);
    check(65, -4, f64::INFINITY);
    check(262144, 8, f64::MAX);
    check(-1074, 0, 5e-324);
    check(-1075, 0, 0.0);
    check(-1023, 0, 1.1125369292536007e-308);
    check(i32::MAX, 8, f64::INFINITY);
    check(i32::MIN, -4, 0.0);
}

#[test]
fn texts() {
    let check = |h: &FloatHistogram, expected: &str| assert_eq!(h.to_string(), expected);
    check(&FloatHistogram::default(), "{count:0, sum:0}");
    check(
        &exponential(1, (0.001, 5.5), 2349209.324, &[1.0, 0.0, 4.2], &[3.0]),
        "{count:13.7, sum:2.349209324e+06, [-1.414213562373095,-1):3, [-0.001,0.001]:5.5, (1,1.414213562373095]:1, (2,2.82842712474619]:4.2}",
    );
    check(&custom(&[1.0, 5.0], &[2.0, 0.0, 3.0]), "{count:5, sum:1, [-Inf,1]:2, (5,+Inf]:3}");
}

#[test]
fn addition_reconciles() {
    let a = exponential(1, (0.0, 0.0), 3.0, &[1.0, 2.0, 3.0, 4.0], &[]);
    let b = exponential(0, (1.2, 5.0), 4.0, &[1.0, 1.0], &[2.0]);
    let mut sum = a.clone();
    assert_eq!(sum.add(&b), Ok(Added::default()));
    // The zero bucket grew to the end of the bucket that it would have cut.
    assert_eq!((sum.schema, sum.zero_threshold, sum.zero_count), (0, 2.0, 11.0));
    assert_eq!(sum.positive, [Bucket { index: 2, count: 8.0 }]);
    assert_eq!(sum.count, a.count + b.count);

    let mut sum = custom(&[1.0, 2.0, 5.0], &[1.0, 2.0, 3.0, 4.0]);
    let added = sum.add(&custom(&[1.0, 3.0, 5.0], &[1.0, 1.0, 1.0, 1.0]));
    assert_eq!(added, Ok(Added { bounds_reconciled: true, ..Added::default() }));
    assert_eq!(sum.custom[..], [1.0, 5.0]);
    assert_eq!(sum.positive, buckets(0, &[2.0, 7.0, 5.0]));
    assert_eq!(sum.add(&a), Err(Incompatible));
}

#[test]
fn hints_of_sums() {
    let check = |a, b, expected, collide| {
        let mut sum = with_hint(a, FloatHistogram::default());
        let added = sum.add(&with_hint(b, FloatHistogram::default())).expect("compatible");
        assert_eq!((sum.hint, added.resets_collide), (expected, collide), "{a:?} {b:?}");
    };
    check(Hint::Gauge, Hint::Reset, Hint::Gauge, false);
    check(Hint::NotReset, Hint::Gauge, Hint::Gauge, false);
    check(Hint::Reset, Hint::Unknown, Hint::Unknown, false);
    check(Hint::Reset, Hint::Reset, Hint::Reset, false);
    check(Hint::Reset, Hint::NotReset, Hint::Unknown, true);
}

#[test]
fn resets() {
    let check = |before: &FloatHistogram, now: &FloatHistogram, expected| {
        assert_eq!(now.is_reset_after(before), expected, "{before} {now}");
    };
    let a = exponential(1, (0.001, 1.0), 3.0, &[1.0, 2.0], &[1.0]);
    check(&a, &a, false);
    check(&a, &with_hint(Hint::Reset, a.clone()), true);
    check(&a, &exponential(1, (0.001, 1.0), 3.0, &[2.0, 2.0], &[]), true);
    check(&a, &exponential(1, (0.001, 1.0), 3.0, &[3.0, 2.0], &[1.0]), false);
    check(&a, &exponential(1, (0.001, 9.0), 3.0, &[1.0, 1.0], &[1.0]), true);
    check(&a, &exponential(0, (0.001, 1.0), 3.0, &[3.0], &[1.0]), false);
    check(&a, &exponential(2, (0.001, 1.0), 3.0, &[3.0], &[1.0]), true);
    check(&a, &exponential(1, (bounds::exponential(1, 1), 3.0), 3.0, &[0.0, 2.0], &[]), false);
    check(&a, &exponential(1, (1.2, 9.0), 3.0, &[1.0, 2.0], &[1.0]), true);
    check(&custom(&[1.0, 2.0], &[1.0, 1.0, 1.0]), &custom(&[1.0, 3.0], &[1.0, 1.0, 1.0]), false);
    check(&custom(&[1.0, 2.0], &[2.0, 1.0, 1.0]), &custom(&[1.0, 3.0], &[1.0, 2.0, 1.0]), true);
    check(&custom(&[1.0], &[1.0]), &a, true);
}

#[test]
fn statistics() {
    let h = exponential(0, (0.001, 2.0), 12.0, &[4.0, 4.0], &[]);
    let close = |got: f64, expected: f64| assert!((got - expected).abs() < 1e-12, "{got}, expected {expected}");
    close(h.quantile(0.1).0, 0.0005);
    close(h.quantile(0.4).0, 2f64.sqrt());
    close(h.quantile(1.0).0, 4.0);
    close(h.fraction(0.0, 2.0).0, 0.6);
    close(h.fraction(2f64.sqrt(), f64::INFINITY).0, 0.6);
    close(h.avg(), 1.2);
    assert_eq!(h.quantile(-1.0).0, f64::NEG_INFINITY);
    assert!(h.quantile(f64::NAN).0.is_nan() && FloatHistogram::default().quantile(0.5).0.is_nan());
    let c = custom(&[1.0, 3.0], &[2.0, 2.0, 4.0]);
    close(c.quantile(0.125).0, 0.5);
    close(c.quantile(0.375).0, 2.0);
    close(c.quantile(0.99).0, 3.0);
    // One observation in five is NaN, which is in no bucket.
    let nan = FloatHistogram { count: 10.0, sum: f64::NAN, ..exponential(0, (0.0, 0.0), 0.0, &[8.0], &[]) };
    assert_eq!(nan.quantile(0.9).1, Some(NanNote::Result));
    assert_eq!(nan.quantile(0.1).1, Some(NanNote::Skew));
    assert_eq!(nan.fraction(0.0, 9.0), (0.8, Some(NanNote::Excluded)));
}

#[test]
fn trimming() {
    let check = |h: &FloatHistogram, at, upper, count: f64| {
        let mut trimmed = h.clone();
        trimmed.trim(at, upper);
        assert!((trimmed.count - count).abs() < 1e-12, "{h} at {at}: {trimmed}");
    };
    let h = exponential(0, (0.5, 2.0), 12.0, &[4.0, 4.0], &[1.0]);
    check(&h, 2.0, true, 7.0);
    check(&h, 2f64.sqrt(), false, 6.0);
    check(&h, 0.0, true, 2.0);
    check(&h, -1.0, false, 10.0);
    check(&h, 100.0, true, 11.0);
    let c = custom(&[1.0, 3.0], &[2.0, 2.0, 4.0]);
    check(&c, 2.0, true, 3.0);
    check(&c, 0.5, false, 7.0);
    check(&c, 3.0, false, 4.0);
}

#[test]
fn means_do_not_overflow() {
    let h = exponential(0, (0.0, 0.0), f64::MAX, &[f64::MAX / 1.5], &[]);
    let mut mean = Mean::of(&h);
    for _ in 0..4 {
        mean.add(&h).expect("compatible");
    }
    assert!((mean.value().sum / f64::MAX - 1.0).abs() < 1e-12);
    let mut other = Mean::of(&h);
    other.merge(mean).expect("compatible");
    assert!((other.value().positive[0].count / h.positive[0].count - 1.0).abs() < 1e-12);
}

fn any_histogram() -> impl Strategy<Value = FloatHistogram> {
    let side = || (-20i32..20, prop::collection::vec(0u32..1000, 0..12));
    let parts = (-4i32..=8, 0u32..3, 0u32..100, side(), side(), -1000i32..1000);
    let exponential = parts.prop_map(|(schema, width, zero, positive, negative, sum)| {
        let zero_threshold = f64::from(width) / 4.0;
        let side = |(start, counts): (i32, Vec<u32>)| {
            let mut side = buckets(start, &counts.into_iter().map(f64::from).collect::<Vec<_>>());
            side.retain(|b| bounds::exponential(b.index - 1, schema) >= zero_threshold);
            side
        };
        let (positive, negative) = (side(positive), side(negative));
        let count = positive.iter().chain(&negative).map(|b| b.count).sum::<f64>() + f64::from(zero);
        FloatHistogram {
            schema,
            zero_threshold,
            zero_count: f64::from(zero),
            count,
            sum: f64::from(sum),
            positive,
            negative,
            ..FloatHistogram::default()
        }
    });
    let counts = prop::collection::vec(0u32..1000, 1..8);
    let custom = (counts, prop::collection::btree_set(1u32..10, 7)).prop_map(|(counts, bounds)| {
        let bounds: Vec<f64> = bounds.into_iter().map(f64::from).collect();
        custom(&bounds, &counts.into_iter().map(f64::from).collect::<Vec<_>>())
    });
    prop_oneof![3 => exponential, 1 => custom]
}

fn buckets_hold(h: &FloatHistogram) -> f64 {
    h.buckets().map(|b| b.count).sum()
}

proptest! {
    #[test]
    fn any_histogram_reads_back(h in any_histogram(), hint in 0i8..4) {
        let h = with_hint(Hint::of(hint), h);
        let mut bytes = Vec::new();
        h.encode(&mut bytes);
        let read = decode(&bytes).expect("whole");
        prop_assert_eq!(&read, &h);
        prop_assert_eq!((read.hint, read.custom), (h.hint, h.custom));
        prop_assert!(decode(&bytes[1..]).is_none());
    }

    #[test]
    fn what_was_added_can_be_subtracted(a in any_histogram(), b in any_histogram()) {
        let mut sum = a.clone();
        if sum.add(&b).is_ok() {
            prop_assert_eq!(sum.count, a.count + b.count);
            sum.sub(&b).expect("compatible");
            prop_assert_eq!((sum.count, sum.sum), (a.count, a.sum));
            // What was counted twice for lying on both sides of a zero bucket's end aside, buckets are those of `a`.
            if a.zero_threshold == b.zero_threshold {
                prop_assert_eq!(buckets_hold(&sum), buckets_hold(&a));
            }
        }
    }

    #[test]
    fn sums_do_not_depend_on_how_they_are_made(all in prop::collection::vec(any_histogram(), 2..6)) {
        let all: Vec<_> = all.into_iter().filter(|h| !h.is_custom()).collect();
        if let [first, rest @ ..] = all.as_slice() {
            let (mut plain, mut sum) = (first.clone(), Sum::of(first));
            for h in rest {
                plain.add(h).expect("compatible");
                sum.add(h).expect("compatible");
            }
            prop_assert_eq!(sum.total(), plain);
        }
    }

    #[test]
    fn a_lower_resolution_keeps_count_and_sum(h in any_histogram(), schema in -4i32..8) {
        let mut coarse = h.clone();
        coarse.reduce_resolution(schema);
        prop_assert_eq!((coarse.count, coarse.sum), (h.count, h.sum));
        prop_assert_eq!(buckets_hold(&coarse), buckets_hold(&h));
        prop_assert!(coarse.is_custom() || coarse.schema <= schema.max(h.schema.min(schema)));
    }

    #[test]
    fn quantiles_grow(h in any_histogram(), a in 0.0f64..=1.0, b in 0.0f64..=1.0) {
        let (low, high) = (h.quantile(a.min(b)).0, h.quantile(a.max(b)).0);
        let slack = 1e-9 * high.abs();
        prop_assert!(low <= high + slack || h.count == 0.0 || low.is_nan(), "{h}: {low} {high}");
    }

    #[test]
    fn fractions_invert_quantiles(h in any_histogram(), q in 0.01f64..0.99) {
        let v = h.quantile(q).0;
        if !h.is_custom() && h.count > 0.0 && v.is_finite() && h.negative.is_empty() && h.zero_count == 0.0 {
            let fraction = h.fraction(f64::NEG_INFINITY, v).0;
            prop_assert!((fraction - q).abs() < 1e-6, "{h}: {v} {fraction} {q}");
        }
    }

    #[test]
    fn more_is_no_reset(a in any_histogram(), b in any_histogram()) {
        let mut sum = a.clone();
        if a.schema <= b.schema && a.zero_threshold >= b.zero_threshold && a.custom == b.custom && sum.add(&b).is_ok() {
            prop_assert!(!sum.is_reset_after(&a), "{a} {sum}");
        }
    }
}
