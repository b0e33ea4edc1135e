//! The session of one HTTP/1 request: it parses the header once and writes the response directly to the connection.
//!
//! Pingora's own session would parse the header again, keep a buffer for a body that is read past it, and change the
//! form of a response. Only requests for another protocol use it, since only it can become a tunnel. This session never
//! owns the connection: the owner, [`ClientStream`], asks for the outcome afterwards.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::time::Duration;

use async_trait::async_trait;
use bytes::{BufMut, Bytes};
use http::{HeaderMap, Method, Version, header};
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::protocols::Digest;
use pingora::protocols::http::HttpTask;
use pingora::protocols::http::custom::CustomMessageWrite;
use pingora::protocols::http::custom::server::Session as CustomSession;
use pingora::protocols::http::date::get_cached_date;
use pingora::protocols::l4::socket::SocketAddr;
use pingora::{Error, ErrorType, Result};

use super::fields;
use super::head;
use super::kept::Kept;
use super::remains;
use super::stream::{Bypass, ClientStream};
use super::trailers::last_chunk;
use crate::framing::{Body, LengthFields, answer};

/// The session; see the module.
pub struct Session {
    connection: Bypass,
    request: RequestHeader,
    /// The header as received.
    written: Bytes,
    /// Whether the request has no body.
    empty: bool,
    answered: Option<Box<ResponseHeader>>,
    /// The framing of the response body, if this session writes it.
    framing: Body,
    kept: Kept,
    read: usize,
    sent: usize,
}

impl Drop for Session {
    fn drop(&mut self) {
        remains::leave_request(&mut self.request);
    }
}

impl Session {
    /// Creates the session of the connection's next request.
    pub fn new(connection: &ClientStream, request: head::Request) -> Session {
        let head::Request { written, header: request, .. } = request;
        let connection = connection.bypass();
        let empty = connection.is_read();
        let (answered, framing, kept) = (None, Body::None, Kept::default());
        Session { connection, request, written, empty, answered, framing, kept, read: 0, sent: 0 }
    }

    fn write_header(&mut self, mut answer: Box<ResponseHeader>) -> Result<()> {
        if self.has_answered() {
            return Ok(());
        }
        gather_header(&self.connection, &mut answer, b"");
        if !answer.status.is_informational() {
            self.framing = self.framing_of(&answer)?;
        }
        self.answered = Some(answer);
        Ok(())
    }

    /// The framing of a response body that this session writes. A buffered session frames bodies itself.
    fn framing_of(&self, answer: &ResponseHeader) -> Result<Body> {
        if self.request.method == Method::HEAD {
            return Ok(Body::None);
        }
        let (status, length_fields) = (answer.status.as_u16(), LengthFields::of(&answer.headers));
        answer::frame(false, status, Version::HTTP_11, &length_fields, self.request.version)
            .map(|framed| framed.write)
            .map_err(|fault| Error::explain(ErrorType::InternalError, fault.words()))
    }

    /// Whether the final header was written.
    fn has_answered(&self) -> bool {
        self.answered.as_ref().is_some_and(|answer| !answer.status.is_informational())
    }

    /// `end`: it is the last piece.
    async fn write_piece(&mut self, piece: Bytes, end: bool) -> Result<()> {
        let mut pieces = VecDeque::new();
        match &mut self.framing {
            Body::None => return Ok(()),
            Body::Length(left) => {
                let piece = piece.slice(..piece.len().min(usize::try_from(*left).unwrap_or(usize::MAX)));
                *left -= piece.len() as u64;
                self.sent += piece.len();
                pieces.push_back(piece);
            }
            Body::Chunked => {
                self.sent += piece.len();
                pieces.extend([format!("{:x}\r\n", piece.len()).into(), piece, Bytes::from_static(b"\r\n")]);
            }
            Body::UntilEnd => {
                self.sent += piece.len();
                pieces.push_back(piece);
            }
        }
        let ends = end && matches!(self.framing, Body::Length(0) | Body::UntilEnd);
        self.send(pieces, ends).await
    }

    /// Sends the gathered bytes and then these pieces. `ends`: they complete the response.
    async fn send(&self, mut pieces: VecDeque<Bytes>, ends: bool) -> Result<()> {
        poll_fn(|cx| self.connection.poll_send(cx, &mut pieces, ends)).await.map_err(unwritten)
    }

