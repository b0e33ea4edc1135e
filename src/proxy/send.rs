//! Phase `send`: the request goes to the endpoint.
//!
//! After `connect`; `wait` begins when Pingora has taken the last piece of the body. Up to four pieces may still be in
//! Pingora's channel then.

use std::fmt::Write;
use std::net::IpAddr;
use std::sync::PoisonError;
use std::time::Instant;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, header};
use pingora::http::RequestHeader;
use pingora::protocols::http::ServerSession;
use pingora::{Error, ErrorSource, ErrorType, Result, RetryType};

use super::blame;
use super::deadline;
use super::exchange::Exchange;
use super::header::{X_FORWARDED_FOR, X_FORWARDED_PROTO, is_grpc_type, takes_trailers};
use super::mirror;
use super::retry::{self, Failure};
use crate::access_log::Why;
use crate::client::http2::Control;
use crate::client::trailers;
use crate::config::server::Forwarded;
use crate::filter::{Stages, Verdict, View};
use crate::phase::Phase;
use crate::spans::pass_on;
use crate::upstream::Outcome;
use crate::upstream::transport::http2::RequestTrailers;

const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
/// Said by others of the client, believed by many applications; only a trusted proxy may say it.
const HEARSAY: [HeaderName; 6] = [
    X_FORWARDED_FOR,
    X_FORWARDED_PROTO,
    X_FORWARDED_HOST,
    X_FORWARDED_PORT,
    HeaderName::from_static("x-real-ip"),
    header::FORWARDED,
];

/// What Forebay adds to every request.
#[derive(Clone, Copy, Debug)]
pub struct Manners {
    /// Which headers tell the upstream who the client is.
    pub forwarded: Forwarded,
    /// Whether `Via` is added.
    pub via: bool,
}

/// Prepares the header that the upstream gets. Pingora has removed from it what is hop-by-hop (RFC 9110 §7.6.1); `client` is
/// the header as the client sent it and the filters have left it.
pub fn header(
    exchange: &Exchange,
    manners: Manners,
    client: &RequestHeader,
    request: &mut RequestHeader,
) -> Result<()> {
    if exchange.upstream.as_ref().is_some_and(|upstream| !upstream.is_http1()) {
        if !request.raw_path_is_utf8() {
            return Error::e_explain(ErrorType::InvalidHTTPHeader, "HTTP/2 cannot say this target").map_err(into_down);
        }
        strip_named_by_connection(request);
        accept_trailers(client, request)?;
    }
    if !exchange.peer_is_trusted {
        drop_hearsay(request);
    }
    let peer = exchange.connection.as_ref().and_then(|connection| connection.peer).map(|peer| peer.ip());
    let host = request.headers.get(header::HOST).cloned();
    if matches!(manners.forwarded, Forwarded::XForwarded | Forwarded::Both) {
        let port = exchange.connection.as_ref().and_then(|connection| connection.local).map(|local| local.port());
        x_forwarded(request, peer, exchange.scheme, host.clone(), port)?;
    }
    if matches!(manners.forwarded, Forwarded::Rfc7239 | Forwarded::Both) {
        rfc7239(request, peer, exchange.scheme, host.as_ref())?;
    }
    if manners.via {
        request.append_header(header::VIA, HeaderValue::from_static("1.1 forebay"))?;
    }
    if let Some(place) = exchange.trace {
        let attempt = exchange.notes.as_ref().and_then(|notes| notes.span());
        pass_on(place, attempt, request)?;
    }
    if let Some(length) = exchange.link.as_ref().and_then(|link| link.length()) {
        // The body is here whole: its length is known, whatever the client said of it.
        request.remove_header(&header::TRANSFER_ENCODING);
        request.insert_header(header::CONTENT_LENGTH, length)?;
    }
    // A filter that sees the body may change its length.
    if exchange.route.as_ref().is_some_and(|route| route.chain.wants(Stages::REQUEST_BODY)) {
        request.remove_header(&header::CONTENT_LENGTH);
    }
    Ok(())
}

fn into_down(error: Box<Error>) -> Box<Error> {
    error.into_down()
}

/// RFC 9110 §7.6.1: what `Connection` names concerns the client's connection. Towards HTTP/1, Pingora has removed it.
fn strip_named_by_connection(request: &mut RequestHeader) {
    while let Some(connection) = request.remove_header(&header::CONNECTION) {
        for name in connection.as_bytes().split(|&byte| byte == b',') {
            if let Ok(name) = HeaderName::from_bytes(name.trim_ascii())
                && name != header::HOST
            {
                request.remove_header(&name);
            }
        }
    }
}

