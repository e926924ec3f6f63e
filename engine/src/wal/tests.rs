//! Logs that are cut, damaged, refused by the disk, taken over, and read back.

use std::fs;
use std::path::PathBuf;

use arrow::array::{ArrayRef, AsArray, Float64Array, RecordBatch, StringArray, TimestampMillisecondArray, UInt32Array};
use arrow::datatypes::{Float64Type, UInt32Type};
use catalog::fs::{Disk, Fault, Faults, Faulty};
use catalog::tables::{EXEMPLARS, SAMPLES, time_type};
use catalog::tag::tag_set;
use catalog::{Registry, TagHasher, TagSet};
use futures::executor::block_on;

mod objects;

use super::record::Reader;
use super::replay::Chunk;
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

fn local(dir: &Path) -> Storage {
    Storage::local(Arc::new(Disk), dir)
}

/// Positions and paths of the segments in a folder.
fn segments(dir: &Path) -> Vec<(u64, PathBuf)> {
    let Storage::Local(local) = local(dir) else { return vec![] };
    local.list().unwrap().into_iter().map(|(first, name)| (first, dir.join(name))).collect()
}

/// Reads a log back into the rows of each record, by position, with what went wrong, and opens it.
async fn reopen(storage: Storage, owner: u64) -> Result<(Vec<Written>, Vec<String>, Wal)> {
    let registry = registry();
    let (mut records, mut wrong) = (vec![], vec![]);
    let mut replay = Replay::open(storage, owner).await?;
    while let Some(item) = replay.next(&mut |tags| publish(&registry, tags)).await? {
        match item {
            Item::Record(position, record) => {
                let mut rows = vec![];
                for batch in record.batches {
                    let refs = batch.rows.column(0).as_primitive::<UInt32Type>();
                    let values = batch.rows.column(2).as_primitive::<Float64Type>();
                    for (r, v) in refs.values().iter().zip(values.values()) {
                        let series = registry.get(replay.ordinals()[*r as usize]).unwrap();
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
    Ok((records, wrong, replay.finish()?))
}

fn read(dir: &Path) -> Result<(Vec<Written>, Vec<String>)> {
    block_on(reopen(local(dir), 1)).map(|(records, wrong, _)| (records, wrong))
}

/// A log of six records; returns what they hold and where they begin.
fn write(dir: &Path) -> Vec<Written> {
    let registry = registry();
    let mut wal = Wal::new(local(dir), 1);
    let (a, b, c) = (named(&registry, "a"), named(&registry, "b"), named(&registry, "c"));
    let get = |o| registry.get(o);
    let metadata = MetricMetadata { metric: "m".into(), kind: "gauge".into(), help: "h".into(), unit: String::new() };
    let name = |n: &str, v: f64| (n.to_owned(), v);
    let mut out = vec![];
    let mut put = |wal: &mut Wal, ordinals: &[Ordinal], batches: &[Batch], metadata: &[MetricMetadata], rows: Rows| {
        out.push((wal.encode(ordinals, get, batches, metadata).unwrap(), rows));
    };
    put(&mut wal, &[a, b], &[samples(&[(0, 1, 1.0), (1, 1, 2.5)])], &[], vec![name("a", 1.0), name("b", 2.5)]);
    block_on(wal.commit()).unwrap();
    put(&mut wal, &[b], &[samples(&[(0, 2, 3.5)])], &[], vec![name("b", 3.5)]);
    put(
        &mut wal,
        &[c, a],
        &[exemplars(&[(0, 2, 7.0)]), samples(&[(1, 2, 2.0)])],
        &[],
        vec![name("c", 7.0), name("a", 2.0)],
    );
    block_on(wal.commit()).unwrap();
    put(&mut wal, &[], &[], &[metadata], vec![name("m", -1.0)]);
    block_on(wal.commit()).unwrap();
    wal.roll();
    put(&mut wal, &[b], &[samples(&[(0, 3, 4.5)])], &[], vec![name("b", 4.5)]);
    put(&mut wal, &[b], &[samples(&[(0, 4, 5.5)])], &[], vec![name("b", 5.5)]);
    block_on(wal.commit()).unwrap();
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
    let (first, path) = segments(dir.path()).pop().unwrap();
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
    for (first, path) in segments(dir.path()) {
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
    let (_, path) = segments(dir.path()).swap_remove(0);
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
    let fs = Arc::new(Faulty::new(Arc::new(Disk), faults.clone()));
    let mut wal = Wal::new(Storage::local(fs, dir.path()), 1);
    let a = named(&registry, "a");
    let put = |wal: &mut Wal, v: f64| {
        wal.encode(&[a], |o| registry.get(o), &[samples(&[(0, v as i64, v)])], &[]).unwrap();
        block_on(wal.commit())
    };
    put(&mut wal, 1.0).unwrap();
    faults.at(faults.calls().len(), Fault::Short);
    assert_eq!(put(&mut wal, 2.0).unwrap_err().kind(), catalog::ErrorKind::Unavailable);
    put(&mut wal, 3.0).unwrap();
    let (records, _) = read(dir.path()).unwrap();
    let values: Vec<f64> = records.iter().map(|r| r.1[0].1).collect();
    assert_eq!(values, [1.0, 3.0]);
    assert_eq!(segments(dir.path()).len(), 2);
}

#[test]
fn only_whole_segments_before_a_position_are_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let written = write(dir.path());
    let (_, _, mut wal) = block_on(reopen(local(dir.path()), 1)).unwrap();
    let check = |wal: &mut Wal, position: u64, left: usize| {
        block_on(wal.trim(position)).unwrap();
        assert_eq!(segments(dir.path()).len(), left, "{position}");
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
    let mut bytes = [&MAGIC[..], &9u32.to_le_bytes(), &[0; 12]].concat();
    seal(&mut bytes);
    fs::write(dir.path().join(format!("{:020}.wal", 0)), bytes).unwrap();
    let e = read(dir.path()).unwrap_err();
    assert!(e.message().contains("format version 9"), "{e}");
}

#[test]
fn a_record_that_is_refused_leaves_the_rest_readable() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry();
    let mut wal = Wal::new(local(dir.path()), 1);
    let (a, b) = (named(&registry, "a"), named(&registry, "b"));
    let put = |wal: &mut Wal, ordinal: Ordinal, v: f64| {
        wal.encode(&[ordinal], |o| registry.get(o), &[samples(&[(0, v as i64, v)])], &[])
    };
    put(&mut wal, a, 1.0).unwrap();
    // An ordinal without a tag set, in the middle of a group.
    put(&mut wal, 77, 2.0).unwrap_err();
    put(&mut wal, b, 3.0).unwrap();
    put(&mut wal, a, 4.0).unwrap();
    block_on(wal.commit()).unwrap();
    let (records, wrong) = read(dir.path()).unwrap();
    let rows: Vec<_> = records.into_iter().flat_map(|r| r.1).collect();
    let expected = [("a", 1.0), ("b", 3.0), ("a", 4.0)].map(|(n, v)| (n.to_owned(), v));
    assert_eq!((rows, wrong), (expected.to_vec(), vec![]));
}

/// Values of a log's records, in order, when each holds one.
fn values(records: &[Written]) -> Vec<f64> {
    records.iter().map(|r| r.1[0].1).collect()
}

/// Appends a value; the log's answer.
async fn put(wal: &mut Wal, registry: &Registry, v: f64) -> Result<u64> {
    let a = named(registry, "a");
    wal.encode(&[a], |o| registry.get(o), &[samples(&[(0, v as i64, v)])], &[])?;
    wal.commit().await
}

#[test]
fn what_could_not_be_taken_back_is_void() {
    // The group fails at its sync, and then the cut or the removal fails too.
    for first in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let faults = Faults::default();
        let fs = Arc::new(Faulty::new(Arc::new(Disk), faults.clone()));
        let registry = registry();
        let mut wal = Wal::new(Storage::local(fs, dir.path()), 1);
        let mut expected = vec![];
        if !first {
            block_on(put(&mut wal, &registry, 1.0)).unwrap();
            expected.push(1.0);
        }
        let call = faults.calls().len();
        let sync = call + 1 + usize::from(first);
        (sync..sync + 2).for_each(|n| faults.at(n, Fault::Io));
        block_on(put(&mut wal, &registry, 2.0)).unwrap_err();
        let read_values = || block_on(reopen(local(dir.path()), 1)).map(|r| (values(&r.0), r.1)).unwrap();
        // Until something follows it may be there, whole.
        assert_eq!(read_values(), ([&expected[..], &[2.0]].concat(), vec![]));
        block_on(put(&mut wal, &registry, 3.0)).unwrap();
        expected.push(3.0);
        assert_eq!(read_values(), (expected.clone(), vec![]), "first {first}");
        let (_, _, mut wal) = block_on(reopen(local(dir.path()), 2)).unwrap();
        block_on(put(&mut wal, &registry, 4.0)).unwrap();
        expected.push(4.0);
        assert_eq!(read_values(), (expected, vec![]));
        wal.roll();
        block_on(wal.trim(wal.position())).unwrap();
        assert_eq!(segments(dir.path()), vec![]);
    }
}

#[test]
fn what_was_taken_back_stays_away_before_a_delete_counts_on_it() {
    for fails in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let faults = Faults::default();
        let fs = Arc::new(Faulty::new(Arc::new(Disk), faults.clone()));
        let mut wal = Wal::new(Storage::local(fs, dir.path()), 1);
        let call = faults.calls().len();
        let calls = |from: usize| faults.calls()[from..].iter().map(|c| c.what).collect::<Vec<_>>();
        faults.at(call + 2, Fault::Sync);
        if fails {
            faults.at(call + 4, Fault::Sync);
        }
        block_on(put(&mut wal, &registry(), 1.0)).unwrap_err();
        assert_eq!(calls(call), ["create", "write_all", "sync", "remove", "sync_dir"]);
        let position = wal.position();
        assert_eq!(wal.oldest() < position, fails, "it counts until it is gone for good");
        block_on(wal.trim(position)).unwrap();
        assert_eq!(calls(call + 5).contains(&"sync_dir"), fails);
        assert_eq!(wal.oldest(), position);
    }
}

#[test]
fn a_segment_that_is_gone_or_cut_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry();
    let mut wal = Wal::new(local(dir.path()), 1);
    for v in 0..6 {
        block_on(put(&mut wal, &registry, f64::from(v))).unwrap();
        if v % 2 == 1 {
            wal.roll();
        }
    }
    let paths = segments(dir.path());
    let bytes = fs::read(&paths[1].1).unwrap();
    fs::write(&paths[1].1, &bytes[..bytes.len() - 1]).unwrap();
    let (records, wrong) = read(dir.path()).unwrap();
    // What is left of the record, and what is not.
    assert_eq!((values(&records), wrong), (vec![0.0, 1.0, 2.0, 4.0, 5.0], vec!["middle".to_owned(); 2]));
    fs::write(&paths[1].1, &bytes[..Head::BYTES]).unwrap();
    let (records, wrong) = read(dir.path()).unwrap();
    assert_eq!((values(&records), wrong), (vec![0.0, 1.0, 4.0, 5.0], vec!["middle".to_owned()]));
    fs::remove_file(&paths[1].1).unwrap();
    let (records, wrong) = read(dir.path()).unwrap();
    assert_eq!((values(&records), wrong), (vec![0.0, 1.0, 4.0, 5.0], vec!["middle".to_owned()]));
    // The oldest one too: the mark, which the first start made, knows of no trim.
    fs::remove_file(&paths[0].1).unwrap();
    assert_eq!(read(dir.path()).unwrap().1, ["middle"]);
    // A version without marks could have trimmed it.
    fs::remove_file(dir.path().join(mark::NAME)).unwrap();
    assert_eq!(read(dir.path()).unwrap().1, Vec::<String>::new());
}

/// The names that damage is given, and the values that are there.
fn damage(dir: &Path) -> (Vec<f64>, Vec<String>) {
    let registry = registry();
    let (mut found, mut named) = (vec![], vec![]);
    let mut replay = block_on(Replay::open(local(dir), 9)).unwrap();
    while let Some(item) = block_on(replay.next(&mut |tags| publish(&registry, tags))).unwrap() {
        match item {
            Item::Record(_, record) => {
                found.push(record.batches[0].rows.column(2).as_primitive::<Float64Type>().value(0));
            }
            Item::Damage(d) if !d.tail => named.push(d.chunk),
            other => panic!("{other:?}"),
        }
    }
    (found, named)
}

#[test]
fn a_newest_segment_that_is_gone_or_cut_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry();
    let (_, _, mut wal) = block_on(reopen(local(dir.path()), 1)).unwrap();
    let mut ends = vec![];
    for v in 0..6 {
        block_on(put(&mut wal, &registry, f64::from(v))).unwrap();
        ends.push(wal.position());
        if v == 2 {
            wal.roll();
        }
    }
    // However it ended: nothing more is said at the end of a process.
    drop(wal);
    let (first, path) = segments(dir.path()).pop().unwrap();
    let name = path.file_name().unwrap().to_str().unwrap().to_owned();
    let bytes = fs::read(&path).unwrap();
    let all: Vec<f64> = (0..6).map(f64::from).collect();
    assert_eq!(damage(dir.path()), (all.clone(), vec![]));
    for len in 0..bytes.len() {
        fs::write(&path, &bytes[..len]).unwrap();
        let (found, named) = damage(dir.path());
        let whole = ends.iter().filter(|end| **end <= first + len as u64).count();
        assert_eq!(found, all[..whole.max(3)], "cut at {len}");
        assert!(!named.is_empty() && named.iter().all(|n| n.contains(&name)), "cut at {len}: {named:?}");
    }
    fs::remove_file(&path).unwrap();
    let (found, named) = damage(dir.path());
    assert_eq!(found, all[..3]);
    assert!(named.len() == 1 && named[0].contains(&name), "{named:?}");
    // All of the log, as well.
    let (_, oldest) = segments(dir.path()).pop().unwrap();
    fs::rename(&oldest, dir.path().join("elsewhere")).unwrap();
    assert_eq!(block_on(local(dir.path()).holds(9)).unwrap(), Some(1));
    assert_eq!(damage(dir.path()), (vec![], vec![name.clone()]));
    // It is said once, and the log goes on behind it.
    let (records, wrong, mut wal) = block_on(reopen(local(dir.path()), 2)).unwrap();
    assert_eq!((records, wrong), (vec![], vec!["middle".to_owned()]));
    assert_eq!(wal.position(), *ends.last().unwrap());
    assert_eq!(damage(dir.path()), (vec![], vec![]));
    assert_eq!(block_on(local(dir.path()).holds(9)).unwrap(), None);
    block_on(put(&mut wal, &registry, 7.0)).unwrap();
    assert_eq!(damage(dir.path()), (vec![7.0], vec![]));
}

#[test]
fn a_mark_never_claims_what_may_be_gone() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry();
    let mark = dir.path().join(mark::NAME);
    let (_, _, mut wal) = block_on(reopen(local(dir.path()), 1)).unwrap();
    let mut marks = vec![fs::read(&mark).unwrap()];
    let mut synced = 0;
    for v in 0..9 {
        block_on(put(&mut wal, &registry, f64::from(v))).unwrap();
        marks.push(fs::read(&mark).unwrap());
        if v % 3 == 2 {
            wal.roll();
            if v == 5 {
                block_on(wal.trim(wal.position())).unwrap();
                synced = marks.len();
                marks.push(fs::read(&mark).unwrap());
            }
        }
    }
    // A power loss brings back any that was written since the last that was synced; a torn one says nothing.
    for bytes in &marks[synced..] {
        fs::write(&mark, bytes).unwrap();
        assert_eq!(damage(dir.path()), (vec![6.0, 7.0, 8.0], vec![]));
        for at in 0..bytes.len() {
            let mut torn = bytes.clone();
            torn[at] ^= 1;
            fs::write(&mark, &torn).unwrap();
            assert_eq!(damage(dir.path()), (vec![6.0, 7.0, 8.0], vec![]), "byte {at}");
        }
    }
    // One that a version without marks went on from is not believed: its positions began again.
    drop(wal);
    segments(dir.path()).iter().for_each(|s| fs::remove_file(&s.1).unwrap());
    fs::write(&mark, marks.last().unwrap()).unwrap();
    let mut old = Wal::new(local(dir.path()), 2);
    block_on(put(&mut old, &registry, 1.0)).unwrap();
    assert_eq!(damage(dir.path()), (vec![1.0], vec![]));
    let mut newer = Mark { newest: 0, end: 0, start: 0, owner: 0 }.to_bytes();
    newer[8] = 9;
    seal(&mut newer);
    fs::write(&mark, newer).unwrap();
    let e = read(dir.path()).unwrap_err();
    assert!(e.message().contains("format version 9"), "{e}");
}

