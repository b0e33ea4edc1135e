//! The client side of the gateway: connections from accept to exchange, and back to the idle state.
//!
//! [`DownstreamApp`] receives accepted sockets. On HTTP/1 it runs the keep-alive loop: wait idle, read the header,
//! check it, let the [`driver`] run one exchange, take the stream back, and wait again. On HTTP/2, [`http2`] owns the
//! connection, and every stream is an exchange of its own. Requests that are refused before a session exists are
//! answered, counted and logged here.

/// The methods of one of Forebay's own sessions for custom messages, which only protocols other than HTTP have: all are
/// empty.
macro_rules! no_custom_messages {
    () => {
        fn take_custom_message_reader(
            &mut self,
        ) -> Option<Box<dyn futures::Stream<Item = Result<Bytes>> + Unpin + Send + Sync>> {
            None
        }

        fn restore_custom_message_reader(
            &mut self,
            _reader: Box<dyn futures::Stream<Item = Result<Bytes>> + Unpin + Send + Sync>,
        ) -> Result<()> {
            Ok(())
        }

        fn take_custom_message_writer(&mut self) -> Option<Box<dyn CustomMessageWrite>> {
            None
        }

        fn restore_custom_message_writer(&mut self, _writer: Box<dyn CustomMessageWrite>) -> Result<()> {
            Ok(())
        }
    };
}

/// The methods of one of Forebay's own sessions for its connection: all are empty, since the exchange knows the
/// connection.
macro_rules! no_connection {
    () => {
        fn digest(&self) -> Option<&Digest> {
            None
        }

        fn digest_mut(&mut self) -> Option<&mut Digest> {
            None
        }

        fn client_addr(&self) -> Option<&SocketAddr> {
            None
        }

        fn server_addr(&self) -> Option<&SocketAddr> {
            None
        }
    };
}

/// The methods of one of Forebay's own sessions for Pingora's timeouts: all are empty, since Forebay enforces its own.
macro_rules! no_timeouts {
    () => {
        fn set_read_timeout(&mut self, _timeout: Option<Duration>) {}

        fn get_read_timeout(&self) -> Option<Duration> {
            None
        }

        fn set_write_timeout(&mut self, _timeout: Option<Duration>) {}

        fn get_write_timeout(&self) -> Option<Duration> {
            None
        }

        fn set_total_drain_timeout(&mut self, _timeout: Option<Duration>) {}

        fn get_total_drain_timeout(&self) -> Option<Duration> {
            None
        }
    };
}

pub(crate) use {no_connection, no_timeouts};

pub mod acceptor;
pub mod broken;
pub mod challenges;
pub mod conduct;
pub mod connection;
pub mod cut;
pub mod descriptors;
pub mod driver;
pub mod entrance;
pub mod farewell;
pub mod fields;
pub mod frames;
pub mod head;
pub mod hello;
pub mod http1;
pub mod http2;
pub mod inflight;
pub mod kept;
pub mod listener;
pub mod names;
pub mod proxy_protocol;
pub mod rates;
pub mod relay;
pub mod remains;
pub mod socket;
pub mod start;
pub mod stream;
pub mod tls;
pub mod trailers;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use bytes::BytesMut;
use pingora::protocols::Stream;
use pingora::protocols::http::ServerSession;
use pingora::server::ShutdownWatch;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;

use crate::access_log::AccessLog;
use crate::error::{Refusal, refusal};
use crate::eventloop::worker;
use crate::finished::{Client, Finished, Request, Routing};
use crate::metrics::{ConnectionState, Direction, Metrics, RouteMetrics, Summary};
use crate::party::What;
use crate::party::wait::{NoClient, within};
use crate::phase::journal::Cycle;
use crate::phase::{Clock, Phase};
use crate::scheduler::Schedulers;
use crate::scheduler::task::{Abandoned, ExchangeTask, own_time};
use crate::slow_client::SlowClients;
use crate::slow_client::waiting::Waiting;
use connection::{Arriving, Connection};
use cut::Cut;
use driver::{Driven, Driver, sessions};
use entrance::{Ends, Entered};
use inflight::{Inflight, InflightGuard};
use listener::{Counted, Listener, StateGauge};
use relay::{Passed, Relay};
use remains::SettlesExchanges;
use socket::Accepted;
use start::ExchangeStart;
use stream::{ClientStream, Opening, WeakBypass};

