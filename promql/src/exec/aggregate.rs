//! Aggregations that need one pass: values go straight into [group x step] arrays, one set of arrays per input partition,
//! which are then added up in the order of partitions.

use std::ops::Range;

use arrow::array::RecordBatch;
use datafusion::error::Result as DfResult;
use engine::kernels::kahan_add;
use hashbrown::HashMap;
use hashbrown::hash_map::Entry;

use super::annotations::{Annotation, Combining, NotesAt};
use super::{Pace, Work, cost, internal, topk};
use crate::block::{BlockBuilder, Row, rows_per_batch};
use crate::histogram::{Added, FloatHistogram, Hint, Incompatible, Mean, Sum};
use crate::labels::{self, Grouping};
use crate::plan::ops::{AggregateOp, Op};

pub(super) async fn execute(work: &Work) -> DfResult<Vec<RecordBatch>> {
    let Op::Aggregate { op, by } = &work.op else { return Err(internal("not an aggregation")) };
    let (op, by) = (*op, by.clone());
    match op {
        AggregateOp::Quantile => return topk::quantiles(work, &by).await,
        AggregateOp::Topk | AggregateOp::Bottomk | AggregateOp::Limitk | AggregateOp::LimitRatio => {
            return topk::select(work, op, &by).await;
        }
        _ => {}
    }
    let (steps, notes, at, memory) = (work.steps(), work.notes.clone(), work.place.input, work.memory.clone());
    let mut partials = work
        .fold(0, move |partial: &mut Option<Partial>, block| {
            let partial = partial.get_or_insert_with(|| Partial::new(op, by.clone(), steps));
            let (before, native_before) = (partial.groups.labels.len(), partial.native.len());
            for row in 0..block.len() {
                let row = Row::of(&block, row);
                let group = partial.add(&row);
                if row.has_histograms() {
                    partial.add_histograms(group, &row, NotesAt { notes: &notes, at });
                }
            }
            let groups = partial.groups.labels.len() - before;
            notes.hold(groups * steps)?;
            memory.try_grow(groups * group_bytes(steps))?;
            memory.try_grow((partial.native.len() - native_before) * NATIVE_BYTES)?;
            Ok(())
        })
        .await?
        .into_iter()
        .flatten();
    let Some(mut all) = partials.next() else { return Ok(vec![]) };
    let mut pace = work.stop.pace();
    for partial in partials {
        // At worst all its groups are new, and it is there until it has been added.
        let twice = partial.groups.labels.len() * group_bytes(steps);
        work.hold(twice)?;
        all.merge(partial, work.notes_of_input(), &mut pace)?;
        work.memory.shrink(twice);
    }
    all.finish(work)
}

/// What a group takes, about: counts, sums and compensations, and labels.
fn group_bytes(steps: usize) -> usize {
    steps * 3 * size_of::<f64>() + 256
}

/// What the sum of histograms takes, about.
const NATIVE_BYTES: usize = 4 << 10;

/// Numbers groups by their labels in order of appearance.
#[derive(Debug)]
pub(super) struct Groups {
    by: Grouping,
    index: HashMap<Vec<u8>, u32>,
    /// Labels and whether the name goes later.
    pub(super) labels: Vec<(Vec<u8>, bool)>,
    key: Vec<u8>,
    last: Option<u32>,
}

impl Groups {
    pub(super) fn new(by: Grouping) -> Self {
        Self { by, index: HashMap::new(), labels: Vec::new(), key: Vec::new(), last: None }
    }

    /// The group of a series.
    #[inline]
    pub(super) fn of(&mut self, labels: &[u8], drop_name: bool) -> u32 {
        self.key.clear();
        self.by.key(labels, &mut self.key);
        self.of_key(drop_name)
    }

    fn of_key(&mut self, drop_name: bool) -> u32 {
        // Series that are stored together are often of one group.
        let group = match self.last {
            Some(last) if self.labels[last as usize].0 == self.key => last,
            _ => match self.index.get(&self.key) {
                Some(group) => *group,
                None => {
                    let group = self.labels.len() as u32;
                    self.labels.push((self.key.clone(), false));
                    self.index.insert(self.key.clone(), group);
                    group
                }
            },
        };
        self.last = Some(group);
        self.labels[group as usize].1 |= drop_name;
        group
    }
}

