//! `pg_catalog` and `information_schema` as tools expect them, where what the library gives falls short: columns and tables that it lacks, arrays that
//! it holds as texts, and expressions over them for which the planner has no words.

use std::ops::ControlFlow;
use std::sync::{Arc, LazyLock, OnceLock};

use arrow::array::{ArrayRef, BooleanArray, IntervalMonthDayNanoArray, StringArray};
use arrow::datatypes::{DataType, Field, IntervalMonthDayNano, Schema, SchemaRef};
use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use chrono::{DateTime, TimeZone};
use chrono_tz::{OffsetComponents, OffsetName, TZ_VARIANTS, TzOffset};
use datafusion::catalog::information_schema::InformationSchemaProvider;
use datafusion::catalog::{CatalogProviderList, SchemaProvider, TableFunctionArgs, TableFunctionImpl, TableProvider};
use datafusion::common::cast::as_string_array;
use datafusion::common::metadata::FieldMetadata;
use datafusion::common::{Column, JoinType, ScalarValue};
use datafusion::datasource::empty::EmptyTable;
use datafusion::datasource::{MemTable, TableType, ViewTable, provider_as_source};
use datafusion::error::{DataFusionError, Result};
use datafusion::functions::expr_fn::{split_part, substr, substring};
use datafusion::functions_aggregate::expr_fn::min;
use datafusion::logical_expr::{
    ColumnarValue, Expr, LogicalPlanBuilder, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility, cast,
    lit,
};
use datafusion::sql::sqlparser::ast;
use datafusion::sql::sqlparser::ast::{SetExpr, Value, ValueWithSpan, visit_expressions, visit_relations};
use datafusion_pg_catalog::pg_catalog::catalog_info::CatalogInfo;
use datafusion_pg_catalog::pg_catalog::context::EmptyContextProvider;
use datafusion_pg_catalog::pg_catalog::{PG_CATALOG_TABLES, PgCatalogSchemaProvider, PgCatalogStaticTables};
use engine::{Engine, View};

use super::opened::Listing;
use super::rows::{size, wire_type};

/// What kinds of values columns have that are added or changed; they hold nothing but NULL.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Text,
    Number,
    Texts,
    Small,
    Numbers,
}

impl Kind {
    fn data_type(self) -> DataType {
        let list = |item| DataType::new_list(item, true);
        match self {
            Self::Text => DataType::Utf8,
            Self::Number => DataType::Int32,
            Self::Texts => list(DataType::Utf8),
            Self::Small => list(DataType::Int16),
            Self::Numbers => list(DataType::Int32),
        }
    }
}

/// Columns that are missing.
const MISSING: [(&str, &str, Kind); 12] = [
    ("pg_collation", "colliculocale", Kind::Text),
    ("pg_class", "relacl", Kind::Texts),
    ("pg_class", "reloptions", Kind::Texts),
    ("pg_class", "tableoid", Kind::Number),
    ("pg_language", "tableoid", Kind::Number),
    ("pg_type", "tableoid", Kind::Number),
    ("pg_constraint", "tableoid", Kind::Number),
    ("pg_opclass", "tableoid", Kind::Number),
    ("pg_opfamily", "tableoid", Kind::Number),
    ("pg_rewrite", "tableoid", Kind::Number),
    ("pg_trigger", "tableoid", Kind::Number),
    ("pg_settings", "boot_val", Kind::Text),
];

/// Tables whose rows are those of PostgreSQL's own tables: here no table has an index or a constraint.
const EMPTY: [&str; 2] = ["pg_constraint", "pg_index"];

/// Tables that are missing, all of them empty.
const TABLES: [(&str, &[(&str, Kind)]); 4] = [
    (
        "pg_rules",
        &[("schemaname", Kind::Text), ("tablename", Kind::Text), ("rulename", Kind::Text), ("definition", Kind::Text)],
    ),
    (
        "pg_available_extensions",
        &[
            ("name", Kind::Text),
            ("default_version", Kind::Text),
            ("installed_version", Kind::Text),
            ("comment", Kind::Text),
        ],
    ),
    (
        "pg_user_mappings",
        &[
            ("umid", Kind::Number),
            ("srvid", Kind::Number),
            ("srvname", Kind::Text),
            ("umuser", Kind::Number),
            ("usename", Kind::Text),
            ("umoptions", Kind::Texts),
        ],
    ),
    ("pg_parameter_acl", &[("oid", Kind::Number), ("parname", Kind::Text), ("paracl", Kind::Texts)]),
];

