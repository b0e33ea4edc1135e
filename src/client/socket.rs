//! The socket of an accepted connection, as Pingora's interfaces need it.
//!
//! Pingora's own type asks the kernel for an option of the socket when it is dropped, and reads the clock around each
//! read and write that has to wait. Here a connection costs no system call besides those of its bytes.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use async_trait::async_trait;
use pingora::protocols::raw_connect::ProxyDigest;
use pingora::protocols::{
    GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, TimingDigest, UniqueID,
    UniqueIDType,
};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// An accepted connection that no event loop watches yet, so that the worker that serves it can.
#[derive(Debug)]
pub struct Accepted {
    /// The socket, which does not block.
    pub socket: OwnedFd,
    /// The ends of a TCP connection; `None` on a Unix socket.
    pub ends: Option<TcpEnds>,
}

/// The two ends of a TCP connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpEnds {
    /// The client's address.
    pub peer: SocketAddr,
    /// The address that the client has connected to. `None` if it had closed the connection before it was asked.
    pub local: Option<SocketAddr>,
}

impl Accepted {
    /// Lets this thread's event loop watch the connection.
    ///
    /// # Errors
    ///
    /// If the kernel cannot watch more.
    pub fn watch(self) -> io::Result<ClientSocket> {
        Ok(match self.ends {
            Some(ends) => ClientSocket::Tcp { stream: TcpStream::from_std(self.socket.into())?, ends },
            None => ClientSocket::Unix(UnixStream::from_std(self.socket.into())?),
        })
    }
}

impl AsFd for Accepted {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A connection that an event loop watches, without buffers.
#[derive(Debug)]
pub enum ClientSocket {
    /// A TCP connection.
    Tcp {
        /// The socket.
        stream: TcpStream,
        /// Its ends.
        ends: TcpEnds,
    },
    /// A connection through a Unix socket, whose clients have no address.
    Unix(UnixStream),
}

impl ClientSocket {
    /// The client's address; `None` on a Unix socket.
    pub fn peer(&self) -> Option<SocketAddr> {
        match self {
            ClientSocket::Tcp { ends, .. } => Some(ends.peer),
            ClientSocket::Unix(_) => None,
        }
    }

    /// The local address; `None` on a Unix socket.
    pub fn local(&self) -> Option<SocketAddr> {
        match self {
            ClientSocket::Tcp { ends, .. } => ends.local,
            ClientSocket::Unix(_) => None,
        }
    }
}

impl AsRawFd for ClientSocket {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            ClientSocket::Tcp { stream, .. } => stream.as_raw_fd(),
            ClientSocket::Unix(stream) => stream.as_raw_fd(),
        }
    }
}

impl AsyncRead for ClientSocket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientSocket::Tcp { stream, .. } => Pin::new(stream).poll_read(cx, out),
            ClientSocket::Unix(stream) => Pin::new(stream).poll_read(cx, out),
        }
    }
}

impl AsyncWrite for ClientSocket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            ClientSocket::Tcp { stream, .. } => Pin::new(stream).poll_write(cx, bytes),
            ClientSocket::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            ClientSocket::Tcp { stream, .. } => Pin::new(stream).poll_write_vectored(cx, slices),
            ClientSocket::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// There is no buffer.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientSocket::Tcp { stream, .. } => Pin::new(stream).poll_shutdown(cx),
            ClientSocket::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[async_trait]
impl Shutdown for ClientSocket {
    async fn shutdown(&mut self) {
        // The client may have left, in which case no end is needed.
        let _ = AsyncWriteExt::shutdown(self).await;
    }
}

impl UniqueID for ClientSocket {
    fn id(&self) -> UniqueIDType {
        self.as_raw_fd()
    }
}

impl Ssl for ClientSocket {}

impl Peek for ClientSocket {}

impl GetTimingDigest for ClientSocket {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        Vec::new()
    }
}

impl GetProxyDigest for ClientSocket {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        None
    }
}

impl GetSocketDigest for ClientSocket {
    /// Made when it is asked for, which only HTTP/2 and Pingora's sessions do.
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        let digest = SocketDigest::from_raw_fd(self.as_raw_fd());
        // The new digest has no address yet. The kernel no longer knows them once the connection has closed.
        if let Some(peer) = self.peer() {
            let _ = digest.peer_addr.set(Some(peer.into()));
        }
        if let Some(local) = self.local() {
            let _ = digest.local_addr.set(Some(local.into()));
        }
        Some(Arc::new(digest))
    }
}
