//! The file catalog: which immutable files make up each table.
//!
//! The journal in the bucket ([`crate::journal`]) is the truth: a change is made when its entry is there. A SQL database
//! ([`index`]) follows it for outside readers: its tables have the DuckLake 1.0 layout, so that DuckDB can attach it and
//! read the files with decoded names. It is brought up to date after each commit, and when it can't be, later:
//! no commit fails because of it. `catalog/FORMAT.md` describes both.

mod format1;
pub mod index;
mod lake;
mod sql;
#[cfg(test)]
mod tests;

use std::collections::{HashSet, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use futures::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt};
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, watch};

use crate::journal::{self, Entry, Journal, Place};
use crate::{Clock, Entropy, Error, Matcher, Result, SystemEntropy, tables};

pub use index::{Index, SqlIndex};

/// How long a commit waits for the SQL catalog to follow.
const FOLLOW_MAX: Duration = Duration::from_secs(2);

/// Entries that are kept for a SQL catalog that can't be reached. One that is further behind is made anew.
const BACKLOG_MAX: usize = 256;

/// An immutable file of a table.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DataFile {
    /// Number, unique over all files and tag parts of the database.
    pub id: i64,
    /// [`crate::TableSchema::id`].
    pub table_id: u16,
    /// Object path relative to the database's prefix.
    pub path: String,
    /// UTC day of all its rows, days since the epoch.
    pub day: i32,
    /// 0 as flushed, 1 compacted to an hour, 2 compacted to a day.
    pub level: u8,
    /// Rows.
    pub rows: u64,
    /// Size of the object.
    pub bytes: u64,
    /// Length of the Parquet metadata at its end, without the eight bytes that follow it.
    pub footer_bytes: u64,
    /// First timestamp, milliseconds.
    pub ts_min: i64,
    /// Last timestamp, milliseconds.
    pub ts_max: i64,
    /// Least metric code.
    pub metric_min: i64,
    /// Greatest metric code.
    pub metric_max: i64,
    /// First flush whose rows are in it.
    pub seq_min: u64,
    /// Last flush whose rows are in it.
    pub seq_max: u64,
    /// CRC-32 of the Parquet metadata and the eight bytes that follow it. The metadata hold the checks of all else.
    pub crc32: u32,
    /// Statistics for outside readers, for the time and the codes; kept by the catalog, left out of the [`State`] that
    /// [`FileCatalog::open`] returns.
    pub columns: Vec<ColumnStats>,
}

/// Statistics of one physical column, as DuckLake keeps them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ColumnStats {
    /// Field id.
    pub field_id: i32,
    /// Compressed size.
    pub bytes: u64,
    /// Values, nulls included.
    pub values: u64,
    /// Nulls.
    pub nulls: u64,
    /// Least value as DuckDB prints it: integers in decimal, times by [`timestamp_text`]. `None` when not known.
    pub min: Option<String>,
    /// Greatest value.
    pub max: Option<String>,
}

/// An immutable file of tag sets that rows of one day refer to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TagPart {
    /// Number, unique over all files and tag parts of the database.
    pub id: i64,
    /// Object path relative to the database's prefix.
    pub path: String,
    /// UTC day, days since the epoch.
    pub day: i32,
    /// Tag sets in it.
    pub sets: u64,
    /// Size of the object.
    pub bytes: u64,
    /// Length of the Parquet metadata at its end, without the eight bytes that follow it.
    pub footer_bytes: u64,
    /// Flush that wrote it, or the last one merged into it.
    pub seq: u64,
    /// CRC-32 of the object.
    pub crc32: u32,
}

