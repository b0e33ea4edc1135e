//! The bytes in memory that spools hold together, and the spools that wait for a release.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use tokio::sync::Notify;

/// Number of bytes from which the first two steps of a budget apply; unreachable if a step is not used.
#[derive(Clone, Copy, Debug)]
pub struct Steps {
    /// From here, spools keep no new bytes in memory that they could write to disk.
    pub spill_at: u64,
    /// From here, spools take no more bytes.
    pub full_at: u64,
}

impl Steps {
    /// The steps of a pool with this limit. No step applies to an empty pool, however small the limit.
    pub fn of(limit: u64, spill: bool, pause: bool) -> Self {
        let full_at = if pause { limit - limit / 16 } else { limit };
        let spill_at = if spill { (limit - limit / 4).max(1) } else { u64::MAX };
        Steps { spill_at, full_at: full_at.max(1) }
    }
}

/// Bytes in memory, and the spools that wait for a release.
#[derive(Default)]
pub struct Pool {
    used: AtomicU64,
    /// Number of spools that wait for memory.
    paused: AtomicUsize,
    /// Wakes one waiter, which wakes the next.
    turn: Notify,
}

impl Pool {
    /// The bytes in use.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Number of spools that wait for memory.
    pub fn paused(&self) -> usize {
        self.paused.load(Ordering::Relaxed)
    }

    /// Takes bytes, whether or not there is room; returns those in use before.
    pub fn take(&self, bytes: u64) -> u64 {
        self.used.fetch_add(bytes, Ordering::Relaxed)
    }

    /// Releases bytes; returns those in use before. The caller wakes a waiter afterwards.
    pub fn release(&self, bytes: u64) -> u64 {
        self.used.fetch_sub(bytes, Ordering::SeqCst)
    }

    /// Whether the pool is full, sequentially consistent with [`Pool::release`]: either the one that releases sees the
    /// waiter, or the waiter sees the release.
    pub fn is_full_for_certain(&self, steps: Steps) -> bool {
        self.used.load(Ordering::SeqCst) >= steps.full_at
    }

    /// Wakes one waiter if there is room.
    pub fn wake(&self, steps: Steps) {
        if self.paused.load(Ordering::SeqCst) > 0 && self.used() < steps.full_at {
            self.turn.notify_one();
        }
    }

    /// Ends when there is room; then wakes the next waiter.
    pub async fn room(&self, steps: Steps) {
        let waiting = Waiting::enter(&self.paused);
        while self.is_full_for_certain(steps) {
            // If a woken future is dropped, its turn passes to the next.
            self.turn.notified().await;
        }
        drop(waiting);
        self.wake(steps);
    }
}

/// Counts a waiter of a pool.
struct Waiting<'p>(&'p AtomicUsize);

impl<'p> Waiting<'p> {
    fn enter(paused: &'p AtomicUsize) -> Self {
        paused.fetch_add(1, Ordering::SeqCst);
        Waiting(paused)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What the spools of one client hold in one direction.
#[derive(Default)]
pub struct Held {
    /// Bytes in memory.
    pub memory: Pool,
    /// Bytes on disk.
    pub disk: AtomicU64,
    /// Files on disk.
    pub files: AtomicU64,
}
