//! A store whose calls fail, wait or panic, and what becomes of flushes, of the log and of a stop.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use object_store::path::Path as ObjectPath;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, PutMultipartOptions, PutOptions,
    PutPayload, PutResult, Result as StoreResult,
};
use tokio::sync::Semaphore;

use super::*;

type Hook = dyn Fn(&str) -> BoxFuture<'static, StoreResult<()>> + Send + Sync;

/// A bucket with a hook before each put.
#[derive(Clone, Default)]
struct Hooked {
    store: Arc<InMemory>,
    hook: Arc<Mutex<Option<Arc<Hook>>>>,
}

impl Hooked {
    /// Calls `hook` with the path of each put from now on, and makes the put when it says so.
    fn before_puts(&self, hook: impl Fn(&str) -> BoxFuture<'static, StoreResult<()>> + Send + Sync + 'static) {
        *self.hook.lock() = Some(Arc::new(hook));
    }

    /// Makes all puts fail whose path has this in it.
    fn fail(&self, part: &'static str) {
        self.before_puts(move |path| {
            let fails = path.contains(part);
            Box::pin(async move { if fails { Err(refused()) } else { Ok(()) } })
        });
    }

    /// Makes the next put panic whose path has this in it.
    fn panic_once(&self, part: &'static str) {
        let done = AtomicUsize::new(0);
        self.before_puts(move |path| {
            let panics = path.contains(part) && done.fetch_add(1, Ordering::Relaxed) == 0;
            Box::pin(async move { if panics { panic!("the store has a bug") } else { Ok(()) } })
        });
    }
}

fn refused() -> object_store::Error {
    object_store::Error::Generic { store: "hooked", source: "it is down".into() }
}

impl fmt::Debug for Hooked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hooked")
    }
}

impl fmt::Display for Hooked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hooked")
    }
}

#[async_trait]
impl ObjectStore for Hooked {
    async fn put_opts(&self, to: &ObjectPath, bytes: PutPayload, options: PutOptions) -> StoreResult<PutResult> {
        let hook = self.hook.lock().clone();
        if let Some(hook) = hook {
            hook(to.as_ref()).await?;
        }
        self.store.put_opts(to, bytes, options).await
    }

    async fn put_multipart_opts(
        &self,
        to: &ObjectPath,
        options: PutMultipartOptions,
    ) -> StoreResult<Box<dyn MultipartUpload>> {
        self.store.put_multipart_opts(to, options).await
    }

    async fn get_opts(&self, from: &ObjectPath, options: GetOptions) -> StoreResult<GetResult> {
        self.store.get_opts(from, options).await
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, StoreResult<ObjectPath>>,
    ) -> BoxStream<'static, StoreResult<ObjectPath>> {
        self.store.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&ObjectPath>) -> BoxStream<'static, StoreResult<ObjectMeta>> {
        self.store.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&ObjectPath>) -> StoreResult<ListResult> {
        self.store.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &ObjectPath, to: &ObjectPath, options: CopyOptions) -> StoreResult<()> {
        self.store.copy_opts(from, to, options).await
    }
}

/// Opens over a store without threads of its own, so that time can be paused.
async fn open_over(dir: &Path, store: &Hooked, change: impl FnOnce(&mut Settings)) -> Engine {
    let mut settings = Settings { own_threads: false, catalog: SqlCatalog::None, ..settings(dir) };
    change(&mut settings);
    let store: Arc<dyn ObjectStore> = Arc::new(store.clone());
    let entropy = Arc::new(catalog::SystemEntropy);
    Engine::open(settings, Components { entropy, ..components(&store) }, Extensions::default()).await.unwrap()
}

fn flushing(engine: &Engine) -> Vec<Arc<crate::memtable::Memtable>> {
    engine.inner().version().table(SAMPLES.id).unwrap().flushing.clone()
}

/// Waits, in time that is paused, until something is so.
async fn until(is: impl Fn() -> bool) {
    let look = async {
        while !is() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(600), look).await.expect("it comes about");
}

