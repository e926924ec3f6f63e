//! Native histograms in scripts: `{{schema:1 count:3 sum:5 buckets:[1 2]}}`.

use serde_json::Value;

use super::{close, number, parse_float};
use crate::harness::remote_write::{field, varint};

/// A histogram as a script describes it; what is not named is zero.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Native {
    schema: i32,
    count: f64,
    sum: f64,
    zero: f64,
    zero_width: f64,
    offset: i32,
    buckets: Vec<f64>,
    negative_offset: i32,
    negative: Vec<f64>,
    bounds: Vec<f64>,
    hint: u64,
}

impl Native {
    /// Reads what stands between the double braces.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut out = Self::default();
        let mut rest = text.trim();
        while !rest.is_empty() {
            let (key, after) = rest.split_once(':').ok_or_else(|| format!("no field in {rest:?}"))?;
            let (value, after) = match after.strip_prefix('[') {
                Some(list) => list.split_once(']').ok_or_else(|| format!("no end of {list:?}"))?,
                None => after.split_once(' ').unwrap_or((after, "")),
            };
            rest = after.trim_start();
            let bad = || format!("{value:?} is no {key}");
            let float = || parse_float(value).ok_or_else(bad);
            let whole = || value.parse::<i32>().map_err(|_| bad());
            let list =
                || value.split_whitespace().map(|v| parse_float(v).ok_or_else(bad)).collect::<Result<Vec<_>, _>>();
            match key {
                "schema" => out.schema = whole()?,
                "count" => out.count = float()?,
                "sum" => out.sum = float()?,
                "z_bucket" => out.zero = float()?,
                "z_bucket_w" => out.zero_width = float()?,
                "offset" => out.offset = whole()?,
                "buckets" => out.buckets = list()?,
                "n_offset" => out.negative_offset = whole()?,
                "n_buckets" => out.negative = list()?,
                "custom_values" => out.bounds = list()?,
                "counter_reset_hint" => {
                    let known = ["unknown", "reset", "not_reset", "gauge"].iter().position(|h| *h == value);
                    out.hint = known.ok_or_else(bad)? as u64;
                }
                other => return Err(format!("{other:?} is no field of a histogram")),
            }
        }
        Ok(out)
    }

    /// The one that marks a series as gone.
    pub(super) fn stale(mark: f64) -> Self {
        Self { sum: mark, ..Self::default() }
    }

    /// With the counts of another added, whose buckets begin at the same one.
    pub(super) fn plus(&self, other: &Self) -> Self {
        let lists = |a: &[f64], b: &[f64]| {
            let at = |list: &[f64], i: usize| list.get(i).copied().unwrap_or(0.0);
            (0..a.len().max(b.len())).map(|i| at(a, i) + at(b, i)).collect()
        };
        Self {
            count: self.count + other.count,
            sum: self.sum + other.sum,
            zero: self.zero + other.zero,
            buckets: lists(&self.buckets, &other.buckets),
            negative: lists(&self.negative, &other.negative),
            ..self.clone()
        }
    }

    /// The protobuf message of remote write, with counts as floats.
    pub(super) fn message(&self, ts: i64) -> Vec<u8> {
        fn double(out: &mut Vec<u8>, number: u8, v: f64) {
            out.push(number << 3 | 1);
            out.extend(v.to_le_bytes());
        }
        fn whole(out: &mut Vec<u8>, number: u64, v: u64) {
            varint(out, number << 3);
            varint(out, v);
        }
        fn zigzag(v: i32) -> u64 {
            u64::from(((v << 1) ^ (v >> 31)) as u32)
        }
        fn long_field(out: &mut Vec<u8>, number: u64, body: &[u8]) {
            varint(out, number << 3 | 2);
            varint(out, body.len() as u64);
            out.extend_from_slice(body);
        }
        let mut out = Vec::new();
        double(&mut out, 2, self.count);
        double(&mut out, 3, self.sum);
        whole(&mut out, 4, zigzag(self.schema));
        double(&mut out, 5, self.zero_width);
        double(&mut out, 7, self.zero);
        let sides = [(8, self.negative_offset, &self.negative), (11, self.offset, &self.buckets)];
        for (number, offset, counts) in sides.into_iter().filter(|s| !s.2.is_empty()) {
            let mut span = Vec::new();
            whole(&mut span, 1, zigzag(offset));
            whole(&mut span, 2, counts.len() as u64);
            field(&mut out, number, &span);
            field(&mut out, number + 2, &counts.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>());
        }
        whole(&mut out, 14, self.hint);
        whole(&mut out, 15, ts as u64);
        if !self.bounds.is_empty() {
            long_field(&mut out, 16, &self.bounds.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>());
        }
        out
    }

    /// The bound of a bucket.
    fn bound(&self, index: i32) -> f64 {
        if self.schema == -53 {
            let at = usize::try_from(index).ok();
            return at.map_or(f64::NEG_INFINITY, |i| self.bounds.get(i).copied().unwrap_or(f64::INFINITY));
        }
        2f64.powf(f64::from(index) * 2f64.powi(-self.schema))
    }

    /// The buckets that hold something, ascending: lower and upper bound, count.
    fn populated(&self) -> Vec<[f64; 3]> {
        let mut out = Vec::new();
        for (index, count) in (self.negative_offset..).zip(&self.negative) {
            out.insert(0, [-self.bound(index), -self.bound(index - 1), *count]);
        }
        out.push([-self.zero_width, self.zero_width, self.zero]);
        for (index, count) in (self.offset..).zip(&self.buckets) {
            out.push([self.bound(index - 1), self.bound(index), *count]);
        }
        out.retain(|b| b[2] != 0.0);
        out
    }

    /// Says how the API's histogram differs.
    pub(super) fn differs(&self, seen: &Value) -> Option<String> {
        let float = |v: &Value| number(v).unwrap_or(f64::NAN);
        for (name, want) in [("count", self.count), ("sum", self.sum)] {
            if !close(want, float(&seen[name])) {
                return Some(format!("expected {name} {want}, got {}", seen[name]));
            }
        }
        let buckets = seen["buckets"].as_array().into_iter().flatten();
        let buckets: Vec<[f64; 3]> = buckets.map(|b| [float(&b[1]), float(&b[2]), float(&b[3])]).collect();
        let want = self.populated();
        let same = want.len() == buckets.len()
            && want.iter().flatten().zip(buckets.iter().flatten()).all(|(a, b)| close(*a, *b));
        (!same).then(|| format!("expected buckets {want:?}, got {buckets:?}"))
    }
}
