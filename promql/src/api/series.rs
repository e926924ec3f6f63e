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
use engine::{Query, Reservation, Selection, Stop};
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
/// Bytes that a text takes besides itself: where it is noted, and what is around it in the answer.
const TEXT_BYTES: usize = 64;

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
    let mut names = Texts::new(&query);
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
        names.refused.is_ok()
    })
    .await?;
    names.reply(limit, query.stop())
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
        return all_values((api, &query), &name, range, limit).await;
    }
    if selectors.is_empty() {
        selectors = everything();
    }
    let mut values = Texts::new(&query);
    let mut previous = None;
    visit((api, query.stop()), selectors, range, |series| {
        // Names are sorted: the first that is not less decides.
        let found = Pairs::new(series.tags.as_bytes()).find(|p| p.name >= name.as_bytes());
        if let Some(Pair { value, .. }) = found.filter(|p| p.name == name.as_bytes())
            && previous.is_none_or(|span| values.at(span) != value)
        {
            previous = Some(values.insert(value));
        }
        values.refused.is_ok()
    })
    .await?;
    values.reply(limit, query.stop())
}

/// The values of a label of all series. Pickers on dashboards ask for them all the time, so no series is looked at twice.
async fn all_values(
    (api, query): (&Api, &Query),
    name: &str,
    range: (i64, i64),
    limit: Option<usize>,
) -> Result<Reply> {
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
    let mut memory = query.memory().reserve(Kind::Queries);
    let found = lists.iter().map(|l| l.iter().len()).sum::<usize>() + names.len();
    memory.grow(found * size_of::<&str>()).map_err(out_of_memory)?;
    let mut sorted: Vec<&str> = lists.iter().flat_map(|l| l.iter()).chain(names.iter().copied()).collect();
    if lists.len() + names.len() > 1 {
        sorted.sort_unstable();
        sorted.dedup();
    }
    let truncated = truncate(&mut sorted, limit);
    query.stop().check()?;
    memory.grow(sorted.iter().map(|text| text.len() + TEXT_BYTES).sum()).map_err(out_of_memory)?;
    let reply = Reply::cut(truncated, |out| json::list(out, sorted.iter(), |out, t| json::utf8(out, t.as_bytes())));
    Ok(reply.holding(memory))
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
struct Texts {
    bytes: Vec<u8>,
    spans: HashTable<(usize, usize)>,
    hasher: foldhash::fast::FixedState,
    memory: Reservation,
    /// Fails once there is no memory for a text.
    refused: engine::Result<()>,
}

impl Texts {
    fn new(query: &Query) -> Self {
        Self::within(query.memory().reserve(Kind::Queries))
    }

    fn within(memory: Reservation) -> Self {
        let (bytes, spans, hasher) = (Vec::new(), HashTable::new(), foldhash::fast::FixedState::default());
        Self { bytes, spans, hasher, memory, refused: Ok(()) }
    }

    fn at(&self, span: (usize, usize)) -> &[u8] {
        slice(&self.bytes, span)
    }

    /// Where the text is, after adding it if it is new.
    fn insert(&mut self, text: &[u8]) -> (usize, usize) {
        let Self { bytes, spans, hasher, memory, refused } = self;
        let hash = hasher.hash_one(text);
        if let Some(span) = spans.find(hash, |span| slice(bytes, *span) == text) {
            return *span;
        }
        if refused.is_ok() {
            // Here, and in the answer.
            *refused = memory.grow(2 * text.len() + TEXT_BYTES);
        }
        let span = (bytes.len(), bytes.len() + text.len());
        spans.insert_unique(hash, span, |span| hasher.hash_one(slice(bytes, *span)));
        bytes.extend_from_slice(text);
        span
    }

    fn reply(self, limit: Option<usize>, stop: &Stop) -> Result<Reply> {
        self.refused.as_ref().map_err(|e| QueryError::execution(e.to_string()))?;
        stop.check()?;
        let mut sorted: Vec<&[u8]> = self.spans.iter().map(|span| self.at(*span)).collect();
        sorted.sort_unstable();
        let truncated = truncate(&mut sorted, limit);
        let reply = Reply::cut(truncated, |out| json::list(out, sorted.iter(), |out, text| json::utf8(out, text)));
        Ok(reply.holding(self.memory))
    }
}

fn slice(bytes: &[u8], (from, to): (usize, usize)) -> &[u8] {
    &bytes[from..to]
}

#[cfg(test)]
mod tests {
    use engine::Memory;

    use super::*;

    #[test]
    fn texts_are_distinct_and_sorted() {
        let memory = Memory::new(16 << 20);
        let mut texts = Texts::within(memory.reserve(Kind::Queries));
        for i in 0..1000 {
            let text = format!("v{}", i * 7 % 100);
            let span = texts.insert(text.as_bytes());
            assert_eq!(texts.at(span), text.as_bytes());
        }
        texts.insert(b"");
        assert_eq!(texts.spans.len(), 101);
        let reply = texts.reply(Some(3), &Stop::default()).expect("few texts");
        let Reply::Held(body) = reply else { unreachable!("an answer with its memory") };
        assert_eq!(
            std::str::from_utf8(body.as_ref()).expect("UTF-8"),
            r#"{"status":"success","data":["","v0","v1"],"warnings":["results truncated due to limit"]}"#
        );
        assert_eq!(memory.used(), 1024, "what the answer takes");
        drop(body);
        assert_eq!(memory.used(), 0);
    }

    #[test]
    fn texts_without_memory_are_refused() {
        let mut texts = Texts::within(Memory::new(16 << 10).reserve(Kind::Queries));
        for i in 0..1000 {
            texts.insert(format!("v{i}").as_bytes());
        }
        let refused = texts.reply(None, &Stop::default()).expect_err("too many");
        assert!(refused.message.contains("memory_limit is 16384"), "{refused}");
    }
}
