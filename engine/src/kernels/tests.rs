//! Kernels against plain passes over each window, and against values worked out by hand.

use proptest::prelude::*;

use super::*;

const ALL: [RangeFunction; 26] = {
    use RangeFunction::*;
    [
        Rate,
        Increase,
        Delta,
        Irate,
        Idelta,
        Changes,
        Resets,
        Avg,
        Min,
        Max,
        Sum,
        Count,
        Last,
        First,
        Present,
        Stddev,
        Stdvar,
        Quantile,
        Deriv,
        PredictLinear,
        Mad,
        DoubleExponential,
        TsOfFirst,
        TsOfLast,
        TsOfMin,
        TsOfMax,
    ]
};

fn run(f: RangeFunction, ts: &[i64], values: &[f64], w: Windows, args: [&[f64]; 2]) -> Vec<Option<f64>> {
    let (mut out, mut valid) = (vec![0.0; w.count], vec![false; w.count]);
    let arguments = Arguments { args, first_time: w.first_end, time_step: w.step, starts: &[] };
    range(f, ts, values, &w, &arguments, &mut Scratch::default(), &mut out, &mut valid);
    out.into_iter().zip(valid).map(|(v, ok)| ok.then_some(v)).collect()
}

fn check(f: RangeFunction, samples: &[(i64, f64)], args: [&[f64]; 2], expected: Option<f64>) {
    let (ts, values): (Vec<i64>, Vec<f64>) = samples.iter().copied().unzip();
    let got = run(f, &ts, &values, Windows { first_end: 60_000, step: 1, count: 1, length: 60_000 }, args)[0];
    let same = match (got, expected) {
        (Some(a), Some(b)) => (a.is_nan() && b.is_nan()) || a == b || (a - b).abs() <= 1e-12 * b.abs(),
        (a, b) => a.is_none() && b.is_none(),
    };
    assert!(same, "{f:?} of {samples:?}: {got:?}, expected {expected:?}");
}

#[test]
fn windows_are_open_on_the_left() {
    use RangeFunction::*;
    let none: [&[f64]; 2] = [&[], &[]];
    check(Count, &[(0, 1.0), (1, 2.0), (60_000, 3.0), (60_001, 4.0)], none, Some(2.0));
    check(First, &[(0, 1.0), (1, 2.0), (60_000, 3.0)], none, Some(2.0));
    check(Last, &[(0, 1.0), (1, 2.0), (60_000, 3.0)], none, Some(3.0));
    check(Sum, &[(0, 1.0)], none, None);
}

#[test]
fn values_by_hand() {
    use RangeFunction::*;
    let none: [&[f64]; 2] = [&[], &[]];
    let s: &[(i64, f64)] = &[(15_000, 10.0), (30_000, 20.0), (45_000, 5.0), (60_000, 15.0)];
    // 10 up, reset from 20, 5 to 15: 15 - 10 + 20 over 45 s, to the start 15 s (threshold 16.5 s) bounded by the zero
    // crossing 45 * 10 / 25 = 18 s.
    check(Increase, s, none, Some(25.0 * (60.0 / 45.0)));
    check(Rate, s, none, Some(25.0 * (60.0 / 45.0 / 60.0)));
    check(Delta, s, none, Some(5.0 * (60.0 / 45.0)));
    check(Irate, s, none, Some(10.0 / 15.0));
    check(Idelta, s, none, Some(10.0));
    check(Resets, s, none, Some(1.0));
    check(Changes, s, none, Some(3.0));
    check(Avg, s, none, Some(12.5));
    check(Quantile, s, [&[0.5], &[]], Some(12.5));
    check(Quantile, s, [&[-1.0], &[]], Some(f64::NEG_INFINITY));
    check(Quantile, s, [&[2.0], &[]], Some(f64::INFINITY));
    check(Quantile, s, [&[f64::NAN], &[]], Some(f64::NAN));
    check(Stdvar, s, none, Some(31.25));
    check(Min, &[(1, f64::NAN), (2, 3.0)], none, Some(3.0));
    check(Max, &[(1, f64::NAN)], none, Some(f64::NAN));
    check(Sum, &[(1, 1e100), (2, 1.0), (3, -1e100)], none, Some(1.0));
    check(Avg, &[(1, 1.7e308), (2, 1.7e308), (3, 1.7e308)], none, Some(1.7e308));
    check(Rate, &[(30_000, 1.0)], none, None);
    check(Deriv, &[(10_000, 1.0), (20_000, 2.0)], none, Some(0.1));
    check(PredictLinear, &[(10_000, 1.0), (20_000, 2.0)], [&[60.0], &[]], Some(12.0));
    check(Mad, &[(1, 4.0), (2, 6.0), (3, 2.0), (4, 1.0), (5, 999.0)], none, Some(2.0));
    check(TsOfMax, &[(1000, 4.0), (2000, 6.0), (3000, 6.0)], none, Some(3.0));
}

