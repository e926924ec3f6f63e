//! The form in which values travel between plan nodes: one row per series.
//!
//! A batch has the columns `labels` (`Binary`, canonical tag set), `values` (`FixedSizeList<Float64>` of one element
//! per step of the evaluation grid, null where the series has no sample) and `drop_name` (`Boolean`: the metric's name
//! goes from the result, but has not gone yet; only with delayed name removal). A scalar is one row without labels.

use std::sync::Arc;

use arrow::array::{ArrayRef, BinaryArray, BooleanArray, FixedSizeListArray, Float64Array, RecordBatch};
use arrow::buffer::{BooleanBuffer, Buffer, NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef};
use datafusion::error::Result as DfResult;

use crate::labels;
use crate::result::Block;

/// Schema of batches with `steps` values per series.
pub fn schema(steps: usize) -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("labels", DataType::Binary, false),
        Field::new("values", DataType::FixedSizeList(item(), steps as i32), false),
        Field::new("drop_name", DataType::Boolean, false),
    ]))
}

fn item() -> FieldRef {
    Arc::new(Field::new("item", DataType::Float64, true))
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
        self.values.resize(at + self.steps, 0.0);
        self.valid.resize(at + self.steps, false);
        (&mut self.values[at..], &mut self.valid[at..])
    }

    /// Takes the last row back when it has no value at all.
    pub fn pop_if_empty(&mut self) {
        let at = self.valid.len() - self.steps;
        if !self.valid[at..].contains(&true) {
            self.pop();
        }
    }

    /// Takes the last row back.
    pub fn pop(&mut self) {
        let at = self.valid.len() - self.steps;
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
        let rows = self.len();
        let capacity = self.values.len();
        let values = std::mem::replace(&mut self.values, Vec::with_capacity(capacity));
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
        let columns: Vec<ArrayRef> = vec![Arc::new(labels), Arc::new(list), Arc::new(drop_name)];
        Ok(RecordBatch::try_new(self.schema.clone(), columns)?)
    }
}

/// A batch with the series of a block and other values and validity.
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
    Ok(RecordBatch::try_new(schema.clone(), vec![labels, Arc::new(list), drop_name])?)
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
}

impl<'a> Row<'a> {
    /// A row of a block.
    pub fn of(block: &'a Block, row: usize) -> Self {
        let nulls = block.nulls().map(|n| (n, row * block.steps()));
        Self { labels: block.labels(row), drop_name: block.drop_name(row), values: block.values(row), nulls }
    }

    /// All rows of blocks.
    pub fn all(blocks: &'a [Block]) -> impl Iterator<Item = Row<'a>> {
        blocks.iter().flat_map(|b| (0..b.len()).map(move |row| Row::of(b, row)))
    }

    /// Whether there is a value at a step.
    #[inline]
    pub fn is_valid(&self, step: usize) -> bool {
        self.nulls.is_none_or(|(n, at)| n.is_valid(at + step))
    }

    /// The value at a step.
    #[inline]
    pub fn get(&self, step: usize) -> Option<f64> {
        self.is_valid(step).then(|| self.values[step])
    }

    /// True when every step has a value, as far as that is known at no cost.
    pub fn is_dense(&self) -> bool {
        self.nulls.is_none()
    }

    /// Writes validity as one bool per step.
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

    /// Calls `f(step, value)` for each value.
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
