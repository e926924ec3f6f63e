//! The same rows give the same answers wherever they are: in memory, flushed, in many files, compacted, after a restart.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Float64Array, RecordBatch, StringArray, TimestampMillisecondArray, UInt32Array};
use arrow::datatypes::{Float64Type, TimestampMillisecondType, UInt32Type};
use catalog::tables::{EXEMPLARS, SAMPLES, time_type};
use catalog::{ManualClock, MatchOp, Matcher, TableSchema};
use datafusion::physical_plan::ExecutionPlan;
use futures::TryStreamExt;
use object_store::memory::InMemory;
use proptest::prelude::*;

use crate::{Batch, Components, Engine, Extensions, Selection, SeriesScanExec, SeriesSet, Settings, Telemetry, Write};

const NOON: i64 = 1_700_049_600_000;
const HOUR: i64 = 3_600_000;
const STALE: u64 = 0x7ff0_0000_0000_0002;

/// (series number, time, bits of the value)
type Row = (usize, i64, u64);
/// (labels, time) → bits of the value.
type Rows = BTreeMap<(String, i64), u64>;

struct Fixture {
    engine: Engine,
    dir: tempfile::TempDir,
    store: Arc<InMemory>,
    clock: Arc<ManualClock>,
}

impl Fixture {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(InMemory::new());
        let clock = Arc::new(ManualClock::new(NOON + 30 * HOUR));
        let engine = Self::open(&dir, &store, &clock).await;
        Self { engine, dir, store, clock }
    }

    async fn open(dir: &tempfile::TempDir, store: &Arc<InMemory>, clock: &Arc<ManualClock>) -> Engine {
        let settings = Settings { data_dir: dir.path().to_owned(), ..Settings::default() };
        let components = Components {
            store: store.clone(),
            fs: Arc::new(catalog::fs::Disk),
            clock: clock.clone(),
            entropy: Arc::new(catalog::SeededEntropy::new(1)),
            telemetry: Arc::new(Telemetry::default()),
        };
        Engine::open(settings, components, Extensions::default()).await.unwrap()
    }

    async fn restart(&mut self) {
        self.engine.shutdown(std::time::Duration::ZERO).await.unwrap();
        self.engine = Self::open(&self.dir, &self.store, &self.clock).await;
    }

    async fn write(&self, rows: &[Row]) {
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
        self.engine.write(Write { tags: encoder.finish(), batches, metadata: vec![] }).await.unwrap();
    }

    async fn select(
        &self,
        table: &Arc<TableSchema>,
        matchers: Vec<Matcher>,
        start_ms: i64,
        end_ms: i64,
    ) -> Arc<SeriesSet> {
        let selection = Selection { table: table.clone(), matchers, start_ms, end_ms };
        self.engine.select(&selection).await.unwrap()
    }

    async fn rows(&self, table: &Arc<TableSchema>, matchers: Vec<Matcher>, start_ms: i64, end_ms: i64) -> Rows {
        let set = self.select(table, matchers, start_ms, end_ms).await;
        scan(&self.engine, set).await
    }

    async fn check(&self, model: &BTreeMap<(usize, i64), u64>) {
        let text = |s: usize| {
            format!("{:?}", [("__name__", format!("m{}", s % 3)), ("job", format!("j{}", s % 2)), ("n", s.to_string())])
        };
        let expected = |keep: &dyn Fn(usize, i64) -> bool| -> Rows {
            model.iter().filter(|((s, t), _)| keep(*s, *t)).map(|((s, t), v)| ((text(*s), *t), *v)).collect()
        };
        let all = (i64::MIN, i64::MAX);
        let name = |op, value: &str| Matcher::new("__name__", op, value).unwrap();
        assert_eq!(self.rows(&SAMPLES, vec![], all.0, all.1).await, expected(&|_, _| true));
        assert_eq!(self.rows(&EXEMPLARS, vec![], all.0, all.1).await, expected(&|_, _| true));
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
        let mut visited = Vec::new();
        let selection = Selection { table: SAMPLES.clone(), matchers: vec![], start_ms: all.0, end_ms: all.1 };
        let visit = |s: &Arc<catalog::Series>| {
            visited.push(s.tags.get("n").unwrap().parse::<usize>().unwrap());
            true
        };
        self.engine.visit(&selection, visit).await.unwrap();
        visited.sort_unstable();
        let mut known: Vec<usize> = model.keys().map(|k| k.0).collect();
        known.dedup();
        assert_eq!(visited, known);
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
            fixture.engine.shutdown(std::time::Duration::ZERO).await.unwrap();
        });
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
