//! A named group of endpoints: which of them gets the next exchange, and how it is connected to.
//!
//! `proxy/select.rs` calls [`Upstream::select`] and passes [`Endpoint::peer`] to Pingora; the result is reported to
//! [`Upstream::ended`]. Work that takes time, such as name resolution and rebuilding the roster, happens at start
//! or in the background ([`Kept`]).

pub mod admission;
pub mod availability;
pub mod balance;
pub mod breaker;
mod check;
#[cfg(test)]
mod churn;
mod discovery;
mod ejector;
pub mod ended;
pub mod endpoint;
pub mod health;
pub mod latency;
pub mod orders;
pub mod outlier;
pub mod queue;
pub mod retries;
pub mod roster;
pub mod slow_start;
pub mod sticky;
pub mod tiers;
pub mod transport;
pub mod window;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::future::Future;
use std::io;
use std::panic;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use futures::FutureExt;
use futures::future::{BoxFuture, join_all};
use http::HeaderValue;
use pingora::protocols::l4::socket::SocketAddr;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::config;
use crate::config::upstream::balance::Policy;
use crate::config::upstream::{LoadBalancing, Protocol};
use crate::error::BuildError;
use crate::error::path::{self, join};
use crate::expression::Asked;
use crate::expression::fields::cookie;
use crate::filter::key::Keys;
use crate::metrics::UpstreamMetrics;
use crate::metrics::endpoints::{Group, Present};
use crate::upkeep::Kept;
use admission::Admission;
use availability::State;
use check::Checks;
use discovery::{Discovery, Resolve};
use ejector::Ejector;
use health::Health;
use orders::{Order, Overrides};
use queue::Place as PlaceInLine;
use retries::{Allowance, Permit, Retries};
use roster::Roster;
use sticky::{Sticky, StickyTarget};
use transport::Transport;

pub use admission::EndpointLease;
pub use balance::Split;
pub use check::Places;
pub use ended::{Ended, Outcome};
pub use endpoint::{Endpoint, Found};
pub use roster::Choice;

/// Pause after building a roster, per microsecond that it took. So frequent changes in a large upstream use at most
/// a tenth of the background thread, which also runs health checks.
const ROSTER_REST: Duration = Duration::from_micros(10);

/// How often removed endpoints are checked for active exchanges, so that idle ones can be dropped.
const REMOVED_LOOK: Duration = Duration::from_secs(1);

/// A named group of interchangeable endpoints.
pub struct Upstream {
    /// Its name: a metric label and a log field.
    pub name: Arc<str>,
    /// Time limits of its endpoints.
    pub timeouts: Timeouts,
    /// Its metrics.
    pub metrics: UpstreamMetrics,
    /// How connections to its endpoints are made.
    pub transport: Arc<Transport>,
    affinity: Affinity,
    /// Its limits and queue.
    pub admission: Arc<Admission>,
    membership: Membership,
    discovery: Discovery,
    checks: Option<Checks>,
    /// Its retry budget.
    retries: Arc<Retries>,
    /// The operator's orders. They outlive configuration changes.
    orders: Arc<Mutex<Overrides>>,
    ejector: Ejector,
    /// The settings as written.
    written: config::Upstream,
    /// Its successor, once this one serves only old exchanges. An inner `None`: it has no successor.
    successor: OnceLock<Option<Weak<Upstream>>>,
}

/// What ties a request to an endpoint.
struct Affinity {
    /// The settings for future rosters.
    load_balancing: LoadBalancing,
    /// The keys of hash policies; empty for other policies.
    keys: Keys,
    /// Session affinity, if configured.
    sticky: Option<Sticky>,
}

/// The endpoints of an upstream.
#[derive(Default)]
struct Membership {
    /// Every endpoint from its source, then removed ones that are still in use.
    members: ArcSwap<Vec<Arc<Endpoint>>>,
    roster: ArcSwap<Roster>,
    /// Held while the members or the roster change, never on a worker.
    changing: Mutex<()>,
    reassess: Notify,
}

/// Time limits of the endpoints of an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// To connect, TLS handshake included.
    pub connect: Duration,
    /// Between two writes of the request that the endpoint accepts.
    pub send: Duration,
    /// From the last byte of the request to the end of the response header.
    pub wait: Duration,
    /// Between two chunks of the response.
    pub receive: Duration,
}

impl Timeouts {
    /// After a switch to another protocol: the maximum time without bytes in either direction.
    pub fn idle(&self) -> Duration {
        self.wait.max(self.receive)
    }
}

/// The protocol to the endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spoken {
    /// HTTP/1; otherwise HTTP/2.
    pub http1: bool,
    /// Over TLS.
    pub tls: bool,
    /// The PROXY protocol sends the client's address first.
    pub proxy_protocol: bool,
}

impl Upstream {
    /// Builds the upstream `name`, which shares nothing with others. Reads the files named in it; names are resolved
    /// later ([`look_up`]).
    ///
    /// # Errors
    ///
    /// One per invalid value, unreadable file or unusable endpoint, at `upstreams.NAME.…`.
    pub fn build(
        name: &str,
        written: &config::Upstream,
        metrics: UpstreamMetrics,
    ) -> Result<Upstream, Vec<BuildError>> {
        let places = Places::new(config::server::Server::default().checks_at_once(), metrics.check_places());
        Self::build_with(name, written, metrics, &places, None, None)
    }

