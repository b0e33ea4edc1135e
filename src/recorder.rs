//! Recordings: the next matching exchanges with all of their phases, for clients of the admin endpoint.
//!
//! `admin/trace.rs` starts a recording. `proxy/finish.rs` reports every exchange that kept a [`Journal`]; exchanges
//! keep one only while a recording is active. Limits: exchanges per recording, time, and as many recordings at once
//! as the admin endpoint has streams. Records go only to the client that asked for them.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::finished::Finished;
use crate::phase::journal::steps::Step;
use crate::phase::journal::{Journal, Span, Want};

/// Limit on exchanges per recording.
pub const COUNT_MAX: u32 = 1_000;

/// Selects the exchanges to record; all given conditions must hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Wanted {
    /// The route's name.
    pub route: Option<String>,
    /// The client's network.
    pub client: Option<IpNet>,
    /// The prefix of the path.
    pub path: Option<String>,
    /// The range of statuses, inclusive.
    pub status: Option<(u16, u16)>,
    /// The minimum duration.
    pub slower_than: Option<Duration>,
}

/// An exchange with all of its phases.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct Recorded {
    /// Start time (RFC 3339).
    pub time: String,
    /// Start time on a clock that all exchanges of a process share.
    pub began_seconds: f64,
    /// Duration.
    pub total_seconds: f64,
    /// Time spent by Forebay itself.
    pub own_seconds: f64,
    /// The listener.
    pub listener: String,
    /// The client's address; `None` over a unix socket.
    pub client: Option<IpAddr>,
    /// The method.
    pub method: String,
    /// The path, without the query.
    pub path: String,
    /// The protocol.
    pub protocol: String,
    /// The status sent to the client; 0 if none was sent.
    pub status: u16,
    /// Why Forebay refused or cut it, if it did.
    pub reason: Option<String>,
    /// The route; `_none` if none matched.
    pub route: String,
    /// The upstream.
    pub upstream: Option<String>,
    /// The endpoint of the last attempt.
    pub endpoint: Option<String>,
    /// Number of attempts.
    pub attempts: u32,
    /// Body bytes received from the client.
    pub received: u64,
    /// Body bytes sent to the client.
    pub sent: u64,
    /// The trace id, if it belongs to a trace.
    pub trace: Option<String>,
    /// The phases in chronological order.
    pub phases: Vec<RecordedPhase>,
    /// Number of phases that exceeded the limit; they are part of the last one recorded.
    pub left_out: u32,
    /// Number of filter steps that exceeded the limit.
    pub steps_left_out: u32,
}

/// A phase of the exchange.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct RecordedPhase {
    /// Its name.
    pub phase: String,
    /// Start, relative to the start of the exchange.
    pub start_seconds: f64,
    /// Duration.
    pub seconds: f64,
    /// Time spent by Forebay itself.
    pub own_seconds: f64,
    /// The worker on which it started.
    pub worker: Option<usize>,
    /// The cycle of that worker's event loop: how often it had waited in the kernel before.
    pub cycle: Option<u64>,
    /// The cycle in which it ended.
    pub end_cycle: Option<u64>,
    /// Number of events that the kernel had reported to that worker since its start.
    pub events: Option<u64>,
    /// Request body bytes received by then.
    pub received: u64,
    /// Response body bytes received from the endpoint by then.
    pub answered: u64,
    /// Response body bytes sent to the client by then.
    pub sent: u64,
    /// The filter steps that started in this phase.
    pub steps: Vec<RecordedStep>,
}

/// A filter's work in a phase.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct RecordedStep {
    /// The filter.
    pub filter: String,
    /// The stage; `call`: it sent a request; `when`: its condition was false.
    pub stage: String,
    /// The upstream of the request that it sent.
    pub upstream: Option<String>,
    /// Start, relative to the start of the exchange.
    pub start_seconds: f64,
    /// Duration; for a body, the sum of all chunks.
    pub seconds: f64,
    /// Number of body chunks; otherwise 1.
    pub times: u32,
    /// The outcome: `continue`, `answer 302`, or a reason; for a request, its status or why it has no response.
    pub outcome: String,
}

impl RecordedStep {
    fn of(step: &Step, began: Instant) -> Self {
        RecordedStep {
            filter: step.filter.to_owned(),
            stage: step.stage.to_owned(),
            upstream: step.upstream.as_deref().map(str::to_owned),
            start_seconds: step.begin.saturating_duration_since(began).as_secs_f64(),
            seconds: step.took.as_secs_f64(),
            times: step.times,
            outcome: step.outcome.clone().into_owned(),
        }
    }
}

