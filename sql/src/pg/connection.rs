//! One connection: its socket, its start, and what may end the answer to a message.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use access::{Caller, Denied, Login, MECHANISM, Peer, Scope};
use bytes::BytesMut;
use futures::{SinkExt, StreamExt};
use pgwire::api::auth::{protocol_negotiation, save_startup_parameters_to_metadata};
use pgwire::api::query::ExtendedQueryHandler;
use pgwire::api::{ClientInfo, DefaultClient, METADATA_USER, PgWireConnectionState, PidSecretKeyGenerator};
use pgwire::error::{ErrorInfo, PgWireError, PgWireResult};
use pgwire::messages::response::{ReadyForQuery, TransactionStatus};
use pgwire::messages::startup::{Authentication, BackendKeyData, ParameterStatus, PasswordMessageFamily, Startup};
use pgwire::messages::{PgWireBackendMessage, PgWireFrontendMessage};
use pgwire::tokio::server::{PgWireMessageServerCodec, process_error};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use tokio_util::codec::Framed;

use super::answer::{Answers, Prepared, pg_error};
use super::frames::{Checked, READ_BYTES};
use super::{Listed, Server};
use crate::error::SqlError;
use crate::session::Rights;

/// A client must have said who it is by then.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a client may take to read that something failed.
const TELL_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a client with unread messages is looked at for having gone away.
const GONE_INTERVAL: Duration = Duration::from_millis(200);

/// `SSLRequest` and `GSSENCRequest`: a length and a code in the place of a protocol version.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
const GSS_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 48];

/// What a TLS handshake begins with.
const TLS_HANDSHAKE: u8 = 0x16;

type Connection = Framed<Checked<Stream>, PgWireMessageServerCodec<Arc<Prepared>>>;

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

