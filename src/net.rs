//! What the kernel is asked about a connection's socket and told of it, beyond what the libraries do.
//!
//! Pingora and our own transports give a socket as a number, because it belongs to a stream that is borrowed elsewhere.
//! This module is the only one that turns such a number into a system call. Each function takes the number of a socket
//! that its caller keeps open during the call. A number that is not an open descriptor, or not a socket, has the
//! answer that each function names and no other effect.

use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::time::Duration;

use socket2::{SockAddr, SockRef};

/// `SO_BUF_LOCK` of Linux, which the libc crate lacks: which buffers of a socket are exempt from tuning.
const SO_BUF_LOCK: libc::c_int = 72;
/// Of these, the receive buffer.
const SOCK_RCVBUF_LOCK: libc::c_int = 2;

/// Bytes of a connection that were sent and that the peer's host has not acknowledged; a FIN counts as one. 0 for what
/// is not a socket.
pub fn unacknowledged(socket: RawFd) -> usize {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the pointer is to an integer, which is what this request fills; a wrong descriptor is an error.
    let asked = unsafe { libc::ioctl(socket, libc::TIOCOUTQ, &raw mut bytes) };
    if asked == 0 { usize::try_from(bytes).unwrap_or_default() } else { 0 }
}

/// Bytes that have come over a connection and were not read; its end counts for none. 0 for what is not a socket.
pub fn unread(socket: RawFd) -> u64 {
    let mut bytes: libc::c_int = 0;
    // SAFETY: as above.
    let asked = unsafe { libc::ioctl(socket, libc::FIONREAD, &raw mut bytes) };
    if asked == 0 { u64::try_from(bytes).unwrap_or_default() } else { 0 }
}

/// Which of these events of `poll` there are now. An error and the end of both directions are found without being asked
/// for. The call does not wait. No event for what is not a socket.
pub fn events(socket: RawFd, asked: libc::c_short) -> libc::c_short {
    let mut asked = libc::pollfd { fd: socket, events: asked, revents: 0 };
    // SAFETY: the pointer is to one `pollfd`, as the count says; with a timeout of 0 the call does not wait.
    if unsafe { libc::poll(&raw mut asked, 1, 0) } == 1 { asked.revents } else { 0 }
}

/// A copy of the next `length` bytes that are to be read, which stay unread. The call does not wait. `None` if there
/// are fewer, or for what is not a socket.
pub fn peek(socket: RawFd, length: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0u8; length];
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the buffer has room for as many bytes as are asked for; the call does not wait.
    let read = unsafe { libc::recv(socket, bytes.as_mut_ptr().cast(), length, flags) };
    (usize::try_from(read) == Ok(length)).then_some(bytes)
}

/// The address that a connection leads to. `None` for what is not connected.
pub fn peer(socket: RawFd) -> Option<SockAddr> {
    with(socket, |socket| socket.peer_addr()).ok()
}

/// The bytes of the receive buffer, which are twice what was set. `None` for what is not a socket.
pub fn receive_buffer(socket: RawFd) -> Option<usize> {
    with(socket, |socket| socket.recv_buffer_size()).ok()
}

/// Sets the receive buffer to this many bytes, which the kernel does not tune then. No effect on what is not a socket.
pub fn set_receive_buffer(socket: RawFd, bytes: usize) {
    let _ = with(socket, |socket| socket.set_recv_buffer_size(bytes));
}

/// Whether the receive buffer keeps its size instead of being tuned by the kernel. No effect before Linux 5.14, and on
/// what is not a socket.
pub fn lock_receive_buffer(socket: RawFd, locked: bool) {
    let value = if locked { SOCK_RCVBUF_LOCK } else { 0 };
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the pointer is to an integer of that length; a wrong descriptor is an error and nothing else.
    unsafe { libc::setsockopt(socket, libc::SOL_SOCKET, SO_BUF_LOCK, (&raw const value).cast(), length) };
}

/// Has the last bytes that came acknowledged at once. No effect on a unix socket.
pub fn acknowledge(socket: RawFd) {
    let _ = with(socket, |socket| socket.set_tcp_quickack(true));
}

/// Has the connection end by a reset once it is closed. No effect on a unix socket, which has no reset.
pub fn reset_on_close(socket: RawFd) {
    let _ = with(socket, |socket| socket.set_linger(Some(Duration::ZERO)));
}

/// Ends a connection in both directions: the next look at it here finds that it has ended. Only the owner of a
/// connection is to do so. No effect on what is not connected.
pub fn shut_down(socket: RawFd) {
    let _ = with(socket, |socket| socket.shutdown(std::net::Shutdown::Both));
}

/// Asks something of a socket that its caller keeps open.
fn with<R>(socket: RawFd, ask: impl FnOnce(SockRef<'_>) -> io::Result<R>) -> io::Result<R> {
    if socket < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the number is not -1. The caller keeps the socket open during this call, and the borrow ends with it.
    let socket = unsafe { BorrowedFd::borrow_raw(socket) };
    ask(SockRef::from(&socket))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    #[test]
    fn what_the_peer_has_not_taken_is_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let mut client = TcpStream::connect(listener.local_addr().expect("bound")).expect("a connection");
        let (mut server, _) = listener.accept().expect("a connection");
        assert_eq!(unacknowledged(server.as_raw_fd()), 0);

        server.set_nonblocking(true).expect("a socket");
        while server.write(&[0; 64 << 10]).is_ok() {}
        assert!(unacknowledged(server.as_raw_fd()) > 0, "the buffers are full");

        drop(std::thread::spawn(move || std::io::copy(&mut client, &mut std::io::sink())));
        while unacknowledged(server.as_raw_fd()) > 0 {
            std::thread::yield_now();
        }
        assert_eq!(unacknowledged(-1), 0);
    }
}
