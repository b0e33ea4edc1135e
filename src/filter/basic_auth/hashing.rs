//! Threads that hash passwords. Each check of a password, right or wrong, takes a tenth of a second of CPU time.
//!
//! The threads use only idle CPU time (`SCHED_IDLE`), so that requests without a password are not slowed down. A
//! *clerk* thread hands passwords to them and reports their results. It has the priority of a worker, and only it
//! shares a lock with workers, for some microseconds: if a worker waited for a lock of an idle-priority thread, it
//! could wait as long as that thread gets no CPU time. If other work uses all CPU time, an *escort* thread of low
//! priority hashes the password of such a thread a second time.
//!
//! Threads start on demand and end after being idle for a while. The queue of passwords is bounded. Correct
//! credentials are cached for a while. Credentials that several requests send at the same time, as browsers do, are
//! hashed once. Wrong credentials are not cached, since there is no limit on their number.

mod desk;

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use lru::LruCache;
use tokio::sync::oneshot;
use zeroize::Zeroizing;

use super::users::Stored;
use crate::filter::auth::Seal;
use crate::metrics::filters::PasswordMetrics;
use desk::{Desk, Rank};

/// An idle thread ends after this time.
const IDLE: Duration = Duration::from_secs(10);

/// How often the clerk checks whether the busy threads get CPU time.
const LOOK: Duration = Duration::from_millis(250);

/// The limits.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// The number of threads.
    pub threads: usize,
    /// The number of waiting passwords.
    pub queue: usize,
    /// How long correct credentials are cached.
    pub remember: Duration,
    /// The number of cached credentials.
    pub remembered: NonZeroUsize,
}

/// Checks passwords. Clones share everything.
#[derive(Clone)]
pub struct Hashing(Arc<Inner>);

struct Inner {
    terms: Terms,
    metrics: Option<PasswordMetrics>,
    state: Mutex<State>,
}

struct State {
    jobs: VecDeque<Arc<Job>>,
    /// The waiters for the same credentials, from queueing until the result.
    waiting: HashMap<Seal, Vec<oneshot::Sender<bool>>>,
    right: LruCache<Seal, Instant>,
    /// The clerk, while it runs.
    clerk: Option<Thread>,
}

/// A password to check.
struct Job {
    seal: Seal,
    password: Zeroizing<Vec<u8>>,
    stored: Stored,
    begun: Instant,
}

impl Job {
    fn is_right(&self) -> bool {
        std::panic::catch_unwind(|| self.stored.is_of(&self.password)).unwrap_or(false)
    }
}

/// The immediate answer for credentials.
pub enum Known {
    /// They are in the cache.
    Right,
    /// The receiver of the result.
    Soon(oneshot::Receiver<bool>),
    /// The queue is full.
    Busy,
}

impl Hashing {
    /// No password has been hashed yet.
    pub fn new(terms: Terms, metrics: Option<PasswordMetrics>) -> Hashing {
        let state = State {
            jobs: VecDeque::new(),
            waiting: HashMap::new(),
            right: LruCache::new(terms.remembered),
            clerk: None,
        };
        Hashing(Arc::new(Inner { terms, metrics, state: Mutex::new(state) }))
    }

    /// Whether `password` matches the `stored` hash. The seal identifies both.
    pub fn ask(&self, seal: Seal, password: &[u8], stored: &Stored) -> Known {
        let now = Instant::now();
        let mut state = self.0.state();
        if let Some(&since) = state.right.get(&seal) {
            if now.saturating_duration_since(since) < self.0.terms.remember {
                return Known::Right;
            }
            state.right.pop(&seal);
        }
        let (sender, receiver) = oneshot::channel();
        if let Some(others) = state.waiting.get_mut(&seal) {
            others.push(sender);
            return Known::Soon(receiver);
        }
        if state.jobs.len() >= self.0.terms.queue {
            return Known::Busy;
        }
        let Some(clerk) = state.clerk.clone().or_else(|| self.0.begin()) else { return Known::Busy };
        state.waiting.insert(seal, vec![sender]);
        let password = Zeroizing::new(password.to_vec());
        state.jobs.push_back(Arc::new(Job { seal, password, stored: stored.clone(), begun: now }));
        state.clerk = Some(clerk.clone());
        self.0.metrics.iter().for_each(|metrics| metrics.wait(1));
        drop(state);
        clerk.unpark();
        Known::Soon(receiver)
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the clerk, which waits for the lock that the caller holds.
    fn begin(self: &Arc<Self>) -> Option<Thread> {
        let inner = self.clone();
        let begun = thread::Builder::new().name("passwords".to_owned()).spawn(move || Clerk::new(inner).work());
        begun
            .map_err(|error| tracing::error!("no thread for hashing passwords: {error}"))
            .ok()
            .map(|it| it.thread().clone())
    }
}

/// Hands passwords to the hashing threads, and reports their results.
struct Clerk {
    inner: Arc<Inner>,
    /// The threads that use only idle CPU time.
    patient: Vec<Desk>,
    /// The threads of low priority, at most as many. Each takes the place of a thread that gets no CPU time.
    escorts: Vec<Desk>,
}

impl Clerk {
    fn new(inner: Arc<Inner>) -> Clerk {
        Clerk { inner, patient: Vec::new(), escorts: Vec::new() }
    }

