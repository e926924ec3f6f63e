//! Selectors and range functions: rows of a scan, or windows over an inner expression, to blocks.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use arrow::array::{Array, AsArray, BinaryBuilder, Float64Builder, Int64Builder, ListBuilder, RecordBatch};
use arrow::buffer::ScalarBuffer;
use arrow::datatypes::{DataType, Field, Float64Type, SchemaRef, TimestampMillisecondType, UInt32Type};
use datafusion::error::{DataFusionError, Result as DfResult};
use datafusion::execution::SendableRecordBatchStream;
use datafusion::physical_plan::EmptyRecordBatchStream;
use engine::kernels::{self, Arguments, Edges, RangeFunction, Reach, Scratch, Windows};
use futures::{StreamExt, TryStreamExt, stream};

use super::annotations::NotesAt;
use super::native::{self, Floats, Glimpse, Ranges, SeriesRuns};
use super::{Batches, Notes, Pace, SeriesLabels, Work, internal};
use crate::QueryError;
use crate::block::{BlockBuilder, Name, Row};
use crate::histogram::{FloatHistogram, Hint};
use crate::labels;
use crate::options::Grid;
use crate::parse::{Position, go};
use crate::plan::ops::{Counts, Op, Reading, Selector};

pub(super) fn execute(work: Work, partition: usize, labels: SeriesLabels) -> DfResult<Batches> {
    if work.scans() > 1 {
        return with_histograms(work, partition, labels);
    }
    let input = work.stream(0, partition)?;
    let batches = async move {
        let notes = work.notes.clone();
        let memory = work.memory.clone();
        let reader = Reader::new(&work, labels).await?;
        let output = stream::try_unfold((input, Some(reader)), move |(mut input, reader)| {
            let (notes, memory) = (notes.clone(), memory.clone());
            async move {
                let Some(mut reader) = reader else { return Ok::<_, DataFusionError>(None) };
                loop {
                    if let Some(ready) = reader.next()? {
                        return Ok(Some((vec![ready], (input, Some(reader)))));
                    }
                    match input.try_next().await? {
                        Some(batch) => {
                            if matches!(reader.sink, Sink::Runs(_)) {
                                // Times and values, kept to the end.
                                memory.try_grow(batch.num_rows() * 2 * size_of::<f64>())?;
                            }
                            notes.samples.fetch_add(batch.num_rows() as u64, Ordering::Relaxed);
                            reader.rows = Some(Rows::try_new(&batch)?);
                        }
                        None => return Ok(Some((reader.finish()?, (input, None)))),
                    }
                }
            }
        });
        let batches = output.map_ok(|ready| stream::iter(ready.into_iter().map(Ok))).try_flatten();
        Ok::<_, DataFusionError>(batches)
    };
    Ok(stream::once(batches).try_flatten().boxed())
}

/// Reads series from all their tables, one after another.
fn with_histograms(work: Work, partition: usize, labels: SeriesLabels) -> DfResult<Batches> {
    let floats = SeriesRuns::new(work.stream(0, partition)?, native::floats);
    let histograms = SeriesRuns::new(work.stream(1, partition)?, native::histograms);
    let starts: SendableRecordBatchStream = match work.scans() {
        2 => Box::pin(EmptyRecordBatchStream::new(work.schema.clone())),
        _ => work.stream(2, partition)?,
    };
    let starts = SeriesRuns::new(starts, native::start_times);
    let batches = async move {
        let (notes, memory) = (work.notes.clone(), work.memory.clone());
        let reader = Reader::new(&work, labels).await?;
        let tables = (floats, histograms, starts);
        let output =
            stream::try_unfold((tables, Some(reader)), move |((mut floats, mut histograms, mut starts), reader)| {
                let (notes, memory) = (notes.clone(), memory.clone());
                async move {
                    let Some(mut reader) = reader else { return Ok::<_, DataFusionError>(None) };
                    loop {
                        let next = [floats.peek().await?, histograms.peek().await?, starts.peek().await?];
                        let Some(index) = next.into_iter().flatten().min() else {
                            return Ok(Some((reader.finish()?, ((floats, histograms, starts), None))));
                        };
                        let ((ts, values), (histogram_ts, mut all)) = (floats.take(index), histograms.take(index));
                        if let Some(glimpse) = &reader.without_buckets {
                            reader.pace.walk(native::BUCKETS * all.len())?;
                            glimpse.strip(&ts, &histogram_ts, &mut all);
                        }
                        if matches!(reader.sink, Sink::Runs(_)) {
                            // Times and values, kept to the end.
                            let weight = all.iter().map(FloatHistogram::weight).sum::<usize>();
                            memory.try_grow((ts.len() + weight) * 2 * size_of::<f64>())?;
                        }
                        notes.samples.fetch_add((ts.len() + histogram_ts.len()) as u64, Ordering::Relaxed);
                        let began = native::starts_of(&ts, starts.take(index));
                        let of_floats = Floats { ts: &ts, values: &values, starts: &began };
                        if let Some(ready) = reader.series_of_all(index, of_floats, (&histogram_ts, &all))? {
                            return Ok(Some((vec![ready], ((floats, histograms, starts), Some(reader)))));
                        }
                    }
                }
            });
        let batches = output.map_ok(|ready| stream::iter(ready.into_iter().map(Ok))).try_flatten();
        Ok::<_, DataFusionError>(batches)
    };
    Ok(stream::once(batches).try_flatten().boxed())
}

