//! Merging memtables and files into one stream: sorted by (series, ts), each key once, the newest row wins.
//!
//! Work is done by slices, not rows: where sources don't overlap in time, which is the rule, a slice is copied whole, and
//! where only one source has rows its batches pass through untouched.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, RecordBatch};
use arrow::compute::concat_batches;
use arrow::datatypes::{SchemaRef, TimestampMillisecondType, UInt32Type};
use catalog::{Error, Ordinal, Result};
use futures::{StreamExt, TryStreamExt, stream};

use super::gather::gather;
use crate::cut::Cuts;
use crate::memtable::Memtable;
use crate::segment;

/// Rows that a memtable is asked for at a time, about.
const MEMORY_ROWS: usize = 16 << 10;

/// Sources that are asked for their first rows at a time.
const PULLS: usize = 16;

/// Where rows come from.
pub(crate) enum Source {
    Memory(Box<MemoryCursor>),
    File(Box<segment::Cursor>),
    #[cfg(test)]
    Batches(VecDeque<RecordBatch>),
}

/// Reads a memtable some series at a time.
pub(crate) struct MemoryCursor {
    memtable: Arc<Memtable>,
    wanted: Vec<(u32, Ordinal)>,
    at: usize,
    /// Series to ask for next.
    chunk: usize,
    start_ms: i64,
    end_ms: i64,
    columns: Vec<usize>,
    /// With the position of the time column.
    cuts: Option<(Cuts, usize)>,
}

impl MemoryCursor {
    /// Reads the wanted (series number, ordinal), in ascending order of numbers, between two times, inclusive.
    pub fn new(
        memtable: Arc<Memtable>,
        wanted: Vec<(u32, Ordinal)>,
        (start_ms, end_ms): (i64, i64),
        columns: Vec<usize>,
    ) -> Self {
        Self { memtable, wanted, at: 0, chunk: 64, start_ms, end_ms, columns, cuts: None }
    }

    /// The same, with what is left out of the series; the time is in column `ts` of the rows.
    #[must_use]
    pub fn cut(self, cuts: Option<Cuts>, ts: usize) -> Self {
        Self { cuts: cuts.map(|cuts| (cuts, ts)), ..self }
    }

    /// The next rows; `None` at the end.
    pub fn next(&mut self) -> Result<Option<RecordBatch>> {
        while self.at < self.wanted.len() {
            let end = (self.at + self.chunk).min(self.wanted.len());
            let mut batch =
                self.memtable.read(&self.wanted[self.at..end], self.start_ms, self.end_ms, &self.columns)?;
            // Series of one table differ little in length, so the last answer tells how many to ask for.
            let asked = end - self.at;
            self.chunk = (MEMORY_ROWS * asked / batch.num_rows().max(1)).clamp(1, asked * 8);
            self.at = end;
            if let Some((cuts, ts)) = &self.cuts {
                batch = cuts.apply(batch, *ts)?;
            }
            if batch.num_rows() > 0 {
                return Ok(Some(batch));
            }
        }
        Ok(None)
    }
}

impl Source {
    async fn next(&mut self) -> Result<Option<RecordBatch>> {
        match self {
            Self::Memory(cursor) => cursor.next(),
            Self::File(cursor) => cursor.next().await,
            #[cfg(test)]
            Self::Batches(batches) => Ok(batches.pop_front()),
        }
    }
}

struct Input {
    source: Source,
    queue: VecDeque<RecordBatch>,
    done: bool,
}

impl Input {
    async fn pull(&mut self) -> Result<()> {
        match self.source.next().await? {
            Some(batch) => self.queue.push_back(batch),
            None => self.done = true,
        }
        Ok(())
    }

    /// Series below this are complete in the queue.
    fn complete_below(&self) -> u64 {
        match self.queue.back() {
            _ if self.done => u64::MAX,
            Some(last) => u64::from(series(last).last().copied().unwrap_or(0)),
            None => 0,
        }
    }

    /// Takes the queued rows of series below `limit`.
    fn take_below(&mut self, limit: u64, schema: &SchemaRef) -> Result<Option<RecordBatch>> {
        let mut parts = Vec::new();
        while let Some(batch) = self.queue.pop_front() {
            let n = series(&batch).partition_point(|s| u64::from(*s) < limit);
            if n < batch.num_rows() {
                self.queue.push_front(batch.slice(n, batch.num_rows() - n));
                if n > 0 {
                    parts.push(batch.slice(0, n));
                }
                break;
            }
            parts.push(batch);
        }
        Ok(match parts.len() {
            0 => None,
            1 => parts.pop(),
            _ => Some(concat_batches(schema, &parts)?),
        })
    }
}

