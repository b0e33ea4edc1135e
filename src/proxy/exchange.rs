//! One exchange: a request, its response, and all that is known of them. Pingora carries it as the context from hook
//! to hook; the phases read and fill it.
//!
//! What belongs together has a type of its own, which keeps what it decides to itself. [`Exchange::enter`] is the one
//! place where a phase begins.

pub mod client;
pub mod filters;
pub mod progress;
pub mod request;
pub mod routing;

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::{HeaderMap, Uri};
use pingora::http::{RequestHeader, ResponseHeader};

use super::attempt::{Attempt, Attempts};
use super::deadline::Deadlines;
use super::mirror::Copy;
use super::routes::Route;
use super::watch::Watch;
use crate::client::connection::introduction;
use crate::client::remains;
use crate::client::session::Link;
use crate::error::{Refusal, refusal};
use crate::expression::facts::Response;
use crate::expression::{Asked, Author, Facts, Pace};
use crate::filter::{Stages, Verdict, View};
use crate::finished::Why;
use crate::metrics::Metrics;
use crate::phase::Phase;
use crate::spans::{Context, Notes};
use crate::upstream::{Engaged, Outcome, Upstream};
use client::Client;
use filters::Filters;
use progress::Progress;
use request::Request;
use routing::Routing;

/// The state of one exchange.
pub struct Exchange {
    /// Where it is in its life.
    pub progress: Progress,
    /// Who asks.
    pub client: Client,
    /// What is asked.
    pub request: Request,
    /// Where it goes, and by what rules.
    pub routing: Routing,
    /// What the filters of its route keep for it and say of it.
    pub filters: Filters,
    /// The endpoints that were asked.
    pub attempts: Attempts,
    /// When it, and its present attempt, are to be over.
    pub deadlines: Deadlines,
    /// The session that stands between Pingora and the client. `None` once they have switched to another protocol.
    pub link: Option<Arc<Link>>,
    /// What is known of it since then.
    pub switched: Option<Box<Switched>>,
    /// What another upstream is to get of it.
    pub copy: Option<Box<Copy>>,
    /// Its place in a trace, if there are any.
    pub traced: Option<Traced>,
    /// Why Forebay ended it, if it did.
    pub refusal: Option<&'static Refusal>,
}

/// An exchange whose client and endpoint have switched to another protocol: only Pingora's own session has it then.
pub struct Switched {
    /// The request.
    pub request: RequestHeader,
    /// Bytes that have come from the client since.
    pub received: u64,
    /// Bytes that have gone to it.
    pub sent: u64,
}

impl Switched {
    /// The two have agreed to, upon this request.
    pub fn new(request: RequestHeader) -> Switched {
        Switched { request, received: 0, sent: 0 }
    }
}

/// The place of an exchange in a trace.
pub struct Traced {
    /// The trace and its span.
    pub place: Context,
    /// What is noted of its attempts for its spans, if it is recorded.
    pub notes: Option<Box<Notes>>,
}

/// An exchange as Pingora carries it from hook to hook. One that is dropped before it was settled is kept
/// for the code that dropped it (`client::remains`). Boxed: it is large, and handed from one future to the next.
pub struct Carried(Option<Box<Exchange>>);

impl Carried {
    /// Has it carried.
    pub fn new(exchange: Exchange) -> Self {
        Carried(Some(Box::new(exchange)))
    }
}

impl Deref for Carried {
    type Target = Exchange;

    fn deref(&self) -> &Exchange {
        self.0.as_ref().expect("it is there until this is dropped")
    }
}

impl DerefMut for Carried {
    fn deref_mut(&mut self) -> &mut Exchange {
        self.0.as_mut().expect("it is there until this is dropped")
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        if !remains::are_wanted() {
            return;
        }
        let Some(exchange) = self.0.take_if(|exchange| exchange.phase() != Phase::Finish) else { return };
        if let (Some(link), Some(connection)) = (&exchange.link, &exchange.client.connection)
            && link.begun()
            && !link.framed()
            && !link.is_http2()
        {
            // The client must not take the part that came for the whole.
            connection.close_with_reset();
        }
        remains::leave(exchange);
    }
}

impl Exchange {
    /// Begins an exchange with what its connection knows of it, in phase `route`.
    pub fn begin(metrics: &Metrics) -> Self {
        let begin = introduction();
        let progress = Progress::begin(begin.as_ref(), metrics);
        let client = Client::new(begin);
        Exchange {
            progress,
            request: Request::new(client.tls().is_some()),
            client,
            routing: Routing::default(),
            filters: Filters::default(),
            attempts: Attempts::default(),
            deadlines: Deadlines::default(),
            link: None,
            switched: None,
            copy: None,
            traced: None,
            refusal: None,
        }
    }

