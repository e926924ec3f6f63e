//! `thalweg health`: whether a running server is ready, for health checks of containers, which have no other client.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use reqwest::Method;

use crate::client::Server;
use crate::print;

/// A server that doesn't answer within this time isn't ready.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Asks a server's `/-/ready`.
///
/// # Errors
/// No server, or one that is starting or stopping.
pub fn run(server: &Server) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (status, text) = runtime.block_on(async {
        let answer = server.request(Method::GET, "/-/ready")?.timeout(TIMEOUT).send().await;
        let unreachable = || format!("cannot reach {}", server.address());
        let answer = answer.map_err(reqwest::Error::without_url).with_context(unreachable)?;
        anyhow::Ok((answer.status(), answer.text().await.unwrap_or_default()))
    })?;
    ensure!(status.is_success(), "{} answers {status}: {}", server.address(), text.trim());
    print::line(text.trim())
}
