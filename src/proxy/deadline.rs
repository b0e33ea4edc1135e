//! How long an exchange may take as a whole, and an attempt of it: `deadline` and `retry.per_try_timeout` of a route.
//!
//! As with Envoy's timeouts, the deadline runs from the last byte of the request to the last byte that comes from the endpoint,
//! all attempts and the pauses between them included: neither a slow upload nor a client that takes its answer slowly counts,
//! unless the endpoint has to wait for it. An attempt's time runs from the choice of its endpoint to the header of the answer.
//! The clocks are kept by `client/session.rs` while a connection stands, and by Pingora while it is made.

use std::time::{Duration, Instant};

use http::HeaderMap;
use pingora::upstreams::peer::HttpPeer;

use super::exchange::Exchange;
use crate::error::{Refusal, refusal};
use crate::phase::Phase;

/// When the exchange and its present attempt are to be over.
#[derive(Clone, Copy, Debug, Default)]
pub struct Dues {
    /// The exchange, once the request is here.
    pub exchange: Option<Instant>,
    /// The attempt, until its answer is here.
    pub attempt: Option<Instant>,
    /// What the client says of the exchange (`grpc-timeout`).
    pub client: Option<Instant>,
    /// Whether the exchange has no more time because its client says so: that it is over says nothing against an endpoint.
    pub is_clients: bool,
}

/// The request is here, so that the clock begins to run if the route has one. Only the first call counts.
pub fn begin(exchange: &mut Exchange, now: Instant) {
    if std::mem::replace(&mut exchange.is_whole, true) {
        return;
    }
    if let Some(deadline) = exchange.route.as_ref().and_then(|route| route.deadline) {
        // In place of what held while the request came.
        exchange.dues.exchange = exchange.dues.client;
        bound(exchange, now + deadline, false);
    }
}

/// A gRPC client says for how long it waits at most: from now on, as far as we can know. The end of its request may be far off,
/// so until then the deadline of the route runs from here. If that is over, the endpoint may have waited for its client.
pub fn begin_grpc(exchange: &mut Exchange, headers: &HeaderMap, now: Instant) {
    let timeout = headers.get("grpc-timeout").and_then(|value| grpc_timeout(value.to_str().ok()?));
    exchange.dues.client = timeout.map(|timeout| now + timeout);
    let deadline = exchange.route.as_ref().and_then(|route| route.deadline);
    for due in deadline.map(|deadline| now + deadline).into_iter().chain(exchange.dues.client) {
        bound(exchange, due, true);
    }
}

fn bound(exchange: &mut Exchange, due: Instant, is_clients: bool) {
    if exchange.dues.exchange.is_none_or(|earlier| due < earlier) {
        exchange.dues.exchange = Some(due);
        exchange.dues.is_clients = is_clients;
    }
    if exchange.attempt.is_some() {
        keep(exchange);
    }
}

/// An endpoint was chosen: its attempt has its time, and the connection no more than that.
pub fn begin_attempt(exchange: &mut Exchange, peer: &mut HttpPeer, now: Instant) {
    let per_try = exchange.route.as_ref().and_then(|route| route.retry.per_try_timeout());
    exchange.dues.attempt = per_try.map(|per_try| now + per_try);
    if let Some(left) = left(exchange, now).into_iter().chain(per_try).min() {
        for timeout in [&mut peer.options.connection_timeout, &mut peer.options.total_connection_timeout] {
            // Pingora takes none at all for no limit.
            *timeout = Some(timeout.map_or(left, |own| own.min(left)).max(Duration::from_millis(1)));
        }
    }
}

/// The connection stands: from here on the session keeps the clocks.
pub fn keep(exchange: &Exchange) {
    if let Some(link) = &exchange.link {
        link.due(exchange.dues.attempt, exchange.dues.exchange);
    }
}

/// What is left of the time of the exchange; `None`: it may take as long as it likes.
pub fn left(exchange: &Exchange, now: Instant) -> Option<Duration> {
    exchange.dues.exchange.map(|due| due.saturating_duration_since(now))
}

/// Whether that time is over.
pub fn is_over(exchange: &Exchange, now: Instant) -> bool {
    exchange.dues.exchange.is_some_and(|due| due <= now)
}

/// What the client is told if it is over before a connection stands.
pub fn refusal(phase: Phase) -> &'static Refusal {
    match phase {
        Phase::Queue => &refusal::QUEUE_DEADLINE,
        Phase::Connect => &refusal::CONNECT_DEADLINE,
        _ => &refusal::SELECT_DEADLINE,
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
        let told =
            [Phase::Select, Phase::Queue, Phase::Connect].map(|phase| (refusal(phase).reason, refusal(phase).status));
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
