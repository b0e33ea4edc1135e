//! The retry budget of an upstream: of what it has under way, only a share may be repetitions of what it was sent
//! already, so that one that is sick is not finished off by them.
//!
//! What is to repeat a request asks [`Retries::permit`], after `proxy/retry.rs` found that it would be safe and of
//! use, and keeps the permit until the endpoint has answered. What costs no endpoint anything, such as a connection
//! that was refused, needs none.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// What one upstream may have repeated at a time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Allowance {
    /// A share of what it has under way, from 0 to 1.
    pub share: f64,
    /// How many at least, however small that share is.
    pub least: u32,
}

/// The repetitions that an upstream has now.
#[derive(Debug, Default)]
pub struct Retries {
    held: AtomicU32,
    /// Those of them that have not begun yet, and so have no endpoint.
    waiting: AtomicU32,
}

impl Retries {
    /// Leave to repeat a request, if there is any left. `inflight` is what the upstream has under way.
    pub fn permit(self: &Arc<Self>, inflight: u32, allowance: Allowance) -> Option<Permit> {
        let waiting = self.waiting.fetch_add(1, Ordering::Relaxed) + 1;
        let held = self.held.fetch_add(1, Ordering::Relaxed);
        let permit = Permit { retries: Arc::clone(self), waiting: true };
        let share = allowance.share * (f64::from(inflight) + f64::from(waiting));
        // If not, dropping it gives it back.
        (f64::from(held) < share.floor().max(allowance.least.into())).then_some(permit)
    }
}

/// Leave to repeat one request, until this is dropped.
#[derive(Debug)]
pub struct Permit {
    retries: Arc<Retries>,
    waiting: bool,
}

impl Permit {
    /// The next attempt begins: the upstream has it under way.
    pub fn begun(&mut self) {
        if std::mem::replace(&mut self.waiting, false) {
            self.retries.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// That attempt failed, too, and there is to be another one.
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
        // One that waits to begin is under way as well: k are allowed of 100 + k.
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
