//! What is done to a database in one history, and the checks in between.
//!
//! A history is a row of *lives*: the database is opened, clients work on it at the same time while calls fail, and it
//! ends by a shutdown, a kill or a loss of power, in the middle of whatever call. After each opening, and once more when
//! nothing fails any longer, everything that is in it is compared with the model.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use catalog::{Entropy, Error, ErrorKind, MatchOp, Matcher, SeededEntropy, tables};
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::dice::Dice;
use super::fs::SimFs;
use super::model::{Kept, Key, Model, OpId, Rows, pairs, selects};
use super::rows;
use super::store::Client;
use super::world::{BEGIN_MS, Death, Machine, Process, World};
use crate::cut::Floors;
use crate::{
    Components, Engine, Extensions, LogStore, Retention, RetentionRule, Selection, Settings, SqlCatalog, Stop,
    Telemetry, backup, verify,
};

const SECOND: i64 = 1000;
const HOUR: i64 = 3600 * SECOND;
const DAY: i64 = 24 * HOUR;

/// Longest that a query may run: less than the grace of superseded objects.
const QUERY_MAX: Duration = Duration::from_secs(50);
/// How long clients wait for the answer to a write.
const PATIENCE: Duration = Duration::from_secs(600);
/// Longest that anything else may take, whatever fails: it is never waited for by hand.
const HANGS: Duration = Duration::from_secs(2 * 3600);
/// After so long no request of a dead process is on its way any more.
const REQUESTS_END: Duration = Duration::from_secs(200);
/// Attempts to open with faults, and without.
const ATTEMPTS: (u32, u32) = (5, 4);

/// What is drawn for a whole history.
#[derive(Debug)]
struct Plan {
    settings: Settings,
    /// Of a thousand calls, how many fail while things fail.
    faults: (u32, u32),
    /// Calls that a process makes at most before it dies, if it does.
    life: u64,
    clock_jumps: bool,
    disk_fills: bool,
    lives: u64,
    operations: u64,
}

impl Plan {
    fn draw(dice: &Dice) -> Self {
        let retention = match dice.below(4) {
            0 => Retention { age: Some(Duration::from_secs(10 * 86_400)), rules: vec![], bytes: None },
            1 => Retention {
                age: Some(Duration::from_secs(10 * 86_400)),
                rules: vec![
                    rule("__name__", MatchOp::Eq, "m1", Some(Duration::from_secs(5 * 86_400))),
                    rule("instance", MatchOp::Re, "i0|i9", None),
                ],
                bytes: None,
            },
            _ => Retention::default(),
        };
        let disk_fills = dice.permille(120);
        let settings = Settings {
            catalog: SqlCatalog::None,
            memory_limit: 64 << 20,
            flush_bytes: dice.pick(&[2 << 10, 16 << 10, 128 << 20, 128 << 20]),
            flush_interval: Duration::from_secs(dice.pick(&[15, 120, 3600])),
            wal_bytes_max: dice.pick(&[4 << 10, 512 << 20]),
            delete_grace: Duration::from_secs(dice.pick(&[60, 180])),
            wal: dice.pick(&[LogStore::Local, LogStore::Object]),
            reserve_bytes: if disk_fills { 1 << 20 } else { 0 },
            retention,
            cpu_threads: 1,
            own_threads: false,
            ..Settings::default()
        };
        Self {
            settings,
            faults: dice.pick(&[(0, 0), (20, 5), (60, 30), (150, 100), (150, 0), (5, 200)]),
            life: dice.pick(&[30, 300, 300, 2000]),
            clock_jumps: dice.permille(250),
            disk_fills,
            lives: 1 + dice.below(5),
            operations: dice.pick(&[5, 15, 40]),
        }
    }
}

fn rule(name: &str, op: MatchOp, value: &str, age: Option<Duration>) -> RetentionRule {
    RetentionRule { table_id: tables::SAMPLES.id, matchers: vec![matcher(name, op, value)], age }
}

fn matcher(name: &str, op: MatchOp, value: &str) -> Matcher {
    Matcher::new(name, op, value).expect("a good matcher")
}

/// A database that is open, in a process.
#[derive(Debug, Clone)]
struct Db {
    engine: Engine,
    process: Arc<Process>,
    /// Whether another process tries to take it over: it may be refused anything.
    contested: Arc<AtomicBool>,
    /// Whether another process has taken it over: it must acknowledge nothing.
    replaced: Arc<AtomicBool>,
}

