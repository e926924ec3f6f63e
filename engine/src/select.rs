//! From matchers to the set of series that a scan reads.
//!
//! Tag sets come from two places: rows in memory refer to active sets, which the registry knows, and rows in files to sets
//! in the tag parts of their day. Both are asked only when the data in the time range can need them.

mod found;
mod pair;

use std::collections::HashMap;
use std::collections::HashSet;
use std::hash::BuildHasherDefault;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use catalog::files::TagPart;
use catalog::registry::PassThrough;
use catalog::tag::METRIC_NAME;
use catalog::tag_parts::MetricSets;
use catalog::{
    Error, MatchOp, Matcher, MetricFilter, Narrow, Ordinal, Registry, Result, Series, TableSchema, TagSet, TagValues,
};

use crate::engine::Inner;
use crate::memory::Kind;
use crate::segment::{Key, Segments, day_of};
use crate::snapshot::{Snapshot, View};
use crate::version::{TableVersion, Version};
use crate::{Pace, Reservation, Stop};
use found::Found;

/// Memory is reserved for so many series at a time.
const SERIES_AT_A_TIME: usize = 1024;

/// What a code takes among those that were seen, which is an entry of a hash table at its fullest and when it grows.
const SEEN_BYTES: usize = 2 * (size_of::<i64>() + 1);

/// The ordinal of a series that is not active.
pub(crate) const NO_ORDINAL: Ordinal = Ordinal::MAX;

/// Which series of which table, and when.
#[derive(Debug, Clone)]
pub struct Selection {
    /// The table.
    pub table: Arc<TableSchema>,
    /// All must hold. Empty selects everything.
    pub matchers: Vec<Matcher>,
    /// First millisecond, inclusive.
    pub start_ms: i64,
    /// Last millisecond, inclusive.
    pub end_ms: i64,
}

/// The series that a selection means, against one version of the data: what is scanned with this set is exactly what
/// was visible when it was made. A set may hold series without a row in the range.
#[derive(Debug)]
pub struct SeriesSet {
    /// The table.
    pub table: Arc<TableSchema>,
    /// The series in storage order; a scan's `series` column holds indexes into this.
    pub series: Vec<Arc<Series>>,
    /// First millisecond, inclusive.
    pub start_ms: i64,
    /// Last millisecond, inclusive.
    pub end_ms: i64,
    /// Sort keys of `series`.
    pub(crate) keys: Arc<Vec<Key>>,
    /// Ordinals of `series`, [`NO_ORDINAL`] for those that have no rows in memory.
    pub(crate) ordinals: Vec<Ordinal>,
    /// What is read.
    pub(crate) version: Arc<Version>,
    /// Whose version that is, unless it was the present one.
    pub(crate) snapshot: Option<Arc<Snapshot>>,
    pub(crate) segments: Arc<Segments>,
    /// Sets that the matchers were tried on.
    pub(crate) candidates: usize,
    pub(crate) threads: usize,
    /// For `series`, `keys` and `ordinals`.
    pub(crate) memory: Arc<Reservation>,
}

impl SeriesSet {
    /// The series for which `keep` holds, against the same version of the data.
    #[must_use]
    pub fn restrict(&self, keep: impl Fn(&Series) -> bool) -> Self {
        let kept: Vec<usize> = (0..self.series.len()).filter(|i| keep(&self.series[*i])).collect();
        self.pick(&kept)
    }

    /// The series at these places, which ascend, against the same version of the data.
    ///
    /// # Panics
    /// When there is no such place.
    #[must_use]
    pub fn pick(&self, kept: &[usize]) -> Self {
        Self {
            table: self.table.clone(),
            series: kept.iter().map(|i| self.series[*i].clone()).collect(),
            start_ms: self.start_ms,
            end_ms: self.end_ms,
            keys: Arc::new(kept.iter().map(|i| self.keys[*i]).collect()),
            ordinals: kept.iter().map(|i| self.ordinals[*i]).collect(),
            version: self.version.clone(),
            snapshot: self.snapshot.clone(),
            segments: self.segments.clone(),
            candidates: self.candidates,
            threads: self.threads,
            memory: self.memory.clone(),
        }
    }

