//! The operations that plans are made of, as plain data: logical and physical nodes share them, and the codec writes
//! them.

use std::fmt;
use std::hash::{Hash, Hasher};

use catalog::Matcher;
use engine::kernels::{Edges, RangeFunction, Windows};
use serde::{Deserialize, Serialize};

use crate::block::Name;
use crate::labels::Grouping;
use crate::options::Grid;
use crate::parse::Position;
use crate::parse::ast::Cardinality;
use crate::plan::source::Source;

/// A float that is equal to itself and survives any text format: compared and written by its bits.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Float(u64);

impl Float {
    /// Of a value.
    pub fn new(v: f64) -> Self {
        Self(v.to_bits())
    }

    /// The value.
    pub fn get(self) -> f64 {
        f64::from_bits(self.0)
    }
}

impl PartialEq for Float {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl Eq for Float {}

impl Hash for Float {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl PartialOrd for Float {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        self.0.partial_cmp(&other.0)
    }
}

/// Where what a node computes stands in the text, for its notes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Hash, Serialize, Deserialize)]
pub struct Place {
    /// The whole expression.
    pub whole: Position,
    /// The first vector that it takes.
    pub input: Position,
    /// The first scalar that it takes.
    pub param: Position,
    /// What the samples that it looks at count as in the query's statistics.
    pub counts: Counts,
}

/// What the samples count as that a selector looks at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Hash, Serialize, Deserialize)]
pub enum Counts {
    /// Those of each step as that step's.
    #[default]
    Steps,
    /// Those of the only step as every step's.
    Every,
    /// All as those of the query's only step, so many times.
    Together(u64),
    /// Nothing: what is made of them counts.
    Not,
}

/// Which samples a selector reads and when it looks at them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Serialize, Deserialize)]
pub struct Selector {
    /// What is read unless it is `samples` and `histograms`.
    pub source: Option<Source>,
    /// All must hold for the tags there.
    pub matchers: Vec<Matcher>,
    /// How far back each evaluation looks: the lookback or the range.
    pub length_ms: i64,
    /// How much earlier than the evaluation time it looks.
    pub offset_ms: i64,
    /// The evaluation time when it does not follow the grid.
    pub at_ms: Option<i64>,
    /// What stands for values at the edges of the window, and how far around it is looked for.
    pub edges: Option<(Edges, i64)>,
    /// Series used as counters are told by their label `__type__`, not by their name.
    pub by_type: bool,
    /// Of histograms only the count and the sum are looked at, and whether the counter began again.
    pub without_buckets: bool,
}

impl Selector {
    /// The windows that it looks at.
    pub fn windows(&self, grid: &Grid) -> Windows {
        Windows {
            first_end: self.at_ms.unwrap_or(grid.start_ms) - self.offset_ms,
            step: if self.at_ms.is_some() { 0 } else { grid.step_ms },
            count: grid.steps(),
            length: self.length_ms,
        }
    }

