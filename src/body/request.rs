//! Receives the request body: holds it back until it is complete and replays it for each attempt, or passes it on as it
//! is received.
//!
//! In both cases limits apply to the client: size (`max_body`), total time (`body_total`), pauses (`body_idle`) and
//! rate (`min_rate.read`). A body that is held takes turns with the other bulk transfers of its worker.

use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pingora::Error;
use pingora::http::RequestHeader;

use super::response::ResponseBody;
use crate::config;
use crate::config::route::{BufferMode, OnDiskFull};
use crate::config::server::Resources;
use crate::metrics::{Direction, RouteMetrics};
use crate::party::wait::Timer;
use crate::party::{Fault, Party, What};
use crate::phase::Phase;
use crate::scheduler::{Bulk, Class, Grant, Schedulers};
use crate::slow_client::Entry;
use crate::slow_client::min_rate::MinRate;
use crate::slow_client::waiting::{Waiting, Who};
use crate::spool::{Held, Limits, Room, Spool, SpoolError, Spools};

/// Bytes read without a pause before the next exchange has its turn.
const TURN_BYTES: u64 = 256 << 10;
/// Bytes replayed at once.
const PIECE_BYTES: usize = 128 << 10;

/// How a request body is received.
#[derive(Clone)]
pub struct RequestPolicy {
    /// Limits of its spool.
    pub limits: Limits,
    /// A body that exceeds its spool is streamed instead of refused.
    pub stream_large: bool,
    /// A body is streamed instead of refused when no disk space is left.
    pub stream_without_disk: bool,
    /// Maximum size of the body, in bytes.
    pub max_body: u64,
    /// The announced length, in bytes.
    pub announced: Option<u64>,
    /// Maximum time between two pieces.
    pub idle: Duration,
    /// Both sides may send at once: a piece of the response also restarts `idle`.
    pub duplex: bool,
    /// Maximum time from the first byte to the last.
    pub total: Duration,
    /// The minimum rate.
    pub min_rate: MinRate,
    /// Maximum time to wait for the disk.
    pub disk_max: Duration,
    /// The metrics of the route.
    pub route: Arc<RouteMetrics>,
}

impl RequestPolicy {
    /// Builds the settings from a route's configuration.
    pub fn build(written: &config::Route, resources: &Resources, metrics: &Arc<RouteMetrics>) -> RequestPolicy {
        let (client, request) = (&written.client, &written.buffering.request);
        let stream_without_disk = request.on_disk_full == OnDiskFull::Stream;
        RequestPolicy {
            limits: Limits::build(request.memory, request.disk, resources),
            stream_large: request.mode == BufferMode::Auto || stream_without_disk,
            stream_without_disk,
            max_body: request.max_body.0,
            announced: None,
            duplex: false,
            idle: client.body_idle.0,
            total: client.body_total.0,
            min_rate: MinRate::new(client.min_rate.read.0, client.min_rate.grace.0),
            disk_max: resources.pause.0,
            route: metrics.clone(),
        }
    }
}

/// Why a body could not be read.
#[derive(Debug)]
pub enum Unread {
    /// A fault that the client receives as a response.
    Fault(Fault),
    /// Reading failed.
    Failed(Box<Error>),
}

impl From<Fault> for Unread {
    fn from(fault: Fault) -> Self {
        Unread::Fault(fault)
    }
}

/// A fault of the client.
fn client(phase: Phase, what: What) -> Fault {
    Fault::new(Party::Client, phase, what)
}

/// The receiver of one request body; see the module.
pub struct RequestBody {
    terms: RequestPolicy,
    empty: bool,
    held: HeldBody,
    /// The client has sent the whole body.
    source_done: bool,
    received: u64,
    /// Bytes passed on without being held.
    beyond: u64,
    client: Client,
    /// Start of the wait for memory or the disk.
    paused: Option<Instant>,
    timer: Timer,
    grants: Grants,
    spools: Arc<Spools>,
}

/// The held part of a body.
#[derive(Default)]
struct HeldBody {
    /// Boxed, since most requests have no body.
    spool: Option<Box<Spool>>,
    /// The spool holds the whole body.
    whole: bool,
    /// The spool was released.
    forgotten: bool,
    /// Bytes of a released spool, and those of them that were on disk.
    spooled_before: (u64, u64),
    /// The spool is full, and one more read determines whether the body ends here.
    asked_at_limit: bool,
}

