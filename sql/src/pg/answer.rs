//! Answers to the messages of one connection.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::Arc;

use arrow::datatypes::{DataType, SchemaRef};
use async_trait::async_trait;
use bytes::Bytes;
use datafusion::common::ParamValues;
use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::execution::SendableRecordBatchStream;
use datafusion::logical_expr::{Expr, LogicalPlan};
use datafusion::sql::sqlparser::ast;
use engine::Notice;
use engine::memory::{Kind, Reservation};
use futures::{Sink, SinkExt, Stream, StreamExt, TryStreamExt, stream};
use parking_lot::Mutex;
use pgwire::api::portal::{Format, Portal, PortalExecutionState};
use pgwire::api::query::{
    ExtendedQueryHandler, send_describe_response, send_execution_response, send_partial_query_response,
    send_query_response, send_ready_for_query,
};
use pgwire::api::results::{DescribePortalResponse, FieldInfo, QueryResponse, Response, Tag};
use pgwire::api::stmt::QueryParser;
use pgwire::api::store::{Entry, PortalStore};
use pgwire::api::{ClientInfo, ClientPortalStore, DEFAULT_NAME, PgWireConnectionState, Type};
use pgwire::error::{ErrorInfo, PgWireError, PgWireResult};
use pgwire::messages::PgWireBackendMessage;
use pgwire::messages::copy::{CopyData, CopyDone, CopyOutResponse};
use pgwire::messages::extendedquery::{
    Bind, Close, Describe, Execute, Parse, Sync as EndOfSeries, TARGET_TYPE_BYTE_PORTAL, TARGET_TYPE_BYTE_STATEMENT,
};
use pgwire::messages::response::{EmptyQueryResponse, TransactionStatus};
use pgwire::messages::startup::ParameterStatus;

use super::copy::Writer;
use super::cursor::{Cursor, LIFETIME};
use super::opened::{Keeps, Opened, What};
use super::rows;
use crate::error::SqlError;
use crate::export;
use crate::session::Session;
use crate::statement::{self, Command, Names};

/// An error as clients are told.
pub fn pg_error(e: SqlError) -> PgWireError {
    let mut info = ErrorInfo::new("ERROR".to_owned(), e.code.to_owned(), e.message);
    info.severity_nonlocalized = Some("ERROR".to_owned());
    info.hint = e.hint;
    info.position = e.position.map(|p| p.to_string());
    PgWireError::UserError(Box::new(info))
}

/// The name by which a statement or a portal is kept.
fn key(name: Option<&str>) -> String {
    name.unwrap_or(DEFAULT_NAME).to_owned()
}

/// A prepared statement.
#[derive(Debug)]
pub struct Prepared {
    /// As the client sent it.
    text: Arc<str>,
    command: Command,
    /// Of a query: its plan with placeholders, whose columns are fixed from here on. One that lists tables or names views
    /// is planned when it runs: what there is, and what it means, is looked up then, and what a transaction saw is not held
    /// beyond its end.
    plan: Option<LogicalPlan>,
    /// Types of its parameters, as far as the plan tells them.
    parameters: Vec<Option<DataType>>,
    result: Option<SchemaRef>,
}

impl Prepared {
    fn names(&self) -> Names {
        match &self.command {
            Command::Query { names, .. } | Command::CopyOut { names, .. } | Command::Declare { names, .. } => {
                names.clone()
            }
            _ => Names::default(),
        }
    }
}

/// Most prepared statements that a connection keeps, and the bytes of their texts.
const STATEMENTS: Room = Room { what: "prepared statements", count: 1000, bytes: 4 << 20 };
/// Most portals that a connection keeps, and the bytes of their parameters.
const PORTALS: Room = Room { what: "portals", count: 100, bytes: 16 << 20 };
/// Most cursors that a connection keeps open.
const CURSORS: Room = Room { what: "cursors", count: 100, bytes: 1 << 20 };

#[derive(Debug)]
struct Room {
    what: &'static str,
    count: usize,
    bytes: usize,
}

impl Room {
    /// Whether `name` may be kept with so many bytes beside the others.
    fn check<'a>(&self, kept: impl Iterator<Item = (&'a String, usize)>, name: &str, bytes: usize) -> PgWireResult<()> {
        let others = kept.filter(|(n, _)| *n != name);
        let (count, sum) = others.fold((0, 0), |(count, sum), (_, b)| (count + 1, sum + b));
        if count < self.count && sum + bytes <= self.bytes {
            return Ok(());
        }
        let message = format!(
            "a connection keeps at most {} {} with {} bytes of text and parameters; close some first",
            self.count, self.what, self.bytes
        );
        Err(pg_error(SqlError::new("54000", message)))
    }
}

/// What a connection keeps until it is closed by name.
#[derive(Debug, Default)]
struct Kept {
    statements: HashMap<String, Opened>,
    /// With what their parameters take.
    portals: HashMap<String, Reservation>,
    cursors: HashMap<String, Open>,
    /// Statements of `PREPARE`; their texts are among `statements`.
    named: HashMap<String, Command>,
}

