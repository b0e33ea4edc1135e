//! HTTP/1 connections to endpoints, with support for trailers.
//!
//! Pingora handles HTTP/1, but discards response trailers and sends no request trailers. So it gets a [`Followed`]
//! stream, which sees the same bytes: it collects response trailers, inserts request trailers into the last chunk,
//! and ends a response with malformed chunks. Exchange and stream share a [`Tail`].

use std::io::{self, IoSlice};
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

use super::tunnel::{Tunnel, Way};
use crate::framing::follow;

/// Shared by an exchange and its connection to an endpoint: the state of the message ends.
#[derive(Debug, Default)]
pub struct Tail {
    // Only the exchange's task uses it, so the lock is never contended.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    answer: follow::Answer,
    request: follow::Request,
    /// The last chunk of the request, with trailers.
    last_chunk: Option<Bytes>,
    /// The response has malformed chunks.
    malformed: bool,
    /// Client and endpoint have switched to another protocol.
    tunnel: Option<Arc<Tunnel>>,
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
        (state.last_chunk, state.malformed) = (None, false);
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

    /// Whether the response has malformed chunks.
    pub fn is_malformed(&self) -> bool {
        self.state().malformed
    }

    /// Client and endpoint have switched protocols: each direction now ends separately.
    pub fn switch(&self, tunnel: Arc<Tunnel>) {
        let state = &mut *self.state();
        tunnel.has_read(Way::Down, state.answer.tunneled());
        state.tunnel = Some(tunnel);
    }

    fn tunnel(&self) -> Option<Arc<Tunnel>> {
        self.state().tunnel.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Processes received bytes. An error means that the response does not match its header.
    fn received(&self, bytes: &[u8]) -> io::Result<()> {
        let state = &mut *self.state();
        state.answer.take(bytes).map_err(|_| {
            state.malformed = true;
            io::Error::new(io::ErrorKind::InvalidData, "malformed chunked body")
        })?;
        if let Some(tunnel) = &state.tunnel {
            tunnel.has_read(Way::Down, state.answer.tunneled());
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
        Ok(Followed { io, tail, digest, leaving: None })
    }
}

impl AsyncRead for Followed {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let tunnel = self.tail.tunnel();
        if let Some(tunnel) = &tunnel {
            // If the endpoint does not accept the shutdown, it has gone, and reading will report that.
            if tunnel.is_to_tell(Way::Up) && Pin::new(&mut self.io).poll_shutdown(cx).is_ready() {
                tunnel.told(Way::Up);
                // The client side may be waiting for this.
                cx.waker().wake_by_ref();
            }
            if tunnel.has_ended(Way::Down) {
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
                tunnel.end(Way::Down);
                // The client side forwards the end; this side is polled again when both have ended.
                cx.waker().wake_by_ref();
                if tunnel.is_over() { Poll::Ready(Ok(())) } else { Poll::Pending }
            }
            _ => Poll::Ready(received),
        }
    }
}

impl AsyncWrite for Followed {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let Followed { io, tail, leaving, .. } = self.get_mut();
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

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // A last chunk is written separately.
        let Followed { io, tail, .. } = self.get_mut();
        let sent = ready!(Pin::new(io).poll_write_vectored(cx, bytes))?;
        let mut left = sent;
        for slice in bytes {
            let some = left.min(slice.len());
            tail.sent(&slice[..some]);
            left -= some;
        }
        Poll::Ready(Ok(sent))
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
