//! The same rows give the same answers wherever they are: in memory, flushed, in many files, compacted, after a restart.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use arrow::array::{ArrayRef, AsArray, Float64Array, RecordBatch, StringArray, TimestampMillisecondArray, UInt32Array};
use arrow::datatypes::{Float64Type, TimestampMillisecondType, UInt32Type};
use async_trait::async_trait;
use catalog::tables::{EXEMPLARS, SAMPLES, time_type};
use catalog::{ManualClock, MatchOp, Matcher, TableSchema};
use datafusion::physical_plan::ExecutionPlan;
use futures::TryStreamExt;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, Result as StoreResult,
};
use proptest::prelude::*;

use crate::{
    Batch, Components, Engine, Extensions, Retention, RetentionRule, Selection, SeriesScanExec, SeriesSet, Settings,
    Stop, Telemetry, Write,
};

const NOON: i64 = 1_700_049_600_000;
const HOUR: i64 = 3_600_000;
const STALE: u64 = 0x7ff0_0000_0000_0002;

/// (series number, time, bits of the value)
type Row = (usize, i64, u64);
/// (labels, time) → bits of the value.
type Rows = BTreeMap<(String, i64), u64>;

struct Fixture {
    engine: Engine,
    retention: Retention,
    dir: tempfile::TempDir,
    store: Arc<InMemory>,
    clock: Arc<ManualClock>,
}

impl Fixture {
    async fn new() -> Self {
        Self::keeping(Retention::default()).await
    }

