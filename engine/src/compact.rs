//! Merges files.

use std::sync::Arc;

use catalog::Result;

use crate::engine::Inner;

/// Compacts what is due and deletes superseded objects whose grace has passed.
pub(crate) async fn due(inner: &Arc<Inner>) -> Result<()> {
    let _ = inner;
    Ok(())
}

/// Compacts until nothing is left to do.
pub(crate) async fn all(inner: &Arc<Inner>) -> Result<()> {
    let _ = inner;
    Ok(())
}
