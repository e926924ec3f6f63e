//! From rows of the model to requests, and from what queries return back to them.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, Float64Array, Int8Array, Int32Array, Int64Array, ListArray, RecordBatch, StringArray,
    TimestampMillisecondArray, UInt32Array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Float64Type, Int64Type, TimestampMillisecondType, UInt32Type};
use catalog::tables::{self, EXEMPLARS, HISTOGRAMS, time_type};
use catalog::{Error, Result, TableSchema, TagSet, View};
use datafusion::execution::TaskContext;
use datafusion::physical_plan::{ExecutionPlan, execute_stream};
use futures::TryStreamExt;

use super::model::{Key, Rows, pairs};
use crate::cut::Floors;
use crate::{Batch, Engine, MetricMetadata, Selection, SeriesScanExec, Stop, Write, error_of};

/// A request with these rows; those of table 0 are metric metadata.
pub(super) fn request(engine: &Engine, rows: &[(Key, u64)]) -> Result<Write> {
    let mut encoder = engine.registry().encoder();
    let mut batches = vec![];
    for table in tables::all() {
        let of_table: Vec<_> = rows.iter().filter(|(key, _)| key.0 == table.id).collect();
        if of_table.is_empty() {
            continue;
        }
        let refs: Result<Vec<u32>> =
            of_table.iter().map(|(key, _)| encoder.tags(&mut pairs(&key.1).collect::<Vec<_>>(), None)).collect();
        let times = TimestampMillisecondArray::from_iter_values(of_table.iter().map(|r| r.0.2));
        let mut columns: Vec<ArrayRef> =
            vec![Arc::new(UInt32Array::from(refs?)), Arc::new(times.with_data_type(time_type()))];
        let bits: Vec<u64> = of_table.iter().map(|r| r.1).collect();
        columns.extend(table.columns[2..].iter().map(|c| column(&c.data_type, &bits)));
        let rows = RecordBatch::try_new(table.arrow().clone(), columns)?;
        batches.push(Batch { table: (*table).clone(), rows });
    }
    let metadata = rows.iter().filter(|(key, _)| key.0 == 0).map(|(key, bits)| MetricMetadata {
        metric: key.1.clone(),
        kind: "gauge".to_owned(),
        help: format!("{bits:x}"),
        unit: String::new(),
    });
    Ok(Write { metadata: metadata.collect(), tags: encoder.finish(), batches })
}

/// A column in which each value tells the row's bits, as far as its type allows.
fn column(data_type: &DataType, bits: &[u64]) -> ArrayRef {
    match data_type {
        DataType::Float64 => Arc::new(Float64Array::from_iter_values(bits.iter().map(|b| f64::from_bits(*b)))),
        DataType::Int64 => Arc::new(Int64Array::from_iter_values(bits.iter().map(|b| *b as i64))),
        DataType::Int32 => Arc::new(Int32Array::from_iter_values(bits.iter().map(|b| (b % 8) as i32))),
        DataType::Int8 => Arc::new(Int8Array::from_iter_values(bits.iter().map(|b| (b % 4) as i8))),
        DataType::List(item) => {
            let values = column(item.data_type(), bits);
            Arc::new(ListArray::new(item.clone(), OffsetBuffer::from_lengths(bits.iter().map(|_| 1)), values, None))
        }
        _ => Arc::new(StringArray::from_iter_values(bits.iter().map(|b| format!("{b:x}")))),
    }
}

/// A series as the model writes it.
pub(super) fn text(tags: &TagSet) -> String {
    tags.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}

/// What a query sees, and the floors of retention in the version that it read.
pub(super) async fn read(engine: &Engine, selection: &Selection) -> Result<(Rows, Arc<Floors>)> {
    let table = &selection.table;
    let set = engine.select(selection, &Stop::default()).await?;
    let floors = set.version.table(table.id).map(|t| t.floors.clone()).unwrap_or_default();
    let (value, proof) = columns(table);
    let scan: Arc<dyn ExecutionPlan> =
        Arc::new(SeriesScanExec::new(set.clone(), [1, value].into_iter().chain(proof).collect()));
    let stream = execute_stream(scan, Arc::new(TaskContext::default())).map_err(error_of)?;
    let batches: Vec<RecordBatch> = stream.try_collect().await.map_err(error_of)?;
    let mut rows = Rows::new();
    for batch in batches {
        let series = batch.column(0).as_primitive::<UInt32Type>();
        let ts = batch.column(1).as_primitive::<TimestampMillisecondType>();
        let values = batch.column(2);
        for i in 0..batch.num_rows() {
            let bits = match values.as_primitive_opt::<Float64Type>() {
                Some(values) => values.value(i).to_bits(),
                None => values.as_primitive::<Int64Type>().value(i) as u64,
            };
            let proven = match batch.columns().get(3) {
                None => true,
                Some(proof) if proof.data_type() == &DataType::Int64 => {
                    proof.as_primitive::<Int64Type>().value(i) as u64 == bits
                }
                Some(proof) => proof.as_string::<i32>().value(i) == format!("{bits:x}"),
            };
            let key = (table.id, text(&set.series[series.value(i) as usize].tags), ts.value(i));
            if !proven {
                return Err(Error::corrupt(format!("the columns of {key:?} are of different rows")));
            }
            if rows.insert(key.clone(), bits).is_some() {
                return Err(Error::corrupt(format!("{key:?} is there twice")));
            }
        }
    }
    Ok((rows, floors))
}

/// The column with a row's value, and one that must tell the same.
fn columns(table: &TableSchema) -> (usize, Option<usize>) {
    if table.id == HISTOGRAMS.id {
        (4, Some(5))
    } else if table.id == EXEMPLARS.id {
        (2, Some(3))
    } else {
        (2, None)
    }
}

/// The key of a view, in the place of a table's number that no table has.
pub(super) fn view_key(name: &str) -> Key {
    (u16::MAX, name.to_owned(), 0)
}

/// A view with a value as its definition.
pub(super) fn view(name: &str, bits: u64) -> View {
    View {
        name: name.to_owned(),
        definition: format!("{bits:x}"),
        columns: vec![],
        owner: String::new(),
        created_ms: 0,
    }
}

/// All views.
pub(super) fn views(engine: &Engine) -> Rows {
    let bits = |view: &View| u64::from_str_radix(&view.definition, 16).unwrap_or(u64::MAX);
    engine.views().values().map(|v| (view_key(&v.name), bits(v))).collect()
}

/// The metadata of all metrics, as rows of table 0.
pub(super) fn metadata(engine: &Engine) -> Rows {
    let bits = |m: &MetricMetadata| u64::from_str_radix(&m.help, 16).unwrap_or(u64::MAX);
    engine.metadata(None).iter().map(|m| ((0, m.metric.clone(), 0), bits(m))).collect()
}
