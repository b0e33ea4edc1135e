//! Phase `select`: an endpoint is chosen, anew for every attempt.
//!
//! After `route`; before `connect`.

use std::sync::Arc;

use super::exchange::Exchange;
use crate::error::{Refusal, refusal};
use crate::phase::Phase;
use crate::upstream::Endpoint;

/// Chooses the endpoint of the next attempt: one that was not tried yet.
pub fn next(exchange: &mut Exchange) -> Result<Arc<Endpoint>, &'static Refusal> {
    let now = exchange.enter(Phase::Select);
    exchange.attempts += 1;
    if let Some(link) = &exchange.link {
        link.sending();
    }
    let upstream = exchange.upstream.as_ref();
    let chosen = upstream.and_then(|upstream| Some((upstream, upstream.select(exchange.hash, &exchange.tried, now)?)));
    let Some((upstream, engaged)) = chosen else {
        // If all were tried, what went wrong with the last one is the better answer.
        return Err(exchange.failure.unwrap_or(&refusal::SELECT_NO_ENDPOINT));
    };
    let (upstream, endpoint) = (upstream.clone(), engaged.endpoint().clone());
    exchange.tried.push(endpoint.clone());
    let now = exchange.enter(Phase::Connect);
    exchange.engage(upstream, engaged, now);
    Ok(endpoint)
}
