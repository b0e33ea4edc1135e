//! The schedule of health checks. Uses no sockets and no clock.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::time::Instant;

/// The endpoints that are checked repeatedly. Each is either waiting for its next turn or has one.
pub struct Agenda<T> {
    /// The waiting endpoints, and some that were removed.
    waiting: BinaryHeap<Reverse<(Instant, u64)>>,
    members: HashMap<usize, u64>,
    who: HashMap<u64, T>,
    issued: u64,
}

/// A due check.
#[derive(Debug)]
pub struct Turn<T> {
    /// The endpoint.
    pub who: T,
    /// When it became due.
    pub due: Instant,
    /// A unique number: an address in memory may be reused.
    ticket: u64,
}

impl<T> Default for Agenda<T> {
    fn default() -> Self {
        Agenda { waiting: BinaryHeap::new(), members: HashMap::new(), who: HashMap::new(), issued: 0 }
    }
}

impl<T: Clone> Agenda<T> {
    /// Sets the list of endpoints. `first` says when a new one is due.
    pub fn keep(&mut self, present: &[(usize, T)], first: impl Fn() -> Instant) {
        let mut members = HashMap::with_capacity(present.len());
        for (key, who) in present {
            let ticket = self.members.remove(key).unwrap_or_else(|| {
                self.issued += 1;
                self.who.insert(self.issued, who.clone());
                self.waiting.push(Reverse((first(), self.issued)));
                self.issued
            });
            members.insert(*key, ticket);
        }
        for (_, gone) in std::mem::replace(&mut self.members, members) {
            self.who.remove(&gone);
        }
    }

    /// A due endpoint; `None` if there is none.
    pub fn take(&mut self, now: Instant) -> Option<Turn<T>> {
        loop {
            let &Reverse((due, ticket)) = self.waiting.peek().filter(|Reverse((due, _))| *due <= now)?;
            self.waiting.pop();
            if let Some(who) = self.who.get(&ticket) {
                return Some(Turn { who: who.clone(), due, ticket });
            }
        }
    }

    /// Ends a turn and schedules the next one.
    pub fn again(&mut self, turn: Turn<T>, due: Instant) {
        if self.who.contains_key(&turn.ticket) {
            self.waiting.push(Reverse((due, turn.ticket)));
        }
    }

    /// When the next endpoint is due, or a removed one can be dropped.
    pub fn next(&self) -> Option<Instant> {
        self.waiting.peek().map(|Reverse((due, _))| *due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::time::Duration;

    const SECOND: Duration = Duration::from_secs(1);

    fn all_due(agenda: &mut Agenda<char>, now: Instant) -> Vec<Turn<char>> {
        let mut turns: Vec<_> = std::iter::from_fn(|| agenda.take(now)).collect();
        turns.sort_by_key(|turn| turn.who);
        turns
    }

    fn names(turns: &[Turn<char>]) -> String {
        turns.iter().map(|turn| turn.who).collect()
    }

    #[test]
    fn whoever_is_new_is_due_when_it_is_said_and_so_is_each_further_turn() {
        let (mut agenda, now) = (Agenda::default(), Instant::now());
        agenda.keep(&[(1, 'a'), (2, 'b')], || now);
        let turns = all_due(&mut agenda, now);
        assert_eq!((names(&turns).as_str(), agenda.next()), ("ab", None), "both have their turns");
        for (turn, seconds) in turns.into_iter().zip([2, 1]) {
            agenda.again(turn, now + seconds * SECOND);
        }
        assert_eq!((agenda.next(), names(&all_due(&mut agenda, now))), (Some(now + SECOND), String::new()));
        assert_eq!(names(&all_due(&mut agenda, now + SECOND)), "b");
        agenda.keep(&[(1, 'a'), (2, 'b'), (3, 'c')], || now);
        assert_eq!(names(&all_due(&mut agenda, now)), "c", "the others go on as they were");
    }

    #[test]
    fn whoever_is_gone_has_no_turn_any_more_not_even_after_the_present_one() {
        let (mut agenda, now) = (Agenda::default(), Instant::now());
        agenda.keep(&[(1, 'a'), (2, 'b')], || now);
        let turn = agenda.take(now).expect("both are due");
        agenda.keep(&[], || now);
        agenda.again(turn, now);
        assert_eq!(names(&all_due(&mut agenda, now + SECOND)), "");
        assert_eq!(agenda.next(), None);
    }

    #[test]
    fn somebody_at_the_place_of_one_who_is_gone_is_somebody_else() {
        let (mut agenda, now) = (Agenda::default(), Instant::now());
        agenda.keep(&[(1, 'a')], || now);
        let turn = agenda.take(now).expect("it is due");
        agenda.keep(&[], || now);
        agenda.keep(&[(1, 'b')], || now + SECOND);
        agenda.again(turn, now);
        assert_eq!(names(&all_due(&mut agenda, now + SECOND)), "b", "once, and when it came");
    }
}
