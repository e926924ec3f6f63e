//! Looks at what clients send before `pgwire` parses it, which panics on a length or a count that lies.
//!
//! Messages go on whole or not at all, one at a time: whatever parses them never sees a message that ends early, that
//! has something behind its end, or half of one. The layouts are those of PostgreSQL's protocol 3 ("Message Formats").

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Largest message of a client that is known: statements are texts, and parameters seldom large.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Largest message of a client that is not known yet, as in PostgreSQL.
const STARTUP_BYTES_MAX: usize = 10_000;
/// In the place of a protocol version, in the message that cancels what another connection runs.
const CANCEL: [u8; 4] = 80_877_102u32.to_be_bytes();

/// A stream whose reading side hands on messages that hold together.
pub struct Checked<S> {
    inner: S,
    /// Begins with a message.
    buffer: BytesMut,
    /// Bytes of a checked message that weren't handed on yet.
    passed: usize,
    /// Whether the first message, which has no kind, has passed.
    started: bool,
    /// Largest message from now on.
    bytes_max: usize,
}

impl<S> Checked<S> {
    /// Nothing was read of the stream.
    pub fn new(inner: S) -> Self {
        Self { inner, buffer: BytesMut::new(), passed: 0, started: false, bytes_max: STARTUP_BYTES_MAX }
    }

