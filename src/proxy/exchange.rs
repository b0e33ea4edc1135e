//! One exchange: a request, its response, and all that is known of them. Pingora carries it as the context from hook
//! to hook; the phases read and fill it.

use std::net::{IpAddr, SocketAddr};
use std::ops::{Deref, DerefMut};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, Uri};
use pingora::http::{RequestHeader, ResponseHeader};

use super::deadline::Dues;
use super::generation::Epoch;
use super::grpc::Call;
use super::mirror::Copy;
use super::route::Route;
use super::send::Manners;
use super::watch::Watch;
use crate::access_log::{Failed, Why};
use crate::client::connection::{Begin, Connection, UnderWay, introduction};
use crate::client::driver::course::Course;
use crate::client::http2::Control;
use crate::client::remains;
use crate::client::session::Link;
use crate::client::waiting::Who;
use crate::config::listener::OddNames;
use crate::error::{Refusal, refusal};
use crate::eventloop::{own_time, worker as eventloop};
use crate::expression::facts::Response;
use crate::expression::{Asked, Facts, Identity, Pace, Secured};
use crate::filter::{Answer, Refused, Stages, States, Verdict, View};
use crate::metrics::{Metrics, Seat};
use crate::party::{Fault, Party};
use crate::phase::journal::{self, Journal, Note, Passed, Tick};
use crate::phase::{Clock, Phase};
use crate::spans::{Context, Notes};
use crate::upstream::retries::Permit;
use crate::upstream::sticky::Stuck;
use crate::upstream::transport::greeting::Parties;
use crate::upstream::transport::http1::Tail;
use crate::upstream::transport::http2::{RequestTrailers, StreamHandle};
use crate::upstream::{Ended, Endpoint, Engaged, Outcome, Upstream, window};

/// The state of one exchange.
pub struct Exchange {
    /// Which phase it is in, and what it spent where.
    pub clock: Clock,
    /// Counts it among the exchanges of its phase.
    pub seat: Seat,
    /// The connection it came over. `None` only for sessions that were not made by `client::Front`.
    pub connection: Option<Arc<Connection>>,
    /// Its place among the requests of its client that are under way.
    pub place: Option<UnderWay>,
    /// What can be done with its stream, on HTTP/2.
    pub control: Option<Control>,
    /// The client's address: the peer's, or what a trusted proxy said.
    pub client: Option<IpAddr>,
    /// Whether the peer is a trusted proxy.
    pub peer_is_trusted: bool,
    /// `http` or `https`, as the client spoke it.
    pub scheme: &'static str,
    /// The request ended with its header, whatever that announces: HTTP/2 says so.
    pub ended_with_header: bool,
    /// The target before filters, if one might change it. Its path is in the one form of paths.
    pub target: Option<Uri>,
    /// What followed the body of the request, once it is whole.
    pub trailers: Option<HeaderMap>,
    /// Where its endpoint looks for them.
    pub trailers_slot: Option<RequestTrailers>,
    /// What the connection of the present attempt knows of the ends of messages, over HTTP/1.
    pub tail: Option<Arc<Tail>>,
    /// The stream of the present attempt, over HTTP/2.
    pub stream: Option<StreamHandle>,
    /// How many interim answers have come for it.
    pub interim: u32,
    /// It is a gRPC call, and this is known of it.
    pub grpc: Option<Call>,
    /// The protocol besides HTTP that the client asks for, as its route allows.
    pub upgrade: Option<HeaderValue>,
    /// The client's connection, of HTTP/1, is to end once the exchange is settled.
    pub closes: bool,
    /// The request, once client and endpoint have switched to another protocol: only Pingora's own session has it then.
    pub switched: Option<Box<RequestHeader>>,
    /// Bytes that have passed since: from the client, and to it.
    pub tunnelled: (u64, u64),
    /// The generation of the configuration that it goes by, once its header is here.
    pub epoch: Option<Arc<Epoch>>,
    /// What that adds to every request.
    pub manners: Manners,
    /// The route it took.
    pub route: Option<Arc<Route>>,
    /// What the filters of the route keep for it.
    pub filters: Option<Arc<FilterStates>>,
    /// Who asks, once a filter has found out.
    pub identity: Option<Arc<Identity>>,
    /// When the first byte of its request came.
    pub begun: Instant,
    /// The upstream it goes to.
    pub upstream: Option<Arc<Upstream>>,
    /// By which driver, once its filters have let it pass.
    pub course: Option<Course>,
    /// The hash of its key, for upstreams that go by one.
    pub hash: u64,
    /// Where its client stays, by a cookie of ours.
    pub stuck: Option<Stuck>,
    /// The endpoints that were tried; the last is the present one.
    pub tried: Vec<Arc<Endpoint>>,
    /// How often an endpoint was chosen.
    pub attempts: u32,
    /// The session that stands between Pingora and the client. `None` once they have switched to another protocol.
    pub link: Option<Arc<Link>>,
    /// It has had the one attempt that counts as none, for a connection that was of no use. A second one of this kind
    /// says something against its endpoint.
    pub had_free_attempt: bool,
    /// What came is not taken: there is to be another attempt.
    pub again: bool,
    /// How long the next attempt waits.
    pub pause: Duration,
    /// The next attempt has a connection of its own, and none that was kept.
    pub fresh: bool,
    /// What another upstream is to get of it.
    pub copy: Option<Box<Copy>>,
    /// When it, and its present attempt, are to be over.
    pub dues: Dues,
    /// All of the request has come.
    pub is_whole: bool,
    /// Leave to send the request again, until its answer is here.
    pub permit: Option<Permit>,
    /// The attempts that came to nothing, for the log. Nothing is allocated where there are none.
    pub failed: Vec<Failed>,
    /// The present attempt, for as long as its endpoint is busy with it.
    pub attempt: Option<Attempt>,
    /// For how long endpoints were busy with it. `None` if none was connected.
    pub held: Option<Duration>,
    /// For how much longer the last one would have been busy, had it waited for the client.
    pub saved: Duration,
    /// What a filter refused and was not yet acted on.
    refused: Option<Refused>,
    /// What a filter has answered in place of the endpoint, until it is sent.
    pub answer: Option<Answer>,
    /// Why Forebay ended it, if it did.
    pub refusal: Option<&'static Refusal>,
    /// Why the last attempt failed, as long as there is no answer.
    pub failure: Option<Fault>,
    /// Its place in a trace, if there are any.
    pub trace: Option<Context>,
    /// What is noted of its attempts for its spans, if it is recorded.
    pub notes: Option<Box<Notes>>,
    /// What it does when, if somebody wants to know.
    pub journal: Option<Box<Journal>>,
}

