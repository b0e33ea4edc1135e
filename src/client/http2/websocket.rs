//! WebSocket over HTTP/2 (RFC 8441): presents an HTTP/2 stream as an HTTP/1.1 connection.
//!
//! Endpoints speak WebSocket over HTTP/1.1. An extended CONNECT is therefore rewritten as the equivalent request with
//! `Upgrade`, and handled like all such requests: with the same checks, routes, filters, limits, deadlines and log.
//! [`Carrier`] is the socket of this connection. Reads return the content of the client's DATA frames. Writes take an
//! HTTP/1.1 response and send it as HTTP/2: a 101 becomes a 200, after which both sides exchange raw bytes.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::{Buf, Bytes, BytesMut};
use h2::ext::Protocol;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::header::{CONTENT_LENGTH, DATE, HOST, HeaderMap, HeaderName, HeaderValue, TRANSFER_ENCODING};
use http::{Request, Response, StatusCode, request};
use pingora::protocols::raw_connect::ProxyDigest;
use pingora::protocols::{
    GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, TimingDigest, UniqueID,
    UniqueIDType,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::OF_HTTP1;
use crate::framing::chunked::Chunks;

/// The only supported protocol, and the field of its key.
const WEBSOCKET: &str = "websocket";
const KEY: HeaderName = HeaderName::from_static("sec-websocket-key");
const ACCEPT: HeaderName = HeaderName::from_static("sec-websocket-accept");
/// The suffix that is hashed after the key (RFC 6455 §1.3).
const KEY_SUFFIX: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
/// Maximum size of a response header, in bytes. Forebay writes the header, from at most what it accepts from an
/// endpoint.
const HEAD_BYTES_MAX: usize = 1 << 20;
/// Maximum number of bytes given to the library at once.
const PIECE_BYTES: usize = 16 << 10;

/// An extended CONNECT as an HTTP/1.1 connection.
pub struct Carried {
    /// The equivalent HTTP/1.1 request.
    pub head: BytesMut,
    /// The stream as a socket.
    pub io: Carrier,
}

/// The socket of a connection that a stream carries.
pub struct Carrier {
    /// The socket of the HTTP/2 connection.
    socket: UniqueIDType,
    digest: Option<Arc<SocketDigest>>,
    body: RecvStream,
    /// Received bytes that were not read yet.
    front: Bytes,
    respond: SendResponse<Bytes>,
    answer: ResponseState,
    /// The value of `Sec-WebSocket-Accept` that a WebSocket endpoint returns for our key.
    accept: String,
}

/// The state of the response.
enum ResponseState {
    /// The part of the header written so far.
    Head(Vec<u8>),
    /// After a 101: bytes pass unchanged.
    Open(SendStream<Bytes>),
    /// After any other header: a body with its framing, and the bytes that were not sent yet.
    Body(SendStream<Bytes>, End, BytesMut),
    /// The response is complete; further bytes are discarded.
    Whole,
}

/// The end of an ordinary response's body.
enum End {
    Length(u64),
    Chunked(Chunks),
    Closed,
}

/// Whether the request is an extended CONNECT.
pub fn asks<T>(request: &Request<T>) -> bool {
    request.extensions().get::<Protocol>().is_some()
}

/// Presents the stream as a connection.
///
/// # Errors
///
/// The status of the response: the protocol is unknown, or the request has a body.
pub fn carry(
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
    socket: UniqueIDType,
    digest: Option<Arc<SocketDigest>>,
) -> Result<Carried, (StatusCode, SendResponse<Bytes>)> {
    let (parts, body) = request.into_parts();
    let key = BASE64.encode(rand::random::<u128>().to_be_bytes());
    match head(&parts, &key) {
        Ok(head) => {
            let (front, answer) = (Bytes::new(), ResponseState::Head(Vec::new()));
            let io = Carrier { socket, digest, body, front, respond, answer, accept: accept(&key) };
            Ok(Carried { head, io })
        }
        Err(status) => Err((status, respond)),
    }
}

/// Responds to a request that cannot be carried.
pub fn refuse(status: StatusCode, mut respond: SendResponse<Bytes>) {
    let mut answer = Response::new(());
    *answer.status_mut() = status;
    // An error means that the client has left.
    let _ = respond.send_response(answer, true);
}

/// Builds the HTTP/1.1 request (RFC 8441 §5, RFC 6455 §4.1).
fn head(parts: &request::Parts, key: &str) -> Result<BytesMut, StatusCode> {
    let protocol = parts.extensions.get::<Protocol>().map(Protocol::as_str);
    if protocol != Some(WEBSOCKET) {
        return Err(StatusCode::NOT_IMPLEMENTED);
    }
    let (target, host) = parts.uri.path_and_query().zip(parts.uri.authority()).ok_or(StatusCode::BAD_REQUEST)?;
    if parts.headers.contains_key(CONTENT_LENGTH) {
        // Bytes of the other protocol follow, so a body is impossible.
        return Err(StatusCode::BAD_REQUEST);
    }
    let mut head = format!(
        "GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: {WEBSOCKET}\r\nSec-WebSocket-Key: {key}\r\n"
    )
    .into_bytes();
    for (name, value) in &parts.headers {
        if *name == HOST || *name == KEY || OF_HTTP1.contains(name) {
            continue;
        }
        head.extend_from_slice(name.as_ref());
        head.extend_from_slice(b": ");
        head.extend_from_slice(value.as_bytes());
        head.extend_from_slice(b"\r\n");
    }
    head.extend_from_slice(b"\r\n");
    Ok(BytesMut::from(&head[..]))
}

fn accept(key: &str) -> String {
    BASE64.encode(boring::sha::sha1(&[key.as_bytes(), KEY_SUFFIX].concat()))
}

/// Parses the status and the fields of a header that Forebay wrote, up to its empty line.
fn parse(head: &[u8]) -> Option<(StatusCode, HeaderMap)> {
    let mut lines = head.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let status = StatusCode::from_bytes(lines.next()?.split(|byte| *byte == b' ').nth(1)?).ok()?;
    let mut fields = HeaderMap::new();
    for line in lines.take_while(|line| !line.is_empty()) {
        let colon = line.iter().position(|byte| *byte == b':')?;
        let name = HeaderName::from_bytes(&line[..colon]).ok()?;
        fields.append(name, HeaderValue::from_bytes(line[colon + 1..].trim_ascii()).ok()?);
    }
    Some((status, fields))
}

fn end(status: StatusCode, fields: &HeaderMap) -> Option<End> {
    if matches!(status, StatusCode::NO_CONTENT | StatusCode::RESET_CONTENT | StatusCode::NOT_MODIFIED) {
        return Some(End::Length(0));
    }
    if fields.contains_key(TRANSFER_ENCODING) {
        return Some(End::Chunked(Chunks::default()));
    }
    match fields.get(CONTENT_LENGTH) {
        Some(length) => length.to_str().ok()?.parse().ok().map(End::Length),
        None => Some(End::Closed),
    }
}

fn broken(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, why)
}

