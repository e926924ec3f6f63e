//! Logs in a bucket: lost answers, late puts, and two processes that both believe to own one.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;

use ::bytes::Bytes;
use async_trait::async_trait;
use catalog::ErrorKind;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path as Location;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStoreExt, PutMultipartOptions,
    PutOptions, PutPayload, PutResult,
};
use parking_lot::Mutex;

use super::*;

/// What becomes of a put.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fate {
    /// It is done, and the answer is lost.
    LostAnswer,
    /// It is not done, and an error says so.
    Refused,
    /// It is held back until [`Flaky::release`].
    Late,
}

/// A store whose puts meet a fate, one after another; all is well when there are no more.
#[derive(Debug, Default)]
struct Flaky {
    inner: InMemory,
    fates: Mutex<VecDeque<Fate>>,
    late: Mutex<Vec<(Location, PutPayload, PutOptions)>>,
    /// What the next lists name although it was just deleted, list by list.
    vanishing: Mutex<VecDeque<Vec<Location>>>,
    /// How many of the newest objects the next lists leave out.
    hidden: Mutex<VecDeque<usize>>,
}

impl Flaky {
    fn then(&self, fate: Fate, times: usize) {
        self.fates.lock().extend(std::iter::repeat_n(fate, times));
    }

    /// Does the puts that were held back; returns how many came through.
    async fn release(&self) -> usize {
        self.fates.lock().clear();
        let late = std::mem::take(&mut *self.late.lock());
        let mut done = 0;
        for (location, payload, options) in late {
            done += usize::from(self.inner.put_opts(&location, payload, options).await.is_ok());
        }
        done
    }
}

impl fmt::Display for Flaky {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Flaky")
    }
}

#[async_trait]
impl ObjectStore for Flaky {
    async fn put_opts(
        &self,
        location: &Location,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        let lost = || object_store::Error::Generic { store: "Flaky", source: "connection lost".into() };
        let fate = self.fates.lock().pop_front();
        match fate {
            None => self.inner.put_opts(location, payload, options).await,
            Some(Fate::LostAnswer) => {
                self.inner.put_opts(location, payload, options).await?;
                Err(lost())
            }
            Some(Fate::Refused) => Err(lost()),
            Some(Fate::Late) => {
                self.late.lock().push((location.clone(), payload, options));
                Err(lost())
            }
        }
    }
    async fn put_multipart_opts(
        &self,
        location: &Location,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }
    async fn get_opts(&self, location: &Location, options: GetOptions) -> object_store::Result<GetResult> {
        self.inner.get_opts(location, options).await
    }
    async fn get_ranges(&self, location: &Location, ranges: &[Range<u64>]) -> object_store::Result<Vec<Bytes>> {
        self.inner.get_ranges(location, ranges).await
    }
    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Location>>,
    ) -> BoxStream<'static, object_store::Result<Location>> {
        self.inner.delete_stream(locations)
    }
    fn list(&self, prefix: Option<&Location>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.inner.list(prefix)
    }
    async fn list_with_delimiter(&self, prefix: Option<&Location>) -> object_store::Result<ListResult> {
        let mut listed = self.inner.list_with_delimiter(prefix).await;
        let hidden = self.hidden.lock().pop_front().unwrap_or(0);
        if let Ok(listed) = &mut listed {
            listed.objects.truncate(listed.objects.len().saturating_sub(hidden));
        }
        let gone = self.vanishing.lock().pop_front().unwrap_or_default();
        for location in gone {
            self.inner.delete(&location).await?;
        }
        listed
    }
    async fn copy_opts(&self, from: &Location, to: &Location, options: CopyOptions) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

async fn open(store: &Arc<Flaky>, owner: u64) -> Result<(Vec<f64>, Wal)> {
    let (records, wrong, wal) = reopen(Storage::objects(store.clone(), "db"), owner).await?;
    assert_eq!(wrong, Vec::<String>::new());
    Ok((values(&records), wal))
}

async fn objects(store: &Flaky) -> usize {
    store.inner.list_with_delimiter(Some(&Location::from("db/wal"))).await.unwrap().objects.len()
}

#[tokio::test(start_paused = true)]
async fn all_is_read_back_without_a_disk() {
    let (store, registry) = (Arc::new(Flaky::default()), registry());
    let holds = async |owner| Storage::objects(store.clone(), "db").holds(owner).await.unwrap();
    assert_eq!(holds(0).await, None);
    let mut expected = vec![];
    for owner in 1..5 {
        let (found, mut wal) = open(&store, owner).await.unwrap();
        assert_eq!(found, expected);
        for _ in 0..4 {
            let v = expected.len() as f64;
            put(&mut wal, &registry, v).await.unwrap();
            expected.push(v);
        }
        if owner == 2 {
            wal.roll();
        }
    }
    assert_eq!(holds(5).await, Some(4));
}

