//! Recordings: the next exchanges that match, each with all of its phases, for one who asks the admin endpoint.
//!
//! `admin/trace.rs` begins a recording; `proxy/finish.rs` tells of every exchange that kept a [`Journal`], which
//! exchanges do only while a recording runs. A recording is bounded: in its exchanges, in its time, and at most as
//! many recordings at once as the admin endpoint has streams. What is recorded is handed to the one who asked, and kept
//! nowhere.

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

/// The most exchanges of one recording.
pub const COUNT_MAX: u32 = 1_000;

/// Which exchanges are recorded: those of which everything holds that is said here.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Wanted {
    /// The name of their route.
    pub route: Option<String>,
    /// Where their client is.
    pub client: Option<IpNet>,
    /// What their path begins with.
    pub path: Option<String>,
    /// Their status: from one to another, both included.
    pub status: Option<(u16, u16)>,
    /// How long they took at least.
    pub slower_than: Option<Duration>,
}

/// An exchange, with all of its phases.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct Recorded {
    /// When it began (RFC 3339).
    pub time: String,
    /// When it began, on a clock that all exchanges of one process have in common.
    pub began_seconds: f64,
    /// How long it took.
    pub total_seconds: f64,
    /// What Forebay itself spent on it.
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
    /// The status that the client got; 0 if it got none.
    pub status: u16,
    /// Why Forebay refused or cut it, if it did.
    pub reason: Option<String>,
    /// The route; `_none` if it took none.
    pub route: String,
    /// The upstream.
    pub upstream: Option<String>,
    /// The endpoint of the last attempt.
    pub endpoint: Option<String>,
    /// How often an endpoint was chosen.
    pub attempts: u32,
    /// Bytes of the body that came from the client.
    pub received: u64,
    /// Bytes of the body that went to it.
    pub sent: u64,
    /// The id of the trace that it belongs to, where there is one.
    pub trace: Option<String>,
    /// The phases in the order in which they were.
    pub phases: Vec<RecordedPhase>,
    /// Phases for which there was no place: the last that is there stands for them, too.
    pub left_out: u32,
    /// Steps of filters for which there was no place.
    pub steps_left_out: u32,
}

/// A phase, as it was entered.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct RecordedPhase {
    /// Its name.
    pub phase: String,
    /// From the beginning of the exchange.
    pub start_seconds: f64,
    /// For how long it lasted.
    pub seconds: f64,
    /// What of that Forebay itself spent.
    pub own_seconds: f64,
    /// The worker that it began on.
    pub worker: Option<usize>,
    /// The cycle of that worker's loop: how often it had waited in the kernel before.
    pub cycle: Option<u64>,
    /// The cycle in which it ended.
    pub end_cycle: Option<u64>,
    /// Events that the kernel had had for that worker by then, since it was started.
    pub events: Option<u64>,
    /// Bytes of the request's body that had come by then.
    pub received: u64,
    /// Bytes of the answer's body that had come from the endpoint by then.
    pub answered: u64,
    /// Bytes of it that the client had taken by then.
    pub sent: u64,
    /// What filters did that began in it.
    pub steps: Vec<RecordedStep>,
}

/// What a filter did in a phase.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct RecordedStep {
    /// The filter.
    pub filter: String,
    /// At which stage; `call`: it has sent a request; `when`: its condition did not hold.
    pub stage: String,
    /// The upstream that a request was sent to.
    pub upstream: Option<String>,
    /// From the beginning of the exchange.
    pub start_seconds: f64,
    /// How long it took; all pieces of a body together.
    pub seconds: f64,
    /// How many pieces there were; else 1.
    pub times: u32,
    /// What it came to: `continue`, `answer 302`, a reason; of a request, a status or why there is no answer.
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

/// All recordings of one gateway. Clones share them.
#[derive(Clone)]
pub struct Recorder(Arc<Inner>);

struct Inner {
    epoch: Instant,
    running: ArcSwap<Vec<Arc<Running>>>,
    /// Held while a recording begins or ends, which no worker does.
    changing: Mutex<()>,
}

struct Running {
    wanted: Wanted,
    left: AtomicU32,
    send: Sender<Arc<Recorded>>,
}

/// A recording that runs until this is dropped, or has as many as it was to have.
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
    /// Begins to record the next `count` exchanges that are wanted.
    pub fn record(&self, wanted: Wanted, count: u32) -> Recording {
        let count = count.clamp(1, COUNT_MAX);
        let (send, receive) = channel(count as usize);
        let running = Arc::new(Running { wanted, left: AtomicU32::new(count), send });
        self.change(|all| all.push(running.clone()));
        Recording { recorder: self.clone(), running, receive, left: count, _want: Want::new() }
    }

    /// Whether anybody records anything.
    pub fn is_recording(&self) -> bool {
        !self.0.running.load().is_empty()
    }

    /// Tells of an exchange that is over.
    pub fn ended(&self, finished: &Finished<'_>, journal: &Journal) {
        let mut recorded = None;
        for running in self.0.running.load().iter() {
            let total = finished.at.saturating_duration_since(journal.began().at);
            if running.wanted.takes(finished, total) && running.takes_one() {
                let recorded = recorded.get_or_insert_with(|| Arc::new(self.recorded(finished, journal, total)));
                // There is a place for each; an error would mean that the recording has ended.
                let _ = running.send.try_send(recorded.clone());
            }
        }
    }

    fn recorded(&self, finished: &Finished<'_>, journal: &Journal, total: Duration) -> Recorded {
        let began = journal.began().at;
        let (steps, steps_left_out) = journal.steps();
        let text = |text: Option<&str>| text.map(str::to_owned);
        let time = finished.time.checked_sub(total).unwrap_or(SystemTime::UNIX_EPOCH);
        let Finished { client, request, way, summary, .. } = finished;
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
            route: way.route.to_owned(),
            upstream: text(way.upstream),
            endpoint: text(way.endpoint),
            attempts: way.attempts,
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

/// The phases, each with the steps that began in it, in their order.
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
    /// The next one; `None` once there were as many as there were to be.
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
        self.route.as_deref().is_none_or(|route| route == finished.way.route)
            && self.client.is_none_or(|net| finished.client.address.is_some_and(|client| net.contains(&client)))
            && self.path.as_deref().is_none_or(|path| finished.path().starts_with(path.as_bytes()))
            && self.status.is_none_or(|(from, to)| (from..=to).contains(&finished.summary.status))
            && self.slower_than.is_none_or(|least| total >= least)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finished::{Client, Request, Way};
    use crate::metrics::Summary;
    use crate::phase::journal::{Note, Tick};
    use crate::phase::{Clock, Phase};

    fn ended<'e>(clock: &'e Clock, at: Instant, route: &'e str, status: u16) -> Finished<'e> {
        let client = Client { listener: "web", address: Some([192, 0, 2, 7].into()), ..Client::default() };
        Finished {
            request: Request { method: "GET", target: b"/a/b?c", protocol: "HTTP/1.1", ..Request::default() },
            way: Way { route, ..Way::default() },
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
