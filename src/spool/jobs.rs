//! A queue of jobs whose senders never wait for its receivers.
//!
//! The receivers are threads of low priority. The channel of the standard library shares a lock between both sides: a
//! receiver that is preempted while it holds the lock would block a worker until it gets CPU time again. Here, a
//! sender appends to a lock-free list and, if a receiver sleeps, makes one system call.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use crossbeam_queue::SegQueue;
use rustix::thread::futex::{self, Flags};

/// Wakes all receivers; the kernel takes the number as a signed one.
const ALL: u32 = i32::MAX as u32;

struct Shared<T> {
    jobs: SegQueue<T>,
    /// Changes with every event that a receiver could sleep through.
    events: AtomicU32,
    /// Number of receivers that sleep or are about to.
    sleepers: AtomicU32,
    senders: AtomicUsize,
    receivers: AtomicUsize,
}

/// The side of the workers.
pub(super) struct Sender<T>(Arc<Shared<T>>);

/// The side of the threads. Clones share the jobs.
pub(super) struct Receiver<T>(Arc<Shared<T>>);

/// An empty queue.
pub(super) fn queue<T>() -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared {
        jobs: SegQueue::new(),
        events: AtomicU32::new(0),
        sleepers: AtomicU32::new(0),
        senders: AtomicUsize::new(1),
        receivers: AtomicUsize::new(1),
    });
    (Sender(shared.clone()), Receiver(shared))
}

impl<T> Shared<T> {
    /// Wakes this number of sleeping receivers.
    fn wake(&self, most: u32) {
        // Together with `Receiver::next`, these orderings ensure that either the receiver sees the event, or its sleep
        // is seen here.
        self.events.fetch_add(1, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            // The call fails only for an invalid address.
            let _ = futex::wake(&self.events, Flags::PRIVATE, most);
        }
    }

    /// Drops the jobs that no receiver will take.
    fn clear(&self) {
        while self.jobs.pop().is_some() {}
    }
}

impl<T> Sender<T> {
    /// Queues a job. It is dropped if all receivers have ended.
    pub fn send(&self, job: T) {
        self.0.jobs.push(job);
        if self.0.receivers.load(Ordering::SeqCst) == 0 {
            self.0.clear();
        }
        self.0.wake(1);
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.senders.fetch_add(1, Ordering::Relaxed);
        Sender(self.0.clone())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        if self.0.senders.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.wake(ALL);
        }
    }
}

impl<T> Receiver<T> {
    /// Waits for a job; `None`: the queue is empty and has no sender.
    pub fn next(&self) -> Option<T> {
        let shared = &*self.0;
        loop {
            let events = shared.events.load(Ordering::SeqCst);
            // Before the look for a job: what the last sender has sent is seen after its end is.
            let ended = shared.senders.load(Ordering::SeqCst) == 0;
            if let Some(job) = shared.jobs.pop() {
                return Some(job);
            }
            if ended {
                return None;
            }
            shared.sleepers.fetch_add(1, Ordering::SeqCst);
            // Returns at once if an event has happened since. Every other return is followed by a new look.
            let _ = futex::wait(&shared.events, Flags::PRIVATE, events, None);
            shared.sleepers.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        self.0.receivers.fetch_add(1, Ordering::Relaxed);
        Receiver(self.0.clone())
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        if self.0.receivers.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::thread;

    use super::*;

    #[test]
    fn jobs_come_in_order_and_the_end_comes_after_the_last() {
        let (sender, receiver) = queue();
        let second = sender.clone();
        sender.send(1);
        second.send(2);
        drop(sender);
        assert_eq!([receiver.next(), receiver.next()], [Some(1), Some(2)]);
        second.send(3);
        drop(second);
        assert_eq!([receiver.next(), receiver.next(), receiver.next()], [Some(3), None, None]);
    }

    #[test]
    fn jobs_that_no_receiver_can_take_are_dropped() {
        let job = Arc::new(());
        let (sender, receiver) = queue();
        let second = receiver.clone();
        sender.send(job.clone());
        drop(receiver);
        sender.send(job.clone());
        assert_eq!(Arc::strong_count(&job), 3);
        drop(second);
        assert_eq!(Arc::strong_count(&job), 1);
        sender.send(job.clone());
        assert_eq!(Arc::strong_count(&job), 1);
    }

    #[test]
    fn every_job_is_received_once_by_threads_that_sleep_in_between() {
        const SENDERS: u32 = 4;
        const EACH: u32 = 5_000;
        let (sender, receiver) = queue();
        let received = thread::scope(|scope| {
            let receive = || {
                let receiver = receiver.clone();
                scope.spawn(move || std::iter::from_fn(|| receiver.next()).collect::<Vec<u32>>())
            };
            let receivers: Vec<_> = (0..3).map(|_| receive()).collect();
            for number in 0..SENDERS {
                let sender = sender.clone();
                scope.spawn(move || {
                    for job in 0..EACH {
                        sender.send(number * EACH + job);
                        if job % 64 == 0 {
                            thread::yield_now();
                        }
                    }
                });
            }
            drop(sender);
            receivers.into_iter().flat_map(|receiver| receiver.join().expect("no panic")).collect::<Vec<_>>()
        });
        assert_eq!(received.len(), (SENDERS * EACH) as usize);
        assert_eq!(received.into_iter().collect::<BTreeSet<_>>().len(), (SENDERS * EACH) as usize);
    }
}
