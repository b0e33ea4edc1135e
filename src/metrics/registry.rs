//! The registry of a gateway, which can also remove the series of things that no longer exist.

use std::sync::{Mutex, MutexGuard, PoisonError};

use prometheus::core::{Collector, MetricVec, MetricVecBuilder};
use prometheus::proto::MetricFamily;

/// All collectors of one gateway.
#[derive(Default)]
pub struct Registry {
    registry: prometheus::Registry,
    /// Collectors with labels, and the names of their labels.
    vectors: Mutex<Vec<Vector>>,
}

/// Label names, and the series.
type Vector = (&'static [&'static str], Box<dyn Series>);

/// A collector whose series can be removed.
pub(super) trait Series: Send + Sync {
    /// The current series.
    fn all(&self) -> Vec<MetricFamily>;

    /// Removes the series with these label values.
    fn remove(&self, values: &[&str]);
}

impl<T: MetricVecBuilder> Series for MetricVec<T> {
    fn all(&self) -> Vec<MetricFamily> {
        self.collect()
    }

    fn remove(&self, values: &[&str]) {
        // An error means that it is already gone.
        let _ = self.remove_label_values(values);
    }
}

impl Registry {
    /// Registers a collector.
    ///
    /// # Errors
    ///
    /// One of its names is taken.
    pub fn register(&self, collector: Box<dyn Collector>) -> prometheus::Result<()> {
        self.registry.register(collector)
    }

    /// Registers a vector with these labels, whose series can be removed.
    ///
    /// # Errors
    ///
    /// Its name is taken.
    pub(super) fn register_vector<T>(
        &self,
        vector: &MetricVec<T>,
        labels: &'static [&'static str],
    ) -> prometheus::Result<()>
    where
        T: MetricVecBuilder + 'static,
    {
        self.registry.register(Box::new(vector.clone()))?;
        self.vectors().push((labels, Box::new(vector.clone())));
        Ok(())
    }

    /// Collects all metrics.
    pub fn gather(&self) -> Vec<MetricFamily> {
        self.registry.gather()
    }

    /// Removes all series whose `label` has a value for which `gone` is true. It scans all series with that label:
    /// call it off the workers, once for many values.
    pub fn forget(&self, label: &str, gone: impl Fn(&str) -> bool) {
        for (labels, vector) in self.vectors().iter() {
            if !labels.contains(&label) {
                continue;
            }
            for family in vector.all() {
                for series in family.get_metric() {
                    let pairs = series.get_label();
                    let value =
                        |name: &str| pairs.iter().find(|pair| pair.name() == name).map_or("", |pair| pair.value());
                    if gone(value(label)) {
                        vector.remove(&labels.iter().map(|name| value(name)).collect::<Vec<_>>());
                    }
                }
            }
        }
    }

    /// Held while a family is registered, or while series are removed.
    fn vectors(&self) -> MutexGuard<'_, Vec<Vector>> {
        self.vectors.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::super::family;
    use super::*;

    #[test]
    fn the_series_of_what_is_gone_are_removed_and_no_others() {
        let registry = Registry::default();
        let connects = family::UPSTREAM_CONNECTS.counter(&registry);
        let exchanges = family::EXCHANGES.counter(&registry);
        for upstream in ["app", "old"] {
            for outcome in ["new", "failed"] {
                connects.with_label_values(&[upstream, outcome]).inc();
            }
        }
        exchanges.with_label_values(&["old", "200"]).inc();
        registry.forget("upstream", |name| name == "old");
        let left: Vec<String> = registry
            .gather()
            .iter()
            .flat_map(|family| family.get_metric())
            .map(|series| series.get_label().iter().map(|pair| pair.value()).collect::<Vec<_>>().join(" "))
            .collect();
        assert_eq!(left, ["200 old", "failed app", "new app"]);
    }
}
