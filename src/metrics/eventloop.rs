//! Metrics of the workers' event loops, and of the schedulers from which exchanges get grants.

use prometheus::{Gauge, Histogram, IntCounter, IntCounterVec, IntGauge};

use super::family::vectors;
use super::{LOOP, single};
use crate::phase::Phase;

vectors! {
    /// The families of the event loops.
    struct Families {
        scheduler_waiting: gauge SCHEDULER_WAITING,
        scheduler_share: ratio SCHEDULER_SHARE,
        scheduler_overdue: counter SCHEDULER_OVERDUE,
        scheduler_bytes: counter SCHEDULER_BYTES,
        lag: histogram LOOP_LAG,
        lag_busy: histogram LOOP_LAG_BUSY,
        stalled: gauge STALLED_WORKERS,
        stalls: counter STALLS,
    }
}

/// The classes of grants.
pub const SCHEDULER_CLASSES: [&str; 3] = ["new_connection", "transfer", "spool"];

/// The metrics of one worker's scheduler.
pub struct SchedulerMetrics {
    /// Waiting exchanges, in the order of `SCHEDULER_CLASSES`.
    pub waiting: [IntGauge; 3],
    /// The share of its time that the worker may spend on them, from 0 to 1.
    pub share: [Gauge; 3],
    /// Grants that were given because the longest wait was over.
    pub overdue: [IntCounter; 3],
    /// Bytes that were spooled.
    pub bytes: IntCounter,
}

/// Metrics of the event loops that are not collected on scrape.
pub struct LoopMetrics {
    /// The lag of each worker.
    pub lag: Vec<Histogram>,
    /// The part of it that is the worker's own work.
    pub lag_busy: Vec<Histogram>,
    /// Number of stalled workers.
    pub stalled: IntGauge,
    stalls: IntCounterVec,
}

impl LoopMetrics {
    /// The counter of stalls at this place: a phase, the key of a filter, or `loop`.
    pub fn stalls(&self, place: &str) -> IntCounter {
        self.stalls.with_label_values(&[place])
    }
}

impl Families {
    pub(super) fn scheduler(&self, worker: usize) -> SchedulerMetrics {
        let worker = worker.to_string();
        SchedulerMetrics {
            waiting: SCHEDULER_CLASSES.map(|class| self.scheduler_waiting.with_label_values(&[&worker, class])),
            share: SCHEDULER_CLASSES.map(|class| self.scheduler_share.with_label_values(&[&worker, class])),
            overdue: SCHEDULER_CLASSES.map(|class| self.scheduler_overdue.with_label_values(&[&worker, class])),
            bytes: self.scheduler_bytes.with_label_values(&[&worker]),
        }
    }

    pub(super) fn loops(&self, workers: usize) -> LoopMetrics {
        for place in Phase::ALL.iter().map(|phase| phase.name()).chain([LOOP]) {
            self.stalls.with_label_values(&[place]);
        }
        LoopMetrics {
            lag: (0..workers).map(|worker| self.lag_of(worker)).collect(),
            lag_busy: (0..workers).map(|worker| self.lag_busy.with_label_values(&[&worker.to_string()])).collect(),
            stalled: single(&self.stalled),
            stalls: self.stalls.clone(),
        }
    }

    /// The lag of this worker.
    pub(super) fn lag_of(&self, worker: usize) -> Histogram {
        self.lag.with_label_values(&[&worker.to_string()])
    }
}
