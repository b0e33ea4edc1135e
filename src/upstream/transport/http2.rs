//! HTTP/2 to endpoints, with the library that Pingora also uses.
//!
//! Pingora's own client hides the library's handles: it loses interim responses and cannot send request trailers.
//! So exchanges use [`Http2`], which Pingora's proxy calls as a custom protocol. It pools connections like Pingora:
//! shared by as many streams as both sides allow, and closed after being idle for a time.

use std::any::Any;
use std::collections::HashMap;
use std::future::poll_fn;
use std::io::ErrorKind;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::task::AtomicWaker;
use futures::{Stream as Messages, stream};
use h2::client::{Builder, ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use http::uri::{Authority, PathAndQuery, Uri};
use http::{HeaderMap, HeaderName, Request, StatusCode, header};
use pingora::connectors::TransportConnector;
use pingora::connectors::http::custom::{Connection as Connected, Connector};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::http::custom::{BodyWrite, CustomMessageWrite, client};
use pingora::protocols::l4::socket::SocketAddr;
use pingora::protocols::{Digest, Stream, UniqueIDType};
use pingora::upstreams::peer::{ALPN, HttpPeer, Peer};
use pingora::{Error, ErrorType, OrErr, Result, RetryType};

use super::limit::{connected, take_limit};
use crate::eventloop::worker;
use crate::party::pauses::Pauses;
use crate::party::wait::{ClientWatch, Ended, FAR, NoClient, Wait, within};

/// Pingora's default window.
const WINDOW_BYTES: u32 = 8 << 20;
/// Endpoints may send larger frames than the protocol's minimum.
const FRAME_BYTES: u32 = 64 << 10;

/// Longest idle time of a connection. Connections with a shorter limit than the next constant are not kept.
const MOST_IDLE: Duration = Duration::from_secs(24 * 3600);
const LEAST_IDLE: Duration = Duration::from_millis(10);

/// Connection-specific fields of HTTP/1 that are forbidden in HTTP/2 (RFC 9113 §8.2.2), and other hop-by-hop
/// fields.
const OF_HTTP1: [HeaderName; 9] = [
    header::TRANSFER_ENCODING,
    header::CONNECTION,
    header::UPGRADE,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::HOST,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("http2-settings"),
];

/// The trailers of a request, set when its body has been sent. The slot is in the request's extensions.
pub type RequestTrailers = Arc<Mutex<Option<HeaderMap>>>;

/// Controls the stream of an attempt from elsewhere in its task. It is in the request's extensions.
#[derive(Clone, Default)]
pub struct StreamHandle(Arc<Shared>);

#[derive(Default)]
struct Shared {
    /// The exchange no longer waits for the endpoint.
    over: AtomicBool,
    /// The response is complete: the rest of the request is not needed.
    unwanted: AtomicBool,
    reader: AtomicWaker,
    /// The send side of the stream, while the body is sent.
    send: Mutex<Option<SendStream<Bytes>>>,
    /// The worker of its connection.
    driver: OnceLock<Driver>,
}

/// The pauses of the worker that drives a connection, once it does.
type Driver = Arc<OnceLock<&'static Pauses>>;

/// Forebay cancelled the request: this says nothing about the endpoint.
pub const HUNG_UP: ErrorType = ErrorType::new("the client is gone");

impl StreamHandle {
    /// Cancels the wait for the endpoint.
    pub fn hang_up(&self) {
        self.0.over.store(true, Ordering::Release);
        self.0.reader.wake();
    }

    /// The pauses of the worker that drives its connection, which may be another one than the exchange's.
    pub fn driver(&self) -> Option<&'static Pauses> {
        self.0.driver.get()?.get().copied()
    }

    /// Discards the rest of the request.
    pub fn end_request(&self) {
        self.0.unwanted.store(true, Ordering::Release);
    }

    /// Ready when the endpoint has accepted all passed bytes of the request, or will accept no more.
    ///
    /// A chunk is passed to the library as a whole, and the next one waits here. Waiting at the hand-over would
    /// also block the response: Pingora does one after the other, and an endpoint may respond before it has read
    /// the whole request.
    pub fn poll_taken(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut send = self.send();
        let Some(send) = send.as_mut().filter(|_| !self.is_over()) else { return Poll::Ready(()) };
        // One byte more than the bytes that already wait.
        send.reserve_capacity(1);
        while send.capacity() == 0 {
            let Some(Ok(_)) = ready!(send.poll_capacity(cx)) else { return Poll::Ready(()) };
        }
        Poll::Ready(())
    }

    fn is_over(&self) -> bool {
        self.0.over.load(Ordering::Acquire) || self.0.unwanted.load(Ordering::Acquire)
    }

    fn send(&self) -> MutexGuard<'_, Option<SendStream<Bytes>>> {
        // Only one task uses it, so the lock is never contended.
        self.0.send.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Completes once the wait for the response is cancelled.
struct Ends<'e>(&'e StreamHandle);

