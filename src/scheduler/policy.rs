//! The scheduling policy: which exchanges get grants at the end of a round of the event loop. It is a pure decision:
//! the clock and the waiting exchanges are passed in.

use std::time::{Duration, Instant};

use super::Class;
use super::fair_queue::{FairQueue, Key};
use super::share::{Allowance, LAG_TARGET, Limits};

/// Maximum number of exchanges that pass bytes without grants: rounds are short enough with them.
pub const FREE_BULK: usize = 24;
/// The same limit shortly after new connections had to wait: they will soon transfer bulk, too.
pub const FREE_BULK_IN_ARRIVAL: usize = 4;
const ARRIVAL: Duration = Duration::from_millis(100);

/// The share of new connections in rounds that are long in any case, because of small exchanges alone. Otherwise their
/// burst would be a small part of such a round, and they would wait for several hundred milliseconds.
const BOOST: f64 = 0.75;

const NEWCOMER: Limits = Limits { min: 0.5, max: 1.0, burst: Duration::from_micros(250) };
const PASS: Limits = Limits { min: 0.1, max: 1.0, burst: Duration::from_micros(500) };
/// No client waits for spooled bytes, and disk threads and endpoints use CPU for them, too.
const SPOOL: Limits = Limits { min: 0.1, max: 0.3, burst: Duration::from_micros(250) };

/// Pause while all waiting exchanges need the busy disk threads, and the maximum total of such pauses: afterwards each
/// exchange waits by itself, with its own deadline.
pub const DISK_PAUSE: Duration = Duration::from_millis(1);
const DISK_PAUSES_MAX: Duration = Duration::from_secs(1);
/// Interval of the search for overdue grants, since each search visits all waiting exchanges.
const OVERDUE_INTERVAL: Duration = Duration::from_millis(250);

/// The facts about a round of the event loop.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    /// The end of the round.
    pub now: Instant,
    /// Its length.
    pub lag: Duration,
    /// Whether the disk threads have a backlog.
    pub disk_is_busy: bool,
    /// What the worker does besides.
    pub load: Load,
}

/// What a worker does besides the exchanges that take turns.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Time since the last look for small exchanges on connections that have been served.
    pub small: Duration,
    /// Number of bulk transfers.
    pub bulk: usize,
}

impl Load {
    /// Whether small exchanges alone make rounds long. Few clients then notice that new connections make them longer.
    /// With bulk transfers, the new connections are probably more of them.
    pub fn is_of_small_exchanges(&self) -> bool {
        self.small > LAG_TARGET && self.bulk <= FREE_BULK_IN_ARRIVAL
    }
}

/// A grant for an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Granted<T> {
    /// The exchange.
    pub who: T,
    /// What the grant is for.
    pub class: Class,
    /// Whether the grant is given because the longest wait is over.
    pub overdue: bool,
}

/// The waiting exchanges of a worker and the time of each class.
pub struct Policy<T> {
    /// By class.
    queues: [FairQueue<T>; 3],
    /// By class.
    allowances: [Allowance; 3],
    /// Maximum wait for a grant.
    wait_max: Duration,
    /// Time at which new connections last had to wait.
    arrival: Option<Instant>,
    /// Start of the current backlog of the disk threads.
    disk_busy_since: Option<Instant>,
    /// Time of the last search for overdue grants.
    searched: Option<Instant>,
}

impl<T> Policy<T> {
    /// Creates the policy without waiting exchanges. Each is granted after `wait_max` at the latest.
    pub fn new(wait_max: Duration) -> Self {
        Policy {
            queues: Default::default(),
            allowances: [NEWCOMER, PASS, SPOOL].map(Allowance::new),
            wait_max,
            arrival: None,
            disk_busy_since: None,
            searched: None,
        }
    }

    /// Adds an exchange to the queue of its class. `missing` is the number of missing bytes; `disk`: it needs the disk
    /// threads.
    pub fn push(&mut self, who: T, class: Class, missing: u64, disk: bool, now: Instant) -> Key {
        self.queues[class as usize].push(who, missing, disk, now)
    }

    /// Removes a waiting exchange; `None` if it does not wait.
    pub fn remove(&mut self, class: Class, key: Key) -> Option<T> {
        self.queues[class as usize].remove(key)
    }