/// An open cursor.
#[derive(Debug, Clone)]
struct Open {
    cursor: Arc<Cursor>,
    opened: Opened,
    /// How many savepoints there were when it was opened, less those that were released; `None` when its transaction has
    /// ended.
    savepoints: Option<usize>,
}

impl Keeps for Mutex<Kept> {
    fn opened(&self) -> Vec<(String, Opened)> {
        let kept = self.lock();
        let statements = kept.statements.iter().filter(|(name, _)| *name != DEFAULT_NAME);
        let cursors = kept.cursors.iter().map(|(name, open)| (name, &open.opened));
        statements.chain(cursors).map(|(name, opened)| (name.clone(), opened.clone())).collect()
    }
}

impl Kept {
    fn check_statement(&self, name: &str, bytes: usize) -> PgWireResult<()> {
        STATEMENTS.check(self.statements.iter().map(|(name, s)| (name, s.text.len())), name, bytes)
    }

    fn cursor(&self, name: &str) -> PgWireResult<Arc<Cursor>> {
        let missing = || pg_error(SqlError::new("34000", format!("cursor {name:?} does not exist")));
        self.cursors.get(name).map(|open| open.cursor.clone()).ok_or_else(missing)
    }

    /// Forgets the cursors that were opened after more savepoints than these.
    fn end_cursors_beyond(&mut self, savepoints: usize) {
        self.cursors.retain(|_, open| open.savepoints.is_none_or(|s| s <= savepoints));
    }
}

/// What a connection answers with.
#[derive(Debug, Clone)]
pub struct Answers {
    session: Arc<Session>,
    kept: Arc<Mutex<Kept>>,
}

/// What `pgwire` asks of something that can be written to and holds prepared statements.
pub trait Client:
    ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage, Error = std::io::Error> + Unpin + Send + Sync
{
}

impl<C> Client for C where
    C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage, Error = std::io::Error> + Unpin + Send + Sync
{
}

impl Answers {
    /// Answers for a session.
    pub fn new(session: Arc<Session>) -> Self {
        let kept: Arc<Mutex<Kept>> = Arc::default();
        let keeps: Arc<dyn Keeps> = kept.clone();
        session.connection().is(Arc::downgrade(&keeps));
        Self { session, kept }
    }

    /// What is opened now.
    fn opened(&self, text: Arc<str>, what: What) -> Opened {
        Opened { text, since_ms: self.session.engine().now_ms(), what }
    }

    /// Prepares a statement, if there is room for it.
    pub async fn parse<C>(&self, client: &mut C, message: Parse) -> PgWireResult<()>
    where
        C: Client,
        C::PortalStore: PortalStore<Statement = Arc<Prepared>>,
    {
        let (name, text) = (key(message.name.as_deref()), Arc::from(message.query.as_str()));
        let opened = self.opened(text, What::Statement { by_sql: false });
        self.kept.lock().check_statement(&name, opened.text.len())?;
        self.on_parse(client, message).await?;
        self.kept.lock().statements.insert(name, opened);
        Ok(())
    }

    /// Makes a portal, if there is room for it.
    pub async fn bind<C>(&self, client: &mut C, message: Bind) -> PgWireResult<()>
    where
        C: Client,
        C::PortalStore: PortalStore<Statement = Arc<Prepared>>,
    {
        let name = key(message.portal_name.as_deref());
        let bytes = message.parameters.iter().flatten().map(Bytes::len).sum();
        PORTALS.check(self.kept.lock().portals.iter().map(|(name, kept)| (name, kept.bytes())), &name, bytes)?;
        let mut memory = self.session.engine().memory().reserve(Kind::Queries);
        memory.grow(bytes).map_err(|e| pg_error(SqlError::no_memory(&e)))?;
        self.on_bind(client, message).await?;
        self.kept.lock().portals.insert(name, memory);
        Ok(())
    }

    /// Forgets a prepared statement or a portal.
    pub async fn close<C>(&self, client: &mut C, message: Close) -> PgWireResult<()>
    where
        C: Client,
        C::PortalStore: PortalStore<Statement = Arc<Prepared>>,
    {
        let (name, kind) = (key(message.name.as_deref()), message.target_type);
        self.on_close(client, message).await?;
        let mut kept = self.kept.lock();
        if kind == TARGET_TYPE_BYTE_STATEMENT {
            kept.statements.remove(&name);
            kept.named.remove(&name);
        } else {
            kept.portals.remove(&name);
            kept.cursors.remove(&name);
        }
        Ok(())
    }

