//! One account of all memory.
//!
//! Whoever takes much memory says so first: request bodies, the queue of the log and queries hold [`Reservation`]s,
//! what grows as rows come in (memtables, tag sets, caches) is noted when it has changed. What the process really holds
//! beyond that is seen from outside, the more often the less there is left ([`crate::Engine::observe`]), and counts as
//! used as well.
//!
//! When memory gets scarce caches shrink and memtables are flushed early ([`Memory::is_scarce`]); then queries are
//! refused, the running one that asks for more first of all, and those that hold the most are ended
//! ([`Memory::is_short`]); then writes. What gives memory back, flushes above all, is never refused. An
//! account is a few atomic counters; a request changes them some times, a sample never.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use catalog::{Error, Result};
use datafusion::error::{DataFusionError, Result as DfResult};
use datafusion::execution::memory_pool::{MemoryLimit, MemoryPool, MemoryReservation};

/// What memory is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Bodies of requests in flight, as sent and inflated, and the rows that they become.
    Bodies,
    /// Requests that wait for the log.
    Queue,
    /// Rows that are not in files.
    Memtables,
    /// What is held for snapshots alone.
    Snapshots,
    /// Active tag sets, and metric metadata.
    TagSets,
    /// What caches hold.
    Caches,
    /// What running queries hold, and answers on their way.
    Queries,
    /// Files that flushes and compactions put together.
    Files,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 8] = [
        Self::Bodies,
        Self::Queue,
        Self::Memtables,
        Self::Snapshots,
        Self::TagSets,
        Self::Caches,
        Self::Queries,
        Self::Files,
    ];

    /// As metrics and errors name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bodies => "bodies",
            Self::Queue => "queue",
            Self::Memtables => "memtables",
            Self::Snapshots => "snapshots",
            Self::TagSets => "tag_sets",
            Self::Caches => "caches",
            Self::Queries => "queries",
            Self::Files => "files",
        }
    }

    /// How many sixteenths of the limit it may take, and up to where all of it may be used for it. A little is for
    /// small queries alone, so that large ones don't keep them out.
    fn share(self, small: bool) -> (usize, usize) {
        match self {
            Self::Queries if small => (9, SHORT),
            Self::Bodies | Self::Queue => (2, 16),
            Self::Queries => (8, 14),
            Self::Memtables | Self::Snapshots | Self::TagSets | Self::Caches | Self::Files => (16, 16),
        }
    }
}

/// Sixteenths of the limit from which on memory is scarce.
const SCARCE: usize = 12;
/// Sixteenths of the limit beyond which not even small queries go on.
const SHORT: usize = 15;
/// Sixteenths of the limit that tag sets may take: they stay for hours, so what they take is lost to all else.
const TAG_SETS: usize = 5;

/// Who holds less than this part of the limit is small.
const SMALL_PARTS: usize = 1024;

/// The account, or one query's view of it; cheap to clone.
#[derive(Debug, Clone)]
pub struct Memory {
    account: Arc<Account>,
    /// What is reserved through this view counts here as well.
    query: Option<Arc<OfQuery>>,
}

/// What one query holds.
#[derive(Debug)]
struct OfQuery {
    held: AtomicUsize,
    max: usize,
}

#[derive(Debug)]
struct Account {
    limit: usize,
    held: [AtomicUsize; Kind::ALL.len()],
    /// The sum of `held`.
    total: AtomicUsize,
    /// What the process held beyond `total` when it was last looked at.
    beyond: AtomicUsize,
    refused: [AtomicUsize; Kind::ALL.len()],
}

impl Memory {
    /// An account of so many bytes.
    pub fn new(limit: usize) -> Self {
        let account = Arc::new(Account {
            limit,
            held: Default::default(),
            total: AtomicUsize::new(0),
            beyond: AtomicUsize::new(0),
            refused: Default::default(),
        });
        Self { account, query: None }
    }

    /// The same account for one query, which may hold so many bytes of it at most.
    #[must_use]
    pub(crate) fn of_query(&self, max: usize) -> Self {
        Self { account: self.account.clone(), query: Some(Arc::new(OfQuery { held: AtomicUsize::new(0), max })) }
    }

    /// What the query holds whose view this is.
    pub(crate) fn held_by_query(&self) -> usize {
        self.query.as_ref().map_or(0, |query| query.held.load(Ordering::Relaxed))
    }

    /// What may be used in all.
    pub fn limit(&self) -> usize {
        self.account.limit
    }

