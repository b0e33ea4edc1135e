//! Listening sockets that were open before this process started: from a service manager (`LISTEN_FDS`,
//! sd_listen_fds(3)), or from the process it takes over from.
//!
//! A listener uses the open socket at its address instead of binding a new one. Sockets of the service manager are
//! never dropped: the manager holds them open, so a listener that is removed and added again could not bind the
//! address.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use socket2::SockRef;

use crate::config::Address;
use crate::config::units::FileMode;

use super::lock;
use super::sockets::{Opener, Socket};

/// The first descriptor that a service manager passes (sd_listen_fds(3)).
const FIRST: RawFd = 3;

/// The default limit of descriptors per process on Linux (`fs.nr_open`, proc(5)).
const PASSED_MAX: usize = 1 << 20;

/// Open sockets that wait for a listener. Clones share them.
#[derive(Clone, Default)]
pub struct Inherited(Arc<Mutex<Vec<InheritedSocket>>>);

/// One inherited socket.
struct InheritedSocket {
    label: Label,
    opener: Opener,
    bound: Bound,
    fd: OwnedFd,
    used: bool,
}

/// The label of a socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Label {
    /// The listener that used it, or the name from the service manager.
    pub listener: String,
    /// The address as written for that listener; empty if unknown.
    pub written: String,
}

/// The bound address of a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Bound {
    Tcp {
        address: SocketAddr,
        /// An IPv6 socket that does not accept IPv4.
        only_v6: bool,
    },
    Unix(PathBuf),
}

impl Inherited {
    /// The sockets that the service manager passes through the environment. Call it once, before anything else
    /// opens descriptors from 3 on.
    ///
    /// # Errors
    ///
    /// A descriptor is not a listening socket, or the variables contradict each other.
    pub fn of_service_manager() -> Result<Inherited, String> {
        let inherited = Inherited::default();
        let passed = passed(|name| std::env::var(name).ok(), std::process::id())?;
        for (index, name) in passed.into_iter().enumerate() {
            let number = FIRST + RawFd::try_from(index).map_err(|error| error.to_string())?;
            // SAFETY: the call has no pointers, and any number is valid.
            if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
                let error = io::Error::last_os_error();
                return Err(format!("LISTEN_FDS names descriptor {number}, which is not open: {error}"));
            }
            // SAFETY: the service manager opened it for this process, which owns it from now on.
            let fd = unsafe { OwnedFd::from_raw_fd(number) };
            let label = Label { listener: name, written: String::new() };
            inherited
                .add(label, Opener::ServiceManager, fd)
                .map_err(|why| format!("LISTEN_FDS names descriptor {number}, which cannot be a listener: {why}"))?;
        }
        Ok(inherited)
    }

    /// Adds a socket.
    ///
    /// # Errors
    ///
    /// It is not a listening TCP or unix socket.
    pub fn add(&self, label: Label, opener: Opener, fd: OwnedFd) -> Result<(), String> {
        let bound = bound(fd.as_fd())?;
        SockRef::from(&fd).set_nonblocking(true).map_err(|error| error.to_string())?;
        lock(&self.0).push(InheritedSocket { label, opener, bound, fd, used: false });
        Ok(())
    }

    /// Opens a socket for a listener: an inherited one at its address, else a new one.
    ///
    /// # Errors
    ///
    /// The address cannot be bound.
    pub fn open(&self, listener: &str, address: &Address, mode: FileMode) -> io::Result<Socket> {
        match self.take(listener, address, mode) {
            Some(taken) => taken,
            None => Socket::bind(address, mode),
        }
    }

    fn take(&self, listener: &str, address: &Address, mode: FileMode) -> Option<io::Result<Socket>> {
        let mut inherited_sockets = lock(&self.0);
        // A name is resolved only if there are inherited sockets to compare with.
        let resolved = match (address.unix_path(), inherited_sockets.is_empty()) {
            (None, false) => address.0.to_socket_addrs().map(Iterator::collect).unwrap_or_default(),
            _ => Vec::new(),
        };
        let wanted = Wanted { listener, address, resolved };
        let best = (0..inherited_sockets.len()).filter_map(|index| {
            let InheritedSocket { label, bound, .. } = &inherited_sockets[index];
            Some((wanted.closeness(label, bound)?, index))
        });
        let (_, index) = best.min()?;
        let (tcp, unix) = match &inherited_sockets[index].bound {
            Bound::Tcp { address, .. } => (Some(*address), None),
            Bound::Unix(path) => (None, Some((path.display().to_string(), mode))),
        };
        let opener = inherited_sockets[index].opener;
        let fd = match opener {
            Opener::ServiceManager => {
                inherited_sockets[index].used = true;
                inherited_sockets[index].fd.try_clone()
            }
            Opener::Predecessor => Ok(inherited_sockets.remove(index).fd),
        };
        Some(fd.map(|fd| Socket::inherited(tcp, unix, opener, fd)))
    }

    /// The service manager's sockets, for the next process.
    ///
    /// # Errors
    ///
    /// The system has no descriptor left.
    pub fn of_manager(&self) -> io::Result<Vec<(Label, OwnedFd)>> {
        let inherited_sockets = lock(&self.0);
        let passed = inherited_sockets.iter().filter(|one| one.opener == Opener::ServiceManager);
        passed.map(|one| Ok((one.label.clone(), one.fd.try_clone()?))).collect()
    }

    /// Reports unused sockets once all listeners are open, and closes those of the previous process; returns the
    /// files of its unix sockets.
    pub fn settle(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        lock(&self.0).retain(|InheritedSocket { label, opener, bound, used, .. }| {
            match opener {
                Opener::ServiceManager if !used => tracing::warn!(
                    name = label.listener,
                    address = bound.shown(),
                    "no listener has the address of this socket, which the service manager has opened"
                ),
                Opener::ServiceManager => {}
                Opener::Predecessor => {
                    let (listener, address) = (&label.listener, bound.shown());
                    tracing::info!(listener, address, "no longer listening");
                    if let Bound::Unix(path) = bound {
                        files.push(path.clone());
                    }
                }
            }
            *opener == Opener::ServiceManager
        });
        files
    }
}

