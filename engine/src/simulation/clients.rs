//! What clients do to a database, and the checks of what they are told.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use catalog::{Entropy, Error, ErrorKind, MatchOp, Matcher, SeededEntropy, tables};
use parking_lot::Mutex;
use tokio::time::{sleep, timeout};

use super::dice::Dice;
use super::model::{Kept, Key, Model, OpId, Rows, pairs, selects};
use super::rows;
use super::store::Client;
use super::world::{BEGIN_MS, Process, World};
use crate::cut::Floors;
use crate::{Engine, Retention, Selection, Stop, backup, verify};

const SECOND: i64 = 1000;
const HOUR: i64 = 3600 * SECOND;
const DAY: i64 = 24 * HOUR;

/// Longest that a query may run: less than the grace of superseded objects.
const QUERY_MAX: Duration = Duration::from_secs(50);
/// How long clients wait for the answer to a write.
pub(super) const PATIENCE: Duration = Duration::from_secs(600);
/// Longest that anything else may take, whatever fails: it is never waited for by hand.
pub(super) const HANGS: Duration = Duration::from_secs(2 * 3600);

/// A database that is open, in a process.
#[derive(Debug, Clone)]
pub(super) struct Db {
    pub engine: Engine,
    pub process: Arc<Process>,
    /// Whether another process tries to take it over: it may be refused anything.
    pub contested: Arc<AtomicBool>,
    /// Whether another process has taken it over: it must acknowledge nothing.
    pub replaced: Arc<AtomicBool>,
}

/// What all clients share.
#[derive(Debug)]
pub(super) struct Shared {
    pub world: Arc<World>,
    pub dice: Dice,
    pub model: Mutex<Model>,
    pub retention: Retention,
    /// Numbers for values.
    pub values: Mutex<u64>,
    /// Requests whose answer was an error; clients send them again.
    pub failed: Mutex<Vec<Vec<(Key, u64)>>>,
    /// Grows as series come and go.
    pub churn: Mutex<u64>,
}

pub(super) fn matcher(name: &str, op: MatchOp, value: &str) -> Matcher {
    Matcher::new(name, op, value).expect("a good matcher")
}

/// What a client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Write,
    Query,
    Metadata,
    Visit,
    Flush,
    Compact,
    Delete,
    Fold,
    View,
    Verify,
}

impl Action {
    /// What a process is asked for that was replaced.
    pub const OF_STALE: [Self; 7] =
        [Self::Write, Self::Write, Self::Flush, Self::Compact, Self::Delete, Self::Fold, Self::View];

    pub fn of(n: u64) -> Self {
        match n {
            0..48 => Self::Write,
            48..51 => Self::View,
            51..66 => Self::Query,
            66..69 => Self::Metadata,
            69..72 => Self::Visit,
            72..81 => Self::Flush,
            81..89 => Self::Compact,
            89..95 => Self::Delete,
            95..97 => Self::Fold,
            _ => Self::Verify,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Write => "op: write",
            Self::Query => "op: query",
            Self::Metadata => "op: metadata",
            Self::Visit => "op: visit",
            Self::Flush => "op: flush",
            Self::Compact => "op: compact",
            Self::Delete => "op: delete",
            Self::Fold => "op: fold deletes",
            Self::View => "op: view made or dropped",
            Self::Verify => "op: verify",
        }
    }
}

impl Shared {
    pub async fn act(self: Arc<Self>, db: Db, action: Action) {
        let work = async {
            match action {
                Action::Write => self.write(&db).await,
                Action::Query => self.query(&db).await,
                Action::Metadata => self.metadata(&db),
                Action::Visit => self.visit(&db).await,
                Action::Flush => self.done(&db, "flush", db.engine.flush()).await,
                Action::Compact => self.done(&db, "compaction", db.engine.compact()).await,
                Action::Delete => self.delete(&db).await,
                Action::Fold => self.done(&db, "folding deletes", db.engine.fold_deletes()).await,
                Action::View => self.view(&db).await,
                Action::Verify => drop(self.verified(&db).await),
            }
        };
        if timeout(HANGS, work).await.is_err() {
            self.world.wrong(format!("{action:?} hangs"));
        }
    }

    pub async fn act_all(self: Arc<Self>, db: Db, actions: Vec<Action>) {
        for action in actions {
            sleep(Duration::from_millis(self.dice.below(3000))).await;
            self.world.trace.count("op: asked of a process about to be replaced");
            self.clone().act(db.clone(), action).await;
        }
    }

