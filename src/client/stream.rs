//! A client's connection as a stream of bytes. It holds no buffer between requests. It reads and checks each request
//! header, and then gives Pingora exactly the bytes of this request, never a byte of the next.
//!
//! Below is Pingora's socket, unbuffered; above is a `ServerSession`, which lives for one exchange. Bodies can bypass
//! the session ([`Bypass`]). Pingora's session would allocate 64 KiB for each slow request body, copy every byte once
//! more, and write each piece of a response separately.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};

use async_trait::async_trait;
use bytes::{Buf, Bytes, BytesMut};
use http::HeaderMap;
use pingora::protocols::raw_connect::ProxyDigest;
use pingora::protocols::{
    GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, Stream, TimingDigest,
    UniqueID, UniqueIDType,
};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};

use super::broken::{CloseCheck, Leaving, unread_before_end};
use super::connection::Connection;
use super::farewell::Farewell;
use super::head::{self, Scanner};
use crate::error::{Refusal, refusal};
use crate::framing::Body;
use crate::framing::chunked::Chunks;
use crate::net;
use crate::party::What;
use crate::party::standstill::Standstill;
use crate::phase::Phase;
use crate::upstream::transport::tunnel::Direction;

/// The first bytes of an HTTP/2 connection (RFC 9113 §3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The part of the preface that resembles the first line of an HTTP/1 request.
const FIRST_LINE: &[u8] = b"PRI * HTTP/2.0\r\n";

/// Read size while no session exists, in bytes. The buffer is on the stack, so that an idle connection owns none.
const IDLE_READ_BYTES: usize = 4096;

/// Initial read size for a body, in bytes. The session's buffer has 64 KiB, but untouched pages of it use no memory. A
/// slow upload arrives in small pieces anyway.
const FIRST_READ_BYTES: usize = 4096;

/// Minimum and maximum read size for a held body, in bytes. The buffer is freed if the read returns nothing.
const READ_BYTES_LEAST: usize = 16 << 10;
const READ_BYTES_MAX: usize = 128 << 10;

/// Small writes are gathered up to this size in bytes, so that header and body share one system call.
const OUTBOX_BYTES: usize = 4096;

/// Maximum number of pieces per system call.
const SLICES_MAX: usize = 16;

/// Maximum number of bytes discarded from a client whose header was refused or that was cut off. A refused body has no
/// such limit: an honest client may be in the middle of sending it, and the time is limited.
const LINGER_HEADER_BYTES: u64 = 1 << 20;

/// Maximum number of bytes that TLS holds in addition to the socket: an incomplete record, a decrypted record that was
/// not read, and the bytes read together with a record's header.
const TLS_KEPT_BYTES_MAX: u64 = 40 << 10;

/// Maximum number of unread bytes of a chunked body that are examined for its end.
const PEEK_BYTES_MAX: usize = 256 << 10;

/// The first thing that a client sent.
#[expect(clippy::large_enum_variant, reason = "there is one at a time, and nearly all are requests")]
pub enum Opening {
    /// A checked HTTP/1 request. The stream returns its body next.
    Http1(head::Request),
    /// HTTP/2; the preface is still unread.
    Http2,
    /// The client closed the connection.
    Closed,
}

/// The connection of one client; see the module.
pub struct ClientStream {
    core: Arc<Mutex<Core>>,
}

/// Access to the bodies of the current request and response, past the session that owns the stream.
pub struct Bypass {
    core: Arc<Mutex<Core>>,
}

/// A weak reference to a [`Bypass`].
#[derive(Clone)]
pub struct WeakBypass(Weak<Mutex<Core>>);

impl WeakBypass {
    /// `None` once the connection is over.
    pub fn bypass(&self) -> Option<Bypass> {
        self.0.upgrade().map(|core| Bypass { core })
    }
}

/// Observes the bytes that the client has not accepted yet; see [`ClientStream::progress`].
pub struct Progress {
    core: Arc<Mutex<Core>>,
}

impl Progress {
    /// Cuts the client off: only a few of the bytes that it still sends are read.
    pub fn condemn(&self) {
        lock(&self.core).waste_left = LINGER_HEADER_BYTES;
    }

    /// Waits while `busy` returns true and the client accepts the bytes sent; see [`Farewell`].
    pub async fn ended(&self, busy: impl Fn() -> bool) {
        let mut farewell = None;
        std::future::poll_fn(|cx| {
            let core = lock(&self.core);
            let farewell = farewell.get_or_insert_with(|| Farewell::begin(core.unsent()));
            farewell.poll(cx, core.connection.write_idle(), || (core.unsent(), busy()))
        })
        .await
    }
}

/// The state that session and bypass share. One task uses them, so the lock never blocks.
struct Core {
    io: Stream,
    connection: Arc<Connection>,
    /// Received bytes that were not passed on yet; at most one read and one header.
    inbox: BytesMut,
    /// Bytes that the session wrote and that were not sent yet.
    outbox: BytesMut,
    /// The session has written the header of the final response.
    answered: bool,
    rest: Rest,
    /// Maximum read size for a body; it grows after each full read.
    read_size: usize,
    /// The wait for a client that accepts no bytes.
    stalled: Option<Standstill>,
    /// Timer that runs from the end of writing to the close.
    farewell: Option<Farewell>,
    /// Number of bytes that may still be discarded.
    waste_left: u64,
    /// The client has closed its sending side.
    half_closed: bool,
    /// Detects a reset where no read does.
    look: CloseCheck,
    /// The client closed its sending side after a complete chunked body, part of which is unread.
    ends_whole: bool,
    /// The header of the current request permits another request.
    goes_on: bool,
    /// Whether the connection is kept after the current exchange. `None` until the response was sent.
    outcome: Option<bool>,
    delivery: Delivery,
}

