//! Blocks made here, whole and with every byte of them damaged.

use std::path::Path;

use super::*;
use crate::import::bytes::crc32c;
use crate::import::chunk::tests::encode_floats;

const ALL: Range = Range { start_ms: i64::MIN, end_ms: i64::MAX, selectors: Vec::new() };

/// Labels, and chunks of samples.
type Made = (Vec<(&'static str, &'static str)>, Vec<Vec<(i64, f64)>>);

fn made() -> Vec<Made> {
    let samples = |from: i64, n: i64| (from..from + n).map(|i| (i * 1000, (i * i) as f64)).collect::<Vec<_>>();
    vec![
        (vec![("__name__", "down"), ("job", "a")], vec![samples(0, 3)]),
        (vec![("__name__", "up"), ("job", "a")], vec![samples(0, 5), samples(5, 5), samples(20, 1)]),
        (vec![("__name__", "up"), ("job", "b")], vec![samples(2, 4)]),
    ]
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

fn text(v: &str, out: &mut Vec<u8>) {
    uvarint(v.len() as u64, out);
    out.extend(v.as_bytes());
}

fn with_sum(bytes: &[u8], out: &mut Vec<u8>) {
    out.extend(bytes);
    out.extend(crc32c(bytes).to_be_bytes());
}

fn section(bytes: &[u8], out: &mut Vec<u8>) {
    out.extend((bytes.len() as u32).to_be_bytes());
    with_sum(bytes, out);
}

/// Writes a block with an index of this version.
fn write(dir: &Path, version: u8, series: &[Made]) {
    std::fs::create_dir_all(dir.join("chunks")).unwrap();
    let meta = r#"{"ulid": "x", "minTime": 0, "maxTime": 100000, "version": 1}"#;
    std::fs::write(dir.join("meta.json"), meta).unwrap();

    let mut chunks = vec![0x85, 0xBD, 0x40, 0xDD, 1, 0, 0, 0];
    let mut index = vec![0xBA, 0xAA, 0xD7, 0x00, version];
    let mut names: Vec<&str> = series.iter().flat_map(|s| s.0.iter().flat_map(|(k, v)| [*k, *v])).collect();
    names.sort_unstable();
    names.dedup();
    let mut symbols = (names.len() as u32).to_be_bytes().to_vec();
    let mut refs = BTreeMap::new();
    let symbols_at = index.len() as u64;
    for (i, name) in names.iter().enumerate() {
        refs.insert(*name, if version == 1 { symbols_at + 4 + symbols.len() as u64 } else { i as u64 });
        text(name, &mut symbols);
    }
    section(&symbols, &mut index);

    let mut ids = Vec::new();
    let series_at = index.len() as u64;
    for (labels, all) in series {
        if version == 2 {
            index.resize(index.len().next_multiple_of(16), 0);
        }
        ids.push(if version == 2 { index.len() / 16 } else { index.len() } as u32);
        let mut entry = Vec::new();
        uvarint(labels.len() as u64, &mut entry);
        labels.iter().for_each(|(k, v)| {
            uvarint(refs[k], &mut entry);
            uvarint(refs[v], &mut entry);
        });
        uvarint(all.len() as u64, &mut entry);
        let mut last = (0, 0);
        for (i, samples) in all.iter().enumerate() {
            let at = chunks.len() as i64;
            let data = encode_floats(samples);
            uvarint(data.len() as u64, &mut chunks);
            with_sum(&[&[1], &data[..]].concat(), &mut chunks);
            let (min, max) = (samples[0].0, samples[samples.len() - 1].0);
            if i == 0 {
                varint(min, &mut entry);
                uvarint((max - min) as u64, &mut entry);
                uvarint(at as u64, &mut entry);
            } else {
                uvarint((min - last.0) as u64, &mut entry);
                uvarint((max - min) as u64, &mut entry);
                varint(at - last.1, &mut entry);
            }
            last = (max, at);
        }
        uvarint(entry.len() as u64, &mut index);
        with_sum(&entry, &mut index);
    }
    let postings_at = index.len() as u64;
    let mut postings = (ids.len() as u32).to_be_bytes().to_vec();
    ids.iter().for_each(|id| postings.extend(id.to_be_bytes()));
    section(&postings, &mut index);
    let table_at = index.len() as u64;
    let mut table = 1u32.to_be_bytes().to_vec();
    table.push(2);
    text("", &mut table);
    text("", &mut table);
    uvarint(postings_at, &mut table);
    section(&table, &mut index);
    let contents = [symbols_at, series_at, 0, 0, postings_at, table_at];
    with_sum(&contents.iter().flat_map(|at| at.to_be_bytes()).collect::<Vec<_>>(), &mut index);
    std::fs::write(dir.join("index"), index).unwrap();
    std::fs::write(dir.join("chunks/000001"), chunks).unwrap();

    // The second series has times deleted.
    let mut stones = Vec::new();
    uvarint(u64::from(ids[1]), &mut stones);
    varint(3000, &mut stones);
    varint(4000, &mut stones);
    let mut file = TOMBSTONES_MAGIC.to_be_bytes().to_vec();
    file.push(1);
    with_sum(&stones, &mut file);
    std::fs::write(dir.join("tombstones"), file).unwrap();
}

/// All samples as text, and the damage.
fn read(dir: &Path, range: &Range) -> (Vec<String>, Vec<String>) {
    let mut damage = Vec::new();
    let mut out = Vec::new();
    let block = Meta::read(dir).and_then(|meta| Block::open(&meta));
    match block {
        Err(e) => damage.push(e.to_string()),
        Ok(mut block) => {
            for at in 0..block.series() {
                let Some(piece) = block.read(at, range, &mut |what| damage.push(what)) else { continue };
                let labels: Vec<String> = piece.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
                out.extend(piece.points.floats.iter().map(|(ts, v)| format!("{} {ts} {v}", labels.join(","))));
            }
        }
    }
    (out, damage)
}

fn expected(keep: impl Fn(&[(&str, &str)], i64) -> bool) -> Vec<String> {
    let mut out = Vec::new();
    for (i, (labels, chunks)) in made().iter().enumerate() {
        let text: Vec<String> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
        for (ts, v) in chunks.iter().flatten() {
            let deleted = i == 1 && (3000..=4000).contains(ts);
            if !deleted && keep(labels, *ts) {
                out.push(format!("{} {ts} {v}", text.join(",")));
            }
        }
    }
    out
}

#[test]
fn both_versions() {
    for version in [1, 2] {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), version, &made());
        assert_eq!(read(dir.path(), &ALL), (expected(|_, _| true), vec![]), "version {version}");
        let range = Range { start_ms: 2000, end_ms: 6000, ..ALL };
        assert_eq!(read(dir.path(), &range).0, expected(|_, ts| (2000..=6000).contains(&ts)));
        let selectors = vec![promql::api::selector(r#"up{job="b"}"#).unwrap()];
        let range = Range { selectors, ..ALL };
        assert_eq!(read(dir.path(), &range).0, expected(|labels, _| labels[0].1 == "up" && labels[1].1 == "b"));
    }
}

#[test]
fn a_block_without_series() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), 2, &made());
    std::fs::remove_file(dir.path().join("tombstones")).unwrap();
    assert_eq!(read(dir.path(), &ALL).0.len(), expected(|_, _| true).len() + 2, "nothing is deleted");
    std::fs::remove_file(dir.path().join("chunks/000001")).unwrap();
    let (rows, damage) = read(dir.path(), &ALL);
    assert_eq!((rows.len(), damage.len()), (0, 5));
    assert!(damage[0].contains("file 1 is missing"), "{damage:?}");
}

/// Every byte of every file with a bit flipped: samples are those that were written, and what lacks is told.
#[test]
fn every_byte_damaged() {
    let all = expected(|_, _| true);
    for version in [1, 2] {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), version, &made());
        for file in ["index", "chunks/000001", "tombstones"] {
            let path = dir.path().join(file);
            let whole = std::fs::read(&path).unwrap();
            for at in 0..whole.len() {
                for damaged in [
                    whole.iter().enumerate().map(|(i, b)| if i == at { b ^ 1 << (at % 8) } else { *b }).collect(),
                    whole[..at].to_vec(),
                ] {
                    std::fs::write(&path, &damaged).unwrap();
                    let (rows, damage) = read(dir.path(), &ALL);
                    assert!(rows.iter().all(|row| all.contains(row)), "{file} at {at}: {rows:?}");
                    assert!(rows == all || !damage.is_empty(), "{file} at {at}: {} rows, no damage", rows.len());
                }
            }
            std::fs::write(&path, &whole).unwrap();
        }
    }
}
