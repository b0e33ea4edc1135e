//! Writes the response to the client: owns the client's session and the part of the response that was not sent yet.
//!
//! On HTTP/1, bytes are sent past the session ([`Past`]): header and pieces share one system call, and unsent bytes can
//! be moved to the spool. On HTTP/2, and for Pingora's own session, a write is a stored future that *owns* the client's
//! session, so that it is never cancelled half-way. Each kind of write progresses whenever it is polled: by the driver
//! through `client::session` while the upstream responds, by the gate of the exchange while the upstream is held back,
//! and by `logging` once the upstream is released. Bytes that the client does not accept go to a spool. In a `Stream`
//! response there is no spool, and the sender waits for the client.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Method, Version};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::http::{HttpTask, ServerSession};
use pingora::{Error, ErrorType, Result};

use super::http1::{self, unread};
use super::http2::Control;
use super::lane::{Bulk, Class, Lanes, Turn, ends_for_lack_of_budget};
use super::pace::Pace;
use super::slow::Entry;
use super::spool::{Depot, Limits, Room, Spool, SpoolError};
use super::stream::Bypass;
use super::trailers::last_chunk;
use super::waiting::{Waiting, Who};
use crate::config;
use crate::config::route::BufferMode;
use crate::config::server::Resources;
use crate::framing::{Body, LengthFields, answer};
use crate::metrics::{Direction, RouteMetrics};
use crate::party::wait::Timer;
use crate::party::{Fault, Party, What};
use crate::phase::Phase;
use crate::upstream::transport::http2::StreamHandle;
use crate::upstream::window::Window;

/// Up to this many bytes, tasks are written in one batch, which copies them together. Larger amounts are written one
/// task at a time, without a copy.
const TOGETHER_BYTES: usize = 16 << 10;
/// Size from which a response is bulk and takes turns with others, in bytes: of the announced length, or of the bytes
/// received if none is announced.
const BULK_BYTES: u64 = 32 << 10;
/// Minimum and maximum number of bytes given to the session at once. Slow clients get small pieces: these use less
/// memory, and the minimum rate is checked more often.
const PIECE_LEAST: usize = 4 << 10;
const PIECE_MOST: usize = 64 << 10;
/// Past the session: maximum number of bytes sent at once, and the number kept when the client does not accept them.
const SEND_MOST: usize = 256 << 10;
const SEND_LEFT: usize = 16 << 10;
/// Maximum number of bytes read from the spool at once, for a client that was slow and for one that was not.
const SPOOLED_MOST_SLOW: usize = 32 << 10;
const SPOOLED_MOST: usize = 128 << 10;
/// On HTTP/2 a piece is one frame, and progress is known only in whole pieces.
const PIECE_MOST_H2: usize = 16 << 10;

/// When a response is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// At once; the upstream waits for the client.
    Stream,
    /// At once; bytes that the client does not accept are spooled.
    Auto,
    /// After the response is complete.
    Full,
}

/// How a response is sent.
#[derive(Clone)]
pub struct Manner {
    /// When it is sent.
    pub leave: Leave,
    /// Limits of its spool.
    pub limits: Limits,
    /// The minimum rate.
    pub pace: Pace,
    /// Maximum time between two pieces that the client accepts.
    pub write_idle: Duration,
    /// Maximum time to wait for the disk.
    pub disk_max: Duration,
    /// The maximum rate.
    pub throttle: Option<Throttle>,
    /// The metrics of the route.
    pub route: Arc<RouteMetrics>,
}

impl Manner {
    /// Builds the settings from a route's configuration.
    pub fn build(written: &config::Route, resources: &Resources, metrics: &Arc<RouteMetrics>) -> Manner {
        let (client, response) = (&written.client, &written.buffering.response);
        Manner {
            leave: match response.mode {
                BufferMode::Auto => Leave::Auto,
                BufferMode::Full => Leave::Full,
                BufferMode::Stream => Leave::Stream,
            },
            limits: Limits::build(response.memory, response.disk, resources),
            pace: Pace::new(client.min_rate.write.0, client.min_rate.grace.0),
            disk_max: resources.pause.0,
            write_idle: client.write_idle.0,
            throttle: client.limit_rate.as_ref().map(|limit| Throttle { rate: limit.rate.0, after: limit.after.0 }),
            route: metrics.clone(),
        }
    }
}

/// A maximum rate that applies after an initial burst.
#[derive(Clone, Copy, Debug)]
pub struct Throttle {
    /// Bytes per second.
    pub rate: u64,
    /// Number of initial bytes without a limit.
    pub after: u64,
}

impl Throttle {
    /// The earliest time at which `sent` bytes may have been sent, relative to the first byte.
    fn due(&self, sent: u64) -> Duration {
        Duration::from_secs_f64(sent.saturating_sub(self.after) as f64 / self.rate as f64)
    }

    /// Size of a piece, in bytes: about a tenth of a second's worth, for an even flow.
    fn piece(&self) -> usize {
        usize::try_from(self.rate / 10).unwrap_or(usize::MAX).clamp(1 << 10, PIECE_MOST)
    }
}

type Write = Pin<Box<dyn Future<Output = (Box<ServerSession>, Result<bool>)> + Send>>;

enum State {
    Idle(Box<ServerSession>),
    Writing(Write),
    /// The session was released, or it was lost with an abandoned write.
    Gone,
}

/// The direct path to the socket of one of Forebay's own HTTP/1 sessions.
pub struct Past {
    bypass: Bypass,
    /// The request body is read past the session, too.
    reads: bool,
    /// The framing of the body; with a length, the bytes that remain.
    framing: Body,
    /// The bytes being sent.
    pieces: VecDeque<Bytes>,
    /// These bytes came from the spool, which has counted them.
    was_spooled: bool,
    /// Whether a send is in progress, even of a header only.
    sends: bool,
    /// The received bytes of response headers that were not sent yet.
    written: VecDeque<Bytes>,
    /// The last header that was sent, for the session.
    answered: Option<Box<ResponseHeader>>,
}

