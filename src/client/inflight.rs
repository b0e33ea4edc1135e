//! Counts the active exchanges, so that a shutdown can wait for the last one.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// The active exchanges, so that a shutdown can wait for the last one.
#[derive(Default)]
pub struct Inflight {
    count: AtomicUsize,
    none: Notify,
}

impl Inflight {
    /// Counts an exchange until the guard is dropped.
    pub fn enter(self: &Arc<Self>) -> InflightGuard {
        self.count.fetch_add(1, Ordering::Relaxed);
        InflightGuard(self.clone())
    }

    /// Number of active exchanges.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Waits until no exchange is active.
    pub async fn drained(&self) {
        loop {
            let notified = self.none.notified();
            if self.count() == 0 {
                return;
            }
            notified.await;
        }
    }
}

/// One active exchange.
pub struct InflightGuard(Arc<Inflight>);

impl Drop for InflightGuard {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.none.notify_waiters();
        }
    }
}
