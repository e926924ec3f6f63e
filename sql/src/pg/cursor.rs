//! Cursors: rows of a query that a client asks for piece by piece, by name.
//!
//! The query runs as far ahead as its channel has room and waits for the client beyond. Cursors only go forward, so
//! nothing is kept of what was given.

use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::SchemaRef;
use arrow::record_batch::RecordBatch;
use datafusion::error::Result;
use datafusion::execution::SendableRecordBatchStream;
use futures::{Stream, StreamExt, stream};
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
}

/// What was not given yet.
struct Left {
    stream: SendableRecordBatchStream,
    /// The rest of a batch.
    batch: Option<RecordBatch>,
    /// Rows given and passed over.
    position: u64,
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

impl Cursor {
    /// A cursor over the rows of a running query.
    pub fn new(stream: SendableRecordBatchStream, names: Names, binary: bool, hold: bool) -> Self {
        let schema = stream.schema();
        let left = Arc::new(Mutex::new(Left { stream, batch: None, position: 0 }));
        Self { schema, names, binary, hold, left }
    }

    /// The asked-for rows.
    ///
    /// # Errors
    /// 55000 for rows that were passed already.
    pub async fn fetch(
        &self,
        rows: Rows,
    ) -> std::result::Result<impl Stream<Item = Result<RecordBatch>> + Send + 'static, SqlError> {
        let mut left = self.left.clone().lock_owned().await;
        let (before, most) = match rows {
            Rows::Next(most) => (0, most),
            Rows::All => (0, u64::MAX),
            Rows::After(before) => (before, 1),
            Rows::At(row) => match row.checked_sub(left.position + 1) {
                Some(before) => (before, 1),
                None => return Err(SqlError::new("55000", "cursor can only scan forward")),
            },
        };
        left.skip(before).await?;
        Ok(stream::try_unfold((left, most), |(mut left, most)| async move {
            if most == 0 {
                return Ok(None);
            }
            let batch = left.next(most).await?;
            Ok(batch.map(|batch| {
                let rest = most - batch.num_rows() as u64;
                (batch, (left, rest))
            }))
        }))
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{AsArray, Int64Array};
    use arrow::datatypes::Int64Type;
    use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
    use futures::TryStreamExt;

    use super::*;

    async fn rows_of(cursor: &Cursor, rows: Rows) -> std::result::Result<Vec<i64>, &'static str> {
        let batches: Vec<RecordBatch> =
            cursor.fetch(rows).await.map_err(|e| e.code)?.try_collect().await.map_err(|_| "failed")?;
        Ok(batches.iter().flat_map(|b| b.column(0).as_primitive::<Int64Type>().values().to_vec()).collect())
    }

    #[tokio::test]
    async fn rows_come_in_pieces() {
        let batch = |rows: Vec<i64>| {
            RecordBatch::try_from_iter([("n", Arc::new(Int64Array::from(rows)) as _)]).expect("a batch")
        };
        let batches = [batch(vec![1, 2, 3]), batch(vec![]), batch(vec![4, 5, 6, 7, 8])];
        let schema = batches[0].schema();
        let stream = RecordBatchStreamAdapter::new(schema, stream::iter(batches.map(Ok)));
        let cursor = Cursor::new(Box::pin(stream), Names::default(), false, false);
        assert_eq!(rows_of(&cursor, Rows::Next(0)).await, Ok(vec![]));
        assert_eq!(rows_of(&cursor, Rows::Next(2)).await, Ok(vec![1, 2]));
        assert_eq!(rows_of(&cursor, Rows::Next(2)).await, Ok(vec![3, 4]));
        assert_eq!(rows_of(&cursor, Rows::At(4)).await, Err("55000"));
        assert_eq!(rows_of(&cursor, Rows::At(6)).await, Ok(vec![6]));
        assert_eq!(rows_of(&cursor, Rows::After(0)).await, Ok(vec![7]));
        assert_eq!(rows_of(&cursor, Rows::All).await, Ok(vec![8]));
        assert_eq!(rows_of(&cursor, Rows::Next(1)).await, Ok(vec![]));
    }
}
