//! Sessions: what a connection sees and has set, and running its statements.

use std::ops::ControlFlow;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use access::Scope;
use arrow::array::timezone::Tz;
use arrow::array::{ArrayRef, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use arrow::record_batch::RecordBatch;
use datafusion::catalog::{CatalogProvider, CatalogProviderList, MemoryCatalogProviderList};
use datafusion::error::DataFusionError;
use datafusion::execution::context::SQLOptions;
use datafusion::execution::{SendableRecordBatchStream, SessionState, SessionStateBuilder};
use datafusion::logical_expr::{LogicalPlan, ScalarUDF};
use datafusion::prelude::SessionContext;
use datafusion::sql::parser::Statement as DfStatement;
use datafusion::sql::sqlparser::ast::{ObjectName, Statement, visit_relations};
use datafusion_pg_catalog::pg_catalog::oid_type_planner::PgOidTypePlanner;
use datafusion_pg_catalog::sql::PostgresCompatibilityParser;
use engine::{Activity, Description, Engine, ErrorKind, Memory, Notices, QueryLimits, View};
use parking_lot::Mutex;

use crate::bounded::{BoundedResults, Results};
use crate::by_series::rule::BySeries;
use crate::catalog_tables::Cancel;
use crate::error::{Result, SqlError};
use crate::functions;
use crate::functions::gapfill::TimeBuckets;
use crate::interrupt::{Interruptible, LookingWindows};
use crate::limits;
use crate::pg::opened::Connection;
use crate::pg::system::System;
use crate::rules::watched;
use crate::schema::{Database, Metrics};
use crate::statement::{self, Command};
use crate::variables::Variables;
use crate::views::{self, Views};

/// What SQL calls the database of an engine.
pub const DATABASE: &str = "thalweg";

/// Most names of tables that are compared with one that does not exist.
const SUGGESTIONS_MAX: usize = 20_000;

/// What all sessions of an engine share.
pub struct Frontend {
    engine: Engine,
    template: SessionContext,
    database: Arc<Database>,
    metrics: Arc<Metrics>,
    parser: PostgresCompatibilityParser,
}

impl std::fmt::Debug for Frontend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frontend").finish_non_exhaustive()
    }
}

