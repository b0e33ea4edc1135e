//! A simulated worker: the policy and the accept limit, with simulated time instead of an event loop.
//!
//! As on a real worker, ready tasks are polled in the order in which they became ready. The costs are round
//! figures for small exchanges and bulk transfers.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::policy::{FREE_BULK_IN_ARRIVAL, Granted, Load, Policy, Round};
use super::{Class, PAUSE_MIN, accept};

const ACCEPT: Duration = Duration::from_micros(10);
const END_ROUND: Duration = Duration::from_micros(5);
/// One poll of an exchange on a new connection, and the number of polls until its response begins.
const NEWCOMER: Duration = Duration::from_micros(20);
const NEWCOMER_POLLS: u32 = 3;
/// One request on a connection that has been served.
const SMALL: Duration = Duration::from_micros(24);
/// One grant of a bulk transfer, and the number of them.
const BULK: Duration = Duration::from_micros(100);
const BULK_GRANTS: u32 = 16;
/// The interval of the fast client's requests.
const FAST_INTERVAL: Duration = Duration::from_millis(2);

/// What decides whose turn it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scheduling {
    /// First come, first served: new connections are accepted, and served, before all others.
    None,
    /// The policy without its boost for new connections.
    WithoutBoost,
    Policy,
}

/// What new connections want.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// One small response after another.
    Small,
    /// A large response, which is read slowly.
    Bulk,
}

enum Task {
    Accept,
    EndRound,
    Newcomer {
        polls: u32,
        granted: bool,
    },
    /// A request on a connection that has been served.
    Small,
    Bulk {
        grants: u32,
    },
    Fast {
        due: Instant,
    },
}

/// A worker at which this many connections arrive at once.
struct Worker {
    scheduling: Scheduling,
    wanted: Wanted,
    begin: Instant,
    now: Instant,
    ready: VecDeque<Task>,
    backlog: usize,
    policy: Policy<Task>,
    accepts: accept::Round,
    /// The end of the pause and the begin of the round, while exchanges wait.
    round: Option<(Instant, Instant)>,
    small: Duration,
    seen_by_rounds: Duration,
    seen_by_accepts: Duration,
    bulk: usize,
    next_fast: Instant,
    /// Times until the first response.
    first: Vec<Duration>,
    /// Times until the response to the fast client.
    fast: Vec<Duration>,
}

impl Worker {
    fn new(scheduling: Scheduling, wanted: Wanted, arrivals: usize) -> Self {
        let now = Instant::now();
        Worker {
            scheduling,
            wanted,
            begin: now,
            now,
            ready: VecDeque::from([Task::Accept]),
            backlog: arrivals,
            policy: Policy::new(Duration::from_secs(10)),
            accepts: accept::Round::default(),
            round: None,
            small: Duration::ZERO,
            seen_by_rounds: Duration::ZERO,
            seen_by_accepts: Duration::ZERO,
            bulk: 0,
            next_fast: now,
            first: Vec::new(),
            fast: Vec::new(),
        }
    }

    /// Runs until all connections have their first response, and all bulk is transferred.
    fn run(mut self, arrivals: usize) -> Self {
        while self.first.len() < arrivals || self.bulk > 0 {
            assert!(self.now - self.begin < Duration::from_secs(60), "{} of {arrivals}", self.first.len());
            self.wake();
            match self.ready.pop_front() {
                Some(task) => self.poll(task),
                None => self.now += Duration::from_micros(50),
            }
        }
        self
    }

    /// Makes tasks ready whose time has come.
    fn wake(&mut self) {
        if self.wanted == Wanted::Bulk && self.now >= self.next_fast {
            self.ready.push_back(Task::Fast { due: self.next_fast });
            self.next_fast += FAST_INTERVAL;
        }
        if self.round.is_some_and(|(until, _)| until <= self.now) {
            self.round = Some((self.now + Duration::from_secs(3600), self.now));
            self.ready.push_back(Task::EndRound);
        }
    }

    /// The load since the last look, of which `seen` is the time.
    fn load(&self, seen: &mut Duration) -> Load {
        let small = self.small - std::mem::replace(seen, self.small);
        let bulk = if self.scheduling == Scheduling::WithoutBoost { FREE_BULK_IN_ARRIVAL + 1 } else { self.bulk };
        Load { small, bulk }
    }

    fn poll(&mut self, task: Task) {
        match task {
            Task::Accept => self.accept(),
            Task::EndRound => self.end_round(),
            Task::Newcomer { polls, granted } => self.newcomer(polls, granted),
            Task::Small => {
                self.now += SMALL;
                self.small += SMALL;
                self.ready.push_back(Task::Small);
            }
            Task::Bulk { grants } => self.transfer(grants),
            Task::Fast { due } => {
                self.now += SMALL;
                self.small += SMALL;
                self.fast.push(self.now - due);
            }
        }
    }