    /// Tells what a prepared statement, a portal or a cursor is like. To clients a cursor is a portal.
    pub async fn describe<C>(&self, client: &mut C, message: Describe) -> PgWireResult<()>
    where
        C: Client,
        C::PortalStore: PortalStore<Statement = Arc<Prepared>>,
    {
        let name = key(message.name.as_deref());
        let cursor = self.kept.lock().cursor(&name).ok();
        match cursor.filter(|_| message.target_type == TARGET_TYPE_BYTE_PORTAL) {
            Some(cursor) => {
                let format = if cursor.binary { Format::UnifiedBinary } else { Format::UnifiedText };
                let fields = rows::fields(&cursor.schema, &cursor.names, &format);
                send_describe_response(client, &DescribePortalResponse::new(fields)).await
            }
            None => self.on_describe(client, message).await,
        }
    }

    /// Forgets the cursors that do not outlive the transaction.
    fn end_cursors(&self, committed: bool) {
        self.kept.lock().cursors.retain(|_, open| {
            let outlives = open.savepoints.is_none() || (open.cursor.hold && committed);
            open.savepoints = None;
            outlives
        });
    }

    /// Ends a series of messages of the extended protocol.
    pub async fn sync<C>(&self, client: &mut C, message: EndOfSeries) -> PgWireResult<()>
    where
        C: Client,
        C::PortalStore: PortalStore<Statement = Arc<Prepared>>,
    {
        self.kept.lock().portals.remove(DEFAULT_NAME);
        self.on_sync(client, message).await
    }

    /// Forgets what a failure ends: all portals, the cursors to whose time no savepoint leads back, and those of whose rows
    /// some were read and not given. They hold on to what they ran.
    pub fn fail<C>(&self, client: &C)
    where
        C: ClientPortalStore,
        C::PortalStore: PortalStore<Statement = Arc<Prepared>>,
    {
        client.portal_store().clear_portals();
        let mut kept = self.kept.lock();
        kept.portals.clear();
        let savepoints = self.session.savepoints();
        kept.cursors.retain(|_, open| open.savepoints.is_none_or(|s| s < savepoints) && !open.cursor.is_read());
    }

    /// The session.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Answers a message of the simple protocol: statements one after the other, each answered before the next runs.
    pub async fn simple<C>(&self, client: &mut C, text: &str) -> PgWireResult<()>
    where
        C: Client,
        C::PortalStore: PortalStore<Statement = Arc<Prepared>>,
    {
        client.set_state(PgWireConnectionState::QueryInProgress);
        let commands = self.session.parse(text).await.map_err(pg_error)?;
        let sent = sent(text);
        if commands.is_empty() {
            client.feed(PgWireBackendMessage::EmptyQueryResponse(EmptyQueryResponse::new())).await?;
        }
        for (i, command) in commands.into_iter().enumerate() {
            self.check_transaction(client, &command)?;
            let prepared = self.prepare(command, &sent).await.map_err(|e| pg_error(e.within(text, i)))?;
            if !prepared.parameters.is_empty() && !matches!(prepared.command, Command::Prepare { .. }) {
                return Err(pg_error(SqlError::new("42P02", "there is no parameter $1").within(text, i)));
            }
            let format = self.cursor_format(&prepared.command);
            match self.respond(client, &prepared, prepared.plan.clone(), &format).await? {
                Answer::Rows(results) => send_query_response(client, results, true).await?,
                other => finish(client, other).await?,
            }
            self.tell_notices(client).await?;
        }
        client.set_state(PgWireConnectionState::ReadyForQuery);
        let status = client.transaction_status();
        send_ready_for_query(client, status).await
    }

    /// In the simple protocol the cursor says in which form rows are given.
    fn cursor_format(&self, command: &Command) -> Format {
        match command {
            Command::Fetch { cursor, .. } if self.kept.lock().cursor(cursor).is_ok_and(|c| c.binary) => {
                Format::UnifiedBinary
            }
            _ => Format::UnifiedText,
        }
    }

    /// In a failed transaction nothing but its end is answered.
    fn check_transaction<C: Client>(&self, client: &C, command: &Command) -> PgWireResult<()> {
        let ends = matches!(command, Command::End(_) | Command::RollbackTo(_));
        if client.transaction_status() == TransactionStatus::Error && !ends {
            return Err(pg_error(aborted()));
        }
        Ok(())
    }

    /// The statement with the types that the client tells, for parameters whose types the plan does not tell. Those
    /// that nobody tells are texts.
    async fn typed(&self, prepared: Prepared, told: &[Option<Type>]) -> Result<Prepared, SqlError> {
        let told = |i: usize| told.get(i).and_then(Option::as_ref).map_or(Some(ast::DataType::Text), sql_type);
        let own = prepared.parameters.iter().enumerate();
        let types: Vec<_> = own.map(|(i, own)| told(i).filter(|_| own.is_none())).collect();
        if types.iter().all(Option::is_none) {
            return Ok(prepared);
        }
        let mut command = prepared.command.clone();
        if let Command::Query { statement, .. }
        | Command::CopyOut { statement, .. }
        | Command::Declare { statement, .. } = &mut command
        {
            *statement = Arc::new(statement::with_types(statement, &types));
        }
        // Where that makes no sense the values themselves may.
        Ok(self.prepare(command, &prepared.text).await.unwrap_or(prepared))
    }

