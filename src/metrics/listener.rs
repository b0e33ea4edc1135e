//! Metrics of listeners and their client connections.

use prometheus::{IntCounter, IntGauge};

use super::family::vectors;
use super::{RefusalMetrics, shift, single};

vectors! {
    /// The families of all listeners.
    struct Families {
        connections: gauge CLIENT_CONNECTIONS,
        connections_total: counter CLIENT_CONNECTIONS_TOTAL,
        connections_limit: gauge CLIENT_CONNECTIONS_LIMIT,
        accept_pauses: counter ACCEPT_PAUSES,
        accept_paused: gauge ACCEPT_PAUSED,
        requests: counter CLIENT_REQUESTS,
    }
}

/// The state of a client connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionState {
    /// Waiting for a request.
    Idle,
    /// Before HTTP: PROXY protocol header, TLS handshake.
    Handshake,
    /// Receiving a request header.
    Header,
    /// With an active exchange, or several on HTTP/2.
    Active,
}

/// The metrics of one listener.
pub struct ListenerMetrics {
    /// Accepted connections.
    pub accepted: IntCounter,
    /// Limit on open connections.
    pub connections_max: IntGauge,
    /// Requests over HTTP/1.
    pub http1_requests: IntCounter,
    /// Requests over HTTP/2.
    pub h2_requests: IntCounter,
    /// The refusals of the whole gateway, for connections that are refused before there is an exchange.
    pub refusals: RefusalMetrics,
    /// In the order of `ConnectionState`.
    open: [IntGauge; 4],
}

/// The metrics of accepting connections.
pub struct DoorwayMetrics {
    /// Times that a listener paused because open files ran out.
    pub pauses: IntCounter,
    /// Listeners that are paused.
    pub paused: IntGauge,
}

/// The values of the label `state` of connections, in the order of [`ConnectionState`].
const STATES: [&str; 4] = ["idle", "handshake", "header", "active"];

impl Families {
    pub(super) fn listener(&self, name: &str, refusals: RefusalMetrics) -> ListenerMetrics {
        let open = |state| self.connections.with_label_values(&[name, state]);
        let requests = |protocol| self.requests.with_label_values(&[name, protocol]);
        ListenerMetrics {
            accepted: self.connections_total.with_label_values(&[name]),
            connections_max: self.connections_limit.with_label_values(&[name]),
            http1_requests: requests("http1"),
            h2_requests: requests("h2"),
            refusals,
            open: STATES.map(open),
        }
    }

    pub(super) fn doorway(&self) -> DoorwayMetrics {
        DoorwayMetrics {
            pauses: self.accept_pauses.with_label_values::<&str>(&[]),
            paused: single(&self.accept_paused),
        }
    }
}

impl ListenerMetrics {
    /// Open connections by state.
    pub fn open(&self) -> [(&'static str, i64); 4] {
        std::array::from_fn(|state| (STATES[state], self.open[state].get()))
    }

    /// Moves a connection from one state to another: from `None` when it opens, to `None` when it closes.
    pub fn enter(&self, from: Option<ConnectionState>, to: Option<ConnectionState>) {
        shift(&self.open, from.map(|state| state as usize), to.map(|state| state as usize));
    }
}
