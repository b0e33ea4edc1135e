//! The paced lane: bulk transfers take turns, so that they do not increase the latency of small exchanges.
//!
//! Without turns, a thousand large responses that arrive at once would cause seconds of copying before the next small
//! request is handled. Once many exchanges transfer bulk, each therefore asks its worker's lane for a turn. There are
//! two classes: bytes that *pass* directly to or from a client that is ready, and bytes that are *spooled* for a client
//! that is not waiting for them. A turn costs the time that it takes. Each class has a share of the worker's time,
//! which grows while rounds of the event loop are short and shrinks after a long one. As a result, passing bytes get
//! all time that is not needed otherwise, spooled bytes get a limited part, and rounds remain short.
//!
//! In both classes the exchange with the fewest missing bytes comes first, so that most backends are released soonest.
//! Every eighth turn goes to the exchange that has waited longest, so that none starves. While the disk threads have a
//! backlog, exchanges that need them get no turn: their unwritten bytes would wait in memory.
//!
//! Many connections that arrive at once are not bulk yet, but if a thousand of them begin an exchange in one round, all
//! others wait until the last header was parsed and its endpoint contacted. Each round therefore accepts few
//! connections ([`Door`]), and work for newcomers ([`Newcomer`]), up to the first byte of their first response, is a
//! class of its own: other connections wait for few of them.
//!
//! # Rejected alternatives
//!
//! - A rate in bytes instead of time: the cost of a byte varies by a factor of ten with its place in memory.
//! - Charging only the first poll of a turn: rounds took 2 ms instead of the intended half a millisecond. All polls of
//!   an exchange count until it waits again.
//! - One queue for both classes: slow clients delayed fast ones.
//! - More than 0.3 of a worker for spooling: small requests were slowed by the disk threads and the endpoints that it
//!   keeps busy.
//! - As much time for new connections as for all others together, or a fixed time in every round: they cause more work
//!   than they cost themselves, and a fast client's p99 was three times as high.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::task::AtomicWaker;
use pingora::listeners::ConnectionFilter;
use tokio::task::coop::{has_budget_remaining, poll_proceed};

use super::broken::{Leaving, Look};
use super::connection::Connection;
use super::descriptors::Doorway;
use crate::eventloop::worker;
use crate::metrics::{LaneMetrics, Metrics};
use crate::spool::disk::Backlog;

/// Target for the length of a round of the event loop while the lane is in use.
const LAG_AIM: Duration = Duration::from_millis(1);
/// One of this many turns goes to the exchange that has waited longest.
const FAIR_EVERY: u64 = 8;
/// Maximum number of exchanges that pass bytes without turns: rounds are short enough with them.
const FREE_PASSES: usize = 24;
/// The same limit shortly after newcomers had to wait: they will soon transfer bulk, too.
const FREE_PASSES_IN_ARRIVAL: usize = 4;
const ARRIVAL: Duration = Duration::from_millis(100);

/// The limits of a class for the worker's time, as shares.
struct Terms {
    /// Minimum, so that the class does not starve on a busy worker.
    least: f64,
    most: f64,
    /// Maximum unused time that is saved, so that spending it causes no long round.
    saved: Duration,
}
const NEWCOMERS: Terms = Terms { least: 0.5, most: 1.0, saved: Duration::from_micros(250) };
const PASS: Terms = Terms { least: 0.1, most: 1.0, saved: Duration::from_micros(500) };
/// No client waits for spooled bytes, and disk threads and endpoints use CPU for them, too.
const SPOOL: Terms = Terms { least: 0.1, most: 0.3, saved: Duration::from_micros(250) };

/// Shortest pause between two turns for which the worker sleeps, and the longest while an exchange waits.
const PAUSE_LEAST: Duration = Duration::from_micros(200);
const PAUSE_MOST: Duration = Duration::from_millis(20);
/// Pause while all waiting exchanges need the busy disk threads, and the maximum total of such pauses: afterwards each
/// exchange waits by itself, with its own deadline.
const DISK_PAUSE: Duration = Duration::from_millis(1);
const DISK_PAUSES_MOST: Duration = Duration::from_secs(1);
/// Interval of the search for overdue turns, since each search visits all waiting exchanges.
const TURN_LOOK: Duration = Duration::from_millis(250);

/// Connections accepted per round of the event loop.
const ACCEPTS_MOST: usize = 4;
/// Operations per poll of a task (tokio's cooperative budget).
pub const OPERATIONS_PER_POLL: usize = 128;