    async fn keeping(retention: Retention) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(InMemory::new());
        let clock = Arc::new(ManualClock::new(NOON + 30 * HOUR));
        let engine = Self::open(&dir, store.clone(), &clock, &retention).await;
        Self { engine, retention, dir, store, clock }
    }

    async fn open(
        dir: &tempfile::TempDir,
        store: Arc<dyn ObjectStore>,
        clock: &Arc<ManualClock>,
        retention: &Retention,
    ) -> Engine {
        let settings = Settings {
            data_dir: dir.path().to_owned(),
            retention: retention.clone(),
            // Only when a step says so.
            flush_interval: Duration::from_secs(1 << 40),
            delete_grace: Duration::ZERO,
            ..Settings::default()
        };
        let components = Components {
            store,
            fs: Arc::new(catalog::fs::Disk),
            clock: clock.clone(),
            entropy: Arc::new(catalog::SeededEntropy::new(1)),
            telemetry: Arc::new(Telemetry::default()),
        };
        Engine::open(settings, components, Extensions::default()).await.unwrap()
    }

    async fn restart(&mut self) {
        self.engine.shutdown(Duration::ZERO).await.unwrap();
        self.reopen().await;
    }

    async fn reopen(&mut self) {
        self.reopen_over(self.store.clone()).await;
    }

    async fn reopen_over(&mut self, store: Arc<dyn ObjectStore>) {
        self.engine = Self::open(&self.dir, store, &self.clock, &self.retention).await;
    }

    /// Writes as clients do: a set that has left the memory between the looking up and the writing is looked up again.
    async fn write(&self, rows: &[Row]) {
        while let Err(e) = self.engine.write(self.request(rows)).await {
            assert!(e.message().contains("left the memory"), "{e}");
        }
    }

    fn request(&self, rows: &[Row]) -> Write {
        let mut encoder = self.engine.registry().encoder();
        let mut refs = Vec::new();
        for (series, ..) in rows {
            let (name, job, n) = (format!("m{}", series % 3), format!("j{}", series % 2), series.to_string());
            refs.push(encoder.tags(&mut [("__name__", &name), ("job", &job), ("n", &n)], None).unwrap());
        }
        let times = |rows: &[Row]| -> ArrayRef {
            let ts = TimestampMillisecondArray::from(rows.iter().map(|r| r.1).collect::<Vec<_>>());
            Arc::new(ts.with_data_type(time_type()))
        };
        let values: ArrayRef = Arc::new(Float64Array::from_iter_values(rows.iter().map(|r| f64::from_bits(r.2))));
        let labels: ArrayRef =
            Arc::new(StringArray::from_iter_values(rows.iter().map(|r| format!("{{\"v\":\"{:x}\"}}", r.2))));
        let series: ArrayRef = Arc::new(UInt32Array::from(refs));
        let batch = |table: &Arc<TableSchema>, columns| Batch {
            table: table.clone(),
            rows: RecordBatch::try_new(table.arrow().clone(), columns).unwrap(),
        };
        let batches = vec![
            batch(&SAMPLES, vec![series.clone(), times(rows), values.clone()]),
            batch(&EXEMPLARS, vec![series, times(rows), values, labels]),
        ];
        Write { tags: encoder.finish(), batches, metadata: vec![] }
    }

    async fn select(
        &self,
        table: &Arc<TableSchema>,
        matchers: Vec<Matcher>,
        start_ms: i64,
        end_ms: i64,
    ) -> Arc<SeriesSet> {
        let selection = Selection { table: table.clone(), matchers, start_ms, end_ms };
        self.engine.select(&selection, &Stop::default()).await.unwrap()
    }

    async fn rows(&self, table: &Arc<TableSchema>, matchers: Vec<Matcher>, start_ms: i64, end_ms: i64) -> Rows {
        let set = self.select(table, matchers, start_ms, end_ms).await;
        scan(&self.engine, set).await
    }

    async fn check(&self, model: &BTreeMap<(usize, i64), u64>) {
        self.check_rows(model, |_, _, _| true).await;
        let mut known: Vec<usize> = model.keys().map(|k| k.0).collect();
        known.dedup();
        assert_eq!(self.visited().await, known);
    }

    /// The series that are known of samples.
    async fn visited(&self) -> Vec<usize> {
        let mut visited = Vec::new();
        let selection = Selection { table: SAMPLES.clone(), matchers: vec![], start_ms: i64::MIN, end_ms: i64::MAX };
        let visit = |s: &Arc<catalog::Series>| {
            visited.push(s.tags.get("n").unwrap().parse::<usize>().unwrap());
            true
        };
        self.engine.visit(&selection, &Stop::default(), visit).await.unwrap();
        visited.sort_unstable();
        visited
    }

    /// Compares with those rows of the model that `kept` says are still there, by table.
    async fn check_rows(&self, model: &BTreeMap<(usize, i64), u64>, kept: impl Fn(&TableSchema, usize, i64) -> bool) {
        let text = |s: usize| {
            format!("{:?}", [("__name__", format!("m{}", s % 3)), ("job", format!("j{}", s % 2)), ("n", s.to_string())])
        };
        let of = |table: &TableSchema, keep: &dyn Fn(usize, i64) -> bool| -> Rows {
            let rows = model.iter().filter(|((s, t), _)| kept(table, *s, *t) && keep(*s, *t));
            rows.map(|((s, t), v)| ((text(*s), *t), *v)).collect()
        };
        let expected = |keep: &dyn Fn(usize, i64) -> bool| of(&SAMPLES, keep);
        let all = (i64::MIN, i64::MAX);
        let name = |op, value: &str| Matcher::new("__name__", op, value).unwrap();
        assert_eq!(self.rows(&SAMPLES, vec![], all.0, all.1).await, expected(&|_, _| true));
        assert_eq!(self.rows(&EXEMPLARS, vec![], all.0, all.1).await, of(&EXEMPLARS, &|_, _| true));
        let m1 = vec![name(MatchOp::Eq, "m1")];
        let range = (NOON - 2 * HOUR, NOON + 13 * HOUR);
        assert_eq!(
            self.rows(&SAMPLES, m1, range.0, range.1).await,
            expected(&|s, t| s % 3 == 1 && (range.0..=range.1).contains(&t))
        );
        let some = vec![name(MatchOp::Re, "m[02]"), Matcher::new("n", MatchOp::Nre, "[0-4]").unwrap()];
        assert_eq!(
            self.rows(&SAMPLES, some, NOON, all.1).await,
            expected(&|s, t| s % 3 != 1 && !(0..=4).contains(&s) && t >= NOON)
        );
    }
}

