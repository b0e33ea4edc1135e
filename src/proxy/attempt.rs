//! The attempts of an exchange: the present one with its endpoint, and what is known of those before.
//!
//! Whether there is to be another one, `retry` decides; what follows from that for the next one is kept here.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::StatusCode;

use super::retry::{Failure, Rules, Situation, Verdict};
use crate::client::session::Link;
use crate::finished::{Failed, Why};
use crate::metrics::retry::Objection;
use crate::net;
use crate::party::{Fault, Party};
use crate::phase::Phase;
use crate::upstream::retries::Permit;
use crate::upstream::transport::http1::Tail;
use crate::upstream::transport::http2::{RequestTrailers, StreamHandle};
use crate::upstream::{Ended, Endpoint, Engaged, Outcome, Upstream};

/// All attempts of one exchange.
#[derive(Default)]
pub struct Attempts {
    /// How often an endpoint was chosen.
    pub count: u32,
    /// The endpoints that were tried; the last is the present one.
    pub tried: Vec<Arc<Endpoint>>,
    /// The present attempt, for as long as its endpoint is busy with it.
    pub present: Option<Attempt>,
    /// The connection or the stream of the present attempt.
    pub channel: Channel,
    /// Those that came to nothing, for the log. Nothing is allocated where there are none.
    pub failed: Vec<Failed>,
    /// Why the last one failed, as long as there is no answer.
    pub failure: Option<Fault>,
    /// How many interim answers have come.
    pub interim: u32,
    /// What endpoints have spent on them.
    pub busy: Busy,
    next: Next,
    /// There was the one attempt that counts as none, for a connection that was of no use. A second one of this kind
    /// says something against its endpoint.
    had_free: bool,
    /// Leave to send the request again, until its answer is here.
    permit: Option<Permit>,
}

/// What is known of the connection that the present attempt goes over.
#[derive(Default)]
pub struct Channel {
    /// What it knows of the ends of messages, over HTTP/1.
    pub tail: Option<Arc<Tail>>,
    /// The stream, over HTTP/2.
    pub stream: Option<StreamHandle>,
    /// Where the endpoint looks for the trailers of the request, over HTTP/2.
    pub trailers: Option<RequestTrailers>,
}

/// The time of endpoints.
#[derive(Clone, Copy, Debug, Default)]
pub struct Busy {
    /// For how long they were busy. `None` if none was connected.
    pub held: Option<Duration>,
    /// For how much longer the last one would have been busy, had it waited for the client.
    pub saved: Duration,
}

/// How the next attempt begins.
#[derive(Default)]
struct Next {
    /// It is certain: what came of the present one is not taken.
    decided: bool,
    /// How long it waits.
    pause: Duration,
    /// It has a connection of its own, and none that was kept.
    fresh: bool,
}

impl Attempts {
    /// An endpoint was chosen.
    pub fn begin(&mut self, attempt: Attempt) {
        if let Some(permit) = &mut self.permit {
            permit.begun();
        }
        self.count += 1;
        self.tried.push(attempt.endpoint.endpoint().clone());
        self.present = Some(attempt);
    }

    /// The endpoint that was chosen last.
    pub fn endpoint(&self) -> Option<&Arc<Endpoint>> {
        self.tried.last()
    }

    /// How many there were of those that count.
    pub fn counted(&self) -> u32 {
        self.count - u32::from(self.had_free)
    }

    /// Whether one that fails for its connection alone counts as none.
    pub fn has_free(&self) -> bool {
        !self.had_free
    }

    /// Whether there is to be another one after one that failed. If so, all is ready for it, and it is counted.
    pub fn again(&mut self, rules: &Rules, upstream: &Upstream, situation: &Situation) -> bool {
        let failure = situation.failure;
        let mut verdict = rules.judge(situation, rand::random());
        if matches!(verdict, Verdict::Again(_)) && failure.is_load() {
            match &mut self.permit {
                Some(permit) => permit.waits(),
                None => self.permit = upstream.permit_retry(rules.allowance()),
            }
            if self.permit.is_none() {
                verdict = Verdict::Refused(Objection::Budget);
            }
        }
        match verdict {
            Verdict::Unwanted => false,
            Verdict::Refused(objection) => {
                upstream.metrics.retries.refused(objection).inc();
                false
            }
            Verdict::Again(pause) => {
                upstream.metrics.retries.made(failure.cause()).inc();
                self.prepare(failure, situation.elsewhere, pause);
                true
            }
        }
    }

