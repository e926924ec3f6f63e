//! The tag sets that are active on this node: code ↔ ordinal ↔ labels, in memory.
//!
//! Decoders read it concurrently; only the log's committer publishes, in log order, so that a row can never become
//! durable before the tag set that it refers to. An ordinal is dense, is never reused while the process lives, and
//! means nothing outside of it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use parking_lot::RwLock;

use crate::tag::METRIC_NAME;
use crate::{Code, Encoder, Error, Result, TagHasher, TagId, TagSet, TagSetBuilder};

/// Dense number of an active tag set.
pub type Ordinal = u32;

/// A registered tag set.
#[derive(Debug, Clone)]
pub struct Series {
    /// Its identity.
    pub id: TagId,
    /// Code of the tag set that holds only the metric's name: first part of the storage order.
    pub metric: Code,
    /// Code of the tag set that holds only `job` and `instance`: second part of the storage order, so that series
    /// scraped together lie together.
    pub target: Code,
    /// Its labels.
    pub tags: TagSet,
}

impl Series {
    /// Computes identity and storage order of a tag set.
    pub fn new(hasher: &TagHasher, tags: TagSet) -> Self {
        let mut builder = TagSetBuilder::default();
        let mut part = |keys: &[&str]| {
            let mut pairs: Vec<(&str, &str)> = tags.iter().filter(|(k, _)| keys.contains(k)).collect();
            // A subset of a canonical list is canonical.
            builder.build(&mut pairs).map_or(Code(0), |b| hasher.id(b).code)
        };
        let (metric, target) = (part(&[METRIC_NAME]), part(&["instance", "job"]));
        Self { id: hasher.id(tags.as_bytes()), metric, target, tags }
    }

    /// The order of rows in files: (metric, target, series).
    pub fn storage_key(&self) -> (i64, i64, i64) {
        (self.metric.0, self.target.0, self.id.code.0)
    }
}

/// Keys that are hashes already need no second hash.
#[derive(Default)]
pub struct PassThrough(u64);

impl Hasher for PassThrough {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*b);
        }
    }
    fn write_u64(&mut self, v: u64) {
        self.0 = v;
    }
    fn write_i64(&mut self, v: i64) {
        self.0 = v as u64;
    }
    fn write_u128(&mut self, v: u128) {
        self.0 = v as u64;
    }
}

/// A map whose keys are hashes.
pub type HashedMap<K, V> = HashMap<K, V, BuildHasherDefault<PassThrough>>;

const SHARDS: usize = 64;

#[derive(Debug, Default)]
struct Shard {
    /// Code → (check, ordinal).
    sets: RwLock<HashedMap<i64, (i64, Ordinal)>>,
    /// Hash of a wire form → ordinal.
    wires: RwLock<HashedMap<u128, Ordinal>>,
}

#[derive(Debug)]
struct Slot {
    series: Option<Arc<Series>>,
    /// Minute of the last row, for retirement.
    seen: AtomicU32,
}

/// All active sets of one metric.
#[derive(Debug)]
struct Metric {
    name: String,
    ordinals: Vec<Ordinal>,
}

/// The active tag sets.
#[derive(Debug)]
pub struct Registry {
    hasher: TagHasher,
    limit: usize,
    shards: Vec<Shard>,
    slots: RwLock<Vec<Slot>>,
    metrics: RwLock<HashedMap<i64, Metric>>,
    len: AtomicUsize,
    refused: AtomicU64,
    collisions: AtomicU64,
}

impl Registry {
    /// An empty registry for the database with this hasher, which refuses new sets beyond `limit`.
    pub fn new(hasher: TagHasher, limit: usize) -> Self {
        Self {
            hasher,
            limit,
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            slots: RwLock::default(),
            metrics: RwLock::default(),
            len: AtomicUsize::new(0),
            refused: AtomicU64::new(0),
            collisions: AtomicU64::new(0),
        }
    }

    /// The database's hasher.
    pub fn hasher(&self) -> &TagHasher {
        &self.hasher
    }