/// The state of an aggregation over some series. What the arrays mean depends on the operation.
#[derive(Debug)]
struct Partial {
    op: AggregateOp,
    groups: Groups,
    steps: usize,
    groups_per_page: usize,
    /// The cells of all groups, in order. A page never moves: growing arrays would take three times their size for a moment.
    pages: Vec<Page>,
    /// By cell, which is group times steps plus step: means, with compensation, of cells whose sum overflows.
    means: HashMap<usize, (f64, f64)>,
    /// Sums and means of histograms.
    native: HashMap<usize, Native>,
}

/// The cells of some groups: one per step, group by group.
#[derive(Debug, Default)]
struct Page {
    /// Values seen.
    n: Vec<f64>,
    /// Sum, least or greatest value, or mean.
    a: Vec<f64>,
    /// Compensation of the sum, or sum of squared differences from the mean.
    b: Vec<f64>,
}

/// The histograms of a cell.
#[derive(Debug)]
struct Native {
    /// `None` since something could not be added.
    total: Option<Total>,
    /// A counter that began again was seen, and one that did not.
    resets: [bool; 2],
    /// Name of the first one's metric.
    metric: Box<str>,
}

#[derive(Debug)]
enum Total {
    Sum(Sum),
    Mean(Mean),
}

impl Native {
    fn new(op: AggregateOp, h: &FloatHistogram, metric: &str) -> Self {
        let total = if op == AggregateOp::Avg { Total::Mean(Mean::of(h)) } else { Total::Sum(Sum::of(h)) };
        let mut native = Self { total: Some(total), resets: [false; 2], metric: metric.into() };
        native.note_hint(h.hint);
        native
    }

    fn note_hint(&mut self, hint: Hint) {
        self.resets[0] |= hint == Hint::Reset;
        self.resets[1] |= hint == Hint::NotReset;
    }

    fn added(&mut self, added: Result<Added, Incompatible>, metric: &str, notes: NotesAt<'_>) {
        match added {
            Ok(added) if added.bounds_reconciled => {
                notes.annotate(Annotation::BoundsReconciled(Combining::Aggregation));
            }
            Ok(_) => {}
            Err(Incompatible) => {
                self.total = None;
                notes.annotate(Annotation::MixedSchemas(metric));
            }
        }
    }

    fn add(&mut self, h: &FloatHistogram, metric: &str, notes: NotesAt<'_>) {
        let added = match &mut self.total {
            None => return,
            Some(Total::Sum(sum)) => sum.add(h),
            Some(Total::Mean(mean)) => mean.add(h),
        };
        self.note_hint(h.hint);
        self.added(added, metric, notes);
    }

    fn merge(&mut self, other: Self, notes: NotesAt<'_>) {
        let added = match (&mut self.total, other.total) {
            (Some(Total::Sum(sum)), Some(Total::Sum(more))) => sum.add_sum(&more),
            (Some(Total::Mean(mean)), Some(Total::Mean(more))) => mean.merge(more),
            _ => {
                self.total = None;
                Ok(Added::default())
            }
        };
        self.resets = [self.resets[0] | other.resets[0], self.resets[1] | other.resets[1]];
        self.added(added, &other.metric, notes);
    }

    fn finish(self, notes: NotesAt<'_>) -> Option<FloatHistogram> {
        let mut h = match self.total? {
            Total::Sum(sum) => sum.total(),
            Total::Mean(mean) => mean.value(),
        };
        if self.resets == [true; 2] {
            notes.annotate(Annotation::ResetsCollide(Combining::Aggregation));
        }
        h.compact();
        Some(h)
    }
}

impl Partial {
    fn new(op: AggregateOp, by: Grouping, steps: usize) -> Self {
        let groups_per_page = rows_per_batch(steps);
        let (groups, means, native) = (Groups::new(by), HashMap::new(), HashMap::new());
        Self { op, groups, steps, groups_per_page, pages: Vec::new(), means, native }
    }

