//! Snapshots: what they see stays what it was, whatever happens meanwhile, or is refused.

use catalog::{MatchOp, Matcher};
use datafusion::physical_plan::{ExecutionPlan, execute_stream};

use super::*;
use crate::{SeriesScanExec, TooOld};

fn everything() -> Selection {
    Selection { table: SAMPLES.clone(), matchers: vec![], start_ms: i64::MIN, end_ms: i64::MAX }
}

type Seen = BTreeMap<(String, i64), u64>;

/// The rows that a scan gives.
async fn scanned(engine: &Engine, set: Arc<SeriesSet>) -> datafusion::error::Result<Seen> {
    let scan: Arc<dyn ExecutionPlan> = Arc::new(SeriesScanExec::new(set.clone(), vec![1, 2]));
    let stream = execute_stream(scan, engine.session().task_ctx())?;
    let batches: Vec<RecordBatch> = stream.try_collect().await?;
    let mut seen = Seen::new();
    for batch in batches {
        let series = batch.column(0).as_primitive::<UInt32Type>();
        let ts = batch.column(1).as_primitive::<TimestampMillisecondType>();
        let values = batch.column(2).as_primitive::<Float64Type>();
        for i in 0..batch.num_rows() {
            let name = set.series[series.value(i) as usize].tags.metric().to_owned();
            let twice = seen.insert((name, ts.value(i)), values.value(i).to_bits());
            assert_eq!(twice, None, "a row is there once");
        }
    }
    Ok(seen)
}

async fn rows_of(engine: &Engine) -> Result<Seen> {
    let set = engine.select(&everything(), &Stop::default()).await?;
    scanned(engine, set).await.map_err(crate::error_of)
}

/// The names of all metrics.
async fn names(engine: &Engine) -> Vec<String> {
    let mut names = Vec::new();
    let visit = |series: &Arc<Series>| {
        names.push(series.tags.metric().to_owned());
        true
    };
    engine.visit(&everything(), &Stop::default(), visit).await.unwrap();
    names.sort();
    names
}

