//! Retention: rows leave when they are old, or when there are too many.
//!
//! By age: each table has floors, the first times that are kept of its series. They are part of a [`Version`], so that a
//! query leaves out what has expired whether compaction has come by or not. Compaction drops files that lie behind all
//! floors whole and rewrites others once a floor has passed all of their rows. By size: the oldest days are dropped.
//!
//! A clock that is wrong must not cost good data. Age is therefore measured against a [`Horizon`], which follows the wall
//! clock only as long as that advances like the monotonic one, and starts near the newest row. A clock that was set is
//! believed after it has stayed so for a day.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use catalog::files::{Commit, DataFile};
use catalog::{Matcher, Result, TagHasher, tables};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::cut::{Floors, Predicate};
use crate::engine::Inner;
use crate::flush::{publish, with_files};
use crate::version::Version;

/// What is kept.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Retention {
    /// How long rows are kept whose series no rule names; `None`: for ever.
    pub age: Option<Duration>,
    /// Exceptions; a series follows the first that names it.
    pub rules: Vec<RetentionRule>,
    /// Bytes of data files and tag parts beyond which the oldest days are dropped; `None`: no limit.
    pub bytes: Option<u64>,
}

/// How long some series of a table are kept.
#[derive(Debug, Clone, PartialEq)]
pub struct RetentionRule {
    /// [`catalog::TableSchema::id`].
    pub table_id: u16,
    /// All must hold. Empty names all series of the table.
    pub matchers: Vec<Matcher>,
    /// `None`: for ever.
    pub age: Option<Duration>,
}

/// The clock is followed over steps of up to this much: adjustments of a synchronised one.
const STEP_MAX_MS: i64 = 5 * 60 * 1000;

/// At start the clock is believed when the newest row is not older than this.
const DOWN_MAX_MS: i64 = 3_600_000;

/// A clock that was set is believed after it has stayed so for this long.
const PROOF: Duration = Duration::from_secs(24 * 3600);

/// The time against which age is measured.
#[derive(Debug)]
struct Horizon {
    ms: i64,
    at: Instant,
    /// Since when the wall clock is ahead by about so many milliseconds (behind, when negative).
    doubt: Option<(Instant, i64)>,
}

impl Horizon {
    fn start(wall_ms: i64, newest_ms: i64, now: Instant) -> Self {
        let ms = if wall_ms.saturating_sub(newest_ms) > DOWN_MAX_MS { newest_ms } else { wall_ms };
        Self { ms, at: now, doubt: None }
    }

    /// Looks at both clocks.
    fn observe(&mut self, wall_ms: i64, now: Instant) {
        let elapsed = now.saturating_duration_since(self.at).as_millis() as i64;
        self.ms = self.ms.saturating_add(elapsed);
        self.at = now;
        let ahead = wall_ms.saturating_sub(self.ms);
        let near = |a: i64, b: i64| a.abs_diff(b) <= STEP_MAX_MS as u64;
        match self.doubt {
            _ if near(ahead, 0) => {
                if self.doubt.take().is_some() {
                    tracing::info!("the clock is where it was expected again; retention follows it");
                }
                self.ms = wall_ms;
            }
            Some((since, then)) if near(ahead, then) => {
                if now.saturating_duration_since(since) >= PROOF {
                    tracing::warn!(ahead_ms = ahead, "the clock has stayed where it was set to; retention follows it");
                    self.doubt = None;
                    self.ms = wall_ms;
                }
            }
            _ => {
                self.doubt = Some((now, ahead));
                tracing::warn!(
                    ahead_ms = ahead,
                    expected_ms = self.ms,
                    clock_ms = wall_ms,
                    "the clock is not where it was expected; retention follows it when it has stayed so for a day"
                );
            }
        }
    }
}

/// Keeps the floors of a database up to date.
#[derive(Debug)]
pub(crate) struct Keeper {
    settings: Retention,
    /// The rules of each table, with what they name.
    rules: Vec<(u16, Arc<Predicate>, Option<Duration>)>,
    horizon: Mutex<Option<Horizon>>,
}

