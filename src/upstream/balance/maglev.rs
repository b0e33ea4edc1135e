//! Maglev hashing (Eisenbud et al., NSDI 2016, §3.4): a table that members fill in turns, each in its own order.
//!
//! Shares are more even than on a ring, and a look-up is one read. When a member leaves, its keys move, and a few
//! per cent of the others at most. The orders depend only on the names, so all nodes with the same names agree.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::Identity;

/// The table of members.
#[derive(Debug)]
pub struct Maglev {
    table: Box<[u32]>,
}

/// Table sizes: primes, so that every step width visits all places.
const SIZES: [usize; 2] = [65_537, 1_048_583];
/// Up to this many members use the small table: 128 places each.
const SMALL: usize = 512;
const FREE: u32 = u32::MAX;

impl Maglev {
    /// The table of these members: 65,537 places for up to 512 of them, 1,048,583 for more (256 KiB and 4 MiB). A
    /// change between the two sizes moves all keys. Each member with a weight gets a place, as long as there are
    /// enough.
    pub fn new(members: &[Identity<'_>]) -> Maglev {
        let size = if members.is_empty() { 0 } else { SIZES[usize::from(members.len() > SMALL)] };
        let mut table = vec![FREE; size];
        let mut walks: Vec<Walk> = members.iter().map(|member| Walk::new(member.name, size as u64)).collect();
        let mut left = size;
        for number in Rotation::new(members) {
            if left == 0 {
                break;
            }
            let walk = &mut walks[number];
            let place = std::iter::repeat_with(|| walk.next(size as u64)).find(|&place| table[place] == FREE);
            // A walk visits all places repeatedly, and one of them is free.
            if let Some(place) = place {
                table[place] = number as u32;
                left -= 1;
            }
        }
        Maglev { table: table.into_boxed_slice() }
    }

    /// The member for `hash`, then those of the following places, once around the table.
    pub fn order_of(&self, hash: u64) -> impl Iterator<Item = usize> + '_ {
        let (before, after) = self.table.split_at(((u128::from(hash) * self.table.len() as u128) >> 64) as usize);
        after.iter().chain(before).map(|&number| number as usize)
    }
}

/// The order in which a member takes places.
struct Walk {
    place: u64,
    step: u64,
}

impl Walk {
    fn new(name: &str, size: u64) -> Walk {
        let hash = |seed| xxh3_64_with_seed(name.as_bytes(), seed);
        Walk { place: hash(0) % size, step: hash(1) % (size - 1) + 1 }
    }

    fn next(&mut self, size: u64) -> usize {
        let place = self.place;
        self.place = (place + self.step) % size;
        place as usize
    }
}

/// Decides which member takes the next place: the n-th turn of a member is due at n divided by its weight. When a
/// member leaves, the others keep their order, so most of the table stays the same.
struct Rotation {
    /// Members of equal weight take their turns together, in the order of their names.
    classes: Vec<(u64, Vec<usize>)>,
    due: BinaryHeap<Reverse<Due>>,
    /// The class that is taking its turns, and its next member.
    now: (usize, usize),
}

/// When a class has its next turns.
#[derive(PartialEq, Eq)]
struct Due {
    turns: u64,
    weight: u64,
    class: usize,
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let (a, b) =
            (u128::from(self.turns) * u128::from(other.weight), u128::from(other.turns) * u128::from(self.weight));
        // Ties go to the heavier class; weights of classes are distinct.
        a.cmp(&b).then(other.weight.cmp(&self.weight))
    }
}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Rotation {
    fn new(members: &[Identity<'_>]) -> Rotation {
        let mut order: Vec<usize> = (0..members.len()).collect();
        order.sort_by_key(|&number| (members[number].weight, members[number].name));
        let mut classes: Vec<(u64, Vec<usize>)> = Vec::new();
        for number in order {
            let weight = u64::from(members[number].weight.get());
            match classes.last_mut() {
                Some((same, class)) if *same == weight => class.push(number),
                _ => classes.push((weight, vec![number])),
            }
        }
        let due = classes.iter().enumerate().map(|(class, &(weight, _))| Reverse(Due { turns: 0, weight, class }));
        Rotation { due: due.collect(), classes, now: (0, usize::MAX) }
    }
}

impl Iterator for Rotation {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let (class, at) = self.now;
        if let Some(&number) = self.classes.get(class).and_then(|(_, members)| members.get(at)) {
            self.now.1 += 1;
            return Some(number);
        }
        let Reverse(due) = self.due.pop()?;
        self.now = (due.class, 1);
        let first = self.classes[due.class].1[0];
        self.due.push(Reverse(Due { turns: due.turns + 1, ..due }));
        Some(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::num::NonZeroU32;

    fn filled(weights: &[u32]) -> Vec<usize> {
        let names: Vec<String> = (0..weights.len()).map(|number| format!("10.0.0.{number}:80")).collect();
        let members = names.iter().zip(weights);
        let members = members.map(|(name, &weight)| Identity { name, weight: NonZeroU32::new(weight).unwrap() });
        let maglev = Maglev::new(&members.collect::<Vec<_>>());
        let mut places = vec![0; weights.len()];
        maglev.table.iter().for_each(|&owner| places[owner as usize] += 1);
        places
    }

    #[test]
    fn places_are_shared_out_by_weight_and_all_of_them() {
        assert_eq!(filled(&[1; 5]), [13_108, 13_108, 13_107, 13_107, 13_107]);
        for (weights, shares) in [(&[3, 1][..], &[49_153, 16_384][..]), (&[5, 2, 1], &[40_961, 16_384, 8_192])] {
            for (places, share) in filled(weights).into_iter().zip(shares) {
                assert!(places.abs_diff(*share) <= 1, "{places} of {share} for {weights:?}");
            }
        }
    }

    #[test]
    fn whoever_has_a_weight_has_a_place() {
        let places = filled(&[u32::MAX, 1, 1_000]);
        assert!(places.iter().all(|&places| places >= 1), "{places:?}");
        assert_eq!(Maglev::new(&[]).order_of(7).next(), None);
    }

    #[test]
    fn many_members_have_a_larger_table() {
        let places = filled(&[1; 2_000]);
        assert_eq!(places.iter().sum::<usize>(), SIZES[1]);
        assert!(places.iter().all(|places| (524..=525).contains(places)));
    }
}
