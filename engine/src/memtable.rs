//! Rows that are in the log but not yet in files.
//!
//! A memtable is one table's rows since its last flush. The log's committer is the only one to append; queries and the
//! flush read concurrently and never hold a lock while they decode. Frozen, it changes no more.

mod batches;
mod block;
mod series;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering as Atomic};

use arrow::array::{ArrayRef, AsArray, Float64Array, RecordBatch, TimestampMillisecondArray, UInt32Array};
use arrow::datatypes::{DataType, Field, Float64Type, Schema, SchemaRef, TimestampMillisecondType, UInt32Type};
use catalog::tables::time_type;
use catalog::{Error, Ordinal, Result, TableSchema};

use batches::BatchMemtable;
pub(crate) use batches::with_ordinals;
pub(crate) use block::{POW10, whole_number};
use series::{Samples, SeriesMemtable, TsRange};

/// Index of the time column in every keyed table.
const TS: usize = 1;

/// One table's rows in memory.
#[derive(Debug)]
pub struct Memtable {
    table: Arc<TableSchema>,
    form: Form,
    range: TsRange,
    /// Position of the log record that holds the first row; `u64::MAX` while empty.
    first_position: AtomicU64,
    /// When the first row arrived, milliseconds since the epoch.
    first_ms: AtomicU64,
}

#[derive(Debug)]
enum Form {
    /// Keyed tables whose only other column is one `Float64`.
    Series(SeriesMemtable),
    Batches(BatchMemtable),
    View(View),
}

/// What another memtable held when a snapshot was taken.
#[derive(Debug)]
struct View {
    of: Arc<Memtable>,
    seen: Seen,
}

/// How much of a memtable is seen.
#[derive(Debug, Clone, Copy)]
struct Seen {
    /// Rows in order of arrival.
    rows: u64,
    /// The number by which [`SeriesMemtable`] knows the snapshot.
    snapshot: Option<u64>,
}

impl Seen {
    const ALL: Self = Self { rows: u64::MAX, snapshot: None };
}

impl Drop for View {
    fn drop(&mut self) {
        if let (Form::Series(form), Some(number)) = (&self.of.form, self.seen.snapshot) {
            form.forget(number);
        }
    }
}

impl Memtable {
    /// An empty memtable.
    pub fn new(table: Arc<TableSchema>) -> Self {
        let one_float = matches!(&table.columns[..], [_, _, v] if v.data_type == DataType::Float64 && !v.nullable);
        let form = if table.keyed && one_float {
            Form::Series(SeriesMemtable::default())
        } else {
            Form::Batches(BatchMemtable::default())
        };
        Self {
            table,
            form,
            range: TsRange::default(),
            first_position: AtomicU64::new(u64::MAX),
            first_ms: AtomicU64::new(0),
        }
    }

    /// The table.
    pub fn table(&self) -> &Arc<TableSchema> {
        &self.table
    }

    /// What this one holds now, as a memtable that does not grow. Nothing may be appended meanwhile.
    pub(crate) fn view(self: &Arc<Self>) -> Arc<Self> {
        let snapshot = match &self.form {
            Form::View(_) => return self.clone(),
            Form::Series(form) => Some(form.snapshot()),
            Form::Batches(_) => None,
        };
        let range = TsRange::default();
        if let Some((min, max)) = self.ts_range() {
            range.add(&[min, max]);
        }
        let form = Form::View(View { of: self.clone(), seen: Seen { rows: self.rows(), snapshot } });
        Arc::new(Self { form, range, ..Self::new(self.table.clone()) })
    }

    /// The memtable that this one is a view of, or itself.
    pub(crate) fn whole(self: &Arc<Self>) -> &Arc<Self> {
        match &self.form {
            Form::View(view) => &view.of,
            _ => self,
        }
    }

    /// Appends rows in the table's in-memory schema whose tag columns are indexes into `ordinals`. Only one caller at
    /// a time.
    ///
    /// # Errors
    /// `Internal` when the rows are not in the table's schema.
    pub fn append(&self, ordinals: &[Ordinal], rows: &RecordBatch) -> Result<()> {
        let ts = column(rows, TS)?.as_primitive_opt::<TimestampMillisecondType>().ok_or_else(mismatch)?;
        // Before the rows themselves, so that no reader sees rows outside of the range.
        self.range.add(ts.values());
        match &self.form {
            Form::Batches(form) => form.append(&self.table, ordinals, rows),
            Form::View(_) => Err(Error::internal("rows for a snapshot")),
            Form::Series(form) => {
                let refs = column(rows, 0)?.as_primitive_opt::<UInt32Type>().ok_or_else(mismatch)?;
                let values = column(rows, 2)?.as_primitive_opt::<Float64Type>().ok_or_else(mismatch)?;
                form.append(ordinals, Samples { refs: refs.values(), ts: ts.values(), values: values.values() });
                Ok(())
            }
        }
    }

    /// Bytes of memory that it takes, about.
    pub fn bytes(&self) -> usize {
        match &self.form {
            Form::Series(form) => form.bytes(),
            Form::Batches(form) => form.bytes(),
            Form::View(_) => 0,
        }
    }

