//! The paced lane: bulk takes turns, so that it never hurts the latency of what is small.
//!
//! Without it, a thousand large answers that arrive at once are a thousand times some milliseconds of copying before
//! the next small request has its turn. So once a crowd of exchanges moves much, each asks its worker's lane for a
//! turn, in two classes: what *passes*, straight to a client that takes it or from one that sends, and what is
//! *spooled*, answers for which nobody waits. Turns are paid for in the time that they take, and each class has a share
//! of the worker's time that grows while the rounds of the event loop are short and is cut back when one is long: so
//! what passes has all the time that nobody else wants, what is spooled at most a part of it, and a round is short.
//!
//! In both classes whoever is nearest to the end comes first, so that most backends are released soonest; every eighth
//! turn goes to whoever has waited longest, so that nobody starves. While the disk threads have enough to do, whoever
//! needs them has no turn: what they have not written yet would wait in memory.
//!
//! A crowd that arrives at once is no bulk yet, but a thousand connections that each begin an exchange are in one round
//! what bulk may never be: everybody else waits until the last of them has parsed its header and called its endpoint.
//! So a round takes few connections from the kernel ([`Door`]), and what is done for newcomers ([`Newcomer`]), up to
//! the first byte of their first answer, is a class of its own: who has been served before waits for few of them.
//!
//! # What was tried
//!
//! - A rate in bytes instead of time: the cost of a byte varies tenfold with the memory that it lands in.
//! - Charging the first poll of a turn alone: rounds took 2 ms where half a millisecond was meant. All polls of an
//!   exchange count until it waits again.
//! - One queue for both classes: slow clients held up the fast ones.
//! - More than 0.3 of a worker for what is spooled: small requests felt the disk threads and the endpoints that it
//!   keeps busy.
//! - As much time for new connections as for all others together, or a fixed time in every round: they cause more than
//!   they cost, and a fast client's p99 was three times as high.

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
use super::spool::disk::Backlog;
use crate::eventloop::worker;
use crate::metrics::{LaneMetrics, Metrics};

/// A round of the event loop should not take longer while the lane works.
const LAG_AIM: Duration = Duration::from_millis(1);
/// Of so many turns one goes to whoever has waited longest.
const FAIR_EVERY: u64 = 8;
/// So many exchanges may pass at a time without turns: a round of the event loop is short enough with them.
const FREE_PASSES: usize = 24;
/// The same shortly after newcomers had to wait: they are about to pass much, too.
const FREE_PASSES_IN_ARRIVAL: usize = 4;
const ARRIVAL: Duration = Duration::from_millis(100);

/// What a class may have of the worker's time.
struct Terms {
    /// It shall not starve where others keep the worker busy.
    least: f64,
    most: f64,
    /// What it did not use is not saved beyond this, so that what it pays for makes no long round.
    saved: Duration,
}
const NEWCOMERS: Terms = Terms { least: 0.5, most: 1.0, saved: Duration::from_micros(250) };
const PASS: Terms = Terms { least: 0.1, most: 1.0, saved: Duration::from_micros(500) };
/// Nobody waits for it, and the disk threads and the endpoints are busy with it, too.
const SPOOL: Terms = Terms { least: 0.1, most: 0.3, saved: Duration::from_micros(250) };

/// The shortest pause between two turns in which the worker sleeps, and the longest while somebody waits.
const PAUSE_LEAST: Duration = Duration::from_micros(200);
const PAUSE_MOST: Duration = Duration::from_millis(20);
/// The pause while all that there is to do needs the disk threads, and they are busy; and for how long they are waited
/// for here: then each exchange waits for itself, and has a deadline.
const DISK_PAUSE: Duration = Duration::from_millis(1);
const DISK_PAUSES_MOST: Duration = Duration::from_secs(1);
/// Overdue turns are looked for at intervals, since each look visits all that wait.
const TURN_LOOK: Duration = Duration::from_millis(250);

/// So many connections are taken in one round.
const ACCEPTS_MOST: usize = 4;
/// With so many operations a task may go on in one poll (tokio's cooperative scheduling).
pub const OPERATIONS_PER_POLL: usize = 128;

/// What a turn is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// To be polled at all: the first exchange of a connection, until its answer comes.
    Newcomer,
    /// To move what a client waits for: an answer that it takes, one that is held until it is whole, an upload.
    Pass,
    /// To hold an answer for a client that does not take it.
    Spool,
}

impl Class {
    /// All of them, each at its place, in the order of `LANE_CLASSES`.
    pub const ALL: [Class; 3] = [Class::Newcomer, Class::Pass, Class::Spool];
}

/// The lanes of one gateway: one for each worker, made when the worker first needs it.
pub struct Lanes {
    metrics: Metrics,
    backlog: Backlog,
    /// A turn that has not come by then is given whatever it costs: turns decide who is first, and no exchange may fail
    /// for one.
    turn_max: Duration,
    /// Counts those of threads that are no workers, as in tests.
    made: AtomicUsize,
}

