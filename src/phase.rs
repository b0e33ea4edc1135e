//! The phases of an exchange and the clock that times them.
//!
//! An exchange is in exactly one phase at a time, so the phases add up to its total. The same word is the
//! file in `src/proxy/`, the metric label, the access-log field, the first half of a refusal's reason and the
//! test module. Everything above imports this; it imports nothing.

pub mod journal;

use std::fmt;
use std::time::{Duration, Instant};

/// The phase of an exchange, in chronological order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Phase {
    /// The connection was accepted; its first byte is awaited (first exchange only).
    Accept,
    /// The TLS handshake (first exchange only).
    Handshake,
    /// The request header is received, from its first byte to its last.
    Header,
    /// The route is selected and the request filters run.
    Route,
    /// The request body is held back until it is complete.
    Buffer,
    /// The exchange waits for a free slot of its upstream.
    Queue,
    /// An endpoint is selected.
    Select,
    /// A connection to the endpoint is opened, or taken from the pool.
    Connect,
    /// The request is sent to the endpoint.
    Send,
    /// The request was sent; the response header is awaited.
    Wait,
    /// The response is received from the endpoint.
    Receive,
    /// The endpoint is released; the rest of the response is sent to the client.
    Write,
    /// The exchange is completed: the connection is kept or closed; metrics and log are written.
    Finish,
}

impl Phase {
    /// Number of phases.
    pub const COUNT: usize = 13;

    /// Every phase, in order.
    pub const ALL: [Phase; Phase::COUNT] = [
        Phase::Accept,
        Phase::Handshake,
        Phase::Header,
        Phase::Route,
        Phase::Buffer,
        Phase::Queue,
        Phase::Select,
        Phase::Connect,
        Phase::Send,
        Phase::Wait,
        Phase::Receive,
        Phase::Write,
        Phase::Finish,
    ];

    /// The name of this phase in metrics, log fields, reasons and file names.
    pub const fn name(self) -> &'static str {
        match self {
            Phase::Accept => "accept",
            Phase::Handshake => "handshake",
            Phase::Header => "header",
            Phase::Route => "route",
            Phase::Buffer => "buffer",
            Phase::Queue => "queue",
            Phase::Select => "select",
            Phase::Connect => "connect",
            Phase::Send => "send",
            Phase::Wait => "wait",
            Phase::Receive => "receive",
            Phase::Write => "write",
            Phase::Finish => "finish",
        }
    }

    /// The index of this phase in [`Phase::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The clock of one exchange: its current phase, and the time spent in each phase.
///
/// A phase may recur (a retry returns from `wait` to `select`); its times add up.
#[derive(Clone, Debug)]
pub struct Clock {
    phase: Phase,
    since: Instant,
    spent: [Duration; Phase::COUNT],
    visited: u16,
}

impl Clock {
    /// Creates a clock that entered `phase` at `since`.
    pub fn start(phase: Phase, since: Instant) -> Self {
        let mut clock = Clock { phase, since, spent: [Duration::ZERO; Phase::COUNT], visited: 0 };
        clock.mark(phase);
        clock
    }

    /// Changes to `phase` at `now`; returns the time since the last change. A no-op if it is the current phase.
    pub fn enter(&mut self, phase: Phase, now: Instant) -> Duration {
        if phase == self.phase {
            return Duration::ZERO;
        }
        let passed = self.settle(now);
        self.phase = phase;
        self.mark(phase);
        passed
    }

    /// Adds time that passed before the clock was started, such as `accept` of a first exchange.
    pub fn credit(&mut self, phase: Phase, time: Duration) {
        self.spent[phase.index()] += time;
        self.mark(phase);
    }

    /// Adds the time of the current phase up to `now`, and returns it.
    pub fn settle(&mut self, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.since);
        self.spent[self.phase.index()] += passed;
        self.since = self.since.max(now);
        passed
    }

    /// When the exchange entered the current phase, or when the clock was last settled.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// The current phase.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The time spent in `phase` up to the last [`Clock::settle`] or [`Clock::enter`]; `None` if it was never entered.
    pub fn spent(&self, phase: Phase) -> Option<Duration> {
        (self.visited & 1 << phase.index() != 0).then(|| self.spent[phase.index()])
    }

    /// The sum of all phases: the exchange's total.
    pub fn total(&self) -> Duration {
        self.spent.iter().sum()
    }

    fn mark(&mut self, phase: Phase) {
        self.visited |= 1 << phase.index();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn the_phases_add_up_to_the_total() {
        let t0 = Instant::now();
        let mut clock = Clock::start(Phase::Header, t0);
        clock.credit(Phase::Accept, ms(3));
        clock.enter(Phase::Route, t0 + ms(5));
        clock.enter(Phase::Wait, t0 + ms(6));
        clock.enter(Phase::Select, t0 + ms(9));
        clock.enter(Phase::Wait, t0 + ms(10));
        clock.settle(t0 + ms(20));

        assert_eq!(clock.total(), ms(23));
        assert_eq!(clock.spent(Phase::Wait), Some(ms(13)));
        assert_eq!(clock.spent(Phase::Accept), Some(ms(3)));
        assert_eq!(clock.spent(Phase::Queue), None);
    }

    #[test]
    fn a_clock_that_is_told_of_the_past_does_not_run_backwards() {
        let t0 = Instant::now();
        let mut clock = Clock::start(Phase::Header, t0 + ms(5));
        clock.enter(Phase::Route, t0);
        clock.settle(t0 + ms(7));
        assert_eq!(clock.total(), ms(2));
    }

    #[test]
    fn every_phase_stands_at_its_index() {
        for (index, phase) in Phase::ALL.into_iter().enumerate() {
            assert_eq!(phase.index(), index);
        }
    }
}
