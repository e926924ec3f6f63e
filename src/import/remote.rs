//! Prometheus's remote-read endpoint: an hour at a time, as a stream of the chunks that it has on disk or, from servers that
//! can't do that, as samples.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use catalog::{MatchOp, Secret};
use receivers::wire::{Cursor, WireError, fixed64_key, len_key, varint_key, zigzag, zigzag32};
use reqwest::{Client, Response, Url, header};

use super::batch::{field, number};
use super::bytes::{Damage, check_sum};
use super::chunk::{self, Counts, Histogram, Points, Span};
use super::send::shown;
use super::state::State;
use super::{Labels, Options, Piece, Range, Reading};

/// What is asked for at a time. Aligned, so that every import has the same windows.
const WINDOW_MS: i64 = 3_600_000;
/// The most recent samples may still be changing at their source.
const SETTLED_AFTER_MS: i64 = 300_000;
/// Most bytes of a frame of the stream, of which Prometheus makes some of 1 MiB.
const FRAME_MAX: u64 = 64 << 20;
/// Most bytes of an answer that is not a stream.
const ANSWER_MAX: usize = 1 << 30;
/// How often a window is asked for.
const ATTEMPTS: u32 = 6;

/// A server that is read from.
#[derive(Debug)]
pub struct Source {
    client: Client,
    url: Url,
    token: Option<Secret>,
}

/// Why a window could not be read.
enum Failure {
    /// It may work next time.
    Later(anyhow::Error),
    /// It will not.
    Never(anyhow::Error),
    /// Nobody takes what is read.
    Unwanted,
}

impl From<Damage> for Failure {
    fn from(e: Damage) -> Self {
        Self::Later(anyhow::Error::from(e).context("the answer is damaged"))
    }
}

impl From<WireError> for Failure {
    fn from(e: WireError) -> Self {
        Self::Later(anyhow::anyhow!("the answer is damaged: {e}"))
    }
}

impl From<reqwest::Error> for Failure {
    fn from(e: reqwest::Error) -> Self {
        // The URL may hold a password.
        Self::Later(e.without_url().into())
    }
}

impl Source {
    /// The server that the options name.
    ///
    /// # Errors
    /// A source that is no HTTP URL, and a missing start.
    pub fn new(client: Client, options: &Options) -> Result<Self> {
        let mut url = Url::parse(&options.source).with_context(|| format!("{:?} is not a URL", options.source))?;
        ensure!(["http", "https"].contains(&url.scheme()), "{} is neither a folder nor an HTTP URL", shown(&url));
        if !url.path().ends_with("/read") {
            let path = format!("{}/api/v1/read", url.path().trim_end_matches('/'));
            url.set_path(&path);
        }
        ensure!(options.start.is_some(), "--start is missing: remote read doesn't tell when a server's history begins");
        Ok(Self { client, url, token: options.source_token.clone() })
    }

    /// The address without what is secret in it.
    pub fn name(&self) -> String {
        shown(&self.url)
    }

    /// Reads all windows of a range up to `now_ms`, the oldest first.
    ///
    /// # Errors
    /// A server that refuses or fails.
    pub async fn read(&self, range: &Range, now_ms: i64, state: &State, reading: &mut Reading) -> Result<()> {
        let end_ms = range.end_ms.min(now_ms);
        let first = range.start_ms.div_euclid(WINDOW_MS);
        let last = end_ms.div_euclid(WINDOW_MS);
        reading.report.progress.set_length(u64::try_from(last - first + 1).unwrap_or(0));
        for window in first..=last {
            let from = window * WINDOW_MS;
            let unit = from.to_string();
            if !state.is_done(&unit) {
                let to = from + WINDOW_MS - 1;
                let part = Range { start_ms: from.max(range.start_ms), end_ms: to.min(end_ms), ..range.clone() };
                reading.batcher.begin(&unit, 0);
                match self.window(&part, reading).await {
                    Ok(()) => {}
                    Err(Failure::Unwanted) => return Ok(()),
                    Err(Failure::Later(e) | Failure::Never(e)) => {
                        return Err(e.context(format!("cannot read from {}", self.name())));
                    }
                }
                reading.report.units += 1;
                let mut batch = reading.batcher.end();
                batch.position.end = to.min(range.end_ms) < now_ms - SETTLED_AFTER_MS;
                if reading.send([batch]).await.is_err() {
                    return Ok(());
                }
            }
            reading.report.progress.inc(1);
        }
        Ok(())
    }

