//! Accepts connections from the kernel: one task per listening socket, on a worker.
//!
//! A socket outlives the configuration of its listener: after a change, new connections belong to the listener as
//! currently configured.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use pingora::server::ShutdownWatch;
use socket2::SockRef;
use tokio::sync::watch;

use super::Front;
use super::connection::Listener;
use super::descriptors::Doorway;
use super::driver::Driven;
use super::socket::ClientSocket;
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
    Tcp {
        /// The socket.
        socket: tokio::net::TcpListener,
        /// The local address of all its connections; `None` if they can have different ones.
        local: Option<SocketAddr>,
        /// Whether connections from before it had TCP_NODELAY, which have not inherited the option, may still wait.
        has_older: AtomicBool,
    },
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
                        () = doorway.pass(stream.as_raw_fd()) => {}
                        _ = stop.wait_for(|stop| *stop) => {}
                    }
                    limiter.count().await;
                    front.clone().receive(stream, self.listener(), stop.clone());
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
            front.clone().receive(stream, self.listener(), stop.clone());
        }
    }

    fn open(&self) -> io::Result<Open> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner).take();
        let socket = socket.ok_or_else(|| io::Error::other("the socket was opened before"))?;
        Open::new(socket, self.listener().unix)
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
        if unix {
            return Ok(Open::Unix(tokio::net::UnixListener::from_std(socket.into())?));
        }
        // Connections inherit the option, which saves a system call for each. Sockets of our own have it before they
        // listen, others may not. A failure only delays small responses.
        let has_older = AtomicBool::new(!SockRef::from(&socket).tcp_nodelay().unwrap_or(false));
        let _ = SockRef::from(&socket).set_tcp_nodelay(true);
        let local = SockRef::from(&socket).local_addr()?.as_socket();
        let local = local.filter(|local| !local.ip().is_unspecified() && !is_transparent(&socket, local));
        Ok(Open::Tcp { socket: tokio::net::TcpListener::from_std(socket.into())?, local, has_older })
    }

    /// Waits for the next connection.
    ///
    /// # Errors
    ///
    /// The error of accept(2).
    pub async fn accept(&self) -> io::Result<ClientSocket> {
        match self {
            Open::Tcp { socket, local, has_older } => {
                let (stream, peer) = socket.accept().await?;
                never_delay(&stream, has_older);
                Ok(with_ends(stream, peer, *local))
            }
            Open::Unix(socket) => Ok(ClientSocket::Unix(socket.accept().await?.0)),
        }
    }

    /// A connection that is already waiting, if any. It asks the kernel, since the runtime may not know of it yet.
    fn accept_waiting(&self) -> io::Result<Option<ClientSocket>> {
        let accepted = match self {
            Open::Tcp { socket, .. } => SockRef::from(socket).accept(),
            Open::Unix(socket) => SockRef::from(socket).accept(),
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        };
        stream.set_nonblocking(true)?;
        match self {
            Open::Tcp { local, has_older, .. } => {
                let peer = peer.as_socket().ok_or(io::ErrorKind::InvalidData)?;
                let stream = tokio::net::TcpStream::from_std(stream.into())?;
                never_delay(&stream, has_older);
                Ok(Some(with_ends(stream, peer, *local)))
            }
            Open::Unix(_) => Ok(Some(ClientSocket::Unix(tokio::net::UnixStream::from_std(stream.into())?))),
        }
    }
}

/// Sets TCP_NODELAY if the connection has not inherited it. The kernel queues connections in the order in which they
/// were made, so the first one that has inherited it is the end of the older ones.
fn never_delay(stream: &tokio::net::TcpStream, has_older: &AtomicBool) {
    if !has_older.load(Ordering::Relaxed) {
        return;
    }
    match stream.nodelay() {
        Ok(true) => has_older.store(false, Ordering::Relaxed),
        // A failure means that the connection is gone again, which the first read finds as well.
        _ => _ = stream.set_nodelay(true),
    }
}