    /// Charges a poll to a class.
    pub fn charge(&mut self, class: Class, time: Duration) {
        self.allowances[class as usize].charge(time);
    }

    /// The share of the worker's time that a class may use, from 0 to 1.
    pub fn share(&self, class: Class) -> f64 {
        self.allowances[class as usize].ratio()
    }

    /// Whether a new connection must wait for a grant: others wait already, or their class has no time left.
    pub fn defers_connection(&mut self, now: Instant) -> bool {
        let class = Class::NewConnection as usize;
        let defers = !(self.queues[class].is_empty() && self.allowances[class].has_credit(now));
        if defers {
            self.arrival = Some(now);
        }
        defers
    }

    /// Whether this number of bulk transfers requires grants.
    pub fn is_crowded(&self, bulk: usize, now: impl FnOnce() -> Instant) -> bool {
        bulk > FREE_BULK || (bulk > FREE_BULK_IN_ARRIVAL && self.sees_arrival(now))
    }

    /// Whether many connections are arriving, or have just arrived.
    fn sees_arrival(&self, now: impl FnOnce() -> Instant) -> bool {
        self.arrival.is_some_and(|last| now().saturating_duration_since(last) < ARRIVAL)
    }

    /// Ends a round and gives the grants that are due. Returns the time until the next round, or `None` if no exchange
    /// waits.
    pub fn end_round(&mut self, round: Round, mut give: impl FnMut(Granted<T>)) -> Option<Duration> {
        let Round { now, lag, disk_is_busy, load } = round;
        let boost = load.is_of_small_exchanges().then_some(BOOST);
        let no_disk = self.waits_for_disk(disk_is_busy, now);
        let searches = self.is_search_due(now);
        for class in Class::ALL {
            let (queue, allowance) = (&mut self.queues[class as usize], &mut self.allowances[class as usize]);
            for who in if searches { queue.overdue(self.wait_max, now) } else { Vec::new() } {
                allowance.count_grant();
                give(Granted { who, class, overdue: true });
            }
            let boost = boost.filter(|_| class == Class::NewConnection);
            for _ in 0..allowance.end_round(lag, boost, now) {
                let Some(who) = queue.next(no_disk) else { break };
                allowance.count_grant();
                give(Granted { who, class, overdue: false });
            }
        }
        let pause = Class::ALL.iter().filter_map(|&class| self.pause(class, no_disk)).min();
        if pause.is_none() {
            // No round observes the disk threads any more.
            self.disk_busy_since = None;
            self.searched = None;
        }
        pause
    }

    /// Time until the next grant of a class; `None` if no exchange waits.
    fn pause(&self, class: Class, no_disk: bool) -> Option<Duration> {
        let queue = &self.queues[class as usize];
        let waits_for_disk = no_disk && queue.needs_only_disk();
        let pause = || if waits_for_disk { DISK_PAUSE } else { self.allowances[class as usize].pause() };
        (!queue.is_empty()).then(pause)
    }

    /// Whether exchanges that need the disk threads get no grant.
    fn waits_for_disk(&mut self, busy: bool, now: Instant) -> bool {
        self.disk_busy_since = self.disk_busy_since.filter(|_| busy).or(busy.then_some(now));
        self.disk_busy_since.is_some_and(|since| now.saturating_duration_since(since) < DISK_PAUSES_MAX)
    }

