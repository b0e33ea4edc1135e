//! `listeners:`: where clients connect, what they may speak, and what they may cost.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub mod tls;

pub use tls::{Passthrough, ProxyProtocol, RedirectHttps, Tcp, Tls};

use super::Address;
use super::units::{Count, FileMode, Percent, Rate, Size, Time};

/// A place where clients connect.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Listener {
    /// Its name in metrics and logs.
    pub name: String,
    /// `host:port`, `[v6]:port` or `unix:/path`.
    pub address: Address,
    /// Who may connect to its unix socket: the owner and the group, unless told otherwise.
    #[serde(default)]
    pub mode: FileMode,
    /// What clients may speak on it: by default `http1`, and with `tls` `http1` and `h2`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocols: Option<Vec<Protocol>>,
    /// The PROXY protocol, which says who the client is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Has clients sent to HTTPS, whatever they ask for; no route is looked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redirect_https: Option<RedirectHttps>,
    /// TLS. Without it everything is in clear text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// Names of TLS whose connections pass as they are, without being decrypted here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub passthrough: Vec<Passthrough>,
    /// Has every connection passed on as it is, whatever is spoken on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<Tcp>,
    /// What becomes of header fields whose names have anything but letters, digits and hyphens. CGI, WSGI, Rack and PHP
    /// read `X_Forwarded_For` as `X-Forwarded-For`, so that a client can forge what a proxy says.
    #[serde(default)]
    pub odd_header_names: OddNames,
    /// What clients may cost.
    #[serde(default)]
    pub limits: Limits,
    /// How clients of HTTP/2 may behave.
    #[serde(default)]
    pub http2: Http2,
    /// How long clients may take.
    #[serde(default)]
    pub timeouts: Timeouts,
}

impl Listener {
    /// What clients may speak on it.
    pub fn spoken(&self) -> &[Protocol] {
        match &self.protocols {
            Some(written) => written,
            None if self.tls.is_some() => &[Protocol::Http1, Protocol::H2],
            None => &[Protocol::Http1],
        }
    }
}

/// A protocol that a client may speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// HTTP/1.0 and HTTP/1.1.
    Http1,
    /// HTTP/2 over TLS, where the client agrees on it (ALPN, RFC 9113 §3.2).
    H2,
    /// HTTP/2 in clear text, by prior knowledge (RFC 9113 §3.3).
    H2c,
}

/// What becomes of header fields whose names have anything but letters, digits and hyphens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OddNames {
    /// They are dropped.
    #[default]
    Drop,
    /// The request is refused with 400.
    Refuse,
    /// They pass, but for those that could be taken for a field of a proxy, of framing or of the connection.
    Keep,
}

/// What the clients of a listener may cost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Open connections. One more is answered 503 and closed. All listeners together have no more than the open files
    /// of the process allow, see `server.open_files`.
    pub connections: Count,
    /// Open connections of one client address; as much of it counts as `ipv4_prefix` and `ipv6_prefix` say. One more is
    /// answered 429 and closed. Peers of `trusted_proxies` and of unix sockets speak for many clients and are not
    /// limited. Unless it is `unlimited`, an address has no more than three times as many as the open files of the
    /// process leave to others.
    pub connections_per_ip: Count,
    /// New connections, of all clients. One that comes sooner is answered 503 and closed. As much as the rate names may
    /// come at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connection_rate: Option<Rate>,
    /// New connections of one client address. One that comes sooner is answered 429 and closed. Trusted proxies are not
    /// limited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connection_rate_per_ip: Option<Rate>,
    /// TLS handshakes that are under way, from the first byte to the end. One more is closed.
    pub handshakes: Count,
    /// TLS handshakes of one client address that are under way. Trusted proxies are not limited.
    pub handshakes_per_ip: Count,
    /// TLS handshakes that begin, of all clients. One that comes sooner is closed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handshake_rate: Option<Rate>,
    /// TLS handshakes of one client address that begin. Trusted proxies are not limited.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handshake_rate_per_ip: Option<Rate>,
    /// Requests of all clients that are under way. One more is answered 503.
    pub requests: Count,
    /// Requests of one client address that are under way: over HTTP/2 a connection has many at once. One more is
    /// answered
    /// 429. As for connections, trusted proxies are not limited. Unless it is `unlimited`, a quarter as many as the open
    /// files allow connections is the most.
    pub requests_per_ip: Count,
    /// Header fields of a request, at most 256. One more is answered 431.
    pub headers: Count,
    /// Bytes of a request header, request line included. More is answered 431.
    pub header_bytes: Size,
    /// Requests on one connection; the last is answered with `Connection: close`, on HTTP/2 with GOAWAY.
    pub requests_per_connection: Count,
    /// Streams that an HTTP/2 client may have open at once.
    pub streams: Count,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections: Count(50_000),
            connections_per_ip: Count(10_000),
            connection_rate: None,
            connection_rate_per_ip: None,
            handshakes: Count(10_000),
            handshakes_per_ip: Count(1_000),
            handshake_rate: None,
            handshake_rate_per_ip: None,
            requests: Count(50_000),
            requests_per_ip: Count(4_000),
            headers: Count(100),
            header_bytes: Size::kib(32),
            requests_per_connection: Count(10_000),
            streams: Count(128),
        }
    }
}

/// What a client of HTTP/2 may do that costs the gateway work, on one connection. Who does more is cut off, with GOAWAY
/// and ENHANCE_YOUR_CALM. Of a rate, ten seconds' worth may come at once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Http2 {
    /// Requests that it gives up (RST_STREAM) within about a second. Later ones are bounded by `limits.streams`.
    pub resets: Rate,
    /// The share of its requests that it may give up within a second, once it has begun 200; `100%`: all of them.
    pub reset_share: Percent,
    /// Requests that the gateway gives up because of what the client did wrong, as one that comes although
    /// `limits.streams` are open, in all.
    pub provoked_resets: Count,
    /// Pings. Each frame that it is sent of an answer allows one more.
    pub pings: Rate,
    /// Changes of its settings.
    pub settings: Rate,
    /// Pieces in which it gives credit for answers. Every 32 bytes of an answer that it is sent allow one more.
    pub window_updates: Rate,
    /// Words on priorities (PRIORITY, PRIORITY_UPDATE). Each request allows two more.
    pub priorities: Rate,
    /// Frames that say nothing to the gateway.
    pub unknown_frames: Rate,
    /// Pieces that may follow the first of a request header (CONTINUATION), besides the last. More than 5 have an
    /// effect only where `header_bytes` is above 64KiB.
    pub continuations: Count,
    /// Pieces of bodies without content, besides the last of each body, in all: at most 100.
    pub empty_data: Count,
    /// Whether clients are told that they may open a WebSocket over a stream (RFC 8441).
    pub websocket: bool,
}

impl Default for Http2 {
    fn default() -> Self {
        let a_second = |events| Rate { events, per: std::time::Duration::from_secs(1) };
        Http2 {
            resets: a_second(20),
            reset_share: Percent(75.0),
            provoked_resets: Count(200),
            pings: a_second(10),
            settings: a_second(5),
            window_updates: a_second(100),
            priorities: a_second(40),
            unknown_frames: a_second(10),
            continuations: Count(5),
            empty_data: Count(100),
            websocket: true,
        }
    }
}

/// How long the clients of a listener may take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// From the first byte of a request header to its last: the whole of it, however it trickles.
    /// On HTTP/2: of the preface, of a frame other than DATA, of a header block over several frames.
    pub header: Time,
    /// Between requests, and from the connection to its first byte.
    pub idle: Time,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts { header: Time::seconds(10), idle: Time::seconds(75) }
    }
}
