//! Metrics of the exchanges of one route.
//!
//! Series are created when first needed and then kept, so that exchanges look up no labels, and unused routes cost
//! no memory: 10,000 routes with every phase would be 130,000 histograms.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use prometheus::core::Metric;
use prometheus::{Counter, Histogram, IntCounter};

use super::Metrics;
use super::family::{self, vectors};
use crate::error::Refusal;
use crate::phase::{Clock, Phase};

vectors! {
    /// The families of all routes.
    struct Families {
        exchanges: counter EXCHANGES,
        exchange_seconds: histogram EXCHANGE_SECONDS,
        phase_seconds: histogram PHASE_SECONDS,
        own_seconds: histogram OWN_SECONDS,
        driver_exchanges: counter DRIVER_EXCHANGES,
        write_blocked: seconds WRITE_BLOCKED,
        upstream_held: histogram UPSTREAM_HELD,
        upstream_saved: seconds UPSTREAM_SAVED,
        spool_spills: counter SPOOL_SPILLS,
        bytes: counter BYTES,
    }
}

/// What a finished exchange adds to the metrics of its route.
#[derive(Clone, Copy, Debug)]
pub struct Summary<'a> {
    /// Its time per phase; settled.
    pub clock: &'a Clock,
    /// Time of Forebay itself: the polls of the exchange's future.
    pub own: Duration,
    /// How long writes to the client were blocked while its response was still being received.
    pub blocked: Duration,
    /// How long it used upstream connections, all attempts together; `None` if there was none.
    pub held: Option<Duration>,
    /// How long the client was served after the upstream had been released.
    pub saved: Duration,
    /// The status sent to the client; 0 if none was sent.
    pub status: u16,
    /// Bytes received from the client.
    pub received: u64,
    /// Bytes sent to the client.
    pub sent: u64,
    /// Why Forebay refused or cut it, if it did.
    pub refusal: Option<&'static Refusal>,
}

impl<'a> Summary<'a> {
    /// An exchange of which only the times are known.
    pub fn new(clock: &'a Clock) -> Self {
        Summary {
            clock,
            own: Duration::ZERO,
            blocked: Duration::ZERO,
            held: None,
            saved: Duration::ZERO,
            status: 0,
            received: 0,
            sent: 0,
            refusal: None,
        }
    }
}

/// The direction of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To the upstream.
    Request,
    /// To the client.
    Response,
}

impl Direction {
    /// The value of the label `direction`.
    pub fn name(self) -> &'static str {
        match self {
            Direction::Request => "request",
            Direction::Response => "response",
        }
    }
}

/// Counts bodies of a route and direction that went to disk, by reason. Clones share the counts.
#[derive(Clone, Debug)]
pub struct Spills {
    /// The body exceeded the memory limit of its route.
    pub memory: IntCounter,
    /// Memory was short.
    pub pressure: IntCounter,
}

/// The metrics of one route.
///
/// A route gets its own series at its first exchange, if `max_series` has room for [`RouteMetrics::SERIES`];
/// otherwise it uses those of `_other` permanently. First come, first served: routes in use are visible.
///
/// The series live as long as this value. When the route is removed and its last exchange has ended, they are
/// removed, and their room becomes available.
pub struct RouteMetrics {
    name: Box<str>,
    metrics: Metrics,
    series: OnceLock<Arc<Series>>,
    /// Whether its series count against `max_series`.
    budgeted: bool,
}

impl RouteMetrics {
    /// The number of series reserved for a route: all phases and classes, and eight different codes.
    ///
    /// Reserving the maximum, instead of counting series as they are created, keeps a route whole: a route never
    /// has some series of its own and others in `_other`.
    pub const SERIES: u64 = Phase::COUNT as u64 * family::PHASE_SECONDS.series()
        + CLASSES.len() as u64 * family::EXCHANGE_SECONDS.series()
        + family::OWN_SECONDS.series()
        + family::WRITE_BLOCKED.series()
        + family::UPSTREAM_HELD.series()
        + family::UPSTREAM_SAVED.series()
        + 2 * 2 * family::SPOOL_SPILLS.series()
        + 2 * family::BYTES.series()
        + 8 * family::EXCHANGES.series();

    pub(super) fn new(name: &str, metrics: Metrics) -> Self {
        RouteMetrics { name: name.into(), metrics, series: OnceLock::new(), budgeted: true }
    }