/// Merges sources. Their rows are `series` (`UInt32`), then any columns; each source is sorted by (series, ts) with
/// unique keys.
pub(crate) struct Merge {
    /// Oldest first.
    inputs: Vec<Input>,
    schema: SchemaRef,
    /// Position of the time column in batches.
    ts: usize,
    started: bool,
}

impl Merge {
    /// A merge of sources given oldest first; of equal keys the row of the later source wins.
    pub fn new(sources: Vec<Source>, schema: SchemaRef, ts: usize) -> Self {
        let input = |source| Input { source, queue: VecDeque::new(), done: false };
        Self { inputs: sources.into_iter().map(input).collect(), schema, ts, started: false }
    }

    /// The next rows; `None` at the end. A series may go on in the next batch.
    pub async fn next(&mut self) -> Result<Option<RecordBatch>> {
        if !self.started && self.inputs.len() > 1 {
            // First batches wait for the store; later ones mostly for the CPU. What it takes to find them is large.
            self.started = true;
            let pulls: Vec<_> = self.inputs.iter_mut().map(Input::pull).collect();
            stream::iter(pulls).buffer_unordered(PULLS).try_collect::<()>().await?;
        }
        loop {
            self.inputs.retain(|i| !(i.done && i.queue.is_empty()));
            match &mut self.inputs[..] {
                [] => return Ok(None),
                [only] => {
                    if let Some(batch) = only.queue.pop_front() {
                        return Ok(Some(batch));
                    }
                    only.pull().await?;
                    continue;
                }
                _ => {}
            }
            let limit = self.inputs.iter().map(Input::complete_below).min().unwrap_or(u64::MAX);
            let mut parts = Vec::with_capacity(self.inputs.len());
            for input in &mut self.inputs {
                parts.extend(input.take_below(limit, &self.schema)?);
            }
            match parts.len() {
                0 => {
                    // Whoever holds the others back has to say more.
                    for input in self.inputs.iter_mut().filter(|i| i.complete_below() == limit && !i.done) {
                        input.pull().await?;
                    }
                }
                1 => return Ok(parts.pop()),
                _ => return self.merge(&parts).map(Some),
            }
        }
    }

    fn merge(&self, parts: &[RecordBatch]) -> Result<RecordBatch> {
        let bad = || Error::internal("rows of a scan are not in its form");
        let series: Vec<&[u32]> = parts.iter().map(series).collect();
        let mut ts: Vec<&[i64]> = Vec::with_capacity(parts.len());
        for part in parts {
            let column = part.columns().get(self.ts).ok_or_else(bad)?;
            ts.push(column.as_primitive_opt::<TimestampMillisecondType>().ok_or_else(bad)?.values());
        }
        let slices = slices(&series, &ts);
        let total = slices.iter().map(|(_, rows)| rows.len()).sum();
        let columns = (0..self.schema.fields().len()).map(|c| {
            let sources: Vec<&ArrayRef> = parts.iter().map(|p| p.column(c)).collect();
            gather(&sources, slices.iter().cloned(), total)
        });
        Ok(RecordBatch::try_new(self.schema.clone(), columns.collect::<Result<_>>()?)?)
    }
}

fn series(batch: &RecordBatch) -> &[u32] {
    batch.column(0).as_primitive::<UInt32Type>().values()
}

/// Which rows of which source make up the merged rows, in order.
fn slices(series: &[&[u32]], ts: &[&[i64]]) -> Vec<(usize, Range<usize>)> {
    let mut out: Vec<(usize, Range<usize>)> = Vec::new();
    let mut at = vec![0usize; series.len()];
    // (source, its rows of the current series), oldest source first.
    let mut heads: Vec<(usize, Range<usize>)> = Vec::with_capacity(series.len());
    while let Some(current) = (0..series.len()).filter_map(|s| series[s].get(at[s]).copied()).min() {
        heads.clear();
        for s in 0..series.len() {
            let from = at[s];
            let n = equal_prefix(&series[s][from..], current);
            if n > 0 {
                heads.push((s, from..from + n));
                at[s] = from + n;
            }
        }
        merge_series(&mut heads, ts, &mut out);
    }
    out
}

/// Rows at the start that equal `value`, in steps that double.
fn equal_prefix(series: &[u32], value: u32) -> usize {
    let mut step = 1;
    while step < series.len() && series[step] == value {
        step *= 2;
    }
    let end = (step + 1).min(series.len());
    (step / 2).min(end) + series[(step / 2).min(end)..end].partition_point(|s| *s == value)
}