    async fn prepare(&self, command: Command, text: &Arc<str>) -> Result<Prepared, SqlError> {
        let command = self.filled(command)?;
        let (plan, result) = match &command {
            Command::Query { statement, .. } => {
                let plan = self.session.plan(statement).await?;
                let schema = plan.schema().inner().clone();
                (Some(plan), Some(schema))
            }
            // Before anything is looked at.
            Command::CopyOut { to: Some(_), .. } if let Err(e) = self.session.check_export() => return Err(e),
            Command::CopyOut { statement, .. }
            | Command::Declare { statement, .. }
            | Command::Prepare { statement, .. } => (Some(self.session.plan(statement).await?), None),
            Command::Show(name) => (None, Some(self.session.show(name)?.schema())),
            Command::Fetch { cursor, skip: false, .. } => {
                // One that is not there may be when the statement runs.
                (None, self.kept.lock().cursor(cursor).ok().map(|c| c.schema.clone()))
            }
            _ => (None, None),
        };
        let parameters = match &plan {
            Some(plan) => parameter_types(plan)?,
            None => vec![],
        };
        Ok(Prepared { text: text.clone(), command, plan, parameters, result })
    }

    /// The query that `EXECUTE` means, or the command itself.
    fn filled(&self, command: Command) -> Result<Command, SqlError> {
        let Command::Execute { name, arguments } = &command else { return Ok(command) };
        let kept = self.kept.lock().named.get(name).cloned();
        let Some(Command::Prepare { statement, names, types, .. }) = kept else {
            return Err(SqlError::new("26000", format!("prepared statement {name:?} does not exist")));
        };
        let statement = Arc::new(statement::fill(&statement, &types, arguments)?);
        Ok(Command::Query { statement, names })
    }

