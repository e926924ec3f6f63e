//! `query_exemplars`: the exemplars of all series that the selectors of an expression select.

use std::collections::HashSet;
use std::sync::Arc;

use arrow::array::AsArray;
use arrow::datatypes::{Float64Type, TimestampMillisecondType, UInt32Type};
use arrow::record_batch::RecordBatch;
use catalog::tables::EXEMPLARS;
use catalog::{Code, Series};
use datafusion::physical_plan::execute_stream;
use engine::memory::Kind;
use engine::{Query, Reservation, Selection, SeriesScanExec};
use futures::TryStreamExt;

use super::params::Form;
use super::reply::Reply;
use super::{Api, json};
use crate::error::{QueryError, Result};
use crate::exec::out_of_memory;
use crate::plan;

/// Most exemplars in one answer.
const EXEMPLARS_MAX: usize = 1_000_000;

/// Bytes that an exemplar takes besides its labels, and as text.
const EXEMPLAR_BYTES: usize = 128;
/// Bytes that a series takes besides its text.
const SERIES_BYTES: usize = 128;

/// Columns of [`EXEMPLARS`] to read, after `series`.
const COLUMNS: [&str; 3] = ["ts", "value", "labels"];

/// A series with its exemplars, times ascending.
#[derive(Debug)]
struct Found {
    series: Arc<Series>,
    exemplars: Vec<Exemplar>,
}

#[derive(Debug)]
struct Exemplar {
    ts: i64,
    value: f64,
    /// A JSON object of texts, as stored.
    labels: String,
}

/// Exemplars of the series that any selector of `query` selects, from `start` to `end`, sorted by series.
pub(super) async fn query(api: &Api, form: &Form, query: Query) -> Result<Reply> {
    let (start_ms, end_ms) = form.range()?;
    if end_ms < start_ms {
        return Err(QueryError::bad_data("end timestamp must not be before start timestamp"));
    }
    let expr = plan::parse(form.get("query"), &api.settings.features)?;
    let mut selectors = Vec::new();
    expr.selectors(&mut |s| selectors.push(s.selection()));
    if selectors.is_empty() {
        return Ok(Reply::NoContent);
    }
    // Of what is found, and of its text.
    let mut memory = query.memory().reserve(Kind::Queries);
    let mut found = Vec::new();
    let mut done = HashSet::new();
    for matchers in selectors {
        let selection = Selection { table: EXEMPLARS.clone(), matchers, start_ms, end_ms };
        read((api, &query), selection, (&mut found, &mut memory), &mut done).await?;
    }
    found.sort_by(|a, b| a.series.tags.iter().cmp(b.series.tags.iter()));
    query.stop().check()?;
    Ok(Reply::data(|out| json::list(out, &found, write)).holding(memory))
}

/// Adds the exemplars of a selection, except for series in `done`, to which it adds what it found.
async fn read(
    (api, query): (&Api, &Query),
    selection: Selection,
    (found, memory): (&mut Vec<Found>, &mut Reservation),
    done: &mut HashSet<Code>,
) -> Result<()> {
    let set = api.engine.select(&selection, query.stop()).await?;
    let columns = COLUMNS.iter().filter_map(|name| EXEMPLARS.column(name).map(|(index, _)| index)).collect();
    let scan = Arc::new(SeriesScanExec::new(set.clone(), columns));
    let mut stream = execute_stream(scan, api.engine.task_context(query))?;
    let first = found.len();
    while let Some(batch) = stream.try_next().await? {
        query.stop().check()?;
        for (index, exemplar) in rows(&batch)? {
            let series = &set.series[index as usize];
            if done.contains(&series.id.code) {
                continue;
            }
            memory.grow(2 * exemplar.labels.len() + EXEMPLAR_BYTES).map_err(out_of_memory)?;
            match found[first..].last_mut() {
                Some(last) if Arc::ptr_eq(&last.series, series) => last.exemplars.push(exemplar),
                _ => {
                    memory.grow(series.tags.as_bytes().len() + SERIES_BYTES).map_err(out_of_memory)?;
                    found.push(Found { series: series.clone(), exemplars: vec![exemplar] });
                }
            }
        }
        let count: usize = found.iter().map(|f| f.exemplars.len()).sum();
        if count > EXEMPLARS_MAX {
            return Err(QueryError::execution(format!(
                "more than {EXEMPLARS_MAX} exemplars match, which is the limit"
            )));
        }
    }
    done.extend(found[first..].iter().map(|f| f.series.id.code));
    Ok(())
}

/// The rows of a scanned batch: index of the series, exemplar.
fn rows(batch: &RecordBatch) -> Result<impl Iterator<Item = (u32, Exemplar)> + '_> {
    let columns = (|| {
        let column = |i: usize| batch.columns().get(i);
        Some((
            column(0)?.as_primitive_opt::<UInt32Type>()?,
            column(1)?.as_primitive_opt::<TimestampMillisecondType>()?,
            column(2)?.as_primitive_opt::<Float64Type>()?,
            column(3)?.as_string_opt::<i32>()?,
        ))
    })();
    let (series, ts, value, labels) =
        columns.ok_or_else(|| QueryError::internal("scan of exemplars has other columns"))?;
    Ok((0..batch.num_rows()).map(move |i| {
        (series.value(i), Exemplar { ts: ts.value(i), value: value.value(i), labels: labels.value(i).to_owned() })
    }))
}

fn write(out: &mut Vec<u8>, found: &Found) {
    out.extend_from_slice(br#"{"seriesLabels":"#);
    json::labels(out, found.series.tags.as_bytes());
    out.extend_from_slice(br#","exemplars":"#);
    json::list(out, &found.exemplars, |out, exemplar| {
        out.extend_from_slice(br#"{"labels":"#);
        // Stored as JSON already; without any label the text may be empty.
        let labels = if exemplar.labels.is_empty() { "{}" } else { &exemplar.labels };
        out.extend_from_slice(labels.as_bytes());
        out.extend_from_slice(br#","value":"#);
        json::value(out, exemplar.value);
        out.extend_from_slice(br#","timestamp":"#);
        json::time(out, exemplar.ts);
        out.push(b'}');
    });
    out.push(b'}');
}
