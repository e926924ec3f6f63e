//! From matchers to the set of series that a scan reads.
//!
//! Tag sets come from two places: rows in memory refer to active sets, which the registry knows, and rows in files to sets
//! in the tag parts of their day. Both are asked only when the data in the time range can need them.

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
    tag_parts,
};

use crate::engine::Inner;
use crate::memory::Kind;
use crate::segment::{Key, Segments, day_of};
use crate::snapshot::{Snapshot, View};
use crate::version::{TableVersion, Version};
use crate::{Reservation, Stop};

/// What a series takes in a set and while it is made, the shared tag set aside.
const SERIES_BYTES: usize = 80;
/// Memory is reserved for so many series at a time.
const SERIES_AT_A_TIME: usize = 1024;

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
    let (mut memory, mut reserved) = (inner.memory.reserve(Kind::Queries), Ok(()));
    let sources = Sources::find(inner, &version, (selection, stop), &mut memory).await?;
    let mut found: Vec<(Key, Ordinal, Arc<Series>)> = Vec::new();
    let (mut candidates, mut full) = (0, false);
    let series_max = inner.settings.query_series_max;
    sources.for_each(view, (selection, stop), &mut candidates, |ordinal, series| {
        // An active set may come again from tag parts.
        full = found.len() >= series_max.saturating_mul(2);
        if found.len().is_multiple_of(SERIES_AT_A_TIME) {
            reserved = memory.grow(SERIES_AT_A_TIME * SERIES_BYTES);
        }
        let go_on = !full && reserved.is_ok();
        if go_on {
            found.push((Key::from(series.as_ref()), ordinal, series.clone()));
        }
        go_on
    })?;
    drop(sources);
    reserved.map_err(too_much)?;
    // An active set sorts before its copies from tag parts, which have no ordinal.
    found.sort_unstable_by_key(|(key, ordinal, _)| (*key, *ordinal));
    found.dedup_by_key(|(key, ..)| *key);
    if full || found.len() > series_max {
        return Err(Error::limit_exceeded(format!(
            "query selects more than {series_max} series; narrow its matchers or its time range"
        )));
    }
    // Sets that are not active may be held by this one alone.
    let own = found.iter().filter(|(_, ordinal, _)| *ordinal == NO_ORDINAL).count();
    memory.shrink_to(found.len() * SERIES_BYTES + own * tag_parts::SET_BYTES);
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
    loop {
        let present = Present::of(inner);
        let version = view.version()?;
        let mut memory = inner.memory.reserve(Kind::Queries);
        let sources = Sources::find(inner, &version, (selection, stop), &mut memory).await?;
        let mut go_on = true;
        sources.for_each(view, (selection, stop), &mut 0, |_, series| {
            go_on = !seen.insert(series.id.code.0) || visit(series);
            go_on
        })?;
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

/// The places to look for tag sets.
struct Sources {
    active: bool,
    parts: Vec<MetricSets>,
}

impl Sources {
    /// Reserves memory for what has to be read.
    async fn find(
        inner: &Inner,
        version: &Version,
        (selection, stop): (&Selection, &Stop),
        memory: &mut Reservation,
    ) -> Result<Self> {
        let mut admit = |bytes| memory.grow(bytes).map_err(too_much);
        let none = Self { active: false, parts: vec![] };
        let (start, end) = (kept_from(version, &selection.table, selection.start_ms), selection.end_ms);
        let Some(table) = version.table(selection.table.id).filter(|_| start <= end) else { return Ok(none) };
        let parts = parts_in_range(version, table, start, end);
        let names = Names::of(&selection.matchers, stop);
        let parts = if parts.is_empty() {
            vec![]
        } else if let Some(name) = exact_name(&selection.matchers) {
            inner.parts.load(&parts, MetricFilter::Eq(name), &mut admit).await?
        } else if names.matchers.is_empty() {
            inner.parts.load(&parts, MetricFilter::All, &mut admit).await?
        } else {
            let wanted = |name: &str| names.want(name);
            inner.parts.load(&parts, MetricFilter::Where(&wanted), &mut admit).await?
        };
        stop.check()?;
        Ok(Self { active: table.memtables().any(|m| m.overlaps(start, end)), parts })
    }

    /// Calls `visit` with the sets that match, active ones with their ordinal first; a set may come more than once.
    fn for_each(
        &self,
        view: View<'_>,
        (selection, stop): (&Selection, &Stop),
        candidates: &mut usize,
        mut visit: impl FnMut(Ordinal, &Arc<Series>) -> bool,
    ) -> Result<()> {
        let inner = view.inner;
        // Names were matched when the metrics were chosen.
        let tags = || selection.matchers.iter().filter(|m| m.name() != METRIC_NAME);
        let mut filter = Filter::new(tags());
        stop.check()?;
        let mut pace = stop.pace();
        // A matcher looks for its tag; a regular expression that is large looks at each letter many times.
        let cost = 64 * (1 + filter.cheap.len()) + (16 << 10) * filter.dear.len();
        let mut stopped = Ok(());
        let mut go_on = true;
        let name = exact_name(&selection.matchers);
        let names = Names::of(&selection.matchers, stop);
        // What stops while an index is asked is seen below.
        let mut asked = stop.pace();
        let mut holds = |m: &Matcher, value: &str| asked.step(16 << 10).is_ok() && m.matches(value);
        let mut narrow = Narrow::new(tags(), &mut holds);
        if self.active {
            let mut each = |ordinal, series: &Arc<Series>| {
                if !view.knows(ordinal) {
                    return;
                }
                *candidates += 1;
                if go_on && let Err(e) = pace.step(cost) {
                    (stopped, go_on) = (Err(e), false);
                }
                if go_on && filter.matches(&series.tags) {
                    go_on = visit(ordinal, series);
                }
            };
            match name {
                Some(name) => inner.registry.for_each_of(name, Some(&mut narrow), &mut each),
                None => inner.registry.for_each(|m| names.want(m), Some(&mut narrow), &mut each),
            }
        }
        for part in &self.parts {
            let narrowed = inner.parts.narrowed(part, &mut narrow);
            let (all, some) = match &narrowed {
                None => (&part[..], &[][..]),
                Some(some) => (&[][..], &some[..]),
            };
            for series in all.iter().chain(some.iter().map(|at| &part[*at as usize])) {
                if !go_on {
                    break;
                }
                *candidates += 1;
                pace.step(cost)?;
                if filter.matches(&series.tags) {
                    go_on = visit(NO_ORDINAL, series);
                }
            }
        }
        stopped?;
        stop.check()
    }
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
