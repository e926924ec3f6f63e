//! Opening, writing, restarting, and reading while memtables are frozen.

mod backups;
mod compaction;
mod faults;
mod snapshots;
mod stores;
mod views;

use std::collections::BTreeMap;
use std::path::Path;

use arrow::array::{ArrayRef, AsArray, Float64Array, RecordBatch, TimestampMillisecondArray, UInt32Array};
use arrow::datatypes::{Float64Type, TimestampMillisecondType, UInt32Type};
use catalog::fs::Disk;
use catalog::tables::{SAMPLES, time_type};
use catalog::{ManualClock, MatchOp, Matcher};
use futures::TryStreamExt;
use object_store::ObjectStoreExt;
use object_store::memory::InMemory;

use super::*;
use crate::Batch;

const NOW: i64 = 1_700_000_000_000;

fn settings(dir: &Path) -> Settings {
    Settings { data_dir: dir.to_owned(), memory_limit: 256 << 20, ..Settings::default() }
}

/// What lives beside the data folder: a bucket, of which a crash takes nothing.
fn bucket() -> Arc<dyn ObjectStore> {
    Arc::new(InMemory::new())
}

fn components(store: &Arc<dyn ObjectStore>) -> Components {
    Components {
        store: store.clone(),
        fs: Arc::new(Disk),
        clock: Arc::new(ManualClock::new(NOW)),
        entropy: Arc::new(catalog::SeededEntropy::new(1)),
        telemetry: Arc::new(Telemetry::default()),
    }
}

async fn open(dir: &Path, store: &Arc<dyn ObjectStore>) -> Engine {
    Engine::open(settings(dir), components(store), Extensions::default()).await.unwrap()
}

/// A request with one row per (series name, ts, value).
fn request(engine: &Engine, rows: &[(&str, i64, f64)]) -> Write {
    let mut encoder = engine.registry().encoder();
    let refs: Vec<u32> = rows.iter().map(|r| encoder.tags(&mut [("__name__", r.0)], None).unwrap()).collect();
    let columns: Vec<ArrayRef> = vec![
        Arc::new(UInt32Array::from(refs)),
        Arc::new(TimestampMillisecondArray::from_iter_values(rows.iter().map(|r| r.1)).with_data_type(time_type())),
        Arc::new(Float64Array::from_iter_values(rows.iter().map(|r| r.2))),
    ];
    let rows = RecordBatch::try_new(SAMPLES.arrow().clone(), columns).unwrap();
    let batch = Batch { table: SAMPLES.clone(), rows };
    Write { tags: encoder.finish(), batches: vec![batch], metadata: vec![] }
}

/// The log's segments.
fn logs(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut files = Disk.list(&dir.join("wal")).unwrap();
    files.retain(|f| f.extension().is_some_and(|e| e == "wal"));
    files
}

/// All rows in memtables, the newest winning.
fn rows(engine: &Engine) -> BTreeMap<(String, i64), u64> {
    let version = engine.inner().version();
    let mut out = BTreeMap::new();
    let mut memtables: Vec<_> = version.table(SAMPLES.id).unwrap().memtables().cloned().collect();
    memtables.reverse();
    for memtable in memtables {
        let ordinals = memtable.ordinals();
        let names: Vec<String> =
            ordinals.iter().map(|o| engine.registry().get(*o).unwrap().tags.metric().to_owned()).collect();
        let wanted: Vec<(u32, u32)> = (0..).zip(ordinals).collect();
        let read = memtable.read(&wanted, i64::MIN, i64::MAX, &[1, 2]).unwrap();
        let series = read.column(0).as_primitive::<UInt32Type>();
        let ts = read.column(1).as_primitive::<TimestampMillisecondType>();
        let values = read.column(2).as_primitive::<Float64Type>();
        for i in 0..read.num_rows() {
            out.insert((names[series.value(i) as usize].clone(), ts.value(i)), values.value(i).to_bits());
        }
    }
    out
}

fn model(rows: &[(&str, i64, f64)]) -> BTreeMap<(String, i64), u64> {
    rows.iter().map(|r| ((r.0.to_owned(), r.1), r.2.to_bits())).collect()
}

/// All rows, from memory and files.
async fn all(engine: &Engine) -> Vec<((String, i64), u64)> {
    use datafusion::physical_plan::{ExecutionPlan, execute_stream};
    let selection = Selection { table: SAMPLES.clone(), matchers: vec![], start_ms: i64::MIN, end_ms: i64::MAX };
    let set = engine.select(&selection, &Stop::default()).await.unwrap();
    let scan: Arc<dyn ExecutionPlan> = Arc::new(crate::SeriesScanExec::new(set.clone(), vec![1, 2]));
    let stream = execute_stream(scan, engine.session().task_ctx()).unwrap();
    let batches: Vec<RecordBatch> = stream.try_collect().await.unwrap();
    let mut out = vec![];
    for batch in batches {
        let series = batch.column(0).as_primitive::<UInt32Type>();
        let ts = batch.column(1).as_primitive::<TimestampMillisecondType>();
        let values = batch.column(2).as_primitive::<Float64Type>();
        for i in 0..batch.num_rows() {
            let name = set.series[series.value(i) as usize].tags.metric().to_owned();
            out.push(((name, ts.value(i)), values.value(i).to_bits()));
        }
    }
    out
}

/// What a crash would leave: the folder as it is now, without the engine knowing.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target)
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[tokio::test]
async fn what_is_acknowledged_is_there_after_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let store = bucket();
    let engine = open(dir.path(), &store).await;
    let stale = f64::from_bits(0x7ff0_0000_0000_0002);
    let mut all = vec![];
    for k in 0..40i64 {
        let scrape = [("a", NOW + k * 1000, k as f64), ("b", NOW + k * 1000, stale), ("c", NOW, k as f64 / 10.0)];
        engine.write(request(&engine, &scrape)).await.unwrap();
        all.extend(scrape);
        if k % 13 == 0 {
            let crashed = tempfile::tempdir().unwrap();
            copy(dir.path(), crashed.path());
            let again = open(crashed.path(), &store).await;
            assert_eq!(rows(&again), model(&all), "after {k}");
            again.write(request(&again, &[("a", 1, 1.0), ("new", 1, 2.0)])).await.unwrap();
            let twice = tempfile::tempdir().unwrap();
            copy(crashed.path(), twice.path());
            let expected = [&all[..], &[("a", 1, 1.0), ("new", 1, 2.0)]].concat();
            assert_eq!(rows(&open(twice.path(), &store).await), model(&expected), "twice after {k}");
        }
    }
    assert_eq!(rows(&engine), model(&all));
}

