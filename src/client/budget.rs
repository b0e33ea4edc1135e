//! What all spools together may hold in memory and on disk, and what is done when memory runs short.
//!
//! A spool owns a [`Share`] and tells it of every byte that it takes or lets go; the sums stand in the [`Budget`]. As
//! memory fills, three rungs are climbed. *Spill*, from three quarters: spools keep nothing new in memory that they could
//! write to disk. *Pause*, from fifteen sixteenths: nobody takes more until something was let go. *Shed*, from the limit,
//! which first pieces can still fill: new exchanges are turned away, which is the proxy's to do.
//!
//! Every piece that passes a spool comes by here twice, so this is a few atomics: no lock and no clock. A lock is taken only when
//! somebody pauses.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use prometheus::IntGauge;
use tokio::sync::Notify;

use crate::metrics::{Direction, SpoolMetrics};

/// A future to be kept in what Pingora wants to be `Sync`.
pub type Wait<T> = Pin<Box<dyn Future<Output = T> + Send + Sync>>;

/// What there is to share, and what is done when it runs short.
#[derive(Clone, Debug)]
pub struct Resources {
    /// Bytes that spools may hold in memory.
    pub memory: u64,
    /// Bytes that their files may have.
    pub disk: u64,
    /// Whether the rung spill is used.
    pub spill: bool,
    /// Whether the rung pause is used.
    pub pause: bool,
    /// Whether the rung shed is used.
    pub shed: bool,
    /// How long a spool may be made to wait for memory.
    pub pause_max: Duration,
}

/// What all spools together hold.
pub struct Budget {
    resources: Resources,
    /// Bytes from which on each rung holds; never reached if it is not used.
    spill_at: u64,
    full_at: u64,
    shed_at: u64,
    memory: AtomicU64,
    disk: AtomicU64,
    /// Spools that wait for memory.
    paused: AtomicUsize,
    /// Wakes one that waits; it wakes the next.
    turn: Notify,
    metrics: SpoolMetrics,
}

impl Budget {
    /// A budget of which nothing is used yet.
    pub fn new(resources: Resources, metrics: SpoolMetrics) -> Arc<Self> {
        let limit = resources.memory;
        metrics.memory_limit.set(signed(limit));
        metrics.disk_limit.set(signed(resources.disk));
        // With nothing in use no rung holds, however small the limit.
        let rung = |used: bool, at: u64| if used { at.max(1) } else { u64::MAX };
        Arc::new(Budget {
            spill_at: rung(resources.spill, limit - limit / 4),
            full_at: if resources.pause { limit - limit / 16 } else { limit }.max(1),
            shed_at: rung(resources.shed, limit),
            resources,
            memory: AtomicU64::new(0),
            disk: AtomicU64::new(0),
            paused: AtomicUsize::new(0),
            turn: Notify::new(),
            metrics,
        })
    }

    /// Bytes in memory.
    pub fn memory(&self) -> u64 {
        self.memory.load(Ordering::Relaxed)
    }

    /// Bytes that files have grown to.
    pub fn disk(&self) -> u64 {
        self.disk.load(Ordering::Relaxed)
    }

    /// Whether spools should keep nothing new in memory that they could write to disk.
    pub fn spills(&self) -> bool {
        self.memory() >= self.spill_at
    }

    /// Whether as much memory is used that nobody may take more. Without the rung pause that is all of it, and one does
    /// not wait, see [`Budget::pause_max`].
    pub fn full(&self) -> bool {
        self.memory() >= self.full_at
    }

    /// Whether new exchanges should be turned away. Say so with [`Budget::count_shed`].
    pub fn sheds(&self) -> bool {
        self.memory() >= self.shed_at
    }

    /// How many clients are waited for in this direction.
    pub fn slow(&self, direction: Direction) -> &IntGauge {
        &self.metrics.slow[direction as usize]
    }

    /// How long one may be made to wait for memory; not at all without the rung pause.
    pub fn pause_max(&self) -> Duration {
        if self.resources.pause { self.resources.pause_max } else { Duration::ZERO }
    }

    /// Counts an exchange that was turned away.
    pub fn count_shed(&self) {
        self.metrics.shed.times.inc();
    }