#[tokio::test]
async fn while_flushes_fail_few_memtables_are_frozen() {
    let (dir, store) = (tempfile::tempdir().unwrap(), Hooked::default());
    let engine = open_over(dir.path(), &store, |s| s.memory_limit = 1280 << 10).await;
    let inner = engine.inner();
    inner.stopping.cancel();
    let names: Vec<String> = (0..1000).map(|i| format!("m{i}")).collect();
    let mut k = 0;
    while inner.version().memory() <= inner.memtable_bytes_soft() {
        k += 1;
        let rows: Vec<_> = names.iter().map(|n| (n.as_str(), NOW + k, k as f64)).collect();
        engine.write(request(&engine, &rows)).await.unwrap();
    }
    store.fail("samples/");
    for i in 1..50 {
        engine.write(request(&engine, &[("m0", NOW + k + i, 1.0)])).await.unwrap();
        upkeep::tick(inner, Instant::now()).await.unwrap_err();
    }
    assert_eq!(flushing(&engine).len(), 1);
    assert!(inner.log.lock().await.chunks() <= 2);
    // After a failure nothing is done before it is time to.
    engine.write(request(&engine, &[("m0", NOW, 1.0)])).await.unwrap();
    upkeep::tick(inner, Instant::now() + Duration::from_secs(5)).await.unwrap();
    store.fail("nothing");
    upkeep::tick(inner, Instant::now()).await.unwrap();
    assert!(flushing(&engine).is_empty());
}

#[tokio::test]
async fn a_memtable_goes_as_soon_as_it_is_in_files() {
    let (dir, store) = (tempfile::tempdir().unwrap(), Hooked::default());
    let engine = open_over(dir.path(), &store, |_| ()).await;
    engine.inner().stopping.cancel();
    for i in 0..3 {
        engine.write(request(&engine, &[("a", NOW + i, 1.0)])).await.unwrap();
        engine.inner().freeze(|_| true).await.unwrap();
    }
    let frozen: Vec<_> = flushing(&engine).iter().map(Arc::downgrade).collect();
    let held = Arc::new(Mutex::new(vec![]));
    let seen = held.clone();
    store.before_puts(move |path| {
        if path.contains("samples/") {
            seen.lock().push(frozen.iter().filter(|m| m.strong_count() > 0).count());
        }
        Box::pin(async { Ok(()) })
    });
    engine.flush().await.unwrap();
    assert_eq!(*held.lock(), [3, 2, 1]);
}

/// Whoever asks for a flush may go away at any moment.
#[tokio::test]
async fn an_abandoned_flush_keeps_the_tag_sets_that_it_counts_on() {
    let (dir, store) = (tempfile::tempdir().unwrap(), Hooked::default());
    let engine = open_over(dir.path(), &store, |_| ()).await;
    engine.inner().stopping.cancel();
    engine.write(request(&engine, &[("gone", NOW, 1.0), ("kept", NOW, 1.0)])).await.unwrap();
    engine.flush().await.unwrap();
    let matchers = vec![Matcher::equal("__name__", "gone")];
    let old = Selection { table: SAMPLES.clone(), matchers, start_ms: NOW, end_ms: NOW };
    engine.delete(vec![old]).await.unwrap();
    engine.write(request(&engine, &[("gone", NOW + 1, 2.0)])).await.unwrap();
    // The flush waits with its file, and later with its entry of the journal.
    let (reached, file, entry) =
        (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let hold = |part: &'static str, gate: &Arc<Semaphore>| {
        let (reached, gate, met) = (reached.clone(), gate.clone(), AtomicUsize::new(0));
        store.before_puts(move |path| {
            let holds = path.contains(part) && met.fetch_add(1, Ordering::Relaxed) == 0;
            let (reached, gate) = (reached.clone(), gate.clone());
            Box::pin(async move {
                if holds {
                    reached.fetch_add(1, Ordering::Relaxed);
                    gate.acquire().await.unwrap().forget();
                }
                Ok(())
            })
        });
    };
    hold("/samples/", &file);
    let flush = tokio::spawn({
        let engine = engine.clone();
        async move { engine.flush().await }
    });
    until(|| reached.load(Ordering::Relaxed) == 1).await;
    let before = engine.files().unwrap();
    let folding = tokio::spawn({
        let engine = engine.clone();
        async move { engine.fold_deletes().await }
    });
    until(|| engine.files().unwrap().iter().all(|f| before.iter().all(|b| b.1.id != f.1.id))).await;
    // All that is left for it is to look for tag sets without rows.
    tokio::time::sleep(Duration::from_millis(100)).await;
    hold("/journal/", &entry);
    file.add_permits(1);
    until(|| reached.load(Ordering::Relaxed) == 2).await;
    flush.abort();
    let _ = flush.await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    entry.add_permits(1);
    folding.await.unwrap().unwrap();
    engine.flush().await.unwrap();
    drop(engine);
    let engine = open_over(dir.path(), &store, |_| ()).await;
    assert!(rows(&engine).is_empty(), "all is in files");
    let expected = [("gone", NOW + 1, 2.0), ("kept", NOW, 1.0)];
    assert_eq!(all(&engine).await.into_iter().collect::<BTreeMap<_, _>>(), model(&expected));
}

