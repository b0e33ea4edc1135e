//! A request and its response in either protocol: any size, any pace, step by step or as a whole, abortable
//! anywhere.
//!
//! Bodies are not stored: requests send the content of the built-in test origin, and responses are counted and
//! hashed.

use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use forebay::origin::{Digest, content_from};
use h2::client::ResponseFuture;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Response};
use serde_json::Value;

use super::client::{Client, H2Client};
use super::wire::{End, Left, Wire};

/// The flow control window of a narrow HTTP/2 client.
const NARROW_BYTES: u32 = 1024;

/// How much of a response is kept for stories.
const KEPT_BYTES: usize = 64 * 1024;

/// The protocol of an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1 on a connection of its own.
    Http1,
    /// Clear-text HTTP/2, one stream on its own connection.
    Http2,
}

impl Protocol {
    /// Both protocols. The gateway needs `protocols: [http1, h2c]`.
    pub const BOTH: [Protocol; 2] = [Protocol::Http1, Protocol::Http2];
}

/// This many bytes, then a pause, repeatedly.
#[derive(Clone, Copy, Debug)]
struct Pace {
    bytes: usize,
    pause: Duration,
}

const AT_ONCE: Pace = Pace { bytes: 64 * 1024, pause: Duration::ZERO };

/// A request under construction.
#[derive(Clone, Debug)]
pub struct Ask {
    method: &'static str,
    path: String,
    fields: Vec<(String, String)>,
    body: Option<u64>,
    length_is_said: bool,
    sending: Pace,
    reading: Pace,
    narrow: bool,
    from: Option<IpAddr>,
}

/// How a client disconnects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// It closes its connection.
    Close,
    /// It resets its connection.
    Reset,
    /// Resets the stream and keeps the connection; on HTTP/1, closes the connection.
    Stream,
}

/// An active exchange: its request header was sent.
pub struct Exchange {
    ask: Ask,
    side: Side,
    sent: u64,
    answer: Answer,
    digest: Digest,
}

enum Side {
    Http1 { wire: Wire, left: Option<Left> },
    Http2 { client: H2Client, send: SendStream<Bytes>, coming: Coming, unread: Bytes },
}

enum Coming {
    Header(Option<ResponseFuture>),
    /// The response came while the body was still being sent.
    Early(Option<Box<Result<Response<RecvStream>, h2::Error>>>),
    Body(RecvStream),
}

impl Coming {
    /// Whether the gateway has refused, so that sending more is useless.
    fn poll_refusal(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Coming::Header(Some(response)) = self
            && let Poll::Ready(response) = Pin::new(response).poll(cx)
        {
            *self = Coming::Early(Some(Box::new(response)));
        }
        match self {
            Coming::Early(Some(response)) if !response.as_ref().as_ref().is_ok_and(|r| r.status().is_success()) => {
                Poll::Ready(())
            }
            _ => Poll::Pending,
        }
    }
}

/// A response with the beginning of its body.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// The interim responses (1xx) before it.
    pub interim: Vec<u16>,
    /// Its header fields, names in lower case.
    pub fields: Vec<(String, String)>,
    /// The first 64 KiB of its body.
    pub body: Vec<u8>,
    /// How long the body was.
    pub length: u64,
    /// The SHA-256 of the body.
    pub sha256: String,
    /// Whether the body was complete.
    pub end: End,
    /// Its trailer fields, each as `name: value`.
    pub trailers: Vec<String>,
}

impl Ask {
    /// A GET request.
    pub fn get(path: impl Into<String>) -> Ask {
        Ask {
            method: "GET",
            path: path.into(),
            fields: Vec::new(),
            body: None,
            length_is_said: true,
            sending: AT_ONCE,
            reading: AT_ONCE,
            narrow: false,
            from: None,
        }
    }

    /// An upload of this size to `/headers`, where the test origin reports what it received.
    pub fn put(length: u64) -> Ask {
        Ask { method: "PUT", body: Some(length), ..Ask::get("/headers") }
    }

    /// The same with a method that is not idempotent.
    pub fn post(length: u64) -> Ask {
        Ask { method: "POST", ..Ask::put(length) }
    }

    /// Sets the method.
    pub fn method(self, method: &'static str) -> Ask {
        Ask { method, ..self }
    }

    /// Sets the path.
    pub fn to(self, path: impl Into<String>) -> Ask {
        Ask { path: path.into(), ..self }
    }

