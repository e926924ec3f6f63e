//! Segments written and read back, whole and in part, sound and damaged.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, AsArray, Float64Array, Int8Array, Int32Array, Int64Array, ListArray, RecordBatch,
    TimestampMillisecondArray, UInt32Array,
};
use arrow::buffer::{OffsetBuffer, ScalarBuffer};
use arrow::compute::concat_batches;
use arrow::datatypes::{DataType, Float64Type, TimestampMillisecondType, UInt32Type};
use bytes::Bytes;
use catalog::tables::{EXEMPLARS, HISTOGRAMS, SAMPLES, time_type};
use catalog::{ErrorKind, Result, TableSchema};
use object_store::memory::InMemory;
use parquet::file::metadata::ParquetMetaDataReader;
use proptest::prelude::*;

use super::write::Written;
use super::*;
use crate::memtable::read_schema;

const DAY: i32 = 19_675;
const START: i64 = DAY as i64 * 86_400_000;

fn keys(n: i64) -> Vec<Key> {
    (0..n).map(|k| Key { metric: k / 10 - 3, target: k / 3, series: k * 7919 % 1000 - 500 + k * 10_000 }).collect()
}

fn samples(rows: &BTreeMap<(u32, i64), u64>) -> RecordBatch {
    let ts = TimestampMillisecondArray::from(rows.keys().map(|k| k.1).collect::<Vec<_>>());
    let columns: Vec<ArrayRef> = vec![
        Arc::new(UInt32Array::from_iter_values(rows.keys().map(|k| k.0))),
        Arc::new(ts.with_data_type(time_type())),
        Arc::new(Float64Array::from_iter_values(rows.values().map(|v| f64::from_bits(*v)))),
    ];
    RecordBatch::try_new(read_schema(&SAMPLES, &[1, 2]), columns).unwrap()
}

fn write(table: &Arc<TableSchema>, keys: &[Key], batches: &[RecordBatch]) -> Written {
    let description = Description {
        id: 7,
        table: table.name.to_owned(),
        table_id: table.id,
        schema_version: table.version,
        day: DAY,
        level: 0,
        seq_min: 3,
        seq_max: 5,
        supersedes: vec![1, 2],
    };
    let mut writer = Writer::new(table, description).unwrap();
    batches.iter().for_each(|b| writer.write(keys, b).unwrap());
    let mut written = writer.finish().unwrap();
    written.file.path = "f".to_owned();
    written
}

/// Reads all that `request` asks for from an object with these bytes.
fn read(written: &Written, bytes: Bytes, request: Request) -> Result<RecordBatch> {
    futures::executor::block_on(async {
        let segments = Arc::new(Segments::new(Arc::new(InMemory::new()), "d", 1 << 20));
        segments.put("f", bytes).await?;
        let schema = read_schema(&request.table, &request.columns);
        let mut cursor = Cursor::new(segments, Arc::new(written.file.clone()), Arc::new(request));
        let mut out = Vec::new();
        while let Some(batch) = cursor.next().await? {
            assert!(batch.num_rows() > 0);
            out.push(batch);
        }
        Ok(concat_batches(&schema, &out)?)
    })
}

fn request(table: &Arc<TableSchema>, keys: &[Key], range: Range<usize>, time: (i64, i64)) -> Request {
    Request {
        table: table.clone(),
        keys: Arc::new(keys.to_vec()),
        range,
        start_ms: time.0,
        end_ms: time.1,
        columns: (1..table.columns.len()).collect(),
        cuts: None,
    }
}

fn rows_of(batch: &RecordBatch) -> BTreeMap<(u32, i64), u64> {
    let series = batch.column(0).as_primitive::<UInt32Type>().values();
    let ts = batch.column(1).as_primitive::<TimestampMillisecondType>().values();
    let values = batch.column(2).as_primitive::<Float64Type>().values();
    series.iter().zip(ts).zip(values).map(|((s, t), v)| ((*s, *t), v.to_bits())).collect()
}

fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (0u32..2000).prop_map(|v| (f64::from(v) / 4.0).to_bits()),
        1 => any::<u64>(),
        1 => Just(0x7ff0_0000_0000_0002),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn samples_come_back(
        rows in prop::collection::btree_map((0u32..40, (0i64..86_400).prop_map(|s| START + s * 1000)), value(), 1..800),
        cut in 1usize..300,
        from in 0usize..40,
        n in 0usize..40,
        time in (0i64..86_400, 0i64..86_400),
    ) {
        let keys = keys(40);
        let all = samples(&rows);
        let batches: Vec<_> =
            (0..all.num_rows()).step_by(cut).map(|at| all.slice(at, cut.min(all.num_rows() - at))).collect();
        let written = write(&SAMPLES, &keys, &batches);
        let range = from..(from + n).min(40);
        let time = (START + time.0 * 1000, START + (time.0 + time.1) * 1000);
        for (range, time) in [(0..40, (i64::MIN, i64::MAX)), (range.clone(), (i64::MIN, i64::MAX)), (range, time)] {
            let expected: BTreeMap<_, _> = rows
                .iter()
                .filter(|((s, t), _)| range.contains(&(*s as usize)) && (time.0..=time.1).contains(t))
                .map(|(k, v)| (*k, *v))
                .collect();
            let got = read(&written, written.bytes.clone(), request(&SAMPLES, &keys, range, time)).unwrap();
            // As batches, so that order and repetition count too.
            prop_assert_eq!(rows_of(&got), expected.clone());
            prop_assert_eq!(got.num_rows(), expected.len());
        }
    }
}

#[test]
fn long_files_have_row_groups_and_pages() {
    // 1,300 series with 900 rows: two row groups, the border within a series.
    let keys: Vec<Key> = (0..1300).map(|k| Key { metric: k / 100, target: 0, series: k }).collect();
    let mut batches = Vec::new();
    for chunk in 0..130u32 {
        let rows = (0..9000u32).map(|i| {
            let (series, n) = (chunk * 10 + i / 900, i64::from(i % 900));
            ((series, START + n * 15_000), (f64::from(series) + n as f64 / 2.0).to_bits())
        });
        batches.push(samples(&rows.collect()));
    }
    let written = write(&SAMPLES, &keys, &batches);
    assert_eq!((written.file.rows, written.file.day), (1_170_000, DAY));
    assert_eq!((written.file.ts_min, written.file.ts_max), (START, START + 899 * 15_000));
    assert_eq!((written.file.metric_min, written.file.metric_max), (0, 12));
    assert_eq!((written.file.seq_min, written.file.seq_max), (3, 5));
    assert!(written.bytes.len() < 1_170_000 / 10, "{} bytes", written.bytes.len());
    let n = |range: Range<usize>, time: (i64, i64)| {
        read(&written, written.bytes.clone(), request(&SAMPLES, &keys, range, time)).unwrap().num_rows()
    };
    assert_eq!(n(0..1300, (i64::MIN, i64::MAX)), 1_170_000);
    assert_eq!(n(1165..1166, (i64::MIN, i64::MAX)), 900);
    assert_eq!(n(1160..1170, (START + 15_000, START + 29_999)), 10);
    assert_eq!(n(7..8, (START + 15_000, START + 30_000)), 2);
    assert_eq!(n(0..1300, (START - 2, START - 1)), 0);
    let segments = Segments::new(Arc::new(InMemory::new()), "d", 64 << 20);
    futures::executor::block_on(async {
        segments.put("f", written.bytes.clone()).await.unwrap();
        assert_eq!(segments.keys(&SAMPLES, &written.file).await.unwrap().0, keys);
    });
}

