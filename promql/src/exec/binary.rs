//! Operators between scalars, between vectors and scalars, and between vectors.
//!
//! Between vectors the pairing of series is worked out once from their labels; then each pair is a loop over its steps. Errors
//! about matching are those of single steps in Prometheus: two series of a group on a side where one is allowed are
//! fine as long as they have no step in common.

use arrow::array::RecordBatch;
use arrow::buffer::{BooleanBuffer, NullBuffer};
use datafusion::error::Result as DfResult;
use hashbrown::HashMap;

use super::annotations::{Annotation, Combining, NotesAt};
use super::relabel::Merger;
use super::{Batches, Pace, Work, cost, internal, same_labels};
use crate::QueryError;
use crate::block::{self, BlockBuilder, Name, Row};
use crate::histogram::{FloatHistogram, Hint};
use crate::labels::{self, Grouping};
use crate::parse::ast::Cardinality;
use crate::plan::ops::{BinaryOp, Float, Matching, Op};
use crate::result::Block;

/// The value of an operator, and whether a filter keeps it: a comparison's value is its left side.
#[inline(always)]
fn apply(op: BinaryOp, l: f64, r: f64) -> (f64, bool) {
    match op {
        BinaryOp::Add => (l + r, true),
        BinaryOp::Sub => (l - r, true),
        BinaryOp::Mul => (l * r, true),
        BinaryOp::Div => (l / r, true),
        BinaryOp::Mod => (l % r, true),
        BinaryOp::Pow => (l.powf(r), true),
        BinaryOp::Atan2 => (l.atan2(r), true),
        BinaryOp::Eq => (l, l == r),
        BinaryOp::Ne => (l, l != r),
        BinaryOp::Lt => (l, l < r),
        BinaryOp::Le => (l, l <= r),
        BinaryOp::Gt => (l, l > r),
        BinaryOp::Ge => (l, l >= r),
        // Only histograms have something to cut off; callers see to that before.
        BinaryOp::TrimUpper | BinaryOp::TrimLower => (l, false),
    }
}

/// A sample of either kind.
enum Value {
    Float(f64),
    Histogram(FloatHistogram),
}

impl Value {
    /// The sample of a row at a step.
    fn of(row: &Row<'_>, step: usize) -> Option<Self> {
        match row.get(step) {
            Some(v) => Some(Self::Float(v)),
            None => row.histogram(step).map(Self::Histogram),
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Float(_) => "float",
            Self::Histogram(_) => "histogram",
        }
    }
}

/// [`apply`] for samples of any kind; without a value where the operator does not know the kinds, which is noted.
fn apply_any(op: BinaryOp, left: Value, right: Value, notes: NotesAt<'_>) -> Option<(Value, bool)> {
    use Value::{Float, Histogram};
    let kinds = (left.kind(), right.kind());
    let kept = |mut h: FloatHistogram| {
        h.compact();
        Some((Histogram(h), true))
    };
    match (op, left, right) {
        (op, Float(l), Float(r)) if !op.is_trim() => {
            let (v, keep) = apply(op, l, r);
            Some((Float(v), keep))
        }
        (BinaryOp::Mul, Float(v), Histogram(mut h)) | (BinaryOp::Mul, Histogram(mut h), Float(v)) => {
            h.mul(v);
            kept(h)
        }
        (BinaryOp::Div, Histogram(mut h), Float(v)) => {
            h.div(v);
            kept(h)
        }
        (BinaryOp::TrimUpper | BinaryOp::TrimLower, Histogram(mut h), Float(v)) => {
            h.trim(v, op == BinaryOp::TrimUpper);
            Some((Histogram(h), true))
        }
        (BinaryOp::Eq, Histogram(l), Histogram(r)) => {
            let keep = l == r;
            Some((Histogram(l), keep))
        }
        (BinaryOp::Ne, Histogram(l), Histogram(r)) => {
            let keep = l != r;
            Some((Histogram(l), keep))
        }
        (BinaryOp::Add | BinaryOp::Sub, Histogram(mut l), Histogram(r)) => {
            let add = op == BinaryOp::Add;
            let combining = if add { Combining::Addition } else { Combining::Subtraction };
            let Ok(added) = (if add { l.add(&r) } else { l.sub(&r) }) else {
                notes.annotate(Annotation::IncompatibleBuckets(op.symbol()));
                return None;
            };
            if added.resets_collide {
                notes.annotate(Annotation::ResetsCollide(combining));
                return None;
            }
            if added.bounds_reconciled {
                notes.annotate(Annotation::BoundsReconciled(combining));
            }
            if !add {
                l.hint = Hint::Gauge;
            }
            kept(l)
        }
        _ => {
            notes.annotate(Annotation::IncompatibleTypes(kinds.0, op.symbol(), kinds.1));
            None
        }
    }
}

