//! One connection as a stream of bytes: parked without buffers between requests, its header read and checked whole,
//! and then exactly the bytes of this request handed to Pingora, never one of the next.
//!
//! Before it stands Pingora's socket, unbuffered; after it a `ServerSession` of Pingora, which lives for one exchange.
//! Bodies can be read and written past that session ([`Bypass`]): Pingora would keep 64 KiB of room for each request
//! body that is slow and copy every byte once more, and write each piece of an answer by itself.

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
use tokio::time::Sleep;

use super::broken::{Leaving, Look, unread_before_end};
use super::connection::Connection;
use super::farewell::Farewell;
use super::head::{self, Scanner};
use crate::error::{Refusal, refusal};
use crate::framing::Body;
use crate::framing::chunked::Chunks;
use crate::net;
use crate::party::What;
use crate::phase::Phase;
use crate::upstream::transport::tunnel::Way;

/// The first bytes of an HTTP/2 connection (RFC 9113 §3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// As much of it as could be taken for the first line of a request of HTTP/1.
const FIRST_LINE: &[u8] = b"PRI * HTTP/2.0\r\n";

/// Read at once while no session exists, on the stack: an idle connection owns no buffer.
const FIRST_READ_BYTES: usize = 4096;

/// How much of a body is read at once to begin with: the session has room for 64 KiB, and what was never read to is
/// never made present. A slow upload comes in small pieces anyway.
const FIRST_GULP_BYTES: usize = 4096;

/// The least and the most that is read at once of a body that is held back, into a buffer that goes again if nothing is
/// there.
const GULP_BYTES_LEAST: usize = 16 << 10;
const GULP_BYTES_MAX: usize = 128 << 10;

/// Small writes are gathered up to this, so that header and body leave in one system call.
const OUTBOX_BYTES: usize = 4096;

/// So many pieces are sent with one system call.
const SLICES_MAX: usize = 16;

/// How much is thrown away of a header that was refused, or of a client that was cut off. Of a body there is no such
/// limit: its client is no less honest for being told in the middle of it, and the time is short.
const LINGER_HEADER_BYTES: u64 = 1 << 20;

/// What TLS may keep of a connection besides what is in the socket: a record that has not come whole, one that was
/// decrypted and not yet read, and what was read together with the head of a record.
const TLS_KEPT_BYTES_MAX: u64 = 40 << 10;

/// How much of a body in chunks is looked at before it is read, to find out whether its end is there.
const PEEK_BYTES_MAX: usize = 256 << 10;

/// What a client wants first.
#[expect(clippy::large_enum_variant, reason = "there is one at a time, and nearly all are requests")]
pub enum Opening {
    /// An HTTP/1 request, checked. The stream is set to hand on its body next.
    Http1(head::Request),
    /// HTTP/2; the preface is still in the stream.
    Http2,
    /// Nothing: it closed.
    Closed,
}

/// The connection of one client. See the module.
pub struct ClientStream {
    core: Arc<Mutex<Core>>,
}

/// The bodies of the request that a stream is at and of its answer, past the session that has the stream.
pub struct Bypass {
    core: Arc<Mutex<Core>>,
}

/// Leads to a [`Bypass`] for as long as there is the stream.
pub struct WeakBypass(Weak<Mutex<Core>>);

impl WeakBypass {
    pub(super) fn bypass(&self) -> Option<Bypass> {
        self.0.upgrade().map(|core| Bypass { core })
    }
}

/// What a connection has sent and its client has not taken yet; see [`ClientStream::progress`].
pub struct Progress {
    core: Arc<Mutex<Core>>,
}

impl Progress {
    /// The client is cut off: little of what it still sends is taken in.
    pub fn condemn(&self) {
        lock(&self.core).waste_left = LINGER_HEADER_BYTES;
    }

