//! What readers see: for each table its memtables and files, and the tag parts of all.
//!
//! A version is immutable but for its active memtables, which grow. It is replaced as a whole: a flush puts files in the
//! place of memtables and a compaction files in the place of files in one swap, so that a reader, who takes one version
//! and keeps it, never misses a row and never sees one twice.

use std::sync::Arc;

use catalog::files::{DataFile, State, TagPart};
use catalog::{TableSchema, TagHasher};

use crate::cut::Floors;
use crate::delete::Tombstone;
use crate::memtable::Memtable;

/// One table of a [`Version`].
#[derive(Debug, Clone)]
pub struct TableVersion {
    /// The table.
    pub schema: Arc<TableSchema>,
    /// Takes new rows; the newest data.
    pub active: Arc<Memtable>,
    /// Frozen memtables that are not in files yet, oldest first.
    pub flushing: Vec<Arc<Memtable>>,
    /// Files, in no particular order; see [`DataFile::seq_max`] for their age.
    pub files: Arc<Vec<Arc<DataFile>>>,
    /// Deletes that files may still need, oldest first.
    pub(crate) deletes: Arc<[Arc<Tombstone>]>,
    /// What has expired.
    pub(crate) floors: Arc<Floors>,
}

impl TableVersion {
    /// The memtables, newest first.
    pub fn memtables(&self) -> impl Iterator<Item = &Arc<Memtable>> {
        std::iter::once(&self.active).chain(self.flushing.iter().rev())
    }
}

/// One consistent state of all data.
#[derive(Debug, Clone)]
pub struct Version {
    /// In the order of [`catalog::tables::all`].
    pub tables: Vec<TableVersion>,
    /// Tag parts, in no particular order.
    pub parts: Arc<Vec<Arc<TagPart>>>,
}

impl Version {
    /// The version that a file catalog describes, with empty memtables. Nothing has expired in it.
    pub fn new(state: &State, hasher: &TagHasher) -> Self {
        let tables = catalog::tables::all()
            .into_iter()
            .map(|schema| TableVersion {
                schema: schema.clone(),
                active: Arc::new(Memtable::new(schema.clone())),
                flushing: vec![],
                files: Arc::new(
                    state.files.iter().filter(|f| f.table_id == schema.id).cloned().map(Arc::new).collect(),
                ),
                deletes: state
                    .deletes
                    .iter()
                    .filter(|d| d.table_id == schema.id)
                    .map(|d| Arc::new(Tombstone::new(d.clone(), hasher)))
                    .collect(),
                floors: Arc::default(),
            })
            .collect();
        Self { tables, parts: Arc::new(state.parts.iter().cloned().map(Arc::new).collect()) }
    }

    /// A table; `None` for a number that no schema has.
    pub fn table(&self, table_id: u16) -> Option<&TableVersion> {
        self.tables.iter().find(|t| t.schema.id == table_id)
    }

    /// This version with one table changed.
    #[must_use]
    pub fn with_table(&self, table_id: u16, change: impl FnOnce(&mut TableVersion)) -> Self {
        let mut next = self.clone();
        if let Some(table) = next.tables.iter_mut().find(|t| t.schema.id == table_id) {
            change(table);
        }
        next
    }

    /// Bytes of all memtables.
    pub fn memory(&self) -> usize {
        self.tables.iter().flat_map(TableVersion::memtables).map(|m| m.bytes()).sum()
    }
}
