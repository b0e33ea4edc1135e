//! How often clients may begin something that costs much: connections and TLS handshakes, in all and each client for
//! itself.
//!
//! The limit of each client is asked first: who is over its own uses up nothing of what all share. Of a rate, as much
//! may come at once as it names. Clients are remembered by a hash of their address under a seed of this process, so
//! that memory is bounded and nobody can choose whom to share a limit with.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::config::units::Rate;
use crate::filter::gcra::{Gcra, Keys, nanoseconds};

/// So many clients are remembered, at about 80 bytes each. When more come, those unseen for longest begin anew.
const CLIENTS: usize = 100_000;

/// Whose limit was met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Excess {
    /// That of the client.
    Client,
    /// That of all together.
    All,
}

/// How often something may begin.
pub struct Rates {
    started: Instant,
    all: Option<(Gcra, AtomicU64)>,
    each: Option<(Gcra, Keys, RandomState)>,
}

impl Rates {
    /// So often in all, and so often for each client; `None` is no limit.
    pub fn new(all: Option<Rate>, each: Option<Rate>) -> Rates {
        // A rate beyond what can be counted is refused with the configuration.
        let limit = |rate: Rate| Gcra::new(rate, rate.events);
        Rates {
            started: Instant::now(),
            all: all.and_then(limit).map(|limit| (limit, AtomicU64::new(0))),
            each: each.and_then(limit).map(|limit| (limit, Keys::new(CLIENTS), RandomState::new())),
        }
    }

    /// Counts one that begins now; `None` is a client that has no limit of its own.
    ///
    /// # Errors
    ///
    /// It comes too soon.
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

/// A bounded number of places for what is under way.
pub struct Places {
    most: AtomicU64,
    taken: AtomicU64,
}

impl Places {
    /// So many, all free.
    pub fn new(most: u64) -> Places {
        Places { most: AtomicU64::new(most), taken: AtomicU64::new(0) }
    }

    /// Takes one, unless all are taken. Whoever has one gives it back by [`Places::leave`].
    pub fn enter(&self) -> bool {
        let most = self.most();
        let more = |taken: u64| (taken < most).then_some(taken + 1);
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    /// Gives one back.
    pub fn leave(&self) {
        self.taken.fetch_sub(1, Ordering::Relaxed);
    }

    /// How many there are.
    pub fn most(&self) -> u64 {
        self.most.load(Ordering::Relaxed)
    }

    /// Sets how many there are. Where more are taken, none is given until enough have come back.
    pub fn set_most(&self, most: u64) {
        self.most.store(most, Ordering::Relaxed);
    }

    /// How many are taken.
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

    /// How many of a hundred are admitted at once.
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
