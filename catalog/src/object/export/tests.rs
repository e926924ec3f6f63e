//! Tests of what names mean, and of what is left of an export.

use std::collections::BTreeSet;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::LazyLock;

use object_store::memory::InMemory;
use proptest::prelude::*;

use super::*;
use crate::entropy::SystemEntropy;

static EXPORTS: LazyLock<Exports> = LazyLock::new(|| {
    Exports::open(&["/data/export", "/data/export/inner", "s3://bucket/prefix/?region=eu-1", "s3://other?region=eu-1"])
        .unwrap()
});

#[test]
fn locations() {
    let check = |text: &str, expected: Result<&str, &str>| match (Exports::open(&[text]), expected) {
        (Ok(exports), Ok(shown)) => assert_eq!(exports.shown(), [shown], "{text}"),
        (Err(e), Err(part)) => {
            assert_eq!(e.kind(), ErrorKind::Invalid, "{text}");
            assert!(e.to_string().contains(part) && !e.to_string().contains("canary"), "{text}: {e}");
        }
        (opened, _) => panic!("{text}: {opened:?}"),
    };
    check("/data/export", Ok("/data/export/"));
    check("//data/./export//", Ok("/data/export/"));
    check("file:///data", Ok("/data/"));
    check("/", Ok("/"));
    check("s3://bucket/a/b/?endpoint=http://127.0.0.1:9&region=eu-1", Ok("s3://bucket/a/b/"));
    check("data/export", Err("export location \"data/export\""));
    check("/data/../etc", Err("without \"..\""));
    check("", Err("export location \"\""));
    check("memory://", Err("memory"));
    check("gopher://x?sig=canary", Err("export location \"gopher://x\""));
    check("s3://b/?secret_access_key=canary", Err("secret_access_key"));
}

#[test]
fn names() {
    let check = |name: &str, expected: Option<&str>| {
        let place = EXPORTS.target(name).unwrap_or_else(|e| panic!("{name}: {e}")).map(|t| t.place);
        let shown = place.map(|place| match place {
            Place::File { root, folders, file } => format!("{} {} {file}", root.display(), folders.join(",")),
            Place::Object(_, path) => path.to_string(),
        });
        assert_eq!(shown.as_deref(), expected, "{name}");
    };
    check("/data/export/x.csv", Some("/data/export  x.csv"));
    check("//data/./export///a/b", Some("/data/export a b"));
    check("file:///data/export/x", Some("/data/export  x"));
    check("/data/export/inner/x", Some("/data/export inner x"));
    check("/data/export/%2e%2e/x", Some("/data/export %2e%2e x"));
    check("/data/export/...", Some("/data/export  ..."));
    check("s3://bucket/prefix/a/x.parquet", Some("a/x.parquet"));
    check("s3://bucket/prefix/%2e%2e/x", Some("%2e%2e/x"));
    check("s3://other/x", Some("x"));
    for outside in [
        "/data/exportX/x",
        "/data/expor",
        "/etc/passwd",
        "/data/x",
        "s3://bucket/prefixed/x",
        "s3://bucket/x",
        "s3://buckets/prefix/x",
        "S3://bucket/prefix/x",
        "gs://bucket/prefix/x",
        "http://bucket/prefix/x",
        "memory://x/y",
    ] {
        check(outside, None);
    }
    let long = format!("/data/export/{}", "x".repeat(5000));
    for wrong in [
        "",
        "x.csv",
        "./data/export/x",
        "/data/export/../x",
        "/data/export/x/..",
        "/data/export/x/",
        "/data/export/",
        "/data/export/x/.",
        "/data/export/inner/..",
        "/data/export",
        "/data/export/a\0b",
        "/data/export/a\nb",
        "/data/export/.thalweg-export-x",
        "s3://bucket/prefix/",
        "s3://bucket/prefix/../x",
        "s3://bucket/prefix/./x",
        "s3://bucket/prefix//x",
        "s3://bucket/prefix/x/",
        "s3://bucket",
        "s3://bucket/prefix/x?region=us-1",
        "s3://bucket/prefix/x#y",
        &long,
    ] {
        let e = EXPORTS.target(wrong).map(|t| t.is_some()).expect_err(wrong);
        assert_eq!(e.kind(), ErrorKind::Invalid, "{wrong}");
    }
}

proptest! {
    #[test]
    fn what_is_below_a_location_stays_there(
        parts in prop::collection::vec(
            prop::sample::select(vec![
                "/", "/", "/", "data", "export", "exportX", "inner", "..", ".", "", "...", "s3:", "bucket", "prefix", "file:",
                "x", "%2f", "\\", " ", "?", "#", "\0", "~", "*", "é",
            ]),
            0..14,
        ),
        begin in prop::sample::select(vec!["", "/", "/data/export", "/data/export/", "s3://bucket/prefix", "s3://bucket/prefix/", "file://"]),
    ) {
        let name = format!("{begin}{}", parts.concat());
        if let Ok(Some(target)) = EXPORTS.target(&name) {
            match target.place {
                Place::File { root, folders, file } => {
                    prop_assert_eq!(root.to_str(), Some("/data/export"));
                    for part in folders.iter().chain([&file]) {
                        prop_assert!(!["", ".", ".."].contains(&part.as_str()) && !part.contains(['/', '\0']), "{}", part);
                    }
                    let path = name.strip_prefix("file://").unwrap_or(&name);
                    let whole: PathBuf = root.join(folders.join("/")).join(&file);
                    prop_assert_eq!(FsPath::new(path).components().collect::<PathBuf>(), whole.components().collect::<PathBuf>());
                }
                Place::Object(_, path) => {
                    prop_assert!(path.parts_count() > 0 && !name.contains(['?', '#']));
                    let locations = ["s3://bucket/prefix/", "s3://other/"];
                    prop_assert!(locations.iter().any(|l| format!("{l}{path}") == name), "{} is {}", name, path);
                }
            }
        }
    }
}

