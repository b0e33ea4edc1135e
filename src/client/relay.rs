//! Passes bytes unchanged between a client and an endpoint: for a TCP listener, or for a TLS server name that is passed
//! through (`listeners[].tcp`, `listeners[].passthrough`).
//!
//! The endpoint is chosen as for a request: by policy and health, within its limits, with the same metrics. There is no
//! retry once a byte has passed. `Passage` transfers the bytes and owns a buffer only while one side does not accept
//! them.

use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Buf, BytesMut};
use http::{HeaderMap, Method, StatusCode, Uri, Version};
use pingora::connectors::L4Connect;
use pingora::protocols::l4::stream::Stream as Socket;
use pingora::upstreams::peer::Peer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::broken::{CloseCheck, Leaving};
use super::cut::Cut;
use super::tls::stream::Raw;
use crate::error::{Refusal, refusal};
use crate::expression::{Asked, Facts};
use crate::metrics::{ListenerMetrics, RelayMetrics};
use crate::net;
use crate::party::limits::DELAY_MAX;
use crate::party::standstill::Standstill;
use crate::party::wait::{self, ClientWatch, Wait};
use crate::upstream::transport::dial::EXHAUSTED;
use crate::upstream::transport::proxy_protocol::ClientAddresses;
use crate::upstream::window::Window;
use crate::upstream::{Choice, Ended, Endpoint, EndpointLease, Outcome, Upstream};

/// Read size in bytes; the buffer is on the stack.
const PIECE_BYTES: usize = 16 << 10;
/// Maximum number of endpoints tried for one connection.
const ATTEMPTS_MAX: usize = 3;

/// The destination of connections of one kind.
pub struct Relay {
    /// The upstream of the endpoints.
    pub upstream: Arc<Upstream>,
    /// Maximum time without bytes from either side.
    pub idle: Duration,
    /// Its metrics.
    pub metrics: RelayMetrics,
}

/// The connection that is passed through.
#[derive(Clone, Copy)]
pub struct Passing<'c> {
    /// The name of its listener.
    pub listener: &'c str,
    /// The metrics of its listener.
    pub metrics: &'c ListenerMetrics,
    /// The peer's address; `None` on a Unix socket.
    pub peer: Option<SocketAddr>,
    /// The local address; `None` on a Unix socket.
    pub local: Option<SocketAddr>,
}

/// The outcome of a connection that was passed through.
pub struct Passed {
    /// Bytes from the client.
    pub received: u64,
    /// Bytes to the client.
    pub sent: u64,
    /// The endpoint.
    pub endpoint: Option<Arc<str>>,
    /// Number of endpoints tried.
    pub attempts: u32,
    /// The reason of its end, unless both sides ended regularly.
    pub refusal: Option<&'static Refusal>,
    /// Time at which it began.
    pub began: Instant,
}

/// An endpoint and its connection. The upstream receives the outcome exactly once.
struct Attempt<'u> {
    upstream: &'u Upstream,
    lease: EndpointLease,
    chosen: Instant,
    connect: Option<Duration>,
    outcome: Outcome,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        let now = Instant::now();
        // Only the connect counts as the endpoint's time; the use of the connection does not.
        let own = self.connect.unwrap_or(now - self.chosen);
        let ended = Ended { outcome: self.outcome, connect: self.connect, wait: None, own };
        self.upstream.ended(&mut self.lease, &ended, now);
    }
}

/// Watches a client that is not being read, during the wait for an endpoint or for room at one.
struct Watched {
    socket: RawFd,
    leaving: Leaving,
    look: CloseCheck,
}

impl Watched {
    /// `named`: the client uses TLS and has sent its ClientHello.
    fn new(client: &Raw, named: bool) -> Self {
        let leaving = if named {
            // The client can no longer complete its handshake.
            Leaving::Ended
        } else if client.front().is_empty() {
            Leaving::Short(1)
        } else {
            // The client has sent bytes, which may be all that it sends.
            Leaving::Broken
        };
        Watched { socket: client.id(), leaving, look: CloseCheck::default() }
    }
}

impl ClientWatch for Watched {
    type Left = ();

    fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.look.poll(cx, self.socket, self.leaving).map(drop)
    }
}

