//! The decimal-linear layout of float columns: most metric values are short decimals that grow along a line.
//!
//! Within a run (rows of one series, at most [`RUN_ROWS_MAX`]) a value is
//! `(base + floor(slope * (ts - t0)) + residual) / 10^scale` with `base`, `slope`, `t0` and `scale` constant over the
//! run; a value that is not exactly that (NaN payloads, -0, infinities, seventeen digits) is kept as a double instead,
//! alone or with its whole run. Every value is checked by its bits when it is encoded, and the formula uses only
//! operations that IEEE 754 rounds in one way, so that any SQL engine reads the same bits back.
//!
//! `t0` is the first millisecond of the file's day and `slope` is a 32-bit float widened to 64 bits: their product with
//! any time of that day is exact, and `t0` costs nothing to store.

use arrow::array::{Array, Float64Array};

/// Most rows of a run. Short enough that a reader of one hour skips most of a day, long enough that parameters cost
/// 0.02 bytes a row.
pub const RUN_ROWS_MAX: usize = 1024;

/// Largest decimal scale.
pub const SCALE_MAX: u8 = 15;

/// 10^scale, all exact in binary64.
pub const POWERS: [f64; SCALE_MAX as usize + 1] =
    [1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15];

/// Scaled values stay below this, so that sums with the linear part are exact integers of a double too.
const SCALED_MAX: f64 = (1u64 << 51) as f64;

/// Adding and subtracting this rounds a double below 2^51 to an integer without a library call.
const ROUNDER: f64 = 6_755_399_441_055_744.0;

/// The parameters of a run of rows.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Params {
    /// Added to the linear part and the residual.
    pub base: i64,
    /// Per millisecond since `t0`; a 32-bit float widened.
    pub slope: f64,
    /// Milliseconds since the epoch.
    pub t0: i64,
    /// Decimal scale, at most [`SCALE_MAX`].
    pub scale: u8,
}

/// A run: its rows and, unless all of them are doubles, its parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Run {
    /// Rows that it holds.
    pub rows: usize,
    /// `None` for a run of doubles.
    pub params: Option<Params>,
}

/// Encoded values, a column of residuals and one of doubles. Rows follow each other as in the input.
#[derive(Debug, Default)]
pub struct Encoded {
    /// The runs, in order.
    pub runs: Vec<Run>,
    /// One per row; 0 where the row is a double.
    pub residuals: Vec<i64>,
    /// One per row; 0 where the row is a residual.
    pub doubles: Vec<f64>,
    /// One per row: true where the row is a double.
    pub is_double: Vec<bool>,
    scaled: Vec<i64>,
}

impl Encoded {
    /// Forgets all rows, keeps the memory.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.residuals.clear();
        self.doubles.clear();
        self.is_double.clear();
    }

    /// Appends the rows of one series, in time order; `t0` as in [`Params`].
    pub fn push_series(&mut self, ts: &[i64], values: &[f64], t0: i64) {
        for (ts, values) in ts.chunks(RUN_ROWS_MAX).zip(values.chunks(RUN_ROWS_MAX)) {
            self.push_run(ts, values, t0);
        }
    }

    fn push_run(&mut self, ts: &[i64], values: &[f64], t0: i64) {
        let rows = values.len();
        let start = self.is_double.len();
        let Some(scale) = scale_of(values) else {
            self.runs.push(Run { rows, params: None });
            self.residuals.resize(start + rows, 0);
            self.doubles.extend_from_slice(values);
            self.is_double.resize(start + rows, true);
            return;
        };
        let power = POWERS[usize::from(scale)];
        self.scaled.clear();
        let mut exceptions = false;
        for v in values {
            let k = scaled(*v, power);
            exceptions |= k.is_none();
            self.is_double.push(k.is_none());
            self.scaled.push(k.unwrap_or(0));
        }
        if exceptions {
            let flags = &self.is_double[start..];
            self.doubles.extend(values.iter().zip(flags).map(|(v, d)| if *d { *v } else { 0.0 }));
        } else {
            self.doubles.resize(start + rows, 0.0);
        }
        let flags = &self.is_double[start..];
        // `scale_of` returned a scale, so at least one row is exact.
        let first = flags.iter().position(|d| !d).unwrap_or(0);
        let last = flags.iter().rposition(|d| !d).unwrap_or(0);
        let slope = slope_of(ts, &self.scaled, flags, first, last, t0);
        let base = self.scaled[first] - linear(slope, ts[first].wrapping_sub(t0));
        if slope == 0.0 {
            self.residuals.extend(self.scaled.iter().zip(flags).map(|(k, d)| if *d { 0 } else { k - base }));
        } else {
            let rows = self.scaled.iter().zip(ts).zip(flags);
            self.residuals
                .extend(rows.map(|((k, t), d)| if *d { 0 } else { k - base - linear(slope, t.wrapping_sub(t0)) }));
        }
        self.runs.push(Run { rows, params: Some(Params { base, slope, t0, scale }) });
    }
}

