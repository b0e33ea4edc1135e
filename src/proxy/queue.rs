//! Phase `queue`: all eligible endpoints are at their limit, so the exchange waits for its turn.
//!
//! `select` calls this if no endpoint has room. The phase ends with an endpoint, with a timeout, or when the client
//! leaves, which frees its place at once. `upstream/queue.rs` defines the order.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use pingora::protocols::http::ServerSession;

use super::exchange::Exchange;
use crate::party::wait::{ClientWatch, Ended, Wait};
use crate::party::{Fault, Party, What};
use crate::phase::Phase;
use crate::upstream::{Choice, Upstream};

/// An exchange that waits for an endpoint, and its client: watches the client during the wait.
pub(super) struct Line<'e> {
    pub exchange: &'e Exchange,
    pub client: &'e mut ServerSession,
}

impl ClientWatch for Line<'_> {
    type Left = Fault;

    /// Ready when the client has left, or the exchange must end.
    fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<Fault> {
        let phase = self.exchange.phase();
        match &self.exchange.bodies {
            Some(bodies) => bodies.poll_over(cx, phase),
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
    let left = upstream.admission.queue().timeout.saturating_sub(spent);
    let mut wait = Wait::at_most(left, Line { exchange, client });
    loop {
        match wait.until(|cx| place.poll_turn(cx)).await {
            Ended::Late => return Err(Fault::new(Party::Gateway, Phase::Queue, What::Silent)),
            Ended::Left(fault) => return Err(fault),
            Ended::Done(()) => match turn(exchange, upstream) {
                Choice::Full => {
                    place.missed();
                    // Many turns may be free, and each examines all endpoints: let other tasks run first.
                    tokio::task::yield_now().await;
                }
                Choice::Leased(lease) => {
                    place.served();
                    return Ok(Choice::Leased(lease));
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
