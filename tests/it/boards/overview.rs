//! Overview: whether the gateway is healthy, and which board shows the details.

use super::board::{Board, Panel};
use super::colour::{BAD, WARN};
use super::phrases;

pub fn board() -> Board {
    Board::new(
        "overview",
        "Is Forebay well? Traffic, errors, latency and where the time goes, on one screen; each panel has a board that \
            says more.",
    )
    .strip([
        Panel::stat("Requests", "Exchanges that ended, per second.", "reqps", "sum(rate(forebay_exchanges_total[R]))"),
        Panel::stat(
            "Server errors",
            "Share of exchanges that were answered with a 5xx, by Forebay or by a backend. More on Routes.",
            "percentunit",
            phrases::SERVER_ERRORS,
        )
        .thresholds(&[(0.01, WARN), (0.05, BAD)]),
        Panel::stat(
            "Latency, p99",
            "99 of 100 exchanges took less, from the first byte of the connection or header to the last byte out.",
            "s",
            "histogram_quantile(0.99, sum by (le) (rate(forebay_exchange_seconds_bucket[R])))",
        )
        .thresholds(&[(1.0, WARN), (5.0, BAD)]),
        Panel::stat(
            "Own time, p99",
            "What Forebay itself cost 99 of 100 exchanges at most: time of work, without any waiting. More on Event \
                loop.",
            "s",
            "histogram_quantile(0.99, sum by (le) (rate(forebay_own_seconds_bucket[R])))",
        )
        .thresholds(&[(0.005, WARN), (0.02, BAD)]),
        Panel::stat(
            "In flight",
            "Exchanges that are under way now, in whatever phase.",
            "short",
            "sum(forebay_phase_active)",
        ),
        Panel::stat(
            "Slow clients",
            "Clients that are waited for now, to send a request or to take a response. More on Buffering and slow \
                clients.",
            "short",
            "sum(forebay_slow_clients)",
        ),
        Panel::stat(
            "Endpoints out",
            "Endpoints that take no requests now, because checks fail or they were ejected. More on Upstreams.",
            "short",
            "sum(forebay_upstream_endpoints{state=~\"unhealthy|ejected\"})",
        )
        .thresholds(&[(1.0, WARN), (3.0, BAD)]),
        Panel::stat(
            "Stalled workers",
            "Workers whose event loop is held up right now. More on Event loop.",
            "short",
            "sum(forebay_stalled_workers)",
        )
        .thresholds(&[(1.0, BAD)]),
    ])
    .row(9, [phrases::by_class(), phrases::latency()])
    .row(9, [phrases::waterfall(), phrases::latency_heat()])
    .row(
        9,
        [
            Panel::table(
                "Routes",
                "Each route over the last minutes, the one with most requests first. Click a name for its own board.",
                "route",
            )
            .column("requests", "reqps", "sum by (route) (rate(forebay_exchanges_total[R]))")
            .column("errors", "percentunit", phrases::SERVER_ERRORS_BY_ROUTE)
            .column_thresholds(&[(0.01, WARN), (0.05, BAD)])
            .column("p50", "s", &phrases::quantile_by("route", "0.5", "forebay_exchange_seconds_bucket"))
            .column("p99", "s", &phrases::quantile_by("route", "0.99", "forebay_exchange_seconds_bucket"))
            .column_thresholds(&[(1.0, WARN), (5.0, BAD)])
            .sorted_by("requests")
            .drill_down("route", "routes"),
            Panel::table(
                "Upstreams",
                "Each upstream over the last minutes. Click a name for its own board.",
                "upstream",
            )
            .column("attempts", "reqps", "sum by (upstream) (rate(forebay_upstream_connects_total[R]))")
            .column("not connected", "percentunit", phrases::CONNECT_FAILURES_BY_UPSTREAM)
            .column_thresholds(&[(0.001, WARN), (0.01, BAD)])
            .column("retried", "percentunit", phrases::RETRIES_BY_UPSTREAM)
            .column_thresholds(&[(0.05, WARN), (0.2, BAD)])
            .column(
                "first byte \
                p99",
                "s",
                &phrases::quantile_by("upstream", "0.99", "forebay_upstream_wait_seconds_bucket"),
            )
            .column("endpoints", "short", "sum by (upstream) (forebay_endpoint_available)")
            .sorted_by("attempts")
            .drill_down("upstream", "upstreams"),
        ],
    )
    .row(
        8,
        [
            phrases::refusals(
                "Exchanges and connections that Forebay itself ended, by reason. Its first half is the \
                phase in which it happened.",
                "",
            ),
            Panel::stack(
                "In flight by phase",
                "What the exchanges that are under way wait for: blue the client, purple the backend, green Forebay.",
                "short",
            )
            .query("sum by (phase) (forebay_phase_active)", "{{phase}}")
            .in_order_of_phases(),
            Panel::lines("Traffic", "Bytes from and to clients, headers included.", "Bps")
                .query("sum by (direction) (rate(forebay_bytes_total[R]))", "{{direction}}"),
        ],
    )
}