    /// Whether a search for overdue grants is due.
    fn is_search_due(&mut self, now: Instant) -> bool {
        let due = now.saturating_duration_since(*self.searched.get_or_insert(now)) >= OVERDUE_INTERVAL;
        if due {
            self.searched = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAIT_MAX: Duration = Duration::from_secs(10);

    /// Ends a short round and returns who gets a grant, and the pause.
    fn round(policy: &mut Policy<char>, now: Instant, disk_is_busy: bool) -> (String, Option<Duration>) {
        let mut granted = String::new();
        let load = Load { small: Duration::ZERO, bulk: 0 };
        let round = Round { now, lag: Duration::ZERO, disk_is_busy, load };
        let pause = policy.end_round(round, |Granted { who, overdue, .. }| {
            granted.push(if overdue { who.to_ascii_uppercase() } else { who });
        });
        (granted, pause)
    }

    #[test]
    fn an_exchange_that_needs_the_disk_threads_waits_while_they_are_busy_and_not_for_ever() {
        let (mut policy, begin) = (Policy::new(WAIT_MAX), Instant::now());
        policy.push('a', Class::Spool, 100, true, begin);
        policy.push('b', Class::Spool, 200, false, begin);
        assert_eq!(round(&mut policy, begin, true).0, "b");
        for after in 1..10 {
            assert_eq!(round(&mut policy, begin + after * DISK_PAUSE, true), (String::new(), Some(DISK_PAUSE)));
        }
        assert_eq!(round(&mut policy, begin + 10 * DISK_PAUSE, false), ("a".to_owned(), None));
        // No grant waits for a disk that never responds: its own deadline ends the exchange.
        policy.push('c', Class::Spool, 300, true, begin);
        assert_eq!(round(&mut policy, begin + 11 * DISK_PAUSE, true).1, Some(DISK_PAUSE));
        assert_eq!(round(&mut policy, begin + 12 * DISK_PAUSE + DISK_PAUSES_MAX, true).0, "c");
    }

    #[test]
    fn a_grant_is_given_after_the_longest_wait_and_no_other_before_it() {
        let (mut policy, begin) = (Policy::new(DISK_PAUSES_MAX / 2), Instant::now());
        policy.push('a', Class::Spool, 300, true, begin);
        policy.push('b', Class::Spool, 100, true, begin + OVERDUE_INTERVAL);
        assert_eq!(round(&mut policy, begin + DISK_PAUSE, true).0, "", "the first search is some time after");
        assert_eq!(round(&mut policy, begin + 2 * OVERDUE_INTERVAL + DISK_PAUSE, true).0, "A", "the other waits on");
        assert_eq!(round(&mut policy, begin + 3 * OVERDUE_INTERVAL, true).0, "", "no search is due");
        assert_eq!(round(&mut policy, begin + 3 * OVERDUE_INTERVAL + DISK_PAUSE, true), ("B".to_owned(), None));
    }

    #[test]
    fn a_class_has_its_own_time() {
        let (mut policy, now) = (Policy::new(WAIT_MAX), Instant::now());
        policy.charge(Class::Spool, Duration::from_secs(1));
        policy.push('s', Class::Spool, 1, false, now);
        policy.push('p', Class::Transfer, u64::MAX, false, now);
        assert_eq!(round(&mut policy, now, false).0, "p");
    }

    #[test]
    fn a_few_new_connections_continue_at_once_and_a_crowd_in_the_order_of_arrival() {
        let (mut policy, now) = (Policy::new(WAIT_MAX), Instant::now());
        assert!(!policy.defers_connection(now));
        policy.charge(Class::NewConnection, Duration::from_millis(1));
        for who in 'a'..='z' {
            assert!(policy.defers_connection(now));
            policy.push(who, Class::NewConnection, 0, false, now);
        }
        let rounds = (1..).map(|number| round(&mut policy, now + number * Duration::from_millis(1), false));
        let order: String = rounds.map_while(|(granted, pause)| pause.map(|_| granted)).collect();
        assert!(('a'..='z').collect::<String>().starts_with(&order) && order.len() > 13, "{order}");
        assert!(!policy.defers_connection(now + ARRIVAL), "no connection waits any more");
    }

    #[test]
    fn a_few_exchanges_pass_bulk_without_grants_and_fewer_while_a_crowd_arrives() {
        let (mut policy, now) = (Policy::<char>::new(WAIT_MAX), Instant::now());
        let crowded = |policy: &Policy<char>, bulk, now| policy.is_crowded(bulk, || now);
        assert!(!crowded(&policy, FREE_BULK, now));
        assert!(crowded(&policy, FREE_BULK + 1, now));
        policy.charge(Class::NewConnection, Duration::from_millis(1));
        assert!(policy.defers_connection(now));
        assert!(!crowded(&policy, FREE_BULK_IN_ARRIVAL, now));
        assert!(crowded(&policy, FREE_BULK_IN_ARRIVAL + 1, now));
        assert!(!crowded(&policy, FREE_BULK, now + ARRIVAL));
    }
}
