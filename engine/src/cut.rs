//! What deletes and retention take out of the rows that a scan or a merge reads.
//!
//! Matchers are resolved once per scan or merge, to positions in its sorted keys; what comes out is a list of times for
//! each position, by which whole files, runs and ranges of rows are left out. No row is compared with a text, and
//! nothing here runs when there is no delete and nothing has expired.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::{TimestampMillisecondType, UInt32Type};
use catalog::files::DataFile;
use catalog::tag::{METRIC_NAME, tag_set};
use catalog::{Error, Matcher, Result, Series, TagHasher};

use crate::delete::Tombstone;
use crate::scan::gather::gather;
use crate::segment::Key;
use crate::select::{Filter, exact_name};
use crate::version::TableVersion;

/// Which series matchers mean.
#[derive(Debug)]
pub(crate) struct Predicate {
    matchers: Vec<Matcher>,
    /// The code of the metric, when a matcher names one.
    metric: Option<i64>,
}

impl Predicate {
    /// The series for which all matchers hold.
    pub fn new(matchers: Vec<Matcher>, hasher: &TagHasher) -> Self {
        let tags = exact_name(&matchers).and_then(|name| tag_set(&[(METRIC_NAME, name)]).ok());
        let metric = tags.map(|tags| Series::new(hasher, tags).metric.0);
        Self { matchers, metric }
    }

    /// Whether a series of this metric can match.
    pub fn may_name(&self, metric: &str) -> bool {
        self.matchers.iter().all(|m| m.name() != METRIC_NAME || m.matches(metric))
    }

    /// The positions of `keys`, ascending, whose series match; `series` gives the series of a position.
    fn pick<'a>(&self, keys: &[Key], series: &impl Fn(usize) -> Option<&'a Series>) -> Vec<u32> {
        let range = match self.metric {
            Some(metric) => keys.partition_point(|k| k.metric < metric)..keys.partition_point(|k| k.metric <= metric),
            None => 0..keys.len(),
        };
        let mut filter = Filter::new(self.matchers.iter());
        range.filter(|i| series(*i).is_some_and(|s| filter.matches(&s.tags))).map(|i| i as u32).collect()
    }
}

/// The first times that are kept of a table.
#[derive(Debug)]
pub(crate) struct Floors {
    /// Of series that no rule names; `i64::MIN` without a limit.
    pub default_ms: i64,
    /// A series follows the first rule that names it.
    pub rules: Vec<(Arc<Predicate>, i64)>,
}

impl Default for Floors {
    fn default() -> Self {
        Self { default_ms: i64::MIN, rules: vec![] }
    }
}

impl Floors {
    /// Whatever is older than this has expired.
    pub fn least(&self) -> i64 {
        self.all().min().unwrap_or(i64::MIN)
    }

    /// Nothing from here on has expired.
    pub fn greatest(&self) -> i64 {
        self.all().max().unwrap_or(i64::MIN)
    }

    fn all(&self) -> impl Iterator<Item = i64> {
        self.rules.iter().map(|r| r.1).chain([self.default_ms])
    }

    /// Which of the floors lie behind a time, as bits; those beyond the 63rd rule count as one.
    pub fn passed(&self, ts_ms: i64) -> u64 {
        self.all().enumerate().filter(|(_, floor)| *floor > ts_ms).fold(0, |bits, (i, _)| bits | 1 << i.min(63))
    }

    /// Positions of series whose floor is later than `start_ms`, with the floor.
    fn expired<'a>(
        &self,
        keys: &[Key],
        series: &impl Fn(usize) -> Option<&'a Series>,
        start_ms: i64,
    ) -> Vec<(Vec<u32>, i64)> {
        if self.greatest() <= start_ms {
            return vec![];
        }
        let mut free = vec![true; keys.len()];
        let mut out = Vec::new();
        for (rule, floor) in &self.rules {
            let mut picked = rule.pick(keys, series);
            picked.retain(|i| std::mem::take(&mut free[*i as usize]));
            out.push((picked, *floor));
        }
        out.push(((0..keys.len() as u32).filter(|i| free[*i as usize]).collect(), self.default_ms));
        out.retain(|(picked, floor)| *floor > start_ms && !picked.is_empty());
        out
    }
}

/// Closed ranges of time that are left out, for each series of a scan.
#[derive(Debug)]
pub(crate) struct Cuts {
    /// Where the ranges of each series begin; one more at the end.
    first: Vec<u32>,
    /// Of each series in order, apart from each other.
    ranges: Vec<(i64, i64)>,
}

