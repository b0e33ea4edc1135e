//! What is counted where an upstream has limits: who waits, who is turned away, and whether it is asked at all.

use prometheus::{Histogram, IntCounter, IntGauge};

use super::family::vectors;
use crate::error::{Refusal, refusal};

vectors! {
    /// The families of it.
    struct Families {
        queue: gauge UPSTREAM_QUEUE,
        queue_seconds: histogram UPSTREAM_QUEUE_SECONDS,
        rejected: counter UPSTREAM_REJECTED,
        breaker: gauge UPSTREAM_BREAKER_OPEN,
        probes_replaced: counter UPSTREAM_BREAKER_PROBES_REPLACED,
    }
}

impl Families {
    /// Those of the upstream of this name.
    pub(super) fn upstream(&self, name: &str) -> LimitMetrics {
        let rejected = |refusal: &'static Refusal| (refusal, self.rejected.with_label_values(&[name, refusal.reason]));
        LimitMetrics {
            queue: QueueMetrics {
                length: self.queue.with_label_values(&[name]),
                seconds: self.queue_seconds.with_label_values(&[name]),
            },
            rejected: REASONS.map(rejected),
            breaker: self.breaker.with_label_values(&[name]),
            probes_replaced: self.probes_replaced.with_label_values(&[name]),
        }
    }
}

/// For what an upstream turns exchanges away.
static REASONS: [&Refusal; 4] =
    [&refusal::QUEUE_FULL, &refusal::QUEUE_TIMEOUT, &refusal::SELECT_BREAKER_OPEN, &refusal::SELECT_NO_ENDPOINT];

/// The metrics of the limits of one upstream.
#[derive(Clone, Debug)]
pub struct LimitMetrics {
    /// Those who wait.
    pub queue: QueueMetrics,
    /// What its breaker does; see `upstream::breaker::State`.
    pub breaker: IntGauge,
    /// Its probes that kept their endpoint waiting, so that others took their places.
    pub probes_replaced: IntCounter,
    rejected: [(&'static Refusal, IntCounter); REASONS.len()],
}

/// The metrics of those who wait.
#[derive(Clone, Debug)]
pub struct QueueMetrics {
    /// How many wait now.
    pub length: IntGauge,
    /// How long each has waited, whatever came of it.
    pub seconds: Histogram,
}

impl LimitMetrics {
    /// Counts an exchange that was turned away for this.
    pub fn reject(&self, refusal: &'static Refusal) {
        if let Some((_, count)) = self.rejected.iter().find(|(known, _)| *known == refusal) {
            count.inc();
        }
    }
}
