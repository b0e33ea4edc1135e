//! A client's connection: the listener it came through, what it is allowed, and the facts that outlive one exchange.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::RawFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::HeaderValue;
use pingora::protocols::http::v2::server::{H2Options, default_h2_options};
use tokio::sync::Notify;

use super::account::{Account, Accounts, Counting, Quota};
use super::descriptors::Shares;
use super::head::HeadLimits;
use super::http2::Control;
use super::http2::conduct::Rules;
use super::names::Names;
use super::proxy_protocol::Expected;
use super::rates::{Excess, Places, Rates};
use super::relay::Relay;
use super::shares::{CONNECTIONS_OF_ONE_CLIENT, Denial, Store};
use super::stream::{Bypass, WeakBypass};
use super::tls::Tls;
use super::tls::handshake::Facts;
use crate::config;
use crate::config::listener::{OddNames, Protocol};
use crate::config::units::Count;
use crate::error::{Refusal, refusal};
use crate::eventloop::worker;
use crate::metrics::{ConnectionState, ListenerMetrics, Metrics};
use crate::party::{Fault, Party, What};
use crate::phase::Phase;
use crate::phase::journal::Cycle;
use crate::upstream::transport::tunnel::Tunnel;

/// A listener as it runs.
pub struct Listener {
    /// Its name in metrics and logs.
    pub name: String,
    /// Whether it is a unix socket: its clients have no address.
    pub unix: bool,
    /// Whether HTTP/1 is spoken.
    pub http1: bool,
    /// Whether HTTP/2 in clear text is spoken.
    pub h2c: bool,
    /// Whether HTTP/2 is spoken over TLS.
    pub h2: bool,
    /// Who is to speak the PROXY protocol, if anybody is.
    pub proxy_protocol: Option<Expected>,
    /// TLS, if it is spoken.
    pub tls: Option<Arc<Tls>>,
    /// Names of TLS whose connections are passed on as they are, and whereto.
    pub passthrough: Names<Arc<Relay>>,
    /// Whereto every connection is passed on as it is, if they are.
    pub tcp: Option<Arc<Relay>>,
    /// Whereto all clients are sent, if they are.
    pub redirect: Option<Redirect>,
    /// `Strict-Transport-Security`, if it is sent.
    pub hsts: Option<HeaderValue>,
    /// What a request header may be.
    pub head: HeadLimits,
    /// What becomes of fields with odd names.
    pub odd_names: OddNames,
    /// For a whole request header.
    pub header_timeout: Duration,
    /// Between requests.
    pub idle_timeout: Duration,
    /// Requests on one connection.
    pub requests_max: u64,
    /// Requests that are under way on one connection of HTTP/2.
    pub streams_max: usize,
    /// What HTTP/2 clients are told of the limits.
    pub h2_options: H2Options,
    /// How HTTP/2 clients may behave.
    pub http2_rules: Rules,
    /// Its counters.
    pub metrics: ListenerMetrics,
    /// The number of the configuration in which it was written so first.
    pub generation: u64,
    /// What it has under way; it is the same for all that were written under its name, one after the other.
    under_way: Arc<Busy>,
    common: Arc<Common>,
    connections_per_ip: u64,
    connection_rates: Arc<Rates>,
    handshakes_per_ip: u64,
    handshake_rates: Arc<Rates>,
    requests_per_ip: u64,
    limits: config::listener::Limits,
    /// Connections that came in while it was written so.
    open: AtomicU64,
}

/// What a listener has under way, whatever becomes of its settings.
struct Busy {
    number: Number,
    connections: Places,
    handshakes: Places,
    requests: Places,
    leaving: AtomicBool,
    left: Notify,
}

/// The place of a listener among all, given back when nothing of it is left.
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

/// What all listeners share.
pub struct Common {
    shares: Shares,
    /// The connections of all listeners.
    crowd: Crowd,
    /// What each client has of them.
    accounts: Arc<Accounts>,
    /// The numbers of the listeners that there are.
    numbers: Mutex<BTreeSet<usize>>,
}

impl Common {
    /// Together they have so many connections as these shares of the open files allow.
    pub fn new(shares: Shares, accounts: Arc<Accounts>) -> Arc<Self> {
        Arc::new(Common { shares, crowd: Crowd::new(shares.clients()), accounts, numbers: Mutex::default() })
    }