/// How the progress of a client is seen that accepts no bytes.
struct Delivery {
    /// The HTTP/2 connection whose stream carries this connection.
    carrier: Option<WeakBypass>,
    /// Bytes that the socket had accepted at the last wait for the client.
    taken: u64,
}

/// What the session may still read.
enum Rest {
    Length(u64),
    Chunked(Chunks),
    /// Another protocol after a 101.
    Raw,
    Http2,
}

impl ClientStream {
    /// Takes over an accepted socket.
    pub fn new(io: Stream, connection: Arc<Connection>) -> Self {
        ClientStream::begun(io, BytesMut::new(), connection)
    }

    /// Takes over a socket from which these bytes were already read.
    pub fn begun(io: Stream, inbox: BytesMut, connection: Arc<Connection>) -> Self {
        ClientStream::carried(io, inbox, connection, None)
    }

    /// As [`ClientStream::begun`], for a stream of an HTTP/2 connection, the `carrier`.
    pub fn carried(io: Stream, inbox: BytesMut, connection: Arc<Connection>, carrier: Option<WeakBypass>) -> Self {
        connection.goes_over(io.id());
        let outbox = BytesMut::new();
        let core = Core {
            io,
            connection,
            inbox,
            outbox,
            answered: false,
            rest: Rest::Length(0),
            read_size: usize::MAX,
            stalled: None,
            farewell: None,
            waste_left: u64::MAX,
            half_closed: false,
            look: CloseCheck::default(),
            ends_whole: false,
            goes_on: true,
            outcome: None,
            delivery: Delivery { carrier, taken: 0 },
        };
        ClientStream { core: Arc::new(Mutex::new(core)) }
    }

    /// A weak reference to the path past the session.
    pub(super) fn weak_bypass(&self) -> WeakBypass {
        WeakBypass(Arc::downgrade(&self.core))
    }

    /// Calls `look` with the received bytes that were not passed on; a refusal finds the request line there.
    pub fn inbox<T>(&self, look: impl FnOnce(&[u8]) -> T) -> T {
        look(&self.core().inbox)
    }

    /// Waits for the first bytes of a request without holding a buffer. `false`: the client closed the connection.
    pub async fn park(&mut self) -> bool {
        {
            let mut core = self.core();
            if !core.body_is_read() {
                // Unread bytes of a body would be taken for the next request.
                debug_assert!(false, "a body was left unread");
                return false;
            }
            if !core.is_quiet() {
                return true;
            }
            if core.inbox.is_empty() {
                core.inbox = BytesMut::new();
            }
            core.outbox = BytesMut::new();
            core.look = CloseCheck::default();
        }
        std::future::poll_fn(|cx| self.core().poll_begin(cx)).await
    }

    /// Reads a complete request header and checks it.
    pub async fn open(&mut self) -> Result<Opening, &'static Refusal> {
        let mut scanner = Scanner::default();
        std::future::poll_fn(|cx| self.core().poll_open(cx, &mut scanner)).await
    }

    /// Sends a refusal before a session exists. `false`: it could not be sent.
    pub async fn refuse(&mut self, answer: &[u8]) -> bool {
        self.write_all(answer).await.is_ok() && self.flush().await.is_ok()
    }

    /// Gives the client time to read a refusal before the connection closes.
    pub async fn farewell(&mut self) {
        self.core().waste_left = LINGER_HEADER_BYTES;
        let _ = std::future::poll_fn(|cx| self.core().poll_close(cx, true)).await;
    }

    /// Closes a connection that waits for its next request; bytes already sent still reach the client. The caller drops
    /// the stream next.
    pub async fn close(&mut self) {
        let _ = std::future::poll_fn(|cx| self.core().poll_end(cx, false)).await;
    }

    /// Whether the connection is kept after the current exchange, as its session decided. `None`: the exchange broke
    /// off.
    pub fn outcome(&self) -> Option<bool> {
        self.core().outcome
    }

    /// Closes a connection after its last response, which still reaches the client. The caller drops the stream next.
    pub async fn end(&mut self) {
        let unread = !self.core().body_is_read();
        let _ = std::future::poll_fn(|cx| self.core().poll_end(cx, unread)).await;
    }

    /// Observes whether the client still accepts bytes, while another owner has the stream.
    pub fn progress(&self) -> Progress {
        Progress { core: self.core.clone() }
    }

    /// The path past the session. The session must be configured as if there were no bodies.
    pub fn bypass(&self) -> Bypass {
        Bypass { core: self.core.clone() }
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        lock(&self.core)
    }
}

/// Copies a piece that fills less than half of its buffer: it may be kept for long.
fn right_sized(piece: BytesMut) -> Bytes {
    if piece.len() < piece.capacity() / 2 { Bytes::copy_from_slice(&piece) } else { piece.freeze() }
}

