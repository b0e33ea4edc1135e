//! Accepts connections from the kernel: one task per listening socket, on a worker.
//!
//! A socket outlives the configuration of its listener: after a change, new connections belong to the listener as
//! currently configured.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, ready};
use std::time::Duration;

use arc_swap::ArcSwap;
use pingora::server::ShutdownWatch;
use rustix::net::SocketFlags;
use socket2::SockRef;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use super::DownstreamApp;
use super::descriptors::Doorway;
use super::driver::Driven;
use super::listener::Listener;
use super::socket::{Accepted, TcpEnds};
use crate::net;
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

/// A listening socket that this thread's event loop watches.
pub struct Open {
    socket: AsyncFd<OwnedFd>,
    /// `None` for a Unix socket.
    tcp: Option<Tcp>,
}

/// What is known of a listening TCP socket.
struct Tcp {
    /// The local address of all its connections; `None` if they can have different ones.
    local: Option<SocketAddr>,
    /// Whether connections from before it had TCP_NODELAY, which have not inherited the option, may still wait.
    has_older: AtomicBool,
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
    pub async fn run<P>(self: Arc<Self>, front: Arc<DownstreamApp<P>>, doorway: Arc<Doorway>, mut stop: ShutdownWatch)
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
        let mut stopped = stop.clone();
        // One future for all connections: to begin and end such waits for each takes as long as to accept it.
        let mut ends = std::pin::pin!(async {
            tokio::select! {
                _ = stopped.wait_for(|stop| *stop) => {}
                _ = closed.wait_for(|closing| *closing != Closing::Open) => {}
            }
        });
        let mut limiter = AcceptLimiter::new(front.schedulers().clone());
        loop {
            let accepted = tokio::select! {
                biased;
                () = &mut ends => break,
                accepted = open.accept() => accepted,
            };
            match accepted {
                Ok(accepted) => {
                    tokio::select! {
                        biased;
                        () = doorway.pass(accepted.as_fd().as_raw_fd()) => {}
                        _ = stop.wait_for(|stop| *stop) => {}
                    }
                    limiter.count().await;
                    front.clone().receive(accepted, self.listener(), stop.clone());
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
        if *self.close.borrow() == Closing::HandedOver {
            return;
        }
        // Clients that have already connected must not be reset.
        while let Ok(accepted) = open.accept_waiting() {
            front.clone().receive(accepted, self.listener(), stop.clone());
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
    /// Registers a listening, non-blocking socket with this thread's event loop.
    ///
    /// # Errors
    ///
    /// If the kernel cannot watch it.
    pub fn new(socket: OwnedFd, unix: bool) -> io::Result<Open> {
        let tcp = if unix { None } else { Some(Tcp::new(&socket)?) };
        Ok(Open { socket: net::watch_reads(socket)?, tcp })
    }

    /// Waits for the next connection.
    ///
    /// # Errors
    ///
    /// The error of accept(2).
    pub async fn accept(&self) -> io::Result<Accepted> {
        // Unlike `async_io`, this adds no entry to a list of waiting tasks for each connection.
        poll_fn(|cx| {
            loop {
                let mut ready = ready!(self.socket.poll_read_ready(cx))?;
                if let Ok(accepted) = ready.try_io(|_| self.accept_waiting()) {
                    return Poll::Ready(accepted);
                }
            }
        })
        .await
    }

    /// Accepts a connection that is already waiting. It asks the kernel, since the event loop may not know of it yet.
    ///
    /// # Errors
    ///
    /// The error of accept(2): `WouldBlock` if none is waiting.
    fn accept_waiting(&self) -> io::Result<Accepted> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (socket, peer) = rustix::net::acceptfrom_with(&self.socket, flags)?;
        let Some(tcp) = &self.tcp else { return Ok(Accepted { socket, ends: None }) };
        let peer = peer.and_then(|peer| peer.try_into().ok()).ok_or(io::ErrorKind::InvalidData)?;
        tcp.never_delay(&socket);
        // The kernel does not know the address after the connection has closed.
        let local = tcp.local.or_else(|| SockRef::from(&socket).local_addr().ok()?.as_socket());
        Ok(Accepted { socket, ends: Some(TcpEnds { peer, local }) })
    }
}

impl Tcp {
    fn new(socket: &OwnedFd) -> io::Result<Tcp> {
        // Connections inherit the option, which saves a system call for each. Sockets of our own have it before they
        // listen, others may not. A failure only delays small responses.
        let has_older = AtomicBool::new(!SockRef::from(socket).tcp_nodelay().unwrap_or(false));
        let _ = SockRef::from(socket).set_tcp_nodelay(true);
        let local = SockRef::from(socket).local_addr()?.as_socket();
        let local = local.filter(|local| !local.ip().is_unspecified() && !is_transparent(socket, local));
        Ok(Tcp { local, has_older })
    }

    /// Sets TCP_NODELAY if the connection has not inherited it. The kernel queues connections in the order in which
    /// they were made, so the first one that has inherited it is the end of the older ones.
    fn never_delay(&self, connection: &OwnedFd) {
        if !self.has_older.load(Ordering::Relaxed) {
            return;
        }
        match SockRef::from(connection).tcp_nodelay() {
            Ok(true) => self.has_older.store(false, Ordering::Relaxed),
            // A failure means that the connection is gone again, which the first read finds as well.
            _ => _ = SockRef::from(connection).set_tcp_nodelay(true),
        }
    }
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
    use std::io::Read;

    use tokio::io::AsyncWriteExt;

    use super::*;

    fn listening(address: &str) -> (OwnedFd, SocketAddr) {
        let socket = std::net::TcpListener::bind(address).expect("a port");
        socket.set_nonblocking(true).expect("a socket");
        let port = socket.local_addr().expect("bound").port();
        (socket.into(), ([127, 0, 0, 1], port).into())
    }

    fn connect(address: SocketAddr) -> std::net::TcpStream {
        std::net::TcpStream::connect(address).expect("a connection")
    }

    fn is_nodelay(accepted: &Accepted) -> bool {
        SockRef::from(&accepted.socket).tcp_nodelay().expect("a socket")
    }

    #[tokio::test]
    async fn a_connection_sends_without_delay_and_knows_its_ends() {
        for (address, is_known) in [("127.0.0.1:0", true), ("0.0.0.0:0", false), ("[::]:0", false)] {
            let (socket, to) = listening(address);
            let open = Open::new(socket, false).expect("an event loop");
            assert_eq!(open.tcp.as_ref().expect("TCP").local.is_some(), is_known, "{address}");
            let client = connect(to);
            let accepted = open.accept().await.expect("a connection");
            assert!(is_nodelay(&accepted), "{address}");
            let ends = accepted.ends.expect("TCP");
            let canonical = |end: Option<SocketAddr>| end.map(|end| (end.ip().to_canonical(), end.port()));
            let expected = [client.local_addr(), client.peer_addr()].map(|end| canonical(end.ok()));
            assert_eq!([Some(ends.peer), ends.local].map(canonical), expected, "{address}");
            let mut watched = accepted.watch().expect("an event loop");
            assert_eq!([watched.peer(), watched.local()].map(canonical), expected, "{address}");
            watched.write_all(b"x").await.expect("a connection");
            (&client).read_exact(&mut [0]).expect("its byte");
        }
    }

    #[tokio::test]
    async fn connections_from_before_the_socket_was_opened_send_without_delay() {
        let (socket, to) = listening("127.0.0.1:0");
        let _older = [connect(to), connect(to)];
        let open = Open::new(socket, false).expect("an event loop");
        let _newer = [connect(to), connect(to)];
        for has_older in [true, true, false, false] {
            let accepted = open.accept().await.expect("a connection");
            assert!(is_nodelay(&accepted));
            assert_eq!(open.tcp.as_ref().expect("TCP").has_older.load(Ordering::Relaxed), has_older);
        }
    }

    #[tokio::test]
    async fn a_connection_that_waits_is_found_and_does_not_block() {
        let (socket, to) = listening("127.0.0.1:0");
        let open = Open::new(socket, false).expect("an event loop");
        let none = open.accept_waiting().map(|_| ()).map_err(|error| error.kind());
        assert_eq!(none, Err(io::ErrorKind::WouldBlock));
        let client = connect(to);
        let accepted = open.accept_waiting().expect("a connection");
        assert_eq!(accepted.ends.map(|ends| ends.peer), client.local_addr().ok());
        let read = std::net::TcpStream::from(accepted.socket).read(&mut [0]).map_err(|error| error.kind());
        assert_eq!(read, Err(io::ErrorKind::WouldBlock));
    }

    #[tokio::test]
    async fn a_connection_through_a_unix_socket_has_no_ends() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("web.sock");
        let socket = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
        socket.set_nonblocking(true).expect("a socket");
        let open = Open::new(socket.into(), true).expect("an event loop");
        let mut client = std::os::unix::net::UnixStream::connect(&path).expect("a connection");
        let accepted = open.accept().await.expect("a connection");
        assert_eq!(accepted.ends, None);
        let mut watched = accepted.watch().expect("an event loop");
        assert_eq!((watched.peer(), watched.local()), (None, None));
        watched.write_all(b"x").await.expect("a connection");
        client.read_exact(&mut [0]).expect("its byte");
    }
}