    /// Where the cells of a group are: in which page, and there.
    fn place(&self, group: usize) -> (usize, Range<usize>) {
        let start = group % self.groups_per_page * self.steps;
        (group / self.groups_per_page, start..start + self.steps)
    }

    /// Makes room for a group; says where its cells are.
    fn make_room(&mut self, group: u32) -> (usize, Range<usize>) {
        let (page, range) = self.place(group as usize);
        if page == self.pages.len() {
            self.pages.push(Page::default());
        }
        let cells = &mut self.pages[page];
        if cells.n.len() < range.end {
            // All of a page but the first, of which there may be little.
            let room = if page == 0 { self.steps } else { self.groups_per_page * self.steps };
            let (a, b) = match self.op {
                // Adding to a negative zero changes nothing, not even the sign of zero.
                AggregateOp::Sum | AggregateOp::Avg => (Some(-0.0), Some(0.0)),
                AggregateOp::Min | AggregateOp::Max => (Some(f64::NAN), None),
                AggregateOp::Stddev | AggregateOp::Stdvar => (Some(0.0), Some(0.0)),
                _ => (None, None),
            };
            let fill = |cells: &mut Vec<f64>, v: f64| {
                if cells.is_empty() {
                    cells.reserve_exact(room);
                }
                cells.resize(range.end, v);
            };
            fill(&mut cells.n, 0.0);
            a.iter().for_each(|v| fill(&mut cells.a, *v));
            b.iter().for_each(|v| fill(&mut cells.b, *v));
        }
        (page, range)
    }

    /// Adds the histograms of a row whose floats were added to a group.
    fn add_histograms(&mut self, group: u32, row: &Row<'_>, notes: NotesAt<'_>) {
        let start = group as usize * self.steps;
        let name = match self.op {
            AggregateOp::Count | AggregateOp::Group => {
                let (page, cells) = self.place(group as usize);
                let n = &mut self.pages[page].n[cells];
                return row.for_each_encoded(|step, _| n[step] += 1.0);
            }
            AggregateOp::Sum | AggregateOp::Avg => {
                let metric = labels::get(row.labels, "__name__");
                return row.for_each_histogram(|step, h| match self.native.entry(start + step) {
                    Entry::Vacant(e) => {
                        e.insert(Native::new(self.op, &h, metric));
                    }
                    Entry::Occupied(mut e) => e.get_mut().add(&h, metric, notes),
                });
            }
            AggregateOp::Min => "min",
            AggregateOp::Max => "max",
            AggregateOp::Stddev => "stddev",
            _ => "stdvar",
        };
        notes.annotate(Annotation::IgnoredInAggregation(name));
    }