fn lock(core: &Mutex<Core>) -> MutexGuard<'_, Core> {
    core.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bypass {
    /// Whether the whole request body was read.
    pub fn is_read(&self) -> bool {
        lock(&self.core).body_is_read()
    }

    /// Takes the trailers of a chunked request body that was read completely. A second call returns `None`.
    pub fn take_trailers(&self) -> Option<HeaderMap> {
        match &mut lock(&self.core).rest {
            Rest::Chunked(chunks) if chunks.ended() => Some(chunks.take_trailers()).filter(|fields| !fields.is_empty()),
            _ => None,
        }
    }

    /// Returns the next piece of the request body, in a buffer of about its size. `None` at the end.
    pub fn poll_piece(&self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        lock(&self.core).poll_piece(cx)
    }

    /// Ready once the client has left before the end of a body that is not being read.
    pub fn poll_left(&self, cx: &mut Context<'_>) -> Poll<io::Error> {
        lock(&self.core).poll_left(cx)
    }

    /// Whether all written bytes were given to the socket.
    pub fn has_sent_all(&self) -> bool {
        lock(&self.core).outbox.is_empty()
    }

    /// Whether header and connection permit another request after the current one.
    pub fn may_go_on(&self) -> bool {
        let core = lock(&self.core);
        core.goes_on && core.body_is_read() && !(core.half_closed && core.inbox.is_empty()) && !core.connection.ends()
    }

    /// Prevents further requests on this connection.
    pub fn end_after_answer(&self) {
        lock(&self.core).connection.end_after_answer();
    }

    /// Total number of bytes that the client's host has acknowledged, while the socket accepts no more. `None`: it
    /// does.
    pub fn delivered_while_stalled(&self) -> Option<u64> {
        let core = lock(&self.core);
        core.stalled.as_ref().map(|_| core.delivered())
    }

    /// Sets the outcome of the current exchange; see [`ClientStream::outcome`].
    pub fn settle(&self, outcome: Option<bool>) {
        lock(&self.core).outcome = outcome;
    }

    /// Appends bytes that are sent together with the next ones.
    pub fn gather(&self, write: impl FnOnce(&mut BytesMut)) {
        write(&mut lock(&self.core).outbox);
    }

    /// Sends the gathered bytes.
    pub fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        lock(&self.core).poll_flush(cx)
    }

    /// Ready once the client has left. Call it only after the body was read.
    pub fn poll_gone(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut core = lock(&self.core);
        // The caller has nothing more to write for now.
        if let Poll::Ready(Err(error)) = core.poll_flush(cx) {
            return Poll::Ready(Err(error));
        }
        core.poll_gone(cx)
    }

    /// Closes the connection; see [`ClientStream::end`].
    pub fn poll_close(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut core = lock(&self.core);
        let unread = !core.body_is_read();
        core.poll_close(cx, unread)
    }

    /// Sends the gathered bytes and then these pieces, many per system call and without a copy. Removes the sent bytes
    /// from the front of `pieces`. `ends`: they complete the response.
    pub fn poll_send(&self, cx: &mut Context<'_>, pieces: &mut VecDeque<Bytes>, ends: bool) -> Poll<io::Result<()>> {
        lock(&self.core).poll_send(cx, pieces, ends)
    }
}

impl Core {
    fn poll_open(&mut self, cx: &mut Context<'_>, scanner: &mut Scanner) -> Poll<Result<Opening, &'static Refusal>> {
        // Over TLS, ALPN alone determines the protocol.
        let agreed = self.connection.agreed_on_h2();
        let h2c = agreed.unwrap_or(self.connection.listener.protocols.h2c);
        loop {
            if h2c && self.inbox.starts_with(PREFACE) {
                self.read_size = usize::MAX;
                self.rest = Rest::Http2;
                return Poll::Ready(Ok(Opening::Http2));
            }
            if !(h2c && PREFACE.starts_with(&self.inbox)) {
                if agreed == Some(true) || (agreed == Some(false) && self.inbox.starts_with(FIRST_LINE)) {
                    self.connection.set_fault(Phase::Header, What::Malformed);
                    return Poll::Ready(Err(&refusal::HEADER_ALPN));
                }
                if !self.is_quiet()
                    && let Some(end) = scanner.scan(&self.inbox, self.connection.listener.terms.head)?
                {
                    return Poll::Ready(self.close_header(end));
                }
            }
            if !matches!(ready!(self.poll_fill(cx)), Ok(true)) {
                return Poll::Ready(Ok(Opening::Closed));
            }
        }
    }

    /// Ready when a request or a preface has begun (`true`), or when none will (`false`). Empty lines do not count:
    /// some clients send one after a body.
    fn poll_begin(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        loop {
            if !matches!(ready!(self.poll_fill(cx)), Ok(true)) {
                return Poll::Ready(false);
            }
            if !self.is_quiet() {
                return Poll::Ready(true);
            }
        }
    }

    /// Whether the inbox holds only empty lines before a request line, which are skipped (RFC 9112 §2.2), or half of
    /// one. The header's deadline or the idle limit bounds them.
    fn is_quiet(&mut self) -> bool {
        while self.inbox.starts_with(b"\r\n") {
            self.inbox.advance(2);
        }
        matches!(&self.inbox[..], b"" | b"\r")
    }

    fn close_header(&mut self, end: usize) -> Result<Opening, &'static Refusal> {
        if !self.connection.listener.protocols.http1 && !self.connection.is_carried() {
            head::inspect(&self.inbox[..end])?;
            return Err(&refusal::HEADER_VERSION);
        }
        // Taking the whole buffer avoids sharing it, in the common case of a request without a body.
        let whole = end == self.inbox.len();
        let header = if whole { std::mem::take(&mut self.inbox) } else { self.inbox.split_to(end) }.freeze();
        let request = head::read(header.clone()).inspect_err(|_| {
            // The log line of a refusal is made from the inbox.
            let mut inbox = BytesMut::from(&header[..]);
            inbox.extend_from_slice(&self.inbox);
            self.inbox = inbox;
        })?;
        (self.read_size, self.ends_whole) = (FIRST_READ_BYTES, false);
        self.rest = match request.head.body {
            Body::Length(length) => Rest::Length(length),
            Body::Chunked => Rest::Chunked(Chunks::default()),
            // No HTTP/1 request body ends with its connection.
            Body::None | Body::UntilEnd => Rest::Length(0),
        };
        self.goes_on = request.head.persists;
        (self.outcome, self.answered) = (None, false);
        // This applies until the route is known.
        self.connection.set_half_close_aborts(false);
        Ok(Opening::Http1(request))
    }

