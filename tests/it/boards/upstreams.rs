//! Upstreams: the backends, their health, and the cost of contacting them.

use super::board::{Board, Panel};
use super::colour::{BAD, GOOD, WARN};
use super::phrases::{self, quantile_by};

pub fn board() -> Board {
    Board::new(
        "upstreams",
        "The backends: who is well, who gets how much, how fast they connect and answer, what is retried, queued and \
            turned away.",
    )
    .strip([
        Panel::stat(
            "Attempts",
            "Times that an exchange asked for a connection to an endpoint, per second; more than requests where some \
                are retried.",
            "reqps",
            "sum(rate(forebay_upstream_connects_total[R]))",
        ),
        Panel::stat(
            "Not connected",
            "Share of attempts for which no connection came about.",
            "percentunit",
            "sum(rate(forebay_upstream_connects_total{outcome=\"failed\"}[R])) / \
                sum(rate(forebay_upstream_connects_total[R]))",
        )
        .thresholds(&[(0.001, WARN), (0.01, BAD)]),
        Panel::stat(
            "Reused",
            "Share of connections that were kept from an earlier exchange. A low one costs connects: look at \
                `keepalive`.",
            "percentunit",
            "sum(rate(forebay_upstream_connects_total{outcome=\"reused\"}[R])) / \
                sum(rate(forebay_upstream_connects_total[R]))",
        ),
        Panel::stat(
            "Retried",
            "Share of attempts that were not the first of their exchange.",
            "percentunit",
            "sum(rate(forebay_retries_total[R])) / sum(rate(forebay_upstream_connects_total[R]))",
        )
        .thresholds(&[(0.05, WARN), (0.2, BAD)]),
        Panel::stat(
            "First byte, p99",
            "99 of 100 attempts had the header of the answer in less time after the request was out.",
            "s",
            "histogram_quantile(0.99, sum by (le) (rate(forebay_upstream_wait_seconds_bucket[R])))",
        )
        .thresholds(&[(1.0, WARN), (5.0, BAD)]),
        Panel::stat(
            "Available",
            "Share of endpoints that take requests.",
            "percentunit",
            "sum(forebay_endpoint_available) / sum(forebay_upstream_endpoints)",
        ),
        Panel::stat(
            "Queued",
            "Exchanges that wait for a free slot of an upstream \
            now.",
            "short",
            "sum(forebay_upstream_queue)",
        )
        .thresholds(&[(1.0, WARN), (100.0, BAD)]),
        Panel::stat(
            "Breakers open",
            "Upstreams whose circuit breaker lets nothing through now.",
            "short",
            "count(forebay_upstream_breaker_open == 2) or vector(0)",
        )
        .thresholds(&[(1.0, BAD)]),
    ])
    .row(
        9,
        [
            Panel::table(
                "Each endpoint",
                "Each endpoint over the last minutes: how often it was chosen, what it has under way, whether it takes \
                    requests.",
                "endpoint",
            )
            .column("chosen", "reqps", "sum by (endpoint) (rate(forebay_upstream_selections_total[R]))")
            .column("in flight", "short", "sum by (endpoint) (forebay_endpoint_inflight)")
            .column("available", "short", "sum by (endpoint) (forebay_endpoint_available)")
            .sorted_by("chosen"),
            Panel::states(
                "Endpoints over time",
                "Whether an endpoint takes requests: 0 it does not, more than 0 so many of this label do.",
                &[("0", "out", BAD), ("1", "in", GOOD)],
            )
            .query("sum by (endpoint) (forebay_endpoint_available)", "{{endpoint}}"),
            Panel::stack("Endpoints by state", "How many endpoints are in which state.", "short")
                .query("sum by (state) (forebay_upstream_endpoints)", "{{state}}"),
        ],
    )
    .row(
        9,
        [
            Panel::lines(
                "Chosen, by endpoint",
                "Times that an endpoint was chosen, per second. Apart where weights, \
                health or load are.",
                "reqps",
            )
            .query("topk(20, sum by (endpoint) (rate(forebay_upstream_selections_total[R])))", "{{endpoint}}"),
            Panel::lines("In flight, by endpoint", "Attempts that an endpoint has under way.", "short")
                .query("topk(20, sum by (endpoint) (forebay_endpoint_inflight))", "{{endpoint}}"),
            Panel::stack(
                "Connections given",
                "Attempts per second by what connection they were given: a new one, a \
                kept one, none.",
                "reqps",
            )
            .query("sum by (outcome) (rate(forebay_upstream_connects_total[R]))", "{{outcome}}"),
            Panel::lines("Connections open", "Connections to endpoints that are open now, in use or kept.", "short")
                .query("sum by (upstream) (forebay_upstream_connections)", "{{upstream}}"),
        ],
    )
    .row(
        9,
        [
            Panel::lines("First byte", "Time from the end of the request to the header of the answer.", "s")
                .percentiles("forebay_upstream_wait_seconds_bucket"),
            Panel::heat(
                "First byte, all of it",
                "How many attempts waited how long for the header of the answer.",
                "sum by (le) (rate(forebay_upstream_wait_seconds_bucket[R]))",
            ),
            Panel::lines("Connecting", "Time until a new connection stands, TLS included.", "s")
                .percentiles("forebay_upstream_connect_seconds_bucket"),
            Panel::lines(
                "Connection held, p99",
                "For how long an exchange had a connection to a backend; 99 of 100 \
                had it for less.",
                "s",
            )
            .query(&quantile_by("route", "0.99", "forebay_upstream_held_seconds_bucket"), "{{route}}"),
        ],
    )
    .row(
        8,
        [
            Panel::stack("Failures to connect", "Attempts without a connection, per second, by why.", "ops").query(
                "sum by (upstream, reason) (rate(forebay_upstream_connect_failures_total[R]))",
                "{{upstream}} \
                    {{reason}}",
            ),
            Panel::stack(
                "Retries",
                "Attempts after the first of an exchange, per second, by what the one before had failed for.",
                "ops",
            )
            .query("sum by (upstream, reason) (rate(forebay_retries_total[R]))", "{{upstream}} {{reason}}"),
            Panel::stack(
                "Retries refused",
                "Attempts that failed and were not repeated, per second, by what forbade \
                it.",
                "ops",
            )
            .query("sum by (upstream, reason) (rate(forebay_retries_refused_total[R]))", "{{upstream}} {{reason}}"),
            Panel::stack(
                "Turned away",
                "Exchanges that an upstream had no place for, per second, by which limit, and probes of its \
                circuit breaker that lost their place to others, for their client dawdled.",
                "ops",
            )
            .query(
                "sum by (upstream, reason) (rate(forebay_upstream_rejected_total[R]))",
                "{{upstream}} \
                    {{reason}}",
            )
            .query(
                "sum by (upstream) (rate(forebay_upstream_breaker_probes_replaced_total[R]))",
                "{{upstream}} probe replaced",
            ),
        ],
    )
    .row(
        8,
        [
            Panel::lines("Queue", "Exchanges that wait for a free slot of an upstream.", "short")
                .query("sum by (upstream) (forebay_upstream_queue)", "{{upstream}}"),
            Panel::lines("Time in the queue", "How long exchanges waited for a free slot.", "s")
                .percentiles("forebay_upstream_queue_seconds_bucket"),
            Panel::stack("Health checks", "Checks per second, by what came of them.", "ops")
                .query("sum by (outcome) (rate(forebay_upstream_health_checks_total[R]))", "{{outcome}}"),
            Panel::lines(
                "Health checks under way",
                "Checks of all upstreams together, and upstreams that wait because server.health_checks is reached.",
                "short",
            )
            .query("sum by (instance) (forebay_health_checks_active)", "{{instance}} under way")
            .query("sum by (instance) (forebay_health_checks_waiting)", "{{instance}} upstreams that wait"),
            Panel::stack(
                "Ejections",
                "Endpoints that were taken out for what they did to real traffic, per second, by \
                why.",
                "ops",
            )
            .query(
                "sum by (upstream, reason) (rate(forebay_upstream_ejections_total[R]))",
                "{{upstream}} \
                    {{reason}}",
            ),
        ],
    )
    .row(
        8,
        [
            Panel::states(
                "Circuit breaker",
                "Whether an upstream's breaker lets requests through.",
                &[("0", "closed", GOOD), ("1", "trying", WARN), ("2", "open", BAD)],
            )
            .query("max by (upstream) (forebay_upstream_breaker_open)", "{{upstream}}"),
            Panel::states(
                "Panic",
                "So few endpoints are well that all of them are asked.",
                &[("0", "calm", GOOD), ("1", "panic", BAD)],
            )
            .query("max by (upstream) (forebay_upstream_panic)", "{{upstream}}"),
            Panel::stack(
                "Names looked up",
                "Look-ups of endpoints per second, by what came of them; after a failed \
                one the last good answer stays.",
                "ops",
            )
            .query("sum by (outcome) (rate(forebay_upstream_discoveries_total[R]))", "{{outcome}}"),
            Panel::stack(
                "Handed over",
                "Exchanges per second that go to upstreams by Pingora's driver and not by Forebay's own, by why.",
                "ops",
            )
            .query("sum by (reason) (rate(forebay_driver_exchanges_total{driver=\"pingora\"}[R]))", "{{reason}}"),
            Panel::stack("Mirrored", "Copies of requests sent elsewhere, per second, by what came of them.", "ops")
                .query("sum by (outcome) (rate(forebay_mirror_total[R]))", "{{outcome}}"),
        ],
    )
    .row(
        8,
        [
            phrases::refusals(
                "Exchanges that Forebay ended because of a backend, per second, by reason.",
                "reason=~\"(queue|select|connect|send|wait|receive)\\\\..*\"",
            ),
            Panel::lines(
                "Sending, waiting, receiving",
                "Mean time per exchange that a backend is waited for, by \
            phase.",
                "s",
            )
            .query(
                "sum by (phase) (rate(forebay_phase_seconds_sum{phase=~\"connect|send|wait|receive\"}[R])) / sum by \
                (phase) (rate(forebay_phase_seconds_count{phase=~\"connect|send|wait|receive\"}[R]))",
                "{{phase}}",
            ),
        ],
    )
}
