//! What Forebay counts: the handles that the rest of it touches, and the text that Prometheus reads.
//!
//! Each metric is declared once, in `metrics/family.rs`. Labels are looked up when a handle is built; on the request
//! path only the children that a handle keeps are touched, for a look-up costs ten times as much. The registry is our
//! own and not the crate's global one, so that two gateways in one process do not count each other's exchanges.

mod acme;
pub mod call;
pub mod config;
pub mod driver;
pub mod endpoints;
pub mod family;
pub mod filters;
mod limits;
pub mod mirror;
mod phases;
mod refusals;
mod registry;
mod relay;
pub mod retry;
mod route;
mod tls;

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Instant;

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    CounterVec, Encoder, Gauge, GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec,
    TextEncoder,
};

use crate::error::{Refusal, refusal};
use crate::phase::Phase;
use call::CallMetrics;
use config::{ConfigMetrics, GenerationCollector, Generations};
use driver::DriverMetrics;
use endpoints::{EndpointCollector, EndpointMetrics, Group, Groups};
use filters::{Access, Admission, CompressMetrics, Loads, PasswordMetrics};
use mirror::MirrorMetrics;
use phases::{PhaseCollector, Roll};
use refusals::RefusalCollector;
use registry::Registry;
use retry::RetryMetrics;
use route::Series;

/// The route label of exchanges that found no route, or were refused before one was sought.
pub const UNROUTED: &str = "_none";
/// The value of the label `where` for what no phase or filter is to blame for.
pub const LOOP: &str = "loop";

pub use acme::{AcmeMetrics, ChallengeMetrics};
pub use limits::{LimitMetrics, QueueMetrics};
pub use phases::{PhaseState, Seat};
pub use refusals::RefusalMetrics;
pub use relay::RelayMetrics;
pub use tls::TlsMetrics;

pub use route::{Direction, Distribution, RouteFigures, RouteMetrics, Spills, Summary};

/// All metrics of one gateway. Clones are cheap and share everything.
#[derive(Clone)]
pub struct Metrics(Arc<Inner>);

/// Routes and filters with a series of exchanges that were skipped, and whether it was paid for.
type Skipping = HashMap<(Box<str>, Box<str>), bool>;

struct Inner {
    registry: Registry,
    families: Families,
    phases: Roll,
    refusals: RefusalMetrics,
    workers: IntGauge,
    routes_folded: IntGauge,
    series_left: AtomicU64,
    /// Those that somebody has, so that a route of the same name in the next configuration counts on.
    routes: Mutex<HashMap<Box<str>, Weak<RouteMetrics>>>,
    other: OnceLock<Arc<Series>>,
    /// The upstreams whose endpoints are counted, and what is kept of these endpoints.
    groups: Groups,
    endpoints: Mutex<endpoints::Known>,
    /// The filters of routes that have a series of exchanges that they skipped, and whether it was paid for.
    skipping: Mutex<Skipping>,
}

/// The families whose children are made after [`Metrics::new`].
struct Families {
    exchanges: IntCounterVec,
    exchange_seconds: HistogramVec,
    phase_seconds: HistogramVec,
    own_seconds: HistogramVec,
    driver_exchanges: IntCounterVec,
    write_blocked: CounterVec,
    upstream_held: HistogramVec,
    upstream_saved: CounterVec,
    spool_spills: IntCounterVec,
    bytes: IntCounterVec,
    client_connections: IntGaugeVec,
    client_connections_total: IntCounterVec,
    client_connections_limit: IntGaugeVec,
    accept_pauses: IntCounterVec,
    accept_paused: IntGaugeVec,
    client_requests: IntCounterVec,
    tls: tls::Families,
    acme: acme::Families,
    relays: relay::Families,
    upstream_selections: IntCounterVec,
    upstream_connects: IntCounterVec,
    upstream_connect_failures: IntCounterVec,
    upstream_connect_seconds: HistogramVec,
    upstream_wait_seconds: HistogramVec,
    upstream_discoveries: IntCounterVec,
    upstream_health_checks: IntCounterVec,
    upstream_connections: IntGaugeVec,
    upstream_ejections: IntCounterVec,
    upstream_panic: IntGaugeVec,
    retries: IntCounterVec,
    retries_refused: IntCounterVec,
    limits: limits::Families,
    mirrored: IntCounterVec,
    calls: IntCounterVec,
    call_seconds: HistogramVec,
    access: IntCounterVec,
    filter_loads: IntCounterVec,
    compressed_bytes: IntCounterVec,
    compress_busy: IntCounterVec,
    password_seconds: HistogramVec,
    password_waiting: IntGaugeVec,
    spool_bytes: IntGaugeVec,
    spool_limit: IntGaugeVec,
    spool_denials: IntCounterVec,
    slow_clients: IntGaugeVec,
    pressure_total: IntCounterVec,
    pressure: IntGaugeVec,
    disk_seconds: HistogramVec,
    disk_queue: IntGaugeVec,
    disk_failures: IntCounterVec,
    lane_waiting: IntGaugeVec,
    lane_share: GaugeVec,
    lane_overdue: IntCounterVec,
    lane_bytes: IntCounterVec,
    loop_lag: HistogramVec,
    stalled_workers: IntGaugeVec,
    stalls: IntCounterVec,
    filter_poll: HistogramVec,
    filter_skipped: IntCounterVec,
    access_log_lines: IntCounterVec,
    access_log_dropped: IntCounterVec,
    spans: IntCounterVec,
    admin_requests: IntCounterVec,
    admin_connections: IntGaugeVec,
    admin_connections_closed: IntCounterVec,
    admin_streams: IntGaugeVec,
    config: config::Families,
}

