//! `promql('query')` and `promql('query', start, end, step)` as tables of SQL: what PromQL answers, one row per series and
//! time, to be filtered, grouped and joined with anything.
//!
//! The plan of the query is a leaf of the statement's plan, so that the statement's deadline, its memory and its
//! cancellation hold for both. Times and steps are constants; without them the query is evaluated now.

use std::fmt;
use std::sync::Arc;
use std::task::Poll;

use arrow::array::{
    Array, ArrayRef, AsArray, Float64Builder, MapArray, RecordBatch, RecordBatchOptions, StringBuilder,
    StringViewBuilder, StructArray, TimestampMillisecondBuilder,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Fields, Float64Type, Int64Type, Schema, SchemaRef, TimeUnit};
use async_trait::async_trait;
use catalog::tables::time_type;
use datafusion::catalog::{Session, TableFunctionArgs, TableFunctionImpl, TableProvider};
use datafusion::common::ScalarValue;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::datasource::TableType;
use datafusion::error::{DataFusionError, Result as DfResult};
use datafusion::execution::{SendableRecordBatchStream, SessionState, TaskContext};
use datafusion::logical_expr::Expr;
use datafusion::physical_expr::{EquivalenceProperties, Partitioning, PhysicalExpr};
use datafusion::physical_plan::execution_plan::{Boundedness, EmissionType};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::{
    DisplayAs, DisplayFormatType, ExecutionPlan, ExecutionPlanProperties, PlanProperties, displayable,
};
use engine::{Engine, Error, ErrorKind, Notice, Notices, Stop};
use futures::{StreamExt, TryStreamExt, stream};

use crate::api::{check_resolution, parse_duration, parse_time};
use crate::error::{QueryError, QueryErrorKind};
use crate::exec::Notes;
use crate::labels::{self, Pairs};
use crate::options::{Grid, Settings};
use crate::result::Block;
use crate::{EvalOptions, exec, plan};

/// Rows of a batch.
const BATCH_ROWS: usize = 8192;

/// The function.
#[derive(Debug)]
pub(crate) struct Promql(pub Settings);

impl TableFunctionImpl for Promql {
    fn call_with_args(&self, args: TableFunctionArgs) -> DfResult<Arc<dyn TableProvider>> {
        let table = Answer::of(args.exprs(), self.0).map_err(in_sql)?;
        // A wrong text fails when the statement is prepared.
        plan(&table.query, &table.options(0)).map_err(in_sql)?;
        Ok(Arc::new(table))
    }
}

/// An error as SQL understands it.
fn in_sql(e: QueryError) -> DataFusionError {
    let kind = match e.kind {
        QueryErrorKind::BadData => ErrorKind::Invalid,
        QueryErrorKind::Execution if e.message.contains("too many samples") => ErrorKind::LimitExceeded,
        QueryErrorKind::Execution => ErrorKind::Invalid,
        QueryErrorKind::Timeout => ErrorKind::Timeout,
        QueryErrorKind::Canceled => ErrorKind::Canceled,
        QueryErrorKind::Unavailable => ErrorKind::Unavailable,
        QueryErrorKind::NotFound => ErrorKind::NotFound,
        QueryErrorKind::Internal => ErrorKind::Internal,
    };
    DataFusionError::External(Box::new(Error::new(kind, format!("promql(): {}", e.message))))
}

/// The rows that a query answers.
#[derive(Debug)]
struct Answer {
    query: String,
    /// Start, end and step in milliseconds; now when there are none.
    times: Option<(i64, i64, i64)>,
    settings: Settings,
}

impl Answer {
    fn of(arguments: &[Expr], settings: Settings) -> Result<Self, QueryError> {
        let mut constants = Vec::with_capacity(arguments.len());
        for (i, argument) in arguments.iter().enumerate() {
            match argument {
                Expr::Literal(value, _) => constants.push(value),
                other => {
                    return Err(QueryError::bad_data(format!("argument {} must be a constant, not {other}", i + 1)));
                }
            }
        }
        match constants.as_slice() {
            [query] => Ok(Self { query: text(query)?, times: None, settings }),
            [query, start, end, step] => {
                let (start, end, step) = (time("start", start)?, time("end", end)?, step_ms(step)?);
                if end < start {
                    return Err(QueryError::bad_data("end must not be before start"));
                }
                check_resolution((start, end), step.saturating_mul(1_000_000), &settings.limits)?;
                Ok(Self { query: text(query)?, times: Some((start, end, step)), settings })
            }
            other => Err(QueryError::bad_data(format!(
                "{} arguments were given; it takes a query, or a query, a start, an end and a step",
                other.len()
            ))),
        }
    }

