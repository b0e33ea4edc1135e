//! Why an exchange failed: what our own stream or session found wrong, or else what the error of a library says.
//!
//! What follows from a fault, the table in `blame` says.

use std::time::{Duration, Instant};

use pingora::{Error, ErrorSource, ErrorType, RetryType};

use super::exchange::Exchange;
use crate::party::limits::DAWDLING;
use crate::party::{Fault, KeepsWaiting, Party, What};
use crate::phase::Phase;
use crate::upstream::transport::http2::HUNG_UP;

/// Why this exchange failed, its last attempt having ended with this error.
pub fn of(exchange: &Exchange, error: &Error, reused: bool) -> Fault {
    found(exchange).unwrap_or_else(|| reported(exchange, error, reused))
}

/// Whether it is no failure that the client has left: it has all of the answer, which came before the end of its
/// request.
pub fn is_served(exchange: &Exchange, fault: Fault) -> bool {
    let left = fault.party == Party::Client && fault.what == What::Left;
    left && exchange.link.as_ref().is_some_and(|link| link.stands_in() && link.has_left_whole())
}

/// What our own stream or session found wrong, if anything: they know more than the error that Pingora made of it.
pub fn found(exchange: &Exchange) -> Option<Fault> {
    let stream = exchange.client.fault();
    let endpoint = || {
        let malformed = exchange.attempts.channel.tail.as_ref().is_some_and(|tail| tail.is_malformed());
        malformed.then(|| Fault::new(Party::Endpoint, exchange.phase(), What::Malformed))
    };
    let found = stream.or_else(|| exchange.link.as_ref()?.fault()).or_else(endpoint)?;
    let whenever = matches!(found.what, What::Left | What::Stopped);
    let phase = if whenever { exchange.phase() } else { found.phase };
    Some(Fault { phase, ..found })
}

/// What an error of Pingora says: on which side something broke, and how. It says nothing of who was slow.
fn reported(exchange: &Exchange, error: &Error, reused: bool) -> Fault {
    let phase = exchange.phase();
    if *error.etype() == HUNG_UP {
        return Fault::new(Party::Gateway, phase, What::Failed);
    }
    match error.esource() {
        ErrorSource::Upstream => of_endpoint(exchange, phase, error, reused),
        ErrorSource::Downstream => of_client(phase, error.etype()),
        _ => Fault::new(Party::Gateway, phase, What::Failed),
    }
}

fn of_endpoint(exchange: &Exchange, phase: Phase, error: &Error, reused: bool) -> Fault {
    use ErrorType::{ConnectionClosed, H2Error, ReadError, ReadTimedout, WriteError, WriteTimedout};
    let endpoint = |what| Fault::new(Party::Endpoint, phase, what);
    let is_free = exchange.attempts.has_free();
    // So Pingora marks what an HTTP/2 endpoint has refused or announced not to answer.
    if matches!(error.retry, RetryType::Decided(true)) && is_free {
        return endpoint(What::Unprocessed);
    }
    match error.etype() {
        // It runs only while there is something to be written.
        WriteTimedout => Fault::new(Party::Endpoint, Phase::Send, What::Silent),
        // Our own clocks are finer. Before an upgrade there are none.
        ReadTimedout if phase == Phase::Wait && has_had_its_time(exchange) => endpoint(What::Silent),
        ReadTimedout => Fault::new(Party::Gateway, phase, What::Silent),
        ConnectionClosed | ReadError | WriteError | H2Error => {
            let kept = reused && exchange.routing.upstream.as_ref().is_some_and(|upstream| upstream.is_http1());
            match kept && phase != Phase::Receive && is_free && !matches!(error.etype(), H2Error) {
                true => endpoint(What::Stale),
                false => endpoint(match &exchange.link {
                    Some(link) => breakage(link.kept_waiting(Instant::now())),
                    // Another protocol has ends of its own.
                    None if phase == Phase::Receive => What::GaveUp,
                    None => What::Broke,
                }),
            }
        }
        _ => endpoint(What::Malformed),
    }
}

/// Whether an endpoint that might have switched protocols was waited for for long enough, and not its client.
fn has_had_its_time(exchange: &Exchange) -> bool {
    let (None, Some(attempt), Some(upstream)) =
        (&exchange.link, &exchange.attempts.present, &exchange.routing.upstream)
    else {
        return false;
    };
    attempt.waits_since().elapsed() >= upstream.timeouts.wait
}

/// What it means that a connection breaks off while, or after, other parties have kept its endpoint waiting for so
/// long.
pub(super) fn breakage(kept_waiting: Duration) -> What {
    if kept_waiting > DAWDLING { What::GaveUp } else { What::Broke }
}

fn of_client(phase: Phase, kind: &ErrorType) -> Fault {
    let what = match (phase, kind) {
        (_, ErrorType::WriteTimedout) => return Fault::new(Party::Client, Phase::Write, What::Silent),
        (Phase::Send, ErrorType::ReadTimedout) => What::Silent,
        (Phase::Send, ErrorType::InvalidHTTPHeader) => {
            return Fault::new(Party::Client, Phase::Header, What::Malformed);
        }
        // Pingora's own reading of chunks and trailers.
        (Phase::Send, ErrorType::Custom(_)) => What::Malformed,
        _ => What::Left,
    };
    Fault::new(Party::Client, phase, what)
}
