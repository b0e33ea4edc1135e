//! `server:` and the other keys that apply to the whole process.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroUsize;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, Unexpected, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use super::text::Text;
use super::units::{Count, FileMode, Percent, Size, Time};

/// Settings of the process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Server {
    /// Worker threads: `auto` is one per core that the process may use, according to its CPU affinity and the CPU
    /// quota of its cgroup.
    pub threads: Threads,
    /// The user, by name or number, that Forebay switches to from root after it has bound its ports and read its
    /// keys. That user needs read access to renewed certificates and keys, and write access to `spool_dir` and the
    /// access log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Lets idle workers take tasks from busy ones. Without it, a connection stays on its worker, which is cheaper
    /// and fairer.
    pub work_stealing: bool,
    /// Idle upstream connections that are kept, all upstreams together. Set it above the expected concurrency.
    pub keepalive_pool: Count,
    /// The directory for bodies that do not fit into memory, in unnamed files (mode 0600) that vanish with the
    /// process. It must exist and be writable.
    pub spool_dir: String,
    /// Threads for disk reads and writes, so that no worker blocks on a disk: from 1 to 64.
    pub disk_threads: Count,
    /// Disk operations that may be queued; when the queue is full, exchanges wait. From 1 to a million.
    pub disk_queue: Count,
    /// The nice(2) value of the disk threads: from 0, like the workers, to 19. Next to one busy program, a thread
    /// with 10 gets a tenth of its core; with 19, a seventieth, and responses wait for the disk.
    pub disk_nice: Count,
    /// Limit on simultaneous health checks, all upstreams together; further ones wait. From 1 to 10,000.
    pub health_checks: Count,
    /// How the open files of the process are shared out.
    pub open_files: OpenFiles,
    /// What happens on SIGTERM.
    pub shutdown: Shutdown,
    /// What happens on SIGUSR2 and with `forebay upgrade`.
    pub upgrade: Upgrade,
    /// A file with the PID of the serving process. Forebay writes it as `user` once it is ready and removes it when
    /// it exits. After a takeover, the new process writes its own PID.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid_file: Option<String>,
}

impl Default for Server {
    fn default() -> Self {
        Server {
            threads: Threads::Auto,
            user: None,
            work_stealing: false,
            keepalive_pool: Count(4_000),
            spool_dir: "/tmp".to_owned(),
            disk_threads: Count(2),
            disk_queue: Count(1_024),
            disk_nice: Count(10),
            health_checks: Count(256),
            open_files: OpenFiles::default(),
            shutdown: Shutdown::default(),
            upgrade: Upgrade::default(),
            pid_file: None,
        }
    }
}

impl Server {
    /// Limit on simultaneous health checks.
    pub fn checks_at_once(&self) -> usize {
        usize::try_from(self.health_checks.0).unwrap_or(usize::MAX)
    }
}

/// How the open files of the process (`ulimit -Hn`) are shared out, after those that Forebay itself needs. The
/// rest, at least a tenth, is for connections to backends, the admin endpoint and name resolution.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OpenFiles {
    /// Client connections, all listeners together. When open files run out, accepting pauses.
    pub clients: Percent,
    /// Spool files, one per body that does not fit into memory.
    pub spools: Percent,
}

impl Default for OpenFiles {
    fn default() -> Self {
        OpenFiles { clients: Percent(50.0), spools: Percent(25.0) }
    }
}

/// A number of worker threads: `auto`, or from 1 to 1,024.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// A number of threads.
    Fixed(NonZeroUsize),
    /// One per core that the process may use.
    Auto,
}

impl Threads {
    const MAX: usize = 1024;
}

impl<'de> Deserialize<'de> for Threads {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ThreadsVisitor)
    }
}

struct ThreadsVisitor;

impl Visitor<'_> for ThreadsVisitor {
    type Value = Threads;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`auto` or a number from 1 to {}", Threads::MAX)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Threads, E> {
        if text == "auto" { Ok(Threads::Auto) } else { Err(E::invalid_value(Unexpected::Str(text), &self)) }
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Threads, E> {
        let threads =
            usize::try_from(number).ok().filter(|&threads| threads <= Threads::MAX).and_then(NonZeroUsize::new);
        threads.map(Threads::Fixed).ok_or_else(|| E::invalid_value(Unexpected::Unsigned(number), &self))
    }
}

impl Serialize for Threads {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Threads::Fixed(threads) => threads.serialize(serializer),
            Threads::Auto => serializer.serialize_str("auto"),
        }
    }
}

impl JsonSchema for Threads {
    fn schema_name() -> Cow<'static, str> {
        "Threads".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "`auto` or a number of threads",
            "anyOf": [{ "const": "auto" }, { "type": "integer", "minimum": 1, "maximum": Threads::MAX }],
        })
    }
}

/// Graceful stop, in order: not ready, pause, listeners close, active exchanges finish, exit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Shutdown {
    /// Time between `/readyz` turning 503 and the listeners closing, so that load balancers notice: set it longer
    /// than their check interval. Meanwhile all requests are served, and every response ends its connection with
    /// `Connection: close` or GOAWAY.
    pub pause: Time,
    /// Time for active exchanges to finish. After it, they are cut, and the log has a line for each.
    pub deadline: Time,
}

