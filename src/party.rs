//! Which party an exchange waits for, and what went wrong with which party.
//!
//! Every wait says where it begins which party it is for ([`Waits`]), and every failure is noted where it is found, as
//! a [`Fault`]: the party, the phase, and what happened. `proxy/blame.rs` has one table of what follows from a fault.
//! Nothing is concluded afterwards from an error of a library: that knows which socket failed, but not who kept it
//! waiting.

pub mod limits;
pub mod wait;
pub mod waits;

use crate::phase::Phase;

pub use limits::{Bounds, Deadline, Look, Patience, Stage};
pub use waits::{KeepsWaiting, Waits};

/// A party that can keep an exchange waiting, or end it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Party {
    /// The sender of the request.
    Client = 0,
    /// The server of the upstream that was chosen.
    Endpoint = 1,
    /// The disk that holds spooled bodies.
    Disk = 2,
    /// Forebay itself: its queues, turns, filters and limits.
    Gateway = 3,
}

impl Party {
    /// All of them; each is at the place of its number.
    pub const ALL: [Party; 4] = [Party::Client, Party::Endpoint, Party::Disk, Party::Gateway];
}

/// What a party did, or failed to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum What {
    /// It did nothing for the longest time that is allowed.
    Silent,
    /// It was slower than the minimum rate.
    Slow,
    /// The whole of its part took longer than is allowed.
    Late,
    /// The deadline of the exchange passed while this party was waited for.
    Overdue,
    /// The client went away.
    Left,
    /// Its connection broke off.
    Broke,
    /// Its connection broke off after other parties had kept it waiting for longer than [`limits::DAWDLING`]: an
    /// endpoint, too, may run out of patience with a client.
    GaveUp,
    /// It sent something that does not follow the protocol.
    Malformed,
    /// It sent more than is allowed.
    TooLarge,
    /// It refused the connection.
    Refused,
    /// No connection to it could be made.
    Unreachable,
    /// No secure connection to it could be made.
    Insecure,
    /// A kept connection had died unnoticed.
    Stale,
    /// It said that it had not begun with the request.
    Unprocessed,
    /// It has no descriptors, ports or memory for a further connection.
    Exhausted,
    /// It has no room; a client: it has all that one may have.
    Full,
    /// It did not do its work.
    Failed,
    /// It stops, and waits no longer.
    Stopped,
}

/// Why an exchange, or an attempt of it, came to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fault {
    /// The party that is at fault.
    pub party: Party,
    /// The phase in which it was found.
    pub phase: Phase,
    /// What happened.
    pub what: What,
}

impl Fault {
    /// `what` happened in `phase`, and `party` is at fault.
    pub const fn new(party: Party, phase: Phase, what: What) -> Fault {
        Fault { party, phase, what }
    }
}