#[tokio::test]
async fn metadata_survive_and_say_the_newest() {
    let dir = tempfile::tempdir().unwrap();
    let store = bucket();
    let engine = open(dir.path(), &store).await;
    let of = |metric: &str, help: &str| MetricMetadata {
        metric: metric.to_owned(),
        kind: "counter".to_owned(),
        help: help.to_owned(),
        unit: String::new(),
    };
    for metadata in [vec![of("m", "1"), of("n", "1")], vec![of("m", "2")], vec![of("m", "2")]] {
        engine.write(Write { metadata, ..Write::default() }).await.unwrap();
    }
    let expected = vec![of("m", "2"), of("n", "1")];
    assert_eq!(engine.metadata(None), expected);
    let crashed = tempfile::tempdir().unwrap();
    copy(dir.path(), crashed.path());
    let engine = open(crashed.path(), &store).await;
    assert_eq!(engine.metadata(None), expected);
    engine.shutdown(Duration::from_secs(10)).await.unwrap();
    // Now from the file catalog: the log is empty.
    assert_eq!(logs(crashed.path()), Vec::<std::path::PathBuf>::new());
    drop(engine);
    assert_eq!(open(crashed.path(), &store).await.metadata(Some("m")), [of("m", "2")]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn freezing_under_writes_hides_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = bucket();
    let engine = open(dir.path(), &store).await;
    let writers: Vec<_> = ["a", "b", "c"]
        .into_iter()
        .map(|name| {
            let engine = engine.clone();
            tokio::spawn(async move {
                for k in 0..60i64 {
                    engine.write(request(&engine, &[(name, k, k as f64)])).await.unwrap();
                    // Acknowledged rows are all visible, through any number of freezes.
                    let seen = rows(&engine).keys().filter(|r| r.0 == name).count();
                    assert_eq!(seen as i64, k + 1);
                }
            })
        })
        .collect();
    for _ in 0..30 {
        engine.inner().freeze(|_| true).await.unwrap();
        tokio::task::yield_now().await;
    }
    for writer in writers {
        writer.await.unwrap();
    }
    assert_eq!(rows(&engine).len(), 180);
    let crashed = tempfile::tempdir().unwrap();
    copy(dir.path(), crashed.path());
    assert_eq!(rows(&open(crashed.path(), &store).await), rows(&engine));
}

#[tokio::test]
async fn a_bad_request_or_a_full_queue_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path(), &bucket()).await;
    let mut write = request(&engine, &[("a", 1, 1.0)]);
    write.tags.sets.clear();
    assert_eq!(engine.write(write).await.unwrap_err().kind(), catalog::ErrorKind::Internal);
    engine.write(Write::default()).await.unwrap();
    let (queue, memory) = (Queue::default(), Memory::new(16));
    let waiting = queue.push(request(&engine, &[("a", 1, 1.0)]), &memory).unwrap();
    let held = memory.used();
    let refused = queue.push(request(&engine, &[("a", 1, 1.0)]), &memory).unwrap_err();
    assert_eq!(refused.kind(), catalog::ErrorKind::Unavailable);
    assert_eq!(memory.used(), held);
    drop((waiting, queue));
    assert_eq!(memory.used(), 0);
    engine.inner().queue.close();
    let refused = engine.write(request(&engine, &[("a", 1, 1.0)])).await.unwrap_err();
    assert_eq!(refused.kind(), catalog::ErrorKind::Unavailable);
    assert!(rows(&engine).is_empty());
}

#[tokio::test]
async fn without_memory_queries_are_refused_and_then_writes_and_nothing_is_left_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path(), &bucket()).await;
    let (memory, minute) = (engine.memory().clone(), QueryLimits { timeout: Duration::from_secs(60) });
    engine.write(request(&engine, &[("a", 1, 1.0)])).await.unwrap();
    let (sets, stored) = (engine.registry().len(), rows(&engine));
    memory.observe(memory.limit() / 32 * 31);
    assert_eq!(engine.begin(minute).await.unwrap_err().kind(), catalog::ErrorKind::Unavailable);
    engine.arrive(1).unwrap();
    memory.observe(memory.limit() + (1 << 20));
    assert_eq!(engine.arrive(1).unwrap_err().kind(), catalog::ErrorKind::Unavailable);
    let refused = engine.write(request(&engine, &[("b", 1, 1.0)])).await.unwrap_err();
    assert_eq!(refused.kind(), catalog::ErrorKind::Unavailable);
    assert!(refused.message().contains("memory_limit"), "{refused}");
    assert_eq!((engine.registry().len(), rows(&engine)), (sets, stored));
    memory.observe(0);
    engine.begin(minute).await.unwrap();
    engine.write(request(&engine, &[("b", 1, 1.0)])).await.unwrap();
    assert_eq!(rows(&engine).len(), 2);
}

#[tokio::test]
async fn when_the_process_holds_too_much_the_oldest_query_ends() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path(), &bucket()).await;
    let minute = QueryLimits { timeout: Duration::from_secs(60) };
    let limit = engine.memory().limit();
    let (old, young) = (engine.begin(minute).await.unwrap(), engine.begin(minute).await.unwrap());
    let calm = engine.observe(0);
    assert!(old.stop().check().is_ok());
    assert!(engine.observe(limit / 64 * 61) < calm);
    let ended = old.stop().check().unwrap_err();
    assert_eq!(ended.kind(), catalog::ErrorKind::LimitExceeded);
    assert!(ended.message().contains(&format!("memory_limit is {limit}")), "{ended}");
    assert!(young.stop().check().is_ok(), "the old one may still make room");
    engine.observe(limit + 1);
    assert!(young.stop().check().is_err());
}

