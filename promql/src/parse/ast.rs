//! The syntax tree. Every node knows its place in the text and its type.

use catalog::Matcher;
use serde::{Deserialize, Serialize};

use super::functions::Function;
use crate::result::ValueType;

/// A stretch of the text, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Span {
    /// Its first byte.
    pub start: usize,
    /// The byte after its last.
    pub end: usize,
}

impl Span {
    /// From the start of this one to the end of another.
    pub(super) fn to(self, last: Self) -> Self {
        Self { start: self.start, end: last.end }
    }
}

/// A node.
#[derive(Debug, Clone, PartialEq)]
pub struct Expr {
    /// What it is.
    pub kind: Kind,
    /// Where it stands.
    pub span: Span,
    /// What it evaluates to.
    pub value_type: ValueType,
    /// Levels of nodes, this one included.
    pub(super) depth: usize,
}

/// What a node is.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "named as in PromQL")]
pub enum Kind {
    Number(Number),
    Text(String),
    /// A text whose escapes give no UTF-8.
    Bytes(Vec<u8>),
    Selector(Selector),
    Matrix(Matrix),
    Subquery(Subquery),
    Call(Call),
    Aggregate(Aggregate),
    Unary(Unary),
    Binary(Binary),
    Paren(Box<Expr>),
}

/// A number; a duration is one of seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Number {
    /// Its value.
    pub value: f64,
    /// It was written as a duration.
    pub duration: bool,
}

/// Which series are chosen, and how their samples are looked at.
#[derive(Debug, Clone, PartialEq)]
pub struct Selector {
    /// The metric's name when it stands before the braces.
    pub name: Option<String>,
    /// All matchers; one for `name` is the last.
    pub matchers: Vec<Matcher>,
    /// When it looks.
    pub time: Time,
    /// Values at the edges of the window are read from the samples around.
    pub edges: Option<Edges>,
}

impl Selector {
    /// The matchers to select by: the one for the name, which leaves the fewest series, first.
    pub fn selection(&self) -> Vec<Matcher> {
        let mut matchers = self.matchers.clone();
        if self.name.is_some() {
            matchers.rotate_right(1);
        }
        matchers
    }
}

/// What stands for values at the edges of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edges {
    /// The sample before: `anchored`.
    Anchored,
    /// The line between the samples around: `smoothed`.
    Smoothed,
}

/// When something is looked at, if not at the evaluation time.
#[derive(Debug, Clone, PartialEq)]
pub struct Time {
    /// How much earlier; a fixed 0 if not given.
    pub offset: Length,
    /// The time in place of the evaluation time.
    pub at: Option<At>,
}

impl Default for Time {
    fn default() -> Self {
        Self { offset: Length::Fixed(0), at: None }
    }
}

/// What follows `@`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// A time, milliseconds since the epoch.
    Time(i64),
    /// The query's first evaluation time.
    Start,
    /// The query's last evaluation time.
    End,
}

/// A duration.
#[derive(Debug, Clone, PartialEq)]
pub enum Length {
    /// In milliseconds.
    Fixed(i64),
    /// To be computed.
    Computed(Box<DurationExpr>),
}

/// An expression that gives a duration.
#[derive(Debug, Clone, PartialEq)]
pub struct DurationExpr {
    /// What it is.
    pub kind: DurationKind,
    /// In parentheses.
    pub wrapped: bool,
    /// Where it stands.
    pub span: Span,
}

/// What an expression of a duration is.
#[derive(Debug, Clone, PartialEq)]
pub enum DurationKind {
    /// Seconds.
    Number(Number),
    /// The query's step.
    Step,
    /// From the query's first to its last evaluation time.
    Range,
    /// What stands in parentheses or after a plus.
    Plus(Box<DurationExpr>),
    /// The negative.
    Minus(Box<DurationExpr>),
    /// Of two durations.
    Binary(DurationOp, Box<DurationExpr>, Box<DurationExpr>),
}

