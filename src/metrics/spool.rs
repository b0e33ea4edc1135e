//! Metrics of buffered bodies: limits, disk threads, and slow clients.

use prometheus::{Histogram, IntCounter, IntGauge};

use super::family::vectors;
use super::single;

vectors! {
    /// The families of buffered bodies.
    struct Families {
        bytes: gauge SPOOL_BYTES,
        limit: gauge SPOOL_LIMIT_BYTES,
        denials: counter SPOOL_DENIALS,
        slow_clients: gauge SLOW_CLIENTS,
        pressure_total: counter PRESSURE_TOTAL,
        pressure: gauge PRESSURE,
        disk_seconds: histogram DISK_SECONDS,
        disk_queue: gauge DISK_QUEUE,
        disk_failures: counter DISK_FAILURES,
    }
}

/// The values of the label `direction`, in the order of gauges in [`SpoolMetrics`].
const DIRECTIONS: [&str; 2] = ["request", "response"];

/// The values of the label `limit`: of all bodies, of responses, of one client, of one response while others need
/// room, and of files.
pub const SPOOL_LIMITS: [&str; 5] = ["all", "responses", "client", "spool", "files"];

/// The shared metrics of buffered bodies. In a pair, the first is for requests and the second for responses.
#[derive(Clone)]
pub struct SpoolMetrics {
    /// Bytes in memory.
    pub memory: [IntGauge; 2],
    /// Size of the files in bytes.
    pub disk: [IntGauge; 2],
    /// Limit on bytes in memory.
    pub memory_limit: IntGauge,
    /// Limit on the size of all files.
    pub disk_limit: IntGauge,
    /// Refused disk space, in the order of [`SPOOL_LIMITS`].
    pub denials: [[IntCounter; SPOOL_LIMITS.len()]; 2],
    /// Slow clients.
    pub slow: [IntGauge; 2],
    /// Bodies written to disk because memory was short.
    pub spill: ActionMetrics,
    /// Bodies that had to wait for memory.
    pub pause: ActionMetrics,
    /// Refused exchanges.
    pub shed: ActionMetrics,
    /// Queued or active disk operations.
    pub disk_queue: IntGauge,
    /// Write operations.
    pub write: OperationMetrics,
    /// Read operations.
    pub read: OperationMetrics,
}

/// The metrics of one measure against memory shortage.
#[derive(Clone)]
pub struct ActionMetrics {
    /// How often it was taken.
    pub times: IntCounter,
    /// Whether it is active, or how many bodies wait because of it.
    pub now: IntGauge,
}

/// The metrics of one kind of disk operation.
#[derive(Clone)]
pub struct OperationMetrics {
    /// Time from queueing to completion, with any result.
    pub seconds: Histogram,
    /// Number of failures.
    pub failures: IntCounter,
}

impl Families {
    pub(super) fn spools(&self) -> SpoolMetrics {
        let bytes = |store| DIRECTIONS.map(|direction| self.bytes.with_label_values(&[direction, store]));
        let limit = |store| self.limit.with_label_values(&[store]);
        let operation = |operation| OperationMetrics {
            seconds: self.disk_seconds.with_label_values(&[operation]),
            failures: self.disk_failures.with_label_values(&[operation]),
        };
        let action = |action| ActionMetrics {
            times: self.pressure_total.with_label_values(&[action]),
            now: self.pressure.with_label_values(&[action]),
        };
        SpoolMetrics {
            memory: bytes("memory"),
            disk: bytes("disk"),
            memory_limit: limit("memory"),
            disk_limit: limit("disk"),
            denials: DIRECTIONS
                .map(|direction| SPOOL_LIMITS.map(|limit| self.denials.with_label_values(&[direction, limit]))),
            slow: DIRECTIONS.map(|direction| self.slow_clients.with_label_values(&[direction])),
            spill: action("spill"),
            pause: action("pause"),
            shed: action("shed"),
            disk_queue: single(&self.disk_queue),
            write: operation("write"),
            read: operation("read"),
        }
    }
}
