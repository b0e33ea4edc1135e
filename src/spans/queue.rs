//! The queue of traces before the exporting thread.
//!
//! A worker holds the lock for one push. The thread is woken by the first trace and when the queue is half full,
//! and takes all traces at once.

use std::mem;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::TraceData;

/// Shared by workers and the thread.
pub struct Queue {
    waiting: Mutex<Waiting>,
    most: usize,
    /// There is something to export.
    work: Condvar,
    /// The thread has ended.
    end: Condvar,
}

#[derive(Default)]
struct Waiting {
    traces: Vec<TraceData>,
    closing: bool,
    closed: bool,
}

impl Queue {
    /// An empty queue with this capacity.
    pub fn new(most: usize) -> Self {
        Queue { waiting: Mutex::default(), most, work: Condvar::new(), end: Condvar::new() }
    }

    /// Adds a trace; `false` if the queue is full.
    pub fn push(&self, trace: TraceData) -> bool {
        let mut waiting = self.lock();
        if waiting.closing || waiting.traces.len() >= self.most {
            return false;
        }
        waiting.traces.push(trace);
        let there = waiting.traces.len();
        drop(waiting);
        if there == 1 || there == self.hurry() {
            self.work.notify_one();
        }
        true
    }

    /// At this length the thread exports without waiting for more.
    fn hurry(&self) -> usize {
        self.most.div_ceil(2)
    }

    /// Accepts no more traces and waits until all are exported; `false` on timeout. Only the first call waits.
    pub fn close(&self, patience: Duration) -> bool {
        let mut waiting = self.lock();
        if mem::replace(&mut waiting.closing, true) {
            return true;
        }
        self.work.notify_one();
        let waited = self.end.wait_timeout_while(waiting, patience, |waiting| !waiting.closed);
        waited.unwrap_or_else(PoisonError::into_inner).0.closed
    }

    /// Waits for traces, lets some gather, and takes all; `None` after the queue was closed.
    #[cfg(feature = "otel")]
    pub fn take(&self, gather: Duration) -> Option<Vec<TraceData>> {
        let idle = |waiting: &mut Waiting| waiting.traces.is_empty() && !waiting.closing;
        let waiting = self.work.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner);
        let few = |waiting: &mut Waiting| waiting.traces.len() < self.hurry() && !waiting.closing;
        let gathered = self.work.wait_timeout_while(waiting, gather, few);
        let traces = mem::take(&mut gathered.unwrap_or_else(PoisonError::into_inner).0.traces);
        (!traces.is_empty()).then_some(traces)
    }

    /// The thread has ended.
    #[cfg(feature = "otel")]
    pub fn ended(&self) {
        self.lock().closed = true;
        self.end.notify_all();
    }

    /// The list is consistent after every step, so a panic elsewhere does not corrupt it.
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(all(test, feature = "otel"))]
mod tests {
    use super::super::otlp::tests::trace;
    use super::*;

    #[test]
    fn a_full_queue_takes_no_more_until_it_is_emptied() {
        let queue = Queue::new(2);
        assert!(queue.push(trace()) && queue.push(trace()));
        assert!(!queue.push(trace()));
        assert_eq!(queue.take(Duration::ZERO).map(|traces| traces.len()), Some(2));
        assert!(queue.push(trace()));
    }

    #[test]
    fn what_is_queued_at_the_end_is_taken_and_nothing_after() {
        let queue = Queue::new(8);
        assert!(queue.push(trace()));
        std::thread::scope(|scope| {
            let closing = scope.spawn(|| queue.close(Duration::from_secs(10)));
            assert_eq!(queue.take(Duration::from_secs(10)).map(|traces| traces.len()), Some(1));
            assert!(queue.take(Duration::from_secs(10)).is_none());
            assert!(!queue.push(trace()));
            queue.ended();
            assert!(closing.join().expect("no panic"));
        });
    }

    #[test]
    fn the_end_does_not_wait_for_ever() {
        let queue = Queue::new(8);
        assert!(!queue.close(Duration::from_millis(1)));
        assert!(queue.close(Duration::from_secs(100)), "it waits once");
    }
}
