//! Phase `queue`: every endpoint that could serve the exchange is full, so it waits its turn.
//!
//! `select` comes here when it has found no endpoint with room. It ends with an endpoint, at the end of all patience,
//! or with the client: one that goes away leaves the line at once. `upstream/queue.rs` says whose turn it is.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use pingora::protocols::http::ServerSession;

use super::exchange::Exchange;
use crate::party::wait::{Ended, Eye, Wait};
use crate::party::{Fault, Party, What};
use crate::phase::Phase;
use crate::upstream::{Choice, Upstream};

/// An exchange that waits for an endpoint, and its client: an eye for that wait.
pub(super) struct Line<'e> {
    pub exchange: &'e Exchange,
    pub client: &'e mut ServerSession,
}

impl Eye for Line<'_> {
    type Left = Fault;

    /// Ready when the client has gone, or the exchange is to end.
    fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<Fault> {
        let phase = self.exchange.phase();
        match &self.exchange.link {
            Some(link) => link.poll_over(cx, phase),
            None => {
                let idle = pin!(self.client.read_body_or_idle(true));
                idle.poll(cx).map(|_| Fault::new(Party::Client, phase, What::Left))
            }
        }
    }
}

/// Waits until this exchange may have an endpoint, and takes it.
pub async fn wait(
    exchange: &mut Exchange,
    client: &mut ServerSession,
    upstream: &Arc<Upstream>,
) -> Result<Choice, Fault> {
    let now = exchange.enter(Phase::Queue);
    let Some(mut place) = upstream.queue(&exchange.attempts.tried, now) else {
        return Err(Fault::new(Party::Gateway, Phase::Queue, What::Full));
    };
    let spent = exchange.progress.clock.spent(Phase::Queue).unwrap_or_default();
    let due = now + upstream.admission.queue().timeout.saturating_sub(spent);
    let mut wait = Wait::until(due, Line { exchange, client });
    loop {
        match wait.on(poll_fn(|cx| place.poll_turn(cx))).await {
            Ended::Late => return Err(Fault::new(Party::Gateway, Phase::Queue, What::Silent)),
            Ended::Left(fault) => return Err(fault),
            Ended::Done(()) => match turn(exchange, upstream) {
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
    upstream.select_in_turn(
        exchange.routing.stuck.as_ref(),
        exchange.routing.hash,
        &exchange.attempts.tried,
        Instant::now(),
    )
}