/// Adds the addresses of a connection, which the kernel does not know after the connection has closed. `local` is the
/// address of the listening socket, if all connections have the same.
fn with_ends(stream: tokio::net::TcpStream, peer: SocketAddr, local: Option<SocketAddr>) -> ClientSocket {
    let local = local.or_else(|| stream.local_addr().ok());
    ClientSocket::Tcp { stream, peer, local }
}

/// Whether a listening socket accepts connections to other addresses than its own (`IP_TRANSPARENT`).
fn is_transparent(socket: &OwnedFd, local: &SocketAddr) -> bool {
    let socket = SockRef::from(socket);
    match local {
        SocketAddr::V4(_) => socket.ip_transparent_v4(),
        SocketAddr::V6(_) => socket.ip_transparent_v6(),
    }
    // If the kernel does not tell, each connection is asked.
    .unwrap_or(true)
}

/// Whether the error is a shortage that also affects the next connection (accept(2)).
fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection to a listening socket with this address, and the client's socket.
    async fn connected(address: &str) -> (Open, ClientSocket, std::net::TcpStream) {
        let socket = std::net::TcpListener::bind(address).expect("a port");
        socket.set_nonblocking(true).expect("a socket");
        let port = socket.local_addr().expect("bound").port();
        let open = Open::new(socket.into(), false).expect("a runtime");
        let client = std::net::TcpStream::connect(("127.0.0.1", port)).expect("a connection");
        let accepted = open.accept().await.expect("a connection");
        (open, accepted, client)
    }

    #[tokio::test]
    async fn a_connection_sends_without_delay_and_knows_its_ends() {
        for (address, is_known) in [("127.0.0.1:0", true), ("0.0.0.0:0", false), ("[::]:0", false)] {
            let (open, accepted, client) = connected(address).await;
            let Open::Tcp { local, .. } = &open else { panic!("it listens on TCP") };
            assert_eq!(local.is_some(), is_known, "{address}");
            let ClientSocket::Tcp { stream, .. } = &accepted else { panic!("it listens on TCP") };
            assert!(stream.nodelay().expect("a socket"), "{address}");
            let canonical = |end: Option<SocketAddr>| end.map(|end| (end.ip().to_canonical(), end.port()));
            let ends = [client.local_addr(), client.peer_addr()].map(|end| canonical(end.ok()));
            assert_eq!([accepted.peer(), accepted.local()].map(canonical), ends, "{address}");
        }
    }

    #[tokio::test]
    async fn connections_from_before_the_socket_was_opened_send_without_delay() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        socket.set_nonblocking(true).expect("a socket");
        let address = socket.local_addr().expect("bound");
        let connect = || std::net::TcpStream::connect(address).expect("a connection");
        let _older = [connect(), connect()];
        let open = Open::new(socket.into(), false).expect("a runtime");
        let _newer = [connect(), connect()];
        let Open::Tcp { has_older, .. } = &open else { panic!("it listens on TCP") };
        for expected in [true, true, false, false] {
            let accepted = open.accept().await.expect("a connection");
            let ClientSocket::Tcp { stream, .. } = &accepted else { panic!("it listens on TCP") };
            assert!(stream.nodelay().expect("a socket"));
            assert_eq!(has_older.load(Ordering::Relaxed), expected);
        }
    }

    #[tokio::test]
    async fn a_waiting_connection_is_like_any_other() {
        let (open, _, first) = connected("127.0.0.1:0").await;
        assert!(open.accept_waiting().expect("a socket").is_none());
        let client = std::net::TcpStream::connect(first.peer_addr().expect("connected")).expect("a connection");
        let accepted = open.accept_waiting().expect("a socket").expect("a connection");
        assert_eq!(accepted.peer(), client.local_addr().ok());
        let ClientSocket::Tcp { stream, .. } = &accepted else { panic!("it listens on TCP") };
        assert!(stream.nodelay().expect("a socket"));
    }
}
