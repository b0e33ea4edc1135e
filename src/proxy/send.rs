//! Phase `send`: sends the request to the endpoint.
//!
//! After `connect`; `wait` begins when the driver has taken the last piece of the body. Pingora's channel may still
//! hold up to four pieces then.

use std::sync::PoisonError;
use std::time::Instant;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, header};
use pingora::http::RequestHeader;
use pingora::protocols::http::ServerSession;
use pingora::{Error, ErrorType, Result};

use super::again;
use super::attempt::Attempt;
use super::blame;
use super::exchange::Exchange;
use super::fault;
use super::forwarded::{self, Own};
use super::grpc::{is_grpc_type, web};
use super::header::names;
use crate::client::trailers;
use crate::config::listener::OddNames;
use crate::error::refusal;
use crate::filter::{Stages, Verdict, View};
use crate::finished::Why;
use crate::framing::{self, Body, takes_trailers};
use crate::phase::Phase;
use crate::spans::pass_on;
use crate::upstream::transport::http2::{RequestTrailers, StreamHandle};

/// Prepares the header for the upstream, except for [`hops`]. The driver has removed hop-by-hop fields (RFC 9110
/// §7.6.1). `client` is the client's header after the filters.
pub fn header(exchange: &Exchange, client: &RequestHeader, request: &mut RequestHeader) -> Result<()> {
    let http1 = exchange.routing.upstream.as_ref().is_none_or(|upstream| upstream.is_http1());
    if !http1 {
        if !request.raw_path_is_utf8() {
            return Error::e_explain(ErrorType::InvalidHTTPHeader, "HTTP/2 cannot express this target")
                .map_err(into_down);
        }
        accept_trailers(client, request)?;
    }
    if exchange.request.is_grpc_web() {
        web::to_endpoint(request)?;
    }
    if let Some(protocol) = exchange.request.upgrade.as_ref().filter(|_| http1) {
        // Pingora removes every upgrade except WebSocket.
        request.insert_header(header::UPGRADE, protocol.clone())?;
        request.insert_header(header::CONNECTION, HeaderValue::from_static("Upgrade"))?;
    }
    if exchange.routing.additions.via {
        request.append_header(header::VIA, HeaderValue::from_static("1.1 forebay"))?;
    }
    if let Some(traced) = &exchange.traced {
        pass_on(traced.place, traced.notes.as_ref().and_then(|notes| notes.span()), request)?;
    }
    if let Some(length) = exchange.bodies.as_ref().and_then(|bodies| bodies.length()) {
        // A complete body has a known length, whatever the client announced. Over HTTP/1, trailers require chunks.
        let body = if http1 && exchange.request.trailers.is_some() { Body::Chunked } else { Body::Length(length) };
        framing::request::apply(body, request)?;
    }
    // A filter that sees the body may change its length.
    if exchange.sees_request_body() {
        request.remove_header(&header::CONTENT_LENGTH);
    }
    exchange.filters.states.iter().for_each(|filters| filters.begin_attempt());
    if !request.headers.contains_key(header::HOST)
        && let Some(endpoint) = exchange.attempts.endpoint()
    {
        // An HTTP/1.0 client may send no host, but the endpoint's protocol version requires one (RFC 9112 §3.2, RFC
        // 9113 §8.3.1).
        request.insert_header(header::HOST, endpoint.authority().as_str())?;
    }
    Ok(())
}

/// Reports the earlier hops to the endpoint: as `lines` after the request's fields, or in the fields if lines would
/// differ.
pub fn hops(
    exchange: &Exchange,
    client: &RequestHeader,
    request: &mut RequestHeader,
    lines: Option<&mut Vec<u8>>,
) -> Result<()> {
    let connection = exchange.client.connection.as_ref();
    let own = Own {
        peer: connection.and_then(|connection| connection.peer).map(|peer| peer.ip()),
        scheme: exchange.request.scheme,
        host: client.headers.get(header::HOST),
        port: connection.and_then(|connection| connection.local).map(|local| local.port()),
    };
    let format = exchange.routing.additions.forwarded;
    let told = lines.is_some_and(|lines| forwarded::lines(&request.headers, format, own, lines));
    if told { Ok(()) } else { forwarded::tell(request, format, own) }
}

fn into_down(error: Box<Error>) -> Box<Error> {
    error.into_down()
}

