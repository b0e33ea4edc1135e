//! The paced lane: bulk takes turns, so that it never hurts the latency of what is small.
//!
//! Without it, a thousand large answers that arrive at once are a thousand times some milliseconds of copying before the
//! next small request has its turn. So once a crowd of exchanges moves much, each asks its worker's lane for a turn, in two
//! classes: what *passes* straight to a client that takes it, and what is *spooled*, for which nobody waits. Turns are paid
//! for in the time that they take, and the lane has a share of the worker's time that grows while the rounds of the event
//! loop are short and is cut back when one is long: so bulk has all the time that nobody else wants, and little else.
//!
//! In both classes whoever is nearest to the end comes first, so that most backends are released soonest; every eighth
//! turn goes to whoever has waited longest, so that nobody starves.
//!
//! A crowd that arrives at once is no bulk yet, but a thousand connections that each begin an exchange are in one round what
//! bulk may never be: everybody else waits until the last of them has parsed its header and called its endpoint. So a round
//! takes few connections from the kernel ([`Door`]), and what is done for newcomers ([`Newcomer`]), up to the first byte
//! of their first answer, has a share of its own: who has been served before waits for few of them.

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

use super::connection::Connection;
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
/// So many turns to pass, then one to spool.
const PASSES_PER_SPOOL: u32 = 3;
/// The least share of the worker's time of bulk, and of newcomers: these shall not starve where others keep the worker busy.
const BULK_LEAST: f64 = 0.1;
const NEWCOMERS_LEAST: f64 = 0.5;
/// The shortest pause between two turns in which the worker sleeps, and the longest while somebody waits.
const PAUSE_LEAST: Duration = Duration::from_micros(200);
const PAUSE_MOST: Duration = Duration::from_millis(20);

/// So many connections are taken in one round.
const ACCEPTS_MOST: usize = 4;
/// With so many operations a task may go on in one poll (tokio's cooperative scheduling).
pub const OPERATIONS_PER_POLL: usize = 128;

/// What a turn is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// To be polled at all: the first exchange of a connection, until its answer comes.
    Newcomer,
    /// To go straight to a client that takes it.
    Pass,
    /// To be held for a client that does not.
    Spool,
}

/// The lanes of one gateway: one for each worker, made when the worker first needs it.
pub struct Lanes {
    metrics: Metrics,
    /// Counts those of threads that are no workers, as in tests.
    made: AtomicUsize,
}

thread_local! {
    /// The lane of this worker, and whose lane it is: a test may run several gateways in one process.
    static HERE: RefCell<Option<(Arc<Lanes>, Arc<Lane>)>> = const { RefCell::new(None) };
}

impl Lanes {
    /// No lane yet.
    pub fn new(metrics: Metrics) -> Arc<Self> {
        Arc::new(Lanes { metrics, made: AtomicUsize::new(0) })
    }

    /// The lane of the worker that asks.
    pub fn here(self: &Arc<Self>) -> Arc<Lane> {
        HERE.with_borrow_mut(|here| match here {
            Some((whose, lane)) if Arc::ptr_eq(whose, self) => lane.clone(),
            _ => {
                let number = worker::here().map(|worker| worker.index);
                let number = number.unwrap_or_else(|| self.made.fetch_add(1, Ordering::Relaxed));
                let lane = Arc::new(Lane::new(self.metrics.lane(number)));
                *here = Some((self.clone(), lane.clone()));
                lane
            }
        })
    }
}

/// Takes few connections in one round of the event loop: the kernel keeps the others meanwhile.
///
/// Pingora would take 128, for that is how many operations tokio lets a task go on with in one poll. So each is made to count
/// for more than one.
#[derive(Debug)]
pub struct Door;

#[async_trait]
impl ConnectionFilter for Door {
    async fn should_accept(&self, _: Option<&SocketAddr>) -> bool {
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
        match tokio::task::coop::poll_proceed(cx) {
            Poll::Ready(unit) => unit.made_progress(),
            Poll::Pending => return,
        }
    }
}

/// The queues of one worker.
pub struct Lane {
    queues: Mutex<Queues>,
    /// Exchanges that move much.
    bulk: AtomicUsize,
    metrics: LaneMetrics,
}

struct Queues {
    pass: Queue,
    spool: Queue,
    /// Of the worker, for both of these.
    bulk_time: Allowance,
    /// Turns to pass since the last one to spool.
    passed: u32,
    newcomers: Queue,
    newcomers_time: Allowance,
    /// When newcomers last had to wait.
    arrival: Option<Instant>,
    /// Whether a task hands out turns; it ends when nobody waits.
    driven: bool,
}