impl Past {
    /// Creates a path with nothing to send.
    pub fn new(bypass: Bypass, reads: bool) -> Self {
        let (pieces, written) = (VecDeque::new(), VecDeque::new());
        let (was_spooled, sends) = (false, false);
        Past { bypass, reads, framing: Body::None, pieces, was_spooled, sends, written, answered: None }
    }

    /// Queues a piece of the body in its framing.
    fn push(&mut self, mut piece: Bytes) {
        match &mut self.framing {
            Body::None => return,
            Body::Length(left) => {
                // The client would take additional bytes for the next response.
                piece.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= piece.len() as u64;
            }
            Body::Chunked if !piece.is_empty() => {
                self.pieces.push_back(format!("{:x}\r\n", piece.len()).into());
                self.pieces.push_back(piece);
                piece = Bytes::from_static(b"\r\n");
            }
            Body::Chunked | Body::UntilEnd => {}
        }
        if !piece.is_empty() {
            self.pieces.push_back(piece);
        }
    }

    /// Queues the end of the body, with the trailers. `false`: the body is shorter than announced.
    fn end(&mut self, trailers: Option<&HeaderMap>) -> bool {
        if self.framing == Body::Chunked {
            self.pieces.push_back(last_chunk(trailers));
        }
        !matches!(self.framing, Body::Length(1..))
    }

    /// Removes the bytes beyond [`SEND_LEFT`] from the queue and returns them in order. Returns nothing for a chunked
    /// body, whose framing is already queued.
    fn spare(&mut self) -> Vec<Bytes> {
        let bytes: usize = self.pieces.iter().map(Bytes::len).sum();
        if self.framing == Body::Chunked || bytes <= SEND_LEFT {
            return Vec::new();
        }
        let (mut kept, mut spared) = (VecDeque::new(), Vec::new());
        let mut room = SEND_LEFT;
        for mut piece in self.pieces.drain(..) {
            let part = piece.split_to(piece.len().min(room));
            room -= part.len();
            if !part.is_empty() {
                // A copy, since a slice would keep the whole piece in memory.
                kept.push_back(if piece.is_empty() { part } else { Bytes::copy_from_slice(&part) });
            }
            if !piece.is_empty() {
                spared.push(piece);
            }
        }
        self.pieces = kept;
        if let Body::Length(left) = &mut self.framing {
            *left += spared.iter().map(|piece| piece.len() as u64).sum::<u64>();
        }
        spared
    }
}

/// The sender of one response; see the module.
pub struct Wire {
    state: State,
    /// On HTTP/1: the path past the session.
    past: Option<Past>,
    /// On HTTP/2: the control of the client's stream.
    control: Option<Control>,
    /// The client's HTTP version.
    version: Version,
    /// The request method is HEAD.
    head_only: bool,
    manner: Manner,
    /// Sent before the spool: headers, and body pieces that have just been received.
    ready: VecDeque<HttpTask>,
    spool: Option<Spool>,
    /// Sent after the spool: trailers or the end.
    last: Option<HttpTask>,
    /// Whether the response was received completely.
    ended: bool,
    /// Whether the end was given to the session.
    end_written: bool,
    leave: Leave,
    /// The response may not be sent before it is complete (`Leave::Full`).
    held: bool,
    /// The connection closes after this response, and the response announces the close.
    last_on_connection: bool,
    /// Part of the final response was given to the session.
    begun: bool,
    head: Option<Head>,
    /// The write in progress timed out. It is dropped together with the session when the response is abandoned.
    given_up: bool,
    /// Writing failed: the client will not receive the whole response.
    broken: bool,
    error: Option<Box<Error>>,
    fault: Option<Fault>,
    /// The party that the last poll waits for.
    waits_for: Party,
    /// Body bytes received from the upstream, and body bytes accepted by the session.
    came: u64,
    gone: u64,
    /// Bytes held by earlier spools, and those of them that were on disk.
    spooled: (u64, u64),
    /// Body bytes of the write in progress.
    writing: u64,
    piece: usize,
    first_byte: Option<Instant>,
    /// The current wait for a client that accepts no bytes.
    blocked: Option<Waiting>,
    who: Who,
    slow: Option<Entry>,
    /// Start of the wait for the disk: for a read from the spool, or for space in it while the response is held.
    fetching: Option<Instant>,
    blocked_before: Duration,
    timer: Timer,
    turn: Option<Turn>,
    /// Registration as a bulk transfer.
    bulk: Option<Bulk>,
    /// [`Wire::poll_more`] returned ready, and nothing was received since.
    admitted: bool,
    /// The class of the lane's turn that the last poll used.
    in_turn: Option<Class>,
    /// The receive window of the endpoint's connection, if only this exchange uses the connection.
    window: Option<Window>,
    /// Otherwise: the exchange's stream of the shared connection.
    stream: Option<StreamHandle>,
    depot: Arc<Depot>,
    lanes: Arc<Lanes>,
}

/// The facts about a sent header that the log and the handling of a cut response need.
#[derive(Clone, Copy)]
struct Head {
    status: u16,
    /// The framing of the body.
    body: Body,
    length: Option<u64>,
}