    /// Reads available bytes into the inbox. `false`: the client closed the connection.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let mut space = [std::mem::MaybeUninit::<u8>::uninit(); IDLE_READ_BYTES];
        let mut read = ReadBuf::uninit(&mut space);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut read))?;
        self.inbox.extend_from_slice(read.filled());
        Poll::Ready(Ok(!read.filled().is_empty()))
    }

    /// Ready once the client has left: by a reset, or by closing its sending side before the end of the body. The
    /// received part of the body may be in the inbox or in the socket. A route may treat every such close as leaving.
    fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let Core { look, io, rest, inbox, connection, ends_whole, .. } = self;
        let (socket, over_tls) = (io.id(), connection.tls().is_some());
        match rest {
            _ if connection.half_close_aborts() => look.poll(cx, socket, Leaving::Ended),
            Rest::Length(left) => {
                // Encryption makes the unread part longer.
                let here = inbox.len() as u64 + if over_tls { TLS_KEPT_BYTES_MAX } else { 0 };
                look.poll(cx, socket, Leaving::Short(left.saturating_sub(here)))
            }
            Rest::Chunked(chunks) if !over_tls && !*ends_whole => look.poll_or(cx, socket, Leaving::Broken, || {
                let Some(unread) = unread_before_end(socket, PEEK_BYTES_MAX) else { return false };
                let mut chunks = chunks.clone();
                let whole = chunks.take(inbox).and_then(|_| chunks.take(&unread)).is_err() || chunks.ended();
                // Later bytes cannot change this result.
                *ends_whole = whole;
                !whole
            }),
            _ => look.poll(cx, socket, Leaving::Broken),
        }
    }

    /// The request was read: ready only if the client leaves. Bytes of the next request are kept.
    ///
    /// A client that closes its sending side after a complete request waits for its response (RFC 9112 §9.6), unless
    /// its route treats this as leaving. Only a reset or a failed write is certain.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.inbox.is_empty() && !self.half_closed {
            self.half_closed = !ready!(self.poll_fill(cx))?;
        }
        // Bytes of the next request prevent a read from detecting the end.
        let leaving = if self.connection.half_close_aborts() { Leaving::Ended } else { Leaving::Broken };
        if self.half_closed && leaving == Leaving::Ended {
            return Poll::Ready(Ok(()));
        }
        self.look.poll(cx, self.io.id(), leaving).map(Err)
    }

    /// Passes up to `limit` bytes on, first from the inbox.
    fn poll_pass(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>, limit: usize) -> Poll<io::Result<usize>> {
        let limit = limit.min(out.remaining()).min(self.read_size);
        if !self.inbox.is_empty() {
            let passed = limit.min(self.inbox.len());
            out.put_slice(&self.inbox[..passed]);
            self.inbox.advance(passed);
            return Poll::Ready(Ok(passed));
        }
        let mut part = out.take(limit);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut part))?;
        let passed = part.filled().len();
        // SAFETY: `part` is a view of the unfilled part of `out`; its first `passed` bytes were just filled.
        unsafe { out.assume_init(passed) };
        out.advance(passed);
        if passed == self.read_size {
            self.read_size = self.read_size.saturating_mul(2);
        }
        Poll::Ready(Ok(passed))
    }

    fn poll_chunks(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = out.filled().len();
        ready!(self.poll_pass(cx, out, usize::MAX))?;
        let Rest::Chunked(chunks) = &mut self.rest else {
            return Poll::Ready(Ok(()));
        };
        let Ok(taken) = chunks.take(&out.filled()[before..]) else {
            out.set_filled(before);
            self.connection.set_fault(Phase::Send, What::Malformed);
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "malformed chunked body")));
        };
        let next = &out.filled()[before + taken..];
        if !next.is_empty() {
            // Bytes after the end begin the next request; they precede those in the inbox.
            let mut inbox = BytesMut::from(next);
            inbox.extend_from_slice(&self.inbox);
            self.inbox = inbox;
            out.set_filled(before + taken);
        }
        Poll::Ready(Ok(()))
    }

    /// Returns the next piece of a body in a buffer of its own, of about its size.
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        // Gathered bytes are sent first, as for a session that reads.
        if let Poll::Ready(Err(error)) = self.poll_flush(cx) {
            return Poll::Ready(Err(error));
        }
        while !self.body_is_read() {
            let mut piece =
                if self.inbox.is_empty() { ready!(self.poll_gulp(cx))? } else { std::mem::take(&mut self.inbox) };
            if piece.is_empty() {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            let taken = match &mut self.rest {
                Rest::Length(left) => {
                    let taken = piece.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    *left -= taken as u64;
                    Ok((taken, taken))
                }
                Rest::Chunked(chunks) => chunks.unwrap(&mut piece),
                Rest::Raw | Rest::Http2 => Ok((0, 0)),
            };
            let Ok((taken, body)) = taken else {
                self.connection.set_fault(Phase::Send, What::Malformed);
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "malformed chunked body")));
            };
            // Bytes after the body begin the next request.
            self.inbox = if taken < piece.len() { piece.split_off(taken) } else { BytesMut::new() };
            piece.truncate(body);
            if !piece.is_empty() {
                return Poll::Ready(Ok(Some(right_sized(piece))));
            }
        }
        Poll::Ready(Ok(None))
    }

    /// Reads available bytes of a body; the buffer doubles after each read that fills it. Empty when the client has
    /// closed the connection.
    fn poll_gulp(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<BytesMut>> {
        let left = match self.rest {
            Rest::Length(left) => usize::try_from(left).unwrap_or(usize::MAX),
            _ => usize::MAX,
        };
        let room = self.read_size.clamp(READ_BYTES_LEAST, READ_BYTES_MAX).min(left);
        let mut buffer = BytesMut::with_capacity(room);
        let mut read = ReadBuf::uninit(&mut buffer.spare_capacity_mut()[..room]);
        // The buffer is freed if there is nothing to read: an exchange that waits for its client holds none.
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut read))?;
        let filled = read.filled().len();
        // SAFETY: the first `filled` bytes of the spare capacity were just filled.
        unsafe { buffer.set_len(filled) };
        if filled == room {
            self.read_size = (2 * room).min(READ_BYTES_MAX);
        }
        Poll::Ready(Ok(buffer))
    }

    fn body_is_read(&self) -> bool {
        match &self.rest {
            Rest::Length(left) => *left == 0,
            Rest::Chunked(chunks) => chunks.ended(),
            Rest::Raw | Rest::Http2 => true,
        }
    }

    /// Checks the outcome of a write: times out a client that accepts no bytes for too long.
    fn poll_patience<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        // The kernel reports a reset to a writer, but not the close of the other direction.
        let is_exchange = matches!(self.rest, Rest::Length(_) | Rest::Chunked(_)) && !self.connection.is_raw();
        if is_exchange
            && self.connection.half_close_aborts()
            && let Poll::Ready(error) = self.look.poll(cx, self.io.id(), Leaving::Ended)
        {
            return Poll::Ready(Err(error));
        }
        let taken = self.connection.taken();
        if taken != std::mem::replace(&mut self.delivery.taken, taken) {
            self.stalled = None;
        }
        let patience = self.connection.write_idle();
        let mut stalled = self.stalled.take().unwrap_or_else(|| Standstill::begin(self.seen_delivered()));
        let over = stalled.poll(cx, patience, || self.seen_delivered());
        self.stalled = Some(stalled);
        ready!(over);
        self.connection.set_fault(Phase::Write, What::Silent);
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client accepts no bytes")))
    }

    /// The socket has accepted these bytes.
    fn accepted(&mut self, bytes: usize) {
        self.stalled = None;
        // TLS counts the encrypted bytes itself.
        if self.connection.tls().is_none() {
            self.connection.took(bytes);
        }
    }

    /// Total number of bytes that the client's host has acknowledged.
    fn delivered(&self) -> u64 {
        self.connection.taken().saturating_sub(net::unacknowledged(self.io.id()) as u64)
    }

    /// The same for a client that accepts no bytes. A stream has no socket of its own: its client makes progress if
    /// the socket that carries it accepts no bytes either, but the client's host acknowledges some. `None`: unknown.
    fn seen_delivered(&self) -> Option<u64> {
        match &self.delivery.carrier {
            Some(carrier) => carrier.bypass()?.delivered_while_stalled(),
            None => Some(self.delivered()),
        }
    }

    /// Pingora's session writes only whether the connection is kept into `Connection`. A 426 also requires the option
    /// `upgrade` (RFC 9110 §7.8), which this method adds as a second field after the status line. Returns the length of
    /// the status line, which it has taken.
    fn announce_upgrade(&mut self, bytes: &[u8]) -> Option<usize> {
        let is_exchange = matches!(self.rest, Rest::Length(_) | Rest::Chunked(_)) && !self.connection.is_raw();
        if self.answered || !is_exchange || !bytes.starts_with(b"HTTP/1.1 ") {
            return None;
        }
        // After an interim response, which a 101 is not, another header follows.
        self.answered = bytes.get(9) != Some(&b'1') || bytes[9..].starts_with(b"101 ");
        const FIELD: &[u8] = b"\r\nupgrade:";
        let is_required = bytes[9..].starts_with(b"426 ")
            && bytes.windows(FIELD.len()).any(|window| window.eq_ignore_ascii_case(FIELD));
        let line = memchr::memchr(b'\n', bytes).filter(|_| is_required)? + 1;
        self.outbox.extend_from_slice(&bytes[..line]);
        self.outbox.extend_from_slice(b"Connection: upgrade\r\n");
        Some(line)
    }

    fn poll_gathered_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.outbox.len() + bytes.len() <= OUTBOX_BYTES {
            self.outbox.extend_from_slice(bytes);
            return Poll::Ready(Ok(bytes.len()));
        }
        while !self.outbox.is_empty() {
            let both = [IoSlice::new(&self.outbox), IoSlice::new(bytes)];
            let sent = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, &both))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.accepted(sent);
            let gathered = self.outbox.len().min(sent);
            self.outbox.advance(gathered);
            if sent > gathered {
                return Poll::Ready(Ok(sent - gathered));
            }
        }
        let sent = ready!(Pin::new(&mut self.io).poll_write(cx, bytes))?;
        self.accepted(sent);
        Poll::Ready(Ok(sent))
    }

    /// Sends the gathered bytes.
    fn poll_send_outbox(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.outbox.is_empty() {
            let sent = ready!(Pin::new(&mut self.io).poll_write(cx, &self.outbox))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.accepted(sent);
            self.outbox.advance(sent);
        }
        // TLS may hold encrypted bytes that the socket did not accept.
        Pin::new(&mut self.io).poll_flush(cx)
    }

    /// `ends`: the pieces complete the response. If it is the last of the connection, TLS sends its end with them.
    fn poll_send(&mut self, cx: &mut Context<'_>, pieces: &mut VecDeque<Bytes>, ends: bool) -> Poll<io::Result<()>> {
        let is_last = ends && self.connection.ends();
        while !self.outbox.is_empty() || !pieces.is_empty() {
            let Core { io, outbox, connection, .. } = self;
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let gathered = std::iter::once(&outbox[..]).filter(|outbox| !outbox.is_empty());
            let mut count = 0;
            for (slice, bytes) in slices.iter_mut().zip(gathered.chain(pieces.iter().map(|piece| &piece[..]))) {
                *slice = IoSlice::new(bytes);
                count += 1;
            }
            let are_all = count == pieces.len() + usize::from(!outbox.is_empty());
            connection.set_last_write(is_last && are_all);
            let written = Pin::new(io).poll_write_vectored(cx, &slices[..count]);
            connection.set_last_write(false);
            let mut sent = match written {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(sent)) => sent,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return self.poll_patience(cx, Poll::Pending),
            };
            self.accepted(sent);
            let gathered = self.outbox.len().min(sent);
            self.outbox.advance(gathered);
            sent -= gathered;
            while let Some(piece) = pieces.front_mut() {
                if sent < piece.len() {
                    piece.advance(sent);
                    break;
                }
                sent -= piece.len();
                pieces.pop_front();
            }
        }
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        self.poll_patience(cx, flushed)
    }

    /// Closes the writing side and waits until the client has accepted the bytes sent ([`Farewell`]). It reads
    /// meanwhile: closing a socket with unread bytes resets the connection, and the reset destroys bytes that the
    /// client has not read (RFC 9112 §9.6). The wait is skipped if nothing was left `unread`, no more bytes arrive and
    /// everything was acknowledged.
    fn poll_close(&mut self, cx: &mut Context<'_>, unread: bool) -> Poll<io::Result<()>> {
        ready!(self.poll_flush(cx))?;
        if self.connection.resets() {
            // The client must not see a FIN before the reset, which the drop sends.
            return Poll::Ready(Ok(()));
        }
        if self.farewell.is_none() {
            ready!(Pin::new(&mut self.io).poll_shutdown(cx))?;
            // The FIN counts as one byte.
            if self.unsent() <= 1 && self.is_silent(cx, unread) {
                return Poll::Ready(Ok(()));
            }
            self.farewell = Some(Farewell::begin(self.unsent()));
        }
        ready!(self.poll_linger(cx));
        Poll::Ready(Ok(()))
    }

    /// As [`Core::poll_close`], for a stream that its owner drops next. The drop itself closes the writing side of a
    /// socket in clear text, so a client that has accepted everything costs no further system call.
    fn poll_end(&mut self, cx: &mut Context<'_>, unread: bool) -> Poll<io::Result<()>> {
        ready!(self.poll_flush(cx))?;
        let ends_by_drop = self.connection.tls().is_none() && !self.connection.is_carried();
        if self.farewell.is_none() && ends_by_drop && self.unsent() == 0 && self.is_silent(cx, unread) {
            return Poll::Ready(Ok(()));
        }
        self.poll_close(cx, unread)
    }

    /// Whether the client has sent nothing that was not read. `unread`: part of its request was not. The kernel is
    /// asked, too: the runtime learns of bytes only in its next round.
    fn is_silent(&mut self, cx: &mut Context<'_>, unread: bool) -> bool {
        !unread
            && self.inbox.is_empty()
            && net::unread(self.io.id()) == 0
            && !matches!(self.poll_waste(cx), Poll::Ready(true))
    }

    /// Discards received bytes until the client closes or the farewell ends.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let (unsent, patience) = (self.unsent(), self.connection.write_idle());
            let over = self
                .farewell
                .as_mut()
                .is_none_or(|farewell| farewell.poll(cx, patience, || (unsent, false)).is_ready());
            if over || !ready!(self.poll_waste(cx)) {
                return Poll::Ready(());
            }
        }
    }

    /// Reads bytes and discards them. `false`: the client has closed, or the limit of discarded bytes is reached.
    fn poll_waste(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let mut space = [std::mem::MaybeUninit::<u8>::uninit(); IDLE_READ_BYTES];
        let mut waste = ReadBuf::uninit(&mut space);
        let read = ready!(Pin::new(&mut self.io).poll_read(cx, &mut waste));
        self.waste_left = self.waste_left.saturating_sub(waste.filled().len() as u64);
        Poll::Ready(read.is_ok() && !waste.filled().is_empty() && self.waste_left > 0)
    }

    /// Number of bytes written that the client's host has not acknowledged.
    fn unsent(&self) -> usize {
        self.outbox.len() + net::unacknowledged(self.io.id())
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        // A stream that carries this connection is reset because its response has no end.
        if self.connection.resets() && !self.connection.is_carried() {
            net::reset_on_close(self.io.id());
        }
    }
}

