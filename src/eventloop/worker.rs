//! What each worker is doing now: a word of memory that the worker writes and others read.
//!
//! An exchange's future, its phase and a called filter set it in passing: plain stores to memory that only this
//! worker writes. So a blocked thread can still be inspected.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::{Handle, Id, RuntimeFlavor};

use crate::metrics::LOOP;
use crate::party::pauses::Pauses;
use crate::phase::Phase;
use crate::phase::journal::{self, Cycle};

/// Where time is spent: a phase, or a filter in it. The set of names is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PhaseOrFilter(u16);

/// Filter keys and labels in order of first use. Their number is bounded by the configurations of this process.
static FILTERS: Mutex<Vec<&'static str>> = Mutex::new(Vec::new());

impl PhaseOrFilter {
    /// A phase.
    pub const fn phase(phase: Phase) -> PhaseOrFilter {
        PhaseOrFilter(phase as u16 + 1)
    }

    /// A filter, by its YAML key or its own label. Call once, at build time: new labels are never freed.
    pub fn filter(label: &str) -> PhaseOrFilter {
        let mut filters = lock(&FILTERS);
        let place = filters.iter().position(|&known| known == label).unwrap_or_else(|| {
            filters.push(Box::leak(Box::from(label)));
            filters.len() - 1
        });
        PhaseOrFilter(u16::try_from(Phase::COUNT + 1 + place).unwrap_or(0))
    }

    /// The name of the phase or the key of the filter.
    pub fn name(self) -> &'static str {
        let place = usize::from(self.0);
        match place.checked_sub(1) {
            None => LOOP,
            Some(phase) if phase < Phase::COUNT => Phase::ALL[phase].name(),
            Some(filter) => lock(&FILTERS).get(filter - Phase::COUNT).copied().unwrap_or(LOOP),
        }
    }
}

/// Registers a route's name for use in an [`Activity`], until this is dropped.
#[derive(Debug)]
pub struct RouteTag(u32);

static ROUTES: Mutex<BTreeMap<u32, Arc<str>>> = Mutex::new(BTreeMap::new());
static TAGS: AtomicU32 = AtomicU32::new(1);

impl RouteTag {
    /// A tag for the route of this name. Call once, at build time.
    pub fn new(name: &str) -> RouteTag {
        let tag = TAGS.fetch_add(1, Ordering::Relaxed);
        lock(&ROUTES).insert(tag, name.into());
        RouteTag(tag)
    }
}

impl Drop for RouteTag {
    fn drop(&mut self) {
        lock(&ROUTES).remove(&self.0);
    }
}

/// Locked at build time or for reports, never on the request path.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where an exchange is: its [`PhaseOrFilter`], and its route once one is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity(u64);

impl Activity {
    /// An exchange without a route yet.
    pub const fn at(place: PhaseOrFilter) -> Activity {
        Activity(place.0 as u64)
    }

    fn with_place(self, place: PhaseOrFilter) -> Activity {
        Activity(self.0 & !0xffff | u64::from(place.0))
    }

    fn with_route(self, tag: &RouteTag) -> Activity {
        Activity(self.0 & 0xffff | u64::from(tag.0) << 16)
    }

    /// Where it is.
    pub fn place(self) -> PhaseOrFilter {
        PhaseOrFilter(self.0 as u16)
    }

    /// The name of its route, if it has one that still exists.
    pub fn route(self) -> Option<Arc<str>> {
        lock(&ROUTES).get(&((self.0 >> 16) as u32)).cloned()
    }
}

/// One worker thread. It has its own cache line: its thread writes often, others read rarely.
#[derive(Debug)]
#[repr(align(128))]
pub struct Worker {
    /// Its number, from 0.
    pub index: usize,
    /// Its number among those of its runtime.
    place: usize,
    epoch: Instant,
    /// An [`Activity`]; zero while no exchange is polled.
    doing: AtomicU64,
    /// When the present poll began, in nanoseconds since the epoch.
    since: AtomicU64,
    /// Total lag of its loop in nanoseconds, as far as the heartbeat has seen it.
    lag: AtomicU64,
    /// When it did not run.
    pub(super) pauses: Pauses,
}

impl Worker {
    pub(super) fn new(index: usize, place: usize, epoch: Instant) -> Self {
        let zero = || AtomicU64::new(0);
        let (doing, since, lag, pauses) = (zero(), zero(), zero(), Pauses::new(epoch));
        Worker { index, place, epoch, doing, since, lag, pauses }
    }