impl ClientWatch for Ends<'_> {
    type Left = Box<Error>;

    fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<Box<Error>> {
        let Shared { reader, over, .. } = &*self.0.0;
        reader.register(cx.waker());
        if !over.load(Ordering::Acquire) {
            return Poll::Pending;
        }
        Poll::Ready(Error::explain(HUNG_UP, "the exchange is over"))
    }
}

/// Connections to HTTP/2 endpoints.
pub struct Http2 {
    transport: Arc<TransportConnector>,
    pool: Arc<Pool>,
}

/// The pool of connections.
struct Pool {
    kept: Mutex<Kept>,
    /// Limit on idle connections.
    idle_max: usize,
}

#[derive(Default)]
struct Kept {
    /// By connection key.
    connections: HashMap<u64, Vec<Arc<Connection>>>,
    /// Number of idle connections.
    idle: usize,
}

/// One connection.
struct Connection {
    key: u64,
    send: SendRequest<Bytes>,
    /// Limit on its streams.
    most: usize,
    usage: Mutex<Usage>,
    /// Maximum idle time.
    idle: Duration,
    tls: bool,
    /// Its endpoint's address, for requests without a host.
    address: String,
    socket: UniqueIDType,
    digest: Digest,
    driver: Driver,
}

/// The use of a connection; changed only under the pool's lock.
struct Usage {
    streams: usize,
    /// When its last stream ended.
    idle_since: Option<Instant>,
    /// Whether it accepts no further streams.
    over: bool,
}

impl Connection {
    fn usage(&self) -> MutexGuard<'_, Usage> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Held for one look-up.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pooled connection with room for a stream, which is reserved.
    fn find(&self, key: u64) -> Option<Arc<Connection>> {
        let Kept { connections, idle } = &mut *self.kept();
        let free = |connection: &&Arc<Connection>| {
            let usage = connection.usage();
            !usage.over && usage.streams < connection.most.min(connection.send.current_max_send_streams())
        };
        let connection = connections.get(&key)?.iter().find(free)?;
        let mut usage = connection.usage();
        usage.streams += 1;
        *idle -= usize::from(usage.idle_since.take().is_some());
        Some(Arc::clone(connection))
    }

    fn keep(&self, connection: &Arc<Connection>) {
        self.kept().connections.entry(connection.key).or_default().push(Arc::clone(connection));
    }

    /// Removes a connection from the pool. Its active streams continue; it is closed with the last one.
    fn retire(&self, connection: &Arc<Connection>) {
        self.kept().retire(connection);
    }

    /// A stream of this connection has ended.
    fn leave(&self, connection: &Arc<Connection>) {
        let mut kept = self.kept();
        let mut usage = connection.usage();
        usage.streams -= 1;
        if usage.streams > 0 || usage.over {
            return;
        }
        usage.idle_since = Some(Instant::now());
        drop(usage);
        kept.idle += 1;
        // A connection without idle time is closed at once.
        if kept.idle > self.idle_max || connection.idle < LEAST_IDLE {
            kept.retire(connection);
        }
    }

