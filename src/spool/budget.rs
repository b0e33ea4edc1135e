//! The limits of all spools together in memory and on disk, and the reactions when memory runs short.
//!
//! A spool owns a [`Reservation`] and reports every byte that it takes or releases; the [`Budget`] has the sums. There
//! are three steps as memory fills. *Spill*, from three quarters: spools keep no new bytes in memory that they could
//! write to disk. *Pause*, from fifteen sixteenths: spools take no more bytes until some are released. *Shed*, from the
//! limit, which first pieces can still reach: new exchanges are refused by the proxy.
//!
//! Responses may be limited to a part of all this, so that some is left for uploads, and each client to a part in each
//! direction. The first two steps apply within these parts, too; [`shares`](crate::account::shares) divides the disk.
//!
//! Every piece in a spool passes here twice, so an update is a few atomic operations, without lock or clock. Only a
//! pause takes a lock.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus::IntGauge;

use crate::account::Account;
use crate::account::pool::{Held, Pool, Steps};
use crate::account::shares::{Denial, InUse, Store};
use crate::metrics::{Direction, SpoolMetrics};

/// A future for structures that must be `Sync` for Pingora.
pub type Wait<T> = Pin<Box<dyn Future<Output = T> + Send + Sync>>;

/// The shared resources, and the steps in use.
#[derive(Clone, Debug)]
pub struct Resources {
    /// Maximum number of bytes that spools hold in memory.
    pub memory: u64,
    /// Maximum number of bytes in spool files.
    pub disk: u64,
    /// Maximum number of spool files.
    pub files: u64,
    /// Part of memory and disk that all responses together may use, as a ratio.
    pub answers: f64,
    /// Part of a direction's limit that one client may use, as a ratio.
    pub client: f64,
    /// Whether step spill is used.
    pub spill: bool,
    /// Whether step pause is used.
    pub pause: bool,
    /// Whether step shed is used.
    pub shed: bool,
    /// Maximum time for which a spool waits for memory.
    pub pause_max: Duration,
}

