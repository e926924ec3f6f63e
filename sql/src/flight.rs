//! Arrow Flight SQL on the gRPC port: record batches to clients as they are, without being written out as text and read
//! again. ADBC drivers speak it (`adbc-driver-flightsql` for Python, with which pandas and polars read).
//!
//! Nothing is kept between calls: what a ticket or a prepared statement stands for is the statement's text, which its
//! handle holds. A log-in answers with the credentials that it was sent, since each call is checked by itself.

use std::pin::Pin;
use std::sync::Arc;

use access::{Caller, Routes, Scope};
use arrow::array::RecordBatch;
use arrow::datatypes::{Schema, SchemaRef};
use arrow::ipc::writer::IpcWriteOptions;
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::error::FlightError;
use arrow_flight::flight_service_server::{FlightService, FlightServiceServer};
use arrow_flight::sql::server::FlightSqlService;
use arrow_flight::sql::{
    ActionClosePreparedStatementRequest, ActionCreatePreparedStatementRequest, ActionCreatePreparedStatementResult,
    CommandGetCatalogs, CommandGetDbSchemas, CommandGetTableTypes, CommandGetTables, CommandPreparedStatementQuery,
    CommandStatementQuery, ProstMessageExt, SqlInfo, TicketStatementQuery,
};
use arrow_flight::{
    Action, FlightDescriptor, FlightEndpoint, FlightInfo, HandshakeRequest, HandshakeResponse, IpcMessage, SchemaAsIpc,
    Ticket,
};
use axum::body::Body;
use axum::middleware::map_request;
use axum::routing::any_service;
use bytes::Bytes;
use datafusion::logical_expr::LogicalPlan;
use engine::memory::Kind;
use engine::{Engine, Memory};
use futures::{Stream, StreamExt, TryStreamExt, stream};
use prost::Message as _;
use tonic::metadata::MetadataValue;
use tonic::{Extensions, Request, Response, Status, Streaming};

use crate::error::{Result, SqlError};
use crate::limits::TEXT_BYTES_MAX;
use crate::session::{DATABASE, Frontend, Rights, Session};
use crate::statement::{Command, Names};

/// The longest message of a client: a statement, and what it is wrapped in.
const MESSAGE_BYTES_MAX: usize = TEXT_BYTES_MAX + (64 << 10);

/// The routes of the service.
///
/// # Errors
/// When the SQL side of the engine can't be built.
pub fn routes(engine: &Engine) -> Result<Routes> {
    let memory = engine.memory().clone();
    let accounted = map_request(move |request: axum::extract::Request| {
        let request = request.map(|body| accounted(&memory, body));
        std::future::ready(request)
    });
    let service = any_service(service(engine)?);
    Ok(Routes::new().route(Scope::Read, "/arrow.flight.protocol.FlightService/{method}", service).layer(accounted))
}

fn service(engine: &Engine) -> Result<FlightServiceServer<FlightSql>> {
    let service = FlightServiceServer::new(FlightSql { frontend: Frontend::new(engine)? });
    Ok(service.max_decoding_message_size(MESSAGE_BYTES_MAX))
}

/// A body for whose bytes memory is reserved: they are gathered until a message is whole, of many requests at a time.
fn accounted(memory: &Memory, body: Body) -> Body {
    let mut share = memory.reserve(Kind::Bodies);
    Body::from_stream(body.into_data_stream().map(move |data| {
        let data = data?;
        match share.grow(data.len()) {
            Ok(()) => Ok(data),
            Err(e) => Err(axum::Error::new(status(SqlError::no_memory(&e)))),
        }
    }))
}

/// The service.
#[derive(Debug, Clone)]
struct FlightSql {
    frontend: Arc<Frontend>,
}

/// The one table from our errors to gRPC's.
fn status(e: SqlError) -> Status {
    let message = format!("{} (SQLSTATE {})", e.message, e.code);
    match (e.code, &e.code[..2]) {
        ("42501", _) => Status::permission_denied(message),
        ("57014", _) if e.message.contains("timeout") => Status::deadline_exceeded(message),
        ("57014", _) => Status::cancelled(message),
        ("53200", _) | (_, "54") => Status::resource_exhausted(message),
        (_, "53" | "57" | "58") => Status::unavailable(message),
        (_, "0A") => Status::unimplemented(message),
        (_, "XX") => Status::internal(message),
        ("42P01", _) => Status::not_found(message),
        _ => Status::invalid_argument(message),
    }
}