/// The names of the sockets in these variables (sd_listen_fds_with_names(3)).
fn passed(variable: impl Fn(&str) -> Option<String>, own: u32) -> Result<Vec<String>, String> {
    // The variables may be meant for a parent process.
    if variable("LISTEN_PID").is_none_or(|pid| pid.trim() != own.to_string()) {
        return Ok(Vec::new());
    }
    let written = variable("LISTEN_FDS").unwrap_or_default();
    let count: usize =
        written.trim().parse().map_err(|_| format!("LISTEN_FDS is `{written}`, which is not a number"))?;
    if count > PASSED_MAX {
        return Err(format!("LISTEN_FDS is {count}: a process has no more than {PASSED_MAX} descriptors"));
    }
    let mut names: Vec<String> = match variable("LISTEN_FDNAMES") {
        Some(names) if !names.is_empty() => names.split(':').map(str::to_owned).collect(),
        _ => Vec::new(),
    };
    if names.len() > count {
        return Err(format!("LISTEN_FDNAMES has {} names for {count} sockets", names.len()));
    }
    names.resize(count, "unknown".to_owned());
    Ok(names)
}

/// The bound address of a listening socket.
fn bound(fd: BorrowedFd<'_>) -> Result<Bound, String> {
    let socket = SockRef::from(&fd);
    let said = |error: io::Error| error.to_string();
    if socket.r#type().map_err(said)? != socket2::Type::STREAM {
        return Err("it is not a stream socket".to_owned());
    }
    if !listens(fd).map_err(said)? {
        return Err("it does not listen (`Accept=no` is needed in a socket unit)".to_owned());
    }
    let address = socket.local_addr().map_err(said)?;
    if let Some(address) = address.as_socket() {
        let only_v6 = address.is_ipv6() && socket.only_v6().map_err(said)?;
        return Ok(Bound::Tcp { address, only_v6 });
    }
    match address.as_pathname() {
        Some(path) => Ok(Bound::Unix(path.to_owned())),
        None => Err("it is neither a TCP socket nor a unix socket with a path".to_owned()),
    }
}