/// What is logged after the log was empty, or torn, is behind all that was void before.
#[test]
fn positions_go_on_behind_what_was_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry();
    for round in 0..4 {
        let (records, _, mut wal) = block_on(reopen(local(dir.path()), 1)).unwrap();
        assert_eq!(records, vec![], "round {round}");
        block_on(put(&mut wal, &registry, 1.0)).unwrap();
        if round % 2 == 1 {
            // A write that a crash cut short.
            let (_, path) = segments(dir.path()).pop().unwrap();
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, [&bytes[..], &[1, 2, 3]].concat()).unwrap();
        }
        drop(wal);
        for owner in 2..5 {
            let (records, wrong, _) = block_on(reopen(local(dir.path()), owner)).unwrap();
            assert_eq!(values(&records), [1.0], "round {round}: {wrong:?}");
        }
        let (_, _, mut wal) = block_on(reopen(local(dir.path()), 5)).unwrap();
        block_on(wal.trim(u64::MAX)).unwrap();
        let end = wal.position();
        drop(wal);
        for owner in 6..9 {
            let (records, wrong, wal) = block_on(reopen(local(dir.path()), owner)).unwrap();
            assert_eq!((records, wrong), (vec![], vec![]));
            assert_eq!(wal.position(), end);
        }
    }
}

