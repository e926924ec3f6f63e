//! The PostgreSQL endpoint.
//!
//! `pgwire` reads and writes messages and keeps prepared statements and portals; the session service is ours. Each
//! connection is one task: while a message is answered it watches for a cancel request, for its deadline, for the
//! server's shutdown, and for the client going away, and drops the work at once when one of them happens
//! ([`connection`]). Rows are streamed; none are kept for later ([`answer`]). What a value looks like is [`rows`]'s.
//!
//! Where credentials are needed users prove that they know their password with SCRAM-SHA-256. A token, and a user without
//! a verifier, is sent in clear text, which is taken over TLS and from this machine only.

mod answer;
mod connection;
pub mod copy;
mod cursor;
mod frames;
pub mod functions;
pub mod opened;
mod rows;
mod sleep;
pub mod system;

pub use rows::wire_type;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use access::Access;
use engine::Engine;
use parking_lot::Mutex;
use pgwire::api::RandomPidSecretKeyGenerator;
use pgwire::messages::startup::SecretKey;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::error::Result;
use crate::session::Frontend;

/// Most connections at a time; more are told so and closed.
const CONNECTIONS_MAX: usize = 1000;
/// Most connections that are told so at a time; they may also be there to cancel what another one runs.
const REFUSALS_MAX: usize = 100;
/// How long clients may take to hear that the server stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Answers PostgreSQL clients on `listener` until `shutdown`, then ends what runs.
///
/// # Errors
/// When the SQL side of the engine can't be built.
pub async fn serve(
    listener: TcpListener,
    engine: Engine,
    access: Access,
    encryption: Option<Encryption>,
    shutdown: CancellationToken,
) -> Result<()> {
    let server = Arc::new(Server {
        frontend: Frontend::new(&engine)?,
        access,
        encryption,
        running: Mutex::default(),
        keys: RandomPidSecretKeyGenerator::default(),
        shutdown: shutdown.clone(),
    });
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let admitted = connections.len() < CONNECTIONS_MAX;
                if connections.len() < CONNECTIONS_MAX + REFUSALS_MAX {
                    connections.spawn(connection::run(server.clone(), stream, admitted));
                }
            }
            Err(error) => {
                // Out of descriptors, mostly: give connections time to end.
                tracing::warn!(%error, "accepting a PostgreSQL connection failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    let drained = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(DRAIN_TIMEOUT, drained).await;
    connections.shutdown().await;
    Ok(())
}

/// TLS for clients that ask for it.
pub struct Encryption {
    /// What agrees on keys with a client that connects now.
    pub acceptor: Box<dyn Fn() -> TlsAcceptor + Send + Sync>,
    /// Whether others are refused.
    pub required: bool,
}

impl std::fmt::Debug for Encryption {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encryption").field("required", &self.required).finish_non_exhaustive()
    }
}

/// What connections share.
struct Server {
    frontend: Arc<Frontend>,
    access: Access,
    encryption: Option<Encryption>,
    running: Mutex<HashMap<i32, Running>>,
    keys: RandomPidSecretKeyGenerator,
    shutdown: CancellationToken,
}

/// A connection that can be asked to stop what it runs.
struct Running {
    key: SecretKey,
    /// Of the message that is answered now.
    cancel: CancellationToken,
}

/// A connection among those that can be asked to stop what they run, until this is dropped.
struct Listed {
    server: Arc<Server>,
    pid: i32,
}

impl Listed {
    /// What a cancel request ends from now on.
    fn runs(&self) -> CancellationToken {
        let cancel = CancellationToken::new();
        if let Some(running) = self.server.running.lock().get_mut(&self.pid) {
            running.cancel = cancel.clone();
        }
        cancel
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.server.running.lock().remove(&self.pid);
    }
}

