//! The leaf of every plan: rows of a set of series, sorted and free of duplicates.

use std::fmt;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::error::Result as DfResult;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_plan::{DisplayAs, DisplayFormatType, ExecutionPlan, PlanProperties};

use crate::SeriesSet;

/// Reads rows of a [`SeriesSet`] from memtables and segments. Output columns are `series` (`UInt32`, index into
/// `set.series`), then the asked-for columns of the table in the asked-for order with their in-memory types; rows are
/// sorted by (series, ts) with unique keys; each partition holds a contiguous range of the set's series.
#[derive(Debug)]
pub struct SeriesScanExec {
    set: Arc<SeriesSet>,
    columns: Vec<usize>,
    schema: SchemaRef,
    properties: Arc<PlanProperties>,
}

impl SeriesScanExec {
    /// Scans `set`; `columns` are indexes into `set.table.columns`, without `series`.
    pub fn new(set: Arc<SeriesSet>, columns: Vec<usize>) -> Self {
        let _ = (set, columns);
        todo!("scan")
    }

    /// The series that are read.
    pub fn set(&self) -> &Arc<SeriesSet> {
        &self.set
    }
}

impl DisplayAs for SeriesScanExec {
    fn fmt_as(&self, _t: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SeriesScanExec: table={}, codes={}", self.set.table.name, self.set.series.len())
    }
}

impl ExecutionPlan for SeriesScanExec {
    fn name(&self) -> &str {
        "SeriesScanExec"
    }

    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![]
    }

    fn apply_expressions(
        &self,
        _f: &mut dyn for<'a> FnMut(&'a Arc<dyn PhysicalExpr>) -> DfResult<TreeNodeRecursion>,
    ) -> DfResult<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn with_new_children(self: Arc<Self>, _children: Vec<Arc<dyn ExecutionPlan>>) -> DfResult<Arc<dyn ExecutionPlan>> {
        Ok(self)
    }

    fn execute(&self, _partition: usize, _context: Arc<TaskContext>) -> DfResult<SendableRecordBatchStream> {
        let _ = &self.columns;
        todo!("scan")
    }
}
