//! A thread that hashes one password after the other, as its clerk sees it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use super::Job;
use crate::eventloop::cpu::CpuClock;

/// How far an escort gives way to others that want the CPU: it gets a third of what a worker gets.
const NICE: libc::c_int = 5;

/// One at work is not called starved before this time ...
const STARVED_AFTER: Duration = Duration::from_millis(500);
/// ... nor if it got this part of it.
const STARVED_PART: u32 = 4;

/// How a thread takes CPU time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rank {
    /// Only that which is left over.
    Patient,
    /// Its share, which is smaller than that of a worker.
    Escort,
}

/// What a hashing thread has found, until its clerk asks for it.
#[derive(Default)]
struct Found(AtomicU8);

const NOTHING: u8 = 0;
const WRONG: u8 = 1;
const RIGHT: u8 = 2;

/// See the module. The thread ends when its desk is dropped, once it has hashed what it is at.
pub(super) struct Desk {
    jobs: Sender<Arc<Job>>,
    found: Arc<Found>,
    clock: CpuClock,
    at: Option<At>,
}

/// What a desk is at.
struct At {
    job: Arc<Job>,
    since: Instant,
    /// The CPU time of the thread then.
    cpu: Duration,
    starved: bool,
    handed_on: bool,
}

impl Desk {
    /// Begins a thread, which tells the one that calls this when it has found something.
    ///
    /// # Errors
    /// There can be no further thread.
    pub fn open(rank: Rank) -> io::Result<Desk> {
        let (jobs, given) = channel();
        let (clock, told) = channel();
        let found = Arc::new(Found::default());
        let (shared, clerk) = (found.clone(), thread::current());
        thread::Builder::new().name("password".to_owned()).spawn(move || {
            let _ = clock.send(CpuClock::own());
            rank.take_on();
            hash(&given, &shared, &clerk);
        })?;
        let clock = told.recv().map_err(io::Error::other)??;
        Ok(Desk { jobs, found, clock, at: None })
    }

    /// Has it hash this.
    pub fn take(&mut self, job: Arc<Job>) {
        self.at = Some(At {
            job: job.clone(),
            since: Instant::now(),
            cpu: self.clock.time(),
            starved: false,
            handed_on: false,
        });
        // The thread ends after this, and not before.
        let _ = self.jobs.send(job);
    }

    /// Whether it is at a password.
    pub fn is_busy(&self) -> bool {
        self.at.is_some()
    }

    /// What it has found, if it has since it was asked last: it is free then.
    pub fn found(&mut self) -> Option<(Arc<Job>, bool)> {
        let right = match self.found.0.swap(NOTHING, Ordering::Acquire) {
            NOTHING => return None,
            found => found == RIGHT,
        };
        self.at.take().map(|at| (at.job, right))
    }

    /// Whether it gets too little CPU time for what it is at; it is so until that is done.
    pub fn is_starved(&mut self) -> bool {
        let Some(at) = &mut self.at else { return false };
        at.starved = at.starved || starved(at.since.elapsed(), self.clock.time().saturating_sub(at.cpu));
        at.starved
    }

    /// What it is at, to be hashed by somebody else as well; once.
    pub fn hand_on(&mut self) -> Option<Arc<Job>> {
        let at = self.at.as_mut().filter(|at| !at.handed_on)?;
        at.handed_on = true;
        Some(at.job.clone())
    }
}

/// Whether a thread that wanted the CPU for all of this time, and got so much of it, is starved.
fn starved(time: Duration, cpu: Duration) -> bool {
    time >= STARVED_AFTER && cpu * STARVED_PART < time
}

/// Shares no lock with a worker.
fn hash(given: &Receiver<Arc<Job>>, found: &Found, clerk: &Thread) {
    while let Ok(job) = given.recv() {
        found.0.store(if job.is_right() { RIGHT } else { WRONG }, Ordering::Release);
        clerk.unpark();
    }
}

impl Rank {
    /// Makes it the rank of the thread that calls this.
    fn take_on(self) {
        let patient = self == Rank::Patient && is_left_over();
        if !patient {
            // SAFETY: a call without pointers; of the thread that calls it, which has no other use. On Linux `0` is the
            // thread, and not the process.
            let _ = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
        }
    }
}

/// Has the thread that calls this get only CPU time that is left over; whether the system allows that.
fn is_left_over() -> bool {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the structure lives until the call returns. On Linux `0` is the thread. Not by `sched_setscheduler`,
    // which some libraries do not have.
    unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, libc::SCHED_IDLE, &raw const parameters) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_gets_next_to_no_time_is_starved_and_one_that_takes_long_is_not() {
        let ms = Duration::from_millis;
        assert!(!starved(ms(499), ms(0)), "it may have to wait for a moment");
        assert!(starved(ms(500), ms(124)));
        assert!(!starved(ms(500), ms(125)));
        assert!(!starved(ms(4_000), ms(3_900)), "its hash is dear");
    }
}
