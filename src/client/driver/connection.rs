//! A connection of ours to an endpoint of HTTP/1, and the messages of one exchange on it.

use std::future::Future;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, RawFd};
use std::pin::{Pin, pin};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant, SystemTime};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use pingora::protocols::{Digest, TimingDigest};
use pingora::upstreams::peer::{HttpPeer, Peer};
use pingora::{Error, ErrorType, Result};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::answer::{Answer, Part};
use super::request::Outgoing;
use crate::party::wait::{NoClient, Timer, within};
use crate::upstream::transport::dial::{Dialer, Opened, Socket};

/// Read at once of a header, on the stack: what waits for an answer has no buffer.
const FIRST_READ_BYTES: usize = 4096;
/// A further piece of a request body is taken while less than this is to be sent: the disk that it may come from need
/// not wait for the endpoint, nor the endpoint for the disk.
const AHEAD_BYTES: usize = 128 << 10;
/// The pieces that are sent with one system call.
const SLICES_MAX: usize = 16;

/// A connection to an endpoint.
pub struct Connection {
    opened: Opened,
    /// Who has made it.
    dialer: Weak<Dialer>,
    /// What hooks are told of it.
    digest: Box<Digest>,
    /// Received and not yet taken.
    inbox: BytesMut,
}

impl Connection {
    /// Makes one to where `peer` leads.
    ///
    /// # Errors
    ///
    /// Of the kinds that Pingora's own connector gives.
    pub async fn open(dialer: &Arc<Dialer>, peer: &HttpPeer) -> Result<Connection> {
        let open = dialer.open(peer.address());
        let opened = match peer.options.total_connection_timeout.or(peer.options.connection_timeout) {
            // The gate of the exchange has its eye on the client.
            Some(time) => within(time, NoClient::Within, open)
                .await
                .ok_or_else(|| Error::explain(ErrorType::ConnectTimedout, format!("{time:?} are over")))??,
            None => open.await?,
        };
        if let Socket::Tcp(stream) = &opened.socket {
            // Without it a small request waits, and nothing else.
            let _ = stream.set_nodelay(true);
        }
        let timing = TimingDigest { established_ts: SystemTime::now(), ..TimingDigest::default() };
        let digest = Box::new(Digest { timing_digest: vec![Some(timing)], ..Digest::default() });
        Ok(Connection { opened, dialer: Arc::downgrade(dialer), digest, inbox: BytesMut::new() })
    }

    /// The number of its socket.
    pub fn socket(&self) -> RawFd {
        match &self.opened.socket {
            Socket::Tcp(stream) => stream.as_raw_fd(),
            Socket::Unix(stream) => stream.as_raw_fd(),
        }
    }

    /// What hooks are told of it.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Whether its endpoint has closed it, or sent bytes unasked. Nothing is asked of the kernel unless it has
    /// told of something.
    pub fn is_dead(&self) -> bool {
        let cx = &mut Context::from_waker(Waker::noop());
        let (ready, read) = match &self.opened.socket {
            Socket::Tcp(stream) => (stream.poll_read_ready(cx).is_ready(), TryRead::Tcp(stream)),
            Socket::Unix(stream) => (stream.poll_read_ready(cx).is_ready(), TryRead::Unix(stream)),
        };
        // What was told may have been read since; asking finds out.
        ready && !matches!(read.one_byte(), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Whether no exchange will use it again, for its endpoint was removed.
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

/// Something that happened on a connection.
#[derive(Debug)]
pub enum Event {
    /// All that was to be sent has left, or never will: then the error is kept until the answer fails, too.
    Sent,
    /// A part of the answer has come.
    Came(Part),
}

/// The request and the answer of one exchange.
pub struct Messages<'c> {
    connection: &'c mut Connection,
    outgoing: Outgoing,
    answer: Answer,
    /// Bytes of the last read.
    got: usize,
    /// The endpoint takes nothing more of the request, for this reason.
    unsent: Option<Box<Error>>,
    /// How long it may take nothing.
    patience: Option<Duration>,
    stalled: Option<Instant>,
    timer: Timer,
}

impl<'c> Messages<'c> {
    /// The messages of an exchange whose request leaves like this.
    pub fn new(connection: &'c mut Connection, outgoing: Outgoing, answer: Answer, patience: Option<Duration>) -> Self {
        let (timer, stalled) = (Timer::default(), None);
        Messages { connection, outgoing, answer, got: 0, unsent: None, patience, stalled, timer }
    }

    /// Sends the header of the request.
    ///
    /// # Errors
    ///
    /// The endpoint does not take it.
    pub async fn begin(&mut self) -> Result<()> {
        std::future::poll_fn(|cx| self.poll_send(cx)).await
    }

    /// Takes a piece of the request body; see [`Outgoing::push`].
    ///
    /// # Errors
    ///
    /// It is longer or shorter than was announced.
    pub fn push(&mut self, piece: Option<Bytes>, end: bool) -> Result<()> {
        if self.unsent.is_some() {
            return Ok(());
        }
        self.outgoing.push(piece, end)
    }

    /// Whether a further piece of the request is wanted now.
    pub fn wants_more(&self) -> bool {
        self.outgoing.queued() < AHEAD_BYTES && self.unsent.is_none()
    }

    /// Whether the endpoint takes nothing more of the request.
    pub fn is_refused(&self) -> bool {
        self.unsent.is_some()
    }

    /// Whether something of the request is to be sent yet.
    pub fn is_sending(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Whether nothing but interim answers has come.
    pub fn awaits_answer(&self) -> bool {
        self.answer.is_in_header()
    }

    /// Whether all of the answer has come.
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

    /// What followed the body of the answer, once.
    pub fn take_trailers(&mut self) -> Option<HeaderMap> {
        self.answer.take_trailers()
    }

    /// A further part of the answer that can be had at once: one that is here or, if the socket is asked, too, one that
    /// can be read.
    ///
    /// # Errors
    ///
    /// There is no more of it, or it is not what its header says.
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

    /// Sends and receives, whatever can be done first. Pending for ever once both are done.
    ///
    /// # Errors
    ///
    /// There will be no answer, or no more of it: the endpoint's fault, as far as is known here.
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

    /// Goes on sending while something else is waited for.
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
                    let since = *self.stalled.get_or_insert_with(Instant::now);
                    let Some(patience) = self.patience else { return Poll::Pending };
                    ready!(self.timer.poll(cx, since + patience));
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
                    let error = Error::explain(ErrorType::ConnectionClosed, "before the end of an answer");
                    return Poll::Ready(Err(error.into_up()));
                }
                Ok(_) => {}
                Err(error) => {
                    let error = Error::because(ErrorType::ReadError, "receiving the answer", error);
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
        // Without anything to read the buffer goes again.
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