#[test]
fn what_could_not_be_deleted_does_not_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry();
    let faults = Faults::default();
    let fs = Arc::new(Faulty::new(Arc::new(Disk), faults.clone()));
    let (_, _, mut wal) = block_on(reopen(Storage::local(fs, dir.path()), 1)).unwrap();
    for v in 0..4 {
        block_on(put(&mut wal, &registry, f64::from(v))).unwrap();
        wal.roll();
    }
    let end = segments(dir.path())[3].0;
    // The mark is written and synced, and then nothing can be deleted.
    let call = faults.calls().len() + 2;
    faults.at(call, Fault::Io);
    block_on(wal.trim(end)).unwrap_err();
    assert_eq!(faults.calls()[call].what, "remove");
    assert_eq!(segments(dir.path()).len(), 4);
    let other = tempfile::tempdir().unwrap();
    segments(dir.path())[..3].iter().for_each(|(_, path)| {
        fs::copy(path, other.path().join(path.file_name().unwrap())).unwrap();
    });
    fs::copy(dir.path().join(mark::NAME), other.path().join(mark::NAME)).unwrap();
    let read_values = |owner| block_on(reopen(local(dir.path()), owner)).map(|r| (values(&r.0), r.1)).unwrap();
    assert_eq!(read_values(2), (vec![3.0], vec![]));
    // Heads know it, without the mark, and what is written after a restart still says so.
    block_on(put(&mut wal, &registry, 4.0)).unwrap();
    drop(wal);
    fs::remove_file(dir.path().join(mark::NAME)).unwrap();
    assert_eq!(read_values(3), (vec![3.0, 4.0], vec![]));
    let (_, _, mut wal) = block_on(reopen(local(dir.path()), 4)).unwrap();
    block_on(put(&mut wal, &registry, 5.0)).unwrap();
    drop(wal);
    fs::remove_file(&segments(dir.path())[4].1).unwrap();
    fs::remove_file(dir.path().join(mark::NAME)).unwrap();
    let (found, _) = damage(dir.path());
    assert_eq!(found, [3.0, 5.0]);
    // Who looks for a log elsewhere finds none, and leaves none.
    let mark = Mark { end, ..Mark::parse(&fs::read(other.path().join(mark::NAME)).unwrap()).unwrap().unwrap() };
    fs::write(other.path().join(mark::NAME), mark.to_bytes()).unwrap();
    assert_eq!(block_on(local(other.path()).holds(9)).unwrap(), None);
    assert_eq!(segments(other.path()), vec![]);
    // The next trim deletes all of it.
    let (_, _, mut wal) = block_on(reopen(local(dir.path()), 5)).unwrap();
    block_on(wal.trim(u64::MAX)).unwrap();
    assert_eq!(segments(dir.path()), vec![]);
}

