//! What a database runs in: time, machines, processes and how they end, and how often things fail.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering};

use catalog::Clock;
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::dice::Dice;
use super::fs::Disk;
use super::store::Bucket;
use super::trace::Trace;

/// When histories begin, milliseconds since the epoch: a morning, so that a day ends in none of them.
pub(super) const BEGIN_MS: i64 = 1_700_040_000_000;

/// Everything outside of the database.
#[derive(Debug)]
pub(super) struct World {
    pub dice: Dice,
    pub trace: Trace,
    pub clock: Arc<SimClock>,
    pub bucket: Arc<Bucket>,
    /// Of a thousand calls of the file system and of the store, how many fail.
    pub fs_faults: AtomicU32,
    pub store_faults: AtomicU32,
    /// Whether lists may leave out what is new.
    pub stale_lists: AtomicBool,
    processes: AtomicU32,
    /// What was found to be wrong.
    wrong: Mutex<Vec<String>>,
}

impl World {
    pub fn new(seed: u64, print: bool) -> Arc<Self> {
        Arc::new(Self {
            dice: Dice::new(seed, "world"),
            trace: Trace::new(print),
            clock: Arc::new(SimClock { begun: Instant::now(), ahead_ms: AtomicI64::new(0) }),
            bucket: Arc::new(Bucket::default()),
            fs_faults: AtomicU32::new(0),
            store_faults: AtomicU32::new(0),
            stale_lists: AtomicBool::new(false),
            processes: AtomicU32::new(0),
            wrong: Mutex::default(),
        })
    }

    /// Sets how many of a thousand calls fail.
    pub fn faults(&self, fs: u32, store: u32) {
        self.trace.say(|| format!("faults per thousand calls: file system {fs}, store {store}"));
        self.fs_faults.store(fs, Ordering::Relaxed);
        self.store_faults.store(store, Ordering::Relaxed);
    }

    /// Notes a breach of what the database promises.
    pub fn wrong(&self, what: String) {
        self.trace.say(|| format!("WRONG: {what}"));
        self.wrong.lock().push(what);
    }

    pub fn verdict(&self) -> Result<(), String> {
        let wrong = self.wrong.lock();
        if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n  ")) }
    }
}

/// A clock on the wall, which may be set.
#[derive(Debug)]
pub(super) struct SimClock {
    begun: Instant,
    ahead_ms: AtomicI64,
}

impl SimClock {
    /// What a right clock would say.
    pub fn true_ms(&self) -> i64 {
        BEGIN_MS + self.begun.elapsed().as_millis() as i64
    }

    /// Puts it right, or wrong by so much.
    pub fn set_ahead(&self, ms: i64) {
        self.ahead_ms.store(ms, Ordering::Relaxed);
    }
}

impl Clock for SimClock {
    fn now_ms(&self) -> i64 {
        self.true_ms() + self.ahead_ms.load(Ordering::Relaxed)
    }
}

/// A computer with its disk, which processes come and go on.
#[derive(Debug)]
pub(super) struct Machine {
    pub name: &'static str,
    /// Its data folder. Only the query engine makes one in earnest, for what queries spill.
    pub dir: PathBuf,
    pub disk: Mutex<Disk>,
}

impl Machine {
    pub fn new(name: &'static str, root: &Path) -> Arc<Self> {
        let dir = root.join(name);
        std::fs::create_dir_all(&dir).expect("a folder for what queries spill");
        Arc::new(Self { name, dir, disk: Mutex::default() })
    }
}

/// How a process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Death {
    /// All that was written stays.
    Kill,
    /// What was not synced is lost, wholly or in part.
    PowerLoss,
}

/// One process of the database, from its start to its end. A dead one's calls do nothing: those that wait never return.
#[derive(Debug)]
pub(super) struct Process {
    pub number: u32,
    /// Machine and number.
    pub name: String,
    pub world: Arc<World>,
    pub machine: Arc<Machine>,
    dead: CancellationToken,
    calls: AtomicU64,
    /// The call at which it dies, how, and whether the call is done before.
    doom: Option<(u64, Death, bool)>,
}

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Go,
    /// It is done, and the process dies before it knows.
    GoAndDie(Death),
    /// The process is dead.
    Never,
}

impl Process {
    pub fn start(world: &Arc<World>, machine: &Arc<Machine>, doom: Option<(u64, Death, bool)>) -> Arc<Self> {
        let number = world.processes.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self {
            number,
            name: format!("{}{number}", machine.name),
            world: world.clone(),
            machine: machine.clone(),
            dead: CancellationToken::new(),
            calls: AtomicU64::new(0),
            doom,
        })
    }

    /// Counts a call at a seam.
    pub fn step(&self) -> Step {
        if self.is_dead() {
            return Step::Never;
        }
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        match self.doom {
            Some((at, death, true)) if call == at => Step::GoAndDie(death),
            Some((at, death, false)) if call == at => {
                self.die(death);
                Step::Never
            }
            _ => Step::Go,
        }
    }

    pub fn die(&self, death: Death) {
        if self.is_dead() {
            return;
        }
        self.dead.cancel();
        let world = &self.world;
        world.trace.call(&self.name, "dies", "", 0, if death == Death::Kill { "killed" } else { "power loss" });
        world.trace.count(if death == Death::Kill { "fault: kill" } else { "fault: power loss" });
        if death == Death::PowerLoss {
            self.machine.disk.lock().lose_power(&world.dice);
        }
    }

    /// It ends by itself.
    pub fn exit(&self) {
        self.dead.cancel();
    }

    pub fn is_dead(&self) -> bool {
        self.dead.is_cancelled()
    }

    /// What the process answers, or `None` when it dies before.
    pub async fn answer<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let answer = self.dead.run_until_cancelled(work).await;
        answer.filter(|_| !self.is_dead())
    }
}
