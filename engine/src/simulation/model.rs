//! What must be in the database, what may be, and what must not.
//!
//! Every row has a value that no other one has, so that a value which is seen tells which request it is of. Of each key
//! the model remembers the requests and deletes that may have had the last word: those that no other one, begun after
//! they had ended and known to be done, has superseded. One whose answer was an error or never came is *open*: it is done
//! as a whole or not at all. When a database was opened again and read, open ones are decided by what is there, and stay
//! so.

use std::collections::{BTreeMap, BTreeSet};

use crate::Selection;

/// Table (0: metric metadata, the last number: views), series or name as text, time.
pub(super) type Key = (u16, String, i64);

/// What is seen: the bits of values, by key.
pub(super) type Rows = BTreeMap<Key, u64>;

/// Number of an operation.
pub(super) type OpId = usize;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Not known to be done.
    Open,
    /// Done.
    Sure,
    /// Not done, and never will be.
    Void,
}

#[derive(Debug)]
struct Op {
    /// Number of the process that was asked.
    by: u32,
    begun: u64,
    /// It has no effect from here on.
    ended: Option<u64>,
    fate: Fate,
    what: &'static str,
}

#[derive(Debug, Default)]
struct Cell {
    /// What it may have been when the model was last sure of it, and when that was.
    base: Vec<Option<u64>>,
    since: u64,
    writes: Vec<(OpId, u64)>,
}

/// One thing that may be the last word on a key.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Word {
    op: Option<OpId>,
    bits: Option<u64>,
    begun: u64,
    ended: Option<u64>,
    sure: bool,
}

/// How long rows are kept, as the simulation's settings have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kept {
    /// However wrong the clock is.
    Always,
    /// As long as this is before its time, milliseconds.
    From(i64),
}

/// The model of one database.
#[derive(Debug, Default)]
pub(super) struct Model {
    now: u64,
    ops: Vec<Op>,
    cells: BTreeMap<Key, Cell>,
    deletes: Vec<(OpId, Doomed)>,
    series: BTreeSet<String>,
}

/// The pairs of a series' text.
pub(super) fn pairs(series: &str) -> impl Iterator<Item = (&str, &str)> {
    series.split(',').filter_map(|pair| pair.split_once('='))
}

/// Whether a selection of ours means a key.
pub(super) fn selects(selection: &Selection, key: &Key) -> bool {
    let (table, series, ts) = key;
    let value = |name: &str| pairs(series).find(|p| p.0 == name).map_or("", |p| p.1);
    selection.table.id == *table
        && (selection.start_ms..=selection.end_ms).contains(ts)
        && selection.matchers.iter().all(|m| m.matches(value(m.name())))
}

/// What a delete takes away.
#[derive(Debug)]
enum Doomed {
    Selected(Vec<Selection>),
    Key(Key),
}

impl Doomed {
    fn means(&self, key: &Key) -> bool {
        match self {
            Self::Selected(selections) => selections.iter().any(|s| selects(s, key)),
            Self::Key(doomed) => doomed == key,
        }
    }
}

impl Model {
    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// A moment, for [`Model::check`].
    pub fn moment(&mut self) -> u64 {
        self.tick()
    }

    fn begin(&mut self, by: u32, what: &'static str) -> OpId {
        let begun = self.tick();
        self.ops.push(Op { by, begun, ended: None, fate: Fate::Open, what });
        self.ops.len() - 1
    }

    /// A request with rows is sent; of equal keys the last counts.
    pub fn write(&mut self, by: u32, rows: &[(Key, u64)]) -> OpId {
        let op = self.begin(by, "write");
        let rows: BTreeMap<&Key, u64> = rows.iter().map(|(key, bits)| (key, *bits)).collect();
        for (key, bits) in rows {
            self.series.insert(key.1.clone());
            let cell = self.cells.entry(key.clone()).or_insert_with(|| Cell { base: vec![None], ..Cell::default() });
            cell.writes.push((op, bits));
        }
        op
    }

    /// A delete is asked for.
    pub fn delete(&mut self, by: u32, selections: Vec<Selection>) -> OpId {
        let op = self.begin(by, "delete");
        self.deletes.push((op, Doomed::Selected(selections)));
        op
    }

    /// That one thing is dropped is asked for.
    pub fn drop_key(&mut self, by: u32, key: Key) -> OpId {
        let op = self.begin(by, "drop");
        self.deletes.push((op, Doomed::Key(key)));
        op
    }

    /// It was acknowledged.
    pub fn done(&mut self, op: OpId) {
        let now = self.tick();
        (self.ops[op].ended, self.ops[op].fate) = (Some(now), Fate::Sure);
    }

    /// It was refused for good.
    pub fn refused(&mut self, op: OpId) {
        let now = self.tick();
        (self.ops[op].ended, self.ops[op].fate) = (Some(now), Fate::Void);
    }

    /// Its answer was an error; it has been done or not.
    pub fn failed(&mut self, op: OpId) {
        let now = self.tick();
        self.ops[op].ended = Some(now);
    }

    /// A process is gone: nothing goes on in it.
    pub fn died(&mut self, by: u32) {
        let now = self.tick();
        self.ops.iter_mut().filter(|op| op.by == by && op.ended.is_none()).for_each(|op| op.ended = Some(now));
    }