#[test]
fn stale_markers_end_a_series() {
    let (ts, values) = ([10, 20, 30], [1.0, f64::from_bits(STALE_NAN), f64::NAN]);
    let w = Windows { first_end: 10, step: 10, count: 5, length: 15 };
    let (mut out, mut valid) = ([0.0; 5], [false; 5]);
    instant(&ts, &values, &w, &mut out, &mut valid);
    assert_eq!(valid, [true, false, true, true, false]);
    assert_eq!(out[0], 1.0);
    assert!(out[2].is_nan());
    let (mut a, mut b) = (Vec::new(), Vec::new());
    assert_eq!(without_stale(&ts, &values, &mut a, &mut b).0, [10, 30]);
}

#[test]
fn order_keys_order() {
    let sorted = [f64::NAN, f64::NEG_INFINITY, -1.5, -0.0, 0.0, 1e-300, 2.0, f64::INFINITY];
    assert!(sorted.map(order_key).is_sorted());
    assert!(sorted[1..].iter().all(|v| from_order_key(order_key(*v)).to_bits() == v.to_bits()));
}

proptest! {
    /// A kernel that slides gives what it gives on each window alone, bit for bit; sums, which add up in another order, up
    /// to what compensated sums lose.
    #[test]
    fn sliding_changes_nothing(
        gaps in prop::collection::vec((1i64..40, prop_oneof![
            8 => (-5i32..20).prop_map(f64::from),
            1 => Just(f64::NAN),
            1 => any::<f64>(),
        ]), 0..120),
        first_end in 0i64..200, step in 0i64..60, length in 1i64..150,
    ) {
        let mut t = 0;
        let (ts, values): (Vec<i64>, Vec<f64>) = gaps.into_iter().map(|(g, v)| { t += g; (t, v) }).unzip();
        let w = Windows { first_end, step, count: 40, length };
        let args: [&[f64]; 2] = [&[0.3], &[0.7]];
        for f in ALL {
            let whole = run(f, &ts, &values, w, args);
            for (i, got) in whole.iter().enumerate() {
                let end = w.end(i);
                let lo = ts.partition_point(|t| *t <= end - length);
                let hi = ts.partition_point(|t| *t <= end);
                let alone = run(f, &ts[lo..hi], &values[lo..hi], Windows { first_end: end, step: 1, count: 1, length }, args)[0];
                if matches!(f, RangeFunction::Sum | RangeFunction::Avg)
                    && let (Some(a), Some(b)) = (got, alone)
                    && a.is_finite()
                {
                    let scale: f64 = values[lo..hi].iter().map(|v| v.abs()).sum();
                    prop_assert!((a - b).abs() <= 1e-15 * scale, "{:?} at {}: {:?} {:?}", f, i, got, alone);
                    continue;
                }
                prop_assert_eq!(got.map(f64::to_bits), alone.map(f64::to_bits), "{:?} at {}: {:?} {:?}", f, i, got, alone);
            }
        }
    }
}