#[tokio::test]
async fn sets_are_looked_for_in_one_part_at_a_time() {
    const PARTS: usize = 10;
    const SETS: usize = 2000;
    let (dir, store) = (tempfile::tempdir().unwrap(), bucket());
    let engine = open(dir.path(), &store).await;
    engine.inner().stopping.cancel();
    for part in 0..PARTS {
        let names: Vec<String> = (0..SETS).map(|i| format!("m_{part}_{i}")).collect();
        let rows: Vec<_> = names.iter().map(|n| (n.as_str(), NOW, 1.0)).collect();
        engine.write(request(&engine, &rows)).await.unwrap();
        engine.inner().flush_all_of_log().await.unwrap();
    }
    let settings = Settings { memory_limit: PARTS * SETS * catalog::tag_parts::SET_BYTES, ..settings(dir.path()) };
    let few = Engine::open(settings, components(&store), Extensions::default()).await.unwrap();
    few.inner().stopping.cancel();
    assert_eq!(few.inner().version().parts.len(), PARTS);
    // A matcher that is not for the name, so that all sets have to be looked at.
    let select = async |value: &str| {
        let matchers = vec![Matcher::new("other", MatchOp::Eq, value).unwrap()];
        let selection = Selection { table: SAMPLES.clone(), matchers, start_ms: i64::MIN, end_ms: i64::MAX };
        few.select(&selection, &Stop::default()).await
    };
    let found = select("none").await.unwrap();
    assert_eq!((found.series.len(), found.candidates()), (0, PARTS * SETS));
    // What is kept counts as its query's.
    let query = few.begin(QueryLimits { timeout: Duration::from_secs(60) }).await.unwrap();
    let some = vec![Matcher::new("__name__", MatchOp::Re, "m_3_.*").unwrap()];
    let selection = Selection { table: SAMPLES.clone(), matchers: some, start_ms: i64::MIN, end_ms: i64::MAX };
    let found = few.select(&selection, query.stop()).await.unwrap();
    let held = query.memory().held_by_query();
    assert!(found.series.len() == SETS && held > SETS * catalog::tag_parts::SET_BYTES, "{held}");
    assert_eq!(few.memory().held(Kind::Queries), held);
    drop((query, found));
    // Whoever keeps all of them needs more than there is.
    assert_eq!(select("").await.unwrap_err().kind(), catalog::ErrorKind::LimitExceeded);
    assert_eq!(few.memory().held(Kind::Queries), 0);
}

#[tokio::test]
async fn a_query_that_is_refused_memory_gives_back_all_that_it_had() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path(), &bucket()).await;
    let session = engine.session();
    let text = "select array_agg(value) from generate_series(1, 1000000000)";
    let plan = session.state().create_logical_plan(text).await.unwrap();
    let query = engine.begin(QueryLimits { timeout: Duration::from_secs(60) }).await.unwrap();
    let error = match engine.execute(&session.state(), plan, query).await {
        Ok(stream) => stream.try_collect::<Vec<_>>().await.unwrap_err(),
        Err(e) => e,
    };
    let error = crate::error_of(error);
    assert_eq!(error.kind(), catalog::ErrorKind::LimitExceeded, "{error}");
    assert!(error.message().contains("memory_limit"), "{error}");
    assert!(engine.memory().refused(Kind::Queries) > 0);
    // Its task is dropped on a thread of its own.
    let all_back = async {
        while engine.memory().held(Kind::Queries) > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), all_back).await.expect("what it reserved is given back");
}

#[tokio::test]
async fn idle_sets_leave_only_when_no_memtable_holds_them() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Arc::new(ManualClock::new(NOW));
    let components = Components { clock: clock.clone(), ..components(&bucket()) };
    let engine = Engine::open(settings(dir.path()), components, Extensions::default()).await.unwrap();
    engine.write(request(&engine, &[("held", 1, 1.0)])).await.unwrap();
    let idle =
        Arc::new(Series::new(engine.registry().hasher(), catalog::tag::tag_set(&[("__name__", "idle")]).unwrap()));
    engine.registry().publish(&idle, &[], committer::second(NOW)).unwrap();
    let later = committer::second(NOW) + 7201;
    committer::retire(engine.inner(), later - 2).await;
    assert_eq!(engine.registry().len(), 2);
    committer::retire(engine.inner(), later).await;
    assert_eq!(engine.registry().len(), 1);
    assert!(engine.registry().lookup(idle.id).unwrap().is_none());
}

#[tokio::test]
async fn queries_run_within_their_deadline_and_stop_when_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path(), &bucket()).await;
    let session = engine.session();
    let limits = QueryLimits { timeout: Duration::from_secs(60) };
    let plan = session.state().create_logical_plan("select 1 + 1 as two, now() is not null").await.unwrap();
    let stream = engine.execute(&session.state(), plan, engine.begin(limits).await.unwrap()).await.unwrap();
    assert_eq!(stream.schema().field(0).name(), "two");
    let batches: Vec<RecordBatch> = stream.try_collect().await.unwrap();
    assert_eq!(batches.iter().map(RecordBatch::num_rows).sum::<usize>(), 1);

    // More rows than could ever be counted.
    let endless = "select count(*) from generate_series(1, 100000000000) a where value % 7 = 3";
    let plan = session.state().create_logical_plan(endless).await.unwrap();
    let short = QueryLimits { timeout: Duration::from_millis(20) };
    let error = match engine.execute(&session.state(), plan.clone(), engine.begin(short).await.unwrap()).await {
        Ok(stream) => stream.try_collect::<Vec<_>>().await.unwrap_err(),
        Err(e) => e,
    };
    assert_eq!(crate::error_of(error).kind(), catalog::ErrorKind::Timeout);
    let dropped = engine.execute(&session.state(), plan, engine.begin(limits).await.unwrap()).await.unwrap();
    drop(dropped);
    assert_eq!(engine.decode(|| 7).await, 7);
    let error = session.state().create_logical_plan("select nothing").await.unwrap_err();
    assert_eq!(crate::error_of(error).kind(), catalog::ErrorKind::Invalid);
}

