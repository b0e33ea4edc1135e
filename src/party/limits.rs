//! When an endpoint has been waited for for too long: the clocks of an attempt, as a pure function.
//!
//! A clock of the endpoint runs only while the endpoint is what is waited for. So neither a client that sends or reads
//! slowly, nor a disk that hangs, nor a turn that the gateway grants late, can use up an endpoint's time. Nor can the
//! time for which the gateway's worker was stalled or its process suspended ([`Waits::note_lag`]).

use std::time::{Duration, Instant};

use super::{Fault, Party, Waits, What};
use crate::phase::Phase;

/// A party that has kept an endpoint waiting for longer than this, all waits of the attempt together, may be why the
/// endpoint gave up.
pub const DAWDLING: Duration = Duration::from_secs(1);

/// An endpoint that was waited for for this share of an exchange's deadline is at fault when the deadline passes. The
/// rest is what the gateway itself takes; with less, other parties had a part in it.
const OF_DEADLINE: f64 = 0.9;

/// How an attempt proceeds, as far as its clocks are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// There is no connection to an endpoint.
    Unconnected,
    /// A connection to an endpoint is being made.
    Connecting,
    /// The request is passed on.
    Sending,
    /// The request is out as a whole; the response header is due.
    Waiting,
    /// The response comes.
    Receiving,
    /// The response is here as a whole.
    Done,
}

impl Stage {
    /// All of them; each is at the place of its number.
    pub const ALL: [Stage; 6] =
        [Stage::Unconnected, Stage::Connecting, Stage::Sending, Stage::Waiting, Stage::Receiving, Stage::Done];

    /// The phase that an exchange in this stage is in.
    pub fn phase(self) -> Phase {
        match self {
            Stage::Unconnected | Stage::Connecting => Phase::Connect,
            Stage::Sending => Phase::Send,
            Stage::Waiting => Phase::Wait,
            Stage::Receiving => Phase::Receive,
            Stage::Done => Phase::Write,
        }
    }
}

/// For how long an endpoint may do nothing.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Between two pieces of the request that it takes.
    pub send: Duration,
    /// From the request's end to the end of the response header.
    pub wait: Duration,
    /// Between two pieces of the response.
    pub receive: Duration,
}

/// When the exchange as a whole is to be over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    /// That moment.
    pub due: Instant,
    /// The time that there was from the beginning.
    pub length: Duration,
    /// The client asked for it: it does not say how fast an endpoint has to be.
    pub is_clients: bool,
}

/// All limits of an attempt whose connection is there.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// For a single wait.
    pub patience: Patience,
    /// For all waits for the endpoint until its response header is here, the connection included.
    pub attempt: Option<Duration>,
    /// For the exchange.
    pub deadline: Option<Deadline>,
}

impl Bounds {
    /// When the present wait will be over the first of its limits, and which fault that is. `whole`: all of the request
    /// was passed on. `None`: nothing is limited here; the client's own clocks are elsewhere.
    pub fn due(&self, stage: Stage, whole: bool, waits: &Waits) -> Option<(Instant, Fault)> {
        let silence = self.silence(stage, whole, waits);
        let connected = matches!(stage, Stage::Sending | Stage::Waiting | Stage::Receiving);
        let deadline = self.deadline.filter(|_| connected);
        let overdue = deadline.map(|deadline| (deadline.due, deadline.fault(stage.phase(), waits)));
        silence.into_iter().chain(overdue).min_by_key(|(due, _)| *due)
    }

    fn silence(&self, stage: Stage, whole: bool, waits: &Waits) -> Option<(Instant, Fault)> {
        let (Party::Endpoint, since) = waits.present() else { return None };
        let patience = match stage {
            Stage::Sending => self.patience.send,
            Stage::Waiting => self.patience.wait,
            // As long as the client sends on, the endpoint may be waiting for what comes next.
            Stage::Receiving if whole => self.patience.receive,
            Stage::Receiving | Stage::Unconnected | Stage::Connecting | Stage::Done => return None,
        };
        let attempt = self.attempt.filter(|_| stage != Stage::Receiving);
        let left = attempt.map(|attempt| attempt.saturating_sub(waits.spent(Party::Endpoint, since)));
        let patience = left.map_or(patience, |left| left.min(patience));
        Some((since + patience, Fault::new(Party::Endpoint, stage.phase(), What::Silent)))
    }
}

