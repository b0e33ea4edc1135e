//! `server:` and the keys beside it that hold for the whole process.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroUsize;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserializer, Unexpected, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use super::text::Text;
use super::units::{Count, FileMode, Percent, Size, Time};

/// How the process runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Server {
    /// Worker threads: `auto` is one for each core that the process may use, by its affinity and by the CPU quota of
    /// its cgroup.
    pub threads: Threads,
    /// Whom Forebay becomes once it has bound its ports and read its keys, as root: a name or a number. That user must
    /// be able to read certificates and keys when they are renewed, and to write to `spool_dir` and to the access log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Lets idle workers take tasks from busy ones. Off: a connection stays with its worker, which is cheaper and
    /// fairer.
    pub work_stealing: bool,
    /// Idle connections to upstreams that are kept, over all upstreams. Keep it above the concurrency you expect.
    pub keepalive_pool: Count,
    /// The directory where spools keep what memory is too small for, in files without a name (mode 0600): nothing of
    /// them outlives the process. It must exist and Forebay must be able to write there.
    pub spool_dir: String,
    /// Threads that write and read those files, so that no worker waits for a disk: from 1 to 64.
    pub disk_threads: Count,
    /// Pieces of work that may wait for those threads; exchanges that would add one wait meanwhile. From 1 to a
    /// million.
    pub disk_queue: Count,
    /// How far those threads give way to all else that wants the CPU (nice(2)): from 0, as the workers, to 19. Beside
    /// one busy program at 10, a thread gets a tenth of its core; at 19, a seventieth, and responses wait for the disk.
    pub disk_nice: Count,
    /// Who may use the open files that the process may have.
    pub open_files: OpenFiles,
    /// What happens on SIGTERM.
    pub shutdown: Shutdown,
    /// What happens on SIGUSR2, and by `forebay upgrade`.
    pub upgrade: Upgrade,
    /// A file that holds the number of the process that serves: written once it does, by the user that Forebay runs as,
    /// and removed when it ends. A process that takes over writes its own number.
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
            open_files: OpenFiles::default(),
            shutdown: Shutdown::default(),
            upgrade: Upgrade::default(),
            pid_file: None,
        }
    }
}

/// Who may use the open files that the process may have (`ulimit -Hn`), besides those that Forebay itself needs. What
/// is left is for connections to backends, the admin endpoint and name look-ups; at least a tenth.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OpenFiles {
    /// Connections of clients, over all listeners. While open files run short for all, none is accepted.
    pub clients: Percent,
    /// Files of bodies that memory is too small for, one each.
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

/// The order of a graceful stop: not ready, pause, no new connections, in-flight exchanges end, exit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Shutdown {
    /// Time between `/readyz` turning 503 and the listeners closing, for load balancers to notice: longer than they
    /// take to find out. Meanwhile all is served, and every answer says that its connection ends: by `Connection:
    /// close`, or GOAWAY.
    pub pause: Time,
    /// Time given to exchanges in flight, after which they are cut; the log has a line of each.
    pub deadline: Time,
}

impl Default for Shutdown {
    fn default() -> Self {
        Shutdown { pause: Time::seconds(5), deadline: Time::seconds(30) }
    }
}

/// A new process takes over: it is started, loads its configuration, is ready, accepts connections; then this one ends
/// what it has under way, for at most `shutdown.deadline`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Upgrade {
    /// How long the new process may take until it is ready; then it is ended and this one serves on. At most 10m.
    pub deadline: Time,
    /// How long connections without a request stay open once another process serves: the answer to the next request
    /// says that it is the last. A request that crosses the end of its connection would be lost.
    pub idle: Time,
    /// Older processes that may still be ending what they have under way when another upgrade is begun; from 1 to 64.
    pub processes: Count,
}

impl Default for Upgrade {
    fn default() -> Self {
        Upgrade { deadline: Time::seconds(60), idle: Time::seconds(5), processes: Count(32) }
    }
}

/// What all spools together may hold, and what happens as their memory runs out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Resources {
    /// Bytes of bodies in memory, on their way to and from the disk included, of both directions and all routes; at
    /// least 1MiB. `auto` is a quarter of what the cgroup allows, or the machine has. A route whose own `memory` is
    /// larger and is not written is held to this.
    #[serde(deserialize_with = "super::memory::read")]
    #[schemars(with = "super::memory::Memory")]
    pub memory: Size,
    /// Bytes of bodies in spool files, of both directions and all routes; `0B`: nothing is written to disk. A route
    /// whose own `disk` is larger and is not written is held to this.
    pub disk: Size,
    /// Of memory and of disk, what responses may have together; the rest is for request bodies alone. The endpoint of a
    /// response that finds no room waits for its client. The fuller it is, the less one response may have, so that the
    /// slowest clients are the first whose endpoints wait.
    pub responses: Percent,
    /// Of what all bodies in one direction may have, what those of one client address may have, of which as much
    /// counts as `ipv4_prefix` and `ipv6_prefix` say. The more others have, the less it is: so much in proportion to
    /// what is free. A request body that finds no room is refused with 429, a response waits. Clients of trusted
    /// proxies are told apart by their own address.
    pub per_client: Percent,
    /// What is done as the memory runs out; what is not listed is never done.
    pub on_pressure: Vec<Rung>,
    /// How long a request body may wait for memory, after which it is refused with 503; and how long one of either
    /// direction may wait for the disk. Answers wait for their client, who makes room.
    pub pause: Time,
    /// While many exchanges move much they take turns, so that small ones need not wait; new connections do the same
    /// while many come. A turn that has not come after this time is given, whatever it costs others.
    pub turn: Time,
}

