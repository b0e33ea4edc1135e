//! The request body on its way in: held back until it is whole and replayed as often as it takes, or passed on as it
//! comes.
//!
//! Either way the client is bounded: in bytes (`max_body`), in all its time (`body_total`), in its pauses (`body_idle`)
//! and in its pace (`min_rate.read`). What is held back takes turns with other bulk in the lane of its worker.

use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pingora::Error;
use pingora::http::RequestHeader;

use super::lane::{Bulk, Class, Lanes, Turn};
use super::pace::Pace;
use super::slow::Entry;
use super::spool::{Depot, Held, Limits, Room, Spool, SpoolError};
use super::waiting::{Waiting, Who};
use super::wire::Wire;
use crate::config;
use crate::config::route::{BufferMode, OnDiskFull};
use crate::config::server::Resources;
use crate::metrics::{Direction, RouteMetrics};
use crate::party::wait::Timer;
use crate::party::{Fault, Party, What};
use crate::phase::Phase;

/// How much is read without a pause before the next exchange has its turn.
const TURN_BYTES: u64 = 256 << 10;
/// How much is replayed at once.
const PIECE_BYTES: usize = 128 << 10;

/// How a request body is taken.
#[derive(Clone)]
pub struct IntakeTerms {
    /// What its spool may hold.
    pub limits: Limits,
    /// A body that its spool cannot hold is streamed on rather than refused.
    pub stream_large: bool,
    /// A body for which there is no disk left is streamed on rather than refused.
    pub stream_without_disk: bool,
    /// The most bytes it may have.
    pub max_body: u64,
    /// Its length as announced.
    pub announced: Option<u64>,
    /// Between two pieces.
    pub idle: Duration,
    /// Both sides may speak at once: a piece of the answer is a sign of life, too, and `idle` begins anew.
    pub duplex: bool,
    /// From its first byte to its last.
    pub total: Duration,
    /// The minimum rate.
    pub pace: Pace,
    /// How long it may wait for the disk.
    pub disk_max: Duration,
    /// The counters of its route.
    pub route: Arc<RouteMetrics>,
}

impl IntakeTerms {
    /// How the request bodies of a route are taken.
    pub fn build(written: &config::Route, resources: &Resources, metrics: &Arc<RouteMetrics>) -> IntakeTerms {
        let (client, request) = (&written.client, &written.buffering.request);
        let stream_without_disk = request.on_disk_full == OnDiskFull::Stream;
        IntakeTerms {
            limits: Limits::build(request.memory, request.disk, resources),
            stream_large: request.mode == BufferMode::Auto || stream_without_disk,
            stream_without_disk,
            max_body: request.max_body.0,
            announced: None,
            duplex: false,
            idle: client.body_idle.0,
            total: client.body_total.0,
            pace: Pace::new(client.min_rate.read.0, client.min_rate.grace.0),
            disk_max: resources.pause.0,
            route: metrics.clone(),
        }
    }
}

/// Why a body could not be read.
#[derive(Debug)]
pub enum Unread {
    /// For this reason, which the client is told.
    Fault(Fault),
    /// Reading failed.
    Failed(Box<Error>),
}

impl From<Fault> for Unread {
    fn from(fault: Fault) -> Self {
        Unread::Fault(fault)
    }
}

/// The client did this with its body.
fn client(phase: Phase, what: What) -> Fault {
    Fault::new(Party::Client, phase, what)
}

/// See the module.
pub struct Intake {
    terms: IntakeTerms,
    empty: bool,
    spool: Option<Spool>,
    /// The spool has it from the first byte to the last.
    whole: bool,
    /// What was held is not kept any more.
    forgotten: bool,
    /// Nothing more comes from the client.
    source_done: bool,
    received: u64,
    /// Bytes that were passed on without being held.
    beyond: u64,
    spooled: (u64, u64),
    since: Option<Instant>,
    waiting: Option<Waiting>,
    who: Who,
    slow: Option<Entry>,
    paused: Option<Instant>,
    timer: Timer,
    /// It holds as much as it may, and one more read is to tell whether that was all.
    asked_at_limit: bool,
    run: u64,
    turn: Option<Turn>,
    /// It moves much.
    bulk: Option<Bulk>,
    /// It has read much in one poll, and lets others have theirs.
    rest: bool,
    in_turn: bool,
    depot: Arc<Depot>,
    lanes: Arc<Lanes>,
}