    /// The codes of the series, in their order.
    pub fn codes(&self) -> Vec<i64> {
        self.series.iter().map(|s| s.id.code.0).collect()
    }

    /// How many tag sets the matchers were tried on.
    pub fn candidates(&self) -> usize {
        self.candidates
    }
}

/// Finds the series of a selection.
pub(crate) async fn select(view: View<'_>, selection: &Selection, stop: &Stop) -> Result<Arc<SeriesSet>> {
    loop {
        let present = Present::of(view.inner);
        let set = select_once(view, selection, stop).await?;
        if present.lasts() {
            return Ok(set);
        }
    }
}

/// Who looks at a version and then at the active sets has to look again when sets have left meanwhile: the version's
/// memtables may have held rows of theirs.
struct Present<'a> {
    registry: &'a Registry,
    retirements: u64,
}

impl<'a> Present<'a> {
    fn of(inner: &'a Inner) -> Self {
        Self { registry: &inner.registry, retirements: inner.registry.retirements() }
    }

    fn lasts(&self) -> bool {
        self.registry.retirements() == self.retirements
    }
}

async fn select_once(view: View<'_>, selection: &Selection, stop: &Stop) -> Result<Arc<SeriesSet>> {
    let inner = view.inner;
    // The version first: whatever it can refer to was published before.
    let version = view.version()?;
    let start_ms = kept_from(&version, &selection.table, selection.start_ms);
    let mut found = Found::new(stop.memory(&inner.memory).reserve(Kind::Queries), inner.settings.query_series_max);
    let mut sources = Sources::of(view, &version, selection, stop);
    while sources.next(|ordinal, series| found.push(ordinal, series)).await? {
        found.settle()?;
    }
    let candidates = sources.candidates;
    let (found, memory) = found.end()?;
    let keys = Arc::new(found.iter().map(|f| f.0).collect());
    let ordinals = found.iter().map(|f| f.1).collect();
    Ok(Arc::new(SeriesSet {
        table: selection.table.clone(),
        series: found.into_iter().map(|f| f.2).collect(),
        start_ms,
        end_ms: selection.end_ms,
        keys,
        ordinals,
        version,
        snapshot: view.snapshot.cloned(),
        segments: inner.segments.clone(),
        candidates,
        threads: inner.settings.cpu_threads.max(1),
        memory: Arc::new(memory),
    }))
}

/// The set of tag sets that are known already.
///
/// # Errors
/// `Internal` on a code collision.
pub(crate) fn given(
    view: View<'_>,
    table: Arc<TableSchema>,
    tags: Vec<TagSet>,
    start_ms: i64,
    end_ms: i64,
) -> Result<SeriesSet> {
    let inner = view.inner;
    let series: Vec<Arc<Series>> =
        tags.into_iter().map(|tags| Arc::new(Series::new(inner.registry.hasher(), tags))).collect();
    let (version, mut found) = loop {
        let present = Present::of(inner);
        let version = view.version()?;
        let mut found = Vec::with_capacity(series.len());
        for series in &series {
            let ordinal = inner.registry.lookup(series.id)?.filter(|o| view.knows(*o)).unwrap_or(NO_ORDINAL);
            found.push((Key::from(series.as_ref()), ordinal, series.clone()));
        }
        if present.lasts() {
            break (version, found);
        }
    };
    found.sort_unstable_by_key(|(key, ..)| *key);
    found.dedup_by_key(|(key, ..)| *key);
    Ok(SeriesSet {
        candidates: found.len(),
        keys: Arc::new(found.iter().map(|f| f.0).collect()),
        ordinals: found.iter().map(|f| f.1).collect(),
        series: found.into_iter().map(|f| f.2).collect(),
        start_ms: kept_from(&version, &table, start_ms),
        table,
        end_ms,
        version,
        snapshot: view.snapshot.cloned(),
        segments: inner.segments.clone(),
        threads: inner.settings.cpu_threads.max(1),
        memory: Arc::new(inner.memory.reserve(Kind::Queries)),
    })
}