    fn work(mut self) {
        loop {
            self.give();
            // Only afterwards, since a new desk removes the signal of an old one.
            let mut some = false;
            for number in 0..self.patient.len() + self.escorts.len() {
                if let Some((job, right)) = self.desk(number).and_then(Desk::found) {
                    self.pass_on(&job, right);
                    some = true;
                }
            }
            if some {
                continue;
            }
            if self.patient.iter().chain(&self.escorts).any(Desk::is_busy) {
                thread::park_timeout(LOOK);
                continue;
            }
            thread::park_timeout(IDLE);
            let mut state = self.inner.state();
            if state.jobs.is_empty() {
                state.clerk = None;
                return;
            }
        }
    }

    fn desk(&mut self, number: usize) -> Option<&mut Desk> {
        self.patient.iter_mut().chain(&mut self.escorts).nth(number)
    }

    /// Reports the result for a password, unless that was done before.
    fn pass_on(&self, job: &Job, right: bool) {
        let mut state = self.inner.state();
        let Some(waiting) = state.waiting.remove(&job.seal) else { return };
        if right && !self.inner.terms.remember.is_zero() {
            state.right.put(job.seal, Instant::now());
        }
        drop(state);
        self.inner.metrics.iter().for_each(|metrics| metrics.hashed(job.begun.elapsed()));
        for one in waiting {
            // The client may have left.
            let _ = one.send(right);
        }
    }

    /// Gives each free thread a password.
    fn give(&mut self) {
        while let Some(desk) = free(&mut self.patient, self.inner.terms.threads, Rank::Patient) {
            let Some(job) = self.inner.next() else { break };
            desk.take(job);
        }
        // A thread without CPU time keeps its password. An escort also hashes that one, and then takes further ones.
        let starved = self.patient.iter_mut().filter_map(|desk| desk.is_starved().then_some(desk));
        let mut starved: Vec<&mut Desk> = starved.collect();
        let escorts = starved.len();
        while let Some(escort) = free(&mut self.escorts, escorts, Rank::Escort) {
            let handed_on = starved.iter_mut().find_map(|desk| desk.hand_on());
            let Some(job) = handed_on.or_else(|| self.inner.next()) else { break };
            escort.take(job);
        }
    }
}

impl Inner {
    /// The next password of the queue.
    fn next(&self) -> Option<Arc<Job>> {
        let job = self.state().jobs.pop_front()?;
        self.metrics.iter().for_each(|metrics| metrics.wait(-1));
        Some(job)
    }
}

/// A free desk. If all are busy, a new one, unless there are `most` already.
fn free(desks: &mut Vec<Desk>, most: usize, rank: Rank) -> Option<&mut Desk> {
    if let Some(place) = desks.iter().position(|desk| !desk.is_busy()) {
        // There may be more, left over from when more threads had no CPU time.
        return (place < most).then(|| &mut desks[place]);
    }
    if desks.len() >= most {
        return None;
    }
    match Desk::open(rank) {
        Ok(desk) => desks.push(desk),
        Err(error) => {
            tracing::error!("no thread for hashing passwords: {error}");
            return None;
        }
    }
    desks.last_mut()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms() -> Terms {
        let remembered = NonZeroUsize::new(2).unwrap();
        Terms { threads: 1, queue: 2, remember: Duration::from_secs(600), remembered }
    }

    fn seal(number: u8) -> Seal {
        [number; 32]
    }

    /// `bcrypt` of `secret` at the lowest cost.
    fn stored() -> Stored {
        Stored::parse(&bcrypt::hash("secret", 4).unwrap()).unwrap()
    }

    fn soon(hashing: &Hashing, number: u8, password: &str) -> bool {
        match hashing.ask(seal(number), password.as_bytes(), &stored()) {
            Known::Soon(right) => right.blocking_recv().unwrap(),
            Known::Right => panic!("it is remembered"),
            Known::Busy => panic!("it is busy"),
        }
    }

    #[test]
    fn what_is_right_is_remembered_and_what_is_wrong_is_not() {
        let hashing = Hashing::new(terms(), None);
        assert!(soon(&hashing, 1, "secret"));
        assert!(matches!(hashing.ask(seal(1), b"secret", &stored()), Known::Right));
        assert!(!soon(&hashing, 2, "wrong"));
        assert!(!soon(&hashing, 2, "wrong"));
        assert!(soon(&hashing, 3, "secret") && soon(&hashing, 4, "secret"));
        assert!(soon(&hashing, 1, "secret"), "the two of later are remembered, and no more");
        let forgetful = Hashing::new(Terms { remember: Duration::ZERO, ..terms() }, None);
        assert!(soon(&forgetful, 1, "secret") && soon(&forgetful, 1, "secret"));
    }

    #[test]
    fn so_many_wait_and_no_more_and_the_same_is_hashed_once_for_all() {
        // No thread hashes.
        let hashing = Hashing::new(Terms { threads: 0, ..terms() }, None);
        let ask = |number| hashing.ask(seal(number), b"secret", &stored());
        let kept: Vec<Known> = [1, 1, 1, 2, 2].map(ask).into();
        assert!(kept.iter().all(|known| matches!(known, Known::Soon(_))));
        assert_eq!(hashing.0.state().jobs.len(), 2);
        assert!(matches!(ask(3), Known::Busy));
        let inner = hashing.0.clone();
        let job = inner.next().unwrap();
        assert!(job.seal == seal(1) && matches!(ask(3), Known::Soon(_)), "there is room again");
    }
}
