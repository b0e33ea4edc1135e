//! Metrics of endpoints, collected on each scrape: their number by state, availability and active attempts.
//!
//! `forebay_upstream_endpoints`, `forebay_endpoint_available` and `forebay_endpoint_inflight` are not stored but
//! computed from the endpoints themselves. So they cost nothing on the request path, cannot drift, and removed
//! endpoints leave no series.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use prometheus::IntCounter;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;

use super::family::Family;
use super::{Metrics, family};

/// A group of endpoints: an upstream.
pub trait Group: Send + Sync {
    /// The value of the label `upstream`.
    fn name(&self) -> &str;

    /// All possible states of an endpoint.
    fn states(&self) -> Vec<&'static str>;

    /// Calls `tell` for each endpoint.
    fn each(&self, tell: &mut dyn FnMut(Present<'_>));
}

/// An endpoint at the time of a scrape.
#[derive(Clone, Copy, Debug)]
pub struct Present<'e> {
    /// The value of the label `endpoint`; several endpoints may share it.
    pub label: &'e str,
    /// One of [`Group::states`].
    pub state: &'static str,
    /// Whether it gets requests.
    pub available: bool,
    /// Number of active attempts.
    pub inflight: u32,
}

/// The existing groups; dropped ones are removed. Clones share them.
#[derive(Clone, Default)]
pub(super) struct Groups(Arc<Mutex<Vec<Weak<dyn Group>>>>);

impl Groups {
    /// Adds a group.
    pub(super) fn add(&self, group: Weak<dyn Group>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(group);
    }

    /// The existing groups. The lock is not held while they are counted.
    fn present(&self) -> Vec<Arc<dyn Group>> {
        let mut groups = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        groups.retain(|group| group.strong_count() > 0);
        groups.iter().filter_map(Weak::upgrade).collect()
    }
}

/// Collects the metrics for a scrape.
pub(super) struct EndpointCollector {
    groups: Groups,
    descs: [Desc; 3],
}

impl EndpointCollector {
    /// A collector for these groups.
    pub(super) fn new(groups: Groups) -> Self {
        let families = [&family::UPSTREAM_ENDPOINTS, &family::ENDPOINT_AVAILABLE, &family::ENDPOINT_INFLIGHT];
        EndpointCollector { groups, descs: families.map(Family::describe) }
    }
}

impl Collector for EndpointCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let groups = self.groups.present();
        // By name, since two groups may share one while a configuration replaces another.
        let mut states: BTreeMap<(&str, &str), u32> = BTreeMap::new();
        let mut endpoints: BTreeMap<(&str, String), (u32, u32)> = BTreeMap::new();
        for group in &groups {
            for state in group.states() {
                states.entry((group.name(), state)).or_default();
            }
            group.each(&mut |present| {
                *states.entry((group.name(), present.state)).or_default() += 1;
                let (available, inflight) = endpoints.entry((group.name(), present.label.to_owned())).or_default();
                *available += u32::from(present.available);
                *inflight += present.inflight;
            });
        }
        let states = states
            .iter()
            .map(|((group, state), &number)| family::UPSTREAM_ENDPOINTS.sample(&[group, state], number.into()));
        let figure = |family: &'static Family, figure: fn(&(u32, u32)) -> u32| {
            let samples = endpoints
                .iter()
                .map(|((group, endpoint), figures)| family.sample(&[group, endpoint], figure(figures).into()));
            family.read(samples.collect())
        };
        vec![
            family::UPSTREAM_ENDPOINTS.read(states.collect()),
            figure(&family::ENDPOINT_AVAILABLE, |(available, _)| *available),
            figure(&family::ENDPOINT_INFLIGHT, |(_, inflight)| *inflight),
        ]
    }
}

/// The metrics of all endpoints with one label. Their series are removed on drop.
pub struct EndpointMetrics {
    /// Number of selections.
    pub selections: IntCounter,
    metrics: Metrics,
    upstream: Box<str>,
    label: Box<str>,
}

/// The metrics in use, by upstream and label.
pub(super) type Known = std::collections::HashMap<(Box<str>, Box<str>), Weak<EndpointMetrics>>;

impl EndpointMetrics {
    pub(super) fn new(upstream: &str, label: &str, metrics: &Metrics) -> Self {
        let selections = metrics.families().upstreams.selections.with_label_values(&[upstream, label]);
        EndpointMetrics { selections, metrics: metrics.clone(), upstream: upstream.into(), label: label.into() }
    }
}

impl Drop for EndpointMetrics {
    /// If metrics with the same label were created meanwhile, they keep the series.
    fn drop(&mut self) {
        let mut known = self.metrics.endpoints();
        let key = (self.upstream.clone(), self.label.clone());
        if known.get(&key).is_some_and(|known| std::ptr::eq(known.as_ptr(), self)) {
            known.remove(&key);
            let labels = [&*self.upstream, &*self.label];
            // An error means that the series is already gone.
            let _ = self.metrics.families().upstreams.selections.remove_label_values(&labels);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Two endpoints with one label.
    pub struct Two;

    impl Group for Two {
        fn name(&self) -> &str {
            "app"
        }

        fn states(&self) -> Vec<&'static str> {
            vec!["healthy", "draining"]
        }

        fn each(&self, tell: &mut dyn FnMut(Present<'_>)) {
            for (state, available, inflight) in [("healthy", true, 2), ("healthy", false, 3)] {
                tell(Present { label: "a.test:80", state, available, inflight });
            }
        }
    }

    fn text(metrics: &Metrics) -> String {
        String::from_utf8(metrics.render()).unwrap()
    }

    #[test]
    fn addresses_of_one_name_are_counted_together_until_their_group_is_gone() {
        let metrics = Metrics::new(0, Vec::new());
        let group: Arc<dyn Group> = Arc::new(Two);
        metrics.count_endpoints(Arc::downgrade(&group));
        let before = text(&metrics);
        for line in [
            r#"forebay_upstream_endpoints{upstream="app",state="healthy"} 2"#,
            r#"forebay_upstream_endpoints{upstream="app",state="draining"} 0"#,
            r#"forebay_endpoint_available{upstream="app",endpoint="a.test:80"} 1"#,
            r#"forebay_endpoint_inflight{upstream="app",endpoint="a.test:80"} 5"#,
        ] {
            assert!(before.lines().any(|l| l == line), "{line} is missing in\n{before}");
        }
        drop(group);
        assert!(!text(&metrics).contains("forebay_endpoint_inflight{"));
    }

    #[test]
    fn the_last_endpoint_of_a_label_takes_its_series_along_and_one_that_follows_it_counts_on() {
        let metrics = Metrics::new(0, Vec::new());
        let upstream = metrics.upstream("app");
        let one = upstream.endpoint("a.test:80");
        one.selections.inc();
        let two = upstream.endpoint("a.test:80");
        drop(one);
        two.selections.inc();
        assert!(
            text(&metrics).contains("forebay_upstream_selections_total{endpoint=\"a.test:80\",upstream=\"app\"} 2")
        );
        drop(two);
        assert!(!text(&metrics).contains("forebay_upstream_selections_total{"));
    }
}
