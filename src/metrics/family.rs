//! The table of every metric: one row is its name, kind, labels and help.
//!
//! `metrics` builds its vectors from these rows and adds nothing. The tests make `dashboards/metrics.md` and the boards
//! of them, and ask that each metric is on some board.

use prometheus::core::{Desc, MetricVec, MetricVecBuilder};
use prometheus::proto::{Bucket, Counter as CounterValue, Gauge as GaugeValue, Histogram as HistogramValue};
use prometheus::proto::{LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{CounterVec, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts};

use super::registry::Registry;

/// Declares the families of one subsystem whose children are made later: each a field, with what it measures with and
/// its row of the table.
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

/// One metric with all its label values.
#[derive(Debug)]
pub struct Family {
    /// Its full name, unit last.
    pub name: &'static str,
    /// What it measures with.
    pub kind: Kind,
    /// The names of its labels, in the order in which their values are given.
    pub labels: &'static [&'static str],
    /// One sentence for people who read `/metrics`.
    pub help: &'static str,
}

/// What a [`Family`] measures with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Only ever grows.
    Counter,
    /// Grows and shrinks.
    Gauge,
    /// Counts seconds into buckets with these upper bounds.
    Histogram(&'static [f64]),
}

impl Kind {
    /// The word for it in the text format.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram(_) => "histogram",
        }
    }
}

/// Seconds of one phase, from routing (microseconds) to a slow client (a minute). Eight, for every route has them for
/// each of its phases; where it matters, the access log has the figure itself.
const PHASE: &[f64] = &[0.0005, 0.0025, 0.01, 0.05, 0.25, 1.0, 5.0, 30.0];

/// Seconds of a whole exchange.
const EXCHANGE: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// Seconds until a connection stands: from this machine to the other end of the world, TLS included.
const CONNECT: &[f64] = &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// Seconds of a TLS handshake with a client: a resumed one on this machine to a full one on the other side of the
/// world.
const HANDSHAKE: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 10.0];

/// Seconds that Forebay itself costs.
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

/// Seconds by which a worker is late: from a wake-up of the kernel to a filter that sleeps.
const LAG: &[f64] = &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// Seconds of one poll of a filter: most take microseconds.
const FILTER_POLL: &[f64] = &[0.000001, 0.000005, 0.000025, 0.0001, 0.0005, 0.0025, 0.01, 0.05, 0.25, 1.0];