    /// Rows appended, those with equal keys counted each.
    pub fn rows(&self) -> u64 {
        match &self.form {
            Form::Series(form) => form.rows(),
            Form::Batches(form) => form.rows(),
            Form::View(view) => view.seen.rows,
        }
    }

    /// Blocks of packed samples, those that still grow among them; none of tables that are not packed.
    pub fn blocks(&self) -> u64 {
        match &self.form {
            Form::Series(form) => form.blocks(),
            Form::Batches(_) | Form::View(_) => 0,
        }
    }

    /// The tag sets that have rows, ascending.
    pub fn ordinals(&self) -> Vec<Ordinal> {
        self.ordinals_of(Seen::ALL)
    }

    fn ordinals_of(&self, seen: Seen) -> Vec<Ordinal> {
        match &self.form {
            Form::Series(form) => form.ordinals(seen.snapshot),
            Form::Batches(form) => form.ordinals(seen.rows),
            Form::View(view) => view.of.ordinals_of(view.seen),
        }
    }

    /// Least and greatest time of all rows; `None` when empty.
    pub fn ts_range(&self) -> Option<(i64, i64)> {
        self.range.get()
    }

    /// Whether rows between two times, inclusive, may be there.
    pub fn overlaps(&self, start_ms: i64, end_ms: i64) -> bool {
        self.range.get().is_some_and(|(min, max)| min <= end_ms && max >= start_ms)
    }

    /// Reads the wanted series, given as (number to return for it, ordinal) in strictly ascending order of the
    /// numbers, from `start_ms` to `end_ms`, both inclusive. Returns `series` (`UInt32`, the number) and then the
    /// asked-for columns of the table (indexes into its columns), sorted by (series, ts) with unique keys: the row
    /// that arrived last wins. Ask for some hundred series at a time: all is decoded at once.
    ///
    /// # Errors
    /// `Internal` from Arrow.
    pub fn read(
        &self,
        wanted: &[(u32, Ordinal)],
        start_ms: i64,
        end_ms: i64,
        columns: &[usize],
    ) -> Result<RecordBatch> {
        self.read_of(wanted, (start_ms, end_ms), columns, Seen::ALL)
    }

    fn read_of(
        &self,
        wanted: &[(u32, Ordinal)],
        (start_ms, end_ms): (i64, i64),
        columns: &[usize],
        seen: Seen,
    ) -> Result<RecordBatch> {
        let schema = read_schema(&self.table, columns);
        let (series, arrays) = match &self.form {
            Form::View(view) => return view.of.read_of(wanted, (start_ms, end_ms), columns, view.seen),
            Form::Batches(form) => form.read(wanted, start_ms, end_ms, columns, seen.rows)?,
            Form::Series(form) => {
                let rows = form.read(wanted, start_ms, end_ms, seen.snapshot);
                let ts: ArrayRef = Arc::new(TimestampMillisecondArray::from(rows.ts).with_data_type(time_type()));
                let values: ArrayRef = Arc::new(Float64Array::from(rows.values));
                let arrays = columns.iter().map(|c| if *c == TS { ts.clone() } else { values.clone() }).collect();
                (rows.series, arrays)
            }
        };
        if series.is_empty() {
            return Ok(RecordBatch::new_empty(schema));
        }
        let mut all: Vec<ArrayRef> = vec![Arc::new(UInt32Array::from(series))];
        all.extend(arrays);
        Ok(RecordBatch::try_new(schema, all)?)
    }

    /// Notes that a log record at this position holds rows of this memtable; call before the rows are appended.
    pub(crate) fn note_position(&self, position: u64, now_ms: i64) {
        if self.first_position.fetch_min(position, Atomic::Relaxed) == u64::MAX {
            self.first_ms.store(now_ms.max(0) as u64, Atomic::Relaxed);
        }
    }

    /// Position of the first log record that must be kept for this memtable; `None` while it is empty.
    pub(crate) fn first_position(&self) -> Option<u64> {
        let position = self.first_position.load(Atomic::Relaxed);
        (position != u64::MAX).then_some(position)
    }

    /// When the first row arrived, milliseconds since the epoch; `None` while it is empty.
    pub(crate) fn first_ms(&self) -> Option<i64> {
        self.first_position().map(|_| self.first_ms.load(Atomic::Relaxed) as i64)
    }
}

/// The schema of what [`Memtable::read`] and scans return.
pub(crate) fn read_schema(table: &TableSchema, columns: &[usize]) -> SchemaRef {
    let mut fields = vec![Arc::new(Field::new("series", DataType::UInt32, false))];
    fields.extend(columns.iter().map(|c| table.arrow().fields()[*c].clone()));
    Arc::new(Schema::new(fields))
}

fn column(rows: &RecordBatch, i: usize) -> Result<&ArrayRef> {
    rows.columns().get(i).ok_or_else(mismatch)
}

fn mismatch() -> Error {
    Error::internal("rows are not in their table's schema")
}

#[cfg(test)]
mod tests;