/// Whether the socket is listening (SO_ACCEPTCONN, socket(7)).
fn listens(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut value: libc::c_int = 0;
    let mut length = libc::socklen_t::try_from(size_of::<libc::c_int>()).map_err(io::Error::other)?;
    // SAFETY: the pointers are to a number and its length, which outlive the call.
    let failed = unsafe {
        let value = (&raw mut value).cast();
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ACCEPTCONN, value, &raw mut length)
    };
    if failed == 0 { Ok(value != 0) } else { Err(io::Error::last_os_error()) }
}

impl Bound {
    fn shown(&self) -> String {
        match self {
            Bound::Tcp { address, .. } => address.to_string(),
            Bound::Unix(path) => format!("unix:{}", path.display()),
        }
    }
}

/// A listener that needs a socket.
struct Wanted<'a> {
    listener: &'a str,
    address: &'a Address,
    /// The resolved host of the address.
    resolved: Vec<SocketAddr>,
}

impl Wanted<'_> {
    /// How well a socket matches; smaller is better. `None`: not at all.
    fn closeness(&self, label: &Label, bound: &Bound) -> Option<u8> {
        let any_port = self.address.port() == Some(0);
        let same_name = label.listener == self.listener;
        if label.written == self.address.0 && (!any_port || same_name) {
            return Some(if same_name { 0 } else { 1 });
        }
        match bound {
            Bound::Unix(path) => (self.address.unix_path().map(Path::new) == Some(path)).then_some(2),
            // A listener with port 0 wants a free port.
            Bound::Tcp { .. } if any_port => None,
            Bound::Tcp { address, .. } if self.resolved.contains(address) => Some(2),
            // A dual-stack socket also takes the connections of the other family, whose address could not be bound.
            Bound::Tcp { address, only_v6: false } => {
                let every_v4 = |wanted: &SocketAddr| {
                    wanted.is_ipv4() && wanted.ip().is_unspecified() && wanted.port() == address.port()
                };
                let covers = address.is_ipv6() && address.ip().is_unspecified() && self.resolved.iter().any(every_v4);
                covers.then_some(3)
            }
            Bound::Tcp { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::unix::net::UnixListener;

    use super::*;

    fn passed_by(variables: &[(&str, &str)]) -> Result<Vec<String>, String> {
        let variable = |name: &str| variables.iter().find(|(of, _)| *of == name).map(|(_, value)| (*value).to_owned());
        passed(variable, 7)
    }

    #[test]
    fn what_a_service_manager_passes_is_for_the_process_that_it_names() {
        let for_us = ("LISTEN_PID", "7");
        assert_eq!(passed_by(&[]), Ok(vec![]));
        assert_eq!(passed_by(&[("LISTEN_FDS", "2")]), Ok(vec![]));
        assert_eq!(passed_by(&[("LISTEN_PID", "8"), ("LISTEN_FDS", "2")]), Ok(vec![]));
        assert_eq!(passed_by(&[for_us, ("LISTEN_FDS", "1")]), Ok(vec!["unknown".to_owned()]));
        let named = passed_by(&[for_us, ("LISTEN_FDS", "2"), ("LISTEN_FDNAMES", "web:admin")]);
        assert_eq!(named, Ok(vec!["web".to_owned(), "admin".to_owned()]));
        assert!(passed_by(&[for_us, ("LISTEN_FDS", "many")]).is_err());
        assert!(passed_by(&[for_us, ("LISTEN_FDS", "9999999999999999")]).is_err());
        assert!(passed_by(&[for_us, ("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", "a:b")]).is_err());
    }

    fn closeness(listener: &str, address: &str, label: (&str, &str), bound: &Bound) -> Option<u8> {
        let address: Address = address.parse().expect("an address");
        let resolved = match address.unix_path() {
            None => address.0.to_socket_addrs().expect("addresses").collect(),
            Some(_) => Vec::new(),
        };
        let label = Label { listener: label.0.to_owned(), written: label.1.to_owned() };
        Wanted { listener, address: &address, resolved }.closeness(&label, bound)
    }

    #[test]
    fn a_socket_fits_by_its_address_and_not_by_its_name() {
        let tcp = |address: &str, only_v6| Bound::Tcp { address: address.parse().expect("an address"), only_v6 };
        let (web, every) = (tcp("127.0.0.1:80", false), tcp("[::]:80", false));
        assert_eq!(closeness("web", "127.0.0.1:80", ("other", ""), &web), Some(2));
        assert_eq!(closeness("web", "127.0.0.1:81", ("web", ""), &web), None);
        assert_eq!(closeness("web", "0.0.0.0:80", ("web", ""), &every), Some(3));
        assert_eq!(closeness("web", "0.0.0.0:80", ("web", ""), &tcp("[::]:80", true)), None);
        assert_eq!(closeness("web", "127.0.0.1:80", ("web", ""), &every), None);
        assert_eq!(closeness("web", "unix:/run/web", ("", ""), &Bound::Unix("/run/web".into())), Some(2));
        assert_eq!(closeness("web", "unix:/run/web", ("", ""), &Bound::Unix("/run/other".into())), None);
    }

    #[test]
    fn a_port_that_the_system_chose_stays_with_its_listener() {
        let bound = Bound::Tcp { address: "127.0.0.1:4000".parse().expect("an address"), only_v6: false };
        assert_eq!(closeness("web", "127.0.0.1:0", ("web", "127.0.0.1:0"), &bound), Some(0));
        assert_eq!(closeness("more", "127.0.0.1:0", ("web", "127.0.0.1:0"), &bound), None);
        assert_eq!(closeness("renamed", "127.0.0.1:80", ("web", "127.0.0.1:80"), &bound), Some(1));
    }

    #[test]
    fn a_socket_of_the_service_manager_is_there_again_and_one_of_a_predecessor_is_not() {
        for (opener, again) in [(Opener::ServiceManager, true), (Opener::Predecessor, false)] {
            let socket = TcpListener::bind("127.0.0.1:0").expect("a socket");
            let at = socket.local_addr().expect("its address");
            let inherited = Inherited::default();
            inherited.add(Label::default(), opener, socket.into()).expect("a listening socket");
            let address: Address = at.to_string().parse().expect("an address");
            let first = inherited.open("web", &address, FileMode::default()).expect("the socket");
            assert_eq!(first.tcp, Some(at));
            TcpStream::connect(at).expect("it listens");
            // While the first socket is open, only a kept one is available.
            assert_eq!(inherited.open("web", &address, FileMode::default()).is_ok(), again, "{opener:?}");
            assert!(inherited.settle().is_empty());
        }
    }

    #[test]
    fn only_what_listens_can_be_inherited() {
        let inherited = Inherited::default();
        let add = |fd: OwnedFd| inherited.add(Label::default(), Opener::ServiceManager, fd);
        assert!(add(UdpSocket::bind("127.0.0.1:0").expect("a socket").into()).is_err());
        let listener = TcpListener::bind("127.0.0.1:0").expect("a socket");
        let connected = TcpStream::connect(listener.local_addr().expect("its address")).expect("a connection");
        assert!(add(connected.into()).expect_err("an error").contains("Accept=no"));
        let folder = tempfile::tempdir().expect("a folder");
        add(UnixListener::bind(folder.path().join("web")).expect("a socket").into()).expect("a listening socket");
    }
}
