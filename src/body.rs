//! The bodies of one exchange, in both directions and for both protocols of the client.
//!
//! [`Bodies`] is the handle that the phases hold: it tells them what has come and gone, and takes their deadlines. The
//! session that Pingora sees meanwhile is [`session::BufferedSession`]. [`request::RequestBody`] receives, holds and
//! replays the request body; [`response::ResponseBody`] sends the response at the client's rate, and spools the rest.

pub mod request;
pub mod response;
pub mod session;

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use http::HeaderMap;
use pingora::http::RequestHeader;
use pingora::protocols::http::ServerSession;
use pingora::{Error, ErrorType, Result};

use crate::client::driver::sessions;
use crate::client::http2::Control;
use crate::client::stream::Bypass;
use crate::eventloop::worker;
use crate::party::limits::Checked;
use crate::party::pauses::paused_elsewhere;
use crate::party::wait::Timer;
use crate::party::{Bounds, Deadline, DelaysEndpoint, Fault, Party, Recheck, Stage, UpstreamTimeouts, Waits, What};
use crate::phase::Phase;
use crate::phase::journal::Passed;
use crate::scheduler::task::{CANCEL_GRACE, ExchangeControl, Work};
use crate::scheduler::{Class, Schedulers};
use crate::slow_client::waiting::Who;
use crate::spool::Spools;
use crate::upstream::transport::http2::StreamHandle;
use crate::upstream::window::Window;
use request::RequestPolicy;
use response::{ResponseBody, ResponsePolicy};

/// Observes the pieces of a response body on their way to the client, and may delay them.
#[async_trait]
pub trait Tap: Send + Sync {
    /// Called for each piece; `end` with the last one. An error cuts the response off.
    async fn piece(&mut self, request: &mut RequestHeader, piece: &mut Option<Bytes>, end: bool) -> Result<()>;
}

/// The parts of an exchange's session, in addition to the client's own session.
pub struct Terms {
    /// The time limits of the upstream.
    pub patience: UpstreamTimeouts,
    /// How the request body is received.
    pub request_policy: RequestPolicy,
    /// Whether the request body is held back instead of streamed.
    pub holds_body: bool,
    /// How the response is sent.
    pub response_policy: ResponsePolicy,
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
    pub spools: Arc<Spools>,
    /// The schedulers that give grants for bulk transfers.
    pub schedulers: Arc<Schedulers>,
}

/// The two bodies of an exchange, as the phases and the buffered session share them: how far each has come, the clocks
/// of the current wait, and the sender of the response, which owns the client's own session.
pub struct Bodies {
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
    response: Mutex<ResponseBody>,
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
    recheck: Recheck,
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
const WORK: [Work; 4] = [Work::Small, Work::Bulk, Work::Granted(Class::Transfer), Work::Granted(Class::Spool)];

impl Bodies {
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
        self.response().client.poll_gone(cx).map(|_| Fault::new(Party::Client, phase, What::Left))
    }