impl Metrics {
    /// The value of the label `version`.
    pub const VERSION: &str = env!("CARGO_PKG_VERSION");

    /// The value of the label `pingora`; `Cargo.toml` pins it.
    pub const PINGORA_VERSION: &str = "0.9.1";

    /// Metrics whose routes may make `series_max` series between them, and that show these refusals from the start.
    pub fn new(series_max: u64, refusals: Vec<&'static Refusal>) -> Self {
        let registry = Registry::default();
        let families = Families::register(&registry);
        let build_info = family::BUILD_INFO.gauge(&registry);
        build_info.with_label_values(&[Self::VERSION, Self::PINGORA_VERSION]).set(1);
        let phases = Roll::new(Instant::now());
        let refusals = RefusalMetrics::new(refusals);
        let groups = Groups::default();
        let collectors: [Box<dyn Collector>; 4] = [
            Box::new(EndpointCollector::new(groups.clone())),
            Box::new(RefusalCollector::new(refusals.clone())),
            Box::new(PhaseCollector::new(phases.clone())),
            Box::new(ProcessCollector::for_self()),
        ];
        for collector in collectors {
            registry.register(collector).expect(
                "no row of the table has the name of a process metric, nor is one there twice: a test registers them all",
            );
        }
        Metrics(Arc::new(Inner {
            phases,
            refusals,
            workers: single(&family::WORKERS.gauge(&registry)),
            routes_folded: single(&family::ROUTES_FOLDED.gauge(&registry)),
            series_left: AtomicU64::new(series_max),
            routes: Mutex::default(),
            other: OnceLock::new(),
            groups,
            endpoints: Mutex::default(),
            skipping: Mutex::default(),
            families,
            registry,
        }))
    }

    /// Those of the route of this name. Ask once, when the route is built, and keep it: when nobody has it any
    /// more, its series are removed.
    pub fn route(&self, name: &str) -> Arc<RouteMetrics> {
        let mut routes = self.routes();
        if let Some(known) = routes.get(name).and_then(Weak::upgrade) {
            return known;
        }
        let route = Arc::new(RouteMetrics::new(name, self.clone()));
        routes.insert(name.into(), Arc::downgrade(&route));
        route
    }

    /// Held for a look-up, or while the series of a route are removed; never on the way of a request.
    fn routes(&self) -> MutexGuard<'_, HashMap<Box<str>, Weak<RouteMetrics>>> {
        self.0.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was counted of all routes that are folded, if any are.
    pub fn folded(&self) -> Option<RouteFigures> {
        self.0.other.get().map(|series| series.figures())
    }

    /// How often this gateway refused, for each reason.
    pub fn refusals(&self) -> &RefusalMetrics {
        &self.0.refusals
    }

    /// Those of exchanges that found no route, or were refused before one was sought; labelled `_none`.
    pub fn unrouted(&self) -> Arc<RouteMetrics> {
        Arc::new(RouteMetrics::unbudgeted("_none", self.clone()))
    }

    /// Those of the listener of this name.
    pub fn listener(&self, name: &str) -> ListenerMetrics {
        let families = self.families();
        let open = |state| families.client_connections.with_label_values(&[name, state]);
        let requests = |protocol| families.client_requests.with_label_values(&[name, protocol]);
        ListenerMetrics {
            accepted: families.client_connections_total.with_label_values(&[name]),
            connections_max: families.client_connections_limit.with_label_values(&[name]),
            http1_requests: requests("http1"),
            h2_requests: requests("h2"),
            refusals: self.refusals().clone(),
            open: STATES.map(open),
        }
    }

    /// Those of the drivers of exchanges, for these reasons to go by Pingora's.
    pub fn driver(&self, reasons: impl IntoIterator<Item = &'static str>) -> DriverMetrics {
        DriverMetrics::of(&self.families().driver_exchanges, reasons)
    }

    /// Those of accepting connections, over all listeners.
    pub fn doorway(&self) -> DoorwayMetrics {
        let families = self.families();
        DoorwayMetrics {
            pauses: families.accept_pauses.with_label_values::<&str>(&[]),
            paused: single(&families.accept_paused),
        }
    }

    /// Those of the TLS of the listener of this name.
    pub fn tls(&self, listener: &str) -> TlsMetrics {
        self.families().tls.listener(listener)
    }

    /// Those of the issuer of certificates of this name.
    pub fn acme(&self, issuer: &str) -> AcmeMetrics {
        self.families().acme.issuer(issuer)
    }

    /// Those of the answers to issuers of certificates.
    pub fn challenges(&self) -> ChallengeMetrics {
        self.families().acme.challenges()
    }

    /// Those of what a listener passes on as it is, under this name.
    pub fn relay(&self, listener: &str, name: &str) -> RelayMetrics {
        self.families().relays.relay(listener, name)
    }

