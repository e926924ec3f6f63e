//! Which series exist: `series`, `labels` and `label/<name>/values`.
//!
//! The engine shows tens of thousands of tag sets to answer a few names or values, so what is not new costs no
//! allocation and, where neighbours are alike, no hash.

use std::collections::HashSet;
use std::hash::{BuildHasher, BuildHasherDefault};
use std::sync::Arc;

use catalog::registry::PassThrough;
use catalog::tables::{self, HISTOGRAMS, SAMPLES};
use catalog::tag::METRIC_NAME;
use catalog::{Code, Matcher, Series, TableSchema, TagSet, TagValues};
use engine::memory::Kind;
use engine::{Query, Selection, Stop};
use hashbrown::HashTable;

use super::params::{Form, unescape_label_name};
use super::reply::Reply;
use super::{Api, json};
use crate::error::{QueryError, Result};
use crate::exec::out_of_memory;
use crate::labels::{Pair, Pairs};
use crate::plan::source::Source;

/// What it costs to write the labels of a series, about.
const SERIES_COST: usize = 2000;

/// `series`: the label sets of all series that any `match[]` selects, sorted.
pub(super) async fn series(api: &Api, form: &Form, query: Query) -> Result<Reply> {
    if form.all("match[]").next().is_none() {
        return Err(QueryError::bad_data("no match[] parameter provided"));
    }
    let limit = form.limit()?;
    let range = form.range()?;
    let selectors = form.selectors().map_err(|e| super::params::invalid("match[]", e))?;
    let mut seen: HashSet<Code, BuildHasherDefault<PassThrough>> = HashSet::default();
    let mut found: Vec<Arc<Series>> = Vec::new();
    let mut memory = query.memory().reserve(Kind::Queries);
    let mut refused = Ok(());
    visit((api, query.stop()), selectors, range, |series| {
        if refused.is_ok() && seen.insert(series.id.code) {
            // Its text, and where it is noted meanwhile.
            refused = memory.grow(2 * series.tags.as_bytes().len() + 64);
            found.push(series.clone());
        }
        refused.is_ok()
    })
    .await?;
    refused.map_err(out_of_memory)?;
    found.sort_unstable_by(|a, b| a.tags.iter().cmp(b.tags.iter()));
    let truncated = truncate(&mut found, limit);
    let mut pace = query.stop().pace();
    let shown = found.iter().take_while(|_| pace.step(SERIES_COST).is_ok());
    let reply = Reply::cut(truncated, |out| json::list(out, shown, |out, s| json::labels(out, s.tags.as_bytes())));
    query.stop().check()?;
    Ok(reply.holding(memory))
}

/// `labels`: the names of all labels of the series that any `match[]` selects, or of all, sorted.
pub(super) async fn label_names(api: &Api, form: &Form, query: Query) -> Result<Reply> {
    let limit = form.limit()?;
    let range = form.range()?;
    let mut names = Texts::default();
    // Neighbours mostly have the same names in the same places.
    let mut previous: Vec<(usize, usize)> = Vec::new();
    visit((api, query.stop()), any(form)?, range, |series| {
        for (at, Pair { name, .. }) in Pairs::new(series.tags.as_bytes()).enumerate() {
            match previous.get_mut(at) {
                Some(span) if names.at(*span) == name => {}
                Some(span) => *span = names.insert(name),
                None => previous.push(names.insert(name)),
            }
        }
        true
    })
    .await?;
    Ok(names.reply(limit))
}

/// `label/<name>/values`: the values of a label of the series that any `match[]` selects, or of all, sorted.
pub(super) async fn label_values(api: &Api, name: &str, form: &Form, query: Query) -> Result<Reply> {
    let name = unescape_label_name(name);
    if name.is_empty() {
        return Err(QueryError::bad_data("invalid label name: \"\""));
    }
    let limit = form.limit()?;
    let range = form.range()?;
    let mut selectors = form.selectors()?;
    if selectors.is_empty() && !tables::metrics().any(|(table, _)| table.name_label == name) {
        return all_values(api, &name, range, limit).await;
    }
    if selectors.is_empty() {
        selectors = everything();
    }
    let mut values = Texts::default();
    let mut previous = None;
    visit((api, query.stop()), selectors, range, |series| {
        // Names are sorted: the first that is not less decides.
        let found = Pairs::new(series.tags.as_bytes()).find(|p| p.name >= name.as_bytes());
        if let Some(Pair { value, .. }) = found.filter(|p| p.name == name.as_bytes())
            && previous.is_none_or(|span| values.at(span) != value)
        {
            previous = Some(values.insert(value));
        }
        true
    })
    .await?;
    Ok(values.reply(limit))
}

