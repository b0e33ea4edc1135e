//! The buffered session: it sits between Pingora and the client, in both directions and for both protocols.
//!
//! Pingora streams through `ServerSession`, whose `Custom` variant accepts a session of ours. This session has three
//! tasks. It holds the request body back until it is complete and replays it for each attempt
//! ([`BufferedSession::fill`]). It accepts the response as fast as the upstream sends it, and sends it to the client at
//! the client's rate ([`ResponseBody`]). And it enforces the deadlines that Pingora lacks: for the upstream's whole
//! response header, for gaps in the response body, and for the client's body.
//!
//! It is in place from the end of the request filters to the end of the exchange. [`Bodies::reclaim`] then restores the
//! client's own session, so that keep-alive works unchanged. It is removed earlier if client and endpoint switch to
//! another protocol.
//!
//! While a response waits for its client, Pingora would continue to read into its channel. [`Bodies`] therefore does
//! not let the exchange be polled then, and serves only the client until there is room and a grant. Within one poll,
//! too, Pingora would read about 300 KiB before it polls the client. The session therefore limits each poll to a few
//! operations of tokio's cooperative budget, and to none once the exchange must wait. Without this limit, each of a
//! thousand waiting exchanges held 128 KiB in Pingora's channels.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{Stream, stream};
use http::HeaderMap;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::Digest;
use pingora::protocols::http::custom::CustomMessageWrite;
use pingora::protocols::http::custom::server::Session as CustomSession;
use pingora::protocols::http::{HttpTask, ServerSession};
use pingora::protocols::l4::socket::SocketAddr;
use pingora::{ErrorType, Result};

use super::request::{RequestBody, Unread};
use super::response::{Past, ResponseBody};
use super::{Bodies, BodyCounts, Clock, Tap, Terms, UNKNOWN, told};
use crate::client::driver::sessions;
use crate::client::{no_connection, no_timeouts, remains};
use crate::party::wait::Timer;
use crate::party::{Bounds, Fault, Party, Recheck, Stage, Waits};
use crate::phase::Phase;
use crate::scheduler::Class;
use crate::scheduler::coop::{OPERATIONS_PER_POLL, exhaust_budget, spend_budget};
use crate::scheduler::task::{Work, attach};
use crate::spool::Held;

/// Operations per poll while a response is in progress and other exchanges are, too. In one poll, Pingora would
/// otherwise fill its channel, about 300 KiB, before it polls the client.
const OPERATIONS: usize = 2;

/// The buffered session; see the module.
pub struct BufferedSession {
    bodies: Arc<Bodies>,
    /// The request header. The client's own session has a substitute meanwhile, with everything that it needs to frame
    /// the response.
    request: RequestHeader,
    /// The request header as received, on HTTP/1.
    written: Bytes,
    request_body: RequestBody,
    tap: Option<Box<dyn Tap>>,
    /// Whether Pingora reaches the upstream by a custom connector.
    custom: bool,
}

impl Drop for BufferedSession {
    fn drop(&mut self) {
        self.note_spooled();
        if remains::leave_request(&mut self.request) {
            return;
        }
        if let Some(session) = self.bodies.response().client.session() {
            std::mem::swap(session.req_header_mut(), &mut self.request);
        }
    }
}

impl BufferedSession {
    /// Takes the client's session. A placeholder replaces it until [`BufferedSession::stand_in`].
    pub fn take(session: &mut Box<ServerSession>, terms: Terms, now: Instant) -> (Arc<Bodies>, Self) {
        let Terms {
            patience,
            request_policy,
            holds_body,
            response_policy,
            who,
            control,
            bypass,
            custom,
            tap,
            spools,
            schedulers,
        } = terms;
        let mut own = std::mem::replace(session, sessions::placeholder());
        // The request body enforces the deadline for the client's body, since Pingora has none on HTTP/2.
        own.set_read_timeout(None);
        let write_timeout = own.get_write_timeout();
        own.set_write_timeout(None);
        let reads_past = holds_body && bypass.as_ref().is_some_and(|bypass| !bypass.is_read());
        // The first such call makes Pingora's own session settle the framing of the body.
        let empty = !reads_past && own.is_body_empty();
        let request_body = RequestBody::new(request_policy, empty, who.clone(), &spools, &schedulers);
        let written = if bypass.is_some() { own.to_h1_raw() } else { Bytes::new() };
        let mut stub = remains::stub();
        stub.set_method(own.req_header().method.clone());
        stub.set_version(own.req_header().version);
        let request = std::mem::replace(own.req_header_mut(), stub);
        let past = bypass.map(|bypass| Past::new(bypass, reads_past));
        let response =
            ResponseBody::new((own, past, control), &request, response_policy, who, spools, schedulers.clone());
        let bodies = Arc::new(Bodies {
            waits: Waits::new(now),
            stage: AtomicU8::new(Stage::Unconnected as u8),
            whole: AtomicBool::new(false),
            clock: Mutex::new(Clock {
                bounds: Bounds { patience, attempt: None, deadline: None },
                alarm: Timer::default(),
                recheck: Recheck::default(),
                grace: None,
            }),
            holding: AtomicBool::new(false),
            reads: AtomicBool::new(false),
            untaken: AtomicBool::new(false),
            unread: AtomicUsize::new(UNKNOWN),
            fault: Mutex::new(None),
            over: Mutex::new(None),
            response: Mutex::new(response),
            stands_in: AtomicBool::new(false),
            body: BodyCounts::none(),
            write_timeout,
            work: AtomicUsize::new(0),
            schedulers,
        });
        attach(bodies.clone());
        (bodies.clone(), BufferedSession { bodies, request, written, request_body, tap, custom })
    }

