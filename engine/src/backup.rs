//! Copies of a database in another store, and databases made from them.
//!
//! A backup is what the journal says after one entry: a manifest with that state, and the objects that it names, under
//! the names that they have in the database. Objects never change and no name is given twice, so a backup copies only
//! what the one before it does not have, and several share their objects. Rows that are in memory and in the log are not
//! in it: it holds a table as of its last flush. `engine/FORMAT.md` describes the manifest.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use catalog::files::{DataFile, State, TagPart, timestamp_text};
use catalog::journal::Journal;
use catalog::{Entropy, Error, ErrorKind, Registry, Result, TagHasher, TagParts, object, tables, tag_parts};
use futures::{StreamExt, TryStreamExt};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{Error as StoreError, ObjectStore, ObjectStoreExt, PutMode};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::segment::Segments;

/// Version of manifests.
const FORMAT: u32 = 2;

/// The format of those whose catalog has views; all others have the first, which older versions read.
const FORMAT_OF_VIEWS: u32 = 2;
/// What a manifest begins with, before its version and the CRC-32 of what follows the first line.
const MAGIC: &str = "thalweg-backup";
/// Folder of manifests below the database's name.
const FOLDER: &str = "backups";
/// Objects that are copied at a time; each is in memory as a whole.
const AT_ONCE: usize = 4;
/// How often a newer state is taken when objects of an older one were deleted meanwhile.
const TRIES: u32 = 8;

/// A backup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Its name: the time when it was made, and the number of the journal's entry.
    pub name: String,
    /// Name of the database.
    pub database: String,
    /// When it was made, milliseconds since the epoch.
    pub created_ms: i64,
    /// Number of the journal's last entry that is in it.
    pub journal: u64,
    /// What the catalog held then.
    pub state: State,
    /// All of its objects.
    pub objects: Vec<Object>,
}

/// An object of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    /// Its name below the database's.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// CRC-32 (IEEE) of all of it.
    pub crc32: u32,
}

impl Manifest {
    /// Size of all objects.
    pub fn bytes(&self) -> u64 {
        self.objects.iter().map(|o| o.bytes).sum()
    }
}

/// What is told while objects are copied or read.
#[derive(Debug, Clone, Copy)]
pub enum Step {
    /// So many bytes are to be done.
    Total(u64),
    /// So many bytes more are done.
    Done(u64),
}

/// Where [`Step`]s are told.
pub type Report<'a> = &'a (dyn Fn(Step) + Send + Sync);

/// One database in one store.
#[derive(Debug, Clone)]
pub struct Place {
    /// The store.
    pub store: Arc<dyn ObjectStore>,
    /// Name of the database.
    pub database: String,
}

impl Place {
    fn at(&self, path: &str) -> Path {
        Path::from(format!("{}/{path}", self.database))
    }

    async fn get(&self, path: &str) -> Result<Bytes> {
        let work = async { self.store.get(&self.at(path)).await?.bytes().await };
        work.await.map_err(|e| Error::from(e).context(self.at(path)))
    }

    async fn put(&self, path: &str, bytes: Bytes) -> Result<()> {
        object::put(&self.store, &self.at(path), bytes).await.map_err(|e| e.context(self.at(path)))
    }

    /// Puts an object under a name that is given once: it may be there already, but nothing else may.
    async fn put_once(&self, path: &str, bytes: Bytes) -> Result<()> {
        match self.get(path).await {
            Ok(found) if found == bytes => Ok(()),
            Ok(_) => Err(Error::invalid(format!(
                "{} is there and holds other bytes: it is damaged, or of another history of this database, which went on \
                 from a backup that was restored; back up to a place where there is none",
                self.at(path)
            ))),
            Err(e) if e.kind() == ErrorKind::NotFound => self.put(path, bytes).await,
            Err(e) => Err(e),
        }
    }

    /// Sizes of all objects, by name below the database's.
    async fn sizes(&self) -> Result<HashMap<String, u64>> {
        let folder = Path::from(self.database.as_str());
        let mut listed = self.store.list(Some(&folder));
        let mut sizes = HashMap::new();
        while let Some(found) = listed.try_next().await? {
            let path = found.location.as_ref();
            let path = path.strip_prefix(&self.database).and_then(|p| p.strip_prefix('/')).unwrap_or(path);
            sizes.insert(path.to_owned(), found.size);
        }
        Ok(sizes)
    }
}