impl Default for Queues {
    fn default() -> Self {
        Queues {
            pass: Queue::default(),
            spool: Queue::default(),
            bulk_time: Allowance::new(BULK_LEAST),
            passed: 0,
            newcomers: Queue::default(),
            newcomers_time: Allowance::new(NEWCOMERS_LEAST),
            arrival: None,
            driven: false,
        }
    }
}

impl Queues {
    /// Whether a crowd has just come, or still does.
    fn sees_arrival(&self, now: Instant) -> bool {
        self.arrival.is_some_and(|last| now.saturating_duration_since(last) < ARRIVAL)
    }

    fn of(&mut self, class: Class) -> &mut Queue {
        match class {
            Class::Newcomer => &mut self.newcomers,
            Class::Pass => &mut self.pass,
            Class::Spool => &mut self.spool,
        }
    }

    fn is_empty(&self) -> bool {
        [&self.newcomers, &self.pass, &self.spool].iter().all(|queue| queue.waiting.is_empty())
    }

    /// Whose turn it is: mostly somebody's whose client is waiting.
    fn next(&mut self) -> Option<Arc<Slot>> {
        let spool = self.passed >= PASSES_PER_SPOOL;
        let [first, second] = if spool { [Class::Spool, Class::Pass] } else { [Class::Pass, Class::Spool] };
        let (class, slot) = match self.of(first).next() {
            Some(slot) => (first, slot),
            None => (second, self.of(second).next()?),
        };
        self.passed = if class == Class::Pass { self.passed + 1 } else { 0 };
        Some(slot)
    }
}

#[derive(Default)]
struct Queue {
    /// By the bytes that are missing, then by age.
    waiting: BTreeMap<(u64, u64), Arc<Slot>>,
    tickets: u64,
    granted: u64,
}

impl Queue {
    fn next(&mut self) -> Option<Arc<Slot>> {
        let first = *self.waiting.first_key_value()?.0;
        self.granted += 1;
        let oldest = || self.waiting.keys().min_by_key(|(_, ticket)| *ticket).copied();
        let key = if self.granted.is_multiple_of(FAIR_EVERY) { oldest()? } else { first };
        self.waiting.remove(&key)
    }
}

#[derive(Default)]
struct Slot {
    granted: AtomicBool,
    waker: AtomicWaker,
}

/// A place in a queue. Dropping it gives the place up.
pub struct Turn {
    lane: Arc<Lane>,
    class: Class,
    key: (u64, u64),
    slot: Arc<Slot>,
}

impl Lane {
    fn new(metrics: LaneMetrics) -> Self {
        Lane { queues: Mutex::default(), bulk: AtomicUsize::new(0), metrics }
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
            if queues.newcomers.waiting.is_empty() && queues.newcomers_time.has_credit(now) {
                return None;
            }
            queues.arrival = Some(now);
        }
        Some(self.queue(Class::Newcomer, 0))
    }

    /// Queues for a turn. `missing` is how many bytes are still to come, `u64::MAX` if nobody knows.
    pub fn queue(self: &Arc<Self>, class: Class, missing: u64) -> Turn {
        let mut queues = self.lock();
        let queue = queues.of(class);
        let key = (missing, queue.tickets);
        queue.tickets += 1;
        let slot = Arc::new(Slot::default());
        queue.waiting.insert(key, slot.clone());
        self.metrics.waiting.inc();
        if !std::mem::replace(&mut queues.driven, true) {
            tokio::spawn(drive(self.clone()));
        }
        Turn { lane: self.clone(), class, key, slot }
    }

    /// Says that so many bytes were spooled.
    pub fn spooled(&self, bytes: u64) {
        self.metrics.bytes.inc_by(bytes);
    }

    /// Says how long the poll took that a turn was for.
    pub fn took(&self, time: Duration) {
        self.lock().bulk_time.took(time);
    }

    /// A round of the event loop is over: hands out the next turn if it is due. Says for how long there is nothing to do, or
    /// `None` if nobody waits, and then nobody drives the lane any more.
    fn round(&self, since: Instant) -> Option<Duration> {
        let now = Instant::now();
        let lag = now - since;
        let mut queues = self.lock();
        for _ in 0..queues.bulk_time.after_round(lag, now) {
            let Some(slot) = queues.next() else { break };
            self.grant(&slot);
        }
        for _ in 0..queues.newcomers_time.after_round(lag, now) {
            let Some(slot) = queues.newcomers.next() else { break };
            self.grant(&slot);
        }
        self.metrics.share.set(queues.bulk_time.share.now);
        queues.driven = !queues.is_empty();
        let bulk = !(queues.pass.waiting.is_empty() && queues.spool.waiting.is_empty());
        let newcomers = !queues.newcomers.waiting.is_empty();
        let pauses = [(bulk, &queues.bulk_time), (newcomers, &queues.newcomers_time)];
        pauses.into_iter().filter(|(waited_for, _)| *waited_for).map(|(_, time)| time.share.pause()).min()
    }

    fn grant(&self, slot: &Slot) {
        self.metrics.waiting.dec();
        slot.granted.store(true, Ordering::Release);
        slot.waker.wake();
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
        if !self.slot.granted.load(Ordering::Acquire)
            && self.lane.lock().of(self.class).waiting.remove(&self.key).is_some()
        {
            self.lane.metrics.waiting.dec();
        }
    }
}