    /// The next attempt follows one that failed for this; `elsewhere`: there is an endpoint that was not tried.
    fn prepare(&mut self, failure: Failure, elsewhere: bool, pause: Duration) {
        if failure.is_of_connection() {
            self.had_free = true;
            self.next.fresh = failure == Failure::Stale;
            self.tried.pop();
        } else if !elsewhere {
            self.tried.clear();
        }
        self.next.pause = pause;
    }

    /// How long the attempt that begins now is to wait, once.
    pub fn take_pause(&mut self) -> Duration {
        std::mem::take(&mut self.next.pause)
    }

    /// Whether it is to have a connection of its own, once.
    pub fn takes_fresh_connection(&mut self) -> bool {
        std::mem::take(&mut self.next.fresh)
    }

    /// The answer to the present one is not taken: another attempt follows.
    pub fn discard_answer(&mut self) {
        self.failure = None;
        self.next.decided = true;
    }

    /// Whether another attempt follows in any case, once.
    pub fn take_decision(&mut self) -> bool {
        std::mem::take(&mut self.next.decided)
    }

    /// Whatever comes now is the answer.
    pub fn accept_answer(&mut self) {
        (self.permit, self.failure) = (None, None);
    }

    /// The present one came to nothing in this phase: this is for the log.
    pub fn note_failure(&mut self, phase: Phase, why: Why, now: Instant) {
        if let Some(attempt) = &self.present {
            let endpoint = Arc::clone(&attempt.endpoint.label);
            self.failed.push(Failed { endpoint, phase, why, took: now - attempt.chosen });
        }
    }

    /// Lets the present one go, if there is one; what its endpoint has spent on it is counted.
    pub fn release(&mut self, now: Instant) -> Option<Attempt> {
        // The connection may be another exchange's by now.
        self.channel = Channel::default();
        let attempt = self.present.take()?;
        if let Some(connected) = attempt.connected {
            *self.busy.held.get_or_insert_default() += now - connected;
        }
        Some(attempt)
    }
}

/// One endpoint that was chosen for an exchange, until it is busy with it no longer. The upstream hears once what
/// became of it, whatever happens: an attempt that is dropped was cancelled.
pub struct Attempt {
    upstream: Arc<Upstream>,
    endpoint: Engaged,
    link: Option<Arc<Link>>,
    chosen: Instant,
    /// When its connection stood.
    connected: Option<Instant>,
    /// Whether that connection was kept from an earlier exchange.
    reused: bool,
    /// When a piece of the request was passed on last, before the answer.
    given: Option<Instant>,
    /// The request is out.
    sent: bool,
    /// For how long the endpoint was waited for until its response header was here, and its status.
    answered: Option<(Duration, StatusCode)>,
    /// A connection that it has for itself, and whether it is to be the last to have it.
    own: Option<(RawFd, bool)>,
    /// That connection was closed, so no other exchange gets it.
    closed: bool,
    ended: bool,
}

impl Attempt {
    /// An attempt with an endpoint of this upstream, chosen just now. `link` knows how long each party is waited for;
    /// without it, the endpoint is all the time.
    pub fn new(upstream: Arc<Upstream>, endpoint: Engaged, link: Option<Arc<Link>>, chosen: Instant) -> Self {
        if let Some(link) = link.as_ref().filter(|_| endpoint.is_probe()) {
            endpoint.watch(link.clone());
        }
        Attempt {
            upstream,
            endpoint,
            link,
            chosen,
            connected: None,
            reused: false,
            given: None,
            sent: false,
            answered: None,
            own: None,
            closed: false,
            ended: false,
        }
    }