/// A plan and the schema of its answer, with the names that PostgreSQL would give the columns.
struct Planned {
    session: Session,
    plan: LogicalPlan,
    schema: SchemaRef,
}

impl FlightSql {
    fn session(&self, extensions: &Extensions) -> Session {
        let caller = extensions.get::<Caller>();
        self.frontend.session(caller.map_or("flight", Caller::name), Rights::of(caller))
    }

    async fn plan(&self, text: &str, extensions: &Extensions) -> Result<Planned, Status> {
        let session = self.session(extensions);
        let planned = async {
            let mut commands = session.parse(text).await?;
            match (commands.pop(), commands.is_empty()) {
                (Some(Command::Query { statement, names }), true) => {
                    let plan = session.plan(&statement).await?;
                    let schema = named(plan.schema().as_arrow(), &names);
                    Ok((plan, schema))
                }
                // A client may ask for the rows of a statement as often as it likes.
                (Some(Command::CopyOut { .. }), true) => {
                    let told = "COPY is not supported over Arrow Flight; send it over the PostgreSQL protocol or HTTP";
                    Err(SqlError::new("0A000", told))
                }
                (Some(_), true) => Err(SqlError::unsupported("a statement that is no query")),
                (Some(_), false) => Err(SqlError::unsupported("more than one statement")),
                (None, _) => Err(SqlError::new("42601", "no statement was given")),
            }
        };
        let planned = tokio::time::timeout(session.timeout(), planned).await;
        let late = || SqlError::new("57014", "canceling statement due to statement timeout");
        let (plan, schema) = planned.map_err(|_| status(late()))?.map_err(status)?;
        Ok(Planned { session, plan, schema })
    }

    async fn rows(&self, text: &str, extensions: &Extensions) -> Result<Response<Batches>, Status> {
        let Planned { session, plan, schema } = self.plan(text, extensions).await?;
        let rows = session.run(plan).await.map_err(status)?;
        let of_rows = schema.clone();
        let rows = rows.map(move |batch| -> arrow_flight::error::Result<RecordBatch> {
            let batch = batch.map_err(|e| FlightError::Tonic(Box::new(status(e.into()))))?;
            // What runs may know better than what was planned whether there are nulls.
            Ok(RecordBatch::try_new(of_rows.clone(), batch.columns().to_vec())?)
        });
        Ok(batches(schema, rows))
    }

    /// The answer of one batch that was made here.
    fn given(batch: arrow_flight::error::Result<RecordBatch>) -> Result<Response<Batches>, Status> {
        let batch = batch.map_err(|e| Status::internal(e.to_string()))?;
        Ok(batches(batch.schema(), stream::iter([Ok(batch)])))
    }

    /// Schemas and tables with their types.
    async fn tables(&self, extensions: &Extensions) -> Result<Vec<[String; 3]>, Status> {
        const TABLES: &str = "SELECT table_schema, table_name, table_type FROM information_schema.tables ORDER BY 1, 2";
        let Planned { session, plan, .. } = self.plan(TABLES, extensions).await?;
        let mut rows = session.run(plan).await.map_err(status)?;
        let mut all = Vec::new();
        while let Some(batch) = rows.try_next().await.map_err(|e| status(e.into()))? {
            let text = |i: usize, row: usize| {
                let value = arrow::util::display::array_value_to_string(batch.column(i), row);
                value.map_err(|e| Status::internal(e.to_string()))
            };
            for row in 0..batch.num_rows() {
                all.push([text(0, row)?, text(1, row)?, text(2, row)?]);
            }
        }
        Ok(all)
    }
}

fn named(planned: &Schema, names: &Names) -> SchemaRef {
    let width = planned.fields().len();
    let fields = planned.fields().iter().enumerate();
    let named = fields.map(|(i, field)| {
        let name = names.name(i, width, field.name()).to_owned();
        field.as_ref().clone().with_name(name).with_nullable(true)
    });
    Arc::new(Schema::new(named.collect::<Vec<_>>()))
}

type Batches = <FlightSql as FlightService>::DoGetStream;

fn batches(
    schema: SchemaRef,
    rows: impl Stream<Item = arrow_flight::error::Result<RecordBatch>> + Send + 'static,
) -> Response<Batches> {
    let encoded = FlightDataEncoderBuilder::new().with_schema(schema).build(rows);
    Response::new(Box::pin(encoded.map_err(Status::from)))
}

