//! The journal: every change of the file catalog as a numbered object in the bucket, and the truth of which files there
//! are.
//!
//! An entry is put under a name that must not exist yet. Whoever puts number `n` has the state that entries up to `n - 1`
//! made, so all changes form one line, whatever number of processes try. A process that finds another's entry where it
//! wanted to put its own has been replaced by a newer one: it is *fenced*, and commits nothing from then on. Each opening
//! puts an entry with a new *epoch*, which fences whoever wrote before. A store whose answer is lost may have done what
//! it was asked; the id in each entry tells whose it is when it is read back. A *checkpoint* is the whole state after
//! some entry; the last two are kept, with the entries since the older one. `catalog/FORMAT.md` describes both.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::files::{Commit, State};
use crate::{Entropy, Error, ErrorKind, Result, tables};

/// Newest version of entries and checkpoints. They have the oldest that says all that is in them, so that an older server
/// can read a journal as long as it knows everything that is in it.
pub const FORMAT: u8 = 2;

/// The version of those that say something about views.
const FORMAT_OF_VIEWS: u8 = 2;

/// A checkpoint is made after this many entries.
const CHECKPOINT_ENTRIES: u64 = 64;

/// Checkpoints that are kept.
const CHECKPOINTS: usize = 2;

/// Entries with which epochs began that are kept, the newest. A process that was replaced meets the first entry of its
/// successor at the number that it believes to be the next, however long it was away. Were that entry gone, it would take
/// its own for a part of the journal.
const OPENINGS: usize = 100;

/// Entries that are read at the same time.
const READ_AHEAD: usize = 16;

/// Longest that a put or get may take before it counts as lost.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// First and longest wait before something is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// How often reading, and putting the entry of an opening, is tried.
const TRIES: u32 = 10;

/// Ids of files are the epoch of their writer in the upper half and its own count in the lower, so that no two processes
/// ever give the same, and a later epoch's are greater.
const ID_BITS: u32 = 32;

/// What tells one commit from all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CommitId(pub u128);

impl fmt::Display for CommitId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl FromStr for CommitId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bits = u128::from_str_radix(text, 16).ok().filter(|_| text.len() == 32);
        bits.map(Self).ok_or_else(|| Error::corrupt(format!("commit id {text:?} is not 32 hexadecimal digits")))
    }
}

impl Serialize for CommitId {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for CommitId {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A place in a journal: after which entry, and which one that was, since journals of one database may differ after a
/// backup was restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    /// Number of the last entry.
    pub number: u64,
    /// Its id.
    pub id: CommitId,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.number, self.id)
    }
}

impl FromStr for Place {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (number, id) = text.split_once(':').unwrap_or((text, ""));
        let number = number.parse().map_err(|_| Error::corrupt(format!("place {text:?} has no number")))?;
        Ok(Self { number, id: id.parse()? })
    }
}

/// One change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Its number; the first one is 1.
    pub number: u64,
    /// Its id.
    pub id: CommitId,
    /// Epoch of the writer.
    pub epoch: u64,
    /// When it was made, milliseconds.
    pub time_ms: i64,
    /// Versions of the tables' schemas, by [`crate::TableSchema::id`]; only in the entry of an opening.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tables: Vec<(u16, u64)>,
    /// The change.
    pub commit: Commit,
}

impl Entry {
    /// Where the journal stands after it.
    pub fn place(&self) -> Place {
        Place { number: self.number, id: self.id }
    }
}

/// The first id of files that a writer of this epoch gives.
fn first_id(epoch: u64) -> i64 {
    // An epoch is an opening: none will come near the 31 bits that are left for it.
    (epoch as i64) << ID_BITS
}

/// What is put as an object of the journal.
trait Stored: Serialize {
    const KIND: u8;

    /// The oldest version that says all that is in it.
    fn format(&self) -> u8;
}

impl Stored for Entry {
    const KIND: u8 = ENTRY_KIND;

