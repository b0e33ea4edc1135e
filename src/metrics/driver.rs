//! Metrics of the driver that exchanges use.

use prometheus::{IntCounter, IntCounterVec};

/// Counters of exchanges by driver.
pub struct DriverMetrics {
    own: IntCounter,
    handed_over: Vec<(&'static str, IntCounter)>,
}

impl DriverMetrics {
    /// The counters of the family, for these reasons to use Pingora's driver.
    pub(super) fn of(family: &IntCounterVec, reasons: impl IntoIterator<Item = &'static str>) -> DriverMetrics {
        let handed_over = |reason| (reason, family.with_label_values(&["pingora", reason]));
        DriverMetrics {
            own: family.with_label_values(&["forebay", ""]),
            handed_over: reasons.into_iter().map(handed_over).collect(),
        }
    }

    /// The counter of Forebay's own driver, or of Pingora's for this reason.
    pub fn driven(&self, handed_over: Option<&'static str>) -> &IntCounter {
        let of = |reason| self.handed_over.iter().find(|(known, _)| *known == reason).map(|(_, counter)| counter);
        handed_over.and_then(of).unwrap_or(&self.own)
    }
}
