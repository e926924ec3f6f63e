//! The form in which values travel between plan nodes: one row per series.
//!
//! A batch has the columns `labels` (`Binary`, canonical tag set), `values` (`FixedSizeList<Float64>` of one element
//! per step of the evaluation grid, null where the series has no float sample), `drop_name` (`Boolean`: the metric's name
//! goes from the result, but has not gone yet; only with delayed name removal) and `histograms` (`List<Binary>`: an
//! encoded histogram per step, null where the series has none; an empty list when it has none at all, so that float
//! series pay four bytes each). At a step a series has a float or a histogram, never both. A scalar is one row without
//! labels.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{
    ArrayBuilder, ArrayRef, BinaryArray, BinaryBuilder, BooleanArray, FixedSizeListArray, Float64Array, ListArray,
    RecordBatch,
};
use arrow::buffer::{BooleanBuffer, Buffer, NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef};
use datafusion::error::Result as DfResult;

mod batches;

pub use batches::BatchesBuilder;

use crate::histogram::{self, FloatHistogram};
use crate::labels;
use crate::result::Block;

/// Schema of batches with `steps` values per series.
pub fn schema(steps: usize) -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("labels", DataType::Binary, false),
        Field::new("values", DataType::FixedSizeList(item(), steps as i32), false),
        Field::new("drop_name", DataType::Boolean, false),
        Field::new("histograms", DataType::List(histogram_item()), false),
    ]))
}

fn item() -> FieldRef {
    Arc::new(Field::new("item", DataType::Float64, true))
}

/// The element of lists of encoded histograms.
pub(crate) fn histogram_item() -> FieldRef {
    Arc::new(Field::new("item", DataType::Binary, true))
}

/// The column `histograms` of series that have none.
fn no_histograms(rows: usize) -> DfResult<ArrayRef> {
    let none = Arc::new(BinaryArray::new_null(0));
    Ok(Arc::new(ListArray::try_new(histogram_item(), OffsetBuffer::new_zeroed(rows), none, None)?))
}

/// How many series a batch holds at best: values of a batch stay within a core's cache, unless there are so many steps
/// that batches of few series would be all there is.
pub fn rows_per_batch(steps: usize) -> usize {
    let least = if steps > 64 * 1024 { 1 } else { 16 };
    (64 * 1024 / steps.max(1)).clamp(least, 1024)
}

/// What an operation does with the metric's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, serde::Serialize, serde::Deserialize)]
pub enum Name {
    /// It stays.
    Keep,
    /// It goes.
    Drop,
    /// It is marked and goes from the final result.
    DropLater,
}

impl Name {
    /// Appends the resulting labels and says whether the name is to go later.
    pub fn apply(self, from: &[u8], later: bool, out: &mut Vec<u8>) -> bool {
        match self {
            Self::Keep => {
                out.extend_from_slice(from);
                later
            }
            Self::Drop => {
                labels::drop_name(from, out);
                false
            }
            Self::DropLater => {
                out.extend_from_slice(from);
                true
            }
        }
    }
}

/// Builds batches row by row.
#[derive(Debug)]
pub struct BlockBuilder {
    schema: SchemaRef,
    steps: usize,
    offsets: Vec<i32>,
    labels: Vec<u8>,
    values: Vec<f64>,
    valid: Vec<bool>,
    drop_name: Vec<bool>,
    /// Encoded histograms by row times steps plus step.
    histograms: BTreeMap<usize, Vec<u8>>,
}

impl BlockBuilder {
    /// An empty builder for batches of a [`schema`].
    pub fn new(schema: SchemaRef) -> Self {
        let steps = match schema.field(1).data_type() {
            DataType::FixedSizeList(_, n) => *n as usize,
            _ => 1,
        };
        Self {
            schema,
            steps,
            offsets: vec![0],
            labels: Vec::new(),
            values: Vec::new(),
            valid: Vec::new(),
            drop_name: Vec::new(),
            histograms: BTreeMap::new(),
        }
    }

    /// How many rows wait.
    pub fn len(&self) -> usize {
        self.drop_name.len()
    }

    /// True without any row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Values per row.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Begins a row: write labels with [`BlockBuilder::labels`] or by `write`, values into the slices. All values come
    /// as absent.
    pub fn push(&mut self, write: impl FnOnce(&mut Vec<u8>) -> bool) -> (&mut [f64], &mut [bool]) {
        let drop_name = write(&mut self.labels);
        self.offsets.push(self.labels.len() as i32);
        self.drop_name.push(drop_name);
        let at = self.values.len();
        if self.values.capacity() < at + self.steps {
            self.make_room();
        }
        self.values.resize(at + self.steps, 0.0);
        self.valid.resize(at + self.steps, false);
        (&mut self.values[at..], &mut self.valid[at..])
    }