/// An exchange as Pingora carries it from hook to hook. One that is dropped before it was settled is left to whoever
/// dropped it.
pub struct Carried(Option<Exchange>);

impl Carried {
    /// Has it carried.
    pub fn new(exchange: Exchange) -> Self {
        Carried(Some(exchange))
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
        let Some(exchange) = self.0.take_if(|exchange| exchange.clock.phase() != Phase::Finish) else { return };
        if let (Some(link), Some(connection)) = (&exchange.link, &exchange.connection)
            && link.begun()
            && !link.framed()
            && !link.is_http2()
        {
            // Nobody is to take what came for the whole.
            connection.close_with_reset();
        }
        remains::leave(Box::new(exchange));
    }
}

/// Filter states that the exchange and its response tap take turns with. There is one task, so a lock never waits;
/// it is not held while a filter runs.
pub struct FilterStates {
    states: Mutex<Option<States>>,
    refused: Mutex<Option<Refused>>,
    /// The status of the answer, from when the response filters see its header; 0 before.
    status: AtomicU16,
}

impl FilterStates {
    /// Shares `states`.
    pub fn new(states: States) -> Arc<Self> {
        Arc::new(FilterStates {
            states: Mutex::new(Some(states)),
            refused: Mutex::new(None),
            status: AtomicU16::new(0),
        })
    }

    /// Takes the states for one stage. `None` while another stage has them, which one task cannot bring about.
    pub fn take(&self) -> Option<States> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Looks at the states.
    fn with(&self, look: impl FnOnce(&States) -> bool) -> bool {
        self.states.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(look)
    }

    /// Puts them back.
    pub fn put(&self, states: States) {
        *self.states.lock().unwrap_or_else(PoisonError::into_inner) = Some(states);
    }

    /// Notes that a filter refused where the exchange is out of reach.
    pub fn refuse(&self, refused: Refused) {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(refused);
    }

    /// The status of the answer; 0 until the response filters have seen its header.
    pub fn status(&self) -> u16 {
        self.status.load(Ordering::Relaxed)
    }

    /// The header of an answer is here, with this status.
    fn answered(&self, status: StatusCode) {
        self.status.store(status.as_u16(), Ordering::Relaxed);
    }

    fn take_refused(&self) -> Option<Refused> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// One endpoint that was chosen for an exchange, until it is busy with it no longer. What became of it is told to the
/// upstream once, whatever happens: an attempt that is dropped was cancelled.
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
            window::close(socket);
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
        self.end(Outcome::Cancelled, Instant::now());
    }
}

