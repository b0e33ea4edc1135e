//! The buffered session: it stands between Pingora and the client, for both directions and both protocols.
//!
//! Pingora streams through `ServerSession`; its `Custom` variant lets one of ours stand in between. This one holds the
//! request body back until it is whole and replays it for every attempt ([`BufferedSession::fill`]), takes the response
//! as fast as the upstream gives it and lets the client have it at its own pace ([`Wire`]), and keeps the clocks that
//! Pingora lacks: a deadline for the upstream's whole response header, for gaps in its body, and for the client's body.
//!
//! It stands from the end of the request filters to the end of the exchange; [`Link::reclaim`] puts the client's own
//! session back, so that keep-alive works as ever. It steps aside
//! where the client and the endpoint agree on another protocol.
//!
//! While a response waits for its client, Pingora would read on into its channel. So the exchange is not polled then:
//! its gate serves the client alone until there is room and a turn. Within one poll, too, Pingora would read some 300
//! KiB before it looks at the client. So the session leaves each poll only a few operations of tokio's cooperative
//! budget, and none once the exchange is to wait; without that, 128 KiB of each of a thousand waiting exchanges were in
//! Pingora's channels.

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
use super::lane::{Class, Lanes, OPERATIONS_PER_POLL, exhaust_budget, spend_budget};
use super::remains;
use super::spool::{Depot, Held};
use super::stream::Bypass;
use super::waiting::Who;
use super::wire::{Manner, Past, Wire};
use crate::eventloop::{Gate, LAST_WORDS, adopt, worker};
use crate::party::limits::Seen;
use crate::party::wait::Timer;
use crate::party::{Bounds, Deadline, Fault, KeepsWaiting, Look, Party, Patience, Stage, Waits, What};
use crate::phase::Phase;
use crate::phase::journal::Passed;
use crate::upstream::transport::http2::StreamHandle;
use crate::upstream::window::Window;

/// Sees the pieces of a response body on their way to the client, and may wait.
#[async_trait]
pub trait Tap: Send + Sync {
    /// A piece passes; `end` with the last one. An error cuts the response.
    async fn piece(&mut self, request: &mut RequestHeader, piece: &mut Option<Bytes>, end: bool) -> Result<()>;
}

/// What an exchange's session is made of, besides the client's own.
pub struct Terms {
    /// How long the upstream may take.
    pub patience: Patience,
    /// How the request body is taken.
    pub intake: IntakeTerms,
    /// It is to be held back, not to be streamed.
    pub holds_body: bool,
    /// How the answer leaves.
    pub manner: Manner,
    /// Whose exchange it is.
    pub who: Who,
    /// What can be done with its stream, on HTTP/2.
    pub control: Option<Control>,
    /// The way past the client's session, if it is one of ours on HTTP/1.
    pub bypass: Option<Bypass>,
    /// The upstream is one that Pingora calls custom.
    pub custom: bool,
    /// Sees the pieces of the answer.
    pub tap: Option<Box<dyn Tap>>,
    /// What spools share.
    pub depot: Arc<Depot>,
    /// Where turns for spooling are had.
    pub lanes: Arc<Lanes>,
}

/// What the exchange and its session share: the clocks, the wire, and the way back to the client's own session.
pub struct Link {
    /// The party that is waited for, and for how long each was in this attempt.
    waits: Waits,
    /// A [`Stage`].
    stage: AtomicU8,
    /// All of the request was passed on.
    whole: AtomicBool,
    clock: Mutex<Clock>,
    /// The session waits for its client, or for a turn, with an answer in hand: the upstream is not to be read.
    holding: AtomicBool,
    /// The body of the request is being read: that finds out if its client leaves.
    reads: AtomicBool,
    /// The endpoint has not taken what it was given of the request, as far as that can be seen.
    untaken: AtomicBool,
    fault: Mutex<Option<Fault>>,
    /// Why the exchange is to end, whatever it is at.
    over: Mutex<Option<Fault>>,
    wire: Mutex<Wire>,
    /// The buffered session is in the place of the client's own.
    stands_in: AtomicBool,
    received: AtomicU64,
    /// The length of a body that was buffered whole; `u64::MAX` if there is none.
    length: AtomicU64,
    buffered: AtomicU64,
    spilled: AtomicU64,
    /// That of the client's own session, for what it writes by itself.
    write_timeout: Option<Duration>,
    /// The class of the turn of the lane that is being used, as its place in `Class::ALL`; `NO_TURN`.
    turn: AtomicUsize,
    lanes: Arc<Lanes>,
}