    /// Closes a connection whose idle time is over; otherwise returns the remaining time.
    fn expire(&self, connection: &Arc<Connection>) -> Option<Duration> {
        let mut kept = self.kept();
        let unused = connection.usage().idle_since.map_or(Duration::ZERO, |since| since.elapsed());
        let left = connection.idle.saturating_sub(unused);
        if left.is_zero() {
            kept.retire(connection);
            return None;
        }
        Some(left)
    }
}

impl Kept {
    fn retire(&mut self, connection: &Arc<Connection>) {
        let mut usage = connection.usage();
        if std::mem::replace(&mut usage.over, true) {
            return;
        }
        self.idle -= usize::from(usage.idle_since.take().is_some());
        if let Some(kept) = self.connections.get_mut(&connection.key) {
            kept.retain(|one| !Arc::ptr_eq(one, connection));
            if kept.is_empty() {
                self.connections.remove(&connection.key);
            }
        }
    }
}

impl Http2 {
    /// A pool of at most this many idle connections, which the connector makes.
    pub fn new(transport: Arc<TransportConnector>, idle_max: usize) -> Http2 {
        let pool = Pool { kept: Mutex::default(), idle_max };
        Http2 { transport, pool: Arc::new(pool) }
    }

    async fn connect(&self, peer: &HttpPeer) -> Result<Arc<Connection>> {
        let mut peer = peer.clone();
        peer.options.alpn = ALPN::H2;
        let limit = take_limit(&mut peer);
        let stream = connected(limit, self.transport.new_stream(&peer)).await?;
        let digest = Digest {
            ssl_digest: stream.get_ssl_digest(),
            timing_digest: stream.get_timing_digest(),
            proxy_digest: stream.get_proxy_digest(),
            socket_digest: stream.get_socket_digest(),
        };
        let socket = stream.id();
        let begun = Builder::new()
            .enable_push(false)
            .initial_max_send_streams(peer.options.max_h2_streams)
            .max_concurrent_streams(1)
            .max_frame_size(FRAME_BYTES)
            .initial_window_size(peer.options.h2_stream_window_size.unwrap_or(WINDOW_BYTES))
            .initial_connection_window_size(peer.options.h2_connection_window_size.unwrap_or(WINDOW_BYTES))
            .handshake::<_, Bytes>(stream);
        let begun = within(limit, NoClient::Within, begun).await;
        let begun = begun.ok_or_else(|| Error::explain(ErrorType::ConnectTimedout, "beginning HTTP/2"))?;
        let (send, driver) = begun.or_err(ErrorType::HandshakeError, "beginning HTTP/2")?;
        let connection = Arc::new(Connection {
            key: peer.reuse_hash(),
            send,
            most: peer.options.max_h2_streams,
            usage: Mutex::new(Usage { streams: 1, idle_since: None, over: false }),
            idle: peer.options.idle_timeout.unwrap_or(MOST_IDLE).min(MOST_IDLE),
            tls: peer.is_tls(),
            address: peer._address.to_string(),
            socket,
            digest,
            driver: Driver::default(),
        });
        self.pool.keep(&connection);
        let (pool, weak, driven_by) = (self.pool.clone(), Arc::downgrade(&connection), connection.driver.clone());
        // On this worker, whose event loop watches the socket: with another one, the connection would depend on both.
        tokio::spawn(async move {
            if let Some(pauses) = worker::pauses() {
                let _ = driven_by.set(pauses);
            }
            drive(driver, pool, weak).await;
        });
        Ok(connection)
    }

