//! Connections to the endpoints of an upstream: protocol, trust, lifetime.
//!
//! All settings are parsed when the upstream is built, certificates included; an endpoint keeps a template, and an
//! exchange copies it. [`dial`] makes connections, [`http2`] speaks HTTP/2 on them, [`tls`] verifies the peer,
//! [`happy_eyeballs`] chooses between two addresses of a server, [`proxy_protocol`] builds the PROXY protocol header.

pub mod connector;
pub mod dial;
pub mod happy_eyeballs;
pub mod http1;
pub mod http2;
pub mod limit;
pub mod proxy_protocol;
pub mod tls;
pub mod tunnel;

use std::hash::Hasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use http::{StatusCode, Version};
use pingora::http::ResponseHeader;
use pingora::protocols::Digest;
use pingora::protocols::http::client::HttpSession;
use pingora::protocols::l4::socket::SocketAddr;
use pingora::upstreams::peer::{HttpPeer, PeerOptions, Scheme};
use pingora::{Error, ErrorType, Result};
use prometheus::IntGauge;
use xxhash_rust::xxh3::Xxh3;

use super::Timeouts;
use super::window::NARROW_BYTES;
use crate::config;
use crate::config::upstream::Protocol;
use crate::error::BuildError;
use crate::framing::{LengthFields, answer};
use dial::Dialer;
use proxy_protocol::ClientAddresses;
use tls::Tls;

/// Exchanges per HTTP/2 connection: the minimum that servers should allow (RFC 9113 §6.5.2). A lower limit of a
/// server is respected; Pingora's default of 1 would make HTTP/2 pointless.
pub(super) const H2_STREAMS_MAX: usize = 100;

/// Random share of the maximum age, so that connections made at the same time do not end at the same time.
const AGE_SPREAD: f64 = 0.1;

/// A bad certificate makes every connection fail; the log repeats the error at most this often.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);

/// The connection settings of an upstream.
#[derive(Debug)]
pub struct Transport {
    pub(super) protocol: Protocol,
    timeouts: Timeouts,
    idle: Duration,
    max_age: Duration,
    /// Limit on idle connections; `u64::MAX`: only the gateway's limit applies.
    pool: u64,
    /// The HTTP/2 window per response, in bytes.
    stream_window: u32,
    tls: Option<Tls>,
    proxy_protocol: bool,
    /// Distinguishes its connections from those of other upstreams and of other settings: a kept connection is
    /// reused only with the settings it was made with.
    key: u64,
    connections: Arc<Connections>,
    base: Instant,
    complained: AtomicU64,
}

/// The connections of an upstream that are open or being made.
#[derive(Debug)]
pub struct Connections {
    open: AtomicU32,
    gauge: IntGauge,
}

impl Transport {
    /// Parses the settings of the upstream `name`, and reads the files named in them.
    ///
    /// # Errors
    ///
    /// One per file that is missing or invalid, at `tls.…`.
    pub(super) fn build(
        name: &str,
        written: &config::Upstream,
        connections: IntGauge,
    ) -> Result<Transport, Vec<BuildError>> {
        let mut key = Xxh3::new();
        key.write(name.as_bytes());
        // Derived from the settings' debug text, which contains everything that determines a connection.
        key.write(format!("{:?} {:?} {:?}", written.protocol, written.tls, written.proxy_protocol).as_bytes());
        let tls = match (&written.tls, written.protocol) {
            (Some(tls), _) => Some(Tls::build(tls, written.protocol, &mut key)?),
            (None, Protocol::H2) => Some(Tls::build(&config::upstream::Tls::default(), written.protocol, &mut key)?),
            (None, Protocol::Http1 | Protocol::H2c) => None,
        };
        Ok(Transport {
            protocol: written.protocol,
            timeouts: Timeouts::from(&written.timeouts),
            idle: written.keepalive.idle.0,
            max_age: written.keepalive.max_age.0,
            pool: written.keepalive.pool.0,
            stream_window: u32::try_from(written.http2.stream_window.0).unwrap_or(u32::MAX),
            tls,
            proxy_protocol: written.proxy_protocol.is_some(),
            key: key.finish(),
            connections: Arc::new(Connections { open: AtomicU32::new(0), gauge: connections }),
            base: Instant::now(),
            complained: AtomicU64::new(0),
        })
    }