    /// Waits while `busy` says so and for as long as the client takes what was sent; see [`Farewell`].
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

/// What the session and whoever reads past it use in turns: one task, so that the lock is never waited for.
struct Core {
    io: Stream,
    connection: Arc<Connection>,
    /// Received and not yet handed on; at most what one read and one header can hold.
    inbox: BytesMut,
    /// Written by the session and not yet sent.
    outbox: BytesMut,
    /// The session has written the header of the final answer.
    answered: bool,
    rest: Rest,
    /// The most that is read of a body at once; more each time that there was as much.
    gulp: usize,
    /// Runs while the client takes nothing of what is written.
    stalled: Option<Pin<Box<Sleep>>>,
    /// Runs from the end of what is written to the close.
    farewell: Option<Farewell>,
    /// What may still be thrown away.
    waste_left: u64,
    /// The client has closed its sending side.
    half_closed: bool,
    /// Sees a reset where reading does not.
    look: Look,
    /// The client has closed its sending side behind all of a body in chunks, some of which is unread.
    ends_whole: bool,
    /// The header of the present request lets another one follow.
    goes_on: bool,
    /// Whether it is kept for another request after the present one; nothing before the answer has left.
    outcome: Option<bool>,
    /// What the socket had taken when the client was last waited for; only TLS tells.
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

    /// Takes over a socket of which these bytes were read already.
    pub fn begun(io: Stream, inbox: BytesMut, connection: Arc<Connection>) -> Self {
        connection.goes_over(io.id());
        let outbox = BytesMut::new();
        let core = Core {
            io,
            connection,
            inbox,
            outbox,
            answered: false,
            rest: Rest::Length(0),
            gulp: usize::MAX,
            stalled: None,
            farewell: None,
            waste_left: u64::MAX,
            half_closed: false,
            look: Look::default(),
            ends_whole: false,
            goes_on: true,
            outcome: None,
            taken: 0,
        };
        let connection = core.connection.clone();
        let core = Arc::new(Mutex::new(core));
        connection.is_gone_past_by(WeakBypass(Arc::downgrade(&core)));
        ClientStream { core }
    }

    /// Looks at the bytes received and not yet handed on; a refusal looks at them for the request line.
    pub fn inbox<T>(&self, look: impl FnOnce(&[u8]) -> T) -> T {
        look(&self.core().inbox)
    }

    /// Waits for the first bytes of a request, holding no buffer meanwhile. `false`: the client closed.
    pub async fn park(&mut self) -> bool {
        {
            let mut core = self.core();
            if !core.body_is_read() {
                // Whoever gave it back with bytes of a body unread would have them taken for the next request.
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
            core.look = Look::default();
        }
        std::future::poll_fn(|cx| self.core().poll_begin(cx)).await
    }

    /// Reads a request header to its end and checks it.
    pub async fn open(&mut self) -> Result<Opening, &'static Refusal> {
        let mut scanner = Scanner::default();
        std::future::poll_fn(|cx| self.core().poll_open(cx, &mut scanner)).await
    }

    /// Sends a refusal before any session exists. `false`: it could not be sent.
    pub async fn refuse(&mut self, answer: &[u8]) -> bool {
        self.write_all(answer).await.is_ok() && self.flush().await.is_ok()
    }

    /// Lets the client read a refusal before the connection goes.
    pub async fn farewell(&mut self) {
        self.core().waste_left = LINGER_HEADER_BYTES;
        let _ = std::future::poll_fn(|cx| self.core().poll_close(cx, true)).await;
    }

    /// Ends a connection that waits for its next request: what was sent last still reaches the client.
    pub async fn close(&mut self) {
        let _ = std::future::poll_fn(|cx| self.core().poll_close(cx, false)).await;
    }

    /// Whether the connection is kept after the present exchange, as its session said; `None`: it broke off.
    pub fn outcome(&self) -> Option<bool> {
        self.core().outcome
    }

    /// Ends a connection behind its last answer, which still reaches the client.
    pub async fn end(&mut self) {
        Shutdown::shutdown(self).await;
    }

    /// Watches whether the client still takes what was sent, while the stream itself is elsewhere.
    pub fn progress(&self) -> Progress {
        Progress { core: self.core.clone() }
    }

