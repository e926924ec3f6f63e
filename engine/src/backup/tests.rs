//! Names and manifests; whole backups are made and restored by the end-to-end tests.

use proptest::prelude::*;

use super::*;

fn manifest() -> Manifest {
    let part = TagPart {
        id: 7,
        path: tag_parts::path(20_000, 7),
        day: 20_000,
        sets: 1,
        bytes: 10,
        footer_bytes: 5,
        seq: 1,
        crc32: 3,
    };
    let object = Object { path: part.path.clone(), bytes: 10, crc32: 4 };
    Manifest {
        name: name(1_771_234_200_000, 42).unwrap(),
        database: "default".to_owned(),
        created_ms: 1_771_234_200_000,
        journal: 42,
        state: State { parts: vec![part], seed: u64::MAX, ..State::default() },
        objects: vec![object],
    }
}

#[test]
fn names_are_checked() {
    assert_eq!(manifest().name, "20260216T093000Z-000000000042");
    let check = |text: &str, expected: bool| assert_eq!(is_name(text), expected, "{text:?}");
    check("20260216T093000Z-000000000042", true);
    for wrong in ["", "..", "../x", "a/b", "a\\b", "%2e%2e", "a.b", "/etc/passwd", "ä", "a b", &"x".repeat(65)] {
        check(wrong, false);
    }
}

#[test]
fn only_names_of_objects_are_read_and_written() {
    assert_eq!(checked(&manifest()).unwrap().len(), 1);
    for wrong in ["../7.parquet", "tag_sets/20000/8.parquet", "tag_sets/x/../20000/7.parquet", "/etc/passwd", ""] {
        let mut changed = manifest();
        changed.objects[0].path = wrong.to_owned();
        assert_eq!(checked(&changed).unwrap_err().kind(), ErrorKind::Corrupt, "{wrong:?}");
        changed.state.parts[0].path = wrong.to_owned();
        assert_eq!(checked(&changed).unwrap_err().kind(), ErrorKind::Corrupt, "{wrong:?}");
    }
    let fewer = Manifest { objects: vec![], ..manifest() };
    assert_eq!(checked(&fewer).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn manifests_come_back_or_fail() {
    let sound = encode(&manifest()).unwrap();
    assert_eq!(decode(&sound).unwrap(), manifest());
    for at in 0..sound.len() {
        for bit in 0..8 {
            let mut bytes = sound.to_vec();
            bytes[at] ^= 1 << bit;
            if let Ok(found) = decode(&bytes) {
                assert_eq!(found, manifest(), "byte {at}");
            }
        }
        assert!(decode(&sound[..at]).is_err(), "cut at {at}");
    }
    let e = decode(b"thalweg-backup 3 00000000\n{}").unwrap_err();
    assert!(e.kind() == ErrorKind::Invalid && e.to_string().starts_with("format 3 is newer"), "{e}");
}

#[test]
fn only_manifests_with_views_have_the_format_that_older_versions_refuse() {
    let view = catalog::View {
        name: "v".to_owned(),
        definition: "SELECT 1".to_owned(),
        columns: vec!["x".to_owned()],
        owner: "me".to_owned(),
        created_ms: 1,
    };
    let mut with = manifest();
    with.state.views.push(view);
    for (manifest, head) in [(manifest(), "thalweg-backup 1 "), (with, "thalweg-backup 2 ")] {
        let encoded = encode(&manifest).unwrap();
        assert!(encoded.starts_with(head.as_bytes()));
        assert_eq!(decode(&encoded).unwrap(), manifest);
    }
}

proptest! {
    #[test]
    fn no_bytes_do_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(decode(&bytes).is_err());
        prop_assert!(decode(&[b"thalweg-backup 1 ", &bytes[..]].concat()).is_err());
    }
}
