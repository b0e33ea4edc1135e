//! One server of an upstream: its identity, its state, and how it is connected to.
//!
//! Values that change with each exchange, such as active exchanges and latency, are atomics, read for each choice.
//! The peer for connections is built once, by `transport`, as a template; an exchange copies it and resolves
//! nothing. Sources report endpoints ([`Found`]), `Upstream::discovered` creates them, `roster` lists the available
//! ones.

use std::fmt;
use std::net;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::uri::Authority;
use pingora::protocols::l4::socket::SocketAddr;
use pingora::upstreams::peer::HttpPeer;

use super::availability::{Availability, AvailabilityBits, Change};
use super::ended::{Ended, Lesson};
use super::health::{Health, Record};
use super::latency::Latency;
use super::outlier::{EjectionSignal, Ejections, Score};
use super::sticky::Name;
use super::transport::Transport;
use super::transport::dial::Dialer;
use super::transport::proxy_protocol::ClientAddresses;
use crate::metrics::endpoints::EndpointMetrics;

/// An endpoint as reported by a source.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Its metric label and log field, from the configuration.
    pub label: Arc<str>,
    /// Its address.
    pub address: SocketAddr,
    /// The name it was found by, for SNI and certificate verification.
    pub server_name: Option<Arc<str>>,
    /// Its share, relative to the others.
    pub weight: NonZeroU32,
    /// Its tier; 0 serves first.
    pub priority: u8,
    /// The server's address of the other family, used if this one does not respond.
    pub alternate: Option<net::SocketAddr>,
}

/// One server of an upstream and its state. A name with several addresses gives several endpoints with the same
/// label.
///
/// It lives as long as its source lists it or an exchange uses it: a changed list does not lose active exchanges.
pub struct Endpoint {
    /// Its address as written: the metric label and log field.
    pub label: Arc<str>,
    /// Its address, unique within the upstream.
    pub address: SocketAddr,
    /// Its identity on every node: label and address.
    pub identity: Box<str>,
    /// Its metrics; shared by all endpoints of this label.
    pub metrics: Arc<EndpointMetrics>,
    /// Its names in sticky cookies; empty without session affinity.
    pub names: Box<[Name]>,
    rank: Rank,
    availability: AvailabilityBits,
    /// Number of active exchanges, counted by [`super::Admission`].
    pub(super) inflight: AtomicU32,
    latency: Latency,
    /// When it last became available, in milliseconds from `base`, plus 1; 0: it always was.
    returned: AtomicU64,
    base: Instant,
    connections: Connections,
    /// The results of health checks. Not read on the request path.
    checks: Mutex<Record>,
    /// Counters of outlier detection.
    pub(super) score: Score,
    pub(super) ejection_signal: EjectionSignal,
    /// Its ejections. Not read on the request path.
    ejections: Mutex<Ejections>,
}

impl Endpoint {
    /// The endpoint that was `found`, with connections made by `transport`.
    pub(super) fn new(found: &Found, transport: &Arc<Transport>, metrics: Arc<EndpointMetrics>, now: Instant) -> Self {
        Endpoint {
            label: Arc::clone(&found.label),
            address: found.address.clone(),
            identity: format!("{} {}", found.label, found.address).into(),
            metrics,
            names: Box::default(),
            rank: Rank::of(found),
            availability: AvailabilityBits::default(),
            inflight: AtomicU32::new(0),
            latency: Latency::new(now),
            returned: AtomicU64::new(0),
            base: now,
            connections: Connections::to(found, transport),
            checks: Mutex::default(),
            score: Score::default(),
            ejection_signal: EjectionSignal::default(),
            ejections: Mutex::default(),
        }
    }

    /// The Pingora peer, without a specific client: the address, the protocol and every timeout.
    pub fn peer(&self) -> Box<HttpPeer> {
        self.connections.peer()
    }

