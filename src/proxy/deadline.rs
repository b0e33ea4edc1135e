//! The time limits of a whole exchange and of one attempt: `deadline` and `retry.per_try_timeout` of a route.
//!
//! As with Envoy's timeouts, the deadline runs from the last byte of the request to the last byte received from the
//! endpoint, including all attempts and their pauses. A slow upload does not count, and a slow download counts only if
//! the endpoint must wait for it. An attempt's time runs from the choice of its endpoint to the response header, while
//! the endpoint is waited for. `body.rs` enforces both once the connection is established; until then
//! Pingora's connect timeout does.

use std::time::{Duration, Instant};

use http::HeaderMap;
use pingora::upstreams::peer::HttpPeer;

use crate::body::Bodies;
use crate::party::{Deadline, Fault, Party, What};
use crate::phase::Phase;

/// Extra time of Pingora's read timeout, where it remains in use, over the session's clocks.
const NET: Duration = Duration::from_secs(1);

/// The limits of an exchange and of its current attempt.
#[derive(Clone, Copy, Debug, Default)]
pub struct Deadlines {
    /// Deadline of the exchange, once the request was received.
    exchange: Option<Deadline>,
    /// Deadline from the client (`grpc-timeout`).
    client: Option<Deadline>,
    /// Maximum time to wait for the endpoint of an attempt until its response header.
    attempt: Option<Duration>,
    /// Whether the exchange's remaining time limits the connect of the current attempt.
    is_hurried: bool,
    /// Whether the request was received completely.
    is_whole: bool,
}

impl Deadlines {
    /// Records that the request was received completely. Starts the route's deadline of this length, if any. Only the
    /// first call has an effect. `true`: there is a new limit.
    pub fn begin(&mut self, length: Option<Duration>, now: impl FnOnce() -> Instant) -> bool {
        if std::mem::replace(&mut self.is_whole, true) {
            return false;
        }
        let Some(length) = length else { return false };
        // This replaces the limit that applied while the request was received.
        self.exchange = self.client;
        self.bound(Deadline { due: now() + length, length, is_clients: false });
        true
    }

    /// Starts the deadline of a gRPC client, as far as known: its timeout from now. The end of its request may be far
    /// off, so the route's deadline of this length also runs from now until then. If that one expires, the endpoint may
    /// have waited for its client.
    pub fn begin_grpc(&mut self, headers: &HeaderMap, length: Option<Duration>, now: Instant) {
        let after = |length| Deadline { due: now + length, length, is_clients: true };
        let timeout = headers.get("grpc-timeout").and_then(|value| grpc_timeout(value.to_str().ok()?));
        self.client = timeout.map(after);
        for deadline in length.map(after).into_iter().chain(self.client) {
            self.bound(deadline);
        }
    }

    fn bound(&mut self, deadline: Deadline) {
        if self.exchange.is_none_or(|earlier| deadline.due < earlier.due) {
            self.exchange = Some(deadline);
        }
    }

    /// Sets the limits of an attempt with a chosen endpoint: its own time, and the time for the connection to `peer`.
    pub fn begin_attempt(&mut self, per_try: Option<Duration>, peer: &mut HttpPeer, now: Instant) {
        self.attempt = per_try;
        let left = self.left_at(now);
        let own = peer.options.total_connection_timeout.into_iter().chain(per_try).min();
        self.is_hurried = left.is_some_and(|left| own.is_none_or(|own| left < own));
        if let Some(time) = left.into_iter().chain(own).min() {
            // Pingora takes zero for no limit.
            let time = Some(time.max(Duration::from_millis(1)));
            (peer.options.connection_timeout, peer.options.total_connection_timeout) = (time, time);
        }
    }

    /// Disables Pingora's read timeout, which runs whichever party is waited for: the session has better clocks, and
    /// aborts the connection when they expire. An HTTP/2 connection is shared and cannot be aborted. For the few states
    /// in which Pingora does not poll the session, its timeout remains there, extended by `client`, the maximum wait
    /// for a client.
    pub fn leave_clocks_to_session(&self, client: Duration, http1: bool, peer: &mut HttpPeer) {
        let of_client = if self.is_whole { Duration::ZERO } else { client };
        let of_endpoint = peer.options.read_timeout;
        peer.options.read_timeout = of_endpoint.filter(|_| !http1).map(|time| time + of_client + NET);
    }

    /// Passes the limits to the session, which enforces them once the connection is established.
    pub fn keep(&self, bodies: &Bodies) {
        bodies.bound(self.attempt, self.exchange);
    }

    /// Removes all limits.
    pub fn lift(&mut self) {
        *self = Deadlines { is_whole: self.is_whole, ..Deadlines::default() };
    }

