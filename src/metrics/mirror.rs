//! The outcomes of mirrored requests: the label of `forebay_mirror_total`.

use prometheus::{IntCounter, IntCounterVec};

super::retry::labels! {
    /// The result of a copy, or why there was none.
    MirrorOutcome {
        /// A response with any status.
        Answered: "answered",
        /// No response.
        Failed: "failed",
        /// The limit on active copies is reached.
        Busy: "busy",
        /// No endpoint of the upstream is available.
        NoEndpoint: "no_endpoint",
        /// Its body is not in memory, or memory is short.
        TooLarge: "too_large",
        /// Its body is streamed.
        Streamed: "streamed",
        /// It requests an upgrade.
        Upgrade: "upgrade",
        /// It is a gRPC call.
        Grpc: "grpc",
    }
}

/// The counters of one upstream.
pub struct MirrorMetrics(Box<[IntCounter]>);

impl MirrorMetrics {
    pub(super) fn of(upstream: &str, family: &IntCounterVec) -> Self {
        MirrorMetrics(
            MirrorOutcome::ALL.iter().map(|outcome| family.with_label_values(&[upstream, outcome.name()])).collect(),
        )
    }

    /// Counts a result.
    pub fn count(&self, outcome: MirrorOutcome) {
        self.0[outcome as usize].inc();
    }
}
