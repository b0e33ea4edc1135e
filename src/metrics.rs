//! What Forebay counts: the handles that the rest of it touches, and the text that Prometheus reads.
//!
//! Each metric is declared once, in `metrics/family.rs`. Labels are looked up when a handle is built; on the request
//! path only the children that a handle keeps are touched, for a look-up costs ten times as much. The registry is our
//! own and not the crate's global one, so that two gateways in one process do not count each other's exchanges.

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
use phases::{PhaseCollector, Roll};
use refusals::RefusalCollector;
use registry::Registry;
use route::Series;

/// The route label of exchanges that found no route, or were refused before one was sought.
pub const UNROUTED: &str = "_none";
/// The value of the label `where` for what no phase or filter is to blame for.
pub const LOOP: &str = "loop";

pub use acme::{AcmeMetrics, ChallengeMetrics};
pub use admin::{AdminMetrics, StreamGuard};
pub use eventloop::{LANE_CLASSES, LaneMetrics, LoopMetrics};
pub use limits::{LimitMetrics, QueueMetrics};
pub use listener::{ConnectionState, DoorwayMetrics, ListenerMetrics};
pub use outputs::{AccessLogMetrics, SpanMetrics};
pub use phases::{PhaseState, Seat};
pub use refusals::RefusalMetrics;
pub use relay::RelayMetrics;
pub use route::{Direction, Distribution, RouteFigures, RouteMetrics, Spills, Summary};
pub use spool::{OperationMetrics, RungMetrics, SPOOL_LIMITS, SpoolMetrics};
pub use tls::TlsMetrics;
pub use upstream::{CheckPlaces, DiscoveryMetrics, EjectionMetrics, HealthCheckMetrics, UpstreamMetrics};

