//! Decides whether a failed request is sent again: the rules of a route.
//!
//! This module decides only whether another attempt is safe and useful. The upstream's retry budget limits the load
//! (`upstream/retries.rs`). `again` asks for an exchange, and `attempt` keeps the consequences.

use std::time::Duration;

use http::{HeaderMap, StatusCode};

use crate::config::route::retry::{On, Retry};
use crate::finished::Why;
use crate::metrics::retry::{Cause, Objection};
use crate::upstream::retries::Allowance;

/// The rules of a route.
#[derive(Clone, Debug)]
pub struct Rules {
    attempts: u32,
    per_try_timeout: Option<Duration>,
    connect_error: bool,
    reset: bool,
    timeout: bool,
    statuses: Box<[u16]>,
    /// The retried gRPC codes, one bit per code.
    grpc: u32,
    backoff: Backoff,
    allowance: Allowance,
    non_idempotent: bool,
    same_endpoint: bool,
}

/// The pauses before attempts.
#[derive(Clone, Copy, Debug)]
struct Backoff {
    base: Duration,
    max: Duration,
}

/// The reason of a failed attempt that is not the client's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No connection could be opened.
    Connect,
    /// An idle connection was dead.
    Stale,
    /// The endpoint reported that it had not processed the request.
    Unprocessed,
    /// The connection broke off, or the response was not HTTP.
    Reset,
    /// Sending or waiting took too long.
    Timeout,
    /// The gateway could not open another connection.
    Exhausted,
    /// The response had this status.
    Status(StatusCode),
    /// The response consisted only of this gRPC status.
    Grpc(u8),
}

/// The facts for the decision.
#[derive(Clone, Copy, Debug)]
pub struct Situation {
    /// The reason of the last failure.
    pub failure: Failure,
    /// Number of attempts made.
    pub attempts: u32,
    /// Whether the method is idempotent.
    pub idempotent: bool,
    /// Whether the body can be read again from its first byte.
    pub replayable: bool,
    /// Whether bytes of a response were sent.
    pub begun: bool,
    /// Whether an untried endpoint exists.
    pub elsewhere: bool,
    /// The pause that the endpoint asks for.
    pub retry_after: Option<Duration>,
    /// The remaining time of the exchange.
    pub left: Option<Duration>,
}

/// The decision.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// The rules do not retry this failure.
    Unwanted,
    /// The rules would retry, but a condition forbids it.
    Refused(Objection),
    /// Another attempt after this pause.
    Again(Duration),
}

impl Failure {
    /// The label for metrics.
    pub fn cause(self) -> Cause {
        match self {
            Failure::Connect => Cause::Connect,
            Failure::Stale => Cause::Stale,
            Failure::Unprocessed => Cause::Unprocessed,
            Failure::Reset => Cause::Reset,
            Failure::Timeout => Cause::Timeout,
            Failure::Exhausted => Cause::Exhausted,
            Failure::Status(_) => Cause::Status,
            Failure::Grpc(_) => Cause::Grpc,
        }
    }

    /// The log's reason for a discarded response.
    pub fn why(self) -> Why {
        match self {
            Failure::Status(status) => Why::Status(status.as_u16()),
            Failure::Grpc(code) => Why::Grpc(code),
            other => Why::Refusal(other.cause().name()),
        }
    }

    /// Whether no endpoint can have processed the request.
    fn is_unbegun(self) -> bool {
        matches!(self, Failure::Connect | Failure::Unprocessed | Failure::Exhausted)
    }

    /// Whether an endpoint may have worked on the request, so that a repetition is additional load.
    pub fn is_load(self) -> bool {
        !matches!(self, Failure::Connect | Failure::Exhausted | Failure::Stale | Failure::Unprocessed)
    }

    /// Whether the failure concerns only a connection, not the endpoint: it does not count as an attempt, and any
    /// endpoint may be chosen.
    pub fn is_of_connection(self) -> bool {
        matches!(self, Failure::Stale | Failure::Unprocessed)
    }
}

impl Rules {
    /// Builds the rules from the configuration.
    pub fn new(written: &Retry) -> Rules {
        let statuses =
            written.on.iter().filter_map(|on| if let On::Status(status) = on { Some(*status) } else { None });
        let grpc = written.on.iter().filter_map(|on| if let On::Grpc(code) = on { Some(1 << code) } else { None });
        let small = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
        Rules {
            attempts: small(written.attempts.0),
            per_try_timeout: written.per_try_timeout.map(|time| time.0),
            connect_error: written.on.contains(&On::ConnectError),
            reset: written.on.contains(&On::Reset),
            timeout: written.on.contains(&On::Timeout),
            statuses: statuses.collect(),
            grpc: grpc.fold(0, |codes, code: u32| codes | code),
            backoff: Backoff { base: written.backoff.base.0, max: written.backoff.max.0 },
            allowance: Allowance { share: written.budget.ratio(), least: small(written.budget_least.0) },
            non_idempotent: written.non_idempotent,
            same_endpoint: written.same_endpoint,
        }
    }

