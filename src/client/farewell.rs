//! The time between the last byte written to a client and the close of its connection.
//!
//! The kernel resets a connection that is closed with unread bytes, or when further bytes arrive later, and a reset
//! destroys bytes that the peer has not read. HTTP/2 flow-control frames and pipelined requests are such bytes. The
//! writing side is therefore closed first, and bytes are read until the client closes its side, too. This type limits
//! the wait: it is short for a client that has received everything, and lasts for a client that still accepts bytes.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

/// Maximum wait for a client that has received everything.
pub const LINGER: Duration = Duration::from_secs(2);

/// Interval of the check of the client's progress.
const TICK: Duration = Duration::from_millis(100);

/// Limits the wait for a client's close. Its methods take the number of bytes that the client has not accepted.
#[derive(Debug)]
pub struct Farewell {
    tick: Pin<Box<Sleep>>,
    unsent: usize,
    /// Time at which `unsent` last decreased.
    since: Instant,
}

impl Farewell {
    /// Starts the wait now.
    pub fn begin(unsent: usize) -> Self {
        let now = Instant::now();
        Farewell { tick: Box::pin(tokio::time::sleep_until(now + TICK)), unsent, since: now }
    }

    /// Ready when the wait is over. `state` returns the bytes that the client has not accepted, and whether the
    /// connection is still busy, which restarts the wait. `patience` is the maximum time without progress.
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

    /// Duration of a farewell for a client that accepts bytes as `unsent` defines, by elapsed seconds.
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