/// Calls `visit` once for each distinct tag set of a selection until it returns false.
pub(crate) async fn visit(
    view: View<'_>,
    selection: &Selection,
    stop: &Stop,
    mut visit: impl FnMut(&Arc<Series>) -> bool + Send,
) -> Result<()> {
    let inner = view.inner;
    let mut seen: HashSet<i64, BuildHasherDefault<PassThrough>> = HashSet::default();
    let mut memory = stop.memory(&inner.memory).reserve(Kind::Queries);
    loop {
        let present = Present::of(inner);
        let version = view.version()?;
        let mut sources = Sources::of(view, &version, selection, stop);
        let (mut reserved, mut go_on) = (Ok(()), true);
        let mut each = |_, series: &Arc<Series>| {
            if seen.len() == seen.capacity() {
                let more = seen.len().max(SERIES_AT_A_TIME);
                reserved = memory.grow(more * SEEN_BYTES);
                if reserved.is_ok() {
                    seen.reserve(more);
                }
            }
            go_on = reserved.is_ok() && (!seen.insert(series.id.code.0) || visit(series));
            go_on
        };
        while sources.next(&mut each).await? {}
        reserved.map_err(too_much)?;
        if !go_on || present.lasts() {
            return Ok(());
        }
    }
}

/// The distinct values of a tag that the tag sets of a range have, in lists of which each is sorted: what [`visit`] without
/// matchers would show, at the cost of what is new since it was last asked.
pub(crate) async fn values(inner: &Inner, selection: &Selection, tag: &str) -> Result<Vec<Arc<TagValues>>> {
    loop {
        let present = Present::of(inner);
        let lists = values_once(inner, selection, tag).await?;
        if present.lasts() {
            return Ok(lists);
        }
    }
}

async fn values_once(inner: &Inner, selection: &Selection, tag: &str) -> Result<Vec<Arc<TagValues>>> {
    let version = inner.version();
    let (start, end) = (kept_from(&version, &selection.table, selection.start_ms), selection.end_ms);
    let Some(table) = version.table(selection.table.id).filter(|_| start <= end) else { return Ok(vec![]) };
    let parts = parts_in_range(&version, table, start, end);
    let mut memory = inner.memory.reserve(Kind::Queries);
    // The sets of one part at a time.
    let mut admit = |bytes| {
        memory.shrink_to(0);
        memory.grow(bytes).map_err(too_much)
    };
    let mut lists = inner.parts.values(&parts, tag, &mut admit).await?;
    if table.memtables().any(|m| m.overlaps(start, end)) {
        lists.push(inner.registry.values(tag));
    }
    Ok(lists)
}

/// The refusal of a query that asks for more memory than it can get.
fn too_much(e: Error) -> Error {
    Error::limit_exceeded(e.to_string())
}

/// The first time of a range that no series of a table has outlived.
fn kept_from(version: &Version, table: &TableSchema, start_ms: i64) -> i64 {
    version.table(table.id).map_or(start_ms, |t| start_ms.max(t.floors.least()))
}

/// The places to look for tag sets: those in memory, then one tag part after another.
struct Sources<'a> {
    view: View<'a>,
    selection: &'a Selection,
    stop: &'a Stop,
    names: Names<'a>,
    filter: Filter<'a>,
    pace: Pace,
    /// What looking at a set costs: a matcher looks for its tag, a regular expression that is large looks at each letter
    /// many times.
    cost: usize,
    /// Whether the sets in memory are to be looked at.
    active: bool,
    parts: std::vec::IntoIter<Arc<TagPart>>,
    /// Sets that were looked at.
    candidates: usize,
    /// For the sets of one part.
    memory: Reservation,
}