    /// As [`Upstream::build`], with the common places for health checks, and a predecessor: returns `before` if the
    /// settings and files are unchanged. Otherwise returns a new upstream that shares the unchanged parts and replaces
    /// it in [`Upstream::succeed`].
    ///
    /// # Errors
    ///
    /// As [`Upstream::build`].
    pub fn build_after(
        name: &str,
        written: &config::Upstream,
        metrics: UpstreamMetrics,
        places: &Arc<Places>,
        before: Option<&Arc<Upstream>>,
    ) -> Result<Arc<Upstream>, Vec<BuildError>> {
        if let Some(before) = before.filter(|before| before.written == *written) {
            let now = Transport::build(name, written, metrics.connections.clone());
            let now = now.map_err(|errors| at(&join("upstreams", &path::key(name)), errors))?;
            if now.makes_the_same_connections(&before.transport) {
                return Ok(before.clone());
            }
        }
        Self::build_with(name, written, metrics, places, None, before.map(|before| &**before)).map(Arc::new)
    }

    fn build_with(
        name: &str,
        written: &config::Upstream,
        metrics: UpstreamMetrics,
        places: &Arc<Places>,
        resolver: Option<Box<dyn Resolve>>,
        before: Option<&Upstream>,
    ) -> Result<Upstream, Vec<BuildError>> {
        let place = join("upstreams", &path::key(name));
        let timeouts = Timeouts::from(&written.timeouts);
        let transport =
            Transport::build(name, written, metrics.connections.clone()).map_err(|errors| at(&place, errors))?;
        let shares = before
            .filter(|before| before.serves_as(written) && transport.makes_the_same_connections(&before.transport));
        let discovery = Discovery::build(written, &transport, metrics.discoveries.clone(), resolver)
            .map_err(|errors| at(&place, errors))?;
        if let Some(before) = before {
            discovery.remember(&before.discovery);
        }
        let keys = Keys::build(&written.load_balancing.hash_key.0)
            .map_err(|error| at(&place, vec![error.under("load_balancing.hash_key")]))?;
        let sticky = written.load_balancing.sticky.as_ref().map(|sticky| Sticky::build(&sticky.cookie, name));
        let sticky = sticky.transpose();
        let sticky = sticky.map_err(|error| at(&place, vec![error.under("load_balancing.sticky.cookie")]))?;
        let checks = written.health_check.as_ref();
        let checks = checks.map(|written| Checks::build(written, metrics.health_checks(), places));
        let limits = metrics.limits.clone();
        let ejector = Ejector::build(
            &written.outlier_detection,
            metrics.ejections(outlier::Reason::ALL.map(outlier::Reason::name)),
        );
        let upstream = Upstream {
            name: name.into(),
            timeouts,
            metrics,
            transport: shares.map_or_else(|| Arc::new(transport), |before| before.transport.clone()),
            affinity: Affinity { load_balancing: written.load_balancing.clone(), keys, sticky },
            admission: shares
                .map_or_else(|| Admission::new(written, limits, Instant::now()), |before| before.admission.clone()),
            membership: Membership::default(),
            discovery,
            checks,
            retries: shares.map(|before| before.retries.clone()).unwrap_or_default(),
            orders: before.map(|before| before.orders.clone()).unwrap_or_default(),
            ejector,
            written: written.clone(),
            successor: OnceLock::new(),
        };
        upstream.discovered(upstream.discovery.found());
        Ok(upstream)
    }

    /// Whether all settings except endpoints, load balancing and health checks are equal: then endpoints are kept.
    fn serves_as(&self, written: &config::Upstream) -> bool {
        let mut own = self.written.clone();
        own.endpoints = written.endpoints.clone();
        own.dns = written.dns.clone();
        own.file = written.file.clone();
        own.health_check = written.health_check.clone();
        own.outlier_detection = written.outlier_detection.clone();
        let sticky = own.load_balancing.sticky.take();
        own.load_balancing = LoadBalancing { sticky, ..written.load_balancing.clone() };
        own == *written
    }

    /// Replaces `before`, which has the same name. Endpoints that stay keep their active exchanges and all their
    /// state if connection settings and limits are equal; otherwise only their health state. Not for workers.
    pub fn succeed(&self, before: &Upstream) {
        let now = Instant::now();
        let earlier = before.membership.members.load();
        let known: HashMap<(&str, &SocketAddr), &Arc<Endpoint>> =
            earlier.iter().map(|endpoint| ((&*endpoint.label, &endpoint.address), endpoint)).collect();
        let found = merged(self.discovery.found());
        let stay = found.iter().filter_map(|found| known.get(&(&*found.label, &found.address)));
        let stay: Vec<Arc<Endpoint>> =
            stay.filter(|endpoint| !endpoint.availability().is_removed()).map(|&endpoint| endpoint.clone()).collect();
        if Arc::ptr_eq(&self.transport, &before.transport) {
            self.membership.members.store(Arc::new(stay));
            self.membership.roster.store(before.membership.roster.load_full());
        }
        self.discovered(found);
        for endpoint in self.membership.members.load().iter() {
            let Some(earlier) = known.get(&(&*endpoint.label, &endpoint.address)) else { continue };
            if !Arc::ptr_eq(endpoint, earlier) {
                endpoint.resemble(earlier);
            }
            match (&self.checks, &before.checks) {
                // No check would ever change that.
                (None, _) => {
                    endpoint.set_health(Health::Unknown, true, now);
                }
                (Some(checks), None) => checks.introduce(endpoint, now),
                (Some(checks), Some(_)) => checks.judge(endpoint, now),
            }
        }
        let _changing = self.membership.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let members = self.membership.members.load().to_vec();
        self.publish(members, Vec::new());
    }