/// The limits of the present attempt, and the timer that rings when one of them may be exceeded.
struct Clock {
    bounds: Bounds,
    alarm: Timer,
    look: Look,
}

const NO_TURN: usize = usize::MAX;

impl Link {
    /// The exchange goes on to this phase: another party may be waited for from now on, within other limits.
    pub fn enter_phase(&self, phase: Phase, now: Instant) {
        match phase {
            Phase::Queue => self.enter(Stage::Unconnected),
            Phase::Connect => self.begin_attempt(now),
            Phase::Send => self.enter(Stage::Sending),
            Phase::Wait => self.enter(Stage::Waiting),
            Phase::Receive => {
                self.enter(Stage::Receiving);
                // Its body may not pause for too long.
                self.waits.restart(self.answering_party(), now);
            }
            Phase::Write => self.done(now),
            // There is no session yet, the present wait goes on, or nothing is waited for any more.
            Phase::Accept
            | Phase::Handshake
            | Phase::Header
            | Phase::Route
            | Phase::Buffer
            | Phase::Select
            | Phase::Finish => {}
        }
    }

    /// Ready when there is no sense in waiting on in this phase: the client has gone, while its body is not read or
    /// writes its answer, or the exchange is to end.
    pub fn poll_over(&self, cx: &mut Context<'_>, phase: Phase) -> Poll<Fault> {
        if let Some(over) = self.over() {
            return Poll::Ready(Fault { phase, ..over });
        }
        self.wire().poll_gone(cx).map(|_| Fault::new(Party::Client, phase, What::Left))
    }

