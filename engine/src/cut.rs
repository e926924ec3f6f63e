//! What deletes and retention take out of the rows that a scan or a merge reads.
//!
//! Matchers are resolved once per scan or merge, to positions in its sorted keys; what comes out is a list of times for
//! each class of positions, by which whole files, runs and ranges of rows are left out. No row is compared with a text, and
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

/// Finds the classes of the series of a scan.
///
/// What names a series is a path in a tree whose edges are parts, so that series with the same path share it while parts
/// are added one by one.
#[derive(Debug)]
struct Naming {
    /// Where the path of each series ends.
    of: Vec<u32>,
    /// Of each place in the tree the one before and the part that leads here; the first is its root.
    places: Vec<(u32, u32)>,
    next: HashMap<(u32, u32), u32>,
}

impl Naming {
    fn new(series: usize) -> Self {
        Self { of: vec![0; series], places: vec![(0, 0)], next: HashMap::new() }
    }

    /// Notes that a part names these series, each of which is told once.
    fn name(&mut self, part: u32, picked: &[u32]) {
        let mut last = None;
        for i in picked {
            let place = &mut self.of[*i as usize];
            // Neighbours are mostly of one class.
            let next = match last {
                Some((from, to)) if from == *place => to,
                _ => *self.next.entry((*place, part)).or_insert_with(|| {
                    self.places.push((*place, part));
                    (self.places.len() - 1) as u32
                }),
            };
            last = Some((*place, next));
            *place = next;
        }
    }

    /// The class of each series, and of each class what names its series.
    fn end(mut self) -> (Vec<u32>, Vec<Vec<u32>>) {
        // Places where no path ends are no class.
        let mut class_of = vec![u32::MAX; self.places.len()];
        let mut parts: Vec<Vec<u32>> = Vec::new();
        for place in &mut self.of {
            let class = &mut class_of[*place as usize];
            if *class == u32::MAX {
                *class = parts.len() as u32;
                let mut path = Vec::new();
                let mut at = *place;
                while at != 0 {
                    let (before, part) = self.places[at as usize];
                    path.push(part);
                    at = before;
                }
                parts.push(path);
            }
            *place = *class;
        }
        (self.of, parts)
    }
}

/// A closed range of time that is left out.
#[derive(Debug, Clone, Copy)]
struct Span {
    start_ms: i64,
    end_ms: i64,
    /// The place of its delete among all, oldest first; [`ALWAYS`] when retention takes it.
    order: u32,
}

/// Later than all deletes.
const ALWAYS: u32 = u32::MAX;

/// What is left out of the series of one class, by all deletes.
#[derive(Debug, Default)]
struct Spans {
    /// By their begin; they may overlap.
    spans: Vec<Span>,
    /// The last end up to each of them.
    reach: Vec<i64>,
}

impl Spans {
    fn new(mut spans: Vec<Span>) -> Self {
        spans.retain(|s| s.start_ms <= s.end_ms);
        spans.sort_unstable_by_key(|s| s.start_ms);
        let mut last = i64::MIN;
        let reach = spans.iter().map(|s| {
            last = last.max(s.end_ms);
            last
        });
        Self { reach: reach.collect(), spans }
    }

    /// The spans of deletes from `first` on that hold something between two times, inclusive, by their begin.
    fn overlapping(&self, first: u32, from_ms: i64, to_ms: i64) -> impl Iterator<Item = &Span> {
        let end = self.spans.partition_point(|s| s.start_ms <= to_ms);
        let begin = self.reach.partition_point(|reach| *reach < from_ms).min(end);
        self.spans[begin..end].iter().filter(move |s| s.order >= first && s.end_ms >= from_ms)
    }

    fn cover(&self, first: u32, from_ms: i64, to_ms: i64) -> bool {
        let mut next = from_ms;
        for span in self.overlapping(first, from_ms, to_ms) {
            if span.start_ms > next {
                return false;
            }
            if span.end_ms >= to_ms {
                return true;
            }
            next = next.max(span.end_ms + 1);
        }
        false
    }
}

/// The series of a scan by what is taken out of them: those that the same deletes and rules name are of one class, and
/// what there is to know of times is kept once for all of them, whatever file they are in.
#[derive(Debug)]
struct Classes {
    /// The class of each series.
    of: Vec<u32>,
    spans: Vec<Spans>,
}