    /// From now on serves only exchanges that already use it; `successor` replaces it, if there is one.
    pub fn retire(&self, successor: Option<&Arc<Upstream>>) {
        // It is replaced only once.
        let _ = self.successor.set(successor.map(Arc::downgrade));
    }

    /// The load balancing policy.
    pub fn policy(&self) -> Policy {
        self.affinity.load_balancing.policy
    }

    /// Number of exchanges with one of its endpoints.
    pub fn inflight(&self) -> u32 {
        self.admission.inflight()
    }

    /// Number of exchanges in its queue.
    pub fn queued(&self) -> u32 {
        self.admission.queue().len()
    }

    /// The state of its circuit breaker, if it has one.
    pub fn breaker(&self) -> Option<breaker::State> {
        self.admission.breaker().map(|breaker| breaker.state())
    }

    /// Whether each exchange has its own connection.
    pub fn is_http1(&self) -> bool {
        self.transport.protocol == Protocol::Http1
    }

    /// The protocol to its endpoints.
    pub fn spoken(&self) -> Spoken {
        Spoken {
            http1: self.is_http1(),
            tls: self.transport.is_secure(),
            proxy_protocol: self.transport.introduces_clients(),
        }
    }

    /// Whether its endpoints can receive gRPC, which requires HTTP/2.
    pub fn speaks_grpc(&self) -> bool {
        !self.is_http1()
    }

    /// Whether the choice of an endpoint depends on the request.
    pub fn has_affinity(&self) -> bool {
        !self.affinity.keys.is_empty() || self.affinity.sticky.is_some()
    }

    /// The hash of an exchange's key for [`Upstream::select`], or a random number without a key. Computed once per
    /// exchange, so that all attempts use the same.
    pub fn hash(&self, asked: &Asked<'_>) -> u64 {
        if self.affinity.keys.is_empty() { 0 } else { self.affinity.keys.hash(asked).unwrap_or_else(rand::random) }
    }

    /// The affinity in the request's cookie; `None` without a cookie with a valid signature.
    pub fn stuck(&self, asked: &Asked<'_>) -> Option<StickyTarget> {
        let sticky = self.affinity.sticky.as_ref()?;
        sticky.read(cookie(asked.headers, sticky.name.as_bytes())?, SystemTime::now())
    }

    /// The `Set-Cookie` for the endpoint that responded; `None` if none is needed or configured.
    pub fn cookie(&self, stuck: Option<&StickyTarget>, endpoint: &Endpoint, https: bool) -> Option<HeaderValue> {
        let sticky = self.affinity.sticky.as_ref()?;
        let stays = stuck.is_some_and(|stuck| !stuck.is_old && endpoint.names.contains(&stuck.endpoint));
        if stays { None } else { sticky.write(&endpoint.names, https, SystemTime::now()) }
    }

    /// Chooses the next endpoint, excluding `tried`. The caller must report the result to [`Upstream::ended`].
    /// `hash` is that of the exchange's key, used by hash policies only. If others are queued, the caller must
    /// queue, too.
    pub fn select(&self, hash: u64, tried: &[Arc<Endpoint>], now: Instant) -> Choice {
        self.select_for(None, hash, tried, now)
    }

    /// As [`Upstream::select`], for a client with session affinity: its endpoint has priority if it is available and
    /// has room.
    pub fn select_for(&self, stuck: Option<&StickyTarget>, hash: u64, tried: &[Arc<Endpoint>], now: Instant) -> Choice {
        match self.admission.queue().bars() {
            true => self.if_admitted(now, || Choice::Full),
            false => self.select_in_turn(stuck, hash, tried, now),
        }
    }

    /// As [`Upstream::select_for`], for an exchange that has a turn in the queue.
    pub fn select_in_turn(
        &self,
        stuck: Option<&StickyTarget>,
        hash: u64,
        tried: &[Arc<Endpoint>],
        now: Instant,
    ) -> Choice {
        let choose = |roster: &Roster| {
            let stuck = stuck.filter(|_| !self.admission.is_full());
            let stays = stuck.and_then(|stuck| self.admission.lease(roster.named(stuck.endpoint, tried)?));
            stays.map_or_else(|| roster.lease(hash, tried, &self.admission, now), Choice::Leased)
        };
        self.if_admitted(now, || {
            let roster = self.membership.roster.load();
            match choose(&roster) {
                // All were removed meanwhile, and there are new ones.
                Choice::NoEndpoint if !Arc::ptr_eq(&roster, &self.membership.roster.load()) => {
                    choose(&self.membership.roster.load())
                }
                choice => choice,
            }
        })
    }