impl Frontend {
    /// The SQL side of `engine`.
    ///
    /// # Errors
    /// When rules and planners can't be registered, which only a bug can bring about.
    pub fn new(engine: &Engine) -> Result<Arc<Self>> {
        let state = engine.session().state();
        let mut config = state.config().clone().with_default_catalog_and_schema(DATABASE, "public");
        config = config.with_create_default_catalog_and_schema(false).with_information_schema(false);
        // Scans cut themselves into as many partitions as pay. A repartitioning on top of a sort, for the sake of the
        // projection that restores text, would lose the order of the answer.
        config.options_mut().optimizer.enable_round_robin_repartition = false;
        let metrics = Arc::new(Metrics::new(engine));
        let made: Arc<OnceLock<Weak<Self>>> = Arc::default();
        let database = Arc::new(Database::new(engine, &metrics, Views::new(engine, &made)));
        let state = SessionStateBuilder::new_from_existing(state)
            .with_config(config)
            .with_catalog_list(catalogs(database.clone()))
            .with_type_planner(Arc::new(PgOidTypePlanner))
            .with_analyzer_rule(Arc::new(TimeBuckets))
            .with_analyzer_rule(Arc::new(BoundedResults))
            .with_optimizer_rule(Arc::new(LookingWindows))
            .with_physical_optimizer_rule(Arc::new(BySeries))
            .with_physical_optimizer_rule(Arc::new(Interruptible))
            .build();
        let mut state = watched(state)?;
        functions::register_planners(&mut state)?;
        let template = SessionContext::new_with_state(state);
        let system = System::new(template.state().catalog_list().clone(), engine);
        database.register_schema("pg_catalog", Arc::new(system))?;
        crate::pg::functions::register(&template, engine);
        functions::register(&template);
        let parser = PostgresCompatibilityParser::new();
        let frontend = Arc::new(Self { engine: engine.clone(), template, database, metrics, parser });
        let _ = made.set(Arc::downgrade(&frontend));
        Ok(frontend)
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// What sessions begin as.
    pub fn template(&self) -> &SessionContext {
        &self.template
    }

    /// What reads statements.
    pub fn parser(&self) -> &PostgresCompatibilityParser {
        &self.parser
    }

    /// Looks up the names of all tables where a statement may read them from `pg_catalog` or `information_schema`: the
    /// present ones, which the former lists, and those of a transaction.
    pub(crate) async fn refresh(&self, statement: &Statement, moment: Option<&Moment>) -> Result<()> {
        if lists_tables(statement) {
            self.metrics.refresh().await?;
            if let Some(moment) = moment {
                moment.metrics.refresh().await?;
            }
        }
        Ok(())
    }

    /// A session of its own state.
    pub fn session(self: &Arc<Self>, user: &str, rights: Rights) -> Session {
        let caller = Arc::new(Caller { name: user.to_owned(), rights });
        let mut state = self.template.state();
        state.config_mut().set_extension(caller.clone());
        let notices = Arc::new(Notices::default());
        state.config_mut().set_extension(notices.clone());
        let connection = Arc::new(Connection::default());
        state.config_mut().set_extension(connection.clone());
        let context = SessionContext::new_with_state(state);
        context.register_udf(ScalarUDF::new_from_impl(Cancel::new(&self.engine, &caller)));
        let variables = Arc::new(Mutex::new(Variables::new(user)));
        functions::register_session(&context, &variables);
        let (asked, transaction) = (Mutex::new("".into()), Mutex::default());
        Session { frontend: self.clone(), context, variables, caller, notices, connection, asked, transaction }
    }
}

/// A connection's state.
pub struct Session {
    frontend: Arc<Frontend>,
    context: SessionContext,
    variables: Arc<Mutex<Variables>>,
    caller: Arc<Caller>,
    /// What there is to say of the statement that runs.
    notices: Arc<Notices>,
    connection: Arc<Connection>,
    /// The text that runs next.
    asked: Mutex<Arc<str>>,
    transaction: Mutex<Transaction>,
}

/// Whether a client has begun a transaction.
#[derive(Default)]
enum Transaction {
    #[default]
    None,
    Begun,
    /// It has run a statement, and its others see the same.
    Sees(Moment),
}

/// The database at one moment.
#[derive(Clone)]
pub(crate) struct Moment {
    engine: Arc<Engine>,
    metrics: Arc<Metrics>,
    catalogs: Arc<dyn CatalogProviderList>,
}

impl Moment {
    async fn now(frontend: &Frontend) -> Self {
        let engine = Arc::new(frontend.engine.snapshot().await);
        let metrics = Arc::new(Metrics::new(&engine));
        let catalogs = catalogs(Arc::new(frontend.database.of(&engine, &metrics)));
        Self { engine, metrics, catalogs }
    }

    /// Makes planning and running see it.
    pub(crate) fn enter(&self, state: &mut SessionState) {
        state.register_catalog_list(self.catalogs.clone());
        state.config_mut().set_extension(self.engine.clone());
    }
}

/// A list of one database.
pub fn catalogs(database: Arc<Database>) -> Arc<dyn CatalogProviderList> {
    let catalogs = MemoryCatalogProviderList::new();
    catalogs.register_catalog(DATABASE.to_owned(), database);
    Arc::new(catalogs)
}

/// Who a session belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Caller {
    /// The user or the name of the token.
    pub name: String,
    /// What they may do beyond reading.
    pub rights: Rights,
}

impl Caller {
    /// Whether they may see a query, and stop it if they may stop queries.
    pub fn may_see(&self, activity: &Activity) -> bool {
        self.rights.admin || self.name == activity.user
    }
}

