//! The HTTP and gRPC listeners: accept connections, encrypt them, bound how long and how many, and stop in order.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use access::Peer;
use axum::Router;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::map_response;
use axum::response::Response;
use hyper::Request;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::rt::Executor;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep};
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tower::Service as _;

use crate::tls::Tls;

/// A client that has not sent its request's head after this long is a fault or an attack.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// A client that has sent nothing of a body that it announced for this long has gone, or means harm.
const BODY_IDLE: Duration = Duration::from_secs(30);
/// So many bytes of a body must come in a second, after as long as it may be idle: one that comes byte by byte holds a
/// connection and memory just as long as one that never comes.
const BODY_BYTES_PER_SECOND: u64 = 1024;
/// A client that has taken nothing of its answer for this long has gone, or means harm: the answer holds memory. Some who
/// read rows look at them for a while in between.
const ANSWER_IDLE: Duration = Duration::from_secs(120);
/// So many bytes of an answer must be taken in each second for which it waits for its reader beyond that.
const ANSWER_BYTES_PER_SECOND: u64 = 1024;
/// An answer is given to the connection in pieces of this size: what a piece waits for is seen, and ended.
const PIECE_BYTES: usize = 64 << 10;
/// A connection without requests is closed after this long; over HTTP/1.1 already when no head has come in time.
const CONNECTION_IDLE: Duration = Duration::from_secs(300);
/// How often the other end of an HTTP/2 connection is asked whether it is still there, and how long it may take to say so:
/// one that pauses while it reads does not hear the question.
const PING: (Duration, Duration) = (Duration::from_secs(30), ANSWER_IDLE);
/// Requests under way get this long to end when the server stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// Most connections at a time; further ones wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 8192;
/// The part of the memory limit that the heads of all connections may take.
const HEADS_PARTS: usize = 4;
/// Seconds after which a refused request may come again, unless the refusal says otherwise.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("1");
/// The largest head: long PromQL queries travel in URLs.
const HEAD_BYTES_MAX: usize = 128 << 10;

/// How many connections a listener takes: each may hold a head before anybody knows whose it is.
pub fn connections_max(memory_limit: usize) -> usize {
    (memory_limit / HEADS_PARTS / HEAD_BYTES_MAX).clamp(64, CONNECTIONS_MAX)
}

/// Serves `router` over HTTP/1.1 and HTTP/2, encrypted if there is `tls`, until `shutdown`, then lets requests under way
/// end. At most so many `connections` are open at a time.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    tls: Option<Arc<Tls>>,
    connections: usize,
    shutdown: CancellationToken,
) {
    let router = router.layer(map_response(completed));
    let slots = Arc::new(Semaphore::new(connections));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = accept(&listener, &slots) => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let (stream, peer, slot) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Too many open files, mostly: without a pause the loop would spin on the same connection.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (router, tls, shutdown) = (router.clone(), tls.clone(), shutdown.clone());
        connections.spawn(async move {
            match tls {
                None => connection(stream, peer, router, shutdown).await,
                Some(tls) => match tls.accept(stream).await {
                    Ok(stream) => connection(stream, peer, router, shutdown).await,
                    Err(error) => tracing::debug!(%error, %peer, "TLS handshake failed"),
                },
            }
            drop(slot);
        });
    }
    drop(listener);
    let drained = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(DRAIN_TIMEOUT, drained).await;
    connections.shutdown().await;
}

async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> std::io::Result<(TcpStream, SocketAddr, Option<tokio::sync::OwnedSemaphorePermit>)> {
    // The semaphore is never closed, so a permit always comes.
    let slot = Arc::clone(slots).acquire_owned().await.ok();
    let (stream, peer) = listener.accept().await?;
    stream.set_nodelay(true)?;
    Ok((stream, peer, slot))
}

/// What every answer says: when to come again after a refusal, and to browsers that labels are hostile text and nothing
/// here is a page.
async fn completed(mut response: Response) -> Response {
    let refused = response.status() == StatusCode::SERVICE_UNAVAILABLE;
    let headers = response.headers_mut();
    if refused {
        headers.entry(header::RETRY_AFTER).or_insert(RETRY_AFTER_SECONDS);
    }
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let policy = HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'");
    headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    response
}