    /// Whether calls fail at present.
    fn is_well(&self) -> bool {
        self.world.fs_faults.load(Ordering::Relaxed) == 0 && self.world.store_faults.load(Ordering::Relaxed) == 0
    }

    /// Errors are of a kind that says to come again, and come only when something fails.
    pub fn judge(&self, what: &str, e: &Error) {
        let fine = match e.kind() {
            ErrorKind::Unavailable | ErrorKind::Timeout => true,
            // What a disk says of itself.
            ErrorKind::Internal => e.to_string().contains("input or output"),
            // A list that is out of date names what is gone.
            ErrorKind::NotFound => self.world.stale_lists.load(Ordering::Relaxed),
            _ => false,
        };
        if !fine {
            self.world.wrong(format!("{what} failed as {:?}: {e}", e.kind()));
        }
    }

    async fn done(&self, db: &Db, what: &str, work: impl Future<Output = catalog::Result<()>>) {
        let well = self.is_well();
        let Some(Err(e)) = db.process.answer(work).await else { return };
        self.world.trace.say(|| format!("{what} failed: {e}"));
        self.judge(what, &e);
        if well && self.is_well() && !db.contested.load(Ordering::Relaxed) && !e.message().contains("is full") {
            self.world.wrong(format!("{what} failed although nothing fails: {e}"));
        }
    }

    // --- writes ---

    fn series(&self) -> String {
        let dice = &self.dice;
        let mut pairs = vec![
            ("__name__", format!("m{}", dice.below(4))),
            ("instance", format!("i{}", dice.below(3))),
            ("job", dice.pick(&["a", "b"]).to_owned()),
        ];
        if dice.permille(200) {
            // Series that come and go.
            let mut churn = self.churn.lock();
            *churn += u64::from(dice.permille(300));
            pairs.push(("pod", format!("p{churn}")));
        }
        pairs.retain(|p| p.0 != "job" || dice.permille(800));
        pairs.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
    }

    /// Now, a little out of order, backfill, and rows that retention does not keep.
    fn time(&self) -> i64 {
        let dice = &self.dice;
        let ago = match dice.below(20) {
            0..10 => dice.below(20) as i64 * 15 * SECOND,
            10..15 => dice.below(8) as i64 * 15 * 60 * SECOND,
            15 => DAY + dice.below(10) as i64 * HOUR,
            16 => 2 * DAY + dice.below(1000) as i64,
            17 => 3 * DAY,
            18 => 7 * DAY + dice.below(3) as i64,
            _ => 20 * DAY,
        };
        // A grid, so that rows are overwritten.
        let now = self.world.clock.true_ms();
        now - now % (15 * SECOND) - ago
    }

    pub fn value(&self) -> u64 {
        let mut values = self.values.lock();
        *values += 1;
        let n = *values;
        match self.dice.below(6) {
            0 | 1 => n as f64,
            2 => n as f64 + 0.5,
            3 => -(n as f64),
            4 => f64::from_bits(0x7ff8_0000_0000_0000 | n),
            _ => n as f64 * 1.000_000_1e-9,
        }
        .to_bits()
    }

    pub fn rows(&self) -> Vec<(Key, u64)> {
        let dice = &self.dice;
        let table = |n| match n {
            0..70 => 1,
            70..80 => 2,
            80..90 => 3,
            _ => 0,
        };
        let count = dice.pick(&[1, 1, 3, 8, 30]);
        let one_table = dice.coin().then(|| table(dice.below(100)));
        let row = |_| {
            let key = match one_table.unwrap_or_else(|| table(dice.below(100))) {
                0 => (0, format!("m{}", dice.below(4)), 0),
                table => (table, self.series(), self.time()),
            };
            (key, self.value())
        };
        (0..count).map(row).collect()
    }

    async fn write(&self, db: &Db) {
        let again = self.failed.lock().pop().filter(|_| self.dice.permille(700));
        if again.is_some() {
            self.world.trace.count("op: request sent again");
        }
        let patience = if self.dice.permille(60) { Duration::from_millis(self.dice.below(40)) } else { PATIENCE };
        self.write_rows(db, again.unwrap_or_else(|| self.rows()), patience).await;
    }