    /// Whether a series was ever written.
    pub fn knows(&self, series: &str) -> bool {
        self.series.contains(series)
    }

    pub fn keys(&self) -> Vec<Key> {
        self.cells.keys().cloned().collect()
    }

    fn word(&self, op: OpId, bits: Option<u64>) -> Option<Word> {
        let Op { begun, ended, fate, .. } = self.ops[op];
        let sure = fate == Fate::Sure;
        (fate != Fate::Void).then_some(Word { op: Some(op), bits, begun, ended, sure })
    }

    /// The words on a key of which one may be the last for a reader that began at `start` and was through at `end`.
    fn words(&self, key: &Key, start: u64, end: u64) -> Vec<Word> {
        let Some(cell) = self.cells.get(key) else { return vec![] };
        let base = cell.base.iter().map(|bits| Word {
            op: None,
            bits: *bits,
            begun: cell.since,
            ended: Some(cell.since),
            sure: true,
        });
        let writes = cell.writes.iter().filter_map(|(op, bits)| self.word(*op, Some(*bits)));
        let deletes = self.deletes.iter().filter(|d| d.1.means(key)).filter_map(|d| self.word(d.0, None));
        let all: Vec<Word> = base.chain(writes).chain(deletes).filter(|w| w.begun < end).collect();
        let over = |a: &Word, b: &Word| {
            b.sure && b.ended.is_some_and(|ended| ended < start) && a.ended.is_some_and(|ended| b.begun > ended)
        };
        all.iter().filter(|a| !all.iter().any(|b| over(a, b))).copied().collect()
    }

    /// Compares what a reader between two moments saw of the keys for which `meant` holds. `kept` tells how long a key is
    /// kept.
    pub fn check(
        &self,
        (start, end): (u64, u64),
        seen: &Rows,
        meant: &dyn Fn(&Key) -> bool,
        kept: &dyn Fn(&Key) -> Kept,
    ) -> Result<(), String> {
        for (key, bits) in seen {
            if !meant(key) {
                return Err(format!("{key:?} was not asked for"));
            }
            if !self.cells.contains_key(key) {
                return Err(format!("{key:?} = {bits:#x} was never written"));
            }
        }
        for key in self.cells.keys().filter(|key| meant(key)) {
            let found = seen.get(key).copied();
            let kept = kept(key);
            let words = self.words(key, start, end);
            let right = match (kept, found) {
                (Kept::From(floor), Some(_)) if key.2 < floor => false,
                (Kept::From(_), None) => true,
                _ => words.iter().any(|w| w.bits == found),
            };
            if !right {
                return Err(format!(
                    "{key:?} is {} ({kept:?}) and may be {}; all words: {}",
                    found.map_or("absent".to_owned(), |bits| format!("{bits:#x}")),
                    words.iter().map(|w| self.show(w)).collect::<Vec<_>>().join(" or "),
                    self.history(key),
                ));
            }
        }
        Ok(())
    }

    fn show(&self, word: &Word) -> String {
        let what = word.op.map_or("state".to_owned(), |op| format!("{} {op}", self.ops[op].what));
        let bits = word.bits.map_or("absent".to_owned(), |bits| format!("{bits:#x}"));
        let ended = word.ended.map_or("?".to_owned(), |e| e.to_string());
        format!("{bits} ({what}, {}..{ended}{})", word.begun, if word.sure { "" } else { ", open" })
    }

    fn history(&self, key: &Key) -> String {
        let all: Vec<_> = self.words(key, 0, u64::MAX).iter().map(|w| self.show(w)).collect();
        all.join(", ")
    }

    /// Takes what is seen of everything for the truth, after checking it. The database was opened after all that is open
    /// had ended, and nothing goes on.
    pub fn settle(&mut self, seen: &Rows, kept: &dyn Fn(&Key) -> Kept) -> Result<(), String> {
        let now = self.tick();
        let mut done = BTreeSet::new();
        for key in self.cells.keys() {
            let found = seen.get(key).copied();
            if found.is_none() && kept(key) != Kept::Always {
                continue;
            }
            let words = self.words(key, now, now);
            let mut of = words.iter().filter(|w| w.bits == found);
            // Only when nothing else can have made it so is it known whose it is.
            if let (Some(Word { op: Some(op), sure: false, .. }), None) = (of.next(), of.next()) {
                done.insert(*op);
            }
        }
        for op in done {
            self.ops[op].fate = Fate::Sure;
        }
        self.check((now, now), seen, &|_| true, kept)?;
        let mut cells = BTreeMap::new();
        for key in self.keys() {
            let found = seen.get(&key).copied();
            let base = match found {
                None if kept(&key) != Kept::Always => {
                    // Expired rows may show again while a clock is wrong.
                    let mut base: Vec<_> = self.words(&key, now, now).iter().map(|w| w.bits).collect();
                    base.push(None);
                    base
                }
                found => vec![found],
            };
            if base != [None] {
                cells.insert(key, Cell { base, since: now, writes: vec![] });
            }
        }
        self.cells = cells;
        self.deletes.clear();
        Ok(())
    }
}
