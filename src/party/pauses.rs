//! When the gateway itself did not run: its process was suspended or had no CPU, or a worker was stalled.
//!
//! The limit of another party does not run meanwhile: the party may have waited for bytes from the gateway, or may
//! have done its part without the gateway noticing. The heartbeat (`eventloop/heartbeat.rs`) records these pauses, for
//! each worker and for the process. They are read only when a limit seems to be exceeded.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A shorter pause is the gateway's ordinary work.
pub const PAUSE_LEAST: Duration = Duration::from_millis(20);

/// Maximum number of recorded pauses; the oldest one is dropped. It bounds by how much a limit can move while a worker
/// is stalled again and again.
const KEPT: usize = 64;

/// The beginning and the end of a pause.
type Pause = (Instant, Instant);

/// The pauses of a worker, or of the process.
#[derive(Debug)]
pub struct Pauses {
    epoch: Instant,
    /// When the next round of the heartbeat is due, in nanoseconds since the epoch.
    round: AtomicU64,
    ended: Mutex<VecDeque<Pause>>,
}

/// The pauses of the process, for threads that are not workers.
static OF_PROCESS: LazyLock<Pauses> = LazyLock::new(|| Pauses::new(Instant::now()));

thread_local! {
    static OF_THREAD: Cell<Option<&'static Pauses>> = const { Cell::new(None) };
}

impl Pauses {
    /// No pauses. Times before `epoch` are not recorded.
    pub fn new(epoch: Instant) -> Pauses {
        Pauses { epoch, round: AtomicU64::new(u64::MAX), ended: Mutex::default() }
    }

    /// The pauses of the process.
    pub fn of_process() -> &'static Pauses {
        &OF_PROCESS
    }

    /// Makes these the pauses of this thread, which is a worker.
    pub fn are_of_this_thread(&'static self) {
        OF_THREAD.set(Some(self));
    }

    /// Adds a pause; it may continue the last one.
    pub fn add(&self, begin: Instant, end: Instant) {
        let (mut begin, mut end) = (begin, end);
        let mut ended = self.ended();
        while let Some(last) = ended.pop_back_if(|last| last.1 >= begin) {
            (begin, end) = (begin.min(last.0), end.max(last.1));
        }
        if ended.len() == KEPT {
            ended.pop_front();
        }
        ended.push_back((begin, end));
    }

    /// Sets when the next round of the heartbeat is due; `None`: there is none.
    pub fn expect_round(&self, due: Option<Instant>) {
        let nanos = |due: Instant| u64::try_from(due.saturating_duration_since(self.epoch).as_nanos());
        self.round.store(due.map_or(u64::MAX, |due| nanos(due).unwrap_or(u64::MAX)), Ordering::Release);
    }

    /// For how long the round of the heartbeat is overdue: the process was suspended or has no CPU, and the heartbeat
    /// has not recorded it yet. Zero below [`PAUSE_LEAST`].
    pub fn overdue(&self, now: Instant) -> Duration {
        let due = Duration::from_nanos(self.round.load(Ordering::Acquire));
        let overdue = now.saturating_duration_since(self.epoch).saturating_sub(due);
        if overdue < PAUSE_LEAST { Duration::ZERO } else { overdue }
    }

    /// The pauses until `now`.
    fn until(&self, now: Instant) -> Vec<Pause> {
        let overdue = Some(self.overdue(now)).filter(|overdue| !overdue.is_zero());
        let present = overdue.map(|overdue| (now - overdue, now));
        self.ended().iter().copied().chain(present).collect()
    }

    fn ended(&self) -> MutexGuard<'_, VecDeque<Pause>> {
        // Held for a few instructions.
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The time between `since` and `now` for which the other worker did not run, but this thread did.
pub fn paused_elsewhere(since: Instant, now: Instant, other: &Pauses) -> Duration {
    paused(since, now, Some(other)).saturating_sub(paused(since, now, None))
}

/// The time between `since` and `now` for which this thread or the other worker did not run. On a thread that is not a
/// worker, the pauses of the process count.
pub fn paused(since: Instant, now: Instant, other: Option<&Pauses>) -> Duration {
    if now.saturating_duration_since(since) < PAUSE_LEAST {
        return Duration::ZERO;
    }
    let mut pauses = OF_THREAD.get().unwrap_or(&OF_PROCESS).until(now);
    pauses.extend(other.into_iter().flat_map(|other| other.until(now)));
    overlap(pauses, since, now)
}