    /// Runs a command; `plan` is its plan with the parameters filled in.
    async fn respond<C>(
        &self,
        client: &mut C,
        prepared: &Prepared,
        plan: Option<LogicalPlan>,
        format: &Format,
    ) -> PgWireResult<Answer>
    where
        C: Client,
        C::PortalStore: PortalStore<Statement = Arc<Prepared>>,
    {
        self.check_transaction(client, &prepared.command)?;
        let plan = || plan.ok_or_else(|| pg_error(SqlError::new("XX000", "a query without its plan")));
        let zone = self.session.time_zone();
        self.session.asks(prepared.text.clone());
        Ok(match &prepared.command {
            Command::Query { names, .. } => {
                let plan = plan()?;
                let explains = matches!(plan, LogicalPlan::Explain(_) | LogicalPlan::Analyze(_));
                let batches = self.session.run(plan).await.map_err(pg_error)?;
                let schema = prepared.result.clone().unwrap_or_else(|| batches.schema());
                let fields = Arc::new(rows::fields(&schema, names, format));
                let mut response = QueryResponse::new(fields.clone(), encode(batches, fields, zone));
                if explains {
                    response.set_command_tag("EXPLAIN");
                }
                Answer::Rows(response)
            }
            Command::CopyOut { names, format, to: Some(to), .. } => {
                let rows = export::copy_to(&self.session, plan()?, names, format, to).await.map_err(pg_error)?;
                Answer::Done(Tag::new("COPY").with_rows(rows))
            }
            Command::CopyOut { names, format, to: None, .. } => {
                let batches = self.session.run(plan()?).await.map_err(pg_error)?;
                let writer = Writer::new(format.clone(), &batches.schema(), names).map_err(pg_error)?;
                Answer::Copy { batches, writer, zone }
            }
            Command::Declare { cursor, names, binary, hold, scroll, .. } => {
                let alone = client.transaction_status() == TransactionStatus::Idle;
                if !*hold && alone {
                    let message = "DECLARE CURSOR can only be used in transaction blocks";
                    return Err(pg_error(SqlError::new("25P01", message)));
                }
                {
                    let kept = self.kept.lock();
                    if kept.cursors.contains_key(cursor) {
                        let message = format!("cursor {cursor:?} already exists");
                        return Err(pg_error(SqlError::new("42P03", message)));
                    }
                    let others = kept.cursors.iter().map(|(name, open)| (name, open.opened.text.len()));
                    CURSORS.check(others, cursor, prepared.text.len())?;
                }
                let lifetime = LIFETIME.max(self.session.timeout());
                let (batches, memory) = self.session.run_within(plan()?, lifetime).await.map_err(pg_error)?;
                let memory = scroll.then(|| memory.reserve(Kind::Queries));
                let what = What::Cursor { holdable: *hold, binary: *binary, scrollable: *scroll };
                let opened = self.opened(prepared.text.clone(), what);
                let cursor_of = Cursor::new(batches, names.clone(), (*binary, *hold), memory);
                let savepoints = (!alone).then(|| self.session.savepoints());
                let opened = Open { cursor: Arc::new(cursor_of), opened, savepoints };
                self.kept.lock().cursors.insert(cursor.clone(), opened);
                Answer::Done(Tag::new("DECLARE CURSOR"))
            }
            Command::Fetch { cursor, rows, skip } => {
                let cursor = self.kept.lock().cursor(cursor)?;
                let batches = cursor.fetch(*rows).await.map_err(pg_error)?;
                if *skip {
                    let counts = batches.map_ok(|b| b.num_rows());
                    let passed = counts.try_fold(0, async |sum, rows| Ok(sum + rows)).await;
                    let passed = passed.map_err(|e| pg_error(e.into()))?;
                    return Ok(Answer::Done(Tag::new("MOVE").with_rows(passed)));
                }
                let fields = Arc::new(rows::fields(&cursor.schema, &cursor.names, format));
                let mut response = QueryResponse::new(fields.clone(), encode(batches, fields, zone));
                response.set_command_tag("FETCH");
                Answer::Rows(response)
            }
            Command::CloseCursor(name) => {
                match name {
                    Some(name) => {
                        self.kept.lock().cursor(name)?;
                        self.kept.lock().cursors.remove(name);
                    }
                    None => self.kept.lock().cursors.clear(),
                }
                Answer::Done(Tag::new(if name.is_some() { "CLOSE CURSOR" } else { "CLOSE CURSOR ALL" }))
            }
            Command::Prepare { name, .. } => {
                let mut kept = self.kept.lock();
                if kept.statements.contains_key(name) {
                    let message = format!("prepared statement {name:?} already exists");
                    return Err(pg_error(SqlError::new("42P05", message)));
                }
                kept.check_statement(name, prepared.text.len())?;
                let opened = self.opened(prepared.text.clone(), What::Statement { by_sql: true });
                kept.statements.insert(name.clone(), opened);
                kept.named.insert(name.clone(), prepared.command.clone());
                Answer::Done(Tag::new("PREPARE"))
            }
            Command::Execute { .. } => return Err(pg_error(SqlError::new("XX000", "EXECUTE without its statement"))),
            Command::Show(name) => {
                let batch = self.session.show(name).map_err(pg_error)?;
                let fields = Arc::new(rows::fields(&batch.schema(), &Names::default(), format));
                let encoded = encode(stream::iter([Ok(batch)]), fields.clone(), zone);
                let mut response = QueryResponse::new(fields, encoded);
                response.set_command_tag("SHOW");
                Answer::Rows(response)
            }
            Command::Set { name, value, local } => {
                let set = if *local { Session::set_local } else { Session::set };
                let told = set(&self.session, name, value.as_deref()).map_err(pg_error)?;
                if let Some((name, value)) = told {
                    let status = ParameterStatus::new(name.to_owned(), value);
                    client.feed(PgWireBackendMessage::ParameterStatus(status)).await?;
                }
                Answer::Done(Tag::new(if value.is_some() { "SET" } else { "RESET" }))
            }
            Command::ResetAll => {
                self.reset(client).await?;
                Answer::Done(Tag::new("RESET"))
            }
            Command::Deallocate(name) => {
                self.deallocate(client, name.as_deref())?;
                Answer::Done(Tag::new(if name.is_some() { "DEALLOCATE" } else { "DEALLOCATE ALL" }))
            }
            Command::Discard => {
                if client.transaction_status() != TransactionStatus::Idle {
                    let message = "DISCARD ALL cannot run inside a transaction block";
                    return Err(pg_error(SqlError::new("25001", message)));
                }
                self.deallocate(client, None)?;
                self.kept.lock().cursors.clear();
                self.reset(client).await?;
                Answer::Done(Tag::new("DISCARD ALL"))
            }
            Command::Begin(tag, isolation) => {
                self.session.begin();
                if let Some(level) = isolation {
                    self.session.set_local("transaction_isolation", Some(level)).map_err(pg_error)?;
                }
                client.set_transaction_status(client.transaction_status().to_in_transaction_state());
                Answer::Done(Tag::new(tag))
            }
            Command::End(tag) => {
                let failed = client.transaction_status() == TransactionStatus::Error;
                let before = self.session.reported();
                let tag = if failed { "ROLLBACK" } else { tag };
                self.session.end(tag == "COMMIT");
                self.end_cursors(tag == "COMMIT");
                self.tell_changes(client, &before).await?;
                client.set_transaction_status(TransactionStatus::Idle);
                Answer::Done(Tag::new(tag))
            }
            Command::Savepoint(name) => {
                in_transaction(client, "SAVEPOINT")?;
                self.session.savepoint(name).map_err(pg_error)?;
                Answer::Done(Tag::new("SAVEPOINT"))
            }
            Command::Release(name) => {
                in_transaction(client, "RELEASE SAVEPOINT")?;
                self.session.release(name).map_err(pg_error)?;
                let savepoints = self.session.savepoints();
                for open in self.kept.lock().cursors.values_mut() {
                    open.savepoints = open.savepoints.map(|s| s.min(savepoints));
                }
                Answer::Done(Tag::new("RELEASE"))
            }
            Command::RollbackTo(name) => {
                in_transaction(client, "ROLLBACK TO SAVEPOINT")?;
                let before = self.session.reported();
                self.session.roll_back_to(name).map_err(pg_error)?;
                // Those that were there when the savepoint was made.
                let savepoints = self.session.savepoints();
                self.kept.lock().end_cursors_beyond(savepoints.saturating_sub(1));
                self.tell_changes(client, &before).await?;
                client.set_transaction_status(TransactionStatus::Transaction);
                Answer::Done(Tag::new("ROLLBACK"))
            }
            Command::CreateView { .. } | Command::DropView { .. } => {
                if client.transaction_status() != TransactionStatus::Idle {
                    let message = "views cannot be made or dropped inside a transaction block";
                    let hint = "A transaction here only reads, and could not take it back: use autocommit.";
                    return Err(pg_error(SqlError::new("25001", message).hint(hint)));
                }
                let tag = self.session.change(&prepared.command).await.map_err(pg_error)?;
                Answer::Done(Tag::new(tag.unwrap_or_default()))
            }
            Command::Done(tag) => Answer::Done(Tag::new(tag)),
        })
    }

