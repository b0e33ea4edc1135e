//! A named group of endpoints: which of them takes the next exchange, and how it is connected to.
//!
//! `proxy/select.rs` asks [`Upstream::select`] and hands [`Endpoint::peer`] to Pingora; what became of it is told to
//! [`Upstream::ended`]. Everything that may take time, such as resolving names and working out who may be chosen, is
//! done at start or in the background ([`Kept`]).

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
use orders::{Order, Orders};
use queue::Place as PlaceInLine;
use retries::{Allowance, Permit, Retries};
use roster::Roster;
use sticky::{Sticky, Stuck};
use transport::Transport;

pub use admission::Engaged;
pub use balance::Split;
pub use ended::{Ended, Outcome};
pub use endpoint::{Endpoint, Found};
pub use roster::Choice;

/// How long nothing is done after a roster was made, for each microsecond that it took: so a roster of many endpoints,
/// of which one after the other changes, takes no more than a tenth of the thread that checks them as well.
const ROSTER_REST: Duration = Duration::from_micros(10);

/// How often it is asked whether endpoints that were removed have ended what they had, so that they can be forgotten.
const REMOVED_LOOK: Duration = Duration::from_secs(1);

/// A named group of endpoints that serve the same.
pub struct Upstream {
    /// Its name: a metric label and a log field.
    pub name: Arc<str>,
    /// How long its endpoints may take.
    pub timeouts: Timeouts,
    /// Its counters.
    pub metrics: UpstreamMetrics,
    /// How its endpoints are connected to.
    pub transport: Arc<Transport>,
    /// For the rosters that are still to be made.
    load_balancing: LoadBalancing,
    /// What policies with a hash go by; empty for the others.
    keys: Keys,
    /// How its clients stay where they are, if they do.
    sticky: Option<Sticky>,
    /// Who is let in, and who waits.
    pub admission: Arc<Admission>,
    /// Every endpoint that its source names, then those that it names no longer and that are still busy.
    members: ArcSwap<Vec<Arc<Endpoint>>>,
    roster: ArcSwap<Roster>,
    /// Held while the members or the roster are changed, which never happens on a worker.
    changing: Mutex<()>,
    reassess: Notify,
    discovery: Discovery,
    checks: Option<Checks>,
    /// Requests that it was sent already and gets again.
    retries: Arc<Retries>,
    /// What the operator has ordered. It outlives changes of the configuration.
    orders: Arc<Mutex<Orders>>,
    ejector: Ejector,
    /// As it is written.
    written: config::Upstream,
    /// What took its place, once it serves only those who began with it. `None` in there: nothing did.
    successor: OnceLock<Option<Weak<Upstream>>>,
}

/// How long the endpoints of an upstream may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// To accept a connection, TLS included.
    pub connect: Duration,
    /// Between two pieces of the request that the endpoint takes.
    pub send: Duration,
    /// From the last byte of the request to the end of the response header.
    pub wait: Duration,
    /// Between two pieces of the response.
    pub receive: Duration,
}

/// What is spoken with endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spoken {
    /// HTTP/1; else HTTP/2.
    pub http1: bool,
    /// It is spoken over TLS.
    pub tls: bool,
    /// The endpoint first gets the address of the client that a connection is for.
    pub proxy_protocol: bool,
}

impl Upstream {
    /// Builds the upstream `name`. It reads the files that are named in it; names are still to be looked up
    /// ([`look_up`]).
    ///
    /// # Errors
    ///
    /// One for each thing that cannot be understood, read or spoken to, at `upstreams.NAME.…`.
    pub fn build(
        name: &str,
        written: &config::Upstream,
        metrics: UpstreamMetrics,
    ) -> Result<Upstream, Vec<BuildError>> {
        Self::build_with(name, written, metrics, None, None)
    }

