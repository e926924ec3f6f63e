//! Tag sets that were found in several places, each once.

use std::sync::Arc;

use catalog::{Error, Ordinal, Result, Series, tag_parts};

use super::{NO_ORDINAL, SERIES_AT_A_TIME, too_much};
use crate::Reservation;
use crate::segment::Key;

/// What a series takes in a set and while it is made, the shared tag set aside.
const SERIES_BYTES: usize = 80;

/// A series that was found, with [`NO_ORDINAL`] where it was not among the active ones.
pub(super) type One = (Key, Ordinal, Arc<Series>);

/// What a selection has found so far.
pub(super) struct Found {
    sets: Vec<One>,
    /// So many of them, at the beginning, are sorted and each there once.
    united: usize,
    /// How many of those are not active, and so may be held by this one alone.
    own: usize,
    memory: Reservation,
    series_max: usize,
    /// Why it takes no more.
    refused: Result<()>,
}

impl Found {
    pub fn new(memory: Reservation, series_max: usize) -> Self {
        Self { sets: Vec::new(), united: 0, own: 0, memory, series_max, refused: Ok(()) }
    }

    /// Adds a set, which may be there already, unless there are too many.
    pub fn push(&mut self, ordinal: Ordinal, series: &Arc<Series>) -> bool {
        self.refused = self.room();
        if self.refused.is_ok() {
            self.sets.push((Key::from(series.as_ref()), ordinal, series.clone()));
        }
        self.refused.is_ok()
    }

    fn room(&mut self) -> Result<()> {
        if self.sets.len() >= self.united.saturating_add(self.series_max) {
            self.unite()?;
        }
        if self.memory.bytes() < self.bytes(self.own) + SERIES_BYTES {
            self.memory.grow(SERIES_AT_A_TIME * SERIES_BYTES).map_err(too_much)?;
        }
        Ok(())
    }

    /// What the sets take when so many are not active.
    fn bytes(&self, own: usize) -> usize {
        self.sets.len() * SERIES_BYTES + own * tag_parts::SET_BYTES
    }

    /// Once all sets of a source were pushed: it is this one that holds them now.
    pub fn settle(&mut self) -> Result<()> {
        let new = &self.sets[self.united..];
        // All sets are looked at to unite some, so it waits until it is worth it. A later part may say again what was
        // found before, so those that wait are not known to take memory of their own; at most they all do.
        if new.len() > self.united / 8 {
            return self.unite();
        }
        let own = self.own + new.iter().filter(|(_, ordinal, _)| *ordinal == NO_ORDINAL).count();
        self.charge(own)
    }

    /// Takes out what is there more than once.
    fn unite(&mut self) -> Result<()> {
        // An active set sorts before its copies from tag parts, which have no ordinal.
        let order = |(key, ordinal, _): &One| (*key, *ordinal);
        self.sets[self.united..].sort_unstable_by_key(order);
        if self.united > 0 {
            // Merges the two sorted halves.
            self.sets.sort_by_key(order);
        }
        self.sets.dedup_by_key(|(key, ..)| *key);
        self.united = self.sets.len();
        if self.united > self.series_max {
            return Err(Error::limit_exceeded(format!(
                "query selects more than {} series; narrow its matchers or its time range",
                self.series_max
            )));
        }
        self.own = self.sets.iter().filter(|(_, ordinal, _)| *ordinal == NO_ORDINAL).count();
        self.charge(self.own)
    }

    fn charge(&mut self, own: usize) -> Result<()> {
        let bytes = self.bytes(own);
        self.memory.shrink_to(bytes);
        self.memory.grow(bytes - self.memory.bytes()).map_err(too_much)
    }

