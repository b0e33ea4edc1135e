//! Tokio's figures of the workers' event loops, read on demand.
//!
//! The workers publish their own counters, so a scrape does not disturb them. They publish before each wait and
//! after every 61 tasks, so the current poll is not included; the time of an exchange that is being polled is added
//! here. Figures that need `tokio_unstable` are missing without it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use serde::Serialize;
use tokio::runtime::{Handle, RuntimeMetrics};

use super::worker::Worker;
use crate::metrics::family::{self, Family};

/// The first bound of the poll times, in microseconds. Tokio rounds up to a power of two of nanoseconds and doubles
/// it from there. [`family::LOOP_POLL`] has the same bounds.
pub const POLL_TIME_FIRST_MICROS: u64 = 32;
/// Number of buckets: the bounds, and one for everything above.
pub const POLL_TIME_BUCKETS: usize = family::POLL_TIMES.len() + 1;

/// What one worker's loop has done so far, and its state. `None`: unknown, because the worker shares its runtime,
/// or the build lacks `tokio_unstable`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LoopFigures {
    /// Its number, from 0; `all` for figures of a shared runtime.
    pub worker: String,
    /// Seconds in which it waited for events.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wait_seconds: Option<f64>,
    /// Seconds in which it worked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub busy_seconds: Option<f64>,
    /// Number of waits that ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wakeups: Option<u64>,
    /// Number of ready I/O events.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_events: Option<u64>,
    /// Polls of tasks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub polls: Option<u64>,
    /// Polls by duration, in the buckets of `forebay_loop_poll_seconds`.
    #[serde(skip)]
    pub poll_times: Option<Vec<u64>>,
    /// Number of tasks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tasks: Option<u64>,
    /// Number of tasks that are ready to be polled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_queue: Option<u64>,
    /// Number of registered I/O sources.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub descriptors: Option<u64>,
    /// The exchange that is being polled now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub doing: Option<Doing>,
}

/// What a worker is doing now.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Doing {
    /// The phase, or the filter that runs in it.
    #[serde(rename = "where")]
    pub place: &'static str,
    /// The route, if one is chosen yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    /// Duration of this poll so far.
    pub seconds: f64,
}

/// The runtimes of one gateway that were found so far.
pub(super) struct Runtimes(Mutex<Vec<Runtime>>);

/// One tokio runtime: it has all workers with work stealing, else one.
pub(super) struct Runtime {
    metrics: RuntimeMetrics,
    workers: Vec<Known>,
}

struct Known {
    worker: &'static Worker,
    /// When it was found, and its busy time at that moment.
    since: Instant,
    busy_before: Duration,
    /// The last reported values: neither may decrease.
    busy: Duration,
    wait: Duration,
}

