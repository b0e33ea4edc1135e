//! The content of `forebay top`: a table per topic, independent of the terminal.

use std::cmp::Ordering;

use super::super::figures::{bytes, number, or_dash, share, time};
use super::history::History;
use crate::admin::status::{Document, EndpointStatus, RouteStatus, UpstreamStatus, WorkerStatus};
use crate::printable::printable;

/// The topics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Topic {
    /// Workers and phases.
    Loop,
    /// Routes.
    Routes,
    /// Upstreams and endpoints.
    Upstreams,
    /// The slow clients.
    Slow,
}

impl Topic {
    /// All topics, in the order of their keys.
    pub const ALL: [Topic; 4] = [Topic::Loop, Topic::Routes, Topic::Upstreams, Topic::Slow];

    /// The title on the tab.
    pub fn title(self) -> &'static str {
        match self {
            Topic::Loop => "Loop",
            Topic::Routes => "Routes",
            Topic::Upstreams => "Upstreams",
            Topic::Slow => "Slow clients",
        }
    }
}

/// The meaning of a colour; see dashboards/README.md.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tone {
    /// Neutral.
    #[default]
    Plain,
    /// Less important.
    Faint,
    /// Client side.
    Client,
    /// Backend side.
    Backend,
    /// Forebay itself, or good state.
    Own,
    /// Needs attention.
    Warn,
    /// Broken.
    Bad,
}

/// A column.
#[derive(Clone, Copy, Debug)]
pub struct Column {
    pub title: &'static str,
    pub width: u16,
    /// Text is aligned left, numbers right.
    pub text: bool,
    /// If space is short, columns with the highest rank are dropped first; 0 is never dropped.
    pub rank: u8,
}

/// The content of a cell and its sort key.
#[derive(Clone, Debug)]
pub struct Cell {
    pub shown: String,
    pub tone: Tone,
    key: Key,
}

#[derive(Clone, Debug)]
enum Key {
    Text,
    Number(f64),
}

impl Cell {
    /// Text that a client may have chosen; it is escaped.
    fn text(shown: impl Into<String>) -> Self {
        Cell { shown: printable(&shown.into()).into_owned(), tone: Tone::Plain, key: Key::Text }
    }

    fn figure(figure: Option<f64>, shown: impl Fn(f64) -> String) -> Self {
        Cell { shown: or_dash(figure, shown), tone: Tone::Plain, key: Key::Number(figure.unwrap_or(f64::NEG_INFINITY)) }
    }

    fn tone(self, tone: Tone) -> Self {
        Cell { tone, ..self }
    }

    fn warns(self, above: f64) -> Self {
        let high = matches!(self.key, Key::Number(figure) if figure > above);
        if high { self.tone(Tone::Warn) } else { self }
    }

    /// Numbers in descending order, text in ascending order.
    fn order(&self, other: &Cell) -> Ordering {
        match (&self.key, &other.key) {
            (Key::Number(a), Key::Number(b)) => b.total_cmp(a),
            _ => self.shown.cmp(&other.shown),
        }
    }
}

/// A table.
pub struct Sheet {
    pub columns: &'static [Column],
    pub rows: Vec<Vec<Cell>>,
    /// The text shown if there are no rows.
    pub empty: &'static str,
}

impl Sheet {
    /// Sorts by a column; equal rows keep their order.
    pub fn sort(&mut self, column: usize, reversed: bool) {
        self.rows.sort_by(|a, b| {
            let order = a[column].order(&b[column]);
            if reversed { order.reverse() } else { order }
        });
    }

    /// The columns that fit, by index.
    pub fn fitting(&self, width: u16) -> Vec<usize> {
        let mut shown: Vec<usize> = (0..self.columns.len()).collect();
        let needs = |shown: &[usize]| shown.iter().map(|&place| self.columns[place].width + 1).sum::<u16>();
        while needs(&shown) > width + 1 {
            let Some(last) = (0..shown.len()).rev().max_by_key(|&at| self.columns[shown[at]].rank) else { break };
            if self.columns[shown[last]].rank == 0 {
                break;
            }
            shown.remove(last);
        }
        shown
    }
}

const fn text(title: &'static str, width: u16, rank: u8) -> Column {
    Column { title, width, text: true, rank }
}

const fn figure(title: &'static str, width: u16, rank: u8) -> Column {
    Column { title, width, text: false, rank }
}

/// The table of a topic.
pub fn of(topic: Topic, history: &History) -> Sheet {
    let (columns, empty): (&'static [Column], _) = match topic {
        Topic::Loop => (WORKERS, "No worker was found."),
        Topic::Routes => (ROUTES, "There are no routes."),
        Topic::Upstreams => (ENDPOINTS, "There are no upstreams."),
        Topic::Slow => (SLOW, "There are no slow clients."),
    };
    let rows = history.last().map(|last| match topic {
        Topic::Loop => last.workers.iter().map(|one| worker(one, last, history)).collect(),
        Topic::Routes => last.routes.iter().map(|one| route(one, last, history)).collect(),
        Topic::Upstreams => endpoints(last, history),
        Topic::Slow => slow(last),
    });
    Sheet { columns, rows: rows.unwrap_or_default(), empty }
}

