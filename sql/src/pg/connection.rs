//! One connection: its socket, its start, and what may end the answer to a message.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use access::{Denied, Peer, Scope};
use futures::{SinkExt, StreamExt};
use pgwire::api::auth::{protocol_negotiation, save_startup_parameters_to_metadata};
use pgwire::api::query::ExtendedQueryHandler;
use pgwire::api::{ClientInfo, DefaultClient, METADATA_USER, PgWireConnectionState, PidSecretKeyGenerator};
use pgwire::error::{ErrorInfo, PgWireError, PgWireResult};
use pgwire::messages::response::{ReadyForQuery, TransactionStatus};
use pgwire::messages::startup::{Authentication, BackendKeyData, ParameterStatus, Startup};
use pgwire::messages::{PgWireBackendMessage, PgWireFrontendMessage};
use pgwire::tokio::server::{PgWireMessageServerCodec, process_error};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::codec::Framed;
use tokio_util::sync::CancellationToken;

use super::answer::{Answers, Prepared, pg_error};
use super::frames::Checked;
use super::{Running, Server};
use crate::error::SqlError;

/// A client must have said who it is by then.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a client with unread messages is looked at for having gone away.
const GONE_INTERVAL: Duration = Duration::from_millis(200);

/// `SSLRequest` and `GSSENCRequest`: a length and a code in the place of a protocol version.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
const GSS_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 48];

type Connection = Framed<Checked<Socket>, PgWireMessageServerCodec<Arc<Prepared>>>;

/// A socket that can be watched while it is read and written.
struct Socket(Arc<TcpStream>);

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            match self.0.try_read(buf.initialize_unfilled()) {
                Ok(n) => {
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Poll::Ready(Err(e)),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(cx))?;
            match self.0.try_write(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                done => return Poll::Ready(done),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Closed when dropped.
        Poll::Ready(Ok(()))
    }
}

/// Ends when the client has closed its side. A client that sends more messages before it has its answer is looked at
/// from time to time, since those would keep the socket readable.
async fn gone(stream: &TcpStream) {
    loop {
        match stream.ready(Interest::READABLE).await {
            Ok(ready) if !ready.is_read_closed() => {}
            _ => return,
        }
        tokio::time::sleep(GONE_INTERVAL).await;
    }
}

/// Serves a connection to its end.
pub async fn run(server: Arc<Server>, stream: TcpStream, admitted: bool) {
    // A client that vanishes is no news, and everything else was told to the client.
    if let Err(error) = serve(&server, stream, admitted).await {
        tracing::debug!(%error, "PostgreSQL connection ended");
    }
}

async fn serve(server: &Server, mut stream: TcpStream, admitted: bool) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let address = stream.peer_addr()?;
    if tokio::time::timeout(STARTUP_TIMEOUT, refuse_encryption(&mut stream)).await.is_err() {
        return Ok(());
    }
    let stream = Arc::new(stream);
    let codec = PgWireMessageServerCodec::new(DefaultClient::new(address, false));
    let mut connection: Connection = Framed::new(Checked::new(Socket(stream.clone())), codec);
    connection.set_state(PgWireConnectionState::AwaitingStartup);
    let first = match tokio::time::timeout(STARTUP_TIMEOUT, connection.next()).await {
        Ok(Some(first)) => first.map_err(io::Error::from)?,
        _ => return Ok(()),
    };
    match first {
        PgWireFrontendMessage::CancelRequest(cancel) => {
            server.cancel(cancel.pid, &cancel.secret_key);
            Ok(())
        }
        PgWireFrontendMessage::Startup(startup) if admitted => {
            let answers = match start(server, &mut connection, &startup).await {
                Ok(answers) => answers,
                Err(e) => return fatal(&mut connection, e).await,
            };
            let (pid, _) = connection.pid_and_secret_key();
            let served = answer_all(server, &mut connection, &stream, &answers, pid).await;
            server.running.lock().remove(&pid);
            served
        }
        PgWireFrontendMessage::Startup(_) => {
            fatal(&mut connection, pg_error(SqlError::new("53300", "sorry, too many clients already"))).await
        }
        _ => fatal(&mut connection, PgWireError::InvalidStartupMessage).await,
    }
}

