//! The compressed form: per series, sealed [`block`]s and an open block of raw samples.
//!
//! Series live in chunks of 256 neighbouring ordinals behind one lock. Within a chunk the open samples lie row by row:
//! row k holds the k-th open sample of each of the 256 series. Series that are scraped together have neighbouring
//! ordinals and equally many open samples, so a request appends to contiguous memory.
//!
//! Order of arrival is what decides between samples of one series and time: within a block the later one was kept when
//! it was sealed, and blocks, then the open samples, lie in order of arrival.
//!
//! What a snapshot sees of a series is therefore a prefix of its blocks and of its open samples. Taking a snapshot gives it a
//! number and touches no chunk; the first append to a chunk after that notes where the prefixes end (a [`Mark`]), and a
//! block that is sealed from then on is cut where a mark is, so that sealed bytes never change.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering as Atomic};

use catalog::Ordinal;
use parking_lot::{Mutex, RwLock};

use super::block;

const CHUNK: usize = 256;

#[derive(Debug, Default)]
struct Slot {
    /// Blocks, one after another.
    sealed: Vec<u8>,
    /// Samples ever appended, duplicates included.
    rows: u32,
    /// Samples in the open block.
    open: u8,
}

/// How much of a slot there was at a mark.
#[derive(Debug, Clone, Copy)]
struct End {
    /// Bytes of blocks.
    sealed: u32,
    /// Samples in the open block.
    open: u8,
}

/// What a chunk held before an append.
#[derive(Debug)]
struct Mark {
    /// It is what snapshots see with numbers up to this, beyond that of the mark before it.
    number: u64,
    /// Of each slot.
    ends: Box<[End]>,
}

const MARK_BYTES: usize = size_of::<Mark>() + CHUNK * size_of::<End>();

#[derive(Debug)]
struct Chunk {
    slots: Vec<Slot>,
    /// Number of the last snapshot before the last append.
    seen: u64,
    /// In order of their numbers.
    marks: Vec<Mark>,
    /// Times of open samples are offsets from this.
    base: Option<i64>,
    /// [`CHUNK`] values per row.
    open_ts: Vec<i32>,
    open_values: Vec<f64>,
}

/// Samples in columns, in no particular order.
#[derive(Debug, Clone, Copy)]
pub(super) struct Samples<'a> {
    /// Index into the ordinals given with it, per row.
    pub refs: &'a [u32],
    /// Milliseconds since the epoch, per row.
    pub ts: &'a [i64],
    /// Values, per row.
    pub values: &'a [f64],
}

/// What a read returns: sorted by (series, ts), without equal pairs.
#[derive(Debug, Default)]
pub(super) struct Decoded {
    pub series: Vec<u32>,
    pub ts: Vec<i64>,
    pub values: Vec<f64>,
}

/// The samples of all series.
#[derive(Debug, Default)]
pub(super) struct SeriesMemtable {
    chunks: RwLock<Vec<Option<Arc<RwLock<Chunk>>>>>,
    bytes: AtomicUsize,
    rows: AtomicU64,
    /// Number of the last snapshot.
    snapshots: AtomicU64,
    /// Numbers of the snapshots that are still read.
    live: Mutex<BTreeSet<u64>>,
    /// How many marks there are in all chunks.
    marks: AtomicUsize,
}

/// The least and greatest time of appended rows.
#[derive(Debug)]
pub(super) struct TsRange {
    min: AtomicI64,
    max: AtomicI64,
}

impl Default for TsRange {
    fn default() -> Self {
        Self { min: AtomicI64::new(i64::MAX), max: AtomicI64::new(i64::MIN) }
    }
}

impl TsRange {
    pub(super) fn add(&self, ts: &[i64]) {
        let (mut min, mut max) = (i64::MAX, i64::MIN);
        for t in ts {
            min = min.min(*t);
            max = max.max(*t);
        }
        self.min.fetch_min(min, Atomic::Relaxed);
        self.max.fetch_max(max, Atomic::Relaxed);
    }

    pub(super) fn get(&self) -> Option<(i64, i64)> {
        let (min, max) = (self.min.load(Atomic::Relaxed), self.max.load(Atomic::Relaxed));
        (min <= max).then_some((min, max))
    }
}