    /// Why the exchange is to end, whatever it is at.
    fn over(&self) -> Option<Fault> {
        *self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the exchange, whatever it is at: whoever it waits for is waited for no longer.
    fn end(&self, fault: Fault, wire: &mut Wire) {
        self.over.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(fault);
        self.fail(fault, ErrorType::ConnectionClosed);
        if matches!(self.stage(), Stage::Receiving | Stage::Done) {
            wire.fail(fault);
        }
        wire.abort();
    }

    /// A new attempt begins, with a connection: the request is sent again once that is there, and what the attempt
    /// before was given up for is over.
    fn begin_attempt(&self, now: Instant) {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = self.over();
        self.whole.store(false, Ordering::Relaxed);
        self.untaken.store(false, Ordering::Relaxed);
        self.enter(Stage::Connecting);
        self.waits.begin_attempt(worker::lag(now), now);
    }

    /// For how long the endpoint of the present attempt may be waited for until its response header is here, and when
    /// the exchange is to have all of its answer.
    pub fn bound(&self, attempt: Option<Duration>, deadline: Option<Deadline>) {
        let mut clock = self.clock();
        (clock.bounds.attempt, clock.bounds.deadline) = (attempt, deadline);
    }

    /// The request is out: the response header is due. If it came before the request's end, the rest of the answer is.
    pub fn request_sent(&self, now: Instant) {
        self.whole.store(true, Ordering::Relaxed);
        self.waits.restart(Party::Endpoint, now);
    }

    /// The response is whole, or is Forebay's own: the upstream is waited for no longer.
    fn done(&self, now: Instant) {
        self.enter(Stage::Done);
        self.waits.turn_to(Party::Client, now);
    }

    /// `party` is waited for, by somebody who works for this exchange.
    pub fn waits_for(&self, party: Party) {
        self.waits.turn_to(party, Instant::now());
    }

    /// The party that is waited for, and for how long each was in this attempt.
    pub fn waits(&self) -> &Waits {
        &self.waits
    }

    /// The connection is to close after this answer, and the answer is to say so.
    pub fn close_after_answer(&self) {
        self.wire().close_after_answer();
    }

    /// The trailers of a request of HTTP/1 whose body is here whole, once.
    pub fn take_request_trailers(&self) -> Option<HeaderMap> {
        self.wire().take_request_trailers()
    }

    /// The answer ends with these trailers, of which Pingora does not know.
    pub fn end_with(&self, trailers: HeaderMap) {
        self.wire().end_with(trailers);
    }

    /// The answer comes in this header; see [`Wire::came_in`].
    pub fn answer_came_in(&self, header: Bytes) {
        self.wire().came_in(header);
    }

    /// Through which connection the answer to the present attempt comes.
    pub fn comes_through(&self, window: Option<Window>) {
        self.wire().comes_through(window);
    }

    /// Through which stream it comes, of a connection that others share.
    pub fn comes_by(&self, stream: StreamHandle) {
        self.wire().comes_by(stream);
    }

    /// The answer is never to be held back: its kind or its upstream says so.
    pub fn stream_answer(&self) {
        self.wire().stream();
    }

    /// Nothing of the answer is to leave before all of it is here.
    pub fn hold_answer(&self) {
        self.wire().hold();
    }

    /// Why the session gave up, if it did.
    pub fn fault(&self) -> Option<Fault> {
        self.given_up().or_else(|| self.wire().fault())
    }

    /// For how long writing to the client was blocked.
    pub fn blocked(&self) -> Duration {
        self.wire().blocked()
    }

    /// The length of the request body if it was buffered whole.
    pub fn length(&self) -> Option<u64> {
        Some(self.length.load(Ordering::Relaxed)).filter(|&length| length != u64::MAX)
    }

    /// Whether bytes of the answer have left, or may have: it cannot be another one any more.
    pub fn begun(&self) -> bool {
        self.wire().begun()
    }

    /// Whether all of the answer has left.
    pub fn has_left_whole(&self) -> bool {
        self.wire().has_left_whole()
    }

    /// Whether the client can tell a cut answer from a whole one by its framing.
    pub fn framed(&self) -> bool {
        self.wire().framed()
    }

    /// The status that left (0: none), and the body bytes that came from the client and went to it.
    pub fn outcome(&self) -> (u16, u64, u64) {
        let wire = self.wire();
        (wire.status(), self.received.load(Ordering::Relaxed), wire.sent())
    }

    /// Bytes of bodies that have passed, for a journal. While a request body comes, the wire is at work, and has sent
    /// nothing.
    pub fn passed(&self) -> Passed {
        let received = self.received.load(Ordering::Relaxed);
        match self.wire.try_lock() {
            Ok(wire) => Passed { received, answered: wire.came(), sent: wire.sent() },
            Err(_) => Passed { received, ..Passed::default() },
        }
    }

    /// Bytes that were held back in either direction, and those of them that were on disk.
    pub fn spooled(&self) -> (u64, u64) {
        let (buffered, spilled) = self.wire().spooled();
        (buffered + self.buffered.load(Ordering::Relaxed), spilled + self.spilled.load(Ordering::Relaxed))
    }

    /// Whether the client speaks HTTP/2.
    pub fn is_http2(&self) -> bool {
        self.wire().is_http2()
    }

    /// Lets the client take the rest of the answer, the upstream being released. An error: it will not have it whole.
    pub async fn drain(&self) -> Result<()> {
        std::future::poll_fn(|cx| self.wire().poll_drain(cx)).await
    }

    /// Whether the buffered session is in the place of the client's own.
    pub fn stands_in(&self) -> bool {
        self.stands_in.load(Ordering::Relaxed)
    }

    /// Drops what the client has not taken, and a write under way with the client's session.
    pub fn abandon(&self) {
        self.wire().abandon();
    }

    /// Puts the client's own session back. `false`: it was lost with a write that was given up.
    pub fn reclaim(&self, session: &mut Box<ServerSession>) -> bool {
        if !self.stands_in() {
            return true;
        }
        if self.wire().session().is_none() {
            return false;
        }
        // Dropping ours puts the request header back.
        sessions::put(session, Box::new(()));
        self.give(session);
        self.stands_in.store(false, Ordering::Relaxed);
        true
    }

    /// The client and the endpoint have agreed on another protocol: the client's own session takes its place again, and
    /// all clocks stop. `false`: it was lost with a write that was given up.
    pub fn step_aside(&self, session: &mut Box<ServerSession>) -> bool {
        self.done(Instant::now());
        self.holding.store(false, Ordering::Relaxed);
        self.wire().open_window();
        self.reclaim(session)
    }

    /// Gives the client's own session back, if no write has it.
    fn give(&self, session: &mut Box<ServerSession>) {
        let mut wire = self.wire();
        if let Some(mut own) = wire.release() {
            own.set_write_timeout(self.write_timeout);
            if wire.leaves_rest() {
                own.set_keepalive(None);
                wire.end_after_answer();
            }
            sessions::put_away(std::mem::replace(session, own));
        }
    }

    /// Has the exchange end once its client has left, while nothing reads from that or writes to it: both would find
    /// out. Everything that an exchange waits for with a session of ours comes by here, so none of it is waited for in
    /// vain.
    fn watch(&self, wire: &mut Wire, cx: &mut Context<'_>) {
        let stage = self.stage();
        let has_body = || self.received.load(Ordering::Relaxed) > 0 || self.length().is_some();
        let unwatched = match stage {
            Stage::Unconnected | Stage::Connecting | Stage::Sending => true,
            // Pingora asks the session, unless it has still to get rid of the last pieces of a body.
            Stage::Waiting => has_body(),
            Stage::Receiving => self.holding.load(Ordering::Relaxed) || self.untaken.load(Ordering::Relaxed),
            Stage::Done => false,
        };
        if unwatched
            && self.over().is_none()
            && self.given_up().is_none()
            && wire.poll_left(cx, self.reads.load(Ordering::Relaxed)).is_ready()
        {
            self.end(left(stage), wire);
            cx.waker().wake_by_ref();
        }
    }

    fn wire(&self) -> MutexGuard<'_, Wire> {
        // One task uses it, in turns; the lock is never waited for.
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

    /// The party that is waited for while an answer comes and nothing holds it up: as long as the client sends on, the
    /// endpoint may be waiting for what comes next.
    fn answering_party(&self) -> Party {
        if self.whole.load(Ordering::Relaxed) { Party::Endpoint } else { Party::Client }
    }

    /// When the present wait will have lasted too long, and which fault that is.
    fn due(&self, clock: &Clock) -> Option<(Instant, Fault)> {
        let (stage, whole) = (self.stage(), self.whole.load(Ordering::Relaxed));
        if stage == Stage::Receiving && self.untaken.load(Ordering::Relaxed) {
            // Its answer has begun, and yet it is to take the rest, or go on.
            let bounds = Bounds { attempt: None, ..clock.bounds };
            return bounds.due(Stage::Sending, whole, &self.waits);
        }
        clock.bounds.due(stage, whole, &self.waits)
    }

    /// Gives up the attempt, or the exchange, if the present wait has lasted too long by `now`.
    fn keep_time(&self, wire: &mut Wire, now: Instant) {
        let clock = &mut *self.clock();
        let Some((due, fault)) = self.due(clock).filter(|&(due, _)| clock.look.next(due) <= now) else { return };
        if clock.look.at(due, now) != Seen::Over || self.given_up().is_some() {
            return;
        }
        self.fail(fault, ErrorType::ReadTimedout);
        if fault.what == What::Overdue && fault.phase == Phase::Receive {
            // The answer may be held up by its client, of which Pingora asks nothing then.
            wire.fail(fault);
        }
        wire.abort();
    }

    /// Has this task woken when the present wait may have lasted too long.
    fn set_alarm(&self, cx: &mut Context<'_>) {
        let clock = &mut *self.clock();
        let Some((due, _)) = self.due(clock).filter(|_| self.given_up().is_none()) else { return };
        let next = clock.look.next(due);
        if clock.alarm.poll(cx, next).is_ready() {
            cx.waker().wake_by_ref();
        }
    }

    /// Why the present attempt is given up, if it is, by a clock or because the client has gone.
    fn given_up(&self) -> Option<Fault> {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client has gone, as this error says.
    fn gone(&self, error: Box<Error>, wire: &mut Wire) -> Box<Error> {
        self.fail(left(self.stage()), error.etype().clone());
        wire.abort();
        error
    }

    fn fail(&self, fault: Fault, kind: ErrorType) -> Box<Error> {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault);
        told(fault, kind)
    }
}

impl Gate for Link {
    /// While the answer waits for its client, only the client's side is looked after: nothing is read from the
    /// upstream.
    fn poll_open(&self, cx: &mut Context<'_>, now: Instant) -> Poll<()> {
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
        // While a body is sent, and after it as long as its last pieces are in its channel, Pingora asks neither after
        // the answer nor after the client.
        wire.poll_writing(cx);
        if matches!(self.stage(), Stage::Sending | Stage::Waiting) && self.length().is_some() {
            // Before Pingora hears of it: it would let the endpoint's connection go as it is, with what that has not
            // taken.
            self.watch(&mut wire, cx);
        }
        Poll::Ready(())
    }