/// What all clients share.
#[derive(Debug)]
struct Shared {
    world: Arc<World>,
    dice: Dice,
    model: Mutex<Model>,
    retention: Retention,
    /// Numbers for values.
    values: Mutex<u64>,
    /// Requests whose answer was an error; clients send them again.
    failed: Mutex<Vec<Vec<(Key, u64)>>>,
    /// Grows as series come and go.
    churn: Mutex<u64>,
}

/// Runs the history of a seed. What it found to be wrong is in the world.
pub(super) async fn history(world: &Arc<World>, seed: u64, root: &Path) {
    let dice = Dice::new(seed, "workload");
    let plan = Plan::draw(&dice);
    world.trace.say(|| format!("{plan:?}"));
    world.stale_lists.store(dice.permille(100), Ordering::Relaxed);
    let shared = Arc::new(Shared {
        world: world.clone(),
        dice,
        model: Mutex::default(),
        retention: plan.settings.retention.clone(),
        values: Mutex::default(),
        failed: Mutex::default(),
        churn: Mutex::default(),
    });
    let entropy = Arc::new(SeededEntropy::new(seed));
    let mut history = History { home: Machine::new("a", root), away: Machine::new("b", root), shared, entropy, plan };
    history.run().await;
}

#[derive(Debug)]
struct History {
    /// The machine that the database is on, and another one.
    home: Arc<Machine>,
    away: Arc<Machine>,
    shared: Arc<Shared>,
    entropy: Arc<SeededEntropy>,
    plan: Plan,
}

impl History {
    async fn run(&mut self) {
        let world = self.shared.world.clone();
        for _ in 0..self.plan.lives {
            self.set_faults();
            let Some(db) = self.open(true).await else { return };
            if self.shared.dice.permille(700) {
                self.shared.settle(&db, "after it was opened").await;
            }
            self.set_faults();
            self.work(&db).await;
            let db = if self.shared.dice.permille(200) { self.take_over(db).await } else { Some(db) };
            let Some(db) = db else { return };
            if self.shared.dice.permille(300) {
                self.recover(&db).await;
            }
            self.end(db).await;
            if world.verdict().is_err() {
                return;
            }
        }
        self.finish().await;
    }

    fn set_faults(&self) {
        let (fs, store) = self.plan.faults;
        self.shared.world.faults(fs, store);
    }

    /// Opens the database at home, as often as it takes. When faults have ended it must open.
    async fn open(&mut self, mortal: bool) -> Option<Db> {
        let world = self.shared.world.clone();
        for attempt in 0..ATTEMPTS.0 + ATTEMPTS.1 {
            if attempt == ATTEMPTS.0 {
                self.heal();
            }
            let mortal = mortal && attempt < ATTEMPTS.0;
            let process = Process::start(&world, &self.home, self.doom(mortal));
            let opened = timeout(HANGS, self.start(&process)).await;
            match process.answer(std::future::ready(opened)).await {
                None => {}
                Some(Ok(Ok(engine))) => {
                    world.trace.count("op: open");
                    return Some(Db { engine, process, contested: Arc::default(), replaced: Arc::default() });
                }
                Some(Ok(Err(e))) => {
                    world.trace.say(|| format!("not opened: {e}"));
                    world.trace.count("op: open failed");
                    self.shared.judge("open", &e);
                    if attempt + 1 == ATTEMPTS.0 + ATTEMPTS.1 {
                        world.wrong(format!("it can't be opened although nothing fails any more: {e}"));
                    }
                }
                Some(Err(_)) => world.wrong("opening hangs".to_owned()),
            }
            process.exit();
            self.shared.model.lock().died(process.number);
            sleep(Duration::from_secs(1)).await;
        }
        world.wrong("it did not open".to_owned());
        None
    }

    fn doom(&self, mortal: bool) -> Option<(u64, Death, bool)> {
        let dice = &self.shared.dice;
        (mortal && dice.permille(700))
            .then(|| (dice.below(self.plan.life), dice.pick(&[Death::Kill, Death::PowerLoss]), dice.coin()))
    }

