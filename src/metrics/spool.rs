//! What is counted of spools: the budget and the disk threads that they share, and the clients that they wait for.

use prometheus::{Histogram, IntCounter, IntGauge};

use super::family::vectors;
use super::single;

vectors! {
    /// The families of what spools share.
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

/// The values of the label `direction` of what is spooled, in the order in which gauges stand in [`SpoolMetrics`].
const DIRECTIONS: [&str; 2] = ["request", "response"];

/// The values of the label `limit` of what spools are denied: that of all of them, of responses, of one client, of one
/// response where others need room, and of files.
pub const SPOOL_LIMITS: [&str; 5] = ["all", "responses", "client", "spool", "files"];

/// The metrics of what spools share. Where there are two of a kind, the first is of requests and the second of
/// responses.
#[derive(Clone)]
pub struct SpoolMetrics {
    /// Bytes in memory.
    pub memory: [IntGauge; 2],
    /// Bytes that files have grown to.
    pub disk: [IntGauge; 2],
    /// Bytes that may be in memory.
    pub memory_limit: IntGauge,
    /// Bytes that files may have between them.
    pub disk_limit: IntGauge,
    /// Times that a spool got no more disk, in the order of [`SPOOL_LIMITS`].
    pub denials: [[IntCounter; SPOOL_LIMITS.len()]; 2],
    /// Clients that are waited for.
    pub slow: [IntGauge; 2],
    /// Writes to disk that only pressure caused.
    pub spill: RungMetrics,
    /// Spools that were made to wait.
    pub pause: RungMetrics,
    /// Exchanges that were turned away.
    pub shed: RungMetrics,
    /// Writes and reads that are queued or under way.
    pub disk_queue: IntGauge,
    /// Writes.
    pub write: OperationMetrics,
    /// Reads.
    pub read: OperationMetrics,
}

/// The metrics of one rung of the ladder that is climbed when memory runs short.
#[derive(Clone)]
pub struct RungMetrics {
    /// How often it was used.
    pub times: IntCounter,
    /// Whether it holds, or how many wait on it.
    pub now: IntGauge,
}

/// The metrics of one kind of work for the disk threads.
#[derive(Clone)]
pub struct OperationMetrics {
    /// From when it was queued until it was done, whatever came of it.
    pub seconds: Histogram,
    /// How often it failed.
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
        let rung = |rung| RungMetrics {
            times: self.pressure_total.with_label_values(&[rung]),
            now: self.pressure.with_label_values(&[rung]),
        };
        SpoolMetrics {
            memory: bytes("memory"),
            disk: bytes("disk"),
            memory_limit: limit("memory"),
            disk_limit: limit("disk"),
            denials: DIRECTIONS
                .map(|direction| SPOOL_LIMITS.map(|limit| self.denials.with_label_values(&[direction, limit]))),
            slow: DIRECTIONS.map(|direction| self.slow_clients.with_label_values(&[direction])),
            spill: rung("spill"),
            pause: rung("pause"),
            shed: rung("shed"),
            disk_queue: single(&self.disk_queue),
            write: operation("write"),
            read: operation("read"),
        }
    }
}
