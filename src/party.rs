//! The parties of an exchange, and the faults that are attributed to them.
//!
//! Each wait records at its start which party it waits for ([`Waits`]). Each failure is recorded where it is detected,
//! as a [`Fault`]: the party, the phase and the kind of failure. `proxy/blame.rs` has the table of consequences. A
//! library's error alone would not be enough: it names the socket that failed, but not the party that caused the delay.

pub mod limits;
pub mod pauses;
pub mod standstill;
pub mod wait;
pub mod waits;

use crate::phase::Phase;

pub use limits::{Bounds, Deadline, Recheck, Stage, UpstreamTimeouts};
pub use waits::{DelaysEndpoint, Waits};

/// A party that can delay or end an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Party {
    /// The sender of the request.
    Client = 0,
    /// The upstream server that was selected.
    Endpoint = 1,
    /// The disk that holds spooled bodies.
    Disk = 2,
    /// Forebay itself: its queues, turns, filters and limits.
    Gateway = 3,
}

impl Party {
    /// All parties, indexed by their number.
    pub const ALL: [Party; 4] = [Party::Client, Party::Endpoint, Party::Disk, Party::Gateway];
}

/// What a party did, or failed to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum What {
    /// It made no progress for the maximum time.
    Silent,
    /// It was slower than the minimum rate.
    Slow,
    /// Its whole part took longer than the maximum time.
    Late,
    /// The deadline of the exchange passed during a wait for this party.
    Overdue,
    /// The client went away.
    Left,
    /// Its connection broke off.
    Broke,
    /// Its connection broke off after other parties had delayed it for longer than [`limits::DELAY_MAX`]. Such an
    /// endpoint may have timed out because of a slow client.
    GaveUp,
    /// It violated the protocol.
    Malformed,
    /// It sent more than the limit.
    TooLarge,
    /// It refused the connection.
    Refused,
    /// No connection to it could be made.
    Unreachable,
    /// No secure connection to it could be made.
    Insecure,
    /// A reused connection had been closed without notice.
    Stale,
    /// It reported that it had not started to process the request.
    Unprocessed,
    /// It has no descriptors, ports or memory for another connection.
    Exhausted,
    /// It has no capacity. For a client: it has reached its own limit.
    Full,
    /// It failed otherwise.
    Failed,
    /// It is shutting down and does not wait any longer.
    Stopped,
}

/// The reason for the failure of an exchange or an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fault {
    /// The party that is at fault.
    pub party: Party,
    /// The phase in which the fault was detected.
    pub phase: Phase,
    /// The kind of failure.
    pub what: What,
}

impl Fault {
    /// Attributes `what`, which happened in `phase`, to `party`.
    pub const fn new(party: Party, phase: Phase, what: What) -> Fault {
        Fault { party, phase, what }
    }
}