    fn options(&self, now_ms: i64) -> EvalOptions {
        let options = match self.times {
            None => EvalOptions::instant(now_ms),
            Some((start, end, step)) => EvalOptions::range(start, end, step),
        };
        options.under(&self.settings)
    }
}

fn text(value: &ScalarValue) -> Result<String, QueryError> {
    value
        .try_as_str()
        .flatten()
        .map(str::to_owned)
        .ok_or_else(|| QueryError::bad_data(format!("the query must be a text, not {value}")))
}

/// A time: what SQL takes for one, or seconds since the epoch.
fn time(name: &str, value: &ScalarValue) -> Result<i64, QueryError> {
    let wrong = || QueryError::bad_data(format!("{name} must be a time or seconds since the epoch, not {value}"));
    if value.is_null() {
        return Err(wrong());
    }
    let text = match value {
        ScalarValue::Int64(Some(seconds)) => seconds.to_string(),
        ScalarValue::Float64(Some(seconds)) => seconds.to_string(),
        other => other.try_as_str().flatten().unwrap_or_default().to_owned(),
    };
    if let Ok(ms) = parse_time(&text) {
        return Ok(ms);
    }
    match value.cast_to(&DataType::Timestamp(TimeUnit::Millisecond, Some("UTC".into()))) {
        Ok(ScalarValue::TimestampMillisecond(Some(ms), _)) => Ok(ms),
        _ => Err(wrong()),
    }
}

/// A step: an interval, PromQL's duration, or seconds.
fn step_ms(value: &ScalarValue) -> Result<i64, QueryError> {
    let wrong = || {
        QueryError::bad_data(format!(
            "step must be an interval, a duration such as '1m', or seconds, and at least a millisecond, not {value}"
        ))
    };
    let ms = match value {
        ScalarValue::IntervalMonthDayNano(Some(i)) if i.months == 0 => {
            i64::from(i.days).checked_mul(86_400_000).and_then(|ms| ms.checked_add(i.nanoseconds / 1_000_000))
        }
        ScalarValue::IntervalDayTime(Some(i)) => Some(i64::from(i.days) * 86_400_000 + i64::from(i.milliseconds)),
        ScalarValue::Int64(Some(seconds)) => seconds.checked_mul(1000),
        ScalarValue::Float64(Some(seconds)) => parse_duration(&seconds.to_string()).ok().map(|ns| ns / 1_000_000),
        other => other.try_as_str().flatten().and_then(|t| parse_duration(t).ok()).map(|ns| ns / 1_000_000),
    };
    ms.filter(|ms| *ms > 0).ok_or_else(wrong)
}

/// The columns: as those of `samples`, and the labels as PromQL writes them.
fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("ts", time_type(), false),
        Field::new("metric", DataType::Utf8View, true),
        Field::new("value", DataType::Float64, false),
        Field::new("labels", DataType::Utf8View, false),
        Field::new("tags", tags_type(), false),
    ]))
}

fn tag_fields() -> Fields {
    Fields::from(vec![Field::new("key", DataType::Utf8, false), Field::new("value", DataType::Utf8View, true)])
}

/// The type of every `tags` column.
fn tags_type() -> DataType {
    DataType::Map(Arc::new(Field::new("entries", DataType::Struct(tag_fields()), false)), true)
}

#[async_trait]
impl TableProvider for Answer {
    fn schema(&self) -> SchemaRef {
        schema()
    }

    fn table_type(&self) -> TableType {
        TableType::Temporary
    }

    async fn scan(
        &self,
        session: &dyn Session,
        projection: Option<&Vec<usize>>,
        _filters: &[Expr],
        _limit: Option<usize>,
    ) -> DfResult<Arc<dyn ExecutionPlan>> {
        let engine = session.config().get_extension::<Engine>();
        let engine = engine.ok_or_else(|| in_sql(QueryError::internal("the session carries no engine")))?;
        let options = self.options(engine.now_ms());
        let planned = plan(&self.query, &options).map_err(in_sql)?;
        let Some(inner) = planned.plan else {
            return Err(in_sql(QueryError::bad_data("a text is no table; the query must give series or a number")));
        };
        let notes = Arc::new(Notes::new(options.limits.samples_max));
        for (at, warning) in planned.warnings {
            notes.warn(at, warning);
        }
        let told = session.config().get_extension::<Notices>().map(|to| Arc::new(Told { notes: notes.clone(), to }));
        let mut state = exec::session(&engine, notes);
        // What stops the statement stops this.
        state.config_mut().options_mut().extensions.insert(Stop::of(session.config_options()));
        let input = state.create_physical_plan(&inner).await.map_err(|e| in_sql(e.into()))?;
        let all: Vec<usize> = (0..schema().fields().len()).collect();
        let columns = projection.cloned().unwrap_or(all);
        Ok(Arc::new(Rows { told, ..Rows::new(self.query.clone(), planned.grid, input, state, columns)? }))
    }
}

