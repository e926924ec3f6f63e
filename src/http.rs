//! The HTTP and gRPC listeners: accept connections, encrypt them, bound how long and how many, and stop in order.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use access::Peer;
use axum::Router;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::map_response;
use axum::response::Response;
use hyper::Request;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;
use tower::Layer as _;
use tower::util::MapRequestLayer;

use crate::tls::Tls;

/// A client that has not sent its request's head after this long is a fault or an attack.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// A client that has sent nothing of a body that it announced for this long has gone, or means harm.
const BODY_IDLE: Duration = Duration::from_secs(30);
/// So many bytes of a body must come in a second, after as long as it may be idle: one that comes byte by byte holds a
/// connection and memory just as long as one that never comes.
const BODY_BYTES_PER_SECOND: u64 = 1024;
/// Requests under way get this long to end when the server stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// Most connections at a time; further ones wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 8192;
/// Seconds after which a refused request may come again, unless the refusal says otherwise.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("1");
/// The largest head: long PromQL queries travel in URLs.
const HEAD_BYTES_MAX: usize = 128 << 10;

/// Serves `router` over HTTP/1.1 and HTTP/2, encrypted if there is `tls`, until `shutdown`, then lets requests under way
/// end.
pub async fn serve(listener: TcpListener, router: Router, tls: Option<Arc<Tls>>, shutdown: CancellationToken) {
    let router = router.layer(map_response(completed));
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
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
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    peer: SocketAddr,
    router: Router,
    shutdown: CancellationToken,
) {
    let began = Arc::new(AtomicBool::new(false));
    let begins = Arc::clone(&began);
    let with_peer = MapRequestLayer::new(move |mut request: Request<Incoming>| {
        begins.store(true, Ordering::Relaxed);
        request.extensions_mut().insert(Peer(peer.ip()));
        request.map(Awaited::new)
    });
    let service = TowerToHyperService::new(with_peer.layer(router));
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(HEAD_BYTES_MAX);
    builder.http2().timer(TokioTimer::new()).max_header_list_size(HEAD_BYTES_MAX as u32).max_concurrent_streams(128);
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
    // Before there is a request nobody knows which version of HTTP it will be, and whose limits hold.
    let no_head = async {
        tokio::time::sleep(HEAD_TIMEOUT).await;
        if began.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        result = connection.as_mut() => report(result),
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            report(connection.await);
        }
        () = no_head => tracing::debug!(%peer, "no request in time"),
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
}
