//! A client's connection: its listener, its limits, and the facts that outlive one exchange.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::HeaderValue;
use pingora::protocols::http::v2::server::{H2Options, default_h2_options};
use tokio::sync::Notify;

use super::broken::{Leaving, Look};
use super::descriptors::Shares;
use super::head::HeadLimits;
use super::http2::Control;
use super::http2::conduct::Rules;
use super::names::Names;
use super::proxy_protocol::Expected;
use super::rates::{Excess, Places, Rates};
use super::relay::Relay;
use super::stream::{Bypass, WeakBypass};
use super::tls::Tls;
use super::tls::handshake::Facts;
use crate::account::shares::{CONNECTIONS_OF_ONE_CLIENT, Denial, Store};
use crate::account::{Account, Accounts, Counting, Quota};
use crate::config;
use crate::config::listener::{OddNames, Protocol};
use crate::config::units::Count;
use crate::error::{Refusal, refusal};
use crate::eventloop::worker;
use crate::metrics::{ConnectionState, ListenerMetrics, Metrics};
use crate::party::wait::Eye;
use crate::party::{Fault, Party, What};
use crate::phase::Phase;
use crate::phase::journal::Cycle;
use crate::scheduler;
use crate::upstream::transport::tunnel::Tunnel;

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
    under_way: Arc<Busy>,
    common: Arc<Common>,
    per_client: PerClient,
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
struct PerClient {
    connections: u64,
    connection_rates: Arc<Rates>,
    handshakes: u64,
    handshake_rates: Arc<Rates>,
    requests: u64,
}

/// The active connections, handshakes and requests of a listener, across changes of its settings.
struct Busy {
    number: Number,
    connections: Places,
    handshakes: Places,
    requests: Places,
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
        let counting = account.enter(Quota::Connections, self.under_way.number.number, self.per_client.connections);
        counting.map(Some).ok_or(&refusal::ACCEPT_CONNECTIONS_PER_IP)
    }
}

