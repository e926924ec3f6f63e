//! The leaf of plans as bytes, so that a plan can run on another node.
//!
//! What travels is what the matchers meant: the tag sets, the columns and the time range. The reading node looks the sets
//! up in its own version of the data.

use std::sync::Arc;

use catalog::{Error, Result, TagSet, tables};
use datafusion::error::{DataFusionError, Result as DfResult};
use datafusion::execution::TaskContext;
use datafusion::physical_plan::ExecutionPlan;
use datafusion_proto::physical_plan::{PhysicalExtensionCodec, PhysicalProtoConverterExtension};
use prost::Message;

use crate::{Engine, SeriesScanExec};

#[derive(Clone, PartialEq, Message)]
struct Encoded {
    #[prost(uint32, tag = "1")]
    table: u32,
    #[prost(sint64, tag = "2")]
    start_ms: i64,
    #[prost(sint64, tag = "3")]
    end_ms: i64,
    #[prost(uint32, repeated, tag = "4")]
    columns: Vec<u32>,
    /// Canonical tag sets in storage order.
    #[prost(bytes = "vec", repeated, tag = "5")]
    tags: Vec<Vec<u8>>,
}

/// Writes and reads [`SeriesScanExec`]s. Reading needs the [`Engine`] as an extension of the session's configuration.
#[derive(Debug, Default)]
pub struct ScanCodec;

fn external(e: Error) -> DataFusionError {
    DataFusionError::External(Box::new(e))
}

fn decode(bytes: &[u8], engine: &Engine) -> Result<SeriesScanExec> {
    let encoded =
        Encoded::decode(bytes).map_err(|e| Error::invalid("scan of a plan can't be decoded").with_source(e))?;
    let table = u16::try_from(encoded.table).ok().and_then(tables::by_id);
    let table = table.ok_or_else(|| Error::invalid(format!("scan of a plan names unknown table {}", encoded.table)))?;
    let columns: Vec<usize> = encoded.columns.iter().map(|c| *c as usize).collect();
    if let Some(column) = columns.iter().find(|c| **c == 0 || **c >= table.columns.len()) {
        return Err(Error::invalid(format!("scan of a plan names column {column} of table {}", table.name)));
    }
    let tags = encoded.tags.iter().map(|t| TagSet::check(t)).collect::<Result<Vec<_>>>()?;
    let set = engine.series_set(table.clone(), tags, encoded.start_ms, encoded.end_ms)?;
    Ok(SeriesScanExec::new(Arc::new(set), columns))
}

impl PhysicalExtensionCodec for ScanCodec {
    fn try_decode(
        &self,
        bytes: &[u8],
        _inputs: &[Arc<dyn ExecutionPlan>],
        context: &TaskContext,
        _converter: &dyn PhysicalProtoConverterExtension,
    ) -> DfResult<Arc<dyn ExecutionPlan>> {
        let engine = context.session_config().get_extension::<Engine>();
        let engine = engine.ok_or_else(|| external(Error::internal("the session carries no engine")))?;
        Ok(Arc::new(decode(bytes, &engine).map_err(external)?))
    }

    fn try_encode(
        &self,
        node: Arc<dyn ExecutionPlan>,
        bytes: &mut Vec<u8>,
        _converter: &dyn PhysicalProtoConverterExtension,
    ) -> DfResult<()> {
        let scan = node.downcast_ref::<SeriesScanExec>();
        let scan = scan.ok_or_else(|| external(Error::internal("not a scan of series")))?;
        let set = scan.set();
        let encoded = Encoded {
            table: u32::from(set.table.id),
            start_ms: set.start_ms,
            end_ms: set.end_ms,
            columns: scan.columns().iter().map(|c| *c as u32).collect(),
            tags: set.series.iter().map(|s| s.tags.as_bytes().to_vec()).collect(),
        };
        encoded.encode(bytes).map_err(|e| external(Error::internal("scan can't be written").with_source(e)))
    }
}

#[cfg(test)]
mod tests;