impl SeriesMemtable {
    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Atomic::Relaxed)
    }

    pub(super) fn rows(&self) -> u64 {
        self.rows.load(Atomic::Relaxed)
    }

    /// Blocks that are or will be sealed, the open ones among them.
    pub(super) fn blocks(&self) -> u64 {
        let chunks = self.chunks.read().clone();
        let of_chunk = |chunk: &RwLock<Chunk>| {
            chunk.read().slots.iter().map(|s| u64::from(s.rows.div_ceil(block::ROWS as u32))).sum::<u64>()
        };
        chunks.iter().flatten().map(|chunk| of_chunk(chunk)).sum()
    }

    /// Begins a snapshot of what there is; nothing may be appended meanwhile. Returns its number, to be given to
    /// [`SeriesMemtable::read`] and in the end to [`SeriesMemtable::forget`].
    pub(super) fn snapshot(&self) -> u64 {
        let number = self.snapshots.fetch_add(1, Atomic::Relaxed) + 1;
        self.live.lock().insert(number);
        number
    }

    /// Ends a snapshot, and takes away what was kept for it alone.
    pub(super) fn forget(&self, number: u64) {
        self.live.lock().remove(&number);
        if self.marks.load(Atomic::Relaxed) == 0 {
            return;
        }
        let chunks = self.chunks.read().clone();
        for chunk in chunks.into_iter().flatten() {
            let mut chunk = chunk.write();
            // In the order in which an append locks them.
            let gone = chunk.drop_marks(&self.live.lock());
            self.marks.fetch_sub(gone, Atomic::Relaxed);
            self.bytes.fetch_sub(gone * MARK_BYTES, Atomic::Relaxed);
        }
    }

    #[cfg(test)]
    pub(super) fn marks(&self) -> usize {
        let chunks = self.chunks.read().clone();
        assert_eq!(
            chunks.iter().flatten().map(|c| c.read().marks.len()).sum::<usize>(),
            self.marks.load(Atomic::Relaxed)
        );
        self.marks.load(Atomic::Relaxed)
    }

    /// Appends in the order of the rows. One caller at a time.
    pub(super) fn append(&self, ordinals: &[Ordinal], samples: Samples<'_>) {
        let n = samples.refs.len();
        let ordinal = |i: usize| ordinals[samples.refs[i] as usize] as usize;
        let last = self.snapshots.load(Atomic::Relaxed);
        let mut grown = 0;
        let mut i = 0;
        while i < n {
            let number = ordinal(i) / CHUNK;
            let chunk = self.chunk(number, &mut grown);
            let mut chunk = chunk.write();
            if chunk.seen != last {
                self.mark(&mut chunk, last);
            }
            while i < n && ordinal(i) / CHUNK == number {
                grown += chunk.append(ordinal(i) % CHUNK, samples.ts[i], samples.values[i]);
                i += 1;
            }
        }
        self.bytes.fetch_add(grown, Atomic::Relaxed);
        self.rows.fetch_add(n as u64, Atomic::Relaxed);
    }

    /// Notes what a chunk holds for the snapshots that were taken since it was last appended to.
    #[cold]
    fn mark(&self, chunk: &mut Chunk, last: u64) {
        let seen = std::mem::replace(&mut chunk.seen, last);
        if self.live.lock().range(seen + 1..=last).next().is_none() {
            return;
        }
        let ends = chunk.slots.iter().map(|s| End { sealed: s.sealed.len() as u32, open: s.open }).collect();
        chunk.marks.push(Mark { number: last, ends });
        self.marks.fetch_add(1, Atomic::Relaxed);
        self.bytes.fetch_add(MARK_BYTES, Atomic::Relaxed);
    }

    fn chunk(&self, number: usize, grown: &mut usize) -> Arc<RwLock<Chunk>> {
        if let Some(Some(chunk)) = self.chunks.read().get(number) {
            return chunk.clone();
        }
        let mut chunks = self.chunks.write();
        if chunks.len() <= number {
            chunks.resize(number + 1, None);
        }
        *grown += size_of::<Chunk>() + CHUNK * size_of::<Slot>();
        chunks[number].get_or_insert_with(|| Arc::new(RwLock::new(Chunk::new()))).clone()
    }

    /// The ordinals that have rows, ascending; in a snapshot, when there is one.
    pub(super) fn ordinals(&self, snapshot: Option<u64>) -> Vec<Ordinal> {
        let chunks = self.chunks.read().clone();
        let mut out = vec![];
        for (number, chunk) in chunks.iter().enumerate().filter_map(|(i, c)| Some((i, c.as_ref()?))) {
            let chunk = chunk.read();
            let mark = chunk.mark_of(snapshot);
            let has_rows = |slot: &usize| match mark {
                None => chunk.slots[*slot].rows > 0,
                Some(mark) => mark.ends[*slot].sealed > 0 || mark.ends[*slot].open > 0,
            };
            out.extend((0..CHUNK).filter(has_rows).map(|slot| (number * CHUNK + slot) as Ordinal));
        }
        out
    }

    /// Reads the wanted series, given as (number to return for it, ordinal) in ascending order of the numbers, from
    /// `start_ms` to `end_ms`, both inclusive; as of a snapshot, when there is one. Locks are held only while compressed
    /// bytes are copied.
    pub(super) fn read(&self, wanted: &[(u32, Ordinal)], start_ms: i64, end_ms: i64, snapshot: Option<u64>) -> Decoded {
        let mut out = Decoded::default();
        let mut copy = Copied::default();
        let mut from = 0;
        while from < wanted.len() {
            let number = wanted[from].1 as usize / CHUNK;
            let run = wanted[from..].iter().take_while(|w| w.1 as usize / CHUNK == number).count();
            let run = &wanted[from..from + run];
            from += run.len();
            let Some(Some(chunk)) = self.chunks.read().get(number).cloned() else { continue };
            copy.clear();
            chunk.read().copy(run, snapshot, &mut copy);
            out.reserve(copy.rows);
            copy.decode(start_ms, end_ms, &mut out);
        }
        out
    }
}