    /// The peer for a client, whose address is sent if the PROXY protocol is used.
    pub fn peer_for(&self, addresses: impl FnOnce() -> Option<ClientAddresses>) -> Box<HttpPeer> {
        self.connections.peer_for(addresses)
    }

    /// Creates connections without the PROXY protocol.
    pub fn dialer(&self) -> &Arc<Dialer> {
        &self.connections.dialer
    }

    /// A shared connection of this age gets no new exchanges: later ones share a new connection. Does nothing if
    /// the connection is older than the last renewal.
    pub fn renew(&self, age: Duration, now: Instant) {
        let millis =
            |time: Instant| u64::try_from(time.saturating_duration_since(self.base).as_millis()).unwrap_or(u64::MAX);
        let made = now.checked_sub(age).map_or(0, millis);
        self.connections.renew(made, millis(now));
    }

    /// Copies the state of `earlier`, the same server with other settings: health and latency.
    pub(super) fn resemble(&self, earlier: &Endpoint) {
        *self.checks() = earlier.checks().clone();
        self.latency.resemble(&earlier.latency);
    }

    /// Applies the latest values from its source.
    pub(super) fn update(&self, found: &Found) {
        self.rank.update(found);
        self.connections.dialer.set_pair(&self.address, found.alternate, Instant::now());
    }

    /// Its weight: the operator's or its source's.
    pub fn weight(&self) -> NonZeroU32 {
        self.rank.weight()
    }

    /// The weight set by the operator; `None`: the source's weight applies.
    pub fn weight_ordered(&self) -> Option<NonZeroU32> {
        self.rank.ordered()
    }

    /// Its tier; 0 serves first.
    pub fn priority(&self) -> u8 {
        self.rank.priority()
    }

    /// Whether it may be chosen, and if not, why.
    pub fn availability(&self) -> Availability {
        self.availability.now()
    }

    /// Number of active exchanges.
    pub fn inflight(&self) -> u32 {
        self.inflight.load(Ordering::Relaxed)
    }

    /// The host for requests whose client sent none: its address as written, if that is a valid host.
    pub fn authority(&self) -> Authority {
        let parsed = self.label.parse().ok().or_else(|| self.address.to_string().parse().ok());
        parsed.unwrap_or(Authority::from_static("localhost"))
    }

    /// Expected latency of a request in seconds; 0 if unknown.
    pub fn latency(&self, now: Instant) -> f64 {
        self.latency.seconds(now)
    }

    /// Time since it became available; `None` if it always was.
    pub fn age(&self, now: Instant) -> Option<Duration> {
        let returned = self.returned.load(Ordering::Relaxed).checked_sub(1)?;
        Some(now.saturating_duration_since(self.base).saturating_sub(Duration::from_millis(returned)))
    }

    /// It became available: starts its slow start.
    pub(super) fn begin_slowly(&self, now: Instant) {
        let millis = now.saturating_duration_since(self.base).as_millis();
        self.returned.store(u64::try_from(millis).unwrap_or(u64::MAX - 1) + 1, Ordering::Relaxed);
    }

    /// Sets whether its source has removed it. As with the methods below: if the change matters, the caller calls
    /// [`super::Upstream::reassess`].
    pub fn set_removed(&self, removed: bool, now: Instant) -> Change {
        self.connections.dialer.set_retired(removed);
        self.changed(self.availability.set_removed(removed), now)
    }

    /// Sets whether the operator drains it.
    pub fn set_draining(&self, draining: bool, now: Instant) -> Change {
        self.changed(self.availability.set_draining(draining), now)
    }

    /// Sets the operator's weight; `None`: the source's weight.
    pub fn set_weight(&self, weight: Option<NonZeroU32>) {
        self.rank.set_ordered(weight);
    }

    /// Sets the result of health checks, and whether unknown counts as healthy.
    pub fn set_health(&self, health: Health, unknown_is_healthy: bool, now: Instant) -> Change {
        self.changed(self.availability.set_health(health, unknown_is_healthy), now)
    }