    /// Those of the upstream of this name.
    pub fn upstream(&self, name: &str) -> UpstreamMetrics {
        let families = self.families();
        let connects = |outcome| families.upstream_connects.with_label_values(&[name, outcome]);
        let discoveries = |outcome| families.upstream_discoveries.with_label_values(&[name, outcome]);
        let connect_failures = refusal::ALL.iter().filter_map(|&refusal| {
            let reason = refusal.reason.strip_prefix("connect.")?;
            Some((refusal, families.upstream_connect_failures.with_label_values(&[name, reason])))
        });
        UpstreamMetrics {
            connects_new: connects("new"),
            connects_reused: connects("reused"),
            connects_failed: connects("failed"),
            discoveries: DiscoveryMetrics {
                ok: discoveries("ok"),
                none: discoveries("none"),
                failed: discoveries("failed"),
            },
            connections: families.upstream_connections.with_label_values(&[name]),
            retries: RetryMetrics::of(name, &families.retries, &families.retries_refused),
            limits: families.limits.upstream(name),
            health_checks: families.upstream_health_checks.clone(),
            connect_failures: connect_failures.collect(),
            connect_seconds: families.upstream_connect_seconds.with_label_values(&[name]),
            wait_seconds: families.upstream_wait_seconds.with_label_values(&[name]),
            metrics: self.clone(),
            panic: families.upstream_panic.with_label_values(&[name]),
            ejections: families.upstream_ejections.clone(),
            name: name.into(),
        }
    }

    /// Counts the endpoints of this upstream whenever somebody asks, for as long as there is one.
    pub fn count_endpoints(&self, group: Weak<dyn Group>) {
        self.0.groups.add(group);
    }

    /// Held for a look-up, when an endpoint comes or goes.
    fn endpoints(&self) -> MutexGuard<'_, endpoints::Known> {
        self.0.endpoints.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those of the calls of this filter to the upstream of this name.
    pub fn calls(&self, filter: &str, upstream: &str) -> CallMetrics {
        CallMetrics::of(filter, upstream, &self.families().calls, &self.families().call_seconds)
    }

    /// Those of a filter of this route that lets some in and others not.
    pub fn admission(&self, route: &str, filter: &str) -> Admission {
        let route = if self.reserve_series(Access::ALL.len() as u64) { route } else { "_other" };
        Admission::of(route, filter, &self.families().access)
    }

    /// Those of what a filter of this route reads again and again.
    pub fn loads(&self, route: &str, filter: &str) -> Loads {
        let route = if self.reserve_series(2) { route } else { "_other" };
        Loads::of(route, filter, &self.families().filter_loads)
    }

    /// Those of answers that are compressed on this route.
    pub fn compress(&self, route: &str) -> CompressMetrics {
        let (families, route) = (self.families(), if self.reserve_series(7) { route } else { "_other" });
        CompressMetrics::of(route, &families.compressed_bytes, &families.compress_busy)
    }

    /// Those of hashing passwords.
    pub fn passwords(&self) -> PasswordMetrics {
        let families = self.families();
        PasswordMetrics {
            seconds: families.password_seconds.with_label_values::<&str>(&[]),
            waiting: single(&families.password_waiting),
        }
    }

    /// Those of the copies that the upstream of this name gets.
    pub fn mirror(&self, upstream: &str) -> MirrorMetrics {
        MirrorMetrics::of(upstream, &self.families().mirrored)
    }

    /// Those of all spools, of the budget and of the disk threads that they share.
    pub fn spools(&self) -> SpoolMetrics {
        let families = self.families();
        let bytes = |store| DIRECTIONS.map(|direction| families.spool_bytes.with_label_values(&[direction, store]));
        let limit = |store| families.spool_limit.with_label_values(&[store]);
        let operation = |operation| OperationMetrics {
            seconds: families.disk_seconds.with_label_values(&[operation]),
            failures: families.disk_failures.with_label_values(&[operation]),
        };
        let rung = |rung| RungMetrics {
            times: families.pressure_total.with_label_values(&[rung]),
            now: families.pressure.with_label_values(&[rung]),
        };
        SpoolMetrics {
            memory: bytes("memory"),
            disk: bytes("disk"),
            memory_limit: limit("memory"),
            disk_limit: limit("disk"),
            denials: DIRECTIONS.map(|direction| {
                SPOOL_LIMITS.map(|limit| families.spool_denials.with_label_values(&[direction, limit]))
            }),
            slow: DIRECTIONS.map(|direction| families.slow_clients.with_label_values(&[direction])),
            spill: rung("spill"),
            pause: rung("pause"),
            shed: rung("shed"),
            disk_queue: single(&families.disk_queue),
            write: operation("write"),
            read: operation("read"),
        }
    }

    /// Those of the paced lane of one worker; they are numbered from 0.
    pub fn lane(&self, worker: usize) -> LaneMetrics {
        let families = self.families();
        let worker = worker.to_string();
        LaneMetrics {
            waiting: LANE_CLASSES.map(|class| families.lane_waiting.with_label_values(&[&worker, class])),
            share: LANE_CLASSES.map(|class| families.lane_share.with_label_values(&[&worker, class])),
            overdue: LANE_CLASSES.map(|class| families.lane_overdue.with_label_values(&[&worker, class])),
            bytes: families.lane_bytes.with_label_values(&[&worker]),
        }
    }

    /// Those of the loops of so many workers, which are numbered from 0.
    pub fn loops(&self, workers: usize) -> LoopMetrics {
        let families = self.families();
        let lag = |worker: usize| families.loop_lag.with_label_values(&[&worker.to_string()]);
        for place in Phase::ALL.iter().map(|phase| phase.name()).chain([LOOP]) {
            families.stalls.with_label_values(&[place]);
        }
        LoopMetrics {
            lag: (0..workers).map(lag).collect(),
            stalled: single(&families.stalled_workers),
            stalls: families.stalls.clone(),
        }
    }