    /// Ends a response that this session has written, and sends the gathered bytes.
    async fn end(&mut self, trailers: Option<HeaderMap>) -> Result<()> {
        let framing = std::mem::replace(&mut self.framing, Body::None);
        match framing {
            Body::Chunked => self.connection.gather(|out| out.put(last_chunk(trailers.as_ref()))),
            // The close shows the client that the body is incomplete.
            Body::Length(1..) => self.connection.end_after_answer(),
            Body::UntilEnd => self.connection.end_after_answer(),
            Body::None | Body::Length(0) => {}
        }
        let is_whole = self.has_answered() && !matches!(framing, Body::Length(1..));
        self.send(VecDeque::new(), is_whole).await
    }

    async fn flush(&self) -> Result<()> {
        poll_fn(|cx| self.connection.poll_flush(cx)).await.map_err(unwritten)
    }
}

/// Serialises the header of a response, to be sent with the next bytes. `written` is the header as received, for the
/// spelling of names. A final header says whether another request may follow.
pub fn gather_header(connection: &Bypass, answer: &mut ResponseHeader, written: &[u8]) {
    let is_final = !answer.status.is_informational();
    // One pass costs less than three look-ups.
    let (mut is_told, mut requires_upgrade) = (false, false);
    for name in answer.headers.keys().filter(|_| is_final) {
        is_told |= matches!(*name, header::DATE | header::CONNECTION);
        requires_upgrade |= *name == header::UPGRADE;
    }
    if is_told {
        // Date is the time of sending, and Connection applied to the endpoint's connection.
        answer.remove_header(&header::DATE);
        answer.remove_header(&header::CONNECTION);
    }
    let goes_on = connection.may_go_on();
    if is_final && !goes_on {
        // The connection closes in any case, since the response announces it.
        connection.end_after_answer();
    }
    connection.gather(|out| {
        out.reserve(512);
        out.put_slice(if answer.version == Version::HTTP_10 { b"HTTP/1.0 " } else { b"HTTP/1.1 " });
        out.put_slice(answer.status.as_str().as_bytes());
        out.put_u8(b' ');
        out.put_slice(answer.get_reason_phrase().unwrap_or_default().as_bytes());
        out.put_slice(b"\r\n");
        fields::write_answer(answer, written, out);
        if is_final {
            out.put_slice(b"Date: ");
            out.put_slice(get_cached_date().as_bytes());
            let connection: &[u8] = if goes_on { b"\r\nConnection: keep-alive" } else { b"\r\nConnection: close" };
            out.put_slice(connection);
            // A server that sends Upgrade lists it in Connection (RFC 9110 §7.8).
            let upgrade: &[u8] = if requires_upgrade { b", upgrade\r\n" } else { b"\r\n" };
            out.put_slice(upgrade);
        }
        out.put_slice(b"\r\n");
    });
}

/// The error for a request body that could not be read.
pub fn unread(error: io::Error) -> Box<Error> {
    let kind = match error.kind() {
        io::ErrorKind::UnexpectedEof => ErrorType::ConnectionClosed,
        _ => ErrorType::ReadError,
    };
    Error::because(kind, "reading the request body", error).into_down()
}

/// The error for a client that closed its connection, regularly or not.
pub fn gone(gone: io::Result<()>) -> Box<Error> {
    let error = gone.err().unwrap_or(io::ErrorKind::UnexpectedEof.into());
    Error::because(ErrorType::ConnectionClosed, "the client has gone", error).into_down()
}

fn unwritten(error: io::Error) -> Box<Error> {
    let kind = match error.kind() {
        io::ErrorKind::TimedOut => ErrorType::WriteTimedout,
        _ => ErrorType::WriteError,
    };
    Error::because(kind, "writing the response", error).into_down()
}

#[async_trait]
impl CustomSession for Session {
    fn req_header(&self) -> &RequestHeader {
        &self.request
    }

    fn req_header_mut(&mut self) -> &mut RequestHeader {
        &mut self.request
    }

    async fn read_body_bytes(&mut self) -> Result<Option<Bytes>> {
        let piece = poll_fn(|cx| self.connection.poll_piece(cx)).await.map_err(unread)?;
        if let Some(piece) = &piece {
            self.read += piece.len();
            self.kept.push(piece);
        }
        Ok(piece)
    }

