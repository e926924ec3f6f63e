//! What a history did: a running check over every call at a seam, and how often each fault and operation came.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use tokio::time::Instant;

/// The trace of one history.
#[derive(Debug)]
pub(super) struct Trace {
    /// Whether each call is printed as it happens.
    print: bool,
    begun: Instant,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    crc: u32,
    calls: u64,
    counts: Counts,
}

/// How often things came, by name.
pub(super) type Counts = BTreeMap<&'static str, u64>;

impl Trace {
    pub fn new(print: bool) -> Self {
        Self { print, begun: Instant::now(), inner: Mutex::default() }
    }

    /// Notes a call at a seam: who made it, what it was with which arguments, and how it ended.
    pub fn call(&self, who: &str, what: &str, on: &str, detail: u64, ended: &str) {
        let at = self.begun.elapsed().as_millis();
        let line = format!("{at:>9} {who:<3} {what} {on} {detail:x} {ended}");
        let mut inner = self.inner.lock();
        inner.calls += 1;
        let mut hasher = crc32fast::Hasher::new_with_initial(inner.crc);
        hasher.update(line.as_bytes());
        inner.crc = hasher.finalize();
        drop(inner);
        if self.print {
            println!("{line}");
        }
    }

    /// Says something that is no call.
    pub fn say(&self, text: impl FnOnce() -> String) {
        if self.print {
            println!("{:>9} --- {}", self.begun.elapsed().as_millis(), text());
        }
    }

    pub fn count(&self, what: &'static str) {
        *self.inner.lock().counts.entry(what).or_default() += 1;
    }

    /// The check over all calls, and how many there were.
    pub fn sum(&self) -> (u32, u64) {
        let inner = self.inner.lock();
        (inner.crc, inner.calls)
    }

    pub fn counts(&self) -> Counts {
        self.inner.lock().counts.clone()
    }
}
