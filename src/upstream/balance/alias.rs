//! Weighted random choice in constant time: Walker's alias table, built with Vose's method.

use std::num::NonZeroU32;

/// Draws numbers from 0, in proportion to their weights.
///
/// Each slot belongs to its own number up to a threshold and to another number beyond it, so a draw is one read.
#[derive(Debug)]
pub struct Alias {
    /// For each slot: its own part of 2^32, and the number that has the rest.
    slots: Box<[(u32, u32)]>,
}

impl Alias {
    /// Builds the table for these weights.
    pub fn new(weights: &[NonZeroU32]) -> Alias {
        let number = weights.len() as u128;
        let whole: u128 = weights.iter().map(|weight| u128::from(weight.get())).sum();
        // A slot holds `whole`; each weight is spread over slots, starting with its own.
        let mut left: Vec<u128> = weights.iter().map(|weight| u128::from(weight.get()) * number).collect();
        let (mut small, mut large): (Vec<usize>, Vec<usize>) = (0..left.len()).partition(|&slot| left[slot] < whole);
        let mut slots: Vec<(u32, u32)> = (0..left.len()).map(|slot| (u32::MAX, slot as u32)).collect();
        while let (Some(poor), Some(&rich)) = (small.pop(), large.last()) {
            // Below 2^32 because a poor slot is not full.
            slots[poor] = (((left[poor] << 32) / whole) as u32, rich as u32);
            left[rich] -= whole - left[poor];
            if left[rich] < whole {
                large.pop();
                small.push(rich);
            }
        }
        Alias { slots: slots.into_boxed_slice() }
    }

    /// The number for `random`, which must be uniform over all 64-bit numbers. The table must not be empty.
    pub fn draw(&self, random: u64) -> usize {
        let slot = (((random >> 32) * self.slots.len() as u64) >> 32) as usize;
        let (own, other) = self.slots[slot];
        if (random as u32) < own { slot } else { other as usize }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    proptest! {
        /// Exact, without drawing: the shares of the slots equal the weights, up to rounding.
        #[test]
        fn slots_come_to_the_weights(weights in prop::collection::vec(1u32..100_000, 1..200)) {
            let alias = Alias::new(&weights.iter().map(|&weight| NonZeroU32::new(weight).unwrap()).collect::<Vec<_>>());
            let mut shares = vec![0.0; weights.len()];
            for (slot, &(own, other)) in alias.slots.iter().enumerate() {
                let own = f64::from(own) / 2f64.powi(32);
                shares[slot] += own;
                shares[other as usize] += 1.0 - own;
            }
            let whole: f64 = weights.iter().map(|&weight| f64::from(weight)).sum();
            for (share, weight) in shares.iter().zip(&weights) {
                let expected = f64::from(*weight) / whole * weights.len() as f64;
                prop_assert!((share - expected).abs() < 1e-6, "{share} instead of {expected}");
            }
        }

        #[test]
        fn any_number_stands_for_one_that_there_is(number in 1usize..50, random: u64) {
            prop_assert!(Alias::new(&vec![NonZeroU32::MIN; number]).draw(random) < number);
        }
    }
}
