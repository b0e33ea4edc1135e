//! Carries out the behaviour that a path selects: correct responses first, then the faults.
//!
//! Unless a fault requires otherwise, the origin reads the whole request body before it responds.

use std::fmt::Write as _;
use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::BytesMut;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, Method, StatusCode, Uri};
use serde_json::json;

use super::behaviour::{Behaviour, Fault, Plan, Unknown, content_from};
use super::digest::Digest;
use super::wire::{Broken, Framing, Request, Wire};
use super::{Counters, PATHS, websocket};

/// Maximum size of an echoed body, which is kept in memory.
const ECHO_BYTES_MAX: u64 = 64 << 20;

/// Size at which the output is sent, and maximum size of a chunk.
const PIECE_BYTES: usize = 64 * 1024;

const EVENT_PAUSE: Duration = Duration::from_millis(100);
const SLOW_HEADER_PAUSE: Duration = Duration::from_millis(100);

const TEXT: &str = "text/plain; charset=utf-8";

/// The state of the connection after a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    Request,
    Close,
}

/// Responds to one request. `target` is the request's own target, or that of a detour.
pub async fn answer(wire: &mut Wire, request: &Request, target: &Uri, counters: &Counters) -> Result<Next, Broken> {
    let plan = Plan::of(target);
    if let Ok(Plan { behaviour: Behaviour::Fault(kind), delay }) = plan
        && kind.ignores_body()
    {
        wire.pause(delay).await?;
        if let Fault::Reset(bytes @ 1..) = kind {
            ask_for_body(wire, request).await?;
            read_body(wire, request.framing, Keep::Nothing, bytes, counters).await?;
        }
        return fault(wire, kind).await;
    }
    ask_for_body(wire, request).await?;
    let keep = match plan {
        Ok(Plan { behaviour: Behaviour::Echo, .. }) => Keep::Bytes,
        Ok(Plan { behaviour: Behaviour::Headers, .. }) => Keep::Digest,
        _ => Keep::Nothing,
    };
    let body = read_body(wire, request.framing, keep, u64::MAX, counters).await?;

    let response = Response::new(wire, request);
    let plan = match plan {
        Ok(plan) => plan,
        Err(Unknown::Path) => return response.text(StatusCode::NOT_FOUND, "No such path; / lists them.\n").await,
        Err(Unknown::Argument(why)) => return response.text(StatusCode::BAD_REQUEST, &format!("{why}.\n")).await,
    };
    response.wire.pause(plan.delay).await?;
    match plan.behaviour {
        Behaviour::Index => response.text(StatusCode::OK, PATHS).await,
        Behaviour::Echo => response.echo(&request.headers, &body).await,
        Behaviour::Headers => response.headers(request, body).await,
        Behaviour::Bytes(length) => response.content(length, Some(length)).await,
        Behaviour::Chunked(length) => response.content(length, None).await,
        Behaviour::UntilClose(length) => response.unframed().content(length, None).await,
        Behaviour::Delay => response.text(StatusCode::OK, "Waited.\n").await,
        Behaviour::Drip { pieces, pause } => response.drip(pieces, pause).await,
        Behaviour::Status(status) => response.status(status).await,
        Behaviour::Events(events) => response.events(events).await,
        Behaviour::WebSocket => response.websocket(request).await,
        Behaviour::EarlyHints => response.early_hints().await,
        Behaviour::Trailers => response.trailers().await,
        Behaviour::Fault(kind) => fault(wire, kind).await,
    }
}

/// Sends an error response to an invalid request, if the connection still works, and closes.
pub async fn give_up(wire: &mut Wire, broken: Broken) {
    let (status, why) = match broken {
        Broken::Request(status, why) => (status, why),
        Broken::Io(error) => return tracing::debug!(%error, "a connection of the test origin ended"),
    };
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {TEXT}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{why}\n",
        why.len() + 1
    );
    if wire.send(answer.as_bytes()).await.is_ok() {
        wire.close().await;
    }
}

/// Sends `100 Continue` if the client waits for it.
async fn ask_for_body(wire: &mut Wire, request: &Request) -> io::Result<()> {
    if request.waits_for_continue() {
        wire.send(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
    }
    Ok(())
}

/// A received request body: its length, and the requested data.
struct Body {
    length: u64,
    kept: BytesMut,
    digest: Digest,
}

/// The data to keep of a body, in addition to its length.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    Nothing,
    Digest,
    /// Its bytes, up to the limit.
    Bytes,
}

/// Reads a body to its end, or until `stop` bytes of it were received.
async fn read_body(
    wire: &mut Wire,
    mut framing: Framing,
    keep: Keep,
    stop: u64,
    counters: &Counters,
) -> Result<Body, Broken> {
    let mut body = Body { length: 0, kept: BytesMut::new(), digest: Digest::default() };
    while body.length < stop
        && let Some(piece) = wire.piece(&mut framing).await?
    {
        counters.body_bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
        body.length += piece.len() as u64;
        match keep {
            Keep::Bytes if body.length <= ECHO_BYTES_MAX => body.kept.extend_from_slice(&piece),
            Keep::Digest => body.digest.add(&piece),
            _ => {}
        }
    }
    Ok(body)
}

