//! Phases `wait` and `receive`: the response is received from the endpoint.
//!
//! `wait` ends with the complete response header; `receive` ends with the last byte from the endpoint, and `write`
//! begins.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::http::ServerSession;
use pingora::{Error, ErrorType, Result};

use super::exchange::client::secured;
use super::exchange::filters::FilterStates;
use super::exchange::{Exchange, Switched};
use super::grpc::web;
use super::https;
use super::routes::Route;
use super::upgrade;
use super::watch::Watch;
use crate::body::Tap;
use crate::client::connection::Connection;
use crate::client::trailers;
use crate::error::refusal;
use crate::expression::{Author, Facts, Identity, Pace, Prefix};
use crate::filter::{Refused, Stages, Verdict, View};
use crate::framing::{LengthFields, answer, is_media_type};
use crate::phase::Phase;
use crate::upstream::transport::tunnel::Tunnel;

/// The field by which an endpoint disables buffering, as in nginx. It is not forwarded to the client.
const X_ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");
/// Maximum number of interim responses before a final one.
const INTERIM_MAX: u32 = 1_000;

/// If this response accepts the client's request for another protocol, restores the client's own session, and both
/// sides exchange raw bytes. Before that, and with any other response, the limits of an exchange apply.
pub fn switch(exchange: &mut Exchange, client: &mut Box<ServerSession>, response: &ResponseHeader) -> Result<()> {
    let agreed = exchange.request.upgrade.as_ref().is_some_and(|protocol| upgrade::agrees(response, protocol));
    if response.status != StatusCode::SWITCHING_PROTOCOLS || !agreed {
        return Ok(());
    }
    if let Some(bodies) = exchange.bodies.take()
        && !bodies.step_aside(client)
    {
        return Err(Error::new_in(ErrorType::InternalError));
    }
    exchange.deadlines.lift();
    exchange.switched = Some(Box::new(Switched::new(client.req_header().clone())));
    Ok(())
}

/// Normalises the framing fields of an interim or final response header to those of HTTP/1.1, for any protocol of the
/// endpoint. Pingora relies on them; the sender of the response sets them again for the client.
///
/// # Errors
///
/// The endpoint's error.
pub fn frame(request: &RequestHeader, response: &mut ResponseHeader) -> Result<()> {
    let length_fields = LengthFields::of(&response.headers);
    let (head, status) = (request.method == Method::HEAD, response.status.as_u16());
    let framed = answer::frame(head, status, response.version, &length_fields, Version::HTTP_11)
        .map_err(|fault| Error::explain(ErrorType::InvalidHTTPHeader, fault.words()).into_up())?;
    framed.apply(&length_fields, response)?;
    if response.version != Version::HTTP_2 {
        // The client receives Forebay's version (RFC 9110 §6.2), and fields may have been added that HTTP/1.0 does not
        // define.
        response.set_version(Version::HTTP_11);
    }
    Ok(())
}

/// Handles the response header.
pub async fn header(
    exchange: &mut Exchange,
    request: &mut RequestHeader,
    response: &mut ResponseHeader,
    via: bool,
) -> Result<()> {
    let switches = response.status == StatusCode::SWITCHING_PROTOCOLS;
    if response.status.is_informational() && !switches {
        return interim(exchange, response);
    }
    if is_out_of_place(exchange, response.status) {
        return Err(malformed(exchange));
    }
    begin(exchange, request, response);
    have_client_stay(exchange, response)?;
    if switches {
        switched(exchange);
        return Ok(());
    }
    let protocols = protocols_required(request, response);
    strip_hop_by_hop(response);
    for protocol in protocols {
        // The client's `Connection` field names it when the header is written.
        response.append_header(header::UPGRADE, protocol)?;
    }
    // Comparing names costs less than a look-up, and most responses have no such field.
    let asked_to_stream = response.headers.keys().any(|name| *name == X_ACCEL_BUFFERING)
        && response
            .remove_header(&X_ACCEL_BUFFERING)
            .is_some_and(|buffering| buffering.as_bytes().eq_ignore_ascii_case(b"no"));
    if let Some(bodies) = &exchange.bodies
        && (asked_to_stream || is_event_stream(response))
    {
        bodies.stream_answer();
    }
    if via {
        response.append_header(header::VIA, HeaderValue::from_static("1.1 forebay"))?;
    }
    if let Some(call) = exchange.request.grpc.as_mut().filter(|call| call.web) {
        call.answers_web = web::to_client(response)?;
        if call.answers_web {
            unfix_length(request, response)?;
        }
    }
    match exchange.filter_response(request, response, Author::Endpoint).await {
        Verdict::Continue => {}
        Verdict::Refuse(refused) => {
            exchange.filters.refuse(refused);
            return Err(Error::new_in(ErrorType::InternalError));
        }
        Verdict::Answer(answer) => {
            exchange.filters.answer = Some(answer);
            return Err(Error::new_in(ErrorType::InternalError));
        }
    }
    https::insist(exchange, response);
    if exchange.sees_body() {
        unfix_length(request, response)?;
        if let Some(bodies) = exchange.bodies.as_ref().filter(|_| exchange.holds_answer()) {
            bodies.hold_answer();
        }
    }
    announce_trailers(exchange, request, response)
}

