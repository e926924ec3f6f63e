//! Logs that are cut, damaged, refused by the disk, and read back.

use arrow::array::{ArrayRef, AsArray, Float64Array, RecordBatch, StringArray, TimestampMillisecondArray, UInt32Array};
use arrow::datatypes::{Float64Type, UInt32Type};
use catalog::fs::{Disk, Fault, Faults, Faulty};
use catalog::tables::{EXEMPLARS, SAMPLES, time_type};
use catalog::tag::tag_set;
use catalog::{Registry, TagHasher};

use std::fs;

use super::*;

fn registry() -> Arc<Registry> {
    Arc::new(Registry::new(TagHasher::new(7), 1000))
}

fn publish(registry: &Registry, tags: TagSet) -> Result<Ordinal> {
    registry.publish(&Arc::new(Series::new(registry.hasher(), tags)), &[], 0)
}

fn named(registry: &Registry, name: &str) -> Ordinal {
    publish(registry, tag_set(&[("__name__", name)]).unwrap()).unwrap()
}

fn samples(rows: &[(u32, i64, f64)]) -> Batch {
    let mut columns = base(rows);
    columns.truncate(3);
    Batch { table: SAMPLES.clone(), rows: RecordBatch::try_new(SAMPLES.arrow().clone(), columns).unwrap() }
}

fn exemplars(rows: &[(u32, i64, f64)]) -> Batch {
    Batch { table: EXEMPLARS.clone(), rows: RecordBatch::try_new(EXEMPLARS.arrow().clone(), base(rows)).unwrap() }
}

fn base(rows: &[(u32, i64, f64)]) -> Vec<ArrayRef> {
    vec![
        Arc::new(UInt32Array::from_iter_values(rows.iter().map(|r| r.0))),
        Arc::new(TimestampMillisecondArray::from_iter_values(rows.iter().map(|r| r.1)).with_data_type(time_type())),
        Arc::new(Float64Array::from_iter_values(rows.iter().map(|r| r.2))),
        Arc::new(StringArray::from_iter_values(rows.iter().map(|r| format!("{}", r.2)))),
    ]
}

/// Names and values of a record's rows.
type Rows = Vec<(String, f64)>;
/// What a record at a position holds.
type Written = (u64, Rows);

/// Reads a log back into the rows of each record, by position, with what went wrong.
fn read(dir: &Path) -> Result<(Vec<Written>, Vec<String>)> {
    let registry = registry();
    let (mut records, mut wrong) = (vec![], vec![]);
    for (first, path) in segments(&Disk, dir)? {
        let mut segment = SegmentReader::open(&Disk, first, path)?;
        while let Some(item) = segment.next(&mut |tags| publish(&registry, tags))? {
            match item {
                Item::Record(position, record) => {
                    let mut rows = vec![];
                    for batch in record.batches {
                        let refs = batch.rows.column(0).as_primitive::<UInt32Type>();
                        let values = batch.rows.column(2).as_primitive::<Float64Type>();
                        for (r, v) in refs.values().iter().zip(values.values()) {
                            let series = registry.get(segment.ordinals()[*r as usize]).unwrap();
                            rows.push((series.tags.metric().to_owned(), *v));
                        }
                    }
                    rows.extend(record.metadata.into_iter().map(|m| (m.metric, -1.0)));
                    records.push((position, rows));
                }
                Item::Lost(..) => wrong.push("lost".to_owned()),
                Item::Damage(d) => wrong.push(if d.tail { "tail" } else { "middle" }.to_owned()),
            }
        }
    }
    Ok((records, wrong))
}