/// Seconds until a password is checked: from a cheap hash on an idle machine to the end of all patience.
const PASSWORD: &[f64] = &[0.005, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// Seconds of one piece of work for the disk: from the page cache to a disk that is drowned in writes.
const DISK: &[f64] = &[0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 1.0, 5.0];

/// Seconds in the queue of an upstream: from a place that is free in a moment to the end of all patience.
const CALL: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
const QUEUE: &[f64] = &[0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

macro_rules! families {
    ($($constant:ident: $name:literal, $kind:expr, $labels:expr, $help:literal;)*) => {
        $(
            #[doc = $help]
            pub static $constant: Family = Family { name: $name, kind: $kind, labels: &$labels, help: $help };
        )*
        /// Every row above, in order.
        pub static ALL: &[&Family] = &[$(&$constant),*];
    };
}

use Kind::{Counter, Gauge, Histogram};

families! {
    EXCHANGES: "forebay_exchanges_total", Counter, ["route", "code"],
        "Exchanges that ended, by the status the client got.";
    EXCHANGE_SECONDS: "forebay_exchange_seconds", Histogram(EXCHANGE), ["route", "code_class"],
        "Time of whole exchanges: the sum of their phases.";
    PHASE_SECONDS: "forebay_phase_seconds", Histogram(PHASE), ["route", "phase"],
        "Time that exchanges spent in a phase; those that never entered it are not counted.";
    PHASE_ACTIVE: "forebay_phase_active", Gauge, ["phase"],
        "Exchanges, and connections before their first one, that are in a phase now.";
    PHASE_OLDEST: "forebay_phase_oldest_seconds", Gauge, ["phase"],
        "For how long the first of those that are in a phase now has been in it; 0 if there is none.";
    DRIVER_EXCHANGES: "forebay_driver_exchanges_total", Counter, ["driver", "reason"],
        "Exchanges that went to an upstream, by the driver that they went by, and why it was not Forebay's own.";
    OWN_SECONDS: "forebay_own_seconds", Histogram(OWN), ["route"],
        "Time that Forebay itself cost an exchange: the polls of its future, without any waiting.";
    WRITE_BLOCKED: "forebay_write_blocked_seconds_total", Counter, ["route"],
        "Time in which clients did not take what there was for them.";
    UPSTREAM_HELD: "forebay_upstream_held_seconds", Histogram(EXCHANGE), ["route"],
        "Time for which an exchange had an upstream's connection.";
    UPSTREAM_SAVED: "forebay_upstream_saved_seconds_total", Counter, ["route"],
        "Time from the release of an upstream's connection to the end of the client's exchange.";
    SPOOL_SPILLS: "forebay_spool_spills_total", Counter, ["route", "direction", "reason"],
        "Bodies of which a part went to disk, by what there was too much of.";
    BYTES: "forebay_bytes_total", Counter, ["route", "direction"],
        "Bytes exchanged with clients.";
    ROUTES_FOLDED: "forebay_routes_folded", Gauge, [],
        "Routes that are counted together as _other, because max_series was reached.";
    CONFIG_GENERATION: "forebay_config_generation", Gauge, [],
        "How many configurations have run in this process, with the one that runs now.";
    CONFIG_INFO: "forebay_config_info", Gauge, ["hash"],
        "1, with the hash of the text of the configuration that runs.";
    CONFIG_LOADED: "forebay_config_loaded_timestamp_seconds", Gauge, [],
        "When the configuration that runs was put on, in seconds since 1970.";
    CONFIG_RELOAD_FAILED: "forebay_config_reload_failed", Gauge, [],
        "1 if the last reload was refused, so that another configuration runs than the file says; else 0.";
    CONFIG_RELOADS: "forebay_config_reloads_total", Counter, ["result"],
        "Reloads of the configuration, by what came of them: applied or refused.";
    GENERATION_EXCHANGES: "forebay_generation_exchanges", Gauge, ["generation"],
        "Exchanges that go by this configuration, counted by its number.";
    GENERATION_CONNECTIONS: "forebay_generation_connections", Gauge, ["generation"],
        "Client connections whose listener is set up as in this configuration, counted by its number.";
    UPGRADES: "forebay_upgrades_total", Counter, ["result"],
        "New processes that were to take over, by what came of them: done, refused, failed or timed_out; it goes on from one process to the next.";
    UPGRADE_FAILED: "forebay_upgrade_failed", Gauge, [],
        "1 if the last upgrade failed, so that an older process serves on; else 0.";
    UPGRADE_DRAINING: "forebay_upgrade_draining_processes", Gauge, [],
        "Processes before this one that still end what they have under way.";
    REFUSALS: "forebay_refusals_total", Counter, ["reason"],
        "Exchanges and connections that Forebay itself ended, by reason.";
    CLIENT_CONNECTIONS: "forebay_client_connections", Gauge, ["listener", "state"],
        "Client connections that are open now, by what they do.";
    CLIENT_CONNECTIONS_TOTAL: "forebay_client_connections_total", Counter, ["listener"],
        "Client connections that were accepted.";
    CLIENT_CONNECTIONS_LIMIT: "forebay_client_connections_limit", Gauge, ["listener"],
        "Client connections that a listener may have open at once, as its limit and the open files of the process allow.";
    ACCEPT_PAUSES: "forebay_accept_pauses_total", Counter, [],
        "Times that a listener stopped accepting connections because open files ran short.";
    ACCEPT_PAUSED: "forebay_accept_paused", Gauge, [],
        "Listeners that accept no connection now because open files run short.";
    CLIENT_REQUESTS: "forebay_client_requests_total", Counter, ["listener", "protocol"],
        "Requests whose header arrived, by the protocol that the client spoke.";
    TLS_HANDSHAKES: "forebay_tls_handshakes_total", Counter, ["listener", "version", "resumed"],
        "TLS handshakes with clients that were done; those that failed are refusals of the phase handshake.";
    TLS_HANDSHAKE_SECONDS: "forebay_tls_handshake_seconds", Histogram(HANDSHAKE), ["listener"],
        "Time of TLS handshakes with clients, from the first byte of the ClientHello to the end.";
    TLS_CERTIFICATE_NOT_AFTER: "forebay_tls_certificate_not_after_timestamp_seconds", Gauge, ["listener", "name", "key"],
        "When a certificate that clients are shown ceases to be valid, by its first name and the kind of its key.";
    TLS_RELOADS: "forebay_tls_reloads_total", Counter, ["listener", "outcome"],
        "Times that files of certificates had changed, by whether what they hold was taken or refused.";
    TLS_CERTIFICATES_REFUSED: "forebay_tls_certificates_refused", Gauge, ["listener"],
        "Certificates whose files hold something now that was refused: an older one is served.";
    ACME_ORDERS: "forebay_acme_orders_total", Counter, ["issuer", "outcome"],
        "Orders for certificates that ended, by whether one was issued.";
    ACME_CHALLENGES: "forebay_acme_challenges_total", Counter, ["challenge"],
        "Requests and handshakes of issuers of certificates that were answered to prove a name.";
    ACME_FAILURES: "forebay_acme_failures", Gauge, ["issuer", "name"],
        "Orders for a certificate that failed since one did not, by its first name.";
    ACME_DUE: "forebay_acme_due_timestamp_seconds", Gauge, ["issuer", "name"],
        "When the next order for a certificate is due, by its first name.";
    ACME_ACTIVE: "forebay_acme_active", Gauge, ["issuer"],
        "Whether this process orders the certificates: of several that share a store, one does.";
    RELAYED_CONNECTIONS: "forebay_relayed_connections", Gauge, ["listener", "name"],
        "Client connections that are passed on as they are now, by the name of TLS that they asked for or tcp.";
    RELAYED_CONNECTIONS_TOTAL: "forebay_relayed_connections_total", Counter, ["listener", "name"],
        "Client connections that were passed on as they are.";
    RELAYED_BYTES: "forebay_relayed_bytes_total", Counter, ["listener", "name", "direction"],
        "Bytes of connections that were passed on as they are, counted when these end.";
    UPSTREAM_SELECTIONS: "forebay_upstream_selections_total", Counter, ["upstream", "endpoint"],
        "Times that an endpoint was chosen.";
    UPSTREAM_CONNECTS: "forebay_upstream_connects_total", Counter, ["upstream", "outcome"],
        "Connections that exchanges were given, or not, by how.";
    UPSTREAM_CONNECT_FAILURES: "forebay_upstream_connect_failures_total", Counter, ["upstream", "reason"],
        "Attempts for which no connection came about, by why.";
    UPSTREAM_CONNECT_SECONDS: "forebay_upstream_connect_seconds", Histogram(CONNECT), ["upstream"],
        "Time until a new connection to an endpoint stood, TLS included.";
    UPSTREAM_WAIT_SECONDS: "forebay_upstream_wait_seconds", Histogram(EXCHANGE), ["upstream"],
        "Time from the end of the request, as far as can be seen, to the whole header of the answer.";
    UPSTREAM_ENDPOINTS: "forebay_upstream_endpoints", Gauge, ["upstream", "state"],
        "Endpoints that there are now, by state.";
    ENDPOINT_AVAILABLE: "forebay_endpoint_available", Gauge, ["upstream", "endpoint"],
        "Addresses of an endpoint that take requests now: 0 or 1, or more if its name has several.";
    ENDPOINT_INFLIGHT: "forebay_endpoint_inflight", Gauge, ["upstream", "endpoint"],
        "Attempts that an endpoint has under way now.";
    UPSTREAM_DISCOVERIES: "forebay_upstream_discoveries_total", Counter, ["upstream", "outcome"],
        "Look-ups of names and looks at files that say where endpoints are; after a failed one the last good answer stays.";
    UPSTREAM_HEALTH_CHECKS: "forebay_upstream_health_checks_total", Counter, ["upstream", "outcome"],
        "Health checks by what came of them, unable: the gateway had no descriptor or port for them; those that began late, for too many were under way, are counted as late besides.";
    UPSTREAM_CONNECTIONS: "forebay_upstream_connections", Gauge, ["upstream"],
        "Connections to endpoints that are open now, in use or kept, or that are being made.";
    UPSTREAM_EJECTIONS: "forebay_upstream_ejections_total", Counter, ["upstream", "reason"],
        "Times that an endpoint was taken out for a while, by what passing requests said against it.";
    UPSTREAM_PANIC: "forebay_upstream_panic", Gauge, ["upstream"],
        "1 while so few endpoints are available that all of them are asked.";
    RETRIES: "forebay_retries_total", Counter, ["upstream", "reason"],
        "Attempts after the first of an exchange, by what the one before had failed for.";
    RETRIES_REFUSED: "forebay_retries_refused_total", Counter, ["upstream", "reason"],
        "Attempts that failed and were not repeated though their route would have it, by what forbade it.";
    UPSTREAM_QUEUE: "forebay_upstream_queue", Gauge, ["upstream"],
        "Exchanges that wait now because every endpoint that could serve them is full.";
    UPSTREAM_QUEUE_SECONDS: "forebay_upstream_queue_seconds", Histogram(QUEUE), ["upstream"],
        "Time that exchanges waited because every endpoint was full, whatever came of it; those that did not wait are not counted.";
    UPSTREAM_REJECTED: "forebay_upstream_rejected_total", Counter, ["upstream", "reason"],
        "Exchanges that an upstream turned away, by the reason of their refusal.";
    UPSTREAM_BREAKER_OPEN: "forebay_upstream_breaker_open", Gauge, ["upstream"],
        "What the circuit breaker does: 0 all are let through, 1 a few are, to see how they fare, 2 none is.";
    UPSTREAM_BREAKER_PROBES_REPLACED: "forebay_upstream_breaker_probes_replaced_total", Counter, ["upstream"],
        "Probes of a half-open circuit breaker whose client took so long that other requests got their places.";
    MIRROR: "forebay_mirror_total", Counter, ["upstream", "outcome"],
        "Requests of which the upstream was to get a copy, by what became of it, or why there was none.";
    SPOOL_BYTES: "forebay_spool_bytes", Gauge, ["direction", "store"],
        "Bytes of bodies that are held for a slow side now, by where; on disk, what their files have grown to.";
    SPOOL_LIMIT_BYTES: "forebay_spool_limit_bytes", Gauge, ["store"],
        "Bytes that all spools together may hold.";
    SPOOL_DENIALS: "forebay_spool_denials_total", Counter, ["direction", "limit"],
        "Times that a spool got no more disk, by the limit that it met: its endpoint waits then, or its upload is refused.";
    SLOW_CLIENTS: "forebay_slow_clients", Gauge, ["direction"],
        "Clients that are waited for now: to send their requests or to take their responses.";
    PRESSURE_TOTAL: "forebay_pressure_total", Counter, ["rung"],
        "Times that memory ran short and something was done: written to disk, made to wait, turned away.";
    PRESSURE: "forebay_pressure", Gauge, ["rung"],
        "What is done now because memory runs short: 1 for spill and shed, for pause how many wait.";
    DISK_SECONDS: "forebay_disk_seconds", Histogram(DISK), ["operation"],
        "Time of one write or read of a spool, from when it was queued until it was done.";
    DISK_QUEUE: "forebay_disk_queue", Gauge, [],
        "Writes and reads of spools that are queued or under way.";
    DISK_FAILURES: "forebay_disk_failures_total", Counter, ["operation"],
        "Writes and reads of spools that failed.";
    LANE_WAITING: "forebay_lane_waiting", Gauge, ["worker", "class"],
        "Exchanges that wait for their turn: new connections, bodies that pass, answers that are spooled.";
    LANE_SHARE: "forebay_lane_share_ratio", Gauge, ["worker", "class"],
        "Of its time, what a worker may give to a class of exchanges, as the lag of its event loop allows.";
    LANE_OVERDUE: "forebay_lane_overdue_total", Counter, ["worker", "class"],
        "Turns that were given because `resources.turn` was over.";
    LANE_BYTES: "forebay_lane_bytes_total", Counter, ["worker"],
        "Bytes that were spooled.";
    ACCESS_LOG_LINES: "forebay_access_log_lines_total", Counter, [],
        "Lines written to the access log.";
    ACCESS_LOG_DROPPED: "forebay_access_log_dropped_total", Counter, ["reason"],
        "Lines missing from the access log.";
    SPANS: "forebay_spans_total", Counter, ["outcome"],
        "Spans of recorded exchanges: exported to the collector, failed on the way to it, or dropped since too many waited.";
    ADMIN_REQUESTS: "forebay_admin_requests_total", Counter, ["path", "code"],
        "Requests to the admin endpoint, by what answered them and its status.";
    ADMIN_CONNECTIONS: "forebay_admin_connections", Gauge, [],
        "Connections to the admin endpoint that are open.";
    ADMIN_CONNECTIONS_CLOSED: "forebay_admin_connections_closed_total", Counter, [],
        "Connections to the admin endpoint that were closed to make room, for there were `admin.connections`.";
    ADMIN_STREAMS: "forebay_admin_streams", Gauge, [],
        "Answers of the admin endpoint that go on, such as that of the status page.";
    LOOP_WAIT: "forebay_loop_wait_seconds_total", Counter, ["worker"],
        "Time in which a worker waited in the kernel for something to do.";
    LOOP_BUSY: "forebay_loop_busy_seconds_total", Counter, ["worker"],
        "Time in which a worker did something.";
    LOOP_WAKEUPS: "forebay_loop_wakeups_total", Counter, ["worker"],
        "Times that a worker waited in the kernel and was woken.";
    LOOP_READY_EVENTS: "forebay_loop_ready_events_total", Counter, ["worker"],
        "Events that the kernel had ready for a worker: sockets to read, to write or to accept from.";
    LOOP_POLLS: "forebay_loop_polls_total", Counter, ["worker"],
        "Polls of tasks.";
    LOOP_POLL: "forebay_loop_poll_seconds", Histogram(POLL_TIMES), ["worker"],
        "Time of one poll of a task, in which no other task of its worker runs.";
    LOOP_TASKS: "forebay_loop_tasks", Gauge, ["worker"],
        "Tasks that there are: connections, exchanges and what they need.";
    LOOP_RUN_QUEUE: "forebay_loop_run_queue", Gauge, ["worker"],
        "Tasks that are ready and wait for their worker.";
    LOOP_DESCRIPTORS: "forebay_loop_descriptors", Gauge, ["worker"],
        "Sockets and other descriptors that a worker watches.";
    LOOP_LAG: "forebay_loop_lag_seconds", Histogram(LAG), ["worker"],
        "How late a task that was ready ran: the time to a sign of life of a worker.";
    STALLED_WORKERS: "forebay_stalled_workers", Gauge, [],
        "Workers that are late by more than stall_threshold now.";
    STALLS: "forebay_stalls_total", Counter, ["where"],
        "Times that a worker was late by more than stall_threshold, by the filter or phase that held it up.";
    FILTER_POLL_SECONDS: "forebay_filter_poll_seconds", Histogram(FILTER_POLL), ["filter"],
        "Time of one poll of a filter, in which no other task of its worker runs.";
    FILTER_SKIPPED: "forebay_filter_skipped_total", Counter, ["route", "filter"],
        "Exchanges in which a filter did nothing, since its `when:` did not hold.";
    FILTER_CALLS: "forebay_filter_calls_total", Counter, ["filter", "upstream", "outcome"],
        "Requests that filters sent to an upstream, by what became of them.";
    FILTER_CALL_SECONDS: "forebay_filter_call_seconds", Histogram(CALL), ["filter", "upstream"],
        "Time of a request that a filter sent to an upstream, from when it was to be sent until its answer was here whole.";
    ACCESS: "forebay_access_total", Counter, ["route", "filter", "outcome"],
        "Requests at filters that let some in and others not, by what became of them there.";
    FILTER_LOADS: "forebay_filter_loads_total", Counter, ["route", "filter", "outcome"],
        "Times that a filter has read again what it goes by: a file that has changed, or the keys of a service.";
    COMPRESSED_BYTES: "forebay_compressed_bytes_total", Counter, ["route", "coding", "side"],
        "Bytes of answers that came to be compressed (`in`), and what was made of them (`out`).";
    COMPRESS_BUSY: "forebay_compress_busy_total", Counter, ["route"],
        "Answers that left as they are, since as many as may be were compressed already.";
    PASSWORD_SECONDS: "forebay_password_seconds", Histogram(PASSWORD), [],
        "Time from when a password was to be checked until it was, hashing and waiting for a thread that does it.";
    PASSWORD_WAITING: "forebay_passwords_waiting", Gauge, [],
        "Passwords that wait for a thread that hashes them.";
    WORKERS: "forebay_workers", Gauge, [],
        "Worker threads that serve clients.";
    BUILD_INFO: "forebay_build_info", Gauge, ["version", "pingora"],
        "Always 1; the labels say what is running.";
}

impl Family {
    /// The upper bounds of its buckets, in seconds; none if it is no histogram.
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

    /// Registers this family as a gauge of what is no whole number.
    pub(super) fn ratio(&'static self, registry: &Registry) -> GaugeVec {
        debug_assert_eq!(self.kind, Kind::Gauge, "{}", self.name);
        self.register(registry, GaugeVec::new(Opts::new(self.name, self.help), self.labels))
    }

    /// What a collector of ours read of it.
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

    /// One sample of it, a counter or a gauge.
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

    /// One histogram of it: how many fell into each bucket, the last of which has no bound, and the sum of all.
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

    /// What the registry wants to know of it before its collector is registered.
    pub(crate) fn describe(&self) -> Desc {
        let labels = self.labels.iter().map(|&label| label.to_owned()).collect();
        let described = Desc::new(self.name.to_owned(), self.help.to_owned(), labels, Default::default());
        described.expect("the rows of this table are valid: a test registers every one of them")
    }

    /// Whether it is there only in a build with `tokio_unstable`.
    #[cfg(test)]
    pub(super) fn is_unstable(&self) -> bool {
        [&LOOP_READY_EVENTS, &LOOP_POLLS, &LOOP_POLL, &LOOP_DESCRIPTORS].iter().any(|one| one.name == self.name)
    }

    /// How many series one set of label values makes.
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
