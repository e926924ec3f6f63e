//! Raw points of series in the order of their labels: what remote read and federation answer with.
//!
//! That is not the order in which data lie, so series are read in groups, group sizes following what fits into a bounded
//! number of points. A group that turns out to be too large is read again as two, by series or, when it is one series, by
//! time.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, AsArray, ListArray, PrimitiveArray, RecordBatch};
use arrow::datatypes::{
    ArrowPrimitiveType, Float64Type, Int8Type, Int32Type, Int64Type, TimestampMillisecondType, UInt32Type,
};
use bytes::Bytes;
use catalog::tables::{HISTOGRAMS, SAMPLES};
use catalog::{Code, Matcher, Series, TableSchema};
use datafusion::physical_plan::execute_stream;
use engine::memory::Kind;
use engine::{Query, Reservation, Selection, SeriesScanExec, SeriesSet};
use futures::TryStreamExt;
use hashbrown::HashMap;
use tokio::sync::mpsc;
use tokio::time::timeout_at;

use super::Api;
use crate::chunk::{Counts, Histogram, Points, Span};
use crate::error::{QueryError, QueryErrorKind, Result};
use crate::exec::out_of_memory;
use crate::{exec, labels};

/// Most points that are held at a time, and the memory that they take while lists grow.
pub(super) const POINTS_MAX: usize = 512 << 10;
const POINTS_BYTES: usize = 32 * POINTS_MAX;
/// Series of the first group.
const GROUP_SERIES: usize = 256;

/// What is asked for.
#[derive(Debug)]
pub(super) struct Asked {
    /// A series is given once that any of these selects, each a list of matchers that must all hold.
    pub selectors: Vec<Vec<Matcher>>,
    /// First millisecond, inclusive.
    pub start_ms: i64,
    /// Last millisecond, inclusive.
    pub end_ms: i64,
    /// No points, and also series that may have none.
    pub labels_only: bool,
}

/// Takes the samples of one series after another.
pub(super) trait Sink: Send {
    /// The next query begins.
    fn query(&mut self, _number: usize) {}
    /// The next series begins.
    fn series(&mut self, labels: &[u8]);
    /// More of its points, later ones.
    fn points(&mut self, points: &Points) -> Result<()>;
    /// The series ends.
    fn end(&mut self) -> Result<()>;
    /// Bytes that can be sent already.
    fn ready(&mut self) -> Vec<Bytes> {
        Vec::new()
    }
}

/// Reads what is asked for, within the limits of one query.
pub(super) async fn read(
    (api, query): (&Api, &Query),
    asked: &[Asked],
    sink: &mut dyn Sink,
    to: Option<&mpsc::Sender<Result<Bytes>>>,
) -> Result<()> {
    let work = async {
        // Dropped with this future, it stops what still computes.
        let _guard = query.guard();
        let mut held = query.memory().reserve(Kind::Queries);
        held.grow(POINTS_BYTES).map_err(out_of_memory)?;
        for (number, asked) in asked.iter().enumerate() {
            sink.query(number);
            Reader::open(api, query, asked).await?.read(sink, to).await?;
        }
        Ok(())
    };
    timeout_at(query.stop().deadline(), work)
        .await
        .unwrap_or_else(|_| Err(QueryError::new(QueryErrorKind::Timeout, "query timed out while series were read")))
}

/// The columns that are read of float samples.
const FLOAT_COLUMNS: [&str; 2] = ["ts", "value"];

/// The series that are asked for, sorted by labels, against one version of the data of each set.
struct Reader<'a> {
    api: &'a Api,
    query: &'a Query,
    asked: &'a Asked,
    /// Of floats and of histograms for each selector.
    sets: Vec<[Arc<SeriesSet>; 2]>,
    series: Vec<Place>,
    /// What `series` takes.
    _held: Reservation,
}

/// Bytes that a place takes where it is looked up and in the list that is sorted.
const PLACE_BYTES: usize = 3 * size_of::<Place>();

/// A series, and for floats and for histograms the set that has it and where it is there.
struct Place {
    series: Arc<Series>,
    at: [Option<(usize, usize)>; 2],
}

