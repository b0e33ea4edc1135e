//! How requests are distributed over the tiers of an upstream, and when a tier is in panic mode.
//!
//! The first tier serves while it can, the next ones are backups. A tier that has lost some endpoints still gets
//! all requests as long as `overprovisioning` covers the loss; only the rest spills over to the next tier. If all
//! tiers together cannot carry everything, a tier with less than the `panic` share available sends requests to all
//! of its endpoints: that many failed checks are more likely wrong than right, and the few remaining endpoints
//! would be overloaded. The roster computes this whenever an endpoint's availability changes.

/// The endpoints of a tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tier {
    /// Number of available endpoints.
    pub available: usize,
    /// Number of endpoints that are not drained.
    pub total: usize,
}

/// The parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Terms {
    /// The factor by which available endpoints may carry more than their share; at least 1.
    pub overprovisioning: f64,
    /// The available share, 0 to 1, below which the whole tier is used. 0: never.
    pub panic: f64,
}

/// The distribution over tiers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Of 2^32 draws, those below this go to the tier or to one before it; in the order of the tiers.
    bounds: Vec<u64>,
    panic: Vec<bool>,
}

const THROWS: f64 = (1_u64 << 32) as f64;

impl Plan {
    /// Distributes over `tiers`, the most preferred first.
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
            // If the capacities do not suffice, each tier carries its proportion.
            let wanted = if suffices { carries(tier) } else { carries(tier) / together };
            let share = if together > 0.0 { wanted.min(left) } else { 0.0 };
            left -= share;
            bounds.push(((1.0 - left) * THROWS).round() as u64);
        }
        if together > 0.0 {
            // The last tier with a share gets the rounding error.
            let last = tiers.iter().rposition(|tier| carries(tier) > 0.0).unwrap_or(0);
            bounds[last..].fill(1 << 32);
        } else if let Some(first) = panic.iter().position(|&panics| panics) {
            // No endpoint is available: the most preferred tier in panic mode serves.
            bounds[first..].fill(1 << 32);
        }
        Plan { bounds, panic }
    }

    /// The tier for an exchange; `throw` is a random number or, for hash policies, a hash. `None` if there is no
    /// endpoint.
    pub fn tier(&self, throw: u32) -> Option<usize> {
        self.bounds.iter().position(|&bound| u64::from(throw) < bound)
    }

    /// Whether this tier is in panic mode.
    pub fn panics(&self, tier: usize) -> bool {
        self.panic.get(tier).copied().unwrap_or(false)
    }

    /// The share of the requests for this tier.
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
