//! The buffered session: it sits between Pingora and the client, in both directions and for both protocols.
//!
//! Pingora streams through `ServerSession`, whose `Custom` variant accepts a session of ours. This session has three
//! tasks. It holds the request body back until it is complete and replays it for each attempt
//! ([`BufferedSession::fill`]). It accepts the response as fast as the upstream sends it, and sends it to the client at
//! the client's rate ([`Wire`]). And it enforces the deadlines that Pingora lacks: for the upstream's whole response
//! header, for gaps in the response body, and for the client's body.
//!
//! It is in place from the end of the request filters to the end of the exchange. [`Link::reclaim`] then restores the
//! client's own session, so that keep-alive works unchanged. It is removed earlier if client and endpoint switch to
//! another protocol.
//!
//! While a response waits for its client, Pingora would continue to read into its channel. [`Link`] therefore does not
//! let the exchange be polled then, and serves only the client until there is room and a grant. Within one poll, too,
//! Pingora would read about 300 KiB before it polls the client. The session therefore limits each poll to a few
//! operations of tokio's cooperative budget, and to none once the exchange must wait. Without this limit, each of a
//! thousand waiting exchanges held 128 KiB in Pingora's channels.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
use pingora::{Error, ErrorType, Result};

use super::driver::sessions;
use super::http2::Control;
use super::intake::{Intake, IntakeTerms, Unread};
use super::remains;
use super::stream::Bypass;
use super::wire::{Manner, Past, Wire};
use crate::eventloop::worker;
use crate::party::limits::Seen;
use crate::party::pauses::paused_elsewhere;
use crate::party::wait::Timer;
use crate::party::{Bounds, Deadline, DelaysEndpoint, Fault, Look, Party, Patience, Stage, Waits, What};
use crate::phase::Phase;
use crate::phase::journal::Passed;
use crate::scheduler::coop::{OPERATIONS_PER_POLL, exhaust_budget, spend_budget};
use crate::scheduler::task::{CANCEL_GRACE, ExchangeControl, Work, attach};
use crate::scheduler::{Class, Schedulers};
use crate::slow_client::waiting::Who;
use crate::spool::{Depot, Held};
use crate::upstream::transport::http2::StreamHandle;
use crate::upstream::window::Window;

/// Observes the pieces of a response body on their way to the client, and may delay them.
#[async_trait]
pub trait Tap: Send + Sync {
    /// Called for each piece; `end` with the last one. An error cuts the response off.
    async fn piece(&mut self, request: &mut RequestHeader, piece: &mut Option<Bytes>, end: bool) -> Result<()>;
}

/// The parts of an exchange's session, in addition to the client's own session.
pub struct Terms {
    /// The time limits of the upstream.
    pub patience: Patience,
    /// How the request body is received.
    pub intake: IntakeTerms,
    /// Whether the request body is held back instead of streamed.
    pub holds_body: bool,
    /// How the response is sent.
    pub manner: Manner,
    /// The client of the exchange.
    pub who: Who,
    /// The control of the stream, on HTTP/2.
    pub control: Option<Control>,
    /// The path past the client's session, for one of Forebay's own HTTP/1 sessions.
    pub bypass: Option<Bypass>,
    /// Whether Pingora reaches the upstream by a custom connector.
    pub custom: bool,
    /// The observer of the response body.
    pub tap: Option<Box<dyn Tap>>,
    /// The resources that spools share.
    pub depot: Arc<Depot>,
    /// The schedulers that give grants for bulk transfers.
    pub schedulers: Arc<Schedulers>,
}

/// The state that an exchange and its session share: the clocks, the sender of the response, and the client's own
/// session.
pub struct Link {
    /// The party that is waited for, and the wait of each party in this attempt.
    waits: Waits,
    /// A [`Stage`].
    stage: AtomicU8,
    /// Whether the whole request was passed on.
    whole: AtomicBool,
    clock: Mutex<Clock>,
    /// The session holds a response and waits for its client or for a turn: the upstream must not be read.
    holding: AtomicBool,
    /// The request body is being read; the read detects a close by the client.
    reads: AtomicBool,
    /// The endpoint has not accepted all of the request body given so far, as far as this is visible.
    untaken: AtomicBool,
    /// Bytes of the request that the endpoint's host had not acknowledged at the last look; [`UNKNOWN`] without a look.
    unread: AtomicUsize,
    fault: Mutex<Option<Fault>>,
    /// The fault that ends the exchange in every state.
    over: Mutex<Option<Fault>>,
    wire: Mutex<Wire>,
    /// Whether the buffered session replaces the client's own.
    stands_in: AtomicBool,
    body: BodyCounts,
    /// The write timeout of the client's own session, for what it writes itself.
    write_timeout: Option<Duration>,
    /// What the exchange does, and whether it has a grant for it, as the index in `WORK`.
    work: AtomicUsize,
    schedulers: Arc<Schedulers>,
}

