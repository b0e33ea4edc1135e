//! Phase `queue`: everybody who could serve the exchange is full, so it waits its turn.
//!
//! `select` comes here when it has found nobody with room. It ends with an endpoint, at the end of all patience, or
//! with the client: one that goes away leaves the line at once. `upstream/queue.rs` says whose turn it is.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use pingora::protocols::http::ServerSession;

use super::exchange::Exchange;
use crate::client::waiting::Timer;
use crate::party::{Fault, Party, What};
use crate::phase::Phase;
use crate::upstream::{Choice, Upstream};

/// What the one who waits hears of first.
enum Event {
    Turn,
    TooLate,
    Over(Fault),
}

/// Waits until this exchange may have an endpoint, and takes it.
pub async fn wait(
    exchange: &mut Exchange,
    client: &mut ServerSession,
    upstream: &Arc<Upstream>,
) -> Result<Choice, Fault> {
    let now = exchange.enter(Phase::Queue);
    let Some(mut place) = upstream.queue(&exchange.tried, now) else {
        return Err(Fault::new(Party::Gateway, Phase::Queue, What::Full));
    };
    if let Some(link) = &exchange.link {
        link.queueing();
    }
    let spent = exchange.clock.spent(Phase::Queue).unwrap_or_default();
    let due = now + upstream.admission.queue().timeout.saturating_sub(spent);
    let mut timer = Timer::default();
    loop {
        let event = poll_fn(|cx| {
            if place.poll_turn(cx).is_ready() {
                return Poll::Ready(Event::Turn);
            }
            if let Poll::Ready(fault) = poll_over(exchange, client, cx) {
                return Poll::Ready(Event::Over(fault));
            }
            timer.poll(cx, due).map(|()| Event::TooLate)
        });
        match event.await {
            Event::TooLate => return Err(Fault::new(Party::Gateway, Phase::Queue, What::Silent)),
            Event::Over(fault) => return Err(fault),
            Event::Turn => match turn(exchange, upstream) {
                Choice::Full => {
                    place.missed();
                    // There may be many turns to spare, and each is a look at all endpoints: others go first.
                    tokio::task::yield_now().await;
                }
                Choice::Engaged(engaged) => {
                    place.served();
                    return Ok(Choice::Engaged(engaged));
                }
                other => return Ok(other),
            },
        }
    }
}

fn turn(exchange: &Exchange, upstream: &Upstream) -> Choice {
    upstream.select_in_turn(exchange.stuck.as_ref(), exchange.hash, &exchange.tried, Instant::now())
}

/// Ready when the client has gone, or the exchange is to end.
pub(super) fn poll_over(exchange: &Exchange, client: &mut ServerSession, cx: &mut Context<'_>) -> Poll<Fault> {
    let phase = exchange.clock.phase();
    match &exchange.link {
        Some(link) => link.poll_over(cx, phase),
        None => pin!(client.read_body_or_idle(true)).poll(cx).map(|_| Fault::new(Party::Client, phase, What::Left)),
    }
}