    /// The client is known and may send large messages.
    pub fn trust(&mut self) {
        self.bytes_max = MESSAGE_BYTES_MAX;
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Checked<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            if self.passed > 0 {
                let length = self.passed.min(out.remaining());
                out.put_slice(&self.buffer.split_to(length));
                self.passed -= length;
                return Poll::Ready(Ok(()));
            }
            if let Some(length) = first_message(&self.buffer, self.started, self.bytes_max)? {
                (self.passed, self.started) = (length, true);
                continue;
            }
            let mut space = [0; 8192];
            let mut chunk = ReadBuf::new(&mut space);
            ready!(Pin::new(&mut self.inner).poll_read(cx, &mut chunk))?;
            if chunk.filled().is_empty() {
                // Half a message that nobody will complete goes with the connection.
                return Poll::Ready(Ok(()));
            }
            self.buffer.extend_from_slice(chunk.filled());
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Checked<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// Length of the message that `bytes` begin with, once all of it is there.
///
/// # Errors
/// `InvalidData` for a message that is too large or does not hold together.
fn first_message(bytes: &[u8], started: bool, most: usize) -> io::Result<Option<usize>> {
    let kind = if started { bytes.first().copied() } else { None };
    let offset = usize::from(started);
    let Some(length) = bytes.get(offset..offset + 4) else { return Ok(None) };
    let length = u32::from_be_bytes([length[0], length[1], length[2], length[3]]) as usize;
    if !(4..=most).contains(&length) {
        return Err(invalid(format!("message declares {length} bytes; 4 to {most} are allowed")));
    }
    let Some(body) = bytes.get(offset + 4..offset + length) else { return Ok(None) };
    match check(kind, Body(body)) {
        Some(Body(&[])) => Ok(Some(offset + length)),
        Some(Body(rest)) => Err(invalid(format!("{} bytes behind the end of {}", rest.len(), name(kind)))),
        None => Err(invalid(format!("{} ends too early", name(kind)))),
    }
}

fn name(kind: Option<u8>) -> String {
    kind.map_or_else(|| "the first message".to_owned(), |k| format!("a message of kind '{}'", k.escape_ascii()))
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

/// What is left of a message behind its fields, or nothing when it ends too early.
fn check(kind: Option<u8>, body: Body<'_>) -> Option<Body<'_>> {
    match kind {
        // A cancel request has a process and a key, anything else texts in pairs, which end with the message.
        None if body.0.starts_with(&CANCEL) => body.bytes(12)?.all(),
        None => body.bytes(4)?.pairs(),
        Some(b'Q' | b'f') => body.text(),
        Some(b'P') => body.text()?.text()?.many(|b| b.bytes(4)),
        Some(b'B') => body.text()?.text()?.many(|b| b.bytes(2))?.many(Body::value)?.many(|b| b.bytes(2)),
        Some(b'D' | b'C') => body.bytes(1)?.text(),
        Some(b'E') => body.text()?.bytes(4),
        Some(b'S' | b'H' | b'X' | b'c') => Some(body),
        // Passwords and copied data are what they are; other kinds are refused by name where they are parsed.
        Some(_) => body.all(),
    }
}

/// What is left of a message. Each step gives what is behind a field.
struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    fn bytes(self, count: usize) -> Option<Self> {
        self.0.get(count..).map(Body)
    }

    /// A text and the zero behind it.
    fn text(self) -> Option<Self> {
        let end = self.0.iter().position(|b| *b == 0)?;
        self.bytes(end + 1)
    }

    /// A length and as many bytes; minus one is NULL.
    fn value(self) -> Option<Self> {
        let length = self.0.first_chunk().map(|l| i32::from_be_bytes(*l))?;
        let rest = self.bytes(4)?;
        if length == -1 { Some(rest) } else { rest.bytes(usize::try_from(length).ok()?) }
    }

    /// A count and as many of something.
    fn many(self, one: impl Fn(Self) -> Option<Self>) -> Option<Self> {
        let count = self.0.first_chunk().map(|c| u16::from_be_bytes(*c))?;
        (0..count).try_fold(self.bytes(2)?, |rest, _| one(rest))
    }

    /// Names and values up to an empty name.
    fn pairs(mut self) -> Option<Self> {
        while *self.0.first()? != 0 {
            self = self.text()?.text()?;
        }
        self.bytes(1)
    }

    /// Whatever is there.
    fn all(self) -> Option<Self> {
        Some(Body(&[]))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    fn typed(kind: u8, body: &[u8]) -> Vec<u8> {
        [&[kind][..], &(body.len() as u32 + 4).to_be_bytes(), body].concat()
    }

    fn startup(body: &[u8]) -> Vec<u8> {
        [&(body.len() as u32 + 4).to_be_bytes(), body].concat()
    }

    fn check(bytes: &[u8], started: bool, expected: Result<Option<usize>, &str>) {
        let most = if started { MESSAGE_BYTES_MAX } else { STARTUP_BYTES_MAX };
        let found = first_message(bytes, started, most).map_err(|e| e.to_string());
        assert_eq!(found, expected.map_err(str::to_owned), "{}", bytes.escape_ascii());
    }

    #[test]
    fn messages_hold_together_or_are_refused() {
        let good = startup(b"\0\x03\0\0user\0me\0\0");
        check(&good, false, Ok(Some(good.len())));
        check(&good[..3], false, Ok(None));
        check(&good[..good.len() - 1], false, Ok(None));
        check(&startup(b"\x04\xd2\x16\x2e\0\0\0\x01\0\0\0\x02"), false, Ok(Some(16)));
        check(&startup(b"\x04\xd2\x16\x2e\0\0"), false, Err("the first message ends too early"));
        check(&startup(b"\0\x03\0\0\0"), false, Ok(Some(9)));
        check(&startup(b"\0\x03\0\0user\0me\0"), false, Err("the first message ends too early"));
        check(&startup(b"\0\x03\0\0user\0me\0database"), false, Err("the first message ends too early"));
        check(&startup(b"\0\x03\0\0user\0\0\0"), false, Ok(Some(15)));
        check(&startup(b"\0\x03\0\0\0p\0\0\0\0"), false, Err("5 bytes behind the end of the first message"));
        check(&[0, 0, 0x40, 0], false, Err("message declares 16384 bytes; 4 to 10000 are allowed"));
        check(&typed(b'Q', b"SELECT 1\0"), true, Ok(Some(14)));
        check(&typed(b'Q', b"SELECT 1"), true, Err("a message of kind 'Q' ends too early"));
        check(&typed(b'Q', b"SELECT 1\0x"), true, Err("1 bytes behind the end of a message of kind 'Q'"));
        check(
            &[b'Q', 0xff, 0xff, 0xff, 0xff],
            true,
            Err("message declares 4294967295 bytes; 4 to 16777216 are allowed"),
        );
        check(&[b'S', 0, 0, 0, 3], true, Err("message declares 3 bytes; 4 to 16777216 are allowed"));
        check(&typed(b'P', b"s\0SELECT $1\0\0\x01\0\0\0\x14"), true, Ok(Some(23)));
        check(&typed(b'P', b"s\0SELECT $1\0\0\x02\0\0\0\x14"), true, Err("a message of kind 'P' ends too early"));
        let bind = |length: i32, bytes: &[u8]| {
            let parameter = [&length.to_be_bytes(), bytes].concat();
            typed(b'B', &[b"p\0s\0\0\x01\0\x01\0\x01", &parameter[..], b"\0\0"].concat())
        };
        check(&bind(3, b"abc"), true, Ok(Some(24)));
        check(&bind(-1, b""), true, Ok(Some(21)));
        check(&bind(-2, b""), true, Err("a message of kind 'B' ends too early"));
        check(&bind(i32::MAX, b""), true, Err("a message of kind 'B' ends too early"));
        check(&typed(b'E', b"p\0\0\0\0"), true, Err("a message of kind 'E' ends too early"));
        check(&typed(b'D', b""), true, Err("a message of kind 'D' ends too early"));
        check(&typed(b'S', b""), true, Ok(Some(5)));
    }

    /// What `pgwire` makes of everything that gets through; it must not panic.
    async fn parse(bytes: &[u8]) -> usize {
        use futures::StreamExt;
        use pgwire::api::{ClientInfo, DefaultClient, PgWireConnectionState};
        use pgwire::messages::PgWireFrontendMessage as Message;
        use pgwire::tokio::server::PgWireMessageServerCodec;
        use tokio_util::codec::Framed;

        let client = DefaultClient::<()>::new(([127, 0, 0, 1], 0).into(), false);
        let stream = tokio::io::join(io::Cursor::new(bytes.to_vec()), tokio::io::sink());
        let mut framed = Framed::new(Checked::new(stream), PgWireMessageServerCodec::new(client));
        framed.set_state(PgWireConnectionState::AwaitingStartup);
        let mut parsed = 0;
        while let Some(Ok(message)) = framed.next().await {
            framed.set_state(PgWireConnectionState::ReadyForQuery);
            if let Message::PasswordMessageFamily(password) = message {
                drop(password.into_password());
            }
            parsed += 1;
        }
        parsed
    }

    #[tokio::test]
    async fn damaged_messages_never_reach_the_parser() {
        let cancel = startup(b"\x04\xd2\x16\x2e\0\0\0\x01\0\0\0\x02");
        let start = startup(b"\0\x03\0\0user\0me\0database\0thalweg\0\0");
        let rest = [
            typed(b'p', b"secret\0"),
            typed(b'Q', b"SELECT 1\0"),
            typed(b'P', b"s\0SELECT $1\0\0\x01\0\0\0\x14"),
            typed(b'B', b"p\0s\0\0\x01\0\x01\0\x01\0\0\0\x03abc\0\x01\0\x01"),
            typed(b'D', b"Pp\0"),
            typed(b'E', b"p\0\0\0\0\0"),
            typed(b'C', b"Ss\0"),
            typed(b'f', b"no\0"),
            typed(b'S', b""),
        ];
        let whole = [&start[..], &rest.concat()].concat();
        assert_eq!((parse(&whole).await, parse(&cancel).await), (10, 1));
        let mut random = 1u64;
        let mut below = |most: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) as usize % most
        };
        for round in 0..30_000 {
            let mut bytes = if round % 8 == 0 { cancel.clone() } else { whole.clone() };
            // The first message is what a stranger may send.
            let reach = if round % 2 == 0 { start.len().min(bytes.len()) } else { bytes.len() };
            for _ in 0..=below(3) {
                let at = below(reach.min(bytes.len()).max(1)).min(bytes.len().saturating_sub(1));
                match below(6) {
                    0 => bytes[at] ^= 1 << below(8),
                    1 => bytes[at] = below(256) as u8,
                    2 => bytes[at] = 0,
                    3 => drop(bytes.drain(at..(at + below(8)).min(bytes.len()))),
                    4 => bytes.insert(at, below(256) as u8),
                    _ => bytes.truncate(at + 1),
                }
                if bytes.is_empty() {
                    bytes.push(0);
                }
            }
            parse(&bytes).await;
        }
    }

    #[tokio::test]
    async fn a_stranger_sends_little() {
        let start = startup(b"\0\x03\0\0user\0me\0\0");
        let large = typed(b'p', &[b'x'; STARTUP_BYTES_MAX]);
        let bytes = [&start[..], &large].concat();
        let end = Checked::new(&bytes[..]).read_to_end(&mut Vec::new()).await.expect_err("a large password");
        assert_eq!(end.to_string(), "message declares 10004 bytes; 4 to 10000 are allowed");
        let mut checked = Checked::new(&bytes[..]);
        checked.trust();
        assert_eq!(checked.read_to_end(&mut Vec::new()).await.expect("all of it"), bytes.len());
    }

    #[tokio::test]
    async fn a_stream_is_handed_on_message_by_message() {
        let (first, second) = (startup(b"\0\x03\0\0user\0me\0\0"), typed(b'Q', b"SELECT 1\0"));
        let bytes = [&first[..], &second, &typed(b'Q', b"no end")].concat();
        let mut checked = Checked::new(&bytes[..]);
        let mut out = Vec::new();
        let end = checked.read_to_end(&mut out).await.expect_err("the third message is none");
        assert_eq!((end.kind(), out), (io::ErrorKind::InvalidData, [first, second].concat()));
        // What is cut off is dropped.
        let mut out = Vec::new();
        Checked::new(&bytes[..5]).read_to_end(&mut out).await.expect("an end");
        assert_eq!(out, b"");
    }
}
