//! Makes connections to an endpoint: TCP or a unix socket, one or two addresses, with an optional PROXY protocol
//! header.
//!
//! Pingora calls it instead of its own connector, which supports one address and no header; Pingora adds TLS. It
//! also counts connections, from the attempt to their end.

use std::fmt;
use std::io;
use std::net;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use async_trait::async_trait;
use pingora::connectors::L4Connect;
use pingora::protocols::l4::socket::SocketAddr;
use pingora::protocols::l4::stream::Stream;
use pingora::upstreams::peer::{Tracer, Tracing};
use pingora::{Error, ErrorType, Result};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream, UnixStream};

use super::Connections;
use super::happy_eyeballs::{Pair, race};
use crate::eventloop::worker;
use crate::upstream::window;

/// Delay before the second address is tried as well (RFC 8305 §5).
const HEAD_START: Duration = Duration::from_millis(250);

/// The gateway itself lacks descriptors, ports or memory: this says nothing about the endpoint.
pub const EXHAUSTED: ErrorType = ErrorType::new("no resources for a connection");

/// Connections for clients do not use descriptors from here on: the last ones are reserved for the admin endpoint,
/// health checks, look-ups and Forebay's own files. Process-wide, like the limit of open files.
static FOR_CLIENTS_BELOW: AtomicI32 = AtomicI32::new(i32::MAX);

/// Reserves the descriptors from this one on.
pub fn leave_descriptors_from(first: RawFd) {
    FOR_CLIENTS_BELOW.store(first, Ordering::Relaxed);
}

/// Whether a new socket may be used. The kernel assigns the lowest free number.
fn is_to_spare(socket: RawFd) -> io::Result<()> {
    // Only work for clients runs on workers.
    let reserved = socket >= FOR_CLIENTS_BELOW.load(Ordering::Relaxed) && worker::here().is_some();
    if reserved { Err(io::Error::from_raw_os_error(libc::EMFILE)) } else { Ok(()) }
}

/// Makes the connections to one endpoint.
pub struct Dialer {
    connections: Arc<Connections>,
    /// The initial receive buffer; `None`: the kernel's default.
    receive_bytes: Option<usize>,
    head_start: Duration,
    proxy_header: Option<Box<[u8]>>,
    pair: ArcSwapOption<Pair>,
    retired: AtomicBool,
}

impl Dialer {
    /// A dialer for a single address, which is passed with each call.
    pub(super) fn new(
        connections: Arc<Connections>,
        receive_bytes: Option<usize>,
        timeout: Duration,
        proxy_header: Option<Box<[u8]>>,
    ) -> Dialer {
        let (head_start, pair) = (HEAD_START.min(timeout / 2), ArcSwapOption::empty());
        Dialer { connections, receive_bytes, head_start, proxy_header, pair, retired: AtomicBool::new(false) }
    }

    /// Whether its endpoint was removed: idle connections need not be kept.
    pub fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Relaxed)
    }

    /// Sets whether its endpoint was removed.
    pub(in crate::upstream) fn set_retired(&self, retired: bool) {
        self.retired.store(retired, Ordering::Relaxed);
    }

    /// A copy with another PROXY protocol header.
    pub(super) fn proxy_header(&self, proxy_header: Box<[u8]>) -> Dialer {
        Dialer {
            connections: self.connections.clone(),
            receive_bytes: self.receive_bytes,
            head_start: self.head_start,
            proxy_header: Some(proxy_header),
            pair: ArcSwapOption::from(self.pair.load_full()),
            retired: AtomicBool::new(self.is_retired()),
        }
    }

    /// Sets the `alternate` address of the endpoint at `address`. The state of an unchanged pair is kept.
    pub(in crate::upstream) fn set_pair(&self, address: &SocketAddr, alternate: Option<net::SocketAddr>, now: Instant) {
        let Some((first, second)) = address.as_inet().copied().zip(alternate) else {
            self.pair.store(None);
            return;
        };
        if !self.pair.load().as_ref().is_some_and(|pair| pair.is(first, second)) {
            self.pair.store(Some(Arc::new(Pair::new(first, second, now))));
        }
    }

    /// The address to try first, if there are two.
    pub(in crate::upstream) fn preferred(&self) -> Option<net::SocketAddr> {
        self.pair.load().as_ref().map(|pair| pair.preferred(Instant::now()))
    }

    async fn tcp(&self, address: net::SocketAddr) -> io::Result<TcpStream> {
        let Some(pair) = self.pair.load_full() else { return self.tcp_to(address).await };
        let other = pair.other(address);
        let (stream, other_won) = race(self.tcp_to(address), self.tcp_to(other), self.head_start).await?;
        if other_won {
            pair.prefer(other, Instant::now());
        }
        Ok(stream)
    }

    async fn tcp_to(&self, address: net::SocketAddr) -> io::Result<TcpStream> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        is_to_spare(socket.as_raw_fd())?;
        if let Some(bytes) = self.receive_bytes {
            window::narrow(socket.as_raw_fd(), bytes);
        }
        let stream = socket.connect(address).await.map_err(|error| without_ports(error, address))?;
        if self.receive_bytes.is_some() {
            window::put_off_tuning(stream.as_raw_fd());
        }
        Ok(stream)
    }

    /// Connects to `address` for Forebay's own driver.
    ///
    /// # Errors
    ///
    /// The error types of Pingora's connector, and [`EXHAUSTED`].
    pub async fn open(&self, address: &SocketAddr) -> Result<Opened> {
        let open = Open::new(&self.connections);
        let socket = self.dial(address).await.map_err(|error| told(address, error))?;
        Ok(Opened { socket, _open: open })
    }

    async fn dial(&self, address: &SocketAddr) -> io::Result<Socket> {
        // The header fits into the empty send buffer of a new socket, so one write is enough.
        let proxy_header = self.proxy_header.as_deref().unwrap_or_default();
        match address {
            SocketAddr::Inet(address) => {
                let mut stream = self.tcp(*address).await?;
                stream.write_all(proxy_header).await?;
                Ok(Socket::Tcp(stream))
            }
            SocketAddr::Unix(address) => {
                let path = address.as_pathname().ok_or(io::ErrorKind::AddrNotAvailable)?;
                let mut stream = UnixStream::connect(path).await?;
                is_to_spare(stream.as_raw_fd())?;
                stream.write_all(proxy_header).await?;
                Ok(Socket::Unix(stream))
            }
        }
    }
}