#[test]
fn row_groups_have_few_series() {
    let n = 150_000;
    let keys: Vec<Key> = (0..i64::from(n)).map(|k| Key { metric: k / 1000, target: k % 1000, series: k }).collect();
    // Batches that end within a group, and a series that goes on in the next one.
    let rows = |from: u32, to: u32| samples(&(from..to).map(|k| ((k, START), 7)).collect());
    let written = write(
        &SAMPLES,
        &keys,
        &[
            rows(0, 70_000),
            rows(70_000, 70_001),
            {
                let again: BTreeMap<(u32, i64), u64> = [((70_000, START + 1), 8)].into();
                samples(&again)
            },
            rows(70_001, n),
        ],
    );
    assert_eq!(written.file.rows, u64::from(n) + 1);
    let all =
        read(&written, written.bytes.clone(), request(&SAMPLES, &keys, 0..keys.len(), (i64::MIN, i64::MAX))).unwrap();
    assert_eq!(rows_of(&all).len(), n as usize + 1);
    assert_eq!(all.num_rows(), n as usize + 1);
    let segments = Segments::new(Arc::new(InMemory::new()), "d", 64 << 20);
    futures::executor::block_on(async {
        segments.put("f", written.bytes.clone()).await.unwrap();
        let (found, held) = segments.keys(&SAMPLES, &written.file).await.unwrap();
        assert_eq!(found, keys);
        assert!(held < GROUP_SERIES * 160, "{held} bytes are held while it is read");
    });
}

/// One row of every kind of column, with nulls and empty lists.
fn histograms(n: u32) -> RecordBatch {
    let columns: Vec<usize> = (1..HISTOGRAMS.columns.len()).collect();
    let schema = read_schema(&HISTOGRAMS, &columns);
    let rows = n as usize;
    let offsets = OffsetBuffer::new(ScalarBuffer::from((0..=n as i32).map(|i| i * (i - 1) / 2).collect::<Vec<_>>()));
    let total = *offsets.last().unwrap();
    let arrays = schema.fields().iter().enumerate().map(|(i, f)| -> ArrayRef {
        let odd = |r: usize| f.is_nullable() && r % 2 == 1;
        match f.data_type() {
            DataType::UInt32 => Arc::new(UInt32Array::from_iter_values((0..n).map(|r| r / 3))),
            DataType::Timestamp(..) => {
                let ts = TimestampMillisecondArray::from_iter_values((0..n).map(|r| START + i64::from(r)));
                Arc::new(ts.with_data_type(f.data_type().clone()))
            }
            DataType::Int8 => Arc::new(Int8Array::from_iter_values((0..rows).map(|r| r as i8))),
            DataType::Int32 => Arc::new(Int32Array::from_iter_values((0..rows).map(|r| r as i32 - 4))),
            DataType::Int64 => {
                Arc::new((0..rows).map(|r| (!odd(r)).then_some(r as i64 * 1000)).collect::<Int64Array>())
            }
            DataType::Float64 => {
                Arc::new((0..rows).map(|r| (!odd(r)).then_some(r as f64 * 0.3)).collect::<Float64Array>())
            }
            DataType::List(item) => {
                let values: ArrayRef = match item.data_type() {
                    DataType::Int32 => Arc::new(Int32Array::from_iter_values((0..total).map(|v| v * i as i32))),
                    DataType::Int64 => Arc::new(Int64Array::from_iter_values((0..total).map(i64::from))),
                    _ => Arc::new(Float64Array::from_iter_values((0..total).map(|v| f64::from(v) / 3.0))),
                };
                Arc::new(ListArray::new(item.clone(), offsets.clone(), values, None))
            }
            other => panic!("no rows for {other}"),
        }
    });
    RecordBatch::try_new(schema.clone(), arrays.collect()).unwrap()
}

