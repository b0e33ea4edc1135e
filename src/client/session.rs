//! The session between Pingora and the client: the clocks that Pingora lacks, and the response filters that may wait.
//!
//! Pingora streams through `ServerSession`; its `Custom` variant lets one of ours stand in between. This one passes
//! everything through and adds: a deadline for the upstream's whole response header, one for gaps in its body, one for
//! gaps in the client's body on both protocols, the time in which writing was blocked, and a [`Tap`] on the response.
//!
//! It stands from the end of the request filters to the end of the proxying; [`Link::reclaim`] puts the client's own
//! session back, so that keep-alive works as ever. Upgrades are never wrapped.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::Stream;
use http::HeaderMap;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::Digest;
use pingora::protocols::http::custom::CustomMessageWrite;
use pingora::protocols::http::custom::server::Session as CustomSession;
use pingora::protocols::http::{HttpTask, ServerSession};
use pingora::protocols::l4::socket::SocketAddr;
use pingora::{Error, ErrorType, Result};

use crate::error::{Refusal, refusal};

/// Sees the pieces of a response body on their way to the client, and may wait.
#[async_trait]
pub trait Tap: Send + Sync {
    /// A piece passes; `end` with the last one. An error cuts the response.
    async fn piece(&mut self, request: &mut RequestHeader, piece: &mut Option<Bytes>, end: bool) -> Result<()>;
}

/// How long the two sides of an exchange may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// From the request's end to the end of the response header.
    pub wait: Duration,
    /// Between two pieces of the response.
    pub receive: Duration,
    /// Between two pieces of the request body.
    pub body_idle: Duration,
}

/// What the exchange and its session share: the clocks, and the way back to the client's own session.
pub struct Link {
    begin: Instant,
    patience: Patience,
    stage: AtomicU64,
    /// Nanoseconds after `begin`.
    since: AtomicU64,
    blocked: AtomicU64,
    last: AtomicBool,
    fault: Mutex<Option<&'static Refusal>>,
    inner: Mutex<Option<Box<ServerSession>>>,
}

const SENDING: u64 = 0;
const WAITING: u64 = 1;
const RECEIVING: u64 = 2;
const DONE: u64 = 3;

impl Link {
    /// Wraps the client's session in place. The guard of the way back is the returned link.
    pub fn wrap(session: &mut Box<ServerSession>, patience: Patience, tap: Option<Box<dyn Tap>>) -> Arc<Link> {
        let link = Arc::new(Link {
            begin: Instant::now(),
            patience,
            stage: AtomicU64::new(SENDING),
            since: AtomicU64::new(0),
            blocked: AtomicU64::new(0),
            last: AtomicBool::new(false),
            fault: Mutex::new(None),
            inner: Mutex::new(None),
        });
        let mut inner = std::mem::replace(session, Box::new(ServerSession::new_custom(Box::new(()))));
        // The deadline for the client's body is ours, for Pingora has none on HTTP/2.
        inner.set_read_timeout(None);
        **session = ServerSession::new_custom(Box::new(ClockedSession { inner: Some(inner), link: link.clone(), tap }));
        link
    }

    /// Puts the client's own session back. A no-op if it is there already.
    pub fn reclaim(&self, session: &mut Box<ServerSession>) {
        if session.is_custom() {
            **session = ServerSession::new_custom(Box::new(()));
            if let Some(inner) = self.inner.lock().unwrap_or_else(PoisonError::into_inner).take() {
                *session = inner;
            }
        }
    }

    /// A new attempt begins: the request is sent again.
    pub fn sending(&self) {
        self.enter(SENDING);
    }

    /// The request is out: the response header is due.
    pub fn waiting(&self) {
        // An answer that came before the request's end is not waited for any more.
        if self.stage.load(Ordering::Relaxed) == SENDING {
            self.enter(WAITING);
        }
    }

    /// The response header is here: its body may not pause for too long.
    pub fn receiving(&self) {
        self.enter(RECEIVING);
    }

    /// The response is whole: the upstream is waited for no longer.
    pub fn done(&self) {
        self.enter(DONE);
    }

    /// The connection is to close after this answer, and the answer is to say so.
    pub fn close_after_answer(&self) {
        self.last.store(true, Ordering::Relaxed);
    }

