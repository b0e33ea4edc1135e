//! `/status`: how the gateway is at this moment, as one document.
//!
//! It is a stable interface: `conf/manual/status.md` says what every field means, `forebay top` and the status page
//! read nothing else. All of it is put together when somebody asks, on the admin endpoint's thread, from what is
//! counted anyway; what grows is a count since the start, so that whoever asks twice has a rate.

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

use super::answer::{self, Answer};
use super::page::Page;
use super::table::Ask;
use super::{Admin, Readiness, Ready};
use crate::client::connection::Listener;
use crate::client::lane::Class;
use crate::client::slow::{SlowClient, SlowClients};
use crate::eventloop::Loops;
use crate::metrics::{Distribution, Metrics, RouteFigures, RouteMetrics, family};
use crate::phase::Phase;
use crate::upstream::breaker::State;
use crate::upstream::{Endpoint, Upstream};

/// How many slow clients are shown unless `?slow=` says otherwise, and the most that it can say.
const SLOW: usize = 20;
const SLOW_MAX: usize = 200;
/// How many routes an event has.
const EVENT_ROUTES: usize = 100;
/// How many endpoints of an upstream are shown unless `?endpoints=` says otherwise, and how many an event has.
const ENDPOINTS: usize = 200;
const EVENT_ENDPOINTS: usize = 50;
/// How far events lie apart.
const EVERY: Duration = Duration::from_secs(1);
/// An event that is not older than this is sent to the next who asks, too.
const SHARED_FOR: Duration = Duration::from_millis(400);

/// What the document is put together from.
pub struct Sources {
    /// The configuration that runs.
    pub shown: Shown,
    /// What is counted.
    pub metrics: Metrics,
    /// Whether exchanges are taken.
    pub readiness: Readiness,
    /// The workers.
    pub loops: Loops,
    /// Who is waited for.
    pub slow: SlowClients,
}

/// The configuration that runs, for everything that shows it; changed whole.
pub type Shown = Arc<ArcSwap<Configured>>;

/// What there is in a configuration.
#[derive(Default)]
pub struct Configured {
    /// Its number, from 1.
    pub generation: u64,
    /// The listeners, each with the address that it was bound to.
    pub listeners: Vec<(String, Arc<Listener>)>,
    /// The routes; `_none` among them.
    pub routes: Vec<Listed>,
    /// The upstreams.
    pub upstreams: Vec<Arc<Upstream>>,
}

/// A route of a configuration.
#[derive(Clone)]
pub struct Listed {
    /// Its counters.
    pub metrics: Arc<RouteMetrics>,
    /// Where it leads.
    pub upstreams: Vec<String>,
    /// Its filters that act only under a condition.
    pub conditional: Vec<Conditional>,
}

/// A filter that acts only under a condition.
#[derive(Clone)]
pub struct Conditional {
    /// What it is called.
    pub filter: &'static str,
    /// The condition, as it is written.
    pub when: String,
    /// Exchanges for which it did not hold.
    pub skipped: IntCounter,
}

/// How the gateway is at one moment. Fields are added, but not taken away and not given another meaning.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Document {
    /// Forebay's version.
    pub version: String,
    /// When the process started (RFC 3339).
    pub started: String,
    /// For how long it has been running.
    pub uptime_seconds: f64,
    /// The number of the configuration that runs, from 1.
    pub generation: u64,
    /// `starting`, `ready` or `stopping`; `handed_over` where another process serves in place of this one.
    pub state: String,
    /// One row for each worker thread.
    pub workers: Vec<WorkerStatus>,
    /// Workers that are stalled now.
    pub stalled_workers: u64,
    /// Where clients come in.
    pub listeners: Vec<ListenerStatus>,
    /// All phases, in their order.
    pub phases: Vec<PhaseStatus>,
    /// Routes, those with the most exchanges first.
    pub routes: Vec<RouteStatus>,
    /// How many routes there are, shown or not.
    pub routes_total: usize,
    /// The groups of endpoints.
    pub upstreams: Vec<UpstreamStatus>,
    /// Who is waited for.
    pub slow_clients: SlowStatus,
    /// What is held for slow sides, and how much may be.
    pub spools: SpoolStatus,
    /// What Forebay itself refused or cut, by reason: how often. What never happened is left out.
    pub refusals: BTreeMap<String, u64>,
    /// The upper bounds of the buckets below, in seconds; each list of counts has one more, for what is beyond the
    /// last.
    pub bounds: Bounds,
}