#[test]
fn other_tables_come_back() {
    let keys = keys(10);
    let rows = histograms(30);
    let written = write(&HISTOGRAMS, &keys, std::slice::from_ref(&rows));
    let all = (i64::MIN, i64::MAX);
    let got = read(&written, written.bytes.clone(), request(&HISTOGRAMS, &keys, 0..10, all)).unwrap();
    assert_eq!(got, rows);
    let part = (START + 7, START + 13);
    let got = read(&written, written.bytes.clone(), request(&HISTOGRAMS, &keys, 0..10, part)).unwrap();
    assert_eq!(got, rows.slice(7, 7));
    // Some columns, in another order, without the time.
    let some = Request { columns: vec![5, 2], ..request(&HISTOGRAMS, &keys, 3..10, all) };
    let got = read(&written, written.bytes.clone(), some).unwrap();
    assert_eq!(got, rows.slice(9, 21).project(&[0, 5, 2]).unwrap());
    assert!(Writer::new(&EXEMPLARS, description(&EXEMPLARS)).unwrap().write(&keys, &rows).is_err());
    assert!(Writer::new(&EXEMPLARS, description(&EXEMPLARS)).unwrap().finish().is_err());
}

/// A file that says of itself that it has format 2, and is sound otherwise.
fn newer(written: &Written) -> Written {
    let mut bytes = written.bytes.to_vec();
    let put = |bytes: &mut [u8], after: &[u8], text: &[u8]| {
        let at = bytes.windows(after.len()).rposition(|w| w == after).unwrap() + after.len();
        bytes[at..at + text.len()].copy_from_slice(text);
    };
    // In the footer an entry is its key, a field's head, the length of its value, and the value.
    put(&mut bytes, b"thalweg.format\x18\x01", b"2");
    let meta = ParquetMetaDataReader::new().parse_and_finish(&Bytes::from(bytes.clone())).unwrap();
    let mut crc = crc32fast::Hasher::new();
    for e in meta.file_metadata().key_value_metadata().unwrap().iter().filter(|e| e.key != "thalweg.check") {
        crc.update(e.key.as_bytes());
        crc.update(e.value.as_ref().unwrap().as_bytes());
    }
    put(&mut bytes, b"thalweg.check\x18\x08", format!("{:08x}", crc.finalize()).as_bytes());
    let footer = bytes.len() - written.file.footer_bytes as usize - 8;
    let file = catalog::DataFile { crc32: crc32fast::hash(&bytes[footer..]), ..written.file.clone() };
    Written { file, bytes: bytes.into() }
}

#[test]
fn a_newer_format_is_refused_by_name() {
    let keys = keys(1);
    let newer = newer(&write(&SAMPLES, &keys, &[samples(&BTreeMap::from([((0, START), 0)]))]));
    let e = read(&newer, newer.bytes.clone(), request(&SAMPLES, &keys, 0..1, (i64::MIN, i64::MAX))).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Invalid);
    assert!(e.to_string().starts_with("segment f: segment has format 2, which this version does not know"), "{e}");
}

#[test]
fn damage_is_confined_to_its_pages() {
    // 100 series of 1,000 rows: four pages of values.
    let keys: Vec<Key> = (0..100).map(|k| Key { metric: k, target: 0, series: k }).collect();
    let rows = (0..100_000u32).map(|i| {
        let (series, n) = (i / 1000, i64::from(i % 1000));
        ((series, START + n * 1000), f64::from(i).sqrt().to_bits())
    });
    let written = write(&SAMPLES, &keys, &[samples(&rows.collect())]);
    let one = |at: usize| request(&SAMPLES, &keys, at..at + 1, (i64::MIN, i64::MAX));
    let mut damaged = 0;
    // Somewhere in the doubles, which are all that is large here.
    for at in (written.bytes.len() / 4..written.bytes.len() * 3 / 4).step_by(written.bytes.len() / 10) {
        let mut bytes = written.bytes.to_vec();
        bytes[at] ^= 1;
        let answers: Vec<bool> = (0..100)
            .map(|series| match read(&written, Bytes::from(bytes.clone()), one(series)) {
                Ok(got) => {
                    assert_eq!(got.num_rows(), 1000);
                    true
                }
                Err(e) => {
                    assert!(e.to_string().contains("page at byte"), "{e}");
                    false
                }
            })
            .collect();
        let lost = answers.iter().filter(|ok| !**ok).count();
        assert!((1..=34).contains(&lost), "byte {at}: {lost} of 100 series can't be read");
        damaged += 1;
    }
    assert!(damaged >= 4);
}

