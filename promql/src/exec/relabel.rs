//! Operations on labels: setting them, and making one series of those that have become equal.

use std::sync::Arc;

use arrow::array::RecordBatch;
use catalog::matcher::anchored;
use datafusion::error::Result as DfResult;
use datafusion::execution::memory_pool::MemoryReservation;
use hashbrown::HashMap;
use hashbrown::hash_map::EntryRef;
use regex::Regex;

use super::{Batches, VALUE_BYTES, Work, cost, internal, same_labels};
use crate::QueryError;
use crate::block::{BatchesBuilder, BlockBuilder, Name, Row};
use crate::histogram::FloatHistogram;
use crate::labels;
use crate::plan::ops::Op;

/// Longest value that an expression can give a label.
const VALUE_BYTES_MAX: usize = 64 << 10;
/// What a regular expression costs for a byte of text, about.
const MATCH_COST: usize = 16;

pub(super) fn execute(work: Work, partition: usize) -> DfResult<Batches> {
    let mut pattern: Option<Regex> = None;
    let mut value = String::new();
    work.map_blocks(partition, move |work, _, block, pace| {
        let mut builder = BlockBuilder::new(work.schema.clone());
        for row in 0..block.len() {
            let row = Row::of(&block, row);
            let to = match &work.op {
                Op::LabelReplace { to, replacement, from, pattern: source } => {
                    let regex = match &mut pattern {
                        Some(regex) => regex,
                        none => none.insert(anchored(source).map_err(QueryError::from)?),
                    };
                    let text = labels::get(row.labels, from);
                    pace.walk(MATCH_COST * (source.len() + text.len() + replacement.len()))?;
                    match regex.captures(text) {
                        None => None,
                        Some(captures) => {
                            value.clear();
                            expand(replacement, &captures, &mut value);
                            check_length(&value)?;
                            Some(to)
                        }
                    }
                }
                Op::LabelJoin { to, separator, from } => {
                    value.clear();
                    for (i, name) in from.iter().enumerate() {
                        if i > 0 {
                            value.push_str(separator);
                        }
                        value.push_str(labels::get(row.labels, name));
                    }
                    pace.walk(value.len())?;
                    check_length(&value)?;
                    Some(to)
                }
                other => return Err(internal(&format!("{} does not set labels", other.name()))),
            };
            builder.copy(&row, |out| match to {
                None => Name::Keep.apply(row.labels, row.drop_name, out),
                Some(to) => {
                    labels::set(row.labels, to, &value, out);
                    row.drop_name && to != "__name__"
                }
            });
        }
        builder.finish()
    })
}

/// Refuses a value that is not worth keeping: expressions can make them grow without bound.
fn check_length(value: &str) -> Result<(), QueryError> {
    if value.len() > VALUE_BYTES_MAX {
        return Err(QueryError::execution(format!(
            "label value would have {} bytes: at most {VALUE_BYTES_MAX} are allowed",
            value.len()
        )));
    }
    Ok(())
}

/// Go's template syntax: `$1`, `$name`, `${name}`, `$$`; a name is the longest run of letters, digits and underscores.
fn expand(template: &str, captures: &regex::Captures<'_>, out: &mut String) {
    let mut rest = template;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
            continue;
        }
        let braced = rest.strip_prefix('{');
        let body = braced.unwrap_or(rest);
        let end = body.find(|c: char| c != '_' && !c.is_alphanumeric()).unwrap_or(body.len());
        let name = &body[..end];
        let closed = braced.is_none() || body[end..].starts_with('}');
        if name.is_empty() || !closed {
            // Malformed: a dollar sign as it stands.
            out.push('$');
            continue;
        }
        let group = match name.parse::<usize>() {
            Ok(i) => captures.get(i),
            Err(_) => captures.name(name),
        };
        out.push_str(group.map_or("", |g| g.as_str()));
        rest = &body[end + usize::from(braced.is_some())..];
    }
    out.push_str(rest);
}

/// Collects rows so that those with equal labels become one; two values at one step are an error.
pub(super) struct Merger {
    memory: Arc<MemoryReservation>,
    rows: HashMap<Vec<u8>, usize>,
    builder: BatchesBuilder,
    buffer: Vec<u8>,
}

impl Merger {
    pub(super) fn new(work: &Work) -> Self {
        let builder = BatchesBuilder::new(work.schema.clone());
        Self { memory: work.memory.clone(), rows: HashMap::new(), builder, buffer: Vec::new() }
    }

