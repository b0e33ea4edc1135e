//! Calls that filters make: `forebay_filter_calls_total` and `forebay_filter_call_seconds`.

use std::time::Duration;

use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec};

super::retry::labels! {
    /// What became of a call.
    End {
        /// It was answered, whatever the status.
        Answered: "answered",
        /// Every endpoint was busy, and none had room in time.
        Busy: "busy",
        /// The circuit breaker was open.
        Away: "away",
        /// No endpoint was available.
        NoEndpoint: "no_endpoint",
        /// It took too long.
        Late: "late",
        /// No endpoint could be reached, or one broke off.
        Failed: "failed",
        /// The answer was larger than the call allows.
        TooLarge: "too_large",
        /// The filter, or its client, did not wait for it to end.
        Dropped: "dropped",
    }
}

/// Those of one filter to one upstream.
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

    /// A call has ended so, after this time.
    pub fn ended(&self, end: End, took: Duration) {
        self.ends[end as usize].inc();
        self.seconds.observe(took.as_secs_f64());
    }
}