pub(super) fn subquery(work: Work, partition: usize) -> DfResult<Batches> {
    let Op::Subquery { subquery, name } = &work.op else { return Err(internal("not a subquery")) };
    let (subquery, name) = (subquery.clone(), *name);
    let mut kernel = None;
    let (mut ts, mut values) = (Vec::new(), Vec::new());
    work.map_blocks(partition, move |work, arguments, block, pace| {
        if kernel.is_none() {
            let windows = subquery.windows(&work.grid);
            kernel = Some(Kernel::new(work, windows, arguments.to_vec(), Reading::Range(subquery.function))?);
        }
        let kernel = kernel.as_mut().ok_or_else(|| internal("no kernel"))?;
        let mut builder = BlockBuilder::new(work.schema.clone());
        for row in 0..block.len() {
            let row = Row::of(&block, row);
            ts.clear();
            values.clear();
            row.for_each(|step, v| {
                ts.push(subquery.inner.time(step));
                values.push(v);
            });
            let (mut histogram_ts, mut histograms) = (Vec::new(), Vec::new());
            row.for_each_histogram(|step, mut h| {
                // Samples between the steps, which may have begun again too, are not seen; and one sample may be seen twice.
                if h.hint != Hint::Gauge {
                    h.hint = Hint::Unknown;
                }
                histogram_ts.push(subquery.inner.time(step));
                histograms.push(h);
            });
            let (out, valid) = builder.push(|out| name.apply(row.labels, row.drop_name, out));
            let floats = Floats { ts: &ts, values: &values, starts: &[] };
            let native = kernel.run_all(row.labels, floats, (&histogram_ts, &histograms), (out, &mut *valid), pace)?;
            kernel.count((&ts, &values), (&histogram_ts, &histograms), valid, &native);
            put_all(&mut builder, native);
            builder.pop_if_empty();
        }
        builder.finish()
    })
}

/// Samples that kernels look at before the query's stop is looked at: those that slide over a series begin each time anew,
/// those that look at every sample of every window take longer for each.
const LOOKS_AT_A_TIME: usize = 64 << 20;
const LOOKS_AT_WHOLE_WINDOWS: usize = 4 << 20;

fn looks_at_a_time(function: RangeFunction) -> usize {
    use RangeFunction as F;
    match function {
        F::Stddev
        | F::Stdvar
        | F::Deriv
        | F::PredictLinear
        | F::Mad
        | F::DoubleExponential
        | F::TsOfMin
        | F::TsOfMax => LOOKS_AT_WHOLE_WINDOWS,
        _ => LOOKS_AT_A_TIME,
    }
}

/// Puts histograms into the row that was pushed last.
fn put_all(builder: &mut BlockBuilder, native: Vec<(usize, FloatHistogram)>) {
    let row = builder.len() - 1;
    for (step, h) in native {
        builder.put_histogram(row, step, &h);
    }
}