    /// The way past the session. The session must be made to believe that there are no bodies.
    pub fn bypass(&self) -> Bypass {
        Bypass { core: self.core.clone() }
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        lock(&self.core)
    }
}

/// A piece of a body, which may stay for long and should not keep twice the room that it needs.
fn fitting(piece: BytesMut) -> Bytes {
    if piece.len() < piece.capacity() / 2 { Bytes::copy_from_slice(&piece) } else { piece.freeze() }
}

fn lock(core: &Mutex<Core>) -> MutexGuard<'_, Core> {
    core.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bypass {
    /// Whether all of the request body was read.
    pub fn is_read(&self) -> bool {
        lock(&self.core).body_is_read()
    }

    /// What followed a request body in chunks that was read to its end, once.
    pub fn take_trailers(&self) -> Option<HeaderMap> {
        match &mut lock(&self.core).rest {
            Rest::Chunked(chunks) if chunks.ended() => Some(chunks.take_trailers()).filter(|fields| !fields.is_empty()),
            _ => None,
        }
    }

    /// The next piece of the request body, in a buffer no larger than it needs. `None` at its end.
    pub fn poll_piece(&self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        lock(&self.core).poll_piece(cx)
    }

    /// Ready once the client has left in the middle of a body that is not being read.
    pub fn poll_left(&self, cx: &mut Context<'_>) -> Poll<io::Error> {
        lock(&self.core).poll_left(cx)
    }

    /// Whether all that was written has gone to the socket.
    pub fn has_sent_all(&self) -> bool {
        lock(&self.core).outbox.is_empty()
    }

    /// Whether another request can follow the present one, as far as its header and the connection say.
    pub fn may_go_on(&self) -> bool {
        let core = lock(&self.core);
        core.goes_on && core.body_is_read() && !(core.half_closed && core.inbox.is_empty()) && !core.connection.ends()
    }

    /// No request is to follow the present one.
    pub fn end_after_answer(&self) {
        lock(&self.core).connection.end_after_answer();
    }

    /// What becomes of the connection after the present exchange; see [`ClientStream::outcome`].
    pub fn settle(&self, outcome: Option<bool>) {
        lock(&self.core).outcome = outcome;
    }

    /// Has bytes written that leave with what is sent next.
    pub fn gather(&self, write: impl FnOnce(&mut BytesMut)) {
        write(&mut lock(&self.core).outbox);
    }

    /// Sends what was gathered.
    pub fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        lock(&self.core).poll_flush(cx)
    }

    /// Ready once the client has gone; only to be asked when the body is read.
    pub fn poll_gone(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut core = lock(&self.core);
        // Whoever waits has nothing to write for now.
        if let Poll::Ready(Err(error)) = core.poll_flush(cx) {
            return Poll::Ready(Err(error));
        }
        core.poll_gone(cx)
    }

    /// Ends the connection; see [`ClientStream::end`].
    pub fn poll_close(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut core = lock(&self.core);
        let unread = !core.body_is_read();
        core.poll_close(cx, unread)
    }

    /// Sends what the session has written and then these pieces, many at once and without copying them. What is sent is
    /// gone from the front.
    pub fn poll_send(&self, cx: &mut Context<'_>, pieces: &mut VecDeque<Bytes>) -> Poll<io::Result<()>> {
        lock(&self.core).poll_send(cx, pieces)
    }
}