/// The framing of a response body.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Coding {
    /// `Content-Length`, or no body.
    Length,
    /// Chunked (RFC 9112 §7.1).
    Chunked,
    /// The body ends with the connection, as in HTTP/1.0, which has no chunks.
    Close,
}

/// A response that is being written. The output is sent in pieces of 64 KiB, and when it is flushed.
pub struct Response<'w> {
    pub wire: &'w mut Wire,
    out: BytesMut,
    coding: Coding,
    head: bool,
    keeps_alive: bool,
    http10: bool,
}

impl<'w> Response<'w> {
    fn new(wire: &'w mut Wire, request: &Request) -> Self {
        Response {
            wire,
            out: BytesMut::new(),
            coding: Coding::Length,
            head: request.method == Method::HEAD,
            keeps_alive: request.keeps_alive(),
            http10: request.minor == 0,
        }
    }

    /// Responds as if the client spoke HTTP/1.0: a body without a length ends with the connection.
    fn unframed(mut self) -> Self {
        self.http10 = true;
        self
    }

    /// Writes the header. Without `length` the body is chunked, or ends with the connection if the client has no
    /// chunks.
    pub fn begin(&mut self, status: StatusCode, fields: &[(&str, &str)], length: Option<u64>) {
        // RFC 9110 §6.4.1: these have no body, whatever their header announces.
        let bodiless = matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
        self.head |= bodiless;
        self.coding = match length {
            Some(_) => Coding::Length,
            None if self.http10 => Coding::Close,
            None => Coding::Chunked,
        };
        self.keeps_alive &= self.coding != Coding::Close;
        self.line(format_args!("HTTP/1.1 {} {}", status.as_str(), reason(status)));
        self.line(format_args!("Server: forebay-origin"));
        for (name, value) in fields {
            self.line(format_args!("{name}: {value}"));
        }
        match length {
            Some(length) if !bodiless => self.line(format_args!("Content-Length: {length}")),
            None if self.coding == Coding::Chunked => self.line(format_args!("Transfer-Encoding: chunked")),
            _ => {}
        }
        if !self.keeps_alive {
            self.line(format_args!("Connection: close"));
        }
        self.line(format_args!(""));
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to memory cannot fail.
        let _ = write!(self.out, "{line}\r\n");
    }

