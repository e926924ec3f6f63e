//! Tests of the journal: replay, checkpoints, damage, lost answers and fencing.

use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, PutMultipartOptions, PutOptions,
    PutPayload, PutResult,
};
use proptest::prelude::*;

use super::*;
use crate::SeededEntropy;
use crate::files::{TagPart, View};

fn part(id: i64) -> TagPart {
    let path = crate::tag_parts::path(20000, id);
    TagPart { id, path, day: 20000, sets: 10, bytes: 100, footer_bytes: 50, seq: id as u64, crc32: 1 }
}

fn add(id: i64) -> Commit {
    Commit { add_parts: vec![part(id)], ..Commit::default() }
}

fn not_closing() -> watch::Receiver<bool> {
    watch::channel(false).1
}

async fn read(store: &Arc<dyn ObjectStore>, seed: u64) -> Result<Journal> {
    // The sender must live as long as nothing is closed.
    let (closing, closed) = watch::channel(false);
    std::mem::forget(closing);
    let entropy = Arc::new(SeededEntropy::new(seed));
    Ok(Journal::read(store.clone(), "db", entropy, closed).await?.expect("a journal"))
}

/// Begins the journal if there is none, and takes it over.
async fn open(store: &Arc<dyn ObjectStore>, seed: u64) -> Result<Journal> {
    let entropy = Arc::new(SeededEntropy::new(seed));
    if Journal::read(store.clone(), "db", entropy, not_closing()).await?.is_none() {
        Journal::begin(store.clone(), "db", State::new(42)).await?;
    }
    let mut journal = read(store, seed).await?;
    journal.take_over(1000).await?;
    Ok(journal)
}

fn bucket() -> Arc<dyn ObjectStore> {
    Arc::new(InMemory::new())
}

async fn names(store: &Arc<dyn ObjectStore>) -> Vec<String> {
    let objects: Vec<_> = store.list(None).map_ok(|o| o.location.to_string()).try_collect().await.unwrap();
    objects
}

#[tokio::test]
async fn replay_gives_the_state() {
    let store = bucket();
    let mut journal = open(&store, 1).await.unwrap();
    assert_eq!((journal.epoch(), journal.place().number, journal.state().next_id), (1, 1, 1 << 32));
    let ids: Vec<i64> = (0..3 * CHECKPOINT_ENTRIES as i64).collect();
    for id in &ids {
        journal.commit(add(*id), 2000).await.unwrap();
        if id % 3 == 2 {
            journal.commit(Commit { remove_parts: vec![id - 1], ..Commit::default() }, 3000).await.unwrap();
        }
        journal.checkpoint_if_due().await;
    }
    let again = read(&store, 2).await.unwrap();
    assert_eq!((again.state(), again.place()), (journal.state(), journal.place()));
    assert_eq!(again.state().parts.len(), ids.len() / 3 * 2);
    assert_eq!(again.state().next_seq, ids.len() as u64);
    assert_eq!(again.state().superseded.len(), ids.len() / 3);
    assert_eq!(again.state().superseded[0], (part(1).path, 3000));
    let count = |folder: &str, names: &[String]| names.iter().filter(|n| n.contains(folder)).count();
    let names = names(&store).await;
    assert_eq!(count("/checkpoints/", &names), CHECKPOINTS);
    let entries = count("/journal/", &names) as u64;
    assert!((CHECKPOINT_ENTRIES..2 * CHECKPOINT_ENTRIES + 1).contains(&entries), "{entries} entries");
    let opened = open(&store, 3).await.unwrap();
    assert_eq!((opened.epoch(), opened.state().next_id), (2, 2 << 32));
}

#[tokio::test]
async fn a_commit_must_fit() {
    let store = bucket();
    let mut journal = open(&store, 1).await.unwrap();
    journal.commit(add(7), 0).await.unwrap();
    let place = journal.place();
    let twice = Commit { add_parts: vec![part(8), part(8)], ..Commit::default() };
    let gone = Commit { remove_parts: vec![9], ..Commit::default() };
    let gone_twice = Commit { remove_parts: vec![7, 7], ..Commit::default() };
    for commit in [add(7), twice, gone, gone_twice, Commit { remove: vec![7], ..Commit::default() }] {
        assert_eq!(journal.commit(commit, 0).await.unwrap_err().kind(), ErrorKind::Internal);
    }
    assert_eq!(journal.place(), place);
}