/// Bytes of the request body.
struct BodyCounts {
    received: AtomicU64,
    /// The length of a body that was buffered completely; `u64::MAX` if there is none.
    length: AtomicU64,
    buffered: AtomicU64,
    /// Those of them that were on disk.
    spilled: AtomicU64,
}

impl BodyCounts {
    fn none() -> Self {
        let zero = || AtomicU64::new(0);
        BodyCounts { received: zero(), length: AtomicU64::new(u64::MAX), buffered: zero(), spilled: zero() }
    }
}

/// The limits of the current attempt, and the timer that fires when one of them may be exceeded.
struct Clock {
    bounds: Bounds,
    alarm: Timer,
    look: Look,
    /// When a wait was due at first, and until when it was extended.
    grace: Option<(Instant, Instant)>,
}

/// The part of a limit by which a wait is extended for a second look.
const GRACE: u32 = 4;

/// For a request body of at least this many bytes, what the endpoint has not read is looked at from the beginning of
/// the wait for the response.
const LARGE_BYTES: u64 = 64 << 10;

/// What the endpoint has not read is unknown.
const UNKNOWN: usize = usize::MAX;

/// The kinds of work of an exchange with a session.
const WORK: [Work; 4] = [Work::Small, Work::Bulk, Work::Granted(Class::Pass), Work::Granted(Class::Spool)];

impl Link {
    /// Moves the exchange to this phase, with its own party to wait for and its own limits.
    pub fn enter_phase(&self, phase: Phase, now: Instant) {
        match phase {
            Phase::Queue => self.enter(Stage::Unconnected),
            Phase::Connect => self.begin_attempt(now),
            Phase::Send => self.enter(Stage::Sending),
            Phase::Wait => self.enter(Stage::Waiting),
            Phase::Receive => {
                self.enter(Stage::Receiving);
                // The client's body must not pause for too long.
                self.waits.restart(self.answering_party(), now);
            }
            Phase::Write => self.done(now),
            // Either there is no session yet, or the current wait continues, or nothing is waited for any more.
            Phase::Accept
            | Phase::Handshake
            | Phase::Header
            | Phase::Route
            | Phase::Buffer
            | Phase::Select
            | Phase::Finish => {}
        }
    }

    /// Ready when waiting in this phase is pointless: the client closed its connection while its body is not read and
    /// its response not written, or the exchange must end.
    pub fn poll_over(&self, cx: &mut Context<'_>, phase: Phase) -> Poll<Fault> {
        if let Some(over) = self.over() {
            return Poll::Ready(Fault { phase, ..over });
        }
        self.wire().client.poll_gone(cx).map(|_| Fault::new(Party::Client, phase, What::Left))
    }

    /// The fault that ends the exchange, if any.
    fn over(&self) -> Option<Fault> {
        *self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the exchange in every state, and aborts the endpoint.
    fn end(&self, fault: Fault, wire: &mut Wire) {
        self.over.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(fault);
        self.fail(fault, ErrorType::ConnectionClosed);
        if matches!(self.stage(), Stage::Receiving | Stage::Done) {
            wire.fail(fault);
        }
        wire.endpoint.abort();
    }

    /// Starts a new attempt with a new connection. The request is sent once the connection is open. The fault of the
    /// previous attempt is cleared.
    fn begin_attempt(&self, now: Instant) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = self.over();
        self.whole.store(false, Ordering::Relaxed);
        self.untaken.store(false, Ordering::Relaxed);
        self.unread.store(UNKNOWN, Ordering::Relaxed);
        self.enter(Stage::Connecting);
        self.waits.begin_attempt(worker::lag(now), now);
    }

    /// Sets the time limit for the response header of the current attempt, and the deadline for the whole response.
    pub fn bound(&self, attempt: Option<Duration>, deadline: Option<Deadline>) {
        let mut clock = self.clock();
        (clock.bounds.attempt, clock.bounds.deadline) = (attempt, deadline);
    }

