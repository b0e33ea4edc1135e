//! Metrics of the access log and of spans: written and lost.

use prometheus::IntCounter;

use super::family::vectors;

vectors! {
    /// The families of outputs.
    struct Families {
        lines: counter ACCESS_LOG_LINES,
        dropped: counter ACCESS_LOG_DROPPED,
        spans: counter SPANS,
    }
}

/// The metrics of the access log.
pub struct AccessLogMetrics {
    /// Written lines.
    pub lines: IntCounter,
    /// Lines dropped because the queue was full.
    pub dropped_full: IntCounter,
    /// Lines that could not be written.
    pub dropped_failed: IntCounter,
}

/// The metrics of the spans of traces.
pub struct SpanMetrics {
    /// Exported spans.
    pub exported: IntCounter,
    /// Spans whose export failed.
    pub failed: IntCounter,
    /// Spans dropped because the queue was full.
    pub dropped: IntCounter,
}

impl Families {
    pub(super) fn access_log(&self) -> AccessLogMetrics {
        let dropped = |reason| self.dropped.with_label_values(&[reason]);
        AccessLogMetrics {
            lines: self.lines.with_label_values::<&str>(&[]),
            dropped_full: dropped("full"),
            dropped_failed: dropped("failed"),
        }
    }

    pub(super) fn spans(&self) -> SpanMetrics {
        let outcome = |outcome| self.spans.with_label_values(&[outcome]);
        SpanMetrics { exported: outcome("exported"), failed: outcome("failed"), dropped: outcome("dropped") }
    }
}
