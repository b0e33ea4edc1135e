//! `routes:`: which request goes where, and through which filters.

pub mod mirror;
pub mod retry;
pub mod upgrade;

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU32;

use schemars::JsonSchema;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::filter::FilterEntry;
use super::units::{ByteRate, Size, Time};

pub use mirror::Mirror;
pub use retry::Retry;
pub use upgrade::Protocol;

/// Requests of one kind and what becomes of them.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// Its name in metrics and logs.
    pub name: String,
    /// Which requests it takes. All of them if nothing is said.
    #[serde(default, rename = "match")]
    pub matches: Match,
    /// What is done to them, in order.
    #[serde(default)]
    pub filters: Vec<FilterEntry>,
    /// For how long one call of a filter may wait: for the request, for a piece of a body, for the answer. The exchange
    /// is then refused as `route.filter_timeout` (504), or cut if its answer has begun; no endpoint is accused.
    #[serde(default = "Route::default_filter_timeout")]
    pub filter_timeout: Time,
    /// Where they go; or see `upstreams`.
    #[serde(default)]
    pub upstream: Option<String>,
    /// Where they go, by weight; or see `upstream`.
    #[serde(default)]
    pub upstreams: Vec<Split>,
    /// What is held back of the request and of the answer, so that a slow client holds no backend.
    #[serde(default)]
    pub buffering: Buffering,
    /// How long the client may take, and how fast it is served.
    #[serde(default)]
    pub client: Client,
    /// From the last byte of the request to the last byte that comes from the upstream, all attempts included; longer
    /// is answered 504, or cut. As long as it takes, if absent. Of a gRPC call it holds for the request, too. A
    /// WebSocket has none once the upstream has agreed to it.
    #[serde(default)]
    pub deadline: Option<Time>,
    /// Whether a gRPC call is treated as one: neither side of it is held back.
    #[serde(default)]
    pub grpc: Grpc,
    /// What becomes of calls of gRPC-Web, which is what browsers speak.
    #[serde(default)]
    pub grpc_web: GrpcWeb,
    /// Protocols besides HTTP that clients may ask for with `Upgrade` over HTTP/1.1, such as `tcp` or `SPDY/3.1`.
    /// Behind the 101 of an endpoint they are a tunnel, with `timeouts.receive` of the upstream and no other limit. A
    /// request for another one, and any over an upstream of HTTP/2, is an ordinary request. `h2c` cannot be among them.
    #[serde(default = "Route::default_upgrades")]
    pub upgrades: Vec<Protocol>,
    /// When a request that failed is sent again.
    #[serde(default)]
    pub retry: Retry,
    /// Whether another upstream gets copies.
    #[serde(default)]
    pub mirror: Option<Mirror>,
}

impl Route {
    fn default_filter_timeout() -> Time {
        Time::seconds(30)
    }

    fn default_upgrades() -> Vec<Protocol> {
        Protocol::parse(Protocol::WEBSOCKET).into_iter().collect()
    }
}

/// Whether a gRPC call is treated as one. It is a POST over HTTP/2 with `te: trailers` and the media type
/// `application/grpc`, so that every client may make one of any request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Grpc {
    /// Where its upstream is asked over HTTP/2: neither side of it is held back, and `client.min_rate.read` does
    /// not count.
    #[default]
    Auto,
    /// It is a request like any other.
    Never,
}

/// What becomes of calls of gRPC-Web in their binary form (`application/grpc-web`, alone or with a suffix).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum GrpcWeb {
    /// They pass as they are.
    #[default]
    Pass,
    /// Their upstream, which must be asked over HTTP/2, gets calls of gRPC. The trailers of its answers come at the end
    /// of the body.
    Bridge,
}

/// One side of a split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Split {
    /// The upstream.
    pub name: String,
    /// Its share of the requests, relative to its neighbours.
    #[serde(default = "super::upstream::Endpoint::default_weight")]
    pub weight: NonZeroU32,
}