    /// Counts a write to disk that only pressure caused.
    pub fn count_spill(&self) {
        self.metrics.spill.times.inc();
    }

    /// Ends when there is memory: at once if there is. Counts as a pause from its first poll until it is over or dropped.
    ///
    /// Those who wait are woken one after the other, for as long as there is room: take what you came for before you wait
    /// for anything else, or ask [`Budget::full`] again.
    pub fn room(self: &Arc<Self>) -> Wait<()> {
        let budget = self.clone();
        Box::pin(async move {
            if !budget.full() {
                return;
            }
            let pausing = Pausing::enter(&budget);
            while budget.full_for_certain() {
                // A turn that is given to a future which is dropped passes to the next.
                budget.turn.notified().await;
            }
            drop(pausing);
            budget.wake();
        })
    }

    /// As `full`, in one order with what those do who free memory: either they see us wait, or we see what they freed.
    fn full_for_certain(&self) -> bool {
        self.memory.load(Ordering::SeqCst) >= self.full_at
    }

    /// Gives the turn to one of those who wait if there is room for it.
    fn wake(&self) {
        if self.paused.load(Ordering::SeqCst) > 0 && !self.full() {
            self.turn.notify_one();
        }
    }

    fn grow_memory(&self, bytes: u64) {
        let before = self.memory.fetch_add(bytes, Ordering::Relaxed);
        let after = before + bytes;
        if before < self.spill_at && after >= self.spill_at {
            self.metrics.spill.now.inc();
        }
        if before < self.shed_at && after >= self.shed_at {
            self.metrics.shed.now.inc();
        }
    }

    fn shrink_memory(&self, bytes: u64) {
        let before = self.memory.fetch_sub(bytes, Ordering::SeqCst);
        debug_assert!(before >= bytes, "a share let go of more than it had");
        let after = before.wrapping_sub(bytes);
        if before >= self.spill_at && after < self.spill_at {
            self.metrics.spill.now.dec();
        }
        if before >= self.shed_at && after < self.shed_at {
            self.metrics.shed.now.dec();
        }
        self.wake();
    }

    fn grow_disk(&self, bytes: u64) -> bool {
        let more = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= self.resources.disk);
        self.disk.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }
}

/// Counts one that waits for memory.
struct Pausing<'a>(&'a Budget);

impl<'a> Pausing<'a> {
    fn enter(budget: &'a Budget) -> Self {
        budget.paused.fetch_add(1, Ordering::SeqCst);
        budget.metrics.pause.times.inc();
        budget.metrics.pause.now.inc();
        Pausing(budget)
    }
}

impl Drop for Pausing<'_> {
    fn drop(&mut self) {
        self.0.paused.fetch_sub(1, Ordering::SeqCst);
        self.0.metrics.pause.now.dec();
    }
}

/// What one spool holds of the budget; dropping it lets go of everything.
pub struct Share {
    budget: Arc<Budget>,
    direction: Direction,
    memory: u64,
    disk: u64,
}

impl Share {
    /// A share of nothing yet.
    pub fn new(budget: &Arc<Budget>, direction: Direction) -> Self {
        Share { budget: budget.clone(), direction, memory: 0, disk: 0 }
    }

    /// Bytes in memory.
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// Bytes that the file may have.
    pub fn disk(&self) -> u64 {
        self.disk
    }

    /// Takes so many bytes of memory: always, for they are here already. Ask [`Budget::full`] before they come.
    pub fn grow_memory(&mut self, bytes: u64) {
        self.memory += bytes;
        self.gauge(&self.budget.metrics.memory).add(signed(bytes));
        self.budget.grow_memory(bytes);
    }

    /// Lets go of so many bytes of memory.
    pub fn shrink_memory(&mut self, bytes: u64) {
        debug_assert!(self.memory >= bytes, "a spool let go of more than it had");
        let bytes = bytes.min(self.memory);
        if bytes == 0 {
            return;
        }
        self.memory -= bytes;
        self.gauge(&self.budget.metrics.memory).sub(signed(bytes));
        self.budget.shrink_memory(bytes);
    }

    /// Takes so many bytes of disk; `false` if there are not as many left, and then none is taken.
    pub fn grow_disk(&mut self, bytes: u64) -> bool {
        let grown = self.budget.grow_disk(bytes);
        if grown {
            self.disk += bytes;
            self.gauge(&self.budget.metrics.disk).add(signed(bytes));
        }
        grown
    }

