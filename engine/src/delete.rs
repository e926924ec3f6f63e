//! Deletes: rows of a table whose tags match and whose time lies in a range.
//!
//! A delete is an object of the file catalog. It takes a number among flushes and concerns the files with lower ones, so
//! rows that are written after it stay, whatever their time. Readers leave out what it concerns; compaction folds it in
//! (a file that is written from then on has a higher id than the delete and holds none of those rows), and when no file
//! needs it any more it leaves the catalog.
//!
//! Always: when a delete takes effect, every row that it concerns is in a file and none is in the log. Otherwise a row
//! that is replayed after a crash would come back as a new one.

use std::sync::Arc;

use catalog::files::{Commit, DataFile, Delete};
use catalog::{Error, Result, TagHasher};

use crate::Selection;
use crate::cut::Predicate;
use crate::engine::Inner;
use crate::flush::publish;

/// Most deletes that wait to be folded in: each costs every query of its table some time.
const DELETES_MAX: usize = 10_000;

/// A delete that files may still need.
#[derive(Debug)]
pub(crate) struct Tombstone {
    /// As it is in the catalog.
    pub delete: Delete,
    /// The series that it concerns.
    pub which: Predicate,
}

impl Tombstone {
    pub fn new(delete: Delete, hasher: &TagHasher) -> Self {
        let which = Predicate::new(delete.matchers.clone(), hasher);
        Self { delete, which }
    }

    /// Whether rows of a file may have to be left out.
    pub fn concerns(&self, file: &DataFile) -> bool {
        let delete = &self.delete;
        file.seq_max < delete.seq
            && file.id < delete.id
            && file.ts_min <= delete.end_ms
            && file.ts_max >= delete.start_ms
    }
}

/// Deletes the rows of all selections that were acknowledged before; durable when it returns. It goes on when the caller
/// goes away, since its steps exclude flushes and merges that must not see half of it.
///
/// # Errors
/// `LimitExceeded` when too many deletes wait to be folded in; storage errors, after which nothing was deleted.
pub(crate) async fn delete(inner: &Arc<Inner>, selections: Vec<Selection>) -> Result<()> {
    let inner = inner.clone();
    let work = tokio::spawn(async move {
        let _flushing = inner.flushing.lock().await;
        inner.flush_all_of_log().await?;
        // No merge may take ids and look at the deletes between the two moments at which this one has an id and can be
        // seen: its outputs would count as having it folded in.
        let _ids = inner.days.deleting.lock().await;
        let version = inner.version();
        let waiting: usize = version.tables.iter().map(|t| t.deletes.len()).sum();
        if waiting + selections.len() > DELETES_MAX {
            inner.metrics.limit("deletes");
            return Err(Error::limit_exceeded(format!(
                "{waiting} deletes wait to be folded into files; at most {DELETES_MAX} may. Fold them in by \
                 clean_tombstones first"
            )));
        }
        let seq = inner.files.next_seq();
        let created_ms = inner.now_ms();
        let hasher = *inner.registry.hasher();
        let made = selections.into_iter().map(|s| {
            let delete = Delete {
                id: inner.files.next_id(),
                seq,
                table_id: s.table.id,
                matchers: s.matchers,
                start_ms: s.start_ms,
                end_ms: s.end_ms,
                created_ms,
            };
            Arc::new(Tombstone::new(delete, &hasher))
        });
        let needed = |t: &Arc<Tombstone>| {
            let table = version.table(t.delete.table_id);
            t.delete.start_ms <= t.delete.end_ms && table.is_some_and(|v| v.files.iter().any(|f| t.concerns(f)))
        };
        let made: Vec<_> = made.filter(needed).collect();
        let commit = Commit { add_deletes: made.iter().map(|t| t.delete.clone()).collect(), ..Commit::default() };
        if made.is_empty() {
            // Nothing is to be written, which a process that was replaced would not learn from.
            return inner.files.confirm().await;
        }
        publish(&inner, commit, move |_, version, _| {
            let mut next = version.clone();
            for table in &mut next.tables {
                let of_table = made.iter().filter(|t| t.delete.table_id == table.schema.id).cloned();
                table.deletes = table.deletes.iter().cloned().chain(of_table).collect();
            }
            next
        })
        .await?;
        Ok(())
    });
    work.await.map_err(|e| Error::internal("delete did not end").with_source(e))?
}
