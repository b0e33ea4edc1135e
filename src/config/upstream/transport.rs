//! `protocol:` and `keepalive:` of an upstream: how its endpoints are connected to.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::units::Time;

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
