//! What deletes and retention take out of the rows that a scan or a merge reads.
//!
//! Matchers are resolved once per scan or merge, to positions in its sorted keys; what comes out is a list of times for
//! each class of positions, by which whole files, runs and ranges of rows are left out. No row is compared with a text, and
//! nothing here runs when there is no delete and nothing has expired.

use std::collections::{BTreeMap, HashMap};
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

    /// The positions of those that match of some series with their positions in `keys`, ascending.
    fn pick(&self, keys: &[Key], seen: &[(u32, &Series)]) -> Vec<u32> {
        let at = |metric: i64, or_equal: bool| {
            seen.partition_point(|(i, _)| {
                let of = keys[*i as usize].metric;
                of < metric || or_equal && of == metric
            })
        };
        let range = match self.metric {
            Some(metric) => at(metric, false)..at(metric, true),
            None => 0..seen.len(),
        };
        let mut filter = Filter::new(self.matchers.iter());
        seen[range].iter().filter(|(_, s)| filter.matches(&s.tags)).map(|(i, _)| *i).collect()
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
}

/// The series of a scan by what is taken out of them: those that the same deletes and rules name are of one class, and
/// what there is to know of times is kept once for all of them.
#[derive(Debug)]
struct Classes {
    /// The class of each series.
    of: Vec<u32>,
    /// Of each class what names its series.
    parts: Vec<Vec<u32>>,
    /// How many series each class has.
    sizes: Vec<usize>,
}

impl Classes {
    fn new(series: usize) -> Self {
        Self { of: vec![0; series], parts: vec![vec![]], sizes: vec![series] }
    }

    /// Notes that a part names these series.
    fn name(&mut self, part: u32, picked: &[u32]) {
        let mut named: BTreeMap<u32, usize> = BTreeMap::new();
        for i in picked {
            *named.entry(self.of[*i as usize]).or_default() += 1;
        }
        let mut becomes: BTreeMap<u32, u32> = BTreeMap::new();
        for (class, n) in named {
            let at = class as usize;
            if n == self.sizes[at] {
                self.parts[at].push(part);
                continue;
            }
            becomes.insert(class, self.parts.len() as u32);
            self.parts.push([&self.parts[at][..], &[part]].concat());
            self.sizes[at] -= n;
            self.sizes.push(n);
        }
        if !becomes.is_empty() {
            for i in picked {
                let class = &mut self.of[*i as usize];
                *class = becomes.get(class).copied().unwrap_or(*class);
            }
        }
    }
}

/// Closed ranges of time that are left out, for each series of a scan.
#[derive(Debug)]
pub(crate) struct Cuts {
    classes: Arc<Classes>,
    /// Where the ranges of each class begin; one more at the end.
    first: Vec<u32>,
    /// Of each class in order, apart from each other.
    ranges: Vec<(i64, i64)>,
}

impl Cuts {
    /// What series lose when each part takes a range, inclusive, or nothing. `None` when nothing is lost.
    fn new(classes: &Arc<Classes>, range: impl Fn(u32) -> Option<(i64, i64)>) -> Option<Self> {
        let mut out = Self { classes: classes.clone(), first: Vec::new(), ranges: Vec::new() };
        for parts in &classes.parts {
            let begun = out.ranges.len();
            out.first.push(begun as u32);
            let mut own: Vec<_> = parts.iter().filter_map(|p| range(*p)).filter(|r| r.0 <= r.1).collect();
            own.sort_unstable();
            for (start, end) in own {
                match out.ranges[begun..].last_mut() {
                    Some(last) if start <= last.1.saturating_add(1) => last.1 = last.1.max(end),
                    _ => out.ranges.push((start, end)),
                }
            }
        }
        out.first.push(out.ranges.len() as u32);
        (!out.ranges.is_empty()).then_some(out)
    }

    fn of(&self, series: usize) -> &[(i64, i64)] {
        self.of_class(self.classes.of[series] as usize)
    }

    fn of_class(&self, class: usize) -> &[(i64, i64)] {
        &self.ranges[self.first[class] as usize..self.first[class + 1] as usize]
    }

    /// Whether nothing of a series is left between two times, inclusive.
    pub fn cover(&self, series: usize, first_ms: i64, last_ms: i64) -> bool {
        covers(self.of(series), first_ms, last_ms)
    }

    /// Whether a series loses anything between two times, inclusive.
    pub fn touch(&self, series: usize, first_ms: i64, last_ms: i64) -> bool {
        self.of(series).iter().any(|r| r.0 <= last_ms && r.1 >= first_ms)
    }

