//! What is counted of connections that are passed on as they are.

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::family;
use super::registry::Registry;

/// The families of all of them.
pub(super) struct Families {
    open: IntGaugeVec,
    total: IntCounterVec,
    bytes: IntCounterVec,
}

/// The metrics of what is passed on under one name.
pub struct RelayMetrics {
    open: IntGauge,
    total: IntCounter,
    received: IntCounter,
    sent: IntCounter,
}

/// A connection that is passed on, until this is dropped.
pub struct Passing(IntGauge);

impl Families {
    pub(super) fn register(registry: &Registry) -> Self {
        Families {
            open: family::RELAYED_CONNECTIONS.gauge(registry),
            total: family::RELAYED_CONNECTIONS_TOTAL.counter(registry),
            bytes: family::RELAYED_BYTES.counter(registry),
        }
    }

    pub(super) fn relay(&self, listener: &str, name: &str) -> RelayMetrics {
        let bytes = |direction| self.bytes.with_label_values(&[listener, name, direction]);
        RelayMetrics {
            open: self.open.with_label_values(&[listener, name]),
            total: self.total.with_label_values(&[listener, name]),
            received: bytes("request"),
            sent: bytes("response"),
        }
    }
}

impl RelayMetrics {
    /// Counts one more.
    pub fn enter(&self) -> Passing {
        self.total.inc();
        self.open.inc();
        Passing(self.open.clone())
    }

    /// Counts what has passed.
    pub fn count(&self, received: u64, sent: u64) {
        self.received.inc_by(received);
        self.sent.inc_by(sent);
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        self.0.dec();
    }
}