    /// Moves so many bytes of memory into a share of their own, for those who hold them from now on.
    pub fn split_memory(&mut self, bytes: u64) -> Share {
        debug_assert!(self.memory >= bytes, "a spool gave away more than it had");
        let bytes = bytes.min(self.memory);
        self.memory -= bytes;
        Share { budget: self.budget.clone(), direction: self.direction, memory: bytes, disk: 0 }
    }

    /// Moves all of the disk into a share of its own.
    pub fn split_disk(&mut self) -> Share {
        let disk = std::mem::take(&mut self.disk);
        Share { budget: self.budget.clone(), direction: self.direction, memory: 0, disk }
    }

    /// Takes in another share of the same budget and direction.
    pub fn join(&mut self, mut other: Share) {
        debug_assert_eq!(self.direction, other.direction);
        self.memory += std::mem::take(&mut other.memory);
        self.disk += std::mem::take(&mut other.disk);
    }

    fn gauge<'a>(&self, gauges: &'a [IntGauge; 2]) -> &'a IntGauge {
        &gauges[self.direction as usize]
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let memory = self.memory;
        self.shrink_memory(memory);
        if self.disk > 0 {
            self.gauge(&self.budget.metrics.disk).sub(signed(self.disk));
            self.budget.disk.fetch_sub(self.disk, Ordering::Relaxed);
        }
    }
}

