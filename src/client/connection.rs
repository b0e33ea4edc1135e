//! A client's connection: the facts that outlive one exchange.

use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use super::broken::{CloseCheck, Leaving};
use super::listener::{Counted, Listener, UnderWay};
use super::rates::Excess;
use super::relay::Passing;
use super::tls::handshake::Facts;
use super::tls::stream::Owner;
use crate::account::{Account, Counting, Quota};
use crate::error::{Refusal, refusal};
use crate::party::wait::ClientWatch;
use crate::party::{Fault, Party, What};
use crate::phase::Phase;
use crate::phase::journal::Cycle;
use crate::scheduler;
use crate::upstream::transport::tunnel::Tunnel;

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

    /// Whether an HTTP/2 stream carries the connection.
    pub fn is_carried(&self) -> bool {
        self.carrier.is_some()
    }

    /// Whether ALPN selected HTTP/2; `None` without TLS.
    pub(super) fn agreed_on_h2(&self) -> Option<bool> {
        if self.is_carried() { Some(false) } else { self.tls().map(|tls| tls.h2) }
    }

    /// The connection, as a relay sees it.
    pub(super) fn passing(&self) -> Passing<'_> {
        let Connection { listener, peer, local, .. } = self;
        Passing { listener: &listener.name, metrics: &listener.metrics, peer: *peer, local: *local }
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
            Some(account) => account.enter(what, self.listener.under_way.number(), most).map(Some),
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

    /// Records that the response was cut: its end must not be marked as regular (`close_notify`, RFC 9112 §9.8).
    pub fn break_off(&self) {
        self.flags.cut.store(true, Ordering::Relaxed);
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

impl Owner for Connection {
    fn took(&self, bytes: usize) {
        Connection::took(self, bytes);
    }

    fn count(&self, refusal: &'static Refusal) {
        self.listener.metrics.refusals.count(refusal);
    }

    fn is_last_write(&self) -> bool {
        self.flags.last_write.load(Ordering::Relaxed)
    }

    fn breaks_off(&self) -> bool {
        self.flags.cut.load(Ordering::Relaxed)
    }
}

/// The client of a connection, as the scheduler sees it.
pub struct Arriving {
    connection: Arc<Connection>,
    look: CloseCheck,
}

impl Arriving {
    /// The client of this connection.
    pub fn new(connection: &Arc<Connection>) -> Self {
        Arriving { connection: connection.clone(), look: CloseCheck::default() }
    }
}

impl ClientWatch for Arriving {
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

#[cfg(test)]
pub(crate) mod tests {
    use super::super::descriptors::Shares;
    use super::super::listener::{Common, Fittings};
    use super::*;
    use crate::account::Accounts;
    use crate::metrics::Metrics;

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
