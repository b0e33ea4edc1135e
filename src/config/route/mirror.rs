//! `mirror:` of a route: copies of its requests go to another upstream.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::units::{Count, Percent};

/// Copies of requests go to another upstream, whose answers nobody gets. A copy leaves when its original has been sent,
/// marked with `X-Forebay-Mirror` and the name of the route. Requests that are streamed, whose body does not fit into
/// the memory of their route, upgrades and gRPC calls are not copied.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Mirror {
    /// Where they go, within the timeouts of that upstream.
    pub upstream: String,
    /// Of how many requests there is a copy.
    #[serde(default = "Mirror::percent")]
    pub percent: Percent,
    /// How many copies may be under way at a time; there is none of what comes beyond.
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