    /// Goes by what is written for all listeners.
    pub fn set_terms(&self, config: &config::Config) {
        self.accounts.set_terms(config.client_prefix(), &config.trusted_proxies);
    }

    /// Held while a listener is built, or is gone.
    fn numbers(&self) -> MutexGuard<'_, BTreeSet<usize>> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Connections that are open, and how many may be.
struct Crowd {
    places: Places,
    one_client: Store,
}

impl Crowd {
    fn new(most: u64) -> Self {
        Crowd { places: Places::new(most), one_client: Store::new(most, 0.0, CONNECTIONS_OF_ONE_CLIENT) }
    }

    /// Counts one in, unless there are as many as may be.
    fn enter(&self) -> Result<(), &'static Refusal> {
        if self.places.enter() { Ok(()) } else { Err(&refusal::ACCEPT_CONNECTIONS) }
    }

    /// Whether a client that has so many already may have one that was counted in.
    fn admits(&self, client: u64) -> bool {
        let others = self.places.taken().saturating_sub(1);
        self.one_client.admits(others, client, 1) != Err(Denial::Client)
    }

    fn leave(&self) {
        self.places.leave();
    }
}

/// What a listener has that others have as well, or that has to be started.
#[derive(Default)]
pub struct Fittings {
    /// TLS.
    pub tls: Option<Arc<Tls>>,
    /// Names of TLS that are passed on.
    pub passthrough: Names<Arc<Relay>>,
    /// Where everything is passed on to.
    pub tcp: Option<Arc<Relay>>,
}

impl Listener {
    /// Builds the listener that is written so in the configuration of this number, in place of `before`. What the open
    /// files allow is the most that its limits can be. They hold once it is [begun](Listener::begin).
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
        let http2_rules = Rules::build(&written.http2);
        let metrics = metrics.listener(&written.name);
        let under_way = before.map_or_else(|| Arc::new(Busy::new(common)), |before| before.under_way.clone());
        // A rate that stays as it is written remembers who has come.
        let connection_rates = before.filter(|before| {
            let old = &before.limits;
            (old.connection_rate, old.connection_rate_per_ip) == (limits.connection_rate, limits.connection_rate_per_ip)
        });
        let handshake_rates = before.filter(|before| {
            let old = &before.limits;
            (old.handshake_rate, old.handshake_rate_per_ip) == (limits.handshake_rate, limits.handshake_rate_per_ip)
        });
        Listener {
            name: written.name.clone(),
            unix: written.address.unix_path().is_some(),
            http1: spoken.contains(&Protocol::Http1),
            h2c: spoken.contains(&Protocol::H2c),
            h2: spoken.contains(&Protocol::H2),
            proxy_protocol: written.proxy_protocol.as_ref().map(Expected::build),
            tls,
            passthrough,
            tcp,
            redirect: written.redirect_https.map(|written| Redirect { port: written.port, status: written.status }),
            hsts: hsts(written),
            head: HeadLimits { fields: limits.headers.0 as usize, bytes: limits.header_bytes.0 as usize },
            odd_names: written.odd_header_names,
            header_timeout: written.timeouts.header.0,
            idle_timeout: written.timeouts.idle.0,
            requests_max: limits.requests_per_connection.0,
            streams_max: usize::try_from(limits.streams.0).unwrap_or(usize::MAX),
            h2_options: h2_options(written, &http2_rules),
            http2_rules,
            metrics,
            generation,
            under_way,
            connections_per_ip: limits.connections_per_ip.0,
            connection_rates: connection_rates.map_or_else(
                || Arc::new(Rates::new(limits.connection_rate, limits.connection_rate_per_ip)),
                |before| before.connection_rates.clone(),
            ),
            handshakes_per_ip: limits.handshakes_per_ip.0,
            handshake_rates: handshake_rates.map_or_else(
                || Arc::new(Rates::new(limits.handshake_rate, limits.handshake_rate_per_ip)),
                |before| before.handshake_rates.clone(),
            ),
            requests_per_ip: common.shares.requests_of_client(limits.requests_per_ip.0),
            common: common.clone(),
            limits: limits.clone(),
            open: AtomicU64::new(0),
        }
    }

    /// Has its limits hold for all that its name has under way.
    pub fn begin(&self) {
        let connections = self.limits.connections.0.min(self.common.shares.clients());
        self.metrics.connections_max.set(i64::try_from(connections).unwrap_or(i64::MAX));
        let Busy { connections: places, handshakes, requests, leaving, .. } = &*self.under_way;
        places.set_most(connections);
        handshakes.set_most(self.limits.handshakes.0);
        requests.set_most(self.limits.requests.0);
        leaving.store(false, Ordering::Release);
    }

    /// No listener of its name is left: its connections end with the answer to their next request.
    pub fn leave(&self) {
        self.under_way.leaving.store(true, Ordering::Release);
        self.under_way.left.notify_waiters();
    }

    /// Whether its connections are to end.
    pub fn is_leaving(&self) -> bool {
        self.under_way.leaving.load(Ordering::Acquire)
    }

    /// Ends when its connections are to.
    pub async fn left(&self) {
        loop {
            let left = self.under_way.left.notified();
            if self.is_leaving() {
                return;
            }
            left.await;
        }
    }

    /// Connections that came in while it was written so, and are open.
    pub fn open(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }

    /// Connections of its name that are open, however it was written when they came in.
    pub fn connections_open(&self) -> u64 {
        self.under_way.connections.taken()
    }

    /// Counts a connection in for its client, unless that has as many as it may, or connections come too fast. `None`:
    /// its peer speaks for many clients.
    fn admit(&self, client: Option<IpAddr>) -> Result<Option<Counting>, &'static Refusal> {
        let account = client.and_then(|client| self.common.accounts.of(client));
        let owner = account.as_ref().map(|account| account.client());
        self.connection_rates.admit(owner, Instant::now()).map_err(|excess| match excess {
            Excess::Client => &refusal::ACCEPT_RATE_PER_IP,
            Excess::All => &refusal::ACCEPT_RATE,
        })?;
        let Some(account) = account else { return Ok(None) };
        let has = account.count(Quota::Connections);
        if self.connections_per_ip != Count::UNLIMITED.0 && !self.common.crowd.admits(has) {
            return Err(&refusal::ACCEPT_CONNECTIONS_PER_IP);
        }
        let counting = account.enter(Quota::Connections, self.under_way.number.number, self.connections_per_ip);
        counting.map(Some).ok_or(&refusal::ACCEPT_CONNECTIONS_PER_IP)
    }
}