    /// Metrics under this name, regardless of `max_series`.
    pub(super) fn unbudgeted(name: &str, metrics: Metrics) -> Self {
        let series = Arc::new(Series::new(name, &metrics));
        RouteMetrics { name: name.into(), metrics, series: OnceLock::from(series), budgeted: false }
    }

    /// The name of the route, even if it is counted as `_other`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Counts a finished exchange.
    pub fn record(&self, exchange: &Summary<'_>) {
        self.series().record(&self.metrics, exchange);
    }

    /// The current counts.
    pub fn figures(&self) -> RouteFigures {
        let Some(series) = self.series.get() else { return RouteFigures::default() };
        match self.metrics.0.other.get() {
            Some(other) if Arc::ptr_eq(series, other) => RouteFigures { folded: true, ..RouteFigures::default() },
            _ => series.figures(),
        }
    }

    /// The counters for bodies of this direction that go to disk.
    pub fn spills(&self, direction: Direction) -> Spills {
        self.series().spills(direction, &self.metrics).clone()
    }

    /// Removes its series. If metrics with the same name were created meanwhile, they keep them.
    fn forget(&self) {
        let mut routes = self.metrics.routes();
        let current = routes.get(&*self.name).is_some_and(|known| std::ptr::eq(known.as_ptr(), self));
        if current {
            routes.remove(&*self.name);
        }
        let Some(series) = self.series.get() else { return };
        if series.route != self.name {
            return self.metrics.unfold();
        }
        if current {
            series.forget(&self.metrics.families().routes);
        }
        self.metrics.release_series(Self::SERIES);
    }

    fn series(&self) -> &Series {
        self.series.get_or_init(|| match self.metrics.reserve_series(Self::SERIES) {
            true => Arc::new(Series::new(&self.name, &self.metrics)),
            false => self.metrics.fold(&self.name),
        })
    }
}

impl Drop for RouteMetrics {
    fn drop(&mut self) {
        if self.budgeted {
            self.forget();
        }
    }
}

/// The counts of a route at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouteFigures {
    /// It is counted in `_other`.
    pub folded: bool,
    /// Exchanges by status class; only classes that occurred.
    pub classes: Vec<(&'static str, u64)>,
    /// Durations of exchanges, in the buckets of `forebay_exchange_seconds`.
    pub seconds: Distribution,
    /// Bytes received from clients.
    pub received: u64,
    /// Bytes sent to clients.
    pub sent: u64,
}

/// The counts of a histogram at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Distribution {
    /// The sum of all observations.
    pub sum: f64,
    /// The count per bucket; the last one has no upper bound.
    pub buckets: Vec<u64>,
}

impl Distribution {
    /// The counts of this histogram.
    pub(super) fn of(histogram: &Histogram) -> Self {
        let read = histogram.metric();
        let read = read.get_histogram();
        let upto = read.get_bucket().iter().map(|bucket| bucket.cumulative_count()).chain([read.get_sample_count()]);
        let mut below = 0;
        // A concurrent observation may make a cumulative count smaller than the one before it.
        let count = |upto: u64| {
            let within = upto.saturating_sub(below);
            below += within;
            within
        };
        let buckets = upto.map(count).collect();
        Distribution { sum: read.get_sample_sum(), buckets }
    }

    fn add(&mut self, other: &Distribution) {
        self.sum += other.sum;
        self.buckets.resize(self.buckets.len().max(other.buckets.len()), 0);
        self.buckets.iter_mut().zip(&other.buckets).for_each(|(bucket, more)| *bucket += more);
    }
}

/// The values of `code_class`, in the order of [`class_index`].
const CLASSES: [&str; 7] = ["none", "1xx", "2xx", "3xx", "4xx", "5xx", "other"];

/// The series with one value of `route`.
pub(super) struct Series {
    route: Box<str>,
    phases: [OnceLock<Histogram>; Phase::COUNT],
    classes: [OnceLock<Box<Class>>; CLASSES.len()],
    own: Histogram,
    blocked: Counter,
    held: OnceLock<Histogram>,
    saved: Counter,
    /// In the order of [`Direction`].
    spills: [OnceLock<Spills>; 2],
    received: IntCounter,
    sent: IntCounter,
}

/// The series of one status class.
struct Class {
    seconds: Histogram,
    /// Indexed by the last two digits of the code.
    codes: [OnceLock<IntCounter>; 100],
}