    /// How late the signs of life of this worker came, in the buckets of `forebay_loop_lag_seconds`.
    pub fn lag(&self, worker: usize) -> Distribution {
        Distribution::of(&self.families().loop_lag.with_label_values(&[&worker.to_string()]))
    }

    /// Workers that are stalled now.
    pub fn stalled_workers(&self) -> u64 {
        u64::try_from(single(&self.families().stalled_workers).get()).unwrap_or(0)
    }

    /// The time of the polls of the filters with this key. Ask once, when one is built.
    pub fn filter_polls(&self, key: &str) -> Histogram {
        self.families().stalls.with_label_values(&[key]);
        self.families().filter_poll.with_label_values(&[key])
    }

    /// Exchanges of a route in which a filter did nothing, for its condition did not hold. Ask once, when one is
    /// built. Routes beyond the limit of series are counted together.
    pub fn filter_skipped(&self, route: &str, key: &str) -> IntCounter {
        let mut skipping = self.skipping();
        let paid = *skipping.entry((route.into(), key.into())).or_insert_with(|| self.reserve_series(1));
        let route = if paid { route } else { "_other" };
        self.families().filter_skipped.with_label_values(&[route, key])
    }

    /// Held for a look-up, when a filter is built or a route is gone.
    fn skipping(&self) -> MutexGuard<'_, Skipping> {
        self.0.skipping.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes all series whose label `label` has one of these values: what they are about is gone. It looks at many
    /// series: call it off the workers.
    pub fn forget(&self, label: &str, gone: &BTreeSet<&str>) {
        self.0.registry.forget(label, |value| gone.contains(value));
        if label == "route" {
            self.skipping().retain(|(route, _), paid| {
                let stays = !gone.contains(&**route);
                if !stays && *paid {
                    self.release_series(1);
                }
                stays
            });
        }
    }

    /// Those of the configuration that runs.
    pub fn config(&self) -> ConfigMetrics {
        self.families().config.metrics()
    }

    /// Counts what goes by each generation of the configuration whenever somebody asks.
    pub fn count_generations(&self, generations: Arc<dyn Generations>) {
        self.collect_too(Box::new(GenerationCollector::new(generations)));
    }

    /// Asks one more whenever the metrics are rendered.
    pub fn collect_too(&self, collector: Box<dyn Collector>) {
        if let Err(error) = self.0.registry.register(collector) {
            tracing::error!("a part of the metrics cannot be shown: {error}");
        }
    }

    /// Those of the access log.
    pub fn access_log(&self) -> AccessLogMetrics {
        let families = self.families();
        let dropped = |reason| families.access_log_dropped.with_label_values(&[reason]);
        AccessLogMetrics {
            lines: families.access_log_lines.with_label_values::<&str>(&[]),
            dropped_full: dropped("full"),
            dropped_failed: dropped("failed"),
        }
    }

    /// Those of the spans of traces.
    pub fn spans(&self) -> SpanMetrics {
        let outcome = |outcome| self.families().spans.with_label_values(&[outcome]);
        SpanMetrics { exported: outcome("exported"), failed: outcome("failed"), dropped: outcome("dropped") }
    }

    /// Those of the admin endpoint.
    pub fn admin(&self) -> AdminMetrics {
        AdminMetrics {
            requests: self.families().admin_requests.clone(),
            connections: single(&self.families().admin_connections),
            closed: self.families().admin_connections_closed.with_label_values::<&str>(&[]),
            streams: single(&self.families().admin_streams),
        }
    }

    /// How many are in which phase now, and for how long, in the order of the phases.
    pub fn phases(&self) -> [PhaseState; Phase::COUNT] {
        self.0.phases.states(Instant::now())
    }

    /// Counts one more in `phase`, who has been in it `since`, until the seat is dropped.
    pub fn enter_phase(&self, phase: Phase, since: Instant) -> Seat {
        self.0.phases.take(phase, since)
    }

    /// Says how many worker threads there are.
    pub fn set_workers(&self, threads: usize) {
        self.0.workers.set(i64::try_from(threads).unwrap_or(i64::MAX));
    }

    /// Everything, in the text format 0.0.4. Takes milliseconds when there are many series: call it off the workers.
    pub fn render(&self) -> Vec<u8> {
        let mut text = Vec::with_capacity(64 * 1024);
        if let Err(error) = TextEncoder::new().encode(&self.0.registry.gather(), &mut text) {
            // Not reached as long as the families are well-formed; then a part is better than nothing.
            tracing::error!("the metrics could not be written down: {error}");
        }
        text
    }

    fn families(&self) -> &Families {
        &self.0.families
    }

