//! Writes the response to the client: owns the client's session and the part of the response that was not sent yet.
//!
//! On HTTP/1, bytes are sent past the session ([`Past`]): header and pieces share one system call, and unsent bytes can
//! be moved to the spool. On HTTP/2, and for Pingora's own session, a write is a stored future that *owns* the client's
//! session, so that it is never cancelled half-way. Each kind of write progresses whenever it is polled: by the driver
//! through `super::session` while the upstream responds, by the control of the exchange while the upstream is held
//! back, and by `logging` once the upstream is released. Bytes that the client does not accept go to a spool. In a
//! `Stream` response there is no spool, and the sender waits for the client.

mod client_side;
mod endpoint_side;
mod grants;
mod outgoing;
mod past;
mod policy;

use std::future::Future;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Version};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::http::{HttpTask, ServerSession};
use pingora::{Error, ErrorType, Result};

use crate::client::http1::{self, unread};
use crate::client::http2::Control;
use crate::config::route::BufferMode;
use crate::framing::{Body, LengthFields, answer};
use crate::metrics::Direction;
use crate::party::standstill::Standstill;
use crate::party::wait::Timer;
use crate::party::{Fault, Party, What};
use crate::phase::Phase;
use crate::scheduler::coop::ends_for_lack_of_budget;
use crate::scheduler::{Class, Schedulers};
use crate::slow_client::Entry;
use crate::slow_client::waiting::{Waiting, Who};
use crate::spool::{Room, Spool, SpoolError, Spools};
use crate::upstream::window::Window;
use client_side::{ClientSide, State};
use endpoint_side::EndpointSide;
use grants::Grants;
use outgoing::{Head, Outgoing, body_len};

pub use past::Past;
pub use policy::{ResponsePolicy, Throttle};

/// Up to this many bytes, tasks are written in one batch, which copies them together. Larger amounts are written one
/// task at a time, without a copy.
const TOGETHER_BYTES: usize = 16 << 10;
/// Minimum and maximum number of bytes given to the session at once. Slow clients get small pieces: these use less
/// memory, and the minimum rate is checked more often.
const PIECE_LEAST: usize = 4 << 10;
const PIECE_MOST: usize = 64 << 10;
/// Past the session: maximum number of bytes sent at once.
const SEND_MOST: usize = 256 << 10;
/// Maximum number of bytes read from the spool at once, for a client that was slow and for one that was not.
const SPOOLED_MOST_SLOW: usize = 32 << 10;
const SPOOLED_MOST: usize = 128 << 10;
/// On HTTP/2 a piece is one frame, and progress is known only in whole pieces.
const PIECE_MOST_H2: usize = 16 << 10;

/// The sender of one response; see the module.
pub struct ResponseBody {
    /// The client's session, and the path past it.
    pub client: ClientSide,
    /// The connection or stream that the response comes from.
    pub endpoint: EndpointSide,
    outgoing: Outgoing,
    delays: Delays,
    grants: Grants,
    failure: Failure,
    policy: ResponsePolicy,
    mode: BufferMode,
    /// The response may not be sent before it is complete (`BufferMode::Full`).
    held: bool,
    spools: Arc<Spools>,
}

/// The waits of a sender.
struct Delays {
    /// The party that the last poll waits for.
    waits_for: Party,
    /// Start of a limited rate.
    first_byte: Option<Instant>,
    /// The current wait for a client that accepts no bytes.
    blocked: Option<Waiting>,
    /// What the client's host acknowledges in this wait.
    acknowledged: Acknowledged,
    /// The limit of this wait on HTTP/2.
    still: Option<Standstill>,
    /// The total of the earlier ones.
    blocked_before: Duration,
    /// The client's entry in the list of slow clients.
    slow: Option<Entry>,
    /// Start of the wait for the disk: for a read from the spool, or for space in it while the response is held.
    fetching: Option<Instant>,
    timer: Timer,
}

impl Delays {
    fn none() -> Self {
        Delays {
            waits_for: Party::Client,
            first_byte: None,
            blocked: None,
            acknowledged: Acknowledged::default(),
            still: None,
            blocked_before: Duration::ZERO,
            slow: None,
            fetching: None,
            timer: Timer::default(),
        }
    }

    /// Total time for which the client accepted no bytes.
    fn blocked(&self) -> Duration {
        self.blocked_before + self.blocked.as_ref().map_or(Duration::ZERO, Waiting::lasted)
    }

    /// Ends the wait for the client; returns how long it was, if there was one.
    fn end_blocked(&mut self) -> Option<Duration> {
        let waited = self.blocked.take()?.lasted();
        self.still = None;
        self.blocked_before += waited;
        Some(waited)
    }
}