    /// Chooses if the circuit breaker permits it.
    fn if_admitted(&self, now: Instant, choose: impl FnOnce() -> Choice) -> Choice {
        let admitted = match self.admission.admit(now) {
            Ok(admitted) => admitted,
            Err(away) => return Choice::Away(away),
        };
        match choose() {
            Choice::Leased(lease) => {
                lease.metrics.selections.inc();
                Choice::Leased(lease.with(admitted))
            }
            other => {
                self.admission.unused(admitted.as_ref(), now);
                other
            }
        }
    }

    /// Joins the queue; `None`: it is full.
    pub fn queue(&self, tried: &[Arc<Endpoint>], now: Instant) -> Option<PlaceInLine> {
        self.admission.queue().join(!tried.is_empty(), now)
    }

    /// Whether an idle connection exceeds the pool and should be closed.
    pub fn has_surplus_connections(&self) -> bool {
        self.transport.is_surplus(self.admission.inflight())
    }

    /// Whether there is an endpoint that is not in `tried`.
    pub fn has_more(&self, tried: &[Arc<Endpoint>]) -> bool {
        self.membership.roster.load().has_more(tried)
    }

    /// A permit for a retry; `None` if retries are over the budget.
    pub fn permit_retry(&self, allowance: Allowance) -> Option<Permit> {
        self.retries.permit(self.admission.inflight(), allowance)
    }

    /// Reports the end of an attempt. Called exactly once per endpoint that [`Upstream::select`] returned.
    pub fn ended(&self, lease: &mut EndpointLease, ended: &Ended, now: Instant) {
        self.count(ended);
        lease.learn(ended, now);
        lease.ended(ended, now);
        self.ejector.hear(lease, ended);
    }

    fn count(&self, ended: &Ended) {
        if let Some(connect) = ended.connect {
            self.metrics.connect_seconds.observe(connect.as_secs_f64());
        }
        if let Some(wait) = ended.wait {
            self.metrics.wait_seconds.observe(wait.as_secs_f64());
        }
        if let Outcome::Connect(why) = ended.outcome {
            self.metrics.count_connect_failure(why);
        }
    }

    /// All endpoints, available or not.
    pub fn members(&self) -> Arc<Vec<Arc<Endpoint>>> {
        self.membership.members.load_full()
    }

    /// Replaces the list of endpoints by what a source has found. Endpoints that stay keep their active exchanges
    /// and their state; removed ones get no new exchanges and finish the active ones. Not for workers.
    ///
    /// An address that is found twice becomes one endpoint with the sum of the weights, the lower tier, and the
    /// first label.
    pub fn discovered(&self, found: Vec<Found>) {
        let _changing = self.membership.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let before = self.membership.members.load();
        let known: HashMap<(&str, &SocketAddr), &Arc<Endpoint>> =
            before.iter().map(|endpoint| ((&*endpoint.label, &endpoint.address), endpoint)).collect();
        let found = merged(found);
        let mut members: Vec<Arc<Endpoint>> = Vec::with_capacity(found.len());
        for found in &found {
            let member = match known.get(&(&*found.label, &found.address)) {
                Some(&endpoint) => {
                    endpoint.update(found);
                    endpoint.set_removed(false, now);
                    Arc::clone(endpoint)
                }
                None => {
                    let metrics = self.metrics.endpoint(&found.label);
                    let mut endpoint = Endpoint::new(found, &self.transport, metrics, now);
                    if let Some(sticky) = &self.affinity.sticky {
                        endpoint.names = sticky.names(&endpoint.identity);
                    }
                    if !before.is_empty() {
                        endpoint.begin_slowly(now);
                    }
                    if let Some(checks) = &self.checks {
                        checks.introduce(&endpoint, now);
                    }
                    self.orders().repeat(&endpoint, now);
                    Arc::new(endpoint)
                }
            };
            members.push(member);
        }
        let kept: HashSet<*const Endpoint> = members.iter().map(Arc::as_ptr).collect();
        let leaving: Vec<Arc<Endpoint>> =
            before.iter().filter(|endpoint| !kept.contains(&Arc::as_ptr(endpoint))).cloned().collect();
        let removed = !leaving.is_empty();
        self.publish(members, leaving);
        if removed {
            self.reassess();
        }
        if let Some(checks) = &self.checks {
            checks.members_changed();
        }
    }

    /// Applies an order to all endpoints with this label or address, and returns them. An address matches if it is
    /// one of an endpoint's two. The order holds as long as the process has an upstream of this name. Not for
    /// workers.
    pub fn order(&self, name: &str, order: Order) -> Vec<Arc<Endpoint>> {
        let now = Instant::now();
        let members = self.membership.members.load();
        let meant = |endpoint: &&Arc<Endpoint>| *endpoint.label == *name || endpoint.address.to_string() == name;
        let meant: Vec<Arc<Endpoint>> = members.iter().filter(meant).cloned().collect();
        let mut orders = self.orders();
        meant.iter().for_each(|endpoint| orders.give(endpoint, order, now));
        drop(orders);
        self.reassess();
        meant
    }

    /// Held while an order is carried out, never on a worker.
    fn orders(&self) -> MutexGuard<'_, Overrides> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The availability of an endpoint has changed: schedules a new roster. Cheap, callable from anywhere.
    pub fn reassess(&self) {
        self.membership.reassess.notify_one();
    }

