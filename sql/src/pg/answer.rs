//! Answers to the messages of one connection.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::Arc;

use arrow::datatypes::{DataType, SchemaRef};
use async_trait::async_trait;
use bytes::Bytes;
use datafusion::common::ParamValues;
use datafusion::logical_expr::LogicalPlan;
use futures::{Sink, SinkExt, Stream, StreamExt, TryStreamExt, stream};
use parking_lot::Mutex;
use pgwire::api::portal::{Format, Portal, PortalExecutionState};
use pgwire::api::query::{
    ExtendedQueryHandler, send_execution_response, send_partial_query_response, send_query_response,
    send_ready_for_query,
};
use pgwire::api::results::{CopyResponse, FieldInfo, QueryResponse, Response, Tag};
use pgwire::api::stmt::QueryParser;
use pgwire::api::store::{Entry, PortalStore};
use pgwire::api::{ClientInfo, ClientPortalStore, DEFAULT_NAME, PgWireConnectionState, Type, copy};
use pgwire::error::{ErrorInfo, PgWireError, PgWireResult};
use pgwire::messages::PgWireBackendMessage;
use pgwire::messages::copy::CopyData;
use pgwire::messages::extendedquery::{Bind, Close, Execute, Parse, Sync as EndOfSeries, TARGET_TYPE_BYTE_STATEMENT};
use pgwire::messages::response::{EmptyQueryResponse, TransactionStatus};
use pgwire::messages::startup::ParameterStatus;

use super::rows;
use crate::error::SqlError;
use crate::format::{Column, csv_field};
use crate::session::Session;
use crate::statement::{Command, CopyFormat, Names};

/// An error as clients are told.
pub fn pg_error(e: SqlError) -> PgWireError {
    PgWireError::UserError(Box::new(ErrorInfo::new("ERROR".to_owned(), e.code.to_owned(), e.message)))
}

/// The name by which a statement or a portal is kept.
fn key(name: Option<&str>) -> String {
    name.unwrap_or(DEFAULT_NAME).to_owned()
}

/// A prepared statement.
#[derive(Debug)]
pub struct Prepared {
    command: Command,
    /// Of a query: its plan with placeholders, whose columns are fixed from here on.
    plan: Option<LogicalPlan>,
    /// Types of its parameters, as far as the plan tells them.
    parameters: Vec<Option<DataType>>,
    result: Option<SchemaRef>,
}

impl Prepared {
    fn names(&self) -> Names {
        match &self.command {
            Command::Query { names, .. } => names.clone(),
            _ => Names::default(),
        }
    }
}

/// Most prepared statements that a connection keeps, and the bytes of their texts.
const STATEMENTS: Room = Room { what: "prepared statements", count: 1000, bytes: 4 << 20 };
/// Most portals that a connection keeps, and the bytes of their parameters.
const PORTALS: Room = Room { what: "portals", count: 100, bytes: 16 << 20 };

#[derive(Debug)]
struct Room {
    what: &'static str,
    count: usize,
    bytes: usize,
}

