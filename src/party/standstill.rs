//! Whether a peer accepts bytes at all, by the bytes that its host has acknowledged.
//!
//! The kernel reports room in a send buffer only once a third of the buffer is free, and the buffer may have megabytes.
//! Until then, a peer that reads slowly but steadily looks like one that stands still. Therefore the acknowledged bytes
//! are looked at several times within a limit, and any change is progress.

use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use super::wait::Timer;

/// Number of looks within a limit. A peer is given up after this many looks without progress.
const LOOKS: u32 = 4;

/// A wait for a peer that accepts no bytes.
pub struct Standstill {
    /// The last look, or the beginning.
    since: Instant,
    /// What was seen then. `None`: unknown.
    seen: Option<u64>,
    /// Number of looks in a row that found no progress.
    fruitless: u32,
    timer: Timer,
}

impl Standstill {
    /// The wait begins now. For `seen` see [`Standstill::poll`].
    pub fn begin(seen: Option<u64>) -> Self {
        Standstill { since: now(), seen, fruitless: 0, timer: Timer::default() }
    }

    /// The peer has made progress: the wait begins again, and what was seen is unknown.
    pub fn restart(&mut self) {
        (self.since, self.seen, self.fruitless) = (now(), None, 0);
    }

    /// Ready once the peer has made no progress for `limit`, in which the gateway itself ran. `look` returns a number
    /// that changes whenever the peer's host acknowledges bytes. `None`: no such number is known now.
    pub fn poll(&mut self, cx: &mut Context<'_>, limit: Duration, mut look: impl FnMut() -> Option<u64>) -> Poll<()> {
        loop {
            ready!(self.timer.poll_limit(cx, self.since, limit / LOOKS));
            let seen = look();
            self.fruitless = if seen.is_some() && seen != self.seen { 0 } else { self.fruitless + 1 };
            (self.since, self.seen) = (now(), seen.or(self.seen));
            if self.fruitless >= LOOKS {
                return Poll::Ready(());
            }
        }
    }
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(8);

    /// For how long a wait lasts, if `look` gives what is seen after a time.
    async fn lasts(seen: Option<u64>, look: impl Fn(Duration) -> Option<u64>) -> Duration {
        let began = tokio::time::Instant::now();
        let mut still = Standstill::begin(seen);
        poll_fn(|cx| still.poll(cx, LIMIT, || look(began.elapsed()))).await;
        began.elapsed()
    }

    fn is_about(lasted: Duration, expected: Duration) -> bool {
        (expected..expected + Duration::from_millis(50)).contains(&lasted)
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_accepts_nothing_is_given_up_at_the_limit() {
        for seen in [None, Some(5)] {
            let lasted = lasts(seen, |_| seen).await;
            assert!(is_about(lasted, LIMIT), "{seen:?}: {lasted:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_accepts_a_little_now_and_then_is_waited_for() {
        const WHILE: Duration = Duration::from_secs(100);
        // A byte every 7 s, which is less than the limit, for 100 s.
        let lasted = lasts(Some(0), |after| Some(after.min(WHILE).as_secs() / 7)).await;
        let last = Duration::from_secs(98);
        assert!(lasted >= last + LIMIT && lasted <= last + LIMIT * 5 / 4, "{lasted:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_known_is_no_progress() {
        let lasted = lasts(None, |after| (after > LIMIT / 2).then_some(7)).await;
        assert!(lasted > LIMIT && lasted < 2 * LIMIT, "the first number may be progress: {lasted:?}");
        let lasted = lasts(Some(7), |after| (after > LIMIT / 2).then_some(7)).await;
        assert!(is_about(lasted, LIMIT), "{lasted:?}");
    }
}
