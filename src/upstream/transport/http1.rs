//! HTTP/1 connections to endpoints, with support for trailers.
//!
//! Pingora handles HTTP/1, but discards response trailers and sends no request trailers. So it gets a [`Followed`]
//! stream, which sees the same bytes: it collects response trailers, inserts request trailers into the last chunk,
//! and ends a response with malformed chunks. It also has the time limits of the connection, since Pingora's run while
//! the gateway itself does not. Exchange and stream share a [`Tail`].

use std::io::{self, IoSlice};
use std::os::fd::RawFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Buf, Bytes};
use http::HeaderMap;
use pingora::Result;
use pingora::http::ResponseHeader;
use pingora::protocols::raw_connect::ProxyDigest;
use pingora::protocols::tls::{SslDigest, TlsRef};
use pingora::protocols::{
    Digest, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, Stream, TimingDigest,
    UniqueID, UniqueIDType,
};
use pingora::upstreams::peer::ALPN;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::tunnel::{Direction, Tunnel};
use crate::framing::follow;
use crate::net;
use crate::party::standstill::Standstill;

/// Shared by an exchange and its connection to an endpoint: the state of the message ends.
#[derive(Debug, Default)]
pub struct Tail {
    // Only the exchange's task uses it, so the lock is never contended.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    answer: follow::ResponseFollower,
    request: follow::Request,
    /// The last chunk of the request, with trailers.
    last_chunk: Option<Bytes>,
    /// Client and endpoint have switched to another protocol.
    tunnel: Option<Arc<Tunnel>>,
    limits: Limits,
    failure: Option<Failure>,
}

/// The time limits of a connection. `None`: it has no such limit.
#[derive(Clone, Copy, Debug, Default)]
struct Limits {
    /// For an endpoint that accepts no bytes.
    send: Option<Duration>,
    /// For a tunnel without bytes in either direction.
    idle: Option<Duration>,
}

/// Why a connection failed. Pingora's error does not name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The response has malformed chunks.
    Malformed,
    /// The endpoint accepted no bytes for too long.
    Untaken,
    /// After a switch to another protocol, no byte passed in either direction for too long.
    Idle,
}

impl Tail {
    /// The `Tail` of the connection with this digest, if its messages are observed.
    pub fn of(digest: Option<&Digest>) -> Option<Arc<Tail>> {
        digest?.proxy_digest.as_ref()?.user_data.as_ref()?.downcast_ref::<Arc<Tail>>().cloned()
    }

    /// A request begins. `head_only`: its method is HEAD; `in_chunks`: its body is chunked.
    pub fn begin(&self, head_only: bool, in_chunks: bool) {
        let state = &mut *self.state();
        state.answer.begin(head_only);
        state.request.begin(in_chunks);
        (state.last_chunk, state.failure) = (None, None);
    }

    /// Ends a chunked request with this last chunk, which contains trailers. It must not have been sent yet.
    pub fn end_with(&self, last_chunk: Bytes) {
        self.state().last_chunk = Some(last_chunk);
    }

    /// Whether the response is chunked and may have trailers.
    pub fn is_chunked(&self) -> bool {
        self.state().answer.is_chunked()
    }

    /// Takes the trailers of a complete response.
    pub fn take_trailers(&self) -> Option<HeaderMap> {
        self.state().answer.take_trailers()
    }

    /// Why the connection failed, if this is known here.
    pub fn failure(&self) -> Option<Failure> {
        self.state().failure
    }

    /// Sets the maximum time in which the endpoint accepts no bytes.
    pub fn limit_sending(&self, send: Duration) {
        self.state().limits.send = Some(send);
    }

    /// Client and endpoint have switched protocols: each direction now ends separately. `idle` is the maximum time
    /// without bytes in either direction.
    pub fn switch(&self, tunnel: Arc<Tunnel>, idle: Option<Duration>) {
        let state = &mut *self.state();
        tunnel.has_read(Direction::Down, state.answer.tunneled());
        state.tunnel = Some(tunnel);
        state.limits.idle = idle;
    }

