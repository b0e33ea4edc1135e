//! What the kernel knows of a socket and the libraries do not ask.

use std::os::fd::RawFd;

/// Bytes of a connection that were sent and that the peer's host has not acknowledged; a FIN counts as one. 0 for what
/// is no socket.
pub fn unacknowledged(socket: RawFd) -> usize {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the pointer is to an integer, which is what this request fills; a wrong descriptor is an error.
    let asked = unsafe { libc::ioctl(socket, libc::TIOCOUTQ, &raw mut bytes) };
    if asked == 0 { usize::try_from(bytes).unwrap_or_default() } else { 0 }
}

/// Bytes that have come over a connection and were not read; its end counts for none. 0 for what is no socket.
pub fn unread(socket: RawFd) -> u64 {
    let mut bytes: libc::c_int = 0;
    // SAFETY: as above.
    let asked = unsafe { libc::ioctl(socket, libc::FIONREAD, &raw mut bytes) };
    if asked == 0 { u64::try_from(bytes).unwrap_or_default() } else { 0 }
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