/// Maximum time to send a client the refusal that the connection limit is reached.
const TURN_AWAY: Duration = Duration::from_millis(200);
/// Maximum number of connections that are told so at a time. They hold no other resources; further ones are closed
/// without a response.
const TURN_AWAY_AT_ONCE: usize = 64;

/// Receives accepted sockets.
pub struct DownstreamApp<P> {
    driver: Driver<P>,
    desk: Arc<ConnectionContext>,
}

/// The state that connections share.
pub struct ConnectionContext {
    turned_away: AtomicUsize,
    metrics: Metrics,
    unrouted: Arc<RouteMetrics>,
    log: Option<Arc<AccessLog>>,
    ending: Ending,
    slow: SlowClients,
    schedulers: Arc<Schedulers>,
}

/// The state of a shutdown, and the part that settles exchanges that must be dropped.
pub struct Ending {
    /// Whether responses announce the close of their connection.
    pub stopping: ShutdownWatch,
    /// Signals that the grace period of exchanges has passed.
    pub cut: Arc<Cut>,
    /// The active exchanges that a shutdown waits for.
    pub inflight: Arc<Inflight>,
    /// Settles dropped exchanges.
    pub settler: Arc<dyn SettlesExchanges>,
}

impl Ending {
    fn is_near(&self) -> bool {
        *self.stopping.borrow()
    }
}

impl ConnectionContext {
    /// Creates the shared state.
    pub fn new(
        metrics: Metrics,
        log: Option<Arc<AccessLog>>,
        ending: Ending,
        slow: SlowClients,
        schedulers: Arc<Schedulers>,
        unrouted: Arc<RouteMetrics>,
    ) -> Self {
        ConnectionContext { turned_away: AtomicUsize::new(0), metrics, unrouted, log, ending, slow, schedulers }
    }

    /// Counts and logs a refusal without an exchange.
    fn record(
        &self,
        whose: (&Listener, Option<SocketAddr>),
        bytes: &[u8],
        refusal: &'static Refusal,
        clock: &mut Clock,
    ) {
        let now = Instant::now();
        clock.settle(now);
        let status = refusal.status;
        let summary = Summary { own: own_time(now), status, refusal: Some(refusal), ..Summary::new(clock) };
        self.unrouted.record(&summary);
        let Some(log) = &self.log else { return };
        let (method, target) = head::request_line(bytes);
        let finished = Finished {
            request: Request { method, target, ..Request::default() },
            ..Finished::new(now, client_of(whose.0, whose.1), summary)
        };
        log.record(&finished, &[]);
    }
}

impl<P> DownstreamApp<P> {
    /// Creates a front for this driver.
    pub fn new(driver: Driver<P>, desk: Arc<ConnectionContext>) -> Self {
        DownstreamApp { driver, desk }
    }

    /// The schedulers of the workers.
    pub fn schedulers(&self) -> &Arc<Schedulers> {
        &self.desk.schedulers
    }
}

