//! The time limit for a connection of Pingora's connectors.

use std::time::Duration;

use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, ErrorType, Result};

use crate::party::wait::{FAR, NoClient, within};

/// Removes the time limit for a connection from a peer, and returns it for [`connected`]. Pingora would enforce it by a
/// clock that also runs while the gateway does not.
pub fn take_limit(peer: &mut HttpPeer) -> Duration {
    let limits = [peer.options.total_connection_timeout.take(), peer.options.connection_timeout.take()];
    limits.into_iter().flatten().next().unwrap_or(FAR)
}

/// Waits for a connection of Pingora's connectors, TLS handshake included.
///
/// # Errors
///
/// Those of the connector, and `ConnectTimedout` after `limit`.
pub async fn connected<T>(limit: Duration, connects: impl Future<Output = Result<T>>) -> Result<T> {
    let late = || Error::explain(ErrorType::ConnectTimedout, format!("{limit:?} have passed"));
    within(limit, NoClient::Within, connects).await.ok_or_else(late)?
}