impl Classes {
    /// With what each part takes. `None` when that is nothing.
    fn new(naming: Naming, parts: &[Vec<Span>]) -> Option<Self> {
        let (of, named) = naming.end();
        let spans = |parts_of: Vec<u32>| {
            Spans::new(parts_of.into_iter().flat_map(|p| parts[p as usize].iter().copied()).collect())
        };
        let spans: Vec<Spans> = named.into_iter().map(spans).collect();
        spans.iter().any(|s| !s.spans.is_empty()).then_some(Self { of, spans })
    }
}

/// What is left out of one source of a scan.
#[derive(Debug, Clone)]
pub(crate) struct Cuts {
    classes: Arc<Classes>,
    /// The first delete that concerns the source: it is older than this and all that follow.
    first: u32,
}

impl Cuts {
    fn of(&self, series: usize) -> &Spans {
        &self.classes.spans[self.classes.of[series] as usize]
    }

    /// Whether nothing of a series is left between two times, inclusive.
    pub fn cover(&self, series: usize, first_ms: i64, last_ms: i64) -> bool {
        self.of(series).cover(self.first, first_ms, last_ms)
    }

    /// Whether a series loses anything between two times, inclusive.
    pub fn touch(&self, series: usize, first_ms: i64, last_ms: i64) -> bool {
        self.of(series).overlapping(self.first, first_ms, last_ms).next().is_some()
    }

    /// Whether any series loses anything between two times, inclusive.
    fn touch_any(&self, first_ms: i64, last_ms: i64) -> bool {
        self.classes.spans.iter().any(|s| s.overlapping(self.first, first_ms, last_ms).next().is_some())
    }

    /// Whether nothing of any series is left between two times, inclusive.
    pub fn cover_all(&self, first_ms: i64, last_ms: i64) -> bool {
        self.classes.spans.iter().all(|s| s.cover(self.first, first_ms, last_ms))
    }

