//! Snapshots: one state of all data, to be read as often as somebody likes while it can be kept.
//!
//! A snapshot is a [`Version`] whose active memtables are views that do not grow, and the end of the ordinals that there
//! were. Nothing is copied to take one. It keeps memtables alive that have become files meanwhile, and their tag sets; when
//! those take too much memory, or when the objects of files that it names are about to be deleted, it is ended:
//! whoever reads from it then gets an error, never other rows.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Weak};

use catalog::{Error, Ordinal, Result};
use parking_lot::Mutex;

use crate::engine::Inner;
use crate::memory::Kind;
use crate::memtable::Memtable;
use crate::version::Version;

/// The part of the memory limit that may be held for snapshots alone.
const MEMORY_PARTS: usize = 8;
/// What a file takes in a list that only a snapshot holds, about.
const FILE_BYTES: usize = 64;

/// Why a snapshot can't be read any more; the source of the [`Error`] that says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TooOld {
    /// Files that it names have been replaced or dropped, longer ago than they are kept.
    Deleted,
    /// What it holds is needed for something else.
    Memory,
}

impl TooOld {
    /// Whether an error says so.
    pub fn is(e: &Error) -> bool {
        std::error::Error::source(e).is_some_and(|s| s.is::<Self>())
    }
}

impl fmt::Display for TooOld {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Deleted => "files that it names were replaced longer ago than delete_grace and are gone",
            Self::Memory => "the memory that it held was needed",
        })
    }
}

impl std::error::Error for TooOld {}

/// One state of all data.
#[derive(Debug)]
pub struct Snapshot {
    state: Mutex<Result<Arc<Version>, TooOld>>,
    /// Active tag sets from here on came later.
    ordinals: Ordinal,
    pub(crate) views: Arc<BTreeMap<String, Arc<catalog::View>>>,
}

impl Snapshot {
    /// What it holds.
    ///
    /// # Errors
    /// `Unavailable` with [`TooOld`] as its source once it was ended.
    pub(crate) fn version(&self) -> Result<Arc<Version>> {
        let state = self.state.lock();
        state.clone().map_err(|why| Error::unavailable("snapshot too old").with_source(why))
    }

    /// What is to be said of an error: that the snapshot has ended, where it has.
    pub(crate) fn explain(&self, e: Error) -> Error {
        self.version().err().unwrap_or(e)
    }

    fn end(&self, why: TooOld) {
        let ended = std::mem::replace(&mut *self.state.lock(), Err(why));
        // Outside of the lock: memtables may go with it.
        drop(ended);
        tracing::info!(reason = %why, "snapshot of a transaction ended");
    }
}

/// Those that are held, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Snapshots(Mutex<Vec<Weak<Snapshot>>>);

impl Snapshots {
    /// Takes one; nothing may be appended to memtables meanwhile.
    pub fn take(&self, inner: &Inner) -> Arc<Snapshot> {
        // Under the lock, so that whoever is going to give up what the version holds sees the snapshot or is seen by it.
        let mut all = self.0.lock();
        all.retain(|s| s.strong_count() > 0);
        let mut version = Version::clone(&inner.version());
        for table in &mut version.tables {
            table.active = table.active.view();
        }
        let ordinals = Ordinal::try_from(inner.registry.ordinals()).unwrap_or(Ordinal::MAX);
        let snapshot =
            Arc::new(Snapshot { state: Mutex::new(Ok(Arc::new(version))), ordinals, views: inner.views.all() });
        all.push(Arc::downgrade(&snapshot));
        snapshot
    }

    fn all(&self) -> Vec<(Arc<Snapshot>, Arc<Version>)> {
        let all: Vec<Arc<Snapshot>> = self.0.lock().iter().filter_map(Weak::upgrade).collect();
        all.into_iter().filter_map(|s| Some((s.clone(), s.version().ok()?))).collect()
    }

    /// The tag sets of memtables that snapshots hold. Ask after the version was looked at.
    pub fn ordinals(&self) -> HashSet<Ordinal> {
        let all = self.all();
        let memtables = all.iter().flat_map(|(_, version)| version.tables.iter().flat_map(|t| t.memtables()));
        memtables.flat_map(|m| m.ordinals()).collect()
    }

    /// Ends those that name any of these objects, which are about to be deleted.
    pub fn end_those_of(&self, paths: &HashSet<&str>) {
        if paths.is_empty() {
            return;
        }
        for (snapshot, version) in self.all() {
            let mut files = version.tables.iter().flat_map(|t| t.files.iter());
            if files.any(|f| paths.contains(&*f.path)) || version.parts.iter().any(|p| paths.contains(&*p.path)) {
                snapshot.end(TooOld::Deleted);
            }
        }
    }

    /// Ends the oldest while snapshots hold too much, and notes what they hold.
    pub fn relieve(&self, inner: &Inner) {
        let present = inner.version();
        let mut all = self.all();
        // The others would free nothing.
        all.retain(|(_, version)| bytes([version], &present) > 0);
        let most = match inner.memory.is_scarce() || inner.registry.is_pressed() {
            true => 0,
            false => inner.memory.limit() / MEMORY_PARTS,
        };
        let mut held = 0;
        for first in 0..=all.len() {
            held = bytes(all[first..].iter().map(|(_, version)| version), &present);
            if held <= most {
                break;
            }
            all[first].0.end(TooOld::Memory);
        }
        inner.memory.note(Kind::Snapshots, held);
    }
}

/// What versions hold beyond the present one.
fn bytes<'a>(versions: impl IntoIterator<Item = &'a Arc<Version>>, present: &Version) -> usize {
    let mut own: HashMap<*const Memtable, usize> = HashMap::new();
    let mut lists: HashMap<*const (), usize> = HashMap::new();
    for table in versions.into_iter().flat_map(|v| &v.tables) {
        let now = present.table(table.schema.id);
        for memtable in table.memtables().map(Memtable::whole) {
            if !now.is_some_and(|t| t.memtables().any(|m| Arc::ptr_eq(m, memtable))) {
                own.insert(Arc::as_ptr(memtable), memtable.bytes());
            }
        }
        if !now.is_some_and(|t| Arc::ptr_eq(&t.files, &table.files)) {
            lists.insert(Arc::as_ptr(&table.files).cast(), table.files.len() * FILE_BYTES);
        }
    }
    own.values().sum::<usize>() + lists.values().sum::<usize>()
}

/// What a look at the data sees.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    pub inner: &'a Inner,
    /// `None`: the present.
    pub snapshot: Option<&'a Arc<Snapshot>>,
}

impl View<'_> {
    /// The state of all data.
    pub fn version(&self) -> Result<Arc<Version>> {
        self.snapshot.map_or_else(|| Ok(self.inner.version()), |s| s.version())
    }

    /// Whether an active tag set was there.
    pub fn knows(&self, ordinal: Ordinal) -> bool {
        self.snapshot.is_none_or(|s| ordinal < s.ordinals)
    }
}
