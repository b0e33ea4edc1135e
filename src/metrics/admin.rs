//! Metrics of the admin endpoint.

use prometheus::{IntCounter, IntCounterVec, IntGauge};

use super::family::vectors;
use super::single;

vectors! {
    /// The families of the admin endpoint.
    struct Families {
        requests: counter ADMIN_REQUESTS,
        connections: gauge ADMIN_CONNECTIONS,
        closed: counter ADMIN_CONNECTIONS_CLOSED,
        streams: gauge ADMIN_STREAMS,
    }
}

/// The metrics of the admin endpoint.
pub struct AdminMetrics {
    requests: IntCounterVec,
    connections: IntGauge,
    closed: IntCounter,
    streams: IntGauge,
}

impl AdminMetrics {
    /// Counts a request. `path` must be from the endpoint's table, not from the client. Looks labels up, since
    /// requests are rare.
    pub fn count(&self, path: &str, status: u16) {
        self.requests.with_label_values(&[path, &status.to_string()]).inc();
    }

    /// Sets the number of open connections.
    pub fn set_connections(&self, open: usize) {
        self.connections.set(i64::try_from(open).unwrap_or(i64::MAX));
    }

    /// Counts a connection that was closed because the limit was reached.
    pub fn closed(&self) {
        self.closed.inc();
    }

    /// Counts a streaming response until the guard is dropped.
    pub fn stream(&self) -> StreamGuard {
        self.streams.inc();
        StreamGuard(self.streams.clone())
    }
}

/// A streaming response of the admin endpoint.
pub struct StreamGuard(IntGauge);

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Families {
    pub(super) fn admin(&self) -> AdminMetrics {
        AdminMetrics {
            requests: self.requests.clone(),
            connections: single(&self.connections),
            closed: self.closed.with_label_values::<&str>(&[]),
            streams: single(&self.streams),
        }
    }
}