    fn part(&self, sixteenths: usize) -> usize {
        self.account.limit / 16 * sixteenths
    }

    /// What is used in all.
    pub fn used(&self) -> usize {
        self.account.total.load(Ordering::Relaxed) + self.account.beyond.load(Ordering::Relaxed)
    }

    /// What one kind uses.
    pub fn held(&self, kind: Kind) -> usize {
        self.account.held[kind as usize].load(Ordering::Relaxed)
    }

    /// What the process holds beyond all kinds.
    pub fn beyond(&self) -> usize {
        self.account.beyond.load(Ordering::Relaxed)
    }

    /// How often a kind was refused memory.
    pub fn refused(&self, kind: Kind) -> usize {
        self.account.refused[kind as usize].load(Ordering::Relaxed)
    }

    /// Most bytes of one kind.
    pub fn max(&self, kind: Kind) -> usize {
        self.part(kind.share(false).0)
    }

    /// Most bytes of active tag sets before new ones are refused.
    pub fn tag_sets_max(&self) -> usize {
        self.part(TAG_SETS)
    }

    /// Whether memory is to be given back by whoever can.
    pub fn is_scarce(&self) -> bool {
        self.used() >= self.part(SCARCE)
    }

    /// What is left before queries are ended.
    pub(crate) fn left(&self) -> usize {
        self.part(SHORT).saturating_sub(self.used())
    }

    /// Whether running queries are to end, since more is used than they were given, and whether there is none left.
    pub(crate) fn is_short(&self) -> (bool, bool) {
        let used = self.used();
        (used > self.part(SHORT), used > self.limit())
    }

    /// Notes what the process holds, allocator's view: bytes that are allocated.
    pub(crate) fn observe(&self, allocated: usize) {
        let beyond = allocated.saturating_sub(self.account.total.load(Ordering::Relaxed));
        self.account.beyond.store(beyond, Ordering::Relaxed);
    }

    /// Notes what a kind uses that is not reserved.
    pub(crate) fn note(&self, kind: Kind, bytes: usize) {
        let before = self.account.held[kind as usize].swap(bytes, Ordering::Relaxed);
        // Wraps around when it is less than before, and the sum with it.
        self.account.total.fetch_add(bytes.wrapping_sub(before), Ordering::Relaxed);
    }

    /// An empty reservation.
    pub fn reserve(&self, kind: Kind) -> Reservation {
        Reservation { memory: self.clone(), kind, bytes: 0 }
    }

    /// Refuses when hardly anything more of this kind could be reserved.
    ///
    /// # Errors
    /// `Unavailable`.
    pub fn check(&self, kind: Kind) -> Result<()> {
        if self.used() > self.part(kind.share(true).1) { Err(self.refusal(kind, 0, true)) } else { Ok(()) }
    }

    fn add(&self, kind: Kind, bytes: usize) {
        if let Some(query) = &self.query {
            query.held.fetch_add(bytes, Ordering::Relaxed);
        }
        self.account.held[kind as usize].fetch_add(bytes, Ordering::Relaxed);
        self.account.total.fetch_add(bytes, Ordering::Relaxed);
    }

    fn sub(&self, kind: Kind, bytes: usize) {
        if let Some(query) = &self.query {
            query.held.fetch_sub(bytes, Ordering::Relaxed);
        }
        self.account.held[kind as usize].fetch_sub(bytes, Ordering::Relaxed);
        self.account.total.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Adds to a reservation of `before` bytes.
    fn try_add(&self, kind: Kind, before: usize, bytes: usize) -> Result<()> {
        if let Some(query) = &self.query {
            let held = query.held.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
            if held > query.max {
                query.held.fetch_sub(bytes, Ordering::Relaxed);
                return Err(self.refusal_of_query(kind, held, query.max));
            }
        }
        let small = before.saturating_add(bytes) < self.account.limit / SMALL_PARTS;
        let (of_kind, of_all) = kind.share(small);
        let (of_kind, of_all) = (self.part(of_kind), self.part(of_all));
        let held = self.account.held[kind as usize].fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        let total = self.account.total.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        if held <= of_kind && total.saturating_add(self.beyond()) <= of_all {
            return Ok(());
        }
        self.sub(kind, bytes);
        Err(self.refusal(kind, bytes, small))
    }

    #[cold]
    fn refusal_of_query(&self, kind: Kind, held: usize, max: usize) -> Error {
        self.account.refused[kind as usize].fetch_add(1, Ordering::Relaxed);
        Error::limit_exceeded(format!(
            "query would hold {held} bytes of memory: at most {max} are allowed for one, see query_memory_max"
        ))
    }

    #[cold]
    fn refusal(&self, kind: Kind, bytes: usize, small: bool) -> Error {
        self.account.refused[kind as usize].fetch_add(1, Ordering::Relaxed);
        let (of_kind, of_all) = kind.share(small);
        Error::unavailable(format!(
            "no memory for {bytes} more bytes of {}: they hold {} and may hold {}, {} are used in all and {} may be; memory_limit is {}",
            kind.name(),
            self.held(kind),
            self.part(of_kind),
            self.used(),
            self.part(of_all),
            self.limit(),
        ))
    }
}

/// Bytes that are set aside for one user of memory, until it is dropped.
#[derive(Debug)]
pub struct Reservation {
    memory: Memory,
    kind: Kind,
    bytes: usize,
}

impl Reservation {
    /// What is set aside.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Sets more aside.
    ///
    /// # Errors
    /// `Unavailable` when the kind or all together would use too much; nothing has changed then.
    pub fn grow(&mut self, bytes: usize) -> Result<()> {
        self.memory.try_add(self.kind, self.bytes, bytes)?;
        self.bytes += bytes;
        Ok(())
    }

