//! Tests of tag parts: what is written is read, one metric without the rest, and damage is named.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStoreExt, PutMultipartOptions,
    PutOptions, PutPayload, PutResult,
};
use proptest::prelude::*;

use super::*;
use crate::tag::tag_set;
use crate::{ErrorKind, TagHasher};

const SEED: u64 = 7;

fn series(pairs: &[(&str, &str)]) -> Arc<Series> {
    Arc::new(Series::new(&TagHasher::new(SEED), tag_set(pairs).unwrap()))
}

fn header(id: i64) -> PartHeader {
    PartHeader { id, day: 20000, seq: 3, supersedes: vec![1, 2] }
}

/// Sets like those of a scraped fleet: `metrics` of `hosts` each, with a dozen labels.
fn fleet(metrics: usize, hosts: usize) -> Vec<Arc<Series>> {
    let mut out = Vec::new();
    for metric in 0..metrics {
        for host in 0..hosts {
            let pod = format!("node-exporter-{:05x}", host * 7919 % 0xfffff);
            out.push(series(&[
                ("__name__", &format!("node_metric_{metric:03}_total")),
                ("Upper", "sorts before the name"),
                ("cluster", "prod-eu-1"),
                ("container", "node-exporter"),
                ("device", ["sda", "sdb", "nvme0n1"][host % 3]),
                ("endpoint", "metrics"),
                ("instance", &format!("10.{}.{}.7:9100", host / 250, host % 250)),
                ("job", "node-exporter"),
                ("mode", ["idle", "user", "system"][metric % 3]),
                ("namespace", "monitoring"),
                ("node", &format!("node-{host:04}")),
                ("pod", &pod),
                ("service", "node-exporter"),
            ]));
        }
    }
    out
}

async fn stored(parts: &[EncodedPart], cache_bytes: usize) -> (Arc<Counting>, TagParts, Vec<Arc<TagPart>>) {
    let store = Arc::new(Counting::default());
    for part in parts {
        store.put(&Path::from(format!("db/{}", part.part.path)), part.bytes.clone().into()).await.unwrap();
    }
    let registry = Arc::new(Registry::new(TagHasher::new(SEED), 1_000_000));
    let reader = TagParts::new(store.clone(), "db", registry, cache_bytes);
    (store, reader, parts.iter().map(|p| Arc::new(p.part.clone())).collect())
}

fn labels(lists: &[MetricSets]) -> Vec<String> {
    lists.iter().flat_map(|l| l.iter()).map(|s| format!("{:?}", s.tags)).collect()
}

