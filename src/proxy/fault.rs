//! Determines why an exchange failed: from the faults that Forebay's own stream and session recorded, or else from a
//! library's error.
//!
//! The table in `blame` defines the consequences of a fault.

use std::time::{Duration, Instant};

use pingora::{Error, ErrorSource, ErrorType, RetryType};

use super::exchange::Exchange;
use crate::party::limits::DELAY_MAX;
use crate::party::{DelaysEndpoint, Fault, Party, What};
use crate::phase::Phase;
use crate::upstream::transport::http1::Failure;
use crate::upstream::transport::http2::HUNG_UP;

/// The fault of an exchange whose last attempt ended with this error.
pub fn of(exchange: &Exchange, error: &Error, reused: bool) -> Fault {
    found(exchange).unwrap_or_else(|| reported(exchange, error, reused))
}

/// Whether the client's leaving is no failure: it received the whole response before the end of its request.
pub fn is_served(exchange: &Exchange, fault: Fault) -> bool {
    let left = fault.party == Party::Client && fault.what == What::Left;
    left && exchange.bodies.as_ref().is_some_and(|bodies| bodies.stands_in() && bodies.has_left_whole())
}

/// The fault recorded by Forebay's own stream or session, if any. It is more precise than the error that Pingora
/// derived from it.
pub fn found(exchange: &Exchange) -> Option<Fault> {
    let stream = exchange.client.fault();
    let endpoint = || {
        let (failure, phase) = (exchange.attempts.channel.tail.as_ref()?.failure()?, exchange.phase());
        Some(match failure {
            Failure::Malformed => Fault::new(Party::Endpoint, phase, What::Malformed),
            Failure::Untaken => Fault::new(Party::Endpoint, Phase::Send, What::Silent),
            // Neither side had to send bytes.
            Failure::Idle => Fault::new(Party::Gateway, phase, What::Silent),
        })
    };
    let found = stream.or_else(|| exchange.bodies.as_ref()?.fault()).or_else(endpoint)?;
    let whenever = matches!(found.what, What::Left | What::Stopped);
    let phase = if whenever { exchange.phase() } else { found.phase };
    Some(Fault { phase, ..found })
}

/// The fault according to Pingora's error, which gives the side and the kind of the failure, but not the slow party.
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
    // Pingora marks requests that way that an HTTP/2 endpoint refused or announced not to process.
    if matches!(error.retry, RetryType::Decided(true)) && is_free {
        return endpoint(What::Unprocessed);
    }
    match error.etype() {
        // This timeout runs only while there are bytes to write.
        WriteTimedout => Fault::new(Party::Endpoint, Phase::Send, What::Silent),
        // The clocks of the session are more precise.
        ReadTimedout => Fault::new(Party::Gateway, phase, What::Silent),
        ConnectionClosed | ReadError | WriteError | H2Error => {
            let kept = reused && exchange.routing.upstream.as_ref().is_some_and(|upstream| upstream.is_http1());
            match kept && phase != Phase::Receive && is_free && !matches!(error.etype(), H2Error) {
                true => endpoint(What::Stale),
                false => endpoint(match &exchange.bodies {
                    Some(bodies) => breakage(bodies.endpoint_delay(Instant::now())),
                    // The other protocol has its own ends.
                    None if phase == Phase::Receive => What::GaveUp,
                    None => What::Broke,
                }),
            }
        }
        _ => endpoint(What::Malformed),
    }
}

/// The meaning of a connection that breaks off after other parties kept its endpoint waiting for this time.
pub(super) fn breakage(endpoint_delay: Duration) -> What {
    if endpoint_delay > DELAY_MAX { What::GaveUp } else { What::Broke }
}

fn of_client(phase: Phase, kind: &ErrorType) -> Fault {
    let what = match (phase, kind) {
        (_, ErrorType::WriteTimedout) => return Fault::new(Party::Client, Phase::Write, What::Silent),
        (Phase::Send, ErrorType::ReadTimedout) => What::Silent,
        (Phase::Send, ErrorType::InvalidHTTPHeader) => {
            return Fault::new(Party::Client, Phase::Header, What::Malformed);
        }
        // Pingora's own parser of chunks and trailers reports these.
        (Phase::Send, ErrorType::Custom(_)) => What::Malformed,
        _ => What::Left,
    };
    Fault::new(Party::Client, phase, what)
}