    /// Reports that the request was sent: the response header is due. If the header arrived earlier, the rest of the
    /// response is due.
    pub fn request_sent(&self, now: Instant) {
        self.whole.store(true, Ordering::Relaxed);
        self.waits.restart(Party::Endpoint, now);
        let is_large = self.body.received.load(Ordering::Relaxed) >= LARGE_BYTES;
        let unread = if is_large { self.wire().endpoint.unacknowledged() } else { None };
        self.unread.store(unread.unwrap_or(UNKNOWN), Ordering::Relaxed);
    }

    /// The response is complete, or Forebay generated it: the wait for the upstream ends.
    fn done(&self, now: Instant) {
        self.enter(Stage::Done);
        self.waits.turn_to(Party::Client, now);
    }

    /// Reports that a part of this exchange waits for `party`.
    pub fn waits_for(&self, party: Party) {
        self.waits.turn_to(party, Instant::now());
    }

    /// The party that is waited for, and the wait of each party in this attempt.
    pub fn waits(&self) -> &Waits {
        &self.waits
    }

    /// Closes the connection after this response; the response announces the close.
    pub fn close_after_answer(&self) {
        self.wire().client.close_after_answer();
    }

    /// Takes the trailers of a complete HTTP/1 request. A second call returns `None`.
    pub fn take_request_trailers(&self) -> Option<HeaderMap> {
        self.wire().client.take_request_trailers()
    }

    /// Ends the response with these trailers, which Pingora does not know.
    pub fn end_with(&self, trailers: HeaderMap) {
        self.wire().end_with(trailers);
    }

    /// Stores the received bytes of the response header; see [`Wire::came_in`].
    pub fn answer_came_in(&self, header: Bytes) {
        self.wire().came_in(header);
    }

    /// Sets the receive window of the endpoint's connection for the current attempt.
    pub fn set_window(&self, window: Option<Window>) {
        self.wire().endpoint.set_window(window);
    }

    /// Sets the stream of the current attempt, on a connection that exchanges share.
    pub fn set_stream(&self, stream: StreamHandle) {
        self.wire().endpoint.set_stream(stream);
    }

    /// Disables buffering of the response, because of its kind or at the upstream's request.
    pub fn stream_answer(&self) {
        self.wire().stream();
    }

    /// Holds the response back until it is complete.
    pub fn hold_answer(&self) {
        self.wire().hold();
    }

    /// The fault that ended the session's work, if any.
    pub fn fault(&self) -> Option<Fault> {
        self.given_up().or_else(|| self.wire().fault())
    }

    /// Total time for which writing to the client was blocked.
    pub fn blocked(&self) -> Duration {
        self.wire().blocked()
    }

    /// The length of the request body if it was buffered completely.
    pub fn length(&self) -> Option<u64> {
        Some(self.body.length.load(Ordering::Relaxed)).filter(|&length| length != u64::MAX)
    }

    /// Whether bytes of the response may have been sent, so that it can no longer be replaced.
    pub fn begun(&self) -> bool {
        self.wire().begun()
    }

    /// Whether the whole response was sent.
    pub fn has_left_whole(&self) -> bool {
        self.wire().has_left_whole()
    }

    /// Whether the framing lets the client recognise a response that was cut off.
    pub fn framed(&self) -> bool {
        self.wire().framed()
    }

    /// The status that was sent (0: none), and the body bytes received from the client and sent to it.
    pub fn outcome(&self) -> (u16, u64, u64) {
        let wire = self.wire();
        (wire.status(), self.body.received.load(Ordering::Relaxed), wire.sent())
    }

    /// Body bytes transferred so far, for a journal. While a request body is received, the wire is in use and has sent
    /// nothing.
    pub fn passed(&self) -> Passed {
        let received = self.body.received.load(Ordering::Relaxed);
        match self.wire.try_lock() {
            Ok(wire) => Passed { received, answered: wire.came(), sent: wire.sent() },
            Err(_) => Passed { received, ..Passed::default() },
        }
    }

    /// Bytes that were buffered in either direction, and those of them that were on disk.
    pub fn spooled(&self) -> (u64, u64) {
        let (buffered, spilled) = self.wire().spooled();
        (buffered + self.body.buffered.load(Ordering::Relaxed), spilled + self.body.spilled.load(Ordering::Relaxed))
    }

    /// Whether the client uses HTTP/2.
    pub fn is_http2(&self) -> bool {
        self.wire().client.is_http2()
    }