impl<'a> Reader<'a> {
    async fn open(api: &'a Api, query: &'a Query, asked: &'a Asked) -> Result<Self> {
        let mut sets = Vec::with_capacity(asked.selectors.len());
        for matchers in &asked.selectors {
            let select = |table: &Arc<TableSchema>| {
                let Asked { start_ms, end_ms, .. } = *asked;
                let selection = Selection { table: Arc::clone(table), matchers: matchers.clone(), start_ms, end_ms };
                async move { api.engine.select(&selection, query.stop()).await }
            };
            sets.push([select(&SAMPLES).await?, select(&HISTOGRAMS).await?]);
        }
        let mut held = query.memory().reserve(Kind::Queries);
        let found: usize = sets.iter().flatten().map(|set| set.series.len()).sum();
        held.grow(found * PLACE_BYTES).map_err(out_of_memory)?;
        let mut places: HashMap<Code, Place> = HashMap::new();
        for (selector, tables) in sets.iter().enumerate() {
            for (table, set) in tables.iter().enumerate() {
                for (i, series) in set.series.iter().enumerate() {
                    let place = places
                        .entry(series.id.code)
                        .or_insert_with(|| Place { series: series.clone(), at: [None, None] });
                    place.at[table].get_or_insert((selector, i));
                }
            }
        }
        let mut series: Vec<Place> = places.into_values().collect();
        series.sort_unstable_by(|a, b| labels::compare(a.series.tags.as_bytes(), b.series.tags.as_bytes()));
        Ok(Self { api, query, asked, sets, series, _held: held })
    }

    async fn read(&self, sink: &mut dyn Sink, to: Option<&mpsc::Sender<Result<Bytes>>>) -> Result<()> {
        let (mut at, mut size) = (0, GROUP_SERIES);
        while at < self.series.len() {
            let group = at..self.series.len().min(at + size);
            if self.asked.labels_only {
                for place in &self.series[group.clone()] {
                    sink.series(place.series.tags.as_bytes());
                    sink.end()?;
                }
            } else {
                match self.points(group.clone(), (self.asked.start_ms, self.asked.end_ms)).await? {
                    Some(points) => {
                        for (place, points) in self.series[group.clone()].iter().zip(&points) {
                            if !points.is_empty() {
                                sink.series(place.series.tags.as_bytes());
                                sink.points(points)?;
                                sink.end()?;
                            }
                        }
                        if points.iter().map(Points::len).sum::<usize>() < POINTS_MAX / 4 {
                            size = group.len() * 2;
                        }
                    }
                    None if group.len() > 1 => {
                        size = group.len() / 2;
                        continue;
                    }
                    None => self.one_by_time(at, sink, to).await?,
                }
            }
            send(sink, to).await?;
            at = group.end;
        }
        Ok(())
    }

    /// One series with too many points for one group.
    async fn one_by_time(
        &self,
        at: usize,
        sink: &mut dyn Sink,
        to: Option<&mpsc::Sender<Result<Bytes>>>,
    ) -> Result<()> {
        sink.series(self.series[at].series.tags.as_bytes());
        // The earliest is the last.
        let mut ranges = vec![(self.asked.start_ms, self.asked.end_ms)];
        while let Some((start, end)) = ranges.pop() {
            match self.points(at..at + 1, (start, end)).await?.as_deref() {
                Some([points, ..]) => sink.points(points)?,
                Some([]) => {}
                None if start == end => return Err(QueryError::execution("one histogram is too large to be read")),
                None => {
                    let middle = (i128::from(start) + i128::from(end)).div_euclid(2) as i64;
                    ranges.extend([(middle + 1, end), (start, middle)]);
                }
            }
            send(sink, to).await?;
        }
        sink.end()
    }