/// A reading with all that it needs, applied to one series after another.
struct Kernel {
    windows: Windows,
    grid: Grid,
    arguments: Vec<Vec<f64>>,
    reading: Reading,
    /// Values at the edges of windows take part.
    reach: Option<Reach>,
    notes: Arc<Notes>,
    /// Where what is read stands in the text.
    at: Position,
    /// What its samples count as.
    counts: Counts,
    scratch: Scratch,
    ts: Vec<i64>,
    values: Vec<f64>,
}

impl Kernel {
    fn new(work: &Work, windows: Windows, arguments: Vec<Vec<f64>>, reading: Reading) -> Result<Self, QueryError> {
        if reading == Reading::Range(RangeFunction::Quantile)
            && let Some(q) = arguments.first()
        {
            work.notes.check_quantile(work.place.param, q);
        }
        if reading == Reading::Range(RangeFunction::DoubleExponential) {
            for (what, values) in
                ["smoothing factor. Expected: 0 < sf", "trend factor. Expected: 0 < tf"].iter().zip(&arguments)
            {
                if let Some(bad) = values.iter().find(|v| **v <= 0.0 || **v >= 1.0) {
                    return Err(QueryError::execution(format!("invalid {what} < 1, got: {bad:.6}")));
                }
            }
        }
        Ok(Self {
            windows,
            grid: work.grid,
            arguments,
            reading,
            reach: None,
            notes: work.notes.clone(),
            // As in Prometheus, the notes of this one are about its first argument, the quantile.
            at: if reading == Reading::Range(RangeFunction::Quantile) { work.place.param } else { work.place.input },
            counts: work.place.counts,
            scratch: Scratch::default(),
            ts: Vec::new(),
            values: Vec::new(),
        })
    }

    /// Counts the samples of a series that each window looks at.
    fn count(
        &self,
        (ts, values): (&[i64], &[f64]),
        (histogram_ts, histograms): (&[i64], &[FloatHistogram]),
        valid: &[bool],
        native: &[(usize, FloatHistogram)],
    ) {
        if !self.notes.counts() {
            return;
        }
        let mut of_steps = vec![0; valid.len()];
        if let Reading::Range(_) = self.reading {
            let floats = ts.iter().zip(values).filter(|(_, v)| !kernels::is_stale(**v)).map(|(t, _)| (*t, 1));
            let live = histogram_ts.iter().zip(histograms).filter(|(_, h)| !kernels::is_stale(h.sum));
            let mut weights: Vec<(i64, u64)> = floats.chain(live.map(|(t, h)| (*t, h.weight() as u64))).collect();
            weights.sort_unstable();
            let mut sum = 0;
            let sums: Vec<u64> = std::iter::once(0).chain(weights.iter().map(|(_, n)| (sum += n, sum).1)).collect();
            let up_to = |end: i64| sums[weights.partition_point(|(t, _)| *t <= end)];
            for (step, n) in of_steps.iter_mut().enumerate() {
                let end = self.windows.end(step);
                *n = up_to(end) - up_to(end.saturating_sub(self.windows.length));
            }
        } else {
            of_steps.iter_mut().zip(valid).for_each(|(n, valid)| *n = u64::from(*valid));
            native.iter().for_each(|(step, h)| of_steps[*step] += h.weight() as u64);
        }
        self.notes.count(self.counts, &of_steps);
    }