/// Operations between durations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as in PromQL")]
pub enum DurationOp {
    Add,
    Sub,
    Mul,
    Div,
    Mod,
    Pow,
    MinOf,
    MaxOf,
}

impl DurationOp {
    /// As it is written.
    pub fn symbol(self) -> &'static str {
        match self {
            Self::Add => "+",
            Self::Sub => "-",
            Self::Mul => "*",
            Self::Div => "/",
            Self::Mod => "%",
            Self::Pow => "^",
            Self::MinOf => "min_of",
            Self::MaxOf => "max_of",
        }
    }
}

/// A range vector: `selector[range]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    /// Which series.
    pub selector: Selector,
    /// The window's length.
    pub range: Length,
}

/// An instant vector evaluated at many times: `expr[range:step]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Subquery {
    /// What is evaluated.
    pub expr: Box<Expr>,
    /// The window's length.
    pub range: Length,
    /// The distance of times.
    pub step: Option<Length>,
    /// When the window ends.
    pub time: Time,
}

/// A call of a function.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// Which.
    pub function: &'static Function,
    /// With what.
    pub args: Vec<Expr>,
}

/// Aggregations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as in PromQL")]
pub enum AggregateOp {
    Sum,
    Avg,
    Count,
    Min,
    Max,
    Group,
    Stddev,
    Stdvar,
    Topk,
    Bottomk,
    CountValues,
    Quantile,
    Limitk,
    LimitRatio,
}

impl AggregateOp {
    const ALL: [Self; 14] = [
        Self::Sum,
        Self::Avg,
        Self::Count,
        Self::Min,
        Self::Max,
        Self::Group,
        Self::Stddev,
        Self::Stdvar,
        Self::Topk,
        Self::Bottomk,
        Self::CountValues,
        Self::Quantile,
        Self::Limitk,
        Self::LimitRatio,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sum => "sum",
            Self::Avg => "avg",
            Self::Count => "count",
            Self::Min => "min",
            Self::Max => "max",
            Self::Group => "group",
            Self::Stddev => "stddev",
            Self::Stdvar => "stdvar",
            Self::Topk => "topk",
            Self::Bottomk => "bottomk",
            Self::CountValues => "count_values",
            Self::Quantile => "quantile",
            Self::Limitk => "limitk",
            Self::LimitRatio => "limit_ratio",
        }
    }

    pub(super) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|op| op.name() == name)
    }

    /// Whether it takes a parameter before the vector.
    pub fn has_param(self) -> bool {
        matches!(
            self,
            Self::Topk | Self::Bottomk | Self::CountValues | Self::Quantile | Self::Limitk | Self::LimitRatio
        )
    }

    /// Whether it is of the experimental functions.
    pub fn is_experimental(self) -> bool {
        matches!(self, Self::Limitk | Self::LimitRatio)
    }
}

/// An aggregation.
#[derive(Debug, Clone, PartialEq)]
pub struct Aggregate {
    /// Which.
    pub op: AggregateOp,
    /// What is aggregated.
    pub expr: Box<Expr>,
    /// The parameter of those that take one.
    pub param: Option<Box<Expr>>,
    /// The labels of `by` or `without`.
    pub labels: Vec<String>,
    /// The labels are those that go.
    pub without: bool,
}

/// A sign before an expression.
#[derive(Debug, Clone, PartialEq)]
pub struct Unary {
    /// The sign is a minus.
    pub negative: bool,
    /// What it stands before.
    pub expr: Box<Expr>,
}

/// Operators between expressions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as in PromQL")]
pub enum Operator {
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
    /// Without the observations above a value: `</`.
    TrimUpper,
    /// Without the observations below a value: `>/`.
    TrimLower,
    And,
    Or,
    Unless,
}