/// The purpose of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// To be polled at all: the first exchange of a connection, until its response begins.
    Newcomer,
    /// To transfer bytes that a client waits for: a response that it accepts, a held response, or an upload.
    Pass,
    /// To hold a response for a client that does not accept it.
    Spool,
}

impl Class {
    /// All classes, in the order of `LANE_CLASSES`.
    pub const ALL: [Class; 3] = [Class::Newcomer, Class::Pass, Class::Spool];
}

/// The lanes of one gateway: one per worker, created on first use.
pub struct Lanes {
    metrics: Metrics,
    backlog: Backlog,
    /// Maximum wait for a turn: then it is given at any cost, since turns only define the order, and no exchange may
    /// fail because of them.
    turn_max: Duration,
    /// Counts lanes of threads that are not workers, as in tests.
    made: AtomicUsize,
}

thread_local! {
    /// This worker's lane, and the gateway that it belongs to: a test may run several gateways in one process.
    static HERE: RefCell<Option<(Arc<Lanes>, Arc<Lane>)>> = const { RefCell::new(None) };
}

impl Lanes {
    /// Creates an empty set. Exchanges that need the disk threads wait while `backlog` is deep. A turn is given after
    /// `turn_max` at the latest.
    pub fn new(metrics: Metrics, backlog: Backlog, turn_max: Duration) -> Arc<Self> {
        Arc::new(Lanes { metrics, backlog, turn_max, made: AtomicUsize::new(0) })
    }

    /// The lane of the calling worker.
    pub fn here(self: &Arc<Self>) -> Arc<Lane> {
        HERE.with_borrow_mut(|here| match here {
            Some((whose, lane)) if Arc::ptr_eq(whose, self) => lane.clone(),
            _ => {
                let number = worker::here().map(|worker| worker.index);
                let number = number.unwrap_or_else(|| self.made.fetch_add(1, Ordering::Relaxed));
                let lane = Arc::new(Lane::new(self.metrics.lane(number), self.backlog.clone(), self.turn_max));
                *here = Some((self.clone(), lane.clone()));
                lane
            }
        })
    }
}

/// Accepts few connections per round of the event loop, and none while file descriptors are short; the kernel queues
/// the others.
///
/// Pingora would accept 128, the number of operations that tokio permits in one poll. Each accept therefore consumes
/// more than one operation.
#[derive(Debug)]
pub struct Door(pub Doorway);

#[async_trait]
impl ConnectionFilter for Door {
    async fn should_accept(&self, _: Option<&SocketAddr>) -> bool {
        self.0.pass().await;
        std::future::poll_fn(|cx| {
            spend_budget(cx, OPERATIONS_PER_POLL / ACCEPTS_MOST);
            Poll::Ready(true)
        })
        .await
    }
}

/// Consumes this many units of the task's budget, or the rest of it.
pub fn spend_budget(cx: &mut Context<'_>, units: usize) {
    for _ in 0..units {
        match poll_proceed(cx) {
            Poll::Ready(unit) => unit.made_progress(),
            Poll::Pending => return,
        }
    }
}

/// Consumes the rest of the task's budget, if it has one: this poll makes no further progress.
pub fn exhaust_budget(cx: &mut Context<'_>) {
    for _ in 0..OPERATIONS_PER_POLL {
        if !has_budget_remaining() {
            return;
        }
        spend_budget(cx, 1);
    }
}

/// Whether the task's budget is used up, so that the task continues in another poll. Wakes the task if so.
pub fn ends_for_lack_of_budget(cx: &Context<'_>) -> bool {
    let ends = !has_budget_remaining();
    if ends {
        cx.waker().wake_by_ref();
    }
    ends
}

/// The queues of one worker.
pub struct Lane {
    queues: Mutex<Queues>,
    /// Number of bulk transfers.
    bulk: AtomicUsize,
    backlog: Backlog,
    turn_max: Duration,
    metrics: LaneMetrics,
}

struct Queues {
    /// By class.
    tracks: [Track; 3],
    /// Time at which newcomers last had to wait.
    arrival: Option<Instant>,
    /// Start of the current backlog of the disk threads.
    deep: Option<Instant>,
    /// Time of the last search for overdue turns.
    looked: Option<Instant>,
    /// Whether a task hands out turns; it ends when no exchange waits.
    driven: bool,
}

impl Default for Queues {
    fn default() -> Self {
        Queues {
            tracks: [NEWCOMERS, PASS, SPOOL].map(Track::new),
            arrival: None,
            deep: None,
            looked: None,
            driven: false,
        }
    }
}

impl Queues {
    /// Whether many connections are arriving, or have just arrived.
    fn sees_arrival(&self, now: Instant) -> bool {
        self.arrival.is_some_and(|last| now.saturating_duration_since(last) < ARRIVAL)
    }