/// A log of six records; returns what they hold and where they begin.
fn write(dir: &Path) -> Vec<Written> {
    let registry = registry();
    let mut wal = Wal::open(Arc::new(Disk), dir, vec![]);
    let (a, b, c) = (named(&registry, "a"), named(&registry, "b"), named(&registry, "c"));
    let get = |o| registry.get(o);
    let metadata = MetricMetadata { metric: "m".into(), kind: "gauge".into(), help: "h".into(), unit: String::new() };
    let name = |n: &str, v: f64| (n.to_owned(), v);
    let mut out = vec![];
    let mut put = |wal: &mut Wal, ordinals: &[Ordinal], batches: &[Batch], metadata: &[MetricMetadata], rows: Rows| {
        out.push((wal.encode(ordinals, get, batches, metadata).unwrap(), rows));
    };
    put(&mut wal, &[a, b], &[samples(&[(0, 1, 1.0), (1, 1, 2.5)])], &[], vec![name("a", 1.0), name("b", 2.5)]);
    wal.commit().unwrap();
    put(&mut wal, &[b], &[samples(&[(0, 2, 3.5)])], &[], vec![name("b", 3.5)]);
    put(
        &mut wal,
        &[c, a],
        &[exemplars(&[(0, 2, 7.0)]), samples(&[(1, 2, 2.0)])],
        &[],
        vec![name("c", 7.0), name("a", 2.0)],
    );
    wal.commit().unwrap();
    put(&mut wal, &[], &[], &[metadata], vec![name("m", -1.0)]);
    wal.commit().unwrap();
    wal.roll();
    put(&mut wal, &[b], &[samples(&[(0, 3, 4.5)])], &[], vec![name("b", 4.5)]);
    put(&mut wal, &[b], &[samples(&[(0, 4, 5.5)])], &[], vec![name("b", 5.5)]);
    wal.commit().unwrap();
    out
}

#[test]
fn reads_back_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let written = write(dir.path());
    assert_eq!(read(dir.path()).unwrap(), (written, vec![]));
}

#[test]
fn a_cut_anywhere_loses_only_the_tail() {
    let dir = tempfile::tempdir().unwrap();
    let written = write(dir.path());
    let (first, path) = segments(&Disk, dir.path()).unwrap().pop().unwrap();
    let bytes = fs::read(&path).unwrap();
    for len in 0..bytes.len() {
        fs::write(&path, &bytes[..len]).unwrap();
        let (records, wrong) = read(dir.path()).unwrap();
        assert_eq!(records[..], written[..records.len()], "cut at {len}");
        let whole = written.iter().filter(|w| w.0 < first).count();
        assert!(records.len() >= whole);
        assert!(wrong.iter().all(|w| w == "tail"), "cut at {len}: {wrong:?}");
    }
}

#[test]
fn a_flipped_bit_never_gives_wrong_rows() {
    let dir = tempfile::tempdir().unwrap();
    let written = write(dir.path());
    for (first, path) in segments(&Disk, dir.path()).unwrap() {
        let bytes = fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            for bit in [1u8, 0x80] {
                let mut damaged = bytes.clone();
                damaged[at] ^= bit;
                fs::write(&path, &damaged).unwrap();
                let (records, wrong) = read(dir.path()).unwrap();
                assert!(!wrong.is_empty(), "flip at {at}");
                for record in &records {
                    assert!(written.contains(record), "flip at {at}: {record:?}");
                }
                // Only records that begin at or after the damaged one may be missing, of this segment.
                let damaged_from = written.iter().map(|w| w.0).filter(|p| *p <= first + at as u64).max().unwrap_or(0);
                for w in &written {
                    let safe = w.0 < damaged_from || w.0 < first || w.0 >= first + bytes.len() as u64;
                    assert!(!safe || records.contains(w), "flip at {at} lost {w:?}");
                }
            }
        }
        fs::write(&path, &bytes).unwrap();
    }
}

#[test]
fn damage_in_the_middle_is_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let written = write(dir.path());
    let (_, path) = segments(&Disk, dir.path()).unwrap().swap_remove(0);
    let mut bytes = fs::read(&path).unwrap();
    // The length of the second record: the third does not lean on it, but on the first.
    bytes[written[1].0 as usize + 4] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let (records, wrong) = read(dir.path()).unwrap();
    let expected: Vec<_> = written.iter().enumerate().filter(|(i, _)| *i != 1).map(|(_, w)| w.clone()).collect();
    assert_eq!((records, wrong), (expected, vec!["middle".to_owned()]));
}

