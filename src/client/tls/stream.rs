//! A TLS connection as a stream of bytes, and the socket below it with the bytes read before TLS began.
//!
//! The library never waits for the socket in the middle of a record: encrypted bytes stay in [`Raw`] until the socket
//! accepts them, and nothing more is encrypted meanwhile. A pending write may therefore be followed by any other, as on
//! a plain socket, and several records share one system call.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use async_trait::async_trait;
use bytes::{Buf, BytesMut};
use pingora::protocols::raw_connect::ProxyDigest;
use pingora::protocols::{
    GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, Stream, TimingDigest,
    UniqueID, UniqueIDType,
};
use pingora::tls::ssl_sys as ffi;
use pingora::tls::tokio_ssl::SslStream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::error::{Refusal, refusal};

/// Maximum number of plain bytes per record (RFC 8446 §5.1).
const RECORD_BYTES: usize = 16 << 10;
/// Number of plain bytes encrypted before they are sent.
const BURST_BYTES: usize = 4 * RECORD_BYTES;
/// Read size in bytes. The buffer is on the stack; one system call reads the header of a record together with the
/// record.
const READ_BYTES: usize = 4096;

thread_local! {
    /// A buffer for encrypted bytes; a connection owns it only while it writes.
    static CIPHER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    /// A buffer that joins small pieces into one record.
    static RECORD: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// The connection of a socket, as TLS sees it.
pub trait Owner: Send + Sync {
    /// Counts encrypted bytes that the socket has accepted.
    fn took(&self, bytes: usize);

    /// Counts a refused request of the client, such as renegotiation.
    fn count(&self, refusal: &'static Refusal);

    /// Whether the bytes of the current write are the last ones of the connection and complete its last response.
    fn is_last_write(&self) -> bool;

    /// Whether a response was cut: its end must not be marked as regular (`close_notify`, RFC 9112 §9.8).
    fn breaks_off(&self) -> bool;
}

/// A socket whose first bytes may already be read.
pub struct Raw {
    io: Stream,
    /// Bytes read and not yet passed on.
    front: BytesMut,
    /// Encrypted bytes; those from `sent` on were not accepted by the socket yet.
    cipher: Vec<u8>,
    sent: usize,
    /// The connection that it belongs to, once there is one.
    owner: Option<Arc<dyn Owner>>,
    /// Whether the library has read the header of an alert in clear text.
    alerted: bool,
    /// Whether a shutdown leaves the socket open: the library only adds its end to the encrypted bytes.
    stays_open: bool,
}

/// The header of an alert in clear text: type, version, length (RFC 8446 §5.1). After a TLS 1.3 ServerHello, alerts
/// should be encrypted and have another type.
fn is_alert(record: &[u8]) -> bool {
    matches!(record, [21, 3, _, 0, 2])
}

impl Raw {
    /// A socket of which no byte was read.
    pub fn new(io: Stream) -> Self {
        Raw { io, front: BytesMut::new(), cipher: Vec::new(), sent: 0, owner: None, alerted: false, stays_open: false }
    }

    /// Bytes read and not yet passed on.
    pub fn front(&self) -> &[u8] {
        &self.front
    }

    /// Removes this many bytes from the front.
    pub fn skip(&mut self, bytes: usize) {
        self.front.advance(bytes.min(self.front.len()));
    }

    /// Reads available bytes. `false`: the client closed the connection.
    pub async fn fill(&mut self) -> io::Result<bool> {
        std::future::poll_fn(|cx| self.poll_fill(cx)).await.map(|read| read > 0)
    }

    /// The socket, and the bytes that were read.
    pub fn into_parts(self) -> (Stream, BytesMut) {
        (self.io, self.front)
    }

    /// Sets the connection that it belongs to.
    pub fn set_owner(&mut self, owner: Arc<dyn Owner>) {
        self.owner = Some(owner);
    }

    /// Whether the client has sent an alert in clear text.
    pub fn alerted(&self) -> bool {
        self.alerted
    }

    /// Counts a refused request of the client, such as renegotiation.
    fn count(&self, refusal: &'static Refusal) {
        if let Some(owner) = &self.owner {
            owner.count(refusal);
        }
    }

    /// The file descriptor of the socket.
    pub fn id(&self) -> UniqueIDType {
        self.io.id()
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut space = [MaybeUninit::<u8>::uninit(); READ_BYTES];
        let mut read = ReadBuf::uninit(&mut space);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut read))?;
        self.front.extend_from_slice(read.filled());
        Poll::Ready(Ok(read.filled().len()))
    }

    /// Sends the encrypted bytes.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.cipher.len() {
            let taken = ready!(Pin::new(&mut self.io).poll_write(cx, &self.cipher[self.sent..]))?;
            if taken == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent += taken;
            if let Some(owner) = &self.owner {
                owner.took(taken);
            }
        }
        self.sent = 0;
        let mut buffer = std::mem::take(&mut self.cipher);
        if buffer.capacity() > 0 {
            buffer.clear();
            CIPHER.set(buffer);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Raw {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.front.is_empty() {
            if out.remaining() >= READ_BYTES {
                return Pin::new(&mut self.io).poll_read(cx, out);
            }
            if ready!(self.poll_fill(cx))? == 0 {
                return Poll::Ready(Ok(()));
            }
        }
        let length = out.remaining().min(self.front.len());
        // The library reads the header of a record separately.
        self.alerted |= is_alert(&self.front[..length]);
        out.put_slice(&self.front[..length]);
        self.front.advance(length);
        if self.front.is_empty() {
            // An idle connection owns no buffer.
            self.front = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Raw {
    /// Takes encrypted bytes from the library. Their number is bounded: [`TlsStream`] encrypts nothing while some are
    /// left.
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.cipher.capacity() == 0 {
            self.cipher = CIPHER.take();
        }
        self.cipher.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.stays_open {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_send(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

impl std::fmt::Debug for Raw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Raw").field("id", &self.io.id()).finish_non_exhaustive()
    }
}

/// A connection after its handshake.
#[derive(Debug)]
pub struct TlsStream {
    ssl: SslStream<Raw>,
    /// Whether the end (`close_notify`) was encrypted.
    closed: bool,
}

impl TlsStream {
    /// Takes over a connection after its handshake.
    pub fn new(ssl: SslStream<Raw>) -> Self {
        TlsStream { ssl, closed: false }
    }

    fn raw(&mut self) -> &mut Raw {
        self.ssl.get_mut()
    }

    /// Encrypts the end (`close_notify`) behind the last bytes of the connection, unless a response was cut. Both are
    /// sent together.
    fn encrypt_end(&mut self, cx: &mut Context<'_>) {
        let is_last = |owner: &Arc<dyn Owner>| owner.is_last_write() && !owner.breaks_off();
        if self.closed || !self.raw().owner.as_ref().is_some_and(is_last) {
            return;
        }
        self.closed = true;
        self.raw().stays_open = true;
        // An error means that the library cannot send an end any more; the shutdown of the socket follows in any case.
        let _ = Pin::new(&mut self.ssl).poll_shutdown(cx);
        self.raw().stays_open = false;
    }

    /// Encrypts one piece. [`Raw`] accepts everything from the library, so this never waits.
    fn encrypt(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> io::Result<usize> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match Pin::new(&mut self.ssl).poll_write(cx, rest) {
                Poll::Ready(Ok(0)) | Poll::Pending => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(written) => rest = &rest[written?..],
            }
        }
        Ok(bytes.len())
    }

    /// Encrypts up to a burst of these pieces, joining small ones; returns the number of bytes.
    fn encrypt_all(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut record = RECORD.take();
        let encrypted = self.encrypt_in_records(cx, slices, &mut record);
        record.clear();
        RECORD.set(record);
        encrypted
    }

    fn encrypt_in_records(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
        record: &mut Vec<u8>,
    ) -> io::Result<usize> {
        let mut written = 0;
        for slice in slices {
            let mut rest: &[u8] = slice;
            while !rest.is_empty() && written + record.len() < BURST_BYTES {
                if record.is_empty() && rest.len() >= RECORD_BYTES {
                    let (whole, after) = rest.split_at(RECORD_BYTES);
                    written += self.encrypt(cx, whole)?;
                    rest = after;
                    continue;
                }
                let (part, after) = rest.split_at(rest.len().min(RECORD_BYTES - record.len()));
                record.extend_from_slice(part);
                rest = after;
                if record.len() == RECORD_BYTES {
                    written += self.encrypt(cx, record)?;
                    record.clear();
                }
            }
        }
        if !record.is_empty() {
            written += self.encrypt(cx, record)?;
        }
        Ok(written)
    }
}

/// Whether the client has tried to renegotiate, which TLS 1.2 permits and the library refuses with an alert: it would
/// cost the gateway ten times as much as the client.
fn is_renegotiation(error: &io::Error) -> bool {
    let error = error.get_ref().and_then(|error| error.downcast_ref::<pingora::tls::ssl::Error>());
    let stack = error.and_then(|error| error.ssl_error());
    stack.is_some_and(|stack| stack.errors().iter().any(|it| it.reason_code() == ffi::SSL_R_NO_RENEGOTIATION))
}

impl AsyncRead for TlsStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.ssl).poll_read(cx, out);
        if let Poll::Ready(Err(error)) = &read
            && is_renegotiation(error)
        {
            self.raw().count(&refusal::HANDSHAKE_RENEGOTIATION);
        }
        // Messages of the library itself, such as the response to a key update, are sent at once.
        if let Poll::Ready(Err(error)) = self.raw().poll_send(cx) {
            return Poll::Ready(Err(error));
        }
        read
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    /// Accepts the pieces like a buffered socket. Unsent bytes are sent with the next write or flush.
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.raw().poll_send(cx))?;
        let written = self.encrypt_all(cx, slices)?;
        if written == slices.iter().map(|slice| slice.len()).sum::<usize>() {
            self.encrypt_end(cx);
        }
        match self.raw().poll_send(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(written)),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.raw()).poll_flush(cx)
    }

    /// Sends the end (`close_notify`), unless a response was cut, and closes the writing side of the socket.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let breaks_off = self.raw().owner.as_ref().is_some_and(|owner| owner.breaks_off());
        if !std::mem::replace(&mut self.closed, true) && !breaks_off {
            // Called once: a second time, the library would wait for the client's reply.
            return Pin::new(&mut self.ssl).poll_shutdown(cx);
        }
        Pin::new(self.raw()).poll_shutdown(cx)
    }
}