#[test]
fn overlaps() {
    let dir = tempfile::tempdir().unwrap();
    let (data, exported) = (dir.path().join("data"), dir.path().join("exported"));
    std::fs::create_dir_all(&data).unwrap();
    symlink(&data, &exported).unwrap();
    let check = |location: &str, own: &str, expected: bool| {
        let exports = Exports::open(&[location]).unwrap();
        assert_eq!(exports.overlapping(own).unwrap().is_some(), expected, "{location} {own}");
    };
    check("/a/b", "/a/b", true);
    check("/a/b", "/a/b/c", true);
    check("/a/b", "/a", true);
    check("/a/b", "/a/bc", false);
    check("/", "/a", true);
    check("s3://b/x?region=r", "s3://b/x/y?region=r", true);
    check("s3://b/x?region=r", "s3://b/xy", false);
    check(exported.to_str().unwrap(), data.to_str().unwrap(), true);
    check("/a", "memory://", false);
}

fn listed(dir: &FsPath) -> BTreeSet<String> {
    let names = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned());
    names.collect()
}

async fn begin(dir: &FsPath, name: &str) -> Result<Export> {
    let exports = Exports::open(&[dir.to_str().unwrap()]).unwrap();
    exports.target(&format!("{}/{name}", dir.display())).unwrap().unwrap().begin(&SystemEntropy).await
}

#[tokio::test]
async fn files_are_whole_or_absent() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    let path = root.join("x.csv");
    let large = vec![b'x'; 3 * FILE_PART_BYTES + 7];
    let mut export = begin(&root, "x.csv").await.unwrap();
    for bytes in [&large[..], b"end"] {
        export.push(bytes);
        export.send().await.unwrap();
    }
    assert!(!path.exists() && listed(&root).iter().all(|name| name.starts_with(TEMPORARY)), "{:?}", listed(&root));
    export.finish().await.unwrap();
    assert!(!path.exists());
    export.complete().await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), [&large[..], b"end"].concat());
    // Replaced, keeping who may read it; or not.
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
    let mut export = begin(&root, "x.csv").await.unwrap();
    export.push(b"second");
    export.finish().await.unwrap();
    export.complete().await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"second");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let mut export = begin(&root, "x.csv").await.unwrap();
    export.push(&large);
    export.send().await.unwrap();
    export.abort().await;
    let mut export = begin(&root, "x.csv").await.unwrap();
    export.push(&large);
    export.send().await.unwrap();
    drop(export);
    assert_eq!(std::fs::read(&path).unwrap(), b"second");
    // What a dropped one still wrote holds on to its file.
    for _ in 0..1000 {
        if listed(&root).len() == 1 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    assert_eq!(listed(&root), BTreeSet::from(["x.csv".to_owned()]));
}

#[tokio::test]
async fn links_lead_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
    for folder in [&root.join("inside"), &outside] {
        std::fs::create_dir_all(folder).unwrap();
    }
    symlink(&outside, root.join("out")).unwrap();
    symlink(root.join("inside"), root.join("in")).unwrap();
    symlink(outside.join("file"), root.join("file")).unwrap();
    symlink("loop", root.join("loop")).unwrap();
    std::fs::write(root.join("plain"), b"x").unwrap();
    let check = async |name: &str, expected: Option<io::ErrorKind>| {
        let begun = begin(&root, name).await.map(drop);
        let kind = begun.err().map(|e| {
            let source = std::error::Error::source(&e).and_then(|s| s.downcast_ref::<io::Error>());
            source.map(io::Error::kind).unwrap_or_else(|| panic!("{name}: {e:?}"))
        });
        assert_eq!(kind, expected, "{name}");
    };
    check("in/x", None).await;
    check("out/x", Some(io::ErrorKind::PermissionDenied)).await;
    check("out/deeper/x", Some(io::ErrorKind::NotFound)).await;
    check("file", Some(io::ErrorKind::PermissionDenied)).await;
    assert!(begin(&root, "loop/x").await.is_err());
    check("inside", Some(io::ErrorKind::IsADirectory)).await;
    check("plain/x", Some(io::ErrorKind::NotADirectory)).await;
    check("missing/x", Some(io::ErrorKind::NotFound)).await;
    assert_eq!(listed(&outside), BTreeSet::new());
    // The location itself may be a link: that one is the operator's.
    let link = dir.path().join("link");
    symlink(&root, &link).unwrap();
    begin(&link, "x").await.unwrap();
}

#[tokio::test]
async fn objects_are_whole_or_absent() {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let exports = Exports(vec![Allowed::Store("s3://b/".to_owned(), store.clone())]);
    let begin = async || exports.target("s3://b/a/x").unwrap().unwrap().begin(&SystemEntropy).await.unwrap();
    let read = async || store.get(&Path::from("a/x")).await.unwrap().bytes().await.unwrap();
    for length in [0, 5, PART_BYTES, 2 * PART_BYTES + 5] {
        let bytes: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
        let mut export = begin().await;
        for part in bytes.chunks(PART_BYTES / 2 + 1) {
            export.push(part);
            export.send().await.unwrap();
        }
        export.finish().await.unwrap();
        export.complete().await.unwrap();
        assert!(read().await == bytes, "{length}");
    }
    let mut export = begin().await;
    export.push(&vec![1; 2 * PART_BYTES]);
    export.send().await.unwrap();
    export.abort().await;
    assert_eq!(read().await.len(), 2 * PART_BYTES + 5);
}
