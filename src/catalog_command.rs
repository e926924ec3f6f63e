//! `thalweg catalog`: work on the SQL catalog while no server runs.

use std::sync::Arc;

use anyhow::{Context, Result};
use catalog::FileCatalog;
use clap::Subcommand;
use engine::Telemetry;

use crate::serve::{claim, parts};
use crate::{Sources, print};

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum CatalogCommand {
    /// Make the SQL catalog anew from the object store.
    Rebuild(Sources),
}

/// Does it.
///
/// # Errors
/// When a server uses the data folder, and when the object store or the SQL catalog can't be reached.
pub fn run(command: &CatalogCommand) -> Result<()> {
    let CatalogCommand::Rebuild(sources) = command;
    let config = sources.load()?;
    let _lock = claim(&config.data_dir)?;
    let (settings, components) = parts(&config, Arc::new(Telemetry::default()))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let index = |seed| engine::sql_catalog(&settings, seed);
    let rebuilt = FileCatalog::rebuild(components.store, &settings.database, components.clock.now_ms(), index);
    let state = runtime.block_on(rebuilt).context("cannot make the SQL catalog anew")?;
    print::line(format_args!("{} data files, {} tag parts", state.files.len(), state.parts.len()))
}
