//! `/status`: the current state of the gateway as one document.
//!
//! It is a stable interface: `conf/manual/status.md` documents every field; `forebay top` and the status page use
//! nothing else. The admin thread builds it on request from existing counters. Values that grow are counts since
//! the start, so that two documents give a rate.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::header::VARY;
use http::{HeaderValue, StatusCode};
use prometheus::IntCounter;
use serde::{Deserialize, Serialize};
use tokio::time::MissedTickBehavior;

use super::page::Page;
use super::reply::{self, Reply};
use super::table::Ask;
use super::{Admin, Readiness, Ready};
use crate::client::listener::Listener;
use crate::eventloop::Loops;
use crate::metrics::{Distribution, Metrics, RouteFigures, RouteMetrics, family};
use crate::phase::Phase;
use crate::scheduler::Class;
use crate::slow_client::{SlowClient, SlowClients};
use crate::upstream::breaker::State;
use crate::upstream::{Endpoint, Upstream};

/// Default and maximum of `?slow=`.
const SLOW: usize = 20;
const SLOW_MAX: usize = 200;
/// Number of routes in an event.
const EVENT_ROUTES: usize = 100;
/// Default of `?endpoints=`, and number of endpoints in an event.
const ENDPOINTS: usize = 200;
const EVENT_ENDPOINTS: usize = 50;
/// Interval of events.
const EVERY: Duration = Duration::from_secs(1);
/// An event younger than this is reused for other clients.
const SHARED_FOR: Duration = Duration::from_millis(400);

/// The sources of the document.
pub struct Sources {
    /// The active configuration.
    pub shown: Shown,
    /// What is counted.
    pub metrics: Metrics,
    /// The readiness.
    pub readiness: Readiness,
    /// The event loops.
    pub loops: Loops,
    /// The slow clients.
    pub slow: SlowClients,
}

/// The active configuration, for everything that displays it; replaced as a whole.
pub type Shown = Arc<ArcSwap<Configured>>;

/// The parts of a configuration.
#[derive(Default)]
pub struct Configured {
    /// Its number, from 1.
    pub generation: u64,
    /// The listeners with their bound addresses.
    pub listeners: Vec<(String, Arc<Listener>)>,
    /// The routes, including `_none`.
    pub routes: Vec<Listed>,
    /// The upstreams.
    pub upstreams: Vec<Arc<Upstream>>,
}

/// A route of a configuration.
#[derive(Clone)]
pub struct Listed {
    /// Its metrics.
    pub metrics: Arc<RouteMetrics>,
    /// Its upstreams.
    pub upstreams: Vec<String>,
    /// Its filters with a condition.
    pub conditional: Vec<Conditional>,
}

/// A filter with a condition.
#[derive(Clone)]
pub struct Conditional {
    /// Its name.
    pub filter: &'static str,
    /// The condition as written.
    pub when: String,
    /// Number of exchanges for which the condition was false.
    pub skipped: IntCounter,
}

/// The state of the gateway. Fields may be added, but not removed or given another meaning.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Document {
    /// Forebay's version.
    pub version: String,
    /// When the process started (RFC 3339).
    pub started: String,
    /// Time since the start.
    pub uptime_seconds: f64,
    /// The number of the active configuration, from 1.
    pub generation: u64,
    /// `starting`, `ready` or `stopping`; `handed_over` after another process has taken over.
    pub state: String,
    /// One row per worker thread.
    pub workers: Vec<WorkerStatus>,
    /// Number of workers that are stalled now.
    pub stalled_workers: u64,
    /// The listeners.
    pub listeners: Vec<ListenerStatus>,
    /// All phases in order.
    pub phases: Vec<PhaseStatus>,
    /// The routes, sorted by number of exchanges, descending.
    pub routes: Vec<RouteStatus>,
    /// Number of routes, including those not shown.
    pub routes_total: usize,
    /// The upstreams.
    pub upstreams: Vec<UpstreamStatus>,
    /// Clients that Forebay waits for.
    pub slow_clients: SlowStatus,
    /// The buffered bodies and their limits.
    pub spools: SpoolStatus,
    /// Exchanges that Forebay refused or cut, by reason. Reasons that never occurred are omitted.
    pub refusals: BTreeMap<String, u64>,
    /// The upper bounds of the histogram buckets, in seconds. Each list of counts has one more, for larger values.
    pub bounds: Bounds,
}

