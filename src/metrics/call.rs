//! Requests sent by filters: `forebay_filter_calls_total` and `forebay_filter_call_seconds`.

use std::time::Duration;

use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec};

super::retry::labels! {
    /// The outcome of a call.
    End {
        /// A response with any status.
        Answered: "answered",
        /// All endpoints were at their limits until the queue's timeout.
        Busy: "busy",
        /// The circuit breaker was open.
        Away: "away",
        /// No endpoint was available.
        NoEndpoint: "no_endpoint",
        /// Timeout.
        Late: "late",
        /// No endpoint could be reached, or the connection broke.
        Failed: "failed",
        /// The response exceeded the limit of the call.
        TooLarge: "too_large",
        /// The filter, or its client, did not wait for the result.
        Dropped: "dropped",
    }
}

/// The metrics of one filter and one upstream.
pub struct CallMetrics {
    ends: Box<[IntCounter]>,
    seconds: Histogram,
}

impl CallMetrics {
    pub(super) fn of(filter: &str, upstream: &str, ends: &IntCounterVec, seconds: &HistogramVec) -> Self {
        let count = |end: &End| ends.with_label_values(&[filter, upstream, end.name()]);
        CallMetrics {
            ends: End::ALL.iter().map(count).collect(),
            seconds: seconds.with_label_values(&[filter, upstream]),
        }
    }

    /// Records the outcome and the duration of a call.
    pub fn ended(&self, end: End, took: Duration) {
        self.ends[end as usize].inc();
        self.seconds.observe(took.as_secs_f64());
    }
}
