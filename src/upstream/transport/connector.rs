//! Connects to endpoints over the version of HTTP that a peer is marked with.
//!
//! Pingora's proxy asks it before its own connectors. Over HTTP/2 exchanges go by our own client ([`Http2`]), over
//! HTTP/1 by Pingora's, on a stream that is followed ([`Followed`]). Kept connections of HTTP/1 are in Pingora's pool.

use std::any::Any;
use std::sync::LazyLock;
use std::time::Duration;

use async_trait::async_trait;
use pingora::connectors::http::custom::{Connection, Connector};
use pingora::connectors::{ConnectorOptions, TransportConnector};
use pingora::protocols::tls::CustomALPN;
use pingora::upstreams::peer::{ALPN, HttpPeer, Peer};
use pingora::{Error, ErrorType, Result};

use super::http1::Followed;
use super::http2::{Exchange, Http2};

/// Words that only Pingora's proxy reads: on the wire they are `http/1.1` and `h2`.
static HTTP1: LazyLock<CustomALPN> = LazyLock::new(|| CustomALPN::new(b"forebay-h1".to_vec()));
static HTTP2: LazyLock<CustomALPN> = LazyLock::new(|| CustomALPN::new(b"forebay-h2".to_vec()));

/// Has an exchange with this endpoint go over a connection of ours, of HTTP/1 or HTTP/2.
pub fn mark(peer: &mut HttpPeer, http1: bool) {
    peer.options.alpn = ALPN::Custom(CustomALPN::clone(if http1 { &HTTP1 } else { &HTTP2 }));
}

/// Whether it is marked for HTTP/1.
fn is_http1(peer: &impl Peer) -> bool {
    peer.get_peer_options().is_some_and(|options| matches!(&options.alpn, ALPN::Custom(marked) if *marked == *HTTP1))
}

/// See the module.
pub struct Endpoints {
    http1: TransportConnector,
    http2: Http2,
}

impl Endpoints {
    /// Connects as these options say.
    pub fn new(options: ConnectorOptions) -> Endpoints {
        Endpoints { http1: TransportConnector::new(Some(options.clone())), http2: Http2::new(options) }
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
        let stream = Followed::new(self.http1.new_stream(&peer).await?)?;
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

/// Has a connection made, and not kept: connections to one endpoint that are kept tend to die together, and the next
/// one would be of no more use than the last.
pub fn separate(peer: &mut HttpPeer) {
    // Pingora knows kept connections by this among others.
    peer.group_key = rand::random();
    peer.options.idle_timeout = Some(Duration::from_millis(1));
}
