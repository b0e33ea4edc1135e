//! The connectors of all health checks of the process.
//!
//! A connector reads the trusted certificates of the system, which takes milliseconds, so upstreams share them. They
//! share no connections: a check releases none, and an HTTP/2 connection has room for one check.

use std::sync::LazyLock;

use pingora::connectors::TransportConnector;
use pingora::connectors::http::Connector;

static TRANSPORT: LazyLock<TransportConnector> = LazyLock::new(|| TransportConnector::new(None));
static CONNECTOR: LazyLock<Connector> = LazyLock::new(|| Connector::new(None));

/// Connects, TLS handshake included.
pub(super) fn transport() -> &'static TransportConnector {
    &TRANSPORT
}

/// Connects for a check with HTTP.
pub(super) fn connector() -> &'static Connector {
    &CONNECTOR
}