    /// The phase that it is in.
    pub fn phase(&self) -> Phase {
        self.progress.phase()
    }

    /// Goes on to `phase`; tells when that was.
    pub fn enter(&mut self, phase: Phase) -> Instant {
        let now = Instant::now();
        if phase != self.phase() {
            let link = self.link.as_ref();
            self.progress.enter(phase, now, || link.map(|link| link.passed()).unwrap_or_default());
            link.inspect(|link| link.enter_phase(phase, now));
        }
        now
    }

    /// Gives it its place in a trace; from here on it is noted what it does, if it is recorded. It is in `route`.
    pub fn trace(&mut self, place: Context) {
        let notes = place.sampled.then(Box::default);
        if place.sampled {
            self.progress.keep_journal();
        }
        self.traced = Some(Traced { place, notes });
    }

    /// What keys and expressions are asked of: the target before the filters, and the header as they have left it.
    pub fn asked<'e>(&'e self, request: &'e RequestHeader) -> Asked<'e> {
        let target = self.request.target.as_ref().unwrap_or(&request.uri);
        let facts = Facts { path: target.path(), ..self.facts(self.routing.route_name()) };
        Asked {
            facts,
            method: &request.method,
            target,
            version: request.version,
            headers: &request.headers,
            response: (facts.status > 0).then_some(Response { code: facts.status, headers: None }),
        }
    }

    /// What is known of it beside its headers, on its way through this route.
    pub fn facts<'e>(&'e self, route: &'e str) -> Facts<'e> {
        Facts {
            client: self.client.address,
            prefix: self.client.prefix,
            port: self.client.port(),
            scheme: self.request.scheme,
            listener: self.client.listener(),
            route,
            path: self.request.target.as_ref().map(Uri::path).unwrap_or_default(),
            secured: self.client.secured(),
            ended: self.request.ended_with_header,
            pace: self.pace(),
            begun: self.progress.begun,
            status: self.filters.status(),
            identity: self.client.identity.as_deref(),
            author: self.refusal.map(Author::Gateway),
            attempt: self.filters.attempt(),
        }
    }

    /// How the client did in the last phase in which it was waited for.
    fn pace(&self) -> Pace {
        let clock = &self.progress.clock;
        let passed = || self.link.as_ref().map(|link| link.passed()).unwrap_or_default();
        let spent = |phase: Phase| clock.spent(phase).filter(|_| clock.phase() > phase);
        if let Some(age) = spent(Phase::Write) {
            Pace { phase: Phase::Write, age, bytes: Some(passed().sent) }
        } else if let Some(age) = spent(Phase::Buffer) {
            Pace { phase: Phase::Buffer, age, bytes: Some(passed().received) }
        } else {
            Pace { phase: Phase::Header, age: spent(Phase::Header).unwrap_or_default(), bytes: None }
        }
    }

    /// Whether it is a gRPC call, and its route and its upstream take it for one.
    pub fn is_treated_as_grpc(&self) -> bool {
        self.request.grpc.is_some() && self.routing.is_of_grpc()
    }

    /// An endpoint of this upstream was chosen.
    pub fn engage(&mut self, upstream: Arc<Upstream>, engaged: Engaged, now: Instant) {
        if let Some(notes) = self.notes() {
            notes.attempt(&upstream.name, &engaged.endpoint().label, now);
        }
        self.attempts.begin(Attempt::new(upstream, engaged, self.link.clone(), now));
    }

    /// The connection of the present attempt stands.
    pub fn connected(&mut self, reused: bool, now: Instant) {
        if let Some(attempt) = &mut self.attempts.present {
            attempt.connected(reused, now);
        }
        if let Some(noted) = self.notes().and_then(|notes| notes.present()) {
            noted.reused = Some(reused);
        }
    }

    /// The present attempt came to nothing, in the present phase: this is for the log.
    pub fn note_failure(&mut self, why: Why, now: Instant) {
        self.attempts.note_failure(self.progress.phase(), why, now);
    }

    /// The present attempt is over, if there is one: its endpoint is busy with it no longer.
    pub fn release(&mut self, end: impl FnOnce(&Attempt) -> Outcome, now: Instant) {
        let Some(mut attempt) = self.attempts.release(now) else { return };
        if let Some(link) = self.link.as_ref().filter(|_| attempt.is_connected()) {
            link.comes_through(None);
        }
        let outcome = end(&attempt);
        if let Some(noted) = self.notes().and_then(|notes| notes.present()) {
            noted.ended = Some(now);
            noted.status = attempt.status().map(|status| status.as_u16());
            noted.failure = outcome.failure();
        }
        attempt.end(outcome, now);
    }

