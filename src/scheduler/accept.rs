//! The accept limit: each round of the event loop accepts few connections; the kernel queues the others.

use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use super::Schedulers;
use super::coop::exhaust_budget;
use super::policy::Load;

/// Connections accepted per round of the event loop.
pub const PER_ROUND: usize = 4;
/// Connections accepted per millisecond of a round that small exchanges alone make long.
const PER_MILLISECOND: f64 = 16.0;
/// Maximum in any round.
const PER_ROUND_MAX: usize = 64;
/// Connections that come later than this after the first one of a round belong to the next round.
const ROUND: Duration = Duration::from_millis(1);

/// The number of connections that a worker accepts in its next round.
fn per_round(load: Load) -> usize {
    if !load.is_of_small_exchanges() {
        return PER_ROUND;
    }
    ((load.small.as_secs_f64() * 1e3 * PER_MILLISECOND) as usize).clamp(PER_ROUND, PER_ROUND_MAX)
}

/// The connections that may be accepted in the current round.
#[derive(Clone, Copy, Debug, Default)]
pub struct Round {
    begin: Option<Instant>,
    left: usize,
}

impl Round {
    /// Counts an accepted connection. Returns whether it is the last one of its round. `load` returns the load since
    /// its last call.
    pub fn count(&mut self, now: Instant, load: impl FnOnce() -> Load) -> bool {
        let is_over = self.begin.is_none_or(|begin| now.saturating_duration_since(begin) >= ROUND);
        if self.left == 0 || is_over {
            (self.begin, self.left) = (Some(now), per_round(load()));
        }
        self.left -= 1;
        self.left == 0
    }
}

/// Limits the connections that a task accepts per poll.
///
/// Without it, a task would accept 128, the number of operations that tokio permits in one poll.
pub struct AcceptLimiter {
    schedulers: Arc<Schedulers>,
    round: Round,
    /// The time for small exchanges by the last look.
    small: Duration,
}

impl AcceptLimiter {
    /// Creates a limiter for one task.
    pub fn new(schedulers: Arc<Schedulers>) -> Self {
        AcceptLimiter { schedulers, round: Round::default(), small: Duration::ZERO }
    }

    /// Counts an accepted connection. After the last one of a round, this poll of the task accepts no more.
    pub async fn count(&mut self) {
        let AcceptLimiter { schedulers, round, small } = self;
        let ends = round.count(Instant::now(), || schedulers.with_here(|scheduler| scheduler.load(small)));
        if ends {
            std::future::poll_fn(|cx| {
                exhaust_budget(cx);
                Poll::Ready(())
            })
            .await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::schedulers;
    use super::*;

    fn load(small_ms: u64, bulk: usize) -> Load {
        Load { small: Duration::from_millis(small_ms), bulk }
    }

    #[test]
    fn long_rounds_of_small_exchanges_accept_more_and_those_of_bulk_do_not() {
        assert_eq!([0, 1, 2, 3, 100].map(|ms| per_round(load(ms, 0))), [4, 4, 32, 48, 64]);
        assert_eq!([0, 1, 2, 3, 100].map(|ms| per_round(load(ms, 5))), [4; 5]);
    }

    #[test]
    fn a_round_ends_with_its_last_connection_or_after_its_time() {
        let (mut round, begin, ms) = (Round::default(), Instant::now(), Duration::from_millis);
        let mut count = |after, small| round.count(begin + ms(after), || load(small, 0));
        assert_eq!([0; 4].map(|after| count(after, 0)), [false, false, false, true]);
        assert!(!count(0, 2), "the next round accepts 32");
        assert_eq!([1; 4].map(|after| count(after, 0)), [false, false, false, true], "what is left of it is void");
    }

    /// Number of connections that a new task accepts in its first poll, and the duration of that.
    async fn accepted_at_once() -> (usize, Duration) {
        // With a full budget.
        tokio::task::yield_now().await;
        let mut limiter = AcceptLimiter::new(schedulers());
        let mut accepted = 0;
        let accept = async {
            loop {
                // A listener's socket consumes budget for each connection in this way.
                tokio::task::coop::consume_budget().await;
                limiter.count().await;
                accepted += 1;
            }
        };
        let begun = Instant::now();
        {
            let mut accept = std::pin::pin!(accept);
            std::future::poll_fn(|cx| Poll::Ready(accept.as_mut().poll(cx).is_pending())).await;
        }
        (accepted, begun.elapsed())
    }

    #[tokio::test]
    async fn few_connections_are_accepted_at_a_time() {
        for _ in 0..1_000 {
            let (accepted, took) = accepted_at_once().await;
            // A thread that is preempted meanwhile begins another round.
            if took < ROUND {
                return assert_eq!(accepted, PER_ROUND);
            }
        }
        panic!("no poll was shorter than a round");
    }
}
