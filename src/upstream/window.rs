//! The TCP receive window of connections to endpoints, which controls how much of a response the kernel buffers.
//!
//! By default the kernel buffers 64 KiB of each response, and Pingora reads as much in three buffers. So a
//! connection starts with a narrow window ([`narrow`]), which costs small responses nothing, and is opened for the
//! kernel's auto-tuning once there is more data and room for it. A thousand simultaneous responses then cause a
//! thousand small reads. The window is never narrowed again: a sender that has seen a wide window treats a narrow
//! one as silly (RFC 9293 §3.8.6.2.1), and waits for a 200 ms timer before it uses it.

use std::os::fd::RawFd;

use crate::net;

/// The receive buffer of a narrow connection; the kernel uses about half of it for data.
pub const NARROW_BYTES: usize = 16 << 10;

/// The initial size of an opened window: auto-tuning does not start from the narrow one.
const OPEN_BYTES: usize = 128 << 10;

/// Prepares an unconnected socket for a narrow window, with a buffer of this many bytes. Call [`put_off_tuning`]
/// once it is connected.
///
/// The buffer is small but not excluded from auto-tuning yet: for an excluded buffer, the kernel takes its size as
/// the maximum and negotiates no window scale, which would limit the connection to 64 KiB permanently.
pub fn narrow(socket: RawFd, bytes: usize) {
    net::set_receive_buffer(socket, bytes);
    net::lock_receive_buffer(socket, false);
}

/// Keeps the window at its size until it is opened.
pub fn put_off_tuning(socket: RawFd) {
    net::lock_receive_buffer(socket, true);
}

/// The receive window of a connection. Use it only while an exchange owns the connection.
#[derive(Debug)]
pub struct Window {
    socket: RawFd,
    opened: bool,
}

impl Window {
    /// The window of a connection in unknown state: an earlier exchange may have opened it.
    pub fn new(socket: RawFd) -> Self {
        Window { socket, opened: false }
    }

    /// Enables auto-tuning; kernels before Linux 5.14 cannot, and keep the initial size of an opened window.
    pub fn open(&mut self) {
        if !std::mem::replace(&mut self.opened, true) && self.is_narrow() {
            net::set_receive_buffer(self.socket, OPEN_BYTES);
            net::lock_receive_buffer(self.socket, false);
        }
    }

    /// Number of sent bytes that the endpoint's host has not acknowledged.
    pub fn unacknowledged(&self) -> usize {
        net::unacknowledged(self.socket)
    }

    /// Aborts the connection: local readers see its end, and the endpoint gets a reset, which overtakes unread
    /// data.
    pub fn abort(&mut self) {
        net::reset_on_close(self.socket);
        net::shut_down(self.socket);
    }

    /// Otherwise auto-tuning has grown it already and must not be undone.
    fn is_narrow(&self) -> bool {
        // Linux doubles the requested size.
        net::receive_buffer(self.socket).is_some_and(|bytes| bytes <= 2 * NARROW_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    /// Sends as much as the receiver accepts, reads it, and repeats: returns the largest amount at once.
    fn most_at_once(sender: &mut TcpStream, receiver: &mut TcpStream) -> usize {
        let piece = vec![0; 1 << 20];
        let rounds = (0..50).map(|_| {
            while sender.write(&piece).is_ok() {}
            receiver.read(&mut vec![0; 16 << 20]).unwrap_or_default()
        });
        rounds.max().unwrap_or_default()
    }

    #[test]
    fn a_narrow_connection_takes_in_little_until_it_is_opened() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        narrow(socket.as_raw_fd(), NARROW_BYTES);
        socket.connect(&listener.local_addr().expect("bound").into()).expect("a connection");
        let (mut sender, _) = listener.accept().expect("a connection");
        let mut receiver = TcpStream::from(socket);
        for stream in [&sender, &receiver] {
            stream.set_nonblocking(true).expect("a socket");
        }

        put_off_tuning(receiver.as_raw_fd());
        let before = most_at_once(&mut sender, &mut receiver);
        assert!(before > 0 && before <= 2 * NARROW_BYTES, "{before} bytes");
        Window::new(receiver.as_raw_fd()).open();
        let open = most_at_once(&mut sender, &mut receiver);
        // More than a window without scaling can express.
        assert!(open > 2 << 16, "{open} bytes at once, {before} before");
    }
}
