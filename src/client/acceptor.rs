//! Accepts connections from the kernel: one task per listening socket, on a worker.
//!
//! A socket outlives the configuration of its listener: after a change, new connections belong to the listener as
//! currently configured.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use pingora::protocols::l4::stream::Stream;
use pingora::protocols::{GetSocketDigest, SocketDigest};
use pingora::server::ShutdownWatch;
use socket2::SockRef;
use tokio::sync::watch;

use super::Front;
use super::connection::Listener;
use super::descriptors::Doorway;
use super::driver::Driven;
use crate::scheduler::accept::AcceptLimiter;

/// Pause after the system could not provide a connection: the next attempt would fail at once.
const REST: Duration = Duration::from_millis(100);

/// A listening socket and its current listener.
pub struct Acceptor {
    listener: ArcSwap<Listener>,
    /// `None` once the task has the socket.
    socket: Mutex<Option<OwnedFd>>,
    /// A duplicate for a process that takes over. It is closed together with the socket, or clients would wait in vain.
    duplicate: Mutex<Option<OwnedFd>>,
    close: watch::Sender<Closing>,
    /// The file of a Unix socket.
    file: Option<PathBuf>,
}

/// The state of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closing {
    /// Connections are accepted.
    Open,
    /// The socket closes after the clients that have connected are accepted.
    Ends,
    /// Another process accepts the connections, including waiting ones.
    HandedOver,
}

/// A listening socket that a runtime watches.
pub enum Open {
    /// A TCP socket.
    Tcp(tokio::net::TcpListener),
    /// A Unix socket.
    Unix(tokio::net::UnixListener),
}

impl Acceptor {
    /// Creates an acceptor for a bound, listening and non-blocking socket, whose connections belong to this listener.
    /// The file of a Unix socket is removed if the socket is never used.
    ///
    /// # Errors
    ///
    /// If no file descriptor is left.
    pub fn new(socket: OwnedFd, listener: Arc<Listener>, file: Option<PathBuf>) -> io::Result<Arc<Acceptor>> {
        let (close, _) = watch::channel(Closing::Open);
        let duplicate = Mutex::new(Some(socket.try_clone()?));
        let socket = Mutex::new(Some(socket));
        Ok(Arc::new(Acceptor { listener: ArcSwap::new(listener), socket, duplicate, close, file }))
    }

    /// The listener of new connections.
    pub fn listener(&self) -> Arc<Listener> {
        self.listener.load_full()
    }

    /// Sets the listener of new connections.
    pub fn set_listener(&self, listener: Arc<Listener>) {
        self.listener.store(listener);
    }

    /// Closes the socket after the clients that have connected are accepted.
    pub fn close(&self) {
        self.close.send_replace(Closing::Ends);
    }

    /// Leaves all further connections, including waiting ones, to another process.
    pub fn give_up(&self) {
        self.close.send_replace(Closing::HandedOver);
    }

    /// A duplicate of the socket for another process; `None` if it is closed.
    ///
    /// # Errors
    ///
    /// If no file descriptor is left.
    pub fn duplicate(&self) -> io::Result<Option<OwnedFd>> {
        let duplicate = self.duplicate.lock().unwrap_or_else(PoisonError::into_inner);
        duplicate.as_ref().map(OwnedFd::try_clone).transpose()
    }