    /// The fault that ends the exchange, if any.
    fn over(&self) -> Option<Fault> {
        *self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the exchange in every state, and aborts the endpoint.
    fn end(&self, fault: Fault, response: &mut ResponseBody) {
        self.over.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(fault);
        self.fail(fault, ErrorType::ConnectionClosed);
        if matches!(self.stage(), Stage::Receiving | Stage::Done) {
            response.fail(fault);
        }
        response.endpoint.abort();
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
        let unread = if is_large { self.response().endpoint.unacknowledged() } else { None };
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
        self.response().client.close_after_answer();
    }

    /// Takes the trailers of a complete HTTP/1 request. A second call returns `None`.
    pub fn take_request_trailers(&self) -> Option<HeaderMap> {
        self.response().client.take_request_trailers()
    }

    /// Ends the response with these trailers, which Pingora does not know.
    pub fn end_with(&self, trailers: HeaderMap) {
        self.response().end_with(trailers);
    }

    /// Stores the received bytes of the response header; see [`ResponseBody::came_in`].
    pub fn answer_came_in(&self, header: Bytes) {
        self.response().came_in(header);
    }

    /// Sets the receive window of the endpoint's connection for the current attempt.
    pub fn set_window(&self, window: Option<Window>) {
        self.response().endpoint.set_window(window);
    }

    /// Sets the stream of the current attempt, on a connection that exchanges share.
    pub fn set_stream(&self, stream: StreamHandle) {
        self.response().endpoint.set_stream(stream);
    }

    /// Disables buffering of the response, because of its kind or at the upstream's request.
    pub fn stream_answer(&self) {
        self.response().stream();
    }

    /// Holds the response back until it is complete.
    pub fn hold_answer(&self) {
        self.response().hold();
    }

    /// The fault that ended the session's work, if any.
    pub fn fault(&self) -> Option<Fault> {
        self.given_up().or_else(|| self.response().fault())
    }

    /// Total time for which writing to the client was blocked.
    pub fn blocked(&self) -> Duration {
        self.response().blocked()
    }

    /// The length of the request body if it was buffered completely.
    pub fn length(&self) -> Option<u64> {
        Some(self.body.length.load(Ordering::Relaxed)).filter(|&length| length != u64::MAX)
    }

    /// Whether bytes of the response may have been sent, so that it can no longer be replaced.
    pub fn begun(&self) -> bool {
        self.response().begun()
    }

    /// Whether the whole response was sent.
    pub fn has_left_whole(&self) -> bool {
        self.response().has_left_whole()
    }

    /// Whether the framing lets the client recognise a response that was cut off.
    pub fn framed(&self) -> bool {
        self.response().framed()
    }

    /// The status that was sent (0: none), and the body bytes received from the client and sent to it.
    pub fn outcome(&self) -> (u16, u64, u64) {
        let response = self.response();
        (response.status(), self.body.received.load(Ordering::Relaxed), response.sent())
    }

    /// Body bytes transferred so far, for a journal. While a request body is received, the response is in use and has
    /// sent nothing.
    pub fn passed(&self) -> Passed {
        let received = self.body.received.load(Ordering::Relaxed);
        match self.response.try_lock() {
            Ok(response) => Passed { received, answered: response.came(), sent: response.sent() },
            Err(_) => Passed { received, ..Passed::default() },
        }
    }

    /// Bytes that were buffered in either direction, and those of them that were on disk.
    pub fn spooled(&self) -> (u64, u64) {
        let (buffered, spilled) = self.response().spooled();
        (buffered + self.body.buffered.load(Ordering::Relaxed), spilled + self.body.spilled.load(Ordering::Relaxed))
    }

    /// Whether the client uses HTTP/2.
    pub fn is_http2(&self) -> bool {
        self.response().client.is_http2()
    }

    /// Sends the rest of the response to the client after the upstream was released.
    ///
    /// # Errors
    ///
    /// If the client will not receive the whole response.
    pub async fn drain(&self) -> Result<()> {
        std::future::poll_fn(|cx| self.response().poll_drain(cx)).await
    }

    /// Whether the buffered session replaces the client's own.
    pub fn stands_in(&self) -> bool {
        self.stands_in.load(Ordering::Relaxed)
    }

    /// Drops unsent bytes, and a write in progress together with the client's session.
    pub fn abandon(&self) {
        self.response().abandon();
    }

    /// Restores the client's own session. `false`: the session was lost with an abandoned write.
    pub fn reclaim(&self, session: &mut Box<ServerSession>) -> bool {
        if !self.stands_in() {
            return true;
        }
        if self.response().client.session().is_none() {
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
        self.response().endpoint.open_window();
        self.reclaim(session)
    }

    /// Restores the client's own session, unless a write owns it.
    fn give(&self, session: &mut Box<ServerSession>) {
        let mut response = self.response();
        if let Some(mut own) = response.client.release() {
            own.set_write_timeout(self.write_timeout);
            if response.leaves_rest() {
                own.set_keepalive(None);
                response.client.end_after_answer();
            }
            sessions::put_away(std::mem::replace(session, own));
        }
    }

    /// Ends the exchange once its client has closed the connection, in states in which no read or write would detect
    /// the close. Every wait of an exchange with a buffered session polls this.
    fn watch(&self, response: &mut ResponseBody, cx: &mut Context<'_>) {
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
            && response.client.poll_left(cx, self.reads.load(Ordering::Relaxed)).is_ready()
        {
            self.end(left(stage), response);
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

    fn response(&self) -> MutexGuard<'_, ResponseBody> {
        // One task uses the lock, one part at a time, so it never blocks.
        self.response.lock().unwrap_or_else(PoisonError::into_inner)
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
    fn keep_time(&self, response: &mut ResponseBody, now: Instant) {
        let clock = &mut *self.clock();
        let Some((due, fault)) = self.due(clock).filter(|&(due, _)| clock.recheck.next(due) <= now) else { return };
        if clock.recheck.at(due, now) != Checked::Over || self.given_up().is_some() {
            return;
        }
        if let Some(driver) = response.endpoint.driver()
            && self.waits.note_other(now, |since| paused_elsewhere(since, now, driver))
        {
            // The limit is due later now.
            return;
        }
        if fault == Fault::new(Party::Endpoint, self.stage().phase(), What::Silent)
            && self.is_read(clock, response, now)
        {
            return;
        }
        self.fail(fault, ErrorType::ReadTimedout);
        if fault.what == What::Overdue && fault.phase == Phase::Receive {
            // The response may be waiting for its client, and Pingora does not poll the session then.
            response.fail(fault);
        }
        response.endpoint.abort();
    }

    /// Whether the wait goes on, since the endpoint reads the request, of which the kernel may hold megabytes: it has
    /// read some since the last look, or this is the first look. The time for the response thus begins once the
    /// endpoint's host has acknowledged the request.
    fn is_read(&self, clock: &mut Clock, response: &ResponseBody, now: Instant) -> bool {
        let limit = match self.stage() {
            Stage::Sending => clock.bounds.patience.send,
            Stage::Waiting => clock.bounds.patience.wait,
            _ => return false,
        };
        let is_spent = |attempt: Duration| self.waits.spent(Party::Endpoint, now) >= attempt;
        let unread = response.endpoint.unacknowledged();
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
        let next = clock.recheck.next(due);
        if clock.alarm.poll(cx, next).is_ready() {
            cx.waker().wake_by_ref();
        }
    }

    /// The fault that ended the current attempt, if any: a time limit, or the client's close.
    fn given_up(&self) -> Option<Fault> {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that the client has closed its connection, with this error.
    fn gone(&self, error: Box<Error>, response: &mut ResponseBody) -> Box<Error> {
        self.fail(left(self.stage()), error.etype().clone());
        response.endpoint.abort();
        error
    }

    fn fail(&self, fault: Fault, kind: ErrorType) -> Box<Error> {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault);
        told(fault, kind)
    }
}

impl ExchangeControl for Bodies {
    /// Polls only the client's side while the response waits for it: the upstream is not read.
    fn poll_ready(&self, cx: &mut Context<'_>, now: Instant) -> Poll<()> {
        let mut response = self.response();
        self.waits.note_lag(worker::lag(now), now);
        self.keep_time(&mut response, now);
        if self.holding.load(Ordering::Relaxed) {
            let more = response.poll_more(cx);
            if more.is_pending() {
                self.waits.turn_to(response.waits_for(), now);
                self.set_alarm(cx);
                self.watch(&mut response, cx);
            }
            return more;
        }
        // While Pingora sends a body, and while its channel holds the last pieces, it polls neither the response nor
        // the client.
        response.poll_writing(cx);
        if matches!(self.stage(), Stage::Sending | Stage::Waiting) && self.length().is_some() {
            // This must precede Pingora, which would release the endpoint's connection with unsent bytes of the
            // request.
            self.watch(&mut response, cx);
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
        self.watch(&mut self.response(), cx);
    }

    fn cancel(&self) {
        self.end(Fault::new(Party::Gateway, self.stage().phase(), What::Stopped), &mut self.response());
    }

    fn grace(&self) -> Option<Duration> {
        let over = self.over()?;
        // Only dropping the exchange aborts a connect, and a client that has left receives nothing.
        let in_vain = over.party == Party::Client && self.stage() == Stage::Connecting;
        Some(if in_vain { Duration::ZERO } else { CANCEL_GRACE })
    }
}

impl DelaysEndpoint for Bodies {
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
