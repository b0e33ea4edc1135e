//! The attempts of an exchange: the current one with its endpoint, and facts about earlier ones.
//!
//! `retry` decides on another attempt; this module keeps the consequences for it.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::StatusCode;

use super::retry::{Failure, Rules, Situation, Verdict};
use crate::body::Bodies;
use crate::finished::{Failed, Why};
use crate::metrics::retry::Objection;
use crate::net;
use crate::party::{Fault, Party};
use crate::phase::Phase;
use crate::upstream::retries::Permit;
use crate::upstream::transport::http1::Tail;
use crate::upstream::transport::http2::{RequestTrailers, StreamHandle};
use crate::upstream::{Ended, Endpoint, EndpointLease, Outcome, Upstream};

/// All attempts of one exchange.
#[derive(Default)]
pub struct Attempts {
    /// Number of endpoints chosen, with repetitions.
    pub count: u32,
    /// The endpoints tried; the last is the current one.
    pub tried: Vec<Arc<Endpoint>>,
    /// The current attempt, while it occupies its endpoint.
    pub present: Option<Attempt>,
    /// The connection or stream of the current attempt.
    pub channel: Channel,
    /// The failed attempts, for the log. An empty list allocates nothing.
    pub failed: Vec<Failed>,
    /// The fault of the last attempt, while there is no response.
    pub failure: Option<Fault>,
    /// Number of interim responses received.
    pub interim: u32,
    /// The time that endpoints spent on the attempts.
    pub busy: Busy,
    next: Next,
    /// Whether the one attempt that does not count, since only its connection failed, was made. A second one of this
    /// kind counts against the endpoint.
    had_free: bool,
    /// The permit to repeat the request, until the response is received.
    permit: Option<Permit>,
}

/// The facts about the connection of the current attempt.
#[derive(Default)]
pub struct Channel {
    /// Over HTTP/1: detects the ends of messages.
    pub tail: Option<Arc<Tail>>,
    /// Over HTTP/2: the stream.
    pub stream: Option<StreamHandle>,
    /// Over HTTP/2: the slot for the request's trailers.
    pub trailers: Option<RequestTrailers>,
}

/// The time that endpoints spent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Busy {
    /// Total time for which endpoints were occupied. `None` if none was connected.
    pub held: Option<Duration>,
    /// Additional time for which the last endpoint would have been occupied if it had waited for the client.
    pub saved: Duration,
}

/// The conditions of the next attempt.
#[derive(Default)]
struct Next {
    /// Whether it is certain: the response of the current attempt is discarded.
    decided: bool,
    /// The pause before it.
    pause: Duration,
    /// Whether it needs a new connection instead of an idle one.
    fresh: bool,
}

impl Attempts {
    /// Begins an attempt with a chosen endpoint.
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

    /// Number of attempts that count.
    pub fn counted(&self) -> u32 {
        self.count - u32::from(self.had_free)
    }

    /// Whether the next failure of a connection alone does not count.
    pub fn has_free(&self) -> bool {
        !self.had_free
    }

    /// Whether another attempt follows a failed one. If so, prepares it and counts it.
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

    /// Prepares the attempt after one that failed for this reason; `elsewhere`: an untried endpoint exists.
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

    /// Takes the pause before the attempt that begins now.
    pub fn take_pause(&mut self) -> Duration {
        std::mem::take(&mut self.next.pause)
    }

    /// Takes the flag for a new connection.
    pub fn takes_fresh_connection(&mut self) -> bool {
        std::mem::take(&mut self.next.fresh)
    }

    /// Discards the response to the current attempt: another attempt follows.
    pub fn discard_answer(&mut self) {
        self.failure = None;
        self.next.decided = true;
    }

    /// Takes the flag that another attempt is certain.
    pub fn take_decision(&mut self) -> bool {
        std::mem::take(&mut self.next.decided)
    }

    /// Accepts the response, which ends the attempts.
    pub fn accept_answer(&mut self) {
        (self.permit, self.failure) = (None, None);
    }

    /// Notes for the log that the current attempt failed in this phase.
    pub fn note_failure(&mut self, phase: Phase, why: Why, now: Instant) {
        if let Some(attempt) = &self.present {
            let endpoint = Arc::clone(&attempt.endpoint.label);
            self.failed.push(Failed { endpoint, phase, why, took: now - attempt.chosen });
        }
    }

