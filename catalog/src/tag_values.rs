//! The values of one tag in many tag sets, sorted: what label pickers ask for.
//!
//! A part of a day never changes, so its values are kept once they were gathered; of active sets [`Known`] remembers how
//! far it has looked, so that asking again costs what came since.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use foldhash::fast::RandomState;

use crate::slots::Slots;
use crate::{Series, TagSet};

/// Distinct values of one tag, sorted by their bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TagValues {
    sorted: Vec<Box<str>>,
    /// Of all values.
    bytes: usize,
}

impl TagValues {
    /// The values that `sets` have for `tag`; a set without it has none.
    pub fn gather<'a>(tag: &str, sets: impl Iterator<Item = &'a Arc<Series>>) -> Self {
        Self::default().and(tag, sets.map(|s| &s.tags))
    }

    /// These and those of further sets.
    fn and<'a>(&self, tag: &str, sets: impl Iterator<Item = &'a TagSet>) -> Self {
        let mut new: BTreeSet<&str> = BTreeSet::new();
        let mut previous = "";
        for value in sets.filter_map(|tags| tags.get(tag)) {
            // Neighbours are often alike.
            if value != previous && self.sorted.binary_search_by(|v| (**v).cmp(value)).is_err() {
                new.insert(value);
            }
            previous = value;
        }
        let mut out = self.clone();
        out.bytes += new.iter().map(|v| v.len()).sum::<usize>();
        out.sorted.extend(new.into_iter().map(Box::from));
        // Two sorted runs, which the sort takes as they are.
        out.sorted.sort();
        out
    }

    /// The values, sorted.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &str> {
        self.sorted.iter().map(|v| &**v)
    }

    /// Bytes in memory.
    pub fn memory(&self) -> usize {
        self.bytes + self.sorted.len() * size_of::<Box<str>>()
    }
}

/// Most tags whose values are remembered for active sets, and most bytes of each: ids of requests or users are not what
/// pickers show.
const TAGS_MAX: usize = 32;
const TAG_BYTES_MAX: usize = 1 << 20;

/// Values of active sets, by tag.
#[derive(Debug, Default)]
pub(crate) struct Known {
    tags: HashMap<String, (Arc<TagValues>, Seen), RandomState>,
}

/// Which sets were looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Seen {
    /// All below this ordinal.
    pub ordinals: usize,
    /// How often sets had been retired by then.
    pub retirements: u64,
}

impl Known {
    /// The values that the sets in `slots` have for `tag`.
    pub fn values(&mut self, tag: &str, slots: &Slots, retirements: u64) -> Arc<TagValues> {
        let now = Seen { ordinals: slots.len(), retirements };
        let (before, seen) = match self.tags.get(tag) {
            Some((values, seen)) if *seen == now => return values.clone(),
            // Values that only a retired set had must go.
            Some((values, seen)) if seen.retirements == retirements => (values.clone(), seen.ordinals),
            _ => (Arc::default(), 0),
        };
        let values = Arc::new(before.and(tag, slots.from(seen).map(|s| &s.tags)));
        if values.memory() > TAG_BYTES_MAX {
            self.tags.remove(tag);
            return values;
        }
        if self.tags.len() >= TAGS_MAX && !self.tags.contains_key(tag) {
            // Only a short cut: what is in use comes back.
            self.tags.clear();
        }
        self.tags.insert(tag.to_owned(), (values.clone(), now));
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tag::tag_set;
    use crate::{Registry, TagHasher};

    fn seen(values: &TagValues) -> Vec<&str> {
        values.iter().collect()
    }

    #[test]
    fn values_follow_the_active_sets() {
        let registry = Registry::new(TagHasher::new(1), 1_000_000);
        let publish = |pairs: &[(&str, &str)], minute| {
            let series = Arc::new(Series::new(registry.hasher(), tag_set(pairs).unwrap()));
            registry.publish(&series, &[], minute).unwrap()
        };
        assert!(seen(&registry.values("pod")).is_empty());
        publish(&[("__name__", "a"), ("pod", "p2")], 0);
        publish(&[("__name__", "a")], 0);
        publish(&[("__name__", "b"), ("pod", "p2")], 0);
        assert_eq!(seen(&registry.values("pod")), ["p2"]);
        assert_eq!(seen(&registry.values("__name__")), ["a", "b"]);
        publish(&[("__name__", "a"), ("pod", "p3")], 9);
        publish(&[("__name__", "a"), ("pod", "p1")], 9);
        assert_eq!(seen(&registry.values("pod")), ["p1", "p2", "p3"]);
        assert!(Arc::ptr_eq(&registry.values("pod"), &registry.values("pod")), "nothing is gathered twice");
        assert_eq!(registry.retire(9, 5, |_| true), 3);
        assert_eq!(seen(&registry.values("pod")), ["p1", "p3"]);
        assert!(seen(&registry.values("x")).is_empty());
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let registry = Registry::new(TagHasher::new(1), 1_000_000);
        let mut known = Known::default();
        let long = "x".repeat(300);
        for i in 0..5000 {
            let pairs = [("__name__", "a"), ("id", &format!("{i:05}{long}")), ("zone", ["b", "a"][i % 2])];
            let series = Arc::new(Series::new(registry.hasher(), tag_set(&pairs).unwrap()));
            registry.publish(&series, &[], 0).unwrap();
        }
        registry.with_slots(|slots| {
            assert_eq!(known.values("id", slots, 0).iter().len(), 5000);
            assert_eq!(seen(&known.values("zone", slots, 0)), ["a", "b"]);
            assert_eq!(known.tags.len(), 1, "over a megabyte of one tag is not kept");
            for i in 0..100 {
                known.values(&i.to_string(), slots, 0);
            }
        });
        assert!(known.tags.len() <= TAGS_MAX);
    }
}