async fn scan(engine: &Engine, set: Arc<SeriesSet>) -> Rows {
    let columns: Vec<usize> = (1..set.table.columns.len()).collect();
    let exec = SeriesScanExec::new(set.clone(), columns);
    let mut out = Rows::new();
    let mut last = None;
    for partition in 0..exec.properties().output_partitioning().partition_count() {
        let stream = exec.execute(partition, engine.session().task_ctx()).unwrap();
        for batch in stream.try_collect::<Vec<_>>().await.unwrap() {
            assert_eq!(batch.schema(), exec.schema());
            let series = batch.column(0).as_primitive::<UInt32Type>();
            let ts = batch.column(1).as_primitive::<TimestampMillisecondType>();
            let values = batch.column(2).as_primitive::<Float64Type>();
            for i in 0..batch.num_rows() {
                let key = (series.value(i), ts.value(i));
                assert!(last < Some(key), "rows are sorted and unique");
                last = Some(key);
                let bits = values.value(i).to_bits();
                if let Some(labels) = batch.columns().get(3) {
                    assert_eq!(labels.as_string::<i32>().value(i), format!("{{\"v\":\"{bits:x}\"}}"));
                }
                let tags: Vec<(&str, &str)> = set.series[key.0 as usize].tags.iter().collect();
                out.insert((format!("{tags:?}"), key.1), bits);
            }
        }
    }
    out
}

#[derive(Debug, Clone)]
enum Step {
    Write(Vec<Row>),
    Flush,
    Compact,
    Restart,
}

fn rows() -> impl Strategy<Value = Vec<Row>> {
    let value = prop_oneof![
        6 => (0u32..5000).prop_map(|v| (f64::from(v) / 8.0).to_bits()),
        2 => any::<u64>(),
        1 => prop::sample::select(vec![STALE, (-0.0f64).to_bits(), f64::INFINITY.to_bits(), f64::NAN.to_bits(), 0xfff8_0000_0000_1234]),
    ];
    let time = prop_oneof![4 => 0i64..200, 1 => -200i64..200].prop_map(|minutes| NOON + minutes * 600_000);
    prop::collection::vec((0usize..9, time, value), 1..60)
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        5 => rows().prop_map(Step::Write),
        3 => Just(Step::Flush),
        1 => Just(Step::Compact),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..14)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn rows_are_the_same_everywhere(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut fixture = Fixture::new().await;
            let mut model = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Write(rows) => {
                        fixture.write(&rows).await;
                        model.extend(rows.iter().map(|(s, t, v)| ((*s, *t), *v)));
                    }
                    Step::Flush => fixture.engine.flush().await.unwrap(),
                    Step::Compact => fixture.engine.compact().await.unwrap(),
                    Step::Restart => fixture.restart().await,
                }
                fixture.check(&model).await;
            }
            fixture.engine.flush().await.unwrap();
            fixture.check(&model).await;
            fixture.engine.compact().await.unwrap();
            fixture.check(&model).await;
            fixture.engine.shutdown(Duration::ZERO).await.unwrap();
        });
    }
}

/// Whose rows a delete or a rule of retention means.
#[derive(Debug, Clone, Copy)]
enum Who {
    Number(usize),
    Job(usize),
    Metric(usize),
    /// Numbers from 0 to 4.
    Few,
    /// Numbers of one digit.
    Most,
}

