//! The general form: Arrow batches in order of arrival, with the rows of each tag set listed.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, RecordBatch, TimestampMillisecondArray, UInt32Array};
use arrow::compute::{concat_batches, interleave};
use arrow::datatypes::TimestampMillisecondType;
use catalog::tables::Role;
use catalog::{Error, Ordinal, Result, TableSchema};
use parking_lot::RwLock;

/// Rows of any table. A row's number is its position in order of arrival.
#[derive(Debug, Default)]
pub(super) struct BatchMemtable {
    state: RwLock<State>,
}

#[derive(Debug, Default)]
struct State {
    batches: Vec<RecordBatch>,
    /// Number of the first row of each batch.
    starts: Vec<u32>,
    rows: u32,
    bytes: usize,
    by_ordinal: HashMap<Ordinal, Vec<u32>, foldhash::fast::FixedState>,
    /// Batches at the end that are small: joined once there are [`SMALL_MAX`] of them.
    small: usize,
}

const SMALL_ROWS: usize = 1024;
const SMALL_MAX: usize = 32;

impl BatchMemtable {
    pub(super) fn bytes(&self) -> usize {
        self.state.read().bytes
    }

    pub(super) fn rows(&self) -> u64 {
        u64::from(self.state.read().rows)
    }

    /// Appends rows whose tag columns are indexes into `ordinals`. One caller at a time.
    pub(super) fn append(&self, table: &TableSchema, ordinals: &[Ordinal], rows: &RecordBatch) -> Result<()> {
        let rows = with_ordinals(table, ordinals, rows)?;
        let series = tags(&rows, 0)?;
        let mut state = self.state.write();
        let start = state.rows;
        let end = u32::try_from(start as usize + rows.num_rows())
            .map_err(|_| Error::unavailable(format!("memtable of {} is full", table.name)))?;
        for (row, ordinal) in (start..end).zip(series.values()) {
            state.by_ordinal.entry(*ordinal).or_default().push(row);
        }
        state.rows = end;
        state.bytes += rows.get_array_memory_size() + 8 * rows.num_rows();
        state.small = if rows.num_rows() < SMALL_ROWS { state.small + 1 } else { 0 };
        state.batches.push(rows);
        state.starts.push(start);
        if state.small == SMALL_MAX {
            state.join_small(table)?;
        }
        Ok(())
    }

    /// The tag sets that have any of the first `most` rows, ascending.
    pub(super) fn ordinals(&self, most: u64) -> Vec<Ordinal> {
        let state = self.state.read();
        let has_rows = |rows: &[u32]| rows.first().is_some_and(|r| u64::from(*r) < most);
        let mut out: Vec<Ordinal> = state.by_ordinal.iter().filter(|s| has_rows(s.1)).map(|s| *s.0).collect();
        out.sort_unstable();
        out
    }

    /// The rows of the wanted series among the first `most`, between two times, inclusive: the number of each row's series,
    /// and the asked-for columns. Sorted by (number, ts) without equal pairs; of those the last one to arrive is returned.
    pub(super) fn read(
        &self,
        wanted: &[(u32, Ordinal)],
        start_ms: i64,
        end_ms: i64,
        columns: &[usize],
        most: u64,
    ) -> Result<(Vec<u32>, Vec<ArrayRef>)> {
        let (batches, starts, numbers) = {
            let state = self.state.read();
            let mut numbers = vec![];
            for (index, ordinal) in wanted {
                let rows = state.by_ordinal.get(ordinal).map_or(&[][..], Vec::as_slice);
                let rows = &rows[..rows.partition_point(|r| u64::from(*r) < most)];
                numbers.extend(rows.iter().map(|row| (*index, *row)));
            }
            (state.batches.clone(), state.starts.clone(), numbers)
        };
        let times: Vec<&TimestampMillisecondArray> = batches.iter().map(times).collect::<Result<_>>()?;
        let place = |row: u32| {
            let batch = starts.partition_point(|s| *s <= row) - 1;
            (batch, (row - starts[batch]) as usize)
        };
        let mut rows: Vec<(u32, i64, (usize, usize))> = numbers
            .into_iter()
            .filter_map(|(index, row)| {
                let (batch, row) = place(row);
                let ts = times[batch].value(row);
                (ts >= start_ms && ts <= end_ms).then_some((index, ts, (batch, row)))
            })
            .collect();
        // Stable, and rows of a series are listed in order of arrival: the last of equal keys is the newest.
        rows.sort_by_key(|r| (r.0, r.1));
        let newest: Vec<(usize, usize)> = last_of_equal(&rows).map(|r| r.2).collect();
        let series = last_of_equal(&rows).map(|r| r.0).collect();
        let columns = columns
            .iter()
            .map(|c| {
                let arrays: Vec<&dyn Array> = batches.iter().map(|b| b.column(*c).as_ref()).collect();
                if arrays.is_empty() { Ok(None) } else { interleave(&arrays, &newest).map(Some) }
            })
            .collect::<Result<Option<Vec<_>>, _>>()?;
        Ok((series, columns.unwrap_or_default()))
    }
}

type Row = (u32, i64, (usize, usize));

fn last_of_equal(rows: &[Row]) -> impl Iterator<Item = &Row> {
    rows.iter()
        .enumerate()
        .filter(|(i, row)| rows.get(i + 1).is_none_or(|next| (next.0, next.1) != (row.0, row.1)))
        .map(|(_, row)| row)
}

impl State {
    fn join_small(&mut self, table: &TableSchema) -> Result<()> {
        let from = self.batches.len() - self.small;
        let joined = concat_batches(table.arrow(), &self.batches[from..])?;
        let before: usize = self.batches[from..].iter().map(RecordBatch::get_array_memory_size).sum();
        self.bytes = (self.bytes + joined.get_array_memory_size()).saturating_sub(before);
        self.batches.truncate(from);
        self.starts.truncate(from + 1);
        self.batches.push(joined);
        self.small = 0;
        Ok(())
    }
}

/// Replaces references in tag columns by ordinals.
pub(crate) fn with_ordinals(table: &TableSchema, ordinals: &[Ordinal], rows: &RecordBatch) -> Result<RecordBatch> {
    let mut columns = rows.columns().to_vec();
    for (i, _) in table.columns.iter().enumerate().filter(|(_, c)| c.role == Role::Tag) {
        let refs = tags(rows, i)?;
        // Null slots of a nullable tag column hold no reference.
        let values: Vec<u32> = refs.values().iter().map(|r| ordinals.get(*r as usize).copied().unwrap_or(0)).collect();
        columns[i] = Arc::new(UInt32Array::new(values.into(), refs.nulls().cloned()));
    }
    Ok(RecordBatch::try_new(rows.schema(), columns)?)
}

fn tags(rows: &RecordBatch, column: usize) -> Result<&UInt32Array> {
    let array = rows.columns().get(column).and_then(|c| c.as_any().downcast_ref());
    array.ok_or_else(|| Error::internal("a tag column is not of type UInt32"))
}

fn times(rows: &RecordBatch) -> Result<&TimestampMillisecondArray> {
    use arrow::array::AsArray;
    let array = rows.columns().get(1).and_then(|c| c.as_primitive_opt::<TimestampMillisecondType>());
    array.ok_or_else(|| Error::internal("the time column is not of type Timestamp(ms)"))
}