/// Waits for flow-control credit. Returns the number of bytes that may be sent, at most `wanted`.
fn poll_credit(send: &mut SendStream<Bytes>, wanted: usize, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
    send.reserve_capacity(wanted.min(PIECE_BYTES));
    loop {
        match send.capacity() {
            0 => match ready!(send.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
            },
            some => return Poll::Ready(Ok(some.min(wanted).min(PIECE_BYTES))),
        }
    }
}

impl Carrier {
    /// Takes written bytes of a response. Returns how many were used.
    fn poll_take(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.answer {
            ResponseState::Head(head) => {
                // The end is searched byte by byte, since other content follows it.
                let before = head.len();
                head.extend_from_slice(bytes);
                let from = before.saturating_sub(3);
                let Some(at) = head[from..].windows(4).position(|four| four == b"\r\n\r\n") else {
                    let fits = head.len() <= HEAD_BYTES_MAX;
                    return Poll::Ready(if fits { Ok(bytes.len()) } else { Err(broken("an endless header")) });
                };
                let length = from + at + 4;
                head.truncate(length);
                let whole = std::mem::take(head);
                self.begin(&whole)?;
                Poll::Ready(Ok(length - before))
            }
            ResponseState::Open(send) => {
                let some = ready!(poll_credit(send, bytes.len(), cx))?;
                send.send_data(Bytes::copy_from_slice(&bytes[..some]), false).map_err(broken)?;
                Poll::Ready(Ok(some))
            }
            ResponseState::Body(..) => {
                ready!(self.poll_pending(cx))?;
                let ResponseState::Body(_, end, pending) = &mut self.answer else {
                    return Poll::Ready(Ok(bytes.len()));
                };
                let piece = &bytes[..bytes.len().min(PIECE_BYTES)];
                let taken = match end {
                    End::Length(left) => {
                        let some = piece.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                        *left -= some as u64;
                        pending.extend_from_slice(&piece[..some]);
                        some
                    }
                    End::Chunked(chunks) => {
                        pending.extend_from_slice(piece);
                        let (taken, data) = chunks.unwrap(pending).map_err(|_| broken("malformed chunks"))?;
                        pending.truncate(data);
                        taken
                    }
                    End::Closed => {
                        pending.extend_from_slice(piece);
                        piece.len()
                    }
                };
                if let Poll::Ready(Err(error)) = self.poll_pending(cx) {
                    return Poll::Ready(Err(error));
                }
                Poll::Ready(Ok(taken))
            }
            ResponseState::Whole => Poll::Ready(Ok(bytes.len())),
        }
    }

