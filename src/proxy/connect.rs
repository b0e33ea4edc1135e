//! Phase `connect`: opens a connection to the endpoint or takes one from the pool.
//!
//! The driver does the work; this module handles its outcome. After `select`; before `send`, or `select` again.

use std::os::fd::RawFd;
use std::time::Instant;

use pingora::protocols::Digest;
use pingora::protocols::http::ServerSession;
use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, ErrorType, Result};

use super::again;
use super::blame;
use super::exchange::Exchange;
use crate::finished::Why;
use crate::net;
use crate::party::What;
use crate::phase::Phase;
use crate::upstream::transport::http1::Tail;
use crate::upstream::transport::tls::Flaw;
use crate::upstream::window::Window;

/// Handles an established connection, new or reused. The request is sent next, unless the connection must not be used.
pub fn made(
    exchange: &mut Exchange,
    reused: bool,
    peer: &HttpPeer,
    socket: RawFd,
    digest: Option<&Digest>,
) -> Result<()> {
    if let Some(flaw) = Flaw::of(digest) {
        // No other exchange may use it, either.
        net::shut_down(socket);
        return Error::e_explain(ErrorType::InvalidCert, flaw.to_string()).map_err(|error: Box<Error>| error.into_up());
    }
    if let Some(upstream) = &exchange.routing.upstream {
        let metrics = &upstream.metrics;
        if reused { metrics.connects_reused.inc() } else { metrics.connects_new.inc() }
    }
    exchange.attempts.channel.tail = Tail::of(digest);
    if let (Some(tail), Some(upstream)) = (&exchange.attempts.channel.tail, &exchange.routing.upstream) {
        tail.limit_sending(upstream.timeouts.send);
    }
    let http1 = exchange.routing.upstream.as_ref().is_some_and(|upstream| upstream.is_http1());
    if let (Some(bodies), true) = (&exchange.bodies, http1) {
        bodies.set_window(Some(Window::new(socket)));
    }
    let now = exchange.enter(Phase::Send);
    exchange.connected(reused, now);
    exchange.keep_deadlines();
    if let (Some(attempt), Some(upstream)) = (&mut exchange.attempts.present, &exchange.routing.upstream) {
        let outdated = upstream.transport.age(digest).filter(|&age| upstream.transport.is_outdated(age, socket));
        if http1 {
            // A later look-up in the pool would not find a connection to the endpoint's other address.
            let elsewhere = !reused && !leads_to(socket, peer);
            attempt.owns(socket, outdated.is_some() || elsewhere);
        } else if let Some(age) = outdated {
            attempt.endpoint().renew(age, now);
        }
    }
    Ok(())
}

/// Whether the socket is connected to the requested address, and not to another address of the same server.
fn leads_to(socket: RawFd, peer: &HttpPeer) -> bool {
    let Some(asked) = peer._address.as_inet() else { return true };
    net::peer(socket).and_then(|address| address.as_socket()).is_none_or(|there| there == *asked)
}

/// Handles a failed connect. No byte of the request was sent, so any method may be retried elsewhere.
pub fn failed(exchange: &mut Exchange, client: &ServerSession, mut error: Box<Error>) -> Box<Error> {
    let now = Instant::now();
    let fault = match blame::connecting(&error) {
        fault if fault.what == What::Silent => exchange.deadlines.of_connection(exchange.bodies.as_deref()),
        fault => fault,
    };
    let row = blame::row(fault);
    let label = exchange.attempts.endpoint().map(|endpoint| &*endpoint.label);
    match &exchange.routing.upstream {
        Some(upstream) if fault.what == What::Insecure && upstream.transport.may_complain(now) => {
            tracing::warn!(upstream = %upstream.name, endpoint = label, %error, "no secure connection");
        }
        _ => tracing::debug!(endpoint = label, %error, "no connection"),
    }
    exchange.attempts.failure = Some(fault);
    exchange.note_failure(Why::Refusal(row.refusal.reason), now);
    exchange.release(|_| row.outcome(), now);
    if let Some(upstream) = &exchange.routing.upstream {
        upstream.metrics.connects_failed.inc();
    }
    error.set_retry(row.failure.is_some_and(|failure| again::after(exchange, client, failure, None)));
    error
}