    /// Calls `each` with the parts of `rows` that are left of a series, in order; `ts` are the times of all rows.
    pub fn keep(&self, series: usize, ts: &[i64], rows: Range<usize>, mut each: impl FnMut(Range<usize>)) {
        let mut at = rows.start;
        let Some([from_ms, .., to_ms] | [from_ms @ to_ms]) = ts.get(rows.clone()) else { return };
        for span in self.of(series).overlapping(self.first, *from_ms, *to_ms) {
            let from = at + ts[at..rows.end].partition_point(|t| *t < span.start_ms);
            let to = from + ts[from..rows.end].partition_point(|t| *t <= span.end_ms);
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
    /// Oldest first.
    deletes: Vec<Arc<Tombstone>>,
    /// How many of them name a series.
    named: usize,
    classes: Arc<Classes>,
}

/// What finds out what is taken, by being shown the series.
///
/// Parts are the different matchers of deletes, then the rules of retention, then its default: those who delete by time
/// do it with the same matchers again and again.
pub(crate) struct Finding<'a> {
    table: &'a TableVersion,
    keys: &'a [Key],
    start_ms: i64,
    deletes: Vec<Arc<Tombstone>>,
    /// The part of each delete.
    part_of: Vec<u32>,
    /// Of each part of deletes one of them, and whether they name a series that was seen.
    parts: Vec<(Arc<Tombstone>, bool)>,
    /// Which series no rule of retention names; empty when nothing has expired.
    free: Vec<bool>,
    /// Which series were shown.
    shown: Vec<bool>,
    naming: Naming,
}

impl Finding<'_> {
    /// Shows some series with their positions in the keys, ascending. A series may be shown again.
    pub fn see(&mut self, seen: &[(u32, &Series)]) {
        let new = |(i, _): &&(u32, &Series)| !std::mem::replace(&mut self.shown[*i as usize], true);
        let seen: Vec<(u32, &Series)> = seen.iter().filter(new).copied().collect();
        for (part, (tombstone, names)) in self.parts.iter_mut().enumerate() {
            let picked = tombstone.which.pick(self.keys, &seen);
            *names |= !picked.is_empty();
            self.naming.name(part as u32, &picked);
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
                self.naming.name((self.parts.len() + rule) as u32, &picked);
            }
        }
    }

    /// What is taken of all that was seen, and by the default of retention also of what was not.
    pub fn end(mut self) -> Option<Taken> {
        let Floors { default_ms, rules } = self.table.floors.as_ref();
        if *default_ms > self.start_ms {
            let picked: Vec<u32> = (0..self.free.len() as u32).filter(|i| self.free[*i as usize]).collect();
            self.naming.name((self.parts.len() + rules.len()) as u32, &picked);
        }
        let mut spans: Vec<Vec<Span>> = vec![vec![]; self.parts.len()];
        for (order, (t, part)) in self.deletes.iter().zip(&self.part_of).enumerate() {
            let (start_ms, end_ms) = (t.delete.start_ms, t.delete.end_ms);
            spans[*part as usize].push(Span { start_ms, end_ms, order: order as u32 });
        }
        let expired = |floor: i64| Span { start_ms: i64::MIN, end_ms: floor.saturating_sub(1), order: ALWAYS };
        spans.extend(self.table.floors.all().map(|floor| vec![expired(floor)]));
        let classes = Arc::new(Classes::new(self.naming, &spans)?);
        let named = self.part_of.iter().filter(|part| self.parts[**part as usize].1).count();
        Some(Taken { deletes: self.deletes, named, classes })
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
        let deletes: Vec<_> = table.deletes.iter().filter(relevant).cloned().collect();
        let expired = table.floors.greatest() > start_ms;
        if deletes.is_empty() && !expired {
            return None;
        }
        let (mut parts, mut part_of) = (Vec::new(), Vec::with_capacity(deletes.len()));
        #[expect(
            clippy::mutable_key_type,
            reason = "matchers are compared and hashed by their text, which never changes"
        )]
        let mut part_with: HashMap<&[Matcher], u32> = HashMap::new();
        for t in &deletes {
            let part = part_with.entry(&t.delete.matchers).or_insert_with(|| {
                parts.push((t.clone(), false));
                (parts.len() - 1) as u32
            });
            part_of.push(*part);
        }
        drop(part_with);
        let free = vec![true; if expired { keys.len() } else { 0 }];
        let (shown, naming) = (vec![false; keys.len()], Naming::new(keys.len()));
        Some(Finding { table, keys, start_ms, deletes, part_of, parts, free, shown, naming })
    }

    /// Bytes that this takes.
    pub fn bytes(&self) -> usize {
        let spans: usize = self.classes.spans.iter().map(|s| s.spans.len()).sum();
        self.classes.of.len() * size_of::<u32>() + spans * (size_of::<Span>() + size_of::<i64>())
    }

    /// How many deletes take part.
    pub fn deletes(&self) -> usize {
        self.named
    }

    /// What is taken out of a file.
    pub fn of_file(&self, file: &DataFile) -> Option<Cuts> {
        // Both numbers grow from delete to delete.
        let first = self.deletes.partition_point(|t| t.delete.seq <= file.seq_max || t.delete.id <= file.id);
        self.of(first, file.ts_min, file.ts_max)
    }

    /// What is taken out of rows in memory: those were written after every delete.
    pub fn of_memory(&self) -> Option<Cuts> {
        self.of(self.deletes.len(), i64::MIN, i64::MAX)
    }

    fn of(&self, first: usize, from_ms: i64, to_ms: i64) -> Option<Cuts> {
        let cuts = Cuts { classes: self.classes.clone(), first: first as u32 };
        cuts.touch_any(from_ms, to_ms).then_some(cuts)
    }
}

#[cfg(test)]
mod tests {
    use catalog::MatchOp;
    use catalog::files::{Delete, State};
    use catalog::tables::SAMPLES;
    use proptest::prelude::*;

    use super::*;
    use crate::version::Version;

    fn named(series: usize, parts: &[&[u32]]) -> (Vec<u32>, Vec<Vec<u32>>) {
        let mut naming = Naming::new(series);
        parts.iter().enumerate().for_each(|(i, picked)| naming.name(i as u32, picked));
        naming.end()
    }

    /// What deletes from `first` on take, each of which names some series and has a range.
    fn cuts(series: usize, deletes: &[(&[u32], i64, i64)], first: u32) -> Option<Cuts> {
        let mut naming = Naming::new(series);
        deletes.iter().enumerate().for_each(|(i, delete)| naming.name(i as u32, delete.0));
        let span = |(order, delete): (u32, &(&[u32], i64, i64))| Span { start_ms: delete.1, end_ms: delete.2, order };
        let spans: Vec<Vec<Span>> = (0..).zip(deletes).map(|d| vec![span(d)]).collect();
        Some(Cuts { classes: Arc::new(Classes::new(naming, &spans)?), first })
    }