    /// A poll begins. Returns the previous activity, which is zero unless futures are nested.
    pub fn begin(&self, activity: Activity, now: Instant) -> Activity {
        let outer = self.activity();
        self.since.store(nanos(now.saturating_duration_since(self.epoch)), Ordering::Relaxed);
        self.set(activity);
        outer
    }

    /// The poll ends. Returns the exchange's current activity.
    pub fn end(&self, outer: Activity) -> Activity {
        let activity = self.activity();
        self.set(outer);
        activity
    }

    /// What is being polled, and for how long; `None` if no exchange is.
    pub fn doing(&self, now: Instant) -> Option<(Activity, Duration)> {
        let activity = Activity(self.doing.load(Ordering::Acquire));
        let since = self.epoch + Duration::from_nanos(self.since.load(Ordering::Relaxed));
        (activity != Activity::default()).then(|| (activity, now.saturating_duration_since(since)))
    }

    /// Sets the total lag.
    pub(super) fn set_lag(&self, lag: Duration) {
        self.lag.store(nanos(lag), Ordering::Relaxed);
    }

    /// Sets when the next round of the heartbeat is due; `None`: there is none. Call it after
    /// [`Worker::set_lag`], which counts the delay of this round.
    pub(super) fn expect_round(&self, due: Option<Instant>) {
        self.pauses.expect_round(due);
    }

    /// The total lag by `now`. If the heartbeat itself is overdue, the process was suspended or has no CPU, and what
    /// the heartbeat has not counted yet is part of it.
    fn lag(&self, now: Instant) -> Duration {
        let overdue = self.pauses.overdue(now);
        Duration::from_nanos(self.lag.load(Ordering::Relaxed)) + overdue
    }

    fn activity(&self) -> Activity {
        Activity(self.doing.load(Ordering::Relaxed))
    }

    /// Releases `since`, so that a reader of the activity never combines it with an older time.
    fn set(&self, activity: Activity) {
        self.doing.store(activity.0, Ordering::Release);
    }
}

pub(super) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

thread_local! {
    static HERE: Cell<Option<&'static Worker>> = const { Cell::new(None) };
}

/// The workers of a runtime.
struct RuntimeWorkers {
    runtime: Id,
    /// One worker, or one per thread of the runtime.
    workers: Vec<&'static Worker>,
    #[cfg(not(tokio_unstable))]
    joined: std::sync::atomic::AtomicUsize,
}

static RUNTIMES: Mutex<Vec<RuntimeWorkers>> = Mutex::new(Vec::new());

/// Registers the workers of this runtime's threads.
pub(super) fn register(runtime: Id, workers: Vec<&'static Worker>) {
    lock(&RUNTIMES).push(RuntimeWorkers {
        runtime,
        workers,
        #[cfg(not(tokio_unstable))]
        joined: Default::default(),
    });
}

/// Unregisters workers, because another runtime may reuse their runtime's id.
pub(super) fn dismiss(workers: &[&'static Worker]) {
    lock(&RUNTIMES)
        .retain(|runtime| !runtime.workers.iter().any(|one| workers.iter().any(|other| std::ptr::eq(*one, *other))));
}

/// The worker of this thread. `None` on other threads.
#[inline]
pub fn here() -> Option<&'static Worker> {
    HERE.get().or_else(join)
}

/// The slow path: each thread looks up its worker once.
#[cold]
fn join() -> Option<&'static Worker> {
    let handle = Handle::try_current().ok()?;
    let runtimes = lock(&RUNTIMES);
    let runtime = runtimes.iter().find(|runtime| runtime.runtime == handle.id())?;
    let place = match handle.runtime_flavor() {
        RuntimeFlavor::CurrentThread => 0,
        _ => thread_number(runtime)?,
    };
    let worker = runtime.workers.get(place).copied();
    HERE.set(worker);
    if let Some(worker) = worker {
        worker.pauses.are_of_this_thread();
    }
    worker
}

/// Tokio's index of this thread, as in its metrics; `None` outside its workers.
#[cfg(tokio_unstable)]
fn thread_number(_: &RuntimeWorkers) -> Option<usize> {
    tokio::runtime::worker_index()
}

/// Tokio does not expose its index, so threads are numbered in order of arrival; tokio's figures may then belong to
/// another worker.
#[cfg(not(tokio_unstable))]
fn thread_number(runtime: &RuntimeWorkers) -> Option<usize> {
    Some(runtime.joined.fetch_add(1, Ordering::Relaxed))
}

/// The total lag of this thread's loop by `now`: its own stalls, and the time for which the process was suspended. If
/// workers share their tasks, only the latter. Zero on other threads.
pub fn lag(now: Instant) -> Duration {
    here().map_or(Duration::ZERO, |worker| worker.lag(now))
}

