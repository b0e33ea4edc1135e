//! Phase `finish`: the exchange is settled. Filters hear of its end, metrics and the access log are written.
//!
//! The last phase. It adds nothing that a client waits for: its answer has left.

use std::time::{Instant, SystemTime};

use http::header;
use pingora::http::RequestHeader;
use pingora::protocols::http::ServerSession;

use super::exchange::Exchange;
use crate::access_log::{AccessLog, Record};
use crate::eventloop::own_time;
use crate::filter::{Outcome, Stages, View};
use crate::metrics::{RouteMetrics, Summary, UNROUTED};
use crate::phase::Phase;

const REQUEST_ID: http::HeaderName = http::HeaderName::from_static("x-request-id");

/// Settles the exchange.
pub fn settle(exchange: &mut Exchange, session: &mut ServerSession, unrouted: &RouteMetrics, log: Option<&AccessLog>) {
    exchange.enter(Phase::Finish);
    // If the client's session was lost with a write that was given up, its stand-in knows.
    let (answered, received, sent) = match &exchange.link {
        Some(link) if session.is_custom() => link.outcome(),
        _ => (
            session.response_written().map_or(0, |response| response.status.as_u16()),
            session.body_bytes_read() as u64,
            session.body_bytes_sent() as u64,
        ),
    };
    let status = match exchange.refusal {
        Some(refusal) if answered < 200 && answered != 101 => refusal.status,
        _ => answered,
    };
    end_filters(exchange, session.req_header_mut(), status);

    let now = Instant::now();
    exchange.clock.settle(now);
    let own = own_time(now);
    let route = exchange.route.as_ref();
    let metrics = route.map_or(unrouted, |route| &route.metrics);
    let blocked = exchange.link.as_ref().map(|link| link.blocked()).unwrap_or_default();
    let (held, saved) = (exchange.held, exchange.saved);
    let (buffered, spilled) = exchange.link.as_ref().map(|link| link.spooled()).unwrap_or_default();
    metrics.record(&Summary { clock: &exchange.clock, own, blocked, held, saved, status, received, sent });
    if let Some(refusal) = exchange.refusal {
        refusal.count();
    }

    let Some(log) = log else { return };
    let request = session.req_header();
    let field = |name| request.headers.get(name).map(|value| value.as_bytes());
    log.record(&Record {
        time: SystemTime::now(),
        listener: exchange.connection.as_ref().map_or("", |connection| &connection.listener.name),
        client: exchange.client,
        method: request.method.as_str(),
        host: field(header::HOST).unwrap_or_default(),
        target: target(exchange, request),
        protocol: protocol(request.version),
        status,
        received,
        sent,
        buffered,
        spilled,
        held,
        saved,
        clock: &exchange.clock,
        own,
        route: route.map_or(UNROUTED, |route| &route.name),
        upstream: exchange.upstream.as_ref().map(|upstream| &*upstream.name),
        endpoint: exchange.endpoint().map(|endpoint| &*endpoint.label),
        attempts: exchange.attempts,
        reason: exchange.refusal.map(|refusal| refusal.reason),
        request_id: field(REQUEST_ID),
        referer: field(header::REFERER),
        user_agent: field(header::USER_AGENT),
    });
}

fn end_filters(exchange: &Exchange, request: &mut RequestHeader, status: u16) {
    if let (Some(route), Some(filters)) = (&exchange.route, &exchange.filters)
        && route.chain.wants(Stages::END)
        && let Some(mut states) = filters.take()
    {
        let view = View { client: exchange.client, scheme: exchange.scheme, route: &route.name, request };
        route.chain.end(&mut states, view, Outcome { status, refusal: exchange.refusal });
    }
}

/// The target as the client sent it.
fn target<'e>(exchange: &'e Exchange, request: &'e RequestHeader) -> &'e [u8] {
    match exchange.target.as_ref().and_then(|target| target.path_and_query()) {
        Some(target) => target.as_str().as_bytes(),
        None => request.uri.path_and_query().map_or(request.raw_path(), |target| target.as_str().as_bytes()),
    }
}

fn protocol(version: http::Version) -> &'static str {
    match version {
        http::Version::HTTP_10 => "HTTP/1.0",
        http::Version::HTTP_2 => "HTTP/2.0",
        _ => "HTTP/1.1",
    }
}