#[tokio::test(start_paused = true)]
async fn flushes_and_compactions_go_on_after_a_panic() {
    let (dir, store) = (tempfile::tempdir().unwrap(), Hooked::default());
    let engine = open_over(dir.path(), &store, |s| s.flush_bytes = 1).await;
    let metrics = &engine.inner().metrics;
    store.panic_once("/samples/");
    engine.write(request(&engine, &[("a", NOW, 1.0)])).await.unwrap();
    until(|| engine.files().unwrap().len() == 1).await;
    assert_eq!(metrics.flush_failures.get(), 1);
    for i in 1..6 {
        engine.write(request(&engine, &[("a", NOW + i, 1.0)])).await.unwrap();
        engine.flush().await.unwrap();
    }
    store.panic_once("/samples/");
    until(|| metrics.compaction_failures.get() == 1).await;
    until(|| engine.files().unwrap().len() == 1).await;
    assert_eq!(all(&engine).await.len(), 6);
}

#[tokio::test(start_paused = true)]
async fn after_a_panic_while_writing_nothing_is_written_until_a_restart() {
    let (dir, store) = (tempfile::tempdir().unwrap(), Hooked::default());
    let engine = open_over(dir.path(), &store, |s| s.wal = LogStore::Object).await;
    engine.write(request(&engine, &[("a", NOW, 1.0)])).await.unwrap();
    store.panic_once("/wal/");
    let write = async |ts| {
        let write = engine.write(request(&engine, &[("a", ts, 1.0)]));
        tokio::time::timeout(Duration::from_secs(60), write).await.expect("an answer")
    };
    assert_eq!(write(NOW + 1).await.unwrap_err().kind(), catalog::ErrorKind::Unavailable);
    let refused = write(NOW + 2).await.unwrap_err();
    assert_eq!(refused.kind(), catalog::ErrorKind::Unavailable);
    assert!(refused.message().contains("panic") && refused.message().contains("restart"), "{refused}");
    assert_eq!(all(&engine).await, [(("a".to_owned(), NOW), 1.0f64.to_bits())]);
    let refused = engine.flush().await.unwrap_err();
    assert!(refused.message().contains("panic"), "{refused}");
    let delete = Selection { table: SAMPLES.clone(), matchers: vec![], start_ms: NOW, end_ms: NOW };
    engine.delete(vec![delete]).await.unwrap_err();
    engine.shutdown(Duration::from_secs(8)).await.unwrap_err();
    drop(engine);
    let engine = open_over(dir.path(), &store, |s| s.wal = LogStore::Object).await;
    assert_eq!(rows(&engine), model(&[("a", NOW, 1.0)]));
    engine.write(request(&engine, &[("a", NOW + 3, 1.0)])).await.unwrap();
    engine.flush().await.unwrap();
    assert_eq!(all(&engine).await.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_stop_waits_no_longer_than_it_was_told_to() {
    // Of those that wait none is tried after the first has failed; the flush meets the same store.
    for (within, at_most) in [(8, 9), (60, 22)] {
        let (dir, store) = (tempfile::tempdir().unwrap(), Hooked::default());
        let engine = open_over(dir.path(), &store, |s| s.wal = LogStore::Object).await;
        engine.write(request(&engine, &[("a", NOW, 1.0)])).await.unwrap();
        store.fail("");
        let mut writes = vec![];
        for i in 1..4 {
            let write = request(&engine, &[("a", NOW + i, 1.0)]);
            let engine = engine.clone();
            writes.push(tokio::spawn(async move { engine.write(write).await }));
            // The first is being tried while the others wait.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let begun = Instant::now();
        let _ = engine.shutdown(Duration::from_secs(within)).await;
        assert!(begun.elapsed() <= Duration::from_secs(at_most), "{:?} of {within} s", begun.elapsed());
        for write in writes {
            assert_eq!(write.await.unwrap().unwrap_err().kind(), catalog::ErrorKind::Unavailable);
        }
    }
}
