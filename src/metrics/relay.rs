//! Metrics of connections that are forwarded without decryption.

use prometheus::{IntCounter, IntGauge};

use super::family::vectors;

vectors! {
    /// The families of forwarded connections.
    struct Families {
        open: gauge RELAYED_CONNECTIONS,
        total: counter RELAYED_CONNECTIONS_TOTAL,
        bytes: counter RELAYED_BYTES,
    }
}

/// The metrics of connections forwarded under one name.
pub struct RelayMetrics {
    open: IntGauge,
    total: IntCounter,
    received: IntCounter,
    sent: IntCounter,
}

/// A forwarded connection, until this is dropped.
pub struct Passing(IntGauge);

impl Families {
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
    /// Counts a connection.
    pub fn enter(&self) -> Passing {
        self.total.inc();
        self.open.inc();
        Passing(self.open.clone())
    }

    /// Counts the bytes of a connection.
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