/// The limits and the sums of all spools.
pub struct Budget {
    resources: Resources,
    all: Steps,
    answers: Steps,
    /// Per direction.
    client: [Steps; 2],
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
    /// Creates an unused budget.
    pub fn new(resources: Resources, metrics: SpoolMetrics) -> Arc<Self> {
        let limit = resources.memory;
        metrics.memory_limit.set(signed(limit));
        metrics.disk_limit.set(signed(resources.disk));
        let part = |whole: u64, ratio: f64| if ratio < 1.0 { (whole as f64 * ratio) as u64 } else { whole };
        let answers = part(limit, resources.answers);
        let steps = |limit| Steps::of(limit, resources.spill, resources.pause);
        let client = [limit, answers].map(|whole| steps(part(whole, resources.client)));
        Arc::new(Budget {
            all: steps(limit),
            answers: steps(answers),
            client,
            // As for the other steps: an empty budget refuses no exchange.
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

    /// Total size of the spool files, in bytes.
    pub fn disk(&self) -> u64 {
        self.disk.load(Ordering::Relaxed)
    }

    /// Whether new exchanges should be refused. Report each with [`Budget::count_shed`].
    pub fn sheds(&self) -> bool {
        self.memory() >= self.shed_at
    }

    /// The gauge of clients that are waited for in this direction.
    pub fn slow(&self, direction: Direction) -> &IntGauge {
        &self.metrics.slow[direction as usize]
    }

    /// Maximum wait for memory; zero if step pause is not used.
    pub fn pause_max(&self) -> Duration {
        if self.resources.pause { self.resources.pause_max } else { Duration::ZERO }
    }

    /// Counts a refused exchange.
    pub fn count_shed(&self) {
        self.metrics.shed.times.inc();
    }

    /// Counts a write to disk that only memory pressure caused.
    pub fn count_spill(&self) {
        self.metrics.spill.times.inc();
    }

    /// Counts a spool that gets no more disk, for this reason.
    pub fn count_denial(&self, direction: Direction, denial: Denial) {
        self.metrics.denials[direction as usize][denial as usize].inc();
    }

    fn grow_memory(&self, bytes: u64) {
        let before = self.memory.take(bytes);
        let after = before + bytes;
        if before < self.all.spill_at && after >= self.all.spill_at {
            self.metrics.spill.now.inc();
        }
        if before < self.shed_at && after >= self.shed_at {
            self.metrics.shed.now.inc();
        }
    }

    fn shrink_memory(&self, bytes: u64) {
        let before = self.memory.release(bytes);
        debug_assert!(before >= bytes, "a reservation released more than it had");
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

/// Counts a spool that waits for memory.
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

/// The owner of held bytes.
#[derive(Clone)]
struct Owner {
    budget: Arc<Budget>,
    direction: Direction,
    account: Option<Arc<Account>>,
}

impl Owner {
    /// The client's held bytes in this direction; `None` if it has no account.
    fn held(&self) -> Option<&Held> {
        self.account.as_ref().map(|account| account.held(self.direction))
    }

    /// The owner's pools, except the pool of all spools.
    fn narrower(&self) -> impl Iterator<Item = (&Pool, Steps)> {
        let Owner { budget, direction, .. } = self;
        let answers = (*direction == Direction::Response).then_some((&budget.answers_memory, budget.answers));
        let client = self.held().map(|held| (&held.memory, budget.client[*direction as usize]));
        answers.into_iter().chain(client)
    }

    fn pools(&self) -> impl Iterator<Item = (&Pool, Steps)> {
        self.narrower().chain([(&self.budget.memory, self.budget.all)])
    }

    fn is_full(&self) -> bool {
        self.pools().any(|(pool, steps)| pool.used() >= steps.full_at)
    }

    /// Releases this many bytes of memory.
    fn shrink_memory(&self, bytes: u64) {
        self.budget.shrink_memory(bytes);
        for (pool, steps) in self.narrower() {
            pool.release(bytes);
            pool.wake(steps);
        }
    }

    /// Takes bytes of disk for a spool that already has `spool` bytes, and a file if it has none.
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

    /// Releases the disk of one file.
    fn shrink_disk(&self, bytes: u64) {
        self.budget.disk.fetch_sub(bytes, Ordering::Relaxed);
        self.budget.files.fetch_sub(1, Ordering::Relaxed);
        for (disk, files) in self.narrower_disk() {
            disk.fetch_sub(bytes, Ordering::Relaxed);
            files.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// The owner's counters for disk and files, except those of all spools.
    fn narrower_disk(&self) -> impl Iterator<Item = (&AtomicU64, &AtomicU64)> {
        let Owner { budget, direction, .. } = self;
        let answers = (*direction == Direction::Response).then_some((&budget.answers_disk, &budget.answers_files));
        answers.into_iter().chain(self.held().map(|held| (&held.disk, &held.files)))
    }
}

/// Adds `more` to a counter if `admits` permits it.
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

/// The part of the budget that one spool holds; released on drop.
pub struct Reservation {
    owner: Owner,
    memory: u64,
    disk: u64,
}

impl Reservation {
    /// Creates an empty reservation, on the account of a client if it has one.
    pub fn new(budget: &Arc<Budget>, direction: Direction, account: Option<&Arc<Account>>) -> Self {
        let owner = Owner { budget: budget.clone(), direction, account: account.cloned() };
        Reservation { owner, memory: 0, disk: 0 }
    }

    /// Creates another empty reservation of the same owner.
    pub fn another(&self) -> Self {
        self.part(0, 0)
    }

    fn part(&self, memory: u64, disk: u64) -> Self {
        Reservation { owner: self.owner.clone(), memory, disk }
    }

    /// Bytes in memory.
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// Bytes that the file may have.
    pub fn disk(&self) -> u64 {
        self.disk
    }

    /// Whether bytes that could be written to disk should not be kept in memory.
    pub fn spills(&self) -> bool {
        self.owner.pools().any(|(pool, steps)| pool.used() >= steps.spill_at)
    }

    /// Whether the owner may take no more memory. Without step pause this is the full limit, and there is no wait, see
    /// [`Budget::pause_max`].
    pub fn is_full(&self) -> bool {
        self.owner.is_full()
    }

    /// Whether the client has reached its own limit of memory.
    pub fn is_client_full(&self) -> bool {
        let steps = self.owner.budget.client[self.owner.direction as usize];
        self.owner.held().is_some_and(|held| held.memory.used() >= steps.full_at)
    }

    /// Ends when memory is available, at once if it already is. Counts as a pause from its first poll until it ends or
    /// is dropped.
    ///
    /// Waiters are woken one after the other while there is room: take the memory before the next wait, or check
    /// [`Reservation::is_full`] again.
    pub fn room(&self) -> Wait<()> {
        let owner = self.owner.clone();
        Box::pin(async move {
            if !owner.is_full() {
                return;
            }
            let _pausing = Pausing::enter(&owner.budget.metrics);
            while let Some((pool, steps)) = owner.pools().find(|(pool, steps)| pool.is_full_for_certain(*steps)) {
                pool.room(steps).await;
            }
        })
    }

    /// Takes bytes of memory. It always succeeds, since the bytes already exist: check [`Reservation::is_full`] before
    /// receiving them.
    pub fn grow_memory(&mut self, bytes: u64) {
        self.memory += bytes;
        let Owner { budget, .. } = &self.owner;
        self.gauge(&budget.metrics.memory).add(signed(bytes));
        budget.grow_memory(bytes);
        for (pool, _) in self.owner.narrower() {
            pool.take(bytes);
        }
    }

    /// Releases this many bytes of memory.
    pub fn shrink_memory(&mut self, bytes: u64) {
        debug_assert!(self.memory >= bytes, "a spool released more than it had");
        let bytes = bytes.min(self.memory);
        if bytes == 0 {
            return;
        }
        self.memory -= bytes;
        self.gauge(&self.owner.budget.metrics.memory).sub(signed(bytes));
        self.owner.shrink_memory(bytes);
    }

    /// Takes this many bytes of disk, or none.
    ///
    /// # Errors
    ///
    /// The limit that prevents it.
    pub fn grow_disk(&mut self, bytes: u64) -> Result<(), Denial> {
        if bytes == 0 {
            return Ok(());
        }
        self.owner.grow_disk(bytes, self.disk)?;
        self.disk += bytes;
        self.gauge(&self.owner.budget.metrics.disk).add(signed(bytes));
        Ok(())
    }

    /// Moves bytes of memory into a reservation of their own, for their new holder.
    pub fn split_memory(&mut self, bytes: u64) -> Reservation {
        debug_assert!(self.memory >= bytes, "a spool gave away more than it had");
        let bytes = bytes.min(self.memory);
        self.memory -= bytes;
        self.part(bytes, 0)
    }

    /// Moves all of the disk into a reservation of its own.
    pub fn split_disk(&mut self) -> Reservation {
        let disk = std::mem::take(&mut self.disk);
        self.part(0, disk)
    }

    /// Adds the memory of another reservation of the same owner.
    pub fn join(&mut self, mut other: Reservation) {
        debug_assert!(self.owner.direction == other.owner.direction && other.disk == 0);
        self.memory += std::mem::take(&mut other.memory);
    }

    fn gauge<'a>(&self, gauges: &'a [IntGauge; 2]) -> &'a IntGauge {
        &gauges[self.owner.direction as usize]
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let memory = self.memory;
        self.shrink_memory(memory);
        if self.disk > 0 {
            self.gauge(&self.owner.budget.metrics.disk).sub(signed(self.disk));
            self.owner.shrink_disk(self.disk);
        }
    }
}

/// The value for a gauge.
fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll, Waker};

    use super::*;
    use crate::account::Accounts;
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
        let mut request = Reservation::new(&budget, Direction::Request, None);
        let mut response = Reservation::new(&budget, Direction::Response, None);
        request.grow_memory(100);
        response.grow_memory(30);
        response.shrink_memory(10);
        assert_eq!(response.grow_disk(600), Ok(()));
        let (part, file) = (request.split_memory(40), response.split_disk());
        assert_eq!(gauges(), [[100, 20], [0, 600]]);
        assert_eq!((budget.memory(), budget.disk()), (120, 600));
        drop(part);
        assert_eq!((request.memory(), budget.memory()), (60, 80));
        request.join(Reservation::new(&budget, Direction::Request, None));
        drop((request, response));
        assert_eq!(gauges(), [[0, 0], [0, 600]]);
        drop(file);
        assert_eq!((gauges(), budget.memory(), budget.disk()), ([[0, 0], [0, 0]], 0, 0));
    }

    #[test]
    fn the_disk_ends_at_its_limit() {
        let (budget, _) = budget(RESOURCES);
        let [mut one, mut other] = [(); 2].map(|()| Reservation::new(&budget, Direction::Request, None));
        assert_eq!(one.grow_disk(900), Ok(()));
        assert_eq!(other.grow_disk(101), Err(Denial::All));
        assert_eq!(other.grow_disk(100), Ok(()));
        drop(one);
        assert_eq!(other.grow_disk(900), Ok(()));
    }

    #[test]
    fn the_rungs_are_climbed_one_after_the_other() {
        let (budget, metrics) = budget(RESOURCES);
        let mut reservation = Reservation::new(&budget, Direction::Request, None);
        let probe = Reservation::new(&budget, Direction::Response, None);
        let now = || [probe.spills(), probe.is_full(), budget.sheds()];
        let gauges = || [metrics.spill.now.get(), metrics.shed.now.get()];
        let mut climb = |to: u64| {
            let memory = reservation.memory();
            reservation.grow_memory(to.saturating_sub(memory));
            reservation.shrink_memory(memory.saturating_sub(to));
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
        let mut reservation = Reservation::new(&budget, Direction::Request, None);
        reservation.grow_memory(5000);
        assert_eq!((reservation.spills(), budget.sheds(), reservation.is_full()), (false, false, true));
        assert_eq!((metrics.spill.now.get(), metrics.shed.now.get()), (0, 0));
        assert_eq!(budget.pause_max(), Duration::ZERO);
    }

    #[test]
    fn whoever_pauses_is_counted_until_there_is_memory() {
        let (budget, metrics) = budget(RESOURCES);
        let mut reservation = Reservation::new(&budget, Direction::Request, None);
        reservation.grow_memory(1500);
        let [mut first, mut second] = [reservation.room(), reservation.room()];
        assert_eq!((poll(&mut first), poll(&mut second)), (Poll::Pending, Poll::Pending));
        assert_eq!((metrics.pause.times.get(), metrics.pause.now.get(), budget.sheds()), (2, 2, false));
        reservation.shrink_memory(1500);
        assert_eq!((poll(&mut first), metrics.pause.now.get()), (Poll::Ready(()), 1));
        assert_eq!((poll(&mut second), metrics.pause.now.get()), (Poll::Ready(()), 0));
    }

    #[test]
    fn the_turn_of_one_who_gives_up_goes_to_the_next() {
        let (budget, _) = budget(RESOURCES);
        let mut reservation = Reservation::new(&budget, Direction::Request, None);
        reservation.grow_memory(1600);
        let [mut first, mut second] = [reservation.room(), reservation.room()];
        assert_eq!((poll(&mut first), poll(&mut second)), (Poll::Pending, Poll::Pending));
        reservation.shrink_memory(101);
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
            [Direction::Response, Direction::Request].map(|direction| Reservation::new(&budget, direction, None));
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
        let mut answers = Reservation::new(&budget, Direction::Response, Some(&one));
        answers.grow_memory(375);
        assert!(answers.is_full() && answers.is_client_full());
        for (direction, account) in [(Direction::Response, &other), (Direction::Request, &one)] {
            let reservation = Reservation::new(&budget, direction, Some(account));
            assert!(!reservation.is_full() && !reservation.is_client_full());
        }
        assert!(!Reservation::new(&budget, Direction::Response, None).is_full(), "one who speaks for many clients");
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
        let mut others = Reservation::new(&budget, Direction::Request, None);
        let mut own = Reservation::new(&budget, Direction::Response, Some(&one));
        own.grow_memory(375);
        let [mut first, mut second] = [own.room(), own.room()];
        assert_eq!((poll(&mut first), poll(&mut second)), (Poll::Pending, Poll::Pending));
        others.grow_memory(1_500);
        own.shrink_memory(375);
        assert_eq!((poll(&mut first), poll(&mut second)), (Poll::Pending, Poll::Pending), "at that of all");
        others.shrink_memory(1_500);
        assert_eq!((poll(&mut first), poll(&mut second)), (Poll::Ready(()), Poll::Ready(())));
        assert_eq!([&budget.memory, &budget.answers_memory].map(|pool| pool.paused()), [0, 0]);
    }

    #[test]
    fn answers_and_clients_have_a_share_of_the_disk() {
        let (budget, metrics) = budget(SHARED);
        let [one, other] = accounts(["192.0.2.1", "192.0.2.2"]);
        let mut answer = Reservation::new(&budget, Direction::Response, Some(&one));
        assert_eq!(answer.grow_disk(250), Ok(()));
        assert_eq!(answer.grow_disk(1), Err(Denial::Client));
        assert_eq!(Reservation::new(&budget, Direction::Response, None).grow_disk(251), Err(Denial::Answers));
        let mut upload = Reservation::new(&budget, Direction::Request, Some(&one));
        assert_eq!(upload.grow_disk(375), Ok(()), "what answers hold is no upload's");
        assert_eq!(upload.grow_disk(1), Err(Denial::Client));
        let mut others = Reservation::new(&budget, Direction::Request, Some(&other));
        assert_eq!(others.grow_disk(187), Ok(()));
        assert_eq!(budget.disk(), 812);
        budget.count_denial(Direction::Request, Denial::Client);
        let counted = metrics.denials.map(|denials| denials.map(|denial| denial.get()));
        assert_eq!(counted, [[0, 0, 1, 0, 0], [0; 5]]);
        drop((answer, upload, others));
        let mut again = Reservation::new(&budget, Direction::Response, Some(&one));
        assert_eq!((again.grow_disk(250), budget.disk()), (Ok(()), 250));
    }

    #[test]
    fn each_file_counts_from_its_first_byte_until_it_is_closed() {
        let (budget, _) = budget(Resources { client: 1.0, ..SHARED });
        let upload = || Reservation::new(&budget, Direction::Request, None);
        let mut four = [(); 4].map(|()| upload());
        four.iter_mut().for_each(|reservation| assert_eq!(reservation.grow_disk(10), Ok(())));
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
            let mut reservation = Reservation::new(&budget, direction, account);
            reservation.grow_disk(1).map(|()| reservation)
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

    /// Each waiter takes what fills the memory, yields, and releases it.
    async fn everybody_gets_a_turn(budget: Arc<Budget>, waiters: usize, peak_max: u64) {
        let mut reservation = Reservation::new(&budget, Direction::Request, None);
        reservation.grow_memory(RESOURCES.memory);
        let peak = Arc::new(AtomicU64::new(0));
        let tasks: Vec<_> = (0..waiters)
            .map(|_| {
                let (budget, peak) = (budget.clone(), peak.clone());
                tokio::spawn(async move {
                    let mut reservation = Reservation::new(&budget, Direction::Response, None);
                    reservation.room().await;
                    reservation.grow_memory(RESOURCES.memory);
                    peak.fetch_max(budget.memory(), Ordering::Relaxed);
                    tokio::task::yield_now().await;
                })
            })
            .collect();
        while budget.memory.paused() < waiters {
            tokio::task::yield_now().await;
        }
        drop(reservation);
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