#[tokio::test(start_paused = true)]
async fn a_process_that_lost_the_log_is_told() {
    let (store, registry) = (Arc::new(Flaky::default()), registry());
    let (_, mut stale) = open(&store, 1).await.unwrap();
    put(&mut stale, &registry, 1.0).await.unwrap();
    let (found, mut owner) = open(&store, 2).await.unwrap();
    assert_eq!(found, [1.0]);
    for v in [2.0, 3.0] {
        assert_eq!(put(&mut stale, &registry, v).await.unwrap_err().kind(), ErrorKind::Unavailable);
        put(&mut owner, &registry, v + 10.0).await.unwrap();
    }
    // Even after all that it could have met was deleted.
    owner.roll();
    let garbage = owner.trim(owner.position()).await.unwrap().unwrap();
    garbage.delete().await;
    assert!(put(&mut stale, &registry, 4.0).await.is_err());
    put(&mut owner, &registry, 14.0).await.unwrap();
    assert_eq!(open(&store, 3).await.unwrap().0, [14.0]);
}

#[tokio::test(start_paused = true)]
async fn lost_answers_are_looked_up() {
    let (store, registry) = (Arc::new(Flaky::default()), registry());
    let (_, mut wal) = open(&store, 1).await.unwrap();
    store.then(Fate::LostAnswer, 1);
    put(&mut wal, &registry, 1.0).await.unwrap();
    store.then(Fate::Refused, 3);
    put(&mut wal, &registry, 2.0).await.unwrap();
    assert_eq!(objects(&store).await, 3);
    // Also for the fence of an opening.
    store.then(Fate::LostAnswer, 1);
    assert_eq!(open(&store, 2).await.unwrap().0, [1.0, 2.0]);
}