impl<P> DownstreamApp<P>
where
    P: Driven + Send + Sync + 'static,
    P::CTX: Send + Sync + 'static,
{
    /// Receives a connection that this listener accepted, and spawns its task on a worker that Pingora draws. The event
    /// loop of that worker alone watches its socket.
    pub fn receive(self: Arc<Self>, accepted: Accepted, listener: Arc<Listener>, shutdown: ShutdownWatch) {
        let worker = pingora_runtime::current_handle();
        if entrance::is_needed(&listener) {
            worker.spawn(self.enter(accepted, listener, shutdown));
        } else {
            worker.spawn(self.welcome(accepted, listener, shutdown));
        }
    }

    /// Serves a connection that begins with HTTP. This is the task of waiting connections, so what is rare is boxed.
    async fn welcome(self: Arc<Self>, accepted: Accepted, listener: Arc<Listener>, shutdown: ShutdownWatch) {
        let Some((io, ends)) = opened(accepted, &listener) else { return };
        let counted = Counted::take(&listener).and_then(|counted| counted.admit(ends.peer.map(|peer| peer.ip())));
        match counted {
            Ok(counted) => {
                drop(listener);
                let connection = Connection::new(counted, ends.peer, ends.local);
                let stream = Box::new(ClientStream::new(io, connection.clone()));
                ConnectionTask::new(self, connection, shutdown).serve(stream).await;
            }
            Err(refusal) => Box::pin(self.desk.turn_away(io, &listener, ends, refusal)).await,
        }
    }

    /// Handles the steps of a connection before HTTP, and serves it.
    async fn enter(self: Arc<Self>, accepted: Accepted, listener: Arc<Listener>, mut shutdown: ShutdownWatch) {
        let Some((io, ends)) = opened(accepted, &listener) else { return };
        let counted = match Counted::take(&listener) {
            Ok(counted) => counted,
            // Clients of other protocols would not understand a response.
            Err(refusal) if entrance::speaks_tls(&listener) || listener.relays.tcp.is_some() => {
                return listener.metrics.refusals.count(refusal);
            }
            Err(refusal) => return Box::pin(self.desk.turn_away(io, &listener, ends, refusal)).await,
        };
        let entered = tokio::select! {
            // Boxed, so that a waiting connection does not hold the memory of this future.
            entered = Box::pin(entrance::enter(io, counted, ends, &self.desk.metrics)) => entered,
            _ = shutdown.wait_for(|stopping| *stopping) => return,
        };
        match entered {
            Ok(Some(Entered::Http { io, inbox, connection })) => {
                let stream = Box::new(ClientStream::begun(io, inbox, connection.clone()));
                ConnectionTask::new(self, connection, shutdown).serve(stream).await;
            }
            Ok(Some(Entered::Relay { raw, relay, name, connection })) => {
                let _state = StateGauge::new(listener.clone(), ConnectionState::Active);
                let _inflight = self.desk.ending.inflight.enter();
                // Boxed, as for refusals: this is the task of waiting connections, too, and its size is that of its
                // largest future.
                let passed =
                    Box::pin(relay.pass(*raw, name.is_some(), connection.passing(), &self.desk.ending.cut)).await;
                self.desk.record_passed(&connection, &relay, name.as_deref(), &passed);
            }
            Ok(None) => {}
            Err(entrance::Refused { refusal, answerable, peer }) => {
                let ends = Ends { peer, ..ends };
                match answerable {
                    Some(io) => Box::pin(self.desk.turn_away(io, &listener, ends, refusal)).await,
                    // Not logged: no request was received, and port scans would fill the log.
                    None => listener.metrics.refusals.count(refusal),
                }
                tracing::debug!(listener = %listener.name, peer = ?ends.peer, reason = refusal.reason, "a connection was given up");
            }
        }
    }
}

impl ConnectionContext {
    /// Runs an exchange of a connection to its end, or until the grace period of a shutdown has passed.
    async fn run<F, T>(&self, exchange: F, connection: &Arc<Connection>) -> Option<T>
    where
        F: Future<Output = Option<T>> + Unpin,
    {
        // The poll that begins it has completed its header.
        let mut exchange = self.task(exchange, connection).continues();
        let ended = tokio::select! {
            biased;
            ended = &mut exchange => ended,
            () = self.ending.cut.told() => {
                exchange.cancel();
                (&mut exchange).await
            }
        };
        ended.unwrap_or_else(|Abandoned| {
            exchange.end(|future| self.ending.settler.settle(remains::collect(|| drop(future))));
            None
        })
    }

    /// The task of an exchange, or of a part that precedes it.
    fn task<F>(&self, future: F, connection: &Arc<Connection>) -> ExchangeTask<F, Arriving> {
        ExchangeTask::new(future, Arriving::new(connection), self.schedulers.clone())
    }

    /// Logs a connection that was passed through.
    fn record_passed(&self, connection: &Connection, relay: &Relay, name: Option<&str>, passed: &Passed) {
        let Some(log) = &self.log else { return };
        let mut clock = Clock::start(Phase::Accept, connection.accepted);
        clock.enter(Phase::Receive, passed.began);
        let now = Instant::now();
        clock.settle(now);
        let Passed { received, sent, refusal, .. } = *passed;
        let summary = Summary { received, sent, refusal, ..Summary::new(&clock) };
        let finished = Finished {
            request: Request {
                host: name.unwrap_or_default().as_bytes(),
                protocol: if name.is_some() { "TLS" } else { "TCP" },
                ..Request::default()
            },
            routing: Routing {
                upstream: Some(&relay.upstream.name),
                endpoint: passed.endpoint.as_deref(),
                attempts: passed.attempts,
                ..Routing::default()
            },
            ..Finished::new(now, client_of(&connection.listener, connection.peer), summary)
        };
        log.record(&finished, &[]);
    }

