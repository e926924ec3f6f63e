//! The table from wire forms to ordinals: the first thing that every row of a known tag set meets.
//!
//! One flat array of 16-byte slots, at most half full, probed in line: a lookup costs one cache miss, and because nothing
//! between two lookups orders memory, the misses of a batch overlap. (A sharded hash map of locks cost two misses that did
//! not overlap: 27% of decoding.) It is a short cut and may forget; what it remembers is right but for collisions of 96
//! bits.

use crate::registry::Ordinal;

/// Slots at first.
const SLOTS_MIN: usize = 1024;

/// A remembered form: 96 bits of its hash, and its ordinal plus one. Zero there means that the slot is free.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    low: u64,
    high: u32,
    ordinal: u32,
}

/// Wire forms by their hash.
#[derive(Debug, Default)]
pub(crate) struct Wires {
    /// A power of two, or none at first.
    slots: Vec<Slot>,
    len: usize,
}

impl Wires {
    /// Forms that are remembered.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The ordinal of a form.
    #[inline]
    pub(crate) fn get(&self, wire: u128) -> Option<Ordinal> {
        if self.slots.is_empty() {
            return None;
        }
        let slot = self.slots[self.find(wire)];
        slot.ordinal.checked_sub(1)
    }

    /// The slot that holds this form or, at its first free place, none.
    #[inline]
    fn find(&self, wire: u128) -> usize {
        let mask = self.slots.len() - 1;
        let (low, high) = (wire as u64, (wire >> 64) as u32);
        let mut at = low as usize & mask;
        // Half of the slots are free, so this ends.
        loop {
            let slot = &self.slots[at];
            if slot.ordinal == 0 || (slot.low == low && slot.high == high) {
                return at;
            }
            at = (at + 1) & mask;
        }
    }

    /// Remembers a form.
    pub(crate) fn insert(&mut self, wire: u128, ordinal: Ordinal) {
        if 2 * (self.len + 1) > self.slots.len() {
            self.rebuild((2 * self.slots.len()).max(SLOTS_MIN), |_| true);
        }
        let at = self.find(wire);
        let slot = &mut self.slots[at];
        self.len += usize::from(slot.ordinal == 0);
        *slot = Slot { low: wire as u64, high: (wire >> 64) as u32, ordinal: ordinal + 1 };
    }

    /// Forgets the forms of ordinals for which `keep` does not hold.
    pub(crate) fn retain(&mut self, keep: impl Fn(Ordinal) -> bool) {
        self.rebuild(self.slots.len(), keep);
        // What was a peak does not hold its memory.
        let wanted = (4 * self.len).next_power_of_two().max(SLOTS_MIN);
        if wanted < self.slots.len() {
            self.rebuild(wanted, |_| true);
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    fn rebuild(&mut self, slots: usize, keep: impl Fn(Ordinal) -> bool) {
        let old = std::mem::replace(&mut self.slots, vec![Slot::default(); slots]);
        self.len = 0;
        for slot in old.into_iter().filter(|s| s.ordinal != 0 && keep(s.ordinal - 1)) {
            let at = self.find(u128::from(slot.high) << 64 | u128::from(slot.low));
            self.slots[at] = slot;
            self.len += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

        /// As a hash map does, with hashes that share their low bits.
        #[test]
        fn as_a_map(steps in prop::collection::vec((0u8..20, any::<u8>(), 0u32..50), 0..400)) {
            let mut wires = Wires::default();
            let mut map: HashMap<u128, u32> = HashMap::new();
            for (step, key, ordinal) in steps {
                let wire = u128::from(key % 16) << 64 | u128::from(key / 16) << 40 | 5;
                match step {
                    0 => {
                        wires.retain(|o| o % 3 != ordinal % 3);
                        map.retain(|_, o| *o % 3 != ordinal % 3);
                    }
                    1 if ordinal == 0 => {
                        wires.clear();
                        map.clear();
                    }
                    _ => {
                        wires.insert(wire, ordinal);
                        map.insert(wire, ordinal);
                    }
                }
                prop_assert_eq!(wires.len(), map.len());
                for key in 0..=255u8 {
                    let wire = u128::from(key % 16) << 64 | u128::from(key / 16) << 40 | 5;
                    prop_assert_eq!(wires.get(wire), map.get(&wire).copied());
                }
            }
        }
    }

    #[test]
    fn grows_and_shrinks() {
        let mut wires = Wires::default();
        let hash = |i: u32| u128::from(i).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
        (0..100_000).for_each(|i| wires.insert(hash(i), i));
        assert!((0..100_000).all(|i| wires.get(hash(i)) == Some(i)));
        assert_eq!(wires.get(hash(100_000)), None);
        let peak = wires.slots.len();
        wires.retain(|o| o < 1000);
        assert!(wires.slots.len() < peak / 16);
        assert!((0..100_000).all(|i| wires.get(hash(i)) == (i < 1000).then_some(i)));
    }
}