impl Series {
    pub(super) fn new(route: &str, metrics: &Metrics) -> Self {
        let families = &metrics.families().routes;
        Series {
            route: route.into(),
            phases: Default::default(),
            classes: Default::default(),
            own: families.own_seconds.with_label_values(&[route]),
            blocked: families.write_blocked.with_label_values(&[route]),
            held: OnceLock::new(),
            saved: families.upstream_saved.with_label_values(&[route]),
            spills: Default::default(),
            received: families.bytes.with_label_values(&[route, "received"]),
            sent: families.bytes.with_label_values(&[route, "sent"]),
        }
    }

    /// Removes every series that was created.
    fn forget(&self, families: &Families) {
        let route = &*self.route;
        // An error means that it is already gone.
        for (phase, _) in Phase::ALL.iter().zip(&self.phases).filter(|(_, made)| made.get().is_some()) {
            let _ = families.phase_seconds.remove_label_values(&[route, phase.name()]);
        }
        for (index, class) in self.classes.iter().enumerate().filter_map(|(index, made)| Some((index, made.get()?))) {
            let _ = families.exchange_seconds.remove_label_values(&[route, CLASSES[index]]);
            for (slot, _) in class.codes.iter().enumerate().filter(|(_, made)| made.get().is_some()) {
                let _ = families.exchanges.remove_label_values(&[route, &code_label(index, slot)]);
            }
        }
        for (direction, _) in ["request", "response"].iter().zip(&self.spills).filter(|(_, made)| made.get().is_some())
        {
            for reason in ["memory", "pressure"] {
                let _ = families.spool_spills.remove_label_values(&[route, direction, reason]);
            }
        }
        for direction in ["received", "sent"] {
            let _ = families.bytes.remove_label_values(&[route, direction]);
        }
        let _ = families.upstream_held.remove_label_values(&[route]);
        let _ = families.own_seconds.remove_label_values(&[route]);
        let _ = families.write_blocked.remove_label_values(&[route]);
        let _ = families.upstream_saved.remove_label_values(&[route]);
    }

    fn record(&self, metrics: &Metrics, exchange: &Summary<'_>) {
        for phase in Phase::ALL {
            if let Some(spent) = exchange.clock.spent(phase) {
                self.phase(phase, metrics).observe(spent.as_secs_f64());
            }
        }
        let class = self.class(exchange.status, metrics);
        class.seconds.observe(exchange.clock.total().as_secs_f64());
        self.code(class, exchange.status, metrics).inc();
        self.own.observe(exchange.own.as_secs_f64());
        self.blocked.inc_by(exchange.blocked.as_secs_f64());
        if let Some(held) = exchange.held {
            let make = || metrics.families().routes.upstream_held.with_label_values(&[&*self.route]);
            self.held.get_or_init(make).observe(held.as_secs_f64());
        }
        self.saved.inc_by(exchange.saved.as_secs_f64());
        self.received.inc_by(exchange.received);
        self.sent.inc_by(exchange.sent);
        if let Some(refusal) = exchange.refusal {
            metrics.refusals().count(refusal);
        }
    }

    pub(super) fn figures(&self) -> RouteFigures {
        let mut figures =
            RouteFigures { received: self.received.get(), sent: self.sent.get(), ..RouteFigures::default() };
        for (name, class) in CLASSES.into_iter().zip(&self.classes) {
            if let Some(class) = class.get() {
                let seconds = Distribution::of(&class.seconds);
                figures.classes.push((name, seconds.buckets.iter().sum()));
                figures.seconds.add(&seconds);
            }
        }
        figures
    }

    fn phase(&self, phase: Phase, metrics: &Metrics) -> &Histogram {
        let make = || metrics.families().routes.phase_seconds.with_label_values(&[&*self.route, phase.name()]);
        self.phases[phase.index()].get_or_init(make)
    }

    fn spills(&self, direction: Direction, metrics: &Metrics) -> &Spills {
        self.spills[direction as usize].get_or_init(|| {
            let spills = |reason| {
                metrics.families().routes.spool_spills.with_label_values(&[&*self.route, direction.name(), reason])
            };
            Spills { memory: spills("memory"), pressure: spills("pressure") }
        })
    }

    fn class(&self, status: u16, metrics: &Metrics) -> &Class {
        let index = class_index(status);
        self.classes[index].get_or_init(|| {
            let seconds = metrics.families().routes.exchange_seconds.with_label_values(&[&*self.route, CLASSES[index]]);
            Box::new(Class { seconds, codes: [const { OnceLock::new() }; 100] })
        })
    }