/// Bytes that a client's host acknowledges while the client is waited for. The kernel reports room for more bytes only
/// once a third of its buffer is free, so a client can take many bytes without accepting one. They are looked at only
/// if the client seems to be too slow.
#[derive(Default)]
struct Acknowledged {
    /// The count at the start of the wait. `None`: unknown.
    at_first: Option<u64>,
    /// Bytes since then, at the last look.
    bytes: u64,
    /// The duration of the wait before which there is no further look.
    next: Duration,
}

impl Acknowledged {
    /// Minimum interval of two looks.
    const INTERVAL: Duration = Duration::from_millis(100);

    /// A wait that begins with this count.
    fn begin(at_first: Option<u64>) -> Self {
        Acknowledged { at_first, ..Acknowledged::default() }
    }

    /// Looks at the count after the wait has lasted for this time. `true`: the client took bytes since the last look.
    fn look(&mut self, count: Option<u64>, lasted: Duration) -> bool {
        let bytes = count.zip(self.at_first).map_or(0, |(count, at_first)| count.saturating_sub(at_first));
        self.next = lasted + Self::INTERVAL;
        let took = bytes > self.bytes;
        self.bytes = self.bytes.max(bytes);
        took
    }
}

/// How sending failed.
#[derive(Default)]
struct Failure {
    /// The client will not receive the whole response.
    broken: bool,
    /// The write in progress timed out. It is dropped together with the session when the response is abandoned.
    given_up: bool,
    error: Option<Box<Error>>,
    fault: Option<Fault>,
}

impl ResponseBody {
    /// Creates the sender for a session that has written nothing yet, and the path past it, if there is one.
    pub fn new(
        client: (Box<ServerSession>, Option<Past>, Option<Control>),
        request: &RequestHeader,
        policy: ResponsePolicy,
        who: Who,
        spools: Arc<Spools>,
        schedulers: Arc<Schedulers>,
    ) -> Self {
        let client = ClientSide::new(client, request, who);
        let piece = if client.past.is_some() { 2 * PIECE_MOST } else { PIECE_LEAST };
        ResponseBody {
            client,
            endpoint: EndpointSide::default(),
            outgoing: Outgoing { piece, ..Outgoing::default() },
            delays: Delays::none(),
            grants: Grants::new(schedulers),
            failure: Failure::default(),
            mode: policy.mode,
            held: policy.mode == BufferMode::Full,
            policy,
            spools,
        }
    }

    /// Whether the response is bulk.
    pub fn is_bulk(&self) -> bool {
        self.outgoing.is_bulk()
    }

    /// Takes the class of the grant that the last poll used.
    pub fn used_grant(&mut self) -> Option<Class> {
        self.grants.used.take()
    }

    /// Whether the response was received completely.
    pub fn ended(&self) -> bool {
        self.outgoing.ended
    }

    /// Ends the response with these trailers.
    pub fn end_with(&mut self, trailers: HeaderMap) {
        self.outgoing.last = Some(HttpTask::Trailer(Some(Box::new(trailers))));
    }

    /// Whether bytes of the request body are unread, as the session does not know, or part of a response that has begun
    /// was not sent: the connection cannot be reused.
    pub fn leaves_rest(&self) -> bool {
        let unfinished =
            self.outgoing.begun && (!self.outgoing.end_written || self.failure.broken || self.client.sends());
        self.client.leaves_body() || (self.client.past.is_some() && unfinished)
    }

    /// Whether the whole response was sent.
    pub fn has_left_whole(&self) -> bool {
        let sent = self.client.past.as_ref().is_none_or(|past| past.bypass.has_sent_all());
        self.outgoing.end_written
            && !self.failure.broken
            && !self.client.sends()
            && sent
            && matches!(self.client.state, State::Idle(_))
    }

    /// Abandons the response: drops unsent bytes, and a write in progress together with its session.
    pub fn abandon(&mut self) {
        self.forget();
        if matches!(self.client.state, State::Writing(_)) || self.client.sends() {
            self.client.state = State::Gone;
        }
        self.delays.end_blocked();
    }

    /// Resets the state for a new attempt: drops unsent bytes of the previous one.
    pub fn restart(&mut self) {
        if !self.outgoing.begun {
            self.forget();
            self.outgoing.ended = false;
            self.mode = self.policy.mode;
            self.held = self.mode == BufferMode::Full;
            self.outgoing.head = None;
            self.outgoing.came = 0;
            self.client.last_on_connection = false;
        }
    }

    fn forget(&mut self) {
        self.outgoing.clear();
        self.client.past.iter_mut().for_each(|past| past.written.clear());
        self.grants.leave();
    }

    /// Continues a write in progress.
    pub fn poll_writing(&mut self, cx: &mut Context<'_>) {
        if matches!(self.client.state, State::Writing(_)) || self.client.sends() {
            // The result is kept for the next caller of `poll_write`.
            let _ = self.poll_write(cx);
        }
    }

    /// Whether bytes of the final response may have been sent.
    pub fn begun(&self) -> bool {
        self.outgoing.begun
    }

    /// The status of the response that has begun; 0 if none has.
    pub fn status(&self) -> u16 {
        self.outgoing.head.filter(|_| self.outgoing.begun).map_or(0, |head| head.status)
    }

