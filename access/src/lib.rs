//! Who may do what.
//!
//! A route states its [`Scope`] when it is declared: [`Routes`] is the only way to mount one, and takes no route without
//! it. [`Access`] decides about a request: it finds the caller among the [`Credentials`] and compares the caller's
//! [`Scopes`] with the route's. Without credentials everybody may do everything, and the listeners keep to this machine.
//!
//! What always holds: a request reaches a handler only through the check of its route; what a client presents as a
//! password or a token reaches no log, no error, no metric and no answer; checking costs the server bounded time and
//! memory whatever is presented.

mod credentials;
mod decision;
mod routes;
mod scope;
mod scram;
mod throttle;

pub use credentials::{Credentials, hash_password, hash_token, new_token};
pub use decision::{Access, Caller, Denied, DeniedTotal};
pub use routes::{Declared, Peer, Routes};
pub use scope::{Scope, Scopes};
pub use scram::{Challenged, Login, MECHANISM, Scram, scram_verifier};