    fn polled(&self, time: Duration) {
        if let Some(&class) = Class::ALL.get(self.turn.load(Ordering::Relaxed)) {
            self.lanes.here().took(class, time);
            // What it lets in of an answer is taken in a later poll, and only then held up again.
            if self.holding.load(Ordering::Relaxed) || self.stage() != Stage::Receiving {
                self.turn.store(NO_TURN, Ordering::Relaxed);
            }
        }
    }

    fn waits(&self, cx: &mut Context<'_>) {
        self.set_alarm(cx);
        self.watch(&mut self.wire(), cx);
    }

    fn stop(&self) {
        self.end(Fault::new(Party::Gateway, self.stage().phase(), What::Stopped), &mut self.wire());
    }

    fn last_words(&self) -> Option<Duration> {
        let over = self.over()?;
        // Nothing but dropping it breaks off a connection that is being made, and a client that has left hears nothing.
        let in_vain = over.party == Party::Client && self.stage() == Stage::Connecting;
        Some(if in_vain { Duration::ZERO } else { LAST_WORDS })
    }
}

impl KeepsWaiting for Link {
    fn kept_waiting(&self, now: Instant) -> Duration {
        self.waits.kept_waiting(now)
    }
}

/// The client went away in this stage.
fn left(stage: Stage) -> Fault {
    Fault::new(Party::Client, stage.phase(), What::Left)
}

/// A fault as an error of Pingora, which hands it on to the proxy and does not know more of it.
fn told(fault: Fault, kind: ErrorType) -> Box<Error> {
    Error::explain(kind, format!("{fault:?}"))
}

/// How many operations a poll may go on with once an answer is on its way and others are, too: in one poll Pingora
/// would else read as much of an answer as its channel holds, some 300 KiB, before it looks at the client.
const OPERATIONS: usize = 2;

/// See the module.
pub struct BufferedSession {
    link: Arc<Link>,
    /// The client's own session has a stand-in meanwhile, with all that it needs to frame the answer.
    request: RequestHeader,
    /// Its header as it was written, on HTTP/1.
    written: Bytes,
    intake: Intake,
    tap: Option<Box<dyn Tap>>,
    /// The upstream is one that Pingora calls custom.
    custom: bool,
}

impl Drop for BufferedSession {
    fn drop(&mut self) {
        self.note_spooled();
        if remains::leave_request(&mut self.request) {
            return;
        }
        if let Some(session) = self.link.wire().session() {
            std::mem::swap(session.req_header_mut(), &mut self.request);
        }
    }
}

impl BufferedSession {
    /// Takes the client's session. Until [`BufferedSession::stand_in`] there is nobody in its place.
    pub fn take(session: &mut Box<ServerSession>, terms: Terms, now: Instant) -> (Arc<Link>, Self) {
        let Terms { patience, intake, holds_body, manner, who, control, bypass, custom, tap, depot, lanes } = terms;
        let mut own = std::mem::replace(session, sessions::nobody());
        // The deadline for the client's body is ours, for Pingora has none on HTTP/2.
        own.set_read_timeout(None);
        let write_timeout = own.get_write_timeout();
        own.set_write_timeout(None);
        let reads_past = holds_body && bypass.as_ref().is_some_and(|bypass| !bypass.is_read());
        // Pingora's own settles with the first such question how the body is framed.
        let empty = !reads_past && own.is_body_empty();
        let intake = Intake::new(intake, empty, who.clone(), &depot, &lanes);
        let written = if bypass.is_some() { own.to_h1_raw() } else { Bytes::new() };
        let mut stub = remains::stub();
        stub.set_method(own.req_header().method.clone());
        stub.set_version(own.req_header().version);
        let request = std::mem::replace(own.req_header_mut(), stub);
        let past = bypass.map(|bypass| Past::new(bypass, reads_past));
        let wire = Wire::new((own, past, control), &request, manner, who, depot, lanes.clone());
        let link = Arc::new(Link {
            waits: Waits::new(now),
            stage: AtomicU8::new(Stage::Unconnected as u8),
            whole: AtomicBool::new(false),
            clock: Mutex::new(Clock {
                bounds: Bounds { patience, attempt: None, deadline: None },
                alarm: Timer::default(),
                look: Look::default(),
            }),
            holding: AtomicBool::new(false),
            reads: AtomicBool::new(false),
            untaken: AtomicBool::new(false),
            fault: Mutex::new(None),
            over: Mutex::new(None),
            wire: Mutex::new(wire),
            stands_in: AtomicBool::new(false),
            received: AtomicU64::new(0),
            length: AtomicU64::new(u64::MAX),
            buffered: AtomicU64::new(0),
            spilled: AtomicU64::new(0),
            write_timeout,
            turn: AtomicUsize::new(NO_TURN),
            lanes,
        });
        adopt(link.clone());
        (link.clone(), BufferedSession { link, request, written, intake, tap, custom })
    }