/// The journal's state, without taking the journal over: a server may go on writing to it.
///
/// # Errors
/// `NotFound` when there is no database, or one that no version with a journal has opened; `Corrupt` for a damaged
/// journal; store errors.
pub async fn state(place: &Place, entropy: &Arc<dyn Entropy>) -> Result<(u64, State)> {
    let mut tries = 0;
    loop {
        let (_open, closing) = watch::channel(false);
        match Journal::read(place.store.clone(), &place.database, entropy.clone(), closing).await {
            Ok(Some(journal)) => return Ok((journal.place().number, journal.state().clone())),
            Ok(None) => {
                return Err(Error::not_found(format!("there is no journal of a database {:?}", place.database)));
            }
            // A server that makes a checkpoint deletes entries that were just listed.
            Err(e) if e.kind() == ErrorKind::Corrupt && tries < 3 => tries += 1,
            Err(e) => return Err(e),
        }
    }
}

/// Makes a backup of `from` in `to`, copying what is not there yet. Every object that is copied is checked first.
///
/// # Errors
/// `Corrupt` naming a damaged object, `Invalid` when `to` holds backups of another database, or of another history of this
/// one, which has given the same names to other objects; store errors. What was copied by then is not copied again the
/// next time, and what was there stays as it is.
pub async fn create(
    from: &Place,
    to: &Place,
    entropy: &Arc<dyn Entropy>,
    now_ms: i64,
    report: Report<'_>,
) -> Result<Manifest> {
    same_database(from, to).await?;
    let known = match names(to).await?.last() {
        Some(newest) => known(&load(to, newest).await?, &to.sizes().await?)?,
        None => Known::new(),
    };
    let mut tries = 0;
    loop {
        let (journal, state) = state(from, entropy).await?;
        let state = State { superseded: vec![], ..state };
        match copy_all(from, to, &state, &known, report).await {
            Ok(objects) => {
                let name = name(now_ms, journal)?;
                let manifest =
                    Manifest { name, database: to.database.clone(), created_ms: now_ms, journal, state, objects };
                to.put(&path(&manifest.name), encode(&manifest)?).await?;
                return Ok(manifest);
            }
            // It left the database and was deleted while others were copied; the state of now does without it.
            Err(e) if e.kind() == ErrorKind::NotFound && tries < TRIES => tries += 1,
            Err(e) => return Err(e),
        }
    }
}

/// A store that holds backups of one database must not get those of another: their objects have the same names.
async fn same_database(from: &Place, to: &Place) -> Result<()> {
    let description = from.get("database.json").await?;
    let put = to.store.put_opts(&to.at("database.json"), description.clone().into(), PutMode::Create.into()).await;
    match put {
        Ok(_) => Ok(()),
        Err(StoreError::AlreadyExists { .. }) if to.get("database.json").await? == description => Ok(()),
        Err(StoreError::AlreadyExists { .. }) => {
            Err(Error::invalid(format!("{} holds backups of another database", to.store)))
        }
        Err(e) => Err(Error::from(e).context(to.at("database.json"))),
    }
}

/// An object that a state names.
#[derive(Debug, Clone, Copy)]
enum Named<'a> {
    File(&'a DataFile),
    Part(&'a TagPart),
}

impl Named<'_> {
    fn path(&self) -> &str {
        match self {
            Self::File(f) => &f.path,
            Self::Part(p) => &p.path,
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::File(f) => f.bytes,
            Self::Part(p) => p.bytes,
        }
    }

    /// What the catalog has to check it by: all of its bytes, or those that have the checks of the others.
    fn crc32(&self) -> u32 {
        match self {
            Self::File(f) => f.crc32,
            Self::Part(p) => p.crc32,
        }
    }

    /// The name that an object of this table, day and id has: nothing else is read or written, whatever a manifest says.
    fn expected(&self) -> Result<String> {
        match self {
            Self::File(f) => {
                let table = tables::all().into_iter().find(|t| t.id == f.table_id);
                let table = table.ok_or_else(|| Error::invalid(format!("table {} is unknown", f.table_id)))?;
                Ok(format!("{}/{}/{}.parquet", table.name, f.day, f.id))
            }
            Self::Part(p) => Ok(tag_parts::path(p.day, p.id)),
        }
    }
}

fn named(state: &State) -> Result<Vec<Named<'_>>> {
    let all: Vec<_> = state.files.iter().map(Named::File).chain(state.parts.iter().map(Named::Part)).collect();
    for one in &all {
        let expected = one.expected()?;
        if one.path() != expected {
            return Err(Error::corrupt(format!("object {:?} must be named {expected:?}", one.path())));
        }
    }
    Ok(all)
}

/// Objects of a backup by their names, each with its size and its [`Named::crc32`].
type Known = HashMap<String, (u64, u32, Object)>;

