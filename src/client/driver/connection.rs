//! A connection to an HTTP/1 endpoint, and the messages of one exchange on it.

use std::future::Future;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, RawFd};
use std::pin::{Pin, pin};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use pingora::protocols::{Digest, TimingDigest};
use pingora::upstreams::peer::{HttpPeer, Peer};
use pingora::{Error, ErrorType, Result};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::answer::{Part, ResponseParser};
use super::request::Outgoing;
use crate::net;
use crate::party::standstill::Standstill;
use crate::party::wait::{NoClient, within};
use crate::upstream::transport::dial::{Dialer, Opened, Socket};

/// Read size for a header, in bytes. The buffer is on the stack, so that an exchange that waits for a response holds no
/// buffer.
const FIRST_READ_BYTES: usize = 4096;
/// The driver takes another piece of the request body while fewer bytes than this are queued. Disk and endpoint then
/// need not wait for each other.
const AHEAD_BYTES: usize = 128 << 10;
/// Maximum number of pieces per system call.
const SLICES_MAX: usize = 16;

/// A connection to an endpoint.
pub struct Connection {
    opened: Opened,
    /// The dialer that opened it.
    dialer: Weak<Dialer>,
    /// The description of the connection for hooks.
    digest: Box<Digest>,
    /// Bytes that were received and not parsed yet.
    inbox: BytesMut,
}

impl Connection {
    /// Opens a connection to `peer`.
    ///
    /// # Errors
    ///
    /// The error types of Pingora's connector.
    pub async fn open(dialer: &Arc<Dialer>, peer: &HttpPeer) -> Result<Connection> {
        let open = dialer.open(peer.address());
        let opened = match peer.options.total_connection_timeout.or(peer.options.connection_timeout) {
            // The control of the exchange watches the client meanwhile.
            Some(time) => within(time, NoClient::Within, open)
                .await
                .ok_or_else(|| Error::explain(ErrorType::ConnectTimedout, format!("{time:?} have passed")))??,
            None => open.await?,
        };
        if let Socket::Tcp(stream) = &opened.socket {
            // A failure only delays small requests.
            let _ = stream.set_nodelay(true);
        }
        let timing = TimingDigest { established_ts: SystemTime::now(), ..TimingDigest::default() };
        let digest = Box::new(Digest { timing_digest: vec![Some(timing)], ..Digest::default() });
        Ok(Connection { opened, dialer: Arc::downgrade(dialer), digest, inbox: BytesMut::new() })
    }

    /// The file descriptor of the socket.
    pub fn socket(&self) -> RawFd {
        match &self.opened.socket {
            Socket::Tcp(stream) => stream.as_raw_fd(),
            Socket::Unix(stream) => stream.as_raw_fd(),
        }
    }

