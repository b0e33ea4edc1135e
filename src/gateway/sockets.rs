//! The listening sockets, bound before anything runs: an address that is taken is a clear error and not a panic of a
//! thread, and a port chosen by the system is known.
//!
//! Listeners accept on theirs themselves (`client/acceptor.rs`). Pingora is handed that of the admin endpoint the way
//! it would take it over from an older process.

use std::fs::{self, Permissions};
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use async_trait::async_trait;
use pingora::server::{ListenFds, RuntimeOpts, ShutdownWatch};
use pingora::services::Service;

use crate::config::Address;
use crate::config::units::FileMode;

/// Connections that may wait in the kernel to be accepted, as Pingora sets it too.
const BACKLOG: i32 = 65_535;

/// A bound socket and what Pingora knows it by.
pub struct Socket {
    /// The TCP address it was bound to; `None` for a unix socket.
    pub tcp: Option<SocketAddr>,
    /// The address in Pingora's form.
    key: String,
    /// The mode of its file, if it is a unix socket.
    unix: Option<Permissions>,
    fd: OwnedFd,
}

impl Socket {
    /// Binds and listens. A unix socket without a listening process is replaced; a live one is an error. Its file
    /// has this mode before anybody can connect to it.
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
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        let bound = socket.local_addr()?.as_socket();
        let key = bound.unwrap_or(address).to_string();
        Ok(Socket { tcp: bound, key, unix: None, fd: socket.into() })
    }

    fn bind_unix(path: &str, mode: FileMode) -> io::Result<Socket> {
        use socket2::{Domain, SockAddr, Type};
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => return Err(io::ErrorKind::AlreadyExists.into()),
            Ok(_) if UnixStream::connect(path).is_ok() => return Err(io::ErrorKind::AddrInUse.into()),
            Ok(_) => fs::remove_file(path)?,
            // There is none, or `bind` says what is wrong.
            Err(_) => {}
        }
        let socket = socket2::Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.bind(&SockAddr::unix(path)?)?;
        // No client can connect before it listens, so that neither the umask of the process nor the moment in between
        // matters.
        let permissions = Permissions::from_mode(mode.0);
        fs::set_permissions(path, permissions.clone())?;
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        Ok(Socket { tcp: None, key: path.to_owned(), unix: Some(permissions), fd: socket.into() })
    }

    /// The address in Pingora's form.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The socket itself.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// The mode of its file, if it is a unix socket.
    pub fn permissions(&self) -> Option<Permissions> {
        self.unix.clone()
    }
}

/// Where a listener was bound to.
#[derive(Clone)]
pub struct Place {
    /// The name of the listener; `admin` is the admin endpoint.
    pub listener: String,
    /// The address as bound: with the port that the system chose, or the path of a unix socket.
    pub address: String,
    /// The TCP address.
    pub tcp: Option<SocketAddr>,
    /// The file of a unix socket, which is to be removed when nothing listens any more.
    pub file: Option<PathBuf>,
}

impl Place {
    /// Where `listener` was bound to.
    pub fn of(listener: &str, socket: &Socket) -> Self {
        Place {
            listener: listener.to_owned(),
            address: socket.key.clone(),
            tcp: socket.tcp,
            file: socket.unix.is_some().then(|| PathBuf::from(&socket.key)),
        }
    }
}

/// A Pingora service that is given its bound sockets.
pub struct Bound<S> {
    service: S,
    sockets: Vec<(String, RawFd)>,
}

impl<S> Bound<S> {
    /// Gives `service` its sockets.
    pub fn new(service: S, sockets: Vec<Socket>) -> Self {
        let sockets = sockets.into_iter().map(|socket| (socket.key, socket.fd.into_raw_fd())).collect();
        Bound { service, sockets }
    }
}

#[async_trait]
impl<S: Service> Service for Bound<S> {
    async fn start_service(&mut self, fds: Option<ListenFds>, shutdown: ShutdownWatch, listeners_per_fd: usize) {
        if let Some(fds) = &fds {
            let mut fds = fds.lock();
            for (key, fd) in self.sockets.drain(..) {
                fds.add(key, fd);
            }
        }
        self.service.start_service(fds, shutdown, listeners_per_fd).await;
    }

    fn name(&self) -> &str {
        self.service.name()
    }

    fn threads(&self) -> Option<usize> {
        self.service.threads()
    }

    fn runtime_opts_override(&self, global: &RuntimeOpts) -> Option<RuntimeOpts> {
        self.service.runtime_opts_override(global)
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
            assert_eq!((found, socket.permissions().map(|mode| mode.mode())), (mode.0, Some(mode.0)));
        }
    }
}
