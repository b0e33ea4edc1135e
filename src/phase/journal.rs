//! The journal of an exchange: when it entered each phase, in which cycle of which worker's event loop, and with how
//! many bytes.
//!
//! The [`Clock`](super::Clock) of each exchange sums the times; a journal keeps their order, for a waterfall or a
//! trace. Only selected exchanges keep a journal. A user of journals registers in advance ([`Want`]), since a journal
//! begins with the connection, before anything is known of its exchanges. While no journal is wanted, a phase costs one
//! branch.

pub mod steps;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::Phase;
use steps::{Notebook, Step};

/// Maximum number of entries per journal; the maximum of eleven attempts with all phases needs fewer. Further entries
/// are only counted.
pub const ENTRIES_MAX: usize = 64;

static WANTED: AtomicUsize = AtomicUsize::new(0);

/// Journals are kept as long as a value of this type exists.
#[derive(Debug)]
pub struct Want(());

impl Want {
    /// Registers a user of journals.
    #[allow(clippy::new_without_default, reason = "it does something, which a default should not")]
    pub fn new() -> Self {
        WANTED.fetch_add(1, Ordering::Relaxed);
        Want(())
    }
}

impl Drop for Want {
    fn drop(&mut self) {
        WANTED.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether this process keeps journals.
#[inline]
pub fn wanted() -> bool {
    WANTED.load(Ordering::Relaxed) > 0
}

/// A cycle of a worker's event loop: the work between two waits in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cycle {
    /// The number of the worker.
    pub worker: usize,
    /// Number of waits before this cycle.
    pub number: u64,
    /// Number of events that the kernel has reported to the worker; `None` without `tokio_unstable`.
    pub events: Option<u64>,
}

/// A point in time, and its cycle if known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tick {
    /// The time.
    pub at: Instant,
    /// `None`: no journals were wanted yet, or the thread is not a worker.
    pub cycle: Option<Cycle>,
}

/// Body bytes of an exchange so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// Received from the client.
    pub received: u64,
    /// Received from the endpoint, in the current attempt.
    pub answered: u64,
    /// Sent to the client.
    pub sent: u64,
}

/// The record at the start of a phase, or at the end of the exchange.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Note {
    /// The time.
    pub tick: Tick,
    /// The body bytes until then.
    pub passed: Passed,
    /// Forebay's own time until then.
    pub own: Duration,
}

impl Note {
    /// A note from before the exchange's context existed: no bytes, no own time.
    pub fn early(tick: Tick) -> Self {
        Note { tick, passed: Passed::default(), own: Duration::ZERO }
    }
}

/// A phase of an exchange, between two notes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// The phase.
    pub phase: Phase,
    /// The note at its start.
    pub begin: Note,
    /// The note at its end.
    pub end: Note,
}

impl Span {
    /// The duration.
    pub fn lasted(&self) -> Duration {
        self.end.tick.at.saturating_duration_since(self.begin.tick.at)
    }
}

/// A journal; see the module.
#[derive(Clone, Debug)]
pub struct Journal {
    entries: Vec<(Phase, Note)>,
    end: Option<Note>,
    /// Number of entries beyond the limit.
    left_out: u32,
    /// The filter steps in the order in which they ended, and the number of steps beyond the limit.
    steps: (Vec<Step>, u32),
}

impl Journal {
    /// Starts a journal with `phase`.
    pub fn begin(phase: Phase, note: Note) -> Self {
        // Sufficient for an exchange with one attempt.
        let mut entries = Vec::with_capacity(Phase::COUNT);
        entries.push((phase, note));
        Journal { entries, end: None, left_out: 0, steps: (Vec::new(), 0) }
    }

    /// Records the start of `phase`.
    pub fn enter(&mut self, phase: Phase, note: Note) {
        if self.entries.len() < ENTRIES_MAX {
            self.entries.push((phase, note));
        } else {
            self.left_out += 1;
        }
    }

    /// Records the end of the exchange.
    pub fn end(&mut self, note: Note) {
        self.end.get_or_insert(note);
    }

    /// The body bytes at the last note.
    pub fn passed(&self) -> Passed {
        self.end.or_else(|| self.entries.last().map(|(_, note)| *note)).map(|note| note.passed).unwrap_or_default()
    }

    /// When the journal began.
    pub fn began(&self) -> Tick {
        self.entries[0].1.tick
    }

    /// The phases in chronological order, including recurrences. The last phase is included once the exchange has
    /// ended.
    pub fn spans(&self) -> impl Iterator<Item = Span> + '_ {
        let ends = self.entries.iter().skip(1).map(|(_, note)| *note).chain(self.end);
        self.entries.iter().zip(ends).map(|(&(phase, begin), end)| Span { phase, begin, end })
    }

    /// Takes the filter steps from `notebook`.
    pub fn note_steps(&mut self, notebook: &Notebook) {
        self.steps = notebook.take();
    }

    /// The filter steps, and the number of steps beyond the limit.
    pub fn steps(&self) -> (&[Step], u32) {
        (&self.steps.0, self.steps.1)
    }

    /// Number of phases beyond the limit. The last span includes them.
    pub fn left_out(&self) -> u32 {
        self.left_out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(begin: Instant, ms: u64, cycle: u64, sent: u64) -> Note {
        let cycle = Some(Cycle { worker: 0, number: cycle, events: None });
        let tick = Tick { at: begin + Duration::from_millis(ms), cycle };
        Note { tick, passed: Passed { sent, ..Passed::default() }, own: Duration::ZERO }
    }

    #[test]
    fn phases_stand_in_the_order_in_which_they_were_and_lie_end_to_end() {
        let begin = Instant::now();
        let mut journal = Journal::begin(Phase::Header, note(begin, 0, 1, 0));
        for (phase, ms) in [(Phase::Select, 1), (Phase::Wait, 2), (Phase::Select, 7), (Phase::Write, 9)] {
            journal.enter(phase, note(begin, ms, ms, 0));
        }
        assert_eq!(journal.spans().count(), 4, "the last has not ended");
        journal.end(note(begin, 20, 30, 512));
        journal.end(note(begin, 99, 99, 0));
        let spans: Vec<_> = journal.spans().map(|span| (span.phase.name(), span.lasted().as_millis())).collect();
        assert_eq!(spans, [("header", 1), ("select", 1), ("wait", 5), ("select", 2), ("write", 11)]);
        let last = journal.spans().last().expect("a span");
        assert_eq!(last.end.tick.cycle.map(|cycle| cycle.number), Some(30));
        assert_eq!((journal.passed().sent, journal.began().at), (512, begin));
    }

    #[test]
    fn a_journal_does_not_grow_for_ever() {
        let begin = Instant::now();
        let mut journal = Journal::begin(Phase::Header, note(begin, 0, 0, 0));
        for n in 0..200 {
            journal.enter(if n % 2 == 0 { Phase::Select } else { Phase::Connect }, note(begin, n, n, 0));
        }
        journal.end(note(begin, 1000, 0, 0));
        assert_eq!((journal.spans().count(), journal.left_out()), (ENTRIES_MAX, 200 - (ENTRIES_MAX as u32 - 1)));
        let covered: Duration = journal.spans().map(|span| span.lasted()).sum();
        assert_eq!(covered, Duration::from_millis(1000));
    }

    #[test]
    fn journals_are_wanted_for_as_long_as_somebody_wants_them() {
        // Other tests in this process may want journals, too.
        let first = Want::new();
        let second = Want::new();
        drop(first);
        assert!(wanted());
        drop(second);
    }
}
