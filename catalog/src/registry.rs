//! The tag sets that are active on this node: code ↔ ordinal ↔ labels, in memory.
//!
//! Decoders read it concurrently; only the log's committer publishes, in log order, so that a row can never become
//! durable before the tag set that it refers to. An ordinal is dense, is never reused while the process lives, and
//! means nothing outside of it.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::{Mutex, RwLock};

use crate::postings::{ActivePostings, Narrow};
use crate::slots::Slots;
use crate::tag::METRIC_NAME;
use crate::tag_values::Known;
use crate::wires::Wires;
use crate::{Code, Encoder, Error, Result, TagHasher, TagId, TagSet, TagSetBuilder, TagValues};

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
/// Wire forms that are remembered, on average, for each set.
const WIRES_PER_SET: usize = 8;
/// Wire forms that are remembered in any case.
const WIRES_MIN: usize = 1 << 16;

#[derive(Debug, Default)]
struct Shard {
    /// Code → (check, ordinal).
    sets: RwLock<HashedMap<i64, (i64, Ordinal)>>,
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
    bytes_max: usize,
    /// What sets and wire forms take, about.
    bytes: AtomicUsize,
    shards: Vec<Shard>,
    wires: RwLock<Wires>,
    slots: RwLock<Slots>,
    metrics: RwLock<HashedMap<i64, Metric>>,
    /// Values of tags that were asked for.
    known: Mutex<Known>,
    /// Sets by the values of tags that were asked for.
    postings: ActivePostings,
    /// How often sets have been retired.
    retirements: AtomicU64,
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
            bytes_max: usize::MAX,
            bytes: AtomicUsize::new(0),
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            wires: RwLock::default(),
            slots: RwLock::default(),
            metrics: RwLock::default(),
            known: Mutex::default(),
            postings: ActivePostings::default(),
            retirements: AtomicU64::new(0),
            len: AtomicUsize::new(0),
            refused: AtomicU64::new(0),
            collisions: AtomicU64::new(0),
        }
    }

    /// The same, which refuses new sets as well once all take so many bytes.
    #[must_use]
    pub fn with_bytes_max(self, bytes_max: usize) -> Self {
        Self { bytes_max, ..self }
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

    /// Bytes that all sets take, about.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Whether idle sets are to leave sooner than usual, since new ones soon find no room.
    pub fn is_pressed(&self) -> bool {
        self.bytes() >= self.bytes_max / 4 * 3
    }

    /// Refuses, and counts it, when there is no room for one more set beyond `more` that are about to be published.
    pub(crate) fn check_room(&self, more: usize) -> Result<()> {
        let (len, bytes) = (self.len(), self.bytes());
        if len + more >= self.limit {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return Err(Error::limit_exceeded(format!(
                "series limit reached: {len} series are active and series_limit allows {}",
                self.limit
            )));
        }
        if bytes + more * SET_BYTES >= self.bytes_max {
            self.refused.fetch_add(1, Ordering::Relaxed);
            // Idle sets make room for new ones: who sends this again is served in the end.
            return Err(Error::unavailable(format!(
                "{len} series are active and take {bytes} bytes; memory_limit allows {} until idle ones have left the memory",
                self.bytes_max
            )));
        }
        Ok(())
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

    /// An encoder for one request.
    pub fn encoder(&self) -> Encoder<'_> {
        Encoder::new(self)
    }

    fn shard(&self, hash: u64) -> &Shard {
        // The map takes the low bits for the bucket and the top seven to tell entries of a bucket apart, so a shard must
        // not have either in common.
        &self.shards[(hash >> 40) as usize % SHARDS]
    }

    /// The ordinal of a wire form seen before.
    pub fn lookup_wire(&self, wire: u128) -> Option<Ordinal> {
        self.wires.read().get(wire)
    }

    /// As [`Registry::lookup_wire`] for many, in their order, at a fraction of the cost of each.
    pub fn lookup_wires(&self, wires: &[u128]) -> Vec<Option<Ordinal>> {
        let known = self.wires.read();
        wires.iter().map(|wire| known.get(*wire)).collect()
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
    pub fn publish(&self, series: &Arc<Series>, wires: &[u128], second: u32) -> Result<Ordinal> {
        let ordinal = {
            let mut sets = self.shard(series.id.code.0 as u64).sets.write();
            match sets.entry(series.id.code.0) {
                Entry::Occupied(e) if e.get().0 == series.id.check => e.get().1,
                Entry::Occupied(_) => return Err(self.collision(series.id)),
                Entry::Vacant(e) => {
                    let ordinal = self.slots.write().push(series.clone(), second);
                    e.insert((series.id.check, ordinal));
                    self.len.fetch_add(1, Ordering::Relaxed);
                    self.bytes.fetch_add(bytes_of(series), Ordering::Relaxed);
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
        if !wires.is_empty() {
            let mut known = self.wires.write();
            // A sender whose labels come in ever new orders would fill the memory with forms of the same sets. They are
            // only a short cut, so they can be forgotten: those in use come back with the next request.
            if known.len() >= WIRES_MIN.max(WIRES_PER_SET * self.len()) {
                known.clear();
            }
            wires.iter().for_each(|wire| known.insert(*wire, ordinal));
        }
        Ok(ordinal)
    }

    /// The tag set of an ordinal; `None` once retired.
    pub fn get(&self, ordinal: Ordinal) -> Option<Arc<Series>> {
        self.slots.read().active(ordinal).cloned()
    }

    /// The tag sets of many ordinals, in their order; `None` for retired ones.
    pub fn get_many(&self, ordinals: &[Ordinal]) -> Vec<Option<Arc<Series>>> {
        let slots = self.slots.read();
        ordinals.iter().map(|o| slots.active(*o).cloned()).collect()
    }

    /// Notes that rows for these ordinals arrived in this second (since the epoch). Returns false when one of them has
    /// been retired since it was looked up, in which case the caller must refuse the rows for now.
    pub fn touch(&self, ordinals: impl IntoIterator<Item = Ordinal>, second: u32) -> bool {
        let slots = self.slots.read();
        let mut alive = true;
        for o in ordinals {
            alive &= slots.touch(o, second);
        }
        alive
    }

    /// Calls `visit` with every active set whose metric name satisfies `metric`, without copying any label; sets for which
    /// the matchers of `narrow` do not hold may be left out. Locks are held meanwhile: no closure may call the registry.
    pub fn for_each(
        &self,
        mut metric: impl FnMut(&str) -> bool,
        narrow: Option<&mut Narrow<'_>>,
        mut visit: impl FnMut(Ordinal, &Arc<Series>),
    ) {
        let metrics = self.metrics.read();
        let slots = self.slots.read();
        let found = narrow.and_then(|narrow| self.postings.narrowed(None, (&slots, self.len()), narrow));
        if let Some(found) = found {
            let mut named = |ordinal, series: &Arc<Series>| {
                if metric(series.tags.metric()) {
                    visit(ordinal, series);
                }
            };
            return visit_sets(&slots, &found, &mut named);
        }
        for m in metrics.values().filter(|m| metric(&m.name)) {
            visit_sets(&slots, &m.ordinals, &mut visit);
        }
    }

    /// As [`Registry::for_each`] for the one metric with this name.
    pub fn for_each_of(
        &self,
        metric: &str,
        narrow: Option<&mut Narrow<'_>>,
        mut visit: impl FnMut(Ordinal, &Arc<Series>),
    ) {
        let Ok(tags) = crate::tag::tag_set(&[(METRIC_NAME, metric)]) else { return };
        let code = self.hasher.id(tags.as_bytes()).code;
        let metrics = self.metrics.read();
        let Some(m) = metrics.get(&code.0) else { return };
        let slots = self.slots.read();
        let among = Some(m.ordinals.as_slice());
        let found = narrow.and_then(|narrow| self.postings.narrowed(among, (&slots, self.len()), narrow));
        visit_sets(&slots, found.as_deref().unwrap_or(&m.ordinals), &mut visit);
    }

    /// Bytes that the indexes of tags take, about.
    pub fn index_bytes(&self) -> usize {
        self.postings.bytes()
    }

    /// Bounds what the indexes of tags take anew.
    pub fn limit_indexes(&self, bytes: usize) {
        self.postings.limit(bytes);
    }

    /// The distinct values that the active sets have for a tag, sorted. Asked for again it costs what was published
    /// since.
    pub fn values(&self, tag: &str) -> Arc<TagValues> {
        let mut known = self.known.lock();
        self.with_slots(|slots| known.values(tag, slots, self.retirements()))
    }

    pub(crate) fn with_slots<T>(&self, work: impl FnOnce(&Slots) -> T) -> T {
        work(&self.slots.read())
    }

    /// Forgets sets without a row for `idle` seconds before `now` for which `may_retire` holds, and while new ones find
    /// little room ([`Registry::is_pressed`]) those that have been idle for longest until half is free; returns how many.
    /// A set last seen later than now, since the clock was set back, counts as seen now. Only the log's committer calls
    /// this, so no publication runs at the same time.
    pub fn retire(&self, now: u32, idle: u32, may_retire: impl Fn(Ordinal) -> bool) -> usize {
        let gone = {
            let mut slots = self.slots.write();
            let oldest = self.oldest_for_room(&slots, now, &may_retire).max(now.saturating_sub(idle));
            let gone = slots.retire(now, |ordinal, seen| seen < oldest && may_retire(ordinal));
            if !gone.is_empty() {
                // Readers that hold the slots are told by it whether what they saw is all there was.
                self.retirements.fetch_add(1, Ordering::Release);
            }
            gone
        };
        if gone.is_empty() {
            return 0;
        }
        let dead: std::collections::HashSet<Ordinal> = gone.iter().map(|g| g.0).collect();
        for (_, s) in &gone {
            self.shard(s.id.code.0 as u64).sets.write().remove(&s.id.code.0);
        }
        self.wires.write().retain(|o| !dead.contains(&o));
        let mut metrics = self.metrics.write();
        let touched: std::collections::HashSet<i64> = gone.iter().map(|(_, s)| s.metric.0).collect();
        for metric in touched {
            if let Some(m) = metrics.get_mut(&metric) {
                m.ordinals.retain(|o| !dead.contains(o));
                m.ordinals.shrink_to(2 * m.ordinals.len());
                if m.ordinals.is_empty() {
                    metrics.remove(&metric);
                }
            }
        }
        self.len.fetch_sub(gone.len(), Ordering::Relaxed);
        self.bytes.fetch_sub(gone.iter().map(|(_, s)| bytes_of(s)).sum(), Ordering::Relaxed);
        gone.len()
    }

    /// The second before which sets were seen last that must leave to make room; zero when there is room.
    fn oldest_for_room(&self, slots: &Slots, now: u32, may_retire: impl Fn(Ordinal) -> bool) -> u32 {
        if !self.is_pressed() {
            return 0;
        }
        let mut bytes_by_age: BTreeMap<u32, usize> = BTreeMap::new();
        for (ordinal, series, seen) in slots.iter() {
            if seen < now && may_retire(ordinal) {
                *bytes_by_age.entry(seen).or_default() += bytes_of(series);
            }
        }
        let (mut bytes, mut oldest) = (self.bytes(), 0);
        for (seen, of_age) in bytes_by_age {
            if bytes <= self.bytes_max / 2 {
                break;
            }
            bytes = bytes.saturating_sub(of_age);
            oldest = seen + 1;
        }
        oldest
    }

    /// How often sets have been forgotten. Unchanged after a look at the registry it says that every set was still there
    /// that was when it was asked first.
    pub fn retirements(&self) -> u64 {
        self.retirements.load(Ordering::Acquire)
    }
}

/// What a set takes besides its labels: itself, its places in the maps, and a wire form.
const SET_BYTES: usize = 320;

fn bytes_of(series: &Series) -> usize {
    SET_BYTES + series.tags.as_bytes().len()
}

/// Sets whose memory is fetched together.
const FETCH_AHEAD: usize = 32;

/// Shows the sets of these ordinals that are active.
fn visit_sets(slots: &Slots, ordinals: &[Ordinal], visit: &mut impl FnMut(Ordinal, &Arc<Series>)) {
    let active = |o: &Ordinal| slots.active(*o);
    for group in ordinals.chunks(FETCH_AHEAD) {
        // The sets of a metric come from many targets and lie far apart: one after another, the processor waits for
        // memory twice for each. Reading a group's pointers and then its bytes lets it wait for all at the same time
        // (20,000 sets: 10 ms before, 1.3 ms now).
        let lengths = group.iter().filter_map(active).fold(0, |all, s| all ^ s.tags.as_bytes().len());
        std::hint::black_box(lengths);
        let lines = group.iter().filter_map(active).flat_map(|s| s.tags.as_bytes().iter().step_by(64));
        std::hint::black_box(lines.fold(0, |all, b| all ^ b));
        for o in group {
            if let Some(series) = active(o) {
                visit(*o, series);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use crate::tag::tag_set;

    fn registry(limit: usize) -> Registry {
        Registry::new(TagHasher::new(1), limit)
    }

    fn series(r: &Registry, pairs: &[(&str, &str)]) -> Arc<Series> {
        Arc::new(Series::new(r.hasher(), tag_set(pairs).unwrap()))
    }

    fn of(r: &Registry, metric: &str) -> Vec<Ordinal> {
        let mut out = Vec::new();
        r.for_each_of(metric, None, |o, _| out.push(o));
        out
    }

    #[test]
    fn wire_forms_are_bounded() {
        let r = registry(10);
        let s = series(&r, &[("__name__", "up")]);
        for i in 0..200_000u64 {
            let wire = r.hasher().wire(1, &i.to_le_bytes());
            r.publish(&s, &[wire], 0).unwrap();
            assert_eq!(r.lookup_wire(wire), Some(0));
        }
        let kept = r.wires.read().len();
        assert!(kept <= WIRES_MIN, "{kept} forms of one set");
    }

    #[test]
    fn storage_order_is_of_name_then_target() {
        let r = registry(10);
        let code = |pairs: &[(&str, &str)]| r.hasher().id(tag_set(pairs).unwrap().as_bytes()).code;
        let s = series(&r, &[("__name__", "up"), ("instance", "i"), ("job", "j"), ("x", "y")]);
        assert_eq!(s.metric, code(&[("__name__", "up")]));
        assert_eq!(s.target, code(&[("instance", "i"), ("job", "j")]));
        assert_eq!(s.storage_key(), (s.metric.0, s.target.0, s.id.code.0));
        assert_eq!(series(&r, &[("x", "y")]).target, code(&[]));
    }

    #[test]
    fn published_sets_are_found() {
        let r = registry(10);
        let (a, b) = (series(&r, &[("__name__", "a")]), series(&r, &[("__name__", "b"), ("k", "v")]));
        assert_eq!(r.lookup(a.id).unwrap(), None);
        assert_eq!(r.publish(&a, &[7], 0).unwrap(), 0);
        assert_eq!(r.publish(&b, &[8, 9], 0).unwrap(), 1);
        assert_eq!(r.publish(&a, &[10], 0).unwrap(), 0, "twice is harmless");
        assert_eq!((r.len(), r.ordinals(), r.is_empty()), (2, 2, false));
        let wires: Vec<_> = [7, 8, 9, 10, 11].iter().map(|w| r.lookup_wire(*w)).collect();
        assert_eq!(wires, [Some(0), Some(1), Some(1), Some(0), None]);
        assert!(Arc::ptr_eq(&r.get(1).unwrap(), &b));
        assert_eq!(r.get_many(&[1, 5, 0]).iter().map(Option::is_some).collect::<Vec<_>>(), [true, false, true]);
        assert_eq!((of(&r, "a"), of(&r, "b"), of(&r, "c")), (vec![0], vec![1], vec![]));
        let mut names = Vec::new();
        r.for_each(|m| m > "a", None, |_, s| names.push(s.tags.metric().to_owned()));
        assert_eq!(names, ["b"]);
    }

    #[test]
    fn a_collision_is_seen() {
        let r = registry(10);
        let a = series(&r, &[("__name__", "a")]);
        r.publish(&a, &[], 0).unwrap();
        let mut other = (*series(&r, &[("__name__", "b")])).clone();
        other.id.code = a.id.code;
        assert!(r.lookup(other.id).is_err());
        assert!(r.publish(&Arc::new(other), &[], 0).is_err());
        assert_eq!((r.collisions(), r.len()), (2, 1));
    }

    #[test]
    fn the_oldest_make_room() {
        let r = registry(1000).with_bytes_max(100 * SET_BYTES);
        for i in 0..60u32 {
            r.publish(&series(&r, &[("i", &i.to_string())]), &[], i).unwrap();
        }
        assert!(!r.is_pressed());
        assert_eq!((r.retire(1000, 7200, |_| true), r.retirements()), (0, 0));
        for i in 60..90u32 {
            r.publish(&series(&r, &[("i", &i.to_string())]), &[], i).unwrap();
        }
        assert!(r.is_pressed());
        let refused = r.check_room(9).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unavailable);
        // One that a memtable holds stays.
        assert!(r.retire(1000, 7200, |o| o != 5) > 40);
        assert!(r.bytes() <= 50 * SET_BYTES);
        assert_eq!(r.retirements(), 1);
        assert!(r.get(5).is_some() && r.get(4).is_none() && r.get(6).is_none() && r.get(89).is_some());
        r.check_room(9).unwrap();
    }

    #[test]
    fn idle_sets_retire() {
        let r = registry(10);
        for (i, name) in ["a", "b", "c"].iter().enumerate() {
            r.publish(&series(&r, &[("__name__", name)]), &[i as u128], 5).unwrap();
        }
        assert!(r.touch([0], 9));
        assert_eq!(r.retire(9, 4, |_| true), 0, "seen in that second");
        assert_eq!(r.retire(9, 0, |o| o != 1), 1);
        assert_eq!((r.len(), of(&r, "a"), of(&r, "b"), of(&r, "c")), (2, vec![0], vec![1], vec![]));
        assert_eq!((r.lookup_wire(2), r.get(2).is_none()), (None, true));
        assert!(!r.touch([0, 2], 10));
        let c = series(&r, &[("__name__", "c")]);
        assert_eq!(r.lookup(c.id).unwrap(), None);
        assert_eq!(r.publish(&c, &[], 11).unwrap(), 3, "a number is never given twice");
        // The clock was wrong and is set back by years.
        assert!(r.touch([0, 1, 3], 70_000_000));
        assert_eq!(r.retire(20, 10, |_| true), 0);
        assert_eq!(r.retire(31, 10, |_| true), 3);
    }

    #[test]
    fn shards_share_no_bits_with_their_maps() {
        let r = registry(10);
        let position = |hash: u64| r.shards.iter().position(|s| std::ptr::eq(s, r.shard(hash)));
        for bit in (0..32).chain(57..64) {
            assert_eq!(position(0), position(1 << bit), "bit {bit}");
        }
    }

    #[test]
    fn decoders_and_the_committer_run_at_once() {
        let r = registry(100_000);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while r.len() < 2000 {
                        let mut n = 0;
                        r.for_each(|_| true, None, |_, s| n += s.tags.as_bytes().len());
                        for o in 0..r.ordinals() as Ordinal {
                            let s = r.get(o).unwrap();
                            assert_eq!(r.lookup(s.id).unwrap(), Some(o));
                        }
                    }
                });
            }
            for i in 0..2000 {
                let host = i.to_string();
                let s = series(&r, &[("__name__", ["a", "b", "c"][i % 3]), ("host", &host)]);
                assert_eq!(r.publish(&s, &[i as u128], 0).unwrap(), i as Ordinal);
            }
        });
        assert_eq!(of(&r, "a").len() + of(&r, "b").len() + of(&r, "c").len(), 2000);
    }
}
