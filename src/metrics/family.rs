//! The table of all metrics: a row has name, kind, labels and help.
//!
//! `metrics` creates its vectors from these rows only. Tests generate `dashboards/metrics.md` and the boards from
//! them, and check that each metric is on a board.

use prometheus::core::{Desc, MetricVec, MetricVecBuilder};
use prometheus::proto::{Bucket, Counter as CounterValue, Gauge as GaugeValue, Histogram as HistogramValue};
use prometheus::proto::{LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{CounterVec, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts};

use super::registry::Registry;

/// Declares the families of a subsystem: each field has a kind and a row of the table.
macro_rules! vectors {
    ($(#[$doc:meta])* struct $name:ident { $($field:ident: $kind:ident $row:ident,)* }) => {
        $(#[$doc])*
        pub(super) struct $name {
            $(pub(super) $field: $crate::metrics::family::vectors!(@ $kind),)*
        }

        impl $name {
            pub(super) fn register(registry: &$crate::metrics::registry::Registry) -> Self {
                $name { $($field: $crate::metrics::family::$row.$kind(registry),)* }
            }
        }
    };
    (@ counter) => { prometheus::IntCounterVec };
    (@ seconds) => { prometheus::CounterVec };
    (@ gauge) => { prometheus::IntGaugeVec };
    (@ ratio) => { prometheus::GaugeVec };
    (@ histogram) => { prometheus::HistogramVec };
}
pub(super) use vectors;

/// A metric with all its label values.
#[derive(Debug)]
pub struct Family {
    /// Its full name, unit last.
    pub name: &'static str,
    /// Its kind.
    pub kind: Kind,
    /// The names of its labels, in the order of their values.
    pub labels: &'static [&'static str],
    /// One sentence for readers of `/metrics`.
    pub help: &'static str,
}

/// The kind of a [`Family`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Never decreases.
    Counter,
    /// Increases and decreases.
    Gauge,
    /// A histogram in seconds, with these upper bounds.
    Histogram(&'static [f64]),
}

impl Kind {
    /// The name of the kind in the text format.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram(_) => "histogram",
        }
    }
}

/// Seconds of a phase, from routing (microseconds) to a slow client (a minute). Only eight buckets, since every
/// route has them for each of its phases; the access log has exact values.
const PHASE: &[f64] = &[0.0005, 0.0025, 0.01, 0.05, 0.25, 1.0, 5.0, 30.0];

/// Seconds of a whole exchange.
const EXCHANGE: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// Seconds to connect: from the same machine to the other side of the world, TLS included.
const CONNECT: &[f64] = &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// Seconds of a TLS handshake with a client: from a resumed local one to a full one on the other side of the world.
const HANDSHAKE: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 10.0];

/// Seconds of Forebay's own time.
const OWN: &[f64] = &[0.00001, 0.000025, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05];

/// Seconds of one poll of a task, as tokio counts them: 32.768 µs, doubled twelve times.
pub const POLL_TIMES: &[f64] = &[
    0.000032768,
    0.000065536,
    0.000131072,
    0.000262144,
    0.000524288,
    0.001048576,
    0.002097152,
    0.004194304,
    0.008388608,
    0.016777216,
    0.033554432,
    0.067108864,
    0.134217728,
];

/// Seconds of lag: from a kernel wake-up to a filter that blocks.
const LAG: &[f64] = &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// Seconds of one poll of a filter: most take microseconds.
const FILTER_POLL: &[f64] = &[0.000001, 0.000005, 0.000025, 0.0001, 0.0005, 0.0025, 0.01, 0.05, 0.25, 1.0];

