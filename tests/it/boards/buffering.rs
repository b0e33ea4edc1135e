//! Buffering and slow clients: the time that buffering saves backends, for which clients, and its cost.

use super::board::{Board, Panel};
use super::colour::{BAD, WARN};
use super::phrases;

pub fn board() -> Board {
    Board::new(
        "buffering",
        "Slow clients and what is held for them: how many backends that spares, in how much memory and disk, and who \
            is cut.",
    )
    .strip([
        Panel::stat(
            "Backends spared",
            "Connections to backends that would be busy on average without buffering: time from their release to the \
                end of the client's exchange, per second.",
            "short",
            "sum(rate(forebay_upstream_saved_seconds_total[R]))",
        ),
        Panel::stat(
            "Slow to send",
            "Clients that are waited for now to send their request body.",
            "short",
            "sum(forebay_slow_clients{direction=\"request\"})",
        ),
        Panel::stat(
            "Slow to take",
            "Clients that are waited for now to take their response.",
            "short",
            "sum(forebay_slow_clients{direction=\"response\"})",
        ),
        Panel::stat(
            "Memory used",
            "Of `resources.memory`. From three quarters on, bodies go to disk; when it is used up, nobody reads more.",
            "percentunit",
            "sum(forebay_spool_bytes{store=\"memory\"}) / sum(forebay_spool_limit_bytes{store=\"memory\"})",
        )
        .thresholds(&[(0.75, WARN), (0.9375, BAD)]),
        Panel::stat(
            "Disk used",
            "Of `resources.disk`. When it is used up, uploads are refused or streamed and backends wait for slow \
                readers.",
            "percentunit",
            "sum(forebay_spool_bytes{store=\"disk\"}) / sum(forebay_spool_limit_bytes{store=\"disk\"})",
        )
        .thresholds(&[(0.8, WARN), (0.95, BAD)]),
        Panel::stat(
            "Spills",
            "Bodies of which a part went to disk, per second.",
            "ops",
            "sum(rate(forebay_spool_spills_total[R]))",
        ),
        Panel::stat(
            "Paused",
            "Spools that wait now for memory that others let go.",
            "short",
            "sum(forebay_pressure{action=\"pause\"})",
        )
        .thresholds(&[(1.0, BAD)]),
        Panel::stat("Disk queue", "Writes and reads of spools that are queued or under \
            way.", "short", "sum(forebay_disk_queue)")
            .thresholds(&[(100.0, WARN), (1000.0, BAD)]),
    ])
    .row(
        9,
        [
            Panel::stack(
                "Backends busy and spared",
                "Connections to backends that are busy on average, and those that would be besides if each stayed with \
                    its client to the end.",
                "short",
            )
            .query("sum(rate(forebay_upstream_held_seconds_sum[R]))", "held")
            .query("sum(rate(forebay_upstream_saved_seconds_total[R]))", "spared"),
            Panel::lines("Slow clients", "Clients that are waited for now: to send their requests, or to take their \
                responses.", "short")
                .query("sum by (direction) (forebay_slow_clients)", "{{direction}}")
                .at_least(1.0),
        ],
    )
    .row(
        9,
        [
            Panel::stack("Held in memory", "Bytes of bodies in memory, by which way they go; the line is \
                `resources.memory`.", "bytes")
                .query("sum by (direction) (forebay_spool_bytes{store=\"memory\"})", "{{direction}}")
                .limit("sum(forebay_spool_limit_bytes{store=\"memory\"})"),
            Panel::stack("Held on disk", "Bytes that the files of bodies have grown to; the line is \
                `resources.disk`.", "bytes")
                .query("sum by (direction) (forebay_spool_bytes{store=\"disk\"})", "{{direction}}")
                .limit("sum(forebay_spool_limit_bytes{store=\"disk\"})"),
            Panel::stack(
                "Disk denied, by why",
                "Spools per second that got no more disk: that of all, of responses, of one client, of one response where \
                    others need room, or of files was used up. The backends of responses wait then; uploads are refused.",
                "ops",
            )
            .query("sum by (direction, limit) (rate(forebay_spool_denials_total[R]))", "{{direction}}, {{limit}}"),
            Panel::stack(
                "Spills, by why",
                "Bodies of which a part went to disk, per second: larger than their route lets them have in memory, or \
                    memory was short for all.",
                "ops",
            )
            .query("sum by (direction, reason) (rate(forebay_spool_spills_total[R]))", "{{direction}}, {{reason}}"),
        ],
    )
    .row(
        9,
        [
            Panel::lines("Waiting for clients", "Mean seconds per exchange in the phases in which a client is waited \
                for.", "s")
                .query("sum by (phase) (rate(forebay_phase_seconds_sum{phase=~\"header|buffer|write\"}[R])) / on () \
                    group_left () sum(rate(forebay_exchange_seconds_count[R]))", "{{phase}}"),
            Panel::lines(
                "Blocked while still receiving",
                "Time per second in which clients did not take what there was for them, by route. It is no phase of \
                    its own; 1 is one client all the time.",
                "short",
            )
            .query("topk(10, sum by (route) (rate(forebay_write_blocked_seconds_total[R])))", "{{route}}"),
            phrases::refusals(
                "Exchanges that Forebay ended because of a slow or gone client, or for want of room, per second, by \
                    reason.",
                "reason=~\"(header|buffer|write)\\\\..*|send\\\\.(body.*|min_rate|too_large|aborted)|route\\\\.pressure\"",
            ),
        ],
    )
    .row(
        9,
        [
            Panel::lines("Pressure, now", "What is done because memory runs short: 1 for spill and shed, for pause how \
                many wait.", "short")
                .query("sum by (action) (forebay_pressure)", "{{action}}")
                .at_least(1.0),
            Panel::stack("Pressure, how often", "Times per second that memory ran short and something was done.", "ops")
                .query("sum by (action) (rate(forebay_pressure_total[R]))", "{{action}}")
                .at_least(1.0),
            Panel::heat(
                "Disk, all of it",
                "How long writes and reads of spools took, from when they were queued.",
                "sum by (le) (rate(forebay_disk_seconds_bucket[R]))",
            ),
            Panel::lines("Disk, p99", "99 of 100 writes or reads of spools took less; the queue and failures are \
                beside it.", "s")
                .query(&phrases::quantile_by("operation", "0.99", "forebay_disk_seconds_bucket"), "{{operation}}"),
        ],
    )
    .row(
        9,
        [
            Panel::lines("Disk, queue", "Writes and reads of spools that are queued or under way.", "short")
                .query("sum by (instance) (forebay_disk_queue)", "{{instance}}")
                .at_least(1.0),
            Panel::lines("Disk, failures", "Writes and reads of spools that failed, per second.", "ops")
                .query("sum by (operation) (rate(forebay_disk_failures_total[R]))", "{{operation}}")
                .at_least(1.0),
            Panel::lines("Spooled", "Bytes per second that each worker took in for slow clients.", "Bps")
                .query("sum by (instance, worker) (rate(forebay_scheduler_bytes_total[R]))",
                    "{{instance}} #{{worker}}"),
            Panel::lines("Scheduler, share", "Of its time, what each worker may give to new connections, to bodies \
                that pass and to answers that are spooled, as the lag of its event loop allows.", "percentunit")
                .query("sum by (instance, worker, class) (forebay_scheduler_share_ratio)",
                    "{{instance}} #{{worker}} {{class}}")
                .max(1.0),
            Panel::lines("Scheduler, waiting", "Exchanges that wait for their turn, so that others need not: new \
                connections, bodies that pass, answers that are spooled.", "short")
                .query("sum by (instance, worker, class) (forebay_scheduler_waiting)",
                    "{{instance}} #{{worker}} {{class}}")
                .at_least(1.0),
            Panel::lines("Scheduler, overdue", "Turns per second that were given because they had been waited for for \
                `resources.turn`: the worker, or the disk, has too much to do.", "ops")
                .query("sum by (instance, worker, class) (rate(forebay_scheduler_overdue_total[R]))",
                    "{{instance}} #{{worker}} {{class}}")
                .at_least(1.0),
        ],
    )
}
