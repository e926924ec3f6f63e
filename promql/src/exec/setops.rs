//! Set operators between vectors: `and`, `or`, `unless`.

use arrow::array::RecordBatch;
use datafusion::error::Result as DfResult;
use hashbrown::HashMap;
use hashbrown::hash_map::EntryRef;

use super::relabel::Merger;
use super::{Pace, Work, cost, internal};
use crate::block::{Name, Row};
use crate::labels::Grouping;
use crate::plan::ops::{Op, SetOp};
use crate::result::Block;

/// What a signature takes beside its bytes, about.
const KEY_BYTES: usize = 96;

/// For each signature, where any of its series has a value.
fn presence(work: &Work, blocks: &[Block], by: &Grouping, pace: &mut Pace) -> DfResult<HashMap<Vec<u8>, Vec<bool>>> {
    let steps = work.steps();
    let mut all: HashMap<Vec<u8>, Vec<bool>> = HashMap::new();
    let mut key = Vec::new();
    for row in Row::all(blocks) {
        pace.walk(cost(steps))?;
        key.clear();
        by.key(row.labels, &mut key);
        let present = match all.entry_ref(key.as_slice()) {
            EntryRef::Occupied(e) => e.into_mut(),
            EntryRef::Vacant(e) => {
                work.hold(steps + key.len() + KEY_BYTES)?;
                e.insert(vec![false; steps])
            }
        };
        row.for_each_sample(|step| present[step] = true);
    }
    Ok(all)
}

pub(super) async fn execute(work: &Work) -> DfResult<Vec<RecordBatch>> {
    let Op::Set { op, labels } = &work.op else { return Err(internal("not a set operator")) };
    let (left, right) = futures::try_join!(work.blocks(0), work.blocks(1))?;
    let steps = work.steps();
    let mut merger = Merger::new(work);
    let mut key = Vec::new();
    let (mut pace, mut looking) = (work.stop.pace(), work.stop.pace());
    let mut keep = |rows: &[Block], other: &HashMap<Vec<u8>, Vec<bool>>, if_present: bool| -> DfResult<()> {
        for row in Row::all(rows) {
            pace.walk(cost(steps))?;
            key.clear();
            labels.key(row.labels, &mut key);
            let present = other.get(&key);
            if present.is_none() && if_present {
                continue;
            }
            let (index, _) = merger.row(|out| Name::Keep.apply(row.labels, row.drop_name, out))?;
            let mut kept = (0..steps).filter(|s| present.is_some_and(|p| p[*s]) == if_present);
            if row.has_histograms() || merger.has_histograms() {
                kept.try_for_each(|step| merger.put_sample(index, &row, step))?;
                continue;
            }
            let (values, valid) = merger.values(index);
            for step in kept {
                if let Some(v) = row.get(step) {
                    Merger::put(values, valid, step, v)?;
                }
            }
        }
        Ok(())
    };
    match op {
        SetOp::And => keep(&left, &presence(work, &right, labels, &mut looking)?, true)?,
        SetOp::Unless => keep(&left, &presence(work, &right, labels, &mut looking)?, false)?,
        SetOp::Or => {
            keep(&left, &HashMap::new(), false)?;
            keep(&right, &presence(work, &left, labels, &mut looking)?, false)?;
        }
    }
    merger.finish()
}