    /// Replaces the client's session towards Pingora.
    pub fn stand_in(self, session: &mut Box<ServerSession>) {
        self.bodies.stands_in.store(true, Ordering::Relaxed);
        sessions::put(session, Box::new(self));
    }

    /// Whether the request has a body to read.
    pub fn has_body(&self) -> bool {
        !self.request_body.is_empty()
    }

    /// Shares the body with a second reader. `None` unless all of it is in memory.
    pub fn share_memory(&mut self) -> Option<Held> {
        self.request_body.share_memory()
    }

    /// The request header.
    pub fn request_mut(&mut self) -> &mut RequestHeader {
        &mut self.request
    }

    /// Restores the client's own session before any response.
    pub fn give_back(self, session: &mut Box<ServerSession>) {
        let bodies = self.bodies.clone();
        drop(self);
        bodies.give(session);
    }

    /// Asks the client to send its body: 100 Continue (RFC 9110 §10.1.1).
    pub async fn invite(&mut self) -> Result<()> {
        let mut own = self.bodies.response().client.release();
        let outcome = match &mut own {
            Some(own) => {
                // Pingora would close the connection after any response that precedes the end of the body, even after
                // this one.
                own.set_close_on_response_before_downstream_finish(false);
                let outcome = own.write_continue_response().await;
                own.set_close_on_response_before_downstream_finish(true);
                outcome
            }
            None => Ok(()),
        };
        if let Some(own) = own {
            self.bodies.response().client.put_back(own);
        }
        outcome
    }

    /// Reads the body until it is complete, or until the rest must be streamed. Calls `waiting` at the first wait for
    /// the client.
    pub async fn fill(&mut self, waiting: &mut (dyn FnMut() + Send)) -> Result<(), Unread> {
        let BufferedSession { bodies, request_body, request, .. } = self;
        let filled = std::future::poll_fn(|cx| {
            if let Some(fault) = bodies.over() {
                return Poll::Ready(Err(Unread::Fault(Fault { phase: Phase::Buffer, ..fault })));
            }
            let mut waits = |received| {
                bodies.body.received.store(received, Ordering::Relaxed);
                waiting();
            };
            let filled = request_body.poll_fill(cx, &mut bodies.response(), &mut waits);
            request_body.name_client(request);
            bodies.reads.store(filled.is_pending() && request_body.is_reading(), Ordering::Relaxed);
            if request_body.used_grant() {
                bodies.works(Work::Granted(Class::Transfer));
            }
            filled
        })
        .await;
        bodies.body.received.store(self.request_body.received(), Ordering::Relaxed);
        self.note_spooled();
        filled?;
        if let Some(length) = self.request_body.whole() {
            self.bodies.body.length.store(length, Ordering::Relaxed);
        }
        Ok(())
    }

    fn note_spooled(&self) {
        let (buffered, spilled) = self.request_body.spooled();
        self.bodies.body.buffered.store(buffered, Ordering::Relaxed);
        self.bodies.body.spilled.store(spilled, Ordering::Relaxed);
    }

    async fn tap(&mut self, tasks: &mut [HttpTask]) -> Result<()> {
        let Some(tap) = &mut self.tap else { return Ok(()) };
        for task in tasks {
            if let HttpTask::Body(piece, end) = task {
                tap.piece(&mut self.request, piece, *end).await?;
            }
        }
        Ok(())
    }

    fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>>> {
        if let Some(fault) = self.bodies.given_up() {
            return Poll::Ready(Err(told(fault, ErrorType::ReadTimedout)));
        }
        let mut response = self.bodies.response();
        let taken = response.endpoint.poll_taken(cx, self.bodies.stage() == Stage::Done);
        let piece = if taken.is_ready() { self.request_body.poll_piece(cx, &mut response) } else { Poll::Pending };
        match &piece {
            Poll::Pending if taken.is_ready() => self.bodies.waits_for(self.request_body.waits_for()),
            Poll::Pending => self.bodies.waits_for(Party::Endpoint),
            // The request for another piece shows that the earlier ones were accepted: the time limit now applies to
            // the next one.
            Poll::Ready(_) => {
                self.bodies.waits.restart(Party::Endpoint, Instant::now());
                self.bodies.unread.store(UNKNOWN, Ordering::Relaxed);
            }
        }
        self.bodies.untaken.store(taken.is_pending(), Ordering::Relaxed);
        let reads = taken.is_ready() && piece.is_pending() && self.request_body.is_reading();
        self.bodies.reads.store(reads, Ordering::Relaxed);
        self.request_body.name_client(&self.request);
        if let Some(error) = response.take_error() {
            return Poll::Ready(Err(error));
        }
        // While a held body is replayed, no read detects a close by the client.
        if self.request_body.whole().is_some()
            && let Poll::Ready(gone) = response.client.poll_gone(cx)
        {
            return Poll::Ready(Err(self.bodies.gone(gone, &mut response)));
        }
        drop(response);
        let piece = ready!(piece);
        self.bodies.body.received.store(self.request_body.received(), Ordering::Relaxed);
        Poll::Ready(piece.map_err(|unread| match unread {
            Unread::Failed(error) => error,
            Unread::Fault(fault) => self.bodies.fail(fault, ErrorType::ReadTimedout),
        }))
    }

    /// Passes parts of the response on, and waits until more may be received.
    async fn pass(&mut self, tasks: Vec<HttpTask>) -> Result<bool> {
        let bodies = &self.bodies;
        self.request_body.answer_moved();
        let taken = bodies.response().take(tasks);
        if let Err(error) = taken {
            if bodies.begun() {
                // Earlier bytes are sent if possible. If nothing was sent, another response can still replace this one.
                std::future::poll_fn(|cx| Poll::Ready(bodies.response().poll_write(cx).is_ready())).await;
            }
            return Err(error);
        }
        let may_hold = self.request_body.is_done(&mut bodies.response());
        if bodies.begun() {
            self.request_body.forget();
        }
        let ended = std::future::poll_fn(|cx| {
            let mut response = bodies.response();
            let more = response.poll_more(cx);
            response.name_client(&self.request);
            if let Some(class) = response.used_grant() {
                bodies.works(Work::Granted(class));
            } else if response.is_bulk() && bodies.working() == Work::Small {
                bodies.works(Work::Bulk);
            }
            let holds = may_hold && more.is_pending();
            bodies.holding.store(holds, Ordering::Relaxed);
            if more.is_pending() {
                bodies.waits_for(response.waits_for());
            }
            if holds {
                // Otherwise Pingora would read on within this poll, into its channel.
                exhaust_budget(cx);
            }
            ready!(more);
            Poll::Ready(match response.take_error() {
                Some(error) => Err(error),
                None => Ok(response.ended()),
            })
        })
        .await;
        if bodies.stage() == Stage::Receiving {
            // The hold has blocked the upstream, so its time limit starts again.
            bodies.waits.restart(bodies.answering_party(), Instant::now());
        }
        ended
    }
}

#[async_trait]
impl CustomSession for BufferedSession {
    async fn read_body_bytes(&mut self) -> Result<Option<Bytes>> {
        std::future::poll_fn(|cx| self.poll_body(cx)).await
    }

    async fn read_body_or_idle(&mut self, no_body_expected: bool) -> Result<Option<Bytes>> {
        if !no_body_expected && !self.is_body_done() {
            return self.read_body_bytes().await;
        }
        let bodies = &self.bodies;
        let error = std::future::poll_fn(|cx| {
            if let Some(fault) = bodies.given_up() {
                return Poll::Ready(told(fault, ErrorType::ReadTimedout));
            }
            if bodies.stage() == Stage::Receiving && bodies.schedulers.here().is_crowded() {
                spend_budget(cx, OPERATIONS_PER_POLL - OPERATIONS);
            }
            let mut response = bodies.response();
            let _ = response.poll_write(cx);
            match response.take_error() {
                Some(error) => Poll::Ready(error),
                None => response.client.poll_gone(cx).map(|gone| bodies.gone(gone, &mut response)),
            }
        });
        Err(error.await)
    }

