//! Whose fault it was: turns an error of Pingora, seen in some phase, into the one reason that metrics, log and client get.

use pingora::{Error, ErrorSource, ErrorType};

use super::exchange::Exchange;
use crate::error::{Refusal, refusal};
use crate::phase::Phase;

/// Why this exchange failed.
///
/// What our own stream and session found comes first: they know more than the error that Pingora made of it.
pub fn reason(exchange: &Exchange, error: &Error) -> &'static Refusal {
    if let Some(found) = found(exchange) {
        return found;
    }
    match error.esource() {
        ErrorSource::Upstream => of_upstream(exchange, error.etype()),
        ErrorSource::Downstream => of_client(exchange.clock.phase(), error.etype()),
        _ => &refusal::INTERNAL,
    }
}

/// What our own stream or session found wrong, if anything.
pub fn found(exchange: &Exchange) -> Option<&'static Refusal> {
    let stream = exchange.connection.as_ref().and_then(|connection| connection.fault());
    stream.or_else(|| exchange.link.as_ref()?.fault())
}

/// Whether this speaks against the endpoint, and not against the client or ourselves.
pub fn is_upstreams(refusal: &Refusal) -> bool {
    matches!(refusal.status, 502 | 504)
}

/// Whether the endpoint took too long, by a clock of ours.
pub fn is_timeout(refusal: &Refusal) -> bool {
    let late = [&refusal::SEND_TIMEOUT, &refusal::WAIT_TIMEOUT, &refusal::RECEIVE_TIMEOUT];
    late.contains(&refusal) || is_deadline(refusal)
}

/// Whether the time of the whole exchange was over while an endpoint was busy with it.
pub fn is_deadline(refusal: &Refusal) -> bool {
    [&refusal::SEND_DEADLINE, &refusal::WAIT_DEADLINE, &refusal::RECEIVE_DEADLINE].contains(&refusal)
}

fn of_upstream(exchange: &Exchange, kind: &ErrorType) -> &'static Refusal {
    use ErrorType::{ConnectionClosed, H2Error, ReadError, ReadTimedout, WriteError, WriteTimedout};
    match (exchange.clock.phase(), kind) {
        (Phase::Select | Phase::Connect, _) => exchange.failure.unwrap_or(&refusal::CONNECT_FAILED),
        (_, WriteTimedout) => &refusal::SEND_TIMEOUT,
        (Phase::Send | Phase::Wait, ReadTimedout) => &refusal::WAIT_TIMEOUT,
        (Phase::Send, ConnectionClosed | ReadError | WriteError | H2Error) => &refusal::SEND_RESET,
        (Phase::Wait, ConnectionClosed | ReadError | WriteError | H2Error) => &refusal::WAIT_RESET,
        (Phase::Send | Phase::Wait, _) => &refusal::WAIT_MALFORMED,
        (_, ReadTimedout) => &refusal::RECEIVE_TIMEOUT,
        (_, ConnectionClosed | ReadError | WriteError | H2Error) => &refusal::RECEIVE_RESET,
        _ => &refusal::RECEIVE_MALFORMED,
    }
}

fn of_client(phase: Phase, kind: &ErrorType) -> &'static Refusal {
    match (phase, kind) {
        (_, ErrorType::WriteTimedout) => &refusal::WRITE_TIMEOUT,
        (Phase::Send, ErrorType::ReadTimedout) => &refusal::SEND_BODY_TIMEOUT,
        (Phase::Send, ErrorType::InvalidHTTPHeader) => &refusal::HEADER_MALFORMED,
        // Pingora's own reading of chunks and trailers.
        (Phase::Send, ErrorType::Custom(_)) => &refusal::SEND_BODY_MALFORMED,
        (Phase::Route | Phase::Select | Phase::Connect | Phase::Send, _) => &refusal::SEND_ABORTED,
        (Phase::Wait, _) => &refusal::WAIT_ABORTED,
        (Phase::Write | Phase::Finish, _) => &refusal::WRITE_ABORTED,
        _ => &refusal::RECEIVE_ABORTED,
    }
}
