//! `forebay_refusals_total`: refusals of this gateway by reason.
//!
//! The rows of refusals are global, but each gateway in a process has its own counts. Every declared reason starts
//! with 0.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;

use super::family;
use crate::error::Refusal;

/// The counts of all refusals of a gateway. Clones are cheap and share them.
#[derive(Clone)]
pub struct RefusalMetrics(Arc<Counts>);

struct Counts {
    /// The addresses of the declared rows, sorted: refusals are frequent under attack, and an address is found
    /// faster than a name. The number is an index into `reasons`.
    rows: Box<[(usize, usize)]>,
    /// Sorted by name. Several rows may share one.
    reasons: Box<[(&'static str, AtomicU64)]>,
    /// Refusals that a filter uses without declaring them in `Filter::refusals`.
    undeclared: Mutex<BTreeMap<&'static str, u64>>,
}

impl RefusalMetrics {
    /// Counts for these refusals, all 0. Duplicates are ignored.
    pub(super) fn new(mut declared: Vec<&'static Refusal>) -> Self {
        declared.sort_by_key(|row| row.reason);
        let mut rows = Vec::with_capacity(declared.len());
        let mut reasons: Vec<(&'static str, AtomicU64)> = Vec::new();
        for row in declared {
            if reasons.last().is_none_or(|(reason, _)| *reason != row.reason) {
                reasons.push((row.reason, AtomicU64::new(0)));
            }
            rows.push((address(row), reasons.len() - 1));
        }
        rows.sort_unstable();
        rows.dedup();
        RefusalMetrics(Arc::new(Counts { rows: rows.into(), reasons: reasons.into(), undeclared: Mutex::default() }))
    }

    /// Counts a refusal.
    pub fn count(&self, refusal: &'static Refusal) {
        match self.0.rows.binary_search_by_key(&address(refusal), |(row, _)| *row) {
            Ok(row) => _ = self.0.reasons[self.0.rows[row].1].1.fetch_add(1, Ordering::Relaxed),
            Err(_) => *self.undeclared().entry(refusal.reason).or_default() += 1,
        }
    }

    /// The counts by reason.
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        let mut counts = self.undeclared().clone();
        for (reason, count) in &self.0.reasons {
            *counts.entry(reason).or_default() += count.load(Ordering::Relaxed);
        }
        counts
    }

    fn undeclared(&self) -> MutexGuard<'_, BTreeMap<&'static str, u64>> {
        self.0.undeclared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn address(refusal: &'static Refusal) -> usize {
    std::ptr::from_ref(refusal).addr()
}

/// Exports the counts on each scrape.
pub(super) struct RefusalCollector {
    refusals: RefusalMetrics,
    desc: Desc,
}

impl RefusalCollector {
    pub(super) fn new(refusals: RefusalMetrics) -> Self {
        RefusalCollector { refusals, desc: family::REFUSALS.describe() }
    }
}

impl Collector for RefusalCollector {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let counts = self.refusals.counts();
        let samples = counts.iter().map(|(reason, count)| family::REFUSALS.sample(&[reason], *count as f64));
        vec![family::REFUSALS.read(samples.collect())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static TWICE: Refusal = Refusal::new("route.twice", 400, "Twice.");
    static NAMESAKE: Refusal = Refusal::new("route.twice", 400, "Twice.");
    static UNDECLARED: Refusal = Refusal::new("route.undeclared", 400, "Undeclared.");

    #[test]
    fn a_reason_that_is_listed_twice_makes_one_series() {
        let refusals = RefusalMetrics::new(vec![&TWICE, &NAMESAKE, &TWICE]);
        refusals.count(&TWICE);
        refusals.count(&NAMESAKE);
        refusals.count(&NAMESAKE);

        let families = RefusalCollector::new(refusals).collect();

        let metrics = families[0].get_metric();
        assert_eq!(metrics.len(), 1);
        assert_eq!(metrics[0].get_counter().get_value(), 3.0);
    }

    #[test]
    fn a_refusal_that_its_filter_does_not_declare_is_counted_from_its_first_occurrence() {
        let refusals = RefusalMetrics::new(vec![&TWICE]);
        assert_eq!(refusals.counts(), BTreeMap::from([("route.twice", 0)]));
        refusals.count(&UNDECLARED);
        assert_eq!(refusals.counts(), BTreeMap::from([("route.twice", 0), ("route.undeclared", 1)]));
    }

    #[test]
    fn two_gateways_do_not_count_each_others_refusals() {
        let [one, other] = [(); 2].map(|()| RefusalMetrics::new(vec![&TWICE]));
        one.count(&TWICE);
        assert_eq!([one.counts()["route.twice"], other.counts()["route.twice"]], [1, 0]);
    }
}