impl Deadline {
    /// The fault if the deadline passes in the present wait, which is in this phase.
    pub fn fault(&self, phase: Phase, waits: &Waits) -> Fault {
        let of_endpoint = waits.spent(Party::Endpoint, self.due) >= self.length.mul_f64(OF_DEADLINE);
        let party = match waits.party() {
            _ if self.is_clients => Party::Client,
            _ if of_endpoint => Party::Endpoint,
            Party::Endpoint => Party::Gateway,
            other => other,
        };
        Fault::new(party, phase, What::Overdue)
    }
}

/// Looks again before it finds that a limit is exceeded.
///
/// A clock that has run out proves nothing if it was the gateway that came late: what was waited for may be here by
/// then, in a socket or with another task. So after the first look there are two more, each after a timer of its own,
/// and with it after a turn of the event loop in which sockets are read: in the first one the connection hands over
/// what came, in the second one the exchange takes it.
#[derive(Debug, Default)]
pub struct Look {
    /// Looks that there were, the due time that they were for, and when the next one is.
    before: Option<(Instant, u8, Instant)>,
}

/// What a look came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// It is to be looked again at this time.
    Again(Instant),
    /// The limit is exceeded.
    Over,
}

impl Look {
    const LOOKS: u8 = 2;
    /// The finest that timers are.
    const PAUSE: Duration = Duration::from_millis(1);

    /// When the next look is at a wait that is to be over when it is `due`. As soon as something else is waited for,
    /// `due` is another time, and everything begins anew.
    pub fn next(&self, due: Instant) -> Instant {
        self.before.filter(|before| before.0 == due).map_or(due, |(_, _, next)| next)
    }