    async fn start(&self, process: &Arc<Process>) -> catalog::Result<Engine> {
        let settings = Settings { data_dir: process.machine.dir.clone(), ..self.plan.settings.clone() };
        let components = Components {
            store: Client::open(process, &self.shared.world.bucket),
            fs: Arc::new(SimFs(process.clone())),
            clock: self.shared.world.clock.clone(),
            entropy: self.entropy.clone(),
            telemetry: Arc::new(Telemetry::default()),
        };
        let open = Engine::open(settings, components, Extensions::default());
        process.answer(open).await.unwrap_or_else(|| Err(Error::unavailable("it died")))
    }

    fn other_log(&mut self) {
        self.plan.settings.wal = match self.plan.settings.wal {
            LogStore::Local => LogStore::Object,
            LogStore::Object => LogStore::Local,
        };
    }

    /// Nothing fails from now on.
    fn heal(&self) {
        let world = &self.shared.world;
        world.faults(0, 0);
        world.stale_lists.store(false, Ordering::Relaxed);
        world.clock.set_ahead(0);
        self.home.disk.lock().room = None;
        self.away.disk.lock().room = None;
    }

    /// Lets clients work until they are done or the process is dead.
    async fn work(&self, db: &Db) {
        let shared = &self.shared;
        let mut clients = JoinSet::new();
        for _ in 0..self.plan.operations {
            let pause = match shared.dice.below(20) {
                0 => shared.dice.between(5_000, 90_000),
                1..4 => shared.dice.between(0, 3_000),
                4..12 => shared.dice.between(0, 50),
                _ => 0,
            };
            sleep(Duration::from_millis(pause as u64)).await;
            if db.process.is_dead() || shared.world.verdict().is_err() {
                break;
            }
            if clients.len() >= 8 {
                clients.join_next().await;
            }
            match shared.dice.below(100) {
                0..2 if self.plan.clock_jumps => shared.jump(),
                2..4 if self.plan.disk_fills => self.fill_disk(),
                n => {
                    let action = Action::of(n);
                    shared.world.trace.count(action.name());
                    clients.spawn(shared.clone().act(db.clone(), action));
                }
            }
        }
        while clients.join_next().await.is_some() {}
    }

    /// Faults end, and a process that has lived through them must do everything again by itself.
    async fn recover(&self, db: &Db) {
        self.heal();
        sleep(REQUESTS_END).await;
        let shared = &self.shared;
        if !shared.write_rows(db, shared.rows(), PATIENCE).await && !db.process.is_dead() {
            shared.world.wrong("no write is taken although nothing fails any more".to_owned());
        }
        for what in [Action::Flush, Action::Delete, Action::Compact] {
            shared.clone().act(db.clone(), what).await;
        }
        shared.world.trace.count("op: recovery of a living process");
    }

    /// The database is opened on the other machine while the process that has it lives on and does not know. Returns the
    /// new one.
    async fn take_over(&mut self, old: Db) -> Option<Db> {
        let (shared, world) = (self.shared.clone(), self.shared.world.clone());
        let local = self.plan.settings.wal == LogStore::Local;
        if local {
            // What only the old machine's log holds would be missing until that is started again.
            let empty = async {
                old.engine.flush().await?;
                // Requests that were given up may still wait.
                sleep(Duration::from_secs(5)).await;
                old.engine.flush().await
            };
            let flushed = old.process.answer(empty).await;
            if !matches!(flushed, Some(Ok(()))) || !self.home.disk.lock().names(".wal").is_empty() {
                return Some(old);
            }
        }
        if old.process.is_dead() {
            return Some(old);
        }
        world.trace.count("op: take over");
        // A local log takes what a process acknowledges until it learns that it was replaced.
        let may = |action: &Action| !local || *action != Action::Write;
        let actions = || -> Vec<Action> {
            let drawn = (0..shared.dice.below(6)).map(|_| shared.dice.pick(&Action::OF_STALE));
            drawn.filter(may).collect()
        };
        let (early, late) = (actions(), actions());
        let early = tokio::spawn(shared.clone().act_all(old.clone(), early));
        std::mem::swap(&mut self.home, &mut self.away);
        if shared.dice.permille(300) {
            self.other_log();
        }
        old.contested.store(true, Ordering::Relaxed);
        let new = self.open(false).await?;
        old.replaced.store(true, Ordering::Relaxed);
        // What it has begun ends before the new one is looked at.
        let _ = early.await;
        shared.model.lock().died(old.process.number);
        shared.settle(&new, "after it was taken over").await;
        self.set_faults();
        if shared.dice.permille(150) {
            world.trace.count("op: long absence");
            for _ in 0..140 {
                shared.clone().act(new.clone(), Action::Metadata).await;
                shared.write_rows(&new, vec![((0, "m0".to_owned(), 0), shared.value())], PATIENCE).await;
                shared.clone().act(new.clone(), Action::Flush).await;
            }
        }
        let late = tokio::spawn(shared.clone().act_all(old.clone(), late));
        self.work(&new).await;
        let _ = late.await;
        shared.model.lock().died(old.process.number);
        old.process.die(Death::Kill);
        Some(new)
    }