/// Calls `f` with an operator that the compiler knows, so that its loops hold no branch over operators.
macro_rules! with_operator {
    ($op:expr, |$known:ident| $body:expr) => {
        match $op {
            BinaryOp::Add => with_operator!(@one Add, $known, $body),
            BinaryOp::Sub => with_operator!(@one Sub, $known, $body),
            BinaryOp::Mul => with_operator!(@one Mul, $known, $body),
            BinaryOp::Div => with_operator!(@one Div, $known, $body),
            BinaryOp::Mod => with_operator!(@one Mod, $known, $body),
            BinaryOp::Pow => with_operator!(@one Pow, $known, $body),
            BinaryOp::Atan2 => with_operator!(@one Atan2, $known, $body),
            BinaryOp::Eq => with_operator!(@one Eq, $known, $body),
            BinaryOp::Ne => with_operator!(@one Ne, $known, $body),
            BinaryOp::Lt => with_operator!(@one Lt, $known, $body),
            BinaryOp::Le => with_operator!(@one Le, $known, $body),
            BinaryOp::Gt => with_operator!(@one Gt, $known, $body),
            BinaryOp::Ge => with_operator!(@one Ge, $known, $body),
            BinaryOp::TrimUpper => with_operator!(@one TrimUpper, $known, $body),
            BinaryOp::TrimLower => with_operator!(@one TrimLower, $known, $body),
        }
    };
    (@one $op:ident, $known:ident, $body:expr) => {{
        let $known = BinaryOp::$op;
        $body
    }};
}

/// An operator between scalars; comparisons give 0 or 1.
pub(super) async fn scalars(work: &Work) -> DfResult<Vec<RecordBatch>> {
    let Op::ScalarBinary(op) = work.op else { return Err(internal("not an operator between scalars")) };
    let (left, right) = futures::try_join!(work.scalar_input(0), work.scalar_input(1))?;
    let batch = work.scalar(|step| {
        let (v, keep) = apply(op, left[step], right[step]);
        if op.is_comparison() { f64::from(u8::from(keep)) } else { v }
    })?;
    Ok(vec![batch])
}

/// An operator between the series of input 0 and the scalar of input 1.
pub(super) fn vector_scalar(work: Work, partition: usize) -> DfResult<Batches> {
    let Op::VectorScalar { op, swapped, bool, name } = work.op else {
        return Err(internal("not an operator between a vector and a scalar"));
    };
    work.map_blocks(partition, move |work, scalars, block, _| {
        let scalar = scalars[0].as_slice();
        if block.any_histograms() || op.is_trim() {
            return any_scalar(work, &block, scalar);
        }
        let all = block.all_values();
        let mut values = Vec::with_capacity(all.len());
        let mut nulls = block.nulls().cloned();
        let filters = op.is_comparison() && !bool;
        if filters {
            let steps = work.steps();
            let keep = with_operator!(op, |op| BooleanBuffer::collect_bool(all.len(), |i| {
                let (v, s) = (all[i], scalar[i % steps]);
                if swapped { apply(op, s, v).1 } else { apply(op, v, s).1 }
            }));
            nulls = NullBuffer::union(nulls.as_ref(), Some(&NullBuffer::new(keep)));
            values.extend_from_slice(all);
        } else {
            with_operator!(op, |op| for row in all.chunks_exact(work.steps()) {
                values.extend(row.iter().zip(scalar).map(|(v, s)| {
                    let (v, keep) = if swapped { apply(op, *s, *v) } else { apply(op, *v, *s) };
                    if op.is_comparison() { f64::from(u8::from(keep)) } else { v }
                }));
            });
        }
        block::with_values(&work.schema, &block, values, nulls, name)
    })
}