    /// Rebuilds the roster on demand.
    async fn keep_roster(&self) {
        loop {
            // The end of a removed endpoint's last exchange sends no signal.
            let removed = self.membership.members.load().iter().any(|endpoint| endpoint.availability().is_removed());
            match removed {
                true if timeout(REMOVED_LOOK, self.membership.reassess.notified()).await.is_err() => {
                    self.forget();
                    continue;
                }
                true => {}
                false => self.membership.reassess.notified().await,
            }
            let began = Instant::now();
            {
                let _changing = self.membership.changing.lock().unwrap_or_else(PoisonError::into_inner);
                let members = self.membership.members.load().to_vec();
                self.publish(members, Vec::new());
            }
            // Unavailable endpoints are skipped immediately, so the others can wait if building a roster takes
            // long.
            sleep(ROSTER_REST * u32::try_from(began.elapsed().as_micros()).unwrap_or(u32::MAX)).await;
        }
    }

    /// Drops removed endpoints without active exchanges. They are in no roster.
    fn forget(&self) {
        let _changing = self.membership.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut members = self.membership.members.load().to_vec();
        members.retain(Self::is_kept);
        self.membership.members.store(Arc::new(members));
    }

    fn is_kept(endpoint: &Arc<Endpoint>) -> bool {
        !endpoint.availability().is_removed() || endpoint.inflight() > 0
    }

    /// Whether a health-checked endpoint has no result yet.
    pub fn is_unchecked(&self) -> bool {
        let unknown = |endpoint: &Arc<Endpoint>| {
            !endpoint.availability().is_removed() && endpoint.checks().health() == Health::Unknown
        };
        self.checks.is_some() && self.members().iter().any(unknown)
    }

    async fn keep_health(&self) {
        if let Some(checks) = &self.checks {
            checks.run(self).await;
        }
    }

    /// Builds the roster of these members; the caller holds `changing`. The `leaving` ones are removed afterwards,
    /// so that there is always an endpoint to choose; those without active exchanges are dropped.
    fn publish(&self, mut members: Vec<Arc<Endpoint>>, leaving: Vec<Arc<Endpoint>>) {
        members.retain(Self::is_kept);
        let before = self.membership.roster.load();
        let roster = Roster::new(&self.affinity.load_balancing, &members, &before);
        if roster.panics() != before.panics() {
            match roster.panics() {
                true => warn!(upstream = %self.name, "too few endpoints are available: requests go to all of them"),
                false => info!(upstream = %self.name, "enough endpoints are available again"),
            }
        }
        self.metrics.panic.set(roster.panics().into());
        let roster = Arc::new(roster);
        self.membership.roster.store(Arc::clone(&roster));
        let now = Instant::now();
        for endpoint in leaving {
            endpoint.set_removed(true, now);
            if endpoint.inflight() > 0 {
                members.push(endpoint);
            }
        }
        if !self.admission.queue().is_empty() {
            // Wakes as many queued exchanges as there is room for; without any endpoints, all of them.
            let room = if roster.is_empty() { u32::MAX } else { self.admission.room(roster.members()) };
            self.admission.queue().changed(room);
        }
        self.membership.members.store(Arc::new(members));
    }

    /// Resolves all names; returns errors for required names that do not exist.
    async fn look_up(&self) -> Vec<BuildError> {
        let errors = self.discovery.look(&self.name).await;
        self.discovered(self.discovery.found());
        at(&join("upstreams", &path::key(&self.name)), errors)
    }
}

impl Group for Upstream {
    fn name(&self) -> &str {
        &self.name
    }

    fn states(&self) -> Vec<&'static str> {
        State::ALL.map(State::name).into()
    }

    fn each(&self, tell: &mut dyn FnMut(Present<'_>)) {
        let successor = self.successor.get().map(|successor| successor.as_ref().and_then(Weak::upgrade));
        if let Some(successor) = successor {
            // The successor reports endpoints that stay.
            let told: HashSet<*const Endpoint> =
                successor.iter().flat_map(|next| next.members().iter().map(Arc::as_ptr).collect::<Vec<_>>()).collect();
            let members = self.membership.members.load();
            let left = members.iter().filter(|one| one.inflight() > 0 && !told.contains(&Arc::as_ptr(one)));
            left.for_each(|endpoint| {
                tell(Present {
                    label: &endpoint.label,
                    state: State::Draining.name(),
                    available: false,
                    inflight: endpoint.inflight(),
                });
            });
            return;
        }
        for endpoint in &**self.membership.members.load() {
            let availability = endpoint.availability();
            tell(Present {
                label: &endpoint.label,
                state: availability.state().name(),
                available: availability.admits(),
                inflight: endpoint.inflight(),
            });
        }
    }
}

/// The list with each address once.
fn merged(found: Vec<Found>) -> Vec<Found> {
    let mut places: HashMap<SocketAddr, usize> = HashMap::new();
    let mut merged: Vec<Found> = Vec::with_capacity(found.len());
    for found in found {
        match places.get(&found.address) {
            Some(&place) => {
                let first = &mut merged[place];
                first.weight = first.weight.saturating_add(found.weight.get());
                first.priority = first.priority.min(found.priority);
            }
            None => {
                places.insert(found.address.clone(), merged.len());
                merged.push(found);
            }
        }
    }
    merged
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream").field("name", &self.name).finish_non_exhaustive()
    }
}