/// The bounds of histograms.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Bounds {
    /// Of `routes[].seconds`.
    pub exchange_seconds: Vec<f64>,
    /// Of `workers[].lag`.
    pub lag_seconds: Vec<f64>,
}

/// A histogram of times.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Times {
    /// The sum of all times.
    pub sum_seconds: f64,
    /// The count per bucket.
    pub buckets: Vec<u64>,
}

impl From<Distribution> for Times {
    fn from(counted: Distribution) -> Self {
        Times { sum_seconds: counted.sum, buckets: counted.buckets }
    }
}

/// A worker and its event loop. Missing values are unknown: the workers share their tasks, or the build lacks
/// `tokio_unstable`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct WorkerStatus {
    /// Its number, from 0; `all` for figures shared by workers with `server.work_stealing`.
    pub worker: String,
    /// Time spent waiting for events.
    pub wait_seconds: Option<f64>,
    /// Time spent working.
    pub busy_seconds: Option<f64>,
    /// Number of waits that ended.
    pub wakeups: Option<u64>,
    /// Number of I/O events.
    pub ready_events: Option<u64>,
    /// Polls of tasks.
    pub polls: Option<u64>,
    /// Number of tasks.
    pub tasks: Option<u64>,
    /// Number of tasks that are ready to be polled.
    pub run_queue: Option<u64>,
    /// Number of registered I/O sources.
    pub descriptors: Option<u64>,
    /// The lag of its answers to heartbeat probes.
    pub lag: Option<Times>,
    /// Exchanges that move much data and wait for their turn.
    pub scheduler_waiting: Option<i64>,
    /// The share of its time for such exchanges, from 0 to 1.
    pub scheduler_share: Option<f64>,
    /// The exchange that is being polled now.
    pub doing: Option<Doing>,
}

/// What a worker is doing.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Doing {
    /// The phase, or the filter that runs in it.
    #[serde(rename = "where")]
    pub place: String,
    /// The route, once one is chosen.
    pub route: Option<String>,
    /// Duration of this poll so far.
    pub seconds: f64,
}

/// A listener.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct ListenerStatus {
    /// Its name.
    pub listener: String,
    /// Its address.
    pub address: String,
    /// Its protocols: `tcp`, `tls`, `http1`, `h2`, `h2c`.
    pub protocols: Vec<String>,
    /// Accepted connections.
    pub accepted: u64,
    /// Open connections by state: `idle`, `header`, `active`.
    pub connections: BTreeMap<String, i64>,
    /// Requests with a complete header, by protocol: `http1`, `h2`.
    pub requests: BTreeMap<String, u64>,
}

/// A phase.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct PhaseStatus {
    /// Its name.
    pub phase: String,
    /// Number of exchanges in it.
    pub active: u64,
    /// Time of the oldest one in this phase.
    pub oldest_seconds: f64,
}

/// A route.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct RouteStatus {
    /// Its name; `_none` for requests that match no route, `_other` for all routes beyond `max_series`.
    pub route: String,
    /// Its upstreams.
    pub upstreams: Vec<String>,
    /// Its filters with a condition.
    pub conditional: Vec<FilterStatus>,
    /// `true`: it is counted in `_other`, and its own counts are 0.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub folded: bool,
    /// Number of finished exchanges.
    pub exchanges: u64,
    /// The same by class of status: `2xx`, … `none` if no status was sent.
    pub codes: BTreeMap<String, u64>,
    /// Bytes received from clients.
    pub received_bytes: u64,
    /// Bytes sent to clients.
    pub sent_bytes: u64,
    /// Durations of exchanges.
    pub seconds: Times,
    /// The median since the start, estimated from the buckets; `None` without exchanges.
    pub p50_seconds: Option<f64>,
    /// The 99th percentile since the start.
    pub p99_seconds: Option<f64>,
}

/// A filter with a condition.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct FilterStatus {
    /// Its name.
    pub filter: String,
    /// The condition as written.
    pub when: String,
    /// Number of exchanges for which the condition was false.
    pub skipped: u64,
}

/// An upstream.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct UpstreamStatus {
    /// Its name.
    pub upstream: String,
    /// Connections used by exchanges, by kind: `new`, `reused`, `failed`.
    pub connects: BTreeMap<String, u64>,
    /// Attempts after the first one of an exchange.
    pub retries: u64,
    /// Number of active exchanges.
    pub inflight: u32,
    /// Exchanges in the queue.
    pub queued: i64,
    /// The state of its circuit breaker: `closed`, `half_open` or `open`; `None` if it has none.
    pub breaker: Option<String>,
    /// Its endpoints: unavailable ones first, then by active exchanges.
    pub endpoints: Vec<EndpointStatus>,
    /// Number of endpoints, including those not shown.
    pub endpoints_total: usize,
    /// Number of endpoints by state; states without endpoints are omitted.
    pub states: BTreeMap<String, u64>,
}