    /// As [`Kernel::run`] for a series that may have histograms and start times; histograms of the result are returned.
    fn run_all(
        &mut self,
        labels: &[u8],
        floats: Floats<'_>,
        (histogram_ts, histograms): (&[i64], &[FloatHistogram]),
        (out, valid): (&mut [f64], &mut [bool]),
        pace: &mut Pace,
    ) -> DfResult<Vec<(usize, FloatHistogram)>> {
        if self.reading == Reading::StartTimestamp {
            native::newest_start(&self.windows, floats, (histogram_ts, histograms), (out, valid));
            return Ok(Vec::new());
        }
        let Floats { ts, starts, .. } = floats;
        if histograms.is_empty() && starts.is_empty() {
            self.run(floats, out, valid, pace)?;
            return Ok(Vec::new());
        }
        let metric = labels::get(labels, "__name__");
        let Reading::Range(function) = self.reading else {
            self.run(floats, out, valid, pace)?;
            if let Reading::Smoothed(reach) = self.reading {
                let notes = NotesAt { notes: &self.notes, at: self.at };
                let windows = (&self.windows, reach);
                return Ok(native::smoothed(windows, ts, (histogram_ts, histograms), (notes, metric), valid));
            }
            let timestamp = self.reading == Reading::Timestamp;
            return Ok(native::instant(&self.windows, ts, (histogram_ts, histograms), timestamp, out, valid));
        };
        let live = histogram_ts.iter().zip(histograms).filter(|(_, h)| !kernels::is_stale(h.sum));
        let histograms: (Vec<i64>, Vec<&FloatHistogram>) = live.unzip();
        let (ts, values, starts) = floats.live();
        let floats = Floats { ts: &ts, values: &values, starts: &starts };
        self.run(floats, out, valid, pace)?;
        if matches!(function, RangeFunction::Rate | RangeFunction::Increase) {
            let times = kernels::count_overlapping(&ts, &starts, &self.windows);
            self.notes.overlapping(self.at, metric, times);
        }
        let notes = NotesAt { notes: &self.notes, at: self.at };
        let ranges = Ranges { function, windows: self.windows, metric, notes };
        if let Some(reach) = self.reach {
            let histograms = (&histograms.0[..], &histograms.1[..]);
            return ranges.run_with_edges(reach, (&ts, &values), histograms, (out, valid), pace);
        }
        ranges.run(floats, (&histograms.0, &histograms.1), (out, valid), pace)
    }

    #[inline]
    fn run(
        &mut self,
        Floats { ts, values, starts }: Floats<'_>,
        out: &mut [f64],
        valid: &mut [bool],
        pace: &mut Pace,
    ) -> DfResult<()> {
        pace.walk(ts.len() + out.len())?;
        match self.reading {
            Reading::Instant => kernels::instant(ts, values, &self.windows, out, valid),
            Reading::Timestamp | Reading::FloatTimestamp => {
                kernels::instant_timestamp(ts, values, &self.windows, out, valid);
            }
            Reading::StartTimestamp => {
                kernels::instant_timestamp(ts, values, &self.windows, out, valid);
                out.fill(0.0);
            }
            Reading::Smoothed(reach) => {
                let (ts, values) = kernels::without_stale(ts, values, &mut self.ts, &mut self.values);
                kernels::smoothed(ts, values, &self.windows, reach, out, valid);
            }
            Reading::Range(function) => {
                let (ts, values) = kernels::without_stale(ts, values, &mut self.ts, &mut self.values);
                if let Some(reach) = self.reach {
                    kernels::range_with_edges(function, ts, values, &self.windows, reach, out, valid);
                    return Ok(());
                }
                // At worst each window looks at all samples; so many windows at a time that it ends soon.
                let looks = looks_at_a_time(function);
                let at_a_time = (looks / ts.len().max(1)).max(1);
                for first in (0..self.windows.count).step_by(at_a_time) {
                    if first > 0 {
                        pace.walk(looks)?;
                    }
                    let range = first..self.windows.count.min(first + at_a_time);
                    let argument = |i: usize| match self.arguments.get(i).map_or(&[][..], Vec::as_slice) {
                        many if many.len() > 1 => &many[range.clone()],
                        few => few,
                    };
                    let arguments = Arguments {
                        args: [argument(0), argument(1)],
                        first_time: self.grid.start_ms + first as i64 * self.grid.step_ms,
                        time_step: self.grid.step_ms,
                        starts,
                    };
                    let windows = Windows { first_end: self.windows.end(first), count: range.len(), ..self.windows };
                    let (out, valid) = (&mut out[range.clone()], &mut valid[range]);
                    kernels::range(function, ts, values, &windows, &arguments, &mut self.scratch, out, valid);
                }
            }
        }
        Ok(())
    }
}

/// Rows of a scan.
struct Rows {
    series: ScalarBuffer<u32>,
    ts: ScalarBuffer<i64>,
    values: ScalarBuffer<f64>,
    /// The first that was not read.
    at: usize,
}