    /// First and last millisecond of samples that it can need.
    pub fn reach(&self, grid: &Grid) -> (i64, i64) {
        let windows = self.windows(grid);
        let last = windows.end(windows.count.saturating_sub(1));
        let (before, after) = match self.edges {
            None => (0, 0),
            Some((Edges::Anchored, reach)) => (reach, 0),
            Some((Edges::Smoothed, reach)) => (reach, reach),
        };
        let start = windows.first_end.saturating_sub(windows.length).saturating_sub(before);
        // The sample at a window's open end is not in it, but tells of the first that is whether the counter began again.
        let first = if self.without_buckets { start } else { start.saturating_add(1) };
        (first, last.saturating_add(after))
    }
}

/// What a selector computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Serialize, Deserialize)]
pub enum Reading {
    /// The newest sample.
    Instant,
    /// The time of the newest sample.
    Timestamp,
    /// As `Timestamp`, but a histogram stays one.
    FloatTimestamp,
    /// When the counter of the newest sample began; 0 where nobody said.
    StartTimestamp,
    /// The value between the samples around, of samples up to this many milliseconds away.
    Smoothed(i64),
    /// A function over the samples of the window; scalar arguments are the node's inputs.
    Range(RangeFunction),
}

impl Reading {
    /// Whether it looks at when counters began.
    pub fn needs_starts(self) -> bool {
        use RangeFunction as F;
        matches!(self, Self::StartTimestamp | Self::Range(F::Rate | F::Increase | F::Irate | F::Resets))
    }
}

/// A function over the windows of an inner expression.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Serialize, Deserialize)]
pub struct Subquery {
    /// The times at which the inner expression was evaluated.
    pub inner: Grid,
    /// Length of each window.
    pub length_ms: i64,
    /// How much earlier than the evaluation time it looks.
    pub offset_ms: i64,
    /// The evaluation time when it does not follow the grid.
    pub at_ms: Option<i64>,
    /// The function.
    pub function: RangeFunction,
}

impl Subquery {
    /// The windows that it looks at.
    pub fn windows(&self, grid: &Grid) -> Windows {
        Windows {
            first_end: self.at_ms.unwrap_or(grid.start_ms) - self.offset_ms,
            step: if self.at_ms.is_some() { 0 } else { grid.step_ms },
            count: grid.steps(),
            length: self.length_ms,
        }
    }
}

/// Functions of one value and maybe scalars, applied to each value on its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named as in PromQL")]
pub enum MapFunction {
    Abs,
    Acos,
    Acosh,
    Asin,
    Asinh,
    Atan,
    Atanh,
    Ceil,
    Clamp,
    ClampMax,
    ClampMin,
    Cos,
    Cosh,
    DayOfMonth,
    DayOfWeek,
    DayOfYear,
    DaysInMonth,
    Deg,
    Exp,
    Floor,
    Hour,
    Ln,
    Log10,
    Log2,
    Minute,
    Month,
    /// Unary minus.
    Negate,
    Rad,
    Round,
    Sgn,
    Sin,
    Sinh,
    Sqrt,
    Tan,
    Tanh,
    /// The evaluation time.
    Timestamp,
    Year,
    /// The lesser of two scalars.
    MinOf,
    /// The greater of two scalars.
    MaxOf,
    /// Of a native histogram.
    HistogramAvg,
    /// Of a native histogram.
    HistogramCount,
    /// Of a native histogram.
    HistogramSum,
    /// Of a native histogram.
    HistogramStddev,
    /// Of a native histogram.
    HistogramStdvar,
}

/// Operators between two values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named as in PromQL")]
pub enum BinaryOp {
    Add,
    Sub,
    Mul,
    Div,
    Mod,
    Pow,
    Atan2,
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    /// `</`: what a histogram has below a value.
    TrimUpper,
    /// `>/`: what a histogram has above a value.
    TrimLower,
}

impl BinaryOp {
    /// Whether it cuts off a part of a histogram.
    pub fn is_trim(self) -> bool {
        matches!(self, Self::TrimUpper | Self::TrimLower)
    }

    /// Whether it compares.
    pub fn is_comparison(self) -> bool {
        matches!(self, Self::Eq | Self::Ne | Self::Lt | Self::Le | Self::Gt | Self::Ge)
    }

    /// As it is written.
    pub fn symbol(self) -> &'static str {
        match self {
            Self::TrimUpper => "</",
            Self::TrimLower => ">/",
            Self::Add => "+",
            Self::Sub => "-",
            Self::Mul => "*",
            Self::Div => "/",
            Self::Mod => "%",
            Self::Pow => "^",
            Self::Atan2 => "atan2",
            Self::Eq => "==",
            Self::Ne => "!=",
            Self::Lt => "<",
            Self::Le => "<=",
            Self::Gt => ">",
            Self::Ge => ">=",
        }
    }
}

/// Set operators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named as in PromQL")]
pub enum SetOp {
    And,
    Or,
    Unless,
}

/// Which series of two sides belong together.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Serialize, Deserialize)]
pub struct Matching {
    /// `on` (not without) or `ignoring` (without).
    pub labels: Grouping,
    /// How many of each.
    pub cardinality: Cardinality,
    /// Labels that the result takes from the side of which there is one.
    pub include: Vec<String>,
    /// Value of a left sample that is missing.
    pub fill_left: Option<Float>,
    /// Value of a right sample that is missing.
    pub fill_right: Option<Float>,
}

/// Aggregations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named as in PromQL")]
pub enum AggregateOp {
    Sum,
    Avg,
    Min,
    Max,
    Count,
    Group,
    Stddev,
    Stdvar,
    Quantile,
    Topk,
    Bottomk,
    Limitk,
    LimitRatio,
}