#[tokio::test]
async fn who_opens_last_fences_the_others() {
    let store = bucket();
    let mut old = open(&store, 1).await.unwrap();
    old.commit(add(1), 0).await.unwrap();
    let mut new = open(&store, 2).await.unwrap();
    assert_eq!(new.confirm().await.map_err(|e| e.to_string()), Ok(()));
    let error = old.commit(add(2), 0).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.message().contains("epoch 2"), "{error}");
    assert!(old.is_fenced() && old.confirm().await.is_err());
    new.commit(add(3), 0).await.unwrap();
    assert!(old.commit(add(4), 0).await.is_err());
    let ids: Vec<i64> = read(&store, 3).await.unwrap().state().parts.iter().map(|p| p.id).collect();
    assert_eq!(ids, [1, 3]);
    // One that asks before it writes sees it too.
    let _newest = open(&store, 4).await.unwrap();
    assert!(new.confirm().await.is_err() && new.is_fenced());
}

#[tokio::test]
async fn damage_is_named_and_gone_around_where_it_can_be() {
    let store = bucket();
    let mut journal = open(&store, 1).await.unwrap();
    for id in 0..CHECKPOINT_ENTRIES as i64 + 5 {
        journal.commit(add(id), 0).await.unwrap();
        journal.checkpoint_if_due().await;
    }
    let state = journal.state().clone();
    let folder = Folder { store: store.clone(), database: "db".to_owned() };
    let damage = async |location: &Path| {
        let whole = store.get(location).await.unwrap().bytes().await.unwrap();
        let mut bytes = whole.to_vec();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        store.put(location, bytes.into()).await.unwrap();
        whole
    };
    // The newest checkpoint: the older one and the entries say the same.
    let newest = folder.checkpoint(*journal.checkpoints.last().unwrap());
    let whole = damage(&newest).await;
    assert_eq!(read(&store, 2).await.unwrap().state(), &state);
    store.put(&newest, whole.into()).await.unwrap();
    // An entry after it.
    let entry = folder.entry(journal.place().number - 1);
    let whole = damage(&entry).await;
    let error = read(&store, 2).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.message().contains(entry.as_ref()), "{error}");
    store.delete(&entry).await.unwrap();
    let error = read(&store, 2).await.unwrap_err();
    assert!(error.message().contains(entry.as_ref()) && error.kind() == ErrorKind::Corrupt, "{error}");
    let mut newer = whole.to_vec();
    newer[4] = FORMAT + 1;
    store.put(&entry, newer.into()).await.unwrap();
    let error = read(&store, 2).await.unwrap_err();
    assert!(error.message().contains(entry.as_ref()) && error.kind() == ErrorKind::Invalid, "{error}");
    store.put(&entry, whole.into()).await.unwrap();
    assert_eq!(read(&store, 2).await.unwrap().state(), &state);
    // Without a checkpoint nothing is certain.
    for number in &journal.checkpoints {
        store.delete(&folder.checkpoint(*number)).await.unwrap();
    }
    let error = read(&store, 2).await.unwrap_err();
    let oldest = folder.checkpoint(journal.checkpoints[0]);
    assert!(error.message().contains(oldest.as_ref()) && error.kind() == ErrorKind::Corrupt, "{error}");
}

#[tokio::test]
async fn schemas_of_a_newer_version_are_refused() {
    let store = bucket();
    let mut journal = open(&store, 1).await.unwrap();
    journal.tables[0].1 += 1;
    let mut entry = journal.next(Commit::default(), 0).unwrap();
    entry.tables = journal.tables.clone();
    let bytes = encode(&entry).unwrap();
    store.put(&journal.folder.entry(entry.number), bytes.into()).await.unwrap();
    let error = open(&store, 2).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Invalid && error.message().contains("schema version"), "{error}");
}