/// What a session may do beyond reading.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Rights {
    /// See what others ask, and the settings.
    pub admin: bool,
    /// Stop the queries that they see.
    pub stops: bool,
    /// Make and drop views.
    pub writes: bool,
    /// Export rows to files and URLs.
    pub exports: bool,
}

impl Rights {
    /// Those of a caller, in a session that is no page's.
    pub fn of(caller: Option<&access::Caller>) -> Self {
        let may = |scope| caller.is_some_and(|c| c.may(scope));
        let is_known = caller.is_some_and(access::Caller::is_known);
        Self {
            admin: may(Scope::Admin),
            stops: true,
            writes: is_known && may(Scope::Write),
            exports: is_known && may(Scope::Admin),
        }
    }

    /// What is left of them in a request that a link can make: browsers follow one with the credentials that they
    /// remember, and do not say for which page.
    #[must_use]
    pub fn of_link(self) -> Self {
        Self { admin: self.admin, ..Self::default() }
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("variables", &self.variables).finish_non_exhaustive()
    }
}

/// Turns the text of one query into its plan.
///
/// # Errors
/// 42601 and its like for text that means no query.
pub async fn plan(text: &str, session: &Session) -> Result<LogicalPlan> {
    let mut commands = session.parse(text).await?;
    match (commands.pop(), commands.is_empty()) {
        (Some(Command::Query { statement, .. }), true) => session.plan(&statement).await,
        (Some(_), true) => Err(SqlError::unsupported("a statement that is no query")),
        (Some(_), false) => Err(SqlError::unsupported("more than one statement")),
        (None, _) => Err(SqlError::new("42601", "no statement was given")),
    }
}

impl Session {
    /// The commands in `text`. Parsed on the CPU runtime, whose stacks are made for recursion.
    ///
    /// # Errors
    /// Those of [`statement::parse`].
    pub async fn parse(&self, text: &str) -> Result<Vec<Command>> {
        self.asks(text.trim().trim_end_matches(';').into());
        let (frontend, text) = (self.frontend.clone(), text.to_owned());
        self.frontend.engine.run(async move { statement::parse(&frontend.parser, &text) }).await
    }

    /// Plans a query.
    ///
    /// # Errors
    /// 42P01, 42703 and their like for names that mean nothing; 25006 for what would write.
    pub async fn plan(&self, statement: &Arc<Statement>) -> Result<LogicalPlan> {
        let moment = self.moment().await?;
        self.frontend.refresh(statement, moment.as_ref()).await?;
        let (state, statement) = (self.state(moment.as_ref()), statement.clone());
        let plan = async move {
            let statement = DfStatement::Statement(Box::new(Statement::clone(&statement)));
            let plan = state.statement_to_plan(statement).await?;
            limits::check_columns(plan.schema().fields().len())?;
            only_reads(&plan)?;
            Ok::<_, SqlError>(plan)
        };
        match self.frontend.engine.run(views::limited(moment, plan)).await {
            Err(e) if e.code == "42P01" => {
                self.frontend.metrics.refresh().await?;
                Err(self.suggest(e))
            }
            planned => planned,
        }
    }

    /// Whether a statement is to be planned when it runs: what there is to list is looked up then, and what its views mean.
    pub fn plans_late(&self, statement: &Statement) -> bool {
        lists_tables(statement) || names_views(statement, &self.frontend.engine)
    }