    /// Sends the rest of the response to the client after the upstream was released.
    ///
    /// # Errors
    ///
    /// If the client will not receive the whole response.
    pub async fn drain(&self) -> Result<()> {
        std::future::poll_fn(|cx| self.wire().poll_drain(cx)).await
    }

    /// Whether the buffered session replaces the client's own.
    pub fn stands_in(&self) -> bool {
        self.stands_in.load(Ordering::Relaxed)
    }

    /// Drops unsent bytes, and a write in progress together with the client's session.
    pub fn abandon(&self) {
        self.wire().abandon();
    }

    /// Restores the client's own session. `false`: the session was lost with an abandoned write.
    pub fn reclaim(&self, session: &mut Box<ServerSession>) -> bool {
        if !self.stands_in() {
            return true;
        }
        if self.wire().client.session().is_none() {
            return false;
        }
        // Dropping the buffered session puts the request header back.
        sessions::put(session, Box::new(()));
        self.give(session);
        self.stands_in.store(false, Ordering::Relaxed);
        true
    }

    /// Client and endpoint switch to another protocol: restores the client's own session and stops all clocks. `false`:
    /// the session was lost with an abandoned write.
    pub fn step_aside(&self, session: &mut Box<ServerSession>) -> bool {
        self.done(Instant::now());
        self.holding.store(false, Ordering::Relaxed);
        self.wire().endpoint.open_window();
        self.reclaim(session)
    }

    /// Restores the client's own session, unless a write owns it.
    fn give(&self, session: &mut Box<ServerSession>) {
        let mut wire = self.wire();
        if let Some(mut own) = wire.client.release() {
            own.set_write_timeout(self.write_timeout);
            if wire.leaves_rest() {
                own.set_keepalive(None);
                wire.client.end_after_answer();
            }
            sessions::put_away(std::mem::replace(session, own));
        }
    }

    /// Ends the exchange once its client has closed the connection, in states in which no read or write would detect
    /// the close. Every wait of an exchange with a buffered session polls this.
    fn watch(&self, wire: &mut Wire, cx: &mut Context<'_>) {
        let stage = self.stage();
        let has_body = || self.body.received.load(Ordering::Relaxed) > 0 || self.length().is_some();
        let unwatched = match stage {
            Stage::Unconnected | Stage::Connecting | Stage::Sending => true,
            // Pingora polls the session, unless it is still delivering the last pieces of a body.
            Stage::Waiting => has_body(),
            Stage::Receiving => self.holding.load(Ordering::Relaxed) || self.untaken.load(Ordering::Relaxed),
            Stage::Done => false,
        };
        if unwatched
            && self.over().is_none()
            && self.given_up().is_none()
            && wire.client.poll_left(cx, self.reads.load(Ordering::Relaxed)).is_ready()
        {
            self.end(left(stage), wire);
            cx.waker().wake_by_ref();
        }
    }

    fn works(&self, work: Work) {
        let index = WORK.iter().position(|&known| known == work).unwrap_or_default();
        self.work.store(index, Ordering::Relaxed);
    }

    fn working(&self) -> Work {
        WORK[self.work.load(Ordering::Relaxed)]
    }