impl Runtime {
    pub(super) fn new(handle: &Handle, workers: &[&'static Worker], now: Instant) -> Self {
        let metrics = handle.metrics();
        let known = |(place, &worker): (usize, &&'static Worker)| Known {
            worker,
            since: now,
            busy_before: metrics.worker_total_busy_duration(place),
            busy: Duration::ZERO,
            wait: Duration::ZERO,
        };
        Runtime { workers: workers.iter().enumerate().map(known).collect(), metrics }
    }

    /// One row per worker, and one for shared figures if there are several.
    fn figures(&mut self, now: Instant, rows: &mut Vec<LoopFigures>) {
        let common = self.common();
        let alone = self.workers.len() == 1;
        for (place, known) in self.workers.iter_mut().enumerate() {
            let (busy, wait) = known.times(self.metrics.worker_total_busy_duration(place), now);
            let shared = if alone { common.clone() } else { LoopFigures::default() };
            let own = LoopFigures {
                worker: known.worker.index.to_string(),
                wait_seconds: Some(wait.as_secs_f64()),
                busy_seconds: Some(busy.as_secs_f64()),
                wakeups: Some(self.metrics.worker_park_count(place)),
                doing: known.worker.doing(now).map(|(activity, time)| Doing {
                    place: activity.place().name(),
                    route: activity.route().map(|route| route.to_string()),
                    seconds: time.as_secs_f64(),
                }),
                ..shared
            };
            rows.push(unstable::add(own, &self.metrics, place));
        }
        if !alone {
            rows.push(common);
        }
    }

    /// The figures of the runtime as a whole.
    fn common(&self) -> LoopFigures {
        let metrics = &self.metrics;
        let common = LoopFigures {
            worker: "all".to_owned(),
            tasks: Some(metrics.num_alive_tasks() as u64),
            run_queue: Some(metrics.global_queue_depth() as u64),
            ..LoopFigures::default()
        };
        unstable::add_common(common, metrics)
    }
}

impl Known {
    /// Its busy and waiting time. `total` is tokio's count, read before the current poll, so it does not include an
    /// unfinished one.
    fn times(&mut self, total: Duration, now: Instant) -> (Duration, Duration) {
        let polled = self.worker.doing(now).map_or(Duration::ZERO, |(_, time)| time);
        let all = now.saturating_duration_since(self.since);
        self.busy = self.busy.max((total + polled).saturating_sub(self.busy_before));
        self.wait = self.wait.max(all.saturating_sub(self.busy));
        (self.busy, self.wait)
    }
}

#[cfg(tokio_unstable)]
mod unstable {
    use super::{LoopFigures, RuntimeMetrics};

    /// Adds tokio's figures of one worker. If the row is also the runtime's, adds the queue of the runtime.
    pub(super) fn add(row: LoopFigures, metrics: &RuntimeMetrics, place: usize) -> LoopFigures {
        let buckets = metrics.poll_time_histogram_num_buckets();
        let queue = metrics.worker_local_queue_depth(place) as u64;
        LoopFigures {
            polls: Some(metrics.worker_poll_count(place)),
            poll_times: metrics
                .poll_time_histogram_enabled()
                .then(|| (0..buckets).map(|bucket| metrics.poll_time_histogram_bucket_count(place, bucket)).collect()),
            run_queue: Some(queue + row.run_queue.unwrap_or(0)),
            ..row
        }
    }

    /// Adds the figures of the I/O driver that a runtime's workers share.
    pub(super) fn add_common(row: LoopFigures, metrics: &RuntimeMetrics) -> LoopFigures {
        let gone = metrics.io_driver_fd_deregistered_count();
        LoopFigures {
            ready_events: Some(metrics.io_driver_ready_count()),
            descriptors: Some(metrics.io_driver_fd_registered_count().saturating_sub(gone)),
            ..row
        }
    }
}

#[cfg(not(tokio_unstable))]
mod unstable {
    use super::{LoopFigures, RuntimeMetrics};

    pub(super) fn add(row: LoopFigures, _: &RuntimeMetrics, _: usize) -> LoopFigures {
        row
    }

