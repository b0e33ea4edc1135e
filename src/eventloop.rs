//! Metrics of the workers' event loops: what runs on each worker and for how long, and what stalls it.
//!
//! [`worker`] records what is polled, [`runtime`] reads tokio's figures, `heartbeat` finds late workers, [`stall`]
//! decides. [`Loops`] combines them. Which exchange may be polled is the decision of [`crate::scheduler`].

pub mod cpu;
mod heartbeat;
pub mod runtime;
pub mod stall;
pub mod worker;

use std::future::Future;
use std::pin::Pin;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use prometheus::Histogram;
use tokio::runtime::{Handle, RuntimeFlavor};

use crate::metrics::Metrics;
use heartbeat::{Pacemaker, Pulse};
use runtime::{LoopCollector, LoopFigures, Runtime, Runtimes};
use stall::Watch;
use worker::{PhaseOrFilter, Worker};

/// Settings of the monitoring.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// A worker that is late by more than this is stalled.
    pub stall_threshold: Duration,
    /// The probing interval.
    pub heartbeat: Duration,
}

/// The event loops of all workers of one gateway. Clones share them.
#[derive(Clone)]
pub struct Loops(Arc<Inner>);

struct Inner {
    metrics: Metrics,
    terms: Terms,
    runtimes: Arc<Runtimes>,
    watching: Mutex<Option<Watching>>,
}

/// The thread that probes the workers.
struct Watching {
    /// Dropping it stops the thread.
    stop: SyncSender<()>,
    thread: JoinHandle<()>,
    workers: Vec<&'static Worker>,
}

impl Loops {
    /// No workers yet; those found later are reported to these metrics.
    pub fn new(metrics: &Metrics, terms: Terms) -> Self {
        let runtimes = Runtimes::new();
        metrics.collect_too(Box::new(LoopCollector::new(runtimes.clone())));
        Loops(Arc::new(Inner { metrics: metrics.clone(), terms, runtimes, watching: Mutex::new(None) }))
    }

    /// Finds this many workers, idle ones included, and starts to monitor them. `handle` returns the runtime of any
    /// worker: without work stealing each has its own, and Pingora picks one at random.
    pub fn attach(&self, workers: usize, mut handle: impl FnMut() -> Handle) {
        let mut handles: Vec<Handle> = Vec::new();
        // A draw misses a given one of n with 1 - 1/n: after n × 40 draws, one is missing in 10^17 starts.
        for _ in 0..workers.saturating_mul(40) {
            let drawn = handle();
            if handles.iter().all(|known| known.id() != drawn.id()) {
                handles.push(drawn);
            }
            if handles.len() == workers || handles[0].runtime_flavor() != RuntimeFlavor::CurrentThread {
                break;
            }
        }
        let shared = handles.first().is_some_and(|handle| handle.runtime_flavor() != RuntimeFlavor::CurrentThread);
        if !shared && handles.len() < workers {
            tracing::warn!(workers, found = handles.len(), "not all workers were found; the others are not monitored");
        }
        let epoch = Instant::now();
        let (mut all, mut pulses) = (Vec::new(), Vec::new());
        for handle in &handles {
            let threads = if shared { handle.metrics().num_workers() } else { 1 };
            let first = all.len();
            // Threads write to it as long as they live. There are as many as workers, and they end with the
            // process.
            all.extend((0..threads).map(|place| &*Box::leak(Box::new(Worker::new(first + place, place, epoch)))));
            worker::register(handle.id(), all[first..].to_vec());
            self.0.runtimes.add(Runtime::new(handle, &all[first..], epoch));
            for _ in 0..threads {
                let pulse = Pulse::new(epoch);
                handle.spawn(pulse.clone().beat());
                pulses.push(pulse);
            }
        }
        // One more watch if workers share their tasks: it is for all of them together.
        let watches = (0..all.len() + usize::from(shared)).map(|_| Watch::new(self.0.terms.stall_threshold)).collect();
        let metrics = self.0.metrics.loops(all.len());
        let period = self.0.terms.heartbeat;
        let lags = vec![Duration::ZERO; all.len()];
        let due = Instant::now() + period;
        let pacemaker = Pacemaker { epoch, period, pulses, workers: all.clone(), shared, metrics, watches, lags, due };
        pacemaker.expect_round();
        let (stop, stopped) = sync_channel(0);
        match std::thread::Builder::new().name("heartbeat".to_owned()).spawn(move || pacemaker.run(&stopped)) {
            Ok(thread) => *self.watching() = Some(Watching { stop, thread, workers: all }),
            Err(error) => tracing::error!(%error, "no thread for the heartbeat: stalls will not be noticed"),
        }
    }