/// Functions over histograms, classic and native.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Serialize, Deserialize)]
pub enum HistogramFunction {
    /// `histogram_quantile` and `histogram_quantiles`: inputs are the quantiles and the buckets.
    Quantile,
    /// `histogram_fraction`: inputs are lower, upper and the buckets.
    Fraction,
    /// `histogram_quantiles`: inputs are the quantiles and the buckets; a label tells the quantile.
    Quantiles(String),
}

/// What a node does.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Serialize, Deserialize)]
pub enum Op {
    /// No series.
    Nothing,
    /// The same number at every step.
    Number(Float),
    /// The evaluation time in seconds.
    Time,
    /// Reads series. Inputs: scalar arguments of the function.
    Select {
        /// Which samples.
        selector: Selector,
        /// What it computes.
        reading: Reading,
        /// What becomes of the metric's name.
        name: Name,
    },
    /// Reads series as they are.
    Samples(Selector),
    /// A function over the windows of an inner expression. Inputs: the inner expression, scalar arguments.
    Subquery {
        /// The windows.
        subquery: Subquery,
        /// What becomes of the metric's name.
        name: Name,
    },
    /// A function of each value. Inputs: the values, scalar arguments.
    Map {
        /// The function.
        function: MapFunction,
        /// What becomes of the metric's name.
        name: Name,
    },
    /// Sets a label from others by a pattern.
    LabelReplace {
        /// The label to set.
        to: String,
        /// Its value, with `$1` and `${name}`.
        replacement: String,
        /// The label to look at.
        from: String,
        /// What it must match.
        pattern: String,
    },
    /// Sets a label to the values of others.
    LabelJoin {
        /// The label to set.
        to: String,
        /// What stands between values.
        separator: String,
        /// The labels to join.
        from: Vec<String>,
    },
    /// A function over buckets.
    Histogram {
        /// The function.
        function: HistogramFunction,
        /// What becomes of the metric's name.
        name: Name,
    },
    /// Adds the labels of info series. Inputs: the series, the times of the info series' samples.
    Info {
        /// Which info series; a matcher of a label that is not the name also says that it is to be added.
        matchers: Vec<Matcher>,
        /// Those of `matchers` that choose by the name.
        names: Vec<Matcher>,
    },
    /// 1 with these labels where the input has nothing.
    Absent {
        /// Canonical tag set.
        labels: Vec<u8>,
    },
    /// The value of the only series, else NaN.
    Scalar,
    /// Orders series by their value; in an instant query only.
    Sort {
        /// Greatest first.
        descending: bool,
    },
    /// Orders series by labels; in an instant query only.
    SortByLabel {
        /// The labels, most important first.
        labels: Vec<String>,
        /// Backwards.
        descending: bool,
    },
    /// An aggregation. Inputs: the values, the parameter if it has one.
    Aggregate {
        /// Which.
        op: AggregateOp,
        /// The groups.
        by: Grouping,
    },
    /// Counts equal values.
    CountValues {
        /// The label that tells the value.
        label: String,
        /// The groups.
        by: Grouping,
    },
    /// An operator between scalars.
    ScalarBinary(BinaryOp),
    /// An operator between a vector (input 0) and a scalar (input 1).
    VectorScalar {
        /// Which.
        op: BinaryOp,
        /// The scalar is the left operand.
        swapped: bool,
        /// A comparison gives 0 or 1 instead of filtering.
        bool: bool,
        /// What becomes of the metric's name.
        name: Name,
    },
    /// An operator between vectors.
    VectorBinary {
        /// Which.
        op: BinaryOp,
        /// A comparison gives 0 or 1 instead of filtering.
        bool: bool,
        /// Which series belong together.
        matching: Matching,
        /// What becomes of the metric's name.
        name: Name,
    },
    /// A set operator between vectors.
    Set {
        /// Which.
        op: SetOp,
        /// Which series belong together.
        labels: Grouping,
    },
    /// The one value of each series at every step.
    Repeat,
    /// Makes one series of those with equal labels; an error when two have a value at the same step.
    Merge {
        /// Equal labels are an error whatever the steps.
        strict: bool,
    },
    /// Removes the names that were marked to go.
    CleanNames,
}