/// A request to delete rows: those of a table whose tags match and whose time lies in a range, in files that are older
/// than it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Delete {
    /// Number, from [`FileCatalog::next_id`]. A file with a greater id was written with the delete applied.
    pub id: i64,
    /// Its place among flushes, from [`FileCatalog::next_seq`]: it concerns rows of files with a lower
    /// [`DataFile::seq_max`].
    pub seq: u64,
    /// [`crate::TableSchema::id`].
    pub table_id: u16,
    /// Tag sets are meant that satisfy all of them.
    pub matchers: Vec<Matcher>,
    /// First timestamp, milliseconds.
    pub start_ms: i64,
    /// Last timestamp, milliseconds; it is deleted too.
    pub end_ms: i64,
    /// When it was asked for, milliseconds.
    pub created_ms: i64,
}

/// A query under a name, which SQL shows as a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// Its name, unique among views.
    pub name: String,
    /// The text of the query.
    pub definition: String,
    /// What its columns are called, the first ones, where that was said apart from the query.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub columns: Vec<String>,
    /// Who made it.
    pub owner: String,
    /// When, milliseconds.
    pub created_ms: i64,
}

/// A change of the catalog: whole or not at all.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Commit {
    /// Files that become visible.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub add: Vec<DataFile>,
    /// Tag parts that become visible.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub add_parts: Vec<TagPart>,
    /// Ids of files that leave.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub remove: Vec<i64>,
    /// Ids of tag parts that leave.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub remove_parts: Vec<i64>,
    /// Metric metadata to keep: metric name and JSON.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub metadata: Vec<(String, String)>,
    /// Deletes that take effect.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub add_deletes: Vec<Delete>,
    /// Ids of deletes that no file needs any more.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub remove_deletes: Vec<i64>,
    /// Paths of files and parts that left and whose objects are deleted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub forget: Vec<String>,
    /// Views that are made, in the place of those of the same names.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub views: Vec<View>,
    /// Names of views that are dropped.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub drop_views: Vec<String>,
}

/// What a catalog holds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// Visible files, by id.
    pub files: Vec<DataFile>,
    /// Visible tag parts, by id.
    pub parts: Vec<TagPart>,
    /// Deletes in effect, by id.
    pub deletes: Vec<Delete>,
    /// The database's hash seed.
    pub seed: u64,
    /// The first id that [`FileCatalog::next_id`] will give. It follows from the epoch and is not stored.
    #[serde(skip)]
    pub next_id: i64,
    /// The first flush number that [`FileCatalog::next_seq`] will give.
    pub next_seq: u64,
    /// Paths of files and parts that left, with the time when they did, milliseconds; the oldest first.
    pub superseded: Vec<(String, i64)>,
    /// Metric metadata: metric name and JSON, by name.
    pub metadata: Vec<(String, String)>,
    /// Views, by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub views: Vec<View>,
}