impl Wire {
    /// Creates the sender for a session that has written nothing yet, and the path past it, if there is one.
    pub fn new(
        (session, past, control): (Box<ServerSession>, Option<Past>, Option<Control>),
        request: &RequestHeader,
        manner: Manner,
        who: Who,
        depot: Arc<Depot>,
        lanes: Arc<Lanes>,
    ) -> Self {
        let (version, head_only) = (request.version, request.method == Method::HEAD);
        Wire {
            state: State::Idle(session),
            piece: if past.is_some() { 2 * PIECE_MOST } else { PIECE_LEAST },
            past,
            control,
            version,
            head_only,
            leave: manner.leave,
            held: manner.leave == Leave::Full,
            last_on_connection: false,
            manner,
            ready: VecDeque::new(),
            spool: None,
            last: None,
            ended: false,
            end_written: false,
            begun: false,
            head: None,
            given_up: false,
            broken: false,
            error: None,
            fault: None,
            waits_for: Party::Client,
            came: 0,
            gone: 0,
            spooled: (0, 0),
            writing: 0,
            first_byte: None,
            blocked: None,
            who,
            slow: None,
            fetching: None,
            blocked_before: Duration::ZERO,
            timer: Timer::default(),
            turn: None,
            bulk: None,
            admitted: false,
            in_turn: None,
            window: None,
            stream: None,
            depot,
            lanes,
        }
    }

    /// The session; `None` while a write is in progress.
    pub fn session(&mut self) -> Option<&mut ServerSession> {
        let sends = self.sends();
        match &mut self.state {
            State::Idle(session) if !sends => Some(session),
            _ => None,
        }
    }

    fn sends(&self) -> bool {
        self.past.as_ref().is_some_and(|past| past.sends)
    }

    /// Puts back the session that [`Wire::release`] returned.
    pub fn put_back(&mut self, session: Box<ServerSession>) {
        self.state = State::Idle(session);
    }

    /// Takes the class of the lane's turn that the last poll used.
    pub fn used_turn(&mut self) -> Option<Class> {
        self.in_turn.take()
    }

    /// Whether the client uses HTTP/2.
    pub fn is_http2(&self) -> bool {
        self.control.is_some()
    }

    /// Whether the response was received completely.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// Whether the request body was read completely. `None`: only the session knows, and a write in progress owns it.
    pub fn body_is_read(&mut self) -> Option<bool> {
        match &self.past {
            Some(past) => Some(past.bypass.is_read()),
            None => self.session().map(|session| session.is_body_done()),
        }
    }

    /// Takes the trailers of a complete HTTP/1 request. A second call returns `None`. On HTTP/2 the stream has them.
    pub fn take_request_trailers(&self) -> Option<HeaderMap> {
        self.past.as_ref()?.bypass.take_trailers()
    }

    /// Ends the response with these trailers.
    pub fn end_with(&mut self, trailers: HeaderMap) {
        self.last = Some(HttpTask::Trailer(Some(Box::new(trailers))));
    }

    /// Whether bytes of the request body are unread that the session does not know of, so that the connection cannot be
    /// reused.
    fn leaves_body(&self) -> bool {
        self.past.as_ref().is_some_and(|past| past.reads && !past.bypass.is_read())
    }

    /// Whether bytes of the request body are unread, as the session does not know, or part of a response that has begun
    /// was not sent: the connection cannot be reused.
    pub fn leaves_rest(&self) -> bool {
        let unfinished = self.begun && (!self.end_written || self.broken || self.sends());
        self.leaves_body() || (self.past.is_some() && unfinished)
    }

    /// Prevents further requests on the client's connection.
    pub fn end_after_answer(&self) {
        self.past.iter().for_each(|past| past.bypass.end_after_answer());
    }

    /// Whether the whole response was sent.
    pub fn has_left_whole(&self) -> bool {
        let sent = self.past.as_ref().is_none_or(|past| past.bypass.has_sent_all());
        self.end_written && !self.broken && !self.sends() && sent && matches!(self.state, State::Idle(_))
    }

    /// Returns the session for good. `None`: a write in progress owns it.
    pub fn release(&mut self) -> Option<Box<ServerSession>> {
        if self.sends() {
            return None;
        }
        match std::mem::replace(&mut self.state, State::Gone) {
            State::Idle(mut session) => {
                if let Some(answered) = self.past.as_mut().and_then(|past| past.answered.take()) {
                    session.send_downstream_proxy_task(HttpTask::Header(answered, false));
                }
                Some(session)
            }
            other => {
                self.state = other;
                None
            }
        }
    }

    /// Abandons the response: drops unsent bytes, and a write in progress together with its session.
    pub fn abandon(&mut self) {
        self.forget();
        if matches!(self.state, State::Writing(_)) || self.sends() {
            self.state = State::Gone;
        }
        self.end_blocked();
    }

    /// Resets the state for a new attempt: drops unsent bytes of the previous one.
    pub fn restart(&mut self) {
        if !self.begun {
            self.forget();
            self.ended = false;
            self.leave = self.manner.leave;
            self.held = self.leave == Leave::Full;
            self.head = None;
            self.came = 0;
            self.last_on_connection = false;
        }
    }

    fn forget(&mut self) {
        self.spooled = self.spooled();
        self.ready.clear();
        self.past.iter_mut().for_each(|past| past.written.clear());
        self.spool = None;
        self.last = None;
        self.turn = None;
        self.bulk = None;
        self.admitted = false;
    }

    /// Aborts receiving from the endpoint: its connection or its stream.
    pub fn abort(&mut self) {
        self.window.iter_mut().for_each(Window::abort);
        self.stream.iter().for_each(StreamHandle::hang_up);
    }

    /// Continues a write in progress.
    pub fn poll_writing(&mut self, cx: &mut Context<'_>) {
        if matches!(self.state, State::Writing(_)) || self.sends() {
            // The result is kept for the next caller of `poll_write`.
            let _ = self.poll_write(cx);
        }
    }

    /// Whether bytes of the final response may have been sent.
    pub fn begun(&self) -> bool {
        self.begun
    }