impl Busy {
    fn new(common: &Arc<Common>) -> Busy {
        // How many there may be, `Listener::begin` says.
        let [connections, handshakes, requests] = [(); 3].map(|()| Places::new(u64::MAX));
        let (number, leaving, left) = (Number::take(common), AtomicBool::new(false), Notify::new());
        Busy { number, connections, handshakes, requests, leaving, left }
    }
}

/// What is under way at a listener, as one of those that there may be; given back when this is dropped.
pub struct UnderWay {
    listener: Arc<Listener>,
    places: fn(&Listener) -> &Places,
    /// Its place among those of its client, unless its peer speaks for many.
    _client: Option<Counting>,
}

impl UnderWay {
    /// Takes a place, unless there are as many as may be: `None`.
    fn enter(listener: &Arc<Listener>, places: fn(&Listener) -> &Places, client: Option<Counting>) -> Option<UnderWay> {
        places(listener).enter().then(|| UnderWay { listener: listener.clone(), places, _client: client })
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        (self.places)(&self.listener).leave();
    }
}

/// How clients are sent to HTTPS.
#[derive(Clone, Copy, Debug)]
pub struct Redirect {
    /// The port there.
    pub port: u16,
    /// The status of the answer.
    pub status: u16,
}

fn hsts(written: &config::Listener) -> Option<HeaderValue> {
    let hsts = written.tls.as_ref()?.hsts.as_ref()?;
    // It is made of digits and words.
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
    // How many may come at once is ours to say.
    options.max_pending_accept_reset_streams(rules.resets_at_once());
    options
}

/// One of the connections that a listener may have; given back when this is dropped.
pub struct Counted {
    listener: Arc<Listener>,
    /// Its place among the connections of its client, once that is known; `None` if its peer speaks for many clients.
    client: Option<Counting>,
    accepted: Instant,
    accepted_in: Option<Box<Cycle>>,
}

impl Counted {
    /// Counts a connection in that was taken from the kernel just now, unless there are as many as there may be.
    ///
    /// # Errors
    ///
    /// There is no place.
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