/// The bounds of what is counted in buckets.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Bounds {
    /// Of `routes[].seconds`.
    pub exchange_seconds: Vec<f64>,
    /// Of `workers[].lag`.
    pub lag_seconds: Vec<f64>,
}

/// Times, counted in buckets.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Times {
    /// The sum of them.
    pub sum_seconds: f64,
    /// How many fell into each bucket.
    pub buckets: Vec<u64>,
}

impl From<Distribution> for Times {
    fn from(counted: Distribution) -> Self {
        Times { sum_seconds: counted.sum, buckets: counted.buckets }
    }
}

/// A worker and its event loop. What is missing cannot be known: of workers that share their tasks, or in a build
/// without `tokio_unstable`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct WorkerStatus {
    /// Its number, from 0; `all` for what workers with `server.work_stealing` have in common.
    pub worker: String,
    /// Time in which it waited in the kernel for something to do.
    pub wait_seconds: Option<f64>,
    /// Time in which it did something.
    pub busy_seconds: Option<f64>,
    /// Times that it waited and was woken.
    pub wakeups: Option<u64>,
    /// Events that the kernel had for it.
    pub ready_events: Option<u64>,
    /// Polls of tasks.
    pub polls: Option<u64>,
    /// Tasks that there are.
    pub tasks: Option<u64>,
    /// Tasks that are ready and wait.
    pub run_queue: Option<u64>,
    /// Sockets and the like that it watches.
    pub descriptors: Option<u64>,
    /// How late its signs of life came.
    pub lag: Option<Times>,
    /// Exchanges that move much and wait for their turn.
    pub lane_waiting: Option<i64>,
    /// Of its time, what it may give to them, from 0 to 1.
    pub lane_share: Option<f64>,
    /// The exchange that it is polling at this moment.
    pub doing: Option<Doing>,
}

/// What a worker does at a moment.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Doing {
    /// The phase, or the filter that runs in it.
    #[serde(rename = "where")]
    pub place: String,
    /// The route, if there is one yet.
    pub route: Option<String>,
    /// For how long this poll has lasted.
    pub seconds: f64,
}

/// A listener.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct ListenerStatus {
    /// Its name.
    pub listener: String,
    /// Where it listens.
    pub address: String,
    /// What it speaks: `tcp`, `tls`, `http1`, `h2`, `h2c`.
    pub protocols: Vec<String>,
    /// Connections that were accepted.
    pub accepted: u64,
    /// Connections that are open, by what they do: `idle`, `header`, `active`.
    pub connections: BTreeMap<String, i64>,
    /// Requests whose header arrived, by protocol: `http1`, `h2`.
    pub requests: BTreeMap<String, u64>,
}

/// A phase.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct PhaseStatus {
    /// Its name.
    pub phase: String,
    /// How many exchanges are in it.
    pub active: u64,
    /// For how long the first of them has been.
    pub oldest_seconds: f64,
}

/// A route.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct RouteStatus {
    /// Its name; `_none` for requests that no route took, `_other` for all routes beyond `max_series` together.
    pub route: String,
    /// Where it leads.
    pub upstreams: Vec<String>,
    /// Its filters that act only under a condition.
    pub conditional: Vec<FilterStatus>,
    /// It is counted as `_other`, and its own counts are 0.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub folded: bool,
    /// Exchanges that ended.
    pub exchanges: u64,
    /// The same by class of status: `2xx`, … `none` if the client got none.
    pub codes: BTreeMap<String, u64>,
    /// Bytes that came from clients.
    pub received_bytes: u64,
    /// Bytes that went to clients.
    pub sent_bytes: u64,
    /// The times of whole exchanges.
    pub seconds: Times,
    /// The median since the start, estimated from the buckets; `None` without exchanges.
    pub p50_seconds: Option<f64>,
    /// The same of the slowest hundredth.
    pub p99_seconds: Option<f64>,
}