    /// Responds to a connection that is not admitted.
    async fn turn_away(&self, io: Stream, listener: &Listener, ends: Ends, refusal: &'static Refusal) {
        let mut clock = Clock::start(Phase::Accept, Instant::now());
        self.record((listener, ends.peer), b"", refusal, &mut clock);
        let Some(_hears) = Hearing::enter(&self.turned_away) else { return };
        turn_away(io, refusal).await;
    }
}

/// The connection as a stream that this worker watches, and its ends; `None` if the kernel cannot watch more.
fn opened(accepted: Accepted, listener: &Listener) -> Option<(Stream, Ends)> {
    let failed = |error| tracing::error!(listener = listener.name, %error, "a connection could not be watched");
    let socket = accepted.watch().map_err(failed).ok()?;
    // An IPv4 client of a listener on [::] counts as IPv4.
    let canonical = |end: SocketAddr| SocketAddr::new(end.ip().to_canonical(), end.port());
    let ends = Ends { peer: socket.peer().map(canonical), local: socket.local().map(canonical) };
    // Without buffers: `client::stream` gathers writes itself, and frees its buffers between requests.
    Some((Box::new(socket), ends))
}

/// The client of this listener, for the access log.
fn client_of(listener: &Listener, peer: Option<SocketAddr>) -> Client<'_> {
    Client { listener: &listener.name, address: peer.map(|peer| peer.ip()), peer, ..Client::default() }
}

/// Responds in clear text within a short time. Reads the received bytes, since a reset could otherwise overtake the
/// response.
async fn turn_away(mut io: Stream, refusal: &'static Refusal) {
    let answer = answer_http1(refusal, b"");
    let told = async {
        io.write_all(&answer).await?;
        io.flush().await?;
        let _ = io.shutdown().await;
        while io.read(&mut [0; 1024]).await? > 0 {}
        std::io::Result::Ok(())
    };
    let _ = within(TURN_AWAY, NoClient::ItsIo, told).await;
}

/// Counts a connection that receives a response about the connection limit.
struct Hearing<'d>(&'d AtomicUsize);

impl<'d> Hearing<'d> {
    fn enter(count: &'d AtomicUsize) -> Option<Self> {
        let more = |hearing: usize| (hearing < TURN_AWAY_AT_ONCE).then_some(hearing + 1);
        count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Hearing(count))
    }
}

impl Drop for Hearing<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One connection from its first byte to its end, or until it proves to be HTTP/2.
struct ConnectionTask<P> {
    front: Arc<DownstreamApp<P>>,
    connection: Arc<Connection>,
    /// The gauge of its state. A connection that a stream carries has none; its HTTP/2 connection is counted.
    state: Option<StateGauge>,
    shutdown: ShutdownWatch,
    served: u64,
}

/// The time at which an exchange's header began to arrive, and, for the first exchange, the connection's wait before
/// it.
#[derive(Clone, Copy)]
struct Arrival {
    accept: Option<Duration>,
    handshake: Option<Duration>,
    header_since: Instant,
    header_in: Option<Cycle>,
}

impl Arrival {
    fn clock(self) -> Clock {
        let mut clock = Clock::start(Phase::Header, self.header_since);
        if let Some(accept) = self.accept {
            clock.credit(Phase::Accept, accept);
        }
        if let Some(handshake) = self.handshake {
            clock.credit(Phase::Handshake, handshake);
        }
        clock
    }
}

