//! How much of an answer the kernel takes in for us: the receive window of an endpoint's connection.
//!
//! Left to itself the kernel takes in 64 KiB of every answer, and so does Pingora, in three buffers. So a connection to
//! an endpoint begins with a narrow window ([`narrow`]), which costs a small answer nothing, and is opened and left to
//! the kernel's tuning once there is more to come and room for it. A thousand answers that arrive at once are then a
//! thousand small reads. It is never made narrow again: to a sender that has seen a wide window a narrow one is silly
//! (RFC 9293 §3.8.6.2.1), and it waits for a timer of 200 ms before it uses it.

use std::os::fd::RawFd;

use crate::net;

/// The receive buffer of a narrow connection, of which the kernel uses about half for data.
pub const NARROW_BYTES: usize = 16 << 10;

/// What an opened connection begins with: the kernel's tuning finds no reason to grow from the narrow one.
const OPEN_BYTES: usize = 128 << 10;

/// Prepares a socket that is not connected yet for a narrow window, of a buffer of this many bytes. Once it is
/// connected [`put_off_tuning`] is to follow.
///
/// Its buffer is small and yet not exempt from the kernel's tuning: of an exempt one the kernel takes the size for the
/// largest that there will be, agrees on no window scale, and holds the connection to 64 KiB at a time for ever.
pub fn narrow(socket: RawFd, bytes: usize) {
    net::set_receive_buffer(socket, bytes);
    net::lock_receive_buffer(socket, false);
}

/// Keeps the window of a connection as it is until it is opened.
pub fn put_off_tuning(socket: RawFd) {
    net::lock_receive_buffer(socket, true);
}

/// The receive window of one connection. Only to be used while an exchange has that connection.
#[derive(Debug)]
pub struct Window {
    socket: RawFd,
    opened: bool,
}

impl Window {
    /// That of a connection whose width is not known: an earlier exchange may have opened it.
    pub fn new(socket: RawFd) -> Self {
        Window { socket, opened: false }
    }

    /// Leaves it to the kernel; with one that cannot tune again (before Linux 5.14) it stays at what it begins with.
    pub fn open(&mut self) {
        if !std::mem::replace(&mut self.opened, true) && self.is_narrow() {
            net::set_receive_buffer(self.socket, OPEN_BYTES);
            net::lock_receive_buffer(self.socket, false);
        }
    }

    /// Breaks the connection off: what waits for it here hears of its end, and the endpoint of a reset, which
    /// overtakes what it has not read.
    pub fn abort(&mut self) {
        net::reset_on_close(self.socket);
        net::shut_down(self.socket);
    }

    /// If not, the kernel's tuning is not to be undone.
    fn is_narrow(&self) -> bool {
        // Linux doubles what it is asked for.
        net::receive_buffer(self.socket).is_some_and(|bytes| bytes <= 2 * NARROW_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    /// Has as much sent as the other side takes, reads it, and that several times: the most that came at once.
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
        // More than a window without a scale can say.
        assert!(open > 2 << 16, "{open} bytes at once, {before} before");
    }
}