const WORKERS: &[Column] = &[
    text("worker", 6, 0),
    figure("busy", 6, 0),
    figure("lag p99", 8, 1),
    figure("wakes/s", 8, 2),
    figure("events/w", 8, 6),
    figure("polls/s", 8, 5),
    figure("tasks", 6, 4),
    figure("queue", 6, 7),
    figure("sockets", 7, 8),
    text("doing", 26, 3),
];

fn worker(worker: &WorkerStatus, last: &Document, history: &History) -> Vec<Cell> {
    let mine = |document: &Document, figure: &dyn Fn(&WorkerStatus) -> Option<f64>| {
        document.workers.iter().find(|other| other.worker == worker.worker).and_then(figure)
    };
    let rate = |figure: fn(&WorkerStatus) -> Option<f64>| history.rate(|document| mine(document, &figure));
    let (busy, wait) = (rate(|worker| worker.busy_seconds), rate(|worker| worker.wait_seconds));
    let busy = busy.zip(wait).map(|(busy, wait)| busy / (busy + wait));
    let wakeups = rate(|worker| Some(worker.wakeups? as f64));
    let events =
        rate(|worker| Some(worker.ready_events? as f64)).zip(wakeups).map(|(events, wakeups)| events / wakeups);
    let lag = history.quantile(&last.bounds.lag_seconds, 0.99, |document| {
        let same = document.workers.iter().find(|other| other.worker == worker.worker)?;
        Some(same.lag.as_ref()?.buckets.clone())
    });
    let doing = worker.doing.as_ref().map(|doing| {
        let route = doing.route.as_ref().map(|route| format!(" of {route}")).unwrap_or_default();
        (format!("{}{route} for {}", doing.place, time(doing.seconds)), doing.seconds)
    });
    let (doing, long) = doing.unwrap_or_default();
    vec![
        Cell::text(&*worker.worker),
        Cell::figure(busy, share).warns(0.9),
        Cell::figure(lag, time).warns(0.05),
        Cell::figure(wakeups, number),
        Cell::figure(events, number),
        Cell::figure(rate(|worker| Some(worker.polls? as f64)), number),
        Cell::figure(worker.tasks.map(|tasks| tasks as f64), number),
        Cell::figure(worker.run_queue.map(|queue| queue as f64), number),
        Cell::figure(worker.descriptors.map(|sockets| sockets as f64), number),
        Cell::text(doing).tone(if long > 0.1 { Tone::Bad } else { Tone::Faint }),
    ]
}

const ROUTES: &[Column] = &[
    text("route", 18, 0),
    figure("req/s", 7, 0),
    figure("p50", 7, 3),
    figure("p99", 7, 1),
    figure("2xx", 5, 5),
    figure("3xx", 5, 7),
    figure("4xx", 5, 4),
    figure("5xx", 5, 2),
    figure("in/s", 9, 8),
    figure("out/s", 9, 6),
    figure("since start", 11, 9),
    text("leads to", 20, 10),
];

fn route(route: &RouteStatus, last: &Document, history: &History) -> Vec<Cell> {
    let mine = |document: &Document| document.routes.iter().find(|other| other.route == route.route).cloned();
    let rate = |figure: &dyn Fn(&RouteStatus) -> f64| history.rate(|document| Some(figure(&mine(document)?)));
    let requests = rate(&|route| route.exchanges as f64);
    let quantile =
        |of| history.quantile(&last.bounds.exchange_seconds, of, |document| Some(mine(document)?.seconds.buckets));
    let class = |class: &'static str, tone: Tone| {
        let lately = rate(&move |route| route.codes.get(class).copied().unwrap_or(0) as f64);
        let part = lately.zip(requests.filter(|&requests| requests > 0.0)).map(|(lately, requests)| lately / requests);
        let part = part.filter(|&part| part > 0.0);
        Cell::figure(part, share).tone(if part.is_some() { tone } else { Tone::Faint })
    };
    vec![
        Cell::text(&*route.route),
        Cell::figure(requests, number),
        Cell::figure(quantile(0.5), time),
        Cell::figure(quantile(0.99), time),
        class("2xx", Tone::Own),
        class("3xx", Tone::Client),
        class("4xx", Tone::Warn),
        class("5xx", Tone::Bad),
        Cell::figure(rate(&|route| route.received_bytes as f64), bytes),
        Cell::figure(rate(&|route| route.sent_bytes as f64), bytes),
        Cell::figure(Some(route.exchanges as f64), number),
        Cell::text(route.upstreams.join(", ")).tone(Tone::Faint),
    ]
}

const ENDPOINTS: &[Column] = &[
    text("upstream", 14, 0),
    text("endpoint", 22, 0),
    text("state", 9, 0),
    figure("in flight", 9, 1),
    figure("latency", 8, 2),
    figure("chosen/s", 8, 3),
    figure("queued", 6, 4),
    figure("failed/s", 8, 4),
    figure("retries/s", 9, 5),
    figure("weight", 6, 6),
    figure("tier", 4, 7),
];

