//! One attempt: a request goes to an endpoint over a connection, and its answer comes back to the client.
//!
//! The order of the hooks is that of Pingora's driver for HTTP/1. Client and endpoint are looked after at once; while
//! the client takes what came, only what is to be sent to the endpoint goes on.

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
use super::answer::{Answer, Part};
use super::connection::{Connection, Event, Messages};
use super::request::{self, Outgoing};
use crate::framing::answer::is_bodiless;
use crate::party::wait::{NoClient, Wait};

/// The most parts of an answer that are passed on together.
const TOGETHER: usize = 4;

/// What an attempt goes over.
pub struct Over<'p> {
    /// The connection was kept from an earlier exchange.
    pub reused: bool,
    /// Where it leads.
    pub peer: &'p HttpPeer,
}

/// What became of an attempt.
pub struct Outcome {
    /// Whether the client's connection may be kept.
    pub keeps_client: bool,
    /// Whether the endpoint's may be.
    pub keeps_connection: bool,
    /// Why it failed.
    pub error: Option<Box<Error>>,
}

impl Outcome {
    fn failed(error: Box<Error>) -> Self {
        Outcome { keeps_client: false, keeps_connection: false, error: Some(error) }
    }
}

/// Makes an attempt over this connection.
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
        // Nothing was sent.
        Err(error) => return Outcome { keeps_connection: true, ..Outcome::failed(error) },
    };
    let answer = Answer::new(session.req_header().method == Method::HEAD, P::spells_answer(exchange));
    let messages = Messages::new(connection, outgoing, answer, peer.options.write_timeout);
    let mut passing = Passing { proxy, session, exchange, messages };
    match passing.run().await {
        Ok(keeps_client) => {
            Outcome { keeps_client, keeps_connection: passing.messages.keeps_connection(), error: None }
        }
        Err(error) => Outcome::failed(error),
    }
}

/// The request as its endpoint gets it.
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

/// Messages that pass between client and endpoint.
struct Passing<'a, P: Driven> {
    proxy: &'a P,
    session: &'a mut Session,
    exchange: &'a mut P::CTX,
    messages: Messages<'a>,
}

/// What was waited for has happened.
enum Happened {
    /// A piece of the request body, or its end.
    Client(Result<Option<Bytes>>),
    Endpoint(Result<Event>),
}

impl<P> Passing<'_, P>
where
    P: Driven + Send + Sync,
    P::CTX: Send + Sync,
{
    /// Passes both messages. Gives whether the client's connection may be kept.
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
                Happened::Endpoint(Err(error)) => return Err(self.tell(error).await),
            }
        }
        Ok(self.session.as_downstream_mut().finish_body().await.is_ok())
    }

    /// Waits for whatever comes first. The client is watched in any case.
    async fn wait(&mut self, is_read: bool) -> Happened {
        let reads = is_read || self.messages.wants_more();
        let Passing { session, messages, .. } = self;
        if is_read && messages.awaits_answer() {
            // The client has nothing more to say but that it leaves, which need not be asked once the answer is here.
            return tokio::select! {
                biased;
                event = poll_fn(|cx| messages.poll(cx)) => Happened::Endpoint(event),
                piece = session.downstream_session.read_body_or_idle(true) => Happened::Client(piece),
            };
        }
        tokio::select! {
            biased;
            piece = session.downstream_session.read_body_or_idle(is_read), if reads => Happened::Client(piece),
            event = poll_fn(|cx| messages.poll(cx)) => Happened::Endpoint(event),
        }
    }

    /// A piece of the request goes through its filters and on to the endpoint. `true`: it was the last one.
    async fn take_piece(&mut self, mut piece: Option<Bytes>, end: bool) -> Result<bool> {
        let end = end || piece.is_none();
        self.proxy.request_body_filter(self.session, &mut piece, end, self.exchange).await?;
        let last = end || piece.is_none();
        self.messages.push(piece, last)?;
        Ok(end)
    }

    /// A part of the answer goes through its filters and on to the client, with what can be had at once of the next
    /// ones: an answer that breaks off at its beginning has not begun for the client. `true`: the answer is complete.
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
        let mut writing = pin!(session.downstream_session.response_duplex_vec(tasks));
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
            // The end of its connection, or of its chunks, is not to be that of the client's connection.
            response.set_version(Version::HTTP_11);
            response.insert_header(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"))?;
        }
        self.proxy.response_filter(self.session, response, self.exchange).await?;
        if response.status == StatusCode::SWITCHING_PROTOCOLS {
            // It was not asked for.
            return Error::e_explain(ErrorType::InvalidHTTPHeader, "an answer of another protocol")
                .map_err(|error: Box<Error>| error.into_up());
        }
        Ok(())
    }

    /// Tells the client's session that no more comes of the answer; what it makes of that is the error.
    async fn tell(&mut self, error: Box<Error>) -> Box<Error> {
        let failed = vec![HttpTask::Failed(error)];
        match self.session.downstream_session.response_duplex_vec(failed).await {
            Err(error) => error,
            Ok(_) => Error::explain(ErrorType::ConnectionClosed, "before the end of an answer").into_up(),
        }
    }
}

/// A filter may have what follows wait.
async fn pause(time: Option<Duration>) {
    if let Some(time) = time {
        let _ = Wait::at_most(time, NoClient::Within).out().await;
    }
}