    /// Sets all variables to their defaults.
    async fn reset<C: Client>(&self, client: &mut C) -> PgWireResult<()> {
        let before = self.session.reported();
        self.session.reset();
        self.tell_changes(client, &before).await
    }

    /// Tells the client what there is to say of the statement that ran.
    async fn tell_notices<C: Client>(&self, client: &mut C) -> PgWireResult<()> {
        let (infos, warnings) = self.session.is_told();
        for Notice { is_warning, text } in self.session.notices().take() {
            if if is_warning { warnings } else { infos } {
                let (severity, code) = if is_warning { ("WARNING", "01000") } else { ("NOTICE", "00000") };
                let mut notice = ErrorInfo::new(severity.to_owned(), code.to_owned(), text);
                notice.severity_nonlocalized = Some(severity.to_owned());
                client.feed(PgWireBackendMessage::NoticeResponse(notice.into())).await?;
            }
        }
        Ok(())
    }

    /// Tells the client which variables that it follows have changed.
    async fn tell_changes<C: Client>(&self, client: &mut C, before: &[(String, String)]) -> PgWireResult<()> {
        for (name, value) in self.session.reported() {
            if !before.iter().any(|(n, v)| *n == name && *v == value) {
                client.feed(PgWireBackendMessage::ParameterStatus(ParameterStatus::new(name, value))).await?;
            }
        }
        Ok(())
    }

    /// Forgets a prepared statement, or all.
    fn deallocate<C>(&self, client: &C, name: Option<&str>) -> PgWireResult<()>
    where
        C: Client,
        C::PortalStore: PortalStore<Statement = Arc<Prepared>>,
    {
        let mut kept = self.kept.lock();
        let names: Vec<String> = match name {
            None => kept.statements.keys().cloned().collect(),
            Some(name) if kept.statements.contains_key(name) => vec![name.to_owned()],
            Some(name) => {
                let message = format!("prepared statement {name:?} does not exist");
                return Err(pg_error(SqlError::new("26000", message)));
            }
        };
        for name in names {
            client.portal_store().rm_statement(&name);
            kept.statements.remove(&name);
            kept.named.remove(&name);
        }
        Ok(())
    }
}

/// What a command gives.
enum Answer {
    Rows(QueryResponse),
    Copy { batches: SendableRecordBatchStream, writer: Writer, zone: Arc<str> },
    Done(Tag),
}

/// Sends an answer that is no rows.
async fn finish<C: Client>(client: &mut C, answer: Answer) -> PgWireResult<()> {
    let tag = match answer {
        Answer::Done(tag) => tag,
        Answer::Copy { mut batches, mut writer, zone } => {
            let (columns, binary) = writer.columns();
            let format = i8::from(binary);
            let head = CopyOutResponse::new(format, columns as i16, vec![i16::from(format); columns]);
            client.feed(PgWireBackendMessage::CopyOutResponse(head)).await?;
            let mut rows = 0;
            while let Some(batch) = batches.try_next().await.map_err(|e| pg_error(e.into()))? {
                for row in writer.rows(&batch, &zone)? {
                    rows += 1;
                    client.feed(PgWireBackendMessage::CopyData(CopyData::new(row))).await?;
                }
            }
            if let Some(end) = writer.end() {
                client.feed(PgWireBackendMessage::CopyData(CopyData::new(end))).await?;
            }
            client.feed(PgWireBackendMessage::CopyDone(CopyDone::new())).await?;
            Tag::new("COPY").with_rows(rows)
        }
        Answer::Rows(_) => return Err(pg_error(SqlError::new("XX000", "rows where none are expected"))),
    };
    send_execution_response(client, tag).await
}