#[test]
fn damaged_segments_are_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let aside = || {
        let paths = names(dir.path());
        paths.into_iter().filter(|p| p.ends_with(".damaged")).collect::<Vec<_>>()
    };
    for round in 1..=20usize {
        // Positions begin again, as if the log were another one.
        let _ = fs::remove_file(dir.path().join(mark::NAME));
        let written = write(dir.path());
        let (_, path) = segments(dir.path()).swap_remove(0);
        let mut bytes = fs::read(&path).unwrap();
        bytes[written[1].0 as usize + 20] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let (_, wrong, mut wal) = block_on(reopen(local(dir.path()), 1)).unwrap();
        assert!(!wrong.is_empty());
        block_on(wal.trim(u64::MAX)).unwrap();
        assert_eq!(segments(dir.path()), vec![]);
        assert_eq!(wal.damaged().unwrap(), aside().len());
        assert_eq!(aside().len(), round.min(16), "as many as are kept");
    }
    assert!(aside()[0].contains("000005-"), "the newest are kept: {:?}", aside());
}

fn names(dir: &Path) -> Vec<String> {
    let paths = FileSystem::list(&Disk, dir).unwrap();
    paths.iter().filter_map(|p| p.file_name()?.to_str().map(str::to_owned)).collect()
}

/// A log of version 1, as it was written before heads said where the log ended.
#[test]
fn the_first_format_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry();
    let mut writer = Writer::default();
    writer.restart();
    let a = named(&registry, "a");
    let mut bytes = [&MAGIC[..], &1u32.to_le_bytes(), &7u64.to_le_bytes(), &[0; 4]].concat();
    seal(&mut bytes);
    for v in [1.0, 2.0] {
        let at = 7 + bytes.len() as u64;
        writer.encode(at, &[a], |o| registry.get(o), &[samples(&[(0, 1, v)])], &[], &mut bytes).unwrap();
    }
    fs::write(dir.path().join(format!("{:020}.wal", 7)), &bytes).unwrap();
    let (records, wrong, mut wal) = block_on(reopen(local(dir.path()), 3)).unwrap();
    assert_eq!((values(&records), wrong), (vec![1.0, 2.0], vec![]));
    block_on(put(&mut wal, &registry, 3.0)).unwrap();
    let (records, wrong) = read(dir.path()).unwrap();
    assert_eq!((values(&records), wrong), (vec![1.0, 2.0, 3.0], vec![]));
}