    /// Counts it for this client, unless that has as many as it may.
    ///
    /// # Errors
    ///
    /// It has no further place.
    pub fn admit(mut self, client: Option<IpAddr>) -> Result<Counted, &'static Refusal> {
        self.client = self.listener.admit(client)?;
        self.listener.metrics.accepted.inc();
        Ok(self)
    }

    /// Where it came in.
    pub fn listener(&self) -> &Arc<Listener> {
        &self.listener
    }

    /// When it was taken from the kernel.
    pub fn accepted(&self) -> Instant {
        self.accepted
    }

    /// Counts it among those that do this.
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
    /// Where it came in.
    pub listener: Arc<Listener>,
    /// The peer's address; `None` on a unix socket.
    pub peer: Option<SocketAddr>,
    /// The address it came in on; `None` on a unix socket.
    pub local: Option<SocketAddr>,
    /// When it was taken from the kernel.
    pub accepted: Instant,
    /// In which cycle of its worker; `None` unless somebody wanted to know. Boxed, for most connections have none.
    pub accepted_in: Option<Box<Cycle>>,
    write_idle_ms: AtomicU64,
    half_close_aborts: AtomicBool,
    /// Bytes that the socket has taken of what TLS made of the answers.
    taken: AtomicU64,
    settled: AtomicBool,
    tunnel: OnceLock<Arc<Tunnel>>,
    reset: AtomicBool,
    cut: AtomicBool,
    ends: AtomicBool,
    socket: OnceLock<RawFd>,
    /// The way past the session of an exchange, on HTTP/1.
    way: OnceLock<WeakBypass>,
    fault: OnceLock<Fault>,
    secured: OnceLock<Box<Secured>>,
    /// The connection of HTTP/2 whose stream carries this one.
    carrier: Option<Arc<Connection>>,
    /// Given back with the connection. One that is carried has none of its own.
    counted: Option<Counted>,
}

/// What a handshake came to, and when it began and how long it took.
struct Secured {
    facts: Facts,
    begun: Instant,
    took: Duration,
}

impl Connection {
    /// A connection that has a place.
    pub fn new(mut counted: Counted, peer: Option<SocketAddr>, local: Option<SocketAddr>) -> Arc<Self> {
        let (listener, accepted) = (counted.listener.clone(), counted.accepted);
        let accepted_in = counted.accepted_in.take();
        Connection::begun(listener, (peer, local), accepted, accepted_in, Ok(counted))
    }