thread_local! {
    /// The lane of this worker, and whose lane it is: a test may run several gateways in one process.
    static HERE: RefCell<Option<(Arc<Lanes>, Arc<Lane>)>> = const { RefCell::new(None) };
}

impl Lanes {
    /// No lane yet. Whoever needs the disk threads waits while their backlog is deep. A turn that has not come after
    /// `turn_max` is given.
    pub fn new(metrics: Metrics, backlog: Backlog, turn_max: Duration) -> Arc<Self> {
        Arc::new(Lanes { metrics, backlog, turn_max, made: AtomicUsize::new(0) })
    }

    /// The lane of the worker that asks.
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

/// Takes few connections in one round of the event loop, and none while open files are short: the kernel keeps the
/// others meanwhile.
///
/// Pingora would take 128, for that is how many operations tokio lets a task go on with in one poll. So each is made to
/// count for more than one.
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

/// Takes so many units of the task's budget; less if there are no more.
pub fn spend_budget(cx: &mut Context<'_>, units: usize) {
    for _ in 0..units {
        match poll_proceed(cx) {
            Poll::Ready(unit) => unit.made_progress(),
            Poll::Pending => return,
        }
    }
}

/// Takes all that is left of the task's budget, if it has one: nothing else goes on in this poll.
pub fn exhaust_budget(cx: &mut Context<'_>) {
    for _ in 0..OPERATIONS_PER_POLL {
        if !has_budget_remaining() {
            return;
        }
        spend_budget(cx, 1);
    }
}

/// Whether the task is to go on in another poll, which it is woken for: it has no budget left.
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
    /// Exchanges that move much.
    bulk: AtomicUsize,
    backlog: Backlog,
    turn_max: Duration,
    metrics: LaneMetrics,
}

struct Queues {
    /// By class.
    tracks: [Track; 3],
    /// When newcomers last had to wait.
    arrival: Option<Instant>,
    /// Since when the disk threads have had enough to do.
    deep: Option<Instant>,
    /// When it was last looked who is overdue.
    looked: Option<Instant>,
    /// Whether a task hands out turns; it ends when nobody waits.
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
    /// Whether a crowd has just come, or still does.
    fn sees_arrival(&self, now: Instant) -> bool {
        self.arrival.is_some_and(|last| now.saturating_duration_since(last) < ARRIVAL)
    }

    /// Whether nobody who needs the disk threads is to have a turn.
    fn waits_for_disk(&mut self, deep: bool, now: Instant) -> bool {
        self.deep = self.deep.filter(|_| deep).or(deep.then_some(now));
        self.deep.is_some_and(|since| now.saturating_duration_since(since) < DISK_PAUSES_MOST)
    }

    /// Whether it is time to look who is overdue.
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

/// Those who wait in one class, and what it may use.
struct Track {
    /// Those who can do without the disk threads, and those who cannot.
    queues: [Queue; 2],
    tickets: u64,
    granted: u64,
    time: Allowance,
}

/// By the bytes that are missing, then by age.
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

    /// Whose turn it is.
    fn next(&mut self, no_disk: bool) -> Option<Arc<Slot>> {
        let open = if no_disk { &self.queues[..1] } else { &self.queues[..] };
        let first = open.iter().filter_map(|queue| queue.first_key_value()).map(|(key, _)| *key).min()?;
        self.granted += 1;
        let oldest = || open.iter().flat_map(|queue| queue.keys()).min_by_key(|(_, ticket)| *ticket).copied();
        let key = if self.granted.is_multiple_of(FAIR_EVERY) { oldest()? } else { first };
        self.remove(key)
    }

    /// Those who have waited for so long, wherever they stand.
    fn overdue(&mut self, turn_max: Duration, now: Instant) -> Vec<Arc<Slot>> {
        let late = |slot: &Slot| now.saturating_duration_since(slot.since) >= turn_max;
        let queues = self.queues.iter_mut();
        queues.flat_map(|queue| queue.extract_if(.., |_, slot| late(slot)).map(|(_, slot)| slot)).collect()
    }

    /// How long there will be no turn; `None` if nobody waits for one.
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

/// A place in a queue. Dropping it gives the place up.
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

    /// Counts an exchange among those that move much.
    pub fn enter(self: &Arc<Self>) -> Bulk {
        self.bulk.fetch_add(1, Ordering::Relaxed);
        Bulk(self.clone())
    }

    /// Whether so many move much that they are to take turns.
    pub fn is_crowded(&self) -> bool {
        let bulk = self.bulk.load(Ordering::Relaxed);
        bulk > FREE_PASSES || (bulk > FREE_PASSES_IN_ARRIVAL && self.lock().sees_arrival(Instant::now()))
    }

    /// A place in the queue of newcomers, if they are to take turns just now.
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

    /// Queues for a turn. `missing` is how many bytes are still to come, `u64::MAX` if nobody knows; `disk` whether
    /// they need the disk threads.
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

    /// Says that so many bytes were spooled.
    pub fn spooled(&self, bytes: u64) {
        self.metrics.bytes.inc_by(bytes);
    }

    /// Says how long a poll took that a turn was for.
    pub fn took(&self, class: Class, time: Duration) {
        self.lock().of(class).time.took(time);
    }