#[test]
fn a_refused_write_is_not_there_later() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry();
    let faults = Faults::default();
    let mut wal = Wal::open(Arc::new(Faulty::new(Arc::new(Disk), faults.clone())), dir.path(), vec![]);
    let a = named(&registry, "a");
    let put = |wal: &mut Wal, v: f64| {
        wal.encode(&[a], |o| registry.get(o), &[samples(&[(0, v as i64, v)])], &[]).unwrap();
        wal.commit()
    };
    put(&mut wal, 1.0).unwrap();
    faults.at(faults.calls().len(), Fault::Short);
    assert_eq!(put(&mut wal, 2.0).unwrap_err().kind(), catalog::ErrorKind::Unavailable);
    put(&mut wal, 3.0).unwrap();
    let (records, _) = read(dir.path()).unwrap();
    let values: Vec<f64> = records.iter().map(|r| r.1[0].1).collect();
    assert_eq!(values, [1.0, 3.0]);
    assert_eq!(segments(&Disk, dir.path()).unwrap().len(), 2);
}

#[test]
fn only_whole_segments_before_a_position_are_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let written = write(dir.path());
    let replayed: Vec<Replayed> = segments(&Disk, dir.path())
        .unwrap()
        .into_iter()
        .map(|(f, p)| SegmentReader::open(&Disk, f, p).unwrap().finish())
        .collect();
    let mut wal = Wal::open(Arc::new(Disk), dir.path(), replayed);
    let check = |wal: &mut Wal, position: u64, left: usize| {
        wal.trim(position).unwrap();
        assert_eq!(segments(&Disk, dir.path()).unwrap().len(), left, "{position}");
    };
    check(&mut wal, 0, 2);
    check(&mut wal, written[3].0, 2);
    check(&mut wal, written[4].0, 1);
    check(&mut wal, u64::MAX, 0);
    assert_eq!(wal.bytes(), 0);
}

#[test]
fn a_newer_format_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = head(0);
    bytes[8] = 9;
    let crc = crc32fast::hash(&bytes[..20]);
    bytes[20..].copy_from_slice(&crc.to_le_bytes());
    fs::write(dir.path().join(format!("{:020}.wal", 0)), bytes).unwrap();
    let e = read(dir.path()).unwrap_err();
    assert!(e.message().contains("format version 9"), "{e}");
}

#[test]
fn a_record_that_is_refused_leaves_the_rest_readable() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry();
    let mut wal = Wal::open(Arc::new(Disk), dir.path(), vec![]);
    let (a, b) = (named(&registry, "a"), named(&registry, "b"));
    let put = |wal: &mut Wal, ordinal: Ordinal, v: f64| {
        wal.encode(&[ordinal], |o| registry.get(o), &[samples(&[(0, v as i64, v)])], &[])
    };
    put(&mut wal, a, 1.0).unwrap();
    // An ordinal without a tag set, in the middle of a group.
    put(&mut wal, 77, 2.0).unwrap_err();
    put(&mut wal, b, 3.0).unwrap();
    put(&mut wal, a, 4.0).unwrap();
    wal.commit().unwrap();
    let (records, wrong) = read(dir.path()).unwrap();
    let rows: Vec<_> = records.into_iter().flat_map(|r| r.1).collect();
    let expected = [("a", 1.0), ("b", 3.0), ("a", 4.0)].map(|(n, v)| (n.to_owned(), v));
    assert_eq!((rows, wrong), (expected.to_vec(), vec![]));
}

proptest::proptest! {
    #[test]
    fn any_payload_is_decoded_or_refused(
        kind in proptest::sample::select(vec![1u8, 2, 4]),
        section in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..100),
    ) {
        let registry = registry();
        let mut payload = vec![1, kind, section.len() as u8];
        payload.extend_from_slice(&section);
        let mut reader = Reader::default();
        let _ = reader.decode(&payload, &mut |tags| publish(&registry, tags));
        payload[0] = 2;
        let _ = reader.decode(&payload, &mut |tags| publish(&registry, tags));
    }
}