    /// Adds the floats of a row; says which group it belongs to.
    fn add(&mut self, row: &Row<'_>) -> u32 {
        let group = self.groups.of(row.labels, row.drop_name);
        let (start, (page, cells)) = (group as usize * self.steps, self.make_room(group));
        let page = &mut self.pages[page];
        let n = &mut page.n[cells.clone()];
        match self.op {
            AggregateOp::Sum => {
                let (a, b) = (&mut page.a[cells.clone()], &mut page.b[cells]);
                if row.is_dense() {
                    for (((v, a), b), n) in row.values.iter().zip(a).zip(b).zip(n) {
                        (*a, *b) = kahan_add(*v, *a, *b);
                        *n += 1.0;
                    }
                } else {
                    row.for_each(|step, v| {
                        (a[step], b[step]) = kahan_add(v, a[step], b[step]);
                        n[step] += 1.0;
                    });
                }
            }
            AggregateOp::Avg => {
                let (a, b) = (&mut page.a[cells.clone()], &mut page.b[cells]);
                let means = &mut self.means;
                row.for_each(|step, v| {
                    n[step] += 1.0;
                    if means.is_empty() {
                        let (sum, c) = kahan_add(v, a[step], b[step]);
                        if sum.is_finite() || n[step] == 1.0 || sum.is_nan() {
                            (a[step], b[step]) = (sum, c);
                            return;
                        }
                    }
                    add_to_mean(means, start + step, v, n[step], &mut a[step], &mut b[step]);
                });
            }
            AggregateOp::Min => {
                let a = &mut page.a[cells];
                row.for_each(|step, v| {
                    n[step] += 1.0;
                    if a[step] > v || a[step].is_nan() {
                        a[step] = v;
                    }
                });
            }
            AggregateOp::Max => {
                let a = &mut page.a[cells];
                row.for_each(|step, v| {
                    n[step] += 1.0;
                    if a[step] < v || a[step].is_nan() {
                        a[step] = v;
                    }
                });
            }
            AggregateOp::Stddev | AggregateOp::Stdvar => {
                let (a, b) = (&mut page.a[cells.clone()], &mut page.b[cells]);
                row.for_each(|step, v| {
                    n[step] += 1.0;
                    if n[step] == 1.0 {
                        a[step] = v;
                        b[step] = if v.is_finite() { 0.0 } else { f64::NAN };
                    } else {
                        let delta = v - a[step];
                        a[step] += delta / n[step];
                        b[step] += delta * (v - a[step]);
                    }
                });
            }
            _ => {
                if row.is_dense() {
                    n.iter_mut().for_each(|n| *n += 1.0);
                } else {
                    row.for_each(|step, _| n[step] += 1.0);
                }
            }
        }
        group
    }

    /// Adds a partial over later series.
    fn merge(&mut self, mut other: Self, notes: NotesAt<'_>, pace: &mut Pace) -> DfResult<()> {
        let mut native = std::mem::take(&mut other.native);
        let other = &other;
        for (i, (labels, drop_name)) in other.groups.labels.iter().enumerate() {
            pace.walk(cost(self.steps))?;
            self.groups.key.clear();
            self.groups.key.extend_from_slice(labels);
            let group = self.groups.of_key(*drop_name);
            self.make_room(group);
            self.merge_group(group as usize, other, i);
            if native.is_empty() {
                continue;
            }
            for step in 0..self.steps {
                let Some(more) = native.remove(&(i * self.steps + step)) else { continue };
                match self.native.entry(group as usize * self.steps + step) {
                    Entry::Vacant(e) => {
                        e.insert(more);
                    }
                    Entry::Occupied(mut e) => e.get_mut().merge(more, notes),
                }
            }
        }
        Ok(())
    }

    /// Adds a group of another partial to one of this.
    fn merge_group(&mut self, to: usize, other: &Self, from: usize) {
        let ((page, cells), (from_page, from_cells)) = (self.place(to), other.place(from));
        let (page, more) = (&mut self.pages[page], &other.pages[from_page]);
        for (step, (i, j)) in cells.zip(from_cells).enumerate() {
            let (n, m) = (page.n[i], more.n[j]);
            if m == 0.0 {
                continue;
            }
            page.n[i] = n + m;
            let (to, from) = (to * self.steps + step, from * self.steps + step);
            match self.op {
                AggregateOp::Avg if self.means.contains_key(&to) || other.means.contains_key(&from) => {
                    let mean = |mean: Option<&(f64, f64)>, a: f64, b: f64, n: f64| match mean {
                        Some((mean, c)) => mean + c,
                        None if n == 0.0 => 0.0,
                        None => a / n + b / n,
                    };
                    let left = mean(self.means.get(&to), page.a[i], page.b[i], n);
                    let right = mean(other.means.get(&from), more.a[j], more.b[j], m);
                    self.means.insert(to, (left * (n / (n + m)) + right * (m / (n + m)), 0.0));
                }
                AggregateOp::Sum | AggregateOp::Avg => {
                    let (sum, c) = kahan_add(more.a[j], page.a[i], page.b[i]);
                    if self.op == AggregateOp::Avg && sum.is_infinite() && n > 0.0 {
                        let mean = |a: f64, b: f64, n: f64| a / n + b / n;
                        let (left, right) = (mean(page.a[i], page.b[i], n), mean(more.a[j], more.b[j], m));
                        self.means.insert(to, (left * (n / (n + m)) + right * (m / (n + m)), 0.0));
                        continue;
                    }
                    page.a[i] = sum;
                    page.b[i] = if sum.is_infinite() { 0.0 } else { c + more.b[j] };
                }
                AggregateOp::Min => {
                    let v = more.a[j];
                    if page.a[i] > v || page.a[i].is_nan() {
                        page.a[i] = v;
                    }
                }
                AggregateOp::Max => {
                    let v = more.a[j];
                    if page.a[i] < v || page.a[i].is_nan() {
                        page.a[i] = v;
                    }
                }
                AggregateOp::Stddev | AggregateOp::Stdvar => {
                    if n == 0.0 {
                        (page.a[i], page.b[i]) = (more.a[j], more.b[j]);
                    } else {
                        let delta = more.a[j] - page.a[i];
                        page.a[i] += delta * (m / (n + m));
                        page.b[i] += more.b[j] + delta * delta * (n * m / (n + m));
                    }
                }
                _ => {}
            }
        }
    }