    /// A connection that a stream of this one carries. What is said of its bytes holds for it alone, and it has the
    /// client and the TLS of that one.
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
            write_idle_ms: AtomicU64::new(listener.header_timeout.as_millis() as u64),
            half_close_aborts: AtomicBool::new(false),
            taken: AtomicU64::new(0),
            settled: AtomicBool::new(false),
            tunnel: OnceLock::new(),
            reset: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            ends: AtomicBool::new(false),
            socket: OnceLock::new(),
            way: OnceLock::new(),
            fault: OnceLock::new(),
            secured: OnceLock::new(),
            listener,
            carrier,
            counted,
        })
    }

    /// It goes over this socket, which stays open while an exchange is under way.
    pub(super) fn goes_over(&self, socket: RawFd) {
        // It is the same for all of its life.
        let _ = self.socket.set(socket);
    }

    /// It can be read and written in this way.
    pub(super) fn is_gone_past_by(&self, way: WeakBypass) {
        // It is the same for all of its life.
        let _ = self.way.set(way);
    }

    /// The way past the session of an exchange, on HTTP/1.
    pub fn bypass(&self) -> Option<Bypass> {
        self.way.get()?.bypass()
    }

    /// The number of its socket.
    pub fn socket(&self) -> Option<RawFd> {
        self.socket.get().copied()
    }

    /// The account of its client; `None` if its peer speaks for many clients.
    pub fn account(&self) -> Option<&Arc<Account>> {
        match (&self.counted, &self.carrier) {
            (Some(counted), _) => counted.client.as_ref().map(Counting::account),
            (None, carrier) => carrier.as_ref()?.account(),
        }
    }

    /// Whether a stream of HTTP/2 carries it.
    pub fn is_carried(&self) -> bool {
        self.carrier.is_some()
    }

    /// Whether ALPN has agreed on HTTP/2; `None` without TLS.
    pub(super) fn agreed_on_h2(&self) -> Option<bool> {
        if self.is_carried() { Some(false) } else { self.tls().map(|tls| tls.h2) }
    }

    /// Counts one more request in, unless too many of its client or of all are under way.
    ///
    /// # Errors
    /// What the client is told.
    pub fn begin_request(&self) -> Result<UnderWay, &'static Refusal> {
        let client = self.place_of_client(Quota::Requests, self.listener.requests_per_ip);
        let client = client.ok_or(&refusal::ROUTE_REQUESTS_PER_IP)?;
        UnderWay::enter(&self.listener, |listener| &listener.under_way.requests, client).ok_or(&refusal::ROUTE_REQUESTS)
    }

    /// Counts a handshake in that begins now, unless too many do, or are under way.
    ///
    /// # Errors
    /// Why it does not take place.
    pub fn begin_handshake(&self) -> Result<UnderWay, &'static Refusal> {
        let owner = self.account().map(|account| account.client());
        self.listener.handshake_rates.admit(owner, Instant::now()).map_err(|excess| match excess {
            Excess::Client => &refusal::HANDSHAKE_RATE_PER_IP,
            Excess::All => &refusal::HANDSHAKE_RATE,
        })?;
        let client = self.place_of_client(Quota::Handshakes, self.listener.handshakes_per_ip);
        let client = client.ok_or(&refusal::HANDSHAKE_LIMIT_PER_IP)?;
        UnderWay::enter(&self.listener, |listener| &listener.under_way.handshakes, client)
            .ok_or(&refusal::HANDSHAKE_LIMIT)
    }

    /// `None`: its client has as many as it may. A peer that speaks for many clients has no place and needs none.
    fn place_of_client(&self, what: Quota, most: u64) -> Option<Option<Counting>> {
        match self.account() {
            None => Some(None),
            Some(account) => account.enter(what, self.listener.under_way.number.number, most).map(Some),
        }
    }

    /// The handshake is done, which began at this time.
    pub(super) fn secure(&self, facts: Facts, begun: Instant, took: Duration) {
        // There is one handshake on a connection.
        let _ = self.secured.set(Box::new(Secured { facts, begun, took }));
    }

    /// What is known of its TLS. `None`: it is in clear text.
    pub fn tls(&self) -> Option<&Facts> {
        match &self.carrier {
            Some(carrier) => carrier.tls(),
            None => self.secured.get().map(|secured| &secured.facts),
        }
    }

    /// When its handshake began and how long it took, if there was one.
    pub fn handshake(&self) -> Option<(Instant, Duration)> {
        self.secured.get().map(|secured| (secured.begun, secured.took))
    }

    /// Whether a request for `host` may come over it, which may ask for other terms than those of its TLS.
    pub fn may_serve(&self, host: &str) -> bool {
        match (&self.listener.tls, self.tls()) {
            (Some(tls), Some(facts)) => tls.table.load().may_serve(host, facts.policy),
            _ => true,
        }
    }

    /// The socket has taken so many bytes of what is encrypted.
    pub(super) fn took(&self, bytes: usize) {
        self.taken.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// How many bytes that were in all.
    pub(super) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// How long the client may take nothing of what is written to it. Until a route says, it is the header's time.
    pub fn set_write_idle(&self, time: Duration) {
        self.write_idle_ms.store(time.as_millis() as u64, Ordering::Relaxed);
    }

    /// The same on HTTP/2, where it holds for the connection as a whole, beside the time of each stream: the longest
    /// that any of its routes allows.
    pub fn extend_write_idle(&self, time: Duration) {
        self.write_idle_ms.fetch_max(time.as_millis() as u64, Ordering::Relaxed);
    }

    pub(super) fn write_idle(&self) -> Duration {
        Duration::from_millis(self.write_idle_ms.load(Ordering::Relaxed))
    }

    /// What it means that the client closes its sending side behind a whole request: whether it is gone.
    pub fn set_half_close_aborts(&self, aborts: bool) {
        self.half_close_aborts.store(aborts, Ordering::Relaxed);
    }

    pub(super) fn half_close_aborts(&self) -> bool {
        self.half_close_aborts.load(Ordering::Relaxed)
    }

    /// It has been served, if only with the beginning of an answer: from now on it is no newcomer.
    pub fn settle(&self) {
        self.settled.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Relaxed)
    }

    /// The client agreed on another protocol (101): all further bytes pass as they are.
    pub fn switch_to_raw(&self, tunnel: Arc<Tunnel>) {
        // It happens once: nothing else is spoken on this connection afterwards.
        let _ = self.tunnel.set(tunnel);
    }

    /// Whether it did.
    pub fn is_raw(&self) -> bool {
        self.tunnel.get().is_some()
    }

    /// Where those bytes go.
    pub(super) fn tunnel(&self) -> Option<&Arc<Tunnel>> {
        self.tunnel.get()
    }

    /// No request is to follow the present one, on HTTP/1.
    pub fn end_after_answer(&self) {
        self.ends.store(true, Ordering::Relaxed);
    }

    pub(super) fn ends(&self) -> bool {
        self.ends.load(Ordering::Relaxed)
    }

    /// The answer was cut short: its end is not to be said as one (`close_notify`, RFC 9112 §9.8).
    pub fn break_off(&self) {
        self.cut.store(true, Ordering::Relaxed);
    }

    pub(super) fn breaks_off(&self) -> bool {
        self.cut.load(Ordering::Relaxed)
    }

    /// The answer was cut short and its end could be taken for a real one: close with a reset (RFC 9112 §8).
    pub fn close_with_reset(&self) {
        self.reset.store(true, Ordering::Relaxed);
    }

    pub(super) fn resets(&self) -> bool {
        self.reset.load(Ordering::Relaxed)
    }

    /// What the stream found wrong with the bytes of the client, if anything.
    pub fn fault(&self) -> Option<Fault> {
        self.fault.get().copied()
    }

    pub(super) fn set_fault(&self, phase: Phase, what: What) {
        // A second fault of a connection that is already condemned adds nothing.
        let _ = self.fault.set(Fault::new(Party::Client, phase, what));
    }
}