#[async_trait]
impl Shutdown for TlsStream {
    async fn shutdown(&mut self) {
        // The client may have left, in which case no end is needed.
        let _ = std::future::poll_fn(|cx| Pin::new(&mut *self).poll_shutdown(cx)).await;
    }
}

impl UniqueID for TlsStream {
    fn id(&self) -> UniqueIDType {
        self.ssl.get_ref().id()
    }
}

/// Empty, so that Pingora relies on `client` and handles HTTP/2 as in clear text.
impl Ssl for TlsStream {}

impl Peek for TlsStream {}

impl GetTimingDigest for TlsStream {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        Vec::new()
    }
}

impl GetProxyDigest for TlsStream {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        None
    }
}

impl GetSocketDigest for TlsStream {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.ssl.get_ref().io.get_socket_digest()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::time::{Duration, Instant};

    use boring::ssl::{Ssl as Library, SslConnector, SslMethod, SslVerifyMode};
    use bytes::Bytes;
    use foreign_types_shared::ForeignTypeRef;
    use futures::FutureExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::super::certificate::tests::{issue, load};
    use super::super::context::Terms;
    use super::super::handshake::Facts;
    use super::*;
    use crate::client::connection::Connection;
    use crate::client::connection::tests::connection;
    use crate::client::stream::{ClientStream, Opening};
    use crate::config::listener::Protocol;

