//! Functions over the buckets of classic histograms, which are series each, and over native histograms.

use arrow::array::RecordBatch;
use datafusion::error::Result as DfResult;
use hashbrown::HashMap;

use super::annotations::Annotation;
use super::notes::Forced;
use super::relabel::Merger;
use super::{Work, cost, internal};
use crate::block::{Name, Row};
use crate::labels;
use crate::parse::go;
use crate::plan::ops::{HistogramFunction, Op};

/// One bucket: upper bound and count of observations up to it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Bucket {
    upper: f64,
    count: f64,
}

/// What the functions need besides samples.
struct Functions<'a> {
    work: &'a Work,
    function: &'a HistogramFunction,
    name: Name,
    scalars: Vec<Vec<f64>>,
}

pub(super) async fn execute(work: &Work) -> DfResult<Vec<RecordBatch>> {
    let Op::Histogram { function, name } = &work.op else { return Err(internal("not a histogram function")) };
    let buckets_input = work.inputs.len().saturating_sub(1);
    let mut scalars = Vec::new();
    for input in 0..buckets_input {
        scalars.push(work.scalar_input(input).await?);
    }
    let blocks = work.blocks(buckets_input).await?;
    if *function != HistogramFunction::Fraction {
        scalars.iter().for_each(|q| work.notes.check_quantile(work.place.param, q));
    }
    let functions = Functions { work, function, name: *name, scalars };

    // Series of one classic histogram, by their labels without `le`; native ones by their labels.
    let mut groups: HashMap<Vec<u8>, Vec<(f64, Row<'_>)>> = HashMap::new();
    let mut native: HashMap<&[u8], Row<'_>> = HashMap::new();
    let mut order: Vec<Vec<u8>> = Vec::new();
    let mut native_order: Vec<Row<'_>> = Vec::new();
    let mut key = Vec::new();
    let mut pace = work.stop.pace();
    for row in Row::all(&blocks) {
        pace.walk(cost(0))?;
        if row.has_histograms() {
            native.insert(row.labels, row);
            native_order.push(row);
            let mut any = false;
            row.for_each(|_, _| any = true);
            if !any {
                continue;
            }
        }
        let le = labels::get(row.labels, "le");
        let Some(upper) = parse_bound(le) else {
            let note = Annotation::BadBucketLabel(le, functions.metric(row.labels));
            work.notes_of_input().annotate(note);
            continue;
        };
        key.clear();
        labels::filter(row.labels, &mut key, |n| n != b"le");
        if let Some(group) = groups.get_mut(&key) {
            group.push((upper, row));
        } else {
            order.push(key.clone());
            groups.insert(key.clone(), vec![(upper, row)]);
        }
    }

    let mut merger = Merger::new(work);
    for row in native_order {
        pace.walk(cost(64 * work.steps()))?;
        let classic = groups.get(row.labels);
        functions.native(&row, classic.map_or(&[][..], Vec::as_slice), &mut merger)?;
    }
    for key in order {
        let Some(mut group) = groups.remove(&key) else { continue };
        pace.walk(cost(4 * work.steps() * group.len()))?;
        group.sort_by(|a, b| a.0.total_cmp(&b.0));
        functions.classic(&key, &group, native.get(key.as_slice()), &mut merger)?;
    }
    merger.finish()
}

impl Functions<'_> {
    /// The metric's name for notes, which tell it only while it is there.
    fn metric<'a>(&self, labels: &'a [u8]) -> &'a str {
        if self.name == Name::DropLater { labels::get(labels, "__name__") } else { "" }
    }

    /// How many results a histogram has.
    fn results(&self) -> usize {
        if *self.function == HistogramFunction::Fraction { 1 } else { self.scalars.len() }
    }

    fn scalar(&self, i: usize, step: usize) -> f64 {
        self.scalars.get(i).map_or(f64::NAN, |s| s[step])
    }

    /// The row of a histogram's result `i`. `last` is that of the step before: a quantile that varies has several.
    fn row(
        &self,
        (labels, later): (&[u8], bool),
        (i, step): (usize, usize),
        last: &mut Option<(u64, usize)>,
        merger: &mut Merger,
    ) -> DfResult<usize> {
        let label = match self.function {
            HistogramFunction::Quantiles(label) => Some(label),
            _ => None,
        };
        let bits = label.map_or(0, |_| self.scalar(i, step).to_bits());
        if let Some((_, row)) = last.filter(|(known, _)| *known == bits) {
            return Ok(row);
        }
        let mut labelled = Vec::new();
        let labels = match label {
            Some(label) => {
                labels::set(labels, label, &quantile_label(self.scalar(i, step)), &mut labelled);
                &labelled
            }
            None => labels,
        };
        let (row, _) = merger.row(|out| self.name.apply(labels, later, out))?;
        *last = Some((bits, row));
        Ok(row)
    }

    fn native(&self, row: &Row<'_>, classic: &[(f64, Row<'_>)], merger: &mut Merger) -> DfResult<()> {
        let metric = self.metric(row.labels);
        let note = |note| self.work.notes_of_input().annotate(note);
        let mut last = vec![None; self.results()];
        for step in 0..self.work.steps() {
            let Some(h) = row.histogram(step) else { continue };
            if classic.iter().any(|(_, row)| row.is_valid(step)) {
                note(Annotation::MixedClassicNative(metric));
                continue;
            }
            for (i, last) in last.iter_mut().enumerate() {
                let (v, nan) = match self.function {
                    HistogramFunction::Fraction => h.fraction(self.scalar(0, step), self.scalar(1, step)),
                    _ => h.quantile(self.scalar(i, step)),
                };
                if let Some(nan) = nan {
                    note(Annotation::NanObservations(nan, metric));
                }
                let to = self.row((row.labels, row.drop_name), (i, step), last, merger)?;
                merger.put_float(to, step, v)?;
            }
        }
        Ok(())
    }

    fn classic(
        &self,
        key: &[u8],
        group: &[(f64, Row<'_>)],
        native: Option<&Row<'_>>,
        merger: &mut Merger,
    ) -> DfResult<()> {
        let later = group.iter().any(|(_, row)| row.drop_name);
        let mut forced: Option<Forced> = None;
        let mut last = vec![None; self.results()];
        let mut buckets = Vec::new();
        for step in 0..self.work.steps() {
            if native.is_some_and(|row| row.encoded(step).is_some()) {
                continue;
            }
            for (i, last) in last.iter_mut().enumerate() {
                buckets.clear();
                let counts =
                    group.iter().filter_map(|(upper, row)| Some(Bucket { upper: *upper, count: row.get(step)? }));
                buckets.extend(counts);
                if buckets.is_empty() {
                    break;
                }
                let v = match self.function {
                    HistogramFunction::Fraction => fraction(self.scalar(0, step), self.scalar(1, step), &mut buckets),
                    _ => {
                        let (v, changed) = quantile(self.scalar(i, step), &mut buckets);
                        if let Some(change) = changed {
                            let at = self.work.grid.time(step);
                            let seen = Forced { times: (at, at), ..change };
                            forced = Some(forced.map_or(seen, |known| known.and(seen)));
                        }
                        v
                    }
                };
                let to = self.row((key, later), (i, step), last, merger)?;
                merger.put_float(to, step, v)?;
            }
        }
        if let Some(seen) = forced {
            self.work.notes.forced(self.work.place.input, self.metric(key), seen);
        }
        Ok(())
    }
}

/// A quantile as a label's value: a whole one has a point.
fn quantile_label(q: f64) -> String {
    let text = go::float(q);
    if text.bytes().all(|b| b.is_ascii_digit() || b == b'-') { text + ".0" } else { text }
}

/// A bucket's bound as Go's `ParseFloat` takes it.
fn parse_bound(text: &str) -> Option<f64> {
    text.parse().ok()
}

/// Two values that differ only by what sums in different orders can.
fn almost_equal(a: f64, b: f64) -> bool {
    const TOLERANCE: f64 = 1e-12;
    if a == b {
        return true;
    }
    let (sum, difference) = (a.abs() + b.abs(), (a - b).abs());
    if a == 0.0 || b == 0.0 || sum < f64::MIN_POSITIVE {
        return difference < TOLERANCE * f64::MIN_POSITIVE;
    }
    difference / sum.min(f64::MAX) < TOLERANCE
}

/// Makes counts grow with bounds; says what had to be changed.
fn make_monotonic(buckets: &mut [Bucket]) -> Option<Forced> {
    let mut forced: Option<Forced> = None;
    let mut previous = buckets[0].count;
    for bucket in &mut buckets[1..] {
        if bucket.count == previous {
            continue;
        }
        if almost_equal(previous, bucket.count) {
            bucket.count = previous;
        } else if bucket.count < previous {
            let bounds = (bucket.upper, bucket.upper);
            let seen = Forced { times: (0, 0), bounds, difference: previous - bucket.count, count: 1 };
            forced = Some(Forced { count: 1, ..forced.map_or(seen, |known| known.and(seen)) });
            bucket.count = previous;
        } else {
            previous = bucket.count;
        }
    }
    forced
}

/// The quantile, buckets sorted by bound, at least one; and how counts had to be made to grow.
fn quantile(q: f64, buckets: &mut Vec<Bucket>) -> (f64, Option<Forced>) {
    if q.is_nan() {
        return (f64::NAN, None);
    }
    if q < 0.0 {
        return (f64::NEG_INFINITY, None);
    }
    if q > 1.0 {
        return (f64::INFINITY, None);
    }
    if buckets[buckets.len() - 1].upper != f64::INFINITY {
        return (f64::NAN, None);
    }
    coalesce(buckets);
    let forced = make_monotonic(buckets);
    let last = buckets.len() - 1;
    let observations = buckets[last].count;
    if last < 1 || observations == 0.0 {
        return (f64::NAN, forced);
    }
    let mut rank = q * observations;
    // The first bucket that is not below the rank; NaN counts are below nothing and above nothing.
    let b = search(last, |i| buckets[i].count >= rank);
    if b == last {
        return (buckets[last - 1].upper, forced);
    }
    if b == 0 && buckets[0].upper <= 0.0 {
        return (buckets[0].upper, forced);
    }
    let (mut start, end, mut count) = (0.0, buckets[b].upper, buckets[b].count);
    if b > 0 {
        start = buckets[b - 1].upper;
        count -= buckets[b - 1].count;
        rank -= buckets[b - 1].count;
    }
    (start + (end - start) * (rank / count), forced)
}

/// The least index below `n` for which `holds`, by bisection as if it stayed true from there on; else `n`.
fn search(n: usize, holds: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, n);
    while low < high {
        let middle = (low + high) / 2;
        if holds(middle) { high = middle } else { low = middle + 1 }
    }
    low
}