/// [`vector_scalar`] of samples of any kind.
fn any_scalar(work: &Work, block: &Block, scalar: &[f64]) -> DfResult<RecordBatch> {
    let Op::VectorScalar { op, swapped, bool, name } = work.op else {
        return Err(internal("not an operator between a vector and a scalar"));
    };
    let mut builder = BlockBuilder::new(work.schema.clone());
    for row in 0..block.len() {
        let row = Row::of(block, row);
        builder.push(|out| name.apply(row.labels, row.drop_name, out));
        let at = builder.len() - 1;
        for (step, s) in scalar.iter().enumerate() {
            let Some(v) = Value::of(&row, step) else { continue };
            // A comparison keeps the vector's side, whichever that is.
            let own = if let Value::Float(v) = v { v } else { f64::NAN };
            let (left, right) = if swapped { (Value::Float(*s), v) } else { (v, Value::Float(*s)) };
            let Some((value, keep)) = apply_any(op, left, right, work.notes_of_whole()) else { continue };
            let value = match value {
                _ if bool => Value::Float(f64::from(u8::from(keep))),
                _ if !keep => continue,
                Value::Float(_) if op.is_comparison() => Value::Float(own),
                value => value,
            };
            match value {
                Value::Float(v) => {
                    let (values, valid) = builder.row_mut(at);
                    (values[step], valid[step]) = (v, true);
                }
                Value::Histogram(h) => builder.put_histogram(at, step, &h),
            }
        }
        builder.pop_if_empty();
    }
    builder.finish()
}

/// Series of one side with the same matching labels.
#[derive(Default)]
struct Group<'a> {
    many: Vec<Row<'a>>,
    one: Vec<Row<'a>>,
}

/// What a group and its labels take at most times, about.
const GROUP_BYTES: usize = 192;

/// An operator between vectors.
pub(super) async fn vectors(work: &Work) -> DfResult<Vec<RecordBatch>> {
    let Op::VectorBinary { op, bool, matching, name } = &work.op else {
        return Err(internal("not an operator between vectors"));
    };
    let (left, right) = futures::try_join!(work.blocks(0), work.blocks(1))?;
    let swapped = matching.cardinality == Cardinality::OneToMany;
    let (many, one) = if swapped { (&right, &left) } else { (&left, &right) };

    let mut index: HashMap<Vec<u8>, usize> = HashMap::new();
    let mut groups: Vec<Group<'_>> = Vec::new();
    let mut key = Vec::new();
    let mut group_of = |labels: &[u8], groups: &mut Vec<Group<'_>>| {
        key.clear();
        matching.labels.key(labels, &mut key);
        *index.entry_ref(key.as_slice()).or_insert_with(|| {
            groups.push(Group::default());
            groups.len() - 1
        })
    };
    let mut pace = work.stop.pace();
    let rows = |blocks: &[Block]| blocks.iter().map(Block::len).sum::<usize>();
    work.hold((rows(many) + rows(one)) * (size_of::<Row<'_>>() + GROUP_BYTES))?;
    for row in Row::all(many) {
        pace.walk(cost(0))?;
        let group = group_of(row.labels, &mut groups);
        groups[group].many.push(row);
    }
    for row in Row::all(one) {
        pace.walk(cost(0))?;
        let group = group_of(row.labels, &mut groups);
        groups[group].one.push(row);
    }

    // As in Prometheus, with `group_right` too: `fill_left` stands in on the many side, `fill_right` on the other.
    let fill_many = matching.fill_left.map(Float::get);
    let fill_one = matching.fill_right.map(Float::get);
    let filled = fill_many.is_some() || fill_one.is_some();
    check_one_side(&groups, matching, swapped, filled, work.steps(), &mut pace)?;

    let (steps, notes) = (work.steps(), work.notes_of_whole());
    let pairing = Pairing { op: *op, bool: *bool, swapped, name: *name, matching, steps, notes };
    let mut merger = Merger::new(work);
    let mut owner: Vec<usize> = Vec::new();
    for (number, group) in groups.iter().enumerate() {
        if matching.cardinality == Cardinality::OneToOne && group.many.len() > 1 {
            pairing.check_many_side(group, fill_one.is_some(), &mut pace)?;
        }
        for many in &group.many {
            for one in &group.one {
                pace.walk(cost(work.steps()))?;
                let (row, known) = merger.row(|out| pairing.labels(many.labels, one.labels, out))?;
                let clash = pairing.clash(&mut owner, row, known, number);
                if op.is_trim() || many.has_histograms() || one.has_histograms() || merger.has_histograms() {
                    pairing.pair_any(many, one, &mut merger, row).map_err(|_| clash)?;
                } else {
                    let (values, valid) = merger.values(row);
                    pairing.pair(many, one, values, valid).map_err(|()| clash)?;
                }
            }
        }
        if let Some(v) = fill_one {
            let filling = Filling { value: v, present_is_many: true };
            pairing.fill(&mut merger, &mut owner, number, (&group.many, &group.one), filling, &mut pace)?;
        }
        if let Some(v) = fill_many {
            let filling = Filling { value: v, present_is_many: false };
            pairing.fill(&mut merger, &mut owner, number, (&group.one, &group.many), filling, &mut pace)?;
        }
    }
    merger.finish()
}

/// The value that stands for a missing partner, and on which side there is none.
#[derive(Clone, Copy)]
struct Filling {
    value: f64,
    present_is_many: bool,
}

struct Pairing<'a> {
    op: BinaryOp,
    bool: bool,
    /// The many side is the right operand.
    swapped: bool,
    name: Name,
    matching: &'a Matching,
    steps: usize,
    notes: NotesAt<'a>,
}

