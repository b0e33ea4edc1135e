//! One server of an upstream: what is logged of it, and how it is connected to.
//!
//! All that a connection needs is set here once, in a template; an exchange takes a copy and resolves nothing.
//! `discovery` makes endpoints of the addresses it finds.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use pingora::protocols::l4::socket::SocketAddr;
use pingora::upstreams::peer::{HttpPeer, PeerOptions, Scheme};
use prometheus::IntCounter;

use super::Timeouts;
use super::window::NARROW_BYTES;
use crate::config::upstream::Protocol;

/// How many exchanges share one HTTP/2 connection: the least that a server should allow (RFC 9113 §6.5.2). Servers
/// that allow fewer are heeded; Pingora's own default of 1 would make HTTP/2 pointless.
const H2_STREAMS_MAX: usize = 100;

/// One server of an upstream. A name with several addresses makes several of these, with the same label.
pub struct Endpoint {
    /// Its address as it was written: the metric label and the log field.
    pub label: Arc<str>,
    /// Where it is. No two endpoints of an upstream have the same.
    pub address: SocketAddr,
    /// How often it was chosen; shared by all endpoints of this label.
    pub selections: IntCounter,
    template: HttpPeer,
}

impl Endpoint {
    /// An endpoint at `address`, spoken to as `transport` says.
    pub(super) fn new(
        label: &Arc<str>,
        address: SocketAddr,
        server_name: &str,
        transport: &Transport,
        selections: IntCounter,
    ) -> Self {
        Endpoint {
            label: Arc::clone(label),
            template: transport.peer(address.clone(), server_name),
            address,
            selections,
        }
    }

    /// What Pingora needs to connect to it: the address, the protocol and every timeout.
    pub fn peer(&self) -> Box<HttpPeer> {
        Box::new(self.template.clone())
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.label, self.address)
    }
}

/// How all endpoints of an upstream are spoken to.
#[derive(Clone, Debug)]
pub(super) struct Transport {
    pub protocol: Protocol,
    pub timeouts: Timeouts,
    /// How long an unused connection is kept.
    pub idle: Duration,
}

impl Transport {
    /// Why an endpoint at `host` (`None`: a unix socket) cannot be spoken to, if so.
    ///
    /// Pingora compares a certificate with host names only, so an IP address could never be verified; and without a
    /// name it would not verify anything at all. Better no gateway than one that trusts anybody.
    pub fn objection(&self, host: Option<&str>) -> Option<&'static str> {
        let named = host.is_some_and(|host| host.parse::<IpAddr>().is_err());
        (self.protocol == Protocol::H2 && !named).then_some(
            "`protocol: h2` verifies the certificate against the host name in the address, and this address has none: \
             write the name, or use `h2c` for clear text",
        )
    }

    fn peer(&self, address: SocketAddr, server_name: &str) -> HttpPeer {
        let tls = self.protocol == Protocol::H2;
        let mut options = PeerOptions::new();
        options.verify_cert = true;
        options.verify_hostname = true;
        options.connection_timeout = Some(self.timeouts.connect);
        options.total_connection_timeout = Some(self.timeouts.connect);
        options.write_timeout = Some(self.timeouts.send);
        // A net beneath the clocks for `wait` and `receive`, which the exchange keeps: Pingora has one for both.
        options.read_timeout = Some(self.timeouts.wait.max(self.timeouts.receive));
        options.idle_timeout = Some(self.idle);
        match self.protocol {
            Protocol::Http1 => {
                options.set_http_version(1, 1);
                options.tcp_recv_buf = Some(NARROW_BYTES);
            }
            Protocol::H2 | Protocol::H2c => options.set_http_version(2, 2),
        }
        options.max_h2_streams = H2_STREAMS_MAX;
        // Not `HttpPeer::new`, which resolves names, and blocks meanwhile.
        HttpPeer {
            _address: address,
            scheme: Scheme::from_tls_bool(tls),
            sni: if tls { server_name.to_owned() } else { String::new() },
            proxy: None,
            client_cert_key: None,
            group_key: 0,
            options,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use pingora::upstreams::peer::{ALPN, Peer};

    fn endpoint(protocol: Protocol) -> Endpoint {
        let transport = Transport {
            protocol,
            timeouts: Timeouts {
                connect: Duration::from_secs(1),
                send: Duration::from_secs(2),
                wait: Duration::from_secs(4),
                receive: Duration::from_secs(3),
            },
            idle: Duration::from_secs(5),
        };
        let address = SocketAddr::Inet("10.0.0.1:8443".parse().unwrap());
        let selections = IntCounter::new("selections", "of a test").unwrap();
        Endpoint::new(&"api.test:8443".into(), address, "api.test", &transport, selections)
    }

    #[test]
    fn a_peer_has_every_timeout_since_none_of_them_has_a_default() {
        let options = endpoint(Protocol::Http1).peer().options;
        assert_eq!(options.connection_timeout, Some(Duration::from_secs(1)));
        assert_eq!(options.total_connection_timeout, Some(Duration::from_secs(1)));
        assert_eq!(options.write_timeout, Some(Duration::from_secs(2)));
        assert_eq!(options.read_timeout, Some(Duration::from_secs(4)), "the longer of wait and receive");
        assert_eq!(options.idle_timeout, Some(Duration::from_secs(5)));
    }

    #[test]
    fn each_protocol_is_spoken_as_it_is_named() {
        let peer = endpoint(Protocol::Http1).peer();
        assert!(!peer.is_tls() && peer.options.alpn == ALPN::H1 && peer.sni.is_empty());

        let peer = endpoint(Protocol::H2c).peer();
        assert!(!peer.is_tls() && peer.options.alpn == ALPN::H2 && peer.sni.is_empty());

        let peer = endpoint(Protocol::H2).peer();
        assert!(peer.is_tls() && peer.options.alpn == ALPN::H2 && peer.verify_cert() && peer.verify_hostname());
        assert_eq!((peer.sni.as_str(), peer.address().to_string().as_str()), ("api.test", "10.0.0.1:8443"));
    }
}
