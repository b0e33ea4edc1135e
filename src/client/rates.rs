//! Rate limits for expensive operations of clients: connections and TLS handshakes, in total and per client.
//!
//! The client's own limit is checked first: a client above it does not use up the shared limit. The burst equals the
//! number of events that the rate names. Clients are stored by a hash of their address with a seed of this process, so
//! that memory is bounded and an attacker cannot choose a client to share a limit with.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::config::units::Rate;
use crate::filter::gcra::{Gcra, Keys, nanoseconds};

/// Maximum number of clients stored, at about 80 bytes each. Beyond it, the clients unseen for longest start anew.
const CLIENTS: usize = 100_000;

/// The limit that was exceeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Excess {
    /// The limit of the client.
    Client,
    /// The limit of all clients together.
    All,
}

/// The rate limits of one kind of operation.
pub struct Rates {
    started: Instant,
    all: Option<(Gcra, AtomicU64)>,
    each: Option<(Gcra, Keys, RandomState)>,
}

impl Rates {
    /// Creates limits for all clients together and for each client; `None`: no limit.
    pub fn new(all: Option<Rate>, each: Option<Rate>) -> Rates {
        // The configuration check refuses rates that exceed the counter's range.
        let limit = |rate: Rate| Gcra::new(rate, rate.events);
        Rates {
            started: Instant::now(),
            all: all.and_then(limit).map(|limit| (limit, AtomicU64::new(0))),
            each: each.and_then(limit).map(|limit| (limit, Keys::new(CLIENTS), RandomState::new())),
        }
    }

    /// Counts an operation that begins now; `None`: a client without a limit of its own.
    ///
    /// # Errors
    ///
    /// The limit that it exceeds.
    pub fn admit(&self, client: Option<IpAddr>, now: Instant) -> Result<(), Excess> {
        let now = nanoseconds(now.saturating_duration_since(self.started));
        if let (Some((limit, keys, seed)), Some(client)) = (&self.each, client) {
            let (admitted, _) = keys.with(seed.hash_one(client), |due| limit.admit(due, now));
            admitted.map_err(|_| Excess::Client)?;
        }
        let Some((limit, due)) = &self.all else { return Ok(()) };
        let next = |mut due: u64| limit.admit(&mut due, now).is_ok().then_some(due);
        due.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).map(drop).map_err(|_| Excess::All)
    }
}

/// A limited number of places for concurrent operations.
pub struct Places {
    most: AtomicU64,
    taken: AtomicU64,
}

impl Places {
    /// Creates this number of free places.
    pub fn new(most: u64) -> Places {
        Places { most: AtomicU64::new(most), taken: AtomicU64::new(0) }
    }

    /// Takes a place, unless all are taken. The caller returns it with [`Places::leave`].
    pub fn enter(&self) -> bool {
        let most = self.most();
        let more = |taken: u64| (taken < most).then_some(taken + 1);
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    /// Returns a place.
    pub fn leave(&self) {
        self.taken.fetch_sub(1, Ordering::Relaxed);
    }

    /// The number of places.
    pub fn most(&self) -> u64 {
        self.most.load(Ordering::Relaxed)
    }

    /// Sets the number of places. If more are taken, none is given until enough were returned.
    pub fn set_most(&self, most: u64) {
        self.most.store(most, Ordering::Relaxed);
    }

    /// Number of places taken.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn rate(text: &str) -> Option<Rate> {
        Some(text.parse().expect("a rate"))
    }

    fn client(number: u32) -> Option<IpAddr> {
        Some(IpAddr::from(number.to_be_bytes()))
    }

    /// Number of operations admitted at once, out of a hundred.
    fn admitted(rates: &Rates, at: Instant, client: impl Fn(u32) -> Option<IpAddr>) -> usize {
        (0..100).filter(|&number| rates.admit(client(number), at).is_ok()).count()
    }

    #[test]
    fn each_client_has_a_rate_and_all_have_one_together() {
        let rates = Rates::new(rate("50/s"), rate("10/s"));
        let now = Instant::now();
        assert_eq!(admitted(&rates, now, |_| client(1)), 10);
        assert_eq!(rates.admit(client(1), now), Err(Excess::Client));
        assert_eq!(admitted(&rates, now, |_| client(2)), 10);
        assert_eq!(admitted(&rates, now, client), 30, "who was refused has used up nothing of what all share");
        assert_eq!(rates.admit(client(999), now), Err(Excess::All));
        let later = now + Duration::from_millis(100);
        assert_eq!(rates.admit(client(1), later), Ok(()), "a tenth of a second makes room for one");
        assert_eq!(rates.admit(client(1), later), Err(Excess::Client));
    }

    #[test]
    fn without_a_rate_nothing_is_refused_and_a_client_without_address_has_no_limit_of_its_own() {
        let now = Instant::now();
        assert_eq!(admitted(&Rates::new(None, None), now, |_| client(1)), 100);
        assert_eq!(admitted(&Rates::new(None, rate("1/s")), now, |_| None), 100);
        assert_eq!(admitted(&Rates::new(rate("7/s"), None), now, |_| None), 7);
    }

    #[test]
    fn places_are_taken_once_each_and_given_back() {
        let places = Places::new(2);
        assert_eq!([places.enter(), places.enter(), places.enter()], [true, true, false]);
        places.leave();
        assert_eq!((places.enter(), places.taken(), places.most()), (true, 2, 2));
        places.set_most(1);
        places.leave();
        assert!(!places.enter(), "one is taken, and there is one");
        places.leave();
        assert!(places.enter());
    }
}
