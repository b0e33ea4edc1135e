//! Phase `select`: chooses an endpoint for each attempt; after a failed attempt there may be a pause first.
//!
//! After `route` and `buffer`; includes `queue` if all endpoints are at their limit; before `connect`.

use std::time::{Duration, Instant};

use http::{HeaderValue, header};
use pingora::protocols::http::ServerSession;
use pingora::upstreams::peer::HttpPeer;

use super::blame;
use super::exchange::Exchange;
use super::queue;
use crate::client::driver::course::Course;
use crate::error::{Refusal, refusal};
use crate::filter::Refused;
use crate::party::wait::{NoClient, Wait};
use crate::party::{Fault, Party, What};
use crate::phase::Phase;
use crate::upstream::transport::connector;
use crate::upstream::{Choice, Upstream};

/// Chooses the endpoint of the next attempt, preferably an untried one. Waits for an endpoint with room if needed,
/// within the exchange's deadline. Returns Pingora's description of the endpoint.
pub async fn next(exchange: &mut Exchange, client: &mut ServerSession) -> Result<Box<HttpPeer>, Refused> {
    let Some(left) = exchange.deadlines.left() else { return choose(exchange, client).await };
    // The pause and the queue inside watch the client.
    let chosen = Wait::at_most(left, NoClient::Within).on(choose(exchange, client)).await.in_time();
    chosen.unwrap_or_else(|| Err(refused(Fault::new(Party::Gateway, exchange.phase(), What::Overdue))))
}

async fn choose(exchange: &mut Exchange, client: &mut ServerSession) -> Result<Box<HttpPeer>, Refused> {
    let mut now = exchange.enter(Phase::Select);
    let pause = exchange.attempts.take_pause();
    if !pause.is_zero() {
        let line = queue::Line { exchange, client };
        if let Some(fault) = Wait::at_most(pause, line).out().await {
            return Err(refused(fault));
        }
        now = Instant::now();
    }
    let Some(upstream) = exchange.routing.upstream.clone() else {
        return Err(Refused::from(&refusal::SELECT_NO_ENDPOINT));
    };
    let choice = match upstream.select_for(
        exchange.routing.stuck.as_ref(),
        exchange.routing.hash,
        &exchange.attempts.tried,
        now,
    ) {
        Choice::Full => queue::wait(exchange, client, &upstream).await,
        choice => Ok(choice),
    };
    let lease = match choice {
        Ok(Choice::Leased(lease)) => lease,
        Ok(Choice::Away(time)) => return Err(away(exchange, &upstream, time)),
        Ok(Choice::Full | Choice::NoEndpoint) => return Err(none_left(exchange, &upstream)),
        Err(fault) => return Err(reject(&upstream, blame::row(fault).refusal).into()),
    };
    let endpoint = lease.endpoint().clone();
    let now = exchange.enter(Phase::Connect);
    exchange.lease(upstream, lease, now);
    let mut peer = endpoint.peer_for(|| exchange.client.addresses());
    let http1 = exchange.routing.upstream.as_ref().is_some_and(|upstream| upstream.is_http1());
    if let Some(route) = &exchange.routing.route {
        exchange.deadlines.begin_attempt(route.retry.per_try_timeout(), &mut peer, now);
        if exchange.bodies.is_some() {
            exchange.deadlines.leave_clocks_to_session(route.request_policy.total, http1, &mut peer);
        }
    }
    if exchange.attempts.takes_fresh_connection() {
        connector::separate(&mut peer);
    }
    if exchange.routing.course != Some(Course::Own) {
        // Only Pingora's driver connects by the marks.
        connector::mark(&mut peer, http1);
    }
    Ok(peer)
}

/// If all endpoints were tried, the fault of the last attempt is the better reason.
fn none_left(exchange: &Exchange, upstream: &Upstream) -> Refused {
    match exchange.attempts.failure {
        Some(fault) => refused(fault),
        None => reject(upstream, &refusal::SELECT_NO_ENDPOINT).into(),
    }
}

/// The circuit breaker is open; `Retry-After` gives the time until it admits requests. If an attempt of this exchange
/// has just failed, and possibly opened the breaker, its fault is the better reason.
fn away(exchange: &Exchange, upstream: &Upstream, time: Duration) -> Refused {
    if let Some(fault) = exchange.attempts.failure {
        return refused(fault);
    }
    let seconds = time.as_secs() + u64::from(time.subsec_nanos() > 0);
    let refusal = reject(upstream, &refusal::SELECT_BREAKER_OPEN);
    Refused { refusal, headers: vec![(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)))] }
}

fn refused(fault: Fault) -> Refused {
    blame::row(fault).refusal.into()
}

fn reject(upstream: &Upstream, refusal: &'static Refusal) -> &'static Refusal {
    upstream.metrics.limits.reject(refusal);
    refusal
}
