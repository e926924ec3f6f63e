//! Sends requests to a server's `/api/v1/write`: several at a time, again and again while the server has no room, and with
//! an account of up to where everything is stored.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use catalog::Secret;
use indicatif::ProgressBar;
use reqwest::{Client, StatusCode, Url, header};
use tokio::sync::mpsc::Receiver;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::batch::{Batch, Position};
use super::state::State;
use crate::client::Server;

/// Requests under way at a time.
const CONCURRENT: usize = 4;
/// A server that refuses this long is given up; the next run goes on.
const GIVE_UP_AFTER: Duration = Duration::from_secs(600);
/// A server that refuses this long is named, so that an import that waits doesn't look like one that hangs.
const SAY_AFTER: Duration = Duration::from_secs(5);
/// The first pause after a failure without Retry-After; it doubles.
const PAUSE_MIN: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// How often the state file is written.
const SAVE_EVERY: Duration = Duration::from_secs(1);
/// Refusals whose text is kept.
const REFUSALS_KEPT: usize = 5;

/// Where rows go.
#[derive(Debug, Clone)]
pub struct Target {
    client: Client,
    url: Url,
    token: Option<Secret>,
    progress: ProgressBar,
    /// It was said that the server stores nothing, and it has stored nothing since.
    waiting: Arc<AtomicBool>,
}

/// What was sent.
#[derive(Debug, Default)]
pub struct Sent {
    /// Float samples.
    pub samples: u64,
    /// Native histograms.
    pub histograms: u64,
    /// Requests of which the server refused a part for good.
    pub refused: u64,
    /// What it said, the first few times.
    pub refusals: Vec<String>,
}

impl Target {
    /// A server at this address, and where the progress is shown.
    ///
    /// # Errors
    /// An address that is none, or files that are to be used and can't be read.
    pub fn new(server: &Server, progress: ProgressBar) -> Result<Self> {
        let (client, url) = (server.client()?, server.url("/api/v1/write")?);
        Ok(Self { client, url, token: server.token().cloned(), progress, waiting: Arc::default() })
    }

    /// Sends everything that comes until the other side is gone; notes in `state` what is stored.
    ///
    /// # Errors
    /// A server that refuses for good, for example for want of rights, or for too long. `state` is saved before.
    pub async fn send_all(&self, mut batches: Receiver<Batch>, state: &mut State) -> Result<Sent> {
        let mut sent = Sent::default();
        let mut under_way = JoinSet::new();
        let mut account = Account::default();
        let mut saved = Instant::now();
        let mut more = true;
        while more || !under_way.is_empty() {
            tokio::select! {
                batch = batches.recv(), if more && under_way.len() < CONCURRENT => {
                    let Some(batch) = batch else {
                        more = false;
                        continue;
                    };
                    let (number, target) = (account.begin(), self.clone());
                    under_way.spawn(async move {
                        let refusal = target.send(&batch.message).await;
                        (number, batch, refusal)
                    });
                }
                Some(ended) = under_way.join_next(), if !under_way.is_empty() => {
                    let (number, batch, refusal) = ended.context("a bug: a request was given up")?;
                    match refusal {
                        Ok(refusal) => sent.note(&batch, refusal),
                        Err(e) => {
                            state.save()?;
                            return Err(e);
                        }
                    }
                    account.end(number, batch.position, state);
                    if saved.elapsed() >= SAVE_EVERY {
                        state.save()?;
                        saved = Instant::now();
                    }
                }
            }
        }
        state.save()?;
        Ok(sent)
    }

