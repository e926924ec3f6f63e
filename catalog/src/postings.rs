//! Which of many tag sets have which value of a tag, so that a matcher that holds for few of them looks at few.
//!
//! An index is of one tag and of one list of sets, which it names by their positions. It is made when a tag is asked for
//! again: to look at all sets once is cheaper. An index narrows a search and decides nothing, so what it names may
//! be too much: every set that is named is matched all the same.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use foldhash::fast::RandomState;
use parking_lot::RwLock;

use crate::registry::Ordinal;
use crate::slots::Slots;
use crate::{MatchOp, Matcher, Series};

/// Fewer sets than this are looked at one by one.
const WORTH: usize = 256;

/// Matchers that must all hold, and how to find out whether one holds for a value.
pub struct Narrow<'a> {
    matchers: Vec<&'a Matcher>,
    holds: &'a mut (dyn FnMut(&Matcher, &str) -> bool + 'a),
}

impl std::fmt::Debug for Narrow<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Narrow").field("matchers", &self.matchers).finish_non_exhaustive()
    }
}

impl<'a> Narrow<'a> {
    /// Those of some matchers that no set without the tag satisfies. `holds` may deny everything once the answer is not
    /// wanted any more.
    pub fn new(
        matchers: impl Iterator<Item = &'a Matcher>,
        holds: &'a mut (dyn FnMut(&Matcher, &str) -> bool + 'a),
    ) -> Self {
        let positive = |m: &&Matcher| matches!(m.op(), MatchOp::Eq | MatchOp::Re) && !m.matches("");
        let mut matchers: Vec<&Matcher> = matchers.filter(positive).collect();
        // What is cheap to find makes it easier to see that the rest is not worth it.
        matchers.sort_by_key(|m| m.values().is_none());
        Self { matchers, holds }
    }

    /// The positions that are in `among`, if given, and that all matchers may hold for, ascending; `None` when all `len`
    /// are as well looked at. `index` looks something up in the index of a tag if there is one.
    fn narrowed(
        &mut self,
        among: Option<&[u32]>,
        len: usize,
        mut index: impl FnMut(&str, &mut dyn FnMut(&Postings) -> Option<Vec<u32>>) -> Option<Vec<u32>>,
    ) -> Option<Vec<u32>> {
        let mut fewest = among.map_or(len, <[u32]>::len);
        if fewest < WORTH {
            return None;
        }
        let mut lists: Vec<Vec<u32>> = Vec::new();
        for m in &self.matchers {
            let found = index(m.name(), &mut |postings| postings.find(m, fewest, self.holds));
            if let Some(list) = found {
                fewest = fewest.min(list.len());
                lists.push(list);
            }
        }
        lists.sort_by_key(Vec::len);
        let (least, more) = lists.split_first()?;
        let others = || more.iter().map(Vec::as_slice).chain(among);
        let in_all = |at: &&u32| others().all(|list| list.binary_search(at).is_ok());
        Some(least.iter().filter(in_all).copied().collect())
    }
}

/// Positions by value.
#[derive(Debug, Default)]
pub(crate) struct Postings {
    by_value: BTreeMap<Box<str>, Vec<u32>>,
    positions: usize,
    bytes: usize,
}

/// What a value takes besides its text: its place in the tree, two allocations, a list.
const VALUE_BYTES: usize = 88;

impl Postings {
    /// The index of a list.
    pub fn of(tag: &str, sets: &[Arc<Series>]) -> Self {
        let mut out = Self::default();
        for (at, series) in sets.iter().enumerate() {
            out.add(series.tags.get(tag), at as u32);
        }
        out
    }

    /// Adds a set whose position is above all others.
    fn add(&mut self, value: Option<&str>, at: u32) {
        let Some(value) = value else { return };
        self.positions += 1;
        self.bytes += size_of::<u32>();
        if let Some(list) = self.by_value.get_mut(value) {
            list.push(at);
            return;
        }
        self.bytes += VALUE_BYTES + value.len();
        self.by_value.insert(value.into(), vec![at]);
    }

