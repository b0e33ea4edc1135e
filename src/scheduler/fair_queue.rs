//! The fair queue of one class: the exchange with the fewest missing bytes comes first, and the oldest one regularly.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// One of this many grants goes to the exchange that has waited longest.
const OLDEST_EVERY: u64 = 8;

/// A place in a queue: the missing bytes, then the order of arrival.
pub type Key = (u64, u64);

/// The waiting exchanges of one class.
pub struct FairQueue<T> {
    /// Exchanges that do not need the disk threads, and exchanges that do.
    queues: [BTreeMap<Key, Waiter<T>>; 2],
    arrivals: u64,
    granted: u64,
}

struct Waiter<T> {
    since: Instant,
    who: T,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        FairQueue { queues: Default::default(), arrivals: 0, granted: 0 }
    }
}

impl<T> FairQueue<T> {
    /// Adds an exchange that lacks this many bytes. `disk`: it needs the disk threads.
    pub fn push(&mut self, who: T, missing: u64, disk: bool, now: Instant) -> Key {
        let key = (missing, self.arrivals);
        self.arrivals += 1;
        self.queues[usize::from(disk)].insert(key, Waiter { since: now, who });
        key
    }

    /// Whether no exchange waits.
    pub fn is_empty(&self) -> bool {
        self.queues.iter().all(BTreeMap::is_empty)
    }

    /// Whether all waiting exchanges need the disk threads.
    pub fn needs_only_disk(&self) -> bool {
        self.queues[0].is_empty()
    }

    /// Removes an exchange; `None` if it does not wait.
    pub fn remove(&mut self, key: Key) -> Option<T> {
        self.queues.iter_mut().find_map(|queue| queue.remove(&key)).map(|waiter| waiter.who)
    }

    /// Takes the next exchange. `no_disk`: except those that need the disk threads.
    pub fn next(&mut self, no_disk: bool) -> Option<T> {
        let open = if no_disk { &self.queues[..1] } else { &self.queues[..] };
        let first = open.iter().filter_map(|queue| queue.first_key_value()).map(|(key, _)| *key).min()?;
        self.granted += 1;
        let oldest = || open.iter().flat_map(BTreeMap::keys).min_by_key(|(_, arrival)| *arrival).copied();
        let key = if self.granted.is_multiple_of(OLDEST_EVERY) { oldest()? } else { first };
        self.remove(key)
    }

    /// Takes all exchanges that have waited for `wait_max`, at any place in the queue.
    pub fn overdue(&mut self, wait_max: Duration, now: Instant) -> Vec<T> {
        let late = |waiter: &Waiter<T>| now.saturating_duration_since(waiter.since) >= wait_max;
        let queues = self.queues.iter_mut();
        queues.flat_map(|queue| queue.extract_if(.., |_, waiter| late(waiter)).map(|(_, waiter)| waiter.who)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(queue: &mut FairQueue<char>, no_disk: bool) -> String {
        std::iter::from_fn(|| queue.next(no_disk)).collect()
    }

    #[test]
    fn the_exchange_with_the_fewest_missing_bytes_comes_first() {
        let mut queue = FairQueue::default();
        let now = Instant::now();
        for (who, missing, disk) in [('d', u64::MAX, false), ('c', 300, true), ('a', 100, true), ('b', 200, false)] {
            queue.push(who, missing, disk, now);
        }
        assert_eq!(order(&mut queue, true), "bd");
        assert!(queue.needs_only_disk() && !queue.is_empty());
        assert_eq!(order(&mut queue, false), "ac");
        assert!(queue.is_empty());
    }

    #[test]
    fn no_exchange_starves() {
        let mut queue = FairQueue::default();
        let now = Instant::now();
        queue.push('z', u64::MAX, false, now);
        let grants = (1..).map(|number| {
            queue.push('a', 1, true, now);
            (number, queue.next(false))
        });
        let grant = grants.take(100).find(|(_, who)| *who == Some('z')).map(|(number, _)| number);
        assert_eq!(grant, Some(OLDEST_EVERY));
    }

    #[test]
    fn an_overdue_exchange_is_found_at_any_place() {
        let (mut queue, now, ms) = (FairQueue::default(), Instant::now(), Duration::from_millis);
        let [_, b, _] = [('a', 0), ('b', 1), ('c', 5)]
            .map(|(who, after)| queue.push(who, 300 - after, who == 'a', now + ms(after)));
        assert_eq!(queue.remove(b), Some('b'));
        assert_eq!(queue.remove(b), None);
        assert!(queue.overdue(ms(10), now + ms(9)).is_empty());
        assert_eq!(queue.overdue(ms(10), now + ms(10)), ['a']);
        assert_eq!(queue.overdue(ms(10), now + ms(15)), ['c']);
        assert!(queue.is_empty());
    }
}