    /// Takes the client's place towards Pingora.
    pub fn stand_in(self, session: &mut Box<ServerSession>) {
        self.link.stands_in.store(true, Ordering::Relaxed);
        sessions::put(session, Box::new(self));
    }

    /// The request has a body to be read.
    pub fn has_body(&self) -> bool {
        !self.intake.is_empty()
    }

    /// The body for somebody who needs it besides, if it is here whole and all of it in memory.
    pub fn share_memory(&mut self) -> Option<Held> {
        self.intake.share_memory()
    }

    /// The request.
    pub fn request_mut(&mut self) -> &mut RequestHeader {
        &mut self.request
    }

    /// Leaves the client's place to its own session again, of which nothing was answered yet.
    pub fn give_back(self, session: &mut Box<ServerSession>) {
        let link = self.link.clone();
        drop(self);
        link.give(session);
    }

    /// Tells the client that its body is wanted (RFC 9110 §10.1.1).
    pub async fn invite(&mut self) -> Result<()> {
        let mut own = self.link.wire().release();
        let outcome = match &mut own {
            Some(own) => {
                // Pingora would close the connection after any answer that precedes the end of the body, this one too.
                own.set_close_on_response_before_downstream_finish(false);
                let outcome = own.write_continue_response().await;
                own.set_close_on_response_before_downstream_finish(true);
                outcome
            }
            None => Ok(()),
        };
        if let Some(own) = own {
            self.link.wire().put_back(own);
        }
        outcome
    }