    /// Opens a stream on this connection in the reserved place; `None` if it accepts no more.
    async fn open(&self, connection: Arc<Connection>, patience: Duration) -> Option<Exchange> {
        let wait = Wait::at_most(patience, NoClient::Within).beside(connection.driver.get().copied());
        match wait.on(connection.send.clone().ready()).await.in_time() {
            Some(Ok(send)) => Some(Exchange::new(connection, self.pool.clone(), send)),
            none => {
                let error = none.and_then(Result::err);
                tracing::debug!(?error, "an endpoint takes no further stream on this connection");
                self.pool.retire(&connection);
                self.pool.leave(&connection);
                None
            }
        }
    }
}

#[async_trait]
impl Connector for Http2 {
    type Session = Exchange;

    async fn get_http_session<P: Peer + Send + Sync + 'static>(&self, peer: &P) -> Result<(Connected<Exchange>, bool)> {
        let peer = (peer as &dyn Any).downcast_ref::<HttpPeer>();
        let peer = peer.ok_or_else(|| Error::explain(ErrorType::InternalError, "a peer of another kind"))?;
        let connection = self.connect(peer).await?;
        let opened = self.open(connection, patience(peer)).await;
        let opened = opened.ok_or_else(|| Error::explain(ErrorType::H2Error, "a new connection takes no stream"))?;
        Ok((Connected::Session(opened), false))
    }

    async fn reused_http_session<P: Peer + Send + Sync + 'static>(&self, peer: &P) -> Option<Exchange> {
        while let Some(connection) = self.pool.find(peer.reuse_hash()) {
            let opened = self.open(connection, patience(peer)).await;
            if opened.is_some() {
                return opened;
            }
        }
        None
    }

    async fn release_http_session<P: Peer + Send + Sync + 'static>(
        &self,
        session: Exchange,
        _peer: &P,
        _idle_timeout: Option<Duration>,
    ) {
        drop(session);
    }
}

/// Time limit for getting a stream to a peer.
fn patience<P: Peer>(peer: &P) -> Duration {
    peer.total_connection_timeout().unwrap_or(FAR)
}

/// Drives a connection until the endpoint closes it, or until its idle time is over.
async fn drive(driver: h2::client::Connection<Stream, Bytes>, pool: Arc<Pool>, connection: Weak<Connection>) {
    let mut driver = std::pin::pin!(driver);
    let mut next = connection.upgrade().and_then(|connection| pool.expire(&connection));
    loop {
        let tick = async {
            match next {
                Some(left) => tokio::time::sleep(left).await,
                // It closes when its last user drops it.
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ended = &mut driver => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection to an endpoint of HTTP/2 failed");
                }
                break;
            }
            () = tick => next = connection.upgrade().and_then(|connection| pool.expire(&connection)),
        }
    }
    if let Some(connection) = connection.upgrade() {
        pool.retire(&connection);
    }
}

/// One stream to an endpoint, as a Pingora session.
pub struct Exchange {
    connection: Arc<Connection>,
    pool: Arc<Pool>,
    send: SendRequest<Bytes>,
    body: Option<SendStream<Bytes>>,
    trailers: Option<RequestTrailers>,
    answer: Option<ResponseFuture>,
    header: Option<ResponseHeader>,
    incoming: Option<RecvStream>,
    /// The controls of the stream.
    handle: StreamHandle,
    read_timeout: Option<Duration>,
    write_timeout: Option<Duration>,
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.pool.leave(&self.connection);
    }
}

impl Exchange {
    fn new(connection: Arc<Connection>, pool: Arc<Pool>, send: SendRequest<Bytes>) -> Exchange {
        Exchange {
            connection,
            pool,
            send,
            body: None,
            trailers: None,
            answer: None,
            header: None,
            incoming: None,
            handle: StreamHandle::default(),
            read_timeout: None,
            write_timeout: None,
        }
    }

