//! Phase `route`: which route a request takes, and what its filters say.
//!
//! After `header`; before `buffer` and `select`, unless a filter answered or refused.

pub mod path;
pub mod table;

use std::sync::Arc;
use std::time::Instant;

use http::header;
use pingora::http::RequestHeader;

use super::exchange::Exchange;
use super::exchange::filters::FilterStates;
use super::generation::Generation;
use super::grpc;
use super::header::names;
use super::header::upgrade::Upgrades;
use super::https;
use super::mirror::Mirror;
use super::retry::Rules;
use super::watch::Watch;
use crate::client::challenges::Challenges;
use crate::client::intake::IntakeTerms;
use crate::client::wire::Manner;
use crate::error::{Refusal, refusal};
use crate::eventloop::worker::{RouteTag, take_route};
use crate::expression::{Condition, Facts};
use crate::filter::{Chain, Stages, Verdict, View};
use crate::metrics::RouteMetrics;
use crate::party::Patience;
use crate::upstream::{Split, Timeouts, Upstream};
use table::{Query, Table};

/// A route as it runs.
pub struct Route {
    /// Its name in metrics and logs.
    pub name: String,
    /// Its filters.
    pub chain: Chain,
    /// Where its requests go.
    pub destination: Destination,
    /// Whether gRPC calls are treated as such.
    pub grpc: bool,
    /// They are, and each of its upstreams speaks gRPC.
    pub only_grpc: bool,
    /// Calls of gRPC-Web become calls of gRPC.
    pub grpc_web: bool,
    /// Whether its request bodies are held back until they are whole.
    pub holds_bodies: bool,
    /// How its request bodies are taken.
    pub intake: IntakeTerms,
    /// How its answers leave.
    pub manner: Manner,
    /// Who gets copies of its requests.
    pub mirror: Option<Arc<Mirror>>,
    /// How long an exchange may take as a whole.
    pub deadline: Option<std::time::Duration>,
    /// When a request that failed is sent again.
    pub retry: Rules,
    /// Protocols that its clients may switch to.
    pub upgrades: Upgrades,
    /// How long its clients may take between two pieces of a response.
    pub write_idle: std::time::Duration,
    /// Whether a client that closes its sending side behind its request is gone.
    pub half_close_aborts: bool,
    /// Names it where a worker is found stalled.
    pub tag: RouteTag,
    /// Its counters.
    pub metrics: Arc<RouteMetrics>,
}

/// Where the requests of a route go.
pub enum Destination {
    /// Nowhere: a filter answers all of them.
    Nowhere,
    /// To one upstream.
    One(Arc<Upstream>),
    /// To several, by weight.
    Split(Split<Arc<Upstream>>),
}

impl Destination {
    /// The upstream of the next request.
    pub fn next(&self) -> Option<&Arc<Upstream>> {
        match self {
            Destination::Nowhere => None,
            Destination::One(upstream) => Some(upstream),
            Destination::Split(split) => Some(split.pick()),
        }
    }
}

impl Route {
    /// How long the upstream may take.
    pub fn patience(&self, timeouts: Timeouts) -> Patience {
        Patience { send: timeouts.send, wait: timeouts.wait, receive: timeouts.receive }
    }
}

/// Finds the route of a request.
pub fn find<'t>(
    exchange: &Exchange,
    routes: &'t Table<Arc<Route>>,
    request: &RequestHeader,
) -> Result<&'t Arc<Route>, &'static Refusal> {
    let found = routes.find(&query(request), |route, when| holds(exchange, &route.name, request, when));
    found.ok_or(&refusal::ROUTE_NO_MATCH)
}

/// What the table is asked for a request.
pub fn query(request: &RequestHeader) -> Query<'_> {
    let host = request.headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    Query {
        method: &request.method,
        host: without_port(host),
        path: request.uri.path(),
        query: request.uri.query(),
        headers: &request.headers,
    }
}

/// Whether a condition of the route of this name holds for a request.
pub fn holds(exchange: &Exchange, route: &str, request: &RequestHeader, when: &Condition) -> bool {
    let facts = Facts { path: request.uri.path(), ..exchange.facts(route) };
    when.holds(&facts.asked(request))
}

/// Everything about a request before filters see it: whether it may pass, whether Forebay answers it itself, and the
/// route that takes it. `checked` hears of it between the two.
///
/// # Errors
///
/// What is done with a request that comes to no route.
pub fn decide(
    exchange: &mut Exchange,
    generation: &Generation,
    challenges: &Challenges,
    request: &mut RequestHeader,
    checked: impl FnOnce(&mut Exchange, &RequestHeader),
) -> Result<Arc<Route>, Verdict> {
    exchange.request.grpc = grpc::Call::of(request);
    let passes = super::header::check(exchange, request, &generation.rules);
    checked(exchange, request);
    passes.and_then(|()| exchange.client.take_place()).map_err(Verdict::from)?;
    if let Some(verdict) = https::prove(challenges, request).or_else(|| https::redirect(exchange, request)) {
        return Err(verdict);
    }
    let route = find(exchange, &generation.routes, request).map_err(Verdict::from)?.clone();
    if route.grpc_web && exchange.request.grpc.is_none() {
        exchange.request.grpc = grpc::Call::of_web(request);
    }
    if exchange.request.grpc.is_some() && !route.only_grpc {
        // Metadata of gRPC may have odd names; but not all who could get these speak it.
        names::drop_odd(request, exchange.client.odd_names());
    }
    settle_upgrade(&route, request);
    Ok(route)
}

/// Takes the route and runs its request filters.
pub async fn take(exchange: &mut Exchange, route: Arc<Route>, request: &mut RequestHeader) -> Verdict {
    take_route(&route.tag);
    if !route.chain.wants(Stages::ALL) {
        exchange.routing.route = Some(route);
        return Verdict::Continue;
    }
    exchange.request.target = Some(request.uri.clone());
    let mut states = route.chain.states();
    let mut client = Watch::of(exchange, &route);
    let view = View { facts: exchange.facts(&route.name), request };
    let call = route.chain.request(&mut states, view);
    let verdict = client.during(route.chain.patience(), call, &refusal::ROUTE_ABORTED).await;
    exchange.client.identity = states.identity().cloned();
    exchange.filters.states = Some(FilterStates::new(states));
    exchange.routing.route = Some(route);
    verdict
}

/// Leaves of an `Upgrade` what the route allows; else it is an ordinary request.
pub fn settle_upgrade(route: &Route, request: &mut RequestHeader) {
    let Some(protocol) = request.headers.get(header::UPGRADE).filter(|protocol| !route.upgrades.allow(protocol)) else {
        return;
    };
    if route.upgrades.may_tell(Instant::now()) {
        let protocol = String::from_utf8_lossy(protocol.as_bytes());
        tracing::warn!(route = %route.name, ?protocol, "a client asks for a protocol that its route does not allow; see `upgrades`");
    }
    request.remove_header(&header::UPGRADE);
}

pub(super) fn without_port(host: &str) -> &str {
    match host.rfind(':') {
        Some(colon) if !host.ends_with(']') => &host[..colon],
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_no_part_of_the_name() {
        assert_eq!(without_port("a.example:8080"), "a.example");
        assert_eq!(without_port("a.example"), "a.example");
        assert_eq!(without_port("[::1]:80"), "[::1]");
        assert_eq!(without_port("[::1]"), "[::1]");
    }
}
