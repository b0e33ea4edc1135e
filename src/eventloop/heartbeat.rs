//! The heartbeat: a thread outside the runtimes probes every worker and finds the late ones.
//!
//! Each worker runs a task that only answers probes. The time to answer is the lag: how late a ready task ran. The
//! probing thread uses no runtime, so it continues when all workers are blocked. If the whole process was suspended,
//! no worker counts as stalled, but the delay of the next round is part of the lag of each. [`Pauses`] records when a
//! worker or the process did not run, for the limits of other parties. Tokio's timers are too coarse for this: they
//! count whole milliseconds and are late by one or two.
//!
//! A worker is late because of its own work, or because it waits for a core. The CPU time that it used before the
//! answer tells them apart ([`Busy`]).
//!
//! `scheduler` measures the rounds of the loop itself while it hands out turns: it needs each of them, many per
//! millisecond, and a probe every ten is too slow for that.

use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::{Duration, Instant};

use futures::task::AtomicWaker;

use super::cpu::CpuClock;
use super::stall::{News, Sample, Watch};
use super::worker::{Worker, here, nanos};
use crate::metrics::LoopMetrics;
use crate::party::pauses::{PAUSE_LEAST, Pauses};

/// A probe and its answer. Times are nanoseconds since the epoch.
pub(super) struct Pulse {
    epoch: Instant,
    asked: AtomicU64,
    /// The last `asked` value that was answered.
    answered: AtomicU64,
    /// The time of the answer.
    at: AtomicU64,
    /// The worker that answered.
    by: AtomicUsize,
    busy: Busy,
    waker: AtomicWaker,
}

/// The CPU time of the thread that answers. Only for a runtime with one thread.
#[derive(Default)]
struct Busy {
    clock: OnceLock<Option<CpuClock>>,
    /// At the time of the probe, and of the answer, in nanoseconds.
    asked: AtomicU64,
    answered: AtomicU64,
}

impl Busy {
    /// Called by the thread that probes.
    fn ask(&self) {
        if let Some(Some(clock)) = self.clock.get() {
            self.asked.store(nanos(clock.time()), Ordering::Relaxed);
        }
    }

    /// Called by the thread that answers.
    fn answer(&self) {
        if let Some(clock) = self.clock.get_or_init(|| CpuClock::own().ok()) {
            self.answered.store(nanos(clock.time()), Ordering::Relaxed);
        }
    }

    /// The CPU time between the two. `None`: the clock was not known yet.
    fn time(&self) -> Option<Duration> {
        let [asked, answered] = [&self.asked, &self.answered].map(|time| time.load(Ordering::Relaxed));
        (asked > 0).then(|| Duration::from_nanos(answered.saturating_sub(asked)))
    }
}

impl Pulse {
    pub(super) fn new(epoch: Instant) -> Arc<Self> {
        let zero = || AtomicU64::new(0);
        let (asked, answered, at, by) = (zero(), zero(), zero(), AtomicUsize::new(0));
        Arc::new(Pulse { epoch, asked, answered, at, by, busy: Busy::default(), waker: AtomicWaker::new() })
    }

    /// Answers probes as long as its runtime lives.
    pub(super) async fn beat(self: Arc<Self>) {
        // From now on, waits on this thread know its pauses, also those before the first probe.
        let _ = here();
        poll_fn(|cx| {
            self.waker.register(cx.waker());
            let asked = self.asked.load(Ordering::Acquire);
            if asked != self.answered.load(Ordering::Relaxed) {
                self.by.store(here().map_or(0, |worker| worker.index), Ordering::Relaxed);
                self.at.store(nanos(self.epoch.elapsed()), Ordering::Relaxed);
                self.busy.answer();
                self.answered.store(asked, Ordering::Release);
            }
            Poll::<()>::Pending
        })
        .await;
    }

    fn ask(&self, now: Duration) {
        self.busy.ask();
        self.asked.store(nanos(now).max(1), Ordering::Release);
        self.waker.wake();
    }

    fn state(&self, now: Duration) -> ProbeState {
        let asked = self.asked.load(Ordering::Relaxed);
        if self.answered.load(Ordering::Acquire) != asked {
            return ProbeState::Awaited(Duration::from_nanos(nanos(now).saturating_sub(asked)));
        }
        let lag = Duration::from_nanos(self.at.load(Ordering::Relaxed).saturating_sub(asked));
        let at = self.epoch + Duration::from_nanos(self.at.load(Ordering::Relaxed));
        ProbeState::Came { lag, at, by: self.by.load(Ordering::Relaxed), first: asked == 0 }
    }
}

enum ProbeState {
    /// No answer yet, for this time.
    Awaited(Duration),
    /// Answered after `lag`, at `at`, by the worker of this number. `first`: the first answer, with no probe before.
    Came { lag: Duration, at: Instant, by: usize, first: bool },
}

/// The probing thread.
pub(super) struct Pacemaker {
    pub(super) epoch: Instant,
    pub(super) period: Duration,
    pub(super) pulses: Vec<Arc<Pulse>>,
    pub(super) workers: Vec<&'static Worker>,
    /// Whether the workers share their tasks. An answer then does not belong to a specific worker.
    pub(super) shared: bool,
    pub(super) metrics: LoopMetrics,
    pub(super) watches: Vec<Watch>,
    /// Total lag of each worker in stalls that have ended.
    pub(super) lags: Vec<Duration>,
    /// When the next round is due.
    pub(super) due: Instant,
}

impl Drop for Pacemaker {
    fn drop(&mut self) {
        self.workers.iter().for_each(|worker| worker.expect_round(None));
        Pauses::of_process().expect_round(None);
    }
}