async fn connection(
    stream: impl AsyncRead + AsyncWrite + Send + 'static,
    peer: SocketAddr,
    router: Router,
    shutdown: CancellationToken,
) {
    let activity = Arc::new(Activity::default());
    let serving = Arc::clone(&activity);
    let service = service_fn(move |mut request: Request<Incoming>| {
        let underway = Underway::new(&serving);
        request.extensions_mut().insert(Peer(peer.ip()));
        // A router is always ready.
        let response = router.clone().call(request.map(Awaited::new));
        async move { Ok::<_, Infallible>(response.await?.map(|body| Answer::new(body, underway))) }
    });
    let mut builder = auto::Builder::new(Streams);
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(HEAD_BYTES_MAX);
    builder.http2().timer(TokioTimer::new()).max_header_list_size(HEAD_BYTES_MAX as u32).max_concurrent_streams(128);
    builder.http2().keep_alive_interval(PING.0).keep_alive_timeout(PING.1);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(ANSWER_IDLE));
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(Box::pin(stream)), service));
    tokio::select! {
        result = connection.as_mut() => report(result),
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            report(connection.await);
        }
        // Before there is a request nobody knows which version of HTTP it will be, and whose limits hold.
        () = activity.idle() => {
            connection.as_mut().graceful_shutdown();
            // One may have come at this moment.
            let ended = async {
                tokio::time::sleep(DRAIN_TIMEOUT).await;
                activity.idle().await;
            };
            tokio::select! {
                result = connection => report(result),
                () = ended => tracing::debug!(%peer, "no request in time"),
            }
        }
        () = activity.stalled.cancelled() => tracing::debug!(%peer, "an answer was not read in time"),
    }
}

tokio::task_local! {
    /// Ends the HTTP/2 stream whose task this is.
    static STREAM: CancellationToken;
}

/// Runs the streams of an HTTP/2 connection, each until its [`STREAM`] is canceled: that resets it and no other.
#[derive(Clone)]
struct Streams;

impl<S: Future<Output: Send> + Send + 'static> Executor<S> for Streams {
    fn execute(&self, stream: S) {
        let end = CancellationToken::new();
        let stream = STREAM.scope(end.clone(), stream);
        tokio::spawn(async move { end.run_until_cancelled(stream).await.is_some() });
    }
}

/// What the requests of a connection are at.
#[derive(Default)]
struct Activity {
    requests: Mutex<Requests>,
    /// Canceled when an answer over HTTP/1.1 waits for its reader for too long.
    stalled: CancellationToken,
}

struct Requests {
    underway: usize,
    /// When the last one ended, or the connection began.
    last: Instant,
    /// How long there may be none.
    patience: Duration,
}

impl Default for Requests {
    fn default() -> Self {
        Self { underway: 0, last: Instant::now(), patience: HEAD_TIMEOUT }
    }
}

impl Activity {
    /// Waits until there has been no request for too long.
    async fn idle(&self) {
        loop {
            let until = {
                let requests = self.requests.lock();
                let from = if requests.underway > 0 { Instant::now() } else { requests.last };
                from + requests.patience
            };
            if until <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(until).await;
        }
    }
}

/// A request, until its answer is sent.
struct Underway(Arc<Activity>);

impl Underway {
    fn new(activity: &Arc<Activity>) -> Self {
        let mut requests = activity.requests.lock();
        requests.underway += 1;
        requests.patience = CONNECTION_IDLE;
        Self(Arc::clone(activity))
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        let mut requests = self.0.requests.lock();
        requests.underway -= 1;
        requests.last = Instant::now();
    }
}

/// An answer's body in pieces. When they wait for their reader for too long its HTTP/2 stream ends, or its HTTP/1.1
/// connection, and gives their memory back: over HTTP/2 neither the socket nor the body notices.
struct Answer<B> {
    body: B,
    /// What the body has given that is not handed on yet.
    rest: Bytes,
    reader: Arc<Mutex<Reader>>,
    underway: Underway,
    /// Runs while a piece waits.
    watch: Option<AbortOnDropHandle<()>>,
}

/// How soon an answer is taken.
#[derive(Default)]
struct Reader {
    /// Since when it is waited for.
    since: Option<Instant>,
    /// How long it was waited for before.
    waited: Duration,
    taken: u64,
}

impl Reader {
    /// How much longer is waited for it.
    fn patience(&self) -> Duration {
        let Some(since) = self.since else { return ANSWER_IDLE };
        let in_all = ANSWER_IDLE + Duration::from_secs(self.taken / ANSWER_BYTES_PER_SECOND);
        ANSWER_IDLE.min(in_all.saturating_sub(self.waited)).saturating_sub(since.elapsed())
    }
}