fn too_old<T: std::fmt::Debug>(result: Result<T>) -> bool {
    TooOld::is(&result.expect_err("a snapshot that has ended is not read"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path(), &bucket()).await;
    let filed = [("a", NOW - 9, 1.0), ("b", NOW - 9, 2.0), ("b", NOW - 86_400_000, 2.5)];
    engine.write(request(&engine, &filed)).await.unwrap();
    engine.flush().await.unwrap();
    let in_memory = [("a", NOW, 3.0), ("a", NOW + 1, 4.0), ("c", NOW, 5.0), ("b", NOW - 9, 6.0)];
    engine.write(request(&engine, &in_memory)).await.unwrap();
    let before = rows_of(&engine).await.unwrap();
    assert_eq!(before.len(), 6);
    let snapshot = engine.snapshot().await;
    let later = engine.snapshot();
    drop(later.await);
    let check = async |step: &str| {
        assert_eq!(rows_of(&snapshot).await.unwrap(), before, "{step}");
        assert_eq!(names(&snapshot).await, ["a", "b", "c"], "{step}");
    };
    check("at once").await;
    let more = [("a", NOW, 30.0), ("a", NOW + 2, 7.0), ("b", NOW - 9, 60.0), ("d", NOW, 8.0)];
    engine.write(request(&engine, &more)).await.unwrap();
    assert_eq!(names(&engine).await, ["a", "b", "c", "d"]);
    check("after rows").await;
    for k in 0..100 {
        engine.write(request(&engine, &[("a", NOW + 3 + k % 50, k as f64), ("c", NOW, k as f64)])).await.unwrap();
    }
    check("after blocks were sealed").await;
    engine.flush().await.unwrap();
    check("after a flush").await;
    engine.write(request(&engine, &[("a", NOW - 9, 70.0), ("e", NOW, 9.0)])).await.unwrap();
    engine.flush().await.unwrap();
    engine.compact().await.unwrap();
    check("after a compaction").await;
    let b = Matcher::new("__name__", MatchOp::Eq, "b").unwrap();
    engine.delete(vec![Selection { matchers: vec![b], ..everything() }]).await.unwrap();
    check("after a delete").await;
    engine.fold_deletes().await.unwrap();
    engine.compact().await.unwrap();
    check("after the delete was folded in").await;
    assert_eq!(names(&engine).await, ["a", "c", "d", "e"]);
    let now = rows_of(&engine).await.unwrap();
    assert!(now.len() > before.len() && !now.keys().any(|k| k.0 == "b"), "{now:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_sees_requests_whole() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path(), &bucket()).await;
    let names: Vec<String> = (0..600).map(|i| format!("s{i}")).collect();
    let writer = tokio::spawn({
        let (engine, names) = (engine.clone(), names.clone());
        async move {
            for k in 0..120 {
                let rows: Vec<(&str, i64, f64)> = names.iter().map(|n| (n.as_str(), NOW + k, k as f64)).collect();
                engine.write(request(&engine, &rows)).await.unwrap();
                if k % 40 == 39 {
                    engine.flush().await.unwrap();
                }
            }
        }
    });
    let mut last = 0;
    while last < 120 * names.len() {
        let done = writer.is_finished();
        let snapshot = engine.snapshot().await;
        let rows = rows_of(&snapshot).await.unwrap().len();
        assert!(rows >= last && rows.is_multiple_of(names.len()), "{rows} rows after {last}");
        assert_eq!(rows_of(&snapshot).await.unwrap().len(), rows);
        assert!(!done || rows == 120 * names.len(), "all that was acknowledged is there");
        last = rows;
    }
    writer.await.unwrap();
}

#[tokio::test]
async fn a_snapshot_whose_files_are_gone_is_too_old() {
    let dir = tempfile::tempdir().unwrap();
    let (engine, clock) = open_with(dir.path(), |s| s.delete_grace = Duration::ZERO).await;
    for k in 0..2 {
        engine.write(request(&engine, &[("a", NOW + k, 1.0)])).await.unwrap();
        engine.flush().await.unwrap();
    }
    let snapshot = engine.snapshot().await;
    let other = engine.snapshot().await;
    let begun = snapshot.select(&everything(), &Stop::default()).await.unwrap();
    engine.compact().await.unwrap();
    assert_eq!(rows_of(&snapshot).await.unwrap().len(), 2, "files that were replaced are still there");
    clock.set(NOW + 1000);
    engine.compact().await.unwrap();
    assert!(too_old(rows_of(&snapshot).await) && too_old(other.check_snapshot()) && too_old(snapshot.files()));
    assert!(too_old(scanned(&snapshot, begun).await.map_err(crate::error_of)), "a scan that had begun says so");
    assert_eq!(rows_of(&engine).await.unwrap().len(), 2);
    assert_eq!(rows_of(&engine.snapshot().await).await.unwrap().len(), 2);
}

#[tokio::test]
async fn snapshots_hold_little_memory_and_tag_sets_as_long() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open_with(dir.path(), |s| s.memory_limit = 64 << 20).await.0;
    let names: Vec<String> = (0..5000).map(|i| format!("series_{i}")).collect();
    let write = async |k: i64| {
        let rows: Vec<(&str, i64, f64)> = names.iter().map(|n| (n.as_str(), NOW + k, (k as f64).sin() / 3.0)).collect();
        engine.write(request(&engine, &rows)).await.unwrap();
    };
    write(0).await;
    let first = engine.snapshot().await;
    write(1).await;
    engine.flush().await.unwrap();
    // Idle for long, but for what is in the snapshot.
    committer::retire(engine.inner(), committer::second(NOW) + 7201).await;
    assert_eq!((engine.registry().len(), rows_of(&first).await.unwrap().len()), (5000, 5000));
    let inner = engine.inner();
    inner.snapshots.relieve(inner);
    let held = inner.memory.held(Kind::Snapshots);
    assert!(held > 0 && held < inner.memory.limit() / 8, "{held}");
    let mut snapshots = vec![first];
    while snapshots.iter().all(|s| s.check_snapshot().is_ok()) {
        for k in 0..20 {
            write(2 + k + 20 * snapshots.len() as i64).await;
        }
        snapshots.push(engine.snapshot().await);
        engine.flush().await.unwrap();
        inner.snapshots.relieve(inner);
    }
    let ended: Vec<bool> = snapshots.iter().map(|s| s.check_snapshot().is_err()).collect();
    assert!(ended[0] && !ended[ended.len() - 1] && ended.is_sorted_by(|a, b| a >= b), "the oldest end: {ended:?}");
    assert!(too_old(rows_of(&snapshots[0]).await));
    assert!(inner.memory.held(Kind::Snapshots) <= inner.memory.limit() / 8);
    drop(snapshots);
    inner.snapshots.relieve(inner);
    assert_eq!(inner.memory.held(Kind::Snapshots), 0);
    committer::retire(inner, committer::second(NOW) + 7201).await;
    assert_eq!(engine.registry().len(), 0);
}