/// Answers requests for TLS and GSSAPI with no, upon which clients go on without or go away.
async fn refuse_encryption(stream: &mut TcpStream) -> io::Result<()> {
    let mut head = [0u8; 8];
    loop {
        let closed = stream.ready(Interest::READABLE).await?.is_read_closed();
        let seen = stream.peek(&mut head).await?;
        if seen < head.len() {
            if closed || seen == 0 || !SSL_REQUEST.starts_with(&head[..seen]) {
                return Ok(());
            }
            // The rest of a request that came in pieces.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        }
        if head != SSL_REQUEST && head != GSS_REQUEST {
            return Ok(());
        }
        stream.read_exact(&mut head).await?;
        stream.write_all(b"N").await?;
    }
}

async fn fatal(connection: &mut Connection, error: PgWireError) -> io::Result<()> {
    let mut info: ErrorInfo = error.into();
    info.severity = "FATAL".to_owned();
    connection.send(PgWireBackendMessage::ErrorResponse(info.into())).await
}

/// Greets a client.
async fn start(server: &Server, connection: &mut Connection, startup: &Startup) -> PgWireResult<Answers> {
    protocol_negotiation(connection, startup).await?;
    save_startup_parameters_to_metadata(connection, startup);
    let user = connection.metadata().get(METADATA_USER).cloned().ok_or(PgWireError::UserNameRequired)?;
    log_in(server, connection, &user).await?;
    connection.get_mut().trust();
    let session = server.frontend.session(&user);
    for (name, value) in &startup.parameters {
        let of_protocol = ["user", "database", "replication", "options"].contains(&name.as_str());
        if !of_protocol && !name.starts_with("_pq_.") {
            session.set(name, Some(value)).map_err(pg_error)?;
        }
    }
    connection.feed(PgWireBackendMessage::Authentication(Authentication::Ok)).await?;
    for (name, value) in session.reported() {
        connection.feed(PgWireBackendMessage::ParameterStatus(ParameterStatus::new(name, value))).await?;
    }
    let (pid, key) = server.keys.generate(connection);
    connection.set_pid_and_secret_key(pid, key.clone());
    server.running.lock().insert(pid, Running { key: key.clone(), cancel: CancellationToken::new() });
    connection.feed(PgWireBackendMessage::BackendKeyData(BackendKeyData::new(pid, key))).await?;
    let ready = ReadyForQuery::new(TransactionStatus::Idle);
    connection.send(PgWireBackendMessage::ReadyForQuery(ready)).await?;
    connection.set_state(PgWireConnectionState::ReadyForQuery);
    Ok(Answers::new(Arc::new(session)))
}

/// Asks for a password where credentials are needed. All that SQL does is read.
async fn log_in(server: &Server, connection: &mut Connection, user: &str) -> PgWireResult<()> {
    if !server.access.asks() {
        return Ok(());
    }
    connection.set_state(PgWireConnectionState::AuthenticationInProgress);
    connection.send(PgWireBackendMessage::Authentication(Authentication::CleartextPassword)).await?;
    let password = match tokio::time::timeout(STARTUP_TIMEOUT, connection.next()).await {
        Ok(Some(Ok(PgWireFrontendMessage::PasswordMessageFamily(message)))) => message.into_password()?.password,
        Ok(Some(Err(e))) => return Err(e),
        _ => return Err(pg_error(SqlError::new("28000", "no password was sent"))),
    };
    let address = connection.socket_addr().ip();
    server.access.log_in(Scope::Read, user, &password, address).await.map(drop).map_err(|denied| {
        server.access.count(denied, Some(Peer(address)), "PostgreSQL");
        pg_error(match denied {
            Denied::Missing | Denied::Wrong => {
                SqlError::new("28P01", format!("password authentication failed for user {user:?}"))
            }
            Denied::Scope(_) | Denied::Origin => SqlError::new("42501", denied.to_string()),
            Denied::Throttled(_) | Denied::Busy => SqlError::new("53300", denied.to_string()),
        })
    })
}

/// How the answer to a message ended.
enum Ended {
    Answered(PgWireResult<()>),
    ClientGone,
    Shutdown,
}

async fn answer_all(
    server: &Server,
    connection: &mut Connection,
    stream: &TcpStream,
    answers: &Answers,
    pid: i32,
) -> io::Result<()> {
    loop {
        let message = tokio::select! {
            message = connection.next() => message,
            () = server.shutdown.cancelled() => return shut_down(connection).await,
        };
        let message = match message {
            None | Some(Ok(PgWireFrontendMessage::Terminate(_))) => return Ok(()),
            Some(Err(PgWireError::IoError(e))) if e.kind() == io::ErrorKind::InvalidData => {
                return fatal(connection, pg_error(SqlError::new("08P01", e.to_string()))).await;
            }
            Some(Err(e)) => return fatal(connection, e).await,
            Some(Ok(message)) => message,
        };
        let cancel = CancellationToken::new();
        if let Some(running) = server.running.lock().get_mut(&pid) {
            running.cancel = cancel.clone();
        }
        let extended = message.is_extended_query();
        let deadline = answers.session().timeout();
        let ended = tokio::select! {
            answered = answer(connection, answers, message) => Ended::Answered(answered),
            () = cancel.cancelled() => Ended::Answered(Err(PgWireError::QueryCanceled)),
            () = tokio::time::sleep(deadline) => {
                let e = SqlError::new("57014", "canceling statement due to statement timeout");
                Ended::Answered(Err(pg_error(e)))
            }
            () = gone(stream) => Ended::ClientGone,
            () = server.shutdown.cancelled() => Ended::Shutdown,
        };
        match ended {
            Ended::Answered(Ok(())) => {}
            Ended::Answered(Err(error)) => {
                // A portal that failed holds on to what it ran.
                answers.forget_portals(connection);
                process_error(connection, error, extended).await?;
            }
            Ended::ClientGone => return Ok(()),
            Ended::Shutdown => return shut_down(connection).await,
        }
    }
}

async fn shut_down(connection: &mut Connection) -> io::Result<()> {
    let error = SqlError::new("57P01", "terminating connection due to administrator command");
    // A client that does not read must not hold up the server's end.
    let _ = tokio::time::timeout(Duration::from_millis(200), fatal(connection, pg_error(error))).await;
    Ok(())
}

async fn answer(connection: &mut Connection, answers: &Answers, message: PgWireFrontendMessage) -> PgWireResult<()> {
    if matches!(connection.state(), PgWireConnectionState::AwaitingSync) {
        // After an error everything up to the next Sync is ignored.
        if let PgWireFrontendMessage::Sync(sync) = message {
            connection.set_state(PgWireConnectionState::ReadyForQuery);
            answers.sync(connection, sync).await?;
        }
        return Ok(());
    }
    match message {
        PgWireFrontendMessage::Query(query) => answers.simple(connection, &query.query).await,
        PgWireFrontendMessage::Parse(parse) => answers.parse(connection, parse).await,
        PgWireFrontendMessage::Bind(bind) => answers.bind(connection, bind).await,
        PgWireFrontendMessage::Execute(execute) => answers.execute(connection, execute).await,
        PgWireFrontendMessage::Describe(describe) => answers.on_describe(connection, describe).await,
        PgWireFrontendMessage::Flush(flush) => answers.on_flush(connection, flush).await,
        PgWireFrontendMessage::Sync(sync) => answers.sync(connection, sync).await,
        PgWireFrontendMessage::Close(close) => answers.close(connection, close).await,
        _ => Err(pg_error(SqlError::new("08P01", "unexpected message"))),
    }
}