    fn format(&self) -> u8 {
        let plain = self.commit.views.is_empty() && self.commit.drop_views.is_empty();
        if plain { 1 } else { FORMAT_OF_VIEWS }
    }
}

impl Stored for Checkpoint {
    const KIND: u8 = CHECKPOINT_KIND;

    fn format(&self) -> u8 {
        if self.state.views.is_empty() { 1 } else { FORMAT_OF_VIEWS }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Checkpoint {
    number: u64,
    id: CommitId,
    epoch: u64,
    tables: Vec<(u16, u64)>,
    #[serde(default)]
    openings: Vec<u64>,
    state: State,
}

/// A journal and the state that it makes.
#[derive(Debug)]
pub struct Journal {
    folder: Folder,
    entropy: Arc<dyn Entropy>,
    /// Of the last entry, and after the opening ours.
    epoch: u64,
    place: Place,
    tables: Vec<(u16, u64)>,
    /// Numbers of the entries with which the last epochs began.
    openings: Vec<u64>,
    state: State,
    /// An entry of ours of which it is not known whether it is in the bucket.
    pending: Option<(Entry, Bytes)>,
    /// Why nothing is committed any more.
    fenced: Option<String>,
    /// Numbers of the checkpoints in the bucket, ascending.
    checkpoints: Vec<u64>,
    /// Where the newest checkpoint stood that was read.
    base: Place,
    /// Entries since then that nobody has taken.
    fresh: Vec<Entry>,
    /// True once nothing shall be waited for any longer.
    closing: watch::Receiver<bool>,
}

/// The database's part of the bucket.
#[derive(Debug, Clone)]
struct Folder {
    store: Arc<dyn ObjectStore>,
    database: String,
}

impl Journal {
    /// Reads a journal without taking it over. `None` when there is none.
    ///
    /// # Errors
    /// `Corrupt` naming a damaged object; `Invalid` naming one that a newer version wrote; store errors.
    pub async fn read(
        store: Arc<dyn ObjectStore>,
        database: &str,
        entropy: Arc<dyn Entropy>,
        closing: watch::Receiver<bool>,
    ) -> Result<Option<Self>> {
        let folder = Folder { store, database: database.to_owned() };
        let checkpoints = folder.numbers(CHECKPOINT_FOLDER).await?;
        if checkpoints.is_empty() {
            let entries = folder.numbers(ENTRY_FOLDER).await?;
            let Some(last) = entries.last() else { return Ok(None) };
            // Entries up to the older checkpoint are deleted, but for some with which epochs begin.
            let first = entries.iter().rev().zip((0..=*last).rev()).take_while(|(n, expected)| **n == *expected).last();
            return Err(Error::corrupt(format!(
                "{} is missing, but {} exists, and no checkpoint of the journal does; restore the bucket from a backup",
                folder.checkpoint(first.map_or(0, |(n, _)| n.saturating_sub(1))),
                folder.entry(*last)
            )));
        }
        let mut damaged = None;
        let mut newest: Option<Checkpoint> = None;
        for number in checkpoints.iter().rev() {
            match folder.get_checkpoint(*number).await {
                Ok(checkpoint) => {
                    newest = Some(checkpoint);
                    break;
                }
                Err(e) if e.kind() == ErrorKind::Corrupt => {
                    tracing::warn!(error = %e, "checkpoint of the journal is damaged; an older one is used");
                    damaged = damaged.or(Some(e));
                }
                Err(e) => return Err(e),
            }
        }
        let Some(checkpoint) = newest else {
            return Err(damaged.unwrap_or_else(|| Error::corrupt("no checkpoint of the journal can be read")));
        };
        let base = Place { number: checkpoint.number, id: checkpoint.id };
        let mut journal = Self {
            folder,
            entropy,
            epoch: checkpoint.epoch,
            place: base,
            tables: checkpoint.tables,
            openings: checkpoint.openings,
            state: State { next_id: first_id(checkpoint.epoch), ..checkpoint.state },
            base,
            fresh: vec![],
            pending: None,
            fenced: None,
            // One that can't be read must not be taken for a reason to delete what comes before it.
            checkpoints: checkpoints.into_iter().filter(|n| *n <= checkpoint.number).collect(),
            closing,
        };
        journal.catch_up().await?;
        Ok(Some(journal))
    }

    /// Begins a journal with a state. The epoch that its [`State::next_id`] tells counts as used: a database that is made
    /// of a backup never gives the ids of files that it has.
    ///
    /// # Errors
    /// Store errors. Another process may begin it at the same time: [`Journal::read`] finds whose beginning counts.
    pub async fn begin(store: Arc<dyn ObjectStore>, database: &str, state: State) -> Result<()> {
        let folder = Folder { store, database: database.to_owned() };
        let epoch = (state.next_id.max(0) >> ID_BITS) as u64;
        let first = Checkpoint { number: 0, id: CommitId(0), epoch, tables: vec![], openings: vec![], state };
        let (location, bytes) = (folder.checkpoint(0), encode(&first)?);
        retried("begin the journal", || folder.create(&location, bytes.clone())).await.map(|_| ())
    }

    /// Takes the journal over with a new epoch: who wrote before is fenced.
    ///
    /// # Errors
    /// `Invalid` when a newer version wrote a table; store errors.
    pub async fn take_over(&mut self, now_ms: i64) -> Result<()> {
        for table in tables::all() {
            let stored = self.tables.iter().find(|t| t.0 == table.id).map_or(0, |t| t.1);
            if stored > u64::from(table.version) {
                return Err(Error::invalid(format!(
                    "table {} has schema version {stored}; this version reads up to {}",
                    table.name, table.version
                )));
            }
        }
        for _ in 0..TRIES {
            let epoch = self.epoch + 1;
            let tables = tables::all().iter().map(|t| (t.id, u64::from(t.version))).collect();
            let mut entry = self.next(Commit::default(), now_ms)?;
            entry = Entry { epoch, tables, ..entry };
            let bytes = encode(&entry)?;
            let location = self.folder.entry(entry.number);
            let put =
                retried("take the journal over", || self.folder.put_entry(&location, entry.id, bytes.clone())).await?;
            if put == Put::Ours {
                self.apply(entry);
                return Ok(());
            }
            self.catch_up().await?;
        }
        Err(Error::unavailable("others keep writing to the journal; is the database open in another process?"))
    }

    /// Commits a change; it is durable when this returns. Waits while the store can't be reached.
    ///
    /// # Errors
    /// `Internal` when the change does not fit the state; `Unavailable` when another process took over or the journal
    /// is closed. Then it was not made, except where closing ended the wait for the store's answer: whether it was made
    /// is found at the next opening.
    pub async fn commit(&mut self, commit: Commit, now_ms: i64) -> Result<()> {
        // Whoever began the pending one has gone away, but it may have been made.
        self.settle().await?;
        self.state.check(&commit)?;
        let entry = self.next(commit, now_ms)?;
        let bytes = encode(&entry)?;
        self.pending = Some((entry, bytes));
        self.settle().await
    }

    /// Finds out whether the pending entry is in the bucket, putting it there if not.
    async fn settle(&mut self) -> Result<()> {
        if let Some(why) = &self.fenced {
            return Err(Error::unavailable(why.clone()));
        }
        if *self.closing.borrow() {
            return Err(Error::unavailable("file catalog is closed"));
        }
        let Some((entry, bytes)) = &self.pending else { return Ok(()) };
        let (location, id, bytes) = (self.folder.entry(entry.number), entry.id, bytes.clone());
        let mut wait = RETRY.0;
        loop {
            match self.folder.put_entry(&location, id, bytes.clone()).await {
                Ok(Put::Ours) => break,
                Ok(Put::Theirs { writer }) => {
                    self.pending = None;
                    return Err(self.fence(&writer));
                }
                Err(e) if e.kind() == ErrorKind::Invalid => {
                    self.pending = None;
                    return Err(e);
                }
                Err(e) => {
                    if wait == RETRY.0 {
                        tracing::warn!(error = %e, "commit waits for the object store");
                    }
                    let mut closing = self.closing.clone();
                    if tokio::time::timeout(wait, closing.wait_for(|closing| *closing)).await.is_ok() {
                        let told = "closed before the object store answered a commit";
                        return Err(Error::unavailable(told).with_source(e));
                    }
                    wait = (2 * wait).min(RETRY.1);
                }
            }
        }
        if wait != RETRY.0 {
            tracing::info!("object store took the commit");
        }
        if let Some((entry, _)) = self.pending.take() {
            self.apply(entry);
        }
        Ok(())
    }

    fn fence(&mut self, writer: &str) -> Error {
        let why = format!("another server took this database over, with {writer}; this one has epoch {}", self.epoch);
        tracing::error!("{why}");
        self.fenced = Some(why.clone());
        Error::unavailable(why)
    }

    /// Makes a checkpoint when it is due; a failure is logged, and it is tried again after the next commit.
    pub async fn checkpoint_if_due(&mut self) {
        let last = self.checkpoints.last().copied().unwrap_or(0);
        if self.place.number < last + CHECKPOINT_ENTRIES {
            return;
        }
        if let Err(e) = self.checkpoint().await {
            tracing::warn!(error = %e, "checkpoint of the journal was not made and will be tried again");
        }
    }

    async fn checkpoint(&mut self) -> Result<()> {
        let checkpoint = Checkpoint {
            number: self.place.number,
            id: self.place.id,
            epoch: self.epoch,
            tables: self.tables.clone(),
            openings: self.openings.clone(),
            state: self.state.clone(),
        };
        let (location, bytes) = (self.folder.checkpoint(checkpoint.number), encode(&checkpoint)?);
        // Of one number there is one state: it does no harm to find it there.
        self.folder.create(&location, bytes).await?;
        // What is deleted next must not be what the only good copy builds on.
        let again = self.folder.get_checkpoint(checkpoint.number).await?;
        if again.id != checkpoint.id {
            return Err(Error::corrupt(format!("{location} is not what was written")));
        }
        self.checkpoints.push(checkpoint.number);
        if self.checkpoints.len() <= CHECKPOINTS {
            return Ok(());
        }
        let kept = self.checkpoints.split_off(self.checkpoints.len() - CHECKPOINTS);
        self.checkpoints = kept;
        let oldest = self.checkpoints[0];
        for (name, first_kept, kept) in
            [(CHECKPOINT_FOLDER, oldest, &[][..]), (ENTRY_FOLDER, oldest + 1, &self.openings[..])]
        {
            let numbers = self.folder.numbers(name).await?;
            for number in numbers.into_iter().filter(|n| *n < first_kept && !kept.contains(n)) {
                self.folder.delete(&self.folder.object(name, number)).await?;
            }
        }
        Ok(())
    }

    /// Reads entries that follow and applies them.
    ///
    /// # Errors
    /// As [`Journal::read`].
    pub async fn catch_up(&mut self) -> Result<()> {
        let mut listed = self.folder.numbers(ENTRY_FOLDER).await?;
        listed.retain(|n| *n > self.place.number);
        let last = listed.last().copied().unwrap_or(0);
        let folder = self.folder.clone();
        let mut ahead = futures::stream::iter(self.place.number + 1..=last)
            .map(|number| {
                let folder = folder.clone();
                async move { (number, folder.get_entry(number).await) }
            })
            .buffered(READ_AHEAD);
        while let Some((number, entry)) = ahead.next().await {
            let Some(entry) = entry? else {
                return Err(Error::corrupt(format!(
                    "{} is missing, but {} exists; restore the bucket from a backup",
                    folder.entry(number),
                    folder.entry(last)
                )));
            };
            self.follow(entry)?;
        }
        drop(ahead);
        // A list may be older than the last puts.
        while let Some(entry) = self.folder.get_entry(self.place.number + 1).await? {
            self.follow(entry)?;
        }
        Ok(())
    }

    fn follow(&mut self, entry: Entry) -> Result<()> {
        let location = self.folder.entry(entry.number);
        if entry.epoch < self.epoch {
            let epoch = self.epoch;
            return Err(Error::corrupt(format!("{location} has epoch {}, after one of epoch {epoch}", entry.epoch)));
        }
        let damaged =
            |e: Error| Error::corrupt(format!("{location} does not follow what comes before it")).with_source(e);
        self.state.check(&entry.commit).map_err(damaged)?;
        self.apply(entry);
        Ok(())
    }

    fn apply(&mut self, entry: Entry) {
        self.place = entry.place();
        self.epoch = entry.epoch;
        if !entry.tables.is_empty() {
            self.tables.clone_from(&entry.tables);
            self.openings.push(entry.number);
            self.openings.drain(..self.openings.len().saturating_sub(OPENINGS));
        }
        self.state.apply(&entry.commit, entry.time_ms);
        self.state.next_id = first_id(self.epoch);
        self.fresh.push(entry);
    }

    fn next(&self, commit: Commit, now_ms: i64) -> Result<Entry> {
        let mut id = [0; 16];
        self.entropy.fill(&mut id)?;
        Ok(Entry {
            number: self.place.number + 1,
            id: CommitId(u128::from_le_bytes(id)),
            epoch: self.epoch,
            time_ms: now_ms,
            tables: vec![],
            commit,
        })
    }

    /// Makes sure that the journal ends where this process believes, so that no other one has taken over.
    ///
    /// # Errors
    /// `Unavailable` when one has, and while it is not known whether a commit was made; store errors.
    pub async fn confirm(&mut self) -> Result<()> {
        if let Some(why) = &self.fenced {
            return Err(Error::unavailable(why.clone()));
        }
        if self.pending.is_some() {
            return Err(Error::unavailable("it is not known yet whether the last commit was made"));
        }
        if let Some(next) = self.folder.get_entry(self.place.number + 1).await? {
            return Err(self.fence(&format!("epoch {}", next.epoch)));
        }
        Ok(())
    }

    /// Where the newest checkpoint stood when the journal was read.
    pub fn base(&self) -> Place {
        self.base
    }

    /// Entries since [`Journal::base`] that were not taken before, in order.
    pub fn take_entries(&mut self) -> Vec<Entry> {
        std::mem::take(&mut self.fresh)
    }

    /// The state after all entries.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The object that would hold the entry with a number.
    pub fn location(&self, number: u64) -> Path {
        self.folder.entry(number)
    }

    /// Where it stands.
    pub fn place(&self) -> Place {
        self.place
    }

    /// The epoch of this process, once it has taken over.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether another process has taken over.
    pub fn is_fenced(&self) -> bool {
        self.fenced.is_some()
    }
}

// --- objects ---

const ENTRY_FOLDER: &str = "journal";
const CHECKPOINT_FOLDER: &str = "checkpoints";

/// Folders of the bucket, below the database's name, that hold the journal.
pub const FOLDERS: [&str; 2] = [ENTRY_FOLDER, CHECKPOINT_FOLDER];

/// How a put ended.
#[derive(Debug, PartialEq)]
enum Put {
    /// What we wanted to put is there.
    Ours,
    /// Another process's entry is there.
    Theirs { writer: String },
}

impl Folder {
    fn object(&self, folder: &str, number: u64) -> Path {
        // As many digits as any number has, so that names sort as numbers do.
        Path::from(format!("{}/{folder}/{number:020}", self.database))
    }

    fn entry(&self, number: u64) -> Path {
        self.object(ENTRY_FOLDER, number)
    }

    fn checkpoint(&self, number: u64) -> Path {
        self.object(CHECKPOINT_FOLDER, number)
    }

    /// Numbers of the objects in a folder, ascending.
    async fn numbers(&self, folder: &str) -> Result<Vec<u64>> {
        let prefix = Path::from(format!("{}/{folder}", self.database));
        let list = || async {
            let objects: Vec<_> = self.store.list(Some(&prefix)).try_collect().await?;
            Ok(objects)
        };
        let objects = retried(&format!("list {prefix}"), list).await?;
        let name = |o: &object_store::ObjectMeta| o.location.filename().map(str::to_owned);
        let mut numbers: Vec<u64> =
            objects.iter().filter_map(name).filter(|n| n.len() == 20).filter_map(|n| n.parse().ok()).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Puts an object that must not be there. Returns whether it was not.
    async fn create(&self, location: &Path, bytes: Bytes) -> Result<bool> {
        let put = self.store.put_opts(location, bytes.into(), PutMode::Create.into());
        match answered(put).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => Ok(false),
            Err(e) => Err(store_error(e, location)),
        }
    }

    /// Puts an entry; when one is there, it is read to see whose it is.
    async fn put_entry(&self, location: &Path, id: CommitId, bytes: Bytes) -> Result<Put> {
        if self.create(location, bytes).await? {
            return Ok(Put::Ours);
        }
        let bytes = self.bytes(location).await?;
        // The store said that it is there; one that does not find it now will.
        let bytes = bytes.ok_or_else(|| Error::unavailable(format!("{location} exists and can't be read")))?;
        match decode::<Entry>(ENTRY_KIND, &bytes, location) {
            Ok(there) if there.id == id => Ok(Put::Ours),
            Ok(there) => Ok(Put::Theirs { writer: format!("epoch {}", there.epoch) }),
            Err(e) if e.kind() == ErrorKind::Invalid => Ok(Put::Theirs { writer: "a newer version".to_owned() }),
            Err(e) => Err(e),
        }
    }

    async fn get_entry(&self, number: u64) -> Result<Option<Entry>> {
        let location = self.entry(number);
        let read = || async {
            match self.bytes(&location).await? {
                Some(bytes) => decode::<Entry>(ENTRY_KIND, &bytes, &location).map(Some),
                None => Ok(None),
            }
        };
        let entry = retried_read(&location, read).await?;
        if let Some(entry) = &entry
            && entry.number != number
        {
            return Err(Error::corrupt(format!("{location} holds entry {}", entry.number)));
        }
        Ok(entry)
    }

    async fn get_checkpoint(&self, number: u64) -> Result<Checkpoint> {
        let location = self.checkpoint(number);
        let read = || async {
            let bytes = self.bytes(&location).await?;
            let bytes = bytes.ok_or_else(|| Error::corrupt(format!("{location} is missing")))?;
            let checkpoint: Checkpoint = decode(CHECKPOINT_KIND, &bytes, &location)?;
            if checkpoint.number != number {
                return Err(Error::corrupt(format!("{location} holds checkpoint {}", checkpoint.number)));
            }
            Ok(checkpoint)
        };
        retried_read(&location, read).await
    }

    async fn bytes(&self, location: &Path) -> Result<Option<Bytes>> {
        let read = answered(async { self.store.get(location).await?.bytes().await });
        match read.await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(store_error(e, location)),
        }
    }

    async fn delete(&self, location: &Path) -> Result<()> {
        match answered(self.store.delete(location)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(store_error(e, location)),
        }
    }
}

/// An error of the store: `Invalid` when it can never do what was asked, so that it surely has not, else `Unavailable`.
fn store_error(e: object_store::Error, location: &Path) -> Error {
    use object_store::Error as E;
    let kind = match &e {
        E::NotSupported { .. }
        | E::NotImplemented { .. }
        | E::InvalidPath { .. }
        | E::UnknownConfigurationKey { .. } => ErrorKind::Invalid,
        _ => ErrorKind::Unavailable,
    };
    Error::new(kind, format!("object store failed at {location}")).with_source(e)
}

/// A store's answer, or an error when it takes too long.
async fn answered<T>(work: impl Future<Output = object_store::Result<T>>) -> object_store::Result<T> {
    match tokio::time::timeout(ANSWER_MAX, work).await {
        Ok(result) => result,
        Err(e) => Err(object_store::Error::Generic { store: "any", source: e.into() }),
    }
}

/// Tries some times while the store is unavailable.
pub(crate) async fn retried<T, F: Future<Output = Result<T>>>(what: &str, work: impl Fn() -> F) -> Result<T> {
    let mut wait = RETRY.0;
    for _ in 1..TRIES {
        match work().await {
            Err(e) if e.kind() == ErrorKind::Unavailable => {
                tracing::debug!(error = %e, "{what} failed and is tried again");
                tokio::time::sleep(wait).await;
                wait = (2 * wait).min(RETRY.1);
            }
            result => return result,
        }
    }
    work().await.map_err(|e| e.context(what))
}

/// As [`retried`]; once more also when bytes are damaged, since some of them may only have been lost on the way.
async fn retried_read<T, F: Future<Output = Result<T>>>(location: &Path, work: impl Fn() -> F) -> Result<T> {
    let what = format!("read {location}");
    match retried(&what, &work).await {
        Err(e) if e.kind() == ErrorKind::Corrupt => retried(&what, &work).await,
        result => result,
    }
}

// --- encoding ---

const MAGIC: [u8; 4] = *b"THWJ";
const ENTRY_KIND: u8 = 1;
const CHECKPOINT_KIND: u8 = 2;

/// Magic, format, kind, two zero bytes, CRC-32 of all that follows, length of the text.
const HEADER: usize = 16;

/// Most that a text may claim to be, beyond any catalog.
const TEXT_MAX: usize = 1 << 30;

const LEVEL: i32 = 3;

fn encode<T: Stored>(value: &T) -> Result<Bytes> {
    let failed = |e: serde_json::Error| Error::internal("journal object as JSON").with_source(e);
    let text = serde_json::to_vec(value).map_err(failed)?;
    let length = u32::try_from(text.len()).ok().filter(|l| *l as usize <= TEXT_MAX);
    let length = length.ok_or_else(|| Error::internal(format!("journal object of {} bytes", text.len())))?;
    let body = zstd::bulk::compress(&text, LEVEL)?;
    let mut out = Vec::with_capacity(HEADER + body.len());
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&[value.format(), T::KIND, 0, 0]);
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&body);
    let crc = crc32fast::hash(&out[12..]);
    out[8..12].copy_from_slice(&crc.to_le_bytes());
    Ok(out.into())
}

fn decode<T: DeserializeOwned>(kind: u8, bytes: &[u8], location: &Path) -> Result<T> {
    let damaged = |what: &str| Error::corrupt(format!("{location} is damaged: {what}"));
    let header = bytes.get(..HEADER).ok_or_else(|| damaged("it is too short"))?;
    if header[..4] != MAGIC {
        return Err(damaged("it does not begin as an object of the journal"));
    }
    if header[4] > FORMAT {
        return Err(Error::invalid(format!(
            "{location} has format {}, which is newer than this version, which reads up to {FORMAT}",
            header[4]
        )));
    }
    if header[4] == 0 || header[5..8] != [kind, 0, 0] {
        return Err(damaged("its header is none of its kind"));
    }
    let number = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    if number(8) != crc32fast::hash(&bytes[12..]) {
        return Err(damaged("its check does not match"));
    }
    let length = number(12) as usize;
    if length > TEXT_MAX {
        return Err(damaged("it claims to be too long"));
    }
    let text =
        zstd::bulk::decompress(&bytes[HEADER..], length).map_err(|e| damaged("it does not inflate").with_source(e))?;
    serde_json::from_slice(&text).map_err(|e| damaged("it does not parse").with_source(e))
}

#[cfg(test)]
mod tests;