    /// The status of the response that has begun; 0 if none has.
    pub fn status(&self) -> u16 {
        self.head.filter(|_| self.begun).map_or(0, |head| head.status)
    }

    /// Whether the framing lets the client recognise a response that was cut off.
    pub fn framed(&self) -> bool {
        self.head.is_none_or(|head| self.is_http2() || head.body != Body::UntilEnd)
    }

    /// Body bytes that the client's session accepted.
    pub fn sent(&self) -> u64 {
        self.gone
    }

    /// Body bytes received from the upstream.
    pub fn came(&self) -> u64 {
        self.came
    }

    /// Bytes that were spooled, and those of them that were on disk.
    pub fn spooled(&self) -> (u64, u64) {
        let now = self.spool.as_ref().map_or((0, 0), |spool| (spool.pushed(), spool.spilled()));
        (self.spooled.0 + now.0, self.spooled.1 + now.1)
    }

    /// If the client is listed as slow: adds its request to the list entry.
    pub fn name_client(&self, request: &RequestHeader) {
        if let Some(entry) = &self.slow {
            entry.name(|| self.who.asked(request));
        }
    }

    /// Total time for which the client accepted no bytes.
    pub fn blocked(&self) -> Duration {
        self.blocked_before + self.blocked.as_ref().map_or(Duration::ZERO, |blocked| blocked.lasted())
    }

    /// The fault that ended writing, if any.
    pub fn fault(&self) -> Option<Fault> {
        self.fault
    }

    /// The party that must act before more can be written or received.
    pub fn waits_for(&self) -> Party {
        self.waits_for
    }

    /// Sets the receive window of the endpoint's connection for this attempt. `None`: the connection no longer belongs
    /// to the exchange.
    pub fn set_window(&mut self, window: Option<Window>) {
        self.window = window;
    }

    /// Sets the stream of this attempt, on a connection that exchanges share.
    pub fn set_stream(&mut self, stream: StreamHandle) {
        self.stream = Some(stream);
    }

    /// Ready when the endpoint has accepted the request body given so far, as far as this is visible. If the endpoint
    /// has `answered`, the request ends and need not be accepted.
    pub fn poll_taken(&self, cx: &mut Context<'_>, answered: bool) -> Poll<()> {
        let Some(stream) = &self.stream else { return Poll::Ready(()) };
        if answered {
            stream.end_request();
        }
        stream.poll_taken(cx)
    }

    /// Opens the receive window, since the rest is not received through this sender.
    pub fn open_window(&mut self) {
        if let Some(mut window) = self.window.take() {
            window.open();
        }
    }

    /// Disables buffering from here on: for server-sent events, or if the upstream requests it.
    pub fn stream(&mut self) {
        self.leave = Leave::Stream;
        self.held = false;
    }

    /// Holds the response back until it is complete.
    pub fn hold(&mut self) {
        self.leave = Leave::Full;
        self.held = !self.ended;
    }

    /// Closes the connection after this response; the response announces the close.
    pub fn close_after_answer(&mut self) {
        self.last_on_connection = true;
    }

    /// Takes the error that ended writing. A second call returns `None`.
    pub fn take_error(&mut self) -> Option<Box<Error>> {
        self.error.take()
    }

    /// Whether writing is no longer possible.
    pub fn failed(&self) -> bool {
        self.broken || matches!(self.state, State::Gone)
    }

    /// Stores the received bytes of the next response header, interim or final; they have the spelling of the field
    /// names.
    pub fn came_in(&mut self, header: Bytes) {
        self.past.iter_mut().for_each(|past| past.written.push_back(header.clone()));
    }

    /// Takes parts of the response from the upstream.
    ///
    /// # Errors
    ///
    /// The upstream's error, if a task carries one, or a filter's contradictory framing fields.
    pub fn take(&mut self, tasks: Vec<HttpTask>) -> Result<()> {
        self.admitted = false;
        let spooling = self.held || self.spool.as_ref().is_some_and(|spool| spool.unread() > 0);
        for task in tasks {
            match task {
                // A client of HTTP/1.0 does not know interim responses (RFC 9110 §15.2).
                HttpTask::Header(head, _) if self.version == Version::HTTP_10 && head.status.is_informational() => {
                    self.past.iter_mut().for_each(|past| drop(past.written.pop_front()));
                }
                HttpTask::Header(mut head, end) => {
                    if !head.status.is_informational() {
                        self.frame(&mut head, end)?;
                    }
                    self.ended |= end;
                    self.ready.push_back(HttpTask::Header(head, end));
                }
                // Bytes after an upgrade do not pass through here.
                HttpTask::Body(piece, end) | HttpTask::UpgradedBody(piece, end) => {
                    self.ended |= end;
                    let Some(piece) = piece.filter(|piece| !piece.is_empty()) else { continue };
                    self.came += piece.len() as u64;
                    if spooling {
                        self.push(piece);
                    } else {
                        self.ready.push_back(HttpTask::Body(Some(piece), false));
                    }
                }
                HttpTask::Failed(error) => return Err(error),
                last @ (HttpTask::Trailer(_) | HttpTask::Done) => {
                    self.ended = true;
                    self.last.get_or_insert(last);
                }
            }
        }
        if self.ended {
            self.held = false;
        }
        Ok(())
    }

    /// Marks the response as complete.
    pub fn end(&mut self) {
        self.ended = true;
        self.held = false;
    }

