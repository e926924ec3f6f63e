//! Logs made here: records in fragments, compressed, torn and damaged.

use proptest::prelude::*;

use super::*;
use crate::import::bytes::crc32c;

/// A segment of records as Prometheus writes it: in fragments where a page ends.
fn segment(all: &[Vec<u8>], flag: u8) -> Vec<u8> {
    let mut out = Vec::new();
    for record in all {
        let stored = match flag {
            SNAPPY => snap::raw::Encoder::new().compress_vec(record).unwrap(),
            ZSTD => zstd::bulk::compress(record, 3).unwrap(),
            _ => record.clone(),
        };
        let mut rest = &stored[..];
        let mut first = true;
        loop {
            let left = PAGE - out.len() % PAGE;
            if left <= HEAD {
                out.resize(out.len() + left, 0);
                continue;
            }
            let (now, later) = rest.split_at(rest.len().min(left - HEAD));
            let kind = match (first, later.is_empty()) {
                (true, true) => 1,
                (true, false) => 2,
                (false, false) => 3,
                (false, true) => 4,
            };
            out.push(kind | flag);
            out.extend((now.len() as u16).to_be_bytes());
            out.extend(crc32c(now).to_be_bytes());
            out.extend(now);
            (rest, first) = (later, false);
            if rest.is_empty() {
                break;
            }
        }
    }
    out
}

fn read_back(bytes: &[u8]) -> (Vec<Vec<u8>>, std::result::Result<(), Stop>) {
    let mut got = Vec::new();
    let result = records_of(bytes, |record| {
        got.push(record.to_vec());
        Ok(())
    });
    (got, result)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn records_come_back(
        lens in prop::collection::vec(prop_oneof![1usize..50, 30_000usize..100_000], 1..12),
        flag in prop_oneof![Just(0), Just(SNAPPY), Just(ZSTD)],
        cut in any::<prop::sample::Index>(),
        damaged in any::<prop::sample::Index>(),
    ) {
        // Such that they don't compress.
        let mut seed = 1u64;
        let mut byte = || { seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1); (seed >> 56) as u8 };
        let all: Vec<Vec<u8>> = lens.iter().map(|n| (0..*n).map(|_| byte()).collect()).collect();
        let bytes = segment(&all, flag);
        prop_assert_eq!(read_back(&bytes), (all.clone(), Ok(())));
        // Cut anywhere: whole records, and no damage.
        let (got, result) = read_back(&bytes[..cut.index(bytes.len())]);
        prop_assert!(got == all[..got.len()] && matches!(result, Ok(()) | Err(Stop::Torn)), "{result:?}");
        // A flipped bit: whole records that were written.
        let mut bytes = bytes;
        let at = damaged.index(bytes.len());
        bytes[at] ^= 1 << (at % 8);
        let (got, _) = read_back(&bytes);
        prop_assert!(got.iter().all(|record| all.contains(record)));
    }

    #[test]
    fn nothing_panics(record in prop::collection::vec(any::<u8>(), 1..200), kind in 0u8..12) {
        let range = Range { start_ms: i64::MIN, end_ms: i64::MAX, selectors: Vec::new() };
        let mut head = Head { range: &range, series: HashMap::new(), deleted: HashMap::new() };
        let mut record = record;
        record[0] = kind;
        let _ = head.describe(&record);
        let _ = head.samples(&record, &mut Collected::default());
    }
}

fn uvarint(mut v: u64, out: &mut Vec<u8>) {
    while v >= 0x80 {
        out.push(v as u8 | 0x80);
        v >>= 7;
    }
    out.push(v as u8);
}

fn varint(v: i64, out: &mut Vec<u8>) {
    uvarint((v << 1 ^ v >> 63) as u64, out);
}