/// How much of the time between `since` and `now` these pauses cover together.
fn overlap(mut pauses: Vec<Pause>, since: Instant, now: Instant) -> Duration {
    pauses.sort_unstable();
    let (mut covered, mut sum) = (since, Duration::ZERO);
    for (begin, end) in pauses {
        let (begin, end) = (begin.max(covered), end.min(now));
        sum += end.saturating_duration_since(begin);
        covered = covered.max(end);
    }
    sum
}

/// An extended limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grant {
    /// When the limit was due at first.
    pub due: Instant,
    /// Until when it was extended.
    pub until: Instant,
}

/// The party's part may be with another task of this worker, which runs after the next look at the sockets.
const LOOK: Duration = Duration::from_millis(5);

impl Grant {
    /// Decides at `now`, when the limit seems to be exceeded; `paused` is the part of it for which the gateway did not
    /// run. `None`: it is exceeded. Otherwise the limit is extended by that part, and by at least one more look at the
    /// sockets.
    pub(super) fn more(self, paused: Duration, now: Instant) -> Option<Grant> {
        let Grant { due, until } = self;
        // A timer that rings late proves a pause, even if nothing has recorded it.
        let late = Some(now.saturating_duration_since(until)).filter(|&late| late >= PAUSE_LEAST);
        let paused = paused.max(late.unwrap_or_default());
        let (granted, is_first) = (due + paused, due == until);
        let until = if granted > now { granted } else { now + LOOK };
        (!paused.is_zero() && (granted > now || is_first)).then_some(Grant { due, until })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn pauses_that_overlap_count_once_and_only_within_the_limit() {
        let begin = Instant::now();
        let at = |millis| begin + ms(millis);
        let pauses = Pauses::new(begin);
        pauses.add(at(100), at(150));
        pauses.add(at(100), at(200));
        pauses.add(at(300), at(350));
        assert_eq!(pauses.until(at(1_000)), [(at(100), at(200)), (at(300), at(350))]);
        let sum = |since, now| overlap(pauses.until(at(now)), at(since), at(now));
        assert_eq!(sum(0, 1_000), ms(150));
        assert_eq!(sum(150, 320), ms(70));
        assert_eq!(sum(400, 1_000), ms(0));
        let other = Pauses::new(begin);
        other.add(at(120), at(310));
        assert_eq!(paused(at(0), at(1_000), Some(&other)), ms(190), "this thread had none");
        let both = [pauses.until(at(1_000)), other.until(at(1_000))].concat();
        assert_eq!(overlap(both, at(0), at(1_000)), ms(250));
    }

    #[test]
    fn a_suspended_process_knows_it_before_the_heartbeat_does() {
        let begin = Instant::now();
        let at = |millis| begin + ms(millis);
        let pauses = Pauses::new(begin);
        assert_eq!(pauses.overdue(at(60_000)), ms(0), "before the first heartbeat");
        pauses.expect_round(Some(at(100)));
        assert_eq!(pauses.overdue(at(119)), ms(0));
        assert_eq!(pauses.until(at(3_100)), [(at(100), at(3_100))]);
        pauses.add(at(100), at(3_100));
        pauses.expect_round(Some(at(3_110)));
        assert_eq!(overlap(pauses.until(at(3_112)), at(0), at(3_112)), ms(3_000));
    }

    #[test]
    fn a_worker_that_is_stalled_again_and_again_moves_a_limit_by_a_bounded_time() {
        let begin = Instant::now();
        let pauses = Pauses::new(begin);
        for n in 0..10_000 {
            pauses.add(begin + ms(n * 30), begin + ms(n * 30 + 25));
        }
        let now = begin + ms(300_000);
        assert_eq!(overlap(pauses.until(now), begin, now), ms(25) * KEPT as u32);
    }

    #[test]
    fn a_limit_is_extended_by_the_pause_and_by_one_look_at_least() {
        let due = Instant::now() + ms(1_000);
        let first = Grant { due, until: due };
        assert_eq!(first.more(ms(0), due + ms(19)), None, "the gateway ran");
        let granted = first.more(ms(800), due + ms(100));
        assert_eq!(granted, Some(Grant { due, until: due + ms(800) }));
        assert_eq!(granted.and_then(|grant| grant.more(ms(800), due + ms(801))), None);
        let again = granted.and_then(|grant| grant.more(ms(3_000), due + ms(2_900)));
        assert_eq!(again, Some(Grant { due, until: due + ms(3_000) }), "another pause");
        let look = first.more(ms(50), due + ms(60));
        assert_eq!(look, Some(Grant { due, until: due + ms(65) }), "the pause is shorter than the delay");
        assert_eq!(look.and_then(|grant| grant.more(ms(50), due + ms(65))), None);
        assert!(first.more(ms(0), due + ms(20)).is_some(), "the timer itself was late");
    }
}
