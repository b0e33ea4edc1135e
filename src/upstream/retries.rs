//! The retry budget of an upstream: retries are limited to a share of its active requests, so that they do not
//! overload a failing upstream.
//!
//! `proxy/retry.rs` first decides whether a retry is safe and useful. Then a retry needs a permit from
//! [`Retries::permit`], which it keeps until the endpoint has responded. Retries that cost no endpoint anything,
//! such as after a refused connection, need no permit.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// The limit on retries of an upstream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Allowance {
    /// A share of its active requests, from 0 to 1.
    pub share: f64,
    /// A number that is always allowed.
    pub least: u32,
}

/// The active retries of an upstream.
#[derive(Debug, Default)]
pub struct Retries {
    held: AtomicU32,
    /// Those that have not started yet and have no endpoint.
    waiting: AtomicU32,
}

impl Retries {
    /// A permit for a retry, if the budget allows it. `inflight` is the number of active requests.
    pub fn permit(self: &Arc<Self>, inflight: u32, allowance: Allowance) -> Option<Permit> {
        let waiting = self.waiting.fetch_add(1, Ordering::Relaxed) + 1;
        let held = self.held.fetch_add(1, Ordering::Relaxed);
        let permit = Permit { retries: Arc::clone(self), waiting: true };
        let share = allowance.share * (f64::from(inflight) + f64::from(waiting));
        // Without a permit, dropping it restores the counters.
        (f64::from(held) < share.floor().max(allowance.least.into())).then_some(permit)
    }
}

/// Permission for one retry, until this is dropped.
#[derive(Debug)]
pub struct Permit {
    retries: Arc<Retries>,
    waiting: bool,
}

impl Permit {
    /// The next attempt begins: it counts as active.
    pub fn begun(&mut self) {
        if std::mem::replace(&mut self.waiting, false) {
            self.retries.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// That attempt failed, too, and another one follows.
    pub fn waits(&mut self) {
        if !std::mem::replace(&mut self.waiting, true) {
            self.retries.waiting.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.begun();
        self.retries.held.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOWANCE: Allowance = Allowance { share: 0.2, least: 3 };

    fn permits(retries: &Arc<Retries>, inflight: u32) -> Vec<Permit> {
        std::iter::from_fn(|| retries.permit(inflight, ALLOWANCE)).take(1_000).collect()
    }

    #[test]
    fn a_share_of_what_is_under_way_may_be_repetitions() {
        let retries = Arc::<Retries>::default();
        // Waiting retries count as active as well: k are allowed of 100 + k.
        let mut held = permits(&retries, 100);
        assert_eq!(held.len(), 25);
        held.iter_mut().for_each(Permit::begun);
        assert!(retries.permit(120, ALLOWANCE).is_none(), "those that have begun are among the 120");
        drop(held);
        assert_eq!(permits(&retries, 0).len(), 3, "however little is under way");
    }

    #[test]
    fn a_permit_that_is_given_back_counts_no_longer_in_whatever_state_it_was() {
        let retries = Arc::<Retries>::default();
        for _ in 0..10 {
            let mut permit = retries.permit(0, ALLOWANCE).unwrap();
            permit.begun();
            permit.waits();
            permit.waits();
            permit.begun();
            permit.begun();
        }
        assert!(retries.permit(0, Allowance { share: 1.0, least: 0 }).is_some());
        assert!(retries.permit(0, Allowance { share: 0.0, least: 0 }).is_none());
        assert_eq!((retries.held.load(Ordering::Relaxed), retries.waiting.load(Ordering::Relaxed)), (0, 0));
    }
}
