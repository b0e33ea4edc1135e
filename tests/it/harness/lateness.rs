//! How late an actor of the tests was because it did not get CPU time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The worst delay of an actor, beyond its intended pauses.
#[derive(Default)]
pub struct Lateness(AtomicU64);

impl Lateness {
    /// Records the time since `began`, all of which is the actor's own.
    pub fn note(&self, began: Instant) {
        self.0.fetch_max(began.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// The worst so far.
    pub fn worst(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}