    fn wire(&self) -> MutexGuard<'_, Wire> {
        // One task uses the lock, one part at a time, so it never blocks.
        self.wire.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn clock(&self) -> MutexGuard<'_, Clock> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stage(&self) -> Stage {
        Stage::ALL[usize::from(self.stage.load(Ordering::Relaxed))]
    }

    fn enter(&self, stage: Stage) {
        self.stage.store(stage as u8, Ordering::Relaxed);
    }

    /// The party to wait for during an unblocked response. While the client still sends its body, the endpoint may be
    /// waiting for more of it.
    fn answering_party(&self) -> Party {
        if self.whole.load(Ordering::Relaxed) { Party::Endpoint } else { Party::Client }
    }

    /// The time at which the current wait becomes too long, and the resulting fault.
    fn due(&self, clock: &Clock) -> Option<(Instant, Fault)> {
        let (due, fault) = self.due_at_first(clock)?;
        let until = clock.grace.filter(|grace| grace.0 == due).map_or(due, |grace| grace.1);
        Some((until, fault))
    }

    fn due_at_first(&self, clock: &Clock) -> Option<(Instant, Fault)> {
        let (stage, whole) = (self.stage(), self.whole.load(Ordering::Relaxed));
        if stage == Stage::Receiving && self.untaken.load(Ordering::Relaxed) {
            // The response has begun, but the endpoint must still accept the rest of the request, or continue the
            // response.
            let bounds = Bounds { attempt: None, ..clock.bounds };
            return bounds.due(Stage::Sending, whole, &self.waits);
        }
        clock.bounds.due(stage, whole, &self.waits)
    }

    /// Ends the attempt or the exchange if the current wait has exceeded its limit at `now`.
    fn keep_time(&self, wire: &mut Wire, now: Instant) {
        let clock = &mut *self.clock();
        let Some((due, fault)) = self.due(clock).filter(|&(due, _)| clock.look.next(due) <= now) else { return };
        if clock.look.at(due, now) != Seen::Over || self.given_up().is_some() {
            return;
        }
        if let Some(driver) = wire.endpoint.driver()
            && self.waits.note_other(now, |since| paused_elsewhere(since, now, driver))
        {
            // The limit is due later now.
            return;
        }
        if fault == Fault::new(Party::Endpoint, self.stage().phase(), What::Silent) && self.is_read(clock, wire, now) {
            return;
        }
        self.fail(fault, ErrorType::ReadTimedout);
        if fault.what == What::Overdue && fault.phase == Phase::Receive {
            // The response may be waiting for its client, and Pingora does not poll the session then.
            wire.fail(fault);
        }
        wire.endpoint.abort();
    }

    /// Whether the wait goes on, since the endpoint reads the request, of which the kernel may hold megabytes: it has
    /// read some since the last look, or this is the first look. The time for the response thus begins once the
    /// endpoint's host has acknowledged the request.
    fn is_read(&self, clock: &mut Clock, wire: &Wire, now: Instant) -> bool {
        let limit = match self.stage() {
            Stage::Sending => clock.bounds.patience.send,
            Stage::Waiting => clock.bounds.patience.wait,
            _ => return false,
        };
        let is_spent = |attempt: Duration| self.waits.spent(Party::Endpoint, now) >= attempt;
        let unread = wire.endpoint.unacknowledged();
        let Some((unread, (due, _))) = unread.zip(self.due_at_first(clock)) else { return false };
        if clock.bounds.attempt.is_some_and(is_spent) {
            return false;
        }
        match self.unread.swap(unread, Ordering::Relaxed) {
            UNKNOWN if unread > 0 => clock.grace = Some((due, now + limit / GRACE)),
            before if before != UNKNOWN && unread < before => self.waits.restart(Party::Endpoint, now),
            _ => return false,
        }
        true
    }

    /// Wakes this task when the current wait may have exceeded its limit.
    fn set_alarm(&self, cx: &mut Context<'_>) {
        let clock = &mut *self.clock();
        let Some((due, _)) = self.due(clock).filter(|_| self.given_up().is_none()) else { return };
        let next = clock.look.next(due);
        if clock.alarm.poll(cx, next).is_ready() {
            cx.waker().wake_by_ref();
        }
    }

    /// The fault that ended the current attempt, if any: a time limit, or the client's close.
    fn given_up(&self) -> Option<Fault> {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that the client has closed its connection, with this error.
    fn gone(&self, error: Box<Error>, wire: &mut Wire) -> Box<Error> {
        self.fail(left(self.stage()), error.etype().clone());
        wire.endpoint.abort();
        error
    }

    fn fail(&self, fault: Fault, kind: ErrorType) -> Box<Error> {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault);
        told(fault, kind)
    }
}

impl ExchangeControl for Link {
    /// Polls only the client's side while the response waits for it: the upstream is not read.
    fn poll_ready(&self, cx: &mut Context<'_>, now: Instant) -> Poll<()> {
        let mut wire = self.wire();
        self.waits.note_lag(worker::lag(now), now);
        self.keep_time(&mut wire, now);
        if self.holding.load(Ordering::Relaxed) {
            let more = wire.poll_more(cx);
            if more.is_pending() {
                self.waits.turn_to(wire.waits_for(), now);
                self.set_alarm(cx);
                self.watch(&mut wire, cx);
            }
            return more;
        }
        // While Pingora sends a body, and while its channel holds the last pieces, it polls neither the response nor
        // the client.
        wire.poll_writing(cx);
        if matches!(self.stage(), Stage::Sending | Stage::Waiting) && self.length().is_some() {
            // This must precede Pingora, which would release the endpoint's connection with unsent bytes of the
            // request.
            self.watch(&mut wire, cx);
        }
        Poll::Ready(())
    }