/// Whether a client could not process a response with this status, or would misinterpret it.
fn is_out_of_place(exchange: &Exchange, status: StatusCode) -> bool {
    if status == StatusCode::SWITCHING_PROTOCOLS {
        // A 101 without a request for it is invalid (RFC 9110 §15.2.2). The client's next bytes are its next request,
        // which must be checked.
        return exchange.bodies.is_some();
    }
    // Over HTTP/2 it would start the other protocol (RFC 9110 §9.3.6).
    let carried = exchange.client.connection.as_ref().is_some_and(|connection| connection.is_carried());
    carried && status.is_success()
}

/// Refuses a response that cannot be forwarded.
fn malformed(exchange: &mut Exchange) -> Box<Error> {
    exchange.filters.refuse(Refused::from(&refusal::WAIT_MALFORMED));
    Error::new_up(ErrorType::InvalidHTTPHeader)
}

/// Begins the final response, and notifies those that wait for it.
fn begin(exchange: &mut Exchange, request: &RequestHeader, response: &ResponseHeader) {
    let now = exchange.enter(Phase::Receive);
    exchange.client.connection.iter().for_each(|connection| connection.settle());
    if let Some(attempt) = &mut exchange.attempts.present {
        attempt.answered(response.status, now);
        // Pingora calls no further hook for a response that ends with its header.
        if is_bodiless(request, response) || says_zero(response) {
            attempt.answered_whole();
        }
    }
    if let Some(call) = &mut exchange.request.grpc {
        call.note(&response.headers);
    }
}

/// From here on both sides use another protocol.
fn switched(exchange: &Exchange) {
    let tunnel = Arc::<Tunnel>::default();
    if let Some(tail) = &exchange.attempts.channel.tail {
        let idle = exchange.routing.upstream.as_ref().map(|upstream| upstream.timeouts.idle());
        tail.switch(tunnel.clone(), idle);
    }
    if let Some(connection) = &exchange.client.connection {
        connection.switch_to_raw(tunnel);
    }
}

/// Announces the trailers that can reach the client, and no others.
fn announce_trailers(exchange: &Exchange, request: &RequestHeader, response: &mut ResponseHeader) -> Result<()> {
    if response.headers.contains_key(header::TRAILER) {
        match trailers::announcement(&response.headers, trailers_pass(exchange, request, response)) {
            Some(names) => response.insert_header(header::TRAILER, names)?,
            None => drop(response.remove_header(&header::TRAILER)),
        }
    }
    Ok(())
}

/// Handles an interim response (RFC 9110 §15.2). It has no body and is forwarded unchanged, before the final response.
fn interim(exchange: &mut Exchange, response: &mut ResponseHeader) -> Result<()> {
    exchange.attempts.interim += 1;
    if exchange.attempts.interim > INTERIM_MAX {
        return Err(malformed(exchange));
    }
    strip_hop_by_hop(response);
    for name in [header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::TRAILER] {
        response.remove_header(&name);
    }
    Ok(())
}

/// Handles the trailers, which end the response. Returns them as bytes if they belong into the body.
pub fn trailers(exchange: &mut Exchange, request: &mut RequestHeader, trailers: &mut HeaderMap) -> Option<Bytes> {
    trailers::strip(trailers, exchange.request.grpc.is_some());
    exchange.filter_trailers(request, trailers);
    let call = exchange.request.grpc.as_mut()?;
    call.note(trailers);
    call.answers_web.then(|| web::last_message(trailers))
}

