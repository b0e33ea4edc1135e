//! The queue of stories before the exporting thread.
//!
//! A worker holds the lock for one push. The thread is woken by the first story and when the queue is half full,
//! and takes all stories at once.

use std::mem;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Story;

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
    stories: Vec<Story>,
    closing: bool,
    closed: bool,
}

impl Queue {
    /// An empty queue with this capacity.
    pub fn new(most: usize) -> Self {
        Queue { waiting: Mutex::default(), most, work: Condvar::new(), end: Condvar::new() }
    }

    /// Adds a story; `false` if the queue is full.
    pub fn push(&self, story: Story) -> bool {
        let mut waiting = self.lock();
        if waiting.closing || waiting.stories.len() >= self.most {
            return false;
        }
        waiting.stories.push(story);
        let there = waiting.stories.len();
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

    /// Accepts no more stories and waits until all are exported; `false` on timeout. Only the first call waits.
    pub fn close(&self, patience: Duration) -> bool {
        let mut waiting = self.lock();
        if mem::replace(&mut waiting.closing, true) {
            return true;
        }
        self.work.notify_one();
        let waited = self.end.wait_timeout_while(waiting, patience, |waiting| !waiting.closed);
        waited.unwrap_or_else(PoisonError::into_inner).0.closed
    }

    /// Waits for stories, lets some gather, and takes all; `None` after the queue was closed.
    #[cfg(feature = "otel")]
    pub fn take(&self, gather: Duration) -> Option<Vec<Story>> {
        let idle = |waiting: &mut Waiting| waiting.stories.is_empty() && !waiting.closing;
        let waiting = self.work.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner);
        let few = |waiting: &mut Waiting| waiting.stories.len() < self.hurry() && !waiting.closing;
        let gathered = self.work.wait_timeout_while(waiting, gather, few);
        let stories = mem::take(&mut gathered.unwrap_or_else(PoisonError::into_inner).0.stories);
        (!stories.is_empty()).then_some(stories)
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
    use super::super::otlp::tests::story;
    use super::*;

    #[test]
    fn a_full_queue_takes_no_more_until_it_is_emptied() {
        let queue = Queue::new(2);
        assert!(queue.push(story()) && queue.push(story()));
        assert!(!queue.push(story()));
        assert_eq!(queue.take(Duration::ZERO).map(|stories| stories.len()), Some(2));
        assert!(queue.push(story()));
    }

    #[test]
    fn what_is_queued_at_the_end_is_taken_and_nothing_after() {
        let queue = Queue::new(8);
        assert!(queue.push(story()));
        std::thread::scope(|scope| {
            let closing = scope.spawn(|| queue.close(Duration::from_secs(10)));
            assert_eq!(queue.take(Duration::from_secs(10)).map(|stories| stories.len()), Some(1));
            assert!(queue.take(Duration::from_secs(10)).is_none());
            assert!(!queue.push(story()));
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