/// A filter that acts only under a condition.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct FilterStatus {
    /// What it is called.
    pub filter: String,
    /// The condition, as it is written.
    pub when: String,
    /// Exchanges in which it did nothing, for the condition did not hold.
    pub skipped: u64,
}

/// A group of endpoints.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct UpstreamStatus {
    /// Its name.
    pub upstream: String,
    /// Connections that exchanges were given, by how: `new`, `reused`, `failed`.
    pub connects: BTreeMap<String, u64>,
    /// Attempts after the first of an exchange.
    pub retries: u64,
    /// Exchanges that have one of its endpoints now.
    pub inflight: u32,
    /// Exchanges that wait in line because all of it is full.
    pub queued: i64,
    /// Its circuit breaker: `closed`, `half_open` or `open`; `None` if it has none.
    pub breaker: Option<String>,
    /// Its endpoints: those that may not be chosen first, then those with the most in flight.
    pub endpoints: Vec<EndpointStatus>,
    /// How many endpoints there are, shown or not.
    pub endpoints_total: usize,
    /// The same by state; a state that no endpoint is in is left out.
    pub states: BTreeMap<String, u64>,
}

/// An endpoint.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct EndpointStatus {
    /// Its name in metrics and logs: as the configuration has it.
    pub endpoint: String,
    /// Where it is.
    pub address: String,
    /// `healthy`, `unknown`, `unhealthy`, `ejected` or `draining`.
    pub state: String,
    /// Its share, relative to its neighbours.
    pub weight: u32,
    /// The tier it stands in; 0 serves first.
    pub priority: u8,
    /// Exchanges that have it now.
    pub inflight: u32,
    /// How long a request takes there, expected from those before; 0 if nothing is known.
    pub latency_seconds: f64,
    /// How often it was chosen; of a name with several addresses, all of them together.
    pub selections: u64,
}

/// Who is waited for.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct SlowStatus {
    /// Clients that are waited for to send: the body of a request.
    pub request: i64,
    /// Clients that are waited for to take a response.
    pub response: i64,
    /// Who has been waited for longest, longest first.
    pub longest: Vec<SlowClientStatus>,
}

/// A client that is waited for, in a request header, a request body or a response.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct SlowClientStatus {
    /// Its address; `None` over a unix socket.
    pub client: Option<IpAddr>,
    /// The route; `None` while the header comes.
    pub route: Option<String>,
    /// Method and path of its request, cut where they are long.
    pub target: Option<String>,
    /// The phase in which it is waited for.
    pub phase: String,
    /// `request`: for it to send. `response`: for it to take.
    pub direction: String,
    /// Bytes of the response that are here for it; of the request, those that it has announced and not sent.
    pub bytes: Option<u64>,
    /// For how long it has been silent; 0 if it just did something.
    pub silent_seconds: f64,
    /// For how long its exchange has waited for it in this direction, all pauses together.
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

/// What is held for slow sides.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct SpoolStatus {
    /// In memory.
    pub memory: StoreStatus,
    /// In files.
    pub disk: StoreStatus,
    /// Writes and reads that are queued or under way.
    pub disk_queue: i64,
    /// Whether bodies go to disk because memory is short.
    pub spilling: bool,
    /// Spools that wait for memory.
    pub paused: i64,
    /// Whether new exchanges are turned away.
    pub shedding: bool,
}

/// Where bytes are held.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct StoreStatus {
    /// Of requests.
    pub request_bytes: i64,
    /// Of responses.
    pub response_bytes: i64,
    /// How much may be held.
    pub limit_bytes: i64,
}

/// How long the lists of a document may be.
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

/// Puts the document together.
pub struct Status {
    sources: Sources,
    began: Instant,
    started: String,
    event: Mutex<Option<(Instant, Bytes)>>,
}

impl Status {
    /// Of a gateway that starts now.
    pub fn new(sources: Sources) -> Arc<Self> {
        let started = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
        Arc::new(Status { sources, began: Instant::now(), started, event: Mutex::new(None) })
    }