impl Cuts {
    /// Cuts of `series` series: positions with the range, inclusive, that each of them loses. `None` when nothing is
    /// lost.
    fn new(series: usize, parts: &[(&[u32], i64, i64)]) -> Option<Self> {
        let mut all: Vec<(u32, i64, i64)> = Vec::new();
        for (picked, start, end) in parts.iter().filter(|p| p.1 <= p.2) {
            all.extend(picked.iter().map(|i| (*i, *start, *end)));
        }
        if all.is_empty() {
            return None;
        }
        all.sort_unstable();
        let mut out = Self { first: Vec::with_capacity(series + 1), ranges: Vec::with_capacity(all.len()) };
        let mut all = all.into_iter().peekable();
        for i in 0..series as u32 {
            out.first.push(out.ranges.len() as u32);
            let begun = out.ranges.len();
            while let Some((_, start, end)) = all.next_if(|(at, ..)| *at == i) {
                match out.ranges[begun..].last_mut() {
                    Some(last) if start <= last.1.saturating_add(1) => last.1 = last.1.max(end),
                    _ => out.ranges.push((start, end)),
                }
            }
        }
        out.first.push(out.ranges.len() as u32);
        Some(out)
    }

    fn of(&self, series: usize) -> &[(i64, i64)] {
        &self.ranges[self.first[series] as usize..self.first[series + 1] as usize]
    }

    /// Whether nothing of a series is left between two times, inclusive.
    pub fn cover(&self, series: usize, first_ms: i64, last_ms: i64) -> bool {
        self.of(series).iter().any(|r| r.0 <= first_ms && r.1 >= last_ms)
    }

    /// Whether a series loses anything between two times, inclusive.
    pub fn touch(&self, series: usize, first_ms: i64, last_ms: i64) -> bool {
        self.of(series).iter().any(|r| r.0 <= last_ms && r.1 >= first_ms)
    }

    /// Whether nothing of any series is left between two times, inclusive.
    pub fn cover_all(&self, first_ms: i64, last_ms: i64) -> bool {
        (0..self.first.len() - 1).all(|i| self.cover(i, first_ms, last_ms))
    }

    /// Calls `each` with the parts of `rows` that are left of a series, in order; `ts` are the times of all rows.
    pub fn keep(&self, series: usize, ts: &[i64], rows: Range<usize>, mut each: impl FnMut(Range<usize>)) {
        let mut at = rows.start;
        for (start, end) in self.of(series) {
            let from = at + ts[at..rows.end].partition_point(|t| t < start);
            let to = from + ts[from..rows.end].partition_point(|t| t <= end);
            if from > at {
                each(at..from);
            }
            at = to;
        }
        if at < rows.end {
            each(at..rows.end);
        }
    }

    /// What is left of rows in the form of a scan, with the time in column `ts`.
    pub fn apply(&self, rows: RecordBatch, ts: usize) -> Result<RecordBatch> {
        let bad = || Error::internal("rows of a scan are not in its form");
        let column = |i: usize| rows.columns().get(i).ok_or_else(bad);
        let series = column(0)?.as_primitive_opt::<UInt32Type>().ok_or_else(bad)?.values();
        let times = column(ts)?.as_primitive_opt::<TimestampMillisecondType>().ok_or_else(bad)?.values();
        let mut kept: Vec<Range<usize>> = Vec::new();
        let mut at = 0;
        for run in series.chunk_by(|a, b| a == b) {
            self.keep(run[0] as usize, times, at..at + run.len(), |rows| match kept.last_mut() {
                Some(last) if last.end == rows.start => last.end = rows.end,
                _ => kept.push(rows),
            });
            at += run.len();
        }
        let total = kept.iter().map(ExactSizeIterator::len).sum();
        if total == rows.num_rows() {
            return Ok(rows);
        }
        let columns = rows.columns().iter().map(|c| gather(&[c], kept.iter().map(|k| (0, k.clone())), total));
        Ok(RecordBatch::try_new(rows.schema(), columns.collect::<Result<_>>()?)?)
    }
}

/// What is taken out of the sources of one scan or merge.
#[derive(Debug)]
pub(crate) struct Taken {
    series: usize,
    /// Oldest first.
    deletes: Vec<(Arc<Tombstone>, Vec<u32>)>,
    /// Series with the first time that is kept of them.
    expired: Vec<(Vec<u32>, i64)>,
    /// By the deletes that concern a source, as positions in `deletes`.
    made: HashMap<Vec<usize>, Option<Arc<Cuts>>>,
}

