//! What is counted of the event loops of the workers, and of the lanes in which exchanges wait for their turn on one.

use prometheus::{Gauge, Histogram, IntCounter, IntCounterVec, IntGauge};

use super::family::vectors;
use super::{LOOP, single};
use crate::phase::Phase;

vectors! {
    /// The families of the event loops.
    struct Families {
        lane_waiting: gauge LANE_WAITING,
        lane_share: ratio LANE_SHARE,
        lane_overdue: counter LANE_OVERDUE,
        lane_bytes: counter LANE_BYTES,
        lag: histogram LOOP_LAG,
        stalled: gauge STALLED_WORKERS,
        stalls: counter STALLS,
    }
}

/// What a turn of the paced lane is for.
pub const LANE_CLASSES: [&str; 3] = ["newcomer", "pass", "spool"];

/// The metrics of the paced lane of one worker.
pub struct LaneMetrics {
    /// Exchanges that wait for their turn, as in `LANE_CLASSES`.
    pub waiting: [IntGauge; 3],
    /// Of its time, what the worker may give to them, from 0 to 1.
    pub share: [Gauge; 3],
    /// Turns that were given because they had been waited for for as long as may be.
    pub overdue: [IntCounter; 3],
    /// Bytes that were spooled.
    pub bytes: IntCounter,
}

/// The metrics of the workers' loops that are not read when they are asked for.
pub struct LoopMetrics {
    /// How late each worker's signs of life came.
    pub lag: Vec<Histogram>,
    /// Workers that are stalled now.
    pub stalled: IntGauge,
    stalls: IntCounterVec,
}

impl LoopMetrics {
    /// How often a worker was held up at this place, which is a phase, the key of a filter, or `loop`.
    pub fn stalls(&self, place: &str) -> IntCounter {
        self.stalls.with_label_values(&[place])
    }
}

impl Families {
    pub(super) fn lane(&self, worker: usize) -> LaneMetrics {
        let worker = worker.to_string();
        LaneMetrics {
            waiting: LANE_CLASSES.map(|class| self.lane_waiting.with_label_values(&[&worker, class])),
            share: LANE_CLASSES.map(|class| self.lane_share.with_label_values(&[&worker, class])),
            overdue: LANE_CLASSES.map(|class| self.lane_overdue.with_label_values(&[&worker, class])),
            bytes: self.lane_bytes.with_label_values(&[&worker]),
        }
    }

    pub(super) fn loops(&self, workers: usize) -> LoopMetrics {
        for place in Phase::ALL.iter().map(|phase| phase.name()).chain([LOOP]) {
            self.stalls.with_label_values(&[place]);
        }
        LoopMetrics {
            lag: (0..workers).map(|worker| self.lag_of(worker)).collect(),
            stalled: single(&self.stalled),
            stalls: self.stalls.clone(),
        }
    }

    /// How late the signs of life of this worker came.
    pub(super) fn lag_of(&self, worker: usize) -> Histogram {
        self.lag.with_label_values(&[&worker.to_string()])
    }
}
