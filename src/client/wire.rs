//! The wire to the client: its own session, and the part of the response that it has not taken yet.
//!
//! On HTTP/1 the answer is sent past the session ([`Past`]): header and pieces with one system call, and what the client
//! did not take of them can be set aside. On HTTP/2, and for Pingora's own session, a write is a stored future that
//! *owns* the client's session, so it is never cancelled half-way. Either is driven by whoever polls: the driver through
//! `client::session` while the upstream answers, the gate of the exchange while the upstream is held back, `logging`
//! once the upstream is released. What the client does not take goes to a spool; in a `Stream` response nothing does,
//! and whoever has more waits.

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
use crate::framing::{Body, Said, answer};
use crate::metrics::{Direction, RouteMetrics};
use crate::party::wait::Timer;
use crate::party::{Fault, Party, What};
use crate::phase::Phase;
use crate::upstream::transport::http2::StreamHandle;
use crate::upstream::window::Window;

/// Up to this, tasks are written at once, which copies them together; above it one by one, which does not.
const TOGETHER_BYTES: usize = 16 << 10;
/// What an answer of unknown length may pass before it is bulk, and takes turns with others; what it may announce.
const BULK_BYTES: u64 = 32 << 10;
/// The least and the most that is given to the session at once. Small pieces for slow clients: less memory each, and
/// the minimum rate is looked at more often.
const PIECE_LEAST: usize = 4 << 10;
const PIECE_MOST: usize = 64 << 10;
/// What is sent at once past the session, to a client that takes it; and what is kept for one that does not.
const SEND_MOST: usize = 256 << 10;
const SEND_LEFT: usize = 16 << 10;
/// The most that is taken from the spool at once; for a client that has been waited for, and for one that has not.
const SPOOLED_MOST_SLOW: usize = 32 << 10;
const SPOOLED_MOST: usize = 128 << 10;
/// On HTTP/2 a piece is a frame, and only a whole one is known to have been taken.
const PIECE_MOST_H2: usize = 16 << 10;

/// When an answer leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// As it comes; the upstream waits for the client.
    Stream,
    /// As it comes; what the client does not take is spooled.
    Auto,
    /// When it is complete.
    Full,
}

/// How an answer goes to the client.
#[derive(Clone)]
pub struct Manner {
    /// When it leaves.
    pub leave: Leave,
    /// What its spool may hold.
    pub limits: Limits,
    /// The minimum rate.
    pub pace: Pace,
    /// Between two pieces that the client takes.
    pub write_idle: Duration,
    /// How long it may wait for the disk.
    pub disk_max: Duration,
    /// The maximum rate.
    pub throttle: Option<Throttle>,
    /// The counters of its route.
    pub route: Arc<RouteMetrics>,
}

impl Manner {
    /// How the answers of a route leave.
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

/// A maximum rate after a first burst.
#[derive(Clone, Copy, Debug)]
pub struct Throttle {
    /// Bytes a second.
    pub rate: u64,
    /// Bytes that are free of it.
    pub after: u64,
}

impl Throttle {
    /// When so many bytes may have been sent, counted from the first.
    fn due(&self, sent: u64) -> Duration {
        Duration::from_secs_f64(sent.saturating_sub(self.after) as f64 / self.rate as f64)
    }

    /// Pieces that make an even flow: about a tenth of a second's worth.
    fn piece(&self) -> usize {
        usize::try_from(self.rate / 10).unwrap_or(usize::MAX).clamp(1 << 10, PIECE_MOST)
    }
}

type Write = Pin<Box<dyn Future<Output = (Box<ServerSession>, Result<bool>)> + Send>>;

enum State {
    Idle(Box<ServerSession>),
    Writing(Write),
    /// The session was given back, or is lost with a write that was given up.
    Gone,
}

/// The way past a session of ours on HTTP/1.
pub struct Past {
    bypass: Bypass,
    /// The request body is read past the session as well.
    reads: bool,
    /// How the body leaves; of a length, what is still to come.
    framing: Body,
    /// What is being sent.
    pieces: VecDeque<Bytes>,
    /// It was in the spool, which has counted it.
    was_spooled: bool,
    /// Something is, if only a header.
    sends: bool,
    /// The headers that those of the answer came in, as far as they have not left.
    written: VecDeque<Bytes>,
    /// The header that has left, for the session.
    answered: Option<Box<ResponseHeader>>,
}

impl Past {
    /// Nothing is sent yet.
    pub fn new(bypass: Bypass, reads: bool) -> Self {
        let (pieces, written) = (VecDeque::new(), VecDeque::new());
        let (was_spooled, sends) = (false, false);
        Past { bypass, reads, framing: Body::None, pieces, was_spooled, sends, written, answered: None }
    }

