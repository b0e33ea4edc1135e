//! The metrics of Forebay: handles for the code that counts, and the text for Prometheus.
//!
//! Each metric is declared once, in `metrics/family.rs`. Labels are looked up when a handle is created. The request
//! path only uses the series that a handle holds, since a look-up costs ten times as much. Each gateway has its own
//! registry instead of the crate's global one, so that two gateways in one process have separate counts.

mod acme;
mod admin;
pub mod bodies;
pub mod call;
pub mod config;
pub mod driver;
pub mod endpoints;
mod eventloop;
pub mod family;
pub mod filters;
mod limits;
mod listener;
pub mod mirror;
mod outputs;
mod phases;
mod refusals;
mod registry;
mod relay;
pub mod retry;
mod route;
mod spool;
mod tls;
pub mod upgrade;
mod upstream;

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Instant;

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{Encoder, Histogram, IntCounter, IntGauge, IntGaugeVec, TextEncoder};

use crate::error::Refusal;
use crate::phase::Phase;
use bodies::{BodyMetrics, DecompressMetrics};
use call::CallMetrics;
use config::{ConfigMetrics, GenerationCollector, Generations};
use driver::DriverMetrics;
use endpoints::{EndpointCollector, Group, Groups};
use filters::{Access, Admission, CompressMetrics, ErrorPageMetrics, Loads, PasswordMetrics};
use mirror::MirrorMetrics;
use phases::{PhaseCollector, PhaseTable};
use refusals::RefusalCollector;
use registry::Registry;
use route::Series;

/// The value of the label `route` for exchanges that matched no route, or were refused before routing.
pub const UNROUTED: &str = "_none";
/// The value of the label `where` for stalls that no phase or filter causes.
pub const LOOP: &str = "loop";

pub use acme::{AcmeMetrics, ChallengeMetrics};
pub use admin::{AdminMetrics, StreamGuard};
pub use eventloop::{LoopMetrics, SCHEDULER_CLASSES, SchedulerMetrics};
pub use limits::{LimitMetrics, QueueMetrics};
pub use listener::{ConnectionState, DoorwayMetrics, ListenerMetrics};
pub use outputs::{AccessLogMetrics, SpanMetrics};
pub use phases::{PhaseGuard, PhaseState};
pub use refusals::RefusalMetrics;
pub use relay::RelayMetrics;
pub use route::{Direction, Distribution, RouteFigures, RouteMetrics, Spills, Summary};
pub use spool::{ActionMetrics, OperationMetrics, SPOOL_LIMITS, SpoolMetrics};
pub use tls::TlsMetrics;
pub use upstream::{CheckPlaces, DiscoveryMetrics, EjectionMetrics, HealthCheckMetrics, UpstreamMetrics};

use upgrade::UpgradeMetrics;

/// All metrics of one gateway. Clones are cheap and share everything.
#[derive(Clone)]
pub struct Metrics(Arc<Inner>);

/// The series of exchanges skipped by a filter, by route and filter, and whether the series counts against the budget.
type Skipping = HashMap<(Box<str>, Box<str>), bool>;

struct Inner {
    registry: Registry,
    families: Families,
    phases: PhaseTable,
    refusals: RefusalMetrics,
    workers: IntGauge,
    routes_folded: IntGauge,
    series_left: AtomicU64,
    /// The metrics in use. A route with the same name in the next configuration continues them.
    routes: Mutex<HashMap<Box<str>, Weak<RouteMetrics>>>,
    other: OnceLock<Arc<Series>>,
    /// The upstreams whose endpoints are counted, and the metrics of these endpoints.
    groups: Groups,
    endpoints: Mutex<endpoints::Known>,
    /// The series of exchanges that filters skipped.
    skipping: Mutex<Skipping>,
}

/// The families whose series are created after [`Metrics::new`].
struct Families {
    routes: route::Families,
    listeners: listener::Families,
    tls: tls::Families,
    acme: acme::Families,
    relays: relay::Families,
    upstreams: upstream::Families,
    limits: limits::Families,
    filters: filters::Families,
    spools: spool::Families,
    loops: eventloop::Families,
    outputs: outputs::Families,
    admin: admin::Families,
    config: config::Families,
    upgrade: upgrade::Families,
}

impl Families {
    fn register(registry: &Registry) -> Self {
        Families {
            routes: route::Families::register(registry),
            listeners: listener::Families::register(registry),
            tls: tls::Families::register(registry),
            acme: acme::Families::register(registry),
            relays: relay::Families::register(registry),
            upstreams: upstream::Families::register(registry),
            limits: limits::Families::register(registry),
            filters: filters::Families::register(registry),
            spools: spool::Families::register(registry),
            loops: eventloop::Families::register(registry),
            outputs: outputs::Families::register(registry),
            admin: admin::Families::register(registry),
            config: config::Families::register(registry),
            upgrade: upgrade::Families::register(registry),
        }
    }
}

