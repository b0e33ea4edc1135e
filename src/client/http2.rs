//! HTTP/2 connections of clients and their streams, with the `h2` library that Pingora also uses.
//!
//! Pingora's HTTP/2 session hides the library's handles. It offers no way to send interim responses (RFC 9110 §15.2),
//! to read the trailers of a request, or to reset a stream with a reason while a write owns the session. Connections
//! are therefore accepted here: a [`Stream`] is the session for Pingora and `body::response`, and [`Control`]
//! gives access to the other operations. [`guard`] observes the frames, and [`conduct`](super::conduct) limits what a
//! client may do.

pub mod guard;
pub mod websocket;

use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderName, Request, Response, header};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::http::HttpTask;
use pingora::protocols::http::custom::CustomMessageWrite;
use pingora::protocols::http::custom::server::Session as CustomSession;
use pingora::protocols::http::date::get_cached_date;
use pingora::protocols::l4::socket::SocketAddr;
use pingora::protocols::{Digest, GetSocketDigest, UniqueID};
use pingora::{Error, ErrorType, OrErr, Result};
use tokio::sync::watch;

use super::conduct::Offence;
use super::kept::Kept;
use super::listener::Listener;
use super::remains;
use super::stream::{ClientStream, WeakBypass};
use crate::error::{Refusal, refusal};
use crate::party::wait::NoClient;
use crate::upstream::transport::http2::send_body;
use guard::{Guard, Watch};

/// Fields of an HTTP/1 connection, which are forbidden in HTTP/2 (RFC 9113 §8.2.2).
static OF_HTTP1: [HeaderName; 5] = [
    header::TRANSFER_ENCODING,
    header::CONNECTION,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];

/// An event on a connection.
#[expect(clippy::large_enum_variant, reason = "there is one at a time, and nearly all are requests")]
enum Event {
    /// A request.
    Request(Request<RecvStream>, SendResponse<Bytes>),
    /// The library refused a request itself.
    Refused(&'static Refusal),
    /// The client must be cut off.
    Offence(Offence),
    /// The connection ended, regularly or by an error.
    End(Option<h2::Error>),
}

/// The kind of a stream.
#[expect(clippy::large_enum_variant, reason = "there is one at a time, and nearly all are exchanges")]
pub enum Opened {
    /// An exchange.
    Exchange(Stream),
    /// A tunnelled HTTP/1.1 connection that will switch to another protocol.
    Carried(Box<websocket::Carried>),
}

/// Serves a connection until it ends. Passes each stream to `begin`. Reports to `refuse` what never becomes a stream:
/// requests that the library refuses, and clients that are cut off. When `ending` becomes true, a GOAWAY asks the
/// client to open no more streams, and the connection ends with its last stream.
pub async fn serve(
    io: Box<ClientStream>,
    listener: &Listener,
    mut ending: watch::Receiver<bool>,
    mut begin: impl FnMut(Opened),
    mut refuse: impl FnMut(&'static Refusal),
) {
    let (watch, progress) = (Watch::new(&listener.http2.rules), io.progress());
    let (socket, digest, bytes) = (io.id(), io.get_socket_digest(), io.weak_bypass());
    let guard = Guard::new(io, watch.clone(), listener.terms.header_timeout);
    let mut connection = match listener.http2.options.handshake::<_, Bytes>(guard).await {
        Ok(connection) => connection,
        Err(error) => return tracing::debug!(%error, "an HTTP/2 handshake failed"),
    };
    let (mut ends, mut cut) = (false, false);
    loop {
        let next = poll_fn(|cx| {
            // The call for the next request also makes the library progress on all streams.
            Poll::Ready(match connection.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, respond)))) => Event::Request(request, respond),
                Poll::Ready(Some(Err(error))) => Event::End(Some(error)),
                Poll::Ready(None) => Event::End(None),
                Poll::Pending => match (watch.refused(), watch.offence()) {
                    (Some(refusal), _) => Event::Refused(refusal),
                    (None, Some(offence)) if !cut => Event::Offence(offence),
                    _ => return Poll::Pending,
                },
            })
        });
        let event = tokio::select! {
            biased;
            _ = ending.wait_for(|ending| *ending), if !ends => {
                connection.graceful_shutdown();
                ends = true;
                continue;
            }
            event = next => event,
        };
        match event {
            Event::Request(request, mut respond) => {
                watch.claim(respond.stream_id().as_u32());
                // A request that was reset before any work on it costs no endpoint anything.
                let mut context = Context::from_waker(Waker::noop());
                if respond.poll_reset(&mut context).is_ready() {
                    refuse(&refusal::HEADER_ABORTED);
                } else if websocket::asks(&request) {
                    match websocket::carry(request, respond, socket, digest.clone()) {
                        Ok(carried) => begin(Opened::Carried(Box::new(carried))),
                        Err((status, respond)) => {
                            refuse(&refusal::HEADER_METHOD);
                            websocket::refuse(status, respond);
                        }
                    }
                } else {
                    begin(Opened::Exchange(Stream::new(request, respond, bytes.clone())));
                }
            }
            Event::Refused(refusal) => refuse(refusal),
            Event::Offence(Offence { refusal, code }) => {
                cut = true;
                refuse(refusal);
                progress.condemn();
                connection.abrupt_shutdown(code);
            }
            Event::End(error) => {
                while let Some(refusal) = watch.refused() {
                    refuse(refusal);
                }
                if let Some(error) = error {
                    if let Some(refusal) = watch.verdict(&error) {
                        refuse(refusal);
                    }
                    tracing::debug!(%error, "an HTTP/2 connection failed");
                }
                return;
            }
        }
    }
}