/// The client that sends a body, and the wait for it.
struct Client {
    who: Who,
    /// Its entry in the list of slow clients.
    slow: Option<Entry>,
    /// The current wait.
    waiting: Option<Waiting>,
    /// When the first byte was waited for.
    since: Option<Instant>,
}

/// The grants that a body needs beside the other bulk transfers of its worker.
struct Grants {
    schedulers: Arc<Schedulers>,
    /// Bytes read without a pause.
    run: u64,
    grant: Option<Grant>,
    /// Registration as a bulk transfer.
    bulk: Option<Bulk>,
    /// The last poll read many bytes; the next one yields to other tasks.
    rest: bool,
    /// The last poll used a grant.
    used: bool,
}

impl RequestBody {
    /// Creates the receiver for a body of which nothing was read.
    pub fn new(
        terms: RequestPolicy,
        empty: bool,
        who: Who,
        spools: &Arc<Spools>,
        schedulers: &Arc<Schedulers>,
    ) -> Self {
        RequestBody {
            terms,
            empty,
            held: HeldBody::default(),
            source_done: empty,
            received: 0,
            beyond: 0,
            client: Client { who, slow: None, waiting: None, since: None },
            paused: None,
            timer: Timer::default(),
            grants: Grants {
                schedulers: schedulers.clone(),
                run: 0,
                grant: None,
                bulk: None,
                rest: false,
                used: false,
            },
            spools: spools.clone(),
        }
    }

    /// Whether the body is empty.
    pub fn is_empty(&self) -> bool {
        self.empty || (self.held.whole && self.received == 0)
    }

    /// The length of a body that is held completely.
    pub fn whole(&self) -> Option<u64> {
        self.held.whole.then_some(self.received)
    }

    /// Shares a complete body with a second reader. `None` if part of it is on disk.
    pub fn share_memory(&mut self) -> Option<Held> {
        self.held.spool.as_mut().filter(|_| self.held.whole)?.share_memory()
    }

    /// Bytes received from the client.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Bytes that were held, and those of them that were on disk.
    pub fn spooled(&self) -> (u64, u64) {
        self.held.spool.as_ref().map_or(self.held.spooled_before, |spool| (spool.pushed(), spool.spilled()))
    }

    /// Whether every byte was passed on.
    pub fn is_done(&mut self, response: &mut ResponseBody) -> bool {
        if !self.source_done {
            self.source_done = response.client.body_is_read().unwrap_or(false);
        }
        self.source_done && self.held.spool.as_ref().is_none_or(|spool| spool.unread() == 0)
    }

    /// Whether another attempt can read the body from its first byte.
    pub fn is_replayable(&self, response: &mut ResponseBody) -> bool {
        match &self.held.spool {
            Some(_) => self.beyond == 0,
            None if self.is_empty() => true,
            // The body was held and then released.
            None if self.held.forgotten => false,
            None => response.client.session().is_some_and(|session| !session.retry_buffer_truncated()),
        }
    }

    /// Restarts reading at the first byte.
    pub fn rewind(&mut self, response: &mut ResponseBody) {
        if let Some(spool) = &mut self.held.spool {
            spool.rewind();
        } else if !self.is_empty()
            && !self.held.forgotten
            && let Some(session) = response.client.session()
        {
            // Pingora's own session keeps part of a streamed body.
            session.enable_retry_buffering();
        }
    }

    /// The part of a streamed body that Pingora's own session kept.
    pub fn retry_buffer(&self, response: &mut ResponseBody) -> Option<Bytes> {
        match &self.held.spool {
            None if !self.is_empty() && !self.held.forgotten => response.client.session()?.get_retry_buffer(),
            _ => None,
        }
    }

    /// Reports that a piece of the response was forwarded.
    pub fn answer_moved(&mut self) {
        if self.terms.duplex {
            self.stop_waiting(0);
        }
    }

    /// Releases the spool if all of it was read: the body is not needed again.
    pub fn forget(&mut self) {
        if self.held.spool.as_ref().is_some_and(|spool| spool.unread() == 0) {
            self.held.spooled_before = self.spooled();
            self.held.spool = None;
            self.held.forgotten = true;
        }
    }