impl Core {
    fn poll_open(&mut self, cx: &mut Context<'_>, scanner: &mut Scanner) -> Poll<Result<Opening, &'static Refusal>> {
        // Over TLS, what ALPN agreed on is spoken and nothing else.
        let agreed = self.connection.agreed_on_h2();
        let h2c = agreed.unwrap_or(self.connection.listener.h2c);
        loop {
            if h2c && self.inbox.starts_with(PREFACE) {
                self.gulp = usize::MAX;
                self.rest = Rest::Http2;
                return Poll::Ready(Ok(Opening::Http2));
            }
            if !(h2c && PREFACE.starts_with(&self.inbox)) {
                if agreed == Some(true) || (agreed == Some(false) && self.inbox.starts_with(FIRST_LINE)) {
                    self.connection.set_fault(Phase::Header, What::Malformed);
                    return Poll::Ready(Err(&refusal::HEADER_ALPN));
                }
                if !self.is_quiet()
                    && let Some(end) = scanner.scan(&self.inbox, self.connection.listener.head)?
                {
                    return Poll::Ready(self.close_header(end));
                }
            }
            if !matches!(ready!(self.poll_fill(cx)), Ok(true)) {
                return Poll::Ready(Ok(Opening::Closed));
            }
        }
    }

    /// Ready when a request has begun, or a preface (`true`), or when none will. Empty lines are no beginning: some
    /// clients send one behind a body.
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

    /// Whether nothing is here but empty lines before a request line, which are passed over (RFC 9112 §2.2), or half of
    /// one. The deadline for the header bounds them, or that of an idle connection.
    fn is_quiet(&mut self) -> bool {
        while self.inbox.starts_with(b"\r\n") {
            self.inbox.advance(2);
        }
        matches!(&self.inbox[..], b"" | b"\r")
    }

    fn close_header(&mut self, end: usize) -> Result<Opening, &'static Refusal> {
        if !self.connection.listener.http1 && !self.connection.is_carried() {
            head::inspect(&self.inbox[..end])?;
            return Err(&refusal::HEADER_VERSION);
        }
        // Taking the whole buffer keeps it unshared, which is the common case of a request without a body.
        let whole = end == self.inbox.len();
        let header = if whole { std::mem::take(&mut self.inbox) } else { self.inbox.split_to(end) }.freeze();
        let request = head::read(header.clone()).inspect_err(|_| {
            // What is written of a refusal is read there.
            let mut inbox = BytesMut::from(&header[..]);
            inbox.extend_from_slice(&self.inbox);
            self.inbox = inbox;
        })?;
        (self.gulp, self.ends_whole) = (FIRST_GULP_BYTES, false);
        self.rest = match request.head.body {
            Body::Length(length) => Rest::Length(length),
            Body::Chunked => Rest::Chunked(Chunks::default()),
            // No request of HTTP/1 ends with its connection.
            Body::None | Body::UntilEnd => Rest::Length(0),
        };
        self.goes_on = request.head.persists;
        (self.outcome, self.answered) = (None, false);
        // Until its route is known.
        self.connection.set_half_close_aborts(false);
        Ok(Opening::Http1(request))
    }