impl Operator {
    /// As it is written.
    pub fn symbol(self) -> &'static str {
        match self {
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
            Self::TrimUpper => "</",
            Self::TrimLower => ">/",
            Self::And => "and",
            Self::Or => "or",
            Self::Unless => "unless",
        }
    }

    /// Whether it compares; trimming does not.
    pub fn is_comparison(self) -> bool {
        matches!(self, Self::Eq | Self::Ne | Self::Lt | Self::Le | Self::Gt | Self::Ge)
    }

    /// Whether it is `and`, `or` or `unless`.
    pub fn is_set(self) -> bool {
        matches!(self, Self::And | Self::Or | Self::Unless)
    }

    /// How strongly it binds.
    pub(super) fn precedence(self) -> u8 {
        match self {
            Self::Or => 1,
            Self::And | Self::Unless => 2,
            Self::Eq | Self::Ne | Self::Lt | Self::Le | Self::Gt | Self::Ge | Self::TrimUpper | Self::TrimLower => 3,
            Self::Add | Self::Sub => 4,
            Self::Mul | Self::Div | Self::Mod | Self::Atan2 => 5,
            Self::Pow => 6,
        }
    }
}

/// An operator between two expressions.
#[derive(Debug, Clone, PartialEq)]
pub struct Binary {
    /// Which.
    pub op: Operator,
    /// Where the operator stands.
    pub op_span: Span,
    /// Its left side.
    pub left: Box<Expr>,
    /// Its right side.
    pub right: Box<Expr>,
    /// A comparison gives 0 or 1 instead of filtering.
    pub returns_bool: bool,
    /// Which series belong together, if both sides are vectors.
    pub matching: Option<Matching>,
}

/// How many series of a match group may be on each side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Serialize, Deserialize)]
pub enum Cardinality {
    /// One on each.
    OneToOne,
    /// Many on the left: `group_left`.
    ManyToOne,
    /// Many on the right: `group_right`.
    OneToMany,
    /// Many on each: the set operators.
    ManyToMany,
}

impl Cardinality {
    /// As the syntax tree's JSON has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::OneToOne => "one-to-one",
            Self::ManyToOne => "many-to-one",
            Self::OneToMany => "one-to-many",
            Self::ManyToMany => "many-to-many",
        }
    }
}

/// Which series of two sides belong together.
#[derive(Debug, Clone, PartialEq)]
pub struct Matching {
    /// How many of each.
    pub cardinality: Cardinality,
    /// The labels of `on` or `ignoring`.
    pub labels: Vec<String>,
    /// The labels are those of `on`.
    pub on: bool,
    /// Labels that the result takes from the side of which there is one.
    pub include: Vec<String>,
    /// Value of a left sample that is missing.
    pub fill_left: Option<f64>,
    /// Value of a right sample that is missing.
    pub fill_right: Option<f64>,
}

impl Expr {
    /// Without parentheses.
    pub fn bare(&self) -> &Self {
        let mut expr = self;
        while let Kind::Paren(inner) = &expr.kind {
            expr = inner;
        }
        expr
    }

    /// The expressions that it is made of, in the order of the text.
    pub fn children(&self) -> impl Iterator<Item = &Self> {
        let (pair, list): ([Option<&Self>; 2], &[Self]) = match &self.kind {
            Kind::Number(_) | Kind::Text(_) | Kind::Bytes(_) | Kind::Selector(_) | Kind::Matrix(_) => {
                ([None, None], &[])
            }
            Kind::Subquery(s) => ([Some(&s.expr), None], &[]),
            Kind::Call(c) => ([None, None], &c.args),
            Kind::Aggregate(a) => ([a.param.as_deref(), Some(&a.expr)], &[]),
            Kind::Unary(u) => ([Some(&u.expr), None], &[]),
            Kind::Binary(b) => ([Some(&b.left), Some(&b.right)], &[]),
            Kind::Paren(inner) => ([Some(inner), None], &[]),
        };
        pair.into_iter().flatten().chain(list)
    }

    /// Calls `f` for each selector in it.
    pub fn selectors<'a>(&'a self, f: &mut impl FnMut(&'a Selector)) {
        match &self.kind {
            Kind::Selector(s) => f(s),
            Kind::Matrix(m) => f(&m.selector),
            _ => self.children().for_each(|child| child.selectors(f)),
        }
    }
}