impl<B: Body> Answer<B> {
    fn new(body: B, underway: Underway) -> Self {
        Self { body, rest: Bytes::new(), reader: Arc::default(), underway, watch: None }
    }

    fn is_all_given(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    /// The next piece of what the body has given.
    fn piece(&mut self) -> Bytes {
        let piece = self.rest.split_to(self.rest.len().min(PIECE_BYTES));
        let mut reader = self.reader.lock();
        (reader.since, reader.taken) = (Some(Instant::now()), reader.taken + piece.len() as u64);
        piece
    }

    /// Ends the stream or the connection when the reader takes too long.
    fn watch(&mut self) {
        let stream = STREAM.try_with(CancellationToken::clone);
        // The socket shows whether the last piece waits, but not over HTTP/2.
        if stream.is_err() && self.is_all_given() {
            return;
        }
        let stalled = stream.unwrap_or_else(|_| self.underway.0.stalled.clone());
        let reader = Arc::clone(&self.reader);
        let watch = async move {
            loop {
                let patience = reader.lock().patience();
                if patience.is_zero() {
                    return stalled.cancel();
                }
                tokio::time::sleep(patience).await;
            }
        };
        self.watch.get_or_insert_with(|| AbortOnDropHandle::new(tokio::spawn(watch)));
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Answer<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        {
            let mut reader = self.reader.lock();
            if let Some(since) = reader.since.take() {
                reader.waited += since.elapsed();
            }
        }
        if self.rest.is_empty() {
            let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
            match frame.map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(data))) => self.rest = data,
                Some(Ok(Err(trailers))) => return Poll::Ready(Some(Ok(trailers))),
                Some(Err(e)) => return Poll::Ready(Some(Err(e))),
                None => return Poll::Ready(None),
            }
        }
        let piece = self.piece();
        self.watch();
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.is_all_given()
    }

    fn size_hint(&self) -> SizeHint {
        let (hint, rest) = (self.body.size_hint(), self.rest.len() as u64);
        let mut out = SizeHint::new();
        out.set_lower(hint.lower() + rest);
        if let Some(upper) = hint.upper() {
            out.set_upper(upper + rest);
        }
        out
    }
}

/// A request's body, which fails when nothing comes of it for too long, or too little.
struct Awaited<B> {
    body: B,
    begun: Instant,
    received: u64,
    /// Until when something must come.
    patience: Option<Pin<Box<Sleep>>>,
}

impl<B> Awaited<B> {
    fn new(body: B) -> Self {
        Self { body, begun: Instant::now(), received: 0, patience: None }
    }

    fn deadline(&self) -> Instant {
        let idle = Instant::now() + BODY_IDLE;
        idle.min(self.begun + BODY_IDLE + Duration::from_secs(self.received / BODY_BYTES_PER_SECOND))
    }
}