impl Relay {
    /// Passes a connection through until it ends or its time is over. `named`: the client uses TLS and has requested a
    /// server name.
    pub async fn pass(&self, client: Raw, named: bool, passing: Passing<'_>, cut: &Cut) -> Passed {
        let _open = self.metrics.enter();
        let mut passed =
            Passed { received: 0, sent: 0, endpoint: None, attempts: 0, refusal: None, began: Instant::now() };
        let mut watched = Watched::new(&client, named);
        let connected = tokio::select! {
            connected = self.connect(passing, &mut watched, &mut passed) => connected,
            () = cut.told() => Err(&refusal::FINISH_SHUTDOWN),
        };
        let (mut attempt, endpoint) = match connected {
            Ok(connected) => connected,
            Err(refusal) => {
                passing.metrics.refusals.count(refusal);
                passed.refusal = Some(refusal);
                return passed;
            }
        };
        let (socket, far) = (client.id(), endpoint.as_raw_fd());
        let mut passage = Passage::new(client, endpoint, self.idle);
        passage.watch(socket, far);
        let ended = tokio::select! {
            ended = poll_fn(|cx| passage.poll(cx)) => ended,
            () = cut.told() => Err(&refusal::FINISH_SHUTDOWN),
        };
        (passed.received, passed.sent) = (passage.up.bytes, passage.down.bytes);
        self.metrics.count(passed.received, passed.sent);
        attempt.outcome = match ended {
            Ok(()) => Outcome::Answered(StatusCode::OK),
            Err(refusal) => {
                passing.metrics.refusals.count(refusal);
                passed.refusal = Some(refusal);
                // An endpoint that sent nothing counts as failed, unless its client kept it waiting.
                let prompt = passed.began.elapsed() <= DELAY_MAX;
                let silent = prompt && passed.sent == 0 && refusal == &refusal::RECEIVE_RESET;
                if silent { Outcome::Failed(refusal) } else { Outcome::Cancelled }
            }
        };
        passed
    }

    /// Connects to the chosen endpoint, or to another one if that fails.
    async fn connect(
        &self,
        passing: Passing<'_>,
        watched: &mut Watched,
        passed: &mut Passed,
    ) -> Result<(Attempt<'_>, Socket), &'static Refusal> {
        let upstream = &*self.upstream;
        let client = passing.peer.map(|peer| peer.ip());
        let (target, headers) = (Uri::default(), HeaderMap::new());
        let asked = Asked {
            facts: Facts { client, listener: passing.listener, ..Facts::of("", "") },
            method: &Method::CONNECT,
            target: &target,
            version: Version::HTTP_11,
            headers: &headers,
            response: None,
        };
        let hash = upstream.hash(&asked);
        let addresses = passing.peer.zip(passing.local).map(|(client, gateway)| ClientAddresses { client, gateway });
        let mut tried: Vec<Arc<Endpoint>> = Vec::new();
        let mut last = &refusal::SELECT_NO_ENDPOINT;
        while tried.len() < ATTEMPTS_MAX {
            let lease = match self.choose(hash, &tried, watched).await? {
                Some(lease) => lease,
                None => break,
            };
            passed.attempts += 1;
            let endpoint = lease.endpoint().clone();
            passed.endpoint = Some(endpoint.label.clone());
            tried.push(endpoint.clone());
            let chosen = Instant::now();
            let mut attempt = Attempt { upstream, lease, chosen, connect: None, outcome: Outcome::Cancelled };
            let wait = Wait::at_most(upstream.timeouts.connect, &mut *watched);
            match wait.on(dial(&endpoint, addresses)).await {
                wait::Ended::Done(Ok(socket)) => {
                    upstream.metrics.connects_new.inc();
                    attempt.connect = Some(chosen.elapsed());
                    return Ok((attempt, socket));
                }
                wait::Ended::Done(Err(refusal)) => last = refusal,
                wait::Ended::Late => last = &refusal::CONNECT_TIMEOUT,
                wait::Ended::Left(()) => return Err(&refusal::SEND_ABORTED),
            }
            upstream.metrics.connects_failed.inc();
            // A shortage of the gateway is not the endpoint's fault.
            if last != &refusal::CONNECT_EXHAUSTED {
                attempt.outcome = Outcome::Connect(last);
            }
        }
        Err(last)
    }

    /// Chooses an endpoint; waits for one with room if needed. `None`: no untried endpoint exists.
    async fn choose(
        &self,
        hash: u64,
        tried: &[Arc<Endpoint>],
        watched: &mut Watched,
    ) -> Result<Option<EndpointLease>, &'static Refusal> {
        let upstream = &*self.upstream;
        let reject = |refusal: &'static Refusal| {
            upstream.metrics.limits.reject(refusal);
            refusal
        };
        match upstream.select(hash, tried, Instant::now()) {
            Choice::Leased(lease) => return Ok(Some(lease)),
            Choice::NoEndpoint => return Ok(None),
            Choice::Away(_) => return Err(reject(&refusal::SELECT_BREAKER_OPEN)),
            Choice::Full => {}
        }
        let Some(mut place) = upstream.queue(tried, Instant::now()) else { return Err(reject(&refusal::QUEUE_FULL)) };
        let mut wait = Wait::at_most(upstream.admission.queue().timeout, watched);
        loop {
            match wait.until(|cx| place.poll_turn(cx)).await {
                wait::Ended::Done(()) => {}
                wait::Ended::Left(()) => return Err(&refusal::QUEUE_ABORTED),
                wait::Ended::Late => return Err(reject(&refusal::QUEUE_TIMEOUT)),
            }
            match upstream.select_in_turn(None, hash, tried, Instant::now()) {
                Choice::Leased(lease) => {
                    place.served();
                    return Ok(Some(lease));
                }
                Choice::Full => {
                    place.missed();
                    tokio::task::yield_now().await;
                }
                Choice::NoEndpoint => return Ok(None),
                Choice::Away(_) => return Err(reject(&refusal::SELECT_BREAKER_OPEN)),
            }
        }
    }
}

