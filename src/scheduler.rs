//! The scheduler of a worker: exchanges take turns, so that bulk transfers and crowds of new connections do not
//! increase the latency of small exchanges.
//!
//! Without it, a thousand large responses that arrive at once would cause seconds of copying before the next small
//! request is handled. Once many exchanges transfer bulk, each therefore asks its worker's scheduler for a grant. There
//! are two classes: bytes that *pass* directly to or from a client that is ready, and bytes that are *spooled* for a
//! client that is not waiting for them. A grant costs the time that it takes. Each class has a [`share`] of the
//! worker's time, which grows while rounds of the event loop are short and shrinks after a long one. As a result,
//! passing bytes get all time that is not needed otherwise, spooled bytes get a limited part, and rounds remain short.
//!
//! In both classes the exchange with the fewest missing bytes comes first, so that most endpoints are released soonest.
//! Every eighth grant goes to the exchange that has waited longest, so that none starves ([`fair_queue`]). While the
//! disk threads have a backlog, exchanges that need them get no grant: their unwritten bytes would wait in memory.
//!
//! Many connections that arrive at once are not bulk yet, but if a thousand of them begin an exchange in one round, all
//! others wait until the last header was parsed and its endpoint contacted. Each round therefore accepts few
//! connections ([`accept`]), and work for new connections, up to the first byte of their first response, is a class of
//! its own: other connections wait for few of them ([`task`]).
//!
//! Where small exchanges alone make rounds long, and no bulk is transferred, the time of that class and the accept
//! limit grow with the round. Otherwise connections that arrive at once at a busy worker waited for half a second.
//!
//! The decisions are in [`policy`], and a simulated worker shows the waits that result. This module gives the grants,
//! and knows neither connections nor disks.
//!
//! # Rejected alternatives
//!
//! - A rate in bytes instead of time: the cost of a byte varies by a factor of ten with its place in memory.
//! - Charging only the first poll of a grant: rounds took 2 ms instead of the intended half a millisecond. All polls of
//!   an exchange count until it waits again.
//! - One queue for both classes: slow clients delayed fast ones.
//! - More than 0.3 of a worker for spooling: small requests were slowed by the disk threads and the endpoints that it
//!   keeps busy.
//! - As much time for new connections as for all others together, or a fixed time in every round: they cause more work
//!   than they cost themselves, and a fast client's p99 was three times as high.
//! - More time for new connections also beside bulk transfers, or as soon as anything makes rounds long: with a
//!   thousand slow readers that arrive, a fast client's p99 rose from 15 to 40 ms and more.

pub mod accept;
pub mod coop;
pub mod fair_queue;
pub mod policy;
pub mod share;
#[cfg(test)]
mod simulation;
pub mod task;

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::task::AtomicWaker;

use crate::eventloop::worker;
use crate::metrics::{Metrics, SchedulerMetrics};
use fair_queue::Key;
use policy::{FREE_BULK_IN_ARRIVAL, Granted, Load, Policy, Round};
use task::ExchangeControl;

/// Shortest pause between two rounds for which the worker sleeps.
const PAUSE_MIN: Duration = Duration::from_micros(200);

/// What a grant is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// To be polled at all: the first exchange of a connection, until its response begins.
    NewConnection,
    /// To transfer bytes that a client waits for: a response that it accepts, a held response, or an upload.
    Transfer,
    /// To hold a response for a client that does not accept it.
    Spool,
}

impl Class {
    /// All classes, in the order of `SCHEDULER_CLASSES`.
    pub const ALL: [Class; 3] = [Class::NewConnection, Class::Transfer, Class::Spool];
}

/// The schedulers of one gateway: one per worker, created on first use.
pub struct Schedulers {
    metrics: Metrics,
    disk_is_busy: Box<dyn Fn() -> bool + Send + Sync>,
    /// Maximum wait for a grant: then it is given at any cost, since grants only define the order, and no exchange may
    /// fail because of them.
    wait_max: Duration,
    /// Counts schedulers of threads that are not workers, as in tests.
    made: AtomicUsize,
}

