//! One server of an upstream: who it is, how it does just now, and how it is connected to.
//!
//! What changes with every exchange, in flight and latency, are atomics of its own, read with every choice. All that a
//! connection needs is set here once, in a template; an exchange takes a copy and resolves nothing. Sources tell of endpoints
//! ([`Found`]), `Upstream::discovered` makes them, `roster` lists those that may be chosen.

use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::ops::Deref;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pingora::protocols::l4::socket::SocketAddr;
use pingora::upstreams::peer::{HttpPeer, PeerOptions, Scheme};
use prometheus::IntCounter;

use super::Timeouts;
use super::availability::{Availability, Change, Word};
use super::ended::{Ended, Outcome};
use super::health::{Health, Record};
use super::latency::Latency;
use super::window::NARROW_BYTES;
use crate::config::upstream::Protocol;

/// How many exchanges share one HTTP/2 connection: the least that a server should allow (RFC 9113 §6.5.2). Servers
/// that allow fewer are heeded; Pingora's own default of 1 would make HTTP/2 pointless.
const H2_STREAMS_MAX: usize = 100;

/// An endpoint as a source tells of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Its metric label and log field, from the configuration.
    pub label: Arc<str>,
    /// Where it is.
    pub address: SocketAddr,
    /// The name it was found by, for the server name and the certificate.
    pub server_name: Option<Arc<str>>,
    /// Its share, relative to its neighbours.
    pub weight: NonZeroU32,
    /// The tier it stands in; 0 serves first.
    pub priority: u8,
}

/// One server of an upstream, and how it does. A name with several addresses makes several of these, with the same label.
///
/// It lives as long as its source names it, and as anybody is busy with it: that the list of endpoints changes does not
/// make it forget what it has in flight.
pub struct Endpoint {
    /// Its address as it was written: the metric label and the log field.
    pub label: Arc<str>,
    /// Where it is. No two endpoints of an upstream have the same.
    pub address: SocketAddr,
    /// What tells it from the others, on every node: its label and its address.
    pub identity: Box<str>,
    /// How often it was chosen; shared by all endpoints of this label.
    pub selections: IntCounter,
    /// What its source said last.
    weight: AtomicU32,
    priority: AtomicU32,
    /// What the operator says instead of it; 0: nothing.
    weight_ordered: AtomicU32,
    availability: Word,
    inflight: AtomicU32,
    latency: Latency,
    /// Milliseconds from `base`, plus 1, to when it last became available; 0: it was so from the start.
    returned: AtomicU64,
    base: Instant,
    template: HttpPeer,
    /// What checks have said. Nobody asks for it on the way of a request.
    checks: Mutex<Record>,
}

impl Endpoint {
    /// The endpoint that was `found`, spoken to as `transport` says.
    pub(super) fn new(found: &Found, transport: &Transport, selections: IntCounter, now: Instant) -> Self {
        let server_name = found.server_name.as_deref().unwrap_or_default();
        Endpoint {
            label: Arc::clone(&found.label),
            address: found.address.clone(),
            identity: format!("{} {}", found.label, found.address).into(),
            selections,
            weight: AtomicU32::new(found.weight.get()),
            priority: AtomicU32::new(found.priority.into()),
            weight_ordered: AtomicU32::new(0),
            availability: Word::default(),
            inflight: AtomicU32::new(0),
            latency: Latency::new(now),
            returned: AtomicU64::new(0),
            base: now,
            template: transport.peer(found.address.clone(), server_name),
            checks: Mutex::default(),
        }
    }

    /// What Pingora needs to connect to it: the address, the protocol and every timeout.
    pub fn peer(&self) -> Box<HttpPeer> {
        Box::new(self.template.clone())
    }

    /// Takes over what its source says of it now.
    pub(super) fn update(&self, found: &Found) {
        self.weight.store(found.weight.get(), Ordering::Relaxed);
        self.priority.store(found.priority.into(), Ordering::Relaxed);
    }

    /// Its share, relative to its neighbours: the operator's word or its source's.
    pub fn weight(&self) -> NonZeroU32 {
        let ordered = NonZeroU32::new(self.weight_ordered.load(Ordering::Relaxed));
        ordered.or(NonZeroU32::new(self.weight.load(Ordering::Relaxed))).unwrap_or(NonZeroU32::MIN)
    }

    /// The tier it stands in; 0 serves first.
    pub fn priority(&self) -> u8 {
        self.priority.load(Ordering::Relaxed) as u8
    }

    /// Whether it may be chosen, and if not, why.
    pub fn availability(&self) -> Availability {
        self.availability.now()
    }

    /// Exchanges that have it now.
    pub fn inflight(&self) -> u32 {
        self.inflight.load(Ordering::Relaxed)
    }

    /// Expected seconds of one request; 0 if nothing is known.
    pub fn latency(&self, now: Instant) -> f64 {
        self.latency.seconds(now)
    }

    /// For how long it is available again; `None` if it was so from the start.
    pub fn age(&self, now: Instant) -> Option<Duration> {
        let returned = self.returned.load(Ordering::Relaxed).checked_sub(1)?;
        Some(now.saturating_duration_since(self.base).saturating_sub(Duration::from_millis(returned)))
    }

    /// It has become available: it starts slowly from now on.
    pub(super) fn begin_slowly(&self, now: Instant) {
        let millis = now.saturating_duration_since(self.base).as_millis();
        self.returned.store(u64::try_from(millis).unwrap_or(u64::MAX - 1) + 1, Ordering::Relaxed);
    }

