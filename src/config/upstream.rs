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

/// A named group of endpoints that serve the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Upstream {
    /// What is spoken to its endpoints.
    #[serde(default)]
    pub protocol: Protocol,
    /// How an endpoint is chosen.
    #[serde(default)]
    pub load_balancing: LoadBalancing,
    /// The endpoints. In place of them, `dns` or `file` may say where they are told of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub endpoints: Vec<Endpoint>,
    /// A name under which they are found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns: Option<Dns>,
    /// A file that lists them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<FileSource>,
    /// Connections kept open between requests.
    #[serde(default)]
    pub keepalive: Keepalive,
    /// How long its endpoints may take.
    #[serde(default)]
    pub timeouts: Timeouts,
    /// How HTTP/2 is spoken to its endpoints, where it is.
    #[serde(default)]
    pub http2: Http2,
    /// How its endpoints are asked whether they are well. Without it, nobody asks them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
    /// TLS towards its endpoints; always with `protocol: h2`, and with `http1` if this is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// Whether endpoints are told of the client by the PROXY protocol. Its connections are then shared by no two
    /// clients.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocol>,
    /// How much it may have under way at once.
    #[serde(default)]
    pub limits: Limits,
    /// Where exchanges wait when everybody is full.
    #[serde(default)]
    pub queue: Queue,
    /// When it is left alone for a while; never, without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub circuit_breaker: Option<CircuitBreaker>,
    /// What passing requests say against an endpoint, and what follows.
    #[serde(default)]
    pub outlier_detection: OutlierDetection,
}

/// How long the endpoints of an upstream may take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// To accept a connection, TLS included.
    pub connect: Time,
    /// Between two pieces of the request that the endpoint takes.
    pub send: Time,
    /// From the last byte of the request to the end of the response header: the whole of it. While the client is waited
    /// for, no time of the endpoint passes, here as in the others.
    pub wait: Time,
    /// Between two pieces of the response.
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
