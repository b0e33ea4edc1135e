//! Connects to endpoints with the HTTP version that a peer is marked with.
//!
//! Pingora's proxy calls it before its own connectors. HTTP/2 uses Forebay's own client ([`Http2`]); HTTP/1 uses
//! Pingora's, on an observed stream ([`Followed`]). Pingora's pool keeps idle HTTP/1 connections.

use std::any::Any;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use async_trait::async_trait;
use pingora::connectors::http::custom::{Connection, Connector};
use pingora::connectors::{ConnectorOptions, TransportConnector};
use pingora::protocols::tls::CustomALPN;
use pingora::upstreams::peer::{ALPN, HttpPeer, Peer};
use pingora::{Error, ErrorType, Result};

use super::http1::Followed;
use super::http2::{Exchange, Http2};
use super::limit::{connected, take_limit};

/// Markers for Pingora's proxy only: on the wire they are `http/1.1` and `h2`.
static HTTP1: LazyLock<CustomALPN> = LazyLock::new(|| CustomALPN::new(b"forebay-h1".to_vec()));
static HTTP2: LazyLock<CustomALPN> = LazyLock::new(|| CustomALPN::new(b"forebay-h2".to_vec()));

/// Marks a peer for this connector, with HTTP/1 or HTTP/2.
pub fn mark(peer: &mut HttpPeer, http1: bool) {
    if http1 {
        // The observed stream has these limits; Pingora would enforce them by a clock that also runs while the gateway
        // does not.
        (peer.options.read_timeout, peer.options.write_timeout) = (None, None);
    }
    peer.options.alpn = ALPN::Custom(CustomALPN::clone(if http1 { &HTTP1 } else { &HTTP2 }));
}

/// Whether it is marked for HTTP/1.
fn is_http1(peer: &impl Peer) -> bool {
    peer.get_peer_options().is_some_and(|options| matches!(&options.alpn, ALPN::Custom(marked) if *marked == *HTTP1))
}

/// The connector; see the module.
pub struct Endpoints {
    http1: Arc<TransportConnector>,
    http2: Http2,
}

impl Endpoints {
    /// A connector with these options.
    pub fn new(options: ConnectorOptions) -> Endpoints {
        let idle_max = options.keepalive_pool_size;
        // One for both: each reads the system's certificates.
        let http1 = Arc::new(TransportConnector::new(Some(options)));
        Endpoints { http2: Http2::new(http1.clone(), idle_max), http1 }
    }
}

#[async_trait]
impl Connector for Endpoints {
    type Session = Exchange;

    async fn get_http_session<P: Peer + Send + Sync + 'static>(
        &self,
        peer: &P,
    ) -> Result<(Connection<Exchange>, bool)> {
        if !is_http1(peer) {
            return self.http2.get_http_session(peer).await;
        }
        let peer = (peer as &dyn Any).downcast_ref::<HttpPeer>();
        let mut peer = peer.ok_or_else(|| Error::explain(ErrorType::InternalError, "a peer of another kind"))?.clone();
        peer.options.alpn = ALPN::H1;
        let limit = take_limit(&mut peer);
        let stream = Followed::new(connected(limit, self.http1.new_stream(&peer)).await?)?;
        Ok((Connection::Stream(Box::new(stream)), false))
    }

    async fn reused_http_session<P: Peer + Send + Sync + 'static>(&self, peer: &P) -> Option<Exchange> {
        if is_http1(peer) { None } else { self.http2.reused_http_session(peer).await }
    }

    async fn release_http_session<P: Peer + Send + Sync + 'static>(
        &self,
        session: Exchange,
        peer: &P,
        idle_timeout: Option<Duration>,
    ) {
        self.http2.release_http_session(session, peer, idle_timeout).await;
    }
}

/// Forces a new connection that is not reused: idle connections to an endpoint tend to fail together, so another reused
/// one would probably fail, too.
pub fn separate(peer: &mut HttpPeer) {
    // Part of the key of Pingora's connection pool.
    peer.group_key = rand::random();
    peer.options.idle_timeout = Some(Duration::from_millis(1));
}