impl Default for Shutdown {
    fn default() -> Self {
        Shutdown { pause: Time::seconds(5), deadline: Time::seconds(30) }
    }
}

/// A new process takes over: it starts, loads its configuration, becomes ready and accepts connections. The old one
/// then finishes its active exchanges, for at most `shutdown.deadline`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Upgrade {
    /// Time for the new process to become ready. After it, the new process is stopped and the old one continues. At
    /// most 10m.
    pub deadline: Time,
    /// Time that idle connections stay open after a takeover. The response to the next request closes the
    /// connection. Closing earlier could lose a request that is already on its way.
    pub idle: Time,
    /// Limit on older processes that are still finishing when another upgrade begins; from 1 to 64.
    pub processes: Count,
}

impl Default for Upgrade {
    fn default() -> Self {
        Upgrade { deadline: Time::seconds(60), idle: Time::seconds(5), processes: Count(32) }
    }
}

/// Limits on all buffered bodies together, and what happens when memory runs short.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Resources {
    /// Memory for bodies, all routes and both directions together, including data on its way to and from the disk;
    /// at least 1MiB. `auto` is a quarter of the cgroup's limit or of the machine's memory. It also caps a route's
    /// default `memory`.
    #[serde(deserialize_with = "super::memory::read")]
    #[schemars(with = "super::memory::Memory")]
    pub memory: Size,
    /// Disk space for bodies, all routes and both directions together; `0B`: nothing is written to disk. It also
    /// caps a route's default `disk`.
    pub disk: Size,
    /// The share of memory and disk that responses may use; the rest is reserved for request bodies. If a response
    /// gets no room, its endpoint waits for the client. The fuller the store, the less a single response may use,
    /// so that the slowest clients are limited first.
    pub responses: Percent,
    /// The share of one direction's limit that one client address may use (see `ipv4_prefix` and `ipv6_prefix`). It
    /// shrinks in proportion to the free space as others use more. A request body without room gets 429; a response
    /// waits. Clients behind trusted proxies count by their own address.
    pub per_client: Percent,
    /// What happens as memory runs short; measures that are not listed are never taken.
    pub on_pressure: Vec<PressureAction>,
    /// How long a request body may wait for memory before it gets 503, and how long a body of either direction may
    /// wait for the disk. A response waits for its client, which makes room.
    pub pause: Time,
    /// Exchanges that move much data take turns while there are many, so that small ones need not wait; so do new
    /// connections. This is the longest wait for a turn.
    pub turn: Time,
}

impl Default for Resources {
    fn default() -> Self {
        Resources {
            memory: Size::kib(512 * 1024),
            disk: Size::kib(8 * 1024 * 1024),
            responses: Percent(80.0),
            per_client: Percent(80.0),
            on_pressure: vec![PressureAction::Spill, PressureAction::Pause, PressureAction::Shed],
            pause: Time::seconds(30),
            turn: Time::seconds(10),
        }
    }
}

/// What happens as memory for bodies runs short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PressureAction {
    /// Bodies are written to disk even if their route's memory limit is not reached.
    Spill,
    /// Reading pauses on the connection that fills the memory.
    Pause,
    /// New exchanges get 503 with `Retry-After`.
    Shed,
}

/// The header fields that tell the upstream who the client is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Forwarded {
    /// `X-Forwarded-For`, `-Proto`, `-Host` and `-Port`.
    #[default]
    XForwarded,
    /// `Forwarded` (RFC 7239).
    Rfc7239,
    /// Both.
    Both,
}

/// The admin endpoint: `/metrics`, `/healthz`, `/readyz` and more; `/` lists all pages.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Admin {
    /// Enables the admin endpoint.
    pub enabled: bool,
    /// The address to listen on; by default loopback.
    pub address: super::Address,
    /// File mode of the unix socket; by default the owner and the group may connect.
    pub mode: FileMode,
    /// Additional host names for requests, without ports. IP addresses, `localhost`, the host of `address` and the
    /// machine's name are always allowed. Requests for other hosts are refused, which stops DNS rebinding: a web
    /// page whose own name resolves to this address.
    pub hosts: Vec<String>,
    /// A secret that every request must carry, as `Authorization: Bearer …` or as the `Basic` password; `/healthz`
    /// and `/readyz` need none. Without a token, every client that can connect may read, and every client on this
    /// machine may make changes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// TLS, as for a listener.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<super::listener::Tls>,
    /// Open connections; fewer if open files are scarce. A new connection replaces the one that has been idle
    /// longest.
    pub connections: Count,
    /// Active streaming responses, such as that of the status page: from 1 to 1,024.
    pub streams: Count,
}

impl Default for Admin {
    fn default() -> Self {
        let address = super::Address("127.0.0.1:9100".to_owned());
        Admin {
            enabled: true,
            address,
            mode: FileMode::default(),
            hosts: Vec::new(),
            token: None,
            tls: None,
            connections: Count(256),
            streams: Count(16),
        }
    }
}

