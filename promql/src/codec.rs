//! Physical nodes as bytes, so that plans can run on another node.
//!
//! A node is its operation and grid as JSON; inputs are written by DataFusion and the codecs of their owners. A selector
//! takes its labels from the scan below it; only where that is not our scan do they travel with it.

use std::sync::Arc;

use datafusion::error::{DataFusionError, Result as DfResult};
use datafusion::execution::TaskContext;
use datafusion::physical_plan::ExecutionPlan;
use datafusion_proto::physical_plan::{PhysicalExtensionCodec, PhysicalProtoConverterExtension};
use serde::{Deserialize, Serialize};

use crate::QueryError;
use crate::exec::{NodeExec, SeriesLabels};
use crate::options::Grid;
use crate::plan::ops::{Op, Place};

#[derive(Serialize, Deserialize)]
struct Encoded {
    op: Op,
    grid: Grid,
    place: Place,
    labels: Option<Vec<Vec<u8>>>,
}

/// Writes and reads [`NodeExec`]s.
#[derive(Debug, Default)]
pub struct Codec;

fn failed(what: &str, e: impl std::fmt::Display) -> DataFusionError {
    QueryError::internal(format!("{what} a plan node failed: {e}")).into()
}

impl PhysicalExtensionCodec for Codec {
    fn try_decode(
        &self,
        bytes: &[u8],
        inputs: &[Arc<dyn ExecutionPlan>],
        _context: &TaskContext,
        _converter: &dyn PhysicalProtoConverterExtension,
    ) -> DfResult<Arc<dyn ExecutionPlan>> {
        let Encoded { op, grid, place, labels } = serde_json::from_slice(bytes).map_err(|e| failed("reading", e))?;
        let labels = labels.map(|l| SeriesLabels::List(l.into(), None));
        Ok(Arc::new(NodeExec::new(op, grid, place, inputs.to_vec(), labels)))
    }

    fn try_encode(
        &self,
        node: Arc<dyn ExecutionPlan>,
        bytes: &mut Vec<u8>,
        _converter: &dyn PhysicalProtoConverterExtension,
    ) -> DfResult<()> {
        let node = node.downcast_ref::<NodeExec>().ok_or_else(|| failed("writing", "not a node of PromQL"))?;
        let labels = match &node.labels {
            Some(SeriesLabels::List(list, _)) => Some(list.to_vec()),
            _ => None,
        };
        let encoded = Encoded { op: node.op.clone(), grid: node.grid, place: node.place, labels };
        serde_json::to_writer(bytes, &encoded).map_err(|e| failed("writing", e))
    }
}
