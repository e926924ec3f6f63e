//! What is said of the log in the data folder outside of its segments: how far it goes, so that it is noticed when the
//! newest of them is gone or cut.
//!
//! It is written in place after each group and not synced then: after a kill it is up to date, after a power loss it may
//! be older and claims less. It is synced before segments are deleted, and when the log is opened, so that it never
//! claims what may be gone.

use catalog::{Error, Result};

use super::{seal, sealed};

/// Name of the file.
pub(super) const NAME: &str = "end";

const MAGIC: &[u8; 8] = b"THALEND\n";
const VERSION: u32 = 1;
const BYTES: usize = 48;

/// The content of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    /// Position of the newest segment's first byte.
    pub newest: u64,
    /// Position behind the last durable byte.
    pub end: u64,
    /// Everything before this position is in files.
    pub start: u64,
    /// Which opening of the log wrote it, as in heads. A log with a later one was written by a version without marks.
    pub owner: u64,
}

impl Mark {
    pub(super) fn to_bytes(self) -> [u8; BYTES] {
        let mut out = [0; BYTES];
        out[..8].copy_from_slice(MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        for (slot, number) in out[12..44].chunks_exact_mut(8).zip([self.newest, self.end, self.start, self.owner]) {
            slot.copy_from_slice(&number.to_le_bytes());
        }
        seal(&mut out);
        out
    }

    /// `None` when it is damaged.
    ///
    /// # Errors
    /// `Invalid` when a newer version wrote it.
    pub(super) fn parse(bytes: &[u8]) -> Result<Option<Self>> {
        let Some(b) = sealed(bytes, BYTES).filter(|b| b[..8] == MAGIC[..]) else { return Ok(None) };
        let number = |at: usize| b[at..at + 8].iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte));
        match u32::from_le_bytes([b[8], b[9], b[10], b[11]]) {
            VERSION => Ok(Some(Self { newest: number(12), end: number(20), start: number(28), owner: number(36) })),
            version => Err(Error::invalid(format!(
                "mark of the log has format version {version}; this version reads up to {VERSION}"
            ))),
        }
    }
}