/// Connects to an endpoint. Names the client's connection if the upstream requires it.
async fn dial(endpoint: &Endpoint, addresses: Option<ClientAddresses>) -> Result<Socket, &'static Refusal> {
    let peer = endpoint.peer_for(|| addresses);
    let connect: &Arc<dyn L4Connect + Send + Sync> = peer.options.custom_l4.as_ref().ok_or(&refusal::CONNECT_FAILED)?;
    let socket = connect.connect(peer.address()).await.map_err(|error| match error.etype() {
        pingora::ErrorType::ConnectRefused => &refusal::CONNECT_REFUSED,
        pingora::ErrorType::ConnectTimedout => &refusal::CONNECT_TIMEOUT,
        kind if *kind == EXHAUSTED => &refusal::CONNECT_EXHAUSTED,
        _ => &refusal::CONNECT_FAILED,
    })?;
    // Nothing is buffered here, so the receive window need not be limited.
    Window::new(socket.as_raw_fd()).open();
    Ok(socket)
}

/// One direction.
#[derive(Default)]
struct Flow {
    /// Bytes read and not yet accepted by the other side.
    held: BytesMut,
    /// Number of bytes accepted by the other side.
    bytes: u64,
    /// This side has ended.
    ended: bool,
    /// The end was passed on to the other side.
    closed: bool,
}

/// The side that failed.
enum Fault {
    Read,
    Write,
}

impl Flow {
    /// Transfers available bytes. Ready when this side has ended and the other has accepted everything.
    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &mut W,
        moved: &mut bool,
    ) -> Poll<Result<(), Fault>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        loop {
            while !self.held.is_empty() {
                let taken = ready!(Pin::new(&mut *to).poll_write(cx, &self.held)).map_err(|_| Fault::Write)?;
                if taken == 0 {
                    return Poll::Ready(Err(Fault::Write));
                }
                self.took(taken, moved);
                self.held.advance(taken);
            }
            if self.held.capacity() > 0 {
                self.held = BytesMut::new();
            }
            if self.ended {
                if !self.closed {
                    // A side that has already closed needs no end.
                    let _: Result<(), io::Error> = ready!(Pin::new(&mut *to).poll_shutdown(cx));
                    self.closed = true;
                }
                return Poll::Ready(Ok(()));
            }
            let mut space = [MaybeUninit::<u8>::uninit(); PIECE_BYTES];
            let mut piece = ReadBuf::uninit(&mut space);
            if let Poll::Ready(Err(_)) = Pin::new(&mut *to).poll_flush(cx) {
                return Poll::Ready(Err(Fault::Write));
            }
            ready!(Pin::new(&mut *from).poll_read(cx, &mut piece)).map_err(|_| Fault::Read)?;
            let mut rest = piece.filled();
            if rest.is_empty() {
                self.ended = true;
                continue;
            }
            *moved = true;
            // Usually the other side accepts everything at once, and no bytes are kept.
            while !rest.is_empty() {
                match Pin::new(&mut *to).poll_write(cx, rest) {
                    Poll::Ready(Ok(taken)) if taken > 0 => {
                        self.took(taken, moved);
                        rest = &rest[taken..];
                    }
                    Poll::Ready(_) => return Poll::Ready(Err(Fault::Write)),
                    Poll::Pending => {
                        self.held.extend_from_slice(rest);
                        return Poll::Pending;
                    }
                }
            }
        }
    }

    fn took(&mut self, bytes: usize, moved: &mut bool) {
        self.bytes += bytes as u64;
        *moved = true;
    }
}

/// A client and an endpoint, and the bytes between them.
struct Passage<C, E> {
    client: C,
    endpoint: E,
    up: Flow,
    down: Flow,
    idle: Duration,
    /// The wait since a byte last passed.
    still: Standstill,
    /// The client's socket, and the check that detects a broken connection while it is not read.
    socket: Option<RawFd>,
    /// The endpoint's socket.
    far: Option<RawFd>,
    look: CloseCheck,
}

