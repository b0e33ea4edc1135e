//! The common limit on health checks: a number of places, over all upstreams of the process.
//!
//! Each check needs a place. An upstream waits for one place at a time, and places are granted in the order of waiting,
//! so upstreams take turns: an upstream with thousands of silent endpoints delays a small one only by the end of a few
//! checks. The time limit of a check begins once it has its place.
//!
//! [`Books`] and [`Pace`] are the rules and use no clock.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::metrics::CheckPlaces;

/// The time between two first checks, over all upstreams: 2,000 in a second.
const FIRST_CHECK_STEP: Duration = Duration::from_micros(500);

/// The places of all health checks.
pub struct Places {
    free: Arc<Semaphore>,
    state: Mutex<State>,
    metrics: CheckPlaces,
}

struct State {
    books: Books,
    pace: Pace,
}

impl Places {
    /// Creates `limit` places.
    pub fn new(limit: usize, metrics: CheckPlaces) -> Arc<Places> {
        let state = Mutex::new(State { books: Books { limit, surplus: 0 }, pace: Pace::default() });
        Arc::new(Places { free: Arc::new(Semaphore::new(limit)), state, metrics })
    }

    /// Changes the number of places. Active checks keep theirs.
    pub fn set_limit(&self, limit: usize) {
        let more = self.state().books.resize(limit, |fewer| self.free.forget_permits(fewer));
        self.free.add_permits(more);
    }

    /// Waits for a free place.
    pub async fn take(self: &Arc<Self>) -> Place {
        let permit = match self.free.clone().try_acquire_owned() {
            Ok(permit) => Some(permit),
            Err(_) => {
                let _waits = Waits::begin(&self.metrics);
                // The semaphore is never closed.
                self.free.clone().acquire_owned().await.ok()
            }
        };
        self.metrics.active.inc();
        Place { permit, places: self.clone() }
    }

    /// How long after `now` the first check of a new endpoint begins: at most `interval`.
    pub fn first_check(&self, now: Instant, interval: Duration) -> Duration {
        let mut state = self.state();
        let at_once = state.books.limit;
        let ahead = state.pace.next(now, at_once);
        within(interval, ahead, rand::random())
    }

    /// Held for a moment, never on a worker.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The place of a check. It is free again when this is dropped.
pub struct Place {
    permit: Option<OwnedSemaphorePermit>,
    places: Arc<Places>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.metrics.active.dec();
        if self.places.state().books.is_withdrawn()
            && let Some(permit) = self.permit.take()
        {
            permit.forget();
        }
    }
}

/// Counts an upstream that waits.
struct Waits<'m>(&'m CheckPlaces);

impl<'m> Waits<'m> {
    fn begin(metrics: &'m CheckPlaces) -> Self {
        metrics.waiting.inc();
        Waits(metrics)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.waiting.dec();
    }
}

/// The number of places.
#[derive(Debug)]
struct Books {
    limit: usize,
    /// Taken places over the limit: they are withdrawn as their checks end.
    surplus: usize,
}

impl Books {
    /// Sets the limit. `withdraw` removes up to this many free places and returns how many. Returns the number of
    /// places to add.
    fn resize(&mut self, limit: usize, withdraw: impl FnOnce(usize) -> usize) -> usize {
        let more = limit.saturating_sub(self.limit);
        let fewer = self.limit.saturating_sub(limit);
        self.limit = limit;
        let stays = more.min(self.surplus);
        self.surplus -= stays;
        if fewer > 0 {
            self.surplus += fewer - withdraw(fewer).min(fewer);
        }
        more - stays
    }

    /// Reports the end of a check. Returns whether its place is withdrawn.
    fn is_withdrawn(&mut self) -> bool {
        let is = self.surplus > 0;
        self.surplus -= usize::from(is);
        is
    }
}

/// A first check that would begin after more than an interval begins at a random time in it. `lot` is from 0 to 1.
fn within(interval: Duration, ahead: Duration, lot: f64) -> Duration {
    if ahead <= interval { ahead } else { interval.mul_f64(lot) }
}

/// Spreads first checks, so that thousands of endpoints that appear together are not checked together.
#[derive(Debug, Default)]
struct Pace {
    /// When the next first check would be due, if each waited for its step.
    next: Option<Instant>,
}