/// An endpoint.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct EndpointStatus {
    /// Its name in metrics and logs: the address as configured.
    pub endpoint: String,
    /// Its address.
    pub address: String,
    /// `healthy`, `unknown`, `unhealthy`, `ejected` or `draining`.
    pub state: String,
    /// Its weight, relative to the other endpoints.
    pub weight: u32,
    /// Its tier; 0 serves first.
    pub priority: u8,
    /// Number of active exchanges.
    pub inflight: u32,
    /// Expected latency of a request, from earlier ones; 0 if unknown.
    pub latency_seconds: f64,
    /// How often it was chosen; for a name with several addresses, the sum of all.
    pub selections: u64,
}

/// Clients that Forebay waits for.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct SlowStatus {
    /// Clients that are slow to send a request body.
    pub request: i64,
    /// Clients that are slow to read a response.
    pub response: i64,
    /// The clients with the longest waits, longest first.
    pub longest: Vec<SlowClientStatus>,
}

/// A client that Forebay waits for: in a request header, a request body or a response.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct SlowClientStatus {
    /// Its address; `None` over a unix socket.
    pub client: Option<IpAddr>,
    /// The route; `None` while the header is incomplete.
    pub route: Option<String>,
    /// Method and path of its request, cut if they are long.
    pub target: Option<String>,
    /// The phase in which it is slow.
    pub phase: String,
    /// `request`: it must send. `response`: it must read.
    pub direction: String,
    /// Buffered response bytes, or announced request bytes that are missing.
    pub bytes: Option<u64>,
    /// Time since its last activity.
    pub silent_seconds: f64,
    /// Total time that its exchange has waited for it in this direction.
    pub waited_seconds: f64,
}

impl From<SlowClient> for SlowClientStatus {
    fn from(slow: SlowClient) -> Self {
        SlowClientStatus {
            client: slow.client,
            route: slow.route,
            target: slow.target,
            phase: slow.phase.name().to_owned(),
            direction: slow.direction.name().to_owned(),
            bytes: slow.bytes,
            silent_seconds: slow.silent.as_secs_f64(),
            waited_seconds: slow.waited.as_secs_f64(),
        }
    }
}

/// The buffered bodies.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct SpoolStatus {
    /// Memory.
    pub memory: StoreStatus,
    /// Disk.
    pub disk: StoreStatus,
    /// Disk operations that are queued or active.
    pub disk_queue: i64,
    /// Whether bodies go to disk because memory is short.
    pub spilling: bool,
    /// Bodies that wait for memory.
    pub paused: i64,
    /// Whether new exchanges are refused.
    pub shedding: bool,
}

/// One store of buffered bodies.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct StoreStatus {
    /// Bytes of requests.
    pub request_bytes: i64,
    /// Bytes of responses.
    pub response_bytes: i64,
    /// The limit in bytes.
    pub limit_bytes: i64,
}

/// Limits on the lists in a document.
#[derive(Clone, Copy, Debug)]
pub struct Most {
    /// Routes.
    pub routes: usize,
    /// Slow clients.
    pub slow: usize,
    /// Endpoints of each upstream.
    pub endpoints: usize,
}

impl Most {
    const EVENT: Most = Most { routes: EVENT_ROUTES, slow: SLOW, endpoints: EVENT_ENDPOINTS };
}

/// Builds the document.
pub struct Status {
    sources: Sources,
    began: Instant,
    started: String,
    event: Mutex<Option<(Instant, Bytes)>>,
}

impl Status {
    /// For a gateway that starts now.
    pub fn new(sources: Sources) -> Arc<Self> {
        let started = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        Arc::new(Status { sources, began: Instant::now(), started, event: Mutex::new(None) })
    }