impl Metrics {
    /// The value of the label `version`.
    pub const VERSION: &str = env!("CARGO_PKG_VERSION");

    /// The value of the label `pingora`; `Cargo.toml` pins it.
    pub const PINGORA_VERSION: &str = "0.9.1";

    /// Creates the metrics of a gateway. `series_max`: the budget of series for all routes; `refusals`: the reasons
    /// that are exported from the start.
    pub fn new(series_max: u64, refusals: Vec<&'static Refusal>) -> Self {
        let registry = Registry::default();
        let families = Families::register(&registry);
        let build_info = family::BUILD_INFO.gauge(&registry);
        build_info.with_label_values(&[Self::VERSION, Self::PINGORA_VERSION]).set(1);
        let phases = PhaseTable::new(Instant::now());
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

    /// The metrics of the route with this name. Call once, when the route is built, and keep the result: its series are
    /// removed on drop.
    pub fn route(&self, name: &str) -> Arc<RouteMetrics> {
        let mut routes = self.routes();
        if let Some(known) = routes.get(name).and_then(Weak::upgrade) {
            return known;
        }
        let route = Arc::new(RouteMetrics::new(name, self.clone()));
        routes.insert(name.into(), Arc::downgrade(&route));
        route
    }

    /// Held for a look-up, or while the series of a route are removed; never on the request path.
    fn routes(&self) -> MutexGuard<'_, HashMap<Box<str>, Weak<RouteMetrics>>> {
        self.0.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The counts of all routes without their own series, if there are any.
    pub fn folded(&self) -> Option<RouteFigures> {
        self.0.other.get().map(|series| series.figures())
    }

    /// The counts of this gateway's refusals, by reason.
    pub fn refusals(&self) -> &RefusalMetrics {
        &self.0.refusals
    }

    /// The metrics of exchanges that matched no route, or were refused before routing; labelled `_none`.
    pub fn unrouted(&self) -> Arc<RouteMetrics> {
        Arc::new(RouteMetrics::unbudgeted("_none", self.clone()))
    }

    /// The metrics of the listener with this name.
    pub fn listener(&self, name: &str) -> ListenerMetrics {
        self.families().listeners.listener(name, self.refusals().clone())
    }

    /// The metrics of the drivers of exchanges. `reasons`: the reasons to use Pingora's driver.
    pub fn driver(&self, reasons: impl IntoIterator<Item = &'static str>) -> DriverMetrics {
        DriverMetrics::of(&self.families().routes.driver_exchanges, reasons)
    }

    /// The metrics of accepting connections, for all listeners.
    pub fn doorway(&self) -> DoorwayMetrics {
        self.families().listeners.doorway()
    }

    /// The TLS metrics of the listener with this name.
    pub fn tls(&self, listener: &str) -> TlsMetrics {
        self.families().tls.listener(listener)
    }

    /// The metrics of the certificate issuer with this name.
    pub fn acme(&self, issuer: &str) -> AcmeMetrics {
        self.families().acme.issuer(issuer)
    }

    /// The metrics of responses to challenges of issuers.
    pub fn challenges(&self) -> ChallengeMetrics {
        self.families().acme.challenges()
    }

    /// The metrics of connections that a listener relays under this name.
    pub fn relay(&self, listener: &str, name: &str) -> RelayMetrics {
        self.families().relays.relay(listener, name)
    }

    /// The metrics of the upstream with this name.
    pub fn upstream(&self, name: &str) -> UpstreamMetrics {
        let families = self.families();
        families.upstreams.upstream(name, families.limits.upstream(name), self.clone())
    }

    /// The metrics of the places that all health checks share.
    pub fn check_places(&self) -> CheckPlaces {
        self.families().upstreams.check_places()
    }

    /// Counts the endpoints of this upstream on each scrape, as long as it exists.
    pub fn count_endpoints(&self, group: Weak<dyn Group>) {
        self.0.groups.add(group);
    }

    /// Held for a look-up, when an endpoint is added or removed.
    fn endpoints(&self) -> MutexGuard<'_, endpoints::Known> {
        self.0.endpoints.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The metrics of the calls from this filter to the upstream with this name.
    pub fn calls(&self, filter: &str, upstream: &str) -> CallMetrics {
        CallMetrics::of(filter, upstream, &self.families().filters.calls, &self.families().filters.call_seconds)
    }

    /// The metrics of an access control filter of this route.
    pub fn admission(&self, route: &str, filter: &str) -> Admission {
        let route = if self.reserve_series(Access::ALL.len() as u64) { route } else { "_other" };
        Admission::of(route, filter, &self.families().filters.access)
    }

    /// The metrics of the data that a filter of this route reloads.
    pub fn loads(&self, route: &str, filter: &str) -> Loads {
        let route = if self.reserve_series(2) { route } else { "_other" };
        Loads::of(route, filter, &self.families().filters.loads)
    }

    /// The metrics of response compression on this route.
    pub fn compress(&self, route: &str) -> CompressMetrics {
        let (families, route) = (self.families(), if self.reserve_series(7) { route } else { "_other" });
        CompressMetrics::of(route, &families.filters.compressed_bytes, &families.filters.compress_busy)
    }

    /// The metrics of decoded bodies on this route in this direction.
    pub fn decompress(&self, route: &str, direction: Direction) -> DecompressMetrics {
        let route = if self.reserve_series(DecompressMetrics::SERIES) { route } else { "_other" };
        let families = &self.families().filters;
        DecompressMetrics::of(route, direction, &families.decompress, &families.decompressed_bytes)
    }

    /// The metrics of changed bodies on this route in this direction.
    pub fn body(&self, route: &str, direction: Direction) -> BodyMetrics {
        let route = if self.reserve_series(BodyMetrics::SERIES) { route } else { "_other" };
        let families = &self.families().filters;
        BodyMetrics::of(route, direction, &families.body_changes, &families.body_replacements)
    }

    /// The metrics of error pages on this route.
    pub fn error_pages(&self, route: &str) -> ErrorPageMetrics {
        let route = if self.reserve_series(ErrorPageMetrics::SERIES) { route } else { "_other" };
        ErrorPageMetrics::of(route, &self.families().filters.error_pages)
    }

    /// The metrics of password hashing.
    pub fn passwords(&self) -> PasswordMetrics {
        let families = self.families();
        PasswordMetrics {
            seconds: families.filters.password_seconds.with_label_values::<&str>(&[]),
            waiting: single(&families.filters.password_waiting),
        }
    }

    /// The metrics of copies for the upstream with this name.
    pub fn mirror(&self, upstream: &str) -> MirrorMetrics {
        MirrorMetrics::of(upstream, &self.families().filters.mirrored)
    }

    /// The metrics of all spools, and of their shared budget and disk threads.
    pub fn spools(&self) -> SpoolMetrics {
        self.families().spools.spools()
    }

    /// The metrics of the scheduler of a worker; workers are numbered from 0.
    pub fn scheduler(&self, worker: usize) -> SchedulerMetrics {
        self.families().loops.scheduler(worker)
    }

    /// The metrics of the event loops of this number of workers, numbered from 0.
    pub fn loops(&self, workers: usize) -> LoopMetrics {
        self.families().loops.loops(workers)
    }

    /// The lag of this worker, in the buckets of `forebay_loop_lag_seconds`.
    pub fn lag(&self, worker: usize) -> Distribution {
        Distribution::of(&self.families().loops.lag_of(worker))
    }

    /// Number of stalled workers.
    pub fn stalled_workers(&self) -> u64 {
        u64::try_from(single(&self.families().loops.stalled).get()).unwrap_or(0)
    }

    /// The poll times of filters with this key. Call once, when a filter is built.
    pub fn filter_polls(&self, key: &str) -> Histogram {
        self.families().loops.stalls.with_label_values(&[key]);
        self.families().filters.poll.with_label_values(&[key])
    }

    /// The counter of exchanges of a route in which a filter was skipped because its condition was false. Call once,
    /// when a filter is built. Routes beyond the budget of series share one counter.
    pub fn filter_skipped(&self, route: &str, key: &str) -> IntCounter {
        let mut skipping = self.skipping();
        let paid = *skipping.entry((route.into(), key.into())).or_insert_with(|| self.reserve_series(1));
        let route = if paid { route } else { "_other" };
        self.families().filters.skipped.with_label_values(&[route, key])
    }

    /// Held for a look-up, when a filter is built or a route is removed.
    fn skipping(&self) -> MutexGuard<'_, Skipping> {
        self.0.skipping.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes all series whose label `label` has one of these values. It scans many series: call it off the workers.
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

    /// The metrics of the active configuration.
    pub fn config(&self) -> ConfigMetrics {
        self.families().config.metrics()
    }

    /// The metrics of upgrades.
    pub fn upgrades(&self) -> UpgradeMetrics {
        self.families().upgrade.metrics()
    }

    /// Counts the exchanges and connections of each generation of the configuration, on each scrape.
    pub fn count_generations(&self, generations: Arc<dyn Generations>) {
        self.collect_too(Box::new(GenerationCollector::new(generations)));
    }

    /// Adds a collector, which is collected on each scrape as long as the gateway runs.
    ///
    /// A filter is built for each place where it is configured, and again on each reload. A filter with its own metrics
    /// must keep them in a `static` (such as a vector in an `OnceLock`) and pass a clone whenever it is built. The
    /// first one is collected from then on, and any other one with the same names and labels is ignored. As a result,
    /// nothing is counted twice, and the counts survive reloads. A new vector per build would be ignored after the
    /// first reload, and its counts would be lost. This registry removes no series of the collector: the filter itself
    /// must remove the series of routes and upstreams that no longer exist. Names begin with the key of the filter,
    /// since those of Forebay begin with `forebay_`.
    ///
    /// A collector that is malformed, or has the name of another one with other labels, is ignored with a message in
    /// the log.
    pub fn collect_too(&self, collector: Box<dyn Collector>) {
        match self.0.registry.register(collector) {
            Ok(()) | Err(prometheus::Error::AlreadyReg) => {}
            Err(error) => tracing::error!("a part of the metrics cannot be shown: {error}"),
        }
    }

    /// The metrics of the access log.
    pub fn access_log(&self) -> AccessLogMetrics {
        self.families().outputs.access_log()
    }

    /// The metrics of the spans of traces.
    pub fn spans(&self) -> SpanMetrics {
        self.families().outputs.spans()
    }

    /// The metrics of the admin endpoint.
    pub fn admin(&self) -> AdminMetrics {
        self.families().admin.admin()
    }

    /// The number of exchanges in each phase, and the age of the oldest one, in the order of the phases.
    pub fn phases(&self) -> [PhaseState; Phase::COUNT] {
        self.0.phases.states(Instant::now())
    }

    /// Counts an exchange in `phase`, in which it has been since `since`, until the seat is dropped.
    pub fn enter_phase(&self, phase: Phase, since: Instant) -> PhaseGuard {
        self.0.phases.take(phase, since)
    }

    /// Sets the number of worker threads.
    pub fn set_workers(&self, threads: usize) {
        self.0.workers.set(i64::try_from(threads).unwrap_or(i64::MAX));
    }

    /// All metrics in the text format 0.0.4. Takes milliseconds with many series: call it off the workers.
    pub fn render(&self) -> Vec<u8> {
        let mut text = Vec::with_capacity(64 * 1024);
        if let Err(error) = TextEncoder::new().encode(&self.0.registry.gather(), &mut text) {
            // Only possible with a malformed family; then a part is better than nothing.
            tracing::error!("the metrics could not be written down: {error}");
        }
        text
    }

    fn families(&self) -> &Families {
        &self.0.families
    }

    /// Takes this number of series from the budget of the routes. `false` if fewer are left.
    fn reserve_series(&self, series: u64) -> bool {
        let take = |left: u64| left.checked_sub(series);
        self.0.series_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    /// Returns series to the budget.
    fn release_series(&self, series: u64) {
        self.0.series_left.fetch_add(series, Ordering::Relaxed);
    }

    /// Reports that a route without its own series was removed.
    fn unfold(&self) {
        self.0.routes_folded.dec();
    }

    /// The series that all routes beyond the budget share. `route` now uses them.
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

/// The only series of a family without labels.
fn single(gauges: &IntGaugeVec) -> IntGauge {
    gauges.with_label_values::<&str>(&[])
}

/// Decrements the gauge `from` and increments the gauge `to`.
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::error::refusal;
    use crate::phase::Clock;

    /// Metrics in which every family has a series, and the guards that keep some of these series.
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
        metrics.upgrades();
        metrics.tls("web").show([("a.test", "RSA", 0)]);
        let upstream = metrics.upstream("app");
        let endpoint = upstream.endpoint("127.0.0.1:3000");
        upstream.health_checks();
        upstream.check_places();
        upstream.ejections(["latency"]);
        metrics.mirror("copy");
        metrics.calls("ask", "auth");
        metrics.admission("all", "jwt");
        metrics.loads("all", "jwt");
        metrics.passwords();
        metrics.compress("all");
        metrics.decompress("all", Direction::Request);
        metrics.body("all", Direction::Response);
        metrics.error_pages("all");
        let group: Arc<dyn Group> = Arc::new(endpoints::tests::Two);
        metrics.count_endpoints(Arc::downgrade(&group));
        metrics.spools();
        metrics.scheduler(0);
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
    fn metrics_of_a_filter_that_is_built_again_go_on() {
        let metrics = Metrics::new(100, Vec::new());
        let bytes =
            prometheus::IntCounterVec::new(prometheus::Opts::new("toll_total", "How often."), &["who"]).unwrap();
        metrics.collect_too(Box::new(bytes.clone()));
        bytes.with_label_values(&["a"]).inc();
        metrics.collect_too(Box::new(bytes.clone()));
        bytes.with_label_values(&["a"]).inc();
        assert_eq!(text(&metrics).matches("toll_total{who=\"a\"} 2").count(), 1);
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

    /// Every series that a route can create is reserved.
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