    /// A client that has sent a request over TLS, and the connection that has read it. `room` is the number of
    /// encrypted bytes that a socket holds.
    async fn asked(room: usize) -> (SslStream<DuplexStream>, ClientStream, Arc<Connection>) {
        let dir = tempfile::tempdir().expect("a directory");
        let loaded = load(&issue(dir.path(), "a", &["a.test"])).expect("a certificate");
        let written = serde_yaml::from_str("{ certificates: [] }").expect("keys of TLS");
        let terms = Terms::build(&written, &[Protocol::Http1], None).unwrap_or_else(|_| panic!("terms"));
        let ssl = Library::new(&terms.context(&loaded, None).expect("a context")).expect("a server");
        let (client, io) = tokio::io::duplex(room);
        let connection = connection("");
        let mut raw = Raw::new(Box::new(io));
        raw.set_owner(connection.clone());
        let mut server = SslStream::new(ssl, raw).expect("a server");

        let mut connector = SslConnector::builder(SslMethod::tls()).expect("TLS");
        connector.set_verify(SslVerifyMode::NONE);
        let ssl = connector.build().configure().and_then(|client| client.into_ssl("a.test")).expect("a client");
        let mut client = SslStream::new(ssl, client).expect("a client");
        let (shaken, accepted) = tokio::join!(Pin::new(&mut client).connect(), Pin::new(&mut server).accept());
        shaken.expect("a handshake");
        accepted.expect("a handshake");
        let facts = Facts {
            name: None,
            version: "TLSv1.3",
            cipher: "TLS_AES_128_GCM_SHA256",
            h2: false,
            resumed: false,
            policy: None,
            client: None,
        };
        connection.secure(facts, Instant::now(), Duration::ZERO);

        client.write_all(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n").await.expect("room");
        let mut stream = ClientStream::new(Box::new(TlsStream::new(server)), connection.clone());
        assert!(matches!(stream.open().await, Ok(Opening::Http1(_))));
        (client, stream, connection)
    }

    /// Whether the client has received the end (`close_notify`).
    fn has_ended(client: &SslStream<DuplexStream>) -> bool {
        // SAFETY: the pointer is to the client's own object.
        unsafe { ffi::SSL_get_shutdown(client.ssl().as_ptr()) & ffi::SSL_RECEIVED_SHUTDOWN != 0 }
    }

    /// Reads what has arrived. `true`: the end (`close_notify`) is behind it.
    fn arrived(client: &mut SslStream<DuplexStream>) -> (usize, bool) {
        let (mut bytes, mut space) = (0, [0; 4096]);
        while let Some(Ok(read @ 1..)) = client.read(&mut space).now_or_never() {
            bytes += read;
        }
        (bytes, has_ended(client))
    }

    #[tokio::test]
    async fn the_end_leaves_in_the_write_of_the_last_bytes_and_not_with_others() {
        for (is_last, is_whole, is_cut) in
            [(true, true, false), (false, true, false), (true, false, false), (true, true, true)]
        {
            let (mut client, mut stream, connection) = asked(1 << 16).await;
            if is_last {
                connection.end_after_answer();
            }
            if is_cut {
                connection.break_off();
            }
            let mut pieces = VecDeque::from([Bytes::from_static(b"HTTP/1.1 200 OK\r\n\r\n"), Bytes::from_static(b"a")]);
            let sent = std::future::poll_fn(|cx| stream.bypass().poll_send(cx, &mut pieces, is_whole)).await;
            sent.expect("room");
            let at_once = is_last && is_whole && !is_cut;
            assert_eq!(arrived(&mut client), (20, at_once), "last {is_last}, whole {is_whole}, cut {is_cut}");
            stream.close().await;
            assert_eq!(arrived(&mut client), (0, !is_cut), "last {is_last}, whole {is_whole}, cut {is_cut}");
        }
    }
}