    /// The document, within these limits.
    pub fn document(&self, most: Most) -> Document {
        let now = Instant::now();
        let Sources { shown, metrics, readiness, slow, .. } = &self.sources;
        let configured = shown.load();
        let (longest, _) = slow.longest(most.slow, now);
        let (routes, routes_total) = self.routes(&configured, most.routes);
        Document {
            version: Metrics::VERSION.to_owned(),
            started: self.started.clone(),
            uptime_seconds: self.began.elapsed().as_secs_f64(),
            generation: configured.generation,
            state: match readiness.now() {
                Ready::Starting => "starting",
                Ready::Ready => "ready",
                Ready::Stopping => "stopping",
                Ready::HandedOver => "handed_over",
            }
            .to_owned(),
            workers: self.workers(),
            stalled_workers: metrics.stalled_workers(),
            listeners: configured.listeners.iter().map(|(address, listener)| listened(address, listener)).collect(),
            phases: phases(metrics),
            routes,
            routes_total,
            upstreams: configured.upstreams.iter().map(|upstream| grouped(upstream, most.endpoints, now)).collect(),
            slow_clients: SlowStatus {
                longest: longest.into_iter().map(SlowClientStatus::from).collect(),
                ..slow_clients(metrics)
            },
            spools: spools(metrics),
            refusals: refused(metrics),
            bounds: Bounds {
                exchange_seconds: family::EXCHANGE_SECONDS.bounds().to_vec(),
                lag_seconds: family::LOOP_LAG.bounds().to_vec(),
            },
        }
    }

    fn workers(&self) -> Vec<WorkerStatus> {
        let Sources { loops, metrics, .. } = &self.sources;
        loops
            .figures()
            .into_iter()
            .map(|figures| {
                let number = figures.worker.parse::<usize>().ok();
                let scheduler = number.map(|number| metrics.scheduler(number));
                WorkerStatus {
                    lag: number.map(|number| Times::from(metrics.lag(number))),
                    scheduler_waiting: scheduler
                        .as_ref()
                        .map(|scheduler| scheduler.waiting.iter().map(|gauge| gauge.get()).sum()),
                    scheduler_share: scheduler
                        .as_ref()
                        .map(|scheduler| scheduler.share[Class::Transfer as usize].get()),
                    wait_seconds: figures.wait_seconds,
                    busy_seconds: figures.busy_seconds,
                    wakeups: figures.wakeups,
                    ready_events: figures.ready_events,
                    polls: figures.polls,
                    tasks: figures.tasks,
                    run_queue: figures.run_queue,
                    descriptors: figures.descriptors,
                    doing: figures.doing.map(|doing| Doing {
                        place: doing.place.to_owned(),
                        route: doing.route,
                        seconds: doing.seconds,
                    }),
                    worker: figures.worker,
                }
            })
            .collect()
    }

    fn routes(&self, configured: &Configured, most: usize) -> (Vec<RouteStatus>, usize) {
        let metrics = &self.sources.metrics;
        let mut rows: Vec<RouteStatus> = configured
            .routes
            .iter()
            .map(|listed| {
                let row = routed(listed.metrics.name(), &listed.upstreams, listed.metrics.figures());
                RouteStatus { conditional: listed.conditional.iter().map(FilterStatus::of).collect(), ..row }
            })
            .collect();
        rows.extend(metrics.folded().map(|figures| routed("_other", &[], figures)));
        rows.retain(|row| row.exchanges > 0 || !row.route.starts_with('_'));
        let total = rows.len();
        // The sort is stable: routes without exchanges keep the order of the configuration.
        rows.sort_by_key(|row| std::cmp::Reverse(row.exchanges));
        rows.truncate(most);
        (rows, total)
    }

    /// The document as an event, shared by simultaneous clients.
    fn event(&self, now: Instant) -> Bytes {
        let mut last = self.event.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, event)) = &*last
            && now.saturating_duration_since(*at) < SHARED_FOR
        {
            return event.clone();
        }
        // The error cannot happen: the document consists of structs and maps with text keys.
        let document = serde_json::to_string(&self.document(Most::EVENT)).unwrap_or_default();
        let event = reply::event("status", &document);
        *last = Some((now, event.clone()));
        event
    }
}

/// Adds the document and its event stream to the admin endpoint.
pub fn add(admin: Admin, status: Arc<Status>) -> Admin {
    let (once, page) = (status.clone(), Page::new());
    admin
        .get("/status", "how it is now, as JSON: workers, phases, routes, upstreams, slow clients", move |ask| {
            if ask.wants_html() && ask.query("format").is_none() {
                return page.answer();
            }
            let answer = once_asked(&once, ask).unwrap_or_else(|what| Reply::error(StatusCode::BAD_REQUEST, &what));
            answer.with_header(VARY, HeaderValue::from_static("Accept"))
        })
        .get("/status/events", "the same every second, as server-sent events", move |_| {
            let mut ticks = tokio::time::interval(EVERY);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            Reply::events(Box::pin(futures::stream::unfold((status.clone(), ticks), |(status, mut ticks)| async {
                let now = ticks.tick().await;
                Some((status.event(now.into_std()), (status, ticks)))
            })))
        })
}

