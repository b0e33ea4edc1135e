//! Phase `finish`: settles the exchange. Filters are notified of its end; metrics and the access log are written.
//!
//! The last phase. No client waits for it: the response was sent.

use std::sync::Arc;
use std::time::Instant;

use http::{HeaderMap, Method, header};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::http::ServerSession;

use super::blame;
use super::exchange::Exchange;
use super::fault;
use crate::access_log::AccessLog;
use crate::client::remains::{Remains, SettlesExchanges};
use crate::expression::Asked;
use crate::expression::facts::Response;
use crate::expression::named::NamedText;
use crate::filter::{Outcome, Stages, View};
use crate::finished::{Client, Finished, Request, Routing};
use crate::metrics::{RouteMetrics, Summary, UNROUTED};
use crate::party::{Fault, Party, What};
use crate::phase::Phase;
use crate::phase::journal::{Journal, Passed};
use crate::recorder::Recorder;
use crate::scheduler::task::own_time;
use crate::spans::context::TRACESTATE;
use crate::spans::{AttemptNotes, TraceData, TraceId, TraceParent, Tracer};
use crate::upstream::Outcome as Became;

const REQUEST_ID: http::HeaderName = http::HeaderName::from_static("x-request-id");

/// Settles exchanges, and reports each to the log, the tracer and recordings.
pub struct Settler {
    /// The metrics of requests without a route.
    pub unrouted: Arc<RouteMetrics>,
    /// The access log.
    pub log: Option<Arc<AccessLog>>,
    /// The tracer, if tracing is on.
    pub tracer: Option<Arc<Tracer>>,
    /// Recordings of exchanges with their phases.
    pub recorder: Recorder,
}

/// The final status and byte counts.
struct Totals {
    /// The status for the log.
    status: u16,
    /// Bytes of the request body.
    received: u64,
    /// Bytes of the response body.
    sent: u64,
}

impl Settler {
    /// Settles an exchange that has ended.
    pub fn settle(&self, exchange: &mut Exchange, session: &mut ServerSession) {
        let now = exchange.enter(Phase::Finish);
        // If the client's session was lost with an abandoned write, the buffered session has the counts.
        let (answered, received, sent) = match &exchange.bodies {
            Some(bodies) if bodies.stands_in() => bodies.outcome(),
            bodies => {
                // Only the buffered session counts bytes that were read or sent past the client's session.
                let (_, received, sent) = bodies.as_ref().map(|bodies| bodies.outcome()).unwrap_or_default();
                (
                    session.response_written().map_or(0, |response| response.status.as_u16()),
                    received.max(session.body_bytes_read() as u64),
                    sent.max(session.body_bytes_sent() as u64),
                )
            }
        };
        let status = match (exchange.refusal, exchange.request.grpc.and_then(|call| call.stands_for)) {
            (_, Some(stands_for)) if answered > 0 => stands_for,
            (Some(refusal), _) if answered < 200 && answered != 101 => refusal.status,
            _ => answered,
        };
        let now = if end_filters(exchange, session.req_header_mut(), status) { Instant::now() } else { now };
        exchange.progress.clock.settle(now);
        let messages = (Some(session.req_header()), session.response_written());
        self.tell(exchange, messages, Totals { status, received, sent }, now);
    }