impl Core {
    fn poll_read(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // The reader has nothing to write for now: send the gathered bytes, so that a response is forwarded without
        // delay.
        if let Poll::Ready(Err(error)) = self.poll_flush(cx) {
            return Poll::Ready(Err(error));
        }
        match self.rest {
            Rest::Http2 => self.poll_pass(cx, out, usize::MAX).map_ok(|_| ()),
            Rest::Raw => self.poll_tunnel(cx, out),
            _ if self.body_is_read() && self.connection.is_raw() => {
                self.rest = Rest::Raw;
                self.poll_tunnel(cx, out)
            }
            _ if self.body_is_read() => self.poll_gone(cx),
            Rest::Length(left) => {
                let limit = usize::try_from(left).unwrap_or(usize::MAX);
                let passed = ready!(self.poll_pass(cx, out, limit))?;
                self.rest = Rest::Length(left - passed as u64);
                Poll::Ready(Ok(()))
            }
            Rest::Chunked(_) => self.poll_chunks(cx, out),
        }
    }

    /// Reads in a tunnel, whose directions end separately; see [`Connection::tunnel`].
    fn poll_tunnel(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let connection = self.connection.clone();
        let Some(tunnel) = connection.tunnel() else { return self.poll_pass(cx, out, usize::MAX).map_ok(drop) };
        // If the client does not accept the end, it has left, and the read detects this.
        if tunnel.is_to_tell(Direction::Down)
            && self.outbox.is_empty()
            && Pin::new(&mut self.io).poll_shutdown(cx).is_ready()
        {
            tunnel.told(Direction::Down);
            // The endpoint's side may be waiting for this.
            cx.waker().wake_by_ref();
        }
        if !tunnel.has_ended(Direction::Up) {
            let passed = ready!(self.poll_pass(cx, out, usize::MAX))?;
            tunnel.read(Direction::Up, passed);
            if passed > 0 || out.remaining() == 0 || connection.half_close_aborts() {
                return Poll::Ready(Ok(()));
            }
            tunnel.end(Direction::Up);
            cx.waker().wake_by_ref();
        }
        if tunnel.is_over() {
            return Poll::Ready(Ok(()));
        }
        if tunnel.is_told(Direction::Down) {
            // Both sides have ended. The endpoint's side detects this and ends the tunnel.
            return Poll::Pending;
        }
        self.look.poll(cx, self.io.id(), Leaving::Broken).map(Err)
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let sent = self.poll_send_outbox(cx);
        self.poll_patience(cx, sent)
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.core().poll_read(cx, out)
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut core = self.core();
        if let Some(line) = core.announce_upgrade(bytes) {
            return Poll::Ready(Ok(line));
        }
        let written = core.poll_gathered_write(cx, bytes);
        if let (Some(tunnel), Poll::Ready(Ok(written))) = (core.connection.tunnel(), &written) {
            tunnel.wrote_down(&bytes[..*written]);
        }
        core.poll_patience(cx, written)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.core().poll_flush(cx)
    }

