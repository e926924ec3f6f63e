//! The rows of one request in columns, filled while the decoder walks and handed to Arrow without a copy.
//!
//! Rows of a series are appended before it is known whether the series is acceptable: [`Rows::begin`] marks where they
//! start, then [`Rows::commit`] gives them their reference or [`Rows::abort`] takes them back.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, ArrowPrimitiveType, Float64Array, Int8Array, Int32Array, Int64Array, ListArray, PrimitiveArray,
    StringArray, TimestampMillisecondArray, UInt32Array,
};
use arrow::buffer::{NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow::datatypes::{DataType, Float64Type, Int32Type, Int64Type};
use arrow::record_batch::RecordBatch;
use catalog::tables::{EXEMPLARS, HISTOGRAMS, SAMPLES, START_TIMESTAMPS};
use catalog::{Error, Result, TableSchema, TagRef};
use engine::Batch;

use super::histogram::{Buckets, Histogram};

/// Most float samples of a request. A sample can take two bytes of a body and takes twenty here.
pub const SAMPLES_MAX: usize = 2_000_000;
/// Most histograms of a request.
pub const HISTOGRAMS_MAX: usize = 100_000;
/// Most spans, buckets and custom bounds over all histograms of a request.
pub const BUCKETS_MAX: usize = 4_000_000;
/// Most exemplars of a request.
pub const EXEMPLARS_MAX: usize = 100_000;

/// The columns of a request.
#[derive(Debug, Default)]
pub struct Rows {
    samples: Samples,
    histograms: Histograms,
    exemplars: Exemplars,
    /// When the counters of some samples began: the sample's place among all, milliseconds since the epoch.
    starts: Vec<(usize, i64)>,
    mark: Mark,
    /// How many of `starts` there were when the series was begun.
    starts_mark: usize,
}

/// Numbers of rows by table.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// Float samples.
    pub samples: usize,
    /// Native histograms.
    pub histograms: usize,
    /// Exemplars.
    pub exemplars: usize,
}

impl Mark {
    /// True without any row.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl std::ops::AddAssign for Mark {
    fn add_assign(&mut self, other: Self) {
        self.samples += other.samples;
        self.histograms += other.histograms;
        self.exemplars += other.exemplars;
    }
}

#[derive(Debug, Default)]
struct Samples {
    series: Vec<TagRef>,
    ts: Vec<i64>,
    value: Vec<f64>,
}

#[derive(Debug, Default)]
struct Exemplars {
    series: Vec<TagRef>,
    ts: Vec<i64>,
    value: Vec<f64>,
    /// JSON texts, one after another.
    labels: String,
    /// Where each ends.
    ends: Vec<i32>,
}

impl Rows {
    /// Makes room for a request with about this many series, of one sample each.
    pub fn with_capacity(series: usize) -> Self {
        let n = series.min(SAMPLES_MAX);
        let samples =
            Samples { series: Vec::with_capacity(n), ts: Vec::with_capacity(n), value: Vec::with_capacity(n) };
        Self { samples, ..Self::default() }
    }

    /// Begins a series.
    pub fn begin(&mut self) {
        self.mark = self.len();
        self.starts_mark = self.starts.len();
    }

    /// Rows so far.
    pub fn len(&self) -> Mark {
        Mark {
            samples: self.samples.ts.len(),
            histograms: self.histograms.ts.len(),
            exemplars: self.exemplars.ts.len(),
        }
    }

    /// Rows of the series begun last.
    pub fn pending(&self) -> Mark {
        let (now, mark) = (self.len(), self.mark);
        Mark {
            samples: now.samples - mark.samples,
            histograms: now.histograms - mark.histograms,
            exemplars: now.exemplars - mark.exemplars,
        }
    }

    /// Accepts the rows of the series begun last.
    #[inline]
    pub fn commit(&mut self, series: TagRef) {
        self.samples.series.resize(self.samples.ts.len(), series);
        if self.histograms.series.len() != self.histograms.ts.len() {
            self.histograms.series.resize(self.histograms.ts.len(), series);
        }
        if self.exemplars.series.len() != self.exemplars.ts.len() {
            self.exemplars.series.resize(self.exemplars.ts.len(), series);
        }
    }