    /// Whether the framing lets the client recognise a response that was cut off.
    pub fn framed(&self) -> bool {
        self.outgoing.head.is_none_or(|head| self.client.is_http2() || head.body != Body::UntilEnd)
    }

    /// Body bytes that the client's session accepted.
    pub fn sent(&self) -> u64 {
        self.outgoing.gone
    }

    /// Body bytes received from the upstream.
    pub fn came(&self) -> u64 {
        self.outgoing.came
    }

    /// Bytes that were spooled, and those of them that were on disk.
    pub fn spooled(&self) -> (u64, u64) {
        self.outgoing.spooled()
    }

    /// If the client is listed as slow: adds its request to the list entry.
    pub fn name_client(&self, request: &RequestHeader) {
        if let Some(entry) = &self.delays.slow {
            entry.name(|| self.client.who.asked(request));
        }
    }

    /// Total time for which the client accepted no bytes.
    pub fn blocked(&self) -> Duration {
        self.delays.blocked()
    }

    /// The fault that ended writing, if any.
    pub fn fault(&self) -> Option<Fault> {
        self.failure.fault
    }

    /// The party that must act before more can be written or received.
    pub fn waits_for(&self) -> Party {
        self.delays.waits_for
    }

    /// Disables buffering from here on: for server-sent events, or if the upstream requests it.
    pub fn stream(&mut self) {
        self.mode = BufferMode::Stream;
        self.held = false;
    }

    /// Holds the response back until it is complete.
    pub fn hold(&mut self) {
        self.mode = BufferMode::Full;
        self.held = !self.outgoing.ended;
    }

    /// Takes the error that ended writing. A second call returns `None`.
    pub fn take_error(&mut self) -> Option<Box<Error>> {
        self.failure.error.take()
    }

    /// Whether writing is no longer possible.
    pub fn failed(&self) -> bool {
        self.failure.broken || matches!(self.client.state, State::Gone)
    }

    /// Stores the received bytes of the next response header, interim or final; they have the spelling of the field
    /// names.
    pub fn came_in(&mut self, header: Bytes) {
        self.client.past.iter_mut().for_each(|past| past.written.push_back(header.clone()));
    }

    /// Takes parts of the response from the upstream.
    ///
    /// # Errors
    ///
    /// The upstream's error, if a task carries one, or a filter's contradictory framing fields.
    pub fn take(&mut self, tasks: Vec<HttpTask>) -> Result<()> {
        self.grants.admitted = false;
        let spooling = self.held || self.outgoing.unread() > 0;
        for task in tasks {
            match task {
                // A client of HTTP/1.0 does not know interim responses (RFC 9110 §15.2).
                HttpTask::Header(head, _)
                    if self.client.version == Version::HTTP_10 && head.status.is_informational() =>
                {
                    self.client.past.iter_mut().for_each(|past| drop(past.written.pop_front()));
                }
                HttpTask::Header(mut head, end) => {
                    if !head.status.is_informational() {
                        self.frame(&mut head, end)?;
                    }
                    self.outgoing.ended |= end;
                    self.outgoing.ready.push_back(HttpTask::Header(head, end));
                }
                // Bytes after an upgrade do not pass through here.
                HttpTask::Body(piece, end) | HttpTask::UpgradedBody(piece, end) => {
                    self.outgoing.ended |= end;
                    let Some(piece) = piece.filter(|piece| !piece.is_empty()) else { continue };
                    self.outgoing.came += piece.len() as u64;
                    if spooling {
                        self.push(piece);
                    } else {
                        self.outgoing.ready.push_back(HttpTask::Body(Some(piece), false));
                    }
                }
                HttpTask::Failed(error) => return Err(error),
                last @ (HttpTask::Trailer(_) | HttpTask::Done) => {
                    self.outgoing.ended = true;
                    self.outgoing.last.get_or_insert(last);
                }
            }
        }
        if self.outgoing.ended {
            self.held = false;
        }
        Ok(())
    }

    /// Marks the response as complete.
    pub fn end(&mut self) {
        self.outgoing.ended = true;
        self.held = false;
    }

    /// Sets the framing fields of the final header for the client. `end`: the body is empty, whatever the header says.
    ///
    /// The endpoint's framing was checked on receipt, and the header has been treated as HTTP/1.1 since. A filter
    /// causes any error here.
    fn frame(&mut self, header: &mut ResponseHeader, end: bool) -> Result<()> {
        let (status, length_fields) = (header.status.as_u16(), LengthFields::of(&header.headers));
        let framed =
            answer::frame(self.client.head_only, status, Version::HTTP_11, &length_fields, self.client.version)
                .map_err(|fault| Error::explain(ErrorType::InternalError, fault.words()))?;
        let framed = if end { framed.ended() } else { framed };
        framed.apply(&length_fields, header)?;
        if let Some(past) = &mut self.client.past {
            past.framing = framed.write;
            // Closing the connection ends the body.
            self.client.last_on_connection |= framed.write == Body::UntilEnd;
        }
        self.outgoing.head = Some(Head { status, body: framed.write, length: framed.length });
        Ok(())
    }