/// What goes wrong with one call.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// It is not done.
    Refused,
    /// It is done, and the answer is lost.
    Lost,
    /// It is done, and the answer says that it had been done before.
    Repeated,
    /// It is done, and what is read is cut short.
    Torn,
}

/// A store that fails at one call.
#[derive(Debug)]
struct Faulty {
    inner: InMemory,
    calls: AtomicUsize,
    at: usize,
    fault: Fault,
}

impl Faulty {
    fn now(&self) -> Option<Fault> {
        (self.calls.fetch_add(1, Ordering::SeqCst) == self.at).then_some(self.fault)
    }
}

fn gone() -> object_store::Error {
    object_store::Error::Generic { store: "faulty", source: "connection lost".into() }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty")
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        let fault = self.now();
        if matches!(fault, Some(Fault::Refused)) {
            return Err(gone());
        }
        let put = self.inner.put_opts(location, payload, options).await;
        match fault {
            Some(Fault::Repeated) => {
                Err(object_store::Error::AlreadyExists { path: location.to_string(), source: "again".into() })
            }
            Some(_) => Err(gone()),
            None => put,
        }
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        match self.now() {
            Some(Fault::Torn) => {
                let whole = self.inner.get_opts(location, options.clone()).await?.bytes().await?;
                let torn = InMemory::new();
                torn.put(location, whole.slice(..whole.len() / 2).into()).await?;
                torn.get_opts(location, options).await
            }
            Some(_) => Err(gone()),
            None => self.inner.get_opts(location, options).await,
        }
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        match self.now() {
            Some(_) => futures::stream::once(async { Err(gone()) }).boxed(),
            None => self.inner.delete_stream(locations),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        match self.now() {
            Some(_) => futures::stream::once(async { Err(gone()) }).boxed(),
            None => self.inner.list(prefix),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// Opens, commits, opens again; returns how many calls the store saw.
async fn history(at: usize, fault: Fault) -> usize {
    let faulty = Arc::new(Faulty { inner: InMemory::new(), calls: AtomicUsize::new(0), at, fault });
    let store: Arc<dyn ObjectStore> = faulty.clone();
    let context = format!("{fault:?} at call {at}");
    let mut ids = Vec::new();
    for (opening, commits) in [(0, CHECKPOINT_ENTRIES), (1, 3)] {
        let mut journal = open(&store, opening).await.unwrap_or_else(|e| panic!("{context}: {e}"));
        for _ in 0..commits {
            let id = ids.len() as i64;
            journal.commit(add(id), 0).await.unwrap_or_else(|e| panic!("{context}: {e}"));
            ids.push(id);
            journal.checkpoint_if_due().await;
        }
        let found: Vec<i64> = journal.state().parts.iter().map(|p| p.id).collect();
        assert_eq!(found, ids, "{context}");
    }
    let journal = read(&store, 9).await.unwrap();
    let found: Vec<i64> = journal.state().parts.iter().map(|p| p.id).collect();
    assert_eq!((found, journal.place().number), (ids, CHECKPOINT_ENTRIES + 5), "{context}");
    faulty.calls.load(Ordering::SeqCst)
}

#[tokio::test(start_paused = true)]
async fn any_call_may_fail_or_its_answer_be_lost() {
    let calls = history(usize::MAX, Fault::Refused).await;
    assert!(calls > CHECKPOINT_ENTRIES as usize + 20, "{calls} calls");
    // The puts between the opening and the checkpoint are all alike.
    for at in (0..20).chain((20..CHECKPOINT_ENTRIES as usize).step_by(11)).chain(CHECKPOINT_ENTRIES as usize..calls) {
        for fault in [Fault::Refused, Fault::Lost, Fault::Repeated, Fault::Torn] {
            history(at, fault).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_commit_that_nobody_waits_for_is_settled_by_the_next() {
    // The put of the first commit is done, its answer is lost.
    let faulty = Arc::new(Faulty { inner: InMemory::new(), calls: AtomicUsize::new(0), at: 0, fault: Fault::Lost });
    let before = {
        let store: Arc<dyn ObjectStore> = faulty.clone();
        open(&store, 1).await.unwrap();
        faulty.calls.load(Ordering::SeqCst)
    };
    let faulty =
        Arc::new(Faulty { inner: InMemory::new(), calls: AtomicUsize::new(1), at: before, fault: Fault::Lost });
    let store: Arc<dyn ObjectStore> = faulty.clone();
    let mut journal = open(&store, 1).await.unwrap();
    while faulty.calls.load(Ordering::SeqCst) < before {
        journal.confirm().await.unwrap();
    }
    let waited = tokio::time::timeout(Duration::from_millis(1), journal.commit(add(1), 0)).await;
    assert!(waited.is_err(), "{waited:?}");
    journal.commit(add(2), 0).await.unwrap();
    let ids: Vec<i64> = read(&store, 2).await.unwrap().state().parts.iter().map(|p| p.id).collect();
    assert_eq!(ids, [1, 2]);
    assert_eq!(journal.take_entries().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn closing_ends_the_wait_for_the_store() {
    let store = bucket();
    open(&store, 1).await.unwrap();
    let (closing, closed) = watch::channel(false);
    let entropy = Arc::new(SeededEntropy::new(5));
    let mut journal = Journal::read(store.clone(), "db", entropy, closed).await.unwrap().unwrap();
    journal.take_over(0).await.unwrap();
    let full = Faulty { inner: InMemory::new(), calls: AtomicUsize::new(0), at: 0, fault: Fault::Refused };
    journal.folder.store = Arc::new(full);
    let commit = tokio::spawn(async move {
        let result = journal.commit(add(1), 0).await;
        (journal, result)
    });
    tokio::time::sleep(Duration::from_millis(10)).await;
    closing.send(true).unwrap();
    let (mut journal, result) = commit.await.unwrap();
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Unavailable);
    assert!(journal.commit(add(2), 0).await.is_err(), "closed");
}

fn entry() -> Entry {
    let id = CommitId(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef);
    Entry { number: 3, id, epoch: 2, time_ms: -5, tables: vec![(1, 1)], commit: add(5) }
}

#[test]
fn every_flipped_bit_is_found() {
    let location = Path::from("db/journal/3");
    let bytes = encode(&entry()).unwrap();
    assert_eq!(decode::<Entry>(ENTRY_KIND, &bytes, &location).unwrap(), entry());
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut bytes = bytes.to_vec();
            bytes[at] ^= 1 << bit;
            assert!(decode::<Entry>(ENTRY_KIND, &bytes, &location).is_err(), "bit {bit} of byte {at}");
        }
        assert!(decode::<Entry>(ENTRY_KIND, &bytes[..at], &location).is_err(), "cut to {at}");
    }
    assert!(decode::<Entry>(CHECKPOINT_KIND, &bytes, &location).is_err());
}

#[test]
fn places_as_text() {
    let place = entry().place();
    assert_eq!(place.to_string(), "3:0123456789abcdef0123456789abcdef");
    assert_eq!(place.to_string().parse::<Place>().unwrap(), place);
    for bad in ["", "3", "3:12", ":", "x:0123456789abcdef0123456789abcdef", "3:+123456789abcdef0123456789abcdeg"] {
        assert!(bad.parse::<Place>().is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn any_bytes_decode_or_fail(body in proptest::collection::vec(any::<u8>(), 0..200), length: u32) {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&[FORMAT, ENTRY_KIND, 0, 0, 0, 0, 0, 0]);
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&body);
        let crc = crc32fast::hash(&bytes[12..]);
        bytes[8..12].copy_from_slice(&crc.to_le_bytes());
        prop_assert!(decode::<Entry>(ENTRY_KIND, &bytes, &Path::from("x")).is_err());
        prop_assert!(decode::<Entry>(ENTRY_KIND, &body, &Path::from("x")).is_err());
    }

    /// With a checksum that fits, as a faulty writer would leave it.
    #[test]
    fn a_changed_text_is_read_or_named(changes in proptest::collection::vec(any::<(u16, u8)>(), 1..4)) {
        let state = serde_json::to_vec(&State::new(42)).unwrap();
        let mut text = state.clone();
        for (at, byte) in changes {
            let at = usize::from(at) % text.len();
            text[at] = byte;
        }
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&[FORMAT, ENTRY_KIND, 0, 0, 0, 0, 0, 0]);
        bytes.extend_from_slice(&(text.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&zstd::bulk::compress(&text, LEVEL).unwrap());
        let crc = crc32fast::hash(&bytes[12..]);
        bytes[8..12].copy_from_slice(&crc.to_le_bytes());
        if let Err(e) = decode::<State>(ENTRY_KIND, &bytes, &Path::from("x")) {
            prop_assert_eq!(e.kind(), ErrorKind::Corrupt);
            prop_assert!(e.message().contains('x'));
        }
    }
}

#[tokio::test]
async fn a_process_that_was_away_for_long_is_fenced() {
    let store = bucket();
    let mut old = open(&store, 1).await.unwrap();
    old.commit(add(1), 1000).await.unwrap();
    let mut new = open(&store, 2).await.unwrap();
    for id in 2..4 * CHECKPOINT_ENTRIES as i64 {
        new.commit(add(id), 2000).await.unwrap();
        new.checkpoint_if_due().await;
    }
    assert!(!names(&store).await.contains(&format!("db/journal/{:020}", 2)), "the entries of then are gone");
    let refused = old.commit(add(1000), 3000).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unavailable);
    assert!(old.is_fenced());
    assert_eq!(read(&store, 3).await.unwrap().state(), new.state());
}

fn view(name: &str, definition: &str) -> View {
    let (name, definition) = (name.to_owned(), definition.to_owned());
    View { name, definition, columns: vec![], owner: "me".to_owned(), created_ms: 7 }
}

/// The version of each object of the journal in the bucket, by its name.
async fn formats(store: &Arc<dyn ObjectStore>) -> Vec<(String, u8)> {
    let mut out = Vec::new();
    for name in names(store).await {
        let bytes = store.get(&Path::from(name.as_str())).await.unwrap().bytes().await.unwrap();
        out.push((name.trim_start_matches("db/").to_owned(), bytes[4]));
    }
    out.sort();
    out
}

#[tokio::test]
async fn views_are_kept_and_told_by_the_format() {
    let store = bucket();
    let mut journal = open(&store, 1).await.unwrap();
    journal.commit(add(1), 0).await.unwrap();
    let entry = |n: u64| format!("journal/{n:020}");
    let old = [(format!("checkpoints/{:020}", 0), 1), (entry(1), 1), (entry(2), 1)];
    assert_eq!(formats(&store).await, old, "older servers read what says nothing of views");
    let made = Commit { views: vec![view("b", "SELECT 1"), view("a", "SELECT 2")], ..Commit::default() };
    journal.commit(made, 0).await.unwrap();
    let changed = vec![view("a", "SELECT 3"), view("c", "SELECT 4")];
    let changed = Commit { views: changed, drop_views: vec!["b".to_owned()], ..Commit::default() };
    journal.commit(changed, 0).await.unwrap();
    assert_eq!(formats(&store).await[3..], [(entry(3), 2), (entry(4), 2)]);
    let kept = [view("a", "SELECT 3"), view("c", "SELECT 4")];
    assert_eq!(read(&store, 2).await.unwrap().state().views, kept);
    journal.checkpoint().await.unwrap();
    assert_eq!(formats(&store).await[1], (format!("checkpoints/{:020}", 4), 2));
    let again = read(&store, 3).await.unwrap();
    assert_eq!((again.base().number, &again.state().views[..]), (4, &kept[..]));
    let none = Commit { drop_views: vec!["a".to_owned(), "c".to_owned()], ..Commit::default() };
    journal.commit(none, 0).await.unwrap();
    journal.checkpoint().await.unwrap();
    assert_eq!(
        formats(&store).await.iter().find(|(n, _)| n.ends_with("checkpoints/00000000000000000005")).map(|f| f.1),
        Some(1)
    );
    assert!(read(&store, 4).await.unwrap().state().views.is_empty());
}
