//! A query from its admission to its end: its turn to run, and what stops it.
//!
//! Work is dropped where it waits. What computes for long without waiting looks at the query's [`Stop`] now and then, so
//! that the deadline, a client that goes away and the end of the server give the processor back. The handle travels
//! with the configuration of the query's session, where plan nodes, rules and functions find it: [`Stop::of`].

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use catalog::{Error, Result};
use datafusion::common::config::{ConfigEntry, ConfigExtension, ConfigOptions, ExtensionOptions};
use datafusion::error::{DataFusionError, Result as DfResult};
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::Settings;
use crate::activity::{Activities, Activity, Description, Underway};
use crate::memory::Memory;

/// Queries that run at a time, for each thread, unless a setting says otherwise. More would not be done sooner and take
/// memory.
const RUNNING_PER_THREAD: usize = 4;
/// Steps of about a nanosecond after which a [`Pace`] looks at its stop.
const STEPS: usize = 1 << 20;
/// Beyond any deadline that can be told.
const YEAR: Duration = Duration::from_secs(365 * 86_400);

/// The limits of one query.
#[derive(Debug, Clone, Copy)]
pub struct QueryLimits {
    /// It fails with kind `Timeout` after this long, its wait for a turn included.
    pub timeout: Duration,
}

/// Whether a query is to stop; cheap to clone. The default never does.
#[derive(Debug, Clone, Default)]
pub struct Stop(Option<Arc<State>>);

#[derive(Debug)]
struct State {
    raised: AtomicBool,
    /// Why it was ended for the sake of others.
    shed: OnceLock<String>,
    /// Told then and when it is canceled, for work that does wait.
    shedding: Notify,
    deadline: Instant,
    timeout: Duration,
    memory: Memory,
}

impl State {
    /// The error of a query that was ended.
    fn ended(&self) -> Error {
        match self.shed.get() {
            Some(why) => Error::limit_exceeded(why.clone()),
            None => Error::canceled("the query was canceled"),
        }
    }
}

impl Stop {
    fn within(timeout: Duration, memory: Memory) -> Self {
        let deadline = Instant::now() + timeout.min(YEAR);
        Self(Some(Arc::new(State {
            raised: AtomicBool::new(false),
            shed: OnceLock::new(),
            shedding: Notify::new(),
            deadline,
            timeout,
            memory,
        })))
    }

    /// The stop of the query that a configuration belongs to.
    pub fn of(options: &ConfigOptions) -> Self {
        options.extensions.get::<Self>().cloned().unwrap_or_default()
    }

    /// The query's view of memory; `all` for one that never stops.
    pub fn memory<'a>(&'a self, all: &'a Memory) -> &'a Memory {
        self.0.as_ref().map_or(all, |state| &state.memory)
    }

    /// Fails once the query is to stop: with kind `Timeout` after its deadline, `LimitExceeded` when memory is short, else
    /// `Canceled`. Costs a look at the clock; [`Stop::pace`] is for steps that are shorter.
    ///
    /// # Errors
    /// When it is to stop.
    pub fn check(&self) -> Result<()> {
        match &self.0 {
            Some(state) if state.raised.load(Ordering::Relaxed) => Err(state.ended()),
            Some(state) if Instant::now() >= state.deadline => Err(self.timed_out()),
            _ => Ok(()),
        }
    }

    /// Looks at this stop once in about a million steps.
    pub fn pace(&self) -> Pace {
        Pace { stop: self.clone(), left: STEPS }
    }

    /// The error of the deadline.
    pub(crate) fn timed_out(&self) -> Error {
        let timeout = self.0.as_ref().map_or(Duration::ZERO, |s| s.timeout);
        Error::timeout(format!("query ran for longer than its limit of {timeout:?}"))
    }

    /// Waits until the query is canceled or ended for the sake of others; only one may wait.
    pub(crate) async fn shed(&self) -> Error {
        match &self.0 {
            Some(state) => {
                state.shedding.notified().await;
                state.ended()
            }
            None => std::future::pending().await,
        }
    }

    /// When the deadline is; far away for one that never stops.
    pub fn deadline(&self) -> Instant {
        self.0.as_ref().map_or_else(|| Instant::now() + YEAR, |s| s.deadline)
    }