    async fn response_duplex_vec(&mut self, mut tasks: Vec<HttpTask>) -> Result<bool> {
        if self.tap.is_some() {
            self.tap(&mut tasks).await?;
        }
        self.pass(tasks).await
    }

    async fn drain_request_body(&mut self) -> Result<()> {
        while !self.is_body_done() && self.read_body_bytes().await?.is_some() {}
        Ok(())
    }

    async fn write_response_header(&mut self, response: Box<ResponseHeader>, end: bool) -> Result<()> {
        self.pass(vec![HttpTask::Header(response, end)]).await.map(|_| ())
    }

    async fn write_response_header_ref(&mut self, response: &ResponseHeader, end: bool) -> Result<()> {
        self.write_response_header(Box::new(response.clone()), end).await
    }

    async fn write_body(&mut self, data: Bytes, end: bool) -> Result<()> {
        self.pass(vec![HttpTask::Body(Some(data), end)]).await.map(|_| ())
    }

    async fn write_trailers(&mut self, trailers: HeaderMap) -> Result<()> {
        self.pass(vec![HttpTask::Trailer(Some(Box::new(trailers)))]).await.map(|_| ())
    }

    /// Marks the end and releases the upstream. [`Bodies::drain`] sends the remaining bytes.
    async fn finish(&mut self) -> Result<()> {
        let bodies = &self.bodies;
        bodies.response().end();
        self.request_body.forget();
        std::future::poll_fn(|cx| {
            let mut response = bodies.response();
            let _ = response.poll_write(cx);
            response.name_client(&self.request);
            Poll::Ready(())
        })
        .await;
        // The drain reports a failure.
        Ok(())
    }

    async fn finish_custom(&mut self) -> Result<()> {
        Ok(())
    }

    async fn shutdown(&mut self, _code: u32, context: &str) {
        self.abandon(context).await;
    }

    async fn abandon(&mut self, _context: &str) {
        self.bodies.abandon();
    }

    fn req_header(&self) -> &RequestHeader {
        &self.request
    }

    fn req_header_mut(&mut self) -> &mut RequestHeader {
        &mut self.request
    }

    /// The client's own session has the header; callers read it after its return.
    fn response_written(&self) -> Option<&ResponseHeader> {
        None
    }

    fn request_summary(&self) -> String {
        format!("{} {}", self.request.method, self.request.uri)
    }

    fn pseudo_raw_h1_request_header(&self) -> Bytes {
        self.written.clone()
    }

    fn is_body_done(&mut self) -> bool {
        self.request_body.is_done(&mut self.bodies.response())
    }

    fn is_body_empty(&mut self) -> bool {
        self.request_body.is_empty()
    }

    fn body_bytes_sent(&self) -> usize {
        usize::try_from(self.bodies.response().sent()).unwrap_or(usize::MAX)
    }

    fn body_bytes_read(&self) -> usize {
        usize::try_from(self.request_body.received()).unwrap_or(usize::MAX)
    }

    no_connection!();

    // The timeouts of the client's own session are already set; Pingora's do not apply to it.
    no_timeouts!();

    /// Pingora calls this at the start of each attempt: the body is replayed from its first byte, and unsent bytes of
    /// the previous attempt are dropped.
    fn enable_retry_buffering(&mut self) {
        self.bodies.holding.store(false, Ordering::Relaxed);
        self.request_body.rewind(&mut self.bodies.response());
        self.bodies.response().restart();
    }

    fn retry_buffer_truncated(&self) -> bool {
        !self.request_body.is_replayable(&mut self.bodies.response())
    }

    fn get_retry_buffer(&self) -> Option<Bytes> {
        self.request_body.retry_buffer(&mut self.bodies.response())
    }

    // Custom messages belong to protocols other than HTTP and do not occur here. Pingora asks for both ends anyway if
    // the upstream is custom.

    fn take_custom_message_reader(
        &mut self,
    ) -> Option<Box<dyn Stream<Item = Result<Bytes>> + Unpin + Send + Sync + 'static>> {
        self.custom.then(|| Box::new(stream::empty()) as _)
    }

    fn restore_custom_message_reader(
        &mut self,
        _reader: Box<dyn Stream<Item = Result<Bytes>> + Unpin + Send + Sync + 'static>,
    ) -> Result<()> {
        Ok(())
    }

    fn take_custom_message_writer(&mut self) -> Option<Box<dyn CustomMessageWrite>> {
        self.custom.then(|| Box::new(()) as _)
    }

    fn restore_custom_message_writer(&mut self, _writer: Box<dyn CustomMessageWrite>) -> Result<()> {
        Ok(())
    }
}