    /// Takes back the rows of the series begun last.
    pub fn abort(&mut self) {
        self.samples.ts.truncate(self.mark.samples);
        self.samples.value.truncate(self.mark.samples);
        self.histograms.truncate(self.mark.histograms);
        self.exemplars.truncate(self.mark.exemplars);
        self.starts.truncate(self.starts_mark);
    }

    /// Appends a float sample.
    ///
    /// # Errors
    /// `LimitExceeded` beyond [`SAMPLES_MAX`].
    #[inline]
    pub fn sample(&mut self, ts: i64, value: f64) -> Result<()> {
        if self.samples.ts.len() >= SAMPLES_MAX {
            return Err(too_many("samples", SAMPLES_MAX));
        }
        self.samples.ts.push(ts);
        self.samples.value.push(value);
        Ok(())
    }

    /// Says when the counter of the sample that was appended last began.
    pub fn start(&mut self, start_ts: i64) {
        self.starts.push((self.samples.ts.len() - 1, start_ts));
    }

    /// Appends an exemplar; `labels` is the JSON text.
    ///
    /// # Errors
    /// `LimitExceeded` beyond [`EXEMPLARS_MAX`].
    pub fn exemplar(&mut self, ts: i64, value: f64, labels: &str) -> Result<()> {
        if self.exemplars.ts.len() >= EXEMPLARS_MAX {
            return Err(too_many("exemplars", EXEMPLARS_MAX));
        }
        let e = &mut self.exemplars;
        e.labels.push_str(labels);
        let end = i32::try_from(e.labels.len()).map_err(|_| too_many("bytes of exemplar labels", i32::MAX as usize))?;
        e.ends.push(end);
        e.ts.push(ts);
        e.value.push(value);
        Ok(())
    }

    /// Appends a validated histogram.
    ///
    /// # Errors
    /// `LimitExceeded` beyond [`HISTOGRAMS_MAX`] or [`BUCKETS_MAX`].
    pub fn histogram(&mut self, h: &Histogram) -> Result<()> {
        if self.histograms.ts.len() >= HISTOGRAMS_MAX {
            return Err(too_many("histograms", HISTOGRAMS_MAX));
        }
        if self.histograms.values() + h.values() > BUCKETS_MAX {
            return Err(too_many("histogram buckets", BUCKETS_MAX));
        }
        self.histograms.push(h);
        Ok(())
    }

    /// Gives the series' samples and histograms that have none this start time, milliseconds since the epoch.
    pub fn default_start(&mut self, start_ts: i64) {
        let mut own = self.starts.split_off(self.starts_mark).into_iter().peekable();
        let pending = self.mark.samples..self.samples.ts.len();
        self.starts.extend(pending.map(|i| own.next_if(|own| own.0 == i).unwrap_or((i, start_ts))));
        for start in &mut self.histograms.start_ts[self.mark.histograms..] {
            start.get_or_insert(start_ts);
        }
    }

    /// Gives the series' exemplars that came without a time, which is zero, that of its latest sample or histogram, or
    /// `now_ms` when there is none.
    pub fn default_exemplar_time(&mut self, now_ms: i64) {
        let samples = &self.samples.ts[self.mark.samples..];
        let histograms = &self.histograms.ts[self.mark.histograms..];
        let latest = samples.iter().chain(histograms).max().copied().unwrap_or(now_ms);
        for ts in self.exemplars.ts[self.mark.exemplars..].iter_mut().filter(|ts| **ts == 0) {
            *ts = latest;
        }
    }