    /// The figures of all event loops, worker by worker.
    pub fn figures(&self) -> Vec<LoopFigures> {
        self.0.runtimes.figures(Instant::now())
    }

    /// Stops the heartbeat.
    pub fn stop(&self) {
        let Some(Watching { stop, thread, workers }) = self.watching().take() else { return };
        drop(stop);
        worker::dismiss(&workers);
        if thread.join().is_err() {
            tracing::error!("the heartbeat had failed");
        }
    }

    /// Locked only at start and end.
    fn watching(&self) -> std::sync::MutexGuard<'_, Option<Watching>> {
        self.0.watching.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A filter as seen by the event loop: its label, and the histogram for its poll times.
#[derive(Clone)]
pub struct Watched {
    place: PhaseOrFilter,
    seconds: Option<Histogram>,
}

impl Watched {
    /// A filter with this key or label, without timing.
    pub fn untimed(label: &str) -> Self {
        Watched { place: PhaseOrFilter::filter(label), seconds: None }
    }

    /// The label.
    pub fn label(&self) -> &'static str {
        self.place.name()
    }

    /// Observes poll times in this histogram.
    pub fn time(&mut self, seconds: Histogram) {
        self.seconds = Some(seconds);
    }

    /// Runs a call of the filter.
    pub fn call<T>(&self, call: impl FnOnce() -> T) -> T {
        let begin = self.seconds.as_ref().map(|seconds| (seconds, Instant::now()));
        let done = worker::at(self.place, call);
        if let Some((seconds, begin)) = begin {
            seconds.observe(begin.elapsed().as_secs_f64());
        }
        done
    }

    /// Polls a future of the filter.
    pub async fn run<F: Future + Unpin>(&self, mut future: F) -> F::Output {
        std::future::poll_fn(|cx| self.call(|| Pin::new(&mut future).poll(cx))).await
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::party::pauses::paused;

    const TERMS: Terms = Terms { stall_threshold: Duration::from_millis(100), heartbeat: Duration::from_millis(5) };

    /// Adds the event loop of an idle runtime.
    pub(crate) fn attach(metrics: &Metrics) -> Loops {
        let loops = Loops::new(metrics, TERMS);
        let runtime = current_thread();
        loops.attach(1, || runtime.handle().clone());
        loops
    }

    #[test]
    fn a_process_that_is_suspended_before_the_first_heartbeat_knows_it() {
        const HOUR: Duration = Duration::from_secs(3600);
        let (runtime, metrics) = (current_thread(), Metrics::new(u64::MAX, Vec::new()));
        let loops = Loops::new(&metrics, Terms { heartbeat: HOUR, ..TERMS });
        loops.attach(1, || runtime.handle().clone());
        let worker = loops.watching().as_ref().map(|watching| watching.workers[0]).unwrap();
        let later = Instant::now() + 3 * HOUR;
        let overdue = worker.pauses.overdue(later);
        assert!(overdue >= 2 * HOUR && overdue < 3 * HOUR, "{overdue:?}");
        loops.stop();
        assert_eq!(worker.pauses.overdue(later), Duration::ZERO, "there is none any more");
    }

    #[test]
    fn a_worker_has_its_own_pauses_before_it_answers_the_first_probe() {
        let (runtime, metrics) = (current_thread(), Metrics::new(u64::MAX, Vec::new()));
        let loops = Loops::new(&metrics, Terms { heartbeat: Duration::from_secs(3600), ..TERMS });
        loops.attach(1, || runtime.handle().clone());
        let worker = loops.watching().as_ref().map(|watching| watching.workers[0]).unwrap();
        let now = Instant::now() + Duration::from_secs(60);
        let since = now - Duration::from_secs(50);
        worker.pauses.add(since + Duration::from_secs(10), since + Duration::from_secs(30));
        // A task that polls nothing of an exchange.
        let paused = runtime.block_on(runtime.spawn(async move { paused(since, now, None) })).unwrap();
        assert_eq!(paused, Duration::from_secs(20));
        loops.stop();
    }

    fn current_thread() -> tokio::runtime::Runtime {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        #[cfg(tokio_unstable)]
        builder.enable_metrics_poll_time_histogram();
        builder.enable_all().build().unwrap()
    }
}