/// What messages travel over.
enum Stream {
    Plain(Socket),
    Encrypted(Box<TlsStream<Socket>>),
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Encrypted(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Encrypted(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Encrypted(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Encrypted(stream) => Pin::new(stream).poll_shutdown(cx),
        }
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

async fn serve(server: &Arc<Server>, stream: TcpStream, admitted: bool) -> io::Result<()> {
    let begun = tokio::select! {
        begun = tokio::time::timeout(STARTUP_TIMEOUT, begin(server, stream, admitted)) => begun,
        () = server.shutdown.cancelled() => return Ok(()),
    };
    match begun {
        Ok(begun) => match begun? {
            Some(begun) => answer_all(server, begun).await,
            None => Ok(()),
        },
        // A client that says nothing is told nothing.
        Err(_) => Ok(()),
    }
}

/// A session whose client has said who it is.
struct Begun {
    connection: Connection,
    stream: Arc<TcpStream>,
    answers: Answers,
    listed: Listed,
}

/// Begins a session, unless the client wanted something else or was refused.
async fn begin(server: &Arc<Server>, mut stream: TcpStream, admitted: bool) -> io::Result<Option<Begun>> {
    stream.set_nodelay(true)?;
    let address = stream.peer_addr()?;
    let offered = server.encryption.as_ref();
    let encrypts = negotiate(&mut stream, offered.is_some()).await;
    let stream = Arc::new(stream);
    let transport = match offered.filter(|_| matches!(encrypts, Ok(true))) {
        None => Stream::Plain(Socket(stream.clone())),
        Some(encryption) => {
            let agreed = (encryption.acceptor)().accept(Socket(stream.clone())).await?;
            Stream::Encrypted(Box::new(agreed))
        }
    };
    let encrypted = matches!(transport, Stream::Encrypted(_));
    let codec = PgWireMessageServerCodec::new(DefaultClient::new(address, encrypted));
    let mut connection: Connection = Framed::new(Checked::new(transport), codec);
    connection.set_state(PgWireConnectionState::AwaitingStartup);
    let Some(first) = connection.next().await else { return Ok(None) };
    let refused = match first.map_err(io::Error::from)? {
        PgWireFrontendMessage::CancelRequest(cancel) => {
            server.cancel(cancel.pid, &cancel.secret_key);
            return Ok(None);
        }
        PgWireFrontendMessage::Startup(_) if !encrypted && offered.is_some_and(|e| e.required) => {
            let message = "this server only takes connections with TLS; use sslmode=require or better";
            pg_error(SqlError::new("28000", message))
        }
        PgWireFrontendMessage::Startup(startup) if admitted => match start(server, &mut connection, &startup).await {
            Ok((answers, listed)) => return Ok(Some(Begun { connection, stream, answers, listed })),
            Err(e) => e,
        },
        PgWireFrontendMessage::Startup(_) => pg_error(SqlError::new("53300", "sorry, too many clients already")),
        _ => PgWireError::InvalidStartupMessage,
    };
    fatal(&mut connection, refused).await?;
    Ok(None)
}

/// Answers requests for TLS and GSSAPI, upon which clients go on without or go away; whether TLS was agreed on.
async fn negotiate(stream: &mut TcpStream, offered: bool) -> io::Result<bool> {
    let mut head = [0u8; 8];
    loop {
        let closed = stream.ready(Interest::READABLE).await?.is_read_closed();
        let seen = stream.peek(&mut head).await?;
        // A client of PostgreSQL 17 may go without the question.
        if offered && seen > 0 && head[0] == TLS_HANDSHAKE {
            return Ok(true);
        }
        if seen < head.len() {
            if closed || seen == 0 || !SSL_REQUEST.starts_with(&head[..seen]) {
                return Ok(false);
            }
            // The rest of a request that came in pieces.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        }
        if head != SSL_REQUEST && head != GSS_REQUEST {
            return Ok(false);
        }
        stream.read_exact(&mut head).await?;
        let agreed = offered && head == SSL_REQUEST;
        stream.write_all(if agreed { b"S" } else { b"N" }).await?;
        if agreed {
            return Ok(true);
        }
    }
}

/// Tells the client why its connection ends. One that does not read must not hold up the end.
async fn fatal(connection: &mut Connection, error: PgWireError) -> io::Result<()> {
    let mut info: ErrorInfo = error.into();
    info.severity = "FATAL".to_owned();
    info.severity_nonlocalized = Some("FATAL".to_owned());
    let told = connection.send(PgWireBackendMessage::ErrorResponse(info.into()));
    tokio::time::timeout(TELL_TIMEOUT, told).await.unwrap_or(Ok(()))
}

/// What is wrong with a message that was not handed on whole, in the words of who looked at it.
fn of_message(error: PgWireError) -> PgWireError {
    match error {
        PgWireError::IoError(e) => e.downcast::<SqlError>().map_or_else(PgWireError::from, pg_error),
        other => other,
    }
}

/// Greets a client.
async fn start(
    server: &Arc<Server>,
    connection: &mut Connection,
    startup: &Startup,
) -> PgWireResult<(Answers, Listed)> {
    protocol_negotiation(connection, startup).await?;
    save_startup_parameters_to_metadata(connection, startup);
    let user = connection.metadata().get(METADATA_USER).cloned().ok_or(PgWireError::UserNameRequired)?;
    let caller = log_in(server, connection, &user).await?;
    connection.get_mut().trust(server.frontend.engine().memory());
    let session = server.frontend.session(&user, Rights::of(caller.as_ref()));
    for (name, value) in
        startup.parameters.get("options").map(|o| options(o)).transpose().map_err(pg_error)?.unwrap_or_default()
    {
        session.set(&name, Some(&value)).map_err(pg_error)?;
    }
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
    let listed = server.list(pid, key.clone());
    connection.feed(PgWireBackendMessage::BackendKeyData(BackendKeyData::new(pid, key))).await?;
    let ready = ReadyForQuery::new(TransactionStatus::Idle);
    connection.send(PgWireBackendMessage::ReadyForQuery(ready)).await?;
    connection.set_state(PgWireConnectionState::ReadyForQuery);
    Ok((Answers::new(Arc::new(session)), listed))
}

/// Settings in the form of a command line, as clients give them: `-c name=value` or `--name=value`.
fn options(text: &str) -> Result<Vec<(String, String)>, SqlError> {
    let mut words = vec![String::new()];
    let mut characters = text.chars();
    while let Some(c) = characters.next() {
        match c {
            // A blank within a value.
            '\\' => words.last_mut().into_iter().for_each(|w| w.extend(characters.next())),
            c if c.is_ascii_whitespace() => words.push(String::new()),
            c => words.last_mut().into_iter().for_each(|w| w.push(c)),
        }
    }
    words.retain(|w| !w.is_empty());
    let mut settings = Vec::new();
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let setting = match word.strip_prefix("-c").or_else(|| word.strip_prefix("--")) {
            Some("") => words.next(),
            Some(setting) => Some(setting.to_owned()),
            None => None,
        };
        let setting = setting.as_deref().and_then(|s| s.split_once('='));
        let wrong = || SqlError::new("42601", format!("options: {word:?} is not of the form -c name=value"));
        let (name, value) = setting.ok_or_else(wrong)?;
        settings.push((name.replace('-', "_"), value.to_owned()));
    }
    Ok(settings)
}

/// Asks for credentials where they are needed; whose they are. Nearly all that SQL does is read, and that is all that a
/// client may who did not say who it is.
async fn log_in(server: &Server, connection: &mut Connection, user: &str) -> PgWireResult<Option<Caller>> {
    if !server.access.asks() {
        return Ok(None);
    }
    connection.set_state(PgWireConnectionState::AuthenticationInProgress);
    let address = connection.socket_addr().ip();
    let denied = |denied: Denied| {
        server.access.count(denied, Some(Peer(address)), "PostgreSQL");
        pg_error(match denied {
            Denied::Missing | Denied::Wrong => {
                SqlError::new("28P01", format!("password authentication failed for user {user:?}"))
            }
            Denied::Scope(_) | Denied::Origin => SqlError::new("42501", denied.to_string()),
            Denied::Throttled(_) | Denied::Busy => SqlError::new("53300", denied.to_string()),
        })
    };
    match server.access.begin_login(user, address).map_err(denied)? {
        Login::Scram(scram) => {
            let mechanisms = Authentication::SASL(vec![MECHANISM.to_owned()]);
            let first = ask(connection, mechanisms).await?;
            let first = first_of_scram(&first).ok_or_else(|| pg_error(malformed()))?;
            let (challenged, challenge) = scram.challenge(first).map_err(denied)?;
            let last = ask(connection, Authentication::SASLContinue(challenge.into())).await?;
            let last = std::str::from_utf8(&last).map_err(|_| pg_error(malformed()))?;
            let (caller, end) = challenged.finish(Scope::Read, last).map_err(denied)?;
            connection.feed(PgWireBackendMessage::Authentication(Authentication::SASLFinal(end.into()))).await?;
            Ok(Some(caller))
        }
        Login::Password if !connection.is_secure() && !address.to_canonical().is_loopback() => {
            let message = format!(
                "user {user:?} would send its password in clear text: connect with TLS, or give its entry a verifier"
            );
            Err(pg_error(SqlError::new("28000", message)))
        }
        Login::Password => {
            let password = ask(connection, Authentication::CleartextPassword).await?;
            let password = password.strip_suffix(b"\0").and_then(|p| std::str::from_utf8(p).ok());
            let password = password.ok_or_else(|| pg_error(SqlError::new("08P01", "malformed password")))?;
            server.access.log_in(Scope::Read, user, password, address).await.map(Some).map_err(denied)
        }
    }
}

/// Asks for the next message of a login. What it holds is looked at here: `pgwire` panics on lengths that lie.
async fn ask(connection: &mut Connection, question: Authentication) -> PgWireResult<BytesMut> {
    connection.send(PgWireBackendMessage::Authentication(question)).await?;
    match connection.next().await {
        Some(Ok(PgWireFrontendMessage::PasswordMessageFamily(PasswordMessageFamily::Raw(body)))) => Ok(body),
        Some(Err(e)) => Err(of_message(e)),
        _ => Err(pg_error(SqlError::new("28000", "no password was sent"))),
    }
}

/// What the first message of SCRAM says: the name of the mechanism, a length, and as many bytes.
fn first_of_scram(body: &[u8]) -> Option<&str> {
    let rest = body.strip_prefix(MECHANISM.as_bytes())?.strip_prefix(b"\0")?;
    let (length, message) = rest.split_first_chunk()?;
    let length = usize::try_from(i32::from_be_bytes(*length)).ok()?;
    std::str::from_utf8(message).ok().filter(|m| m.len() == length)
}

fn malformed() -> SqlError {
    SqlError::new("08P01", format!("malformed message of SASL; {MECHANISM} is offered"))
}

/// How the answer to a message ended.
enum Ended {
    Answered(PgWireResult<()>),
    ClientGone,
    Shutdown,
}

async fn answer_all(server: &Server, begun: Begun) -> io::Result<()> {
    let Begun { mut connection, stream, answers, listed } = begun;
    let (connection, answers) = (&mut connection, &answers);
    // Whether the client has the answers to all that it has sent.
    let mut idle = true;
    loop {
        if connection.get_mut().answered() {
            // Empty, since messages come one at a time, and as large as the last one.
            *connection.read_buffer_mut() = BytesMut::with_capacity(READ_BYTES);
        }
        let in_transaction = connection.transaction_status() != TransactionStatus::Idle;
        let patience = answers.session().idle_timeout(in_transaction).filter(|_| idle);
        let message = tokio::select! {
            message = connection.next() => message,
            () = server.shutdown.cancelled() => return shut_down(connection).await,
            () = tokio::time::sleep(patience.unwrap_or_default()), if patience.is_some() => {
                let error = if in_transaction {
                    SqlError::new("25P03", "terminating connection due to idle-in-transaction timeout")
                } else {
                    SqlError::new("57P05", "terminating connection due to idle-session timeout")
                };
                return fatal(connection, pg_error(error)).await;
            }
        };
        let message = match message {
            None | Some(Ok(PgWireFrontendMessage::Terminate(_))) => return Ok(()),
            Some(Err(e)) => return fatal(connection, of_message(e)).await,
            Some(Ok(message)) => message,
        };
        let cancel = listed.runs();
        let extended = message.is_extended_query();
        idle = !extended || matches!(message, PgWireFrontendMessage::Sync(_));
        let deadline = answers.session().timeout();
        let ended = tokio::select! {
            answered = answer(connection, answers, message) => Ended::Answered(answered),
            () = cancel.cancelled() => Ended::Answered(Err(PgWireError::QueryCanceled)),
            () = tokio::time::sleep(deadline) => {
                let e = SqlError::new("57014", "canceling statement due to statement timeout");
                Ended::Answered(Err(pg_error(e)))
            }
            () = gone(&stream) => Ended::ClientGone,
            () = server.shutdown.cancelled() => Ended::Shutdown,
        };
        match ended {
            Ended::Answered(Ok(())) => {}
            Ended::Answered(Err(error)) => {
                answers.fail(connection);
                match tokio::time::timeout(TELL_TIMEOUT, process_error(connection, error, extended)).await {
                    Ok(told) => told?,
                    // It does not read, and half of a message can't be taken back.
                    Err(_) => return Ok(()),
                }
            }
            Ended::ClientGone => return Ok(()),
            Ended::Shutdown => return shut_down(connection).await,
        }
    }
}

async fn shut_down(connection: &mut Connection) -> io::Result<()> {
    let error = SqlError::new("57P01", "terminating connection due to administrator command");
    fatal(connection, pg_error(error)).await
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
        PgWireFrontendMessage::Describe(describe) => answers.describe(connection, describe).await,
        PgWireFrontendMessage::Flush(flush) => answers.on_flush(connection, flush).await,
        PgWireFrontendMessage::Sync(sync) => answers.sync(connection, sync).await,
        PgWireFrontendMessage::Close(close) => answers.close(connection, close).await,
        _ => Err(pg_error(SqlError::new("08P01", "unexpected message"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_a_start() {
        let check = |text: &str, expected: &[(&str, &str)]| {
            let expected: Vec<_> = expected.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
            assert_eq!(options(text).ok(), Some(expected), "{text}");
        };
        check("", &[]);
        check("-c statement_timeout=5s", &[("statement_timeout", "5s")]);
        check(" -cjit=off  --lock-timeout=1 ", &[("jit", "off"), ("lock_timeout", "1")]);
        check("-c search_path=a,\\ b", &[("search_path", "a, b")]);
        for wrong in ["-c", "-c jit", "jit=off", "-d x"] {
            assert_eq!(options(wrong).map_err(|e| e.code), Err("42601"), "{wrong}");
        }
    }

    #[test]
    fn first_messages_of_scram() {
        let check = |body: &[u8], expected: Option<&str>| assert_eq!(first_of_scram(body), expected);
        check(b"SCRAM-SHA-256\0\0\0\0\x02n,", Some("n,"));
        check(b"SCRAM-SHA-256\0\0\0\0\x03n,", None);
        check(b"SCRAM-SHA-256\0\xff\xff\xff\xff", None);
        check(b"SCRAM-SHA-256\0\0", None);
        check(b"SCRAM-SHA-256-PLUS\0\0\0\0\x02n,", None);
        check(b"", None);
    }
}