impl Pairing<'_> {
    /// Appends the labels of the result; says whether the name is to go later.
    fn labels(&self, many: &[u8], one: &[u8], out: &mut Vec<u8>) -> bool {
        let Matching { labels: by, cardinality, include, .. } = self.matching;
        let drops = self.name == Name::Drop;
        let one_to_one = *cardinality == Cardinality::OneToOne;
        let keep = |name: &[u8]| {
            if drops && labels::is_metadata(name) {
                return false;
            }
            !one_to_one || (by.labels.iter().any(|l| l.as_bytes() == name) != by.without)
        };
        if include.is_empty() {
            labels::filter(many, out, keep);
        } else {
            let mut base = Vec::with_capacity(many.len());
            labels::filter(many, &mut base, keep);
            for name in include {
                let mut next = Vec::with_capacity(base.len() + 32);
                labels::set(&base, name, labels::get(one, name), &mut next);
                base = next;
            }
            out.extend_from_slice(&base);
        }
        self.name == Name::DropLater
    }

    /// What it means when a row of the result gets a second value at a step.
    fn clash(&self, owner: &mut Vec<usize>, row: usize, known: bool, group: usize) -> QueryError {
        if !known {
            owner.push(group);
        }
        if owner.get(row) == Some(&group) && self.matching.cardinality != Cardinality::OneToOne {
            return QueryError::execution("multiple matches for labels: grouping labels must ensure unique matches");
        }
        same_labels()
    }

    /// [`Pairing::pair`] of samples of any kind.
    fn pair_any(&self, many: &Row<'_>, one: &Row<'_>, merger: &mut Merger, row: usize) -> Result<(), QueryError> {
        for step in 0..self.steps {
            if let (Some(m), Some(o)) = (Value::of(many, step), Value::of(one, step)) {
                self.put_any((m, o), merger, row, step)?;
            }
        }
        Ok(())
    }

    /// Computes the value of a pair of samples and puts it where it belongs, unless there is none.
    fn put_any(
        &self,
        (many, one): (Value, Value),
        merger: &mut Merger,
        row: usize,
        step: usize,
    ) -> Result<(), QueryError> {
        let (left, right) = if self.swapped { (one, many) } else { (many, one) };
        match apply_any(self.op, left, right, self.notes) {
            Some((_, keep)) if self.bool => merger.put_float(row, step, f64::from(u8::from(keep))),
            Some((Value::Float(v), true)) => merger.put_float(row, step, v),
            Some((Value::Histogram(h), true)) => merger.put_histogram(row, step, &h),
            _ => Ok(()),
        }
    }

    fn pair(&self, many: &Row<'_>, one: &Row<'_>, values: &mut [f64], valid: &mut [bool]) -> Result<(), ()> {
        let (op, swapped) = (self.op, self.swapped);
        let filters = op.is_comparison() && !self.bool;
        let fresh = !valid.contains(&true);
        with_operator!(op, |op| {
            let compute = |m: f64, o: f64| {
                let (v, keep) = if swapped { apply(op, o, m) } else { apply(op, m, o) };
                if filters || !op.is_comparison() { (v, keep) } else { (f64::from(u8::from(keep)), true) }
            };
            if fresh && many.is_dense() && one.is_dense() {
                for (((m, o), v), ok) in many.values.iter().zip(one.values).zip(values).zip(valid) {
                    (*v, *ok) = compute(*m, *o);
                }
                return Ok(());
            }
            for step in 0..values.len() {
                if many.is_valid(step) && one.is_valid(step) {
                    let (v, keep) = compute(many.values[step], one.values[step]);
                    if keep {
                        Merger::put(values, valid, step, v).map_err(|_| ())?;
                    }
                }
            }
        });
        Ok(())
    }

    /// One-to-one matching: at no step may two series of the left have a partner.
    fn check_many_side(&self, group: &Group<'_>, filled: bool, pace: &mut Pace) -> Result<(), QueryError> {
        for step in 0..self.steps {
            pace.step(group.one.len() + group.many.len())?;
            let partner = filled || group.one.iter().any(|r| r.has_sample(step));
            if partner && group.many.iter().filter(|r| r.has_sample(step)).count() > 1 {
                return Err(QueryError::execution(
                    "multiple matches for labels: many-to-one matching must be explicit (group_left/group_right)",
                ));
            }
        }
        Ok(())
    }

    /// Pairs samples of one side, where the other has none, with a value that stands for it.
    fn fill(
        &self,
        merger: &mut Merger,
        owner: &mut Vec<usize>,
        number: usize,
        (present, absent): (&[Row<'_>], &[Row<'_>]),
        Filling { value: v, present_is_many }: Filling,
        pace: &mut Pace,
    ) -> Result<(), QueryError> {
        let mut key = Vec::new();
        for row in present {
            pace.step(cost(self.steps * (1 + absent.len())))?;
            key.clear();
            self.matching.labels.key(row.labels, &mut key);
            let (many, one) = if present_is_many { (row.labels, &key[..]) } else { (&key[..], row.labels) };
            let mut target = None;
            for step in 0..self.steps {
                if absent.iter().any(|r| r.has_sample(step)) {
                    continue;
                }
                let Some(own) = Value::of(row, step) else { continue };
                let at = match target {
                    Some(at) => at,
                    None => {
                        let (at, known) = merger.row(|out| self.labels(many, one, out))?;
                        if !known {
                            owner.push(number);
                        }
                        *target.insert(at)
                    }
                };
                let own_and_fill = (own, Value::Float(v));
                let (m, o) = if present_is_many { own_and_fill } else { (own_and_fill.1, own_and_fill.0) };
                self.put_any((m, o), merger, at, step)?;
            }
        }
        Ok(())
    }
}