    /// Bytes in memory, about.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The positions of the sets for whose value a matcher holds, ascending; `None` when these are many of `otherwise` sets,
    /// or not found more easily than by looking at those.
    fn find(
        &self,
        matcher: &Matcher,
        otherwise: usize,
        holds: &mut dyn FnMut(&Matcher, &str) -> bool,
    ) -> Option<Vec<u32>> {
        let most = otherwise / 2;
        let mut out = Vec::new();
        let mut add = |list: &[u32]| {
            out.extend_from_slice(list);
            out.len() <= most
        };
        if let Some(values) = matcher.values() {
            let mut lists = values.iter().filter_map(|value| self.by_value.get(&**value));
            if !lists.all(|list| add(list)) {
                return None;
            }
        } else {
            let prefix = matcher.prefix();
            let from = (Bound::Included(&*prefix), Bound::Unbounded);
            let values = || self.by_value.range::<str, _>(from).take_while(|(value, _)| value.starts_with(&*prefix));
            if values().take(most + 1).count() > most {
                return None;
            }
            if !values().filter(|(value, _)| holds(matcher, value)).all(|(_, list)| add(list)) {
                return None;
            }
        }
        out.sort_unstable();
        // A pattern may name a value twice.
        out.dedup();
        Some(out)
    }
}

/// How far an index has come that is made when it is worth it.
#[derive(Debug, Clone, Default)]
pub(crate) enum Made<T> {
    /// It was asked for once.
    #[default]
    Asked,
    /// It would take too much memory.
    Dear,
    Ready(T),
}

/// The positions of a list that matchers may hold for; `None` for all. `index` has the indexes of the list.
pub(crate) fn narrowed_list(
    sets: &[Arc<Series>],
    narrow: &mut Narrow<'_>,
    mut index: impl FnMut(&str) -> Option<Arc<Postings>>,
) -> Option<Vec<u32>> {
    narrow.narrowed(None, sets.len(), |tag, look| look(&*index(tag)?))
}

/// Most tags with an index.
const TAGS_MAX: usize = 64;

/// The indexes of the active sets, whose positions are their ordinals. Sets that came since are added when an index is
/// asked for; those that left stay until they are half of it.
#[derive(Debug)]
pub(crate) struct ActivePostings {
    tags: RwLock<Tags>,
    bytes_max: AtomicUsize,
}

type Tags = HashMap<String, Arc<OfTag>, RandomState>;

#[derive(Debug, Default)]
struct OfTag {
    index: RwLock<Index>,
    bytes: AtomicUsize,
}

#[derive(Debug, Default)]
struct Index {
    made: Made<Postings>,
    /// All ordinals below this were looked at.
    seen: usize,
}

impl Default for ActivePostings {
    fn default() -> Self {
        Self { tags: RwLock::default(), bytes_max: AtomicUsize::new(usize::MAX) }
    }
}

impl ActivePostings {
    /// The ordinals among those given, or among all, that matchers may hold for; `None` when all are as well looked at.
    pub fn narrowed(
        &self,
        among: Option<&[Ordinal]>,
        (slots, active): (&Slots, usize),
        narrow: &mut Narrow<'_>,
    ) -> Option<Vec<Ordinal>> {
        narrow.narrowed(among, active, |tag, look| self.look(tag, (slots, active), look))
    }

    /// Bytes in memory, about.
    pub fn bytes(&self) -> usize {
        bytes_of(&self.tags.read())
    }

    /// Holds at most so many bytes from now on.
    pub fn limit(&self, bytes: usize) {
        self.bytes_max.store(bytes, Ordering::Relaxed);
        self.trim();
    }

    /// Forgets all when they take too much: they are only a short cut, and what is in use comes back.
    fn trim(&self) {
        if self.bytes() > self.bytes_max.load(Ordering::Relaxed) {
            self.tags.write().clear();
        }
    }