    fn raise(&self) {
        if let Some(state) = &self.0 {
            state.raised.store(true, Ordering::Relaxed);
        }
    }

    fn state(&self) -> Weak<State> {
        self.0.as_ref().map_or_else(Weak::new, Arc::downgrade)
    }

    /// Stops the query because somebody wants it to.
    pub(crate) fn cancel(&self) {
        self.raise();
        if let Some(state) = &self.0 {
            state.shedding.notify_one();
        }
    }

    #[cfg(test)]
    pub(crate) fn within_a_minute() -> Self {
        Self::within(Duration::from_secs(60), Memory::new(1 << 20))
    }
}

/// Counts the steps of a loop, to look at a [`Stop`] not too often.
#[derive(Debug)]
pub struct Pace {
    stop: Stop,
    left: usize,
}

impl Pace {
    /// Notes that about so many values or bytes are going to be looked at.
    ///
    /// # Errors
    /// When the query is to stop.
    #[inline]
    pub fn step(&mut self, steps: usize) -> Result<()> {
        match self.left.checked_sub(steps) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => self.look(),
        }
    }

    /// [`Pace::step`] within a plan.
    ///
    /// # Errors
    /// When the query is to stop.
    #[inline]
    pub fn walk(&mut self, steps: usize) -> DfResult<()> {
        self.step(steps).map_err(|e| DataFusionError::External(Box::new(e)))
    }

    #[cold]
    fn look(&mut self) -> Result<()> {
        self.left = STEPS;
        self.stop.check()
    }
}

impl ExtensionOptions for Stop {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }

    fn cloned(&self) -> Box<dyn ExtensionOptions> {
        Box::new(self.clone())
    }

    fn set(&mut self, key: &str, _value: &str) -> DfResult<()> {
        Err(DataFusionError::Configuration(format!("stop.{key} is not for setting")))
    }

    fn entries(&self) -> Vec<ConfigEntry> {
        Vec::new()
    }
}

impl ConfigExtension for Stop {
    const PREFIX: &'static str = "stop";
}

/// Stops its query when dropped. Whoever waits for a query's answer holds one.
#[derive(Debug)]
pub struct Guard(Stop);

impl Guard {
    /// Lets go of a query that has given all it has, whose answer may still be in the making.
    pub(crate) fn release(mut self) {
        self.0 = Stop::default();
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.raise();
    }
}

/// The right to run a query, until it is dropped.
#[derive(Debug)]
pub struct Query {
    stop: Stop,
    memory: Memory,
    turns: Arc<Semaphore>,
    /// `None` while it waits for its reader.
    turn: Option<OwnedSemaphorePermit>,
    queued: Duration,
    activities: Arc<Activities>,
    now_ms: i64,
    /// What [`Query::describe`] said; ended with it.
    underway: Option<Underway>,
}

impl Query {
    /// Says what the query is, so that it is listed among those that run and ran.
    pub fn describe(&mut self, description: Description) {
        let activity = self.activities.begin(description, self.now_ms, self.stop.clone());
        self.underway = Some(Underway { activity, all: self.activities.clone() });
    }

    /// What is counted of it, if it was described.
    pub fn activity(&self) -> Option<&Arc<Activity>> {
        self.underway.as_ref().map(|u| &u.activity)
    }

    /// What its loops look at.
    pub fn stop(&self) -> &Stop {
        &self.stop
    }

    /// What it reserves memory from.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// What stops it when dropped.
    pub fn guard(&self) -> Guard {
        Guard(self.stop.clone())
    }

    /// Notes when it had its turn.
    pub(crate) fn at(mut self, now_ms: i64) -> Self {
        self.now_ms = now_ms;
        self
    }

    /// How long it waited for its turn.
    pub fn queued(&self) -> Duration {
        self.queued
    }

    /// Lets others run from now until [`Query::go_on`].
    pub(crate) fn rest(&mut self) {
        self.turn = None;
    }

    /// Waits for a turn again after [`Query::rest`].
    pub(crate) async fn go_on(&mut self) {
        if self.turn.is_none() {
            self.turn = self.turns.clone().acquire_owned().await.ok();
        }
    }
}

