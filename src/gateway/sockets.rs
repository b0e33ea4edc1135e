//! The listening sockets. They are bound before anything runs, so that an address in use is a clear error and not a
//! panic of a thread, and a port chosen by the system is known.
//!
//! A socket that was open before this process started is used instead of a new one (`inherited.rs`). Listeners
//! accept through `client/acceptor.rs`, the admin endpoint through `reception.rs`.

use std::fs::{self, Permissions};
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::admin::reception::Reception;
use crate::client::acceptor::Acceptor;
use crate::config::Address;
use crate::config::units::FileMode;

/// Limit on connections that wait in the kernel to be accepted, as in Pingora.
const BACKLOG: i32 = 65_535;

/// The process that opened an inherited socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Opener {
    /// The service manager, which keeps it open and owns the file of a unix socket.
    ServiceManager,
    /// The previous process.
    Predecessor,
}

/// A bound socket.
pub struct Socket {
    /// The TCP address it was bound to; `None` for a unix socket.
    pub tcp: Option<SocketAddr>,
    /// The address as text: TCP address or path.
    address: String,
    /// The file mode, for a unix socket.
    unix: Option<FileMode>,
    /// The process that opened it, if not this one.
    opener: Option<Opener>,
    fd: OwnedFd,
}

impl Socket {
    /// Binds and listens. A stale unix socket is replaced; one in use is an error. Its file gets this mode before
    /// clients can connect.
    pub fn bind(address: &Address, mode: FileMode) -> io::Result<Socket> {
        match address.unix_path() {
            Some(path) => Self::bind_unix(path, mode),
            None => Self::bind_tcp(&address.0),
        }
    }