impl State {
    /// That of a new database.
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, next_seq: 1, ..Self::default() }
    }

    /// Whether a change fits.
    pub(crate) fn check(&self, commit: &Commit) -> Result<()> {
        let wrong = |what: &str, id: i64| Error::internal(format!("{what} {id}"));
        let mut new = HashSet::new();
        for id in commit.add.iter().map(|f| f.id).chain(commit.add_parts.iter().map(|p| p.id)) {
            let known = position(&self.files, id, |f| f.id).is_ok() || position(&self.parts, id, |p| p.id).is_ok();
            if known || !new.insert(id) {
                return Err(wrong("a file is to be added that is in the catalog, number", id));
            }
        }
        let mut gone = HashSet::new();
        for id in &commit.remove {
            if position(&self.files, *id, |f| f.id).is_err() || !gone.insert(*id) {
                return Err(wrong("a file is to be removed that is not in the catalog, number", *id));
            }
        }
        for id in &commit.remove_parts {
            if position(&self.parts, *id, |p| p.id).is_err() || !gone.insert(*id) {
                return Err(wrong("a tag part is to be removed that is not in the catalog, number", *id));
            }
        }
        Ok(())
    }

    /// Makes a change that fits.
    pub(crate) fn apply(&mut self, commit: &Commit, time_ms: i64) {
        let (gone, gone_parts): (HashSet<i64>, HashSet<i64>) =
            (commit.remove.iter().copied().collect(), commit.remove_parts.iter().copied().collect());
        let superseded = &mut self.superseded;
        self.files.retain(|f| {
            let leaves = gone.contains(&f.id);
            if leaves {
                superseded.push((f.path.clone(), time_ms));
            }
            !leaves
        });
        self.parts.retain(|p| {
            let leaves = gone_parts.contains(&p.id);
            if leaves {
                superseded.push((p.path.clone(), time_ms));
            }
            !leaves
        });
        if !commit.forget.is_empty() {
            let forget: HashSet<&String> = commit.forget.iter().collect();
            superseded.retain(|(path, _)| !forget.contains(path));
        }
        for file in &commit.add {
            insert(&mut self.files, file, |f| f.id);
        }
        for part in &commit.add_parts {
            insert(&mut self.parts, part, |p| p.id);
        }
        self.deletes.retain(|d| !commit.remove_deletes.contains(&d.id));
        for delete in &commit.add_deletes {
            insert(&mut self.deletes, delete, |d| d.id);
        }
        for row in &commit.metadata {
            match self.metadata.binary_search_by(|known| known.0.cmp(&row.0)) {
                Ok(i) => self.metadata[i].1.clone_from(&row.1),
                Err(i) => self.metadata.insert(i, row.clone()),
            }
        }
        self.views.retain(|v| !commit.drop_views.contains(&v.name));
        for view in &commit.views {
            match self.views.binary_search_by(|known| known.name.cmp(&view.name)) {
                Ok(i) => self.views[i] = view.clone(),
                Err(i) => self.views.insert(i, view.clone()),
            }
        }
        let sequences = commit.add.iter().map(|f| f.seq_max).chain(commit.add_parts.iter().map(|p| p.seq));
        let last = sequences.chain(commit.add_deletes.iter().map(|d| d.seq)).max();
        self.next_seq = self.next_seq.max(last.map_or(0, |last| last + 1));
    }
}

/// Where an id stands in a list sorted by it, or where it would.
fn position<T>(list: &[T], id: i64, id_of: impl Fn(&T) -> i64) -> Result<usize, usize> {
    list.binary_search_by_key(&id, id_of)
}

fn insert<T: Clone>(list: &mut Vec<T>, item: &T, id_of: impl Fn(&T) -> i64) {
    match position(list, id_of(item), &id_of) {
        Ok(i) => list[i] = item.clone(),
        Err(i) => list.insert(i, item.clone()),
    }
}

/// What a file catalog is opened with.
#[derive(Debug)]
pub struct Opening<'a> {
    /// The bucket.
    pub store: Arc<dyn ObjectStore>,
    /// Name of the database, the prefix of its objects.
    pub database: &'a str,
    /// Randomness, for ids of commits.
    pub entropy: Arc<dyn Entropy>,
    /// Seed of the database's codes, from [`crate::database::open`].
    pub seed: u64,
    /// The SQL catalog that follows.
    pub index: Option<Box<dyn Index>>,
    /// The SQLite file in which a database from before the journal kept its catalog.
    pub format1: Option<&'a Path>,
    /// Time, for what is not part of a commit.
    pub clock: Arc<dyn Clock>,
}

/// The handle of a file catalog.
#[derive(Debug)]
pub struct FileCatalog {
    journal: Mutex<Journal>,
    epoch: u64,
    next_id: AtomicI64,
    next_seq: AtomicU64,
    clock: Arc<dyn Clock>,
    fenced: AtomicBool,
    closing: watch::Sender<bool>,
    backlog: parking_lot::Mutex<Backlog>,
    follower: Mutex<Follower>,
    /// Whether the SQL catalog could not be brought up to date: said once when it begins and once when it ends.
    failing: AtomicBool,
    /// Number of the last entry that the SQL catalog has.
    followed: AtomicU64,
}