    /// The batches of all tables with rows.
    ///
    /// # Errors
    /// `Internal` when the columns don't fit the table's schema, which would be a bug.
    pub fn finish(self) -> Result<Vec<Batch>> {
        let mut batches = Vec::with_capacity(4);
        let starts = self.starts_of_samples();
        let Samples { series, ts, value } = self.samples;
        if !ts.is_empty() {
            let columns = vec![
                Arc::new(UInt32Array::from(series)) as ArrayRef,
                Arc::new(TimestampMillisecondArray::from(ts).with_timezone("UTC")),
                Arc::new(Float64Array::from(value)),
            ];
            batches.push(batch(&SAMPLES, columns)?);
        }
        if !self.histograms.ts.is_empty() {
            batches.push(batch(&HISTOGRAMS, self.histograms.finish()?)?);
        }
        if !self.exemplars.ts.is_empty() {
            let e = self.exemplars;
            let offsets: Vec<i32> = std::iter::once(0).chain(e.ends).collect();
            let labels = StringArray::try_new(OffsetBuffer::new(offsets.into()), e.labels.into_bytes().into(), None)?;
            let columns = vec![
                Arc::new(UInt32Array::from(e.series)) as ArrayRef,
                Arc::new(TimestampMillisecondArray::from(e.ts).with_timezone("UTC")),
                Arc::new(Float64Array::from(e.value)),
                Arc::new(labels),
            ];
            batches.push(batch(&EXEMPLARS, columns)?);
        }
        if !self.starts.is_empty() {
            batches.push(batch(&START_TIMESTAMPS, starts)?);
        }
        Ok(batches)
    }

    /// The columns of the start times.
    fn starts_of_samples(&self) -> Vec<ArrayRef> {
        let rows = || self.starts.iter();
        let series = UInt32Array::from_iter_values(rows().map(|(i, _)| self.samples.series[*i]));
        let ts = TimestampMillisecondArray::from_iter_values(rows().map(|(i, _)| self.samples.ts[*i]));
        let start_ts = Int64Array::from_iter_values(rows().map(|(_, start)| *start));
        vec![Arc::new(series), Arc::new(ts.with_timezone("UTC")), Arc::new(start_ts)]
    }
}

fn batch(table: &Arc<TableSchema>, columns: Vec<ArrayRef>) -> Result<Batch> {
    Ok(Batch { table: table.clone(), rows: RecordBatch::try_new(table.arrow().clone(), columns)? })
}

#[cold]
fn too_many(what: &str, max: usize) -> Error {
    Error::limit_exceeded(format!("request holds more than {max} {what}; send less at a time"))
}

impl Exemplars {
    fn truncate(&mut self, rows: usize) {
        self.ts.truncate(rows);
        self.value.truncate(rows);
        self.ends.truncate(rows);
        self.labels.truncate(self.ends.last().map_or(0, |e| *e as usize));
    }
}

/// A column of lists.
#[derive(Debug, Default)]
struct Lists<T> {
    ends: Vec<i32>,
    values: Vec<T>,
}

impl<T: Copy> Lists<T> {
    fn push(&mut self, values: impl IntoIterator<Item = T>) {
        self.values.extend(values);
        // BUCKETS_MAX keeps this far below the end of the type.
        self.ends.push(self.values.len() as i32);
    }

    fn truncate(&mut self, rows: usize) {
        self.ends.truncate(rows);
        self.values.truncate(self.ends.last().map_or(0, |e| *e as usize));
    }
}

impl<T: arrow::datatypes::ArrowNativeType> Lists<T> {
    fn finish<A: ArrowPrimitiveType<Native = T>>(self, column: &str) -> Result<ArrayRef> {
        let data_type = HISTOGRAMS.column(column).map(|(_, c)| &c.data_type);
        let Some(DataType::List(field)) = data_type else {
            return Err(Error::internal(format!("histograms have no list column {column:?}")));
        };
        let offsets: Vec<i32> = std::iter::once(0).chain(self.ends).collect();
        let values = PrimitiveArray::<A>::new(ScalarBuffer::from(self.values), None);
        let lists = ListArray::try_new(field.clone(), OffsetBuffer::new(offsets.into()), Arc::new(values), None)?;
        Ok(Arc::new(lists))
    }
}

#[derive(Debug, Default)]
struct Histograms {
    series: Vec<TagRef>,
    ts: Vec<i64>,
    schema: Vec<i32>,
    zero_threshold: Vec<f64>,
    sum: Vec<f64>,
    /// True for histograms with integer counts, whose `*_float` columns are null; the others' `*_int` columns are.
    int: Vec<bool>,
    count_int: Vec<i64>,
    count_float: Vec<f64>,
    zero_count_int: Vec<i64>,
    zero_count_float: Vec<f64>,
    positive: Side,
    negative: Side,
    custom_values: Lists<f64>,
    reset_hint: Vec<i8>,
    start_ts: Vec<Option<i64>>,
}