    /// Returns whether it was acknowledged.
    pub async fn write_rows(&self, db: &Db, rows: Vec<(Key, u64)>, patience: Duration) -> bool {
        let write = match rows::request(&db.engine, &rows) {
            Ok(write) => write,
            Err(e) => {
                self.world.wrong(format!("a request can't be encoded: {e}"));
                return false;
            }
        };
        let replaced = db.replaced.load(Ordering::Relaxed);
        let op = self.model.lock().write(db.process.number, &rows);
        self.world.trace.say(|| format!("write {op}: {rows:x?}"));
        let answer = db.process.answer(timeout(patience, db.engine.write(write))).await;
        let acknowledged = matches!(answer, Some(Ok(Ok(()))));
        self.answered(op, answer, replaced, rows);
        acknowledged
    }

    fn answered(
        &self,
        op: OpId,
        answer: Option<Result<catalog::Result<()>, tokio::time::error::Elapsed>>,
        replaced: bool,
        rows: Vec<(Key, u64)>,
    ) {
        let mut model = self.model.lock();
        match answer {
            Some(Ok(Ok(()))) if replaced => self.world.wrong(format!("write {op} was acknowledged by a stale process")),
            Some(Ok(Ok(()))) => model.done(op),
            Some(Ok(Err(e))) => {
                self.world.trace.say(|| format!("write {op} failed: {e}"));
                self.world.trace.count("op: write refused");
                self.judge("write", &e);
                // Only when the log was asked is it not known what came of it.
                let unknown = e.message().contains("log can't be written") || e.message().contains("stopped before");
                if unknown && !replaced {
                    model.failed(op)
                } else {
                    model.refused(op)
                }
                self.failed.lock().push(rows);
            }
            // It is in the queue, and will be done or not until the process ends.
            Some(Err(_)) => {
                self.world.trace.count("op: write given up");
                if replaced {
                    model.refused(op);
                }
                self.failed.lock().push(rows);
            }
            None => self.failed.lock().push(rows),
        }
    }

    // --- deletes ---

    fn matchers(&self) -> Vec<Matcher> {
        let dice = &self.dice;
        let mut out = vec![];
        if dice.permille(700) {
            let (op, value) = dice.pick(&[
                (MatchOp::Eq, "m0"),
                (MatchOp::Eq, "m1"),
                (MatchOp::Ne, "m2"),
                (MatchOp::Re, "m[12]"),
                (MatchOp::Nre, "m0|m3"),
                (MatchOp::Eq, "none"),
            ]);
            out.push(matcher("__name__", op, value));
        }
        if dice.permille(500) {
            let (name, op, value) = dice.pick(&[
                ("instance", MatchOp::Eq, "i1"),
                ("instance", MatchOp::Ne, "i0"),
                ("job", MatchOp::Eq, ""),
                ("job", MatchOp::Re, "a|"),
                ("pod", MatchOp::Ne, ""),
                ("pod", MatchOp::Re, "p[0-3]"),
            ]);
            out.push(matcher(name, op, value));
        }
        out
    }

    fn selection(&self) -> Selection {
        let dice = &self.dice;
        let now = self.world.clock.true_ms();
        let (start_ms, end_ms) = match dice.below(5) {
            0 | 1 => (i64::MIN, i64::MAX),
            2 => (now - HOUR, now),
            3 => (BEGIN_MS - 4 * DAY, BEGIN_MS - DAY),
            _ => {
                let start = now - dice.below(10_000) as i64 * SECOND;
                (start, start + dice.below(7200) as i64 * SECOND)
            }
        };
        let table = tables::all()[dice.pick(&[0, 0, 0, 1, 2])].clone();
        Selection { table, matchers: self.matchers(), start_ms, end_ms }
    }

    async fn delete(&self, db: &Db) {
        let selections: Vec<_> = (0..1 + self.dice.below(2)).map(|_| self.selection()).collect();
        let replaced = db.replaced.load(Ordering::Relaxed);
        let op = self.model.lock().delete(db.process.number, selections.clone());
        self.world.trace.say(|| format!("delete {op}: {selections:?}"));
        let patience = Duration::from_millis(if self.dice.permille(100) { self.dice.below(100) } else { 3_600_000 });
        match db.process.answer(timeout(patience, db.engine.delete(selections))).await {
            Some(Ok(Ok(()))) if replaced => self.world.wrong(format!("delete {op} was done by a stale process")),
            Some(Ok(Ok(()))) => self.model.lock().done(op),
            Some(Ok(Err(e))) => {
                self.world.trace.say(|| format!("delete {op} failed: {e}"));
                self.world.trace.count("op: delete failed");
                self.judge("delete", &e);
                let mut model = self.model.lock();
                if replaced { model.refused(op) } else { model.failed(op) }
            }
            // It goes on by itself, or the process is dead.
            Some(Err(_)) | None => {}
        }
    }