fn merge_series(heads: &mut Vec<(usize, Range<usize>)>, ts: &[&[i64]], out: &mut Vec<(usize, Range<usize>)>) {
    let mut push = |source: usize, rows: Range<usize>| match out.last_mut() {
        Some((s, last)) if *s == source && last.end == rows.start => last.end = rows.end,
        _ => out.push((source, rows)),
    };
    while heads.len() > 1 {
        // The least time; of equal ones the newest source, and the others lose that row.
        let time = |(s, rows): &(usize, Range<usize>)| ts[*s][rows.start];
        let mut best = 0;
        for i in 1..heads.len() {
            if time(&heads[i]) <= time(&heads[best]) {
                best = i;
            }
        }
        let first = time(&heads[best]);
        let mut next = i64::MAX;
        for (i, head) in heads.iter_mut().enumerate() {
            if i == best {
                continue;
            }
            if ts[head.0][head.1.start] == first {
                head.1.start += 1;
            }
            if let Some(t) = ts[head.0][head.1.clone()].first() {
                next = next.min(*t);
            }
        }
        let (source, rows) = heads[best].clone();
        let rest = &ts[source][rows.clone()];
        let n = if rest.last().is_some_and(|l| *l < next) {
            rest.len()
        } else {
            rest.partition_point(|t| *t < next).max(1)
        };
        push(source, rows.start..rows.start + n);
        heads[best].1.start += n;
        heads.retain(|(_, rows)| !rows.is_empty());
    }
    if let Some((source, rows)) = heads.pop() {
        push(source, rows);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use arrow::array::{Float64Array, TimestampMillisecondArray, UInt32Array};
    use catalog::tables::{SAMPLES, time_type};
    use proptest::prelude::*;

    use super::*;
    use crate::memtable::read_schema;

    type Row = (u32, i64, f64);

    fn batch(rows: &[Row]) -> RecordBatch {
        let ts = TimestampMillisecondArray::from(rows.iter().map(|r| r.1).collect::<Vec<_>>());
        let columns: Vec<ArrayRef> = vec![
            Arc::new(UInt32Array::from(rows.iter().map(|r| r.0).collect::<Vec<_>>())),
            Arc::new(ts.with_data_type(time_type())),
            Arc::new(Float64Array::from(rows.iter().map(|r| r.2).collect::<Vec<_>>())),
        ];
        RecordBatch::try_new(read_schema(&SAMPLES, &[1, 2]), columns).expect("columns match the schema")
    }

    fn merged(sources: &[Vec<Row>], cut: usize) -> Vec<Row> {
        let sources = sources.iter().map(|rows| Source::Batches(rows.chunks(cut).map(batch).collect())).collect();
        let mut merge = Merge::new(sources, read_schema(&SAMPLES, &[1, 2]), 1);
        let mut out = Vec::new();
        futures::executor::block_on(async {
            while let Some(b) = merge.next().await.expect("sources don't fail") {
                assert!(b.num_rows() > 0);
                let ts = b.column(1).as_primitive::<TimestampMillisecondType>().values().to_vec();
                let values = b.column(2).as_primitive::<arrow::datatypes::Float64Type>().values().to_vec();
                out.extend(series(&b).iter().zip(ts).zip(values).map(|((s, t), v)| (*s, t, v)));
            }
        });
        out
    }

    #[test]
    fn the_newest_row_wins() {
        let old = vec![(0, 1, 1.0), (0, 2, 1.0), (0, 5, 1.0), (2, 1, 1.0)];
        let new = vec![(0, 2, 2.0), (0, 3, 2.0), (1, 9, 2.0), (2, 1, 2.0)];
        let expected = vec![(0, 1, 1.0), (0, 2, 2.0), (0, 3, 2.0), (0, 5, 1.0), (1, 9, 2.0), (2, 1, 2.0)];
        for cut in 1..5 {
            assert_eq!(merged(&[old.clone(), new.clone()], cut), expected);
        }
    }

    #[test]
    fn counts_equal_prefixes() {
        for n in 0..40 {
            for more in 0..40 {
                let mut all = vec![7; n];
                all.resize(n + more, 8);
                assert_eq!(equal_prefix(&all, 7), n);
            }
        }
    }

    proptest! {
        #[test]
        fn as_a_map_would(
            sources in prop::collection::vec(prop::collection::btree_map((0u32..6, 0i64..30), any::<i32>(), 0..60), 0..6),
            cut in 1usize..20,
        ) {
            let mut expected = BTreeMap::new();
            for s in &sources {
                expected.extend(s.iter().map(|(k, v)| (*k, *v)));
            }
            let rows = |m: &BTreeMap<(u32, i64), i32>| m.iter().map(|((s, t), v)| (*s, *t, f64::from(*v))).collect::<Vec<_>>();
            let lists: Vec<Vec<Row>> = sources.iter().map(rows).collect();
            prop_assert_eq!(merged(&lists, cut), rows(&expected));
        }
    }
}