    fn notes(&mut self) -> Option<&mut Notes> {
        self.traced.as_mut()?.notes.as_deref_mut()
    }

    /// All of the request has come, so that the time that its route leaves it begins. Only the first call counts.
    pub fn request_is_whole(&mut self, now: Instant) {
        let length = self.routing.route.as_ref().and_then(|route| route.deadline);
        if self.deadlines.begin(length, now) && self.attempts.present.is_some() {
            self.keep_deadlines();
        }
    }

    /// The session keeps the deadlines from here on, as they are now.
    pub fn keep_deadlines(&self) {
        if let Some(link) = &self.link {
            self.deadlines.keep(link);
        }
    }

    /// Watches the client while filters of this route wait.
    pub fn watch(&self, route: &Route) -> Watch {
        let connection = self.client.connection.as_ref();
        let (socket, way) = (connection.and_then(|one| one.socket()), connection.and_then(|one| one.bypass()));
        // In a tunnel each direction ends by itself.
        let aborts = route.half_close_aborts && self.switched.is_none();
        Watch::new(self.client.control.clone(), socket, aborts, way)
    }

    /// Runs the response filters of the route on a response header, whoever has made it.
    pub async fn filter_response(
        &self,
        request: &mut RequestHeader,
        response: &mut ResponseHeader,
        author: Author,
    ) -> Verdict {
        if let (Some(route), Some(filters)) = (&self.routing.route, &self.filters.states)
            && route.chain.wants(Stages::RESPONSE)
            && let Some(mut states) = filters.take()
        {
            let facts = Facts { author: Some(author), ..self.facts(&route.name) };
            let asked = || Facts { status: response.status.as_u16(), ..facts }.asked(request).answered(response);
            let mut verdict = Verdict::Continue;
            if route.chain.acts_on_response(&mut states, asked) {
                let call = route.chain.response(&mut states, View { facts, request }, response);
                verdict = self.watch(route).during(route.chain.patience(), call, &refusal::RECEIVE_ABORTED).await;
            }
            filters.put(states);
            filters.answered(response.status);
            return verdict;
        }
        self.filters.states.iter().for_each(|filters| filters.answered(response.status));
        Verdict::Continue
    }

    /// Whether a filter of the route wants to see the body of the answer, whose header all of them have seen.
    pub fn sees_body(&self) -> bool {
        let (Some(route), Some(filters)) = (&self.routing.route, &self.filters.states) else { return false };
        route.chain.wants(Stages::RESPONSE_BODY) && filters.with(|states| route.chain.sees_body(states))
    }

    /// Whether a filter of the route wants to see the body of the request, whose header all of them have seen.
    pub fn sees_request_body(&self) -> bool {
        let (Some(route), Some(filters)) = (&self.routing.route, &self.filters.states) else { return false };
        route.chain.wants(Stages::REQUEST_BODY) && filters.with(|states| route.chain.sees_request_body(states))
    }

    /// Whether a filter wants all of the answer to be here before any of it leaves.
    pub fn holds_answer(&self) -> bool {
        let (Some(route), Some(filters)) = (&self.routing.route, &self.filters.states) else { return false };
        route.chain.wants(Stages::RESPONSE_BODY) && filters.with(|states| route.chain.holds_answer(states))
    }

    /// Runs the body filters of the route on the whole body of an answer that is our own.
    pub async fn filter_whole(&self, request: &mut RequestHeader, body: &mut Bytes) -> Verdict {
        if let (Some(route), Some(filters)) = (&self.routing.route, &self.filters.states)
            && route.chain.wants(Stages::RESPONSE_BODY)
            && let Some(mut states) = filters.take()
        {
            let view = View { facts: self.facts(&route.name), request };
            let mut piece = Some(std::mem::take(body));
            let call = route.chain.response_body(&mut states, view, &mut piece, true);
            let patience = route.chain.patience();
            let verdict = self.watch(route).during(patience, call, &refusal::RECEIVE_ABORTED).await;
            filters.put(states);
            *body = piece.unwrap_or_default();
            return verdict;
        }
        Verdict::Continue
    }

    /// Runs the trailer filters of the route on what has followed the body of the answer.
    pub fn filter_trailers(&self, request: &mut RequestHeader, trailers: &mut HeaderMap) {
        if let (Some(route), Some(filters)) = (&self.routing.route, &self.filters.states)
            && route.chain.wants(Stages::RESPONSE_TRAILERS)
            && let Some(mut states) = filters.take()
        {
            let view = View { facts: self.facts(&route.name), request };
            route.chain.response_trailers(&mut states, view, trailers);
            filters.put(states);
        }
    }
}