/// Every byte of a segment of 64 KiB, its head included, is flipped. A damaged record is never decoded, so what comes
/// after it depends only on which one it was: for each byte the reader must find the damage and its end, with nothing
/// decoded between, and for each record the whole log is read once without it.
#[test]
fn every_byte_of_a_segment_flipped() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry();
    let mut wal = Wal::new(local(dir.path()), 1);
    let mut written: Vec<Written> = vec![];
    let mut state = 1u64;
    while wal.position() < 64 << 10 {
        // Names that do not compress, and a series that all records lean on.
        let name: String = (0..700)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                char::from(b'a' + (state >> 59) as u8 % 26)
            })
            .collect();
        let v = written.len() as f64;
        let ordinals = [named(&registry, "shared"), named(&registry, &name)];
        let position =
            wal.encode(&ordinals, |o| registry.get(o), &[samples(&[(0, 1, v), (1, 1, v + 0.5)])], &[]).unwrap();
        written.push((position, vec![("shared".to_owned(), v), (name, v + 0.5)]));
    }
    block_on(wal.commit()).unwrap();
    let end = wal.position();
    let (_, path) = segments(dir.path()).remove(0);
    let bytes = fs::read(&path).unwrap();
    let starts: Vec<usize> = std::iter::once(0).chain(written.iter().map(|w| w.0 as usize)).collect();
    for (i, from) in starts.iter().enumerate() {
        let to = starts.get(i + 1).copied().unwrap_or(end as usize);
        for at in *from..to {
            let mut damaged = bytes[..(to + 2000).min(bytes.len())].to_vec();
            damaged[at] ^= 1 << (at % 8);
            let mut chunk = Chunk::new("x".to_owned(), Some(0), damaged.into()).unwrap();
            if at >= Head::BYTES {
                chunk.offset = *from;
            }
            let publish = &mut |_: TagSet| -> Result<Ordinal> { panic!("a damaged record is decoded") };
            let last = to == bytes.len();
            match chunk.next(&mut Reader::default(), publish).unwrap() {
                Some(Item::Damage(d)) if (d.start, d.end, d.tail) == (*from as u64, to as u64, last) => {}
                other => panic!("byte {at} of record {i}: {other:?}"),
            }
        }
        let mut damaged = bytes.clone();
        damaged[to - 1] ^= 1;
        fs::write(&path, &damaged).unwrap();
        let (records, wrong) = read(dir.path()).unwrap();
        assert!(records.iter().all(|r| written.contains(r)), "record {i}");
        assert_eq!(records.len() + wrong.len(), written.len() + usize::from(i == 0), "each is there or named");
        assert_eq!(records[..i.saturating_sub(1)], written[..i.saturating_sub(1)]);
    }
}