impl Who {
    fn matchers(self) -> Vec<Matcher> {
        let matcher = |name: &str, op, value: String| Matcher::new(name, op, value).unwrap();
        match self {
            Self::Number(n) => vec![matcher("n", MatchOp::Eq, n.to_string())],
            Self::Job(j) => vec![matcher("job", MatchOp::Eq, format!("j{j}")), matcher("n", MatchOp::Re, ".".into())],
            Self::Metric(m) => {
                vec![matcher("__name__", MatchOp::Eq, format!("m{m}")), matcher("n", MatchOp::Nre, "..+".into())]
            }
            Self::Few => vec![matcher("n", MatchOp::Re, "[0-4]".into()), matcher("absent", MatchOp::Eq, String::new())],
            Self::Most => vec![matcher("__name__", MatchOp::Re, "m.*".into()), matcher("n", MatchOp::Re, ".".into())],
        }
    }

    fn means(self, series: usize) -> bool {
        series < 10
            && match self {
                Self::Number(n) => series == n,
                Self::Job(j) => series % 2 == j,
                Self::Metric(m) => series % 3 == m,
                Self::Few => series < 5,
                Self::Most => true,
            }
    }
}

fn who() -> impl Strategy<Value = Who> {
    prop_oneof![
        3 => (0usize..9).prop_map(Who::Number),
        1 => (0usize..2).prop_map(Who::Job),
        1 => (0usize..3).prop_map(Who::Metric),
        1 => Just(Who::Few),
        1 => Just(Who::Most),
    ]
}

#[derive(Debug, Clone)]
enum Life {
    Write(Vec<Row>),
    Flush,
    Compact,
    Restart,
    /// A restart without a clean stop.
    Crash,
    /// Of samples and exemplars, between two minutes since noon.
    Delete(Who, i64, i64),
    Fold,
    /// Some hours go by.
    Later(i64),
}

fn lives() -> impl Strategy<Value = Vec<Life>> {
    let range = prop_oneof![4 => (-200i64..200, 0i64..60), 1 => Just((-10_000, 20_000))];
    let life = prop_oneof![
        6 => rows().prop_map(Life::Write),
        4 => Just(Life::Flush),
        2 => Just(Life::Compact),
        1 => Just(Life::Restart),
        1 => Just(Life::Crash),
        4 => (who(), range).prop_map(|(who, (from, length))| Life::Delete(who, from, from + length)),
        1 => Just(Life::Fold),
        1 => (1i64..9).prop_map(Life::Later),
    ];
    prop::collection::vec(life, 1..18)
}

/// A series that no delete means; its rows show how late it is.
const WITNESS: usize = 100;