#[test]
fn series_samples_and_deletions() {
    let range = Range { start_ms: 0, end_ms: 5000, selectors: vec![promql::api::selector("up").unwrap()] };
    let mut head = Head { range: &range, series: HashMap::new(), deleted: HashMap::new() };
    let mut series = vec![1];
    for (id, name) in [(7u64, "up"), (9, "other")] {
        series.extend(id.to_be_bytes());
        uvarint(1, &mut series);
        for text in ["__name__", name] {
            uvarint(text.len() as u64, &mut series);
            series.extend(text.as_bytes());
        }
    }
    let mut deleted = vec![3];
    deleted.extend(7u64.to_be_bytes());
    varint(2000, &mut deleted);
    varint(3000, &mut deleted);
    let mut samples = vec![2];
    samples.extend(9u64.to_be_bytes());
    samples.extend(1000i64.to_be_bytes());
    for (id, ts) in [(9i64, 1000i64), (7, 1000), (7, 2000), (7, 4000), (7, 6000), (8, 1000)] {
        varint(id - 9, &mut samples);
        varint(ts - 1000, &mut samples);
        samples.extend((ts as f64).to_be_bytes());
    }
    let mut collected = Collected::default();
    for record in [&series, &deleted, &vec![4, 1], &vec![6, 1]] {
        assert_eq!(head.describe(record), Ok(None));
    }
    assert_eq!(head.describe(&[99]), Ok(Some(99)));
    head.samples(&samples, &mut collected).unwrap();
    let points: Vec<_> = collected.points.into_iter().map(|(id, p)| (id, p.floats)).collect();
    assert_eq!(points, [(7, vec![(1000, 1000.0), (4000, 4000.0)])]);
    assert!(head.samples(&samples[..samples.len() - 1], &mut Collected::default()).is_err());
}

#[test]
fn histograms_of_both_kinds() {
    let range = Range { start_ms: 0, end_ms: i64::MAX, selectors: Vec::new() };
    let head = Head { range: &range, series: HashMap::from([(1, Some(Vec::new()))]), deleted: HashMap::new() };
    let check = |kind: u8, schema: i64, counts: Counts, custom_values: Vec<f64>| {
        let mut record = vec![kind];
        record.extend(1u64.to_be_bytes());
        record.extend(1000i64.to_be_bytes());
        varint(0, &mut record);
        varint(500, &mut record);
        record.push(1);
        varint(schema, &mut record);
        record.extend(0.5f64.to_be_bytes());
        match &counts {
            Counts::Whole { count, zero, .. } => {
                uvarint(*zero, &mut record);
                uvarint(*count, &mut record);
            }
            Counts::Fractional { count, zero, .. } => {
                record.extend(zero.to_be_bytes());
                record.extend(count.to_be_bytes());
            }
        }
        record.extend(9.5f64.to_be_bytes());
        uvarint(1, &mut record);
        varint(-3, &mut record);
        uvarint(2, &mut record);
        uvarint(0, &mut record);
        uvarint(2, &mut record);
        match &counts {
            Counts::Whole { positive, .. } => positive.iter().for_each(|v| varint(*v, &mut record)),
            Counts::Fractional { positive, .. } => positive.iter().for_each(|v| record.extend(v.to_be_bytes())),
        }
        uvarint(0, &mut record);
        if schema == i64::from(CUSTOM) {
            uvarint(custom_values.len() as u64, &mut record);
            custom_values.iter().for_each(|v| record.extend(v.to_be_bytes()));
        }
        let mut collected = Collected::default();
        head.samples(&record, &mut collected).unwrap();
        let expected = Histogram {
            ts: 1500,
            schema: schema as i32,
            zero_threshold: 0.5,
            sum: 9.5,
            counts,
            positive: vec![Span { offset: -3, length: 2 }],
            negative: Vec::new(),
            custom_values,
            reset_hint: 1,
        };
        assert_eq!(collected.points[&1].histograms, [expected]);
    };
    check(7, 3, Counts::Whole { count: 9, zero: 2, positive: vec![4, -1], negative: vec![] }, vec![]);
    let fractional = Counts::Fractional { count: 9.5, zero: 0.25, positive: vec![4.5, 1.0], negative: vec![] };
    check(8, 3, fractional.clone(), vec![]);
    check(10, -53, fractional, vec![0.5, 1.5]);
}

#[test]
fn the_newest_checkpoint_stands_for_what_is_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let make = |name: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, b"").unwrap();
    };
    assert!(!is_there(dir.path()));
    for name in [
        "wal/00000003",
        "wal/00000004",
        "wal/00000005",
        "wal/00000010",
        "wal/checkpoint.00000002/00000000",
        "wal/checkpoint.00000004/00000001",
        "wal/checkpoint.00000004/00000000",
        "wal/checkpoint.00000009.tmp/00000000",
        "wbl/00000000",
    ] {
        make(name);
    }
    let files: Vec<String> = files(dir.path())
        .unwrap()
        .iter()
        .map(|path| path.strip_prefix(dir.path()).unwrap().display().to_string())
        .collect();
    assert_eq!(
        files,
        [
            "wal/checkpoint.00000004/00000000",
            "wal/checkpoint.00000004/00000001",
            "wal/00000005",
            "wal/00000010",
            "wbl/00000000",
        ]
    );
    assert!(is_there(dir.path()));
}
