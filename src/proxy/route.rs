//! Phase `route`: finds the route of a request and runs its filters.
//!
//! After `header`; before `buffer` and `select`, unless a filter responds or refuses.

use std::sync::Arc;
use std::time::Instant;

use http::header;
use pingora::http::RequestHeader;

use super::exchange::Exchange;
use super::exchange::filters::FilterStates;
use super::generation::Generation;
use super::grpc;
use super::header::{names, without_port};
use super::https;
use super::routes::Route;
use super::routes::table::{Query, Table};
use crate::client::challenges::Challenges;
use crate::client::fields;
use crate::error::{Refusal, refusal};
use crate::eventloop::worker::take_route;
use crate::expression::{Asked, Condition};
use crate::filter::{Refused, Stages, Verdict, View};

/// Finds the route of a request.
pub fn find<'t>(
    exchange: &Exchange,
    routes: &'t Table<Arc<Route>>,
    request: &RequestHeader,
) -> Result<&'t Arc<Route>, &'static Refusal> {
    let mut asked = None;
    let found = routes.find(&query(request), |route, when| {
        // The facts are the same for all conditions, except the route's name.
        let asked = asked.get_or_insert_with(|| asked_of(exchange, &route.name, request));
        asked.facts.route = &route.name;
        when.holds(asked)
    });
    found.ok_or(&refusal::ROUTE_NO_MATCH)
}

/// The input of conditions before filters change anything.
fn asked_of<'a>(exchange: &'a Exchange, route: &'a str, request: &'a RequestHeader) -> Asked<'a> {
    exchange.facts_at(route, request.uri.path()).asked(request)
}

/// The query of a request for the route table.
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

/// Whether a condition of the route with this name holds for a request.
pub fn holds(exchange: &Exchange, route: &str, request: &RequestHeader, when: &Condition) -> bool {
    when.holds(&asked_of(exchange, route, request))
}

/// Decides everything about a request before filters see it: whether it may pass, whether Forebay responds itself, and
/// which route it takes. Calls `checked` after the checks and before the look-up.
///
/// # Errors
///
/// The response or refusal for a request that does not reach a route.
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
    if route.grpc.web && exchange.request.grpc.is_none() {
        exchange.request.grpc = grpc::Call::of_web(request);
    }
    if exchange.request.grpc.is_some() && !route.grpc.only {
        // gRPC metadata may have unusual names, but not every possible recipient speaks gRPC.
        names::drop_odd(request, exchange.client.odd_names());
    }
    settle_upgrade(&route, request);
    Ok(route)
}

/// Sets the route and runs its request filters.
///
/// Filters and the copy for a mirror see the field names as spelled in `written`. The spelling is copied only for them,
/// since that takes as long as dozens of conditions.
pub async fn take(exchange: &mut Exchange, route: Arc<Route>, request: &mut RequestHeader, written: &[u8]) -> Verdict {
    take_route(&route.tag);
    let mut states = route.chain.states();
    let (mut acts, mut may_act) = (false, false);
    if route.chain.wants(Stages::ALL) {
        if let Some(notebook) = exchange.progress.notebook() {
            states.note_in(notebook);
        }
        acts = route.chain.acts_on_request(&mut states, || asked_of(exchange, &route.name, request));
        may_act = acts || route.chain.may_act(&states);
    }
    if (route.mirror.is_some() || may_act) && fields::spell_out(request, written).is_err() {
        return Verdict::Refuse(Refused::from(&refusal::HEADER_MALFORMED));
    }
    if may_act {
        exchange.request.target = Some(request.uri.clone());
    }
    if !acts {
        exchange.filters.states = may_act.then(|| FilterStates::new(states));
        exchange.routing.route = Some(route);
        return Verdict::Continue;
    }
    let mut client = exchange.watch(&route);
    let view = View { facts: exchange.facts(&route.name), request };
    let call = route.chain.request(&mut states, view);
    // Boxed: exchanges without filters would be as large, too.
    let verdict = Box::pin(client.during(route.chain.patience(), call, &refusal::ROUTE_ABORTED)).await;
    exchange.client.identity = states.identity().cloned();
    exchange.filters.states = Some(FilterStates::new(states));
    exchange.routing.route = Some(route);
    verdict
}

/// Removes an `Upgrade` that the route does not allow: the request is then an ordinary one.
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