/// What a worker thread polls now, and its scheduler.
struct Current {
    /// The scheduler, and the gateway that it belongs to: a test may run several gateways in one process.
    scheduler: RefCell<Option<(Arc<Schedulers>, Arc<Scheduler>)>>,
    /// Now minus the own time of the exchange that is polled: its start, had it never waited.
    since: Cell<Option<Instant>>,
    /// The control that this exchange has just attached.
    attached: RefCell<Option<Arc<dyn ExchangeControl>>>,
}

thread_local! {
    static CURRENT: Current =
        const { Current { scheduler: RefCell::new(None), since: Cell::new(None), attached: RefCell::new(None) } };
}

impl Schedulers {
    /// Creates an empty set. Exchanges that need the disk threads wait while `disk_is_busy`. A grant is given after
    /// `wait_max` at the latest.
    pub fn new(
        metrics: Metrics,
        disk_is_busy: impl Fn() -> bool + Send + Sync + 'static,
        wait_max: Duration,
    ) -> Arc<Self> {
        Arc::new(Schedulers { metrics, disk_is_busy: Box::new(disk_is_busy), wait_max, made: AtomicUsize::new(0) })
    }

    /// The scheduler of the calling worker.
    pub fn here(self: &Arc<Self>) -> Arc<Scheduler> {
        self.with_here(Arc::clone)
    }

    /// Calls `act` with the scheduler of the calling worker. It must not ask for the scheduler again.
    fn with_here<T>(self: &Arc<Self>, act: impl FnOnce(&Arc<Scheduler>) -> T) -> T {
        CURRENT.with(|current| {
            let here = &mut *current.scheduler.borrow_mut();
            here.take_if(|(whose, _)| !Arc::ptr_eq(whose, self));
            let (_, scheduler) = here.get_or_insert_with(|| (self.clone(), self.create()));
            act(scheduler)
        })
    }

    /// Creates the scheduler of the calling worker.
    fn create(self: &Arc<Self>) -> Arc<Scheduler> {
        let number = worker::here().map(|worker| worker.index);
        let number = number.unwrap_or_else(|| self.made.fetch_add(1, Ordering::Relaxed));
        Arc::new(Scheduler::new(self.clone(), number))
    }
}

/// The scheduler of one worker.
pub struct Scheduler {
    queues: Mutex<Queues>,
    /// Number of bulk transfers.
    bulk: AtomicUsize,
    /// Time for small exchanges on connections that have been served, in nanoseconds.
    small: AtomicU64,
    all: Arc<Schedulers>,
    metrics: SchedulerMetrics,
}

struct Queues {
    policy: Policy<Arc<Slot>>,
    /// Whether a task gives grants; it ends when no exchange waits.
    driven: bool,
    /// The time for small exchanges by the end of the last round.
    small: Duration,
    /// The time of all polls, by class.
    #[cfg(test)]
    charged: [Duration; 3],
}

/// A waiting exchange.
struct Slot {
    granted: AtomicBool,
    waker: AtomicWaker,
}

impl Slot {
    fn grant(&self) {
        self.granted.store(true, Ordering::Release);
        self.waker.wake();
    }
}

/// A grant that an exchange has asked for. Dropping it gives up its place in the queue.
pub struct Grant {
    scheduler: Arc<Scheduler>,
    class: Class,
    key: Key,
    slot: Arc<Slot>,
}

impl Scheduler {
    fn new(all: Arc<Schedulers>, worker: usize) -> Self {
        let queues = Queues {
            policy: Policy::new(all.wait_max),
            driven: false,
            small: Duration::ZERO,
            #[cfg(test)]
            charged: Default::default(),
        };
        let queues = Mutex::new(queues);
        Scheduler {
            queues,
            bulk: AtomicUsize::new(0),
            small: AtomicU64::new(0),
            metrics: all.metrics.scheduler(worker),
            all,
        }
    }

    /// Registers a bulk transfer.
    pub fn begin_bulk(self: &Arc<Self>) -> Bulk {
        self.bulk.fetch_add(1, Ordering::Relaxed);
        Bulk(self.clone())
    }

    /// Whether the number of bulk transfers requires grants.
    pub fn is_crowded(&self) -> bool {
        let bulk = self.bulk.load(Ordering::Relaxed);
        bulk > FREE_BULK_IN_ARRIVAL && self.lock().policy.is_crowded(bulk, Instant::now)
    }

