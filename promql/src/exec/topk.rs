//! Aggregations that need all values of a group at a step: `topk` and its kin, `quantile`, `count_values`.

use arrow::array::RecordBatch;
use datafusion::error::Result as DfResult;
use engine::kernels;
use hashbrown::HashMap;
use hashbrown::hash_map::Entry;

use super::aggregate::Groups;
use super::annotations::Annotation;
use super::relabel::Merger;
use super::{Pace, Work, cost, internal};
use crate::QueryError;
use crate::block::{BatchesBuilder, Name, Row};
use crate::histogram;
use crate::labels::{self, Grouping};
use crate::parse::go;
use crate::plan::ops::{AggregateOp, Op};
use crate::result::Block;

/// What it costs to find the place of a value, about.
const SORT_COST: usize = 32;
/// So many best values are kept in order one by one; more are sorted.
const KEPT_IN_ORDER_MAX: usize = 64;

/// The rows of each group, in order of appearance.
fn grouped<'a>(
    work: &Work,
    blocks: &'a [Block],
    by: &Grouping,
    pace: &mut Pace,
) -> DfResult<(Groups, Vec<Vec<Row<'a>>>)> {
    work.hold(blocks.iter().map(Block::len).sum::<usize>() * size_of::<Row<'_>>())?;
    let mut groups = Groups::new(by.clone());
    let mut members: Vec<Vec<Row<'a>>> = Vec::new();
    for row in Row::all(blocks) {
        pace.walk(cost(0))?;
        let group = groups.of(row.labels, row.drop_name) as usize;
        if group == members.len() {
            members.push(Vec::new());
        }
        members[group].push(row);
    }
    Ok((groups, members))
}

pub(super) async fn quantiles(work: &Work, by: &Grouping) -> DfResult<Vec<RecordBatch>> {
    let q = work.scalar_input(1).await?;
    work.notes.check_quantile(work.place.param, &q);
    let blocks = work.blocks(0).await?;
    let mut pace = work.stop.pace();
    let (groups, members) = grouped(work, &blocks, by, &mut pace)?;
    let mut builder = BatchesBuilder::new(work.schema.clone());
    let mut keys = Vec::new();
    for ((labels, drop_name), rows) in groups.labels.iter().zip(&members) {
        work.hold(work.row_bytes() + labels.len())?;
        let (values, valid) = builder.push(|out| {
            out.extend_from_slice(labels);
            *drop_name
        });
        if rows.iter().any(Row::has_histograms) {
            work.notes_of_input().annotate(Annotation::IgnoredInAggregation("quantile"));
        }
        for step in 0..work.steps() {
            pace.walk(SORT_COST * rows.len())?;
            values[step] = kernels::quantile(q[step], rows.iter().filter_map(|r| r.get(step)), &mut keys);
            valid[step] = !keys.is_empty() || rows.iter().any(|r| r.is_valid(step));
        }
        builder.pop_if_empty();
    }
    builder.finish()
}

/// `topk`, `bottomk`, `limitk` and `limit_ratio`: the series themselves, where they are chosen.
pub(super) async fn select(work: &Work, op: AggregateOp, by: &Grouping) -> DfResult<Vec<RecordBatch>> {
    let params = work.scalar_input(1).await?;
    check_params(work, op, &params)?;
    let blocks = work.blocks(0).await?;
    let mut pace = work.stop.pace();
    let (_, members) = grouped(work, &blocks, by, &mut pace)?;
    let mut builder = BatchesBuilder::new(work.schema.clone());
    let mut chosen: Vec<(f64, usize)> = Vec::new();
    let any_kind = matches!(op, AggregateOp::Limitk | AggregateOp::LimitRatio);
    for rows in &members {
        // Which rows are chosen at which steps; for one step also in which order.
        let mut at: HashMap<usize, usize> = HashMap::new();
        let hashes: Vec<u64> = match op {
            AggregateOp::LimitRatio => rows.iter().map(|r| labels::hash(r.labels)).collect(),
            _ => Vec::new(),
        };
        for (step, param) in params.iter().enumerate() {
            pace.walk(SORT_COST * rows.len())?;
            chosen.clear();
            // Which is the best is a question of floats only; the other two take any sample.
            let present = rows.iter().enumerate().filter_map(|(i, r)| match r.get(step) {
                None if any_kind && r.encoded(step).is_some() => Some((f64::NAN, i)),
                v => Some((v?, i)),
            });
            if op == AggregateOp::LimitRatio {
                chosen.extend(present.filter(|(_, i)| in_ratio(*param, hashes[*i])));
            } else {
                let k = if *param >= 1.0 { (*param as usize).min(rows.len()) } else { 0 };
                if k > 0 && !any_kind && rows.iter().any(|r| r.encoded(step).is_some()) {
                    let name = if op == AggregateOp::Topk { "topk" } else { "bottomk" };
                    work.notes_of_whole().annotate(Annotation::IgnoredInAggregation(name));
                }
                choose(op, k, present, &mut chosen);
            }
            for (v, row) in &chosen {
                let index = match at.entry(*row) {
                    Entry::Occupied(e) => *e.get(),
                    Entry::Vacant(e) => {
                        let row = &rows[*row];
                        work.hold(work.row_bytes() + row.labels.len())?;
                        builder.push(|out| Name::Keep.apply(row.labels, row.drop_name, out));
                        *e.insert(builder.rows() - 1)
                    }
                };
                if let Some(bytes) = rows[*row].encoded(step) {
                    work.hold(bytes.len())?;
                    builder.put_encoded(index, step, bytes.to_vec());
                    continue;
                }
                let (values, valid) = builder.row_mut(index);
                values[step] = *v;
                valid[step] = true;
            }
        }
    }
    builder.finish()
}

fn check_params(work: &Work, op: AggregateOp, params: &[f64]) -> Result<(), QueryError> {
    let max = params.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let min = params.iter().copied().fold(f64::INFINITY, f64::min);
    let nan = params.iter().any(|p| p.is_nan());
    if op == AggregateOp::LimitRatio {
        if nan {
            return Err(QueryError::execution("Ratio value is NaN"));
        }
        for (bad, bound) in [(max, 1.0), (min, -1.0)] {
            if bad.abs() > 1.0 && bad.signum() == f64::signum(bound) {
                let (bad, bound) = (go::float(bad), go::float(bound));
                work.notes.warn(
                    work.place.param,
                    format!("ratio value should be between -1 and 1, got {bad}, capping to {bound}"),
                );
            }
        }
        return Ok(());
    }
    if max < 1.0 && !nan {
        return Ok(());
    }
    if nan {
        return Err(QueryError::execution("Parameter value is NaN"));
    }
    if min <= i64::MIN as f64 {
        return Err(QueryError::execution(format!("Scalar value {} underflows int64", go::float(min))));
    }
    if max >= i64::MAX as f64 {
        return Err(QueryError::execution(format!("Scalar value {} overflows int64", go::float(max))));
    }
    Ok(())
}

/// A float as Go's `%.2g` prints it: two digits.
pub(super) fn go_exponent(v: f64) -> String {
    let text = format!("{v:.1e}");
    let Some((mantissa, e)) = text.split_once('e') else { return text };
    let e: i32 = e.parse().unwrap_or(0);
    if (-4..2).contains(&e) {
        let digits = usize::try_from(1 - e).unwrap_or(0);
        let fixed = format!("{v:.digits$}");
        return if fixed.contains('.') { fixed.trim_end_matches('0').trim_end_matches('.').to_owned() } else { fixed };
    }
    format!("{}e{}{:02}", mantissa.trim_end_matches('0').trim_end_matches('.'), if e < 0 { '-' } else { '+' }, e.abs())
}

/// The best `k` of the present values, best first; NaN is worse than any number, the first of equals is kept.
fn choose(op: AggregateOp, k: usize, present: impl Iterator<Item = (f64, usize)>, chosen: &mut Vec<(f64, usize)>) {
    if op == AggregateOp::Limitk {
        chosen.extend(present.take(k));
        return;
    }
    let better = |a: f64, b: f64| match op {
        AggregateOp::Topk => a > b || (b.is_nan() && !a.is_nan()),
        _ => a < b || (b.is_nan() && !a.is_nan()),
    };
    if k > KEPT_IN_ORDER_MAX {
        chosen.extend(present);
        chosen.sort_by(|(a, _), (b, _)| better(*b, *a).cmp(&better(*a, *b)));
        chosen.truncate(k);
        return;
    }
    for (v, row) in present {
        if chosen.len() == k {
            match chosen.last() {
                Some((worst, _)) if better(v, *worst) => chosen.pop(),
                _ => continue,
            };
        }
        let at = chosen.partition_point(|(kept, _)| !better(v, *kept));
        chosen.insert(at, (v, row));
    }
}

/// Whether a series with this hash belongs to a sample of this ratio of all series; negative ratios are the complement.
fn in_ratio(ratio: f64, hash: u64) -> bool {
    let ratio = ratio.clamp(-1.0, 1.0);
    let offset = hash as f64 / u64::MAX as f64;
    if ratio >= 0.0 { offset < ratio } else { offset >= 1.0 + ratio }
}

pub(super) async fn count_values(work: &Work) -> DfResult<Vec<RecordBatch>> {
    let Op::CountValues { label, by } = &work.op else { return Err(internal("not count_values")) };
    let blocks = work.blocks(0).await?;
    let mut pace = work.stop.pace();
    let (groups, members) = grouped(work, &blocks, by, &mut pace)?;
    let mut merger = Merger::new(work);
    for ((labels, drop_name), rows) in groups.labels.iter().zip(&members) {
        // NaNs of all bits are one value, as they print the same.
        let mut of_value: HashMap<u64, usize> = HashMap::new();
        let mut of_text: HashMap<String, usize> = HashMap::new();
        let row_of = |merger: &mut Merger, text: &str| {
            let row = merger.row(|out| {
                labels::set(labels, label, text, out);
                *drop_name && label != "__name__"
            });
            row.map(|(row, _)| row)
        };
        for row in rows {
            pace.walk(cost(SORT_COST * work.steps()))?;
            let mut failed = Ok(());
            row.for_each_encoded(|step, bytes| {
                let text = histogram::decode(bytes).unwrap_or_default().to_string();
                let index = match of_text.entry(text) {
                    Entry::Occupied(e) => *e.get(),
                    Entry::Vacant(e) if failed.is_ok() => match row_of(&mut merger, e.key()) {
                        Ok(row) => *e.insert(row),
                        Err(e) => return failed = Err(e),
                    },
                    Entry::Vacant(_) => return,
                };
                let (values, valid) = merger.values(index);
                values[step] += 1.0;
                valid[step] = true;
            });
            row.for_each(|step, v| {
                let bits = if v.is_nan() { f64::NAN.to_bits() } else { v.to_bits() };
                let index = match of_value.entry(bits) {
                    Entry::Occupied(e) => *e.get(),
                    Entry::Vacant(e) if failed.is_ok() => match row_of(&mut merger, &go::plain_float(v)) {
                        Ok(row) => *e.insert(row),
                        Err(e) => return failed = Err(e),
                    },
                    Entry::Vacant(_) => return,
                };
                let (values, valid) = merger.values(index);
                values[step] += 1.0;
                valid[step] = true;
            });
            failed?;
        }
    }
    merger.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_are_chosen() {
        let check = |op, k, values: &[f64], expected: &[usize]| {
            let mut chosen = Vec::new();
            choose(op, k, values.iter().copied().zip(0..), &mut chosen);
            assert_eq!(chosen.iter().map(|c| c.1).collect::<Vec<_>>(), expected, "{op:?} {k} {values:?}");
        };
        let nan = f64::NAN;
        check(AggregateOp::Topk, 2, &[1.0, 5.0, 3.0, 5.0], &[1, 3]);
        check(AggregateOp::Topk, 2, &[nan, 1.0, nan], &[1, 0]);
        check(AggregateOp::Bottomk, 2, &[nan, 4.0, 1.0, 2.0], &[2, 3]);
        check(AggregateOp::Topk, 0, &[1.0], &[]);
        check(AggregateOp::Limitk, 2, &[1.0, 2.0, 3.0], &[0, 1]);
        // Many are chosen in the same way as few, in the same order.
        let values: Vec<f64> = (0..500).map(|i| if i % 7 == 0 { nan } else { f64::from(i * 37 % 50) }).collect();
        for op in [AggregateOp::Topk, AggregateOp::Bottomk] {
            let (mut few, mut many) = (Vec::new(), Vec::new());
            choose(op, KEPT_IN_ORDER_MAX, values.iter().copied().zip(0..), &mut few);
            choose(op, 450, values.iter().copied().zip(0..), &mut many);
            let rows = |chosen: &[(f64, usize)]| chosen.iter().map(|c| c.1).collect::<Vec<_>>();
            assert_eq!(rows(&few), rows(&many)[..KEPT_IN_ORDER_MAX]);
            assert_eq!(many.len(), 450);
        }
    }

    #[test]
    fn two_digits() {
        for (v, expected) in [(12.345, "12"), (1.0, "1"), (0.25, "0.25"), (123.0, "1.2e+02"), (0.00001, "1e-05")] {
            assert_eq!(go_exponent(v), expected);
        }
    }
}
