//! Phase `write`: sends Forebay's own responses, and cuts responses so that the client cannot take them for complete.
//!
//! `body::response` writes the upstream's response. This module waits for the client to accept the rest after
//! the upstream was released, and writes refusals and the responses of filters.

use std::time::Instant;

use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode, Version, header};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::http::{HttpTask, ServerSession};
use pingora::{Error, ErrorType, Result};

use super::blame;
use super::exchange::Exchange;
use super::fault;
use super::grpc::{self, TrailersOnly, web};
use super::https;
use crate::client::head::accepts_json;
use crate::error::{Refusal, refusal};
use crate::expression::Author;
use crate::filter::{Answer, Refused, Verdict};
use crate::framing::{Body, LengthFields, answer};
use crate::phase::Phase;

/// Refuses an exchange whose response has not begun.
pub async fn refuse(exchange: &mut Exchange, session: &mut ServerSession, refused: &Refused) -> Result<()> {
    if exchange.request.grpc.is_some() {
        return trailers_only(exchange, session, grpc::refusal(refused)?).await;
    }
    let (response, body) = refusal_page(session.req_header(), refused)?;
    write(exchange, session, response, body, Ours::Refusal(refused)).await
}

/// The header and the body of a refusal, in the format that the client accepts.
fn refusal_page(request: &RequestHeader, refused: &Refused) -> Result<(ResponseHeader, Bytes)> {
    let mut accept = request.headers.get_all(header::ACCEPT).iter();
    let json = accept.any(|accept| accepts_json(accept.as_bytes()));
    let (kind, body) = refused.refusal.body(json);
    let status = StatusCode::from_u16(refused.refusal.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = ResponseHeader::build(status, Some(refused.headers.len() + 5))?;
    response.insert_header(header::CONTENT_TYPE, HeaderValue::from_static(kind))?;
    if let Some(methods) = refused.refusal.allow() {
        response.insert_header(header::ALLOW, HeaderValue::from_static(methods))?;
    }
    if let Some(seconds) = refused.refusal.retry_after() {
        response.insert_header(header::RETRY_AFTER, HeaderValue::from(seconds))?;
    }
    for (name, value) in &refused.headers {
        response.append_header(name.clone(), value.clone())?;
    }
    Ok((response, body.into()))
}

/// Sends the response of a filter.
pub async fn answer(exchange: &mut Exchange, session: &mut ServerSession, answer: Answer) -> Result<()> {
    if exchange.request.grpc.is_some()
        && let Some(error) = grpc::answer(&answer)?
    {
        return trailers_only(exchange, session, error).await;
    }
    write(exchange, session, answer.header()?, answer.body, Ours::Answer).await
}

/// Sends a filter's response in place of the endpoint's. The outer filters have already seen its header.
pub async fn answer_instead(exchange: &mut Exchange, session: &mut ServerSession, answer: Answer) -> Result<()> {
    if exchange.request.grpc.is_some()
        && let Some(error) = grpc::answer(&answer)?
    {
        return trailers_only(exchange, session, error).await;
    }
    write(exchange, session, answer.header()?, answer.body, Ours::Instead).await
}

/// Responds to a gRPC call with one frame: a header that ends the stream.
async fn trailers_only(exchange: &mut Exchange, session: &mut ServerSession, answer: TrailersOnly) -> Result<()> {
    let TrailersOnly { code, stands_for, header: mut fields } = answer;
    if let Some(call) = &mut exchange.request.grpc {
        call.refused(code, stands_for);
    }
    if exchange.request.is_grpc_web() {
        web::to_client(&mut fields)?;
        fields.insert_header(header::CONTENT_LENGTH, 0)?;
    }
    let author = exchange.refusal.map_or(Author::Filter, Author::Gateway);
    let _ = exchange.filter_response(session.req_header_mut(), &mut fields, author).await;
    session.response_duplex_vec(vec![HttpTask::Header(Box::new(fields), true)]).await.map(|_| ())
}

/// The kind of Forebay's own response.
enum Ours<'r> {
    Refusal(&'r Refused),
    /// The response of a filter, without a request to an upstream.
    Answer,
    /// The response of a filter in place of another one; the outer filters have seen its header.
    Instead,
}

/// Sends Forebay's own response. The route's filters process it like an endpoint's. If one of them refuses it, neither
/// a header nor another refusal changes; a filter's response replaces it.
async fn write(
    exchange: &mut Exchange,
    session: &mut ServerSession,
    mut response: ResponseHeader,
    mut body: Bytes,
    ours: Ours<'_>,
) -> Result<()> {
    set_length(&mut response, &body)?;
    let author = match &ours {
        Ours::Refusal(refused) => Author::Gateway(refused.refusal),
        Ours::Answer | Ours::Instead => Author::Filter,
    };
    if !matches!(ours, Ours::Instead)
        && let Verdict::Answer(answer) = exchange.filter_response(session.req_header_mut(), &mut response, author).await
    {
        body = answer.body;
        set_length(&mut response, &body)?;
    }
    let head = session.req_header().method == Method::HEAD;
    if exchange.sees_body() {
        if head {
            // The length after the filters is unknown.
            response.remove_header(&header::CONTENT_LENGTH);
        } else if answer::is_bodiless(head, response.status.as_u16()) {
            body = Bytes::new();
        } else if let Verdict::Refuse(refused) = exchange.filter_whole(session.req_header_mut(), &mut body).await {
            // The replacement is sent without filters, since one of them has refused.
            if let Ours::Refusal(before) = ours {
                (response, body) = refusal_page(session.req_header(), before)?;
            } else {
                (response, body) = refusal_page(session.req_header(), &refused)?;
                exchange.refusal = Some(refused.refusal);
            }
            set_length(&mut response, &body)?;
        } else {
            set_length(&mut response, &body)?;
        }
    }
    https::insist(exchange, &mut response);
    let (length_fields, request) = (LengthFields::of(&response.headers), session.req_header());
    let status = response.status.as_u16();
    let framed = answer::frame(head, status, Version::HTTP_11, &length_fields, request.version)
        .map_err(|fault| Error::explain(ErrorType::InternalError, fault.words()))?;
    framed.apply(&length_fields, &mut response)?;
    let without_body = body.is_empty() || framed.write == Body::None;
    session.write_response_header(Box::new(response)).await?;
    if without_body { session.finish_body().await } else { session.write_response_body(body, true).await }
}

fn set_length(response: &mut ResponseHeader, body: &Bytes) -> Result<()> {
    if response.status != StatusCode::NOT_MODIFIED {
        response.insert_header(header::CONTENT_LENGTH, body.len())?;
    }
    Ok(())
}

/// Waits until the client has accepted the rest of the response. The endpoint is already released; the duration is the
/// time that buffering saved it.
pub async fn drain(exchange: &mut Exchange, client: &mut Box<ServerSession>, released: Instant) {
    let Some(bodies) = exchange.bodies.clone().filter(|bodies| bodies.stands_in() && exchange.refusal.is_none()) else {
        return;
    };
    exchange.enter_at(Phase::Write, released);
    let drained = bodies.drain().await;
    if exchange.attempts.busy.held.is_some() {
        exchange.attempts.busy.saved = released.elapsed();
    }
    if drained.is_ok() && bodies.reclaim(client) {
        return;
    }
    let error = drained.err().unwrap_or_else(|| Error::new_down(ErrorType::WriteError));
    exchange.refusal = Some(blame::row(fault::of(exchange, &error, false)).refusal);
    tracing::debug!(%error, "a client did not accept the whole response");
    cut_if_begun(exchange, client, Some(&error)).await;
}

/// Cuts a response whose bytes were sent, so that the client cannot take it for complete. `false`: no bytes were sent,
/// and the client's own session is restored, so that another response can be sent.
pub async fn cut_if_begun(exchange: &mut Exchange, client: &mut Box<ServerSession>, error: Option<&Error>) -> bool {
    if let Some(bodies) = &exchange.bodies
        && bodies.stands_in()
    {
        if bodies.begun() && !bodies.framed() && !bodies.is_http2() {
            // This must precede dropping the write in progress together with its connection.
            exchange.client.connection.iter().for_each(|connection| connection.close_with_reset());
        }
        bodies.abandon();
        if !bodies.reclaim(client) {
            reset(exchange, error);
            return true;
        }
    }
    let begun = !is_unanswered(client);
    if begun {
        cut(exchange, client, error);
    }
    begun
}

/// Ends a response that will remain incomplete. If only the close of the connection delimits it, the connection is
/// reset, so that the client does not take it for complete.
fn cut(exchange: &mut Exchange, session: &mut ServerSession, error: Option<&Error>) {
    let framed = session.response_written().is_none_or(|response| {
        response.headers.contains_key(header::CONTENT_LENGTH)
            || response.headers.contains_key(header::TRANSFER_ENCODING)
    });
    if reset(exchange, error) {
        return;
    }
    if let Some(connection) = exchange.client.connection.as_ref().filter(|_| !framed) {
        connection.close_with_reset();
    }
    // The received part of the response is sent before the connection closes.
    end_connection(exchange, session);
    exchange.client.connection.iter().for_each(|connection| connection.break_off());
    exchange.client.closes = true;
}

/// Prevents further requests on the client's HTTP/1 connection.
pub fn end_connection(exchange: &Exchange, session: &mut ServerSession) {
    session.set_keepalive(None);
    exchange
        .client
        .connection
        .iter()
        .filter(|_| exchange.client.control.is_none())
        .for_each(|connection| connection.end_after_answer());
}

/// Resets the stream of an HTTP/2 exchange: without knowledge of the failure, Pingora would end it regularly. `false`:
/// the exchange uses HTTP/1.
fn reset(exchange: &Exchange, error: Option<&Error>) -> bool {
    let Some(control) = &exchange.client.control else { return false };
    control.reset(grpc::reset_code(exchange.refusal.unwrap_or(&refusal::INTERNAL), error));
    true
}

/// Whether a refusal can still be sent: at most interim responses were. After a 101 (RFC 9110 §15.2.2), the client
/// would take it for bytes of the other protocol.
fn is_unanswered(session: &ServerSession) -> bool {
    session
        .response_written()
        .is_none_or(|response| response.status.is_informational() && response.status != StatusCode::SWITCHING_PROTOCOLS)
}

/// Whether the client of a refusal is still connected.
pub fn is_heard(refusal: &Refusal) -> bool {
    refusal.status != 499
}