    /// Takes so many series off the budget of the routes; `false` if it has fewer left.
    fn reserve_series(&self, series: u64) -> bool {
        let take = |left: u64| left.checked_sub(series);
        self.0.series_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    /// Gives back what was taken.
    fn release_series(&self, series: u64) {
        self.0.series_left.fetch_add(series, Ordering::Relaxed);
    }

    /// One route less is counted as another.
    fn unfold(&self) {
        self.0.routes_folded.dec();
    }

    /// The series of all routes that the budget has no room for, which this one now is.
    fn fold(&self, route: &str) -> Arc<Series> {
        let other = self.0.other.get_or_init(|| {
            tracing::warn!(
                "the route {route} and further ones are counted together as `_other`: \
                 the routes have reached observability.metrics.max_series"
            );
            Arc::new(Series::new("_other", self))
        });
        self.0.routes_folded.inc();
        other.clone()
    }
}

impl Families {
    fn register(registry: &Registry) -> Self {
        Families {
            exchanges: family::EXCHANGES.counter(registry),
            exchange_seconds: family::EXCHANGE_SECONDS.histogram(registry),
            phase_seconds: family::PHASE_SECONDS.histogram(registry),
            own_seconds: family::OWN_SECONDS.histogram(registry),
            driver_exchanges: family::DRIVER_EXCHANGES.counter(registry),
            write_blocked: family::WRITE_BLOCKED.seconds(registry),
            upstream_held: family::UPSTREAM_HELD.histogram(registry),
            upstream_saved: family::UPSTREAM_SAVED.seconds(registry),
            spool_spills: family::SPOOL_SPILLS.counter(registry),
            bytes: family::BYTES.counter(registry),
            client_connections: family::CLIENT_CONNECTIONS.gauge(registry),
            client_connections_total: family::CLIENT_CONNECTIONS_TOTAL.counter(registry),
            client_connections_limit: family::CLIENT_CONNECTIONS_LIMIT.gauge(registry),
            accept_pauses: family::ACCEPT_PAUSES.counter(registry),
            accept_paused: family::ACCEPT_PAUSED.gauge(registry),
            client_requests: family::CLIENT_REQUESTS.counter(registry),
            tls: tls::Families::register(registry),
            acme: acme::Families::register(registry),
            relays: relay::Families::register(registry),
            upstream_selections: family::UPSTREAM_SELECTIONS.counter(registry),
            upstream_connects: family::UPSTREAM_CONNECTS.counter(registry),
            upstream_connect_failures: family::UPSTREAM_CONNECT_FAILURES.counter(registry),
            upstream_connect_seconds: family::UPSTREAM_CONNECT_SECONDS.histogram(registry),
            upstream_wait_seconds: family::UPSTREAM_WAIT_SECONDS.histogram(registry),
            upstream_discoveries: family::UPSTREAM_DISCOVERIES.counter(registry),
            upstream_health_checks: family::UPSTREAM_HEALTH_CHECKS.counter(registry),
            upstream_connections: family::UPSTREAM_CONNECTIONS.gauge(registry),
            upstream_ejections: family::UPSTREAM_EJECTIONS.counter(registry),
            upstream_panic: family::UPSTREAM_PANIC.gauge(registry),
            retries: family::RETRIES.counter(registry),
            retries_refused: family::RETRIES_REFUSED.counter(registry),
            limits: limits::Families::register(registry),
            mirrored: family::MIRROR.counter(registry),
            calls: family::FILTER_CALLS.counter(registry),
            call_seconds: family::FILTER_CALL_SECONDS.histogram(registry),
            access: family::ACCESS.counter(registry),
            filter_loads: family::FILTER_LOADS.counter(registry),
            compressed_bytes: family::COMPRESSED_BYTES.counter(registry),
            compress_busy: family::COMPRESS_BUSY.counter(registry),
            password_seconds: family::PASSWORD_SECONDS.histogram(registry),
            password_waiting: family::PASSWORD_WAITING.gauge(registry),
            spool_bytes: family::SPOOL_BYTES.gauge(registry),
            spool_limit: family::SPOOL_LIMIT_BYTES.gauge(registry),
            spool_denials: family::SPOOL_DENIALS.counter(registry),
            slow_clients: family::SLOW_CLIENTS.gauge(registry),
            pressure_total: family::PRESSURE_TOTAL.counter(registry),
            pressure: family::PRESSURE.gauge(registry),
            disk_seconds: family::DISK_SECONDS.histogram(registry),
            disk_queue: family::DISK_QUEUE.gauge(registry),
            disk_failures: family::DISK_FAILURES.counter(registry),
            lane_waiting: family::LANE_WAITING.gauge(registry),
            lane_share: family::LANE_SHARE.ratio(registry),
            lane_overdue: family::LANE_OVERDUE.counter(registry),
            lane_bytes: family::LANE_BYTES.counter(registry),
            loop_lag: family::LOOP_LAG.histogram(registry),
            stalled_workers: family::STALLED_WORKERS.gauge(registry),
            stalls: family::STALLS.counter(registry),
            filter_poll: family::FILTER_POLL_SECONDS.histogram(registry),
            filter_skipped: family::FILTER_SKIPPED.counter(registry),
            access_log_lines: family::ACCESS_LOG_LINES.counter(registry),
            access_log_dropped: family::ACCESS_LOG_DROPPED.counter(registry),
            spans: family::SPANS.counter(registry),
            admin_requests: family::ADMIN_REQUESTS.counter(registry),
            admin_connections: family::ADMIN_CONNECTIONS.gauge(registry),
            admin_connections_closed: family::ADMIN_CONNECTIONS_CLOSED.counter(registry),
            admin_streams: family::ADMIN_STREAMS.gauge(registry),
            config: config::Families::register(registry),
        }
    }
}

/// The only child of a family without labels.
fn single(gauges: &IntGaugeVec) -> IntGauge {
    gauges.with_label_values::<&str>(&[])
}

/// What a client connection does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionState {
    /// Waits for its next request.
    Idle,
    /// What stands before HTTP arrives: the PROXY protocol, the TLS handshake.
    Handshake,
    /// A request header arrives.
    Header,
    /// It has an exchange or, on HTTP/2, several.
    Active,
}