/// The first exchange of a connection, polled when there is time for newcomers.
pub struct Newcomer<F> {
    future: F,
    connection: Arc<Connection>,
    lanes: Arc<Lanes>,
    turn: Option<Turn>,
}

impl<F> Newcomer<F> {
    /// That which `future` runs. It is none any more once its connection is settled.
    pub fn new(future: F, connection: Arc<Connection>, lanes: Arc<Lanes>) -> Self {
        Newcomer { future, connection, lanes, turn: None }
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
        if let Some(turn) = &mut self.turn {
            ready!(turn.poll(cx));
            self.turn = None;
        }
        let polled = Pin::new(&mut self.future).poll(cx);
        lane.lock().newcomers_time.took(begin.elapsed());
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
            // Timers count whole milliseconds. What is much shorter is a few rounds of the loop; longer ones would keep the disk
            // threads from a CPU that this worker has no use for.
            Some(pause) if pause < PAUSE_LEAST => {}
            Some(pause) => tokio::time::sleep(pause).await,
            None => return,
        }
    }
}

/// What the exchanges of a class may have of the worker's time, and for how many turns that is enough.
struct Allowance {
    share: Share,
    each: Average,
}

impl Allowance {
    /// One that is never left with less than this share.
    fn new(least: f64) -> Self {
        Allowance { share: Share::new(least), each: Average::default() }
    }

    /// Whether there is anything to spend, where nobody waits and nobody counts rounds.
    fn has_credit(&mut self, now: Instant) -> bool {
        self.share.accrue(now);
        self.share.credit >= 0.0
    }

    /// Says how long the poll took that a turn was for.
    fn took(&mut self, time: Duration) {
        self.each.add(time);
        self.share.spend(time);
    }

    /// A round took `lag`: how many turns there are in the next.
    fn after_round(&mut self, lag: Duration, now: Instant) -> u32 {
        self.share.after_round(lag, now);
        self.each.fit_into(self.share.credit)
    }
}

/// Seconds that a poll takes, on average over the last ones.
struct Average(f64);

impl Default for Average {
    fn default() -> Self {
        Average(50e-6)
    }
}

impl Average {
    fn add(&mut self, time: Duration) {
        self.0 += (time.as_secs_f64() - self.0) / 16.0;
    }

    /// How many polls fit into so many seconds; one always does, if nothing is owed.
    fn fit_into(&self, seconds: f64) -> u32 {
        if seconds < 0.0 { 0 } else { (seconds / self.0.max(1e-6)) as u32 + 1 }
    }
}

/// The share of the worker's time that a class may use: more by a little while rounds are short, less by much when one is
/// long.
struct Share {
    /// Between `least` and 1.
    now: f64,
    least: f64,
    /// Seconds that may be spent; below zero after a turn that took longer.
    credit: f64,
    since: Option<Instant>,
}

impl Share {
    /// Credit is not saved beyond this, so that what it pays for makes no long round; nor is debt.
    const SAVED_SECONDS: f64 = 0.0005;
    const OWED_SECONDS: f64 = 0.005;
    /// The share doubles in about a tenth of a second of short rounds, and is halved by fourteen long ones.
    const GROWTH_PER_SECOND: f64 = 7.0;
    const CUT: f64 = 0.95;

    fn new(least: f64) -> Self {
        Share { now: 0.5, least, credit: 0.0, since: None }
    }

    fn spend(&mut self, time: Duration) {
        self.credit = (self.credit - time.as_secs_f64()).max(-Self::OWED_SECONDS);
    }

    /// Gives credit for the time since it was last asked. Says how many seconds that are.
    fn accrue(&mut self, now: Instant) -> f64 {
        let passed = self.since.replace(now).map_or(0.0, |since| (now - since).as_secs_f64());
        self.credit = (self.credit + self.now * passed).min(Self::SAVED_SECONDS);
        passed
    }