    /// The sets, each once and sorted, and the memory that they take.
    ///
    /// # Errors
    /// Why it took no more.
    pub fn end(mut self) -> Result<(Vec<One>, Reservation)> {
        std::mem::replace(&mut self.refused, Ok(()))?;
        if self.united < self.sets.len() {
            self.unite()?;
        }
        Ok((self.sets, self.memory))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use catalog::{ErrorKind, TagHasher, TagSet, TagSetBuilder};
    use proptest::prelude::*;

    use super::*;
    use crate::Memory;
    use crate::memory::Kind;

    fn series(number: u32) -> Arc<Series> {
        let (mut builder, number) = (TagSetBuilder::default(), number.to_string());
        let tags = builder.build(&mut [("__name__", "m"), ("n", &number)]).expect("labels are valid");
        Arc::new(Series::new(&TagHasher::new(7), TagSet::from_canonical(tags)))
    }

    /// The bytes of so many sets, of which some are not active.
    fn bytes(all: usize, own: usize) -> usize {
        all * SERIES_BYTES + own * tag_parts::SET_BYTES
    }

    fn see(found: &mut Found, source: impl IntoIterator<Item = (u32, bool)>) -> Result<()> {
        for (number, active) in source {
            if !found.push(if active { number } else { NO_ORDINAL }, &series(number)) {
                return Ok(());
            }
        }
        found.settle()
    }

    #[test]
    fn what_many_places_have_counts_once() {
        let memory = Memory::new(64 << 20);
        let mut found = Found::new(memory.reserve(Kind::Queries), 1000);
        for _ in 0..50 {
            see(&mut found, (0..1000).map(|n| (n, false))).unwrap();
            assert_eq!(memory.held(Kind::Queries), bytes(1000, 1000));
        }
        assert_eq!(found.end().unwrap().0.len(), 1000);
        assert_eq!(memory.used(), 0);
    }

    #[test]
    fn more_than_are_allowed_are_refused_while_they_come() {
        let memory = Memory::new(64 << 20);
        let mut found = Found::new(memory.reserve(Kind::Queries), 100);
        let mut pushed = 0;
        while found.push(NO_ORDINAL, &series(pushed)) {
            pushed += 1;
        }
        assert!(pushed <= 200, "{pushed}");
        let refused = found.end().unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::LimitExceeded);
        assert!(refused.to_string().contains("more than 100 series"), "{refused}");
        let mut found = Found::new(memory.reserve(Kind::Queries), 100);
        see(&mut found, (0..96).map(|n| (n, false))).unwrap();
        // Too few to be looked at before the end.
        see(&mut found, (96..101).map(|n| (n, false))).unwrap();
        assert_eq!(found.end().unwrap_err().kind(), ErrorKind::LimitExceeded);
    }

    #[test]
    fn memory_that_is_not_there_is_refused() {
        let memory = Memory::new(4 << 20);
        let mut found = Found::new(memory.reserve(Kind::Queries), usize::MAX);
        see(&mut found, (0..100_000).map(|n| (n, false))).unwrap();
        let refused = found.end().unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::LimitExceeded);
        assert!(refused.to_string().contains("memory_limit is 4194304"), "{refused}");
        assert_eq!(memory.used(), 0);
    }

    proptest! {
        #[test]
        fn as_a_map_would(
            active in prop::collection::btree_set(0u32..300, 0..200),
            parts in prop::collection::vec(prop::collection::vec(0u32..300, 0..150), 0..8),
        ) {
            let memory = Memory::new(64 << 20);
            let mut found = Found::new(memory.reserve(Kind::Queries), 300);
            let mut expected: BTreeMap<Key, Ordinal> = BTreeMap::new();
            see(&mut found, active.iter().map(|n| (*n, true))).unwrap();
            expected.extend(active.iter().map(|n| (Key::from(&*series(*n)), *n)));
            for part in &parts {
                see(&mut found, part.iter().map(|n| (*n, false))).unwrap();
                for n in part {
                    expected.entry(Key::from(&*series(*n))).or_insert(NO_ORDINAL);
                }
                let own = expected.values().filter(|o| **o == NO_ORDINAL).count();
                prop_assert!(memory.held(Kind::Queries) >= bytes(expected.len(), own));
            }
            let (sets, held) = found.end().unwrap();
            let own = expected.values().filter(|o| **o == NO_ORDINAL).count();
            prop_assert_eq!(held.bytes(), bytes(expected.len(), own));
            prop_assert_eq!(sets.iter().map(|(k, o, _)| (*k, *o)).collect::<Vec<_>>(), expected.into_iter().collect::<Vec<_>>());
        }
    }
}