    fn work(&self) -> Work {
        let work = self.working();
        // Pingora processes the part of a response that it reads now in a later poll; the response can be held only
        // then.
        if matches!(work, Work::Granted(_))
            && (self.holding.load(Ordering::Relaxed) || self.stage() != Stage::Receiving)
        {
            self.works(Work::Bulk);
        }
        work
    }

    fn pending(&self, cx: &mut Context<'_>) {
        self.set_alarm(cx);
        self.watch(&mut self.wire(), cx);
    }

    fn cancel(&self) {
        self.end(Fault::new(Party::Gateway, self.stage().phase(), What::Stopped), &mut self.wire());
    }

    fn grace(&self) -> Option<Duration> {
        let over = self.over()?;
        // Only dropping the exchange aborts a connect, and a client that has left receives nothing.
        let in_vain = over.party == Party::Client && self.stage() == Stage::Connecting;
        Some(if in_vain { Duration::ZERO } else { CANCEL_GRACE })
    }
}

impl DelaysEndpoint for Link {
    fn endpoint_delay(&self, now: Instant) -> Duration {
        self.waits.endpoint_delay(now)
    }
}

/// The fault of a client that left in this stage.
fn left(stage: Stage) -> Fault {
    Fault::new(Party::Client, stage.phase(), What::Left)
}

/// Wraps a fault in an error of Pingora, which passes it to the proxy unread.
fn told(fault: Fault, kind: ErrorType) -> Box<Error> {
    Error::explain(kind, format!("{fault:?}"))
}

/// Operations per poll while a response is in progress and other exchanges are, too. In one poll, Pingora would
/// otherwise fill its channel, about 300 KiB, before it polls the client.
const OPERATIONS: usize = 2;

/// The buffered session; see the module.
pub struct BufferedSession {
    link: Arc<Link>,
    /// The request header. The client's own session has a substitute meanwhile, with everything that it needs to frame
    /// the response.
    request: RequestHeader,
    /// The request header as received, on HTTP/1.
    written: Bytes,
    intake: Intake,
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
        if let Some(session) = self.link.wire().client.session() {
            std::mem::swap(session.req_header_mut(), &mut self.request);
        }
    }
}

impl BufferedSession {
    /// Takes the client's session. A placeholder replaces it until [`BufferedSession::stand_in`].
    pub fn take(session: &mut Box<ServerSession>, terms: Terms, now: Instant) -> (Arc<Link>, Self) {
        let Terms { patience, intake, holds_body, manner, who, control, bypass, custom, tap, depot, schedulers } =
            terms;
        let mut own = std::mem::replace(session, sessions::placeholder());
        // The intake enforces the deadline for the client's body, since Pingora has none on HTTP/2.
        own.set_read_timeout(None);
        let write_timeout = own.get_write_timeout();
        own.set_write_timeout(None);
        let reads_past = holds_body && bypass.as_ref().is_some_and(|bypass| !bypass.is_read());
        // The first such call makes Pingora's own session settle the framing of the body.
        let empty = !reads_past && own.is_body_empty();
        let intake = Intake::new(intake, empty, who.clone(), &depot, &schedulers);
        let written = if bypass.is_some() { own.to_h1_raw() } else { Bytes::new() };
        let mut stub = remains::stub();
        stub.set_method(own.req_header().method.clone());
        stub.set_version(own.req_header().version);
        let request = std::mem::replace(own.req_header_mut(), stub);
        let past = bypass.map(|bypass| Past::new(bypass, reads_past));
        let wire = Wire::new((own, past, control), &request, manner, who, depot, schedulers.clone());
        let link = Arc::new(Link {
            waits: Waits::new(now),
            stage: AtomicU8::new(Stage::Unconnected as u8),
            whole: AtomicBool::new(false),
            clock: Mutex::new(Clock {
                bounds: Bounds { patience, attempt: None, deadline: None },
                alarm: Timer::default(),
                look: Look::default(),
                grace: None,
            }),
            holding: AtomicBool::new(false),
            reads: AtomicBool::new(false),
            untaken: AtomicBool::new(false),
            unread: AtomicUsize::new(UNKNOWN),
            fault: Mutex::new(None),
            over: Mutex::new(None),
            wire: Mutex::new(wire),
            stands_in: AtomicBool::new(false),
            body: BodyCounts::none(),
            write_timeout,
            work: AtomicUsize::new(0),
            schedulers,
        });
        attach(link.clone());
        (link.clone(), BufferedSession { link, request, written, intake, tap, custom })
    }

