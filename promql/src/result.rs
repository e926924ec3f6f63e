//! What a query answers: series on a time grid, kept as the arrays that the plan produced.

use std::sync::Arc;

use arrow::array::AsArray;
use arrow::array::{Array, BinaryArray, BooleanArray, FixedSizeListArray, Float64Array, RecordBatch};
use arrow::buffer::NullBuffer;
use arrow::datatypes::Float64Type;
use engine::Reservation;

use crate::error::{QueryError, Result};
use crate::options::Grid;

/// Types of PromQL values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueType {
    /// A number per step.
    Scalar,
    /// A text.
    String,
    /// Series with a sample each.
    Vector,
    /// Series with samples.
    Matrix,
}

/// Series on a common grid: row i has the tag set `labels[i]` and the `steps` values from `i * steps` on.
#[derive(Debug, Clone)]
pub struct Block {
    labels: BinaryArray,
    values: Float64Array,
    drop_name: BooleanArray,
    steps: usize,
}

impl Block {
    /// Takes a batch of the block schema.
    ///
    /// # Errors
    /// `Internal` when it has another schema.
    pub fn try_new(batch: &RecordBatch) -> Result<Self> {
        let wrong = || QueryError::internal("batch is not a block of series");
        let labels = batch.columns().first().and_then(|c| c.as_binary_opt::<i32>()).ok_or_else(wrong)?;
        let list: &FixedSizeListArray =
            batch.columns().get(1).and_then(|c| c.as_fixed_size_list_opt()).ok_or_else(wrong)?;
        let steps = list.value_length() as usize;
        // A list array that was sliced keeps the whole child.
        let values = list.values().slice(list.offset() * steps, list.len() * steps);
        let values = values.as_primitive_opt::<Float64Type>().ok_or_else(wrong)?.clone();
        let drop_name = batch.columns().get(2).and_then(|c| c.as_boolean_opt()).ok_or_else(wrong)?;
        Ok(Self { labels: labels.clone(), values, drop_name: drop_name.clone(), steps })
    }

    /// Bytes of memory that it takes, about.
    pub fn bytes(&self) -> usize {
        let offsets = self.labels.value_offsets();
        let labels = offsets.last().zip(offsets.first()).map_or(0, |(last, first)| (last - first) as usize);
        let nulls = self.values.nulls().map_or(0, |_| self.values.len() / 8);
        labels + size_of_val(offsets) + self.values.len() * size_of::<f64>() + nulls
    }

    /// How many series.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// True without any series.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Values per series.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Canonical tag set of a series.
    pub fn labels(&self, row: usize) -> &[u8] {
        self.labels.value(row)
    }

    /// Whether the metric's name of a series is still to be removed.
    pub fn drop_name(&self, row: usize) -> bool {
        self.drop_name.value(row)
    }

    /// The values of a series; those that [`Block::is_valid`] denies are meaningless.
    pub fn values(&self, row: usize) -> &[f64] {
        &self.values.values()[row * self.steps..(row + 1) * self.steps]
    }

    /// The values of all series, one after another.
    pub fn all_values(&self) -> &[f64] {
        self.values.values()
    }

    /// Canonical tag sets of all series.
    pub fn all_labels(&self) -> &BinaryArray {
        &self.labels
    }

    /// For all series, whether the metric's name is still to be removed.
    pub fn all_drop_name(&self) -> &BooleanArray {
        &self.drop_name
    }

    /// Validity of the values of all series, one after another; `None` when all are valid.
    pub fn nulls(&self) -> Option<&NullBuffer> {
        self.values.nulls()
    }

    /// Whether a series has a value at a step.
    pub fn is_valid(&self, row: usize, step: usize) -> bool {
        self.values.nulls().is_none_or(|n| n.is_valid(row * self.steps + step))
    }

    /// Whether a series has any value.
    pub fn any_valid(&self, row: usize) -> bool {
        self.steps > 0
            && self.values.nulls().is_none_or(|n| n.slice(row * self.steps, self.steps).null_count() < self.steps)
    }
}

