//! The expected latency of an endpoint: a moving average that follows peaks at once.
//!
//! Used by `peak_ewma`. A plain average would call a stalled endpoint fast as long as it sends no responses. So a
//! slow response raises the estimate at once, and the estimate decays over time (Finagle's peak EWMA). The decay
//! also lets a slow endpoint recover, although it gets few requests or none.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// After this time an estimate has lost about two thirds of its weight.
pub const DECAY: Duration = Duration::from_secs(10);
/// Least estimate: an endpoint without recent requests is not the fastest because of that.
const LEAST_SECONDS: f64 = 1e-6;

/// The expected latency in seconds. Shared by all workers, lock-free.
#[derive(Debug)]
pub struct Latency {
    began: Instant,
    /// The seconds as `f32` in the upper half; the time of the value, in milliseconds after `began`, in the lower
    /// half. The time wraps after 49 days; an estimate older than that is too high for some seconds.
    state: AtomicU64,
}

/// No observation yet.
const UNKNOWN: u64 = 0;

impl Latency {
    /// No observation yet.
    pub fn new(now: Instant) -> Latency {
        Latency { began: now, state: AtomicU64::new(UNKNOWN) }
    }

    /// Copies the estimate of `earlier`.
    pub fn resemble(&self, earlier: &Latency) {
        let now = Instant::now();
        let seconds = earlier.seconds(now);
        if seconds > 0.0 {
            self.observe(Duration::from_secs_f64(seconds), now);
        }
    }

    /// The expected seconds, decayed to `now`; 0.0 without an observation.
    pub fn seconds(&self, now: Instant) -> f64 {
        match self.state.load(Ordering::Relaxed) {
            UNKNOWN => 0.0,
            state => {
                let (seconds, since) = self.read(state, now);
                (seconds * weight(since)).max(LEAST_SECONDS)
            }
        }
    }

    /// Records a response after `took`.
    pub fn observe(&self, took: Duration, now: Instant) {
        self.update(took, now, false);
    }

    /// Records an attempt that ended without a response after `took`. That can only raise the estimate: a fast
    /// refusal is not a fast endpoint.
    pub fn observe_failure(&self, took: Duration, now: Instant) {
        self.update(took, now, true);
    }

    fn update(&self, took: Duration, now: Instant, failed: bool) {
        let took = took.as_secs_f64().max(LEAST_SECONDS);
        let stamp = u64::from(self.stamp(now));
        let _ = self.state.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |state| {
            let seconds = match state {
                UNKNOWN if failed => return None,
                UNKNOWN => took,
                state => {
                    let (seconds, since) = self.read(state, now);
                    let weight = weight(since);
                    match took >= seconds {
                        true => took,
                        false if failed => return None,
                        false => seconds * weight + took * (1.0 - weight),
                    }
                }
            };
            Some(u64::from((seconds as f32).to_bits()) << 32 | stamp)
        });
    }

    fn stamp(&self, now: Instant) -> u32 {
        now.saturating_duration_since(self.began).as_millis() as u32
    }

    /// The recorded value and its age.
    fn read(&self, state: u64, now: Instant) -> (f64, Duration) {
        let seconds = f64::from(f32::from_bits((state >> 32) as u32));
        // Another worker may have recorded a value later than `now`.
        let since = (self.stamp(now).wrapping_sub(state as u32) as i32).max(0);
        (seconds, Duration::from_millis(since as u64))
    }
}

/// The weight of an estimate of this age.
fn weight(since: Duration) -> f64 {
    (-since.as_secs_f64() / DECAY.as_secs_f64()).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn near(seconds: f64, expected: f64) -> bool {
        (seconds - expected).abs() <= expected * 1e-3
    }

    #[test]
    fn a_peak_is_believed_at_once_and_forgotten_with_time() {
        let now = Instant::now();
        let latency = Latency::new(now);
        assert_eq!(latency.seconds(now), 0.0);
        latency.observe(ms(10), now);
        latency.observe(ms(1000), now);
        assert!(near(latency.seconds(now), 1.0));
        assert!(near(latency.seconds(now + DECAY), (-1f64).exp()));
        assert!(latency.seconds(now + 1000 * DECAY) > 0.0, "it is known");
    }

    #[test]
    fn quick_answers_bring_it_down_as_time_goes_by() {
        let start = Instant::now();
        let latency = Latency::new(start);
        latency.observe(ms(1000), start);
        for answer in 1..=3000 {
            latency.observe(ms(10), start + ms(10 * answer));
        }
        assert!(near(latency.seconds(start + ms(30_000)), 0.01 + 0.99 * (-3f64).exp()));
    }

    #[test]
    fn a_failure_makes_nobody_faster() {
        let now = Instant::now();
        let latency = Latency::new(now);
        latency.observe_failure(ms(5), now);
        assert_eq!(latency.seconds(now), 0.0);
        latency.observe(ms(100), now);
        latency.observe_failure(ms(1), now + ms(50));
        assert!(latency.seconds(now + ms(50)) > 0.099);
        latency.observe_failure(ms(3000), now + ms(50));
        assert!(near(latency.seconds(now + ms(50)), 3.0));
    }

    proptest! {
        #[test]
        fn it_lies_between_the_least_and_the_most_that_was_seen(answers in prop::collection::vec((1u64..60_000, 0u64..5_000), 1..50)) {
            let start = Instant::now();
            let (latency, mut now) = (Latency::new(start), start);
            for &(took, pause) in &answers {
                now += ms(pause);
                latency.observe(ms(took), now);
                let (least, most) = (answers.iter().map(|a| a.0).min().unwrap(), answers.iter().map(|a| a.0).max().unwrap());
                let seconds = latency.seconds(now) * 1000.0;
                prop_assert!(seconds >= least as f64 * 0.999 && seconds <= most as f64 * 1.001);
                prop_assert!(seconds >= took as f64 * 0.999, "slower answers are never hidden");
            }
        }

        #[test]
        fn clocks_that_disagree_a_little_do_no_harm(took in 1u64..1000, back in 0u64..1000) {
            let start = Instant::now();
            let latency = Latency::new(start);
            latency.observe(ms(took), start + ms(1000));
            prop_assert!(near(latency.seconds(start + ms(1000 - back)), took as f64 / 1000.0));
        }
    }
}
