//! Event loop: the work of each worker, its lag, and the causes of stalls.

use super::board::{Board, Panel};
use super::colour::{BAD, WARN};
use super::phrases;

pub fn board() -> Board {
    Board::new(
        "event-loop",
        "What every worker does: asleep in the kernel or busy, how much a wake-up brings, how late the loop is, and \
            who stalls it.",
    )
    .strip([
        Panel::stat("Workers", "Worker threads that serve clients.", "short", "sum(forebay_workers)"),
        Panel::stat(
            "Busiest worker",
            "Of its time, what the busiest worker does not sleep in the kernel.",
            "percentunit",
            "max(sum by (instance, worker) (rate(forebay_loop_busy_seconds_total[R])))",
        )
        .thresholds(&[(0.7, WARN), (0.9, BAD)]),
        Panel::stat(
            "Lag, p99",
            "How late a task that was ready ran, in 99 of 100 cases at most.",
            "s",
            "histogram_quantile(0.99, sum by (le) (rate(forebay_loop_lag_seconds_bucket[R])))",
        )
        .thresholds(&[(0.01, WARN), (0.1, BAD)]),
        Panel::stat("Stalled now", "Workers whose loop is held up right now.", "short", "sum(forebay_stalled_workers)")
            .thresholds(&[(1.0, BAD)]),
        Panel::stat(
            "Stalls",
            "Times per minute that a worker was held up for longer than `observability.event_loop.stall_threshold`.",
            "opm",
            "60 * sum(rate(forebay_stalls_total[R]))",
        )
        .thresholds(&[(0.1, WARN), (1.0, BAD)]),
        Panel::stat(
            "Poll, p99",
            "99 of 100 pieces of work between two awaits took less. What takes long holds up everyone else of its \
                worker.",
            "s",
            "histogram_quantile(0.99, sum by (le) (rate(forebay_loop_poll_seconds_bucket[R])))",
        )
        .thresholds(&[(0.005, WARN), (0.05, BAD)]),
        Panel::stat("Tasks", "Tasks alive on all workers.", "short", "sum(forebay_loop_tasks)"),
        Panel::stat(
            "Descriptors",
            "Sockets and the like that the workers wait \
            for.",
            "short",
            "sum(forebay_loop_descriptors)",
        ),
    ])
    .row(
        9,
        [
            Panel::lines(
                "Busy",
                "Of its time, what each worker does not sleep in the kernel. One at 100 % among idle ones has the \
                    wrong connections or a costly filter.",
                "percentunit",
            )
            .query(
                "sum by (instance, worker) (rate(forebay_loop_busy_seconds_total[R])) / (sum by (instance, worker) \
                (rate(forebay_loop_busy_seconds_total[R])) + sum by (instance, worker) \
                (rate(forebay_loop_wait_seconds_total[R])))",
                "{{instance}} #{{worker}}",
            )
            .max(1.0),
            Panel::heat(
                "Lag, all of it",
                "How late a task that was ready ran, measured by a heartbeat of each worker.",
                "sum by (le) (rate(forebay_loop_lag_seconds_bucket[R]))",
            ),
            Panel::heat(
                "Lag, own work",
                "The CPU time that a worker used while that task waited; the rest of the lag is the wait for a core.",
                "sum by (le) (rate(forebay_loop_lag_busy_seconds_bucket[R]))",
            ),
            Panel::heat(
                "Polls, all of them",
                "How long the pieces of work between two awaits take.",
                "sum by (le) (rate(forebay_loop_poll_seconds_bucket[R]))",
            ),
        ],
    )
    .row(
        9,
        [
            Panel::lines("Wake-ups", "Times per second that the kernel woke a worker with events.", "ops")
                .query("sum by (instance, worker) (rate(forebay_loop_wakeups_total[R]))", "{{instance}} #{{worker}}"),
            Panel::lines(
                "Events per wake-up",
                "How much the kernel had ready when a worker woke. It grows with load: the loop gets more done per \
                    system call.",
                "short",
            )
            .query(
                "sum by (instance, worker) (rate(forebay_loop_ready_events_total[R])) / sum by (instance, worker) \
                (rate(forebay_loop_wakeups_total[R]))",
                "{{instance}} #{{worker}}",
            ),
            Panel::lines("Polls", "Pieces of work per second.", "ops")
                .query("sum by (instance, worker) (rate(forebay_loop_polls_total[R]))", "{{instance}} #{{worker}}"),
            Panel::lines("Run queue", "Tasks that are ready and wait for their worker.", "short")
                .query("sum by (instance, worker) (forebay_loop_run_queue)", "{{instance}} #{{worker}}")
                .at_least(1.0),
        ],
    )
    .row(
        9,
        [
            Panel::stack(
                "Stalls, by where",
                "Times per second that a worker was held up, by what was running \
                then.",
                "ops",
            )
            .query("sum by (where) (rate(forebay_stalls_total[R]))", "{{where}}")
            .at_least(1.0),
            Panel::lines(
                "Filters, p99",
                "How long one poll of a filter takes. A filter that waits is not in it; one \
                that computes or blocks is.",
                "s",
            )
            .query(&phrases::quantile_by("filter", "0.99", "forebay_filter_poll_seconds_bucket"), "{{filter}}"),
            Panel::lines("Tasks", "Tasks alive, by worker.", "short")
                .query("sum by (instance, worker) (forebay_loop_tasks)", "{{instance}} #{{worker}}"),
            Panel::lines("Descriptors", "What each worker waits for.", "short")
                .query("sum by (instance, worker) (forebay_loop_descriptors)", "{{instance}} #{{worker}}"),
        ],
    )
    .row(
        9,
        [
            Panel::stack(
                "Exchanges by phase",
                "Exchanges that are in a phase now: blue the client is waited for, \
                purple the backend, green Forebay works.",
                "short",
            )
            .query("sum by (phase) (forebay_phase_active)", "{{phase}}")
            .in_order_of_phases()
            .wide(2),
            Panel::bars(
                "Longest in its phase",
                "For how long the exchange that is longest in a phase has been in it. \
                A stuck backend or a trickling client is one glance.",
                "s",
            )
            .query("max by (phase) (forebay_phase_oldest_seconds)", "{{phase}}"),
            Panel::lines("Own time", "What Forebay itself costs an exchange: the summed polls of its future.", "s")
                .percentiles("forebay_own_seconds_bucket"),
        ],
    )
}