/// Entries that the SQL catalog may not have yet.
#[derive(Debug)]
struct Backlog {
    /// The place before the first of them.
    base: Place,
    entries: VecDeque<Arc<Entry>>,
    /// The place after the last entry.
    last: Place,
}

#[derive(Debug)]
struct Follower {
    index: Option<Box<dyn Index>>,
    /// Where the index stands; `None` until it says so.
    at: Option<Place>,
}

enum Step {
    Done,
    Apply(Arc<Entry>),
    Replace,
}

impl Backlog {
    fn push(&mut self, entries: Vec<Entry>) {
        for entry in entries {
            self.last = entry.place();
            self.entries.push_back(Arc::new(entry));
        }
        while self.entries.len() > BACKLOG_MAX
            && let Some(oldest) = self.entries.pop_front()
        {
            self.base = oldest.place();
        }
    }

    /// What takes an index at this place further. What it has is given up.
    fn step(&mut self, at: Option<Place>) -> Step {
        let Some(at) = at else { return Step::Replace };
        if at != self.base {
            let Some(last) = self.entries.iter().position(|e| e.place() == at) else {
                return if at == self.last { Step::Done } else { Step::Replace };
            };
            self.entries.drain(..=last);
            self.base = at;
        }
        self.entries.front().map_or(Step::Done, |next| Step::Apply(next.clone()))
    }
}

impl FileCatalog {
    /// Opens the catalog, beginning its journal on first use, and takes it over: whoever had it open is fenced. The SQL
    /// catalog is brought up to date as far as it can be reached.
    ///
    /// # Errors
    /// `Corrupt` for what no version of ours wrote, for damage that can't be gone around, for rows without a journal, and
    /// when the SQL catalog has entries that the journal has not; `Invalid` when a newer version wrote it, or when the SQL catalog is another database's; `Unavailable`
    /// when the store can't be reached.
    pub async fn open(opening: Opening<'_>) -> Result<(Self, State)> {
        let Opening { store, database, entropy, seed, mut index, format1, clock } = opening;
        let (closing, closed) = watch::channel(false);
        let read = || Journal::read(store.clone(), database, entropy.clone(), closed.clone());
        let mut journal = match read().await? {
            Some(journal) => journal,
            None => {
                begin(store.clone(), database, seed, format1).await?;
                read().await?.ok_or_else(|| Error::unavailable("the journal was begun and can't be found"))?
            }
        };
        if journal.state().seed != seed {
            return Err(Error::corrupt(format!(
                "the journal of {database} has the codes of another database; its description in the bucket is not its own"
            )));
        }
        let place = match &mut index {
            Some(index) => index.place(clock.now_ms()).await,
            None => Ok(None),
        };
        if let Ok(Some(at)) = place {
            complete(&mut journal, at).await?;
        }
        journal.take_over(clock.now_ms()).await?;
        let state = journal.state().clone();
        let state = State { files: state.files.into_iter().map(bare).collect(), ..state };
        let mut backlog = Backlog { base: journal.base(), entries: VecDeque::new(), last: journal.place() };
        backlog.push(journal.take_entries());
        let catalog = Self {
            epoch: journal.epoch(),
            next_id: AtomicI64::new(state.next_id),
            next_seq: AtomicU64::new(state.next_seq),
            clock,
            fenced: AtomicBool::new(false),
            closing,
            followed: AtomicU64::new(if index.is_some() { 0 } else { u64::MAX }),
            backlog: parking_lot::Mutex::new(backlog),
            follower: Mutex::new(Follower { index, at: place.as_ref().ok().copied().flatten() }),
            failing: AtomicBool::new(false),
            journal: Mutex::new(journal),
        };
        // A catalog in the wrong hands is worth stopping for, an outage is not.
        let followed = match place {
            Ok(_) => catalog.follow_on().await,
            Err(e) => Err(e),
        };
        if let Err(e) = followed {
            if e.kind() == crate::ErrorKind::Invalid {
                return Err(e);
            }
            catalog.note(Err(e));
        }
        Ok((catalog, state))
    }