    fn look(
        &self,
        tag: &str,
        sets: (&Slots, usize),
        look: &mut dyn FnMut(&Postings) -> Option<Vec<u32>>,
    ) -> Option<Vec<u32>> {
        let known = self.tags.read().get(tag).cloned();
        let Some(of_tag) = known else {
            let mut tags = self.tags.write();
            if tags.len() >= TAGS_MAX {
                tags.clear();
            }
            tags.entry(tag.to_owned()).or_default();
            return None;
        };
        {
            let index = of_tag.index.read();
            match &index.made {
                Made::Ready(postings) if index.seen == sets.0.len() => return look(postings),
                // There may be more room by then.
                Made::Dear if sets.0.len() < index.seen.saturating_mul(2) => return None,
                _ => {}
            }
        }
        let mut index = of_tag.index.write();
        index.follow(tag, sets, self.bytes_max.load(Ordering::Relaxed) / 2);
        let (found, bytes) = match &index.made {
            Made::Ready(postings) => (look(postings), postings.bytes),
            _ => (None, 0),
        };
        of_tag.bytes.store(bytes, Ordering::Relaxed);
        drop(index);
        self.trim();
        found
    }
}

fn bytes_of(tags: &Tags) -> usize {
    tags.values().map(|of_tag| of_tag.bytes.load(Ordering::Relaxed)).sum()
}