/// The values of a label of all series. Pickers on dashboards ask for them all the time, so no series is looked at twice.
async fn all_values(api: &Api, name: &str, range: (i64, i64), limit: Option<usize>) -> Result<Reply> {
    let mut lists: Vec<Arc<TagValues>> = Vec::new();
    let mut names: Vec<&str> = Vec::new();
    for table in tables::all().into_iter().filter(|t| is_usual(t) || !t.metrics.is_empty()) {
        let of_table = api.engine.tag_values(table, name, range).await?;
        if name == METRIC_NAME && !is_usual(table) {
            // The names of its tag sets are values of another label.
            let has_rows = !of_table.is_empty();
            names.extend(table.metrics.iter().filter(|_| has_rows).map(|m| m.name));
            continue;
        }
        for list in of_table {
            if !lists.iter().any(|l| Arc::ptr_eq(l, &list)) {
                lists.push(list);
            }
        }
    }
    let mut sorted: Vec<&str> = lists.iter().flat_map(|l| l.iter()).chain(names.iter().copied()).collect();
    if lists.len() + names.len() > 1 {
        sorted.sort_unstable();
        sorted.dedup();
    }
    let truncated = truncate(&mut sorted, limit);
    Ok(Reply::cut(truncated, |out| json::list(out, sorted.iter(), |out, text| json::utf8(out, text.as_bytes()))))
}

/// The selectors of `match[]`, or those that select everything.
fn any(form: &Form) -> Result<Vec<Vec<Matcher>>> {
    let selectors = form.selectors()?;
    Ok(if selectors.is_empty() { everything() } else { selectors })
}

/// All series of `samples` and `histograms`, and of every metric that another table declares.
fn everything() -> Vec<Vec<Matcher>> {
    let declared = tables::metrics().map(|(_, metric)| vec![Matcher::equal(METRIC_NAME, metric.name)]);
    std::iter::once(Vec::new()).chain(declared).collect()
}

/// Whether a table holds the metrics that are named by tags.
fn is_usual(table: &TableSchema) -> bool {
    table.id == SAMPLES.id || table.id == HISTOGRAMS.id
}

/// Shows all series that any of the selectors selects; one may come more than once.
async fn visit(
    (api, stop): (&Api, &Stop),
    selectors: Vec<Vec<Matcher>>,
    (start_ms, end_ms): (i64, i64),
    mut each: impl FnMut(&Arc<Series>) -> bool + Send,
) -> Result<()> {
    for matchers in selectors {
        let (source, matchers) = Source::of(matchers);
        if let Some((source, (table, _))) = source.and_then(|s| Some((s.clone(), s.declared()?))) {
            // The sets of rows in memory are those of all tables; a metric exists where its table has rows.
            let selection = Selection { table: Arc::clone(table), matchers, start_ms, end_ms };
            let set = api.engine.select(&selection, stop).await?.with_rows();
            for series in &set.series {
                let labels = TagSet::from_canonical(source.labels(series.tags.as_bytes()));
                if !each(&Arc::new(Series::new(api.engine.registry().hasher(), labels))) {
                    break;
                }
            }
            continue;
        }
        // A series with native histograms only has no row in the other table; a table without rows costs nothing.
        for table in [&SAMPLES, &HISTOGRAMS] {
            let selection = Selection { table: Arc::clone(table), matchers: matchers.clone(), start_ms, end_ms };
            api.engine.visit(&selection, stop, &mut each).await?;
        }
    }
    Ok(())
}

fn truncate<T>(items: &mut Vec<T>, limit: Option<usize>) -> bool {
    let truncated = limit.is_some_and(|l| items.len() > l);
    if let Some(limit) = limit {
        items.truncate(limit);
    }
    truncated
}

/// Distinct texts, one after another in one buffer.
#[derive(Default)]
struct Texts {
    bytes: Vec<u8>,
    spans: HashTable<(usize, usize)>,
    hasher: foldhash::fast::FixedState,
}

impl Texts {
    fn at(&self, span: (usize, usize)) -> &[u8] {
        slice(&self.bytes, span)
    }

    /// Where the text is, after adding it if it is new.
    fn insert(&mut self, text: &[u8]) -> (usize, usize) {
        let Self { bytes, spans, hasher } = self;
        let hash = hasher.hash_one(text);
        if let Some(span) = spans.find(hash, |span| slice(bytes, *span) == text) {
            return *span;
        }
        let span = (bytes.len(), bytes.len() + text.len());
        spans.insert_unique(hash, span, |span| hasher.hash_one(slice(bytes, *span)));
        bytes.extend_from_slice(text);
        span
    }

    fn reply(&self, limit: Option<usize>) -> Reply {
        let mut sorted: Vec<&[u8]> = self.spans.iter().map(|span| self.at(*span)).collect();
        sorted.sort_unstable();
        let truncated = truncate(&mut sorted, limit);
        Reply::cut(truncated, |out| json::list(out, sorted.iter(), |out, text| json::utf8(out, text)))
    }
}

fn slice(bytes: &[u8], (from, to): (usize, usize)) -> &[u8] {
    &bytes[from..to]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_distinct_and_sorted() {
        let mut texts = Texts::default();
        for i in 0..1000 {
            let text = format!("v{}", i * 7 % 100);
            let span = texts.insert(text.as_bytes());
            assert_eq!(texts.at(span), text.as_bytes());
        }
        texts.insert(b"");
        assert_eq!(texts.spans.len(), 101);
        let Reply::Json(body) = texts.reply(Some(3)) else { unreachable!("a JSON reply") };
        assert_eq!(
            String::from_utf8(body).expect("UTF-8"),
            r#"{"status":"success","data":["","v0","v1"],"warnings":["results truncated due to limit"]}"#
        );
    }
}