    /// Asks for a grant for a new connection, if it must wait for one now.
    fn request_for_connection(self: &Arc<Self>, now: Instant) -> Option<Grant> {
        let defers = self.lock().policy.defers_connection(now);
        defers.then(|| self.request(Class::NewConnection, 0, false))
    }

    /// Asks for a grant. `missing` is the number of missing bytes, `u64::MAX` if unknown; `disk`: the bytes need the
    /// disk threads.
    pub fn request(self: &Arc<Self>, class: Class, missing: u64, disk: bool) -> Grant {
        let slot = Arc::new(Slot { granted: AtomicBool::new(false), waker: AtomicWaker::new() });
        let mut queues = self.lock();
        let key = queues.policy.push(slot.clone(), class, missing, disk, Instant::now());
        self.metrics.waiting[class as usize].inc();
        if !std::mem::replace(&mut queues.driven, true) {
            self.load(&mut queues.small);
            tokio::spawn(drive(self.clone()));
        }
        Grant { scheduler: self.clone(), class, key, slot }
    }

    /// Counts spooled bytes.
    pub fn count_spooled(&self, bytes: u64) {
        self.metrics.bytes.inc_by(bytes);
    }

    /// Charges the time of a poll to a class.
    fn charge(&self, class: Class, time: Duration) {
        let mut queues = self.lock();
        queues.policy.charge(class, time);
        #[cfg(test)]
        let () = queues.charged[class as usize] += time;
    }

