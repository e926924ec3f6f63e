//! What changes data: `admin/tsdb/delete_series` and `admin/tsdb/clean_tombstones`.
//!
//! As in Prometheus, except that a selector which every series satisfies is refused (a slip of the shell would empty the
//! database; `{__name__!=""}` says it on purpose) and that rows written after a delete stay whatever their time.

use std::sync::Arc;

use catalog::tables;
use engine::Selection;

use super::Api;
use super::params::{Form, invalid};
use super::reply::Reply;
use crate::error::{QueryError, Result};

/// `delete_series`: deletes the samples, histograms and exemplars of the series that any `match[]` selects, between `start`
/// and `end`, both inclusive, all time by default. They are gone for every query when it answers.
pub(super) async fn delete_series(api: &Api, form: &Form) -> Result<Reply> {
    if form.all("match[]").next().is_none() {
        return Err(QueryError::bad_data("no match[] parameter provided"));
    }
    let (start_ms, end_ms) = form.range()?;
    let selectors = form.selectors().map_err(|e| invalid("match[]", e))?;
    let selections = selectors.into_iter().flat_map(|matchers| {
        tables::all().map(|table| Selection { table: Arc::clone(table), matchers: matchers.clone(), start_ms, end_ms })
    });
    api.engine.delete(selections.collect()).await?;
    Ok(Reply::NoContent)
}

/// `clean_tombstones`: writes all files again that hold deleted rows, without them.
pub(super) async fn clean_tombstones(api: &Api) -> Result<Reply> {
    api.engine.fold_deletes().await?;
    Ok(Reply::NoContent)
}
