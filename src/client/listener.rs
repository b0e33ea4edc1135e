//! A listener at run time: its settings, its limits, and its connections.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::HeaderValue;
use pingora::protocols::http::v2::server::{H2Options, default_h2_options};
use tokio::sync::Notify;

use super::conduct::Rules;
use super::descriptors::Shares;
use super::head::HeadLimits;
use super::names::Names;
use super::proxy_protocol::Expected;
use super::rates::{Excess, Places, Rates};
use super::relay::Relay;
use super::tls::Tls;
use crate::account::shares::{CONNECTIONS_OF_ONE_CLIENT, Denial, Store};
use crate::account::{Accounts, Counting, Quota};
use crate::config;
use crate::config::listener::{OddNames, Protocol};
use crate::config::units::Count;
use crate::error::{Refusal, refusal};
use crate::eventloop::worker;
use crate::metrics::{ConnectionState, ListenerMetrics, Metrics};
use crate::phase::journal::Cycle;

/// A listener at run time.
pub struct Listener {
    /// Its name in metrics and logs.
    pub name: String,
    /// Whether it is a Unix socket, whose clients have no address.
    pub unix: bool,
    /// The versions of HTTP.
    pub protocols: Protocols,
    /// The peers that must send the PROXY protocol, if any.
    pub proxy_protocol: Option<Expected>,
    /// TLS, if enabled.
    pub tls: Option<Arc<Tls>>,
    /// Connections that are relayed.
    pub relays: Relays,
    /// What moves clients to HTTPS.
    pub https: Https,
    /// Limits of a connection.
    pub terms: Terms,
    /// Settings of HTTP/2.
    pub http2: Http2Terms,
    /// Its metrics.
    pub metrics: ListenerMetrics,
    /// The number of the first configuration with these settings.
    pub generation: u64,
    /// Its active connections, handshakes and requests; shared by all versions of the listener with the same name.
    pub(super) under_way: Arc<Busy>,
    common: Arc<Common>,
    pub(super) per_client: PerClient,
    limits: config::listener::Limits,
    /// Number of open connections that were accepted with these settings.
    open: AtomicU64,
}

/// The versions of HTTP that a listener accepts.
#[derive(Clone, Copy, Debug)]
pub struct Protocols {
    /// Whether HTTP/1 is enabled.
    pub http1: bool,
    /// Whether HTTP/2 in clear text is enabled.
    pub h2c: bool,
    /// Whether HTTP/2 over TLS is enabled.
    pub h2: bool,
}

/// Relays of a listener.
pub struct Relays {
    /// Server names whose TLS connections are passed through, and their destinations.
    pub passthrough: Names<Arc<Relay>>,
    /// The destination of all connections, if they are passed through.
    pub tcp: Option<Arc<Relay>>,
}

/// What moves the clients of a listener to HTTPS, or keeps them there.
pub struct Https {
    /// The redirect to HTTPS, if all requests get one.
    pub redirect: Option<Redirect>,
    /// The value of `Strict-Transport-Security`, if it is sent.
    pub hsts: Option<HeaderValue>,
}

/// Limits of a connection and its requests.
pub struct Terms {
    /// The limits of request headers.
    pub head: HeadLimits,
    /// How fields with unusual names are treated.
    pub odd_names: OddNames,
    /// Maximum time for a complete request header.
    pub header_timeout: Duration,
    /// Maximum time between requests.
    pub idle_timeout: Duration,
    /// Maximum number of requests per connection.
    pub requests_max: u64,
}

/// Settings of HTTP/2 connections.
pub struct Http2Terms {
    /// Maximum number of concurrent requests per HTTP/2 connection.
    pub streams_max: usize,
    /// The limits that HTTP/2 clients receive in SETTINGS.
    pub options: H2Options,
    /// The limits for the behaviour of HTTP/2 clients.
    pub rules: Rules,
}

/// What each client may have at a listener.
pub(super) struct PerClient {
    connections: u64,
    connection_rates: Arc<Rates>,
    pub(super) handshakes: u64,
    pub(super) handshake_rates: Arc<Rates>,
    pub(super) requests: u64,
}

/// The active connections, handshakes and requests of a listener, across changes of its settings.
pub(super) struct Busy {
    number: Number,
    connections: Places,
    pub(super) handshakes: Places,
    pub(super) requests: Places,
    leaving: AtomicBool,
    left: Notify,
}