    /// Waits for the endpoint, within its time limit.
    async fn bounded<T>(&self, reading: impl Future<Output = Result<T>>) -> Result<T> {
        let driver = self.connection.driver.get().copied();
        let wait = Wait::at_most(self.read_timeout.unwrap_or(FAR), Ends(&self.handle)).beside(driver);
        match wait.on(reading).await {
            Ended::Done(read) => read,
            Ended::Left(why) => Err(why),
            Ended::Late => {
                // The whole connection may hang.
                self.pool.retire(&self.connection);
                Error::e_explain(ErrorType::ReadTimedout, "waiting for the endpoint")
            }
        }
    }
}

/// Sends bytes of a body as the other side gives credit; each wait for it is limited to `patience`. `end`: they are the
/// last ones. `reason` says why no client is watched.
///
/// # Errors
///
/// `WriteTimedout` if no credit comes in time, and others if the stream or its connection has ended.
pub async fn send_body(
    stream: &mut SendStream<Bytes>,
    mut data: Bytes,
    end: bool,
    patience: Option<Duration>,
    reason: NoClient,
) -> Result<()> {
    if data.is_empty() && end {
        return stream.send_data(data, true).or_err(ErrorType::WriteError, "ending a body over HTTP/2");
    }
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let room = within(patience.unwrap_or(FAR), reason, poll_fn(|cx| stream.poll_capacity(cx))).await;
        let room = room.ok_or_else(|| Error::explain(ErrorType::WriteTimedout, "no credit comes over HTTP/2"))?;
        let room = room.ok_or_else(|| Error::explain(ErrorType::H2Error, "the stream is over"))?;
        let part = data.split_to(room.or_err(ErrorType::H2Error, "while waiting for room")?.min(data.len()));
        let is_last = end && data.is_empty();
        stream.send_data(part, is_last).or_err(ErrorType::WriteError, "sending a body over HTTP/2")?;
    }
    Ok(())
}

/// The header in HTTP/2 form: no connection fields, and the host in `:authority` (RFC 9113 §8.3.1).
fn converted(mut request: RequestHeader, tls: bool, address: &str) -> Result<Request<()>> {
    let host = request.headers.get(header::HOST).cloned();
    for name in &OF_HTTP1 {
        request.remove_header(name);
    }
    if request.headers.get(header::TE).is_some_and(|te| te.as_bytes() != b"trailers") {
        request.remove_header(&header::TE);
    }
    let authority = match &host {
        Some(host) => Authority::try_from(host.as_bytes()),
        None => request.uri.authority().map_or_else(|| Authority::try_from(address), |named| Ok(named.clone())),
    };
    let path = request.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    let uri = Uri::builder()
        .scheme(if tls { "https" } else { "http" })
        .authority(authority.or_err(ErrorType::InvalidHTTPHeader, "the host of a request")?)
        .path_and_query(path)
        .build()
        .or_err(ErrorType::InvalidHTTPHeader, "the target of a request")?;
    request.set_uri(uri);
    request.set_version(http::Version::HTTP_2);
    let parts: http::request::Parts = request.into();
    Ok(Request::from_parts(parts, ()))
}

/// The error type for an error of the library. The library itself ends a stream or connection that violates HTTP/2
/// (RFC 9113 §5.4, §8.1.1): then the endpoint closed or reset nothing, and its response is malformed.
fn kind(error: &h2::Error, otherwise: ErrorType) -> ErrorType {
    if error.is_library() { ErrorType::InvalidHTTPHeader } else { otherwise }
}

/// An error while receiving a response.
fn broken(error: h2::Error, doing: &'static str) -> Box<Error> {
    Error::because(kind(&error, ErrorType::ReadError), doing, error)
}

