//! What all spools together may hold in memory and on disk, and what is done when memory runs short.
//!
//! A spool owns a [`Share`] and tells it of every byte that it takes or lets go; the sums stand in the [`Budget`]. As
//! memory fills, three rungs are climbed. *Spill*, from three quarters: spools keep nothing new in memory that they
//! could write to disk. *Pause*, from fifteen sixteenths: no spool takes more until something was released. *Shed*,
//! from the limit, which first pieces can still fill: new exchanges are turned away, which is the proxy's to do.
//!
//! Of all this, answers may have a share, so that something is left for uploads, and each client may have a share in
//! each direction. The first two rungs hold within these shares as well; of the disk, [`shares`](super::shares) says
//! who gets more.
//!
//! Every piece that passes a spool comes by here twice, so this is a few atomics: no lock and no clock. A lock is taken
//! only when somebody pauses.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use prometheus::IntGauge;
use tokio::sync::Notify;

use super::account::Account;
use super::shares::{Denial, InUse, Store};
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
    /// How many files they may have.
    pub files: u64,
    /// Of memory and disk, as a ratio, what answers may have together.
    pub answers: f64,
    /// Of what all in one direction may have, as a ratio, what those of one client may have.
    pub client: f64,
    /// Whether the rung spill is used.
    pub spill: bool,
    /// Whether the rung pause is used.
    pub pause: bool,
    /// Whether the rung shed is used.
    pub shed: bool,
    /// How long a spool may be made to wait for memory.
    pub pause_max: Duration,
}

/// From how many bytes on the first two rungs hold; never reached if one is not used.
#[derive(Clone, Copy, Debug)]
struct Rungs {
    spill_at: u64,
    full_at: u64,
}

impl Rungs {
    /// Those of something that is full at `limit`. With nothing in use no rung holds, however small the limit.
    fn of(limit: u64, resources: &Resources) -> Self {
        let full_at = if resources.pause { limit - limit / 16 } else { limit };
        let spill_at = if resources.spill { (limit - limit / 4).max(1) } else { u64::MAX };
        Rungs { spill_at, full_at: full_at.max(1) }
    }
}

/// Bytes in memory, and those who wait that there are fewer.
#[derive(Default)]
pub struct Pool {
    used: AtomicU64,
    /// Spools that wait for memory.
    paused: AtomicUsize,
    /// Wakes one that waits; it wakes the next.
    turn: Notify,
}

impl Pool {
    fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// As `used`, in one order with what those do who free memory: either they see us wait, or we see what they freed.
    fn is_full_for_certain(&self, rungs: Rungs) -> bool {
        self.used.load(Ordering::SeqCst) >= rungs.full_at
    }

    /// Gives the turn to one of those who wait if there is room for it.
    fn wake(&self, rungs: Rungs) {
        if self.paused.load(Ordering::SeqCst) > 0 && self.used() < rungs.full_at {
            self.turn.notify_one();
        }
    }

    /// Ends when there is room; then the next has its turn.
    async fn room(&self, rungs: Rungs) {
        let waiting = Waiting::enter(&self.paused);
        while self.is_full_for_certain(rungs) {
            // A turn that is given to a future which is dropped passes to the next.
            self.turn.notified().await;
        }
        drop(waiting);
        self.wake(rungs);
    }
}

/// Counts one that waits at a pool.
struct Waiting<'p>(&'p AtomicUsize);