impl<C, E> Passage<C, E>
where
    C: AsyncRead + AsyncWrite + Unpin,
    E: AsyncRead + AsyncWrite + Unpin,
{
    fn new(client: C, endpoint: E, idle: Duration) -> Self {
        let (still, socket, far, look) = (Standstill::begin(None), None, None, CloseCheck::default());
        Passage { client, endpoint, up: Flow::default(), down: Flow::default(), idle, still, socket, far, look }
    }

    /// Watches the client's socket while the endpoint accepts no bytes, or the client has ended its side. Bytes that
    /// are read from either socket pass.
    fn watch(&mut self, socket: RawFd, far: RawFd) {
        (self.socket, self.far) = (Some(socket), Some(far));
    }

    /// Ready once the client's connection is broken while it is not read.
    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let is_read = self.up.held.is_empty() && !self.up.ended;
        let Some(socket) = self.socket.filter(|_| !is_read) else { return Poll::Pending };
        // After the end was passed on, both directions may have ended regularly.
        let leaving = if self.down.closed { Leaving::Reset } else { Leaving::Broken };
        self.look.poll(cx, socket, leaving).map(drop)
    }

    /// Ready when both sides have ended, one has failed, or neither has sent a byte for too long.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), &'static Refusal>> {
        let mut moved = false;
        let up = self.up.poll(cx, &mut self.client, &mut self.endpoint, &mut moved);
        let down = self.down.poll(cx, &mut self.endpoint, &mut self.client, &mut moved);
        match (up, down) {
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => return Poll::Ready(Ok(())),
            (Poll::Ready(Err(Fault::Read)), _) | (_, Poll::Ready(Err(Fault::Write))) => {
                return Poll::Ready(Err(&refusal::RECEIVE_ABORTED));
            }
            (_, Poll::Ready(Err(Fault::Read))) | (Poll::Ready(Err(Fault::Write)), _) => {
                return Poll::Ready(Err(&refusal::RECEIVE_RESET));
            }
            _ => {}
        }
        if self.poll_broken(cx).is_ready() {
            return Poll::Ready(Err(&refusal::RECEIVE_ABORTED));
        }
        if moved {
            self.still.restart();
        }
        let sockets = [self.socket, self.far];
        // Meanwhile nothing is written to either, so a change is progress.
        let look = || {
            let bytes: u64 = sockets.iter().flatten().map(|&socket| net::unacknowledged(socket) as u64).sum();
            (bytes > 0).then_some(bytes)
        };
        self.still.poll(cx, self.idle, look).map(|()| Err(&refusal::RECEIVE_TIMEOUT))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    type Sides = (DuplexStream, DuplexStream, tokio::task::JoinHandle<(Result<(), &'static Refusal>, u64, u64)>);

    fn passing(room: usize, idle: Duration) -> Sides {
        let ((client, ours), (theirs, endpoint)) = (duplex(room), duplex(room));
        let task = tokio::spawn(async move {
            let mut passage = Passage::new(ours, theirs, idle);
            let ended = poll_fn(|cx| passage.poll(cx)).await;
            (ended, passage.up.bytes, passage.down.bytes)
        });
        (client, endpoint, task)
    }

    #[tokio::test]
    async fn bytes_pass_both_ways_and_each_side_ends_for_itself() {
        let (mut client, mut endpoint, task) = passing(64, Duration::from_secs(10));
        let sent: Vec<u8> = (0..100_000).map(|n| n as u8).collect();
        let upload = sent.clone();
        let sender = tokio::spawn(async move {
            client.write_all(&upload).await.expect("room");
            client.shutdown().await.expect("an end");
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.expect("an answer");
            answer
        });
        let mut got = Vec::new();
        endpoint.read_to_end(&mut got).await.expect("all of it");
        assert_eq!(got, sent);
        endpoint.write_all(b"after the end of the other side").await.expect("room");
        endpoint.shutdown().await.expect("an end");
        assert_eq!(sender.await.expect("the client"), b"after the end of the other side");
        assert_eq!(task.await.expect("no panic"), (Ok(()), 100_000, 31));
    }

    #[tokio::test(start_paused = true)]
    async fn silence_on_both_sides_ends_it_and_bytes_on_either_do_not() {
        let idle = Duration::from_secs(10);
        let (mut client, mut endpoint, task) = passing(64, idle);
        let mut byte = [0];
        for _ in 0..4 {
            tokio::time::sleep(idle * 2 / 3).await;
            client.write_all(b"x").await.expect("room");
            endpoint.read_exact(&mut byte).await.expect("a byte");
        }
        let began = tokio::time::Instant::now();
        let (ended, up, _) = task.await.expect("no panic");
        assert_eq!((ended, up), (Err(&refusal::RECEIVE_TIMEOUT), 4));
        assert!(began.elapsed() >= idle);
    }
}
