//! What attempts are repeated for and what forbids it: the labels of `forebay_retries_total` and
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
            /// Every one of them, in order.
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
    /// What an attempt is repeated for.
    Cause {
        /// No connection came about.
        Connect: "connect_error",
        /// A kept connection had died unnoticed.
        Stale: "stale",
        /// The endpoint said, on HTTP/2, that it had not begun (RFC 9113 §8.7).
        Unprocessed: "unprocessed",
        /// The connection broke off, or what came was no HTTP.
        Reset: "reset",
        /// Sending or waiting took too long.
        Timeout: "timeout",
        /// The gateway itself had no descriptor, port or memory for a connection.
        Exhausted: "exhausted",
        /// The status of the answer.
        Status: "status",
        /// The gRPC status of the answer.
        Grpc: "grpc",
    }
}

labels! {
    /// What forbids that an attempt is repeated for which its route would have it.
    Objection {
        /// As many were made as the route allows.
        Attempts: "attempts",
        /// Its method does not promise that twice is the same as once.
        Method: "not_idempotent",
        /// Its body cannot be had again from the first byte.
        Body: "not_replayable",
        /// A part of the answer has left.
        Begun: "answer_begun",
        /// Every endpoint was tried.
        Endpoints: "no_endpoint",
        /// The endpoint asked for a longer pause than the route allows.
        RetryAfter: "retry_after",
        /// It would begin after the deadline of the exchange.
        Deadline: "deadline",
        /// The share of repetitions among the upstream's requests is reached.
        Budget: "budget",
    }
}

/// Those of one upstream.
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

    /// Attempts that were repeated for this.
    pub fn made(&self, cause: Cause) -> &IntCounter {
        &self.made[cause as usize]
    }

    /// Attempts that were not repeated because of this.
    pub fn refused(&self, objection: Objection) -> &IntCounter {
        &self.refused[objection as usize]
    }

    /// Attempts that were repeated, whatever for.
    pub fn all(&self) -> u64 {
        self.made.iter().map(IntCounter::get).sum()
    }
}
