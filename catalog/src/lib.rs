//! What tables, files and tags mean.
//!
//! The catalog owns the schemas of all tables ([`tables`]), the translation between tag sets and the integers that
//! stand for them ([`tag`], [`encoder`], [`registry`]), and the file catalog ([`files`]) with its [`journal`]. It knows no
//! query language, no ingest protocol and no DataFusion.

pub mod clock;
pub mod database;
pub mod encoder;
pub mod entropy;
pub mod error;
pub mod files;
pub mod fs;
pub mod journal;
pub mod matcher;
pub mod object;
pub mod postings;
pub mod registry;
pub mod secret;
mod slots;
pub mod tables;
pub mod tag;
pub mod tag_parts;
mod tag_values;
mod wires;

pub use clock::{Clock, ManualClock, SystemClock};
pub use encoder::{Encoded, Encoder, TagRef};
pub use entropy::{Entropy, SeededEntropy, SystemEntropy};
pub use error::{Error, ErrorKind, Result};
pub use files::{ColumnStats, Commit, DataFile, Delete, FileCatalog, TagPart, View};
pub use fs::FileSystem;
pub use matcher::{MatchOp, Matcher};
pub use postings::Narrow;
pub use registry::{Ordinal, Registry, Series};
pub use secret::Secret;
pub use tables::{ColumnSchema, Part, PhysicalColumn, TableSchema};
pub use tag::{Code, TagHasher, TagId, TagSet, TagSetBuilder};
pub use tag_parts::{MetricFilter, PartHeader, TagParts};
pub use tag_values::TagValues;