impl Keeper {
    pub fn new(settings: &Retention, hasher: &TagHasher) -> Self {
        let rule = |r: &RetentionRule| (r.table_id, Arc::new(Predicate::new(r.matchers.clone(), hasher)), r.age);
        Self { rules: settings.rules.iter().map(rule).collect(), settings: settings.clone(), horizon: Mutex::new(None) }
    }

    fn floors(&self, table_id: u16, horizon_ms: i64) -> Floors {
        let floor = |age: Option<Duration>| {
            age.map_or(i64::MIN, |age| horizon_ms.saturating_sub(i64::try_from(age.as_millis()).unwrap_or(i64::MAX)))
        };
        let of_table = self.rules.iter().filter(|r| r.0 == table_id);
        Floors {
            default_ms: floor(self.settings.age),
            rules: of_table.map(|(_, which, age)| (which.clone(), floor(*age))).collect(),
        }
    }
}

/// Looks at the clock when no row was there before to begin with.
pub(crate) fn begin(inner: &Inner) {
    if inner.retention.horizon.lock().is_none() {
        observe(inner);
    }
}

/// Looks at the clock and moves the floors.
pub(crate) fn observe(inner: &Inner) {
    let keeper = &inner.retention;
    if keeper.settings.age.is_none() && keeper.rules.iter().all(|r| r.2.is_none()) {
        return;
    }
    let (wall_ms, now) = (inner.now_ms(), Instant::now());
    let (horizon_ms, doubted) = {
        let mut horizon = keeper.horizon.lock();
        if horizon.is_none() {
            // Without a row nothing says whether the clock is right, and there is nothing to drop.
            *horizon = newest(&inner.version()).map(|newest_ms| Horizon::start(wall_ms, newest_ms, now));
        }
        let Some(horizon) = horizon.as_mut() else { return };
        horizon.observe(wall_ms, now);
        (horizon.ms, horizon.doubt.is_some())
    };
    inner.metrics.clock_doubted.set(i64::from(doubted));
    let floors: Vec<(u16, Arc<Floors>)> =
        tables::all().iter().map(|t| (t.id, Arc::new(keeper.floors(t.id, horizon_ms)))).collect();
    inner.install(|version| {
        let mut next = version.clone();
        for (table_id, floors) in floors {
            if let Some(table) = next.tables.iter_mut().find(|t| t.schema.id == table_id) {
                table.floors = floors;
            }
        }
        next
    });
}

/// The time of the newest row.
fn newest(version: &Version) -> Option<i64> {
    let files = version.tables.iter().flat_map(|t| t.files.iter().map(|f| f.ts_max));
    let memtables = version.tables.iter().flat_map(|t| t.memtables().filter_map(|m| m.ts_range()).map(|r| r.1));
    files.chain(memtables).max()
}