    fn tunnel(&self) -> Option<Arc<Tunnel>> {
        self.state().tunnel.clone()
    }

    fn limits(&self) -> Limits {
        self.state().limits
    }

    /// Records why the connection failed. Only the first failure counts.
    fn fail(&self, failure: Failure) {
        self.state().failure.get_or_insert(failure);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Processes received bytes. An error means that the response does not match its header.
    fn received(&self, bytes: &[u8]) -> io::Result<()> {
        let state = &mut *self.state();
        state.answer.take(bytes).map_err(|_| {
            state.failure.get_or_insert(Failure::Malformed);
            io::Error::new(io::ErrorKind::InvalidData, "malformed chunked body")
        })?;
        if let Some(tunnel) = &state.tunnel {
            tunnel.has_read(Direction::Down, state.answer.tunneled());
        }
        Ok(())
    }

    /// Processes sent bytes.
    fn sent(&self, bytes: &[u8]) {
        let state = &mut *self.state();
        match &state.tunnel {
            Some(tunnel) => tunnel.wrote_up(bytes.len()),
            None => state.request.take(bytes),
        }
    }

    /// Returns the bytes to send instead, if these are the last chunk and trailers belong to it.
    fn instead_of(&self, next: &[u8]) -> Option<Bytes> {
        let state = &mut *self.state();
        let chunk = state.last_chunk.take_if(|_| state.request.ends_with(next));
        if chunk.is_some() {
            state.request.ended();
        }
        chunk
    }
}

/// An observed connection to an endpoint; see the module.
pub struct Followed {
    io: Stream,
    tail: Arc<Tail>,
    /// Carries `tail` to the exchange.
    digest: Arc<ProxyDigest>,
    /// The last chunk that replaces Pingora's while it is being sent.
    leaving: Option<Bytes>,
    /// The wait for an endpoint that accepts no bytes.
    untaken: Option<Standstill>,
    /// The wait for bytes in a tunnel.
    silent: Option<Standstill>,
}

/// Whether a wait without progress, which begins now if there is none, has reached its limit. An endpoint that reads
/// bytes from the `socket` makes progress.
fn is_over(cx: &mut Context<'_>, still: &mut Option<Standstill>, limit: Option<Duration>, socket: RawFd) -> bool {
    let Some(limit) = limit else { return false };
    let look = || Some(net::unacknowledged(socket) as u64);
    still.get_or_insert_with(|| Standstill::begin(look())).poll(cx, limit, look).is_ready()
}

impl Followed {
    /// Observes the messages on this connection.
    ///
    /// # Errors
    ///
    /// Creating the placeholder response header failed, which cannot happen.
    pub fn new(io: Stream) -> Result<Followed> {
        let tail = Arc::<Tail>::default();
        // The type is meant for the response of a CONNECT proxy; none is involved here.
        let answer = Box::new(ResponseHeader::build(200, Some(0))?);
        let digest = Arc::new(ProxyDigest::new(answer, Some(Box::new(tail.clone()))));
        Ok(Followed { io, tail, digest, leaving: None, untaken: None, silent: None })
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let tunnel = self.tail.tunnel();
        if let Some(tunnel) = &tunnel {
            // If the endpoint does not accept the shutdown, it has gone, and reading will report that.
            if tunnel.is_to_tell(Direction::Up) && Pin::new(&mut self.io).poll_shutdown(cx).is_ready() {
                tunnel.told(Direction::Up);
                // The client side may be waiting for this.
                cx.waker().wake_by_ref();
            }
            if tunnel.has_ended(Direction::Down) {
                return if tunnel.is_over() { Poll::Ready(Ok(())) } else { Poll::Pending };
            }
        }
        let before = out.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, out))?;
        let received = self.tail.received(&out.filled()[before..]);
        if received.is_err() {
            out.set_filled(before);
        }
        match tunnel {
            Some(tunnel) if out.filled().len() == before && out.remaining() > 0 => {
                tunnel.end(Direction::Down);
                // The client side forwards the end; this side is polled again when both have ended.
                cx.waker().wake_by_ref();
                if tunnel.is_over() { Poll::Ready(Ok(())) } else { Poll::Pending }
            }
            _ => Poll::Ready(received),
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let Followed { io, tail, leaving, .. } = self;
        if leaving.is_none() {
            *leaving = tail.instead_of(bytes);
        }
        if let Some(chunk) = leaving {
            while !chunk.is_empty() {
                match ready!(Pin::new(&mut *io).poll_write(cx, chunk))? {
                    0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    sent => chunk.advance(sent),
                }
            }
            *leaving = None;
            return Poll::Ready(Ok(bytes.len()));
        }
        let sent = ready!(Pin::new(io).poll_write(cx, bytes))?;
        tail.sent(&bytes[..sent]);
        Poll::Ready(Ok(sent))
    }