impl Default for Resources {
    fn default() -> Self {
        Resources {
            memory: Size::kib(512 * 1024),
            disk: Size::kib(8 * 1024 * 1024),
            responses: Percent(80.0),
            per_client: Percent(80.0),
            on_pressure: vec![Rung::Spill, Rung::Pause, Rung::Shed],
            pause: Time::seconds(30),
            turn: Time::seconds(10),
        }
    }
}

/// What is done as the memory for bodies runs out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Rung {
    /// What is in memory goes to disk, though its route would let it stay.
    Spill,
    /// Nothing more is read from the side that floods.
    Pause,
    /// New exchanges are refused with 503 and `Retry-After`.
    Shed,
}

/// Which headers tell the upstream who the client is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Forwarded {
    /// `X-Forwarded-For`, `-Proto`, `-Host` and `-Port`.
    #[default]
    XForwarded,
    /// `Forwarded` of RFC 7239.
    Rfc7239,
    /// Both.
    Both,
}

/// The admin endpoint: `/metrics`, `/healthz`, `/readyz` and more; `/` lists it all.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Admin {
    /// Whether there is one.
    pub enabled: bool,
    /// Where it listens: loopback unless told otherwise.
    pub address: super::Address,
    /// Who may connect to its unix socket: the owner and the group, unless told otherwise.
    pub mode: FileMode,
    /// Names of hosts under which it is asked, without ports. Addresses, `localhost`, the host of `address` and the
    /// name of this machine need not be listed. A request for any other host is refused: a page on the web may have
    /// pointed its own name here.
    pub hosts: Vec<String>,
    /// The secret that every request must carry, as `Authorization: Bearer …` or as the password of `Basic`; `/healthz`
    /// and `/readyz` need none. Without it every client that can connect may look, and every client on this machine may
    /// change things.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// TLS, as of a listener.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<super::listener::Tls>,
    /// Connections that may be open at once; fewer where open files are few. A new one takes the place of the one that
    /// has waited longest for a request.
    pub connections: Count,
    /// Answers that go on, such as that of the status page, which may be under way at once: from 1 to 1,024.
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

/// What is logged and counted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Observability {
    /// One line per exchange.
    pub access_log: AccessLog,
    /// Limits of `/metrics`.
    pub metrics: MetricsLimits,
    /// How the workers' loops are looked after.
    pub event_loop: EventLoop,
    /// Spans of exchanges, for a collector.
    pub tracing: Tracing,
}

/// Spans of exchanges: where they go, and of which exchanges there are any.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Tracing {
    /// Where a collector takes OTLP over HTTP, such as `http://127.0.0.1:4318`; `/v1/traces` is added where there is no
    /// path. `off`: there are no spans, and `traceparent` passes as it came.
    pub endpoint: String,
    /// Of the traces that begin here, the share that is recorded. One that began elsewhere is recorded if its parent
    /// is.
    pub sample: Percent,
    /// Whose `traceparent` is believed, and so may say that a trace is recorded; that of others is replaced by a new
    /// one.
    pub parent: Parent,
    /// What spans have of the query of a request.
    pub query: Query,
    /// The name of this service in traces.
    pub service_name: String,
    /// Header fields of each export, such as a key of the collector.
    pub headers: BTreeMap<String, String>,
    /// How long an export may take, retries included; and how long the last one, when Forebay stops.
    pub timeout: Time,
    /// Exchanges whose spans may wait to be exported; those of further ones are dropped and counted. From 1 to 100k.
    pub queue: Count,
    /// For how long spans gather before they are exported: up to a minute.
    pub interval: Time,
    /// Further attributes of the span of each exchange by name; one that is empty is left out.
    pub attributes: BTreeMap<String, Text>,
}

impl Tracing {
    /// What `endpoint` says where there are no spans.
    pub const OFF: &str = "off";

    /// Whether there are spans.
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

/// What is kept of the query of a request, in which there may be secrets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Query {
    /// All of it.
    #[default]
    Keep,
    /// Nothing, from the `?` on.
    Drop,
}

/// Whose `traceparent` is believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Parent {
    /// Everyone's, so that a trace shows the client's side, too. Then everyone can have any number of exchanges
    /// recorded.
    Always,
    /// That of `trusted_proxies`.
    TrustedProxies,
    /// Nobody's: all traces begin here.
    Never,
}

/// How the workers' loops are looked after.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EventLoop {
    /// A worker that is late by more is stalled: it is counted, and the log names what holds it up. Above `heartbeat`.
    pub stall_threshold: Time,
    /// Every worker is asked for a sign of life this often: from 1ms to 1s.
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
    /// How a line looks.
    pub format: LogFormat,
    /// `stdout`, `stderr`, `off`, or a file, which is reopened on SIGUSR1.
    pub path: String,
    /// What a line has of the query of the request, and of that of its `Referer`.
    pub query: Query,
    /// Lines that may wait for the writer; further ones are dropped and counted.
    pub queue: Count,
    /// Further fields by name, such as `tenant: { cel: 'request.headers["x-tenant"]' }`; one that is empty is left out.
    pub fields: BTreeMap<String, Text>,
}

impl AccessLog {
    /// What every line has, in one format or the other: no further field can have such a name.
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

/// How a line of the access log looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// One JSON object with every phase's milliseconds.
    Json,
    /// The combined format of Apache and nginx, with the phases behind it.
    Combined,
}

/// Limits of `/metrics`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsLimits {
    /// Series that routes may have between them; routes beyond it are counted together as `_other`.
    pub max_series: Count,
}

impl Default for MetricsLimits {
    fn default() -> Self {
        MetricsLimits { max_series: Count(100_000) }
    }
}
