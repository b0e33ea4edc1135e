//! Detects a broken connection that is not being read.
//!
//! Forebay stops reading from a client that has closed its sending side or has sent bytes of its next request. The
//! kernel reports a reset only to readers and writers, so the state of the socket is checked periodically. This needs
//! no descriptor and no thread, and applies only to connections that a read cannot watch.

use std::io;
use std::os::fd::RawFd;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use crate::net;
use crate::party::wait::Timer;

/// Interval of the check: the maximum time for which an endpoint works for a client that has left.
const INTERVAL: Duration = Duration::from_millis(250);

/// The events that count as the client's leaving, in addition to a broken connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaving {
    /// None, not even the end of both directions: earlier bytes of the client must still be passed on.
    Reset,
    /// None: a client that has only closed its sending side waits for a response.
    Broken,
    /// The end of its sending side, if fewer unread bytes than this precede it: part of its request is missing. 0:
    /// never.
    Short(u64),
    /// The end of its sending side in every case.
    Ended,
}

/// A periodic check of a socket. It costs nothing before its first poll.
#[derive(Default)]
pub struct CloseCheck {
    timer: Timer,
    due: Option<Instant>,
}

impl CloseCheck {
    /// Ready with an error once the client has left: its connection was reset, or both directions have ended, or it has
    /// ended its sending side and `leaving` counts this.
    pub fn poll(&mut self, cx: &mut Context<'_>, socket: RawFd, leaving: Leaving) -> Poll<io::Error> {
        self.poll_or(cx, socket, leaving, || false)
    }

    /// As [`CloseCheck::poll`], but the first look comes one interval after the first call. For waits that are mostly
    /// shorter, and that something else ends if the client has left.
    pub fn poll_later(&mut self, cx: &mut Context<'_>, socket: RawFd, leaving: Leaving) -> Poll<io::Error> {
        self.due.get_or_insert_with(|| Instant::now() + INTERVAL);
        self.poll(cx, socket, leaving)
    }

    /// As [`CloseCheck::poll`], and also ready once the additional check returns true, which runs with each look.
    pub fn poll_or(
        &mut self,
        cx: &mut Context<'_>,
        socket: RawFd,
        leaving: Leaving,
        mut finds: impl FnMut() -> bool,
    ) -> Poll<io::Error> {
        loop {
            if let Some(due) = self.due {
                ready!(self.timer.poll(cx, due));
            }
            if has_left(socket, leaving) || finds() {
                return Poll::Ready(io::ErrorKind::ConnectionReset.into());
            }
            self.due = Some(Instant::now() + INTERVAL);
        }
    }
}

/// Whether the client of a connection has left.
fn has_left(socket: RawFd, leaving: Leaving) -> bool {
    // The kernel always reports errors and the end of both directions.
    let ends = matches!(leaving, Leaving::Short(1..) | Leaving::Ended);
    let found = net::events(socket, if ends { libc::POLLRDHUP } else { 0 });
    let broken = if leaving == Leaving::Reset { libc::POLLERR } else { libc::POLLERR | libc::POLLHUP };
    let ended = || match leaving {
        Leaving::Short(owed) => net::unread(socket) < owed,
        _ => true,
    };
    found & broken != 0 || found & libc::POLLRDHUP != 0 && ended()
}

/// All bytes that can be read before the end of a connection. `None`: the client has not ended its sending side, or
/// there are more bytes than `most`.
pub(super) fn unread_before_end(socket: RawFd, most: usize) -> Option<Vec<u8>> {
    if net::events(socket, libc::POLLRDHUP) & libc::POLLRDHUP == 0 {
        return None;
    }
    let bytes = usize::try_from(net::unread(socket)).ok().filter(|&bytes| bytes <= most)?;
    net::peek(socket, bytes)
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

    /// Waits until bytes of the other side arrive.
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

    #[tokio::test]
    async fn a_later_look_sees_the_same_but_not_in_a_wait_that_is_short() {
        let (client, server) = pair();
        socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).expect("linger");
        drop(client);
        let socket = server.as_raw_fd();
        let until = Instant::now() + Duration::from_secs(10);
        while !is_broken(socket) {
            assert!(Instant::now() < until, "the reset went unnoticed");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let mut look = CloseCheck::default();
        let at_once = std::future::poll_fn(|cx| Poll::Ready(look.poll_later(cx, socket, Leaving::Broken))).await;
        assert!(at_once.is_pending());
        let seen = std::future::poll_fn(|cx| look.poll_later(cx, socket, Leaving::Broken));
        tokio::time::timeout(Duration::from_secs(10), seen).await.expect("it is seen after an interval");
    }

    #[test]
    fn the_end_of_the_sending_side_is_seen_behind_unread_bytes_and_counts_where_it_is_to() {
        let ways = [Leaving::Broken, Leaving::Short(0), Leaving::Short(1), Leaving::Short(4), Leaving::Ended];
        for (sent, left) in [
            ("", [false, false, true, true, true]),
            ("GET", [false, false, false, true, true]),
            ("POST", [false, false, false, false, true]),
        ] {
            let (client, server) = pair();
            let look = || ways.map(|way| has_left(server.as_raw_fd(), way));
            let unread = || unread_before_end(server.as_raw_fd(), 4);
            assert_eq!(look(), [false; 5]);
            std::io::Write::write_all(&mut &client, sent.as_bytes()).expect("room");
            assert_eq!((look(), unread()), ([false; 5], None));
            client.shutdown(Shutdown::Write).expect("a connection");
            let until = Instant::now() + Duration::from_secs(10);
            while look() != left {
                assert!(Instant::now() < until, "{:?} instead of {left:?} behind {sent:?}", look());
                std::thread::yield_now();
            }
            for _ in 0..2 {
                assert_eq!(unread().as_deref(), Some(sent.as_bytes()), "it stays in the socket");
            }
            assert_eq!(unread_before_end(server.as_raw_fd(), 3).is_none(), sent.len() > 3);
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
