//! What runs on a worker just now: a word for each, which the worker writes and others read.
//!
//! An exchange's future, the phase it is in and the filter that is called set it in passing: plain stores to memory
//! that only this worker writes. So a thread that stands still can be asked what it is doing.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::{Handle, Id, RuntimeFlavor};

use crate::metrics::LOOP;
use crate::phase::Phase;
use crate::phase::journal::{self, Cycle};

/// Where time is spent: a phase, or a filter that runs in it. Its name comes from a closed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spot(u16);

/// The keys and labels of filters that were met, in the order in which they were; there are as many as configurations
/// of this process have named.
static FILTERS: Mutex<Vec<&'static str>> = Mutex::new(Vec::new());

impl Spot {
    /// A phase.
    pub const fn phase(phase: Phase) -> Spot {
        Spot(phase as u16 + 1)
    }

    /// A filter, by its key in YAML or its own label. Ask once, when it is built: a new one is kept for ever.
    pub fn filter(label: &str) -> Spot {
        let mut filters = lock(&FILTERS);
        let place = filters.iter().position(|&known| known == label).unwrap_or_else(|| {
            filters.push(Box::leak(Box::from(label)));
            filters.len() - 1
        });
        Spot(u16::try_from(Phase::COUNT + 1 + place).unwrap_or(0))
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

/// Names a route in a [`Word`] for as long as this lives.
#[derive(Debug)]
pub struct RouteTag(u32);

static ROUTES: Mutex<BTreeMap<u32, Arc<str>>> = Mutex::new(BTreeMap::new());
static TAGS: AtomicU32 = AtomicU32::new(1);

impl RouteTag {
    /// A tag for the route of this name. Ask once, when it is built.
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

/// Held for a look-up, where something is built or told; never on the way of a request.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What an exchange is at: its [`Spot`] and its route, if it has one yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Word(u64);

impl Word {
    /// An exchange that has no route yet.
    pub const fn at(spot: Spot) -> Word {
        Word(spot.0 as u64)
    }

    fn with_spot(self, spot: Spot) -> Word {
        Word(self.0 & !0xffff | u64::from(spot.0))
    }

    fn with_route(self, tag: &RouteTag) -> Word {
        Word(self.0 & 0xffff | u64::from(tag.0) << 16)
    }

    /// Where it is.
    pub fn spot(self) -> Spot {
        Spot(self.0 as u16)
    }

    /// The name of its route, if it has one that is still there.
    pub fn route(self) -> Option<Arc<str>> {
        lock(&ROUTES).get(&((self.0 >> 16) as u32)).cloned()
    }
}

/// One worker thread. On a cache line of its own: its thread writes all the time, others seldom look.
#[derive(Debug)]
#[repr(align(128))]
pub struct Worker {
    /// Its number, from 0.
    pub index: usize,
    /// Its number among those of its runtime.
    place: usize,
    epoch: Instant,
    /// A [`Word`]; zero while no exchange is polled.
    doing: AtomicU64,
    /// When the present poll began, in nanoseconds since the epoch.
    since: AtomicU64,
    /// Nanoseconds by which its loop was late, all stalls together, as far as the heartbeat has seen them.
    lag: AtomicU64,
}

impl Worker {
    pub(super) fn new(index: usize, place: usize, epoch: Instant) -> Self {
        Worker { index, place, epoch, doing: AtomicU64::new(0), since: AtomicU64::new(0), lag: AtomicU64::new(0) }
    }

    /// An exchange is polled from now on. Gives what was polled before, which is nothing unless futures are nested.
    pub(super) fn begin(&self, word: Word, now: Instant) -> Word {
        let outer = self.word();
        self.since.store(nanos(now.saturating_duration_since(self.epoch)), Ordering::Relaxed);
        self.set(word);
        outer
    }

    /// The poll is over. Gives what the exchange is at.
    pub(super) fn end(&self, outer: Word) -> Word {
        let word = self.word();
        self.set(outer);
        word
    }

    /// What is polled now, and for how long it has been; `None` if no exchange is.
    pub fn doing(&self, now: Instant) -> Option<(Word, Duration)> {
        let word = Word(self.doing.load(Ordering::Acquire));
        let since = self.epoch + Duration::from_nanos(self.since.load(Ordering::Relaxed));
        (word != Word::default()).then(|| (word, now.saturating_duration_since(since)))
    }

    /// Its loop has been late by so much, all stalls together.
    pub(super) fn set_lag(&self, lag: Duration) {
        self.lag.store(nanos(lag), Ordering::Relaxed);
    }

    fn word(&self) -> Word {
        Word(self.doing.load(Ordering::Relaxed))
    }

    /// Releases `since`, so that whoever sees the word does not take the time of an earlier one for its own.
    fn set(&self, word: Word) {
        self.doing.store(word.0, Ordering::Release);
    }
}

pub(super) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

thread_local! {
    static HERE: Cell<Option<&'static Worker>> = const { Cell::new(None) };
}

/// The workers of a runtime.
struct Crew {
    runtime: Id,
    /// One, or as many as the runtime has threads.
    workers: Vec<&'static Worker>,
    #[cfg(not(tokio_unstable))]
    joined: std::sync::atomic::AtomicUsize,
}

static CREWS: Mutex<Vec<Crew>> = Mutex::new(Vec::new());

/// Says whose workers the threads of this runtime are.
pub(super) fn enrol(runtime: Id, workers: Vec<&'static Worker>) {
    lock(&CREWS).push(Crew {
        runtime,
        workers,
        #[cfg(not(tokio_unstable))]
        joined: Default::default(),
    });
}

/// These threads are nobody's any more; another runtime may get the number of theirs.
pub(super) fn dismiss(workers: &[&'static Worker]) {
    lock(&CREWS).retain(|crew| !crew.workers.iter().any(|one| workers.iter().any(|other| std::ptr::eq(*one, *other))));
}

/// The worker whose thread this is. `None` on other threads.
#[inline]
pub fn here() -> Option<&'static Worker> {
    HERE.get().or_else(join)
}

/// A thread finds its worker once.
#[cold]
fn join() -> Option<&'static Worker> {
    let handle = Handle::try_current().ok()?;
    let crews = lock(&CREWS);
    let crew = crews.iter().find(|crew| crew.runtime == handle.id())?;
    let place = match handle.runtime_flavor() {
        RuntimeFlavor::CurrentThread => 0,
        _ => thread_number(crew)?,
    };
    let worker = crew.workers.get(place).copied();
    HERE.set(worker);
    worker
}

/// Tokio's number of this thread, which its figures go by; `None` outside of its workers.
#[cfg(tokio_unstable)]
fn thread_number(_: &Crew) -> Option<usize> {
    tokio::runtime::worker_index()
}

/// Tokio does not tell, so threads are numbered as they come; its own figures may be those of another one.
#[cfg(not(tokio_unstable))]
fn thread_number(crew: &Crew) -> Option<usize> {
    Some(crew.joined.fetch_add(1, Ordering::Relaxed))
}

/// By how much the loop of this thread has been late since it began, all stalls together. Zero on threads that are no
/// workers, and where workers share their tasks.
pub fn lag() -> Duration {
    here().map_or(Duration::ZERO, |worker| Duration::from_nanos(worker.lag.load(Ordering::Relaxed)))
}

/// The cycle of the loop that this thread is in. `None` on threads that are no workers.
pub fn cycle() -> Option<Cycle> {
    let worker = here()?;
    let metrics = Handle::try_current().ok()?.metrics();
    #[cfg(tokio_unstable)]
    let events = Some(metrics.io_driver_ready_count());
    #[cfg(not(tokio_unstable))]
    let events = None;
    Some(Cycle { worker: worker.index, number: metrics.worker_park_count(worker.place), events })
}

/// The same if somebody wants journals, whose exchanges are not known yet.
#[inline]
pub fn cycle_if_wanted() -> Option<Cycle> {
    if journal::wanted() { cycle() } else { None }
}

/// The exchange that is polled here goes on to `phase`.
#[inline]
pub fn enter(phase: Phase) {
    if let Some(worker) = HERE.get() {
        worker.set(worker.word().with_spot(Spot::phase(phase)));
    }
}

/// The exchange that is polled here has found its route.
#[inline]
pub fn take_route(tag: &RouteTag) {
    if let Some(worker) = HERE.get() {
        worker.set(worker.word().with_route(tag));
    }
}

/// Runs `call` as what happens at `spot`.
#[inline]
pub(super) fn at<T>(spot: Spot, call: impl FnOnce() -> T) -> T {
    let Some(worker) = HERE.get() else { return call() };
    let outer = worker.word();
    worker.set(outer.with_spot(spot));
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
        let filter = Spot::filter("worker_test");
        assert_eq!(Spot::filter("worker_test"), filter);

        let word = Word::at(Spot::phase(Phase::Header));
        assert_eq!((word.spot().name(), word.route()), ("header", None));
        let word = word.with_route(&route).with_spot(filter);
        assert_eq!((word.spot().name(), word.route().as_deref()), ("worker_test", Some("shop")));
        let word = word.with_route(&gone).with_spot(Spot::phase(Phase::Finish));
        drop(gone);
        assert_eq!((word.spot().name(), word.route()), ("finish", None));
        assert_eq!(Word::default().spot().name(), LOOP);
    }

    #[test]
    fn a_worker_tells_what_is_polled_and_for_how_long() {
        let begin = Instant::now();
        let worker = Worker::new(0, 0, begin);
        let ms = Duration::from_millis;
        assert_eq!(worker.doing(begin + ms(5)), None);
        let word = Word::at(Spot::phase(Phase::Route));
        let outer = worker.begin(word, begin + ms(10));
        assert_eq!(worker.doing(begin + ms(15)), Some((word, ms(5))));
        assert_eq!(worker.end(outer), word);
        assert_eq!(worker.doing(begin + ms(20)), None);
    }

    #[test]
    fn the_spot_of_a_call_ends_with_it() {
        let worker: &'static Worker = Box::leak(Box::new(Worker::new(0, 0, Instant::now())));
        HERE.set(Some(worker));
        let outer = worker.begin(Word::at(Spot::phase(Phase::Route)), Instant::now());
        let inside = at(Spot::filter("worker_test"), || worker.word().spot().name());
        assert_eq!((inside, worker.word().spot().name()), ("worker_test", "route"));
        enter(Phase::Select);
        assert_eq!(worker.end(outer).spot().name(), "select");
        HERE.set(None);
    }
}