/// An error before the response: it states whether the request may be sent again, since the endpoint cannot have
/// started it.
fn before_answer(error: h2::Error) -> Box<Error> {
    let refused = error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM);
    let ends = error.is_go_away() && error.reason() == Some(Reason::NO_ERROR);
    let unbegun = error.is_remote() && (refused || ends);
    let broken = error.get_io().map(std::io::Error::kind);
    let kind = kind(&error, if broken.is_some() { ErrorType::ReadError } else { ErrorType::H2Error });
    let mut told = Error::because(kind, "waiting for an answer of HTTP/2", error);
    if unbegun {
        told.retry = RetryType::Decided(true);
    } else if matches!(broken, Some(ErrorKind::ConnectionReset | ErrorKind::TimedOut | ErrorKind::BrokenPipe)) {
        // A reused connection may be stale.
        told.retry = RetryType::ReusedOnly;
    }
    told
}

/// The next item from an endpoint.
enum Next {
    Interim(http::Response<()>),
    Final(http::Response<RecvStream>),
}

#[async_trait]
impl client::Session for Exchange {
    async fn write_request_header(&mut self, mut request: Box<RequestHeader>, end: bool) -> Result<()> {
        self.trailers = request.extensions_mut().remove::<RequestTrailers>();
        if let Some(handle) = request.extensions_mut().remove::<StreamHandle>() {
            let _ = handle.0.driver.set(self.connection.driver.clone());
            self.handle = handle;
        }
        let request = converted(*request, self.connection.tls, &self.connection.address)?;
        let (answer, body) =
            self.send.send_request(request, end).or_err(ErrorType::H2Error, "sending a header over HTTP/2")?;
        (self.answer, self.body) = (Some(answer), Some(body));
        Ok(())
    }

    async fn write_request_body(&mut self, data: Bytes, end: bool) -> Result<()> {
        let Some(body) = &mut self.body else { return Ok(()) };
        send_body(body, data, end, self.write_timeout, NoClient::Within).await
    }

    async fn finish_request_body(&mut self) -> Result<()> {
        self.write_request_body(Bytes::new(), true).await
    }

    fn set_read_timeout(&mut self, timeout: Option<Duration>) {
        self.read_timeout = timeout;
    }

    fn set_write_timeout(&mut self, timeout: Option<Duration>) {
        self.write_timeout = timeout;
    }

    async fn read_response_header(&mut self) -> Result<()> {
        let Some(mut answer) = self.answer.take() else {
            return Error::e_explain(ErrorType::InternalError, "an answer is read twice");
        };
        let next = poll_fn(|cx| {
            // The library drops an interim response that is not polled before the final one.
            match ready!(answer.poll_informational(cx)) {
                Some(interim) => Poll::Ready(interim.map(Next::Interim).map_err(before_answer)),
                None => Pin::new(&mut answer).poll(cx).map(|last| last.map(Next::Final).map_err(before_answer)),
            }
        });
        match self.bounded(next).await? {
            Next::Interim(interim) if interim.status() == StatusCode::SWITCHING_PROTOCOLS => {
                return Error::e_explain(ErrorType::InvalidHTTPHeader, "101 over HTTP/2");
            }
            Next::Interim(interim) => {
                self.header = Some(ResponseHeader::from(interim.into_parts().0));
                self.answer = Some(answer);
            }
            Next::Final(last) => {
                let (head, incoming) = last.into_parts();
                self.header = Some(ResponseHeader::from(head));
                self.incoming = Some(incoming);
            }
        }
        Ok(())
    }

    async fn read_response_body(&mut self) -> Result<Option<Bytes>> {
        let Some(mut incoming) = self.incoming.take() else { return Ok(None) };
        let read = poll_fn(|cx| incoming.poll_data(cx));
        let piece =
            self.bounded(async { read.await.transpose().map_err(|error| broken(error, "reading over HTTP/2")) }).await;
        if let Ok(Some(piece)) = &piece {
            // An error means that the stream has ended; the next read reports it.
            let _ = incoming.flow_control().release_capacity(piece.len());
        }
        self.incoming = Some(incoming);
        piece
    }

    fn response_finished(&self) -> bool {
        self.incoming.as_ref().is_some_and(RecvStream::is_end_stream)
    }