    /// The value of a place in a page, which is that of a cell.
    fn value(&self, page: &Page, at: usize, cell: usize) -> f64 {
        let n = page.n[at];
        match self.op {
            AggregateOp::Sum => page.a[at] + page.b[at],
            AggregateOp::Avg => match self.means.get(&cell) {
                Some((mean, c)) => mean + c,
                None => page.a[at] / n + page.b[at] / n,
            },
            AggregateOp::Min | AggregateOp::Max => page.a[at],
            AggregateOp::Stdvar => page.b[at] / n,
            AggregateOp::Stddev => (page.b[at] / n).sqrt(),
            AggregateOp::Group => 1.0,
            _ => n,
        }
    }

    fn finish(mut self, work: &Work) -> DfResult<Vec<RecordBatch>> {
        let mut native = std::mem::take(&mut self.native);
        let mut batches = Vec::new();
        let (mut builder, mut pace) = (BlockBuilder::new(work.schema.clone()), work.stop.pace());
        for (group, (labels, drop_name)) in self.groups.labels.iter().enumerate() {
            pace.walk(cost(self.steps))?;
            let (values, valid) = builder.push(|out| {
                out.extend_from_slice(labels);
                *drop_name
            });
            let (start, (page, cells)) = (group * self.steps, self.place(group));
            let page = &self.pages[page];
            for (step, at) in cells.enumerate() {
                values[step] = self.value(page, at, start + step);
                valid[step] = page.n[at] > 0.0;
            }
            if !native.is_empty() {
                for step in 0..self.steps {
                    let Some(cell) = native.remove(&(start + step)) else { continue };
                    let row = builder.len() - 1;
                    if builder.has_sample(row, step) {
                        work.notes_of_input().annotate(Annotation::MixedInAggregation);
                        builder.row_mut(row).1[step] = false;
                    } else if let Some(h) = cell.finish(work.notes_of_input()) {
                        builder.put_histogram(row, step, &h);
                    }
                }
            }
            builder.pop_if_empty();
            if builder.len() >= rows_per_batch(self.steps) {
                work.hold(builder.len() * work.row_bytes())?;
                batches.push(builder.finish()?);
            }
        }
        if !builder.is_empty() {
            batches.push(builder.finish()?);
        }
        Ok(batches)
    }
}

/// Adds a value to an average one of whose cells has overflowed; `n` counts it already.
#[cold]
fn add_to_mean(means: &mut HashMap<usize, (f64, f64)>, cell: usize, v: f64, n: f64, a: &mut f64, b: &mut f64) {
    if !means.contains_key(&cell) {
        let (sum, c) = kahan_add(v, *a, *b);
        if !sum.is_infinite() || n == 1.0 {
            (*a, *b) = (sum, c);
            return;
        }
        means.insert(cell, (*a / (n - 1.0), *b / (n - 1.0)));
    }
    if let Some(mean) = means.get_mut(&cell) {
        let q = (n - 1.0) / n;
        *mean = kahan_add(v / n, q * mean.0, q * mean.1);
    }
}