impl Busy {
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
    fn enter(listener: &Arc<Listener>, places: fn(&Listener) -> &Places, client: Option<Counting>) -> Option<UnderWay> {
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
    listener: Arc<Listener>,
    /// The place among the connections of its client, once the client is known; `None` if the peer acts for many
    /// clients.
    client: Option<Counting>,
    accepted: Instant,
    accepted_in: Option<Box<Cycle>>,
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

/// One client connection; shared by its stream and its exchanges.
pub struct Connection {
    /// The listener.
    pub listener: Arc<Listener>,
    /// The peer's address; `None` on a Unix socket.
    pub peer: Option<SocketAddr>,
    /// The local address; `None` on a Unix socket.
    pub local: Option<SocketAddr>,
    /// Time of accept.
    pub accepted: Instant,
    /// The worker's cycle of the accept; `None` if no recording needs it. Boxed, since most connections have none.
    pub accepted_in: Option<Box<Cycle>>,
    write_idle_ms: AtomicU64,
    flags: Flags,
    /// Bytes that the socket has accepted; over TLS, encrypted ones.
    taken: AtomicU64,
    tunnel: OnceLock<Arc<Tunnel>>,
    socket: OnceLock<RawFd>,
    /// The path past the session of an exchange, on HTTP/1.
    way: OnceLock<WeakBypass>,
    fault: OnceLock<Fault>,
    secured: OnceLock<Box<Secured>>,
    /// The HTTP/2 connection whose stream carries this connection.
    carrier: Option<Arc<Connection>>,
    /// Released with the connection. A carried connection has none of its own.
    counted: Option<Counted>,
}

/// What is known of a connection and its end.
#[derive(Default)]
struct Flags {
    half_close_aborts: AtomicBool,
    settled: AtomicBool,
    reset: AtomicBool,
    cut: AtomicBool,
    ends: AtomicBool,
    last_write: AtomicBool,
}

/// The result of a handshake, its start and its duration.
struct Secured {
    facts: Facts,
    begun: Instant,
    took: Duration,
}

impl Connection {
    /// Creates a connection that was counted.
    pub fn new(mut counted: Counted, peer: Option<SocketAddr>, local: Option<SocketAddr>) -> Arc<Self> {
        let (listener, accepted) = (counted.listener.clone(), counted.accepted);
        let accepted_in = counted.accepted_in.take();
        Connection::begun(listener, (peer, local), accepted, accepted_in, Ok(counted))
    }

    /// Creates a connection that a stream of `carrier` carries. It has its own state for its bytes, and the client and
    /// the TLS of the carrier.
    pub fn carried(carrier: &Arc<Connection>) -> Arc<Self> {
        let ends = (carrier.peer, carrier.local);
        Connection::begun(carrier.listener.clone(), ends, Instant::now(), None, Err(carrier.clone()))
    }

    fn begun(
        listener: Arc<Listener>,
        (peer, local): (Option<SocketAddr>, Option<SocketAddr>),
        accepted: Instant,
        accepted_in: Option<Box<Cycle>>,
        place: Result<Counted, Arc<Connection>>,
    ) -> Arc<Self> {
        let (counted, carrier) = place.map_or_else(|carrier| (None, Some(carrier)), |counted| (Some(counted), None));
        Arc::new(Connection {
            peer,
            local,
            accepted,
            accepted_in,
            write_idle_ms: AtomicU64::new(listener.terms.header_timeout.as_millis() as u64),
            flags: Flags { settled: AtomicBool::new(carrier.is_some()), ..Flags::default() },
            taken: AtomicU64::new(0),
            tunnel: OnceLock::new(),
            socket: OnceLock::new(),
            way: OnceLock::new(),
            fault: OnceLock::new(),
            secured: OnceLock::new(),
            listener,
            carrier,
            counted,
        })
    }

    /// Sets the socket, which stays open while an exchange is active.
    pub(super) fn goes_over(&self, socket: RawFd) {
        // The socket never changes.
        let _ = self.socket.set(socket);
    }

    /// Sets the path past the session.
    pub(super) fn is_gone_past_by(&self, way: WeakBypass) {
        // The path never changes.
        let _ = self.way.set(way);
    }

    /// The path past the session of an exchange, on HTTP/1.
    pub fn bypass(&self) -> Option<Bypass> {
        self.way.get()?.bypass()
    }

    /// The file descriptor of the socket.
    pub fn socket(&self) -> Option<RawFd> {
        self.socket.get().copied()
    }

    /// The account of the client; `None` if the peer acts for many clients.
    pub fn account(&self) -> Option<&Arc<Account>> {
        match (&self.counted, &self.carrier) {
            (Some(counted), _) => counted.client.as_ref().map(Counting::account),
            (None, carrier) => carrier.as_ref()?.account(),
        }
    }

    /// The HTTP/2 connection whose stream carries this connection.
    pub(super) fn carrier(&self) -> Option<&Connection> {
        self.carrier.as_deref()
    }

    /// See [`Bypass::delivered_while_stalled`].
    pub(super) fn delivered_while_stalled(&self) -> Option<u64> {
        self.bypass()?.delivered_while_stalled()
    }

    /// Whether an HTTP/2 stream carries the connection.
    pub fn is_carried(&self) -> bool {
        self.carrier.is_some()
    }

    /// Whether ALPN selected HTTP/2; `None` without TLS.
    pub(super) fn agreed_on_h2(&self) -> Option<bool> {
        if self.is_carried() { Some(false) } else { self.tls().map(|tls| tls.h2) }
    }

    /// Counts a request.
    ///
    /// # Errors
    ///
    /// The refusal for the client, if a limit of the client or of the listener is reached.
    pub fn begin_request(&self) -> Result<UnderWay, &'static Refusal> {
        let client = self.place_of_client(Quota::Requests, self.listener.per_client.requests);
        let client = client.ok_or(&refusal::ROUTE_REQUESTS_PER_IP)?;
        UnderWay::enter(&self.listener, |listener| &listener.under_way.requests, client).ok_or(&refusal::ROUTE_REQUESTS)
    }

    /// Counts a handshake that begins now.
    ///
    /// # Errors
    ///
    /// The reason against it, if a rate or a limit is exceeded.
    pub fn begin_handshake(&self) -> Result<UnderWay, &'static Refusal> {
        let owner = self.account().map(|account| account.client());
        self.listener.per_client.handshake_rates.admit(owner, Instant::now()).map_err(|excess| match excess {
            Excess::Client => &refusal::HANDSHAKE_RATE_PER_IP,
            Excess::All => &refusal::HANDSHAKE_RATE,
        })?;
        let client = self.place_of_client(Quota::Handshakes, self.listener.per_client.handshakes);
        let client = client.ok_or(&refusal::HANDSHAKE_LIMIT_PER_IP)?;
        UnderWay::enter(&self.listener, |listener| &listener.under_way.handshakes, client)
            .ok_or(&refusal::HANDSHAKE_LIMIT)
    }

