//! Phase `select`: an endpoint is chosen, anew for every attempt; after one that failed, there may be a pause before.
//!
//! After `route`; before `connect`.

use std::time::{Duration, Instant};

use pingora::upstreams::peer::HttpPeer;

use super::exchange::Exchange;
use crate::error::{Refusal, refusal};
use crate::phase::Phase;

/// Chooses the endpoint of the next attempt: one that was not tried yet. What it gives is all that Pingora needs to connect.
pub async fn next(exchange: &mut Exchange) -> Result<Box<HttpPeer>, &'static Refusal> {
    let mut now = exchange.enter(Phase::Select);
    let pause = std::mem::take(&mut exchange.pause);
    if !pause.is_zero() {
        tokio::time::sleep(pause).await;
        now = Instant::now();
    }
    if let Some(permit) = &mut exchange.permit {
        permit.begun();
    }
    exchange.attempts += 1;
    if let Some(link) = &exchange.link {
        link.sending();
    }
    let chosen = exchange.upstream.as_ref().and_then(|upstream| {
        let stays = exchange.stuck.as_ref().and_then(|stuck| upstream.stay(stuck, &exchange.tried));
        Some((upstream, stays.or_else(|| upstream.select(exchange.hash, &exchange.tried, now))?))
    });
    let Some((upstream, engaged)) = chosen else {
        // If all were tried, what went wrong with the last one is the better answer.
        return Err(exchange.failure.unwrap_or(&refusal::SELECT_NO_ENDPOINT));
    };
    let (upstream, endpoint) = (upstream.clone(), engaged.endpoint().clone());
    exchange.tried.push(endpoint.clone());
    let now = exchange.enter(Phase::Connect);
    exchange.engage(upstream, engaged, now);
    let mut peer = endpoint.peer_for(|| exchange.parties());
    if std::mem::take(&mut exchange.fresh) {
        separate(&mut peer);
    }
    Ok(peer)
}

/// Has a connection made, and not kept: connections to one endpoint that are kept tend to die together, and the next one
/// would be of no more use than the last.
fn separate(peer: &mut HttpPeer) {
    // Pingora knows kept connections by this among others.
    peer.group_key = rand::random();
    peer.options.idle_timeout = Some(Duration::from_millis(1));
}