    /// Adds a header field; its name in lower case.
    pub fn field(mut self, name: &str, value: &str) -> Ask {
        self.fields.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Marks it as a gRPC call.
    pub fn grpc(self) -> Ask {
        self.field("content-type", "application/grpc").field("te", "trailers")
    }

    /// Sends the body without a length: chunked on HTTP/1, no Content-Length on HTTP/2.
    pub fn chunked(self) -> Ask {
        Ask { length_is_said: false, ..self }
    }

    /// Sends this many bytes of the body, then pauses, repeatedly.
    pub fn sending(self, bytes: usize, pause: Duration) -> Ask {
        Ask { sending: Pace { bytes, pause }, ..self }
    }

    /// Reads this many bytes of the response, then pauses, repeatedly, and buffers as little as possible: with the
    /// smallest receive buffer, or a window of 1 KiB.
    pub fn reading(self, bytes: usize, pause: Duration) -> Ask {
        Ask { reading: Pace { bytes, pause }, narrow: true, ..self }
    }

    /// Reads fast through the smallest receive buffer, or a window of 1 KiB.
    pub fn narrow(self) -> Ask {
        Ask { narrow: true, ..self }
    }

    /// Uses this local address: all of 127.0.0.0/8 is local.
    pub fn from(self, own: impl Into<IpAddr>) -> Ask {
        Ask { from: Some(own.into()), ..self }
    }

    /// Connects and sends the header.
    pub fn begin(&self, protocol: Protocol, address: SocketAddr) -> Exchange {
        let side = match protocol {
            Protocol::Http1 => self.begin_http1(address),
            Protocol::Http2 => self.begin_http2(address),
        };
        let answer = Answer {
            status: 0,
            interim: Vec::new(),
            fields: Vec::new(),
            body: Vec::new(),
            length: 0,
            sha256: String::new(),
            end: End::Complete,
            trailers: Vec::new(),
        };
        Exchange { ask: self.clone(), side, sent: 0, answer, digest: Digest::default() }
    }

    /// Runs the whole exchange and returns the response. Sending stops when the gateway accepts no more.
    pub fn over(&self, protocol: Protocol, address: SocketAddr) -> Answer {
        let mut exchange = self.begin(protocol, address);
        exchange.finish_body();
        exchange.answer()
    }

    fn begin_http1(&self, address: SocketAddr) -> Side {
        let client = Client::with(address, self.from, self.narrow.then_some(1));
        let mut head = format!("{} {} HTTP/1.1\r\nHost: test\r\n", self.method, self.path);
        for (name, value) in &self.fields {
            head += &format!("{name}: {value}\r\n");
        }
        head += &match (self.body, self.length_is_said) {
            (None, _) => String::new(),
            (Some(length), true) => format!("Content-Length: {length}\r\n"),
            (Some(_), false) => "Transfer-Encoding: chunked\r\n".to_owned(),
        };
        let mut wire = client.into_wire();
        wire.send(head + "\r\n").expect("the gateway to take a header");
        Side::Http1 { wire, left: None }
    }

    fn begin_http2(&self, address: SocketAddr) -> Side {
        let client = H2Client::with(address, self.from, self.narrow.then_some(NARROW_BYTES));
        let mut request = http::Request::builder().method(self.method).uri(format!("http://test{}", self.path));
        for (name, value) in &self.fields {
            request = request.header(name, value);
        }
        if let Some(length) = self.body.filter(|_| self.length_is_said) {
            request = request.header("content-length", length);
        }
        let (response, send) = client.begin(request.body(()).expect("a request"), self.body.is_none());
        Side::Http2 { client, send, coming: Coming::Header(Some(response)), unread: Bytes::new() }
    }
}

impl Exchange {
    /// Sends this many bytes of the body at its pace; `false` if the gateway accepts no more.
    pub fn send(&mut self, bytes: u64) -> bool {
        let end = self.sent + bytes;
        while self.sent < end {
            let pace = self.ask.sending;
            let piece = content_from(self.sent, (end - self.sent).min(pace.bytes as u64));
            let framed = matches!(self.side, Side::Http1 { .. }) && !self.ask.length_is_said;
            let taken = match framed {
                true => self.side.send(&[format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat()),
                false => self.side.send(piece),
            };
            if !taken {
                return false;
            }
            self.sent += piece.len() as u64;
            thread::sleep(pace.pause);
        }
        true
    }

    /// Sends the rest of the body and ends it; `false` if the gateway accepts no more.
    pub fn finish_body(&mut self) -> bool {
        let Some(length) = self.ask.body else { return true };
        self.send(length - self.sent)
            && match &mut self.side {
                Side::Http1 { wire, .. } => self.ask.length_is_said || wire.send("0\r\n\r\n").is_ok(),
                Side::Http2 { send, .. } => send.send_data(Bytes::new(), true).is_ok(),
            }
    }

    /// Waits for the response header and returns the status.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn status(&mut self) -> u16 {
        self.try_status().expect("an answer before the end of the connection or the stream")
    }

