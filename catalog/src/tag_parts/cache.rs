//! What was read from parts, bounded by bytes; the longest unused goes first.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::read::Index;
use crate::postings::{Made, Postings};
use crate::{Series, TagValues};

/// A part's id, and what of it.
pub(super) type Key = (i64, What);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum What {
    Index,
    /// The sets of the metric with this number.
    Sets(u32),
    /// The values of this tag.
    Values(Arc<str>),
    /// The index of this tag in the sets of the metric with this number.
    Postings(u32, Arc<str>),
}

#[derive(Debug, Clone)]
pub(super) enum Entry {
    Index(Arc<Index>),
    Sets(Arc<Vec<Arc<Series>>>),
    Values(Arc<TagValues>),
    Postings(Made<Arc<Postings>>),
}

#[derive(Debug)]
struct Slot {
    entry: Entry,
    bytes: usize,
    used: u64,
}

#[derive(Debug)]
pub(super) struct Cache {
    limit: usize,
    bytes: usize,
    clock: u64,
    slots: HashMap<Key, Slot, foldhash::fast::FixedState>,
    /// Time of last use → key; times are unique.
    order: BTreeMap<u64, Key>,
}

impl Cache {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, bytes: 0, clock: 0, slots: HashMap::default(), order: BTreeMap::new() }
    }

    /// Holds at most so many bytes from now on.
    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
        self.trim(0);
    }

    /// Makes room for so many bytes.
    fn trim(&mut self, bytes: usize) {
        while self.bytes + bytes > self.limit {
            let Some(oldest) = self.order.first_key_value().map(|(_, key)| key.clone()) else { break };
            self.remove(&oldest);
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn index(&mut self, part: i64) -> Option<Arc<Index>> {
        match self.get(&(part, What::Index)) {
            Some(Entry::Index(index)) => Some(index),
            _ => None,
        }
    }

    pub(super) fn sets(&mut self, part: i64, metric: u32) -> Option<Arc<Vec<Arc<Series>>>> {
        match self.get(&(part, What::Sets(metric))) {
            Some(Entry::Sets(sets)) => Some(sets),
            _ => None,
        }
    }

    pub(super) fn values(&mut self, part: i64, tag: &Arc<str>) -> Option<Arc<TagValues>> {
        match self.get(&(part, What::Values(tag.clone()))) {
            Some(Entry::Values(values)) => Some(values),
            _ => None,
        }
    }

    /// The index of a tag; `None` when it was not asked for before.
    pub(super) fn postings(&mut self, part: i64, metric: u32, tag: &Arc<str>) -> Option<Made<Arc<Postings>>> {
        match self.get(&(part, What::Postings(metric, tag.clone()))) {
            Some(Entry::Postings(made)) => Some(made),
            _ => None,
        }
    }

    /// Keeps the index of a tag, or that there is none.
    pub(super) fn put_postings(&mut self, part: i64, metric: u32, tag: Arc<str>, made: Made<Arc<Postings>>) {
        let (made, bytes) = match made {
            Made::Ready(postings) if postings.bytes() <= self.limit / 4 => {
                let bytes = postings.bytes();
                (Made::Ready(postings), bytes)
            }
            Made::Ready(_) | Made::Dear => (Made::Dear, size_of::<Slot>()),
            Made::Asked => (Made::Asked, size_of::<Slot>()),
        };
        self.put((part, What::Postings(metric, tag)), Entry::Postings(made), bytes);
    }

    fn get(&mut self, key: &Key) -> Option<Entry> {
        let slot = self.slots.get_mut(key)?;
        self.clock += 1;
        self.order.remove(&slot.used);
        self.order.insert(self.clock, key.clone());
        slot.used = self.clock;
        Some(slot.entry.clone())
    }

    /// Keeps an entry of this size, unless it alone exceeds the limit.
    pub(super) fn put(&mut self, key: Key, entry: Entry, bytes: usize) {
        if bytes > self.limit {
            return;
        }
        self.remove(&key);
        self.trim(bytes);
        self.clock += 1;
        self.bytes += bytes;
        self.order.insert(self.clock, key.clone());
        self.slots.insert(key, Slot { entry, bytes, used: self.clock });
    }

    fn remove(&mut self, key: &Key) {
        if let Some(slot) = self.slots.remove(key) {
            self.order.remove(&slot.used);
            self.bytes -= slot.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longest_unused_goes_first() {
        let mut cache = Cache::new(100);
        let entry = || Entry::Sets(Arc::new(Vec::new()));
        for metric in 0..3 {
            cache.put((1, What::Sets(metric)), entry(), 40);
        }
        let held = |cache: &mut Cache| (0..4).filter(|m| cache.sets(1, *m).is_some()).collect::<Vec<_>>();
        assert_eq!(held(&mut cache), [1, 2]);
        assert!(cache.sets(1, 1).is_some());
        cache.put((1, What::Sets(3)), entry(), 60);
        assert_eq!(held(&mut cache), [1, 3]);
        cache.put((1, What::Sets(3)), entry(), 10);
        assert_eq!((held(&mut cache), cache.bytes()), (vec![1, 3], 50));
        cache.put((2, What::Index), entry(), 101);
        assert!(cache.index(2).is_none());
        cache.set_limit(45);
        assert_eq!((held(&mut cache), cache.bytes()), (vec![3], 10));
        assert_eq!(cache.slots.len(), cache.order.len());
    }
}
