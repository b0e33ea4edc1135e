//! Whether an endpoint may be chosen, and if not, who says so: one small word that is read with every choice.
//!
//! Four know something of it: discovery (whether it is there at all), the operator, health checks, and what passing
//! requests say against it. Each has bits of its own, so that none undoes what another one said.

use std::sync::atomic::{AtomicU32, Ordering};

use super::health::Health;

const REMOVED: u32 = 1;
const DRAINING: u32 = 1 << 1;
const HEALTHY: u32 = 1 << 2;
const UNHEALTHY: u32 = 1 << 3;
/// Nothing is known of its health, and that counts as bad.
const UNPROVEN: u32 = 1 << 4;
const EJECTED: u32 = 1 << 5;

/// What is known of an endpoint at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Availability(u32);

/// The one word for it in metrics and in `/upstreams`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// A health check passed last.
    Healthy,
    /// No health check has said anything yet.
    Unknown,
    /// Health checks fail.
    Unhealthy,
    /// Requests that went there speak against it.
    Ejected,
    /// The operator has taken it out, or its source names it no longer: it is given nothing new.
    Draining,
}

impl State {
    /// Every state, in order.
    pub const ALL: [State; 5] = [State::Healthy, State::Unknown, State::Unhealthy, State::Ejected, State::Draining];

    /// How it is called in metrics.
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

    /// Whether it may be chosen when a whole tier is: only what health checks and requests say is then disregarded.
    pub fn admits_in_panic(self) -> bool {
        self.0 & (REMOVED | DRAINING) == 0
    }

    /// Whether its source names it no longer.
    pub fn is_removed(self) -> bool {
        self.0 & REMOVED != 0
    }

    /// Whether the operator has taken it out.
    pub fn is_drained(self) -> bool {
        self.0 & DRAINING != 0
    }

    /// Whether requests that went there speak against it.
    pub fn is_ejected(self) -> bool {
        self.0 & EJECTED != 0
    }

    /// Whether health checks fail.
    pub fn is_unhealthy(self) -> bool {
        self.0 & UNHEALTHY != 0
    }

    /// The one word for it: where several hold, who takes it out for good goes before who may be mistaken.
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

/// An [`Availability`] that several tasks change.
#[derive(Debug, Default)]
pub struct Word(AtomicU32);

/// What a change has made of an [`Availability`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// What it was.
    pub before: Availability,
    /// What it is.
    pub after: Availability,
}

impl Change {
    /// Whether it may be chosen now and might not before, or the reverse: then the roster must be made anew.
    pub fn matters(self) -> bool {
        let says = |availability: Availability| (availability.admits(), availability.admits_in_panic());
        says(self.before) != says(self.after)
    }

    /// Whether it may be chosen now and might not before.
    pub fn came_back(self) -> bool {
        self.after.admits() && !self.before.admits()
    }
}

impl Word {
    /// What it is now.
    pub fn now(&self) -> Availability {
        Availability(self.0.load(Ordering::Relaxed))
    }

    /// Notes whether its source names it no longer.
    pub fn set_removed(&self, removed: bool) -> Change {
        self.change(REMOVED, if removed { REMOVED } else { 0 })
    }

    /// Notes whether the operator takes it out.
    pub fn set_draining(&self, draining: bool) -> Change {
        self.change(DRAINING, if draining { DRAINING } else { 0 })
    }

    /// Notes what health checks know, and whether an endpoint of which nothing is known is as good as a healthy one.
    pub fn set_health(&self, health: Health, unknown_is_healthy: bool) -> Change {
        let set = match health {
            Health::Healthy => HEALTHY,
            Health::Unhealthy => UNHEALTHY,
            Health::Unknown if unknown_is_healthy => 0,
            Health::Unknown => UNPROVEN,
        };
        self.change(HEALTHY | UNHEALTHY | UNPROVEN, set)
    }

    /// Notes whether it is ejected.
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
        let word = Word::default();
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
        let word = Word::default();
        word.set_health(Health::Unknown, false);
        assert_eq!((word.now().admits(), word.now().state()), (false, State::Unknown));
        assert!(word.now().admits_in_panic());
        assert!(word.set_health(Health::Healthy, true).came_back());
    }
}