    /// Makes room for twice as many rows, but for no more than a batch usually holds.
    #[cold]
    fn make_room(&mut self) {
        let (held, full) = (self.values.len(), rows_per_batch(self.steps) * self.steps);
        let more = if held < full { held.min(full - held) } else { held };
        self.values.reserve_exact(more.max(self.steps));
        self.valid.reserve_exact(self.values.capacity() - held);
    }

    /// Appends a row with the samples of another and labels that `write` appends.
    pub fn copy(&mut self, row: &Row<'_>, write: impl FnOnce(&mut Vec<u8>) -> bool) {
        let (values, valid) = self.push(write);
        values.copy_from_slice(row.values);
        row.validity(valid);
        self.copy_histograms(self.len() - 1, row);
    }

    /// Gives a row the histograms of another.
    pub fn copy_histograms(&mut self, to: usize, row: &Row<'_>) {
        let at = to * self.steps;
        row.for_each_encoded(|step, bytes| drop(self.histograms.insert(at + step, bytes.to_vec())));
    }

    /// Puts a histogram into a row that waits, which has no sample at the step.
    pub fn put_histogram(&mut self, row: usize, step: usize, h: &FloatHistogram) {
        let mut bytes = Vec::new();
        h.encode(&mut bytes);
        self.put_encoded(row, step, bytes);
    }

    /// As [`BlockBuilder::put_histogram`] with one that is encoded already.
    pub fn put_encoded(&mut self, row: usize, step: usize, bytes: Vec<u8>) {
        self.histograms.insert(row * self.steps + step, bytes);
    }

    /// Whether any row that waits has a histogram.
    pub fn has_histograms(&self) -> bool {
        !self.histograms.is_empty()
    }

    /// Whether a row that waits has a sample at a step.
    #[inline]
    pub fn has_sample(&self, row: usize, step: usize) -> bool {
        let cell = row * self.steps + step;
        self.valid[cell] || (!self.histograms.is_empty() && self.histograms.contains_key(&cell))
    }

    /// Takes the last row back when it has no value at all.
    pub fn pop_if_empty(&mut self) {
        let at = self.valid.len() - self.steps;
        if !self.valid[at..].contains(&true) && self.histograms.last_key_value().is_none_or(|(cell, _)| *cell < at) {
            self.pop();
        }
    }

    /// Takes the last row back.
    pub fn pop(&mut self) {
        let at = self.valid.len() - self.steps;
        if !self.histograms.is_empty() {
            drop(self.histograms.split_off(&at));
        }
        self.values.truncate(at);
        self.valid.truncate(at);
        self.drop_name.pop();
        self.offsets.pop();
        self.labels.truncate(self.offsets.last().map_or(0, |o| *o as usize));
    }

    /// The labels of a row that waits.
    pub fn labels(&self, row: usize) -> &[u8] {
        &self.labels[self.offsets[row] as usize..self.offsets[row + 1] as usize]
    }

    /// The values of a row that waits, to be changed.
    pub fn row_mut(&mut self, row: usize) -> (&mut [f64], &mut [bool]) {
        let range = row * self.steps..(row + 1) * self.steps;
        (&mut self.values[range.clone()], &mut self.valid[range])
    }

    /// True when the batch is as large as batches should be.
    pub fn is_full(&self) -> bool {
        self.len() >= rows_per_batch(self.steps)
    }

    /// The rows as a batch; the builder is empty afterwards.
    ///
    /// # Errors
    /// None that valid rows can cause.
    pub fn finish(&mut self) -> DfResult<RecordBatch> {
        // The next batch has as many rows, if this one was full.
        let next = if self.is_full() { Vec::with_capacity(self.values.len()) } else { Vec::new() };
        let values = std::mem::replace(&mut self.values, next);
        self.batch_of(values)
    }

    /// As [`BlockBuilder::finish`], and no more rows follow.
    ///
    /// # Errors
    /// As there.
    pub fn into_batch(mut self) -> DfResult<RecordBatch> {
        let values = std::mem::take(&mut self.values);
        self.batch_of(values)
    }