/// As gauges want it.
fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll, Waker};

    use super::*;
    use crate::metrics::Metrics;

    const RESOURCES: Resources = Resources {
        memory: 1600,
        disk: 1000,
        spill: true,
        pause: true,
        shed: true,
        pause_max: Duration::from_secs(30),
    };

    fn budget(resources: Resources) -> (Arc<Budget>, SpoolMetrics) {
        let metrics = Metrics::new(u64::MAX, Vec::new()).spools();
        (Budget::new(resources, metrics.clone()), metrics)
    }

    fn poll(wait: &mut Wait<()>) -> Poll<()> {
        wait.as_mut().poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn the_gauges_follow_what_is_held_and_a_share_that_is_dropped_holds_nothing() {
        let (budget, metrics) = budget(RESOURCES);
        let gauges = || [&metrics.memory, &metrics.disk].map(|gauge| [gauge[0].get(), gauge[1].get()]);
        let mut request = Share::new(&budget, Direction::Request);
        let mut response = Share::new(&budget, Direction::Response);
        request.grow_memory(100);
        response.grow_memory(30);
        response.shrink_memory(10);
        assert!(response.grow_disk(600));
        let (part, file) = (request.split_memory(40), response.split_disk());
        assert_eq!(gauges(), [[100, 20], [0, 600]]);
        assert_eq!((budget.memory(), budget.disk()), (120, 600));
        drop(part);
        assert_eq!((request.memory(), budget.memory()), (60, 80));
        request.join(Share::new(&budget, Direction::Request));
        drop((request, response));
        assert_eq!(gauges(), [[0, 0], [0, 600]]);
        drop(file);
        assert_eq!((gauges(), budget.memory(), budget.disk()), ([[0, 0], [0, 0]], 0, 0));
    }

    #[test]
    fn the_disk_ends_at_its_limit() {
        let (budget, _) = budget(RESOURCES);
        let [mut one, mut other] = [(); 2].map(|()| Share::new(&budget, Direction::Request));
        assert!(one.grow_disk(900));
        assert!(!other.grow_disk(101));
        assert!(other.grow_disk(100));
        drop(one);
        assert!(other.grow_disk(900));
    }

    #[test]
    fn the_rungs_are_climbed_one_after_the_other() {
        let (budget, metrics) = budget(RESOURCES);
        let mut share = Share::new(&budget, Direction::Request);
        let now = || [budget.spills(), budget.full(), budget.sheds()];
        let gauges = || [metrics.spill.now.get(), metrics.shed.now.get()];
        let mut climb = |to: u64| {
            let memory = share.memory();
            share.grow_memory(to.saturating_sub(memory));
            share.shrink_memory(memory.saturating_sub(to));
            (now(), gauges())
        };
        assert_eq!(climb(1199), ([false, false, false], [0, 0]));
        assert_eq!(climb(1200), ([true, false, false], [1, 0]));
        assert_eq!(climb(1500), ([true, true, false], [1, 0]));
        assert_eq!(climb(1600), ([true, true, true], [1, 1]));
        assert_eq!(climb(1599), ([true, true, false], [1, 0]));
        assert_eq!(climb(1499), ([true, false, false], [1, 0]));
        assert_eq!(climb(0), ([false, false, false], [0, 0]));
    }

    #[test]
    fn a_rung_that_is_not_used_never_holds_but_the_limit_does() {
        let none = Resources { spill: false, pause: false, shed: false, ..RESOURCES };
        let (budget, metrics) = budget(none);
        let mut share = Share::new(&budget, Direction::Request);
        share.grow_memory(5000);
        assert_eq!((budget.spills(), budget.sheds(), budget.full()), (false, false, true));
        assert_eq!((metrics.spill.now.get(), metrics.shed.now.get()), (0, 0));
        assert_eq!(budget.pause_max(), Duration::ZERO);
    }

    #[test]
    fn whoever_pauses_is_counted_until_there_is_memory() {
        let (budget, metrics) = budget(RESOURCES);
        let mut share = Share::new(&budget, Direction::Request);
        share.grow_memory(1500);
        let [mut first, mut second] = [budget.room(), budget.room()];
        assert_eq!((poll(&mut first), poll(&mut second)), (Poll::Pending, Poll::Pending));
        assert_eq!((metrics.pause.times.get(), metrics.pause.now.get(), budget.sheds()), (2, 2, false));
        share.shrink_memory(1500);
        assert_eq!((poll(&mut first), metrics.pause.now.get()), (Poll::Ready(()), 1));
        assert_eq!((poll(&mut second), metrics.pause.now.get()), (Poll::Ready(()), 0));
    }

    #[test]
    fn the_turn_of_one_who_gives_up_goes_to_the_next() {
        let (budget, _) = budget(RESOURCES);
        let mut share = Share::new(&budget, Direction::Request);
        share.grow_memory(1600);
        let [mut first, mut second] = [budget.room(), budget.room()];
        assert_eq!((poll(&mut first), poll(&mut second)), (Poll::Pending, Poll::Pending));
        share.shrink_memory(101);
        drop(first);
        assert_eq!(poll(&mut second), Poll::Ready(()));
    }

    /// Each takes what would fill the memory, lets others run, and lets go of it.
    async fn everybody_gets_a_turn(budget: Arc<Budget>, waiters: usize, peak_max: u64) {
        let mut share = Share::new(&budget, Direction::Request);
        share.grow_memory(RESOURCES.memory);
        let peak = Arc::new(AtomicU64::new(0));
        let tasks: Vec<_> = (0..waiters)
            .map(|_| {
                let (budget, peak) = (budget.clone(), peak.clone());
                tokio::spawn(async move {
                    budget.room().await;
                    let mut share = Share::new(&budget, Direction::Response);
                    share.grow_memory(RESOURCES.memory);
                    peak.fetch_max(budget.memory(), Ordering::Relaxed);
                    tokio::task::yield_now().await;
                })
            })
            .collect();
        while budget.paused.load(Ordering::Relaxed) < waiters {
            tokio::task::yield_now().await;
        }
        drop(share);
        for task in tasks {
            tokio::time::timeout(Duration::from_secs(20), task).await.expect("a turn").expect("no panic");
        }
        assert_eq!((budget.memory(), budget.sheds()), (0, false));
        assert!(peak.load(Ordering::Relaxed) <= peak_max, "{peak:?} bytes");
    }

    #[tokio::test]
    async fn two_thousand_who_wait_all_get_their_turn_and_are_no_stampede() {
        let (budget, metrics) = budget(RESOURCES);
        everybody_gets_a_turn(budget, 2000, RESOURCES.memory).await;
        assert_eq!((metrics.pause.now.get(), metrics.pause.times.get()), (0, 2000));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn no_turn_is_lost_between_threads() {
        let (budget, _) = budget(RESOURCES);
        everybody_gets_a_turn(budget, 2000, 5 * RESOURCES.memory).await;
    }
}
