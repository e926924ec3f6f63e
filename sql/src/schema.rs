//! The database as SQL sees it: the schemas `public`, `prometheus` and `catalog`, and what their tables are.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use arrow::array::{ArrayRef, Date32Array, Int64Array, StringArray, StringBuilder, TimestampMillisecondArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use catalog::files::DataFile;
use catalog::tables::{HISTOGRAMS, SAMPLES, time_type};
use catalog::tag::METRIC_NAME;
use catalog::{MatchOp, Matcher, Series, TableSchema};
use datafusion::catalog::{CatalogProvider, MemTable, SchemaProvider, Session, TableProvider};
use datafusion::datasource::TableType;
use datafusion::error::Result;
use datafusion::logical_expr::Expr;
use datafusion::physical_plan::ExecutionPlan;
use engine::{Engine, Selection, Stop};
use parking_lot::RwLock;

use crate::table::{SeriesTable, external};
use crate::tags::dictionary::{map_array, map_type};

/// All schemas of a database. What is registered besides our own are `pg_catalog` and its like.
#[derive(Debug)]
pub struct Database {
    schemas: RwLock<BTreeMap<String, Arc<dyn SchemaProvider>>>,
}

impl Database {
    /// The database of an engine with these metrics.
    pub fn new(engine: &Engine, metrics: &Arc<Metrics>) -> Self {
        let schemas: [(&str, Arc<dyn SchemaProvider>); 3] = [
            ("public", Arc::new(Public { engine: engine.clone() })),
            ("prometheus", metrics.clone()),
            ("catalog", Arc::new(Catalog { engine: engine.clone() })),
        ];
        Self { schemas: RwLock::new(schemas.into_iter().map(|(n, s)| (n.to_owned(), s)).collect()) }
    }
}

impl CatalogProvider for Database {
    fn schema_names(&self) -> Vec<String> {
        self.schemas.read().keys().cloned().collect()
    }

    fn schema(&self, name: &str) -> Option<Arc<dyn SchemaProvider>> {
        self.schemas.read().get(name).cloned()
    }

    fn register_schema(&self, name: &str, schema: Arc<dyn SchemaProvider>) -> Result<Option<Arc<dyn SchemaProvider>>> {
        Ok(self.schemas.write().insert(name.to_owned(), schema))
    }
}

/// The stored tables.
#[derive(Debug)]
struct Public {
    engine: Engine,
}

#[async_trait]
impl SchemaProvider for Public {
    fn table_names(&self) -> Vec<String> {
        catalog::tables::all().iter().map(|t| t.name.to_owned()).collect()
    }

    async fn table(&self, name: &str) -> Result<Option<Arc<dyn TableProvider>>> {
        Ok(catalog::tables::by_name(name)
            .map(|t| Arc::new(SeriesTable::all(self.engine.clone(), t.clone())) as Arc<dyn TableProvider>))
    }

    async fn table_type(&self, name: &str) -> Result<Option<TableType>> {
        Ok(self.table_exist(name).then_some(TableType::Base))
    }

    fn table_exist(&self, name: &str) -> bool {
        catalog::tables::by_name(name).is_some()
    }
}

/// One virtual table per metric.
#[derive(Debug)]
pub struct Metrics {
    engine: Engine,
    /// Of all metrics, as of the last statement that asked for the names of tables.
    names: RwLock<Arc<BTreeSet<String>>>,
}

fn everything(table: &Arc<TableSchema>) -> Selection {
    Selection { table: table.clone(), matchers: vec![], start_ms: i64::MIN, end_ms: i64::MAX }
}

impl Metrics {
    /// The metrics of an engine.
    pub fn new(engine: &Engine) -> Self {
        Self { engine: engine.clone(), names: RwLock::default() }
    }

    /// Looks up the names of all metrics, which are listed from then on. Any metric resolves without that.
    ///
    /// # Errors
    /// Storage errors.
    pub async fn refresh(&self) -> Result<()> {
        let mut names = BTreeSet::new();
        for table in [&*SAMPLES, &*HISTOGRAMS] {
            let visit = |series: &Arc<Series>| {
                if let Some(name) = series.tags.get(METRIC_NAME)
                    && !names.contains(name)
                {
                    names.insert(name.to_owned());
                }
                true
            };
            self.engine.visit(&everything(table), &Stop::default(), visit).await.map_err(external)?;
        }
        *self.names.write() = Arc::new(names);
        Ok(())
    }

    /// The labels that the metric's series in `table` have; `None` without any series.
    async fn labels(&self, table: &Arc<TableSchema>, metric: &str) -> Result<Option<BTreeSet<String>>> {
        let matcher = Matcher::new(METRIC_NAME, MatchOp::Eq, metric).map_err(external)?;
        let selection = Selection { matchers: vec![matcher], ..everything(table) };
        let mut labels: Option<BTreeSet<String>> = None;
        let visit = |series: &Arc<Series>| {
            let labels = labels.get_or_insert_default();
            for (key, _) in series.tags.iter() {
                if !labels.contains(key) {
                    labels.insert(key.to_owned());
                }
            }
            true
        };
        self.engine.visit(&selection, &Stop::default(), visit).await.map_err(external)?;
        Ok(labels)
    }
}

#[async_trait]
impl SchemaProvider for Metrics {
    fn table_names(&self) -> Vec<String> {
        self.names.read().iter().cloned().collect()
    }

