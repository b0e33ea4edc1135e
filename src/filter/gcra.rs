//! Rate limits: the generic cell rate algorithm, for one key or many.
//!
//! It is equivalent to a token bucket, but needs only one number per key and no timers.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use lru::LruCache;

use crate::config::units::Rate;

/// The generic cell rate algorithm (ITU-T I.371), as a virtual schedule in nanoseconds: each request is due one
/// interval after the previous one, and may come early by a tolerance. Its decisions are those of a token bucket of
/// size `burst` that is filled evenly.
#[derive(Clone, Copy, Debug)]
pub struct Gcra {
    interval: u64,
    tolerance: u64,
}

impl Gcra {
    /// `burst` is the number of requests that an idle key may send at once, at least 1. `None` if the rate is above
    /// one per microsecond: below that, rounding to nanoseconds changes the rate by less than 0.1 %.
    pub fn new(rate: Rate, burst: u64) -> Option<Gcra> {
        let interval = nanoseconds(rate.per).div_ceil(rate.events);
        (interval >= 1_000).then(|| Gcra { interval, tolerance: interval.saturating_mul(burst - 1) })
    }

    /// Admits a request at `now` and advances `due`, the time of the next one; 0 for a new key. Otherwise leaves
    /// `due` unchanged and returns how long to wait.
    ///
    /// # Errors
    ///
    /// The time to wait, in nanoseconds.
    pub fn admit(self, due: &mut u64, now: u64) -> Result<(), u64> {
        let early = due.saturating_sub(now);
        if early > self.tolerance {
            return Err(early - self.tolerance);
        }
        *due = (*due).max(now).saturating_add(self.interval);
        Ok(())
    }
}

/// The time in nanoseconds; 584 years fit.
pub fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The due times of the most recently used keys.
///
/// Every lock is held for one lookup in memory and never across an `await`. There are several shards, so that workers
/// rarely contend; therefore plain mutexes suffice.
pub struct Keys {
    shards: Vec<Mutex<LruCache<u64, u64>>>,
    /// The number of keys that a shard may hold.
    room: usize,
}

impl Keys {
    const SHARDS_MAX: usize = 16;
    /// With fewer keys, some shards would be full and forget keys noticeably before the others.
    const ROOM_MIN: usize = 1_024;

    /// The approximate number of keys.
    pub fn new(max: usize) -> Keys {
        let shards = (max / Keys::ROOM_MIN).clamp(1, Keys::SHARDS_MAX);
        // Unbounded, and limited to `room` in `with`: a bounded map allocates its whole table at once.
        let shard = |_| Mutex::new(LruCache::unbounded());
        Keys { shards: (0..shards).map(shard).collect(), room: max / shards }
    }

    /// Applies `decide` to the due time of `key`. `true` if another key had to be forgotten.
    pub fn with<T>(&self, key: u64, decide: impl FnOnce(&mut u64) -> T) -> (T, bool) {
        let shard = &self.shards[(key % self.shards.len() as u64) as usize];
        // No code under the lock can panic half-way, so a poisoned lock is still consistent.
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        let decided = decide(shard.get_or_insert_mut(key, || 0));
        let full = shard.len() > self.room;
        if full {
            shard.pop_lru();
        }
        (decided, full)
    }

    /// The number of keys.
    pub fn max(&self) -> usize {
        self.room * self.shards.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn memory_is_bounded_however_many_keys_come() {
        for max in [1, 10, 1_023, 5_000, 40_000] {
            let keys = Keys::new(max);
            assert!(keys.max() <= max && max < keys.max() + Keys::SHARDS_MAX);
            let forgotten = (0..100_000).filter(|&key| keys.with(key, |_| ()).1).count();
            let held: usize = keys.shards.iter().map(|shard| shard.lock().unwrap().len()).sum();
            assert_eq!((held, forgotten), (keys.max(), 100_000 - keys.max()));
        }
    }

    #[test]
    fn nothing_overflows_at_the_end_of_time() {
        let limit = Gcra::new(Rate { events: 1, per: Duration::from_secs(3600) }, u64::MAX - 1).unwrap();
        let mut due = u64::MAX - 1;
        assert_eq!(limit.admit(&mut due, u64::MAX), Ok(()));
        assert_eq!(due, u64::MAX);
    }

    /// The reference for GCRA: a bucket of `burst` tokens, with one more per interval, counted in nanoseconds.
    struct Bucket {
        level: u64,
        filled: u64,
    }

    impl Bucket {
        fn admit(&mut self, limit: Gcra, burst: u64, now: u64) -> Result<(), u64> {
            self.level = (self.level + (now - self.filled)).min(limit.interval * burst);
            self.filled = now;
            self.level = self.level.checked_sub(limit.interval).ok_or_else(|| limit.interval - self.level)?;
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn gcra_decides_as_a_token_bucket_does(
            events in 1..5_000u64,
            seconds in prop::sample::select(vec![1u64, 60, 3600]),
            burst in 1..50u64,
            gaps in prop::collection::vec(prop_oneof![Just(0), 0..1_000_000u64, 0..10_000_000_000u64], 1..200),
        ) {
            let limit = Gcra::new(Rate { events, per: Duration::from_secs(seconds) }, burst).unwrap();
            let mut bucket = Bucket { level: limit.interval * burst, filled: 0 };
            let (mut due, mut now) = (0, 0);
            for gap in gaps {
                now += gap;
                prop_assert_eq!(limit.admit(&mut due, now), bucket.admit(limit, burst, now));
            }
        }

        #[test]
        fn who_waits_as_told_is_admitted_and_who_comes_earlier_is_not(burst in 1..20u64, now in 0..1_000_000_000u64) {
            let limit = Gcra::new(Rate { events: 7, per: Duration::from_secs(1) }, burst).unwrap();
            let mut due = 0;
            let wait = std::iter::repeat_with(|| limit.admit(&mut due, now)).find_map(Result::err).unwrap();
            prop_assert!(limit.admit(&mut due, now + wait - 1).is_err());
            prop_assert_eq!(limit.admit(&mut due, now + wait), Ok(()));
        }
    }
}