    /// `None`: the client's limit is reached. A peer that acts for many clients needs no place.
    fn place_of_client(&self, what: Quota, most: u64) -> Option<Option<Counting>> {
        match self.account() {
            None => Some(None),
            Some(account) => account.enter(what, self.listener.under_way.number.number, most).map(Some),
        }
    }

    /// Records a completed handshake and its start.
    pub(super) fn secure(&self, facts: Facts, begun: Instant, took: Duration) {
        // A connection has only one handshake.
        let _ = self.secured.set(Box::new(Secured { facts, begun, took }));
    }

    /// The facts about TLS. `None`: the connection is in clear text.
    pub fn tls(&self) -> Option<&Facts> {
        match &self.carrier {
            Some(carrier) => carrier.tls(),
            None => self.secured.get().map(|secured| &secured.facts),
        }
    }

    /// Start and duration of the handshake, if there was one.
    pub fn handshake(&self) -> Option<(Instant, Duration)> {
        self.secured.get().map(|secured| (secured.begun, secured.took))
    }

    /// Whether the connection may be used for `host`, whose TLS terms may differ from those of the handshake.
    pub fn may_serve(&self, host: &str) -> bool {
        match (&self.listener.tls, self.tls()) {
            (Some(tls), Some(facts)) => tls.table.load().may_serve(host, facts.policy),
            _ => true,
        }
    }