fn encode<S>(
    batches: S,
    fields: Arc<Vec<FieldInfo>>,
    zone: Arc<str>,
) -> impl Stream<Item = PgWireResult<pgwire::messages::data::DataRow>> + Send + 'static
where
    S: Stream<Item = datafusion::error::Result<arrow::record_batch::RecordBatch>> + Send + 'static,
{
    batches
        .map(move |batch| {
            let batch = batch.map_err(|e| pg_error(e.into()))?;
            Ok::<_, PgWireError>(stream::iter(rows::rows(&batch, &fields, &zone)?))
        })
        .try_flatten()
}

fn in_transaction<C: Client>(client: &C, what: &str) -> PgWireResult<()> {
    match client.transaction_status() {
        TransactionStatus::Idle => {
            let message = format!("{what} can only be used in transaction blocks");
            Err(pg_error(SqlError::new("25P01", message)))
        }
        _ => Ok(()),
    }
}

/// A text as `catalog.queries` shows it.
fn sent(text: &str) -> Arc<str> {
    text.trim().trim_end_matches(';').into()
}

fn aborted() -> SqlError {
    let message = "current transaction is aborted, commands ignored until end of transaction block";
    SqlError::new("25P02", message)
}

/// The type of a parameter as SQL names it, if it is one that values of every kind can be taken to be.
fn sql_type(told: &Type) -> Option<ast::DataType> {
    Some(match *told {
        Type::BOOL => ast::DataType::Boolean,
        Type::INT2 => ast::DataType::SmallInt(None),
        Type::INT4 => ast::DataType::Integer(None),
        Type::INT8 => ast::DataType::BigInt(None),
        Type::FLOAT4 => ast::DataType::Real,
        Type::FLOAT8 => ast::DataType::DoublePrecision,
        Type::TEXT | Type::VARCHAR | Type::UNKNOWN => ast::DataType::Text,
        Type::DATE => ast::DataType::Date,
        Type::TIMESTAMP => ast::DataType::Timestamp(None, ast::TimezoneInfo::None),
        Type::TIMESTAMPTZ => ast::DataType::Timestamp(None, ast::TimezoneInfo::WithTimeZone),
        _ => return None,
    })
}

/// The types of `$1`, `$2`, ...
fn parameter_types(plan: &LogicalPlan) -> Result<Vec<Option<DataType>>, SqlError> {
    let types = plan.get_parameter_types()?;
    let mut all = Vec::new();
    for (name, data_type) in types {
        let number: usize = name
            .trim_start_matches('$')
            .parse()
            .ok()
            .filter(|n| (1..=65_535).contains(n))
            .ok_or_else(|| SqlError::new("42P02", format!("there is no parameter {name}")))?;
        if all.len() < number {
            all.resize(number, None);
        }
        all[number - 1] = data_type;
    }
    // `$1::int8` says what the parameter is.
    let mut told = Vec::new();
    plan.apply_with_subqueries(|node| {
        node.apply_expressions(|e| {
            e.apply(|e| {
                if let Expr::Cast(cast) = e
                    && let Expr::Placeholder(placeholder) = cast.expr.as_ref()
                    && let Ok(number) = placeholder.id.trim_start_matches('$').parse::<usize>()
                {
                    told.push((number, cast.field.data_type().clone()));
                }
                Ok(TreeNodeRecursion::Continue)
            })
        })
    })?;
    for (number, data_type) in told {
        if let Some(unknown @ None) = number.checked_sub(1).and_then(|i| all.get_mut(i)) {
            *unknown = Some(data_type);
        }
    }
    Ok(all)
}

#[async_trait]
impl QueryParser for Answers {
    type Statement = Arc<Prepared>;

    async fn parse_sql<C>(&self, client: &C, sql: &str, types: &[Option<Type>]) -> PgWireResult<Option<Self::Statement>>
    where
        C: ClientInfo + Unpin + Send + Sync,
    {
        let mut commands = self.session.parse(sql).await.map_err(pg_error)?;
        match (commands.pop(), commands.is_empty()) {
            (None, _) => Ok(None),
            (Some(command), true) => {
                let ends = matches!(command, Command::End(_) | Command::RollbackTo(_));
                if client.transaction_status() == TransactionStatus::Error && !ends {
                    return Err(pg_error(aborted()));
                }
                let prepared = self.prepare(command, &sent(sql)).await.map_err(|e| pg_error(e.within(sql, 0)))?;
                let mut prepared = self.typed(prepared, types).await.map_err(|e| pg_error(e.within(sql, 0)))?;
                if let Command::Query { statement, .. } = &prepared.command
                    && self.session.plans_late(statement)
                {
                    prepared.plan = None;
                }
                Ok(Some(Arc::new(prepared)))
            }
            (Some(_), false) => {
                let message = "cannot insert multiple commands into a prepared statement";
                Err(pg_error(SqlError::new("42601", message)))
            }
        }
    }

    fn get_parameter_types(&self, statement: &Self::Statement) -> PgWireResult<Vec<Type>> {
        let wire = |t: &Option<DataType>| match t {
            Some(t) => rows::wire_type(&Arc::new(arrow::datatypes::Field::new("", t.clone(), true))),
            None => Type::TEXT,
        };
        Ok(statement.parameters.iter().map(wire).collect())
    }