    /// Whether it makes the same connections as `other`, so that they can be shared.
    pub(super) fn makes_the_same_connections(&self, other: &Transport) -> bool {
        self.key == other.key
    }

    /// Why an endpoint at `host` (`None`: a unix socket) cannot be connected to, if so.
    pub(super) fn objection(&self, host: Option<&str>) -> Option<&'static str> {
        self.tls.as_ref()?.objection(host)
    }

    /// Whether TLS is used.
    pub fn is_secure(&self) -> bool {
        self.tls.is_some()
    }

    /// Whether the client's address is sent first.
    pub fn introduces_clients(&self) -> bool {
        self.proxy_protocol
    }

    /// Number of connections that are open or being made.
    pub fn connections(&self) -> u32 {
        self.connections.open.load(Ordering::Relaxed)
    }

    /// Whether an idle connection exceeds the pool limit. `inflight` is the number of active exchanges, each with
    /// its own connection.
    pub fn is_surplus(&self, inflight: u32) -> bool {
        self.pool != u64::MAX && u64::from(self.connections().saturating_sub(inflight)) >= self.pool
    }

    /// The age of a connection, if known.
    pub fn age(&self, digest: Option<&Digest>) -> Option<Duration> {
        // The first entry is that of the socket, followed by that of TLS.
        digest?.timing_digest.first()?.as_ref()?.established_ts.elapsed().ok()
    }

    /// Whether a connection of this age must not be reused after its current exchange. `lot` is a number that
    /// differs between connections.
    pub fn is_outdated(&self, age: Duration, lot: i32) -> bool {
        let lot = f64::from(lot.rem_euclid(16)) / 16.0;
        age >= self.max_age.mul_f64(1.0 - AGE_SPREAD * lot)
    }

    /// Whether rejected certificates may be logged again.
    pub fn may_complain(&self, now: Instant) -> bool {
        let millis = u64::try_from(now.saturating_duration_since(self.base).as_millis()).unwrap_or(u64::MAX) + 1;
        let last = self.complained.load(Ordering::Relaxed);
        let due = last == 0 || millis.saturating_sub(last) >= COMPLAINT_INTERVAL.as_millis() as u64;
        due && self.complained.compare_exchange(last, millis, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// The dialer for an endpoint at `address`, optionally with an `alternate` address.
    pub(super) fn dialer(&self, address: &SocketAddr, alternate: Option<std::net::SocketAddr>) -> Arc<Dialer> {
        // Forebay's own connections, such as for health checks, use the LOCAL header.
        let proxy_header = self.proxy_protocol.then(proxy_protocol::own);
        let narrow = (self.protocol == Protocol::Http1).then_some(NARROW_BYTES);
        let dialer = Dialer::new(self.connections.clone(), narrow, self.timeouts.connect, proxy_header);
        dialer.set_pair(address, alternate, Instant::now());
        Arc::new(dialer)
    }

    /// The Pingora peer for an endpoint at `address` with the name `host`.
    pub(super) fn peer(&self, address: SocketAddr, host: Option<&str>, dialer: Arc<Dialer>) -> HttpPeer {
        let mut options = PeerOptions::new();
        options.connection_timeout = Some(self.timeouts.connect);
        options.total_connection_timeout = Some(self.timeouts.connect);
        options.write_timeout = Some(self.timeouts.send);
        // There is one such timer for `wait` and `receive`, and it also runs while another party is waited for. So
        // exchanges have their own (`party/limits.rs`), and so have tunnels (`http1.rs`).
        options.read_timeout = Some(self.timeouts.idle());
        options.idle_timeout = Some(self.idle);
        match self.protocol {
            Protocol::Http1 => options.set_http_version(1, 1),
            Protocol::H2 | Protocol::H2c => options.set_http_version(2, 2),
        }
        options.max_h2_streams = H2_STREAMS_MAX;
        // Unread responses stay in the h2 library and use the connection's window. So the window has room for the
        // maximum number of streams; otherwise a few slow clients would block all responses.
        options.h2_stream_window_size = Some(self.stream_window);
        options.h2_connection_window_size =
            Some(self.stream_window.saturating_mul(H2_STREAMS_MAX as u32).min(i32::MAX as u32));
        options.custom_l4 = Some(dialer);
        // Not `HttpPeer::new`, which resolves names and blocks.
        let mut peer = HttpPeer {
            _address: address,
            scheme: Scheme::from_tls_bool(self.tls.is_some()),
            sni: String::new(),
            proxy: None,
            client_cert_key: None,
            group_key: self.key,
            options,
        };
        if let Some(tls) = &self.tls {
            tls.set_up(&mut peer, host);
        }
        peer
    }

    /// Makes a peer specific to this client, whose address is sent first.
    pub(super) fn introduce(&self, peer: &mut HttpPeer, dialer: &Dialer, addresses: Option<ClientAddresses>) {
        let mut key = Xxh3::with_seed(peer.group_key);
        std::hash::Hash::hash(&addresses, &mut key);
        peer.group_key = key.finish();
        peer.options.custom_l4 = Some(Arc::new(dialer.proxy_header(proxy_protocol::of(addresses))));
    }
}

/// The final status, after interim responses (1xx). `head`: the method was HEAD.
///
/// # Errors
///
/// The response could not be passed on to a client.
pub async fn final_status(session: &mut HttpSession, head: bool) -> Result<StatusCode> {
    loop {
        session.read_response_header().await?;
        match session.response_header() {
            Some(interim) if interim.status.is_informational() => {}
            Some(answer) => return readable(answer, head),
            None => return Err(Error::new_up(ErrorType::InvalidHTTPHeader)),
        }
    }
}

/// The status of a response that could be passed on to a client.
///
/// # Errors
///
/// It could not be passed on.
pub fn readable(answer: &ResponseHeader, head: bool) -> Result<StatusCode> {
    let (status, length_fields) = (answer.status, LengthFields::of(&answer.headers));
    answer::frame(head, status.as_u16(), answer.version, &length_fields, Version::HTTP_11)
        .map_err(|fault| Error::explain(ErrorType::InvalidHTTPHeader, fault.words()).into_up())?;
    Ok(status)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    use std::time::SystemTime;

    use pingora::protocols::TimingDigest;
    use pingora::upstreams::peer::{ALPN, Peer};

    pub(in crate::upstream) fn transport(yaml: &str) -> Transport {
        let yaml = format!("{{ endpoints: [ {{ address: \"a:1\" }} ], {yaml} }}");
        let written: config::Upstream = config::filter::decode(&serde_yaml::from_str(&yaml).unwrap()).unwrap();
        Transport::build("shop", &written, IntGauge::new("connections", "of a test").unwrap()).unwrap()
    }

    fn peer(yaml: &str, host: Option<&str>) -> HttpPeer {
        let (transport, address) = (transport(yaml), SocketAddr::Inet("10.0.0.1:8443".parse().unwrap()));
        let dialer = transport.dialer(&address, None);
        transport.peer(address, host, dialer)
    }

    #[test]
    fn a_peer_has_every_timeout_since_none_of_them_has_a_default() {
        let keys = "timeouts: { connect: 1s, send: 2s, wait: 4s, receive: 3s }, keepalive: { idle: 5s }";
        let options = peer(keys, None).options;
        assert_eq!(options.connection_timeout, Some(Duration::from_secs(1)));
        assert_eq!(options.total_connection_timeout, Some(Duration::from_secs(1)));
        assert_eq!(options.write_timeout, Some(Duration::from_secs(2)));
        assert_eq!(options.read_timeout, Some(Duration::from_secs(4)), "the longer of wait and receive");
        assert_eq!(options.idle_timeout, Some(Duration::from_secs(5)));
    }

    #[test]
    fn each_protocol_is_spoken_as_it_is_named() {
        let of = |keys: &str| peer(keys, Some("api.test"));
        let http1 = of("");
        assert!(!http1.is_tls() && http1.options.alpn == ALPN::H1 && http1.sni.is_empty());
        let h2c = of("protocol: h2c");
        assert!(!h2c.is_tls() && h2c.options.alpn == ALPN::H2 && h2c.sni.is_empty());
        let h2 = of("protocol: h2");
        assert!(h2.is_tls() && h2.options.alpn == ALPN::H2 && h2.verify_cert() && h2.verify_hostname());
        assert_eq!((h2.sni.as_str(), h2.address().to_string().as_str()), ("api.test", "10.0.0.1:8443"));
        let https = of("tls: {}");
        assert!(https.is_tls() && https.options.alpn == ALPN::H1 && https.verify_cert() && https.verify_hostname());
    }

    #[test]
    fn streams_that_are_all_full_leave_room_for_one_more_on_their_connection() {
        for (keys, window) in [("protocol: h2c", 64 << 10), ("protocol: h2, http2: { stream_window: 16MiB }", 16 << 20)]
        {
            let options = peer(keys, Some("api.test")).options;
            let (stream, connection) = (options.h2_stream_window_size, options.h2_connection_window_size);
            assert_eq!(stream, Some(window));
            assert!(connection >= stream.map(|stream| stream * options.max_h2_streams as u32), "{connection:?}");
        }
    }

    #[test]
    fn connections_are_shared_only_by_those_who_would_have_made_them_alike() {
        let key = |yaml: &str| peer(yaml, Some("api.test")).reuse_hash();
        assert_eq!(key("tls: {}"), key("tls: {}"));
        let kinds = ["", "tls: {}", "tls: { verify: false }", "tls: { server_name: other.test }", "proxy_protocol: v2"];
        let keys: std::collections::BTreeSet<u64> = kinds.iter().map(|yaml| key(yaml)).collect();
        assert_eq!(keys.len(), kinds.len());
    }

    #[test]
    fn a_connection_for_a_client_is_for_no_other() {
        let transport = transport("proxy_protocol: v2");
        let address = SocketAddr::Inet("10.0.0.1:80".parse().unwrap());
        let dialer = transport.dialer(&address, None);
        let key = |client: Option<&str>| {
            let mut peer = transport.peer(address.clone(), None, dialer.clone());
            let gateway = "10.0.0.9:80".parse().unwrap();
            let addresses = client.map(|client| ClientAddresses { client: client.parse().unwrap(), gateway });
            transport.introduce(&mut peer, &dialer, addresses);
            peer.reuse_hash()
        };
        assert_eq!(key(Some("1.2.3.4:5")), key(Some("1.2.3.4:5")));
        assert_ne!(key(Some("1.2.3.4:5")), key(Some("1.2.3.4:6")));
        assert_ne!(key(Some("1.2.3.4:5")), key(None));
    }

    #[test]
    fn a_connection_is_one_too_many_when_the_others_fill_the_pool() {
        let transport = transport("keepalive: { pool: 2 }");
        transport.connections.open.store(5, Ordering::Relaxed);
        // Three are in use, including this one; two others are kept.
        assert!(transport.is_surplus(3));
        assert!(!transport.is_surplus(4));
        assert!(!self::transport("").is_surplus(0), "as many as there are");
        assert!(self::transport("keepalive: { pool: 0 }").is_surplus(1));
    }

    #[test]
    fn a_connection_is_outdated_at_its_age_or_up_to_a_tenth_before() {
        let transport = transport("keepalive: { max_age: 100s }");
        let outdated = |seconds, lot| transport.is_outdated(Duration::from_secs(seconds), lot);
        assert!(!outdated(0, 7) && !outdated(90, 15) && outdated(91, 15) && outdated(100, 0) && !outdated(99, 16));
    }

    #[test]
    fn the_age_of_a_connection_is_that_of_its_socket() {
        let timing = |seconds| {
            let established_ts = SystemTime::now() - Duration::from_secs(seconds);
            Some(TimingDigest { established_ts, ..TimingDigest::default() })
        };
        let digest = Digest { timing_digest: vec![timing(60), timing(50)], ..Digest::default() };
        assert_eq!(transport("").age(Some(&digest)).map(|age| age.as_secs()), Some(60));
        assert_eq!(transport("").age(None), None);
    }

    #[test]
    fn what_is_wrong_with_certificates_is_told_once_in_a_while() {
        let transport = transport("tls: {}");
        let at = |seconds| transport.may_complain(transport.base + Duration::from_secs(seconds));
        assert_eq!([at(0), at(1), at(9), at(11), at(12)], [true, false, false, true, false]);
    }
}