impl Exchange {
    /// Begins an exchange with what its connection knows of it, in phase `route`.
    pub fn begin(metrics: &Metrics) -> Self {
        let begin = introduction();
        let now = Instant::now();
        let begun = begin.as_ref().map_or(now, |begin| begin.header_since);
        let mut clock = Clock::start(Phase::Header, begun);
        if let Some(accept) = begin.as_ref().and_then(|begin| begin.accept) {
            clock.credit(Phase::Accept, accept);
        }
        if let Some(handshake) = begin.as_ref().and_then(|begin| begin.handshake) {
            clock.credit(Phase::Handshake, handshake);
        }
        let routed = begin.as_ref().map_or(now, |begin| begin.header_done);
        clock.enter(Phase::Route, routed);
        eventloop::enter(Phase::Route);
        let secure = begin.as_ref().is_some_and(|begin| begin.connection.tls().is_some());
        let scheme = if secure { "https" } else { "http" };
        let journal = journal::wanted().then(|| Box::new(opened(begin.as_ref(), routed)));
        Exchange {
            clock,
            seat: metrics.enter_phase(Phase::Route, routed),
            control: begin.as_ref().and_then(|begin| begin.control.clone()),
            connection: begin.map(|begin| begin.connection),
            place: None,
            client: None,
            peer_is_trusted: false,
            scheme,
            ended_with_header: false,
            target: None,
            trailers: None,
            trailers_slot: None,
            tail: None,
            stream: None,
            interim: 0,
            grpc: None,
            upgrade: None,
            closes: false,
            switched: None,
            tunnelled: (0, 0),
            epoch: None,
            manners: Manners::default(),
            route: None,
            filters: None,
            identity: None,
            begun,
            upstream: None,
            course: None,
            hash: 0,
            stuck: None,
            tried: Vec::new(),
            attempts: 0,
            link: None,
            had_free_attempt: false,
            again: false,
            pause: Duration::ZERO,
            fresh: false,
            permit: None,
            copy: None,
            dues: Dues::default(),
            is_whole: false,
            failed: Vec::new(),
            attempt: None,
            held: None,
            saved: Duration::ZERO,
            refused: None,
            answer: None,
            refusal: None,
            failure: None,
            trace: None,
            notes: None,
            journal,
        }
    }

    /// Whom is waited for, and on whose account its bodies are held: the peer's, unless that speaks for another client.
    pub fn who(&self) -> Who {
        let connection = self.connection.as_ref();
        let peer = connection.and_then(|connection| connection.peer).map(|peer| peer.ip());
        let account = connection.and_then(|connection| connection.account()).filter(|_| self.client == peer);
        Who { client: self.client, account: account.cloned(), target: self.target.clone() }
    }