    /// Whether exchanges that need the disk threads get no turn.
    fn waits_for_disk(&mut self, deep: bool, now: Instant) -> bool {
        self.deep = self.deep.filter(|_| deep).or(deep.then_some(now));
        self.deep.is_some_and(|since| now.saturating_duration_since(since) < DISK_PAUSES_MOST)
    }

    /// Whether a search for overdue turns is due.
    fn is_to_look(&mut self, now: Instant) -> bool {
        let looks = now.saturating_duration_since(*self.looked.get_or_insert(now)) >= TURN_LOOK;
        if looks {
            self.looked = Some(now);
        }
        looks
    }

    fn of(&mut self, class: Class) -> &mut Track {
        &mut self.tracks[class as usize]
    }
}

/// The waiting exchanges of one class, and the class's time.
struct Track {
    /// Exchanges that do not need the disk threads, and exchanges that do.
    queues: [Queue; 2],
    tickets: u64,
    granted: u64,
    time: Allowance,
}

/// By missing bytes, then by age.
type Queue = BTreeMap<(u64, u64), Arc<Slot>>;

impl Track {
    fn new(terms: Terms) -> Self {
        Track { queues: Default::default(), tickets: 0, granted: 0, time: Allowance::new(terms) }
    }

    fn is_empty(&self) -> bool {
        self.queues.iter().all(Queue::is_empty)
    }

    fn remove(&mut self, key: (u64, u64)) -> Option<Arc<Slot>> {
        self.queues.iter_mut().find_map(|queue| queue.remove(&key))
    }

    /// Takes the next exchange.
    fn next(&mut self, no_disk: bool) -> Option<Arc<Slot>> {
        let open = if no_disk { &self.queues[..1] } else { &self.queues[..] };
        let first = open.iter().filter_map(|queue| queue.first_key_value()).map(|(key, _)| *key).min()?;
        self.granted += 1;
        let oldest = || open.iter().flat_map(|queue| queue.keys()).min_by_key(|(_, ticket)| *ticket).copied();
        let key = if self.granted.is_multiple_of(FAIR_EVERY) { oldest()? } else { first };
        self.remove(key)
    }

    /// Takes all exchanges that have waited for this time, at any place in the queues.
    fn overdue(&mut self, turn_max: Duration, now: Instant) -> Vec<Arc<Slot>> {
        let late = |slot: &Slot| now.saturating_duration_since(slot.since) >= turn_max;
        let queues = self.queues.iter_mut();
        queues.flat_map(|queue| queue.extract_if(.., |_, slot| late(slot)).map(|(_, slot)| slot)).collect()
    }

    /// Time until the next turn; `None` if no exchange waits.
    fn pause(&self, no_disk: bool) -> Option<Duration> {
        if self.is_empty() {
            return None;
        }
        let for_disk = no_disk && self.queues[0].is_empty();
        Some(if for_disk { DISK_PAUSE } else { self.time.share.pause() })
    }
}

struct Slot {
    since: Instant,
    granted: AtomicBool,
    waker: AtomicWaker,
}

impl Slot {
    fn grant(&self) {
        self.granted.store(true, Ordering::Release);
        self.waker.wake();
    }
}

/// A place in a queue, given up on drop.
pub struct Turn {
    lane: Arc<Lane>,
    class: Class,
    key: (u64, u64),
    slot: Arc<Slot>,
}

impl Lane {
    fn new(metrics: LaneMetrics, backlog: Backlog, turn_max: Duration) -> Self {
        Lane { queues: Mutex::default(), bulk: AtomicUsize::new(0), backlog, turn_max, metrics }
    }

    /// Registers a bulk transfer.
    pub fn enter(self: &Arc<Self>) -> Bulk {
        self.bulk.fetch_add(1, Ordering::Relaxed);
        Bulk(self.clone())
    }

    /// Whether the number of bulk transfers requires turns.
    pub fn is_crowded(&self) -> bool {
        let bulk = self.bulk.load(Ordering::Relaxed);
        bulk > FREE_PASSES || (bulk > FREE_PASSES_IN_ARRIVAL && self.lock().sees_arrival(Instant::now()))
    }

    /// Takes a place in the queue of newcomers, if they must take turns now.
    fn queue_newcomer(self: &Arc<Self>, now: Instant) -> Option<Turn> {
        {
            let mut queues = self.lock();
            let newcomers = queues.of(Class::Newcomer);
            if newcomers.is_empty() && newcomers.time.has_credit(now) {
                return None;
            }
            queues.arrival = Some(now);
        }
        Some(self.queue(Class::Newcomer, 0, false))
    }