    /// The same; `None` if the connection or the stream ends first.
    pub fn try_status(&mut self) -> Option<u16> {
        if self.answer.status == 0 {
            let (status, interim, fields) = self.side.header(self.ask.method)?;
            self.answer = Answer { status, interim, fields, ..self.answer.clone() };
        }
        Some(self.answer.status)
    }

    /// Reads up to this many bytes of the response.
    pub fn read(&mut self, bytes: u64) -> u64 {
        self.status();
        let mut read = 0;
        while read < bytes {
            let pace = self.ask.reading;
            let max = (bytes - read).min(pace.bytes as u64) as usize;
            let piece = match self.side.piece(max) {
                Ok(piece) => piece,
                Err(end) => {
                    self.answer.end = end;
                    break;
                }
            };
            read += piece.len() as u64;
            self.digest.add(&piece);
            let room = KEPT_BYTES.saturating_sub(self.answer.body.len());
            self.answer.body.extend_from_slice(&piece[..room.min(piece.len())]);
            thread::sleep(pace.pause);
        }
        read
    }

    /// From now on, sends and reads without pauses.
    pub fn hurry(&mut self) {
        (self.ask.sending, self.ask.reading) = (AT_ONCE, AT_ONCE);
    }

    /// Number of response bytes read.
    pub fn has_read(&self) -> u64 {
        self.digest.length()
    }

    /// Sends the rest of the body, as far as the gateway accepts it, and reads the whole response.
    pub fn answer_to_all(mut self) -> Answer {
        self.finish_body();
        self.answer()
    }

    /// Reads the whole response.
    pub fn answer(mut self) -> Answer {
        self.read(u64::MAX);
        self.answer.trailers = self.side.trailers();
        self.answer.length = self.digest.length();
        self.answer.sha256 = self.digest.sha256();
        self.answer
    }

    /// Disconnects. Returns the connection if it stays open.
    pub fn leave(mut self, how: Leave) -> Option<Exchange> {
        match (how, &mut self.side) {
            (Leave::Stream, Side::Http2 { send, .. }) => {
                send.send_reset(Reason::CANCEL);
                return Some(self);
            }
            (Leave::Reset, _) => match self.side {
                Side::Http1 { wire, .. } => wire.reset(),
                Side::Http2 { client, .. } => client.reset(),
            },
            _ => {}
        }
        None
    }
}

impl Side {
    fn send(&mut self, piece: &[u8]) -> bool {
        match self {
            Side::Http1 { wire, .. } => wire.send(piece).is_ok(),
            Side::Http2 { client, send, coming, .. } => {
                let mut piece = Bytes::copy_from_slice(piece);
                client.step(async {
                    while !piece.is_empty() {
                        send.reserve_capacity(piece.len());
                        let granted = poll_fn(|cx| match send.poll_capacity(cx) {
                            Poll::Pending => coming.poll_refusal(cx).map(|()| None),
                            granted => granted,
                        });
                        let Some(Ok(granted)) = granted.await else { return false };
                        if send.send_data(piece.split_to(granted.min(piece.len())), false).is_err() {
                            return false;
                        }
                    }
                    true
                })
            }
        }
    }

    /// The status, the interim statuses, and the fields.
    #[allow(clippy::type_complexity, reason = "three things that are put into an answer at once")]
    fn header(&mut self, method: &str) -> Option<(u16, Vec<u16>, Vec<(String, String)>)> {
        match self {
            Side::Http1 { wire, left } => {
                let mut interim = Vec::new();
                loop {
                    let head = wire.head()?;
                    if (100..200).contains(&head.status()) && head.status() != 101 {
                        interim.push(head.status());
                        continue;
                    }
                    *left = Some(head.response_framing(method).begin());
                    let fields = head.fields.iter().map(|(name, value)| (name.to_ascii_lowercase(), value.clone()));
                    return Some((head.status(), interim, fields.collect()));
                }
            }
            Side::Http2 { client, coming, .. } => {
                let (interim, response) = match coming {
                    Coming::Header(response) => client.step(answered(response.take()?)),
                    Coming::Early(response) => (Vec::new(), *response.take()?),
                    Coming::Body(_) => return None,
                };
                let response = response.ok()?;
                let status = response.status().as_u16();
                let fields = lines(response.headers());
                *coming = Coming::Body(response.into_body());
                Some((status, interim, fields))
            }
        }
    }