#[tokio::test]
async fn loads_what_was_written() {
    let sets = [
        series(&[("__name__", "up"), ("job", "b")]),
        series(&[("__name__", "up"), ("job", "a"), ("A", "x")]),
        series(&[]),
        series(&[("job", "nameless")]),
        series(&[("__name__", "a"), ("k", "\u{1f600}\n\"")]),
        series(&[("__name__", "up"), ("job", "b")]),
    ];
    let part = encode(&header(9), &sets).unwrap();
    assert_eq!((part.part.sets, part.part.path.as_str()), (5, "tag_sets/20000/9.parquet"));
    let (_, reader, parts) = stored(&[part], 1 << 20).await;
    let all = reader.load(&parts, MetricFilter::All, &mut |_| Ok(())).await.unwrap();
    assert_eq!(all.iter().map(|l| l.len()).collect::<Vec<_>>(), [2, 1, 2]);
    let mut seen: Vec<_> = all.iter().flat_map(|l| l.iter()).map(|s| (s.id, s.storage_key(), s.tags.clone())).collect();
    let mut written: Vec<_> = sets[..5].iter().map(|s| (s.id, s.storage_key(), s.tags.clone())).collect();
    seen.sort_by_key(|s| s.0);
    written.sort_by_key(|s| s.0);
    assert_eq!(seen, written);
    let check = async |filter: MetricFilter<'_>, expected: &[&str]| {
        assert_eq!(labels(&reader.load(&parts, filter, &mut |_| Ok(())).await.unwrap()), expected, "{filter:?}");
    };
    check(MetricFilter::Eq("a"), &[r#"{"__name__": "a", "k": "😀\n\""}"#]).await;
    check(MetricFilter::Eq("nope"), &[]).await;
    check(MetricFilter::Eq(""), &["{}", r#"{"job": "nameless"}"#]).await;
    let u = |n: &str| n.starts_with('u');
    let up = [r#"{"A": "x", "__name__": "up", "job": "a"}"#, r#"{"__name__": "up", "job": "b"}"#];
    check(MetricFilter::Where(&u), &up).await;
}

#[tokio::test]
async fn active_sets_are_shared() {
    let set = series(&[("__name__", "up")]);
    let (_, reader, parts) = stored(&[encode(&header(1), std::slice::from_ref(&set)).unwrap()], 1 << 20).await;
    reader.registry.publish(&set, &[], 0).unwrap();
    let loaded = reader.load(&parts, MetricFilter::All, &mut |_| Ok(())).await.unwrap();
    assert!(Arc::ptr_eq(&loaded[0][0], &set));
}

#[tokio::test]
async fn one_metric_is_read_without_the_rest_and_once() {
    let sets = fleet(40, 1000);
    let part = encode(&header(1), &sets).unwrap();
    let (store, mut reader, parts) = stored(&[part], 64 << 20).await;
    reader.whole_bytes = 1 << 10;
    // Opening it checks the whole.
    reader.load(&parts, MetricFilter::Eq("none"), &mut |_| Ok(())).await.unwrap();
    let opened = store.bytes.load(Ordering::Relaxed);
    let one = reader.load(&parts, MetricFilter::Eq("node_metric_020_total"), &mut |_| Ok(())).await.unwrap();
    assert_eq!((one.len(), one[0].len()), (1, 1000));
    let read = store.bytes.load(Ordering::Relaxed) - opened;
    assert!(read < parts[0].bytes / 2, "{read} of {} bytes", parts[0].bytes);
    let two: &(dyn Fn(&str) -> bool + Send + Sync) =
        &|n| ["node_metric_000_total", "node_metric_020_total", "node_metric_039_total"].contains(&n);
    let lists = reader.load(&parts, MetricFilter::Where(two), &mut |_| Ok(())).await.unwrap();
    assert_eq!(lists.iter().map(|l| l.len()).collect::<Vec<_>>(), [1000; 3]);
    let read = store.bytes.load(Ordering::Relaxed);
    let again = reader.load(&parts, MetricFilter::Where(two), &mut |_| Ok(())).await.unwrap();
    assert!(Arc::ptr_eq(&again[1].sets, &one[0].sets));
    assert_eq!(read, store.bytes.load(Ordering::Relaxed), "cached");
    let all = reader.load(&parts, MetricFilter::All, &mut |_| Ok(())).await.unwrap();
    assert_eq!((all.len(), labels(&all).len()), (40, 40_000));
    assert!(reader.cached_bytes() <= 64 << 20);
}

#[test]
fn sets_are_small() {
    let sets = fleet(250, 80);
    let part = encode(&header(1), &sets).unwrap().part;
    // Eight bytes are the code.
    assert!(part.bytes <= part.sets * 12, "{:.2} bytes per set", part.bytes as f64 / part.sets as f64);
}

#[tokio::test]
async fn merges_without_repetition() {
    let sets = fleet(5, 20);
    let parts = [encode(&header(1), &sets[..60]).unwrap(), encode(&header(2), &sets[40..]).unwrap()];
    let (_, reader, entries) = stored(&parts, 1 << 20).await;
    let merged = reader.merge(&header(3), &entries).await.unwrap();
    let at_once = encode(&header(3), &sets).unwrap();
    assert_eq!((merged.part, merged.bytes), (at_once.part, at_once.bytes));
}

#[tokio::test]
async fn damage_is_named() {
    let sets = fleet(3, 10);
    let good = encode(&header(1), &sets).unwrap();
    let check = async |part: &TagPart, bytes: Vec<u8>, seed: u64, expected: &str| {
        let store = Arc::new(InMemory::new());
        store.put(&Path::from(format!("db/{}", part.path)), bytes.into()).await.unwrap();
        let registry = Arc::new(Registry::new(TagHasher::new(seed), 10));
        let reader = TagParts::new(store, "db", registry, 1 << 20);
        let error = reader.load(&[Arc::new(part.clone())], MetricFilter::All, &mut |_| Ok(())).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().starts_with("tag part db/tag_sets/20000/1.parquet: "), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    };
    check(&good.part, good.bytes.to_vec(), SEED + 1, "is stored with code").await;
    let mut flipped = good.bytes.to_vec();
    flipped[100] ^= 1;
    check(&good.part, flipped, SEED, "CRC-32").await;
    check(&good.part, good.bytes[1..].to_vec(), SEED, "CRC-32").await;
    check(&good.part, vec![], SEED, "CRC-32").await;
    let nowhere =
        TagParts::new(Arc::new(InMemory::new()), "db", Arc::new(Registry::new(TagHasher::new(SEED), 10)), 1 << 20);
    let error = nowhere.load(&[Arc::new(good.part.clone())], MetricFilter::All, &mut |_| Ok(())).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("object is missing"), "{error}");
    let other = encode(&header(2), &sets).unwrap();
    let part = TagPart { path: good.part.path.clone(), id: 1, ..other.part };
    check(&part, other.bytes.to_vec(), SEED, "is that of file Some(2)").await;
}

#[tokio::test]
async fn a_newer_format_is_refused_by_name() {
    let good = encode(&header(1), &fleet(1, 1)).unwrap();
    let mut bytes = good.bytes.to_vec();
    let format = b"thalweg.format\x18\x01";
    let at = bytes.windows(format.len()).rposition(|w| w == format).unwrap() + format.len();
    bytes[at] = b'2';
    let part = TagPart { crc32: crc32fast::hash(&bytes), ..good.part };
    let (_, reader, parts) = stored(&[EncodedPart { bytes: bytes.into(), part }], 1 << 20).await;
    let error = reader.load(&parts, MetricFilter::All, &mut |_| Ok(())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("tag_sets/20000/1.parquet: format 2 is newer than this version"), "{error}");
}

#[tokio::test]
async fn no_damage_gets_through() {
    let check = async |good: &EncodedPart, step: usize, whole_bytes: u64| {
        let store = Arc::new(InMemory::new());
        let location = Path::from(format!("db/{}", good.part.path));
        let reader = |cache| {
            let registry = Arc::new(Registry::new(TagHasher::new(SEED), 10));
            TagParts { whole_bytes, ..TagParts::new(store.clone(), "db", registry, cache) }
        };
        for at in (0..good.bytes.len()).step_by(step) {
            let mut bytes = good.bytes.to_vec();
            bytes[at] ^= 1 << (at % 8);
            store.put(&location, bytes.into()).await.unwrap();
            let error = reader(1 << 20)
                .load(&[Arc::new(good.part.clone())], MetricFilter::All, &mut |_| Ok(()))
                .await
                .unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "byte {at}: {error}");
        }
        for length in (0..good.bytes.len()).step_by(step) {
            store.put(&location, good.bytes.slice(..length).into()).await.unwrap();
            assert!(
                reader(1 << 20).load(&[Arc::new(good.part.clone())], MetricFilter::All, &mut |_| Ok(())).await.is_err()
            );
        }
        // Damage after the part was opened.
        store.put(&location, good.bytes.clone().into()).await.unwrap();
        let reader = reader(4 << 20);
        let part = [Arc::new(good.part.clone())];
        reader.load(&part, MetricFilter::Eq("none"), &mut |_| Ok(())).await.unwrap();
        store.put(&location, good.bytes.iter().map(|b| b ^ 16).collect::<Vec<_>>().into()).await.unwrap();
        let error = reader.load(&part, MetricFilter::All, &mut |_| Ok(())).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    };
    check(&encode(&header(1), &fleet(3, 4)).unwrap(), 1, 1 << 20).await;
    check(&encode(&header(1), &fleet(20, 1000)).unwrap(), 50_021, 1 << 10).await;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_sets_come_back(raw in proptest::collection::vec(
        proptest::collection::btree_map("[a-z_A-Z.é]{1,4}", "\\PC{0,6}", 0..5), 0..40)
    ) {
        let mut sets: Vec<_> = raw.iter().map(|m| {
            let pairs: Vec<_> = m.iter().map(|(k, v)| {
                (if k == "a" { "__name__" } else { k.as_str() }, v.as_str())
            }).collect();
            series(&pairs)
        }).collect();
        let part = encode(&header(1), &sets).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut seen: Vec<_> = runtime.block_on(async {
            let (_, reader, parts) = stored(&[part], 1 << 20).await;
            reader.load(&parts, MetricFilter::All, &mut |_| Ok(())).await.unwrap()
        }).iter().flat_map(|l| l.iter()).map(|s| (s.id, s.tags.clone())).collect();
        sets.sort_by_key(|s| s.id);
        sets.dedup_by_key(|s| s.id);
        seen.sort_by_key(|s| s.0);
        prop_assert_eq!(seen, sets.iter().map(|s| (s.id, s.tags.clone())).collect::<Vec<_>>());
    }
}

/// Counts the bytes that are read.
#[derive(Debug, Default)]
struct Counting {
    inner: InMemory,
    bytes: AtomicU64,
}

impl std::fmt::Display for Counting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Counting")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Counting {
    async fn put_opts(&self, to: &Path, payload: PutPayload, o: PutOptions) -> object_store::Result<PutResult> {
        self.inner.put_opts(to, payload, o).await
    }
    async fn put_multipart_opts(
        &self,
        to: &Path,
        o: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(to, o).await
    }
    async fn get_opts(&self, from: &Path, o: GetOptions) -> object_store::Result<GetResult> {
        let result = self.inner.get_opts(from, o).await?;
        self.bytes.fetch_add(result.range.end - result.range.start, Ordering::Relaxed);
        Ok(result)
    }
    async fn get_ranges(&self, from: &Path, ranges: &[Range<u64>]) -> object_store::Result<Vec<Bytes>> {
        self.bytes.fetch_add(ranges.iter().map(|r| r.end - r.start).sum(), Ordering::Relaxed);
        self.inner.get_ranges(from, ranges).await
    }
    fn delete_stream(
        &self,
        paths: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.inner.delete_stream(paths)
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.inner.list(prefix)
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, o: CopyOptions) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, o).await
    }
}