/// Which requests a route takes: all that is said must hold.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Match {
    /// Host names, exact (`shop.example.com`) or by suffix (`*.example.com`, any number of labels). Any, if empty.
    /// Without port; lower-cased when read.
    #[serde(deserialize_with = "lower_cased")]
    pub hosts: Vec<String>,
    /// The path. Any, if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathMatch>,
    /// Methods, such as `GET`. Any, if empty.
    pub methods: Vec<String>,
    /// Headers by name; all must match.
    pub headers: BTreeMap<String, ValueMatch>,
    /// Query arguments by name; all must match.
    pub queries: BTreeMap<String, ValueMatch>,
    /// A condition in CEL, such as `request.cookies["beta"] == "1"`, that is asked when all else matches; see
    /// `conf/manual/expressions.md`. A route with one goes before one without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub when: Option<String>,
}

/// A condition on the path.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PathMatch {
    /// This path and no other.
    Exact(String),
    /// This path and what is below it, by whole segments: `/api` takes `/api` and `/api/v1`, not `/apis`.
    Prefix(String),
    /// Paths that this regular expression matches as a whole.
    Regex(String),
}

/// A condition on the value of a header or a query argument.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(untagged)]
#[schemars(deny_unknown_fields)]
pub enum ValueMatch {
    /// Exactly this value.
    Exact(String),
    /// Values that this regular expression matches as a whole.
    Regex {
        /// The regular expression.
        regex: String,
    },
    /// Whether it is there at all.
    Present {
        /// `true`: it must be there; `false`: it must not.
        present: bool,
    },
}

/// Shows no value: what a header must hold may be a secret.
impl fmt::Debug for ValueMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ValueMatch::Exact(_) => f.write_str("Exact(…)"),
            ValueMatch::Regex { .. } => f.write_str("Regex(…)"),
            ValueMatch::Present { present } => write!(f, "Present({present})"),
        }
    }
}

fn lower_cased<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let hosts = Vec::<String>::deserialize(deserializer)?;
    Ok(hosts.into_iter().map(|host| host.to_ascii_lowercase()).collect())
}

impl<'de> Deserialize<'de> for PathMatch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        /// All the keys there are, so that an unknown one is found as in any other map.
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields, expecting = "`{ exact: … }`, `{ prefix: … }` or `{ regex: … }`")]
        struct Written {
            exact: Option<String>,
            prefix: Option<String>,
            regex: Option<String>,
        }

        match Written::deserialize(deserializer)? {
            Written { exact: Some(path), prefix: None, regex: None } => Ok(PathMatch::Exact(path)),
            Written { exact: None, prefix: Some(path), regex: None } => Ok(PathMatch::Prefix(path)),
            Written { exact: None, prefix: None, regex: Some(pattern) } => Ok(PathMatch::Regex(pattern)),
            _ => Err(de::Error::custom("a path has one condition: write one of `exact`, `prefix` and `regex`")),
        }
    }
}

impl<'de> Deserialize<'de> for ValueMatch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueCondition)
    }
}

struct ValueCondition;

impl<'de> Visitor<'de> for ValueCondition {
    type Value = ValueMatch;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value as text (a number stands in quotes), or `{ regex: … }`, or `{ present: true | false }`")
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<ValueMatch, E> {
        Ok(ValueMatch::Exact(value.to_owned()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ValueMatch, A::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Written {
            regex: Option<String>,
            present: Option<bool>,
        }

        match Written::deserialize(MapAccessDeserializer::new(map))? {
            Written { regex: Some(regex), present: None } => Ok(ValueMatch::Regex { regex }),
            Written { regex: None, present: Some(present) } => Ok(ValueMatch::Present { present }),
            _ => Err(de::Error::custom(
                "a value has one condition: write one of `regex` and `present`, or the value itself",
            )),
        }
    }
}

/// What is held back of each direction. WebSockets and gRPC calls (see `grpc`) are streamed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Buffering {
    /// The request body, on its way to the upstream.
    pub request: RequestBuffering,
    /// The answer, on its way to the client.
    pub response: ResponseBuffering,
}

/// How much of a request body is here before an upstream is asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RequestBuffering {
    /// `auto`: a body is held back until it is whole, for which one that is here at once need not wait; what does not
    /// fit is streamed. `full`: the same, but what does not fit is refused. `stream`: none is held back.
    pub mode: BufferMode,
    /// Bytes of one body that are held in memory; what is beyond goes to disk.
    pub memory: Size,
    /// Bytes of one body that are held on disk. One that does not fit into this and `memory` is streamed with `auto`;
    /// with `full` it is refused with 413, unless `on_disk_full` is `stream`.
    pub disk: Size,
    /// The longest request body. A longer one is refused with 413, before a byte of it is read if its length is
    /// known.
    pub max_body: Size,
    /// What happens to a body for which there is no room left on the disk, or in `resources.disk`.
    pub on_disk_full: OnDiskFull,
}