    /// Active sets.
    pub fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed)
    }

    /// True without any active set.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The most active sets that are accepted.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Ordinals ever given: every ordinal is below this.
    pub fn ordinals(&self) -> usize {
        self.slots.read().len()
    }

    /// Sets refused at the limit since start.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Code collisions seen since start.
    pub fn collisions(&self) -> u64 {
        self.collisions.load(Ordering::Relaxed)
    }

    pub(crate) fn count_refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// An encoder for one request.
    pub fn encoder(&self) -> Encoder<'_> {
        Encoder::new(self)
    }

    fn shard(&self, hash: u64) -> &Shard {
        // The low bits choose the bucket inside the map.
        &self.shards[(hash >> 58) as usize % SHARDS]
    }

    /// The ordinal of a wire form seen before.
    pub fn lookup_wire(&self, wire: u128) -> Option<Ordinal> {
        self.shard(wire as u64).wires.read().get(&wire).copied()
    }

    /// The ordinal of a published tag set.
    ///
    /// # Errors
    /// `Internal` when another tag set with the same code is active (a collision of 64-bit hashes).
    pub fn lookup(&self, id: TagId) -> Result<Option<Ordinal>> {
        match self.shard(id.code.0 as u64).sets.read().get(&id.code.0) {
            None => Ok(None),
            Some((check, ordinal)) if *check == id.check => Ok(Some(*ordinal)),
            Some(_) => Err(self.collision(id)),
        }
    }

    fn collision(&self, id: TagId) -> Error {
        self.collisions.fetch_add(1, Ordering::Relaxed);
        Error::internal(format!("tag set code {:#018x} belongs to another tag set", id.code.0))
    }

    /// Makes a tag set known to all decoders and queries and gives it an ordinal; harmless when it is known already.
    /// `wires` are hashes of wire forms that mean this set. Only the log's committer and replay call this.
    ///
    /// # Errors
    /// `Internal` on a code collision.
    pub fn publish(&self, series: &Arc<Series>, wires: &[u128], minute: u32) -> Result<Ordinal> {
        let ordinal = {
            let mut sets = self.shard(series.id.code.0 as u64).sets.write();
            match sets.entry(series.id.code.0) {
                Entry::Occupied(e) if e.get().0 == series.id.check => e.get().1,
                Entry::Occupied(_) => return Err(self.collision(series.id)),
                Entry::Vacant(e) => {
                    let mut slots = self.slots.write();
                    let ordinal = slots.len() as Ordinal;
                    slots.push(Slot { series: Some(series.clone()), seen: AtomicU32::new(minute) });
                    drop(slots);
                    e.insert((series.id.check, ordinal));
                    self.len.fetch_add(1, Ordering::Relaxed);
                    let mut metrics = self.metrics.write();
                    metrics
                        .entry(series.metric.0)
                        .or_insert_with(|| Metric { name: series.tags.metric().to_owned(), ordinals: Vec::new() })
                        .ordinals
                        .push(ordinal);
                    ordinal
                }
            }
        };
        for wire in wires {
            self.shard(*wire as u64).wires.write().insert(*wire, ordinal);
        }
        Ok(ordinal)
    }

    /// The tag set of an ordinal; `None` once retired.
    pub fn get(&self, ordinal: Ordinal) -> Option<Arc<Series>> {
        self.slots.read().get(ordinal as usize)?.series.clone()
    }

    /// The tag sets of many ordinals, in their order; `None` for retired ones.
    pub fn get_many(&self, ordinals: &[Ordinal]) -> Vec<Option<Arc<Series>>> {
        let slots = self.slots.read();
        ordinals.iter().map(|o| slots.get(*o as usize).and_then(|s| s.series.clone())).collect()
    }

    /// Notes that rows for these ordinals arrived in this minute (since the epoch). Returns false when one of them has
    /// been retired since it was looked up, in which case the caller must refuse the rows for now.
    pub fn touch(&self, ordinals: impl IntoIterator<Item = Ordinal>, minute: u32) -> bool {
        let slots = self.slots.read();
        let mut alive = true;
        for o in ordinals {
            match slots.get(o as usize) {
                Some(slot) if slot.series.is_some() => slot.seen.store(minute, Ordering::Relaxed),
                _ => alive = false,
            }
        }
        alive
    }

    /// Calls `visit` with every active set whose metric name satisfies `metric`, without copying any label.
    pub fn for_each(&self, mut metric: impl FnMut(&str) -> bool, mut visit: impl FnMut(Ordinal, &Arc<Series>)) {
        let metrics = self.metrics.read();
        let slots = self.slots.read();
        for m in metrics.values().filter(|m| metric(&m.name)) {
            for o in &m.ordinals {
                if let Some(series) = &slots[*o as usize].series {
                    visit(*o, series);
                }
            }
        }
    }

    /// As [`Registry::for_each`] for the one metric with this name.
    pub fn for_each_of(&self, metric: &str, mut visit: impl FnMut(Ordinal, &Arc<Series>)) {
        let Ok(tags) = crate::tag::tag_set(&[(METRIC_NAME, metric)]) else { return };
        let code = self.hasher.id(tags.as_bytes()).code;
        let metrics = self.metrics.read();
        let Some(m) = metrics.get(&code.0) else { return };
        let slots = self.slots.read();
        for o in &m.ordinals {
            if let Some(series) = &slots[*o as usize].series {
                visit(*o, series);
            }
        }
    }

    /// Forgets sets without a row since `minute` for which `may_retire` holds; returns how many. Only the log's
    /// committer calls this, so no publication runs at the same time.
    pub fn retire(&self, minute: u32, may_retire: impl Fn(Ordinal) -> bool) -> usize {
        let mut gone: Vec<(Ordinal, Arc<Series>)> = Vec::new();
        {
            let mut slots = self.slots.write();
            for (o, slot) in slots.iter_mut().enumerate() {
                if slot.seen.load(Ordering::Relaxed) < minute && slot.series.is_some() && may_retire(o as Ordinal) {
                    gone.extend(slot.series.take().map(|s| (o as Ordinal, s)));
                }
            }
        }
        if gone.is_empty() {
            return 0;
        }
        let dead: std::collections::HashSet<Ordinal> = gone.iter().map(|g| g.0).collect();
        for (_, s) in &gone {
            self.shard(s.id.code.0 as u64).sets.write().remove(&s.id.code.0);
        }
        for shard in &self.shards {
            shard.wires.write().retain(|_, o| !dead.contains(o));
        }
        let mut metrics = self.metrics.write();
        for (_, s) in &gone {
            if let Some(m) = metrics.get_mut(&s.metric.0) {
                m.ordinals.retain(|o| !dead.contains(o));
                if m.ordinals.is_empty() {
                    metrics.remove(&s.metric.0);
                }
            }
        }
        self.len.fetch_sub(gone.len(), Ordering::Relaxed);
        gone.len()
    }
}