fn hours(n: u64) -> Option<Duration> {
    Some(Duration::from_secs(n * 3600))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]
    #[test]
    fn what_is_deleted_or_old_is_gone_everywhere(lives in lives(), old in any::<bool>(), first in who(), second in who()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let rule = |table: &Arc<TableSchema>, who: Option<Who>, age| RetentionRule {
                table_id: table.id,
                matchers: who.map_or(vec![], Who::matchers),
                age,
            };
            let rules = vec![rule(&SAMPLES, Some(first), None), rule(&SAMPLES, Some(second), hours(20)), rule(&EXEMPLARS, None, hours(30))];
            let retention = if old { Retention { age: hours(26), rules, bytes: None } } else { Retention::default() };
            let age = |table: &TableSchema, s: usize| match table.id {
                _ if !old => None,
                id if id == EXEMPLARS.id => Some(30),
                _ if first.means(s) => None,
                _ if second.means(s) => Some(20),
                _ => Some(26),
            };
            let mut fixture = Fixture::keeping(retention).await;
            let mut now = NOON + 30 * HOUR;
            let mut model = BTreeMap::new();
            let witness = |model: &mut BTreeMap<_, _>, now| {
                model.insert((WITNESS, now), 1);
                vec![(WITNESS, now, 1)]
            };
            // Rows reach further ahead than the clock, but not so far that it is doubted.
            let newest = |rows: &[Row]| rows.iter().map(|r| r.1).max().unwrap_or(0);
            fixture.write(&witness(&mut model, now)).await;
            fixture.restart().await;
            for life in lives {
                match life {
                    Life::Write(rows) => {
                        let rows: Vec<Row> = rows.into_iter().filter(|r| r.1 <= now).collect();
                        prop_assert!(newest(&rows) <= now);
                        if !rows.is_empty() {
                            fixture.write(&rows).await;
                        }
                        model.extend(rows.iter().map(|(s, t, v)| ((*s, *t), *v)));
                    }
                    Life::Flush => fixture.engine.flush().await.unwrap(),
                    Life::Compact => fixture.engine.compact().await.unwrap(),
                    Life::Restart => fixture.restart().await,
                    Life::Crash => fixture.reopen().await,
                    Life::Delete(who, from, to) => {
                        let (start_ms, end_ms) = (NOON + from * 600_000, NOON + to * 600_000);
                        let selection = |table: &Arc<TableSchema>| Selection {
                            table: table.clone(), matchers: who.matchers(), start_ms, end_ms,
                        };
                        fixture.engine.delete(vec![selection(&SAMPLES), selection(&EXEMPLARS)]).await.unwrap();
                        model.retain(|(s, t), _| !(who.means(*s) && (start_ms..=end_ms).contains(t)));
                    }
                    Life::Fold => fixture.engine.fold_deletes().await.unwrap(),
                    Life::Later(hours) => {
                        now += hours * HOUR;
                        fixture.clock.set(now);
                        fixture.write(&witness(&mut model, now)).await;
                        fixture.restart().await;
                    }
                }
                let kept = |table: &TableSchema, s: usize, t: i64| age(table, s).is_none_or(|h| t >= now - h * HOUR);
                fixture.check_rows(&model, kept).await;
            }
            fixture.engine.flush().await.unwrap();
            fixture.engine.compact().await.unwrap();
            let kept = |table: &TableSchema, s: usize, t: i64| age(table, s).is_none_or(|h| t >= now - h * HOUR);
            fixture.check_rows(&model, kept).await;
            // Nothing is in memory any more, and what has no row is not known.
            fixture.restart().await;
            fixture.check_rows(&model, kept).await;
            if !old {
                fixture.check(&model).await;
            }
            Ok(())
        })?;
    }
}

#[test]
fn backfill_over_years_is_cut_by_day() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let fixture = Fixture::new().await;
        let mut model = BTreeMap::new();
        // 70 days with rows, some far apart, two of them at the ends of time.
        let mut times: Vec<i64> = (0..68).map(|i| NOON - i * i * 24 * HOUR).collect();
        times.extend([0, NOON + 86_400_000]);
        for (i, t) in times.iter().enumerate() {
            let rows: Vec<Row> = (0..3).map(|s| (s + i % 4, t + s as i64 * 1000, (i as f64).to_bits())).collect();
            fixture.write(&rows).await;
            model.extend(rows.iter().map(|(s, t, v)| ((*s, *t), *v)));
        }
        fixture.check(&model).await;
        fixture.engine.flush().await.unwrap();
        fixture.check(&model).await;
        fixture.write(&[(0, 5, 7), (3, NOON - 24 * HOUR, 9)]).await;
        model.extend([((0, 5), 7), ((3, NOON - 24 * HOUR), 9)]);
        fixture.engine.flush().await.unwrap();
        fixture.engine.compact().await.unwrap();
        fixture.check(&model).await;
    });
}

