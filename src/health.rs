//! `thalweg health`: whether a running server is ready, for health checks of containers, which have no other client.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

/// A server that doesn't answer within this time isn't ready.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Asks a server's `/-/ready`.
///
/// # Errors
/// No server, or one that is starting or stopping.
pub fn run(server: &str) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (status, text) = runtime.block_on(async {
        let client = reqwest::Client::builder().timeout(TIMEOUT).build()?;
        let answer = client.get(format!("{}/-/ready", server.trim_end_matches('/'))).send().await;
        let answer = answer.map_err(reqwest::Error::without_url).with_context(|| format!("cannot reach {server}"))?;
        anyhow::Ok((answer.status(), answer.text().await.unwrap_or_default()))
    })?;
    ensure!(status.is_success(), "{server} answers {status}: {}", text.trim());
    println!("{}", text.trim());
    Ok(())
}
