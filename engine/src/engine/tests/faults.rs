//! A database on a disk that fails: every call that writes fails once, in each way, and a disk is full for a while.

use std::collections::BTreeMap;

use catalog::FileSystem;
use catalog::fs::{Fault, Faults, Faulty};
use catalog::object::LocalStore;
use datafusion::physical_plan::{ExecutionPlan, execute_stream};
use futures::TryStreamExt;

use super::*;

/// Name, time and value.
type Request = Vec<(&'static str, i64, f64)>;
/// Values' bits by name and time.
type Rows = BTreeMap<(String, i64), u64>;

/// What must be in the database, and what may be.
#[derive(Default)]
struct Ledger {
    sure: Rows,
    refused: Vec<Request>,
    steps: i64,
}

impl Ledger {
    /// Writes a request of rows that no other one has.
    async fn write(&mut self, engine: &Engine) {
        self.steps += 1;
        let (k, day) = (self.steps, 86_400_000);
        let rows = vec![("a", NOW + k, k as f64), ("b", NOW + k, 0.5), ("a", NOW - day + k, -1.0)];
        match engine.write(request(engine, &rows)).await {
            Ok(()) => self.sure.extend(model(&rows)),
            Err(e) => {
                assert_eq!(e.kind(), catalog::ErrorKind::Unavailable, "{e}");
                self.refused.push(rows);
            }
        }
    }

    /// Takes the database's rows for the truth after checking them.
    async fn check(&mut self, engine: &Engine, what: &str) {
        let found = all_rows(engine).await;
        for (key, value) in &self.sure {
            assert_eq!(found.get(key), Some(value), "{what}: {key:?}");
        }
        let mut expected = self.sure.clone();
        for request in std::mem::take(&mut self.refused) {
            let rows = model(&request);
            let there = rows.iter().filter(|(key, value)| found.get(*key) == Some(*value)).count();
            assert!(there == 0 || there == rows.len(), "{what}: {there} rows of {request:?}");
            if there > 0 {
                expected.extend(rows);
            }
        }
        assert_eq!(found, expected, "{what}");
        self.sure = expected;
    }
}

/// All rows that a query sees, each of which must be there once.
async fn all_rows(engine: &Engine) -> Rows {
    let selection = Selection { table: SAMPLES.clone(), matchers: vec![], start_ms: i64::MIN, end_ms: i64::MAX };
    let set = engine.select(&selection, &Stop::default()).await.unwrap();
    let scan: Arc<dyn ExecutionPlan> = Arc::new(crate::SeriesScanExec::new(set.clone(), vec![1, 2]));
    let batches: Vec<RecordBatch> =
        execute_stream(scan, engine.session().task_ctx()).unwrap().try_collect().await.unwrap();
    let mut out = Rows::new();
    for batch in batches {
        let series = batch.column(0).as_primitive::<UInt32Type>();
        let ts = batch.column(1).as_primitive::<TimestampMillisecondType>();
        let values = batch.column(2).as_primitive::<Float64Type>();
        for i in 0..batch.num_rows() {
            let name = set.series[series.value(i) as usize].tags.metric().to_owned();
            let before = out.insert((name, ts.value(i)), values.value(i).to_bits());
            assert_eq!(before, None, "a row is there twice");
        }
    }
    out
}

/// A folder without a disk behind it where there is one: a history syncs a hundred times.
fn fast_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

async fn try_open(dir: &Path, faults: &Faults, change: impl FnOnce(&mut Settings)) -> Result<Engine> {
    let fs: Arc<dyn FileSystem> = Arc::new(Faulty::new(Arc::new(Disk), faults.clone()));
    let store: Arc<dyn ObjectStore> = Arc::new(LocalStore::open(fs.clone(), &dir.join("objects"))?);
    let mut settings = Settings { cpu_threads: 1, own_threads: false, reserve_bytes: 1 << 20, ..settings(dir) };
    change(&mut settings);
    let entropy = Arc::new(catalog::SystemEntropy);
    Engine::open(settings, Components { fs, entropy, ..components(&store) }, Extensions::default()).await
}

/// A start that failed is tried again.
async fn open_again(dir: &Path, faults: &Faults, what: &str) -> Engine {
    let mut last = None;
    for _ in 0..3 {
        match try_open(dir, faults, |_| ()).await {
            Ok(engine) => {
                // What runs beside would make a history depend on time.
                engine.inner().stopping.cancel();
                return engine;
            }
            Err(e) => last = Some(e),
        }
    }
    panic!("{what}: can't be opened: {last:?}")
}

/// Writes, flushes, compactions and restarts. Returns how many calls wrote something.
async fn history(fault: Option<(usize, Fault)>) -> usize {
    let dir = fast_dir();
    let faults = Faults::default();
    if let Some((call, fault)) = fault {
        faults.at(call, fault);
    }
    let what = format!("{fault:?}");
    let mut ledger = Ledger::default();
    for life in 0..3 {
        let engine = open_again(dir.path(), &faults, &what).await;
        ledger.check(&engine, &what).await;
        for round in 0..3 {
            for _ in 0..3 {
                ledger.write(&engine).await;
            }
            if round < 2 || life == 1 {
                // What failed stays in memory and in the log.
                let _ = engine.flush().await;
            }
        }
        let _ = engine.compact().await;
        for _ in 0..2 {
            ledger.write(&engine).await;
        }
        // While the process lives, what it refused is not seen.
        let found = all_rows(&engine).await;
        assert_eq!(found, ledger.sure, "{what}");
    }
    let calls = faults.calls().len();
    faults.clear();
    let engine = open_again(dir.path(), &faults, &what).await;
    ledger.check(&engine, &what).await;
    let before = ledger.sure.len();
    ledger.write(&engine).await;
    assert_eq!(ledger.sure.len(), before + 3, "{what}: writes are accepted again");
    engine.flush().await.unwrap();
    ledger.check(&engine, &what).await;
    calls
}

const KINDS: [Fault; 4] = [Fault::Full, Fault::Io, Fault::Short, Fault::Sync];

/// Of all pairs of a call and a way to fail every so many, others in each of the ways; all of them with
/// `THALWEG_TEST_FAULTS=all`, which takes minutes.
#[tokio::test]
async fn a_call_that_fails_loses_nothing() {
    let calls = history(None).await;
    assert!(calls >= 200, "{calls}");
    let all = std::env::var("THALWEG_TEST_FAULTS").is_ok_and(|v| v == "all");
    let step = if all { 1 } else { 37 };
    for i in (0..calls * KINDS.len()).step_by(step) {
        history(Some((i / KINDS.len(), KINDS[i % KINDS.len()]))).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_refuses_writes_until_there_is_room() {
    let dir = fast_dir();
    let faults = Faults::default();
    let threads = |s: &mut Settings| s.own_threads = true;
    let engine = try_open(dir.path(), &faults, threads).await.unwrap();
    let mut ledger = Ledger::default();
    ledger.write(&engine).await;
    engine.flush().await.unwrap();
    for _ in 0..3 {
        ledger.write(&engine).await;
    }
    assert!(ledger.refused.is_empty());
    // Neither a request nor a data file fits, with or without the reserve.
    faults.always(Fault::Full);
    ledger.write(&engine).await;
    assert_eq!(ledger.refused.len(), 1);
    assert!(engine.inner().reserve.is_full());
    let calls = faults.calls().iter().filter(|c| c.path.ends_with("wal")).count();
    ledger.write(&engine).await;
    assert_eq!(faults.calls().iter().filter(|c| c.path.ends_with("wal")).count(), calls, "nothing is tried");
    assert!(engine.flush().await.is_err());
    assert_eq!(all_rows(&engine).await, ledger.sure, "reads go on");
    faults.clear();
    let accepted = async {
        while engine.inner().reserve.is_full() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), accepted).await.expect("the disk has room again");
    let before = ledger.sure.len();
    ledger.write(&engine).await;
    assert_eq!(ledger.sure.len(), before + 3);
    engine.shutdown(Duration::from_secs(10)).await.unwrap();
    drop(engine);
    let engine = open_again(dir.path(), &faults, "after a full disk").await;
    ledger.check(&engine, "after a full disk").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_reserve_lets_a_flush_make_room() {
    let dir = fast_dir();
    let faults = Faults::default();
    let engine = try_open(dir.path(), &faults, |s| s.own_threads = true).await.unwrap();
    let mut ledger = Ledger::default();
    ledger.write(&engine).await;
    // The log has room for little more, and it fills sooner than anything is flushed; data files take a fraction of it.
    let flushing = engine.inner().flushing.lock().await;
    faults.room(Some(faults.used() + (6 << 20)));
    let mut last = model(&[]);
    let mut state = 1u64;
    for sent in 0.. {
        // The same rows with ever other values.
        let rows: Vec<(&str, i64, f64)> = (0..10_000)
            .map(|i| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (["m0", "m1", "m2", "m3"][i % 4], NOW + i as i64 / 4, (state >> 11) as f64 * 1e-7)
            })
            .collect();
        if engine.write(request(&engine, &rows)).await.is_err() {
            break;
        }
        last = model(&rows);
        assert!(sent < 1000, "the disk never fills");
    }
    drop(flushing);
    let accepted = async {
        loop {
            let before = ledger.sure.len();
            ledger.write(&engine).await;
            if ledger.sure.len() > before {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), accepted).await.expect("a flush makes room");
    let found = all_rows(&engine).await;
    assert_eq!(found, last.into_iter().chain(ledger.sure).collect::<Rows>());
    assert!(!engine.files().unwrap().is_empty());
}

/// Requests of rows with ever other values.
fn noise(engine: &Engine, state: &mut u64, rows: i64) -> Write {
    let rows: Vec<(&str, i64, f64)> = (0..rows)
        .map(|i| {
            *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (["m0", "m1", "m2", "m3"][i as usize % 4], NOW + (*state >> 40) as i64, f64::from_bits(*state))
        })
        .collect();
    request(engine, &rows)
}

#[tokio::test]
async fn rows_are_flushed_while_there_is_room_for_them() {
    let dir = fast_dir();
    let faults = Faults::default();
    let engine = open_again(dir.path(), &faults, "open").await;
    let mut state = 1;
    engine.write(noise(&engine, &mut state, 100_000)).await.unwrap();
    let memory = engine.inner().version().memory() as u64;
    assert!(memory > 512 << 10, "{memory}");
    faults.room(Some(faults.used() + 3 * memory));
    assert!(!engine.inner().freeze_due().await);
    faults.room(Some(faults.used() + 3 * memory - 1));
    assert!(engine.inner().freeze_due().await);
    engine.inner().flush_frozen().await.unwrap();
    // What the reserve has room for is left alone.
    engine.write(noise(&engine, &mut state, 1000)).await.unwrap();
    faults.room(Some(faults.used()));
    assert!(!engine.inner().freeze_due().await);
}

#[tokio::test]
async fn a_database_is_opened_although_its_log_has_no_room_in_files() {
    let dir = fast_dir();
    let faults = Faults::default();
    let engine = open_again(dir.path(), &faults, "open").await;
    let mut state = 1;
    for _ in 0..4 {
        engine.write(noise(&engine, &mut state, 100_000)).await.unwrap();
    }
    let expected = all_rows(&engine).await;
    drop(engine);
    // Another program fills the disk meanwhile, and memtables are smaller than the log.
    faults.room(Some(faults.used()));
    let engine = try_open(dir.path(), &faults, |s| s.flush_bytes = 64 << 10).await.unwrap();
    assert!(engine.inner().reserve.is_full());
    assert_eq!(all_rows(&engine).await, expected);
    assert_eq!(
        engine.write(request(&engine, &[("a", NOW, 1.0)])).await.unwrap_err().kind(),
        catalog::ErrorKind::Unavailable
    );
    faults.room(None);
    engine.flush().await.unwrap();
    assert_eq!(all_rows(&engine).await, expected);
    assert!(logs(dir.path()).is_empty());
}

/// A log that is too long refuses the rows that would bring about the next flush, so it is not left to that.
#[tokio::test]
async fn a_log_that_could_not_be_trimmed_is_trimmed_later() {
    let flushed = async |fault: Option<usize>| {
        let dir = fast_dir();
        let faults = Faults::default();
        if let Some(call) = fault {
            faults.at(call, Fault::Io);
        }
        let engine = open_again(dir.path(), &faults, "open").await;
        engine.write(request(&engine, &[("a", NOW, 1.0)])).await.unwrap();
        let result = engine.flush().await;
        (dir, engine, faults, result)
    };
    let (_dir, _engine, faults, _) = flushed(None).await;
    let removes = |c: &catalog::fs::Call| c.what == "remove" && c.path.extension().is_some_and(|e| e == "wal");
    let call = faults.calls().iter().position(removes).unwrap();
    let (dir, engine, _, result) = flushed(Some(call)).await;
    result.unwrap_err();
    assert_eq!((logs(dir.path()).len(), rows(&engine).len()), (1, 0));
    assert!(engine.inner().freeze_due().await);
    engine.inner().flush_frozen().await.unwrap();
    assert_eq!(logs(dir.path()).len(), 0);
    assert!(!engine.inner().freeze_due().await);
}