    pub(super) fn add_common(row: LoopFigures, _: &RuntimeMetrics) -> LoopFigures {
        row
    }
}

impl Runtimes {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Runtimes(Mutex::default()))
    }

    pub(super) fn add(&self, runtime: Runtime) {
        self.lock().push(runtime);
    }

    /// All workers by number, then the shared figures.
    pub(super) fn figures(&self, now: Instant) -> Vec<LoopFigures> {
        let mut rows = Vec::new();
        self.lock().iter_mut().for_each(|runtime| runtime.figures(now, &mut rows));
        rows
    }

    /// Locked by readers only, never by a worker.
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Runtime>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A family with one value per worker.
type Column = (&'static Family, fn(&LoopFigures) -> Option<f64>);

const COLUMNS: [Column; 8] = [
    (&family::LOOP_WAIT, |row| row.wait_seconds),
    (&family::LOOP_BUSY, |row| row.busy_seconds),
    (&family::LOOP_WAKEUPS, |row| count(row.wakeups)),
    (&family::LOOP_READY_EVENTS, |row| count(row.ready_events)),
    (&family::LOOP_POLLS, |row| count(row.polls)),
    (&family::LOOP_TASKS, |row| count(row.tasks)),
    (&family::LOOP_RUN_QUEUE, |row| count(row.run_queue)),
    (&family::LOOP_DESCRIPTORS, |row| count(row.descriptors)),
];

fn count(figure: Option<u64>) -> Option<f64> {
    figure.map(|figure| figure as f64)
}

/// Reads the figures on each scrape of `/metrics`.
pub(super) struct LoopCollector {
    runtimes: Arc<Runtimes>,
    descs: Vec<Desc>,
}

impl LoopCollector {
    pub(super) fn new(runtimes: Arc<Runtimes>) -> Self {
        let families = COLUMNS.iter().map(|(family, _)| *family).chain([&family::LOOP_POLL]);
        LoopCollector { runtimes, descs: families.map(Family::describe).collect() }
    }
}

impl Collector for LoopCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let rows = self.runtimes.figures(Instant::now());
        let column = |&(family, figure): &Column| {
            let samples = rows.iter().filter_map(|row| Some(family.sample(&[&row.worker], figure(row)?)));
            family.read(samples.collect())
        };
        // The sum is the busy time, which is the polls and little else: tokio has no sum of its own.
        let polls = rows.iter().filter_map(|row| {
            let times = row.poll_times.as_ref()?;
            Some(family::LOOP_POLL.distribution(&[&row.worker], times, row.busy_seconds.unwrap_or_default()))
        });
        let polls = family::LOOP_POLL.read(polls.collect());
        COLUMNS.iter().map(column).chain([polls]).filter(|family| !family.get_metric().is_empty()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::worker::{Activity, PhaseOrFilter};
    use super::*;
    use crate::phase::Phase;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn known(since: Instant) -> Known {
        let worker: &'static Worker = Box::leak(Box::new(Worker::new(0, 0, since)));
        Known { worker, since, busy_before: ms(5), busy: Duration::ZERO, wait: Duration::ZERO }
    }

    #[test]
    fn busy_and_waiting_add_up_and_a_poll_under_way_is_busy() {
        let begin = Instant::now();
        let mut known = known(begin);
        assert_eq!(known.times(ms(25), begin + ms(100)), (ms(20), ms(80)));
        let outer = known.worker.begin(Activity::at(PhaseOrFilter::phase(Phase::Route)), begin + ms(120));
        assert_eq!(known.times(ms(25), begin + ms(420)), (ms(320), ms(100)));
        known.worker.end(outer);
        assert_eq!(known.times(ms(325), begin + ms(520)), (ms(320), ms(200)));
    }

    #[test]
    fn neither_shrinks() {
        let begin = Instant::now();
        let mut known = known(begin);
        assert_eq!(known.times(ms(5), begin + ms(50)), (ms(0), ms(50)));
        // What was done until then was published only now.
        assert_eq!(known.times(ms(45), begin + ms(60)), (ms(40), ms(50)));
        assert_eq!(known.times(ms(45), begin + ms(160)), (ms(40), ms(120)));
    }

    #[cfg(tokio_unstable)]
    #[test]
    fn the_bounds_of_poll_times_are_those_of_tokio() {
        #[allow(deprecated, reason = "Pingora makes its runtimes with these calls")]
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_metrics_poll_time_histogram()
            .metrics_poll_count_histogram_scale(tokio::runtime::HistogramScale::Log)
            .metrics_poll_count_histogram_resolution(Duration::from_micros(POLL_TIME_FIRST_MICROS))
            .metrics_poll_count_histogram_buckets(POLL_TIME_BUCKETS)
            .build()
            .unwrap();
        let metrics = runtime.handle().metrics();
        let bounds = (0..POLL_TIME_BUCKETS - 1).map(|bucket| metrics.poll_time_histogram_bucket_range(bucket).end);
        let bounds: Vec<f64> = bounds.map(|bound| bound.as_secs_f64()).collect();
        assert_eq!(bounds, family::POLL_TIMES);
    }
}