    /// Makes the SQL catalog anew from the journal, which is only read. No server may have the database open. `index`
    /// gets the database's seed.
    ///
    /// # Errors
    /// `NotFound` when there is no journal; else as [`FileCatalog::open`].
    pub async fn rebuild(
        store: Arc<dyn ObjectStore>,
        database: &str,
        now_ms: i64,
        index: impl FnOnce(u64) -> Result<Option<Box<dyn Index>>>,
    ) -> Result<State> {
        let (_closing, closed) = watch::channel(false);
        let journal = Journal::read(store, database, Arc::new(SystemEntropy), closed).await?;
        let journal = journal
            .ok_or_else(|| Error::not_found(format!("database {database} has no journal in the object store")))?;
        if let Some(mut index) = index(journal.state().seed)? {
            // An error of another kind is what it is to be mended of.
            match index.place(now_ms).await {
                Err(e) if e.kind() == crate::ErrorKind::Invalid => return Err(e),
                _ => index.replace(journal.state(), journal.place(), now_ms).await?,
            }
            index.close().await;
        }
        Ok(journal.state().clone())
    }

    /// A number for a file, part or delete that was never given before, also not by another process.
    pub fn next_id(&self) -> i64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// A number for a flush, greater than that of every committed one.
    pub fn next_seq(&self) -> u64 {
        self.next_seq.fetch_add(1, Ordering::Relaxed)
    }

