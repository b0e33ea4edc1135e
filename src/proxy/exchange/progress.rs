//! The progress of an exchange: its phase, the times of earlier phases, and its observers.

use std::time::Instant;

use crate::client::start::ExchangeStart;
use crate::eventloop::worker;
use crate::metrics::{Metrics, PhaseGuard};
use crate::phase::journal::steps::Notebook;
use crate::phase::journal::{self, Journal, Note, Passed, Tick};
use crate::phase::{Clock, Phase};
use crate::scheduler::task::own_time;

/// The progress of an exchange; see the module.
pub struct Progress {
    /// The current phase, and the time spent in each.
    pub clock: Clock,
    /// Time at which the first byte of the request arrived.
    pub begun: Instant,
    /// Counts the exchange in the gauge of its phase.
    seat: PhaseGuard,
    /// Records its steps with their times, during a recording or for a sampled trace.
    journal: Option<Box<Journal>>,
    /// Records the steps of its filters, if there is a journal.
    steps: Option<Notebook>,
}

impl Progress {
    /// Begins in phase `route`, with the connection's record of earlier phases.
    pub fn begin(begin: Option<&ExchangeStart>, metrics: &Metrics) -> Progress {
        let (begun, routed) = match begin {
            Some(begin) => (begin.header_since, begin.header_done),
            None => {
                let now = Instant::now();
                (now, now)
            }
        };
        let mut clock = Clock::start(Phase::Header, begun);
        if let Some(accept) = begin.and_then(|begin| begin.accept) {
            clock.credit(Phase::Accept, accept);
        }
        if let Some(handshake) = begin.and_then(|begin| begin.handshake) {
            clock.credit(Phase::Handshake, handshake);
        }
        clock.enter(Phase::Route, routed);
        worker::enter(Phase::Route);
        let seat = metrics.enter_phase(Phase::Route, routed);
        let journal = journal::wanted().then(|| Box::new(opened(begin, routed)));
        Progress { clock, begun, seat, journal, steps: None }
    }

    /// The current phase.
    pub fn phase(&self) -> Phase {
        self.clock.phase()
    }

    /// Enters another phase. If there is a journal, `passed` provides the body bytes transferred so far.
    pub(super) fn enter(&mut self, phase: Phase, now: Instant, passed: impl FnOnce() -> Passed) {
        let passed_in_last = self.clock.enter(phase, now);
        self.seat.advance(phase, passed_in_last);
        worker::enter(phase);
        if let Some(journal) = &mut self.journal {
            journal.enter(phase, note(now, passed()));
        }
    }

    /// Starts a journal unless there is one. The phase is `route`.
    pub(super) fn keep_journal(&mut self) {
        if self.journal.is_none() {
            let routed = self.clock.since();
            let header = self.clock.spent(Phase::Header).unwrap_or_default();
            let since = Tick { at: routed.checked_sub(header).unwrap_or(routed), cycle: None };
            let mut journal = Journal::begin(Phase::Header, Note::early(since));
            journal.enter(Phase::Route, Note::early(Tick { at: routed, cycle: worker::cycle() }));
            self.journal = Some(Box::new(journal));
        }
    }

    /// The notebook for the steps of filters, if there is a journal.
    pub(in crate::proxy) fn notebook(&mut self) -> Option<Notebook> {
        self.journal.is_some().then(|| self.steps.get_or_insert_default().clone())
    }

    /// Closes the journal, if any, with these body bytes.
    pub fn close_journal(&mut self, now: Instant, passed: Passed) -> Option<Box<Journal>> {
        let mut journal = self.journal.take()?;
        self.steps.take().iter().for_each(|steps| journal.note_steps(steps));
        let answered = journal.passed().answered;
        journal.end(note(now, Passed { answered, ..passed }));
        Some(journal)
    }
}

fn note(now: Instant, passed: Passed) -> Note {
    Note { tick: Tick { at: now, cycle: worker::cycle() }, passed, own: own_time(now) }
}

/// Creates a journal with the events before the exchange had a context; `routed` is the time at which it got one.
fn opened(begin: Option<&ExchangeStart>, routed: Instant) -> Journal {
    let route = Note::early(Tick { at: routed, cycle: worker::cycle() });
    let Some(begin) = begin else { return Journal::begin(Phase::Route, route) };
    let header = Note::early(Tick { at: begin.header_since, cycle: begin.header_in });
    let mut journal = match begin.accept {
        Some(_) => {
            let connection = &begin.connection;
            let accepted = Tick { at: connection.accepted, cycle: connection.accepted_in.as_deref().copied() };
            let mut journal = Journal::begin(Phase::Accept, Note::early(accepted));
            if let Some((begun, took)) = connection.handshake() {
                let at = |at| Note::early(Tick { at, cycle: None });
                journal.enter(Phase::Handshake, at(begun));
                journal.enter(Phase::Accept, at(begun + took));
            }
            journal.enter(Phase::Header, header);
            journal
        }
        None => Journal::begin(Phase::Header, header),
    };
    journal.enter(Phase::Route, route);
    journal
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::error::refusal;

    #[test]
    fn each_phase_is_entered_in_the_clock_the_gauges_and_the_journal_at_once() {
        let metrics = Metrics::new(u64::MAX, refusal::ALL.to_vec());
        let mut progress = Progress::begin(None, &metrics);
        progress.keep_journal();
        let later = progress.clock.since() + Duration::from_millis(5);
        progress.enter(Phase::Wait, later, || Passed { received: 7, ..Passed::default() });
        assert_eq!(progress.phase(), Phase::Wait);
        assert_eq!(progress.clock.spent(Phase::Route), Some(Duration::from_millis(5)));
        let in_wait = || metrics.phases()[Phase::Wait.index()].active;
        assert_eq!(in_wait(), 1);
        let passed = Passed { received: 9, ..Passed::default() };
        let journal = progress.close_journal(later + Duration::from_millis(1), passed).expect("a journal");
        let phases: Vec<_> = journal.spans().map(|span| span.phase).collect();
        assert_eq!(phases, [Phase::Header, Phase::Route, Phase::Wait]);
        assert!(progress.close_journal(later, Passed::default()).is_none(), "it is closed once");
        drop(progress);
        assert_eq!(in_wait(), 0);
    }
}
