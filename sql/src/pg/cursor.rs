//! Cursors: rows of a query that a client asks for piece by piece, by name.
//!
//! The query runs as far ahead as its channel has room and waits for the client beyond. Of a cursor that only goes forward
//! nothing is kept of what was given. One that is declared with `SCROLL` keeps what was read, on the account of memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arrow::array::UInt32Array;
use arrow::compute::take_record_batch;
use arrow::datatypes::SchemaRef;
use arrow::record_batch::RecordBatch;
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::SendableRecordBatchStream;
use engine::Reservation;
use futures::stream::BoxStream;
use futures::{StreamExt, stream};
use tokio::sync::Mutex;

use crate::SqlError;
use crate::statement::{Names, Rows};

/// How long rows may be asked for. A client that works on each row takes longer than a statement may, and one that
/// has forgotten its cursor must not keep what it holds.
pub const LIFETIME: Duration = Duration::from_secs(3600);

/// An open cursor.
#[derive(Debug)]
pub struct Cursor {
    /// The columns.
    pub schema: SchemaRef,
    /// What they are called.
    pub names: Names,
    /// Whether rows are given in binary form.
    pub binary: bool,
    /// Whether it outlives its transaction.
    pub hold: bool,
    left: Arc<Mutex<Left>>,
    scroll: bool,
    /// Whether a `FETCH` has begun and did not come to its end. Rows that it passed would be missing without a word.
    read: Arc<AtomicBool>,
}

/// What was not given yet.
struct Left {
    stream: SendableRecordBatchStream,
    /// The rest of a batch.
    batch: Option<RecordBatch>,
    /// Rows given and passed over; of one that goes backwards, the number of the row that was given last: 0 before the
    /// first row, one more than there are after the last.
    position: u64,
    /// Of one that goes backwards: what was read.
    read: Option<Read>,
}

/// Rows that were read.
struct Read {
    /// Each with the number of rows before it.
    batches: Vec<(u64, RecordBatch)>,
    rows: u64,
    /// For the batches.
    memory: Reservation,
}

impl std::fmt::Debug for Left {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "after {} rows", self.position)
    }
}

impl Left {
    /// Some rows, at most `most`; none at the end.
    async fn next(&mut self, most: u64) -> Result<Option<RecordBatch>> {
        loop {
            let batch = match self.batch.take() {
                Some(batch) => batch,
                None => match self.stream.next().await.transpose()? {
                    Some(batch) if batch.num_rows() == 0 => continue,
                    Some(batch) => batch,
                    None => return Ok(None),
                },
            };
            let rows = usize::try_from(most).unwrap_or(usize::MAX).min(batch.num_rows());
            if rows < batch.num_rows() {
                self.batch = Some(batch.slice(rows, batch.num_rows() - rows));
            }
            self.position += rows as u64;
            return Ok(Some(batch.slice(0, rows)));
        }
    }

    async fn skip(&mut self, mut rows: u64) -> Result<()> {
        while rows > 0 {
            let Some(batch) = self.next(rows).await? else { break };
            rows -= batch.num_rows() as u64;
        }
        Ok(())
    }
}

impl Left {
    /// Reads on until so many rows were read, or to the end.
    async fn read_to(&mut self, rows: u64) -> Result<()> {
        while self.read.as_ref().is_some_and(|read| read.rows < rows) {
            let Some(batch) = self.stream.next().await.transpose()? else { break };
            if let Some(read) = &mut self.read
                && batch.num_rows() > 0
            {
                let room = read.memory.grow(batch.get_array_memory_size());
                room.map_err(|e| DataFusionError::ResourcesExhausted(e.to_string()))?;
                let before = read.rows;
                read.rows += batch.num_rows() as u64;
                read.batches.push((before, batch));
            }
        }
        Ok(())
    }