fn description(table: &TableSchema) -> Description {
    Description {
        id: 1,
        table: table.name.to_owned(),
        table_id: table.id,
        schema_version: table.version,
        day: DAY,
        level: 0,
        seq_min: 1,
        seq_max: 1,
        supersedes: vec![],
    }
}

#[test]
fn damage_is_an_error_and_never_another_value() {
    let keys = keys(12);
    let rows: BTreeMap<_, _> = (0..300u32)
        .map(|i| ((i / 25, START + i64::from(i % 25) * 15_000), f64::from(i).sqrt().to_bits() * u64::from(i % 40 != 7)))
        .collect();
    let written = write(&SAMPLES, &keys, &[samples(&rows)]);
    let all = || request(&SAMPLES, &keys, 0..12, (i64::MIN, i64::MAX));
    let check = |bytes: Vec<u8>, what: &str| match read(&written, Bytes::from(bytes), all()) {
        Ok(got) => assert_eq!(rows_of(&got), rows, "{what}"),
        Err(e) => {
            assert!(matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Invalid | ErrorKind::Unavailable), "{what}: {e}")
        }
    };
    check(written.bytes.to_vec(), "sound");
    for at in 0..written.bytes.len() {
        let mut bytes = written.bytes.to_vec();
        bytes[at] ^= 1 << (at % 8);
        check(bytes, &format!("byte {at}"));
    }
    for len in (0..written.bytes.len()).step_by(7) {
        check(written.bytes[..len].to_vec(), &format!("cut at {len}"));
    }
    // What reads everything finds damage wherever it is, also where a query would not come across it.
    let segments = Segments::new(Arc::new(InMemory::new()), "d", 0);
    let whole = |bytes: &[u8], file: &catalog::DataFile| {
        futures::executor::block_on(async {
            segments.put("f", Bytes::copy_from_slice(bytes)).await?;
            segments.forget(|_| false);
            segments.check(&SAMPLES, file).await
        })
    };
    let found = whole(&written.bytes, &written.file).unwrap();
    assert_eq!(found, keys);
    let mut bytes = written.bytes.to_vec();
    for at in 0..bytes.len() {
        bytes[at] ^= 1 << (at % 8);
        let e = whole(&bytes, &written.file).unwrap_err();
        assert!(e.kind() == ErrorKind::Corrupt && e.to_string().starts_with("segment f: "), "byte {at}: {e}");
        bytes[at] ^= 1 << (at % 8);
    }
    for wrong in [
        catalog::DataFile { rows: 299, ..written.file.clone() },
        catalog::DataFile { ts_min: START - 1, ..written.file.clone() },
        catalog::DataFile { metric_max: 9, ..written.file.clone() },
        catalog::DataFile { seq_max: 6, ..written.file.clone() },
        catalog::DataFile { level: 1, ..written.file.clone() },
        catalog::DataFile { day: DAY + 1, ..written.file.clone() },
        catalog::DataFile { bytes: written.file.bytes - 1, ..written.file.clone() },
    ] {
        assert_eq!(whole(&bytes, &wrong).unwrap_err().kind(), ErrorKind::Corrupt, "{wrong:?}");
    }
    // An object of another file in its place, an empty one, and one that is cut off: worth no second try.
    for bytes in [&written.bytes[..0], &written.bytes[..written.bytes.len() - 1]] {
        let e = read(&written, Bytes::copy_from_slice(bytes), all()).unwrap_err();
        assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains("the file catalog says"), "{e}");
    }
    let other = Written { file: catalog::DataFile { id: 8, ..written.file.clone() }, bytes: Bytes::new() };
    let e = read(&other, written.bytes.clone(), all()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Corrupt);
}
