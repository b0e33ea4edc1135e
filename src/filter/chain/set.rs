//! A set of filters of a chain.

/// The number of filters in a word.
const BITS: usize = u64::BITS as usize;

/// Filters of a chain, by index: one bit each. Allocates only for chains of more than 64 filters.
#[derive(Debug, Default)]
pub(super) struct Set {
    first: u64,
    more: Vec<u64>,
}

impl Set {
    /// The set of this filter alone.
    pub fn of(index: usize) -> Set {
        let mut set = Set::default();
        set.insert(index);
        set
    }

    /// Adds a filter.
    #[inline]
    pub fn insert(&mut self, index: usize) {
        if index < BITS {
            self.first |= 1 << index;
        } else {
            self.insert_far(index);
        }
    }

    #[cold]
    fn insert_far(&mut self, index: usize) {
        let word = index / BITS - 1;
        if word >= self.more.len() {
            self.more.resize(word + 1, 0);
        }
        self.more[word] |= 1 << (index % BITS);
    }

    /// Adds the filters of another set.
    pub fn add(&mut self, other: Set) {
        self.first |= other.first;
        if self.more.len() < other.more.len() {
            self.more.resize(other.more.len(), 0);
        }
        self.more.iter_mut().zip(other.more).for_each(|(word, other)| *word |= other);
    }

    /// Whether it contains this filter.
    #[inline]
    pub fn contains(&self, index: usize) -> bool {
        let word = if index < BITS { Some(&self.first) } else { self.more.get(index / BITS - 1) };
        word.is_some_and(|word| word >> (index % BITS) & 1 == 1)
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.first == 0 && self.more.is_empty()
    }

    /// The number of filters in it.
    pub fn len(&self) -> usize {
        self.shared(self)
    }

    /// The number of filters that are in both sets.
    pub fn shared(&self, other: &Set) -> usize {
        let more = self.more.iter().zip(&other.more).map(|(one, other)| (one & other).count_ones());
        ((self.first & other.first).count_ones() + more.sum::<u32>()) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(indices: &[usize]) -> Set {
        let mut set = Set::default();
        indices.iter().for_each(|index| set.insert(*index));
        set
    }

    #[test]
    fn a_set_contains_what_was_added() {
        let all = [0, 1, 63, 64, 65, 127, 128, 300];
        let set = of(&all);
        let found: Vec<usize> = (0..1000).filter(|index| set.contains(*index)).collect();
        assert_eq!(found, all);
        assert_eq!(set.len(), all.len());
        assert!(!set.is_empty() && !of(&[64]).is_empty() && of(&[]).is_empty());
    }

    #[test]
    fn what_two_sets_share_is_counted() {
        assert_eq!(of(&[0, 5, 63, 64, 200]).shared(&of(&[5, 62, 64, 65, 199])), 2);
        assert_eq!(of(&[64, 200]).shared(&of(&[0])), 0);
    }

    #[test]
    fn two_sets_become_one() {
        let mut set = of(&[1, 64]);
        set.add(of(&[2, 64, 200]));
        set.add(of(&[3]));
        let found: Vec<usize> = (0..1000).filter(|index| set.contains(*index)).collect();
        assert_eq!(found, [1, 2, 3, 64, 200]);
    }

    #[test]
    fn a_small_set_allocates_nothing() {
        assert_eq!(of(&[0, 7, 63]).more.capacity(), 0);
    }
}