impl Chunk {
    fn new() -> Self {
        let slots = (0..CHUNK).map(|_| Slot::default()).collect();
        Self { slots, seen: 0, marks: vec![], base: None, open_ts: vec![], open_values: vec![] }
    }

    /// What a snapshot sees; `None` when that is all there is.
    fn mark_of(&self, snapshot: Option<u64>) -> Option<&Mark> {
        let number = snapshot?;
        // Without a later mark nothing was appended since.
        self.marks.iter().find(|m| m.number >= number)
    }

    /// Forgets marks that no snapshot among `live` sees; how many.
    fn drop_marks(&mut self, live: &BTreeSet<u64>) -> usize {
        let (before, mut last) = (self.marks.len(), 0);
        self.marks.retain(|mark| {
            let from = std::mem::replace(&mut last, mark.number);
            live.range(from + 1..=mark.number).next().is_some()
        });
        before - self.marks.len()
    }

    /// Returns by how many bytes it grew.
    fn append(&mut self, slot: usize, ts: i64, value: f64) -> usize {
        let mut grown = 0;
        let base = *self.base.get_or_insert(ts);
        if usize::from(self.slots[slot].open) == block::ROWS {
            grown += self.seal(slot);
        }
        self.slots[slot].rows = self.slots[slot].rows.saturating_add(1);
        let Ok(offset) = i32::try_from(ts.wrapping_sub(base)) else {
            // Further than 24 days from its neighbours: a block of its own, behind all that arrived before.
            grown += self.seal(slot);
            return grown + self.put(slot, &[ts], &[value]);
        };
        let at = usize::from(self.slots[slot].open) * CHUNK + slot;
        if at >= self.open_ts.len() {
            let before = self.open_ts.capacity();
            self.open_ts.resize(at - slot + CHUNK, 0);
            self.open_values.resize(at - slot + CHUNK, 0.0);
            grown += (self.open_ts.capacity() - before) * (size_of::<i32>() + size_of::<f64>());
        }
        self.open_ts[at] = offset;
        self.open_values[at] = value;
        self.slots[slot].open += 1;
        grown
    }

    fn seal(&mut self, slot: usize) -> usize {
        let n = usize::from(std::mem::take(&mut self.slots[slot].open));
        if n == 0 {
            return 0;
        }
        let base = self.base.unwrap_or(0);
        let (mut ts, mut values) = ([0i64; block::ROWS], [0f64; block::ROWS]);
        for k in 0..n {
            ts[k] = base.wrapping_add(i64::from(self.open_ts[k * CHUNK + slot]));
            values[k] = self.open_values[k * CHUNK + slot];
        }
        let (before, mut from, mut grown) = (self.slots[slot].sealed.len(), 0, 0);
        for i in 0..self.marks.len() {
            let End { sealed, open } = self.marks[i].ends[slot];
            if sealed as usize != before || open == 0 {
                continue;
            }
            // What the mark saw of the open block becomes blocks of its own.
            let to = usize::from(open);
            grown += self.put_sorted(slot, &mut ts[from..to], &mut values[from..to]);
            from = to;
            self.marks[i].ends[slot] = End { sealed: self.slots[slot].sealed.len() as u32, open: 0 };
        }
        grown + self.put_sorted(slot, &mut ts[from..n], &mut values[from..n])
    }