    /// Sets more aside whatever there is, for what can't be refused any more.
    pub fn force(&mut self, bytes: usize) {
        self.memory.add(self.kind, bytes);
        self.bytes += bytes;
    }

    /// Sets exactly so many bytes aside whatever there is.
    pub fn force_to(&mut self, bytes: usize) {
        self.force(bytes.saturating_sub(self.bytes));
        self.shrink_to(bytes);
    }

    /// Gives back all but so many bytes.
    pub fn shrink_to(&mut self, bytes: usize) {
        if let Some(less) = self.bytes.checked_sub(bytes) {
            self.memory.sub(self.kind, less);
            self.bytes = bytes;
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.memory.sub(self.kind, self.bytes);
    }
}

/// What DataFusion's operators reserve, which is of kind [`Kind::Queries`].
#[derive(Debug)]
pub(crate) struct QueryPool(pub Memory);

impl fmt::Display for QueryPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "queries({} of {} bytes)", self.reserved(), self.0.max(Kind::Queries))
    }
}

impl MemoryPool for QueryPool {
    fn name(&self) -> &str {
        "queries"
    }

    fn grow(&self, _reservation: &MemoryReservation, additional: usize) {
        self.0.add(Kind::Queries, additional);
    }

    fn shrink(&self, _reservation: &MemoryReservation, shrink: usize) {
        self.0.sub(Kind::Queries, shrink);
    }

    fn try_grow(&self, reservation: &MemoryReservation, additional: usize) -> DfResult<()> {
        let refused = |e: Error| DataFusionError::ResourcesExhausted(e.to_string());
        self.0.try_add(Kind::Queries, reservation.size(), additional).map_err(refused)
    }

    fn reserved(&self) -> usize {
        self.0.held(Kind::Queries)
    }

    fn memory_limit(&self) -> MemoryLimit {
        MemoryLimit::Finite(self.0.max(Kind::Queries))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use catalog::ErrorKind;
    use datafusion::execution::memory_pool::MemoryConsumer;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn memory_is_refused_to_queries_before_writes_and_never_to_files() {
        let memory = Memory::new(1600);
        let grow = |kind, bytes| {
            let mut held = memory.reserve(kind);
            held.grow(bytes).map(|()| held)
        };
        assert!(grow(Kind::Queries, 801).is_err(), "half of all is theirs");
        let query = grow(Kind::Queries, 700).unwrap();
        assert!(!memory.is_scarce());
        memory.note(Kind::Memtables, 500);
        assert!(memory.is_scarce());
        assert_eq!(memory.used(), 1200);
        let mut more = grow(Kind::Queries, 100).unwrap();
        memory.observe(1400);
        assert_eq!((memory.beyond(), memory.used()), (100, 1400));
        assert!(memory.check(Kind::Queries).is_ok());
        let refused = more.grow(1).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unavailable);
        assert!(refused.to_string().contains("memory_limit is 1600"), "{refused}");
        memory.observe(1500);
        assert!(memory.check(Kind::Queries).is_ok(), "small ones still run");
        memory.observe(1400);
        let body = grow(Kind::Bodies, 200).unwrap();
        assert_eq!(memory.check(Kind::Queries).unwrap_err().kind(), ErrorKind::Unavailable);
        assert!(memory.check(Kind::Queue).is_ok());
        assert!(grow(Kind::Queue, 1).is_err());
        let mut file = memory.reserve(Kind::Files);
        file.force(1600);
        assert!(memory.check(Kind::Queue).is_err());
        assert_eq!(memory.refused(Kind::Queries), 3);
        drop((query, more, body, file));
        memory.note(Kind::Memtables, 0);
        memory.observe(30);
        assert_eq!(memory.used(), 30);
        assert!(Kind::ALL.iter().all(|k| memory.held(*k) == 0));
    }

