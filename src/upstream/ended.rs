//! The result of an attempt: what the proxy reports to an upstream exactly once per attempt, and its meaning for each
//! observer.
//!
//! This is the second half of a table: `proxy/blame.rs` maps faults to an [`Outcome`], and [`Ended::effects`] maps that
//! to what breaker, outlier detection and latency see. A probe of a half-open breaker uses the breaker's view.

use std::time::Duration;

use http::StatusCode;

use super::breaker::Verdict;
use super::outlier::Pass;
use crate::error::Refusal;

/// The end of an attempt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ended {
    /// The outcome.
    pub outcome: Outcome,
    /// Time to connect. `None`: the connection was reused, or there was none.
    pub connect: Option<Duration>,
    /// Time from the last request byte sent to the endpoint, if known, to the end of the response header. `None`: there
    /// was no header.
    pub wait: Option<Duration>,
    /// Total time of waiting for the endpoint and for no other party.
    pub own: Duration,
}

/// The outcome of an attempt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    /// The endpoint sent a complete response.
    Answered(StatusCode),
    /// No connection was made.
    Connect(&'static Refusal),
    /// Connected, then failed: reset, timeout, malformed response.
    Failed(&'static Refusal),
    /// Another party ended it, such as the client, or a reused connection was stale. It does not count against the
    /// endpoint.
    Cancelled,
}

/// What the end of an attempt means for each observer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Effects {
    /// For the circuit breaker, and for its probe.
    pub breaker: Verdict,
    /// For outlier detection; `None`: ignored.
    pub outlier: Option<Pass>,
    /// For the latency average.
    pub latency: Lesson,
}

/// What an attempt shows about the endpoint's latency.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lesson {
    /// The response header took this long.
    Took(Duration),
    /// It would have taken this long or longer.
    AtLeast(Duration),
}

impl Outcome {
    /// The reason for a failure.
    pub fn failure(&self) -> Option<&'static Refusal> {
        match self {
            Outcome::Connect(refusal) | Outcome::Failed(refusal) => Some(refusal),
            Outcome::Answered(_) | Outcome::Cancelled => None,
        }
    }
}

impl Ended {
    /// How long its endpoint was waited for until its header, or until the attempt ended without one.
    pub fn to_header(&self) -> Duration {
        self.wait.map_or(self.own, |wait| self.connect.unwrap_or_default() + wait)
    }

    /// What each observer sees.
    pub fn effects(&self) -> Effects {
        let time = self.to_header();
        let (took, at_least) = (Lesson::Took(time), Lesson::AtLeast(time));
        let effects = |breaker, outlier, latency| Effects { breaker, outlier, latency };
        match self.outcome {
            Outcome::Answered(status) => {
                let verdict = if status.is_server_error() { Verdict::Bad } else { Verdict::Good };
                effects(verdict, Some(Pass::Answered(status.as_u16())), took)
            }
            Outcome::Connect(_) => effects(Verdict::Bad, Some(Pass::Unconnected), at_least),
            Outcome::Failed(_) => effects(Verdict::Bad, Some(Pass::Failed), at_least),
            // It depends on whether the endpoint had responded before another party ended the attempt.
            Outcome::Cancelled if self.wait.is_some() => effects(Verdict::Neither, None, took),
            Outcome::Cancelled => effects(Verdict::Neither, None, at_least),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::error::refusal;

    const MS: Duration = Duration::from_millis(1);

    /// An attempt with 9 ms of endpoint time, one of them for the connection.
    fn effects(outcome: Outcome, wait: Option<u32>) -> Effects {
        Ended { outcome, connect: Some(MS), wait: wait.map(|wait| wait * MS), own: 9 * MS }.effects()
    }

    #[test]
    fn each_outcome_says_one_thing_to_all_who_watch_the_endpoint() {
        let (took, at_least) = (Lesson::Took(4 * MS), Lesson::AtLeast(4 * MS));
        let answered = |status| Outcome::Answered(StatusCode::from_u16(status).expect("a status"));
        for (outcome, breaker, outlier, latency) in [
            (answered(200), Verdict::Good, Some(Pass::Answered(200)), took),
            (answered(499), Verdict::Good, Some(Pass::Answered(499)), took),
            (answered(500), Verdict::Bad, Some(Pass::Answered(500)), took),
            (Outcome::Failed(&refusal::RECEIVE_RESET), Verdict::Bad, Some(Pass::Failed), at_least),
            (Outcome::Cancelled, Verdict::Neither, None, took),
        ] {
            assert_eq!(effects(outcome, Some(3)), Effects { breaker, outlier, latency }, "{outcome:?}");
        }
    }

    #[test]
    fn without_a_header_an_endpoint_is_at_least_as_slow_as_it_was_waited_for() {
        let at_least = Lesson::AtLeast(9 * MS);
        assert_eq!(effects(Outcome::Cancelled, None).latency, at_least);
        assert_eq!(effects(Outcome::Failed(&refusal::WAIT_TIMEOUT), None).latency, at_least);
        let unconnected = effects(Outcome::Connect(&refusal::CONNECT_REFUSED), None);
        assert_eq!((unconnected.outlier, unconnected.latency), (Some(Pass::Unconnected), at_least));
    }
}