/// The socket of a connection to an endpoint.
#[derive(Debug)]
pub enum Socket {
    /// Over TCP.
    Tcp(TcpStream),
    /// A unix socket.
    Unix(UnixStream),
}

impl From<Socket> for Stream {
    fn from(socket: Socket) -> Stream {
        match socket {
            Socket::Tcp(stream) => stream.into(),
            Socket::Unix(stream) => stream.into(),
        }
    }
}

/// A connection of Forebay's own driver, counted for its upstream until it is dropped.
#[derive(Debug)]
pub struct Opened {
    /// The socket.
    pub socket: Socket,
    _open: Open,
}

#[async_trait]
impl L4Connect for Dialer {
    async fn connect(&self, address: &SocketAddr) -> Result<Stream> {
        let open = Open::new(&self.connections);
        let mut stream = Stream::from(self.dial(address).await.map_err(|error| told(address, error))?);
        stream.tracer = Some(Tracer(Box::new(open)));
        Ok(stream)
    }
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dialer").field("pair", &self.pair).finish_non_exhaustive()
    }
}

/// Maps errors to the types of Pingora's connector, and [`EXHAUSTED`].
fn told(address: &SocketAddr, error: io::Error) -> Box<Error> {
    use io::ErrorKind;
    let kind = match error.kind() {
        _ if is_own(&error) => EXHAUSTED,
        ErrorKind::ConnectionRefused => ErrorType::ConnectRefused,
        ErrorKind::TimedOut => ErrorType::ConnectTimedout,
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => ErrorType::ConnectNoRoute,
        _ => ErrorType::ConnectError,
    };
    Error::because(kind, format!("connecting to {address}"), error)
}

/// Whether the system lacked a resource: a descriptor, memory, or a port.
fn is_own(error: &io::Error) -> bool {
    const OWN: [libc::c_int; 5] = [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM, libc::EADDRNOTAVAIL];
    error.raw_os_error().is_some_and(|code| OWN.contains(&code))
}

/// `EADDRNOTAVAIL` means that no local port is free, or that this machine has no address to reach the target from,
/// such as with IPv6 turned off. In the second case a UDP connect also fails, and the endpoint counts as
/// unreachable.
fn without_ports(error: io::Error, to: net::SocketAddr) -> io::Error {
    if error.raw_os_error() != Some(libc::EADDRNOTAVAIL) {
        return error;
    }
    let any = if to.is_ipv4() { net::IpAddr::from([0; 4]) } else { net::IpAddr::from([0; 16]) };
    let socket = net::UdpSocket::bind((any, 0));
    match socket.and_then(|socket| socket.connect(to)) {
        Err(way) if way.raw_os_error() == Some(libc::EADDRNOTAVAIL) => io::ErrorKind::NetworkUnreachable.into(),
        _ => error,
    }
}

/// Counts a connection from the attempt to its end: Pingora stores it in the stream.
#[derive(Debug)]
struct Open(Arc<Connections>);

impl Open {
    fn new(connections: &Arc<Connections>) -> Open {
        connections.open.fetch_add(1, Ordering::Relaxed);
        connections.gauge.inc();
        Open(connections.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
        self.0.gauge.dec();
    }
}

/// Only its lifetime matters.
impl Tracing for Open {
    fn on_connected(&self) {}

    fn on_disconnected(&self) {}

    fn boxed_clone(&self) -> Box<dyn Tracing> {
        Box::new(Open::new(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(code: i32) -> ErrorType {
        told(&SocketAddr::Inet("10.0.0.1:80".parse().unwrap()), io::Error::from_raw_os_error(code)).etype.clone()
    }

    #[test]
    fn what_this_machine_lacks_is_not_held_against_an_endpoint() {
        for code in [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM, libc::EADDRNOTAVAIL] {
            assert_eq!(kind(code), EXHAUSTED, "{}", io::Error::from_raw_os_error(code));
        }
        assert_eq!(kind(libc::ECONNREFUSED), ErrorType::ConnectRefused);
        assert_eq!(kind(libc::ETIMEDOUT), ErrorType::ConnectTimedout);
        assert_eq!(kind(libc::ENETUNREACH), ErrorType::ConnectNoRoute);
        // The backlog of a unix socket is full: a failure of the endpoint.
        assert_eq!(kind(libc::EAGAIN), ErrorType::ConnectError);
    }

    #[test]
    fn a_port_is_missing_only_where_there_is_a_way() {
        let missing = || io::Error::from_raw_os_error(libc::EADDRNOTAVAIL);
        let here = "127.0.0.1:9".parse().unwrap();
        assert_eq!(without_ports(missing(), here).raw_os_error(), Some(libc::EADDRNOTAVAIL));
        let refused = io::Error::from_raw_os_error(libc::ECONNREFUSED);
        assert_eq!(without_ports(refused, here).raw_os_error(), Some(libc::ECONNREFUSED));
    }
}
