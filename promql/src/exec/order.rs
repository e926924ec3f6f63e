//! Small operations over whole vectors: `absent`, `scalar` and sorting.

use arrow::array::RecordBatch;
use datafusion::error::Result as DfResult;
use engine::kernels::order_key;

use super::{Work, cost, internal};
use crate::block::{BatchesBuilder, BlockBuilder, Name, Row};
use crate::labels;
use crate::plan::ops::Op;

/// [`Op::Absent`] and [`Op::Scalar`].
pub(super) async fn presence(work: &Work) -> DfResult<Vec<RecordBatch>> {
    #[derive(Default)]
    struct Seen {
        count: Vec<u32>,
        value: Vec<f64>,
    }
    let steps = work.steps();
    // A histogram has no value as a scalar.
    let histograms = !matches!(work.op, Op::Scalar);
    let states = work
        .fold(0, move |seen: &mut Seen, block| {
            seen.count.resize(steps, 0);
            seen.value.resize(steps, 0.0);
            for row in 0..block.len() {
                let row = Row::of(&block, row);
                row.for_each(|step, v| {
                    seen.count[step] = seen.count[step].saturating_add(1);
                    seen.value[step] = v;
                });
                if histograms {
                    row.for_each_encoded(|step, _| seen.count[step] = seen.count[step].saturating_add(1));
                }
            }
            Ok(())
        })
        .await?;
    let (mut count, mut value) = (vec![0u32; steps], vec![f64::NAN; steps]);
    for seen in states.iter().filter(|s| !s.count.is_empty()) {
        for step in 0..steps {
            if seen.count[step] > 0 {
                count[step] = count[step].saturating_add(seen.count[step]);
                value[step] = seen.value[step];
            }
        }
    }
    let mut builder = BlockBuilder::new(work.schema.clone());
    match &work.op {
        Op::Scalar => {
            let (values, valid) = builder.push(|_| false);
            for step in 0..steps {
                values[step] = if count[step] == 1 { value[step] } else { f64::NAN };
            }
            valid.fill(true);
        }
        Op::Absent { labels } => {
            let (values, valid) = builder.push(|out| {
                out.extend_from_slice(labels);
                false
            });
            for step in 0..steps {
                values[step] = 1.0;
                valid[step] = count[step] == 0;
            }
            builder.pop_if_empty();
        }
        other => return Err(internal(&format!("{} does not look at presence", other.name()))),
    }
    Ok(vec![builder.finish()?])
}

/// [`Op::Sort`] and [`Op::SortByLabel`]. Over several steps there is no order to give, so series pass as they are.
pub(super) async fn sort(work: &Work) -> DfResult<Vec<RecordBatch>> {
    let blocks = work.blocks(0).await?;
    let mut rows: Vec<Row<'_>> = Row::all(&blocks).collect();
    let by_value = matches!(work.op, Op::Sort { .. });
    if work.steps() == 1 {
        match &work.op {
            // NaN comes last in both directions.
            Op::Sort { descending } => {
                rows.retain(|row| !row.has_histograms());
                rows.sort_by_key(|row| {
                    let v = row.values[0];
                    let key = order_key(v);
                    (v.is_nan(), if *descending { !key } else { key })
                });
            }
            Op::SortByLabel { labels: names, descending } => rows.sort_by(|a, b| {
                let by_names = names.iter().map(|n| natural(labels::get(a.labels, n), labels::get(b.labels, n)));
                let order = by_names.fold(std::cmp::Ordering::Equal, std::cmp::Ordering::then);
                let order = order.then_with(|| labels::compare(a.labels, b.labels));
                if *descending { order.reverse() } else { order }
            }),
            other => return Err(internal(&format!("{} does not sort", other.name()))),
        }
    }
    let (mut builder, mut pace) = (BatchesBuilder::new(work.schema.clone()), work.stop.pace());
    for row in rows {
        pace.walk(cost(work.steps()))?;
        work.hold(work.row_bytes() + row.labels.len())?;
        let labels = |out: &mut Vec<u8>| Name::Keep.apply(row.labels, row.drop_name, out);
        if by_value && row.has_histograms() {
            // Histograms have no order, and fall out also where nothing is ordered.
            let (values, valid) = builder.push(labels);
            values.copy_from_slice(row.values);
            row.validity(valid);
            builder.pop_if_empty();
        } else {
            builder.copy(&row, labels);
        }
    }
    builder.finish()
}

/// Compares texts with their runs of digits as numbers.
fn natural(a: &str, b: &str) -> std::cmp::Ordering {
    let (mut a, mut b) = (a, b);
    loop {
        let (x, y) = (chunk(a), chunk(b));
        if x.is_empty() || y.is_empty() {
            return x.len().cmp(&y.len());
        }
        let digits = |s: &str| s.starts_with(|c: char| c.is_ascii_digit());
        let order = if digits(x) && digits(y) {
            let (p, q) = (x.trim_start_matches('0'), y.trim_start_matches('0'));
            p.len().cmp(&q.len()).then_with(|| p.cmp(q)).then_with(|| x.len().cmp(&y.len()))
        } else {
            x.cmp(y)
        };
        if order.is_ne() {
            return order;
        }
        (a, b) = (&a[x.len()..], &b[y.len()..]);
    }
}

/// The longest start of only digits or only others.
fn chunk(s: &str) -> &str {
    let digit = s.starts_with(|c: char| c.is_ascii_digit());
    let end = s.find(|c: char| c.is_ascii_digit() != digit).unwrap_or(s.len());
    &s[..end]
}

#[cfg(test)]
mod tests {
    use super::natural;

    #[test]
    fn numbers_in_texts_order_as_numbers() {
        let sorted = ["", "a", "a1", "a2", "a10", "a10b", "b"];
        assert!(sorted.windows(2).all(|w| natural(w[0], w[1]).is_lt()));
        assert!(natural("x9", "x9").is_eq());
    }
}
