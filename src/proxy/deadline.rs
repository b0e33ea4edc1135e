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

use super::exchange::Exchange;
use crate::party::{Deadline, Fault, Party, What};
use crate::phase::Phase;

/// How much later than the session's clocks Pingora's may come, where it is left to it.
const NET: Duration = Duration::from_secs(1);

/// The limits of the exchange and of its present attempt.
#[derive(Clone, Copy, Debug, Default)]
pub struct Dues {
    /// When the exchange is to be over, once the request is here.
    pub exchange: Option<Deadline>,
    /// What the client says of the exchange (`grpc-timeout`).
    pub client: Option<Deadline>,
    /// For how long the endpoint of an attempt may be waited for until its answer is here.
    pub attempt: Option<Duration>,
    /// The connection of the present attempt has no more time than the exchange has left.
    is_hurried: bool,
}

/// The request is here, so that the clock begins to run if the route has one. Only the first call counts.
pub fn begin(exchange: &mut Exchange, now: Instant) {
    if std::mem::replace(&mut exchange.is_whole, true) {
        return;
    }
    if let Some(length) = exchange.route.as_ref().and_then(|route| route.deadline) {
        // In place of what held while the request came.
        exchange.dues.exchange = exchange.dues.client;
        bound(exchange, Deadline { due: now + length, length, is_clients: false });
    }
}

/// A gRPC client says for how long it waits at most: from now on, as far as we can know. The end of its request may be
/// far off, so until then the deadline of the route runs from here. If that is over, the endpoint may have waited for
/// its client.
pub fn begin_grpc(exchange: &mut Exchange, headers: &HeaderMap, now: Instant) {
    let after = |length| Deadline { due: now + length, length, is_clients: true };
    let timeout = headers.get("grpc-timeout").and_then(|value| grpc_timeout(value.to_str().ok()?));
    exchange.dues.client = timeout.map(after);
    let deadline = exchange.route.as_ref().and_then(|route| route.deadline);
    for deadline in deadline.map(after).into_iter().chain(exchange.dues.client) {
        bound(exchange, deadline);
    }
}

fn bound(exchange: &mut Exchange, deadline: Deadline) {
    if exchange.dues.exchange.is_none_or(|earlier| deadline.due < earlier.due) {
        exchange.dues.exchange = Some(deadline);
    }
    if exchange.attempt.is_some() {
        keep(exchange);
    }
}

/// An endpoint was chosen: its attempt has its time, and the connection no more than that.
pub fn begin_attempt(exchange: &mut Exchange, peer: &mut HttpPeer, now: Instant) {
    let per_try = exchange.route.as_ref().and_then(|route| route.retry.per_try_timeout());
    exchange.dues.attempt = per_try;
    let left = left(exchange, now);
    let own = peer.options.total_connection_timeout.into_iter().chain(per_try).min();
    exchange.dues.is_hurried = left.is_some_and(|left| own.is_none_or(|own| left < own));
    if let Some(time) = left.into_iter().chain(own).min() {
        // Pingora takes none at all for no limit.
        let time = Some(time.max(Duration::from_millis(1)));
        (peer.options.connection_timeout, peer.options.total_connection_timeout) = (time, time);
    }
}

/// Takes Pingora's own clock for reading away, which runs whichever party is waited for: the session has better ones,
/// and breaks off the connection when they say so. A connection that other exchanges share cannot be broken off; for
/// the few states in which Pingora does not ask the session, its clock stays, with the longest time for which a client
/// may be waited for on top. A request that asks for an upgrade has no body, and the session steps aside with a 101:
/// there Pingora's clock is right, and the only one.
pub fn leave_clocks_to_session(exchange: &Exchange, peer: &mut HttpPeer) {
    if exchange.upgrade.is_some() {
        return;
    }
    let (Some(_), Some(upstream), Some(route)) = (&exchange.link, &exchange.upstream, &exchange.route) else {
        return;
    };
    let of_client = if exchange.is_whole { Duration::ZERO } else { route.intake.total };
    let of_endpoint = peer.options.read_timeout;
    peer.options.read_timeout = of_endpoint.filter(|_| !upstream.is_http1()).map(|time| time + of_client + NET);
}

/// The connection is there: from here on the session keeps the clocks.
pub fn keep(exchange: &Exchange) {
    if let Some(link) = &exchange.link {
        link.bound(exchange.dues.attempt, exchange.dues.exchange);
    }
}

/// What is left of the time of the exchange; `None`: it may take as long as it likes.
pub fn left(exchange: &Exchange, now: Instant) -> Option<Duration> {
    exchange.dues.exchange.map(|deadline| deadline.due.saturating_duration_since(now))
}

/// The fault if the connection of the present attempt took too long.
pub fn of_connection(exchange: &Exchange) -> Fault {
    let deadline = exchange.dues.exchange.filter(|_| exchange.dues.is_hurried).zip(exchange.link.as_ref());
    match deadline {
        Some((deadline, link)) => deadline.fault(Phase::Connect, link.waits()),
        None => Fault::new(Party::Endpoint, Phase::Connect, What::Silent),
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