/// Gives trailers of the request a place, if the endpoint can have them; else none are announced.
pub fn prepare_trailers(exchange: &mut Exchange, request: &mut RequestHeader) -> Result<()> {
    let to_http2 = exchange.upstream.as_ref().is_some_and(|upstream| !upstream.is_http1());
    let may_pass = to_http2 && exchange.control.is_some();
    if request.headers.contains_key(header::TRAILER) {
        match trailers::announcement(&request.headers, may_pass) {
            Some(names) => request.insert_header(header::TRAILER, names)?,
            None => drop(request.remove_header(&header::TRAILER)),
        }
    }
    if may_pass {
        let slot = RequestTrailers::default();
        request.extensions_mut().insert(slot.clone());
        exchange.trailers_slot = Some(slot);
    }
    Ok(())
}

/// The request is here whole: what followed its body goes the same way.
fn pass_trailers(exchange: &mut Exchange) {
    if let Some(mut trailers) = exchange.control.as_ref().and_then(Control::take_trailers) {
        trailers::strip(&mut trailers, exchange.grpc.is_some());
        exchange.trailers = Some(trailers).filter(|trailers| !trailers.is_empty());
    }
    if let (Some(slot), Some(trailers)) = (&exchange.trailers_slot, &exchange.trailers) {
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(trailers.clone());
    }
}

/// `TE` is about one connection, yet `trailers` in it is a promise that a gateway can repeat towards HTTP/2, where it is the one
/// value that may be sent (RFC 9113 §8.2.2). Servers on the gRPC C core reset each stream without it.
fn accept_trailers(client: &RequestHeader, request: &mut RequestHeader) -> Result<()> {
    if takes_trailers(&client.headers) || is_grpc_type(&client.headers) {
        request.insert_header(header::TE, HeaderValue::from_static("trailers"))?;
    }
    Ok(())
}

/// A piece of the request body passes on its way to the endpoint; `end` with the last.
pub async fn piece(
    exchange: &mut Exchange,
    request: &mut RequestHeader,
    piece: &mut Option<Bytes>,
    end: bool,
) -> Result<()> {
    if let (Some(route), Some(filters)) = (exchange.route.clone(), &exchange.filters)
        && route.chain.wants(Stages::REQUEST_BODY)
        && let Some(mut states) = filters.take()
    {
        let view = View { client: exchange.client, scheme: exchange.scheme, route: &route.name, request };
        let verdict = route.chain.request_body(&mut states, view, piece, end).await;
        filters.put(states);
        if let Verdict::Refuse(refused) = verdict {
            exchange.refuse(refused);
            return Err(Error::new_in(ErrorType::InternalError));
        }
    }
    if end {
        pass_trailers(exchange);
        ended(exchange);
    }
    Ok(())
}

/// The request is out, as far as can be seen.
pub fn ended(exchange: &mut Exchange) {
    if exchange.clock.phase() == Phase::Send {
        let now = exchange.enter(Phase::Wait);
        if let Some(attempt) = &mut exchange.attempt {
            attempt.sent(now);
        }
    }
    if let Some(link) = &exchange.link {
        link.waiting();
        // What was streamed is whole now.
        deadline::begin(exchange, Instant::now());
    }
    mirror::send(exchange);
}

/// An attempt failed after its connection stood, or its answer is not taken. Whether there is another one, the rules of the
/// route say; that the body is buffered alone makes nothing safe.
pub fn failed(exchange: &mut Exchange, client: &ServerSession, mut error: Box<Error>, reused: bool) -> Box<Error> {
    if std::mem::take(&mut exchange.again) {
        error.set_retry(true);
        return error;
    }
    let refusal = blame::reason(exchange, &error);
    let failure = failure(exchange, &error, reused);
    exchange.failure = Some(refusal);
    let says_nothing = failure.is_none_or(Failure::is_of_connection)
        || !blame::is_upstreams(refusal)
        || (exchange.dues.is_clients && blame::is_deadline(refusal));
    let outcome = if says_nothing { Outcome::Cancelled } else { Outcome::Failed(refusal) };
    let now = Instant::now();
    if failure.is_some() {
        exchange.note_failure(Why::Refusal(refusal.reason), now);
    }
    exchange.release(|_| outcome, now);
    error.set_retry(failure.is_some_and(|failure| retry::again(exchange, client, failure, None)));
    error
}