#[derive(Debug, Default)]
struct Side {
    offsets: Lists<i32>,
    lengths: Lists<i32>,
    int: Lists<i64>,
    float: Lists<f64>,
}

impl Side {
    fn push(&mut self, b: &Buckets) {
        self.offsets.push(b.spans.iter().map(|s| s.offset));
        // Lengths add up to the number of buckets, so none exceeds the type.
        self.lengths.push(b.spans.iter().map(|s| s.length as i32));
        self.int.push(b.int.iter().copied());
        self.float.push(b.float.iter().copied());
    }

    fn truncate(&mut self, rows: usize) {
        self.offsets.truncate(rows);
        self.lengths.truncate(rows);
        self.int.truncate(rows);
        self.float.truncate(rows);
    }

    fn values(&self) -> usize {
        2 * self.offsets.values.len() + self.int.values.len() + self.float.values.len()
    }
}

impl Histograms {
    fn values(&self) -> usize {
        self.positive.values() + self.negative.values() + self.custom_values.values.len()
    }

    fn push(&mut self, h: &Histogram) {
        self.ts.push(h.ts);
        self.schema.push(h.schema);
        self.zero_threshold.push(h.zero_threshold);
        self.sum.push(h.sum);
        self.int.push(!h.is_float);
        self.count_int.push(h.count_int as i64);
        self.count_float.push(h.count_float);
        self.zero_count_int.push(h.zero_count_int as i64);
        self.zero_count_float.push(h.zero_count_float);
        self.positive.push(&h.positive);
        self.negative.push(&h.negative);
        self.custom_values.push(h.custom_values.iter().copied());
        self.reset_hint.push(h.reset_hint);
        self.start_ts.push(h.start_ts);
    }

    fn truncate(&mut self, rows: usize) {
        self.ts.truncate(rows);
        self.schema.truncate(rows);
        self.zero_threshold.truncate(rows);
        self.sum.truncate(rows);
        self.int.truncate(rows);
        self.count_int.truncate(rows);
        self.count_float.truncate(rows);
        self.zero_count_int.truncate(rows);
        self.zero_count_float.truncate(rows);
        self.positive.truncate(rows);
        self.negative.truncate(rows);
        self.custom_values.truncate(rows);
        self.reset_hint.truncate(rows);
        self.start_ts.truncate(rows);
    }

    /// The columns in the table's order.
    fn finish(self) -> Result<Vec<ArrayRef>> {
        let int = Some(NullBuffer::from_iter(self.int.iter().copied()));
        let float = Some(NullBuffer::from_iter(self.int.iter().map(|int| !int)));
        Ok(vec![
            Arc::new(UInt32Array::from(self.series)),
            Arc::new(TimestampMillisecondArray::from(self.ts).with_timezone("UTC")),
            Arc::new(Int32Array::from(self.schema)),
            Arc::new(Float64Array::from(self.zero_threshold)),
            Arc::new(Float64Array::from(self.sum)),
            Arc::new(Int64Array::try_new(self.count_int.into(), int.clone())?),
            Arc::new(Float64Array::try_new(self.count_float.into(), float.clone())?),
            Arc::new(Int64Array::try_new(self.zero_count_int.into(), int)?),
            Arc::new(Float64Array::try_new(self.zero_count_float.into(), float)?),
            self.positive.offsets.finish::<Int32Type>("positive_offsets")?,
            self.positive.lengths.finish::<Int32Type>("positive_lengths")?,
            self.positive.int.finish::<Int64Type>("positive_int")?,
            self.positive.float.finish::<Float64Type>("positive_float")?,
            self.negative.offsets.finish::<Int32Type>("negative_offsets")?,
            self.negative.lengths.finish::<Int32Type>("negative_lengths")?,
            self.negative.int.finish::<Int64Type>("negative_int")?,
            self.negative.float.finish::<Float64Type>("negative_float")?,
            self.custom_values.finish::<Float64Type>("custom_values")?,
            Arc::new(Int8Array::from(self.reset_hint)),
            Arc::new(Int64Array::from(self.start_ts)),
        ])
    }
}
