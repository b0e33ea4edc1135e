//! One server of an upstream: who it is, how it does just now, and how it is connected to.
//!
//! What changes with every exchange, in flight and latency, are atomics of its own, read with every choice. All that a
//! connection needs is made once, by `transport`, as a template; an exchange takes a copy and resolves nothing. Sources
//! tell of endpoints ([`Found`]), `Upstream::discovered` makes them, `roster` lists those that may be chosen.

use std::fmt;
use std::net;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::uri::Authority;
use pingora::protocols::l4::socket::SocketAddr;
use pingora::upstreams::peer::HttpPeer;

use super::availability::{Availability, Change, Word};
use super::ended::{Ended, Lesson};
use super::health::{Health, Record};
use super::latency::Latency;
use super::outlier::{Accusation, Ejections, Score};
use super::sticky::Name;
use super::transport::Transport;
use super::transport::dial::Dialer;
use super::transport::greeting::Parties;
use crate::metrics::endpoints::EndpointMetrics;

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
    /// Another address of the same server, of the other family, to be asked if this one does not answer.
    pub alternate: Option<net::SocketAddr>,
}

/// One server of an upstream, and how it does. A name with several addresses makes several of these, with the same
/// label.
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
    /// What is counted of it; shared by all endpoints of this label.
    pub metrics: Arc<EndpointMetrics>,
    /// What sticky cookies call it; nothing if its upstream sets none.
    pub names: Box<[Name]>,
    /// What its source said last.
    weight: AtomicU32,
    priority: AtomicU32,
    /// What the operator says instead of it; 0: nothing.
    weight_ordered: AtomicU32,
    availability: Word,
    /// Counted by [`super::Admission`].
    pub(super) inflight: AtomicU32,
    latency: Latency,
    /// Milliseconds from `base`, plus 1, to when it last became available; 0: it was so from the start.
    returned: AtomicU64,
    base: Instant,
    transport: Arc<Transport>,
    template: HttpPeer,
    /// What checks have said. It is not read on the way of a request.
    checks: Mutex<Record>,
    dialer: Arc<Dialer>,
    /// Milliseconds from `base` to when connections that are shared by several exchanges were last replaced by new
    /// ones.
    renewed: AtomicU64,
    /// What passing requests say against it.
    pub(super) score: Score,
    pub(super) accusation: Accusation,
    /// Neither does anybody ask for this.
    ejections: Mutex<Ejections>,
}

impl Endpoint {
    /// The endpoint that was `found`, spoken to as `transport` says.
    pub(super) fn new(found: &Found, transport: &Arc<Transport>, metrics: Arc<EndpointMetrics>, now: Instant) -> Self {
        let dialer = transport.dialer(&found.address, found.alternate);
        Endpoint {
            label: Arc::clone(&found.label),
            address: found.address.clone(),
            identity: format!("{} {}", found.label, found.address).into(),
            metrics,
            names: Box::default(),
            weight: AtomicU32::new(found.weight.get()),
            priority: AtomicU32::new(found.priority.into()),
            weight_ordered: AtomicU32::new(0),
            availability: Word::default(),
            inflight: AtomicU32::new(0),
            latency: Latency::new(now),
            returned: AtomicU64::new(0),
            base: now,
            transport: transport.clone(),
            template: transport.peer(found.address.clone(), found.server_name.as_deref(), dialer.clone()),
            dialer,
            renewed: AtomicU64::new(0),
            checks: Mutex::default(),
            score: Score::default(),
            accusation: Accusation::default(),
            ejections: Mutex::default(),
        }
    }

    /// What Pingora needs to connect to it, for no client in particular: the address, the protocol and every timeout.
    pub fn peer(&self) -> Box<HttpPeer> {
        let mut peer = Box::new(self.template.clone());
        if let Some(address) = self.dialer.preferred() {
            peer._address = SocketAddr::Inet(address);
        }
        // Zero but for connections that several exchanges share.
        peer.group_key = peer.group_key.wrapping_add(self.renewed.load(Ordering::Relaxed));
        peer
    }

    /// The same for a client, whose address it receives if it is spoken to by the PROXY protocol.
    pub fn peer_for(&self, parties: impl FnOnce() -> Option<Parties>) -> Box<HttpPeer> {
        let mut peer = self.peer();
        if self.transport.introduces_clients() {
            self.transport.introduce(&mut peer, &self.dialer, parties());
        }
        peer
    }

    /// Makes connections to it that begin without the PROXY protocol.
    pub fn dialer(&self) -> &Arc<Dialer> {
        &self.dialer
    }