/// The listener's number, freed when no part of the listener is left.
struct Number {
    number: usize,
    common: Arc<Common>,
}

impl Number {
    fn take(common: &Arc<Common>) -> Number {
        let mut numbers = common.numbers();
        let number = (0..).find(|number| !numbers.contains(number)).unwrap_or_default();
        numbers.insert(number);
        drop(numbers);
        common.accounts.has_listener(number);
        Number { number, common: common.clone() }
    }
}

impl Drop for Number {
    fn drop(&mut self) {
        self.common.numbers().remove(&self.number);
    }
}

/// The state that all listeners share.
pub struct Common {
    shares: Shares,
    /// The connections of all listeners.
    crowd: Crowd,
    /// The share of each client.
    accounts: Arc<Accounts>,
    /// The numbers of existing listeners.
    numbers: Mutex<BTreeSet<usize>>,
}

impl Common {
    /// Creates the state. The shares of the open files limit the number of all connections.
    pub fn new(shares: Shares, accounts: Arc<Accounts>) -> Arc<Self> {
        Arc::new(Common { shares, crowd: Crowd::new(shares.clients()), accounts, numbers: Mutex::default() })
    }

    /// Applies the settings for all listeners.
    pub fn set_terms(&self, config: &config::Config) {
        self.accounts.set_terms(config.client_prefix(), &config.trusted_proxies);
    }

    /// Locked while a listener is built or removed.
    fn numbers(&self) -> MutexGuard<'_, BTreeSet<usize>> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Number of open connections, and its limit.
struct Crowd {
    places: Places,
    one_client: Store,
}

impl Crowd {
    fn new(most: u64) -> Self {
        Crowd { places: Places::new(most), one_client: Store::new(most, 0.0, CONNECTIONS_OF_ONE_CLIENT) }
    }

    /// Counts a connection, unless the limit is reached.
    fn enter(&self) -> Result<(), &'static Refusal> {
        if self.places.enter() { Ok(()) } else { Err(&refusal::ACCEPT_CONNECTIONS) }
    }

    /// Whether a client with this many connections may keep one that was just counted.
    fn admits(&self, client: u64) -> bool {
        let others = self.places.taken().saturating_sub(1);
        self.one_client.admits(others, client, 1) != Err(Denial::Client)
    }

    fn leave(&self) {
        self.places.leave();
    }
}

/// Parts of a listener that are shared with others or must be started.
#[derive(Default)]
pub struct Fittings {
    /// TLS.
    pub tls: Option<Arc<Tls>>,
    /// Server names that are passed through.
    pub passthrough: Names<Arc<Relay>>,
    /// The destination, if all connections are passed through.
    pub tcp: Option<Arc<Relay>>,
}

impl Listener {
    /// Builds a listener from the configuration of this number; it replaces `before`. The open files cap its limits.
    /// The limits apply from [`Listener::begin`] on.
    pub fn build(
        written: &config::Listener,
        generation: u64,
        fittings: Fittings,
        common: &Arc<Common>,
        metrics: &Metrics,
        before: Option<&Listener>,
    ) -> Self {
        let Fittings { tls, passthrough, tcp } = fittings;
        let (limits, spoken) = (&written.limits, written.spoken());
        let rules = Rules::build(&written.http2);
        let metrics = metrics.listener(&written.name);
        let under_way = before.map_or_else(|| Arc::new(Busy::new(common)), |before| before.under_way.clone());
        // A rate with unchanged settings keeps its state.
        let connection_rates = before.filter(|before| {
            let old = &before.limits;
            (old.connection_rate, old.connection_rate_per_ip) == (limits.connection_rate, limits.connection_rate_per_ip)
        });
        let handshake_rates = before.filter(|before| {
            let old = &before.limits;
            (old.handshake_rate, old.handshake_rate_per_ip) == (limits.handshake_rate, limits.handshake_rate_per_ip)
        });
        let per_client = PerClient {
            connections: limits.connections_per_ip.0,
            connection_rates: connection_rates.map_or_else(
                || Arc::new(Rates::new(limits.connection_rate, limits.connection_rate_per_ip)),
                |before| before.per_client.connection_rates.clone(),
            ),
            handshakes: limits.handshakes_per_ip.0,
            handshake_rates: handshake_rates.map_or_else(
                || Arc::new(Rates::new(limits.handshake_rate, limits.handshake_rate_per_ip)),
                |before| before.per_client.handshake_rates.clone(),
            ),
            requests: common.shares.requests_of_client(limits.requests_per_ip.0),
        };
        let speaks = |protocol| spoken.contains(&protocol);
        Listener {
            name: written.name.clone(),
            unix: written.address.unix_path().is_some(),
            protocols: Protocols {
                http1: speaks(Protocol::Http1),
                h2c: speaks(Protocol::H2c),
                h2: speaks(Protocol::H2),
            },
            proxy_protocol: written.proxy_protocol.as_ref().map(Expected::build),
            tls,
            relays: Relays { passthrough, tcp },
            https: Https {
                redirect: written.redirect_https.map(|written| Redirect { port: written.port, status: written.status }),
                hsts: hsts(written),
            },
            terms: Terms {
                head: HeadLimits { fields: limits.headers.0 as usize, bytes: limits.header_bytes.0 as usize },
                odd_names: written.odd_header_names,
                header_timeout: written.timeouts.header.0,
                idle_timeout: written.timeouts.idle.0,
                requests_max: limits.requests_per_connection.0,
            },
            http2: Http2Terms {
                streams_max: usize::try_from(limits.streams.0).unwrap_or(usize::MAX),
                options: h2_options(written, &rules),
                rules,
            },
            metrics,
            generation,
            under_way,
            common: common.clone(),
            per_client,
            limits: limits.clone(),
            open: AtomicU64::new(0),
        }
    }

