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
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
    while connections.join_next().await.is_some() {}
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

impl Server {
    /// Stops what the connection with this key runs, if it is the right key.
    fn cancel(&self, pid: i32, key: &SecretKey) {
        let running = self.running.lock();
        if let Some(found) = running.get(&pid).filter(|r| r.key.eq_value(key)) {
            found.cancel.cancel();
        }
    }
}
