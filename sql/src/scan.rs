//! The node above a [`SeriesScanExec`] that replaces the index of a row's series by what the statement asked of it.

use std::fmt;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, Int64Array, UInt32Array};
use arrow::compute::take;
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::record_batch::{RecordBatch, RecordBatchOptions};
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_expr::{EquivalenceProperties, PhysicalExpr};
use datafusion::physical_plan::metrics::{BaselineMetrics, ExecutionPlanMetricsSet, MetricsSet};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{DisplayAs, DisplayFormatType, ExecutionPlan, ExecutionPlanProperties, PlanProperties};
use engine::SeriesScanExec;
use futures::StreamExt;
use parking_lot::Mutex;

use crate::tags::dictionary::{Dictionary, TagColumn};

/// Where an output column comes from.
#[derive(Debug, Clone)]
pub enum Output {
    /// The input column with this index.
    Stored(usize),
    /// The code of the row's tag set.
    Series,
    /// The value ordinal of a tag.
    Tag(Arc<TagColumn>),
    /// The set ordinal.
    Tags,
    /// The index of the series in the scan's set.
    Index,
}

/// The name of a column of [`Output::Index`].
const INDEX: &str = "series#";

/// Gives each row of a series scan its tags as ordinals of the statement's dictionary.
#[derive(Debug)]
pub struct TagScanExec {
    input: Arc<dyn ExecutionPlan>,
    outputs: Vec<Output>,
    dictionary: Arc<Dictionary>,
    /// Series that matchers left before the predicate was evaluated on each.
    candidates: usize,
    predicate: String,
    properties: Arc<PlanProperties>,
    metrics: ExecutionPlanMetricsSet,
    /// Per output what each series of the set has, made by the partition that comes first.
    lookups: Arc<Mutex<Option<Lookups>>>,
}

type Lookups = Arc<Vec<Option<ArrayRef>>>;

impl TagScanExec {
    /// Puts `outputs`, which have `schema`, on top of `input`.
    pub fn new(
        input: Arc<SeriesScanExec>,
        outputs: Vec<Output>,
        schema: SchemaRef,
        dictionary: Arc<Dictionary>,
        candidates: usize,
        predicate: String,
    ) -> Self {
        let properties = Arc::new(PlanProperties::new(
            EquivalenceProperties::new(schema),
            input.properties().output_partitioning().clone(),
            input.properties().emission_type,
            input.properties().boundedness,
        ));
        let metrics = ExecutionPlanMetricsSet::new();
        Self { input, outputs, dictionary, candidates, predicate, properties, metrics, lookups: Arc::default() }
    }

    /// The scan below.
    pub fn scan(&self) -> Option<&SeriesScanExec> {
        self.input.downcast_ref()
    }

    /// How many series a predicate on tags left.
    pub fn fmt_choice(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.predicate.is_empty() {
            return Ok(());
        }
        let left = self.scan().map_or(0, |s| s.set().series.len());
        write!(f, ", codes={left} of {} by [{}]", self.candidates, self.predicate)
    }

    /// Where the columns come from.
    pub fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    /// The same rows with these of its columns, and then the indexes of their series. `None` above a node that is no scan.
    pub fn with_index(&self, columns: &[usize]) -> Option<Self> {
        let scan = self.scan()?;
        let mut stored = Vec::new();
        let mut outputs = Vec::with_capacity(columns.len() + 1);
        let mut fields = Vec::with_capacity(columns.len() + 1);
        let schema = self.schema();
        for column in columns {
            fields.push(schema.field(*column).clone());
            outputs.push(match &self.outputs[*column] {
                Output::Stored(i) => {
                    stored.push(*scan.columns().get(i.checked_sub(1)?)?);
                    Output::Stored(stored.len())
                }
                other => other.clone(),
            });
        }
        fields.push(Field::new(INDEX, DataType::UInt32, false));
        outputs.push(Output::Index);
        let (dictionary, predicate) = (self.dictionary.clone(), self.predicate.clone());
        let schema = Arc::new(Schema::new(fields));
        Some(Self::new(Arc::new(scan.reading(stored)), outputs, schema, dictionary, self.candidates, predicate))
    }