    /// Applies its limits to everything active under its name.
    pub fn begin(&self) {
        let connections = self.limits.connections.0.min(self.common.shares.clients());
        self.metrics.connections_max.set(i64::try_from(connections).unwrap_or(i64::MAX));
        let Busy { connections: places, handshakes, requests, leaving, .. } = &*self.under_way;
        places.set_most(connections);
        handshakes.set_most(self.limits.handshakes.0);
        requests.set_most(self.limits.requests.0);
        leaving.store(false, Ordering::Release);
    }

    /// Reports that the listener was removed: its connections close with the response to their next request.
    pub fn leave(&self) {
        self.under_way.leaving.store(true, Ordering::Release);
        self.under_way.left.notify_waiters();
    }

    /// Whether its connections must close.
    pub fn is_leaving(&self) -> bool {
        self.under_way.leaving.load(Ordering::Acquire)
    }

    /// Ends when its connections must close.
    pub async fn left(&self) {
        loop {
            let left = self.under_way.left.notified();
            if self.is_leaving() {
                return;
            }
            left.await;
        }
    }

    /// Number of open connections that were accepted with these settings.
    pub fn open(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }

    /// Number of open connections under its name, with any settings.
    pub fn connections_open(&self) -> u64 {
        self.under_way.connections.taken()
    }

    /// Counts a connection for its client, unless a limit of the client or the rate of connections is exceeded. `None`:
    /// the peer acts for many clients.
    fn admit(&self, client: Option<IpAddr>) -> Result<Option<Counting>, &'static Refusal> {
        let account = client.and_then(|client| self.common.accounts.of(client));
        let owner = account.as_ref().map(|account| account.client());
        self.per_client.connection_rates.admit(owner, Instant::now()).map_err(|excess| match excess {
            Excess::Client => &refusal::ACCEPT_RATE_PER_IP,
            Excess::All => &refusal::ACCEPT_RATE,
        })?;
        let Some(account) = account else { return Ok(None) };
        let has = account.count(Quota::Connections);
        if self.per_client.connections != Count::UNLIMITED.0 && !self.common.crowd.admits(has) {
            return Err(&refusal::ACCEPT_CONNECTIONS_PER_IP);
        }
        let counting = account.enter(Quota::Connections, self.under_way.number(), self.per_client.connections);
        counting.map(Some).ok_or(&refusal::ACCEPT_CONNECTIONS_PER_IP)
    }
}

impl Busy {
    /// The number by which accounts know the listener.
    pub(super) fn number(&self) -> usize {
        self.number.number
    }

    fn new(common: &Arc<Common>) -> Busy {
        // `Listener::begin` sets the limits.
        let [connections, handshakes, requests] = [(); 3].map(|()| Places::new(u64::MAX));
        let (number, leaving, left) = (Number::take(common), AtomicBool::new(false), Notify::new());
        Busy { number, connections, handshakes, requests, leaving, left }
    }
}

/// One use of a listener's limited places; released on drop.
pub struct UnderWay {
    listener: Arc<Listener>,
    places: fn(&Listener) -> &Places,
    /// The place of its client, unless the peer acts for many clients.
    _client: Option<Counting>,
}