    fn bind_tcp(address: &str) -> io::Result<Socket> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in address.to_socket_addrs()? {
            match Self::listen_tcp(address) {
                Ok(socket) => return Ok(socket),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn listen_tcp(address: SocketAddr) -> io::Result<Socket> {
        use socket2::{Domain, Type};
        let socket = socket2::Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        // Connections inherit it, also those that come before the listener accepts.
        socket.set_tcp_nodelay(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        let bound = socket.local_addr()?.as_socket();
        let address = bound.unwrap_or(address).to_string();
        Ok(Socket { tcp: bound, address, unix: None, opener: None, fd: socket.into() })
    }

    fn bind_unix(path: &str, mode: FileMode) -> io::Result<Socket> {
        use socket2::{Domain, SockAddr, Type};
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => return Err(io::ErrorKind::AlreadyExists.into()),
            Ok(_) if UnixStream::connect(path).is_ok() => return Err(io::ErrorKind::AddrInUse.into()),
            Ok(_) => fs::remove_file(path)?,
            // The file does not exist, or `bind` will report the error.
            Err(_) => {}
        }
        let socket = socket2::Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.bind(&SockAddr::unix(path)?)?;
        // Clients cannot connect before it listens, so neither the umask nor the time in between matters.
        fs::set_permissions(path, Permissions::from_mode(mode.0))?;
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        let address = path.to_owned();
        Ok(Socket { tcp: None, address, unix: Some(mode), opener: None, fd: socket.into() })
    }

    /// A socket that was already open: TCP, or a unix socket with a path and the mode for its file.
    pub fn inherited(tcp: Option<SocketAddr>, unix: Option<(String, FileMode)>, opener: Opener, fd: OwnedFd) -> Socket {
        let (path, mode) = unix.unzip();
        let address = path.or_else(|| Some(tcp?.to_string())).unwrap_or_default();
        Socket { tcp, address, unix: mode, opener: Some(opener), fd }
    }

    /// The descriptor.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Whether it is a unix socket.
    pub fn is_unix(&self) -> bool {
        self.unix.is_some()
    }

    /// Whether this process opened it.
    pub fn is_own(&self) -> bool {
        self.opener.is_none()
    }
}

/// The bound address of a listener.
#[derive(Clone)]
pub struct Place {
    /// The name of the listener; `admin` is the admin endpoint.
    pub listener: String,
    /// The address as written.
    pub written: String,
    /// The bound address, with the port chosen by the system, or the path of a unix socket.
    pub address: String,
    /// The TCP address.
    pub tcp: Option<SocketAddr>,
    /// The file of a unix socket, to be removed when no process listens any more, and its mode. `None` for a socket
    /// of the service manager, which owns the file.
    pub file: Option<(PathBuf, FileMode)>,
    /// Whether the service manager opened it.
    pub is_managers: bool,
    /// Whether this process opened it.
    pub is_own: bool,
}

impl Place {
    /// The bound address of `listener`.
    pub fn of(listener: &str, written: &Address, socket: &Socket) -> Self {
        let is_managers = socket.opener == Some(Opener::ServiceManager);
        Place {
            listener: listener.to_owned(),
            written: written.0.clone(),
            address: socket.address.clone(),
            tcp: socket.tcp,
            file: socket.unix.filter(|_| !is_managers).map(|mode| (PathBuf::from(&socket.address), mode)),
            is_managers,
            is_own: socket.is_own(),
        }
    }
}

/// A listening socket and its acceptor.
#[derive(Clone)]
pub struct OpenSocket {
    /// The address.
    pub place: Place,
    /// The acceptor.
    pub acceptor: SocketAcceptor,
}

/// The acceptor of a socket.
#[derive(Clone)]
pub enum SocketAcceptor {
    /// A listener.
    Listener(Arc<Acceptor>),
    /// The admin endpoint.
    Admin(Arc<Reception>),
}

impl SocketAcceptor {
    /// A duplicate of the socket, for another process; `None` if it is closed.
    ///
    /// # Errors
    ///
    /// The system has no descriptor left.
    pub fn duplicate(&self) -> io::Result<Option<OwnedFd>> {
        match self {
            SocketAcceptor::Listener(acceptor) => acceptor.duplicate(),
            SocketAcceptor::Admin(reception) => reception.duplicate(),
        }
    }

    /// Lets another process accept the connections from now on.
    pub fn hand_over(&self) {
        match self {
            SocketAcceptor::Listener(acceptor) => acceptor.give_up(),
            SocketAcceptor::Admin(reception) => reception.close(),
        }
    }

    /// Whether it accepts no more client connections.
    pub fn has_left(&self) -> bool {
        match self {
            SocketAcceptor::Listener(acceptor) => acceptor.duplicate().is_ok_and(|open| open.is_none()),
            SocketAcceptor::Admin(_) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_of_the_systems_choice_is_known_and_a_taken_one_is_an_error() {
        let first = Socket::bind(&"127.0.0.1:0".parse().expect("an address"), FileMode::default()).expect("a socket");
        let address = first.tcp.expect("a TCP address");
        assert_ne!(address.port(), 0);
        let again = Socket::bind(&address.to_string().parse().expect("an address"), FileMode::default()).map(|_| ());
        assert_eq!(again.map_err(|error| error.kind()), Err(io::ErrorKind::AddrInUse));
    }

    #[test]
    fn a_dead_unix_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("web.sock");
        let address: Address = format!("unix:{}", path.display()).parse().expect("an address");
        let live = Socket::bind(&address, FileMode::default()).expect("a socket");
        let again = Socket::bind(&address, FileMode::default()).map(|_| ());
        assert_eq!(again.map_err(|error| error.kind()), Err(io::ErrorKind::AddrInUse));
        drop(live);
        assert!(Socket::bind(&address, FileMode::default()).is_ok());
    }

    #[test]
    fn what_is_no_socket_is_left_where_it_is() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let address: Address = format!("unix:{}", file.path().display()).parse().expect("an address");
        let bound = Socket::bind(&address, FileMode::default()).map(|_| ());
        assert_eq!(bound.map_err(|error| error.kind()), Err(io::ErrorKind::AlreadyExists));
        assert!(file.path().exists());
    }

    #[test]
    fn a_unix_socket_is_for_its_owner_and_its_group_unless_told_otherwise() {
        let folder = tempfile::tempdir().expect("a folder");
        for mode in [FileMode::default(), FileMode(0o600), FileMode(0o666)] {
            let path = folder.path().join(format!("{mode}.sock"));
            let address: Address = format!("unix:{}", path.display()).parse().expect("an address");
            let socket = Socket::bind(&address, mode).expect("a socket");
            let found = fs::metadata(&path).expect("its file").permissions().mode() & 0o777;
            assert_eq!((found, socket.is_unix(), socket.is_own()), (mode.0, true, true));
        }
    }
}