    /// Queues for a turn. `missing` is the number of missing bytes, `u64::MAX` if unknown; `disk`: the bytes need the
    /// disk threads.
    pub fn queue(self: &Arc<Self>, class: Class, missing: u64, disk: bool) -> Turn {
        let mut queues = self.lock();
        let track = queues.of(class);
        let key = (missing, track.tickets);
        track.tickets += 1;
        let slot = Arc::new(Slot { since: Instant::now(), granted: AtomicBool::new(false), waker: AtomicWaker::new() });
        track.queues[usize::from(disk)].insert(key, slot.clone());
        self.metrics.waiting[class as usize].inc();
        if !std::mem::replace(&mut queues.driven, true) {
            tokio::spawn(drive(self.clone()));
        }
        Turn { lane: self.clone(), class, key, slot }
    }

    /// Counts spooled bytes.
    pub fn spooled(&self, bytes: u64) {
        self.metrics.bytes.inc_by(bytes);
    }

    /// Charges a poll that used a turn with its time.
    pub fn took(&self, class: Class, time: Duration) {
        self.lock().of(class).time.took(time);
    }

    /// Ends a round of the event loop and hands out the turns that are due. Returns the time until the next, or `None`
    /// if no exchange waits; the driving task then ends.
    fn round(&self, since: Instant) -> Option<Duration> {
        let now = Instant::now();
        let lag = now - since;
        let mut queues = self.lock();
        let no_disk = queues.waits_for_disk(self.backlog.is_deep(), now);
        let looks = queues.is_to_look(now);
        for class in Class::ALL {
            let track = queues.of(class);
            for slot in if looks { track.overdue(self.turn_max, now) } else { Vec::new() } {
                self.metrics.overdue[class as usize].inc();
                track.time.granted();
                self.metrics.waiting[class as usize].dec();
                slot.grant();
            }
            for _ in 0..track.time.after_round(lag, now) {
                let Some(slot) = track.next(no_disk) else { break };
                track.time.granted();
                self.metrics.waiting[class as usize].dec();
                slot.grant();
            }
            self.metrics.share[class as usize].set(track.time.share.now);
        }
        let pause = queues.tracks.iter().filter_map(|track| track.pause(no_disk)).min();
        queues.driven = pause.is_some();
        if !queues.driven {
            // No task observes the disk threads any more.
            queues.deep = None;
            queues.looked = None;
        }
        pause
    }

    fn lock(&self) -> MutexGuard<'_, Queues> {
        // One worker uses the lock, so it never blocks; it exists because a task could move to another worker.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A registered bulk transfer; released on drop.
pub struct Bulk(Arc<Lane>);

impl Bulk {
    /// Whether the number of bulk transfers requires turns.
    pub fn is_crowded(&self) -> bool {
        self.0.is_crowded()
    }
}

impl Drop for Bulk {
    fn drop(&mut self) {
        self.0.bulk.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Turn {
    /// The purpose of the turn.
    pub fn class(&self) -> Class {
        self.class
    }

    /// Ready when the turn is given.
    pub fn poll(&mut self, cx: &Context<'_>) -> Poll<()> {
        self.slot.waker.register(cx.waker());
        if self.slot.granted.load(Ordering::Acquire) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !self.slot.granted.load(Ordering::Acquire) && self.lane.lock().of(self.class).remove(self.key).is_some() {
            self.lane.metrics.waiting[self.class as usize].dec();
        }
    }
}

/// The first exchange of a connection, polled when there is time for newcomers.
pub struct Newcomer<F> {
    future: F,
    connection: Arc<Connection>,
    lanes: Arc<Lanes>,
    turn: Option<Turn>,
    /// Detects that the client leaves while its exchange waits for a turn.
    look: Look,
}

impl<F> Newcomer<F> {
    /// Wraps the exchange of `future`. It stops being a newcomer once its connection is settled.
    pub fn new(future: F, connection: Arc<Connection>, lanes: Arc<Lanes>) -> Self {
        Newcomer { future, connection, lanes, turn: None, look: Look::default() }
    }
}

impl<F: Future + Unpin> Future for Newcomer<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        if self.connection.is_settled() {
            self.turn = None;
            return Pin::new(&mut self.future).poll(cx);
        }
        let lane = self.lanes.here();
        let begin = Instant::now();
        if self.turn.is_none() {
            self.turn = lane.queue_newcomer(begin);
        }
        let Newcomer { turn: place, connection, look, .. } = &mut *self;
        if let Some(turn) = place {
            if turn.poll(cx).is_pending() {
                // If the client has left, the poll detects this, and needs no turn.
                let Some(socket) = connection.socket() else { return Poll::Pending };
                ready!(look.poll(cx, socket, Leaving::Broken));
            }
            *place = None;
        }
        let polled = Pin::new(&mut self.future).poll(cx);
        lane.took(Class::Newcomer, begin.elapsed());
        polled
    }
}

/// Hands out turns while exchanges wait. One round of the event loop passes between two calls, in which all ready tasks
/// run; its length is the lag.
async fn drive(lane: Arc<Lane>) {
    loop {
        let since = Instant::now();
        tokio::task::yield_now().await;
        match lane.round(since) {
            // Timers have a resolution of one millisecond. Much shorter pauses become a few rounds of the loop; longer
            // ones would keep the disk threads from the CPU although this worker does not need it.
            Some(pause) if pause < PAUSE_LEAST => {}
            Some(pause) => tokio::time::sleep(pause).await,
            None => return,
        }
    }
}

/// A class's share of the worker's time, and the number of turns for which it suffices.
struct Allowance {
    share: Share,
    each: Average,
    /// Of this round.
    turns: u32,
    time: Duration,
}

impl Allowance {
    fn new(terms: Terms) -> Self {
        Allowance { share: Share::new(terms), each: Average::default(), turns: 0, time: Duration::ZERO }
    }

