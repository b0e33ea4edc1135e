//! Signals all active exchanges to end when the grace period of a shutdown has passed.
//!
//! Every exchange waits for this signal, so each worker has its own list of waiters, whose lock it does not share.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

use crate::eventloop::worker;

const LISTS: usize = 16;

/// The signal; see the module.
#[derive(Default)]
pub struct Cut {
    over: AtomicBool,
    lists: [Notify; LISTS],
}

impl Cut {
    /// Signals all current and later waiters.
    pub fn now(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.lists.iter().for_each(Notify::notify_waiters);
    }

    /// Ends when the signal is given.
    pub async fn told(&self) {
        let list = worker::here().map_or(0, |worker| worker.index);
        let mut told = std::pin::pin!(self.lists[list % LISTS].notified());
        // The waiter registers before it checks the flag: it would miss a signal in between.
        told.as_mut().enable();
        if !self.over.load(Ordering::SeqCst) {
            told.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[tokio::test]
    async fn whoever_waits_and_whoever_comes_later_is_told() {
        let cut = Cut::default();
        let mut waiting = std::pin::pin!(cut.told());
        assert!((&mut waiting).now_or_never().is_none());
        cut.now();
        assert!(waiting.now_or_never().is_some() && cut.told().now_or_never().is_some());
    }
}