/// One that ended while its reader paused holds nobody up.
#[tokio::test]
async fn a_paused_reader_of_a_failed_query_keeps_no_turn() {
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings { queries_max: 1, query_wait_max: Duration::from_secs(5), ..settings(dir.path()) };
    let engine = Engine::open(settings, components(&bucket()), Extensions::default()).await.unwrap();
    let session = engine.session();
    let plan = session.state().create_logical_plan("select * from generate_series(1, 100000000000)").await.unwrap();
    let short = QueryLimits { timeout: Duration::from_millis(300) };
    let query = engine.begin(short).await.unwrap();
    let mut stream = engine.execute(&session.state(), plan, query).await.unwrap();
    assert!(stream.try_next().await.unwrap().is_some());
    let other = engine.begin(QueryLimits { timeout: Duration::from_secs(60) }).await;
    assert!(other.is_ok(), "{other:?}");
    // What it had given comes first, then why there is no more.
    let error = loop {
        match stream.try_next().await {
            Ok(batch) => assert!(batch.is_some(), "an end without an error"),
            Err(e) => break e,
        }
    };
    assert_eq!(crate::error_of(error).kind(), catalog::ErrorKind::Timeout);
    assert!(stream.try_next().await.unwrap().is_none());
}

/// What is known already needs no place in the log, and tells whoever lost it nothing.
#[tokio::test]
async fn whoever_was_replaced_acknowledges_not_even_what_is_known() {
    let (dir, other, store) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), bucket());
    let open = async |dir: &Path| {
        let settings = Settings { wal: LogStore::Object, ..settings(dir) };
        Engine::open(settings, components(&store), Extensions::default()).await.unwrap()
    };
    let described = |help: &str| {
        let (metric, kind, unit) = ("a".to_owned(), "gauge".to_owned(), String::new());
        Write { metadata: vec![MetricMetadata { metric, kind, help: help.to_owned(), unit }], ..Write::default() }
    };
    let old = open(dir.path()).await;
    for help in ["1", "2", "2"] {
        old.write(described(help)).await.unwrap();
    }
    let new = open(other.path()).await;
    assert_eq!(old.write(described("2")).await.unwrap_err().kind(), catalog::ErrorKind::Unavailable);
    assert!(old.check_writable().is_err());
    new.write(described("2")).await.unwrap();
}

#[tokio::test]
async fn whoever_opens_a_database_last_has_it() {
    let (dir, other, store) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), bucket());
    let old = open(dir.path(), &store).await;
    old.write(request(&old, &[("a", NOW, 1.0)])).await.unwrap();
    let new = open(other.path(), &store).await;
    let refused = old.flush().await.unwrap_err();
    assert_eq!(refused.kind(), catalog::ErrorKind::Unavailable);
    let refused = old.write(request(&old, &[("a", NOW + 1, 1.0)])).await.unwrap_err();
    assert!(refused.message().contains("taken this database over"), "{refused}");
    assert!(old.check_writable().is_err() && new.check_writable().is_ok());
    new.write(request(&new, &[("b", NOW, 2.0)])).await.unwrap();
    new.flush().await.unwrap();
    // What the old one acknowledged is in its log, until it is opened again.
    drop(old);
    let old = open(dir.path(), &store).await;
    assert_eq!(rows(&old), model(&[("a", NOW, 1.0)]));
    old.flush().await.unwrap();
    assert_eq!(old.files().unwrap().len(), 2);
}

#[tokio::test]
async fn a_delete_is_not_done_by_whoever_was_replaced() {
    let (dir, other, store) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), bucket());
    let old = open(dir.path(), &store).await;
    let all = || vec![Selection { table: SAMPLES.clone(), matchers: vec![], start_ms: i64::MIN, end_ms: i64::MAX }];
    old.delete(all()).await.unwrap();
    let new = open(other.path(), &store).await;
    new.write(request(&new, &[("a", NOW, 1.0)])).await.unwrap();
    // The old one sees no file that it concerns, and has nothing to commit.
    assert_eq!(old.delete(all()).await.unwrap_err().kind(), catalog::ErrorKind::Unavailable);
    assert_eq!(query(&new).await.1, 1);
}

#[tokio::test]
async fn a_full_compaction_leaves_alone_what_comes_while_it_runs() {
    let (dir, store) = (tempfile::tempdir().unwrap(), bucket());
    let engine = open(dir.path(), &store).await;
    engine.inner().stopping.cancel();
    let flush = async |i| {
        engine.write(request(&engine, &[("a", NOW + i, 1.0)])).await.unwrap();
        engine.flush().await.unwrap();
    };
    flush(0).await;
    flush(1).await;
    let days = &engine.inner().days;
    // A merge that begins waits for this one.
    let deleting = days.deleting.lock().await;
    let compacting = tokio::spawn({
        let engine = engine.clone();
        async move { engine.compact().await }
    });
    while days.compacting.try_lock().is_ok() {
        tokio::task::yield_now().await;
    }
    for i in 2..12 {
        flush(i).await;
    }
    drop(deleting);
    compacting.await.unwrap().unwrap();
    assert!(engine.files().unwrap().len() > 1, "under constant writes it would never end");
    engine.compact().await.unwrap();
    assert_eq!(engine.files().unwrap().len(), 1);
}

/// Files of days before today, and files and tag parts of today.
fn counts(engine: &Engine) -> (usize, usize, usize) {
    let (version, today) = (engine.inner().version(), crate::segment::day_of(NOW));
    let files = &version.table(SAMPLES.id).unwrap().files;
    let new = files.iter().filter(|f| f.day == today).count();
    (files.len() - new, new, version.parts.iter().filter(|p| p.day == today).count())
}

