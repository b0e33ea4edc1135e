//! What becomes of copies of requests: the label of `forebay_mirror_total`.

use prometheus::{IntCounter, IntCounterVec};

super::retry::labels! {
    /// What became of a copy, or why there was none.
    Fate {
        /// It was answered, whatever the answer.
        Answered: "answered",
        /// It was not answered.
        Failed: "failed",
        /// As many as may be are under way already.
        Busy: "busy",
        /// No endpoint of the upstream can take it.
        NoEndpoint: "no_endpoint",
        /// Its body is not in memory, or there is none to spare.
        TooLarge: "too_large",
        /// Its body is passed on as it comes.
        Streamed: "streamed",
        /// It asks for an upgrade.
        Upgrade: "upgrade",
        /// It is a gRPC call.
        Grpc: "grpc",
    }
}

/// Those of one upstream.
pub struct MirrorMetrics(Box<[IntCounter]>);

impl MirrorMetrics {
    pub(super) fn of(upstream: &str, family: &IntCounterVec) -> Self {
        MirrorMetrics(Fate::ALL.iter().map(|fate| family.with_label_values(&[upstream, fate.name()])).collect())
    }

    /// One more of these.
    pub fn count(&self, fate: Fate) {
        self.0[fate as usize].inc();
    }
}