impl<P> ConnectionTask<P>
where
    P: Driven + Send + Sync + 'static,
    P::CTX: Send + Sync + 'static,
{
    fn new(front: Arc<DownstreamApp<P>>, connection: Arc<Connection>, shutdown: ShutdownWatch) -> Self {
        let state = Some(StateGauge::new(connection.listener.clone(), ConnectionState::Idle));
        ConnectionTask { front, connection, state, shutdown, served: 0 }
    }

    fn enter(&mut self, state: ConnectionState) {
        if let Some(counted) = &mut self.state {
            counted.enter(state);
        }
    }

    async fn serve(mut self, mut stream: Box<ClientStream>) {
        while self.park(&mut stream).await {
            self.served += 1;
            // Boxed, so that a waiting connection does not hold the memory of an exchange.
            let exchange = Box::pin(self.exchange(stream)).await;
            self.connection.settle();
            match exchange {
                Some(kept) => stream = kept,
                None => return,
            }
        }
        // A shutdown waits until the client has received the end of the last response, or its time has passed.
        let _inflight = self.front.desk.ending.inflight.enter();
        tokio::select! {
            () = stream.close() => {}
            () = self.front.desk.ending.cut.told() => {}
        }
    }

    /// Waits for a request. `false`: none will come.
    async fn park(&mut self, stream: &mut ClientStream) -> bool {
        self.enter(ConnectionState::Idle);
        let metrics = &self.front.desk.metrics;
        let _accept = (self.served == 0).then(|| metrics.enter_phase(Phase::Accept, self.connection.accepted));
        let idle = self.connection.listener.terms.idle_timeout;
        tokio::select! {
            biased;
            came = within(idle, NoClient::ItsIo, stream.park()) => came.unwrap_or(false),
            _ = self.shutdown.wait_for(|stopping| *stopping) => false,
        }
    }

    /// Reads one header and runs its exchange. Returns the stream if the connection is kept.
    async fn exchange(&mut self, mut stream: Box<ClientStream>) -> Option<Box<ClientStream>> {
        let header_since = Instant::now();
        let handshake = self.connection.handshake().map(|(_, took)| took).filter(|_| self.served == 1);
        let before = header_since - self.connection.accepted;
        let accept = (self.served == 1).then(|| before.saturating_sub(handshake.unwrap_or_default()));
        let arrival = Arrival { accept, handshake, header_since, header_in: worker::cycle_if_wanted() };
        let inflight = self.front.desk.ending.inflight.enter();
        let opening = self.read_first_header(&mut stream, header_since).await;
        self.enter(ConnectionState::Active);
        match opening {
            Ok(Opening::Http1(request)) => self.proxy(stream, request, arrival).await,
            Ok(Opening::Http2) => {
                // The exchanges on its streams are counted separately.
                drop(inflight);
                self.serve_http2(stream).await;
                None
            }
            Ok(Opening::Closed) => {
                if stream.inbox(|inbox| !inbox.is_empty()) {
                    self.record(&stream, &refusal::HEADER_ABORTED, arrival);
                }
                None
            }
            Err(refusal) => {
                self.refuse(stream, refusal, arrival, inflight).await;
                None
            }
        }
    }

    /// Runs the single exchange of a connection that a stream carries.
    async fn carried(&mut self, mut stream: Box<ClientStream>) {
        let (header_since, header_in) = (Instant::now(), worker::cycle_if_wanted());
        let arrival = Arrival { accept: None, handshake: None, header_since, header_in };
        let inflight = self.front.desk.ending.inflight.enter();
        match self.read_header(&mut stream, header_since).await {
            Ok(Opening::Http1(request)) => {
                if let Some(mut kept) = self.proxy(stream, request, arrival).await {
                    kept.close().await;
                }
            }
            // It uses HTTP/1.1, and its header is complete.
            Ok(Opening::Http2 | Opening::Closed) => {}
            Err(refusal) => self.refuse(stream, refusal, arrival, inflight).await,
        }
    }

    /// Responds to a request without a session.
    async fn refuse(
        &self,
        mut stream: Box<ClientStream>,
        refusal: &'static Refusal,
        arrival: Arrival,
        inflight: InflightGuard,
    ) {
        self.record(&stream, refusal, arrival);
        let answer = stream.inbox(|inbox| answer_http1(refusal, inbox));
        if stream.refuse(&answer).await {
            // A shutdown does not wait for a client that sent half a header.
            let _inflight = Some(inflight).filter(|_| refusal != &refusal::FINISH_SHUTDOWN);
            stream.farewell().await;
        }
    }

    /// Reads a header. That of a new connection takes turns with others.
    async fn read_first_header(
        &mut self,
        stream: &mut ClientStream,
        since: Instant,
    ) -> Result<Opening, &'static Refusal> {
        if self.connection.is_settled() {
            return self.read_header(stream, since).await;
        }
        let (front, connection) = (self.front.clone(), self.connection.clone());
        let header = std::pin::pin!(self.read_header(stream, since));
        // It is never cancelled: a stop ends it within.
        front.desk.task(header, &connection).await.unwrap_or(Ok(Opening::Closed))
    }

    async fn read_header(&mut self, stream: &mut ClientStream, since: Instant) -> Result<Opening, &'static Refusal> {
        self.enter(ConnectionState::Header);
        let _header = self.front.desk.metrics.enter_phase(Phase::Header, since);
        let slow = &self.front.desk.slow;
        let mut waiting = None;
        let mut open = std::pin::pin!(stream.open());
        let open = std::future::poll_fn(|cx| {
            let opening = open.as_mut().poll(cx);
            if opening.is_pending() && waiting.is_none() {
                let client = self.connection.peer.map(|peer| peer.ip());
                let entry = slow.enter(Direction::Request, None, client);
                entry.set(Phase::Header, u64::MAX);
                waiting = Some(Waiting::begin(None, &entry));
            }
            opening
        });
        let opening = within(self.connection.listener.terms.header_timeout, NoClient::ItsIo, open);
        tokio::select! {
            biased;
            opening = opening => opening.unwrap_or(Err(&refusal::HEADER_TIMEOUT)),
            _ = self.shutdown.wait_for(|closing| *closing) => Err(&refusal::FINISH_SHUTDOWN),
        }
    }

    /// Runs the exchange of the received header.
    async fn proxy(
        &self,
        mut stream: Box<ClientStream>,
        request: head::Request,
        arrival: Arrival,
    ) -> Option<Box<ClientStream>> {
        let listener = &self.connection.listener;
        let metrics = &listener.metrics;
        if self.connection.is_carried() {
            metrics.h2_requests.inc()
        } else {
            metrics.http1_requests.inc()
        }
        // Near a shutdown, every response is the last of its connection.
        let last =
            self.served >= listener.terms.requests_max || self.front.desk.ending.is_near() || listener.is_leaving();
        if request.head.upgrades {
            return self.proxy_upgrade(stream, &request, request.head.closes || last, arrival).await;
        }
        if last {
            self.connection.end_after_answer();
        }
        let begin = self.begin(arrival, stream.weak_bypass());
        let session = sessions::take(Box::new(http1::Session::new(&stream, request)));
        let exchange = Box::pin(self.front.driver.run(begin, session, &self.shutdown));
        self.front.desk.run(exchange, &self.connection).await;
        match stream.outcome() {
            Some(true) => Some(stream),
            Some(false) => {
                // As between exchanges, bytes already sent still reach the client.
                tokio::select! {
                    () = stream.end() => {}
                    () = self.front.desk.ending.cut.told() => {}
                }
                None
            }
            None => None,
        }
    }

    fn begin(&self, arrival: Arrival, bypass: WeakBypass) -> ExchangeStart {
        let Arrival { accept, handshake, header_since, header_in } = arrival;
        let (connection, header_done, bypass) = (self.connection.clone(), Instant::now(), Some(bypass));
        ExchangeStart { connection, accept, handshake, header_since, header_in, header_done, control: None, bypass }
    }

    /// As [`ConnectionTask::proxy`], for a request that asks for another protocol: Pingora's own session can become a
    /// tunnel.
    async fn proxy_upgrade(
        &self,
        stream: Box<ClientStream>,
        request: &head::Request,
        last: bool,
        arrival: Arrival,
    ) -> Option<Box<ClientStream>> {
        let begin = self.begin(arrival, stream.weak_bypass());
        let mut session = ServerSession::new_http1(stream);
        session.set_pipelined_prefix(BytesMut::from(&request.written[..]));
        session.set_keepalive(Some(0));
        // Pingora reads only the first of several `Connection` fields.
        session.set_keepalive_reuses_remaining(last.then_some(0));

        let session = sessions::of_pingora(session);
        let exchange = Box::pin(self.front.driver.run(begin, session, &self.shutdown));
        let stream = self.front.desk.run(exchange, &self.connection).await?;
        stream.into_any().downcast::<ClientStream>().ok()
    }

    /// Serves an HTTP/2 connection until its end: by the client, by a shutdown, or by the limit of requests.
    async fn serve_http2(&mut self, stream: Box<ClientStream>) {
        let (last, ending) = watch::channel(false);
        self.connection.settle();
        let connection = self.connection.clone();
        let (front, bypass, streams) = (self.front.clone(), stream.weak_bypass(), Streams::default());
        let http2 = Arc::new(Http2 { front, connection, bypass, streams, last });
        let (progress, mut ended) = (stream.progress(), ending.clone());
        let (desk, connection) = (&self.front.desk, &self.connection);
        let refuse = |refusal| {
            if refusal == &refusal::HEADER_TIMEOUT {
                connection.set_fault(Phase::Header, What::Silent);
            }
            let mut clock = Clock::start(Phase::Header, Instant::now());
            desk.record((&connection.listener, connection.peer), b"", refusal, &mut clock);
        };
        let begin = |opened: http2::Opened| {
            // The library stops counting a request once the client has reset it, although it is still being ended here.
            let Some(active) = ActiveStream::enter(&http2) else {
                match opened {
                    http2::Opened::Exchange(stream) => stream.control().reset(h2::Reason::REFUSED_STREAM),
                    http2::Opened::Carried(mut carried) => carried.io.give_up(h2::Reason::REFUSED_STREAM),
                }
                return refuse(&refusal::HEADER_H2_STREAMS);
            };
            // On the worker of the connection: on another one, an exchange would blame its client for a stall of the
            // worker that reads and writes the client's bytes.
            match opened {
                http2::Opened::Exchange(stream) => tokio::spawn(active.exchange(stream, ending.clone())),
                http2::Opened::Carried(carried) => tokio::spawn(active.carry(*carried, ending.clone())),
            };
        };
        let mut serve = std::pin::pin!(http2::serve(stream, &connection.listener, ending.clone(), begin, refuse));
        tokio::select! {
            _ = &mut serve => return,
            _ = self.shutdown.wait_for(|closing| *closing) => {}
            () = http2.is_to_move() => {}
            _ = ended.wait_for(|ended| *ended) => {}
            () = http2.streams.idle(self.connection.listener.terms.idle_timeout) => {}
        }
        // Sends GOAWAY. A shutdown waits until the client has received the end of the last response.
        http2.end();
        let inflight = self.front.desk.ending.inflight.enter();
        let mut told = std::pin::pin!(progress.ended(|| http2.streams.active() > 0));
        tokio::select! {
            _ = &mut serve => return,
            () = &mut told => return,
            () = self.front.desk.ending.cut.told() => {}
        }
        // The grace period has passed, except for the last bytes of exchanges, which are counted separately.
        drop(inflight);
        tokio::select! {
            _ = &mut serve => {}
            () = &mut told => {}
        }
    }

    fn record(&self, stream: &ClientStream, refusal: &'static Refusal, arrival: Arrival) {
        let whose = (&*self.connection.listener, self.connection.peer);
        stream.inbox(|inbox| self.front.desk.record(whose, inbox, refusal, &mut arrival.clock()));
    }
}