    /// Adds a piece of the body. An empty piece has no effect.
    pub async fn piece(&mut self, piece: &[u8]) -> io::Result<()> {
        if self.head || piece.is_empty() {
            return Ok(());
        }
        if self.coding == Coding::Chunked {
            self.line(format_args!("{:x}", piece.len()));
        }
        self.out.extend_from_slice(piece);
        if self.coding == Coding::Chunked {
            self.line(format_args!(""));
        }
        if self.out.len() >= PIECE_BYTES {
            self.flush().await?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> io::Result<()> {
        self.wire.send(&self.out).await?;
        self.out.clear();
        Ok(())
    }

    /// Ends the body, with trailer fields if it is chunked.
    pub async fn end(mut self, trailers: &[(&str, &str)]) -> Result<Next, Broken> {
        if self.coding == Coding::Chunked && !self.head {
            self.line(format_args!("0"));
            for (name, value) in trailers {
                self.line(format_args!("{name}: {value}"));
            }
            self.line(format_args!(""));
        }
        self.flush().await?;
        if self.keeps_alive {
            return Ok(Next::Request);
        }
        self.wire.close().await;
        Ok(Next::Close)
    }

    /// Sends a complete short response in plain text.
    pub async fn text(self, status: StatusCode, text: &str) -> Result<Next, Broken> {
        self.whole(status, TEXT, text.as_bytes()).await
    }

    async fn whole(mut self, status: StatusCode, content_type: &str, body: &[u8]) -> Result<Next, Broken> {
        self.begin(status, &[("Content-Type", content_type)], Some(body.len() as u64));
        self.piece(body).await?;
        self.end(&[]).await
    }

    async fn echo(self, headers: &HeaderMap, body: &Body) -> Result<Next, Broken> {
        if body.length > ECHO_BYTES_MAX {
            return self.text(StatusCode::PAYLOAD_TOO_LARGE, "At most 64MiB are echoed.\n").await;
        }
        let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        self.whole(StatusCode::OK, content_type.unwrap_or("application/octet-stream"), &body.kept).await
    }

    async fn status(self, status: StatusCode) -> Result<Next, Broken> {
        // RFC 9110 §15.3.6: a 205 has length 0.
        let body = match status {
            StatusCode::RESET_CONTENT => String::new(),
            _ => format!("{} {}\n", status.as_str(), reason(status)),
        };
        self.text(status, &body).await
    }

    async fn headers(self, request: &Request, mut body: Body) -> Result<Next, Broken> {
        let values = |name| {
            let values = request.headers.get_all(name).iter();
            values.map(|value| String::from_utf8_lossy(value.as_bytes())).collect::<Vec<_>>()
        };
        let fields = request.headers.keys().map(|name| (name.to_string(), json!(values(name))));
        let seen = json!({
            "method": request.method.as_str(),
            "target": request.target.to_string(),
            "version": format!("HTTP/1.{}", request.minor),
            "headers": fields.collect::<serde_json::Map<_, _>>(),
            "body_bytes": body.length,
            "body_sha256": body.digest.sha256(),
            "body_framing": request.framing.to_string(),
        });
        self.whole(StatusCode::OK, "application/json", format!("{seen:#}\n").as_bytes()).await
    }

    async fn content(mut self, length: u64, announced: Option<u64>) -> Result<Next, Broken> {
        self.begin(StatusCode::OK, &[("Content-Type", TEXT)], announced);
        let mut sent = if self.head { length } else { 0 };
        while sent < length {
            let piece = content_from(sent, (length - sent).min(PIECE_BYTES as u64));
            self.piece(piece).await?;
            sent += piece.len() as u64;
        }
        self.end(&[]).await
    }

    async fn drip(self, pieces: u64, pause: Duration) -> Result<Next, Broken> {
        self.paced(TEXT, pieces, pause, |n| format!("piece {n} of {pieces}\n")).await
    }

    async fn events(self, events: u64) -> Result<Next, Broken> {
        self.paced("text/event-stream", events, EVENT_PAUSE, |n| format!("id: {n}\ndata: event {n}\n\n")).await
    }

    /// Sends `pieces` pieces, numbered from 1, each without delay in a buffer.
    async fn paced(
        mut self,
        content_type: &str,
        pieces: u64,
        pause: Duration,
        piece: impl Fn(u64) -> String,
    ) -> Result<Next, Broken> {
        self.begin(StatusCode::OK, &[("Content-Type", content_type), ("Cache-Control", "no-store")], None);
        let pieces = if self.head { 0 } else { pieces };
        for n in 1..=pieces {
            self.piece(piece(n).as_bytes()).await?;
            self.flush().await?;
            if n < pieces {
                self.wire.pause(pause).await?;
            }
        }
        self.end(&[]).await
    }

    /// Echoes messages if the request is a handshake; otherwise responds with 426.
    async fn websocket(mut self, request: &Request) -> Result<Next, Broken> {
        let Some(switched) = websocket::accept(request) else {
            let fields = [("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")];
            self.begin(StatusCode::UPGRADE_REQUIRED, &fields, Some(0));
            return self.end(&[]).await;
        };
        self.wire.send(switched.as_bytes()).await?;
        websocket::echo(self.wire).await?;
        Ok(Next::Close)
    }

    /// RFC 8297. An HTTP/1.0 client receives no interim responses (RFC 9110 §15.2).
    async fn early_hints(self) -> Result<Next, Broken> {
        if !self.http10 {
            self.wire.send(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload; as=style\r\n\r\n").await?;
        }
        self.text(StatusCode::OK, "The hints came first.\n").await
    }

    async fn trailers(mut self) -> Result<Next, Broken> {
        self.begin(StatusCode::OK, &[("Content-Type", TEXT), ("Trailer", "X-Trailer")], None);
        self.piece(b"A trailer follows.\n").await?;
        self.end(&[("X-Trailer", "the end")]).await
    }
}

/// The reason phrase of a status; empty if no standard defines one.
fn reason(status: StatusCode) -> &'static str {
    status.canonical_reason().unwrap_or_default()
}

async fn fault(wire: &mut Wire, fault: Fault) -> Result<Next, Broken> {
    let announced = |length| format!("HTTP/1.1 200 OK\r\nContent-Type: {TEXT}\r\nContent-Length: {length}\r\n\r\n");
    match fault {
        Fault::Close => {}
        Fault::Reset(_) => wire.reset()?,
        Fault::Hang => wire.hang().await,
        Fault::Early => {
            wire.send(b"HTTP/1.1 413 Payload Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await?;
            wire.close().await;
        }
        Fault::Garbage => {
            wire.send(b"\x00\x01\x02 this is not HTTP\r\n\r\n").await?;
            wire.close().await;
        }
        Fault::Half(length) => {
            wire.send(announced(length).as_bytes()).await?;
            let mut sent = 0;
            while sent < length / 2 {
                let piece = content_from(sent, (length / 2 - sent).min(PIECE_BYTES as u64));
                wire.send(piece).await?;
                sent += piece.len() as u64;
            }
            wire.close().await;
        }
        Fault::HalfChunked => {
            wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n").await?;
            wire.close().await;
        }
        Fault::Stall => {
            wire.send(&[announced(1000).as_bytes(), content_from(0, 500)].concat()).await?;
            wire.hang().await;
        }
        Fault::SlowHeader => {
            for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" {
                wire.send(&[*byte]).await?;
                wire.pause(SLOW_HEADER_PAUSE).await?;
            }
            wire.close().await;
        }
    }
    Ok(Next::Close)
}