    /// A connection of this age, which exchanges share, is to get no further ones: those that begin from now on share a
    /// new one. Nothing happens if that was seen to since it was made.
    pub fn renew(&self, age: Duration, now: Instant) {
        let millis =
            |time: Instant| u64::try_from(time.saturating_duration_since(self.base).as_millis()).unwrap_or(u64::MAX);
        let made = now.checked_sub(age).map_or(0, millis);
        let last = self.renewed.load(Ordering::Relaxed);
        if last <= made {
            // Another worker that sees it at this moment does the same.
            let _ = self.renewed.compare_exchange(last, millis(now).max(1), Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Begins with what is known of `earlier`, the same server under other terms: its health, and how long it takes.
    pub(super) fn resemble(&self, earlier: &Endpoint) {
        *self.checks() = earlier.checks().clone();
        self.latency.resemble(&earlier.latency);
    }

    /// Takes over what its source says of it now.
    pub(super) fn update(&self, found: &Found) {
        self.weight.store(found.weight.get(), Ordering::Relaxed);
        self.priority.store(found.priority.into(), Ordering::Relaxed);
        self.dialer.set_pair(&self.address, found.alternate, Instant::now());
    }

    /// Its share, relative to its neighbours: the operator's word or its source's.
    pub fn weight(&self) -> NonZeroU32 {
        self.weight_ordered().or(NonZeroU32::new(self.weight.load(Ordering::Relaxed))).unwrap_or(NonZeroU32::MIN)
    }

    /// The share that the operator gives it; `None`: that of its source holds.
    pub fn weight_ordered(&self) -> Option<NonZeroU32> {
        NonZeroU32::new(self.weight_ordered.load(Ordering::Relaxed))
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

    /// The host that is named to it where the client has named none: its address as it is written, if that is a host at
    /// all.
    pub fn authority(&self) -> Authority {
        let parsed = self.label.parse().ok().or_else(|| self.address.to_string().parse().ok());
        parsed.unwrap_or(Authority::from_static("localhost"))
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

    /// Whether its source names it no longer. As with the following: where it matters, the caller calls
    /// [`super::Upstream::reassess`].
    pub fn set_removed(&self, removed: bool, now: Instant) -> Change {
        self.dialer.set_retired(removed);
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

    /// How often, why and until when it is ejected. Not for workers.
    pub fn ejections(&self) -> MutexGuard<'_, Ejections> {
        self.ejections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self, change: Change, now: Instant) -> Change {
        if change.came_back() {
            self.begin_slowly(now);
        }
        change
    }

    /// Learns from the end of an attempt how long it takes.
    pub(super) fn learn(&self, ended: &Ended, now: Instant) {
        match ended.seen().latency {
            Lesson::Took(time) => self.latency.observe(time, now),
            Lesson::AtLeast(time) => self.latency.observe_failure(time, now),
        }
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.label, self.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use pingora::upstreams::peer::Peer;

    use super::super::transport::tests::transport;

    fn endpoint(transport: Transport) -> Endpoint {
        let found = Found {
            label: "api.test:8443".into(),
            address: SocketAddr::Inet("10.0.0.1:8443".parse().unwrap()),
            server_name: Some("api.test".into()),
            weight: NonZeroU32::MIN,
            priority: 0,
            alternate: Some("[fd00::1]:8443".parse().unwrap()),
        };
        let metrics = crate::metrics::Metrics::new(0, Vec::new()).upstream("api").endpoint(&found.label);
        Endpoint::new(&found, &Arc::new(transport), metrics, Instant::now())
    }

    fn plain() -> Endpoint {
        endpoint(transport(""))
    }

    #[test]
    fn a_connection_that_has_become_too_old_is_replaced_once() {
        let endpoint = endpoint(transport("protocol: h2c"));
        let key = || endpoint.peer().reuse_hash();
        let at = |seconds| endpoint.base + Duration::from_secs(seconds);
        let (first, age) = (key(), Duration::from_secs(60));
        endpoint.renew(age, at(100));
        let second = key();
        assert_ne!(first, second);
        endpoint.renew(age, at(101));
        assert_eq!(key(), second, "one of those before it");
        endpoint.renew(age, at(161));
        assert_ne!(key(), second, "it was made at 101 s");
    }

    #[test]
    fn the_address_that_answers_is_the_one_that_is_connected_to() {
        let endpoint = plain();
        assert_eq!(endpoint.peer().address().to_string(), "10.0.0.1:8443");
        assert_eq!(endpoint.peer_for(|| unreachable!("it is told of nobody")).address().to_string(), "10.0.0.1:8443");
    }

    #[test]
    fn one_that_comes_back_begins_slowly_and_one_that_was_never_away_does_not() {
        let endpoint = plain();
        let now = endpoint.base + Duration::from_secs(10);
        assert_eq!(endpoint.age(now), None);
        endpoint.set_health(Health::Unhealthy, true, now);
        endpoint.set_health(Health::Healthy, true, now);
        assert_eq!(endpoint.age(now + Duration::from_secs(3)), Some(Duration::from_secs(3)));
    }

    #[test]
    fn the_word_of_the_operator_goes_before_that_of_the_source() {
        let endpoint = plain();
        endpoint.set_weight(NonZeroU32::new(7));
        assert_eq!(endpoint.weight().get(), 7);
        endpoint.set_weight(None);
        assert_eq!(endpoint.weight().get(), 1);
    }
}