    /// Accepts connections and passes them to `front` until the socket is closed or `stop` signals a shutdown.
    pub async fn run<P>(self: Arc<Self>, front: Arc<Front<P>>, doorway: Arc<Doorway>, mut stop: ShutdownWatch)
    where
        P: Driven + Send + Sync + 'static,
        P::CTX: Send + Sync + 'static,
    {
        let open = match self.open() {
            Ok(open) => open,
            Err(error) => {
                tracing::error!(listener = self.listener().name, %error, "connections cannot be accepted");
                return;
            }
        };
        let mut closed = self.close.subscribe();
        let mut limiter = AcceptLimiter::new(front.schedulers().clone());
        loop {
            let accepted = tokio::select! {
                accepted = open.accept() => accepted,
                _ = stop.wait_for(|stop| *stop) => break,
                _ = closed.wait_for(|closing| *closing != Closing::Open) => break,
            };
            match accepted {
                Ok(stream) => {
                    tokio::select! {
                        () = doorway.pass() => {}
                        _ = stop.wait_for(|stop| *stop) => {}
                    }
                    limiter.count().await;
                    self.hand_over(stream, &front, &stop);
                }
                Err(error) => {
                    tracing::error!(listener = self.listener().name, %error, "a connection could not be accepted");
                    if is_shortage(&error) {
                        tokio::time::sleep(REST).await;
                    }
                }
            }
        }
        self.duplicate.lock().unwrap_or_else(PoisonError::into_inner).take();
        if *closed.borrow() == Closing::HandedOver {
            return;
        }
        // Clients that have already connected must not be reset.
        while let Ok(Some(stream)) = open.accept_waiting() {
            self.hand_over(stream, &front, &stop);
        }
    }

    fn open(&self) -> io::Result<Open> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner).take();
        let socket = socket.ok_or_else(|| io::Error::other("the socket was opened before"))?;
        Open::new(socket, self.listener().unix)
    }

    fn hand_over<P>(&self, mut stream: Stream, front: &Arc<Front<P>>, stop: &ShutdownWatch)
    where
        P: Driven + Send + Sync + 'static,
        P::CTX: Send + Sync + 'static,
    {
        if let Err(error) = stream.set_nodelay() {
            tracing::debug!(%error, "an accepted connection has already closed");
            return;
        }
        // Without buffers: `client::stream` gathers writes itself, and frees its buffers between requests.
        let (front, listener, stop) = (front.clone(), self.listener(), stop.clone());
        pingora_runtime::current_handle().spawn(async move { front.receive(Box::new(stream), &listener, &stop).await });
    }
}

impl Drop for Acceptor {
    /// A configuration that was checked but not applied leaves no file behind.
    fn drop(&mut self) {
        let unused = self.socket.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let (Some(_), Some(file)) = (unused, &self.file) {
            // The file may already be removed.
            let _ = std::fs::remove_file(file);
        }
    }
}

impl Open {
    /// Registers a listening, non-blocking socket with this thread's runtime.
    ///
    /// # Errors
    ///
    /// If the runtime cannot watch it.
    pub fn new(socket: OwnedFd, unix: bool) -> io::Result<Open> {
        Ok(match unix {
            true => Open::Unix(tokio::net::UnixListener::from_std(socket.into())?),
            false => Open::Tcp(tokio::net::TcpListener::from_std(socket.into())?),
        })
    }

    /// Waits for the next connection.
    ///
    /// # Errors
    ///
    /// The error of accept(2).
    pub async fn accept(&self) -> io::Result<Stream> {
        Ok(match self {
            Open::Tcp(socket) => {
                let (stream, peer) = socket.accept().await?;
                with_digest(stream.into(), Some(peer))
            }
            Open::Unix(socket) => with_digest(socket.accept().await?.0.into(), None),
        })
    }

    /// A connection that is already waiting, if any. It asks the kernel, since the runtime may not know of it yet.
    fn accept_waiting(&self) -> io::Result<Option<Stream>> {
        let accepted = match self {
            Open::Tcp(socket) => SockRef::from(socket).accept(),
            Open::Unix(socket) => SockRef::from(socket).accept(),
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        };
        stream.set_nonblocking(true)?;
        Ok(Some(match self {
            Open::Tcp(_) => with_digest(tokio::net::TcpStream::from_std(stream.into())?.into(), peer.as_socket()),
            Open::Unix(_) => with_digest(tokio::net::UnixStream::from_std(stream.into())?.into(), None),
        }))
    }
}

/// Stores the peer's address, which is not available after the connection has closed.
fn with_digest(mut stream: Stream, peer: Option<SocketAddr>) -> Stream {
    let digest = SocketDigest::from_raw_fd(stream.as_raw_fd());
    if let Some(peer) = peer {
        // The new digest has no address yet.
        let _ = digest.peer_addr.set(Some(peer.into()));
    }
    stream.set_socket_digest(digest);
    stream
}

/// Whether the error is a shortage that also affects the next connection (accept(2)).
fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}