    async fn check_response_end_or_error(&mut self, _header: bool) -> Result<bool> {
        let Some(incoming) = self.incoming.as_mut().filter(|incoming| incoming.is_end_stream()) else {
            return Ok(false);
        };
        // The library also returns this for failed streams; the next read tells the difference.
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match incoming.poll_data(&mut context) {
            Poll::Ready(None) => Ok(true),
            Poll::Ready(Some(Err(error))) => {
                Error::e_because(kind(&error, ErrorType::H2Error), "at the end of a stream", error)
            }
            Poll::Ready(Some(Ok(_))) | Poll::Pending => {
                Error::e_explain(ErrorType::H2Error, "data behind the end of a stream")
            }
        }
    }

    async fn read_trailers(&mut self) -> Result<Option<HeaderMap>> {
        let Some(mut incoming) = self.incoming.take() else { return Ok(None) };
        let read = poll_fn(|cx| incoming.poll_trailers(cx));
        let trailers = self.bounded(async { Ok(read.await) }).await?;
        self.incoming = Some(incoming);
        trailers.or_else(|error| {
            // The response is complete, and the rest of the request is not needed (RFC 9113 §8.1).
            let whole = error.is_remote() && error.reason() == Some(Reason::NO_ERROR);
            if whole { Ok(None) } else { Err(broken(error, "reading trailers")) }
        })
    }

    fn take_request_body_writer(&mut self) -> Option<Box<dyn BodyWrite>> {
        *self.handle.send() = Some(self.body.take()?);
        Some(Box::new(Body { handle: self.handle.clone(), ended: false, trailers: self.trailers.take() }))
    }

    async fn shutdown(&mut self, _code: u32, _context: &str) {
        if let Some(body) = &mut self.body {
            body.send_reset(Reason::CANCEL);
        }
    }

    fn response_header(&self) -> Option<&ResponseHeader> {
        self.header.as_ref()
    }

    fn was_upgraded(&self) -> bool {
        false
    }

    fn digest(&self) -> Option<&Digest> {
        Some(&self.connection.digest)
    }

    fn digest_mut(&mut self) -> Option<&mut Digest> {
        None
    }

    fn server_addr(&self) -> Option<&SocketAddr> {
        self.connection.digest.socket_digest.as_ref()?.peer_addr()
    }

    fn client_addr(&self) -> Option<&SocketAddr> {
        self.connection.digest.socket_digest.as_ref()?.local_addr()
    }

    fn fd(&self) -> UniqueIDType {
        self.connection.socket
    }

    // Custom messages belong to protocols other than HTTP. There are none here, but Pingora requires both ends.

    fn take_custom_message_reader(&mut self) -> Option<Box<dyn Messages<Item = Result<Bytes>> + Unpin + Send + Sync>> {
        Some(Box::new(stream::empty()))
    }

    async fn drain_custom_messages(&mut self) -> Result<()> {
        Ok(())
    }

    fn take_custom_message_writer(&mut self) -> Option<Box<dyn CustomMessageWrite>> {
        Some(Box::new(()))
    }

    async fn finish_custom(&mut self) -> Result<()> {
        Ok(())
    }
}

/// A request body being sent. The caller has checked that there is room ([`StreamHandle::poll_taken`]). If the
/// endpoint accepts no more, that is not an error here: it may still respond, and reading the response reports the
/// stream's state.
struct Body {
    handle: StreamHandle,
    ended: bool,
    trailers: Option<RequestTrailers>,
}

impl Drop for Body {
    /// Ends the stream if the body was not complete.
    fn drop(&mut self) {
        *self.handle.send() = None;
    }
}