    // --- views ---

    /// Makes one, replaces it, or drops it.
    async fn view(&self, db: &Db) {
        let name = format!("v{}", self.dice.below(3));
        let replaced = db.replaced.load(Ordering::Relaxed);
        let (op, answer) = if self.dice.permille(650) {
            let bits = self.value();
            let op = self.model.lock().write(db.process.number, &[(rows::view_key(&name), bits)]);
            (op, db.process.answer(db.engine.create_view(rows::view(&name, bits), true)).await)
        } else {
            let op = self.model.lock().drop_key(db.process.number, rows::view_key(&name));
            (op, db.process.answer(db.engine.drop_views(vec![name.clone()])).await)
        };
        self.world.trace.say(|| format!("view {op}, {name}: {answer:?}"));
        match answer {
            Some(Ok(true)) if replaced => self.world.wrong(format!("view {op} was changed by a stale process")),
            // It knows of none, which may have been right until it was replaced.
            Some(Ok(_)) if replaced => self.model.lock().refused(op),
            Some(Ok(_)) => self.model.lock().done(op),
            Some(Err(e)) => {
                self.world.trace.count("op: view failed");
                self.judge("view", &e);
                let mut model = self.model.lock();
                if replaced { model.refused(op) } else { model.failed(op) }
            }
            None => {}
        }
    }

    // --- reads ---

    fn kept(&self, key: &Key, floors: &Floors) -> Kept {
        let rule = self.retention.rules.iter().position(|r| {
            r.table_id == key.0
                && r.matchers.iter().all(|m| m.matches(pairs(&key.1).find(|p| p.0 == m.name()).map_or("", |p| p.1)))
        });
        let (age, floor) = match rule {
            Some(i) => (self.retention.rules[i].age, floors.rules.get(i).map_or(i64::MIN, |r| r.1)),
            None => (self.retention.age, floors.default_ms),
        };
        match age {
            // No clock may be wrong by more than an hour before rows of half a day's distance are taken.
            Some(age) if key.0 != 0 && key.2 < BEGIN_MS - age.as_millis() as i64 + DAY / 2 => Kept::From(floor),
            _ => Kept::Always,
        }
    }

    async fn query(&self, db: &Db) {
        let selection = self.selection();
        let start = self.model.lock().moment();
        let well = self.is_well();
        let answer = db.process.answer(timeout(QUERY_MAX, rows::read(&db.engine, &selection))).await;
        match answer {
            Some(Ok(Ok((seen, floors)))) => {
                let mut model = self.model.lock();
                let end = model.moment();
                let meant = |key: &Key| selects(&selection, key);
                if let Err(e) = model.check((start, end), &seen, &meant, &|key| self.kept(key, &floors)) {
                    self.world.wrong(format!("query {selection:?}: {e}"));
                }
                self.world.trace.count("op: query answered");
            }
            Some(Ok(Err(e))) => {
                self.judge("query", &e);
                if well && self.is_well() {
                    self.world.wrong(format!("query failed although nothing fails: {e}"));
                }
            }
            Some(Err(_)) | None => {}
        }
    }

    fn metadata(&self, db: &Db) {
        if db.process.is_dead() {
            return;
        }
        let mut model = self.model.lock();
        let (start, end) = (model.moment(), model.moment());
        let seen = rows::metadata(&db.engine);
        if let Err(e) = model.check((start, end), &seen, &|key| key.0 == 0, &|_| Kept::Always) {
            self.world.wrong(format!("metadata: {e}"));
        }
    }

    /// Series that a selection means are a superset of those with rows.
    async fn visit(&self, db: &Db) {
        let selection = self.selection();
        let mut visited = vec![];
        let stop = Stop::default();
        let visit = db.engine.visit(&selection, &stop, |series| {
            visited.push(rows::text(&series.tags));
            true
        });
        match db.process.answer(timeout(QUERY_MAX, visit)).await {
            Some(Ok(Err(e))) => self.judge("visit", &e),
            Some(Ok(Ok(()))) => {
                let model = self.model.lock();
                for series in visited {
                    let key = (selection.table.id, series, selection.start_ms.max(0));
                    let any_time = Selection { start_ms: i64::MIN, end_ms: i64::MAX, ..selection.clone() };
                    if !selects(&any_time, &key) || !model.knows(&key.1) {
                        self.world.wrong(format!("visit of {selection:?} came to {}", key.1));
                    }
                }
            }
            _ => {}
        }
    }

