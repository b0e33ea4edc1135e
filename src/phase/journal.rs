//! The journal of an exchange: when it entered each phase, in which cycle of which worker's loop, and with how many
//! bytes.
//!
//! The [`Clock`](super::Clock) of every exchange adds times up; a journal keeps their order, which a waterfall or a
//! trace is drawn from. Only chosen exchanges keep one. What chooses them says so beforehand ([`Want`]), for a journal
//! begins with the connection, where nothing is known of its exchanges. While none is wanted, all of this costs one
//! branch a phase.

pub mod steps;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::Phase;
use steps::{Notebook, Step};

/// The most entries of one journal: eleven attempts, the most there can be, with all their phases are fewer. Further
/// ones are counted.
pub const ENTRIES_MAX: usize = 64;

static WANTED: AtomicUsize = AtomicUsize::new(0);

/// Journals are wanted for as long as this lives.
#[derive(Debug)]
pub struct Want(());

impl Want {
    /// One more who wants journals.
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

/// Whether anybody in this process wants journals.
#[inline]
pub fn wanted() -> bool {
    WANTED.load(Ordering::Relaxed) > 0
}

/// A cycle of a worker's loop: what it does between two waits in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cycle {
    /// The number of the worker.
    pub worker: usize,
    /// How often it had waited before.
    pub number: u64,
    /// Events that the kernel has had for it so far; `None` without `tokio_unstable`.
    pub events: Option<u64>,
}

/// A point in time, and the cycle that it lies in if that is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tick {
    /// When.
    pub at: Instant,
    /// `None`: no journals were wanted yet, or it was on no worker's thread.
    pub cycle: Option<Cycle>,
}

/// Bytes of bodies that have passed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// Came from the client.
    pub received: u64,
    /// Came from the endpoint, for the present attempt.
    pub answered: u64,
    /// Went to the client.
    pub sent: u64,
}

/// What is written down when a phase begins, or the exchange ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Note {
    /// When.
    pub tick: Tick,
    /// What had passed by then.
    pub passed: Passed,
    /// What Forebay itself had spent on it by then.
    pub own: Duration,
}

impl Note {
    /// One of a time before the exchange had a context: nothing has passed.
    pub fn early(tick: Tick) -> Self {
        Note { tick, passed: Passed::default(), own: Duration::ZERO }
    }
}

/// A phase of an exchange, from one note to the next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// Which.
    pub phase: Phase,
    /// As it was when it began.
    pub begin: Note,
    /// As it was when it ended.
    pub end: Note,
}

impl Span {
    /// For how long it lasted.
    pub fn lasted(&self) -> Duration {
        self.end.tick.at.saturating_duration_since(self.begin.tick.at)
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Journal {
    entries: Vec<(Phase, Note)>,
    end: Option<Note>,
    /// Entries that had no place.
    left_out: u32,
    /// What filters did, in the order in which that ended; and how many steps had no place.
    steps: (Vec<Step>, u32),
}

impl Journal {
    /// One that begins with `phase`.
    pub fn begin(phase: Phase, note: Note) -> Self {
        // Enough for an exchange with one attempt.
        let mut entries = Vec::with_capacity(Phase::COUNT);
        entries.push((phase, note));
        Journal { entries, end: None, left_out: 0, steps: (Vec::new(), 0) }
    }

    /// The exchange goes on to `phase`.
    pub fn enter(&mut self, phase: Phase, note: Note) {
        if self.entries.len() < ENTRIES_MAX {
            self.entries.push((phase, note));
        } else {
            self.left_out += 1;
        }
    }

    /// The exchange has ended.
    pub fn end(&mut self, note: Note) {
        self.end.get_or_insert(note);
    }

    /// What passed up to the last note.
    pub fn passed(&self) -> Passed {
        self.end.or_else(|| self.entries.last().map(|(_, note)| *note)).map(|note| note.passed).unwrap_or_default()
    }

    /// When it began.
    pub fn began(&self) -> Tick {
        self.entries[0].1.tick
    }

    /// The phases in the order in which they were, one that came back as often as it came. The last one is there if the
    /// exchange has ended.
    pub fn spans(&self) -> impl Iterator<Item = Span> + '_ {
        let ends = self.entries.iter().skip(1).map(|(_, note)| *note).chain(self.end);
        self.entries.iter().zip(ends).map(|(&(phase, begin), end)| Span { phase, begin, end })
    }

    /// What filters did, which is noted there.
    pub fn note_steps(&mut self, notebook: &Notebook) {
        self.steps = notebook.take();
    }

    /// What filters did, and how many steps had no place.
    pub fn steps(&self) -> (&[Step], u32) {
        (&self.steps.0, self.steps.1)
    }

    /// Phases for which there was no place: the last span that is there stands for them, too.
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
        // Other tests of this process may want some, too.
        let first = Want::new();
        let second = Want::new();
        drop(first);
        assert!(wanted());
        drop(second);
    }
}