/// Flushes a new series so many times before each merge of a compaction, until it is done or there are 400. Gives how many
/// there were, and the most files and tag parts of today.
async fn flush_beside(
    engine: &Engine,
    flushes_a_merge: usize,
    compaction: impl Future<Output = Result<()>> + Send + 'static,
) -> (usize, usize, usize) {
    let compacting = tokio::spawn(compaction);
    let (mut flushes, mut files, mut parts) = (0, 0, 0);
    while !compacting.is_finished() && flushes < 400 {
        // A merge that begins waits for this one, and this one for that: there are as many flushes between any two.
        let _deleting = engine.inner().days.deleting.lock().await;
        for _ in 0..flushes_a_merge {
            let name = format!("new_{flushes}");
            engine.write(request(engine, &[(&name, NOW, 1.0)])).await.unwrap();
            engine.flush().await.unwrap();
            flushes += 1;
        }
        let (_, now_files, now_parts) = counts(engine);
        (files, parts) = (files.max(now_files), parts.max(now_parts));
    }
    compacting.await.unwrap().unwrap();
    (flushes, files, parts)
}

#[tokio::test]
async fn a_long_compaction_keeps_up_with_flushes() {
    const DAYS: usize = 16;
    let (dir, store) = (tempfile::tempdir().unwrap(), bucket());
    let engine = open(dir.path(), &store).await;
    engine.inner().stopping.cancel();
    // Each of these days is merged by itself.
    for i in 0..2 {
        let ts = |day: usize| NOW + i - (2 + day as i64) * 86_400_000;
        let rows: Vec<_> = (0..DAYS).map(|day| ("old", ts(day), 1.0)).collect();
        engine.write(request(&engine, &rows)).await.unwrap();
        engine.flush().await.unwrap();
    }
    let compaction = {
        let engine = engine.clone();
        async move { engine.compact().await }
    };
    let (flushes, files, parts) = flush_beside(&engine, 15, compaction).await;
    assert!(flushes > 180, "{flushes} flushes in one round");
    assert!(files < 150 && parts < 150, "up to {files} files and {parts} tag parts of {flushes} flushes");
    engine.compact().await.unwrap();
    assert_eq!(counts(&engine), (DAYS, 1, 1));
    assert_eq!(all(&engine).await.len(), 2 * DAYS + flushes);
}

#[tokio::test]
async fn a_round_of_compaction_ends_however_many_flushes_come() {
    let (dir, store) = (tempfile::tempdir().unwrap(), bucket());
    let engine = open(dir.path(), &store).await;
    engine.inner().stopping.cancel();
    for i in 0..6 {
        engine.write(request(&engine, &[("old", NOW + i, 1.0)])).await.unwrap();
        engine.flush().await.unwrap();
    }
    let round = {
        let inner = engine.inner().clone();
        async move { crate::compact::due(&inner).await }
    };
    let (flushes, ..) = flush_beside(&engine, 8, round).await;
    assert!(flushes < 100, "{flushes} flushes in one round");
    assert_eq!(all(&engine).await.len(), 6 + flushes);
}

#[tokio::test]
async fn deletes_are_folded_in_while_more_come() {
    let (dir, store) = (tempfile::tempdir().unwrap(), bucket());
    let engine = open(dir.path(), &store).await;
    engine.write(request(&engine, &[("a", NOW, 1.0), ("a", NOW + 1, 2.0)])).await.unwrap();
    let waiting = || engine.inner().version().table(SAMPLES.id).unwrap().deletes.len();
    let delete = |count: usize| {
        let one = Selection { table: SAMPLES.clone(), matchers: vec![], start_ms: NOW, end_ms: NOW };
        engine.delete(vec![one; count])
    };
    delete(999).await.unwrap();
    crate::compact::due(engine.inner()).await.unwrap();
    assert_eq!((waiting(), all(&engine).await), (999, vec![(("a".to_owned(), NOW + 1), 2.0f64.to_bits())]));
    delete(1).await.unwrap();
    crate::compact::due(engine.inner()).await.unwrap();
    assert_eq!((waiting(), all(&engine).await), (0, vec![(("a".to_owned(), NOW + 1), 2.0f64.to_bits())]));
}

#[tokio::test]
async fn rows_without_their_catalog_are_not_written_over() {
    let (dir, store) = (tempfile::tempdir().unwrap(), bucket());
    let engine = open(dir.path(), &store).await;
    engine.write(request(&engine, &[("a", NOW, 1.0)])).await.unwrap();
    engine.shutdown(Duration::from_secs(10)).await.unwrap();
    drop(engine);
    // The SQL catalog is made anew.
    std::fs::remove_file(dir.path().join("catalog.sqlite")).unwrap();
    let engine = open(dir.path(), &store).await;
    assert_eq!(engine.files().unwrap().len(), 1);
    engine.shutdown(Duration::from_secs(10)).await.unwrap();
    drop(engine);
    for folder in catalog::journal::FOLDERS {
        let prefix = object_store::path::Path::from(format!("default/{folder}"));
        let objects: Vec<_> = store.list(Some(&prefix)).map_ok(|o| o.location).try_collect().await.unwrap();
        for object in &objects {
            store.delete(object).await.unwrap();
        }
    }
    let refused = Engine::open(settings(dir.path()), components(&store), Extensions::default()).await.unwrap_err();
    assert_eq!(refused.kind(), catalog::ErrorKind::Corrupt);
    assert!(refused.message().contains("no journal"), "{refused}");
}

#[tokio::test]
async fn sessions_have_tables_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path(), &bucket()).await;
    let (one, other) = (engine.session(), engine.session());
    one.sql("create view v as select 1").await.unwrap();
    assert!(one.sql("select * from v").await.is_ok());
    assert!(other.sql("select * from v").await.is_err());
}

