//! Tables whose rows belong to series: `samples` and its like, and one virtual table per metric.
//!
//! A table says which columns it shows and where each comes from ([`What`]). A scan turns the conjuncts it was given
//! into a time range, matchers and a predicate per tag set, asks the engine for the series that remain, and reads
//! those alone. It gives tags as ordinals of the statement's [`Dictionary`] when [`crate::tags::rule`] asked for
//! that, and as text otherwise.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use async_trait::async_trait;
use catalog::tables::Role;
use catalog::tag::METRIC_NAME;
use catalog::{MatchOp, Matcher, TableSchema};
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::DFSchema;
use datafusion::datasource::TableType;
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::execution_props::ExecutionProps;
use datafusion::logical_expr::physical_planning_context::PhysicalPlanningContext;
use datafusion::logical_expr::{Expr, TableProviderFilterPushDown};
use datafusion::physical_expr::create_physical_expr;
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::projection::ProjectionExec;
use engine::{Engine, Selection, SeriesScanExec, Stop};

use crate::scan::{Output, TagScanExec};
use crate::tags::dictionary::{Dictionary, ORDINAL, TEXT, TagColumn, map_type};
use crate::tags::filter::{self, Conjunct};
use crate::tags::functions;

/// Where a column of a table comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// The column with this index of the stored table.
    Stored(usize),
    /// The code of the row's tag set.
    Series,
    /// The tag with this key, null when absent.
    Tag(String),
    /// All tags but the metric's name.
    Tags,
}

/// A column that a table shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableColumn {
    /// Its name in SQL.
    pub name: String,
    /// Where it comes from.
    pub what: What,
    stored: Option<DataType>,
}

impl TableColumn {
    fn new(name: impl Into<String>, what: What) -> Self {
        Self { name: name.into(), what, stored: None }
    }

    fn stored(table: &TableSchema, index: usize) -> Self {
        let column = &table.columns[index];
        Self { name: column.name.to_owned(), what: What::Stored(index), stored: Some(column.data_type.clone()) }
    }

    /// Its type where tags are text.
    pub fn data_type(&self) -> DataType {
        match &self.what {
            What::Stored(_) => self.stored.clone().unwrap_or(DataType::Null),
            What::Series => DataType::Int64,
            What::Tag(_) => TEXT,
            What::Tags => map_type(),
        }
    }

    /// Its type where tags are ordinals.
    fn ordinal_type(&self) -> DataType {
        if self.is_ordinal() { ORDINAL } else { self.data_type() }
    }

    fn is_ordinal(&self) -> bool {
        matches!(self.what, What::Tag(_) | What::Tags)
    }
}

/// The columns of a stored table: its time, `metric`, its values, `series`, `tags`.
pub fn columns_of(table: &TableSchema) -> Vec<TableColumn> {
    let with_role = |role: Role| {
        table
            .columns
            .iter()
            .enumerate()
            .filter(move |(_, c)| c.role == role)
            .map(|(i, _)| TableColumn::stored(table, i))
    };
    let mut columns: Vec<TableColumn> = with_role(Role::Time).collect();
    columns.push(TableColumn::new("metric", What::Tag(METRIC_NAME.to_owned())));
    columns.extend(with_role(Role::Value));
    columns.push(TableColumn::new("series", What::Series));
    columns.push(TableColumn::new("tags", What::Tags));
    columns
}

/// The columns of a metric's table: those of its rows, then its labels by name. A label that is called like another
/// column is shown as `label_<name>`.
pub fn columns_of_metric(table: &TableSchema, labels: impl IntoIterator<Item = String>) -> Vec<TableColumn> {
    let mut columns: Vec<TableColumn> =
        columns_of(table).into_iter().filter(|c| matches!(c.what, What::Stored(_))).collect();
    let mut labels: Vec<String> = labels.into_iter().filter(|l| l != METRIC_NAME).collect();
    labels.sort_unstable();
    labels.dedup();
    let reserved =
        |label: &str| columns.iter().any(|c| c.name == label) || ["series", "tags", "metric"].contains(&label);
    let mut named: Vec<TableColumn> = Vec::with_capacity(labels.len());
    for label in &labels {
        let mut name = label.clone();
        while reserved(&name) || (name != *label && labels.contains(&name)) {
            name.insert_str(0, "label_");
        }
        named.push(TableColumn::new(name, What::Tag(label.clone())));
    }
    columns.extend(named);
    columns
}

