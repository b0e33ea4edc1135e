//! Metrics of an upstream's limits: queue, refusals, circuit breaker.

use prometheus::{Histogram, IntCounter, IntGauge};

use super::family::vectors;
use crate::error::{Refusal, refusal};

vectors! {
    /// The families of the limits.
    struct Families {
        queue: gauge UPSTREAM_QUEUE,
        queue_seconds: histogram UPSTREAM_QUEUE_SECONDS,
        rejected: counter UPSTREAM_REJECTED,
        breaker: gauge UPSTREAM_BREAKER_OPEN,
        probes_replaced: counter UPSTREAM_BREAKER_PROBES_REPLACED,
    }
}

impl Families {
    /// The metrics of the upstream with this name.
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

/// The reasons for which an upstream refuses exchanges.
static REASONS: [&Refusal; 4] =
    [&refusal::QUEUE_FULL, &refusal::QUEUE_TIMEOUT, &refusal::SELECT_BREAKER_OPEN, &refusal::SELECT_NO_ENDPOINT];

/// The metrics of the limits of one upstream.
#[derive(Clone, Debug)]
pub struct LimitMetrics {
    /// The metrics of its queue.
    pub queue: QueueMetrics,
    /// The state of its breaker; see `upstream::breaker::State`.
    pub breaker: IntGauge,
    /// Probes that were replaced because their client was too slow.
    pub probes_replaced: IntCounter,
    rejected: [(&'static Refusal, IntCounter); REASONS.len()],
}

/// The metrics of a queue.
#[derive(Clone, Debug)]
pub struct QueueMetrics {
    /// Number of waiting exchanges.
    pub length: IntGauge,
    /// Waiting times, with any outcome.
    pub seconds: Histogram,
}

impl LimitMetrics {
    /// Counts a refused exchange.
    pub fn reject(&self, refusal: &'static Refusal) {
        if let Some((_, count)) = self.rejected.iter().find(|(known, _)| *known == refusal) {
            count.inc();
        }
    }
}
