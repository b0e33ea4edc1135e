//! `routes:`: which requests go to which upstream, and through which filters.

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

/// A rule: which requests it matches and how they are handled.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// The name in metrics and logs.
    pub name: String,
    /// The conditions for a request. Without any, the route matches all requests.
    #[serde(default, rename = "match")]
    pub matches: Match,
    /// The filters, in order.
    #[serde(default)]
    pub filters: Vec<FilterEntry>,
    /// Time limit for one filter call: for the request, for a chunk of a body, for the response. After it, the
    /// exchange is refused as `route.filter_timeout` (504), or cut if the response has begun. It does not count as
    /// a failure of the endpoint.
    #[serde(default = "Route::default_filter_timeout")]
    pub filter_timeout: Time,
    /// The destination. Alternative: `upstreams`.
    #[serde(default)]
    pub upstream: Option<String>,
    /// Several destinations, by weight. Alternative: `upstream`.
    #[serde(default)]
    pub upstreams: Vec<Split>,
    /// Buffering of requests and responses, so that a slow client does not occupy a backend.
    #[serde(default)]
    pub buffering: Buffering,
    /// Time limits and rates of the client.
    #[serde(default)]
    pub client: Client,
    /// Time limit from the last byte of the request to the last byte from the upstream, all attempts included.
    /// After it, the client gets 504, or the response is cut. Without a value there is no limit. For a gRPC call
    /// it includes the request. A WebSocket has no limit once the upstream has accepted it.
    #[serde(default)]
    pub deadline: Option<Time>,
    /// Whether gRPC calls are streamed in both directions.
    #[serde(default)]
    pub grpc: Grpc,
    /// How gRPC-Web calls, the form that browsers use, are handled.
    #[serde(default)]
    pub grpc_web: GrpcWeb,
    /// Protocols besides HTTP that clients may switch to with `Upgrade` over HTTP/1.1, such as `tcp` or `SPDY/3.1`.
    /// After the endpoint's 101 the connection is a tunnel, limited only by `timeouts.receive` of the upstream.
    /// Requests for other protocols, and all requests to an HTTP/2 upstream, are handled as ordinary requests.
    /// `h2c` is not allowed.
    #[serde(default = "Route::default_upgrades")]
    pub upgrades: Vec<Protocol>,
    /// When a failed request is sent again.
    #[serde(default)]
    pub retry: Retry,
    /// Copies requests to another upstream.
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

/// Whether a request is handled as a gRPC call. A gRPC call is a POST over HTTP/2 with `te: trailers` and the media
/// type `application/grpc`; any client can send one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Grpc {
    /// If the upstream uses HTTP/2, gRPC calls are streamed in both directions, and `client.min_rate.read` does not
    /// apply.
    #[default]
    Auto,
    /// They are handled as ordinary requests.
    Never,
}

/// How binary gRPC-Web calls (`application/grpc-web`, alone or with a suffix) are handled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum GrpcWeb {
    /// They pass unchanged.
    #[default]
    Pass,
    /// They are translated to gRPC; the upstream must use HTTP/2. The trailers of a response come at the end of its
    /// body.
    Bridge,
}

/// One destination of a split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Split {
    /// The name of the upstream.
    pub name: String,
    /// Its share of the requests, relative to the other weights.
    #[serde(default = "super::upstream::Endpoint::default_weight")]
    pub weight: NonZeroU32,
}

/// Conditions for a request; all of them must hold.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Match {
    /// Host names without port, exact (`shop.example.com`) or by suffix (`*.example.com`, any number of labels).
    /// Empty: any host. Compared in lower case.
    #[serde(deserialize_with = "lower_cased")]
    pub hosts: Vec<String>,
    /// The path. Without it: any path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathMatch>,
    /// Methods, such as `GET`. Empty: any method.
    pub methods: Vec<String>,
    /// Header fields by name; all must match.
    pub headers: BTreeMap<String, ValueMatch>,
    /// Query arguments by name; all must match.
    pub queries: BTreeMap<String, ValueMatch>,
    /// A CEL condition, such as `request.cookies["beta"] == "1"`, evaluated after all other conditions match; see
    /// `conf/manual/expressions.md`. A route with `when` has priority over one without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub when: Option<String>,
}

/// A condition on the path.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PathMatch {
    /// Exactly this path.
    Exact(String),
    /// This path and everything below it, by whole segments: `/api` matches `/api` and `/api/v1`, not `/apis`.
    Prefix(String),
    /// A regular expression that must match the whole path.
    Regex(String),
}

