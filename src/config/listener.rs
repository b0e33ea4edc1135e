//! `listeners:`: the sockets on which clients connect, their protocols and limits.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub mod tls;

pub use tls::{Passthrough, ProxyProtocol, RedirectHttps, Tcp, Tls};

use super::Address;
use super::units::{Count, FileMode, Percent, Rate, Size, Time};

/// A socket on which clients connect.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Listener {
    /// The name in metrics and logs.
    pub name: String,
    /// `host:port`, `[v6]:port` or `unix:/path`.
    pub address: Address,
    /// File mode of the unix socket; by default the owner and the group may connect.
    #[serde(default)]
    pub mode: FileMode,
    /// Protocols that clients may use: by default `http1`, and with `tls` `http1` and `h2`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocols: Option<Vec<Protocol>>,
    /// The PROXY protocol, with which a proxy in front of Forebay names the client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Redirects all requests to HTTPS, before routing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redirect_https: Option<RedirectHttps>,
    /// TLS. Without it, the listener uses clear text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// TLS server names whose connections are forwarded without decryption.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub passthrough: Vec<Passthrough>,
    /// Forwards every connection unchanged (TCP proxy), whatever its protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<Tcp>,
    /// What happens to header fields whose names contain anything but letters, digits and hyphens. CGI, WSGI, Rack
    /// and PHP read `X_Forwarded_For` as `X-Forwarded-For`, so a client could forge a field that a proxy sets.
    #[serde(default)]
    pub odd_header_names: OddNames,
    /// Limits on connections, handshakes and requests.
    #[serde(default)]
    pub limits: Limits,
    /// Limits on the behaviour of HTTP/2 clients.
    #[serde(default)]
    pub http2: Http2,
    /// Time limits for clients.
    #[serde(default)]
    pub timeouts: Timeouts,
}

impl Listener {
    /// The protocols that clients may use.
    pub fn spoken(&self) -> &[Protocol] {
        match &self.protocols {
            Some(written) => written,
            None if self.tls.is_some() => &[Protocol::Http1, Protocol::H2],
            None => &[Protocol::Http1],
        }
    }
}

/// A protocol that clients may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// HTTP/1.0 and HTTP/1.1.
    Http1,
    /// HTTP/2 over TLS, negotiated with ALPN (RFC 9113 §3.2).
    H2,
    /// HTTP/2 in clear text, with prior knowledge (RFC 9113 §3.3).
    H2c,
}

/// What happens to header fields whose names contain anything but letters, digits and hyphens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OddNames {
    /// The fields are removed.
    #[default]
    Drop,
    /// The request is refused with 400.
    Refuse,
    /// The fields pass, except those that look like a field of a proxy, of framing or of the connection.
    Keep,
}

/// Limits of a listener.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Open connections. Further ones get 503 and are closed. `server.open_files` limits all listeners together.
    pub connections: Count,
    /// Open connections per client address (see `ipv4_prefix` and `ipv6_prefix`). Further ones get 429 and are
    /// closed. Peers in `trusted_proxies` and on unix sockets speak for many clients and are exempt. Unless this is
    /// `unlimited`, one address gets at most three times as many connections as the open files leave to others.
    pub connections_per_ip: Count,
    /// Rate of new connections, all clients together. Connections above the rate get 503 and are closed. The burst
    /// is the number in the rate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connection_rate: Option<Rate>,
    /// Rate of new connections per client address. Connections above the rate get 429 and are closed. Trusted
    /// proxies are exempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connection_rate_per_ip: Option<Rate>,
    /// TLS handshakes in progress, counted from the first byte. Further connections are closed.
    pub handshakes: Count,
    /// TLS handshakes in progress per client address. Trusted proxies are exempt.
    pub handshakes_per_ip: Count,
    /// Rate of new TLS handshakes, all clients together. Connections above the rate are closed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handshake_rate: Option<Rate>,
    /// Rate of new TLS handshakes per client address. Trusted proxies are exempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handshake_rate_per_ip: Option<Rate>,
    /// Active requests, all clients together. Further ones get 503.
    pub requests: Count,
    /// Active requests per client address; an HTTP/2 connection carries many at once. Further ones get 429. Trusted
    /// proxies are exempt. Unless this is `unlimited`, at most a quarter of the connections that the open files
    /// allow.
    pub requests_per_ip: Count,
    /// Header fields per request, at most 256. A request with more gets 431.
    pub headers: Count,
    /// Bytes of a request header, including the request line. A larger one gets 431.
    pub header_bytes: Size,
    /// Requests per connection. The last response carries `Connection: close`; on HTTP/2, GOAWAY is sent.
    pub requests_per_connection: Count,
    /// Open streams per HTTP/2 connection.
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

/// Limits per HTTP/2 connection on frames that cost work. A client above a limit gets GOAWAY with
/// ENHANCE_YOUR_CALM, and the connection is closed. The burst of each rate is ten seconds' worth.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Http2 {
    /// Requests that the client cancels (RST_STREAM) within about a second. `limits.streams` bounds later ones.
    pub resets: Rate,
    /// Share of its requests that the client may cancel within a second, counted from the 200th request on; `100%`:
    /// all.
    pub reset_share: Percent,
    /// Total of streams that the gateway resets because of client errors, such as a stream above `limits.streams`.
    pub provoked_resets: Count,
    /// PING frames. Each response frame that was sent allows one more.
    pub pings: Rate,
    /// SETTINGS frames.
    pub settings: Rate,
    /// WINDOW_UPDATE frames. Every 32 response bytes that were sent allow one more.
    pub window_updates: Rate,
    /// PRIORITY and PRIORITY_UPDATE frames. Each request allows two more.
    pub priorities: Rate,
    /// Frames of unknown types.
    pub unknown_frames: Rate,
    /// CONTINUATION frames per header block, not counting the last. More than 5 matter only if `header_bytes` is
    /// above 64KiB.
    pub continuations: Count,
    /// Total of empty DATA frames, not counting the last of each body: at most 100.
    pub empty_data: Count,
    /// Allows WebSockets over HTTP/2 streams, and announces it to clients (RFC 8441).
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

/// Time limits for the clients of a listener.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// From the first to the last byte of a request header. On HTTP/2: of the preface, of a frame other than DATA,
    /// of a header block over several frames.
    pub header: Time,
    /// Idle time between requests, and from the connection to its first byte.
    pub idle: Time,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts { header: Time::seconds(10), idle: Time::seconds(75) }
    }
}
