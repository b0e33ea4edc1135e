//! A minimum rate, and the remaining patience with a client below it.
//!
//! With an idle timeout alone, a client could send or accept one byte just before each deadline, for ever. Here a
//! client has a grace period. Waiting for the client uses it up, and every byte transferred restores the time that the
//! byte takes at the minimum rate. A client at the minimum rate is never timed out, however long its transfer; a slower
//! one is, once the grace period is used up. Time without waiting for the client does not count. The type knows no
//! socket and no clock.

use std::time::Duration;

/// The remaining patience with one client in one direction.
#[derive(Clone, Debug)]
pub struct MinRate {
    /// Bytes per second; 0: no minimum.
    rate: u64,
    grace: Duration,
    left: Duration,
}

impl MinRate {
    /// A minimum of `rate` bytes per second, none if it is 0, with a `grace` period that never exceeds its initial
    /// value.
    pub fn new(rate: u64, grace: Duration) -> Self {
        MinRate { rate, grace, left: grace }
    }

    /// Without a minimum rate.
    pub fn unlimited() -> Self {
        MinRate::new(0, Duration::ZERO)
    }

    /// Maximum wait for the client to transfer these bytes. `None`: there is no minimum rate.
    pub fn patience(&self, bytes: u64) -> Option<Duration> {
        (self.rate > 0).then(|| self.left + self.worth(bytes))
    }

    /// Records that the client transferred these bytes after this wait.
    pub fn moved(&mut self, bytes: u64, waited: Duration) {
        if self.rate > 0 {
            self.left = (self.left + self.worth(bytes)).saturating_sub(waited).min(self.grace);
        }
    }

    fn worth(&self, bytes: u64) -> Duration {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.rate);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn whoever_keeps_the_rate_is_waited_for_for_ever() {
        let mut min_rate = MinRate::new(1_000, 5 * SECOND);
        for _ in 0..10_000 {
            assert!(min_rate.patience(0) >= Some(4 * SECOND));
            min_rate.moved(1_000, SECOND);
        }
    }

    #[test]
    fn whoever_moves_less_is_given_up_once_the_grace_is_gone() {
        let mut min_rate = MinRate::new(1_000, 5 * SECOND);
        let mut waited = 0;
        while min_rate.patience(0) > Some(SECOND) {
            min_rate.moved(500, SECOND);
            waited += 1;
        }
        assert_eq!(waited, 8);
    }

    #[test]
    fn a_burst_buys_no_more_than_the_grace() {
        let mut min_rate = MinRate::new(1_000, 5 * SECOND);
        min_rate.moved(1_000_000, SECOND);
        assert_eq!(min_rate.patience(0), Some(5 * SECOND));
    }

    #[test]
    fn a_piece_that_is_under_way_has_the_time_that_it_takes() {
        let min_rate = MinRate::new(1_000, 5 * SECOND);
        assert_eq!(min_rate.patience(64_000), Some(69 * SECOND));
    }

    #[test]
    fn without_a_minimum_there_is_no_end_of_patience() {
        let mut min_rate = MinRate::new(0, SECOND);
        min_rate.moved(0, 1_000 * SECOND);
        assert_eq!(min_rate.patience(u64::MAX), None);
        assert_eq!(MinRate::new(1, Duration::ZERO).patience(u64::MAX), Some(Duration::from_nanos(u64::MAX)));
    }
}
