//! Phases `wait` and `receive`: the response comes from the endpoint.
//!
//! `wait` ends with the whole response header; `receive` with the last byte from the endpoint, and `write` begins.

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
use crate::client::connection::Connection;
use crate::client::session::Tap;
use crate::client::trailers;
use crate::error::refusal;
use crate::expression::{Author, Facts, Identity, Pace, Prefix};
use crate::filter::{Refused, Stages, Verdict, View};
use crate::framing::{Said, answer, is_media_type};
use crate::phase::Phase;
use crate::upstream::transport::tunnel::Tunnel;

/// How an endpoint asks nginx, and us, not to hold its answer back. It is not for the client.
const X_ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");
/// An endpoint that says more before its answer will not come to it.
const INTERIM_MAX: u32 = 1_000;
static HOP_BY_HOP: [HeaderName; 4] =
    [HeaderName::from_static("keep-alive"), HeaderName::from_static("proxy-connection"), header::TE, header::UPGRADE];

/// If this is the answer that the client's wish for another protocol waits for, and no other, the client's own session
/// takes its place again and both sides speak as they like. Until then the exchange was bounded as any other is, and
/// with any other answer it stays so.
pub fn switch(exchange: &mut Exchange, client: &mut Box<ServerSession>, response: &ResponseHeader) -> Result<()> {
    let agreed = exchange.request.upgrade.as_ref().is_some_and(|protocol| upgrade::agrees(response, protocol));
    if response.status != StatusCode::SWITCHING_PROTOCOLS || !agreed {
        return Ok(());
    }
    if let Some(link) = exchange.link.take()
        && !link.step_aside(client)
    {
        return Err(Error::new_in(ErrorType::InternalError));
    }
    exchange.deadlines.lift();
    exchange.switched = Some(Box::new(Switched::new(client.req_header().clone())));
    Ok(())
}

/// The header of an answer, an interim one or the final one, has come: from here on it says only how its body is marked
/// off, as on HTTP/1.1, whatever it was sent over. Pingora goes by that, and for the client the wire frames it once
/// more.
///
/// An error is the endpoint's.
pub fn frame(request: &RequestHeader, response: &mut ResponseHeader) -> Result<()> {
    let said = Said::of(&response.headers);
    let (head, status) = (request.method == Method::HEAD, response.status.as_u16());
    let framed = answer::frame(head, status, response.version, &said, Version::HTTP_11)
        .map_err(|fault| Error::explain(ErrorType::InvalidHTTPHeader, fault.words()).into_up())?;
    framed.apply(&said, response)?;
    if response.version != Version::HTTP_2 {
        // RFC 9110 §6.2: the client gets our version, and what HTTP/1.0 cannot say may have been added.
        response.set_version(Version::HTTP_11);
    }
    Ok(())
}

/// The response header is here.
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
        // What is written for the client names it in `Connection`.
        response.append_header(header::UPGRADE, protocol)?;
    }
    let asked_to_stream = response
        .remove_header(&X_ACCEL_BUFFERING)
        .is_some_and(|buffering| buffering.as_bytes().eq_ignore_ascii_case(b"no"));
    if let Some(link) = &exchange.link
        && (asked_to_stream || is_event_stream(response))
    {
        link.stream_answer();
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
        if let Some(link) = exchange.link.as_ref().filter(|_| exchange.holds_answer()) {
            link.hold_answer();
        }
    }
    announce_trailers(exchange, request, response)
}

/// Whether no client could take an answer with this status, or would take it for something else.
fn is_out_of_place(exchange: &Exchange, status: StatusCode) -> bool {
    if status == StatusCode::SWITCHING_PROTOCOLS {
        // RFC 9110 §15.2.2: without a request for it. What the client sends next is its next request, and is not to
        // pass unread.
        return exchange.link.is_some();
    }
    // Over a stream of HTTP/2 it would be taken for the beginning of the other protocol (RFC 9110 §9.3.6).
    let carried = exchange.client.connection.as_ref().is_some_and(|connection| connection.is_carried());
    carried && status.is_success()
}

/// The endpoint has answered what cannot be passed on.
fn malformed(exchange: &mut Exchange) -> Box<Error> {
    exchange.filters.refuse(Refused::from(&refusal::WAIT_MALFORMED));
    Error::new_up(ErrorType::InvalidHTTPHeader)
}

/// The final answer begins: those who wait for it hear so.
fn begin(exchange: &mut Exchange, request: &RequestHeader, response: &ResponseHeader) {
    let now = exchange.enter(Phase::Receive);
    exchange.client.connection.iter().for_each(|connection| connection.settle());
    if let Some(attempt) = &mut exchange.attempts.present {
        attempt.answered(response.status, now);
        // Pingora has no further word on one that is here whole with its header.
        if is_bodiless(request, response) || says_zero(response) {
            attempt.answered_whole();
        }
    }
    if let Some(call) = &mut exchange.request.grpc {
        call.note(&response.headers);
    }
}