impl<'p> Waiting<'p> {
    fn enter(paused: &'p AtomicUsize) -> Self {
        paused.fetch_add(1, Ordering::SeqCst);
        Waiting(paused)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What the spools of one client hold in one direction.
#[derive(Default)]
pub struct Held {
    memory: Pool,
    disk: AtomicU64,
    files: AtomicU64,
}

/// What all spools together hold.
pub struct Budget {
    resources: Resources,
    all: Rungs,
    answers: Rungs,
    /// Of each direction.
    client: [Rungs; 2],
    shed_at: u64,
    memory: Pool,
    answers_memory: Pool,
    store: Store,
    disk: AtomicU64,
    answers_disk: AtomicU64,
    files_store: Store,
    files: AtomicU64,
    answers_files: AtomicU64,
    metrics: SpoolMetrics,
}

impl Budget {
    /// A budget of which nothing is used yet.
    pub fn new(resources: Resources, metrics: SpoolMetrics) -> Arc<Self> {
        let limit = resources.memory;
        metrics.memory_limit.set(signed(limit));
        metrics.disk_limit.set(signed(resources.disk));
        let part = |whole: u64, ratio: f64| if ratio < 1.0 { (whole as f64 * ratio) as u64 } else { whole };
        let answers = part(limit, resources.answers);
        let client = [limit, answers].map(|whole| Rungs::of(part(whole, resources.client), &resources));
        Arc::new(Budget {
            all: Rungs::of(limit, &resources),
            answers: Rungs::of(answers, &resources),
            client,
            // As for the other rungs: an empty budget turns nobody away.
            shed_at: if resources.shed { limit.max(1) } else { u64::MAX },
            memory: Pool::default(),
            answers_memory: Pool::default(),
            store: Store::new(resources.disk, resources.answers, resources.client),
            disk: AtomicU64::new(0),
            answers_disk: AtomicU64::new(0),
            files_store: Store::new(resources.files, resources.answers, resources.client),
            files: AtomicU64::new(0),
            answers_files: AtomicU64::new(0),
            resources,
            metrics,
        })
    }

    /// Bytes in memory.
    pub fn memory(&self) -> u64 {
        self.memory.used()
    }

    /// Bytes that files have grown to.
    pub fn disk(&self) -> u64 {
        self.disk.load(Ordering::Relaxed)
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

    /// Counts a spool that gets no more disk, for this reason.
    pub fn count_denial(&self, direction: Direction, denial: Denial) {
        self.metrics.denials[direction as usize][denial as usize].inc();
    }

    fn grow_memory(&self, bytes: u64) {
        let before = self.memory.used.fetch_add(bytes, Ordering::Relaxed);
        let after = before + bytes;
        if before < self.all.spill_at && after >= self.all.spill_at {
            self.metrics.spill.now.inc();
        }
        if before < self.shed_at && after >= self.shed_at {
            self.metrics.shed.now.inc();
        }
    }

    fn shrink_memory(&self, bytes: u64) {
        let before = self.memory.used.fetch_sub(bytes, Ordering::SeqCst);
        debug_assert!(before >= bytes, "a share let go of more than it had");
        let after = before.wrapping_sub(bytes);
        if before >= self.all.spill_at && after < self.all.spill_at {
            self.metrics.spill.now.dec();
        }
        if before >= self.shed_at && after < self.shed_at {
            self.metrics.shed.now.dec();
        }
        self.memory.wake(self.all);
    }
}

/// Counts one that waits for memory.
struct Pausing<'a>(&'a SpoolMetrics);

impl<'a> Pausing<'a> {
    fn enter(metrics: &'a SpoolMetrics) -> Self {
        metrics.pause.times.inc();
        metrics.pause.now.inc();
        Pausing(metrics)
    }
}

impl Drop for Pausing<'_> {
    fn drop(&mut self) {
        self.0.pause.now.dec();
    }
}

/// On whose account something is held.
#[derive(Clone)]
struct Owner {
    budget: Arc<Budget>,
    direction: Direction,
    account: Option<Arc<Account>>,
}

impl Owner {
    /// What the client holds in this direction; `None` if it has no account.
    fn held(&self) -> Option<&Held> {
        self.account.as_ref().map(|account| account.held(self.direction))
    }

    /// All pools that the memory of this owner is in besides that of all.
    fn narrower(&self) -> impl Iterator<Item = (&Pool, Rungs)> {
        let Owner { budget, direction, .. } = self;
        let answers = (*direction == Direction::Response).then_some((&budget.answers_memory, budget.answers));
        let client = self.held().map(|held| (&held.memory, budget.client[*direction as usize]));
        answers.into_iter().chain(client)
    }