    async fn window(&self, range: &Range, reading: &mut Reading) -> Result<(), Failure> {
        let request = request(range);
        let body = snap::raw::Encoder::new().compress_vec(&request).map_err(|e| Failure::Never(e.into()))?;
        let mut pause = Duration::from_millis(500);
        for attempt in 1.. {
            match self.ask(body.clone(), range, reading).await {
                Err(Failure::Later(e)) if attempt < ATTEMPTS => {
                    super::say(&reading.report.progress, format_args!("reading again in {pause:?}: {e:#}"));
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                result => return result,
            }
        }
        Ok(())
    }

    async fn ask(&self, body: Vec<u8>, range: &Range, reading: &mut Reading) -> Result<(), Failure> {
        let mut request = self.client.post(self.url.clone());
        if let Some(token) = &self.token {
            request = request.bearer_auth(token.expose());
        }
        let mut response = request
            .header(header::CONTENT_TYPE, "application/x-protobuf")
            .header(header::CONTENT_ENCODING, "snappy")
            .header("X-Prometheus-Remote-Read-Version", "0.1.0")
            .body(body)
            .send()
            .await?;
        let status = response.status();
        if !status.is_success() {
            let text = response.text().await.unwrap_or_default();
            let error = anyhow::anyhow!("it answers {status}: {}", text.trim());
            return Err(if status.is_server_error() { Failure::Later(error) } else { Failure::Never(error) });
        }
        let kind = response.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
        if kind.starts_with("application/x-streamed-protobuf") {
            let mut stream = Stream { response, bytes: Vec::new() };
            while let Some(frame) = stream.frame().await? {
                for piece in chunked(&frame, range)? {
                    reading.report.series += 1;
                    let full = reading.batcher.push(piece);
                    reading.send(full).await.map_err(|_| Failure::Unwanted)?;
                }
            }
            return Ok(());
        }
        let mut bytes = Vec::new();
        while let Some(more) = response.chunk().await? {
            if bytes.len() + more.len() > ANSWER_MAX {
                return Err(Failure::Never(anyhow::anyhow!("it answers with more than {ANSWER_MAX} bytes")));
            }
            bytes.extend_from_slice(&more);
        }
        let too_large = |e: snap::Error| Failure::Later(anyhow::Error::from(e).context("the answer is not snappy"));
        if snap::raw::decompress_len(&bytes).map_err(too_large)? > 4 * ANSWER_MAX {
            return Err(Failure::Never(anyhow::anyhow!("it answers with more than {} bytes", 4 * ANSWER_MAX)));
        }
        let message = snap::raw::Decoder::new().decompress_vec(&bytes).map_err(too_large)?;
        for piece in sampled(&message, range)? {
            reading.report.series += 1;
            let full = reading.batcher.push(piece);
            reading.send(full).await.map_err(|_| Failure::Unwanted)?;
        }
        Ok(())
    }
}

/// A `ReadRequest` for all of a range, one query per selector.
fn request(range: &Range) -> Vec<u8> {
    let mut out = Vec::new();
    let mut query = |matchers: &[(u64, &str, &str)]| {
        let mut body = Vec::new();
        number(1, range.start_ms as u64, &mut body);
        number(2, range.end_ms as u64, &mut body);
        for (kind, name, value) in matchers {
            let mut matcher = Vec::new();
            number(1, *kind, &mut matcher);
            field(2, name.as_bytes(), &mut matcher);
            field(3, value.as_bytes(), &mut matcher);
            field(3, &matcher, &mut body);
        }
        field(1, &body, &mut out);
    };
    for matchers in &range.selectors {
        let kind = |op| match op {
            MatchOp::Eq => 0,
            MatchOp::Ne => 1,
            MatchOp::Re => 2,
            MatchOp::Nre => 3,
        };
        query(&matchers.iter().map(|m| (kind(m.op()), m.name(), m.value())).collect::<Vec<_>>());
    }
    if range.selectors.is_empty() {
        query(&[(2, "__name__", ".+")]);
    }
    // Streamed chunks where they are known, else samples.
    field(2, &[1, 0], &mut out);
    out
}

/// Frames: a length, a checksum, a message.
struct Stream {
    response: Response,
    bytes: Vec<u8>,
}

impl Stream {
    async fn frame(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        loop {
            if let Some((frame, used)) = frame(&self.bytes)? {
                self.bytes.drain(..used);
                return Ok(Some(frame));
            }
            match self.response.chunk().await? {
                Some(more) => self.bytes.extend_from_slice(&more),
                None if self.bytes.is_empty() => return Ok(None),
                None => return Err(Damage::new("it ends within a frame").into()),
            }
        }
    }
}

/// The first frame and how many bytes it takes, when all of it is there.
fn frame(bytes: &[u8]) -> Result<Option<(Vec<u8>, usize)>, Damage> {
    let Some(head) = bytes.iter().take(10).position(|b| *b < 0x80) else {
        return if bytes.len() < 10 { Ok(None) } else { Err(Damage::new("a frame has no length")) };
    };
    let len = super::bytes::Reader::new(bytes).uvarint()?;
    if len > FRAME_MAX {
        return Err(Damage::new(format!("a frame says that it has {len} bytes; {FRAME_MAX} are allowed")));
    }
    let mut r = super::bytes::Reader::new(&bytes[head + 1..]);
    let (Ok(sum), Ok(message)) = (r.u32(), r.bytes(len)) else { return Ok(None) };
    check_sum(message, sum)?;
    Ok(Some((message.to_vec(), bytes.len() - r.rest().len())))
}

/// The series of a `ChunkedReadResponse`.
fn chunked(message: &[u8], range: &Range) -> Result<Vec<Piece>, Failure> {
    let mut pieces = Vec::new();
    let mut c = Cursor::new(message);
    while let Some(key) = c.key()? {
        if key != len_key(1) {
            c.skip(key, 0..=0)?;
            continue;
        }
        let mut series = c.message()?;
        let (mut labels, mut points) = (Vec::new(), Points::default());
        while let Some(key) = series.key()? {
            match key {
                LABEL => labels.push(label(series.message()?)?),
                CHUNK => {
                    let (encoding, data) = chunk_of(series.message()?)?;
                    chunk::decode(encoding, data, &mut points)?;
                }
                key => series.skip(key, 0..=0)?,
            }
        }
        points.retain(|ts| range.contains(ts));
        pieces.push(Piece { labels, points });
    }
    Ok(pieces)
}

const LABEL: u32 = len_key(1);
const CHUNK: u32 = len_key(2);

/// Encoding and data of a `Chunk`.
fn chunk_of(mut c: Cursor<'_>) -> Result<(u8, &[u8]), Failure> {
    let (mut encoding, mut data) = (0, &[][..]);
    while let Some(key) = c.key()? {
        match key {
            ENCODING => encoding = u8::try_from(c.varint()?).unwrap_or(u8::MAX),
            DATA => data = c.bytes()?,
            key => c.skip(key, 0..=0)?,
        }
    }
    Ok((encoding, data))
}

const ENCODING: u32 = varint_key(3);
const DATA: u32 = len_key(4);

fn label(mut c: Cursor<'_>) -> Result<(String, String), Failure> {
    let text = |bytes: &[u8]| {
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| Damage::new("it holds a text that is not UTF-8"))
    };
    let (mut name, mut value) = (String::new(), String::new());
    while let Some(key) = c.key()? {
        match key {
            NAME => name = text(c.bytes()?)?,
            VALUE => value = text(c.bytes()?)?,
            key => c.skip(key, 0..=0)?,
        }
    }
    Ok((name, value))
}

