//! What is counted of upgrades: of new processes that take over from this one or an older one.

use prometheus::{IntCounterVec, IntGauge, IntGaugeVec};

use super::family;
use super::registry::Registry;
use super::single;

/// What an upgrade can come to.
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
    /// Processes before this one that have not ended yet.
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
            // With a zero before it, a rate counts the first one, too.
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
    /// What metrics call an upgrade after which another process serves.
    pub const DONE: &str = RESULTS[0];

    /// Goes on from what the process before has counted, each result by its name.
    pub fn begin<'r>(&self, results: impl IntoIterator<Item = (&'r str, u64)>) {
        for (result, counted) in results {
            self.upgrades.with_label_values(&[result]).inc_by(counted);
        }
    }

    /// An upgrade came to this.
    pub fn count(&self, result: &str) {
        self.upgrades.with_label_values(&[result]).inc();
        self.failed.set(i64::from(result != Self::DONE));
    }

    /// How many came to this.
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
