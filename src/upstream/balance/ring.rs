//! A hash ring like ketama's: a key belongs to the endpoint with the next point on the ring.
//!
//! When an endpoint leaves, only its keys move. Points depend only on the names, so all nodes with the same names
//! agree.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::Identity;

/// The points on a ring and their members.
#[derive(Debug)]
pub struct Ring {
    /// Sorted: 40 bits of the position and 24 bits of the member's number.
    points: Box<[u64]>,
    /// For each section of the ring, the first point in or after it. There are at least as many sections as points,
    /// so a look-up takes a step or two on a ring of any size.
    sections: Box<[u32]>,
}

const MEMBER_BITS: u32 = 24;

impl Ring {
    /// Points per unit of weight: shares are then within about 8 % of the weights.
    pub const POINTS: u64 = 160;
    /// Limit on points (12 MiB of memory). If the weights need more, all are halved until they fit, each to at
    /// least 1, and shares become less exact: 10,000 members of weight 1 get 80 points each.
    pub const POINTS_MAX: u64 = 1 << 20;

    /// The ring of these members; members beyond 2^24 get no points.
    pub fn new(members: &[Identity<'_>]) -> Ring {
        let members = &members[..members.len().min(1 << MEMBER_BITS)];
        let wanted =
            |member: &Identity<'_>, halved: u32| ((Self::POINTS * u64::from(member.weight.get())) >> halved).max(1);
        // Halving, so that a leaving member rarely changes the points of the others.
        let fits = |halved: &u32| members.iter().map(|member| wanted(member, *halved)).sum::<u64>() <= Self::POINTS_MAX;
        let halved = (0..40).find(fits).unwrap_or(40);
        let mut points: Vec<u64> = Vec::new();
        for (number, member) in members.iter().enumerate() {
            let places = (0..wanted(member, halved)).map(|seed| xxh3_64_with_seed(member.name.as_bytes(), seed));
            points.extend(places.map(|place| (place >> MEMBER_BITS << MEMBER_BITS) | number as u64));
        }
        points.sort_unstable();
        Ring { sections: sections(&points), points: points.into_boxed_slice() }
    }

    /// The member at or after `hash`, then those of the following points, once around the ring. Consecutive points
    /// of the same member count once.
    pub fn order_of(&self, hash: u64) -> impl Iterator<Item = usize> + '_ {
        let (before, after) = self.points.split_at(self.at(hash));
        let mut last = usize::MAX;
        let owners = after.iter().chain(before).map(|point| (point & ((1 << MEMBER_BITS) - 1)) as usize);
        owners.filter(move |&owner| std::mem::replace(&mut last, owner) != owner)
    }

    fn at(&self, hash: u64) -> usize {
        let place = hash >> MEMBER_BITS << MEMBER_BITS;
        let Some(&first) = self.sections.get(section(hash, self.sections.len())) else { return 0 };
        let first = first as usize;
        first + self.points[first..].iter().take_while(|&&point| point < place).count()
    }
}

fn section(hash: u64, sections: usize) -> usize {
    ((u128::from(hash) * sections as u128) >> 64) as usize
}

fn sections(points: &[u64]) -> Box<[u32]> {
    let number = if points.is_empty() { 0 } else { points.len().next_power_of_two() };
    let mut sections = Vec::with_capacity(number);
    for (index, &point) in points.iter().enumerate() {
        // All sections up to that of this point which no earlier point has filled.
        sections.resize(sections.len().max(section(point, number) + 1), index as u32);
    }
    sections.resize(number, points.len() as u32);
    sections.into_boxed_slice()
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::num::NonZeroU32;

    use proptest::prelude::*;

    fn ring(weights: &[u32]) -> Ring {
        let names: Vec<String> = (0..weights.len()).map(|number| format!("10.0.0.{number}:80")).collect();
        let member =
            |(name, &weight): (&'static str, &u32)| Identity { name, weight: NonZeroU32::new(weight).unwrap() };
        let names = names.into_iter().map(|name| &*name.leak());
        Ring::new(&names.zip(weights).map(member).collect::<Vec<_>>())
    }

    proptest! {
        #[test]
        fn a_key_belongs_to_the_next_point(weights in prop::collection::vec(1u32..4, 1..20), hash: u64) {
            let ring = ring(&weights);
            let place = hash >> MEMBER_BITS << MEMBER_BITS;
            let next = ring.points.iter().find(|&&point| point >= place).unwrap_or(&ring.points[0]);
            prop_assert_eq!(ring.order_of(hash).next(), Some((next & 0xff_ffff) as usize));
        }
    }

    #[test]
    fn once_round_the_ring_is_everybody() {
        let ring = ring(&[1, 3, 2]);
        let mut owners: Vec<usize> = ring.order_of(u64::MAX).collect();
        owners.sort_unstable();
        owners.dedup();
        assert_eq!(owners, [0, 1, 2]);
        assert_eq!(ring.points.len(), 6 * 160);
        assert_eq!(Ring::new(&[]).order_of(7).next(), None);
    }

    #[test]
    fn points_are_halved_until_they_fit_and_nobody_is_left_without() {
        let ring = ring(&[1_000_000, 1]);
        assert!(ring.points.len() as u64 <= Ring::POINTS_MAX && ring.points.len() as u64 > Ring::POINTS_MAX / 4);
        assert_eq!(ring.points.iter().filter(|&point| point & 0xff_ffff == 1).count(), 1);
    }
}
