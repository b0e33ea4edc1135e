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
//! bulk may never be: everybody else waits until the last of them has parsed its header and called its endpoint. So where
//! many begin at once they come in one after the other, a few in each round, the fewer the longer the rounds are.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::task::AtomicWaker;

use crate::eventloop::worker;
use crate::metrics::{LaneMetrics, Metrics};

/// A round of the event loop should not take longer while the lane works.
const LAG_AIM: Duration = Duration::from_millis(1);
/// Of so many turns one goes to whoever has waited longest.
const FAIR_EVERY: u64 = 8;
/// So many exchanges may pass at a time without turns: a round of the event loop is short enough with them.
const FREE_PASSES: usize = 24;
/// So many turns to pass, then one to spool.
const PASSES_PER_SPOOL: u32 = 3;
/// The longest pause between two turns while somebody waits.
const PAUSE_MOST: Duration = Duration::from_millis(20);

/// So many connections may begin their first exchange within [`BURST`] without turns, and this many at most in one round.
const BEGINS_MOST: u32 = 16;
const BURST: Duration = Duration::from_millis(1);

/// What a turn is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// To begin the first exchange of a connection.
    Begin,
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

/// The queues of one worker.
pub struct Lane {
    queues: Mutex<Queues>,
    /// Exchanges that move much.
    bulk: AtomicUsize,
    metrics: LaneMetrics,
}

#[derive(Default)]
struct Queues {
    pass: Queue,
    spool: Queue,
    begin: Queue,
    begins: Begins,
    /// Whether a task hands out turns; it ends when nobody waits.
    driven: bool,
    share: Share,
    /// Turns to pass since the last one to spool.
    passed: u32,
}

impl Queues {
    fn of(&mut self, class: Class) -> &mut Queue {
        match class {
            Class::Begin => &mut self.begin,
            Class::Pass => &mut self.pass,
            Class::Spool => &mut self.spool,
        }
    }

    fn is_empty(&self) -> bool {
        [&self.begin, &self.pass, &self.spool].iter().all(|queue| queue.waiting.is_empty())
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
        self.bulk.load(Ordering::Relaxed) > FREE_PASSES
    }

    /// A place in the queue of those that begin, if so many do that they are to take turns.
    pub fn begin(self: &Arc<Self>, now: Instant) -> Option<Turn> {
        {
            let mut queues = self.lock();
            if queues.begin.waiting.is_empty() && queues.begins.one_more(now) {
                return None;
            }
        }
        Some(self.queue(Class::Begin, 0))
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
        self.lock().share.spend(time);
    }

