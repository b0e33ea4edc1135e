//! Metrics of the workers' event loops: the time that Forebay spends on each exchange, what runs on each worker and
//! for how long, and what stalls it.
//!
//! An exchange mostly waits for the client or its upstream. Its own time is the time in which its future is polled;
//! it is measured at that future ([`Metered`]), not derived from phases. [`worker`] records what is polled,
//! [`runtime`] reads tokio's figures, `heartbeat` finds late workers, [`stall`] decides. [`Loops`] combines them.

pub mod cpu;
mod heartbeat;
pub mod runtime;
pub mod stall;
pub mod worker;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use prometheus::Histogram;
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::time::Sleep;

use crate::metrics::Metrics;
use crate::phase::Phase;
use heartbeat::{Pacemaker, Pulse};
use runtime::{LoopCollector, LoopFigures, Runtime, Runtimes};
use stall::Watch;
use worker::{Spot, Word, Worker};

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
            worker::enrol(handle.id(), all[first..].to_vec());
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

thread_local! {
    /// Now minus the own time of the exchange that this thread polls: its start, had it never waited.
    static POLLED_SINCE: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Decides whether an exchange may be polled. Whoever closes a gate does the work that is due meanwhile, and
/// registers the waker that opens it again.
pub trait Gate: Send + Sync {
    /// Ready: the exchange may continue.
    fn poll_open(&self, cx: &mut Context<'_>, now: Instant) -> Poll<()>;

    /// Reports that the exchange was polled for this time.
    fn polled(&self, time: Duration);

    /// The exchange is pending. Registers a wake-up for its deadline.
    fn waits(&self, cx: &mut Context<'_>);

    /// The gateway stops: the exchange must end, and may still tell its client why.
    fn stop(&self);

    /// If the exchange must end regardless of what it waits for: the time it still has to end by itself.
    fn last_words(&self) -> Option<Duration>;
}

/// How long an abandoned exchange may take to end by itself: to tell its client, or to release its endpoint.
pub const LAST_WORDS: Duration = Duration::from_millis(500);

/// The exchange had to end and did not do so in time: its future must be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GivenUp;

thread_local! {
    /// The gate that the currently polled exchange has just set up.
    static ADOPTED: RefCell<Option<Arc<dyn Gate>>> = const { RefCell::new(None) };
}

/// Puts a gate in front of the exchange on this thread. No effect outside a [`Metered`] future.
pub fn adopt(gate: Arc<dyn Gate>) {
    ADOPTED.set(Some(gate));
}

/// The future of an exchange: its polls are timed, and its gate is asked before each. Code inside it calls
/// [`own_time`].
///
/// An abandoned exchange gets a moment to end by itself ([`LAST_WORDS`]). If it does not, because only dropping it
/// cancels what it waits for, the result is [`GivenUp`], and the caller drops it.
pub struct Metered<F> {
    /// `None` after it was dropped.
    future: Option<F>,
    spent: Duration,
    gate: Option<Arc<dyn Gate>>,
    /// Its place when it was last polled.
    at: Word,
    stopped: bool,
    /// The timer that starts when it is abandoned.
    last_words: Option<Pin<Box<Sleep>>>,
}

impl<F> Metered<F> {
    /// Times the polls of `future`.
    pub fn new(future: F) -> Self {
        let (gate, at) = (None, Word::at(Spot::phase(Phase::Header)));
        Metered { future: Some(future), spent: Duration::ZERO, gate, at, stopped: false, last_words: None }
    }

    /// The gateway stops: the exchange must end. Poll it again afterwards.
    pub fn stop(&mut self) {
        self.stopped = true;
        if let Some(gate) = &self.gate {
            gate.stop();
        }
    }

    /// Drops the future and counts the clean-up as part of the exchange.
    pub fn end(&mut self, end: impl FnOnce(Option<F>)) {
        let future = self.future.take();
        self.measured(Instant::now(), |_| end(future));
    }

    /// Counts the time of `work` as part of the exchange.
    fn measured<T>(&mut self, begin: Instant, work: impl FnOnce(&mut Self) -> T) -> T {
        let worker = worker::here().map(|worker| (worker, worker.begin(self.at, begin)));
        let outer = POLLED_SINCE.replace(begin.checked_sub(self.spent));
        let done = work(self);
        POLLED_SINCE.set(outer);
        if let Some((worker, outer)) = worker {
            self.at = worker.end(outer);
        }
        done
    }

    /// Ready when it is abandoned and its time to end is over.
    fn poll_last_words(&mut self, cx: &mut Context<'_>) -> Poll<GivenUp> {
        let gate = self.gate.as_ref().and_then(|gate| gate.last_words());
        let Some(left) = gate.or(self.stopped.then_some(LAST_WORDS)) else { return Poll::Pending };
        let last_words = self.last_words.get_or_insert_with(|| Box::pin(tokio::time::sleep(left)));
        last_words.as_mut().poll(cx).map(|()| GivenUp)
    }
}

impl<F: Future + Unpin> Future for Metered<F> {
    type Output = Result<F::Output, GivenUp>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let begin = Instant::now();
        let closed = self.gate.as_ref().is_some_and(|gate| gate.poll_open(cx, begin).is_pending());
        if closed {
            self.spent += begin.elapsed();
            return self.poll_last_words(cx).map(Err);
        }
        let polled = self.measured(begin, |own| match &mut own.future {
            Some(future) => Pin::new(future).poll(cx),
            None => Poll::Pending,
        });
        if let Some(gate) = ADOPTED.take() {
            if self.stopped {
                gate.stop();
                cx.waker().wake_by_ref();
            }
            self.gate = Some(gate);
        }
        let time = begin.elapsed();
        if let Some(gate) = &self.gate {
            gate.polled(time);
            if polled.is_pending() {
                gate.waits(cx);
            }
        }
        self.spent += time;
        match polled {
            Poll::Ready(ended) => Poll::Ready(Ok(ended)),
            Poll::Pending => self.poll_last_words(cx).map(Err),
        }
    }
}

/// The summed time of the polls of the exchange on this thread, including the current one. Zero outside a
/// [`Metered`] future.
pub fn own_time(now: Instant) -> Duration {
    POLLED_SINCE.get().map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
}

/// A filter as seen by the event loop: its label, and the histogram for its poll times.
#[derive(Clone)]
pub struct Watched {
    spot: Spot,
    seconds: Option<Histogram>,
}

impl Watched {
    /// A filter with this key or label, without timing.
    pub fn untimed(label: &str) -> Self {
        Watched { spot: Spot::filter(label), seconds: None }
    }

    /// The label.
    pub fn label(&self) -> &'static str {
        self.spot.name()
    }

    /// Observes poll times in this histogram.
    pub fn time(&mut self, seconds: Histogram) {
        self.seconds = Some(seconds);
    }

    /// Runs a call of the filter.
    pub fn call<T>(&self, call: impl FnOnce() -> T) -> T {
        let begin = self.seconds.as_ref().map(|seconds| (seconds, Instant::now()));
        let done = worker::at(self.spot, call);
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
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const TERMS: Terms = Terms { stall_threshold: Duration::from_millis(100), heartbeat: Duration::from_millis(5) };

    /// Adds the event loop of an idle runtime.
    pub(crate) fn attach(metrics: &Metrics) -> Loops {
        let loops = Loops::new(metrics, TERMS);
        let runtime = current_thread();
        loops.attach(1, || runtime.handle().clone());
        loops
    }

    fn current_thread() -> tokio::runtime::Runtime {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        #[cfg(tokio_unstable)]
        builder.enable_metrics_poll_time_histogram();
        builder.enable_all().build().unwrap()
    }

    fn busy(time: Duration) {
        let begin = Instant::now();
        while begin.elapsed() < time {
            std::hint::spin_loop();
        }
    }

    #[tokio::test]
    async fn work_counts_and_waiting_does_not() {
        let exchange = async {
            busy(Duration::from_millis(5));
            tokio::time::sleep(Duration::from_millis(100)).await;
            busy(Duration::from_millis(5));
            own_time(Instant::now())
        };
        let own = Metered::new(Box::pin(exchange)).await.expect("nobody gives it up");
        assert!(own >= Duration::from_millis(10), "{own:?}");
        assert!(own < Duration::from_millis(90), "{own:?}");
        assert_eq!(own_time(Instant::now()), Duration::ZERO);
    }

    /// Ends when stopped, or ignores the stop.
    #[derive(Default)]
    struct Ending {
        listens: bool,
        told: AtomicBool,
    }

    impl Gate for Ending {
        fn poll_open(&self, _: &mut Context<'_>, _: Instant) -> Poll<()> {
            Poll::Ready(())
        }

        fn polled(&self, _: Duration) {}

        fn waits(&self, _: &mut Context<'_>) {}

        fn stop(&self) {
            self.told.store(true, Ordering::Relaxed);
        }

        fn last_words(&self) -> Option<Duration> {
            self.told.load(Ordering::Relaxed).then_some(LAST_WORDS)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_exchange_that_is_given_up_may_end_by_itself_and_else_is_over_a_moment_later() {
        let gate = |listens| Some(Arc::new(Ending { listens, ..Ending::default() }));
        for (gate, expected, after) in [
            (gate(true), Ok("ended well"), Duration::ZERO),
            (gate(false), Err(GivenUp), LAST_WORDS),
            (None, Err(GivenUp), LAST_WORDS),
        ] {
            let mut exchange = Metered::new(Box::pin(async move {
                if let Some(gate) = &gate {
                    adopt(gate.clone());
                }
                let listens = gate.as_ref().filter(|gate| gate.listens);
                std::future::poll_fn(|_| match listens {
                    Some(gate) if gate.last_words().is_some() => Poll::Ready("ended well"),
                    _ => Poll::Pending,
                })
                .await
            }));
            assert!(tokio::time::timeout(Duration::from_secs(60), &mut exchange).await.is_err(), "it waits");
            exchange.stop();
            let begin = tokio::time::Instant::now();
            assert_eq!((&mut exchange).await, expected);
            assert!(begin.elapsed() >= after && begin.elapsed() < after + Duration::from_millis(10));
            exchange.end(|future| assert!(future.is_some()));
        }
    }
}