    /// The points of a group within a time, or nothing when they are too many to be held.
    async fn points(&self, group: Range<usize>, (start_ms, end_ms): (i64, i64)) -> Result<Option<Vec<Points>>> {
        let mut all = vec![Points::default(); group.len()];
        let mut held = 0;
        for (selector, tables) in self.sets.iter().enumerate() {
            for (table, set) in tables.iter().enumerate() {
                let place = |(i, p): (usize, &Place)| p.at[table].filter(|at| at.0 == selector).map(|at| (at.1, i));
                let mut wanted: Vec<_> = self.series[group.clone()].iter().enumerate().filter_map(place).collect();
                if wanted.is_empty() {
                    continue;
                }
                wanted.sort_unstable();
                let mut picked = set.pick(&wanted.iter().map(|w| w.0).collect::<Vec<_>>());
                (picked.start_ms, picked.end_ms) = (picked.start_ms.max(start_ms), picked.end_ms.min(end_ms));
                let names: &[&str] = if table == 0 { &FLOAT_COLUMNS } else { &exec::HISTOGRAM_COLUMNS };
                let columns = names.iter().filter_map(|name| set.table.column(name).map(|(index, _)| index)).collect();
                let scan = Arc::new(SeriesScanExec::new(Arc::new(picked), columns));
                let mut batches = execute_stream(scan, self.api.engine.task_context(self.query))?;
                while let Some(batch) = batches.try_next().await? {
                    self.query.stop().check()?;
                    held += if table == 0 { batch.num_rows() } else { values(&batch) };
                    if held > POINTS_MAX {
                        return Ok(None);
                    }
                    let slot = |series: u32| wanted[series as usize].1;
                    if table == 0 { floats(&batch, &mut all, slot) } else { histograms(&batch, &mut all, slot) }
                        .ok_or_else(|| QueryError::internal("a scan of raw points has other columns"))?;
                }
            }
        }
        Ok(Some(all))
    }
}

async fn send(sink: &mut dyn Sink, to: Option<&mpsc::Sender<Result<Bytes>>>) -> Result<()> {
    for bytes in sink.ready() {
        if let Some(to) = to {
            to.send(Ok(bytes)).await.map_err(|_| QueryError::new(QueryErrorKind::Canceled, "the client went away"))?;
        }
    }
    Ok(())
}

/// Appends the rows of a batch of floats.
fn floats(batch: &RecordBatch, all: &mut [Points], slot: impl Fn(u32) -> usize) -> Option<()> {
    let columns = batch.columns();
    let series = columns.first()?.as_primitive_opt::<UInt32Type>()?.values();
    let ts = columns.get(1)?.as_primitive_opt::<TimestampMillisecondType>()?.values();
    let values = columns.get(2)?.as_primitive_opt::<Float64Type>()?.values();
    for ((series, ts), value) in series.iter().zip(ts).zip(values) {
        all[slot(*series)].floats.push((*ts, *value));
    }
    Some(())
}

/// Numbers in a batch of histograms.
fn values(batch: &RecordBatch) -> usize {
    let lists = batch.columns().iter().filter_map(|c| c.as_list_opt::<i32>());
    // A row by itself counts like a few numbers.
    8 * batch.num_rows()
        + lists.map(|l| l.value_offsets().last().map_or(0, |end| (end - l.value_offsets()[0]) as usize)).sum::<usize>()
}

