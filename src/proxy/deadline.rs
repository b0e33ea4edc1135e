//! How long an exchange may take as a whole, and an attempt of it: `deadline` and `retry.per_try_timeout` of a route.
//!
//! As with Envoy's timeouts, the deadline runs from the last byte of the request to the last byte that comes from the
//! endpoint, all attempts and the pauses between them included: neither a slow upload nor a client that takes its
//! answer slowly counts, unless the endpoint has to wait for it. An attempt's time runs from the choice of its endpoint
//! to the header of the answer, and while that endpoint is what is waited for. The clocks are kept by
//! `client/session.rs` once the connection is there, and by Pingora while it is made.

use std::time::{Duration, Instant};

use http::HeaderMap;
use pingora::upstreams::peer::HttpPeer;

use crate::client::session::Link;
use crate::party::{Deadline, Fault, Party, What};
use crate::phase::Phase;

/// How much later than the session's clocks Pingora's may come, where it is left to it.
const NET: Duration = Duration::from_secs(1);

/// The limits of an exchange and of its present attempt.
#[derive(Clone, Copy, Debug, Default)]
pub struct Deadlines {
    /// When the exchange is to be over, once the request is here.
    exchange: Option<Deadline>,
    /// What the client says of the exchange (`grpc-timeout`).
    client: Option<Deadline>,
    /// For how long the endpoint of an attempt may be waited for until its answer is here.
    attempt: Option<Duration>,
    /// The connection of the present attempt has no more time than the exchange has left.
    is_hurried: bool,
    /// All of the request has come.
    is_whole: bool,
}

impl Deadlines {
    /// All of the request has come: the clock begins to run if the route has one, of this length. Only the first call
    /// counts. `true`: there is a new limit.
    pub fn begin(&mut self, length: Option<Duration>, now: Instant) -> bool {
        if std::mem::replace(&mut self.is_whole, true) {
            return false;
        }
        let Some(length) = length else { return false };
        // In place of what held while the request came.
        self.exchange = self.client;
        self.bound(Deadline { due: now + length, length, is_clients: false });
        true
    }

    /// A gRPC client says for how long it waits at most: from now on, as far as we can know. The end of its request may
    /// be far off, so until then the deadline of the route, of this length, runs from here. If that is over, the
    /// endpoint may have waited for its client.
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

    /// An endpoint was chosen: its attempt has this time, and the connection to `peer` no more than that.
    pub fn begin_attempt(&mut self, per_try: Option<Duration>, peer: &mut HttpPeer, now: Instant) {
        self.attempt = per_try;
        let left = self.left(now);
        let own = peer.options.total_connection_timeout.into_iter().chain(per_try).min();
        self.is_hurried = left.is_some_and(|left| own.is_none_or(|own| left < own));
        if let Some(time) = left.into_iter().chain(own).min() {
            // Pingora takes none at all for no limit.
            let time = Some(time.max(Duration::from_millis(1)));
            (peer.options.connection_timeout, peer.options.total_connection_timeout) = (time, time);
        }
    }

    /// Takes Pingora's own clock for reading away, which runs whichever party is waited for: the session has better
    /// ones, and breaks off the connection when they say so. A connection of HTTP/2, which other exchanges share,
    /// cannot be broken off; for the few states in which Pingora does not ask the session, its clock stays, with the
    /// longest time for which a client may be waited for, `client`, on top.
    pub fn leave_clocks_to_session(&self, client: Duration, http1: bool, peer: &mut HttpPeer) {
        let of_client = if self.is_whole { Duration::ZERO } else { client };
        let of_endpoint = peer.options.read_timeout;
        peer.options.read_timeout = of_endpoint.filter(|_| !http1).map(|time| time + of_client + NET);
    }

    /// The connection is there: from here on the session keeps the clocks.
    pub fn keep(&self, link: &Link) {
        link.bound(self.attempt, self.exchange);
    }

    /// No limit holds any longer.
    pub fn lift(&mut self) {
        *self = Deadlines { is_whole: self.is_whole, ..Deadlines::default() };
    }

    /// When the exchange is to be over. `None`: it may take as long as it likes.
    pub fn due(&self) -> Option<Instant> {
        self.exchange.map(|deadline| deadline.due)
    }

    /// What is left of the time of the exchange.
    pub fn left(&self, now: Instant) -> Option<Duration> {
        self.due().map(|due| due.saturating_duration_since(now))
    }

    /// The fault if the connection of the present attempt took too long.
    pub fn of_connection(&self, link: Option<&Link>) -> Fault {
        match self.exchange.filter(|_| self.is_hurried).zip(link) {
            Some((deadline, link)) => deadline.fault(Phase::Connect, link.waits()),
            None => Fault::new(Party::Endpoint, Phase::Connect, What::Silent),
        }
    }
}

/// `grpc-timeout`: up to eight digits and a unit.
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
        assert_eq!(deadlines.left(now), None);
        assert!(deadlines.begin(Some(seconds(5)), now));
        assert!(!deadlines.begin(Some(seconds(5)), now + seconds(1)));
        assert_eq!(deadlines.left(now + seconds(2)), Some(seconds(3)));
        assert_eq!(deadlines.left(now + seconds(9)), Some(Duration::ZERO));
        deadlines.lift();
        assert_eq!((deadlines.due(), deadlines.begin(Some(seconds(5)), now)), (None, false));
    }

    #[test]
    fn what_a_client_says_it_waits_holds_beside_the_time_of_the_route() {
        let (mut deadlines, now) = (Deadlines::default(), Instant::now());
        let says = |text: &str| HeaderMap::from_iter([("grpc-timeout".parse().unwrap(), text.parse().unwrap())]);
        deadlines.begin_grpc(&says("3S"), Some(seconds(5)), now);
        assert_eq!(deadlines.due(), Some(now + seconds(3)));
        assert!(deadlines.begin(Some(seconds(5)), now + seconds(1)));
        assert_eq!(deadlines.due(), Some(now + seconds(3)), "the client's, not six seconds");
        let mut deadlines = Deadlines::default();
        deadlines.begin_grpc(&says("9S"), Some(seconds(5)), now);
        assert!(deadlines.begin(Some(seconds(5)), now + seconds(1)));
        assert_eq!(deadlines.due(), Some(now + seconds(6)), "it runs anew from the end of the request");
    }

    #[test]
    fn an_attempt_has_the_least_of_its_times_for_its_connection() {
        let now = Instant::now();
        let time = |left, own, per_try| {
            let mut peer = HttpPeer::new("127.0.0.1:1", false, String::new());
            peer.options.total_connection_timeout = own;
            let mut deadlines = Deadlines::default();
            deadlines.begin(left, now);
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
