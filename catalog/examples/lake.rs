//! Writes a small database the way the engine does, for trying outside readers on it.
//!
//! `cargo run -p catalog --example lake -- DIR` makes `DIR/catalog.sqlite`, the objects in `DIR/store/default`, and
//! `DIR/expected.csv` with what a reader must see in `samples`: milliseconds, metric, series code, host, bits of the
//! value. Values and positions on their lines are drawn from a fixed sequence of numbers.

use std::fmt::Write;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, Float64Array, Float64Builder, Int8Array, Int32Array, Int32Builder, Int64Array, Int64Builder,
    ListArray, RecordBatch, StringArray, TimestampMillisecondArray,
};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type, Int32Type, Int64Type};
use catalog::files::{Opening, SqlIndex, timestamp_text};
use catalog::fs::Disk;
use catalog::tables::{EXEMPLARS, HISTOGRAMS, SAMPLES};
use catalog::tag::tag_set;
use catalog::tag_parts::{PartHeader, encode};
use catalog::{
    ColumnStats, Commit, DataFile, Error, FileCatalog, FileSystem, ManualClock, Result, SeededEntropy, Series,
    TableSchema, TagHasher, object,
};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_writer::ArrowWriterOptions;

const SEED: u64 = 42;
const DAY: i32 = 20_500;
const DAY_MS: i64 = 86_400_000;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let dir = std::env::args().nth(1).ok_or_else(|| Error::invalid("give a folder"))?;
    let dir = std::path::absolute(&dir)?;
    let store = dir.join("store/default");
    std::fs::create_dir_all(&store)?;

    let data_path = format!("{}/", store.display());
    let now = i64::from(DAY + 1) * DAY_MS;
    let opening = Opening {
        store: object::open(&(Arc::new(Disk) as Arc<dyn FileSystem>), &dir.join("store").display().to_string())?,
        database: "default",
        entropy: Arc::new(SeededEntropy::new(SEED)),
        seed: SEED,
        index: Some(Box::new(SqlIndex::sqlite(&dir.join("catalog.sqlite"), &data_path, SEED))),
        format1: None,
        clock: Arc::new(ManualClock::new(now)),
    };
    let (files, _) = FileCatalog::open(opening).await?;
    let mut expected = String::new();
    for day in [DAY, DAY + 1] {
        let series = series();
        let seq = files.next_seq();
        let header = PartHeader { id: files.next_id(), day, seq, supersedes: Vec::new() };
        let part = encode(&header, &series)?;
        write_object(&store, &part.part.path, &part.bytes)?;
        let mut commit = Commit { add_parts: vec![part.part], ..Commit::default() };
        for (table, columns) in [
            (&*SAMPLES, samples(&series, day, &mut expected)),
            (&*HISTOGRAMS, histograms(&series, day)),
            (&*EXEMPLARS, exemplars(&series, day)),
        ] {
            commit.add.push(write_file(&store, table, columns, files.next_id(), day, seq)?);
        }
        files.commit(&commit, now).await?;
    }
    // Rows of the second day's exemplars move to a new file, as compaction does, and the old one goes.
    let id = files.next_id();
    let again = exemplars(&series(), DAY + 1);
    let mut file = write_file(&store, &EXEMPLARS, again, id, DAY + 1, 2)?;
    file.level = 2;
    let replaced = Commit { add: vec![file], remove: vec![id - 1], ..Commit::default() };
    files.commit(&replaced, now + 1000).await?;
    let gone = files.purge(now + 2000).await?;
    for path in &gone {
        std::fs::remove_file(store.join(path))?;
    }
    files.forget(&gone).await?;
    files.close().await;
    std::fs::write(dir.join("expected.csv"), expected)?;
    Ok(())
}

fn series() -> Vec<Arc<Series>> {
    let hasher = TagHasher::new(SEED);
    let mut out = Vec::new();
    for metric in ["http_requests_total", "up", "weird \"name\""] {
        for host in 0..20 {
            let host = format!("host-{host:02}");
            let pairs = [("__name__", metric), ("job", "node"), ("instance", &host), ("comma", "a,b 'c' \u{1f600}")];
            // The labels are constants and canonical.
            out.extend(tag_set(&pairs).map(|tags| Arc::new(Series::new(&hasher, tags))));
        }
    }
    out.sort_by_key(|s| s.storage_key());
    out
}

/// Numbers that look random and are the same every time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let x = self.0 ^ (self.0 >> 31);
        x.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    fn below(&mut self, limit: i64) -> i64 {
        (self.next() >> 1) as i64 % limit
    }
}

