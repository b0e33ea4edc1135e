//! `limits:`, `queue:` and `circuit_breaker:` of an upstream.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::units::{Count, Percent, Time};

/// Limits on active requests and connections. Exchanges above them wait in the queue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Active requests at all endpoints together.
    pub requests: Count,
    /// Connections in use at all endpoints together. Over HTTP/1, a request occupies a connection; over HTTP/2, a
    /// hundred requests share one.
    pub connections: Count,
    /// The same limits per endpoint.
    pub endpoint: EndpointLimits,
}

/// Limits per endpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EndpointLimits {
    /// Active requests.
    pub requests: Count,
    /// Connections in use. Idle kept connections do not count: they are reused before a new one is made.
    pub connections: Count,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { requests: Count::UNLIMITED, connections: Count::UNLIMITED, endpoint: EndpointLimits::default() }
    }
}

impl Default for EndpointLimits {
    /// Only the operator knows the capacity of a backend, and an unexpected limit is an outage. So there is none by
    /// default, as in nginx and HAProxy, except for the kernel's ephemeral ports (28,232 per destination by
    /// default).
    fn default() -> Self {
        EndpointLimits { requests: Count::UNLIMITED, connections: Count(20_000) }
    }
}

/// The queue for exchanges while all endpoints are at their limits: first in, first out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Queue {
    /// Limit on waiting exchanges; further ones get 503. 0: no queue.
    pub size: Count,
    /// Time limit in the queue, all attempts together. After it, the exchange gets 503.
    pub timeout: Time,
}

impl Default for Queue {
    fn default() -> Self {
        Queue { size: Count(1_000), timeout: Time::seconds(5) }
    }
}

/// Stops requests to an upstream while it fails. Failures are: no connection, an incomplete response, and a status
/// of 500 and above.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CircuitBreaker {
    /// Opens when this share of the attempts within `window` failed.
    pub failures: Percent,
    /// The time over which the share is computed.
    pub window: Time,
    /// The least number of attempts within `window` for the share to count. `unlimited`: the share never counts.
    pub min_requests: Count,
    /// Also opens after this many failures in a row.
    pub consecutive: Count,
    /// How long it stays open before it lets `probes` requests through. The time doubles each time in a row.
    pub open: Time,
    /// Longest time it stays open.
    pub max_open: Time,
    /// Requests that are let through then. If all succeed the breaker closes; the first failure opens it again.
    pub probes: Count,
    /// How long a probe may wait for its client, usually for the rest of its body. After it, another request is let
    /// through instead.
    pub probe_client: Time,
}

impl Default for CircuitBreaker {
    fn default() -> Self {
        CircuitBreaker {
            failures: Percent(50.0),
            window: Time::seconds(10),
            min_requests: Count(20),
            consecutive: Count::UNLIMITED,
            open: Time::seconds(5),
            max_open: Time::seconds(60),
            probes: Count(3),
            probe_client: Time::seconds(1),
        }
    }
}