impl RecordedPhase {
    fn of(span: Span, began: Instant) -> Self {
        let (begin, end) = (span.begin, span.end);
        let cycle = begin.tick.cycle;
        RecordedPhase {
            phase: span.phase.name().to_owned(),
            start_seconds: begin.tick.at.saturating_duration_since(began).as_secs_f64(),
            seconds: span.lasted().as_secs_f64(),
            own_seconds: end.own.saturating_sub(begin.own).as_secs_f64(),
            worker: cycle.map(|cycle| cycle.worker),
            cycle: cycle.map(|cycle| cycle.number),
            end_cycle: end.tick.cycle.map(|cycle| cycle.number),
            events: cycle.and_then(|cycle| cycle.events),
            received: begin.passed.received,
            answered: begin.passed.answered,
            sent: begin.passed.sent,
            steps: Vec::new(),
        }
    }
}

/// All active recordings of a gateway. Clones share them.
#[derive(Clone)]
pub struct Recorder(Arc<Inner>);

struct Inner {
    epoch: Instant,
    running: ArcSwap<Vec<Arc<Running>>>,
    /// Held while a recording begins or ends; workers do not take it.
    changing: Mutex<()>,
}

struct Running {
    wanted: Wanted,
    left: AtomicU32,
    send: Sender<Arc<Recorded>>,
}

/// An active recording. It ends on drop, or when its count is reached.
pub struct Recording {
    recorder: Recorder,
    running: Arc<Running>,
    receive: Receiver<Arc<Recorded>>,
    left: u32,
    _want: Want,
}

impl Default for Recorder {
    fn default() -> Self {
        Recorder(Arc::new(Inner { epoch: Instant::now(), running: ArcSwap::default(), changing: Mutex::new(()) }))
    }
}

impl Recorder {
    /// Starts to record the next `count` matching exchanges.
    pub fn record(&self, wanted: Wanted, count: u32) -> Recording {
        let count = count.clamp(1, COUNT_MAX);
        let (send, receive) = channel(count as usize);
        let running = Arc::new(Running { wanted, left: AtomicU32::new(count), send });
        self.change(|all| all.push(running.clone()));
        Recording { recorder: self.clone(), running, receive, left: count, _want: Want::new() }
    }

    /// Whether any recording is active.
    pub fn is_recording(&self) -> bool {
        !self.0.running.load().is_empty()
    }

    /// Adds an exchange that has ended to all matching recordings.
    pub fn ended(&self, finished: &Finished<'_>, journal: &Journal) {
        let mut recorded = None;
        for running in self.0.running.load().iter() {
            let total = finished.at.saturating_duration_since(journal.began().at);
            if running.wanted.takes(finished, total) && running.takes_one() {
                let recorded = recorded.get_or_insert_with(|| Arc::new(self.recorded(finished, journal, total)));
                // The channel has room for all records; an error means that the recording has ended.
                let _ = running.send.try_send(recorded.clone());
            }
        }
    }

    fn recorded(&self, finished: &Finished<'_>, journal: &Journal, total: Duration) -> Recorded {
        let began = journal.began().at;
        let (steps, steps_left_out) = journal.steps();
        let text = |text: Option<&str>| text.map(str::to_owned);
        let time = finished.time.checked_sub(total).unwrap_or(SystemTime::UNIX_EPOCH);
        let Finished { client, request, routing, summary, .. } = finished;
        Recorded {
            time: humantime::format_rfc3339_micros(time).to_string(),
            began_seconds: began.saturating_duration_since(self.0.epoch).as_secs_f64(),
            total_seconds: total.as_secs_f64(),
            own_seconds: summary.own.as_secs_f64(),
            listener: client.listener.to_owned(),
            client: client.address,
            method: request.method.to_owned(),
            path: String::from_utf8_lossy(finished.path()).into_owned(),
            protocol: request.protocol.to_owned(),
            status: summary.status,
            reason: text(finished.reason()),
            route: routing.route.to_owned(),
            upstream: text(routing.upstream),
            endpoint: text(routing.endpoint),
            attempts: routing.attempts,
            received: summary.received,
            sent: summary.sent,
            trace: finished.trace.map(|trace| trace.to_string()),
            phases: phases(journal, steps, began),
            left_out: journal.left_out(),
            steps_left_out,
        }
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Arc<Running>>)) {
        let _changing = self.0.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = self.0.running.load().to_vec();
        change(&mut all);
        self.0.running.store(Arc::new(all));
    }
}

