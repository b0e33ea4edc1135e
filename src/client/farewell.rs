//! The time between the last byte that is written to a client and the close of its connection.
//!
//! The kernel resets a connection that is closed while bytes from its peer are unread, or when such bytes come later,
//! and a reset destroys what the peer has not taken yet. Credit for flow control of HTTP/2 and pipelined requests are
//! such bytes. So a connection is first shut in one direction, then read on until the client closes it, too. This type
//! bounds that time: a client that has everything is waited for briefly, one that still takes bytes for as long as it
//! does.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

/// How long a client that has everything is waited for.
pub const LINGER: Duration = Duration::from_secs(2);

/// How often the client's progress is looked at.
const TICK: Duration = Duration::from_millis(100);

/// Bounds the wait for a client's end. Its methods take what the client has not taken yet, in bytes.
#[derive(Debug)]
pub struct Farewell {
    tick: Pin<Box<Sleep>>,
    unsent: usize,
    /// When `unsent` shrank last.
    since: Instant,
}

impl Farewell {
    /// Begins now.
    pub fn begin(unsent: usize) -> Self {
        let now = Instant::now();
        Farewell { tick: Box::pin(tokio::time::sleep_until(now + TICK)), unsent, since: now }
    }

    /// Ready when the wait is over. `state` tells how much the client has not taken, and whether the connection is
    /// still busy, which starts the wait anew. `patience` bounds the time in which the client takes nothing of what
    /// there is.
    pub fn poll(
        &mut self,
        cx: &mut Context<'_>,
        patience: Duration,
        state: impl FnOnce() -> (usize, bool),
    ) -> Poll<()> {
        if self.tick.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        let (now, (unsent, busy)) = (Instant::now(), state());
        if busy || unsent < self.unsent {
            self.since = now;
        }
        self.unsent = unsent;
        if now - self.since >= if unsent == 0 { LINGER } else { patience } {
            return Poll::Ready(());
        }
        self.tick.as_mut().reset(now + TICK);
        // Registers for the next tick, which is in the future.
        let _ = self.tick.as_mut().poll(cx);
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How long a farewell takes to a client that takes bytes as `unsent` says, by the seconds that have passed.
    async fn lasts(patience: Duration, unsent: impl Fn(f64) -> (usize, bool)) -> f64 {
        let begin = Instant::now();
        let mut farewell = Farewell::begin(unsent(0.0).0);
        std::future::poll_fn(|cx| farewell.poll(cx, patience, || unsent(begin.elapsed().as_secs_f64()))).await;
        begin.elapsed().as_secs_f64()
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_has_everything_is_waited_for_briefly() {
        let lasted = lasts(Duration::from_secs(30), |_| (0, false)).await;
        assert!((2.0..2.3).contains(&lasted), "{lasted} s");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_bytes_is_waited_for_while_it_does() {
        let lasted = lasts(Duration::from_secs(5), |at| (1000_usize.saturating_sub(10 * at as usize), false)).await;
        assert!((102.0..102.3).contains(&lasted), "{lasted} s");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_is_given_up_after_its_patience() {
        let lasted = lasts(Duration::from_secs(5), |at| (if at < 3.0 { 1000 } else { 900 }, false)).await;
        assert!((8.0..8.3).contains(&lasted), "{lasted} s");
    }

    #[tokio::test(start_paused = true)]
    async fn a_busy_connection_is_not_over() {
        let lasted = lasts(Duration::from_secs(5), |at| (0, at < 60.0)).await;
        assert!((61.8..62.3).contains(&lasted), "{lasted} s");
    }
}