impl<B> Body for Awaited<B>
where
    B: Body<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Unpin,
{
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(frame) => {
                let data = frame.as_ref().and_then(|f| f.as_ref().ok()?.data_ref());
                self.received += data.map_or(0, |data| data.len() as u64);
                self.patience = None;
                Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
            }
            Poll::Pending => {
                let deadline = self.deadline();
                let patience = self.patience.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
                ready!(patience.as_mut().poll(cx));
                Poll::Ready(Some(Err(format!(
                    "nothing came for {} s, or fewer than {BODY_BYTES_PER_SECOND} bytes a second",
                    BODY_IDLE.as_secs()
                )
                .into())))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A connection that ends early is the client's affair; it is worth a line only to somebody who looks for it.
fn report(result: Result<(), Box<dyn std::error::Error + Send + Sync>>) {
    if let Err(error) = result {
        tracing::debug!(error, "connection ended early");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A body of so many pieces, one each second, then none for as long as given.
    struct Drip {
        pieces: usize,
        bytes: usize,
        then: Duration,
        pause: Option<Pin<Box<Sleep>>>,
    }

    impl Body for Drip {
        type Data = Bytes;
        type Error = std::io::Error;

        fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<std::io::Result<Frame<Bytes>>>> {
            let length = if self.pieces == 0 { self.then } else { Duration::from_secs(1) };
            let pause = self.pause.get_or_insert_with(|| Box::pin(tokio::time::sleep(length)));
            ready!(pause.as_mut().poll(cx));
            self.pause = None;
            let more = self.pieces.checked_sub(1);
            self.pieces = more.unwrap_or(0);
            Poll::Ready(more.map(|_| Ok(Frame::data(Bytes::from(vec![0; self.bytes])))))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_hardly_comes_is_given_up() {
        let read = async |pieces, bytes, then| {
            let (begun, then) = (Instant::now(), Duration::from_secs(then));
            let body = axum::body::Body::new(Awaited::new(Drip { pieces, bytes, then, pause: None }));
            (axum::body::to_bytes(body, usize::MAX).await.is_ok(), begun.elapsed().as_secs())
        };
        assert_eq!(read(100, 2048, 0).await, (true, 100));
        assert_eq!(read(0, 0, 3600).await, (false, 30));
        assert_eq!(read(5, 1 << 20, 3600).await, (false, 35));
        assert_eq!(read(100_000, 1, 0).await, (false, 30));
    }

    /// A reader that takes a piece after each of these pauses, seconds. Gives how many it got and whether its connection
    /// was ended meanwhile.
    async fn taken(bytes: usize, pauses: &[u64]) -> (usize, bool) {
        let activity = Arc::new(Activity::default());
        let body = axum::body::Body::from(vec![7u8; bytes]);
        let mut answer = Answer::new(body, Underway::new(&activity));
        assert_eq!(answer.size_hint().exact(), Some(bytes as u64));
        let mut pieces = 0;
        for pause in pauses {
            tokio::time::sleep(Duration::from_secs(*pause)).await;
            if activity.stalled.is_cancelled() {
                return (pieces, true);
            }
            let piece = std::future::poll_fn(|cx| Pin::new(&mut answer).poll_frame(cx)).await;
            let Some(piece) = piece else { break };
            let piece = piece.expect("a piece").into_data().expect("data");
            assert!(piece.len() <= PIECE_BYTES);
            pieces += 1;
            if answer.is_all_given() {
                break;
            }
        }
        (pieces, activity.stalled.is_cancelled())
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_hardly_read_ends_its_connection() {
        assert_eq!(taken(10, &[0]).await, (1, false));
        assert_eq!(taken(PIECE_BYTES, &[0]).await, (1, false));
        assert_eq!(taken(3 * PIECE_BYTES, &[0, 100, 100]).await, (3, false));
        assert_eq!(taken(3 * PIECE_BYTES, &[0, 121, 0]).await, (1, true));
        // At 64 bytes a second, which is below the least; the first 120 seconds are free.
        let slow = taken(100 * PIECE_BYTES, &[119; 100]).await;
        assert!(slow.0 < 5 && slow.1, "{slow:?}");
        assert_eq!(taken(100 * PIECE_BYTES, &[60; 100]).await, (100, false));
    }

    /// Over HTTP/2 nothing else shows that the only piece waits; and no other stream ends with it.
    #[tokio::test(start_paused = true)]
    async fn a_stream_that_is_not_read_ends_alone() {
        let activity = Arc::new(Activity::default());
        let (ended_to, ended) = tokio::sync::oneshot::channel::<()>();
        let mut answer = Answer::new(axum::body::Body::from("a"), Underway::new(&activity));
        Streams.execute(async move {
            let _ended = ended_to;
            let piece = std::future::poll_fn(|cx| Pin::new(&mut answer).poll_frame(cx)).await;
            assert!(piece.is_some_and(|piece| piece.is_ok()));
            std::future::pending::<()>().await;
        });
        let begun = Instant::now();
        assert!(ended.await.is_err(), "the stream is dropped");
        assert_eq!(begun.elapsed(), ANSWER_IDLE);
        assert!(!activity.stalled.is_cancelled());
        assert_eq!(activity.requests.lock().underway, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_without_requests_is_idle() {
        let activity = Arc::new(Activity::default());
        let begun = Instant::now();
        activity.idle().await;
        assert_eq!(begun.elapsed(), HEAD_TIMEOUT);
        let underway = Underway::new(&activity);
        let end = async {
            tokio::time::sleep(Duration::from_secs(1000)).await;
            drop(underway);
        };
        let begun = Instant::now();
        tokio::join!(activity.idle(), end);
        assert!((1300..=1600).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    }
}
