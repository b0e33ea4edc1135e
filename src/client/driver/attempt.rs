//! One attempt: it sends the request to an endpoint and forwards the response to the client.
//!
//! The hooks run in the order of Pingora's HTTP/1 driver. The attempt polls client and endpoint in one task. While it
//! writes to the client, it only continues to send bytes that are queued for the endpoint.

use std::future::{Future, poll_fn};
use std::os::fd::RawFd;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode, Version, header};
use pingora::http::ResponseHeader;
use pingora::protocols::http::HttpTask;
use pingora::upstreams::peer::HttpPeer;
use pingora::{Error, ErrorType, Result};
use pingora_proxy::Session;

use super::Driven;
use super::answer::{Part, ResponseParser};
use super::connection::{Connection, Event, Messages};
use super::request::{self, Outgoing};
use super::sessions;
use crate::framing::answer::is_bodiless;
use crate::party::wait::{NoClient, Wait};

/// Maximum number of parts of a response that are forwarded together.
const TOGETHER: usize = 4;

/// The connection of an attempt.
pub struct Over<'p> {
    /// Whether the connection was used by an earlier exchange.
    pub reused: bool,
    /// The endpoint of the connection.
    pub peer: &'p HttpPeer,
}

/// The outcome of an attempt.
pub struct Outcome {
    /// Whether the client's connection may be reused.
    pub keeps_client: bool,
    /// Whether the endpoint's connection may be reused.
    pub keeps_connection: bool,
    /// The error, if the attempt failed.
    pub error: Option<Box<Error>>,
}

impl Outcome {
    fn failed(error: Box<Error>) -> Self {
        Outcome { keeps_client: false, keeps_connection: false, error: Some(error) }
    }
}

/// Runs an attempt over this connection.
pub async fn run<P>(
    proxy: &P,
    session: &mut Session,
    exchange: &mut P::CTX,
    connection: &mut Connection,
    over: Over<'_>,
) -> Outcome
where
    P: Driven + Send + Sync,
    P::CTX: Send + Sync,
{
    let Over { reused, peer } = over;
    let socket: RawFd = connection.socket();
    let made = proxy.connected_to_upstream(session, reused, peer, socket, Some(connection.digest()), exchange).await;
    if let Err(error) = made {
        return Outcome::failed(error);
    }
    let outgoing = match prepare(proxy, session, exchange).await {
        Ok(outgoing) => outgoing,
        // No byte was sent, so the connection can be reused.
        Err(error) => return Outcome { keeps_connection: true, ..Outcome::failed(error) },
    };
    let answer = ResponseParser::new(session.req_header().method == Method::HEAD, P::spells_answer(exchange));
    let messages = Messages::new(connection, outgoing, answer, peer.options.write_timeout);
    let mut passing = Passing { proxy, session, exchange, messages };
    match passing.run().await {
        Ok(keeps_client) => {
            Outcome { keeps_client, keeps_connection: passing.messages.keeps_connection(), error: None }
        }
        Err(error) => Outcome::failed(error),
    }
}

/// Builds the request for the endpoint.
async fn prepare<P>(proxy: &P, session: &mut Session, exchange: &mut P::CTX) -> Result<Outgoing>
where
    P: Driven + Send + Sync,
    P::CTX: Send + Sync,
{
    let mut request = request::towards_endpoint(session.req_header())?;
    proxy.upstream_request_filter(session, &mut request, exchange).await?;
    let mut lines = Vec::new();
    P::tell_hops(exchange, session.req_header(), &mut request, &mut lines)?;
    let body = request::frame(&mut request, !session.is_body_empty())?;
    let written = session.as_downstream().to_h1_raw();
    Outgoing::new(&request, request::Written { by_client: &written, lines: &lines }, body)
}

/// The forwarding of request and response between client and endpoint.
struct Passing<'a, P: Driven> {
    proxy: &'a P,
    session: &'a mut Session,
    exchange: &'a mut P::CTX,
    messages: Messages<'a>,
}

/// The event that ended a wait.
enum Happened {
    /// A piece of the request body, or `None` at its end.
    Client(Result<Option<Bytes>>),
    Endpoint(Result<Event>),
}