impl UnderWay {
    /// Takes a place; `None` if the limit is reached.
    pub(super) fn enter(
        listener: &Arc<Listener>,
        places: fn(&Listener) -> &Places,
        client: Option<Counting>,
    ) -> Option<UnderWay> {
        places(listener).enter().then(|| UnderWay { listener: listener.clone(), places, _client: client })
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        (self.places)(&self.listener).leave();
    }
}

/// The redirect of clients to HTTPS.
#[derive(Clone, Copy, Debug)]
pub struct Redirect {
    /// The HTTPS port.
    pub port: u16,
    /// The status of the response.
    pub status: u16,
}

fn hsts(written: &config::Listener) -> Option<HeaderValue> {
    let hsts = written.tls.as_ref()?.hsts.as_ref()?;
    // The value consists of digits and words, so it is valid.
    HeaderValue::try_from(hsts.value()).ok()
}

fn h2_options(written: &config::Listener, rules: &Rules) -> H2Options {
    let capped = |limit: u64| u32::try_from(limit).unwrap_or(u32::MAX);
    let many = |limit: u64| usize::try_from(limit).unwrap_or(usize::MAX);
    let mut options = default_h2_options();
    if written.http2.websocket {
        options.enable_connect_protocol();
    }
    options.max_header_list_size(capped(written.limits.header_bytes.0));
    options.max_concurrent_streams(capped(written.limits.streams.0));
    options.max_local_error_reset_streams(Some(many(written.http2.provoked_resets.0)));
    // Forebay's own limit for bursts replaces the library's.
    options.max_pending_accept_reset_streams(rules.resets_at_once());
    options
}

/// One of a listener's connections; released on drop.
pub struct Counted {
    pub(super) listener: Arc<Listener>,
    /// The place among the connections of its client, once the client is known; `None` if the peer acts for many
    /// clients.
    pub(super) client: Option<Counting>,
    pub(super) accepted: Instant,
    pub(super) accepted_in: Option<Box<Cycle>>,
}

impl Counted {
    /// Counts a connection that was just accepted, unless the limit is reached.
    ///
    /// # Errors
    ///
    /// If the limit is reached.
    pub fn take(listener: &Arc<Listener>) -> Result<Counted, &'static Refusal> {
        let places = &listener.under_way.connections;
        if !places.enter() {
            return Err(&refusal::ACCEPT_CONNECTIONS);
        }
        listener.common.crowd.enter().inspect_err(|_| places.leave())?;
        listener.open.fetch_add(1, Ordering::Relaxed);
        let accepted_in = worker::cycle_if_wanted().map(Box::new);
        Ok(Counted { listener: listener.clone(), client: None, accepted: Instant::now(), accepted_in })
    }

    /// Counts the connection for this client.
    ///
    /// # Errors
    ///
    /// If a limit of the client is reached.
    pub fn admit(mut self, client: Option<IpAddr>) -> Result<Counted, &'static Refusal> {
        self.client = self.listener.admit(client)?;
        self.listener.metrics.accepted.inc();
        Ok(self)
    }

    /// The listener.
    pub fn listener(&self) -> &Arc<Listener> {
        &self.listener
    }

    /// Time of accept.
    pub fn accepted(&self) -> Instant {
        self.accepted
    }

    /// Counts the connection in the gauge of this state.
    pub fn state(&self, state: ConnectionState) -> StateGauge {
        StateGauge::new(self.listener.clone(), state)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.listener.open.fetch_sub(1, Ordering::Relaxed);
        self.listener.under_way.connections.leave();
        self.listener.common.crowd.leave();
    }
}

/// Counts a connection in the gauge of its state until it is dropped.
pub struct StateGauge {
    listener: Arc<Listener>,
    state: ConnectionState,
}

impl StateGauge {
    /// Counts a connection of this listener in this state.
    pub fn new(listener: Arc<Listener>, state: ConnectionState) -> Self {
        listener.metrics.enter(None, Some(state));
        StateGauge { listener, state }
    }

    /// Changes to `state`.
    pub fn enter(&mut self, state: ConnectionState) {
        self.listener.metrics.enter(Some(self.state), Some(state));
        self.state = state;
    }
}

impl Drop for StateGauge {
    fn drop(&mut self) {
        self.listener.metrics.enter(Some(self.state), None);
    }
}