/// Whether the response can have trailers that reach the client. Over HTTP/1, trailers require a chunked body.
fn trailers_pass(exchange: &Exchange, request: &RequestHeader, response: &ResponseHeader) -> bool {
    let come =
        exchange.bodies.is_some() && exchange.attempts.channel.tail.as_ref().is_none_or(|tail| tail.is_chunked());
    let go = match request.version {
        Version::HTTP_2 => true,
        Version::HTTP_11 => !response.headers.contains_key(header::CONTENT_LENGTH),
        _ => false,
    };
    come && go && !is_bodiless(request, response)
}

/// Sets the sticky cookie for the endpoint that responded, unless the client has it. A failed response sets none.
fn have_client_stay(exchange: &Exchange, response: &mut ResponseHeader) -> Result<()> {
    if let (Some(upstream), Some(endpoint)) = (&exchange.routing.upstream, exchange.attempts.endpoint())
        && !response.status.is_server_error()
        && let Some(cookie) =
            upstream.cookie(exchange.routing.stuck.as_ref(), endpoint, exchange.request.scheme == "https")
    {
        response.append_header(header::SET_COOKIE, cookie)?;
    }
    Ok(())
}

/// Handles the last byte from the endpoint; the rest is sent to the client.
pub fn ended(exchange: &mut Exchange, request: &mut RequestHeader) {
    exchange.enter(Phase::Write);
    if let Some(attempt) = &mut exchange.attempts.present {
        attempt.answered_whole();
    }
    // Pingora ignores the trailers of an HTTP/1 endpoint.
    let trailers = exchange.attempts.channel.tail.as_ref().and_then(|tail| tail.take_trailers()).map(|mut fields| {
        self::trailers(exchange, request, &mut fields);
        fields
    });
    if let (Some(bodies), Some(trailers)) = (&exchange.bodies, trailers.filter(|fields| !fields.is_empty())) {
        bodies.end_with(trailers);
    }
}

/// Runs the response body filters of a route, which may wait, inside the client's session.
pub struct BodyFilters {
    route: Arc<Route>,
    filters: Arc<FilterStates>,
    told: Told,
    client: Watch,
}

/// The facts about the exchange for filters, since the tap has no access to the exchange.
struct Told {
    client: Option<IpAddr>,
    prefix: Prefix,
    port: u16,
    scheme: &'static str,
    path: Box<str>,
    connection: Option<Arc<Connection>>,
    ended: bool,
    pace: Pace,
    begun: Instant,
    identity: Option<Arc<Identity>>,
}

impl Told {
    /// The facts, with the status of the response.
    fn facts<'t>(&'t self, route: &'t str, status: u16) -> Facts<'t> {
        let Told { client, prefix, port, scheme, ref path, ref connection, ended, pace, begun, ref identity } = *self;
        let listener = connection.as_ref().map_or("", |connection| &connection.listener.name);
        let (secured, identity) = (secured(connection.as_deref()), identity.as_deref());
        let (author, attempt) = (None, 0);
        Facts {
            client,
            prefix,
            port,
            scheme,
            listener,
            route,
            path,
            secured,
            ended,
            pace,
            begun,
            status,
            identity,
            author,
            attempt,
        }
    }
}

impl BodyFilters {
    /// The tap for this exchange, if a filter of its route requires one.
    pub fn of(exchange: &Exchange) -> Option<Box<dyn Tap>> {
        let route = exchange.routing.route.as_ref().filter(|route| route.chain.wants(Stages::RESPONSE_BODY))?;
        let filters = exchange.filters.states.clone()?;
        let Facts { client, prefix, port, scheme, path, ended, pace, begun, .. } = exchange.facts(&route.name);
        let (connection, identity) = (exchange.client.connection.clone(), exchange.client.identity.clone());
        let told = Told { client, prefix, port, scheme, path: path.into(), connection, ended, pace, begun, identity };
        Some(Box::new(BodyFilters { route: route.clone(), filters, told, client: exchange.watch(route) }))
    }
}

#[async_trait]
impl Tap for BodyFilters {
    async fn piece(&mut self, request: &mut RequestHeader, piece: &mut Option<Bytes>, end: bool) -> Result<()> {
        let Some(mut states) = self.filters.take() else { return Ok(()) };
        let facts = self.told.facts(&self.route.name, self.filters.status());
        let view = View { facts, request };
        let call = self.route.chain.response_body(&mut states, view, piece, end);
        let verdict = self.client.during(self.route.chain.patience(), call, &refusal::RECEIVE_ABORTED).await;
        self.filters.put(states);
        if let Verdict::Refuse(refused) = verdict {
            self.filters.refuse(refused);
            return Err(Error::new_in(ErrorType::InternalError));
        }
        Ok(())
    }
}