    /// Resets the stream.
    pub fn give_up(&mut self, reason: Reason) {
        self.respond.send_reset(reason);
    }

    /// Sends this header to the client.
    fn begin(&mut self, head: &[u8]) -> io::Result<()> {
        let (mut status, mut fields) = parse(head).ok_or_else(|| broken("an invalid header"))?;
        let agreed = status == StatusCode::SWITCHING_PROTOCOLS;
        if agreed && fields.get(&ACCEPT).is_none_or(|accept| accept.as_bytes() != self.accept.as_bytes()) {
            self.respond.send_reset(Reason::CONNECT_ERROR);
            return Err(broken("the endpoint does not speak WebSocket"));
        }
        let end = end(status, &fields).ok_or_else(|| broken("an invalid length"))?;
        OF_HTTP1.iter().chain([&ACCEPT]).for_each(|name| drop(fields.remove(name)));
        if agreed {
            status = StatusCode::OK;
        } else if status.is_success() {
            // The client would take it for the start of a WebSocket (RFC 8441 §4, RFC 9110 §9.3.6).
            status = StatusCode::BAD_GATEWAY;
        }
        let mut answer = Response::new(());
        *answer.status_mut() = status;
        *answer.headers_mut() = fields;
        if status.is_informational() {
            self.answer = ResponseState::Head(Vec::new());
            return self.respond.send_informational(answer).map_err(broken);
        }
        if agreed {
            let date = pingora::protocols::http::date::get_cached_date();
            answer.headers_mut().entry(DATE).or_insert(date);
        }
        let empty = !agreed && matches!(end, End::Length(0));
        let send = self.respond.send_response(answer, empty).map_err(broken)?;
        self.answer = match (agreed, empty) {
            (true, _) => ResponseState::Open(send),
            (_, true) => ResponseState::Whole,
            _ => ResponseState::Body(send, end, BytesMut::new()),
        };
        Ok(())
    }

