//! `info`: adds the labels of info series, such as `target_info`, to series of the same instance and job.
//!
//! Input 0 are the series, input 1 the times of the newest samples of the info series, in seconds. Which info series a
//! series gets labels from may differ from step to step, so one may become several.

use arrow::array::RecordBatch;
use catalog::Matcher;
use datafusion::error::Result as DfResult;
use hashbrown::{HashMap, HashSet};

use super::relabel::Merger;
use super::{Work, internal};
use crate::QueryError;
use crate::block::Row;
use crate::labels::{self, Pairs};
use crate::plan::ops::Op;

/// Labels that say what a series is about.
const IDENTIFYING: [&str; 2] = ["instance", "job"];

pub(super) async fn execute(work: &Work) -> DfResult<Vec<RecordBatch>> {
    let Op::Info { matchers, names } = &work.op else { return Err(internal("not info")) };
    let (base, info) = futures::try_join!(work.blocks(0), work.blocks(1))?;
    let is_info = |row: &Row<'_>| names.iter().all(|m| m.matches(labels::get(row.labels, "__name__")));

    // Info series have those instances and jobs that the series have.
    let mut known: [HashSet<&str>; 2] = Default::default();
    for row in Row::all(&base).filter(|row| !is_info(row)) {
        for (values, label) in known.iter_mut().zip(IDENTIFYING) {
            values.extend(Some(labels::get(row.labels, label)).filter(|v| !v.is_empty()));
        }
    }
    let any = known.iter().any(|values| !values.is_empty());
    let wanted = |row: &Row<'_>| {
        let mut pairs = known.iter().zip(IDENTIFYING);
        any && pairs.all(|(values, label)| values.is_empty() || values.contains(labels::get(row.labels, label)))
    };
    // Info series by what they are about, those of one name together.
    let mut groups: HashMap<(&str, &str), Vec<Group<'_>>> = HashMap::new();
    for row in Row::all(&info).filter(wanted) {
        if row.has_histograms() {
            let labels = labels::display(row.labels);
            let text = format!("this should be an info metric, with float samples: {labels}");
            return Err(QueryError::execution(text).into());
        }
        let name = labels::get(row.labels, "__name__");
        let all = groups.entry(identity(row.labels)).or_default();
        match all.iter_mut().find(|g| g.name == name) {
            Some(group) => group.rows.push(row),
            None => all.push(Group { name, rows: vec![row] }),
        }
    }
    let mut present = vec![false; work.steps()];
    for row in Row::all(&base) {
        row.for_each_sample(|step| present[step] = true);
    }
    for group in groups.values().flatten().filter(|g| g.rows.len() > 1) {
        for step in (0..work.steps()).filter(|step| present[*step]) {
            group.check(step)?;
        }
    }

    let unmatched_stays = matchers.iter().all(|m| m.matches(""));
    let mut merger = Merger::new(work);
    let mut chosen: Vec<Row<'_>> = Vec::new();
    for row in Row::all(&base) {
        let ignored = is_info(&row);
        let about = groups.get(&identity(row.labels)).map_or(&[][..], Vec::as_slice);
        // The row of the last step goes on as long as the same info series are the newest.
        let mut target: Option<(Vec<*const u8>, usize)> = None;
        for step in 0..work.steps() {
            if !row.has_sample(step) {
                continue;
            }
            chosen.clear();
            if !ignored {
                chosen.extend(about.iter().filter_map(|group| group.newest(step)));
                if chosen.is_empty() && !unmatched_stays {
                    continue;
                }
            }
            let same: Vec<*const u8> = chosen.iter().map(|c| c.labels.as_ptr()).collect();
            let at = match &target {
                Some((known, at)) if *known == same => *at,
                _ => {
                    let joined = joined(row.labels, &chosen, matchers)?;
                    let (at, _) = merger.row(|out| {
                        out.extend_from_slice(&joined);
                        row.drop_name
                    })?;
                    target = Some((same, at));
                    at
                }
            };
            merger.put_sample(at, &row, step)?;
        }
    }
    merger.finish()
}

/// What a series is about.
fn identity(labels: &[u8]) -> (&str, &str) {
    (labels::get(labels, IDENTIFYING[0]), labels::get(labels, IDENTIFYING[1]))
}

/// Info series of one name that are about the same.
struct Group<'a> {
    name: &'a str,
    rows: Vec<Row<'a>>,
}

impl<'a> Group<'a> {
    /// The series with the newest sample at a step.
    fn newest(&self, step: usize) -> Option<Row<'a>> {
        let present = self.rows.iter().filter(|row| row.is_valid(step));
        present.max_by(|a, b| a.values[step].total_cmp(&b.values[step])).copied()
    }

    /// Of two newest samples neither is to be preferred.
    fn check(&self, step: usize) -> Result<(), QueryError> {
        let Some(newest) = self.newest(step) else { return Ok(()) };
        let at = newest.values[step];
        let mut same = self.rows.iter().filter(|row| row.get(step) == Some(at));
        let (Some(first), Some(second)) = (same.next(), same.next()) else { return Ok(()) };
        let ms = (at * 1000.0).round() as i64;
        Err(QueryError::execution(format!(
            "found duplicate series for info metric: existing {} @ {ms}, new {} @ {ms}",
            labels::display(first.labels),
            labels::display(second.labels)
        )))
    }
}

/// The labels of a series with those of info series that it does not have.
fn joined(base: &[u8], info: &[Row<'_>], matchers: &[Matcher]) -> Result<Vec<u8>, QueryError> {
    let mut added: Vec<(&str, &str)> = Vec::new();
    for pair in info.iter().flat_map(|row| Pairs::new(row.labels)) {
        let (Ok(name), Ok(value)) = (std::str::from_utf8(pair.name), std::str::from_utf8(pair.value)) else { continue };
        if name == "__name__" || !(matchers.is_empty() || matchers.iter().any(|m| m.name() == name)) {
            continue;
        }
        match added.iter().find(|(known, _)| *known == name) {
            Some((_, other)) if *other != value => {
                return Err(QueryError::execution(format!("conflicting label: {name}")));
            }
            Some(_) => {}
            None if labels::get(base, name).is_empty() => added.push((name, value)),
            None => {}
        }
    }
    let mut out = base.to_vec();
    for (name, value) in added {
        let mut next = Vec::with_capacity(out.len() + name.len() + value.len() + 4);
        labels::set(&out, name, value, &mut next);
        out = next;
    }
    Ok(out)
}
