//! An object store in memory that fails like one behind a network.
//!
//! A request travels: it takes effect some time after it was sent, and the answer takes some time more. So a request may
//! be lost, its answer may be lost, it may be slow, and it may take effect after whoever sent it has given up, been
//! replaced by another process, or died. What is put is whole or absent.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyMode, CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

use super::world::{Process, Step};

/// How long lists may leave out what is new and name what is gone, where they may.
const STALE: Duration = Duration::from_secs(3);

/// All objects.
#[derive(Debug, Default)]
pub(super) struct Bucket {
    objects: Mutex<Objects>,
}

#[derive(Debug, Default)]
struct Objects {
    /// Bytes, and since when they are there.
    live: BTreeMap<String, (Bytes, Instant)>,
    /// Size, and since when they are gone.
    gone: BTreeMap<String, (u64, Instant)>,
}

impl Objects {
    fn put(&mut self, path: &str, bytes: Bytes, create: bool) -> Result<()> {
        if create && self.live.contains_key(path) {
            return Err(Error::AlreadyExists { path: path.to_owned(), source: "it exists".into() });
        }
        self.gone.remove(path);
        self.live.insert(path.to_owned(), (bytes, Instant::now()));
        Ok(())
    }

    fn get(&self, path: &str) -> Result<Bytes> {
        let found = self.live.get(path).map(|o| o.0.clone());
        found.ok_or_else(|| Error::NotFound { path: path.to_owned(), source: "no such object".into() })
    }

    fn delete(&mut self, path: &str) {
        if let Some((bytes, _)) = self.live.remove(path) {
            self.gone.insert(path.to_owned(), (bytes.len() as u64, Instant::now()));
        }
    }

    /// Names and sizes below a prefix, as they are or as they were a moment ago.
    fn list(&self, prefix: &str, stale: bool) -> Vec<(String, u64)> {
        let old = |at: &Instant| !stale || at.elapsed() >= STALE;
        let live = self.live.iter().filter(|(_, o)| old(&o.1)).map(|(path, o)| (path.clone(), o.0.len() as u64));
        let gone = self.gone.iter().filter(|(_, o)| !old(&o.1)).map(|(path, o)| (path.clone(), o.0));
        let mut all: Vec<_> = live.chain(gone).filter(|(path, _)| path.starts_with(prefix)).collect();
        all.sort();
        all
    }
}

/// The store as one process sees it.
#[derive(Debug, Clone)]
pub(super) struct Client {
    process: Arc<Process>,
    bucket: Arc<Bucket>,
}

/// What happens to one request.
#[derive(Debug, Default)]
struct Fate {
    /// How long it travels, and its answer.
    there: Duration,
    back: Duration,
    /// It never takes effect.
    lost: bool,
    /// The answer is an error, after so long.
    fails: Option<Duration>,
}

impl Client {
    pub fn open(process: &Arc<Process>, bucket: &Arc<Bucket>) -> Arc<dyn ObjectStore> {
        Arc::new(Self { process: process.clone(), bucket: bucket.clone() })
    }

    /// Throws for what happens to a request.
    fn fate(&self) -> Fate {
        let world = &self.process.world;
        let dice = &world.dice;
        let millis = |from, to| Duration::from_millis(dice.between(from, to) as u64);
        let normal = Fate { there: millis(0, 15), back: millis(0, 15), ..Fate::default() };
        if !dice.permille(world.store_faults.load(Ordering::Relaxed).into()) {
            return normal;
        }
        let (name, fate) = match dice.below(6) {
            0 => ("fault: request lost", Fate { lost: true, fails: Some(millis(1, 200)), ..normal }),
            1 => ("fault: answer lost", Fate { fails: Some(millis(20, 300)), ..normal }),
            2 => ("fault: request late", Fate { there: millis(100, 90_000), fails: Some(millis(1, 100)), ..normal }),
            3 => ("fault: slow request", Fate { there: millis(1000, 30_000), ..normal }),
            4 => ("fault: slow answer", Fate { back: millis(1000, 30_000), ..normal }),
            _ => ("fault: no answer", Fate { lost: dice.coin(), fails: Some(Duration::from_secs(60)), ..normal }),
        };
        world.trace.count(name);
        fate
    }

