//! Reads and inflates request bodies within limits; shared by all receivers.
//!
//! Three limits hold for each body: its size as sent, the size that it declares before anything is allocated for it, and
//! the size that it inflates to. A fourth holds for all bodies in flight together: each reserves memory in the engine's
//! account as its bytes arrive and gives it back when the request is answered; when there is none, a request is refused
//! for now and never queued. A body that stalls is given up, so that a slow sender can't keep its share.

use std::cell::RefCell;
use std::io::{ErrorKind, Read};
use std::time::Duration;

use axum::body::Body as HttpBody;
use catalog::{Error, Result};
use engine::memory::Kind;
use engine::{Memory, Reservation};
use http_body_util::BodyExt;

/// Most bytes of a body as sent.
const SENT_MAX: usize = 16 << 20;
/// Most bytes of an inflated body.
const INFLATED_MAX: usize = 64 << 20;
/// Inflated bytes count so often in the account: once for themselves and once for the rows that they become.
const INFLATED_WEIGHT: usize = 2;
/// A body that sends nothing for this long is given up.
const IDLE_MAX: Duration = Duration::from_secs(30);
/// A thread keeps its buffer for inflated bodies up to this size.
const BUFFER_KEPT_MAX: usize = 4 << 20;
/// No snappy element of three bytes stands for more than 64; a body that declares more than this times its size lies.
const SNAPPY_RATIO_MAX: usize = 22;
/// The largest zstd window, as the format's specification recommends to support: 8 MiB.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;

/// How a body is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// Not at all.
    Identity,
    /// A snappy block (not the framed format).
    Snappy,
    /// Zstandard frames.
    Zstd,
}

/// The limits and the account; cheap to clone.
#[derive(Debug, Clone)]
pub struct Bodies {
    memory: Memory,
    sent_max: usize,
    inflated_max: usize,
    idle_max: Duration,
}

impl Bodies {
    /// Lets bodies in flight take what `memory` has for them. One body alone always fits: its own limits shrink with a
    /// small account.
    pub fn new(memory: Memory) -> Self {
        let budget = memory.max(Kind::Bodies);
        Self {
            memory,
            sent_max: SENT_MAX.min(budget / 8),
            inflated_max: INFLATED_MAX.min(budget / 4),
            idle_max: IDLE_MAX,
        }
    }

    /// Gives up a body after this long without a byte.
    #[must_use]
    pub fn with_idle_max(mut self, idle_max: Duration) -> Self {
        self.idle_max = idle_max;
        self
    }

    /// Most bytes of an inflated body.
    pub fn inflated_max(&self) -> usize {
        self.inflated_max
    }

    /// A body that is in memory already.
    ///
    /// # Errors
    /// `Unavailable` when there is no memory.
    pub fn whole(&self, bytes: Vec<u8>) -> Result<Body> {
        let mut share = self.memory.reserve(Kind::Bodies);
        share.grow(bytes.len())?;
        Ok(Body { bytes, share, inflated_max: self.inflated_max })
    }

    /// Reads a body whole. `declared` is its Content-Length, when it has one.
    ///
    /// # Errors
    /// `LimitExceeded` when it is too large, `Unavailable` when there is no memory, `Timeout` when it stalls, `Invalid`
    /// when its chunks are malformed, `Canceled` when the sender breaks off.
    pub async fn read(&self, body: HttpBody, declared: Option<u64>) -> Result<Body> {
        let too_large = |size: u64| {
            Error::limit_exceeded(format!("request body has {size} bytes or more; {} are allowed", self.sent_max))
        };
        if let Some(size) = declared.filter(|s| *s > self.sent_max as u64) {
            return Err(too_large(size));
        }
        let mut share = self.memory.reserve(Kind::Bodies);
        let mut bytes = Vec::new();
        let mut body = std::pin::pin!(body);
        loop {
            let frame = match tokio::time::timeout(self.idle_max, body.frame()).await {
                Ok(None) => break,
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(e))) if is_malformed(&e) => {
                    return Err(Error::invalid("request body is not sent as its headers say").with_source(e));
                }
                Ok(Some(Err(e))) => {
                    return Err(Error::canceled("request body ended before its end").with_source(e));
                }
                Err(_) => {
                    return Err(Error::timeout(format!("request body sent nothing for {} s", self.idle_max.as_secs())));
                }
            };
            let Ok(data) = frame.into_data() else { continue };
            if data.len() > self.sent_max - bytes.len() {
                return Err(too_large((bytes.len() + data.len()) as u64));
            }
            share.grow(data.len())?;
            if bytes.is_empty() {
                // What is declared is allocated for at once, but only as far as bytes can be expected soon.
                bytes.reserve(declared.map_or(data.len(), |d| d.min(1 << 20) as usize));
            }
            bytes.extend_from_slice(&data);
        }
        Ok(Body { bytes, share, inflated_max: self.inflated_max })
    }
}