    /// Ready when the body is complete, or when the rest of it is to be streamed. Before it returns pending, it calls
    /// `waiting` with the number of bytes received.
    pub fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        response: &mut ResponseBody,
        waiting: &mut (dyn FnMut(u64) + Send),
    ) -> Poll<Result<(), Unread>> {
        while !self.held.whole {
            if std::mem::take(&mut self.grants.rest) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if let Some(grant) = &mut self.grants.grant {
                ready!(grant.poll(cx));
                self.grants.grant = None;
                self.grants.used = true;
            }
            let Poll::Ready(room) = self.poll_room(cx) else {
                // The wait is for room, not for the client.
                self.stop_waiting(0);
                waiting(self.received);
                return Poll::Pending;
            };
            if !room? {
                return Poll::Ready(Ok(()));
            }
            match response.poll_read(cx) {
                Poll::Ready(Ok(Some(piece))) => {
                    self.arrived(&piece, Phase::Buffer)?;
                    self.hold(piece);
                    self.held.whole = self.is_at_end(response);
                }
                Poll::Ready(Ok(None)) => {
                    self.source_done = true;
                    self.held.whole = true;
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Unread::Failed(error))),
                Poll::Pending => {
                    waiting(self.received);
                    if let Some(spool) = &mut self.held.spool {
                        spool.idle(cx);
                    }
                    self.grants.run = 0;
                    let late = ready!(self.poll_late(cx, Phase::Buffer));
                    return Poll::Ready(Err(late.into()));
                }
            }
        }
        self.client.waiting = None;
        self.grants.bulk = None;
        Poll::Ready(Ok(()))
    }

    /// Returns the next piece of the body: first the held bytes, then new ones. `None` at its end.
    pub fn poll_piece(
        &mut self,
        cx: &mut Context<'_>,
        response: &mut ResponseBody,
    ) -> Poll<Result<Option<Bytes>, Unread>> {
        if let Some(spool) = self.held.spool.as_mut().filter(|spool| spool.unread() > 0) {
            return Poll::Ready(match ready!(spool.poll_next(cx, PIECE_BYTES)) {
                Ok(piece) => Ok(piece),
                Err(error) => {
                    tracing::error!(%error, "a spooled request body could not be read back");
                    Err(Fault::new(Party::Disk, Phase::Send, What::Failed).into())
                }
            });
        }
        if self.held.whole || self.empty {
            return Poll::Ready(Ok(None));
        }
        match response.poll_read(cx) {
            Poll::Ready(Ok(Some(piece))) => {
                self.arrived(&piece, Phase::Send)?;
                self.beyond += piece.len() as u64;
                // The body can no longer be replayed, so the held part is not needed.
                self.forget();
                Poll::Ready(Ok(Some(piece)))
            }
            Poll::Ready(Ok(None)) => {
                self.client.waiting = None;
                self.source_done = true;
                Poll::Ready(Ok(None))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(Unread::Failed(error))),
            // A write owns the session: the wait is not for the client's body.
            Poll::Pending if response.client.session().is_none() => Poll::Pending,
            Poll::Pending => self.poll_late(cx, Phase::Send).map(|late| Err(late.into())),
        }
    }

    /// Whether the last poll found nothing to read from the client; the read then detects a close by the client.
    pub fn is_reading(&self) -> bool {
        self.client.waiting.is_some()
    }

    /// The party that provides the next piece.
    pub fn waits_for(&self) -> Party {
        if self.held.spool.as_ref().is_some_and(|spool| spool.unread() > 0) { Party::Disk } else { Party::Client }
    }

    /// If the client is listed as slow: adds its request to the list entry.
    pub fn name_client(&self, request: &RequestHeader) {
        if let Some(entry) = &self.client.slow {
            entry.name(|| self.client.who.asked(request));
        }
    }

    /// Whether the last poll used a grant.
    pub fn used_grant(&mut self) -> bool {
        std::mem::take(&mut self.grants.used)
    }

    fn is_at_end(&mut self, response: &mut ResponseBody) -> bool {
        self.source_done |= response.client.body_is_read().unwrap_or(false);
        self.source_done
    }

    fn stop_waiting(&mut self, bytes: u64) {
        if let Some(waiting) = self.client.waiting.take() {
            self.terms.min_rate.moved(bytes, waiting.lasted());
        }
    }

    fn arrived(&mut self, piece: &Bytes, phase: Phase) -> Result<(), Unread> {
        let bytes = piece.len() as u64;
        self.received += bytes;
        self.stop_waiting(bytes);
        self.client.since.get_or_insert_with(Instant::now);
        if self.received > self.terms.max_body { Err(client(phase, What::TooLarge).into()) } else { Ok(()) }
    }

    fn hold(&mut self, piece: Bytes) {
        let bytes = piece.len() as u64;
        let RequestBody { held, spools, terms, client, .. } = self;
        let begin = || {
            let account = client.who.account(&spools.accounts);
            Spool::keeping(spools, Direction::Request, terms.limits, account.as_ref(), Some(&terms.route))
        };
        held.spool.get_or_insert_with(|| Box::new(begin())).push(piece);
        self.grants.run += bytes;
        if self.grants.run >= TURN_BYTES {
            let scheduler = self.grants.schedulers.here();
            scheduler.count_spooled(std::mem::take(&mut self.grants.run));
            let bulk = self.grants.bulk.get_or_insert_with(|| scheduler.begin_bulk());
            if !bulk.is_crowded() {
                self.grants.rest = true;
                return;
            }
            let missing = terms.announced.map_or(u64::MAX, |length| length.saturating_sub(self.received));
            let disk = self.held.spool.as_ref().is_some_and(|spool| spool.needs_disk());
            self.grants.grant = Some(scheduler.request(Class::Transfer, missing, disk));
        }
    }

    /// Ready with `true` when another piece may be held, with `false` when the rest is to be streamed.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, Unread>> {
        let Some(spool) = &mut self.held.spool else { return Poll::Ready(Ok(true)) };
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
                ready!(self.timer.poll(cx, since + self.spools.budget.pause_max()));
                full(Party::Gateway)
            }
            // The body may end here; only a further byte exceeds the limit.
            Ok(Room::Full) if spool.pushed() == limit && self.received == limit && !self.held.asked_at_limit => {
                self.held.asked_at_limit = true;
                Ok(true)
            }
            Ok(Room::Full) if spool.pushed() < limit => no_disk(self.terms.stream_without_disk),
            Ok(Room::Full) if self.terms.stream_large => Ok(false),
            Ok(Room::Full) => refuse(Party::Client, What::TooLarge),
            Err(SpoolError::Full(error)) => {
                tracing::warn!(%error, "no disk space is left for request bodies");
                no_disk(self.terms.stream_without_disk)
            }
            Err(SpoolError::Failed(error)) => {
                tracing::error!(%error, "a request body could not be spooled to disk");
                refuse(Party::Disk, What::Failed)
            }
        })
    }

    /// Ready when the client takes too long in this phase, with the limit that it exceeded.
    fn poll_late(&mut self, cx: &mut Context<'_>, phase: Phase) -> Poll<Fault> {
        let RequestBody { client: Client { waiting, slow, who, .. }, spools, terms, received, .. } = self;
        let waiting = waiting.get_or_insert_with(|| {
            let enter = || spools.slow.enter(Direction::Request, Some(&terms.route), who.client);
            let entry = slow.get_or_insert_with(enter);
            let missing = terms.announced.map_or(u64::MAX, |announced| announced.saturating_sub(*received));
            entry.set(phase, missing);
            Waiting::begin(Some(spools.budget.slow(Direction::Request)), entry)
        });
        let since = waiting.since;
        let whole = *self.client.since.get_or_insert(since);
        let dues = [
            (since, Some(self.terms.idle), What::Silent),
            (whole, Some(self.terms.total), What::Late),
            (since, self.terms.min_rate.patience(0), What::Slow),
        ];
        let limits = dues.into_iter().filter_map(|(since, limit, what)| Some((since, limit?, what)));
        let Some((since, limit, what)) = limits.min_by_key(|&(since, limit, _)| since + limit) else {
            return Poll::Pending;
        };
        self.timer.poll_limit(cx, since, limit).map(|()| client(phase, what))
    }
}