    /// Takes a piece to be sent.
    fn push(&mut self, mut piece: Bytes) {
        match &mut self.framing {
            Body::None => return,
            Body::Length(left) => {
                // More than was announced would be taken for the next answer.
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

    /// Marks the end of the body, with what follows it. `false`: it is shorter than was announced.
    fn end(&mut self, trailers: Option<&HeaderMap>) -> bool {
        if self.framing == Body::Chunked {
            self.pieces.push_back(last_chunk(trailers));
        }
        !matches!(self.framing, Body::Length(1..))
    }

    /// Gives back what need not be kept of that which is being sent, in order; nothing where its framing is on its way.
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
                // Of its own: it would keep the whole piece in memory.
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

/// See the module.
pub struct Wire {
    state: State,
    /// On HTTP/1.
    past: Option<Past>,
    /// On HTTP/2.
    control: Option<Control>,
    /// The client's.
    version: Version,
    /// The request has the method HEAD.
    head_only: bool,
    manner: Manner,
    /// What precedes the spool: headers, and body that has just come.
    ready: VecDeque<HttpTask>,
    spool: Option<Spool>,
    /// What follows the spool: trailers or the end.
    last: Option<HttpTask>,
    /// Whether no more comes.
    ended: bool,
    /// Whether that end was given to the session.
    end_written: bool,
    leave: Leave,
    /// Nothing may leave yet (`Leave::Full`).
    held: bool,
    /// The connection is to close after this answer, and the answer is to say so.
    last_on_connection: bool,
    /// Something of the final answer was given to the session.
    begun: bool,
    head: Option<Head>,
    /// The write under way takes too long: it goes, and the session with it, when the answer is abandoned.
    given_up: bool,
    /// Writing has failed: the answer will never be whole.
    broken: bool,
    error: Option<Box<Error>>,
    fault: Option<Fault>,
    /// The party that the last write waits for.
    waits_for: Party,
    /// Body bytes that came from the upstream, and those that the session has taken.
    came: u64,
    gone: u64,
    /// What was held by spools that are gone.
    spooled: (u64, u64),
    /// Bytes of the write under way.
    writing: u64,
    piece: usize,
    first_byte: Option<Instant>,
    /// The client does not take what there is.
    blocked: Option<Waiting>,
    who: Who,
    slow: Option<Entry>,
    /// Since when the disk is waited for, to give back what it has or to take more of an answer that is held.
    fetching: Option<Instant>,
    blocked_before: Duration,
    timer: Timer,
    turn: Option<Turn>,
    /// It moves much.
    bulk: Option<Bulk>,
    /// More may come: nothing has come since that was found.
    admitted: bool,
    /// The class of a turn that the last poll was for.
    in_turn: Option<Class>,
    /// That of the endpoint's connection, if it is the exchange's alone.
    window: Option<Window>,
    /// Else, its stream of one that others share.
    stream: Option<StreamHandle>,
    depot: Arc<Depot>,
    lanes: Arc<Lanes>,
}

/// What the log and a cut need to know of the header once it has left.
#[derive(Clone, Copy)]
struct Head {
    status: u16,
    /// How the body leaves.
    body: Body,
    length: Option<u64>,
}

impl Wire {
    /// The wire of a session that has written nothing yet, and the way past it, if there is one.
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

    /// The session, while no write is under way.
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

    /// Takes back what [`Wire::release`] gave.
    pub fn put_back(&mut self, session: Box<ServerSession>) {
        self.state = State::Idle(session);
    }

    /// The class of the turn of the lane that the last poll was for.
    pub fn used_turn(&mut self) -> Option<Class> {
        self.in_turn.take()
    }

    /// Whether the client speaks HTTP/2.
    pub fn is_http2(&self) -> bool {
        self.control.is_some()
    }

    /// Whether all of the answer is here.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// Whether all of the request body was read; `None` if only the session knows, and a write has it.
    pub fn body_is_read(&mut self) -> Option<bool> {
        match &self.past {
            Some(past) => Some(past.bypass.is_read()),
            None => self.session().map(|session| session.is_body_done()),
        }
    }

    /// The trailers of a request whose body is here whole, once; on HTTP/2 its stream has them.
    pub fn take_request_trailers(&self) -> Option<HeaderMap> {
        self.past.as_ref()?.bypass.take_trailers()
    }

    /// The answer ends with these trailers.
    pub fn end_with(&mut self, trailers: HeaderMap) {
        self.last = Some(HttpTask::Trailer(Some(Box::new(trailers))));
    }

    /// Whether the session cannot be kept for another request, and does not know: bytes of this one are still to come.
    fn leaves_body(&self) -> bool {
        self.past.as_ref().is_some_and(|past| past.reads && !past.bypass.is_read())
    }

    /// The same, or an answer has begun of which bytes are missing.
    pub fn leaves_rest(&self) -> bool {
        let unfinished = self.begun && (!self.end_written || self.broken || self.sends());
        self.leaves_body() || (self.past.is_some() && unfinished)
    }

    /// No request is to follow this one on its connection.
    pub fn end_after_answer(&self) {
        self.past.iter().for_each(|past| past.bypass.end_after_answer());
    }

    /// Whether all of the answer has left.
    pub fn has_left_whole(&self) -> bool {
        let sent = self.past.as_ref().is_none_or(|past| past.bypass.has_sent_all());
        self.end_written && !self.broken && !self.sends() && sent && matches!(self.state, State::Idle(_))
    }

    /// Gives the session back for good; `None` if a write has it.
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

    /// The answer is given up: what waits is dropped, and a write under way with its session.
    pub fn abandon(&mut self) {
        self.forget();
        if matches!(self.state, State::Writing(_)) || self.sends() {
            self.state = State::Gone;
        }
        self.end_blocked();
    }

    /// A new attempt begins: what the one before left unsent is dropped.
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

    /// Breaks off where the answer comes from.
    pub fn abort(&mut self) {
        self.window.iter_mut().for_each(Window::abort);
        self.stream.iter().for_each(StreamHandle::hang_up);
    }

    /// Lets a write under way go on.
    pub fn poll_writing(&mut self, cx: &mut Context<'_>) {
        if matches!(self.state, State::Writing(_)) || self.sends() {
            // Ready or not, and whatever fails, whoever polls for it hears of it.
            let _ = self.poll_write(cx);
        }
    }

    /// Whether bytes of the final answer have left, or may have.
    pub fn begun(&self) -> bool {
        self.begun
    }

    /// The status of the answer that has begun to leave; 0 if none has.
    pub fn status(&self) -> u16 {
        self.head.filter(|_| self.begun).map_or(0, |head| head.status)
    }

    /// Whether the client can tell a cut answer from a whole one by its framing.
    pub fn framed(&self) -> bool {
        self.head.is_none_or(|head| self.is_http2() || head.body != Body::UntilEnd)
    }

    /// Body bytes that the client's session has taken.
    pub fn sent(&self) -> u64 {
        self.gone
    }

    /// Body bytes that came from the upstream.
    pub fn came(&self) -> u64 {
        self.came
    }

    /// Bytes that were held back, and those of them that were on disk.
    pub fn spooled(&self) -> (u64, u64) {
        let now = self.spool.as_ref().map_or((0, 0), |spool| (spool.pushed(), spool.spilled()));
        (self.spooled.0 + now.0, self.spooled.1 + now.1)
    }

    /// If the client was waited for: says what it had asked for.
    pub fn name_client(&self, request: &RequestHeader) {
        if let Some(entry) = &self.slow {
            entry.name(|| self.who.asked(request));
        }
    }

    /// For how long the client did not take what there was.
    pub fn blocked(&self) -> Duration {
        self.blocked_before + self.blocked.as_ref().map_or(Duration::ZERO, |blocked| blocked.lasted())
    }

    /// Why the wire gave up, if it did.
    pub fn fault(&self) -> Option<Fault> {
        self.fault
    }

    /// The party that is waited for before more may be written, or may come.
    pub fn waits_for(&self) -> Party {
        self.waits_for
    }

    /// Where the answer comes from, for this attempt; `None` once its connection is no longer the exchange's.
    pub fn comes_through(&mut self, window: Option<Window>) {
        self.window = window;
    }

    /// Through which stream the answer to this attempt comes, of a connection that is not the exchange's alone.
    pub fn comes_by(&mut self, stream: StreamHandle) {
        self.stream = Some(stream);
    }

    /// Ready when the endpoint has taken what it was given of the request, as far as can be seen; also if it need not,
    /// since it has `answered`.
    pub fn poll_taken(&self, cx: &mut Context<'_>, answered: bool) -> Poll<()> {
        let Some(stream) = &self.stream else { return Poll::Ready(()) };
        if answered {
            stream.end_request();
        }
        stream.poll_taken(cx)
    }

    /// What comes from the endpoint from here on is not taken here: nothing is to hold it up.
    pub fn open_window(&mut self) {
        if let Some(mut window) = self.window.take() {
            window.open();
        }
    }

    /// Leaves the answer to itself from here on: server-sent events, or an upstream that says so.
    pub fn stream(&mut self) {
        self.leave = Leave::Stream;
        self.held = false;
    }

    /// Has nothing of this answer leave before it is whole.
    pub fn hold(&mut self) {
        self.leave = Leave::Full;
        self.held = !self.ended;
    }

    /// The connection is to close after this answer, and the answer is to say so.
    pub fn close_after_answer(&mut self) {
        self.last_on_connection = true;
    }

    /// Why nothing more can be written, if so; told once.
    pub fn take_error(&mut self) -> Option<Box<Error>> {
        self.error.take()
    }

    /// Whether it cannot be written any more.
    pub fn failed(&self) -> bool {
        self.broken || matches!(self.state, State::Gone)
    }

    /// The header of an answer that comes next, interim or final, came in this: so the names of its fields were spelled.
    pub fn came_in(&mut self, header: Bytes) {
        self.past.iter_mut().for_each(|past| past.written.push_back(header.clone()));
    }

    /// Takes what came from the upstream. An error is the upstream's, passed on.
    pub fn take(&mut self, tasks: Vec<HttpTask>) -> Result<()> {
        self.admitted = false;
        let spooling = self.held || self.spool.as_ref().is_some_and(|spool| spool.unread() > 0);
        for task in tasks {
            match task {
                // RFC 9110 §15.2: such a client knows none of them.
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
                // After an upgrade nothing comes this way.
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

    /// Marks the end, if the upstream did not.
    pub fn end(&mut self) {
        self.ended = true;
        self.held = false;
    }

    /// Has the header of the final answer say how its body leaves. `end`: it has none, whatever it says.
    ///
    /// It was found sound when it came, and has been as on HTTP/1.1 since; an error is of a filter.
    fn frame(&mut self, header: &mut ResponseHeader, end: bool) -> Result<()> {
        let (status, said) = (header.status.as_u16(), Said::of(&header.headers));
        let framed = answer::frame(self.head_only, status, Version::HTTP_11, &said, self.version)
            .map_err(|fault| Error::explain(ErrorType::InternalError, fault.words()))?;
        let framed = if end { framed.ended() } else { framed };
        framed.apply(&said, header)?;
        if let Some(past) = &mut self.past {
            past.framing = framed.write;
            // The end of the connection is that of the body.
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

    /// Writes what may leave. Ready when nothing is left that may, or when it cannot be written any more.
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
                    // It is the poll that ends, and not the client that takes nothing.
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

    /// Takes what may leave next, to be sent past the session. Ready, with `false`, if nothing may.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let gathered = self.gather_headers();
        let filled = if self.held { Poll::Ready(false) } else { self.poll_fill_body(cx) };
        let Some(past) = self.past.as_mut().filter(|_| !self.broken) else { return filled };
        past.sends = gathered || filled == Poll::Ready(true);
        // A header leaves whatever its body waits for.
        if gathered { Poll::Ready(true) } else { filled }
    }

    /// Writes the headers that are next, as far as they may leave. Interim answers are never held: a client may wait
    /// for one before it sends its body.
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

    /// Takes what may leave next of the body, and its end.
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

    /// Sends past the session. Ready when all of it has left, or cannot.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(past) = &mut self.past else { return Poll::Ready(()) };
        match past.bypass.poll_send(cx, &mut past.pieces) {
            Poll::Ready(outcome) => {
                past.sends = false;
                let failed = |error| Error::because(ErrorType::WriteError, "writing the answer", error).into_down();
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

    /// The client does not take what is being sent: most of it goes back to where it can be spooled from. What comes
    /// from the spool stays in memory: it would be spooled, and counted, once more.
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

    /// What is written next.
    fn poll_batch(&mut self, cx: &mut Context<'_>) -> Poll<Option<Vec<HttpTask>>> {
        if self.held {
            // Interim answers are never held: a client may wait for one before it sends its body.
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
        // The session would write pieces one by one, or copy them together.
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
        // What a slow client has not taken of it stays in memory.
        let slow = self.blocked_before > Duration::ZERO;
        let limit = self.limit().min(if slow { SPOOLED_MOST_SLOW } else { SPOOLED_MOST });
        ready!(self.poll_throttle(cx, limit));
        let Some(spool) = &mut self.spool else { return Poll::Ready(None) };
        let Poll::Ready(next) = spool.poll_next(cx, limit) else {
            let since = *self.fetching.get_or_insert_with(Instant::now);
            self.waits_for = Party::Disk;
            ready!(self.timer.poll(cx, since + self.manner.disk_max));
            tracing::error!("the disk does not give back a spooled answer");
            self.fail(Fault::new(Party::Disk, Phase::Write, What::Silent));
            return Poll::Ready(None);
        };
        self.fetching = None;
        match next {
            Ok(piece) => Poll::Ready(piece),
            Err(error) => {
                tracing::error!(%error, "a spooled answer could not be read back");
                self.fail(Fault::new(Party::Disk, Phase::Write, What::Failed));
                Poll::Ready(None)
            }
        }
    }

    fn limit(&self) -> usize {
        self.manner.throttle.map_or(self.piece, |throttle| throttle.piece())
    }

    /// Ready when so many bytes may leave.
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

    /// Whether what is being written would belie the length that was announced (RFC 9113 §8.1.1).
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
                // What it takes at once counts for it, too.
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

    /// Ready when the write under way takes too long: with what the client did not keep.
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
        // On HTTP/1 the stream sees every byte that leaves, and keeps this more exactly.
        let still = self.control.is_some().then_some((self.manner.write_idle, What::Silent));
        let first = slow.into_iter().chain(still).min_by_key(|(patience, _)| *patience);
        let Some((patience, what)) = first else { return Poll::Pending };
        self.timer.poll(cx, since + patience).map(|()| Fault::new(Party::Client, phase, what))
    }

    /// The phase in which a client is waited for.
    fn phase(&self) -> Phase {
        if self.ended { Phase::Write } else { Phase::Receive }
    }

    /// Body bytes that are here and that the client has not taken.
    fn left(&self) -> u64 {
        let ready: u64 = self.ready.iter().map(|task| body_len(task) as u64).sum();
        ready + self.writing + self.spool.as_ref().map_or(0, Spool::unread)
    }

    fn end_blocked(&mut self) -> Option<Duration> {
        let waited = self.blocked.take()?.lasted();
        self.blocked_before += waited;
        Some(waited)
    }

    /// The answer will never be whole, for this reason.
    pub fn fail(&mut self, fault: Fault) {
        self.fault.get_or_insert(fault);
        self.broken = true;
        self.forget();
        self.end_blocked();
        self.error = Some(Error::explain(ErrorType::WriteError, format!("{fault:?}")).into_down());
    }

    /// Ready when more may come from the upstream: the client has taken all there is, or there is room in the spool and
    /// it is this exchange's turn. Ready, too, when nothing can be written any more.
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
            // Without the final header there is nothing to spool: interim answers wait for their client.
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

    /// Whether it moves much. One that says so takes turns from its first piece on: in a crowd its window stays narrow
    /// until then, and it holds little.
    fn is_bulk(&self) -> bool {
        let announced = self.head.and_then(|head| head.length).unwrap_or_default();
        self.came > BULK_BYTES || (self.came > 0 && announced > BULK_BYTES)
    }

    /// What the client did not take of what just came goes to the spool.
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
            // It is in memory still; there is just no further room.
            Err(SpoolError::Full(_)) => {}
            Err(SpoolError::Failed(error)) => {
                tracing::error!(%error, "an answer could not be spooled to disk");
            }
        }
        // Only the client makes room, and if the answer is held back until it is whole, nobody: so it leaves.
        if std::mem::take(&mut self.held) {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    /// Ready when there is room for more that does not leave now, and it is this exchange's turn.
    fn poll_admitted(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        ready!(self.poll_room(cx));
        // For one that is held until it is whole, its client waits.
        let class = if self.held { Class::Pass } else { Class::Spool };
        let disk = self.spool.as_ref().is_some_and(Spool::needs_disk);
        self.poll_turn(cx, class, disk)
    }

    /// An answer that is held until it is whole waits for the disk, or for its turn, and for nothing else: no longer
    /// than that may take, and only while its client is there. Ready when the answer has failed.
    fn poll_held(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let since = *self.fetching.get_or_insert_with(Instant::now);
        let fault = if self.poll_gone(cx).is_ready() {
            Fault::new(Party::Client, Phase::Receive, What::Left)
        } else {
            ready!(self.timer.poll(cx, since + self.manner.disk_max));
            tracing::error!("the disk does not take an answer that is held");
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

    /// Ready when the client has gone; only looked at while no write is under way, which would find out by itself.
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<Box<Error>> {
        if self.session().is_none() {
            return Poll::Pending;
        }
        if let Some(control) = &self.control {
            return control.poll_closed(cx);
        }
        if self.body_is_read() != Some(true) {
            // Reading the body finds out.
            return Poll::Pending;
        }
        if let Some(past) = &self.past {
            return past.bypass.poll_gone(cx).map(http1::gone);
        }
        let Some(session) = self.session() else { return Poll::Pending };
        let mut idle = std::pin::pin!(session.read_body_or_idle(true));
        match ready!(idle.as_mut().poll(cx)) {
            Err(error) => Poll::Ready(error),
            // HTTP/1 hands on nothing after the body.
            Ok(_) => Poll::Pending,
        }
    }

    /// As [`Wire::poll_gone`], also while a body is not being read. `reads`: it is being read.
    pub fn poll_left(&mut self, cx: &mut Context<'_>, reads: bool) -> Poll<()> {
        if self.control.is_none() && self.body_is_read() == Some(false) {
            return match &self.past {
                Some(past) if !reads => past.bypass.poll_left(cx).map(drop),
                _ => Poll::Pending,
            };
        }
        self.poll_gone(cx).map(drop)
    }

    /// Reads a piece of the request body. Unless that is read past the session, it waits for a write that is under way,
    /// which has the session.
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

    /// Writes to the end of the answer. Ready when it has left, or cannot.
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
    Error::explain(ErrorType::WriteError, "the answer is shorter or longer than announced").into_down()
}

/// Whether it belongs to the final answer.
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