    /// A round of the event loop is over: hands out the next turn if it is due. Says for how long there is nothing to do, or
    /// `None` if nobody waits, and then nobody drives the lane any more.
    fn round(&self, since: Instant) -> Option<Duration> {
        let now = Instant::now();
        let mut queues = self.lock();
        let pause = queues.share.after_round(now - since, now);
        self.metrics.share.set(queues.share.now);
        for _ in 0..queues.begins.after_round(now - since, now) {
            let Some(slot) = queues.begin.next() else { break };
            self.grant(&slot);
        }
        if pause.is_zero()
            && let Some(slot) = queues.next()
        {
            self.grant(&slot);
        }
        queues.driven = !queues.is_empty();
        let pause = if queues.begin.waiting.is_empty() { pause } else { Duration::ZERO };
        queues.driven.then_some(pause)
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

/// Hands out turns while somebody waits. One round of the event loop passes between two of them, in which whatever is
/// ready runs: how long it takes is the lag.
async fn drive(lane: Arc<Lane>) {
    loop {
        let since = Instant::now();
        tokio::task::yield_now().await;
        match lane.round(since) {
            // Timers count whole milliseconds; what is shorter is a round or two of the loop.
            Some(pause) if pause < Duration::from_millis(1) => {}
            Some(pause) => tokio::time::sleep(pause).await,
            None => return,
        }
    }
}

/// How many connections may begin at once.
struct Begins {
    /// In one round, while there is a queue.
    most: u32,
    /// Since this many have begun without turns.
    since: Option<Instant>,
    begun: u32,
}

impl Default for Begins {
    fn default() -> Self {
        Begins { most: BEGINS_MOST, since: None, begun: 0 }
    }
}

impl Begins {
    /// Whether one may begin at once, there being no queue.
    fn one_more(&mut self, now: Instant) -> bool {
        if self.since.is_none_or(|since| now - since > BURST) {
            self.since = Some(now);
            self.begun = 0;
        }
        self.begun += 1;
        self.begun <= BEGINS_MOST
    }

    /// A round took `lag`: how many may begin in the next.
    fn after_round(&mut self, lag: Duration, now: Instant) -> u32 {
        self.most = if lag > LAG_AIM { (self.most / 2).max(1) } else { (self.most + 1).min(BEGINS_MOST) };
        // Those who come meanwhile queue.
        (self.since, self.begun) = (Some(now), BEGINS_MOST);
        self.most
    }
}

/// The share of the worker's time that a lane may use: more by a little while rounds are short, less by much when one is
/// long.
struct Share {
    /// Between [`Share::LEAST`] and 1.
    now: f64,
    /// Seconds that may be spent; below zero after a turn that took longer.
    credit: f64,
    since: Option<Instant>,
}

impl Default for Share {
    fn default() -> Self {
        Share { now: 0.5, credit: 0.0, since: None }
    }
}

impl Share {
    const LEAST: f64 = 0.1;
    /// Credit is not saved beyond this, nor is debt.
    const SAVED_SECONDS: f64 = 0.001;
    const OWED_SECONDS: f64 = 0.005;
    /// The share doubles in about a tenth of a second of short rounds, and is halved by four long ones.
    const GROWTH_PER_SECOND: f64 = 7.0;
    const CUT: f64 = 0.85;

    fn spend(&mut self, time: Duration) {
        self.credit = (self.credit - time.as_secs_f64()).max(-Self::OWED_SECONDS);
    }

    /// A round took `lag`: how long to pause before the next turn.
    fn after_round(&mut self, lag: Duration, now: Instant) -> Duration {
        let passed = self.since.replace(now).map_or(0.0, |since| (now - since).as_secs_f64());
        if lag > LAG_AIM {
            self.now = (self.now * Self::CUT).max(Self::LEAST);
        } else {
            let growth = 1.0 + Self::GROWTH_PER_SECOND * passed.min(0.01);
            self.now = (self.now * growth).min(1.0);
        }
        self.credit = (self.credit + self.now * passed).min(Self::SAVED_SECONDS);
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

    fn lane() -> Arc<Lane> {
        Lanes::new(Metrics::new(0, Vec::new())).here()
    }

    async fn turn(mut turn: Turn) {
        std::future::poll_fn(|cx| turn.poll(cx)).await;
    }

    #[tokio::test]
    async fn whoever_is_nearest_to_the_end_comes_first() {
        let lane = lane();
        let order = Mutex::new(Vec::new());
        let wait = |missing| {
            let place = lane.queue(Class::Spool, missing);
            let order = &order;
            async move {
                turn(place).await;
                order.lock().expect("no panic").push(missing);
            }
        };
        tokio::join!(wait(u64::MAX), wait(300), wait(100), wait(200));
        assert_eq!(*order.lock().expect("no panic"), [100, 200, 300, u64::MAX]);
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
        let order = Mutex::new(String::new());
        let wait = |class, letter| {
            let place = lane.queue(class, 1);
            let order = &order;
            async move {
                turn(place).await;
                order.lock().expect("no panic").push(letter);
            }
        };
        let spools = [(); 2].map(|()| wait(Class::Spool, 's'));
        let passes = [(); 5].map(|()| wait(Class::Pass, 'p'));
        futures::future::join_all(
            spools
                .into_iter()
                .map(futures::FutureExt::boxed_local)
                .chain(passes.into_iter().map(futures::FutureExt::boxed_local)),
        )
        .await;
        assert_eq!(*order.lock().expect("no panic"), "pppspps");
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
    async fn a_few_begin_at_once_and_a_crowd_in_the_order_in_which_it_came() {
        let lane = lane();
        let now = Instant::now();
        assert!((0..BEGINS_MOST).all(|_| lane.begin(now).is_none()));
        let order = Mutex::new(Vec::new());
        let crowd = (0..100).map(|number| {
            let place = lane.begin(now).expect("a place in the queue");
            let order = &order;
            async move {
                turn(place).await;
                order.lock().expect("no panic").push(number);
            }
        });
        futures::future::join_all(crowd).await;
        let mut order = order.into_inner().expect("no panic");
        order.truncate(7);
        assert_eq!(order, [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(lane.metrics.waiting.get(), 0);
        assert!(lane.begin(Instant::now() + 2 * BURST).is_none(), "nobody waits any more");
    }

    #[test]
    fn the_longer_the_rounds_the_fewer_begin_in_one() {
        let now = Instant::now();
        let mut begins = Begins::default();
        let most: Vec<_> = (0..6).map(|_| begins.after_round(2 * LAG_AIM, now)).collect();
        assert_eq!(most, [8, 4, 2, 1, 1, 1]);
        assert_eq!((0..100).map(|_| begins.after_round(LAG_AIM / 2, now)).last(), Some(BEGINS_MOST));
    }

    #[test]
    fn the_share_grows_while_rounds_are_short_and_falls_when_they_are_long() {
        let begin = Instant::now();
        let mut share = Share { now: 0.2, ..Share::default() };
        let after = |share: &mut Share, round: u32, lag| {
            share.after_round(lag, begin + round * Duration::from_millis(1));
            share.now
        };
        let first = after(&mut share, 0, Duration::ZERO);
        let grown = (1..200).map(|round| after(&mut share, round, LAG_AIM / 2)).last().expect("rounds");
        assert!(grown > 3.0 * first, "{first} {grown}");
        let late = (200..205).map(|round| after(&mut share, round, 2 * LAG_AIM)).last().expect("rounds");
        assert!(late < grown / 2.0, "{grown} {late}");
        let least = (205..1_000).map(|round| after(&mut share, round, 2 * LAG_AIM)).last().expect("rounds");
        assert_eq!(least, Share::LEAST);
    }

    #[test]
    fn a_turn_that_took_long_is_followed_by_a_pause() {
        let begin = Instant::now();
        let mut share = Share { now: 0.5, ..Share::default() };
        assert_eq!(share.after_round(Duration::ZERO, begin), Duration::ZERO);
        share.spend(Duration::from_millis(2));
        let pause = share.after_round(Duration::ZERO, begin);
        assert!((pause.as_secs_f64() - 0.004).abs() < 1e-6, "{pause:?}");
        share.spend(Duration::from_secs(10));
        assert_eq!(share.after_round(2 * LAG_AIM, begin).min(PAUSE_MOST), share.after_round(Duration::ZERO, begin));
    }
}
