//! The schema `catalog`: what the database knows of itself. Its tables are made when they are read, from what is in memory
//! anyway, and what a reading gathers is reserved in the account of memory.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use arrow::array::{
    ArrayRef, AsArray, BooleanArray, Date32Array, Float64Array, Int64Array, StringArray, StringBuilder,
    TimestampMillisecondArray,
};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use catalog::Series;
use catalog::files::DataFile;
use catalog::tables::time_type;
use catalog::tag::METRIC_NAME;
use datafusion::catalog::streaming::StreamingTable;
use datafusion::catalog::{SchemaProvider, Session, TableProvider};
use datafusion::common::ScalarValue;
use datafusion::datasource::TableType;
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::memory_pool::{MemoryConsumer, MemoryReservation};
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::logical_expr::{ColumnarValue, Expr, ScalarFunctionArgs, ScalarUDFImpl, Signature, Volatility};
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::streaming::PartitionStream;
use engine::{Activity, Engine, Stop};
use futures::stream;

use crate::error::SqlError;
use crate::schema::everything;
use crate::session::Caller;
use crate::table::external;
use crate::tags::dictionary::{map_array, map_type};

/// The schema.
#[derive(Debug)]
pub struct Catalog {
    engine: Engine,
}

impl Catalog {
    /// That of an engine.
    pub fn new(engine: &Engine) -> Self {
        Self { engine: engine.clone() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Listing {
    Files,
    Metrics,
    Queries,
    Settings,
    TagSets,
    Tags,
}

const LISTINGS: [(&str, Listing); 6] = [
    ("files", Listing::Files),
    ("metrics", Listing::Metrics),
    ("queries", Listing::Queries),
    ("settings", Listing::Settings),
    ("tag_sets", Listing::TagSets),
    ("tags", Listing::Tags),
];

#[async_trait]
impl SchemaProvider for Catalog {
    fn table_names(&self) -> Vec<String> {
        LISTINGS.iter().map(|(n, _)| (*n).to_owned()).collect()
    }

    async fn table(&self, name: &str) -> Result<Option<Arc<dyn TableProvider>>> {
        let Some((_, listing)) = LISTINGS.iter().find(|(n, _)| *n == name) else { return Ok(None) };
        let schema = listing.schema();
        let rows = Rows { engine: self.engine.clone(), listing: *listing, schema: schema.clone() };
        Ok(Some(Arc::new(ListingTable(StreamingTable::try_new(schema, vec![Arc::new(rows)])?))))
    }

    fn table_exist(&self, name: &str) -> bool {
        LISTINGS.iter().any(|(n, _)| *n == name)
    }
}

/// A listing, which is a view to those who list tables.
#[derive(Debug)]
struct ListingTable(StreamingTable);

#[async_trait]
impl TableProvider for ListingTable {
    fn schema(&self) -> SchemaRef {
        self.0.schema()
    }

    fn table_type(&self) -> TableType {
        TableType::View
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        self.0.scan(state, projection, filters, limit).await
    }
}

impl Listing {
    fn schema(self) -> SchemaRef {
        let text = |name: &str, nullable: bool| Field::new(name, DataType::Utf8, nullable);
        let number = |name: &str| Field::new(name, DataType::Int64, false);
        Arc::new(Schema::new(match self {
            Self::TagSets => vec![number("code"), text("metric", true), Field::new("tags", map_type(), true)],
            Self::Tags => vec![text("key", false), text("value", false), number("series")],
            Self::Metrics => vec![text("metric", false), text("type", false), text("help", false), text("unit", false)],
            Self::Files => vec![
                text("table_name", false),
                number("id"),
                text("path", false),
                Field::new("day", DataType::Date32, false),
                number("level"),
                number("rows"),
                number("bytes"),
                Field::new("ts_min", time_type(), false),
                Field::new("ts_max", time_type(), false),
            ],
            Self::Queries => vec![
                number("id"),
                text("username", false),
                text("language", false),
                text("state", false),
                Field::new("begun", time_type(), false),
                Field::new("seconds", DataType::Float64, false),
                number("rows"),
                number("bytes_scanned"),
                number("memory"),
                text("query", false),
            ],
            Self::Settings => {
                vec![text("name", false), text("value", false), text("default", false), text("description", false)]
            }
        }))
    }
}

/// The rows of a listing.
#[derive(Debug)]
struct Rows {
    engine: Engine,
    listing: Listing,
    schema: SchemaRef,
}

impl PartitionStream for Rows {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, context: Arc<TaskContext>) -> SendableRecordBatchStream {
        // Of the transaction, where there is one.
        let engine = context.session_config().get_extension::<Engine>();
        let engine = engine.map_or_else(|| self.engine.clone(), |e| Engine::clone(&e));
        let (listing, schema) = (self.listing, self.schema.clone());
        let rows = async move {
            let reading = Reading {
                stop: Stop::of(context.session_config().options()),
                caller: context.session_config().get_extension::<Caller>(),
                held: MemoryConsumer::new("catalog").register(context.memory_pool()),
                engine,
            };
            let columns = reading.columns(listing).await?;
            let batch = RecordBatch::try_new(schema, columns)?;
            // Until the reader has it, what it was made of is reserved.
            drop(reading);
            Ok::<_, DataFusionError>(batch)
        };
        Box::pin(RecordBatchStreamAdapter::new(self.schema.clone(), stream::once(rows)))
    }
}

/// One reading of a listing.
struct Reading {
    engine: Engine,
    stop: Stop,
    caller: Option<Arc<Caller>>,
    held: MemoryReservation,
}

/// What a value in a map needs besides its text.
const ENTRY_BYTES: usize = 64;

impl Reading {
    async fn columns(&self, listing: Listing) -> Result<Vec<ArrayRef>> {
        match listing {
            Listing::TagSets => self.tag_sets().await,
            Listing::Tags => self.tags().await,
            Listing::Metrics => Ok(self.metrics()),
            Listing::Files => self.files(),
            Listing::Queries => Ok(self.queries()),
            Listing::Settings => self.settings(),
        }
    }

    /// Looks at every series that has rows in any table, a series with rows in several once for each.
    async fn visit(&self, mut visit: impl FnMut(&Arc<Series>) -> Result<()> + Send) -> Result<()> {
        for table in catalog::tables::all() {
            let mut failed = Ok(());
            let each = |series: &Arc<Series>| {
                failed = visit(series);
                failed.is_ok()
            };
            self.engine.visit(&everything(table), &self.stop, each).await.map_err(external)?;
            failed?;
        }
        Ok(())
    }

    async fn tag_sets(&self) -> Result<Vec<ArrayRef>> {
        let mut sets: BTreeMap<i64, Arc<Series>> = BTreeMap::new();
        self.visit(|series| {
            if let std::collections::btree_map::Entry::Vacant(free) = sets.entry(series.id.code.0) {
                let text: usize = series.tags.iter().map(|(k, v)| k.len() + v.len() + 16).sum();
                self.held.try_grow(ENTRY_BYTES + text)?;
                free.insert(series.clone());
            }
            Ok(())
        })
        .await?;
        let mut metric = StringBuilder::new();
        sets.values().for_each(|s| metric.append_option(s.tags.get(METRIC_NAME)));
        Ok(vec![
            Arc::new(sets.keys().copied().collect::<Int64Array>()),
            Arc::new(metric.finish()),
            map_array(sets.values().map(Some))?,
        ])
    }

    /// How many series have each value of each key: where cardinality comes from.
    async fn tags(&self) -> Result<Vec<ArrayRef>> {
        let mut seen: std::collections::HashSet<i64> = std::collections::HashSet::new();
        let mut keys: BTreeMap<String, HashMap<String, i64>> = BTreeMap::new();
        self.visit(|series| {
            if !seen.insert(series.id.code.0) {
                return Ok(());
            }
            self.held.try_grow(16)?;
            for (key, value) in series.tags.iter() {
                let values = match keys.get_mut(key) {
                    Some(values) => values,
                    None => keys.entry(key.to_owned()).or_default(),
                };
                match values.get_mut(value) {
                    Some(count) => *count += 1,
                    None => {
                        self.held.try_grow(2 * (ENTRY_BYTES + key.len() + value.len()))?;
                        values.insert(value.to_owned(), 1);
                    }
                }
            }
            Ok(())
        })
        .await?;
        let (mut key, mut value, mut count) = (StringBuilder::new(), StringBuilder::new(), Vec::new());
        for (k, values) in keys {
            let mut values: Vec<(String, i64)> = values.into_iter().collect();
            values.sort_unstable();
            for (v, n) in values {
                key.append_value(&k);
                value.append_value(v);
                count.push(n);
            }
        }
        Ok(vec![Arc::new(key.finish()), Arc::new(value.finish()), Arc::new(Int64Array::from(count))])
    }

    fn metrics(&self) -> Vec<ArrayRef> {
        let mut metadata = self.engine.metadata(None);
        metadata.sort_by(|a, b| a.metric.cmp(&b.metric));
        let column = |get: fn(&engine::MetricMetadata) -> &str| {
            Arc::new(metadata.iter().map(|m| Some(get(m))).collect::<StringArray>()) as ArrayRef
        };
        vec![column(|m| &m.metric), column(|m| &m.kind), column(|m| &m.help), column(|m| &m.unit)]
    }

    fn files(&self) -> Result<Vec<ArrayRef>> {
        let files = self.engine.files().map_err(external)?;
        let number =
            |get: fn(&DataFile) -> i64| Arc::new(files.iter().map(|(_, f)| get(f)).collect::<Int64Array>()) as ArrayRef;
        let time = |get: fn(&DataFile) -> i64| times(files.iter().map(|(_, f)| get(f)));
        Ok(vec![
            Arc::new(files.iter().map(|(t, _)| Some(t.name)).collect::<StringArray>()),
            number(|f| f.id),
            Arc::new(files.iter().map(|(_, f)| Some(f.path.as_str())).collect::<StringArray>()),
            Arc::new(Date32Array::from_iter_values(files.iter().map(|(_, f)| f.day))),
            number(|f| i64::from(f.level)),
            number(|f| f.rows as i64),
            number(|f| f.bytes as i64),
            time(|f| f.ts_min),
            time(|f| f.ts_max),
        ])
    }

    fn queries(&self) -> Vec<ArrayRef> {
        let mut all = self.engine.activities().all();
        all.retain(|a| self.caller.as_ref().is_some_and(|caller| caller.may_see(a)));
        let number =
            |get: fn(&Activity) -> u64| Arc::new(all.iter().map(|a| get(a) as i64).collect::<Int64Array>()) as ArrayRef;
        let text = |get: fn(&Activity) -> &str| {
            Arc::new(all.iter().map(|a| Some(get(a))).collect::<StringArray>()) as ArrayRef
        };
        let seconds: Float64Array = all.iter().map(|a| Some(a.duration().as_secs_f64())).collect();
        vec![
            number(|a| a.id),
            text(|a| &a.user),
            text(|a| a.language),
            text(|a| a.state()),
            times(all.iter().map(|a| a.begun_ms)),
            Arc::new(seconds),
            number(Activity::rows),
            number(Activity::bytes_scanned),
            number(Activity::memory),
            text(|a| &a.text),
        ]
    }

    fn settings(&self) -> Result<Vec<ArrayRef>> {
        if !self.caller.as_ref().is_some_and(|c| c.rights.admin) {
            return Err(denied("catalog.settings"));
        }
        let listed = &self.engine.settings().listed;
        let text = |get: fn(&engine::ListedSetting) -> &str| {
            Arc::new(listed.iter().map(|s| Some(get(s))).collect::<StringArray>()) as ArrayRef
        };
        Ok(vec![text(|s| &s.name), text(|s| &s.value), text(|s| &s.default), text(|s| &s.description)])
    }
}

fn times(values: impl Iterator<Item = i64>) -> ArrayRef {
    Arc::new(TimestampMillisecondArray::from_iter_values(values).with_data_type(time_type()))
}

fn denied(what: &str) -> DataFusionError {
    let message = format!("permission denied for {what}: it needs the scope admin");
    DataFusionError::External(Box::new(SqlError::new("42501", message)))
}

/// `catalog.cancel(id)`: stops a query; whether it ran.
#[derive(Debug)]
pub struct Cancel {
    engine: Engine,
    caller: Arc<Caller>,
    signature: Signature,
}

impl Cancel {
    /// The function for a caller, who may stop what is their own, or anything with the scope admin.
    pub fn new(engine: &Engine, caller: &Arc<Caller>) -> Self {
        let signature = Signature::exact(vec![DataType::Int64], Volatility::Volatile);
        Self { engine: engine.clone(), caller: caller.clone(), signature }
    }
}

impl PartialEq for Cancel {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.caller, &other.caller)
    }
}