    /// The same in place of `before`: that one, if it is written so and the files that it names are what they were.
    /// Else one that shares with it whatever is as it was, and is put in its place by [`Upstream::succeed`].
    ///
    /// # Errors
    ///
    /// As [`Upstream::build`].
    pub fn build_after(
        name: &str,
        written: &config::Upstream,
        metrics: UpstreamMetrics,
        before: Option<&Arc<Upstream>>,
    ) -> Result<Arc<Upstream>, Vec<BuildError>> {
        if let Some(before) = before.filter(|before| before.written == *written) {
            let now = Transport::build(name, written, metrics.connections.clone());
            let now = now.map_err(|errors| at(&join("upstreams", &path::key(name)), errors))?;
            if now.makes_the_same_connections(&before.transport) {
                return Ok(before.clone());
            }
        }
        Self::build_with(name, written, metrics, None, before.map(|before| &**before)).map(Arc::new)
    }

    fn build_with(
        name: &str,
        written: &config::Upstream,
        metrics: UpstreamMetrics,
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
        let checks = checks.map(|written| Checks::build(written, metrics.health_checks()));
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
            load_balancing: written.load_balancing.clone(),
            keys,
            sticky,
            admission: shares
                .map_or_else(|| Admission::new(written, limits, Instant::now()), |before| before.admission.clone()),
            members: ArcSwap::default(),
            roster: ArcSwap::default(),
            changing: Mutex::new(()),
            reassess: Notify::new(),
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

    /// Whether everything but the list of endpoints, how one is chosen and how they are judged is as it is written
    /// here: then an endpoint that stays is the same one.
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

    /// Takes the place of `before`, which has the same name. Endpoints that stay keep what they have in flight and all
    /// that is known of them, as far as both are connected to and limited in the same way; else they begin with what
    /// was known of their health. Not for workers.
    pub fn succeed(&self, before: &Upstream) {
        let now = Instant::now();
        let earlier = before.members.load();
        let known: HashMap<(&str, &SocketAddr), &Arc<Endpoint>> =
            earlier.iter().map(|endpoint| ((&*endpoint.label, &endpoint.address), endpoint)).collect();
        let found = merged(self.discovery.found());
        let stay = found.iter().filter_map(|found| known.get(&(&*found.label, &found.address)));
        let stay: Vec<Arc<Endpoint>> =
            stay.filter(|endpoint| !endpoint.availability().is_removed()).map(|&endpoint| endpoint.clone()).collect();
        if Arc::ptr_eq(&self.transport, &before.transport) {
            self.members.store(Arc::new(stay));
            self.roster.store(before.roster.load_full());
        }
        self.discovered(found);
        for endpoint in self.members.load().iter() {
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
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let members = self.members.load().to_vec();
        self.publish(members, Vec::new());
    }

    /// Serves from now on only those who began with it; `successor` took its place, if anything did.
    pub fn retire(&self, successor: Option<&Arc<Upstream>>) {
        // It is replaced once.
        let _ = self.successor.set(successor.map(Arc::downgrade));
    }

    /// How an endpoint is chosen.
    pub fn policy(&self) -> Policy {
        self.load_balancing.policy
    }

    /// Exchanges that have one of its endpoints now.
    pub fn inflight(&self) -> u32 {
        self.admission.inflight()
    }

    /// Exchanges that wait for one of its endpoints.
    pub fn queued(&self) -> u32 {
        self.admission.queue().len()
    }

    /// What its circuit breaker does, if it has one.
    pub fn breaker(&self) -> Option<breaker::State> {
        self.admission.breaker().map(|breaker| breaker.state())
    }

    /// Whether an exchange has a connection to its endpoint for itself.
    pub fn is_http1(&self) -> bool {
        self.transport.protocol == Protocol::Http1
    }

    /// What is spoken with its endpoints, and over what.
    pub fn spoken(&self) -> Spoken {
        Spoken {
            http1: self.is_http1(),
            tls: self.transport.is_secure(),
            proxy_protocol: self.transport.introduces_clients(),
        }
    }

    /// Whether its endpoints can be asked by gRPC, which is nothing without HTTP/2.
    pub fn speaks_grpc(&self) -> bool {
        !self.is_http1()
    }

    /// What [`Upstream::select`] wants of an exchange: the hash of its key, or any, if it has none. Asked once for each
    /// exchange, so that every attempt goes by the same.
    pub fn hash(&self, asked: &Asked<'_>) -> u64 {
        if self.keys.is_empty() { 0 } else { self.keys.hash(asked).unwrap_or_else(rand::random) }
    }

    /// What the cookie of a request says of where its client stays; `None` if nothing that we have signed.
    pub fn stuck(&self, asked: &Asked<'_>) -> Option<Stuck> {
        let sticky = self.sticky.as_ref()?;
        sticky.read(cookie(asked.headers, sticky.name.as_bytes())?, SystemTime::now())
    }

    /// The `Set-Cookie` by which a client stays at the endpoint that has answered; `None` if it does so anyhow, or
    /// shall not.
    pub fn cookie(&self, stuck: Option<&Stuck>, endpoint: &Endpoint, https: bool) -> Option<HeaderValue> {
        let sticky = self.sticky.as_ref()?;
        let stays = stuck.is_some_and(|stuck| !stuck.is_old && endpoint.names.contains(&stuck.endpoint));
        if stays { None } else { sticky.write(&endpoint.names, https, SystemTime::now()) }
    }

    /// The endpoint that is to serve next, but none of `tried`. Whoever gets one tells [`Upstream::ended`] what became
    /// of it. `hash` is that of the exchange's key; policies without one take no notice of it. While others wait, this
    /// waits, too.
    pub fn select(&self, hash: u64, tried: &[Arc<Endpoint>], now: Instant) -> Choice {
        self.select_for(None, hash, tried, now)
    }

    /// The same for a client that may be stuck to an endpoint: that one goes before all others, if it may be chosen and
    /// has room.
    pub fn select_for(&self, stuck: Option<&Stuck>, hash: u64, tried: &[Arc<Endpoint>], now: Instant) -> Choice {
        match self.admission.queue().bars() {
            true => self.with_leave(now, || Choice::Full),
            false => self.select_in_turn(stuck, hash, tried, now),
        }
    }

    /// The same for one who has a turn.
    pub fn select_in_turn(&self, stuck: Option<&Stuck>, hash: u64, tried: &[Arc<Endpoint>], now: Instant) -> Choice {
        let choose = |roster: &Roster| {
            let stuck = stuck.filter(|_| !self.admission.is_full());
            let stays = stuck.and_then(|stuck| self.admission.engage(roster.named(stuck.endpoint, tried)?));
            stays.map_or_else(|| roster.engage(hash, tried, &self.admission, now), Choice::Engaged)
        };
        self.with_leave(now, || {
            let roster = self.roster.load();
            match choose(&roster) {
                // All of it was removed meanwhile, and there are others.
                Choice::Nobody if !Arc::ptr_eq(&roster, &self.roster.load()) => choose(&self.roster.load()),
                choice => choice,
            }
        })
    }

    /// Chooses if the breaker lets us.
    fn with_leave(&self, now: Instant, choose: impl FnOnce() -> Choice) -> Choice {
        let leave = match self.admission.leave(now) {
            Ok(leave) => leave,
            Err(away) => return Choice::Away(away),
        };
        match choose() {
            Choice::Engaged(engaged) => {
                engaged.metrics.selections.inc();
                Choice::Engaged(engaged.with(leave))
            }
            other => {
                self.admission.unused(leave.as_ref(), now);
                other
            }
        }
    }

    /// Joins the line of those who wait until somebody has room; `None`: it is full.
    pub fn queue(&self, tried: &[Arc<Endpoint>], now: Instant) -> Option<PlaceInLine> {
        self.admission.queue().join(!tried.is_empty(), now)
    }

    /// Whether a connection of which nothing more is wanted just now is one too many to be kept.
    pub fn has_surplus_connections(&self) -> bool {
        self.transport.is_surplus(self.admission.inflight())
    }

    /// Whether there is an endpoint that is none of `tried`.
    pub fn has_more(&self, tried: &[Arc<Endpoint>]) -> bool {
        self.roster.load().has_more(tried)
    }

    /// Leave to send one of its endpoints what it, or another one, was sent already; `None` if too much of what is
    /// under way is of this kind.
    pub fn permit_retry(&self, allowance: Allowance) -> Option<Permit> {
        self.retries.permit(self.admission.inflight(), allowance)
    }

    /// An attempt is over. Called exactly once for each endpoint that [`Upstream::select`] gave.
    pub fn ended(&self, engaged: &mut Engaged, ended: &Ended, now: Instant) {
        self.count(ended);
        engaged.learn(ended, now);
        engaged.ended(ended, now);
        self.ejector.hear(engaged, ended);
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

    /// Every endpoint that there is, available or not.
    pub fn members(&self) -> Arc<Vec<Arc<Endpoint>>> {
        self.members.load_full()
    }

    /// Takes over what a source has found, which is all that there is. Endpoints that stay keep what they have in
    /// flight and all that is known of them; those that go are given nothing new and end what they have. Not for
    /// workers.
    ///
    /// An address that is found twice is one endpoint with both weights, in the more preferred tier, under the first
    /// label.
    pub fn discovered(&self, found: Vec<Found>) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let before = self.members.load();
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
                    if let Some(sticky) = &self.sticky {
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

    /// Gives an order to the endpoints that are called so, by their label or by their address, which it is enough to
    /// have in common with one of them; tells which these are. It holds for as long as the process has an upstream of
    /// this name. Not for workers.
    pub fn order(&self, name: &str, order: Order) -> Vec<Arc<Endpoint>> {
        let now = Instant::now();
        let members = self.members.load();
        let meant = |endpoint: &&Arc<Endpoint>| *endpoint.label == *name || endpoint.address.to_string() == name;
        let meant: Vec<Arc<Endpoint>> = members.iter().filter(meant).cloned().collect();
        let mut orders = self.orders();
        meant.iter().for_each(|endpoint| orders.give(endpoint, order, now));
        drop(orders);
        self.reassess();
        meant
    }

    /// Held for as long as an order is carried out, never on a worker.
    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something is known anew of an endpoint's availability: the roster will be made again, in the background. Cheap,
    /// from anywhere.
    pub fn reassess(&self) {
        self.reassess.notify_one();
    }

    /// Makes the roster again whenever it is to be.
    async fn keep_roster(&self) {
        loop {
            // Nobody tells when one that was removed has ended what it had.
            let removed = self.members.load().iter().any(|endpoint| endpoint.availability().is_removed());
            match removed {
                true if timeout(REMOVED_LOOK, self.reassess.notified()).await.is_err() => {
                    self.forget();
                    continue;
                }
                true => {}
                false => self.reassess.notified().await,
            }
            let began = Instant::now();
            {
                let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
                let members = self.members.load().to_vec();
                self.publish(members, Vec::new());
            }
            // Whoever may be chosen no longer is passed over at once; the others can wait where a roster takes long to
            // make.
            sleep(ROSTER_REST * u32::try_from(began.elapsed().as_micros()).unwrap_or(u32::MAX)).await;
        }
    }

    /// Forgets those that were removed and are busy no longer. They are in no roster.
    fn forget(&self) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut members = self.members.load().to_vec();
        members.retain(Self::is_kept);
        self.members.store(Arc::new(members));
    }

    fn is_kept(endpoint: &Arc<Endpoint>) -> bool {
        !endpoint.availability().is_removed() || endpoint.inflight() > 0
    }

    /// Asks its endpoints whether they are well, if it is to.
    /// Whether its endpoints are checked, and nothing is known of one of them yet.
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

    /// Makes the roster of these members; the caller holds `changing`. Those that are `leaving` are removed after that,
    /// so that there is somebody to choose at any moment; those that are busy no longer are forgotten.
    fn publish(&self, mut members: Vec<Arc<Endpoint>>, leaving: Vec<Arc<Endpoint>>) {
        members.retain(Self::is_kept);
        let before = self.roster.load();
        let roster = Roster::new(&self.load_balancing, &members, &before);
        if roster.panics() != before.panics() {
            match roster.panics() {
                true => warn!(upstream = %self.name, "too few endpoints are available: all of them are asked"),
                false => info!(upstream = %self.name, "enough endpoints are available again"),
            }
        }
        self.metrics.panic.set(roster.panics().into());
        let roster = Arc::new(roster);
        self.roster.store(Arc::clone(&roster));
        let now = Instant::now();
        for endpoint in leaving {
            endpoint.set_removed(true, now);
            if endpoint.inflight() > 0 {
                members.push(endpoint);
            }
        }
        if !self.admission.queue().is_empty() {
            // Those in line have turns for what room there is now; where nobody serves any more, all of them hear of
            // it.
            let room = if roster.is_empty() { u32::MAX } else { self.admission.room(roster.members()) };
            self.admission.queue().changed(room);
        }
        self.members.store(Arc::new(members));
    }

    /// Looks every name up that it has; the errors are those of names that there must be and that there are not.
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
            // Those that stay are told of by what took its place.
            let told: HashSet<*const Endpoint> =
                successor.iter().flat_map(|next| next.members().iter().map(Arc::as_ptr).collect::<Vec<_>>()).collect();
            let members = self.members.load();
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
        for endpoint in &**self.members.load() {
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

/// What was found, each address once.
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

/// Looks up every name in these upstreams, all at the same time: this may block for some seconds. What cannot be told
/// now is asked for again in the background.
///
/// # Errors
///
/// One for each name of `endpoints` that there is not.
pub fn look_up<'a>(upstreams: impl IntoIterator<Item = &'a Arc<Upstream>>) -> Vec<BuildError> {
    let upstreams: Vec<&Arc<Upstream>> = upstreams.into_iter().collect();
    let looked = block_on(join_all(upstreams.iter().map(|upstream| upstream.look_up())));
    match looked {
        Ok(errors) => errors.into_iter().flatten().collect(),
        Err(error) => vec![BuildError::new("upstreams", format!("no names can be looked up: {error}"))],
    }
}

/// Runs a future to its end on a thread of its own, since the caller may be inside a runtime, which must not block.
fn block_on<T: Send>(future: impl Future<Output = T> + Send) -> io::Result<T> {
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let result = runtime.block_on(future);
        // A resolver that hangs may keep its thread; nobody waits for it.
        runtime.shutdown_background();
        Ok(result)
    };
    thread::scope(|scope| scope.spawn(run).join()).unwrap_or_else(|panic| panic::resume_unwind(panic))
}

fn at(place: &str, errors: Vec<BuildError>) -> Vec<BuildError> {
    errors.into_iter().map(|error| error.under(place)).collect()
}

impl Kept for Upstream {
    /// All that it has done in the background, in one thread that is no worker's.
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
    use discovery::{Answer, Service};

    /// A resolver that answers what a test tells it to.
    #[derive(Default)]
    struct Script(Mutex<HashMap<&'static str, Vec<&'static str>>>);

    impl Script {
        /// `host` has these addresses from now on; none of them: nobody tells.
        fn set(self: &Arc<Self>, host: &'static str, addresses: &[&'static str]) -> Arc<Self> {
            self.0.lock().unwrap().insert(host, addresses.to_vec());
            Arc::clone(self)
        }
    }

    #[async_trait]
    impl Resolve for Arc<Script> {
        async fn addresses(&self, host: &str) -> Answer<net::IpAddr> {
            match self.0.lock().unwrap().get(host) {
                Some(addresses) if addresses.is_empty() => Answer::Failed("nobody tells".to_owned()),
                Some(addresses) => {
                    let addresses = addresses.iter().map(|address| address.parse().unwrap());
                    Answer::Found(addresses.collect(), Duration::ZERO)
                }
                None => Answer::None(format!("there is no `{host}`")),
            }
        }

        async fn services(&self, _: &str) -> Answer<Service> {
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
            // Here, so that it may be one that a file is refused for.
            written.address = config::Address((*address).to_owned());
        }
        written
    }

    fn metrics() -> UpstreamMetrics {
        crate::metrics::Metrics::new(100, Vec::new()).upstream("shop")
    }

    fn build(endpoints: &[(&str, u32)], resolver: &Arc<Script>) -> Result<Upstream, Vec<BuildError>> {
        let resolver: Box<dyn Resolve> = Box::new(Arc::clone(resolver));
        let upstream = Upstream::build_with("shop", &written(endpoints), metrics(), Some(resolver), None)?;
        let errors = block_on(upstream.look_up()).unwrap();
        if errors.is_empty() { Ok(upstream) } else { Err(errors) }
    }

    /// What `turns` selections give, as `label address`, with how often.
    fn selected(upstream: &Upstream, turns: usize) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for _ in 0..turns {
            let endpoint = upstream.select(0, &[], Instant::now()).engaged().unwrap();
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
        let order: Vec<_> = (0..7).map(|_| upstream.select(0, &[], Instant::now()).engaged().unwrap()).collect();
        let labels: Vec<&str> = order.iter().map(|endpoint| &*endpoint.label).collect();
        let a = "10.0.0.1:80";
        assert_eq!(labels, [a, a, "unix:/run/b.sock", a, "[::1]:80", a, a]);
        assert_eq!((order[0].metrics.selections.get(), order[0].inflight()), (5, 5));
    }

    #[test]
    fn an_endpoint_that_was_tried_is_not_selected_again_and_after_the_last_there_is_none() {
        let upstream = build(&[("10.0.0.1:80", 9), ("10.0.0.2:80", 1), ("10.0.0.3:80", 1)], &Arc::default()).unwrap();
        let mut tried = Vec::new();
        while let Some(endpoint) = upstream.select(0, &tried, Instant::now()).engaged() {
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
        let before = upstream.select(0, &[], Instant::now()).engaged().unwrap();

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
        assert_eq!(&*upstream.select(0, &[], Instant::now()).engaged().unwrap().label, "localhost:80");
    }

    #[test]
    fn every_address_that_is_wrong_or_unknown_is_told_with_its_place() {
        let errors = build(&[("10.0.0.1:80", 1), ("api.test", 1), ("unix:", 1)], &Arc::default()).unwrap_err();
        let told: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            [
                "upstreams.shop.endpoints[1].address: `api.test` is no address: write `host:port`, `[v6]:port` or `unix:/path`",
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
        let errors = Upstream::build_with("shop", &written, metrics(), Some(Box::new(script)), None).unwrap_err();
        let places: Vec<&str> = errors.iter().map(|error| error.path.trim_start_matches("upstreams.shop.")).collect();
        assert_eq!(places, ["endpoints[3].address"]);
    }

    #[tokio::test]
    async fn an_endpoint_that_is_busy_is_remembered_until_it_is_free_and_taken_back_if_it_comes_again() {
        let script = Arc::<Script>::default().set("a.test", &["10.0.0.1"]);
        let upstream = build(&[("a.test:80", 1)], &script).unwrap();
        let busy = upstream.select(0, &[], Instant::now()).engaged().unwrap();
        script.set("a.test", &["10.0.0.2"]);
        upstream.look_up().await;
        assert_eq!(selected(&upstream, 2), counts(&[("a.test:80 10.0.0.2:80", 2)]), "it is given nothing new");
        assert_eq!((upstream.members().len(), busy.availability().state()), (2, State::Draining));

        script.set("a.test", &["10.0.0.1"]);
        upstream.look_up().await;
        assert!(Arc::ptr_eq(upstream.select(0, &[], Instant::now()).engaged().unwrap().endpoint(), busy.endpoint()));
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
            while upstream.roster.load().len() != available {
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
        let upstream = Arc::new(Upstream::build_with("shop", &written, metrics(), Some(resolver), None).unwrap());
        assert!(look_up([&upstream]).is_empty() && upstream.members().len() == 1);
        let running = tokio::spawn(Arc::clone(&upstream).keep());

        script.set("a.test", &["10.0.0.2"]);
        let refreshed = async {
            while upstream.select(0, &[], Instant::now()).engaged().unwrap().address.to_string() != "10.0.0.2:80" {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), refreshed).await.unwrap();
        running.abort();
    }
}