/// Appends the rows of a batch of histograms.
fn histograms(batch: &RecordBatch, all: &mut [Points], slot: impl Fn(u32) -> usize) -> Option<()> {
    fn column<T: ArrowPrimitiveType>(batch: &RecordBatch, name: &str) -> Option<PrimitiveArray<T>> {
        batch.column_by_name(name)?.as_primitive_opt::<T>().cloned()
    }
    fn list<T: ArrowPrimitiveType>(batch: &RecordBatch, name: &str) -> Option<(ListArray, PrimitiveArray<T>)> {
        let list = batch.column_by_name(name)?.as_list_opt::<i32>()?;
        Some((list.clone(), list.values().as_primitive_opt::<T>()?.clone()))
    }
    fn at<T: ArrowPrimitiveType>((list, values): &(ListArray, PrimitiveArray<T>), row: usize) -> Vec<T::Native> {
        let offsets = list.value_offsets();
        values.values()[offsets[row] as usize..offsets[row + 1] as usize].to_vec()
    }
    let series = batch.columns().first()?.as_primitive_opt::<UInt32Type>()?.values();
    let ts = column::<TimestampMillisecondType>(batch, "ts")?;
    let schema = column::<Int32Type>(batch, "schema")?;
    let (zero_threshold, sum) = (column::<Float64Type>(batch, "zero_threshold")?, column::<Float64Type>(batch, "sum")?);
    let (count_int, zero_int) =
        (column::<Int64Type>(batch, "count_int")?, column::<Int64Type>(batch, "zero_count_int")?);
    let count_float = column::<Float64Type>(batch, "count_float")?;
    let zero_float = column::<Float64Type>(batch, "zero_count_float")?;
    let reset_hint = column::<Int8Type>(batch, "reset_hint")?;
    let custom_values = list::<Float64Type>(batch, "custom_values")?;
    let side = |name: &str| {
        let offsets = list::<Int32Type>(batch, &format!("{name}_offsets"))?;
        let lengths = list::<Int32Type>(batch, &format!("{name}_lengths"))?;
        let whole = list::<Int64Type>(batch, &format!("{name}_int"))?;
        let fractional = list::<Float64Type>(batch, &format!("{name}_float"))?;
        Some((offsets, lengths, whole, fractional))
    };
    let (positive, negative) = (side("positive")?, side("negative")?);
    for (row, series) in series.iter().enumerate() {
        let spans = |(offsets, lengths, ..): &(_, _, _, _)| {
            let lengths = at::<Int32Type>(lengths, row).into_iter().map(|l| l as u32);
            at::<Int32Type>(offsets, row)
                .into_iter()
                .zip(lengths)
                .map(|(offset, length)| Span { offset, length })
                .collect()
        };
        let counts = if count_int.is_valid(row) {
            Counts::Whole {
                count: count_int.value(row) as u64,
                zero: zero_int.value(row) as u64,
                positive: differences(at(&positive.2, row)),
                negative: differences(at(&negative.2, row)),
            }
        } else {
            Counts::Fractional {
                count: count_float.value(row),
                zero: zero_float.value(row),
                positive: at(&positive.3, row),
                negative: at(&negative.3, row),
            }
        };
        all[slot(*series)].histograms.push(Histogram {
            ts: ts.value(row),
            schema: schema.value(row),
            zero_threshold: zero_threshold.value(row),
            sum: sum.value(row),
            counts,
            positive: spans(&positive),
            negative: spans(&negative),
            custom_values: at(&custom_values, row),
            reset_hint: reset_hint.value(row) as u8,
        });
    }
    Some(())
}

/// Counts as differences to the one before.
fn differences(mut counts: Vec<i64>) -> Vec<i64> {
    let mut before = 0;
    for count in &mut counts {
        let difference = count.wrapping_sub(before);
        before = std::mem::replace(count, difference);
    }
    counts
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use engine::QueryLimits;

    use super::*;
    use crate::api::Metrics;
    use crate::api::tests::{NOW, serve};

    #[tokio::test]
    async fn a_query_that_is_stopped_reads_nothing_more() {
        let server = serve().await;
        let engine = server.engine.clone();
        let metrics = Metrics::new(engine.telemetry());
        let api = Api { engine, settings: crate::Settings::default(), metrics, started_ms: NOW };
        let query = api.engine.begin(QueryLimits { timeout: Duration::from_secs(60) }).await.expect("a turn");
        let selectors = vec![vec![Matcher::equal("__name__", "up")]];
        let asked = Asked { selectors, start_ms: 0, end_ms: NOW, labels_only: false };
        for flushed in [false, true] {
            if flushed {
                server.engine.flush().await.expect("flushed");
            }
            let reader = Reader::open(&api, &query, &asked).await.expect("two series");
            assert!(reader.points(0..2, (0, NOW)).await.is_ok());
        }
        let reader = Reader::open(&api, &query, &asked).await.expect("two series");
        drop(query.guard());
        let stopped = reader.points(0..2, (0, NOW)).await.expect_err("the query was stopped");
        assert_eq!(stopped.kind, QueryErrorKind::Canceled);
    }
}