fn once_asked(status: &Status, ask: &Ask) -> Result<Reply, String> {
    let number = |name: &str| match ask.query(name).map(|text| text.parse::<usize>()) {
        None => Ok(None),
        Some(Ok(number)) => Ok(Some(number)),
        Some(Err(_)) => Err(format!("`{name}` must be a number")),
    };
    let routes = number("routes")?.unwrap_or(usize::MAX);
    let slow = number("slow")?.unwrap_or(SLOW).min(SLOW_MAX);
    let endpoints = number("endpoints")?.unwrap_or(ENDPOINTS);
    Ok(Reply::json(&status.document(Most { routes, slow, endpoints })))
}

fn listened(address: &str, listener: &Listener) -> ListenerStatus {
    let metrics = &listener.metrics;
    let (tls, tcp) = (listener.tls.is_some(), listener.relays.tcp.is_some());
    let http = [(listener.protocols.http1, "http1"), (listener.protocols.h2, "h2"), (listener.protocols.h2c, "h2c")]
        .map(|(speaks, name)| (speaks && !tcp, name));
    let spoken = [(tcp, "tcp"), (tls, "tls")].into_iter().chain(http);
    ListenerStatus {
        listener: listener.name.clone(),
        address: address.to_owned(),
        protocols: spoken.filter(|(speaks, _)| *speaks).map(|(_, name)| name.to_owned()).collect(),
        accepted: metrics.accepted.get(),
        connections: metrics.open().into_iter().map(|(state, count)| (state.to_owned(), count)).collect(),
        requests: [("http1", &metrics.http1_requests), ("h2", &metrics.h2_requests)]
            .map(|(protocol, count)| (protocol.to_owned(), count.get()))
            .into(),
    }
}

fn phases(metrics: &Metrics) -> Vec<PhaseStatus> {
    let named = Phase::ALL.into_iter().zip(metrics.phases());
    named
        .map(|(phase, state)| PhaseStatus {
            phase: phase.name().to_owned(),
            active: state.active,
            oldest_seconds: state.oldest.as_secs_f64(),
        })
        .collect()
}

impl FilterStatus {
    fn of(filter: &Conditional) -> Self {
        FilterStatus { filter: filter.filter.to_owned(), when: filter.when.clone(), skipped: filter.skipped.get() }
    }
}

fn routed(name: &str, upstreams: &[String], figures: RouteFigures) -> RouteStatus {
    let seconds = Times::from(figures.seconds);
    let bounds = family::EXCHANGE_SECONDS.bounds();
    RouteStatus {
        route: name.to_owned(),
        upstreams: upstreams.to_vec(),
        conditional: Vec::new(),
        folded: figures.folded,
        exchanges: seconds.buckets.iter().sum(),
        codes: figures.classes.into_iter().map(|(class, count)| (class.to_owned(), count)).collect(),
        received_bytes: figures.received,
        sent_bytes: figures.sent,
        p50_seconds: quantile(bounds, &seconds.buckets, 0.5),
        p99_seconds: quantile(bounds, &seconds.buckets, 0.99),
        seconds,
    }
}

/// Estimates a quantile from buckets like Prometheus: linear within a bucket, and at most the last bound. `None`
/// without values.
pub fn quantile(bounds: &[f64], buckets: &[u64], quantile: f64) -> Option<f64> {
    let total: u64 = buckets.iter().sum();
    if total == 0 {
        return None;
    }
    let rank = quantile * total as f64;
    let mut below = 0.0;
    for (index, &count) in buckets.iter().enumerate() {
        if count > 0 && below + count as f64 >= rank {
            let lower = index.checked_sub(1).map_or(0.0, |index| bounds.get(index).copied().unwrap_or_default());
            let upper = bounds.get(index).copied().unwrap_or(lower);
            return Some(lower + (upper - lower) * (rank - below) / count as f64);
        }
        below += count as f64;
    }
    bounds.last().copied()
}