    /// Sets the framing fields of the final header for the client. `end`: the body is empty, whatever the header says.
    ///
    /// The endpoint's framing was checked on receipt, and the header has been treated as HTTP/1.1 since. A filter
    /// causes any error here.
    fn frame(&mut self, header: &mut ResponseHeader, end: bool) -> Result<()> {
        let (status, length_fields) = (header.status.as_u16(), LengthFields::of(&header.headers));
        let framed = answer::frame(self.head_only, status, Version::HTTP_11, &length_fields, self.version)
            .map_err(|fault| Error::explain(ErrorType::InternalError, fault.words()))?;
        let framed = if end { framed.ended() } else { framed };
        framed.apply(&length_fields, header)?;
        if let Some(past) = &mut self.past {
            past.framing = framed.write;
            // Closing the connection ends the body.
            self.last_on_connection |= framed.write == Body::UntilEnd;
        }
        self.head = Some(Head { status, body: framed.write, length: framed.length });
        Ok(())
    }

    fn push(&mut self, piece: Bytes) {
        let Wire { spool, depot, manner, lanes, who, .. } = self;
        lanes.here().spooled(piece.len() as u64);
        let begin = || {
            let account = who.account(&depot.accounts);
            Spool::consuming(depot, Direction::Response, manner.limits, account.as_ref(), Some(&manner.route))
        };
        spool.get_or_insert_with(begin).push(piece);
    }