    /// Why the session gave up, if it did.
    pub fn fault(&self) -> Option<&'static Refusal> {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For how long writing to the client was blocked.
    pub fn blocked(&self) -> Duration {
        Duration::from_nanos(self.blocked.load(Ordering::Relaxed))
    }

    fn enter(&self, stage: u64) {
        self.stage.store(stage, Ordering::Relaxed);
        self.touch();
    }

    fn touch(&self) {
        self.since.store(self.begin.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }

    /// Resolves when the upstream has been silent for too long in its present stage.
    async fn overdue(&self) -> &'static Refusal {
        loop {
            let (patience, refusal) = match self.stage.load(Ordering::Relaxed) {
                WAITING => (self.patience.wait, &refusal::WAIT_TIMEOUT),
                RECEIVING => (self.patience.receive, &refusal::RECEIVE_TIMEOUT),
                // Nothing is due; whoever changes the stage polls the session anew.
                _ => std::future::pending().await,
            };
            let due = Duration::from_nanos(self.since.load(Ordering::Relaxed)) + patience;
            match due.checked_sub(self.begin.elapsed()) {
                Some(left) if !left.is_zero() => pingora_timeout::sleep(left).await,
                _ => return refusal,
            }
        }
    }

    fn fail(&self, refusal: &'static Refusal, kind: ErrorType) -> Box<Error> {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(refusal);
        Error::explain(kind, refusal.reason)
    }
}

struct ClockedSession {
    /// `None` only while dropping.
    inner: Option<Box<ServerSession>>,
    link: Arc<Link>,
    tap: Option<Box<dyn Tap>>,
}

impl Drop for ClockedSession {
    fn drop(&mut self) {
        *self.link.inner.lock().unwrap_or_else(PoisonError::into_inner) = self.inner.take();
    }
}

impl ClockedSession {
    fn inner(&self) -> &ServerSession {
        self.inner.as_deref().expect("taken in `drop` only")
    }

    fn inner_mut(&mut self) -> &mut ServerSession {
        self.inner.as_deref_mut().expect("taken in `drop` only")
    }

    async fn tap(&mut self, tasks: &mut [HttpTask]) -> Result<()> {
        let (Some(tap), Some(inner)) = (&mut self.tap, &mut self.inner) else {
            return Ok(());
        };
        for task in tasks {
            if let HttpTask::Body(piece, end) = task {
                tap.piece(inner.req_header_mut(), piece, *end).await?;
            }
        }
        Ok(())
    }
}

#[async_trait]
impl CustomSession for ClockedSession {
    async fn read_body_bytes(&mut self) -> Result<Option<Bytes>> {
        let idle = self.link.patience.body_idle;
        match pingora_timeout::timeout(idle, self.inner_mut().read_request_body()).await {
            Ok(read) => read,
            Err(_) => Err(self.link.fail(&refusal::SEND_BODY_TIMEOUT, ErrorType::ReadTimedout)),
        }
    }

    async fn read_body_or_idle(&mut self, no_body_expected: bool) -> Result<Option<Bytes>> {
        if !no_body_expected && !self.inner_mut().is_body_done() {
            return self.read_body_bytes().await;
        }
        let link = self.link.clone();
        tokio::select! {
            biased;
            read = self.inner_mut().read_body_or_idle(true) => read,
            refusal = link.overdue() => Err(link.fail(refusal, ErrorType::ReadTimedout)),
        }
    }

    async fn response_duplex_vec(&mut self, mut tasks: Vec<HttpTask>) -> Result<bool> {
        if self.tap.is_some() {
            self.tap(&mut tasks).await?;
        }
        let link = self.link.clone();
        if link.last.load(Ordering::Relaxed) {
            self.inner_mut().set_keepalive(None);
        }
        let mut write = std::pin::pin!(self.inner_mut().response_duplex_vec(tasks));
        let ended = match std::future::poll_fn(|cx| Poll::Ready(write.as_mut().poll(cx))).await {
            Poll::Ready(ended) => ended,
            Poll::Pending => {
                let begin = Instant::now();
                let ended = write.await;
                link.blocked.fetch_add(begin.elapsed().as_nanos() as u64, Ordering::Relaxed);
                ended
            }
        };
        // The upstream could not go on while we wrote: its clock starts anew.
        link.touch();
        ended
    }