/// How the rows of a command are got: by the ticket that stands for it.
fn info(
    ticket: impl ProstMessageExt,
    schema: &Schema,
    request: Request<FlightDescriptor>,
) -> Result<Response<FlightInfo>, Status> {
    let ticket = Ticket::new(ticket.as_any().encode_to_vec());
    let info = FlightInfo::new()
        .try_with_schema(schema)
        .map_err(|e| Status::internal(e.to_string()))?
        .with_endpoint(FlightEndpoint::new().with_ticket(ticket))
        .with_descriptor(request.into_inner());
    Ok(Response::new(info))
}

fn text_of(handle: &Bytes) -> Result<&str, Status> {
    std::str::from_utf8(handle).map_err(|_| Status::invalid_argument("the handle is none of ours"))
}

#[tonic::async_trait]
impl FlightSqlService for FlightSql {
    type FlightService = Self;

    async fn do_handshake(
        &self,
        request: Request<Streaming<HandshakeRequest>>,
    ) -> Result<Response<Pin<Box<dyn Stream<Item = Result<HandshakeResponse, Status>> + Send>>>, Status> {
        // The route has checked them.
        let credentials = request.metadata().get("authorization").cloned();
        let answer = HandshakeResponse { protocol_version: 0, payload: Bytes::new() };
        let answers: Pin<Box<dyn Stream<Item = _> + Send>> = Box::pin(stream::iter([Ok(answer)]));
        let mut response = Response::new(answers);
        let value = credentials.unwrap_or_else(|| MetadataValue::from_static(""));
        response.metadata_mut().insert("authorization", value);
        Ok(response)
    }

    async fn get_flight_info_statement(
        &self,
        query: CommandStatementQuery,
        request: Request<FlightDescriptor>,
    ) -> Result<Response<FlightInfo>, Status> {
        let planned = self.plan(&query.query, request.extensions()).await?;
        info(TicketStatementQuery { statement_handle: query.query.into() }, &planned.schema, request)
    }

    async fn do_get_statement(
        &self,
        ticket: TicketStatementQuery,
        request: Request<Ticket>,
    ) -> Result<Response<Batches>, Status> {
        self.rows(text_of(&ticket.statement_handle)?, request.extensions()).await
    }

    async fn do_action_create_prepared_statement(
        &self,
        query: ActionCreatePreparedStatementRequest,
        request: Request<Action>,
    ) -> Result<ActionCreatePreparedStatementResult, Status> {
        let planned = self.plan(&query.query, request.extensions()).await?;
        let message: Result<IpcMessage, _> = SchemaAsIpc::new(&planned.schema, &IpcWriteOptions::default()).try_into();
        let IpcMessage(dataset_schema) = message.map_err(|e| Status::internal(e.to_string()))?;
        let prepared_statement_handle = query.query.into();
        Ok(ActionCreatePreparedStatementResult {
            prepared_statement_handle,
            dataset_schema,
            parameter_schema: Bytes::new(),
        })
    }

    async fn do_action_close_prepared_statement(
        &self,
        _query: ActionClosePreparedStatementRequest,
        _request: Request<Action>,
    ) -> Result<(), Status> {
        Ok(())
    }

    async fn get_flight_info_prepared_statement(
        &self,
        query: CommandPreparedStatementQuery,
        request: Request<FlightDescriptor>,
    ) -> Result<Response<FlightInfo>, Status> {
        let text = text_of(&query.prepared_statement_handle)?;
        let planned = self.plan(text, request.extensions()).await?;
        info(query.clone(), &planned.schema, request)
    }

    async fn do_get_prepared_statement(
        &self,
        query: CommandPreparedStatementQuery,
        request: Request<Ticket>,
    ) -> Result<Response<Batches>, Status> {
        self.rows(text_of(&query.prepared_statement_handle)?, request.extensions()).await
    }

    async fn get_flight_info_catalogs(
        &self,
        query: CommandGetCatalogs,
        request: Request<FlightDescriptor>,
    ) -> Result<Response<FlightInfo>, Status> {
        let schema = query.into_builder().schema();
        info(query, &schema, request)
    }

    async fn do_get_catalogs(
        &self,
        query: CommandGetCatalogs,
        _request: Request<Ticket>,
    ) -> Result<Response<Batches>, Status> {
        let mut builder = query.into_builder();
        builder.append(DATABASE);
        Self::given(builder.build())
    }

