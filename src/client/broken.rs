//! Finds out that a connection is broken while nobody reads from it.
//!
//! A client that has closed its sending side, or has sent the beginning of its next request, is not read any more, and
//! the kernel tells of a reset only those who read or write. So the state of the socket is looked at in intervals. That
//! costs neither a descriptor nor a thread, and only those connections that cannot be watched by reading.

use std::io;
use std::os::fd::RawFd;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use crate::party::wait::Timer;

/// How often is looked. An endpoint works for a client that is gone for no longer than this.
const INTERVAL: Duration = Duration::from_millis(250);

/// What shows that a client has left, besides a connection that is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaving {
    /// Nothing, not even that both directions have ended: what the client has sent before is still to be passed on.
    Reset,
    /// Nothing: a client that has only closed its sending side waits for an answer.
    Broken,
    /// The end of its sending side, if no unread byte comes before it: the client has asked for nothing.
    Silent,
    /// The end of its sending side, whatever is unread before it.
    Ended,
}

/// A look at a socket that is repeated. Costs nothing until it is first polled.
#[derive(Default)]
pub struct Look {
    timer: Timer,
    due: Option<Instant>,
}

impl Look {
    /// Ready, with an error, once the client has left: its connection was reset, or nothing can be received and nothing
    /// be sent, or it has ended its sending side and that counts as `leaving`.
    pub fn poll(&mut self, cx: &mut Context<'_>, socket: RawFd, leaving: Leaving) -> Poll<io::Error> {
        loop {
            if let Some(due) = self.due {
                ready!(self.timer.poll(cx, due));
            }
            if has_left(socket, leaving) {
                return Poll::Ready(io::ErrorKind::ConnectionReset.into());
            }
            self.due = Some(Instant::now() + INTERVAL);
        }
    }
}

/// Whether the client of a connection has left.
fn has_left(socket: RawFd, leaving: Leaving) -> bool {
    // An error and the end of both directions are told whatever is asked for.
    let events = if matches!(leaving, Leaving::Silent | Leaving::Ended) { libc::POLLRDHUP } else { 0 };
    let mut asked = libc::pollfd { fd: socket, events, revents: 0 };
    // SAFETY: the pointer is to one `pollfd`, as the count says; with a timeout of 0 the call does not wait.
    let found = unsafe { libc::poll(&raw mut asked, 1, 0) };
    if found != 1 {
        return false;
    }
    let ended = asked.revents & libc::POLLRDHUP != 0;
    let broken = if leaving == Leaving::Reset { libc::POLLERR } else { libc::POLLERR | libc::POLLHUP };
    asked.revents & broken != 0 || ended && (leaving == Leaving::Ended || !has_unread(socket))
}

/// Whether there is something to read before the end of a connection.
fn has_unread(socket: RawFd) -> bool {
    let mut byte = 0u8;
    // SAFETY: the buffer has room for the one byte that is asked for, which stays in the socket; the call does not
    // wait.
    unsafe { libc::recv(socket, (&raw mut byte).cast(), 1, libc::MSG_PEEK | libc::MSG_DONTWAIT) > 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    fn is_broken(socket: RawFd) -> bool {
        has_left(socket, Leaving::Broken)
    }

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("a connection");
        let (server, _) = listener.accept().expect("a connection");
        (client, server)
    }

    /// Waits for something of the other side to arrive.
    fn arrives(server: &TcpStream) {
        let mut asked = libc::pollfd { fd: server.as_raw_fd(), events: libc::POLLIN | libc::POLLRDHUP, revents: 0 };
        // SAFETY: as above.
        assert_eq!(unsafe { libc::poll(&raw mut asked, 1, 10_000) }, 1, "nothing arrived");
    }

    #[test]
    fn half_a_connection_is_not_broken_and_a_reset_one_is_whatever_is_unread() {
        let (client, server) = pair();
        assert!(!is_broken(server.as_raw_fd()));
        std::io::Write::write_all(&mut &client, b"GET").expect("room");
        arrives(&server);
        assert!(!is_broken(server.as_raw_fd()), "there is something to read");
        client.shutdown(Shutdown::Write).expect("a connection");
        assert!(!is_broken(server.as_raw_fd()), "it can still be written to");
        socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).expect("linger");
        drop(client);
        let until = Instant::now() + Duration::from_secs(10);
        while !is_broken(server.as_raw_fd()) {
            assert!(Instant::now() < until, "the reset went unnoticed");
            std::thread::yield_now();
        }
    }

    #[test]
    fn the_end_of_the_sending_side_is_seen_behind_unread_bytes_and_counts_where_it_is_to() {
        for (sent, left) in [("", [false, true, true]), ("G", [false, false, true])] {
            let (client, server) = pair();
            let look =
                || [Leaving::Broken, Leaving::Silent, Leaving::Ended].map(|way| has_left(server.as_raw_fd(), way));
            assert_eq!(look(), [false; 3]);
            std::io::Write::write_all(&mut &client, sent.as_bytes()).expect("room");
            assert_eq!(look(), [false; 3]);
            client.shutdown(Shutdown::Write).expect("a connection");
            let until = Instant::now() + Duration::from_secs(10);
            while look() != left {
                assert!(Instant::now() < until, "{:?} instead of {left:?} behind {sent:?}", look());
                std::thread::yield_now();
            }
        }
    }

    #[test]
    fn a_client_that_has_said_all_and_heard_all_is_not_reset() {
        let (client, server) = pair();
        std::io::Write::write_all(&mut &client, b"the end of it").expect("room");
        server.shutdown(Shutdown::Write).expect("a connection");
        client.shutdown(Shutdown::Write).expect("a connection");
        let until = Instant::now() + Duration::from_secs(10);
        while !is_broken(server.as_raw_fd()) {
            assert!(Instant::now() < until, "both directions have ended");
            std::thread::yield_now();
        }
        assert!(!has_left(server.as_raw_fd(), Leaving::Reset), "what it said can still be read");
    }

    #[test]
    fn a_unix_socket_tells_a_client_that_is_gone_from_one_that_has_only_stopped_sending() {
        let (client, server) = UnixStream::pair().expect("two sockets");
        client.shutdown(Shutdown::Write).expect("a connection");
        assert!(!is_broken(server.as_raw_fd()));
        drop(client);
        assert!(is_broken(server.as_raw_fd()));
    }
}