fn refused(metrics: &Metrics) -> BTreeMap<String, u64> {
    let counts = metrics.refusals().counts();
    counts.into_iter().filter(|(_, count)| *count > 0).map(|(reason, count)| (reason.to_owned(), count)).collect()
}

/// An upstream, with at most this many endpoints.
pub(super) fn grouped(upstream: &Upstream, most: usize, now: Instant) -> UpstreamStatus {
    let metrics = &upstream.metrics;
    let members = upstream.members();
    let mut states = BTreeMap::new();
    for endpoint in members.iter() {
        *states.entry(endpoint.availability().state().name().to_owned()).or_default() += 1;
    }
    let mut shown: Vec<_> = members.iter().map(|endpoint| (shown_first(endpoint), endpoint)).collect();
    // The sort is stable: equal endpoints keep their order.
    shown.sort_by_key(|(first, _)| *first);
    shown.truncate(most);
    UpstreamStatus {
        upstream: upstream.name.to_string(),
        connects: [
            ("new", &metrics.connects_new),
            ("reused", &metrics.connects_reused),
            ("failed", &metrics.connects_failed),
        ]
        .map(|(outcome, count)| (outcome.to_owned(), count.get()))
        .into(),
        retries: metrics.retries.all(),
        inflight: upstream.inflight(),
        queued: metrics.limits.queue.length.get(),
        breaker: upstream.admission.breaker().map(|_| breaks(metrics.limits.breaker.get()).to_owned()),
        endpoints: shown.into_iter().map(|(_, endpoint)| served(endpoint, now)).collect(),
        endpoints_total: members.len(),
        states,
    }
}

/// The state of a breaker for the value of its gauge.
fn breaks(gauge: i64) -> &'static str {
    const OPEN: i64 = State::Open as i64;
    const HALF_OPEN: i64 = State::HalfOpen as i64;
    match gauge {
        OPEN => "open",
        HALF_OPEN => "half_open",
        _ => "closed",
    }
}

/// The sort key: unavailable endpoints first, then the busiest.
fn shown_first(endpoint: &Endpoint) -> (bool, std::cmp::Reverse<u32>) {
    (endpoint.availability().admits(), std::cmp::Reverse(endpoint.inflight()))
}

/// An endpoint.
pub(super) fn served(endpoint: &Endpoint, now: Instant) -> EndpointStatus {
    EndpointStatus {
        endpoint: endpoint.label.to_string(),
        address: endpoint.address.to_string(),
        state: endpoint.availability().state().name().to_owned(),
        weight: endpoint.weight().get(),
        priority: endpoint.priority(),
        inflight: endpoint.inflight(),
        latency_seconds: endpoint.latency(now),
        selections: endpoint.metrics.selections.get(),
    }
}

fn slow_clients(metrics: &Metrics) -> SlowStatus {
    let [request, response] = metrics.spools().slow;
    SlowStatus { request: request.get(), response: response.get(), longest: Vec::new() }
}

fn spools(metrics: &Metrics) -> SpoolStatus {
    let spools = metrics.spools();
    let store = |bytes: &[prometheus::IntGauge; 2], limit: &prometheus::IntGauge| StoreStatus {
        request_bytes: bytes[0].get(),
        response_bytes: bytes[1].get(),
        limit_bytes: limit.get(),
    };
    SpoolStatus {
        memory: store(&spools.memory, &spools.memory_limit),
        disk: store(&spools.disk, &spools.disk_limit),
        disk_queue: spools.disk_queue.get(),
        spilling: spools.spill.now.get() > 0,
        paused: spools.pause.now.get(),
        shedding: spools.shed.now.get() > 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_lies_evenly_within_its_bucket_and_not_beyond_the_last_bound() {
        let bounds = [0.1, 0.2, 1.0];
        assert_eq!(quantile(&bounds, &[0, 0, 0, 0], 0.5), None);
        assert_eq!(quantile(&bounds, &[], 0.5), None);
        assert_eq!(quantile(&bounds, &[10, 0, 0, 0], 0.5), Some(0.05));
        assert_eq!(quantile(&bounds, &[5, 5, 0, 0], 0.5), Some(0.1));
        let close = |found: Option<f64>, expected: f64| assert!((found.unwrap() - expected).abs() < 1e-9, "{found:?}");
        close(quantile(&bounds, &[5, 5, 0, 0], 0.9), 0.18);
        close(quantile(&bounds, &[98, 0, 0, 2], 0.99), 1.0);
    }
}