/// The library's handles of one stream.
struct Core {
    body: RecvStream,
    respond: SendResponse<Bytes>,
    /// Present once the response header was sent, unless a write owns it.
    send: Option<SendStream<Bytes>>,
    /// The response header was sent. From then on, the `respond` handle does not report a reset.
    answered: bool,
    /// The end of the response was given to the library.
    ended: bool,
    /// The trailers of the request.
    trailers: Option<HeaderMap>,
    /// The connection's stream of bytes.
    bytes: WeakBypass,
}

impl Core {
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>>> {
        const READING: &str = "reading the request body";
        match ready!(self.body.poll_data(cx)) {
            Some(Ok(data)) => {
                // An error means that the stream has ended; the next read reports it.
                let _ = self.body.flow_control().release_capacity(data.len());
                Poll::Ready(Ok(Some(data)))
            }
            Some(Err(error)) => Poll::Ready(Err(Error::because(ErrorType::ReadError, READING, error).into_down())),
            None => Poll::Ready(match ready!(self.body.poll_trailers(cx)) {
                Ok(trailers) => {
                    self.trailers = trailers.or(self.trailers.take());
                    Ok(None)
                }
                Err(error) => Err(Error::because(ErrorType::ReadError, READING, error).into_down()),
            }),
        }
    }

    /// Ready when the client has reset the stream. Pending while a write is in progress.
    fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<Box<Error>> {
        let reset = match &mut self.send {
            Some(send) => send.poll_reset(cx),
            // The write that owns the handle detects the reset.
            None if self.ended || self.answered => return Poll::Pending,
            None => self.respond.poll_reset(cx),
        };
        Poll::Ready(match ready!(reset) {
            Ok(reason) => Error::explain(ErrorType::H2Error, format!("the client has reset the stream: {reason}")),
            Err(error) => Error::because(ErrorType::H2Error, "waiting for the client", error),
        })
        .map(|error| error.into_down())
    }
}

/// Access to a stream that is independent of the owner of its session.
#[derive(Clone)]
pub struct Control(Arc<Mutex<Core>>);

impl Control {
    fn core(&self) -> MutexGuard<'_, Core> {
        // One task uses the lock, one part at a time, so it never blocks.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ready when the client has reset the stream, or its connection has failed. Pending while a write is in progress,
    /// which detects this itself.
    pub fn poll_closed(&self, cx: &mut Context<'_>) -> Poll<Box<Error>> {
        self.core().poll_closed(cx)
    }

    /// Takes the trailers of the request, after its body was read completely.
    pub fn take_trailers(&self) -> Option<HeaderMap> {
        self.core().trailers.take()
    }