/// A folder without a disk behind it where there is one: histories sync thousands of times.
fn fast_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// What must be in a log, and what may be.
#[derive(Default)]
struct Ledger {
    /// Acknowledged or read back: positions and values, in order.
    sure: Vec<(u64, f64)>,
    /// Refused since the last acknowledgement.
    maybe: Vec<f64>,
    /// Everything before this position may have been deleted.
    trimmed: u64,
}

impl Ledger {
    fn open(&mut self, fs: &Arc<dyn FileSystem>, dir: &Path, what: &str) -> Wal {
        // A start that failed is tried again.
        let (records, wrong, wal) = (0..3)
            .find_map(|_| block_on(reopen(Storage::local(fs.clone(), dir), 1)).ok())
            .unwrap_or_else(|| panic!("{what}: can't be opened"));
        // A group that was cut short at the end is no damage, nor is what lies behind it.
        assert!(wrong.iter().all(|w| w == "tail"), "{what}: {wrong:?}");
        let found: Vec<(u64, f64)> = records.iter().map(|(position, rows)| (*position, rows[0].1)).collect();
        let kept = self.sure.iter().position(|s| Some(s.1) == found.first().map(|f| f.1)).unwrap_or(self.sure.len());
        assert!(self.sure[..kept].iter().all(|s| s.0 < self.trimmed), "{what}: {:?} of {:?}", found, self.sure);
        let (sure, more) = found.split_at((self.sure.len() - kept).min(found.len()));
        assert_eq!(sure, &self.sure[kept..], "{what}");
        let mut maybe = self.maybe.iter();
        assert!(more.iter().all(|m| maybe.any(|v| *v == m.1)), "{what}: {more:?} of {:?}", self.maybe);
        *self = Self { sure: found, ..Self::default() };
        wal
    }

