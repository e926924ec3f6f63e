//! What each ordinal stands for.
//!
//! Ordinals are never reused, so their slots come in chunks, and a chunk without an active set goes as a whole: what
//! remains of a million sets that came and went are some kilobytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering as Atomic};

use crate::registry::{Ordinal, Series};

/// Slots of a chunk: few, so that a set that stays for long does not hold many others' slots.
const CHUNK: usize = 256;

#[derive(Debug)]
pub(crate) struct Slot {
    pub series: Option<Arc<Series>>,
    /// Second of the last row since the epoch, for retirement.
    pub seen: AtomicU32,
}

/// All slots, in the order of their ordinals.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    /// All chunks but the last have [`CHUNK`] slots; `None` once all their sets are gone.
    chunks: Vec<Option<Vec<Slot>>>,
    len: usize,
}

impl Slots {
    /// Ordinals ever given.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Gives the next ordinal.
    pub fn push(&mut self, series: Arc<Series>, second: u32) -> Ordinal {
        if self.len.is_multiple_of(CHUNK) {
            self.chunks.push(Some(Vec::with_capacity(CHUNK)));
        }
        if let Some(Some(chunk)) = self.chunks.last_mut() {
            chunk.push(Slot { series: Some(series), seen: AtomicU32::new(second) });
        }
        self.len += 1;
        (self.len - 1) as Ordinal
    }

    /// The slot of an ordinal; a set that is gone may have none.
    #[inline]
    pub fn get(&self, ordinal: Ordinal) -> Option<&Slot> {
        let at = ordinal as usize;
        self.chunks.get(at / CHUNK)?.as_ref()?.get(at % CHUNK)
    }

    /// The active set of an ordinal.
    #[inline]
    pub fn active(&self, ordinal: Ordinal) -> Option<&Arc<Series>> {
        self.get(ordinal)?.series.as_ref()
    }

    /// The active sets from this ordinal on.
    pub fn from(&self, ordinal: usize) -> impl Iterator<Item = &Arc<Series>> {
        self.numbered(ordinal).map(|(_, series)| series)
    }

    /// The active sets from this ordinal on with their ordinals, which ascend.
    pub fn numbered(&self, ordinal: usize) -> impl Iterator<Item = (Ordinal, &Arc<Series>)> {
        let chunks = self.chunks.iter().enumerate().skip(ordinal / CHUNK);
        let slots = chunks.flat_map(move |(number, chunk)| {
            let begun = ordinal.saturating_sub(number * CHUNK);
            let slots = chunk.iter().flatten().enumerate().skip(begun);
            slots.map(move |(at, slot)| ((number * CHUNK + at) as Ordinal, slot))
        });
        slots.filter_map(|(ordinal, slot)| Some((ordinal, slot.series.as_ref()?)))
    }

    /// The active sets with their ordinals and the second of their last row.
    pub fn iter(&self) -> impl Iterator<Item = (Ordinal, &Arc<Series>, u32)> {
        let chunks = self.chunks.iter().enumerate();
        let slots = chunks.flat_map(|(number, chunk)| {
            chunk.iter().flatten().enumerate().map(move |(at, slot)| ((number * CHUNK + at) as Ordinal, slot))
        });
        slots.filter_map(|(o, slot)| Some((o, slot.series.as_ref()?, slot.seen.load(Atomic::Relaxed))))
    }

    /// Takes the sets out for which `is_idle` holds, which is given ordinal and second of the last row. A set that was
    /// seen later than `now` counts as seen now.
    pub fn retire(&mut self, now: u32, is_idle: impl Fn(Ordinal, u32) -> bool) -> Vec<(Ordinal, Arc<Series>)> {
        let mut gone = Vec::new();
        for (number, chunk) in self.chunks.iter_mut().enumerate() {
            let Some(slots) = chunk else { continue };
            for (at, slot) in slots.iter_mut().enumerate() {
                let seen = (*slot.seen.get_mut()).min(now);
                *slot.seen.get_mut() = seen;
                let ordinal = (number * CHUNK + at) as Ordinal;
                if slot.series.is_some() && is_idle(ordinal, seen) {
                    gone.extend(slot.series.take().map(|series| (ordinal, series)));
                }
            }
            // The last chunk still grows.
            if slots.len() == CHUNK && slots.iter().all(|slot| slot.series.is_none()) {
                *chunk = None;
            }
        }
        gone
    }

    /// Notes a row in this second; false when the set is gone.
    #[inline]
    pub fn touch(&self, ordinal: Ordinal, second: u32) -> bool {
        match self.get(ordinal) {
            Some(slot) if slot.series.is_some() => {
                slot.seen.store(second, Atomic::Relaxed);
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{TagHasher, tag};

    #[test]
    fn chunks_go_with_their_last_set() {
        let hasher = TagHasher::new(1);
        let mut slots = Slots::default();
        for i in 0..1000u32 {
            let tags = tag::tag_set(&[("i", &i.to_string())]).unwrap();
            assert_eq!(slots.push(Arc::new(Series::new(&hasher, tags)), i / 100), i);
        }
        let chunks = |slots: &Slots| slots.chunks.iter().flatten().count();
        assert_eq!(chunks(&slots), 4);
        assert_eq!(slots.from(0).count(), 1000);
        assert_eq!(slots.from(700).count(), 300);
        assert!(slots.touch(3, 9) && !slots.touch(1000, 9));
        // Of the first chunk one set was touched, of the last all are young.
        let gone = slots.retire(9, |_, seen| seen < 7);
        assert_eq!(gone.len(), 699);
        assert_eq!(chunks(&slots), 3);
        assert_eq!(
            (slots.active(3).is_some(), slots.active(4).is_some(), slots.get(300).is_some()),
            (true, false, false)
        );
        assert_eq!((slots.len(), slots.from(0).count(), slots.from(600).count()), (1000, 301, 300));
        assert!(!slots.touch(300, 9) && !slots.touch(4, 9) && slots.touch(999, 3));
        // A clock that was set back makes nothing older than now.
        assert!(slots.retire(2, |_, seen| seen < 2).is_empty());
        assert_eq!(slots.retire(3, |_, seen| seen < 3).len(), 301);
        let tags = tag::tag_set(&[("i", "new")]).unwrap();
        assert_eq!(slots.push(Arc::new(Series::new(&hasher, tags)), 3), 1000);
        assert_eq!(slots.from(0).count(), 1);
    }
}