    /// Total number of bytes that the client's host has acknowledged, on all streams, while the socket accepts no more.
    /// `None`: it does, and the stream waits for credit of the client.
    pub fn delivered_while_stalled(&self) -> Option<u64> {
        let connection = self.core().bytes.bypass();
        connection?.delivered_while_stalled()
    }

    /// Resets the stream, unless its response is complete.
    pub fn reset(&self, reason: Reason) {
        let mut core = self.core();
        if !core.ended {
            core.ended = true;
            core.respond.send_reset(reason);
        }
    }
}

/// One HTTP/2 exchange, as a session for Pingora.
pub struct Stream {
    request: RequestHeader,
    control: Control,
    empty: bool,
    answered: Option<Box<ResponseHeader>>,
    read: usize,
    sent: usize,
    kept: Kept,
    write_timeout: Option<Duration>,
}

impl Stream {
    fn new(request: Request<RecvStream>, respond: SendResponse<Bytes>, bytes: WeakBypass) -> Stream {
        let (head, body) = request.into_parts();
        let request = RequestHeader::from(head);
        // A length of 0 is only an announcement until the stream ends (RFC 9113 §8.1.1).
        let empty = body.is_end_stream();
        let core = Core { body, respond, send: None, answered: false, ended: false, trailers: None, bytes };
        Stream {
            request,
            control: Control(Arc::new(Mutex::new(core))),
            empty,
            answered: None,
            read: 0,
            sent: 0,
            kept: Kept::default(),
            write_timeout: None,
        }
    }

    /// The control of this stream.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    fn write_header(&mut self, mut answer: Box<ResponseHeader>, end: bool) -> Result<()> {
        let mut core = self.control.core();
        if core.ended || self.answered.is_some() {
            tracing::debug!("a second response header is dropped");
            return Ok(());
        }
        for name in &OF_HTTP1 {
            answer.remove_header(name);
        }
        const WRITING: &str = "writing the header of a response";
        if answer.status.is_informational() {
            let interim = Response::from_parts(answer.as_owned_parts(), ());
            return core.respond.send_informational(interim).or_err(ErrorType::WriteError, WRITING);
        }
        answer.insert_header(header::DATE, get_cached_date())?;
        let response = Response::from_parts(answer.as_owned_parts(), ());
        let send = core.respond.send_response(response, end).or_err(ErrorType::WriteError, WRITING)?;
        core.answered = true;
        core.send = Some(send);
        core.ended = end;
        self.answered = Some(answer);
        Ok(())
    }

    /// Takes the sending handle; [`Stream::sent`] puts it back.
    fn sending(&self) -> Result<Option<SendStream<Bytes>>> {
        let mut core = self.control.core();
        if core.ended {
            return Ok(None);
        }
        let send = core.send.take();
        send.map(Some).ok_or_else(|| Error::explain(ErrorType::H2Error, "a body before its header"))
    }

    fn sent(&mut self, send: SendStream<Bytes>, bytes: usize, end: bool) {
        let mut core = self.control.core();
        core.send = Some(send);
        core.ended |= end;
        self.sent += bytes;
    }

    async fn write(&mut self, data: Bytes, end: bool) -> Result<()> {
        let Some(mut send) = self.sending()? else { return Ok(()) };
        let bytes = data.len();
        let written = send_body(&mut send, data, end, self.write_timeout, NoClient::ItsIo).await;
        self.sent(send, if written.is_ok() { bytes } else { 0 }, end && written.is_ok());
        written
    }

    fn end(&mut self, trailers: Option<HeaderMap>) -> Result<()> {
        // Without a response there is nothing to end: dropping the stream resets it.
        if self.answered.is_none() {
            return Ok(());
        }
        let Some(mut send) = self.sending()? else { return Ok(()) };
        let ended = match trailers {
            Some(trailers) => send.send_trailers(trailers),
            None => send.send_data(Bytes::new(), true),
        };
        self.sent(send, 0, ended.is_ok());
        ended.or_err(ErrorType::WriteError, "ending a response")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        remains::leave_request(&mut self.request);
    }
}

#[async_trait]
impl CustomSession for Stream {
    fn req_header(&self) -> &RequestHeader {
        &self.request
    }

    fn req_header_mut(&mut self) -> &mut RequestHeader {
        &mut self.request
    }