    /// Ends the current attempt, if any, and adds the time that its endpoint spent.
    pub fn release(&mut self, now: Instant) -> Option<Attempt> {
        // Another exchange may already use the connection.
        self.channel = Channel::default();
        let attempt = self.present.take()?;
        if let Some(connected) = attempt.connected {
            *self.busy.held.get_or_insert_default() += now - connected;
        }
        Some(attempt)
    }
}

/// An attempt with one endpoint, until it no longer occupies the endpoint. The upstream receives its outcome exactly
/// once: a dropped attempt counts as cancelled.
pub struct Attempt {
    upstream: Arc<Upstream>,
    endpoint: EndpointLease,
    bodies: Option<Arc<Bodies>>,
    chosen: Instant,
    /// Time at which the connection was established.
    connected: Option<Instant>,
    /// Whether the connection was used by an earlier exchange.
    reused: bool,
    /// Time at which a piece of the request was last passed on before the response.
    given: Option<Instant>,
    /// Whether the request was sent.
    sent: bool,
    /// The endpoint's own time until its response header, and the status.
    answered: Option<(Duration, StatusCode)>,
    /// The socket of a connection without other exchanges, and whether it must not be reused.
    own: Option<(RawFd, bool)>,
    /// Whether this connection was closed, so that no other exchange gets it.
    closed: bool,
    ended: bool,
}

impl Attempt {
    /// An attempt with an endpoint of this upstream, chosen just now. `bodies` has the waits of each party; without it,
    /// all time counts as the endpoint's.
    pub fn new(upstream: Arc<Upstream>, endpoint: EndpointLease, bodies: Option<Arc<Bodies>>, chosen: Instant) -> Self {
        if let Some(bodies) = bodies.as_ref().filter(|_| endpoint.is_probe()) {
            endpoint.watch(bodies.clone());
        }
        Attempt {
            upstream,
            endpoint,
            bodies,
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

    /// Records that the connection was established.
    pub fn connected(&mut self, reused: bool, now: Instant) {
        self.connected = Some(now);
        self.reused = reused;
    }

    /// Sets the attempt's socket, which no other exchange uses meanwhile; `last` if it must not be reused.
    pub fn owns(&mut self, socket: RawFd, last: bool) {
        self.own = Some((socket, last));
    }

    /// Records that the response was received completely. Closes a connection that must not be reused; otherwise
    /// Pingora would keep it.
    pub fn answered_whole(&mut self) {
        if let Some((socket, last)) = self.own.take_if(|_| self.sent)
            && (last || self.upstream.has_surplus_connections())
        {
            net::shut_down(socket);
            self.closed = true;
        }
    }

    /// Whether the connection was closed because it must not be reused.
    pub fn has_closed(&self) -> bool {
        self.closed
    }

    /// Records that a piece of the request was passed on.
    pub fn gave(&mut self, now: Instant) {
        if self.answered.is_none() {
            self.given = Some(now);
        }
    }

    /// Records that the request was sent, as far as this is visible.
    pub fn sent(&mut self, now: Instant) {
        self.gave(now);
        self.sent = true;
    }

    /// Whether the request was sent.
    pub fn is_sent(&self) -> bool {
        self.sent
    }

    /// Records the response header.
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

    /// The status of the response, once its header was received.
    pub fn status(&self) -> Option<StatusCode> {
        self.answered.map(|(_, status)| status)
    }

    /// The outcome if there was no fault.
    pub fn outcome(&self) -> Outcome {
        self.status().map_or(Outcome::Cancelled, Outcome::Answered)
    }

    /// The time since the choice for which only the endpoint was waited for.
    fn own_time(&self, now: Instant) -> Duration {
        match &self.bodies {
            Some(bodies) => bodies.waits().spent(Party::Endpoint, now),
            None => now - self.chosen,
        }
    }

    /// Time at which the endpoint last received a part of the request.
    fn waits_since(&self) -> Instant {
        self.given.or(self.connected).unwrap_or(self.chosen)
    }

    /// Whether the connection was used by an earlier exchange.
    pub fn is_reused(&self) -> bool {
        self.reused
    }

    /// Whether the connection was established.
    pub fn is_connected(&self) -> bool {
        self.connected.is_some()
    }

    /// Ends the attempt with this outcome.
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

    /// Begins the next attempt.
    fn begin(attempts: &mut Attempts, upstream: &Arc<Upstream>) {
        let now = Instant::now();
        let Choice::Leased(lease) = upstream.select(0, &attempts.tried, now) else { panic!("there is no endpoint") };
        attempts.begin(Attempt::new(upstream.clone(), lease, None, now));
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