impl Eq for Cancel {}

impl std::hash::Hash for Cancel {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.caller.name.hash(state);
    }
}

impl ScalarUDFImpl for Cancel {
    fn name(&self) -> &str {
        // The parser takes the schema off the names of functions.
        "cancel"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _given: &[DataType]) -> Result<DataType> {
        Ok(DataType::Boolean)
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        if !self.caller.rights.stops {
            let told =
                "permission denied for catalog.cancel: over HTTP it must be sent by POST, and not from a web page";
            return Err(DataFusionError::External(Box::new(SqlError::new("42501", told))));
        }
        let stop = |id: i64| {
            let id = u64::try_from(id).unwrap_or(0);
            self.engine.activities().cancel(id, |a| self.caller.may_see(a))
        };
        Ok(match args.args.first() {
            Some(ColumnarValue::Scalar(ScalarValue::Int64(id))) => {
                ColumnarValue::Scalar(ScalarValue::Boolean(id.map(stop)))
            }
            Some(ColumnarValue::Array(ids)) => {
                let ids = ids.as_primitive::<Int64Type>();
                ColumnarValue::Array(Arc::new(ids.iter().map(|id| id.map(stop)).collect::<BooleanArray>()))
            }
            _ => return Err(DataFusionError::Plan("catalog.cancel takes the id of a query".to_owned())),
        })
    }
}
