//! Chooses the endpoint of the next attempt: every policy is a pure choice between numbers.
//!
//! Expensive work (a schedule, a table, a ring) is done when a policy is built from its members' names and weights.
//! At the time of a choice, [`Candidates`] tells which members are available and how busy they are. A choice costs
//! the same for 3 members and for 10,000: a few cheap tries in the policy's order, and one pass over all members
//! only if all tries failed.
//!
//! `upstream/roster.rs` provides the candidates; `proxy/select.rs` asks for each attempt.

mod alias;
mod maglev;
mod ring;
mod schedule;
mod turns;

use std::num::{NonZeroU32, NonZeroU64};
use std::sync::atomic::{AtomicUsize, Ordering};

use rand::{Rng, RngCore};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::config::upstream::LoadBalancing;
use crate::config::upstream::balance as written;
use alias::Alias;
use maglev::Maglev;
use ring::Ring;

pub use schedule::{Schedule, Split};
pub use turns::SmoothRoundRobin;

/// The state of a policy's members. They are numbered from 0, in the order given to [`Balance::new`].
pub trait Candidates {
    /// Number of active attempts of this member.
    fn inflight(&self, number: usize) -> u32;

    /// Number of active attempts of all members. Used only by `bounded_load`.
    fn inflight_of_all(&self) -> u64;

    /// Expected latency in seconds (peak EWMA), decayed to now; 0.0 if unknown.
    fn latency(&self, number: usize) -> f64;

    /// Whether it may be chosen now: available, not tried, below its limits, warm enough. During slow start this is
    /// random: a choice may ask several times for one number, and may get no member at all.
    fn admits(&self, number: usize) -> bool;
}

/// A member.
#[derive(Clone, Copy, Debug)]
pub struct Identity<'a> {
    /// Its identity on every node: label and address. Hashes are computed from it.
    pub name: &'a str,
    /// Its share, relative to the others.
    pub weight: NonZeroU32,
}

/// Tries in the policy's own order before all members are examined. With nine of ten members unavailable, 31 of 32
/// choices end within these tries.
const TRIES: usize = 32;
/// Tries for the second of two choices, which is optional.
const SECOND_TRIES: usize = 8;

/// A policy and its members.
#[derive(Debug)]
pub struct Balance {
    policy: Policy,
    /// Weights with a mean of 1, so that quotients do not depend on the scale of the configured weights.
    shares: Box<[f64]>,
}

#[derive(Debug)]
enum Policy {
    RoundRobin {
        schedule: Schedule,
        stand_in: AtomicUsize,
    },
    Random(Alias),
    LeastRequest(Alias),
    PeakEwma(Alias),
    Hash {
        order: Order,
        seeds: Box<[u64]>,
        bounded_load: Option<f64>,
    },
    /// There is no endpoint.
    NoEndpoint,
}

#[derive(Debug)]
enum Order {
    Ring(Ring),
    Maglev(Maglev),
}

