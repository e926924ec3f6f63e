//! Both forms against a plain list of rows.

use std::collections::BTreeMap;

use arrow::array::StringArray;
use catalog::tables::{EXEMPLARS, SAMPLES};
use proptest::prelude::*;

use super::*;

type Rows = Vec<(u32, i64, f64)>;
type ToBatch = fn(&[(u32, i64, f64)]) -> RecordBatch;

fn samples(rows: &[(u32, i64, f64)]) -> RecordBatch {
    RecordBatch::try_new(SAMPLES.arrow().clone(), base_columns(rows)).unwrap()
}

fn exemplars(rows: &[(u32, i64, f64)]) -> RecordBatch {
    let mut columns = base_columns(rows);
    columns.push(Arc::new(StringArray::from_iter_values(rows.iter().map(|r| format!("{{\"v\":\"{}\"}}", r.2)))));
    RecordBatch::try_new(EXEMPLARS.arrow().clone(), columns).unwrap()
}

fn base_columns(rows: &[(u32, i64, f64)]) -> Vec<ArrayRef> {
    vec![
        Arc::new(UInt32Array::from_iter_values(rows.iter().map(|r| r.0))),
        Arc::new(TimestampMillisecondArray::from_iter_values(rows.iter().map(|r| r.1)).with_data_type(time_type())),
        Arc::new(Float64Array::from_iter_values(rows.iter().map(|r| r.2))),
    ]
}

fn rows_of(batch: &RecordBatch) -> Vec<(u32, i64, u64)> {
    let series = batch.column(0).as_primitive::<UInt32Type>();
    let ts = batch.column(1).as_primitive::<TimestampMillisecondType>();
    let values = batch.column(2).as_primitive::<Float64Type>();
    (0..batch.num_rows()).map(|i| (series.value(i), ts.value(i), values.value(i).to_bits())).collect()
}

/// Appends `requests` to both forms and compares what is there then, and what snapshots on the way see.
fn check(requests: &[Rows], ordinals: &[Ordinal], ranges: &[(i64, i64)]) {
    let forms: [(Memtable, ToBatch); 2] =
        [(Memtable::new(SAMPLES.clone()), samples), (Memtable::new(EXEMPLARS.clone()), exemplars)];
    for (memtable, batch) in forms {
        let memtable = Arc::new(memtable);
        let mut model = BTreeMap::new();
        let mut views = Vec::new();
        for (i, rows) in requests.iter().enumerate() {
            if i % 7 < 3 {
                views.push((memtable.view(), model.clone()));
            }
            if i % 5 == 4 && !views.is_empty() {
                views.swap_remove(i % views.len());
            }
            memtable.append(ordinals, &batch(rows)).unwrap();
            model.extend(rows.iter().map(|r| ((ordinals[r.0 as usize], r.1), r.2)));
        }
        for (view, model) in &views {
            compare(view, model, ranges);
        }
        views.clear();
        if let Form::Series(form) = &memtable.form {
            assert_eq!(form.marks(), 0);
        }
        compare(&memtable, &model, ranges);
        assert_eq!(memtable.rows(), requests.iter().map(|r| r.len() as u64).sum::<u64>());
    }
}

/// Compares every read with the last row of each key.
fn compare(memtable: &Memtable, model: &BTreeMap<(Ordinal, i64), f64>, ranges: &[(i64, i64)]) {
    let mut present: Vec<Ordinal> = model.keys().map(|k| k.0).collect();
    present.dedup();
    assert_eq!(memtable.ordinals(), present);
    // Numbers are given in another order than ordinals, some for sets without rows.
    let wanted: Vec<(u32, Ordinal)> =
        present.iter().rev().copied().chain([9_999]).enumerate().map(|(i, o)| (3 * i as u32 + 1, o)).collect();
    for (start, end) in ranges {
        let read = memtable.read(&wanted, *start, *end, &[1, 2]).unwrap();
        let want: Vec<(u32, i64, u64)> = wanted
            .iter()
            .flat_map(|(n, o)| model.range((*o, *start)..=(*o, *end)).map(|(k, v)| (*n, k.1, v.to_bits())))
            .collect();
        assert_eq!(rows_of(&read), want, "{start}..={end} of {:?}", memtable.table().name);
    }
}

const ALL: (i64, i64) = (i64::MIN, i64::MAX);

#[test]
fn reads_what_was_appended() {
    let scrape = |k: i64| (0..300).map(|s| (s, 1_000 + k * 15_000, f64::from(s) + k as f64)).collect::<Rows>();
    let ordinals: Vec<u32> = (100..400).collect();
    check(&(0..70).map(scrape).collect::<Vec<_>>(), &ordinals, &[ALL, (0, 0), (31_000, 600_000), (1_000, 1_000)]);
}

#[test]
fn the_last_of_equal_keys_wins() {
    let long: Vec<Rows> = (0..100).map(|k| vec![(0, k % 40, k as f64)]).collect();
    check(&long, &[5], &[ALL, (3, 7)]);
    check(&[vec![(0, 1, 1.0), (0, 1, 2.0)], vec![(0, 1, 3.0), (1, 1, 4.0)]], &[0, 700], &[ALL]);
}

#[test]
fn times_far_apart() {
    let day = 86_400_000;
    let rows: Vec<Rows> = (0..200).map(|k| vec![(0, (k % 7) * 30 * day - k, k as f64)]).collect();
    check(&rows, &[3], &[ALL, (0, 100 * day)]);
    check(&[vec![(0, i64::MIN, 1.0), (0, i64::MAX, 2.0), (0, 0, 3.0)]], &[0], &[ALL, (0, i64::MAX)]);
}

#[test]
fn an_empty_memtable_has_nothing() {
    let memtable = Memtable::new(SAMPLES.clone());
    assert_eq!((memtable.rows(), memtable.ordinals()), (0, vec![]));
    assert_eq!(memtable.read(&[(0, 1)], 0, 1, &[2]).unwrap().num_rows(), 0);
    assert!(!memtable.overlaps(i64::MIN, i64::MAX));
}

#[test]
fn scraped_series_stay_small() {
    let memtable = Memtable::new(SAMPLES.clone());
    let ordinals: Vec<u32> = (0..1024).collect();
    for k in 0..240i64 {
        // Counters with uneven steps, the commonest kind.
        let value = |s: u32| f64::from(s * 1000) + (k * 37 + (k * k * i64::from(s)) % 23) as f64;
        let rows: Rows = (0..1024).map(|s| (s, 1_700_000_000_000 + k * 15_000, value(s))).collect();
        memtable.append(&ordinals, &samples(&rows)).unwrap();
    }
    let per_row = memtable.bytes() as f64 / memtable.rows() as f64;
    assert!(per_row < 4.5, "{per_row} bytes a sample, open blocks included");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_rows(
        requests in proptest::collection::vec(
            proptest::collection::vec(
                (0u32..4, prop_oneof![0i64..200, any::<i64>()], any::<u64>().prop_map(f64::from_bits)), 0..20),
            0..40),
        ranges in proptest::collection::vec((-10i64..210, -10i64..210), 4),
    ) {
        let ranges: Vec<_> = ranges.into_iter().map(|(a, b)| (a.min(b), a.max(b))).chain([ALL]).collect();
        check(&requests, &[1, 255, 256, 1000], &ranges);
    }
}