impl Default for RequestBuffering {
    fn default() -> Self {
        RequestBuffering {
            mode: BufferMode::Auto,
            memory: Size::kib(64),
            disk: Size::kib(256 * 1024),
            max_body: Size::kib(1024 * 1024),
            on_disk_full: OnDiskFull::Refuse,
        }
    }
}

/// How much of an answer is held for a client that does not take it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ResponseBuffering {
    /// `auto`: bytes leave at once, and what the client does not take is held back. `full`: nothing leaves before the
    /// answer is whole, if there is room for it. `stream`: the upstream waits for the client. Server-sent events and
    /// answers with `X-Accel-Buffering: no` are always streamed.
    pub mode: BufferMode,
    /// Bytes of one answer that are held in memory; what is beyond goes to disk.
    pub memory: Size,
    /// Bytes of one answer that are held on disk; once they are full, the upstream waits for the client.
    pub disk: Size,
}

impl Default for ResponseBuffering {
    fn default() -> Self {
        ResponseBuffering { mode: BufferMode::Auto, memory: Size::kib(32), disk: Size::kib(256 * 1024) }
    }
}

/// When bytes are held back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BufferMode {
    /// When the client is slow.
    #[default]
    Auto,
    /// Always, until the last one is here.
    Full,
    /// Never.
    Stream,
}

/// What happens to a request body for which there is no room on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnDiskFull {
    /// It is refused with 503 and `Retry-After`.
    #[default]
    Refuse,
    /// It is streamed: what is here goes on, and the upstream waits for the rest.
    Stream,
}

/// How long the client of an exchange may take, and how fast it is served.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Client {
    /// For the whole request body; longer is refused with 408.
    pub body_total: Time,
    /// Between two pieces of the request body; longer is refused with 408.
    pub body_idle: Time,
    /// Between two pieces of the response that it takes; longer, and the connection is cut.
    pub write_idle: Time,
    /// What it means that a client of HTTP/1 closes its sending side while it waits for its answer. `answer`: it
    /// has sent all that it wants to send, and gets its answer. `abort`: it is gone, and the upstream is let go. A
    /// reset always means that it is gone.
    pub half_close: HalfClose,
    /// How slow it may be in the long run.
    pub min_rate: MinRate,
    /// How fast an answer is sent to it. As fast as it takes it, if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_rate: Option<LimitRate>,
}

impl Default for Client {
    fn default() -> Self {
        Client {
            body_total: Time::seconds(3600),
            body_idle: Time::seconds(60),
            write_idle: Time::seconds(60),
            half_close: HalfClose::default(),
            min_rate: MinRate::default(),
            limit_rate: None,
        }
    }
}

/// What the end of a client's sending side means behind a complete request (RFC 9112 §9.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum HalfClose {
    /// The client waits for its answer.
    #[default]
    Answer,
    /// The client is gone.
    Abort,
}

/// How slow a client may be in the long run. Whoever keeps the rate may take as long as it likes; whoever is slower
/// lives on its grace. Time in which nobody waits for the client does not count.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MinRate {
    /// At which the request body must come; slower is refused with 408. `0B/s`: however slow.
    pub read: ByteRate,
    /// At which the client must take its answer; slower, and the connection is cut. `0B/s`: however slow.
    pub write: ByteRate,
    /// How far it may fall behind: waiting for the client uses this up, and each byte gives back the time that it
    /// takes at the minimum rate, up to the whole of it.
    pub grace: Time,
}

impl Default for MinRate {
    fn default() -> Self {
        MinRate { read: ByteRate(512), write: ByteRate(512), grace: Time::seconds(20) }
    }
}

/// How fast an answer is sent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitRate {
    /// Bytes a second of each answer.
    pub rate: ByteRate,
    /// Bytes of each answer that are sent before the limit holds.
    #[serde(default = "LimitRate::after")]
    pub after: Size,
}

impl LimitRate {
    fn after() -> Size {
        Size(0)
    }
}
