//! A cache bounded by bytes that drops what was used longest ago.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

/// Values are cheap to clone (`Arc`s). Many readers, little contention: entries are whole footers and run indexes.
#[derive(Debug)]
pub(super) struct Cache<K, V> {
    limit: AtomicUsize,
    inner: Mutex<Inner<K, V>>,
}

#[derive(Debug)]
struct Inner<K, V> {
    entries: HashMap<K, Entry<V>>,
    bytes: usize,
    tick: u64,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    bytes: usize,
    used: u64,
}

impl<K: Hash + Eq + Copy, V: Clone> Cache<K, V> {
    pub fn new(limit: usize) -> Self {
        Self { limit: AtomicUsize::new(limit), inner: Mutex::new(Inner { entries: HashMap::new(), bytes: 0, tick: 0 }) }
    }

    pub fn get(&self, key: &K) -> Option<V> {
        let mut inner = self.inner.lock();
        inner.tick += 1;
        let tick = inner.tick;
        let entry = inner.entries.get_mut(key)?;
        entry.used = tick;
        Some(entry.value.clone())
    }

    pub fn insert(&self, key: K, value: V, bytes: usize) {
        let mut inner = self.inner.lock();
        inner.tick += 1;
        let used = inner.tick;
        inner.bytes += bytes;
        if let Some(old) = inner.entries.insert(key, Entry { value, bytes, used }) {
            inner.bytes -= old.bytes;
        }
        self.trim(&mut inner);
    }

    fn trim(&self, inner: &mut Inner<K, V>) {
        let limit = self.limit.load(Ordering::Relaxed);
        while inner.bytes > limit && inner.entries.len() > 1 {
            // Entries are few and insertions rare, so looking at all of them is cheaper than keeping a list.
            let Some(oldest) = inner.entries.iter().min_by_key(|(_, e)| e.used).map(|(k, _)| *k) else { return };
            if let Some(gone) = inner.entries.remove(&oldest) {
                inner.bytes -= gone.bytes;
            }
        }
    }

    /// Holds at most so many bytes from now on.
    pub fn set_limit(&self, limit: usize) {
        if self.limit.swap(limit, Ordering::Relaxed) > limit {
            self.trim(&mut self.inner.lock());
        }
    }

    /// Drops the entries for which `keep` is false.
    pub fn retain(&self, keep: impl Fn(&K) -> bool) {
        let mut inner = self.inner.lock();
        let mut freed = 0;
        inner.entries.retain(|k, e| {
            let stays = keep(k);
            freed += if stays { 0 } else { e.bytes };
            stays
        });
        inner.bytes -= freed;
    }

    /// Bytes of all entries.
    pub fn bytes(&self) -> usize {
        self.inner.lock().bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_what_was_used_longest_ago() {
        let cache = Cache::new(100);
        for k in 0..10 {
            cache.insert(k, k, 10);
        }
        assert_eq!((cache.get(&0), cache.bytes()), (Some(0), 100));
        cache.insert(10, 10, 15);
        assert_eq!((cache.get(&0), cache.get(&1), cache.get(&2), cache.get(&3)), (Some(0), None, None, Some(3)));
        cache.insert(10, 11, 5);
        assert_eq!((cache.get(&10), cache.bytes()), (Some(11), 85));
        cache.set_limit(30);
        assert_eq!((cache.get(&3), cache.get(&10), cache.bytes()), (Some(3), Some(11), 25));
        cache.set_limit(100);
        cache.retain(|k| *k == 10);
        assert_eq!((cache.get(&0), cache.bytes()), (None, 5));
        // One that is larger than the limit is kept until the next comes.
        cache.insert(99, 1, 1000);
        assert_eq!((cache.get(&99), cache.get(&10)), (Some(1), None));
    }
}