/// The complete response of a refusal to the received header, for a connection without a session.
fn answer_http1(refusal: &'static Refusal, header: &[u8]) -> Vec<u8> {
    let (kind, body) = refusal.body(head::wants_json(header));
    let length = body.len();
    // After a HEAD request, the client may take a body for its next response (RFC 9110 §9.3.2).
    let body = if head::request_line(header).0 == "HEAD" { "" } else { &body };
    let status = http::StatusCode::from_u16(refusal.status).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    let date = httpdate::fmt_http_date(SystemTime::now());
    let allow = refusal.allow().map(|methods| format!("Allow: {methods}\r\n")).unwrap_or_default();
    format!(
        "HTTP/1.1 {status}\r\nDate: {date}\r\nContent-Type: {kind}\r\n{allow}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

/// One HTTP/2 connection: each of its streams passes here on its way to the proxy.
struct Http2<P> {
    front: Arc<DownstreamApp<P>>,
    connection: Arc<Connection>,
    bypass: WeakBypass,
    streams: Streams,
    /// Signals that no further stream is accepted (GOAWAY), and that the connection closes once all have ended.
    last: watch::Sender<bool>,
}

/// The streams of one HTTP/2 connection.
struct Streams {
    begin: Instant,
    opened: AtomicU64,
    active: AtomicUsize,
    /// Time at which the last stream ended, in milliseconds after `begin`.
    quiet_since_ms: AtomicU64,
}

impl Default for Streams {
    fn default() -> Self {
        let (opened, active, quiet_since_ms) = (AtomicU64::new(0), AtomicUsize::new(0), AtomicU64::new(0));
        Streams { begin: Instant::now(), opened, active, quiet_since_ms }
    }
}

impl Streams {
    fn active(&self) -> usize {
        self.active.load(Ordering::Relaxed)
    }

    /// Waits until the connection has had no stream for `time`.
    async fn idle(&self, time: Duration) {
        let mut left = time;
        while !left.is_zero() {
            tokio::time::sleep(left).await;
            let quiet_since = self.begin + Duration::from_millis(self.quiet_since_ms.load(Ordering::Relaxed));
            left = if self.active() > 0 { time } else { time.saturating_sub(quiet_since.elapsed()) };
        }
    }
}

/// One HTTP/2 stream that has not ended.
struct ActiveStream<P> {
    http2: Arc<Http2<P>>,
    /// The number of the stream on its connection, from 1.
    number: u64,
}

impl<P> ActiveStream<P> {
    /// Counts a stream, unless the limit is reached.
    fn enter(http2: &Arc<Http2<P>>) -> Option<Self> {
        let (streams, most) = (&http2.streams, http2.connection.listener.http2.streams_max);
        let more = |active: usize| (active < most).then_some(active + 1);
        streams.active.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        let number = streams.opened.fetch_add(1, Ordering::Relaxed) + 1;
        Some(ActiveStream { http2: http2.clone(), number })
    }
}

impl<P> Drop for ActiveStream<P> {
    fn drop(&mut self) {
        let streams = &self.http2.streams;
        let now = u64::try_from(streams.begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        streams.quiet_since_ms.store(now, Ordering::Relaxed);
        streams.active.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<P> Http2<P> {
    fn end(&self) {
        // An error means that the connection has already ended.
        let _ = self.last.send(true);
    }

    /// Ends when the client must open another connection, because of a shutdown or because the listener was removed. An
    /// unused connection is told only after its first stream: told earlier, it would be useless.
    async fn is_to_move(&self) {
        let mut stopping = self.front.desk.ending.stopping.clone();
        tokio::select! {
            _ = stopping.wait_for(|stopping| *stopping) => {}
            () = self.connection.listener.left() => {}
        }
        if self.streams.opened.load(Ordering::Relaxed) == 0 {
            std::future::pending::<()>().await;
        }
    }
}

impl<P> ActiveStream<P>
where
    P: Driven + Send + Sync + 'static,
    P::CTX: Send + Sync + 'static,
{
    /// Runs the exchange of one stream.
    async fn exchange(self, stream: http2::Stream, ending: ShutdownWatch) {
        let http2 = &self.http2;
        let DownstreamApp { driver, desk } = &*http2.front;
        let listener = &http2.connection.listener;
        let _inflight = desk.ending.inflight.enter();
        listener.metrics.h2_requests.inc();
        if self.number == listener.terms.requests_max || desk.ending.is_near() || listener.is_leaving() {
            http2.end();
        }
        let now = Instant::now();
        let (connection, header_in) = (http2.connection.clone(), worker::cycle_if_wanted());
        let handshake = connection.handshake().map(|(_, took)| took).filter(|_| self.number == 1);
        let (accept, control) = (None, Some(stream.control()));
        let (header_since, header_done, bypass) = (now, now, None);
        let begin =
            ExchangeStart { connection, accept, handshake, header_since, header_in, header_done, control, bypass };
        let session = sessions::take(Box::new(stream));
        desk.run(Box::pin(driver.run(begin, session, &ending)), &http2.connection).await;
    }

    /// Runs the exchange of a connection that one stream carries.
    async fn carry(self, carried: http2::websocket::Carried, ending: ShutdownWatch) {
        let http2 = &self.http2;
        let listener = &http2.connection.listener;
        if self.number == listener.terms.requests_max || http2.front.desk.ending.is_near() || listener.is_leaving() {
            http2.end();
        }
        let connection = Connection::carried(&http2.connection);
        let http2::websocket::Carried { head, io } = carried;
        let carrier = Some(http2.bypass.clone());
        let stream = Box::new(ClientStream::carried(Box::new(io), head, connection.clone(), carrier));
        // Its response, or the bytes after a 101, are its last.
        let (front, served) = (http2.front.clone(), u64::MAX);
        let mut task = ConnectionTask { front, connection, state: None, shutdown: ending, served };
        task.carried(stream).await;
    }
}
