//! One exchange: a request, its response, and their state. Pingora passes it as the context to each hook; the phases
//! read and fill it.
//!
//! Each group of related facts has its own type, which encapsulates its decisions. [`Exchange::enter`] is the only
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
use crate::body::Bodies;
use crate::client::remains;
use crate::client::start::ExchangeStart;
use crate::client::stream::WeakBypass;
use crate::error::{Refusal, refusal};
use crate::expression::facts::Response;
use crate::expression::{Asked, Author, Facts, Pace};
use crate::filter::{Stages, Verdict, View};
use crate::finished::Why;
use crate::metrics::Metrics;
use crate::phase::Phase;
use crate::spans::{AttemptNotes, Context};
use crate::upstream::{EndpointLease, Outcome, Upstream};
use client::Client;
use filters::Filters;
use progress::Progress;
use request::Request;
use routing::Routing;

/// The state of one exchange.
pub struct Exchange {
    /// Its phase, and the times of earlier phases.
    pub progress: Progress,
    /// The client.
    pub client: Client,
    /// The request.
    pub request: Request,
    /// The route, the upstream and their rules.
    pub routing: Routing,
    /// The filters' state and results.
    pub filters: Filters,
    /// The attempts and their endpoints.
    pub attempts: Attempts,
    /// The deadlines of the exchange and of its current attempt.
    pub deadlines: Deadlines,
    /// The session between Pingora and the client. `None` after a switch to another protocol.
    pub bodies: Option<Arc<Bodies>>,
    /// The state after a switch to another protocol.
    pub switched: Option<Box<Switched>>,
    /// The copy for a mirror.
    pub copy: Option<Box<Copy>>,
    /// The place in a trace, if tracing is on.
    pub traced: Option<Traced>,
    /// The reason for which Forebay ended the exchange, if it did.
    pub refusal: Option<&'static Refusal>,
}

/// An exchange whose client and endpoint have switched to another protocol. Only Pingora's own session serves it.
pub struct Switched {
    /// The request.
    pub request: RequestHeader,
    /// Bytes received from the client since the switch.
    pub received: u64,
    /// Bytes sent to the client since the switch.
    pub sent: u64,
}

impl Switched {
    /// The state at the switch that this request asked for.
    pub fn new(request: RequestHeader) -> Switched {
        Switched { request, received: 0, sent: 0 }
    }
}

/// The place of an exchange in a trace.
pub struct Traced {
    /// The trace and its span.
    pub place: Context,
    /// Notes about the attempts for their spans, if the trace is recorded.
    pub notes: Option<Box<AttemptNotes>>,
}

/// An exchange as Pingora passes it from hook to hook. If it is dropped before it is settled, `client::remains` keeps
/// it for the code that dropped it. Boxed, since it is large and moves between futures.
pub struct Carried(Option<Box<Exchange>>);

impl Carried {
    /// Boxes an exchange.
    pub fn new(exchange: Exchange) -> Self {
        Carried(Some(Box::new(exchange)))
    }
}

impl Deref for Carried {
    type Target = Exchange;

    fn deref(&self) -> &Exchange {
        self.0.as_ref().expect("present until this is dropped")
    }
}

impl DerefMut for Carried {
    fn deref_mut(&mut self) -> &mut Exchange {
        self.0.as_mut().expect("present until this is dropped")
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        if !remains::are_wanted() {
            return;
        }
        let Some(exchange) = self.0.take_if(|exchange| exchange.phase() != Phase::Finish) else { return };
        if let (Some(bodies), Some(connection)) = (&exchange.bodies, &exchange.client.connection)
            && bodies.begun()
            && !bodies.framed()
            && !bodies.is_http2()
        {
            // The reset shows the client that the response is incomplete.
            connection.close_with_reset();
        }
        remains::leave(exchange);
    }
}