impl Pace {
    /// How long the next first check waits; `at_once` of them need not wait.
    fn next(&mut self, now: Instant, at_once: usize) -> Duration {
        let due = self.next.map_or(now, |next| next.max(now));
        self.next = Some(due + FIRST_CHECK_STEP);
        let ahead = due.saturating_duration_since(now);
        ahead.saturating_sub(FIRST_CHECK_STEP * u32::try_from(at_once.saturating_sub(1)).unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use crate::metrics::Metrics;

    fn places(limit: usize) -> (Arc<Places>, CheckPlaces) {
        let metrics = Metrics::new(0, Vec::new()).check_places();
        (Places::new(limit, metrics.clone()), metrics)
    }

    fn poll<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Option<T> {
        match future.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(done) => Some(done),
            Poll::Pending => None,
        }
    }

    #[test]
    fn places_are_given_in_the_order_of_waiting_and_counted() {
        let (places, metrics) = places(1);
        let counted = || (metrics.active.get(), metrics.waiting.get());
        let first = poll(pin!(places.take())).expect("it is free");
        let (mut second, mut third) = (Box::pin(places.take()), Box::pin(places.take()));
        assert!(poll(second.as_mut()).is_none() && poll(third.as_mut()).is_none());
        assert_eq!(counted(), (1, 2));
        drop(first);
        assert!(poll(third.as_mut()).is_none(), "it is not its turn");
        assert!(poll(pin!(places.take())).is_none(), "others wait");
        let second = poll(second.as_mut()).expect("its turn");
        assert_eq!(counted(), (1, 1));
        // A dropped waiter does not delay the others.
        drop((third, second));
        assert!(poll(pin!(places.take())).is_some());
        assert_eq!(counted(), (0, 0));
    }

    #[test]
    fn a_lower_limit_holds_as_checks_end_and_a_higher_one_at_once() {
        let (places, _) = places(3);
        let mut taken: Vec<_> = (0..3).filter_map(|_| poll(pin!(places.take()))).collect();
        assert_eq!(taken.len(), 3);
        places.set_limit(1);
        taken.truncate(1);
        assert!(poll(pin!(places.take())).is_none(), "one is under way, and there is one place");
        places.set_limit(2);
        taken.extend(poll(pin!(places.take())));
        assert_eq!(taken.len(), 2);
        assert!(poll(pin!(places.take())).is_none());
        drop(taken);
        let taken: Vec<_> = (0..3).filter_map(|_| poll(pin!(places.take()))).collect();
        assert_eq!(taken.len(), 2);
    }

    #[test]
    fn places_that_are_free_are_withdrawn_at_once_and_others_later() {
        let mut books = Books { limit: 10, surplus: 0 };
        assert_eq!(books.resize(4, |fewer| fewer.min(2)), 0);
        assert_eq!((books.limit, books.surplus), (4, 4));
        assert!(books.is_withdrawn());
        assert_eq!(books.resize(6, |_| unreachable!("there are more")), 0, "two of the taken ones stay");
        assert_eq!(books.surplus, 1);
        assert_eq!(books.resize(9, |_| unreachable!("there are more")), 2);
        assert!(!books.is_withdrawn());
    }

    #[test]
    fn a_few_first_checks_are_due_at_once_and_thousands_over_seconds() {
        let (mut pace, now) = (Pace::default(), Instant::now());
        let waits: Vec<Duration> = (0..10_000).map(|_| pace.next(now, 256)).collect();
        assert_eq!(waits[..256], [Duration::ZERO; 256]);
        assert_eq!((waits[256], waits[257]), (FIRST_CHECK_STEP, FIRST_CHECK_STEP * 2));
        assert_eq!(waits[9_999], FIRST_CHECK_STEP * 9_744, "5 s");
        let later = now + Duration::from_secs(60);
        assert_eq!(pace.next(later, 256), Duration::ZERO, "time makes up for it");
        let second = Duration::from_secs(1);
        assert_eq!(within(second, second / 2, 0.9), second / 2);
        assert_eq!(within(second, second * 2, 0.25), second / 4);
        let mut pace = Pace::default();
        let steady = (0..10_000).map(|number| pace.next(now + FIRST_CHECK_STEP * number, 1));
        assert_eq!(steady.max(), Some(Duration::ZERO));
    }
}
