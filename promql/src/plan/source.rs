//! Metrics of other tables than `samples` and `histograms`: which selectors mean them, and what their labels are.
//!
//! A table declares columns whose values are samples of metrics ([`catalog::tables::Metric`]). Such a metric is meant by an
//! equality matcher of its name and by nothing else: a regular expression over names chooses among the series of `samples`
//! and `histograms`, so that `{__name__=~".+"}` does not read every table. The tags of a row are its labels. A tag set
//! with a name of its own, as an exemplar's series has, shows it under the table's label for that.

use std::sync::Arc;

use catalog::tables::{self, Metric};
use catalog::tag::METRIC_NAME;
use catalog::{MatchOp, Matcher, TableSchema};
use serde::{Deserialize, Serialize};

use crate::labels;

/// The column of a table that a selector reads instead of `samples` and `histograms`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Serialize, Deserialize)]
pub struct Source {
    /// Number of the table.
    pub table: u16,
    /// The metric's name.
    pub metric: String,
}

impl Source {
    /// What the matchers of a selector mean: a source unless it is the usual one, and what must hold for tags there.
    pub fn of(matchers: Vec<Matcher>) -> (Option<Self>, Vec<Matcher>) {
        let named = |m: &&Matcher| m.name() == METRIC_NAME && m.op() == MatchOp::Eq;
        let Some((table, metric)) = matchers.iter().find(named).and_then(|m| tables::metric(m.value())) else {
            return (None, matchers);
        };
        // Of `samples` nothing is found either when another matcher wants another name.
        if !matchers.iter().filter(|m| m.name() == METRIC_NAME).all(|m| m.matches(metric.name)) {
            return (None, matchers);
        }
        let of_tags = matchers.into_iter().filter(|m| m.name() != METRIC_NAME);
        let of_tags = of_tags.map(|m| if m.name() == table.name_label { m.of(METRIC_NAME) } else { m });
        (Some(Self { table: table.id, metric: metric.name.to_owned() }), of_tags.collect())
    }

    /// The table and the column; `None` for a source that another version knows.
    pub fn declared(&self) -> Option<(&'static Arc<TableSchema>, &'static Metric)> {
        tables::metric(&self.metric).filter(|(table, _)| table.id == self.table)
    }

    /// The labels of the series with these tags.
    pub fn labels(&self, tags: &[u8]) -> Vec<u8> {
        let own = labels::get(tags, METRIC_NAME);
        let name_label = self.declared().map_or("metric", |(table, _)| table.name_label);
        let (mut with_own, mut out) = (Vec::with_capacity(tags.len() + 32), Vec::with_capacity(tags.len() + 64));
        labels::set(tags, name_label, own, &mut with_own);
        labels::set(&with_own, METRIC_NAME, &self.metric, &mut out);
        out
    }
}

#[cfg(test)]
mod tests {
    use catalog::tag::tag_set;

    use super::*;

    #[test]
    fn equal_names_alone_mean_other_tables() {
        let check = |text: &str, expected: Option<&[(&str, &str)]>| {
            let matchers = crate::parse::parse_selector(text).expect("a selector").selection();
            let (source, rest) = Source::of(matchers.clone());
            assert_eq!(source.is_some(), expected.is_some(), "{text}");
            match expected {
                None => assert_eq!(rest, matchers),
                Some(expected) => {
                    let rest: Vec<_> = rest.iter().map(|m| (m.name(), m.value())).collect();
                    assert_eq!(rest, expected, "{text}");
                }
            }
        };
        check("prometheus__exemplars__value", Some(&[]));
        check(r#"{__name__="prometheus__exemplars__value", job!="x"}"#, Some(&[("job", "x")]));
        check(r#"prometheus__exemplars__value{metric=~"a.*"}"#, Some(&[("__name__", "a.*")]));
        check(r#"{__name__="prometheus__exemplars__value", __name__!="x"}"#, Some(&[]));
        check(r#"{__name__="prometheus__exemplars__value", __name__!~"p.*"}"#, None);
        check(r#"{__name__=~"prometheus__exemplars__value"}"#, None);
        check("prometheus__exemplars__labels", None);
        check("up", None);
    }

    #[test]
    fn names_of_tag_sets_are_shown_under_another_label() {
        let of = |pairs: &[(&str, &str)]| tag_set(pairs).expect("test labels").as_bytes().to_vec();
        let source = Source { table: 3, metric: "prometheus__exemplars__value".into() };
        let name = ("__name__", "prometheus__exemplars__value");
        let check = |tags, expected: &[(&str, &str)]| assert_eq!(source.labels(&of(tags)), of(expected));
        check(&[("__name__", "up"), ("job", "a")], &[name, ("job", "a"), ("metric", "up")]);
        check(&[("__name__", "up"), ("metric", "own")], &[name, ("metric", "up")]);
        check(&[("job", "a")], &[name, ("job", "a")]);
        check(&[], &[name]);
    }
}