/// The turns of an engine's queries: so many run, others wait in the order in which they came.
#[derive(Debug, Clone)]
pub(crate) struct Turns {
    turns: Arc<Semaphore>,
    max: usize,
    /// Those that have begun, oldest first; some of them may have ended.
    begun: Arc<Mutex<Vec<Weak<State>>>>,
    /// A query that has not had its turn after this long is refused.
    within: Duration,
    memory: Memory,
    /// What one query may hold.
    memory_max: usize,
    activities: Arc<Activities>,
}

impl Turns {
    pub fn new(settings: &Settings, memory: Memory) -> Self {
        let max = match settings.queries_max {
            0 => RUNNING_PER_THREAD * settings.cpu_threads.max(1),
            max => max.min(Semaphore::MAX_PERMITS),
        };
        let memory_max = match settings.query_memory_max {
            0 => usize::MAX,
            max => max,
        };
        Self {
            turns: Arc::new(Semaphore::new(max)),
            max,
            begun: Arc::default(),
            within: settings.query_wait_max,
            memory,
            memory_max,
            activities: Arc::default(),
        }
    }

    /// The queries that run and ran.
    pub fn activities(&self) -> &Arc<Activities> {
        &self.activities
    }

    /// How many queries run at a time.
    pub fn max(&self) -> usize {
        self.max
    }

    /// Waits for a query's turn.
    ///
    /// # Errors
    /// `Unavailable` when it does not come soon, `Timeout` at the query's deadline.
    pub async fn begin(&self, limits: QueryLimits) -> Result<Query> {
        let memory = self.memory.of_query(self.memory_max);
        let (stop, begun) = (Stop::within(limits.timeout, memory.clone()), Instant::now());
        let turn = match self.turns.clone().try_acquire_owned() {
            Ok(turn) => turn,
            Err(_) => {
                let until = stop.deadline().min(begun + self.within);
                let turn = tokio::time::timeout_at(until, self.turns.clone().acquire_owned()).await;
                // The semaphore is never closed.
                turn.ok().and_then(Result::ok).ok_or_else(|| match stop.check() {
                    Err(e) => e,
                    Ok(()) => Error::unavailable(format!(
                        "{} queries run, which is the limit, and this one has waited for {} s; try again",
                        self.max,
                        self.within.as_secs_f64()
                    )),
                })?
            }
        };
        stop.check()?;
        let mut all = self.begun.lock();
        all.retain(|state| state.strong_count() > 0);
        all.push(stop.state());
        drop(all);
        let queued = begun.elapsed();
        let (turns, activities) = (self.turns.clone(), self.activities.clone());
        Ok(Query { stop, memory, turns, turn: Some(turn), queued, activities, now_ms: 0, underway: None })
    }

    /// Ends the query that holds the most memory for this reason, and the oldest of those that hold about as much: what
    /// asks for little is done before it is the oldest. While one that was told to end has not yet done so, another is only
    /// told when `at_once`. False when none was told.
    pub fn shed(&self, why: &str, at_once: bool) -> bool {
        /// Parts of the limit that are told apart: operators hold more than they say.
        const PARTS: usize = 64;
        let step = (self.memory.limit() / PARTS).max(1);
        let begun = self.begun.lock();
        let running = begun.iter().filter_map(Weak::upgrade);
        let (told, others): (Vec<_>, Vec<_>) = running.partition(|state| state.shed.get().is_some());
        if !told.is_empty() && !at_once {
            return false;
        }
        // The first of equals is wanted, and the last one is what `max_by_key` gives.
        let most = others.into_iter().rev().max_by_key(|state| state.memory.held_by_query() / step);
        most.is_some_and(|state| {
            let is_first = state.shed.set(why.to_owned()).is_ok();
            state.raised.store(true, Ordering::Relaxed);
            state.shedding.notify_one();
            is_first
        })
    }
}

#[cfg(test)]
mod tests {
    use catalog::ErrorKind;

    use super::*;

    const SECOND: QueryLimits = QueryLimits { timeout: Duration::from_secs(1) };
    const MINUTE: QueryLimits = QueryLimits { timeout: Duration::from_secs(60) };