    /// Whether the class may spend time; used when no exchange waits and no rounds are counted.
    fn has_credit(&mut self, now: Instant) -> bool {
        self.share.accrue(now);
        self.share.credit >= 0.0
    }

    /// Counts a turn that was handed out.
    fn granted(&mut self) {
        self.turns += 1;
    }

    /// Adds the time of a poll that used a turn; one turn can have several polls.
    fn took(&mut self, time: Duration) {
        self.time += time;
        self.share.spend(time);
    }

    /// Ends a round with this `lag`. Returns the number of turns in the next round.
    fn after_round(&mut self, lag: Duration, now: Instant) -> u32 {
        self.each.add(std::mem::take(&mut self.turns), std::mem::take(&mut self.time));
        self.share.after_round(lag, now);
        self.each.fit_into(self.share.credit)
    }
}

/// Average duration of a turn in seconds, over recent rounds with turns.
struct Average {
    seconds: f64,
    turns: f64,
}

impl Default for Average {
    fn default() -> Self {
        Average { seconds: 100e-6, turns: 1.0 }
    }
}

impl Average {
    fn add(&mut self, turns: u32, time: Duration) {
        if turns > 0 || !time.is_zero() {
            self.seconds += (time.as_secs_f64() - self.seconds) / 16.0;
            self.turns += (f64::from(turns) - self.turns) / 16.0;
        }
    }

    /// Number of turns that fit into this time; at least one, unless there is a debt.
    fn fit_into(&self, seconds: f64) -> u32 {
        if seconds < 0.0 { 0 } else { (seconds * self.turns / self.seconds.max(1e-6)) as u32 + 1 }
    }
}

/// The share of the worker's time that a class may use: it grows slowly while rounds are short, and shrinks after a
/// long one.
struct Share {
    terms: Terms,
    now: f64,
    /// Seconds that may be spent; negative after a turn that took longer.
    credit: f64,
    since: Option<Instant>,
}

impl Share {
    /// Maximum debt.
    const OWED_SECONDS: f64 = 0.005;
    /// The share doubles in about a tenth of a second of short rounds, and halves after fourteen long ones.
    const GROWTH_PER_SECOND: f64 = 7.0;
    const CUT: f64 = 0.95;

    fn new(terms: Terms) -> Self {
        let now = terms.most / 2.0;
        Share { now: now.max(terms.least), terms, credit: 0.0, since: None }
    }

    fn spend(&mut self, time: Duration) {
        self.credit = (self.credit - time.as_secs_f64()).max(-Self::OWED_SECONDS);
    }

    /// Adds credit for the time since the last call. Returns this time in seconds.
    fn accrue(&mut self, now: Instant) -> f64 {
        let passed = self.since.replace(now).map_or(0.0, |since| (now - since).as_secs_f64());
        self.credit = (self.credit + self.now * passed).min(self.terms.saved.as_secs_f64());
        passed
    }

    /// Ends a round with this `lag`.
    fn after_round(&mut self, lag: Duration, now: Instant) {
        let passed = self.accrue(now);
        if lag > LAG_AIM {
            self.now = (self.now * Self::CUT).max(self.terms.least);
        } else {
            let growth = 1.0 + Self::GROWTH_PER_SECOND * passed.min(0.01);
            self.now = (self.now * growth).min(self.terms.most);
        }
    }