    /// Another program takes the disk's room, or gives it back.
    fn fill_disk(&self) {
        let dice = &self.shared.dice;
        let mut disk = self.home.disk.lock();
        // The reserve and what is spare must fit in the good times.
        disk.room = if dice.coin() { Some(disk.used() + dice.below(64 << 10)) } else { None };
        self.shared.world.trace.count("fault: disk filled or emptied");
    }

    /// Ends a life that has not ended by itself.
    async fn end(&mut self, db: Db) {
        let shared = self.shared.clone();
        let dice = &shared.dice;
        match dice.below(6) {
            0..3 => {
                self.shared.world.trace.count("op: shutdown");
                self.shared.shutdown(&db).await;
                db.process.exit();
            }
            3 => db.process.die(Death::PowerLoss),
            _ => db.process.die(Death::Kill),
        }
        self.shared.model.lock().died(db.process.number);
        drop(db);
        if dice.permille(250) {
            self.other_log();
        }
        sleep(Duration::from_millis(dice.below(20_000))).await;
    }

    /// Nothing fails any more: everything must be right, stay so when it is moved about, and leave no rest.
    async fn finish(&mut self) {
        self.heal();
        sleep(REQUESTS_END).await;
        let Some(db) = self.open(false).await else { return };
        let shared = self.shared.clone();
        shared.settle(&db, "at the end").await;
        for what in [Action::Write, Action::Flush, Action::Write, Action::Delete, Action::Write, Action::Flush] {
            shared.clone().act(db.clone(), what).await;
        }
        shared.compare(&db, "after the last flush").await;
        for what in [Action::Compact, Action::Fold] {
            shared.clone().act(db.clone(), what).await;
            shared.compare(&db, "after the last compaction").await;
        }
        // What a crash or a failure left over is found when its grace has passed.
        for _ in 0..2 {
            sleep(self.plan.settings.delete_grace + Duration::from_secs(1)).await;
            shared.clone().act(db.clone(), Action::Compact).await;
        }
        shared.compare(&db, "after all compactions").await;
        let rest = shared.verified(&db).await;
        if rest.iter().any(|r| !r.is_empty()) {
            shared.world.wrong(format!("objects that nothing names are left: {rest:?}"));
        }
        shared.shutdown(&db).await;
        let logs = self.home.disk.lock().names(".wal");
        if !logs.is_empty() {
            shared.world.wrong(format!("a clean shutdown leaves {logs:?}"));
        }
        self.restore(&db).await;
        db.process.exit();
        shared.model.lock().died(db.process.number);
        drop(db);
        let Some(db) = self.open(false).await else { return };
        shared.settle(&db, "after a clean restart").await;
    }