/// Those of a backup that are still there.
fn known(manifest: &Manifest, sizes: &HashMap<String, u64>) -> Result<Known> {
    let objects = checked(manifest)?;
    let all = named(&manifest.state)?.into_iter().zip(objects);
    let there = all.filter(|(_, object)| sizes.get(&object.path) == Some(&object.bytes));
    Ok(there.map(|(one, object)| (object.path.clone(), (one.bytes(), one.crc32(), object.clone()))).collect())
}

async fn copy_all(from: &Place, to: &Place, state: &State, known: &Known, report: Report<'_>) -> Result<Vec<Object>> {
    let all = named(state)?;
    report(Step::Total(all.iter().map(Named::bytes).sum()));
    let copies = all.into_iter().map(|one| async move {
        let object = match known.get(one.path()) {
            Some((bytes, crc32, known)) if (*bytes, *crc32) == (one.bytes(), one.crc32()) => known.clone(),
            _ => copy(from, to, state.seed, one).await?,
        };
        report(Step::Done(object.bytes));
        Ok::<_, Error>(object)
    });
    let copies: Vec<_> = copies.collect();
    futures::stream::iter(copies).buffered(AT_ONCE).try_collect().await
}

async fn copy(from: &Place, to: &Place, seed: u64, one: Named<'_>) -> Result<Object> {
    let bytes = from.get(one.path()).await?;
    check_object(seed, one, &bytes).await?;
    let object = Object { path: one.path().to_owned(), bytes: bytes.len() as u64, crc32: crc32fast::hash(&bytes) };
    to.put_once(one.path(), bytes).await?;
    Ok(object)
}

/// Checks the bytes of an object as thoroughly as `verify` does.
async fn check_object(seed: u64, one: Named<'_>, bytes: &Bytes) -> Result<()> {
    let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    store.put(&Path::from(format!("copied/{}", one.path())), bytes.clone().into()).await?;
    match one {
        Named::File(file) => {
            let table = tables::all().into_iter().find(|t| t.id == file.table_id);
            let table = table.ok_or_else(|| Error::invalid(format!("table {} is unknown", file.table_id)))?;
            Segments::new(store, "copied", 0).check(table, file).await.map(|_| ())
        }
        Named::Part(part) => {
            let registry = Arc::new(Registry::new(TagHasher::new(seed), 0));
            TagParts::new(store, "copied", registry, 0).check(part).await.map(|_| ())
        }
    }
}

/// Names of the backups in a store, oldest first.
///
/// # Errors
/// Of the store.
pub async fn names(place: &Place) -> Result<Vec<String>> {
    let folder = place.at(FOLDER);
    let listed: Vec<_> = place.store.list(Some(&folder)).try_collect().await?;
    let name = |file: &str| file.strip_suffix(".manifest").filter(|name| is_name(name)).map(str::to_owned);
    let names: BTreeSet<String> = listed.iter().filter_map(|o| name(o.location.filename()?)).collect();
    Ok(names.into_iter().collect())
}

/// Reads the manifest of a backup.
///
/// # Errors
/// `Invalid` for a name that no backup can have and for a manifest of a newer version; `NotFound`; `Corrupt`.
pub async fn load(place: &Place, name: &str) -> Result<Manifest> {
    if !is_name(name) {
        return Err(Error::invalid(format!("{name:?} is no name of a backup; one is letters, digits and \"-\"")));
    }
    let bytes = place.get(&path(name)).await?;
    let manifest = decode(&bytes).map_err(|e| e.context(place.at(&path(name))))?;
    if manifest.name != name || manifest.database != place.database {
        return Err(Error::corrupt(format!("{} is the backup {:?}", place.at(&path(name)), manifest.name)));
    }
    Ok(manifest)
}

/// Reads every object of a backup; returns what is wrong with them.
///
/// # Errors
/// Of the store, when it can't be asked.
pub async fn check(place: &Place, manifest: &Manifest, report: Report<'_>) -> Result<Vec<String>> {
    report(Step::Total(manifest.bytes()));
    let checks = checked(manifest)?.into_iter().map(|object| async move {
        let found = fetch(place, object).await;
        report(Step::Done(object.bytes));
        match found {
            Ok(_) => Ok(None),
            Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) => Ok(Some(e.to_string())),
            Err(e) => Err(e),
        }
    });
    let checks: Vec<_> = checks.collect();
    let found: Vec<Option<String>> = futures::stream::iter(checks).buffered(AT_ONCE).try_collect().await?;
    Ok(found.into_iter().flatten().collect())
}