/// A condition on the value of a header field or a query argument.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(untagged)]
#[schemars(deny_unknown_fields)]
pub enum ValueMatch {
    /// Exactly this value.
    Exact(String),
    /// A regular expression that must match the whole value.
    Regex {
        /// The regular expression.
        regex: String,
    },
    /// Whether it must be present.
    Present {
        /// `true`: it must be present; `false`: it must be absent.
        present: bool,
    },
}

/// Hides the values: the expected value of a header may be a secret.
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
        /// All possible keys, so that an unknown one is reported like in any other map.
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
        f.write_str("a value as text (put a number into quotes), or `{ regex: … }`, or `{ present: true | false }`")
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

/// Buffering per direction. WebSockets and gRPC calls (see `grpc`) are streamed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Buffering {
    /// The request body, on its way to the upstream.
    pub request: RequestBuffering,
    /// The response, on its way to the client.
    pub response: ResponseBuffering,
}

/// How much of a request body is buffered before an upstream is chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RequestBuffering {
    /// `auto`: a body is sent once it is complete; a body that does not fit is streamed. `full`: the same, but a
    /// body that does not fit is refused. `stream`: nothing is buffered.
    pub mode: BufferMode,
    /// Memory per body; the rest goes to disk.
    pub memory: Size,
    /// Disk space per body. A body that exceeds `memory` and `disk` together is streamed with `auto`; with `full`
    /// it gets 413, unless `on_disk_full` is `stream`.
    pub disk: Size,
    /// Longest request body. A longer one gets 413; if its length is declared, before any of it is read.
    pub max_body: Size,
    /// What happens if the disk, or `resources.disk`, has no room for a body.
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

/// How much of a response is buffered for a slow client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ResponseBuffering {
    /// `auto`: bytes are sent at once, and those that the client does not take are buffered. `full`: sending starts
    /// when the response is complete, as far as it fits. `stream`: the upstream waits for the client. Server-sent
    /// events and responses with `X-Accel-Buffering: no` are always streamed.
    pub mode: BufferMode,
    /// Memory per response; the rest goes to disk.
    pub memory: Size,
    /// Disk space per response; when it is used up, the upstream waits for the client.
    pub disk: Size,
}

impl Default for ResponseBuffering {
    fn default() -> Self {
        ResponseBuffering { mode: BufferMode::Auto, memory: Size::kib(32), disk: Size::kib(256 * 1024) }
    }
}

/// When a body is buffered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BufferMode {
    /// While the client is slow.
    #[default]
    Auto,
    /// Until the body is complete.
    Full,
    /// Never.
    Stream,
}

/// What happens to a request body if the disk is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnDiskFull {
    /// The request gets 503 with `Retry-After`.
    #[default]
    Refuse,
    /// The body is streamed: the buffered part is sent, and the upstream waits for the rest.
    Stream,
}

/// Time limits and rates of an exchange's client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Client {
    /// Time limit for the whole request body. After it, the request gets 408.
    pub body_total: Time,
    /// Time limit between two chunks of the request body. After it, the request gets 408.
    pub body_idle: Time,
    /// Longest time for which the client acknowledges no bytes. After it, the connection is closed.
    pub write_idle: Time,
    /// How a FIN from an HTTP/1 client is interpreted while it waits for its response. `answer`: the client has
    /// only finished sending and gets its response. `abort`: the client is gone, and the upstream request is
    /// cancelled. A reset always means that the client is gone.
    pub half_close: HalfClose,
    /// The least average speed of the client.
    pub min_rate: MinRate,
    /// Limits the sending rate of responses. Without it, there is no limit.
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

/// What a client's FIN behind a complete request means (RFC 9112 §9.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum HalfClose {
    /// The client waits for its response.
    #[default]
    Answer,
    /// The client is gone.
    Abort,
}

/// The least average speed of a client. A slower client uses up its grace. Time in which Forebay does not wait for
/// the client does not count.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MinRate {
    /// Rate of the request body. A slower one gets 408. `0B/s`: no minimum.
    pub read: ByteRate,
    /// Rate at which the client takes its response. A slower connection is closed. `0B/s`: no minimum.
    pub write: ByteRate,
    /// How far the client may fall behind: waiting for the client uses up the grace, and each byte gives back its
    /// time at the minimum rate, up to the full grace.
    pub grace: Time,
}

impl Default for MinRate {
    fn default() -> Self {
        MinRate { read: ByteRate(512), write: ByteRate(512), grace: Time::seconds(20) }
    }
}

/// The sending rate of responses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitRate {
    /// Bytes per second, for each response.
    pub rate: ByteRate,
    /// Bytes of each response that are sent before the limit applies.
    #[serde(default = "LimitRate::after")]
    pub after: Size,
}

impl LimitRate {
    fn after() -> Size {
        Size(0)
    }
}