/// The phases, each with the filter steps that started in it.
fn phases(journal: &Journal, steps: &[Step], began: Instant) -> Vec<RecordedPhase> {
    let mut phases: Vec<RecordedPhase> = journal.spans().map(|span| RecordedPhase::of(span, began)).collect();
    for step in steps {
        let place = journal.spans().take_while(|span| span.begin.tick.at <= step.begin).count();
        if let Some(phase) = phases.get_mut(place.saturating_sub(1)) {
            phase.steps.push(RecordedStep::of(step, began));
        }
    }
    for phase in &mut phases {
        phase.steps.sort_by(|one, other| one.start_seconds.total_cmp(&other.start_seconds));
    }
    phases
}

impl Recording {
    /// The next exchange; `None` once the count is reached.
    pub async fn next(&mut self) -> Option<Arc<Recorded>> {
        self.left = self.left.checked_sub(1)?;
        self.receive.recv().await
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.recorder.change(|all| all.retain(|other| !Arc::ptr_eq(other, &self.running)));
    }
}

impl Running {
    fn takes_one(&self) -> bool {
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }
}

impl Wanted {
    fn takes(&self, finished: &Finished<'_>, total: Duration) -> bool {
        self.route.as_deref().is_none_or(|route| route == finished.routing.route)
            && self.client.is_none_or(|net| finished.client.address.is_some_and(|client| net.contains(&client)))
            && self.path.as_deref().is_none_or(|path| finished.path().starts_with(path.as_bytes()))
            && self.status.is_none_or(|(from, to)| (from..=to).contains(&finished.summary.status))
            && self.slower_than.is_none_or(|least| total >= least)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finished::{Client, Request, Routing};
    use crate::metrics::Summary;
    use crate::phase::journal::{Note, Tick};
    use crate::phase::{Clock, Phase};

    fn ended<'e>(clock: &'e Clock, at: Instant, route: &'e str, status: u16) -> Finished<'e> {
        let client = Client { listener: "web", address: Some([192, 0, 2, 7].into()), ..Client::default() };
        Finished {
            request: Request { method: "GET", target: b"/a/b?c", protocol: "HTTP/1.1", ..Request::default() },
            routing: Routing { route, ..Routing::default() },
            ..Finished::new(at, client, Summary { status, ..Summary::new(clock) })
        }
    }

    fn journal(begin: Instant) -> Journal {
        let note = |ms| Note::early(Tick { at: begin + Duration::from_millis(ms), cycle: None });
        let mut journal = Journal::begin(Phase::Header, note(0));
        journal.enter(Phase::Route, note(2));
        journal.end(note(10));
        journal
    }

    #[tokio::test]
    async fn a_recording_has_the_next_so_many_that_are_wanted_and_no_more() {
        let recorder = Recorder::default();
        let begin = Instant::now();
        let clock = Clock::start(Phase::Header, begin);
        let end = begin + Duration::from_millis(10);
        let tell = |route| recorder.ended(&ended(&clock, end, route, 200), &journal(begin));
        tell("shop");
        let mut recording = recorder.record(Wanted { route: Some("shop".to_owned()), ..Wanted::default() }, 2);
        ["other", "shop", "shop", "shop"].into_iter().for_each(tell);
        let first = recording.next().await.expect("one");
        assert_eq!((&*first.route, first.total_seconds, &*first.path), ("shop", 0.01, "/a/b"));
        let phases: Vec<_> =
            first.phases.iter().map(|phase| (&*phase.phase, phase.start_seconds, phase.seconds)).collect();
        assert_eq!(phases, [("header", 0.0, 0.002), ("route", 0.002, 0.008)]);
        assert!(recording.next().await.is_some() && recording.next().await.is_none());
        assert_eq!(recorder.0.running.load().len(), 1);
        drop(recording);
        assert!(recorder.0.running.load().is_empty());
    }

    #[test]
    fn what_is_wanted_must_hold_altogether() {
        let now = Instant::now();
        let clock = Clock::start(Phase::Header, now);
        let takes = |wanted: Wanted| wanted.takes(&ended(&clock, now, "shop", 503), Duration::from_millis(10));
        assert!(takes(Wanted::default()));
        let all = Wanted {
            route: Some("shop".to_owned()),
            client: Some("192.0.2.0/24".parse().unwrap()),
            path: Some("/a".to_owned()),
            status: Some((500, 599)),
            slower_than: Some(Duration::from_millis(10)),
        };
        assert!(takes(all.clone()));
        for wrong in [
            Wanted { route: Some("shops".to_owned()), ..all.clone() },
            Wanted { client: Some("192.0.3.0/24".parse().unwrap()), ..all.clone() },
            Wanted { path: Some("/b".to_owned()), ..all.clone() },
            Wanted { status: Some((200, 299)), ..all.clone() },
            Wanted { slower_than: Some(Duration::from_millis(11)), ..all },
        ] {
            assert!(!takes(wrong.clone()), "{wrong:?}");
        }
    }
}
