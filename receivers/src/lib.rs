//! Turns each ingest protocol into encoded batches.
//!
//! One module per protocol, all of one shape: a pure `decode` from bytes to an [`engine::Write`] with what was refused,
//! and `routes` that mounts it over an engine. [`wire`] reads protobuf in place and [`body`] reads and inflates request
//! bodies within limits; both are shared by all.

pub mod body;
pub mod prometheus;
pub mod wire;