/// A table of rows that belong to series.
#[derive(Clone)]
pub struct SeriesTable {
    engine: Engine,
    table: Arc<TableSchema>,
    columns: Arc<Vec<TableColumn>>,
    metric: Option<String>,
    schema: SchemaRef,
    /// Set by the tag-column rule: tags are ordinals of this dictionary.
    ordinals: Option<Arc<Dictionary>>,
    /// Conjuncts that the scan answers, in terms of the text of tags.
    pushed: Vec<Expr>,
}

impl fmt::Debug for SeriesTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SeriesTable")
            .field("table", &self.table.name)
            .field("metric", &self.metric)
            .finish_non_exhaustive()
    }
}

impl SeriesTable {
    /// All rows of a stored table.
    pub fn all(engine: Engine, table: Arc<TableSchema>) -> Self {
        let columns = columns_of(&table);
        Self::new(engine, table, columns, None)
    }

    /// The rows of one metric with these labels.
    pub fn of_metric(
        engine: Engine,
        table: Arc<TableSchema>,
        metric: &str,
        labels: impl IntoIterator<Item = String>,
    ) -> Self {
        let columns = columns_of_metric(&table, labels);
        Self::new(engine, table, columns, Some(metric.to_owned()))
    }

    fn new(engine: Engine, table: Arc<TableSchema>, columns: Vec<TableColumn>, metric: Option<String>) -> Self {
        let schema = schema(&table, &columns, false);
        Self { engine, table, columns: Arc::new(columns), metric, schema, ordinals: None, pushed: Vec::new() }
    }

    /// The same table with tags as ordinals of `dictionary`, answering `pushed` itself. `None` when it gives ordinals
    /// already.
    pub fn with_ordinals(&self, dictionary: &Arc<Dictionary>, pushed: Vec<Expr>) -> Option<Self> {
        if self.ordinals.is_some() {
            return None;
        }
        let mut table = self.clone();
        table.schema = schema(&self.table, &self.columns, true);
        table.ordinals = Some(dictionary.clone());
        table.pushed = pushed;
        Some(table)
    }

    /// Whether tags are ordinals.
    pub fn gives_ordinals(&self) -> bool {
        self.ordinals.is_some()
    }

    /// The columns.
    pub fn columns(&self) -> &[TableColumn] {
        &self.columns
    }

    fn selection(&self, conjuncts: &[Expr]) -> Result<(Selection, Vec<Expr>)> {
        let mut selection =
            Selection { table: self.table.clone(), matchers: vec![], start_ms: i64::MIN, end_ms: i64::MAX };
        if let Some(metric) = &self.metric {
            selection.matchers.push(Matcher::new(METRIC_NAME, MatchOp::Eq, metric).map_err(external)?);
        }
        let mut rest = Vec::new();
        for expr in conjuncts {
            match filter::classify(expr, &self.columns) {
                Conjunct::Time(first, last) => {
                    selection.start_ms = selection.start_ms.max(first);
                    selection.end_ms = selection.end_ms.min(last);
                }
                Conjunct::Tags => match filter::matcher(expr, &self.columns) {
                    Some(matcher) => selection.matchers.push(matcher),
                    None => rest.push(expr.clone()),
                },
                Conjunct::Row => {
                    return Err(DataFusionError::Internal(format!("{expr} was pushed to a scan that can't answer it")));
                }
            }
        }
        Ok((selection, rest))
    }

    async fn scan_ordinals(
        &self,
        dictionary: &Arc<Dictionary>,
        projection: &[usize],
        conjuncts: &[Expr],
        (engine, stop): (&Engine, &Stop),
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let (selection, predicates) = self.selection(conjuncts)?;
        let schema = Arc::new(schema(&self.table, &self.columns, true).project(projection)?);
        if selection.start_ms > selection.end_ms {
            return Ok(Arc::new(datafusion::physical_plan::empty::EmptyExec::new(schema)));
        }
        let mut set = engine.select(&selection, stop).await.map_err(external)?;
        let candidates = set.series.len();
        if !predicates.is_empty() {
            let keep = filter::evaluate(&predicates, &self.columns, &set.series)?;
            let kept: HashSet<i64> = set
                .series
                .iter()
                .zip(keep.iter())
                .filter(|(_, k)| *k == Some(true))
                .map(|(s, _)| s.id.code.0)
                .collect();
            set = Arc::new(set.restrict(|s| kept.contains(&s.id.code.0)));
        }
        let mut stored = Vec::new();
        let mut outputs = Vec::with_capacity(projection.len());
        for &i in projection {
            outputs.push(match &self.columns[i].what {
                What::Stored(column) => {
                    stored.push(*column);
                    Output::Stored(stored.len())
                }
                What::Series => Output::Series,
                What::Tags => {
                    dictionary.add_sets(&set.series)?;
                    Output::Tags
                }
                What::Tag(key) => {
                    let column = TagColumn::new(&set.series, key);
                    dictionary.add(&column)?;
                    Output::Tag(Arc::new(column))
                }
            });
        }
        let text = predicates.iter().map(ToString::to_string).collect::<Vec<_>>().join(" AND ");
        let input = Arc::new(SeriesScanExec::new(set, stored));
        Ok(Arc::new(TagScanExec::new(input, outputs, schema, dictionary.clone(), candidates, text)))
    }
}