    fn accept(&mut self) {
        while self.backlog > 0 {
            self.backlog -= 1;
            self.now += ACCEPT;
            self.ready.push_back(Task::Newcomer { polls: 0, granted: false });
            let (mut accepts, mut seen) = (self.accepts, self.seen_by_accepts);
            let ends = accepts.count(self.now, || self.load(&mut seen));
            (self.accepts, self.seen_by_accepts) = (accepts, seen);
            if ends && self.scheduling != Scheduling::None {
                self.ready.push_back(Task::Accept);
                return;
            }
        }
    }

    fn newcomer(&mut self, polls: u32, granted: bool) {
        let waits = self.scheduling != Scheduling::None && !granted && self.policy.defers_connection(self.now);
        if waits {
            return self.request(Task::Newcomer { polls, granted: true }, Class::NewConnection, 0);
        }
        self.now += NEWCOMER;
        self.policy.charge(Class::NewConnection, NEWCOMER);
        if polls + 1 < NEWCOMER_POLLS {
            return self.ready.push_back(Task::Newcomer { polls: polls + 1, granted: false });
        }
        self.first.push(self.now - self.begin);
        match self.wanted {
            Wanted::Small => self.ready.push_back(Task::Small),
            Wanted::Bulk => {
                self.bulk += 1;
                self.request(Task::Bulk { grants: BULK_GRANTS }, Class::Spool, u64::from(BULK_GRANTS));
            }
        }
    }

    fn transfer(&mut self, grants: u32) {
        self.now += BULK;
        self.policy.charge(Class::Spool, BULK);
        match grants - 1 {
            0 => self.bulk -= 1,
            left => self.request(Task::Bulk { grants: left }, Class::Spool, u64::from(left)),
        }
    }

    fn request(&mut self, task: Task, class: Class, missing: u64) {
        self.policy.push(task, class, missing, false, self.now);
        self.round.get_or_insert((self.now, self.now));
    }

    fn end_round(&mut self) {
        let Some((_, since)) = self.round else { return };
        self.now += END_ROUND;
        let mut seen = self.seen_by_rounds;
        let load = self.load(&mut seen);
        self.seen_by_rounds = seen;
        let round = Round { now: self.now, lag: self.now - since, disk_is_busy: false, load };
        let ready = &mut self.ready;
        let pause = self.policy.end_round(round, |Granted { who, .. }| ready.push_back(who));
        self.round = pause
            .map(|pause| if pause < PAUSE_MIN { Duration::ZERO } else { pause })
            .map(|pause| (self.now + pause, self.now + pause));
    }
}

/// The longest of these times, and their 99th percentile.
fn longest(mut times: Vec<Duration>) -> (Duration, Duration) {
    times.sort();
    (times[times.len() - 1], times[(times.len() - 1) * 99 / 100])
}

/// The waits of this many connections that arrive at once at a worker that is saturated by those that it has served.
fn arrival(scheduling: Scheduling, connections: usize) -> (Duration, Duration) {
    longest(Worker::new(scheduling, Wanted::Small, connections).run(connections).first)
}

/// The latency of a fast client beside a crowd of slow readers that arrives at once.
fn beside_crowd(scheduling: Scheduling, readers: usize) -> (Duration, Duration) {
    longest(Worker::new(scheduling, Wanted::Bulk, readers).run(readers).fast)
}

#[test]
fn connections_that_arrive_at_once_wait_little_longer_than_if_they_were_served_before_all_others() {
    for connections in [64, 128, 256, 512] {
        let [fifo, policy] = [Scheduling::None, Scheduling::Policy].map(|way| arrival(way, connections));
        assert!(policy.0 <= 4 * fifo.0 && policy.1 <= 4 * fifo.1, "{connections}: {policy:?} instead of {fifo:?}");
    }
    let [policy, without] = [Scheduling::Policy, Scheduling::WithoutBoost].map(|way| arrival(way, 512));
    assert!(without.0 > 4 * policy.0, "the boost is what this tests: {without:?} instead of {policy:?}");
}

#[test]
fn a_fast_client_beside_a_crowd_of_slow_readers_waits_no_longer_for_the_boost() {
    let [none, without, policy] =
        [Scheduling::None, Scheduling::WithoutBoost, Scheduling::Policy].map(|way| beside_crowd(way, 1_000));
    assert!(policy.0 <= without.0 && policy.1 <= without.1, "{policy:?} instead of {without:?}");
    assert!(policy.0 < Duration::from_millis(3), "{policy:?}");
    assert!(none.0 > 4 * policy.0, "the scheduler is what this tests: {none:?}");
}