const NAME: u32 = len_key(1);
const VALUE: u32 = len_key(2);

/// The series of a `ReadResponse`.
fn sampled(message: &[u8], range: &Range) -> Result<Vec<Piece>, Failure> {
    let mut pieces = Vec::new();
    let mut c = Cursor::new(message);
    while let Some(key) = c.key()? {
        if key != len_key(1) {
            c.skip(key, 0..=0)?;
            continue;
        }
        let mut result = c.message()?;
        while let Some(key) = result.key()? {
            if key == len_key(1) {
                let (labels, mut points) = time_series(result.message()?)?;
                points.retain(|ts| range.contains(ts));
                pieces.push(Piece { labels, points });
            } else {
                result.skip(key, 0..=0)?;
            }
        }
    }
    Ok(pieces)
}

fn time_series(mut c: Cursor<'_>) -> Result<(Labels, Points), Failure> {
    const SAMPLE: u32 = len_key(2);
    const HISTOGRAM: u32 = len_key(4);
    let (mut labels, mut points) = (Vec::new(), Points::default());
    while let Some(key) = c.key()? {
        match key {
            LABEL => labels.push(label(c.message()?)?),
            SAMPLE => points.floats.push(sample(c.message()?)?),
            HISTOGRAM => points.histograms.push(histogram(c.message()?)?),
            key => c.skip(key, 0..=0)?,
        }
    }
    Ok((labels, points))
}

