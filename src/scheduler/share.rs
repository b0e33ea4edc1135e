//! The share of a worker's time that a class of exchanges may use, and the number of grants for which it suffices.

use std::time::{Duration, Instant};

/// Target for the length of a round of the event loop while exchanges wait for grants.
pub const LAG_TARGET: Duration = Duration::from_millis(1);
/// The longest pause between two rounds while an exchange waits.
const PAUSE_MAX: Duration = Duration::from_millis(20);

/// The limits of a class for the worker's time.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Minimum share, so that the class does not starve on a busy worker.
    pub min: f64,
    /// Maximum share.
    pub max: f64,
    /// Maximum unused time that is saved, so that spending it causes no long round.
    pub burst: Duration,
}

/// The share of the worker's time that a class may use: it grows slowly while rounds are short, and shrinks after a
/// long one.
#[derive(Debug)]
pub struct Share {
    limits: Limits,
    ratio: f64,
    /// Seconds that may be spent; negative after a grant that took longer.
    credit: f64,
    since: Option<Instant>,
}

impl Share {
    /// Maximum debt.
    const DEBT_MAX_SECONDS: f64 = 0.005;
    /// The share doubles in about a tenth of a second of short rounds, and halves after fourteen long ones.
    const GROWTH_PER_SECOND: f64 = 7.0;
    const CUT: f64 = 0.95;

    fn new(limits: Limits) -> Self {
        Share { ratio: (limits.max / 2.0).max(limits.min), limits, credit: 0.0, since: None }
    }

    fn spend(&mut self, time: Duration) {
        self.credit = (self.credit - time.as_secs_f64()).max(-Self::DEBT_MAX_SECONDS);
    }

    /// Adds credit for the time since the last call. Returns this time in seconds. With a `boost`, the share is at
    /// least this, and the class may use it although the round was long.
    fn accrue(&mut self, now: Instant, boost: Option<f64>) -> f64 {
        let passed = self.since.replace(now).map_or(0.0, |since| (now - since).as_secs_f64());
        let burst = self.limits.burst.as_secs_f64();
        let (ratio, most) = match boost {
            // The next round is longer by what the class uses in it.
            Some(boost) => (self.ratio.max(boost), burst.max(passed * boost / (1.0 - boost))),
            None => (self.ratio, burst),
        };
        self.credit = (self.credit + ratio * passed).min(most);
        passed
    }

    /// Ends a round with this `lag`.
    fn end_round(&mut self, lag: Duration, boost: Option<f64>, now: Instant) {
        let passed = self.accrue(now, boost);
        if lag > LAG_TARGET {
            self.ratio = (self.ratio * Self::CUT).max(self.limits.min);
        } else {
            let growth = 1.0 + Self::GROWTH_PER_SECOND * passed.min(0.01);
            self.ratio = (self.ratio * growth).min(self.limits.max);
        }
    }

    /// Pause before the next grant.
    fn pause(&self) -> Duration {
        if self.credit >= 0.0 {
            return Duration::ZERO;
        }
        let pause = Duration::from_secs_f64(-self.credit / self.ratio).min(PAUSE_MAX);
        pause.max(Duration::from_nanos(1))
    }
}

/// Average cost of a grant in seconds, over recent rounds with grants.
#[derive(Debug)]
struct Cost {
    seconds: f64,
    grants: f64,
}

impl Default for Cost {
    fn default() -> Self {
        Cost { seconds: 100e-6, grants: 1.0 }
    }
}

impl Cost {
    fn add(&mut self, grants: u32, time: Duration) {
        if grants > 0 || !time.is_zero() {
            self.seconds += (time.as_secs_f64() - self.seconds) / 16.0;
            self.grants += (f64::from(grants) - self.grants) / 16.0;
        }
    }

    /// Number of grants that fit into this time; at least one, unless there is a debt.
    fn fit_into(&self, seconds: f64) -> u32 {
        if seconds < 0.0 { 0 } else { (seconds * self.grants / self.seconds.max(1e-6)) as u32 + 1 }
    }
}

/// A class's share of the worker's time and the cost of its grants.
#[derive(Debug)]
pub struct Allowance {
    share: Share,
    cost: Cost,
    /// Of this round.
    grants: u32,
    time: Duration,
}

impl Allowance {
    /// Creates the allowance of a class with these limits.
    pub fn new(limits: Limits) -> Self {
        Allowance { share: Share::new(limits), cost: Cost::default(), grants: 0, time: Duration::ZERO }
    }

    /// The share of the worker's time, from 0 to 1.
    pub fn ratio(&self) -> f64 {
        self.share.ratio
    }

