//! `protocol:`, `tls:`, `proxy_protocol:` and `keepalive:` of an upstream: how its endpoints are connected to.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::units::{Count, Size, Time};

/// What is spoken to an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// HTTP/1.1; in clear text, or over TLS with a `tls:` beside it.
    #[default]
    Http1,
    /// HTTP/2 over TLS, with or without a `tls:` beside it.
    H2,
    /// HTTP/2 in clear text, by prior knowledge.
    H2c,
}

/// TLS towards the endpoints. `tls: {}` is enough where their certificates are signed by an authority that the system
/// trusts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    /// Whether an endpoint must show a certificate that is valid, trusted, and made out to its name. If not, anybody
    /// who gets in between can pose as it.
    pub verify: bool,
    /// The name, or the IP address, that endpoints are asked for (SNI) and that their certificates must be made out to;
    /// by default the host of their address. A unix socket has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_name: Option<String>,
    /// A file with the certificates of the authorities that are trusted, in PEM; by default those that the system
    /// trusts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
    /// A file with the certificate that Forebay shows to endpoints that ask for one, and those between it and its
    /// authority, in PEM. It comes with a `key`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
    /// A file with the private key of `certificate`, in PEM and without a password.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

impl Default for Tls {
    fn default() -> Self {
        Tls { verify: true, server_name: None, ca: None, certificate: None, key: None }
    }
}

/// How an endpoint is told whom a connection is for, before anything else is said on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProxyProtocol {
    /// Version 2 of the PROXY protocol, which is binary.
    V2,
}

/// Connections to the endpoints of an upstream, kept open between requests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Keepalive {
    /// How long an unused connection is kept. Keep it below the backend's own limit.
    pub idle: Time,
    /// How old a connection may become: a request that ends on an older one is its last. On HTTP/2 no request begins on
    /// an older one, and it is closed when it has been unused for `idle`.
    pub max_age: Time,
    /// How many unused connections of this upstream are kept; with 0 each request has one of its own. With HTTP/2,
    /// where a connection serves many requests at once, it cannot be said. `server.keepalive_pool` holds for all
    /// upstreams together.
    pub pool: Count,
}

impl Default for Keepalive {
    fn default() -> Self {
        Keepalive { idle: Time::seconds(60), max_age: Time::seconds(3600), pool: Count::UNLIMITED }
    }
}

/// How HTTP/2 is spoken to the endpoints of an upstream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Http2 {
    /// How much of one answer an endpoint may send ahead of what is read of it, 16KiB to 16MiB. So much of an answer
    /// that its client does not take stays in memory; all answers on a connection together have room for as much each.
    /// More is faster where endpoints are far away.
    pub stream_window: Size,
}

impl Default for Http2 {
    /// Nearly that of the protocol (RFC 9113 §6.9.2).
    fn default() -> Self {
        Http2 { stream_window: Size(64 << 10) }
    }
}