    /// A backup of a database that is at rest is the same database.
    async fn restore(&mut self, db: &Db) {
        let (world, shared) = (&self.shared.world, &self.shared);
        let place = |database: &str| backup::Place {
            store: Client::open(&db.process, &world.bucket),
            database: database.to_owned(),
        };
        let entropy: Arc<dyn Entropy> = self.entropy.clone();
        let name = self.plan.settings.database.clone();
        // Two stores: what is kept of backups, and a new bucket.
        let (copies, fresh) = (super::store::Bucket::default(), super::store::Bucket::default());
        let (copies, fresh) = (Arc::new(copies), Arc::new(fresh));
        let at = |bucket: &Arc<super::store::Bucket>| backup::Place {
            store: Client::open(&db.process, bucket),
            database: name.clone(),
        };
        let restored = async {
            let made = backup::create(&place(&name), &at(&copies), &entropy, world.clock.true_ms(), &|_| {}).await?;
            let loaded = backup::load(&at(&copies), &made.name).await?;
            backup::restore(&at(&copies), &loaded, &at(&fresh), &|_| {}).await
        };
        if let Err(e) = restored.await {
            return world.wrong(format!("backup and restore: {e}"));
        }
        world.trace.count("op: backup and restore");
        let process = Process::start(world, &self.away, None);
        let settings = Settings { data_dir: self.away.dir.clone(), ..self.plan.settings.clone() };
        let components = Components {
            store: Client::open(&process, &fresh),
            fs: Arc::new(SimFs(process.clone())),
            clock: world.clock.clone(),
            entropy: self.entropy.clone(),
            telemetry: Arc::new(Telemetry::default()),
        };
        match Engine::open(settings, components, Extensions::default()).await {
            Ok(engine) => {
                let db = Db { engine, process, contested: Arc::default(), replaced: Arc::default() };
                shared.compare(&db, "in the restored database").await;
            }
            Err(e) => world.wrong(format!("a restored database does not open: {e}")),
        }
    }
}

/// What a client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Write,
    Query,
    Metadata,
    Visit,
    Flush,
    Compact,
    Delete,
    Fold,
    Verify,
}

impl Action {
    /// What a process is asked for that was replaced.
    const OF_STALE: [Self; 6] = [Self::Write, Self::Write, Self::Flush, Self::Compact, Self::Delete, Self::Fold];

    fn of(n: u64) -> Self {
        match n {
            0..50 => Self::Write,
            50..66 => Self::Query,
            66..69 => Self::Metadata,
            69..72 => Self::Visit,
            72..81 => Self::Flush,
            81..89 => Self::Compact,
            89..95 => Self::Delete,
            95..97 => Self::Fold,
            _ => Self::Verify,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Write => "op: write",
            Self::Query => "op: query",
            Self::Metadata => "op: metadata",
            Self::Visit => "op: visit",
            Self::Flush => "op: flush",
            Self::Compact => "op: compact",
            Self::Delete => "op: delete",
            Self::Fold => "op: fold deletes",
            Self::Verify => "op: verify",
        }
    }
}

impl Shared {
    async fn act(self: Arc<Self>, db: Db, action: Action) {
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
                Action::Verify => drop(self.verified(&db).await),
            }
        };
        if timeout(HANGS, work).await.is_err() {
            self.world.wrong(format!("{action:?} hangs"));
        }
    }

    async fn act_all(self: Arc<Self>, db: Db, actions: Vec<Action>) {
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
    fn judge(&self, what: &str, e: &Error) {
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

    fn value(&self) -> u64 {
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

    fn rows(&self) -> Vec<(Key, u64)> {
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
    async fn write_rows(&self, db: &Db, rows: Vec<(Key, u64)>, patience: Duration) -> bool {
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
    async fn settle(&self, db: &Db, when: &str) {
        let Some((seen, floors)) = self.patient(db).await else { return };
        self.world.trace.count("op: settled");
        if let Err(e) = self.model.lock().settle(&seen, &|key| self.kept_of(key, &floors)) {
            self.world.wrong(format!("{when}: {e}"));
        }
    }

    /// While nothing else goes on.
    async fn compare(&self, db: &Db, when: &str) {
        let Some((seen, floors)) = self.patient(db).await else { return };
        let mut model = self.model.lock();
        let now = (model.moment(), model.moment());
        if let Err(e) = model.check(now, &seen, &|_| true, &|key| self.kept_of(key, &floors)) {
            self.world.wrong(format!("{when}: {e}"));
        }
    }

    /// Checks all objects as `thalweg verify` does; returns those that nothing names.
    async fn verified(&self, db: &Db) -> Option<Vec<String>> {
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

    fn jump(&self) {
        let year_2100 = 4_102_444_800_000 - BEGIN_MS;
        let ahead = self.dice.pick(&[0, 0, HOUR, -HOUR, year_2100, -BEGIN_MS]);
        self.world.trace.count("fault: clock jump");
        self.world.trace.say(|| format!("clock is ahead by {ahead} ms"));
        self.world.clock.set_ahead(ahead);
    }

    async fn shutdown(&self, db: &Db) {
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
