//! Which tier of an upstream serves how much, and when all of a tier serve because too few of them are left.
//!
//! Endpoints stand in tiers: the first serves while it can, the next ones are backups. A tier that has lost some of its
//! endpoints is not given up at once: by `overprovisioning` it may carry more than its share, and only what is beyond
//! that spills over to the next. Should all tiers together not carry everything, a tier of which less than the `panic`
//! share is available sends requests to all of its endpoints: a verdict on that many is more likely wrong than right,
//! and the few left would be finished off. The roster asks anew whenever an endpoint's availability changes.

/// What one tier has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tier {
    /// Endpoints that requests may go to.
    pub available: usize,
    /// Endpoints that there are, without those that an operator has taken out.
    pub total: usize,
}

/// How tiers are weighed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Terms {
    /// By which factor the endpoints left of a tier may carry more than their share; at least 1.
    pub overprovisioning: f64,
    /// The share of a tier, 0 to 1, below which all of it is served. At 0 that never happens.
    pub panic: f64,
}

/// What each tier gets.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Of 2^32 throws, those below this go to the tier or to one before it; in the order of the tiers.
    bounds: Vec<u64>,
    panic: Vec<bool>,
}

const THROWS: f64 = (1_u64 << 32) as f64;

impl Plan {
    /// Weighs `tiers`, the first of which is preferred.
    pub fn new(tiers: &[Tier], terms: Terms) -> Plan {
        let carries = |tier: &Tier| match tier.total {
            0 => 0.0,
            total => (terms.overprovisioning.max(1.0) * tier.available as f64 / total as f64).min(1.0),
        };
        let together: f64 = tiers.iter().map(carries).sum();
        let suffices = together >= 1.0;
        let panics =
            |tier: &Tier| !suffices && tier.total > 0 && (tier.available as f64) < terms.panic * tier.total as f64;
        let panic: Vec<bool> = tiers.iter().map(panics).collect();

        let mut left = 1.0;
        let mut bounds = Vec::with_capacity(tiers.len());
        for tier in tiers {
            // What all carry together is everything, if need be beyond their means.
            let wanted = if suffices { carries(tier) } else { carries(tier) / together };
            let share = if together > 0.0 { wanted.min(left) } else { 0.0 };
            left -= share;
            bounds.push(((1.0 - left) * THROWS).round() as u64);
        }
        if together > 0.0 {
            // Whatever rounding left over is the last one's that has anything.
            let last = tiers.iter().rposition(|tier| carries(tier) > 0.0).unwrap_or(0);
            bounds[last..].fill(1 << 32);
        } else if let Some(first) = panic.iter().position(|&panics| panics) {
            // None is available: of those that serve nevertheless, the most preferred.
            bounds[first..].fill(1 << 32);
        }
        Plan { bounds, panic }
    }

    /// The tier that an exchange goes to; `throw` is a random number or, where the same client shall stay with the same
    /// endpoint, a hash. `None` if there is no endpoint to go to.
    pub fn tier(&self, throw: u32) -> Option<usize> {
        self.bounds.iter().position(|&bound| u64::from(throw) < bound)
    }

    /// Whether all endpoints of this tier serve, available or not.
    pub fn panics(&self, tier: usize) -> bool {
        self.panic.get(tier).copied().unwrap_or(false)
    }

    /// The share of the requests that this tier gets.
    pub fn share(&self, tier: usize) -> f64 {
        let before = tier.checked_sub(1).map_or(0, |before| self.bounds[before]);
        self.bounds.get(tier).map_or(0.0, |&bound| (bound - before) as f64 / THROWS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    fn plan(tiers: &[(usize, usize)], panic: f64) -> Plan {
        let tiers: Vec<Tier> = tiers.iter().map(|&(available, total)| Tier { available, total }).collect();
        Plan::new(&tiers, Terms { overprovisioning: 1.4, panic })
    }

    fn percents(plan: &Plan) -> Vec<u32> {
        (0..plan.bounds.len()).map(|tier| (plan.share(tier) * 100.0).round() as u32).collect()
    }

    #[test]
    fn the_first_tier_serves_alone_while_what_is_left_of_it_carries_everything() {
        assert_eq!(percents(&plan(&[(10, 10), (10, 10)], 0.5)), [100, 0]);
        // 72 % of it, times 1.4, is more than all.
        assert_eq!(percents(&plan(&[(72, 100), (10, 10)], 0.5)), [100, 0]);
    }

    #[test]
    fn what_a_degraded_tier_cannot_carry_spills_over_to_the_next() {
        assert_eq!(percents(&plan(&[(2, 3), (1, 1)], 0.0)), [93, 7]);
        assert_eq!(percents(&plan(&[(1, 2), (1, 2), (2, 2)], 0.0)), [70, 30, 0]);
        assert_eq!(percents(&plan(&[(1, 4), (1, 4), (2, 2)], 0.0)), [35, 35, 30]);
    }

    #[test]
    fn a_backup_takes_over_from_a_tier_of_which_nobody_is_left_and_gives_back() {
        assert_eq!(percents(&plan(&[(0, 3), (1, 1)], 0.5)), [0, 100]);
        assert!(!plan(&[(0, 3), (1, 1)], 0.5).panics(0), "the backup carries everything");
        assert_eq!(percents(&plan(&[(3, 3), (1, 1)], 0.5)), [100, 0]);
    }

    #[test]
    fn all_of_a_tier_serve_when_too_few_are_available_and_no_backup_makes_up_for_it() {
        let both = plan(&[(1, 4), (0, 4)], 0.5);
        assert!(both.panics(0) && both.panics(1));
        assert_eq!(percents(&both), [100, 0]);
        assert!(!plan(&[(2, 4)], 0.5).panics(0), "half of it is not less than half");
        assert!(plan(&[(1, 4)], 0.5).panics(0));
    }

    #[test]
    fn without_anybody_available_the_first_tier_serves_in_panic_or_nobody_does() {
        let panic = plan(&[(0, 0), (0, 3), (0, 2)], 0.1);
        assert_eq!((panic.tier(0), panic.tier(u32::MAX)), (Some(1), Some(1)));
        assert!(panic.panics(1));
        assert_eq!(plan(&[(0, 3), (0, 2)], 0.0).tier(7), None);
        assert_eq!(plan(&[], 0.5).tier(7), None);
    }

    proptest! {
        #[test]
        fn every_throw_finds_a_tier_that_has_somebody_if_there_is_one(
            tiers in prop::collection::vec((0usize..20).prop_flat_map(|total| (0..=total, Just(total))), 1..6),
            panic in 0.0f64..1.0,
            throw: u32,
        ) {
            let plan = plan(&tiers, panic);
            if tiers.iter().any(|&(available, _)| available > 0) {
                let tier = plan.tier(throw).expect("somebody is available");
                prop_assert!(tiers[tier].0 > 0);
                let whole: f64 = (0..tiers.len()).map(|tier| plan.share(tier)).sum();
                prop_assert!((whole - 1.0).abs() < 1e-6);
            } else if let Some(tier) = plan.tier(throw) {
                prop_assert!(plan.panics(tier) && tiers[tier].1 > 0);
            }
        }

        #[test]
        fn an_endpoint_more_in_the_first_tier_never_gives_it_less(
            (available, total) in (1usize..50).prop_flat_map(|total| (0..total, Just(total))),
            backups in 0usize..10,
        ) {
            let before = plan(&[(available, total), (backups, 10)], 0.0).share(0);
            let after = plan(&[(available + 1, total), (backups, 10)], 0.0).share(0);
            prop_assert!(after + 1e-9 >= before);
        }
    }
}
