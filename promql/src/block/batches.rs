//! Builds all rows of an operation, in as many batches as they need.

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use datafusion::error::Result as DfResult;

use super::{BlockBuilder, Row, rows_per_batch};

/// Rows in batches of usual size. Unlike rows of one growing batch they are never moved to make room for more, which
/// would take three times their size for a moment. Any row can be changed until all are finished.
#[derive(Debug)]
pub struct BatchesBuilder {
    schema: SchemaRef,
    rows_per_batch: usize,
    /// All but the last are full.
    batches: Vec<BlockBuilder>,
    /// A histogram was put into a row.
    has_histograms: bool,
}

impl BatchesBuilder {
    /// An empty builder for batches of a [`super::schema`].
    pub fn new(schema: SchemaRef) -> Self {
        let first = BlockBuilder::new(schema.clone());
        let rows_per_batch = rows_per_batch(first.steps());
        Self { schema, rows_per_batch, batches: vec![first], has_histograms: false }
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        (self.batches.len() - 1) * self.rows_per_batch + self.last().len()
    }

    /// Values per row.
    pub fn steps(&self) -> usize {
        self.last().steps()
    }

    /// Whether any row has a histogram.
    pub fn has_histograms(&self) -> bool {
        self.has_histograms
    }

    fn last(&self) -> &BlockBuilder {
        &self.batches[self.batches.len() - 1]
    }

    /// The batch that takes the next row.
    fn open(&mut self) -> &mut BlockBuilder {
        if self.last().len() == self.rows_per_batch {
            self.batches.push(BlockBuilder::new(self.schema.clone()));
        }
        let last = self.batches.len() - 1;
        &mut self.batches[last]
    }

    /// The batch of a row, and the row's number in it.
    fn at(&mut self, row: usize) -> (&mut BlockBuilder, usize) {
        (&mut self.batches[row / self.rows_per_batch], row % self.rows_per_batch)
    }

    /// Begins a row, see [`BlockBuilder::push`].
    pub fn push(&mut self, write: impl FnOnce(&mut Vec<u8>) -> bool) -> (&mut [f64], &mut [bool]) {
        self.open().push(write)
    }

    /// Appends a row with the samples of another and labels that `write` appends.
    pub fn copy(&mut self, row: &Row<'_>, write: impl FnOnce(&mut Vec<u8>) -> bool) {
        self.has_histograms |= row.has_histograms();
        self.open().copy(row, write);
    }

    /// Takes the last row back when it has no value at all. Call it once after a [`BatchesBuilder::push`] at most.
    pub fn pop_if_empty(&mut self) {
        let last = self.batches.len() - 1;
        self.batches[last].pop_if_empty();
    }

    /// The values of a row, to be changed.
    pub fn row_mut(&mut self, row: usize) -> (&mut [f64], &mut [bool]) {
        let (batch, row) = self.at(row);
        batch.row_mut(row)
    }

    /// Whether a row has a sample at a step.
    #[inline]
    pub fn has_sample(&self, row: usize, step: usize) -> bool {
        self.batches[row / self.rows_per_batch].has_sample(row % self.rows_per_batch, step)
    }

    /// Puts an encoded histogram into a row, which has no sample at the step.
    pub fn put_encoded(&mut self, row: usize, step: usize, bytes: Vec<u8>) {
        self.has_histograms = true;
        let (batch, row) = self.at(row);
        batch.put_encoded(row, step, bytes);
    }

    /// Gives a row the histograms of another.
    pub fn copy_histograms(&mut self, to: usize, row: &Row<'_>) {
        self.has_histograms |= row.has_histograms();
        let (batch, to) = self.at(to);
        batch.copy_histograms(to, row);
    }

    /// All rows, in order; no batch without any.
    ///
    /// # Errors
    /// None that valid rows can cause.
    pub fn finish(self) -> DfResult<Vec<RecordBatch>> {
        let batches = self.batches.into_iter().filter(|b| !b.is_empty());
        batches.map(BlockBuilder::into_batch).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::result::Block;

    #[test]
    fn rows_keep_their_order_over_batches_of_usual_size() {
        for steps in [1, 100, 100_000] {
            let mut all = BatchesBuilder::new(crate::block::schema(steps));
            let rows = 3 * rows_per_batch(steps) + 1;
            for row in 0..rows {
                let (values, valid) = all.push(|out| {
                    out.extend_from_slice(row.to_string().as_bytes());
                    false
                });
                values[0] = row as f64;
                valid[0] = true;
                // One without a value goes again, also where it would have been the first of a batch.
                all.push(|_| false);
                all.pop_if_empty();
                assert_eq!(all.rows(), row + 1);
            }
            // Rows of all batches can still be changed.
            for row in 0..rows {
                all.row_mut(row).0[0] += 0.5;
            }
            assert!(!all.has_histograms() && all.has_sample(rows - 1, 0));
            let batches = all.finish().unwrap();
            assert!(batches.iter().all(|b| b.num_rows() > 0 && b.num_rows() <= rows_per_batch(steps)));
            let blocks: Vec<Block> = batches.iter().map(|b| Block::try_new(b).unwrap()).collect();
            let found: Vec<(String, f64)> =
                Row::all(&blocks).map(|r| (String::from_utf8_lossy(r.labels).into_owned(), r.values[0])).collect();
            assert_eq!(found, (0..rows).map(|row| (row.to_string(), row as f64 + 0.5)).collect::<Vec<_>>());
        }
    }
}
