//! The share of an endpoint that has just become available: small at first, its full share after a while.
//!
//! A process that has just started has cold caches and no compiled code; its full share could bring it down again.
//! The roster asks for each choice and decides at random.

use std::time::Duration;

/// The initial share: enough to warm up, and to notice failures.
const BEGINNING: f64 = 0.1;

/// The share, up to 1, at `age` after it became available.
pub fn share(age: Duration, window: Duration) -> f64 {
    if age >= window {
        return 1.0;
    }
    let grown = age.as_secs_f64() / window.as_secs_f64();
    BEGINNING + (1.0 - BEGINNING) * grown
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    #[test]
    fn a_share_grows_from_a_tenth_to_the_whole_over_the_window() {
        let at = |seconds| share(Duration::from_secs(seconds), Duration::from_secs(30));
        assert_eq!((at(0), at(30), at(31)), (0.1, 1.0, 1.0));
        assert!((at(15) - 0.55).abs() < 1e-9);
    }

    #[test]
    fn without_a_window_everything_is_given_at_once() {
        assert_eq!(share(Duration::ZERO, Duration::ZERO), 1.0);
    }

    proptest! {
        #[test]
        fn it_never_shrinks(age in 0u64..100_000, more in 0u64..100_000, window in 0u64..100_000) {
            let [age, more, window] = [age, age + more, window].map(Duration::from_millis);
            let (before, after) = (share(age, window), share(more, window));
            prop_assert!((BEGINNING..=1.0).contains(&before) && before <= after);
        }
    }
}