    /// Pingora ends a session by this method, not by [`Shutdown`].
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut core = self.core();
        let unread = !core.body_is_read();
        core.poll_close(cx, unread)
    }
}

#[async_trait]
impl Shutdown for ClientStream {
    async fn shutdown(&mut self) {
        let unread = !self.core().body_is_read();
        let _ = std::future::poll_fn(|cx| self.core().poll_close(cx, unread)).await;
    }
}

#[async_trait]
impl Peek for ClientStream {
    /// Shows only the preface that [`ClientStream::open`] found: HTTP/1 never calls this.
    async fn try_peek(&mut self, seen: &mut [u8]) -> io::Result<bool> {
        let core = self.core();
        let there = core.inbox.len() >= seen.len();
        if there {
            seen.copy_from_slice(&core.inbox[..seen.len()]);
        }
        Ok(there)
    }
}

impl UniqueID for ClientStream {
    fn id(&self) -> UniqueIDType {
        self.core().io.id()
    }
}

impl Ssl for ClientStream {}

impl GetTimingDigest for ClientStream {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        Vec::new()
    }
}

impl GetProxyDigest for ClientStream {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        None
    }
}

impl GetSocketDigest for ClientStream {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.core().io.get_socket_digest()
    }
}

impl std::fmt::Debug for ClientStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientStream").field("peer", &self.core().connection.peer).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::connection::tests::connection;
    use crate::client::socket::{ClientSocket, TcpEnds};
    use crate::party::{Fault, Party};
    use futures::FutureExt;
    use proptest::prelude::*;
    use std::time::Duration;
    use tokio::io::AsyncReadExt;

    fn stream(io: tokio::io::DuplexStream, listener: &str) -> ClientStream {
        ClientStream::new(Box::new(io), connection(listener))
    }

    /// A serialised request: its header, and its body with its framing.
    fn request(body: Option<(bool, Vec<Vec<u8>>)>) -> (Vec<u8>, Vec<u8>) {
        let (framing, wire) = match body {
            None => (String::new(), Vec::new()),
            Some((false, pieces)) => {
                let body = pieces.concat();
                (format!("Content-Length: {}\r\n", body.len()), body)
            }
            Some((true, pieces)) => {
                let mut wire = Vec::new();
                for piece in pieces.iter().filter(|piece| !piece.is_empty()) {
                    wire.extend_from_slice(format!("{:x};x=y\r\n", piece.len()).as_bytes());
                    wire.extend_from_slice(piece);
                    wire.extend_from_slice(b"\r\n");
                }
                wire.extend_from_slice(b"0\r\nT: v\r\n\r\n");
                ("Transfer-Encoding: chunked\r\n".to_owned(), wire)
            }
        };
        (format!("POST / HTTP/1.1\r\nHost: a\r\n{framing}\r\n").into_bytes(), wire)
    }

    proptest! {
        #[test]
        fn a_session_gets_its_own_request_and_no_byte_of_the_next(
            bodies in prop::collection::vec(
                prop::option::of((any::<bool>(), prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..4))),
                1..6,
            ),
            cut in 1usize..97,
            space in 1usize..70,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
            runtime.block_on(async {
                let requests: Vec<_> = bodies.into_iter().map(request).collect();
                let wire = requests.iter().flat_map(|(header, body)| [&header[..], body]).collect::<Vec<_>>().concat();
                let (mut client, io) = tokio::io::duplex(64);
                let mut stream = stream(io, "");
                let sender = tokio::spawn(async move {
                    for part in wire.chunks(cut) {
                        client.write_all(part).await.expect("the gateway reads");
                        tokio::task::yield_now().await;
                    }
                    client
                });
                for (header, body) in requests {
                    prop_assert!(stream.park().await);
                    let Ok(Opening::Http1(request)) = stream.open().await else { panic!("no request was opened") };
                    prop_assert!(request.head.persists);
                    prop_assert_eq!(&request.written[..], &header[..]);
                    let mut got = Vec::new();
                    let mut piece = vec![0; space];
                    while got.len() < body.len() {
                        let read = stream.read(&mut piece).await.expect("a piece");
                        prop_assert!(read > 0);
                        got.extend_from_slice(&piece[..read]);
                    }
                    prop_assert_eq!(got, body);
                    prop_assert!(stream.core().body_is_read());
                    prop_assert!(stream.read(&mut piece).now_or_never().is_none(), "the session is to see nothing more");
                }
                drop(sender.await.expect("the client"));
                prop_assert!(!stream.park().await, "the client has gone");
                Ok(())
            })?;
        }
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_is_given_up_and_one_that_takes_little_is_not() {
        let (mut client, io) = tokio::io::duplex(16);
        let mut stream = stream(io, "");
        stream.core().connection.set_write_idle(Duration::from_millis(200));
        let answer = vec![b'x'; 100_000];
        let slow = async {
            let mut sip = [0; 16];
            for _ in 0..8 {
                tokio::time::sleep(Duration::from_millis(60)).await;
                client.read_exact(&mut sip).await.expect("a sip");
            }
            std::future::pending::<()>().await;
        };
        let begin = std::time::Instant::now();
        let written = tokio::select! {
            written = stream.write_all(&answer) => written,
            () = slow => unreachable!("it never ends"),
        };
        assert_eq!(written.map_err(|error| error.kind()), Err(io::ErrorKind::TimedOut));
        assert!(begin.elapsed() > Duration::from_millis(8 * 60 + 150), "{:?}", begin.elapsed());
        assert_eq!(stream.core().connection.fault(), Some(Fault::new(Party::Client, Phase::Write, What::Silent)));
    }

    #[tokio::test]
    async fn the_end_of_a_connection_comes_after_its_last_byte_and_without_a_reset() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        for extra in ["", "GET /next"] {
            let address = listener.local_addr().expect("bound");
            let mut client = tokio::net::TcpStream::connect(address).await.expect("a connection");
            let (stream, peer) = listener.accept().await.expect("a connection");
            let socket = ClientSocket::Tcp { stream, ends: TcpEnds { peer, local: Some(address) } };
            let mut stream = ClientStream::new(Box::new(socket), connection(""));
            client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.expect("room");
            assert!(matches!(stream.open().await, Ok(Opening::Http1(_))));
            stream.write_all(b"an answer").await.expect("room");
            stream.flush().await.expect("room");
            client.write_all(extra.as_bytes()).await.expect("room");
            let reads = async {
                let mut got = Vec::new();
                client.read_to_end(&mut got).await.expect("an end without a reset");
                drop(client);
                got
            };
            let ends = async {
                stream.end().await;
                drop(stream);
            };
            assert_eq!(tokio::join!(ends, reads).1, b"an answer", "{extra:?}");
        }
    }

    #[tokio::test]
    async fn small_writes_leave_when_the_session_turns_to_reading() {
        let (mut client, io) = tokio::io::duplex(1024);
        let mut stream = stream(io, "");
        stream.write_all(b"HTTP/1.1 200 OK\r\n").await.expect("room");
        assert!(client.read(&mut [0; 64]).now_or_never().is_none(), "it is gathered");
        assert!(stream.read(&mut [0; 1]).now_or_never().is_none());
        let mut seen = [0; 64];
        assert_eq!(client.read(&mut seen).await.ok(), Some(17));
    }

    #[tokio::test]
    async fn a_426_names_its_upgrade_and_no_other_bytes_are_touched() {
        const REQUIRED: &str = "HTTP/1.1 426 Upgrade Required\r\nUpgrade: x\r\nConnection: close\r\n\r\n";
        const NAMED: &str =
            "HTTP/1.1 426 Upgrade Required\r\nConnection: upgrade\r\nUpgrade: x\r\nConnection: close\r\n\r\n";
        let hints = "HTTP/1.1 103 Early Hints\r\nUpgrade: x\r\n\r\n";
        let switching = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n";
        for (written, read) in [
            (vec![REQUIRED], NAMED.to_owned()),
            (vec![hints, REQUIRED], format!("{hints}{NAMED}")),
            (vec!["HTTP/1.1 426 \r\n\r\n", REQUIRED], format!("HTTP/1.1 426 \r\n\r\n{REQUIRED}")),
            (
                vec!["HTTP/1.1 200 OK\r\nUpgrade: x\r\n\r\n", REQUIRED],
                format!("HTTP/1.1 200 OK\r\nUpgrade: x\r\n\r\n{REQUIRED}"),
            ),
            (vec![switching, REQUIRED], format!("{switching}{REQUIRED}")),
        ] {
            let (mut client, io) = tokio::io::duplex(4096);
            let mut stream = stream(io, "");
            for bytes in written {
                stream.write_all(bytes.as_bytes()).await.expect("room");
            }
            stream.flush().await.expect("room");
            drop(stream);
            let mut seen = String::new();
            client.read_to_string(&mut seen).await.expect("text");
            assert_eq!(seen, read);
        }
        let (mut client, io) = tokio::io::duplex(4096);
        let mut frames = stream(io, "");
        frames.core().rest = Rest::Http2;
        frames.write_all(REQUIRED.as_bytes()).await.expect("room");
        frames.flush().await.expect("room");
        drop(frames);
        let mut seen = String::new();
        client.read_to_string(&mut seen).await.expect("text");
        assert_eq!(seen, REQUIRED, "it is the content of a frame");
    }

    #[tokio::test]
    async fn the_preface_of_http_2_stays_in_the_stream() {
        let (mut client, io) = tokio::io::duplex(1024);
        let mut stream = stream(io, "protocols: [http1, h2c]");
        client.write_all(&PREFACE[..10]).await.expect("room");
        assert!(stream.park().await);
        client.write_all(&PREFACE[10..]).await.expect("room");
        assert!(matches!(stream.open().await, Ok(Opening::Http2)));
        let mut peeked = [0; 24];
        assert_eq!(stream.try_peek(&mut peeked).await.ok(), Some(true));
        assert_eq!(&peeked, PREFACE);
        let mut read = [0; 24];
        stream.read_exact(&mut read).await.expect("the preface");
        assert_eq!(&read, PREFACE);
    }
}