/// Makes a database of a backup. The last thing that is written is its journal, without which no server opens it.
///
/// # Errors
/// `Invalid` when there is anything of a database in `to`; `Corrupt` naming a damaged object; store errors.
pub async fn restore(from: &Place, manifest: &Manifest, to: &Place, report: Report<'_>) -> Result<()> {
    if let Some(found) = to.sizes().await?.keys().next() {
        let found = to.at(found);
        return Err(Error::invalid(format!("the store is not empty: it holds {found}; restore into an empty one")));
    }
    report(Step::Total(manifest.bytes()));
    let copies = checked(manifest)?.into_iter().map(|object| async move {
        let bytes = fetch(from, object).await?;
        to.put(&object.path, bytes).await?;
        report(Step::Done(object.bytes));
        Ok::<_, Error>(())
    });
    let copies: Vec<_> = copies.collect();
    futures::stream::iter(copies).buffered(AT_ONCE).try_collect::<Vec<()>>().await?;
    to.put("database.json", from.get("database.json").await?).await?;
    // Ids of what is there are not given again.
    let state = &manifest.state;
    let ids = state.files.iter().map(|f| f.id).chain(state.parts.iter().map(|p| p.id));
    let last = ids.chain(state.deletes.iter().map(|d| d.id)).max().unwrap_or(0);
    let state = State { next_id: state.next_id.max(last + 1), ..state.clone() };
    Journal::begin(to.store.clone(), &to.database, state).await
}

async fn fetch(place: &Place, object: &Object) -> Result<Bytes> {
    let bytes = place.get(&object.path).await?;
    let found = (bytes.len() as u64, crc32fast::hash(&bytes));
    if found != (object.bytes, object.crc32) {
        return Err(Error::corrupt(format!(
            "{}: {} bytes with CRC-32 {:#010x}; copied were {} with {:#010x}",
            place.at(&object.path),
            found.0,
            found.1,
            object.bytes,
            object.crc32
        )));
    }
    Ok(bytes)
}

/// The objects of a manifest, which must be those that its state names.
fn checked(manifest: &Manifest) -> Result<Vec<&Object>> {
    let named = named(&manifest.state)?;
    let same = named.len() == manifest.objects.len()
        && named.iter().zip(&manifest.objects).all(|(n, o)| n.path() == o.path && n.bytes() == o.bytes);
    if !same {
        return Err(Error::corrupt(format!("backup {} does not have the objects that its state names", manifest.name)));
    }
    Ok(manifest.objects.iter().collect())
}

fn path(name: &str) -> String {
    format!("{FOLDER}/{name}.manifest")
}

fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// `20260216T093000Z-000000000042`: names sort by time.
fn name(now_ms: i64, journal: u64) -> Result<String> {
    let text = timestamp_text(now_ms).ok_or_else(|| Error::internal(format!("{now_ms} is no time")))?;
    let digits: String = text.chars().take_while(|c| *c != '.').filter(char::is_ascii_digit).collect();
    let (date, time) = digits.split_at_checked(8).ok_or_else(|| Error::internal(format!("{text:?} is no time")))?;
    Ok(format!("{date}T{time}Z-{journal:012}"))
}

fn encode(manifest: &Manifest) -> Result<Bytes> {
    let json = serde_json::to_vec(manifest).map_err(|e| Error::internal("manifest of a backup").with_source(e))?;
    let format = if manifest.state.views.is_empty() { 1 } else { FORMAT_OF_VIEWS };
    let mut out = format!("{MAGIC} {format} {:08x}\n", crc32fast::hash(&json)).into_bytes();
    out.extend_from_slice(&json);
    Ok(out.into())
}

fn decode(bytes: &[u8]) -> Result<Manifest> {
    let bad = || Error::corrupt("the manifest is damaged");
    let end = bytes.iter().take(64).position(|b| *b == b'\n').ok_or_else(bad)?;
    let head = std::str::from_utf8(&bytes[..end]).map_err(|_| bad())?;
    let mut words = head.split(' ');
    let (magic, format, sum) = (words.next(), words.next(), words.next());
    let format: u32 = format.filter(|_| magic == Some(MAGIC)).and_then(|f| f.parse().ok()).ok_or_else(bad)?;
    if format > FORMAT {
        return Err(Error::invalid(format!("format {format} is newer than this version, which reads up to {FORMAT}")));
    }
    let json = &bytes[end + 1..];
    if sum != Some(format!("{:08x}", crc32fast::hash(json)).as_str()) || words.next().is_some() {
        return Err(bad());
    }
    serde_json::from_slice(json).map_err(|e| bad().with_source(e))
}

#[cfg(test)]
mod tests;