/// Has the client told what there is to say of a query: once it has run, or been left.
#[derive(Debug)]
struct Told {
    notes: Arc<Notes>,
    to: Arc<Notices>,
}

impl Told {
    fn tell(&self) {
        let (warnings, infos) = self.notes.take();
        let warnings = warnings.into_iter().map(|text| Notice { is_warning: true, text });
        let infos = infos.into_iter().map(|text| Notice { is_warning: false, text });
        warnings.chain(infos).for_each(|notice| self.to.add(notice));
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        self.tell();
    }
}

/// Makes rows of blocks. Its input is not its child: the rules that SQL's plans are put through do not know the nodes
/// there.
#[derive(Debug)]
struct Rows {
    query: String,
    grid: Grid,
    input: Arc<dyn ExecutionPlan>,
    state: SessionState,
    columns: Vec<usize>,
    properties: Arc<PlanProperties>,
    told: Option<Arc<Told>>,
}

impl Rows {
    fn new(
        query: String,
        grid: Grid,
        input: Arc<dyn ExecutionPlan>,
        state: SessionState,
        columns: Vec<usize>,
    ) -> DfResult<Self> {
        let schema = Arc::new(schema().project(&columns)?);
        let properties = Arc::new(PlanProperties::new(
            EquivalenceProperties::new(schema),
            Partitioning::UnknownPartitioning(input.output_partitioning().partition_count().max(1)),
            EmissionType::Incremental,
            Boundedness::Bounded,
        ));
        Ok(Self { query, grid, input, state, columns, properties, told: None })
    }
}

impl DisplayAs for Rows {
    fn fmt_as(&self, _t: DisplayFormatType, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = displayable(self.input.as_ref()).indent(false).to_string();
        let inner = inner.trim_end().replace('\n', " <- ");
        write!(f, "PromqlRows: {:?}, {}", self.query, inner)
    }
}

impl ExecutionPlan for Rows {
    fn name(&self) -> &str {
        "PromqlRows"
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

    fn execute(&self, partition: usize, context: Arc<TaskContext>) -> DfResult<SendableRecordBatchStream> {
        // What it reserves counts as the statement's.
        let inner = TaskContext::from(&self.state).with_runtime(context.runtime_env());
        let input = self.input.execute(partition, Arc::new(inner))?;
        let (grid, columns, schema) = (self.grid, self.columns.clone(), self.schema());
        let output = schema.clone();
        let rows = input.map_err(|e| in_sql(e.into())).map(move |batch| {
            let batches = rows(&batch?, grid, &columns, &output);
            batches.map(|b| stream::iter(b.into_iter().map(Ok)))
        });
        let told = self.told.clone();
        let end = stream::poll_fn(move |_| {
            if let Some(told) = &told {
                told.tell();
            }
            Poll::Ready(None)
        });
        Ok(Box::pin(RecordBatchStreamAdapter::new(schema, rows.try_flatten().chain(end).boxed())))
    }
}

/// The rows of a batch of blocks, or of series at their own times.
fn rows(batch: &RecordBatch, grid: Grid, columns: &[usize], schema: &SchemaRef) -> DfResult<Vec<RecordBatch>> {
    let mut builder = Builder::new(columns, schema);
    if batch.schema_ref().field(1).name() == "times" {
        let wrong = || in_sql(QueryError::internal("batch is not a range vector"));
        let series = batch.column(0).as_binary_opt::<i32>().ok_or_else(wrong)?;
        let list = |i: usize| batch.column(i).as_list_opt::<i32>().ok_or_else(wrong);
        for row in 0..batch.num_rows() {
            if !list(3)?.value(row).is_empty() {
                return Err(histograms());
            }
            let (times, values) = (list(1)?.value(row), list(2)?.value(row));
            let times = times.as_primitive_opt::<Int64Type>().ok_or_else(wrong)?.values().iter();
            let values = values.as_primitive_opt::<Float64Type>().ok_or_else(wrong)?.values();
            builder.series(series.value(row), times.copied().zip(values.iter().copied()))?;
        }
    } else {
        let block = Block::try_new(batch).map_err(in_sql)?;
        if block.any_histograms() {
            return Err(histograms());
        }
        for row in 0..block.len() {
            let valid = (0..block.steps()).filter(|step| block.is_valid(row, *step));
            let values = block.values(row);
            builder.series(block.labels(row), valid.map(|step| (grid.time(step), values[step])))?;
        }
    }
    builder.finish()
}

fn histograms() -> DataFusionError {
    in_sql(QueryError::bad_data(
        "the query gives native histograms, which are no values; histogram_count, histogram_sum and histogram_quantile \
         make values of them",
    ))
}

/// Builds the columns that are asked for.
struct Builder<'a> {
    columns: &'a [usize],
    schema: &'a SchemaRef,
    ready: Vec<RecordBatch>,
    rows: usize,
    ts: TimestampMillisecondBuilder,
    metric: StringViewBuilder,
    value: Float64Builder,
    labels: StringViewBuilder,
    keys: StringBuilder,
    values: StringViewBuilder,
    ends: Vec<i32>,
}