/// Seconds of a password check: from a cheap hash on an idle machine to any timeout.
const PASSWORD: &[f64] = &[0.005, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// Seconds of a disk operation: from the page cache to an overloaded disk.
const DISK: &[f64] = &[0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 1.0, 5.0];

/// Seconds of a request that a filter sends.
const CALL: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Seconds in the queue of an upstream: from the next free place to any timeout.
const QUEUE: &[f64] = &[0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

macro_rules! families {
    ($($constant:ident: $name:literal, $kind:expr, $labels:expr, $help:literal;)*) => {
        $(
            #[doc = $help]
            pub static $constant: Family = Family { name: $name, kind: $kind, labels: &$labels, help: $help };
        )*
        /// All rows, in order.
        pub static ALL: &[&Family] = &[$(&$constant),*];
    };
}

use Kind::{Counter, Gauge, Histogram};

families! {
    EXCHANGES: "forebay_exchanges_total", Counter, ["route", "code"],
        "Finished exchanges, by the status sent to the client.";
    EXCHANGE_SECONDS: "forebay_exchange_seconds", Histogram(EXCHANGE), ["route", "code_class"],
        "Duration of exchanges: the sum of their phases.";
    PHASE_SECONDS: "forebay_phase_seconds", Histogram(PHASE), ["route", "phase"],
        "Time that exchanges spent in a phase; exchanges that skipped the phase are not counted.";
    PHASE_ACTIVE: "forebay_phase_active", Gauge, ["phase"],
        "Exchanges, and connections before their first one, that are now in a phase.";
    PHASE_OLDEST: "forebay_phase_oldest_seconds", Gauge, ["phase"],
        "How long the oldest exchange in a phase has been in it; 0 if the phase is empty.";
    DRIVER_EXCHANGES: "forebay_driver_exchanges_total", Counter, ["driver", "reason"],
        "Exchanges sent to an upstream, by driver, and the reason if it was not Forebay's own driver.";
    OWN_SECONDS: "forebay_own_seconds", Histogram(OWN), ["route"],
        "Time that Forebay itself spent on an exchange: the polls of its future, without waiting.";
    WRITE_BLOCKED: "forebay_write_blocked_seconds_total", Counter, ["route"],
        "Time in which response data was ready but the client did not accept it.";
    UPSTREAM_HELD: "forebay_upstream_held_seconds", Histogram(EXCHANGE), ["route"],
        "How long an exchange used an upstream connection.";
    UPSTREAM_SAVED: "forebay_upstream_saved_seconds_total", Counter, ["route"],
        "Time from the release of the upstream connection to the end of the exchange.";
    SPOOL_SPILLS: "forebay_spool_spills_total", Counter, ["route", "direction", "reason"],
        "Bodies that were partly written to disk, by the reason.";
    BYTES: "forebay_bytes_total", Counter, ["route", "direction"],
        "Bytes exchanged with clients.";
    ROUTES_FOLDED: "forebay_routes_folded", Gauge, [],
        "Routes that are counted together as _other because max_series was reached.";
    CONFIG_GENERATION: "forebay_config_generation", Gauge, [],
        "Number of the active configuration, counted from 1 in this process.";
    CONFIG_INFO: "forebay_config_info", Gauge, ["hash"],
        "Always 1; the label has the hash of the active configuration's text.";
    CONFIG_LOADED: "forebay_config_loaded_timestamp_seconds", Gauge, [],
        "When the active configuration was activated, in seconds since 1970.";
    CONFIG_RELOAD_FAILED: "forebay_config_reload_failed", Gauge, [],
        "1 if the last reload was refused, so that the active configuration differs from the file; else 0.";
    CONFIG_RELOADS: "forebay_config_reloads_total", Counter, ["result"],
        "Reloads of the configuration, by result: applied or refused.";
    GENERATION_EXCHANGES: "forebay_generation_exchanges", Gauge, ["generation"],
        "Active exchanges by the number of the configuration that they use.";
    GENERATION_CONNECTIONS: "forebay_generation_connections", Gauge, ["generation"],
        "Open client connections by the number of the configuration that their listener uses.";
    UPGRADES: "forebay_upgrades_total", Counter, ["result"],
        "Upgrades to a new process, by result: done, refused, failed or timed_out; the new process continues the \
         count.";
    UPGRADE_FAILED: "forebay_upgrade_failed", Gauge, [],
        "1 if the last upgrade failed and the old process continues to serve; else 0.";
    UPGRADE_DRAINING: "forebay_upgrade_draining_processes", Gauge, [],
        "Older processes that are still finishing their active exchanges.";
    REFUSALS: "forebay_refusals_total", Counter, ["reason"],
        "Exchanges and connections that Forebay refused or cut, by reason.";
    CLIENT_CONNECTIONS: "forebay_client_connections", Gauge, ["listener", "state"],
        "Open client connections, by state.";
    CLIENT_CONNECTIONS_TOTAL: "forebay_client_connections_total", Counter, ["listener"],
        "Accepted client connections.";
    CLIENT_CONNECTIONS_LIMIT: "forebay_client_connections_limit", Gauge, ["listener"],
        "Limit on open client connections of a listener, from its configuration and the open files of the process.";
    ACCEPT_PAUSES: "forebay_accept_pauses_total", Counter, [],
        "Times that a listener paused accepting because open files ran out.";
    ACCEPT_PAUSED: "forebay_accept_paused", Gauge, [],
        "Listeners that now pause accepting because open files have run out.";
    CLIENT_REQUESTS: "forebay_client_requests_total", Counter, ["listener", "protocol"],
        "Requests with a complete header, by the client's protocol.";
    TLS_HANDSHAKES: "forebay_tls_handshakes_total", Counter, ["listener", "version", "resumed"],
        "Completed TLS handshakes with clients; failed ones are refusals of the phase handshake.";
    TLS_HANDSHAKE_SECONDS: "forebay_tls_handshake_seconds", Histogram(HANDSHAKE), ["listener"],
        "Time of TLS handshakes with clients, from the first byte of the ClientHello to the end.";
    TLS_CERTIFICATE_NOT_AFTER: "forebay_tls_certificate_not_after_timestamp_seconds", Gauge, ["listener", "name", "key"],
        "When a served certificate expires, by its first name and its key type.";
    TLS_RELOADS: "forebay_tls_reloads_total", Counter, ["listener", "outcome"],
        "Changes of certificate files, by result: taken or refused.";
    TLS_CERTIFICATES_REFUSED: "forebay_tls_certificates_refused", Gauge, ["listener"],
        "Certificates whose current files were refused, so that an older version is served.";
    ACME_ORDERS: "forebay_acme_orders_total", Counter, ["issuer", "outcome"],
        "Finished certificate orders, by whether a certificate was issued.";
    ACME_CHALLENGES: "forebay_acme_challenges_total", Counter, ["challenge"],
        "ACME challenges that were answered.";
    ACME_FAILURES: "forebay_acme_failures", Gauge, ["issuer", "name"],
        "Consecutive failed orders for a certificate, by its first name.";
    ACME_DUE: "forebay_acme_due_timestamp_seconds", Gauge, ["issuer", "name"],
        "When the next order for a certificate is due, by its first name.";
    ACME_ACTIVE: "forebay_acme_active", Gauge, ["issuer"],
        "1 if this process orders the certificates; only one of the processes that share a store does.";
    RELAYED_CONNECTIONS: "forebay_relayed_connections", Gauge, ["listener", "name"],
        "Open client connections that are forwarded without decryption, by TLS server name, or tcp.";
    RELAYED_CONNECTIONS_TOTAL: "forebay_relayed_connections_total", Counter, ["listener", "name"],
        "Client connections that were forwarded without decryption.";
    RELAYED_BYTES: "forebay_relayed_bytes_total", Counter, ["listener", "name", "direction"],
        "Bytes of forwarded connections, counted when the connection ends.";
    UPSTREAM_SELECTIONS: "forebay_upstream_selections_total", Counter, ["upstream", "endpoint"],
        "Attempts for which an endpoint was chosen.";
    UPSTREAM_CONNECTS: "forebay_upstream_connects_total", Counter, ["upstream", "outcome"],
        "Connections for exchanges, by outcome: new, reused or failed.";
    UPSTREAM_CONNECT_FAILURES: "forebay_upstream_connect_failures_total", Counter, ["upstream", "reason"],
        "Attempts without a connection, by reason.";
    UPSTREAM_CONNECT_SECONDS: "forebay_upstream_connect_seconds", Histogram(CONNECT), ["upstream"],
        "Time to connect to an endpoint, TLS handshake included.";
    UPSTREAM_WAIT_SECONDS: "forebay_upstream_wait_seconds", Histogram(EXCHANGE), ["upstream"],
        "Time from the end of the request, as far as known, to the complete response header.";
    UPSTREAM_ENDPOINTS: "forebay_upstream_endpoints", Gauge, ["upstream", "state"],
        "Endpoints by state.";
    ENDPOINT_AVAILABLE: "forebay_endpoint_available", Gauge, ["upstream", "endpoint"],
        "Available addresses of an endpoint: 0 or 1, or more if its name has several addresses.";
    ENDPOINT_INFLIGHT: "forebay_endpoint_inflight", Gauge, ["upstream", "endpoint"],
        "Active attempts at an endpoint.";
    UPSTREAM_DISCOVERIES: "forebay_upstream_discoveries_total", Counter, ["upstream", "outcome"],
        "Endpoint look-ups in DNS and files; after a failure the last good result stays in use.";
    UPSTREAM_HEALTH_CHECKS: "forebay_upstream_health_checks_total", Counter, ["upstream", "outcome"],
        "Health checks by outcome; unable: the gateway lacked a descriptor or port; late, counted in addition: the \
         check started late because too many were active.";
    HEALTH_CHECKS_ACTIVE: "forebay_health_checks_active", Gauge, [],
        "Health checks that are under way, all upstreams together; at most server.health_checks.";
    HEALTH_CHECKS_WAITING: "forebay_health_checks_waiting", Gauge, [],
        "Upstreams whose next health check is due and waits because as many are under way as there may be.";
    UPSTREAM_CONNECTIONS: "forebay_upstream_connections", Gauge, ["upstream"],
        "Connections to endpoints that are in use, idle, or being made.";
    UPSTREAM_EJECTIONS: "forebay_upstream_ejections_total", Counter, ["upstream", "reason"],
        "Ejections of endpoints by outlier detection, by reason.";
    UPSTREAM_PANIC: "forebay_upstream_panic", Gauge, ["upstream"],
        "1 in panic mode: so few endpoints are available that requests go to all of them.";
    RETRIES: "forebay_retries_total", Counter, ["upstream", "reason"],
        "Attempts after the first of an exchange, by why the previous one failed.";
    RETRIES_REFUSED: "forebay_retries_refused_total", Counter, ["upstream", "reason"],
        "Failed attempts that were not retried although the route allows it, by what prevented it.";
    UPSTREAM_QUEUE: "forebay_upstream_queue", Gauge, ["upstream"],
        "Exchanges that now wait because all endpoints are at their limits.";
    UPSTREAM_QUEUE_SECONDS: "forebay_upstream_queue_seconds", Histogram(QUEUE), ["upstream"],
        "Time that exchanges waited because all endpoints were at their limits, with any outcome; exchanges that \
         did not wait are not counted.";
    UPSTREAM_REJECTED: "forebay_upstream_rejected_total", Counter, ["upstream", "reason"],
        "Exchanges refused by the limits of an upstream, by reason.";
    UPSTREAM_BREAKER_OPEN: "forebay_upstream_breaker_open", Gauge, ["upstream"],
        "State of the circuit breaker: 0 closed, 1 half-open, 2 open.";
    UPSTREAM_BREAKER_PROBES_REPLACED: "forebay_upstream_breaker_probes_replaced_total", Counter, ["upstream"],
        "Probes of a half-open circuit breaker that were replaced because their client was too slow.";
    MIRROR: "forebay_mirror_total", Counter, ["upstream", "outcome"],
        "Requests to be mirrored to the upstream, by result, or by why they were not mirrored.";
    SPOOL_BYTES: "forebay_spool_bytes", Gauge, ["direction", "store"],
        "Bytes of buffered bodies, by store; for the disk, the size of the files.";
    SPOOL_LIMIT_BYTES: "forebay_spool_limit_bytes", Gauge, ["store"],
        "Limit on the bytes of all buffered bodies.";
    SPOOL_DENIALS: "forebay_spool_denials_total", Counter, ["direction", "limit"],
        "Times that a body got no more disk space, by the limit; the endpoint then waits, or the upload is refused.";
    SLOW_CLIENTS: "forebay_slow_clients", Gauge, ["direction"],
        "Clients that Forebay now waits for: to send their requests or to read their responses.";
    PRESSURE_TOTAL: "forebay_pressure_total", Counter, ["action"],
        "Times that a measure was taken because memory ran short: spill to disk, pause, or shed.";
    PRESSURE: "forebay_pressure", Gauge, ["action"],
        "Active measures because memory runs short: 1 for spill and shed, for pause the number of waiting bodies.";
    DISK_SECONDS: "forebay_disk_seconds", Histogram(DISK), ["operation"],
        "Time of one disk operation, from queueing to completion.";
    DISK_QUEUE: "forebay_disk_queue", Gauge, [],
        "Disk operations that are queued or active.";
    DISK_FAILURES: "forebay_disk_failures_total", Counter, ["operation"],
        "Failed disk operations.";
    SCHEDULER_WAITING: "forebay_scheduler_waiting", Gauge, ["worker", "class"],
        "Exchanges that wait for their turn: new connections, passing bodies, buffered responses.";
    SCHEDULER_SHARE: "forebay_scheduler_share_ratio", Gauge, ["worker", "class"],
        "Share of its time that a worker may spend on a class of exchanges, depending on the lag of its event loop.";
    SCHEDULER_OVERDUE: "forebay_scheduler_overdue_total", Counter, ["worker", "class"],
        "Turns that were given because `resources.turn` had passed.";
    SCHEDULER_BYTES: "forebay_scheduler_bytes_total", Counter, ["worker"],
        "Bytes that were spooled.";
    ACCESS_LOG_LINES: "forebay_access_log_lines_total", Counter, [],
        "Lines written to the access log.";
    ACCESS_LOG_DROPPED: "forebay_access_log_dropped_total", Counter, ["reason"],
        "Lines missing from the access log.";
    SPANS: "forebay_spans_total", Counter, ["outcome"],
        "Spans of recorded exchanges: exported, failed to export, or dropped because the queue was full.";
    ADMIN_REQUESTS: "forebay_admin_requests_total", Counter, ["path", "code"],
        "Requests to the admin endpoint, by its path and status.";
    ADMIN_CONNECTIONS: "forebay_admin_connections", Gauge, [],
        "Open connections to the admin endpoint.";
    ADMIN_CONNECTIONS_CLOSED: "forebay_admin_connections_closed_total", Counter, [],
        "Connections to the admin endpoint that were closed because `admin.connections` was reached.";
    ADMIN_STREAMS: "forebay_admin_streams", Gauge, [],
        "Active streaming responses of the admin endpoint, such as that of the status page.";
    LOOP_WAIT: "forebay_loop_wait_seconds_total", Counter, ["worker"],
        "Time in which a worker waited for events.";
    LOOP_BUSY: "forebay_loop_busy_seconds_total", Counter, ["worker"],
        "Time in which a worker was busy.";
    LOOP_WAKEUPS: "forebay_loop_wakeups_total", Counter, ["worker"],
        "Number of waits of a worker that ended.";
    LOOP_READY_EVENTS: "forebay_loop_ready_events_total", Counter, ["worker"],
        "I/O events of a worker: sockets ready to read, write or accept.";
    LOOP_POLLS: "forebay_loop_polls_total", Counter, ["worker"],
        "Polls of tasks.";
    LOOP_POLL: "forebay_loop_poll_seconds", Histogram(POLL_TIMES), ["worker"],
        "Time of one poll of a task, in which no other task of its worker runs.";
    LOOP_TASKS: "forebay_loop_tasks", Gauge, ["worker"],
        "Tasks of a worker: connections, exchanges and their helpers.";
    LOOP_RUN_QUEUE: "forebay_loop_run_queue", Gauge, ["worker"],
        "Tasks that are ready to run.";
    LOOP_DESCRIPTORS: "forebay_loop_descriptors", Gauge, ["worker"],
        "Sockets and other descriptors registered by a worker.";
    LOOP_LAG: "forebay_loop_lag_seconds", Histogram(LAG), ["worker"],
        "How late a ready task runs, measured by heartbeat probes.";
    LOOP_LAG_BUSY: "forebay_loop_lag_busy_seconds", Histogram(LAG), ["worker"],
        "CPU time that a worker used before it answered a heartbeat probe: the part of the lag that is its own work; the \
         rest is the wait for a core. Not measured with work_stealing.";
    STALLED_WORKERS: "forebay_stalled_workers", Gauge, [],
        "Workers that are now late by more than stall_threshold.";
    STALLS: "forebay_stalls_total", Counter, ["where"],
        "Times that a worker was late by more than stall_threshold, by the filter or phase that blocked it.";
    FILTER_POLL_SECONDS: "forebay_filter_poll_seconds", Histogram(FILTER_POLL), ["filter"],
        "Time of one poll of a filter, in which no other task of its worker runs.";
    FILTER_SKIPPED: "forebay_filter_skipped_total", Counter, ["route", "filter"],
        "Exchanges in which a filter was skipped because its `when:` was false.";
    FILTER_CALLS: "forebay_filter_calls_total", Counter, ["filter", "upstream", "outcome"],
        "Requests that filters sent to an upstream, by outcome.";
    FILTER_CALL_SECONDS: "forebay_filter_call_seconds", Histogram(CALL), ["filter", "upstream"],
        "Time of a request that a filter sent to an upstream, from the call to the complete response.";
    ACCESS: "forebay_access_total", Counter, ["route", "filter", "outcome"],
        "Requests at access control filters, by outcome.";
    FILTER_LOADS: "forebay_filter_loads_total", Counter, ["route", "filter", "outcome"],
        "Reloads of a filter's data by outcome: a changed file, or the keys of a service.";
    COMPRESSED_BYTES: "forebay_compressed_bytes_total", Counter, ["route", "coding", "side"],
        "Response bytes before (`in`) and after (`out`) compression.";
    COMPRESS_BUSY: "forebay_compress_busy_total", Counter, ["route"],
        "Responses that were not compressed because `concurrent` was reached.";
    DECOMPRESS: "forebay_decompress_total", Counter, ["route", "direction", "outcome"],
        "Coded bodies at `decompress` filters, by outcome.";
    DECOMPRESSED_BYTES: "forebay_decompressed_bytes_total", Counter, ["route", "direction", "coding", "side"],
        "Bytes of bodies before (`in`) and after (`out`) decoding.";
    BODY_CHANGES: "forebay_body_changes_total", Counter, ["route", "direction", "outcome"],
        "Bodies that `body` filters were to change, by outcome.";
    BODY_REPLACEMENTS: "forebay_body_replacements_total", Counter, ["route", "direction"],
        "Places in bodies that `body` filters replaced, set or removed.";
    ERROR_PAGES: "forebay_error_pages_total", Counter, ["route", "code_class", "form"],
        "Error pages sent in the place of a response, by the class of its status and the form of the page.";
    PASSWORD_SECONDS: "forebay_password_seconds", Histogram(PASSWORD), [],
        "Time of a password check, waiting for a hashing thread included.";
    PASSWORD_WAITING: "forebay_passwords_waiting", Gauge, [],
        "Passwords that wait for a hashing thread.";
    WORKERS: "forebay_workers", Gauge, [],
        "Worker threads that serve clients.";
    BUILD_INFO: "forebay_build_info", Gauge, ["version", "pingora"],
        "Always 1; the labels say what is running.";
}

impl Family {
    /// The upper bounds of its buckets, in seconds; empty unless it is a histogram.
    pub fn bounds(&self) -> &'static [f64] {
        match self.kind {
            Kind::Histogram(bounds) => bounds,
            Kind::Counter | Kind::Gauge => &[],
        }
    }

    /// Registers this family as a histogram.
    pub(super) fn histogram(&'static self, registry: &Registry) -> HistogramVec {
        let Kind::Histogram(buckets) = self.kind else { unreachable!("{} is no histogram", self.name) };
        let options = HistogramOpts::new(self.name, self.help).buckets(buckets.to_vec());
        self.register(registry, HistogramVec::new(options, self.labels))
    }

    /// Registers this family as a counter.
    pub(super) fn counter(&'static self, registry: &Registry) -> IntCounterVec {
        debug_assert_eq!(self.kind, Kind::Counter, "{}", self.name);
        self.register(registry, IntCounterVec::new(Opts::new(self.name, self.help), self.labels))
    }

    /// Registers this family as a counter of seconds.
    pub(super) fn seconds(&'static self, registry: &Registry) -> CounterVec {
        debug_assert_eq!(self.kind, Kind::Counter, "{}", self.name);
        self.register(registry, CounterVec::new(Opts::new(self.name, self.help), self.labels))
    }

    /// Registers this family as a gauge.
    pub(super) fn gauge(&'static self, registry: &Registry) -> IntGaugeVec {
        debug_assert_eq!(self.kind, Kind::Gauge, "{}", self.name);
        self.register(registry, IntGaugeVec::new(Opts::new(self.name, self.help), self.labels))
    }

    /// Registers this family as a gauge with fractional values.
    pub(super) fn ratio(&'static self, registry: &Registry) -> GaugeVec {
        debug_assert_eq!(self.kind, Kind::Gauge, "{}", self.name);
        self.register(registry, GaugeVec::new(Opts::new(self.name, self.help), self.labels))
    }

    /// The family with the samples of a custom collector.
    pub(crate) fn read(&self, samples: Vec<Metric>) -> MetricFamily {
        let mut family = MetricFamily::default();
        family.set_name(self.name.to_owned());
        family.set_help(self.help.to_owned());
        family.set_field_type(match self.kind {
            Kind::Counter => MetricType::COUNTER,
            Kind::Gauge => MetricType::GAUGE,
            Kind::Histogram(_) => MetricType::HISTOGRAM,
        });
        family.set_metric(samples);
        family
    }

    /// A sample of a counter or a gauge.
    pub(crate) fn sample(&self, labels: &[&str], value: f64) -> Metric {
        let mut metric = self.labelled(labels);
        if self.kind == Kind::Counter {
            let mut counter = CounterValue::default();
            counter.set_value(value);
            metric.set_counter(counter);
        } else {
            let mut gauge = GaugeValue::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        metric
    }

    /// A sample of a histogram: the count per bucket, of which the last has no bound, and the sum.
    pub(crate) fn distribution(&self, labels: &[&str], counts: &[u64], sum: f64) -> Metric {
        let Kind::Histogram(bounds) = self.kind else { unreachable!("{} is no histogram", self.name) };
        let mut below = 0;
        let buckets = bounds.iter().zip(counts).map(|(&bound, count)| {
            below += count;
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(bound);
            bucket.set_cumulative_count(below);
            bucket
        });
        let mut histogram = HistogramValue::default();
        histogram.set_bucket(buckets.collect());
        histogram.set_sample_count(counts.iter().sum());
        histogram.set_sample_sum(sum);
        let mut metric = self.labelled(labels);
        metric.set_histogram(histogram);
        metric
    }

    fn labelled(&self, values: &[&str]) -> Metric {
        let pair = |(&name, &value): (&&str, &&str)| {
            let mut pair = LabelPair::default();
            pair.set_name(name.to_owned());
            pair.set_value(value.to_owned());
            pair
        };
        Metric::from_label(self.labels.iter().zip(values).map(pair).collect())
    }

    /// The descriptor that the registry requires from a collector.
    pub(crate) fn describe(&self) -> Desc {
        let labels = self.labels.iter().map(|&label| label.to_owned()).collect();
        let described = Desc::new(self.name.to_owned(), self.help.to_owned(), labels, Default::default());
        described.expect("the rows of this table are valid: a test registers every one of them")
    }

    /// Whether it exists only in a build with `tokio_unstable`.
    #[cfg(test)]
    pub(super) fn is_unstable(&self) -> bool {
        [&LOOP_READY_EVENTS, &LOOP_POLLS, &LOOP_POLL, &LOOP_DESCRIPTORS].iter().any(|one| one.name == self.name)
    }

    /// Number of series per set of label values.
    pub(super) const fn series(&self) -> u64 {
        match self.kind {
            // The bounds, `+Inf`, `_sum` and `_count`.
            Kind::Histogram(buckets) => buckets.len() as u64 + 3,
            Kind::Counter | Kind::Gauge => 1,
        }
    }

    fn register<T>(&'static self, registry: &Registry, made: prometheus::Result<MetricVec<T>>) -> MetricVec<T>
    where
        T: MetricVecBuilder + 'static,
    {
        made.and_then(|vector| registry.register_vector(&vector, self.labels).map(|()| vector))
            .expect("the rows of this table are valid and unique: a test registers every one of them")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rules of `promtool check metrics`, restated; the integration tests run the real one.
    #[test]
    fn every_row_keeps_the_naming_rules_of_prometheus() {
        for family in ALL {
            let Family { name, kind, labels, help } = family;
            assert!(name.starts_with("forebay_"), "{name} lacks the prefix");
            assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{name} is not snake_case");
            assert!(!help.is_empty() && help.ends_with('.'), "the help of {name} is no sentence");
            assert_eq!(*kind == Counter, name.ends_with("_total"), "{name}: `_total` belongs to counters alone");
            let words: Vec<&str> = name.split('_').collect();
            for word in
                ["ms", "us", "ns", "millis", "milliseconds", "minutes", "hours", "kb", "mb", "percent", "histogram"]
            {
                assert!(!words.contains(&word), "{name} has no base unit");
            }
            for suffix in ["_bucket", "_count", "_sum"] {
                assert!(!name.ends_with(suffix), "{name} ends like a part of a histogram");
            }
            assert!(!labels.contains(&"le"), "{name} has the label of buckets");
            if let Histogram(buckets) = kind {
                assert!(name.ends_with("_seconds"), "{name} has no unit");
                assert!(buckets.is_sorted(), "the buckets of {name} are out of order");
            }
        }
    }

    #[test]
    fn no_name_is_declared_twice() {
        let mut names = std::collections::HashSet::new();
        for family in ALL {
            assert!(names.insert(family.name), "{} is declared twice", family.name);
        }
    }
}
