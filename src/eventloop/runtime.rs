//! What tokio knows of the workers' loops, read when somebody asks.
//!
//! The workers count for themselves and are not disturbed: a scrape reads what they have published. They do so whenever
//! they are about to wait and after every 61 tasks, so that a poll under way is in no figure of tokio's; the time of
//! one that is an exchange's is added here. What needs `tokio_unstable` is missing without it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use serde::Serialize;
use tokio::runtime::{Handle, RuntimeMetrics};

use super::worker::Worker;
use crate::metrics::family::{self, Family};

/// The first bound of the poll times, in microseconds; tokio takes the next power of two of nanoseconds and doubles it
/// from there. [`family::LOOP_POLL`] has the same bounds.
pub const POLL_TIME_FIRST_MICROS: u64 = 32;
/// How many bounds there are, and one bucket more for what is beyond the last.
pub const POLL_TIME_BUCKETS: usize = family::POLL_TIMES.len() + 1;

/// What one worker's loop has done so far, and how it is. What is `None` cannot be known: of a worker that shares its
/// runtime with others, or in a build without `tokio_unstable`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LoopFigures {
    /// Its number, from 0; `all` for what workers that share a runtime have in common.
    pub worker: String,
    /// Seconds in which it waited for something to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wait_seconds: Option<f64>,
    /// Seconds in which it did something.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub busy_seconds: Option<f64>,
    /// Times that it waited and was woken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wakeups: Option<u64>,
    /// Events of sockets and the like that were ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_events: Option<u64>,
    /// Polls of tasks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub polls: Option<u64>,
    /// Polls by the time that they took, in the buckets of `forebay_loop_poll_seconds`.
    #[serde(skip)]
    pub poll_times: Option<Vec<u64>>,
    /// Tasks that there are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tasks: Option<u64>,
    /// Tasks that are ready and wait to be polled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_queue: Option<u64>,
    /// Sockets and the like that it watches.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub descriptors: Option<u64>,
    /// The exchange that is polled at this moment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub doing: Option<Doing>,
}

/// What a worker does at a moment.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Doing {
    /// The phase, or the filter that runs in it.
    #[serde(rename = "where")]
    pub place: &'static str,
    /// The route, if there is one yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    /// For how long this poll has lasted.
    pub seconds: f64,
}

/// The workers of one gateway, as far as they have been found.
pub(super) struct Runtimes(Mutex<Vec<Runtime>>);

/// One runtime of tokio: with work stealing it has all workers, else one.
pub(super) struct Runtime {
    metrics: RuntimeMetrics,
    workers: Vec<Known>,
}

struct Known {
    worker: &'static Worker,
    /// When it was found, and how busy it had been by then.
    since: Instant,
    busy_before: Duration,
    /// What was last told: neither may shrink.
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

    /// One row for each worker, and one for what they share if they are several.
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
                doing: known.worker.doing(now).map(|(word, time)| Doing {
                    place: word.spot().name(),
                    route: word.route().map(|route| route.to_string()),
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

    /// What belongs to the runtime as a whole.
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
    /// For how long it was busy and for how long it waited. `total` is tokio's count, read before what is polled now:
    /// so a poll that is still under way is in none of it.
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

    /// What tokio knows of one worker. Its queue is added to the one of its runtime, if that is in the same row.
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

    /// What tokio knows of the driver that a runtime's workers share.
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

    /// Every worker, in the order of their numbers, then what they share.
    pub(super) fn figures(&self, now: Instant) -> Vec<LoopFigures> {
        let mut rows = Vec::new();
        self.lock().iter_mut().for_each(|runtime| runtime.figures(now, &mut rows));
        rows
    }

    /// Taken by those who ask, never by a worker.
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Runtime>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A family that is one figure of each worker.
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

/// Reads the figures whenever `/metrics` is asked for.
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
        // The sum is that of the busy time, which is polls and the little between them: tokio keeps none of its own.
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
    use super::super::worker::{Spot, Word};
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
        let outer = known.worker.begin(Word::at(Spot::phase(Phase::Route)), begin + ms(120));
        assert_eq!(known.times(ms(25), begin + ms(420)), (ms(320), ms(100)));
        known.worker.end(outer);
        assert_eq!(known.times(ms(325), begin + ms(520)), (ms(320), ms(200)));
    }

    #[test]
    fn neither_shrinks() {
        let begin = Instant::now();
        let mut known = known(begin);
        assert_eq!(known.times(ms(5), begin + ms(50)), (ms(0), ms(50)));
        // What was done until then became known only now.
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