/// The metrics of one listener.
pub struct ListenerMetrics {
    /// Connections that were accepted.
    pub accepted: IntCounter,
    /// Connections that may be open.
    pub connections_max: IntGauge,
    /// Requests over HTTP/1.
    pub http1_requests: IntCounter,
    /// Requests over HTTP/2.
    pub h2_requests: IntCounter,
    /// Of the whole gateway: for what is refused before there is an exchange.
    pub refusals: RefusalMetrics,
    /// In the order of `ConnectionState`.
    open: [IntGauge; 4],
}

/// The metrics of accepting connections.
pub struct DoorwayMetrics {
    /// Times that a listener stopped because open files ran short.
    pub pauses: IntCounter,
    /// Listeners that have stopped now.
    pub paused: IntGauge,
}

/// The values of the label `state` of connections, in the order of [`ConnectionState`].
const STATES: [&str; 4] = ["idle", "handshake", "header", "active"];

impl ListenerMetrics {
    /// Connections that are open now, by what they do.
    pub fn open(&self) -> [(&'static str, i64); 4] {
        std::array::from_fn(|state| (STATES[state], self.open[state].get()))
    }

    /// Moves a connection from one state to another: from `None` when it opens, to `None` when it closes.
    pub fn enter(&self, from: Option<ConnectionState>, to: Option<ConnectionState>) {
        shift(&self.open, from.map(|state| state as usize), to.map(|state| state as usize));
    }
}

/// Counts one less at `from` and one more at `to`.
fn shift(gauges: &[IntGauge], from: Option<usize>, to: Option<usize>) {
    if from == to {
        return;
    }
    if let Some(from) = from {
        gauges[from].dec();
    }
    if let Some(to) = to {
        gauges[to].inc();
    }
}

/// The values of the label `direction` of what is spooled, in the order in which gauges stand in [`SpoolMetrics`].
const DIRECTIONS: [&str; 2] = ["request", "response"];

/// The values of the label `limit` of what spools are denied: that of all of them, of responses, of one client, of one
/// response where others need room, and of files.
pub const SPOOL_LIMITS: [&str; 5] = ["all", "responses", "client", "spool", "files"];

/// The metrics of what spools share. Where there are two of a kind, the first is of requests and the second of
/// responses.
#[derive(Clone)]
pub struct SpoolMetrics {
    /// Bytes in memory.
    pub memory: [IntGauge; 2],
    /// Bytes that files have grown to.
    pub disk: [IntGauge; 2],
    /// Bytes that may be in memory.
    pub memory_limit: IntGauge,
    /// Bytes that files may have between them.
    pub disk_limit: IntGauge,
    /// Times that a spool got no more disk, in the order of [`SPOOL_LIMITS`].
    pub denials: [[IntCounter; SPOOL_LIMITS.len()]; 2],
    /// Clients that are waited for.
    pub slow: [IntGauge; 2],
    /// Writes to disk that only pressure caused.
    pub spill: RungMetrics,
    /// Spools that were made to wait.
    pub pause: RungMetrics,
    /// Exchanges that were turned away.
    pub shed: RungMetrics,
    /// Writes and reads that are queued or under way.
    pub disk_queue: IntGauge,
    /// Writes.
    pub write: OperationMetrics,
    /// Reads.
    pub read: OperationMetrics,
}

/// The metrics of one rung of the ladder that is climbed when memory runs short.
#[derive(Clone)]
pub struct RungMetrics {
    /// How often it was used.
    pub times: IntCounter,
    /// Whether it holds, or how many wait on it.
    pub now: IntGauge,
}

/// The metrics of one kind of work for the disk threads.
#[derive(Clone)]
pub struct OperationMetrics {
    /// From when it was queued until it was done, whatever came of it.
    pub seconds: Histogram,
    /// How often it failed.
    pub failures: IntCounter,
}

/// What a turn of the paced lane is for.
pub const LANE_CLASSES: [&str; 3] = ["newcomer", "pass", "spool"];

/// The metrics of the paced lane of one worker.
pub struct LaneMetrics {
    /// Exchanges that wait for their turn, as in `LANE_CLASSES`.
    pub waiting: [IntGauge; 3],
    /// Of its time, what the worker may give to them, from 0 to 1.
    pub share: [Gauge; 3],
    /// Turns that were given because they had been waited for for as long as may be.
    pub overdue: [IntCounter; 3],
    /// Bytes that were spooled.
    pub bytes: IntCounter,
}

/// The metrics of the workers' loops that are not read when they are asked for.
pub struct LoopMetrics {
    /// How late each worker's signs of life came.
    pub lag: Vec<Histogram>,
    /// Workers that are stalled now.
    pub stalled: IntGauge,
    stalls: IntCounterVec,
}

impl LoopMetrics {
    /// How often a worker was held up at this place, which is a phase, the key of a filter, or `loop`.
    pub fn stalls(&self, place: &str) -> IntCounter {
        self.stalls.with_label_values(&[place])
    }
}

/// The metrics of one upstream.
pub struct UpstreamMetrics {
    /// Exchanges for which a connection was made.
    pub connects_new: IntCounter,
    /// Exchanges that were given a connection that was kept.
    pub connects_reused: IntCounter,
    /// Attempts to connect that failed.
    pub connects_failed: IntCounter,
    /// What came of asking where its endpoints are.
    pub discoveries: DiscoveryMetrics,
    /// Connections that are open or being made.
    pub connections: IntGauge,
    /// Attempts that were repeated, and those that were not.
    pub retries: RetryMetrics,
    /// Of its limits.
    pub limits: LimitMetrics,
    health_checks: IntCounterVec,
    /// Times until new connections stood.
    pub connect_seconds: Histogram,
    /// Times from the end of a request to the header of its answer.
    pub wait_seconds: Histogram,
    /// For each refusal of the phase `connect`.
    connect_failures: Box<[(&'static Refusal, IntCounter)]>,
    metrics: Metrics,
    /// 1 while so few endpoints are available that all of them are asked.
    pub panic: IntGauge,
    ejections: IntCounterVec,
    name: Box<str>,
}

/// What came of asking where the endpoints of an upstream are.
#[derive(Clone)]
pub struct DiscoveryMetrics {
    /// They were told.
    pub ok: IntCounter,
    /// It was told that there are none.
    pub none: IntCounter,
    /// Nothing was told, or nothing that can be read.
    pub failed: IntCounter,
}

impl UpstreamMetrics {
    /// Those of the endpoints with this label, an address as written. Ask once, when one is built.
    pub fn endpoint(&self, label: &str) -> Arc<EndpointMetrics> {
        let key = (self.name.clone(), label.into());
        let mut known = self.metrics.endpoints();
        if let Some(endpoint) = known.get(&key).and_then(Weak::upgrade) {
            return endpoint;
        }
        let endpoint = Arc::new(EndpointMetrics::new(&self.name, label, &self.metrics));
        known.insert(key, Arc::downgrade(&endpoint));
        endpoint
    }

    /// Counts an attempt for which no connection came about.
    pub fn count_connect_failure(&self, why: &'static Refusal) {
        let counter = self.connect_failures.iter().find(|(refusal, _)| *refusal == why);
        counter.iter().for_each(|(_, count)| count.inc());
    }

    /// Counts the endpoints of this upstream whenever somebody asks, for as long as there is one.
    pub fn count_endpoints(&self, group: Weak<dyn Group>) {
        self.metrics.count_endpoints(group);
    }

    /// Those of its ejections, for these reasons. Ask once, when it is built.
    pub fn ejections(&self, reasons: impl IntoIterator<Item = &'static str>) -> EjectionMetrics {
        let counter = |reason| (reason, self.ejections.with_label_values(&[&*self.name, reason]));
        EjectionMetrics(reasons.into_iter().map(counter).collect())
    }

    /// Those of its health checks. Ask once, if it has any.
    pub fn health_checks(&self) -> HealthCheckMetrics {
        let outcome = |outcome| self.health_checks.with_label_values(&[&*self.name, outcome]);
        HealthCheckMetrics {
            passed: outcome("passed"),
            failed: outcome("failed"),
            timed_out: outcome("timeout"),
            late: outcome("late"),
            unable: outcome("unable"),
        }
    }
}

/// How often endpoints of one upstream were ejected.
pub struct EjectionMetrics(Vec<(&'static str, IntCounter)>);

impl EjectionMetrics {
    /// Counts one more, for one of the reasons that were named.
    pub fn count(&self, reason: &str) {
        if let Some((_, counter)) = self.0.iter().find(|(known, _)| *known == reason) {
            counter.inc();
        }
    }
}

/// The metrics of the health checks of one upstream.
pub struct HealthCheckMetrics {
    /// Checks that passed.
    pub passed: IntCounter,
    /// Checks that said something bad.
    pub failed: IntCounter,
    /// Checks that said nothing in time.
    pub timed_out: IntCounter,
    /// Checks that began late, because so many were under way.
    pub late: IntCounter,
    /// Checks for which the gateway itself had no descriptor, port or memory.
    pub unable: IntCounter,
}

/// The metrics of the access log.
pub struct AccessLogMetrics {
    /// Lines that were written.
    pub lines: IntCounter,
    /// Lines that found the queue full.
    pub dropped_full: IntCounter,
    /// Lines that could not be written.
    pub dropped_failed: IntCounter,
}

/// The metrics of the spans of traces.
pub struct SpanMetrics {
    /// Those that a collector has taken.
    pub exported: IntCounter,
    /// Those that it has not.
    pub failed: IntCounter,
    /// Those that found the queue full.
    pub dropped: IntCounter,
}

/// The metrics of the admin endpoint.
pub struct AdminMetrics {
    requests: IntCounterVec,
    connections: IntGauge,
    closed: IntCounter,
    streams: IntGauge,
}

impl AdminMetrics {
    /// Counts a request. `path` is of the endpoint's table and not the client's word. Looks labels up: nobody asks
    /// it often.
    pub fn count(&self, path: &str, status: u16) {
        self.requests.with_label_values(&[path, &status.to_string()]).inc();
    }

    /// So many connections are open.
    pub fn set_connections(&self, open: usize) {
        self.connections.set(i64::try_from(open).unwrap_or(i64::MAX));
    }

    /// Counts a connection that was closed because there were as many as may be.
    pub fn closed(&self) {
        self.closed.inc();
    }

    /// Counts an answer that goes on, until the guard is dropped.
    pub fn stream(&self) -> StreamGuard {
        self.streams.inc();
        StreamGuard(self.streams.clone())
    }
}

/// An answer of the admin endpoint that goes on.
pub struct StreamGuard(IntGauge);

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::error::refusal;
    use crate::phase::Clock;

    /// Metrics in which every family has a child, and what some of these live as long as.
    fn busy() -> (Metrics, impl Sized) {
        let metrics = Metrics::new(u64::MAX, refusal::ALL.to_vec());
        let clock = Clock::start(Phase::Header, Instant::now());
        let exchange = Summary { held: Some(Duration::ZERO), status: 200, ..route::tests::exchange(&clock) };
        let route = metrics.route("all");
        route.record(&exchange);
        route.spills(Direction::Request);
        metrics.listener("web");
        metrics.doorway();
        metrics.driver(["off"]);
        metrics.relay("web", "tcp");
        metrics.acme("ours").show("a.test", 0, 0);
        metrics.challenges();
        metrics.tls("web").show([("a.test", "RSA", 0)]);
        let upstream = metrics.upstream("app");
        let endpoint = upstream.endpoint("127.0.0.1:3000");
        upstream.health_checks();
        upstream.ejections(["latency"]);
        metrics.mirror("copy");
        metrics.calls("ask", "auth");
        metrics.admission("all", "jwt");
        metrics.loads("all", "jwt");
        metrics.passwords();
        metrics.compress("all");
        let group: Arc<dyn Group> = Arc::new(endpoints::tests::Two);
        metrics.count_endpoints(Arc::downgrade(&group));
        metrics.spools();
        metrics.lane(0);
        metrics.filter_polls("respond");
        metrics.filter_skipped("all", "respond");
        crate::eventloop::tests::attach(&metrics);
        metrics.access_log();
        metrics.spans();
        metrics.admin().count("/", 200);
        metrics.set_workers(2);
        metrics.config().show(1, "a1b2");
        let generations: Arc<dyn Generations> = Arc::new(config::tests::One);
        metrics.count_generations(generations);
        (metrics, (route, endpoint, group))
    }

    fn text(metrics: &Metrics) -> String {
        String::from_utf8(metrics.render()).unwrap()
    }

    #[test]
    fn every_family_is_rendered_with_its_help_type_and_labels() {
        let (metrics, _route) = busy();
        let text = text(&metrics);
        for family in family::ALL.iter().filter(|family| cfg!(tokio_unstable) || !family.is_unstable()) {
            let head = format!("# HELP {0} {1}\n# TYPE {0} {2}\n", family.name, family.help, family.kind.name());
            assert!(text.contains(&head), "{head} is missing in\n{text}");
            let sample = text.lines().find(|line| line.starts_with(family.name)).unwrap();
            for label in family.labels {
                assert!(sample.contains(&format!("{label}=\"")), "{label} is missing in {sample}");
            }
        }
    }

    #[test]
    fn two_gateways_in_one_process_count_apart() {
        let ((one, _route), two) = (busy(), Metrics::new(u64::MAX, Vec::new()));
        one.listener("web").accepted.inc();
        two.listener("web");
        assert!(text(&one).contains(r#"forebay_client_connections_total{listener="web"} 1"#));
        assert!(text(&two).contains(r#"forebay_client_connections_total{listener="web"} 0"#));
    }

    #[test]
    fn a_gauge_follows_an_exchange_through_its_phases() {
        let (metrics, _route) = busy();
        let seat = metrics.enter_phase(Phase::Header, Instant::now());
        seat.enter(Phase::Wait, Instant::now() - Duration::from_secs(5));
        assert!(text(&metrics).contains("forebay_phase_active{phase=\"wait\"} 1\n"));
        assert!(text(&metrics).contains("forebay_phase_active{phase=\"header\"} 0\n"));
        drop(seat);
        assert!(text(&metrics).contains("forebay_phase_active{phase=\"wait\"} 0\n"));
        assert!(text(&metrics).contains("forebay_phase_oldest_seconds{phase=\"wait\"} 0\n"));
    }

    #[test]
    fn a_connection_is_in_one_state_at_a_time() {
        let (metrics, _route) = busy();
        let listener = metrics.listener("web");
        listener.enter(None, Some(ConnectionState::Idle));
        listener.enter(Some(ConnectionState::Idle), Some(ConnectionState::Active));
        assert!(text(&metrics).contains(r#"forebay_client_connections{listener="web",state="idle"} 0"#));
        assert!(text(&metrics).contains(r#"forebay_client_connections{listener="web",state="active"} 1"#));
    }

    #[test]
    fn every_refusal_is_there_before_it_was_ever_uttered() {
        let (metrics, _route) = busy();
        let text = text(&metrics);
        for row in refusal::ALL {
            assert!(text.contains(&format!("forebay_refusals_total{{reason=\"{}\"}}", row.reason)), "{row:?}");
        }
    }

    #[test]
    fn the_version_of_pingora_is_the_one_that_is_locked() {
        let lock = include_str!("../Cargo.lock");
        assert!(lock.contains(&format!("name = \"pingora\"\nversion = \"{}\"\n", Metrics::PINGORA_VERSION)));
    }

    /// Every child that a route can make is paid for.
    #[test]
    fn a_route_reserves_what_it_may_use() {
        let metrics = Metrics::new(u64::MAX, Vec::new());
        let start = Instant::now();
        let mut clock = Clock::start(Phase::Accept, start);
        for phase in Phase::ALL {
            clock.credit(phase, Duration::from_millis(1));
        }
        let route = metrics.route("all");
        for status in [0, 101, 200, 302, 404, 502, 503, 600] {
            route.record(&Summary { status, ..route::tests::exchange(&clock) });
        }
        route.spills(Direction::Request);
        route.spills(Direction::Response);
        let series = text(&metrics).lines().filter(|line| line.contains(r#"route="all""#)).count();
        assert_eq!(series as u64, RouteMetrics::SERIES);
    }
}