const ODD: [u64; 8] = [
    0x7ff0_0000_0000_0002, // Prometheus's stale marker
    0x7ff8_0000_0000_0001, // NaN
    0xfff8_0000_dead_beef, // NaN with a payload
    0x8000_0000_0000_0000, // -0
    0x7ff0_0000_0000_0000, // infinity
    0xfff0_0000_0000_0000,
    0x0000_0000_0000_0001, // least
    0x7fef_ffff_ffff_ffff, // greatest
];

fn samples(series: &[Arc<Series>], day: i32, expected: &mut String) -> Vec<ArrayRef> {
    let mut rows = Rows::new(series, day, 200);
    let mut numbers = Numbers(day as u64);
    let int = || Int64Builder::new();
    let (mut residual, mut base, mut t0) = (int(), int(), int());
    let (mut slope, mut scale, mut double) = (Float64Builder::new(), Int32Builder::new(), Float64Builder::new());
    for (i, s) in series.iter().enumerate() {
        let line = (
            numbers.below(1 << 50) - (1 << 49),
            f64::from((numbers.below(2_000_001) - 1_000_000) as f32 / 1000.0),
            i64::from(day) * DAY_MS + numbers.below(DAY_MS),
            numbers.below(16) as i32,
        );
        for row in i * rows.per_series..(i + 1) * rows.per_series {
            let ts = rows.ts[row];
            let bits = if numbers.below(10) == 0 {
                let bits = ODD[numbers.below(8) as usize];
                residual.append_null();
                base.append_null();
                slope.append_null();
                t0.append_null();
                scale.append_null();
                double.append_value(f64::from_bits(bits));
                bits
            } else {
                let r = numbers.below(100_000) - 50_000;
                residual.append_value(r);
                base.append_value(line.0);
                slope.append_value(line.1);
                t0.append_value(line.2);
                scale.append_value(line.3);
                double.append_null();
                let sum = line.0 + (line.1 * (ts - line.2) as f64).floor() as i64 + r;
                let power: f64 = format!("1e{}", line.3).parse().unwrap_or(f64::NAN);
                (sum as f64 / power).to_bits()
            };
            let host = s.tags.get("instance").unwrap_or_default();
            // Writing to a String does not fail.
            let _ = writeln!(expected, "{ts}|{}|{}|{host}|{bits:016x}", s.tags.metric(), s.id.code.0);
        }
    }
    let mut columns = std::mem::take(&mut rows.columns);
    columns.extend([
        Arc::new(residual.finish()) as ArrayRef,
        Arc::new(base.finish()),
        Arc::new(slope.finish()),
        Arc::new(t0.finish()),
        Arc::new(scale.finish()),
        Arc::new(double.finish()),
    ]);
    columns
}

fn histograms(series: &[Arc<Series>], day: i32) -> Vec<ArrayRef> {
    let rows = Rows::new(series, day, 3);
    let n = rows.ts.len();
    let ints = |i: usize| Some((0..i % 4).map(move |k| Some((k * i) as i64)));
    let list64 = ListArray::from_iter_primitive::<Int64Type, _, _>((0..n).map(ints));
    let list32 = ListArray::from_iter_primitive::<Int32Type, _, _>(
        (0..n).map(|i| Some((0..i % 3).map(move |k| Some((k + i) as i32)))),
    );
    let floats = ListArray::from_iter_primitive::<Float64Type, _, _>(
        (0..n).map(|i| Some((0..i % 2).map(move |k| Some(k as f64 + 0.5)))),
    );
    let (list64, list32, floats): (ArrayRef, ArrayRef, ArrayRef) =
        (Arc::new(list64), Arc::new(list32), Arc::new(floats));
    let half = |keep: usize| (0..n).map(move |i| (i % 2 == keep).then_some(i as i64));
    let halves = |keep: usize| (0..n).map(move |i| (i % 2 == keep).then_some(i as f64));
    let mut columns = rows.columns;
    columns.extend([
        Arc::new(Int32Array::from_iter_values((0..n).map(|i| i as i32 % 8))) as ArrayRef,
        Arc::new(Float64Array::from_iter_values((0..n).map(|_| 1e-128))),
        Arc::new(Float64Array::from_iter_values((0..n).map(|i| i as f64 * 1.5))),
        Arc::new(Int64Array::from_iter(half(0))),
        Arc::new(Float64Array::from_iter(halves(1))),
        Arc::new(Int64Array::from_iter(half(0))),
        Arc::new(Float64Array::from_iter(halves(1))),
        list32.clone(),
        list32.clone(),
        list64.clone(),
        floats.clone(),
        list32.clone(),
        list32,
        list64,
        floats.clone(),
        floats,
        Arc::new(Int8Array::from_iter_values((0..n).map(|i| i as i8 % 4))),
        Arc::new(Int64Array::from_iter((0..n).map(|i| (i % 3 > 0).then_some(i as i64)))),
    ]);
    columns
}