/// Whether what came of a body can't be read, so that it is no use to send it again. hyper has no kind of error for
/// that: it passes on an I/O error of these kinds, and one of another kind when the connection ends.
fn is_malformed(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(error), |&e| e.source())
        .filter_map(|e| e.downcast_ref::<std::io::Error>())
        .any(|e| matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::InvalidData))
}

/// A body as it was sent, with what it reserves.
#[derive(Debug)]
pub struct Body {
    bytes: Vec<u8>,
    share: Reservation,
    inflated_max: usize,
}

thread_local! {
    /// Saves an allocation, page faults and cold caches per request.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Body {
    /// The bytes as sent.
    pub fn sent(&self) -> &[u8] {
        &self.bytes
    }

    /// Inflates the body and calls `f` with the result. Blocks the thread.
    ///
    /// # Errors
    /// `Invalid` when the body is not what `encoding` says, `LimitExceeded` when it inflates to too much, `Unavailable`
    /// when there is no memory; else what `f` returns.
    pub fn inflate<T>(&mut self, encoding: Encoding, f: impl FnOnce(&[u8]) -> Result<T>) -> Result<T> {
        let mut buffer = BUFFER.take();
        let inflated = match encoding {
            Encoding::Identity => self.check(self.bytes.len() as u64).and_then(|n| self.share.grow(n)),
            Encoding::Snappy => self.snappy(&mut buffer),
            Encoding::Zstd => self.zstd(&mut buffer),
        };
        let out = inflated.and_then(|()| match encoding {
            Encoding::Identity => f(&self.bytes),
            Encoding::Snappy | Encoding::Zstd => f(&buffer),
        });
        if buffer.capacity() <= BUFFER_KEPT_MAX {
            BUFFER.set(buffer);
        }
        out
    }

    fn check(&self, inflated: u64) -> Result<usize> {
        if inflated > self.inflated_max as u64 {
            return Err(Error::limit_exceeded(format!(
                "request body inflates to {inflated} bytes or more; {} are allowed",
                self.inflated_max
            )));
        }
        Ok(inflated as usize)
    }

    fn snappy(&mut self, out: &mut Vec<u8>) -> Result<()> {
        let bad = |e: snap::Error| Error::invalid("request body is not a snappy block").with_source(e);
        // Not `snap::raw::decompress_len`: it fails above 4 GiB with an error that can't be told from damage.
        let declared = crate::wire::Cursor::new(&self.bytes)
            .varint()
            .map_err(|_| Error::invalid("request body is not a snappy block: it does not begin with its length"))?;
        let len = self.check(declared)?;
        if len > self.bytes.len() * SNAPPY_RATIO_MAX {
            return Err(Error::invalid(format!(
                "request body is not a snappy block: {} bytes can't inflate to the {len} that it declares",
                self.bytes.len()
            )));
        }
        self.share.grow(len * INFLATED_WEIGHT)?;
        // Old bytes are overwritten or, on an error, not used.
        out.resize(len, 0);
        let n = snap::raw::Decoder::new().decompress(&self.bytes, out).map_err(bad)?;
        out.truncate(n);
        Ok(())
    }

    fn zstd(&mut self, out: &mut Vec<u8>) -> Result<()> {
        let bad = |e: std::io::Error| Error::invalid("request body is not zstd frames").with_source(e);
        out.clear();
        let mut decoder = zstd::stream::read::Decoder::with_buffer(&self.bytes[..]).map_err(bad)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(bad)?;
        // The window is allocated as soon as a frame asks for it.
        self.share.grow(self.bytes.len())?;
        let step = 256 << 10;
        loop {
            let had = out.len();
            self.share.grow(step * INFLATED_WEIGHT)?;
            let n = Read::by_ref(&mut decoder).take(step as u64).read_to_end(out).map_err(bad)?;
            if n == 0 {
                return Ok(());
            }
            self.check((had + n) as u64)?;
        }
    }
}