impl Intake {
    /// The intake of a request of which nothing was read.
    pub fn new(terms: IntakeTerms, empty: bool, who: Who, depot: &Arc<Depot>, lanes: &Arc<Lanes>) -> Self {
        Intake {
            terms,
            empty,
            spool: None,
            whole: false,
            forgotten: false,
            source_done: empty,
            received: 0,
            beyond: 0,
            spooled: (0, 0),
            since: None,
            waiting: None,
            who,
            slow: None,
            paused: None,
            timer: Timer::default(),
            asked_at_limit: false,
            run: 0,
            turn: None,
            bulk: None,
            rest: false,
            in_turn: false,
            depot: depot.clone(),
            lanes: lanes.clone(),
        }
    }

    /// There is no body.
    pub fn is_empty(&self) -> bool {
        self.empty || (self.whole && self.received == 0)
    }

    /// The length of a body that is held whole.
    pub fn whole(&self) -> Option<u64> {
        self.whole.then_some(self.received)
    }

    /// A body that is here whole, for somebody who needs it besides; `None` if it is not all in memory.
    pub fn share_memory(&mut self) -> Option<Held> {
        self.spool.as_mut().filter(|_| self.whole)?.share_memory()
    }

    /// Bytes that came from the client.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Bytes that were held back, and those of them that were on disk.
    pub fn spooled(&self) -> (u64, u64) {
        self.spool.as_ref().map_or(self.spooled, |spool| (spool.pushed(), spool.spilled()))
    }

    /// Every byte was passed on.
    pub fn is_done(&mut self, wire: &mut Wire) -> bool {
        if !self.source_done {
            self.source_done = wire.body_is_read().unwrap_or(false);
        }
        self.source_done && self.spool.as_ref().is_none_or(|spool| spool.unread() == 0)
    }

    /// Whether another attempt could have the body from its first byte.
    pub fn is_replayable(&self, wire: &mut Wire) -> bool {
        match &self.spool {
            Some(_) => self.beyond == 0,
            None if self.is_empty() => true,
            // It was held and is given up.
            None if self.forgotten => false,
            None => wire.session().is_some_and(|session| !session.retry_buffer_truncated()),
        }
    }

    /// Begins again at the first byte.
    pub fn rewind(&mut self, wire: &mut Wire) {
        if let Some(spool) = &mut self.spool {
            spool.rewind();
        } else if !self.is_empty()
            && !self.forgotten
            && let Some(session) = wire.session()
        {
            // What is streamed, Pingora's own session keeps in part.
            session.enable_retry_buffering();
        }
    }

    /// What Pingora's own session kept of a body that is streamed.
    pub fn retry_buffer(&self, wire: &mut Wire) -> Option<Bytes> {
        match &self.spool {
            None if !self.is_empty() && !self.forgotten => wire.session()?.get_retry_buffer(),
            _ => None,
        }
    }

    /// A piece of the answer has passed.
    pub fn answer_moved(&mut self) {
        if self.terms.duplex {
            self.stop_waiting(0);
        }
    }

    /// Nobody will ask for the body again: it need not be kept.
    pub fn forget(&mut self) {
        if self.spool.as_ref().is_some_and(|spool| spool.unread() == 0) {
            self.spooled = self.spooled();
            self.spool = None;
            self.forgotten = true;
        }
    }

