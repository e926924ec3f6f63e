//! Rounds of compaction that are short of memory, fail, or have more to look at than they may.

use catalog::FileSystem;
use catalog::files::DataFile;
use catalog::fs::{Call, Fault, Faults, Faulty};
use catalog::object::LocalStore;

use super::*;
use crate::compact::Round;

const DAY: i64 = 86_400_000;

/// Rows with values that don't compress, of as many series as there are names.
fn noise<'a>(names: &'a [String], times: std::ops::Range<i64>, state: &mut u64) -> Vec<(&'a str, i64, f64)> {
    let mut rows = Vec::new();
    for ts in times {
        for name in names {
            *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            rows.push((name.as_str(), ts, (*state >> 11) as f64 * 1e-7));
        }
    }
    rows
}

fn files(engine: &Engine) -> Vec<Arc<DataFile>> {
    engine.files().unwrap().into_iter().map(|(_, file)| file).collect()
}

/// Ids of files, and how many merges they are of.
fn runs(engine: &Engine) -> (Vec<i64>, usize) {
    let files = files(engine);
    let flushes: std::collections::BTreeSet<_> = files.iter().map(|f| (f.day, f.seq_min, f.seq_max)).collect();
    (files.iter().map(|f| f.id).collect(), flushes.len())
}

fn deletes(engine: &Engine) -> usize {
    engine.inner().version().table(SAMPLES.id).unwrap().deletes.len()
}

/// Of series by their name, at any time.
fn named(name: &str) -> Selection {
    let matchers = vec![Matcher::equal("__name__", name)];
    Selection { table: SAMPLES.clone(), matchers, start_ms: i64::MIN, end_ms: i64::MAX }
}

/// The names of all tag sets of samples.
async fn names(engine: &Engine) -> Vec<String> {
    let all = Selection { table: SAMPLES.clone(), matchers: vec![], start_ms: i64::MIN, end_ms: i64::MAX };
    let mut names = Vec::new();
    let see = |s: &Arc<Series>| {
        names.push(s.tags.metric().to_owned());
        true
    };
    engine.visit(&all, &Stop::default(), see).await.unwrap();
    names.sort();
    names
}

#[tokio::test]
async fn a_day_that_is_too_large_for_one_merge_stays_in_several_runs() {
    let (dir, store) = (tempfile::tempdir().unwrap(), bucket());
    let small = Settings { memory_limit: 1280 << 10, ..settings(dir.path()) };
    let engine = Engine::open(small, components(&store), Extensions::default()).await.unwrap();
    engine.inner().stopping.cancel();
    let series: Vec<String> = (0..100).map(|i| format!("m{i}")).collect();
    let (mut model, mut state) = (BTreeMap::new(), 1);
    // Half of the rows of each flush but the first overwrite older ones.
    let mut flush = async |engine: &Engine, from: i64, n: i64| {
        for part in 0..n / 30 {
            let first = NOW - 3 * DAY + from + 30 * part;
            let rows = noise(&series, first..first + 30, &mut state);
            engine.write(request(engine, &rows)).await.unwrap();
            model.extend(super::model(&rows));
        }
        engine.flush().await.unwrap();
        model.clone()
    };
    for i in 0..5 {
        flush(&engine, i * 150, 300).await;
    }
    let compact = async |engine: &Engine| {
        let ended = tokio::time::timeout(Duration::from_secs(120), engine.compact()).await;
        ended.expect("a round of compaction does not end").unwrap();
    };
    compact(&engine).await;
    let (ids, settled) = runs(&engine);
    assert!((2..5).contains(&settled) && ids.len() > settled, "{settled} runs in {} files", ids.len());
    compact(&engine).await;
    assert_eq!(runs(&engine), (ids.clone(), settled), "nothing is left to do");
    // Late rows are merged among themselves.
    for i in 0..2 {
        flush(&engine, i * 30, 30).await;
    }
    let mut expected = flush(&engine, 0, 30).await;
    assert_eq!(runs(&engine).1, settled + 3);
    compact(&engine).await;
    let late = runs(&engine);
    assert!(late.1 <= settled + 1, "{} runs", late.1);
    assert!(ids.iter().filter(|id| late.0.contains(id)).count() > 1, "what is too large is not written again");
    // Rows leave it all the same.
    engine.delete(vec![named("m7")]).await.unwrap();
    expected.retain(|(name, _), _| name != "m7");
    engine.fold_deletes().await.unwrap();
    assert_eq!((deletes(&engine), runs(&engine).1), (0, late.1));
    compact(&engine).await;
    let ids = runs(&engine).0;
    engine.shutdown(Duration::from_secs(10)).await.unwrap();
    drop(engine);

    // A start knows nothing of it, and with more memory there is one merge of all.
    let engine = open(dir.path(), &store).await;
    engine.inner().stopping.cancel();
    assert_eq!(runs(&engine).0, ids);
    let found = all(&engine).await;
    assert_eq!((found.len(), found.into_iter().collect::<BTreeMap<_, _>>()), (expected.len(), expected.clone()));
    compact(&engine).await;
    assert_eq!(runs(&engine).1, 1);
    assert!(files(&engine).iter().all(|f| f.level == 2), "it holds the whole day");
    assert_eq!(all(&engine).await.into_iter().collect::<BTreeMap<_, _>>(), expected);
}

