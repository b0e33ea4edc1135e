//! Smooth weighted round robin as a precomputed schedule.
//!
//! nginx chooses the server with the greatest current weight and so interleaves them: weights 5, 1, 1 give a a b a
//! c a a, never a a a a a b c. It computes this for each request, under a lock, at a cost that grows with the
//! number of servers. The sequence is periodic, so [`Schedule`] stores one period, and a pick is one atomic
//! addition and one read. [`Split`] uses it for the upstreams of a route.

use std::num::{NonZeroU32, NonZeroU64};
use std::sync::atomic::{AtomicUsize, Ordering};

/// A periodic sequence of turns for numbers from 0, by weight and interleaved.
#[derive(Debug)]
pub struct Schedule {
    /// One period of numbers. Never empty.
    slots: Box<[u32]>,
    /// The next slot, not reduced modulo the period.
    cursor: AtomicUsize,
}

impl Schedule {
    /// Longest period (256 KiB of memory). Weights whose sum is greater after division by their greatest common
    /// divisor are scaled down to about this sum, each to at least 1: a share is then off by up to half a slot, and
    /// a share below 1 in 65,536 is rounded up to it. If there are more members than this, each gets one slot.
    pub const SLOTS_MAX: usize = 65_536;

    /// The schedule for these weights; `None` if there are none.
    pub fn new(weights: &[NonZeroU64]) -> Option<Schedule> {
        let slots = period(&fit(weights));
        (!slots.is_empty()).then(|| Schedule { slots: slots.into_boxed_slice(), cursor: AtomicUsize::new(0) })
    }

    /// The next number in turn.
    pub fn pick(&self) -> usize {
        self.at(self.turn())
    }