    fn push(&mut self, piece: Bytes) {
        let ResponseBody { outgoing, spools, policy, grants, client, .. } = self;
        grants.schedulers.here().count_spooled(piece.len() as u64);
        let begin = || {
            let account = client.who.account(&spools.accounts);
            Spool::consuming(spools, Direction::Response, policy.limits, account.as_ref(), Some(&policy.route))
        };
        outgoing.spool.get_or_insert_with(|| Box::new(begin())).push(piece);
    }

    /// Writes everything that may be sent. Ready when no more may be sent, or when writing has failed.
    pub fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let sends = self.client.sends();
            match &mut self.client.state {
                State::Gone => return Poll::Ready(()),
                State::Writing(_) if self.failure.given_up => return Poll::Ready(()),
                State::Writing(write) => match write.as_mut().poll(cx) {
                    Poll::Ready((session, outcome)) => {
                        self.client.state = State::Idle(session);
                        self.written(outcome);
                    }
                    // The task's poll budget is used up; the client is not the cause.
                    Poll::Pending if ends_for_lack_of_budget(cx) => return Poll::Pending,
                    Poll::Pending => {
                        let fault = ready!(self.poll_patience(cx));
                        self.fail(fault);
                        self.failure.given_up = true;
                    }
                },
                State::Idle(_) if self.failure.broken => return Poll::Ready(()),
                State::Idle(_) if sends => ready!(self.poll_send(cx)),
                State::Idle(_) if self.client.past.is_some() => {
                    if !ready!(self.poll_fill(cx)) {
                        return Poll::Ready(());
                    }
                }
                State::Idle(_) => match ready!(self.poll_batch(cx)) {
                    Some(batch) => self.begin(batch),
                    None => return Poll::Ready(()),
                },
            }
        }
    }

    /// Takes the next bytes to send past the session. Ready with `false` if none may be sent.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let gathered = self.gather_headers();
        let filled = if self.held { Poll::Ready(false) } else { self.poll_fill_body(cx) };
        let Some(past) = self.client.past.as_mut().filter(|_| !self.failure.broken) else { return filled };
        past.sends = gathered || filled == Poll::Ready(true);
        // A header is sent even if its body must wait.
        if gathered { Poll::Ready(true) } else { filled }
    }

    /// Serialises the next headers that may be sent. Interim responses are never held, since a client may wait for one
    /// before it sends its body.
    fn gather_headers(&mut self) -> bool {
        let held = self.held;
        let may_leave =
            |task: &HttpTask| matches!(task, HttpTask::Header(head, _) if !held || head.status.is_informational());
        let mut gathered = false;
        while self.outgoing.ready.front().is_some_and(may_leave)
            && let Some(HttpTask::Header(mut answer, _)) = self.outgoing.ready.pop_front()
        {
            gathered = true;
            if !answer.status.is_informational() {
                self.outgoing.begun = true;
                if self.client.last_on_connection {
                    self.client.end_after_answer();
                }
            }
            let Some(past) = &mut self.client.past else { continue };
            let written = past.written.pop_front().unwrap_or_default();
            http1::gather_header(&past.bypass, &mut answer, &written);
            past.answered = Some(answer);
        }
        gathered
    }

    /// Takes the next body bytes that may be sent, and the end of the body.
    fn poll_fill_body(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let ready: usize = self.outgoing.ready.iter().map(body_len).sum();
        let unread = self.outgoing.unread();
        self.outgoing.writing = 0;
        self.client.past.iter_mut().for_each(|past| past.was_spooled = ready == 0);
        if ready > 0 {
            let all = ready <= TOGETHER_BYTES && self.policy.throttle.is_none();
            let mut left = if all { ready } else { self.limit().min(ready) };
            ready!(self.poll_throttle(cx, left));
            let (Some(past), outgoing) = (&mut self.client.past, &mut self.outgoing) else { return Poll::Ready(false) };
            while left > 0
                && let Some(HttpTask::Body(Some(piece), _)) = outgoing.ready.front_mut()
            {
                let part = piece.split_to(piece.len().min(left));
                left -= part.len();
                outgoing.writing += part.len() as u64;
                if piece.is_empty() {
                    outgoing.ready.pop_front();
                }
                past.push(part);
            }
        } else if unread > 0 {
            let Some(piece) = ready!(self.poll_spooled(cx)) else { return Poll::Ready(false) };
            self.outgoing.writing = piece.len() as u64;
            if let Some(past) = &mut self.client.past {
                past.push(piece);
            }
        }
        let is_end = self.outgoing.ended
            && !self.outgoing.end_written
            && self.outgoing.ready.is_empty()
            && self.outgoing.unread() == 0;
        if is_end {
            self.outgoing.end_written = true;
            let trailers = if let Some(HttpTask::Trailer(fields)) = self.outgoing.last.take() { fields } else { None };
            if self.client.past.as_mut().is_some_and(|past| !past.end(trailers.as_deref())) {
                self.failure.fault.get_or_insert(Fault::new(Party::Endpoint, Phase::Receive, What::Malformed));
                self.written(Err(shorter_or_longer()));
                return Poll::Ready(false);
            }
        }
        let some = self.outgoing.writing > 0 || is_end;
        self.outgoing.begun |= some;
        Poll::Ready(some)
    }

    /// Sends past the session. Ready when all bytes were sent, or when sending failed.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(past) = &mut self.client.past else { return Poll::Ready(()) };
        match past.bypass.poll_send(cx, &mut past.pieces, self.outgoing.end_written) {
            Poll::Ready(outcome) => {
                past.sends = false;
                let failed = |error| Error::because(ErrorType::WriteError, "writing the response", error).into_down();
                self.written(outcome.map(|()| self.outgoing.end_written).map_err(failed));
            }
            Poll::Pending if ends_for_lack_of_budget(cx) => return Poll::Pending,
            Poll::Pending => {
                self.spare();
                let fault = ready!(self.poll_patience(cx));
                self.fail(fault);
            }
        }
        Poll::Ready(())
    }

    /// Moves bytes that the client does not accept back to `ready`, from where they can be spooled. Bytes from the
    /// spool stay in memory: they would be spooled and counted twice.
    fn spare(&mut self) {
        let spools = self.outgoing.unread() > 0;
        let Some(past) = self.client.past.as_mut().filter(|past| !spools && !past.was_spooled) else { return };
        let spared = past.spare();
        if spared.is_empty() {
            return;
        }
        self.outgoing.end_written = false;
        for piece in spared.into_iter().rev() {
            self.outgoing.writing -= piece.len() as u64;
            self.outgoing.ready.push_front(HttpTask::Body(Some(piece), false));
        }
    }

    /// Takes the next batch for the session.
    fn poll_batch(&mut self, cx: &mut Context<'_>) -> Poll<Option<Vec<HttpTask>>> {
        if self.held {
            // Interim responses are never held, since a client may wait for one before it sends its body.
            let interim = |task: &HttpTask| matches!(task, HttpTask::Header(head, _) if head.status.is_informational());
            let interim =
                self.outgoing.ready.front().is_some_and(interim).then(|| self.outgoing.ready.pop_front()).flatten();
            return Poll::Ready(interim.map(|task| vec![task]));
        }
        if !self.outgoing.ready.is_empty() {
            return self.poll_ready_batch(cx).map(Some);
        }
        let unread = self.outgoing.unread();
        if unread > 0 {
            let piece = ready!(self.poll_spooled(cx));
            let Some(piece) = piece else { return Poll::Ready(None) };
            let end = self.outgoing.ended && self.outgoing.last.is_none() && unread == piece.len() as u64;
            return Poll::Ready(Some(vec![HttpTask::Body(Some(piece), end)]));
        }
        Poll::Ready((self.outgoing.ended && !self.outgoing.end_written).then(|| vec![self.outgoing.end_task()]))
    }

    fn poll_ready_batch(&mut self, cx: &mut Context<'_>) -> Poll<Vec<HttpTask>> {
        let bytes: usize = self.outgoing.ready.iter().map(body_len).sum();
        let whole = self.outgoing.unread() == 0;
        if bytes <= TOGETHER_BYTES && self.policy.throttle.is_none() {
            let mut batch: Vec<_> = self.outgoing.ready.drain(..).collect();
            if whole && self.outgoing.ended {
                match batch.last_mut() {
                    Some(HttpTask::Body(_, end) | HttpTask::Header(_, end)) if self.outgoing.last.is_none() => {
                        *end = true
                    }
                    _ => batch.push(self.outgoing.end_task()),
                }
            }
            return Poll::Ready(batch);
        }
        let Some(HttpTask::Body(Some(piece), _)) = self.outgoing.ready.front() else {
            return Poll::Ready(self.outgoing.ready.pop_front().into_iter().collect());
        };
        // One piece per batch: the session would write several one by one, or copy them together.
        let left = self.limit().min(piece.len());
        ready!(self.poll_throttle(cx, left));
        let Some(HttpTask::Body(Some(piece), _)) = self.outgoing.ready.front_mut() else {
            return Poll::Ready(Vec::new());
        };
        let part = piece.split_to(left);
        if piece.is_empty() {
            self.outgoing.ready.pop_front();
        }
        let end = whole && self.outgoing.ended && self.outgoing.last.is_none() && self.outgoing.ready.is_empty();
        Poll::Ready(vec![HttpTask::Body(Some(part), end)])
    }

    fn poll_spooled(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        // Unaccepted bytes stay in memory, so a slow client gets smaller reads.
        let slow = self.delays.blocked_before > Duration::ZERO;
        let limit = self.limit().min(if slow { SPOOLED_MOST_SLOW } else { SPOOLED_MOST });
        ready!(self.poll_throttle(cx, limit));
        let Some(spool) = &mut self.outgoing.spool else { return Poll::Ready(None) };
        let Poll::Ready(next) = spool.poll_next(cx, limit) else {
            let since = *self.delays.fetching.get_or_insert_with(Instant::now);
            self.delays.waits_for = Party::Disk;
            ready!(self.delays.timer.poll(cx, since + self.policy.disk_max));
            tracing::error!("the disk did not return a spooled response in time");
            self.fail(Fault::new(Party::Disk, Phase::Write, What::Silent));
            return Poll::Ready(None);
        };
        self.delays.fetching = None;
        match next {
            Ok(piece) => Poll::Ready(piece),
            Err(error) => {
                tracing::error!(%error, "a spooled response could not be read back");
                self.fail(Fault::new(Party::Disk, Phase::Write, What::Failed));
                Poll::Ready(None)
            }
        }
    }

    fn limit(&self) -> usize {
        self.policy.throttle.map_or(self.outgoing.piece, |throttle| throttle.piece())
    }

    /// Ready when the maximum rate permits sending these bytes.
    fn poll_throttle(&mut self, cx: &mut Context<'_>, bytes: usize) -> Poll<()> {
        let Some(throttle) = self.policy.throttle else { return Poll::Ready(()) };
        let first = *self.delays.first_byte.get_or_insert_with(Instant::now);
        let due = first + throttle.due(self.outgoing.gone + bytes as u64);
        if Instant::now() >= due {
            return Poll::Ready(());
        }
        self.delays.waits_for = Party::Gateway;
        self.delays.timer.poll(cx, due)
    }

    fn begin(&mut self, batch: Vec<HttpTask>) {
        let State::Idle(mut session) = std::mem::replace(&mut self.client.state, State::Gone) else { return };
        self.outgoing.begun |= batch.iter().any(is_of_answer);
        self.outgoing.end_written |= batch.last().is_some_and(HttpTask::is_end);
        if self.client.last_on_connection {
            session.set_keepalive(None);
        }
        self.outgoing.writing = batch.iter().map(|task| body_len(task) as u64).sum();
        if self.outgoing.is_misframed() {
            self.client.state = State::Idle(session);
            return self.written(Err(shorter_or_longer()));
        }
        self.client.state = State::Writing(Box::pin(async move {
            let outcome = session.response_duplex_vec(batch).await;
            (session, outcome)
        }));
    }

    fn written(&mut self, outcome: Result<bool>) {
        if outcome.is_ok() {
            self.outgoing.gone += self.outgoing.writing;
        }
        match self.delays.end_blocked() {
            Some(waited) => {
                let acknowledged = std::mem::take(&mut self.delays.acknowledged).bytes;
                self.policy.min_rate.moved(self.outgoing.writing.max(acknowledged), waited);
                self.outgoing.piece = PIECE_LEAST;
            }
            None => {
                // Bytes accepted without waiting count for the rate, too.
                self.policy.min_rate.moved(self.outgoing.writing, Duration::ZERO);
                let most = match (&self.client.past, self.client.control.is_some()) {
                    (Some(past), _) if past.framing != Body::Chunked => SEND_MOST,
                    (None, true) => PIECE_MOST_H2,
                    _ => PIECE_MOST,
                };
                self.outgoing.piece = (self.outgoing.piece * 2).min(most);
            }
        }
        self.outgoing.writing = 0;
        if let Err(error) = outcome {
            self.failure.fault.get_or_insert(Fault::new(Party::Client, self.outgoing.phase(), What::Left));
            self.forget();
            self.failure.broken = true;
            self.failure.error = Some(error);
        }
    }

    /// Ready when the write in progress takes too long, with the limit that the client exceeded.
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<Fault> {
        let phase = self.outgoing.phase();
        self.delays.waits_for = Party::Client;
        let left = self.outgoing.left();
        let ResponseBody { delays, spools, client, policy, outgoing, .. } = self;
        let Delays { blocked, slow, acknowledged, still, timer, .. } = delays;
        let enter = || spools.slow.enter(Direction::Response, Some(&policy.route), client.who.client);
        let entry = slow.get_or_insert_with(enter);
        entry.set(phase, left);
        let fault = |what| Poll::Ready(Fault::new(Party::Client, phase, what));
        let waiting = match blocked {
            Some(waiting) => waiting,
            None => {
                *acknowledged = Acknowledged::begin(client.delivered_while_stalled());
                blocked.insert(Waiting::begin(Some(spools.budget.slow(Direction::Response)), entry))
            }
        };
        // On HTTP/1 the stream enforces this limit more precisely, since it observes every byte.
        if client.control.is_some() {
            let still = still.get_or_insert_with(|| Standstill::begin(acknowledged.at_first));
            if still.poll(cx, policy.write_idle, || client.delivered_while_stalled()).is_ready() {
                return fault(What::Silent);
            }
        }
        loop {
            let patience = policy.min_rate.patience(outgoing.writing.max(acknowledged.bytes));
            let Some(patience) = patience else { return Poll::Pending };
            ready!(timer.poll_limit(cx, waiting.since, patience.max(acknowledged.next)));
            let lasted = waiting.lasted();
            let took = acknowledged.look(client.delivered_while_stalled(), lasted);
            let patience = policy.min_rate.patience(outgoing.writing.max(acknowledged.bytes));
            if !took || patience.is_some_and(|patience| patience <= lasted) {
                return fault(What::Slow);
            }
        }
    }

    /// Ends writing because of this fault.
    pub fn fail(&mut self, fault: Fault) {
        self.failure.fault.get_or_insert(fault);
        self.failure.broken = true;
        self.forget();
        self.delays.end_blocked();
        self.failure.error = Some(Error::explain(ErrorType::WriteError, format!("{fault:?}")).into_down());
    }

    /// Ready when more may be received from the upstream: the client has accepted everything, or the spool has room and
    /// the exchange has its grant. Also ready when writing has failed.
    pub fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let written = self.poll_write(cx);
        if self.failed() {
            return Poll::Ready(());
        }
        if self.outgoing.ended {
            self.grants.bulk = None;
        }
        if self.outgoing.ended || self.grants.admitted {
            self.grants.grant = None;
            return Poll::Ready(());
        }
        if written.is_pending() && ends_for_lack_of_budget(cx) {
            self.delays.waits_for = Party::Gateway;
            return Poll::Pending;
        }
        self.set_aside();
        if written.is_ready() && !self.held {
            if self.outgoing.is_bulk() && self.grants.is_crowded() {
                ready!(self.poll_grant(cx, Class::Transfer, false));
            }
        } else {
            // Interim responses wait for the client; only a final response can be spooled.
            let interim = self.outgoing.head.is_none() && !self.held;
            if self.mode == BufferMode::Stream || interim {
                return Poll::Pending;
            }
            let admitted = self.poll_admitted(cx);
            if admitted.is_pending() && self.held {
                ready!(self.poll_held(cx));
                return Poll::Ready(());
            }
            ready!(admitted);
            self.delays.fetching = None;
        }
        if self.outgoing.came > 0 {
            self.endpoint.window.iter_mut().for_each(Window::open);
        }
        self.grants.admitted = true;
        Poll::Ready(())
    }

    /// Moves received bytes that the client has not accepted to the spool.
    fn set_aside(&mut self) {
        let first = self.outgoing.ready.iter().position(|task| matches!(task, HttpTask::Body(..)));
        let Some(first) = first.filter(|_| self.mode != BufferMode::Stream) else { return };
        for task in self.outgoing.ready.split_off(first) {
            if let HttpTask::Body(Some(piece), _) = task {
                self.push(piece);
            }
        }
    }

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(spool) = &mut self.outgoing.spool else { return Poll::Ready(()) };
        spool.idle(cx);
        match spool.room(cx) {
            Ok(Room::Free) => return Poll::Ready(()),
            Ok(Room::Disk) => {
                self.delays.waits_for = Party::Disk;
                return Poll::Pending;
            }
            Ok(Room::Pressure | Room::Full) => {}
            // The bytes are still in memory; only further room is missing.
            Err(SpoolError::Full(_)) => {}
            Err(SpoolError::Failed(error)) => {
                tracing::error!(%error, "a response could not be spooled to disk");
            }
        }
        // Only the client can make room. A held response would wait for ever, so it is sent now.
        if std::mem::take(&mut self.held) {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    /// Ready when the spool has room and the exchange has its grant.
    fn poll_admitted(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        ready!(self.poll_room(cx));
        // The client of a held response waits for it.
        let class = if self.held { Class::Transfer } else { Class::Spool };
        let disk = self.outgoing.spool.as_ref().is_some_and(|spool| spool.needs_disk());
        self.poll_grant(cx, class, disk)
    }

    /// Limits the waits of a held response for the disk or a grant: by `disk_max`, and by the client's connection.
    /// Ready when the response has failed.
    fn poll_held(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let since = *self.delays.fetching.get_or_insert_with(Instant::now);
        let fault = if self.client.poll_gone(cx).is_ready() {
            Fault::new(Party::Client, Phase::Receive, What::Left)
        } else {
            ready!(self.delays.timer.poll(cx, since + self.policy.disk_max));
            tracing::error!("the disk did not accept a held response in time");
            Fault::new(Party::Disk, Phase::Receive, What::Silent)
        };
        self.fail(fault);
        Poll::Ready(())
    }

    fn poll_grant(&mut self, cx: &mut Context<'_>, class: Class, disk: bool) -> Poll<()> {
        let grant = self.grants.poll(cx, class, self.outgoing.missing(), disk);
        if grant.is_pending() {
            self.delays.waits_for = Party::Gateway;
        }
        grant
    }

    /// Reads a piece of the request body. Unless the body is read past the session, it waits for a write in progress,
    /// which owns the session.
    pub fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>>> {
        if let Some(past) = self.client.past.as_ref().filter(|past| past.reads) {
            return past.bypass.poll_piece(cx).map_err(unread);
        }
        if self.client.session().is_none() {
            let _ = self.poll_write(cx);
        }
        let Some(session) = self.client.session() else { return Poll::Pending };
        let mut read = std::pin::pin!(session.read_request_body());
        read.as_mut().poll(cx)
    }

    /// Writes the rest of the response. Ready when all of it was sent, or when writing failed.
    pub fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let written = self.poll_write(cx);
        if self.failed() {
            return Poll::Ready(Err(self
                .failure
                .error
                .take()
                .unwrap_or_else(|| Error::new_down(ErrorType::WriteError))));
        }
        if written.is_ready() {
            return Poll::Ready(Ok(()));
        }
        self.set_aside();
        if let Some(spool) = &mut self.outgoing.spool {
            spool.idle(cx);
        }
        self.client.poll_gone(cx).map(|gone| {
            self.failure.fault.get_or_insert(Fault::new(Party::Client, Phase::Write, What::Left));
            Err(gone)
        })
    }
}

