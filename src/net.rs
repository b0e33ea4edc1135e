//! System calls on a connection's socket that the libraries do not offer.
//!
//! Pingora and Forebay's own transports identify a socket by its file descriptor, because the stream is borrowed
//! elsewhere. Only this module turns such a descriptor into a system call. The caller of each function must keep the
//! socket open during the call. For a descriptor that is not open, or not a socket, each function returns the
//! documented value and has no effect.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use socket2::{SockAddr, SockRef};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `SO_BUF_LOCK` of Linux, which the libc crate lacks: it selects the buffers that the kernel does not tune.
const SO_BUF_LOCK: libc::c_int = 72;
/// The flag for the receive buffer.
const SOCK_RCVBUF_LOCK: libc::c_int = 2;

/// Lets this thread's event loop watch a socket for bytes or connections to read.
///
/// # Errors
///
/// If the kernel cannot watch it.
pub fn watch_reads(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is open, and nothing else can close it, since it is owned.
    Ok(unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?)
}

/// Number of sent bytes that the peer's host has not acknowledged; a FIN counts as one. 0 for a descriptor that is not
/// a socket.
pub fn unacknowledged(socket: RawFd) -> usize {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the pointer is to an integer, which this request fills; a wrong descriptor is an error.
    let asked = unsafe { libc::ioctl(socket, libc::TIOCOUTQ, &raw mut bytes) };
    if asked == 0 { usize::try_from(bytes).unwrap_or_default() } else { 0 }
}

/// Number of received bytes that were not read; a FIN does not count. 0 for a descriptor that is not a socket.
pub fn unread(socket: RawFd) -> u64 {
    let mut bytes: libc::c_int = 0;
    // SAFETY: as above.
    let asked = unsafe { libc::ioctl(socket, libc::FIONREAD, &raw mut bytes) };
    if asked == 0 { u64::try_from(bytes).unwrap_or_default() } else { 0 }
}

/// Those of the events `asked` that `poll` reports now. It always reports an error and the end of both directions. The
/// call does not block. No events for a descriptor that is not a socket.
pub fn events(socket: RawFd, asked: libc::c_short) -> libc::c_short {
    let mut asked = libc::pollfd { fd: socket, events: asked, revents: 0 };
    // SAFETY: the pointer is to one `pollfd`, as the count says; with a timeout of 0 the call does not wait.
    if unsafe { libc::poll(&raw mut asked, 1, 0) } == 1 { asked.revents } else { 0 }
}

/// A copy of the next `length` unread bytes, which stay unread. The call does not block. `None` if fewer bytes are
/// available, or if the descriptor is not a socket.
pub fn peek(socket: RawFd, length: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0u8; length];
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the buffer has room for as many bytes as are asked for; the call does not wait.
    let read = unsafe { libc::recv(socket, bytes.as_mut_ptr().cast(), length, flags) };
    (usize::try_from(read) == Ok(length)).then_some(bytes)
}

/// The address of the peer. `None` if the socket is not connected.
pub fn peer(socket: RawFd) -> Option<SockAddr> {
    with(socket, |socket| socket.peer_addr()).ok()
}

/// The size of the receive buffer in bytes, which is twice the size that was set. `None` for a descriptor that is not a
/// socket.
pub fn receive_buffer(socket: RawFd) -> Option<usize> {
    with(socket, |socket| socket.recv_buffer_size()).ok()
}

/// Sets the size of the receive buffer in bytes. The kernel then does not tune it. No effect on a descriptor that is
/// not a socket.
pub fn set_receive_buffer(socket: RawFd, bytes: usize) {
    let _ = with(socket, |socket| socket.set_recv_buffer_size(bytes));
}

/// Sets whether the kernel leaves the size of the receive buffer unchanged. No effect before Linux 5.14, and on a
/// descriptor that is not a socket.
pub fn lock_receive_buffer(socket: RawFd, locked: bool) {
    let value = if locked { SOCK_RCVBUF_LOCK } else { 0 };
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the pointer is to an integer of that length; a wrong descriptor is an error and nothing else.
    unsafe { libc::setsockopt(socket, libc::SOL_SOCKET, SO_BUF_LOCK, (&raw const value).cast(), length) };
}

/// Acknowledges received bytes at once. No effect on a unix socket.
pub fn acknowledge(socket: RawFd) {
    let _ = with(socket, |socket| socket.set_tcp_quickack(true));
}

/// Makes the next close reset the connection. No effect on a unix socket, which has no reset.
pub fn reset_on_close(socket: RawFd) {
    let _ = with(socket, |socket| socket.set_linger(Some(Duration::ZERO)));
}

/// Shuts the connection down in both directions; the next read finds its end. Only the owner of a connection may call
/// this. No effect on a socket that is not connected.
pub fn shut_down(socket: RawFd) {
    let _ = with(socket, |socket| socket.shutdown(std::net::Shutdown::Both));
}

/// Calls `ask` with a socket that the caller keeps open.
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
