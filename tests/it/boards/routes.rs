//! Routes: one route, or several for comparison.

use super::board::{Board, Panel};
use super::colour::{BAD, WARN};
use super::phrases::{self, quantile_by};

pub fn board() -> Board {
    Board::new(
        "routes",
        "One route or all of them beside each other: what they answer, how fast, and which phase is to blame.",
    )
    .strip([
        Panel::stat("Requests", "Exchanges that ended, per second.", "reqps", "sum(rate(forebay_exchanges_total[R]))"),
        Panel::stat(
            "Server errors",
            "Share of exchanges that were answered with a 5xx.",
            "percentunit",
            phrases::SERVER_ERRORS,
        )
        .thresholds(&[(0.01, WARN), (0.05, BAD)]),
        Panel::stat(
            "Client errors",
            "Share of exchanges that were answered with a 4xx.",
            "percentunit",
            "(sum(rate(forebay_exchanges_total{code=~\"4..\"}[R])) or vector(0)) / \
                sum(rate(forebay_exchanges_total[R]))",
        )
        .thresholds(&[(0.1, WARN), (0.5, BAD)]),
        Panel::stat(
            "Latency, p50",
            "Half of the exchanges took less.",
            "s",
            "histogram_quantile(0.5, sum by (le) (rate(forebay_exchange_seconds_bucket[R])))",
        ),
        Panel::stat(
            "Latency, p99",
            "99 of 100 exchanges took less.",
            "s",
            "histogram_quantile(0.99, sum by (le) (rate(forebay_exchange_seconds_bucket[R])))",
        )
        .thresholds(&[(1.0, WARN), (5.0, BAD)]),
        Panel::stat(
            "Backend busy",
            "Connections to backends that are busy on average: the time for which exchanges had one, per second.",
            "short",
            "sum(rate(forebay_upstream_held_seconds_sum[R]))",
        ),
        Panel::stat(
            "From clients",
            "Bytes from clients, per \
            second.",
            "Bps",
            "sum(rate(forebay_bytes_total{direction=\"received\"}[R]))",
        ),
        Panel::stat(
            "To clients",
            "Bytes to clients, per \
            second.",
            "Bps",
            "sum(rate(forebay_bytes_total{direction=\"sent\"}[R]))",
        ),
    ])
    .row(
        10,
        [Panel::table(
            "Each route",
            "Each route over the last minutes. Own time is what Forebay itself cost; backend is for how long an \
                exchange had a connection to one.",
            "route",
        )
        .column("requests", "reqps", "sum by (route) (rate(forebay_exchanges_total[R]))")
        .column(
            "4xx",
            "percentunit",
            "sum by (route) (rate(forebay_exchanges_total{code=~\"4..\"}[R])) / sum by \
            (route) (rate(forebay_exchanges_total[R]))",
        )
        .column("5xx", "percentunit", phrases::SERVER_ERRORS_BY_ROUTE)
        .column_thresholds(&[(0.01, WARN), (0.05, BAD)])
        .column("p50", "s", &quantile_by("route", "0.5", "forebay_exchange_seconds_bucket"))
        .column("p90", "s", &quantile_by("route", "0.9", "forebay_exchange_seconds_bucket"))
        .column("p99", "s", &quantile_by("route", "0.99", "forebay_exchange_seconds_bucket"))
        .column_thresholds(&[(1.0, WARN), (5.0, BAD)])
        .column("backend p99", "s", &quantile_by("route", "0.99", "forebay_upstream_held_seconds_bucket"))
        .column("own p99", "s", &quantile_by("route", "0.99", "forebay_own_seconds_bucket"))
        .column_thresholds(&[(0.005, WARN), (0.02, BAD)])
        .column("to clients", "Bps", "sum by (route) (rate(forebay_bytes_total{direction=\"sent\"}[R]))")
        .sorted_by("requests")
        .drill_down("route", "routes")],
    )
    .row(9, [phrases::by_class(), phrases::latency(), phrases::latency_heat()])
    .row(
        9,
        [
            phrases::waterfall().wide(2),
            Panel::table(
                "Each phase",
                "How often an exchange enters a phase, and what it then spends in it, over the last minutes.",
                "phase",
            )
            .column("entered", "reqps", "sum by (phase) (rate(forebay_phase_seconds_count[R]))")
            .column(
                "mean",
                "s",
                "sum by (phase) (rate(forebay_phase_seconds_sum[R])) / sum by (phase) \
                (rate(forebay_phase_seconds_count[R]))",
            )
            .column("p50", "s", &quantile_by("phase", "0.5", "forebay_phase_seconds_bucket"))
            .column("p99", "s", &quantile_by("phase", "0.99", "forebay_phase_seconds_bucket"))
            .sorted_by("mean"),
        ],
    )
    .row(
        8,
        [
            Panel::lines("Requests by route", "Exchanges that ended, per second; the ten busiest routes.", "reqps")
                .query("topk(10, sum by (route) (rate(forebay_exchanges_total[R])))", "{{route}}"),
            Panel::lines(
                "Latency by route, p99",
                "99 of 100 exchanges of a route took less; the ten slowest \
                routes.",
                "s",
            )
            .query(
                &format!(
                    "topk(10, \
                    {})",
                    quantile_by("route", "0.99", "forebay_exchange_seconds_bucket")
                ),
                "{{route}}",
            ),
            Panel::lines(
                "Errors by route and status",
                "Answers with a 5xx, per second, of Forebay and of \
                backends.",
                "reqps",
            )
            .query("sum by (route, code) (rate(forebay_exchanges_total{code=~\"5..\"}[R]))", "{{route}} {{code}}"),
        ],
    )
    .row(
        8,
        [
            Panel::heat(
                "Own time, all of it",
                "What Forebay itself cost: time of work, without any waiting. A band that rises is a filter or a \
                    worker with too much to do.",
                "sum by (le) (rate(forebay_own_seconds_bucket[R]))",
            ),
            Panel::lines(
                "Own time by route, p99",
                "What Forebay itself cost 99 of 100 exchanges of a route at most; \
                the ten dearest routes.",
                "s",
            )
            .query(
                &format!(
                    "topk(10, \
                    {})",
                    quantile_by("route", "0.99", "forebay_own_seconds_bucket")
                ),
                "{{route}}",
            ),
            Panel::lines(
                "Filters that did nothing",
                "Exchanges per second in which the `when:` of a filter did not hold; the ten of them with most.",
                "reqps",
            )
            .query("topk(10, sum by (route, filter) (rate(forebay_filter_skipped_total[R])))", "{{route}} {{filter}}"),
            Panel::lines(
                "Calls of filters",
                "Requests per second that filters send to upstreams, by what becomes of them.",
                "reqps",
            )
            .query(
                "sum by (filter, upstream, outcome) (rate(forebay_filter_calls_total[R]))",
                "{{filter}} {{upstream}} {{outcome}}",
            ),
            Panel::lines(
                "Waiting for calls, p99",
                "99 of 100 requests that filters sent to an upstream were answered in less.",
                "s",
            )
            .query(
                "histogram_quantile(0.99, sum by (le, filter, upstream) (rate(forebay_filter_call_seconds_bucket[R])))",
                "{{filter}} {{upstream}}",
            ),
            Panel::lines("Traffic", "Bytes from and to clients.", "Bps")
                .query("sum by (direction) (rate(forebay_bytes_total[R]))", "{{direction}}"),
        ],
    )
    .row(
        8,
        [
            Panel::lines(
                "Who comes in",
                "Requests per second at filters that let some in and others not, by what becomes of them there.",
                "reqps",
            )
            .query(
                "sum by (route, filter, outcome) (rate(forebay_access_total[R]))",
                "{{route}} {{filter}} {{outcome}}",
            ),
            Panel::lines(
                "What filters read again",
                "Files and keys of services that filters go by, read per second; one that fails leaves what was there in force.",
                "ops",
            )
            .query(
                "sum by (route, filter, outcome) (rate(forebay_filter_loads_total[R]))",
                "{{route}} {{filter}} {{outcome}}",
            ),
            Panel::lines("Compressed answers", "Bytes before and after.", "Bps")
                .query("sum by (coding, side) (rate(forebay_compressed_bytes_total[R]))", "{{coding}} {{side}}"),
        ],
    )
    .row(
        8,
        [
            Panel::lines("Answers that found no place to be compressed", "They left as they are.", "reqps")
                .query("sum by (route) (rate(forebay_compress_busy_total[R]))", "{{route}}"),
            Panel::lines(
                "Checking passwords, p99",
                "99 of 100 passwords were checked in less, with the time in which they waited for a thread.",
                "s",
            )
            .query("histogram_quantile(0.99, sum by (le) (rate(forebay_password_seconds_bucket[R])))", "checked"),
            Panel::lines("Passwords that wait", "For a thread that hashes them.", "short")
                .query("sum(forebay_passwords_waiting)", "waiting"),
        ],
    )
    .row(
        8,
        [
            Panel::lines(
                "Decoded bodies",
                "Coded bodies per second at `decompress` filters, by outcome: all but `decoded` and `passed` are refused.",
                "reqps",
            )
            .query(
                "sum by (route, direction, outcome) (rate(forebay_decompress_total[R]))",
                "{{route}} {{direction}} {{outcome}}",
            ),
            Panel::lines("Decoded bytes", "Bytes before and after decoding.", "Bps").query(
                "sum by (direction, coding, side) (rate(forebay_decompressed_bytes_total[R]))",
                "{{direction}} {{coding}} {{side}}",
            ),
            Panel::lines(
                "Error pages",
                "Pages per second in the place of responses, by the class of the response's status and the page's form.",
                "reqps",
            )
            .query(
                "sum by (route, code_class, form) (rate(forebay_error_pages_total[R]))",
                "{{route}} {{code_class}} {{form}}",
            ),
        ],
    )
    .row(
        8,
        [
            Panel::lines(
                "Changed bodies",
                "Bodies per second at `body` filters, by outcome: all but `changed` and `unchanged` are refused.",
                "reqps",
            )
            .query(
                "sum by (route, direction, outcome) (rate(forebay_body_changes_total[R]))",
                "{{route}} {{direction}} {{outcome}}",
            ),
            Panel::lines("Replacements in bodies", "Places per second that are replaced, set or removed.", "ops").query(
                "sum by (route, direction) (rate(forebay_body_replacements_total[R]))",
                "{{route}} {{direction}}",
            ),
        ],
    )
}