impl Exchange {
    /// Creates an exchange in phase `route`, with the facts that its connection recorded.
    pub fn begin(begin: Option<ExchangeStart>, metrics: &Metrics) -> Self {
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
            bodies: None,
            switched: None,
            copy: None,
            traced: None,
            refusal: None,
        }
    }

    /// The current phase.
    pub fn phase(&self) -> Phase {
        self.progress.phase()
    }

    /// Enters `phase`; returns the time.
    pub fn enter(&mut self, phase: Phase) -> Instant {
        let now = Instant::now();
        self.enter_at(phase, now);
        now
    }

    /// Enters `phase` at the time `now`, which was just read.
    pub fn enter_at(&mut self, phase: Phase, now: Instant) {
        if phase != self.phase() {
            let bodies = self.bodies.as_ref();
            self.progress.enter(phase, now, || bodies.map(|bodies| bodies.passed()).unwrap_or_default());
            bodies.inspect(|bodies| bodies.enter_phase(phase, now));
        }
    }

    /// Sets the place in a trace. If the trace is recorded, the exchange notes its steps from here on. The phase is
    /// `route`.
    pub fn trace(&mut self, place: Context) {
        let notes = place.sampled.then(Box::default);
        if place.sampled {
            self.progress.keep_journal();
        }
        self.traced = Some(Traced { place, notes });
    }

    /// The input of keys and expressions: the target before the filters, and the header after them.
    pub fn asked<'e>(&'e self, request: &'e RequestHeader) -> Asked<'e> {
        let target = self.request.target.as_ref().unwrap_or(&request.uri);
        let facts = self.facts_at(self.routing.route_name(), target.path());
        Asked {
            facts,
            method: &request.method,
            target,
            version: request.version,
            headers: &request.headers,
            response: (facts.status > 0).then_some(Response { code: facts.status, headers: None }),
        }
    }

    /// The facts besides the headers, on this route.
    pub fn facts<'e>(&'e self, route: &'e str) -> Facts<'e> {
        self.facts_at(route, self.request.target.as_ref().map(Uri::path).unwrap_or_default())
    }

    /// The same with this path. Inlined, since the facts would otherwise be copied from place to place.
    #[inline]
    pub fn facts_at<'e>(&'e self, route: &'e str, path: &'e str) -> Facts<'e> {
        Facts {
            client: self.client.address,
            prefix: self.client.prefix,
            port: self.client.port(),
            scheme: self.request.scheme,
            listener: self.client.listener(),
            route,
            path,
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

    /// The client's pace in the last phase that waited for it.
    fn pace(&self) -> Pace {
        let clock = &self.progress.clock;
        let passed = || self.bodies.as_ref().map(|bodies| bodies.passed()).unwrap_or_default();
        let spent = |phase: Phase| if clock.phase() > phase { clock.spent(phase) } else { None };
        if let Some(age) = spent(Phase::Write) {
            Pace { phase: Phase::Write, age, bytes: Some(passed().sent) }
        } else if let Some(age) = spent(Phase::Buffer) {
            Pace { phase: Phase::Buffer, age, bytes: Some(passed().received) }
        } else {
            Pace { phase: Phase::Header, age: spent(Phase::Header).unwrap_or_default(), bytes: None }
        }
    }

    /// Whether the request is a gRPC call, and route and upstream treat it as one.
    pub fn is_treated_as_grpc(&self) -> bool {
        self.request.grpc.is_some() && self.routing.is_of_grpc()
    }

    /// Records that an endpoint of this upstream was chosen.
    pub fn lease(&mut self, upstream: Arc<Upstream>, lease: EndpointLease, now: Instant) {
        if let Some(notes) = self.notes() {
            notes.attempt(&upstream.name, &lease.endpoint().label, now);
        }
        self.attempts.begin(Attempt::new(upstream, lease, self.bodies.clone(), now));
    }

    /// Records that the connection of the current attempt was established.
    pub fn connected(&mut self, reused: bool, now: Instant) {
        if let Some(attempt) = &mut self.attempts.present {
            attempt.connected(reused, now);
        }
        if let Some(noted) = self.notes().and_then(|notes| notes.present()) {
            noted.reused = Some(reused);
        }
    }

    /// Notes for the log that the current attempt failed in the current phase.
    pub fn note_failure(&mut self, why: Why, now: Instant) {
        self.attempts.note_failure(self.progress.phase(), why, now);
    }

    /// Ends the current attempt, if any: its endpoint is no longer in use.
    pub fn release(&mut self, end: impl FnOnce(&Attempt) -> Outcome, now: Instant) {
        let Some(mut attempt) = self.attempts.release(now) else { return };
        if let Some(bodies) = self.bodies.as_ref().filter(|_| attempt.is_connected()) {
            bodies.set_window(None);
        }
        let outcome = end(&attempt);
        if let Some(noted) = self.notes().and_then(|notes| notes.present()) {
            noted.ended = Some(now);
            noted.status = attempt.status().map(|status| status.as_u16());
            noted.failure = outcome.failure();
        }
        attempt.end(outcome, now);
    }

    fn notes(&mut self) -> Option<&mut AttemptNotes> {
        self.traced.as_mut()?.notes.as_deref_mut()
    }

    /// Records that the request was received completely, which starts the route's deadline. Only the first call has an
    /// effect.
    pub fn request_is_whole(&mut self, now: impl FnOnce() -> Instant) {
        let length = self.routing.route.as_ref().and_then(|route| route.deadline);
        if self.deadlines.begin(length, now) && self.attempts.present.is_some() {
            self.keep_deadlines();
        }
    }

    /// Passes the deadlines to the session, which enforces them from here on.
    pub fn keep_deadlines(&self) {
        if let Some(bodies) = &self.bodies {
            self.deadlines.keep(bodies);
        }
    }

    /// Creates a watch of the client for the time in which filters of this route wait.
    pub fn watch(&self, route: &Route) -> Watch {
        let socket = self.client.connection.as_ref().and_then(|connection| connection.socket());
        let bypass = self.client.bypass.as_ref().and_then(WeakBypass::bypass);
        // In a tunnel, the directions end separately.
        let aborts = route.half_close_aborts && self.switched.is_none();
        Watch::new(self.client.control.clone(), socket, aborts, bypass)
    }

    /// Runs the route's response filters on a response header, from the endpoint or from Forebay.
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
                let (mut client, patience) = (self.watch(route), route.chain.patience());
                // Boxed: exchanges without filters would be as large, too.
                verdict = Box::pin(client.during(patience, call, &refusal::RECEIVE_ABORTED)).await;
            }
            filters.put(states);
            filters.answered(response.status);
            return verdict;
        }
        self.filters.states.iter().for_each(|filters| filters.answered(response.status));
        Verdict::Continue
    }

    /// Whether a filter of the route processes the response body. Call it after the response header's filters.
    pub fn sees_body(&self) -> bool {
        let (Some(route), Some(filters)) = (&self.routing.route, &self.filters.states) else { return false };
        route.chain.wants(Stages::RESPONSE_BODY) && filters.with(|states| route.chain.sees_body(states))
    }

    /// Whether a filter of the route processes the request body. Call it after the request header's filters.
    pub fn sees_request_body(&self) -> bool {
        let (Some(route), Some(filters)) = (&self.routing.route, &self.filters.states) else { return false };
        route.chain.wants(Stages::REQUEST_BODY) && filters.with(|states| route.chain.sees_request_body(states))
    }

    /// Whether a filter requires the complete response before any of it is sent.
    pub fn holds_answer(&self) -> bool {
        let (Some(route), Some(filters)) = (&self.routing.route, &self.filters.states) else { return false };
        route.chain.wants(Stages::RESPONSE_BODY) && filters.with(|states| route.chain.holds_answer(states))
    }

    /// Runs the route's body filters on the complete body of a response that Forebay generated.
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

    /// Runs the route's trailer filters on the trailers of the response.
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