use upgrade::UpgradeMetrics;

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
    /// Those in use, so that a route of the same name in the next configuration counts on.
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

    /// Those of the route of this name. Ask once, when the route is built, and keep it: when it is dropped, its
    /// series are removed.
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
        self.families().listeners.listener(name, self.refusals().clone())
    }

    /// Those of the drivers of exchanges, for these reasons to go by Pingora's.
    pub fn driver(&self, reasons: impl IntoIterator<Item = &'static str>) -> DriverMetrics {
        DriverMetrics::of(&self.families().routes.driver_exchanges, reasons)
    }

    /// Those of accepting connections, over all listeners.
    pub fn doorway(&self) -> DoorwayMetrics {
        self.families().listeners.doorway()
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
        families.upstreams.upstream(name, families.limits.upstream(name), self.clone())
    }

    /// Those of the places that all health checks share.
    pub fn check_places(&self) -> CheckPlaces {
        self.families().upstreams.check_places()
    }

    /// Counts the endpoints of this upstream on each scrape, for as long as there is one.
    pub fn count_endpoints(&self, group: Weak<dyn Group>) {
        self.0.groups.add(group);
    }

    /// Held for a look-up, when an endpoint comes or goes.
    fn endpoints(&self) -> MutexGuard<'_, endpoints::Known> {
        self.0.endpoints.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those of the calls of this filter to the upstream of this name.
    pub fn calls(&self, filter: &str, upstream: &str) -> CallMetrics {
        CallMetrics::of(filter, upstream, &self.families().filters.calls, &self.families().filters.call_seconds)
    }

    /// Those of a filter of this route that lets some in and others not.
    pub fn admission(&self, route: &str, filter: &str) -> Admission {
        let route = if self.reserve_series(Access::ALL.len() as u64) { route } else { "_other" };
        Admission::of(route, filter, &self.families().filters.access)
    }

    /// Those of what a filter of this route reads again and again.
    pub fn loads(&self, route: &str, filter: &str) -> Loads {
        let route = if self.reserve_series(2) { route } else { "_other" };
        Loads::of(route, filter, &self.families().filters.loads)
    }

    /// Those of answers that are compressed on this route.
    pub fn compress(&self, route: &str) -> CompressMetrics {
        let (families, route) = (self.families(), if self.reserve_series(7) { route } else { "_other" });
        CompressMetrics::of(route, &families.filters.compressed_bytes, &families.filters.compress_busy)
    }

    /// Those of bodies that are decoded on this route in this direction.
    pub fn decompress(&self, route: &str, direction: Direction) -> DecompressMetrics {
        let route = if self.reserve_series(DecompressMetrics::SERIES) { route } else { "_other" };
        let families = &self.families().filters;
        DecompressMetrics::of(route, direction, &families.decompress, &families.decompressed_bytes)
    }

    /// Those of bodies that are changed on this route in this direction.
    pub fn body(&self, route: &str, direction: Direction) -> BodyMetrics {
        let route = if self.reserve_series(BodyMetrics::SERIES) { route } else { "_other" };
        let families = &self.families().filters;
        BodyMetrics::of(route, direction, &families.body_changes, &families.body_replacements)
    }

    /// Those of error pages on this route.
    pub fn error_pages(&self, route: &str) -> ErrorPageMetrics {
        let route = if self.reserve_series(ErrorPageMetrics::SERIES) { route } else { "_other" };
        ErrorPageMetrics::of(route, &self.families().filters.error_pages)
    }

    /// Those of hashing passwords.
    pub fn passwords(&self) -> PasswordMetrics {
        let families = self.families();
        PasswordMetrics {
            seconds: families.filters.password_seconds.with_label_values::<&str>(&[]),
            waiting: single(&families.filters.password_waiting),
        }
    }

    /// Those of the copies that the upstream of this name gets.
    pub fn mirror(&self, upstream: &str) -> MirrorMetrics {
        MirrorMetrics::of(upstream, &self.families().filters.mirrored)
    }

    /// Those of all spools, of the budget and of the disk threads that they share.
    pub fn spools(&self) -> SpoolMetrics {
        self.families().spools.spools()
    }

    /// Those of the paced lane of one worker; they are numbered from 0.
    pub fn lane(&self, worker: usize) -> LaneMetrics {
        self.families().loops.lane(worker)
    }

    /// Those of the loops of this many workers, which are numbered from 0.
    pub fn loops(&self, workers: usize) -> LoopMetrics {
        self.families().loops.loops(workers)
    }

    /// How late the signs of life of this worker came, in the buckets of `forebay_loop_lag_seconds`.
    pub fn lag(&self, worker: usize) -> Distribution {
        Distribution::of(&self.families().loops.lag_of(worker))
    }

    /// Workers that are stalled now.
    pub fn stalled_workers(&self) -> u64 {
        u64::try_from(single(&self.families().loops.stalled).get()).unwrap_or(0)
    }

    /// The time of the polls of the filters with this key. Ask once, when one is built.
    pub fn filter_polls(&self, key: &str) -> Histogram {
        self.families().loops.stalls.with_label_values(&[key]);
        self.families().filters.poll.with_label_values(&[key])
    }

    /// Exchanges of a route in which a filter did nothing, for its condition did not hold. Ask once, when one is
    /// built. Routes beyond the limit of series are counted together.
    pub fn filter_skipped(&self, route: &str, key: &str) -> IntCounter {
        let mut skipping = self.skipping();
        let paid = *skipping.entry((route.into(), key.into())).or_insert_with(|| self.reserve_series(1));
        let route = if paid { route } else { "_other" };
        self.families().filters.skipped.with_label_values(&[route, key])
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

    /// What is counted of upgrades.
    pub fn upgrades(&self) -> UpgradeMetrics {
        self.families().upgrade.metrics()
    }

    /// Counts what goes by each generation of the configuration, on each scrape.
    pub fn count_generations(&self, generations: Arc<dyn Generations>) {
        self.collect_too(Box::new(GenerationCollector::new(generations)));
    }

    /// Asks one more whenever the metrics are rendered, for as long as the gateway runs.
    ///
    /// A filter is built for each place where it is written, and anew with each reload. One with metrics of its own keeps
    /// them in a `static` (a vector in an `OnceLock`, say) and hands a clone in whenever it is built: the first one is
    /// asked from then on, and another one with the same names and labels is left out, so nothing is counted twice and
    /// nothing begins anew. A vector that is made anew with each build would be left out after the first reload, and its
    /// counts would be seen nowhere. Nothing is removed here: series of routes and upstreams that are gone are the
    /// filter's own to remove. Names begin with the key of the filter, since those of Forebay begin with `forebay_`.
    ///
    /// One that is not well-formed, or has the name of another with other labels, is left out as well; the log tells it.
    pub fn collect_too(&self, collector: Box<dyn Collector>) {
        match self.0.registry.register(collector) {
            Ok(()) | Err(prometheus::Error::AlreadyReg) => {}
            Err(error) => tracing::error!("a part of the metrics cannot be shown: {error}"),
        }
    }

    /// Those of the access log.
    pub fn access_log(&self) -> AccessLogMetrics {
        self.families().outputs.access_log()
    }

    /// Those of the spans of traces.
    pub fn spans(&self) -> SpanMetrics {
        self.families().outputs.spans()
    }

    /// Those of the admin endpoint.
    pub fn admin(&self) -> AdminMetrics {
        self.families().admin.admin()
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

    /// Takes this many series off the budget of the routes; `false` if it has fewer left.
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

/// The only child of a family without labels.
fn single(gauges: &IntGaugeVec) -> IntGauge {
    gauges.with_label_values::<&str>(&[])
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
