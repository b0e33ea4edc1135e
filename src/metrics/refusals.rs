//! `forebay_refusals_total`: read from the refusals themselves, which count in statics.
//!
//! So a refusal is declared in one row and counted by one atomic, and every reason is there from the start with 0.

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;

use super::family;
use crate::error::Refusal;

/// Reads the counts of a list of refusals whenever `/metrics` is asked for.
pub(super) struct Refusals {
    /// In the order of their reasons; neighbours of one reason are added up.
    rows: Vec<&'static Refusal>,
    desc: Desc,
}

impl Refusals {
    /// A collector of these. A refusal that is listed twice counts once.
    pub(super) fn new(mut rows: Vec<&'static Refusal>) -> Self {
        rows.sort_by_key(|row| (row.reason, std::ptr::from_ref(*row)));
        rows.dedup_by(|a, b| std::ptr::eq(*a, *b));
        Refusals { rows, desc: family::REFUSALS.describe() }
    }
}

impl Collector for Refusals {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let counts = self.rows.chunk_by(|a, b| a.reason == b.reason);
        let sample = |rows: &[&Refusal]| {
            let seen: u64 = rows.iter().map(|row| row.seen()).sum();
            family::REFUSALS.sample(&[rows[0].reason], seen as f64)
        };
        vec![family::REFUSALS.read(counts.map(sample).collect())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_that_is_listed_twice_makes_one_series() {
        static TWICE: Refusal = Refusal::new("route.twice", 400, "Twice.");
        static NAMESAKE: Refusal = Refusal::new("route.twice", 400, "Twice.");
        TWICE.count();
        NAMESAKE.count();
        NAMESAKE.count();

        let families = Refusals::new(vec![&TWICE, &NAMESAKE, &TWICE]).collect();

        let metrics = families[0].get_metric();
        assert_eq!(metrics.len(), 1);
        assert_eq!(metrics[0].get_counter().get_value(), 3.0);
    }
}
