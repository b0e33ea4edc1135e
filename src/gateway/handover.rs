//! The protocol between a running process and the one that takes over from it.
//!
//! The new process gets one end of a socket pair as its standard input, so that no file name or fixed descriptor
//! number is needed. Messages are JSON, separated by the kernel (SOCK_SEQPACKET); listening sockets travel with
//! them (SCM_RIGHTS, unix(7)), which needs no privilege. A closed end means that its process has ended.
//!
//! ```text
//! new  ── Here ──►  old      it is a Forebay that knows this
//! new ◄── Sockets ─ old      as often as is needed, then All
//! new  ── Ready ──► old      or Refuses, with a report
//! new ◄── Go ────── old
//! new  ── Begun ──► old      it accepts connections; the old one stops to
//! new ◄── Main ──── old      the service manager knows it
//! ```

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use socket2::{Domain, SockRef, Socket, Type};

use super::inherited::Label;
use super::sockets::Opener;

/// The environment variable that marks standard input as such a socket. Its value is the protocol version.
pub const VARIABLE: &str = "FOREBAY_UPGRADE";

/// The protocol version.
pub const VERSION: &str = "1";

/// Descriptors per message; the kernel allows 253.
pub const AT_ONCE: usize = 64;

/// The longest message.
const MESSAGE_BYTES_MAX: usize = 160 << 10;

/// Longest report that is passed on, in bytes; the log of the new process has all of it.
const REPORT_BYTES_MAX: usize = 64 << 10;

/// A message of the new process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "says", rename_all = "snake_case")]
pub enum FromNew {
    /// It has started.
    Here {
        /// Its process.
        pid: u32,
        /// Its version.
        version: String,
    },
    /// It is ready to accept connections.
    Ready,
    /// It will not run.
    Refuses {
        /// Whether the configuration is the reason.
        configuration: bool,
        /// All errors, as `forebay check` prints them.
        report: String,
    },
    /// It accepts connections.
    Begun,
}

/// A message of the running process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "says", rename_all = "snake_case")]
pub enum FromOld {
    /// Listening sockets, attached to this message in the same order.
    Sockets {
        /// Their labels.
        sockets: Vec<Passed>,
    },
    /// The end of the list of sockets. The ends that report the exit of older processes are attached.
    All {
        /// The version of the running process.
        version: String,
        /// Counters of upgrades, by result.
        counted: Vec<(String, u64)>,
    },
    /// It may accept connections.
    Go,
    /// The service manager knows the new process.
    Main,
}

/// A listening socket that is passed on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Passed {
    /// Its label.
    pub label: Label,
    /// The process that opened it.
    pub opener: Opener,
}

/// One end of the socket pair.
pub struct Channel(OwnedFd);

/// The result of receiving.
#[derive(Debug)]
pub enum Heard<T> {
    /// A message and its attached descriptors.
    Message(T, Vec<OwnedFd>),
    /// The other process has ended, or has closed its end.
    Closed,
    /// No message before the deadline.
    Nothing,
}

impl FromNew {
    /// The message of a new process that will not run.
    pub fn refuses(configuration: bool, report: &str) -> FromNew {
        let end = report.floor_char_boundary(REPORT_BYTES_MAX);
        FromNew::Refuses { configuration, report: report[..end].to_owned() }
    }
}