    /// Deadline of the exchange. `None`: it has no time limit.
    pub fn due(&self) -> Option<Instant> {
        self.exchange.map(|deadline| deadline.due)
    }

    /// Remaining time of the exchange. Most have no deadline and do not read the clock for it.
    pub fn left(&self) -> Option<Duration> {
        self.due().is_some().then(|| self.left_at(Instant::now())).flatten()
    }

    fn left_at(&self, now: Instant) -> Option<Duration> {
        self.due().map(|due| due.saturating_duration_since(now))
    }

    /// The fault for a connect of the current attempt that took too long.
    pub fn of_connection(&self, bodies: Option<&Bodies>) -> Fault {
        match self.exchange.filter(|_| self.is_hurried).zip(bodies) {
            Some((deadline, bodies)) => deadline.fault(Phase::Connect, bodies.waits()),
            None => Fault::new(Party::Endpoint, Phase::Connect, What::Silent),
        }
    }
}

/// Parses `grpc-timeout`: up to eight digits and a unit.
fn grpc_timeout(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_that_is_over_before_a_connection_exists_is_told_by_its_phase() {
        let told = [Phase::Select, Phase::Queue, Phase::Connect].map(|phase| {
            let refusal = super::super::blame::row(Fault::new(Party::Gateway, phase, What::Overdue)).refusal;
            (refusal.reason, refusal.status)
        });
        assert_eq!(told, [("select.deadline", 504), ("queue.deadline", 504), ("connect.deadline", 504)]);
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_time_of_a_route_runs_from_the_end_of_its_request_and_once() {
        let (mut deadlines, now) = (Deadlines::default(), Instant::now());
        assert_eq!(deadlines.left_at(now), None);
        assert!(deadlines.begin(Some(seconds(5)), || now));
        assert!(!deadlines.begin(Some(seconds(5)), || now + seconds(1)));
        assert_eq!(deadlines.left_at(now + seconds(2)), Some(seconds(3)));
        assert_eq!(deadlines.left_at(now + seconds(9)), Some(Duration::ZERO));
        deadlines.lift();
        assert_eq!((deadlines.due(), deadlines.begin(Some(seconds(5)), || now)), (None, false));
    }

    #[test]
    fn what_a_client_says_it_waits_holds_beside_the_time_of_the_route() {
        let (mut deadlines, now) = (Deadlines::default(), Instant::now());
        let says = |text: &str| HeaderMap::from_iter([("grpc-timeout".parse().unwrap(), text.parse().unwrap())]);
        deadlines.begin_grpc(&says("3S"), Some(seconds(5)), now);
        assert_eq!(deadlines.due(), Some(now + seconds(3)));
        assert!(deadlines.begin(Some(seconds(5)), || now + seconds(1)));
        assert_eq!(deadlines.due(), Some(now + seconds(3)), "the client's, not six seconds");
        let mut deadlines = Deadlines::default();
        deadlines.begin_grpc(&says("9S"), Some(seconds(5)), now);
        assert!(deadlines.begin(Some(seconds(5)), || now + seconds(1)));
        assert_eq!(deadlines.due(), Some(now + seconds(6)), "it runs anew from the end of the request");
    }

    #[test]
    fn an_attempt_has_the_least_of_its_times_for_its_connection() {
        let now = Instant::now();
        let time = |left, own, per_try| {
            let mut peer = HttpPeer::new("127.0.0.1:1", false, String::new());
            peer.options.total_connection_timeout = own;
            let mut deadlines = Deadlines::default();
            deadlines.begin(left, || now);
            deadlines.begin_attempt(per_try, &mut peer, now);
            peer.options.total_connection_timeout
        };
        let some = |number| Some(seconds(number));
        assert_eq!(time(some(9), some(5), some(3)), some(3));
        assert_eq!(time(some(2), some(5), some(3)), some(2));
        assert_eq!((time(None, some(5), None), time(None, None, None)), (some(5), None));
        assert_eq!(time(some(0), some(5), None), Some(Duration::from_millis(1)), "0 would be no limit");
    }

    #[test]
    fn the_timeout_of_a_grpc_call_has_digits_and_a_unit() {
        let hours = Duration::from_secs(99_999_999 * 3600);
        for (value, expected) in [
            ("99999999H", Some(hours)),
            ("2M", Some(Duration::from_secs(120))),
            ("3S", Some(Duration::from_secs(3))),
            ("250m", Some(Duration::from_millis(250))),
            ("7u", Some(Duration::from_micros(7))),
            ("1n", Some(Duration::from_nanos(1))),
            ("123456789S", None),
            ("S", None),
            ("", None),
            ("-1S", None),
            ("+1S", None),
            ("1s", None),
            ("1é", None),
        ] {
            assert_eq!(grpc_timeout(value), expected, "{value}");
        }
    }
}