impl<'a> Sources<'a> {
    fn of(view: View<'a>, version: &Version, selection: &'a Selection, stop: &'a Stop) -> Self {
        let (start, end) = (kept_from(version, &selection.table, selection.start_ms), selection.end_ms);
        let table = version.table(selection.table.id).filter(|_| start <= end);
        let filter = Filter::new(tags_of(selection));
        Self {
            view,
            selection,
            stop,
            names: Names::of(&selection.matchers, stop),
            pace: stop.pace(),
            cost: 64 * (1 + filter.cheap.len()) + (16 << 10) * filter.dear.len(),
            filter,
            active: table.is_some_and(|t| t.memtables().any(|m| m.overlaps(start, end))),
            parts: table.map_or_else(Vec::new, |t| parts_in_range(version, t, start, end)).into_iter(),
            candidates: 0,
            memory: stop.memory(&view.inner.memory).reserve(Kind::Queries),
        }
    }

    /// Calls `visit` with the sets of the next place that match, active ones with their ordinal, until it returns false;
    /// a set may come again from another place. Returns false after that and when there is no other place.
    async fn next(&mut self, visit: impl FnMut(Ordinal, &Arc<Series>) -> bool + Send) -> Result<bool> {
        self.stop.check()?;
        if std::mem::take(&mut self.active) {
            return self.in_memory(visit);
        }
        let Some(part) = self.parts.next() else { return Ok(false) };
        let sets = self.load(part).await?;
        let go_on = self.in_part(&sets, visit)?;
        // Whoever keeps some of them says so at once.
        self.memory.shrink_to(0);
        Ok(go_on)
    }

    async fn load(&mut self, part: Arc<TagPart>) -> Result<Vec<MetricSets>> {
        let Self { view, selection, names, memory, .. } = self;
        let mut admit = |bytes| memory.grow(bytes).map_err(too_much);
        let wanted = |name: &str| names.want(name);
        let filter = match exact_name(&selection.matchers) {
            Some(name) => MetricFilter::Eq(name),
            None if names.matchers.is_empty() => MetricFilter::All,
            None => MetricFilter::Where(&wanted),
        };
        let sets = view.inner.parts.load(&[part], filter, &mut admit).await?;
        self.stop.check()?;
        Ok(sets)
    }

    fn in_memory(&mut self, mut visit: impl FnMut(Ordinal, &Arc<Series>) -> bool) -> Result<bool> {
        let Self { view, selection, stop, names, filter, pace, cost, candidates, .. } = self;
        let (mut stopped, mut go_on) = (Ok(()), true);
        let mut each = |ordinal, series: &Arc<Series>| {
            if !view.knows(ordinal) {
                return;
            }
            *candidates += 1;
            if go_on && let Err(e) = pace.step(*cost) {
                (stopped, go_on) = (Err(e), false);
            }
            if go_on && filter.matches(&series.tags) {
                go_on = visit(ordinal, series);
            }
        };
        let mut holds = holds(stop);
        let mut narrow = Narrow::new(tags_of(selection), &mut holds);
        let registry = &view.inner.registry;
        match exact_name(&selection.matchers) {
            Some(name) => registry.for_each_of(name, Some(&mut narrow), &mut each),
            None => registry.for_each(|m| names.want(m), Some(&mut narrow), &mut each),
        }
        stopped?;
        stop.check()?;
        Ok(go_on)
    }

    fn in_part(&mut self, sets: &[MetricSets], mut visit: impl FnMut(Ordinal, &Arc<Series>) -> bool) -> Result<bool> {
        let mut holds = holds(self.stop);
        let mut narrow = Narrow::new(tags_of(self.selection), &mut holds);
        for sets in sets {
            let narrowed = self.view.inner.parts.narrowed(sets, &mut narrow);
            let (all, some) = match &narrowed {
                None => (&sets[..], &[][..]),
                Some(some) => (&[][..], &some[..]),
            };
            for series in all.iter().chain(some.iter().map(|at| &sets[*at as usize])) {
                self.candidates += 1;
                self.pace.step(self.cost)?;
                if self.filter.matches(&series.tags) && !visit(NO_ORDINAL, series) {
                    return Ok(false);
                }
            }
        }
        self.stop.check()?;
        Ok(true)
    }
}