    async fn read_body_or_idle(&mut self, no_body_expected: bool) -> Result<Option<Bytes>> {
        if !no_body_expected && !self.is_body_done() {
            return self.read_body_bytes().await;
        }
        Err(gone(poll_fn(|cx| self.connection.poll_gone(cx)).await))
    }

    async fn drain_request_body(&mut self) -> Result<()> {
        while self.read_body_bytes().await?.is_some() {}
        Ok(())
    }

    async fn write_response_header(&mut self, answer: Box<ResponseHeader>, end: bool) -> Result<()> {
        let interim = answer.status.is_informational();
        self.write_header(answer)?;
        match (end, interim) {
            (true, _) => self.end(None).await,
            (false, true) => self.flush().await,
            (false, false) => Ok(()),
        }
    }

    async fn write_response_header_ref(&mut self, answer: &ResponseHeader, end: bool) -> Result<()> {
        self.write_response_header(Box::new(answer.clone()), end).await
    }

    async fn write_body(&mut self, data: Bytes, end: bool) -> Result<()> {
        if !data.is_empty() {
            self.write_piece(data, end).await?;
        }
        if end { self.end(None).await } else { Ok(()) }
    }

    async fn write_trailers(&mut self, trailers: HeaderMap) -> Result<()> {
        self.end(Some(trailers)).await
    }

    async fn response_duplex_vec(&mut self, tasks: Vec<HttpTask>) -> Result<bool> {
        let mut ended = false;
        for task in tasks {
            ended |= task.is_end();
            match task {
                HttpTask::Header(answer, end) => self.write_response_header(answer, end).await?,
                HttpTask::Body(Some(piece), end) | HttpTask::UpgradedBody(Some(piece), end) => {
                    self.write_body(piece, end).await?;
                }
                HttpTask::Trailer(trailers) => self.end(trailers.map(|fields| *fields)).await?,
                HttpTask::Body(None, end) | HttpTask::UpgradedBody(None, end) if !end => {}
                HttpTask::Body(None, _) | HttpTask::UpgradedBody(None, _) | HttpTask::Done => self.end(None).await?,
                HttpTask::Failed(error) => return Err(error),
            }
        }
        Ok(ended)
    }

    /// Stores the header of a response that was written past this session.
    fn send_proxy_task(&mut self, task: HttpTask) {
        if let HttpTask::Header(answer, _) = task {
            self.answered = Some(answer);
        }
    }

    /// Sends the gathered bytes and reports whether the connection can be reused.
    async fn finish(&mut self) -> Result<()> {
        self.end(None).await?;
        self.connection.settle(Some(self.has_answered() && self.connection.may_go_on()));
        Ok(())
    }

    async fn finish_custom(&mut self) -> Result<()> {
        Ok(())
    }

    async fn shutdown(&mut self, _code: u32, _context: &str) {
        self.connection.end_after_answer();
        let _ = poll_fn(|cx| self.connection.poll_close(cx)).await;
        // The connection was shut down regularly; a second shutdown is not needed.
        self.connection.settle(None);
    }

    fn response_written(&self) -> Option<&ResponseHeader> {
        self.answered.as_deref()
    }

    fn request_summary(&self) -> String {
        format!("{} {}", self.request.method, self.request.uri)
    }

    fn pseudo_raw_h1_request_header(&self) -> Bytes {
        self.written.clone()
    }

    fn is_body_done(&mut self) -> bool {
        self.connection.is_read()
    }

    fn is_body_empty(&mut self) -> bool {
        self.empty
    }

    fn body_bytes_sent(&self) -> usize {
        self.sent
    }

    fn body_bytes_read(&self) -> usize {
        self.read
    }

    no_connection!();

    // `body::request` enforces the deadline for the request body, and the connection the one for writing.
    no_timeouts!();

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

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::super::connection::tests::connection;
    use super::super::stream::Opening;
    use super::*;