    /// Sets whether it is ejected.
    pub fn set_ejected(&self, ejected: bool, now: Instant) -> Change {
        self.changed(self.availability.set_ejected(ejected), now)
    }

    /// The results of health checks. Not for workers.
    pub fn checks(&self) -> MutexGuard<'_, Record> {
        self.checks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its ejections. Not for workers.
    pub fn ejections(&self) -> MutexGuard<'_, Ejections> {
        self.ejections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self, change: Change, now: Instant) -> Change {
        if change.came_back() {
            self.begin_slowly(now);
        }
        change
    }

    /// Updates its latency from the end of an attempt.
    pub(super) fn learn(&self, ended: &Ended, now: Instant) {
        match ended.effects().latency {
            Lesson::Took(time) => self.latency.observe(time, now),
            Lesson::AtLeast(time) => self.latency.observe_failure(time, now),
        }
    }
}

/// The rank of an endpoint among the others: its tier and its weight.
struct Rank {
    priority: AtomicU32,
    /// The weight from the endpoint's source.
    weight: AtomicU32,
    /// The weight set by the operator; 0: none.
    ordered: AtomicU32,
}

impl Rank {
    fn of(found: &Found) -> Self {
        let (priority, weight) = (AtomicU32::new(found.priority.into()), AtomicU32::new(found.weight.get()));
        Rank { priority, weight, ordered: AtomicU32::new(0) }
    }

    fn update(&self, found: &Found) {
        self.weight.store(found.weight.get(), Ordering::Relaxed);
        self.priority.store(found.priority.into(), Ordering::Relaxed);
    }

    fn priority(&self) -> u8 {
        self.priority.load(Ordering::Relaxed) as u8
    }

    fn weight(&self) -> NonZeroU32 {
        self.ordered().or(NonZeroU32::new(self.weight.load(Ordering::Relaxed))).unwrap_or(NonZeroU32::MIN)
    }

    fn ordered(&self) -> Option<NonZeroU32> {
        NonZeroU32::new(self.ordered.load(Ordering::Relaxed))
    }

    fn set_ordered(&self, weight: Option<NonZeroU32>) {
        self.ordered.store(weight.map_or(0, NonZeroU32::get), Ordering::Relaxed);
    }
}

/// How connections to an endpoint are made.
struct Connections {
    transport: Arc<Transport>,
    template: HttpPeer,
    dialer: Arc<Dialer>,
    /// When shared connections were last renewed, in milliseconds from the endpoint's `base`.
    renewed: AtomicU64,
}

impl Connections {
    fn to(found: &Found, transport: &Arc<Transport>) -> Self {
        let dialer = transport.dialer(&found.address, found.alternate);
        let template = transport.peer(found.address.clone(), found.server_name.as_deref(), dialer.clone());
        Connections { transport: transport.clone(), template, dialer, renewed: AtomicU64::new(0) }
    }

    fn peer(&self) -> Box<HttpPeer> {
        let mut peer = Box::new(self.template.clone());
        if let Some(address) = self.dialer.preferred() {
            peer._address = SocketAddr::Inet(address);
        }
        // Zero except for shared connections.
        peer.group_key = peer.group_key.wrapping_add(self.renewed.load(Ordering::Relaxed));
        peer
    }

    fn peer_for(&self, addresses: impl FnOnce() -> Option<ClientAddresses>) -> Box<HttpPeer> {
        let mut peer = self.peer();
        if self.transport.introduces_clients() {
            self.transport.introduce(&mut peer, &self.dialer, addresses());
        }
        peer
    }

    /// Renews shared connections that were `made` at this time, unless later ones share a new connection already.
    fn renew(&self, made: u64, now: u64) {
        let last = self.renewed.load(Ordering::Relaxed);
        if last <= made {
            // A concurrent worker does the same.
            let _ = self.renewed.compare_exchange(last, now.max(1), Ordering::Relaxed, Ordering::Relaxed);
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