impl Rows {
    fn try_new(batch: &RecordBatch) -> DfResult<Self> {
        let wrong = || internal("a scan's batch is not (series, ts, value)");
        let column = |i: usize| batch.columns().get(i).ok_or_else(wrong);
        Ok(Self {
            series: column(0)?.as_primitive_opt::<UInt32Type>().ok_or_else(wrong)?.values().clone(),
            ts: column(1)?.as_primitive_opt::<TimestampMillisecondType>().ok_or_else(wrong)?.values().clone(),
            values: column(2)?.as_primitive_opt::<Float64Type>().ok_or_else(wrong)?.values().clone(),
            at: 0,
        })
    }
}

/// Cuts the rows of a scan into series. A series may go on in the next batch; only such are copied.
struct Reader {
    labels: SeriesLabels,
    sink: Sink,
    /// What of the last batch was not read: as many series as rows, whose values at all steps would be large.
    rows: Option<Rows>,
    /// Histograms go without buckets.
    without_buckets: Option<Glimpse>,
    /// The series whose samples wait in `ts` and `values`.
    pending: Option<u32>,
    ts: Vec<i64>,
    values: Vec<f64>,
    pace: Pace,
}

#[expect(clippy::large_enum_variant, reason = "there is one for each partition of a selector")]
enum Sink {
    Blocks { kernel: Box<Kernel>, builder: BlockBuilder, name: Name, counters: Option<Counters> },
    Runs(Box<Runs>),
}

/// Looks for metrics that are used as counters and are not named so.
struct Counters {
    notes: Arc<Notes>,
    /// Where the range vector stands.
    at: Position,
    /// The label `__type__` says what is a counter.
    by_type: bool,
    last: Vec<u8>,
}

impl Counters {
    fn check(&mut self, labels: &[u8]) {
        let name = labels::get(labels, "__name__");
        if self.by_type {
            let kind = labels::get(labels, "__type__");
            if !name.is_empty() && !["counter", "histogram"].contains(&kind) {
                self.notes.info(
                    self.at,
                    format!(
                        "metric might not be a counter, __type__ label is not set to \"counter\" or \"histogram\", got {}: {}",
                        go::quote(kind),
                        go::quote(name)
                    ),
                );
            }
            return;
        }
        if name.as_bytes() == self.last {
            return;
        }
        self.last.clear();
        self.last.extend_from_slice(name.as_bytes());
        if !name.is_empty() && !["_total", "_sum", "_count", "_bucket"].iter().any(|suffix| name.ends_with(suffix)) {
            let name = go::quote(name);
            self.notes.info(
                self.at,
                format!("metric might not be a counter, name does not end in _total/_sum/_count/_bucket: {name}"),
            );
        }
    }
}

impl Reader {
    async fn new(work: &Work, labels: SeriesLabels) -> DfResult<Self> {
        let arguments = work.scalar_inputs(work.scans()).await?;
        let sink = match &work.op {
            Op::Select { selector, reading, name } => {
                let mut kernel = Kernel::new(work, selector.windows(&work.grid), arguments, *reading)?;
                kernel.reach = selector.edges.map(|(edges, reach)| Reach { edges, reach });
                let counters = match reading {
                    Reading::Range(RangeFunction::Rate | RangeFunction::Increase) => Some(Counters {
                        notes: work.notes.clone(),
                        at: work.place.input,
                        by_type: selector.by_type,
                        last: Vec::new(),
                    }),
                    _ => None,
                };
                Sink::Blocks {
                    kernel: Box::new(kernel),
                    builder: BlockBuilder::new(work.schema.clone()),
                    name: *name,
                    counters,
                }
            }
            Op::Samples(selector) => {
                Sink::Runs(Box::new(Runs::new(work.schema.clone(), selector, selector.windows(&work.grid))))
            }
            other => return Err(internal(&format!("{} does not read series", other.name()))),
        };
        let pace = work.stop.pace();
        let without_buckets = match &work.op {
            Op::Select { selector, reading, .. } if selector.without_buckets => {
                Some(Glimpse::of(selector, *reading, &work.grid))
            }
            _ => None,
        };
        let (ts, values) = (Vec::new(), Vec::new());
        Ok(Self { labels, sink, rows: None, without_buckets, pending: None, ts, values, pace })
    }

    /// Reads rows until a block of series is full; nothing when all rows are read.
    fn next(&mut self) -> DfResult<Option<RecordBatch>> {
        let Some(mut rows) = self.rows.take() else { return Ok(None) };
        while rows.at < rows.series.len() {
            let ready = self.next_series(&mut rows)?;
            if ready.is_some() {
                self.rows = Some(rows);
                return Ok(ready);
            }
        }
        Ok(None)
    }