/// The matchers of a selection that are not for the name, by which metrics were chosen.
fn tags_of(selection: &Selection) -> impl Iterator<Item = &Matcher> {
    selection.matchers.iter().filter(|m| m.name() != METRIC_NAME)
}

/// Whether a matcher holds for a value of an index. Denies everything once the query is to stop, which whoever asked
/// looks at afterwards.
fn holds(stop: &Stop) -> impl FnMut(&Matcher, &str) -> bool {
    let mut pace = stop.pace();
    move |m: &Matcher, value: &str| pace.step(16 << 10).is_ok() && m.matches(value)
}

/// The tag parts of the days in which the table has files with rows in the range.
fn parts_in_range(version: &Version, table: &TableVersion, start_ms: i64, end_ms: i64) -> Vec<Arc<TagPart>> {
    let files = table.files.iter().filter(|f| f.ts_min <= end_ms && f.ts_max >= start_ms);
    let days: HashSet<i32> = files.map(|f| f.day).collect();
    let (first, last) = (day_of(start_ms), day_of(end_ms));
    version.parts.iter().filter(|p| days.contains(&p.day) && (first..=last).contains(&p.day)).cloned().collect()
}

/// The metric name that the only matcher of names asks for; an empty one means sets without a name and is no lookup.
pub(crate) fn exact_name(matchers: &[Matcher]) -> Option<&str> {
    let mut names = matchers.iter().filter(|m| m.name() == METRIC_NAME);
    let name = names.next().filter(|m| m.op() == MatchOp::Eq && !m.value().is_empty())?;
    names.next().is_none().then(|| name.value())
}

/// Matchers of names, and the stop that they look at.
struct Names<'a> {
    matchers: Vec<&'a Matcher>,
    stop: &'a Stop,
    /// Names are looked at by several threads.
    asked: AtomicUsize,
}

impl<'a> Names<'a> {
    fn of(matchers: &'a [Matcher], stop: &'a Stop) -> Self {
        let matchers = matchers.iter().filter(|m| m.name() == METRIC_NAME).collect();
        Self { matchers, stop, asked: AtomicUsize::new(0) }
    }

    /// Whether all hold; none does once the query is to stop, which whoever asked looks at afterwards.
    fn want(&self, name: &str) -> bool {
        const MATCHES_AT_A_TIME: usize = 256;
        let look = (MATCHES_AT_A_TIME / self.matchers.len().max(1)).max(1);
        let asked = self.asked.fetch_add(1, Ordering::Relaxed);
        (!asked.is_multiple_of(look) || self.stop.check().is_ok()) && self.matchers.iter().all(|m| m.matches(name))
    }
}

/// Matchers in the order of their cost, with what regular expressions said of values seen before.
pub(crate) struct Filter<'a> {
    cheap: Vec<&'a Matcher>,
    dear: Vec<(&'a Matcher, HashMap<String, bool, foldhash::fast::RandomState>)>,
}

/// Distinct values remembered per regular expression.
const REMEMBERED_MAX: usize = 64 << 10;

impl<'a> Filter<'a> {
    pub fn new(matchers: impl Iterator<Item = &'a Matcher>) -> Self {
        let (cheap, dear): (Vec<_>, Vec<_>) = matchers.partition(|m| matches!(m.op(), MatchOp::Eq | MatchOp::Ne));
        Self { cheap, dear: dear.into_iter().map(|m| (m, HashMap::default())).collect() }
    }

    /// Whether all hold.
    pub fn matches(&mut self, tags: &TagSet) -> bool {
        if !self.cheap.iter().all(|m| m.matches_set(tags)) {
            return false;
        }
        self.dear.iter_mut().all(|(m, seen)| {
            let value = tags.get(m.name()).unwrap_or("");
            if let Some(known) = seen.get(value) {
                return *known;
            }
            let matches = m.matches(value);
            if seen.len() < REMEMBERED_MAX {
                seen.insert(value.to_owned(), matches);
            }
            matches
        })
    }
}
