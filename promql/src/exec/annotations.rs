//! What queries say besides their results, in Prometheus's words.

use super::Notes;
use crate::histogram::NanNote;
use crate::parse::{Position, go};

/// How histograms were put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Combining {
    Addition,
    Subtraction,
    Aggregation,
}

impl Combining {
    fn name(self) -> &'static str {
        match self {
            Self::Addition => "addition",
            Self::Subtraction => "subtraction",
            Self::Aggregation => "aggregation",
        }
    }
}

/// A warning or an info. Texts in them are names of metrics, empty where that is not known.
#[derive(Debug, Clone, Copy)]
pub(super) enum Annotation<'a> {
    /// A range with both floats and histograms has no answer.
    MixedFloatsHistograms(&'a str),
    /// Nor has an aggregation.
    MixedInAggregation,
    /// Exponential and custom buckets don't go together.
    MixedSchemas(&'a str),
    NotCounter(&'a str),
    NotGauge(&'a str),
    ResetsCollide(Combining),
    BoundsReconciled(Combining),
    /// A function of floats had histograms in its range.
    IgnoredInMixedRange(&'a str),
    /// An aggregation of floats met histograms.
    IgnoredInAggregation(&'a str),
    /// The types of left and right, and the operator between them.
    IncompatibleTypes(&'a str, &'a str, &'a str),
    /// The operator.
    IncompatibleBuckets(&'a str),
    /// Classic buckets and a native histogram with the same labels.
    MixedClassicNative(&'a str),
    NanObservations(NanNote, &'a str),
    /// The label `le` has this value, of a series of this metric.
    BadBucketLabel(&'a str, &'a str),
}

/// Notes about what stands at a place.
#[derive(Debug, Clone, Copy)]
pub(super) struct NotesAt<'a> {
    pub(super) notes: &'a Notes,
    pub(super) at: Position,
}

impl NotesAt<'_> {
    /// Adds an annotation.
    pub(super) fn annotate(self, annotation: Annotation<'_>) {
        use Annotation as A;
        let named = |text: &str, metric: &str| match metric {
            "" => text.to_owned(),
            metric => format!("{text} for metric name {}", go::quote(metric)),
        };
        let warn = |text: String| self.notes.warn(self.at, text);
        let info = |text: String| self.notes.info(self.at, text);
        match annotation {
            A::MixedFloatsHistograms(metric) => {
                warn(format!("encountered a mix of histograms and floats for metric name {}", go::quote(metric)));
            }
            A::MixedInAggregation => warn("encountered a mix of histograms and floats for aggregation".to_owned()),
            A::MixedSchemas(metric) => warn(format!(
                "vector contains a mix of histograms with exponential and custom buckets schemas for metric name {}",
                go::quote(metric)
            )),
            A::NotCounter(metric) => {
                warn(format!("this native histogram metric is not a counter: {}", go::quote(metric)))
            }
            A::NotGauge(metric) => warn(format!("this native histogram metric is not a gauge: {}", go::quote(metric))),
            A::ResetsCollide(combining) => {
                warn(format!("conflicting counter resets during histogram {}", combining.name()));
            }
            A::BoundsReconciled(combining) => {
                info(format!("mismatched custom buckets were reconciled during {}", combining.name()));
            }
            A::IgnoredInMixedRange(metric) => info(format!(
                "ignored histograms in a range containing both floats and histograms for metric name {}",
                go::quote(metric)
            )),
            A::IgnoredInAggregation(aggregation) => info(format!("ignored histogram in {aggregation} aggregation")),
            A::IncompatibleTypes(left, operator, right) => info(format!(
                "incompatible sample types encountered for binary operator {operator:?}: {left} {operator} {right}"
            )),
            A::IncompatibleBuckets(operator) => {
                warn(format!("incompatible bucket layout encountered for binary operator {operator}"));
            }
            A::MixedClassicNative(metric) => {
                warn(named("vector contains a mix of classic and native histograms", metric));
            }
            A::BadBucketLabel(le, metric) => {
                warn(named(
                    &format!("bucket label \"le\" is missing or has a malformed value of {}", go::quote(le)),
                    metric,
                ));
            }
            A::NanObservations(note, metric) => {
                let text = match note {
                    NanNote::Result => "input to histogram_quantile has NaN observations, result is NaN",
                    NanNote::Skew => "input to histogram_quantile has NaN observations, result is skewed higher",
                    NanNote::Excluded => {
                        "input to histogram_fraction has NaN observations, which are excluded from all fractions"
                    }
                };
                info(named(text, metric));
            }
        }
    }
}
