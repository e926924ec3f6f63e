//! Tests of how stores are named, probed and written to.

use std::fmt;
use std::ops::Range;

use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, PutMultipartOptions, PutOptions,
    PutResult, UploadPart,
};

use super::*;
use crate::ErrorKind;

#[test]
fn locations() {
    let check = |text: &str, expected: Option<&str>| {
        assert_eq!(location(text).ok().as_deref(), expected, "{text}");
    };
    check("/data/store", Some("/data/store/"));
    check("/data/store/", Some("/data/store/"));
    check("file:///data/store", Some("/data/store/"));
    check("s3://bucket", Some("s3://bucket/"));
    check("s3://bucket/", Some("s3://bucket/"));
    check("s3://bucket/a/b/", Some("s3://bucket/a/b/"));
    check("s3://bucket/a?endpoint=http://127.0.0.1:9000&region=eu-1", Some("s3://bucket/a/"));
    check("gs://bucket/a", Some("gs://bucket/a/"));
    check("az://container/a", Some("az://container/a/"));
    check("abfss://c@account.dfs.core.windows.net/a", Some("abfss://c@account.dfs.core.windows.net/a/"));
    check("memory://", Some("memory://"));
    check("s3:///x", None);
    check("s3://bucket/a/../b", None);
    check("s3://bucket/a//b", None);
    check("s3://bucket?secret_access_key=x", None);
    check("s3://bucket?endpoint=", None);
    check("gs://bucket?region=eu-1", None);
    check("gopher://x", None);
    check("", None);
    assert!(location("relative").unwrap().starts_with('/'));
    let wrong = location("s3://b?secret_access_key=canary").unwrap_err().to_string();
    assert!(wrong.contains("secret_access_key") && !wrong.contains("canary"), "{wrong}");
}

#[test]
fn clients_are_made_without_asking_the_store() {
    let fs: Arc<dyn FileSystem> = Arc::new(crate::fs::Disk);
    let check = |url: &str, expected: Result<(), &str>| match (open(&fs, url), expected) {
        (Ok(store), Ok(())) => assert!(!store.to_string().is_empty(), "{url}"),
        (Err(e), Err(part)) => {
            assert_eq!(e.kind(), ErrorKind::Invalid, "{url}: {e}");
            assert!(e.to_string().contains(part), "{url}: {e}");
        }
        (opened, _) => panic!("{url}: {opened:?}"),
    };
    check("s3://bucket/prefix?endpoint=http://127.0.0.1:9&region=eu-1", Ok(()));
    check("s3://bucket?virtual_hosted_style=perhaps", Err("perhaps"));
    check("gs://bucket/prefix?endpoint=http://127.0.0.1:9", Ok(()));
    check("az://container/prefix?account=a", Ok(()));
    check("abfss://container@account.dfs.core.windows.net/prefix", Ok(()));
    check("abfss://container@account.example.com/prefix", Err("not usable"));
    check("az://container/prefix", Err("not usable"));
}

/// A store that forgets what puts and completions are to heed.
#[derive(Debug, Default)]
struct Careless {
    inner: InMemory,
    /// Create-only puts overwrite.
    overwrites: bool,
    /// Completions happen, but their replies are lost.
    loses_replies: bool,
}

impl fmt::Display for Careless {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Careless")
    }
}

#[derive(Debug)]
struct LostReply(Box<dyn MultipartUpload>);

#[async_trait]
impl MultipartUpload for LostReply {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        self.0.put_part(data)
    }

    async fn complete(&mut self) -> object_store::Result<PutResult> {
        self.0.complete().await?;
        Err(StoreError::Generic { store: "test", source: "connection reset".into() })
    }

    async fn abort(&mut self) -> object_store::Result<()> {
        self.0.abort().await
    }
}

#[async_trait]
impl ObjectStore for Careless {
    async fn put_opts(&self, at: &Path, payload: PutPayload, options: PutOptions) -> object_store::Result<PutResult> {
        let mode = if self.overwrites { PutMode::Overwrite } else { options.mode.clone() };
        self.inner.put_opts(at, payload, PutOptions { mode, ..options }).await
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        let upload = self.inner.put_multipart_opts(at, options).await?;
        Ok(if self.loses_replies { Box::new(LostReply(upload)) } else { upload })
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.inner.get_opts(at, options).await
    }

    async fn get_ranges(&self, at: &Path, ranges: &[Range<u64>]) -> object_store::Result<Vec<Bytes>> {
        self.inner.get_ranges(at, ranges).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[tokio::test]
async fn a_store_that_overwrites_is_refused() {
    let sound = Careless::default();
    probe(&sound, "db").await.unwrap();
    probe(&sound, "db").await.unwrap();
    let careless = Careless { overwrites: true, ..Careless::default() };
    for _ in 0..2 {
        assert_eq!(probe(&careless, "db").await.unwrap_err().kind(), ErrorKind::Invalid);
    }
}

#[tokio::test]
async fn large_objects_go_up_in_parts() {
    let bytes = Bytes::from((0..1000u32).flat_map(u32::to_le_bytes).collect::<Vec<u8>>());
    let location = Path::from("db/large");
    for part_bytes in [7, 1999, 2000, 4000, 5000] {
        for loses_replies in [false, true] {
            let store = Careless { loses_replies, ..Careless::default() };
            put_in_parts(&store, &location, bytes.clone(), part_bytes).await.unwrap();
            assert_eq!(store.get(&location).await.unwrap().bytes().await.unwrap(), bytes, "parts of {part_bytes}");
        }
    }
}
