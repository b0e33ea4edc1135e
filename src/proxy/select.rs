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
    exchange.enter(Phase::Select);
    exchange.attempts += 1;
    if let Some(link) = &exchange.link {
        link.sending();
    }
    let endpoint = exchange.upstream.as_ref().and_then(|upstream| upstream.select(&exchange.tried));
    // If all were tried, what went wrong with the last one is the better answer.
    let endpoint = endpoint.ok_or(exchange.failure.unwrap_or(&refusal::SELECT_NO_ENDPOINT))?;
    exchange.tried.push(endpoint.clone());
    exchange.enter(Phase::Connect);
    Ok(endpoint)
}