    fn put_sorted(&mut self, slot: usize, ts: &mut [i64], values: &mut [f64]) -> usize {
        if ts.is_empty() {
            // Two marks were at one place, or one at the end.
            return 0;
        }
        let mut n = ts.len();
        if !ts.is_sorted_by(|a, b| a < b) {
            n = sort_last_wins(ts, values);
        }
        self.put(slot, &ts[..n], &values[..n])
    }

    fn put(&mut self, slot: usize, ts: &[i64], values: &[f64]) -> usize {
        let sealed = &mut self.slots[slot].sealed;
        let before = sealed.capacity();
        // Doubling would leave a quarter of the memory unused on average, this a tenth.
        const BLOCK_TYPICAL: usize = 96;
        if sealed.capacity() - sealed.len() < BLOCK_TYPICAL {
            sealed.reserve_exact(BLOCK_TYPICAL + sealed.len() / 8);
        }
        block::seal(ts, values, sealed);
        sealed.capacity() - before
    }

    fn copy(&self, run: &[(u32, Ordinal)], snapshot: Option<u64>, copy: &mut Copied) {
        let base = self.base.unwrap_or(0);
        let mark = self.mark_of(snapshot);
        for (index, ordinal) in run {
            let at = *ordinal as usize % CHUNK;
            let slot = &self.slots[at];
            if slot.rows == 0 {
                continue;
            }
            let (sealed, open) = match mark {
                None => (&slot.sealed[..], usize::from(slot.open)),
                Some(mark) => (&slot.sealed[..mark.ends[at].sealed as usize], usize::from(mark.ends[at].open)),
            };
            copy.bytes.extend_from_slice(sealed);
            for k in 0..open {
                copy.ts.push(base.wrapping_add(i64::from(self.open_ts[k * CHUNK + at])));
                copy.values.push(self.open_values[k * CHUNK + at]);
            }
            copy.rows += slot.rows as usize;
            copy.series.push((*index, copy.bytes.len(), copy.ts.len()));
        }
    }
}

/// What was copied out of a chunk under its lock.
#[derive(Debug, Default)]
struct Copied {
    bytes: Vec<u8>,
    ts: Vec<i64>,
    values: Vec<f64>,
    /// Number, end in `bytes`, end in `ts` and `values`.
    series: Vec<(u32, usize, usize)>,
    rows: usize,
}

impl Copied {
    fn clear(&mut self) {
        self.bytes.clear();
        self.ts.clear();
        self.values.clear();
        self.series.clear();
        self.rows = 0;
    }

    fn decode(&mut self, start_ms: i64, end_ms: i64, out: &mut Decoded) {
        self.bytes.extend_from_slice(&[0; block::PADDING]);
        let (mut at, mut open) = (0, 0);
        for &(index, bytes_end, open_end) in &self.series {
            let from = out.ts.len();
            let mut sorted = true;
            while at < bytes_end {
                let seam = out.ts.len();
                at += block::decode(&self.bytes[at..], start_ms, end_ms, &mut out.ts, &mut out.values);
                sorted &= seam == from || seam == out.ts.len() || out.ts[seam - 1] < out.ts[seam];
            }
            for k in open..open_end {
                let t = self.ts[k];
                if t >= start_ms && t <= end_ms {
                    sorted &= out.ts.len() == from || out.ts[out.ts.len() - 1] < t;
                    out.ts.push(t);
                    out.values.push(self.values[k]);
                }
            }
            open = open_end;
            if !sorted {
                let n = sort_last_wins(&mut out.ts[from..], &mut out.values[from..]);
                out.ts.truncate(from + n);
                out.values.truncate(from + n);
            }
            out.series.resize(out.ts.len(), index);
        }
    }
}

impl Decoded {
    fn reserve(&mut self, rows: usize) {
        self.series.reserve(rows);
        self.ts.reserve(rows);
        self.values.reserve(rows);
    }
}

/// Sorts by time, keeps the last of equal times, and returns how many are left at the front.
fn sort_last_wins(ts: &mut [i64], values: &mut [f64]) -> usize {
    let mut rows: Vec<(i64, f64)> = ts.iter().copied().zip(values.iter().copied()).collect();
    rows.sort_by_key(|r| r.0);
    let mut n = 0;
    for (i, row) in rows.iter().enumerate() {
        if rows.get(i + 1).is_none_or(|next| next.0 != row.0) {
            (ts[n], values[n]) = *row;
            n += 1;
        }
    }
    n
}