#[async_trait]
impl BodyWrite for Body {
    async fn write_all_buf(&mut self, data: &mut Bytes) -> Result<()> {
        let data = data.split_off(0);
        if self.ended || data.is_empty() {
            return Ok(());
        }
        if self.handle.is_over() {
            self.ended = true;
            self.handle.send().iter_mut().for_each(|send| send.send_reset(Reason::CANCEL));
        } else {
            let sent = self.handle.send().as_mut().map(|send| send.send_data(data, false));
            self.ended = !matches!(sent, Some(Ok(())));
        }
        Ok(())
    }

    async fn finish(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.ended, true) {
            return Ok(());
        }
        let trailers =
            self.trailers.as_ref().and_then(|trailers| trailers.lock().unwrap_or_else(PoisonError::into_inner).take());
        let mut send = self.handle.send();
        let Some(send) = send.as_mut() else { return Ok(()) };
        // As above, reading the response reports errors.
        let _ = match trailers {
            Some(trailers) => send.send_trailers(trailers),
            None => send.send_data(Bytes::new(), true),
        };
        Ok(())
    }

    async fn cleanup(&mut self) -> Result<()> {
        Ok(())
    }

    fn upgrade_body_writer(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(fields: &[(&'static str, &str)], tls: bool) -> Request<()> {
        let mut request = RequestHeader::build("GET", b"/a?b=c", None).expect("a request");
        for (name, value) in fields {
            request.append_header(*name, *value).expect("a field");
        }
        converted(request, tls, "10.0.0.1:80").expect("a request of HTTP/2")
    }

    #[test]
    fn a_request_has_its_host_in_its_target_and_nothing_about_a_connection() {
        let request = sent(
            &[("host", "shop:81"), ("connection", "close"), ("te", "gzip"), ("upgrade", "x"), ("x-own", "1")],
            false,
        );
        assert_eq!(request.uri(), "http://shop:81/a?b=c");
        let names: Vec<_> = request.headers().keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["x-own"]);
        let request = sent(&[("te", "trailers")], true);
        assert_eq!(request.uri(), "https://10.0.0.1:80/a?b=c", "the endpoint, where no host is named");
        assert_eq!(request.headers()["te"], "trailers");
    }

    #[test]
    fn a_stream_that_we_gave_up_ourselves_is_not_unbegun() {
        let refused = before_answer(h2::Error::from(Reason::REFUSED_STREAM));
        assert!(matches!(refused.retry, RetryType::Decided(false)), "only the endpoint can say so");
    }
    #[tokio::test(start_paused = true)]
    async fn each_part_of_a_body_has_the_whole_limit() {
        const LIMIT: Duration = Duration::from_secs(1);
        let (near, far) = tokio::io::duplex(1 << 20);
        // Gives credit now and then, but for longer than the limit altogether, and in the end none.
        tokio::spawn(async move {
            let mut server = h2::server::handshake(far).await.expect("a connection");
            let (request, _respond) = server.accept().await.expect("a request").expect("a request");
            let mut body = request.into_body();
            let reads = async {
                for _ in 0..20 {
                    let data = body.data().await.expect("more").expect("data");
                    tokio::time::sleep(LIMIT * 3 / 10).await;
                    body.flow_control().release_capacity(data.len()).expect("its own bytes");
                }
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = reads => {}
                _ = server.accept() => {}
            }
        });
        let (send, connection) = Builder::new().handshake::<_, Bytes>(near).await.expect("a connection");
        tokio::spawn(connection);
        let request = Request::post("http://a.test/").body(()).expect("a request");
        let (_answer, mut stream) = send.ready().await.expect("room").send_request(request, false).expect("a request");
        let begun = tokio::time::Instant::now();
        let mut send = async |bytes: usize| {
            send_body(&mut stream, vec![0; bytes].into(), false, Some(LIMIT), NoClient::Within).await
        };
        send(300_000).await.expect("credit in time");
        assert!(begun.elapsed() > 2 * LIMIT, "{:?}", begun.elapsed());
        let late = send(300_000).await.expect_err("no more credit");
        assert_eq!(late.etype(), &ErrorType::WriteTimedout);
    }
}