    /// Reads the body until it is whole, or until it cannot be held and is to be streamed on. Calls `waiting` when it
    /// has to wait for the client for the first time.
    pub async fn fill(&mut self, waiting: &mut (dyn FnMut() + Send)) -> Result<(), Unread> {
        let BufferedSession { link, intake, request, .. } = self;
        let filled = std::future::poll_fn(|cx| {
            if let Some(fault) = link.over() {
                return Poll::Ready(Err(Unread::Fault(Fault { phase: Phase::Buffer, ..fault })));
            }
            let mut waits = |received| {
                link.received.store(received, Ordering::Relaxed);
                waiting();
            };
            let filled = intake.poll_fill(cx, &mut link.wire(), &mut waits);
            intake.name_client(request);
            link.reads.store(filled.is_pending() && intake.is_reading(), Ordering::Relaxed);
            if intake.used_turn() {
                link.turn.store(Class::Pass as usize, Ordering::Relaxed);
            }
            filled
        })
        .await;
        link.received.store(self.intake.received(), Ordering::Relaxed);
        self.note_spooled();
        filled?;
        if let Some(length) = self.intake.whole() {
            self.link.length.store(length, Ordering::Relaxed);
        }
        Ok(())
    }

    fn note_spooled(&self) {
        let (buffered, spilled) = self.intake.spooled();
        self.link.buffered.store(buffered, Ordering::Relaxed);
        self.link.spilled.store(spilled, Ordering::Relaxed);
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
        let taken = wire.poll_taken(cx, self.link.stage() == Stage::Done);
        let piece = if taken.is_ready() { self.intake.poll_piece(cx, &mut wire) } else { Poll::Pending };
        match &piece {
            Poll::Pending if taken.is_ready() => self.link.waits_for(self.intake.waits_for()),
            Poll::Pending => self.link.waits_for(Party::Endpoint),
            // It is asked for, so that what was given before is taken: from here on it is the next one that is to be.
            Poll::Ready(_) => self.link.waits.restart(Party::Endpoint, Instant::now()),
        }
        self.link.untaken.store(taken.is_pending(), Ordering::Relaxed);
        let reads = taken.is_ready() && piece.is_pending() && self.intake.is_reading();
        self.link.reads.store(reads, Ordering::Relaxed);
        self.intake.name_client(&self.request);
        if let Some(error) = wire.take_error() {
            return Poll::Ready(Err(error));
        }
        // While what was held is replayed, nothing is read that would tell.
        if self.intake.whole().is_some()
            && let Poll::Ready(gone) = wire.poll_gone(cx)
        {
            return Poll::Ready(Err(self.link.gone(gone, &mut wire)));
        }
        drop(wire);
        let piece = ready!(piece);
        self.link.received.store(self.intake.received(), Ordering::Relaxed);
        Poll::Ready(piece.map_err(|unread| match unread {
            Unread::Failed(error) => error,
            Unread::Fault(fault) => self.link.fail(fault, ErrorType::ReadTimedout),
        }))
    }

