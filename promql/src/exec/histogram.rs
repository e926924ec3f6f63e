//! Functions over the buckets of classic histograms, which are series each, and over native histograms.

use arrow::array::RecordBatch;
use datafusion::error::Result as DfResult;
use engine::kernels::buckets::{Bucket, fraction, quantile};
use hashbrown::HashMap;

use super::annotations::Annotation;
use super::notes::Forced;
use super::relabel::Merger;
use super::{Work, cost, internal};
use crate::block::{Name, Row};
use crate::labels;
use crate::parse::go;
use crate::plan::ops::{HistogramFunction, Op};

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
                        let (v, mended) = quantile(self.scalar(i, step), &mut buckets);
                        if let Some(mended) = mended {
                            let at = self.work.grid.time(step);
                            let (bounds, difference) = (mended.bounds, mended.difference);
                            let seen = Forced { times: (at, at), bounds, difference, count: 1 };
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