    fn get_result_schema(
        &self,
        statement: &Self::Statement,
        column_format: Option<&Format>,
    ) -> PgWireResult<Vec<FieldInfo>> {
        let format = column_format.unwrap_or(&Format::UnifiedText);
        Ok(statement.result.as_ref().map_or_else(Vec::new, |s| rows::fields(s, &statement.names(), format)))
    }
}

#[async_trait]
impl ExtendedQueryHandler for Answers {
    type Statement = Arc<Prepared>;
    type QueryParser = Self;

    fn query_parser(&self) -> Arc<Self::QueryParser> {
        Arc::new(self.clone())
    }

    /// Not called: [`Answers::execute`] runs portals.
    async fn do_query<C>(
        &self,
        _client: &mut C,
        _portal: &Portal<Self::Statement>,
        _max_rows: usize,
    ) -> PgWireResult<Response>
    where
        C: ClientInfo + ClientPortalStore + Sink<PgWireBackendMessage> + Unpin + Send + Sync,
        C::PortalStore: PortalStore<Statement = Self::Statement>,
        C::Error: Debug,
        PgWireError: From<<C as Sink<PgWireBackendMessage>>::Error>,
    {
        Err(PgWireError::NotReadyForQuery)
    }
}

impl Answers {
    /// Answers an `Execute` message: streams the rows of a portal up to the asked-for number, and leaves the rest in
    /// its stream for the next.
    pub async fn execute<C>(&self, client: &mut C, message: Execute) -> PgWireResult<()>
    where
        C: Client,
        C::PortalStore: PortalStore<Statement = Arc<Prepared>>,
    {
        client.set_state(PgWireConnectionState::QueryInProgress);
        let name = message.name.as_deref().unwrap_or(DEFAULT_NAME);
        match client.portal_store().get_portal(name) {
            Some(Entry::Value(portal)) => self.execute_portal(client, &portal, message.max_rows as usize).await?,
            Some(Entry::Empty) => {
                client.feed(PgWireBackendMessage::EmptyQueryResponse(EmptyQueryResponse::new())).await?;
            }
            None => return Err(PgWireError::PortalNotFound(name.to_owned())),
        }
        self.tell_notices(client).await?;
        client.set_state(PgWireConnectionState::ReadyForQuery);
        Ok(())
    }

    async fn execute_portal<C>(
        &self,
        client: &mut C,
        portal: &Portal<Arc<Prepared>>,
        max_rows: usize,
    ) -> PgWireResult<()>
    where
        C: Client,
        C::PortalStore: PortalStore<Statement = Arc<Prepared>>,
    {
        let state = portal.state();
        let mut state = state.lock().await;
        if matches!(*state, PortalExecutionState::Initial) {
            let prepared = &portal.statement.statement;
            let plan = match (&prepared.plan, &prepared.command) {
                (None, Command::Query { statement, .. }) => {
                    let plan = self.session.plan(statement).await.map_err(pg_error)?;
                    let types = |schema: &SchemaRef| -> Vec<DataType> {
                        schema.fields().iter().map(|f| f.data_type().clone()).collect()
                    };
                    if prepared.result.as_ref().is_some_and(|told| types(told) != types(plan.schema().inner())) {
                        // A view has become another one, and the client was told of its columns.
                        return Err(pg_error(SqlError::new("0A000", "cached plan must not change result type")));
                    }
                    Some(plan)
                }
                (plan, _) => plan.clone(),
            };
            let plan = plan.map(|plan| bind(plan, portal, &prepared.parameters)).transpose()?;
            match self.respond(client, prepared, plan, &portal.result_column_format).await? {
                Answer::Rows(results) => *state = PortalExecutionState::Suspended(results),
                other => return finish(client, other).await,
            }
        }
        match &mut *state {
            PortalExecutionState::Suspended(results) => {
                if !send_partial_query_response(client, results, max_rows).await? {
                    *state = PortalExecutionState::Finished;
                }
                Ok(())
            }
            _ => send_execution_response(client, Tag::new("SELECT").with_rows(0)).await,
        }
    }
}

fn bind(plan: LogicalPlan, portal: &Portal<Arc<Prepared>>, types: &[Option<DataType>]) -> PgWireResult<LogicalPlan> {
    if types.is_empty() {
        return Ok(plan);
    }
    if portal.parameters.len() != types.len() {
        let message = format!("{} parameters were given, the statement has {}", portal.parameters.len(), types.len());
        return Err(pg_error(SqlError::new("08P01", message)));
    }
    let types: Vec<Option<&DataType>> = types.iter().map(Option::as_ref).collect();
    let values: ParamValues = arrow_pg::datatypes::df::deserialize_parameters(portal, &types)?;
    plan.replace_params_with_values(&values).map_err(|e| pg_error(e.into()))
}
