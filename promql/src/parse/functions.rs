//! The functions of the language: names and types.

use crate::result::ValueType;

/// A function as calls are checked against it.
#[derive(Debug, PartialEq, Eq)]
pub struct Function {
    /// Its name.
    pub name: &'static str,
    /// Types of its arguments; the last is also that of further ones.
    pub args: &'static [ValueType],
    /// How many arguments may be missing or added at the end: 0 none, -1 any number.
    pub variadic: i8,
    /// What it gives.
    pub returns: ValueType,
    /// It is there only when experimental functions are asked for.
    pub experimental: bool,
}

/// The function of a name.
pub fn function(name: &str) -> Option<&'static Function> {
    FUNCTIONS.binary_search_by(|f| f.name.cmp(name)).ok().map(|at| &FUNCTIONS[at])
}

const fn of(name: &'static str, args: &'static [ValueType], returns: ValueType) -> Function {
    Function { name, args, variadic: 0, returns, experimental: false }
}

impl Function {
    const fn variadic(mut self, variadic: i8) -> Self {
        self.variadic = variadic;
        self
    }

    const fn experimental(mut self) -> Self {
        self.experimental = true;
        self
    }
}

use ValueType::{Matrix as M, Scalar as S, String as T, Vector as V};

/// Sorted by name.
static FUNCTIONS: &[Function] = &[
    of("abs", &[V], V),
    of("absent", &[V], V),
    of("absent_over_time", &[M], V),
    of("acos", &[V], V),
    of("acosh", &[V], V),
    of("asin", &[V], V),
    of("asinh", &[V], V),
    of("atan", &[V], V),
    of("atanh", &[V], V),
    of("avg_over_time", &[M], V),
    of("ceil", &[V], V),
    of("changes", &[M], V),
    of("clamp", &[V, S, S], V),
    of("clamp_max", &[V, S], V),
    of("clamp_min", &[V, S], V),
    of("cos", &[V], V),
    of("cosh", &[V], V),
    of("count_over_time", &[M], V),
    of("day_of_month", &[V], V).variadic(1),
    of("day_of_week", &[V], V).variadic(1),
    of("day_of_year", &[V], V).variadic(1),
    of("days_in_month", &[V], V).variadic(1),
    of("deg", &[V], V),
    of("delta", &[M], V),
    of("deriv", &[M], V),
    of("double_exponential_smoothing", &[M, S, S], V).experimental(),
    of("end", &[], S).experimental(),
    of("exp", &[V], V),
    of("first_over_time", &[M], V),
    of("floor", &[V], V),
    of("histogram_avg", &[V], V),
    of("histogram_count", &[V], V),
    of("histogram_fraction", &[S, S, V], V),
    of("histogram_quantile", &[S, V], V),
    of("histogram_quantiles", &[V, T, S, S], V).variadic(9).experimental(),
    of("histogram_stddev", &[V], V),
    of("histogram_stdvar", &[V], V),
    of("histogram_sum", &[V], V),
    of("hour", &[V], V).variadic(1),
    of("idelta", &[M], V),
    of("increase", &[M], V),
    of("info", &[V, V], V).variadic(1).experimental(),
    of("irate", &[M], V),
    of("label_join", &[V, T, T, T], V).variadic(-1),
    of("label_replace", &[V, T, T, T, T], V),
    of("last_over_time", &[M], V),
    of("ln", &[V], V),
    of("log10", &[V], V),
    of("log2", &[V], V),
    of("mad_over_time", &[M], V).experimental(),
    of("max_of", &[S, S], S).experimental(),
    of("max_over_time", &[M], V),
    of("min_of", &[S, S], S).experimental(),
    of("min_over_time", &[M], V),
    of("minute", &[V], V).variadic(1),
    of("month", &[V], V).variadic(1),
    of("pi", &[], S),
    of("predict_linear", &[M, S], V),
    of("present_over_time", &[M], V),
    of("quantile_over_time", &[S, M], V),
    of("rad", &[V], V),
    of("range", &[], S).experimental(),
    of("rate", &[M], V),
    of("resets", &[M], V),
    of("round", &[V, S], V).variadic(1),
    of("scalar", &[V], S),
    of("sgn", &[V], V),
    of("sin", &[V], V),
    of("sinh", &[V], V),
    of("sort", &[V], V),
    of("sort_by_label", &[V, T], V).variadic(-1).experimental(),
    of("sort_by_label_desc", &[V, T], V).variadic(-1).experimental(),
    of("sort_desc", &[V], V),
    of("sqrt", &[V], V),
    of("start", &[], S).experimental(),
    of("start_timestamp", &[V], V).experimental(),
    of("stddev_over_time", &[M], V),
    of("stdvar_over_time", &[M], V),
    of("step", &[], S).experimental(),
    of("sum_over_time", &[M], V),
    of("tan", &[V], V),
    of("tanh", &[V], V),
    of("time", &[], S),
    of("timestamp", &[V], V),
    of("ts_of_first_over_time", &[M], V).experimental(),
    of("ts_of_last_over_time", &[M], V).experimental(),
    of("ts_of_max_over_time", &[M], V).experimental(),
    of("ts_of_min_over_time", &[M], V).experimental(),
    of("vector", &[S], V),
    of("year", &[V], V).variadic(1),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found() {
        assert!(FUNCTIONS.windows(2).all(|w| w[0].name < w[1].name));
        assert_eq!(function("rate").map(|f| f.args), Some(&[M][..]));
        assert_eq!(function("rates"), None);
    }
}
