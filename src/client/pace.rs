//! A minimum rate, and the patience that is left with a client below it.
//!
//! An idle timeout alone lets a client send or take one byte just before each deadline, for ever. Here a client has a
//! grace; waiting for it uses the grace up, and every byte that it moves gives back the time that the byte takes at the
//! minimum rate. Whoever keeps the rate never runs out, however long it takes; whoever does not is given up once the
//! grace is gone. Time in which the client was not waited for costs nothing. Knows no socket and no clock.

use std::time::Duration;

/// What is left of the patience with one client in one direction.
#[derive(Clone, Debug)]
pub struct Pace {
    /// Bytes a second; 0 is no minimum.
    rate: u64,
    grace: Duration,
    left: Duration,
}

impl Pace {
    /// A minimum of `rate` bytes a second, none if it is 0, with a `grace` that cannot be saved beyond its first
    /// amount.
    pub fn new(rate: u64, grace: Duration) -> Self {
        Pace { rate, grace, left: grace }
    }

    /// However slow.
    pub fn unlimited() -> Self {
        Pace::new(0, Duration::ZERO)
    }

    /// How long may be waited for the client to move so many bytes. `None`: there is no minimum.
    pub fn patience(&self, bytes: u64) -> Option<Duration> {
        (self.rate > 0).then(|| self.left + self.worth(bytes))
    }

    /// The client was waited for, and moved so many bytes.
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
        let mut pace = Pace::new(1_000, 5 * SECOND);
        for _ in 0..10_000 {
            assert!(pace.patience(0) >= Some(4 * SECOND));
            pace.moved(1_000, SECOND);
        }
    }

    #[test]
    fn whoever_moves_less_is_given_up_once_the_grace_is_gone() {
        let mut pace = Pace::new(1_000, 5 * SECOND);
        let mut waited = 0;
        while pace.patience(0) > Some(SECOND) {
            pace.moved(500, SECOND);
            waited += 1;
        }
        assert_eq!(waited, 8);
    }

    #[test]
    fn a_burst_buys_no_more_than_the_grace() {
        let mut pace = Pace::new(1_000, 5 * SECOND);
        pace.moved(1_000_000, SECOND);
        assert_eq!(pace.patience(0), Some(5 * SECOND));
    }

    #[test]
    fn a_piece_that_is_under_way_has_the_time_that_it_takes() {
        let pace = Pace::new(1_000, 5 * SECOND);
        assert_eq!(pace.patience(64_000), Some(69 * SECOND));
    }

    #[test]
    fn without_a_minimum_there_is_no_end_of_patience() {
        let mut pace = Pace::new(0, SECOND);
        pace.moved(0, 1_000 * SECOND);
        assert_eq!(pace.patience(u64::MAX), None);
        assert_eq!(Pace::new(1, Duration::ZERO).patience(u64::MAX), Some(Duration::from_nanos(u64::MAX)));
    }
}