impl From<&config::upstream::Timeouts> for Timeouts {
    fn from(written: &config::upstream::Timeouts) -> Self {
        Timeouts { connect: written.connect.0, send: written.send.0, wait: written.wait.0, receive: written.receive.0 }
    }
}

/// Resolves all names of these upstreams in parallel; may block for seconds. Names without a result are resolved
/// again in the background.
///
/// # Errors
///
/// One per name in `endpoints` that does not exist.
pub fn look_up<'a>(upstreams: impl IntoIterator<Item = &'a Arc<Upstream>>) -> Vec<BuildError> {
    let upstreams: Vec<&Arc<Upstream>> = upstreams.into_iter().collect();
    let looked = block_on(join_all(upstreams.iter().map(|upstream| upstream.look_up())));
    match looked {
        Ok(errors) => errors.into_iter().flatten().collect(),
        Err(error) => vec![BuildError::new("upstreams", format!("no names can be looked up: {error}"))],
    }
}

/// Runs a future on its own thread, since the caller may be inside a runtime, which must not block.
fn block_on<T: Send>(future: impl Future<Output = T> + Send) -> io::Result<T> {
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let result = runtime.block_on(future);
        // Does not wait for a resolver that hangs.
        runtime.shutdown_background();
        Ok(result)
    };
    thread::scope(|scope| scope.spawn(run).join()).unwrap_or_else(|panic| panic::resume_unwind(panic))
}

fn at(place: &str, errors: Vec<BuildError>) -> Vec<BuildError> {
    errors.into_iter().map(|error| error.under(place)).collect()
}

impl Kept for Upstream {
    /// Its background work, on one thread outside the workers.
    fn keep(self: Arc<Self>) -> BoxFuture<'static, ()> {
        async move {
            tokio::join!(self.keep_roster(), self.discovery.keep(&self), self.keep_health(), self.ejector.run(&self));
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::collections::{BTreeMap, BTreeSet};
    use std::net;
    use std::num::NonZeroU32;

    use async_trait::async_trait;
    use discovery::{QueryResult, Service};

    /// A resolver with answers set by a test.
    #[derive(Default)]
    struct Script(Mutex<HashMap<&'static str, Vec<&'static str>>>);

    impl Script {
        /// Sets the addresses of `host`; with an empty list, look-ups fail.
        fn set(self: &Arc<Self>, host: &'static str, addresses: &[&'static str]) -> Arc<Self> {
            self.0.lock().unwrap().insert(host, addresses.to_vec());
            Arc::clone(self)
        }
    }

    #[async_trait]
    impl Resolve for Arc<Script> {
        async fn addresses(&self, host: &str) -> QueryResult<net::IpAddr> {
            match self.0.lock().unwrap().get(host) {
                Some(addresses) if addresses.is_empty() => QueryResult::Failed("nobody tells".to_owned()),
                Some(addresses) => {
                    let addresses = addresses.iter().map(|address| address.parse().unwrap());
                    QueryResult::Found(addresses.collect(), Duration::ZERO)
                }
                None => QueryResult::None(format!("there is no `{host}`")),
            }
        }

        async fn services(&self, _: &str) -> QueryResult<Service> {
            unreachable!("no test asks for one")
        }
    }

    fn written(endpoints: &[(&str, u32)]) -> config::Upstream {
        let written = endpoints.iter().map(|(_, weight)| format!("{{ address: \"a:1\", weight: {weight} }}"));
        let yaml = format!(
            "{{ load_balancing: {{ policy: round_robin }}, endpoints: [ {} ] }}",
            written.collect::<Vec<_>>().join(", ")
        );
        let mut written: config::Upstream = config::filter::decode(&serde_yaml::from_str(&yaml).unwrap()).unwrap();
        for (written, (address, _)) in written.endpoints.iter_mut().zip(endpoints) {
            // Set here so that it may be an address that a file rejects.
            written.address = config::Address((*address).to_owned());
        }
        written
    }

    fn metrics() -> UpstreamMetrics {
        crate::metrics::Metrics::new(100, Vec::new()).upstream("shop")
    }

    fn build_with(written: &config::Upstream, resolver: Box<dyn Resolve>) -> Result<Upstream, Vec<BuildError>> {
        let (metrics, resolver) = (metrics(), Some(resolver));
        let places = Places::new(1, metrics.check_places());
        Upstream::build_with("shop", written, metrics, &places, resolver, None)
    }

    fn build(endpoints: &[(&str, u32)], resolver: &Arc<Script>) -> Result<Upstream, Vec<BuildError>> {
        let resolver: Box<dyn Resolve> = Box::new(Arc::clone(resolver));
        let upstream = build_with(&written(endpoints), resolver)?;
        let errors = block_on(upstream.look_up()).unwrap();
        if errors.is_empty() { Ok(upstream) } else { Err(errors) }
    }