/// Drops files whose rows have all expired, and the oldest days while there are too many bytes. It takes no space to do so.
pub(crate) async fn drop_files(inner: &Arc<Inner>) -> Result<()> {
    let version = inner.version();
    let mut gone: Vec<Arc<DataFile>> = Vec::new();
    let mut days: BTreeMap<i32, (u64, Vec<Arc<DataFile>>)> = BTreeMap::new();
    for table in &version.tables {
        for file in table.files.iter() {
            if file.ts_max < table.floors.least() {
                gone.push(file.clone());
            } else {
                let day = days.entry(file.day).or_default();
                day.0 += file.bytes;
                day.1.push(file.clone());
            }
        }
    }
    if let Some(bytes_max) = inner.retention.settings.bytes {
        for part in version.parts.iter() {
            days.entry(part.day).and_modify(|day| day.0 += part.bytes);
        }
        let mut bytes: u64 = days.values().map(|d| d.0).sum();
        // The newest day is what people look at; it stays even when it alone is too large.
        while bytes > bytes_max
            && days.len() > 1
            && let Some((_, (freed, files))) = days.pop_first()
        {
            bytes -= freed;
            gone.extend(files);
        }
    }
    if gone.is_empty() {
        return Ok(());
    }
    let (files, bytes) = (gone.len(), gone.iter().map(|f| f.bytes).sum::<u64>());
    let commit = Commit { remove: gone.iter().map(|f| f.id).collect(), ..Commit::default() };
    let commit = publish(inner, commit, |_, version, commit| {
        let mut next = version.clone();
        for table in &mut next.tables {
            table.files = with_files(&table.files, &[], &commit.remove);
        }
        next
    })
    .await?;
    inner.segments.forget(|id| !commit.remove.contains(&id));
    inner.metrics.retention_bytes.inc_by(bytes);
    tracing::info!(files, bytes, "expired files dropped");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 86_400_000;
    const HOUR: i64 = 3_600_000;
    const NOW: i64 = 1_700_000_000_000;

    /// The horizon after looks at (milliseconds since start, wall clock), relative to [`NOW`].
    fn check(newest: i64, start: i64, looks: &[(i64, i64)], expected: i64, doubted: bool) {
        let begun = Instant::now();
        let mut horizon = Horizon::start(NOW.saturating_add(start), NOW + newest, begun);
        horizon.observe(NOW.saturating_add(start), begun);
        for (since, wall) in looks {
            let now = begun + Duration::from_millis(*since as u64);
            horizon.observe(NOW.saturating_add(*wall), now);
        }
        assert_eq!((horizon.ms - NOW, horizon.doubt.is_some()), (expected, doubted), "{newest} {start} {looks:?}");
    }

    #[test]
    fn follows_a_clock_that_advances() {
        check(0, 0, &[], 0, false);
        check(-1000, 0, &[(1000, 1000), (60_000, 61_000)], 61_000, false);
        check(-1000, 0, &[(60_000, 60_000 - 2000)], 58_000, false);
        // Rows from a little ahead.
        check(HOUR, 0, &[(1000, 1000)], 1000, false);
    }

    #[test]
    fn does_not_follow_jumps() {
        let to_2100 = 4_102_444_800_000 - NOW;
        for jump in [HOUR, -HOUR, to_2100, -NOW, i64::MAX, i64::MIN] {
            check(0, 0, &[(1000, jump)], 1000, true);
            check(0, 0, &[(1000, jump), (2000, jump.saturating_add(1000)), (3000, 3000)], 3000, false);
        }
        // It is believed when it has stayed so for a day, not sooner.
        check(0, 0, &[(1000, HOUR), (DAY, DAY + HOUR)], DAY, true);
        check(0, 0, &[(1000, HOUR), (DAY, DAY + HOUR), (DAY + 1000, DAY + HOUR + 1000)], DAY + HOUR + 1000, false);
        // A second jump begins anew.
        check(0, 0, &[(1000, HOUR), (DAY, DAY + 3 * HOUR), (DAY + 1000, DAY + 3 * HOUR)], DAY + 1000, true);
    }

    #[test]
    fn starts_near_the_newest_row() {
        check(-30 * DAY, 0, &[(1000, 1000)], -30 * DAY + 1000, true);
        check(-30 * DAY, 0, &[(1000, 1000), (DAY, DAY)], DAY, false);
        check(0, -NOW, &[(1000, 1000 - NOW)], 1000 - NOW, false);
    }

    #[test]
    fn floors_of_rules() {
        let rule =
            |age: Option<u64>| RetentionRule { table_id: 1, matchers: vec![], age: age.map(Duration::from_secs) };
        let settings =
            Retention { age: Some(Duration::from_secs(10)), rules: vec![rule(Some(1)), rule(None)], bytes: None };
        let keeper = Keeper::new(&settings, &TagHasher::new(1));
        let floors = keeper.floors(1, 60_000);
        assert_eq!((floors.least(), floors.greatest(), floors.default_ms), (i64::MIN, 59_000, 50_000));
        let passed: Vec<u64> = [0, 49_999, 50_000, 59_000].iter().map(|t| floors.passed(*t)).collect();
        assert_eq!(passed, [0b101, 0b101, 0b001, 0]);
        let floors = keeper.floors(2, 60_000);
        assert_eq!((floors.least(), floors.greatest(), floors.rules.len()), (50_000, 50_000, 0));
        let huge = Retention { age: Some(Duration::MAX), ..Retention::default() };
        assert_eq!(Keeper::new(&huge, &TagHasher::new(1)).floors(1, -5).least(), i64::MIN);
    }
}