    /// A client that has sent this request, and the request's session.
    async fn asked(request: &str) -> (DuplexStream, ClientStream, Session) {
        let (mut client, io) = tokio::io::duplex(1 << 16);
        client.write_all(request.as_bytes()).await.expect("room");
        let mut stream = ClientStream::new(Box::new(io), connection(""));
        assert!(stream.park().await);
        let Ok(Opening::Http1(request)) = stream.open().await else { panic!("no request was opened") };
        let session = Session::new(&stream, request);
        (client, stream, session)
    }

    fn answer(status: u16, fields: &[(&'static str, &'static str)]) -> Box<ResponseHeader> {
        let mut answer = ResponseHeader::build(status, None).expect("an answer");
        for (name, value) in fields {
            answer.append_header(*name, HeaderValue::from_static(value)).expect("a field");
        }
        Box::new(answer)
    }

    /// The bytes that the client received, without the date.
    async fn got(client: &mut DuplexStream) -> String {
        let mut bytes = vec![0; 4096];
        let read = client.read(&mut bytes).await.expect("an answer");
        let text = String::from_utf8_lossy(&bytes[..read]).into_owned();
        text.split_inclusive("\r\n").filter(|line| !line.starts_with("Date: ")).collect()
    }

    #[tokio::test]
    async fn an_answer_says_whether_its_connection_is_kept_and_so_it_is() {
        for (request, word, keeps) in [
            ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", "keep-alive", true),
            ("GET / HTTP/1.1\r\nHost: a\r\nConnection: x, Close\r\n\r\n", "close", false),
            ("GET / HTTP/1.0\r\n\r\n", "close", false),
            ("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", "keep-alive", true),
            // The rest of an unread body would be taken for the next request.
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n", "close", false),
        ] {
            let (mut client, stream, mut session) = asked(request).await;
            let fields = [("Content-Length", "3"), ("date", "then"), ("connection", "upstream")];
            session.write_response_header(answer(200, &fields), false).await.expect("room");
            session.write_body(Bytes::from_static(b"abc"), true).await.expect("room");
            session.finish().await.expect("room");
            let expected = format!("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: {word}\r\n\r\nabc");
            assert_eq!((got(&mut client).await, stream.outcome()), (expected, Some(keeps)), "{request}");
        }
    }

    #[tokio::test]
    async fn a_connection_that_is_to_end_says_so_in_its_answer() {
        let (mut client, stream, mut session) = asked("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        session.connection.end_after_answer();
        session.write_response_header(answer(204, &[]), true).await.expect("room");
        session.finish().await.expect("room");
        assert_eq!(got(&mut client).await, "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n");
        assert_eq!(stream.outcome(), Some(false));
    }

    #[tokio::test]
    async fn interim_answers_leave_at_once_and_a_header_waits_for_its_body() {
        let (mut client, _stream, mut session) = asked("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        session.write_response_header(answer(103, &[("Link", "</a>")]), false).await.expect("room");
        assert_eq!(got(&mut client).await, "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n");
        session.write_response_header(answer(200, &[("Transfer-Encoding", "chunked")]), false).await.expect("room");
        let tasks = vec![HttpTask::Body(Some(Bytes::from_static(b"abc")), false), HttpTask::Trailer(None)];
        assert!(session.response_duplex_vec(tasks).await.expect("room"));
        let whole =
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
        assert_eq!(got(&mut client).await, whole);
    }

    #[tokio::test]
    async fn half_an_answer_or_none_keeps_no_connection() {
        for half in [false, true] {
            let (_client, stream, mut session) = asked("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
            assert_eq!(stream.outcome(), None);
            if half {
                session.write_response_header(answer(200, &[("Content-Length", "3")]), false).await.expect("room");
            }
            session.finish().await.expect("room");
            assert_eq!(stream.outcome(), Some(false));
        }
    }

    #[tokio::test]
    async fn names_and_values_of_a_request_stay_as_they_were_written() {
        let (_client, _stream, session) =
            asked("PUT /a%20b?c HTTP/1.1\r\nHoSt: a\r\nX-Two: 1\r\nx-two: 2\r\n\r\n").await;
        let mut wire = Vec::new();
        fields::write_request(&session.request, &session.written, &mut wire);
        assert_eq!(wire, b"HoSt: a\r\nX-Two: 1\r\nx-two: 2\r\n");
        assert_eq!((session.request.raw_path(), session.request.method.as_str()), (&b"/a%20b?c"[..], "PUT"));
    }
}