/// What an array is that the library holds as a text.
fn array(table: &str, column: &str) -> Option<Kind> {
    Some(match (table, column) {
        ("pg_index", "indkey" | "indoption") | ("pg_constraint", "conkey" | "confkey" | "confdelsetcols") => {
            Kind::Small
        }
        ("pg_statistic_ext", "stxkeys") => Kind::Small,
        ("pg_statistic_ext", "stxkind") => Kind::Texts,
        ("pg_policy", "polroles")
        | ("pg_index", "indcollation" | "indclass")
        | ("pg_constraint", "conpfeqop" | "conppeqop" | "conffeqop" | "conexclop") => Kind::Numbers,
        (_, column) if column.ends_with("acl") => Kind::Texts,
        (
            _,
            "attoptions" | "attfdwoptions" | "setconfig" | "spcoptions" | "srvoptions" | "fdwoptions" | "ftoptions"
            | "umoptions" | "evttags",
        ) => Kind::Texts,
        _ => return None,
    })
}

/// The rows of PostgreSQL's own catalogs, which are the same for all and take 8 MB: a server that nobody asks for them
/// does without.
static GIVEN: LazyLock<Result<Arc<PgCatalogStaticTables>>> =
    LazyLock::new(|| PgCatalogStaticTables::try_new().map(Arc::new));

fn given() -> Result<&'static Arc<PgCatalogStaticTables>> {
    GIVEN.as_ref().map_err(|e| DataFusionError::Internal(format!("the rows of pg_catalog can't be read: {e}")))
}

/// A function of `pg_catalog` that gives rows.
#[derive(Debug)]
pub struct RowFunction {
    /// Which.
    pub function: Function,
    /// Whose.
    pub engine: Engine,
}

/// Which of them.
#[derive(Debug, Clone, Copy)]
pub enum Function {
    /// `pg_get_keywords()`.
    Keywords,
    /// `pg_timezone_names()`.
    Timezones,
    /// `pg_listening_channels()`: there is no `LISTEN`.
    Channels,
}