    /// What these columns, none of which is stored, have for series.
    ///
    /// # Errors
    /// For a stored column.
    pub fn of_series(&self, columns: &[usize], series: &UInt32Array) -> Result<RecordBatch> {
        let lookups = self.lookups()?;
        let schema = Arc::new(self.schema().project(columns)?);
        let arrays = columns
            .iter()
            .map(|c| match &lookups[*c] {
                Some(lookup) => Ok(take(lookup, series, None)?),
                None => Err(DataFusionError::Internal("a stored column of series".to_owned())),
            })
            .collect::<Result<Vec<ArrayRef>>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(series.len()));
        Ok(RecordBatch::try_new_with_options(schema, arrays, &options)?)
    }

    /// The dictionary is closed by the first call, after every scan of the statement was planned.
    fn lookups(&self) -> Result<Lookups> {
        let mut made = self.lookups.lock();
        if let Some(lookups) = &*made {
            return Ok(lookups.clone());
        }
        let scan = self.scan().ok_or_else(|| DataFusionError::Internal("tags of a node that is no scan".to_owned()))?;
        let series = &scan.set().series;
        let lookups: Vec<Option<ArrayRef>> = self
            .outputs
            .iter()
            .map(|o| match o {
                Output::Stored(_) | Output::Index => None,
                Output::Series => {
                    Some(Arc::new(series.iter().map(|s| s.id.code.0).collect::<Int64Array>()) as ArrayRef)
                }
                Output::Tag(column) => Some(Arc::new(self.dictionary.values().ordinals(column)) as ArrayRef),
                Output::Tags => Some(Arc::new(self.dictionary.values().set_ordinals(series)) as ArrayRef),
            })
            .collect();
        Ok(made.insert(Arc::new(lookups)).clone())
    }
}

fn project(
    batch: &RecordBatch,
    outputs: &[Output],
    lookups: &[Option<ArrayRef>],
    schema: &SchemaRef,
) -> Result<RecordBatch> {
    let index = batch
        .column(0)
        .as_any()
        .downcast_ref::<UInt32Array>()
        .ok_or_else(|| DataFusionError::Internal("a series scan gave no series".to_owned()))?;
    let columns = outputs
        .iter()
        .zip(lookups)
        .map(|(output, lookup)| match (output, lookup) {
            (Output::Stored(i), _) => Ok(batch.column(*i).clone()),
            (Output::Index, _) => Ok(batch.column(0).clone()),
            (_, Some(lookup)) => Ok(take(lookup, index, None)?),
            (_, None) => Err(DataFusionError::Internal("a tag column without its lookup".to_owned())),
        })
        .collect::<Result<Vec<ArrayRef>>>()?;
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    Ok(RecordBatch::try_new_with_options(schema.clone(), columns, &options)?)
}

impl DisplayAs for TagScanExec {
    fn fmt_as(&self, t: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let schema = self.schema();
        let columns: Vec<String> = schema
            .fields()
            .iter()
            .zip(&self.outputs)
            .map(|(field, output)| match output {
                Output::Tag(_) | Output::Tags => format!("{}#", field.name()),
                Output::Stored(_) | Output::Series | Output::Index => field.name().clone(),
            })
            .collect();
        if matches!(t, DisplayFormatType::TreeRender) {
            return write!(f, "columns={}", columns.join(", "));
        }
        write!(f, "TagScanExec: columns=[{}]", columns.join(", "))?;
        self.fmt_choice(f)
    }
}

impl ExecutionPlan for TagScanExec {
    fn name(&self) -> &str {
        "TagScanExec"
    }

    fn properties(&self) -> &Arc<PlanProperties> {
        &self.properties
    }

    fn children(&self) -> Vec<&Arc<dyn ExecutionPlan>> {
        vec![&self.input]
    }

    fn benefits_from_input_partitioning(&self) -> Vec<bool> {
        // A scan cuts itself into as many partitions as pay.
        vec![false]
    }

    fn apply_expressions(
        &self,
        _f: &mut dyn FnMut(&Arc<dyn PhysicalExpr>) -> Result<TreeNodeRecursion>,
    ) -> Result<TreeNodeRecursion> {
        Ok(TreeNodeRecursion::Continue)
    }

    fn with_new_children(self: Arc<Self>, children: Vec<Arc<dyn ExecutionPlan>>) -> Result<Arc<dyn ExecutionPlan>> {
        let [input] = <[_; 1]>::try_from(children)
            .map_err(|c| DataFusionError::Internal(format!("TagScanExec has one child, not {}", c.len())))?;
        let mut properties = (*self.properties).clone();
        properties.partitioning = input.output_partitioning().clone();
        Ok(Arc::new(Self {
            input,
            outputs: self.outputs.clone(),
            dictionary: self.dictionary.clone(),
            candidates: self.candidates,
            predicate: self.predicate.clone(),
            properties: Arc::new(properties),
            metrics: ExecutionPlanMetricsSet::new(),
            lookups: self.lookups.clone(),
        }))
    }

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> Result<SendableRecordBatchStream> {
        let lookups = self.lookups()?;
        let input = self.input.execute(partition, context)?;
        let (outputs, schema) = (self.outputs.clone(), self.schema());
        let metrics = BaselineMetrics::new(&self.metrics, partition);
        let stream_schema = schema.clone();
        let stream = input.map(move |batch| {
            let batch = batch?;
            let timer = metrics.elapsed_compute().timer();
            let out = project(&batch, &outputs, &lookups, &schema)?;
            timer.done();
            metrics.record_output(out.num_rows());
            Ok(out)
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(stream_schema, stream)))
    }

    fn metrics(&self) -> Option<MetricsSet> {
        Some(self.metrics.clone_inner())
    }
}