    async fn get_flight_info_schemas(
        &self,
        query: CommandGetDbSchemas,
        request: Request<FlightDescriptor>,
    ) -> Result<Response<FlightInfo>, Status> {
        let schema = query.clone().into_builder().schema();
        info(query, &schema, request)
    }

    async fn do_get_schemas(
        &self,
        query: CommandGetDbSchemas,
        request: Request<Ticket>,
    ) -> Result<Response<Batches>, Status> {
        let mut builder = query.into_builder();
        let mut last = None;
        for [schema, ..] in self.tables(request.extensions()).await? {
            if last.as_ref() != Some(&schema) {
                builder.append(DATABASE, &schema);
            }
            last = Some(schema);
        }
        Self::given(builder.build())
    }

    async fn get_flight_info_tables(
        &self,
        query: CommandGetTables,
        request: Request<FlightDescriptor>,
    ) -> Result<Response<FlightInfo>, Status> {
        let schema = query.clone().into_builder().schema();
        info(query, &schema, request)
    }

    async fn do_get_tables(
        &self,
        query: CommandGetTables,
        request: Request<Ticket>,
    ) -> Result<Response<Batches>, Status> {
        let with_schema = query.include_schema;
        let mut builder = query.into_builder();
        let none = Schema::empty();
        for [schema, table, kind] in self.tables(request.extensions()).await? {
            let columns = if with_schema {
                let name = |part: &str| format!("\"{}\"", part.replace('"', "\"\""));
                let text = format!("SELECT * FROM {}.{}", name(&schema), name(&table));
                self.plan(&text, request.extensions()).await?.schema
            } else {
                Arc::new(none.clone())
            };
            let appended = builder.append(DATABASE, &schema, &table, &kind, &columns);
            appended.map_err(|e| Status::internal(e.to_string()))?;
        }
        Self::given(builder.build())
    }

    async fn get_flight_info_table_types(
        &self,
        query: CommandGetTableTypes,
        request: Request<FlightDescriptor>,
    ) -> Result<Response<FlightInfo>, Status> {
        let schema = query.into_builder().schema();
        info(query, &schema, request)
    }

    async fn do_get_table_types(
        &self,
        query: CommandGetTableTypes,
        _request: Request<Ticket>,
    ) -> Result<Response<Batches>, Status> {
        let mut builder = query.into_builder();
        builder.append("BASE TABLE");
        builder.append("VIEW");
        Self::given(builder.build())
    }

    async fn register_sql_info(&self, _id: i32, _result: &SqlInfo) {}
}

#[cfg(test)]
mod tests {
    use arrow_flight::flight_service_client::FlightServiceClient;
    use tonic::Code;

    use super::*;
    use crate::tests::Fixture;

    #[tokio::test(flavor = "multi_thread")]
    async fn statements_are_bounded() {
        let fixture = Fixture::new().await;
        let mut client = FlightServiceClient::new(service(&fixture.engine).unwrap());
        let mut ask = async |length: usize| {
            let query = CommandStatementQuery { query: " ".repeat(length) + "SELECT 1", transaction_id: None };
            let asked = client.get_flight_info(FlightDescriptor::new_cmd(query.as_any().encode_to_vec())).await;
            asked.map(drop).map_err(|e| e.code())
        };
        assert_eq!(ask(1 << 10).await, Ok(()));
        assert_eq!(ask(TEXT_BYTES_MAX).await, Err(Code::ResourceExhausted), "as everywhere");
        assert_eq!(ask(MESSAGE_BYTES_MAX).await, Err(Code::OutOfRange), "nor is it kept");
    }

    #[tokio::test]
    async fn bodies_are_accounted() {
        let memory = Memory::new(1 << 20);
        let parts = |count| stream::iter((0..count).map(|_| Ok::<_, std::io::Error>(Bytes::from(vec![0; 1 << 10]))));
        let mut few = accounted(&memory, Body::from_stream(parts(10))).into_data_stream();
        while let Some(part) = few.next().await {
            part.unwrap();
        }
        assert_eq!(memory.held(Kind::Bodies), 10 << 10);
        drop(few);
        let many = accounted(&memory, Body::from_stream(parts(200)));
        let refused = axum::body::to_bytes(many, usize::MAX).await.unwrap_err();
        let refused = Status::from_error(Box::new(refused));
        assert_eq!(refused.code(), Code::ResourceExhausted);
        assert!(refused.message().contains("53200"), "{refused}");
        assert_eq!(memory.held(Kind::Bodies), 0);
    }
}