    fn code<'c>(&self, class: &'c Class, status: u16, metrics: &Metrics) -> &'c IntCounter {
        let slot = if (100..600).contains(&status) { usize::from(status % 100) } else { 0 };
        class.codes[slot].get_or_init(|| {
            let label = code_label(class_index(status), slot);
            metrics.families().routes.exchanges.with_label_values(&[&*self.route, &label])
        })
    }
}

/// The value of `code` for an index within a class. Unknown statuses share one series, so that a backend cannot
/// create hundreds.
fn code_label(class: usize, slot: usize) -> String {
    if class == CLASSES.len() - 1 { "other".to_owned() } else { format!("{:03}", class * 100 + slot) }
}

fn class_index(status: u16) -> usize {
    match status {
        0 => 0,
        100..600 => usize::from(status / 100),
        _ => CLASSES.len() - 1,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Instant;

    use super::*;

    pub(in super::super) fn exchange(clock: &Clock) -> Summary<'_> {
        Summary {
            clock,
            own: Duration::from_micros(40),
            blocked: Duration::from_millis(7),
            held: Some(Duration::from_millis(30)),
            saved: Duration::from_millis(250),
            status: 200,
            received: 100,
            sent: 2_000,
            refusal: None,
        }
    }

    fn with_status(clock: &Clock, status: u16) -> Summary<'_> {
        Summary { status, ..exchange(clock) }
    }

    fn clock() -> Clock {
        let start = Instant::now();
        let mut clock = Clock::start(Phase::Header, start);
        clock.enter(Phase::Wait, start + Duration::from_millis(2));
        clock.settle(start + Duration::from_millis(32));
        clock
    }

    fn text(metrics: &Metrics) -> String {
        String::from_utf8(metrics.render()).unwrap()
    }

    #[test]
    fn an_exchange_is_counted_by_phase_class_and_code() {
        let metrics = Metrics::new(u64::MAX, Vec::new());
        let route = metrics.route("api");
        route.record(&with_status(&clock(), 204));
        route.record(&with_status(&clock(), 204));

        let text = text(&metrics);
        for line in [
            r#"forebay_exchanges_total{code="204",route="api"} 2"#,
            r#"forebay_exchange_seconds_count{code_class="2xx",route="api"} 2"#,
            r#"forebay_exchange_seconds_sum{code_class="2xx",route="api"} 0.064"#,
            r#"forebay_phase_seconds_count{phase="wait",route="api"} 2"#,
            r#"forebay_phase_seconds_bucket{phase="wait",route="api",le="0.01"} 0"#,
            r#"forebay_phase_seconds_bucket{phase="wait",route="api",le="0.05"} 2"#,
            r#"forebay_own_seconds_bucket{route="api",le="0.00005"} 2"#,
            r#"forebay_upstream_held_seconds_count{route="api"} 2"#,
            r#"forebay_upstream_held_seconds_bucket{route="api",le="0.05"} 2"#,
            r#"forebay_upstream_saved_seconds_total{route="api"} 0.5"#,
            r#"forebay_bytes_total{direction="received",route="api"} 200"#,
            r#"forebay_bytes_total{direction="sent",route="api"} 4000"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        }
        assert!(!text.contains(r#"phase="queue",route"#), "a phase that was never entered is counted");
    }

    #[test]
    fn no_answer_and_an_unheard_of_status_have_a_code_too() {
        let metrics = Metrics::new(u64::MAX, Vec::new());
        let route = metrics.route("api");
        for status in [0, 600, 999, 42] {
            route.record(&with_status(&clock(), status));
        }

        let text = text(&metrics);
        assert!(text.contains(r#"forebay_exchanges_total{code="000",route="api"} 1"#), "{text}");
        assert!(text.contains(r#"forebay_exchanges_total{code="other",route="api"} 3"#), "{text}");
        assert!(text.contains(r#"forebay_exchange_seconds_count{code_class="none",route="api"} 1"#), "{text}");
    }

    #[test]
    fn routes_beyond_the_budget_are_counted_as_other() {
        let metrics = Metrics::new(2 * RouteMetrics::SERIES + 1, Vec::new());
        let routes: Vec<_> = ["unused", "a", "b", "c", "d"].map(|name| metrics.route(name)).into();
        for route in &routes[1..] {
            route.record(&with_status(&clock(), 200));
        }

        let text = text(&metrics);
        assert!(text.contains(r#"forebay_exchanges_total{code="200",route="b"} 1"#), "{text}");
        assert!(text.contains(r#"forebay_exchanges_total{code="200",route="_other"} 2"#), "{text}");
        assert!(!text.contains(r#"route="c""#), "{text}");
        assert!(text.contains("forebay_routes_folded 2"), "{text}");
    }

    #[test]
    fn an_exchange_that_connected_nothing_held_nothing() {
        let metrics = Metrics::new(u64::MAX, Vec::new());
        let clock = clock();
        let route = metrics.route("api");
        route.record(&Summary { held: None, saved: Duration::ZERO, ..exchange(&clock) });

        let text = text(&metrics);
        assert!(!text.contains("forebay_upstream_held_seconds"), "{text}");
        assert!(text.contains(r#"forebay_upstream_saved_seconds_total{route="api"} 0"#), "{text}");
    }

    #[test]
    fn spills_are_counted_by_direction_and_reason_and_folded_with_their_route() {
        let metrics = Metrics::new(RouteMetrics::SERIES, Vec::new());
        let (first, second, third) = (metrics.route("first"), metrics.route("second"), metrics.route("third"));
        first.spills(Direction::Request).memory.inc();
        first.spills(Direction::Request).memory.inc();
        first.spills(Direction::Response).pressure.inc();
        second.spills(Direction::Response).memory.inc();
        third.spills(Direction::Response).memory.inc();
        third.record(&with_status(&clock(), 200));

        let text = text(&metrics);
        for line in [
            r#"forebay_spool_spills_total{direction="request",reason="memory",route="first"} 2"#,
            r#"forebay_spool_spills_total{direction="request",reason="pressure",route="first"} 0"#,
            r#"forebay_spool_spills_total{direction="response",reason="pressure",route="first"} 1"#,
            r#"forebay_spool_spills_total{direction="response",reason="memory",route="_other"} 2"#,
            "forebay_routes_folded 2",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        }
        assert!(!text.contains(r#"direction="request",reason="memory",route="_other""#), "{text}");
    }

    /// Creates every possible series.
    fn use_to_the_full(route: &RouteMetrics) {
        let mut clock = clock();
        for phase in Phase::ALL {
            clock.credit(phase, Duration::from_millis(1));
        }
        for status in [0, 101, 204, 302, 404, 502, 600, 999] {
            route.record(&with_status(&clock, status));
        }
        route.spills(Direction::Request);
        route.spills(Direction::Response);
    }

    #[test]
    fn a_route_that_is_gone_leaves_nothing_but_room() {
        let metrics = Metrics::new(RouteMetrics::SERIES, Vec::new());
        let (old, folded) = (metrics.route("old"), metrics.route("folded"));
        use_to_the_full(&old);
        use_to_the_full(&folded);
        let exchange = old.clone();
        drop(old);
        assert!(text(&metrics).contains(r#"route="old""#), "an exchange still has it");
        drop(exchange);
        drop(folded);
        let left = text(&metrics);
        assert!(!left.contains(r#"route="old""#), "{left}");
        assert!(left.contains("forebay_routes_folded 0"), "{left}");

        let new = metrics.route("new");
        use_to_the_full(&new);
        assert!(text(&metrics).contains(r#"route="new""#), "there is room for another");
    }

    #[test]
    fn a_route_that_stays_counts_on() {
        let metrics = Metrics::new(RouteMetrics::SERIES, Vec::new());
        let before = metrics.route("api");
        before.record(&with_status(&clock(), 200));
        let after = metrics.route("api");
        drop(before);
        after.record(&with_status(&clock(), 200));
        let text = text(&metrics);
        assert!(text.contains(r#"forebay_exchanges_total{code="200",route="api"} 2"#), "{text}");
        assert!(text.contains("forebay_routes_folded 0"), "{text}");
    }

    #[test]
    fn exchanges_without_a_route_are_counted_even_without_a_budget() {
        let metrics = Metrics::new(0, Vec::new());
        metrics.unrouted().record(&with_status(&clock(), 404));

        let text = text(&metrics);
        assert!(text.contains(r#"forebay_exchanges_total{code="404",route="_none"} 1"#), "{text}");
        assert!(text.contains("forebay_routes_folded 0"), "{text}");
    }

    #[test]
    fn a_route_that_nobody_asks_for_makes_no_series() {
        let metrics = Metrics::new(u64::MAX, Vec::new());
        let before = text(&metrics).lines().count();
        let _routes: Vec<_> = (0..10_000).map(|n| metrics.route(&format!("route-{n}"))).collect();
        assert_eq!(text(&metrics).lines().count(), before);
    }
}
