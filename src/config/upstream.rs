//! `upstreams:`: named groups of endpoints.

pub mod balance;

use std::num::NonZeroU32;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Address;
use super::units::Time;

pub use balance::LoadBalancing;

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
    /// The endpoints.
    pub endpoints: Vec<Endpoint>,
    /// Connections kept open between requests.
    #[serde(default)]
    pub keepalive: Keepalive,
    /// How long its endpoints may take.
    #[serde(default)]
    pub timeouts: Timeouts,
}

/// What is spoken to an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// HTTP/1.1 in clear text.
    #[default]
    Http1,
    /// HTTP/2 over TLS; the certificate is verified against the system's roots and the host of the address.
    H2,
    /// HTTP/2 in clear text, by prior knowledge.
    H2c,
}

/// One server of an upstream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// `host:port`, `[v6]:port` or `unix:/path`. A host name is resolved at start and again in the background.
    pub address: Address,
    /// Its share of the requests, relative to its neighbours.
    #[serde(default = "Endpoint::default_weight")]
    pub weight: NonZeroU32,
}

impl Endpoint {
    pub(crate) fn default_weight() -> NonZeroU32 {
        NonZeroU32::MIN
    }
}

/// Connections to the endpoints of an upstream, kept open between requests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Keepalive {
    /// How long an unused connection is kept. Keep it below the backend's own limit.
    pub idle: Time,
}

impl Default for Keepalive {
    fn default() -> Self {
        Keepalive { idle: Time::seconds(60) }
    }
}

/// How long the endpoints of an upstream may take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// To accept a connection, TLS included.
    pub connect: Time,
    /// Between two pieces of the request that the endpoint takes. On HTTP/1 an early answer is then still awaited, for
    /// the longer of `wait` and `receive`.
    pub send: Time,
    /// From the last byte of the request to the end of the response header: the whole of it.
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
