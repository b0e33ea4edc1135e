//! Decides whether an exchange makes another attempt after a failed one, by its `retry` rules.
//!
//! Called by the phase in which an attempt failed; `select` follows after a pause.

use std::time::{Duration, Instant};

use http::{HeaderMap, header};
use pingora::http::ResponseHeader;
use pingora::protocols::http::ServerSession;
use pingora::{Error, ErrorType};

use super::attempt::Attempt;
use super::exchange::Exchange;
use super::retry::{Failure, Situation};
use crate::phase::Phase;

/// Whether the exchange makes another attempt after this failure. If so, it is prepared for `select`. Reports to the
/// client and to the previous upstream are not reverted here.
pub fn after(exchange: &mut Exchange, client: &ServerSession, failure: Failure, after: Option<Duration>) -> bool {
    let (Some(route), Some(upstream)) = (&exchange.routing.route, &exchange.routing.upstream) else { return false };
    let situation = Situation {
        failure,
        attempts: exchange.attempts.counted(),
        idempotent: client.req_header().method.is_idempotent(),
        replayable: !client.retry_buffer_truncated(),
        begun: begun(exchange, client),
        elsewhere: upstream.has_more(&exchange.attempts.tried),
        retry_after: after,
        left: exchange.deadlines.left(),
    };
    exchange.attempts.again(&route.retry, upstream, &situation)
}

/// Handles the response to an attempt.
///
/// # Errors
///
/// If the response counts as a failure and another attempt follows: no part of it is sent to the client. Over HTTP/1,
/// Pingora then closes the connection.
pub fn answered(exchange: &mut Exchange, client: &ServerSession, response: &ResponseHeader) -> Result<(), Box<Error>> {
    if response.status.is_informational() {
        return Ok(());
    }
    let failure =
        exchange.routing.route.as_ref().and_then(|route| route.retry.failure(response.status, &response.headers));
    if let Some(failure) = failure {
        let now = Instant::now();
        if let Some(attempt) = &mut exchange.attempts.present {
            attempt.answered(response.status, now);
        }
        if after(exchange, client, failure, retry_after(&response.headers)) {
            exchange.note_failure(failure.why(), now);
            exchange.release(Attempt::outcome, now);
            exchange.attempts.discard_answer();
            return Err(Error::new_up(ErrorType::new("an answer that is not taken")));
        }
    }
    exchange.attempts.accept_answer();
    Ok(())
}

/// Whether bytes of a response were sent, so that no other one is possible.
fn begun(exchange: &Exchange, client: &ServerSession) -> bool {
    match &exchange.bodies {
        Some(bodies) => bodies.begun(),
        None => exchange.phase() == Phase::Receive || client.response_written().is_some(),
    }
}

/// The endpoint's `Retry-After` in seconds (RFC 9110 §10.2.3). A date is ignored.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_read_in_seconds() {
        let said = |text: &str| retry_after(&HeaderMap::from_iter([(header::RETRY_AFTER, text.parse().unwrap())]));
        assert_eq!(said("2"), Some(Duration::from_secs(2)));
        assert_eq!(said("Wed, 21 Oct 2015 07:28:00 GMT"), None);
    }
}