    #[test]
    fn series_with_the_same_deletes_are_one_class() {
        let (of, parts) = named(5, &[&[0, 1, 2, 3, 4], &[1, 3], &[1, 3, 4], &[0, 2]]);
        assert_eq!(parts, [vec![3, 0], vec![2, 1, 0], vec![2, 0]]);
        assert_eq!(of, [0, 1, 0, 1, 2]);
    }

    #[test]
    fn what_is_known_of_series_does_not_grow_with_how_often_they_are_shown() {
        let hasher = TagHasher::new(1);
        let series = |id: u32| {
            let tags = tag_set(&[(METRIC_NAME, "m"), ("id", &id.to_string())]).unwrap();
            Series::new(&hasher, tags)
        };
        let mut all: Vec<Series> = (0..100).map(series).collect();
        all.sort_unstable_by_key(|s| Key::from(s));
        let keys: Vec<Key> = all.iter().map(Key::from).collect();
        let delete = |id: i64| Delete {
            id,
            seq: 2,
            table_id: SAMPLES.id,
            matchers: vec![Matcher::new(METRIC_NAME, MatchOp::Eq, "m").unwrap()],
            start_ms: id,
            end_ms: id,
            created_ms: 0,
        };
        let state = State { deletes: (1..=1000).map(delete).collect(), ..State::default() };
        let version = Version::new(&state, &hasher);
        let file = Arc::new(DataFile { seq_max: 1, ts_max: i64::MAX, ..DataFile::default() });
        let table = version.table(SAMPLES.id).unwrap();
        let mut finding = Taken::find(table, &[file], &keys, (i64::MIN, i64::MAX)).unwrap();
        for first in 0..50 {
            let seen: Vec<(u32, &Series)> = (0..).zip(&all).skip(first).step_by(2).collect();
            finding.see(&seen);
        }
        let taken = finding.end().unwrap();
        assert_eq!(taken.classes.spans.iter().map(|s| s.spans.len()).collect::<Vec<_>>(), [1000]);
        assert_eq!(taken.deletes(), 1000);
    }

    #[test]
    fn ranges_that_meet_cover_together() {
        let deletes: &[(&[u32], i64, i64)] =
            &[(&[0, 2], 1, 4), (&[2], 5, 9), (&[2], 20, 30), (&[1], i64::MIN, i64::MAX), (&[0], 9, 8)];
        let check = |first: u32, series: usize, range: (i64, i64), expected: (bool, bool)| {
            let cuts = cuts(3, deletes, first).unwrap();
            let found = (cuts.touch(series, range.0, range.1), cuts.cover(series, range.0, range.1));
            assert_eq!(found, expected, "from {first} series {series} {range:?}");
        };
        check(0, 2, (1, 9), (true, true));
        check(0, 2, (2, 2), (true, true));
        check(0, 2, (1, 10), (true, false));
        check(0, 2, (0, 9), (true, false));
        check(0, 2, (10, 19), (false, false));
        check(1, 2, (1, 9), (true, false));
        check(1, 2, (5, 9), (true, true));
        check(2, 2, (1, 19), (false, false));
        check(3, 1, (i64::MIN, i64::MAX), (true, true));
        check(4, 1, (i64::MIN, i64::MAX), (false, false));
        check(0, 0, (5, 100), (false, false));
        assert!(cuts(3, &[(&[1], 5, 4)], 0).is_none());
        assert!(cuts(3, &[(&[], 4, 5)], 0).is_none());
    }

    proptest! {
        #[test]
        fn as_row_by_row(
            parts in prop::collection::vec((prop::collection::btree_set(0u32..4, 0..4), 0i64..40, 0i64..40), 0..6),
            ts in prop::collection::btree_set(0i64..40, 0..30),
            from in 0usize..5,
            first in 0u32..4,
        ) {
            let picked: Vec<(Vec<u32>, i64, i64)> =
                parts.into_iter().map(|(set, a, b)| (set.into_iter().collect(), a, b)).collect();
            let ts: Vec<i64> = ts.into_iter().collect();
            let from = from.min(ts.len());
            let borrowed: Vec<(&[u32], i64, i64)> = picked.iter().map(|p| (&p.0[..], p.1, p.2)).collect();
            let cuts = cuts(4, &borrowed, first);
            for series in 0..4u32 {
                let later = || picked.iter().skip(first as usize);
                let gone = |t: i64| later().any(|(set, a, b)| set.contains(&series) && (*a..=*b).contains(&t));
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