    /// The row for labels that `write` appends, new or there already, and whether it was there.
    ///
    /// # Errors
    /// When there is no memory for a new one.
    pub(super) fn row(&mut self, write: impl FnOnce(&mut Vec<u8>) -> bool) -> DfResult<(usize, bool)> {
        self.buffer.clear();
        let drop_name = write(&mut self.buffer);
        match self.rows.entry_ref(self.buffer.as_slice()) {
            EntryRef::Occupied(e) => Ok((*e.get(), true)),
            EntryRef::Vacant(e) => {
                // The labels are kept twice, once to find the row.
                self.memory.try_grow(self.builder.steps() * VALUE_BYTES + 2 * self.buffer.len() + 64)?;
                let row = self.builder.rows();
                let labels = &self.buffer;
                self.builder.push(|out| {
                    out.extend_from_slice(labels);
                    drop_name
                });
                e.insert(row);
                Ok((row, false))
            }
        }
    }

    /// Whether any row has a histogram, so that floats alone don't tell where samples are.
    pub(super) fn has_histograms(&self) -> bool {
        self.builder.has_histograms()
    }

    /// Writes the sample that another row has at a step, if any; an error when there is one already.
    #[inline]
    pub(super) fn put_sample(&mut self, to: usize, row: &Row<'_>, step: usize) -> Result<(), QueryError> {
        if let Some(v) = row.get(step) {
            self.put_float(to, step, v)
        } else if let Some(bytes) = row.encoded(step) {
            self.put_encoded(to, step, bytes.to_vec())
        } else {
            Ok(())
        }
    }

    /// Writes a float into a row that may have histograms.
    #[inline]
    pub(super) fn put_float(&mut self, row: usize, step: usize, v: f64) -> Result<(), QueryError> {
        if self.builder.has_sample(row, step) {
            return Err(same_labels());
        }
        let (values, valid) = self.builder.row_mut(row);
        (values[step], valid[step]) = (v, true);
        Ok(())
    }

    /// Writes a histogram into a row; an error when there is a sample.
    pub(super) fn put_histogram(&mut self, row: usize, step: usize, h: &FloatHistogram) -> Result<(), QueryError> {
        let mut bytes = Vec::new();
        h.encode(&mut bytes);
        self.put_encoded(row, step, bytes)
    }

    fn put_encoded(&mut self, row: usize, step: usize, bytes: Vec<u8>) -> Result<(), QueryError> {
        if self.builder.has_sample(row, step) {
            return Err(same_labels());
        }
        self.memory.try_grow(bytes.len())?;
        self.builder.put_encoded(row, step, bytes);
        Ok(())
    }

    /// Gives a row that has no sample those of another.
    fn copy(&mut self, to: usize, row: &Row<'_>) {
        let (values, valid) = self.builder.row_mut(to);
        values.copy_from_slice(row.values);
        row.validity(valid);
        self.builder.copy_histograms(to, row);
    }

    /// The floats of a row.
    pub(super) fn values(&mut self, row: usize) -> (&mut [f64], &mut [bool]) {
        self.builder.row_mut(row)
    }

    /// Writes a float into a row without histograms; an error when there is one.
    #[inline]
    pub(super) fn put(values: &mut [f64], valid: &mut [bool], step: usize, v: f64) -> Result<(), QueryError> {
        if valid[step] {
            return Err(same_labels());
        }
        valid[step] = true;
        values[step] = v;
        Ok(())
    }

    pub(super) fn finish(self) -> DfResult<Vec<RecordBatch>> {
        self.builder.finish()
    }
}

/// [`Op::Merge`] and [`Op::CleanNames`].
pub(super) async fn merge(work: &Work) -> DfResult<Vec<RecordBatch>> {
    let blocks = work.blocks(0).await?;
    let strict = matches!(work.op, Op::Merge { strict: true });
    let clean = matches!(work.op, Op::CleanNames);
    let (mut merger, mut pace) = (Merger::new(work), work.stop.pace());
    for row in Row::all(&blocks) {
        pace.walk(cost(work.steps()))?;
        let name = if clean && row.drop_name { Name::Drop } else { Name::Keep };
        let (at, known) = merger.row(|out| name.apply(row.labels, row.drop_name, out))?;
        if known && strict {
            return Err(same_labels().into());
        }
        if known && (row.has_histograms() || merger.has_histograms()) {
            (0..work.steps()).try_for_each(|step| merger.put_sample(at, &row, step))?;
        } else if known {
            let (values, valid) = merger.values(at);
            let mut clash = Ok(());
            row.for_each(|step, v| {
                if let Err(e) = Merger::put(values, valid, step, v) {
                    clash = Err(e);
                }
            });
            clash?;
        } else {
            merger.copy(at, &row);
        }
    }
    merger.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_expand_as_in_go() {
        let regex = Regex::new("^(?P<a>[a-z]+)-(.*)$").expect("test pattern");
        let captures = regex.captures("foo-bar").expect("test text");
        let check = |template: &str, expected: &str| {
            let mut out = String::new();
            expand(template, &captures, &mut out);
            assert_eq!(out, expected, "{template}");
        };
        check("$1 ${2}x $a ${a}", "foo barx foo foo");
        check("$1x", "");
        check("$$1 $ ${", "$1 $ ${");
        check("é$2é", "é");
        check("$9", "");
    }
}