    /// Makes or drops views; durable when it returns. Returns what the client is told, or `None` for another command.
    ///
    /// # Errors
    /// 42501 without the right to; 42P07 and 42P01 for views that are there or are not; 2BP01 for one that others need;
    /// those of [`views::check`].
    pub async fn change(&self, command: &Command) -> Result<Option<&'static str>> {
        let engine = &self.frontend.engine;
        let tag = match command {
            Command::CreateView { .. } => "CREATE VIEW",
            Command::DropView { .. } => "DROP VIEW",
            _ => return Ok(None),
        };
        if !self.caller.rights.writes {
            let told = format!("permission denied for {tag}: it needs a login with the scope write or admin");
            return Err(SqlError::new("42501", told).hint(
                "Views are made by a user or a token of auth_file with such a scope; over HTTP by POST, and not from a web page.",
            ));
        }
        match command {
            Command::CreateView { name, columns, definition, replace } => {
                let view = View {
                    name: name.clone(),
                    definition: definition.clone(),
                    columns: columns.clone(),
                    owner: self.caller.name.clone(),
                    created_ms: engine.now_ms(),
                };
                let (frontend, checked) = (self.frontend.clone(), view.clone());
                engine.run(views::limited(None, async move { views::check(&frontend, &checked).await })).await?;
                if !engine.create_view(view, *replace).await? {
                    return Err(SqlError::new("42P07", format!("relation \"{name}\" already exists")));
                }
            }
            Command::DropView { names, if_exists } => {
                let known = engine.views();
                for name in names {
                    if catalog::tables::by_name(name).is_some() && !known.contains_key(name) {
                        return Err(SqlError::new("42809", format!("\"{name}\" is not a view")));
                    }
                    if !if_exists && !known.contains_key(name) {
                        return Err(SqlError::new("42P01", format!("view \"{name}\" does not exist")));
                    }
                    let (frontend, dropped) = (self.frontend.clone(), name.clone());
                    let others = engine.run(async move { views::dependants(&frontend, &dropped) }).await?;
                    if let Some(other) = others.iter().find(|o| !names.contains(o)) {
                        let told = format!("cannot drop view \"{name}\" because view \"{other}\" depends on it");
                        return Err(SqlError::new("2BP01", told));
                    }
                }
                engine.drop_views(names.clone()).await?;
            }
            _ => {}
        }
        Ok(Some(tag))
    }

    /// Whether rows may be exported to files and URLs.
    ///
    /// # Errors
    /// 42501.
    pub fn check_export(&self) -> Result<()> {
        if self.caller.rights.exports {
            return Ok(());
        }
        let hint = "Only an administrator who has logged in may, over HTTP by POST. COPY TO STDOUT is for everybody, and so is \
                    psql's \\copy.";
        Err(SqlError::new("42501", "permission denied to COPY to a file or a URL").hint(hint))
    }

    /// Whose session it is.
    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    /// Names the relation that may have been meant.
    fn suggest(&self, error: SqlError) -> SqlError {
        let Some(name) = error.message.strip_prefix("relation \"") else { return error };
        let schema = match name.split('"').next().unwrap_or_default().rsplit_once('.') {
            Some((schema, _)) => schema.to_owned(),
            None => self.variables.lock().schema(),
        };
        let tables = self.context.catalog(DATABASE).and_then(|c| c.schema(&schema)).map(|s| s.table_names());
        let names = tables
            .unwrap_or_default()
            .into_iter()
            .take(SUGGESTIONS_MAX)
            .map(|t| if schema == "public" { t } else { format!("{schema}.{t}") });
        error.suggest(names, "the table")
    }

    /// Says what the next plan that runs was made of.
    pub fn asks(&self, text: Arc<str>) {
        *self.asked.lock() = text;
    }

    /// What there is to say of the statement that ran.
    pub fn notices(&self) -> &Arc<Notices> {
        &self.notices
    }

    /// Whether the client wants to be told of notices that are no warnings, and of warnings.
    pub fn is_told(&self) -> (bool, bool) {
        let level = self.variables.lock().get("client_min_messages").map_or_else(|_| String::new(), |(_, v)| v);
        let level = level.to_ascii_lowercase();
        (!["warning", "error"].contains(&level.as_str()), level != "error")
    }

    /// What statements of a transaction see, from its first on; `None` where each sees the present.
    async fn moment(&self) -> Result<Option<Moment>> {
        match &*self.transaction.lock() {
            Transaction::Sees(moment) => {
                moment.engine.check_snapshot()?;
                return Ok(Some(moment.clone()));
            }
            Transaction::Begun if self.variables.lock().repeatable() => {}
            _ => return Ok(None),
        }
        let moment = Moment::now(&self.frontend).await;
        *self.transaction.lock() = Transaction::Sees(moment.clone());
        Ok(Some(moment))
    }

    /// What planning and running work with.
    fn state(&self, moment: Option<&Moment>) -> SessionState {
        let mut state = self.context.state();
        if let Some(moment) = moment {
            moment.enter(&mut state);
        }
        state
    }

    /// Runs a plan. Dropping the stream stops the work.
    ///
    /// # Errors
    /// 53300 when too many queries run; those of planning; the stream ends with those of running.
    pub async fn run(&self, plan: LogicalPlan) -> Result<SendableRecordBatchStream> {
        Ok(self.run_within(plan, self.timeout()).await?.0)
    }

    /// Runs a plan whose rows may be asked for until so long from now; with them comes the query's view of the account, for
    /// what holds its rows.
    ///
    /// # Errors
    /// Those of [`Session::run`].
    pub async fn run_within(
        &self,
        plan: LogicalPlan,
        timeout: Duration,
    ) -> Result<(SendableRecordBatchStream, Memory)> {
        let engine = &self.frontend.engine;
        let mut query = engine.begin(QueryLimits { timeout }).await.map_err(|e| match e.kind() {
            ErrorKind::Unavailable => SqlError::new("53300", e.to_string()),
            _ => e.into(),
        })?;
        query.describe(Description {
            language: "sql",
            user: self.caller.name.clone(),
            text: self.asked.lock().to_string(),
        });
        let mut state = self.state(self.moment().await?.as_ref());
        state.config_mut().options_mut().extensions.insert(Results::default());
        let memory = query.memory().clone();
        Ok((engine.execute(&state, plan, query).await?, memory))
    }

    /// How long a client may be idle, within a transaction or outside, before the connection is ended.
    pub fn idle_timeout(&self, in_transaction: bool) -> Option<Duration> {
        self.variables.lock().idle_timeout(in_transaction)
    }

    /// Begins a transaction: notes the variables, to which its end may lead back.
    pub fn begin(&self) {
        self.variables.lock().begin();
        let mut transaction = self.transaction.lock();
        if matches!(*transaction, Transaction::None) {
            *transaction = Transaction::Begun;
        }
    }

    /// Takes back what was set for the transaction alone, or all that was set in it.
    pub fn end(&self, committed: bool) {
        *self.transaction.lock() = Transaction::None;
        self.variables.lock().end(committed);
        self.apply();
    }

    /// How many savepoints the transaction has.
    pub fn savepoints(&self) -> usize {
        self.variables.lock().savepoints()
    }

    /// Makes a savepoint.
    ///
    /// # Errors
    /// 54000 when there are too many.
    pub fn savepoint(&self, name: &str) -> Result<()> {
        self.variables.lock().savepoint(name)
    }

    /// Forgets a savepoint and those after it.
    ///
    /// # Errors
    /// 3B001 when there is none of this name.
    pub fn release(&self, name: &str) -> Result<()> {
        self.variables.lock().release(name)
    }

    /// Takes back what was set since a savepoint.
    ///
    /// # Errors
    /// 3B001 when there is none of this name.
    pub fn roll_back_to(&self, name: &str) -> Result<()> {
        self.variables.lock().roll_back_to(name)?;
        self.apply();
        Ok(())
    }

    /// Sets a variable until the end of the transaction; see [`Session::set`].
    ///
    /// # Errors
    /// Those of [`Session::set`].
    pub fn set_local(&self, name: &str, value: Option<&str>) -> Result<Option<(&'static str, String)>> {
        if name == "transaction_isolation" && matches!(*self.transaction.lock(), Transaction::Sees(_)) {
            let message = "SET TRANSACTION ISOLATION LEVEL must be called before any query";
            return Err(SqlError::new("25001", message));
        }
        let reported = self.variables.lock().set_local(name, value)?;
        self.apply();
        Ok(reported)
    }

    /// How long a statement may run: `statement_timeout`, or else what the server allows.
    pub fn timeout(&self) -> Duration {
        let most = self.frontend.engine.settings().query_timeout;
        self.variables.lock().statement_timeout().map_or(most, |t| t.min(most))
    }

    /// The time zone in which times are shown.
    pub fn time_zone(&self) -> Arc<str> {
        self.variables.lock().time_zone()
    }

    /// Sets a variable, to its default when there is no value; returns its name and value if clients are to be told.
    ///
    /// # Errors
    /// 42704 for an unknown name, 22023 for a value that it can't have.
    pub fn set(&self, name: &str, value: Option<&str>) -> Result<Option<(&'static str, String)>> {
        let reported = self.variables.lock().set(name, value)?;
        self.apply();
        Ok(reported)
    }

    /// Sets all variables to their defaults.
    pub fn reset(&self) {
        self.variables.lock().reset();
        self.apply();
    }

    /// What planning depends on is kept where the planner looks.
    fn apply(&self) {
        let (zone, schema) = {
            let variables = self.variables.lock();
            (variables.time_zone(), variables.schema())
        };
        let state = self.context.state_ref();
        let mut state = state.write();
        let options = state.config_mut().options_mut();
        options.execution.time_zone = Some(zone.to_string());
        options.catalog.default_schema = schema;
    }

    /// The answer to `SHOW name`.
    ///
    /// # Errors
    /// 42704 for an unknown name.
    pub fn show(&self, name: &str) -> Result<RecordBatch> {
        let text = |name: &str| Field::new(name, DataType::Utf8, false);
        let array = |values: Vec<String>| Arc::new(StringArray::from(values)) as ArrayRef;
        let variables = self.variables.lock();
        let (fields, columns) = if name.eq_ignore_ascii_case("all") {
            let (names, values): (Vec<_>, Vec<_>) = variables.all().unzip();
            let described = names.iter().map(|_| String::new()).collect();
            (
                vec![text("name"), text("setting"), text("description")],
                vec![array(names), array(values), array(described)],
            )
        } else {
            let (name, value) = variables.get(name)?;
            (vec![text(&name)], vec![array(vec![value])])
        };
        RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).map_err(|e| DataFusionError::from(e).into())
    }

    /// What clients are told when they connect.
    pub fn reported(&self) -> Vec<(String, String)> {
        self.variables.lock().reported()
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.frontend.engine
    }

    /// The connection whose statements these are.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }
}

