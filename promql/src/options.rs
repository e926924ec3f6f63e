//! How a query is evaluated: its time grid, its limits and the switches of the language.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The times at which an expression is evaluated: `start`, `start + step`, ... up to `end`, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Serialize, Deserialize)]
pub struct Grid {
    /// First time.
    pub start_ms: i64,
    /// No time is later than this.
    pub end_ms: i64,
    /// Distance of times, at least 1.
    pub step_ms: i64,
}

impl Grid {
    /// A grid of the one time `at_ms`.
    pub fn instant(at_ms: i64) -> Self {
        Self { start_ms: at_ms, end_ms: at_ms, step_ms: 1 }
    }

    /// How many times.
    pub fn steps(&self) -> usize {
        if self.end_ms < self.start_ms {
            return 0;
        }
        (self.end_ms - self.start_ms) as usize / self.step_ms.max(1) as usize + 1
    }

    /// The time of a step.
    pub fn time(&self, step: usize) -> i64 {
        self.start_ms + step as i64 * self.step_ms
    }
}

/// Switches of the language; all off is Prometheus 3 as it comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Serialize, Deserialize)]
pub struct Features {
    /// Functions and aggregations that Prometheus calls experimental.
    pub experimental_functions: bool,
    /// Metric names are dropped from the result only, not by each operation.
    pub delayed_name_removal: bool,
    /// The modifiers `anchored` and `smoothed`.
    pub extended_range_selectors: bool,
    /// The modifiers `fill`, `fill_left` and `fill_right`.
    pub binop_fill_modifiers: bool,
    /// A metric's `__type__` says whether it is a counter, not its name.
    pub type_and_unit_labels: bool,
}

type Switch = fn(&mut Features) -> &mut bool;

/// The switches by the names that Prometheus's `--enable-feature` has for them.
const FEATURES: [(&str, Switch); 5] = [
    ("promql-experimental-functions", |f| &mut f.experimental_functions),
    ("promql-delayed-name-removal", |f| &mut f.delayed_name_removal),
    ("promql-extended-range-selectors", |f| &mut f.extended_range_selectors),
    ("promql-binop-fill-modifiers", |f| &mut f.binop_fill_modifiers),
    ("type-and-unit-labels", |f| &mut f.type_and_unit_labels),
];

impl FromStr for Features {
    type Err = String;

    /// Reads names with commas between them.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut features = Self::default();
        for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            let (_, switch) = FEATURES.iter().find(|(known, _)| *known == name).ok_or_else(|| {
                let known = FEATURES.map(|(name, _)| name).join(", ");
                format!("{name:?} is no feature of PromQL; there are {known}")
            })?;
            *switch(&mut features) = true;
        }
        Ok(features)
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut copy = *self;
        let names: Vec<&str> =
            FEATURES.iter().filter(|(_, switch)| *switch(&mut copy)).map(|(name, _)| *name).collect();
        f.write_str(&names.join(","))
    }
}

/// What one request may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most samples that a query may hold in memory at a time, values of its inner expressions and of its answer
    /// among them.
    pub samples_max: usize,
    /// Most points of one series that a range query may ask for, the first not counted.
    pub points_max: usize,
    /// Most steps at which a subquery may evaluate its inner expression: a row of them is held in memory per series.
    pub subquery_steps_max: usize,
    /// Most samples of an answer to a remote read that is not a stream.
    pub read_samples_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            samples_max: 50_000_000,
            points_max: 11_000,
            subquery_steps_max: 2_000_000,
            read_samples_max: 50_000_000,
        }
    }
}

/// How a server evaluates queries where a request does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// How far an instant selector looks back, in milliseconds.
    pub lookback_ms: i64,
    /// Switches of the language.
    pub features: Features,
    /// What one request may ask for.
    pub limits: Limits,
}

impl Default for Settings {
    fn default() -> Self {
        Self { lookback_ms: 300_000, features: Features::default(), limits: Limits::default() }
    }
}

/// How one query is evaluated.
#[derive(Debug, Clone)]
pub struct EvalOptions {
    /// First evaluation time, milliseconds since the epoch.
    pub start_ms: i64,
    /// Last evaluation time. Equal to `start_ms` for an instant query.
    pub end_ms: i64,
    /// Distance of evaluation times; not looked at in an instant query.
    pub step_ms: i64,
    /// True for an instant query: the result of a vector is a vector and not a matrix, a range vector may be the result.
    pub instant: bool,
    /// How far an instant selector looks back.
    pub lookback_ms: i64,
    /// Step of subqueries that do not give one.
    pub default_step_ms: i64,
    /// Switches of the language.
    pub features: Features,
    /// What it may ask for.
    pub limits: Limits,
    /// The samples that it looks at are counted, for each step.
    pub counts: bool,
}

impl EvalOptions {
    /// An instant query at a time.
    pub fn instant(at_ms: i64) -> Self {
        Self::range(at_ms, at_ms, 1).with_instant()
    }

    /// A range query.
    pub fn range(start_ms: i64, end_ms: i64, step_ms: i64) -> Self {
        Self {
            start_ms,
            end_ms,
            step_ms,
            instant: false,
            lookback_ms: 300_000,
            default_step_ms: 60_000,
            features: Features::default(),
            limits: Limits::default(),
            counts: false,
        }
    }

    fn with_instant(mut self) -> Self {
        self.instant = true;
        self
    }

    /// As a server with these settings evaluates it.
    #[must_use]
    pub fn under(mut self, settings: &Settings) -> Self {
        let Settings { lookback_ms, features, limits } = *settings;
        (self.lookback_ms, self.features, self.limits) = (lookback_ms, features, limits);
        self
    }

    /// The evaluation times.
    pub fn grid(&self) -> Grid {
        if self.instant {
            return Grid::instant(self.start_ms);
        }
        Grid { start_ms: self.start_ms, end_ms: self.end_ms, step_ms: self.step_ms.max(1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_have_names() {
        let text = "promql-experimental-functions,promql-extended-range-selectors";
        let features: Features = text.parse().expect("known names");
        assert_eq!(features.to_string(), text);
        assert!(features.experimental_functions && !features.delayed_name_removal);
        assert_eq!("".parse(), Ok(Features::default()));
        assert!("promql-x".parse::<Features>().is_err_and(|e| e.contains("promql-delayed-name-removal")));
    }
}