    /// A round of the event loop is over: hands out the turns that are due. Says for how long there is nothing to do,
    /// or `None` if nobody waits, and then nobody drives the lane any more.
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
            // Nobody sees whether the disk threads go on.
            queues.deep = None;
            queues.looked = None;
        }
        pause
    }

    fn lock(&self) -> MutexGuard<'_, Queues> {
        // One worker uses it; the lock is there because a task could move to another one, and is never waited for.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An exchange that moves much, until this is dropped.
pub struct Bulk(Arc<Lane>);

impl Bulk {
    /// Whether there are so many that they are to take turns.
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
    /// What it is for.
    pub fn class(&self) -> Class {
        self.class
    }

    /// Ready when it is one's turn.
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
    /// Sees its client leave while it waits for its turn.
    look: Look,
}

impl<F> Newcomer<F> {
    /// That which `future` runs. It is none any more once its connection is settled.
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
                // For one whose client has left there is nothing to do but to find that out.
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

/// Hands out turns while somebody waits. One round of the event loop passes between two of them, in which whatever is
/// ready runs: how long it takes is the lag.
async fn drive(lane: Arc<Lane>) {
    loop {
        let since = Instant::now();
        tokio::task::yield_now().await;
        match lane.round(since) {
            // Timers count whole milliseconds. What is much shorter is a few rounds of the loop; longer ones would keep
            // the disk threads from a CPU that this worker has no use for.
            Some(pause) if pause < PAUSE_LEAST => {}
            Some(pause) => tokio::time::sleep(pause).await,
            None => return,
        }
    }
}

/// What a class may have of the worker's time, and for how many turns that is enough.
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

    /// Whether there is anything to spend, where nobody waits and nobody counts rounds.
    fn has_credit(&mut self, now: Instant) -> bool {
        self.share.accrue(now);
        self.share.credit >= 0.0
    }

    /// A turn was handed out.
    fn granted(&mut self) {
        self.turns += 1;
    }

    /// Says how long a poll took that a turn was for; there may be several for one.
    fn took(&mut self, time: Duration) {
        self.time += time;
        self.share.spend(time);
    }

    /// A round took `lag`: how many turns there are in the next.
    fn after_round(&mut self, lag: Duration, now: Instant) -> u32 {
        self.each.add(std::mem::take(&mut self.turns), std::mem::take(&mut self.time));
        self.share.after_round(lag, now);
        self.each.fit_into(self.share.credit)
    }
}

/// Seconds that a turn takes, on average over the last rounds in which there were any.
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

    /// How many turns fit into so many seconds; one always does, if nothing is owed.
    fn fit_into(&self, seconds: f64) -> u32 {
        if seconds < 0.0 { 0 } else { (seconds * self.turns / self.seconds.max(1e-6)) as u32 + 1 }
    }
}

/// The share of the worker's time that a class may use: more by a little while rounds are short, less by much when one
/// is long.
struct Share {
    terms: Terms,
    now: f64,
    /// Seconds that may be spent; below zero after a turn that took longer.
    credit: f64,
    since: Option<Instant>,
}

impl Share {
    /// A debt beyond this is forgiven.
    const OWED_SECONDS: f64 = 0.005;
    /// The share doubles in about a tenth of a second of short rounds, and is halved by fourteen long ones.
    const GROWTH_PER_SECOND: f64 = 7.0;
    const CUT: f64 = 0.95;

    fn new(terms: Terms) -> Self {
        let now = terms.most / 2.0;
        Share { now: now.max(terms.least), terms, credit: 0.0, since: None }
    }

    fn spend(&mut self, time: Duration) {
        self.credit = (self.credit - time.as_secs_f64()).max(-Self::OWED_SECONDS);
    }

    /// Gives credit for the time since it was last asked. Says how many seconds that are.
    fn accrue(&mut self, now: Instant) -> f64 {
        let passed = self.since.replace(now).map_or(0.0, |since| (now - since).as_secs_f64());
        self.credit = (self.credit + self.now * passed).min(self.terms.saved.as_secs_f64());
        passed
    }

    /// A round took `lag`.
    fn after_round(&mut self, lag: Duration, now: Instant) {
        let passed = self.accrue(now);
        if lag > LAG_AIM {
            self.now = (self.now * Self::CUT).max(self.terms.least);
        } else {
            let growth = 1.0 + Self::GROWTH_PER_SECOND * passed.min(0.01);
            self.now = (self.now * growth).min(self.terms.most);
        }
    }

    /// How long to pause before the next turn.
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

    /// In which order those who wait to spool have their turns.
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
        // A disk that does not come back is not waited for here.
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
                // As a listener's socket counts each.
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
        // Of several polls for one turn.
        (0..100).for_each(|round| each.add(u32::from(round % 2 == 0), Duration::from_micros(100)));
        assert_eq!(each.fit_into(450e-6), 3);
        (0..100).for_each(|_| each.add(0, Duration::ZERO));
        assert_eq!(each.fit_into(450e-6), 3, "nothing is learnt where nothing happens");
    }
}