    fn turns() -> Turns {
        Turns::new(&Settings { cpu_threads: 1, ..Settings::default() }, Memory::new(1 << 20))
    }

    fn kind(result: Result<impl std::fmt::Debug>) -> ErrorKind {
        result.expect_err("a refusal").kind()
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_is_seen_at_the_deadline_and_when_nobody_waits() {
        let turns = turns();
        let query = turns.begin(SECOND).await.unwrap();
        let mut pace = query.stop().pace();
        assert!(query.stop().check().is_ok());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(kind(query.stop().check()), ErrorKind::Timeout);
        assert!(pace.step(STEPS).is_ok(), "it looks after a million steps");
        assert_eq!(kind(pace.step(1)), ErrorKind::Timeout);
        let query = turns.begin(SECOND).await.unwrap();
        query.guard().release();
        assert!(query.stop().check().is_ok());
        drop(query.guard());
        assert_eq!(kind(query.stop().check()), ErrorKind::Canceled);
        assert!(Stop::default().check().is_ok());
        let mut options = ConfigOptions::new();
        assert!(Stop::of(&options).check().is_ok());
        options.extensions.insert(query.stop().clone());
        assert_eq!(kind(Stop::of(&options).check()), ErrorKind::Canceled);
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_queries_end_when_memory_is_short() {
        let turns = turns();
        assert!(!turns.shed("short", true));
        let (first, second, third) = (
            turns.begin(MINUTE).await.unwrap(),
            turns.begin(MINUTE).await.unwrap(),
            turns.begin(MINUTE).await.unwrap(),
        );
        assert!(turns.shed("short", false));
        let told = first.stop().check().unwrap_err();
        assert_eq!((told.kind(), told.message()), (ErrorKind::LimitExceeded, "short"));
        assert!(!turns.shed("short", false), "the first has not ended yet");
        assert!(second.stop().check().is_ok());
        assert_eq!(first.stop().shed().await.message(), "short");
        drop(first);
        assert!(turns.shed("short", false));
        assert_eq!(kind(second.stop().check()), ErrorKind::LimitExceeded);
        assert!(turns.shed("short", true));
        assert_eq!(kind(third.stop().check()), ErrorKind::LimitExceeded);
        assert!(!turns.shed("short", true));
    }

    #[tokio::test(start_paused = true)]
    async fn the_query_that_holds_the_most_ends_first() {
        let turns = turns();
        let (old, large) = (turns.begin(MINUTE).await.unwrap(), turns.begin(MINUTE).await.unwrap());
        let mut held = large.memory().reserve(crate::memory::Kind::Queries);
        held.grow(1 << 18).unwrap();
        assert!(turns.shed("short", false));
        assert!(old.stop().check().is_ok());
        assert_eq!(kind(large.stop().check()), ErrorKind::LimitExceeded);
    }

    #[tokio::test(start_paused = true)]
    async fn queries_wait_for_their_turn_in_order_but_not_for_ever() {
        let turns = turns();
        let mut running = Vec::new();
        for _ in 0..turns.max() {
            running.push(turns.begin(MINUTE).await.unwrap());
        }
        assert_eq!(kind(turns.begin(MINUTE).await), ErrorKind::Unavailable);
        assert_eq!(kind(turns.begin(SECOND).await), ErrorKind::Timeout);
        let waiting = tokio::spawn({
            let turns = turns.clone();
            async move { turns.begin(MINUTE).await }
        });
        tokio::time::sleep(Duration::from_secs(3)).await;
        running.pop();
        let query = waiting.await.unwrap().unwrap();
        assert!(query.queued() >= Duration::from_secs(3));
        drop(query);
        // One that waits for its reader lets another one run.
        let mut slow = turns.begin(MINUTE).await.unwrap();
        slow.rest();
        let other = turns.begin(MINUTE).await.unwrap();
        let go_on = async {
            slow.go_on().await;
            slow
        };
        tokio::pin!(go_on);
        assert!(futures::poll!(&mut go_on).is_pending());
        drop(other);
        assert!(go_on.await.turn.is_some());
    }
}
