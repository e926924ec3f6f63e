//! Looks at what clients send before `pgwire` parses it, which panics on a length or a count that lies.
//!
//! Messages go on whole or not at all, one at a time: whatever parses them never sees a message that ends early, that
//! has something behind its end, or half of one. The layouts are those of PostgreSQL's protocol 3 ("Message Formats").
//!
//! Until a message is whole its bytes are kept, so it must come within a time, and those of a large one are reserved in
//! the engine's account until the message is answered.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BytesMut;
use engine::memory::Kind;
use engine::{Memory, Reservation};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use crate::error::{Result, SqlError};
use crate::limits::TEXT_BYTES_MAX;

/// How much is read at a time.
pub const READ_BYTES: usize = 8192;

/// Largest message with a statement: its text, a name, and the types of as many parameters as the protocol can count.
const STATEMENT_BYTES_MAX: usize = TEXT_BYTES_MAX + (512 << 10);
/// Largest message with the values of parameters, which are seldom large.
const VALUES_BYTES_MAX: usize = 16 << 20;
/// Largest of all other messages, and of all from a client that is not known yet, as in PostgreSQL.
const OTHER_BYTES_MAX: usize = 10_000;

/// Up to here nothing is reserved for a message.
const SMALL_BYTES: usize = 16 << 10;
/// A message's bytes are kept here and, once they are handed on, by who parses them.
const COPIES: usize = 2;
/// A message that has begun must be whole after this long.
const WHOLE_WITHIN: Duration = Duration::from_secs(30);
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
    /// For a large message; `None` until the client is known, which may send none before.
    memory: Option<Reservation>,
    /// Until when a message that has begun must be whole.
    patience: Option<Pin<Box<Sleep>>>,
}

impl<S> Checked<S> {
    /// Nothing was read of the stream.
    pub fn new(inner: S) -> Self {
        Self { inner, buffer: BytesMut::new(), passed: 0, started: false, memory: None, patience: None }
    }

    /// The client is known and may send large messages, for which there is memory in this account.
    pub fn trust(&mut self, memory: &Memory) {
        self.memory = Some(memory.reserve(Kind::Bodies));
    }

    /// Gives back what the last message took, if it was a large one, and says so.
    pub fn answered(&mut self) -> bool {
        let Some(memory) = self.memory.as_mut().filter(|m| m.bytes() > 0) else { return false };
        self.buffer = BytesMut::from(&self.buffer[..]);
        memory.shrink_to(0);
        true
    }

