//! What the end of an attempt means: what the proxy tells an upstream of each endpoint that it was given, exactly once,
//! and what those who watch endpoints make of it.
//!
//! The second half of one table: `proxy/blame.rs` says which fault becomes which [`Outcome`], [`Ended::seen`] what
//! breaker, outlier detection and latency see of it. A probe of a half-open breaker sees what the breaker sees.

use std::time::Duration;

use http::StatusCode;

use super::breaker::Verdict;
use super::outlier::Pass;
use crate::error::Refusal;

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ended {
    /// What came of it.
    pub outcome: Outcome,
    /// How long it took until a connection was there. `None`: it was kept from an earlier exchange, or none came about.
    pub connect: Option<Duration>,
    /// From the last byte of the request that the endpoint was given before, as far as can be seen, to the end of the
    /// response header. `None`: there was none.
    pub wait: Option<Duration>,
    /// For how long the endpoint was waited for, connection and answer included, and no other party.
    pub own: Duration,
}

/// What came of an attempt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outcome {
    /// The endpoint has answered, and to the end.
    Answered(StatusCode),
    /// No connection came about.
    Connect(&'static Refusal),
    /// It was connected and then failed: reset, timed out, malformed.
    Failed(&'static Refusal),
    /// Another party ended it, such as the client, or a kept connection that had died unnoticed: it counts against no
    /// endpoint.
    Cancelled,
}

/// What the end of an attempt says of its endpoint.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    /// To the circuit breaker, and if it was a probe, of the probe.
    pub breaker: Verdict,
    /// To outlier detection; `None`: nothing.
    pub outlier: Option<Pass>,
    /// To the average of the latency.
    pub latency: Lesson,
}

/// What an attempt says of how fast its endpoint is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lesson {
    /// It took so long until the header of its answer.
    Took(Duration),
    /// It would have taken so long or longer.
    AtLeast(Duration),
}

impl Outcome {
    /// Why it failed, if it did.
    pub fn failure(&self) -> Option<&'static Refusal> {
        match self {
            Outcome::Connect(refusal) | Outcome::Failed(refusal) => Some(refusal),
            Outcome::Answered(_) | Outcome::Cancelled => None,
        }
    }
}

impl Ended {
    /// For how long its endpoint was waited for until its header was here, or until the attempt ended without one.
    pub fn to_header(&self) -> Duration {
        self.wait.map_or(self.own, |wait| self.connect.unwrap_or_default() + wait)
    }

    /// What it says of its endpoint.
    pub fn seen(&self) -> Seen {
        let time = self.to_header();
        let (took, at_least) = (Lesson::Took(time), Lesson::AtLeast(time));
        let seen = |breaker, outlier, latency| Seen { breaker, outlier, latency };
        match self.outcome {
            Outcome::Answered(status) => {
                let verdict = if status.is_server_error() { Verdict::Bad } else { Verdict::Good };
                seen(verdict, Some(Pass::Answered(status.as_u16())), took)
            }
            Outcome::Connect(_) => seen(Verdict::Bad, Some(Pass::Unconnected), at_least),
            Outcome::Failed(_) => seen(Verdict::Bad, Some(Pass::Failed), at_least),
            // It had answered before another party ended the attempt, or it had not.
            Outcome::Cancelled if self.wait.is_some() => seen(Verdict::Neither, None, took),
            Outcome::Cancelled => seen(Verdict::Neither, None, at_least),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::error::refusal;

    const MS: Duration = Duration::from_millis(1);

    /// An attempt of which 9 ms were its endpoint's, one of them for the connection.
    fn seen(outcome: Outcome, wait: Option<u32>) -> Seen {
        Ended { outcome, connect: Some(MS), wait: wait.map(|wait| wait * MS), own: 9 * MS }.seen()
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
            assert_eq!(seen(outcome, Some(3)), Seen { breaker, outlier, latency }, "{outcome:?}");
        }
    }

    #[test]
    fn without_a_header_an_endpoint_is_at_least_as_slow_as_it_was_waited_for() {
        let at_least = Lesson::AtLeast(9 * MS);
        assert_eq!(seen(Outcome::Cancelled, None).latency, at_least);
        assert_eq!(seen(Outcome::Failed(&refusal::WAIT_TIMEOUT), None).latency, at_least);
        let unconnected = seen(Outcome::Connect(&refusal::CONNECT_REFUSED), None);
        assert_eq!((unconnected.outlier, unconnected.latency), (Some(Pass::Unconnected), at_least));
    }
}