impl Function {
    /// All, with their names.
    pub const ALL: [(&'static str, Self); 3] =
        [("pg_get_keywords", Self::Keywords), (TIMEZONES, Self::Timezones), ("pg_listening_channels", Self::Channels)];
}

impl TableFunctionImpl for RowFunction {
    fn call_with_args(&self, args: TableFunctionArgs) -> Result<Arc<dyn TableProvider>> {
        match self.function {
            Function::Keywords => given()?.pg_get_keywords.call_with_args(args),
            Function::Timezones => Ok(Arc::new(timezones(&self.engine)?)),
            // In PostgreSQL the column of such a function is called as the function is called in the query, and this is
            // what psql calls it.
            Function::Channels => {
                let channel = Field::new("channel", DataType::Utf8, true);
                Ok(Arc::new(EmptyTable::new(Arc::new(Schema::new(vec![channel])))))
            }
        }
    }
}

const TIMEZONES: &str = "pg_timezone_names";

/// `pg_timezone_names`: the zones that sessions can be set to, as they are now.
fn timezones(engine: &Engine) -> Result<MemTable> {
    let now = DateTime::from_timestamp_millis(engine.now_ms()).unwrap_or_default().naive_utc();
    let mut zones: Vec<_> = TZ_VARIANTS.iter().map(|zone| (zone.name(), zone.offset_from_utc_datetime(&now))).collect();
    zones.sort_unstable_by_key(|(name, _)| *name);
    let seconds = |o: &TzOffset| (o.base_utc_offset() + o.dst_offset()).num_seconds();
    let offsets = zones.iter().map(|(_, o)| IntervalMonthDayNano::new(0, 0, seconds(o) * 1_000_000_000));
    let columns: [(&str, ArrayRef); 4] = [
        ("name", Arc::new(StringArray::from_iter_values(zones.iter().map(|(name, _)| name)))),
        ("abbrev", Arc::new(zones.iter().map(|(_, o)| o.abbreviation()).collect::<StringArray>())),
        ("utc_offset", Arc::new(IntervalMonthDayNanoArray::from_iter_values(offsets))),
        ("is_dst", Arc::new(zones.iter().map(|(_, o)| Some(!o.dst_offset().is_zero())).collect::<BooleanArray>())),
    ];
    let batch = RecordBatch::try_from_iter(columns)?;
    MemTable::try_new(batch.schema(), vec![vec![batch]])
}

/// `pg_catalog`.
#[derive(Debug)]
pub struct System {
    catalogs: Arc<dyn CatalogProviderList>,
    /// What the library gives.
    given: OnceLock<PgCatalogSchemaProvider<Typed, EmptyContextProvider>>,
    engine: Engine,
}

impl System {
    /// That of an engine, over what the library gives for these catalogs.
    pub fn new(catalogs: Arc<dyn CatalogProviderList>, engine: &Engine) -> Self {
        Self { catalogs, given: OnceLock::new(), engine: engine.clone() }
    }

    fn given(&self) -> Result<&dyn SchemaProvider> {
        if let Some(provider) = self.given.get() {
            return Ok(provider);
        }
        let provider =
            PgCatalogSchemaProvider::try_new(Typed(self.catalogs.clone()), given()?.clone(), EmptyContextProvider)?;
        Ok(self.given.get_or_init(|| provider))
    }

    /// `pg_amproc` has names where PostgreSQL has numbers that tools join with `pg_proc`: these, beside them.
    async fn with_numbers(&self, plan: LogicalPlanBuilder) -> Result<LogicalPlanBuilder> {
        let Some(functions) = self.given()?.table("pg_proc").await? else {
            return Err(DataFusionError::Internal("there is no pg_proc".to_owned()));
        };
        let column = |name| Expr::Column(Column::new_unqualified(name));
        // Of functions with the same name one is as good as the other here.
        let functions = LogicalPlanBuilder::scan("functions", provider_as_source(functions), None)?
            .aggregate([column("proname")], [min(column("oid")).alias("number")])?
            .build()?;
        let last = split_part(column("amproc"), lit("."), lit(-1i64));
        plan.join_with_expr_keys(functions, JoinType::Left, (vec![last], vec![column("proname")]), None)
    }

    /// `pg_views`: the library has no definitions, nor who made a view.
    fn views(&self) -> Result<MemTable> {
        let views = self.engine.views();
        let text = |of: &dyn Fn(&View) -> &str| {
            Arc::new(views.values().map(|v| Some(of(v).to_owned())).collect::<StringArray>()) as ArrayRef
        };
        let columns = [
            ("schemaname", text(&|_| "public")),
            ("viewname", text(&|v| &v.name)),
            ("viewowner", text(&|v| &v.owner)),
            ("definition", text(&|v| &v.definition)),
        ];
        let batch = RecordBatch::try_from_iter_with_nullable(columns.map(|(name, array)| (name, array, true)))?;
        MemTable::try_new(batch.schema(), vec![vec![batch]])
    }
}

#[async_trait]
impl SchemaProvider for System {
    fn table_names(&self) -> Vec<String> {
        PG_CATALOG_TABLES.iter().copied().chain(added()).map(str::to_owned).collect()
    }

    async fn table(&self, name: &str) -> Result<Option<Arc<dyn TableProvider>>> {
        let name = name.to_ascii_lowercase();
        if let Some((_, columns)) = TABLES.iter().find(|(n, _)| *n == name) {
            let fields: Vec<Field> = columns.iter().map(|(n, kind)| Field::new(*n, kind.data_type(), true)).collect();
            return Ok(Some(Arc::new(EmptyTable::new(Arc::new(Schema::new(fields))))));
        }
        if let Some((_, listing)) = Listing::ALL.iter().find(|(n, _)| *n == name) {
            return listing.table().map(Some);
        }
        match name.as_str() {
            "pg_views" => return Ok(Some(Arc::new(self.views()?))),
            TIMEZONES => return Ok(Some(Arc::new(timezones(&self.engine)?))),
            _ => {}
        }
        if !PG_CATALOG_TABLES.contains(&&*name) {
            return Ok(None);
        }
        let Some(table) = self.given()?.table(&name).await? else { return Ok(None) };
        let (schema, mut changed) = (table.schema(), false);
        let null = |kind: Kind, name: &str| {
            Ok::<_, DataFusionError>(lit(ScalarValue::try_from(&kind.data_type())?).alias(name))
        };
        let mut columns = Vec::with_capacity(schema.fields().len());
        for field in schema.fields() {
            if name == "pg_amproc" && field.name() == "amproc" {
                changed = true;
                columns.push(Expr::Column(Column::new_unqualified("number")).alias("amproc"));
                continue;
            }
            if name == "pg_attribute"
                && let Some(column) = Typed::column(field)?
            {
                changed = true;
                columns.push(column);
                continue;
            }
            columns.push(match array(&name, field.name()).filter(|_| *field.data_type() == DataType::Utf8) {
                Some(kind) => {
                    changed = true;
                    null(kind, field.name())?
                }
                None => Expr::Column(Column::new_unqualified(field.name())),
            });
        }
        for (_, column, kind) in MISSING.iter().filter(|(t, c, _)| *t == name && schema.index_of(c).is_err()) {
            changed = true;
            columns.push(null(*kind, column)?);
        }
        if !changed {
            return Ok(Some(table));
        }
        let mut plan = LogicalPlanBuilder::scan(&*name, provider_as_source(table), None)?;
        if EMPTY.contains(&&*name) {
            plan = plan.filter(lit(false))?;
        }
        if name == "pg_amproc" {
            plan = self.with_numbers(plan).await?;
        }
        Ok(Some(Arc::new(ViewTable::new(plan.project(columns)?.build()?, None))))
    }

    async fn table_type(&self, name: &str) -> Result<Option<TableType>> {
        match PG_CATALOG_TABLES.contains(&name) {
            true => self.given()?.table_type(name).await,
            false => Ok(Some(TableType::View)),
        }
    }

    fn table_exist(&self, name: &str) -> bool {
        self.table_names().iter().any(|n| n.eq_ignore_ascii_case(name))
    }
}

/// Catalogs as the library asks for them. It knows few types of columns and takes the others for texts, but passes names
/// on as they are: here they begin with what `pg_attribute` is to say of the type, in digits.
#[derive(Debug, Clone)]
struct Typed(Arc<dyn CatalogProviderList>);

impl Typed {
    /// Digits of a type's number, of its size plus one, and of its dimensions.
    const DIGITS: [usize; 3] = [6, 2, 1];

    fn coded(field: &Arc<Field>, view: bool) -> Field {
        let of = wire_type(field);
        let dimensions = u8::from(of.name().starts_with('_'));
        let name = format!("{:06}{:02}{dimensions}{}", of.oid(), size(&of) + 1, field.name());
        // PostgreSQL says of no column of a view that it has a value in each row.
        Field::new(name, DataType::Utf8, view || field.is_nullable())
    }

    /// A column of `pg_attribute` that is told by the coded name.
    fn column(field: &Field) -> Result<Option<Expr>> {
        let name = || Expr::Column(Column::new_unqualified("attname"));
        let [number, size, dimensions] = Self::DIGITS;
        let digits = |from: usize, length: usize| {
            cast(substring(name(), lit(from as i64 + 1), lit(length as i64)), DataType::Int32)
        };
        let value = match field.name().as_str() {
            "attname" => substr(name(), lit((number + size + dimensions) as i64 + 1)),
            "atttypid" => digits(0, number),
            "attlen" => digits(number, size) - lit(1),
            "attndims" => digits(number + size, dimensions),
            _ => return Ok(None),
        };
        let metadata = FieldMetadata::from(field.metadata().clone());
        Ok(Some(cast(value, field.data_type().clone()).alias_with_metadata(field.name(), Some(metadata))))
    }
}

#[async_trait]
impl CatalogInfo for Typed {
    async fn catalog_names(&self) -> Result<Vec<String>> {
        CatalogInfo::catalog_names(&self.0).await
    }

    async fn schema_names(&self, catalog: &str) -> Result<Option<Vec<String>>> {
        CatalogInfo::schema_names(&self.0, catalog).await
    }

    async fn table_names(&self, catalog: &str, schema: &str) -> Result<Option<Vec<String>>> {
        CatalogInfo::table_names(&self.0, catalog, schema).await
    }

    async fn table_schema(&self, catalog: &str, schema: &str, table: &str) -> Result<Option<SchemaRef>> {
        let Some(plain) = CatalogInfo::table_schema(&self.0, catalog, schema, table).await? else { return Ok(None) };
        let view = self.table_type(catalog, schema, table).await? == Some(TableType::View);
        let fields: Vec<Field> = plain.fields().iter().map(|f| Self::coded(f, view)).collect();
        Ok(Some(Arc::new(Schema::new(fields))))
    }

    async fn table_type(&self, catalog: &str, schema: &str, table: &str) -> Result<Option<TableType>> {
        CatalogInfo::table_type(&self.0, catalog, schema, table).await
    }
}

/// `information_schema`, with types of columns as PostgreSQL calls them.
#[derive(Debug)]
pub struct Information(InformationSchemaProvider);

impl Information {
    /// That of a list of catalogs.
    pub fn new(catalogs: Arc<dyn CatalogProviderList>) -> Self {
        Self(InformationSchemaProvider::new(catalogs))
    }
}

#[async_trait]
impl SchemaProvider for Information {
    fn table_names(&self) -> Vec<String> {
        self.0.table_names()
    }

    async fn table(&self, name: &str) -> Result<Option<Arc<dyn TableProvider>>> {
        let table = self.0.table(name).await?;
        let Some(table) = table.filter(|_| name.eq_ignore_ascii_case("columns")) else {
            return self.0.table(name).await;
        };
        let schema = table.schema();
        let of = |function: TypeName| {
            let arrow = Expr::Column(Column::new_unqualified("data_type"));
            ScalarUDF::new_from_impl(function).call(vec![arrow])
        };
        let columns = schema.fields().iter().map(|field| match field.name().as_str() {
            "data_type" => of(TypeName::new(false)).alias("data_type"),
            name => Expr::Column(Column::new_unqualified(name)),
        });
        let udt = [of(TypeName::new(true)).alias("udt_name"), lit("pg_catalog").alias("udt_schema")];
        let plan = LogicalPlanBuilder::scan("columns", provider_as_source(table), None)?;
        Ok(Some(Arc::new(ViewTable::new(plan.project(columns.chain(udt))?.build()?, None))))
    }

    fn table_exist(&self, name: &str) -> bool {
        self.0.table_exist(name)
    }
}

/// What PostgreSQL calls a type that is given in Arrow's words.
#[derive(Debug, PartialEq, Eq, Hash)]
struct TypeName {
    /// Whether by the name that `pg_type` has.
    short: bool,
    signature: Signature,
}

impl TypeName {
    fn new(short: bool) -> Self {
        Self { short, signature: Signature::any(1, Volatility::Immutable) }
    }

    fn of(&self, arrow: &str) -> String {
        let (long, short) = match arrow.split('(').next().unwrap_or(arrow) {
            "Utf8" | "LargeUtf8" | "Utf8View" | "Null" => ("text", "text"),
            "Boolean" => ("boolean", "bool"),
            "Int8" | "Int16" | "UInt8" => ("smallint", "int2"),
            "Int32" | "UInt16" => ("integer", "int4"),
            "Int64" | "UInt32" | "UInt64" => ("bigint", "int8"),
            "Float16" | "Float32" => ("real", "float4"),
            "Float64" => ("double precision", "float8"),
            "Decimal128" | "Decimal256" => ("numeric", "numeric"),
            "Date32" | "Date64" => ("date", "date"),
            "Timestamp" if arrow.contains('"') => ("timestamp with time zone", "timestamptz"),
            "Timestamp" => ("timestamp without time zone", "timestamp"),
            "Interval" | "Duration" => ("interval", "interval"),
            "Binary" | "LargeBinary" | "BinaryView" | "FixedSizeBinary" => ("bytea", "bytea"),
            "Map" | "Struct" => ("jsonb", "jsonb"),
            "List" | "LargeList" => ("ARRAY", "anyarray"),
            _ => (arrow, arrow),
        };
        if self.short { short } else { long }.to_owned()
    }
}

impl ScalarUDFImpl for TypeName {
    fn name(&self) -> &str {
        "type_name"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _arguments: &[DataType]) -> Result<DataType> {
        Ok(DataType::Utf8)
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let arrays = ColumnarValue::values_to_arrays(&args.args)?;
        let texts = arrow::compute::cast(&arrays[0], &DataType::Utf8)?;
        let names: StringArray = as_string_array(&texts)?.iter().map(|t| t.map(|t| self.of(t))).collect();
        Ok(ColumnarValue::Array(Arc::new(names)))
    }
}

/// The tables that are missing in the library.
fn added() -> impl Iterator<Item = &'static str> {
    let empty = TABLES.iter().map(|(name, _)| *name);
    empty.chain(Listing::ALL.iter().map(|(name, _)| *name)).chain([TIMEZONES])
}

/// Whether `pg_catalog` has a table that is missing in the library.
pub fn adds(name: &str) -> bool {
    added().any(|added| added.eq_ignore_ascii_case(name))
}

/// Another form of an expression over `pg_catalog`, which the planner knows.
pub fn known(expr: &ast::Expr) -> Option<ast::Expr> {
    match expr {
        ast::Expr::Subquery(query) => one_row(query),
        ast::Expr::CompoundFieldAccess { root, access_chain } => field(root, access_chain),
        ast::Expr::Function(function) => subscripts(function).or_else(|| view_definition(function)),
        ast::Expr::BinaryOp { left, op, right } => Some(ast::Expr::BinaryOp {
            right: Box::new(function_name(left, right)?),
            left: left.clone(),
            op: op.clone(),
        }),
        _ => None,
    }
}

/// `(x).name`, a field of what stands in brackets.
fn field(root: &ast::Expr, access: &[ast::AccessExpr]) -> Option<ast::Expr> {
    let ast::Expr::Nested(root) = root else { return None };
    let mut text = root.to_string();
    for access in access {
        let ast::AccessExpr::Dot(ast::Expr::Identifier(name)) = access else { return None };
        let name = Value::SingleQuotedString(name.value.clone());
        text = format!("get_field({text}, {name})");
    }
    crate::statement::expression(&text)
}

/// `generate_subscripts(array, 1)`: a row for each element, its number.
fn subscripts(function: &ast::Function) -> Option<ast::Expr> {
    let ast::FunctionArguments::List(arguments) = &function.args else { return None };
    let array =
        arguments.args.first().filter(|_| crate::statement::last_part(&function.name) == "generate_subscripts")?;
    crate::statement::expression(&format!("unnest(range(1, CAST(cardinality({array}) AS BIGINT) + 1))"))
}

/// `pg_get_viewdef(view)`: the definition of the view with a number or a name.
fn view_definition(function: &ast::Function) -> Option<ast::Expr> {
    let ast::FunctionArguments::List(arguments) = &function.args else { return None };
    let view = arguments.args.first().filter(|_| crate::statement::last_part(&function.name) == "pg_get_viewdef")?;
    let name = match view {
        ast::FunctionArg::Unnamed(ast::FunctionArgExpr::Expr(ast::Expr::Value(value))) => match &value.value {
            Value::SingleQuotedString(text) if text.parse::<u32>().is_err() => Some(text),
            _ => None,
        },
        _ => None,
    };
    let is_it = match name {
        Some(name) => {
            let name = name.strip_prefix("public.").unwrap_or(name).trim_matches('"').replace('\'', "''");
            format!("_view_name = '{name}'")
        }
        None => format!("_view_oid = {view}"),
    };
    // The names inside are such that the argument can't mean them.
    crate::statement::expression(&format!(
        "(SELECT first_value(_view_definition) FROM (SELECT _c.oid AS _view_oid, _v.viewname AS _view_name, \
         _v.definition AS _view_definition FROM pg_catalog.pg_class AS _c JOIN pg_catalog.pg_views AS _v ON \
         _c.relname = _v.viewname JOIN pg_catalog.pg_namespace AS _n ON _n.oid = _c.relnamespace AND \
         _n.nspname = _v.schemaname) AS _views WHERE {is_it})"
    ))
}

/// A subquery for one value may depend on the query around it only when it is seen to give one row. Whoever looks
/// something up in `pg_catalog` counts on that.
fn one_row(query: &ast::Query) -> Option<ast::Expr> {
    const AGGREGATES: [&str; 12] = [
        "count",
        "sum",
        "min",
        "max",
        "avg",
        "array_agg",
        "string_agg",
        "bool_and",
        "bool_or",
        "every",
        "first_value",
        "last_value",
    ];
    let SetExpr::Select(select) = query.body.as_ref() else { return None };
    let (ast::SelectItem::UnnamedExpr(item) | ast::SelectItem::ExprWithAlias { expr: item, .. }) =
        select.projection.first()?
    else {
        return None;
    };
    let grouped = !matches!(&select.group_by, ast::GroupByExpr::Expressions(by, _) if by.is_empty());
    let plain = select.projection.len() == 1 && !grouped && select.distinct.is_none() && query.limit_clause.is_none();
    let mut system = false;
    let _ = visit_relations(&select.from, |name| {
        let last = name.0.last().and_then(|p| p.as_ident());
        system |= last.is_some_and(|n| n.value.to_ascii_lowercase().starts_with("pg_"));
        ControlFlow::<()>::Continue(())
    });
    let aggregate = visit_expressions(item, |e| match e {
        ast::Expr::Function(f) if AGGREGATES.iter().any(|a| crate::statement::last_part(&f.name) == *a) => {
            ControlFlow::Break(())
        }
        _ => ControlFlow::Continue(()),
    });
    if !plain || !system || select.selection.is_none() || aggregate.is_break() {
        return None;
    }
    if let [ast::TableWithJoins { relation: ast::TableFactor::Table { name, .. }, joins }] = select.from.as_slice()
        && joins.is_empty()
        && ["pg_attrdef", "pg_sequence"].contains(&&*crate::statement::last_part(name))
    {
        // No column has a default, and there are no sequences.
        return crate::statement::expression("NULL");
    }
    let value = crate::statement::expression(&format!("first_value({item})"))?;
    let mut query = query.clone();
    query.order_by = None;
    if let SetExpr::Select(select) = query.body.as_mut() {
        select.projection = vec![ast::SelectItem::UnnamedExpr(value)];
    }
    Some(ast::Expr::Subquery(Box::new(query)))
}

/// The columns of `pg_type` that name functions are texts: what they are compared with is to be one, too.
fn function_name(column: &ast::Expr, with: &ast::Expr) -> Option<ast::Expr> {
    let last = match column {
        ast::Expr::Identifier(name) => name,
        ast::Expr::CompoundIdentifier(parts) => parts.last()?,
        _ => return None,
    };
    if last.value == "polroles" {
        // Compared with the text of an array: there are no policies.
        return crate::statement::expression("NULL");
    }
    if !["typinput", "typoutput", "typreceive", "typsend"].contains(&&*last.value) {
        return None;
    }
    let name = match with {
        ast::Expr::Value(ValueWithSpan { value: Value::Number(n, _), .. }) if n == "0" => "-".to_owned(),
        // What the parser makes of 'name'::regproc.
        ast::Expr::Subquery(query) => {
            let text = query.to_string();
            let name = text.split_once("proname = '")?.1.split('\'').next()?;
            name.rsplit('.').next()?.to_owned()
        }
        _ => return None,
    };
    Some(ast::Expr::Value(Value::SingleQuotedString(name).into()))
}
