//! `limits:`, `queue:` and `circuit_breaker:` of an upstream: how much it is asked at once, what waits meanwhile, and
//! when it is left alone.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::units::{Count, Percent, Time};

/// How much an upstream may have under way at once. What is above waits in the queue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Requests at all endpoints together.
    pub requests: Count,
    /// Connections in use at all endpoints together. Over HTTP/1 each request has one for itself; over HTTP/2 a hundred
    /// share one.
    pub connections: Count,
    /// The same for each endpoint.
    pub endpoint: EndpointLimits,
}

/// How much one endpoint may have under way at once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EndpointLimits {
    /// Requests at this endpoint.
    pub requests: Count,
    /// Connections to this endpoint in use. Connections that are kept unused do not count: they are used before another
    /// is made.
    pub connections: Count,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { requests: Count::UNLIMITED, connections: Count::UNLIMITED, endpoint: EndpointLimits::default() }
    }
}

impl Default for EndpointLimits {
    /// What a backend can take only its operator knows, and a limit that is met by surprise is an outage: so there is
    /// none, as with nginx and HAProxy, but for what the kernel has ports for (28,232 to one address, unless it is
    /// configured otherwise).
    fn default() -> Self {
        EndpointLimits { requests: Count::UNLIMITED, connections: Count(20_000) }
    }
}

/// Where exchanges wait when everybody who could serve them is full, in the order in which they came.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Queue {
    /// How many may wait; one more is answered 503. With 0, none waits.
    pub size: Count,
    /// How long each may wait, over all its attempts; longer is answered 503.
    pub timeout: Time,
}

impl Default for Queue {
    fn default() -> Self {
        Queue { size: Count(1_000), timeout: Time::seconds(5) }
    }
}

/// When an upstream that fails is left alone for a while, as a whole. A failure is a connection that could not be made,
/// an answer that did not come whole, and a status of 500 and above.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CircuitBreaker {
    /// It opens when such a share of the attempts within `window` failed.
    pub failures: Percent,
    /// Over which time the share is taken.
    pub window: Time,
    /// With fewer attempts within `window`, their share says nothing. `unlimited`: it never does.
    pub min_requests: Count,
    /// It also opens after so many failures in a row.
    pub consecutive: Count,
    /// For how long it is open; then a few requests are let through. Each further time in a row is twice as long.
    pub open: Time,
    /// For how long at most.
    pub max_open: Time,
    /// The number of requests that are let through then. If all of them go well it closes, and with the first that
    /// fails it opens again.
    pub probes: Count,
    /// For how long such a request may wait for its client, mostly for the rest of its body. Then another one is let
    /// through in its place.
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