    /// Sends a message until it is stored. A text is what the server refused for good, having stored the rest.
    async fn send(&self, message: &[u8]) -> Result<Option<String>> {
        if message.is_empty() {
            return Ok(None);
        }
        let body = snap::raw::Encoder::new().compress_vec(message).context("cannot compress a request")?;
        let begun = Instant::now();
        let mut pause = PAUSE_MIN;
        loop {
            let answer = self.post(body.clone()).await;
            if matches!(answer, Ok(Answer::Stored | Answer::Partly(_))) {
                self.waiting.store(false, Ordering::Relaxed);
            }
            let failure = match answer {
                Ok(Answer::Stored) => return Ok(None),
                Ok(Answer::Partly(text)) => return Ok(Some(text)),
                Ok(Answer::Never(status, text)) => bail!("{} answers {status}: {}", self.name(), text.trim()),
                Ok(Answer::Later(after, text)) => {
                    pause = after.unwrap_or(pause).min(PAUSE_MAX);
                    text
                }
                // Without the URL, which may hold a password.
                Err(e) => format!("{:#}", anyhow::Error::from(e.without_url())),
            };
            if begun.elapsed() + pause > GIVE_UP_AFTER {
                bail!("{} stores nothing: {}; run the import again to go on", self.name(), failure.trim());
            }
            if begun.elapsed() >= SAY_AFTER && !self.waiting.swap(true, Ordering::Relaxed) {
                let (name, minutes) = (self.name(), GIVE_UP_AFTER.as_secs() / 60);
                super::say(
                    &self.progress,
                    format_args!("{name} stores nothing yet: {}; trying again for {minutes} minutes", failure.trim()),
                );
            }
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(PAUSE_MAX);
        }
    }

    async fn post(&self, body: Vec<u8>) -> reqwest::Result<Answer> {
        let mut request = self.client.post(self.url.clone());
        if let Some(token) = &self.token {
            request = request.bearer_auth(token.expose());
        }
        let response = request
            .header(header::CONTENT_TYPE, "application/x-protobuf")
            .header(header::CONTENT_ENCODING, "snappy")
            .header("X-Prometheus-Remote-Write-Version", "0.1.0")
            .body(body)
            .send()
            .await?;
        let status = response.status();
        if status.is_success() {
            return Ok(Answer::Stored);
        }
        let after = response.headers().get(header::RETRY_AFTER).and_then(|v| v.to_str().ok()?.parse().ok());
        let text = response.text().await.unwrap_or_default();
        Ok(match status {
            StatusCode::BAD_REQUEST => Answer::Partly(text),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => {
                Answer::Later(after.map(Duration::from_secs), text)
            }
            s if s.is_server_error() => Answer::Later(after.map(Duration::from_secs), format!("{s}: {text}")),
            s => Answer::Never(s, text),
        })
    }

    /// The address without what is secret in it.
    pub fn name(&self) -> String {
        shown(&self.url)
    }
}

/// A URL without user and password.
pub fn shown(url: &Url) -> String {
    let mut url = url.clone();
    // They fail for URLs that have neither.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.to_string()
}

enum Answer {
    Stored,
    /// The rest is stored.
    Partly(String),
    /// Sent again it would be refused again.
    Never(StatusCode, String),
    Later(Option<Duration>, String),
}

impl Sent {
    fn note(&mut self, batch: &Batch, refusal: Option<String>) {
        self.samples += batch.samples;
        self.histograms += batch.histograms;
        let Some(text) = refusal else { return };
        self.refused += 1;
        if self.refusals.len() < REFUSALS_KEPT {
            self.refusals.push(text.trim().to_owned());
        }
    }
}

/// Requests end in any order; everything is stored only up to the first that has not ended.
#[derive(Debug, Default)]
struct Account {
    next: u64,
    /// The first that has not ended.
    first: u64,
    ended: BTreeMap<u64, Position>,
}

impl Account {
    fn begin(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    fn end(&mut self, number: u64, position: Position, state: &mut State) {
        self.ended.insert(number, position);
        while let Some(position) = self.ended.remove(&self.first) {
            state.reached(&position);
            self.first += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_is_what_comes_before_the_first_that_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let mut state = State::open(&dir.path().join("state"), "x").unwrap();
        let mut account = Account::default();
        let at = |items, end| Position { unit: "u".to_owned(), items, end };
        assert_eq!([account.begin(), account.begin(), account.begin()], [0, 1, 2]);
        account.end(2, at(30, true), &mut state);
        account.end(1, at(20, false), &mut state);
        assert_eq!((state.items("u"), state.is_done("u")), (0, false));
        account.end(0, at(10, false), &mut state);
        assert_eq!((state.items("u"), state.is_done("u")), (30, true));
    }

    #[test]
    fn passwords_are_not_shown() {
        let url = Url::parse("https://user:secret@host:9090/x").unwrap();
        assert_eq!(shown(&url), "https://host:9090/x");
    }
}