/// The samples of one series, at their own times.
#[derive(Debug, Clone)]
pub struct Run {
    /// Canonical tag set.
    pub labels: Vec<u8>,
    /// Times, milliseconds since the epoch.
    pub times: Vec<i64>,
    /// As many values.
    pub values: Vec<f64>,
}

/// Where the values of a result are.
#[derive(Debug, Clone)]
pub enum Data {
    /// Series on the grid, and the order in which to answer them as (block, row).
    Blocks {
        /// The series.
        blocks: Vec<Block>,
        /// The order; series without any value are left out.
        order: Vec<(u32, u32)>,
    },
    /// A range vector: series with samples at their own times.
    Runs(Vec<Run>),
    /// A text.
    Text(String),
}

/// How much work a query was.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Samples that were read.
    pub samples_scanned: u64,
    /// Series that were selected.
    pub series_selected: u64,
}

/// What a query answers.
#[derive(Debug, Clone)]
pub struct QueryResult {
    /// The type of the value: for an instant query the expression's type, for a range query always a matrix.
    pub value_type: ValueType,
    /// The evaluation times.
    pub grid: Grid,
    /// The value.
    pub data: Data,
    /// Warnings, in Prometheus's words.
    pub warnings: Vec<String>,
    /// Infos, in Prometheus's words.
    pub infos: Vec<String>,
    /// How much work it was.
    pub stats: Stats,
    /// The memory of `data`.
    pub memory: Option<Arc<Reservation>>,
}

/// One series of a result.
#[derive(Debug, Clone, Copy)]
pub struct SeriesView<'a> {
    /// Canonical tag set; see [`catalog::tag::TagIter`].
    pub labels: &'a [u8],
    values: &'a [f64],
    times: Times<'a>,
    nulls: Option<(&'a NullBuffer, usize)>,
}

#[derive(Debug, Clone, Copy)]
enum Times<'a> {
    Grid(Grid),
    Own(&'a [i64]),
}

impl<'a> SeriesView<'a> {
    /// The samples, times ascending: (milliseconds since the epoch, value).
    pub fn points(self) -> impl Iterator<Item = (i64, f64)> + 'a {
        let Self { values, times, nulls, .. } = self;
        values.iter().enumerate().filter(move |(i, _)| nulls.is_none_or(|(n, at)| n.is_valid(at + i))).map(
            move |(i, v)| {
                let t = match times {
                    Times::Grid(grid) => grid.time(i),
                    Times::Own(times) => times[i],
                };
                (t, *v)
            },
        )
    }
}

impl QueryResult {
    /// How many series the answer has.
    pub fn len(&self) -> usize {
        match &self.data {
            Data::Blocks { order, .. } => order.len(),
            Data::Runs(runs) => runs.len(),
            Data::Text(_) => 0,
        }
    }

    /// True without any series.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A series of the answer, in the order in which to answer them; `index` is below [`QueryResult::len`]. A scalar
    /// is one series without labels.
    pub fn series(&self, index: usize) -> SeriesView<'_> {
        match &self.data {
            Data::Blocks { blocks, order } => {
                let (block, row) = order[index];
                let (block, row) = (&blocks[block as usize], row as usize);
                SeriesView {
                    labels: block.labels(row),
                    values: block.values(row),
                    times: Times::Grid(self.grid),
                    nulls: block.nulls().map(|n| (n, row * block.steps())),
                }
            }
            Data::Runs(runs) => {
                let run = &runs[index];
                SeriesView { labels: &run.labels, values: &run.values, times: Times::Own(&run.times), nulls: None }
            }
            Data::Text(_) => SeriesView { labels: &[], values: &[], times: Times::Own(&[]), nulls: None },
        }
    }

    /// Keeps the first `limit` series; false when there were no more.
    pub fn truncate(&mut self, limit: usize) -> bool {
        let cut = self.len() > limit;
        match &mut self.data {
            Data::Blocks { order, .. } => order.truncate(limit),
            Data::Runs(runs) => runs.truncate(limit),
            Data::Text(_) => {}
        }
        cut
    }
}