/// At no step may two series of a group be on the side of which there is one.
fn check_one_side(
    groups: &[Group<'_>],
    matching: &Matching,
    swapped: bool,
    filled: bool,
    steps: usize,
    pace: &mut Pace,
) -> Result<(), QueryError> {
    // A step at which the other side is empty as a whole is not looked at.
    let mut other_present: Option<Vec<bool>> = None;
    for group in groups.iter().filter(|g| g.one.len() > 1) {
        let other = other_present.get_or_insert_with(|| {
            let mut present = vec![filled; steps];
            for row in groups.iter().flat_map(|g| &g.many) {
                row.for_each_sample(|step| present[step] = true);
            }
            present
        });
        for step in (0..steps).filter(|s| other[*s]) {
            pace.step(group.one.len())?;
            let mut rows = group.one.iter().filter(|r| r.has_sample(step));
            if let (Some(a), Some(b)) = (rows.next(), rows.next()) {
                return Err(duplicates(&matching.labels, a, b, swapped));
            }
        }
    }
    Ok(())
}

fn duplicates(by: &Grouping, a: &Row<'_>, b: &Row<'_>, swapped: bool) -> QueryError {
    let mut key = Vec::new();
    by.key(a.labels, &mut key);
    let (mut first, mut second) = (labels::display(a.labels), labels::display(b.labels));
    if first > second {
        std::mem::swap(&mut first, &mut second);
    }
    QueryError::execution(format!(
        "found duplicate series for the match group {} on the {} hand-side of the operation: [{first}, {second}];many-to-many matching not allowed: matching labels must be unique on one side",
        labels::display(&key),
        if swapped { "left" } else { "right" },
    ))
}