/// What the attempt failed for; `None`: for the client, or for ourselves.
fn failure(exchange: &Exchange, error: &Error, reused: bool) -> Option<Failure> {
    use ErrorType::{ConnectionClosed, ReadError, ReadTimedout, WriteError, WriteTimedout};
    if let Some(found) = blame::found(exchange) {
        return blame::is_timeout(found).then_some(Failure::Timeout);
    }
    if *error.esource() != ErrorSource::Upstream {
        return None;
    }
    // So Pingora marks what an HTTP/2 endpoint has refused or announced not to answer.
    if matches!(error.retry, RetryType::Decided(true)) && !exchange.had_free_attempt {
        return Some(Failure::Unprocessed);
    }
    let kept = reused && exchange.upstream.as_ref().is_some_and(|upstream| upstream.is_http1());
    Some(match error.etype() {
        ReadTimedout | WriteTimedout => Failure::Timeout,
        ConnectionClosed | ReadError | WriteError
            if kept && exchange.clock.phase() != Phase::Receive && !exchange.had_free_attempt =>
        {
            Failure::Stale
        }
        _ => Failure::Reset,
    })
}

/// Most requests bring none of it: one look over the names is cheaper than a look-up for each.
fn drop_hearsay(request: &mut RequestHeader) {
    if request.headers.keys().any(|name| HEARSAY.contains(name)) {
        for name in &HEARSAY {
            request.remove_header(name);
        }
    }
}

/// Adds the peer to the hops; of the rest, what a trusted proxy said stands.
fn x_forwarded(
    request: &mut RequestHeader,
    peer: Option<IpAddr>,
    scheme: &'static str,
    host: Option<HeaderValue>,
    port: Option<u16>,
) -> Result<()> {
    if let Some(peer) = peer {
        let mut hops = joined(request, &X_FORWARDED_FOR);
        append(&mut hops, format_args!("{peer}"));
        request.insert_header(X_FORWARDED_FOR, hops)?;
    }
    let said = [
        (X_FORWARDED_PROTO, Some(HeaderValue::from_static(scheme))),
        (X_FORWARDED_HOST, host),
        (X_FORWARDED_PORT, port.map(HeaderValue::from)),
    ];
    for (name, value) in said {
        if let Some(value) = value.filter(|_| !request.headers.contains_key(&name)) {
            request.insert_header(name, value)?;
        }
    }
    Ok(())
}

/// RFC 7239 §4: one element a hop, IPv6 addresses and hosts quoted.
fn rfc7239(
    request: &mut RequestHeader,
    peer: Option<IpAddr>,
    scheme: &'static str,
    host: Option<&HeaderValue>,
) -> Result<()> {
    let mut hops = joined(request, &header::FORWARDED);
    match peer {
        Some(IpAddr::V4(peer)) => append(&mut hops, format_args!("for={peer}")),
        Some(IpAddr::V6(peer)) => append(&mut hops, format_args!("for=\"[{peer}]\"")),
        None => append(&mut hops, format_args!("for=unknown")),
    }
    if let Some(host) = host.and_then(|host| host.to_str().ok()) {
        let _ = write!(hops, ";host=\"{host}\"");
    }
    let _ = write!(hops, ";proto={scheme}");
    request.insert_header(header::FORWARDED, hops)
}

/// The values of a list header in one.
fn joined(request: &RequestHeader, name: &HeaderName) -> String {
    let mut list = String::with_capacity(40);
    for value in request.headers.get_all(name) {
        if let Ok(value) = value.to_str() {
            append(&mut list, format_args!("{value}"));
        }
    }
    list
}

fn append(list: &mut String, item: std::fmt::Arguments<'_>) {
    if !list.is_empty() {
        list.push_str(", ");
    }
    // Writing to a string cannot fail.
    let _ = list.write_fmt(item);
}

#[cfg(test)]
mod tests {
    use super::super::header::tests::request;
    use super::*;

    fn value(request: &RequestHeader, name: &str) -> Option<String> {
        request.headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
    }

    #[test]
    fn a_hop_is_added_to_those_before() {
        let mut request = request(&[("x-forwarded-for", "1.2.3.4"), ("x-forwarded-for", "10.0.0.1")]);
        x_forwarded(&mut request, "10.0.0.2".parse().ok(), "http", Some(HeaderValue::from_static("shop")), Some(80))
            .expect("headers");
        assert_eq!(value(&request, "x-forwarded-for").as_deref(), Some("1.2.3.4, 10.0.0.1, 10.0.0.2"));
        assert_eq!(value(&request, "x-forwarded-proto").as_deref(), Some("http"));
        assert_eq!(value(&request, "x-forwarded-host").as_deref(), Some("shop"));
    }

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
            assert_eq!(value(&towards, "te").as_deref(), sent.then_some("trailers"), "{fields:?}");
        }
    }

    #[test]
    fn forwarded_quotes_what_must_be_quoted() {
        let mut request = request(&[]);
        rfc7239(&mut request, "2001:db8::1".parse().ok(), "https", Some(&HeaderValue::from_static("shop:8080")))
            .expect("headers");
        assert_eq!(
            value(&request, "forwarded").as_deref(),
            Some("for=\"[2001:db8::1]\";host=\"shop:8080\";proto=https")
        );
    }
}