/// # Errors
/// 25006 for a plan that would do anything but read.
pub fn only_reads(plan: &LogicalPlan) -> Result<()> {
    let options = SQLOptions::new().with_allow_ddl(false).with_allow_dml(false).with_allow_statements(false);
    options.verify_plan(plan).map_err(|e| SqlError::new("25006", e.message().into_owned()))
}

/// Whether a statement names a view, or something that may be one.
fn names_views(statement: &Statement, engine: &Engine) -> bool {
    let views = engine.views();
    let visit = |name: &ObjectName| match statement::in_public(name).is_some_and(|n| views.contains_key(&n)) {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    };
    visit_relations(statement, visit).is_break()
}

/// Whether a statement may read the names of tables from `pg_catalog` or `information_schema`.
fn lists_tables(statement: &Statement) -> bool {
    if matches!(statement, Statement::ShowTables { .. } | Statement::ShowColumns { .. }) {
        return true;
    }
    let mut found = false;
    let _ = visit_relations(statement, |name| {
        let name = name.to_string().to_ascii_lowercase();
        found |= name.contains("pg_") || name.contains("information_schema");
        ControlFlow::<()>::Continue(())
    });
    found
}

/// Whether `zone` names a time zone.
pub fn is_time_zone(zone: &str) -> bool {
    zone.parse::<Tz>().is_ok()
}