/// An error of ours on its way through DataFusion; [`engine::error_of`] finds it again.
pub fn external(e: engine::Error) -> DataFusionError {
    DataFusionError::External(Box::new(e))
}

fn schema(table: &TableSchema, columns: &[TableColumn], ordinals: bool) -> SchemaRef {
    let fields: Vec<Field> = columns
        .iter()
        .map(|c| {
            let data_type = if ordinals { c.ordinal_type() } else { c.data_type() };
            let nullable = match &c.what {
                What::Stored(i) => table.columns[*i].nullable,
                What::Series => false,
                What::Tag(_) | What::Tags => true,
            };
            Field::new(&c.name, data_type, nullable)
        })
        .collect();
    Arc::new(Schema::new(fields))
}

#[async_trait]
impl TableProvider for SeriesTable {
    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    fn supports_filters_pushdown(&self, filters: &[&Expr]) -> Result<Vec<TableProviderFilterPushDown>> {
        let answer = |expr: &&Expr| match filter::classify(expr, &self.columns) {
            Conjunct::Time(..) => TableProviderFilterPushDown::Exact,
            // Once tags are ordinals a predicate on a tag column is one on integers, which rows answer.
            Conjunct::Tags if self.ordinals.is_none() => TableProviderFilterPushDown::Exact,
            Conjunct::Tags | Conjunct::Row => TableProviderFilterPushDown::Unsupported,
        };
        Ok(filters.iter().map(answer).collect())
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        _limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let stop = Stop::of(state.config_options());
        // A plan may be older than the transaction that runs it, or have outlived the one that made it.
        let engine = state.config().get_extension::<Engine>();
        let engine = engine.as_deref().unwrap_or(&self.engine);
        let all: Vec<usize> = (0..self.columns.len()).collect();
        let projection = projection.unwrap_or(&all);
        let conjuncts: Vec<Expr> = self.pushed.iter().chain(filters).cloned().collect();
        if let Some(dictionary) = &self.ordinals {
            return self.scan_ordinals(dictionary, projection, &conjuncts, (engine, &stop)).await;
        }
        let dictionary = Dictionary::new();
        let scan = self.scan_ordinals(&dictionary, projection, &conjuncts, (engine, &stop)).await?;
        let df_schema = DFSchema::try_from(scan.schema())?;
        let exprs = projection
            .iter()
            .map(|i| {
                let column = &self.columns[*i];
                let reference = Expr::Column(datafusion::common::Column::new_unqualified(&column.name));
                let expr = match column.what {
                    What::Tag(_) => functions::text(&dictionary, reference),
                    What::Tags => functions::map(&dictionary, reference),
                    What::Stored(_) | What::Series => reference,
                };
                let physical = create_physical_expr(
                    &expr,
                    &df_schema,
                    &ExecutionProps::new(),
                    &PhysicalPlanningContext::default(),
                )?;
                Ok((physical, column.name.clone()))
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Arc::new(ProjectionExec::try_new(exprs, scan)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_of_tables() {
        let names = |columns: Vec<TableColumn>| columns.into_iter().map(|c| c.name).collect::<Vec<_>>().join(" ");
        assert_eq!(names(columns_of(&catalog::tables::SAMPLES)), "ts metric value series tags");
        assert_eq!(names(columns_of(&catalog::tables::EXEMPLARS)), "ts metric value labels series tags");
        let check = |labels: &[&str], expected: &str| {
            let labels = labels.iter().map(|l| (*l).to_owned());
            assert_eq!(names(columns_of_metric(&catalog::tables::SAMPLES, labels)), expected);
        };
        check(&["job", "__name__", "instance", "job"], "ts value instance job");
        check(&["value", "ts", "le"], "ts value le label_ts label_value");
        check(&["value", "label_value"], "ts value label_value label_label_value");
        check(&[], "ts value");
    }
}