/// Stores the trailers of a request whose body is complete.
pub fn note_trailers(exchange: &mut Exchange, request: &mut RequestHeader) {
    let noted = match &exchange.client.control {
        Some(control) => control.take_trailers(),
        None => exchange.bodies.as_ref().and_then(|bodies| bodies.take_request_trailers()),
    };
    if let Some(mut fields) = noted {
        trailers::strip(&mut fields, exchange.request.grpc.is_some());
        let odd = if exchange.is_treated_as_grpc() { OddNames::Keep } else { exchange.client.odd_names() };
        names::strip(&mut fields, odd, exchange.client.peer_is_trusted);
        filter_trailers(exchange, request, &mut fields);
        exchange.request.trailers = Some(fields).filter(|fields| !fields.is_empty());
    }
}

/// Runs the route's trailer filters on the trailers of the request.
fn filter_trailers(exchange: &Exchange, request: &mut RequestHeader, trailers: &mut HeaderMap) {
    if let (Some(route), Some(filters)) = (&exchange.routing.route, &exchange.filters.states)
        && route.chain.wants(Stages::REQUEST_TRAILERS)
        && let Some(mut states) = filters.take()
    {
        let view = View { facts: exchange.facts(&route.name), request };
        route.chain.request_trailers(&mut states, view, trailers);
        filters.put(states);
    }
}

/// Prepares a slot for the request's trailers if the endpoint can receive them; otherwise announces none. `has_body`:
/// the request has a body, as far as known.
pub fn prepare_trailers(
    exchange: &mut Exchange,
    client: &RequestHeader,
    request: &mut RequestHeader,
    has_body: bool,
) -> Result<()> {
    let to_http1 = exchange.routing.upstream.as_ref().is_some_and(|upstream| upstream.is_http1());
    let may_come = match exchange.bodies.as_ref().and_then(|bodies| bodies.length()) {
        // The body is complete, and so are its trailers.
        Some(_) => exchange.request.trailers.is_some(),
        None => exchange.client.control.is_some() || client.headers.contains_key(header::TRANSFER_ENCODING),
    };
    // Pingora sends a body without a length in chunks.
    let in_chunks = || {
        request.headers.contains_key(header::TRANSFER_ENCODING)
            || (has_body && !request.headers.contains_key(header::CONTENT_LENGTH))
    };
    let may_pass = may_come && (!to_http1 || in_chunks());
    match trailers::announcement(&client.headers, may_pass) {
        Some(names) => request.insert_header(header::TRAILER, names)?,
        None => drop(request.remove_header(&header::TRAILER)),
    }
    if let Some(tail) = &exchange.attempts.channel.tail {
        tail.begin(request.method == Method::HEAD, may_pass);
    } else if may_pass {
        let slot = RequestTrailers::default();
        request.extensions_mut().insert(slot.clone());
        exchange.attempts.channel.trailers = Some(slot);
    }
    Ok(())
}

/// Keeps a handle on the stream of this attempt. It paces the body by the endpoint, and stops waiting when a filter
/// refuses the body, a clock expires or the client leaves. Over HTTP/1 closing the connection does this; an HTTP/2
/// stream has no connection of its own.
pub fn hold_stream(exchange: &mut Exchange, request: &mut RequestHeader) {
    if exchange.routing.upstream.as_ref().is_some_and(|upstream| !upstream.is_http1()) {
        let stream = StreamHandle::default();
        request.extensions_mut().insert(stream.clone());
        exchange.bodies.iter().for_each(|bodies| bodies.set_stream(stream.clone()));
        exchange.attempts.channel.stream = Some(stream);
    }
}

/// The request is complete: passes its trailers on.
fn pass_trailers(exchange: &mut Exchange, request: &mut RequestHeader) {
    note_trailers(exchange, request);
    let Some(fields) = &exchange.request.trailers else { return };
    match (&exchange.attempts.channel.tail, &exchange.attempts.channel.trailers) {
        (Some(tail), _) => tail.end_with(trailers::last_chunk(Some(fields))),
        (None, Some(slot)) => *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(fields.clone()),
        (None, None) => {}
    }
}

/// Sets `TE: trailers`. The field is hop-by-hop, but a gateway can make this promise towards HTTP/2, where it is the
/// only permitted value (RFC 9113 §8.2.2). Servers on the gRPC C core reset each stream without it.
fn accept_trailers(client: &RequestHeader, request: &mut RequestHeader) -> Result<()> {
    if takes_trailers(&client.headers) || is_grpc_type(&client.headers) {
        request.insert_header(header::TE, HeaderValue::from_static("trailers"))?;
    }
    Ok(())
}