impl Taken {
    /// What deletes and retention take from series of a table between two times, inclusive, when `files` are read;
    /// `series` gives the series of a position in `keys`, where one is known. `None` when that is nothing.
    pub fn find<'a>(
        table: &TableVersion,
        files: &[Arc<DataFile>],
        keys: &[Key],
        series: impl Fn(usize) -> Option<&'a Series>,
        (start_ms, end_ms): (i64, i64),
    ) -> Option<Self> {
        let relevant = |t: &Arc<Tombstone>| {
            t.delete.start_ms <= end_ms && t.delete.end_ms >= start_ms && files.iter().any(|f| t.concerns(f))
        };
        let deletes: Vec<_> = table
            .deletes
            .iter()
            .filter(|t| relevant(t))
            .map(|t| (t.clone(), t.which.pick(keys, &series)))
            .filter(|(_, picked)| !picked.is_empty())
            .collect();
        let expired = table.floors.expired(keys, &series, start_ms);
        (!deletes.is_empty() || !expired.is_empty()).then(|| Self {
            series: keys.len(),
            deletes,
            expired,
            made: HashMap::new(),
        })
    }

    /// How many deletes take part.
    pub fn deletes(&self) -> usize {
        self.deletes.len()
    }

    /// What is taken out of a file.
    pub fn of_file(&mut self, file: &DataFile) -> Option<Arc<Cuts>> {
        self.of((0..self.deletes.len()).filter(|i| self.deletes[*i].0.concerns(file)).collect())
    }

    /// What is taken out of rows in memory: those were written after every delete.
    pub fn of_memory(&mut self) -> Option<Arc<Cuts>> {
        self.of(vec![])
    }

    fn of(&mut self, deletes: Vec<usize>) -> Option<Arc<Cuts>> {
        let Self { series, deletes: all, expired, made } = self;
        made.entry(deletes)
            .or_insert_with_key(|deletes| {
                let deletes = deletes.iter().map(|i| {
                    let (tombstone, picked) = &all[*i];
                    (&picked[..], tombstone.delete.start_ms, tombstone.delete.end_ms)
                });
                let expired = expired.iter().map(|(picked, floor)| (&picked[..], i64::MIN, floor.saturating_sub(1)));
                Cuts::new(*series, &deletes.chain(expired).collect::<Vec<_>>()).map(Arc::new)
            })
            .clone()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_join() {
        let check = |parts: &[(&[u32], i64, i64)], expected: &[&[(i64, i64)]]| {
            let cuts = Cuts::new(3, parts);
            let all: Vec<Vec<(i64, i64)>> =
                (0..3).map(|i| cuts.as_ref().map_or(vec![], |c| c.of(i).to_vec())).collect();
            assert_eq!(all, expected.iter().map(|r| r.to_vec()).collect::<Vec<_>>(), "{parts:?}");
        };
        check(&[], &[&[], &[], &[]]);
        check(&[(&[1], 5, 4)], &[&[], &[], &[]]);
        check(&[(&[0, 2], 1, 4), (&[2], 5, 9), (&[2], 20, 30)], &[&[(1, 4)], &[], &[(1, 9), (20, 30)]]);
        check(&[(&[1], i64::MIN, i64::MAX), (&[1], 0, 1)], &[&[], &[(i64::MIN, i64::MAX)], &[]]);
        check(&[(&[0], 0, 10), (&[0], 2, 3), (&[0], 12, 12)], &[&[(0, 10), (12, 12)], &[], &[]]);
    }

    proptest! {
        #[test]
        fn as_row_by_row(
            parts in prop::collection::vec((prop::collection::btree_set(0u32..4, 0..4), 0i64..40, 0i64..40), 0..6),
            ts in prop::collection::btree_set(0i64..40, 0..30),
            from in 0usize..5,
        ) {
            let picked: Vec<(Vec<u32>, i64, i64)> =
                parts.into_iter().map(|(set, a, b)| (set.into_iter().collect(), a, b)).collect();
            let ts: Vec<i64> = ts.into_iter().collect();
            let from = from.min(ts.len());
            let borrowed: Vec<(&[u32], i64, i64)> = picked.iter().map(|p| (&p.0[..], p.1, p.2)).collect();
            let cuts = Cuts::new(4, &borrowed);
            for series in 0..4u32 {
                let gone = |t: i64| picked.iter().any(|(set, a, b)| set.contains(&series) && (*a..=*b).contains(&t));
                let expected: Vec<usize> = (from..ts.len()).filter(|i| !gone(ts[*i])).collect();
                let mut kept = Vec::new();
                match &cuts {
                    Some(cuts) => {
                        cuts.keep(series as usize, &ts, from..ts.len(), |rows| kept.extend(rows));
                        let all_gone = (0..40).all(gone);
                        prop_assert_eq!(cuts.cover(series as usize, 0, 39), all_gone);
                        prop_assert_eq!(cuts.touch(series as usize, 0, 39), (0..40).any(gone));
                    }
                    None => kept.extend(from..ts.len()),
                }
                prop_assert_eq!(kept, expected);
            }
        }
    }
}