    /// Ready when the body is whole, or when the rest of it is to be streamed on. Calls `waiting` when the client, or
    /// room for more, is waited for, with what has come of it.
    pub fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        wire: &mut Wire,
        waiting: &mut (dyn FnMut(u64) + Send),
    ) -> Poll<Result<(), Unread>> {
        while !self.whole {
            if std::mem::take(&mut self.rest) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if let Some(turn) = &mut self.turn {
                ready!(turn.poll(cx));
                self.turn = None;
                self.in_turn = true;
            }
            let Poll::Ready(room) = self.poll_room(cx) else {
                // It is not the client that is waited for.
                self.stop_waiting(0);
                waiting(self.received);
                return Poll::Pending;
            };
            if !room? {
                return Poll::Ready(Ok(()));
            }
            match wire.poll_read(cx) {
                Poll::Ready(Ok(Some(piece))) => {
                    self.arrived(&piece, Phase::Buffer)?;
                    self.hold(piece);
                    self.whole = self.is_at_end(wire);
                }
                Poll::Ready(Ok(None)) => {
                    self.source_done = true;
                    self.whole = true;
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Unread::Failed(error))),
                Poll::Pending => {
                    waiting(self.received);
                    if let Some(spool) = &mut self.spool {
                        spool.idle(cx);
                    }
                    self.run = 0;
                    let late = ready!(self.poll_late(cx, Phase::Buffer));
                    return Poll::Ready(Err(late.into()));
                }
            }
        }
        self.waiting = None;
        self.bulk = None;
        Poll::Ready(Ok(()))
    }

    /// The next piece of the body: what was held, then what comes. `None` at its end.
    pub fn poll_piece(&mut self, cx: &mut Context<'_>, wire: &mut Wire) -> Poll<Result<Option<Bytes>, Unread>> {
        if let Some(spool) = self.spool.as_mut().filter(|spool| spool.unread() > 0) {
            return Poll::Ready(match ready!(spool.poll_next(cx, PIECE_BYTES)) {
                Ok(piece) => Ok(piece),
                Err(error) => {
                    tracing::error!(%error, "a spooled request body could not be read back");
                    Err(Fault::new(Party::Disk, Phase::Send, What::Failed).into())
                }
            });
        }
        if self.whole || self.empty {
            return Poll::Ready(Ok(None));
        }
        match wire.poll_read(cx) {
            Poll::Ready(Ok(Some(piece))) => {
                self.arrived(&piece, Phase::Send)?;
                self.beyond += piece.len() as u64;
                // What was held of it could not be replayed any more.
                self.forget();
                Poll::Ready(Ok(Some(piece)))
            }
            Poll::Ready(Ok(None)) => {
                self.waiting = None;
                self.source_done = true;
                Poll::Ready(Ok(None))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(Unread::Failed(error))),
            // A write has the session: it is not the client's body that is waited for.
            Poll::Pending if wire.session().is_none() => Poll::Pending,
            Poll::Pending => self.poll_late(cx, Phase::Send).map(|late| Err(late.into())),
        }
    }

    /// Whether the last poll found nothing to read from the client, and will find out if it leaves.
    pub fn is_reading(&self) -> bool {
        self.waiting.is_some()
    }

    /// The party that the next piece is waited for from.
    pub fn waits_for(&self) -> Party {
        if self.spool.as_ref().is_some_and(|spool| spool.unread() > 0) { Party::Disk } else { Party::Client }
    }

    /// If the client was waited for: says what it had asked for.
    pub fn name_client(&self, request: &RequestHeader) {
        if let Some(entry) = &self.slow {
            entry.name(|| self.who.asked(request));
        }
    }

    /// Whether the last poll used a turn of the lane.
    pub fn used_turn(&mut self) -> bool {
        std::mem::take(&mut self.in_turn)
    }

    fn is_at_end(&mut self, wire: &mut Wire) -> bool {
        self.source_done |= wire.body_is_read().unwrap_or(false);
        self.source_done
    }

    fn stop_waiting(&mut self, bytes: u64) {
        if let Some(waiting) = self.waiting.take() {
            self.terms.pace.moved(bytes, waiting.lasted());
        }
    }

    fn arrived(&mut self, piece: &Bytes, phase: Phase) -> Result<(), Unread> {
        let bytes = piece.len() as u64;
        self.received += bytes;
        self.stop_waiting(bytes);
        self.since.get_or_insert_with(Instant::now);
        if self.received > self.terms.max_body { Err(client(phase, What::TooLarge).into()) } else { Ok(()) }
    }

    fn hold(&mut self, piece: Bytes) {
        let bytes = piece.len() as u64;
        let Intake { spool, depot, terms, lanes, who, .. } = self;
        let begin = || {
            let account = who.account(&depot.accounts);
            Spool::keeping(depot, Direction::Request, terms.limits, account.as_ref(), Some(&terms.route))
        };
        spool.get_or_insert_with(begin).push(piece);
        self.run += bytes;
        if self.run >= TURN_BYTES {
            let lane = lanes.here();
            lane.spooled(std::mem::take(&mut self.run));
            let bulk = self.bulk.get_or_insert_with(|| lane.enter());
            if !bulk.is_crowded() {
                self.rest = true;
                return;
            }
            let missing = terms.announced.map_or(u64::MAX, |length| length.saturating_sub(self.received));
            let disk = self.spool.as_ref().is_some_and(Spool::needs_disk);
            self.turn = Some(lane.queue(Class::Pass, missing, disk));
        }
    }

    /// Ready when another piece may be held (`true`), or when the rest is to be streamed on.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, Unread>> {
        let Some(spool) = &mut self.spool else { return Poll::Ready(Ok(true)) };
        let room = spool.room(cx);
        let limit = self.terms.limits.memory.saturating_add(self.terms.limits.disk);
        if !matches!(room, Ok(Room::Pressure | Room::Disk)) {
            self.paused = None;
        }
        let refuse = |party, what| Err(Unread::from(Fault::new(party, Phase::Buffer, what)));
        let full = |party| refuse(if spool.exceeds_client() { Party::Client } else { party }, What::Full);
        let no_disk = |stream: bool| if stream { Ok(false) } else { full(Party::Disk) };
        Poll::Ready(match room {
            Ok(Room::Free) => Ok(true),
            Ok(Room::Disk) => {
                let since = *self.paused.get_or_insert_with(Instant::now);
                ready!(self.timer.poll(cx, since + self.terms.disk_max));
                refuse(Party::Disk, What::Failed)
            }
            Ok(Room::Pressure) => {
                let since = *self.paused.get_or_insert_with(Instant::now);
                ready!(self.timer.poll(cx, since + self.depot.budget.pause_max()));
                full(Party::Gateway)
            }
            // The body may be over: only a further byte is too much.
            Ok(Room::Full) if spool.pushed() == limit && self.received == limit && !self.asked_at_limit => {
                self.asked_at_limit = true;
                Ok(true)
            }
            Ok(Room::Full) if spool.pushed() < limit => no_disk(self.terms.stream_without_disk),
            Ok(Room::Full) if self.terms.stream_large => Ok(false),
            Ok(Room::Full) => refuse(Party::Client, What::TooLarge),
            Err(SpoolError::Full(error)) => {
                tracing::warn!(%error, "no disk left for request bodies");
                no_disk(self.terms.stream_without_disk)
            }
            Err(SpoolError::Failed(error)) => {
                tracing::error!(%error, "a request body could not be spooled to disk");
                refuse(Party::Disk, What::Failed)
            }
        })
    }

    /// Ready when the client takes too long in this phase: with what it did not keep.
    fn poll_late(&mut self, cx: &mut Context<'_>, phase: Phase) -> Poll<Fault> {
        let Intake { waiting, depot, slow, who, terms, received, .. } = self;
        let waiting = waiting.get_or_insert_with(|| {
            let enter = || depot.slow.enter(Direction::Request, Some(&terms.route), who.client);
            let entry = slow.get_or_insert_with(enter);
            let missing = terms.announced.map_or(u64::MAX, |announced| announced.saturating_sub(*received));
            entry.set(phase, missing);
            Waiting::begin(Some(depot.budget.slow(Direction::Request)), entry)
        });
        let since = waiting.since;
        let whole = *self.since.get_or_insert(since);
        let dues = [
            (Some(since + self.terms.idle), What::Silent),
            (Some(whole + self.terms.total), What::Late),
            (self.terms.pace.patience(0).map(|patience| since + patience), What::Slow),
        ];
        let first = dues.into_iter().filter_map(|(due, what)| Some((due?, what))).min_by_key(|(due, _)| *due);
        let Some((due, what)) = first else { return Poll::Pending };
        self.timer.poll(cx, due).map(|()| client(phase, what))
    }
}
