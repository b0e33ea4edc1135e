//! [`Schedule`] for Pingora's `LoadBalancer`, whose own `RoundRobin` does not interleave.

use std::collections::BTreeSet;
use std::mem;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pingora_load_balancing::Backend;
use pingora_load_balancing::selection::{BackendIter, BackendSelection};

use super::Schedule;

/// Smooth weighted round robin over the backends of a Pingora `LoadBalancer`, in the order of their addresses.
#[derive(Debug)]
pub struct SmoothRoundRobin {
    backends: Box<[Backend]>,
    /// `None` if there are no backends.
    schedule: Option<Schedule>,
    /// The rotation of substitutes for an unavailable backend.
    stand_in: AtomicUsize,
}

impl SmoothRoundRobin {
    /// The backend at this turn.
    fn at(&self, turn: usize) -> Option<&Backend> {
        self.backends.get(self.schedule.as_ref()?.at(turn))
    }
}

impl BackendSelection for SmoothRoundRobin {
    type Iter = Turns;
    type Config = ();

    fn build(backends: &BTreeSet<Backend>) -> Self {
        let weight = |backend: &Backend| NonZeroU64::new(backend.weight as u64).unwrap_or(NonZeroU64::MIN);
        let weights: Vec<NonZeroU64> = backends.iter().map(weight).collect();
        SmoothRoundRobin {
            backends: backends.iter().cloned().collect(),
            schedule: Schedule::new(&weights),
            stand_in: AtomicUsize::new(0),
        }
    }

    fn iter(self: &Arc<Self>, _key: &[u8]) -> Turns {
        Turns {
            turn: self.schedule.as_ref().map_or(0, Schedule::turn),
            left: self.backends.len(),
            offered: Vec::new(),
            selection: Arc::clone(self),
        }
    }
}

/// The next backend in turn, then all others, each once.
///
/// Substitutes have their own rotation, so that the share of an unavailable backend is spread over all others by
/// weight. Otherwise its successor in the schedule would get all of it. Offers are recorded only after the first
/// one was rejected.
#[derive(Debug)]
pub struct Turns {
    selection: Arc<SmoothRoundRobin>,
    turn: usize,
    /// Number of backends that were not offered yet.
    left: usize,
    /// Whether a backend was offered, by number. Empty until the second offer.
    offered: Vec<bool>,
}

impl Turns {
    /// Moves to a backend that was not offered yet. There must be one.
    fn stand_in(&mut self) {
        let SmoothRoundRobin { backends, schedule, stand_in } = &*self.selection;
        let Some(schedule) = schedule else { return };
        if self.offered.is_empty() {
            self.offered = vec![false; backends.len()];
            self.offered[schedule.at(self.turn)] = true;
            self.turn = stand_in.fetch_add(1, Ordering::Relaxed);
        }
        let from = self.turn;
        while mem::replace(&mut self.offered[schedule.at(self.turn)], true) {
            self.turn = self.turn.wrapping_add(1);
        }
        stand_in.fetch_add(self.turn.wrapping_sub(from), Ordering::Relaxed);
    }
}

impl BackendIter for Turns {
    fn next(&mut self) -> Option<&Backend> {
        if self.left == 0 {
            return None;
        }
        if self.left < self.selection.backends.len() {
            self.stand_in();
        }
        self.left -= 1;
        self.selection.at(self.turn)
    }
}
