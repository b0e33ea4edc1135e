//! The result of health checks: unknown, healthy or unhealthy.
//!
//! [`Record`] is the rule and uses no socket. Checks run in the background, never on a worker. An endpoint without
//! a result is unknown; `initial` says what that counts as. The first check decides alone; later, several in a row
//! are needed for a change.

use std::time::Instant;

/// The health of an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Health {
    /// No check has finished yet, or there are none.
    #[default]
    Unknown,
    /// Checks pass.
    Healthy,
    /// Checks fail.
    Unhealthy,
}

impl Health {
    /// The name in `/upstreams`, the log and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Health::Unknown => "unknown",
            Health::Healthy => "healthy",
            Health::Unhealthy => "unhealthy",
        }
    }
}

/// How many checks in a row change the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thresholds {
    /// Failed checks that make it unhealthy.
    pub unhealthy_after: u32,
    /// Passed checks that make it healthy again.
    pub healthy_after: u32,
}

/// A failed check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The reason, for `/upstreams` and the log.
    pub message: String,
    /// When the check ended.
    pub at: Instant,
}

/// The results of an endpoint's checks.
#[derive(Clone, Debug, Default)]
pub struct Record {
    health: Health,
    /// Checks in a row that contradict `health`.
    contrary: u32,
    last_failure: Option<Failure>,
}

impl Record {
    /// The current health.
    pub fn health(&self) -> Health {
        self.health
    }

    /// Its last failed check, however long ago.
    pub fn last_failure(&self) -> Option<&Failure> {
        self.last_failure.as_ref()
    }

    /// Records a passed check. Returns whether [`Record::health`] has changed.
    pub fn passed(&mut self, thresholds: Thresholds) -> bool {
        self.note(Health::Healthy, thresholds.healthy_after)
    }

    /// Records a failed check. Returns whether [`Record::health`] has changed.
    pub fn failed(&mut self, failure: Failure, thresholds: Thresholds) -> bool {
        self.last_failure = Some(failure);
        self.note(Health::Unhealthy, thresholds.unhealthy_after)
    }

    fn note(&mut self, said: Health, needed: u32) -> bool {
        if self.health == said {
            self.contrary = 0;
            return false;
        }
        self.contrary += 1;
        if self.health != Health::Unknown && self.contrary < needed {
            return false;
        }
        (self.health, self.contrary) = (said, 0);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    const THRESHOLDS: Thresholds = Thresholds { unhealthy_after: 3, healthy_after: 2 };

    fn failure() -> Failure {
        Failure { message: "refused".to_owned(), at: Instant::now() }
    }

    /// The health after these checks, `+` for passed and `-` for failed.
    fn after(checks: &str) -> Health {
        let mut record = Record::default();
        for check in checks.bytes() {
            match check {
                b'+' => record.passed(THRESHOLDS),
                _ => record.failed(failure(), THRESHOLDS),
            };
        }
        record.health()
    }

    #[test]
    fn the_first_check_settles_what_is_unknown() {
        assert_eq!(after(""), Health::Unknown);
        assert_eq!(after("+"), Health::Healthy);
        assert_eq!(after("-"), Health::Unhealthy);
    }

    #[test]
    fn only_several_in_a_row_change_what_is_known() {
        assert_eq!(after("+--"), Health::Healthy);
        assert_eq!(after("+---"), Health::Unhealthy);
        assert_eq!(after("+--+--"), Health::Healthy, "one that passes in between begins the count anew");
        assert_eq!(after("+---+"), Health::Unhealthy);
        assert_eq!(after("+---+-+"), Health::Unhealthy);
        assert_eq!(after("+---++"), Health::Healthy);
    }

    #[test]
    fn the_last_failure_is_kept_after_recovery() {
        let mut record = Record::default();
        assert!(record.failed(failure(), THRESHOLDS), "a change is told of");
        assert!(!record.passed(THRESHOLDS) && record.passed(THRESHOLDS));
        assert_eq!(record.last_failure().map(|failure| failure.message.as_str()), Some("refused"));
    }

    proptest! {
        #[test]
        fn so_many_of_one_kind_always_have_their_way(checks in "[+-]{0,40}") {
            prop_assert_eq!(after(&(checks.clone() + "---")), Health::Unhealthy);
            prop_assert_eq!(after(&(checks + "++")), Health::Healthy);
        }
    }
}