    fn pools(&self) -> impl Iterator<Item = (&Pool, Rungs)> {
        self.narrower().chain([(&self.budget.memory, self.budget.all)])
    }

    fn is_full(&self) -> bool {
        self.pools().any(|(pool, rungs)| pool.used() >= rungs.full_at)
    }

    /// Releases this many bytes of memory.
    fn shrink_memory(&self, bytes: u64) {
        self.budget.shrink_memory(bytes);
        for (pool, rungs) in self.narrower() {
            pool.used.fetch_sub(bytes, Ordering::SeqCst);
            pool.wake(rungs);
        }
    }

    /// Takes so many bytes of disk for one that has `spool` already, and a file if it has none.
    fn grow_disk(&self, bytes: u64, spool: u64) -> Result<(), Denial> {
        let Owner { budget, direction, .. } = self;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (client, files) = self.held().map(|held| (load(&held.disk), load(&held.files))).unwrap_or_default();
        let admits = match direction {
            Direction::Request => Store::admits_upload,
            Direction::Response => Store::admits_answer,
        };
        if spool == 0 {
            let used = |all| InUse { all, answers: load(&budget.answers_files), client: files, spool };
            let short = |denial| if denial == Denial::Client { denial } else { Denial::Files };
            take(&budget.files, 1, |open| admits(&budget.files_store, used(open), 1)).map_err(short)?;
        }
        let used = |all| InUse { all, answers: load(&budget.answers_disk), client, spool };
        if let Err(denial) = take(&budget.disk, bytes, |all| admits(&budget.store, used(all), bytes)) {
            if spool == 0 {
                budget.files.fetch_sub(1, Ordering::Relaxed);
            }
            return Err(denial);
        }
        for (disk, files) in self.narrower_disk() {
            disk.fetch_add(bytes, Ordering::Relaxed);
            files.fetch_add(u64::from(spool == 0), Ordering::Relaxed);
        }
        Ok(())
    }