    /// The document, with so much of it at most.
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
                let lane = number.map(|number| metrics.lane(number));
                WorkerStatus {
                    lag: number.map(|number| Times::from(metrics.lag(number))),
                    lane_waiting: lane.as_ref().map(|lane| lane.waiting.iter().map(|gauge| gauge.get()).sum()),
                    lane_share: lane.as_ref().map(|lane| lane.share[Class::Pass as usize].get()),
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
        // Stable: routes without any exchange stay in the order of the configuration.
        rows.sort_by_key(|row| std::cmp::Reverse(row.exchanges));
        rows.truncate(most);
        (rows, total)
    }

    /// The document as an event; several who look at the same time get the same.
    fn event(&self, now: Instant) -> Bytes {
        let mut last = self.event.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, event)) = &*last
            && now.saturating_duration_since(*at) < SHARED_FOR
        {
            return event.clone();
        }
        // Not reached, the error: the document is made of structs and maps whose keys are text.
        let document = serde_json::to_string(&self.document(Most::EVENT)).unwrap_or_default();
        let event = answer::event("status", &document);
        *last = Some((now, event.clone()));
        event
    }
}

/// Shows the document, once and as events.
pub fn add(admin: Admin, status: Arc<Status>) -> Admin {
    let (once, page) = (status.clone(), Page::new());
    admin
        .get("/status", "how it is now, as JSON: workers, phases, routes, upstreams, slow clients", move |ask| {
            if ask.wants_html() && ask.query("format").is_none() {
                return page.answer();
            }
            let answer = once_asked(&once, ask).unwrap_or_else(|what| Answer::error(StatusCode::BAD_REQUEST, &what));
            answer.with_header(VARY, HeaderValue::from_static("Accept"))
        })
        .get("/status/events", "the same every second, as server-sent events", move |_| {
            let mut ticks = tokio::time::interval(EVERY);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            Answer::events(Box::pin(futures::stream::unfold((status.clone(), ticks), |(status, mut ticks)| async {
                let now = ticks.tick().await;
                Some((status.event(now.into_std()), (status, ticks)))
            })))
        })
}

fn once_asked(status: &Status, ask: &Ask) -> Result<Answer, String> {
    let number = |name: &str| match ask.query(name).map(|text| text.parse::<usize>()) {
        None => Ok(None),
        Some(Ok(number)) => Ok(Some(number)),
        Some(Err(_)) => Err(format!("`{name}` is to be a number")),
    };
    let routes = number("routes")?.unwrap_or(usize::MAX);
    let slow = number("slow")?.unwrap_or(SLOW).min(SLOW_MAX);
    let endpoints = number("endpoints")?.unwrap_or(ENDPOINTS);
    Ok(Answer::json(&status.document(Most { routes, slow, endpoints })))
}

fn listened(address: &str, listener: &Listener) -> ListenerStatus {
    let metrics = &listener.metrics;
    let (tls, tcp) = (listener.tls.is_some(), listener.tcp.is_some());
    let http = [(listener.http1, "http1"), (listener.h2, "h2"), (listener.h2c, "h2c")]
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

/// Estimates a quantile of what was counted in buckets, as Prometheus does: evenly within a bucket, and no more than
/// the last bound. `None` if nothing was counted.
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

/// An upstream, with so many of its endpoints at most.
pub(super) fn grouped(upstream: &Upstream, most: usize, now: Instant) -> UpstreamStatus {
    let metrics = &upstream.metrics;
    let members = upstream.members();
    let mut states = BTreeMap::new();
    for endpoint in members.iter() {
        *states.entry(endpoint.availability().state().name().to_owned()).or_default() += 1;
    }
    let mut shown: Vec<_> = members.iter().map(|endpoint| (shown_first(endpoint), endpoint)).collect();
    // Stable: endpoints that do the same stay in their order.
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

/// The word for what a breaker does, by the number that its gauge has.
fn breaks(gauge: i64) -> &'static str {
    const OPEN: i64 = State::Open as i64;
    const HALF_OPEN: i64 = State::HalfOpen as i64;
    match gauge {
        OPEN => "open",
        HALF_OPEN => "half_open",
        _ => "closed",
    }
}

/// What is worth a look first: whoever may not be chosen, then whoever has most to do.
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