    /// Reads the rows of one series, or finishes the one before it.
    fn next_series(&mut self, rows: &mut Rows) -> DfResult<Option<RecordBatch>> {
        let (at, index) = (rows.at, rows.series[rows.at]);
        if self.pending.is_some_and(|p| p != index) {
            return self.flush();
        }
        let end = at + run_length(&rows.series[at..], index);
        rows.at = end;
        let is_last = end == rows.series.len();
        let (ts, values) = (&rows.ts[at..end], &rows.values[at..end]);
        if self.pending.is_none() && !is_last {
            return self.series(index, ts, values);
        }
        self.pending = Some(index);
        self.ts.extend_from_slice(ts);
        self.values.extend_from_slice(values);
        if is_last { Ok(None) } else { self.flush() }
    }

    fn flush(&mut self) -> DfResult<Option<RecordBatch>> {
        let Some(index) = self.pending.take() else { return Ok(None) };
        let (ts, values) = (std::mem::take(&mut self.ts), std::mem::take(&mut self.values));
        let ready = self.series(index, &ts, &values)?;
        // Back for their capacity.
        (self.ts, self.values) = (ts, values);
        self.ts.clear();
        self.values.clear();
        Ok(ready)
    }

    /// Reads a series; a block when it is full with it.
    fn series(&mut self, index: u32, ts: &[i64], values: &[f64]) -> DfResult<Option<RecordBatch>> {
        let labels = self.labels.get(index).ok_or_else(|| internal("a scan's series is not in its set"))?;
        match &mut self.sink {
            Sink::Blocks { kernel, builder, name, counters } => {
                let rows = builder.len();
                let (out, valid) = builder.push(|out| name.apply(labels, false, out));
                kernel.run(Floats { ts, values, starts: &[] }, out, valid, &mut self.pace)?;
                kernel.count((ts, values), (&[], &[]), valid, &[]);
                builder.pop_if_empty();
                if let Some(counters) = counters
                    && builder.len() > rows
                {
                    counters.check(labels);
                }
                if builder.is_full() {
                    return builder.finish().map(Some);
                }
            }
            Sink::Runs(runs) => runs.add(labels, (ts, values), (&[], &[]))?,
        }
        Ok(None)
    }

    /// As [`Reader::series`] with samples of both kinds, and when its counter began.
    fn series_of_all(
        &mut self,
        index: u32,
        floats: Floats<'_>,
        histograms: (&[i64], &[FloatHistogram]),
    ) -> DfResult<Option<RecordBatch>> {
        let labels = self.labels.get(index).ok_or_else(|| internal("a scan's series is not in its set"))?;
        match &mut self.sink {
            Sink::Blocks { kernel, builder, name, counters } => {
                let (out, valid) = builder.push(|out| name.apply(labels, false, out));
                let native = kernel.run_all(labels, floats, histograms, (&mut *out, &mut *valid), &mut self.pace)?;
                kernel.count((floats.ts, floats.values), histograms, valid, &native);
                if let Some(counters) = counters
                    && valid.contains(&true)
                {
                    counters.check(labels);
                }
                put_all(builder, native);
                builder.pop_if_empty();
                if builder.is_full() {
                    return builder.finish().map(Some);
                }
            }
            Sink::Runs(runs) => runs.add(labels, (floats.ts, floats.values), histograms)?,
        }
        Ok(None)
    }

    fn finish(mut self) -> DfResult<Vec<RecordBatch>> {
        let mut ready: Vec<RecordBatch> = self.flush()?.into_iter().collect();
        match self.sink {
            Sink::Blocks { builder, .. } => {
                if !builder.is_empty() {
                    ready.push(builder.into_batch()?);
                }
            }
            Sink::Runs(runs) => ready.push(runs.finish()?),
        }
        Ok(ready)
    }
}

/// How many elements from the first on are `index`.
pub(super) fn run_length(series: &[u32], index: u32) -> usize {
    // Runs are of a few hundred rows: gallop, then search.
    let mut bound = 16;
    while bound < series.len() && series[bound] == index {
        bound *= 2;
    }
    let from = bound / 2;
    if series.len() <= from || series[from] != index {
        return series[..from.min(series.len())].partition_point(|s| *s == index);
    }
    from + series[from..bound.min(series.len())].partition_point(|s| *s == index)
}