    /// A round took `lag`.
    fn after_round(&mut self, lag: Duration, now: Instant) {
        let passed = self.accrue(now);
        if lag > LAG_AIM {
            self.now = (self.now * Self::CUT).max(self.least);
        } else {
            let growth = 1.0 + Self::GROWTH_PER_SECOND * passed.min(0.01);
            self.now = (self.now * growth).min(1.0);
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
    use super::*;
    use crate::client::connection::tests::connection;

    fn lane() -> Arc<Lane> {
        Lanes::new(Metrics::new(0, Vec::new())).here()
    }

    async fn turn(mut turn: Turn) {
        std::future::poll_fn(|cx| turn.poll(cx)).await;
    }

    /// In which order those who wait have their turns.
    fn order(lane: &Lane, waiting: &[(char, Turn)]) -> String {
        let whose =
            |slot: Arc<Slot>| waiting.iter().find(|(_, turn)| Arc::ptr_eq(&turn.slot, &slot)).map(|(who, _)| who);
        std::iter::from_fn(|| lane.lock().next()).filter_map(whose).collect()
    }

    #[tokio::test]
    async fn whoever_is_nearest_to_the_end_comes_first() {
        let lane = lane();
        let wait = |(who, missing)| (who, lane.queue(Class::Spool, missing));
        let waiting = [('d', u64::MAX), ('c', 300), ('a', 100), ('b', 200)].map(wait);
        assert_eq!(order(&lane, &waiting), "abcd");
    }

    #[tokio::test]
    async fn nobody_starves() {
        let lane = lane();
        let patient = lane.queue(Class::Pass, u64::MAX);
        let stream = async {
            loop {
                turn(lane.queue(Class::Pass, 1)).await;
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
        let gone = lane.queue(Class::Spool, 1);
        let stays = lane.queue(Class::Spool, 2);
        assert_eq!(lane.metrics.waiting.get(), 2);
        drop(gone);
        turn(stays).await;
        assert_eq!(lane.metrics.waiting.get(), 0);
    }

    #[tokio::test]
    async fn whoever_passes_comes_before_those_who_spool_and_not_always() {
        let lane = lane();
        let spools = [(); 2].map(|()| ('s', lane.queue(Class::Spool, 1)));
        let passes = [(); 5].map(|()| ('p', lane.queue(Class::Pass, 1)));
        let waiting: Vec<_> = spools.into_iter().chain(passes).collect();
        assert_eq!(order(&lane, &waiting), "pppspps");
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
        lane.lock().newcomers_time.took(Duration::from_millis(1));
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
        assert_eq!(lane.metrics.waiting.get(), 0);
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
        let lanes = Lanes::new(Metrics::new(0, Vec::new()));
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
        assert_eq!(lane.metrics.waiting.get(), 0, "there was time");
        lane.lock().newcomers_time.took(Duration::from_secs(1));
        lane.lock().newcomers_time.share.now = 0.0;
        assert!(poll().is_pending());
        assert_eq!(lane.metrics.waiting.get(), 1);
        connection.settle();
        assert!(poll().is_pending());
        assert_eq!(lane.metrics.waiting.get(), 0, "it has left the queue");
        assert!(poll().is_ready());
        assert_eq!(polls, 3);
    }

    #[tokio::test]
    async fn few_connections_are_taken_at_a_time() {
        let taken = AtomicUsize::new(0);
        let accept = async {
            loop {
                // As a listener's socket counts each.
                tokio::task::coop::consume_budget().await;
                Door.should_accept(None).await;
                taken.fetch_add(1, Ordering::Relaxed);
            }
        };
        let mut accept = std::pin::pin!(accept);
        std::future::poll_fn(|cx| Poll::Ready(accept.as_mut().poll(cx).is_pending())).await;
        assert_eq!(taken.load(Ordering::Relaxed), ACCEPTS_MOST);
    }

    #[test]
    fn the_share_grows_while_rounds_are_short_and_falls_when_they_are_long() {
        let begin = Instant::now();
        let mut share = Share { now: 0.2, ..Share::new(0.1) };
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
        assert_eq!(least, share.least);
    }

    #[test]
    fn a_turn_that_took_long_is_followed_by_a_pause() {
        let mut time = Allowance::new(0.1);
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
        let mut each = Average(100e-6);
        assert_eq!([-1.0, 0.0, 50e-6, 450e-6].map(|seconds| each.fit_into(seconds)), [0, 1, 1, 5]);
        (0..100).for_each(|_| each.add(Duration::from_micros(200)));
        assert_eq!(each.fit_into(450e-6), 3);
    }
}
