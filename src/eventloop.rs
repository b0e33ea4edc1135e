//! What the loop of a worker costs and how it does. Here: the time that Forebay itself spends on an exchange.
//!
//! An exchange mostly waits, for the client or for its upstream. What it costs is the time in which its future is
//! polled; it is measured where that future is made and is not derived from phases.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

thread_local! {
    /// When the exchange that is being polled on this thread would have begun, had it never waited.
    static POLLED_SINCE: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Says whether an exchange is to be polled at all. While it is closed, whoever closed it does what there is to do and has
/// registered whatever opens it again.
pub trait Gate: Send + Sync {
    /// Ready: the exchange may go on.
    fn poll_open(&self, cx: &mut Context<'_>) -> Poll<()>;

    /// The exchange was polled, which took so long.
    fn polled(&self, time: Duration);
}

thread_local! {
    /// The gate that the exchange which is being polled has just set up.
    static ADOPTED: RefCell<Option<Arc<dyn Gate>>> = const { RefCell::new(None) };
}

/// Puts a gate before the exchange that runs on this thread. Without effect outside of a [`Metered`] future.
pub fn adopt(gate: Arc<dyn Gate>) {
    ADOPTED.set(Some(gate));
}

/// The future of an exchange: its polls are timed, and its gate is asked before each. Code that runs inside asks
/// [`own_time`].
pub struct Metered<F> {
    future: F,
    spent: Duration,
    gate: Option<Arc<dyn Gate>>,
}

impl<F> Metered<F> {
    /// Times the polls of `future`.
    pub fn new(future: F) -> Self {
        Metered { future, spent: Duration::ZERO, gate: None }
    }
}

impl<F: Future + Unpin> Future for Metered<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let begin = Instant::now();
        let closed = self.gate.as_ref().is_some_and(|gate| gate.poll_open(cx).is_pending());
        if closed {
            self.spent += begin.elapsed();
            return Poll::Pending;
        }
        let outer = POLLED_SINCE.replace(begin.checked_sub(self.spent));
        let polled = Pin::new(&mut self.future).poll(cx);
        POLLED_SINCE.set(outer);
        if let Some(gate) = ADOPTED.take() {
            self.gate = Some(gate);
        }
        let time = begin.elapsed();
        if let Some(gate) = &self.gate {
            gate.polled(time);
        }
        self.spent += time;
        polled
    }
}

/// The summed time of the polls of the exchange that runs on this thread, the present poll included.
/// Zero outside of a [`Metered`] future.
pub fn own_time(now: Instant) -> Duration {
    POLLED_SINCE.get().map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn busy(time: Duration) {
        let begin = Instant::now();
        while begin.elapsed() < time {
            std::hint::spin_loop();
        }
    }

    #[tokio::test]
    async fn work_counts_and_waiting_does_not() {
        let exchange = async {
            busy(Duration::from_millis(5));
            tokio::time::sleep(Duration::from_millis(100)).await;
            busy(Duration::from_millis(5));
            own_time(Instant::now())
        };
        let own = Metered::new(Box::pin(exchange)).await;
        assert!(own >= Duration::from_millis(10), "{own:?}");
        assert!(own < Duration::from_millis(90), "{own:?}");
        assert_eq!(own_time(Instant::now()), Duration::ZERO);
    }
}
