//! Threads that hash passwords: a password that is right costs a tenth of a second of CPU, and so does a wrong one.
//!
//! They give way to the workers (`nice`), begin when there is something to do and end when there is nothing for a
//! while. The queue of passwords is bounded. What was right is remembered for a while, and the same credentials are
//! hashed once for all who show them at the same time, as browsers do.

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroUsize;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lru::LruCache;
use tokio::sync::oneshot;
use zeroize::Zeroizing;

use super::users::Stored;
use crate::filter::auth::Seal;
use crate::metrics::filters::PasswordMetrics;

/// A thread without work ends after this time.
const IDLE: Duration = Duration::from_secs(10);

/// How far a thread gives way to others that want the CPU: it gets a third of what a worker gets.
const NICE: libc::c_int = 5;

/// How much there is to be at a time, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Threads.
    pub threads: usize,
    /// Passwords that wait.
    pub queue: usize,
    /// For how long a right one is remembered.
    pub remember: Duration,
    /// How many are remembered.
    pub remembered: NonZeroUsize,
}

/// Finds out whether passwords are right. Clones share everything.
#[derive(Clone)]
pub struct Hashing(Arc<Inner>);

struct Inner {
    terms: Terms,
    metrics: Option<PasswordMetrics>,
    state: Mutex<State>,
    work: Condvar,
}

struct State {
    jobs: VecDeque<Job>,
    /// Those who wait for the same credentials, from when they are in the queue until they are hashed.
    waiting: HashMap<Seal, Vec<oneshot::Sender<bool>>>,
    right: LruCache<Seal, Instant>,
    threads: usize,
    idle: usize,
}

struct Job {
    seal: Seal,
    password: Zeroizing<Vec<u8>>,
    stored: Stored,
    begun: Instant,
}

/// What is known of credentials at once.
pub enum Known {
    /// They were right a while ago.
    Right,
    /// This will say whether they are.
    Soon(oneshot::Receiver<bool>),
    /// Too many wait already.
    Busy,
}

impl Hashing {
    /// Nothing is hashed yet.
    pub fn new(terms: Terms, metrics: Option<PasswordMetrics>) -> Hashing {
        let state = State {
            jobs: VecDeque::new(),
            waiting: HashMap::new(),
            right: LruCache::new(terms.remembered),
            threads: 0,
            idle: 0,
        };
        Hashing(Arc::new(Inner { terms, metrics, state: Mutex::new(state), work: Condvar::new() }))
    }

    /// Whether `password` is the one that is `stored`. The seal stands for both of them.
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
        if state.idle < state.jobs.len() + 1 && state.threads < self.0.terms.threads {
            let inner = self.0.clone();
            match std::thread::Builder::new().name("password".to_owned()).spawn(move || inner.work()) {
                Ok(_) => state.threads += 1,
                Err(error) if state.threads == 0 => {
                    tracing::error!("no thread for hashing passwords: {error}");
                    return Known::Busy;
                }
                Err(_) => {}
            }
        }
        state.waiting.insert(seal, vec![sender]);
        let password = Zeroizing::new(password.to_vec());
        state.jobs.push_back(Job { seal, password, stored: stored.clone(), begun: now });
        self.0.metrics.iter().for_each(|metrics| metrics.wait(1));
        drop(state);
        self.0.work.notify_one();
        Known::Soon(receiver)
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        // SAFETY: a call without pointers; of the thread that calls it, which has no other use. On Linux `0` is the
        // thread, and not the process.
        let _ = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
        while let Some(job) = self.next() {
            let right = std::panic::catch_unwind(|| job.stored.is_of(&job.password)).unwrap_or(false);
            self.metrics.iter().for_each(|metrics| metrics.hashed(job.begun.elapsed()));
            let mut state = self.state();
            if right && !self.terms.remember.is_zero() {
                state.right.put(job.seal, Instant::now());
            }
            let waiting = state.waiting.remove(&job.seal).unwrap_or_default();
            drop(state);
            for one in waiting {
                // Its client may have left.
                let _ = one.send(right);
            }
        }
    }

    /// The next password, once there is one. `None`: there was nothing to do for a while.
    fn next(&self) -> Option<Job> {
        let mut state = self.state();
        state.idle += 1;
        let (mut state, _) = self
            .work
            .wait_timeout_while(state, IDLE, |state| state.jobs.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        state.idle -= 1;
        let job = state.jobs.pop_front();
        match &job {
            Some(_) => self.metrics.iter().for_each(|metrics| metrics.wait(-1)),
            None => state.threads -= 1,
        }
        job
    }
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

    /// `bcrypt` of `secret` at its least cost.
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
