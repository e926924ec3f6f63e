//! What is done to a database in one history.
//!
//! A history is a row of *lives*: the database is opened, clients work on it at the same time while calls fail, and it
//! ends by a shutdown, a kill or a loss of power, in the middle of whatever call. After each opening, and once more when
//! nothing fails any longer, everything that is in it is compared with the model.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use catalog::{Entropy, Error, MatchOp, SeededEntropy, tables};
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::clients::{Action, Db, HANGS, PATIENCE, Shared, matcher};
use super::dice::Dice;
use super::fs::SimFs;
use super::store::Client;
use super::world::{Death, Machine, Process, World};
use crate::{
    Components, Engine, Extensions, LogStore, Retention, RetentionRule, Settings, SqlCatalog, Telemetry, backup,
};

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