fn shorter_or_longer() -> Box<Error> {
    Error::explain(ErrorType::WriteError, "the response is shorter or longer than announced").into_down()
}

/// Whether a task belongs to the final response.
fn is_of_answer(task: &HttpTask) -> bool {
    !matches!(task, HttpTask::Header(head, _) if head.status.is_informational())
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use http::Method;
    use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};

    use super::past::SEND_LEFT;
    use super::*;
    use crate::client::connection::tests::connection;
    use crate::client::http1;
    use crate::client::stream::{ClientStream, Opening};
    use crate::metrics::Metrics;
    use crate::slow_client::min_rate::MinRate;
    use crate::spool::Limits;
    use crate::spool::tests::spools;

    const LIMITS: Limits = Limits { memory: 1 << 20, disk: 1 << 20 };

    #[tokio::test]
    async fn what_was_spooled_and_is_not_taken_is_not_spooled_again() {
        let (mut client, io) = tokio::io::duplex(4 << 10);
        client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.expect("room");
        let mut stream = ClientStream::new(Box::new(io), connection(""));
        let Ok(Opening::Http1(request)) = stream.open().await else { panic!("no request was opened") };
        let session = http1::Session::new(&stream, request);
        let session = Box::new(ServerSession::new_custom(Box::new(session)));

        let metrics = Metrics::new(u64::MAX, Vec::new());
        let policy = ResponsePolicy {
            mode: BufferMode::Full,
            limits: LIMITS,
            min_rate: MinRate::unlimited(),
            write_idle: Duration::from_secs(60),
            disk_max: Duration::from_secs(60),
            throttle: None,
            route: metrics.route("all"),
        };
        let schedulers = Schedulers::new(metrics.clone(), || false, Duration::from_secs(60));
        let past = Past::new(stream.bypass(), false);
        let request = RequestHeader::build(Method::GET, b"/", None).expect("a request");
        let mut response =
            ResponseBody::new((session, Some(past), None), &request, policy, Who::default(), spools(), schedulers);

        let body = Bytes::from(vec![b'x'; PIECE_MOST]);
        let mut header = ResponseHeader::build(200, None).expect("an answer");
        header.insert_header("content-length", body.len()).expect("a field");
        response
            .take(vec![HttpTask::Header(Box::new(header), false), HttpTask::Body(Some(body.clone()), false)])
            .expect("sound");
        response.end();
        let drained = std::future::poll_fn(|cx| Poll::Ready(response.poll_drain(cx).is_ready())).await;
        assert!(!drained, "the client has room for a part of it");
        let unsent: usize = response.client.past.iter().flat_map(|past| &past.pieces).map(Bytes::len).sum();
        assert!(unsent > SEND_LEFT, "{unsent} bytes came from the spool at once");
        assert_eq!(response.spooled(), (body.len() as u64, 0));

        let mut got = Vec::new();
        let mut space = vec![0; 1 << 10];
        std::future::poll_fn(|cx| {
            let drained = response.poll_drain(cx);
            let mut read = ReadBuf::new(&mut space);
            while AsyncRead::poll_read(Pin::new(&mut client), cx, &mut read).is_ready() {
                got.extend_from_slice(read.filled());
                read.clear();
            }
            drained.map(|drained| drained.expect("the client takes it"))
        })
        .await;
        assert!(got.ends_with(&body) && !got.ends_with(b"\nx"), "{} bytes", got.len());
        assert_eq!((response.spooled(), response.sent()), ((body.len() as u64, 0), body.len() as u64));
    }
}