#[test]
fn a_set_can_be_restricted_and_explained() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let fixture = Fixture::new().await;
        let rows: Vec<Row> = (0..300).map(|i| (i % 6, NOON + i as i64, (i as f64).to_bits())).collect();
        fixture.write(&rows[..200]).await;
        fixture.engine.flush().await.unwrap();
        fixture.write(&rows[200..]).await;
        let set =
            fixture.select(&SAMPLES, vec![Matcher::new("job", MatchOp::Eq, "j0").unwrap()], NOON, NOON + 299).await;
        assert_eq!((set.series.len(), set.codes().len()), (3, 3));
        let one = Arc::new(set.restrict(|s| s.tags.get("n") == Some("2")));
        assert_eq!(scan(&fixture.engine, one.clone()).await.len(), 50);
        let exec = SeriesScanExec::new(one.clone(), vec![2]);
        let text = datafusion::physical_plan::displayable(&exec).one_line().to_string();
        assert!(
            text.starts_with("SeriesScanExec: table=samples, codes=1 of 12, memtables=1, files=1, time=["),
            "{text}"
        );
        // Without the time column, which the merge needs all the same.
        let batches: Vec<RecordBatch> =
            exec.execute(0, fixture.engine.session().task_ctx()).unwrap().try_collect().await.unwrap();
        assert_eq!(batches.iter().map(RecordBatch::num_rows).sum::<usize>(), 50);
        assert!(batches.iter().all(|b| b.schema() == exec.schema()));
        let none = Arc::new(set.restrict(|_| false));
        assert!(scan(&fixture.engine, none).await.is_empty());
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deletes_hold_beside_flushes_and_merges() {
    let fixture = Arc::new(Fixture::new().await);
    let workers = (0..3).map(|series| {
        let fixture = fixture.clone();
        tokio::spawn(async move {
            let who = Who::Number(series);
            let selection = |table: &Arc<TableSchema>, matchers| Selection {
                table: table.clone(),
                matchers,
                start_ms: NOON - 24 * HOUR,
                end_ms: NOON + 24 * HOUR,
            };
            let mut last = vec![];
            for round in 0..12u64 {
                let rows: Vec<Row> = (0..20)
                    .map(|i| (series, NOON + (i % 2 - 1) * 24 * HOUR + i * 1000 * (series as i64 + 1), round))
                    .collect();
                fixture.write(&rows).await;
                let both = [&SAMPLES, &EXEMPLARS].map(|table| selection(table, who.matchers()));
                fixture.engine.delete(both.to_vec()).await.unwrap();
                let left = fixture.rows(&SAMPLES, who.matchers(), i64::MIN, i64::MAX).await;
                assert_eq!(left, Rows::new(), "after the delete of round {round}");
                last = rows[..round as usize].to_vec();
                fixture.write(&last).await;
                let left = fixture.rows(&SAMPLES, who.matchers(), i64::MIN, i64::MAX).await;
                assert_eq!(left.len(), last.len(), "after the write of round {round}");
            }
            last
        })
    });
    let workers: Vec<_> = workers.collect();
    while !workers.iter().all(tokio::task::JoinHandle::is_finished) {
        fixture.engine.flush().await.unwrap();
        fixture.engine.compact().await.unwrap();
    }
    let mut model = BTreeMap::new();
    for worker in workers {
        model.extend(worker.await.unwrap().iter().map(|(s, t, v)| ((*s, *t), *v)));
    }
    fixture.check_rows(&model, |_, _, _| true).await;
    fixture.engine.flush().await.unwrap();
    fixture.engine.compact().await.unwrap();
    fixture.check(&model).await;
}

#[test]
fn the_oldest_days_go_when_there_is_too_much() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        for (bytes, days) in [(u64::MAX, 4), (1, 1)] {
            let fixture = Fixture::keeping(Retention { bytes: Some(bytes), ..Retention::default() }).await;
            let rows: Vec<Row> = (0..40).map(|i| (i % 3, NOON - (i as i64 % 4) * 24 * HOUR + i as i64, 7)).collect();
            let mut model: BTreeMap<(usize, i64), u64> = rows.iter().map(|(s, t, v)| ((*s, *t), *v)).collect();
            fixture.write(&rows).await;
            fixture.engine.flush().await.unwrap();
            fixture.check(&model).await;
            fixture.engine.compact().await.unwrap();
            model.retain(|(_, t), _| *t > NOON - days * 24 * HOUR + HOUR);
            fixture.check(&model).await;
        }
    });
}