    async fn drain_request_body(&mut self) -> Result<()> {
        self.inner_mut().drain_request_body().await
    }

    async fn write_response_header(&mut self, response: Box<ResponseHeader>, _end: bool) -> Result<()> {
        self.inner_mut().write_response_header(response).await
    }

    async fn write_response_header_ref(&mut self, response: &ResponseHeader, _end: bool) -> Result<()> {
        self.inner_mut().write_response_header_ref(response).await
    }

    async fn write_body(&mut self, data: Bytes, end: bool) -> Result<()> {
        self.inner_mut().write_response_body(data, end).await
    }

    async fn write_trailers(&mut self, trailers: HeaderMap) -> Result<()> {
        self.inner_mut().write_response_trailers(trailers).await
    }

    async fn finish(&mut self) -> Result<()> {
        self.inner_mut().finish_body().await
    }

    async fn finish_custom(&mut self) -> Result<()> {
        Ok(())
    }

    async fn shutdown(&mut self, _code: u32, _context: &str) {
        self.inner_mut().shutdown().await;
    }

    fn req_header(&self) -> &RequestHeader {
        self.inner().req_header()
    }

    fn req_header_mut(&mut self) -> &mut RequestHeader {
        self.inner_mut().req_header_mut()
    }

    fn response_written(&self) -> Option<&ResponseHeader> {
        self.inner().response_written()
    }

    fn request_summary(&self) -> String {
        self.inner().request_summary()
    }

    fn pseudo_raw_h1_request_header(&self) -> Bytes {
        self.inner().to_h1_raw()
    }

    fn is_body_done(&mut self) -> bool {
        self.inner_mut().is_body_done()
    }

    fn is_body_empty(&mut self) -> bool {
        self.inner_mut().is_body_empty()
    }

    fn body_bytes_sent(&self) -> usize {
        self.inner().body_bytes_sent()
    }

    fn body_bytes_read(&self) -> usize {
        self.inner().body_bytes_read()
    }

    fn digest(&self) -> Option<&Digest> {
        self.inner().digest()
    }

    fn digest_mut(&mut self) -> Option<&mut Digest> {
        self.inner_mut().digest_mut()
    }

    fn client_addr(&self) -> Option<&SocketAddr> {
        self.inner().client_addr()
    }

    fn server_addr(&self) -> Option<&SocketAddr> {
        self.inner().server_addr()
    }

    fn set_read_timeout(&mut self, timeout: Option<Duration>) {
        self.inner_mut().set_read_timeout(timeout);
    }

    fn get_read_timeout(&self) -> Option<Duration> {
        self.inner().get_read_timeout()
    }

    fn set_write_timeout(&mut self, timeout: Option<Duration>) {
        self.inner_mut().set_write_timeout(timeout);
    }

    fn get_write_timeout(&self) -> Option<Duration> {
        self.inner().get_write_timeout()
    }

    fn set_total_drain_timeout(&mut self, timeout: Option<Duration>) {
        self.inner_mut().set_total_drain_timeout(timeout);
    }

    fn get_total_drain_timeout(&self) -> Option<Duration> {
        self.inner().get_total_drain_timeout()
    }

    fn enable_retry_buffering(&mut self) {
        self.inner_mut().enable_retry_buffering();
    }

    fn retry_buffer_truncated(&self) -> bool {
        self.inner().retry_buffer_truncated()
    }

    fn get_retry_buffer(&self) -> Option<Bytes> {
        self.inner().get_retry_buffer()
    }

    // Custom messages belong to protocols that are not HTTP; there are none here.

    fn take_custom_message_reader(
        &mut self,
    ) -> Option<Box<dyn Stream<Item = Result<Bytes>> + Unpin + Send + Sync + 'static>> {
        None
    }

    fn restore_custom_message_reader(
        &mut self,
        _reader: Box<dyn Stream<Item = Result<Bytes>> + Unpin + Send + Sync + 'static>,
    ) -> Result<()> {
        Ok(())
    }

    fn take_custom_message_writer(&mut self) -> Option<Box<dyn CustomMessageWrite>> {
        None
    }

    fn restore_custom_message_writer(&mut self, _writer: Box<dyn CustomMessageWrite>) -> Result<()> {
        Ok(())
    }
}