#[tokio::test]
async fn a_flush_empties_memory_and_log() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path(), &bucket()).await;
    for k in 0..3i64 {
        engine.write(request(&engine, &[("a", NOW + k, 1.0), ("b", NOW - k * 86_400_000, 2.0)])).await.unwrap();
    }
    engine.flush().await.unwrap();
    assert!(rows(&engine).is_empty());
    assert_eq!(logs(dir.path()), Vec::<std::path::PathBuf>::new());
    assert_eq!(engine.inner().version().table(SAMPLES.id).unwrap().files.len(), 3);
    engine.write(request(&engine, &[("a", NOW, 5.0)])).await.unwrap();
    assert_eq!(rows(&engine), model(&[("a", NOW, 5.0)]));
    engine.shutdown(Duration::from_secs(10)).await.unwrap();
    assert_eq!(logs(dir.path()), Vec::<std::path::PathBuf>::new());
}

/// How many rows of each series a query sees, and how many distinct (series, time).
async fn query(engine: &Engine) -> (BTreeMap<String, usize>, usize) {
    let rows = all(engine).await;
    let mut counts = BTreeMap::new();
    for ((name, _), _) in &rows {
        *counts.entry(name.clone()).or_default() += 1;
    }
    let keys: std::collections::HashSet<_> = rows.into_iter().map(|row| row.0).collect();
    (counts, keys.len())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queries_see_each_row_once_through_flushes_and_compactions() {
    let dir = tempfile::tempdir().unwrap();
    let store = bucket();
    let engine = open(dir.path(), &store).await;
    let stop = CancellationToken::new();
    let mover = tokio::spawn({
        let (engine, stop) = (engine.clone(), stop.clone());
        async move {
            let mut rounds = 0;
            while !stop.is_cancelled() || rounds == 0 {
                engine.flush().await.unwrap();
                if rounds % 3 == 2 {
                    engine.compact().await.unwrap();
                }
                rounds += 1;
            }
        }
    });
    let writers: Vec<_> = ["a", "b", "c"]
        .into_iter()
        .map(|name| {
            let engine = engine.clone();
            tokio::spawn(async move {
                for k in 0..30usize {
                    // Two days, so that a flush makes several files.
                    let ts = NOW + (k as i64 % 2) * 86_400_000 + k as i64;
                    engine.write(request(&engine, &[(name, ts, k as f64)])).await.unwrap();
                    let (counts, distinct) = query(&engine).await;
                    assert_eq!(counts.get(name), Some(&(k + 1)), "{name} after its write {k}");
                    assert_eq!(counts.values().sum::<usize>(), distinct);
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    stop.cancel();
    mover.await.unwrap();
    let expected: BTreeMap<String, usize> = ["a", "b", "c"].map(|n| (n.to_owned(), 30)).into();
    assert_eq!(query(&engine).await.0, expected);
    let crashed = tempfile::tempdir().unwrap();
    copy(dir.path(), crashed.path());
    assert_eq!(query(&open(crashed.path(), &store).await).await.0, expected);
}

/// Opens with changed settings and a clock of one's own.
async fn open_with(dir: &Path, change: impl FnOnce(&mut Settings)) -> (Engine, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock::new(NOW));
    let components = Components { clock: clock.clone(), ..components(&bucket()) };
    let mut settings = settings(dir);
    change(&mut settings);
    (Engine::open(settings, components, Extensions::default()).await.unwrap(), clock)
}

#[tokio::test]
async fn memtables_are_frozen_when_due() {
    let frozen = async |engine: &Engine| engine.inner().freeze_due().await;
    let dir = tempfile::tempdir().unwrap();
    let (engine, clock) = open_with(dir.path(), |s| s.flush_interval = Duration::from_secs(60)).await;
    assert!(!frozen(&engine).await);
    engine.write(request(&engine, &[("a", NOW, 1.0)])).await.unwrap();
    // Stopped, so that only this test flushes.
    engine.inner().stopping.cancel();
    clock.set(NOW + 59_999);
    assert!(!frozen(&engine).await);
    clock.set(NOW + 60_000);
    assert!(frozen(&engine).await);

    let dir = tempfile::tempdir().unwrap();
    let (engine, _) = open_with(dir.path(), |s| s.flush_bytes = 1).await;
    engine.inner().stopping.cancel();
    engine.write(request(&engine, &[("a", NOW, 1.0)])).await.unwrap();
    assert!(frozen(&engine).await);

    let dir = tempfile::tempdir().unwrap();
    let (engine, _) = open_with(dir.path(), |s| s.wal_bytes_max = 1).await;
    engine.inner().stopping.cancel();
    engine.write(request(&engine, &[("a", NOW, 1.0)])).await.unwrap();
    assert!(frozen(&engine).await);

    let dir = tempfile::tempdir().unwrap();
    let (engine, _) = open_with(dir.path(), |s| s.memory_limit = 1280 << 10).await;
    engine.inner().stopping.cancel();
    for k in 0..600 {
        let wide: Vec<String> = (0..1000).map(|i| format!("m{i}")).collect();
        let rows: Vec<_> = wide.iter().map(|n| (n.as_str(), NOW + k, k as f64)).collect();
        if let Err(e) = engine.write(request(&engine, &rows)).await {
            assert_eq!(e.kind(), catalog::ErrorKind::Unavailable);
            assert!(frozen(&engine).await, "{e}");
            return;
        }
    }
    panic!("memory is not bounded");
}

#[tokio::test]
async fn replay_flushes_when_memory_is_short() {
    let dir = tempfile::tempdir().unwrap();
    let store = bucket();
    let engine = open(dir.path(), &store).await;
    let mut all = vec![];
    for k in 0..50i64 {
        let rows = [("a", NOW + k, 1.0), ("b", NOW + k, 2.0)];
        engine.write(request(&engine, &rows)).await.unwrap();
        all.extend(rows);
    }
    let crashed = tempfile::tempdir().unwrap();
    copy(dir.path(), crashed.path());
    let settings = Settings { flush_bytes: 1, ..settings(crashed.path()) };
    let again = Engine::open(settings, components(&store), Extensions::default()).await.unwrap();
    assert!(!again.inner().version().table(SAMPLES.id).unwrap().files.is_empty());
    assert_eq!(query(&again).await.1, all.len());
}

#[tokio::test]
async fn a_clock_that_was_wrong_before_the_first_row_drops_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, clock) = open_with(dir.path(), |s| s.retention.age = Some(Duration::from_secs(86_400))).await;
    clock.set(4_102_444_800_000);
    crate::retention::observe(engine.inner());
    clock.set(NOW);
    assert_eq!(engine.keeps_from_ms(&SAMPLES), i64::MIN);
    engine.write(request(&engine, &[("a", NOW, 1.0)])).await.unwrap();
    assert!(engine.keeps_from_ms(&SAMPLES) > i64::MIN, "from the first row on rows expire");
    engine.flush().await.unwrap();
    engine.compact().await.unwrap();
    assert_eq!(query(&engine).await.1, 1);
}

#[tokio::test]
async fn a_clock_that_jumps_loses_and_stalls_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, clock) = open_with(dir.path(), |s| s.flush_interval = Duration::from_secs(60)).await;
    engine.inner().stopping.cancel();
    let mut ts = NOW;
    let mut write = async || {
        ts += 1;
        engine.write(request(&engine, &[("a", ts, 1.0)])).await.unwrap();
    };
    let due = async || engine.inner().freeze_due().await;
    let (year_2100, year_1970) = (4_102_444_800_000, 0);
    write().await;
    clock.set(year_2100);
    assert!(due().await, "a minute has gone by");
    write().await;
    clock.set(year_2100 - 1000);
    engine.flush().await.unwrap();
    write().await;
    clock.set(year_2100 - 2000);
    assert!(!due().await, "a small step means nothing");
    clock.set(year_1970);
    assert!(due().await, "nobody knows how long it has been");
    write().await;
    engine.flush().await.unwrap();
    write().await;
    clock.set(59_999);
    assert!(!due().await);
    clock.set(60_000);
    assert!(due().await);
    engine.flush().await.unwrap();
    assert_eq!(query(&engine).await.1, 5);
    // An idle set that was last seen in 2100 leaves two hours after the clock was put right.
    let registry = engine.registry();
    let idle = Series::new(registry.hasher(), catalog::tag::tag_set(&[("__name__", "idle")]).unwrap());
    registry.publish(&Arc::new(idle), &[], committer::second(year_2100)).unwrap();
    let sets = registry.len();
    let now = committer::second(NOW);
    committer::retire(engine.inner(), now).await;
    assert_eq!(registry.len(), sets - 1, "the others have not been seen since 1970");
    committer::retire(engine.inner(), now + 7201).await;
    assert_eq!(registry.len(), 0);
}

#[tokio::test]
async fn a_log_in_the_bucket_outlives_disk_and_process() {
    let store = bucket();
    // Numbers that no two processes draw alike.
    let entropy = Arc::new(catalog::SeededEntropy::new(9));
    let open = async |dir: &Path, wal: LogStore| {
        let components = Components { entropy: entropy.clone(), ..components(&store) };
        Engine::open(Settings { wal, ..settings(dir) }, components, Extensions::default()).await
    };
    let dirs = [0; 4].map(|_| tempfile::tempdir().unwrap());
    let first = open(dirs[0].path(), LogStore::Object).await.unwrap();
    first.write(request(&first, &[("a", 1, 1.0)])).await.unwrap();
    let second = open(dirs[1].path(), LogStore::Object).await.unwrap();
    assert_eq!(rows(&second), model(&[("a", 1, 1.0)]));
    let refused = first.write(request(&first, &[("a", 2, 2.0)])).await.unwrap_err();
    assert_eq!(refused.kind(), catalog::ErrorKind::Unavailable, "it has lost the log");
    second.write(request(&second, &[("b", 3, 3.0)])).await.unwrap();
    drop((first, second));
    let third = open(dirs[3].path(), LogStore::Object).await.unwrap();
    assert_eq!(rows(&third), model(&[("a", 1, 1.0), ("b", 3, 3.0)]));
    drop(third);
    // A start that logs elsewhere brings it to files first.
    let fourth = open(dirs[2].path(), LogStore::Local).await.unwrap();
    assert_eq!(query(&fourth).await.1, 2);
    assert!(rows(&fourth).is_empty());
}

#[tokio::test]
async fn of_two_logs_the_newer_one_wins() {
    let store = bucket();
    let entropy = Arc::new(catalog::SeededEntropy::new(9));
    let open = async |dir: &Path, wal: LogStore| {
        let components = Components { entropy: entropy.clone(), ..components(&store) };
        Engine::open(Settings { wal, ..settings(dir) }, components, Extensions::default()).await.unwrap()
    };
    let [here, there] = [0; 2].map(|_| tempfile::tempdir().unwrap());
    for (wal, value) in [(LogStore::Local, 3.0), (LogStore::Object, 4.0)] {
        // One machine is lost with what only its own log has, another one goes on, and then the first one is back.
        let old = open(here.path(), LogStore::Local).await;
        old.write(request(&old, &[("a", 1, value - 2.0), ("b", 1, value)])).await.unwrap();
        drop(old);
        let new = open(there.path(), LogStore::Object).await;
        new.write(request(&new, &[("a", 1, value)])).await.unwrap();
        drop(new);
        let both = open(here.path(), wal).await;
        let is = async |engine: &Engine, expected: &[(&str, i64, f64)]| {
            let found = all(engine).await;
            assert_eq!(found.len(), expected.len(), "{wal:?}");
            assert_eq!(found.into_iter().collect::<BTreeMap<_, _>>(), model(expected), "{wal:?}");
        };
        is(&both, &[("a", 1, value), ("b", 1, value)]).await;
        both.write(request(&both, &[("b", 1, value + 1.0)])).await.unwrap();
        drop(both);
        let again = open(here.path(), wal).await;
        is(&again, &[("a", 1, value), ("b", 1, value + 1.0)]).await;
        again.flush().await.unwrap();
    }
}

#[tokio::test]
async fn a_start_with_a_local_log_fences_the_one_in_the_bucket() {
    let store = bucket();
    let entropy = Arc::new(catalog::SeededEntropy::new(9));
    let open = async |dir: &Path, wal: LogStore| {
        let components = Components { entropy: entropy.clone(), ..components(&store) };
        Engine::open(Settings { wal, ..settings(dir) }, components, Extensions::default()).await
    };
    let dirs = [0; 2].map(|_| tempfile::tempdir().unwrap());
    let alive = open(dirs[0].path(), LogStore::Object).await.unwrap();
    let local = open(dirs[1].path(), LogStore::Local).await.unwrap();
    let refused = alive.write(request(&alive, &[("a", 1, 1.0)])).await.unwrap_err();
    assert_eq!(refused.kind(), catalog::ErrorKind::Unavailable, "nobody would read it");
    local.write(request(&local, &[("a", 2, 2.0)])).await.unwrap();
    // What is in the local log is not passed over either.
    drop(local);
    let local = open(dirs[1].path(), LogStore::Object).await.unwrap();
    assert_eq!(query(&local).await.1, 1);
}

#[tokio::test]
async fn a_request_without_rows_does_not_pin_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let store = bucket();
    let metadata = |help: &str| {
        vec![MetricMetadata {
            metric: "a".to_owned(),
            kind: "gauge".to_owned(),
            help: help.to_owned(),
            unit: String::new(),
        }]
    };
    // A batch without rows beside metadata, metadata alone; now, and replayed.
    for restart in [false, true] {
        let mut engine = open(dir.path(), &store).await;
        let help = format!("{restart}");
        engine.write(Write { metadata: metadata(&help), ..request(&engine, &[]) }).await.unwrap();
        let alone = Write { metadata: metadata(&format!("{help}, alone")), batches: vec![], ..request(&engine, &[]) };
        engine.write(alone).await.unwrap();
        assert_eq!(logs(dir.path()).len(), 1);
        if restart {
            drop(engine);
            engine = open(dir.path(), &store).await;
        }
        engine.flush().await.unwrap();
        assert_eq!(logs(dir.path()), Vec::<std::path::PathBuf>::new(), "restarted {restart}");
        engine.shutdown(Duration::from_secs(10)).await.unwrap();
    }
    let engine = open(dir.path(), &store).await;
    assert_eq!(engine.metadata(Some("a"))[0].help, "true, alone");
}