    /// Whether nothing of any series is left between two times, inclusive.
    pub fn cover_all(&self, first_ms: i64, last_ms: i64) -> bool {
        (0..self.classes.parts.len()).all(|class| covers(self.of_class(class), first_ms, last_ms))
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

fn covers(ranges: &[(i64, i64)], first_ms: i64, last_ms: i64) -> bool {
    ranges.iter().any(|r| r.0 <= first_ms && r.1 >= last_ms)
}

/// What is taken out of the sources of one scan or merge.
#[derive(Debug)]
pub(crate) struct Taken {
    /// Oldest first: the first parts of the classes.
    deletes: Vec<Arc<Tombstone>>,
    /// How many of them name a series.
    named: usize,
    /// The first times that are kept, by the rules of retention and then by default: the parts after those.
    floors: Vec<i64>,
    classes: Arc<Classes>,
    /// By the deletes that concern a source, as positions in `deletes`.
    made: HashMap<Vec<usize>, Option<Arc<Cuts>>>,
}

/// What finds out what is taken, by being shown the series.
pub(crate) struct Finding<'a> {
    table: &'a TableVersion,
    keys: &'a [Key],
    start_ms: i64,
    /// With whether they name a series that was seen.
    deletes: Vec<(Arc<Tombstone>, bool)>,
    /// Which series no rule of retention names; empty when nothing has expired.
    free: Vec<bool>,
    classes: Classes,
}

impl Finding<'_> {
    /// Shows some series with their positions in the keys, ascending. A series may be shown again.
    pub fn see(&mut self, seen: &[(u32, &Series)]) {
        for (part, (tombstone, names)) in self.deletes.iter_mut().enumerate() {
            let picked = tombstone.which.pick(self.keys, seen);
            *names |= !picked.is_empty();
            self.classes.name(part as u32, &picked);
        }
        if self.free.is_empty() {
            return;
        }
        // A series follows the first rule that names it, whatever part of the catalog it is in.
        let mut ruled: Vec<(u32, &Series)> = seen.iter().filter(|(i, _)| self.free[*i as usize]).copied().collect();
        for (rule, (which, floor)) in self.table.floors.rules.iter().enumerate() {
            let picked = which.pick(self.keys, &ruled);
            picked.iter().for_each(|i| self.free[*i as usize] = false);
            ruled.retain(|(i, _)| self.free[*i as usize]);
            if *floor > self.start_ms {
                self.classes.name((self.deletes.len() + rule) as u32, &picked);
            }
        }
    }

    /// What is taken of all that was seen, and by the default of retention also of what was not.
    pub fn end(mut self) -> Option<Taken> {
        let Floors { default_ms, rules } = self.table.floors.as_ref();
        if *default_ms > self.start_ms {
            let picked: Vec<u32> = (0..self.free.len() as u32).filter(|i| self.free[*i as usize]).collect();
            self.classes.name((self.deletes.len() + rules.len()) as u32, &picked);
        }
        let named = self.deletes.iter().filter(|d| d.1).count();
        self.classes.parts.iter().any(|parts| !parts.is_empty()).then(|| Taken {
            deletes: self.deletes.into_iter().map(|d| d.0).collect(),
            named,
            floors: self.table.floors.all().collect(),
            classes: Arc::new(self.classes),
            made: HashMap::new(),
        })
    }
}

impl Taken {
    /// Finds what deletes and retention take from series of a table between two times, inclusive, when `files` are read.
    /// `None` when that is nothing.
    pub fn find<'a>(
        table: &'a TableVersion,
        files: &[Arc<DataFile>],
        keys: &'a [Key],
        (start_ms, end_ms): (i64, i64),
    ) -> Option<Finding<'a>> {
        let relevant = |t: &&Arc<Tombstone>| {
            t.delete.start_ms <= end_ms && t.delete.end_ms >= start_ms && files.iter().any(|f| t.concerns(f))
        };
        let deletes: Vec<_> = table.deletes.iter().filter(relevant).map(|t| (t.clone(), false)).collect();
        let expired = table.floors.greatest() > start_ms;
        let free = vec![true; if expired { keys.len() } else { 0 }];
        let classes = || Classes::new(keys.len());
        (expired || !deletes.is_empty()).then(|| Finding { table, keys, start_ms, deletes, free, classes: classes() })
    }

    /// How many deletes take part.
    pub fn deletes(&self) -> usize {
        self.named
    }

    /// What is taken out of a file.
    pub fn of_file(&mut self, file: &DataFile) -> Option<Arc<Cuts>> {
        self.of((0..self.deletes.len()).filter(|i| self.deletes[*i].concerns(file)).collect())
    }

    /// What is taken out of rows in memory: those were written after every delete.
    pub fn of_memory(&mut self) -> Option<Arc<Cuts>> {
        self.of(vec![])
    }

    fn of(&mut self, deletes: Vec<usize>) -> Option<Arc<Cuts>> {
        let Self { deletes: all, floors, classes, made, .. } = self;
        made.entry(deletes)
            .or_insert_with_key(|deletes| {
                let range = |part: u32| match all.get(part as usize) {
                    Some(t) => {
                        deletes.binary_search(&(part as usize)).is_ok().then_some((t.delete.start_ms, t.delete.end_ms))
                    }
                    None => floors.get(part as usize - all.len()).map(|floor| (i64::MIN, floor.saturating_sub(1))),
                };
                Cuts::new(classes, range).map(Arc::new)
            })
            .clone()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cuts(series: usize, parts: &[(&[u32], i64, i64)]) -> Option<Cuts> {
        let mut classes = Classes::new(series);
        parts.iter().enumerate().for_each(|(i, part)| classes.name(i as u32, part.0));
        let sizes: Vec<usize> =
            (0..classes.parts.len() as u32).map(|class| classes.of.iter().filter(|c| **c == class).count()).collect();
        assert_eq!(classes.sizes, sizes, "a class is never empty");
        assert!(series == 0 || !sizes.contains(&0));
        Cuts::new(&Arc::new(classes), |p| Some((parts[p as usize].1, parts[p as usize].2)))
    }

    #[test]
    fn series_with_the_same_deletes_are_one_class() {
        let mut classes = Classes::new(5);
        classes.name(0, &[0, 1, 2, 3, 4]);
        classes.name(1, &[1, 3]);
        classes.name(2, &[1, 3, 4]);
        classes.name(3, &[0, 2]);
        assert_eq!(classes.parts, [vec![0, 3], vec![0, 1, 2], vec![0, 2]]);
        assert_eq!(classes.of, [0, 1, 0, 1, 2]);
    }

    #[test]
    fn ranges_join() {
        let check = |parts: &[(&[u32], i64, i64)], expected: &[&[(i64, i64)]]| {
            let cuts = cuts(3, parts);
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
            let cuts = cuts(4, &borrowed);
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
