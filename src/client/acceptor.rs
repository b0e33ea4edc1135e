//! Takes connections from the kernel: one task for each listening socket, on a worker.
//!
//! A socket outlives the listener that is written for it: when the configuration changes, connections that come in from
//! then on are those of the listener as it is written now.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use pingora::listeners::connection_filter::ConnectionFilter;
use pingora::protocols::l4::stream::Stream;
use pingora::protocols::{GetSocketDigest, SocketDigest};
use pingora::server::ShutdownWatch;
use socket2::SockRef;
use tokio::sync::watch;

use super::Front;
use super::connection::Listener;
use super::driver::Driven;
use super::lane::Door;

/// How long accepting rests when the system cannot give a connection: it would say so again at once.
const REST: Duration = Duration::from_millis(100);

/// A listening socket, and whose its connections are.
pub struct Acceptor {
    listener: ArcSwap<Listener>,
    /// `None` once its task has it.
    socket: Mutex<Option<OwnedFd>>,
    /// The same socket, for a process that takes over. It is closed with the other one, or clients would wait in vain.
    duplicate: Mutex<Option<OwnedFd>>,
    close: watch::Sender<Closing>,
    /// The file of a unix socket.
    file: Option<PathBuf>,
}

/// What becomes of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closing {
    /// Connections are accepted.
    Open,
    /// It is closed once those are served who have connected.
    Ends,
    /// Another process accepts them, also those that wait now.
    HandedOver,
}

/// A listening socket that a runtime watches.
pub enum Open {
    /// Of TCP.
    Tcp(tokio::net::TcpListener),
    /// A unix socket.
    Unix(tokio::net::UnixListener),
}

impl Acceptor {
    /// One for this socket, which is bound, listens and does not block. Its connections are those of this listener. The
    /// file of a unix socket is removed if nothing is ever accepted on it.
    ///
    /// # Errors
    ///
    /// The system has no further descriptor.
    pub fn new(socket: OwnedFd, listener: Arc<Listener>, file: Option<PathBuf>) -> io::Result<Arc<Acceptor>> {
        let (close, _) = watch::channel(Closing::Open);
        let duplicate = Mutex::new(Some(socket.try_clone()?));
        let socket = Mutex::new(Some(socket));
        Ok(Arc::new(Acceptor { listener: ArcSwap::new(listener), socket, duplicate, close, file }))
    }

    /// Whose connections come in now.
    pub fn listener(&self) -> Arc<Listener> {
        self.listener.load_full()
    }

    /// Connections that come in from now on are those of this listener.
    pub fn set_listener(&self, listener: Arc<Listener>) {
        self.listener.store(listener);
    }

    /// Has the socket closed, once those are served who had connected before.
    pub fn close(&self) {
        self.close.send_replace(Closing::Ends);
    }

    /// Another process accepts the connections from now on, those that wait among them.
    pub fn give_up(&self) {
        self.close.send_replace(Closing::HandedOver);
    }

    /// The socket once more, for another process; `None` if it is closed.
    ///
    /// # Errors
    ///
    /// The system has no further descriptor.
    pub fn duplicate(&self) -> io::Result<Option<OwnedFd>> {
        let duplicate = self.duplicate.lock().unwrap_or_else(PoisonError::into_inner);
        duplicate.as_ref().map(OwnedFd::try_clone).transpose()
    }

    /// Accepts connections and hands them to `front` until the socket is to be closed, or `stop` says so.
    pub async fn run<P>(self: Arc<Self>, front: Arc<Front<P>>, door: Arc<Door>, mut stop: ShutdownWatch)
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
        loop {
            let accepted = tokio::select! {
                accepted = open.accept() => accepted,
                _ = stop.wait_for(|stop| *stop) => break,
                _ = closed.wait_for(|closing| *closing != Closing::Open) => break,
            };
            match accepted {
                Ok(stream) => {
                    tokio::select! {
                        _ = door.should_accept(None) => {}
                        _ = stop.wait_for(|stop| *stop) => {}
                    }
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
        // Clients that have connected already must not be reset.
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
            tracing::debug!(%error, "a connection that was accepted is gone");
            return;
        }
        // It has no buffers: `client::stream` gathers writes itself, and gives its own back between requests.
        let (front, listener, stop) = (front.clone(), self.listener(), stop.clone());
        pingora_runtime::current_handle().spawn(async move { front.receive(Box::new(stream), &listener, &stop).await });
    }
}

impl Drop for Acceptor {
    /// A configuration that was tried and not put on leaves nothing behind.
    fn drop(&mut self) {
        let unused = self.socket.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let (Some(_), Some(file)) = (unused, &self.file) {
            // The receiver may be gone already.
            let _ = std::fs::remove_file(file);
        }
    }
}

impl Open {
    /// Has the runtime of this thread watch a socket that listens and does not block.
    ///
    /// # Errors
    ///
    /// The runtime cannot watch it.
    pub fn new(socket: OwnedFd, unix: bool) -> io::Result<Open> {
        Ok(match unix {
            true => Open::Unix(tokio::net::UnixListener::from_std(socket.into())?),
            false => Open::Tcp(tokio::net::TcpListener::from_std(socket.into())?),
        })
    }

    /// The next connection.
    ///
    /// # Errors
    ///
    /// What accept(2) says.
    pub async fn accept(&self) -> io::Result<Stream> {
        Ok(match self {
            Open::Tcp(socket) => {
                let (stream, peer) = socket.accept().await?;
                with_digest(stream.into(), Some(peer))
            }
            Open::Unix(socket) => with_digest(socket.accept().await?.0.into(), None),
        })
    }

    /// One that waits already, if any does. It asks the kernel: the runtime may not have heard of it yet.
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

/// Notes who connected, which cannot be asked of a connection that is gone again.
fn with_digest(mut stream: Stream, peer: Option<SocketAddr>) -> Stream {
    let digest = SocketDigest::from_raw_fd(stream.as_raw_fd());
    if let Some(peer) = peer {
        // It was made just now and holds none.
        let _ = digest.peer_addr.set(Some(peer.into()));
    }
    stream.set_socket_digest(digest);
    stream
}

/// Whether what the system lacks for one connection it lacks for the next as well (accept(2)).
fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}