#[tokio::test]
async fn metadata_alone_are_saved_when_the_log_grows() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, _) = open_with(dir.path(), |s| s.wal_bytes_max = 1).await;
    engine.inner().stopping.cancel();
    let metadata = |n: usize| MetricMetadata {
        metric: "a".to_owned(),
        kind: "gauge".to_owned(),
        help: format!("{n}"),
        unit: String::new(),
    };
    engine.write(Write { metadata: vec![metadata(1)], batches: vec![], ..request(&engine, &[]) }).await.unwrap();
    assert!(engine.inner().freeze_due().await, "there is something to save");
    engine.inner().flush_frozen().await.unwrap();
    assert_eq!(logs(dir.path()), Vec::<std::path::PathBuf>::new());
    assert!(!engine.inner().freeze_due().await);
}

#[tokio::test]
async fn what_queries_need_first_is_read_at_start() {
    let (dir, store) = (tempfile::tempdir().unwrap(), bucket());
    let engine = open(dir.path(), &store).await;
    engine.write(request(&engine, &[("a", NOW, 1.0), ("b", NOW, 2.0)])).await.unwrap();
    engine.flush().await.unwrap();
    engine.shutdown(Duration::from_secs(10)).await.unwrap();
    // Nothing runs beside this test.
    let settings = Settings { own_threads: false, ..settings(dir.path()) };
    let engine = Engine::open(settings, components(&store), Extensions::default()).await.unwrap();
    let cached = || (engine.inner().segments.cached_bytes(), engine.inner().parts.cached_bytes());
    assert_eq!(cached(), (0, 0));
    upkeep::warm(engine.inner().clone()).await;
    let warm = cached();
    assert!(warm.0 > 0 && warm.1 > 0, "{warm:?}");
    assert_eq!(query(&engine).await.0, [("a".to_owned(), 1), ("b".to_owned(), 1)].into());
    assert_eq!(cached(), warm, "there was nothing left to read");
}