    /// The result of this many selections, as counts per `label address`.
    fn selected(upstream: &Upstream, turns: usize) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for _ in 0..turns {
            let endpoint = upstream.select(0, &[], Instant::now()).lease().unwrap();
            *counts.entry(format!("{} {}", endpoint.label, endpoint.address)).or_default() += 1;
        }
        counts
    }

    fn counts(expected: &[(&str, usize)]) -> BTreeMap<String, usize> {
        expected.iter().map(|(endpoint, count)| (endpoint.to_string(), *count)).collect()
    }

    #[test]
    fn endpoints_take_turns_by_weight_and_each_selection_is_counted() {
        let upstream = build(&[("10.0.0.1:80", 5), ("unix:/run/b.sock", 1), ("[::1]:80", 1)], &Arc::default()).unwrap();
        let order: Vec<_> = (0..7).map(|_| upstream.select(0, &[], Instant::now()).lease().unwrap()).collect();
        let labels: Vec<&str> = order.iter().map(|endpoint| &*endpoint.label).collect();
        let a = "10.0.0.1:80";
        assert_eq!(labels, [a, a, "unix:/run/b.sock", a, "[::1]:80", a, a]);
        assert_eq!((order[0].metrics.selections.get(), order[0].inflight()), (5, 5));
    }

    #[test]
    fn an_endpoint_that_was_tried_is_not_selected_again_and_after_the_last_there_is_none() {
        let upstream = build(&[("10.0.0.1:80", 9), ("10.0.0.2:80", 1), ("10.0.0.3:80", 1)], &Arc::default()).unwrap();
        let mut tried = Vec::new();
        while let Some(endpoint) = upstream.select(0, &tried, Instant::now()).lease() {
            tried.push(Arc::clone(endpoint.endpoint()));
        }
        let distinct: BTreeSet<String> = tried.iter().map(|endpoint| endpoint.address.to_string()).collect();
        assert_eq!((tried.len(), distinct.len()), (3, 3));
    }

    #[test]
    fn a_name_with_several_addresses_is_several_endpoints() {
        let script = Arc::<Script>::default().set("api.test", &["10.0.0.1", "10.0.0.2", "10.0.0.1"]);
        let upstream = build(&[("api.test:80", 2), ("10.0.0.3:80", 1)], &script).unwrap();
        let expected =
            counts(&[("10.0.0.3:80 10.0.0.3:80", 1), ("api.test:80 10.0.0.1:80", 2), ("api.test:80 10.0.0.2:80", 2)]);
        assert_eq!(selected(&upstream, 5), expected);
    }

    #[test]
    fn an_address_that_is_meant_twice_is_one_endpoint_with_both_weights() {
        let script = Arc::<Script>::default().set("a.test", &["10.0.0.1"]).set("b.test", &["10.0.0.1"]);
        let upstream = build(&[("a.test:80", 1), ("b.test:80", 2), ("10.0.0.2:80", 1)], &script).unwrap();
        assert_eq!(selected(&upstream, 4), counts(&[("10.0.0.2:80 10.0.0.2:80", 1), ("a.test:80 10.0.0.1:80", 3)]));
    }

    #[tokio::test]
    async fn a_refresh_takes_in_new_addresses_and_keeps_the_last_good_answer() {
        let script = Arc::<Script>::default().set("a.test", &["10.0.0.1"]).set("b.test", &["10.0.1.1"]);
        let upstream = build(&[("a.test:80", 1), ("b.test:80", 1)], &script).unwrap();
        let before = upstream.select(0, &[], Instant::now()).lease().unwrap();

        script.set("a.test", &[]).set("b.test", &["10.0.1.2", "10.0.1.3"]);
        upstream.look_up().await;
        let expected = [("a.test:80 10.0.0.1:80", 1), ("b.test:80 10.0.1.2:80", 1), ("b.test:80 10.0.1.3:80", 1)];
        assert_eq!(selected(&upstream, 3), counts(&expected));
        let members = upstream.members();
        let stays = members.iter().any(|member| Arc::ptr_eq(member, before.endpoint()));
        assert!(stays, "an endpoint that stays is the same one");
    }

    #[tokio::test]
    async fn names_that_swap_their_addresses_swap_their_endpoints() {
        let script = Arc::<Script>::default().set("a.test", &["10.0.0.1"]).set("b.test", &["10.0.0.2"]);
        let upstream = build(&[("a.test:80", 1), ("b.test:80", 1)], &script).unwrap();
        script.set("a.test", &["10.0.0.2"]).set("b.test", &["10.0.0.1"]);
        upstream.look_up().await;
        assert_eq!(selected(&upstream, 2), counts(&[("a.test:80 10.0.0.2:80", 1), ("b.test:80 10.0.0.1:80", 1)]));
    }

    #[tokio::test]
    async fn the_resolver_of_the_system_may_be_asked_from_within_a_runtime() {
        let upstream = Arc::new(Upstream::build("shop", &written(&[("localhost:80", 1)]), metrics()).unwrap());
        assert!(look_up([&upstream]).is_empty());
        assert_eq!(&*upstream.select(0, &[], Instant::now()).lease().unwrap().label, "localhost:80");
    }

    #[test]
    fn every_address_that_is_wrong_or_unknown_is_told_with_its_place() {
        let errors = build(&[("10.0.0.1:80", 1), ("api.test", 1), ("unix:", 1)], &Arc::default()).unwrap_err();
        let told: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                "upstreams.shop.endpoints[1].address: `api.test` is not an address: write `host:port`, `[v6]:port` \
                 or `unix:/path`",
                "upstreams.shop.endpoints[2].address: `unix:` needs a path, such as `unix:/run/app.sock`",
            ]
        );

        let errors = build(&[("10.0.0.1:80", 1), ("api.test:80", 1)], &Arc::default()).unwrap_err();
        assert_eq!(errors[0].to_string(), "upstreams.shop.endpoints[1].address: there is no `api.test`");
        assert_eq!(build(&[], &Arc::default()).unwrap_err()[0].path, "upstreams.shop.endpoints");
    }

    #[test]
    fn tls_needs_something_to_verify_the_certificate_against() {
        let script = Arc::<Script>::default().set("api.test", &["10.0.0.1"]);
        let addresses = [("10.0.0.1:443", 1), ("api.test:443", 1), ("[::1]:443", 1), ("unix:/run/a.sock", 1)];
        let written = config::Upstream { protocol: config::upstream::Protocol::H2, ..written(&addresses) };
        let errors = build_with(&written, Box::new(script)).unwrap_err();
        let places: Vec<&str> = errors.iter().map(|error| error.path.trim_start_matches("upstreams.shop.")).collect();
        assert_eq!(places, ["endpoints[3].address"]);
    }

    #[tokio::test]
    async fn an_endpoint_that_is_busy_is_remembered_until_it_is_free_and_taken_back_if_it_comes_again() {
        let script = Arc::<Script>::default().set("a.test", &["10.0.0.1"]);
        let upstream = build(&[("a.test:80", 1)], &script).unwrap();
        let busy = upstream.select(0, &[], Instant::now()).lease().unwrap();
        script.set("a.test", &["10.0.0.2"]);
        upstream.look_up().await;
        assert_eq!(selected(&upstream, 2), counts(&[("a.test:80 10.0.0.2:80", 2)]), "it is given nothing new");
        assert_eq!((upstream.members().len(), busy.availability().state()), (2, State::Draining));

        script.set("a.test", &["10.0.0.1"]);
        upstream.look_up().await;
        assert!(Arc::ptr_eq(upstream.select(0, &[], Instant::now()).lease().unwrap().endpoint(), busy.endpoint()));
        assert_eq!((upstream.members().len(), busy.inflight()), (1, 1), "the other one had nothing to do");
    }

    #[tokio::test]
    async fn an_endpoint_that_is_taken_out_is_not_chosen_and_back_again_after_the_roster_was_made_anew() {
        let upstream = Arc::new(build(&[("10.0.0.1:80", 1), ("10.0.0.2:80", 1)], &Arc::default()).unwrap());
        let keeping = tokio::spawn({
            let upstream = Arc::clone(&upstream);
            async move { upstream.keep_roster().await }
        });
        let members = upstream.members();
        members[0].set_draining(true, Instant::now());
        assert_eq!(selected(&upstream, 4), counts(&[("10.0.0.2:80 10.0.0.2:80", 4)]), "at once");
        upstream.reassess();
        let until = async |available: usize| {
            while upstream.membership.roster.load().len() != available {
                tokio::task::yield_now().await;
            }
        };
        until(1).await;
        members[0].set_draining(false, Instant::now());
        upstream.reassess();
        until(2).await;
        assert_eq!(selected(&upstream, 4).len(), 2);
        keeping.abort();
    }

    #[tokio::test]
    async fn what_the_operator_orders_holds_for_an_address_that_goes_and_comes_again() {
        let script = Arc::<Script>::default().set("a.test", &["10.0.0.1", "10.0.0.2"]);
        let upstream = build(&[("a.test:80", 1)], &script).unwrap();
        assert_eq!(upstream.order("10.0.0.1:80", Order::Drain).len(), 1);
        assert_eq!(upstream.order("a.test:80", Order::Weigh(NonZeroU32::new(3))).len(), 2);
        assert!(upstream.order("10.0.0.3:80", Order::Drain).is_empty());
        script.set("a.test", &["10.0.0.3"]);
        upstream.look_up().await;
        script.set("a.test", &["10.0.0.1", "10.0.0.3"]);
        upstream.look_up().await;
        let members = upstream.members();
        let told: Vec<_> =
            members.iter().map(|member| (member.availability().is_drained(), member.weight().get())).collect();
        assert_eq!(told, [(true, 3), (false, 1)]);
        assert_eq!(selected(&upstream, 2), counts(&[("a.test:80 10.0.0.3:80", 2)]));
    }

    #[tokio::test]
    async fn names_are_resolved_again_in_the_background() {
        let script = Arc::<Script>::default().set("a.test", &["10.0.0.1"]);
        let yaml = "{ dns: { name: a.test, port: 80, refresh: 1ms } }";
        let written: config::Upstream = config::filter::decode(&serde_yaml::from_str(yaml).unwrap()).unwrap();
        let resolver: Box<dyn Resolve> = Box::new(Arc::clone(&script));
        let upstream = Arc::new(build_with(&written, resolver).unwrap());
        assert!(look_up([&upstream]).is_empty() && upstream.members().len() == 1);
        let running = tokio::spawn(Arc::clone(&upstream).keep());

        script.set("a.test", &["10.0.0.2"]);
        let refreshed = async {
            while upstream.select(0, &[], Instant::now()).lease().unwrap().address.to_string() != "10.0.0.2:80" {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), refreshed).await.unwrap();
        running.abort();
    }
}