/// `floor(slope * dt)`; both fit 2^53 when the encoder made them, anything else gives some number.
#[inline]
fn linear(slope: f64, dt: i64) -> i64 {
    let x = slope * dt as f64;
    let i = x as i64;
    i.wrapping_sub(i64::from((i as f64) > x))
}

/// `value * power` when that is an integer which divides back to the same bits.
#[inline]
fn scaled(value: f64, power: f64) -> Option<i64> {
    let x = value * power;
    if x.abs() < SCALED_MAX {
        let k = (x + ROUNDER) - ROUNDER;
        // A whole zero has no sign, so -0 fails here and stays a double.
        let k = k as i64;
        if (k as f64 / power).to_bits() == value.to_bits() {
            return Some(k);
        }
    }
    None
}

/// The smallest scale that makes (nearly) all values exact; `None` when doubles are the better form.
fn scale_of(values: &[f64]) -> Option<u8> {
    let mut scale = 0usize;
    let mut exceptions = 0usize;
    // A double costs some 8 bytes, a residual about one: a run with more exceptions than this is kept whole.
    let allowed = values.len() / 8;
    for v in values {
        if scaled(*v, POWERS[scale]).is_some() {
            continue;
        }
        let higher = if v.is_finite() && *v != 0.0 {
            (scale + 1..POWERS.len()).find(|s| scaled(*v, POWERS[*s]).is_some())
        } else {
            None
        };
        match higher {
            Some(s) => scale = s,
            None => {
                exceptions += 1;
                if exceptions > allowed {
                    return None;
                }
            }
        }
    }
    // A later, larger scale may have pushed earlier values out of range; those become exceptions in the second pass.
    let out = values.iter().filter(|v| scaled(**v, POWERS[scale]).is_none()).count();
    (out <= allowed && out < values.len()).then_some(scale as u8)
}

/// The slope through the first and last exact row when that at least halves the range of residuals, else 0.
fn slope_of(ts: &[i64], scaled: &[i64], is_double: &[bool], first: usize, last: usize, t0: i64) -> f64 {
    let dt = ts[last].wrapping_sub(ts[first]);
    let rise = scaled[last] - scaled[first];
    if dt <= 0 || rise == 0 {
        return 0.0;
    }
    let slope = f64::from((rise as f64 / dt as f64) as f32);
    let reach = ts[last].wrapping_sub(t0).unsigned_abs().max(ts[first].wrapping_sub(t0).unsigned_abs()) as f64;
    // t0 is at most a day away in files of one day; beyond that the product would no longer be exact.
    if reach >= (1u64 << 29) as f64 || (slope * reach).abs() >= SCALED_MAX || slope == 0.0 {
        return 0.0;
    }
    let (mut flat, mut tilted) = ((i64::MAX, i64::MIN), (i64::MAX, i64::MIN));
    for ((k, t), d) in scaled.iter().zip(ts).zip(is_double) {
        if *d {
            continue;
        }
        let r = k - linear(slope, t.wrapping_sub(t0));
        flat = (flat.0.min(*k), flat.1.max(*k));
        tilted = (tilted.0.min(r), tilted.1.max(r));
    }
    if (tilted.1 - tilted.0) * 2 <= flat.1 - flat.0 { slope } else { 0.0 }
}

/// Appends the values of one run's rows. `params` of `None` (a run of doubles) appends zeros for [`patch`] to fill.
///
/// Nothing is assumed of the inputs except equal lengths: damaged ones give wrong values, not a panic.
pub fn decode(params: Option<&Params>, ts: &[i64], residuals: &[i64], out: &mut Vec<f64>) {
    let Some(p) = params else {
        out.resize(out.len() + residuals.len(), 0.0);
        return;
    };
    let power = POWERS[usize::from(p.scale.min(SCALE_MAX))];
    let (base, slope, t0) = (p.base, p.slope, p.t0);
    match (slope == 0.0, p.scale == 0) {
        (true, true) => out.extend(residuals.iter().map(|r| base.wrapping_add(*r) as f64)),
        (true, false) => out.extend(residuals.iter().map(|r| base.wrapping_add(*r) as f64 / power)),
        (false, true) => out.extend(
            residuals
                .iter()
                .zip(ts)
                .map(|(r, t)| base.wrapping_add(linear(slope, t.wrapping_sub(t0))).wrapping_add(*r) as f64),
        ),
        (false, false) => out.extend(
            residuals
                .iter()
                .zip(ts)
                .map(|(r, t)| base.wrapping_add(linear(slope, t.wrapping_sub(t0))).wrapping_add(*r) as f64 / power),
        ),
    }
}

/// Puts the doubles of a column over the values decoded for the same rows.
pub fn patch(doubles: &Float64Array, out: &mut [f64]) {
    let Some(nulls) = doubles.nulls() else {
        out.copy_from_slice(doubles.values());
        return;
    };
    if nulls.null_count() == doubles.len() {
        return;
    }
    for (start, end) in nulls.valid_slices() {
        out[start..end].copy_from_slice(&doubles.values()[start..end]);
    }
}

#[cfg(test)]
mod tests;
