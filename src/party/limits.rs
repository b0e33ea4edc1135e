//! The time limits of an attempt, as a pure function.
//!
//! A clock of the endpoint runs only while the exchange waits for the endpoint. As a result, neither a slow client, nor
//! a slow disk, nor a turn that the gateway grants late can use up an endpoint's time. The same is true for time in
//! which the gateway's worker was stalled or its process suspended ([`Waits::note_lag`]).

use std::time::{Duration, Instant};

use super::{Fault, Party, Waits, What};
use crate::phase::Phase;

/// If a party delayed an endpoint for longer than this, over all waits of the attempt, the delay may be the reason for
/// the endpoint's failure.
pub const DELAY_MAX: Duration = Duration::from_secs(1);

/// The endpoint is at fault for a missed deadline if the exchange waited for it during this share of the deadline. The
/// rest is the gateway's own overhead. Below this share, other parties contributed to the delay.
const OF_DEADLINE: f64 = 0.9;

/// The stage of an attempt, as far as its clocks are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// No connection to an endpoint.
    Unconnected,
    /// The connection to an endpoint is being opened.
    Connecting,
    /// The request is being forwarded.
    Sending,
    /// The request was sent completely; the response header is due.
    Waiting,
    /// The response is being received.
    Receiving,
    /// The response was received completely.
    Done,
}

impl Stage {
    /// All stages, indexed by their number.
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

/// The maximum times for an endpoint without progress.
#[derive(Clone, Copy, Debug)]
pub struct UpstreamTimeouts {
    /// Between two accepted pieces of the request.
    pub send: Duration,
    /// From the request's end to the end of the response header.
    pub wait: Duration,
    /// Between two pieces of the response.
    pub receive: Duration,
}

/// The deadline of an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    /// The time when it passes.
    pub due: Instant,
    /// The total time from the beginning.
    pub length: Duration,
    /// Whether the client requested it. If so, missing it does not prove that the endpoint is slow.
    pub is_clients: bool,
}

/// All limits of an attempt with an open connection.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// For each wait.
    pub patience: UpstreamTimeouts,
    /// For all waits for the endpoint until the response header was received, including the connection setup.
    pub attempt: Option<Duration>,
    /// For the exchange.
    pub deadline: Option<Deadline>,
}

impl Bounds {
    /// When the present wait exceeds the first of its limits, and the resulting fault. `whole`: the request was
    /// forwarded completely. `None`: no limit applies here; the client's clocks are elsewhere.
    pub fn due(&self, stage: Stage, whole: bool, waits: &Waits) -> Option<(Instant, Fault)> {
        let silence = self.silence(stage, whole, waits);
        let connected = matches!(stage, Stage::Sending | Stage::Waiting | Stage::Receiving);
        let deadline = self.deadline.filter(|_| connected);
        let overdue = deadline.map(|deadline| (deadline.due_after(waits), deadline.fault(stage.phase(), waits)));
        silence.into_iter().chain(overdue).min_by_key(|(due, _)| *due)
    }

    fn silence(&self, stage: Stage, whole: bool, waits: &Waits) -> Option<(Instant, Fault)> {
        let (Party::Endpoint, since) = waits.present() else { return None };
        let patience = match stage {
            Stage::Sending => self.patience.send,
            Stage::Waiting => self.patience.wait,
            // While the client still sends, the endpoint may be waiting for the rest of the request.
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
    /// When it passes after these waits. It does not run while the gateway itself does not, unless it is the client's,
    /// whose own clock runs on.
    fn due_after(&self, waits: &Waits) -> Instant {
        if self.is_clients { self.due } else { self.due + waits.lost() }
    }

    /// The fault if the deadline passes in the present wait, which belongs to `phase`.
    pub fn fault(&self, phase: Phase, waits: &Waits) -> Fault {
        let spent = waits.spent(Party::Endpoint, self.due_after(waits));
        let of_endpoint = spent >= self.length.mul_f64(OF_DEADLINE);
        let party = match waits.party() {
            _ if self.is_clients => Party::Client,
            _ if of_endpoint => Party::Endpoint,
            Party::Endpoint => Party::Gateway,
            other => other,
        };
        Fault::new(party, phase, What::Overdue)
    }
}

/// Checks again before it reports an exceeded limit.
///
/// An expired clock proves nothing if the gateway itself was late: the awaited event may already be in a socket or with
/// another task. After the first check, there are therefore two more. Each has its own timer, so that the event loop
/// reads the sockets in between. In the first turn the connection hands over what it received; in the second turn the
/// exchange takes it.
#[derive(Debug, Default)]
pub struct Recheck {
    /// The due time that the checks belong to, their number, and the time of the next check.
    before: Option<(Instant, u8, Instant)>,
}

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checked {
    /// Check again at this time.
    Again(Instant),
    /// The limit is exceeded.
    Over,
}

impl Recheck {
    const LOOKS: u8 = 2;
    /// The resolution of timers.
    const PAUSE: Duration = Duration::from_millis(1);

    /// The time of the next check of a wait that is due at `due`. Another `due` belongs to another wait, and the checks
    /// start over.
    pub fn next(&self, due: Instant) -> Instant {
        self.before.filter(|before| before.0 == due).map_or(due, |(_, _, next)| next)
    }

    /// Checks at `now`.
    pub fn at(&mut self, due: Instant, now: Instant) -> Checked {
        let (_, looks, next) = self.before.filter(|before| before.0 == due).unwrap_or((due, 0, due));
        if now < next {
            return Checked::Again(next);
        }
        if looks == Self::LOOKS {
            return Checked::Over;
        }
        let next = now + Self::PAUSE;
        self.before = Some((due, looks + 1, next));
        Checked::Again(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    const PATIENCE: UpstreamTimeouts = UpstreamTimeouts { send: ms_of(300), wait: ms_of(600), receive: ms_of(900) };
    const BOUNDS: Bounds = Bounds { patience: PATIENCE, attempt: None, deadline: None };

    const fn ms_of(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// An attempt that waits for its endpoint from the beginning, and the time when it began.
    fn attempt() -> (Waits, Instant) {
        let began = Instant::now();
        let waits = Waits::new(began);
        waits.begin_attempt(Duration::ZERO, began);
        (waits, began)
    }

    /// After how many milliseconds the attempt is due, and the fault.
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
        for (is_clients, expected) in [(false, 5_200), (true, 200)] {
            let deadline = Some(Deadline { due: began + ms(200), length: ms(200), is_clients });
            let due = due(&Bounds { deadline, ..BOUNDS }, Stage::Waiting, true, &waits, began).map(|(due, _)| due);
            assert_eq!(due, Some(expected), "{is_clients}");
        }
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
        let patience = UpstreamTimeouts { wait: ms(60_000), receive: ms(60_000), ..PATIENCE };
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
        let (mut recheck, due) = (Recheck::default(), now + ms(100));
        assert_eq!(recheck.at(due, now), Checked::Again(due));
        let late = due + ms(3_000);
        assert_eq!(recheck.at(due, late), Checked::Again(late + ms(1)));
        assert_eq!(recheck.at(due, late), Checked::Again(late + ms(1)), "woken for something else");
        assert_eq!(recheck.at(due, late + ms(1)), Checked::Again(late + ms(2)));
        assert_eq!(recheck.at(due, late + ms(2)), Checked::Over);

        let mut recheck = Recheck::default();
        recheck.at(due, late);
        recheck.at(due, late + ms(1));
        let other = late + ms(700);
        assert_eq!(recheck.at(other, late + ms(2)), Checked::Again(other), "something has come");
    }
}