    fn batch_of(&mut self, mut values: Vec<f64>) -> DfResult<RecordBatch> {
        let rows = self.len();
        // What was made room for and not used would be held as long as the batch.
        if values.len() < values.capacity() / 4 * 3 {
            values.shrink_to_fit();
        }
        let nulls = if self.valid.contains(&false) {
            Some(NullBuffer::new(BooleanBuffer::from(self.valid.as_slice())))
        } else {
            None
        };
        self.valid.clear();
        let values = Float64Array::new(ScalarBuffer::from(values), nulls);
        let offsets = std::mem::replace(&mut self.offsets, vec![0]);
        let labels = BinaryArray::try_new(
            OffsetBuffer::new(ScalarBuffer::from(offsets)),
            Buffer::from_vec(std::mem::take(&mut self.labels)),
            None,
        )?;
        let drop_name = BooleanArray::from(std::mem::take(&mut self.drop_name));
        let list = FixedSizeListArray::try_new_with_length(item(), self.steps as i32, Arc::new(values), None, rows)?;
        let histograms = self.finish_histograms(rows)?;
        let columns: Vec<ArrayRef> = vec![Arc::new(labels), Arc::new(list), Arc::new(drop_name), histograms];
        Ok(RecordBatch::try_new(self.schema.clone(), columns)?)
    }

    fn finish_histograms(&mut self, rows: usize) -> DfResult<ArrayRef> {
        if self.histograms.is_empty() {
            return no_histograms(rows);
        }
        let all = std::mem::take(&mut self.histograms);
        let mut items = BinaryBuilder::with_capacity(all.len(), all.values().map(Vec::len).sum());
        let mut offsets = Vec::with_capacity(rows + 1);
        offsets.push(0i32);
        let mut cells = all.into_iter().peekable();
        for row in 0..rows {
            let end = (row + 1) * self.steps;
            if cells.peek().is_some_and(|(cell, _)| *cell < end) {
                for cell in row * self.steps..end {
                    items.append_option(cells.next_if(|(at, _)| *at == cell).map(|(_, bytes)| bytes));
                }
            }
            offsets.push(items.len() as i32);
        }
        let offsets = OffsetBuffer::new(ScalarBuffer::from(offsets));
        Ok(Arc::new(ListArray::try_new(histogram_item(), offsets, Arc::new(items.finish()), None)?))
    }
}

/// A batch with the series of a block and other floats and validity, without histograms.
///
/// # Errors
/// None that as many values as the block has can cause.
pub fn with_values(
    schema: &SchemaRef,
    block: &Block,
    values: Vec<f64>,
    nulls: Option<NullBuffer>,
    name: Name,
) -> DfResult<RecordBatch> {
    let rows = block.len();
    let (labels, drop_name): (ArrayRef, ArrayRef) = match name {
        Name::Keep => (Arc::new(block.all_labels().clone()), Arc::new(block.all_drop_name().clone())),
        Name::DropLater => {
            (Arc::new(block.all_labels().clone()), Arc::new(BooleanArray::new(BooleanBuffer::new_set(rows), None)))
        }
        Name::Drop => {
            let mut bytes = Vec::with_capacity(block.all_labels().value_data().len());
            let mut offsets = Vec::with_capacity(rows + 1);
            offsets.push(0);
            for row in 0..rows {
                labels::drop_name(block.labels(row), &mut bytes);
                offsets.push(bytes.len() as i32);
            }
            let offsets = OffsetBuffer::new(ScalarBuffer::from(offsets));
            let labels = BinaryArray::try_new(offsets, Buffer::from_vec(bytes), None)?;
            (Arc::new(labels), Arc::new(BooleanArray::new(BooleanBuffer::new_unset(rows), None)))
        }
    };
    let values = Arc::new(Float64Array::new(ScalarBuffer::from(values), nulls));
    let steps = block.steps() as i32;
    let list = FixedSizeListArray::try_new_with_length(item(), steps, values, None, rows)?;
    Ok(RecordBatch::try_new(schema.clone(), vec![labels, Arc::new(list), drop_name, no_histograms(rows)?])?)
}