impl Server {
    /// Lists a connection.
    fn list(self: &Arc<Self>, pid: i32, key: SecretKey) -> Listed {
        self.running.lock().insert(pid, Running { key, cancel: CancellationToken::new() });
        Listed { server: self.clone(), pid }
    }

    /// Stops what the connection with this key runs, if it is the right key.
    fn cancel(&self, pid: i32, key: &SecretKey) {
        let running = self.running.lock();
        if let Some(found) = running.get(&pid).filter(|r| r.key.eq_value(key)) {
            found.cancel.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use engine::Settings;
    use engine::memory::Kind;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::task::JoinHandle;

    use super::*;
    use crate::tests::Fixture;

    /// A listener, and the engine behind it.
    struct Listening {
        fixture: Fixture,
        address: SocketAddr,
        shutdown: CancellationToken,
        served: JoinHandle<Result<()>>,
    }

    impl Listening {
        async fn with(settings: Settings) -> Self {
            let fixture = Fixture::with(settings).await;
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
            let (address, shutdown) = (listener.local_addr().expect("an address"), CancellationToken::new());
            let (engine, token) = (fixture.engine.clone(), shutdown.clone());
            let served = tokio::spawn(serve(listener, engine, Access::open(), None, token));
            Self { fixture, address, shutdown, served }
        }

        async fn connect(&self) -> Wire {
            Wire(TcpStream::connect(self.address).await.expect("a connection"))
        }

        async fn session(&self) -> Wire {
            let mut wire = self.connect().await;
            wire.write(&[0, 0, 0, 17]).await;
            wire.write(b"\0\x03\0\0user\0me\0\0").await;
            assert_eq!(wire.answer().await, Vec::<String>::new());
            wire
        }
    }

    /// A client, message by message.
    struct Wire(TcpStream);

    impl Wire {
        async fn write(&mut self, bytes: &[u8]) {
            self.0.write_all(bytes).await.expect("a server that reads");
        }

        async fn send(&mut self, kind: u8, body: &[u8]) {
            let length = body.len() as u32 + 4;
            self.write(&[&[kind], &length.to_be_bytes()[..], body].concat()).await;
        }

        async fn ask(&mut self, text: &str) -> Vec<String> {
            self.send(b'Q', format!("{text}\0").as_bytes()).await;
            self.answer().await
        }

        /// The SQLSTATEs of errors up to the end of an answer, or of the connection.
        async fn answer(&mut self) -> Vec<String> {
            tokio::time::timeout(PATIENCE, self.codes()).await.expect("an answer in time")
        }

        async fn codes(&mut self) -> Vec<String> {
            let mut codes = Vec::new();
            let mut head = [0; 5];
            while self.0.read_exact(&mut head).await.is_ok() && head[0] != b'Z' {
                let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
                let mut body = vec![0; length - 4];
                self.0.read_exact(&mut body).await.expect("a whole message");
                if head[0] == b'E' {
                    let fields = body.split(|b| *b == 0).filter(|f| f.first() == Some(&b'C'));
                    codes.extend(fields.map(|f| String::from_utf8_lossy(&f[1..]).into_owned()));
                }
            }
            if head[0] == b'Z' {
                self.0.read_exact(&mut [0]).await.expect("a whole message");
            }
            codes
        }
    }

    const PATIENCE: Duration = Duration::from_secs(30);

    #[tokio::test(flavor = "multi_thread")]
    async fn a_stop_waits_for_no_client() {
        let listening = Listening::with(Settings::default()).await;
        let silent = listening.connect().await;
        let mut undecided = listening.connect().await;
        undecided.write(&[0, 0, 0, 8, 4, 210, 22, 47]).await;
        // One does not read its answer, nor that its time is up.
        let mut deaf = listening.session().await;
        deaf.ask("SET statement_timeout = 300").await;
        deaf.send(b'Q', b"SELECT * FROM generate_series(1, 1000000000)\0").await;
        let mut idle = listening.session().await;
        tokio::time::sleep(Duration::from_millis(800)).await;
        listening.shutdown.cancel();
        tokio::time::timeout(Duration::from_secs(5), listening.served)
            .await
            .expect("an end")
            .expect("no panic")
            .unwrap();
        assert_eq!(idle.answer().await, ["57P01"]);
        drop((silent, undecided, deaf));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn large_messages_are_bounded_and_accounted() {
        let listening = Listening::with(Settings::default()).await;
        let memory = listening.fixture.engine.memory();
        let mut wire = listening.session().await;
        wire.write(&[b'Q', 1, 0, 0, 0]).await;
        assert_eq!(wire.answer().await, ["54000"]);
        // A statement that is a little too long costs no connection.
        let mut wire = listening.session().await;
        let long = format!("SELECT '{}'", "x".repeat(1 << 20));
        assert_eq!(wire.ask(&long).await, ["54000"]);
        assert_eq!(wire.ask(&long[..1 << 20].replace("x'", "")).await, ["42601"]);
        wire.write(&[b'Q', 0, 0x10, 0, 0]).await;
        wire.write(&[b' '; 500_000]).await;
        let held = async || {
            while memory.held(Kind::Bodies) < 1_000_000 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, held()).await.expect("half a message is accounted");
        let mut others = memory.reserve(Kind::Bodies);
        others.grow(memory.max(Kind::Bodies) - 1_100_000).expect("memory for others");
        wire.write(&[b' '; 300_000]).await;
        assert_eq!(wire.answer().await, ["53200"]);
        drop(wire);
        let given_back = async || {
            while memory.held(Kind::Bodies) > others.bytes() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, given_back()).await.expect("nothing is left of it");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_portals_and_cursors_keep_is_accounted() {
        let listening = Listening::with(Settings { query_memory_max: 1 << 20, ..Settings::default() }).await;
        let memory = listening.fixture.engine.memory();
        let mut wire = listening.session().await;
        wire.send(b'P', b"s\0SELECT $1::text\0\0\0").await;
        let value = vec![b'x'; 2 << 20];
        let bind = [&b"p\0s\0\0\0\0\x01"[..], &(value.len() as u32).to_be_bytes(), &value, b"\0\0"].concat();
        wire.send(b'B', &bind).await;
        wire.send(b'S', b"").await;
        assert_eq!(wire.answer().await, Vec::<String>::new());
        assert_eq!(memory.held(Kind::Queries), value.len());
        wire.send(b'C', b"Pp\0").await;
        wire.send(b'S', b"").await;
        assert_eq!(wire.answer().await, Vec::<String>::new());
        assert_eq!(memory.held(Kind::Queries), 0);
        // What a cursor keeps for going back counts as its query's.
        wire.ask("BEGIN").await;
        wire.ask("DECLARE c SCROLL CURSOR FOR SELECT * FROM generate_series(1, 1000000)").await;
        assert_eq!(wire.ask("FETCH 10 FROM c").await, Vec::<String>::new());
        assert_eq!(wire.ask("FETCH ALL FROM c").await, ["53200"]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_connection_is_listed_while_it_lasts() {
        let fixture = Fixture::new().await;
        let server = Arc::new(Server {
            frontend: Frontend::new(&fixture.engine).unwrap(),
            access: Access::open(),
            encryption: None,
            running: Mutex::default(),
            keys: RandomPidSecretKeyGenerator::default(),
            shutdown: CancellationToken::new(),
        });
        let listed = server.list(7, SecretKey::I32(1));
        let runs = listed.runs();
        server.cancel(7, &SecretKey::I32(2));
        assert!(!runs.is_cancelled());
        server.cancel(7, &SecretKey::I32(1));
        assert!(runs.is_cancelled());
        // However it ends.
        let ended = tokio::spawn(async move {
            let _listed = listed;
            panic!("a bug");
        });
        assert!(ended.await.is_err());
        assert!(server.running.lock().is_empty());
    }
}