impl Pacemaker {
    /// Reports when the next round is due. If the process is suspended at that time, it knows that before the heartbeat
    /// records it.
    pub(super) fn expect_round(&self) {
        self.workers.iter().for_each(|worker| worker.expect_round(Some(self.due)));
        Pauses::of_process().expect_round(Some(self.due));
    }

    /// Probes until `stop` is dropped.
    pub(super) fn run(mut self, stop: &Receiver<()>) {
        while stop.recv_timeout(self.period) == Err(RecvTimeoutError::Timeout) {
            self.round();
        }
        self.metrics.stalled.set(0);
    }

    fn round(&mut self) {
        let instant = Instant::now();
        self.count_delay(instant);
        let now = instant - self.epoch;
        // For each pulse, how long its answer is overdue.
        let mut late = vec![Duration::ZERO; self.pulses.len()];
        for (place, pulse) in self.pulses.iter().enumerate() {
            match pulse.state(now) {
                ProbeState::Awaited(time) => {
                    late[place] = time;
                    self.lags(place, time);
                    self.paused(place, instant - time, instant);
                }
                ProbeState::Came { lag, at, by, first } => {
                    if !first {
                        self.metrics.lag[by.min(self.metrics.lag.len() - 1)].observe(lag.as_secs_f64());
                    }
                    if !self.shared {
                        if let Some(busy) = pulse.busy.time().filter(|_| !first) {
                            self.metrics.lag_busy[place].observe(busy.as_secs_f64());
                        }
                        self.watches[place].came(lag);
                        self.lags[place] = self.lags(place, lag);
                        self.paused(place, at - lag, at);
                    }
                    pulse.ask(now);
                }
            }
        }
        for (place, sample) in self.samples(&late, instant).into_iter().enumerate() {
            if let Some(news) = self.watches[place].take(sample, now) {
                self.tell(place, news);
            }
        }
        let stalled = self.watches.iter().filter(|watch| watch.is_stalled()).count();
        self.metrics.stalled.set(stalled as i64);
    }

    /// Adds the delay of this round to the lag of each worker: for this time the process was suspended or had no CPU.
    fn count_delay(&mut self, now: Instant) {
        let was_due = std::mem::replace(&mut self.due, now + self.period);
        let delay = Some(now.saturating_duration_since(was_due)).filter(|&delay| delay >= PAUSE_LEAST);
        for (lag, worker) in self.lags.iter_mut().zip(&self.workers) {
            if let Some(delay) = delay {
                *lag += delay;
                worker.set_lag(*lag);
                worker.pauses.add(was_due, now);
            }
        }
        if delay.is_some() {
            Pauses::of_process().add(was_due, now);
        }
        self.expect_round();
    }

    /// Publishes the total lag of a worker, including the current stall.
    fn lags(&self, place: usize, present: Duration) -> Duration {
        let present = if present < PAUSE_LEAST { Duration::ZERO } else { present };
        let lag = self.lags[place] + present;
        if !self.shared && !present.is_zero() {
            self.workers[place].set_lag(lag);
        }
        lag
    }

    /// Records a pause of a worker; it may not be over yet.
    fn paused(&self, place: usize, begin: Instant, end: Instant) {
        if !self.shared && end.saturating_duration_since(begin) >= PAUSE_LEAST {
            self.workers[place].pauses.add(begin, end);
        }
    }

    /// The state of each worker; if they share tasks, also one state for all of them together.
    fn samples(&self, late: &[Duration], now: Instant) -> Vec<Sample> {
        let doing = self.workers.iter().map(|worker| worker.doing(now));
        if !self.shared {
            return doing.zip(late).map(|(doing, &late)| Sample { late, doing }).collect();
        }
        // No answer belongs to a single worker. An exchange that blocks a worker is visible in its record; if there
        // is none and still no answer, all workers are late together.
        let each = doing.map(|doing| Sample { late: doing.map_or(Duration::ZERO, |(_, time)| time), doing });
        let mut samples: Vec<Sample> = each.collect();
        let all = late.iter().copied().min().unwrap_or_default();
        let explained = samples.iter().any(|sample| sample.late * 2 >= all);
        samples.push(Sample { late: if explained { Duration::ZERO } else { all }, doing: None });
        samples
    }

    fn tell(&self, place: usize, news: News) {
        let worker = if place < self.workers.len() { place.to_string() } else { "all".to_owned() };
        match news {
            News::Begins(stall) => {
                let spot = stall.place();
                self.metrics.stalls(spot).inc();
                let Some(untold) = stall.untold else { return };
                let route = stall.activity.route();
                let route = route.as_deref().unwrap_or("-");
                let (lasted, untold) = (stall.lasted, (untold > 0).then_some(untold));
                let why = if stall.is_crowd() {
                    "many short tasks, or one that is not an exchange, block it"
                } else {
                    "all others on it wait meanwhile: blocking work belongs on another thread"
                };
                tracing::warn!(worker, "where" = spot, route, ?lasted, untold, "a worker is stalled: {why}");
            }
            News::Ends(stall) if stall.untold.is_some() => {
                tracing::warn!(worker, "where" = stall.place(), lasted = ?stall.lasted, "the worker goes on");
            }
            News::Ends(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_work_of_a_worker_is_told_from_its_wait_for_a_core() {
        const WORK: Duration = Duration::from_millis(20);
        let (busy, clock) = (Busy::default(), CpuClock::own().unwrap());
        busy.ask();
        busy.answer();
        assert_eq!(busy.time(), None, "the clock was not known when it was asked");
        busy.ask();
        let begun = clock.time();
        while clock.time() < begun + WORK {
            std::hint::spin_loop();
        }
        busy.answer();
        assert!(busy.time() >= Some(WORK), "{:?}", busy.time());
        busy.ask();
        busy.answer();
        assert!(busy.time() < Some(WORK), "{:?}", busy.time());
    }
}