impl Channel {
    /// Creates both ends.
    ///
    /// # Errors
    ///
    /// The system has no descriptor left.
    pub fn pair() -> io::Result<(Channel, Channel)> {
        let (one, other) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None)?;
        Ok((Channel(one.into()), Channel(other.into())))
    }

    /// An end that was passed to this process.
    ///
    /// # Errors
    ///
    /// It is not such a socket.
    pub fn of(fd: OwnedFd) -> io::Result<Channel> {
        match SockRef::from(&fd).r#type() {
            Ok(Type::SEQPACKET) => Ok(Channel(fd)),
            Ok(_) => Err(io::Error::other("it is a socket of another kind")),
            Err(error) => Err(error),
        }
    }

    /// The descriptor.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// The descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Sends a message with these descriptors: at most [`AT_ONCE`].
    ///
    /// # Errors
    ///
    /// The other process has ended, or does not receive.
    pub fn say(&self, what: &impl Serialize, with: &[OwnedFd], patience: Duration) -> io::Result<()> {
        let text = serde_json::to_vec(what)?;
        if text.len() > MESSAGE_BYTES_MAX || with.len() > AT_ONCE {
            return Err(io::Error::other("this is too long for one message"));
        }
        let socket = SockRef::from(&self.0);
        socket.set_write_timeout(Some(patience.max(Duration::from_millis(1))))?;
        let raw: Vec<RawFd> = with.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let rights = if raw.is_empty() { &[] } else { &rights[..] };
        let text = [IoSlice::new(&text)];
        loop {
            match sendmsg::<()>(self.0.as_raw_fd(), &text, rights, MsgFlags::MSG_NOSIGNAL, None) {
                Ok(_) => return Ok(()),
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for the next message.
    ///
    /// # Errors
    ///
    /// The data is not a message of the other side.
    pub fn hear<T: DeserializeOwned>(&self, until: Instant) -> io::Result<Heard<T>> {
        let socket = SockRef::from(&self.0);
        let mut text = vec![0; MESSAGE_BYTES_MAX];
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Heard::Nothing);
            }
            socket.set_read_timeout(Some(left))?;
            let mut room = nix::cmsg_space!([RawFd; AT_ONCE]);
            let mut pieces = [IoSliceMut::new(&mut text)];
            let received = recvmsg::<()>(self.0.as_raw_fd(), &mut pieces, Some(&mut room), MsgFlags::MSG_CMSG_CLOEXEC);
            let (length, with) = match received {
                Ok(received) => {
                    let mut with = Vec::new();
                    for message in received.cmsgs()? {
                        if let ControlMessageOwned::ScmRights(raw) = message {
                            // SAFETY: the kernel has just opened these for this process, and nothing else has them.
                            with.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                        }
                    }
                    (received.bytes, with)
                }
                Err(nix::Error::EINTR | nix::Error::EAGAIN) => continue,
                Err(nix::Error::ECONNRESET) => return Ok(Heard::Closed),
                Err(error) => return Err(error.into()),
            };
            return match length {
                0 => Ok(Heard::Closed),
                _ => Ok(Heard::Message(serde_json::from_slice(&text[..length])?, with)),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn heard(channel: &Channel) -> Heard<FromOld> {
        channel.hear(Instant::now() + PATIENCE).expect("a message")
    }

    #[test]
    fn a_message_takes_sockets_with_it_and_the_next_one_is_apart() {
        let (old, new) = Channel::pair().expect("a pair");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a socket");
        let address = listener.local_addr().expect("its address");
        let label = Label { listener: "web".to_owned(), written: "127.0.0.1:0".to_owned() };
        let sockets = vec![Passed { label, opener: Opener::Predecessor }];
        let said = FromOld::Sockets { sockets };
        old.say(&said, &[listener.into()], PATIENCE).expect("room");
        old.say(&FromOld::Go, &[], PATIENCE).expect("room");
        let Heard::Message(first, mut with) = heard(&new) else { panic!("no message") };
        assert_eq!((first, with.len()), (said, 1));
        let passed = TcpListener::from(with.remove(0));
        TcpStream::connect(address).expect("it listens");
        passed.accept().expect("the connection");
        let Heard::Message(second, with) = heard(&new) else { panic!("no message") };
        assert_eq!((second, with.len()), (FromOld::Go, 0));
        drop(old);
        assert!(matches!(heard(&new), Heard::Closed));
    }

    #[test]
    fn silence_ends_at_the_deadline_and_nonsense_is_an_error() {
        let (old, new) = Channel::pair().expect("a pair");
        let soon = Instant::now() + Duration::from_millis(20);
        assert!(matches!(new.hear::<FromOld>(soon).expect("silence"), Heard::Nothing));
        old.say(&"nonsense", &[], PATIENCE).expect("room");
        assert!(new.hear::<FromOld>(Instant::now() + PATIENCE).is_err());
        assert!(Channel::of(TcpListener::bind("127.0.0.1:0").expect("a socket").into()).is_err());
    }

    #[test]
    fn a_long_report_is_told_in_part() {
        let FromNew::Refuses { report, .. } = FromNew::refuses(true, &"ä".repeat(REPORT_BYTES_MAX)) else {
            panic!("another message")
        };
        assert_eq!(report.len(), REPORT_BYTES_MAX);
        let (old, new) = Channel::pair().expect("a pair");
        new.say(&FromNew::refuses(true, &"\n".repeat(REPORT_BYTES_MAX)), &[], PATIENCE).expect("room");
        let heard = old.hear::<FromNew>(Instant::now() + PATIENCE).expect("a message");
        assert!(matches!(heard, Heard::Message(FromNew::Refuses { configuration: true, .. }, _)));
    }
}
