//! Phase `buffer`: holds the request body back until it is complete, so that a slow upload costs no upstream anything.
//!
//! After `route`; before `select`. The clock enters the phase only if the exchange must wait for the client.

use std::sync::Arc;
use std::time::Instant;

use http::header;
use pingora::http::RequestHeader;
use pingora::protocols::http::ServerSession;
use pingora::{Error, ErrorType, Result};

use super::blame;
use super::exchange::Exchange;
use super::mirror::{Body, Copy, Mirror};
use super::receive::BodyFilters;
use super::routes::Route;
use crate::body::request::{RequestPolicy, Unread};
use crate::body::{Terms, session::BufferedSession};
use crate::client::stream::Bypass;
use crate::config::route::BufferMode;
use crate::error::{Refusal, refusal};
use crate::filter::Refused;
use crate::framing::{self, LengthFields};
use crate::metrics::mirror::MirrorOutcome;
use crate::party::{Fault, Party, What};
use crate::phase::Phase;
use crate::scheduler::Schedulers;
use crate::slow_client::min_rate::MinRate;
use crate::spool::Spools;
use crate::upstream::Upstream;

/// How a request body is handled.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Plan {
    /// There is no body, or it is streamed.
    Stream,
    /// The body is held back.
    Hold,
    Refuse(&'static Refusal),
}

/// Puts the buffered session between Pingora and the client. Lets it hold the request body back if the route requires
/// this.
///
/// # Errors
///
/// The client's error; the exchange has the reason.
pub async fn request(
    exchange: &mut Exchange,
    client: &mut Box<ServerSession>,
    route: &Route,
    upstream: &Upstream,
    spools: &Arc<Spools>,
    schedulers: &Arc<Schedulers>,
) -> Result<()> {
    let announced = if client.is_custom() && client.is_body_empty() { None } else { announced(client.req_header()) };
    let grpc = exchange.is_treated_as_grpc();
    let mut request_policy = route.request_policy.clone();
    request_policy.announced = announced;
    let mut response_policy = route.response_policy.clone();
    if grpc {
        response_policy.mode = BufferMode::Stream;
        exchange.deadlines.begin_grpc(&client.req_header().headers, route.deadline, Instant::now());
    }
    // The body of a gRPC-Web call is complete before its response begins.
    let duplex = grpc && !exchange.request.is_grpc_web();
    if duplex {
        // Either side may send at any time, so no minimum rate applies. The idle limit still applies.
        request_policy.min_rate = MinRate::unlimited();
        request_policy.duplex = true;
    }
    let plan = plan(route.holds_bodies && !duplex, &request_policy);
    if let Plan::Refuse(refusal) = plan {
        return Err(refused(exchange, refusal));
    }
    let terms = Terms {
        patience: route.patience(upstream.timeouts),
        request_policy,
        holds_body: plan == Plan::Hold,
        response_policy,
        who: exchange.client.who(exchange.request.target.clone()),
        control: exchange.client.control.clone(),
        bypass: bypass(exchange, client),
        custom: !upstream.is_http1(),
        tap: BodyFilters::of(exchange),
        spools: spools.clone(),
        schedulers: schedulers.clone(),
    };
    let (bodies, mut session) = BufferedSession::take(client, terms, exchange.progress.clock.since());
    exchange.bodies = Some(bodies);
    if plan == Plan::Hold && session.has_body() {
        let held = hold(exchange, &mut session).await;
        if let Err(unread) = held {
            session.give_back(client);
            return Err(refused(exchange, reason(exchange, unread)));
        }
    }
    if let Some(mirror) = route.mirror.as_ref().filter(|mirror| mirror.draws()) {
        exchange.copy = if exchange.request.upgrade.is_some() {
            mirror.skip(MirrorOutcome::Upgrade);
            None
        } else {
            copy(mirror, &mut session, grpc, plan)
        };
    }
    session.stand_in(client);
    Ok(())
}

/// The path past one of Forebay's own HTTP/1 sessions. Pingora's own session, for a client that asks for another
/// protocol, writes itself.
fn bypass(exchange: &Exchange, client: &ServerSession) -> Option<Bypass> {
    exchange.client.bypass.as_ref().filter(|_| client.is_custom())?.bypass()
}

/// Prepares the request's copy for a mirror.
fn copy(mirror: &Arc<Mirror>, session: &mut BufferedSession, grpc: bool, plan: Plan) -> Option<Box<Copy>> {
    if grpc {
        mirror.skip(MirrorOutcome::Grpc);
        return None;
    }
    let body = match plan {
        _ if !session.has_body() => Body::Empty,
        Plan::Hold => session.share_memory().map_or(Body::Large, Body::Whole),
        _ => Body::Streamed,
    };
    mirror.copy(body)
}

async fn hold(exchange: &mut Exchange, session: &mut BufferedSession) -> Result<(), Unread> {
    invite(session).await?;
    let mut waits = || {
        exchange.enter(Phase::Buffer);
    };
    session.fill(&mut waits).await
}

/// Responds to `Expect: 100-continue`, and removes the field from the request for the upstream.
async fn invite(session: &mut BufferedSession) -> Result<(), Unread> {
    let request = session.request_mut();
    let expects = request.headers.get_all(header::EXPECT).iter().map(|expect| expect.as_bytes());
    if !framing::names(expects, "100-continue") {
        return Ok(());
    }
    request.remove_header(&header::EXPECT);
    session.invite().await.map_err(Unread::Failed)
}

fn plan(holds: bool, request_policy: &RequestPolicy) -> Plan {
    if request_policy.announced.is_some_and(|length| length > request_policy.max_body) {
        return Plan::Refuse(&refusal::BUFFER_TOO_LARGE);
    }
    if !holds {
        return Plan::Stream;
    }
    let room = request_policy.limits.memory.saturating_add(request_policy.limits.disk);
    match request_policy.announced {
        Some(length) if length > room && !request_policy.stream_large => Plan::Refuse(&refusal::BUFFER_TOO_LARGE),
        // The announced body may never arrive, so only a received body that does not fit is streamed.
        _ => Plan::Hold,
    }
}

fn announced(request: &RequestHeader) -> Option<u64> {
    match framing::request::read(request.version, &LengthFields::of(&request.headers)) {
        Ok(framing::Body::Length(length)) => Some(length),
        _ => None,
    }
}

fn reason(exchange: &Exchange, unread: Unread) -> &'static Refusal {
    let client = |what| Fault::new(Party::Client, Phase::Buffer, what);
    let found = exchange.client.fault();
    let fault = match (found, unread) {
        (Some(Fault { what: What::Malformed, .. }), _) => client(What::Malformed),
        (Some(fault), _) | (None, Unread::Fault(fault)) => fault,
        (None, Unread::Failed(error)) => match error.etype() {
            ErrorType::ConnectionClosed | ErrorType::ReadError | ErrorType::H2Error => client(What::Left),
            // Pingora's own parser of chunks and trailers reports these.
            _ => client(What::Malformed),
        },
    };
    blame::row(fault).refusal
}

fn refused(exchange: &mut Exchange, refusal: &'static Refusal) -> Box<Error> {
    exchange.filters.refuse(Refused { refusal, headers: Vec::new() });
    Error::explain(ErrorType::ReadError, refusal.reason).into_down()
}