impl<'a> Builder<'a> {
    fn new(columns: &'a [usize], schema: &'a SchemaRef) -> Self {
        Self {
            columns,
            schema,
            ready: Vec::new(),
            rows: 0,
            ts: TimestampMillisecondBuilder::new().with_timezone("UTC"),
            metric: StringViewBuilder::new(),
            value: Float64Builder::new(),
            labels: StringViewBuilder::new(),
            keys: StringBuilder::new(),
            values: StringViewBuilder::new(),
            ends: vec![0],
        }
    }

    fn wants(&self, column: usize) -> bool {
        self.columns.contains(&column)
    }

    fn series(&mut self, labels: &[u8], points: impl Iterator<Item = (i64, f64)>) -> DfResult<()> {
        let metric = labels::get(labels, catalog::tag::METRIC_NAME);
        let mut rest = Vec::new();
        labels::filter(labels, &mut rest, |name| name != catalog::tag::METRIC_NAME.as_bytes());
        let shown = if self.wants(3) { labels::display(&rest) } else { String::new() };
        let text = |bytes| std::str::from_utf8(bytes).unwrap_or_default();
        for (ts, value) in points {
            self.rows += 1;
            self.ts.append_value(ts);
            self.value.append_value(value);
            if self.wants(1) {
                self.metric.append_option(Some(metric).filter(|m| !m.is_empty()));
            }
            if self.wants(3) {
                self.labels.append_value(&shown);
            }
            if self.wants(4) {
                let mut pairs = 0;
                for pair in Pairs::new(&rest) {
                    self.keys.append_value(text(pair.name));
                    self.values.append_value(text(pair.value));
                    pairs += 1;
                }
                self.ends.push(self.ends.last().map_or(0, |end| end + pairs));
            }
            if self.rows == BATCH_ROWS {
                self.cut()?;
            }
        }
        Ok(())
    }

    fn cut(&mut self) -> DfResult<()> {
        let rows = std::mem::take(&mut self.rows);
        let ends = std::mem::replace(&mut self.ends, vec![0]);
        let all: [ArrayRef; 4] = [
            Arc::new(self.ts.finish()),
            Arc::new(self.metric.finish()),
            Arc::new(self.value.finish()),
            Arc::new(self.labels.finish()),
        ];
        let pairs: Vec<ArrayRef> = vec![Arc::new(self.keys.finish()), Arc::new(self.values.finish())];
        let mut columns = Vec::with_capacity(self.columns.len());
        for column in self.columns {
            columns.push(match all.get(*column) {
                Some(array) => array.clone(),
                None => {
                    let entries = StructArray::try_new(tag_fields(), pairs.clone(), None)?;
                    let field = Arc::new(Field::new("entries", DataType::Struct(tag_fields()), false));
                    let ends = OffsetBuffer::new(ends.clone().into());
                    Arc::new(MapArray::try_new(field, ends, entries, None, true)?) as ArrayRef
                }
            });
        }
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        self.ready.push(RecordBatch::try_new_with_options(self.schema.clone(), columns, &options)?);
        Ok(())
    }

    fn finish(mut self) -> DfResult<Vec<RecordBatch>> {
        if self.rows > 0 {
            self.cut()?;
        }
        Ok(self.ready)
    }
}