/// Counts a connection among those of its state until it is dropped.
pub struct StateGauge {
    listener: Arc<Listener>,
    state: ConnectionState,
}

impl StateGauge {
    /// A connection of this listener that is in this state.
    pub fn new(listener: Arc<Listener>, state: ConnectionState) -> Self {
        listener.metrics.enter(None, Some(state));
        StateGauge { listener, state }
    }

    /// Goes on to `state`.
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

/// How an exchange began: what is known before Pingora makes a context for it.
pub struct Begin {
    /// Its connection.
    pub connection: Arc<Connection>,
    /// From the connection to its first byte, without the handshake; for the first exchange only.
    pub accept: Option<Duration>,
    /// What its handshake took; for the first exchange only.
    pub handshake: Option<Duration>,
    /// The first byte of its header.
    pub header_since: Instant,
    /// The cycle of its worker in which that came; `None` unless somebody wanted to know.
    pub header_in: Option<Cycle>,
    /// When the header was complete.
    pub header_done: Instant,
    /// What can be done with its stream, on HTTP/2.
    pub control: Option<Control>,
}

thread_local! {
    static BEGIN: RefCell<Option<Begin>> = const { RefCell::new(None) };
}

/// Hands [`Begin`] to the context that Pingora makes somewhere inside `future`: `ProxyHttp::new_ctx` has no argument.
pub struct Introduced<F> {
    future: F,
    begin: Option<Begin>,
}

impl<F> Introduced<F> {
    /// Introduces the exchange that `future` runs.
    pub fn new(begin: Begin, future: F) -> Self {
        Introduced { future, begin: Some(begin) }
    }
}

impl<F: Future + Unpin> Future for Introduced<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        if self.begin.is_none() {
            return Pin::new(&mut self.future).poll(cx);
        }
        BEGIN.set(self.begin.take());
        let polled = Pin::new(&mut self.future).poll(cx);
        self.begin = BEGIN.take();
        polled
    }
}

/// Takes what is known of the exchange whose future is being polled. `None` if it was taken before.
pub fn introduction() -> Option<Begin> {
    BEGIN.take()
}

/// Exchanges under way, so that a stop can wait for the last one.
#[derive(Default)]
pub struct Inflight {
    count: AtomicUsize,
    none: Notify,
}

impl Inflight {
    /// Counts one in until the guard is dropped.
    pub fn enter(self: &Arc<Self>) -> InflightGuard {
        self.count.fetch_add(1, Ordering::Relaxed);
        InflightGuard(self.clone())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Waits until there is none.
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

/// One exchange under way.
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

    /// One that came through a listener with these further keys.
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
