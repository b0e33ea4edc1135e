//! `mirror:` of a route: copies of its requests go to another upstream.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::units::{Count, Percent};

/// Copies requests to another upstream, whose responses are discarded. A copy is sent after its original, with the
/// route's name in `X-Forebay-Mirror`. Streamed requests, requests whose body exceeds the route's memory buffer,
/// upgrades and gRPC calls are not copied.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Mirror {
    /// The upstream that gets the copies; its timeouts apply.
    pub upstream: String,
    /// The share of requests that are copied.
    #[serde(default = "Mirror::percent")]
    pub percent: Percent,
    /// Limit on active copies; further requests are not copied.
    #[serde(default = "Mirror::in_flight")]
    pub in_flight: Count,
}

impl Mirror {
    fn percent() -> Percent {
        Percent(100.0)
    }

    fn in_flight() -> Count {
        Count(100)
    }
}
