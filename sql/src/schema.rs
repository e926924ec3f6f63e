//! The database as SQL sees it: the schemas `public`, `prometheus` and `catalog`, and what their tables are.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use catalog::tables::{HISTOGRAMS, SAMPLES};
use catalog::tag::METRIC_NAME;
use catalog::{MatchOp, Matcher, Series, TableSchema};
use datafusion::catalog::{CatalogProvider, SchemaProvider, TableProvider};
use datafusion::datasource::TableType;
use datafusion::error::Result;
use engine::{Engine, Selection, Stop};
use parking_lot::RwLock;

use crate::catalog_tables::Catalog;
use crate::pg::system::Information;
use crate::session::catalogs;
use crate::table::{SeriesTable, external};
use crate::views::Views;

/// All schemas of a database. What is registered besides our own are `pg_catalog` and its like.
#[derive(Debug)]
pub struct Database {
    schemas: RwLock<BTreeMap<String, Arc<dyn SchemaProvider>>>,
    views: Views,
}

impl Database {
    /// The database of an engine with these metrics and views.
    pub fn new(engine: &Engine, metrics: &Arc<Metrics>, views: Views) -> Self {
        let schemas: [(&str, Arc<dyn SchemaProvider>); 3] = [
            ("public", Arc::new(Public { engine: engine.clone(), views: views.clone() })),
            ("prometheus", metrics.clone()),
            ("catalog", Arc::new(Catalog::new(engine))),
        ];
        Self { schemas: RwLock::new(schemas.into_iter().map(|(n, s)| (n.to_owned(), s)).collect()), views }
    }
}

impl Database {
    /// The same with the metrics and the views of a snapshot.
    pub fn of(&self, snapshot: &Engine, metrics: &Arc<Metrics>) -> Self {
        let mut schemas = self.schemas.read().clone();
        schemas.insert("prometheus".to_owned(), metrics.clone());
        let views = self.views.of(snapshot);
        // What a plan keeps must not hold a snapshot.
        let public = Public { engine: snapshot.present(), views: views.clone() };
        schemas.insert("public".to_owned(), Arc::new(public));
        Self { schemas: RwLock::new(schemas), views }
    }
}

impl CatalogProvider for Database {
    fn schema_names(&self) -> Vec<String> {
        self.schemas.read().keys().cloned().collect()
    }

    fn schema(&self, name: &str) -> Option<Arc<dyn SchemaProvider>> {
        if name == "information_schema" {
            // It lists the others.
            let others = Self { schemas: RwLock::new(self.schemas.read().clone()), views: self.views.clone() };
            return Some(Arc::new(Information::new(catalogs(Arc::new(others)))));
        }
        self.schemas.read().get(name).cloned()
    }

    fn register_schema(&self, name: &str, schema: Arc<dyn SchemaProvider>) -> Result<Option<Arc<dyn SchemaProvider>>> {
        Ok(self.schemas.write().insert(name.to_owned(), schema))
    }
}

/// The stored tables and the views.
#[derive(Debug)]
struct Public {
    engine: Engine,
    views: Views,
}

#[async_trait]
impl SchemaProvider for Public {
    fn table_names(&self) -> Vec<String> {
        let stored = catalog::tables::all();
        let stored = stored.iter().map(|t| t.name.to_owned());
        // A version with more tables may find a view that is called like one of them.
        let views = self.views.names().into_iter().filter(|name| catalog::tables::by_name(name).is_none());
        stored.chain(views).collect()
    }

    async fn table(&self, name: &str) -> Result<Option<Arc<dyn TableProvider>>> {
        match catalog::tables::by_name(name) {
            Some(table) => Ok(Some(Arc::new(SeriesTable::all(self.engine.clone(), table.clone())))),
            None => self.views.table(name).await,
        }
    }

    async fn table_type(&self, name: &str) -> Result<Option<TableType>> {
        let stored = catalog::tables::by_name(name).map(|_| TableType::Base);
        Ok(stored.or_else(|| self.views.exists(name).then_some(TableType::View)))
    }

    fn table_exist(&self, name: &str) -> bool {
        catalog::tables::by_name(name).is_some() || self.views.exists(name)
    }
}

/// One virtual table per metric.
#[derive(Debug)]
pub struct Metrics {
    engine: Engine,
    /// Of all metrics, as of the last statement that asked for the names of tables.
    names: RwLock<Arc<BTreeSet<String>>>,
}

/// All series of a table.
pub(crate) fn everything(table: &Arc<TableSchema>) -> Selection {
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
        // Most series of a metric have the same labels as the one before.
        let mut last: Option<Arc<Series>> = None;
        let visit = |series: &Arc<Series>| {
            let labels = labels.get_or_insert_default();
            if !last.as_ref().is_some_and(|last| last.tags.keys().eq(series.tags.keys())) {
                for (key, _) in series.tags.iter() {
                    if !labels.contains(key) {
                        labels.insert(key.to_owned());
                    }
                }
                last = Some(series.clone());
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
                // What a plan keeps must not hold a snapshot.
                let provider = SeriesTable::of_metric(self.engine.present(), table.clone(), name, labels);
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
