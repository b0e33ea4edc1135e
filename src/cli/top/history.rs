//! The latest documents and what they show together: rates, and percentiles of recent values.

use std::collections::VecDeque;

use crate::admin::status::{Document, quantile};

/// The time windows of rates and of percentiles, in seconds.
const RATE_SECONDS: f64 = 5.0;
const QUANTILE_SECONDS: f64 = 30.0;
/// Limit on stored documents.
const KEPT: usize = 64;

/// The documents, the oldest first; not empty once anything is shown.
#[derive(Default)]
pub struct History(VecDeque<Document>);

impl History {
    /// Adds a document. If it comes from a different process, the old ones are dropped: their counters are not
    /// comparable.
    pub fn push(&mut self, document: Document) {
        let another =
            |last: &Document| last.started != document.started || last.uptime_seconds >= document.uptime_seconds;
        if self.0.back().is_some_and(another) {
            self.0.clear();
        }
        self.0.push_back(document);
        while self.0.len() > KEPT {
            self.0.pop_front();
        }
    }

    /// The latest document.
    pub fn last(&self) -> Option<&Document> {
        self.0.back()
    }

    /// Growth per second. `None` while there is only one document.
    pub fn rate(&self, figure: impl Fn(&Document) -> Option<f64>) -> Option<f64> {
        let (first, last) = self.span(RATE_SECONDS)?;
        let seconds = last.uptime_seconds - first.uptime_seconds;
        let grown = figure(last)? - figure(first).unwrap_or(0.0);
        (seconds > 0.0).then(|| grown.max(0.0) / seconds)
    }

    /// Growth of each histogram bucket.
    pub fn grown(&self, buckets: impl Fn(&Document) -> Option<Vec<u64>>) -> Option<Vec<u64>> {
        let (first, last) = self.span(QUANTILE_SECONDS)?;
        let now = buckets(last)?;
        let before = if self.0.len() > 1 { buckets(first).unwrap_or_default() } else { Vec::new() };
        let grown = now.iter().enumerate().map(|(i, now)| now.saturating_sub(before.get(i).copied().unwrap_or(0)));
        Some(grown.collect())
    }

    /// A quantile of the recent values in a histogram.
    pub fn quantile(&self, bounds: &[f64], of: f64, buckets: impl Fn(&Document) -> Option<Vec<u64>>) -> Option<f64> {
        quantile(bounds, &self.grown(buckets)?, of)
    }

    fn span(&self, seconds: f64) -> Option<(&Document, &Document)> {
        let last = self.0.back()?;
        let old = |document: &&Document| last.uptime_seconds - document.uptime_seconds >= seconds - 0.2;
        let first = self.0.iter().rev().find(old).or(self.0.front())?;
        Some((first, last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::status::{RouteStatus, Times};

    fn document(uptime_seconds: f64, exchanges: u64) -> Document {
        let seconds = Times { sum_seconds: 0.0, buckets: vec![exchanges, 0] };
        let routes = vec![RouteStatus { exchanges, seconds, ..RouteStatus::default() }];
        Document { uptime_seconds, routes, ..Document::default() }
    }

    fn exchanges(document: &Document) -> Option<f64> {
        Some(document.routes.first()?.exchanges as f64)
    }

    #[test]
    fn rates_are_those_of_the_last_seconds_and_percentiles_reach_further_back() {
        let mut history = History::default();
        history.push(document(100.0, 1_000));
        assert_eq!(history.rate(exchanges), None);
        let buckets = |document: &Document| Some(document.routes[0].seconds.buckets.clone());
        assert_eq!(history.grown(buckets), Some(vec![1_000, 0]), "since the start, while there is nothing else");
        for second in 1..=60 {
            history.push(document(100.0 + f64::from(second), 1_000 + 10 * second as u64));
        }
        assert_eq!(history.rate(exchanges), Some(10.0));
        assert_eq!(history.grown(buckets), Some(vec![300, 0]));
        assert_eq!(history.quantile(&[0.1], 0.5, buckets), Some(0.05));
    }

    #[test]
    fn another_process_is_not_compared_with_the_one_before() {
        let mut history = History::default();
        history.push(document(100.0, 1_000));
        history.push(document(1.0, 5));
        assert_eq!((history.rate(exchanges), history.0.len()), (None, 1));
        history.push(document(2.0, 7));
        assert_eq!(history.rate(exchanges), Some(2.0));
    }
}