    /// The asked-for rows of one that goes backwards.
    async fn scroll(&mut self, rows: Rows) -> Result<Vec<RecordBatch>> {
        let wanted = match rows {
            Rows::Next(n) => self.position.saturating_add(n),
            Rows::By(n) => self.position.saturating_add_signed(n),
            Rows::At(n) => u64::try_from(n).unwrap_or(u64::MAX),
            Rows::All => u64::MAX,
            Rows::Back(_) | Rows::AllBack => 0,
        };
        self.read_to(wanted).await?;
        let Some(read) = &self.read else { return Ok(vec![]) };
        // Where the rows are told by one number alone.
        let at = |row: u64| match (1..=read.rows).contains(&row) {
            true => (row - 1..row, row),
            false => (0..0, row.min(read.rows + 1)),
        };
        let forward = |n: u64| {
            let (from, to) = (self.position.min(read.rows), self.position.saturating_add(n));
            (from..to.min(read.rows), to.min(read.rows + 1))
        };
        let back = |n: u64| {
            let to = self.position.saturating_sub(1);
            let from = to.saturating_sub(n);
            (from..to, self.position.saturating_sub(n))
        };
        let ((range, position), reversed) = match rows {
            Rows::Next(n) => (forward(n), false),
            Rows::All => (forward(u64::MAX), false),
            Rows::Back(n) => (back(n), true),
            Rows::AllBack => (back(u64::MAX), true),
            Rows::By(n) => (at(self.position.checked_add_signed(n).unwrap_or(0)), false),
            Rows::At(n) if n < 0 => (at((read.rows + 1).checked_add_signed(n).unwrap_or(0)), false),
            Rows::At(n) => (at(n.unsigned_abs()), false),
        };
        self.position = position;
        let parts = read.batches.iter().filter_map(|(before, batch)| {
            let from = range.start.max(*before);
            let to = range.end.min(before + batch.num_rows() as u64);
            (from < to).then(|| batch.slice((from - before) as usize, (to - from) as usize))
        });
        let mut parts: Vec<RecordBatch> = parts.collect();
        if reversed {
            parts.reverse();
            for part in &mut parts {
                let order: UInt32Array = (0..part.num_rows() as u32).rev().collect();
                *part = take_record_batch(part, &order)?;
            }
        }
        Ok(parts)
    }
}

impl Cursor {
    /// A cursor over the rows of a running query; with memory for what it keeps, it goes backwards as well.
    pub fn new(
        stream: SendableRecordBatchStream,
        names: Names,
        (binary, hold): (bool, bool),
        memory: Option<Reservation>,
    ) -> Self {
        let schema = stream.schema();
        let scroll = memory.is_some();
        let read = memory.map(|memory| Read { batches: vec![], rows: 0, memory });
        let left = Arc::new(Mutex::new(Left { stream, batch: None, position: 0, read }));
        Self { schema, names, binary, hold, left, scroll, read: Arc::default() }
    }

    /// Whether rows of it are being read, or were until that failed.
    pub fn is_read(&self) -> bool {
        self.read.load(Ordering::Relaxed)
    }

    /// The asked-for rows.
    ///
    /// # Errors
    /// 55000 for rows that were passed already, of a cursor that only goes forward.
    pub async fn fetch(&self, rows: Rows) -> std::result::Result<BoxStream<'static, Result<RecordBatch>>, SqlError> {
        let mut left = self.left.clone().lock_owned().await;
        let reading = self.read.clone();
        if self.scroll {
            reading.store(true, Ordering::Relaxed);
            let batches = left.scroll(rows).await?;
            reading.store(false, Ordering::Relaxed);
            return Ok(stream::iter(batches.into_iter().map(Ok)).boxed());
        }
        let backwards = || {
            let hint = "Declare it with the SCROLL option to enable backward scan.";
            SqlError::new("55000", "cursor can only scan forward").hint(hint)
        };
        let (before, most) = match rows {
            Rows::Next(most) => (0, most),
            Rows::All => (0, u64::MAX),
            Rows::By(rows) if rows > 0 => (rows.unsigned_abs() - 1, 1),
            Rows::At(row) if row > 0 => match row.unsigned_abs().checked_sub(left.position + 1) {
                Some(before) => (before, 1),
                None => return Err(backwards()),
            },
            _ => return Err(backwards()),
        };
        reading.store(true, Ordering::Relaxed);
        left.skip(before).await?;
        let rows = stream::try_unfold((left, most, reading), |(mut left, most, reading)| async move {
            let batch = if most == 0 { None } else { left.next(most).await? };
            reading.store(batch.is_some(), Ordering::Relaxed);
            Ok(batch.map(|batch| {
                let rest = most - batch.num_rows() as u64;
                (batch, (left, rest, reading))
            }))
        });
        Ok(rows.boxed())
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{AsArray, Int64Array};
    use arrow::datatypes::Int64Type;
    use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
    use engine::Memory;
    use engine::memory::Kind;
    use futures::TryStreamExt;