#[tokio::test(start_paused = true)]
async fn a_long_round_deletes_what_its_merges_superseded() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Arc::new(ManualClock::new(NOW));
    let components = Components { clock: clock.clone(), ..components(&bucket()) };
    let own = Settings { own_threads: false, delete_grace: Duration::from_secs(30), ..settings(dir.path()) };
    let engine = Engine::open(own, components, Extensions::default()).await.unwrap();
    engine.inner().stopping.cancel();
    for i in 0..2 {
        engine.write(request(&engine, &[("a", NOW - 3 * DAY + i, 1.0)])).await.unwrap();
        engine.flush().await.unwrap();
    }
    let superseded = async || engine.inner().files.superseded().await.unwrap().len();
    let mut round = Round::new(engine.inner(), true);
    assert!(round.merge_files(round.scope()).await.unwrap());
    round.keep_up().await.unwrap();
    assert_eq!(superseded().await, 2);
    clock.set(NOW + 61_000);
    tokio::time::advance(Duration::from_secs(61)).await;
    round.keep_up().await.unwrap();
    assert_eq!(superseded().await, 0);
}

#[tokio::test]
async fn a_round_keeps_no_rows_in_memory_that_are_in_files() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path(), &bucket()).await;
    engine.inner().stopping.cancel();
    engine.write(request(&engine, &[("a", NOW, 1.0), ("b", NOW, 1.0)])).await.unwrap();
    engine.delete(vec![named("a")]).await.unwrap();
    engine.write(request(&engine, &[("c", NOW, 1.0)])).await.unwrap();
    let active = Arc::downgrade(&engine.inner().version().table(SAMPLES.id).unwrap().active);
    // It waits before its first file.
    let deleting = engine.inner().days.deleting.lock().await;
    let inner = engine.inner().clone();
    let folding = tokio::spawn(async move { crate::compact::fold_deletes(&inner).await });
    while engine.inner().days.compacting.try_lock().is_ok() {
        tokio::task::yield_now().await;
    }
    engine.flush().await.unwrap();
    assert!(!folding.is_finished());
    assert_eq!(active.strong_count(), 0);
    drop(deleting);
    folding.await.unwrap().unwrap();
    assert_eq!(query(&engine).await.0, [("b".to_owned(), 1), ("c".to_owned(), 1)].into());
}

#[tokio::test]
async fn tag_sets_of_deleted_rows_leave_after_a_round_that_failed() {
    let deleted = async |fault: Option<usize>| {
        let dir = tempfile::tempdir().unwrap();
        let faults = Faults::default();
        if let Some(call) = fault {
            faults.at(call, Fault::Io);
        }
        let fs: Arc<dyn FileSystem> = Arc::new(Faulty::new(Arc::new(Disk), faults.clone()));
        let store: Arc<dyn ObjectStore> = Arc::new(LocalStore::open(fs.clone(), &dir.path().join("objects")).unwrap());
        let own = Settings { own_threads: false, ..settings(dir.path()) };
        let engine = Engine::open(own, Components { fs, ..components(&store) }, Extensions::default()).await.unwrap();
        engine.inner().stopping.cancel();
        engine.write(request(&engine, &[("a", NOW, 1.0), ("b", NOW, 1.0)])).await.unwrap();
        engine.delete(vec![named("a")]).await.unwrap();
        let result = engine.fold_deletes().await;
        (dir, engine, faults, result)
    };
    let (_dir, engine, faults, result) = deleted(None).await;
    result.unwrap();
    assert_eq!(names(&engine).await, ["b"]);
    // What is written for the tag sets that are left.
    let of_part = |c: &Call| c.path.to_string_lossy().contains(catalog::tag_parts::FOLDER);
    let call = faults.calls().iter().rposition(of_part).unwrap();
    let (_dir, engine, _, result) = deleted(Some(call)).await;
    result.unwrap_err();
    assert_eq!((deletes(&engine), names(&engine).await), (0, vec!["a".to_owned(), "b".to_owned()]));
    crate::compact::due(engine.inner()).await.unwrap();
    assert_eq!(names(&engine).await, ["b"]);
    assert_eq!(query(&engine).await.0, [("b".to_owned(), 1)].into());
}

#[tokio::test]
async fn every_file_has_its_turn_while_deletes_keep_coming() {
    const FILES: i64 = 6;
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path(), &bucket()).await;
    engine.inner().stopping.cancel();
    let rows: Vec<_> =
        (0..FILES).flat_map(|day| (0..=day * 100).map(move |i| ("a", NOW - day * DAY + i, i as f64))).collect();
    engine.write(request(&engine, &rows)).await.unwrap();
    engine.flush().await.unwrap();
    assert_eq!(files(&engine).len() as i64, FILES);
    // None that takes a row away.
    engine.delete(vec![named("other"); 1000]).await.unwrap();
    for turn in 1..=FILES / 2 {
        assert_eq!(deletes(&engine) as i64, 1000 + turn - 1);
        let mut round = Round::new(engine.inner(), false);
        round.folds_max = 2;
        round.fold().await.unwrap();
        engine.delete(vec![named("other")]).await.unwrap();
    }
    assert!(deletes(&engine) < 1000, "{} deletes wait", deletes(&engine));
    assert_eq!(query(&engine).await.1, rows.len());
}