    /// Counts it among the requests of its client, unless too many are under way.
    pub fn take_place(&mut self) -> Result<(), &'static Refusal> {
        if let Some(connection) = &self.connection {
            self.place = Some(connection.begin_request()?);
        }
        Ok(())
    }

    /// Gives it its place in a trace; from here on it is noted what it does, if it is recorded. It is in `route`.
    pub fn trace(&mut self, place: Context) {
        self.trace = Some(place);
        if place.sampled {
            self.notes = Some(Box::default());
            if self.journal.is_none() {
                self.journal = Some(Box::new(self.journal_from_header()));
            }
        }
    }

    /// What keys and expressions are asked of: the target before the filters, and the header as they have left it.
    pub fn asked<'e>(&'e self, request: &'e RequestHeader) -> Asked<'e> {
        let target = self.target.as_ref().unwrap_or(&request.uri);
        let facts = self.facts(self.route.as_ref().map_or("", |route| &route.name));
        let facts = Facts { path: target.path(), ..facts };
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
        let peer = self.connection.as_ref().and_then(|connection| connection.peer);
        let path = self.target.as_ref().map(Uri::path).unwrap_or_default();
        Facts {
            client: self.client,
            port: peer.filter(|peer| Some(peer.ip()) == self.client).map_or(0, |peer| peer.port()),
            scheme: self.scheme,
            listener: self.connection.as_ref().map_or("", |connection| &connection.listener.name),
            route,
            path,
            secured: secured(self.connection.as_deref()),
            ended: self.ended_with_header,
            pace: self.pace(),
            begun: self.begun,
            status: self.filters.as_ref().map_or(0, |filters| filters.status()),
            identity: self.identity.as_deref(),
        }
    }

    /// How the client did in the last phase in which it was waited for.
    fn pace(&self) -> Pace {
        let passed = || self.link.as_ref().map(|link| link.passed()).unwrap_or_default();
        let spent = |phase: Phase| self.clock.spent(phase).filter(|_| self.clock.phase() > phase);
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
        let route = self.route.as_ref().is_some_and(|route| route.grpc);
        route && self.grpc.is_some() && self.upstream.as_ref().is_some_and(|upstream| upstream.speaks_grpc())
    }

    /// Whether it is a call of gRPC-Web that is bridged.
    pub fn is_grpc_web(&self) -> bool {
        self.grpc.is_some_and(|call| call.web)
    }

    /// What becomes of fields with odd names.
    pub fn odd_names(&self) -> OddNames {
        self.connection.as_ref().map_or(OddNames::Drop, |connection| connection.listener.odd_names)
    }

    /// Goes on to `phase`; tells when that was.
    pub fn enter(&mut self, phase: Phase) -> Instant {
        let now = Instant::now();
        if phase != self.clock.phase() {
            self.clock.enter(phase, now);
            self.seat.enter(phase, now);
            eventloop::enter(phase);
            if self.journal.is_some() {
                let note = self.note(now);
                if let Some(journal) = &mut self.journal {
                    journal.enter(phase, note);
                }
            }
        }
        now
    }

    /// An endpoint of this upstream was chosen.
    pub fn engage(&mut self, upstream: Arc<Upstream>, engaged: Engaged, now: Instant) {
        if let Some(notes) = &mut self.notes {
            notes.attempt(&upstream.name, &engaged.endpoint().label, now);
        }
        self.attempt = Some(Attempt::new(upstream, engaged, self.link.clone(), now));
    }

    /// The connection of the present attempt stands.
    pub fn connected(&mut self, reused: bool, now: Instant) {
        if let Some(attempt) = &mut self.attempt {
            attempt.connected(reused, now);
        }
        if let Some(noted) = self.notes.as_mut().and_then(|notes| notes.present()) {
            noted.reused = Some(reused);
        }
    }

    /// The exchange has ended, and so has its journal if it keeps one.
    pub fn close_journal(&mut self, now: Instant, passed: Passed) -> Option<Box<Journal>> {
        let mut journal = self.journal.take()?;
        journal.end(Note { passed: Passed { answered: journal.passed().answered, ..passed }, ..self.note(now) });
        Some(journal)
    }

    /// A journal for an exchange in `route` that was found worth one only now.
    fn journal_from_header(&self) -> Journal {
        let routed = self.clock.since();
        let header = self.clock.spent(Phase::Header).unwrap_or_default();
        let since = Tick { at: routed.checked_sub(header).unwrap_or(routed), cycle: None };
        let mut journal = Journal::begin(Phase::Header, Note::early(since));
        journal.enter(Phase::Route, Note::early(Tick { at: routed, cycle: eventloop::cycle() }));
        journal
    }

    fn note(&self, now: Instant) -> Note {
        let tick = Tick { at: now, cycle: eventloop::cycle() };
        let passed = self.link.as_ref().map(|link| link.passed()).unwrap_or_default();
        Note { tick, passed, own: own_time(now) }
    }

    /// The present attempt came to nothing, in the present phase: this is for the log.
    pub fn note_failure(&mut self, why: Why, now: Instant) {
        if let Some(attempt) = &self.attempt {
            let endpoint = Arc::clone(&attempt.endpoint.label);
            self.failed.push(Failed { endpoint, phase: self.clock.phase(), why, took: now - attempt.chosen });
        }
    }

    /// The present attempt is over, if there is one: its endpoint is busy with it no longer.
    pub fn release(&mut self, end: impl FnOnce(&Attempt) -> Outcome, now: Instant) {
        // Its connection may be another exchange's by now.
        self.tail = None;
        let Some(mut attempt) = self.attempt.take() else { return };
        if let Some(connected) = attempt.connected {
            *self.held.get_or_insert_default() += now - connected;
            if let Some(link) = &self.link {
                link.comes_through(None);
            }
        }
        let outcome = end(&attempt);
        if let Some(noted) = self.notes.as_mut().and_then(|notes| notes.present()) {
            noted.ended = Some(now);
            noted.status = attempt.answered.map(|(_, status)| status.as_u16());
            noted.failure = outcome.failure();
        }
        attempt.end(outcome, now);
    }

    /// Runs the response filters of the route on a response header, be it an endpoint's or our own.
    pub async fn filter_response(&self, request: &mut RequestHeader, response: &mut ResponseHeader) -> Verdict {
        if let (Some(route), Some(filters)) = (&self.route, &self.filters)
            && route.chain.wants(Stages::RESPONSE)
            && let Some(mut states) = filters.take()
        {
            let view = View { facts: self.facts(&route.name), request };
            let call = route.chain.response(&mut states, view, response);
            let verdict = Watch::of(self, route).during(route.chain.patience(), call, &refusal::RECEIVE_ABORTED).await;
            filters.put(states);
            filters.answered(response.status);
            return verdict;
        }
        self.filters.iter().for_each(|filters| filters.answered(response.status));
        Verdict::Continue
    }

    /// Whether a filter of the route wants to see the body of the answer, whose header all of them have seen.
    pub fn sees_body(&self) -> bool {
        let (Some(route), Some(filters)) = (&self.route, &self.filters) else { return false };
        route.chain.wants(Stages::RESPONSE_BODY) && filters.with(|states| route.chain.sees_body(states))
    }

    /// Runs the body filters of the route on the whole body of an answer that is our own.
    pub async fn filter_whole(&self, request: &mut RequestHeader, body: &mut Bytes) -> Verdict {
        if let (Some(route), Some(filters)) = (&self.route, &self.filters)
            && route.chain.wants(Stages::RESPONSE_BODY)
            && let Some(mut states) = filters.take()
        {
            let view = View { facts: self.facts(&route.name), request };
            let mut piece = Some(std::mem::take(body));
            let call = route.chain.response_body(&mut states, view, &mut piece, true);
            let patience = route.chain.patience();
            let verdict = Watch::of(self, route).during(patience, call, &refusal::RECEIVE_ABORTED).await;
            filters.put(states);
            *body = piece.unwrap_or_default();
            return verdict;
        }
        Verdict::Continue
    }

    /// Runs the trailer filters of the route on what has followed the body of the answer.
    pub fn filter_trailers(&self, request: &mut RequestHeader, trailers: &mut HeaderMap) {
        if let (Some(route), Some(filters)) = (&self.route, &self.filters)
            && route.chain.wants(Stages::RESPONSE_TRAILERS)
            && let Some(mut states) = filters.take()
        {
            let view = View { facts: self.facts(&route.name), request };
            route.chain.response_trailers(&mut states, view, trailers);
            filters.put(states);
        }
    }

    /// The two ends of the client's connection, as an endpoint may be told of them.
    pub fn parties(&self) -> Option<Parties> {
        let (connection, client) = (self.connection.as_ref()?, self.client?);
        let port = connection.peer.filter(|peer| peer.ip() == client).map_or(0, |peer| peer.port());
        Some(Parties { client: SocketAddr::new(client, port), gateway: connection.local? })
    }

    /// The endpoint of the present attempt.
    pub fn endpoint(&self) -> Option<&Arc<Endpoint>> {
        self.tried.last()
    }

    /// Notes that a filter refused; the first reason stands.
    pub fn refuse(&mut self, refused: Refused) {
        self.refused.get_or_insert(refused);
    }

    /// What a filter refused, here or in the response tap.
    pub fn take_refused(&mut self) -> Option<Refused> {
        self.refused.take().or_else(|| self.filters.as_ref()?.take_refused())
    }
}