    /// Whether the class may spend time; used when no exchange waits and no rounds are counted.
    pub fn has_credit(&mut self, now: Instant) -> bool {
        self.share.accrue(now, None);
        self.share.credit >= 0.0
    }

    /// Counts a grant.
    pub fn count_grant(&mut self) {
        self.grants += 1;
    }

    /// Charges the time of a poll; one grant can have several polls.
    pub fn charge(&mut self, time: Duration) {
        self.time += time;
        self.share.spend(time);
    }

    /// Ends a round with this `lag`. Returns the number of grants in the next round. `boost`: the minimum share, below
    /// 1, that also applies to a long round.
    pub fn end_round(&mut self, lag: Duration, boost: Option<f64>, now: Instant) -> u32 {
        self.cost.add(std::mem::take(&mut self.grants), std::mem::take(&mut self.time));
        self.share.end_round(lag, boost, now);
        self.cost.fit_into(self.share.credit)
    }

    /// Pause before the next grant.
    pub fn pause(&self) -> Duration {
        self.share.pause()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { min: 0.1, max: 1.0, burst: Duration::from_micros(500) };

    #[test]
    fn the_share_grows_while_rounds_are_short_and_falls_when_they_are_long() {
        let begin = Instant::now();
        let mut share = Share { ratio: 0.2, ..Share::new(LIMITS) };
        let after = |share: &mut Share, round: u32, lag| {
            share.end_round(lag, None, begin + round * Duration::from_millis(1));
            share.ratio
        };
        let first = after(&mut share, 0, Duration::ZERO);
        let grown = (1..200).map(|round| after(&mut share, round, LAG_TARGET / 2)).last().expect("rounds");
        assert!(grown > 3.0 * first, "{first} {grown}");
        let late = (200..215).map(|round| after(&mut share, round, 2 * LAG_TARGET)).last().expect("rounds");
        assert!(late < grown / 2.0, "{grown} {late}");
        let least = (215..1_000).map(|round| after(&mut share, round, 2 * LAG_TARGET)).last().expect("rounds");
        assert_eq!(least, LIMITS.min);
        let limits = Limits { max: 0.3, ..LIMITS };
        let mut small = Share::new(limits);
        let most = (1_000..2_000).map(|round| after(&mut small, round, Duration::ZERO)).last().expect("rounds");
        assert_eq!(most, limits.max);
    }

    #[test]
    fn a_grant_that_took_long_is_followed_by_a_pause() {
        let mut allowance = Allowance::new(LIMITS);
        let now = Instant::now();
        assert!(allowance.end_round(Duration::ZERO, None, now) > 0);
        allowance.charge(Duration::from_millis(2));
        assert_eq!(allowance.end_round(Duration::ZERO, None, now), 0);
        let pause = allowance.pause();
        assert!((pause.as_secs_f64() - 0.004).abs() < 1e-6, "{pause:?}");
        allowance.charge(Duration::from_secs(10));
        allowance.end_round(2 * LAG_TARGET, None, now);
        assert_eq!(allowance.pause(), Duration::from_secs_f64(Share::DEBT_MAX_SECONDS / allowance.ratio()));
        assert!(
            allowance.end_round(Duration::ZERO, None, now + Duration::from_secs(1)) > 0,
            "debts are paid in the end"
        );
    }

    #[test]
    fn a_boost_gives_a_class_its_share_of_a_long_round() {
        let (begin, ms) = (Instant::now(), Duration::from_millis);
        for (boost, credit) in [(None, LIMITS.burst.as_secs_f64()), (Some(0.75), 0.75 * 0.008)] {
            let mut share = Share { ratio: 0.5, ..Share::new(LIMITS) };
            share.end_round(ms(8), boost, begin);
            share.end_round(ms(8), boost, begin + ms(8));
            assert!((share.credit - credit).abs() < 1e-6, "{boost:?}: {}", share.credit);
        }
    }

    #[test]
    fn the_cheaper_the_grants_the_more_there_are_in_a_round() {
        let mut cost = Cost { seconds: 100e-6, grants: 1.0 };
        assert_eq!([-1.0, 0.0, 50e-6, 450e-6].map(|seconds| cost.fit_into(seconds)), [0, 1, 1, 5]);
        // Several polls per grant.
        (0..100).for_each(|round| cost.add(u32::from(round % 2 == 0), Duration::from_micros(100)));
        assert_eq!(cost.fit_into(450e-6), 3);
        (0..100).for_each(|_| cost.add(0, Duration::ZERO));
        assert_eq!(cost.fit_into(450e-6), 3, "nothing is learnt where nothing happens");
    }
}
