//! `upstreams:`: named groups of endpoints.

pub mod balance;
pub mod discovery;
pub mod health;
pub mod limits;
pub mod outlier;
pub mod sticky;
pub mod transport;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::units::Time;

pub use balance::LoadBalancing;
pub use discovery::{Dns, Endpoint, FileSource};
pub use health::HealthCheck;
pub use limits::{CircuitBreaker, Limits, Queue};
pub use outlier::OutlierDetection;
pub use transport::{Http2, Keepalive, Protocol, ProxyProtocol, Tls};

/// A named group of interchangeable endpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Upstream {
    /// The protocol to its endpoints.
    #[serde(default)]
    pub protocol: Protocol,
    /// How an endpoint is chosen.
    #[serde(default)]
    pub load_balancing: LoadBalancing,
    /// The endpoints. Alternatives: `dns` or `file`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub endpoints: Vec<Endpoint>,
    /// Endpoint discovery by DNS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns: Option<Dns>,
    /// Endpoint discovery from a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<FileSource>,
    /// Idle connections kept for reuse.
    #[serde(default)]
    pub keepalive: Keepalive,
    /// Time limits of the endpoints.
    #[serde(default)]
    pub timeouts: Timeouts,
    /// HTTP/2 settings, for endpoints that use it.
    #[serde(default)]
    pub http2: Http2,
    /// Active health checks. Without it, there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
    /// TLS to the endpoints. Always used with `protocol: h2`; used with `http1` if this key is present.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// Sends the client's address to endpoints with the PROXY protocol. Connections are then not shared between
    /// clients.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Limits on active requests and connections.
    #[serde(default)]
    pub limits: Limits,
    /// The queue for exchanges while all endpoints are at their limits.
    #[serde(default)]
    pub queue: Queue,
    /// Stops requests to a failing upstream for a while. Without it, never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub circuit_breaker: Option<CircuitBreaker>,
    /// Passive health checks: ejects endpoints by the results of requests.
    #[serde(default)]
    pub outlier_detection: OutlierDetection,
}

/// Time limits of the endpoints of an upstream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// To connect, TLS handshake included.
    pub connect: Time,
    /// Between two writes of the request that the endpoint accepts.
    pub send: Time,
    /// From the last byte of the request to the end of the response header. In all these limits, time spent waiting
    /// for the client does not count.
    pub wait: Time,
    /// Between two chunks of the response.
    pub receive: Time,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            connect: Time::seconds(5),
            send: Time::seconds(30),
            wait: Time::seconds(60),
            receive: Time::seconds(60),
        }
    }
}