    /// Keeps more bytes of a message.
    fn keep(&mut self, bytes: &[u8]) -> Result<()> {
        let length = self.buffer.len() + bytes.len();
        if let Some(memory) = self.memory.as_mut().filter(|_| length > SMALL_BYTES) {
            let more = (COPIES * length).saturating_sub(memory.bytes());
            memory.grow(more).map_err(|e| SqlError::no_memory(&e))?;
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Checked<S> {
    /// What is refused is an error that holds a [`SqlError`].
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if this.passed > 0 {
                let length = this.passed.min(out.remaining());
                out.put_slice(&this.buffer.split_to(length));
                this.passed -= length;
                return Poll::Ready(Ok(()));
            }
            let is_known = this.memory.is_some();
            if let Some(length) = first_message(&this.buffer, this.started, is_known).map_err(refused)? {
                (this.passed, this.started, this.patience) = (length, true, None);
                continue;
            }
            let mut space = [0; READ_BYTES];
            let mut chunk = ReadBuf::new(&mut space);
            match Pin::new(&mut this.inner).poll_read(cx, &mut chunk) {
                Poll::Ready(read) => read?,
                Poll::Pending if this.buffer.is_empty() => return Poll::Pending,
                Poll::Pending => {
                    let patience = this.patience.get_or_insert_with(|| Box::pin(sleep(WHOLE_WITHIN)));
                    ready!(patience.as_mut().poll(cx));
                    let seconds = WHOLE_WITHIN.as_secs();
                    return Poll::Ready(Err(refused(invalid(format!("message was not whole after {seconds} s")))));
                }
            }
            if chunk.filled().is_empty() {
                // Half a message that nobody will complete goes with the connection.
                return Poll::Ready(Ok(()));
            }
            this.keep(chunk.filled()).map_err(refused)?;
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
/// 54000 for a statement that is too long, 08P01 for another message that is too large or one that does not hold together.
fn first_message(bytes: &[u8], started: bool, is_known: bool) -> Result<Option<usize>> {
    let kind = if started { bytes.first().copied() } else { None };
    let offset = usize::from(started);
    let Some(length) = bytes.get(offset..offset + 4) else { return Ok(None) };
    let length = u32::from_be_bytes([length[0], length[1], length[2], length[3]]) as usize;
    let most = match kind {
        Some(b'Q' | b'P') if is_known => STATEMENT_BYTES_MAX,
        Some(b'B') if is_known => VALUES_BYTES_MAX,
        _ => OTHER_BYTES_MAX,
    };
    if length > most && most == STATEMENT_BYTES_MAX {
        let told = format!("statement of a message of {length} bytes is too long; {TEXT_BYTES_MAX} are allowed");
        return Err(SqlError::new("54000", told));
    }
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

fn invalid(message: String) -> SqlError {
    SqlError::new("08P01", message)
}

fn refused(e: SqlError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, e)
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
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn typed(kind: u8, body: &[u8]) -> Vec<u8> {
        [&[kind][..], &(body.len() as u32 + 4).to_be_bytes(), body].concat()
    }

    fn startup(body: &[u8]) -> Vec<u8> {
        [&(body.len() as u32 + 4).to_be_bytes(), body].concat()
    }

    fn check(bytes: &[u8], started: bool, expected: Result<Option<usize>, &str>) {
        let found = first_message(bytes, started, started).map_err(|e| e.to_string());
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
        check(&[b'S', 0, 0, 0, 3], true, Err("message declares 3 bytes; 4 to 10000 are allowed"));
        check(&[b'S', 0, 0, 0x40, 0], true, Err("message declares 16384 bytes; 4 to 10000 are allowed"));
        check(&[b'B', 0xff, 0, 0, 0], true, Err("message declares 4278190080 bytes; 4 to 16777216 are allowed"));
        check(&[b'B', 1, 0, 0, 0], true, Ok(None));
        for kind in [b'Q', b'P'] {
            check(&[kind, 0, 0x18, 0, 0], true, Ok(None));
            let long = "statement of a message of 1572865 bytes is too long; 1048576 are allowed";
            check(&[kind, 0, 0x18, 0, 1], true, Err(long));
            check(&[kind, 0, 0, 0, 3], true, Err("message declares 3 bytes; 4 to 1572864 are allowed"));
        }
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
        let large = typed(b'Q', &[&[b'x'; OTHER_BYTES_MAX][..], b"\0"].concat());
        let bytes = [&start[..], &large].concat();
        let end = Checked::new(&bytes[..]).read_to_end(&mut Vec::new()).await.expect_err("a large message");
        assert_eq!(end.to_string(), "message declares 10005 bytes; 4 to 10000 are allowed");
        let mut checked = Checked::new(&bytes[..]);
        checked.trust(&Memory::new(1 << 20));
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

    #[tokio::test]
    async fn memory_is_reserved_for_what_is_large() {
        let memory = Memory::new(16 << 20);
        let (client, server) = tokio::io::duplex(1 << 20);
        let (_, mut client) = tokio::io::split(client);
        let mut checked = Checked::new(server);
        checked.trust(&memory);
        checked.started = true;
        let mut pass = async |bytes: &[u8], whole: bool| {
            client.write_all(bytes).await.expect("a client");
            let mut out = vec![0; bytes.len()];
            let passed = tokio::time::timeout(Duration::from_millis(50), checked.read_exact(&mut out)).await;
            assert_eq!(passed.is_ok(), whole);
            (memory.held(Kind::Bodies), checked.answered())
        };
        let small = typed(b'Q', &[&[b' '; SMALL_BYTES / 2][..], b"\0"].concat());
        assert_eq!(pass(&small, true).await, (0, false));
        let large = typed(b'Q', &[&[b' '; 400_000][..], b"\0"].concat());
        assert_eq!(pass(&large[..300_000], false).await, (600_000, true));
        assert_eq!(pass(&large[300_000..], true).await, (2 * large.len(), true));
        assert_eq!(memory.held(Kind::Bodies), 0);
    }

    #[tokio::test]
    async fn memory_that_is_not_there_is_refused() {
        let memory = Memory::new(1 << 20);
        let mut bytes = typed(b'Q', &[&[b' '; 400_000][..], b"\0"].concat());
        bytes.truncate(300_000);
        let mut checked = Checked::new(&bytes[..]);
        checked.trust(&memory);
        checked.started = true;
        let refused = checked.read_to_end(&mut Vec::new()).await.expect_err("no memory");
        assert_eq!(refused.downcast::<SqlError>().map(|e| e.code).ok(), Some("53200"));
        drop(checked);
        assert_eq!(memory.held(Kind::Bodies), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn half_a_message_is_waited_for_as_long_as_one_should_take() {
        let (mut client, server) = tokio::io::duplex(1 << 10);
        let mut checked = Checked::new(server);
        checked.started = true;
        let mut out = [0; 6];
        // Nothing may come for as long as it likes.
        let idle = tokio::time::timeout(Duration::from_secs(3600), checked.read_exact(&mut out)).await;
        assert!(idle.is_err());
        let begun = tokio::time::Instant::now();
        let trickle = async {
            for byte in typed(b'Q', &[b' '; 100]) {
                client.write_all(&[byte]).await.expect("a client");
                sleep(Duration::from_secs(1)).await;
            }
        };
        let refused = tokio::select! {
            read = checked.read_exact(&mut out) => read.expect_err("it never ends"),
            () = trickle => panic!("it was waited for"),
        };
        assert_eq!((refused.to_string().as_str(), begun.elapsed().as_secs()), ("message was not whole after 30 s", 30));
    }
}