    fn history(&mut self, fs: &Arc<dyn FileSystem>, dir: &Path, what: &str) {
        let registry = registry();
        let a = named(&registry, "a");
        let mut wal = self.open(fs, dir, what);
        for step in 0..64u32 {
            let v = f64::from(step);
            let batch = samples(&[(0, i64::from(step), v)]);
            let position = wal.encode(&[a], |o| registry.get(o), &[batch], &[]).unwrap();
            match block_on(wal.commit()) {
                Ok(_) => {
                    self.sure.push((position, v));
                    self.maybe.clear();
                }
                Err(_) => self.maybe.push(v),
            }
            if step % 4 == 3 {
                wal.roll();
            }
            if step % 9 == 8 {
                self.trimmed = self.sure.iter().rev().nth(5).map_or(0, |s| s.0);
                // What could not be deleted is deleted the next time.
                let _ = block_on(wal.trim(self.trimmed));
            }
            if step % 12 == 11 {
                drop(wal);
                wal = self.open(fs, dir, what);
            }
        }
    }
}

#[test]
fn every_call_of_a_history_fails_once() {
    let run = |fault: Option<(usize, Fault)>| {
        let dir = fast_dir();
        let faults = Faults::default();
        if let Some((call, fault)) = fault {
            faults.at(call, fault);
        }
        let what = format!("{fault:?}");
        let fs: Arc<dyn FileSystem> = Arc::new(Faulty::new(Arc::new(Disk), faults.clone()));
        let mut ledger = Ledger::default();
        ledger.history(&fs, dir.path(), &what);
        let calls = faults.calls().len();
        faults.clear();
        let mut wal = ledger.open(&fs, dir.path(), &what);
        block_on(put(&mut wal, &registry(), -1.0)).unwrap();
        calls
    };
    let calls = run(None);
    assert!(calls >= 200, "{calls}");
    for call in 0..calls {
        for fault in [Fault::Full, Fault::Io, Fault::Short, Fault::Sync] {
            run(Some((call, fault)));
        }
    }
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

/// That no segment is seen must outlast a loss of power before anything is stored on the strength of it.
#[test]
fn what_was_deleted_is_made_to_stay_so() {
    let look = |sync_fails: bool| {
        let (dir, faults) = (tempfile::tempdir().unwrap(), Faults::default());
        let fs: Arc<dyn FileSystem> = Arc::new(Faulty::new(Arc::new(Disk), faults.clone()));
        fs::create_dir_all(dir.path()).unwrap();
        if sync_fails {
            block_on(Storage::local(fs.clone(), dir.path()).holds(1)).unwrap();
            // The same calls again, of which this one fails.
            let calls = faults.calls();
            let sync = calls.iter().position(|c| c.what == "sync_dir").unwrap();
            faults.at(calls.len() + sync, Fault::Io);
        }
        let holds = block_on(Storage::local(fs, dir.path()).holds(1));
        (holds.ok(), faults.calls().iter().any(|c| c.what == "sync_dir"))
    };
    assert_eq!(look(false), (Some(None), true));
    assert_eq!(look(true), (None, true));
}

/// A process that was killed may leave bytes which a power loss still takes.
#[test]
fn what_is_replayed_is_durable_first() {
    let (dir, registry) = (tempfile::tempdir().unwrap(), registry());
    let (_, _, mut wal) = block_on(reopen(local(dir.path()), 1)).unwrap();
    block_on(put(&mut wal, &registry, 1.0)).unwrap();
    drop(wal);
    let faults = Faults::default();
    let fs = Arc::new(Faulty::new(Arc::new(Disk), faults.clone()));
    block_on(Replay::open(Storage::local(fs, dir.path()), 2)).unwrap();
    let (calls, segment) = (faults.calls(), segments(dir.path()).pop().unwrap().1);
    assert!(calls.iter().any(|c| c.what == "sync" && c.path == segment), "before the first record: {calls:?}");
}