    /// Continues at the position of `earlier`.
    pub(super) fn go_on_from(&self, earlier: &Schedule) {
        self.cursor.store(earlier.cursor.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Takes the next turn, for [`Schedule::at`].
    pub(super) fn turn(&self) -> usize {
        match self.slots.len() {
            // With one member, the cursor is not written, so that its cache line stays shared.
            1 => 0,
            period => self.cursor.fetch_add(1, Ordering::Relaxed) % period,
        }
    }

    /// The number at this turn.
    pub(super) fn at(&self, turn: usize) -> usize {
        self.slots[turn % self.slots.len()] as usize
    }
}

/// The same proportions in small numbers with a sum of at most about [`Schedule::SLOTS_MAX`].
fn fit(weights: &[NonZeroU64]) -> Vec<u64> {
    let weights = reduce(weights.iter().map(|weight| weight.get()).collect());
    let sum: u128 = weights.iter().map(|&weight| u128::from(weight)).sum();
    let limit = Schedule::SLOTS_MAX as u128;
    if sum <= limit {
        return weights;
    }
    // At most `limit`, since no weight exceeds the sum: the cast cannot truncate.
    let scaled = |weight: u64| ((u128::from(weight) * limit + sum / 2) / sum).max(1) as u64;
    reduce(weights.into_iter().map(scaled).collect())
}

/// Divides by the greatest common divisor.
fn reduce(weights: Vec<u64>) -> Vec<u64> {
    let divisor = weights.iter().copied().fold(0, gcd);
    weights.into_iter().map(|weight| weight / divisor).collect()
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Members of equal weight. They take the turns of their class in order, so only its next member matters.
struct Class {
    weight: i64,
    members: Vec<u32>,
    /// Number of turns taken by all members together.
    taken: usize,
}

impl Class {
    /// The next member of this class.
    fn head(&self) -> u32 {
        self.members[self.taken % self.members.len()]
    }

    /// The current weight of the head before turn `turn` of a period of `sum`: what it is owed.
    fn owed(&self, turn: usize, sum: i64) -> i64 {
        (turn as i64 + 1) * self.weight - (self.taken / self.members.len()) as i64 * sum
    }
}

/// One period of nginx's smooth weighted round robin.
///
/// Comparing the classes instead of all their members makes this O(slots × distinct weights), and there are at most
/// 361 distinct weights in 65,536 slots; 10,000 endpoints of equal weight are one class.
fn period(weights: &[u64]) -> Vec<u32> {
    let sum: u64 = weights.iter().sum();
    let mut classes: Vec<Class> = Vec::new();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by_key(|&number| weights[number]); // stable: members stay in order
    for number in order {
        let weight = weights[number] as i64;
        match classes.last_mut() {
            Some(class) if class.weight == weight => class.members.push(number as u32),
            _ => classes.push(Class { weight, members: vec![number as u32], taken: 0 }),
        }
    }

    let mut slots = Vec::with_capacity(sum as usize);
    for turn in 0..sum as usize {
        // The greatest debt; among equals the first, as in nginx.
        let best = classes.iter_mut().max_by_key(|class| (class.owed(turn, sum as i64), u32::MAX - class.head()));
        let Some(class) = best else { break };
        slots.push(class.head());
        class.taken += 1;
    }
    slots
}

/// A weighted choice, such as between a route's upstreams, with the same schedule: at 9 to 1, any ten choices in a
/// row include the canary once.
#[derive(Debug)]
pub struct Split<T> {
    sides: Box<[T]>,
    schedule: Schedule,
}

impl<T> Split<T> {
    /// A choice between `sides` with weights; `None` if there are none.
    pub fn new(sides: impl IntoIterator<Item = (T, NonZeroU32)>) -> Option<Split<T>> {
        let (sides, weights): (Vec<T>, Vec<NonZeroU64>) =
            sides.into_iter().map(|(side, weight)| (side, NonZeroU64::from(weight))).unzip();
        Some(Split { sides: sides.into_boxed_slice(), schedule: Schedule::new(&weights)? })
    }

    /// The next side in turn.
    pub fn pick(&self) -> &T {
        &self.sides[self.schedule.pick()]
    }

    /// All sides, in order.
    pub fn sides(&self) -> &[T] {
        &self.sides
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::collections::BTreeSet;

    use proptest::prelude::*;

    fn weights(weights: &[u64]) -> Vec<NonZeroU64> {
        weights.iter().map(|&weight| NonZeroU64::new(weight).unwrap()).collect()
    }

    fn letters(schedule: &Schedule) -> String {
        schedule.slots.iter().map(|&number| char::from(b'a' + number as u8)).collect()
    }

    /// nginx's algorithm from `ngx_http_upstream_get_peer`, as the reference.
    fn by_nginx(weights: &[u64]) -> Vec<u32> {
        let sum: i64 = weights.iter().map(|&weight| weight as i64).sum();
        let mut current = vec![0i64; weights.len()];
        let mut turns = Vec::new();
        for _ in 0..sum {
            let mut best = 0;
            for number in 0..weights.len() {
                current[number] += weights[number] as i64;
                if current[number] > current[best] {
                    best = number;
                }
            }
            current[best] -= sum;
            turns.push(best as u32);
        }
        turns
    }

    #[test]
    fn turns_are_interleaved_as_in_nginx() {
        let cases: &[(&[u64], &str)] = &[
            (&[5, 1, 1], "aabacaa"),
            (&[3, 1], "aaba"),
            (&[1, 1, 1], "abc"),
            (&[7], "a"),
            (&[10, 30, 10], "babcb"),
            (&[4, 3, 2, 1], "abcabdacba"),
        ];
        for (given, expected) in cases {
            assert_eq!(letters(&Schedule::new(&weights(given)).unwrap()), *expected, "{given:?}");
        }
        assert!(Schedule::new(&[]).is_none());
    }

    #[test]
    fn a_schedule_repeats() {
        let schedule = Schedule::new(&weights(&[2, 1])).unwrap();
        let turns: Vec<usize> = (0..7).map(|_| schedule.pick()).collect();
        assert_eq!(turns, [0, 1, 0, 0, 1, 0, 0]);
    }

    #[test]
    fn weights_too_large_for_a_schedule_keep_their_proportions_and_nobody_is_left_out() {
        let schedule = Schedule::new(&weights(&[u64::MAX, u64::MAX / 3, 1])).unwrap();
        let turns = |number| schedule.slots.iter().filter(|&&slot| slot == number).count();
        assert_eq!((turns(0), turns(1), turns(2)), (49_152, 16_384, 1));

        let many: Vec<u64> = (0..10_000).map(|number| 1 + number % 100).collect();
        let schedule = Schedule::new(&weights(&many)).unwrap();
        let reached: BTreeSet<u32> = schedule.slots.iter().copied().collect();
        assert_eq!(reached.len(), 10_000);
        assert!(schedule.slots.len() <= Schedule::SLOTS_MAX + 10_000);
    }

    #[test]
    fn a_split_of_nine_to_one_sends_every_tenth_request_to_the_canary() {
        let weight = |weight| NonZeroU32::new(weight).unwrap();
        let split = Split::new([("shop", weight(9)), ("canary", weight(1))]).unwrap();
        for _ in 0..3 {
            let turn: Vec<&str> = (0..10).map(|_| *split.pick()).collect();
            assert_eq!(turn.iter().filter(|&&side| side == "canary").count(), 1);
        }
        assert!(Split::<&str>::new([]).is_none());
    }

    proptest! {
        #[test]
        fn the_schedule_is_what_nginx_would_do(given in prop::collection::vec(1u64..40, 1..12)) {
            let schedule = Schedule::new(&weights(&given)).unwrap();
            prop_assert_eq!(&*schedule.slots, by_nginx(&reduce(given)));
        }

        #[test]
        fn each_has_its_share_of_any_stretch(given in prop::collection::vec(1u64..40, 1..12), from in 0usize..500, length in 1usize..500) {
            let schedule = Schedule::new(&weights(&given)).unwrap();
            let sum: u64 = given.iter().sum();
            for (number, &weight) in given.iter().enumerate() {
                let turns = (from..from + length).filter(|&turn| schedule.at(turn) == number).count() as f64;
                let share = length as f64 * weight as f64 / sum as f64;
                // Smoothness: over any stretch, a member deviates by at most the number of rivals.
                prop_assert!((turns - share).abs() <= given.len() as f64, "{turns} turns for a share of {share}");
            }
        }
    }
}
