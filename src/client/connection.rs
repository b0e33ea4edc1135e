//! A client's connection: the listener it came through, what it is allowed, and the facts that outlive one exchange.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use pingora::apps::HttpServerOptions;
use pingora::protocols::http::v2::server::{H2Options, default_h2_options};
use tokio::sync::Notify;

use super::head::HeadLimits;
use crate::config;
use crate::config::listener::Protocol;
use crate::error::{Refusal, refusal};
use crate::eventloop::worker;
use crate::metrics::{ConnectionState, ListenerMetrics, Metrics};
use crate::phase::journal::Cycle;

/// A listener as it runs.
pub struct Listener {
    /// Its name in metrics and logs.
    pub name: String,
    /// Whether HTTP/1 is spoken.
    pub http1: bool,
    /// Whether HTTP/2 in clear text is spoken.
    pub h2c: bool,
    /// What a request header may be.
    pub head: HeadLimits,
    /// For a whole request header.
    pub header_timeout: Duration,
    /// Between requests.
    pub idle_timeout: Duration,
    /// Requests on one connection.
    pub requests_max: u64,
    /// What HTTP/2 clients are told of the limits.
    pub h2: H2Options,
    /// How Pingora is to run HTTP/2 connections.
    pub h2_server: HttpServerOptions,
    /// Its counters.
    pub metrics: ListenerMetrics,
    connections_max: u64,
    connections: AtomicU64,
    per_ip_max: u64,
    per_ip: Mutex<HashMap<IpAddr, u64>>,
}

impl Listener {
    /// Builds the listener that was written.
    pub fn build(written: &config::Listener, metrics: &Metrics) -> Self {
        let limits = &written.limits;
        Listener {
            name: written.name.clone(),
            http1: written.protocols.contains(&Protocol::Http1),
            h2c: written.protocols.contains(&Protocol::H2c),
            head: HeadLimits { fields: limits.headers.0 as usize, bytes: limits.header_bytes.0 as usize },
            header_timeout: written.timeouts.header.0,
            idle_timeout: written.timeouts.idle.0,
            requests_max: limits.requests_per_connection.0,
            h2: h2_options(limits),
            h2_server: h2_server_options(written.timeouts.idle.0),
            metrics: metrics.listener(&written.name),
            connections_max: limits.connections.0,
            connections: AtomicU64::new(0),
            per_ip_max: limits.connections_per_ip.0,
            per_ip: Mutex::default(),
        }
    }

    /// Counts a connection in, unless a limit is met.
    fn admit(&self, client: Option<IpAddr>) -> Result<(), &'static Refusal> {
        if self.connections.fetch_add(1, Ordering::Relaxed) >= self.connections_max {
            self.connections.fetch_sub(1, Ordering::Relaxed);
            return Err(&refusal::ACCEPT_CONNECTIONS);
        }
        if let Some(client) = client.filter(|_| self.limits_per_ip()) {
            // Taken once per connection and held for one look-up; there is no wait inside.
            let mut per_ip = self.per_ip.lock().unwrap_or_else(PoisonError::into_inner);
            let open = per_ip.entry(client).or_default();
            if *open >= self.per_ip_max {
                self.connections.fetch_sub(1, Ordering::Relaxed);
                return Err(&refusal::ACCEPT_CONNECTIONS_PER_IP);
            }
            *open += 1;
        }
        Ok(())
    }

    fn dismiss(&self, client: Option<IpAddr>) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
        if let Some(client) = client.filter(|_| self.limits_per_ip()) {
            let mut per_ip = self.per_ip.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(open) = per_ip.get_mut(&client) {
                *open -= 1;
                if *open == 0 {
                    per_ip.remove(&client);
                }
            }
        }
    }

    fn limits_per_ip(&self) -> bool {
        self.per_ip_max != config::units::Count::UNLIMITED.0
    }
}

fn h2_options(limits: &config::listener::Limits) -> H2Options {
    let capped = |limit: u64| u32::try_from(limit).unwrap_or(u32::MAX);
    let mut options = default_h2_options();
    options.max_header_list_size(capped(limits.header_bytes.0));
    options.max_concurrent_streams(capped(limits.streams.0));
    options
}

fn h2_server_options(idle: Duration) -> HttpServerOptions {
    let mut options = HttpServerOptions::default();
    options.h2c = true;
    options.h2_idle_timeout = Some(idle);
    options
}

/// All listeners; finds the one that a connection came through, once, by its local address.
pub struct Listeners {
    tcp: Vec<(SocketAddr, Arc<Listener>)>,
    unix: Vec<(std::path::PathBuf, Arc<Listener>)>,
}

