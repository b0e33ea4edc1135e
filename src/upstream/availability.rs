//! Whether an endpoint may be chosen, and if not, why: a small word that is read for each choice.
//!
//! Four sources contribute to it: discovery (does it exist), the operator, health checks, and outlier detection.
//! Each has its own bits, so that none overwrites another.

use std::sync::atomic::{AtomicU32, Ordering};

use super::health::Health;

const REMOVED: u32 = 1;
const DRAINING: u32 = 1 << 1;
const HEALTHY: u32 = 1 << 2;
const UNHEALTHY: u32 = 1 << 3;
/// Its health is unknown, and that counts as unhealthy.
const UNPROVEN: u32 = 1 << 4;
const EJECTED: u32 = 1 << 5;

/// The availability of an endpoint at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Availability(u32);

/// Its state as one word, in metrics and in `/upstreams`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The last health check passed.
    Healthy,
    /// No health check has finished yet.
    Unknown,
    /// Health checks fail.
    Unhealthy,
    /// Outlier detection has ejected it.
    Ejected,
    /// The operator has drained it, or its source has removed it: it gets no new requests.
    Draining,
}

impl State {
    /// Every state, in order.
    pub const ALL: [State; 5] = [State::Healthy, State::Unknown, State::Unhealthy, State::Ejected, State::Draining];

    /// The name in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            State::Healthy => "healthy",
            State::Unknown => "unknown",
            State::Unhealthy => "unhealthy",
            State::Ejected => "ejected",
            State::Draining => "draining",
        }
    }
}

impl Availability {
    /// Whether it may be chosen.
    pub fn admits(self) -> bool {
        self.0 & !HEALTHY == 0
    }

    /// Whether it may be chosen in panic mode: then only health checks and outlier detection are ignored.
    pub fn admits_in_panic(self) -> bool {
        self.0 & (REMOVED | DRAINING) == 0
    }

    /// Whether its source has removed it.
    pub fn is_removed(self) -> bool {
        self.0 & REMOVED != 0
    }

    /// Whether the operator has drained it.
    pub fn is_drained(self) -> bool {
        self.0 & DRAINING != 0
    }

    /// Whether outlier detection has ejected it.
    pub fn is_ejected(self) -> bool {
        self.0 & EJECTED != 0
    }

    /// Whether health checks fail.
    pub fn is_unhealthy(self) -> bool {
        self.0 & UNHEALTHY != 0
    }

    /// The state. If several apply, deliberate ones win over those that may be wrong.
    pub fn state(self) -> State {
        match self.0 {
            word if word & (REMOVED | DRAINING) != 0 => State::Draining,
            word if word & EJECTED != 0 => State::Ejected,
            word if word & UNHEALTHY != 0 => State::Unhealthy,
            word if word & HEALTHY != 0 => State::Healthy,
            _ => State::Unknown,
        }
    }
}

/// A shared [`Availability`].
#[derive(Debug, Default)]
pub struct AvailabilityBits(AtomicU32);

/// A change of an [`Availability`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The old value.
    pub before: Availability,
    /// The new value.
    pub after: Availability,
}

impl Change {
    /// Whether it became or ceased to be available: then the roster must be rebuilt.
    pub fn matters(self) -> bool {
        let says = |availability: Availability| (availability.admits(), availability.admits_in_panic());
        says(self.before) != says(self.after)
    }

    /// Whether it became available.
    pub fn came_back(self) -> bool {
        self.after.admits() && !self.before.admits()
    }
}

impl AvailabilityBits {
    /// The current value.
    pub fn now(&self) -> Availability {
        Availability(self.0.load(Ordering::Relaxed))
    }

    /// Sets whether its source has removed it.
    pub fn set_removed(&self, removed: bool) -> Change {
        self.change(REMOVED, if removed { REMOVED } else { 0 })
    }

    /// Sets whether the operator drains it.
    pub fn set_draining(&self, draining: bool) -> Change {
        self.change(DRAINING, if draining { DRAINING } else { 0 })
    }

    /// Sets its health, and whether an unknown one counts as healthy.
    pub fn set_health(&self, health: Health, unknown_is_healthy: bool) -> Change {
        let set = match health {
            Health::Healthy => HEALTHY,
            Health::Unhealthy => UNHEALTHY,
            Health::Unknown if unknown_is_healthy => 0,
            Health::Unknown => UNPROVEN,
        };
        self.change(HEALTHY | UNHEALTHY | UNPROVEN, set)
    }

    /// Sets whether it is ejected.
    pub fn set_ejected(&self, ejected: bool) -> Change {
        self.change(EJECTED, if ejected { EJECTED } else { 0 })
    }

    fn change(&self, clear: u32, set: u32) -> Change {
        let change = |word: u32| Some(word & !clear | set);
        let before = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change).unwrap_or_else(|word| word);
        Change { before: Availability(before), after: Availability(before & !clear | set) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_its_say_and_undoes_only_its_own() {
        let word = AvailabilityBits::default();
        assert!(word.now().admits() && word.now().state() == State::Unknown);

        let change = word.set_health(Health::Healthy, true);
        assert!(!change.came_back() && !change.matters(), "it was not away");
        assert_eq!((word.now().admits(), word.now().state()), (true, State::Healthy));
        word.set_health(Health::Unhealthy, true);
        word.set_ejected(true);
        assert_eq!((word.now().admits(), word.now().state()), (false, State::Ejected));
        assert!(!word.set_health(Health::Healthy, true).came_back(), "it is still ejected");
        word.set_draining(true);
        assert!(!word.set_ejected(false).came_back());
        assert_eq!(word.now().state(), State::Draining);
        assert!(!word.now().admits_in_panic());
        assert!(word.set_draining(false).came_back());
        assert!(!word.set_draining(false).matters());
    }

    #[test]
    fn what_is_not_known_counts_as_the_operator_says() {
        let word = AvailabilityBits::default();
        word.set_health(Health::Unknown, false);
        assert_eq!((word.now().admits(), word.now().state()), (false, State::Unknown));
        assert!(word.now().admits_in_panic());
        assert!(word.set_health(Health::Healthy, true).came_back());
    }
}