    /// The epoch of this opening; every later opening of the database has a greater one.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether another process has taken the database over, as far as it is known: nothing can be committed then.
    pub fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::Relaxed)
    }

    /// Makes a change; it is durable when this returns. While the object store can't be reached it waits. Call it from a
    /// task that is not given up before it ends: what was begun may be made.
    ///
    /// # Errors
    /// `Internal` when it adds what is there or removes what is not; `Unavailable` when fenced or closed. Nothing is
    /// changed then, except where closing ended the wait for the store.
    pub async fn commit(&self, commit: &Commit, now_ms: i64) -> Result<()> {
        {
            let mut journal = self.journal.lock().await;
            let made = journal.commit(commit.clone(), now_ms).await;
            self.fenced.store(journal.is_fenced(), Ordering::Relaxed);
            self.backlog.lock().push(journal.take_entries());
            made?;
            journal.checkpoint_if_due().await;
        }
        // One that fails already is tried again from time to time, not by every commit.
        if !self.failing.load(Ordering::Relaxed) {
            let followed = tokio::time::timeout(FOLLOW_MAX, self.follow_on()).await;
            let late = |_| Err(Error::unavailable(format!("SQL catalog did not follow within {FOLLOW_MAX:?}")));
            self.note(followed.unwrap_or_else(late));
        }
        Ok(())
    }

    /// Makes sure that no other process has taken the database over.
    ///
    /// # Errors
    /// `Unavailable` when one has, when the store can't be reached, or when the catalog is closed.
    pub async fn confirm(&self) -> Result<()> {
        let mut closing = self.closing.subscribe();
        let confirm = async {
            let mut journal = self.journal.lock().await;
            let confirmed = journal.confirm().await;
            self.fenced.store(journal.is_fenced(), Ordering::Relaxed);
            confirmed
        };
        tokio::select! {
            biased;
            // A commit may have the journal for as long as the store can't be reached.
            _ = closing.wait_for(|closing| *closing) => Err(Error::unavailable("file catalog is closed")),
            confirmed = confirm => confirmed,
        }
    }

    /// Brings the SQL catalog up to date if it is not; call it every second or so. Failures are logged, once.
    pub async fn follow(&self) {
        if self.behind() > 0 && !self.is_fenced() {
            self.note(self.follow_on().await);
        }
    }

    /// Entries of the journal that the SQL catalog does not have yet.
    pub fn behind(&self) -> u64 {
        self.backlog.lock().last.number.saturating_sub(self.followed.load(Ordering::Relaxed))
    }

    fn note(&self, followed: Result<()>) {
        match followed {
            Ok(()) => {
                if self.failing.swap(false, Ordering::Relaxed) {
                    tracing::info!("SQL catalog is up to date again");
                }
            }
            Err(e) => {
                if !self.failing.swap(true, Ordering::Relaxed) {
                    tracing::warn!(error = %e, "SQL catalog can't be brought up to date; it follows when it can");
                }
            }
        }
    }

    async fn follow_on(&self) -> Result<()> {
        let mut follower = self.follower.lock().await;
        let fresh = follower.at.is_none();
        match self.steps(&mut follower).await {
            // The connection may have been lost long ago.
            Err(e) if !fresh && e.kind() == crate::ErrorKind::Unavailable => self.steps(&mut follower).await,
            result => result,
        }
    }

    async fn steps(&self, follower: &mut Follower) -> Result<()> {
        let now_ms = self.clock.now_ms();
        let Some(index) = &mut follower.index else { return Ok(()) };
        // Unless this gets to its end it is not known where the index stands.
        let mut at = match follower.at.take() {
            Some(at) => Some(at),
            None => index.place(now_ms).await?,
        };
        loop {
            let step = self.backlog.lock().step(at);
            match (step, at) {
                (Step::Apply(entry), Some(from)) => {
                    index.apply(from, &entry).await?;
                    at = Some(entry.place());
                }
                (Step::Done, Some(_)) => break,
                _ => {
                    let (state, place) = {
                        let mut journal = self.journal.lock().await;
                        // Where another process went on it is not ours to change.
                        journal.confirm().await?;
                        (journal.state().clone(), journal.place())
                    };
                    tracing::info!(entry = place.number, "SQL catalog is made anew from the journal");
                    index.replace(&state, place, now_ms).await?;
                    at = Some(place);
                }
            }
            self.followed.store(at.map_or(0, |at| at.number), Ordering::Relaxed);
        }
        self.followed.store(at.map_or(0, |at| at.number), Ordering::Relaxed);
        follower.at = at;
        Ok(())
    }

    /// Expires what outside readers can see from before `older_than_ms` and returns the paths that left before then. The
    /// caller deletes the objects and then calls [`FileCatalog::forget`]. The clock may have been wrong for a while: what
    /// comes before something old is old, whatever its time says.
    ///
    /// # Errors
    /// `Unavailable` when fenced.
    pub async fn purge(&self, older_than_ms: i64) -> Result<Vec<String>> {
        let paths = {
            let journal = self.journal.lock().await;
            let superseded = &journal.state().superseded;
            let old = superseded.iter().rposition(|(_, removed_ms)| *removed_ms < older_than_ms).map_or(0, |i| i + 1);
            superseded[..old].iter().map(|(path, _)| path.clone()).collect()
        };
        let mut follower = self.follower.lock().await;
        let at = follower.at.take();
        if let (Some(index), Some(_)) = (&mut follower.index, at) {
            match index.expire(older_than_ms).await {
                Ok(()) => follower.at = at,
                Err(e) => {
                    self.followed.store(0, Ordering::Relaxed);
                    self.note(Err(e));
                }
            }
        }
        Ok(paths)
    }

    /// Paths of files and parts that left and that [`FileCatalog::forget`] was not told of.
    ///
    /// # Errors
    /// `Unavailable` when another process has taken the database over: what is superseded is its to say.
    pub async fn superseded(&self) -> Result<Vec<String>> {
        self.confirm().await?;
        let journal = self.journal.lock().await;
        Ok(journal.state().superseded.iter().map(|(path, _)| path.clone()).collect())
    }

    /// Forgets superseded paths whose objects are gone.
    ///
    /// # Errors
    /// As [`FileCatalog::commit`].
    pub async fn forget(&self, paths: &[String]) -> Result<()> {
        self.commit(&Commit { forget: paths.to_vec(), ..Commit::default() }, self.clock.now_ms()).await
    }

    /// Closes the catalog; later calls fail as `Unavailable`. A commit that waits for the object store is given up.
    pub async fn close(&self) {
        self.closing.send_replace(true);
        let close = async {
            if let Some(mut index) = self.follower.lock().await.index.take() {
                index.close().await;
            }
        };
        // A connection that does not answer is not worth waiting for.
        let _ = tokio::time::timeout(FOLLOW_MAX, close).await;
    }
}