impl Op {
    /// Name of the node in plans.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Nothing => "PromNothing",
            Self::Number(_) => "PromNumber",
            Self::Time => "PromTime",
            Self::Select { .. } => "PromSelect",
            Self::Samples(_) => "PromSamples",
            Self::Subquery { .. } => "PromSubquery",
            Self::Map { .. } => "PromMap",
            Self::LabelReplace { .. } => "PromLabelReplace",
            Self::LabelJoin { .. } => "PromLabelJoin",
            Self::Histogram { .. } => "PromHistogram",
            Self::Info { .. } => "PromInfo",
            Self::Absent { .. } => "PromAbsent",
            Self::Scalar => "PromScalar",
            Self::Sort { .. } | Self::SortByLabel { .. } => "PromSort",
            Self::Aggregate { .. } => "PromAggregate",
            Self::CountValues { .. } => "PromCountValues",
            Self::ScalarBinary(_) | Self::VectorScalar { .. } | Self::VectorBinary { .. } => "PromBinary",
            Self::Set { .. } => "PromSet",
            Self::Repeat => "PromRepeat",
            Self::Merge { .. } => "PromMerge",
            Self::CleanNames => "PromCleanNames",
        }
    }

    /// The line that EXPLAIN shows.
    ///
    /// # Errors
    /// Those of the formatter.
    pub fn explain(&self, grid: &Grid, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.name())?;
        match self {
            Self::Number(v) => write!(f, "{}", v.get())?,
            Self::Select { selector, reading, .. } => {
                match reading {
                    Reading::Range(function) => write!(f, "{function:?} ")?,
                    other => write!(f, "{other:?} ")?,
                }
                explain_selector(selector, f)?;
            }
            Self::Samples(selector) => explain_selector(selector, f)?,
            Self::Subquery { subquery, .. } => {
                write!(f, "{:?} [{}ms:{}ms]", subquery.function, subquery.length_ms, subquery.inner.step_ms)?
            }
            Self::Map { function, .. } => write!(f, "{function:?}")?,
            Self::LabelReplace { to, from, pattern, .. } => write!(f, "{to} from {from} =~ {pattern:?}")?,
            Self::LabelJoin { to, from, .. } => write!(f, "{to} from {from:?}")?,
            Self::Histogram { function, .. } => write!(f, "{function:?}")?,
            Self::Sort { descending } | Self::SortByLabel { descending, .. } => {
                write!(f, "{}", if *descending { "descending" } else { "ascending" })?;
            }
            Self::Aggregate { op, by } => write!(f, "{op:?} {}", grouping(by))?,
            Self::CountValues { label, by } => write!(f, "{label} {}", grouping(by))?,
            Self::ScalarBinary(op) | Self::VectorScalar { op, .. } => write!(f, "{}", op.symbol())?,
            Self::VectorBinary { op, matching, .. } => {
                write!(f, "{} {:?} {}", op.symbol(), matching.cardinality, grouping(&matching.labels))?;
            }
            Self::Set { op, labels } => write!(f, "{op:?} {}", grouping(labels))?,
            Self::Nothing
            | Self::Time
            | Self::Absent { .. }
            | Self::Info { .. }
            | Self::Scalar
            | Self::Repeat
            | Self::Merge { .. }
            | Self::CleanNames => {}
        }
        write!(f, " steps={}", grid.steps())
    }
}

fn grouping(g: &Grouping) -> String {
    format!("{}({})", if g.without { "without" } else { "by" }, g.labels.join(", "))
}

fn explain_selector(selector: &Selector, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    if let Some(source) = &selector.source {
        f.write_str(&source.metric)?;
    }
    f.write_str("{")?;
    for (i, m) in selector.matchers.iter().enumerate() {
        write!(f, "{}{}{}{:?}", if i > 0 { ", " } else { "" }, m.name(), m.op().symbol(), m.value())?;
    }
    write!(f, "}}[{}ms]", selector.length_ms)?;
    match selector.edges {
        Some((Edges::Anchored, _)) => f.write_str(" anchored")?,
        Some((Edges::Smoothed, _)) => f.write_str(" smoothed")?,
        None => {}
    }
    if selector.offset_ms != 0 {
        write!(f, " offset {}ms", selector.offset_ms)?;
    }
    if let Some(at) = selector.at_ms {
        write!(f, " @ {at}ms")?;
    }
    Ok(())
}