/// From here on both sides speak another protocol.
fn switched(exchange: &Exchange) {
    let tunnel = Arc::<Tunnel>::default();
    if let Some(tail) = &exchange.attempts.channel.tail {
        tail.switch(tunnel.clone());
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

/// An interim answer is here (RFC 9110 §15.2). It has no body, and it is passed on as it is: the final answer is still
/// to come.
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

/// The trailers are here, with which the answer ends. Where they are to be bytes of its body, these.
pub fn trailers(exchange: &mut Exchange, request: &mut RequestHeader, trailers: &mut HeaderMap) -> Option<Bytes> {
    trailers::strip(trailers, exchange.request.grpc.is_some());
    exchange.filter_trailers(request, trailers);
    let call = exchange.request.grpc.as_mut()?;
    call.note(trailers);
    call.answers_web.then(|| web::last_message(trailers))
}

/// Whether trailers of this answer can come, and reach the client. Over HTTP/1 they can only follow a body in chunks.
fn trailers_pass(exchange: &Exchange, request: &RequestHeader, response: &ResponseHeader) -> bool {
    let come = exchange.link.is_some() && exchange.attempts.channel.tail.as_ref().is_none_or(|tail| tail.is_chunked());
    let go = match request.version {
        Version::HTTP_2 => true,
        Version::HTTP_11 => !response.headers.contains_key(header::CONTENT_LENGTH),
        _ => false,
    };
    come && go && !is_bodiless(request, response)
}

/// Tells a client, if it does not know yet, by which cookie it stays at the endpoint that has answered. One that fails
/// is not to be stayed at.
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

/// The last byte has come from the endpoint; what is left goes to the client.
pub fn ended(exchange: &mut Exchange, request: &mut RequestHeader) {
    exchange.enter(Phase::Write);
    if let Some(attempt) = &mut exchange.attempts.present {
        attempt.answered_whole();
    }
    // Pingora has passed over those of an endpoint of HTTP/1.
    let trailers = exchange.attempts.channel.tail.as_ref().and_then(|tail| tail.take_trailers()).map(|mut fields| {
        self::trailers(exchange, request, &mut fields);
        fields
    });
    if let (Some(link), Some(trailers)) = (&exchange.link, trailers.filter(|fields| !fields.is_empty())) {
        link.end_with(trailers);
    }
}

/// Runs the response body filters of a route, which may wait, inside the client's session.
pub struct BodyFilters {
    route: Arc<Route>,
    filters: Arc<FilterStates>,
    told: Told,
    client: Watch,
}

/// What the tap tells filters of the exchange, which is out of its reach.
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
    /// With the status of the answer.
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
    /// The tap for this exchange, if its route wants one.
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

/// RFC 9110 §15.5.22: without the protocols that it names, the client does not know what a 426 asks for. HTTP/1.0 and
/// HTTP/2 cannot say it (RFC 9110 §7.8, RFC 9113 §8.2.2).
fn protocols_required(request: &RequestHeader, response: &ResponseHeader) -> Vec<HeaderValue> {
    if response.status != StatusCode::UPGRADE_REQUIRED || request.version != Version::HTTP_11 {
        return Vec::new();
    }
    response.headers.get_all(header::UPGRADE).iter().cloned().collect()
}

/// RFC 9110 §7.6.1: what `Connection` names, and what concerned the endpoint's connection only.
fn strip_hop_by_hop(response: &mut ResponseHeader) {
    // Mostly there is none, and one look at all costs less than to look for each.
    if !response.headers.keys().any(|name| *name == header::CONNECTION || HOP_BY_HOP.contains(name)) {
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
    for name in &HOP_BY_HOP {
        response.remove_header(name);
    }
}

/// Server-sent events: a client waits for each one, and old ones are of no use.
fn is_event_stream(response: &ResponseHeader) -> bool {
    response.headers.get(header::CONTENT_TYPE).is_some_and(|kind| is_media_type(kind.as_bytes(), "text/event-stream"))
}

/// Whether there can be no body, whatever the header says of its length.
fn is_bodiless(request: &RequestHeader, response: &ResponseHeader) -> bool {
    answer::is_bodiless(request.method == Method::HEAD, response.status.as_u16())
}

fn says_zero(response: &ResponseHeader) -> bool {
    response.headers.get(header::CONTENT_LENGTH).is_some_and(|length| length.as_bytes() == b"0")
}

/// A filter that sees the body may change its length: chunks delimit it instead.
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