fn sample(mut c: Cursor<'_>) -> Result<(i64, f64), WireError> {
    const VALUE: u32 = fixed64_key(1);
    const TS: u32 = varint_key(2);
    let (mut ts, mut value) = (0, 0.0);
    while let Some(key) = c.key()? {
        match key {
            VALUE => value = c.double()?,
            TS => ts = c.varint()? as i64,
            key => c.skip(key, 0..=0)?,
        }
    }
    Ok((ts, value))
}

/// A histogram as remote read and remote write 1.0 have it.
fn histogram(mut c: Cursor<'_>) -> Result<Histogram, WireError> {
    let mut h = Histogram::default();
    let (mut count, mut zero) = ((0, 0.0), (0, 0.0));
    let mut fractional = false;
    let (mut deltas, mut counts) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    while let Some(key) = c.key()? {
        // Lists come packed; single entries are valid, too.
        match (key >> 3, key & 7) {
            (1, 0) => count.0 = c.varint()?,
            (2, 1) => (fractional, count.1) = (true, c.double()?),
            (3, 1) => h.sum = c.double()?,
            (4, 0) => h.schema = zigzag32(c.varint()?),
            (5, 1) => h.zero_threshold = c.double()?,
            (6, 0) => zero.0 = c.varint()?,
            (7, 1) => zero.1 = c.double()?,
            (8, 2) => h.negative.push(span(c.message()?)?),
            (11, 2) => h.positive.push(span(c.message()?)?),
            (field @ (9 | 12), 0) => deltas[usize::from(field == 9)].push(zigzag(c.varint()?)),
            (field @ (9 | 12), 2) => {
                let mut list = c.message()?;
                while !list.is_empty() {
                    deltas[usize::from(field == 9)].push(zigzag(list.varint()?));
                }
            }
            (field @ (10 | 13), 1) => counts[usize::from(field == 10)].push(c.double()?),
            (field @ (10 | 13), 2) => {
                let mut list = c.message()?;
                while !list.is_empty() {
                    counts[usize::from(field == 10)].push(list.double()?);
                }
            }
            (14, 0) => h.reset_hint = u8::try_from(c.varint()?).ok().filter(|hint| *hint <= 3).unwrap_or(0),
            (15, 0) => h.ts = c.varint()? as i64,
            (16, 1) => h.custom_values.push(c.double()?),
            (16, 2) => {
                let mut list = c.message()?;
                while !list.is_empty() {
                    h.custom_values.push(list.double()?);
                }
            }
            _ => c.skip(key, 0..=0)?,
        }
    }
    let ([positive, negative], [positive_counts, negative_counts]) = (deltas, counts);
    h.counts = if fractional {
        Counts::Fractional { count: count.1, zero: zero.1, positive: positive_counts, negative: negative_counts }
    } else {
        Counts::Whole { count: count.0, zero: zero.0, positive, negative }
    };
    Ok(h)
}

fn span(mut c: Cursor<'_>) -> Result<Span, WireError> {
    let mut span = Span { offset: 0, length: 0 };
    while let Some(key) = c.key()? {
        match (key >> 3, key & 7) {
            (1, 0) => span.offset = zigzag32(c.varint()?),
            (2, 0) => span.length = c.varint()? as u32,
            _ => c.skip(key, 0..=0)?,
        }
    }
    Ok(span)
}

#[cfg(test)]
mod tests;
