//! Why attempts are retried, and what prevents retries: the labels of `forebay_retries_total` and
//! `forebay_retries_refused_total`.

use prometheus::{IntCounter, IntCounterVec};

macro_rules! labels {
    ($(#[$doc:meta])* $name:ident { $($(#[$row:meta])* $variant:ident: $label:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {
            $($(#[$row])* $variant,)*
        }

        impl $name {
            /// All of them, in order.
            pub const ALL: &[$name] = &[$($name::$variant),*];

            /// Its label.
            pub fn name(self) -> &'static str {
                match self {
                    $($name::$variant => $label,)*
                }
            }
        }
    };
}

pub(super) use labels;

labels! {
    /// Why an attempt is retried.
    Cause {
        /// No connection could be made.
        Connect: "connect_error",
        /// A reused connection was stale.
        Stale: "stale",
        /// The endpoint reported on HTTP/2 that it had not processed the request (RFC 9113 §8.7).
        Unprocessed: "unprocessed",
        /// The connection broke, or the response was not valid HTTP.
        Reset: "reset",
        /// Sending or waiting took too long.
        Timeout: "timeout",
        /// The gateway itself lacked a descriptor, port or memory for a connection.
        Exhausted: "exhausted",
        /// The response status.
        Status: "status",
        /// The gRPC status.
        Grpc: "grpc",
    }
}

labels! {
    /// What prevents a retry that the route allows.
    Objection {
        /// The route's limit on attempts is reached.
        Attempts: "attempts",
        /// The method is not idempotent.
        Method: "not_idempotent",
        /// The body cannot be replayed from its first byte.
        Body: "not_replayable",
        /// A part of the response was already sent.
        Begun: "answer_begun",
        /// All endpoints were tried.
        Endpoints: "no_endpoint",
        /// The endpoint asked for a longer delay than the route allows.
        RetryAfter: "retry_after",
        /// It would start after the deadline of the exchange.
        Deadline: "deadline",
        /// The retry budget of the upstream is used up.
        Budget: "budget",
    }
}

/// The counters of one upstream.
pub struct RetryMetrics {
    made: Box<[IntCounter]>,
    refused: Box<[IntCounter]>,
}

impl RetryMetrics {
    pub(super) fn of(upstream: &str, made: &IntCounterVec, refused: &IntCounterVec) -> Self {
        RetryMetrics {
            made: Cause::ALL.iter().map(|cause| made.with_label_values(&[upstream, cause.name()])).collect(),
            refused: Objection::ALL.iter().map(|why| refused.with_label_values(&[upstream, why.name()])).collect(),
        }
    }

    /// The counter of retries for this reason.
    pub fn made(&self, cause: Cause) -> &IntCounter {
        &self.made[cause as usize]
    }

    /// The counter of retries prevented for this reason.
    pub fn refused(&self, objection: Objection) -> &IntCounter {
        &self.refused[objection as usize]
    }

    /// Number of retries for all reasons.
    pub fn all(&self) -> u64 {
        self.made.iter().map(IntCounter::get).sum()
    }
}
