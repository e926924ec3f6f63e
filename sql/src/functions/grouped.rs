//! What aggregates of our own have in common: what one keeps of each group is a [`Kept`], and [`Groups`] is the
//! accumulator of many groups and of one. What groups hold is counted as it grows and shrinks, so that the account of
//! memory sees it after each batch.

use std::fmt::Debug;

use arrow::array::{Array, ArrayRef, BooleanArray};
use datafusion::common::ScalarValue;
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::function::AccumulatorArgs;
use datafusion::logical_expr::{Accumulator, EmitTo, GroupsAccumulator};
use datafusion::physical_expr::expressions::Literal;

/// Rows, each with the number of its group.
pub type Rows<'a> = &'a mut dyn Iterator<Item = (usize, usize)>;

/// What an aggregate keeps.
pub trait Kept: Debug + Send + Sync + 'static {
    /// What it keeps of a group.
    type Group: Default + Debug + Send + Sync + 'static;

    /// Adds rows to their groups; returns how many bytes the groups grew.
    ///
    /// # Errors
    /// For arguments that mean nothing.
    fn update(&self, groups: &mut [Self::Group], args: &[ArrayRef], rows: Rows<'_>) -> Result<usize>;

    /// Adds partial results to their groups; returns how many bytes the groups grew.
    ///
    /// # Errors
    /// Those of [`Kept::update`].
    fn merge(&self, groups: &mut [Self::Group], states: &[ArrayRef], rows: Rows<'_>) -> Result<usize>;

    /// The partial results of groups.
    ///
    /// # Errors
    /// When a column can't hold them.
    fn states(&self, groups: &[Self::Group]) -> Result<Vec<ArrayRef>>;

    /// The results of groups.
    ///
    /// # Errors
    /// When a group has none for a reason that must be told.
    fn results(&self, groups: &mut [Self::Group]) -> Result<ArrayRef>;

    /// What a group has on the heap.
    fn bytes(group: &Self::Group) -> usize;
}

/// The accumulator.
#[derive(Debug)]
pub struct Groups<K: Kept> {
    kept: K,
    groups: Vec<K::Group>,
    bytes: usize,
}

impl<K: Kept> Groups<K> {
    /// Of many groups.
    pub fn many(kept: K) -> Box<dyn GroupsAccumulator> {
        Box::new(Self { kept, groups: Vec::new(), bytes: 0 })
    }

    /// Of one group.
    pub fn one(kept: K) -> Box<dyn Accumulator> {
        Box::new(Self { kept, groups: vec![K::Group::default()], bytes: 0 })
    }

    fn take(&mut self, emit: EmitTo) -> Vec<K::Group> {
        let taken = emit.take_needed(&mut self.groups);
        let bytes: usize = taken.iter().map(K::bytes).sum();
        self.bytes = self.bytes.saturating_sub(bytes);
        taken
    }

    fn held(&self) -> usize {
        size_of::<Self>() + self.groups.capacity() * size_of::<K::Group>() + self.bytes
    }
}

fn chosen<'a>(groups: &'a [usize], filter: Option<&'a BooleanArray>) -> impl Iterator<Item = (usize, usize)> + 'a {
    let is_chosen = move |row: usize| filter.is_none_or(|f| f.is_valid(row) && f.value(row));
    groups.iter().copied().enumerate().filter(move |(row, _)| is_chosen(*row))
}

impl<K: Kept> GroupsAccumulator for Groups<K> {
    fn update_batch(
        &mut self,
        values: &[ArrayRef],
        group_indices: &[usize],
        opt_filter: Option<&BooleanArray>,
        total_num_groups: usize,
    ) -> Result<()> {
        self.groups.resize_with(total_num_groups.max(self.groups.len()), K::Group::default);
        self.bytes += self.kept.update(&mut self.groups, values, &mut chosen(group_indices, opt_filter))?;
        Ok(())
    }

    fn merge_batch(&mut self, values: &[ArrayRef], group_indices: &[usize], total_num_groups: usize) -> Result<()> {
        self.groups.resize_with(total_num_groups.max(self.groups.len()), K::Group::default);
        self.bytes += self.kept.merge(&mut self.groups, values, &mut chosen(group_indices, None))?;
        Ok(())
    }

    fn evaluate(&mut self, emit_to: EmitTo) -> Result<ArrayRef> {
        let mut groups = self.take(emit_to);
        self.kept.results(&mut groups)
    }

    fn state(&mut self, emit_to: EmitTo) -> Result<Vec<ArrayRef>> {
        let groups = self.take(emit_to);
        self.kept.states(&groups)
    }

    fn convert_to_state(&self, values: &[ArrayRef], opt_filter: Option<&BooleanArray>) -> Result<Vec<ArrayRef>> {
        // Each row is a group of its own.
        let rows: Vec<usize> = (0..values.first().map_or(0, |v| v.len())).collect();
        let mut groups: Vec<K::Group> = rows.iter().map(|_| K::Group::default()).collect();
        self.kept.update(&mut groups, values, &mut chosen(&rows, opt_filter))?;
        self.kept.states(&groups)
    }

    fn size(&self) -> usize {
        self.held()
    }
}

fn all_of_one(arrays: &[ArrayRef]) -> impl Iterator<Item = (usize, usize)> {
    (0..arrays.first().map_or(0, |a| a.len())).map(|row| (row, 0))
}

impl<K: Kept> Accumulator for Groups<K> {
    fn update_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        self.bytes += self.kept.update(&mut self.groups, values, &mut all_of_one(values))?;
        Ok(())
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> Result<()> {
        self.bytes += self.kept.merge(&mut self.groups, states, &mut all_of_one(states))?;
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        let states = self.kept.states(&self.groups)?;
        states.iter().map(|s| ScalarValue::try_from_array(s, 0)).collect()
    }

    fn evaluate(&mut self) -> Result<ScalarValue> {
        ScalarValue::try_from_array(&self.kept.results(&mut self.groups)?, 0)
    }

    fn size(&self) -> usize {
        self.held()
    }
}

/// An argument that must be the same for all rows.
///
/// # Errors
/// When it is no constant.
pub fn constant(args: &AccumulatorArgs<'_>, i: usize) -> Result<ScalarValue> {
    let literal = args.exprs.get(i).and_then(|e| (e.as_ref() as &dyn std::any::Any).downcast_ref::<Literal>());
    let refused = || DataFusionError::Plan(format!("argument {} of {} must be a constant", i + 1, args.name));
    literal.map(|l| l.value().clone()).ok_or_else(refused)
}
