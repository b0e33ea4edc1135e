//! The tunnel after a 101 response: each direction ends separately (RFC 9110 §7.8).
//!
//! Pingora copies the bytes, but ends both directions as soon as one has ended, which would lose the rest of the
//! other: for example the output of a program whose input is over. So the two streams hide the end from Pingora.
//! Once all bytes before it have been written, the stream of the other side shuts down its sending direction.
//! Pingora sees an end when both directions have ended.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::framing::follow::HeaderEnd;

/// Where the status ends in a status line: `HTTP/1.1 101`.
const STATUS_END: usize = 12;

/// One direction of a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the endpoint.
    Up = 0,
    /// From the endpoint to the client.
    Down = 1,
}

/// Shared by the streams on both sides of a tunnel. Only one task uses it.
#[derive(Debug, Default)]
pub struct Tunnel {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    directions: [Progress; 2],
    prelude: Prelude,
}

/// Response bytes before the tunnel: the header of the 101, and possibly interim responses.
#[derive(Debug, Default)]
struct Prelude {
    end: HeaderEnd,
    /// The beginning of the current header, up to its status.
    line: Vec<u8>,
    /// The header of the 101 has been sent.
    over: bool,
}

impl Prelude {
    /// How many of these bytes are sent before the tunnel.
    fn take(&mut self, bytes: &[u8]) -> usize {
        let mut taken = 0;
        while !self.over && taken < bytes.len() {
            let of_header = self.end.take(&bytes[taken..]);
            let room = STATUS_END.saturating_sub(self.line.len()).min(of_header);
            self.line.extend_from_slice(&bytes[taken..taken + room]);
            taken += of_header;
            if self.end.is_found() {
                self.over = self.line.ends_with(b" 101");
                (self.end, self.line) = (HeaderEnd::default(), Vec::new());
            }
        }
        taken
    }
}

/// The progress of one direction.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    /// Bytes read from the sender.
    read: u64,
    /// Bytes written to the receiver.
    written: u64,
    /// The sender has ended this direction.
    ended: bool,
    /// The end was passed on to the receiver.
    told: bool,
}

impl Tunnel {
    /// Sets the bytes read in this direction since its start.
    pub fn has_read(&self, direction: Direction, bytes: u64) {
        self.state().directions[direction as usize].read = bytes;
    }

    /// Adds bytes read in this direction.
    pub fn read(&self, direction: Direction, bytes: usize) {
        self.state().directions[direction as usize].read += bytes as u64;
    }

    /// Adds bytes written to the endpoint.
    pub fn wrote_up(&self, bytes: usize) {
        self.state().directions[Direction::Up as usize].written += bytes as u64;
    }

    /// These bytes were written to the client, beginning with the header of the 101.
    pub fn wrote_down(&self, bytes: &[u8]) {
        let state = &mut *self.state();
        let before = state.prelude.take(bytes);
        state.directions[Direction::Down as usize].written += (bytes.len() - before) as u64;
    }

    /// The sender has ended this direction.
    pub fn end(&self, direction: Direction) {
        self.state().directions[direction as usize].ended = true;
    }

    /// Whether the sender has ended it.
    pub fn has_ended(&self, direction: Direction) -> bool {
        self.state().directions[direction as usize].ended
    }

    /// Whether the end must be passed on now: all bytes before it have been written.
    pub fn is_to_tell(&self, direction: Direction) -> bool {
        let Progress { read, written, ended, told } = self.state().directions[direction as usize];
        ended && !told && written == read
    }

    /// The end was passed on.
    pub fn told(&self, direction: Direction) {
        self.state().directions[direction as usize].told = true;
    }

    /// Whether the end was passed on.
    pub fn is_told(&self, direction: Direction) -> bool {
        self.state().directions[direction as usize].told
    }

    /// Whether both directions have ended and the ends were passed on.
    pub fn is_over(&self) -> bool {
        self.state().directions.iter().all(|direction| direction.told)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_told_once_and_behind_all_bytes_before_it() {
        let tunnel = Tunnel::default();
        tunnel.read(Direction::Up, 10);
        tunnel.wrote_up(4);
        assert!(!tunnel.is_to_tell(Direction::Up), "it has not ended");
        tunnel.end(Direction::Up);
        assert!(tunnel.has_ended(Direction::Up) && !tunnel.is_to_tell(Direction::Up), "6 bytes are on their direction");
        tunnel.wrote_up(6);
        assert!(tunnel.is_to_tell(Direction::Up));
        tunnel.told(Direction::Up);
        assert!(!tunnel.is_to_tell(Direction::Up) && !tunnel.is_over(), "the other direction goes on");
        tunnel.end(Direction::Down);
        assert!(tunnel.is_to_tell(Direction::Down));
        tunnel.told(Direction::Down);
        assert!(tunnel.is_over());
    }

    #[test]
    fn the_header_of_the_101_is_no_part_of_it_however_it_is_written() {
        // An earlier interim response may already have been sent in part.
        let sent = b"nts\r\nLink: a\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n\
            HTTP/1.1 101 Switching Protocols\r\nUpgrade: tcp\r\n\r\n\r\n\r\nabc";
        for size in 1..=sent.len() {
            let tunnel = Tunnel::default();
            tunnel.has_read(Direction::Down, 7);
            tunnel.end(Direction::Down);
            for piece in sent[..sent.len() - 1].chunks(size) {
                tunnel.wrote_down(piece);
                assert!(!tunnel.is_to_tell(Direction::Down), "{size}");
            }
            tunnel.wrote_down(b"c");
            assert!(tunnel.is_to_tell(Direction::Down), "{size}");
        }
    }
}