    /// Reads what is there into the inbox. `false`: the client closed.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let mut space = [std::mem::MaybeUninit::<u8>::uninit(); FIRST_READ_BYTES];
        let mut read = ReadBuf::uninit(&mut space);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut read))?;
        self.inbox.extend_from_slice(read.filled());
        Poll::Ready(Ok(!read.filled().is_empty()))
    }

    /// Ready once the client has left, by a reset or by the end of its sending side before the end of the body, of which
    /// what came may be here or in the socket. A route may take that end for leaving wherever it is.
    fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let Core { look, io, rest, inbox, connection, ends_whole, .. } = self;
        let (socket, over_tls) = (io.id(), connection.tls().is_some());
        match rest {
            _ if connection.half_close_aborts() => look.poll(cx, socket, Leaving::Ended),
            Rest::Length(left) => {
                // Encrypted, it takes more bytes.
                let here = inbox.len() as u64 + if over_tls { TLS_KEPT_BYTES_MAX } else { 0 };
                look.poll(cx, socket, Leaving::Short(left.saturating_sub(here)))
            }
            Rest::Chunked(chunks) if !over_tls && !*ends_whole => look.poll_or(cx, socket, Leaving::Broken, || {
                let Some(unread) = unread_before_end(socket, PEEK_BYTES_MAX) else { return false };
                let mut chunks = chunks.clone();
                let whole = chunks.take(inbox).and_then(|_| chunks.take(&unread)).is_err() || chunks.ended();
                // Nothing more can come that would change it.
                *ends_whole = whole;
                !whole
            }),
            _ => look.poll(cx, socket, Leaving::Broken),
        }
    }

    /// The request is read; tells the session only if the client goes away, and keeps what it sends for later.
    ///
    /// A client that closes its sending side behind a whole request waits for its answer (RFC 9112 §9.6), unless its
    /// route takes it for gone. What tells for certain is a reset, or a write that fails.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.inbox.is_empty() && !self.half_closed {
            self.half_closed = !ready!(self.poll_fill(cx))?;
        }
        // What is kept of the next request hides the end from reading.
        let leaving = if self.connection.half_close_aborts() { Leaving::Ended } else { Leaving::Broken };
        if self.half_closed && leaving == Leaving::Ended {
            return Poll::Ready(Ok(()));
        }
        self.look.poll(cx, self.io.id(), leaving).map(Err)
    }

    /// Hands on up to `limit` bytes, from the inbox first.
    fn poll_pass(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>, limit: usize) -> Poll<io::Result<usize>> {
        let limit = limit.min(out.remaining()).min(self.gulp);
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
        if passed == self.gulp {
            self.gulp = self.gulp.saturating_mul(2);
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
            // What was read beyond the end begins the next request; it goes before anything that follows it.
            let mut inbox = BytesMut::from(next);
            inbox.extend_from_slice(&self.inbox);
            self.inbox = inbox;
            out.set_filled(before + taken);
        }
        Poll::Ready(Ok(()))
    }

    /// The next piece of a body in a buffer of its own, as large as the piece.
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        // As for a session that reads: what was gathered leaves.
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
            // What follows the body begins the next request.
            self.inbox = if taken < piece.len() { piece.split_off(taken) } else { BytesMut::new() };
            piece.truncate(body);
            if !piece.is_empty() {
                return Poll::Ready(Ok(Some(fitting(piece))));
            }
        }
        Poll::Ready(Ok(None))
    }

    /// Reads what is there of a body, as much as there was the last time and a little more; nothing at its end.
    fn poll_gulp(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<BytesMut>> {
        let left = match self.rest {
            Rest::Length(left) => usize::try_from(left).unwrap_or(usize::MAX),
            _ => usize::MAX,
        };
        let room = self.gulp.clamp(GULP_BYTES_LEAST, GULP_BYTES_MAX).min(left);
        let mut buffer = BytesMut::with_capacity(room);
        let mut read = ReadBuf::uninit(&mut buffer.spare_capacity_mut()[..room]);
        // Without anything to read the buffer goes again: a client that is waited for holds none.
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut read))?;
        let filled = read.filled().len();
        // SAFETY: so many bytes from the beginning of the spare capacity were just filled.
        unsafe { buffer.set_len(filled) };
        if filled == room {
            self.gulp = (2 * room).min(GULP_BYTES_MAX);
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

    /// Looks at the outcome of a write: a client that takes nothing for too long is given up.
    fn poll_patience<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        // The kernel tells a writer of a reset and not of the end of the other direction.
        let is_exchange = matches!(self.rest, Rest::Length(_) | Rest::Chunked(_)) && !self.connection.is_raw();
        if is_exchange
            && self.connection.half_close_aborts()
            && let Poll::Ready(error) = self.look.poll(cx, self.io.id(), Leaving::Ended)
        {
            return Poll::Ready(Err(error));
        }
        let taken = self.connection.taken();
        if taken != std::mem::replace(&mut self.taken, taken) {
            self.stalled = None;
        }
        let patience = self.connection.write_idle();
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
        ready!(stalled.as_mut().poll(cx));
        self.connection.set_fault(Phase::Write, What::Silent);
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing")))
    }

    /// Pingora's session says by `Connection` whether the connection is kept, and nothing else. So what a 426 requires
    /// is named in another one (RFC 9110 §7.8), behind the first line, which this takes: its length.
    fn announce_upgrade(&mut self, bytes: &[u8]) -> Option<usize> {
        let is_exchange = matches!(self.rest, Rest::Length(_) | Rest::Chunked(_)) && !self.connection.is_raw();
        if self.answered || !is_exchange || !bytes.starts_with(b"HTTP/1.1 ") {
            return None;
        }
        // Behind an interim answer, which a 101 is not, there is another header.
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
            self.stalled = None;
            let gathered = self.outbox.len().min(sent);
            self.outbox.advance(gathered);
            if sent > gathered {
                return Poll::Ready(Ok(sent - gathered));
            }
        }
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    /// Sends what is gathered.
    fn poll_send_outbox(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.outbox.is_empty() {
            let sent = ready!(Pin::new(&mut self.io).poll_write(cx, &self.outbox))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.stalled = None;
            self.outbox.advance(sent);
        }
        // TLS may hold what it has encrypted and the socket did not take.
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, pieces: &mut VecDeque<Bytes>) -> Poll<io::Result<()>> {
        while !self.outbox.is_empty() || !pieces.is_empty() {
            let Core { io, outbox, .. } = self;
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let gathered = std::iter::once(&outbox[..]).filter(|outbox| !outbox.is_empty());
            let mut count = 0;
            for (slice, bytes) in slices.iter_mut().zip(gathered.chain(pieces.iter().map(|piece| &piece[..]))) {
                *slice = IoSlice::new(bytes);
                count += 1;
            }
            let mut sent = match Pin::new(io).poll_write_vectored(cx, &slices[..count]) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(sent)) => sent,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return self.poll_patience(cx, Poll::Pending),
            };
            self.stalled = None;
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

    /// Closes the writing side and lets the client take what was sent ([`Farewell`]), reading on meanwhile: a socket
    /// that is closed with bytes unread is reset, and the reset destroys what the client has not taken (RFC 9112 §9.6).
    /// It need not wait if nothing was left `unread`, nothing more comes and all is taken.
    fn poll_close(&mut self, cx: &mut Context<'_>, unread: bool) -> Poll<io::Result<()>> {
        ready!(self.poll_flush(cx))?;
        if self.connection.resets() {
            // No end is to be seen before the reset, which comes with the drop.
            return Poll::Ready(Ok(()));
        }
        if self.farewell.is_none() {
            ready!(Pin::new(&mut self.io).poll_shutdown(cx))?;
            // The FIN counts as one.
            if !unread
                && self.inbox.is_empty()
                && self.unsent() <= 1
                && !matches!(self.poll_waste(cx), Poll::Ready(true))
            {
                return Poll::Ready(Ok(()));
            }
            self.farewell = Some(Farewell::begin(self.unsent()));
        }
        ready!(self.poll_linger(cx));
        Poll::Ready(Ok(()))
    }

    /// Throws away what comes until the client closes or the farewell is over.
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

    /// Reads something and throws it away. `false`: the client has closed, or has sent more than is taken in.
    fn poll_waste(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let mut space = [std::mem::MaybeUninit::<u8>::uninit(); FIRST_READ_BYTES];
        let mut waste = ReadBuf::uninit(&mut space);
        let read = ready!(Pin::new(&mut self.io).poll_read(cx, &mut waste));
        self.waste_left = self.waste_left.saturating_sub(waste.filled().len() as u64);
        Poll::Ready(read.is_ok() && !waste.filled().is_empty() && self.waste_left > 0)
    }

    /// Bytes that were written to the connection and that the client's host has not acknowledged.
    fn unsent(&self) -> usize {
        self.outbox.len() + net::unacknowledged(self.io.id())
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        // A stream that carries it is reset because its answer has no end.
        if self.connection.resets() && !self.connection.is_carried() {
            net::reset_on_close(self.io.id());
        }
    }
}