    /// Its connection stands.
    pub fn connected(&mut self, reused: bool, now: Instant) {
        self.connected = Some(now);
        self.reused = reused;
    }

    /// The connection is this socket, which no other exchange has meanwhile; `last` if none is to have it afterwards.
    pub fn owns(&mut self, socket: RawFd, last: bool) {
        self.own = Some((socket, last));
    }

    /// The answer is here whole. A connection that is not to be kept is closed now: Pingora then finds it so, and would
    /// otherwise keep it.
    pub fn answered_whole(&mut self) {
        if let Some((socket, last)) = self.own.take_if(|_| self.sent)
            && (last || self.upstream.has_surplus_connections())
        {
            net::shut_down(socket);
            self.closed = true;
        }
    }

    /// Whether its connection was closed because it is not to be kept.
    pub fn has_closed(&self) -> bool {
        self.closed
    }

    /// A piece of the request is passed on.
    pub fn gave(&mut self, now: Instant) {
        if self.answered.is_none() {
            self.given = Some(now);
        }
    }

    /// The request is out, as far as can be seen.
    pub fn sent(&mut self, now: Instant) {
        self.gave(now);
        self.sent = true;
    }

    /// The response header is here.
    pub fn answered(&mut self, status: StatusCode, now: Instant) {
        if self.answered.is_none() {
            let connect = self.connected.map_or(Duration::ZERO, |connected| connected - self.chosen);
            let wait = (now - self.waits_since()).min(self.own_time(now).saturating_sub(connect));
            self.answered = Some((wait, status));
        }
        self.endpoint.answered(status, now);
    }

    /// The endpoint.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The status of its answer, once the header is here.
    pub fn status(&self) -> Option<StatusCode> {
        self.answered.map(|(_, status)| status)
    }

    /// What came of it if nothing went wrong.
    pub fn outcome(&self) -> Outcome {
        self.status().map_or(Outcome::Cancelled, Outcome::Answered)
    }

    /// For how long the endpoint has been waited for, and no other party, since it was chosen.
    fn own_time(&self, now: Instant) -> Duration {
        match &self.link {
            Some(link) => link.waits().spent(Party::Endpoint, now),
            None => now - self.chosen,
        }
    }

    /// Since when the endpoint has been given nothing more.
    pub fn waits_since(&self) -> Instant {
        self.given.or(self.connected).unwrap_or(self.chosen)
    }

    /// Whether its connection was kept from an earlier exchange.
    pub fn is_reused(&self) -> bool {
        self.reused
    }

    /// Whether its connection stands.
    pub fn is_connected(&self) -> bool {
        self.connected.is_some()
    }