/// Handles a piece of the request body on its way to the endpoint; `end` with the last one.
pub async fn piece(
    exchange: &mut Exchange,
    request: &mut RequestHeader,
    piece: &mut Option<Bytes>,
    end: bool,
) -> Result<()> {
    if let Some(switched) = &mut exchange.switched {
        switched.received += piece.as_ref().map_or(0, |piece| piece.len() as u64);
    }
    if exchange.sees_request_body()
        && let (Some(route), Some(filters)) = (exchange.routing.route.clone(), &exchange.filters.states)
        && let Some(mut states) = filters.take()
    {
        let view = View { facts: exchange.facts(&route.name), request };
        let mut client = exchange.watch(&route);
        let call = route.chain.request_body(&mut states, view, piece, end);
        // Boxed: exchanges without filters would be as large, too.
        let verdict = Box::pin(client.during(route.chain.patience(), call, &refusal::SEND_ABORTED)).await;
        filters.put(states);
        exchange.copy.take_if(|copy| !copy.filtered(piece.as_ref()));
        if let Verdict::Refuse(refused) = verdict {
            exchange.filters.refuse(refused);
            exchange.attempts.channel.stream.take().iter().for_each(StreamHandle::hang_up);
            return Err(Error::new_down(ErrorType::InternalError));
        }
    }
    if end {
        // Pingora would send an empty piece as a last chunk, followed by the real last chunk: the endpoint would take
        // this for its next request.
        *piece = piece.take().filter(|piece| !piece.is_empty());
        pass_trailers(exchange, request);
        ended(exchange);
    } else if let Some(attempt) = &mut exchange.attempts.present {
        attempt.gave(Instant::now());
    }
    Ok(())
}

/// Records that the request was sent, as far as this is visible. A second call for an attempt has no effect.
pub fn ended(exchange: &mut Exchange) {
    if exchange.phase() != Phase::Send && exchange.attempts.present.as_ref().is_some_and(Attempt::is_sent) {
        return;
    }
    let now = if exchange.phase() == Phase::Send {
        let now = exchange.enter(Phase::Wait);
        if let Some(attempt) = &mut exchange.attempts.present {
            attempt.sent(now);
        }
        now
    } else {
        Instant::now()
    };
    if let Some(bodies) = &exchange.bodies {
        bodies.request_sent(now);
        // A streamed request is complete now.
        exchange.request_is_whole(|| now);
    }
    if let Some(copy) = exchange.copy.take() {
        copy.send(exchange.client.addresses());
    }
}

/// Handles an attempt that failed after its connection was established, or whose response is discarded. The route's
/// rules decide on another attempt: a buffered body alone does not make it safe.
pub fn failed(exchange: &mut Exchange, client: &ServerSession, mut error: Box<Error>, reused: bool) -> Box<Error> {
    if exchange.attempts.take_decision() {
        error.set_retry(true);
        return error;
    }
    if exchange.filters.answer.is_some() {
        // The endpoint has responded; the filter's response in its place does not change the endpoint's outcome.
        exchange.release(Attempt::outcome, Instant::now());
        error.set_retry(false);
        return error;
    }
    let fault = fault::of(exchange, &error, reused);
    if fault::is_served(exchange, fault) {
        exchange.attempts.failure = Some(fault);
        exchange.release(Attempt::outcome, Instant::now());
        error.set_retry(false);
        return error;
    }
    let row = blame::row(fault);
    exchange.attempts.failure = Some(fault);
    let now = Instant::now();
    if row.failure.is_some() {
        exchange.note_failure(Why::Refusal(row.refusal.reason), now);
    }
    exchange.release(|_| row.outcome(), now);
    error.set_retry(row.failure.is_some_and(|failure| again::after(exchange, client, failure, None)));
    error
}

#[cfg(test)]
mod tests {
    use super::super::header::tests::request;
    use super::*;

    #[test]
    fn towards_http_2_trailers_are_accepted_where_the_client_or_grpc_does() {
        for (fields, sent) in [
            (&[("te", "trailers")][..], true),
            (&[("te", "gzip;q=0.5, Trailers")], true),
            (&[("te", "gzip"), ("te", "trailers")], true),
            (&[("content-type", "application/grpc+proto")], true),
            (&[("te", "gzip")], false),
            (&[], false),
        ] {
            let mut towards = request(&[]);
            accept_trailers(&request(fields), &mut towards).expect("a header");
            assert_eq!(towards.headers.get("te").is_some_and(|te| te == "trailers"), sent, "{fields:?}");
        }
    }
}