impl Room {
    /// Whether `name` may be kept with so many bytes beside the others.
    fn check(&self, kept: &HashMap<String, usize>, name: &str, bytes: usize) -> PgWireResult<()> {
        let others = kept.iter().filter(|(n, _)| *n != name);
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

/// What a connection keeps until it is closed by name: how many bytes, by name.
#[derive(Debug, Default)]
struct Kept {
    statements: HashMap<String, usize>,
    portals: HashMap<String, usize>,
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
        Self { session, kept: Arc::default() }
    }

    /// Prepares a statement, if there is room for it.
    pub async fn parse<C>(&self, client: &mut C, message: Parse) -> PgWireResult<()>
    where
        C: Client,
        C::PortalStore: PortalStore<Statement = Arc<Prepared>>,
    {
        let (name, bytes) = (key(message.name.as_deref()), message.query.len());
        STATEMENTS.check(&self.kept.lock().statements, &name, bytes)?;
        self.on_parse(client, message).await?;
        self.kept.lock().statements.insert(name, bytes);
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
        PORTALS.check(&self.kept.lock().portals, &name, bytes)?;
        self.on_bind(client, message).await?;
        self.kept.lock().portals.insert(name, bytes);
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
        match kind {
            TARGET_TYPE_BYTE_STATEMENT => kept.statements.remove(&name),
            _ => kept.portals.remove(&name),
        };
        Ok(())
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

    /// Forgets all portals.
    pub fn forget_portals<C>(&self, client: &C)
    where
        C: ClientPortalStore,
        C::PortalStore: PortalStore<Statement = Arc<Prepared>>,
    {
        client.portal_store().clear_portals();
        self.kept.lock().portals.clear();
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
        if commands.is_empty() {
            client.feed(PgWireBackendMessage::EmptyQueryResponse(EmptyQueryResponse::new())).await?;
        }
        for command in commands {
            let prepared = self.prepare(command).await?;
            let response = self.respond(client, &prepared, prepared.plan.clone(), &Format::UnifiedText).await?;
            match response {
                Response::Query(results) => send_query_response(client, results, true).await?,
                Response::CopyOut(results) => copy::send_copy_out_response(client, results).await?,
                other => finish(client, other).await?,
            }
        }
        client.set_state(PgWireConnectionState::ReadyForQuery);
        let status = client.transaction_status();
        send_ready_for_query(client, status).await
    }

    async fn prepare(&self, command: Command) -> PgWireResult<Prepared> {
        let (plan, result) = match &command {
            Command::Query { statement, .. } | Command::CopyOut { statement, .. } => {
                let plan = self.session.plan(statement).await.map_err(pg_error)?;
                let schema = plan.schema().inner().clone();
                (Some(plan), matches!(command, Command::Query { .. }).then_some(schema))
            }
            Command::Show(name) => (None, Some(self.session.show(name).map_err(pg_error)?.schema())),
            _ => (None, None),
        };
        let parameters = match &plan {
            Some(plan) => parameter_types(plan)?,
            None => vec![],
        };
        Ok(Prepared { command, plan, parameters, result })
    }

    /// Runs a command; `plan` is its plan with the parameters filled in.
    async fn respond<C>(
        &self,
        client: &mut C,
        prepared: &Prepared,
        plan: Option<LogicalPlan>,
        format: &Format,
    ) -> PgWireResult<Response>
    where
        C: Client,
        C::PortalStore: PortalStore<Statement = Arc<Prepared>>,
    {
        let ends = matches!(prepared.command, Command::End(_));
        if client.transaction_status() == TransactionStatus::Error && !ends {
            let message = "current transaction is aborted, commands ignored until end of transaction block";
            return Err(pg_error(SqlError::new("25P02", message)));
        }
        Ok(match &prepared.command {
            Command::Query { .. } | Command::CopyOut { .. } => {
                let plan = plan.ok_or_else(|| pg_error(SqlError::new("XX000", "a query without its plan")))?;
                let copy = match &prepared.command {
                    Command::CopyOut { format, .. } => Some(*format),
                    _ => None,
                };
                let names = prepared.names();
                let explains = matches!(plan, LogicalPlan::Explain(_) | LogicalPlan::Analyze(_));
                let batches = self.session.run(plan).await.map_err(pg_error)?;
                let zone = self.session.time_zone();
                if let Some(copy) = copy {
                    return Ok(Response::CopyOut(copy_out(batches, copy, zone)));
                }
                let schema = prepared.result.clone().unwrap_or_else(|| batches.schema());
                let fields = Arc::new(rows::fields(&schema, &names, format));
                let mut response = QueryResponse::new(fields.clone(), encode(batches, fields, zone));
                if explains {
                    response.set_command_tag("EXPLAIN");
                }
                Response::Query(response)
            }
            Command::Show(name) => {
                let batch = self.session.show(name).map_err(pg_error)?;
                let fields = Arc::new(rows::fields(&batch.schema(), &Names::default(), format));
                let encoded = encode(stream::iter([Ok(batch)]), fields.clone(), self.session.time_zone());
                let mut response = QueryResponse::new(fields, encoded);
                response.set_command_tag("SHOW");
                Response::Query(response)
            }
            Command::Set { name, value } => {
                let told = self.session.set(name, value.as_deref()).map_err(pg_error)?;
                if let Some((name, value)) = told {
                    let status = ParameterStatus::new(name.to_owned(), value);
                    client.feed(PgWireBackendMessage::ParameterStatus(status)).await?;
                }
                Response::Execution(Tag::new(if value.is_some() { "SET" } else { "RESET" }))
            }
            Command::ResetAll => {
                self.session.reset();
                for (name, value) in self.session.reported() {
                    client.feed(PgWireBackendMessage::ParameterStatus(ParameterStatus::new(name, value))).await?;
                }
                Response::Execution(Tag::new("RESET"))
            }
            Command::Deallocate(name) => {
                let kept = &mut self.kept.lock().statements;
                let names: Vec<String> =
                    name.as_ref().map_or_else(|| kept.keys().cloned().collect(), |name| vec![name.clone()]);
                for name in names {
                    client.portal_store().rm_statement(&name);
                    kept.remove(&name);
                }
                Response::Execution(Tag::new("DEALLOCATE"))
            }
            Command::Begin(tag) => Response::TransactionStart(Tag::new(tag)),
            Command::End(tag) => {
                let failed = client.transaction_status() == TransactionStatus::Error;
                Response::TransactionEnd(Tag::new(if failed { "ROLLBACK" } else { tag }))
            }
            Command::Done(tag) => Response::Execution(Tag::new(tag)),
        })
    }
}

/// Sends an answer without rows.
async fn finish<C: Client>(client: &mut C, response: Response) -> PgWireResult<()> {
    let status = client.transaction_status();
    let tag = match response {
        Response::TransactionStart(tag) => {
            client.set_transaction_status(status.to_in_transaction_state());
            tag
        }
        Response::TransactionEnd(tag) => {
            client.set_transaction_status(status.to_idle_state());
            tag
        }
        Response::Execution(tag) => tag,
        _ => return Err(pg_error(SqlError::new("XX000", "an answer that no statement has"))),
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

/// `COPY` sends a message per batch.
fn copy_out(
    batches: datafusion::execution::SendableRecordBatchStream,
    format: CopyFormat,
    zone: Arc<str>,
) -> CopyResponse {
    let schema = batches.schema();
    let separator = if format.csv { ',' } else { '\t' };
    let mut head = String::new();
    if format.header {
        for (i, field) in schema.fields().iter().enumerate() {
            if i > 0 {
                head.push(separator);
            }
            let start = head.len();
            head.push_str(field.name());
            if format.csv {
                csv_field(start, &mut head);
            }
        }
        head.push('\n');
    }
    let head = stream::iter((!head.is_empty()).then(|| Ok(CopyData::new(Bytes::from(head)))));
    let body = batches.map(move |batch| {
        let batch = batch.map_err(|e| pg_error(e.into()))?;
        let text = copy_text(&batch, format, &zone).map_err(|e| pg_error(e.into()))?;
        Ok(CopyData::new(Bytes::from(text)))
    });
    CopyResponse::new(0, schema.fields().len(), head.chain(body))
}

fn copy_text(
    batch: &arrow::record_batch::RecordBatch,
    format: CopyFormat,
    zone: &str,
) -> datafusion::error::Result<String> {
    let columns =
        batch.columns().iter().map(|c| Column::new(c, zone)).collect::<datafusion::error::Result<Vec<_>>>()?;
    let (mut out, mut cell) = (String::new(), String::new());
    for row in 0..batch.num_rows() {
        for (i, column) in columns.iter().enumerate() {
            if format.csv {
                if i > 0 {
                    out.push(',');
                }
                column.csv(row, &mut out)?;
                continue;
            }
            if i > 0 {
                out.push('\t');
            }
            if column.is_null(row) {
                out.push_str("\\N");
                continue;
            }
            cell.clear();
            column.text(row, &mut cell)?;
            for c in cell.chars() {
                match c {
                    '\\' => out.push_str("\\\\"),
                    '\t' => out.push_str("\\t"),
                    '\n' => out.push_str("\\n"),
                    '\r' => out.push_str("\\r"),
                    c => out.push(c),
                }
            }
        }
        out.push('\n');
    }
    Ok(out)
}

/// The types of `$1`, `$2`, ...
fn parameter_types(plan: &LogicalPlan) -> PgWireResult<Vec<Option<DataType>>> {
    let types = plan.get_parameter_types().map_err(|e| pg_error(e.into()))?;
    let mut all = Vec::new();
    for (name, data_type) in types {
        let number: usize = name
            .trim_start_matches('$')
            .parse()
            .ok()
            .filter(|n| (1..=65_535).contains(n))
            .ok_or_else(|| pg_error(SqlError::new("42P02", format!("there is no parameter {name}"))))?;
        if all.len() < number {
            all.resize(number, None);
        }
        all[number - 1] = data_type;
    }
    Ok(all)
}

#[async_trait]
impl QueryParser for Answers {
    type Statement = Arc<Prepared>;

    async fn parse_sql<C>(
        &self,
        _client: &C,
        sql: &str,
        _types: &[Option<Type>],
    ) -> PgWireResult<Option<Self::Statement>>
    where
        C: ClientInfo + Unpin + Send + Sync,
    {
        let mut commands = self.session.parse(sql).await.map_err(pg_error)?;
        match (commands.pop(), commands.is_empty()) {
            (None, _) => Ok(None),
            (Some(command), true) => Ok(Some(Arc::new(self.prepare(command).await?))),
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
            let plan = match &prepared.plan {
                Some(plan) => Some(bind(plan.clone(), portal, &prepared.parameters)?),
                None => None,
            };
            match self.respond(client, prepared, plan, &portal.result_column_format).await? {
                Response::Query(results) => *state = PortalExecutionState::Suspended(results),
                Response::CopyOut(results) => return copy::send_copy_out_response(client, results).await,
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