/// The fraction of observations between two values.
fn fraction(lower: f64, upper: f64, buckets: &mut Vec<Bucket>) -> f64 {
    if buckets[buckets.len() - 1].upper != f64::INFINITY {
        return f64::NAN;
    }
    coalesce(buckets);
    let count = buckets[buckets.len() - 1].count;
    if count == 0.0 || lower.is_nan() || upper.is_nan() {
        return f64::NAN;
    }
    if lower >= upper {
        return 0.0;
    }
    let at = |v: f64| rank_of(v, buckets).filter(|r| *r <= count).unwrap_or(count);
    (at(upper) - at(lower)) / count
}

/// Adds up buckets with equal bounds.
fn coalesce(buckets: &mut Vec<Bucket>) {
    buckets.dedup_by(|next, kept| {
        let same = next.upper == kept.upper;
        if same {
            kept.count += next.count;
        }
        same
    });
}

/// How many observations are below a value, interpolated within its bucket.
fn rank_of(v: f64, buckets: &[Bucket]) -> Option<f64> {
    let mut rank = 0.0;
    let mut low = if buckets[0].upper <= 0.0 { f64::NEG_INFINITY } else { 0.0 };
    for bucket in buckets {
        if low >= v {
            return Some(rank);
        }
        if bucket.upper > v {
            if low == f64::NEG_INFINITY {
                return Some(bucket.count);
            }
            return Some(rank + (bucket.count - rank) * (v - low) / (bucket.upper - low));
        }
        rank = bucket.count;
        low = bucket.upper;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(q: f64, buckets: &[(f64, f64)], expected: f64) {
        let mut buckets: Vec<Bucket> =
            buckets.iter().map(|(upper, count)| Bucket { upper: *upper, count: *count }).collect();
        let got = quantile(q, &mut buckets).0;
        assert!(got == expected || (got.is_nan() && expected.is_nan()), "{q}: {got}, expected {expected}");
    }

    #[test]
    fn quantiles_of_buckets() {
        let inf = f64::INFINITY;
        let b: &[(f64, f64)] = &[(0.1, 10.0), (0.2, 20.0), (inf, 40.0)];
        check(0.25, b, 0.1);
        check(0.5, b, 0.2);
        check(0.375, b, 0.15000000000000002);
        check(0.9, b, 0.2);
        check(-0.1, b, -inf);
        check(1.1, b, inf);
        check(f64::NAN, b, f64::NAN);
        check(0.5, &[(0.1, 10.0), (0.2, 20.0)], f64::NAN);
        check(0.5, &[(inf, 20.0)], f64::NAN);
        check(0.5, &[(0.1, 0.0), (inf, 0.0)], f64::NAN);
        check(0.1, &[(-1.0, 10.0), (inf, 20.0)], -1.0);
        check(1.0, &[(1.0, 10.0), (2.0, 5.0), (inf, 10.0)], 1.0);
    }

    #[test]
    fn fractions_of_buckets() {
        let b = || vec![Bucket { upper: 1.0, count: 10.0 }, Bucket { upper: f64::INFINITY, count: 20.0 }];
        assert_eq!(fraction(0.0, 0.5, &mut b()), 0.25);
        assert_eq!(fraction(0.5, f64::INFINITY, &mut b()), 0.75);
        assert_eq!(fraction(2.0, 1.0, &mut b()), 0.0);
        assert!(fraction(f64::NAN, 1.0, &mut b()).is_nan());
    }
}