    use super::*;

    async fn rows_of(cursor: &Cursor, rows: Rows) -> std::result::Result<Vec<i64>, &'static str> {
        let batches: Vec<RecordBatch> =
            cursor.fetch(rows).await.map_err(|e| e.code)?.try_collect().await.map_err(|_| "failed")?;
        Ok(batches.iter().flat_map(|b| b.column(0).as_primitive::<Int64Type>().values().to_vec()).collect())
    }

    fn cursor(memory: Option<Reservation>) -> Cursor {
        let batch = |rows: Vec<i64>| {
            RecordBatch::try_from_iter([("n", Arc::new(Int64Array::from(rows)) as _)]).expect("a batch")
        };
        let batches = [batch(vec![1, 2, 3]), batch(vec![]), batch(vec![4, 5, 6, 7, 8])];
        let schema = batches[0].schema();
        let stream = RecordBatchStreamAdapter::new(schema, stream::iter(batches.map(Ok)));
        Cursor::new(Box::pin(stream), Names::default(), (false, false), memory)
    }

    #[tokio::test]
    async fn rows_come_in_pieces() {
        let cursor = cursor(None);
        assert_eq!(rows_of(&cursor, Rows::Next(0)).await, Ok(vec![]));
        assert_eq!(rows_of(&cursor, Rows::Next(2)).await, Ok(vec![1, 2]));
        assert_eq!(rows_of(&cursor, Rows::Next(2)).await, Ok(vec![3, 4]));
        assert_eq!(rows_of(&cursor, Rows::At(4)).await, Err("55000"));
        assert_eq!(rows_of(&cursor, Rows::At(6)).await, Ok(vec![6]));
        assert_eq!(rows_of(&cursor, Rows::By(1)).await, Ok(vec![7]));
        assert_eq!(rows_of(&cursor, Rows::Back(1)).await, Err("55000"));
        assert_eq!(rows_of(&cursor, Rows::By(0)).await, Err("55000"));
        assert_eq!(rows_of(&cursor, Rows::All).await, Ok(vec![8]));
        assert_eq!(rows_of(&cursor, Rows::Next(1)).await, Ok(vec![]));
    }

    #[tokio::test]
    async fn a_scrolling_cursor_goes_both_ways() {
        let memory = Memory::new(1 << 20);
        let cursor = cursor(Some(memory.reserve(Kind::Queries)));
        let check = async |rows: Rows, expected: &[i64]| {
            assert_eq!(rows_of(&cursor, rows).await.as_deref(), Ok(expected), "{rows:?}");
        };
        check(Rows::Back(1), &[]).await;
        check(Rows::By(0), &[]).await;
        check(Rows::Next(4), &[1, 2, 3, 4]).await;
        check(Rows::By(0), &[4]).await;
        check(Rows::Back(2), &[3, 2]).await;
        check(Rows::Next(1), &[3]).await;
        check(Rows::By(3), &[6]).await;
        check(Rows::By(-4), &[2]).await;
        check(Rows::At(8), &[8]).await;
        check(Rows::Next(1), &[]).await;
        check(Rows::Back(1), &[8]).await;
        check(Rows::At(-3), &[6]).await;
        check(Rows::All, &[7, 8]).await;
        check(Rows::All, &[]).await;
        check(Rows::AllBack, &[8, 7, 6, 5, 4, 3, 2, 1]).await;
        check(Rows::Next(2), &[1, 2]).await;
        check(Rows::At(-9), &[]).await;
        check(Rows::By(1), &[1]).await;
        check(Rows::At(99), &[]).await;
        check(Rows::By(-1), &[8]).await;
        check(Rows::At(0), &[]).await;
        check(Rows::Next(u64::MAX), &[1, 2, 3, 4, 5, 6, 7, 8]).await;
        assert!(memory.held(Kind::Queries) > 0);
        drop(cursor);
        assert_eq!(memory.held(Kind::Queries), 0);
    }

    #[tokio::test]
    async fn a_scrolling_cursor_keeps_no_more_than_there_is_room_for() {
        let cursor = cursor(Some(Memory::new(64).reserve(Kind::Queries)));
        assert_eq!(rows_of(&cursor, Rows::All).await, Err("53200"));
    }
}
