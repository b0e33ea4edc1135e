//! Queries that several boards share.

use super::board::Panel;

/// The share of exchanges that were answered with a 5xx; 0 without exchanges.
pub const SERVER_ERRORS: &str =
    "(sum(rate(forebay_exchanges_total{code=~\"5..\"}[R])) or vector(0)) / sum(rate(forebay_exchanges_total[R]))";

/// The same for each route; a route without exchanges has no row.
pub const SERVER_ERRORS_BY_ROUTE: &str = "sum by (route) (rate(forebay_exchanges_total{code=~\"5..\"}[R])) / sum by \
    (route) (rate(forebay_exchanges_total[R]))";

/// The share of attempts without a connection; an upstream without attempts has no row.
pub const CONNECT_FAILURES_BY_UPSTREAM: &str = "sum by (upstream) \
    (rate(forebay_upstream_connects_total{outcome=\"failed\"}[R])) / (sum by (upstream) \
    (rate(forebay_upstream_connects_total[R])) > 0)";

/// The share of attempts that were not the first of their exchange.
pub const RETRIES_BY_UPSTREAM: &str = "sum by (upstream) (rate(forebay_retries_total[R])) / (sum by (upstream) (rate(forebay_upstream_connects_total[R])) > 0)";

/// A quantile of a histogram for each value of a label.
pub fn quantile_by(label: &str, quantile: &str, buckets: &str) -> String {
    format!("histogram_quantile({quantile}, sum by ({label}, le) (rate({buckets}[R])))")
}

/// Requests by the first digit of the status.
pub fn by_class() -> Panel {
    Panel::stack(
        "Requests by class",
        "Exchanges that ended, per second, by the first digit of their status; `none` got no answer.",
        "reqps",
    )
    .query("sum by (code_class) (rate(forebay_exchange_seconds_count[R]))", "{{code_class}}")
}

/// Percentiles of the duration of exchanges.
pub fn latency() -> Panel {
    Panel::lines(
        "Latency",
        "Time of whole exchanges: the middle one, the slow one of ten, the slowest of a hundred.",
        "s",
    )
    .percentiles("forebay_exchange_seconds_bucket")
}

/// All exchanges by duration.
pub fn latency_heat() -> Panel {
    Panel::heat(
        "Latency, all of it",
        "How many exchanges took how long. Two bands are two kinds of requests; a band that rises is something that \
            slows down.",
        "sum by (le) (rate(forebay_exchange_seconds_bucket[R]))",
    )
}

/// The mean duration of an exchange by phase.
pub fn waterfall() -> Panel {
    Panel::stack(
        "Where the time goes",
        "Mean seconds that an exchange spends in each phase, in the order in which they happen; together they are its \
            mean latency. Blue the client is waited for, purple the backend, green Forebay works.",
        "s",
    )
    .query(
        "sum by (phase) (rate(forebay_phase_seconds_sum[R])) / on () group_left () \
        sum(rate(forebay_exchange_seconds_count[R]))",
        "{{phase}}",
    )
    .in_order_of_phases()
}

/// Exchanges that Forebay ended, by reason; `matchers` restrict the reasons.
pub fn refusals(about: &'static str, matchers: &str) -> Panel {
    Panel::stack("Refusals", about, "ops")
        .query(&format!("sum by (reason) (rate(forebay_refusals_total{{{matchers}}}[R])) > 0"), "{{reason}}")
}
