//! Tells all exchanges that are under way to end, when the time that a stop leaves them is over.
//!
//! Every exchange waits for it, so the waiters of each worker have a list of their own, whose lock they share with
//! nobody.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

use crate::eventloop::worker;

const LISTS: usize = 16;

/// See the module.
#[derive(Default)]
pub struct Cut {
    over: AtomicBool,
    lists: [Notify; LISTS],
}

impl Cut {
    /// Tells them, and all that come later.
    pub fn now(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.lists.iter().for_each(Notify::notify_waiters);
    }

    /// Ends when they are told.
    pub async fn told(&self) {
        let list = worker::here().map_or(0, |worker| worker.index);
        let mut told = std::pin::pin!(self.lists[list % LISTS].notified());
        // On the list before the look: who is told in between would miss it.
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