    /// Sends the bytes that wait for credit, and the end when it is reached.
    fn poll_pending(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let ResponseState::Body(send, end, pending) = &mut self.answer else { return Poll::Ready(Ok(())) };
        while !pending.is_empty() {
            let some = ready!(poll_credit(send, pending.len(), cx))?;
            send.send_data(pending.split_to(some).freeze(), false).map_err(broken)?;
        }
        let over = match end {
            End::Length(left) => *left == 0,
            End::Chunked(chunks) => chunks.ended(),
            End::Closed => false,
        };
        if over {
            send.send_data(Bytes::new(), true).map_err(broken)?;
            self.answer = ResponseState::Whole;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Carrier {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.front.is_empty() {
            match ready!(self.body.poll_data(cx)) {
                Some(Ok(data)) => {
                    // An error means that the stream has ended; the next read reports it.
                    let _ = self.body.flow_control().release_capacity(data.len());
                    self.front = data;
                }
                Some(Err(error)) => return Poll::Ready(Err(broken(error))),
                None => return Poll::Ready(Ok(())),
            }
        }
        let length = out.remaining().min(self.front.len());
        out.put_slice(&self.front[..length]);
        self.front.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Carrier {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if bytes.is_empty() { Poll::Ready(Ok(0)) } else { self.poll_take(cx, bytes) }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_pending(cx)
    }

    /// Ends the stream; an incomplete response is reset.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_pending(cx))?;
        match std::mem::replace(&mut self.answer, ResponseState::Whole) {
            ResponseState::Open(mut send) | ResponseState::Body(mut send, End::Closed, _) => {
                // An error means that the client has reset the stream.
                let _ = send.send_data(Bytes::new(), true);
            }
            ResponseState::Body(mut send, ..) => send.send_reset(Reason::INTERNAL_ERROR),
            ResponseState::Head(_) | ResponseState::Whole => {}
        }
        Poll::Ready(Ok(()))
    }
}

#[async_trait]
impl Shutdown for Carrier {
    async fn shutdown(&mut self) {
        // The client may have left, in which case no end is needed.
        let _ = std::future::poll_fn(|cx| Pin::new(&mut *self).poll_shutdown(cx)).await;
    }
}

impl UniqueID for Carrier {
    fn id(&self) -> UniqueIDType {
        self.socket
    }
}

impl Ssl for Carrier {}

impl Peek for Carrier {}

impl GetTimingDigest for Carrier {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        Vec::new()
    }
}

impl GetProxyDigest for Carrier {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        None
    }
}

impl GetSocketDigest for Carrier {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.digest.clone()
    }
}

impl fmt::Debug for Carrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Carrier").field("socket", &self.socket).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(protocol: &'static str, fields: &[(&str, &str)]) -> request::Parts {
        let mut request = Request::builder().method("CONNECT").uri("https://test:8443/chat?a=1");
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let (mut parts, ()) = request.body(()).expect("a request").into_parts();
        parts.extensions.insert(Protocol::from_static(protocol));
        parts
    }

    #[test]
    fn an_extended_connect_is_written_as_the_upgrade_that_it_stands_for() {
        let fields =
            [("sec-websocket-version", "13"), ("sec-websocket-key", "theirs"), ("host", "other"), ("x-a", "b")];
        let head = head(&parts(WEBSOCKET, &fields), "ours").expect("a header");
        assert_eq!(
            std::str::from_utf8(&head).unwrap(),
            "GET /chat?a=1 HTTP/1.1\r\nHost: test:8443\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Key: ours\r\nsec-websocket-version: 13\r\nx-a: b\r\n\r\n"
        );
    }

    #[test]
    fn other_protocols_and_bodies_are_not_carried() {
        assert_eq!(head(&parts("connect-udp", &[]), "k"), Err(StatusCode::NOT_IMPLEMENTED));
        assert_eq!(head(&parts(WEBSOCKET, &[("content-length", "0")]), "k"), Err(StatusCode::BAD_REQUEST));
    }

    #[test]
    fn the_key_is_answered_as_the_standard_says() {
        // RFC 6455 §1.3.
        assert_eq!(accept("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn an_answer_ends_as_its_header_says() {
        let (status, fields) = parse(b"HTTP/1.1 404 Not Found\r\nContent-Length: 7\r\nX-A: b: c \r\n\r\n").unwrap();
        assert_eq!((status, fields["x-a"].as_bytes()), (StatusCode::NOT_FOUND, &b"b: c"[..]));
        assert!(matches!(end(status, &fields), Some(End::Length(7))));
        let (status, fields) = parse(b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
        assert!(matches!(end(status, &fields), Some(End::Chunked(_))));
        let (status, fields) = parse(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n").unwrap();
        assert!(matches!(end(status, &fields), Some(End::Length(0))));
        assert!(parse(b"HTTP/1.1 abc\r\n\r\n").is_none());
    }
}
