//! Values must come back bit by bit, whatever they are.

use arrow::array::Float64Array;
use proptest::prelude::*;

use super::{Encoded, Params, RUN_ROWS_MAX, Run, decode, patch};

fn decoded(encoded: &Encoded, ts: &[i64]) -> Vec<f64> {
    let mut out = Vec::new();
    let mut at = 0;
    for Run { rows, params } in &encoded.runs {
        let range = at..at + rows;
        decode(params.as_ref(), &ts[range.clone()], &encoded.residuals[range], &mut out);
        at += rows;
    }
    let doubles: Float64Array = encoded.doubles.iter().zip(&encoded.is_double).map(|(v, d)| d.then_some(*v)).collect();
    patch(&doubles, &mut out);
    out
}

fn round_trip(ts: &[i64], values: &[f64], t0: i64) -> Encoded {
    let mut encoded = Encoded::default();
    encoded.push_series(ts, values, t0);
    let bits = |v: &[f64]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&decoded(&encoded, ts)), bits(values));
    encoded
}

/// Encodes values 15 s apart and checks the first run's scale (`None`: doubles) and how many rows are doubles.
fn check(values: &[f64], scale: Option<u8>, doubles: usize) -> Option<Params> {
    let ts: Vec<i64> = (0..values.len() as i64).map(|i| 1_700_000_000_000 + i * 15_000).collect();
    let encoded = round_trip(&ts, values, 1_699_920_000_000);
    assert_eq!(encoded.runs[0].params.map(|p| p.scale), scale, "{values:?}");
    assert_eq!(encoded.is_double.iter().filter(|d| **d).count(), doubles, "{values:?}");
    encoded.runs[0].params
}

const STALE: f64 = f64::from_bits(0x7ff0_0000_0000_0002);

#[test]
fn finds_scales() {
    check(&[0.0], Some(0), 0);
    check(&[1.0, 2.0, 3.0], Some(0), 0);
    check(&[0.5, 2.0, 3.25], Some(2), 0);
    check(&[0.1, 0.2, 0.3, 1e9], Some(1), 0);
    check(&[0.1 + 0.2], None, 1);
    check(&[123_456.789_012], Some(6), 0);
    check(&[1e-15, 3e-15], Some(15), 0);
    check(&[1e-16], None, 1);
    check(&[1e300], None, 1);
    check(&[2f64.powi(50)], Some(0), 0);
    check(&[2f64.powi(51)], None, 1);
    check(&[f64::NAN], None, 1);
    check(&[STALE], None, 1);
    check(&[-0.0], None, 1);
    check(&[f64::INFINITY, f64::NEG_INFINITY], None, 2);
    check(&[f64::MIN_POSITIVE, 5e-324], None, 2);
    check(&[std::f64::consts::PI; 20], None, 20);
}

#[test]
fn keeps_single_exceptions_within_a_run() {
    let mut values: Vec<f64> = (0..100).map(|i| f64::from(i) / 4.0).collect();
    values[99] = STALE;
    check(&values, Some(2), 1);
    values[0] = -0.0;
    check(&values, Some(2), 2);
    let mut values = vec![1e14; 50];
    // The last value's scale pushes the others out of range, so the whole run is doubles.
    values.push(0.001);
    check(&values, None, 51);
}

#[test]
fn takes_a_slope_only_where_it_helps() {
    let counter: Vec<f64> = (0..240).map(|i| 1e6 + f64::from(i * 1500 + i % 7)).collect();
    assert!(check(&counter, Some(0), 0).is_some_and(|p| p.slope > 0.09 && p.slope < 0.11));
    let falling: Vec<f64> = counter.iter().map(|v| -v).collect();
    assert!(check(&falling, Some(0), 0).is_some_and(|p| p.slope < 0.0));
    let gauge: Vec<f64> = (0..240).map(|i| f64::from((i * 7919) % 100)).collect();
    assert_eq!(check(&gauge, Some(0), 0).map(|p| p.slope), Some(0.0));
    assert_eq!(check(&[7.0; 240], Some(0), 0), Some(Params { base: 7, slope: 0.0, t0: 1_699_920_000_000, scale: 0 }));
}

#[test]
fn cuts_long_series() {
    let ts: Vec<i64> = (0..3000).map(|i| i * 15_000).collect();
    let values: Vec<f64> = (0..3000).map(f64::from).collect();
    let encoded = round_trip(&ts, &values, 0);
    assert_eq!(
        encoded.runs.iter().map(|r| r.rows).collect::<Vec<_>>(),
        [RUN_ROWS_MAX, RUN_ROWS_MAX, 3000 - 2 * RUN_ROWS_MAX]
    );
}

fn value() -> impl Strategy<Value = f64> {
    prop_oneof![
        4 => (-1_000_000i64..1_000_000, 0u32..16).prop_map(|(k, s)| k as f64 / 10f64.powi(s as i32)),
        2 => any::<i32>().prop_map(f64::from),
        1 => any::<u64>().prop_map(f64::from_bits),
        1 => prop::sample::select(vec![0.0, -0.0, STALE, f64::NAN, f64::INFINITY, f64::MAX, 5e-324, 1e22, 4503599627370497.5]),
    ]
}

proptest! {
    #[test]
    fn any_values_come_back(
        rows in prop::collection::vec((value(), 0i64..100_000), 1..300),
        first in prop_oneof![Just(0i64), -5_000_000_000_000..5_000_000_000_000i64, Just(i64::MIN / 4), Just(i64::MAX / 4)],
        far in prop::bool::ANY,
    ) {
        let mut t = first;
        let (mut ts, mut values) = (Vec::new(), Vec::new());
        for (v, dt) in rows {
            t += dt;
            ts.push(t);
            values.push(v);
        }
        round_trip(&ts, &values, if far { 0 } else { first });
    }

    #[test]
    fn counters_come_back(start in 0u64..1 << 50, steps in prop::collection::vec(0u64..1 << 40, 1..300), scale in 0i32..10) {
        let mut k = start;
        let (mut ts, mut values) = (Vec::new(), Vec::new());
        for (i, step) in steps.iter().enumerate() {
            k += step;
            ts.push(1_700_000_000_000 + i as i64 * 15_000 + (step % 13) as i64);
            values.push(k as f64 / 10f64.powi(scale));
        }
        round_trip(&ts, &values, 1_699_920_000_000);
    }

    #[test]
    fn damaged_inputs_do_not_panic(base: i64, slope: f64, t0: i64, scale: u8, ts: i64, residual: i64) {
        decode(Some(&Params { base, slope, t0, scale }), &[ts], &[residual], &mut Vec::new());
    }
}