impl Core {
    fn poll_read(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // Whoever reads has nothing to write for now: what was gathered leaves, so that an answer is passed on as it
        // comes.
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

    /// Reads in a tunnel. Each direction of a tunnel ends by itself; see [`Connection::tunnel`].
    fn poll_tunnel(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let connection = self.connection.clone();
        let Some(tunnel) = connection.tunnel() else { return self.poll_pass(cx, out, usize::MAX).map_ok(drop) };
        // A client that does not take the end has gone, and reading says so.
        if tunnel.is_to_tell(Way::Down) && self.outbox.is_empty() && Pin::new(&mut self.io).poll_shutdown(cx).is_ready()
        {
            tunnel.told(Way::Down);
            // The endpoint's side may wait for that.
            cx.waker().wake_by_ref();
        }
        if !tunnel.has_ended(Way::Up) {
            let passed = ready!(self.poll_pass(cx, out, usize::MAX))?;
            tunnel.read(Way::Up, passed);
            if passed > 0 || out.remaining() == 0 || connection.half_close_aborts() {
                return Poll::Ready(Ok(()));
            }
            tunnel.end(Way::Up);
            cx.waker().wake_by_ref();
        }
        if tunnel.is_over() {
            return Poll::Ready(Ok(()));
        }
        if tunnel.is_told(Way::Down) {
            // Both sides have said all. That the socket is closed is no news, and the endpoint's side goes next.
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

    /// The way in which Pingora ends a session: it calls this one and not [`Shutdown`].
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
    /// Shows the preface that [`ClientStream::open`] found, and nothing else: HTTP/1 never gets this far.
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
    use crate::party::{Fault, Party};
    use futures::FutureExt;
    use proptest::prelude::*;
    use std::time::Duration;
    use tokio::io::AsyncReadExt;

    fn stream(io: tokio::io::DuplexStream, listener: &str) -> ClientStream {
        ClientStream::new(Box::new(io), connection(listener))
    }

    /// A request as it goes over the wire: its header, and its body with its framing.
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