/// The pauses of this thread's loop. `None` on threads that are not workers.
pub fn pauses() -> Option<&'static Pauses> {
    here().map(|worker| &worker.pauses)
}

/// The current cycle of this thread's loop. `None` on threads that are not workers.
pub fn cycle() -> Option<Cycle> {
    let worker = here()?;
    let metrics = Handle::try_current().ok()?.metrics();
    #[cfg(tokio_unstable)]
    let events = Some(metrics.io_driver_ready_count());
    #[cfg(not(tokio_unstable))]
    let events = None;
    Some(Cycle { worker: worker.index, number: metrics.worker_park_count(worker.place), events })
}

/// The same, but only if journals are wanted, since the exchange is not known yet.
#[inline]
pub fn cycle_if_wanted() -> Option<Cycle> {
    if journal::wanted() { cycle() } else { None }
}

/// The exchange that is being polled enters `phase`.
#[inline]
pub fn enter(phase: Phase) {
    if let Some(worker) = HERE.get() {
        worker.set(worker.activity().with_place(PhaseOrFilter::phase(phase)));
    }
}

/// The exchange that is being polled has a route now.
#[inline]
pub fn take_route(tag: &RouteTag) {
    if let Some(worker) = HERE.get() {
        worker.set(worker.activity().with_route(tag));
    }
}

/// Runs `call` and attributes its time to `place`.
#[inline]
pub(super) fn at<T>(place: PhaseOrFilter, call: impl FnOnce() -> T) -> T {
    let Some(worker) = HERE.get() else { return call() };
    let outer = worker.activity();
    worker.set(outer.with_place(place));
    let done = call();
    worker.set(outer);
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_names_spot_and_route() {
        let (route, gone) = (RouteTag::new("shop"), RouteTag::new("old"));
        let filter = PhaseOrFilter::filter("worker_test");
        assert_eq!(PhaseOrFilter::filter("worker_test"), filter);

        let activity = Activity::at(PhaseOrFilter::phase(Phase::Header));
        assert_eq!((activity.place().name(), activity.route()), ("header", None));
        let activity = activity.with_route(&route).with_place(filter);
        assert_eq!((activity.place().name(), activity.route().as_deref()), ("worker_test", Some("shop")));
        let activity = activity.with_route(&gone).with_place(PhaseOrFilter::phase(Phase::Finish));
        drop(gone);
        assert_eq!((activity.place().name(), activity.route()), ("finish", None));
        assert_eq!(Activity::default().place().name(), LOOP);
    }

    #[test]
    fn a_worker_tells_what_is_polled_and_for_how_long() {
        let begin = Instant::now();
        let worker = Worker::new(0, 0, begin);
        let ms = Duration::from_millis;
        assert_eq!(worker.doing(begin + ms(5)), None);
        let activity = Activity::at(PhaseOrFilter::phase(Phase::Route));
        let outer = worker.begin(activity, begin + ms(10));
        assert_eq!(worker.doing(begin + ms(15)), Some((activity, ms(5))));
        assert_eq!(worker.end(outer), activity);
        assert_eq!(worker.doing(begin + ms(20)), None);
    }

    #[test]
    fn a_process_that_was_suspended_knows_it_before_the_next_round() {
        let begin = Instant::now();
        let worker = Worker::new(0, 0, begin);
        let ms = Duration::from_millis;
        assert_eq!(worker.lag(begin + ms(60_000)), ms(0), "there is no heartbeat");
        worker.set_lag(ms(30));
        worker.expect_round(Some(begin + ms(100)));
        assert_eq!(worker.lag(begin + ms(119)), ms(30));
        assert_eq!(worker.lag(begin + ms(3_100)), ms(3_030));
        worker.set_lag(ms(3_031));
        worker.expect_round(Some(begin + ms(3_111)));
        assert_eq!(worker.lag(begin + ms(3_102)), ms(3_031), "the heartbeat has counted it");
        worker.expect_round(None);
        assert_eq!(worker.lag(begin + ms(60_000)), ms(3_031), "there is none any more");
    }

    #[test]
    fn the_spot_of_a_call_ends_with_it() {
        let worker: &'static Worker = Box::leak(Box::new(Worker::new(0, 0, Instant::now())));
        HERE.set(Some(worker));
        let outer = worker.begin(Activity::at(PhaseOrFilter::phase(Phase::Route)), Instant::now());
        let inside = at(PhaseOrFilter::filter("worker_test"), || worker.activity().place().name());
        assert_eq!((inside, worker.activity().place().name()), ("worker_test", "route"));
        enter(Phase::Select);
        assert_eq!(worker.end(outer).place().name(), "select");
        HERE.set(None);
    }
}