    #[test]
    fn a_little_is_left_for_small_queries() {
        let memory = Memory::new(16 << 20);
        let mut large = memory.reserve(Kind::Queries);
        large.grow(8 << 20).unwrap();
        assert!(large.grow(1).is_err());
        let mut small = memory.reserve(Kind::Queries);
        small.grow(10 << 10).unwrap();
        assert!(small.grow(10 << 10).is_err());
        assert_eq!(memory.used(), (8 << 20) + (10 << 10));
    }

    #[test]
    fn a_query_has_a_limit_of_its_own() {
        let memory = Memory::new(16 << 20);
        let (one, other) = (memory.of_query(1000), memory.of_query(1000));
        let pool: Arc<dyn MemoryPool> = Arc::new(QueryPool(one.clone()));
        let operator = MemoryConsumer::new("operator").register(&pool);
        operator.try_grow(600).unwrap();
        let mut answer = one.reserve(Kind::Queries);
        let refused = answer.grow(401).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::LimitExceeded);
        assert!(refused.to_string().contains("would hold 1001 bytes of memory: at most 1000 are"), "{refused}");
        answer.grow(400).unwrap();
        assert!(operator.try_grow(1).is_err());
        let mut of_other = other.reserve(Kind::Queries);
        of_other.grow(1000).unwrap();
        assert_eq!((memory.held(Kind::Queries), memory.refused(Kind::Queries)), (2000, 2));
        drop(operator);
        answer.grow(600).unwrap();
        drop((answer, of_other));
        assert_eq!(memory.used(), 0);
        // What all may hold is not widened.
        let mut large = memory.of_query(usize::MAX).reserve(Kind::Queries);
        assert!(large.grow((8 << 20) + 1).is_err());
        large.grow(8 << 20).unwrap();
    }

    #[test]
    fn operators_reserve_in_the_account_and_are_told_its_limit() {
        let memory = Memory::new(1600);
        let pool: Arc<dyn MemoryPool> = Arc::new(QueryPool(memory.clone()));
        let first = MemoryConsumer::new("first").register(&pool);
        let second = MemoryConsumer::new("second").register(&pool);
        first.try_grow(600).unwrap();
        let refused = second.try_grow(201).unwrap_err();
        assert!(matches!(&refused, DataFusionError::ResourcesExhausted(m) if m.contains("memory_limit is 1600")));
        assert_eq!((memory.held(Kind::Queries), pool.reserved()), (600, 600));
        first.shrink(100);
        second.try_grow(201).unwrap();
        drop((first, second));
        assert_eq!(memory.used(), 0);
    }

    proptest! {
        #[test]
        fn reservations_go_back_to_zero(steps in prop::collection::vec((0usize..4, 0usize..7, 0usize..400), 0..200)) {
            let memory = Memory::new(1600);
            let mut held: BTreeMap<usize, Vec<Reservation>> = BTreeMap::new();
            for (what, kind, bytes) in steps {
                let all = held.entry(kind).or_default();
                match what {
                    0 => {
                        let mut one = memory.reserve(Kind::ALL[kind]);
                        if one.grow(bytes).is_ok() {
                            all.push(one);
                        }
                    }
                    1 => drop(all.pop()),
                    2 => {
                        if let Some(one) = all.last_mut() {
                            let before = one.bytes();
                            if one.grow(bytes).is_err() {
                                prop_assert_eq!(one.bytes(), before);
                            }
                        }
                    }
                    _ => {
                        if let Some(one) = all.last_mut() {
                            one.shrink_to(bytes);
                        }
                    }
                }
                let sums = held.iter().map(|(k, all)| (*k, all.iter().map(Reservation::bytes).sum::<usize>()));
                let mut total = 0;
                for (kind, sum) in sums {
                    prop_assert_eq!(memory.held(Kind::ALL[kind]), sum);
                    total += sum;
                }
                prop_assert_eq!(memory.used(), total);
                prop_assert!(total <= 1600);
            }
            held.clear();
            prop_assert_eq!(memory.used(), 0);
        }
    }
}