impl Balance {
    /// The policy `written` for these members. Takes milliseconds for 10,000 of them, up to some hundred for
    /// `ring_hash` and `maglev`: do not call it on the request path.
    pub fn new(written: &LoadBalancing, members: &[Identity<'_>]) -> Balance {
        let weights: Vec<NonZeroU32> = members.iter().map(|member| member.weight).collect();
        let mean = weights.iter().map(|weight| f64::from(weight.get())).sum::<f64>() / weights.len() as f64;
        let shares = weights.iter().map(|weight| f64::from(weight.get()) / mean).collect();
        Balance { policy: Policy::new(written, members, &weights), shares }
    }

    /// Continues the rotation of `earlier`, so that a change of members does not favour the first ones.
    #[must_use]
    pub fn after(self, earlier: &Balance) -> Balance {
        let turns = [&self, earlier].map(|balance| match &balance.policy {
            Policy::RoundRobin { schedule, stand_in } => Some((schedule, stand_in)),
            _ => None,
        });
        if let [Some((schedule, stand_in)), Some((earlier, earlier_stand_in))] = turns {
            schedule.go_on_from(earlier);
            stand_in.store(earlier_stand_in.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        self
    }

    /// Whether the choice depends on the hash.
    pub fn hashes(&self) -> bool {
        matches!(self.policy, Policy::Hash { .. })
    }

    /// The number of an admitted member; `None` if there is none. `hash` is that of the exchange's key, used by
    /// hash policies only.
    pub fn pick(&self, hash: u64, among: &impl Candidates) -> Option<usize> {
        self.pick_with(hash, among, &mut rand::thread_rng())
    }

    fn pick_with(&self, hash: u64, among: &impl Candidates, dice: &mut impl RngCore) -> Option<usize> {
        match &self.policy {
            Policy::RoundRobin { schedule, stand_in } => {
                // Substitutes for an unavailable member have their own rotation, so that its share is spread over
                // all others by weight. Otherwise its successor in the schedule would get all of it.
                let mut others = (1..TRIES).map(|_| schedule.at(stand_in.fetch_add(1, Ordering::Relaxed)));
                let turn = Some(schedule.pick()).filter(|&number| among.admits(number));
                let turn = turn.or_else(|| others.find(|&number| among.admits(number)));
                turn.or_else(|| self.least(among, dice, |_| 0.0))
            }
            Policy::Random(alias) => draw(alias, among, dice, TRIES).or_else(|| self.least(among, dice, |_| 0.0)),
            Policy::LeastRequest(alias) => {
                self.two_choices(alias, among, dice, |number| f64::from(among.inflight(number)) / self.shares[number])
            }
            Policy::PeakEwma(alias) => self.two_choices(alias, among, dice, |number| {
                expected_seconds(among.latency(number), f64::from(among.inflight(number)), self.shares[number])
            }),
            Policy::Hash { order, seeds, bounded_load } => {
                let full =
                    bounded_load.map(|factor| factor * (among.inflight_of_all() + 1) as f64 / seeds.len() as f64);
                let has_room = |number: usize| {
                    full.is_none_or(|full| f64::from(among.inflight(number)) < (full * self.shares[number]).ceil())
                };
                let fits = |&number: &usize| among.admits(number) && has_room(number);
                let found = match order {
                    Order::Ring(ring) => ring.order_of(hash).take(TRIES).find(fits),
                    Order::Maglev(maglev) => maglev.order_of(hash).take(TRIES).find(fits),
                };
                found.or_else(|| self.first_by_hash(hash, seeds, among, has_room))
            }
            Policy::NoEndpoint => None,
        }
    }

    /// Draws two by weight and takes the one with the smaller `load`, or the first one if they are equal, so that
    /// idle members get shares by weight. Almost as even as comparing all (Mitzenmacher 2001), and avoids a rush to
    /// the least loaded.
    fn two_choices(
        &self,
        alias: &Alias,
        among: &impl Candidates,
        dice: &mut impl RngCore,
        load: impl Fn(usize) -> f64,
    ) -> Option<usize> {
        let Some(first) = draw(alias, among, dice, TRIES) else { return self.least(among, dice, load) };
        let second = match self.shares.len() {
            1 => None,
            // Repeated drawing would rarely find a light member next to a heavy one.
            2 => Some(1 - first).filter(|&other| among.admits(other)),
            _ => (0..SECOND_TRIES).find_map(|_| draw(alias, among, dice, 1).filter(|&other| other != first)),
        };
        second.filter(|&second| load(second) < load(first)).or(Some(first))
    }

    /// Compares all admitted members: takes one with the least load, by weight among equals.
    fn least(&self, among: &impl Candidates, dice: &mut impl RngCore, load: impl Fn(usize) -> f64) -> Option<usize> {
        let (mut least, mut equals, mut found) = (f64::INFINITY, 0.0, None);
        for number in (0..self.shares.len()).filter(|&number| among.admits(number)) {
            let load = load(number);
            if load < least || found.is_none() {
                (least, equals, found) = (load, self.shares[number], Some(number));
            } else if load == least {
                equals += self.shares[number];
                if dice.r#gen::<f64>() * equals < self.shares[number] {
                    found = Some(number);
                }
            }
        }
        found
    }

    /// Examines all members: rendezvous hashing, with the same result on every node, weighted. Members without room
    /// come last.
    fn first_by_hash(
        &self,
        hash: u64,
        seeds: &[u64],
        among: &impl Candidates,
        has_room: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let mut first: Option<(bool, f64, usize)> = None;
        for number in (0..self.shares.len()).filter(|&number| among.admits(number)) {
            // Exponentially distributed with the weight as its rate: the minimum belongs to each member in
            // proportion to its weight.
            let uniform = (xxh3_64_with_seed(&hash.to_le_bytes(), seeds[number]) >> 11) as f64 + 0.5;
            let due = -(uniform / 2f64.powi(53)).ln() / self.shares[number];
            let rank = (!has_room(number), due, number);
            if first.is_none_or(|first| rank < first) {
                first = Some(rank);
            }
        }
        first.map(|(_, _, number)| number)
    }
}

impl Policy {
    fn new(written: &LoadBalancing, members: &[Identity<'_>], weights: &[NonZeroU32]) -> Policy {
        let hash = |order| {
            let seeds = members.iter().map(|member| xxh3_64(member.name.as_bytes())).collect();
            Policy::Hash { order, seeds, bounded_load: written.bounded_load }
        };
        if members.is_empty() {
            return Policy::NoEndpoint;
        }
        match written.policy {
            written::Policy::RoundRobin => {
                let weights: Vec<NonZeroU64> = weights.iter().map(|&weight| weight.into()).collect();
                let schedule = Schedule::new(&weights);
                schedule.map_or(Policy::NoEndpoint, |schedule| Policy::RoundRobin {
                    schedule,
                    stand_in: AtomicUsize::new(0),
                })
            }
            written::Policy::Random => Policy::Random(Alias::new(weights)),
            written::Policy::LeastRequest => Policy::LeastRequest(Alias::new(weights)),
            written::Policy::PeakEwma => Policy::PeakEwma(Alias::new(weights)),
            written::Policy::RingHash => hash(Order::Ring(Ring::new(members))),
            written::Policy::Maglev => hash(Order::Maglev(Maglev::new(members))),
        }
    }
}

/// Draws until a member is admitted, at most this many times.
fn draw(alias: &Alias, among: &impl Candidates, dice: &mut impl RngCore, tries: usize) -> Option<usize> {
    (0..tries).map(|_| alias.draw(dice.next_u64())).find(|&number| among.admits(number))
}

/// Expected time of one more request, if a single one takes `latency` and `inflight` are active.
fn expected_seconds(latency: f64, inflight: f64, share: f64) -> f64 {
    /// A new endpoint gets one request; until it has responded, every other one is preferred.
    const UNKNOWN: f64 = 1e9;
    match latency > 0.0 {
        true => latency * (1.0 + inflight / share),
        false if inflight == 0.0 => 0.0,
        false => UNKNOWN + inflight / share,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    const POLICIES: [written::Policy; 6] = [
        written::Policy::RoundRobin,
        written::Policy::Random,
        written::Policy::LeastRequest,
        written::Policy::PeakEwma,
        written::Policy::RingHash,
        written::Policy::Maglev,
    ];

    /// Members with states set by a test.
    #[derive(Clone, Default)]
    struct Members {
        names: Vec<String>,
        weights: Vec<u32>,
        inflight: Vec<u32>,
        latency: Vec<f64>,
        refused: Vec<bool>,
    }

    impl Members {
        fn new(weights: &[u32]) -> Members {
            let number = weights.len();
            Members {
                names: (0..number).map(|number| format!("10.0.{}.{}:80", number / 256, number % 256)).collect(),
                weights: weights.to_vec(),
                inflight: vec![0; number],
                latency: vec![0.01; number],
                refused: vec![false; number],
            }
        }

        /// All except one.
        fn without(&self, number: usize) -> Members {
            let mut rest = self.clone();
            rest.names.remove(number);
            rest.weights.remove(number);
            rest.inflight.remove(number);
            rest.latency.remove(number);
            rest.refused.remove(number);
            rest
        }

        fn balance(&self, policy: written::Policy, bounded_load: Option<f64>) -> Balance {
            let members = self.names.iter().zip(&self.weights);
            let members = members.map(|(name, &weight)| Identity { name, weight: NonZeroU32::new(weight).unwrap() });
            let written = LoadBalancing { policy, bounded_load, ..LoadBalancing::default() };
            Balance::new(&written, &members.collect::<Vec<_>>())
        }

        fn share(&self, number: usize) -> f64 {
            f64::from(self.weights[number]) / self.weights.iter().map(|&weight| f64::from(weight)).sum::<f64>()
        }
    }

    impl Candidates for Members {
        fn inflight(&self, number: usize) -> u32 {
            self.inflight[number]
        }

        fn inflight_of_all(&self) -> u64 {
            self.inflight.iter().map(|&inflight| u64::from(inflight)).sum()
        }

        fn latency(&self, number: usize) -> f64 {
            self.latency[number]
        }

        fn admits(&self, number: usize) -> bool {
            !self.refused[number]
        }
    }

    /// Similar keys, like those of users.
    fn hash(key: u64) -> u64 {
        xxh3_64(format!("user-{key}").as_bytes())
    }

    /// How often each member is chosen by this many keys.
    fn chosen(balance: &Balance, among: &Members, keys: u64) -> Vec<f64> {
        let mut dice = StdRng::seed_from_u64(1);
        let mut chosen = vec![0.0; among.names.len()];
        for key in 0..keys {
            chosen[balance.pick_with(hash(key), among, &mut dice).unwrap()] += 1.0;
        }
        chosen
    }

    #[test]
    fn two_choices_take_the_one_with_less_to_do() {
        let mut members = Members::new(&[1, 1]);
        members.inflight = vec![5, 4];
        assert_eq!(chosen(&members.balance(written::Policy::LeastRequest, None), &members, 100), [0.0, 100.0]);
        // Loaded in proportion to their weights.
        let mut members = Members::new(&[3, 1]);
        members.inflight = vec![5, 2];
        assert_eq!(chosen(&members.balance(written::Policy::LeastRequest, None), &members, 100), [100.0, 0.0]);
    }

    #[test]
    fn two_choices_take_the_one_that_will_be_done_first() {
        let balance = |members: &Members| chosen(&members.balance(written::Policy::PeakEwma, None), members, 100);
        let mut members = Members::new(&[1, 1]);
        members.latency = vec![0.1, 0.01];
        members.inflight = vec![0, 8];
        assert_eq!(balance(&members), [0.0, 100.0]);
        members.inflight = vec![0, 10];
        assert_eq!(balance(&members), [100.0, 0.0]);
    }

    #[test]
    fn one_that_has_not_answered_yet_is_asked_once() {
        let balance = |members: &Members| chosen(&members.balance(written::Policy::PeakEwma, None), members, 100);
        let mut members = Members::new(&[1, 1]);
        members.latency = vec![0.0, 0.01];
        members.inflight = vec![0, 1];
        assert_eq!(balance(&members), [100.0, 0.0]);
        members.inflight = vec![1, 1];
        assert_eq!(balance(&members), [0.0, 100.0]);
    }

    #[test]
    fn the_share_of_one_that_is_turned_down_is_spread_over_the_others_by_weight() {
        for (weights, picks, expected) in
            [([1, 1, 1, 1], 480, [0.0, 160.0, 160.0, 160.0]), ([6, 3, 2, 1], 240, [0.0, 120.0, 80.0, 40.0])]
        {
            let mut members = Members::new(&weights);
            members.refused[0] = true;
            let balance = members.balance(written::Policy::RoundRobin, None);
            assert_eq!(chosen(&balance, &members, picks), expected, "{weights:?}");
        }
    }

    #[test]
    fn turns_go_on_when_members_change() {
        let members = Members::new(&[1, 1, 1]);
        let earlier = members.balance(written::Policy::RoundRobin, None);
        assert_eq!((earlier.pick(0, &members), earlier.pick(0, &members)), (Some(0), Some(1)));
        let next = members.balance(written::Policy::RoundRobin, None).after(&earlier);
        assert_eq!((next.pick(0, &members), next.pick(0, &members)), (Some(2), Some(0)));
    }

    #[test]
    fn among_nobody_nobody_is_chosen() {
        for policy in POLICIES {
            let members = Members::new(&[]);
            assert_eq!(members.balance(policy, Some(1.25)).pick(7, &members), None, "{policy:?}");
        }
    }

    #[test]
    fn load_is_shared_by_weight_while_there_is_much_of_it() {
        for policy in [written::Policy::LeastRequest, written::Policy::PeakEwma] {
            let mut members = Members::new(&[1, 2, 3, 4, 4, 3, 2, 1]);
            let balance = members.balance(policy, None);
            let mut dice = StdRng::seed_from_u64(1);
            // Sixty active requests; whenever one ends, another one begins.
            let mut under_way: Vec<usize> = Vec::new();
            let mut chosen = [0.0; 8];
            for _ in 0..40_000 {
                if under_way.len() == 60 {
                    members.inflight[under_way.swap_remove(dice.gen_range(0..60))] -= 1;
                }
                let number = balance.pick_with(0, &members, &mut dice).unwrap();
                members.inflight[number] += 1;
                under_way.push(number);
                chosen[number] += 1.0;
            }
            for (number, chosen) in chosen.iter().enumerate() {
                let ratio = chosen / 40_000.0 / members.share(number);
                assert!((0.8..1.2).contains(&ratio), "{policy:?}: {ratio} of its share for {number}");
            }
        }
    }

    #[test]
    fn a_slow_one_gets_little_by_latency() {
        let mut members = Members::new(&[1; 10]);
        members.latency[3] = 1.0;
        let chosen = chosen(&members.balance(written::Policy::PeakEwma, None), &members, 10_000);
        assert_eq!(chosen[3], 0.0);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn whoever_is_chosen_is_admitted_and_somebody_is_whenever_anybody_is(
            weights in prop::collection::vec(1u32..9, 1..60),
            admitted: Vec<bool>,
            inflight in prop::collection::vec(0u32..5, 60),
            bounded in prop::option::of(1.01f64..3.0),
            keys in prop::collection::vec(any::<u64>(), 10),
        ) {
            let mut members = Members::new(&weights);
            members.refused = (0..weights.len()).map(|number| !admitted.get(number).copied().unwrap_or(number % 7 == 0)).collect();
            members.inflight.copy_from_slice(&inflight[..weights.len()]);
            for policy in POLICIES {
                let balance = members.balance(policy, bounded);
                for &key in &keys {
                    let chosen = balance.pick(key, &members);
                    prop_assert_eq!(chosen.is_some(), members.refused.contains(&false));
                    prop_assert!(chosen.is_none_or(|number| members.admits(number)), "{policy:?}");
                }
            }
        }

        #[test]
        fn shares_are_as_the_weights(weights in prop::collection::vec(1u32..20, 1..12)) {
            let members = Members::new(&weights);
            let points = |number: usize| f64::from(160 * weights[number]);
            for policy in POLICIES {
                for (number, chosen) in chosen(&members.balance(policy, None), &members, 20_000).into_iter().enumerate() {
                    let share = members.share(number);
                    // Five standard deviations of a draw; on a ring also of the arc lengths.
                    let ring = if policy == written::Policy::RingHash { 5.0 * share / points(number).sqrt() } else { 0.0 };
                    let bound = 5.0 * (share * (1.0 - share) / 20_000.0).sqrt() + ring + 1e-3;
                    prop_assert!((chosen / 20_000.0 - share).abs() <= bound, "{policy:?}: {chosen} of 20,000 for a share of {share}");
                }
            }
        }

        #[test]
        fn those_who_stand_in_by_hash_have_shares_as_the_weights(weights in prop::collection::vec(1u32..5, 40)) {
            // Only four of forty are available, so many keys exhaust all tries.
            let mut members = Members::new(&weights);
            members.refused = (0..40).map(|number| number % 10 != 0).collect();
            for policy in [written::Policy::RingHash, written::Policy::Maglev] {
                let chosen = chosen(&members.balance(policy, None), &members, 20_000);
                let admitted: f64 = (0..4).map(|number| members.share(10 * number)).sum();
                for number in (0..4).map(|number| 10 * number) {
                    let ratio = chosen[number] / 20_000.0 / (members.share(number) / admitted);
                    prop_assert!((0.6..1.5).contains(&ratio), "{policy:?}: {ratio} of its share");
                }
            }
        }

        #[test]
        fn when_one_leaves_its_keys_move_and_few_others(weights in prop::collection::vec(1u32..4, 2..40), leaves in 0usize..40) {
            let members = Members::new(&weights);
            let leaves = leaves % weights.len();
            let rest = members.without(leaves);
            for (policy, epsilon) in [(written::Policy::RingHash, 0.0), (written::Policy::Maglev, 0.05)] {
                let (before, after) = (members.balance(policy, None), rest.balance(policy, None));
                let mut moved = 0.0;
                for key in 0..5_000 {
                    let (was, is) = (before.pick(hash(key), &members).unwrap(), after.pick(hash(key), &rest).unwrap());
                    moved += f64::from(u8::from(was != leaves && members.names[was] != rest.names[is]));
                }
                prop_assert!(moved / 5_000.0 <= epsilon, "{policy:?}: {moved} of 5,000 moved for nothing");
            }
        }

        #[test]
        fn one_that_is_turned_down_moves_its_keys_and_no_others(weights in prop::collection::vec(1u32..4, 2..20), refused in 0usize..20) {
            let members = Members::new(&weights);
            let mut without = members.clone();
            without.refused[refused % weights.len()] = true;
            for policy in [written::Policy::RingHash, written::Policy::Maglev] {
                let balance = members.balance(policy, None);
                for key in 0..500 {
                    let (was, is) = (balance.pick(hash(key), &members), balance.pick(hash(key), &without));
                    prop_assert!(was == is || was == Some(refused % weights.len()));
                }
            }
        }

        #[test]
        fn nodes_that_know_the_same_names_agree(weights in prop::collection::vec(1u32..4, 2..20), turn in 1usize..20) {
            let here = Members::new(&weights);
            let mut there = here.clone();
            there.names.rotate_left(turn % weights.len());
            there.weights.rotate_left(turn % weights.len());
            for policy in [written::Policy::RingHash, written::Policy::Maglev] {
                let (ours, theirs) = (here.balance(policy, None), there.balance(policy, None));
                for key in 0..500 {
                    let (here_, there_) = (ours.pick(hash(key), &here).unwrap(), theirs.pick(hash(key), &there).unwrap());
                    prop_assert_eq!(&here.names[here_], &there.names[there_]);
                }
            }
        }

        #[test]
        fn bounded_load_holds(weights in prop::collection::vec(1u32..10, 1..30), factor in 1.01f64..2.0, popular in 1u64..5) {
            for policy in [written::Policy::RingHash, written::Policy::Maglev] {
                let mut members = Members::new(&weights);
                let balance = members.balance(policy, Some(factor));
                for request in 1..=500 {
                    // A few popular keys, and no request ends.
                    let number = balance.pick(hash(request % popular), &members).unwrap();
                    members.inflight[number] += 1;
                    let most = (factor * request as f64 * members.share(number)).ceil();
                    prop_assert!(f64::from(members.inflight[number]) <= most + 1e-6, "{policy:?}: {} of {most}", members.inflight[number]);
                }
            }
        }
    }

    #[test]
    fn a_key_stays_where_it_is_while_there_is_room() {
        let mut members = Members::new(&[1; 4]);
        let balance = members.balance(written::Policy::Maglev, Some(1.5));
        let home = balance.pick(hash(1), &members).unwrap();
        members.inflight = vec![10; 4];
        assert_eq!(balance.pick(hash(1), &members), Some(home));
        members.inflight[home] = 20;
        let other = balance.pick(hash(1), &members).unwrap();
        assert_ne!(other, home);
    }
}
