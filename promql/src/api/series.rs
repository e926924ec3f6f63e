//! Which series exist: `series`, `labels` and `label/<name>/values`.
//!
//! The engine shows tens of thousands of tag sets to answer a few names or values, so what is not new costs no
//! allocation and, where neighbours are alike, no hash.

use std::collections::HashSet;
use std::hash::BuildHasher;
use std::sync::Arc;

use catalog::tables::SAMPLES;
use catalog::tag::TagIter;
use catalog::{Code, Matcher, Series};
use engine::Selection;
use hashbrown::HashTable;

use super::params::{Form, unescape_label_name};
use super::reply::Reply;
use super::{Api, json};
use crate::error::{QueryError, Result};

/// `series`: the label sets of all series that any `match[]` selects, sorted.
pub(super) async fn series(api: &Api, form: &Form) -> Result<Reply> {
    if form.all("match[]").next().is_none() {
        return Err(QueryError::bad_data("no match[] parameter provided"));
    }
    let limit = form.limit()?;
    let range = form.range()?;
    let selectors = form.selectors().map_err(|e| super::params::invalid("match[]", e))?;
    let mut seen: HashSet<Code> = HashSet::new();
    let mut found: Vec<Arc<Series>> = Vec::new();
    let several = selectors.len() > 1;
    for matchers in selectors {
        let visit = |s: &Arc<Series>| {
            if !several || seen.insert(s.id.code) {
                found.push(s.clone());
            }
            true
        };
        api.engine.visit(&selection(matchers, range), visit).await?;
    }
    let reply = move || {
        found.sort_unstable_by(|a, b| a.tags.iter().cmp(b.tags.iter()));
        let truncated = truncate(&mut found, limit);
        Reply::cut(truncated, |out| json::list(out, &found, |out, s| json::labels(out, s.tags.as_bytes())))
    };
    Ok(api.engine.compute(reply).await)
}

/// `labels`: the names of all labels of the series that any `match[]` selects, or of all, sorted.
pub(super) async fn label_names(api: &Api, form: &Form) -> Result<Reply> {
    let limit = form.limit()?;
    let range = form.range()?;
    let mut names = Texts::default();
    // Neighbours mostly have the same names in the same places.
    let mut previous: Vec<(u32, u32)> = Vec::new();
    for matchers in any(form)? {
        let visit = |s: &Arc<Series>| {
            for (at, (name, _)) in TagIter::new(s.tags.as_bytes()).enumerate() {
                match previous.get_mut(at) {
                    Some(span) if names.at(*span) == name => {}
                    Some(span) => *span = names.insert(name),
                    None => previous.push(names.insert(name)),
                }
            }
            true
        };
        api.engine.visit(&selection(matchers, range), visit).await?;
    }
    Ok(names.reply(limit))
}

/// `label/<name>/values`: the values of a label of the series that any `match[]` selects, or of all, sorted.
pub(super) async fn label_values(api: &Api, name: &str, form: &Form) -> Result<Reply> {
    let name = unescape_label_name(name);
    if name.is_empty() {
        return Err(QueryError::bad_data("invalid label name: \"\""));
    }
    let limit = form.limit()?;
    let range = form.range()?;
    let mut values = Texts::default();
    let mut previous = None;
    for matchers in any(form)? {
        let visit = |s: &Arc<Series>| {
            // Names are sorted: the first that is not less decides.
            let found = TagIter::new(s.tags.as_bytes()).find(|(n, _)| *n >= name.as_str());
            if let Some((_, value)) = found.filter(|(n, _)| *n == name)
                && previous.is_none_or(|span| values.at(span) != value)
            {
                previous = Some(values.insert(value));
            }
            true
        };
        api.engine.visit(&selection(matchers, range), visit).await?;
    }
    Ok(values.reply(limit))
}

/// The selectors of `match[]`, or one that selects everything.
fn any(form: &Form) -> Result<Vec<Vec<Matcher>>> {
    let selectors = form.selectors()?;
    Ok(if selectors.is_empty() { vec![Vec::new()] } else { selectors })
}

fn selection(matchers: Vec<Matcher>, (start_ms, end_ms): (i64, i64)) -> Selection {
    Selection { table: SAMPLES.clone(), matchers, start_ms, end_ms }
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
    bytes: String,
    spans: HashTable<(u32, u32)>,
    hasher: foldhash::fast::FixedState,
}

impl Texts {
    fn at(&self, (from, to): (u32, u32)) -> &str {
        &self.bytes[from as usize..to as usize]
    }

    /// Where the text is, after adding it if it is new.
    fn insert(&mut self, text: &str) -> (u32, u32) {
        let Self { bytes, spans, hasher } = self;
        let at = |span: &(u32, u32)| &bytes[span.0 as usize..span.1 as usize];
        let hash = hasher.hash_one(text);
        if let Some(span) = spans.find(hash, |span| at(span) == text) {
            return *span;
        }
        let span = (bytes.len() as u32, (bytes.len() + text.len()) as u32);
        spans.insert_unique(hash, span, |span| hasher.hash_one(at(span)));
        bytes.push_str(text);
        span
    }

    fn reply(&self, limit: Option<usize>) -> Reply {
        let mut sorted: Vec<&str> = self.spans.iter().map(|span| self.at(*span)).collect();
        sorted.sort_unstable();
        let truncated = truncate(&mut sorted, limit);
        Reply::cut(truncated, |out| json::texts(out, sorted.iter().copied()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_distinct_and_sorted() {
        let mut texts = Texts::default();
        for i in 0..1000 {
            let text = format!("v{}", i * 7 % 100);
            let span = texts.insert(&text);
            assert_eq!(texts.at(span), text);
        }
        texts.insert("");
        assert_eq!(texts.spans.len(), 101);
        let Reply::Json(body) = texts.reply(Some(3)) else { unreachable!("a JSON reply") };
        assert_eq!(
            String::from_utf8(body).expect("UTF-8"),
            r#"{"status":"success","data":["","v0","v1"],"warnings":["results truncated due to limit"]}"#
        );
    }
}