#[tokio::test]
async fn a_selector_looks_at_few_of_many_sets() {
    use catalog::{MatchOp, Matcher};
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path(), &bucket()).await;
    let mut encoder = engine.registry().encoder();
    let refs: Vec<u32> =
        (0..2000).map(|i| encoder.tags(&mut [("__name__", "m"), ("i", &i.to_string())], None).unwrap()).collect();
    let columns: Vec<ArrayRef> = vec![
        Arc::new(UInt32Array::from(refs)),
        Arc::new(TimestampMillisecondArray::from_iter_values([NOW; 2000]).with_data_type(time_type())),
        Arc::new(Float64Array::from_iter_values([1.0; 2000])),
    ];
    let rows = RecordBatch::try_new(SAMPLES.arrow().clone(), columns).unwrap();
    let batches = vec![Batch { table: SAMPLES.clone(), rows }];
    engine.write(Write { tags: encoder.finish(), batches, metadata: vec![] }).await.unwrap();
    let looked_at = async |op, value: &str, expected: usize| {
        let matchers = vec![Matcher::equal("__name__", "m"), Matcher::new("i", op, value).unwrap()];
        let selection = Selection { table: SAMPLES.clone(), matchers, start_ms: NOW, end_ms: NOW };
        let set = engine.select(&selection, &Stop::default()).await.unwrap();
        assert_eq!(set.series.len(), expected, "{op:?} {value}");
        set.candidates()
    };
    assert_eq!(looked_at(MatchOp::Eq, "7", 1).await, 2000);
    assert_eq!(looked_at(MatchOp::Eq, "7", 1).await, 1);
    engine.flush().await.unwrap();
    assert!(looked_at(MatchOp::Re, "7|8", 2).await >= 2000, "of the part");
    assert!(looked_at(MatchOp::Re, "7|8", 2).await <= 4);
    assert!(looked_at(MatchOp::Re, "19[0-4].", 50).await <= 100);
    assert!(looked_at(MatchOp::Ne, "7", 1999).await >= 2000);
}
