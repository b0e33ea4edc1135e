//! The list of slow clients: those that exchanges currently wait for.
//!
//! A client is listed at the first wait for it in an exchange, and removed with the exchange; most clients never are.
//! The start and the end of a wait are stores into its own entry. Each worker has its own list, whose lock only queries
//! share. A query visits the lists one after the other and copies what it needs.

pub mod min_rate;
pub mod waiting;

use std::cell::RefCell;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::metrics::{Direction, RouteMetrics};
use crate::phase::Phase;

/// Maximum length of a stored target, in bytes.
const TARGET_BYTES_MAX: usize = 120;
/// A client stays visible for this time after a wait, so that repeated short waits show.
const LINGERS: Duration = Duration::from_secs(1);

/// All slow clients. Clones share the list.
#[derive(Clone, Default)]
pub struct SlowClients(Arc<Lists>);

#[derive(Default)]
struct Lists(Mutex<Vec<Arc<List>>>);

/// The clients of one worker.
#[derive(Default)]
struct List(Mutex<Places>);

#[derive(Default)]
struct Places {
    entries: Vec<Option<Arc<Record>>>,
    free: Vec<usize>,
}

thread_local! {
    /// This worker's list, and the gateway that it belongs to: a test may run several gateways in one process.
    static HERE: RefCell<Option<(Arc<Lists>, Arc<List>)>> = const { RefCell::new(None) };
}

/// A listed client. Times are microseconds from `epoch`, plus 1, so that 0 means none.
struct Record {
    direction: Direction,
    route: Option<Arc<RouteMetrics>>,
    client: Option<IpAddr>,
    target: OnceLock<Box<str>>,
    epoch: Instant,
    phase: AtomicU8,
    bytes: AtomicU64,
    /// Start of the current wait.
    since: AtomicU64,
    /// End of the last wait.
    until: AtomicU64,
    /// Total time of all finished waits.
    waited: AtomicU64,
}

/// Keeps a client on the list while one of its clones exists.
#[derive(Clone)]
pub struct Entry(Arc<Kept>);

struct Kept {
    record: Arc<Record>,
    list: Arc<List>,
    place: usize,
}

/// A slow client.
#[derive(Clone, Debug, PartialEq)]
pub struct SlowClient {
    /// Its address; `None` over a Unix socket.
    pub client: Option<IpAddr>,
    /// The route; `None` while the header is received.
    pub route: Option<String>,
    /// Method and path of its request, truncated to a maximum length.
    pub target: Option<String>,
    /// The phase of the wait.
    pub phase: Phase,
    /// The direction: a request that it sends, or a response that it accepts.
    pub direction: Direction,
    /// Of the response, the bytes that wait for it; of the request, the announced bytes that are missing.
    pub bytes: Option<u64>,
    /// Duration of the current wait; zero if it has just moved.
    pub silent: Duration,
    /// Total wait of this exchange for it in this direction.
    pub waited: Duration,
}

impl SlowClients {
    /// Adds a client to the calling worker's list.
    pub fn enter(&self, direction: Direction, route: Option<&Arc<RouteMetrics>>, client: Option<IpAddr>) -> Entry {
        let list = self.here();
        let record = Arc::new(Record {
            direction,
            route: route.cloned(),
            client,
            target: OnceLock::new(),
            epoch: Instant::now(),
            phase: AtomicU8::new(0),
            bytes: AtomicU64::new(u64::MAX),
            since: AtomicU64::new(0),
            until: AtomicU64::new(0),
            waited: AtomicU64::new(0),
        });
        let mut places = list.lock();
        let place = places.free.pop().unwrap_or_else(|| {
            places.entries.push(None);
            places.entries.len() - 1
        });
        places.entries[place] = Some(record.clone());
        drop(places);
        Entry(Arc::new(Kept { record, list, place }))
    }

    /// The `most` clients with the longest waits, and the number of all. Not for workers.
    pub fn longest(&self, most: usize, now: Instant) -> (Vec<SlowClient>, usize) {
        let lists = self.0.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut found: Vec<(u64, Arc<Record>)> = Vec::new();
        for list in lists {
            let places = list.lock();
            found.extend(
                places.entries.iter().flatten().filter_map(|record| Some((record.waited(now)?, record.clone()))),
            );
        }
        let count = found.len();
        if count > most {
            found.select_nth_unstable_by_key(most, |(waited, _)| std::cmp::Reverse(*waited));
            found.truncate(most);
        }
        found.sort_by_key(|(waited, _)| std::cmp::Reverse(*waited));
        (found.into_iter().map(|(waited, record)| record.shown(waited, now)).collect(), count)
    }

    fn here(&self) -> Arc<List> {
        HERE.with_borrow_mut(|here| match here {
            Some((whose, list)) if Arc::ptr_eq(whose, &self.0) => list.clone(),
            _ => {
                let list = Arc::new(List::default());
                self.0.0.lock().unwrap_or_else(PoisonError::into_inner).push(list.clone());
                *here = Some((self.0.clone(), list.clone()));
                list
            }
        })
    }
}

impl List {
    fn lock(&self) -> MutexGuard<'_, Places> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let mut places = self.list.lock();
        places.entries[self.place] = None;
        places.free.push(self.place);
    }
}

impl Entry {
    /// Starts a wait.
    pub(super) fn begin(&self, now: Instant) {
        let record = &self.0.record;
        record.since.store(record.stamp(now), Ordering::Relaxed);
    }

    /// Ends a wait.
    pub(super) fn end(&self, now: Instant) {
        let record = &self.0.record;
        let since = record.since.swap(0, Ordering::Relaxed);
        record.until.store(record.stamp(now), Ordering::Relaxed);
        record.waited.fetch_add(record.stamp(now).saturating_sub(since), Ordering::Relaxed);
    }