fn exemplars(series: &[Arc<Series>], day: i32) -> Vec<ArrayRef> {
    let rows = Rows::new(series, day, 2);
    let n = rows.ts.len();
    let mut columns = rows.columns;
    columns.extend([
        Arc::new(Float64Array::from_iter_values((0..n).map(|i| i as f64 / 3.0))) as ArrayRef,
        Arc::new(StringArray::from_iter_values((0..n).map(|i| format!("{{\"trace_id\":\"{i:032x}\"}}")))),
    ]);
    columns
}

/// The columns that every file begins with.
struct Rows {
    per_series: usize,
    ts: Vec<i64>,
    columns: Vec<ArrayRef>,
}

impl Rows {
    fn new(series: &[Arc<Series>], day: i32, per_series: usize) -> Self {
        let step = DAY_MS / per_series as i64;
        let ts: Vec<i64> = series
            .iter()
            .flat_map(|_| (0..per_series as i64).map(move |i| i64::from(day) * DAY_MS + i * step + 123))
            .collect();
        let codes = |code: fn(&Series) -> i64| -> ArrayRef {
            let rows = series.iter().flat_map(|s| std::iter::repeat_n(code(s), per_series));
            Arc::new(Int64Array::from_iter_values(rows))
        };
        let columns = vec![
            codes(|s| s.metric.0),
            codes(|s| s.target.0),
            codes(|s| s.id.code.0),
            Arc::new(TimestampMillisecondArray::from(ts.clone()).with_timezone("UTC")) as ArrayRef,
        ];
        Self { per_series, ts, columns }
    }
}

fn write_file(
    store: &Path,
    table: &TableSchema,
    columns: Vec<ArrayRef>,
    id: i64,
    day: i32,
    seq: u64,
) -> Result<DataFile> {
    let schema = table.physical_arrow();
    let columns = columns.iter().zip(schema.fields()).map(|(c, f)| match f.data_type() {
        // Elements have another name in files.
        DataType::List(_) => cast(c, f.data_type()),
        _ => Ok(c.clone()),
    });
    let batch = RecordBatch::try_new(schema.clone(), columns.collect::<Result<_, _>>()?)?;
    let options = ArrowWriterOptions::new().with_skip_arrow_metadata(true);
    let mut writer = ArrowWriter::try_new_with_options(Vec::new(), schema.clone(), options)?;
    writer.write(&batch)?;
    let bytes = writer.into_inner()?;
    let path = format!("{}/{day}/{id}.parquet", table.name);
    write_object(store, &path, &bytes)?;

    let range = |column: usize| -> (i64, i64) {
        let c = cast(batch.column(column), &DataType::Int64).map(|c| c.to_data());
        let values: Vec<i64> = c.map_or(Vec::new(), |c| c.buffer::<i64>(0).to_vec());
        let values = values.into_iter().take(batch.num_rows());
        (values.clone().min().unwrap_or(0), values.max().unwrap_or(0))
    };
    let (metric, ts) = (range(0), range(3));
    let stats =
        |field_id, min, max| ColumnStats { field_id, bytes: 1, values: batch.num_rows() as u64, nulls: 0, min, max };
    let footer = &bytes[bytes.len() - 8..];
    Ok(DataFile {
        id,
        table_id: table.id,
        path,
        day,
        level: 0,
        rows: batch.num_rows() as u64,
        bytes: bytes.len() as u64,
        footer_bytes: u64::from(u32::from_le_bytes([footer[0], footer[1], footer[2], footer[3]])),
        ts_min: ts.0,
        ts_max: ts.1,
        metric_min: metric.0,
        metric_max: metric.1,
        seq_min: seq,
        seq_max: seq,
        crc32: crc32fast::hash(&bytes),
        columns: vec![
            stats(90, Some(metric.0.to_string()), Some(metric.1.to_string())),
            stats(2, timestamp_text(ts.0), timestamp_text(ts.1)),
        ],
    })
}

fn write_object(store: &Path, path: &str, bytes: &[u8]) -> Result<()> {
    let path = store.join(path);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    Ok(std::io::Write::write_all(&mut File::create(path)?, bytes)?)
}