/// A row of a block.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    /// Canonical tag set.
    pub labels: &'a [u8],
    /// The metric's name goes from the final result.
    pub drop_name: bool,
    /// A value per step; meaningless where not valid.
    pub values: &'a [f64],
    /// Validity; `None` when all are valid.
    nulls: Option<(&'a NullBuffer, usize)>,
    /// Where its histograms are; `None` without any.
    histograms: Option<(&'a Block, usize)>,
}

impl<'a> Row<'a> {
    /// A row of a block.
    pub fn of(block: &'a Block, row: usize) -> Self {
        let nulls = block.nulls().map(|n| (n, row * block.steps()));
        let histograms = block.has_histograms(row).then_some((block, row));
        let (labels, values) = (block.labels(row), block.values(row));
        Self { labels, drop_name: block.drop_name(row), values, nulls, histograms }
    }

    /// All rows of blocks.
    pub fn all(blocks: &'a [Block]) -> impl Iterator<Item = Row<'a>> {
        blocks.iter().flat_map(|b| (0..b.len()).map(move |row| Row::of(b, row)))
    }

    /// Whether any of its samples is a histogram.
    #[inline]
    pub fn has_histograms(&self) -> bool {
        self.histograms.is_some()
    }

    /// The histogram at a step in its encoded form.
    #[inline]
    pub fn encoded(&self, step: usize) -> Option<&'a [u8]> {
        let (block, row) = self.histograms?;
        block.encoded_histogram(row, step)
    }

    /// The histogram at a step.
    pub fn histogram(&self, step: usize) -> Option<FloatHistogram> {
        // What is there was written by a builder.
        self.encoded(step).and_then(histogram::decode)
    }

    /// Calls `f(step, encoded histogram)` for each histogram.
    pub fn for_each_encoded(&self, mut f: impl FnMut(usize, &'a [u8])) {
        if self.has_histograms() {
            for step in 0..self.values.len() {
                if let Some(bytes) = self.encoded(step) {
                    f(step, bytes);
                }
            }
        }
    }

    /// Calls `f(step, histogram)` for each histogram.
    pub fn for_each_histogram(&self, mut f: impl FnMut(usize, FloatHistogram)) {
        self.for_each_encoded(|step, bytes| {
            if let Some(h) = histogram::decode(bytes) {
                f(step, h);
            }
        });
    }

    /// Whether there is a sample at a step, float or histogram.
    #[inline]
    pub fn has_sample(&self, step: usize) -> bool {
        self.is_valid(step) || self.encoded(step).is_some()
    }

    /// Calls `f(step)` for each step with a sample, float or histogram.
    #[inline]
    pub fn for_each_sample(&self, mut f: impl FnMut(usize)) {
        self.for_each(|step, _| f(step));
        self.for_each_encoded(|step, _| f(step));
    }

    /// Whether there is a float at a step.
    #[inline]
    pub fn is_valid(&self, step: usize) -> bool {
        self.nulls.is_none_or(|(n, at)| n.is_valid(at + step))
    }

    /// The float at a step.
    #[inline]
    pub fn get(&self, step: usize) -> Option<f64> {
        self.is_valid(step).then(|| self.values[step])
    }

    /// True when every step has a float, as far as that is known at no cost.
    pub fn is_dense(&self) -> bool {
        self.nulls.is_none()
    }

    /// Writes validity of floats as one bool per step.
    pub fn validity(&self, out: &mut [bool]) {
        match self.nulls {
            None => out.fill(true),
            Some((nulls, at)) => {
                for (i, v) in out.iter_mut().enumerate() {
                    *v = nulls.is_valid(at + i);
                }
            }
        }
    }

    /// Calls `f(step, value)` for each float.
    #[inline]
    pub fn for_each(&self, mut f: impl FnMut(usize, f64)) {
        match self.nulls {
            None => self.values.iter().enumerate().for_each(|(i, v)| f(i, *v)),
            Some((nulls, at)) => {
                for i in nulls.inner().slice(at, self.values.len()).set_indices() {
                    f(i, self.values[i]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_travel_beside_floats() {
        let histogram = |count: f64| FloatHistogram { count, ..FloatHistogram::default() };
        let mut builder = BlockBuilder::new(schema(3));
        let (values, valid) = builder.push(|_| false);
        (values[0], valid[0]) = (1.5, true);
        builder.push(|_| false);
        builder.put_histogram(1, 0, &histogram(1.0));
        builder.put_histogram(1, 2, &histogram(2.0));
        assert!(builder.has_sample(1, 2) && !builder.has_sample(1, 1) && builder.has_sample(0, 0));
        builder.pop_if_empty();
        builder.push(|_| false);
        builder.pop_if_empty();
        builder.push(|_| false);
        builder.put_histogram(2, 1, &histogram(3.0));
        builder.pop();
        assert_eq!(builder.len(), 2);
        let batch = builder.finish().expect("a batch");
        let check = |batch: &RecordBatch, row: usize, expected: [Option<f64>; 3]| {
            let block = Block::try_new(batch).expect("a block");
            let row = Row::of(&block, row);
            let counts = [0, 1, 2].map(|step| row.histogram(step).map(|h| h.count));
            assert_eq!(counts, expected);
            assert_eq!(row.has_histograms(), expected != [None; 3]);
        };
        check(&batch, 0, [None; 3]);
        check(&batch, 1, [Some(1.0), None, Some(2.0)]);
        check(&batch.slice(1, 1), 0, [Some(1.0), None, Some(2.0)]);
        // The builder begins anew, and a copy is what was copied.
        let block = Block::try_new(&batch).expect("a block");
        builder.copy(&Row::of(&block, 1), |_| false);
        let copy = builder.finish().expect("a batch");
        check(&copy, 0, [Some(1.0), None, Some(2.0)]);
        assert!(!Block::try_new(&batch.slice(0, 1)).expect("a block").has_histograms(0));
    }
}