    /// Sets the phase of the wait and the number of missing bytes, `u64::MAX` if unknown.
    pub fn set(&self, phase: Phase, bytes: u64) {
        self.0.record.phase.store(phase as u8, Ordering::Relaxed);
        self.0.record.bytes.store(bytes, Ordering::Relaxed);
    }

    /// Sets the request, a method and a path, unless it is set.
    pub fn name(&self, request: impl FnOnce() -> String) {
        self.0.record.target.get_or_init(|| {
            let mut target = request();
            if let Some((end, _)) = target.char_indices().find(|(at, _)| *at >= TARGET_BYTES_MAX) {
                target.truncate(end);
                target.push('…');
            }
            target.into()
        });
    }
}

impl Record {
    fn stamp(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.epoch).as_micros() as u64 + 1
    }

    /// Total wait in microseconds; `None` unless the client is, or just was, waited for.
    fn waited(&self, now: Instant) -> Option<u64> {
        let now = self.stamp(now);
        let before = self.waited.load(Ordering::Relaxed);
        let until = self.until.load(Ordering::Relaxed);
        match self.since.load(Ordering::Relaxed) {
            0 if until == 0 || now.saturating_sub(until) > LINGERS.as_micros() as u64 => None,
            0 => Some(before),
            since => Some(before + now.saturating_sub(since)),
        }
    }

    fn shown(&self, waited: u64, now: Instant) -> SlowClient {
        let since = self.since.load(Ordering::Relaxed);
        let silent = if since == 0 { 0 } else { self.stamp(now).saturating_sub(since) };
        let phase = Phase::ALL.get(usize::from(self.phase.load(Ordering::Relaxed))).copied().unwrap_or(Phase::Header);
        SlowClient {
            client: self.client,
            route: self.route.as_ref().map(|route| route.name().to_owned()),
            target: self.target.get().map(|target| target.to_string()),
            phase,
            direction: self.direction,
            bytes: Some(self.bytes.load(Ordering::Relaxed)).filter(|&bytes| bytes != u64::MAX),
            silent: Duration::from_micros(silent),
            waited: Duration::from_micros(waited),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slow_client::waiting::Waiting;

    /// Rounded to milliseconds: entries count in microseconds.
    fn rounded(time: Duration) -> u128 {
        (time + Duration::from_micros(500)).as_millis()
    }

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn who_is_waited_for_longest_comes_first_and_only_so_many_are_shown() {
        let slow = SlowClients::default();
        drop(slow.enter(Direction::Response, None, None));
        let begin = Instant::now();
        let entries: Vec<Entry> = (0..10u8)
            .map(|n| {
                let entry = slow.enter(Direction::Response, None, Some([10, 0, 0, n].into()));
                entry.begin(begin + ms(u64::from(n) * 10));
                entry.set(Phase::Write, u64::from(n));
                entry
            })
            .collect();
        let (longest, count) = slow.longest(3, begin + ms(1000));
        assert_eq!(count, 10);
        let bytes: Vec<_> = longest.iter().map(|client| client.bytes).collect();
        assert_eq!(bytes, [Some(0), Some(1), Some(2)]);
        assert_eq!((longest[1].phase, longest[1].direction), (Phase::Write, Direction::Response));
        assert_eq!(rounded(longest[1].waited), 990);
        drop(entries);
        assert_eq!(slow.longest(3, begin + ms(1000)), (Vec::new(), 0));
    }

    #[test]
    fn pauses_add_up_and_a_client_that_goes_on_is_forgotten_after_a_while() {
        let slow = SlowClients::default();
        let entry = slow.enter(Direction::Request, None, None);
        // Times count from the first entry of a thread.
        let begin = Instant::now();
        assert_eq!(slow.longest(1, begin).1, 0, "nobody waits for it yet");
        for at in [0, 200] {
            entry.begin(begin + ms(at));
            entry.end(begin + ms(at + 100));
        }
        let (longest, _) = slow.longest(1, begin + ms(400));
        assert_eq!((rounded(longest[0].waited), longest[0].silent), (200, ms(0)));
        assert_eq!(slow.longest(1, begin + ms(1400)).1, 0);
        entry.begin(begin + ms(2000));
        let (longest, _) = slow.longest(1, begin + ms(2500));
        assert_eq!((rounded(longest[0].waited), rounded(longest[0].silent)), (700, 500));
    }

    #[test]
    fn places_are_taken_again_and_every_thread_has_its_list() {
        let slow = SlowClients::default();
        for _ in 0..100 {
            let entry = slow.enter(Direction::Request, None, None);
            drop(Waiting::begin(None, &entry));
        }
        let other = slow.clone();
        let entry = std::thread::spawn(move || {
            let entry = other.enter(Direction::Request, None, None);
            entry.begin(Instant::now());
            entry
        });
        let entry = entry.join().unwrap();
        let lists = slow.0.0.lock().unwrap().clone();
        assert_eq!(lists.iter().map(|list| list.lock().entries.len()).collect::<Vec<_>>(), [1, 1]);
        assert_eq!(slow.longest(9, Instant::now()).1, 1);
        drop(entry);
        assert_eq!(slow.longest(9, Instant::now()).1, 0);
    }

    #[test]
    fn a_long_target_is_cut_between_characters() {
        let slow = SlowClients::default();
        let entry = slow.enter(Direction::Request, None, None);
        entry.begin(Instant::now());
        entry.name(|| "ä".repeat(200));
        entry.name(|| unreachable!("it has a name"));
        let (longest, _) = slow.longest(1, Instant::now());
        assert_eq!(longest[0].target.as_deref(), Some(&*format!("{}…", "ä".repeat(60))));
    }
}