    /// Whether its source names it no longer. As with the following: whoever is told that it matters calls
    /// [`super::Upstream::reassess`].
    pub fn set_removed(&self, removed: bool, now: Instant) -> Change {
        self.changed(self.availability.set_removed(removed), now)
    }

    /// Whether the operator takes it out.
    pub fn set_draining(&self, draining: bool, now: Instant) -> Change {
        self.changed(self.availability.set_draining(draining), now)
    }

    /// The weight that the operator gives it; `None`: that of its source.
    pub fn set_weight(&self, weight: Option<NonZeroU32>) {
        self.weight_ordered.store(weight.map_or(0, NonZeroU32::get), Ordering::Relaxed);
    }

    /// What health checks know of it, and whether an unknown one is as good as a healthy one.
    pub fn set_health(&self, health: Health, unknown_is_healthy: bool, now: Instant) -> Change {
        self.changed(self.availability.set_health(health, unknown_is_healthy), now)
    }

    /// Whether what passes speaks against it.
    pub fn set_ejected(&self, ejected: bool, now: Instant) -> Change {
        self.changed(self.availability.set_ejected(ejected), now)
    }

    /// What health checks have said of it. Not for workers.
    pub fn checks(&self) -> MutexGuard<'_, Record> {
        self.checks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self, change: Change, now: Instant) -> Change {
        if change.came_back() {
            self.begin_slowly(now);
        }
        change
    }

    /// Learns from the end of an attempt how long it takes.
    pub(super) fn learn(&self, ended: &Ended, now: Instant) {
        match (ended.outcome, ended.wait) {
            (Outcome::Answered(_), Some(wait)) => self.latency.observe(ended.connect.unwrap_or_default() + wait, now),
            _ => self.latency.observe_failure(ended.total, now),
        }
    }
}

/// An endpoint that an exchange has: it counts as in flight there, and at its upstream, until this is dropped.
pub struct Engaged {
    endpoint: Arc<Endpoint>,
    inflight_of_all: Arc<AtomicU32>,
}

impl Engaged {
    /// One more that has this endpoint.
    pub(super) fn new(endpoint: &Arc<Endpoint>, inflight_of_all: &Arc<AtomicU32>) -> Self {
        endpoint.inflight.fetch_add(1, Ordering::Relaxed);
        inflight_of_all.fetch_add(1, Ordering::Relaxed);
        Engaged { endpoint: Arc::clone(endpoint), inflight_of_all: Arc::clone(inflight_of_all) }
    }

    /// The endpoint, to be remembered beyond this.
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }
}

impl Deref for Engaged {
    type Target = Endpoint;

    fn deref(&self) -> &Endpoint {
        &self.endpoint
    }
}

impl Drop for Engaged {
    fn drop(&mut self) {
        self.endpoint.inflight.fetch_sub(1, Ordering::Relaxed);
        self.inflight_of_all.fetch_sub(1, Ordering::Relaxed);
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

    /// Whether a connection begins with TLS.
    pub fn is_tls(&self) -> bool {
        self.protocol == Protocol::H2
    }

    fn peer(&self, address: SocketAddr, server_name: &str) -> HttpPeer {
        let tls = self.is_tls();
        // Not `HttpPeer::new`, which resolves names, and blocks meanwhile.
        HttpPeer {
            _address: address,
            scheme: Scheme::from_tls_bool(tls),
            sni: if tls { server_name.to_owned() } else { String::new() },
            proxy: None,
            client_cert_key: None,
            group_key: 0,
            options: self.options(),
        }
    }

    /// How every connection is made and used.
    pub fn options(&self) -> PeerOptions {
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
        options
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
        let found = Found {
            label: "api.test:8443".into(),
            address: SocketAddr::Inet("10.0.0.1:8443".parse().unwrap()),
            server_name: Some("api.test".into()),
            weight: NonZeroU32::MIN,
            priority: 0,
        };
        let selections = IntCounter::new("selections", "of a test").unwrap();
        Endpoint::new(&found, &transport, selections, Instant::now())
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

    #[test]
    fn who_has_it_is_counted_until_it_is_let_go() {
        let endpoint = Arc::new(endpoint(Protocol::Http1));
        let all = Arc::<AtomicU32>::default();
        let (one, two) = (Engaged::new(&endpoint, &all), Engaged::new(&endpoint, &all));
        assert_eq!((endpoint.inflight(), all.load(Ordering::Relaxed)), (2, 2));
        drop(one);
        drop(two);
        assert_eq!((endpoint.inflight(), all.load(Ordering::Relaxed)), (0, 0));
    }

    #[test]
    fn one_that_comes_back_begins_slowly_and_one_that_was_never_away_does_not() {
        let endpoint = endpoint(Protocol::Http1);
        let now = endpoint.base + Duration::from_secs(10);
        assert_eq!(endpoint.age(now), None);
        endpoint.set_health(Health::Unhealthy, true, now);
        endpoint.set_health(Health::Healthy, true, now);
        assert_eq!(endpoint.age(now + Duration::from_secs(3)), Some(Duration::from_secs(3)));
    }

    #[test]
    fn the_word_of_the_operator_goes_before_that_of_the_source() {
        let endpoint = endpoint(Protocol::Http1);
        endpoint.set_weight(NonZeroU32::new(7));
        assert_eq!(endpoint.weight().get(), 7);
        endpoint.set_weight(None);
        assert_eq!(endpoint.weight().get(), 1);
    }
}