    /// The description of the connection for hooks.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Whether the endpoint closed the connection or sent unexpected bytes. It makes a system call only if tokio
    /// reports readiness.
    pub fn is_dead(&self) -> bool {
        let cx = &mut Context::from_waker(Waker::noop());
        let (ready, read) = match &self.opened.socket {
            Socket::Tcp(stream) => (stream.poll_read_ready(cx).is_ready(), TryRead::Tcp(stream)),
            Socket::Unix(stream) => (stream.poll_read_ready(cx).is_ready(), TryRead::Unix(stream)),
        };
        // The readiness can be stale; a read decides.
        ready && !matches!(read.one_byte(), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Whether the connection will not be reused because its endpoint was removed.
    pub fn is_abandoned(&self) -> bool {
        self.dialer.upgrade().is_none_or(|dialer| dialer.is_retired())
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.opened.socket {
            Socket::Tcp(stream) => Pin::new(stream).poll_read(cx, out),
            Socket::Unix(stream) => Pin::new(stream).poll_read(cx, out),
        }
    }

    fn poll_read_buffer(&mut self, cx: &mut Context<'_>, buffer: &mut BytesMut) -> Poll<io::Result<usize>> {
        match &mut self.opened.socket {
            Socket::Tcp(stream) => pin!(stream.read_buf(buffer)).poll(cx),
            Socket::Unix(stream) => pin!(stream.read_buf(buffer)).poll(cx),
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match &mut self.opened.socket {
            Socket::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Socket::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }
}

enum TryRead<'s> {
    Tcp(&'s tokio::net::TcpStream),
    Unix(&'s tokio::net::UnixStream),
}

impl TryRead<'_> {
    fn one_byte(&self) -> io::Result<usize> {
        match self {
            TryRead::Tcp(stream) => stream.try_read(&mut [0]),
            TryRead::Unix(stream) => stream.try_read(&mut [0]),
        }
    }
}

/// An event on a connection.
#[derive(Debug)]
pub enum Event {
    /// All queued bytes were sent, or sending failed. The error of a failure is kept until receiving the response
    /// fails, too.
    Sent,
    /// A part of the response was received.
    Came(Part),
}

/// The request and the response of one exchange.
pub struct Messages<'c> {
    connection: &'c mut Connection,
    outgoing: Outgoing,
    answer: ResponseParser,
    /// Size of the last read, in bytes.
    got: usize,
    /// The error that ended sending.
    unsent: Option<Box<Error>>,
    /// Maximum time without progress in sending.
    patience: Option<Duration>,
    stalled: Option<Standstill>,
}

impl<'c> Messages<'c> {
    /// Creates the messages of an exchange; `patience` is the maximum time without progress in sending.
    pub fn new(
        connection: &'c mut Connection,
        outgoing: Outgoing,
        answer: ResponseParser,
        patience: Option<Duration>,
    ) -> Self {
        Messages { connection, outgoing, answer, got: 0, unsent: None, patience, stalled: None }
    }

    /// Sends the header of the request.
    ///
    /// # Errors
    ///
    /// If the header cannot be sent.
    pub async fn begin(&mut self) -> Result<()> {
        std::future::poll_fn(|cx| self.poll_send(cx)).await
    }

    /// Queues a piece of the request body; see [`Outgoing::push`].
    ///
    /// # Errors
    ///
    /// If the body contradicts its announced length.
    pub fn push(&mut self, piece: Option<Bytes>, end: bool) -> Result<()> {
        if self.unsent.is_some() {
            return Ok(());
        }
        self.outgoing.push(piece, end)
    }

    /// Whether another piece of the request body should be queued.
    pub fn wants_more(&self) -> bool {
        self.outgoing.queued() < AHEAD_BYTES && self.unsent.is_none()
    }

    /// Whether sending the request has failed.
    pub fn is_refused(&self) -> bool {
        self.unsent.is_some()
    }

    /// Whether bytes of the request are queued.
    pub fn is_sending(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Whether the final response header has not been received yet.
    pub fn awaits_answer(&self) -> bool {
        self.answer.is_in_header()
    }

    /// Whether the response is complete.
    pub fn is_answered(&self) -> bool {
        self.answer.ended()
    }

    /// Whether the connection can be used for another exchange.
    pub fn keeps_connection(&self) -> bool {
        self.outgoing.is_sent()
            && self.unsent.is_none()
            && self.answer.keeps_connection()
            && self.connection.inbox.is_empty()
    }

    /// Takes the trailers of the response. A second call returns `None`.
    pub fn take_trailers(&mut self) -> Option<HeaderMap> {
        self.answer.take_trailers()
    }

    /// Takes a further part of the response without waiting. `asks`: reads from the socket if no part is buffered.
    ///
    /// # Errors
    ///
    /// If the connection failed, or the response contradicts its header.
    pub async fn next_at_once(&mut self, asks: bool) -> Result<Option<Part>> {
        let here = self.answer.take(&mut self.connection.inbox)?;
        if here.is_some() || !asks {
            return Ok(here);
        }
        std::future::poll_fn(|cx| match self.poll_answer(cx) {
            Poll::Ready(part) => Poll::Ready(part.map(Some)),
            Poll::Pending => Poll::Ready(Ok(None)),
        })
        .await
        .map_err(|error| self.unsent.take().unwrap_or(error))
    }

    /// Sends and receives; returns the first event. Stays pending once both messages are complete.
    ///
    /// # Errors
    ///
    /// If the response cannot be received. The error is attributed to the endpoint.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Event>> {
        if self.is_sending()
            && let Poll::Ready(sent) = self.poll_send(cx)
        {
            self.unsent = sent.err();
            return Poll::Ready(Ok(Event::Sent));
        }
        match self.poll_answer(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(self.unsent.take().unwrap_or(error))),
            polled => polled.map_ok(Event::Came),
        }
    }

    /// Continues to send while the caller waits for another event.
    pub fn poll_sending(&mut self, cx: &mut Context<'_>) {
        if self.is_sending()
            && let Poll::Ready(sent) = self.poll_send(cx)
        {
            self.unsent = sent.err();
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        while !self.outgoing.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let mut count = 0;
            for (slice, piece) in slices.iter_mut().zip(self.outgoing.pieces()) {
                *slice = IoSlice::new(piece);
                count += 1;
            }
            match self.connection.poll_write(cx, &slices[..count]) {
                Poll::Ready(Ok(sent @ 1..)) => {
                    self.stalled = None;
                    self.outgoing.advance(sent);
                }
                Poll::Ready(outcome) => {
                    self.outgoing.give_up();
                    let error = outcome.err().unwrap_or(io::ErrorKind::WriteZero.into());
                    return Poll::Ready(Err(
                        Error::because(ErrorType::WriteError, "sending the request", error).into_up()
                    ));
                }
                Poll::Pending => {
                    let Some(patience) = self.patience else { return Poll::Pending };
                    let socket = self.connection.socket();
                    let look = || Some(net::unacknowledged(socket) as u64);
                    let stalled = self.stalled.get_or_insert_with(|| Standstill::begin(look()));
                    ready!(stalled.poll(cx, patience, look));
                    self.outgoing.give_up();
                    return Poll::Ready(Err(Error::explain(ErrorType::WriteTimedout, "sending the request").into_up()));
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<Result<Part>> {
        if self.answer.ended() {
            return Poll::Pending;
        }
        loop {
            if let Some(part) = self.answer.take(&mut self.connection.inbox)? {
                return Poll::Ready(Ok(part));
            }
            match ready!(self.poll_receive(cx)) {
                Ok(0) if self.answer.close() => return Poll::Ready(Ok(Part::Body(Bytes::new(), true))),
                Ok(0) => {
                    let error = Error::explain(ErrorType::ConnectionClosed, "before the end of a response");
                    return Poll::Ready(Err(error.into_up()));
                }
                Ok(_) => {}
                Err(error) => {
                    let error = Error::because(ErrorType::ReadError, "receiving the response", error);
                    return Poll::Ready(Err(error.into_up()));
                }
            }
        }
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.answer.is_in_header() {
            let mut space = [std::mem::MaybeUninit::<u8>::uninit(); FIRST_READ_BYTES];
            let mut read = ReadBuf::uninit(&mut space);
            ready!(self.connection.poll_read(cx, &mut read))?;
            self.connection.inbox.extend_from_slice(read.filled());
            return Poll::Ready(Ok(read.filled().len()));
        }
        // The buffer is freed if the read returns no bytes.
        let room = self.answer.room(self.got);
        let mut buffer = if self.connection.inbox.is_empty() {
            BytesMut::with_capacity(room)
        } else {
            std::mem::take(&mut self.connection.inbox)
        };
        let read = self.connection.poll_read_buffer(cx, &mut buffer);
        self.connection.inbox = if buffer.is_empty() { BytesMut::new() } else { buffer };
        self.got = ready!(read)?;
        Poll::Ready(Ok(self.got))
    }
}
