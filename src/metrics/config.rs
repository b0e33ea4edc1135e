//! Metrics of the configuration and its generations.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{GaugeVec, IntCounter, IntGauge, IntGaugeVec};

use super::family::{Family, vectors};
use super::{family, single};

vectors! {
    /// The families of the configuration.
    struct Families {
        generation: gauge CONFIG_GENERATION,
        info: gauge CONFIG_INFO,
        loaded: ratio CONFIG_LOADED,
        failed: gauge CONFIG_RELOAD_FAILED,
        reloads: counter CONFIG_RELOADS,
    }
}

/// The metrics of the active configuration, and of reloads.
pub struct ConfigMetrics {
    /// Reloads that were applied.
    pub applied: IntCounter,
    /// Reloads that changed nothing because the configuration was invalid.
    pub refused: IntCounter,
    generation: IntGauge,
    failed: IntGauge,
    families: Handles,
    hash: Mutex<String>,
}

struct Handles {
    info: IntGaugeVec,
    loaded: GaugeVec,
}

/// The generations that still exist.
pub trait Generations: Send + Sync {
    /// The number of each, and how many exchanges use it; the same number may occur several times.
    fn exchanges(&self) -> Vec<(u64, u64)>;

    /// The number of each whose listeners are in use, and how many connections they have.
    fn connections(&self) -> Vec<(u64, u64)>;
}

impl Families {
    pub(super) fn metrics(&self) -> ConfigMetrics {
        let reloads = |result| self.reloads.with_label_values(&[result]);
        ConfigMetrics {
            applied: reloads("applied"),
            refused: reloads("refused"),
            generation: single(&self.generation),
            failed: single(&self.failed),
            families: Handles { info: self.info.clone(), loaded: self.loaded.clone() },
            hash: Mutex::default(),
        }
    }
}

impl ConfigMetrics {
    /// A configuration with this number and hash is now active.
    pub fn show(&self, generation: u64, hash: &str) {
        self.generation.set(i64::try_from(generation).unwrap_or(i64::MAX));
        self.failed.set(0);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        self.families.loaded.with_label_values::<&str>(&[]).set(now.as_secs_f64());
        let mut shown = self.hash.lock().unwrap_or_else(PoisonError::into_inner);
        if *shown != hash {
            // Removes the series of the previous one; at first there is none.
            let _ = self.families.info.remove_label_values(&[&*shown]);
            *shown = hash.to_owned();
        }
        self.families.info.with_label_values(&[hash]).set(1);
    }

    /// A reload was refused: the active configuration differs from the file.
    pub fn refuse(&self) {
        self.refused.inc();
        self.failed.set(1);
    }
}

/// Counts the exchanges and connections of generations on each scrape.
pub(super) struct GenerationCollector {
    generations: Arc<dyn Generations>,
    descs: [Desc; 2],
}

impl GenerationCollector {
    pub(super) fn new(generations: Arc<dyn Generations>) -> Self {
        let families = [&family::GENERATION_EXCHANGES, &family::GENERATION_CONNECTIONS];
        GenerationCollector { generations, descs: families.map(Family::describe) }
    }
}

impl Collector for GenerationCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let figures = |family: &'static Family, counted: Vec<(u64, u64)>| {
            let mut counts: BTreeMap<u64, u64> = BTreeMap::new();
            counted.into_iter().for_each(|(number, count)| *counts.entry(number).or_default() += count);
            let samples = counts.iter().map(|(number, count)| {
                family.sample(&[&number.to_string()], u32::try_from(*count).unwrap_or(u32::MAX).into())
            });
            family.read(samples.collect())
        };
        vec![
            figures(&family::GENERATION_EXCHANGES, self.generations.exchanges()),
            figures(&family::GENERATION_CONNECTIONS, self.generations.connections()),
        ]
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::Metrics;
    use super::*;

    /// A generation with two exchanges, and an older one with three connections.
    pub struct One;

    impl Generations for One {
        fn exchanges(&self) -> Vec<(u64, u64)> {
            vec![(7, 1), (7, 1)]
        }

        fn connections(&self) -> Vec<(u64, u64)> {
            vec![(6, 3)]
        }
    }

    fn text(metrics: &Metrics) -> String {
        String::from_utf8(metrics.render()).expect("a text")
    }

    #[test]
    fn one_hash_is_shown_and_a_refusal_until_the_next_success() {
        let metrics = Metrics::new(0, Vec::new());
        let config = metrics.config();
        config.show(1, "aa");
        config.refuse();
        assert!(text(&metrics).contains("forebay_config_reload_failed 1"));
        config.show(2, "bb");
        let shown = text(&metrics);
        for line in
            ["forebay_config_generation 2", "forebay_config_info{hash=\"bb\"} 1", "forebay_config_reload_failed 0"]
        {
            assert!(shown.contains(line), "{line} is missing in\n{shown}");
        }
        assert!(!shown.contains("\"aa\""), "{shown}");
    }

    #[test]
    fn what_goes_by_a_generation_is_added_up() {
        let metrics = Metrics::new(0, Vec::new());
        metrics.count_generations(Arc::new(One));
        let shown = text(&metrics);
        assert!(shown.contains("forebay_generation_exchanges{generation=\"7\"} 2"), "{shown}");
        assert!(shown.contains("forebay_generation_connections{generation=\"6\"} 3"), "{shown}");
        assert!(!shown.contains("forebay_generation_exchanges{generation=\"6\"}"), "{shown}");
    }
}
