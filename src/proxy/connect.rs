//! Phase `connect`: a connection to the endpoint is made or taken from the pool.
//!
//! Pingora does the work; here is what follows from its outcome. After `select`; before `send`, or `select` again.

use std::os::fd::RawFd;
use std::time::Instant;

use pingora::protocols::http::ServerSession;
use pingora::{Error, ErrorType};

use super::exchange::Exchange;
use super::retry::{self, Failure};
use crate::error::{Refusal, refusal};
use crate::phase::Phase;
use crate::upstream::Outcome;
use crate::upstream::window::Window;

/// The connection stands; the request is sent next.
pub fn made(exchange: &mut Exchange, reused: bool, socket: RawFd) {
    if let Some(upstream) = &exchange.upstream {
        let metrics = &upstream.metrics;
        if reused { metrics.connects_reused.inc() } else { metrics.connects_new.inc() }
    }
    if let (Some(link), Some(true)) = (&exchange.link, exchange.upstream.as_ref().map(|upstream| upstream.is_http1())) {
        link.comes_through(Some(Window::new(socket)));
    }
    let now = exchange.enter(Phase::Send);
    exchange.connected(reused, now);
}

/// No connection could be made. No byte of the request has left, so any method may be tried elsewhere.
pub fn failed(exchange: &mut Exchange, client: &ServerSession, mut error: Box<Error>) -> Box<Error> {
    let failure = reason(&error);
    tracing::debug!(endpoint = exchange.endpoint().map(|endpoint| &*endpoint.label), %error, "no connection");
    exchange.failure = Some(failure);
    exchange.release(|_| Outcome::Connect(failure), Instant::now());
    if let Some(upstream) = &exchange.upstream {
        upstream.metrics.connects_failed.inc();
    }
    let again = retry::again(exchange, client, Failure::Connect, None);
    error.set_retry(again);
    error
}

fn reason(error: &Error) -> &'static Refusal {
    match error.etype() {
        ErrorType::ConnectTimedout => &refusal::CONNECT_TIMEOUT,
        ErrorType::ConnectRefused => &refusal::CONNECT_REFUSED,
        ErrorType::TLSHandshakeFailure
        | ErrorType::TLSHandshakeTimedout
        | ErrorType::TLSWantX509Lookup
        | ErrorType::InvalidCert => &refusal::CONNECT_TLS,
        _ => &refusal::CONNECT_FAILED,
    }
}