    /// Replaces the client's session towards Pingora.
    pub fn stand_in(self, session: &mut Box<ServerSession>) {
        self.link.stands_in.store(true, Ordering::Relaxed);
        sessions::put(session, Box::new(self));
    }

    /// Whether the request has a body to read.
    pub fn has_body(&self) -> bool {
        !self.intake.is_empty()
    }

    /// Shares the body with a second reader. `None` unless all of it is in memory.
    pub fn share_memory(&mut self) -> Option<Held> {
        self.intake.share_memory()
    }

    /// The request header.
    pub fn request_mut(&mut self) -> &mut RequestHeader {
        &mut self.request
    }

    /// Restores the client's own session before any response.
    pub fn give_back(self, session: &mut Box<ServerSession>) {
        let link = self.link.clone();
        drop(self);
        link.give(session);
    }

    /// Asks the client to send its body: 100 Continue (RFC 9110 §10.1.1).
    pub async fn invite(&mut self) -> Result<()> {
        let mut own = self.link.wire().client.release();
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
            self.link.wire().client.put_back(own);
        }
        outcome
    }

    /// Reads the body until it is complete, or until the rest must be streamed. Calls `waiting` at the first wait for
    /// the client.
    pub async fn fill(&mut self, waiting: &mut (dyn FnMut() + Send)) -> Result<(), Unread> {
        let BufferedSession { link, intake, request, .. } = self;
        let filled = std::future::poll_fn(|cx| {
            if let Some(fault) = link.over() {
                return Poll::Ready(Err(Unread::Fault(Fault { phase: Phase::Buffer, ..fault })));
            }
            let mut waits = |received| {
                link.body.received.store(received, Ordering::Relaxed);
                waiting();
            };
            let filled = intake.poll_fill(cx, &mut link.wire(), &mut waits);
            intake.name_client(request);
            link.reads.store(filled.is_pending() && intake.is_reading(), Ordering::Relaxed);
            if intake.used_grant() {
                link.works(Work::Granted(Class::Pass));
            }
            filled
        })
        .await;
        link.body.received.store(self.intake.received(), Ordering::Relaxed);
        self.note_spooled();
        filled?;
        if let Some(length) = self.intake.whole() {
            self.link.body.length.store(length, Ordering::Relaxed);
        }
        Ok(())
    }

    fn note_spooled(&self) {
        let (buffered, spilled) = self.intake.spooled();
        self.link.body.buffered.store(buffered, Ordering::Relaxed);
        self.link.body.spilled.store(spilled, Ordering::Relaxed);
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
        if let Some(fault) = self.link.given_up() {
            return Poll::Ready(Err(told(fault, ErrorType::ReadTimedout)));
        }
        let mut wire = self.link.wire();
        let taken = wire.endpoint.poll_taken(cx, self.link.stage() == Stage::Done);
        let piece = if taken.is_ready() { self.intake.poll_piece(cx, &mut wire) } else { Poll::Pending };
        match &piece {
            Poll::Pending if taken.is_ready() => self.link.waits_for(self.intake.waits_for()),
            Poll::Pending => self.link.waits_for(Party::Endpoint),
            // The request for another piece shows that the earlier ones were accepted: the time limit now applies to
            // the next one.
            Poll::Ready(_) => {
                self.link.waits.restart(Party::Endpoint, Instant::now());
                self.link.unread.store(UNKNOWN, Ordering::Relaxed);
            }
        }
        self.link.untaken.store(taken.is_pending(), Ordering::Relaxed);
        let reads = taken.is_ready() && piece.is_pending() && self.intake.is_reading();
        self.link.reads.store(reads, Ordering::Relaxed);
        self.intake.name_client(&self.request);
        if let Some(error) = wire.take_error() {
            return Poll::Ready(Err(error));
        }
        // While a held body is replayed, no read detects a close by the client.
        if self.intake.whole().is_some()
            && let Poll::Ready(gone) = wire.client.poll_gone(cx)
        {
            return Poll::Ready(Err(self.link.gone(gone, &mut wire)));
        }
        drop(wire);
        let piece = ready!(piece);
        self.link.body.received.store(self.intake.received(), Ordering::Relaxed);
        Poll::Ready(piece.map_err(|unread| match unread {
            Unread::Failed(error) => error,
            Unread::Fault(fault) => self.link.fail(fault, ErrorType::ReadTimedout),
        }))
    }

    /// Passes parts of the response on, and waits until more may be received.
    async fn pass(&mut self, tasks: Vec<HttpTask>) -> Result<bool> {
        let link = &self.link;
        self.intake.answer_moved();
        let taken = link.wire().take(tasks);
        if let Err(error) = taken {
            if link.begun() {
                // Earlier bytes are sent if possible. If nothing was sent, another response can still replace this one.
                std::future::poll_fn(|cx| Poll::Ready(link.wire().poll_write(cx).is_ready())).await;
            }
            return Err(error);
        }
        let may_hold = self.intake.is_done(&mut link.wire());
        if link.begun() {
            self.intake.forget();
        }
        let ended = std::future::poll_fn(|cx| {
            let mut wire = link.wire();
            let more = wire.poll_more(cx);
            wire.name_client(&self.request);
            if let Some(class) = wire.used_grant() {
                link.works(Work::Granted(class));
            } else if wire.is_bulk() && link.working() == Work::Small {
                link.works(Work::Bulk);
            }
            let holds = may_hold && more.is_pending();
            link.holding.store(holds, Ordering::Relaxed);
            if more.is_pending() {
                link.waits_for(wire.waits_for());
            }
            if holds {
                // Otherwise Pingora would read on within this poll, into its channel.
                exhaust_budget(cx);
            }
            ready!(more);
            Poll::Ready(match wire.take_error() {
                Some(error) => Err(error),
                None => Ok(wire.ended()),
            })
        })
        .await;
        if link.stage() == Stage::Receiving {
            // The hold has blocked the upstream, so its time limit starts again.
            link.waits.restart(link.answering_party(), Instant::now());
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
        let link = &self.link;
        let error = std::future::poll_fn(|cx| {
            if let Some(fault) = link.given_up() {
                return Poll::Ready(told(fault, ErrorType::ReadTimedout));
            }
            if link.stage() == Stage::Receiving && link.schedulers.here().is_crowded() {
                spend_budget(cx, OPERATIONS_PER_POLL - OPERATIONS);
            }
            let mut wire = link.wire();
            let _ = wire.poll_write(cx);
            match wire.take_error() {
                Some(error) => Poll::Ready(error),
                None => wire.client.poll_gone(cx).map(|gone| link.gone(gone, &mut wire)),
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

    /// Marks the end and releases the upstream. [`Link::drain`] sends the remaining bytes.
    async fn finish(&mut self) -> Result<()> {
        let link = &self.link;
        link.wire().end();
        self.intake.forget();
        std::future::poll_fn(|cx| {
            let mut wire = link.wire();
            let _ = wire.poll_write(cx);
            wire.name_client(&self.request);
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
        self.link.abandon();
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
        self.intake.is_done(&mut self.link.wire())
    }

    fn is_body_empty(&mut self) -> bool {
        self.intake.is_empty()
    }

    fn body_bytes_sent(&self) -> usize {
        usize::try_from(self.link.wire().sent()).unwrap_or(usize::MAX)
    }

    fn body_bytes_read(&self) -> usize {
        usize::try_from(self.intake.received()).unwrap_or(usize::MAX)
    }

    no_connection!();

    // The timeouts of the client's own session are already set; Pingora's do not apply to it.

    fn set_read_timeout(&mut self, _timeout: Option<Duration>) {}

    fn get_read_timeout(&self) -> Option<Duration> {
        None
    }

    fn set_write_timeout(&mut self, _timeout: Option<Duration>) {}

    fn get_write_timeout(&self) -> Option<Duration> {
        None
    }

    fn set_total_drain_timeout(&mut self, _timeout: Option<Duration>) {}

    fn get_total_drain_timeout(&self) -> Option<Duration> {
        None
    }

    /// Pingora calls this at the start of each attempt: the body is replayed from its first byte, and unsent bytes of
    /// the previous attempt are dropped.
    fn enable_retry_buffering(&mut self) {
        self.link.holding.store(false, Ordering::Relaxed);
        self.intake.rewind(&mut self.link.wire());
        self.link.wire().restart();
    }

    fn retry_buffer_truncated(&self) -> bool {
        !self.intake.is_replayable(&mut self.link.wire())
    }

    fn get_retry_buffer(&self) -> Option<Bytes> {
        self.intake.retry_buffer(&mut self.link.wire())
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