    /// Between 1 and `max` bytes of the response, or how it ended.
    fn piece(&mut self, max: usize) -> Result<Vec<u8>, End> {
        match self {
            Side::Http1 { wire, left } => {
                let left = left.as_mut().expect("the header to be read first");
                let piece = wire.piece(left, max);
                match *left {
                    Left::Nothing(end) if piece.is_empty() => Err(end),
                    _ => Ok(piece),
                }
            }
            Side::Http2 { client, coming: Coming::Body(body), unread, .. } => {
                while unread.is_empty() {
                    match client.step(body.data()) {
                        Some(Ok(piece)) => *unread = piece,
                        Some(Err(_)) => return Err(End::Cut),
                        None => return Err(End::Complete),
                    }
                }
                let piece = unread.split_to(max.min(unread.len()));
                // An error means that the stream has ended; the next read reports it.
                let _ = body.flow_control().release_capacity(piece.len());
                Ok(piece.to_vec())
            }
            Side::Http2 { .. } => panic!("the header is read first"),
        }
    }

    fn trailers(&mut self) -> Vec<String> {
        match self {
            Side::Http1 { wire, .. } => wire.trailers().to_vec(),
            Side::Http2 { client, coming: Coming::Body(body), .. } => match client.step(body.trailers()) {
                Ok(Some(trailers)) => lines(&trailers).iter().map(|(name, value)| format!("{name}: {value}")).collect(),
                _ => Vec::new(),
            },
            Side::Http2 { .. } => Vec::new(),
        }
    }
}

/// The statuses of interim responses, and the response.
async fn answered(mut response: ResponseFuture) -> (Vec<u16>, Result<http::Response<RecvStream>, h2::Error>) {
    let mut interim = Vec::new();
    while let Some(Ok(early)) = poll_fn(|cx| response.poll_informational(cx)).await {
        interim.push(early.status().as_u16());
    }
    (interim, response.await)
}

fn lines(fields: &HeaderMap) -> Vec<(String, String)> {
    let text = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    fields.iter().map(|(name, value)| (name.to_string(), text(value))).collect()
}

impl Answer {
    /// The value of a field; its name in lower case.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// The body as text, as far as it was kept.
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("a body of text")
    }

    /// Asserts that the gateway refused with this status and reason, such as `buffer.too_large`.
    ///
    /// # Panics
    ///
    /// If it did not.
    pub fn refused(&self, status: u16, reason: &str) {
        assert_eq!((self.status, self.end), (status, End::Complete), "{}", self.text());
        assert!(self.text().contains(reason), "{reason} was expected: {}", self.text());
        // Temporary refusals carry Retry-After.
        assert_eq!(self.value("retry-after").is_some(), matches!(status, 429 | 503), "{:?}", self.fields);
    }

    /// Asserts that the test origin received exactly the first `length` bytes of its content, with this framing:
    /// `chunked`, `none`, or `content-length: 5`.
    ///
    /// # Panics
    ///
    /// If it did not.
    pub fn arrived(&self, length: u64, framing: &str) {
        assert_eq!((self.status, self.end), (200, End::Complete), "{}", String::from_utf8_lossy(&self.body));
        let got: Value = serde_json::from_slice(&self.body).expect("what the origin saw");
        assert_eq!(got["body_bytes"], length, "bytes that arrived");
        assert_eq!(got["body_sha256"], Digest::of_content(length).sha256(), "what arrived of {length} bytes");
        assert_eq!(got["body_framing"], framing, "how {length} bytes arrived");
    }

    /// Asserts that the client received exactly the first `length` bytes of the test origin's content.
    ///
    /// # Panics
    ///
    /// If it did not.
    pub fn is_content(&self, length: u64) {
        assert_eq!((self.status, self.end, self.length), (200, End::Complete, length));
        assert_eq!(self.sha256, Digest::of_content(length).sha256(), "what came of {length} bytes");
    }
}