    /// Lets go of the disk of one file.
    fn shrink_disk(&self, bytes: u64) {
        self.budget.disk.fetch_sub(bytes, Ordering::Relaxed);
        self.budget.files.fetch_sub(1, Ordering::Relaxed);
        for (disk, files) in self.narrower_disk() {
            disk.fetch_sub(bytes, Ordering::Relaxed);
            files.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// What counts the disk and the files of this owner besides those of all.
    fn narrower_disk(&self) -> impl Iterator<Item = (&AtomicU64, &AtomicU64)> {
        let Owner { budget, direction, .. } = self;
        let answers = (*direction == Direction::Response).then_some((&budget.answers_disk, &budget.answers_files));
        answers.into_iter().chain(self.held().map(|held| (&held.disk, &held.files)))
    }
}

/// Adds so much to what is counted, if that is admitted.
fn take(counter: &AtomicU64, more: u64, admits: impl Fn(u64) -> Result<(), Denial>) -> Result<(), Denial> {
    let mut count = counter.load(Ordering::Relaxed);
    loop {
        admits(count)?;
        match counter.compare_exchange_weak(count, count + more, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => return Ok(()),
            Err(now) => count = now,
        }
    }
}

/// What one spool holds of the budget; dropping it lets go of everything.
pub struct Share {
    owner: Owner,
    memory: u64,
    disk: u64,
}

impl Share {
    /// A share of nothing yet, on the account of a client if it has one.
    pub fn new(budget: &Arc<Budget>, direction: Direction, account: Option<&Arc<Account>>) -> Self {
        let owner = Owner { budget: budget.clone(), direction, account: account.cloned() };
        Share { owner, memory: 0, disk: 0 }
    }

    /// Another share of the same owner, of nothing yet.
    pub fn another(&self) -> Self {
        self.part(0, 0)
    }

    fn part(&self, memory: u64, disk: u64) -> Self {
        Share { owner: self.owner.clone(), memory, disk }
    }

    /// Bytes in memory.
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// Bytes that the file may have.
    pub fn disk(&self) -> u64 {
        self.disk
    }

    /// Whether nothing new should be kept in memory that could be written to disk.
    pub fn spills(&self) -> bool {
        self.owner.pools().any(|(pool, rungs)| pool.used() >= rungs.spill_at)
    }

    /// Whether as much memory is used that its owner may take no more. Without the rung pause that is all of it, and
    /// one does not wait, see [`Budget::pause_max`].
    pub fn is_full(&self) -> bool {
        self.owner.is_full()
    }

    /// Whether its client has all the memory that one may have.
    pub fn is_client_full(&self) -> bool {
        let rungs = self.owner.budget.client[self.owner.direction as usize];
        self.owner.held().is_some_and(|held| held.memory.used() >= rungs.full_at)
    }

    /// Ends when there is memory: at once if there is. Counts as a pause from its first poll until it is over or
    /// dropped.
    ///
    /// Those who wait are woken one after the other, for as long as there is room: take what you came for before you
    /// wait for anything else, or ask [`Share::is_full`] again.
    pub fn room(&self) -> Wait<()> {
        let owner = self.owner.clone();
        Box::pin(async move {
            if !owner.is_full() {
                return;
            }
            let _pausing = Pausing::enter(&owner.budget.metrics);
            while let Some((pool, rungs)) = owner.pools().find(|(pool, rungs)| pool.is_full_for_certain(*rungs)) {
                pool.room(rungs).await;
            }
        })
    }

    /// Takes so many bytes of memory: always, for they are here already. Ask [`Share::is_full`] before they come.
    pub fn grow_memory(&mut self, bytes: u64) {
        self.memory += bytes;
        let Owner { budget, .. } = &self.owner;
        self.gauge(&budget.metrics.memory).add(signed(bytes));
        budget.grow_memory(bytes);
        for (pool, _) in self.owner.narrower() {
            pool.used.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Releases this many bytes of memory.
    pub fn shrink_memory(&mut self, bytes: u64) {
        debug_assert!(self.memory >= bytes, "a spool let go of more than it had");
        let bytes = bytes.min(self.memory);
        if bytes == 0 {
            return;
        }
        self.memory -= bytes;
        self.gauge(&self.owner.budget.metrics.memory).sub(signed(bytes));
        self.owner.shrink_memory(bytes);
    }

    /// Takes so many bytes of disk, or none.
    ///
    /// # Errors
    /// The limit that stands against it.
    pub fn grow_disk(&mut self, bytes: u64) -> Result<(), Denial> {
        if bytes == 0 {
            return Ok(());
        }
        self.owner.grow_disk(bytes, self.disk)?;
        self.disk += bytes;
        self.gauge(&self.owner.budget.metrics.disk).add(signed(bytes));
        Ok(())
    }

    /// Moves so many bytes of memory into a share of their own, for those who hold them from now on.
    pub fn split_memory(&mut self, bytes: u64) -> Share {
        debug_assert!(self.memory >= bytes, "a spool gave away more than it had");
        let bytes = bytes.min(self.memory);
        self.memory -= bytes;
        self.part(bytes, 0)
    }

    /// Moves all of the disk into a share of its own.
    pub fn split_disk(&mut self) -> Share {
        let disk = std::mem::take(&mut self.disk);
        self.part(0, disk)
    }

    /// Takes in the memory of another share of the same owner.
    pub fn join(&mut self, mut other: Share) {
        debug_assert!(self.owner.direction == other.owner.direction && other.disk == 0);
        self.memory += std::mem::take(&mut other.memory);
    }

    fn gauge<'a>(&self, gauges: &'a [IntGauge; 2]) -> &'a IntGauge {
        &gauges[self.owner.direction as usize]
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let memory = self.memory;
        self.shrink_memory(memory);
        if self.disk > 0 {
            self.gauge(&self.owner.budget.metrics.disk).sub(signed(self.disk));
            self.owner.shrink_disk(self.disk);
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
    use crate::client::account::Accounts;
    use crate::config::address::ClientPrefix;
    use crate::metrics::Metrics;

    const RESOURCES: Resources = Resources {
        memory: 1600,
        disk: 1000,
        files: 100,
        answers: 1.0,
        client: 1.0,
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
        let mut request = Share::new(&budget, Direction::Request, None);
        let mut response = Share::new(&budget, Direction::Response, None);
        request.grow_memory(100);
        response.grow_memory(30);
        response.shrink_memory(10);
        assert_eq!(response.grow_disk(600), Ok(()));
        let (part, file) = (request.split_memory(40), response.split_disk());
        assert_eq!(gauges(), [[100, 20], [0, 600]]);
        assert_eq!((budget.memory(), budget.disk()), (120, 600));
        drop(part);
        assert_eq!((request.memory(), budget.memory()), (60, 80));
        request.join(Share::new(&budget, Direction::Request, None));
        drop((request, response));
        assert_eq!(gauges(), [[0, 0], [0, 600]]);
        drop(file);
        assert_eq!((gauges(), budget.memory(), budget.disk()), ([[0, 0], [0, 0]], 0, 0));
    }

    #[test]
    fn the_disk_ends_at_its_limit() {
        let (budget, _) = budget(RESOURCES);
        let [mut one, mut other] = [(); 2].map(|()| Share::new(&budget, Direction::Request, None));
        assert_eq!(one.grow_disk(900), Ok(()));
        assert_eq!(other.grow_disk(101), Err(Denial::All));
        assert_eq!(other.grow_disk(100), Ok(()));
        drop(one);
        assert_eq!(other.grow_disk(900), Ok(()));
    }

    #[test]
    fn the_rungs_are_climbed_one_after_the_other() {
        let (budget, metrics) = budget(RESOURCES);
        let mut share = Share::new(&budget, Direction::Request, None);
        let probe = Share::new(&budget, Direction::Response, None);
        let now = || [probe.spills(), probe.is_full(), budget.sheds()];
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
        let mut share = Share::new(&budget, Direction::Request, None);
        share.grow_memory(5000);
        assert_eq!((share.spills(), budget.sheds(), share.is_full()), (false, false, true));
        assert_eq!((metrics.spill.now.get(), metrics.shed.now.get()), (0, 0));
        assert_eq!(budget.pause_max(), Duration::ZERO);
    }

    #[test]
    fn whoever_pauses_is_counted_until_there_is_memory() {
        let (budget, metrics) = budget(RESOURCES);
        let mut share = Share::new(&budget, Direction::Request, None);
        share.grow_memory(1500);
        let [mut first, mut second] = [share.room(), share.room()];
        assert_eq!((poll(&mut first), poll(&mut second)), (Poll::Pending, Poll::Pending));
        assert_eq!((metrics.pause.times.get(), metrics.pause.now.get(), budget.sheds()), (2, 2, false));
        share.shrink_memory(1500);
        assert_eq!((poll(&mut first), metrics.pause.now.get()), (Poll::Ready(()), 1));
        assert_eq!((poll(&mut second), metrics.pause.now.get()), (Poll::Ready(()), 0));
    }

    #[test]
    fn the_turn_of_one_who_gives_up_goes_to_the_next() {
        let (budget, _) = budget(RESOURCES);
        let mut share = Share::new(&budget, Direction::Request, None);
        share.grow_memory(1600);
        let [mut first, mut second] = [share.room(), share.room()];
        assert_eq!((poll(&mut first), poll(&mut second)), (Poll::Pending, Poll::Pending));
        share.shrink_memory(101);
        drop(first);
        assert_eq!(poll(&mut second), Poll::Ready(()));
    }

    const SHARED: Resources = Resources { disk: 1_000, files: 4, answers: 0.5, client: 0.5, ..RESOURCES };

    fn accounts<const N: usize>(addresses: [&str; N]) -> [Arc<Account>; N] {
        let accounts = Accounts::new(ClientPrefix::default(), &[], 1);
        addresses.map(|address| accounts.of(address.parse().unwrap()).unwrap())
    }

    #[test]
    fn answers_leave_memory_to_uploads() {
        let (budget, _) = budget(SHARED);
        let [mut answers, mut uploads] =
            [Direction::Response, Direction::Request].map(|direction| Share::new(&budget, direction, None));
        answers.grow_memory(750);
        assert_eq!((answers.spills(), answers.is_full()), (true, true));
        assert_eq!((uploads.spills(), uploads.is_full()), (false, false));
        assert_eq!(poll(&mut uploads.room()), Poll::Ready(()));
        let mut waiting = answers.room();
        assert_eq!(poll(&mut waiting), Poll::Pending);
        uploads.grow_memory(800);
        answers.shrink_memory(750);
        assert_eq!(poll(&mut waiting), Poll::Ready(()));
        assert_eq!((answers.is_full(), budget.memory()), (false, 800));
    }

    #[test]
    fn one_client_leaves_memory_to_others_and_its_answers_to_its_uploads() {
        let (budget, metrics) = budget(SHARED);
        let [one, other] = accounts(["192.0.2.1", "192.0.2.2"]);
        let mut answers = Share::new(&budget, Direction::Response, Some(&one));
        answers.grow_memory(375);
        assert!(answers.is_full() && answers.is_client_full());
        for (direction, account) in [(Direction::Response, &other), (Direction::Request, &one)] {
            let share = Share::new(&budget, direction, Some(account));
            assert!(!share.is_full() && !share.is_client_full());
        }
        assert!(!Share::new(&budget, Direction::Response, None).is_full(), "one who speaks for many clients");
        let [mut first, mut second] = [answers.room(), answers.another().room()];
        assert_eq!((poll(&mut first), poll(&mut second)), (Poll::Pending, Poll::Pending));
        assert_eq!(metrics.pause.now.get(), 2);
        answers.shrink_memory(375);
        assert_eq!((poll(&mut first), poll(&mut second)), (Poll::Ready(()), Poll::Ready(())));
        assert_eq!(metrics.pause.now.get(), 0);
    }

    #[test]
    fn who_waits_at_its_own_share_and_then_at_that_of_all_holds_up_nobody() {
        let (budget, _) = budget(SHARED);
        let [one] = accounts(["192.0.2.1"]);
        let mut others = Share::new(&budget, Direction::Request, None);
        let mut own = Share::new(&budget, Direction::Response, Some(&one));
        own.grow_memory(375);
        let [mut first, mut second] = [own.room(), own.room()];
        assert_eq!((poll(&mut first), poll(&mut second)), (Poll::Pending, Poll::Pending));
        others.grow_memory(1_500);
        own.shrink_memory(375);
        assert_eq!((poll(&mut first), poll(&mut second)), (Poll::Pending, Poll::Pending), "at that of all");
        others.shrink_memory(1_500);
        assert_eq!((poll(&mut first), poll(&mut second)), (Poll::Ready(()), Poll::Ready(())));
        assert_eq!([&budget.memory, &budget.answers_memory].map(|pool| pool.paused.load(Ordering::Relaxed)), [0, 0]);
    }

    #[test]
    fn answers_and_clients_have_a_share_of_the_disk() {
        let (budget, metrics) = budget(SHARED);
        let [one, other] = accounts(["192.0.2.1", "192.0.2.2"]);
        let mut answer = Share::new(&budget, Direction::Response, Some(&one));
        assert_eq!(answer.grow_disk(250), Ok(()));
        assert_eq!(answer.grow_disk(1), Err(Denial::Client));
        assert_eq!(Share::new(&budget, Direction::Response, None).grow_disk(251), Err(Denial::Answers));
        let mut upload = Share::new(&budget, Direction::Request, Some(&one));
        assert_eq!(upload.grow_disk(375), Ok(()), "what answers hold is no upload's");
        assert_eq!(upload.grow_disk(1), Err(Denial::Client));
        let mut others = Share::new(&budget, Direction::Request, Some(&other));
        assert_eq!(others.grow_disk(187), Ok(()));
        assert_eq!(budget.disk(), 812);
        budget.count_denial(Direction::Request, Denial::Client);
        let counted = metrics.denials.map(|denials| denials.map(|denial| denial.get()));
        assert_eq!(counted, [[0, 0, 1, 0, 0], [0; 5]]);
        drop((answer, upload, others));
        let mut again = Share::new(&budget, Direction::Response, Some(&one));
        assert_eq!((again.grow_disk(250), budget.disk()), (Ok(()), 250));
    }

    #[test]
    fn each_file_counts_from_its_first_byte_until_it_is_closed() {
        let (budget, _) = budget(Resources { client: 1.0, ..SHARED });
        let upload = || Share::new(&budget, Direction::Request, None);
        let mut four = [(); 4].map(|()| upload());
        four.iter_mut().for_each(|share| assert_eq!(share.grow_disk(10), Ok(())));
        assert_eq!(upload().grow_disk(10), Err(Denial::Files));
        assert_eq!(four[0].grow_disk(10), Ok(()), "it has one");
        let closing = four[0].split_disk();
        assert_eq!(upload().grow_disk(10), Err(Denial::Files), "it is not closed yet");
        drop(closing);
        assert_eq!(upload().grow_disk(5_000), Err(Denial::All));
        assert_eq!(upload().grow_disk(10), Ok(()));
        drop(four);
        assert_eq!((budget.files.load(Ordering::Relaxed), budget.disk()), (0, 0));
    }

    #[test]
    fn answers_and_clients_have_a_share_of_the_files() {
        let (budget, _) = budget(Resources { files: 8, ..SHARED });
        let [one, other] = accounts(["192.0.2.1", "192.0.2.2"]);
        let file = |direction, account| {
            let mut share = Share::new(&budget, direction, account);
            share.grow_disk(1).map(|()| share)
        };
        let mut held: Vec<_> = (0..4).map(|_| file(Direction::Response, None).unwrap()).collect();
        assert_eq!(file(Direction::Response, Some(&one)).err(), Some(Denial::Files), "half of them are for uploads");
        held.extend((0..2).map(|_| file(Direction::Request, Some(&one)).unwrap()));
        assert_eq!(file(Direction::Request, Some(&one)).err(), Some(Denial::Client));
        held.push(file(Direction::Request, Some(&other)).unwrap());
        drop(held);
        assert_eq!([&budget.files, &budget.answers_files].map(|files| files.load(Ordering::Relaxed)), [0, 0]);
        assert!(file(Direction::Response, Some(&one)).is_ok());
    }

    /// Each takes what would fill the memory, lets others run, and lets go of it.
    async fn everybody_gets_a_turn(budget: Arc<Budget>, waiters: usize, peak_max: u64) {
        let mut share = Share::new(&budget, Direction::Request, None);
        share.grow_memory(RESOURCES.memory);
        let peak = Arc::new(AtomicU64::new(0));
        let tasks: Vec<_> = (0..waiters)
            .map(|_| {
                let (budget, peak) = (budget.clone(), peak.clone());
                tokio::spawn(async move {
                    let mut share = Share::new(&budget, Direction::Response, None);
                    share.room().await;
                    share.grow_memory(RESOURCES.memory);
                    peak.fetch_max(budget.memory(), Ordering::Relaxed);
                    tokio::task::yield_now().await;
                })
            })
            .collect();
        while budget.memory.paused.load(Ordering::Relaxed) < waiters {
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