#[tokio::test(start_paused = true)]
async fn a_put_that_comes_late_is_void() {
    let (store, registry) = (Arc::new(Flaky::default()), registry());
    let (_, mut wal) = open(&store, 1).await.unwrap();
    put(&mut wal, &registry, 1.0).await.unwrap();
    // Longer than anyone waits.
    store.then(Fate::Late, 100_000);
    assert_eq!(put(&mut wal, &registry, 2.0).await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(store.release().await, 1);
    for v in [3.0, 4.0] {
        put(&mut wal, &registry, v).await.unwrap();
    }
    let (found, mut wal) = open(&store, 2).await.unwrap();
    assert_eq!(found, [1.0, 3.0, 4.0]);
    // What comes when its number is taken does not come at all.
    store.then(Fate::Late, 100_000);
    put(&mut wal, &registry, 5.0).await.unwrap_err();
    store.fates.lock().clear();
    put(&mut wal, &registry, 6.0).await.unwrap();
    assert_eq!(store.release().await, 0);
    assert_eq!(open(&store, 3).await.unwrap().0, [1.0, 3.0, 4.0, 6.0]);
}

#[tokio::test(start_paused = true)]
async fn what_files_hold_is_deleted() {
    let (store, registry) = (Arc::new(Flaky::default()), registry());
    let (_, mut wal) = open(&store, 1).await.unwrap();
    for v in 0..10 {
        put(&mut wal, &registry, f64::from(v)).await.unwrap();
    }
    wal.roll();
    put(&mut wal, &registry, 10.0).await.unwrap();
    assert_eq!(objects(&store).await, 12);
    let position = wal.position();
    let garbage = wal.trim(position).await.unwrap().unwrap();
    assert_eq!(open(&store, 2).await.unwrap().0, [10.0], "given up before it is deleted");
    garbage.delete().await;
    assert!(objects(&store).await <= 4, "{}", objects(&store).await);
    assert_eq!(open(&store, 3).await.unwrap().0, [10.0]);
}

#[tokio::test(start_paused = true)]
async fn what_could_not_be_deleted_does_not_come_back() {
    let (store, registry) = (Arc::new(Flaky::default()), registry());
    let (_, mut wal) = open(&store, 1).await.unwrap();
    for v in 0..4 {
        put(&mut wal, &registry, f64::from(v)).await.unwrap();
    }
    wal.roll();
    put(&mut wal, &registry, 10.0).await.unwrap();
    let position = wal.position();
    // The process ends before anything is deleted.
    drop(wal.trim(position).await.unwrap());
    assert_eq!(Storage::objects(store.clone(), "db").holds(1).await.unwrap(), Some(1), "of the last segment");
    for owner in 2..5 {
        let (found, mut wal) = open(&store, owner).await.unwrap();
        let expected: Vec<f64> = (0..owner - 1).map(|n| 10.0 + n as f64).collect();
        assert_eq!(found, expected, "owner {owner}");
        put(&mut wal, &registry, 10.0 + (owner - 1) as f64).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_log_that_is_given_up_is_fenced() {
    let (store, registry) = (Arc::new(Flaky::default()), registry());
    let (_, mut alive) = open(&store, 1).await.unwrap();
    // Nothing is in it yet, and nothing comes any more.
    assert_eq!(Storage::objects(store.clone(), "db").holds(2).await.unwrap(), None);
    assert_eq!(put(&mut alive, &registry, 1.0).await.unwrap_err().kind(), ErrorKind::Unavailable);
    // Fences don't pile up.
    for owner in 3..250 {
        assert_eq!(Storage::objects(store.clone(), "db").holds(owner).await.unwrap(), None);
    }
    assert!(objects(&store).await <= 102, "{}", objects(&store).await);
    assert_eq!(open(&store, 250).await.unwrap().0, Vec::<f64>::new());
}

#[tokio::test(start_paused = true)]
async fn what_vanishes_while_it_is_read_is_not_needed() {
    let (store, registry) = (Arc::new(Flaky::default()), registry());
    let (_, mut wal) = open(&store, 1).await.unwrap();
    for v in 0..3 {
        put(&mut wal, &registry, f64::from(v)).await.unwrap();
    }
    wal.roll();
    put(&mut wal, &registry, 10.0).await.unwrap();
    let position = wal.position();
    // The process before is about to delete what is in files, and its list is not up to date.
    drop(wal.trim(position).await.unwrap());
    let at = |n: u64| Location::from(format!("db/wal/{n:020}"));
    let late = at(objects(&store).await as u64);
    store.inner.put(&late, "what a list names after it was deleted".into()).await.unwrap();
    store.vanishing.lock().extend([vec![late.clone()], vec![at(1), at(2)]]);
    assert_eq!(open(&store, 2).await.unwrap().0, [10.0]);
    assert!(store.vanishing.lock().is_empty());
    // What no file holds is missed, and the labels that it told.
    let (_, mut wal) = open(&store, 3).await.unwrap();
    let number = objects(&store).await as u64 + 2;
    for v in [11.0, 12.0] {
        put(&mut wal, &registry, v).await.unwrap();
    }
    assert!(store.inner.head(&at(number)).await.is_ok());
    store.vanishing.lock().push_back(vec![at(number)]);
    let (records, wrong, _) = reopen(Storage::objects(store.clone(), "db"), 4).await.unwrap();
    assert_eq!((values(&records), wrong.len()), (vec![10.0], 2), "{wrong:?}");
}

#[tokio::test(start_paused = true)]
async fn a_log_is_found_although_lists_are_out_of_date() {
    for hidden in [vec![1], vec![0, 1], vec![0, 0, 2], vec![1, 1, 1]] {
        let (store, registry) = (Arc::new(Flaky::default()), registry());
        let (_, mut wal) = open(&store, 1).await.unwrap();
        put(&mut wal, &registry, 1.0).await.unwrap();
        drop(wal);
        store.hidden.lock().extend(hidden.iter());
        assert_eq!(Storage::objects(store.clone(), "db").holds(2).await.unwrap(), Some(1), "{hidden:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_log_is_found_although_a_list_is_empty() {
    let (store, registry) = (Arc::new(Flaky::default()), registry());
    for owner in 1..150 {
        let (_, mut wal) = open(&store, owner).await.unwrap();
        put(&mut wal, &registry, owner as f64).await.unwrap();
        wal.roll();
        let garbage = wal.trim(wal.position()).await.unwrap().unwrap();
        garbage.delete().await;
    }
    let (_, mut wal) = open(&store, 150).await.unwrap();
    put(&mut wal, &registry, 10.0).await.unwrap();
    store.hidden.lock().extend([1000; 3]);
    assert_eq!(Storage::objects(store.clone(), "db").holds(151).await.unwrap(), Some(150));
    store.hidden.lock().extend([1000; 3]);
    assert_eq!(open(&store, 152).await.unwrap().0, [10.0]);
    assert!(store.hidden.lock().is_empty());
    // One that stays so is no reason to wait for ever.
    store.hidden.lock().extend(std::iter::repeat_n(1000, 100_000));
    let refused = open(&store, 153).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unavailable);
    assert!(refused.to_string().contains("does not name db/wal/00000000000000000000"), "{refused}");
}