    async fn table(&self, name: &str) -> Result<Option<Arc<dyn TableProvider>>> {
        if name.is_empty() {
            return Ok(None);
        }
        for table in [&*SAMPLES, &*HISTOGRAMS] {
            if let Some(labels) = self.labels(table, name).await? {
                let provider = SeriesTable::of_metric(self.engine.clone(), table.clone(), name, labels);
                return Ok(Some(Arc::new(provider)));
            }
        }
        Ok(None)
    }

    async fn table_type(&self, _name: &str) -> Result<Option<TableType>> {
        Ok(Some(TableType::View))
    }

    fn table_exist(&self, name: &str) -> bool {
        !name.is_empty()
    }
}

/// What the database knows of itself.
#[derive(Debug)]
struct Catalog {
    engine: Engine,
}

/// The tables of the schema `catalog`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Listing {
    TagSets,
    Metrics,
    Files,
}

const LISTINGS: [(&str, Listing); 3] =
    [("files", Listing::Files), ("metrics", Listing::Metrics), ("tag_sets", Listing::TagSets)];

#[async_trait]
impl SchemaProvider for Catalog {
    fn table_names(&self) -> Vec<String> {
        LISTINGS.iter().map(|(n, _)| (*n).to_owned()).collect()
    }

    async fn table(&self, name: &str) -> Result<Option<Arc<dyn TableProvider>>> {
        Ok(LISTINGS.iter().find(|(n, _)| *n == name).map(|(_, listing)| {
            Arc::new(ListingTable { engine: self.engine.clone(), listing: *listing }) as Arc<dyn TableProvider>
        }))
    }

    fn table_exist(&self, name: &str) -> bool {
        LISTINGS.iter().any(|(n, _)| *n == name)
    }
}

/// A table that is made when it is read.
#[derive(Debug)]
struct ListingTable {
    engine: Engine,
    listing: Listing,
}

impl ListingTable {
    async fn rows(&self) -> Result<RecordBatch> {
        let columns: Vec<ArrayRef> = match self.listing {
            Listing::TagSets => {
                // A set may have rows in several tables.
                let mut sets: BTreeMap<i64, Arc<Series>> = BTreeMap::new();
                for table in catalog::tables::all() {
                    let visit = |series: &Arc<Series>| {
                        sets.entry(series.id.code.0).or_insert_with(|| series.clone());
                        true
                    };
                    self.engine.visit(&everything(table), &Stop::default(), visit).await.map_err(external)?;
                }
                let mut metric = StringBuilder::new();
                sets.values().for_each(|s| metric.append_option(s.tags.get(METRIC_NAME)));
                vec![
                    Arc::new(sets.keys().copied().collect::<Int64Array>()),
                    Arc::new(metric.finish()),
                    map_array(sets.values().map(Some))?,
                ]
            }
            Listing::Metrics => {
                let mut metadata = self.engine.metadata(None);
                metadata.sort_by(|a, b| a.metric.cmp(&b.metric));
                let column = |get: fn(&engine::MetricMetadata) -> &str| {
                    Arc::new(metadata.iter().map(|m| Some(get(m))).collect::<StringArray>()) as ArrayRef
                };
                vec![column(|m| &m.metric), column(|m| &m.kind), column(|m| &m.help), column(|m| &m.unit)]
            }
            Listing::Files => {
                let files = self.engine.files();
                let number = |get: fn(&DataFile) -> i64| {
                    Arc::new(files.iter().map(|(_, f)| get(f)).collect::<Int64Array>()) as ArrayRef
                };
                let time = |get: fn(&DataFile) -> i64| {
                    let times = TimestampMillisecondArray::from_iter_values(files.iter().map(|(_, f)| get(f)));
                    Arc::new(times.with_data_type(time_type())) as ArrayRef
                };
                vec![
                    Arc::new(files.iter().map(|(t, _)| Some(t.name)).collect::<StringArray>()),
                    number(|f| f.id),
                    Arc::new(files.iter().map(|(_, f)| Some(f.path.as_str())).collect::<StringArray>()),
                    Arc::new(Date32Array::from_iter_values(files.iter().map(|(_, f)| f.day))),
                    number(|f| i64::from(f.level)),
                    number(|f| f.rows as i64),
                    number(|f| f.bytes as i64),
                    time(|f| f.ts_min),
                    time(|f| f.ts_max),
                ]
            }
        };
        Ok(RecordBatch::try_new(self.schema(), columns)?)
    }
}

#[async_trait]
impl TableProvider for ListingTable {
    fn schema(&self) -> SchemaRef {
        let text = |name: &str, nullable: bool| Field::new(name, DataType::Utf8, nullable);
        Arc::new(Schema::new(match self.listing {
            Listing::TagSets => vec![
                Field::new("code", DataType::Int64, false),
                text("metric", true),
                Field::new("tags", map_type(), true),
            ],
            Listing::Metrics => {
                vec![text("metric", false), text("type", false), text("help", false), text("unit", false)]
            }
            Listing::Files => vec![
                text("table_name", false),
                Field::new("id", DataType::Int64, false),
                text("path", false),
                Field::new("day", DataType::Date32, false),
                Field::new("level", DataType::Int64, false),
                Field::new("rows", DataType::Int64, false),
                Field::new("bytes", DataType::Int64, false),
                Field::new("ts_min", time_type(), false),
                Field::new("ts_max", time_type(), false),
            ],
        }))
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
        let rows = self.rows().await?;
        MemTable::try_new(self.schema(), vec![vec![rows]])?.scan(state, projection, filters, limit).await
    }
}