    /// Pause before the next turn.
    fn pause(&self) -> Duration {
        if self.credit >= 0.0 {
            return Duration::ZERO;
        }
        let pause = Duration::from_secs_f64(-self.credit / self.now).min(PAUSE_MOST);
        pause.max(Duration::from_nanos(1))
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::Semaphore;

    use super::*;
    use crate::client::connection::tests::connection;
    use crate::metrics::LANE_CLASSES;

    const TURN_MAX: Duration = Duration::from_secs(10);

    fn lanes() -> Arc<Lanes> {
        Lanes::new(Metrics::new(0, Vec::new()), Backlog::new(&Arc::new(Semaphore::new(100)), 1), TURN_MAX)
    }

    fn lane() -> Arc<Lane> {
        lanes().here()
    }

    async fn turn(mut turn: Turn) {
        std::future::poll_fn(|cx| turn.poll(cx)).await;
    }

    /// The order in which exchanges that wait to spool get their turns.
    fn order(lane: &Lane, waiting: &[(char, Turn)], no_disk: bool) -> String {
        let whose =
            |slot: Arc<Slot>| waiting.iter().find(|(_, turn)| Arc::ptr_eq(&turn.slot, &slot)).map(|(who, _)| who);
        std::iter::from_fn(|| lane.lock().of(Class::Spool).next(no_disk)).filter_map(whose).collect()
    }

    fn waiting(lane: &Lane) -> i64 {
        lane.metrics.waiting.iter().map(|gauge| gauge.get()).sum()
    }

    #[tokio::test]
    async fn whoever_is_nearest_to_the_end_comes_first() {
        let lane = lane();
        let wait = |(who, missing, disk)| (who, lane.queue(Class::Spool, missing, disk));
        let waiting = [('d', u64::MAX, false), ('c', 300, true), ('a', 100, true), ('b', 200, false)].map(wait);
        assert_eq!(order(&lane, &waiting, false), "abcd");
    }

    #[tokio::test]
    async fn nobody_starves() {
        let lane = lane();
        let patient = lane.queue(Class::Pass, u64::MAX, false);
        let stream = async {
            loop {
                turn(lane.queue(Class::Pass, 1, true)).await;
            }
        };
        tokio::select! {
            () = turn(patient) => {}
            () = stream => unreachable!("it never ends"),
        }
    }

    #[tokio::test]
    async fn whoever_leaves_the_queue_is_not_waited_for() {
        let lane = lane();
        let gone = lane.queue(Class::Spool, 1, true);
        let stays = lane.queue(Class::Spool, 2, false);
        assert_eq!(waiting(&lane), 2);
        drop(gone);
        turn(stays).await;
        assert_eq!(waiting(&lane), 0);
    }

    #[tokio::test]
    async fn whoever_needs_the_disk_threads_waits_while_they_have_enough_to_do() {
        let slots = Arc::new(Semaphore::new(100));
        let lane = Lanes::new(Metrics::new(0, Vec::new()), Backlog::new(&slots, 1), TURN_MAX).here();
        let jobs = slots.try_acquire_many(50).expect("permits");
        let wait = |(who, missing, disk)| (who, lane.queue(Class::Spool, missing, disk));
        let places = [('a', 100, true), ('b', 200, false)].map(wait);
        assert_eq!(order(&lane, &places, true), "b");
        let [(_, a), _] = places;
        for _ in 0..10 {
            assert_eq!(lane.round(Instant::now()), Some(DISK_PAUSE));
        }
        assert!(!a.slot.granted.load(Ordering::Relaxed));
        drop(jobs);
        turn(a).await;
        // A disk that never responds is not waited for here.
        let _jobs = slots.try_acquire_many(50).expect("permits");
        let (_, c) = wait(('c', 300, true));
        assert_eq!(lane.round(Instant::now()), Some(DISK_PAUSE));
        lane.lock().deep = Instant::now().checked_sub(DISK_PAUSES_MOST);
        turn(c).await;
    }

    #[tokio::test]
    async fn a_turn_that_does_not_come_is_given_in_the_end_and_no_other_before_it() {
        let slots = Arc::new(Semaphore::new(100));
        let lane = Lanes::new(Metrics::new(0, Vec::new()), Backlog::new(&slots, 1), TURN_MAX).here();
        let _jobs = slots.try_acquire_many(50).expect("permits");
        lane.lock().driven = true;
        let [old, new] = [300, 100].map(|missing| lane.queue(Class::Spool, missing, true));
        let now = Instant::now();
        {
            let mut queues = lane.lock();
            assert!(!queues.is_to_look(now), "the first look is a while after the first turn");
            assert!(queues.of(Class::Spool).overdue(TURN_MAX, now + TURN_MAX / 2).is_empty());
            let (key, slot) = queues.of(Class::Spool).queues[1].pop_last().expect("the older one");
            let since = now.checked_sub(TURN_MAX).expect("the machine has been up for as long");
            let aged = Arc::new(Slot { since, granted: AtomicBool::new(false), waker: AtomicWaker::new() });
            queues.of(Class::Spool).queues[1].insert(key, aged);
            drop(slot);
            queues.looked = now.checked_sub(TURN_LOOK);
        }
        let overdue = || [0, 1, 2].map(|class| lane.metrics.overdue[class].get());
        assert_eq!(overdue(), [0, 0, 0]);
        assert_eq!(lane.round(now), Some(DISK_PAUSE), "the disk threads have enough to do");
        assert_eq!(overdue(), [0, 0, 1]);
        lane.lock().looked = None;
        lane.round(now);
        assert_eq!((overdue()[2], waiting(&lane)), (1, 1), "it has its turn, and the other waits on");
        assert!(!new.slot.granted.load(Ordering::Relaxed));
        drop((old, new));
    }

    #[tokio::test]
    async fn a_class_has_its_own_time() {
        let lane = lane();
        lane.took(Class::Spool, Duration::from_secs(1));
        let _spools = lane.queue(Class::Spool, 1, false);
        turn(lane.queue(Class::Pass, u64::MAX, false)).await;
        assert_eq!(lane.metrics.waiting[Class::Spool as usize].get(), 1);
    }

    #[test]
    fn the_classes_are_those_of_the_metrics() {
        assert_eq!(Class::ALL.map(|class| format!("{class:?}").to_lowercase()), LANE_CLASSES);
        assert_eq!(Class::ALL.map(|class| class as usize), [0, 1, 2]);
    }

    #[test]
    fn a_few_pass_without_turns_and_a_crowd_does_not() {
        let lane = lane();
        let mut few: Vec<_> = (0..FREE_PASSES).map(|_| lane.enter()).collect();
        assert!(!lane.is_crowded());
        few.push(lane.enter());
        assert!(lane.is_crowded());
        few.clear();
        assert!(!lane.is_crowded());
    }

    #[tokio::test]
    async fn a_few_newcomers_go_on_at_once_and_a_crowd_in_the_order_in_which_it_came() {
        let lane = lane();
        let now = Instant::now();
        assert!(lane.queue_newcomer(now).is_none());
        lane.took(Class::Newcomer, Duration::from_millis(1));
        let order = Mutex::new(Vec::new());
        let crowd = (0..100).map(|number| {
            let place = lane.queue_newcomer(now).expect("a place in the queue");
            let order = &order;
            async move {
                turn(place).await;
                order.lock().expect("no panic").push(number);
            }
        });
        futures::future::join_all(crowd).await;
        assert_eq!(order.into_inner().expect("no panic"), (0..100).collect::<Vec<_>>());
        assert_eq!(waiting(&lane), 0);
        assert!(lane.queue_newcomer(Instant::now() + ARRIVAL).is_none(), "nobody waits any more");
    }

    #[test]
    fn while_a_crowd_arrives_fewer_pass_without_turns() {
        let lane = lane();
        let _few: Vec<_> = (0..=FREE_PASSES_IN_ARRIVAL).map(|_| lane.enter()).collect();
        assert!(!lane.is_crowded());
        lane.lock().arrival = Some(Instant::now());
        assert!(lane.is_crowded());
        lane.lock().arrival = Instant::now().checked_sub(ARRIVAL);
        assert!(!lane.is_crowded());
    }

    #[tokio::test]
    async fn a_newcomer_waits_until_there_is_time_and_once_settled_no_more() {
        let lanes = lanes();
        let lane = lanes.here();
        let connection = connection("");
        let mut polls = 0;
        let future = std::future::poll_fn(|_| {
            polls += 1;
            if polls == 3 { Poll::Ready(()) } else { Poll::Pending }
        });
        let mut newcomer = Newcomer::new(future, connection.clone(), lanes);
        let mut poll = || Pin::new(&mut newcomer).poll(&mut Context::from_waker(std::task::Waker::noop()));
        assert!(poll().is_pending());
        assert_eq!(waiting(&lane), 0, "there was time");
        lane.took(Class::Newcomer, Duration::from_secs(1));
        lane.lock().of(Class::Newcomer).time.share.now = 0.0;
        assert!(poll().is_pending());
        assert_eq!(waiting(&lane), 1);
        connection.settle();
        assert!(poll().is_pending());
        assert_eq!(waiting(&lane), 0, "it has left the queue");
        assert!(poll().is_ready());
        assert_eq!(polls, 3);
    }

    #[tokio::test]
    async fn few_connections_are_taken_at_a_time() {
        let door = Door(crate::client::descriptors::tests::doorway(i32::MAX));
        let taken = AtomicUsize::new(0);
        let accept = async {
            loop {
                // A listener's socket consumes budget for each connection in this way.
                tokio::task::coop::consume_budget().await;
                door.should_accept(None).await;
                taken.fetch_add(1, Ordering::Relaxed);
            }
        };
        let mut accept = std::pin::pin!(accept);
        std::future::poll_fn(|cx| Poll::Ready(accept.as_mut().poll(cx).is_pending())).await;
        assert_eq!(taken.load(Ordering::Relaxed), ACCEPTS_MOST);
    }

    #[tokio::test]
    async fn a_poll_that_ends_for_lack_of_budget_is_followed_by_another() {
        let mut polls = 0;
        let future = std::future::poll_fn(|cx| {
            polls += 1;
            if polls == 1 {
                assert!(!ends_for_lack_of_budget(cx));
                exhaust_budget(cx);
            }
            if ends_for_lack_of_budget(cx) { Poll::Pending } else { Poll::Ready(()) }
        });
        tokio::time::timeout(Duration::from_secs(10), future).await.expect("it was woken");
        assert_eq!(polls, 2);
    }

    #[tokio::test]
    async fn a_task_without_a_budget_goes_on() {
        tokio::task::unconstrained(std::future::poll_fn(|cx| {
            exhaust_budget(cx);
            Poll::Ready(())
        }))
        .await;
    }

    #[test]
    fn the_share_grows_while_rounds_are_short_and_falls_when_they_are_long() {
        let begin = Instant::now();
        let mut share = Share { now: 0.2, ..Share::new(PASS) };
        let after = |share: &mut Share, round: u32, lag| {
            share.after_round(lag, begin + round * Duration::from_millis(1));
            share.now
        };
        let first = after(&mut share, 0, Duration::ZERO);
        let grown = (1..200).map(|round| after(&mut share, round, LAG_AIM / 2)).last().expect("rounds");
        assert!(grown > 3.0 * first, "{first} {grown}");
        let late = (200..215).map(|round| after(&mut share, round, 2 * LAG_AIM)).last().expect("rounds");
        assert!(late < grown / 2.0, "{grown} {late}");
        let least = (215..1_000).map(|round| after(&mut share, round, 2 * LAG_AIM)).last().expect("rounds");
        assert_eq!(least, PASS.least);
        let mut spool = Share::new(SPOOL);
        let most = (1_000..2_000).map(|round| after(&mut spool, round, Duration::ZERO)).last().expect("rounds");
        assert_eq!(most, SPOOL.most);
    }

    #[test]
    fn a_turn_that_took_long_is_followed_by_a_pause() {
        let mut time = Allowance::new(PASS);
        let now = Instant::now();
        assert!(time.after_round(Duration::ZERO, now) > 0);
        time.took(Duration::from_millis(2));
        assert_eq!(time.after_round(Duration::ZERO, now), 0);
        let pause = time.share.pause();
        assert!((pause.as_secs_f64() - 0.004).abs() < 1e-6, "{pause:?}");
        time.took(Duration::from_secs(10));
        time.after_round(2 * LAG_AIM, now);
        assert_eq!(time.share.pause(), Duration::from_secs_f64(Share::OWED_SECONDS / time.share.now));
        assert!(time.after_round(Duration::ZERO, now + Duration::from_secs(1)) > 0, "debts are paid in the end");
    }

    #[test]
    fn the_shorter_the_turns_the_more_there_are_in_a_round() {
        let mut each = Average { seconds: 100e-6, turns: 1.0 };
        assert_eq!([-1.0, 0.0, 50e-6, 450e-6].map(|seconds| each.fit_into(seconds)), [0, 1, 1, 5]);
        // Several polls per turn.
        (0..100).for_each(|round| each.add(u32::from(round % 2 == 0), Duration::from_micros(100)));
        assert_eq!(each.fit_into(450e-6), 3);
        (0..100).for_each(|_| each.add(0, Duration::ZERO));
        assert_eq!(each.fit_into(450e-6), 3, "nothing is learnt where nothing happens");
    }
}