    /// Reports an exchange, with as much of the two headers as is known.
    fn tell(
        &self,
        exchange: &mut Exchange,
        (request, response): (Option<&RequestHeader>, Option<&ResponseHeader>),
        Totals { status, received, sent }: Totals,
        now: Instant,
    ) {
        let notes = exchange.traced.as_mut().and_then(|traced| traced.notes.take());
        let journal = exchange.progress.close_journal(now, Passed { received, sent, ..Passed::default() });
        let summary = Summary {
            clock: &exchange.progress.clock,
            own: own_time(now),
            blocked: exchange.bodies.as_ref().map(|bodies| bodies.blocked()).unwrap_or_default(),
            held: exchange.attempts.busy.held,
            saved: exchange.attempts.busy.saved,
            status,
            received,
            sent,
            refusal: exchange.refusal,
        };
        exchange.routing.route.as_ref().map_or(&self.unrouted, |route| &route.metrics).record(&summary);
        if self.log.is_none() && journal.is_none() {
            return;
        }
        let finished = finished(exchange, request, summary, now);
        let asked = || request.map(|request| asked(exchange, request, status, response));
        if let Some(journal) = journal.as_ref().filter(|_| self.recorder.is_recording()) {
            self.recorder.ended(&finished, journal);
        }
        if let (Some(tracer), Some(notes), Some(journal)) = (&self.tracer, notes, journal)
            && let Some(asked) = asked()
        {
            let attributes = tracer.attributes.of(&asked);
            let text = |(name, text): &NamedText<'_>| (Box::from(*name), String::from_utf8_lossy(text).into());
            let attributes = attributes.iter().map(text).collect();
            tracer.tell(TraceData { attributes, ..trace_data(exchange, (notes, journal), &finished, asked.headers) });
        }
        if let Some(log) = &self.log {
            let asked = if log.fields.is_empty() { None } else { asked() };
            log.record(&finished, &asked.as_ref().map(|asked| log.fields.of(asked)).unwrap_or_default());
        }
    }
}

impl SettlesExchanges for Settler {
    /// Settles an exchange that was dropped because it had to end during a wait that nothing else aborts.
    fn settle(&self, remains: Remains) {
        let Some(mut exchange) = remains.exchange.and_then(|left| left.downcast::<Exchange>().ok()) else { return };
        let found = || fault::found(&exchange).unwrap_or(Fault::new(Party::Gateway, Phase::Finish, What::Stopped));
        let refusal = exchange.refusal.unwrap_or_else(|| blame::row(found()).refusal);
        exchange.refusal = Some(refusal);
        let now = exchange.enter(Phase::Finish);
        exchange.release(|_| Became::Cancelled, now);
        let switched = exchange.switched.take().map(|switched| *switched);
        let (answered, received, sent) = match &exchange.bodies {
            Some(bodies) => bodies.outcome(),
            // The session with the counts is gone.
            None => switched.as_ref().map_or((0, 0, 0), |switched| (0, switched.received, switched.sent)),
        };
        let mut request = remains.request.or_else(|| switched.map(|switched| switched.request));
        let is_raw = exchange.client.connection.as_ref().is_some_and(|connection| connection.is_raw());
        let status = if is_raw {
            101
        } else if answered >= 200 {
            answered
        } else {
            refusal.status
        };
        if let Some(request) = &mut request {
            end_filters(&exchange, request, status);
        }
        let now = Instant::now();
        exchange.progress.clock.settle(now);
        self.tell(&mut exchange, (request.as_ref(), None), Totals { status, received, sent }, now);
    }
}

/// Builds the report of an exchange that ended `at` this time, with these figures.
fn finished<'e>(
    exchange: &'e Exchange,
    request: Option<&'e RequestHeader>,
    summary: Summary<'e>,
    at: Instant,
) -> Finished<'e> {
    let (mut host, mut id, mut referer, mut user_agent) = (None, None, None, None);
    // One pass costs less than four look-ups. Of several fields, the first counts.
    for (name, value) in request.iter().flat_map(|request| &request.headers) {
        let field = match *name {
            header::HOST => &mut host,
            header::REFERER => &mut referer,
            header::USER_AGENT => &mut user_agent,
            _ if *name == REQUEST_ID => &mut id,
            _ => continue,
        };
        field.get_or_insert(value.as_bytes());
    }
    let (routing, tls) = (&exchange.routing, exchange.client.tls());
    let client = Client {
        listener: exchange.client.listener(),
        address: exchange.client.address,
        peer: exchange.client.peer(),
        tls: tls.map(|tls| tls.version),
        subject: tls.and_then(|tls| tls.client.as_ref()).map(|client| &*client.subject),
    };
    let (buffered, spilled) = exchange.bodies.as_ref().map(|bodies| bodies.spooled()).unwrap_or_default();
    Finished {
        request: Request {
            method: request.map_or("", |request| request.method.as_str()),
            host: host.unwrap_or_default(),
            target: target(exchange, request),
            protocol: request.map_or("", |request| protocol(request.version)),
            id,
            referer,
            user_agent,
        },
        routing: Routing {
            route: routing.route.as_ref().map_or(UNROUTED, |route| &route.name),
            upstream: routing.upstream.as_ref().map(|upstream| &*upstream.name),
            endpoint: exchange.attempts.endpoint().map(|endpoint| &*endpoint.label),
            attempts: exchange.attempts.count,
            failed: &exchange.attempts.failed,
            handed_over: routing.course.and_then(|course| course.reason()).map(|reason| reason.name()),
        },
        buffered,
        spilled,
        grpc_status: exchange.request.grpc.and_then(|call| call.status),
        trace: trace(exchange, request),
        ..Finished::new(at, client, summary)
    }
}