/// One row per endpoint; counters of the upstream as a whole are in its first row.
fn endpoints(last: &Document, history: &History) -> Vec<Vec<Cell>> {
    let mut rows = Vec::new();
    for upstream in &last.upstreams {
        let mine = |document: &Document, figure: fn(&UpstreamStatus) -> f64| {
            document.upstreams.iter().find(|other| other.upstream == upstream.upstream).map(figure)
        };
        let failed =
            history.rate(|document| mine(document, |one| one.connects.get("failed").copied().unwrap_or(0) as f64));
        let retries = history.rate(|document| mine(document, |one| one.retries as f64));
        for (place, endpoint) in upstream.endpoints.iter().enumerate() {
            let whole = |figure: Option<f64>| Cell::figure(figure.filter(|_| place == 0), number).warns(0.0);
            let whole = [whole(Some(upstream.queued as f64)), whole(failed), whole(retries)];
            rows.push(row_of(endpoint, upstream, history, whole));
        }
    }
    rows
}

fn row_of(endpoint: &EndpointStatus, upstream: &UpstreamStatus, history: &History, whole: [Cell; 3]) -> Vec<Cell> {
    let chosen = history.rate(|document| {
        let upstream = document.upstreams.iter().find(|other| other.upstream == upstream.upstream)?;
        let same = |other: &&EndpointStatus| other.endpoint == endpoint.endpoint && other.address == endpoint.address;
        Some(upstream.endpoints.iter().find(same)?.selections as f64)
    });
    let tone = match &*endpoint.state {
        "healthy" => Tone::Own,
        "ejected" => Tone::Warn,
        "unhealthy" => Tone::Bad,
        "draining" => Tone::Client,
        _ => Tone::Faint,
    };
    let [queued, failed, retries] = whole;
    vec![
        Cell::text(&*upstream.upstream).tone(match upstream.breaker.as_deref() {
            Some("open") => Tone::Bad,
            Some("half_open") => Tone::Warn,
            _ => Tone::Plain,
        }),
        Cell::text(&*endpoint.endpoint),
        Cell::text(&*endpoint.state).tone(tone),
        Cell::figure(Some(f64::from(endpoint.inflight)), number),
        Cell::figure(Some(endpoint.latency_seconds).filter(|&latency| latency > 0.0), time),
        Cell::figure(chosen, number),
        queued,
        failed,
        retries,
        Cell::figure(Some(f64::from(endpoint.weight)), number),
        Cell::figure(Some(f64::from(endpoint.priority)), number),
    ]
}

const SLOW: &[Column] = &[
    text("client", 16, 0),
    text("phase", 8, 0),
    figure("waited", 7, 0),
    figure("silent", 7, 3),
    figure("left", 9, 2),
    text("route", 14, 4),
    text("request", 30, 1),
];

fn slow(last: &Document) -> Vec<Vec<Cell>> {
    let rows = last.slow_clients.longest.iter().map(|slow| {
        vec![
            Cell::text(slow.client.map_or("unix socket".to_owned(), |client| client.to_string())),
            Cell::text(&*slow.phase).tone(Tone::Client),
            Cell::figure(Some(slow.waited_seconds), time),
            Cell::figure(Some(slow.silent_seconds), time),
            Cell::figure(slow.bytes.map(|left| left as f64), bytes),
            Cell::text(slow.route.as_deref().unwrap_or("–")),
            Cell::text(slow.target.as_deref().unwrap_or("its header")).tone(Tone::Faint),
        ]
    });
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sheet() -> Sheet {
        let row = |name: &str, figure: Option<f64>| vec![Cell::text(name), Cell::figure(figure, number)];
        const COLUMNS: &[Column] = &[text("name", 10, 0), figure("figure", 6, 1)];
        Sheet { columns: COLUMNS, rows: vec![row("b", Some(1.0)), row("a", None), row("c", Some(20.0))], empty: "" }
    }

    fn names(sheet: &Sheet) -> String {
        sheet.rows.iter().map(|row| &*row[0].shown).collect()
    }

    #[test]
    fn text_is_sorted_from_a_and_figures_from_the_largest() {
        let mut sheet = sheet();
        sheet.sort(0, false);
        assert_eq!(names(&sheet), "abc");
        sheet.sort(1, false);
        assert_eq!(names(&sheet), "cba", "what is not known comes last");
        sheet.sort(1, true);
        assert_eq!(names(&sheet), "abc");
    }

    #[test]
    fn columns_that_have_no_room_go_by_their_rank() {
        let sheet = sheet();
        assert_eq!(sheet.fitting(17), [0, 1]);
        assert_eq!(sheet.fitting(16), [0]);
        assert_eq!(sheet.fitting(3), [0], "what names a row stays");
        for topic in Topic::ALL {
            let sheet = of(topic, &History::default());
            assert!(sheet.fitting(200).len() == sheet.columns.len() && !sheet.fitting(40).is_empty(), "{topic:?}");
        }
    }
}
