//! Chance that follows from a seed.

use std::sync::atomic::{AtomicU64, Ordering};

/// SplitMix64. Who throws in the same order gets the same numbers.
#[derive(Debug)]
pub(super) struct Dice(AtomicU64);

impl Dice {
    /// The sequence of a seed and of what it is for: parts that throw dice of their own do not disturb each other.
    pub fn new(seed: u64, what: &str) -> Self {
        Self(AtomicU64::new(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ u64::from(crc32fast::hash(what.as_bytes()))))
    }

    pub fn next(&self) -> u64 {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut z = self.0.fetch_add(STEP, Ordering::Relaxed).wrapping_add(STEP);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`; 0 when `n` is 0.
    pub fn below(&self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    /// A number from `from` to `to`, both included.
    pub fn between(&self, from: i64, to: i64) -> i64 {
        from + self.below((to - from + 1) as u64) as i64
    }

    /// True in so many of a thousand throws.
    pub fn permille(&self, n: u64) -> bool {
        self.below(1000) < n
    }

    pub fn coin(&self) -> bool {
        self.below(2) == 0
    }

    pub fn pick<T: Copy>(&self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}