/// Collects range vectors.
struct Runs {
    schema: SchemaRef,
    windows: Windows,
    reach: Option<Reach>,
    labels: BinaryBuilder,
    times: ListBuilder<Int64Builder>,
    values: ListBuilder<Float64Builder>,
    histogram_times: ListBuilder<Int64Builder>,
    histograms: ListBuilder<BinaryBuilder>,
}

impl Runs {
    fn new(schema: SchemaRef, selector: &Selector, windows: Windows) -> Self {
        let item = |t: DataType| Arc::new(Field::new("item", t, false));
        Self {
            schema,
            windows,
            reach: selector.edges.map(|(edges, reach)| Reach { edges, reach }),
            labels: BinaryBuilder::new(),
            times: ListBuilder::new(Int64Builder::new()).with_field(item(DataType::Int64)),
            values: ListBuilder::new(Float64Builder::new()).with_field(item(DataType::Float64)),
            histogram_times: ListBuilder::new(Int64Builder::new()).with_field(item(DataType::Int64)),
            histograms: ListBuilder::new(BinaryBuilder::new()).with_field(item(DataType::Binary)),
        }
    }

    fn add(
        &mut self,
        labels: &[u8],
        (ts, values): (&[i64], &[f64]),
        (histogram_ts, histograms): (&[i64], &[FloatHistogram]),
    ) -> Result<(), QueryError> {
        if let Some(reach) = self.reach
            && !histograms.is_empty()
        {
            let edges = if reach.edges == Edges::Smoothed { "smoothed" } else { "anchored" };
            return Err(QueryError::execution(format!("{edges} modifier is not supported with histograms")));
        }
        let (start, end) = (self.windows.first_end.saturating_sub(self.windows.length), self.windows.first_end);
        let (mut wider_ts, mut wider) = (Vec::new(), Vec::new());
        let (mut start, mut ts, mut values) = (start, ts, values);
        if let Some(reach) = self.reach {
            let (mut ts_buffer, mut value_buffer) = (Vec::new(), Vec::new());
            let (kept_ts, kept) = kernels::without_stale(ts, values, &mut ts_buffer, &mut value_buffer);
            kernels::samples_with_edges(kept_ts, kept, (start, end), reach, (&mut wider_ts, &mut wider));
            // The one at the start is one of them.
            (start, ts, values) = (start - 1, wider_ts.as_slice(), wider.as_slice());
        }
        let inside = |t: i64| t > start && t <= end;
        let mut any = false;
        let mut bytes = Vec::new();
        for (t, h) in histogram_ts.iter().zip(histograms) {
            if inside(*t) && !kernels::is_stale(h.sum) {
                bytes.clear();
                h.encode(&mut bytes);
                self.histogram_times.values().append_value(*t);
                self.histograms.values().append_value(&bytes);
                any = true;
            }
        }
        for (t, v) in ts.iter().zip(values) {
            if inside(*t) && !kernels::is_stale(*v) {
                self.times.values().append_value(*t);
                self.values.values().append_value(*v);
                any = true;
            }
        }
        if any {
            self.times.append(true);
            self.values.append(true);
            self.histogram_times.append(true);
            self.histograms.append(true);
            self.labels.append_value(labels);
        }
        Ok(())
    }

    fn finish(mut self) -> DfResult<RecordBatch> {
        let columns: Vec<Arc<dyn Array>> = vec![
            Arc::new(self.labels.finish()),
            Arc::new(self.times.finish()),
            Arc::new(self.values.finish()),
            Arc::new(self.histogram_times.finish()),
            Arc::new(self.histograms.finish()),
        ];
        Ok(RecordBatch::try_new(self.schema, columns)?)
    }
}

#[cfg(test)]
mod tests {
    use super::run_length;

    #[test]
    fn runs_are_measured() {
        for n in 0..200usize {
            for more in 0..40usize {
                let mut series = vec![7; n + 1];
                series.extend(std::iter::repeat_n(8, more));
                assert_eq!(run_length(&series, 7), n + 1);
            }
        }
    }
}
