//! What a query answers: series on a time grid, kept as the arrays that the plan produced.

use std::sync::Arc;

use arrow::array::AsArray;
use arrow::array::{Array, BinaryArray, BooleanArray, FixedSizeListArray, Float64Array, RecordBatch};
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::datatypes::Float64Type;
use engine::Reservation;

use crate::error::{QueryError, Result};
use crate::histogram::{self, FloatHistogram};
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
    /// The lists of encoded histograms; `None` when no series has any.
    histograms: Option<(OffsetBuffer<i32>, BinaryArray)>,
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
        let lists = batch.columns().get(3).and_then(|c| c.as_list_opt::<i32>()).ok_or_else(wrong)?;
        let histograms = if lists.values().is_empty() {
            None
        } else {
            Some((lists.offsets().clone(), lists.values().as_binary_opt::<i32>().ok_or_else(wrong)?.clone()))
        };
        Ok(Self { labels: labels.clone(), values, drop_name: drop_name.clone(), histograms, steps })
    }

    /// Bytes of memory that it takes, about.
    pub fn bytes(&self) -> usize {
        let offsets = self.labels.value_offsets();
        let labels = offsets.last().zip(offsets.first()).map_or(0, |(last, first)| (last - first) as usize);
        let nulls = self.values.nulls().map_or(0, |_| self.values.len() / 8);
        labels + size_of_val(offsets) + self.values.len() * size_of::<f64>() + nulls + self.histogram_bytes()
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

    /// Whether a series has any histogram.
    #[inline]
    pub fn has_histograms(&self, row: usize) -> bool {
        self.histograms.as_ref().is_some_and(|(offsets, _)| offsets[row] < offsets[row + 1])
    }

    /// Whether any series has a histogram.
    pub fn any_histograms(&self) -> bool {
        self.histograms.is_some()
    }

    /// Bytes of the encoded histograms.
    pub fn histogram_bytes(&self) -> usize {
        self.histograms.as_ref().map_or(0, |(_, all)| all.value_data().len())
    }

    /// The histogram of a series at a step in its encoded form.
    #[inline]
    pub fn encoded_histogram(&self, row: usize, step: usize) -> Option<&[u8]> {
        let (offsets, all) = self.histograms.as_ref()?;
        let (start, end) = (offsets[row] as usize, offsets[row + 1] as usize);
        (start + step < end && all.is_valid(start + step)).then(|| all.value(start + step))
    }

    /// Whether a series has a float at a step.
    pub fn is_valid(&self, row: usize, step: usize) -> bool {
        self.values.nulls().is_none_or(|n| n.is_valid(row * self.steps + step))
    }

    /// Whether a series has any sample.
    pub fn any_sample(&self, row: usize) -> bool {
        self.has_histograms(row) || self.any_float(row)
    }

    fn any_float(&self, row: usize) -> bool {
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
    /// The histograms with their times.
    pub histograms: Vec<(i64, FloatHistogram)>,
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
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// Samples that were read.
    pub samples_scanned: u64,
    /// Series that were selected.
    pub series_selected: u64,
    /// Samples that selectors looked at in each step, those of a window in all steps whose window they are in; empty
    /// unless [`crate::EvalOptions::counts`] is set.
    pub samples_looked_at: Vec<u64>,
    /// Most samples that were held at a time, by inner expressions or by the answer.
    pub samples_held: u64,
}

/// What a query answers.
#[derive(Debug, Clone)]
pub struct QueryResult {
    /// The type of the value: for an instant query the expression's type, for a range query always a matrix.
    pub value_type: ValueType,
    /// The evaluation times.
    pub grid: Grid,
    /// The times that were asked for, which differ for a subquery as the result.
    pub asked: Grid,
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
    histograms: Histograms<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Histograms<'a> {
    Encoded(&'a Block, usize),
    Own(&'a [(i64, FloatHistogram)]),
}

#[derive(Debug, Clone, Copy)]
enum Times<'a> {
    Grid(Grid),
    Own(&'a [i64]),
}

impl<'a> SeriesView<'a> {
    /// The histograms, times ascending: (milliseconds since the epoch, histogram).
    pub fn histograms(self) -> impl Iterator<Item = (i64, FloatHistogram)> + 'a {
        let (encoded, own) = match self.histograms {
            Histograms::Encoded(block, row) => (block.has_histograms(row).then_some((block, row)), &[][..]),
            Histograms::Own(own) => (None, own),
        };
        let encoded = encoded.into_iter().flat_map(move |(block, row)| {
            (0..block.steps()).filter_map(move |step| {
                let h = histogram::decode(block.encoded_histogram(row, step)?)?;
                Some((self.time(step), h))
            })
        });
        encoded.chain(own.iter().cloned())
    }

    fn time(&self, i: usize) -> i64 {
        match self.times {
            Times::Grid(grid) => grid.time(i),
            Times::Own(times) => times[i],
        }
    }

    /// The float samples, times ascending: (milliseconds since the epoch, value).
    pub fn points(self) -> impl Iterator<Item = (i64, f64)> + 'a {
        let Self { values, nulls, .. } = self;
        let valid = move |(i, _): &(usize, &f64)| nulls.is_none_or(|(n, at)| n.is_valid(at + i));
        values.iter().enumerate().filter(valid).map(move |(i, v)| (self.time(i), *v))
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
                    histograms: Histograms::Encoded(block, row),
                }
            }
            Data::Runs(runs) => {
                let run = &runs[index];
                SeriesView {
                    labels: &run.labels,
                    values: &run.values,
                    times: Times::Own(&run.times),
                    nulls: None,
                    histograms: Histograms::Own(&run.histograms),
                }
            }
            Data::Text(_) => SeriesView {
                labels: &[],
                values: &[],
                times: Times::Own(&[]),
                nulls: None,
                histograms: Histograms::Own(&[]),
            },
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