/// A 426 must name the required protocols (RFC 9110 §15.5.22). HTTP/1.0 and HTTP/2 cannot express them (RFC 9110 §7.8,
/// RFC 9113 §8.2.2).
fn protocols_required(request: &RequestHeader, response: &ResponseHeader) -> Vec<HeaderValue> {
    if response.status != StatusCode::UPGRADE_REQUIRED || request.version != Version::HTTP_11 {
        return Vec::new();
    }
    response.headers.get_all(header::UPGRADE).iter().cloned().collect()
}

/// Removes the fields that `Connection` names, and those that concern only the endpoint's connection (RFC 9110 §7.6.1).
fn strip_hop_by_hop(response: &mut ResponseHeader) {
    // One scan costs less than a look-up of each name. Most responses have none, and nothing is allocated.
    let own: Vec<_> = response.headers.keys().filter(|name| is_hop_by_hop(name)).cloned().collect();
    if own.is_empty() {
        return;
    }
    while let Some(connection) = response.remove_header(&header::CONNECTION) {
        for name in connection.as_bytes().split(|&byte| byte == b',') {
            if let Ok(name) = HeaderName::from_bytes(name.trim_ascii())
                && ![header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::DATE].contains(&name)
            {
                response.remove_header(&name);
            }
        }
    }
    for name in &own {
        response.remove_header(name);
    }
}

fn is_hop_by_hop(name: &HeaderName) -> bool {
    match *name {
        header::CONNECTION | header::TE | header::UPGRADE => true,
        _ => matches!(name.as_str(), "keep-alive" | "proxy-connection"),
    }
}

/// Whether the response is a stream of server-sent events: a client waits for each event, and late events are useless.
fn is_event_stream(response: &ResponseHeader) -> bool {
    response.headers.get(header::CONTENT_TYPE).is_some_and(|kind| is_media_type(kind.as_bytes(), "text/event-stream"))
}

/// Whether the response has no body, whatever length its header gives.
fn is_bodiless(request: &RequestHeader, response: &ResponseHeader) -> bool {
    answer::is_bodiless(request.method == Method::HEAD, response.status.as_u16())
}

fn says_zero(response: &ResponseHeader) -> bool {
    response.headers.get(header::CONTENT_LENGTH).is_some_and(|length| length.as_bytes() == b"0")
}

/// Removes the length, since a filter may change the body: chunks delimit it instead.
fn unfix_length(request: &RequestHeader, response: &mut ResponseHeader) -> Result<()> {
    if is_bodiless(request, response) {
        return Ok(());
    }
    response.remove_header(&header::CONTENT_LENGTH);
    response.insert_header(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_concerned_the_connection_to_the_endpoint_is_removed() {
        let mut response = ResponseHeader::build(200, None).expect("a response");
        for (name, value) in [
            ("connection", "X-Private, keep-alive, content-length"),
            ("x-private", "1"),
            ("keep-alive", "timeout=5"),
            ("upgrade", "h2c"),
            ("content-length", "3"),
            ("x-public", "2"),
        ] {
            response.append_header(name, value).expect("a header");
        }
        strip_hop_by_hop(&mut response);
        let mut left: Vec<_> = response.headers.keys().map(|name| name.as_str()).collect();
        left.sort_unstable();
        assert_eq!(left, ["content-length", "x-public"]);
    }

    #[test]
    fn only_a_426_names_protocols_and_only_to_a_client_that_can_read_them() {
        let named = |status, version| {
            let mut request = RequestHeader::build(Method::GET, b"/", None).expect("a request");
            request.set_version(version);
            let mut response = ResponseHeader::build(status, None).expect("a response");
            for protocol in ["websocket", "tcp, h2c"] {
                response.append_header("upgrade", protocol).expect("a header");
            }
            protocols_required(&request, &response)
        };
        assert_eq!(named(426, Version::HTTP_11), ["websocket", "tcp, h2c"]);
        for (status, version) in [(200, Version::HTTP_11), (426, Version::HTTP_10), (426, Version::HTTP_2)] {
            assert!(named(status, version).is_empty(), "{status} {version:?}");
        }
    }
}