/// Logs, metrics and traces.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Observability {
    /// The access log: one line per exchange.
    pub access_log: AccessLog,
    /// Limits for `/metrics`.
    pub metrics: MetricsLimits,
    /// Monitoring of the workers' event loops.
    pub event_loop: EventLoop,
    /// Trace spans of exchanges, sent to a collector.
    pub tracing: Tracing,
}

/// Trace spans: the collector, and which exchanges are recorded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Tracing {
    /// The OTLP/HTTP endpoint of a collector, such as `http://127.0.0.1:4318`; `/v1/traces` is added if there is no
    /// path. `off`: no spans, and `traceparent` passes unchanged.
    pub endpoint: String,
    /// The share of traces started here that are recorded. A trace that started elsewhere is recorded if its parent
    /// is.
    pub sample: Percent,
    /// The peers whose `traceparent` is trusted, including its decision to record a trace. For others, a new trace
    /// starts.
    pub parent: Parent,
    /// What spans contain of the query of a request.
    pub query: Query,
    /// The name of this service in traces.
    pub service_name: String,
    /// Header fields of each export request, such as an API key of the collector.
    pub headers: BTreeMap<String, String>,
    /// Time limit for an export, retries included, and for the last one at shutdown.
    pub timeout: Time,
    /// Exchanges whose spans may wait for export; further ones are dropped and counted. From 1 to 100k.
    pub queue: Count,
    /// How long spans are collected before an export: up to a minute.
    pub interval: Time,
    /// Additional attributes of each exchange's span, by name; empty values are omitted.
    pub attributes: BTreeMap<String, Text>,
}

impl Tracing {
    /// The value of `endpoint` that turns tracing off.
    pub const OFF: &str = "off";

    /// Whether tracing is on.
    pub fn is_on(&self) -> bool {
        self.endpoint != Tracing::OFF
    }
}

impl Default for Tracing {
    fn default() -> Self {
        Tracing {
            endpoint: Tracing::OFF.to_owned(),
            sample: Percent(1.0),
            parent: Parent::TrustedProxies,
            query: Query::Keep,
            service_name: "forebay".to_owned(),
            headers: BTreeMap::new(),
            timeout: Time::seconds(5),
            queue: Count(2_000),
            interval: Time::seconds(1),
            attributes: BTreeMap::new(),
        }
    }
}

/// What is recorded of the query of a request, which may contain secrets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Query {
    /// All of it.
    #[default]
    Keep,
    /// Nothing from the `?` on.
    Drop,
}

/// The peers whose `traceparent` is trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Parent {
    /// All peers. A trace then includes the client's side, but any client can have any number of exchanges
    /// recorded.
    Always,
    /// The peers in `trusted_proxies`.
    TrustedProxies,
    /// No peers: all traces start here.
    Never,
}

/// Monitoring of the workers' event loops.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EventLoop {
    /// A worker that is late by more than this counts as stalled: it is counted, and the log names the cause. Must
    /// exceed `heartbeat`.
    pub stall_threshold: Time,
    /// How often each worker is probed: from 1ms to 1s.
    pub heartbeat: Time,
}

impl Default for EventLoop {
    fn default() -> Self {
        EventLoop { stall_threshold: Time::milliseconds(100), heartbeat: Time::milliseconds(10) }
    }
}

/// The access log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AccessLog {
    /// The format of a line.
    pub format: LogFormat,
    /// `stdout`, `stderr`, `off`, or a file, which is reopened on SIGUSR1.
    pub path: String,
    /// What a line contains of the query of the request and of its `Referer`.
    pub query: Query,
    /// Lines that may wait for the writer; further ones are dropped and counted.
    pub queue: Count,
    /// Additional fields by name, such as `tenant: { cel: 'request.headers["x-tenant"]' }`; empty values are
    /// omitted.
    pub fields: BTreeMap<String, Text>,
}

impl AccessLog {
    /// The fields of every line, in either format: additional fields cannot use these names.
    pub const FIELDS: &[&str] = &[
        "time",
        "listener",
        "client",
        "method",
        "host",
        "target",
        "protocol",
        "status",
        "received",
        "sent",
        "total_ms",
        "own_ms",
        "phases",
        "route",
        "upstream",
        "endpoint",
        "attempts",
        "failed",
        "buffered",
        "spilled",
        "held_ms",
        "saved_ms",
        "reason",
        "grpc_status",
        "request_id",
        "tls",
        "client_subject",
        "trace_id",
        "referer",
        "user_agent",
    ];
}

impl Default for AccessLog {
    fn default() -> Self {
        AccessLog {
            format: LogFormat::Json,
            path: "stdout".to_owned(),
            query: Query::Keep,
            queue: Count(8_000),
            fields: BTreeMap::new(),
        }
    }
}

/// The format of an access log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// One JSON object, with the milliseconds of every phase.
    Json,
    /// The combined format of Apache and nginx, followed by the phases.
    Combined,
}

/// Limits for `/metrics`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsLimits {
    /// Limit on the series of all routes; routes beyond it are counted together as `_other`.
    pub max_series: Count,
}

impl Default for MetricsLimits {
    fn default() -> Self {
        MetricsLimits { max_series: Count(100_000) }
    }
}