/// A file as the engine keeps it in memory.
fn bare(file: DataFile) -> DataFile {
    DataFile { columns: vec![], ..file }
}

/// Begins a journal: with the state of a catalog from before journals, or empty.
async fn begin(store: Arc<dyn ObjectStore>, database: &str, seed: u64, format1: Option<&Path>) -> Result<()> {
    let old = match format1 {
        Some(path) => format1::load(path).await?,
        None => None,
    };
    let Some(state) = old else {
        refuse_rows(store.as_ref(), database).await?;
        return Journal::begin(store, database, State::new(seed)).await;
    };
    if state.seed != seed {
        return Err(Error::corrupt(format!(
            "file catalog {} belongs to another database than {database} of the object store",
            format1.unwrap_or(Path::new("")).display()
        )));
    }
    tracing::info!(
        files = state.files.len(),
        parts = state.parts.len(),
        "file catalog moves to a journal in the bucket"
    );
    Journal::begin(store.clone(), database, state).await?;
    // Metadata of metrics lay there; the journal has them now.
    let folder = object_store::path::Path::from(format!("{database}/meta"));
    let objects: Vec<_> = store.list(Some(&folder)).map_ok(|o| o.location).try_collect().await?;
    for object in &objects {
        store.delete(object).await?;
    }
    Ok(())
}

/// Makes sure that a journal has the entries that the SQL catalog has, which follows it. Without the newest ones rows
/// would be gone, and a new entry would take the place of the first that is missing.
async fn complete(journal: &mut Journal, followed: Place) -> Result<()> {
    if followed.number > journal.place().number {
        // Another server may have gone on since the journal was read.
        journal.catch_up().await?;
    }
    let end = journal.place().number;
    if followed.number <= end {
        return Ok(());
    }
    let missing = match followed.number - end {
        1 => format!("{} is", journal.location(followed.number)),
        _ => format!("{} to {} are", journal.location(end + 1), journal.location(followed.number)),
    };
    Err(Error::corrupt(format!(
        "{missing} missing, but the SQL catalog has been told of entry {}; put back what is lost from a backup of the \
         bucket, or, to go on without, run `thalweg catalog rebuild`",
        followed.number
    )))
}

/// A new journal would not know the rows that are there, and give them up.
async fn refuse_rows(store: &dyn ObjectStore, database: &str) -> Result<()> {
    for table in tables::all() {
        let folder = object_store::path::Path::from(format!("{database}/{}", table.name));
        if let Some(object) = store.list(Some(&folder)).try_next().await? {
            return Err(Error::corrupt(format!(
                "the object store holds rows such as {} but no journal ({database}/{}); restore the bucket from a backup, \
                 or start with an empty store",
                object.location,
                journal::FOLDERS.join(&format!(", {database}/"))
            )));
        }
    }
    Ok(())
}

/// A timestamp in the text form of DuckLake's statistics, `2026-11-21 07:30:59.131+00`; `None` outside of the years 1 to
/// 9999, for which there is none that every reader takes.
pub fn timestamp_text(ms: i64) -> Option<String> {
    use chrono::Datelike;
    let time = chrono::DateTime::from_timestamp_millis(ms)?;
    (1..=9999).contains(&time.year()).then(|| time.format("%Y-%m-%d %H:%M:%S%.3f+00").to_string())
}
