//! Config and process: the running version, its start, its resources, and its client connections.

use super::board::{Board, Panel};
use super::colour::{BAD, WARN};
use super::phrases;

pub fn board() -> Board {
    Board::new(
        "process",
        "What is running: version, uptime, CPU, memory, files, the configuration and its reloads, the connections of \
        each listener, TLS, certificates and the logs.",
    )
    .strip([
        Panel::stat("Up", "Processes that Prometheus reaches.", "short", "sum(up)"),
        Panel::stat("Uptime", "Since the youngest process began.", "s", "time() - max(process_start_time_seconds)"),
        Panel::stat(
            "CPU",
            "Cores in use. The counter has whole seconds, so it is \
                smoothed.",
            "short",
            "sum(rate(process_cpu_seconds_total[R]))",
        ),
        Panel::stat("Memory", "Resident memory.", "bytes", "sum(process_resident_memory_bytes)"),
        Panel::stat(
            "Files",
            "Of the open files that a process may have, what the fullest one \
                has.",
            "percentunit",
            "max(process_open_fds / process_max_fds)",
        )
        .thresholds(&[(0.7, WARN), (0.9, BAD)]),
        Panel::stat(
            "Connections",
            "Client connections that are open \
                now.",
            "short",
            "sum(forebay_client_connections)",
        ),
        Panel::stat(
            "Log lines lost",
            "Share of the lines of the access log that were \
                dropped.",
            "percentunit",
            "sum(rate(forebay_access_log_dropped_total[R])) / \
                (sum(rate(forebay_access_log_lines_total[R])) + sum(rate(forebay_access_log_dropped_total[R])))",
        )
        .thresholds(&[(0.0001, WARN), (0.01, BAD)]),
        Panel::stat(
            "Routes folded",
            "Routes that are counted together as `_other`, because `max_series` was \
                reached.",
            "short",
            "sum(forebay_routes_folded)",
        )
        .thresholds(&[(1.0, WARN)]),
    ])
    .row(
        8,
        [
            Panel::table("Processes", "What runs where.", "instance")
                .column("up", "short", "sum by (instance) (up)")
                .column("workers", "short", "sum by (instance) (forebay_workers)")
                .column("uptime", "s", "time() - max by (instance) (process_start_time_seconds)")
                .column("memory", "bytes", "sum by (instance) (process_resident_memory_bytes)")
                .column_of_labels("max by (instance, version, pingora) (forebay_build_info)")
                .wide(2),
            Panel::states(
                "Reached",
                "Whether Prometheus reaches a \
                    process.",
                &[("0", "down", BAD), ("1", "up", super::colour::GOOD)],
            )
            .query("max by (instance) (up)", "{{instance}}"),
        ],
    )
    .row(
        9,
        [
            Panel::lines("CPU", "Cores that each process uses.", "short")
                .query("sum by (instance) (rate(process_cpu_seconds_total[R]))", "{{instance}}"),
            Panel::lines("Memory", "Resident memory of each process.", "bytes")
                .query("sum by (instance) (process_resident_memory_bytes)", "{{instance}}"),
            Panel::lines(
                "Address space",
                "Virtual memory of each process. Threads and the allocator reserve much \
                    that they never touch.",
                "bytes",
            )
            .query("sum by (instance) (process_virtual_memory_bytes)", "{{instance}}"),
            Panel::lines("Threads", "Threads of each process: workers, disk, logs, the admin endpoint.", "short")
                .query("sum by (instance) (process_threads)", "{{instance}}"),
        ],
    )
    .row(
        9,
        [
            Panel::lines("Open files", "File descriptors of each process; the line is what it may have.", "short")
                .query("sum by (instance) (process_open_fds)", "{{instance}}")
                .limit("min(process_max_fds)"),
            Panel::stack("Client connections", "Client connections that are open now, by what they do; the line is what there may be.", "short")
                .query("sum by (state) (forebay_client_connections)", "{{state}}")
                .limit("sum(forebay_client_connections_limit)"),
            Panel::lines(
                "Accepting stopped",
                "Listeners that accept no connection now because open files run short, and how often per second one stopped.",
                "short",
            )
            .query("sum by (instance) (forebay_accept_paused)", "{{instance}}, now")
            .query("sum by (instance) (rate(forebay_accept_pauses_total[R]))", "{{instance}}, per second")
            .at_least(1.0),
            Panel::lines("Connections accepted", "Client connections per second, by listener.", "cps")
                .query("sum by (listener) (rate(forebay_client_connections_total[R]))", "{{listener}}"),
            Panel::stack(
                "Requests by protocol",
                "Requests whose header arrived, per second, by the protocol that \
                    the client spoke.",
                "reqps",
            )
            .query("sum by (protocol) (rate(forebay_client_requests_total[R]))", "{{protocol}}"),
        ],
    )
    .row(
        8,
        [
            Panel::table("Configurations", "Which configuration runs where, and since when.", "instance")
                .column("generation", "short", "max by (instance) (forebay_config_generation)")
                .column("age", "s", "time() - max by (instance) (forebay_config_loaded_timestamp_seconds)")
                .column_of_labels("max by (instance, hash) (forebay_config_info)")
                .wide(2),
            Panel::stack(
                "Reloads",
                "Reloads of the configuration, per second, by what came of them.",
                "ops",
            )
            .query("sum by (result) (rate(forebay_config_reloads_total[R]))", "{{result}}"),
            Panel::lines(
                "Reload refused",
                "Processes whose last reload was refused: they run another configuration than their file says.",
                "short",
            )
            .query("max by (instance) (forebay_config_reload_failed)", "{{instance}}")
            .at_least(1.0),
            Panel::lines(
                "Upgrades",
                "New processes that were to take over, by what came of them, and older processes that still \
                    end what they have under way.",
                "short",
            )
            .query("sum by (instance, result) (increase(forebay_upgrades_total[R]))", "{{instance}}, {{result}}")
            .query("sum by (instance) (forebay_upgrade_draining_processes)", "{{instance}}, draining"),
            Panel::lines(
                "Upgrade failed",
                "Processes whose last upgrade failed: an older process serves on.",
                "short",
            )
            .query("max by (instance) (forebay_upgrade_failed)", "{{instance}}")
            .at_least(1.0),
            Panel::stack(
                "Exchanges by generation",
                "Exchanges, tunnels among them, by the number of the configuration that they began with.",
                "short",
            )
            .query("sum by (generation) (forebay_generation_exchanges)", "{{generation}}"),
            Panel::stack(
                "Connections by generation",
                "Client connections, by the number of the configuration that their listener was set up by.",
                "short",
            )
            .query("sum by (generation) (forebay_generation_connections)", "{{generation}}"),
        ],
    )
    .row(
        9,
        [
            Panel::stack("TLS handshakes", "Handshakes with clients that were done, per second, by version.", "ops")
                .query("sum by (version) (rate(forebay_tls_handshakes_total[R]))", "{{version}}"),
            Panel::lines(
                "Sessions resumed",
                "Share of the handshakes that resumed a session, which costs a tenth of a full one.",
                "percentunit",
            )
            .query(
                "sum by (listener) (rate(forebay_tls_handshakes_total{resumed=\"yes\"}[R])) / (sum by (listener) \
                    (rate(forebay_tls_handshakes_total[R])) > 0)",
                "{{listener}}",
            )
            .max(1.0),
            Panel::lines("Handshake time", "From the first byte of the ClientHello to the end.", "s")
                .percentiles("forebay_tls_handshake_seconds_bucket"),
            Panel::stack("Failed handshakes", "Handshakes that came to nothing, per second, by reason.", "ops")
                .query("sum by (reason) (rate(forebay_refusals_total{reason=~\"handshake.+\"}[R])) > 0", "{{reason}}"),
        ],
    )
    .row(
        8,
        [
            Panel::table(
                "Certificates",
                "What clients are shown, by its first name: how long it is still valid.",
                "name",
            )
            .column("time left", "s", "min by (name) (forebay_tls_certificate_not_after_timestamp_seconds) - time()")
            .wide(2),
            Panel::stack(
                "Certificates reloaded",
                "Changed files of certificates, per second, by what became of them.",
                "ops",
            )
            .query("sum by (outcome) (rate(forebay_tls_reloads_total[R]))", "{{outcome}}"),
            Panel::lines(
                "Certificates refused",
                "Certificates whose files are wrong now, so that an older one is served.",
                "short",
            )
            .query("sum by (listener) (forebay_tls_certificates_refused)", "{{listener}}")
            .at_least(1.0),
        ],
    )
    .row(
        8,
        [
            Panel::table(
                "Certificates from issuers",
                "What Forebay orders by itself, by its first name: orders that failed in a row, and how long it is until the next.",
                "name",
            )
            .column("failures", "short", "max by (name) (forebay_acme_failures)")
            .column("next order in", "s", "min by (name) (forebay_acme_due_timestamp_seconds) - time()")
            .wide(2),
            Panel::stack("Orders", "Orders for certificates that ended, per second, by whether one was issued.", "ops")
                .query("sum by (outcome) (rate(forebay_acme_orders_total[R]))", "{{outcome}}"),
            Panel::lines("Challenges", "Answers to issuers that made sure of a name, per second.", "ops")
                .query("sum by (challenge) (rate(forebay_acme_challenges_total[R]))", "{{challenge}}"),
            Panel::lines(
                "Processes that order",
                "For each issuer there is one, however many share its store; with none, nothing is renewed.",
                "short",
            )
            .query("sum by (issuer) (forebay_acme_active)", "{{issuer}}")
            .at_least(1.0),
        ],
    )
    .row(
        8,
        [
            Panel::lines(
                "Connections passed on",
                "Client connections that are passed on as they are now, by name.",
                "short",
            )
            .query("sum by (name) (forebay_relayed_connections)", "{{name}}"),
            Panel::lines("Passed on", "Client connections per second that were passed on as they are, by name.", "cps")
                .query("sum by (name) (rate(forebay_relayed_connections_total[R]))", "{{name}}"),
            Panel::lines(
                "Bytes passed on",
                "Bytes per second of connections that were passed on and have ended.",
                "Bps",
            )
            .query("sum by (direction) (rate(forebay_relayed_bytes_total[R]))", "{{direction}}"),
        ],
    )
    .row(
        9,
        [
            Panel::lines(
                "Access log",
                "Lines per second: written, and lost because the queue was full or the file \
                    could not be written.",
                "ops",
            )
            .query("sum(rate(forebay_access_log_lines_total[R]))", "written")
            .query("sum(rate(forebay_access_log_dropped_total[R]))", "dropped"),
            Panel::stack(
                "Spans",
                "Spans of recorded exchanges, per second: taken by the collector, refused or not answered by it, and \
                    dropped because too many waited.",
                "ops",
            )
            .query("sum by (outcome) (rate(forebay_spans_total[R]))", "{{outcome}}"),
            phrases::refusals("Exchanges and connections that Forebay itself ended, per second, by reason.", ""),
        ],
    )
    .row(
        8,
        [
            Panel::stack(
                "Admin endpoint",
                "Requests to the admin endpoint, per second, by what answered them.",
                "reqps",
            )
            .query("sum by (path) (rate(forebay_admin_requests_total[R]))", "{{path}}"),
            Panel::lines(
                "Connections to the admin endpoint",
                "Connections to the admin endpoint that are open, and how many per second were closed to make room for others.",
                "short",
            )
            .query("sum by (instance) (forebay_admin_connections)", "{{instance}}, now")
            .query("sum by (instance) (rate(forebay_admin_connections_closed_total[R]))", "{{instance}}, closed per second")
            .at_least(1.0),
            Panel::lines(
                "Live views",
                "Answers of the admin endpoint that go on, such as that of a status page.",
                "short",
            )
            .query("sum by (instance) (forebay_admin_streams)", "{{instance}}")
            .at_least(1.0),
        ],
    )
}