impl<P> Passing<'_, P>
where
    P: Driven + Send + Sync,
    P::CTX: Send + Sync,
{
    /// Forwards both messages. Returns whether the client's connection may be reused.
    async fn run(&mut self) -> Result<bool> {
        self.messages.begin().await?;
        self.session.as_downstream_mut().enable_retry_buffering();
        let mut is_read = self.session.is_body_done();
        let kept = self.session.get_retry_buffer();
        if kept.is_some() || self.session.is_body_empty() {
            self.take_piece(kept, is_read).await?;
        }
        let mut is_answered = false;
        while !is_read || !is_answered || self.messages.is_sending() {
            match self.wait(is_read).await {
                Happened::Client(piece) => {
                    let piece = piece.map_err(|error| error.into_down())?;
                    let ends = self.session.is_body_done();
                    is_read |= self.take_piece(piece, ends).await?;
                }
                Happened::Endpoint(Ok(Event::Sent)) => is_read |= self.messages.is_refused(),
                Happened::Endpoint(Ok(Event::Came(part))) => is_answered |= self.take_parts(part).await?,
                Happened::Endpoint(Err(error)) => return Err(Box::pin(self.tell(error)).await),
            }
        }
        Ok(sessions::finish_body(self.session.as_downstream_mut()).await.is_ok())
    }

    /// Waits for the first event on either side. It watches the client in every state.
    async fn wait(&mut self, is_read: bool) -> Happened {
        let reads = is_read || self.messages.wants_more();
        let Passing { session, messages, .. } = self;
        let client = &mut session.downstream_session;
        if is_read && messages.awaits_answer() {
            // The request is complete: the only remaining event of the client is its close, which does not matter once
            // the response is complete.
            return tokio::select! {
                biased;
                event = poll_fn(|cx| messages.poll(cx)) => Happened::Endpoint(event),
                piece = sessions::read_body_or_idle(client, true) => Happened::Client(piece),
            };
        }
        tokio::select! {
            biased;
            piece = sessions::read_body_or_idle(client, is_read), if reads => Happened::Client(piece),
            event = poll_fn(|cx| messages.poll(cx)) => Happened::Endpoint(event),
        }
    }

    /// Filters a piece of the request body and queues it for the endpoint. `true`: it was the last piece.
    async fn take_piece(&mut self, mut piece: Option<Bytes>, end: bool) -> Result<bool> {
        let end = end || piece.is_none();
        self.proxy.request_body_filter(self.session, &mut piece, end, self.exchange).await?;
        let last = end || piece.is_none();
        self.messages.push(piece, last)?;
        Ok(end)
    }

    /// Filters a part of the response and writes it to the client, together with further parts that are available
    /// without waiting. As a result, the client receives nothing of a response that breaks off in its first bytes.
    /// `true`: the response is complete.
    async fn take_parts(&mut self, first: Part) -> Result<bool> {
        let mut tasks = Vec::with_capacity(TOGETHER);
        let begins = matches!(first, Part::Header { .. });
        let mut next = Some(first);
        while let Some(part) = next {
            self.filter(part, &mut tasks).await?;
            if tasks.len() >= TOGETHER {
                break;
            }
            next = self.messages.next_at_once(begins).await.unwrap_or_else(|error| {
                tasks.push(HttpTask::Failed(error));
                None
            });
        }
        let Passing { session, messages, .. } = self;
        let mut writing = pin!(sessions::write(&mut session.downstream_session, tasks));
        let is_complete = poll_fn(|cx| {
            messages.poll_sending(cx);
            writing.as_mut().poll(cx)
        });
        Ok(is_complete.await? || messages.is_answered())
    }

    async fn filter(&mut self, part: Part, tasks: &mut Vec<HttpTask>) -> Result<()> {
        match part {
            Part::Header { mut header, written, end } => {
                P::answer_came_in(self.exchange, written);
                self.header(&mut header, end).await?;
                tasks.push(HttpTask::Header(header, end));
            }
            Part::Body(piece, end) => {
                let mut piece = Some(piece).filter(|piece| !piece.is_empty());
                let mut trailers = if end { self.messages.take_trailers().map(Box::new) } else { None };
                let mut instead = None;
                if let Some(fields) = &mut trailers {
                    self.proxy.upstream_response_trailer_filter(self.session, fields, self.exchange)?;
                    instead = self.proxy.response_trailer_filter(self.session, fields, self.exchange).await?;
                }
                pause(self.proxy.upstream_response_body_filter(self.session, &mut piece, end, self.exchange)?).await;
                pause(self.proxy.response_body_filter(self.session, &mut piece, end, self.exchange)?).await;
                match (instead, trailers.filter(|fields| !fields.is_empty())) {
                    (Some(last), _) => {
                        tasks.push(HttpTask::Body(piece, false));
                        tasks.push(HttpTask::Body(Some(last), true));
                    }
                    (None, Some(fields)) => {
                        tasks.push(HttpTask::Body(piece, true));
                        tasks.push(HttpTask::Trailer(Some(fields)));
                    }
                    (None, None) => tasks.push(HttpTask::Body(piece, end)),
                }
            }
        }
        Ok(())
    }

    async fn header(&mut self, response: &mut ResponseHeader, end: bool) -> Result<()> {
        self.proxy.upstream_response_filter(self.session, response, self.exchange).await?;
        let (head, status) = (self.session.req_header().method == Method::HEAD, response.status.as_u16());
        if !end
            && !is_bodiless(head, status)
            && !response.headers.contains_key(header::CONTENT_LENGTH)
            && !response.headers.contains_key(header::TRANSFER_ENCODING)
        {
            // The close of the endpoint's connection, or its chunks, ended the body there. Chunks end it for the
            // client, whose connection can then stay open.
            response.set_version(Version::HTTP_11);
            response.insert_header(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"))?;
        }
        self.proxy.response_filter(self.session, response, self.exchange).await?;
        if response.status == StatusCode::SWITCHING_PROTOCOLS {
            // The client did not request another protocol.
            return Error::e_explain(ErrorType::InvalidHTTPHeader, "a response of another protocol")
                .map_err(|error: Box<Error>| error.into_up());
        }
        Ok(())
    }

    /// Reports a failed response to the client's session. Returns the session's error if it has one.
    async fn tell(&mut self, error: Box<Error>) -> Box<Error> {
        let failed = vec![HttpTask::Failed(error)];
        match sessions::write(&mut self.session.downstream_session, failed).await {
            Err(error) => error,
            Ok(_) => Error::explain(ErrorType::ConnectionClosed, "before the end of a response").into_up(),
        }
    }
}

/// Waits for the delay that a filter requested.
async fn pause(time: Option<Duration>) {
    if let Some(time) = time {
        let _ = Wait::at_most(time, NoClient::Within).out().await;
    }
}