    /// Whether a response is a failure; most routes define no such responses.
    pub fn failure(&self, status: StatusCode, headers: &HeaderMap) -> Option<Failure> {
        if self.statuses.contains(&status.as_u16()) {
            return Some(Failure::Status(status));
        }
        if self.grpc == 0 {
            return None;
        }
        let code: u8 = headers.get("grpc-status")?.to_str().ok()?.parse().ok()?;
        (code < 32 && self.grpc & (1 << code) != 0).then_some(Failure::Grpc(code))
    }

    /// Maximum time of an attempt until its response header.
    pub fn per_try_timeout(&self) -> Option<Duration> {
        self.per_try_timeout
    }

    /// The upstream's limit for repetitions.
    pub fn allowance(&self) -> Allowance {
        self.allowance
    }

    /// Decides on another attempt. `dice` is a random number from 0 to 1.
    pub fn judge(&self, situation: &Situation, dice: f64) -> Verdict {
        match self.without_deadline(situation, dice) {
            Verdict::Again(pause) if situation.left.is_some_and(|left| left <= pause) => {
                Verdict::Refused(Objection::Deadline)
            }
            verdict => verdict,
        }
    }

    fn without_deadline(&self, situation: &Situation, dice: f64) -> Verdict {
        let failure = situation.failure;
        if !self.wants(failure) {
            return Verdict::Unwanted;
        }
        if let Some(objection) = self.objection(situation) {
            return Verdict::Refused(objection);
        }
        // A resource that the gateway lacks is missing for other endpoints, too, at least briefly.
        let at_once = situation.elsewhere && !failure.is_load() && failure != Failure::Exhausted;
        if at_once || failure.is_of_connection() {
            return Verdict::Again(Duration::ZERO);
        }
        let pause = self.backoff.pause(situation.attempts, dice);
        // The pause that one endpoint asks for does not apply to another.
        let asked = situation.retry_after.filter(|_| !situation.elsewhere).unwrap_or_default();
        if asked > self.backoff.max {
            return Verdict::Refused(Objection::RetryAfter);
        }
        Verdict::Again(pause.max(asked))
    }

    fn wants(&self, failure: Failure) -> bool {
        match failure {
            Failure::Stale | Failure::Unprocessed => true,
            _ if self.attempts == 1 => false,
            Failure::Connect | Failure::Exhausted => self.connect_error,
            Failure::Reset => self.reset,
            Failure::Timeout => self.timeout,
            // These rules have already classified the response as a failure.
            Failure::Status(_) | Failure::Grpc(_) => true,
        }
    }

    fn objection(&self, situation: &Situation) -> Option<Objection> {
        let Situation { failure, attempts, idempotent, replayable, begun, elsewhere, .. } = *situation;
        if begun {
            return Some(Objection::Begun);
        }
        if !idempotent && !self.non_idempotent && !failure.is_unbegun() {
            return Some(Objection::Method);
        }
        if !replayable {
            return Some(Objection::Body);
        }
        if attempts >= self.attempts && !failure.is_of_connection() {
            return Some(Objection::Attempts);
        }
        let endpoint = elsewhere || self.same_endpoint || failure.is_of_connection();
        (!endpoint).then_some(Objection::Endpoints)
    }
}