    /// Counts a poll of a small exchange that no class pays for.
    fn count_small(&self, time: Duration) {
        self.small.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// What the worker does besides. `small` is the time for small exchanges by the last look, and is set to the
    /// present one.
    fn load(&self, small: &mut Duration) -> Load {
        let now = Duration::from_nanos(self.small.load(Ordering::Relaxed));
        let before = std::mem::replace(small, now);
        Load { small: now.saturating_sub(before), bulk: self.bulk.load(Ordering::Relaxed) }
    }

    /// Ends a round of the event loop and gives the grants that are due. Returns the time until the next, or `None` if
    /// no exchange waits; the driving task then ends.
    fn end_round(&self, since: Instant) -> Option<Duration> {
        let now = Instant::now();
        let disk_is_busy = (self.all.disk_is_busy)();
        let mut queues = self.lock();
        let load = self.load(&mut queues.small);
        let round = Round { now, lag: now - since, disk_is_busy, load };
        let pause = queues.policy.end_round(round, |Granted { who, class, overdue }| {
            if overdue {
                self.metrics.overdue[class as usize].inc();
            }
            self.metrics.waiting[class as usize].dec();
            who.grant();
        });
        for class in Class::ALL {
            self.metrics.share[class as usize].set(queues.policy.share(class));
        }
        queues.driven = pause.is_some();
        pause
    }

    fn lock(&self) -> MutexGuard<'_, Queues> {
        // One worker uses the lock, so it never blocks; it exists because a task could move to another worker.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A registered bulk transfer; released on drop.
pub struct Bulk(Arc<Scheduler>);

impl Bulk {
    /// Whether the number of bulk transfers requires grants.
    pub fn is_crowded(&self) -> bool {
        self.0.is_crowded()
    }
}

impl Drop for Bulk {
    fn drop(&mut self) {
        self.0.bulk.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Grant {
    /// What the grant is for.
    pub fn class(&self) -> Class {
        self.class
    }

    /// Ready when the grant is given.
    pub fn poll(&mut self, cx: &Context<'_>) -> Poll<()> {
        self.slot.waker.register(cx.waker());
        if self.slot.granted.load(Ordering::Acquire) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        let waits = !self.slot.granted.load(Ordering::Acquire);
        if waits && self.scheduler.lock().policy.remove(self.class, self.key).is_some() {
            self.scheduler.metrics.waiting[self.class as usize].dec();
        }
    }
}

/// Gives grants while exchanges wait. One round of the event loop passes between two calls, in which all ready tasks
/// run; its length is the lag.
async fn drive(scheduler: Arc<Scheduler>) {
    loop {
        let since = Instant::now();
        tokio::task::yield_now().await;
        match scheduler.end_round(since) {
            // Timers have a resolution of one millisecond. Much shorter pauses become a few rounds of the loop; longer
            // ones would keep the disk threads from the CPU although this worker does not need it.
            Some(pause) if pause < PAUSE_MIN => {}
            Some(pause) => tokio::time::sleep(pause).await,
            None => return,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::policy::{DISK_PAUSE, FREE_BULK};
    use super::*;
    use crate::metrics::SCHEDULER_CLASSES;

    const WAIT_MAX: Duration = Duration::from_secs(10);

    /// Schedulers of a gateway whose disk threads are idle.
    pub(crate) fn schedulers() -> Arc<Schedulers> {
        Schedulers::new(Metrics::new(0, Vec::new()), || false, WAIT_MAX)
    }

    async fn given(mut grant: Grant) {
        std::future::poll_fn(|cx| grant.poll(cx)).await;
    }

    /// The number of waiting exchanges.
    pub(super) fn waiting(scheduler: &Scheduler) -> i64 {
        scheduler.metrics.waiting.iter().map(|gauge| gauge.get()).sum()
    }

    /// The time that was charged to each class.
    pub(super) fn charged(scheduler: &Scheduler) -> [Duration; 3] {
        scheduler.lock().charged
    }

    #[tokio::test]
    async fn an_exchange_that_waits_longest_gets_its_grant_beside_a_stream_of_others() {
        let scheduler = schedulers().here();
        let patient = scheduler.request(Class::Transfer, u64::MAX, false);
        let stream = async {
            loop {
                given(scheduler.request(Class::Transfer, 1, true)).await;
            }
        };
        tokio::select! {
            () = given(patient) => {}
            () = stream => unreachable!("it never ends"),
        }
    }

    #[tokio::test]
    async fn an_exchange_that_leaves_the_queue_is_not_waited_for() {
        let scheduler = schedulers().here();
        let gone = scheduler.request(Class::Spool, 1, true);
        let stays = scheduler.request(Class::Spool, 2, false);
        assert_eq!(waiting(&scheduler), 2);
        drop(gone);
        given(stays).await;
        assert_eq!(waiting(&scheduler), 0);
    }

    #[tokio::test]
    async fn an_exchange_that_needs_busy_disk_threads_gets_its_grant_once_they_are_idle() {
        let busy = Arc::new(AtomicBool::new(true));
        let seen = busy.clone();
        let disk_is_busy = move || seen.load(Ordering::Relaxed);
        let scheduler = Schedulers::new(Metrics::new(0, Vec::new()), disk_is_busy, WAIT_MAX).here();
        let mut grant = scheduler.request(Class::Spool, 100, true);
        assert_eq!(scheduler.end_round(Instant::now()), Some(DISK_PAUSE));
        assert!(grant.poll(&Context::from_waker(std::task::Waker::noop())).is_pending());
        busy.store(false, Ordering::Relaxed);
        given(grant).await;
    }

    #[tokio::test]
    async fn an_overdue_grant_is_counted() {
        let scheduler = Schedulers::new(Metrics::new(0, Vec::new()), || true, Duration::ZERO).here();
        given(scheduler.request(Class::Spool, 100, true)).await;
        assert_eq!(scheduler.metrics.overdue.each_ref().map(|counter| counter.get()), [0, 0, 1]);
        assert_eq!(waiting(&scheduler), 0);
    }

    #[test]
    fn the_classes_are_those_of_the_metrics() {
        let words = SCHEDULER_CLASSES.map(|words| words.replace('_', ""));
        assert_eq!(Class::ALL.map(|class| format!("{class:?}").to_lowercase()), words);
        assert_eq!(Class::ALL.map(|class| class as usize), [0, 1, 2]);
    }

    #[test]
    fn a_bulk_transfer_counts_until_it_ends() {
        let scheduler = schedulers().here();
        let mut few: Vec<_> = (0..FREE_BULK).map(|_| scheduler.begin_bulk()).collect();
        assert!(!scheduler.is_crowded());
        few.push(scheduler.begin_bulk());
        assert!(scheduler.is_crowded());
        few.clear();
        assert!(!scheduler.is_crowded());
    }
}