#[test]
fn a_clock_that_is_set_takes_nothing() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        const NEW_YEAR_2100: i64 = 4_102_444_800_000;
        for clock in [NEW_YEAR_2100, 0, NOON + 29 * HOUR, NOON + 32 * HOUR] {
            let mut fixture = Fixture::keeping(Retention { age: hours(26), ..Retention::default() }).await;
            // The oldest have half an hour to live.
            let rows: Vec<Row> = (0..40).map(|i| (i % 3, NOON + 30 * HOUR - i as i64 * 39 * 60_000, 7)).collect();
            let model: BTreeMap<(usize, i64), u64> = rows.iter().map(|(s, t, v)| ((*s, *t), *v)).collect();
            fixture.write(&rows).await;
            fixture.engine.flush().await.unwrap();
            fixture.clock.set(clock);
            fixture.engine.compact().await.unwrap();
            fixture.check(&model).await;
            fixture.restart().await;
            fixture.engine.compact().await.unwrap();
            fixture.check(&model).await;
        }
    });
}

/// A bucket whose puts never end once some were made: where a process stands when it is killed.
#[derive(Debug)]
struct Stuck {
    store: Arc<InMemory>,
    left: AtomicUsize,
    reached: tokio::sync::Notify,
}

impl std::fmt::Display for Stuck {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stuck({})", self.store)
    }
}

#[async_trait]
impl ObjectStore for Stuck {
    async fn put_opts(&self, to: &Path, payload: PutPayload, options: PutOptions) -> StoreResult<PutResult> {
        if self.left.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)).is_err() {
            self.reached.notify_one();
            std::future::pending::<()>().await;
        }
        self.store.put_opts(to, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        to: &Path,
        options: PutMultipartOptions,
    ) -> StoreResult<Box<dyn MultipartUpload>> {
        self.store.put_multipart_opts(to, options).await
    }

    async fn get_opts(&self, from: &Path, options: GetOptions) -> StoreResult<GetResult> {
        self.store.get_opts(from, options).await
    }

    fn delete_stream(&self, paths: BoxStream<'static, StoreResult<Path>>) -> BoxStream<'static, StoreResult<Path>> {
        self.store.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, StoreResult<ObjectMeta>> {
        self.store.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> StoreResult<ListResult> {
        self.store.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> StoreResult<()> {
        self.store.copy_opts(from, to, options).await
    }
}

/// Objects of tables and tag sets that no catalog entry names.
async fn orphans(fixture: &Fixture) -> usize {
    let objects: Vec<ObjectMeta> = fixture.store.list(None).try_collect().await.unwrap();
    let version = fixture.select(&SAMPLES, vec![], 0, 0).await.version.clone();
    let files = version.tables.iter().flat_map(|t| t.files.iter().map(|f| f.path.clone()));
    let named: Vec<String> = files.chain(version.parts.iter().map(|p| p.path.clone())).collect();
    let unnamed = |o: &&ObjectMeta| {
        let path = o.location.as_ref();
        path.ends_with(".parquet") && !named.iter().any(|n| path.ends_with(n.as_str()))
    };
    objects.iter().filter(unnamed).count()
}

#[test]
fn a_kill_between_object_and_commit_loses_and_leaves_nothing() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut left_behind = 0;
        for puts in 0..10 {
            let mut fixture = Fixture::new().await;
            let rows: Vec<Row> =
                (0..40).map(|i| (i % 4, NOON - (i as i64 % 2) * 24 * HOUR + i as i64, i as u64)).collect();
            let model: BTreeMap<(usize, i64), u64> = rows.iter().map(|(s, t, v)| ((*s, *t), *v)).collect();
            fixture.write(&rows[..20]).await;
            fixture.engine.flush().await.unwrap();
            fixture.write(&rows[20..]).await;
            fixture.engine.shutdown(Duration::ZERO).await.unwrap();
            // A flush that is killed, and a merge.
            let (left, reached) = (AtomicUsize::new(usize::MAX), tokio::sync::Notify::new());
            let stuck = Arc::new(Stuck { store: fixture.store.clone(), left, reached });
            fixture.reopen_over(stuck.clone()).await;
            stuck.left.store(puts, SeqCst);
            let work = async {
                fixture.engine.flush().await.unwrap();
                fixture.engine.compact().await.unwrap();
            };
            tokio::select! {
                () = work => {}
                () = stuck.reached.notified() => {}
            }
            fixture.reopen().await;
            left_behind += orphans(&fixture).await;
            fixture.check(&model).await;
            // The first round sees them, the second deletes them. What was superseded goes by the clock.
            for round in 0..3 {
                fixture.clock.set(NOON + (31 + round) * HOUR);
                fixture.engine.compact().await.unwrap();
            }
            assert_eq!(orphans(&fixture).await, 0, "after {puts} puts");
            fixture.check(&model).await;
        }
        assert!(left_behind > 0);
    });
}