impl Index {
    /// Adds the sets that came since, or makes it anew when half of it are sets that left.
    fn follow(&mut self, tag: &str, (slots, active): (&Slots, usize), bytes_max: usize) {
        let (mut postings, seen) = match std::mem::take(&mut self.made) {
            Made::Ready(postings) if postings.positions <= 2 * active.max(WORTH) => (postings, self.seen),
            _ => (Postings::default(), 0),
        };
        self.seen = slots.len();
        for (ordinal, series) in slots.numbered(seen) {
            postings.add(series.tags.get(tag), ordinal);
            if postings.bytes > bytes_max {
                self.made = Made::Dear;
                return;
            }
        }
        self.made = Made::Ready(postings);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tag::tag_set;
    use crate::{Registry, TagHasher};

    fn matchers(all: &[(&str, MatchOp, &str)]) -> Vec<Matcher> {
        all.iter().map(|(name, op, value)| Matcher::new(*name, *op, *value).unwrap()).collect()
    }

    /// What is looked at for matchers on sets of a metric with the tags `i`, the number, and `m`, its remainder by 100.
    fn looked_at(registry: &Registry, name: Option<&str>, all: &[(&str, MatchOp, &str)]) -> Vec<u32> {
        let all = matchers(all);
        let mut holds = |m: &Matcher, value: &str| m.matches(value);
        let mut narrow = Narrow::new(all.iter(), &mut holds);
        let mut out = Vec::new();
        match name {
            Some(name) => registry.for_each_of(name, Some(&mut narrow), |o, _| out.push(o)),
            None => registry.for_each(|_| true, Some(&mut narrow), |o, _| out.push(o)),
        }
        out.sort_unstable();
        out
    }

    fn publish(registry: &Registry, name: &str, i: usize) -> u32 {
        let (number, rest) = (i.to_string(), (i % 100).to_string());
        let pairs = [("__name__", name), ("i", &number), ("m", &rest), ("same", "x")];
        let series = Arc::new(Series::new(registry.hasher(), tag_set(&pairs).unwrap()));
        registry.publish(&series, &[], 0).unwrap()
    }

    #[test]
    fn few_of_many_are_looked_at() {
        use MatchOp::{Eq, Ne, Re};
        let registry = Registry::new(TagHasher::new(1), 1_000_000);
        for i in 0..2000 {
            publish(&registry, ["a", "b"][i / 1000], i);
        }
        let check = |name, all: &[(&str, MatchOp, &str)], expected: &[u32]| {
            assert_eq!(looked_at(&registry, name, all), expected, "{name:?} {all:?}");
        };
        assert_eq!(looked_at(&registry, Some("a"), &[("i", Eq, "7")]).len(), 1000, "the first look is at all");
        assert_eq!(looked_at(&registry, Some("a"), &[("m", Eq, "7")]).len(), 1000);
        assert_eq!(looked_at(&registry, Some("a"), &[("same", Eq, "x")]).len(), 1000);
        check(Some("a"), &[("i", Eq, "7")], &[7]);
        check(Some("b"), &[("i", Eq, "7")], &[]);
        check(None, &[("i", Eq, "7")], &[7]);
        check(Some("a"), &[("i", Re, "7|1007|9"), ("i", Ne, "9")], &[7, 9]);
        check(Some("a"), &[("i", Re, "99.+")], &(990..1000).collect::<Vec<_>>());
        check(Some("a"), &[("m", Re, "9[89]"), ("i", Re, "998.*")], &[998]);
        check(Some("a"), &[("m", Eq, "3"), ("i", Re, "3|103|104")], &[3, 103]);
        check(None, &[("m", Re, "3|3")], &(0..20).map(|i| 3 + 100 * i).collect::<Vec<_>>());
        check(Some("a"), &[("same", Eq, "x")], &(0..1000).collect::<Vec<_>>());
        check(Some("a"), &[("m", Eq, "nothing")], &[]);
        // Sets without the tag satisfy these.
        assert_eq!(looked_at(&registry, Some("a"), &[("m", Ne, "3"), ("m", Re, "3|")]).len(), 1000);
        assert_eq!(publish(&registry, "a", 2103), 2000);
        check(Some("a"), &[("m", Eq, "3"), ("i", Re, "3|2103")], &[3, 2000]);
    }

    #[test]
    fn sets_that_leave_leave_the_index() {
        let registry = Registry::new(TagHasher::new(1), 1_000_000);
        let of = |m: &str| looked_at(&registry, Some("a"), &[("m", MatchOp::Eq, m)]);
        for i in 0..1000 {
            publish(&registry, "a", i);
        }
        of("1");
        assert_eq!(of("1").len(), 10);
        let bytes = registry.index_bytes();
        assert_eq!(registry.retire(9, 5, |o| o >= 300), 700);
        assert_eq!(of("1"), [1, 101, 201]);
        assert_eq!(publish(&registry, "a", 2001), 1000);
        assert_eq!(of("1"), [1, 101, 201, 1000]);
        assert!(registry.index_bytes() < bytes, "gone ones are left out");
    }

    #[test]
    fn indexes_are_bounded() {
        let registry = Registry::new(TagHasher::new(1), 1_000_000);
        for i in 0..1000 {
            publish(&registry, "a", i);
        }
        let number = |n: &str| looked_at(&registry, Some("a"), &[("i", MatchOp::Eq, n)]).len();
        registry.limit_indexes(100_000);
        assert_eq!([number("1"), number("1"), number("1")], [1000; 3], "dear");
        let rest = || looked_at(&registry, Some("a"), &[("m", MatchOp::Eq, "1")]).len();
        assert_eq!([rest(), rest()], [1000, 10]);
        assert!((1..100_000).contains(&registry.index_bytes()));
        registry.limit_indexes(1000);
        assert_eq!(registry.index_bytes(), 0);
        registry.limit_indexes(1 << 30);
        assert_eq!([rest(), rest(), rest()], [1000, 10, 10]);
        for i in 0..1000 {
            looked_at(&registry, Some("a"), &[(&i.to_string(), MatchOp::Eq, "1")]);
        }
        assert_eq!([number("1"), number("1")], [1000, 1]);
    }

    #[test]
    fn a_look_that_is_not_wanted_any_more_ends() {
        let registry = Registry::new(TagHasher::new(1), 1_000_000);
        for i in 0..1000 {
            publish(&registry, "a", i);
        }
        let all = matchers(&[("m", MatchOp::Re, ".*7")]);
        for expected in [1000, 0] {
            let mut seen = 0;
            let mut no = |_: &Matcher, _: &str| false;
            let mut narrow = Narrow::new(all.iter(), &mut no);
            registry.for_each_of("a", Some(&mut narrow), |_, _| seen += 1);
            assert_eq!(seen, expected);
        }
    }
}