    /// Looks at it `now`.
    pub fn at(&mut self, due: Instant, now: Instant) -> Seen {
        let (_, looks, next) = self.before.filter(|before| before.0 == due).unwrap_or((due, 0, due));
        if now < next {
            return Seen::Again(next);
        }
        if looks == Self::LOOKS {
            return Seen::Over;
        }
        let next = now + Self::PAUSE;
        self.before = Some((due, looks + 1, next));
        Seen::Again(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    const PATIENCE: Patience = Patience { send: ms_of(300), wait: ms_of(600), receive: ms_of(900) };
    const BOUNDS: Bounds = Bounds { patience: PATIENCE, attempt: None, deadline: None };

    const fn ms_of(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// An attempt whose endpoint is waited for from the beginning, and its beginning.
    fn attempt() -> (Waits, Instant) {
        let began = Instant::now();
        let waits = Waits::new(began);
        waits.begin_attempt(Duration::ZERO, began);
        (waits, began)
    }

    /// After how many milliseconds it is due, and what that is.
    fn due(bounds: &Bounds, stage: Stage, whole: bool, waits: &Waits, began: Instant) -> Option<(u128, Fault)> {
        bounds.due(stage, whole, waits).map(|(due, fault)| (due.duration_since(began).as_millis(), fault))
    }

    #[test]
    fn an_endpoint_has_its_time_in_each_stage() {
        let (waits, began) = attempt();
        let silent = |phase| Fault::new(Party::Endpoint, phase, What::Silent);
        for (stage, whole, expected) in [
            (Stage::Unconnected, false, None),
            (Stage::Connecting, false, None),
            (Stage::Sending, false, Some((300, silent(Phase::Send)))),
            (Stage::Waiting, true, Some((600, silent(Phase::Wait)))),
            (Stage::Receiving, true, Some((900, silent(Phase::Receive)))),
            (Stage::Receiving, false, None),
            (Stage::Done, true, None),
        ] {
            assert_eq!(due(&BOUNDS, stage, whole, &waits, began), expected, "{stage:?} {whole}");
        }
    }

    #[test]
    fn while_another_party_is_waited_for_no_time_of_the_endpoint_passes() {
        for party in [Party::Client, Party::Disk, Party::Gateway] {
            let (waits, began) = attempt();
            waits.turn_to(party, began + ms(100));
            for stage in [Stage::Sending, Stage::Waiting, Stage::Receiving] {
                assert_eq!(BOUNDS.due(stage, true, &waits), None, "{party:?} {stage:?}");
            }
            waits.turn_to(Party::Endpoint, began + ms(60_000));
            let after = due(&BOUNDS, Stage::Sending, false, &waits, began).map(|(due, _)| due);
            assert_eq!(after, Some(60_300), "{party:?}");
        }
    }

    #[test]
    fn while_the_gateway_is_suspended_no_time_of_the_endpoint_passes() {
        let (waits, began) = attempt();
        waits.note_lag(ms(5_000), began + ms(5_100));
        for (stage, expected) in [(Stage::Sending, 5_300), (Stage::Waiting, 5_600), (Stage::Receiving, 5_900)] {
            let due = due(&BOUNDS, stage, true, &waits, began).map(|(due, _)| due);
            assert_eq!(due, Some(expected), "{stage:?}");
        }
        let bounds = Bounds { attempt: Some(ms(250)), ..BOUNDS };
        assert_eq!(due(&bounds, Stage::Waiting, true, &waits, began).map(|(due, _)| due), Some(5_250));
    }

    #[test]
    fn the_time_of_an_attempt_is_the_endpoints_own() {
        let (waits, began) = attempt();
        let bounds = Bounds { attempt: Some(ms(250)), ..BOUNDS };
        assert_eq!(due(&bounds, Stage::Sending, false, &waits, began).map(|(due, _)| due), Some(250));
        waits.turn_to(Party::Client, began + ms(200));
        assert_eq!(bounds.due(Stage::Sending, false, &waits), None);
        waits.turn_to(Party::Endpoint, began + ms(9_200));
        let expected = Fault::new(Party::Endpoint, Phase::Wait, What::Silent);
        assert_eq!(due(&bounds, Stage::Waiting, true, &waits, began), Some((9_250, expected)));
        let receiving = due(&bounds, Stage::Receiving, true, &waits, began).map(|(due, _)| due);
        assert_eq!(receiving, Some(9_200 + 900), "its header is here");
    }

    #[test]
    fn a_deadline_that_passes_is_the_endpoints_fault_if_it_had_nearly_all_of_the_time() {
        let (waits, began) = attempt();
        let deadline = Deadline { due: began + ms(500), length: ms(500), is_clients: false };
        let patience = Patience { wait: ms(60_000), receive: ms(60_000), ..PATIENCE };
        let bounds = |deadline| Bounds { patience, deadline: Some(deadline), ..BOUNDS };
        let party = |bounds: Bounds, waits: &Waits| {
            let (at, fault) = due(&bounds, Stage::Receiving, true, waits, began).expect("a deadline");
            assert_eq!((at, fault.phase, fault.what), (500, Phase::Receive, What::Overdue));
            fault.party
        };
        assert_eq!(party(bounds(deadline), &waits), Party::Endpoint);
        assert_eq!(party(bounds(Deadline { is_clients: true, ..deadline }), &waits), Party::Client);
        waits.turn_to(Party::Client, began + ms(100));
        assert_eq!(party(bounds(deadline), &waits), Party::Client, "it is the client that is waited for");
        waits.turn_to(Party::Endpoint, began + ms(120));
        assert_eq!(party(bounds(deadline), &waits), Party::Endpoint, "480 of 500 ms are its own");
        waits.turn_to(Party::Client, began + ms(130));
        waits.turn_to(Party::Endpoint, began + ms(190));
        assert_eq!(party(bounds(deadline), &waits), Party::Gateway, "420 of 500 ms are");
    }

    #[test]
    fn a_clock_that_rings_late_is_looked_at_again_in_two_further_turns_of_the_loop() {
        let now = Instant::now();
        let (mut look, due) = (Look::default(), now + ms(100));
        assert_eq!(look.at(due, now), Seen::Again(due));
        let late = due + ms(3_000);
        assert_eq!(look.at(due, late), Seen::Again(late + ms(1)));
        assert_eq!(look.at(due, late), Seen::Again(late + ms(1)), "woken for something else");
        assert_eq!(look.at(due, late + ms(1)), Seen::Again(late + ms(2)));
        assert_eq!(look.at(due, late + ms(2)), Seen::Over);

        let mut look = Look::default();
        look.at(due, late);
        look.at(due, late + ms(1));
        let other = late + ms(700);
        assert_eq!(look.at(other, late + ms(2)), Seen::Again(other), "something has come");
    }
}
