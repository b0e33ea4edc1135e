//! Metrics of upgrades to new processes.

use prometheus::{IntCounterVec, IntGauge, IntGaugeVec};

use super::family;
use super::registry::Registry;
use super::single;

/// The results of an upgrade.
const RESULTS: [&str; 4] = ["done", "refused", "failed", "timed_out"];

/// The families of upgrades.
pub(super) struct Families {
    upgrades: IntCounterVec,
    failed: IntGaugeVec,
    draining: IntGaugeVec,
}

/// The metrics of upgrades.
#[derive(Clone)]
pub struct UpgradeMetrics {
    /// Number of older processes that have not ended yet.
    pub draining: IntGauge,
    failed: IntGauge,
    upgrades: IntCounterVec,
}

impl Families {
    pub(super) fn register(registry: &Registry) -> Self {
        Families {
            upgrades: family::UPGRADES.counter(registry),
            failed: family::UPGRADE_FAILED.gauge(registry),
            draining: family::UPGRADE_DRAINING.gauge(registry),
        }
    }

    pub(super) fn metrics(&self) -> UpgradeMetrics {
        for result in RESULTS {
            // A series that starts with zero lets `rate` count the first event.
            self.upgrades.with_label_values(&[result]);
        }
        UpgradeMetrics {
            draining: single(&self.draining),
            failed: single(&self.failed),
            upgrades: self.upgrades.clone(),
        }
    }
}

impl UpgradeMetrics {
    /// The result after which another process serves.
    pub const DONE: &str = RESULTS[0];

    /// Continues the counts of the previous process, by result.
    pub fn begin<'r>(&self, results: impl IntoIterator<Item = (&'r str, u64)>) {
        for (result, counted) in results {
            self.upgrades.with_label_values(&[result]).inc_by(counted);
        }
    }

    /// Counts a result.
    pub fn count(&self, result: &str) {
        self.upgrades.with_label_values(&[result]).inc();
        self.failed.set(i64::from(result != Self::DONE));
    }

    /// The count of a result.
    pub fn counted(&self, result: &str) -> u64 {
        self.upgrades.with_label_values(&[result]).get()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Metrics;

    #[test]
    fn counts_go_on_from_those_of_the_process_before() {
        let metrics = Metrics::new(0, Vec::new());
        let upgrades = metrics.upgrades();
        upgrades.begin([("done", 3), ("failed", 1)]);
        upgrades.count("failed");
        assert_eq!((upgrades.counted("done"), upgrades.counted("failed"), upgrades.failed.get()), (3, 2, 1));
        upgrades.count("done");
        assert_eq!((upgrades.counted("done"), upgrades.failed.get()), (4, 0));
    }
}