    /// It is over, and this came of it.
    pub fn end(&mut self, outcome: Outcome, now: Instant) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let connect = self.connected.filter(|_| !self.reused).map(|connected| connected - self.chosen);
        let wait = self.answered.map(|(wait, _)| wait);
        let ended = Ended { outcome, connect, wait, own: self.own_time(now) };
        self.upstream.ended(&mut self.endpoint, &ended, now);
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if !self.ended {
            self.end(Outcome::Cancelled, Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::config;
    use crate::config::route::retry::Retry;
    use crate::error::refusal;
    use crate::metrics::Metrics;
    use crate::upstream::Choice;

    fn upstream(yaml: &str) -> Arc<Upstream> {
        let written = config::filter::decode(&serde_yaml::from_str(yaml).expect("YAML")).expect("an upstream");
        let metrics = Metrics::new(100, refusal::ALL.to_vec()).upstream("app");
        let upstream = Arc::new(Upstream::build("app", &written, metrics).expect("an upstream"));
        let errors = crate::upstream::look_up([&upstream]);
        assert!(errors.is_empty(), "{errors:?}");
        upstream
    }

    fn two() -> Arc<Upstream> {
        upstream("{ endpoints: [ { address: '127.0.0.1:1' }, { address: '127.0.0.1:2' } ] }")
    }

    /// Begins the next attempt of these.
    fn begin(attempts: &mut Attempts, upstream: &Arc<Upstream>) {
        let now = Instant::now();
        let Choice::Engaged(engaged) = upstream.select(0, &attempts.tried, now) else { panic!("there is no endpoint") };
        attempts.begin(Attempt::new(upstream.clone(), engaged, None, now));
    }

    fn failed(attempts: &Attempts, upstream: &Upstream, failure: Failure) -> Situation {
        Situation {
            failure,
            attempts: attempts.counted(),
            idempotent: true,
            replayable: true,
            begun: false,
            elsewhere: upstream.has_more(&attempts.tried),
            retry_after: None,
            left: None,
        }
    }

    #[test]
    fn a_connection_that_was_stale_costs_one_attempt_that_counts_as_none() {
        let (upstream, rules, mut attempts) = (two(), Rules::new(&Retry::default()), Attempts::default());
        begin(&mut attempts, &upstream);
        assert!(attempts.has_free());
        let situation = failed(&attempts, &upstream, Failure::Stale);
        assert!(attempts.again(&rules, &upstream, &situation));
        assert_eq!((attempts.count, attempts.counted(), attempts.has_free()), (1, 0, false));
        assert!(attempts.tried.is_empty(), "the endpoint may be chosen once more");
        assert_eq!(attempts.take_pause(), Duration::ZERO);
        assert!(attempts.takes_fresh_connection() && !attempts.takes_fresh_connection());
        begin(&mut attempts, &upstream);
        assert_eq!((attempts.count, attempts.counted()), (2, 1));
    }

    #[test]
    fn once_all_endpoints_were_tried_each_may_be_chosen_again() {
        let written = Retry { same_endpoint: true, ..Retry::default() };
        let (upstream, rules, mut attempts) = (two(), Rules::new(&written), Attempts::default());
        for tried in [1, 0] {
            begin(&mut attempts, &upstream);
            let situation = failed(&attempts, &upstream, Failure::Reset);
            assert!(attempts.again(&rules, &upstream, &situation));
            assert_eq!(attempts.tried.len(), tried);
        }
        begin(&mut attempts, &upstream);
        let situation = failed(&attempts, &upstream, Failure::Reset);
        assert!(!attempts.again(&rules, &upstream, &situation), "three are the most");
        assert_eq!(upstream.metrics.retries.refused(Objection::Attempts).get(), 1);
    }

    #[test]
    fn an_attempt_is_let_go_once_and_its_time_is_added_up() {
        let (upstream, mut attempts) = (two(), Attempts::default());
        assert!(attempts.release(Instant::now()).is_none());
        for _ in 0..2 {
            begin(&mut attempts, &upstream);
            let attempt = attempts.present.as_mut().expect("an attempt");
            let connected = attempt.chosen + Duration::from_millis(1);
            attempt.connected(false, connected);
            attempts.note_failure(Phase::Wait, Why::Status(503), connected);
            attempts.channel.trailers = Some(RequestTrailers::default());
            assert!(attempts.release(connected + Duration::from_millis(5)).is_some());
            assert!(attempts.present.is_none() && attempts.channel.trailers.is_none());
        }
        assert_eq!(attempts.busy.held, Some(Duration::from_millis(10)));
        let took: Vec<_> = attempts.failed.iter().map(|failed| failed.took).collect();
        assert_eq!(took, [Duration::from_millis(1); 2]);
    }

    #[test]
    fn an_answer_is_taken_or_another_attempt_is_certain() {
        let broke = Some(Fault::new(Party::Endpoint, Phase::Wait, crate::party::What::Broke));
        let mut attempts = Attempts { failure: broke, ..Attempts::default() };
        attempts.discard_answer();
        assert!(attempts.failure.is_none() && attempts.take_decision() && !attempts.take_decision());
        attempts.failure = broke;
        attempts.accept_answer();
        assert!(attempts.failure.is_none() && !attempts.take_decision());
    }
}