    fn poll_send_vectored(&mut self, cx: &mut Context<'_>, bytes: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        // A last chunk is written separately.
        let Followed { io, tail, .. } = self;
        let sent = ready!(Pin::new(io).poll_write_vectored(cx, bytes))?;
        let mut left = sent;
        for slice in bytes {
            let some = left.min(slice.len());
            tail.sent(&slice[..some]);
            left -= some;
        }
        Poll::Ready(Ok(sent))
    }

    /// Checks the outcome of a write: it fails if the endpoint accepts no bytes for too long.
    fn poll_taken(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            // Bytes in either direction end the silence of a tunnel.
            (self.untaken, self.silent) = (None, None);
            return written;
        }
        let Followed { io, tail, untaken, .. } = self;
        if !is_over(cx, untaken, tail.limits().send, io.id()) {
            return Poll::Pending;
        }
        self.tail.fail(Failure::Untaken);
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the endpoint accepts no bytes")))
    }
}

impl AsyncRead for Followed {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = self.poll_receive(cx, out);
        if read.is_ready() {
            self.silent = None;
            return read;
        }
        let Followed { io, tail, silent, .. } = &mut *self;
        if !is_over(cx, silent, tail.limits().idle, io.id()) {
            return Poll::Pending;
        }
        self.tail.fail(Failure::Idle);
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "no bytes pass in either direction")))
    }
}

impl AsyncWrite for Followed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = self.poll_send(cx, bytes);
        self.poll_taken(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = self.poll_send_vectored(cx, bytes);
        self.poll_taken(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[async_trait]
impl Shutdown for Followed {
    async fn shutdown(&mut self) {
        self.io.shutdown().await;
    }
}

#[async_trait]
impl Peek for Followed {
    async fn try_peek(&mut self, seen: &mut [u8]) -> io::Result<bool> {
        self.io.try_peek(seen).await
    }
}

impl UniqueID for Followed {
    fn id(&self) -> UniqueIDType {
        self.io.id()
    }
}

impl Ssl for Followed {
    fn get_ssl(&self) -> Option<&TlsRef> {
        self.io.get_ssl()
    }

    fn get_ssl_digest(&self) -> Option<Arc<SslDigest>> {
        self.io.get_ssl_digest()
    }

    fn selected_alpn_proto(&self) -> Option<ALPN> {
        self.io.selected_alpn_proto()
    }
}

impl GetTimingDigest for Followed {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        self.io.get_timing_digest()
    }

    fn get_read_pending_time(&self) -> Duration {
        self.io.get_read_pending_time()
    }

    fn get_write_pending_time(&self) -> Duration {
        self.io.get_write_pending_time()
    }
}

impl GetProxyDigest for Followed {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        Some(self.digest.clone())
    }
}

impl GetSocketDigest for Followed {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.io.get_socket_digest()
    }
}

impl std::fmt::Debug for Followed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Followed").field("io", &self.io).finish_non_exhaustive()
    }
}
