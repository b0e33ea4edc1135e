//! `protocol:`, `tls:`, `proxy_protocol:` and `keepalive:` of an upstream: the connections to its endpoints.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::units::{Count, Size, Time};

/// The protocol to an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// HTTP/1.1: in clear text, or over TLS if the upstream has a `tls:` key.
    #[default]
    Http1,
    /// HTTP/2 over TLS, with or without a `tls:` key.
    H2,
    /// HTTP/2 in clear text, with prior knowledge.
    H2c,
}

/// TLS to the endpoints. `tls: {}` is enough if the system trusts the authority of their certificates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    /// Whether the certificate of an endpoint is verified: valid, trusted, and issued for its name. Without it, an
    /// attacker on the network can impersonate the endpoint.
    pub verify: bool,
    /// The name or IP address that is sent as SNI and verified in the certificate; by default the host of the
    /// endpoint's address. A unix socket has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_name: Option<String>,
    /// A PEM file with the trusted certificate authorities; by default those of the system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
    /// A PEM file with Forebay's client certificate and its intermediate certificates, for endpoints that request
    /// one. Requires `key`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
    /// A PEM file with the private key of `certificate`, without a password.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

impl Default for Tls {
    fn default() -> Self {
        Tls { verify: true, server_name: None, ca: None, certificate: None, key: None }
    }
}

/// How the client's address is sent to an endpoint at the beginning of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProxyProtocol {
    /// Version 2 of the PROXY protocol (binary).
    V2,
}

/// Idle connections to endpoints, kept for reuse.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Keepalive {
    /// How long an idle connection is kept. Set it below the backend's own timeout.
    pub idle: Time,
    /// Greatest age of a connection: it is closed when a request on an older one ends. An older HTTP/2 connection
    /// gets no new requests and is closed once it has been idle for `idle`.
    pub max_age: Time,
    /// Idle connections of this upstream that are kept; 0: each request uses a new connection. Not applicable to
    /// HTTP/2, where one connection serves many requests. `server.keepalive_pool` limits all upstreams together.
    pub pool: Count,
}

impl Default for Keepalive {
    fn default() -> Self {
        Keepalive { idle: Time::seconds(60), max_age: Time::seconds(3600), pool: Count::UNLIMITED }
    }
}

/// HTTP/2 settings for the endpoints of an upstream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Http2 {
    /// Flow control window per response: how much an endpoint may send ahead of what is read, 16KiB to 16MiB. This
    /// much of each unread response stays in memory; the connection window allows as much for each of its
    /// responses. A larger window is faster for distant endpoints.
    pub stream_window: Size,
}

impl Default for Http2 {
    /// Almost the protocol's default (RFC 9113 §6.9.2).
    fn default() -> Self {
        Http2 { stream_window: Size(64 << 10) }
    }
}