/// The trace of the exchange: Forebay's own, or else the one that the client names.
fn trace(exchange: &Exchange, request: Option<&RequestHeader>) -> Option<TraceId> {
    let place = exchange.traced.as_ref().map(|traced| traced.place.trace);
    place.or_else(|| TraceParent::of(&request?.headers).map(|parent| parent.trace))
}

/// The input for additional log fields and span attributes.
fn asked<'e>(
    exchange: &'e Exchange,
    request: &'e RequestHeader,
    status: u16,
    response: Option<&'e ResponseHeader>,
) -> Asked<'e> {
    let headers = response.map(|response| &response.headers);
    Asked { response: Some(Response { code: status, headers }), ..exchange.asked(request) }
}

/// The facts for spans, copied, since they outlive the exchange.
fn trace_data(
    exchange: &Exchange,
    (notes, journal): (Box<AttemptNotes>, Box<Journal>),
    finished: &Finished<'_>,
    headers: &HeaderMap,
) -> TraceData {
    let text = |bytes: &[u8]| Box::<str>::from(String::from_utf8_lossy(bytes));
    let context = exchange.traced.as_ref().expect("a recorded exchange has a place in a trace").place;
    let Finished { client, request, routing, summary, .. } = finished;
    TraceData {
        context,
        notes,
        journal,
        state: context.parent.and_then(|_| headers.get(TRACESTATE).cloned()),
        ended: (finished.at, finished.time),
        listener: client.listener.into(),
        method: Method::from_bytes(request.method.as_bytes()).unwrap_or_default(),
        scheme: exchange.request.scheme,
        host: text(request.host),
        target: text(request.target),
        version: version(request.protocol),
        client: client.address,
        peer: client.peer,
        user_agent: request.user_agent.map(text),
        request_id: request.id.map(text),
        route: routing.route.into(),
        status: summary.status,
        refusal: summary.refusal,
        attributes: Box::default(),
    }
}

/// Notifies the filters of the end. `false`: there are none.
fn end_filters(exchange: &Exchange, request: &mut RequestHeader, status: u16) -> bool {
    if let (Some(route), Some(filters)) = (&exchange.routing.route, &exchange.filters.states)
        && route.chain.wants(Stages::END)
        && let Some(mut states) = filters.take()
    {
        let view = View { facts: exchange.facts(&route.name), request };
        route.chain.end(&mut states, view, Outcome { status, refusal: exchange.refusal });
        return true;
    }
    false
}

/// The target before filters, with its canonical path.
fn target<'e>(exchange: &'e Exchange, request: Option<&'e RequestHeader>) -> &'e [u8] {
    match (exchange.request.target.as_ref().and_then(|target| target.path_and_query()), request) {
        (Some(target), _) => target.as_str().as_bytes(),
        (None, Some(request)) => {
            request.uri.path_and_query().map_or(request.raw_path(), |target| target.as_str().as_bytes())
        }
        (None, None) => b"",
    }
}

/// The protocol version in the notation of the tracing conventions.
fn version(protocol: &str) -> &'static str {
    match protocol {
        "HTTP/1.0" => "1.0",
        "HTTP/2.0" => "2",
        _ => "1.1",
    }
}

fn protocol(version: http::Version) -> &'static str {
    match version {
        http::Version::HTTP_10 => "HTTP/1.0",
        http::Version::HTTP_2 => "HTTP/2.0",
        _ => "HTTP/1.1",
    }
}