    /// Sends a request. `effect` is what it does to the objects.
    async fn send<T: Send + 'static>(
        &self,
        what: &'static str,
        on: &str,
        detail: u64,
        effect: impl FnOnce(&mut Objects) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let step = self.process.step();
        if step == Step::Never {
            return std::future::pending().await;
        }
        let Fate { there, back, lost, fails } = self.fate();
        let (tell, told) = oneshot::channel();
        let (process, bucket, on) = (self.process.clone(), self.bucket.clone(), on.to_owned());
        tokio::spawn(async move {
            sleep(there).await;
            let world = &process.world;
            // What a dead process had sent may still be on its way, for long, or have been lost with it.
            let mut lost = lost;
            if process.is_dead() {
                lost |= world.dice.coin();
                if !lost {
                    world.trace.count("fault: request of a dead process");
                    sleep(Duration::from_millis(world.dice.between(0, 60_000) as u64)).await;
                }
            }
            let result = if lost { Err(failed("lost")) } else { effect(&mut bucket.objects.lock()) };
            let ended = match &result {
                Ok(_) if fails.is_some() => "done, and nobody is told",
                Ok(_) => "ok",
                Err(Error::AlreadyExists { .. }) => "exists",
                Err(Error::NotFound { .. }) => "not found",
                Err(_) => "lost",
            };
            world.trace.call(&process.name, what, &on, detail, ended);
            sleep(back).await;
            // Whoever asked may have given up.
            let _ = tell.send(result);
        });
        if let Step::GoAndDie(death) = step {
            self.process.die(death);
        }
        let answer = match fails {
            Some(after) => {
                sleep(after).await;
                Err(failed("no answer"))
            }
            None => told.await.unwrap_or_else(|_| Err(failed("no answer"))),
        };
        if self.process.is_dead() {
            return std::future::pending().await;
        }
        answer
    }

    async fn listed(&self, prefix: Option<&Path>) -> Result<Vec<ObjectMeta>> {
        let prefix = prefix.map_or(String::new(), |p| format!("{p}/"));
        let world = &self.process.world;
        // Without the list of checkpoints no journal is found, and none is claimed to be.
        let bears = !prefix.contains("checkpoints");
        let stale = bears && world.stale_lists.load(Ordering::Relaxed) && world.dice.permille(100);
        if stale {
            world.trace.count("fault: stale list");
        }
        let inside = prefix.clone();
        let found = self.send("list", &prefix, 0, move |objects| Ok(objects.list(&inside, stale))).await?;
        Ok(found.into_iter().map(|(path, size)| meta(path, size)).collect())
    }
}

fn failed(what: &'static str) -> Error {
    Error::Generic { store: "simulated", source: what.into() }
}

fn meta(path: String, size: u64) -> ObjectMeta {
    ObjectMeta { location: Path::from(path), last_modified: Default::default(), size, e_tag: None, version: None }
}

impl std::fmt::Display for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("simulated store")
    }
}

#[async_trait]
impl ObjectStore for Client {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let create = match options.mode {
            PutMode::Overwrite => false,
            PutMode::Create => true,
            // Nothing asks for it.
            PutMode::Update(_) => return Err(unsupported()),
        };
        let bytes: Bytes = payload.into();
        let path = location.to_string();
        let detail = crc32fast::hash(&bytes).into();
        let what = if create { "create" } else { "put" };
        self.send(what, location.as_ref(), detail, move |objects| objects.put(&path, bytes, create)).await?;
        Ok(PutResult { e_tag: None, version: None })
    }

    async fn put_multipart_opts(&self, _: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        // No object of a simulation is so large.
        Err(unsupported())
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let path = location.to_string();
        let detail = options.range.as_ref().map_or(0, |r| crc32fast::hash(format!("{r:?}").as_bytes()).into());
        let bytes = self.send("get", location.as_ref(), detail, move |objects| objects.get(&path)).await?;
        let size = bytes.len() as u64;
        let range = match options.range {
            None => 0..size,
            Some(range) => range.as_range(size).map_err(|e| Error::Generic { store: "simulated", source: e.into() })?,
        };
        let meta = meta(location.to_string(), size);
        let body = if options.head { Bytes::new() } else { bytes.slice(range.start as usize..range.end as usize) };
        let mut pieces = vec![Ok(body.clone())];
        let world = &self.process.world;
        if world.dice.permille(u64::from(world.store_faults.load(Ordering::Relaxed)) / 4) && !body.is_empty() {
            world.trace.count("fault: torn body");
            let torn = world.dice.below(body.len() as u64) as usize;
            pieces = vec![Ok(body.slice(..torn)), Err(failed("the connection broke"))];
        }
        let payload = GetResultPayload::Stream(futures::stream::iter(pieces).boxed());
        Ok(GetResult { payload, meta, range, attributes: Default::default() })
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let client = self.clone();
        let delete = move |location: Path| {
            let client = client.clone();
            async move {
                let path = location.to_string();
                let effect = move |objects: &mut Objects| {
                    objects.delete(&path);
                    Ok(())
                };
                client.send("delete", location.as_ref(), 0, effect).await?;
                Ok(location)
            }
        };
        locations.and_then(delete).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (client, prefix) = (self.clone(), prefix.cloned());
        let list = async move {
            let found = client.listed(prefix.as_ref()).await?;
            Ok::<_, Error>(futures::stream::iter(found.into_iter().map(Ok::<_, Error>)))
        };
        futures::stream::once(list).try_flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let mut objects = self.listed(prefix).await?;
        let depth = prefix.map_or(0, |p| p.parts().count()) + 1;
        objects.retain(|o| o.location.parts().count() == depth);
        Ok(ListResult { common_prefixes: vec![], objects })
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        let (source, target) = (from.to_string(), to.to_string());
        let create = options.mode == CopyMode::Create;
        let effect = move |objects: &mut Objects| {
            let bytes = objects.get(&source)?;
            objects.put(&target, bytes, create)
        };
        self.send("copy", to.as_ref(), 0, effect).await
    }
}

fn unsupported() -> Error {
    Error::NotSupported { source: "not simulated".into() }
}