    /// Everything that is in the database.
    async fn read_all(&self, db: &Db) -> catalog::Result<(Rows, BTreeMap<u16, Arc<Floors>>)> {
        let (mut all, mut floors) = (rows::metadata(&db.engine), BTreeMap::new());
        all.extend(rows::views(&db.engine));
        for table in tables::all() {
            let everything =
                Selection { table: (*table).clone(), matchers: vec![], start_ms: i64::MIN, end_ms: i64::MAX };
            let read = timeout(QUERY_MAX, rows::read(&db.engine, &everything)).await;
            let (seen, of_table) = read.map_err(|_| Error::timeout("it took too long"))??;
            all.extend(seen);
            floors.insert(table.id, of_table);
        }
        Ok((all, floors))
    }

    fn kept_of(&self, key: &Key, floors: &BTreeMap<u16, Arc<Floors>>) -> Kept {
        floors.get(&key.0).map_or(Kept::Always, |floors| self.kept(key, floors))
    }

    /// Reads everything, again while it fails.
    async fn patient(&self, db: &Db) -> Option<(Rows, BTreeMap<u16, Arc<Floors>>)> {
        for _ in 0..20 {
            match db.process.answer(self.read_all(db)).await? {
                Ok(found) => return Some(found),
                Err(e) => self.judge("read", &e),
            }
        }
        None
    }

    /// After an opening: what is there decides what was not known.
    pub async fn settle(&self, db: &Db, when: &str) {
        let Some((seen, floors)) = self.patient(db).await else { return };
        self.world.trace.count("op: settled");
        if let Err(e) = self.model.lock().settle(&seen, &|key| self.kept_of(key, &floors)) {
            self.world.wrong(format!("{when}: {e}"));
        }
    }

    /// While nothing else goes on.
    pub async fn compare(&self, db: &Db, when: &str) {
        let Some((seen, floors)) = self.patient(db).await else { return };
        let mut model = self.model.lock();
        let now = (model.moment(), model.moment());
        if let Err(e) = model.check(now, &seen, &|_| true, &|key| self.kept_of(key, &floors)) {
            self.world.wrong(format!("{when}: {e}"));
        }
    }

    /// Checks all objects as `thalweg verify` does; returns those that nothing names.
    pub async fn verified(&self, db: &Db) -> Option<Vec<String>> {
        let store = Client::open(&db.process, &self.world.bucket);
        let entropy: Arc<dyn Entropy> = Arc::new(SeededEntropy::new(0));
        let place = backup::Place { store: store.clone(), database: db.engine.settings().database.clone() };
        let check = async {
            let (number, state) = backup::state(&place, &entropy).await?;
            let report = verify::verify(&store, &place.database, &state, &|_| {}).await?;
            Ok::<_, Error>((number, report))
        };
        match db.process.answer(check).await? {
            Ok((number, report)) => {
                // What was merged meanwhile may be gone.
                let now = db.process.answer(backup::state(&place, &entropy)).await?;
                if !report.damage.is_empty() && now.is_ok_and(|now| now.0 == number) {
                    self.world.wrong(format!("verify: {:?}", report.damage));
                }
                Some(report.orphans)
            }
            Err(e) => {
                self.judge("verify", &e);
                None
            }
        }
    }

    // --- the world ---

    pub fn jump(&self) {
        let year_2100 = 4_102_444_800_000 - BEGIN_MS;
        let ahead = self.dice.pick(&[0, 0, HOUR, -HOUR, year_2100, -BEGIN_MS]);
        self.world.trace.count("fault: clock jump");
        self.world.trace.say(|| format!("clock is ahead by {ahead} ms"));
        self.world.clock.set_ahead(ahead);
    }

    pub async fn shutdown(&self, db: &Db) {
        let well = self.is_well();
        let stopped = db.process.answer(timeout(HANGS, db.engine.shutdown(Duration::from_secs(10)))).await;
        match stopped {
            Some(Err(_)) => self.world.wrong("shutdown hangs".to_owned()),
            Some(Ok(Err(e))) => {
                self.judge("shutdown", &e);
                if well {
                    self.world.wrong(format!("shutdown failed although nothing fails: {e}"));
                }
            }
            _ => {}
        }
    }
}
