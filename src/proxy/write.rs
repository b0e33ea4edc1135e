//! Phase `write`: what Forebay itself tells the client, and what the client is not to take for a whole answer.
//!
//! The upstream's answer is written by Pingora and `client::session`; refusals and the answers of filters here.

use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use pingora::Result;
use pingora::http::ResponseHeader;
use pingora::protocols::http::ServerSession;

use super::exchange::Exchange;
use crate::error::Refusal;
use crate::filter::{Answer, Refused};

/// Refuses an exchange of which nothing was sent yet.
pub async fn refuse(exchange: &Exchange, session: &mut ServerSession, refused: &Refused) -> Result<()> {
    let json = session
        .get_header(header::ACCEPT)
        .is_some_and(|accept| memchr::memmem::find(accept.as_bytes(), b"application/json").is_some());
    let (kind, body) = refused.refusal.body(json);
    let status = StatusCode::from_u16(refused.refusal.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = ResponseHeader::build(status, Some(refused.headers.len() + 4))?;
    response.insert_header(header::CONTENT_TYPE, HeaderValue::from_static(kind))?;
    if let Some(methods) = refused.refusal.allow() {
        response.insert_header(header::ALLOW, HeaderValue::from_static(methods))?;
    }
    write(exchange, session, response, &refused.headers, body.into()).await
}

/// Sends the answer of a filter.
pub async fn answer(exchange: &Exchange, session: &mut ServerSession, answer: Answer) -> Result<()> {
    let response = ResponseHeader::build(answer.status, Some(answer.headers.len() + 3))?;
    write(exchange, session, response, &answer.headers, answer.body).await
}

async fn write(
    exchange: &Exchange,
    session: &mut ServerSession,
    mut response: ResponseHeader,
    headers: &[(HeaderName, HeaderValue)],
    body: bytes::Bytes,
) -> Result<()> {
    for (name, value) in headers {
        response.append_header(name.clone(), value.clone())?;
    }
    if response.status != StatusCode::NO_CONTENT && response.status != StatusCode::NOT_MODIFIED {
        response.insert_header(header::CONTENT_LENGTH, body.len())?;
    }
    // The filters of the route see our answers as they see an endpoint's; here, a refusal of theirs changes nothing.
    let _ = exchange.filter_response(session.req_header_mut(), &mut response).await;
    let without_body = body.is_empty() || session.req_header().method == Method::HEAD;
    session.write_response_header(Box::new(response)).await?;
    if without_body { session.finish_body().await } else { session.write_response_body(body, true).await }
}

/// Bytes of an answer have left and the rest will not come. Where its end is told by the connection's end alone, the
/// connection is reset, so that nobody takes what came for the whole.
pub async fn cut(exchange: &Exchange, session: &mut ServerSession) {
    let framed = session.response_written().is_none_or(|response| {
        response.headers.contains_key(header::CONTENT_LENGTH)
            || response.headers.contains_key(header::TRANSFER_ENCODING)
    });
    if session.is_http2() {
        // Dropping the session resets the stream.
        return;
    }
    if let Some(connection) = exchange.connection.as_ref().filter(|_| !framed) {
        connection.close_with_reset();
    }
    // What came of the answer is sent before the connection goes.
    session.shutdown().await;
}

/// Whether a refusal can still be told: nothing but interim responses has left.
pub fn is_unanswered(session: &ServerSession) -> bool {
    session.response_written().is_none_or(|response| response.status.is_informational())
}

/// Whether there is a client left to tell this to.
pub fn is_heard(refusal: &Refusal) -> bool {
    refusal.status != 499
}