    /// Writes everything that may be sent. Ready when no more may be sent, or when writing has failed.
    pub fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let sends = self.sends();
            match &mut self.state {
                State::Gone => return Poll::Ready(()),
                State::Writing(_) if self.given_up => return Poll::Ready(()),
                State::Writing(write) => match write.as_mut().poll(cx) {
                    Poll::Ready((session, outcome)) => {
                        self.state = State::Idle(session);
                        self.written(outcome);
                    }
                    // The task's poll budget is used up; the client is not the cause.
                    Poll::Pending if ends_for_lack_of_budget(cx) => return Poll::Pending,
                    Poll::Pending => {
                        let fault = ready!(self.poll_patience(cx));
                        self.fail(fault);
                        self.given_up = true;
                    }
                },
                State::Idle(_) if self.broken => return Poll::Ready(()),
                State::Idle(_) if sends => ready!(self.poll_send(cx)),
                State::Idle(_) if self.past.is_some() => {
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
        let Some(past) = self.past.as_mut().filter(|_| !self.broken) else { return filled };
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
        while self.ready.front().is_some_and(may_leave)
            && let Some(HttpTask::Header(mut answer, _)) = self.ready.pop_front()
        {
            gathered = true;
            if !answer.status.is_informational() {
                self.begun = true;
                if self.last_on_connection {
                    self.end_after_answer();
                }
            }
            let Some(past) = &mut self.past else { continue };
            let written = past.written.pop_front().unwrap_or_default();
            http1::gather_header(&past.bypass, &mut answer, &written);
            past.answered = Some(answer);
        }
        gathered
    }

    /// Takes the next body bytes that may be sent, and the end of the body.
    fn poll_fill_body(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let ready: usize = self.ready.iter().map(body_len).sum();
        let unread = self.spool.as_ref().map_or(0, Spool::unread);
        self.writing = 0;
        self.past.iter_mut().for_each(|past| past.was_spooled = ready == 0);
        if ready > 0 {
            let all = ready <= TOGETHER_BYTES && self.manner.throttle.is_none();
            let mut left = if all { ready } else { self.limit().min(ready) };
            ready!(self.poll_throttle(cx, left));
            let Wire { past: Some(past), ready, writing, .. } = self else { return Poll::Ready(false) };
            while left > 0
                && let Some(HttpTask::Body(Some(piece), _)) = ready.front_mut()
            {
                let part = piece.split_to(piece.len().min(left));
                left -= part.len();
                *writing += part.len() as u64;
                if piece.is_empty() {
                    ready.pop_front();
                }
                past.push(part);
            }
        } else if unread > 0 {
            let Some(piece) = ready!(self.poll_spooled(cx)) else { return Poll::Ready(false) };
            self.writing = piece.len() as u64;
            if let Some(past) = &mut self.past {
                past.push(piece);
            }
        }
        let is_end = self.ended
            && !self.end_written
            && self.ready.is_empty()
            && self.spool.as_ref().is_none_or(|spool| spool.unread() == 0);
        if is_end {
            self.end_written = true;
            let trailers = if let Some(HttpTask::Trailer(fields)) = self.last.take() { fields } else { None };
            if self.past.as_mut().is_some_and(|past| !past.end(trailers.as_deref())) {
                self.fault.get_or_insert(Fault::new(Party::Endpoint, Phase::Receive, What::Malformed));
                self.written(Err(shorter_or_longer()));
                return Poll::Ready(false);
            }
        }
        let some = self.writing > 0 || is_end;
        self.begun |= some;
        Poll::Ready(some)
    }

    /// Sends past the session. Ready when all bytes were sent, or when sending failed.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(past) = &mut self.past else { return Poll::Ready(()) };
        match past.bypass.poll_send(cx, &mut past.pieces) {
            Poll::Ready(outcome) => {
                past.sends = false;
                let failed = |error| Error::because(ErrorType::WriteError, "writing the response", error).into_down();
                self.written(outcome.map(|()| self.end_written).map_err(failed));
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
        let spools = self.spool.as_ref().is_some_and(|spool| spool.unread() > 0);
        let Some(past) = self.past.as_mut().filter(|past| !spools && !past.was_spooled) else { return };
        let spared = past.spare();
        if spared.is_empty() {
            return;
        }
        self.end_written = false;
        for piece in spared.into_iter().rev() {
            self.writing -= piece.len() as u64;
            self.ready.push_front(HttpTask::Body(Some(piece), false));
        }
    }

    /// Takes the next batch for the session.
    fn poll_batch(&mut self, cx: &mut Context<'_>) -> Poll<Option<Vec<HttpTask>>> {
        if self.held {
            // Interim responses are never held, since a client may wait for one before it sends its body.
            let interim = |task: &HttpTask| matches!(task, HttpTask::Header(head, _) if head.status.is_informational());
            let interim = self.ready.front().is_some_and(interim).then(|| self.ready.pop_front()).flatten();
            return Poll::Ready(interim.map(|task| vec![task]));
        }
        if !self.ready.is_empty() {
            return self.poll_ready_batch(cx).map(Some);
        }
        let unread = self.spool.as_ref().map_or(0, Spool::unread);
        if unread > 0 {
            let piece = ready!(self.poll_spooled(cx));
            let Some(piece) = piece else { return Poll::Ready(None) };
            let end = self.ended && self.last.is_none() && unread == piece.len() as u64;
            return Poll::Ready(Some(vec![HttpTask::Body(Some(piece), end)]));
        }
        Poll::Ready((self.ended && !self.end_written).then(|| vec![self.end_task()]))
    }

    fn end_task(&mut self) -> HttpTask {
        self.last.take().unwrap_or(HttpTask::Done)
    }

    fn poll_ready_batch(&mut self, cx: &mut Context<'_>) -> Poll<Vec<HttpTask>> {
        let bytes: usize = self.ready.iter().map(body_len).sum();
        let whole = self.spool.as_ref().is_none_or(|spool| spool.unread() == 0);
        if bytes <= TOGETHER_BYTES && self.manner.throttle.is_none() {
            let mut batch: Vec<_> = self.ready.drain(..).collect();
            if whole && self.ended {
                match batch.last_mut() {
                    Some(HttpTask::Body(_, end) | HttpTask::Header(_, end)) if self.last.is_none() => *end = true,
                    _ => batch.push(self.end_task()),
                }
            }
            return Poll::Ready(batch);
        }
        let Some(HttpTask::Body(Some(piece), _)) = self.ready.front() else {
            return Poll::Ready(self.ready.pop_front().into_iter().collect());
        };
        // One piece per batch: the session would write several one by one, or copy them together.
        let left = self.limit().min(piece.len());
        ready!(self.poll_throttle(cx, left));
        let Some(HttpTask::Body(Some(piece), _)) = self.ready.front_mut() else { return Poll::Ready(Vec::new()) };
        let part = piece.split_to(left);
        if piece.is_empty() {
            self.ready.pop_front();
        }
        let end = whole && self.ended && self.last.is_none() && self.ready.is_empty();
        Poll::Ready(vec![HttpTask::Body(Some(part), end)])
    }

    fn poll_spooled(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        // Unaccepted bytes stay in memory, so a slow client gets smaller reads.
        let slow = self.blocked_before > Duration::ZERO;
        let limit = self.limit().min(if slow { SPOOLED_MOST_SLOW } else { SPOOLED_MOST });
        ready!(self.poll_throttle(cx, limit));
        let Some(spool) = &mut self.spool else { return Poll::Ready(None) };
        let Poll::Ready(next) = spool.poll_next(cx, limit) else {
            let since = *self.fetching.get_or_insert_with(Instant::now);
            self.waits_for = Party::Disk;
            ready!(self.timer.poll(cx, since + self.manner.disk_max));
            tracing::error!("the disk did not return a spooled response in time");
            self.fail(Fault::new(Party::Disk, Phase::Write, What::Silent));
            return Poll::Ready(None);
        };
        self.fetching = None;
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
        self.manner.throttle.map_or(self.piece, |throttle| throttle.piece())
    }

    /// Ready when the maximum rate permits sending these bytes.
    fn poll_throttle(&mut self, cx: &mut Context<'_>, bytes: usize) -> Poll<()> {
        let Some(throttle) = self.manner.throttle else { return Poll::Ready(()) };
        let first = *self.first_byte.get_or_insert_with(Instant::now);
        let due = first + throttle.due(self.gone + bytes as u64);
        if Instant::now() >= due {
            return Poll::Ready(());
        }
        self.waits_for = Party::Gateway;
        self.timer.poll(cx, due)
    }

    fn begin(&mut self, batch: Vec<HttpTask>) {
        let State::Idle(mut session) = std::mem::replace(&mut self.state, State::Gone) else { return };
        self.begun |= batch.iter().any(is_of_answer);
        self.end_written |= batch.last().is_some_and(HttpTask::is_end);
        if self.last_on_connection {
            session.set_keepalive(None);
        }
        self.writing = batch.iter().map(|task| body_len(task) as u64).sum();
        if self.is_misframed() {
            self.state = State::Idle(session);
            return self.written(Err(shorter_or_longer()));
        }
        self.state = State::Writing(Box::pin(async move {
            let outcome = session.response_duplex_vec(batch).await;
            (session, outcome)
        }));
    }

    /// Whether the body would contradict the announced length (RFC 9113 §8.1.1).
    fn is_misframed(&self) -> bool {
        let Some(Head { body: Body::Length(length), .. }) = self.head else { return false };
        let sent = self.gone + self.writing;
        sent > length || (self.end_written && sent < length)
    }

    fn written(&mut self, outcome: Result<bool>) {
        if outcome.is_ok() {
            self.gone += self.writing;
        }
        match self.end_blocked() {
            Some(waited) => {
                self.manner.pace.moved(self.writing, waited);
                self.piece = PIECE_LEAST;
            }
            None => {
                // Bytes accepted without waiting count for the rate, too.
                self.manner.pace.moved(self.writing, Duration::ZERO);
                let most = match (&self.past, self.control.is_some()) {
                    (Some(past), _) if past.framing != Body::Chunked => SEND_MOST,
                    (None, true) => PIECE_MOST_H2,
                    _ => PIECE_MOST,
                };
                self.piece = (self.piece * 2).min(most);
            }
        }
        self.writing = 0;
        if let Err(error) = outcome {
            self.fault.get_or_insert(Fault::new(Party::Client, self.phase(), What::Left));
            self.forget();
            self.broken = true;
            self.error = Some(error);
        }
    }

    /// Ready when the write in progress takes too long, with the limit that the client exceeded.
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<Fault> {
        let phase = self.phase();
        self.waits_for = Party::Client;
        let left = self.left();
        let Wire { blocked, depot, slow, who, manner, .. } = self;
        let entry = slow.get_or_insert_with(|| depot.slow.enter(Direction::Response, Some(&manner.route), who.client));
        entry.set(phase, left);
        let begin = || Waiting::begin(Some(depot.budget.slow(Direction::Response)), entry);
        let since = blocked.get_or_insert_with(begin).since;
        let slow = self.manner.pace.patience(self.writing).map(|patience| (patience, What::Slow));
        // On HTTP/1 the stream enforces this limit more precisely, since it observes every byte.
        let still = self.control.is_some().then_some((self.manner.write_idle, What::Silent));
        let first = slow.into_iter().chain(still).min_by_key(|(patience, _)| *patience);
        let Some((patience, what)) = first else { return Poll::Pending };
        self.timer.poll(cx, since + patience).map(|()| Fault::new(Party::Client, phase, what))
    }

    /// The phase of a wait for the client.
    fn phase(&self) -> Phase {
        if self.ended { Phase::Write } else { Phase::Receive }
    }

    /// Body bytes that were received and that the client has not accepted.
    fn left(&self) -> u64 {
        let ready: u64 = self.ready.iter().map(|task| body_len(task) as u64).sum();
        ready + self.writing + self.spool.as_ref().map_or(0, Spool::unread)
    }

    fn end_blocked(&mut self) -> Option<Duration> {
        let waited = self.blocked.take()?.lasted();
        self.blocked_before += waited;
        Some(waited)
    }

    /// Ends writing because of this fault.
    pub fn fail(&mut self, fault: Fault) {
        self.fault.get_or_insert(fault);
        self.broken = true;
        self.forget();
        self.end_blocked();
        self.error = Some(Error::explain(ErrorType::WriteError, format!("{fault:?}")).into_down());
    }

    /// Ready when more may be received from the upstream: the client has accepted everything, or the spool has room and
    /// the exchange has its turn. Also ready when writing has failed.
    pub fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let written = self.poll_write(cx);
        if self.failed() {
            return Poll::Ready(());
        }
        if self.ended {
            self.bulk = None;
        }
        if self.ended || self.admitted {
            self.turn = None;
            return Poll::Ready(());
        }
        if written.is_pending() && ends_for_lack_of_budget(cx) {
            self.waits_for = Party::Gateway;
            return Poll::Pending;
        }
        self.set_aside();
        if written.is_ready() && !self.held {
            if self.is_bulk() {
                let Wire { bulk, lanes, .. } = self;
                if bulk.get_or_insert_with(|| lanes.here().enter()).is_crowded() {
                    ready!(self.poll_turn(cx, Class::Pass, false));
                }
            }
        } else {
            // Interim responses wait for the client; only a final response can be spooled.
            let interim = self.head.is_none() && !self.held;
            if self.leave == Leave::Stream || interim {
                return Poll::Pending;
            }
            let admitted = self.poll_admitted(cx);
            if admitted.is_pending() && self.held {
                ready!(self.poll_held(cx));
                return Poll::Ready(());
            }
            ready!(admitted);
            self.fetching = None;
        }
        if self.came > 0 {
            self.window.iter_mut().for_each(Window::open);
        }
        self.admitted = true;
        Poll::Ready(())
    }

    /// Whether the response is bulk. One with a large announced length takes turns from its first piece on. Under load
    /// its receive window stays small until then, and it holds little memory.
    fn is_bulk(&self) -> bool {
        let announced = self.head.and_then(|head| head.length).unwrap_or_default();
        self.came > BULK_BYTES || (self.came > 0 && announced > BULK_BYTES)
    }

    /// Moves received bytes that the client has not accepted to the spool.
    fn set_aside(&mut self) {
        let first = self.ready.iter().position(|task| matches!(task, HttpTask::Body(..)));
        let Some(first) = first.filter(|_| self.leave != Leave::Stream) else { return };
        for task in self.ready.split_off(first) {
            if let HttpTask::Body(Some(piece), _) = task {
                self.push(piece);
            }
        }
    }

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(spool) = &mut self.spool else { return Poll::Ready(()) };
        spool.idle(cx);
        match spool.room(cx) {
            Ok(Room::Free) => return Poll::Ready(()),
            Ok(Room::Disk) => {
                self.waits_for = Party::Disk;
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

    /// Ready when the spool has room and the exchange has its turn.
    fn poll_admitted(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        ready!(self.poll_room(cx));
        // The client of a held response waits for it.
        let class = if self.held { Class::Pass } else { Class::Spool };
        let disk = self.spool.as_ref().is_some_and(Spool::needs_disk);
        self.poll_turn(cx, class, disk)
    }

    /// Limits the waits of a held response for the disk or a turn: by `disk_max`, and by the client's connection. Ready
    /// when the response has failed.
    fn poll_held(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let since = *self.fetching.get_or_insert_with(Instant::now);
        let fault = if self.poll_gone(cx).is_ready() {
            Fault::new(Party::Client, Phase::Receive, What::Left)
        } else {
            ready!(self.timer.poll(cx, since + self.manner.disk_max));
            tracing::error!("the disk did not accept a held response in time");
            Fault::new(Party::Disk, Phase::Receive, What::Silent)
        };
        self.fail(fault);
        Poll::Ready(())
    }

    fn poll_turn(&mut self, cx: &mut Context<'_>, class: Class, disk: bool) -> Poll<()> {
        let Wire { turn, lanes, head, came, .. } = self;
        if turn.as_ref().is_some_and(|turn| turn.class() != class) {
            *turn = None;
        }
        let turn = turn.get_or_insert_with(|| {
            let length = head.and_then(|head| head.length);
            let missing = length.map_or(u64::MAX, |length| length.saturating_sub(*came));
            lanes.here().queue(class, missing, disk)
        });
        if turn.poll(cx).is_pending() {
            self.waits_for = Party::Gateway;
            return Poll::Pending;
        }
        self.turn = None;
        self.in_turn = Some(class);
        Poll::Ready(())
    }

    /// Ready when the client has closed its connection or stream. Pending while a write is in progress, which detects
    /// the close itself.
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<Box<Error>> {
        if self.session().is_none() {
            return Poll::Pending;
        }
        if let Some(control) = &self.control {
            return control.poll_closed(cx);
        }
        if self.body_is_read() != Some(true) {
            // The read of the body detects the close.
            return Poll::Pending;
        }
        if let Some(past) = &self.past {
            return past.bypass.poll_gone(cx).map(http1::gone);
        }
        let Some(session) = self.session() else { return Poll::Pending };
        let mut idle = std::pin::pin!(session.read_body_or_idle(true));
        match ready!(idle.as_mut().poll(cx)) {
            Err(error) => Poll::Ready(error),
            // HTTP/1 delivers nothing after the body.
            Ok(_) => Poll::Pending,
        }
    }

    /// As [`Wire::poll_gone`], and also while the body is not being read. `reads`: the body is being read.
    pub fn poll_left(&mut self, cx: &mut Context<'_>, reads: bool) -> Poll<()> {
        if self.control.is_none() && self.body_is_read() == Some(false) {
            return match &self.past {
                Some(past) if !reads => past.bypass.poll_left(cx).map(drop),
                _ => Poll::Pending,
            };
        }
        self.poll_gone(cx).map(drop)
    }

    /// Reads a piece of the request body. Unless the body is read past the session, it waits for a write in progress,
    /// which owns the session.
    pub fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>>> {
        if let Some(past) = self.past.as_ref().filter(|past| past.reads) {
            return past.bypass.poll_piece(cx).map_err(unread);
        }
        if self.session().is_none() {
            let _ = self.poll_write(cx);
        }
        let Some(session) = self.session() else { return Poll::Pending };
        let mut read = std::pin::pin!(session.read_request_body());
        read.as_mut().poll(cx)
    }

    /// Writes the rest of the response. Ready when all of it was sent, or when writing failed.
    pub fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let written = self.poll_write(cx);
        if self.failed() {
            return Poll::Ready(Err(self.error.take().unwrap_or_else(|| Error::new_down(ErrorType::WriteError))));
        }
        if written.is_ready() {
            return Poll::Ready(Ok(()));
        }
        self.set_aside();
        if let Some(spool) = &mut self.spool {
            spool.idle(cx);
        }
        self.poll_gone(cx).map(|gone| {
            self.fault.get_or_insert(Fault::new(Party::Client, Phase::Write, What::Left));
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

fn body_len(task: &HttpTask) -> usize {
    match task {
        HttpTask::Body(Some(piece), _) => piece.len(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
    use tokio::sync::Semaphore;

    use super::*;
    use crate::client::connection::tests::connection;
    use crate::client::http1;
    use crate::client::spool::disk::Backlog;
    use crate::client::spool::tests::depot;
    use crate::client::stream::{ClientStream, Opening};
    use crate::metrics::Metrics;

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
        let manner = Manner {
            leave: Leave::Full,
            limits: LIMITS,
            pace: Pace::unlimited(),
            write_idle: Duration::from_secs(60),
            disk_max: Duration::from_secs(60),
            throttle: None,
            route: metrics.route("all"),
        };
        let lanes = Lanes::new(metrics.clone(), Backlog::new(&Arc::new(Semaphore::new(1)), 1), Duration::from_secs(60));
        let past = Past::new(stream.bypass(), false);
        let request = RequestHeader::build(Method::GET, b"/", None).expect("a request");
        let mut wire = Wire::new((session, Some(past), None), &request, manner, Who::default(), depot(), lanes);

        let body = Bytes::from(vec![b'x'; PIECE_MOST]);
        let mut header = ResponseHeader::build(200, None).expect("an answer");
        header.insert_header("content-length", body.len()).expect("a field");
        wire.take(vec![HttpTask::Header(Box::new(header), false), HttpTask::Body(Some(body.clone()), false)])
            .expect("sound");
        wire.end();
        let drained = std::future::poll_fn(|cx| Poll::Ready(wire.poll_drain(cx).is_ready())).await;
        assert!(!drained, "the client has room for a part of it");
        let unsent: usize = wire.past.iter().flat_map(|past| &past.pieces).map(Bytes::len).sum();
        assert!(unsent > SEND_LEFT, "{unsent} bytes came from the spool at once");
        assert_eq!(wire.spooled(), (body.len() as u64, 0));

        let mut got = Vec::new();
        let mut space = vec![0; 1 << 10];
        std::future::poll_fn(|cx| {
            let drained = wire.poll_drain(cx);
            let mut read = ReadBuf::new(&mut space);
            while AsyncRead::poll_read(Pin::new(&mut client), cx, &mut read).is_ready() {
                got.extend_from_slice(read.filled());
                read.clear();
            }
            drained.map(|drained| drained.expect("the client takes it"))
        })
        .await;
        assert!(got.ends_with(&body) && !got.ends_with(b"\nx"), "{} bytes", got.len());
        assert_eq!((wire.spooled(), wire.sent()), ((body.len() as u64, 0), body.len() as u64));
    }
}