impl Backoff {
    /// Full jitter: a random time up to the maximum, so that simultaneous failures are not retried simultaneously.
    fn pause(&self, attempts: u32, dice: f64) -> Duration {
        let doubled = self.base.saturating_mul(1 << attempts.saturating_sub(1).min(16));
        doubled.min(self.max).mul_f64(dice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::config::units::{Count, Time};

    const FINE: Situation = Situation {
        failure: Failure::Reset,
        attempts: 1,
        idempotent: true,
        replayable: true,
        begun: false,
        elsewhere: true,
        retry_after: None,
        left: None,
    };

    fn rules(written: Retry) -> Rules {
        Rules::new(&written)
    }

    fn refused(situation: Situation) -> Option<Objection> {
        match rules(Retry::default()).judge(&situation, 0.5) {
            Verdict::Refused(objection) => Some(objection),
            Verdict::Again(_) => None,
            Verdict::Unwanted => panic!("{situation:?} is not wanted"),
        }
    }

    #[test]
    fn what_was_sent_and_is_safe_is_sent_again() {
        assert_eq!(refused(FINE), None);
        assert_eq!(refused(Situation { attempts: 2, ..FINE }), None);
        assert_eq!(refused(Situation { attempts: 3, ..FINE }), Some(Objection::Attempts));
        assert_eq!(refused(Situation { idempotent: false, ..FINE }), Some(Objection::Method));
        assert_eq!(refused(Situation { replayable: false, ..FINE }), Some(Objection::Body));
        assert_eq!(refused(Situation { begun: true, ..FINE }), Some(Objection::Begun));
        assert_eq!(refused(Situation { elsewhere: false, ..FINE }), Some(Objection::Endpoints));
    }

    #[test]
    fn a_request_that_nobody_has_begun_with_may_be_of_any_method() {
        for failure in [Failure::Connect, Failure::Unprocessed] {
            assert_eq!(refused(Situation { failure, idempotent: false, ..FINE }), None);
        }
        // It is unknown whether the endpoint received the request on a dead connection.
        assert_eq!(refused(Situation { failure: Failure::Stale, idempotent: false, ..FINE }), Some(Objection::Method));
    }

    #[test]
    fn what_befell_a_connection_alone_costs_no_attempt_and_goes_to_any_endpoint() {
        let once = rules(Retry { attempts: Count(1), on: Vec::new(), ..Retry::default() });
        for failure in [Failure::Stale, Failure::Unprocessed] {
            let situation = Situation { failure, elsewhere: false, ..FINE };
            assert_eq!(once.judge(&situation, 1.0), Verdict::Again(Duration::ZERO));
        }
    }

    #[test]
    fn only_what_is_written_is_wanted() {
        let rules = rules(Retry { on: vec![On::Status(503), On::Grpc(14)], ..Retry::default() });
        for failure in [Failure::Connect, Failure::Reset, Failure::Timeout] {
            assert_eq!(rules.judge(&Situation { failure, ..FINE }, 0.5), Verdict::Unwanted);
        }
        let grpc = |code: &str| HeaderMap::from_iter([("grpc-status".parse().unwrap(), code.parse().unwrap())]);
        assert_eq!(rules.failure(StatusCode::BAD_GATEWAY, &HeaderMap::new()), None);
        let unavailable = StatusCode::SERVICE_UNAVAILABLE;
        assert_eq!(rules.failure(unavailable, &HeaderMap::new()), Some(Failure::Status(unavailable)));
        assert_eq!(rules.failure(StatusCode::OK, &grpc("14")), Some(Failure::Grpc(14)));
        for code in ["0", "13", "46", "-1", "fourteen"] {
            assert_eq!(rules.failure(StatusCode::OK, &grpc(code)), None, "{code}");
        }
    }

    #[test]
    fn pauses_grow_to_their_limit_and_are_anywhere_below_it() {
        let rules = rules(Retry { attempts: Count(10), ..Retry::default() });
        let pause = |attempts, dice| match rules.judge(&Situation { attempts, ..FINE }, dice) {
            Verdict::Again(pause) => pause.as_millis(),
            other => panic!("{other:?}"),
        };
        assert_eq!([1, 2, 3, 4, 5, 9].map(|attempts| pause(attempts, 1.0)), [25, 50, 100, 200, 250, 250]);
        assert_eq!([0.0, 0.5].map(|dice| pause(2, dice)), [0, 25]);
    }

    #[test]
    fn another_endpoint_is_connected_to_at_once_and_the_same_one_later() {
        let rules = rules(Retry { same_endpoint: true, ..Retry::default() });
        let refused = Situation { failure: Failure::Connect, ..FINE };
        assert_eq!(rules.judge(&refused, 1.0), Verdict::Again(Duration::ZERO));
        let same = Situation { elsewhere: false, ..refused };
        assert_eq!(rules.judge(&same, 1.0), Verdict::Again(Duration::from_millis(25)));
    }

    #[test]
    fn the_pause_that_an_endpoint_asks_for_is_kept_or_it_is_not_asked_again() {
        let backoff = crate::config::route::retry::Backoff { base: Time::milliseconds(25), max: Time::seconds(2) };
        let rules = rules(Retry { same_endpoint: true, backoff, on: vec![On::Status(503)], ..Retry::default() });
        let failure = Failure::Status(StatusCode::SERVICE_UNAVAILABLE);
        let asks = |seconds, elsewhere| {
            let retry_after = Some(Duration::from_secs(seconds));
            rules.judge(&Situation { failure, elsewhere, retry_after, ..FINE }, 0.0)
        };
        assert_eq!(asks(1, false), Verdict::Again(Duration::from_secs(1)));
        assert_eq!(asks(3, false), Verdict::Refused(Objection::RetryAfter));
        assert_eq!(asks(3, true), Verdict::Again(Duration::ZERO), "it says nothing of another one");
    }

    #[test]
    fn there_is_no_attempt_that_the_deadline_would_not_let_begin() {
        let rules = rules(Retry::default());
        let left = |left| rules.judge(&Situation { left: Some(Duration::from_millis(left)), ..FINE }, 1.0);
        assert_eq!(left(26), Verdict::Again(Duration::from_millis(25)));
        assert_eq!(left(25), Verdict::Refused(Objection::Deadline));
        let stale = Situation { failure: Failure::Stale, left: Some(Duration::ZERO), ..FINE };
        assert_eq!(rules.judge(&stale, 1.0), Verdict::Refused(Objection::Deadline));
    }
}