    /// Hands over what came from the upstream, and waits until more may come.
    async fn pass(&mut self, tasks: Vec<HttpTask>) -> Result<bool> {
        let link = &self.link;
        self.intake.answer_moved();
        let taken = link.wire().take(tasks);
        if let Err(error) = taken {
            if link.begun() {
                // What came before the failure leaves if it can. If nothing had left, the client may yet get a better
                // answer.
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
            if let Some(class) = wire.used_turn() {
                link.turn.store(class as usize, Ordering::Relaxed);
            }
            let holds = may_hold && more.is_pending();
            link.holding.store(holds, Ordering::Relaxed);
            if more.is_pending() {
                link.waits_for(wire.waits_for());
            }
            if holds {
                // Else Pingora would read on in this poll, and what it reads would wait in its channel.
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
            // The upstream could not go on while we held it: its clock starts anew.
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
            if link.stage() == Stage::Receiving && link.lanes.here().is_crowded() {
                spend_budget(cx, OPERATIONS_PER_POLL - OPERATIONS);
            }
            let mut wire = link.wire();
            let _ = wire.poll_write(cx);
            match wire.take_error() {
                Some(error) => Poll::Ready(error),
                None => wire.poll_gone(cx).map(|gone| link.gone(gone, &mut wire)),
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

    /// Marks the end and lets the upstream go; what the client has not taken is waited for in [`Link::drain`].
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
        // If that failed, the draining hears of it.
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

    /// The client's own session knows; it is asked once it is back.
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

    // The timeouts of the client's own session were set before; those of Pingora do not reach it.

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

    /// Pingora calls it at the start of every attempt: the body is replayed from its beginning, and what an attempt
    /// before left unsent is forgotten.
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

    // Custom messages belong to protocols that are not HTTP; there are none here. Where an upstream is of a protocol
    // that Pingora does not know itself, it asks for both ends all the same.

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