    /// Counts bytes that the socket has accepted; over TLS, encrypted ones.
    pub(super) fn took(&self, bytes: usize) {
        self.taken.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Total number of bytes that the socket has accepted; over TLS, of encrypted ones.
    pub(super) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Sets the maximum time for which the client accepts no bytes. Until the route is known, the header timeout
    /// applies.
    pub fn set_write_idle(&self, time: Duration) {
        self.write_idle_ms.store(time.as_millis() as u64, Ordering::Relaxed);
    }

    /// As [`Connection::set_write_idle`], on HTTP/2: the limit of the whole connection, besides that of each stream, is
    /// the longest of its routes.
    pub fn extend_write_idle(&self, time: Duration) {
        self.write_idle_ms.fetch_max(time.as_millis() as u64, Ordering::Relaxed);
    }

    pub(super) fn write_idle(&self) -> Duration {
        Duration::from_millis(self.write_idle_ms.load(Ordering::Relaxed))
    }

    /// Sets whether a client that closes its sending side after a complete request counts as gone.
    pub fn set_half_close_aborts(&self, aborts: bool) {
        self.flags.half_close_aborts.store(aborts, Ordering::Relaxed);
    }

    pub(super) fn half_close_aborts(&self) -> bool {
        self.flags.half_close_aborts.load(Ordering::Relaxed)
    }

    /// Records that a response has begun, which ends the time in which the connection is new.
    pub fn settle(&self) {
        self.flags.settled.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_settled(&self) -> bool {
        self.flags.settled.load(Ordering::Relaxed)
    }

    /// Switches to another protocol after a 101: all further bytes pass unchanged.
    pub fn switch_to_raw(&self, tunnel: Arc<Tunnel>) {
        // A connection switches only once.
        let _ = self.tunnel.set(tunnel);
    }

    /// Whether the connection has switched to another protocol.
    pub fn is_raw(&self) -> bool {
        self.tunnel.get().is_some()
    }

    /// The tunnel for the other protocol's bytes.
    pub(super) fn tunnel(&self) -> Option<&Arc<Tunnel>> {
        self.tunnel.get()
    }

    /// Prevents further requests, on HTTP/1.
    pub fn end_after_answer(&self) {
        self.flags.ends.store(true, Ordering::Relaxed);
    }

    pub(super) fn ends(&self) -> bool {
        self.flags.ends.load(Ordering::Relaxed)
    }

    /// Sets whether the bytes of the current write are the last ones of the connection and complete its last response.
    pub(super) fn set_last_write(&self, is_last: bool) {
        self.flags.last_write.store(is_last, Ordering::Relaxed);
    }

    pub(super) fn is_last_write(&self) -> bool {
        self.flags.last_write.load(Ordering::Relaxed)
    }

    /// Records that the response was cut: its end must not be marked as regular (`close_notify`, RFC 9112 §9.8).
    pub fn break_off(&self) {
        self.flags.cut.store(true, Ordering::Relaxed);
    }

    pub(super) fn breaks_off(&self) -> bool {
        self.flags.cut.load(Ordering::Relaxed)
    }

    /// Records that the response was cut and its end could be taken for a regular one: the connection closes with a
    /// reset (RFC 9112 §8).
    pub fn close_with_reset(&self) {
        self.flags.reset.store(true, Ordering::Relaxed);
    }

    pub(super) fn resets(&self) -> bool {
        self.flags.reset.load(Ordering::Relaxed)
    }

    /// The fault that the stream found in the client's bytes, if any.
    pub fn fault(&self) -> Option<Fault> {
        self.fault.get().copied()
    }

    pub(super) fn set_fault(&self, phase: Phase, what: What) {
        // Only the first fault of a connection counts.
        let _ = self.fault.set(Fault::new(Party::Client, phase, what));
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

/// The client of a connection, as the scheduler sees it.
pub struct Arriving {
    connection: Arc<Connection>,
    look: Look,
}

impl Arriving {
    /// The client of this connection.
    pub fn new(connection: &Arc<Connection>) -> Self {
        Arriving { connection: connection.clone(), look: Look::default() }
    }
}

impl Eye for Arriving {
    type Left = ();

    fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(socket) = self.connection.socket() else { return Poll::Pending };
        self.look.poll_later(cx, socket, Leaving::Broken).map(|_| ())
    }
}

impl scheduler::task::Client for Arriving {
    fn is_new(&self) -> bool {
        !self.connection.is_settled()
    }
}

/// The facts about the start of an exchange, from before Pingora creates its context.
pub struct Begin {
    /// The connection.
    pub connection: Arc<Connection>,
    /// Time from accept to the first byte, without the handshake; for the first exchange only.
    pub accept: Option<Duration>,
    /// Duration of the handshake; for the first exchange only.
    pub handshake: Option<Duration>,
    /// Time of the first byte of the header.
    pub header_since: Instant,
    /// The worker's cycle of that byte; `None` if no recording needs it.
    pub header_in: Option<Cycle>,
    /// Time at which the header was complete.
    pub header_done: Instant,
    /// The control of the stream, on HTTP/2.
    pub control: Option<Control>,
}

/// The active exchanges, so that a shutdown can wait for the last one.
#[derive(Default)]
pub struct Inflight {
    count: AtomicUsize,
    none: Notify,
}

impl Inflight {
    /// Counts an exchange until the guard is dropped.
    pub fn enter(self: &Arc<Self>) -> InflightGuard {
        self.count.fetch_add(1, Ordering::Relaxed);
        InflightGuard(self.clone())
    }

    /// Number of active exchanges.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Waits until no exchange is active.
    pub async fn drained(&self) {
        loop {
            let notified = self.none.notified();
            if self.count() == 0 {
                return;
            }
            notified.await;
        }
    }
}

/// One active exchange.
pub struct InflightGuard(Arc<Inflight>);

impl Drop for InflightGuard {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.none.notify_waiters();
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A connection through a listener with these additional keys.
    pub fn connection(listener: &str) -> Arc<Connection> {
        let text = format!("{{ name: web, address: 127.0.0.1:80, {listener} }}");
        let written = serde_yaml::from_str(&text).expect("a listener");
        let accounts = Accounts::new(Default::default(), &[], 1);
        let common = Common::new(Shares::new(1 << 20, 0, 0.5, 0.25), accounts);
        let metrics = Metrics::new(0, Vec::new());
        let listener = Listener::build(&written, 1, Fittings::default(), &common, &metrics, None);
        listener.begin();
        let listener = Arc::new(listener);
        Connection::new(Counted::take(&listener).expect("room"), None, None)
    }
}