impl Listeners {
    /// An empty list.
    pub fn new() -> Self {
        Listeners { tcp: Vec::new(), unix: Vec::new() }
    }

    /// Adds a listener on a TCP address; port and address as bound.
    pub fn add_tcp(&mut self, address: SocketAddr, listener: Arc<Listener>) {
        self.tcp.push((address, listener));
    }

    /// Adds a listener on a unix socket.
    pub fn add_unix(&mut self, path: &str, listener: Arc<Listener>) {
        self.unix.push((path.into(), listener));
    }

    /// The listener bound to this local address, or to every address of its port.
    pub fn find(&self, local: Option<&pingora::protocols::l4::socket::SocketAddr>) -> Option<&Arc<Listener>> {
        use pingora::protocols::l4::socket::SocketAddr as Local;
        match local {
            Some(Local::Inet(local)) => {
                let exact = self.tcp.iter().find(|(address, _)| address == local);
                let wildcard = || self.tcp.iter().find(|(at, _)| at.port() == local.port() && at.ip().is_unspecified());
                exact.or_else(wildcard).map(|(_, listener)| listener)
            }
            Some(Local::Unix(local)) => {
                let path = local.as_pathname()?;
                self.unix.iter().find(|(at, _)| at == path).map(|(_, listener)| listener)
            }
            None => None,
        }
    }
}

impl Default for Listeners {
    fn default() -> Self {
        Self::new()
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
    settled: AtomicBool,
    raw: AtomicBool,
    reset: AtomicBool,
    fault: OnceLock<&'static Refusal>,
}

impl Connection {
    /// Counts a new connection in, unless a limit of its listener is met.
    pub fn admit(
        listener: &Arc<Listener>,
        peer: Option<SocketAddr>,
        local: Option<SocketAddr>,
    ) -> Result<Arc<Self>, &'static Refusal> {
        listener.admit(peer.map(|peer| peer.ip()))?;
        listener.metrics.accepted.inc();
        Ok(Arc::new(Connection {
            listener: listener.clone(),
            peer,
            local,
            accepted: Instant::now(),
            accepted_in: worker::cycle_if_wanted().map(Box::new),
            write_idle_ms: AtomicU64::new(listener.header_timeout.as_millis() as u64),
            half_close_aborts: AtomicBool::new(false),
            settled: AtomicBool::new(false),
            raw: AtomicBool::new(false),
            reset: AtomicBool::new(false),
            fault: OnceLock::new(),
        }))
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
    pub fn switch_to_raw(&self) {
        self.raw.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_raw(&self) -> bool {
        self.raw.load(Ordering::Relaxed)
    }

    /// The answer was cut short and its end could be taken for a real one: close with a reset (RFC 9112 §8).
    pub fn close_with_reset(&self) {
        self.reset.store(true, Ordering::Relaxed);
    }

    pub(super) fn resets(&self) -> bool {
        self.reset.load(Ordering::Relaxed)
    }

    /// What the stream found wrong with the bytes of the client, if anything.
    pub fn fault(&self) -> Option<&'static Refusal> {
        self.fault.get().copied()
    }

    pub(super) fn set_fault(&self, refusal: &'static Refusal) {
        // A second fault of a connection that is already condemned adds nothing.
        let _ = self.fault.set(refusal);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.listener.dismiss(self.peer.map(|peer| peer.ip()));
    }
}

/// Counts a connection among those of its state until it is dropped.
pub struct StateGauge {
    connection: Arc<Connection>,
    state: ConnectionState,
}

impl StateGauge {
    /// A connection that is idle.
    pub fn new(connection: Arc<Connection>) -> Self {
        connection.listener.metrics.enter(None, Some(ConnectionState::Idle));
        StateGauge { connection, state: ConnectionState::Idle }
    }

    /// Goes on to `state`.
    pub fn enter(&mut self, state: ConnectionState) {
        self.connection.listener.metrics.enter(Some(self.state), Some(state));
        self.state = state;
    }
}

impl Drop for StateGauge {
    fn drop(&mut self) {
        self.connection.listener.metrics.enter(Some(self.state), None);
    }
}

/// How an exchange began: what is known before Pingora makes a context for it.
pub struct Begin {
    /// Its connection.
    pub connection: Arc<Connection>,
    /// From the connection to its first byte; for the first exchange only.
    pub accept: Option<Duration>,
    /// The first byte of its header.
    pub header_since: Instant,
    /// The cycle of its worker in which that came; `None` unless somebody wanted to know.
    pub header_in: Option<Cycle>,
    /// When the header was complete.
    pub header_done: Instant,
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
        let listener = Arc::new(Listener::build(&written, &Metrics::new(0, Vec::new())));
        Connection::admit(&listener, None, None).expect("room")
    }
}