#[tokio::test]
async fn sets_of_two_tables_are_read_together() {
    let fixture = Fixture::new().await;
    let row = |series: usize| (series, NOON + series as i64, 1.0f64.to_bits());
    fixture.write(&[row(1), row(2)]).await;
    // A metric of samples only.
    let mut encoder = fixture.engine.registry().encoder();
    let tags = encoder.tags(&mut [("__name__", "only"), ("n", "9")], None).unwrap();
    let columns: Vec<ArrayRef> = vec![
        Arc::new(UInt32Array::from(vec![tags])),
        Arc::new(TimestampMillisecondArray::from(vec![NOON]).with_data_type(time_type())),
        Arc::new(Float64Array::from(vec![2.0])),
    ];
    let rows = RecordBatch::try_new(SAMPLES.arrow().clone(), columns).unwrap();
    let batches = vec![Batch { table: SAMPLES.clone(), rows }];
    fixture.engine.write(Write { tags: encoder.finish(), batches, metadata: vec![] }).await.unwrap();
    let numbers = |set: &SeriesSet| -> Vec<String> {
        set.series.iter().map(|s| s.tags.get("n").unwrap_or_default().to_owned()).collect()
    };
    let named = |op, value: &str| vec![Matcher::new("n", op, value).unwrap()];
    for flushed in [false, true] {
        if flushed {
            fixture.engine.flush().await.unwrap();
        }
        let samples = fixture.select(&SAMPLES, named(MatchOp::Re, "[19]"), NOON, NOON + HOUR).await;
        let exemplars = fixture.select(&EXEMPLARS, named(MatchOp::Eq, "2"), NOON, NOON + HOUR).await.with_rows();
        assert_eq!(numbers(&exemplars), ["2"]);
        let mut aligned = SeriesSet::aligned(vec![samples, Arc::new(exemplars)]).into_iter();
        let (samples, exemplars) = aligned.next().zip(aligned.next()).unwrap();
        assert_eq!(numbers(&samples), numbers(&exemplars));
        assert_eq!(scan(&fixture.engine, samples).await.len(), 3);
        assert_eq!(scan(&fixture.engine, exemplars).await.len(), 2);
        let none = fixture.select(&EXEMPLARS, named(MatchOp::Eq, "9"), NOON, NOON + HOUR).await.with_rows();
        assert!(none.series.is_empty() || flushed, "only a file's range of metrics may let a series pass");
        assert!(scan(&fixture.engine, Arc::new(none)).await.is_empty());
    }
    fixture.engine.shutdown(Duration::ZERO).await.unwrap();
}