    async fn read_body_bytes(&mut self) -> Result<Option<Bytes>> {
        let data = poll_fn(|cx| self.control.core().poll_read(cx)).await?;
        if let Some(data) = &data {
            self.read += data.len();
            self.kept.push(data);
        }
        Ok(data)
    }

    async fn read_body_or_idle(&mut self, no_body_expected: bool) -> Result<Option<Bytes>> {
        if no_body_expected || self.is_body_done() {
            return Err(poll_fn(|cx| self.control.poll_closed(cx)).await);
        }
        self.read_body_bytes().await
    }

    async fn drain_request_body(&mut self) -> Result<()> {
        while !self.is_body_done() && self.read_body_bytes().await?.is_some() {}
        Ok(())
    }

    async fn write_response_header(&mut self, answer: Box<ResponseHeader>, end: bool) -> Result<()> {
        self.write_header(answer, end)
    }

    async fn write_response_header_ref(&mut self, answer: &ResponseHeader, end: bool) -> Result<()> {
        self.write_header(Box::new(answer.clone()), end)
    }

    async fn write_body(&mut self, data: Bytes, end: bool) -> Result<()> {
        self.write(data, end).await.map_err(|error| error.into_down())
    }

    async fn write_trailers(&mut self, trailers: HeaderMap) -> Result<()> {
        self.end(Some(trailers)).map_err(|error| error.into_down())
    }

    async fn response_duplex_vec(&mut self, tasks: Vec<HttpTask>) -> Result<bool> {
        let mut ended = false;
        for task in tasks {
            ended |= task.is_end();
            match task {
                HttpTask::Header(header, end) => self.write_header(header, end),
                HttpTask::Body(Some(data), end) if !data.is_empty() => self.write(data, end).await,
                HttpTask::Trailer(Some(trailers)) => self.end(Some(*trailers)),
                HttpTask::Body(..) | HttpTask::Trailer(None) | HttpTask::Done => Ok(()),
                HttpTask::UpgradedBody(..) => Error::e_explain(ErrorType::InternalError, "HTTP/2 has no upgrades"),
                HttpTask::Failed(error) => return Err(error),
            }
            .map_err(|error| error.into_down())?;
        }
        if ended {
            self.end(None).map_err(|error| error.into_down())?;
        }
        Ok(ended)
    }

    async fn finish(&mut self) -> Result<()> {
        self.end(None)
    }

    async fn finish_custom(&mut self) -> Result<()> {
        Ok(())
    }

    async fn shutdown(&mut self, _code: u32, _context: &str) {
        self.control.reset(Reason::INTERNAL_ERROR);
    }

    fn response_written(&self) -> Option<&ResponseHeader> {
        self.answered.as_deref()
    }

    fn request_summary(&self) -> String {
        format!("{} {}", self.request.method, self.request.uri)
    }

    fn pseudo_raw_h1_request_header(&self) -> Bytes {
        Bytes::new()
    }

    fn is_body_done(&mut self) -> bool {
        self.is_body_empty() || self.control.core().body.is_end_stream()
    }

    fn is_body_empty(&mut self) -> bool {
        self.empty && self.read == 0
    }

    fn body_bytes_sent(&self) -> usize {
        self.sent
    }

    fn body_bytes_read(&self) -> usize {
        self.read
    }

    no_connection!();

    // `body::request` enforces the deadline for the request body. An unwanted body is not drained.

    fn set_read_timeout(&mut self, _timeout: Option<Duration>) {}

    fn get_read_timeout(&self) -> Option<Duration> {
        None
    }

    fn set_write_timeout(&mut self, timeout: Option<Duration>) {
        self.write_timeout = timeout;
    }

    fn get_write_timeout(&self) -> Option<Duration> {
        self.write_timeout
    }

    fn set_total_drain_timeout(&mut self, _timeout: Option<Duration>) {}

    fn get_total_drain_timeout(&self) -> Option<Duration> {
        None
    }

    fn enable_retry_buffering(&mut self) {
        self.kept.begin();
    }

    fn retry_buffer_truncated(&self) -> bool {
        self.kept.is_truncated()
    }

    fn get_retry_buffer(&self) -> Option<Bytes> {
        self.kept.bytes()
    }

    no_custom_messages!();
}