/// The TLS of a connection, as expressions ask for it.
pub(super) fn secured(connection: Option<&Connection>) -> Secured<'_> {
    let Some(tls) = connection.and_then(Connection::tls) else { return Secured::default() };
    let (version, sni) = (tls.version, tls.name.as_deref().unwrap_or_default());
    let Some(client) = &tls.client else { return Secured { version, sni, ..Secured::default() } };
    Secured { version, sni, subject: &client.subject, names: &client.names, fingerprint: &client.fingerprint }
}

/// A journal with what came before the exchange had a context; `routed` is when it got one.
fn opened(begin: Option<&Begin>, routed: Instant) -> Journal {
    let route = Note::early(Tick { at: routed, cycle: eventloop::cycle() });
    let Some(begin) = begin else { return Journal::begin(Phase::Route, route) };
    let header = Note::early(Tick { at: begin.header_since, cycle: begin.header_in });
    let mut journal = match begin.accept {
        Some(_) => {
            let connection = &begin.connection;
            let accepted = Tick { at: connection.accepted, cycle: connection.accepted_in.as_deref().copied() };
            let mut journal = Journal::begin(Phase::Accept, Note::early(accepted));
            if let Some((begun, took)) = connection.handshake() {
                let at = |at| Note::early(Tick { at, cycle: None });
                journal.enter(Phase::Handshake, at(begun));
                journal.enter(Phase::Accept, at(begun + took));
            }
            journal.enter(Phase::Header, header);
            journal
        }
        None => Journal::begin(Phase::Header, header),
    };
    journal.enter(Phase::Route, route);
    journal
}
