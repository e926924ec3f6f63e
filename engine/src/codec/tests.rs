//! A scan that went through bytes reads the same rows.

use std::sync::Arc;

use arrow::array::{Float64Array, RecordBatch, TimestampMillisecondArray, UInt32Array};
use arrow::compute::concat_batches;
use catalog::tables::{SAMPLES, time_type};
use catalog::{ManualClock, MatchOp, Matcher};
use datafusion::execution::TaskContext;
use datafusion::physical_plan::{ExecutionPlan, collect};
use datafusion::prelude::SessionConfig;
use datafusion_proto::physical_plan::{DefaultPhysicalProtoConverter, PhysicalExtensionCodec};
use object_store::memory::InMemory;

use super::ScanCodec;
use crate::{Batch, Components, Engine, Extensions, Selection, SeriesScanExec, Settings, Stop, Telemetry, Write};

async fn engine(dir: &tempfile::TempDir) -> Engine {
    let components = Components {
        store: Arc::new(InMemory::new()),
        fs: Arc::new(catalog::fs::Disk),
        clock: Arc::new(ManualClock::new(1_700_000_000_000)),
        entropy: Arc::new(catalog::SeededEntropy::new(1)),
        telemetry: Arc::new(Telemetry::default()),
    };
    let settings = Settings { data_dir: dir.path().to_owned(), ..Settings::default() };
    Engine::open(settings, components, Extensions::default()).await.unwrap()
}

async fn write(engine: &Engine, ts: i64) {
    let mut encoder = engine.registry().encoder();
    let refs: Vec<u32> =
        (0..50).map(|n: u32| encoder.tags(&mut [("__name__", "m"), ("n", &n.to_string())], None).unwrap()).collect();
    let columns: Vec<arrow::array::ArrayRef> = vec![
        Arc::new(UInt32Array::from(refs)),
        Arc::new(TimestampMillisecondArray::from(vec![ts; 50]).with_data_type(time_type())),
        Arc::new(Float64Array::from_iter_values((0..50).map(f64::from))),
    ];
    let rows = RecordBatch::try_new(SAMPLES.arrow().clone(), columns).unwrap();
    let batches = vec![Batch { table: SAMPLES.clone(), rows }];
    engine.write(Write { tags: encoder.finish(), batches, metadata: vec![] }).await.unwrap();
}

async fn rows(plan: Arc<dyn ExecutionPlan>) -> RecordBatch {
    let schema = plan.schema();
    let batches = collect(plan, Arc::new(TaskContext::default())).await.unwrap();
    concat_batches(&schema, &batches).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scan_survives_the_wire() {
    let dir = tempfile::tempdir().unwrap();
    let engine = engine(&dir).await;
    write(&engine, 1_699_999_000_000).await;
    engine.flush().await.unwrap();
    write(&engine, 1_699_999_999_000).await;
    let matchers =
        vec![Matcher::new("__name__", MatchOp::Eq, "m").unwrap(), Matcher::new("n", MatchOp::Re, "1.*").unwrap()];
    let selection = Selection { table: SAMPLES.clone(), matchers, start_ms: 0, end_ms: i64::MAX };
    let scan = Arc::new(SeriesScanExec::new(engine.select(&selection, &Stop::default()).await.unwrap(), vec![2, 1]));

    let converter = DefaultPhysicalProtoConverter {};
    let mut bytes = vec![];
    ScanCodec.try_encode(scan.clone(), &mut bytes, &converter).unwrap();
    let config = SessionConfig::new().with_extension(Arc::new(engine.clone()));
    let context = TaskContext::default().with_session_config(config);
    let back = ScanCodec.try_decode(&bytes, &[], &context, &converter).unwrap();

    assert_eq!(back.schema(), scan.schema());
    let (sent, read) = (rows(scan).await, rows(back).await);
    assert_eq!(sent.num_rows(), 22);
    assert_eq!(sent, read);

    // Bytes that are no scan are an error.
    for bad in [&b"\x08\x09"[..], b"\xff\xff", &bytes[..bytes.len() - 1]] {
        assert!(ScanCodec.try_decode(bad, &[], &context, &converter).is_err());
    }
    engine.shutdown(std::time::Duration::ZERO).await.unwrap();
}
